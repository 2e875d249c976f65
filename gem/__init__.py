"""gem: generative entropy-guided preference modelling (arXiv 2511.13007) on top of gem_kernels and transformers."""
