"""Labels from a network's predictions."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_labels(probabilities: Tensor, frequencies: Tensor) -> Tensor:
    r"""Labels of the most confident samples, with each class in proportion to its frequency.

    A sample's label is its likeliest class. The :math:`\lfloor s N f_c \rfloor` most confident
    samples of class c keep theirs, with the largest :math:`s \le 1` for which there are that many
    of every class; that is one threshold per class.

    Args:
        probabilities: Shape (N, K).
        frequencies: Class frequencies among labelled samples, shape (K,); any positive scale.

    Returns:
        Labels (N,), -1 where the sample is not confident enough.

    Raises:
        ValueError: If a class of positive frequency is never predicted.

    Source:
        Radosavovic et al. 2018, https://arxiv.org/abs/1712.04440, section 3.3: a score threshold
        such that the mean number of predicted instances is that of the labelled images. Differs
        from the paper: an image has one class, so there is one threshold per class.
    """
    confidence, label = probabilities.max(1)
    classes = torch.arange(probabilities.shape[1], device=label.device)
    predicted = (label[:, None] == classes).sum(0)
    frequencies = frequencies.double() / frequencies.sum()
    missing = ((predicted == 0) & (frequencies > 0)).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(
            f"Expected every class that has labels to be predicted, got no sample of class "
            f"{', '.join(map(str, missing))}: use soft labels, or a better teacher."
        )
    wanted = frequencies * len(label)
    scale = (predicted / wanted).nan_to_num(nan=torch.inf, posinf=torch.inf).min().clamp(max=1)
    quota = (scale * wanted + 1e-6).floor()  # all samples of the class that sets the scale
    # the rank of each sample within its class, most confident first
    order = confidence.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]
    first = predicted.cumsum(0) - predicted
    rank = torch.empty_like(label)
    rank[order] = torch.arange(len(label), device=label.device) - first[label[order]]
    return torch.where(rank < quota[label], label, -1)
