"""Callbacks: schedules, report, export, replay buffer, speed."""

from lightning_kd.callbacks.channels_last import ChannelsLast
from lightning_kd.callbacks.compile import Compile
from lightning_kd.callbacks.export import ExportStudent
from lightning_kd.callbacks.inversion_report import InversionReport
from lightning_kd.callbacks.keep_freed_memory import KeepFreedMemory
from lightning_kd.callbacks.lean_teachers import LeanTeachers
from lightning_kd.callbacks.pseudo_labels import PseudoLabels
from lightning_kd.callbacks.replay_buffer import ReplayBuffer
from lightning_kd.callbacks.report import DistillationReport
from lightning_kd.callbacks.save_on_sigterm import SaveOnSigterm
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
    "KeepFreedMemory",
    "LeanTeachers",
    "LossWeightScheduler",
    "PseudoLabels",
    "ReplayBuffer",
    "SaveOnSigterm",
    "TemperatureScheduler",
]
