"""Callbacks: schedules, report, export."""

from lightning_kd.callbacks.channels_last import ChannelsLast
from lightning_kd.callbacks.compile import Compile
from lightning_kd.callbacks.export import ExportStudent
from lightning_kd.callbacks.inversion_report import InversionReport
from lightning_kd.callbacks.lean_teachers import LeanTeachers
from lightning_kd.callbacks.pseudo_labels import PseudoLabels
from lightning_kd.callbacks.replay_buffer import ReplayBuffer
from lightning_kd.callbacks.report import DistillationReport
from lightning_kd.callbacks.schedulers import (
    AttributeScheduler,
    LossWeightScheduler,
    TemperatureScheduler,
)

__all__ = [
    "AttributeScheduler",
    "ChannelsLast",
    "Compile",
    "DistillationReport",
    "ExportStudent",
    "InversionReport",
    "LeanTeachers",
    "LossWeightScheduler",
    "PseudoLabels",
    "ReplayBuffer",
    "TemperatureScheduler",
]
