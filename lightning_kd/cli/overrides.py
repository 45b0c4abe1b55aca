"""Options of the command line that override files, where jsonargparse falls short."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_kd.cli.fill import import_path, parameters_of


def config_files(args: Sequence[str]) -> list[Path]:
    """Configuration files named on a command line, in order."""
    files = []
    for position, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in ("-c", "--config"):
            files.append(value if equals else "".join(args[position + 1 : position + 2]))
    return [Path(f) for f in files if Path(f).is_file()]


def drop_leaked(config: Any, args: Sequence[str]) -> list[str]:
    """Undo options that leaked from a class into the class that replaced it.

    If a file names SGD with weight decay and the command line names Adam, jsonargparse passes SGD's
    weight decay to Adam (its issue 460). An option of the new class that was not given is reset to
    the new class's default.

    Args:
        config: Parsed configuration of one subcommand; changed in place.
        args: The command line.

    Returns:
        Dotted names of the options that were reset.
    """
    command_line = " ".join(args)
    undone = []
    stacked = [yaml.safe_load(file.read_text()) or {} for file in config_files(args)]
    for number, earlier in enumerate(stacked):
        # options in later files count as given, as much as those of the command line
        later = " ".join(json.dumps(file, default=str) for file in stacked[number + 1 :])
        given = command_line + later
        for name, old, new in _pairs(earlier, config, ""):
            kept = old.get("init_args") or {}
            options = new.get("init_args")
            if old["class_path"] == new["class_path"] or not options:
                continue
            if _same_class(old["class_path"], new["class_path"]):
                continue
            defaults = parameters_of(import_path(new["class_path"]))
            for key in [k for k in kept if k in options and options[k] == kept[k]]:
                default = defaults[key].default if key in defaults else inspect.Parameter.empty
                if default is inspect.Parameter.empty or re.search(rf"\b{key}\b", given):
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
    if not isinstance(old, dict) or not isinstance(new, (dict, Namespace)):
        return
    if isinstance(old.get("class_path"), str) and isinstance(new.get("class_path"), str):
        yield name.lstrip("."), old, new
    for key, value in old.items():
        if key in new:
            yield from _pairs(value, new[key], f"{name}.{key}")
