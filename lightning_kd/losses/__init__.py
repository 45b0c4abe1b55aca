"""What is transferred from teachers to student."""

from lightning_kd.losses.attention_transfer import AttentionTransfer
from lightning_kd.losses.base import DistillationLoss, LayerLoss, losses_by_name
from lightning_kd.losses.confident_hint import ConfidentHint
from lightning_kd.losses.decoupled_kl import DecoupledKL
from lightning_kd.losses.feed import FEED
from lightning_kd.losses.gram_loss import GramLoss
from lightning_kd.losses.graph_distillation import GraphDistillation
from lightning_kd.losses.head_target import HeadTarget
from lightning_kd.losses.hint import Hint
from lightning_kd.losses.knowledge_flow import KnowledgeFlow
from lightning_kd.losses.logit_mse import LogitMSE
from lightning_kd.losses.logit_standardization import LogitStandardization
from lightning_kd.losses.meal import MEAL
from lightning_kd.losses.nst import NST
from lightning_kd.losses.pkt import PKT
from lightning_kd.losses.relational import Relational
from lightning_kd.losses.soft_target import SoftTarget
from lightning_kd.losses.subset_target import SubsetTarget

__all__ = [
    "FEED",
    "MEAL",
    "NST",
    "PKT",
    "AttentionTransfer",
    "ConfidentHint",
    "DecoupledKL",
    "DistillationLoss",
    "GramLoss",
    "GraphDistillation",
    "HeadTarget",
    "Hint",
    "KnowledgeFlow",
    "LayerLoss",
    "LogitMSE",
    "LogitStandardization",
    "Relational",
    "SoftTarget",
    "SubsetTarget",
    "losses_by_name",
]
