from __future__ import annotations

import torch
from torch import Tensor


class Terms:
    """Running means of what every step says, kept on the device until an epoch ends.

    Logging each number by itself costs as much as the step of a small network. Whether one of them
    became NaN or infinite is noted too; looking costs one host sync.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._bad: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: dict[str, Tensor], weight: int, watched: int) -> None:
        """Add one step's scalars by name.

        Args:
            values: Detached, on one device.
            weight: Number of samples.
            watched: How many of them, from the first, must be finite.
        """
        names = tuple(values)
        double = any(v.dtype == torch.float64 for v in values.values())
        dtype = torch.float64 if double else torch.float32
        now = torch.stack([value.to(dtype) for value in values.values()])
        bad = ~torch.isfinite(now[:watched])
        if names in self._sums:
            before, count = self._sums[names]
            self._sums[names] = before.add_(now, alpha=weight), count + weight
        else:
            self._sums[names] = now * weight, weight
        self._bad[names] = self._bad[names] | bad if names in self._bad else bad

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Mean and number of samples of each name since the last call."""
        sums: dict[str, tuple[Tensor, int]] = {}
        for names, (values, count) in self._sums.items():
            for name, value in zip(names, values.unbind(), strict=True):
                before, samples = sums.get(name, (torch.zeros_like(value), 0))
                sums[name] = before + value, samples + count
        self._sums = {}
        return {name: (value / count, count) for name, (value, count) in sums.items()}

    def broken(self) -> list[str]:
        """Names of the watched that were not finite since the last call."""
        found = [
            name
            for names, bad in self._bad.items()
            if bool(bad.any())
            for name, flag in zip(names, bad.tolist(), strict=False)
            if flag
        ]
        self._bad = {}
        return found
