from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge
from lightning_kd.losses import DistillationLoss, SoftTarget
from lightning_kd.modules.dry_run import ask
from lightning_kd.modules.one_student import OneStudent
from lightning_kd.teachers import SubTeachers
from lightning_kd.weighting import Weighting


class SubTeacher(OneStudent):
    """One student learns from labels and from several answers of one frozen teacher.

    Everything else is as in ``MultiTeacher``: every loss and weighting applies, and a list with one
    entry for each teacher has one for each sub-teacher here.

    Args:
        student: The network to train.
        teacher: One trained network of the same classes; it is never touched.
        source: What makes several out of one: ``StochasticDepth``, ``NoisyTeacher``,
            ``MultiView`` or ``Snapshot`` of ``lightning_kd.teachers``.
        losses: What is transferred, each with its weight; ``null``: ``SoftTarget`` at temperature
            4, weight 0.9.
        weighting: Whom to trust; ``null``: ``Uniform``.
        task_weight: Multiplier of the cross-entropy with the labels; labels of -1 are left out.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        optimizer: ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        num_classes: Of the data, checked against the networks; the command line fills it in.

    Raises:
        TypeError: If ``source`` is something else.
        ValueError: If student and teacher share weights.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: SubTeachers,
        losses: list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        task_weight: float = 0.1,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(source, SubTeachers):
            raise TypeError(
                f"Expected source of type SubTeachers, got {type(source).__name__}: use "
                f"StochasticDepth, NoisyTeacher, MultiView or Snapshot of lightning_kd.teachers."
            )
        self.take(
            student,
            [teacher],
            [SoftTarget(temperature=4.0, weight=0.9)] if losses is None else losses,
            weighting,
            task_weight,
            label_smoothing,
            optimizer,
            scheduler,
            scheduler_interval,
            num_classes,
        )
        self.source = source

    @property
    def voices(self) -> int:
        """Number of sub-teachers."""
        return self.source.count

    def teach(self, x: Tensor, indices: Sequence[int], logits: bool = True) -> list[Knowledge]:
        """Ask the sub-teachers of these indices; nothing is differentiated."""
        (teacher,) = self._teachers()
        with torch.no_grad():
            said: list[Knowledge] = self.source(teacher, x, indices, logits)
            return said

    def meet(self, parts: Sequence[DistillationLoss | Weighting], x: Tensor) -> list[Knowledge]:
        """Listen to the layers that these parts read, and ask every sub-teacher about one batch."""
        (teacher,) = self._teachers()
        layers = [n for p in parts for m in range(self.voices) for n in p.teacher_layers(m)]
        layers = list(dict.fromkeys(layers))
        teacher.listen(layers)
        ask("the teacher", teacher.network, teacher, x)
        self.source.attach(teacher, layers, x)
        with torch.no_grad():
            return self.source.ask(teacher, x, range(self.voices), True, 0)

    def networks(self) -> list[nn.Module]:
        """The network behind each sub-teacher."""
        (teacher,) = self._teachers()
        return self.source.networks(teacher)

    def on_fit_start(self) -> None:
        """Agree on a seed."""
        super().on_fit_start()
        self.source.seed = self.common_seed(self.source.seed)
