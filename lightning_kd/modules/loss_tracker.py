from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_kd.modules.checkpoint_io import last_checkpoint


class LossTracker:
    """Running means of each step's losses, kept on the device until an epoch ends.

    Logging each number by itself costs as much as the step of a small network. Whether one of them
    became NaN or infinite is noted too; looking costs one host sync.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._bad: dict[tuple[str, ...], Tensor] = {}
        #: images of the last step, in this process
        self.samples = 0

    def add(self, losses: dict[str, Tensor], more: dict[str, Tensor], samples: int) -> None:
        """Add one step.

        Args:
            losses: Weighted losses by name, detached scalars on one device; they must be finite,
                and their sum is tracked as ``loss``.
            more: Other scalars by name.
            samples: Number of samples.
        """
        self.samples = samples
        values = {**losses, "loss": torch.stack(list(losses.values())).sum(), **more}
        names = tuple(values)
        double = any(v.dtype == torch.float64 for v in values.values())
        dtype = torch.float64 if double else torch.float32
        now = torch.stack([value.to(dtype) for value in values.values()])
        bad = ~torch.isfinite(now[: len(losses)])
        if names in self._sums:
            before, count = self._sums[names]
            self._sums[names] = before.add_(now, alpha=samples), count + samples
        else:
            self._sums[names] = now * samples, samples
        self._bad[names] = self._bad[names] | bad if names in self._bad else bad

    def log(self, module: LightningModule) -> None:
        """Log the means since the last call as ``train/<name>``; every process must call it."""
        sums: dict[str, tuple[Tensor, int]] = {}
        for names, (values, count) in self._sums.items():
            for name, value in zip(names, values.unbind(), strict=True):
                before, samples = sums.get(name, (torch.zeros_like(value), 0))
                sums[name] = before + value, samples + count
        self._sums = {}
        for name, (value, samples) in sums.items():
            module.log(
                f"train/{name}", value / samples, on_step=False, on_epoch=True, batch_size=samples,
                sync_dist=True,
            )  # fmt: skip

    def raise_if_not_finite(self, module: LightningModule, x: Tensor | None = None) -> None:
        """Raise ``FloatingPointError`` if a loss was NaN or infinite since the last call.

        Args:
            module: Whose losses they are.
            x: The last batch of images, if it may be the cause.
        """
        broken = [
            name
            for names, bad in self._bad.items()
            if bool(bad.any())
            for name, flag in zip(names, bad.tolist(), strict=False)
            if flag
        ]
        self._bad = {}
        if broken and x is not None and not torch.isfinite(x).all():
            count = int((~torch.isfinite(x)).flatten(1).any(1).sum())
            raise FloatingPointError(
                f"Expected finite images, got {count} of {len(x)} with NaN or infinity in epoch "
                f"{module.current_epoch}, step {module.trainer.global_step}: mend the data (loss "
                f"{', '.join(broken)} became NaN or infinite).{last_checkpoint(module.trainer)}"
            )
        if broken:
            clip = ""
            if module.automatic_optimization:
                clip = ", or clip gradients (--trainer.gradient_clip_val 1)"
            raise FloatingPointError(
                f"Loss {', '.join(broken)} became NaN or infinite in epoch "
                f"{module.current_epoch}, at or before step {module.trainer.global_step}. Lower "
                f"the learning rate{clip}.{last_checkpoint(module.trainer)}"
            )
