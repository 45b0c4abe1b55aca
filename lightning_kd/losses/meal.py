from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.functional import full_precision, global_average_pool, kl_divergence
from lightning_kd.losses.base import LayerLoss
from lightning_kd.outputs import NetworkOutput


class _Reverse(torch.autograd.Function):
    """Identity whose gradient changes sign: one step trains both sides of a game."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        reversed_: Tensor = -grads[0]
        return reversed_


class MEAL(LayerLoss):
    r"""Adversarial learning of several teachers' features: a discriminator for each teacher.

    .. math:: \gamma\, CE(\mathrm{softmax}\, x_m, \mathrm{softmax}\, x_S) + \eta\, BCE(D_m)

    Features are averaged over positions, the student's mapped to the teacher's width. The
    discriminator learns to tell them apart; through a gradient reversal the student learns to fool
    it in the same step, so automatic optimization suffices. One instance per level. The paper uses
    one random teacher per batch, as the weighting ``Switching`` does.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        similarity_weight: Gamma, multiplier of the divergence of the softmaxed features; KL, which
            has the gradient of the cross-entropy and a minimum of 0.
        adversarial_weight: Eta, multiplier of the discriminator's binary cross-entropy.
        weight: Multiplier of this loss in the total.

    Source:
        Shen et al. 2019, https://arxiv.org/abs/1812.02425, equations 4 to 8. Differs from the
        authors' code: there the reversal is off by default, so that the student is pushed away.
    """

    def __init__(
        self,
        student_layer: str,
        teacher_layer: str | list[str],
        similarity_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layer, teacher_layer, weight)
        self.similarity_weight = similarity_weight
        self.adversarial_weight = adversarial_weight
        self.projections = nn.ModuleList()
        self.discriminators = nn.ModuleList()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Make a projection and a discriminator for each teacher."""
        if self.discriminators:
            return
        student_width = global_average_pool(self.student_feature(student)).shape[1]
        for m, teacher in enumerate(teachers):
            width = global_average_pool(self.teacher_feature(m, teacher)).shape[1]
            self.projections.append(nn.Linear(student_width, width))
            self.discriminators.append(
                nn.Sequential(
                    nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                    nn.Linear(128, 1),
                )
            )  # fmt: skip

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Per sample, shape (B,)."""
        mapped, pooled = (
            self.projections[index](global_average_pool(student)),
            global_average_pool(teacher),
        )
        fake = self.discriminators[index](_Reverse.apply(mapped))
        real = self.discriminators[index](pooled)
        similarity = kl_divergence(mapped, pooled)
        return self.similarity_weight * similarity + self.adversarial_weight * _discriminator_loss(
            real, fake
        )


@full_precision
def _discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator's two outputs (B, 1), per sample."""
    return (F.softplus(-real) + F.softplus(fake))[:, 0] / 2
