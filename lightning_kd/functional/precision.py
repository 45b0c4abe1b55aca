"""Full precision under any autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

#: devices that have no float64
WITHOUT_FLOAT64 = ("mps",)


def widest(values: Tensor) -> Tensor:
    """In float64, or in float32 on a device that has no wider type (Apple's MPS)."""
    return values.float() if values.device.type in WITHOUT_FLOAT64 else values.double()


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run ``function`` in float32 whatever the autocast state; float64 stays float64.

    Divergences subtract nearly equal numbers and exponentials overflow in half precision, so
    every function of this package is computed in full precision under any autocast.

    Args:
        function: Takes tensors as positional or keyword arguments.

    Returns:
        The same function; half-precision tensor arguments reach it as float32.
    """

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        values: list[Any] = [*args, *kwargs.values()]
        device = next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device_type=device, enabled=False):
            return function(
                *(widen(v) for v in args),
                **{k: widen(v) for k, v in kwargs.items()},
            )

    return wrapped
