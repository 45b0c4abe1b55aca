from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_kd.utils.seeds import seeded

NUM_DRAWS = 3


def as_bits(values: Tensor) -> Tensor:
    """The same memory as integers, which Lightning does not round to a run's precision."""
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


class Order:
    """Which samples are in which batch, from (seed, epoch) alone, so that a resumed run agrees.

    All ranks walk through one global order; rank r takes its slice of each global batch, so that N
    ranks see what one rank with N times the batch size sees.

    Args:
        length: Number of samples.
        batch_size: Samples per batch and rank.
        shuffle: A new order each epoch; else sample i comes i-th.
        seed: Returns the seed as an epoch starts (a checkpoint may restore it until then).
        drop_last: Drop a last batch that is not full.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        shuffle: bool,
        seed: Callable[[], int] = lambda: 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size, self.shuffle = length, batch_size, shuffle
        self.seed, self.drop_last, self.rank, self.world_size = seed, drop_last, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size * self.world_size)
        if self.shuffle:
            # every rank needs the same number of equal batches, or gradients are averaged wrongly
            return full + (not self.drop_last and rest >= self.world_size)
        return full + (rest > self.rank)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sample indices (B,), uniform random draws (B, 3)) from batch ``start`` on."""
        total = self.batch_size * self.world_size
        seed = self.seed()
        order = (
            torch.randperm(self.length, generator=seeded(seed, self.epoch))
            if self.shuffle
            else torch.arange(self.length)
        )
        for step in range(start, len(self)):
            chunk = order[step * total : (step + 1) * total]
            if not self.shuffle:
                own = slice(self.rank, None, self.world_size)
            else:
                size = len(chunk) // self.world_size
                own = slice(self.rank * size, (self.rank + 1) * size)
            draws = torch.rand(len(chunk), NUM_DRAWS, generator=seeded(seed, self.epoch, step))
            yield chunk[own], draws[own]


class Batches:
    """A loader over an order: batches of one tensor, or of whatever ``fetch`` yields.

    It resumes in the middle of an epoch where a checkpoint left it.

    Args:
        order: Which samples come when.
        fetch: Turns an iterator of index tensors into one of (images, labels).
        train: Add the random draws for augmentation to each batch, as bits.
        extra: Instead of those draws, returns what to add, given indices (B,) and the epoch.
    """

    batch_sampler = None  # Lightning reads it alongside `sampler`

    def __init__(
        self,
        order: Order,
        fetch: Callable[[Iterator[Tensor]], Iterator[tuple[Tensor, Tensor]]],
        train: bool,
        extra: Callable[[Tensor, int], tuple[Tensor, ...]] | None = None,
    ) -> None:
        self.extra = extra
        self.sampler = order  # the name under which Lightning looks for set_epoch
        self.fetch, self.train = fetch, train
        self.position = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch, self.position = self.sampler.epoch, 0
        if self._resume is not None and self._resume[0] == epoch:
            self.position = self._resume[1]
        self._resume = None
        plan = list(self.sampler.batches(self.position))
        batches = self.fetch(indices for indices, _ in plan)
        for (indices, draws), batch in zip(plan, batches, strict=True):
            self.position += 1
            if self.extra is not None:
                yield *batch, *self.extra(indices, epoch)
            else:
                yield (*batch, as_bits(draws)) if self.train else batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches yielded in it so far."""
        return {"epoch": self.sampler.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after that batch, if that epoch is the next to run."""
        self._resume = (state_dict["epoch"], state_dict["position"])
