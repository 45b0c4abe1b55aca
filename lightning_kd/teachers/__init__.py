"""Frozen networks, and several answers of one."""

from lightning_kd.teachers.multi_view import Mirror, MultiView, Plain, Scale, View
from lightning_kd.teachers.noisy_teacher import NoisyTeacher
from lightning_kd.teachers.snapshot import Snapshot
from lightning_kd.teachers.stochastic_depth import StochasticDepth
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher

__all__ = [
    "Mirror",
    "MultiView",
    "NoisyTeacher",
    "Plain",
    "Scale",
    "Snapshot",
    "StochasticDepth",
    "SubTeachers",
    "Teacher",
    "View",
]
