from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_kd.exchange import Exchange
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import cut_prefix
from lightning_kd.modules.lessons import Lessons
from lightning_kd.modules.manual import ManualSteps
from lightning_kd.modules.peers import Peers
from lightning_kd.strategies import PeerPerProcess


class Cohort(ManualSteps):
    """Several learners: what is kept of each, and in which process each is trained."""

    peers: Peers
    exchange: Exchange
    losses: nn.ModuleList
    lessons: Lessons
    update: str

    @property
    def names(self) -> list[str]:
        """Names of the peers in the log."""
        return [f"peer_{k}" for k in range(len(self.peers))]

    @property
    def prepared(self) -> bool:
        """Whether the dry run has been made."""
        return self.peers.prepared

    # ------------------------------------------------------------------ what is kept of a run

    def learners(self) -> dict[str, nn.Module]:
        """The peers; each branch of a ``MultiBranch`` as a network of its own."""
        if not self.peers.branching:
            return dict(zip(self.names, self.peers.networks, strict=True))
        networks = {}
        for k, name in enumerate(self.names):
            networks[name] = self.peers.branch.branch_network(k)
            networks[name].load_state_dict(self.peers.state(k))
        return networks

    def learner_state(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """One peer's weights."""
        k = self.names.index(name)
        if not self.peers.branching:
            return cut_prefix(state, f"peers.networks.{k}.")
        return self.peers.branch.branch_state(k, cut_prefix(state, "peers.networks.0."))

    def learner_config(self, name: str) -> Any:
        """One peer's configuration."""
        configs = dict(self.hparams).get("peers")
        if configs is None:
            return None
        k = self.names.index(name)
        if self.peers.branching:
            return self.peers.branch.branch_config(k, configs[0])
        return configs[k]

    def learner_accuracies(self) -> list[float]:
        """Accuracy of each peer at the last validation."""
        metrics = self.trainer.callback_metrics
        keys = [f"val/{name}/accuracy" for name in self.names]
        return [float(metrics[key]) for key in keys] if all(k in metrics for k in keys) else []

    def best_learner(self, accuracies: Sequence[float]) -> str:
        """The peer of the highest accuracy; the last one (a leader) where nothing was measured."""
        if not accuracies:
            return self.names[-1]
        return self.names[max(range(len(accuracies)), key=lambda k: accuracies[k])]

    # ------------------------------------------------------------------ one peer in each process

    def own(self, index: int | None, count: int = 1) -> None:
        """Ask and train peer ``index`` alone, with ``count`` processes in all; None: all peers.

        Raises:
            ValueError: If this cohort cannot be divided so.
        """
        if index is not None:
            layers = [n for loss in self._losses(0) for n in loss.teacher_layers(0)]
            if self.update != "simultaneous" or not self.exchange.steps_apart:
                what = f"update={self.update!r} and {type(self.exchange).__name__}"
            elif self.peers.branching:
                what = "branches of one network"
            elif layers or self.exchange.layers():
                what = f"layers {[*layers, *self.exchange.layers()]} of peers, which are not sent"
            elif count != len(self.peers):
                raise ValueError(
                    f"Expected one process for each of {len(self.peers)} peers, got {count}: set "
                    f"--trainer.devices {len(self.peers)}."
                )
            elif not any(p.requires_grad for p in self.peers.networks[index].parameters()):
                what = f"peer {index} without a parameter to train"
            else:
                what = ""
            if what:
                raise ValueError(
                    f'Expected update="simultaneous" and an exchange of answers alone, such as '
                    f"Mutual, with one peer in each process, got {what}: use one process, or ddp."
                )
        for part in self.modules():
            if isinstance(part, Peers):  # those of the exchange's shadow too
                part.mine = index

    def parts(self) -> list[list[nn.Module]]:
        """What belongs to each peer."""
        cohorts = [part for part in self.modules() if isinstance(part, Peers)]
        beside = (self.losses, self.lessons.losses, self.lessons.weightings)
        return [
            [*(cohort.networks[k] for cohort in cohorts), *(part[k] for part in beside)]
            for k in range(len(self.peers))
        ]

    def on_train_end(self) -> None:
        """Have all peers in every process, for what is written at the end."""
        if isinstance(self.trainer.strategy, PeerPerProcess):
            self.trainer.strategy.collect()

    def _losses(self, k: int) -> dict[DistillationLoss, str]:
        losses = self.losses[k]
        assert isinstance(losses, nn.ModuleDict)
        return {loss: n for n, loss in losses.items() if isinstance(loss, DistillationLoss)}
