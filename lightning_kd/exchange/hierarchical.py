from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.exchange.base import Exchange, detached
from lightning_kd.functional import task_cross_entropy
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class Hierarchical(Exchange):
    r"""The last peer teaches all others: in a ``Tree``, the full ensemble the smaller ones.

    .. math:: \sum_n w\, CE(f_n, y) + \sum_b (1 - a) CE(F_b, y) + a \tau^2 KL(F_D \| F_b)

    with ``leaf_weight`` :math:`w`, ``task_weight`` :math:`1 - a` and the loss ``SoftTarget`` of
    weight :math:`a`.

    Args:
        leaf_weight: Multiplier of each leaf's own cross-entropy with the labels. At 0 the last
            leaves are trained only as parts of a mean of many, which is soon right without them.

    Raises:
        ValueError: If it is negative.

    Source:
        Ruiz & Verbeek 2020 (HNE), https://arxiv.org/abs/2003.01474, section 3.2.
    """

    allows_sequential_update = False

    def __init__(self, leaf_weight: float = 0.0) -> None:
        super().__init__()
        if leaf_weight < 0:
            raise ValueError(f"Expected leaf_weight >= 0, got {leaf_weight}.")
        self.leaf_weight = leaf_weight

    def layers(self) -> Sequence[str]:
        """The leaves."""
        return ("leaves",) if self.leaf_weight else ()

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """The last peer for each of the others, no teacher for the last one."""
        last = len(peers) - 1
        teacher = TeacherOutputs.uniform(detached(peers[-1:]), "logit", (last,))
        return [*([teacher] * last), None]

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Cross-entropy of each single leaf with the labels."""
        if target is None or not self.leaf_weight:
            return {}
        leaves = peers[-1].feature("leaves")
        labels = target.repeat_interleave(leaves.shape[1], 0)
        each = task_cross_entropy(leaves.flatten(0, 1), labels).view(leaves.shape[:2]).sum(1)
        return {"leaves/task": self.leaf_weight * mean_over_labelled(each, target)}

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """Prediction of the last peer."""
        return peers[-1].logits.float().log_softmax(1)
