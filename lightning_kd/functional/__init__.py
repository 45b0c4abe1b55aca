"""Pure tensor maths: no state, no Lightning; per-sample values wherever those are defined."""

from lightning_kd.functional.divergence import (
    combine,
    kl_divergence,
    logit_mse,
    task_cross_entropy,
)
from lightning_kd.functional.features import attention_distance, attention_map, hint_distance

__all__ = [
    "attention_distance",
    "attention_map",
    "combine",
    "hint_distance",
    "kl_divergence",
    "logit_mse",
    "task_cross_entropy",
]
