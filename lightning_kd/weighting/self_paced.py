from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.distributed import sum_over_ranks
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.float32_state import Float32State
from lightning_kd.weighting.base import Space, Weighting


class SelfPaced(Float32State, Weighting):
    r"""Stop listening to an expert when the student has caught up with it.

    .. math:: w_m = 1 \text{ if } A_S < b A_m, \text{ else }
        \max\Big(0, \frac{A_m - A_S}{(1 - b) A_m}\Big)

    with A the accuracies of student and expert on validation images of the expert's classes. The
    weights are scaled to sum to 1 and their mean multiplies all distillation terms (``strength``),
    so that distillation stops when the student matches everybody: the labels must then carry on,
    with a ``task_weight`` of 1, say. An expert of weight 0 is not run. All weights are 1 until the
    first validation; the state is in the checkpoint.

    Args:
        threshold: b, in [0, 1): share of the expert's accuracy at which its weight begins to fall.
        fade: Let all distillation fade; else only the shares of the experts change.
        classes: Classes of each expert; ``null``: those that its logits cover (see
            ``lightning_kd.Teacher``), usually all.
        space: ``"probability"`` or ``"logit"``: where answers are averaged.

    Raises:
        ValueError: If the threshold is out of range.

    Source:
        Xiang et al. 2020 (LFME), https://arxiv.org/abs/2001.01536, equation 5. Differs from the
        paper: the mean over experts instead of the sum, so that M equal experts count as one.
    """

    paced: Tensor
    known: Tensor
    counts: Tensor

    reads_logits = False

    def __init__(
        self,
        threshold: float = 0.3,
        fade: bool = True,
        classes: list[list[int]] | None = None,
        space: Space = "probability",
    ) -> None:
        super().__init__(space)
        if not 0 <= threshold < 1:
            raise ValueError(f"Expected threshold in [0, 1), got {threshold}.")
        self.threshold, self.fade, self.classes = threshold, fade, classes
        self._running: list[int] | None = None

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Start with all experts, and note who knows which classes.

        Raises:
            ValueError: If ``classes`` has not one list for each teacher.
        """
        if hasattr(self, "paced"):
            return
        known = torch.stack([teacher.logits[0] > -torch.inf for teacher in teachers])
        known = known.flatten(2).any(2) if known.dim() > 2 else known
        if self.classes is not None:
            if len(self.classes) != len(teachers):
                raise ValueError(
                    f"Expected one list of classes for each of {len(teachers)} teachers, got "
                    f"{len(self.classes)}."
                )
            known = torch.zeros_like(known)
            for m, classes in enumerate(self.classes):
                known[m, classes] = True
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("paced", torch.ones(len(teachers)))
        # rows: samples, right answers of the student, right answers of the expert
        self.register_buffer("counts", torch.zeros(3, len(teachers)), persistent=False)

    @property
    def strength(self) -> Tensor | float:
        """Mean weight of the experts, in [0, 1]; 1 without ``fade``."""
        return self.paced.mean() if self.fade else 1.0

    def active(self, num_teachers: int) -> Sequence[int]:
        """Experts of positive weight; none to learn from, or all to measure, if there is none."""
        if self._running is None:
            weights = self.paced.tolist() if hasattr(self, "paced") else [1.0] * num_teachers
            self._running = [m for m, weight in enumerate(weights) if weight > 0]
        return self._running or ([] if self.training and self.fade else range(num_teachers))

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights of the experts that ran, shape (M,)."""
        positive = self.paced[self.paced > 0] if not self._running else self.paced[self._running]
        if len(positive) != len(teachers):  # nobody is left, and the ensemble is measured
            positive = torch.ones(len(teachers), device=self.paced.device)
        return positive / positive.sum()

    def observe(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor
    ) -> None:
        """Count right answers on each expert's classes."""
        known = self.known[:, target.clamp(min=0)] & (target >= 0)
        right = torch.stack([t.logits.argmax(1) for t in teachers]) == target
        mine = (student.logits.argmax(1) == target).expand_as(known)
        both = torch.stack([known, known & mine, known & right])
        self.counts += both.flatten(2).sum(2).to(self.counts)

    def after_validation(self) -> None:
        """Set the weights from the validation that has just ended."""
        counts = sum_over_ranks(self.counts)
        seen, mine, theirs = counts / counts[0].clamp(min=1)
        # an expert that is never right has nothing to teach
        gap = (theirs - mine) / ((1 - self.threshold) * theirs).clamp(min=1e-12)
        weights = torch.where(mine < self.threshold * theirs, 1.0, gap.clamp(0.0, 1.0))
        self.paced.copy_(torch.where(seen > 0, weights, self.paced))
        self.counts.zero_()
        self._running = None

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._running = None
