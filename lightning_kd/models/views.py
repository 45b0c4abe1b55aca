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
    def back(self, maps: Tensor) -> Tensor:
        """Maps (B, ..., H, W) of what was seen, where it is in the image."""


class Plain(View):
    """The image as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``View``."""
        return x

    def back(self, maps: Tensor) -> Tensor:
        """See ``View``."""
        return maps


class Mirror(View):
    """The image mirrored, left to right."""

    def forward(self, x: Tensor) -> Tensor:
        """See ``View``."""
        return x.flip(-1)

    def back(self, maps: Tensor) -> Tensor:
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
        return F.interpolate(x, scale_factor=self.factor, mode="bilinear", antialias=True)

    def back(self, maps: Tensor) -> Tensor:
        """See ``View``."""
        return F.interpolate(maps, scale_factor=1 / self.factor, mode="bilinear", antialias=True)


def back(view: View, values: Tensor) -> Tensor:
    """What was said through a view, mapped back; answers about whole images have no places."""
    return view.back(values) if values.dim() > 3 else values


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
