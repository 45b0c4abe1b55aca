from __future__ import annotations

from typing import Any

import torch
from torchvision import datasets

from lightning_kd.data.base import ImageData, Labelled


class _Torchvision(ImageData):
    """A torchvision data set that fits in memory."""

    dataset: type[Any]

    def prepare_data(self) -> None:
        """Download, once per machine; Lightning calls this on one process only."""
        if self.download:
            self._open(True)
            self._open(False)

    def load(self, train: bool) -> Labelled:
        """Images uint8 (N, C, H, W) and labels (N,)."""
        try:
            found = self._open(train)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{type(self).__name__} is not complete under {self.root.resolve()}: {error} Set "
                f"--data.root or LIGHTNING_KD_DATA to the folder that holds it, or --data.download "
                f"true."
            ) from error
        images = torch.as_tensor(found.data)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
        return images, torch.as_tensor(found.targets).long()

    def _open(self, train: bool) -> Any:
        return self.dataset(str(self.root), train=train, download=self.download)


class MNIST(_Torchvision):
    """60,000 and 10,000 handwritten digits, 28 x 28."""

    num_classes = 10
    image_shape = (1, 28, 28)
    dataset = datasets.MNIST


class FashionMNIST(_Torchvision):
    """60,000 and 10,000 pictures of clothes, 28 x 28."""

    num_classes = 10
    image_shape = (1, 28, 28)
    dataset = datasets.FashionMNIST


class CIFAR10(_Torchvision):
    """50,000 and 10,000 colour photographs of ten classes, 32 x 32."""

    num_classes = 10
    image_shape = (3, 32, 32)
    dataset = datasets.CIFAR10


class CIFAR100(_Torchvision):
    """50,000 and 10,000 colour photographs of a hundred classes, 32 x 32."""

    num_classes = 100
    image_shape = (3, 32, 32)
    dataset = datasets.CIFAR100
