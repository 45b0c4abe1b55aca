from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.distributed import mean_over_labelled
from lightning_kd.exchange.base import Exchange, detached, run
from lightning_kd.functional import global_average_pool, kl_divergence, task_cross_entropy
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_positive


class Fusion(Exchange):
    r"""A classifier on the fused feature maps of all peers teaches each of them (FFL).

    .. math:: CE(z_f, y) + \tau^2 KL(\overline{z} \| z_f) + \sum_k \tau^2 KL(z_f \| z_k)

    Maps are concatenated (resized to the first peer's), then pass through a depthwise 3x3 and a 1x1
    convolution, each with BatchNorm and ReLU, pooling and a linear layer. The first two terms are
    this exchange's; the last is the peers' loss ``SoftTarget``.

    Args:
        layer: Dotted name of every peer's last convolutional layer.
        temperature: Temperature of the second term, > 0.
        weight: Multiplier of the second term.

    Source:
        Kim et al. 2020 (FFL), https://arxiv.org/abs/1904.09058, equations 2 to 8.
    """

    allows_sequential_update = False
    teaches_features = False

    def __init__(self, layer: str, temperature: float = 3.0, weight: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.layer, self.temperature, self.weight = layer, temperature, weight

    def layers(self) -> Sequence[str]:
        """The feature layer."""
        return (self.layer,)

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Make the fusion module and its classifier.

        Raises:
            ValueError: If the layer does not output maps.
        """
        super().build(peers)
        if hasattr(self, "fuse"):
            return
        maps = [peer.feature(self.layer) for peer in peers]
        if any(m.dim() != 4 for m in maps):
            raise ValueError(
                f"Expected layer {self.layer!r} to output maps (B, C, H, W), got shapes "
                f"{[tuple(m.shape) for m in maps]}: choose a convolutional layer."
            )
        width, kept = sum(m.shape[1] for m in maps), maps[0].shape[1]
        self.fuse = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, kept, 1, bias=False),
            nn.BatchNorm2d(kept),
            nn.ReLU(),
        )
        self.classify = nn.Linear(kept, peers[0].logits.shape[1])

    def fused(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """Logits of the fused classifier, shape (B, K), with gradient."""
        maps = [peer.feature(self.layer) for peer in peers]
        size = maps[0].shape[2:]
        maps = [m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear") for m in maps]
        logits: Tensor = self.classify(global_average_pool(run(self.fuse, torch.cat(maps, 1))))
        return logits

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Sequence[TeacherOutputs | None]:
        """The fused classifier, for every peer."""
        self._pending = self.fused(peers)
        one = torch.ones(1, device=self._pending.device)
        return [TeacherOutputs([NetworkOutput(self._pending.detach())], one, "logit", (0,))] * len(
            peers
        )

    def extra_losses(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Losses of the fused classifier: on the labels, and on the mean of the logits."""
        logits, self._pending = self._pending, torch.empty(0)
        t = self.temperature
        ensemble = TeacherOutputs.uniform(detached(peers), "logit").log_probabilities(t)
        soft_target = t**2 * kl_divergence(logits, ensemble, student_temperature=t).mean()
        terms = {"fusion/soft_target": self.weight * soft_target}
        if target is not None:
            terms["fusion/task"] = mean_over_labelled(task_cross_entropy(logits, target), target)
        return terms

    def log_probabilities(self, peers: Sequence[NetworkOutput]) -> Tensor:
        """The fused classifier."""
        return self.fused(peers).log_softmax(1)
