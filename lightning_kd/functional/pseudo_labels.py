"""Labels from what a network predicts."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_labels(probabilities: Tensor, frequencies: Tensor) -> Tensor:
    r"""Labels of the surest samples, as many of each class as its frequency asks for.

    A sample's label is its likeliest class. Of class c the :math:`\lfloor s N f_c \rfloor` surest
    samples keep theirs, with the largest :math:`s \le 1` for which there are so many of every
    class; that is one threshold a class.

    Args:
        probabilities: Shape (N, K).
        frequencies: Of the classes among labelled samples, shape (K,); any positive scale.

    Returns:
        Labels (N,), -1 where the sample is not sure enough.

    Raises:
        ValueError: If a class that has a frequency is never predicted.

    Source:
        Radosavovic et al. 2018, https://arxiv.org/abs/1712.04440, section 3.3: a score threshold
        such that the mean number of predicted instances is that of the labelled images. Differs
        from the paper: an image has one class, so the threshold is one of each class.
    """
    sure, label = probabilities.max(1)
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
    quota = (scale * wanted + 1e-6).floor()  # of the class that sets the scale, all
    # the place of each sample among those of its class, surest first
    order = sure.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]
    first = predicted.cumsum(0) - predicted
    place = torch.empty_like(label)
    place[order] = torch.arange(len(label), device=label.device) - first[label[order]]
    return torch.where(place < quota[label], label, -1)
