from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_kd.teachers import TeacherEnsemble


class ReleaseTeachers(Callback):
    """Give teachers back where a run breaks off: Lightning tells callbacks alone."""

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        teachers = getattr(pl_module, "teachers", None)
        if isinstance(teachers, TeacherEnsemble):
            teachers.release()


def release_teachers(trainer: Trainer) -> list[Callback]:
    """``ReleaseTeachers`` for a Trainer that has none yet."""
    there = any(isinstance(callback, ReleaseTeachers) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [] if there else [ReleaseTeachers()]
