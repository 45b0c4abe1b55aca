"""Image losses: what synthetic images should be like."""

from lightning_kd.data_free.image_losses.activation import Activation
from lightning_kd.data_free.image_losses.adversarial import Adversarial
from lightning_kd.data_free.image_losses.base import ImageLoss, ImageLossInputs
from lightning_kd.data_free.image_losses.batch_norm import BatchNormStatistics
from lightning_kd.data_free.image_losses.class_balance import ClassBalance
from lightning_kd.data_free.image_losses.contrastive import Contrastive
from lightning_kd.data_free.image_losses.one_hot import OneHot
from lightning_kd.data_free.image_losses.total_variation import TotalVariation

__all__ = [
    "Activation",
    "Adversarial",
    "BatchNormStatistics",
    "ClassBalance",
    "Contrastive",
    "ImageLoss",
    "ImageLossInputs",
    "OneHot",
    "TotalVariation",
]
