"""What the command line says on top of configuration files, where jsonargparse falls short."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_kd.cli.fill import import_path


def config_files(args: Sequence[str]) -> list[Path]:
    """Configuration files named on a command line, in order."""
    files = []
    for position, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            files.append(value if equals else "".join(args[position + 1 : position + 2]))
    return [Path(f) for f in files if Path(f).is_file()]


def expand_indices(args: Sequence[str]) -> list[str]:
    """Turn ``--model.losses.0.temperature 6`` into the whole list, with that one value changed.

    jsonargparse reaches only the last item of a list.

    Raises:
        ValueError: If the files have no such list or item.
    """
    changed: dict[str, Any] = {}
    rest: list[str] = []
    pending = list(args)
    while pending:
        arg = pending.pop(0)
        match = re.match(r"--([\w.]+?)\.(\d+)\.([\w.]+)(?:=(.*))?$", arg, re.S)
        if match is None:
            rest.append(arg)
            continue
        path, index, key, value = match.groups()
        if value is None:
            if not pending:
                raise ValueError(f"Expected a value behind {arg}, got none.")
            value = pending.pop(0)
        if path not in changed:
            changed[path] = _find(config_files(args), path)
        items = changed[path]
        if not isinstance(items, list) or int(index) >= len(items):
            size = len(items) if isinstance(items, list) else "no"
            raise ValueError(
                f"Expected {arg.partition('=')[0]} to name an item of a list in the configuration "
                f"file, but {path} has {size} items there."
            )
        node = items[int(index)]
        *parents, last = key.split(".")
        for parent in parents:
            node = _descend(node, parent)
        _inside(node, last)[last] = yaml.safe_load(value)
    return rest + [f"--{path}={json.dumps(items)}" for path, items in changed.items()]


def _inside(node: Any, key: str) -> Any:
    """The mapping that holds ``key``: a class's options are one level down."""
    if isinstance(node, dict) and "class_path" in node and key not in ("class_path", "init_args"):
        return node.setdefault("init_args", {})
    return node


def _descend(node: Any, key: str) -> Any:
    inside = _inside(node, key)
    if isinstance(inside, list) and key.isdigit() and int(key) < len(inside):
        return inside[int(key)]
    if not isinstance(inside, dict) or key not in inside:
        raise ValueError(f"Expected {key!r} in the configuration file, got {inside}.")
    return inside[key]


def _find(files: Sequence[Path], path: str) -> Any:
    """Value of a dotted path in the last file that has it."""
    for file in reversed(files):
        node = yaml.safe_load(file.read_text())
        try:
            for key in path.split("."):
                node = _descend(node, key)
        except ValueError:
            continue
        return node
    return None


def drop_leaked(config: Any, args: Sequence[str]) -> list[str]:
    """Undo options that an earlier class left in the class which replaced it.

    Where a file says SGD with weight decay and the command line says Adam, jsonargparse hands SGD's
    weight decay to Adam (its issue 460). An option of the new class that nobody gave gets the new
    class's default back.

    Args:
        config: Parsed configuration of one subcommand; changed in place.
        args: The command line.

    Returns:
        Dotted names of the options that were put back.
    """
    spoken = " ".join(args)
    undone = []
    stacked = [yaml.safe_load(file.read_text()) or {} for file in config_files(args)]
    for number, earlier in enumerate(stacked):
        # what later files say themselves is meant as much as what the command line says
        said = spoken + " ".join(json.dumps(later, default=str) for later in stacked[number + 1 :])
        for name, old, new in _pairs(earlier, config, ""):
            kept = old.get("init_args") or {}
            options = new.get("init_args")
            if old["class_path"] == new["class_path"] or not options:
                continue
            if _same_class(old["class_path"], new["class_path"]):
                continue
            defaults = inspect.signature(import_path(new["class_path"])).parameters
            for key in [k for k in kept if k in options and options[k] == kept[k]]:
                default = defaults[key].default if key in defaults else inspect.Parameter.empty
                if default is inspect.Parameter.empty or re.search(rf"\b{key}\b", said):
                    continue
                if options[key] != default:
                    options[key] = default
                    undone.append(f"{name}.{key}")
    return undone


def _same_class(old: str, new: str) -> bool:
    try:
        return import_path(old) is import_path(new)
    except (ImportError, AttributeError, ValueError):
        return False  # a bare name: it was resolved to another spelling, or is another class


def _pairs(old: Any, new: Any, name: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield (dotted name, file's mapping, parsed node) wherever both name a class."""
    if isinstance(old, list) and isinstance(new, list):
        for index, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from _pairs(a, b, f"{name}.{index}")
    if not isinstance(old, dict) or not isinstance(new, Namespace):
        return
    if isinstance(old.get("class_path"), str) and isinstance(new.get("class_path"), str):
        yield name.lstrip("."), old, new
    for key, value in old.items():
        if key in new:
            yield from _pairs(value, new[key], f"{name}.{key}")
