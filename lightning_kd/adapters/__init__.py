"""Feature taps, and projections that size themselves."""

from lightning_kd.adapters.layers import LayerPair
from lightning_kd.adapters.modes import modes_kept
from lightning_kd.adapters.projection import Projection
from lightning_kd.adapters.statistics import InputStatistics
from lightning_kd.adapters.tap import Tap, Tapped, find_layer

__all__ = [
    "InputStatistics",
    "LayerPair",
    "Projection",
    "Tap",
    "Tapped",
    "find_layer",
    "modes_kept",
]
