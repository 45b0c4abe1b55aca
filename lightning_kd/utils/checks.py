from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless student and teacher tensors have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected student and teacher {what} of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )


def check_space(space: str) -> None:
    """Raise ``ValueError`` unless ``space`` is one in which answers can be averaged."""
    if space not in ("probability", "logit"):
        raise ValueError(f'Expected space to be "probability" or "logit", got {space!r}.')


def check_positive(value: float, name: str) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above zero."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"Expected {name} > 0 and finite, got {value}.")


def check_one_of(value: Any, allowed: Sequence[str], name: str) -> None:
    """Raise ``ValueError`` unless ``value`` is one of these."""
    if value not in allowed:
        *first, last = [f'"{each}"' for each in allowed]
        listed = f"{', '.join(first)} or {last}"
        raise ValueError(f"Expected {name} {listed}, got {value!r}.")


def check_type(value: Any, kind: type, name: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of this kind, or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"Expected {name} of type {kind.__name__}, got {type(value).__name__}.")
