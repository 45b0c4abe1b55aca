from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher


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


class MultiView(SubTeachers):
    """One teacher that looks at each image in several ways; what it says is mapped back.

    Views of one size are one batch.

    Args:
        views: How to look; ``null``: plain and mirrored.

    Raises:
        ValueError: If there is no view.
        TypeError: If one is something else.

    Source:
        Radosavovic et al. 2018, "Data distillation: towards omni-supervised learning",
        https://arxiv.org/abs/1712.04440, section 3.
    """

    def __init__(self, views: list[View] | None = None) -> None:
        views = [Plain(), Mirror()] if views is None else views
        super().__init__(len(views))
        for view in views:
            if not isinstance(view, View):
                raise TypeError(f"Expected views of type View, got {type(view).__name__}.")
        self.views = nn.ModuleList(views)

    def ask(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], logits: bool, seed: int
    ) -> list[Knowledge]:
        """See ``SubTeachers.ask``."""
        looks = {index: self.views[index](x) for index in indices}
        by_shape: dict[torch.Size, list[int]] = {}
        for index, look in looks.items():
            by_shape.setdefault(look.shape, []).append(index)
        found: dict[int, Knowledge] = {}
        for alike in by_shape.values():
            said = teacher(torch.cat([looks[index] for index in alike]), logits)
            parts = said.logits.chunk(len(alike)) if logits else [said.logits] * len(alike)
            features = {n: v.chunk(len(alike)) for n, v in said.features.items()}
            for k, index in enumerate(alike):
                view = self.views[index]
                assert isinstance(view, View)
                back = {n: _back(view, values[k]) for n, values in features.items()}
                found[index] = Knowledge(_back(view, parts[k]), back)
        return [found[index] for index in indices]


def _back(view: View, values: Tensor) -> Tensor:
    """Answers about whole images have no places."""
    return view.back(values) if values.dim() > 3 else values
