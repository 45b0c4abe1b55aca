"""Pure tensor maths: no state, no Lightning; per-sample values wherever defined."""

from lightning_kd.functional.batch_norm import channel_statistics, statistics_gap
from lightning_kd.functional.class_balance import class_balance, modulating_weights
from lightning_kd.functional.contrastive import info_nce
from lightning_kd.functional.cross_entropy import (
    hard_labels,
    is_labelled,
    mean_over_positions,
    soft_cross_entropy,
    task_cross_entropy,
)
from lightning_kd.functional.curves import cosine, exponential, linear, sigmoid_ramp_up
from lightning_kd.functional.divergence import (
    decoupled_kl,
    divergence,
    jensen_shannon,
    jensen_shannon_of_logits,
    kl_divergence,
    maximum_mean_discrepancy,
    renyi,
)
from lightning_kd.functional.features import (
    attention_distance,
    attention_map,
    global_average_pool,
    hint_distance,
    same_resolution,
    selectivity_distance,
    unit_distance,
    unit_length,
)
from lightning_kd.functional.images import crop_and_flip, resized_crop, total_variation
from lightning_kd.functional.logits import logit_l1, logit_mse, standardize
from lightning_kd.functional.precision import full_precision, widest
from lightning_kd.functional.priorities import importance_weights, priority_probabilities
from lightning_kd.functional.pseudo_labels import balanced_labels
from lightning_kd.functional.relations import (
    log_euclidean_distance,
    probabilistic_distance,
    relational_angle,
    relational_distance,
    similarity_distance,
)
from lightning_kd.functional.teacher_weights import (
    MOST_GRADIENTS,
    combine_teachers,
    confidence_weights,
    entropies,
    entropy_weights,
    lowest_loss_weights,
    min_logits,
    min_norm_weights,
    simplex_cross_entropy_weights,
    simplex_projection,
    teacher_losses,
)

__all__ = [
    "MOST_GRADIENTS",
    "attention_distance",
    "attention_map",
    "balanced_labels",
    "channel_statistics",
    "class_balance",
    "combine_teachers",
    "confidence_weights",
    "cosine",
    "crop_and_flip",
    "decoupled_kl",
    "divergence",
    "entropies",
    "entropy_weights",
    "exponential",
    "full_precision",
    "global_average_pool",
    "hard_labels",
    "hint_distance",
    "importance_weights",
    "info_nce",
    "is_labelled",
    "jensen_shannon",
    "jensen_shannon_of_logits",
    "kl_divergence",
    "linear",
    "log_euclidean_distance",
    "logit_l1",
    "logit_mse",
    "lowest_loss_weights",
    "maximum_mean_discrepancy",
    "mean_over_positions",
    "min_logits",
    "min_norm_weights",
    "modulating_weights",
    "priority_probabilities",
    "probabilistic_distance",
    "relational_angle",
    "relational_distance",
    "renyi",
    "resized_crop",
    "same_resolution",
    "selectivity_distance",
    "sigmoid_ramp_up",
    "similarity_distance",
    "simplex_cross_entropy_weights",
    "simplex_projection",
    "soft_cross_entropy",
    "standardize",
    "statistics_gap",
    "task_cross_entropy",
    "teacher_losses",
    "total_variation",
    "unit_distance",
    "unit_length",
    "widest",
]
