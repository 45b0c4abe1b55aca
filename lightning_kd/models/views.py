from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class View(nn.Module, ABC):
    """A way to look at images, and the way back for what is said of their places."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as they are seen."""

    @abstractmethod
    def back(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """What was said of places, (B, C, h, w), where they are in the image.

        Args:
            maps: Of what was seen, at any resolution.
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
        if maps.shape[-2:] == (1, 1):  # pooled: it has no places
            return maps
        seen = self._seen(size)
        shape = [
            max(1, round(m * a / b)) for m, a, b in zip(maps.shape[-2:], size, seen, strict=True)
        ]
        return _resized(maps, shape)

    def _seen(self, size: Sequence[int]) -> list[int]:
        return [max(1, round(side * self.factor)) for side in size]


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    # in full precision: there is no antialiasing of half on a CPU
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.interpolate(wide, tuple(size), mode="bilinear", antialias=True).to(x.dtype)


def back(view: View, values: Tensor, x: Tensor) -> Tensor:
    """What was said of ``x`` through a view, mapped back; whole images have no places."""
    return view.back(values, x.shape[-2:]) if values.dim() > 3 else values


def looks(views: Sequence[View], x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
    """Yield numbers of views that give one shape, and what they show of ``x`` as one batch."""
    seen = [view(x) for view in views]
    by_shape: dict[torch.Size, list[int]] = {}
    for index, look in enumerate(seen):
        by_shape.setdefault(look.shape, []).append(index)
    for alike in by_shape.values():
        yield alike, torch.cat([seen[index] for index in alike])


def check_views(views: Sequence[View] | None) -> list[View]:
    """Plain and mirrored, unless there are others.

    Raises:
        ValueError: If there is no view.
        TypeError: If one is something else.
    """
    if views is None:
        return [Plain(), Mirror()]
    if not views:
        raise ValueError("Expected at least one view, got none.")
    for view in views:
        if not isinstance(view, View):
            raise TypeError(f"Expected views of type View, got {type(view).__name__}.")
    return list(views)
