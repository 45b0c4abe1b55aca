from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer, folder: str | None = None) -> Path:
    """Where a run's results lie: the given folder, else the Trainer's ``default_root_dir``.

    Where no ``default_root_dir`` was set (it is then the working directory), the logger's versioned
    folder. Ask on every rank: the logger's folder is told by rank 0 to the others.
    """
    if folder is not None:
        return Path(folder)
    root = Path(trainer.default_root_dir)
    if root.resolve() == Path.cwd() and trainer.log_dir:
        return Path(trainer.log_dir)
    return root


def refuse_to_overwrite(trainer: Trainer, path: Path, overwrite: bool) -> None:
    """Raise ``FileExistsError`` before a second run replaces the results of a first.

    A resumed run goes on in its folder, and a ``fast_dev_run`` writes nothing.
    """
    resumed = trainer.state.fn == "fit" and getattr(trainer, "ckpt_path", None) is not None
    # rank 0 looks and tells the others: a slower rank would find what rank 0 has just written
    exists = trainer.strategy.broadcast(path.exists())
    if exists and not (overwrite or resumed or trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise FileExistsError(
            f"{path} holds the results of an earlier run: choose another folder "
            f"(--trainer.default_root_dir), go on with that run (--ckpt_path), or replace it "
            f"(--overwrite true; in Python, overwrite=True)."
        )
