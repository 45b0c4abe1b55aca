"""Who teaches whom inside a cohort."""

from lightning_kd.exchange.attention import Attention
from lightning_kd.exchange.base import Exchange
from lightning_kd.exchange.collective import Collective
from lightning_kd.exchange.gate import Gate
from lightning_kd.exchange.mutual import LeaveOneOut, Mutual

__all__ = ["Attention", "Collective", "Exchange", "Gate", "LeaveOneOut", "Mutual"]
