from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_kd.outputs import NetworkOutput


class LayerPair:
    """A part that reads one layer of the student and one of each teacher; a mixin.

    Set ``student_layer`` (a dotted name) and ``teacher_layer`` (one name, or a list with one for
    each teacher).
    """

    student_layer: str
    teacher_layer: str | list[str]

    def student_layers(self) -> Sequence[str]:
        """The one student layer."""
        return (self.student_layer,)

    def teacher_layers(self, index: int) -> Sequence[str]:
        """The one layer of teacher ``index``.

        Raises:
            ValueError: If the list of names is too short.
        """
        if isinstance(self.teacher_layer, str):
            return (self.teacher_layer,)
        if index >= len(self.teacher_layer):
            raise ValueError(
                f"Expected one teacher_layer for each teacher, got {len(self.teacher_layer)} "
                f"names and at least {index + 1} teachers."
            )
        return (self.teacher_layer[index],)

    def student_feature(self, student: NetworkOutput) -> Tensor:
        """Output of the layer that this part reads from the student."""
        return student.feature(self.student_layer)

    def teacher_feature(self, index: int, teacher: NetworkOutput) -> Tensor:
        """Output of the layer that this part reads from teacher ``index``."""
        return teacher.feature(self.teacher_layers(index)[0])
