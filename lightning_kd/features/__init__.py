"""Outputs of layers: recorded by taps, projected to each other's shapes."""

from lightning_kd.features.batched import Batched
from lightning_kd.features.dry_run import (
    OutputError,
    dry_run,
    modes_kept,
    put_in_eval,
    ready_to_train,
)
from lightning_kd.features.layers import LayerPair
from lightning_kd.features.projection import Projection
from lightning_kd.features.tap import Tap, Tapped, find_layer

__all__ = [
    "Batched",
    "LayerPair",
    "OutputError",
    "Projection",
    "Tap",
    "Tapped",
    "dry_run",
    "find_layer",
    "modes_kept",
    "put_in_eval",
    "ready_to_train",
]
