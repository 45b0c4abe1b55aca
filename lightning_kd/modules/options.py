"""What of a module's arguments is kept in its checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any


def plain_options(given: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    """Those of some options whose values load with ``weights_only``."""
    options = vars(given) if isinstance(given, Namespace) else given
    return {name: value for name, value in options.items() if is_plain(value)}


def keep_options(saved: dict[str, Any], names: Collection[str]) -> None:
    """Drop saved options of other names: a user's own, which ``__init__`` does not take."""
    for name in set(saved) - set(names):
        del saved[name]


def is_plain(value: Any) -> bool:
    """Whether a value loads with ``weights_only``: numbers, strings, None and lists of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)
