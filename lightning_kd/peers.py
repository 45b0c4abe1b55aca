"""The networks of a cohort, whether separate or branches of one, behind one interface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.base_distillation import cut_prefix
from lightning_kd.distributed import gather_over_ranks
from lightning_kd.features import Batched, Tap, ready_to_train
from lightning_kd.models import Branching
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.memory import shared_memory


@contextlib.contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm use a batch's statistics, but not learn from them."""
    norms = [
        m
        for m in network.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class Peers(nn.Module):
    """Several networks, or one of several branches, run together.

    Args:
        networks: Two or more networks, or exactly one ``MultiBranch`` or ``Tree``.
        batched: Run networks of one architecture as one.

    Raises:
        ValueError: If two of them share weights.
    """

    def __init__(self, networks: Sequence[nn.Module], batched: bool = False) -> None:
        super().__init__()
        self.batched = batched
        self._batch: Batched | None = None
        self.networks = nn.ModuleList(ready_to_train(network) for network in networks)
        self.branching = len(networks) == 1 and isinstance(networks[0], Branching)
        if pair := shared_memory(networks):
            raise ValueError(
                f"Expected peers to be separate networks, but peers {pair[0]} and {pair[1]} share "
                f"weights or running statistics: build each anew."
            )
        #: the one peer that this process runs, where each process has its own; None: all of them
        self.own_index: int | None = None
        self._taps: list[Tap] = []
        self._trunk: Tap | None = None

    def __len__(self) -> int:
        return len(self.branching_network.branches) if self.branching else len(self.networks)

    @property
    def branching_network(self) -> Branching:
        """The one network of branches."""
        network = self.networks[0]
        assert isinstance(network, Branching)
        return network

    def record_layers(self, layers: Sequence[str]) -> None:
        """Record the outputs of these layers of every peer.

        Raises:
            ValueError: If a layer does not exist.
        """
        for tap in self._taps:
            tap.remove()
        if self.branching:
            shared = {name for name, _ in self.branching_network.trunk.named_modules()}
            before = [layer for layer in layers if layer in shared]
            behind = [layer for layer in layers if layer not in shared]
            self._trunk = Tap(self.branching_network.trunk, before)
            self._taps = [Tap(branch, behind) for branch in self.branching_network.branches]
        else:
            self._taps = [Tap(network, layers) for network in self.networks]
            if self.batched:
                self._batch = Batched(list(self.networks), self._taps[0])

    def hook(self) -> None:
        """Hook the layers again, where some were replaced."""
        for tap in [*self._taps, *([self._trunk] if self._trunk else [])]:
            tap.hook()

    def forward(self, views: Sequence[Tensor]) -> list[NetworkOutput]:
        """Run every peer.

        Args:
            views: Images (B, C, H, W) for each peer; branches share the first.
        """
        if self.own_index is not None:
            own = self._taps[self.own_index](views[self.own_index])
            everyone = [NetworkOutput(logits) for logits in gather_over_ranks(own.logits)]
            return [own if k == self.own_index else other for k, other in enumerate(everyone)]
        if self._batch is not None:
            return self._batch(views)
        if not self.branching:
            return [tap(x) for tap, x in zip(self._taps, views, strict=True)]
        assert self._trunk is not None
        shared = self._trunk(views[0])
        features = self.branching_network.branch_input(shared.logits)
        answers = []
        for tap in self._taps:
            own = tap(features)
            answers.append(NetworkOutput(own.logits, {**shared.features, **own.features}))
        return answers

    def refresh(self, index: int, x: Tensor) -> NetworkOutput:
        """Run one peer again after its step, as a teacher: no gradient, no statistics."""
        with torch.no_grad(), frozen_statistics(self.networks[index]):
            return self._taps[index](x)

    def with_others(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of all peers, those of other processes without gradient."""
        if not own:
            return own  # nobody has a loss, as ``total_loss`` will say
        values = gather_over_ranks(torch.stack(list(own.values())))
        prefix = f"peer_{self.own_index}/"
        losses: dict[str, Tensor] = {}
        for k, theirs in enumerate(values):
            names = [f"peer_{k}/{name.removeprefix(prefix)}" for name in own]
            losses |= own if k == self.own_index else dict(zip(names, theirs, strict=True))
        return losses

    # ------------------------------------------------------------------ each as a network

    def network(self, index: int) -> nn.Module:
        """One peer as a network of its own; of a branch it is a copy."""
        if not self.branching:
            return self.networks[index]
        network = self.branching_network.branch_network(index)
        network.load_state_dict(
            self.branching_network.branch_state(index, self.branching_network.state_dict())
        )
        return network

    def state_of(self, index: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of one peer, under its own names, from a state of this object."""
        if self.branching:
            return self.branching_network.branch_state(index, cut_prefix(state, "networks.0."))
        return cut_prefix(state, f"networks.{index}.")

    def config(self, index: int, configs: Sequence[Any]) -> Any:
        """Configuration of one peer, given those of ``networks``."""
        if self.branching:
            return self.branching_network.branch_config(index, configs[0])
        return configs[index]

    def whole_networks(self) -> list[nn.Module]:
        """Networks that run whole, each by itself: the peers, or trunk and branches.

        Raises:
            ValueError: If they run as one.
        """
        if self.batched:
            raise ValueError("batched=True, which is one network already: compile it in Python")
        if self.branching:
            return [self.branching_network.trunk, *self.branching_network.branches]
        return list(self.networks)
