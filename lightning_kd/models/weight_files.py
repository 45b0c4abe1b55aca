"""Files of weights, read without pickle and only as far as a network needs them."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_kd.utils.bounded import physical_memory


class StoredTensor(NamedTuple):
    """A tensor in a file: what it is, and how it is read."""

    shape: tuple[int, ...]
    is_floating_point: bool
    read: Callable[[], Tensor]


@contextlib.contextmanager
def stored_tensors(path: Path) -> Iterator[tuple[Mapping[str, StoredTensor], Mapping[str, str]]]:
    """Tensors of a file by name, and its metadata; inside, they can be read.

    Raises:
        ValueError: If the file is damaged, needs pickle, or is larger than this machine's memory.
    """
    size, memory = path.stat().st_size, physical_memory()
    if size > memory:
        raise ValueError(
            f"Expected weights that fit into this machine's memory of {memory} bytes, got {size} "
            f"in {path}."
        )
    if path.suffix != ".safetensors":
        yield _torch_file(path), {}
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            stored = {key: _of_safetensors(file, key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        yield stored, file.metadata() or {}


def _of_safetensors(file: Any, key: str) -> StoredTensor:
    part = file.get_slice(key)
    kind = part.get_dtype()
    return StoredTensor(
        tuple(part.get_shape()), kind.startswith(("F", "BF")), lambda: file.get_tensor(key)
    )


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    try:
        # mapped, so that what does not fit is never read; torch's old format cannot be
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} needs pickle to load, which can run any code, or is not a checkpoint. "
            f"Save a plain state dict: torch.save(network.state_dict(), path), or safetensors."
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is truncated or not a checkpoint: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    found = content.items() if isinstance(content, dict) else ()
    tensors = {k: v for k, v in found if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"Expected {path} to hold a state dict, got {type(content).__name__}.")
    return {
        key: StoredTensor(tuple(value.shape), value.is_floating_point(), lambda value=value: value)  # type: ignore[misc]
        for key, value in tensors.items()
    }
