from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor

from lightning_kd.atomic_files import write_atomically
from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.data.pseudo_labels import NAME


class PseudoLabels(Callback):
    """Writes a network's output for each training image, for ``PseudoLabelled`` to read.

    For ``lightning-kd predict`` with a data module of this package whose ``predict_split``
    is ``train``. Each process writes one file, ``pseudo_labels_0.safetensors`` and so on; the
    files identify their images, so that no others can be labelled with them.

    Args:
        folder: Where to write; ``None``: the run's folder.
        overwrite: Replace the files of an earlier run.

    Raises:
        ValueError: If the data is not as above.
        FileExistsError: If another run's files are there.
    """

    def __init__(self, folder: str | None = None, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._outputs: list[Tensor] = []
        self._run = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the files may be written."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        split = getattr(data, "predict_split", None)
        if split != "train":
            raise ValueError(
                f"Expected a data module of lightning_kd.data with predict_split train, got "
                f"{type(data).__name__} with {split}: set --data.predict_split train."
            )
        self._outputs = []
        self._run = trainer.strategy.broadcast(uuid.uuid4().hex)
        refuse_to_overwrite(trainer, self._path(trainer, 0), self.overwrite)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the probabilities, without waiting for a GPU."""
        if outputs.dim() != 2:
            raise ValueError(
                f"Expected one output per image, probabilities (B, K), got shape "
                f"{tuple(outputs.shape)}: PseudoLabels is for classification."
            )
        self._outputs.append(outputs.detach())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this process's file."""
        order = trainer.predict_dataloaders.sampler  # type: ignore[union-attr]
        indices = [chosen for chosen, _ in order.batches()][: len(self._outputs)]
        outputs, self._outputs = self._outputs, []
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        tensors = {
            "indices": torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64),
            "probabilities": torch.cat(outputs).float().cpu() if outputs else torch.zeros(0, 0),
        }
        facts = {
            "fingerprint": trainer.datamodule.fingerprint(),  # type: ignore[attr-defined]
            "images": str(order.length),
            "files": str(trainer.world_size),
            "run": self._run,
        }
        path = self._path(trainer, trainer.global_rank)
        write_atomically(path, save(tensors, facts))
        rank_zero_info(f"pseudo-labels: {path}")

    def _path(self, trainer: Trainer, rank: int) -> Path:
        return run_folder(trainer, self.folder) / f"{NAME}_{rank}.safetensors"
