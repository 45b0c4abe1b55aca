from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_kd.distributed import sum_over_ranks
from lightning_kd.exchange.base import Exchange, detached
from lightning_kd.functional import (
    lowest_loss_weights,
    min_logits,
    simplex_cross_entropy_weights,
    simplex_projection,
    widest,
)
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_one_of
from lightning_kd.utils.float32_state import Float32State

Method = Literal["naive", "linear", "min_logit", "general"]


class Collective(Float32State, Exchange):
    r"""One ensemble that is better than every peer and teaches all of them (KDCL).

    - ``"naive"``: for each sample, the peer with the lowest cross-entropy;
    - ``"linear"``: the mixture of logits with the lowest cross-entropy on the batch;
    - ``"min_logit"``: :math:`z_j = \min_k (z_{k,j} - z_{k,y})`, never worse than the best peer;
    - ``"general"``: the mixture of probabilities with the least expected error, from the covariance
      of the peers' errors on validation images, updated at each validation. The closed form is
      unconstrained and diverges where peers are alike, so it is damped and projected to weights
      that are >= 0 and sum to 1.

    The first three use the labels; samples without one get the mean of the peers.

    Args:
        method: How the ensemble is made.
        ridge: Fraction of the mean variance added to the covariance's diagonal (``"general"``).

    Source:
        Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning", CVPR, section
        3.2. Differs from the paper: damping and projection of the general weights.
    """

    shares: Tensor
    errors: Tensor
    count: Tensor

    def __init__(self, method: Method = "min_logit", ridge: float = 0.01) -> None:
        super().__init__()
        check_one_of(method, ("naive", "linear", "min_logit", "general"), "method")
        self.method, self.ridge = method, ridge
        self.teaches_features = method != "min_logit"

    def build(self, peers: Sequence[NetworkOutput]) -> None:
        """Start from equal shares."""
        super().build(peers)
        if not hasattr(self, "shares"):
            count = len(peers)
            self.register_buffer("shares", torch.full((count,), 1 / count))
            self.register_buffer("errors", torch.zeros(count, count), persistent=False)
            self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(
        self, peers: Sequence[NetworkOutput], target: Tensor | None
    ) -> list[TeacherOutputs]:
        """The same ensemble for all peers."""
        outputs = detached(peers)
        if self.method == "general" or target is None:
            shares = self.shares
            return [TeacherOutputs(outputs, shares, "probability")] * len(peers)
        logits = torch.stack([peer.logits for peer in outputs])
        known = target >= 0
        equal = torch.full_like(logits[:, :, 0], 1 / len(outputs))
        if self.method == "naive":
            weights = torch.where(known, lowest_loss_weights(logits, target), equal)
            return [TeacherOutputs(outputs, weights, "probability")] * len(peers)
        if self.method == "linear":
            mixture = simplex_cross_entropy_weights(logits, target)
            weights = torch.where(known, mixture[:, None], equal)
            return [TeacherOutputs(outputs, weights, "logit")] * len(peers)
        combined = torch.where(known[:, None], min_logits(logits, target), logits.mean(0))
        one = torch.ones(1, device=combined.device)
        return [TeacherOutputs([NetworkOutput(combined)], one, "logit", (0,))] * len(peers)

    def observe(self, peers: Sequence[NetworkOutput], target: Tensor) -> None:
        """Add a validation batch to the covariance of the errors."""
        known = (target >= 0).float()
        labels = torch.nn.functional.one_hot(target.clamp(min=0), peers[0].logits.shape[1])
        errors = torch.stack([p.logits.float().softmax(1) - labels for p in peers])
        self.errors += torch.einsum("abk,cbk,b->ac", errors, errors, known)
        self.count += known.sum()

    def after_validation(self) -> None:
        """Update the shares from the validation that has just ended."""
        count = sum_over_ranks(self.count)
        covariance = widest(sum_over_ranks(self.errors) / count.clamp(min=1))
        size = len(covariance)
        one = covariance.new_ones(size)
        damping = self.ridge * covariance.trace() / size + 1e-12
        solved = torch.linalg.solve(covariance + damping * one.diag(), one)
        shares = simplex_projection(solved / solved.sum()).to(self.shares.dtype)
        self.shares.copy_(torch.where(count > 0, shares, self.shares))
        self.errors.zero_()
        self.count.zero_()
