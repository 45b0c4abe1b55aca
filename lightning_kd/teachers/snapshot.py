from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.models import pretrained
from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher


class Snapshot(SubTeachers):
    """One teacher at several stages of its training, or several generations of it.

    The teacher itself is the first; give ``ModelCheckpoint`` the options ``every_n_epochs`` and
    ``save_top_k: -1`` to keep stages of a run.

    Args:
        checkpoints: Files that ``pretrained`` reads, of the teacher's architecture.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If one holds another network.

    Source:
        Huang et al. 2017 (snapshot ensembles), https://arxiv.org/abs/1704.00109; generations:
        Furlanello et al. 2018 (born-again networks), https://arxiv.org/abs/1805.04770.
    """

    def __init__(self, checkpoints: list[str]) -> None:
        super().__init__(1 + len(checkpoints))
        self.checkpoints = checkpoints
        self.others = nn.ModuleList()

    def attach(self, teacher: Teacher, layers: Sequence[str], x: Tensor) -> None:
        """Read the checkpoints."""
        if not self.others:
            for checkpoint in self.checkpoints:
                network = pretrained(checkpoint, copy.deepcopy(teacher.network))
                known = None if teacher.classes is None else teacher.classes.tolist()
                self.others.append(Teacher(network.to(x), known, teacher.num_classes))
        for other in self.others:
            assert isinstance(other, Teacher)
            other.record_layers(layers)

    def networks(self, teacher: Teacher) -> list[nn.Module]:
        """Each has its own."""
        return [each.network for each in (teacher, *self.others) if isinstance(each, Teacher)]

    def outputs(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool, seed: int
    ) -> list[NetworkOutput]:
        """See ``SubTeachers.outputs``."""
        networks = (teacher, *self.others)
        return [networks[index](x, need_logits) for index in indices]
