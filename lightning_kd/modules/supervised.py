from __future__ import annotations

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge
from lightning_kd.modules.one_student import OneStudent
from lightning_kd.teachers import StochasticDepth


class Supervised(OneStudent):
    """One network learns from labels alone: trains a teacher, or the baseline of a student.

    Args:
        student: The network to train.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        depth: Leave out blocks at random while training, so that the network can be a teacher of
            ``SubTeacher`` by the same part; one path a batch, whatever its ``count``.
        optimizer: ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        num_classes: Of the data, checked against the student; the command line fills it in.
    """

    def __init__(
        self,
        student: nn.Module,
        label_smoothing: float = 0.0,
        depth: StochasticDepth | None = None,
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
        self.depth = depth

    def learn(self, x: Tensor) -> Knowledge:
        """Ask the student, in training on one random path."""
        if self.depth is None or not self.training:
            return super().learn(x)
        with self.depth.one_path():
            return super().learn(x)

    def prepare(self, x: Tensor) -> None:
        """Find the blocks, too; see ``OneStudent.prepare``."""
        if not self.prepared and self.depth is not None:
            self.depth.prepare(self.student, x[:1])
        super().prepare(x)

    def on_fit_start(self) -> None:
        """Agree on a seed."""
        super().on_fit_start()
        if self.depth is not None:
            self.depth.seed = self.common_seed(self.depth.seed)
