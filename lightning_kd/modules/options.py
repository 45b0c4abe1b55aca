"""What of a module's arguments is kept in its checkpoints."""

from __future__ import annotations

from typing import Any


def is_plain(value: Any) -> bool:
    """Whether a value loads with ``weights_only``: numbers, strings, None and lists of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)
