from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput, TeacherOutputs


class Exchange(nn.Module, ABC):
    """Who teaches whom within a cohort, and how much each is trusted.

    Every output that a peer is taught by is detached: peer j gets no gradient from peer k's loss.
    Where a gate or attention is trained, only its weights keep gradient.
    """

    #: whether peers may step one after the other: nothing is trained through several at once
    allows_sequential_update = True
    #: whether ``adversarial_losses`` and ``discriminator_losses`` are minimised as well
    plays_a_game = False
    #: whether what it teaches has the features of layers, which feature losses read
    teaches_features = True

    def layers(self) -> Sequence[str]:
        """Layers of every peer whose outputs this exchange reads."""
        return ()

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Size parameters from a dry run; called once, before the optimizer is created.

        Raises:
            ValueError: If this number of peers is not supported.
        """
        if len(peers) < 2:
            raise ValueError(
                f"Expected at least two peers to learn from each other, got {len(peers)}."
            )

    def attach(self, peers: nn.Module) -> None:
        """Get hold of the networks themselves; called before ``build``, and before each fit.

        Do not register them: they would be saved twice.
        """

    def before_peers(self, views: Sequence[Tensor]) -> None:
        """Receive each peer's images (B, C, H, W) before the peers run."""

    @abstractmethod
    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """Teachers of each peer.

        Args:
            peers: Output of each peer for the batch, with gradient.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            One ensemble of detached outputs for each peer; None: no teacher in this step.
        """

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of the exchange itself, scalars by name; called after ``forward``."""
        return {}

    def after_step(self, peers: nn.Module) -> None:
        """Update from the peers' networks after each optimizer step of all of them."""

    def observe(self, peers: Sequence[NetworkOutput], target: Tensor) -> None:
        """Record one batch of validation outputs."""

    def after_validation(self) -> None:
        """Update from what was observed; called at the end of each validation, on all ranks."""

    def adversarial_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """Losses of the peers in a game against discriminators, scalars by name."""
        return {}

    def discriminator_losses(self, peers: Sequence[NetworkOutput]) -> dict[str, Tensor]:
        """Losses of the discriminators, scalars by name."""
        return {}

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """The cohort's own prediction as log-probabilities, shape (B, K, ...), for evaluation."""
        return TeacherOutputs.uniform(peers, "probability").log_probabilities()


def run(part: nn.Module, x: Tensor) -> Tensor:
    """Call a module with BatchNorm; a batch of one sample is normalised by running statistics."""
    if len(x) > 1 or not part.training:
        output: Tensor = part(x)
        return output
    part.eval()
    try:
        output = part(x)
    finally:
        part.train()
    return output


def detached(peers: Sequence[NetworkOutput]) -> list[NetworkOutput]:
    """The same outputs without gradient."""
    return [peer.detach() for peer in peers]


def all_others(outputs: Sequence[NetworkOutput], space: str) -> list[TeacherOutputs]:
    """For each peer, the outputs of all others, weighted equally."""
    everyone = range(len(outputs))
    others = [[j for j in everyone if j != k] for k in everyone]
    return [TeacherOutputs.uniform([outputs[j] for j in rest], space, rest) for rest in others]
