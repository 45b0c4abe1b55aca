from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn

from lightning_kd.modules.base import Distiller


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
        self.manual_backward(torch.stack(list(terms.values())).sum())
        if clip_norm is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:  # fp16: gradients are scaled until the step
                scaler.unscale_(optimizer.optimizer)
            for network in networks:
                nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
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
