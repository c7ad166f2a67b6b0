"""Validate the `impl` argument that every op of this package takes."""

IMPLEMENTATIONS = ("auto", "ref", "composed", "cpp", "cuda")


def resolve_impl(op: str, impl: str) -> str:
    """Return the implementation to run: "ref" or "composed".

    "auto" means the fastest one that is present; so far that is "composed", built from PyTorch convolutions. The
    names "cpp" and "cuda" are kept for compiled kernels.

    Raises ValueError for an unknown name and RuntimeError for one that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl is {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl in ("cpp", "cuda"):
        raise RuntimeError(f"{op}: impl is {impl!r}, which this version does not build; use 'auto'")
    return "composed" if impl == "auto" else impl
