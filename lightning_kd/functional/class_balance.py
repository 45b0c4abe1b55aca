"""Balance of the classes of generated images."""

from __future__ import annotations

from torch import Tensor

from lightning_kd.functional.precision import full_precision


@full_precision
def class_balance(logits: Tensor) -> Tensor:
    """Negative entropy of the batch's mean output, in nats: lowest where classes are balanced.

    Args:
        logits: Shape (B, K).

    Returns:
        A scalar from -log K to 0.

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186, equation 6.
    """
    mean = logits.softmax(1).mean(0)
    balance: Tensor = (mean * mean.clamp(min=1e-30).log()).sum()
    return balance


@full_precision
def modulating_weights(
    logits: Tensor, class_share: Tensor, gamma: float = 1.0, diversity_norm: bool = False
) -> Tensor:
    r"""Weight of an image: high for a rare class and where the teacher is uncertain.

    .. math:: \phi(x) = \Big(1 - \frac{1}{|B|} \sum_{x' \in B} [c(x') = c(x)]\Big) (1 - p(x))^\gamma

    Args:
        logits: Logits of the teacher, shape (B, K).
        class_share: Share of each class in the memory, shape (K,); all 0 if it is empty.
        gamma: Strength of the difficulty, >= 0.
        diversity_norm: Multiply by K / (K - 1), so that the first factor is 1, not 1 - 1 / K, where
            classes are balanced.

    Returns:
        Weights, shape (B,), in [0, 1], or with ``diversity_norm`` up to K / (K - 1); their gradient
        is finite where the teacher is certain.

    Source:
        Liu et al. 2024 (SSD-KD), https://arxiv.org/abs/2403.19539, equation 3.

    Example:
        >>> import torch
        >>> modulating_weights(torch.zeros(1, 2), torch.tensor([1.0, 0.0]))
        tensor([0.])
    """
    confidence, classes = logits.softmax(1).max(1)
    rare = 1 - class_share[classes]
    if diversity_norm:
        rare = rare * (logits.shape[1] / (logits.shape[1] - 1))
    return rare * (1 - confidence).clamp(min=1e-6) ** gamma
