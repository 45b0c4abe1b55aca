from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_kd.exchange.base import Exchange, all_others, detached
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_space


class Mutual(Exchange):
    r"""Every peer learns from all others (deep mutual learning).

    .. math:: \frac{1}{K - 1} \sum_{l \ne k} KL(p_l \| p_k)

    With the loss ``SoftTarget(temperature=1)`` this is the paper's. Its variant that averages the
    others' probabilities into one teacher has the same gradient, so there is no option for it;
    ``space="logit"`` averages logits instead, which differs.

    Args:
        space: ``"probability"`` or ``"logit"``: the space in which the others are averaged.

    Source:
        Zhang et al. 2018, https://arxiv.org/abs/1706.00384, equations 5 to 8.
    """

    def __init__(self, space: str = "probability") -> None:
        super().__init__()
        check_space(space)
        self.space = space

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> list[TeacherOutputs]:
        """All others, weighted equally."""
        return all_others(detached(peers), self.space)


class LeaveOneOut(Mutual):
    """Every peer learns from the mean of the other peers' logits (collaborative learning, CL-ILR).

    Use it on a ``MultiBranch`` network with ``SoftTarget(temperature=2)``; the network divides the
    gradient at its split by the number of branches.

    Source:
        Song & Chai 2018, https://arxiv.org/abs/1805.11761, equations 2 to 4.
    """

    def __init__(self) -> None:
        super().__init__("logit")
