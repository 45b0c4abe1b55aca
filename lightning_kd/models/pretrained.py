from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_kd.models.normalized import Normalized


def pretrained(
    checkpoint: str,
    network: nn.Module | None = None,
    sha256: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> nn.Module:
    """Load a network's weights, never with pickle.

    Reads safetensors, plain state dicts (bare, or under ``state_dict`` or ``model``; with a prefix
    such as ``module.`` or none), and Lightning checkpoints of this package, whose student is taken.

    Args:
        checkpoint: File with the weights.
        network: The network to load into; ``None``: built from the ``.json`` beside the file that
            ``ExportStudent`` writes.
        sha256: Expected hash of the file, in hexadecimal.
        mean: Input mean of each channel, for images in [0, 1]; ``None``: as in the file's metadata
            or the ``.json``, else none.
        std: Input standard deviation of each channel, likewise.

    Returns:
        The network in eval mode, normalising its input if a mean is known.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, has another hash, needs pickle, or holds other keys
            or shapes than the network.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("[!.]*.*") if p.is_file())
        beside = f"; {path.parent} holds {', '.join(near[:8])}" if near else ""
        raise FileNotFoundError(
            f"Expected a checkpoint at {path}, found none{beside}. Train or download it first."
        )
    if sha256 is not None:
        with path.open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(file.read()).hexdigest()
            )  # Python 3.10
        if found != sha256.lower():
            raise ValueError(
                f"Expected sha256 {sha256} of {path}, got {found}: it is another file, or damaged."
            )
    state, metadata = _read(path)
    if network is None:
        network = build_from_json(path.with_suffix(".json"))
    inner = network.network if isinstance(network, Normalized) else network
    _fill(inner, state, path)
    mean = mean or _numbers(metadata.get("mean"))
    std = std or _numbers(metadata.get("std"))
    if (mean is None) != (std is None):
        raise ValueError(f"Expected mean and std together, got mean {mean} and std {std}.")
    if mean is not None and std is not None:
        network = Normalized(inner, mean, std)
    return network.eval()


def build_from_json(path: Path) -> nn.Module:
    """Build the untrained network that a JSON of ``class_path`` and ``init_args`` describes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not describe a network.
    """
    from jsonargparse import ArgumentParser  # only this path needs it

    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {path} to describe the network of the weights beside it: give `network`."
        )
    spec = json.loads(path.read_text())
    if not spec.get("class_path"):
        raise ValueError(
            f"{path} does not record how its network was built (it was built in Python): give "
            f"`network`."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    try:
        given = {"class_path": spec["class_path"], "init_args": spec.get("init_args") or {}}
        config = parser.parse_object({"network": given})
    except Exception as error:
        raise ValueError(f"{path} does not describe a network: {error}") from error
    built: nn.Module = parser.instantiate_classes(config).network
    return built


def _numbers(text: Any) -> list[float] | None:
    """Read ``0.5 0.5 0.5``, ``[0.5, 0.5, 0.5]`` or ``(0.5, 0.5, 0.5)``; None stays None."""
    if text is None:
        return None
    return [float(n) for n in str(text).strip("[]() ").replace(",", " ").split()] or None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name and metadata of a file, without pickle."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} needs pickle to load, which can run any code, or is not a checkpoint. "
            f"Save a plain state dict: torch.save(network.state_dict(), path), or safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = (
        {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, dict)
        else {}
    )
    if not tensors:
        raise ValueError(f"Expected {path} to hold a state dict, got {type(content).__name__}.")
    return tensors, {}


def _fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state`` into ``network``, after cutting the prefix that makes the keys fit."""
    wanted = network.state_dict()

    def hits(prefix: str) -> int:
        return sum(prefix + key in state for key in wanted)

    prefixes = {""}
    for key in state:
        parts = key.split(".")
        prefixes.update(".".join(parts[:n]) + "." for n in range(1, min(len(parts), 6)))
    # the student wins a tie: a checkpoint may hold several copies of a network
    best = max(sorted(prefixes), key=lambda p: (hits(p), p.endswith("student."), -len(p)))
    state = {k.removeprefix(best): v for k, v in state.items() if k.startswith(best)}
    # old files lack this counter, which only cumulative BatchNorm averages read
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} (file {tuple(state[k].shape)}, network {tuple(v.shape)})"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    extra = [k for k in state if k not in wanted] if not missing else []
    if missing or shapes or extra:
        problems = [
            f"{what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
            for what, names in (
                ("missing in the file", missing),
                ("unknown to the network", extra or [k for k in state if k not in wanted]),
                ("of another shape", shapes),
            )
            if names
        ]
        raise ValueError(
            f"{path} does not fit {type(network).__name__}. {'; '.join(problems)}. Check the "
            f"network's class_path and init_args."
        )
    network.load_state_dict(state, strict=False)
