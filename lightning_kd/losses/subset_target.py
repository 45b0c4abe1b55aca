from __future__ import annotations

import torch
from torch import Tensor

from lightning_kd.functional import kl_divergence
from lightning_kd.losses.base import DistillationLoss
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.utils.checks import check_positive


class SubsetTarget(DistillationLoss):
    r"""Soft targets from teachers of different classes.

    .. math:: \tau^2 \sum_m w_m KL(p_m^T \| \mathrm{softmax}(z^S_{L_m} / \tau))

    The student is compared with each teacher on that teacher's classes alone, renormalised; the
    mass that it gives to other classes is ignored. Averaging outputs that are padded with zeros
    instead is biased, however good the teachers are. Declare a teacher's classes with
    ``lightning_kd.Teacher(network, classes=[...], num_classes=...)``.

    Args:
        temperature: Softening of student and teachers, > 0.
        temperature_squared: Multiply by the temperature squared.
        own_samples: Use a teacher only for samples whose label is one of its classes.
        weight: Multiplier of this loss in the total.

    Raises:
        ValueError: If the temperature is not positive.

    Source:
        Vongkulbhisal et al. 2019 (UHC), CVPR, the cross-entropy variant; Xiang et al. 2020 (LFME),
        https://arxiv.org/abs/2001.01536, equation 3 (temperature 2, without the square).
    """

    def __init__(
        self,
        temperature: float = 4.0,
        temperature_squared: bool = True,
        own_samples: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        check_positive(temperature, "temperature")
        self.temperature = temperature
        self.temperature_squared = temperature_squared
        self.own_samples = own_samples

    def forward(
        self, student: NetworkOutput, teachers: TeacherOutputs, target: Tensor | None
    ) -> Tensor:
        """Scalar; see ``DistillationLoss.forward``."""
        values = []
        for teacher in teachers.outputs:
            unknown = teacher.logits == -torch.inf
            divergence = kl_divergence(
                student.logits.masked_fill(unknown, -torch.inf),
                teacher.logits,
                self.temperature,
                self.temperature,
            )
            if self.own_samples and target is not None:
                label = target.clamp(min=0)[:, None]
                foreign = unknown.gather(1, label)[:, 0] & (target >= 0)
                if foreign.dim() > 1:  # dense: weight a sample by its share of own positions
                    divergence = divergence * (1 - foreign.flatten(1).float().mean(1))
                else:
                    divergence = divergence.masked_fill(foreign, 0.0)
            values.append(divergence)
        loss = teachers.average(values)
        return loss * self.temperature**2 if self.temperature_squared else loss
