from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn


def make_optimizer(
    modules: Sequence[nn.Module],
    optimizer: OptimizerCallable | None,
    scheduler: LRSchedulerCallable | None,
    interval: str,
) -> OptimizerLRScheduler:
    """An optimizer of what can be trained in these modules, and its schedule.

    Args:
        modules: What is trained; never a teacher.
        optimizer: ``None``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: ``None``: constant.
        interval: ``"epoch"`` or ``"step"``: when the schedule moves.

    Raises:
        ValueError: If nothing can be trained.
    """
    parameters = [p for part in modules for p in part.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("Expected a network with parameters to train, got none.")
    if optimizer is None:
        made: torch.optim.Optimizer = torch.optim.SGD(
            parameters, lr=0.05, momentum=0.9, weight_decay=5e-4
        )
    else:
        made = optimizer(parameters)
    if scheduler is None:
        return made
    schedule = scheduler(made)
    plateau = {"monitor": schedule.monitor} if isinstance(schedule, ReduceLROnPlateau) else {}
    config = {"scheduler": schedule, "interval": interval, **plateau}
    return {"optimizer": made, "lr_scheduler": config}  # type: ignore[return-value]
