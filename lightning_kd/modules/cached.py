"""Asking teachers once about every image of a data module, for a ``TeacherCache``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info

from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import Distiller
from lightning_kd.teachers import Teacher, TeacherCache
from lightning_kd.weighting import Weighting


def fill(
    module: Distiller,
    cache: TeacherCache,
    teachers: Sequence[Teacher],
    parts: Sequence[DistillationLoss | Weighting],
) -> None:
    """Find what teachers said in an earlier run, or ask them, every process a share of the images.

    Args:
        module: Prepared, on its device.
        cache: To fill.
        teachers: Whom to ask.
        parts: Who reads answers.

    Raises:
        ValueError: If somebody reads more than logits, or the answers there are of something else.
    """
    readers = {type(p).__name__ for p in parts for m in range(len(teachers)) if p.teacher_layers(m)}
    if readers:
        raise ValueError(
            f"Expected losses and weightings that read logits with teacher_cache, got "
            f"{', '.join(sorted(readers))}, which read layers of the teachers: leave the cache out."
        )
    trainer = module.trainer
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    count = len(data.training[1])
    shown = f"{data.fingerprint()} {data.image_shape} {data.crop_padding} {data.flip}"
    classes = data.num_classes
    facts = cache.facts(
        [teacher.network for teacher in teachers],
        shown,
        classes,
    )
    if trainer.strategy.broadcast(cache.find(facts, count)):
        rank_zero_info(f"Answers of {len(teachers)} teachers are there: {cache.folder}")
        return
    rank_zero_info(
        f"Asking {len(teachers)} teachers about {count} images in {cache.views} views, once; "
        f"answers: {cache.folder}"
    )
    if trainer.is_global_zero:
        cache.create(facts, count)
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        cache.create(facts, count)
    for view, indices, batch in data.to_be_cached(trainer.global_rank, trainer.world_size):
        x = data.on_after_batch_transfer(move_data_to_device(batch, module.device), 0)[0]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            said = torch.stack([teacher(x).logits for teacher in teachers])
        cache.write(view, indices, said)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        cache.finish(facts, count)
    trainer.strategy.barrier()
    cache.find(facts, count)
