from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


def snake_case(part: object) -> str:
    """Name of an object's class as keys in the log are written."""
    return re.sub(
        r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(part).__name__
    ).lower()


def keyed_by_name(parts: Sequence[T]) -> dict[str, T]:
    """Key each part by its class name in snake case; equal names are numbered."""
    named: dict[str, T] = {}
    for part in parts:
        name = str(getattr(part, "name", snake_case(part)))
        count, key = 1, name
        while key in named:
            count += 1
            key = f"{name}_{count}"
        named[key] = part
    return named
