from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_kd.features import Batched, dry_run
from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.utils.memory import shared_memory


class TeacherEnsemble(nn.Module):
    """Several frozen teachers, run together.

    Args:
        teachers: Networks, each of which is frozen, or ``Teacher``; a single one needs no list.

    Raises:
        TypeError: If one is not a network.
        ValueError: If one ``Teacher`` is given twice.
    """

    #: why its networks cannot be cast, offloaded or compiled; empty: they can
    why_not_whole = ""
    #: why not even a student beside them can be compiled; empty: it can
    why_not_compiled = ""

    def __init__(self, teachers: nn.Module | Sequence[nn.Module]) -> None:
        super().__init__()
        if isinstance(teachers, nn.Module) and not isinstance(teachers, nn.ModuleList):
            teachers = [teachers]
        if not isinstance(teachers, (list, tuple, nn.ModuleList)):
            raise TypeError(f"Expected a list of teachers, got {type(teachers).__name__}.")
        for teacher in teachers:
            if not isinstance(teacher, nn.Module):
                raise TypeError(f"Expected teachers of type Module, got {type(teacher).__name__}.")
        wrapped = [id(t) for t in teachers if isinstance(t, Teacher)]
        if len(set(wrapped)) < len(wrapped):
            raise ValueError(
                "Expected each Teacher once, got one twice: wrap its network again in each place."
            )
        self.members = nn.ModuleList(t if isinstance(t, Teacher) else Teacher(t) for t in teachers)
        self._batched: Batched | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Teacher]:
        for teacher in self.members:
            assert isinstance(teacher, Teacher)
            yield teacher

    def __getitem__(self, index: int) -> Teacher:
        teacher = self.members[index]
        assert isinstance(teacher, Teacher)
        return teacher

    def networks(self) -> list[nn.Module]:
        """The network behind each output."""
        return [teacher.network for teacher in self]

    def refuse_weights_of(self, students: Iterable[nn.Module]) -> None:
        """Raise ``ValueError`` if a teacher, which is frozen, shares weights with a student."""
        trained = nn.ModuleList(students)
        for index, teacher in enumerate(self):
            if shared_memory([trained, teacher.network]):
                raise ValueError(
                    f"Expected student and teacher {index} to be separate networks, got shared "
                    f"weights: give one of them as copy.deepcopy(network)."
                )

    def labels(self) -> list[str]:
        """Prefix of each network's name in a report."""
        return [""] * len(self)

    def build(self, layers_of: Callable[[int], Sequence[str]], x: Tensor) -> list[NetworkOutput]:
        """Record layers from now on, and run every teacher on images (B, C, H, W).

        Args:
            layers_of: Names of the layers that are read, given a teacher's index.
            x: Images.

        Returns:
            Output of each teacher.

        Raises:
            ValueError: If a layer does not exist, or a network cannot take these images.
        """
        outputs = []
        for index, teacher in enumerate(self):
            teacher.record_layers(layers_of(index))
            outputs.append(dry_run(f"teacher {index}", teacher.network, teacher, x))
        return outputs

    def forward(
        self, x: Tensor, indices: Sequence[int] | None = None, need_logits: bool = True
    ) -> list[NetworkOutput]:
        """Outputs for images (B, C, H, W), with gradient to them if that is enabled.

        Args:
            x: Images.
            indices: Which teachers; ``None``: all.
            need_logits: Run to the end; else only as far as layers are recorded.
        """
        chosen = range(len(self)) if indices is None else indices
        if self._batched is None or not need_logits or len(chosen) < len(self):
            return [self[index](x, need_logits) for index in chosen]
        for teacher in self:
            teacher.keep_in_eval()
        outputs = self._batched([x] * len(self))
        return [t.over_all_classes(output) for t, output in zip(self, outputs, strict=True)]

    def run_batched(self) -> None:
        """Run all teachers as one network from now on; call it after ``build``.

        Raises:
            ValueError: If there is only one, or they differ in more than their weights.
        """
        layers = {teacher.tap.layers for teacher in self}
        if len(self) < 2 or len(layers) > 1:
            raise ValueError(
                f"Expected two or more teachers with the same layers read for batched=True, got "
                f"{len(self)} with layers {sorted(layers)}: leave it out."
            )
        self._batched = Batched(self.networks(), self[0].tap, "teacher")

    def freeze(self) -> None:
        """Freeze every network; see ``Teacher.freeze``."""
        for teacher in self:
            teacher.freeze()

    def release(self) -> None:
        """Restore every network to its former state; see ``Teacher.release``."""
        for teacher in self:
            teacher.release()


class SubTeacherEnsemble(TeacherEnsemble):
    """Several outputs of one teacher.

    Args:
        teacher: The one network.
        source: What makes sub-teachers of it.

    Raises:
        TypeError: If ``source`` is something else.
    """

    why_not_whole = why_not_compiled = "a teacher that is run in parts"

    def __init__(self, teacher: nn.Module, source: SubTeachers) -> None:
        super().__init__([teacher])
        if not isinstance(source, SubTeachers):
            raise TypeError(
                f"Expected source of type SubTeachers, got {type(source).__name__}: use "
                f"StochasticDepth, NoisyTeacher, MultiView or Snapshot of lightning_kd.teachers."
            )
        self.source = source

    def __len__(self) -> int:
        return self.source.count

    def __iter__(self) -> Iterator[Teacher]:
        yield self[0]

    def networks(self) -> list[nn.Module]:
        """The network behind each output."""
        return self.source.networks(self[0])

    def labels(self) -> list[str]:
        """Prefix of each network's name in a report."""
        return [f"{type(self.source).__name__} of "] * len(self)

    def build(self, layers_of: Callable[[int], Sequence[str]], x: Tensor) -> list[NetworkOutput]:
        """Record layers of the one teacher, and run every sub-teacher on images (B, C, H, W)."""
        layers = list(dict.fromkeys(n for m in range(len(self)) for n in layers_of(m)))
        teacher = self[0]
        teacher.record_layers(layers)
        dry_run("the teacher", teacher.network, teacher, x)
        self.source.attach(teacher, layers, x)
        with torch.no_grad():
            return self.source.outputs(teacher, x, range(len(self)), True, 0)

    def forward(
        self, x: Tensor, indices: Sequence[int] | None = None, need_logits: bool = True
    ) -> list[NetworkOutput]:
        """Outputs for images (B, C, H, W); see ``TeacherEnsemble.forward``."""
        chosen = range(len(self)) if indices is None else indices
        outputs: list[NetworkOutput] = self.source(self[0], x, chosen, need_logits)
        return outputs

    def run_batched(self) -> None:
        """Refused: the sub-teachers are one network.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Expected teachers that are separate networks with batched=True, got sub-teachers."
        )
