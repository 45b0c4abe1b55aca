from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.features.dry_run import modes_kept
from lightning_kd.features.tap import find_layer


class Paths:
    """Lets a network skip some of its blocks, on several paths in one forward pass.

    A skipped block passes its input on. Paths that have skipped the same blocks so far are one
    batch, so that nothing is computed twice; where they diverge, the batch grows.

    Args:
        network: Any network whose blocks keep the shape of their input.
        blocks: Dotted names of blocks that may be skipped, in the order in which they run;
            ``None``: those elements of ``nn.Sequential`` with parts of their own that keep the
            shape.
        x: An image to run the network on, shape (1, C, H, W).

    Raises:
        ValueError: If a block does not exist or changes the shape, or there is none.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[str] | None, x: Tensor) -> None:
        chosen = list(_elements(network)) if blocks is None else list(blocks)
        found = {name: find_layer(network, name) for name in chosen}
        keeps = _shapes(network, list(found.values()), x)
        if blocks is None:
            chosen = [name for name in chosen if keeps.get(found[name])]
        for name in chosen:
            if not keeps.get(found[name]):
                raise ValueError(
                    f"Expected blocks that keep the shape of their input, got {name!r}, which "
                    f"changes it or does not run: leave it out of `blocks`."
                )
        nested = [(a, b) for a in chosen for b in chosen if a != b and f"{a}.".startswith(f"{b}.")]
        if nested or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"Expected each block once and none inside another, got {chosen}: leave the inner "
                f"or repeated ones out of `blocks`."
            )
        if not chosen:
            raise ValueError(
                f"Expected blocks that may be skipped in {type(network).__name__}, found none: "
                f"name them in `blocks`."
            )
        order = list(keeps)
        #: names of the blocks, in the order in which they run
        self.names = sorted(chosen, key=lambda name: order.index(found[name]))
        self._blocks = [found[name] for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    @contextlib.contextmanager
    def taken(
        self, kept: Sequence[Sequence[bool]], survival: Sequence[float]
    ) -> Iterator[Branches]:
        """Within it, a forward pass takes these paths.

        Args:
            kept: For each path, which blocks it takes.
            survival: Probability of keeping each block; what it adds is divided by that, so that
                its mean over paths is what it adds where all are kept.
        """
        branches = Branches(len(kept))
        before = [block.__dict__.get("forward") for block in self._blocks]
        for k, block in enumerate(self._blocks):
            block.forward = _Fork(
                block, block.forward, [path[k] for path in kept], survival[k], branches
            )
        try:
            yield branches
        finally:
            for block, own in zip(self._blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


class Branches:
    """Which rows of a batch belong to which path, so far.

    Args:
        count: Number of paths.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.groups: list[list[int]] = [list(range(count))]
        #: groups after each watched layer
        self.seen: dict[str, list[list[int]]] = {}

    @contextlib.contextmanager
    def watched(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Within it, record the groups after these layers, so that outputs can be told apart."""

        def note(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self.seen[name] = self.groups

            return hook

        # before a tap's hook, which may stop the forward pass
        handles = [
            layer.register_forward_hook(note(name), prepend=True) for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, values: Tensor, groups: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        """Values of each path, from a batch (G * B, ...) in which the groups follow each other."""
        groups = self.groups if groups is None else groups
        found: dict[int, Tensor] = {}
        for rows, group in zip(values.chunk(len(groups)), groups, strict=True):
            found |= dict.fromkeys(group, rows)
        return [found[path] for path in range(self.count)]


class _Fork:
    """A block's forward pass on some paths; the others bypass it."""

    def __init__(
        self, block: nn.Module, run: Any, kept: list[bool], survival: float, branches: Branches
    ) -> None:
        self.block, self.run, self.kept, self.survival = block, run, kept, survival
        self.branches = branches

    def __call__(self, x: Tensor) -> Tensor:
        before = self.branches.groups
        parts = x.chunk(len(before))
        split = [
            ([p for p in g if self.kept[p]], [p for p in g if not self.kept[p]]) for g in before
        ]
        running = [part for part, (takes, _) in zip(parts, split, strict=True) if takes]
        if len(running) == len(parts) and not any(rest for _, rest in split):
            return self._through(x)
        if not running:
            idle = [p.sum() for p in self.block.parameters() if p.requires_grad]
            # DDP expects a gradient for every parameter
            return x + 0.0 * torch.stack(idle).sum() if idle else x
        through = iter(self._through(torch.cat(running)).chunk(len(running)))
        pieces, after = [], []
        for part, (takes, rest) in zip(parts, split, strict=True):
            if takes:
                pieces.append(next(through))
                after.append(takes)
            if rest:
                pieces.append(part)
                after.append(rest)
        self.branches.groups = after
        return torch.cat(pieces)

    def _through(self, x: Tensor) -> Tensor:
        out: Tensor = self.run(x)
        return out if self.survival == 1 else x + (out - x) / self.survival


def _elements(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Outermost elements of ``nn.Sequential`` that have children and are no ``nn.Sequential``."""
    for name, child in module.named_children():
        here = f"{prefix}{name}"
        composed = any(True for _ in child.children()) and not isinstance(child, nn.Sequential)
        if isinstance(module, nn.Sequential) and composed:
            yield here
        else:
            yield from _elements(child, f"{here}.")


def _shapes(network: nn.Module, blocks: Sequence[nn.Module], x: Tensor) -> dict[nn.Module, bool]:
    """Whether each block keeps the shape of its input, in the order in which they run."""
    keeps: dict[nn.Module, bool] = {}
    versions: dict[nn.Module, int] = {}

    def note(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            versions[block] = inputs[0]._version

    def look(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if block in versions and inputs[0]._version != versions[block]:
            raise ValueError(
                f"Expected blocks that leave their input as it is, got a {type(block).__name__} "
                f"that changes it in place: build it with inplace=False."
            )
        alike = len(inputs) == 1 and isinstance(output, Tensor) and output.shape == inputs[0].shape
        # one that runs twice has no single place on a path
        keeps[block] = alike and block not in keeps

    handles = [block.register_forward_pre_hook(note) for block in blocks]
    handles += [block.register_forward_hook(look) for block in blocks]
    try:
        with modes_kept(network), torch.no_grad():
            network.eval()
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return keeps
