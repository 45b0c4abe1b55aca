from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn


def follow_the_last_state(trainer: Trainer, stage: str) -> None:
    """Let callbacks that watch a figure go on without it: no validation sample has a label.

    Checkpoints keep the last state, early stopping does not stop, plateaus do not change the rate.
    """
    logged, blind = trainer.callback_metrics, []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        watched = getattr(callback, "monitor", None)
        if watched is None or not watched.startswith(f"{stage}/") or watched in logged:
            continue
        if isinstance(callback, ModelCheckpoint):
            callback.monitor = None
            callback.save_top_k = min(callback.save_top_k, 1)
        elif isinstance(callback, EarlyStopping):
            callback.strict = False
        else:
            continue
        blind.append(f"{type(callback).__name__} (of {watched})")
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and str(config.monitor).startswith(f"{stage}/"):
            config.strict = False
    if blind:
        rank_zero_warn(
            f"No {stage} sample has a label, so nothing is measured: {', '.join(blind)} goes by "
            f"the last state instead."
        )
