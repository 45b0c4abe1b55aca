from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.exchange.base import Exchange
from lightning_kd.outputs import NetworkOutput

PATIENCE = 100  # passes without a step, after which a loop seems to have forgotten them


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
        self._passes = 0
        self._shadow_outputs: list[NetworkOutput] = []

    def attach(self, peers: nn.Module) -> None:
        """Make the shadow, or find its layers again where some were replaced."""
        if not hasattr(self, "shadow"):
            self.shadow = Shadow(peers)
        hook = getattr(self.shadow.peers, "hook", None)
        if hook is not None:
            hook()

    def before_peers(self, views: Sequence[Tensor]) -> None:
        """Warn where the shadow is never moved."""
        self._passes += self.training
        if self._passes == PATIENCE and not self.steps:
            warnings.warn(
                f"{type(self).__name__} was run {PATIENCE} times, and its copies of the peers were "
                f"never moved: call after_step() after each optimizer step.",
                stacklevel=2,
            )

    def after_step(self, peers: nn.Module) -> None:
        """Count the step."""
        self.steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Number of steps so far, for the checkpoint."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state["steps"]
