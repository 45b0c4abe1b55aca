from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.models import View
from lightning_kd.models.views import back, check_views, grouped_views
from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher


class MultiView(SubTeachers):
    """One teacher run on several views of each image; its outputs are mapped back.

    Views of one size are one batch. Here the student sees labelled and unlabelled images with the
    teacher's current outputs for them; to save its outputs once, see ``Averaged``.

    Args:
        views: ``Plain``, ``Mirror`` or ``Scale`` of ``lightning_kd.models``; ``None``: plain and
            mirrored.

    Raises:
        ValueError: If there is no view.
        TypeError: If one is not a view.

    Source:
        Radosavovic et al. 2018, "Data distillation: towards omni-supervised learning",
        https://arxiv.org/abs/1712.04440, section 3.
    """

    def __init__(self, views: list[View] | None = None) -> None:
        views = check_views(views)
        super().__init__(len(views))
        self.views = nn.ModuleList(views)

    def outputs(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool, seed: int
    ) -> list[NetworkOutput]:
        """See ``SubTeachers.outputs``."""
        views = [view for index in indices if isinstance(view := self.views[index], View)]
        found: dict[int, NetworkOutput] = {}
        for alike, images in grouped_views(views, x):
            output = teacher(images, need_logits)
            parts = output.logits.chunk(len(alike)) if need_logits else [output.logits] * len(alike)
            features = {n: v.chunk(len(alike)) for n, v in output.features.items()}
            for k, place in enumerate(alike):
                view = views[place]
                mapped = {n: back(view, values[k], x) for n, values in features.items()}
                found[place] = NetworkOutput(back(view, parts[k], x), mapped)
        return [found[place] for place in range(len(views))]
