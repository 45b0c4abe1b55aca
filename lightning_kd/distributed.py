"""What processes that train together must agree on; plain values if there is only one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.functional import is_labelled


def world_size() -> int:
    """Number of processes that train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def rank() -> int:
    """Number of this process among those that train together."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient; every process must call it."""
    if world_size() > 1:
        values = values.detach().clone()
        torch.distributed.all_reduce(values)
    return values


def mean_over_labelled(values: Tensor, target: Tensor) -> Tensor:
    """Mean of per-sample values over labelled samples, such that gradients are correct under DDP.

    DDP averages gradients over processes; the count is that of all of them, so that processes with
    few labels do not count more.

    Args:
        values: Shape (B,), 0 where there is no label.
        target: Labels, shape (B, ...), -1 where unlabelled.

    Returns:
        A scalar; 0 where nothing is labelled.
    """
    count = is_labelled(target).sum().to(values.dtype)
    if torch.is_grad_enabled():  # a measurement on some processes must not wait for the others
        count = sum_over_ranks(count) / world_size()
    return values.sum() / count.clamp(min=1e-6)


def gather_over_ranks(values: Tensor) -> list[Tensor]:
    """The tensors of all processes in order, without gradient; every process must call it."""
    values = values.detach().contiguous()
    if world_size() == 1:
        return [values]
    everyone = [torch.empty_like(values) for _ in range(world_size())]
    torch.distributed.all_gather(everyone, values)
    return everyone


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes, as DDP does; every process must call it."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world_size()
    shares = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, shares, strict=True):
        gradient.copy_(mean.view_as(gradient))


def step_alone(loss: Tensor, parameters: Iterable[nn.Parameter | Tensor], optimizer: Any) -> None:
    """One step on these parameters alone, with gradients averaged over processes.

    Not via Lightning's ``manual_backward``: its DDP expects every parameter in each backward pass.
    """
    chosen = list(parameters)
    optimizer.zero_grad()
    torch.autograd.backward(loss, inputs=chosen)
    average_gradients(chosen)
    optimizer.step()


def gather_objects(value: Any) -> list[Any]:
    """Objects of all processes in order, sent by pickle; every process must call it."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def broadcast_buffers(*modules: nn.Module) -> None:
    """Give all processes the first one's float buffers, as DDP does; all must call it."""
    if world_size() == 1:
        return
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.detach().flatten() for b in buffers])
    torch.distributed.broadcast(flat, 0)
    for buffer, first in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(first.view_as(buffer))
