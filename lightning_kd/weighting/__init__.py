"""How much each teacher is trusted."""

from lightning_kd.weighting.attention_over_layers import AttentionOverLayers
from lightning_kd.weighting.base import Weighting
from lightning_kd.weighting.confidence import Confidence
from lightning_kd.weighting.domain_similarity import DomainSimilarity, save_domain
from lightning_kd.weighting.entropy import Entropy
from lightning_kd.weighting.fixed import Fixed
from lightning_kd.weighting.gradient_space import GradientSpace
from lightning_kd.weighting.learned_gate import LearnedGate
from lightning_kd.weighting.lowest_loss import LowestLoss
from lightning_kd.weighting.self_paced import SelfPaced
from lightning_kd.weighting.switching import Switching
from lightning_kd.weighting.uniform import Uniform

__all__ = [
    "AttentionOverLayers",
    "Confidence",
    "DomainSimilarity",
    "Entropy",
    "Fixed",
    "GradientSpace",
    "LearnedGate",
    "LowestLoss",
    "SelfPaced",
    "Switching",
    "Uniform",
    "Weighting",
    "save_domain",
]
