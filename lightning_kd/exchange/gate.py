from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.exchange.base import Exchange, detached, run
from lightning_kd.functional import combine_teachers, global_average_pool, task_cross_entropy
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class Gate(Exchange):
    r"""A gate combines all branches into one ensemble, which teaches each of them (ONE).

    .. math:: z_e = \sum_k g_k z_k, \quad g = \mathrm{softmax}(\mathrm{ReLU}(BN(W \bar x))), \quad
        L = CE(z_e, y) + \sum_k \tau^2 KL(p_e \| p_k)

    The gate reads a layer that all branches share (of a ``MultiBranch`` network), or, for separate
    networks, the first one's. It is trained through the ensemble's cross-entropy alone, together
    with the branches.

    Args:
        layer: Dotted name of the layer that the gate reads, averaged over positions.
        task_weight: Multiplier of the ensemble's cross-entropy.

    Source:
        Lan et al. 2018, https://arxiv.org/abs/1806.04606, equations 3 to 7.
    """

    allows_sequential_update = False

    def __init__(self, layer: str, task_weight: float = 1.0) -> None:
        super().__init__()
        self.layer, self.task_weight = layer, task_weight

    def layers(self) -> Sequence[str]:
        """The layer that the gate reads."""
        return (self.layer,)

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Make the gate."""
        super().build(peers)
        if not hasattr(self, "gate"):
            width, count = global_average_pool(peers[0].feature(self.layer)).shape[1], len(peers)
            self.gate = nn.Sequential(nn.Linear(width, count), nn.BatchNorm1d(count), nn.ReLU())

    def weights(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """Weight of each branch for each sample, shape (K, B), with gradient."""
        scores = run(self.gate, global_average_pool(peers[0].feature(self.layer)))
        return scores.float().softmax(1).T

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> list[TeacherOutputs]:
        """The gated ensemble, the same for every branch."""
        self._pending = self.weights(peers)
        ensemble = TeacherOutputs(detached(peers), self._pending.detach(), "logit")
        return [ensemble] * len(peers)

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Cross-entropy of the gated ensemble, with gradient to gate and branches."""
        weights, self._pending = self._pending, torch.empty(0)
        if target is None:
            return {"gate": 0.0 * weights.sum()}
        ensemble = combine_teachers(torch.stack([p.logits for p in peers]), weights, 1.0, "logit")
        loss = mean_over_labelled(task_cross_entropy(ensemble, target), target)
        return {"gate": self.task_weight * loss}

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """The gated ensemble."""
        return TeacherOutputs(peers, self.weights(peers), "logit").log_probabilities()
