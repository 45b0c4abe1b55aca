"""What an image that nobody took should be like: terms of a generator's loss."""

from lightning_kd.inversion.activation import Activation
from lightning_kd.inversion.adversarial import Adversarial
from lightning_kd.inversion.base import InversionTerm, Inverted
from lightning_kd.inversion.batch_norm import BatchNormStatistics
from lightning_kd.inversion.class_balance import ClassBalance
from lightning_kd.inversion.contrastive import Contrastive
from lightning_kd.inversion.one_hot import OneHot
from lightning_kd.inversion.total_variation import TotalVariation

__all__ = [
    "Activation",
    "Adversarial",
    "BatchNormStatistics",
    "ClassBalance",
    "Contrastive",
    "InversionTerm",
    "Inverted",
    "OneHot",
    "TotalVariation",
]
