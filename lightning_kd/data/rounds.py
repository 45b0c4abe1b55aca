from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from lightning_kd.data.base import ImageData


class Rounds(LightningDataModule):
    """Training without data: a number of rounds per epoch; real images only to measure.

    Args:
        rounds: Rounds per epoch, in every process.
        measure: Data whose validation and test images the student is measured on; they are never
            trained on. ``None``: nothing is measured.
        num_classes: Of the teacher, if there is no ``measure``.
        image_shape: (C, H, W) that the teacher takes, if there is no ``measure``.

    Raises:
        ValueError: If neither ``measure`` nor both others are given.
    """

    def __init__(
        self,
        rounds: int = 10,
        measure: ImageData | None = None,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if rounds < 1:
            raise ValueError(f"Expected rounds >= 1, got {rounds}.")
        if measure is None and (num_classes is None or image_shape is None):
            missing = [
                name
                for name, value in (("num_classes", num_classes), ("image_shape", image_shape))
                if value is None
            ]
            raise ValueError(
                f"Expected measure, or num_classes and image_shape (C, H, W), got no "
                f"{' and no '.join(missing)}."
            )
        self.rounds, self.measure = rounds, measure
        self.num_classes = measure.num_classes if measure is not None else num_classes
        shape = measure.image_shape if measure is not None else image_shape
        assert shape is not None
        self.image_shape = tuple(shape)

    def prepare_data(self) -> None:
        """Fetch the images to measure on."""
        if self.measure is not None:
            self.measure.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the images to measure on."""
        if self.measure is not None:
            self.measure.trainer = self.trainer
            self.measure.setup(stage)

    def train_dataloader(self) -> Any:
        """Numbers of the rounds; every process runs all of them."""
        numbers: Any = range(self.rounds)
        # else Lightning would give each process its share
        all_of_them: Any = DistributedSampler(numbers, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(numbers, batch_size=None, sampler=all_of_them)

    def val_dataloader(self) -> Any:
        """Held-out images."""
        return self.measure.val_dataloader() if self.measure is not None else []

    def test_dataloader(self) -> Any:
        """Test images."""
        return self.measure.test_dataloader() if self.measure is not None else []

    def predict_dataloader(self) -> Any:
        """Test images."""
        return self.measure.predict_dataloader() if self.measure is not None else []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images as their data module gives them; rounds as they are."""
        trainer = self.trainer
        if trainer is not None and trainer.training:
            return torch.as_tensor(batch)
        if self.measure is None:
            return batch
        return self.measure.on_after_batch_transfer(batch, dataloader_idx)
