from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.files import write_atomically

NAME = "pseudo_labels"


class PseudoLabels(Callback):
    """Writes what a network says of each training image, for ``PseudoLabelled`` to read.

    Belongs to ``lightning-kd predict`` with a data module of this package whose ``predict_split``
    is ``train``. Each process writes one file, ``pseudo_labels_0.safetensors`` and so on; the
    files name the images they are about, so that no others can be labelled with them.

    Args:
        folder: Where to write; ``null``: the run's folder.
        overwrite: Replace the files of an earlier run.

    Raises:
        ValueError: If the data is not as above.
        FileExistsError: If another run's files lie there.
    """

    def __init__(self, folder: str | None = None, overwrite: bool = False) -> None:
        self.folder, self.overwrite = folder, overwrite
        self._said: list[Tensor] = []
        self._run = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the files may be written."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        split = getattr(data, "predict_split", None)
        if split != "train":
            raise ValueError(
                f"Expected a data module of lightning_kd.data with predict_split train, got "
                f"{type(data).__name__} with {split}: set --data.predict_split train."
            )
        self._said = []
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
        """Keep the probabilities; on a GPU nobody waits for them yet."""
        if outputs.dim() != 2:
            raise ValueError(
                f"Expected one answer an image, probabilities (B, K), got shape "
                f"{tuple(outputs.shape)}: PseudoLabels is for classification."
            )
        self._said.append(outputs.detach())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write this process's file."""
        order = trainer.predict_dataloaders.sampler  # type: ignore[union-attr]
        indices = [chosen for chosen, _ in order.batches()][: len(self._said)]
        said, self._said = self._said, []
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        tensors = {
            "indices": torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64),
            "probabilities": torch.cat(said).float().cpu() if said else torch.zeros(0, 0),
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


def read_pseudo_labels(folder: Path, fingerprint: str) -> Tensor:
    """Read the files of one run of ``PseudoLabels``.

    Args:
        folder: That holds them.
        fingerprint: Of the images that are to be labelled.

    Returns:
        Probabilities of every image, shape (N, K).

    Raises:
        FileNotFoundError: If there are none, or not all.
        ValueError: If they are about other images, damaged, or do not cover all images.
    """
    first = folder / f"{NAME}_0.safetensors"
    advice = "write them with lightning-kd predict and the callback PseudoLabels."
    if not first.is_file():
        raise FileNotFoundError(
            f"Expected pseudo-labels in {folder.resolve()}, found no {first.name}: {advice}"
        )
    found: Tensor | None = None
    covered = torch.zeros(0, dtype=torch.bool)
    files, number, run = 1, 0, None
    while number < files:
        path = folder / f"{NAME}_{number}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected {files} files of pseudo-labels in {folder}, found no {path.name}: "
                f"another process did not finish; {advice}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                indices, probabilities = (
                    file.get_tensor("indices"), file.get_tensor("probabilities"),
                )  # fmt: skip
            files, count, run = int(facts["files"]), int(facts["images"]), run or facts["run"]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of pseudo-labels, or damaged: {error}") from error
        if facts["run"] != run:
            raise ValueError(f"{path} is of another run than {first.name}: {advice}")
        if facts["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} is about other images than these: give the data the root, split_seed, "
                f"val_split, subset, classes, labelled_fraction and keep_unlabelled that it had "
                f"under lightning-kd predict."
            )
        if found is None:
            found = torch.zeros(count, probabilities.shape[1])
            covered = torch.zeros(count, dtype=torch.bool)
        if len(indices):
            found[indices] = probabilities
            covered[indices] = True
        number += 1
    assert found is not None
    if not covered.all():
        raise ValueError(
            f"Expected pseudo-labels of all {len(covered)} images in {folder}, got "
            f"{int(covered.sum())}: {advice}"
        )
    return found
