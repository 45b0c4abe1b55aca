"""Whether networks share memory, so that training one would change another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn


def shared_memory(networks: Sequence[nn.Module]) -> tuple[int, int] | None:
    """Find two networks whose weights or running statistics overlap in memory.

    Not only those that hold the same tensor: a view, or a slice that begins elsewhere, as well.

    Returns:
        Their positions in ``networks``, the lower one first; None if all are separate.
    """
    spans = sorted(
        (start, end, owner)
        for owner, network in enumerate(networks)
        for start, end in _spans(network)
    )
    ends = dict.fromkeys(range(len(networks)), 0)
    for start, end, owner in spans:
        for other, reached in ends.items():
            if other != owner and reached > start:
                return min(owner, other), max(owner, other)
        ends[owner] = max(ends[owner], end)
    return None


def _spans(network: nn.Module) -> Iterator[tuple[int, int]]:
    """First byte of each tensor that training changes, and the byte after its last."""
    for tensor in _changed_by_training(network):
        start = tensor.data_ptr()  # 0 on the meta device
        if start and tensor.numel():
            steps = zip(tensor.size(), tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            yield start, start + (last + 1) * tensor.element_size()


def _changed_by_training(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    for name, buffer in network.named_buffers():
        if name.rpartition(".")[2].startswith("running_"):  # other buffers are constants
            yield buffer
