from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override


class SaveOnSigterm(Callback):
    """Keep a run that a scheduler ends, as it is behind the batch during which SIGTERM came.

    Not during validation, from whose middle a run cannot go on as it was: the last checkpoint
    before stands then. Not after other exceptions, Ctrl-C among them, which may leave a step half
    done. Gradients that were accumulated for a step to come are lost. Of several processes,
    Lightning listens to the first: send the signal to that one.
    """

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
        folder = next((Path(folder) for folder in folders if folder), None)
        training = trainer.training and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if folder is None or not training or not isinstance(exception, SIGTERMException):
            return
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        rank_zero_info(f"Ended by SIGTERM. To go on, add --ckpt_path={folder / 'last.ckpt'}")
