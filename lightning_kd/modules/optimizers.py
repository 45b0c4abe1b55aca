from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_kd.tasks import Task


def make_optimizer(
    modules: Sequence[nn.Module],
    optimizer: OptimizerCallable | None,
    scheduler: LRSchedulerCallable | None,
    interval: str,
    task: Task,
) -> OptimizerLRScheduler:
    """An optimizer of what can be trained in these modules, and its schedule.

    Args:
        modules: What is trained; never a teacher.
        optimizer: ``None``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: ``None``: constant.
        interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        task: Whose watched metric a plateau is one of, if its mode fits, else the loss.

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
    config = {"scheduler": schedule, "interval": interval}
    if isinstance(schedule, ReduceLROnPlateau):  # Lightning's, which names what it watches
        config["monitor"] = schedule.monitor
    elif isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
        better = schedule.mode == ("max" if task.higher_is_better else "min")
        config["monitor"] = f"val/{task.watched}" if better else "val/loss"
    return {"optimizer": made, "lr_scheduler": config}  # type: ignore[return-value]


def warn_of_untrained(module: LightningModule, modules: Sequence[nn.Module]) -> None:
    """Warn where parts that are to learn are in no optimizer, as with one of the user's own."""
    groups = [group for each in module.trainer.optimizers for group in each.param_groups]
    trained = {id(p) for group in groups for p in group["params"]}
    wanted = {id(p) for part in modules for p in part.parameters() if p.requires_grad} - trained
    left = [name for name, p in module.named_parameters() if id(p) in wanted]
    if left:
        names = dict.fromkeys(".".join(name.split(".")[1:4]) for name in left)
        rank_zero_warn(
            f"No optimizer trains {', '.join(list(names)[:6])}: adapters and gates are to learn as "
            f"the student does. Give the optimizer as an option (optimizer=...), or in "
            f"configure_optimizers make one of all that trainable_modules() returns."
        )
