from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.functional import (
    combine_teachers,
    full_precision,
    global_average_pool,
    mean_over_positions,
)
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.weighting.base import Space, Weighting

RULED_OUT = 1e5  # a logit this low is that of a class that a teacher does not cover


class LearnedGate(Weighting):
    r"""A gate on the student's features, trained with it to make the ensemble's output right.

    .. math:: w = \mathrm{softmax}(W \bar a + b), \quad L_{gate} = CE(\sum_m w_m p_m, y)

    The gate is trained on the labels alone (``train/gate``): trained through the distillation
    losses, it would come to trust the teacher that is easiest to imitate. It starts with equal
    weights.

    Args:
        student_layer: Layer whose output, averaged over positions, layer-normalised and detached,
            the gate reads; ``None``: the student's log-probabilities.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Source:
        Liu et al. 2020 (AMTML-KD), "Adaptive multi-teacher multi-level knowledge distillation",
        Neurocomputing, equations 1 to 3: the product of a teacher's latent vector, the sample's
        embedding and a weight vector is a linear layer. Lan et al. 2018 (ONE),
        https://arxiv.org/abs/1806.04606, trains its gate by the same loss.
    """

    def __init__(self, student_layer: str | None = None, space: Space = "probability") -> None:
        super().__init__(space)
        self.student_layer = student_layer
        self._pending: Tensor | None = None

    def student_layers(self) -> Sequence[str]:
        """The layer that the gate reads."""
        return () if self.student_layer is None else (self.student_layer,)

    def _embed(self, student: NetworkOutput) -> Tensor:
        if self.student_layer is None:
            log_p = student.logits.detach().float().log_softmax(1)
            return log_p.flatten(2).mean(2) if log_p.dim() > 2 else log_p
        embedding = global_average_pool(student.feature(self.student_layer).detach()).float()
        return F.layer_norm(embedding, embedding.shape[1:])

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make the gate."""
        if not hasattr(self, "gate"):
            self.gate = nn.Linear(self._embed(student).shape[1], len(teachers))
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """Weights for each sample, shape (M, B), detached."""
        embedding = self._embed(student)
        self._pending = self.gate(embedding.to(self.gate.weight.dtype)).float().softmax(1).T
        return self._pending.detach()

    def loss(self, teachers: TeacherOutputs, target: Tensor | None) -> Tensor | None:
        """Cross-entropy of the weighted ensemble with the labels, a scalar."""
        assert self._pending is not None
        weights, self._pending = self._pending, None
        if target is None:
            return 0.0 * weights.sum()  # every parameter takes part in each step
        logits = torch.stack([member.logits for member in teachers.outputs])
        return mean_over_labelled(_ensemble_loss(logits, weights, target, self.space), target)


@full_precision
def _ensemble_loss(logits: Tensor, weights: Tensor, target: Tensor, space: str) -> Tensor:
    """Negative log-likelihood of the weighted ensemble, per sample, 0 where unlabelled."""
    # finite, since the gradient through minus infinity is NaN even where it is masked afterwards
    ensemble = combine_teachers(logits.clamp(min=-RULED_OUT), weights.clamp(min=1e-12), 1.0, space)
    value = F.nll_loss(ensemble, target, ignore_index=-1, reduction="none")
    # the gate has nothing to learn from a class that no teacher covers
    value = value.masked_fill(value > RULED_OUT / 100, 0.0)
    return mean_over_positions(value, target)
