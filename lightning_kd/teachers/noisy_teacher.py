from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_kd.distributed import rank, world_size
from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.utils.seeds import seeded


class NoisyTeacher(SubTeachers):
    r"""One teacher whose logits are perturbed, for each sample with a certain probability.

    .. math:: z' = z \cdot (1 + c \, \xi), \quad c \sim \mathrm{Bernoulli}(a), \;
        \xi \sim N(0, \sigma^2) \text{ for each logit}

    Without noise in validation.

    Args:
        count: Perturbed outputs per batch; the teacher runs once for all.
        probability: That a sample is perturbed, :math:`a`, from 0 to 1.
        sigma: Standard deviation of the noise, >= 0.
        seed: Of the noise; ``None``: that of the run.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Sau & Balasubramanian 2016, https://arxiv.org/abs/1610.09650, section 3.
    """

    def __init__(
        self,
        count: int = 1,
        probability: float = 0.5,
        sigma: float = 0.3,
        seed: int | None = None,
    ) -> None:
        super().__init__(count, seed)
        if not 0 <= probability <= 1 or sigma < 0:
            raise ValueError(
                f"Expected probability from 0 to 1 and sigma >= 0, got {probability} and {sigma}."
            )
        self.probability, self.sigma = probability, sigma

    def outputs(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool, seed: int
    ) -> list[NetworkOutput]:
        """See ``SubTeachers.outputs``."""
        output = teacher(x, need_logits)
        if not self.training or not need_logits:
            return [output] * len(indices)
        found = []
        for index in indices:
            random = seeded(seed, index, device=x.device)
            found.append(NetworkOutput(self.perturb(output.logits, random), output.features))
        return found

    def perturb(self, logits: Tensor, random: torch.Generator) -> Tensor:
        """Add noise to logits (B, K, ...); those of unknown classes stay minus infinity."""
        # as one process would draw for all: each takes its share of the batch
        device, total = logits.device, len(logits) * world_size()
        own = slice(rank() * len(logits), (rank() + 1) * len(logits))
        coin = torch.rand(total, generator=random, device=device)[own] < self.probability
        drawn = torch.randn((total, *logits.shape[1:]), generator=random, device=device)
        noise = self.sigma * drawn[own]
        shape = (-1,) + (1,) * (logits.dim() - 1)
        factor = 1 + coin.view(shape) * noise
        return torch.where(logits.isinf(), logits, logits * factor.to(logits.dtype))
