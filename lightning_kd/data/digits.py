from __future__ import annotations

import torch

from lightning_kd.data.base import ImageData, Labelled
from lightning_kd.utils.seeds import seeded


class Digits(ImageData):
    """1,797 real scans of handwritten digits, 8 x 8, from scikit-learn: no download.

    A fixed fifth of the images is the test set. ``root`` and ``download`` have no effect.
    """

    num_classes = 10
    image_shape = (1, 8, 8)

    def load(self, train: bool) -> Labelled:
        """Images uint8 (N, 1, 8, 8) and labels (N,)."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "Digits needs scikit-learn, which holds the images: pip install "
                "'lightning-kd[digits]'."
            ) from error
        scans = load_digits()
        images = torch.tensor(scans.images / 16 * 255).round().to(torch.uint8)[:, None]
        labels = torch.tensor(scans.target, dtype=torch.int64)
        order = torch.randperm(len(labels), generator=seeded(0))
        cut = len(order) // 5
        chosen = order[cut:] if train else order[:cut]
        return images[chosen], labels[chosen]
