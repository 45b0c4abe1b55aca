from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_kd.functional import combine_teachers
from lightning_kd.models.views import Plain, View, back, check_views, looks
from lightning_kd.outputs import NetworkOutput


class Averaged(nn.Module):
    r"""Several networks, each looking at the images in several ways, as one network.

    .. math:: z = \log \frac{1}{MV} \sum_{m, v} \mathrm{softmax}\, v^{-1}(f_m(v(x)))

    An ensemble to measure (``lightning-kd test`` with ``Supervised``), to learn from as one
    teacher, or to write pseudo-labels with (``PseudoLabels``).

    Args:
        networks: Of the same classes.
        views: How each looks; ``null``: at the images as they are.

    Raises:
        ValueError: If there is no network or no view.
        TypeError: If one is something else.
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
        said = []
        for alike, images in looks(views, x):
            for network in self.networks:
                parts = NetworkOutput.read(network(images)).logits.chunk(len(alike))
                said += [back(views[k], part, x) for k, part in zip(alike, parts, strict=True)]
        logits = torch.stack(said)
        uniform = logits.new_full((len(said),), 1 / len(said), dtype=torch.float32)
        return combine_teachers(logits, uniform, 1.0, "probability")
