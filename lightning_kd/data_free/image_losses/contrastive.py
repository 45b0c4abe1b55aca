from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.functional import info_nce, resized_crop


class Contrastive(ImageLoss):
    """Images that the teacher can tell from each other, and from those of earlier rounds.

    The inputs of the teacher's BatchNorm layers, averaged over each image, describe it. A small
    head, trained along, should place an image's crop closer to the image than to all others.

    Args:
        weight: Multiplier of this loss in the total.
        temperature: Softening of the similarities, > 0.
        width: Of the head, two linear layers.
        bank: Descriptions of earlier images to keep, >= 0; 40,960 as published.
        negatives: How many of them are drawn at each step, >= 0.
        smallest: Area of the smallest crop, as a share of the image.
        learning_rate: Of Adam for the head.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Fang et al. 2021 (CMI), https://arxiv.org/abs/2105.08584, equation 7. As in the authors'
        code, no gradient flows through the whole images. Differs from it: crops are taken from
        the augmented images, the bank holds whole images only and is smaller by default, only the
        current images train the head, and its hidden layer has its ``width`` too.
    """

    reads_descriptions = True

    def __init__(
        self,
        weight: float = 0.8,
        temperature: float = 0.1,
        width: int = 256,
        bank: int = 4096,
        negatives: int = 4096,
        smallest: float = 0.25,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__(weight)
        if temperature <= 0 or learning_rate <= 0 or not 0 < smallest <= 1:
            raise ValueError(
                f"Expected temperature and learning_rate > 0 and smallest in (0, 1], got "
                f"{temperature}, {learning_rate} and {smallest}."
            )
        whole = all(int(number) == number for number in (width, bank, negatives))
        if not whole or width < 1 or bank < 0 or negatives < 0:
            raise ValueError(
                f"Expected whole numbers: width >= 1, bank and negatives >= 0, got {width}, {bank} "
                f"and {negatives}."
            )
        self.temperature, self.width, self.smallest = temperature, width, smallest
        self.capacity, self.negatives, self.learning_rate = bank, negatives, learning_rate
        self.head: nn.Module | None = None
        self._bank = torch.empty(0)

    def build(self, description: Tensor) -> None:
        """Make the head for descriptions like this one, (1, D)."""
        self.head = nn.Sequential(
            nn.Linear(description.shape[1], self.width),
            nn.ReLU(),
            nn.Linear(self.width, self.width),
        ).to(description)

    def forward(self, inputs: ImageLossInputs) -> Tensor:
        """Scalar; see ``ImageLoss.forward``."""
        assert self.head is not None
        assert inputs.description is not None
        assert inputs.random is not None
        images, device = inputs.images, inputs.images.device
        draws = torch.rand(len(images), 5, generator=inputs.random, device=device)
        whole = inputs.description
        crop = inputs.describe(resized_crop(images, draws, self.smallest).to(images.dtype))
        others = self._bank.to(whole)
        if len(others) > self.negatives:
            chosen = torch.randint(
                len(others), (self.negatives,), generator=inputs.random, device=device
            )
            others = others[chosen]
        own = next(self.head.parameters())
        embeddings = self.head(torch.cat([crop, whole, others]).to(own.dtype))
        crops, wholes = embeddings[: len(images)], embeddings[len(images) :].detach()
        return info_nce(crops, wholes, self.temperature).mean()

    def after_round(self, images: Tensor, describe: Callable[[Tensor], Tensor]) -> None:
        """Add the descriptions of the images that were kept to the bank."""
        if self.capacity:
            kept = describe(images)
            self._bank = torch.cat([self._bank.to(kept), kept])[-self.capacity :]

    def get_extra_state(self) -> dict[str, Any]:
        """The bank, for the checkpoint; no buffer, which DDP would overwrite."""
        return {"bank": self._bank}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._bank = state["bank"]
