from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_kd.distributed import sum_over_ranks
from lightning_kd.features import Tap
from lightning_kd.features.dry_run import modes_kept
from lightning_kd.functional import (
    global_average_pool,
    jensen_shannon,
    maximum_mean_discrepancy,
    renyi,
)
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.checks import check_one_of
from lightning_kd.weighting.base import Space, Weighting

MOST_SAMPLES = 512  # the discrepancy compares all pairs


def save_domain(path: str | Path, network: nn.Module, layer: str, images: Iterable[Tensor]) -> None:
    """Save the features of ``network`` on its own training images, for ``DomainSimilarity``.

    Args:
        path: File to write, safetensors with one tensor ``features`` of shape (N, D).
        network: A trained teacher.
        layer: Dotted name of the layer whose output, averaged over positions, is kept.
        images: Batches of shape (B, C, H, W).
    """
    save_file({"features": _features(network, layer, images)}, path)


def _features(network: nn.Module, layer: str, images: Iterable[Tensor]) -> Tensor:
    tap = Tap(network, [layer])
    try:
        with torch.no_grad(), modes_kept(network):
            network.eval()
            kept = [global_average_pool(tap(batch).feature(layer)).float() for batch in images]
    finally:
        tap.remove()
    return torch.cat(kept)[:MOST_SAMPLES].contiguous()


class DomainSimilarity(Weighting):
    """Trust a teacher by how similar its training data are to the student's.

    Compares the teacher's features of its own training images (``domain_files``) with its features
    of the student's (the first batches), once, before training. Labels are not needed.

    Args:
        domain_files: One file for each teacher, made by ``lightning_kd.weighting.save_domain``.
        teacher_layer: Dotted name of the layer that the files are from, or one name per teacher.
        divergence: ``"jensen_shannon"`` or ``"renyi"`` of the distribution of activation over the
            layer's units, or ``"mmd"`` of the features; similarity is 1 - JS / log 2, and
            1 / (1 + d) for the other two.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.

    Raises:
        ValueError: If the divergence is unknown.
        FileNotFoundError: If a file is missing.

    Source:
        Ruder et al. 2017, "Knowledge Adaptation: Teaching to Adapt",
        https://arxiv.org/abs/1702.02052, sections 3.2 and 4. Differs from the paper: the paper
        compares words; activation per unit stands in for their frequencies.
    """

    weights: Tensor
    wants_images = True
    varies = False
    reads_logits = False

    def __init__(
        self,
        domain_files: list[str],
        teacher_layer: str | list[str],
        divergence: Literal["jensen_shannon", "renyi", "mmd"] = "jensen_shannon",
        space: Space = "probability",
    ) -> None:
        super().__init__(space)
        check_one_of(divergence, ("jensen_shannon", "renyi", "mmd"), "divergence")
        for path in domain_files:
            if not Path(path).is_file():
                raise FileNotFoundError(
                    f"Expected features of a teacher's training images at {path}, found none: "
                    f"make them with lightning_kd.weighting.save_domain."
                )
        self.domain_files, self.divergence = list(domain_files), divergence
        layers = (
            [teacher_layer] * len(domain_files) if isinstance(teacher_layer, str) else teacher_layer
        )
        self.layers = list(layers)
        # 0: not yet known
        self.register_buffer("weights", torch.zeros(len(domain_files)))

    def active(self, num_teachers: int) -> Sequence[int]:
        """All teachers.

        Raises:
            ValueError: If there is not one file per teacher.
        """
        if not num_teachers == len(self.domain_files) == len(self.layers):
            raise ValueError(
                f"Expected one file and layer for each of {num_teachers} teachers, got "
                f"{len(self.domain_files)} and {len(self.layers)}."
            )
        return range(num_teachers)

    def calibrate(self, images: Sequence[Tensor], teachers: Sequence[nn.Module]) -> None:
        """Compare domains; a resumed run keeps its weights."""
        if float(self.weights.sum()) > 0:
            return
        similarities = []
        for path, layer, teacher in zip(self.domain_files, self.layers, teachers, strict=True):
            target = _features(teacher, layer, images)
            known = load_file(path)["features"].to(target)[:MOST_SAMPLES]
            if known.shape[1] != target.shape[1]:
                raise ValueError(
                    f"Expected {path} to hold features of {target.shape[1]} units, got "
                    f"{known.shape[1]}: it is from another network or layer."
                )
            similarities.append(similarity(known, target, self.divergence))
        total = sum_over_ranks(torch.stack(similarities))
        self.weights.copy_(total / total.sum())

    def forward(
        self, student: NetworkOutput, teachers: Sequence[NetworkOutput], target: Tensor | None
    ) -> Tensor:
        """The similarities, shape (M,); all equal before they are known."""
        equal = torch.full_like(self.weights, 1 / len(self.weights))
        return torch.where(self.weights.sum() > 0, self.weights, equal)


def similarity(path: Tensor, target: Tensor, divergence: str) -> Tensor:
    """Similarity in (0, 1] of two samples of features, shapes (N, D) and (M, D); a scalar."""
    if divergence == "mmd":
        return 1 / (1 + maximum_mean_discrepancy(path, target))

    def distribution(features: Tensor) -> Tensor:
        activity = features.abs().mean(0) + 1e-12
        return activity / activity.sum()

    p, q = distribution(path), distribution(target)
    if divergence == "jensen_shannon":
        return 1 - jensen_shannon(p, q) / torch.log(torch.tensor(2.0))
    return 1 / (1 + renyi(p, q).clamp(min=0.0))
