"""Augmentation and smoothness of batches of images, differentiable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_kd.functional.precision import full_precision


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: bool) -> Tensor:
    """Random crop of zero-padded images and random horizontal flip, independent for each image.

    Runs on the device of the images, without a loop over them.

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


@full_precision
def resized_crop(images: Tensor, draws: Tensor, smallest: float) -> Tensor:
    """Random crop of each image, of area ``smallest`` to 1, resized to the full size; flipped.

    Bilinear, differentiable, on the device of the images, without a loop over them.

    Args:
        images: Shape (B, C, H, W).
        draws: Uniform in [0, 1), shape (B, 5): area, aspect ratio (3 / 4 to 4 / 3), row, column,
            flip.
        smallest: Area of the smallest crop, as a share of the image, in (0, 1].

    Returns:
        Images of the same shape, in float32 or wider.
    """
    area, aspect, row, column, flip = draws.to(images.dtype).unbind(1)
    area = smallest + (1 - smallest) * area
    stretch = (math.log(4 / 3) * (2 * aspect - 1) / 2).exp()
    height, width = (area.sqrt() / stretch).clamp(max=1), (area.sqrt() * stretch).clamp(max=1)
    zero = torch.zeros_like(area)
    mirror = torch.where(flip < 0.5, -1.0, 1.0).to(width)
    # where the corners -1 and 1 of the output come from
    across = torch.stack([width * mirror, zero, (2 * column - 1) * (1 - width)], 1)
    down = torch.stack([zero, height, (2 * row - 1) * (1 - height)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@full_precision
def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down and across, of images (B, C, H, W).

    Source:
        Mahendran & Vedaldi 2015, https://arxiv.org/abs/1412.0035, section 3. Differs from
        DeepInversion: mean absolute, not the norm of the whole batch.
    """
    down = (images[:, :, 1:] - images[:, :, :-1]).abs()
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs()
    # a single row or column has no neighbours, and varies by 0
    means = [part.mean() if part.numel() else part.sum() for part in (down, across)]
    return means[0] + means[1]
