from __future__ import annotations

from torch import Tensor

from lightning_kd.functional.data_free import class_balance
from lightning_kd.inversion.base import InversionTerm, Inverted


class ClassBalance(InversionTerm):
    """Batches in which the teacher sees all classes equally often.

    Source:
        Chen et al. 2019 (DAFL), https://arxiv.org/abs/1904.01186, equation 6. Differs from the
        authors' code: natural logarithm.
    """

    def forward(self, seen: Inverted) -> Tensor:
        """Scalar; see ``InversionTerm.forward``."""
        return class_balance(seen.teacher.logits)
