from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_kd.teachers import TeacherEnsemble


class ReleaseTeachers(Callback):
    """Give teachers back where a run breaks off: Lightning tells callbacks alone."""

    def __init__(self, teachers: TeacherEnsemble) -> None:
        self.teachers = teachers

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teachers.release()
