"""Whom to trust."""

from lightning_kd.weighting.base import Weighting
from lightning_kd.weighting.fixed import Fixed
from lightning_kd.weighting.uniform import Uniform

__all__ = ["Fixed", "Uniform", "Weighting"]
