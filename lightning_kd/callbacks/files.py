from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer, folder: str | None = None) -> Path:
    """Where a run's results go: the given folder, else the Trainer's ``default_root_dir``.

    If no ``default_root_dir`` was set (it is then the working directory), the logger's versioned
    folder. Call it on every rank: rank 0 broadcasts the logger's folder.
    """
    if folder is not None:
        return Path(folder)
    root = Path(trainer.default_root_dir)
    if root.resolve() == Path.cwd() and trainer.log_dir:
        return Path(trainer.log_dir)
    return root


def refuse_to_overwrite(trainer: Trainer, path: Path, overwrite: bool) -> None:
    """Raise ``FileExistsError`` before a second run replaces the results of a first.

    A resumed run continues in its folder, and a ``fast_dev_run`` writes nothing.
    """
    resumed = trainer.state.fn == "fit" and getattr(trainer, "ckpt_path", None) is not None
    # only rank 0 checks: a slower rank would find what rank 0 has just written
    exists = trainer.strategy.broadcast(path.exists())
    if exists and not (overwrite or resumed or trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise FileExistsError(
            f"{path} holds the results of an earlier run: choose another folder "
            f"(--trainer.default_root_dir), resume that run (--ckpt_path), or replace it "
            f"(--overwrite true; in Python, overwrite=True)."
        )
