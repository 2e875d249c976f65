"""gem: GEM (arXiv 2511.13007) on a Hugging Face model; `gem.fuse_lm_head(model)` attaches the head of gem_kernels."""


def __getattr__(name: str) -> object:
    """Import gem.head on first use: gem.config and gem.report work without torch and transformers."""
    if name in ("fuse_lm_head", "unfuse"):
        from gem import head

        return getattr(head, name)
    raise AttributeError(f"module 'gem' has no attribute {name!r}")
