from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.exchange.base import Exchange, detached
from lightning_kd.functional import global_average_pool
from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class Attention(Exchange):
    r"""Peers that attend to each other, and a leader that is taught by their mean (OKDDip).

    .. math:: z_a^* = \sum_b \alpha_{ab} z_b, \quad \alpha_{a \cdot} =
        \mathrm{softmax}_b \langle L h_a, E h_b \rangle, \quad
        z_{leader}^* = \frac{1}{K - 1} \sum_b z_b

    The last network is the leader, which is kept. The logits inside an ensemble are detached, the
    attention is not: it is trained through the losses of the peers.

    Args:
        layer: Dotted name of every peer's last feature layer, averaged over positions.
        dimension: Output width of the two projections.
        attend_self: Whether a peer's own output is part of its ensemble, as published. Each peer
            then attends ever more to itself, where the loss is 0; ``False`` prevents that.

    Source:
        Chen et al. 2020, https://arxiv.org/abs/1912.00350, equations 3 to 8. Differs from the
        authors' code: there, the logits inside ensembles and the features that are attended to get
        gradient too.
    """

    def __init__(self, layer: str, dimension: int = 8, attend_self: bool = True) -> None:
        super().__init__()
        self.layer, self.dimension, self.attend_self = layer, dimension, attend_self

    def layers(self) -> Sequence[str]:
        """The feature layer."""
        return (self.layer,)

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Make the two projections.

        Raises:
            ValueError: If there are fewer than three networks, or the peers' widths differ.
        """
        super().build(peers)
        if len(peers) < 3:
            raise ValueError(
                f"Expected at least three networks, two peers and a leader, got {len(peers)}."
            )
        widths = {global_average_pool(peer.feature(self.layer)).shape[1] for peer in peers[:-1]}
        if len(widths) > 1:
            raise ValueError(
                f"Expected peers whose layer {self.layer!r} is equally wide, since they share a "
                f"projection, got widths {sorted(widths)}: choose other peers or another layer."
            )
        if not hasattr(self, "left"):
            (width,) = widths
            self.left = nn.Linear(width, self.dimension, bias=False)
            self.right = nn.Linear(width, self.dimension, bias=False)

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> list[TeacherOutputs]:
        """Peers weighted by attention for each peer; all peers equally for the leader."""
        outputs = detached(peers[:-1])
        features = torch.stack([global_average_pool(peer.feature(self.layer)) for peer in outputs])
        scores = torch.einsum("abd,cbd->acb", self.left(features), self.right(features))
        if not self.attend_self:
            own = torch.eye(len(outputs), dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(own[:, :, None], -torch.inf)
        shares = scores.float().softmax(1)
        indices = tuple(range(len(outputs)))
        ensembles = [TeacherOutputs(outputs, share, "logit", indices) for share in shares]
        return [*ensembles, TeacherOutputs.uniform(outputs, "logit", indices)]
