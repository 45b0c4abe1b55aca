from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.features import find_layer
from lightning_kd.models.branching import Branching
from lightning_kd.models.multi_branch import fresh, split_at


class Tree(Branching):
    r"""Networks that share their first blocks, like the branches of a binary tree.

    The given network is cut after each named layer. What comes before the first cut exists once,
    what follows it twice, what follows the next four times: D cuts make :math:`2^D` leaves, each of
    them a whole network. The first :math:`2^b` leaves, in the order of their branches, are an
    ensemble, and each such ensemble contains the smaller ones.

    Train it with ``PeerCohort`` and the exchange ``Hierarchical``: the peers are the ensembles, and
    each is exported as a tree of its own.

    Args:
        network: Any network that ``torch.fx`` can trace down to the cuts.
        layers: Dotted names of the layers to cut after, in the order in which they run.
        models: Number of leaves, from 1 to 2 ** D; ``None``: all.

    Raises:
        ValueError: If a layer does not exist, the network cannot be cut there, or ``models`` is out
            of range.

    Source:
        Ruiz & Verbeek 2020 (HNE), https://arxiv.org/abs/2003.01474, section 3. Siblings run one
        after the other, not as one grouped convolution.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], models: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(layers, str) or not layers:
            raise ValueError(f"Expected a list of layers to cut after, got {layers!r}.")
        most = 2 ** len(layers)
        self.models = most if models is None else models
        if not 1 <= self.models <= most:
            raise ValueError(
                f"Expected models from 1 to {most} for {len(layers)} cuts, got {models}."
            )
        self.layers = list(layers)
        self.init_args: dict[str, Any] = {
            "network": network, "layers": self.layers, "models": self.models,
        }  # fmt: skip
        levels: list[list[nn.Module]] = [[] for _ in range(len(layers) + 1)]
        for leaf in range(self.models):
            parts = _parts(network if leaf == 0 else fresh(network), layers)
            for level, part in enumerate(parts):
                if leaf % 2 ** (len(layers) - level) == 0:  # the first leaf of this branch
                    levels[level].append(part)
        self.trunk = _Leaves(levels)
        counts = [2**b for b in range(len(layers) + 1) if 2**b < self.models]
        #: sizes of the nested ensembles: 1, 2, 4, ... and all leaves
        self.sizes = [*counts, self.models]
        self.branches = nn.ModuleList(_First(count) for count in self.sizes)

    def forward(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Mean logits (B, K) of the first leaves for images (B, C, H, W); no others are run.

        Args:
            x: Images.
            num_models: Number of leaves; ``None``: all.

        Raises:
            ValueError: If there are fewer leaves.
        """
        count = self.models if num_models is None else num_models
        if not 1 <= count <= self.models:
            raise ValueError(f"Expected num_models from 1 to {self.models}, got {num_models}.")
        return torch.stack(list(itertools.islice(self.leaves(x), count))).mean(0)

    def leaves(self, x: Tensor) -> Iterator[Tensor]:
        """Logits (B, K) of each leaf, depth first: stop whenever the budget is spent."""
        assert isinstance(self.trunk, _Leaves)
        return self.trunk.walk(x)

    def branch_network(self, index: int) -> nn.Module:
        """A tree of the first leaves."""
        return Tree(fresh(self.init_args["network"]), self.layers, self.sizes[index])

    def branch_state(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the first leaves."""
        depth = len(self.layers)
        wanted = tuple(
            f"trunk.levels.{level}.{place}."
            for level in range(depth + 1)
            for place in range(-(-self.sizes[index] // 2 ** (depth - level)))
        )
        return {k: v for k, v in state.items() if k.startswith(wanted)}

    def branch_config(self, index: int, config: Any) -> Any:
        """The same tree with fewer leaves."""
        return {**config, "init_args": {**config["init_args"], "models": self.sizes[index]}}


class _Leaves(nn.Module):
    """All leaves of a tree, with every branch run once."""

    def __init__(self, levels: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in levels)
        self.leaves = nn.Identity()  # so that an exchange can read them

    def walk(self, x: Tensor, level: int = 0, place: int = 0) -> Iterator[Tensor]:
        """Logits of the leaves of one branch, depth first."""
        branches = self.levels[level]
        assert isinstance(branches, nn.ModuleList)
        if place >= len(branches):
            return
        x = branches[place](x)
        if level == len(self.levels) - 1:
            yield x
            return
        for child in (2 * place, 2 * place + 1):
            yield from self.walk(x, level + 1, child)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all leaves, shape (B, leaves, K)."""
        leaves: Tensor = self.leaves(torch.stack(list(self.walk(x)), 1))
        return leaves


class _First(nn.Module):
    """Mean logits of the first leaves."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, leaves: Tensor) -> Tensor:
        """Logits (B, K) of (B, leaves, K)."""
        return leaves[:, : self.count].mean(1)


def _parts(network: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """What leads up to each cut, and what follows the last."""
    parts: list[nn.Module] = []
    rest: nn.Module = network
    for layer in layers:
        find_layer(network, layer)
        try:
            part, rest = split_at(rest, layer)
        except ValueError as error:
            raise ValueError(
                f"Expected layers in the order in which they run, each once, got {list(layers)}: "
                f"{layer!r} does not come after those before it. ({error})"
            ) from error
        parts.append(part)
    return [*parts, rest]
