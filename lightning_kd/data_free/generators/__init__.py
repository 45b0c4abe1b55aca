"""Generators: they make the images when there is no data."""

from lightning_kd.data_free.generators.base import BaseGenerator
from lightning_kd.data_free.generators.generator import Generator
from lightning_kd.data_free.generators.meta_generator import MetaGenerator
from lightning_kd.data_free.generators.noise import Noise
from lightning_kd.data_free.generators.pixels import Pixels

__all__ = [
    "BaseGenerator",
    "Generator",
    "MetaGenerator",
    "Noise",
    "Pixels",
]
