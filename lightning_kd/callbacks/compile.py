from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_kd.modules import Distiller


class Compile(Callback):
    """``torch.compile`` for the networks of a run, each by itself, from its second step on.

    That step takes longer by up to a minute for each network, and so does the first validation
    after it. The plain networks are exported and saved. The teacher of ``DataFree``, whose layers
    are measured in some passes only, stays plain, and so does the generator. It needs a C++
    compiler on a CPU, and Triton on a GPU.

    Args:
        teachers: Compile teachers.
        students: Compile students and peers.
        options: More arguments of ``torch.compile``, such as ``{mode: max-autotune}``.

    Raises:
        ValueError: If the paths through a network change from step to step.
    """

    def __init__(
        self,
        teachers: bool = True,
        students: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.teachers, self.students, self.options = teachers, students, options or {}
        self._before: dict[nn.Module, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._networks(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # not before: hooks must all be there when a network is traced, and a plain step of each
        # network in its own mode has shown that no layer changes in place what another reads
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

    def _networks(self, module: LightningModule) -> list[nn.Module]:
        if not isinstance(module, Distiller):
            raise TypeError(
                f"Compile expected a module of lightning_kd, got {type(module).__name__}."
            )
        try:
            trained = module.distillation.compilable_networks()
        except ValueError as error:
            raise ValueError(
                f"Expected networks that are run whole with Compile, got {type(module).__name__} "
                f"with {error}. Leave Compile out."
            ) from error
        whole = not module.teachers.why_not_whole
        teachers = [teacher.network for teacher in module.teachers] if whole else []
        return [*(trained if self.students else ()), *(teachers if self.teachers else ())]


def _own_code(network: nn.Module) -> FunctionType:
    """The network's call, as code of its own.

    Dynamo gives up on code that it has compiled eight times, and ``nn.Module.compile`` compiles the
    one that all networks of a process share.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return network._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    code = call.__code__.replace(co_name=f"call_{id(network)}")
    return FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
