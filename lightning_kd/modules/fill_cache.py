"""Running teachers once on every image of a data module, for a ``TeacherCache``."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_kd.distillation import Distillation
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import Distiller
from lightning_kd.teachers import TeacherCache
from lightning_kd.weighting import Weighting

PROBES = 32


def fill_cache(module: Distiller, cache: TeacherCache) -> None:
    """Find the teacher outputs of an earlier run, or compute them, each process its share.

    Cached outputs are compared with what the teachers return now for a few images.

    Args:
        module: Whose teachers run; built, on its device.
        cache: To fill.

    Raises:
        ValueError: If a loss reads more than the cache keeps, the cached outputs are of something
            else, or processes do not share the folder.
    """
    distillation = module.distillation
    assert isinstance(distillation, Distillation)
    teachers = list(distillation.teachers)
    _refuse_readers(cache, distillation)
    trainer = module.trainer
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    count = len(data.training[1])
    everyone = trainer.strategy.reduce_boolean_decision

    def run(batch: Any) -> Tensor:
        x = data.on_after_batch_transfer(move_data_to_device(batch, module.device), 0)[0]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            return torch.stack([teacher(x).logits for teacher in teachers])

    few = torch.linspace(0, count - 1, min(PROBES, count)).long()
    probes = [
        (view, indices, run(batch))
        for view, indices, batch in data.views([(cache.views - 1, few)])
    ]  # fmt: skip
    shown = f"{data.fingerprint()} {data.image_shape} {data.crop_padding} {data.flip}"
    facts = cache.facts(teachers, shown, probes[0][2].shape[2])
    found = cache.find(facts, count)
    if everyone(found, all=False):
        rank_zero_info(f"Outputs of {len(teachers)} teachers are cached: {cache.folder}")
    else:
        rank_zero_info(
            f"Running {len(teachers)} teachers once on {count} images in {cache.views} views; "
            f"outputs: {cache.folder}"
        )
        token = trainer.strategy.broadcast(secrets.token_hex(8))
        there = trainer.is_global_zero and cache.create(facts, count, token, first=True)
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            there = cache.create(facts, count, token, first=False)
        _refuse_other_disks(everyone(there, all=True), cache)
        own = torch.arange(trainer.global_rank, count, trainer.world_size)
        batches = torch.split(own, data.batch_size)
        plan = [(view, indices) for view in range(cache.views) for indices in batches]
        for view, indices, batch in data.views(plan):
            cache.write(view, indices, run(batch))
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            cache.finish(facts, count, token)
        trainer.strategy.barrier()
        found = cache.find(facts, count)
    _refuse_other_disks(everyone(found, all=True), cache)
    for probe in probes:
        cache.check(*probe)


def _refuse_readers(cache: TeacherCache, distillation: Distillation) -> None:
    parts = [*distillation.losses.values(), distillation.weighting]
    layers = {
        type(part).__name__
        for part in parts
        if isinstance(part, (DistillationLoss, Weighting))
        for m in range(len(distillation.teachers))
        if part.teacher_layers(m)
    }
    if layers:
        raise ValueError(
            f"Expected losses and weightings that read logits with teacher_cache, got "
            f"{', '.join(sorted(layers))}, which read layers of the teachers: leave the cache out."
        )
    scaled = {type(p).__name__ for p in parts if isinstance(p, DistillationLoss) and p.reads_scale}
    if scaled and cache.top_k is not None:
        raise ValueError(
            f"Expected losses on probabilities with top_k, which keeps no more than them, got "
            f"{', '.join(sorted(scaled))}: leave top_k out."
        )


def _refuse_other_disks(shared: bool, cache: TeacherCache) -> None:
    if not shared:
        raise ValueError(
            f"Expected all processes to see one folder {cache.folder}, got some that do not: "
            f"choose one on a disk that all machines share."
        )
