from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_kd.exchange.base import Exchange, detached, mean_of
from lightning_kd.knowledge import Ensemble, Knowledge


class Hierarchical(Exchange):
    r"""The last peer teaches all others: the full ensemble of a ``Tree`` its smaller ones.

    .. math:: \sum_b (1 - a) CE(F_b, y) + a \tau^2 KL(F_D \| F_b)

    with ``task_weight`` :math:`1 - a` and the loss ``SoftTarget`` of weight :math:`a`. Leaves are
    not taught one by one, so that they stay different.

    Source:
        Ruiz & Verbeek 2020 (HNE), https://arxiv.org/abs/2003.01474, section 3.2.
    """

    steps_apart = False

    def forward(
        self, peers: Sequence[Knowledge], target: Tensor | None
    ) -> Sequence[Ensemble | None]:
        """The last one for each other, nobody for itself."""
        last = len(peers) - 1
        teacher = mean_of(detached(peers[-1:]), "logit", (last,))
        return [*([teacher] * last), None]

    def answer(self, peers: Sequence[Knowledge]) -> Tensor:
        """What the last one says."""
        return peers[-1].logits.float().log_softmax(1)
