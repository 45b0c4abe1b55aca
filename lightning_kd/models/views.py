from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class View(nn.Module, ABC):
    """A transform of images, and its inverse for dense outputs."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Transform images (B, C, H, W)."""

    @abstractmethod
    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Map dense outputs (B, C, h, w) back to the image.

        Args:
            maps: Outputs for the transformed images, at any resolution.
            size: Height and width of the image.
        """


class Plain(View):
    """The image as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``View``."""
        return x

    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """See ``View``."""
        return maps


class Mirror(View):
    """The image mirrored, left to right."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``View``."""
        return x.flip(-1)

    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """See ``View``."""
        return maps.flip(-1)


class Scale(View):
    """The image enlarged or reduced.

    Args:
        factor: Of height and width, > 0.

    Raises:
        ValueError: If ``factor`` is not positive.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        if factor <= 0:
            raise ValueError(f"Expected factor > 0, got {factor}.")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """See ``View``."""
        return _resized(x, self._seen(x.shape[-2:]))

    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """See ``View``."""
        if maps.shape[-2:] == (1, 1):  # pooled: it has no positions
            return maps
        seen = self._seen(size)
        shape = [
            max(1, round(m * a / b)) for m, a, b in zip(maps.shape[-2:], size, seen, strict=True)
        ]
        return _resized(maps, shape)

    def _seen(self, size: Sequence[int]) -> list[int]:
        return [max(1, round(side * self.factor)) for side in size]


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    # in full precision: there is no antialiasing of half precision on a CPU
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.interpolate(wide, tuple(size), mode="bilinear", antialias=True).to(x.dtype)


def back(view: View, values: Tensor, x: Tensor) -> Tensor:
    """Outputs for a view of ``x``, mapped back; those for whole images have no positions."""
    return view.back(values, x.shape[-2:]) if values.dim() > 3 else values


def grouped_views(views: Sequence[View], x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Yield indices of views that give one shape, and those views of ``x`` as one batch."""
    seen = [view(x) for view in views]
    by_shape: dict[torch.Size, list[int]] = {}
    for index, look in enumerate(seen):
        by_shape.setdefault(look.shape, []).append(index)
    for alike in by_shape.values():
        yield alike, torch.cat([seen[index] for index in alike])


def check_views(views: Sequence[View] | None) -> list[View]:
    """Checked views; plain and mirrored by default.

    Raises:
        ValueError: If there is no view.
        TypeError: If one is not a ``View``.
    """
    if views is None:
        return [Plain(), Mirror()]
    if not views:
        raise ValueError("Expected at least one view, got none.")
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"Expected views of type View, got {type(view).__name__}.")
    return list(views)
