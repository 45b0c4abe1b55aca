from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class Exchange(nn.Module, ABC):
    """Who teaches whom inside a cohort, and how much each is trusted.

    Every answer that a peer is taught by is detached: peer j's gradient from peer k's loss is zero.
    Where a gate or attention learns, only its weights keep gradient.
    """

    #: whether peers may step one after the other: nothing is learned through several at once
    allows_sequential_update = True
    #: whether ``adversarial_losses`` and ``discriminator_losses`` are played beside the losses
    plays_a_game = False

    def layers(self) -> Sequence[str]:
        """Layers of every peer whose outputs this exchange reads."""
        return ()

    def build(self, peers: Sequence[NetworkOutput]) -> None:
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

    def before_peers(self, views: Sequence[Tensor]) -> None:
        """See what each peer is about to see, images (B, C, H, W)."""

    @abstractmethod
    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """What each peer is taught by.

        Args:
            peers: What each peer says about the batch, with gradient.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            One ensemble of detached answers for each peer; None: nobody teaches it now.
        """

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of the exchange itself, scalars by name; called after ``forward``."""
        return {}

    def after_step(self, peers: nn.Module) -> None:
        """See the peers' networks after each optimizer step of all of them."""

    def observe(self, peers: Sequence[NetworkOutput], target: Tensor) -> None:
        """See one batch of validation answers."""

    def after_validation(self) -> None:
        """Learn from what was observed; called at the end of each validation, on all ranks."""

    def adversarial_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """What peers minimise in a game against discriminators, scalars by name."""
        return {}

    def discriminator_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """What the discriminators minimise, scalars by name."""
        return {}

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """The cohort's own answer as log-probabilities, shape (B, K, ...), to be measured."""
        return TeacherOutputs.uniform(peers, "probability").log_probabilities()


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


def detached(peers: Sequence[NetworkOutput]) -> list[NetworkOutput]:
    """The same answers without gradient."""
    return [peer.detach() for peer in peers]


def all_others(outputs: Sequence[NetworkOutput], space: str) -> list[TeacherOutputs]:
    """For each peer the mean of what all others outputs, equally."""
    everyone = range(len(outputs))
    others = [[j for j in everyone if j != k] for k in everyone]
    return [TeacherOutputs.uniform([outputs[j] for j in rest], space, rest) for rest in others]
