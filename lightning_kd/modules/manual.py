from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from lightning_kd.modules.base import Distiller
from lightning_kd.sources.base import descend


class ManualSteps(Distiller):
    """What Lightning leaves to a module that steps its optimizers by hand."""

    def advance(
        self,
        optimizer: Any,
        terms: dict[str, Tensor],
        networks: Iterable[nn.Module] = (),
        clip_norm: float | None = None,
    ) -> None:
        """Backward through the sum of the terms and one optimizer step.

        Args:
            optimizer: One of ``self.optimizers()``; parameters without gradient stay as they are.
            terms: Scalars by name.
            networks: Whose gradients are clipped, each by itself.
            clip_norm: Largest norm of a network's gradient; ``None``: not clipped.
        """
        optimizer.zero_grad()
        self.manual_backward(self.total(terms))
        if clip_norm is not None:
            scaler = self._scaler()
            # fp16: gradients are scaled, and Lightning unscales them inside the step
            scale = 1.0 if scaler is None else scaler.get_scale()
            for network in networks:
                nn.utils.clip_grad_norm_(network.parameters(), clip_norm * scale)
        optimizer.step()

    def advance_schedules(self) -> None:
        """Move the learning rates, after every step or after the last one of an epoch."""
        schedulers: Any = self.lr_schedulers()
        if schedulers is None or not (
            self._scheduler_interval == "step" or self.trainer.is_last_batch
        ):
            return
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if isinstance(scheduler, ReduceLROnPlateau):
                metric = self.trainer.callback_metrics.get(scheduler.monitor)
                if metric is not None:  # nothing was validated yet
                    scheduler.step(metric)
            else:
                scheduler.step()

    def descend(self, optimizer: Any, loss: Tensor, parts: Iterable[nn.Module]) -> None:
        """One optimizer step on the gradients of these parts, averaged over processes."""
        scaler = self._scaler()
        chosen = [p for part in parts for p in part.parameters() if p.requires_grad]
        descend(loss if scaler is None else scaler.scale(loss), chosen, optimizer)

    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @contextlib.contextmanager
    def full_precision_if_scaled(self) -> Iterator[None]:
        """Float32 inside under fp16, for losses that its one gradient scaler knows nothing of."""
        if self._scaler() is None:
            yield
            return
        with torch.autocast(self.device.type, enabled=False):
            yield
