from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class SaveOnSigterm(Callback):
    """Keep a run that a scheduler ends, as it is behind the batch during which SIGTERM came.

    Not so after other exceptions, Ctrl-C among them, which may leave a step half done.
    """

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
        folder = next((Path(folder) for folder in folders if folder), None)
        if folder is None or not isinstance(exception, SIGTERMException):
            return
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        rank_zero_info(f"Ended by SIGTERM. To go on, add --ckpt_path={folder / 'last.ckpt'}")
