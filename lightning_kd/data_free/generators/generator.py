from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd.data_free.generators.base import BaseGenerator
from lightning_kd.distributed import step_alone


class Generator(BaseGenerator):
    """A network that turns noise into images and is trained from round to round.

    Args:
        network: Takes noise (B, latent) and returns images in [0, 1]; its attribute ``latent`` is
            the noise's length, see ``lightning_kd.models.ImageGenerator``.
        learning_rate: Of Adam, with betas (0.5, 0.999).

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186.
    """

    latent: int

    def __init__(self, network: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        latent = getattr(network, "latent", None)
        if not isinstance(latent, int):
            raise TypeError(
                f"Expected a generator with the attribute `latent`, the length of its noise, got "
                f"{type(network).__name__}: use lightning_kd.models.ImageGenerator, or set it."
            )
        self.network, self.learning_rate, self.latent = network, learning_rate, latent
        self._count, self._random = 0, torch.Generator()

    @property
    def can_reset(self) -> bool:
        """Whether there is a first linear layer."""
        return any(isinstance(layer, nn.Linear) for layer in self.network.modules())

    def make_optimizer(self) -> Optimizer | None:
        """Adam over the network."""
        return self._adam(self.network.parameters(), self.learning_rate)

    def start_round(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Set the number of images; new noise is drawn at each step."""
        self._count, self._random = count, random

    def forward(self) -> Tensor:
        """Images from new noise."""
        return self._images(self._count, self._random)

    def step(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """One step of Adam."""
        assert optimizer is not None
        step_alone(loss, self.network.parameters(), optimizer)

    @torch.no_grad()
    def sample(self, count: int, shape: Sequence[int], random: torch.Generator) -> Tensor:
        """New images, without gradient."""
        return self._images(count, random)

    def reset(self, random: torch.Generator) -> None:
        """Redraw the first linear layer, and the scales of the first BatchNorm layer."""
        layer = next((m for m in self.network.modules() if isinstance(m, nn.Linear)), None)
        if layer is None:
            raise TypeError(
                f"Expected a generator with a linear layer to reset, got "
                f"{type(self.network).__name__} without one: leave out reset_rounds."
            )
        with torch.no_grad():
            layer.weight.normal_(0, 0.02, generator=random)
            if layer.bias is not None:
                layer.bias.zero_()
            norm = next((m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d)), None)
            if norm is not None and norm.affine:
                norm.weight.normal_(0, 0.02, generator=random)
                norm.bias.zero_()

    def _images(self, count: int, random: torch.Generator) -> Tensor:
        images: Tensor = self.network(self._noise(count, random))
        return images

    def _noise(self, count: int, random: torch.Generator) -> Tensor:
        first = next(self.network.parameters())
        return torch.randn(
            count, self.latent, generator=random, device=first.device, dtype=first.dtype
        )

    @staticmethod
    def _adam(parameters: object, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.999))  # type: ignore[arg-type]
