from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def mixed_seed(*numbers: int) -> int:
    """One seed that depends on all given numbers and their order."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed


def seeded(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers on a device that depend on all given numbers."""
    return torch.Generator(device).manual_seed(mixed_seed(*numbers))


@contextlib.contextmanager
def drawn_globally(random: torch.Generator) -> Iterator[None]:
    """Inside, what takes no generator draws on the CPU as this one's seed says; others unharmed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.initial_seed())  # not those of GPUs
        yield
