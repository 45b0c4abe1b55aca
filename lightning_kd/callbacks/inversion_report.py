from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_kd.callbacks.files import run_folder
from lightning_kd.callbacks.replay_buffer import ReplayBuffer
from lightning_kd.data_free import synthesizer_of
from lightning_kd.data_free.image_losses import OneHot
from lightning_kd.modules import Distiller


class InversionReport(Callback):
    """Show the images that ``DataFree`` makes, and warn if they become all the same.

    After every epoch it logs ``inversion/class_entropy`` (of the teacher's outputs for the last
    round's images, as a share of the largest possible), ``inversion/pixel_spread`` (standard
    deviation over images, mean over pixels) and, with modulation, ``inversion/phi``; it draws
    ``images/epoch_<n>.png``: images with the predicted class and confidence, the memory (class
    histogram, priorities) and what was logged so far.

    Args:
        folder: Where to write; ``None``: the Trainer's ``default_root_dir``.
        every: Epochs between two pictures; 0: none, then matplotlib is not needed.
        images: How many to show.
        least_entropy: Warn below this share of the largest class entropy.
        least_spread: Warn below this spread of pixels.

    Raises:
        ImportError: If pictures are wanted and matplotlib is missing.
        TypeError: If the module does not synthesize images, as ``DataFree`` does.
    """

    def __init__(
        self,
        folder: str | None = None,
        every: int = 1,
        images: int = 40,
        least_entropy: float = 0.5,
        least_spread: float = 0.02,
    ) -> None:
        self.folder, self.every, self.images = folder, every, images
        self.least_entropy, self.least_spread = least_entropy, least_spread
        self.history: list[dict[str, float]] = []
        self._buffer: ReplayBuffer | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        synthesizer_of(pl_module, "InversionReport")
        if self.every:
            try:
                import matplotlib  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    "Pictures need pip install 'lightning-kd[plot]', or every: 0."
                ) from error
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        self._buffer = next((c for c in callbacks if isinstance(c, ReplayBuffer)), None)

    @override
    @torch.no_grad()
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synthesizer = synthesizer_of(pl_module, "InversionReport")
        assert isinstance(pl_module, Distiller)
        if synthesizer.latest is None:
            return
        images = synthesizer.latest.to(next(pl_module.student.parameters()))  # half under autocast
        probabilities = pl_module.teachers[0](images).logits.float().softmax(1)
        classes = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
        # of classes, too: a teacher that is unsure of every image has even probabilities
        entropy = min(_evenness(probabilities.mean(0)), _evenness(classes / len(probabilities)))
        row = {
            "class_entropy": entropy,
            "pixel_spread": float(images.float().std(0, correction=0).mean()),
        }
        losses = [loss for _, loss in synthesizer.named_losses()]
        one_hot = next((loss for loss in losses if isinstance(loss, OneHot)), None)
        if one_hot is not None and one_hot.phi is not None:
            row["phi"] = float(one_hot.phi.mean())
        logged = {f"inversion/{name}": value for name, value in row.items()}
        pl_module.log_dict(logged, sync_dist=True)
        self.history.append({"epoch": float(trainer.current_epoch), **row})
        if entropy < self.least_entropy or row["pixel_spread"] < self.least_spread:
            rank_zero_warn(
                f"The images of epoch {trainer.current_epoch} are nearly all the same (class "
                f"entropy {entropy:.2f} of 1, pixel spread {row['pixel_spread']:.3f}): the "
                f"generator collapses. Lower its learning rate, weigh ClassBalance or "
                f"BatchNormStatistics more, or reset it (reset_rounds)."
            )
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self.every and (trainer.current_epoch % self.every == 0 or last):
            folder = Path(run_folder(trainer, self.folder)) / "images"
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                self._draw(folder / f"epoch_{trainer.current_epoch:03d}.png", images, probabilities)

    def _draw(self, path: Path, images: Tensor, probabilities: Tensor) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        memory = self._buffer.memory if self._buffer is not None else None
        shown = min(self.images, len(images))
        columns = 8
        rows = -(-shown // columns)
        figure = Figure(figsize=(11, max(3.6, 0.75 * rows)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1), squeeze=False)[0]
        order = probabilities[:shown].argmax(1).argsort(stable=True)
        grid = left.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, k in zip(grid.flat, order.tolist(), strict=False):
            image = images[k].float().clamp(0, 1).movedim(0, 2).cpu()
            axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray")
            confidence, predicted = probabilities[k].max(0)
            axes.set_title(f"{int(predicted)}  {float(confidence):.2f}", fontsize=7, pad=2)
        left.suptitle("the teacher's predicted class, and its confidence", fontsize=8)
        panels = right.subplots(3 if memory is not None else 1, 1, squeeze=False)[:, 0]
        for name in self.history[0]:
            if name != "epoch":
                epochs = [row["epoch"] for row in self.history]
                values = [row.get(name, math.nan) for row in self.history]
                label = name.replace("_", " ")
                panels[-1].plot(epochs, values, marker="o", markersize=2, label=label)
        panels[-1].set(xlabel="epoch", ylim=(0, 1.05))
        panels[-1].legend(fontsize=7, frameon=False)
        if memory is not None:
            counts = memory.counts.cpu()
            panels[0].bar(range(len(counts)), counts, color="C7")
            panels[0].set(xlabel="class", ylabel="remembered")
            panels[1].hist(memory.priorities[: len(memory)].cpu().numpy(), bins=40, color="C7")
            panels[1].set(xlabel="priority (weighted divergence, nats)", ylabel="images")
            panels[1].set_yscale("log")
        for axes in panels:
            axes.tick_params(labelsize=7)
            axes.xaxis.label.set_size(8)
            axes.yaxis.label.set_size(8)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=110)


def _evenness(shares: Tensor) -> float:
    """Entropy of shares (K,) over its largest value: 1 if all are equal."""
    return float(torch.special.entr(shares).sum() / math.log(len(shares)))
