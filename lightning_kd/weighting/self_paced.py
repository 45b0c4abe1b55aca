from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.distributed import sum_over_ranks
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.float32_state import Float32State
from lightning_kd.weighting.base import Space, Weighting


class SelfPaced(Float32State, Weighting):
    r"""Phase out an expert as the student catches up with it.

    .. math:: w_m = 1 \text{ if } A_S < b A_m, \text{ else }
        \max\Big(0, \frac{A_m - A_S}{(1 - b) A_m}\Big)

    with A the accuracies of student and expert on validation images of the expert's classes. The
    weights are scaled to sum to 1 and their mean multiplies all distillation losses (``strength``),
    so that distillation stops when the student matches all experts: the labels must then take over,
    with a ``task_weight`` of 1, say. An expert with weight 0 is not run. All weights are 1 until
    the first validation; the state is in the checkpoint.

    Args:
        threshold: b, in [0, 1): share of the expert's accuracy at which its weight begins to fall.
        fade: Let all distillation fade; otherwise only the shares of the experts change.
        classes: Classes of each expert; ``None``: those that its logits cover (see
            ``lightning_kd.Teacher``), usually all.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Raises:
        ValueError: If the threshold is out of range.

    Source:
        Xiang et al. 2020 (LFME), https://arxiv.org/abs/2001.01536, equation 5. Differs from the
        paper: the mean over experts instead of the sum, so that M equal experts count as one.
    """

    expert_weights: Tensor
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
        """Start with all experts, and record the classes of each.

        Raises:
            ValueError: If ``classes`` does not have one list per teacher.
        """
        if hasattr(self, "expert_weights"):
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
        self.register_buffer("expert_weights", torch.ones(len(teachers)))
        # rows: samples, correct predictions of the student, correct predictions of the expert
        self.register_buffer("counts", torch.zeros(3, len(teachers)), persistent=False)

    @property
    def strength(self) -> Tensor | float:
        """Mean weight of the experts, in [0, 1]; 1 without ``fade``."""
        return self.expert_weights.mean() if self.fade else 1.0

    def active(self, num_teachers: int) -> Sequence[int]:
        """Experts of positive weight; if there are none: none in training, all in evaluation."""
        if self._running is None:
            weights = (
                self.expert_weights.tolist()
                if hasattr(self, "expert_weights")
                else [1.0] * num_teachers
            )
            self._running = [m for m, weight in enumerate(weights) if weight > 0]
        return self._running or ([] if self.training and self.fade else range(num_teachers))

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights of the experts that ran, shape (M,)."""
        positive = (
            self.expert_weights[self.expert_weights > 0]
            if not self._running
            else self.expert_weights[self._running]
        )
        if len(positive) != len(teachers):  # no expert is left, and the ensemble is evaluated
            positive = torch.ones(len(teachers), device=self.expert_weights.device)
        return positive / positive.sum()

    def observe(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor
    ) -> None:
        """Count correct predictions on each expert's classes."""
        known = self.known[:, target.clamp(min=0)] & (target >= 0)
        expert_right = torch.stack([t.logits.argmax(1) for t in teachers]) == target
        student_right = (student.logits.argmax(1) == target).expand_as(known)
        rows = torch.stack([known, known & student_right, known & expert_right])
        self.counts += rows.flatten(2).sum(2).to(self.counts)

    def after_validation(self) -> None:
        """Set the weights from the validation that has just ended."""
        counts = sum_over_ranks(self.counts)
        seen, student, expert = counts / counts[0].clamp(min=1)
        # an expert that is never right has nothing to teach
        gap = (expert - student) / ((1 - self.threshold) * expert).clamp(min=1e-12)
        weights = torch.where(student < self.threshold * expert, 1.0, gap.clamp(0.0, 1.0))
        self.expert_weights.copy_(torch.where(seen > 0, weights, self.expert_weights))
        self.counts.zero_()
        self._running = None

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._running = None
