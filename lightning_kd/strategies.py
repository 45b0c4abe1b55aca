"""How processes divide the work if Lightning's own strategies do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_kd.cohort import Cohort
from lightning_kd.distributed import gather_over_ranks, world_size
from lightning_kd.losses.base import losses_of
from lightning_kd.modules.checkpoint_io import last_checkpoint
from lightning_kd.peers import Peers

LOST = ("onnection", "NCCL", "ocket", "peer", "imed out", "Gloo")  # as backends word it


class PeerPerProcess(DDPStrategy):
    """Each process trains one peer of a cohort, and sends the others only its output.

    All processes see the same batches. Logits are gathered, gradients are not averaged: the step
    equals the simultaneous update in one process. Checkpoints, exports and reports cover all peers;
    weights are sent only when these are written. Choose it by name,
    ``Trainer(strategy="peer_per_process", devices=K)`` for K peers.

    Args:
        options: Those of Lightning's ``DDPStrategy`` (``process_group_backend``, ``timeout``,
            ``start_method``).

    Raises:
        TypeError: If the module is not a ``PeerCohort``.
        ValueError: If there are not as many processes as peers, batches differ between processes,
            or BatchNorm is to be synchronised.

    Source:
        Zhang et al. 2018, https://arxiv.org/abs/1706.00384, section 3.3.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._looks = 0

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}  # every process sees every sample

    @property
    def _cohort(self) -> Cohort:
        module = self.lightning_module
        cohort = getattr(module, "distillation", None)
        if not isinstance(cohort, Cohort):
            raise TypeError(
                f"Expected strategy peer_per_process with a PeerCohort, got "
                f"{type(module).__name__}: use strategy ddp."
            )
        return cohort

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._layer_sync:
            raise ValueError(
                "Expected sync_batchnorm=False with peer_per_process: all processes see the same "
                "batch, there is nothing to synchronise."
            )
        divide(self._cohort, self.global_rank, self.world_size)
        super().setup(trainer)

    @override
    def configure_ddp(self) -> None:
        # no wrapper, since nothing is averaged; but all begin with the same weights
        for tensor in self._cohort.state_dict().values():
            if isinstance(tensor, Tensor):
                torch.distributed.broadcast(tensor.detach(), 0)

    @override
    def teardown(self) -> None:
        if isinstance(getattr(self.lightning_module, "distillation", None), Cohort):
            divide(self._cohort, None)
        super().teardown()

    @override
    def on_train_end(self) -> None:
        self.collect()  # for what is written at the end

    def collect(self) -> None:
        """Bring each peer's weights from the process that trains it to all others."""
        for rank, parts in enumerate(parts_of(self._cohort)):
            for part in parts:
                for tensor in [*part.parameters(), *part.buffers()]:
                    torch.distributed.broadcast(tensor.detach(), rank)

    # ------------------------------------------------------------------ the same batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._compare(args[0])
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._compare(args[0])
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._compare(args[0])
        return super().test_step(*args, **kwargs)

    def _compare(self, batch: Any) -> None:
        """Refuse batches that differ; on a GPU, where this synchronizes, check every 100th only."""
        self._looks += 1
        if self.root_device.type != "cpu" and self._looks % 100 != 1:
            return
        seen = [_fingerprint(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        own = torch.stack(seen)
        everyone = torch.stack(gather_over_ranks(own))
        if not torch.allclose(everyone, own.expand_as(everyone), rtol=1e-6, atol=0):
            self.barrier()  # all get here, and none may exit before the others raise, too
            raise ValueError(
                "Expected all processes to see the same batch, got different ones: shuffle and "
                "augment from a seed that is the same everywhere, as lightning_kd.data does "
                "(workers=True of seed_everything makes processes differ)."
            )

    # ------------------------------------------------------------------ checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self.collect()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        state: Any = super().optimizer_state(optimizer)
        own = {
            index: _to_cpu(state["state"][index])
            for index, parameter in enumerate(_parameters(optimizer))
            if id(parameter) in self._own_parameters() and index in state["state"]
        }
        everyone: Any = [None] * self.world_size if self.is_global_zero else None
        torch.distributed.gather_object(own, everyone)
        if everyone is not None:
            state["state"] = {k: v for part in everyone for k, v in sorted(part.items())}
        return state  # type: ignore[no-any-return]

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            for parameter in list(optimizer.state):
                if id(parameter) not in self._own_parameters():
                    del optimizer.state[parameter]

    def _own_parameters(self) -> set[int]:
        parts = parts_of(self._cohort)[self.global_rank]
        return {id(parameter) for part in parts for parameter in part.parameters()}

    # ------------------------------------------------------------------ faults

    @override
    def on_exception(self, exception: BaseException) -> None:
        text, module = str(exception), self.lightning_module
        lost = isinstance(exception, RuntimeError) and any(word in text for word in LOST)
        if lost and module is not None and world_size() > 1:
            exception.args = (
                f"The process of peer {self.global_rank} lost the others: one of them has ended, "
                f"see its own message.{last_checkpoint(module.trainer)} Resume with the same "
                f"command and --ckpt_path. ({text})",
            )
        super().on_exception(exception)


def divide(cohort: Cohort, index: int | None, count: int = 1) -> None:
    """Run and train peer ``index`` alone, with ``count`` processes in all; ``None``: all peers.

    Raises:
        ValueError: If this cohort cannot be divided this way.
    """
    if index is not None:
        layers = [
            n for loss in losses_of(cohort.losses[0]).values() for n in loss.teacher_layers(0)
        ]
        if cohort.update != "simultaneous" or not cohort.exchange.allows_sequential_update:
            what = f"update={cohort.update!r} and {type(cohort.exchange).__name__}"
        elif cohort.peers.branching:
            what = "branches of one network"
        elif layers or cohort.exchange.layers():
            what = f"layers {[*layers, *cohort.exchange.layers()]} of peers, which are not sent"
        elif count != len(cohort.peers):
            raise ValueError(
                f"Expected one process for each of {len(cohort.peers)} peers, got {count}: set "
                f"--trainer.devices {len(cohort.peers)}."
            )
        elif not any(p.requires_grad for p in cohort.peers.networks[index].parameters()):
            what = f"peer {index} without a parameter to train"
        else:
            what = ""
        if what:
            raise ValueError(
                f'Expected update="simultaneous" and an exchange of logits alone, such as '
                f"Mutual, with one peer in each process, got {what}: use one process, or ddp."
            )
    for part in cohort.modules():
        if isinstance(part, Peers):  # those of the exchange's shadow too
            part.own_index = index


def parts_of(cohort: Cohort) -> list[list[nn.Module]]:
    """The modules of each peer."""
    groups = [part for part in cohort.modules() if isinstance(part, Peers)]
    distillations = cohort.distillations()
    return [
        [
            *(peers.networks[k] for peers in groups),
            cohort.losses[k],
            *(part for one in distillations[k : k + 1] for part in (one.losses, one.weighting)),
        ]
        for k in range(len(cohort.peers))
    ]


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}


def _fingerprint(values: Tensor) -> Tensor:
    """One number that changes with any value and any order."""
    flat = values.flatten().double()
    return (flat * torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)).sum()


StrategyRegistry.register(
    "peer_per_process", PeerPerProcess, description="One peer of a cohort in each process"
)
