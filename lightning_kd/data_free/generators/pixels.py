from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_kd.data_free.generators.base import BaseGenerator


class Pixels(BaseGenerator):
    """Images that are optimised pixel by pixel, a new batch each round.

    Args:
        learning_rate: Of Adam on the pixels, whose sigmoid is the image.
        shift: Roll images by up to this many pixels at each step, so that they do not depend on
            the grid.

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795. Differs from the authors'
        code: pixels pass through a sigmoid instead of being unbounded.
    """

    needs_replay = True

    def __init__(self, learning_rate: float = 0.1, shift: int = 2) -> None:
        super().__init__()
        self.learning_rate, self.shift = learning_rate, shift

    def start_round(self, count: int, shape: Sequence[int], random: torch.Generator) -> None:
        """Begin with noise."""
        # on the CPU, so that no step waits for the device
        self._shifts = torch.Generator().manual_seed(random.initial_seed())
        self.pixels = torch.randn(
            count, *shape, generator=random, device=random.device
        ).requires_grad_()
        self._inner = torch.optim.Adam([self.pixels], lr=self.learning_rate)

    def forward(self) -> Tensor:
        """The images, shifted."""
        images = self.pixels.sigmoid()
        if not self.shift:
            return images
        rows, columns = torch.randint(
            -self.shift, self.shift + 1, (2,), generator=self._shifts
        ).tolist()
        return images.roll((rows, columns), (2, 3))

    def step(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        """One step on the pixels."""
        self._inner.zero_grad()
        torch.autograd.backward(loss, inputs=[self.pixels])
        self._inner.step()

    def end_round(self, optimizer: Optimizer | None) -> None:
        """Discard them."""
        del self.pixels, self._inner
