"""Choose the number format each block of a network computes in."""

import torch

from training.config_networks import HALF_DTYPES


def half_dtype_at(resolution: int, img_resolution: int, num_fp16_res: int, half_dtype: str) -> torch.dtype | None:
    """Return the half format of the block at `resolution`, or None if it computes in full precision.

    The `num_fp16_res` highest resolutions take half precision, but never one below 8.
    Raises ValueError for an unknown format.
    """
    if half_dtype not in HALF_DTYPES:
        raise ValueError(f"half_dtype is {half_dtype!r}; expected one of {', '.join(HALF_DTYPES)}")
    lowest = max(2 * img_resolution >> num_fp16_res, 8)
    return getattr(torch, half_dtype) if resolution >= lowest else None


def compute_dtype(parameter: torch.Tensor, half: torch.dtype | None, force_fp32: bool) -> torch.dtype:
    """Return the dtype to compute in: `half` only where it is wanted and the parameters are float32."""
    if half is None or force_fp32 or parameter.dtype != torch.float32:
        return parameter.dtype
    return half
