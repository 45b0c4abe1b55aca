"""Distillation without data: generators, image losses, targets, replay."""

from lightning_kd.data_free import generators, image_losses, replay, targets
from lightning_kd.data_free.statistics import InputStatistics
from lightning_kd.data_free.synthesizer import ImageSynthesizer, synthesizer_of

__all__ = [
    "ImageSynthesizer",
    "InputStatistics",
    "generators",
    "image_losses",
    "replay",
    "synthesizer_of",
    "targets",
]
