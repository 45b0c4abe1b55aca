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
)
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.float32_state import Float32State

Target = Literal["naive", "linear", "min_logit", "general"]


class Collective(Float32State, Exchange):
    r"""One target that is better than every peer (KDCL), the same for all of them.

    - ``"naive"``: on each sample the peer of the lowest cross-entropy;
    - ``"linear"``: the mixture of logits of the lowest cross-entropy on the batch;
    - ``"min_logit"``: :math:`z_j = \min_k (z_{k,j} - z_{k,y})`, never worse than the best peer;
    - ``"general"``: the mixture of probabilities of the least expected error, from the covariance
      of the peers' errors on validation images, renewed at each validation. The closed form is not
      constrained and runs away where peers are alike, so it is damped and projected to weights that
      are >= 0 and sum to 1.

    The first three use the labels; samples without one are taught by the mean of the peers.

    Args:
        target: How the target is made.
        ridge: Share of the mean variance that is added to the covariance (``"general"``).

    Source:
        Guo et al. 2020, "Online Knowledge Distillation via Collaborative Learning", CVPR, section
        3.2. Differs from the paper: damping and projection of the general weights.
    """

    shares: Tensor
    errors: Tensor
    count: Tensor

    def __init__(self, target: Target = "min_logit", ridge: float = 0.01) -> None:
        super().__init__()
        if target not in ("naive", "linear", "min_logit", "general"):
            raise ValueError(
                f'Expected target "naive", "linear", "min_logit" or "general", got {target!r}.'
            )
        self.target, self.ridge = target, ridge

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
        """The common target of all peers."""
        outputs = detached(peers)
        if self.target == "general" or target is None:
            shares = self.shares
            return [TeacherOutputs(outputs, shares, "probability")] * len(peers)
        logits = torch.stack([peer.logits for peer in outputs])
        known = target >= 0
        equal = torch.full_like(logits[:, :, 0], 1 / len(outputs))
        if self.target == "naive":
            weights = torch.where(known, lowest_loss_weights(logits, target), equal)
            return [TeacherOutputs(outputs, weights, "probability")] * len(peers)
        if self.target == "linear":
            mixture = simplex_cross_entropy_weights(logits, target)
            weights = torch.where(known, mixture[:, None], equal)
            return [TeacherOutputs(outputs, weights, "logit")] * len(peers)
        made = torch.where(known[:, None], min_logits(logits, target), logits.mean(0))
        one = torch.ones(1, device=made.device)
        return [TeacherOutputs([NetworkOutput(made)], one, "logit", (0,))] * len(peers)

    def observe(self, peers: Sequence[NetworkOutput], target: Tensor) -> None:
        """Add a validation batch to the covariance of the errors."""
        known = (target >= 0).float()
        wanted = torch.nn.functional.one_hot(target.clamp(min=0), peers[0].logits.shape[1])
        wrong = torch.stack([p.logits.float().softmax(1) - wanted for p in peers])
        self.errors += torch.einsum("abk,cbk,b->ac", wrong, wrong, known)
        self.count += known.sum()

    def after_validation(self) -> None:
        """Renew the shares from the validation that has just ended."""
        count = sum_over_ranks(self.count)
        covariance = (sum_over_ranks(self.errors) / count.clamp(min=1)).double()
        size = len(covariance)
        one = torch.ones(size, dtype=torch.float64, device=covariance.device)
        damping = self.ridge * covariance.trace() / size + 1e-12
        solved = torch.linalg.solve(covariance + damping * one.diag(), one)
        shares = simplex_projection(solved / solved.sum()).to(self.shares.dtype)
        self.shares.copy_(torch.where(count > 0, shares, self.shares))
        self.errors.zero_()
        self.count.zero_()
