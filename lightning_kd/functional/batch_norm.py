"""Statistics of the inputs of BatchNorm layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def channel_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all but the channels, of values (B, C, ...), each (C,).

    As ``torch.var_mean``, but three times as fast with its gradient on a CPU; differentiable once.
    Half precision is computed in float32.
    """
    with torch.autocast(values.device.type, enabled=False):
        wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        found: tuple[Tensor, Tensor] = _ChannelStatistics.apply(wide)
        return found


class _ChannelStatistics(torch.autograd.Function):
    """Autograd would pass over the values five times in backward; once is enough."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(values.dim()) if d != 1]
        mean = values.mean(dims, keepdim=True)
        variance = (values - mean).square_().mean(dims)
        ctx.save_for_backward(values, mean)
        return mean.flatten(), variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        count = values.numel() // mean.numel()
        slope = (2 / count) * of_variance.view_as(mean)
        return torch.addcmul(of_mean.view_as(mean) / count - slope * mean, slope, values)


def statistics_gap(found: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    r"""Distance of image statistics from the running statistics of BatchNorm layers.

    .. math:: \sum_l \|\mu_l - \hat\mu_l\|_2 + \|\sigma^2_l - \hat\sigma^2_l\|_2

    Args:
        found: For each layer: mean, variance, running mean and variance, each of shape (C,).

    Returns:
        A scalar; its gradient is 0, not NaN, where nothing differs.

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, equation 4; SSD-KD,
        equation 1.
    """
    gaps = []
    for mean, variance, running_mean, running_variance in found:
        gaps.append(torch.linalg.vector_norm(mean - running_mean))
        gaps.append(torch.linalg.vector_norm(variance - running_variance))
    return torch.stack(gaps).sum()
