"""What the machine is good at: which formats it multiplies."""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The format in which to multiply matrices when ``dtype`` is asked for: float32 if the CPU only emulates it."""
    if device.type != "cpu" or dtype.itemsize >= torch.float32.itemsize or cpu_multiplies(dtype):
        return dtype
    _say_once(dtype)
    return torch.float32


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in a format."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None:  # older versions of torch do not tell
        return True
    has = get_capabilities()
    names = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
    }
    return any(has.get(name, False) for name in names.get(dtype, ()))


@cache
def _say_once(dtype: torch.dtype) -> None:
    logger.info(
        "this CPU has no instructions for %s products; nowcasts are computed in float32, which is faster", dtype
    )
