from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_kd.modules import DataFree, PeerCohort, SubTeacher, Supervised
from lightning_kd.modules.peers import Peers
from lightning_kd.teachers import Teacher


class Compile(Callback):
    """``torch.compile`` for the networks of a run, each by itself, from its first training step on.

    The first step takes a minute or so longer. What is exported and saved are the plain networks.
    The teacher of ``DataFree``, whose layers are measured in some passes only, stays plain, and so
    does what makes images. It needs a C++ compiler on a CPU, and Triton on a GPU.

    Args:
        teachers: Compile teachers.
        learners: Compile students and peers.
        options: More arguments of ``torch.compile``, such as ``{mode: max-autotune}``.

    Raises:
        ValueError: If the paths through a network change from step to step.
    """

    def __init__(
        self,
        teachers: bool = True,
        learners: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.teachers, self.learners, self.options = teachers, learners, options or {}
        self._compiled: list[nn.Module] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        why = ""
        if isinstance(pl_module, SubTeacher):
            why = "whose teacher is run in parts"
        elif isinstance(pl_module, Supervised) and pl_module.depth is not None:
            why = "with a depth, whose path changes at each step"
        elif isinstance(pl_module, PeerCohort) and pl_module.peers.batched:
            why = "with batched=True, which is one network already: compile it in Python"
        if why:
            raise ValueError(
                f"Expected networks that are run whole with Compile, got "
                f"{type(pl_module).__name__} {why}. Leave Compile out."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not before: hooks on layers must all be there when a network is traced
        self._compiled = list(dict.fromkeys(self._networks(pl_module)))
        for network in self._compiled:
            network.compile(**self.options)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for network in self._compiled:
            network._compiled_call_impl = None
        self._compiled = []

    def _networks(self, module: LightningModule) -> Iterator[nn.Module]:
        student = getattr(module, "student", None)
        if self.learners and isinstance(student, nn.Module):
            yield student
        for part in module.modules():
            if self.teachers and isinstance(part, Teacher) and not isinstance(module, DataFree):
                yield part.network
            if self.learners and isinstance(part, Peers):
                yield from (
                    [part.branch.trunk, *part.branch.branches] if part.branching else part.networks
                )
