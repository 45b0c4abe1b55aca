"""jsonargparse's messages, of up to 75 lines, as a sentence that names the key and what is near."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from typing import Any

from lightning_kd.cli.fill import import_path, parameters_of

ROOMS = ("callbacks", "data", "data_free", "exchange", "losses", "models", "modules", "weighting")
#: lines that only say where a message comes from
NOISE = re.compile(
    r"(Parser key|Problem with given class_path|Does not validate|Subtypes:|Errors:|Given value|"
    r"Expected a path but|Expected a <class '(NoneType|dict|list)'>|Expected a List|$)"
)


def short_message(message: str, options: Iterable[str] = ()) -> str:
    """One sentence out of a message of jsonargparse.

    Args:
        message: The message.
        options: Names of the options that exist, for those that do not.
    """
    key, kinds = _key(message), re.findall(r"class_path '([^']+)'", message)
    where = f"{key}: " if key else ""
    if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", message):
        name = found[1].partition("=")[0].lstrip("-")
        return f"There is no option --{name}.{_near(name, options)}"
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        return (
            f"{where}{kinds[-1]} has no option {found[1]!r}.{_near(found[1], _options(kinds[-1]))}"
        )
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        return f"{where}There is no {found[1]}.{found[2]}.{_near(found[2], _names(found[1]))}"
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        if not found[1].replace(".", "").isidentifier():
            return f"{where}Expected a class by its dotted path, got {found[1]}: is the name right?"
        every = [name for room in ROOMS for name in _names(f"lightning_kd.{room}")]
        return f"{where}There is no class {found[1]!r}.{_near(found[1], every)}"
    if found := re.search(r"but (\S+) is abstract", message):
        kind = found[1].rpartition(".")[2]
        return f"{where}No class_path says which {kind} this is: its name is new, or misspelt."
    lines = [line.strip().lstrip("- ") for line in message.splitlines()]
    said = [line for line in lines if not NOISE.match(line)]
    said = said or [re.sub(r"^Parser key \"[^\"]+\": *", "", line) for line in lines if line]
    given = re.search(r"Given value: (.*)", message)
    value = f" Got {_value(given[1])}." if given else ""
    reasons = "; ".join(dict.fromkeys(_readable(line).rstrip(".") for line in said[:3]))
    return f"{where}{reasons or _readable(lines[-1])}.{value}"


def _key(message: str) -> str:
    """Dotted name of the innermost key that a message is about."""
    parts: list[str] = []
    nested = re.findall(r"NestedArg\(key='([^']+)'", message)[:1]
    for found in [*re.findall(r"(?:Parser key|Key) \"([^\"]+)\"", message), *nested]:
        own = found.rstrip("+").split(".")
        # an inner key may repeat the end of the outer one
        same = next((n for n in range(len(own), 0, -1) if parts[-n:] == own[:n]), 0)
        parts += own[same:]
    return ".".join(parts)


def _value(text: str) -> str:
    nested = re.match(r"NestedArg\(key='[^']+', val=(.*)\)$", text)
    shown = nested[1] if nested else text
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def _readable(line: str) -> str:
    """Without the repr of types."""
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line).replace("Expected a ", "Expected ")


def _near(name: str, names: Iterable[str]) -> str:
    """A question that offers the nearest names."""
    known = sorted(set(names))
    lower = {each.lower(): each for each in known}
    last = name.rpartition(".")[2].lower()
    close = difflib.get_close_matches(name.lower(), lower, 3, 0.6)
    close = close or difflib.get_close_matches(last, lower, 3, 0.6)
    if close:
        return f" Did you mean {' or '.join(lower[each] for each in close)}?"
    return f" There are {', '.join(known[:12])}." if 0 < len(known) <= 30 else ""


def _options(class_path: str) -> list[str]:
    try:
        found = parameters_of(import_path(class_path))
    except (ImportError, AttributeError, ValueError):
        return []
    return [name for name in found if name not in ("self", "options", "args", "kwargs")]


def _names(module: str) -> list[str]:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return []
    return list(getattr(found, "__all__", [n for n in dir(found) if not n.startswith("_")]))
