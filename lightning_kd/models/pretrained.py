from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_kd.models.from_json import build_from_json
from lightning_kd.models.normalized import Normalized
from lightning_kd.models.weight_files import StoredTensor, stored_tensors


def pretrained(
    checkpoint: str,
    network: nn.Module | None = None,
    sha256: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    trust: Sequence[str] = (),
) -> nn.Module:
    """Load a network's weights, without running code that the file names.

    Reads safetensors, plain state dicts (bare, or under ``state_dict`` or ``model``; with a prefix
    such as ``module.`` or none), and Lightning checkpoints of this package, whose student is taken.
    Nothing is unpickled, and nothing that does not fit the network is read.

    Args:
        checkpoint: File with the weights.
        network: The network to load into; ``None``: built from the ``.json`` beside the file that
            ``ExportStudent`` writes, which may name networks of ``lightning_kd.models``,
            ``torchvision.models``, ``timm`` and layers of ``torch.nn``.
        sha256: Expected hash of the file, in hexadecimal.
        mean: Input mean of each channel, for images in [0, 1]; ``None``: as in the file's metadata
            or the ``.json``, else none.
        std: Input standard deviation of each channel, likewise.
        trust: More packages whose networks the ``.json`` may name: their code is run.

    Returns:
        The network in eval mode, normalising its input if a mean is known.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, has another hash, needs pickle, holds other keys or
            shapes than the network or values that are not finite, or if the ``.json`` names
            anything but a network.
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
    with stored_tensors(path) as (stored, metadata):
        if network is None:
            network = build_from_json(path.with_suffix(".json"), path, len(stored), trust)
        inner = network.network if isinstance(network, Normalized) else network
        _fill(inner, stored, path)
    mean, std = normalisation(metadata, mean, std)
    if mean is not None and std is not None:
        network = Normalized(inner, mean, std)
    return network.eval()


def normalisation(
    metadata: Mapping[str, str], mean: list[float] | None, std: list[float] | None
) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of the input: those given, or else of a file's metadata.

    Raises:
        ValueError: If only one of them is known.
    """
    mean = mean or _numbers(metadata.get("mean"))
    std = std or _numbers(metadata.get("std"))
    if (mean is None) != (std is None):
        raise ValueError(f"Expected mean and std together, got mean {mean} and std {std}.")
    return mean, std


def _numbers(text: Any) -> list[float] | None:
    """Read ``0.5 0.5 0.5``, ``[0.5, 0.5, 0.5]`` or ``(0.5, 0.5, 0.5)``; None stays None."""
    if text is None:
        return None
    return [float(n) for n in str(text).strip("[]() ").replace(",", " ").split()] or None


def _fill(network: nn.Module, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Load tensors into ``network``, after cutting the prefix that makes the names fit."""
    wanted = network.state_dict()

    def hits(prefix: str) -> int:
        return sum(prefix + key in stored for key in wanted)

    prefixes = {""}
    for key in stored:
        parts = key.split(".")
        prefixes.update(".".join(parts[:n]) + "." for n in range(1, min(len(parts), 6)))
    # the student wins a tie: a checkpoint may hold several copies of a network
    best = max(sorted(prefixes), key=lambda p: (hits(p), p.endswith("student."), -len(p)))
    found = {k.removeprefix(best): v for k, v in stored.items() if k.startswith(best)}
    # old files lack this counter, which only cumulative BatchNorm averages read
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} (file {found[k].shape}, network {tuple(v.shape)})"
        for k, v in wanted.items()
        if k in found and found[k].shape != tuple(v.shape)
    ]
    kinds = [
        k
        for k, v in wanted.items()
        if k in found and found[k].is_floating_point != v.is_floating_point()
    ]
    extra = [k for k in found if k not in wanted] if not missing else []
    if missing or shapes or kinds or extra:
        problems = [
            f"{what}: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
            for what, names in (
                ("missing in the file", missing),
                ("unknown to the network", extra or [k for k in found if k not in wanted]),
                ("of another shape", shapes),
                ("of another kind of number", kinds),
            )
            if names
        ]
        raise ValueError(
            f"{path} does not fit {type(network).__name__}. {'; '.join(problems)}. Check the "
            f"network's class_path and init_args."
        )
    state = {k: found[k].read() for k in wanted if k in found}
    learned = {k for k, _ in network.named_parameters()}
    broken = [k for k, v in state.items() if k in learned and not torch.isfinite(v).all()]
    if broken:
        raise ValueError(
            f"Expected finite weights in {path}, got some that are not: {', '.join(broken[:6])}. "
            f"The training that wrote it had failed, or the file is damaged."
        )
    network.load_state_dict(state, strict=False)
