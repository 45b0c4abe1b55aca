"""What Lightning leaves to a module that steps its optimizers by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from lightning_kd.base_distillation import total_loss
from lightning_kd.distributed import step_alone
from lightning_kd.modules.base import Distiller


def step(
    module: LightningModule,
    optimizer: Any,
    losses: dict[str, Tensor],
    networks: Iterable[nn.Module] = (),
    clip_norm: float | None = None,
) -> None:
    """Backward through the sum of the losses and one optimizer step.

    Args:
        module: Under manual optimization.
        optimizer: One of ``module.optimizers()``; parameters without gradient stay as they are.
        losses: Scalars by name.
        networks: Whose gradients are clipped, each by itself.
        clip_norm: Largest norm of a network's gradient; None: not clipped.
    """
    optimizer.zero_grad()
    module.manual_backward(total_loss(losses))
    if clip_norm is not None:
        scaler = _scaler(module)
        # fp16: gradients are scaled, and Lightning unscales them inside the step
        scale = 1.0 if scaler is None else scaler.get_scale()
        for network in networks:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm * scale)
    optimizer.step()


def step_modules(
    module: LightningModule, optimizer: Any, loss: Tensor, parts: Iterable[nn.Module]
) -> None:
    """One optimizer step on the gradients of these parts, averaged over processes."""
    scaler = _scaler(module)
    chosen = [p for part in parts for p in part.parameters() if p.requires_grad]
    step_alone(loss if scaler is None else scaler.scale(loss), chosen, optimizer)


def step_schedules(module: LightningModule, interval: str) -> None:
    """Move the learning rates, after every step or after the last one of an epoch."""
    schedulers: Any = module.lr_schedulers()
    if schedulers is None or not (interval == "step" or module.trainer.is_last_batch):
        return
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if isinstance(scheduler, ReduceLROnPlateau):
            metric = module.trainer.callback_metrics.get(scheduler.monitor)
            if metric is not None:  # nothing was validated yet
                scheduler.step(metric)
        else:
            scheduler.step()


@contextlib.contextmanager
def full_precision_if_scaled(module: LightningModule) -> Iterator[None]:
    """Float32 inside under fp16, for losses that its one gradient scaler knows nothing of."""
    if _scaler(module) is None:
        yield
        return
    with torch.autocast(module.device.type, enabled=False):
        yield


def refuse_own_losses(module: Distiller) -> None:
    """Raise ``TypeError`` if a subclass overrides ``compute_losses``, which is not called here."""
    if type(module).compute_losses is not Distiller.compute_losses:
        raise TypeError(
            f"Expected {type(module).__name__} without compute_losses, which this way of taking "
            f"steps does not call: override training_step, or add a loss or image loss."
        )


def _scaler(module: LightningModule) -> Any:
    return getattr(module.trainer.precision_plugin, "scaler", None)
