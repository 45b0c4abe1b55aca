from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_kd.features import LayerPair
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.naming import keyed_by_name, snake_case

StudentLike: TypeAlias = Tensor | NetworkOutput
TeachersLike: TypeAlias = Tensor | NetworkOutput | Sequence[Tensor | NetworkOutput] | TeacherOutputs


class DistillationLoss(nn.Module, ABC):
    """What is transferred. Subclass it, implement ``forward``, and refer to it by ``class_path``.

    Call it as ``loss(student, teachers, target)``, with tensors (logits of the student and of each
    teacher, or features for a ``LayerLoss``), or with ``NetworkOutput`` and ``TeacherOutputs``,
    which is what ``forward`` always receives. Teachers given as a list have equal weights.

    Args:
        weight: Multiplier of this loss in the total; applied by ``Distillation``, not here.

    Example:
        >>> import torch
        >>> from lightning_kd.losses import SoftTarget
        >>> SoftTarget(temperature=4.0)(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """

    weight: float
    #: whether teachers may rule classes out, with logits of minus infinity
    takes_unknown_classes = True
    #: how many classes teachers have to know together
    fewest_classes = 1
    #: whether the teachers' logits are read; if no loss reads them, teachers stop earlier
    reads_logits = True
    #: whether a constant added to all of a teacher's logits matters
    reads_scale = False
    #: whether ``attach`` and ``before_student`` change the student's forward pass
    changes_student = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self._sized = False

    def __call__(
        self, student: StudentLike, teachers: TeachersLike, target: Tensor | None = None
    ) -> Any:
        """Unweighted loss of one batch, a scalar; see ``forward``."""
        if not (isinstance(student, NetworkOutput) and isinstance(teachers, TeacherOutputs)):
            student, teachers = self._read(student, teachers)
        if not self._sized:  # else Distillation has sized them
            self._size(student, teachers)
        return super().__call__(student, teachers, target)

    @property
    def name(self) -> str:
        """Key of this loss in the log if the user gives none: the class name in snake case."""
        return snake_case(self)

    @property
    def uses_networks(self) -> bool:
        """Whether ``attach`` gets hold of something in the networks themselves."""
        return type(self).attach is not DistillationLoss.attach

    def student_layers(self) -> Sequence[str]:
        """Layers of the student whose outputs this loss reads."""
        return ()

    def teacher_layers(self, index: int) -> Sequence[str]:
        """Layers of teacher ``index`` whose outputs this loss reads."""
        return ()

    def build(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Size adapters from a dry run; called once, before the optimizer is created."""

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Get hold of the networks themselves; called after ``build``, and before each fit.

        Do not register a teacher: it would be trained and saved.
        """

    def before_student(self, teachers: Sequence[NetworkOutput], indices: Sequence[int]) -> None:
        """Receive the outputs of the teachers at these indices before the student runs."""

    def after_student(self) -> None:
        """Let go of them: the student has run, or failed to."""

    @abstractmethod
    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Compute the unweighted loss of one batch.

        Args:
            student: Output of the student, with gradient.
            teachers: Detached outputs, with their weights from the weighting.
            target: Labels (B, ...), -1 where unlabelled, or None.

        Returns:
            A scalar.
        """

    # ------------------------------------------------------------------ tensors as arguments

    def _read(
        self, student: StudentLike, teachers: TeachersLike
    ) -> tuple[NetworkOutput, TeacherOutputs]:
        """Student and teachers as ``forward`` takes them."""
        if isinstance(student, Tensor):
            student = self._from_tensor(student, self.student_layers())
        if not isinstance(teachers, TeacherOutputs):
            given: list[Any] = list(teachers) if isinstance(teachers, (list, tuple)) else [teachers]
            outputs = [
                self._from_tensor(t, self.teacher_layers(m)) if isinstance(t, Tensor) else t
                for m, t in enumerate(given)
            ]
            if not outputs or not all(isinstance(output, NetworkOutput) for output in outputs):
                kinds = [type(output).__name__ for output in outputs] or "none"
                raise TypeError(
                    f"Expected one or more teachers as tensors or NetworkOutput, got {kinds}."
                )
            teachers = TeacherOutputs.uniform([output.detach() for output in outputs])
        return student, teachers

    def _compared(self, student: NetworkOutput) -> Tensor:
        return student.logits

    def _size(self, student: NetworkOutput, teachers: TeacherOutputs) -> None:
        """Make adapters at the first call: in float32 under autocast, whose outputs are not."""
        read = self._compared(student)
        device, precision = read.device, read.dtype
        if torch.is_autocast_enabled(device.type):
            precision = torch.float32
        with torch.inference_mode(False):
            self.build(student, teachers.outputs)
        self.to(device, precision).train(self.training)
        self._sized = True

    def _from_tensor(self, values: Tensor, layers: Sequence[str]) -> NetworkOutput:
        if layers or self.uses_networks:
            raise TypeError(
                f"Expected NetworkOutput(logits, features) for student and teachers with "
                f"{type(self).__name__}, which reads more than one tensor of a network or reaches "
                f"into it, got a tensor: use it inside Distillation."
            )
        return NetworkOutput(values)


class LayerLoss(LayerPair, DistillationLoss):
    """A loss between one layer of the student and one of each teacher.

    Implement ``forward``, or only ``compare``. One that reads the teachers' logits too sets
    ``reads_logits``.

    Args:
        student_layer: Dotted name of a student layer.
        teacher_layer: Dotted name of a teacher layer, or one name per teacher.
        weight: Multiplier of this loss in the total.
    """

    reads_logits = False

    def __init__(
        self, student_layer: str, teacher_layer: str | list[str], weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer

    def _compared(self, student: NetworkOutput) -> Tensor:
        return self.student_feature(student)

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        """Distance of student features (B, ...) to teacher ``index``'s: per sample (B,), or 0-d."""
        raise NotImplementedError(f"{type(self).__name__} implements neither compare nor forward.")

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Weighted mean of ``compare`` over the teachers; see ``DistillationLoss.forward``."""
        feature = self.student_feature(student)
        return teachers.average(
            [
                self.compare(feature, self.teacher_feature(m, teacher), m)
                for m, teacher in zip(teachers.indices, teachers.outputs, strict=True)
            ]
        )

    def _from_tensor(self, values: Tensor, layers: Sequence[str]) -> NetworkOutput:
        if self.reads_logits or self.uses_networks:
            return super()._from_tensor(values, layers)
        empty = values.new_empty(len(values), 0)  # never read
        return NetworkOutput(empty, dict.fromkeys(layers, values))


def losses_by_name(
    losses: Mapping[str, DistillationLoss] | Sequence[DistillationLoss],
) -> dict[str, DistillationLoss]:
    """Key each loss by its name in the log: the user's, or its class's, numbered if repeated.

    Raises:
        TypeError: If ``losses`` is neither a list nor a mapping, or holds something else.
        ValueError: If a name is reserved in the log, or not an identifier.
    """
    if not isinstance(losses, (list, tuple, Mapping, nn.ModuleList)):
        raise TypeError(
            f"Expected a list of losses, or a mapping of names to losses, got "
            f"{type(losses).__name__}."
        )
    given: list[Any] = list(losses.values() if isinstance(losses, Mapping) else losses)
    for loss in given:
        if not isinstance(loss, DistillationLoss):
            raise TypeError(f"Expected losses of type DistillationLoss, got {type(loss).__name__}.")
    found = dict(losses) if isinstance(losses, Mapping) else keyed_by_name(given)
    for name, loss in found.items():
        if name in ("loss", "task", "gate", "output"):
            raise ValueError(
                f"Expected a loss whose name is not `loss`, `task`, `gate` or `output`, which are "
                f"taken in the log, got {name!r} for {type(loss).__name__}: choose another name."
            )
        if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"Expected a name made of letters, digits and _ that is no method of a mapping, "
                f"got {name!r} for {type(loss).__name__}: choose another name."
            )
    return found


def refuse_unknown_classes(
    losses: Iterable[DistillationLoss], teachers: Sequence[NetworkOutput], space: str
) -> None:
    """Raise ``ValueError`` if a loss cannot use teachers of only some classes.

    Args:
        losses: The losses.
        teachers: Outputs of teachers that may know only some, with the same classes in all.
        space: In which they are averaged: in ``"logit"`` one that rules a class out rules it out
            for all.
    """
    if not teachers:
        return
    known = torch.stack(
        [(t.logits > -torch.inf).transpose(0, 1).flatten(1).any(1) for t in teachers]
    )
    partial, count = (
        not bool(known.all()),
        int((known.all(0) if space == "logit" else known.any(0)).sum()),
    )
    for loss in losses:
        if partial and loss.takes_unknown_classes and count < loss.fewest_classes:
            raise ValueError(
                f"Expected teachers that know at least {loss.fewest_classes} of the classes "
                f"together with {type(loss).__name__}, got {count}: average them in space "
                f'"probability", or use SubsetTarget.'
            )
        if partial and not loss.takes_unknown_classes:
            raise ValueError(
                f"Expected teachers that know all classes with {type(loss).__name__}, got one that "
                f"knows only some: use SubsetTarget, or leave it out."
            )


def refuse_losses(
    losses: Iterable[DistillationLoss], which: Callable[[DistillationLoss], Any], expected: str
) -> None:
    """Raise ``ValueError`` that says what is expected, if ``which`` is true of a loss."""
    found = [type(loss).__name__ for loss in losses if which(loss)]
    if found:
        raise ValueError(f"Expected {expected}, got {', '.join(found)}.")


def losses_of(losses: nn.Module) -> dict[str, DistillationLoss]:
    """Losses by name of a ``ModuleDict`` of them."""
    assert isinstance(losses, nn.ModuleDict)
    return {name: loss for name, loss in losses.items() if isinstance(loss, DistillationLoss)}
