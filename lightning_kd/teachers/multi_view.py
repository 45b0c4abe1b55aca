from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.knowledge import Knowledge
from lightning_kd.models import View
from lightning_kd.models.views import back, check_views, looks
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher


class MultiView(SubTeachers):
    """One teacher that looks at each image in several ways; what it says is mapped back.

    Views of one size are one batch. Here the student sees labelled and unlabelled images with what
    the teacher says of them now; to write its answers down once, see ``Averaged``.

    Args:
        views: How to look, ``Plain``, ``Mirror`` or ``Scale`` of ``lightning_kd.models``; ``null``:
            plain and mirrored.

    Raises:
        ValueError: If there is no view.
        TypeError: If one is something else.

    Source:
        Radosavovic et al. 2018, "Data distillation: towards omni-supervised learning",
        https://arxiv.org/abs/1712.04440, section 3.
    """

    def __init__(self, views: list[View] | None = None) -> None:
        views = check_views(views)
        super().__init__(len(views))
        self.views = nn.ModuleList(views)

    def ask(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], logits: bool, seed: int
    ) -> list[Knowledge]:
        """See ``SubTeachers.ask``."""
        views = [view for index in indices if isinstance(view := self.views[index], View)]
        found: dict[int, Knowledge] = {}
        for alike, images in looks(views, x):
            said = teacher(images, logits)
            parts = said.logits.chunk(len(alike)) if logits else [said.logits] * len(alike)
            features = {n: v.chunk(len(alike)) for n, v in said.features.items()}
            for k, place in enumerate(alike):
                view = views[place]
                mapped = {n: back(view, values[k], x) for n, values in features.items()}
                found[place] = Knowledge(back(view, parts[k], x), mapped)
        return [found[place] for place in range(len(views))]
