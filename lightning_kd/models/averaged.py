from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.functional import combine_teachers
from lightning_kd.models.views import Plain, View, back, check_views, grouped_views
from lightning_kd.outputs import NetworkOutput


class Averaged(nn.Module):
    r"""Several networks, each given several views of the images, as one network.

    .. math:: z = \log \frac{1}{MV} \sum_{m, v} \mathrm{softmax}\, v^{-1}(f_m(v(x)))

    An ensemble to evaluate (``lightning-kd test`` with ``Supervised``), to distil from as one
    teacher, or to write pseudo-labels with (``PseudoLabels``).

    Args:
        networks: Networks of the same classes.
        views: Views that each is given; ``None``: the images as they are.

    Raises:
        ValueError: If there is no network or no view.
        TypeError: If a view is not a ``View``.
    """

    def __init__(self, networks: Sequence[nn.Module], views: list[View] | None = None) -> None:
        super().__init__()
        if not networks:
            raise ValueError("Expected at least one network, got none.")
        views = check_views([Plain()] if views is None else views)
        self.networks, self.views = nn.ModuleList(networks), nn.ModuleList(views)

    def forward(self, x: Tensor) -> Tensor:
        """Logarithm of the mean probabilities, shape (B, K, ...), of images (B, C, H, W)."""
        views = [view for view in self.views if isinstance(view, View)]
        outputs = []
        for alike, images in grouped_views(views, x):
            for network in self.networks:
                parts = NetworkOutput.read(network(images)).logits.chunk(len(alike))
                outputs += [back(views[k], part, x) for k, part in zip(alike, parts, strict=True)]
        logits = torch.stack(outputs)
        uniform = logits.new_full((len(outputs),), 1 / len(outputs), dtype=torch.float32)
        return combine_teachers(logits, uniform, 1.0, "probability")
