from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.exchange.base import Exchange
from lightning_kd.outputs import NetworkOutput


class Shadow(nn.Module):
    """A frozen copy of a cohort's networks, always in eval mode, that lags behind them.

    It is part of the checkpoint, since a resumed run must continue with the same copy.

    Args:
        peers: The cohort's networks as one module, called with the images of each.
    """

    def __init__(self, peers: nn.Module) -> None:
        super().__init__()
        self.peers = copy.deepcopy(peers).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Shadow:
        """Stay in eval mode, whatever the enclosing module does."""
        return self

    @torch.no_grad()
    def forward(self, views: Sequence[Tensor]) -> list[NetworkOutput]:
        """Outputs of the copies for images (B, C, H, W), without gradient."""
        outputs: list[NetworkOutput] = self.peers(views)
        return outputs

    @torch.no_grad()
    def follow(self, peers: nn.Module, decay: float = 0.0) -> None:
        """Move to ``decay`` times the copy plus ``1 - decay`` times the peers; 0: copy them."""
        copies = [*self.peers.parameters(), *self.peers.buffers()]
        originals = [*peers.parameters(), *peers.buffers()]
        for own, new in zip(copies, originals, strict=True):
            if decay and own.is_floating_point():
                own.lerp_(new, 1 - decay)
            else:
                own.copy_(new)


class Shadowed(Exchange):
    """An exchange whose teachers are a shadow of the peers; counts their steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._shadow_outputs: list[NetworkOutput] = []

    def attach(self, peers: nn.Module) -> None:
        """Make the shadow."""
        if not hasattr(self, "shadow"):
            self.shadow = Shadow(peers)

    def get_extra_state(self) -> dict[str, Any]:
        """Number of steps so far, for the checkpoint."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state["steps"]
