"""What is transferred."""

from lightning_kd.losses.attention_transfer import AttentionTransfer
from lightning_kd.losses.base import DistillationLoss, LayerLoss
from lightning_kd.losses.hint import Hint
from lightning_kd.losses.logit_mse import LogitMSE
from lightning_kd.losses.soft_target import SoftTarget

__all__ = ["AttentionTransfer", "DistillationLoss", "Hint", "LayerLoss", "LogitMSE", "SoftTarget"]
