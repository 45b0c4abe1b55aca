from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.exchange.base import detached
from lightning_kd.exchange.mutual import Mutual
from lightning_kd.features import Projection
from lightning_kd.functional import full_precision
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.checks import check_positive


class Adversarial(Mutual):
    r"""Peers match each other's logits and, in a game, each other's feature maps (AFD).

    In a ring, a discriminator is to mistake peer k's maps for those of peer k - 1:

    .. math:: L_{D_k} = (1 - D_k(G_{k-1}))^2 + D_k(T_k G_k)^2, \quad L_{G_k} = (1 - D_k(T_k G_k))^2

    with a transfer layer T to the other's shape. Needs ``PeerCohort(update="alternating")``: on
    each batch, peers step on their logits, then on :math:`L_G` with a slower optimizer of its own,
    then the discriminators step. With several layers it is AMLN's block-wise learning.

    Args:
        layer: Dotted name of every peer's feature layer, or several names.
        learning_rate: Of both Adam optimizers of the game, > 0; much lower than the peers'.
        space: ``"probability"`` or ``"logit"``: the space in which other peers are averaged.

    Source:
        Chung et al. 2020 (AFD), https://arxiv.org/abs/2002.01775, equations 3 to 8; Zhang et al.
        2020 (AMLN), ECCV (several layers).
    """

    allows_sequential_update = False
    plays_a_game = True

    def __init__(
        self, layer: str | list[str], learning_rate: float = 2e-5, space: str = "probability"
    ) -> None:
        super().__init__(space)
        check_positive(learning_rate, "learning_rate")
        self.names = [layer] if isinstance(layer, str) else list(layer)
        self.learning_rate = learning_rate
        self.transfers = nn.ModuleList()
        self.discriminators = nn.ModuleList()

    def layers(self) -> Sequence[str]:
        """The feature layers."""
        return self.names

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Make a transfer layer and a discriminator for each peer and layer.

        Raises:
            ValueError: If a layer does not output maps.
        """
        super().build(peers)
        if self.discriminators:
            return
        for k, name in self._places(len(peers)):
            own, other = peers[k].feature(name).shape, peers[k - 1].feature(name).shape
            if len(own) != 4 or len(other) != 4:
                raise ValueError(
                    f"Expected layer {name!r} to output maps (B, C, H, W), got shapes "
                    f"{tuple(own)} and {tuple(other)}: choose a convolutional layer."
                )
            self.transfers.append(Projection(own, other))
            width = other[1]
            self.discriminators.append(
                nn.Sequential(
                    nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
                    nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1),
                )
            )  # fmt: skip

    def _places(self, count: int) -> list[tuple[int, str]]:
        return [(k, name) for k in range(count) for name in self.names]

    def adversarial_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """Losses of peers and transfer layers in the game, scalars by name."""
        values = [
            _square(1 - self.discriminators[i](self.transfers[i](peers[k].feature(name))))
            for i, (k, name) in enumerate(self._places(len(peers)))
        ]
        return {"adversarial": torch.stack(values).sum()}

    def discriminator_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """Losses of the discriminators, scalars by name; gradient reaches them alone."""
        outputs = detached(peers)
        values = []
        for i, (k, name) in enumerate(self._places(len(peers))):
            with torch.no_grad():
                fake = self.transfers[i](outputs[k].feature(name))
            discriminator = self.discriminators[i]
            real = outputs[k - 1].feature(name)
            values.append(_square(1 - discriminator(real)) + _square(discriminator(fake)))
        return {"discriminator": torch.stack(values).sum()}


@full_precision
def _square(values: Tensor) -> Tensor:
    """Mean square, a scalar."""
    return values.square().mean()
