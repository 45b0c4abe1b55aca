"""Frozen networks, and several outputs of one."""

from lightning_kd.teachers.ensemble import SubTeacherEnsemble, TeacherEnsemble
from lightning_kd.teachers.multi_view import MultiView
from lightning_kd.teachers.noisy_teacher import NoisyTeacher
from lightning_kd.teachers.snapshot import Snapshot
from lightning_kd.teachers.stochastic_depth import StochasticDepth
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.teachers.teacher_cache import TeacherCache

__all__ = [
    "MultiView",
    "NoisyTeacher",
    "Snapshot",
    "StochasticDepth",
    "SubTeacherEnsemble",
    "SubTeachers",
    "Teacher",
    "TeacherCache",
    "TeacherEnsemble",
]
