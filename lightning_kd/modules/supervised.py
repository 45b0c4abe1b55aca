from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_kd.modules.one_student import OneStudent


class Supervised(OneStudent):
    """One network learns from labels alone: trains a teacher, or the baseline of a student.

    Args:
        student: The network to train.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        optimizer: ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        num_classes: Of the data, checked against the student; the command line fills it in.
    """

    def __init__(
        self,
        student: nn.Module,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.take(
            student,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            num_classes=num_classes,
        )
