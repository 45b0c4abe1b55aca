from __future__ import annotations


def mixed_seed(*numbers: int) -> int:
    """One seed that depends on all given numbers and their order."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed
