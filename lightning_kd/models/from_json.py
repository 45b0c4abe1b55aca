"""Networks that a file describes: built without running code that the file names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_kd.utils.bounded import bounded
from lightning_kd.utils.trust import check_plain, import_network

LONGEST = 2**20


def build_from_json(
    path: Path, weights: Path, tensors: int, trust: Sequence[str] = ()
) -> nn.Module:
    """Build the untrained network that a JSON of ``class_path`` and ``init_args`` describes.

    Args:
        path: The JSON.
        weights: The file whose weights the network is for, which is about as large.
        tensors: How many there are.
        trust: Packages whose classes the JSON may name, besides those of ``import_network``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not describe a network, or one of another size.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected {path} to describe the network of the weights beside it: give `network`."
        )
    spec = _read(path)
    if spec.get("class_path") is None:
        raise ValueError(
            f"{path} does not record how its network was built (it was built in Python): give "
            f"`network`."
        )
    try:
        check_plain(spec, "the file")
        with bounded(weights.stat().st_size, tensors):
            network: nn.Module = _build(spec, trust)
    except Exception as error:  # constructors raise what they like
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{path} does not describe the network of {weights.name}: {reason}"
        ) from error
    return network


def _read(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LONGEST:
        raise ValueError(f"Expected {path} to describe a network, got {size} bytes.")
    try:
        spec = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise ValueError(
            f"Expected {path} to hold an object with class_path and init_args, got "
            f"{type(spec).__name__}."
        )
    return spec


def _build(spec: dict[str, Any], trust: Sequence[str]) -> nn.Module:
    found = import_network(spec["class_path"], trust)
    given = spec.get("init_args") or {}
    if not isinstance(given, dict):
        raise ValueError(f"Expected init_args by name, got {type(given).__name__}.")
    network = _call(found, {name: _value(each, trust) for name, each in given.items()})
    if not isinstance(network, nn.Module):
        raise ValueError(f"Expected a network, got {type(network).__name__}.")
    return network


def _value(value: Any, trust: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_value(each, trust) for each in value]
    if isinstance(value, dict):
        if "class_path" not in value:
            raise ValueError(
                f"Expected numbers, strings, lists and networks as arguments, got a mapping of "
                f"{', '.join(value) or 'nothing'}."
            )
        return _build(value, trust)
    return value


def _call(found: Any, given: dict[str, Any]) -> Any:
    """Call a class or factory, without the weights that it would download or read."""
    if isinstance(found, type):
        return found(**given)
    if found.__module__.startswith("torchvision.") and found.__name__ == "get_model":
        from torchvision.models import get_model_builder

        found = get_model_builder(given.pop("name"))
    hub = ":" in str(given.get("model_name", ""))  # timm: hf-hub:... and local-dir:...
    if hub or given.get("checkpoint_path"):
        raise ValueError(
            "Expected a network without other files, got one of a hub or a checkpoint_path: build "
            "it yourself and give it as network=..."
        )
    accepted = inspect.signature(found).parameters
    for name, without in (("weights", None), ("weights_backbone", None), ("pretrained", False)):
        if name in accepted or name in given:
            given[name] = without
    return found(**given)
