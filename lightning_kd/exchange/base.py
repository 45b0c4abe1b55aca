from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.knowledge import Ensemble, Knowledge


class Exchange(nn.Module, ABC):
    """Who teaches whom inside a cohort, and how much each is trusted.

    Every answer that a peer is taught by is detached: peer j's gradient from peer k's loss is zero.
    Where a gate or attention learns, only its weights keep gradient.
    """

    #: whether peers may step one after the other: nothing is learned through several at once
    steps_apart = True
    #: whether a game is played beside the losses, by ``fool`` and ``tell_apart``
    alternates = False

    def layers(self) -> Sequence[str]:
        """Layers of every peer whose outputs this exchange reads."""
        return ()

    def build(self, peers: Sequence[Knowledge]) -> None:
        """Size itself from a dry run; called once, before the optimizer is made.

        Raises:
            ValueError: If it does not work for so many peers.
        """
        if len(peers) < 2:
            raise ValueError(
                f"Expected at least two peers to learn from each other, got {len(peers)}."
            )

    def attach(self, peers: nn.Module) -> None:
        """Reach the networks themselves; called once, before ``build``.

        Do not register them: they would be saved twice.
        """

    def before(self, views: Sequence[Tensor]) -> None:
        """See what each peer is about to see, images (B, C, H, W)."""

    @abstractmethod
    def forward(
        self, peers: Sequence[Knowledge], target: Tensor | None
    ) -> Sequence[Ensemble | None]:
        """What each peer is taught by.

        Args:
            peers: What each peer says about the batch, with gradient.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            One ensemble of detached answers for each peer; None: nobody teaches it now.
        """

    def terms(self, peers: Sequence[Knowledge], target: Tensor | None) -> dict[str, Tensor]:
        """Losses of the exchange itself, scalars by name; called after ``forward``."""
        return {}

    def after_step(self, peers: nn.Module) -> None:
        """See the peers' networks after each optimizer step of all of them."""

    def observe(self, peers: Sequence[Knowledge], target: Tensor) -> None:
        """See one batch of validation answers."""

    def update(self) -> None:
        """Learn from what was observed; called at the end of each validation, on all ranks."""

    def fool(self, peers: Sequence[Knowledge]) -> dict[str, Tensor]:
        """What peers minimise in a game against discriminators, scalars by name."""
        return {}

    def tell_apart(self, peers: Sequence[Knowledge]) -> dict[str, Tensor]:
        """What the discriminators minimise, scalars by name."""
        return {}

    def answer(self, peers: Sequence[Knowledge]) -> Tensor:
        """The cohort's own answer as log-probabilities, shape (B, K, ...), to be measured."""
        return mean_of(peers, "probability").log_probabilities()


def run(part: nn.Module, x: Tensor) -> Tensor:
    """Call a part with BatchNorm; a batch of one sample has no statistics, so it uses its own."""
    if len(x) > 1 or not part.training:
        answer: Tensor = part(x)
        return answer
    part.eval()
    try:
        answer = part(x)
    finally:
        part.train()
    return answer


def detached(peers: Sequence[Knowledge]) -> list[Knowledge]:
    """The same answers without gradient."""
    return [
        Knowledge(peer.logits.detach(), {k: v.detach() for k, v in peer.features.items()})
        for peer in peers
    ]


def mean_of(members: Sequence[Knowledge], space: str, indices: Sequence[int] = ()) -> Ensemble:
    """Members that count the same."""
    count = len(members)
    weights = torch.full((count,), 1 / count, device=members[0].logits.device)
    return Ensemble(members, weights, space, indices)


def all_others(said: Sequence[Knowledge], space: str) -> list[Ensemble]:
    """For each peer the mean of what all others said, equally."""
    everyone = range(len(said))
    others = [[j for j in everyone if j != k] for k in everyone]
    return [mean_of([said[j] for j in rest], space, rest) for rest in others]
