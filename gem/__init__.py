"""gem: GEM (arXiv 2511.13007) on a Hugging Face model; `gem.fuse_lm_head(model)` gives the model the head of gem_kernels."""


def __getattr__(name: str) -> object:
    """Imported when asked for: gem.config and gem.report work where torch and transformers are not installed."""
    if name in ("fuse_lm_head", "unfuse"):
        from gem import head

        return getattr(head, name)
    raise AttributeError(f"module 'gem' has no attribute {name!r}")
