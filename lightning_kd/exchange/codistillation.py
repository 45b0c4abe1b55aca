from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.exchange.base import all_others
from lightning_kd.exchange.shadow import Shadowed
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_space


class Codistillation(Shadowed):
    """Every peer learns from snapshots of the others, refreshed at regular intervals.

    Stale teachers are as good as fresh ones, so peers on separate machines need to exchange weights
    only now and then.

    Args:
        refresh_every: Steps between two snapshots, >= 1.
        burn_in: Steps in which peers are trained on the labels alone, >= 0.
        space: ``"probability"`` or ``"logit"``: the space in which the others are averaged.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Anil et al. 2018, https://arxiv.org/abs/1804.03235, algorithm 1.
    """

    def __init__(
        self, refresh_every: int = 50, burn_in: int = 0, space: str = "probability"
    ) -> None:
        super().__init__()
        if refresh_every < 1 or burn_in < 0:
            raise ValueError(
                f"Expected refresh_every >= 1 and burn_in >= 0, got {refresh_every} and {burn_in}."
            )
        check_space(space)
        self.refresh_every, self.burn_in, self.space = refresh_every, burn_in, space

    def before_peers(self, views: Sequence[Tensor]) -> None:
        """Run the snapshots."""
        super().before_peers(views)
        self._shadow_outputs = [] if self.steps < self.burn_in else self.shadow(views)

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """Snapshots of all others, weighted equally; no teacher during the burn-in."""
        return (
            all_others(self._shadow_outputs, self.space)
            if self._shadow_outputs
            else [None] * len(peers)
        )

    def after_step(self, peers: nn.Module) -> None:
        """Count the step, and refresh the snapshots when due."""
        super().after_step(peers)
        self._shadow_outputs = []
        # the first teachers are the peers as of the end of the burn-in
        if self.steps == self.burn_in or self.steps % self.refresh_every == 0:
            self.shadow.follow(peers)
