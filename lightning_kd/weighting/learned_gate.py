from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.functional import combine_teachers, full_precision, global_average_pool
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.weighting.base import Space, Weighting

RULED_OUT = 1e5  # a logit that far down is that of a class which a teacher does not know


class LearnedGate(Weighting):
    r"""A gate on what the student sees, trained with it: the ensemble's answer is to be right.

    .. math:: w = \mathrm{softmax}(W \bar a + b), \quad L_{gate} = CE(\sum_m w_m p_m, y)

    The gate learns from the labels alone (``train/gate``) and from nothing else: learning through
    the distillation losses it would come to trust the teacher that is easiest to imitate. It starts
    with equal weights.

    Args:
        student_layer: Layer whose output, averaged over positions, layer-normalised and detached,
            the gate reads; ``null``: the student's log-probabilities.
        space: ``"probability"`` or ``"logit"``: where answers are averaged.

    Source:
        Liu et al. 2020 (AMTML-KD), "Adaptive multi-teacher multi-level knowledge distillation",
        Neurocomputing, equations 1 to 3: the product of a teacher's latent vector, the sample's
        embedding and a weight vector is a linear layer. Lan et al. 2018 (ONE),
        https://arxiv.org/abs/1806.04606, trains its gate by the same loss.
    """

    def __init__(self, student_layer: str | None = None, space: Space = "probability") -> None:
        super().__init__(space)
        self.student_layer = student_layer
        self._live: Tensor | None = None

    def student_layers(self) -> Sequence[str]:
        """The layer that the gate reads."""
        return () if self.student_layer is None else (self.student_layer,)

    def _embed(self, student: NetworkOutput) -> Tensor:
        if self.student_layer is None:
            said = student.logits.detach().float().log_softmax(1)
            return said.flatten(2).mean(2) if said.dim() > 2 else said
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
        """Weights of each sample, shape (M, B), detached."""
        embedding = self._embed(student)
        self._live = self.gate(embedding.to(self.gate.weight.dtype)).float().softmax(1).T
        return self._live.detach()

    def loss(self, teachers: TeacherOutputs, target: Tensor | None) -> Tensor | None:
        """Cross-entropy of the weighted answer with the labels, a scalar."""
        assert self._live is not None
        weights, self._live = self._live, None
        if target is None:
            return 0.0 * weights.sum()  # every parameter takes part in each step
        logits = torch.stack([member.logits for member in teachers.outputs])
        return mean_over_labelled(_answer_loss(logits, weights, target, self.space), target)


@full_precision
def _answer_loss(logits: Tensor, weights: Tensor, target: Tensor, space: str) -> Tensor:
    """Negative log-likelihood of the weighted answer, per sample, 0 where unlabelled."""
    # finite, since gradient through minus infinity is NaN even where it is masked afterwards
    answer = combine_teachers(logits.clamp(min=-RULED_OUT), weights.clamp(min=1e-12), 1.0, space)
    value = F.nll_loss(answer, target, ignore_index=-1, reduction="none")
    # a class that no teacher knows teaches the gate nothing
    value = value.masked_fill(value > RULED_OUT / 100, 0.0)
    return value.flatten(1).mean(1) if value.dim() > 1 else value
