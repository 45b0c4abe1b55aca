"""Who teaches whom within a cohort."""

from lightning_kd.exchange.adversarial import Adversarial
from lightning_kd.exchange.attention import Attention
from lightning_kd.exchange.base import Exchange
from lightning_kd.exchange.codistillation import Codistillation
from lightning_kd.exchange.collective import Collective
from lightning_kd.exchange.fusion import Fusion
from lightning_kd.exchange.gate import Gate
from lightning_kd.exchange.hierarchical import Hierarchical
from lightning_kd.exchange.mutual import LeaveOneOut, Mutual
from lightning_kd.exchange.peer_collaborative import PeerCollaborative

__all__ = [
    "Adversarial",
    "Attention",
    "Codistillation",
    "Collective",
    "Exchange",
    "Fusion",
    "Gate",
    "Hierarchical",
    "LeaveOneOut",
    "Mutual",
    "PeerCollaborative",
]
