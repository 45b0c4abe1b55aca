from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.exchange.shadow import Shadowed
from lightning_kd.functional import global_average_pool, task_cross_entropy
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class PeerCollaborative(Shadowed):
    r"""Peers learn from a classifier on all features and from moving averages of each other (PCL).

    .. math:: CE(z_e, y) + \sum_k \tau^2 [KL(z_e \| z_k) +
        \overline{KL(\tilde z_j \| z_k)}_{j \ne k}]

    Both teachers of a peer have a weight of one half here, so the loss ``SoftTarget`` with weight 2
    gives the paper's sum.

    Args:
        layer: Dotted name of every peer's last feature layer, averaged over positions.
        decay: Decay of the moving averages, in [0, 1); lower during the first steps.

    Raises:
        ValueError: If the decay is out of range.

    Source:
        Wu & Gong 2021, https://arxiv.org/abs/2006.04147, equations 2 to 7. The paper gives each
        peer its own augmentation: ``PeerCohort(view=...)``.
    """

    allows_sequential_update = False
    teaches_features = False

    def __init__(self, layer: str, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"Expected decay in [0, 1), got {decay}.")
        self.layer, self.decay = layer, decay

    def layers(self) -> Sequence[str]:
        """The feature layer."""
        return (self.layer,)

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Make the classifier on all peers' features."""
        super().build(peers)
        if not hasattr(self, "classify"):
            width = sum(global_average_pool(peer.feature(self.layer)).shape[1] for peer in peers)
            self.classify = nn.Linear(width, peers[0].logits.shape[1])

    def joint(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """Logits of the classifier on all features, shape (B, K), with gradient."""
        features = torch.cat([global_average_pool(peer.feature(self.layer)) for peer in peers], 1)
        logits: Tensor = self.classify(features)
        return logits

    def before_peers(self, views: Sequence[Tensor]) -> None:
        """Run the moving averages."""
        super().before_peers(views)
        self._shadow_outputs = self.shadow(views)

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """The joint classifier, and the moving averages of all others."""
        self._pending = self.joint(peers)
        joint, count = NetworkOutput(self._pending.detach()), len(peers)
        shares = torch.full((count,), 0.5 / (count - 1), device=self._pending.device)
        shares[0] = 0.5
        return [
            TeacherOutputs(
                [joint, *(s for j, s in enumerate(self._shadow_outputs) if j != k)], shares
            )
            for k in range(count)
        ]

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Cross-entropy of the joint classifier, with gradient to it and to all peers."""
        logits, self._pending, self._shadow_outputs = self._pending, torch.empty(0), []
        if target is None:
            return {"joint/task": 0.0 * logits.sum()}
        return {"joint/task": mean_over_labelled(task_cross_entropy(logits, target), target)}

    def after_step(self, peers: nn.Module) -> None:
        """Update the averages: the true mean of the first steps, until the decay takes over."""
        super().after_step(peers)
        decay = min(self.decay, 1 - 1 / (self.steps + 1))
        self.shadow.follow(peers, decay)

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """The joint classifier."""
        return self.joint(peers).log_softmax(1)
