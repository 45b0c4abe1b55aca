from __future__ import annotations

import difflib
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_kd.schedules import Schedule
from lightning_kd.utils.checks import check_one_of


class AttributeScheduler(Callback):
    """Set a number inside the module by a schedule, with a count of its own.

    ``trainer.global_step`` counts the steps of every optimizer, so this keeps its own count of
    batches or epochs, in the checkpoint.

    Args:
        target: Dotted path from the module to the number, ``losses.soft_target.temperature``; in
            a cohort that is the loss of every peer.
        schedule: Value by count.
        interval: ``"epoch"`` or ``"step"`` (a training batch): what is counted.

    Raises:
        ValueError: If ``interval`` is neither; at the start of training if there is no such number
            or another scheduler sets it.
    """

    def __init__(self, target: str, schedule: Schedule, interval: str = "epoch") -> None:
        check_one_of(interval, ("epoch", "step"), "interval")
        self.target, self.schedule, self.interval = target, schedule, interval
        self.count = 0

    @property
    @override
    def state_key(self) -> str:
        """One key per target, so that two schedulers never share a state."""
        return f"{type(self).__name__}[{self.target}]"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        own = self._resolve(pl_module)
        same = [
            other
            for other in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(other, AttributeScheduler) and other._resolve(pl_module) == own
        ]
        if len(same) > 1:
            raise ValueError(f"Expected one scheduler of {self.target}, got {len(same)}.")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.interval == "epoch":
            self._set(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # a run resumed inside an epoch skips on_train_epoch_start
        if self.interval == "step" or batch_idx == 0 or trainer.fit_loop.restarted_mid_epoch:
            self._set(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.interval == "step":
            self.count += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.interval == "epoch":
            self.count += 1

    def _set(self, pl_module: LightningModule) -> None:
        owners, name = self._resolve(pl_module)
        value = self.schedule(self.count)
        if (name.endswith("temperature") and not value > 0) or not math.isfinite(value):
            raise ValueError(
                f"Expected a schedule of {self.target} that stays "
                f"{'> 0' if name.endswith('temperature') else 'finite'}, got {value} at "
                f"{self.interval} {self.count}."
            )
        for owner in owners:
            setattr(owner, name, value)
        pl_module.log(f"schedule/{self.target}", value, batch_size=1)

    def _resolve(self, pl_module: LightningModule) -> tuple[list[Any], str]:
        """Owners and name of the number; a list in the path (of a cohort's peers) means all of it.

        Raises:
            ValueError: If the path does not lead to a number.
        """
        first = self.target.partition(".")[0]
        core = getattr(pl_module, "distillation", None)
        owners: list[Any] = [core if core is not None and hasattr(core, first) else pl_module]
        *path, name = self.target.split(".")
        for depth, part in enumerate([*path, name]):
            if not part.isdigit():
                owners = [
                    item
                    for owner in owners
                    for item in (owner if isinstance(owner, nn.ModuleList) else [owner])
                ]
            found = []
            for owner in owners:
                known = list(owner.keys()) if isinstance(owner, nn.ModuleDict) else None
                if (part in known) if known is not None else hasattr(owner, part):
                    found.append(owner[part] if known is not None else getattr(owner, part))
                    continue
                near = known if known is not None else difflib.get_close_matches(part, dir(owner))
                raise ValueError(
                    f"Expected a number of the module at {self.target!r}, but there is no {part!r} "
                    f"in {type(owner).__name__}; near names: {', '.join(near) or 'none'}."
                )
            if depth < len(path):
                owners = found
        for value in found:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"Expected a number at {self.target!r}, got {type(value).__name__}."
                )
        return owners, name


class TemperatureScheduler(AttributeScheduler):
    """Change a loss's temperature over training.

    Args:
        schedule: Value by count, > 0.
        loss: Name of the loss in the log.
        interval: ``"epoch"`` or ``"step"``: what is counted.
    """

    def __init__(
        self, schedule: Schedule, loss: str = "soft_target", interval: str = "epoch"
    ) -> None:
        super().__init__(f"losses.{loss}.temperature", schedule, interval)


class LossWeightScheduler(AttributeScheduler):
    """Change the weight of a loss over training.

    Args:
        schedule: Value by count.
        loss: Name of the loss in the log; ``task`` is the cross-entropy with the labels.
        interval: ``"epoch"`` or ``"step"``: what is counted.
    """

    def __init__(
        self, schedule: Schedule, loss: str = "soft_target", interval: str = "epoch"
    ) -> None:
        target = "task_weight" if loss == "task" else f"losses.{loss}.weight"
        super().__init__(target, schedule, interval)
