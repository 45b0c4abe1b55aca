"""Pure tensor maths: no state, no Lightning; per-sample values wherever those are defined."""

from lightning_kd.functional.collective import min_logits, simplex_cross_entropy_weights
from lightning_kd.functional.decoupled import decoupled_kl, standardize
from lightning_kd.functional.divergence import (
    combine,
    hard,
    kl_divergence,
    labelled,
    logit_mse,
    task_cross_entropy,
)
from lightning_kd.functional.features import (
    attention_distance,
    attention_map,
    hint_distance,
    pooled,
    same_resolution,
    selectivity_distance,
    unit_distance,
)
from lightning_kd.functional.pseudo import balanced_labels
from lightning_kd.functional.relations import (
    log_euclidean_distance,
    probabilistic_distance,
    relational_angle,
    relational_distance,
    similarity_distance,
)
from lightning_kd.functional.trust import (
    confidence_weights,
    entropies,
    entropy_weights,
    jensen_shannon,
    lowest_loss_weights,
    maximum_mean_discrepancy,
    min_norm_weights,
    renyi,
    simplex_projection,
    teacher_losses,
)

__all__ = [
    "attention_distance",
    "attention_map",
    "balanced_labels",
    "combine",
    "confidence_weights",
    "decoupled_kl",
    "entropies",
    "entropy_weights",
    "hard",
    "hint_distance",
    "jensen_shannon",
    "kl_divergence",
    "labelled",
    "log_euclidean_distance",
    "logit_mse",
    "lowest_loss_weights",
    "maximum_mean_discrepancy",
    "min_logits",
    "min_norm_weights",
    "pooled",
    "probabilistic_distance",
    "relational_angle",
    "relational_distance",
    "renyi",
    "same_resolution",
    "selectivity_distance",
    "similarity_distance",
    "simplex_cross_entropy_weights",
    "simplex_projection",
    "standardize",
    "task_cross_entropy",
    "teacher_losses",
    "unit_distance",
]
