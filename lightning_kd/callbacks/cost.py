"""What a network costs."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_kd.features import modes_kept

LATENCY_RUNS = 20


def name_of(network: nn.Module) -> str:
    """Name a network by its class and size."""
    inner = network
    while isinstance(getattr(inner, "network", None), nn.Module):  # Normalized, Resized
        inner = inner.network  # type: ignore[assignment]
    args = getattr(inner, "init_args", {})
    suffix = "".join(f"-{args[k]}" for k in ("depth", "widen_factor") if k in args)
    return type(inner).__name__ + suffix


@torch.no_grad()
def cost_of(
    network: nn.Module, input_shape: tuple[int, ...] | None, device: torch.device
) -> dict[str, Any]:
    """Parameters, floating point operations and milliseconds of one image (C, H, W)."""
    floats = (p.dtype for p in network.parameters() if p.is_floating_point())
    dtype = next(floats, torch.float32)  # not float32 under bf16-true and 64-true
    x = torch.zeros(1, *(input_shape or ()), device=device, dtype=dtype)
    with modes_kept(network):
        network.eval()
        flops: int | None = None
        # compiled or scripted networks cannot be counted
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
            network(x)
            flops = counter.get_total_flops()
        times = []
        for _ in range(LATENCY_RUNS):
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            start = time.perf_counter()
            network(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(1e3 * (time.perf_counter() - start))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": flops,
        "latency_ms": round(statistics.median(times), 3),
    }
