from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_kd.atomic_files import ABSENT, UNREADABLE, unreadable, written_atomically
from lightning_kd.utils.bounded import bounded_by_memory
from lightning_kd.utils.trust import check_options


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
            # Lightning's own default unpickles what comes from a URL
            return super().load_checkpoint(path, map_location, weights_only is not False)
        except ABSENT:
            raise
        except UNREADABLE as error:
            raise ValueError(unreadable(Path(path), error)) from error


def load_checked(
    load: Callable[..., Any], path: Any, *arguments: Any, trust: Sequence[str], **options: Any
) -> Any:
    """Load a checkpoint after a look at what it names, before any of that is imported or built.

    Args:
        load: Lightning's ``load_from_checkpoint``.
        path: The file, an open one, or a URL, which is read once, into memory.
        arguments: Of ``load``.
        trust: More packages that it may name; see ``check_options``.
        options: Of ``load``; those of the module are given in place of the file's own.

    Raises:
        ValueError: If it is damaged, needs pickle, or names code that is not trusted.
    """
    if "://" in str(path):
        with fsspec.open(str(path), "rb") as remote:
            path = io.BytesIO(remote.read())
    own = {k: v for k, v in read_options(path).items() if k not in options}
    check_options(own, trust)
    options["weights_only"] = True
    with bounded_by_memory() as exceeded:
        try:
            return load(path, *arguments, **options)
        except ValueError as error:
            if exceeded:
                raise ValueError(
                    f"Expected options that fit the weights in {path}, but of the network that "
                    f"they name {exceeded[0]}."
                ) from error
            raise


def read_options(path: Any) -> dict[str, Any]:
    """The ``hyper_parameters`` of a checkpoint, a path or an open file, without pickle.

    Raises:
        ValueError: If it is damaged or needs pickle.
    """
    is_path = isinstance(path, (str, Path))
    place = 0 if is_path else path.tell()
    mapped = is_path and zipfile.is_zipfile(path)  # so that weights are not read
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ABSENT:
        raise
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        if is_path:
            raise ValueError(unreadable(Path(path), error)) from error
        raise ValueError(f"The checkpoint is damaged, or needs pickle: {error}") from error
    if not is_path:
        path.seek(place)
    options = content.get("hyper_parameters", {}) if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"Expected a Lightning checkpoint, got {type(content).__name__}.")
    return options


def last_checkpoint(trainer: Trainer) -> str:
    """A sentence that names the newest checkpoint of this run; empty where there is none."""
    names = ("last_model_path", "best_model_path")
    paths = [getattr(saver, name, "") for saver in trainer.checkpoint_callbacks for name in names]
    files = sorted((path.stat().st_mtime, path) for p in paths if (path := Path(p)).is_file())
    return f" The newest checkpoint is {files[-1][1]}." if files else ""
