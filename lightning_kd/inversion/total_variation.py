from __future__ import annotations

from torch import Tensor

from lightning_kd.functional.data_free import total_variation
from lightning_kd.inversion.base import InversionTerm, Inverted


class TotalVariation(InversionTerm):
    """Smooth images.

    Source:
        Yin et al. 2020 (DeepInversion), https://arxiv.org/abs/1912.08795, equation 3.
    """

    def forward(self, seen: Inverted) -> Tensor:
        """Scalar; see ``InversionTerm.forward``."""
        return total_variation(seen.images)
