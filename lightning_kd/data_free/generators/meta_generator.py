from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd.data_free.generators.generator import Generator
from lightning_kd.distributed import average_gradients
from lightning_kd.utils.checks import check_one_of
from lightning_kd.utils.seeds import drawn_globally


class MetaGenerator(Generator):
    """A generator whose weights are a good start: each round adapts a copy, and its noise.

    Args:
        network: Takes noise (B, latent) and returns images in [0, 1], (B, C, H, W); has ``latent``.
        learning_rate: Of the copy, Adam with betas (0.5, 0.999); the start moves at this
            rate times the steps of a round.
        latent_rate: Learning rate of the noise.
        meta: How the start learns from the copy: ``"fomaml"`` (the copy's gradients, summed),
            ``"reptile"`` (how far it moved) or ``"none"``: not at all, and the copy begins each
            round with new random weights, as in CMI.

    Raises:
        ValueError: If ``meta`` is none of these.

    Source:
        Fang et al. 2022 (Fast-Datafree), https://arxiv.org/abs/2112.06253, algorithm 1.
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 5e-3,
        latent_rate: float = 0.015,
        meta: Literal["fomaml", "reptile", "none"] = "fomaml",
    ) -> None:
        super().__init__(network, learning_rate)
        check_one_of(meta, ("fomaml", "reptile", "none"), "meta")
        self.latent_rate, self.meta, self.needs_replay = latent_rate, meta, meta == "none"
        self._twin: tuple[nn.Module, ...] = ()  # a tuple, so that it is not saved
        self._steps = 0

    def start_round(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Copy the network and draw noise, which is trained, too."""
        first = next(self.network.parameters())
        old = next(self._twin[0].parameters()) if self._twin else None
        if old is None or (old.device, old.dtype) != (first.device, first.dtype):
            self._twin = (copy.deepcopy(self.network),)
        with torch.no_grad():
            start = self._anew(random) if self.meta == "none" else self.network
            for copied, original in zip(_tensors(self._twin[0]), _tensors(start), strict=True):
                copied.copy_(original)
        self.noise = self._noise(count, random).requires_grad_()
        rates = [
            {"params": list(self._twin[0].parameters())},
            {"params": [self.noise], "lr": self.latent_rate},
        ]
        self._inner = self._adam(rates, self.learning_rate)
        self._steps = 0
        self.network.zero_grad()

    def forward(self) -> Tensor:
        """Images of the copy, from the same noise at each step."""
        images: Tensor = self._twin[0](self.noise)
        return images

    def step(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """One step of the copy and of the noise."""
        twin = self._twin[0]
        self._inner.zero_grad()
        torch.autograd.backward(loss, inputs=[*twin.parameters(), self.noise])
        if self.meta == "fomaml":
            for start, adapted in zip(self.network.parameters(), twin.parameters(), strict=True):
                if adapted.grad is not None:
                    new = adapted.grad.clone()
                    start.grad = new if start.grad is None else start.grad.add_(new)
        self._inner.step()
        self._steps += 1

    def end_round(self, optimizer: Optimizer | None) -> None:
        """Move the start; with several processes, by the mean of what their copies found."""
        del self.noise, self._inner
        if optimizer is None:
            return
        if self.meta == "reptile":
            for start, adapted in zip(
                self.network.parameters(), self._twin[0].parameters(), strict=True
            ):
                start.grad = (start - adapted).detach()
        average_gradients(list(self.network.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate * self._steps
        optimizer.step()

    @property
    def can_reset(self) -> bool:
        """Whether the start learns, and has a first linear layer."""
        return self.meta != "none" and super().can_reset

    def make_optimizer(self) -> Optimizer | None:
        """Adam over the start, if it learns."""
        return None if self.meta == "none" else super().make_optimizer()

    def _anew(self, random: torch.Generator) -> nn.Module:
        fresh = copy.deepcopy(self.network).cpu()
        with drawn_globally(random):  # layers take no generator
            for layer in fresh.modules():
                again: Any = getattr(layer, "reset_parameters", None)
                if again is not None:
                    again()
        return fresh


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
