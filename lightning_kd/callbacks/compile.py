from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_kd.modules import DataFree, PeerCohort, SubTeacher, Supervised
from lightning_kd.modules.peers import Peers
from lightning_kd.teachers import Teacher


class Compile(Callback):
    """``torch.compile`` for the networks of a run, each by itself, from its second step on.

    That step takes longer by up to a minute for each network, and so does the first validation
    behind it. What is exported and saved are the plain networks. The teacher of ``DataFree``, whose
    layers are measured in some passes only, stays plain, and so does what makes images. It needs a
    C++ compiler on a CPU, and Triton on a GPU.

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
        self._before: dict[nn.Module, Any] = {}

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
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # not before: hooks must all be there when a network is traced, and a plain step of each
        # network in its own mode has seen that no layer changes in place what another part reads
        if self._before:
            return
        rank_zero_info("Compiling the networks: this step may take minutes.")
        for network in self._networks(pl_module):
            if network not in self._before:
                self._before[network] = network._compiled_call_impl
                network._compiled_call_impl = torch.compile(_own_code(network), **self.options)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for network, before in self._before.items():
            network._compiled_call_impl = before
        self._before = {}

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


def _own_code(network: nn.Module) -> FunctionType:
    """The network's call, as code of its own.

    Dynamo gives up on code that it has compiled eight times, and ``nn.Module.compile`` compiles the
    one that all networks of a process share.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return network._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    code = call.__code__.replace(co_name=f"call_{id(network)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
