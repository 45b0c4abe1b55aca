"""Steps of validation and test."""

from __future__ import annotations

from typing import Any

from lightning_kd.modules.metric_logging import (
    BATCHES,
    LABELLED,
    collection_of,
    drop_unmeasured,
    log_metrics,
    update_own,
)
from lightning_kd.modules.unmeasured import follow_the_last_state


def evaluate(module: Any, batch: Any, stage: str, loader: int) -> None:
    """Add a batch of one of several loaders to the metrics of ``"val"`` or ``"test"``."""
    x, target = module.unpack(batch)
    core = module.distillation
    if module.trainer.sanity_checking:  # its batches come again and must not count twice
        core.output(x)
        return
    key, every = collection_of(module, stage, loader)
    metrics = dict(every)
    own = {name: metrics.pop(name) for name in (*module._own_names, BATCHES, LABELLED)}
    observe = stage == "val" and module.trainer.state.fn == "fit" and not loader
    output = core.update_metrics(metrics, x, target, observe)
    update_own(own, output, module.task.hard_target(target))
    log_metrics(module, every, key, f"{stage}/{module.task.watched}")


def end_evaluation(module: Any, stage: str) -> None:
    """Look at what was measured in an epoch; every process must call it."""
    measured = drop_unmeasured(module.trainer, module.metrics, stage)
    if not measured and module.trainer.state.fn == "fit":
        follow_the_last_state(module.trainer, stage)
