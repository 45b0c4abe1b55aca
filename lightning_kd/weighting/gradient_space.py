from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.distributed import sum_over_ranks, world_size
from lightning_kd.functional import MOST_GRADIENTS, min_norm_weights
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.checks import check_positive
from lightning_kd.utils.float32_state import Float32State
from lightning_kd.weighting.base import Space, Weighting


class GradientSpace(Float32State, Weighting):
    r"""Move the student where no teacher disagrees: the minimum-norm mixture of gradients.

    .. math:: \min_a \Big\| \sum_m a_m g_m \Big\|, \quad \sum_m a_m = 1, \quad 0 \le a_m \le C,
        \quad g_m = \tau\, \overline{(p_S^T - p_m^T)}

    The gradients of the soft-target losses with respect to the student's logits are known in closed
    form, so they need no backward pass, and the small problem is solved exactly on the device.
    Averages are over the global batch. The ensemble is evaluated with the weights of the last
    training batch, so that metrics do not depend on how images are batched.

    Args:
        c_max: Largest weight, in [1 / M, 1]. Below 1 it bounds the pull of outliers. (One teacher
            has weight 1. With ``normalize`` the bound holds before weights are scaled back.)
        temperature: Temperature of the soft-target loss.
        normalize: Compare directions: gradients are scaled to unit length first.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Raises:
        ValueError: If ``c_max`` is not positive, or a module has more than 8 teachers.

    Source:
        Du et al. 2020 (AEKD), "Agree to Disagree: Adaptive Ensemble Knowledge Distillation in
        Gradient Space", NeurIPS, equations 5 to 7.
    """

    last: Tensor

    def __init__(
        self,
        c_max: float = 0.6,
        temperature: float = 4.0,
        normalize: bool = False,
        space: Space = "probability",
    ) -> None:
        super().__init__(space)
        check_positive(temperature, "temperature")
        check_positive(c_max, "c_max")
        self.c_max, self.temperature, self.normalize = c_max, temperature, normalize

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Start from equal weights."""
        if not hasattr(self, "last"):
            self.register_buffer("last", torch.full((len(teachers),), 1 / len(teachers)))

    def active(self, num_teachers: int) -> Sequence[int]:
        """All teachers.

        Raises:
            ValueError: If there are too many teachers, or too few for ``c_max``.
        """
        if num_teachers > MOST_GRADIENTS or (num_teachers > 1 and self.c_max * num_teachers < 1):
            raise ValueError(
                f"Expected at most {MOST_GRADIENTS} teachers and c_max >= 1 / M, got "
                f"{num_teachers} teachers and c_max {self.c_max}."
            )
        return range(num_teachers)

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights for this batch, shape (M,); in evaluation, those of the last training batch."""
        if not self.training:
            return self.last
        t = self.temperature
        with torch.no_grad():
            student_p = (student.logits.float() / t).softmax(1)
            teacher_p = torch.stack([(m.logits.float() / t).softmax(1) for m in teachers])
            gradients = t * (student_p - teacher_p).transpose(1, 2).flatten(2).mean(2)
            gradients = sum_over_ranks(gradients) / world_size()
            lengths = gradients.norm(dim=1).clamp(min=1e-12)
            if self.normalize:
                gradients = gradients / lengths[:, None]
            bound = 1.0 if len(teachers) == 1 else min(self.c_max, 1.0)
            weights = min_norm_weights(gradients, bound)
            if self.normalize:
                weights = weights / lengths
                weights = weights / weights.sum()
            self.last.copy_(weights)
            return weights
