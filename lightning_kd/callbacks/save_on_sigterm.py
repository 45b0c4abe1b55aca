from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_kd.modules.checkpoint_io import last_checkpoint


class SaveOnSigterm(Callback):
    """Save ``last.ckpt`` when a scheduler ends a run (SIGTERM), as of the end of that batch.

    The command line adds it to every run; in Python give ``Trainer(callbacks=[SaveOnSigterm()])``.

    Not during validation, in the middle of which a run cannot be resumed exactly: the last
    checkpoint then stands. Not after other exceptions, Ctrl-C among them, which may leave a step
    half done. Gradients accumulated for the next step are lost. Of several processes, Lightning
    listens to the first: send the signal to that one.
    """

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt):
            rank_zero_info(f"Interrupted.{_stands(trainer)}")
        if not isinstance(exception, SIGTERMException):
            return
        folders = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
        folder = next((Path(folder) for folder in folders if folder), None)
        training = trainer.training and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if folder is None or not training:
            rank_zero_info(f"Ended by SIGTERM outside of training.{_stands(trainer)}")
            return
        trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)
        rank_zero_info(f"Ended by SIGTERM. To resume, add --ckpt_path={folder / 'last.ckpt'}")


def _stands(trainer: Trainer) -> str:
    found = last_checkpoint(trainer)
    return f"{found} To resume, add it as --ckpt_path." if found else " There is no checkpoint yet."
