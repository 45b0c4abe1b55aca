from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """Notes on the device which loss terms became NaN or infinite; looking costs one host sync."""

    def __init__(self) -> None:
        self._bad: dict[str, Tensor] = {}

    def note(self, terms: dict[str, Tensor]) -> None:
        """Remember terms, scalars by name, that are not finite."""
        for name, value in terms.items():
            bad = ~torch.isfinite(value)
            self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def broken(self) -> list[str]:
        """Names of the terms that were not finite since the last look."""
        names = [name for name, flag in self._bad.items() if bool(flag)]
        self._bad = {}
        return names
