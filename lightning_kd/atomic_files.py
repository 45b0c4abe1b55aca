"""Files that are never half-written, and messages about those that are."""

from __future__ import annotations

import contextlib
import glob
import os
import pickle
import platform
import re
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

#: what torch raises if a checkpoint is damaged
UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, KeyError, OSError)
#: of this machine, in names of files
HOST = re.sub(r"\W", "_", platform.node()) or "host"
ABSENT = (FileNotFoundError, PermissionError, IsADirectoryError)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Inside, write a temporary file; it is then flushed to disk and renamed, or removed.

    Raises:
        OSError: If it cannot be written; an earlier file of that name stays.
    """
    # of this writer alone: two that share a name would mix what they write
    aside = path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(path)
        aside.unlink(missing_ok=True)  # of a killed process that had the same number
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"Cannot write {path}: {reason}. An earlier file there is as it was. Free space, or "
            f"choose another folder (--trainer.default_root_dir)."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _remove_left_behind(path: Path) -> None:
    """Remove partial files of that name that killed processes of this machine have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{HOST}-*.partial"):
        owner = left.name.rpartition("-")[0].rpartition("-")[2]
        if owner.isdigit() and not _is_alive(int(owner)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never half-written; see ``written_atomically``."""
    with written_atomically(path) as file:
        file.write(content)


def refuse_unwritable(folder: Path) -> None:
    """Make a folder, and raise ``OSError`` if nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"Cannot write into {folder}: {error.strerror}. Choose another folder "
            f"(--trainer.default_root_dir)."
        ) from error


def unreadable(path: Path, error: BaseException) -> str:
    """Why a checkpoint cannot be read, and which ones beside it can."""
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        why = "needs pickle to load, which can run any code; this package never writes such files"
    else:
        why = "is damaged or not a checkpoint"
    others = sorted(
        (p for p in path.parent.glob("*.ckpt") if p != path), key=lambda p: -p.stat().st_mtime
    )
    intact = next((p for p in others if _reads(p)), None)
    offer = f"{intact} can be read." if intact else "No other checkpoint beside it can be read."
    detail = str(error).partition("\n")[0] or "it is empty"
    return f"{path} {why} ({detail}). {offer}"


def _reads(path: Path) -> bool:
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except UNREADABLE:
        return False
    return True
