"""Where images come from when there is no data, and what the teacher is to see in them."""

from lightning_kd.sources.base import ImageSource
from lightning_kd.sources.generator import Generator
from lightning_kd.sources.meta_generator import MetaGenerator
from lightning_kd.sources.noise import Noise
from lightning_kd.sources.pixels import Pixels
from lightning_kd.sources.targets import (
    DirichletTargets,
    RandomLabels,
    SoftTransferTargets,
    Targets,
    TeacherLabels,
)

__all__ = [
    "DirichletTargets",
    "Generator",
    "ImageSource",
    "MetaGenerator",
    "Noise",
    "Pixels",
    "RandomLabels",
    "SoftTransferTargets",
    "Targets",
    "TeacherLabels",
]
