from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_kd.atomic_files import ABSENT, UNREADABLE, unreadable, written_atomically


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own, but checkpoints are never half-written, and damaged ones are reported.

    Lightning writes into the folder of temporary files, without flushing it to disk, and moves
    the file from there, which copies it where that is another disk. The command line installs it;
    in Python give ``Trainer(plugins=[DurableCheckpointIO()])``.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with written_atomically(Path(path)) as file:
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except ABSENT:
            raise
        except UNREADABLE as error:
            raise ValueError(unreadable(Path(path), error)) from error


def last_checkpoint(trainer: Trainer) -> str:
    """A sentence that names the newest checkpoint of this run; empty where there is none."""
    names = ("last_model_path", "best_model_path")
    paths = [getattr(saver, name, "") for saver in trainer.checkpoint_callbacks for name in names]
    files = sorted((path.stat().st_mtime, path) for p in paths if (path := Path(p)).is_file())
    return f" The newest checkpoint is {files[-1][1]}." if files else ""
