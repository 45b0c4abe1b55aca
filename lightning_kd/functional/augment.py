from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: bool) -> Tensor:
    """Random crop of zero-padded images and random horizontal flip, each image its own.

    Without a loop over images and on whatever device they are on.

    Args:
        images: Shape (B, C, H, W).
        draws: Uniform in [0, 1), shape (B, 3): row, column, flip.
        padding: Pixels added on each side before the crop; 0: no crop.
        flip: Flip where the third draw is below 0.5.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device).expand(len(images), -1)
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    if flip:
        columns = torch.where(draws[:, 2:3] < 0.5, width - 1 - columns, columns)
    if padding:
        images = F.pad(images, (padding,) * 4)
        shift = (draws[:, :2] * (2 * padding + 1)).long()
        rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # advanced indices around a slice put the channels last: (B, H, W, C)
    return images[batch, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()
