"""Values that change over training. Each wraps a curve of ``functional.curves``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from lightning_kd.functional import curves
from lightning_kd.utils.checks import check_positive


class Schedule(ABC):
    """A number as a function of a count of steps or epochs; holds its end value afterwards.

    Args:
        start: Value at count 0.
        end: Value from count ``duration`` onwards.
        duration: Steps or epochs (see the callback's ``interval``), > 0.
    """

    def __init__(self, start: float, end: float, duration: int) -> None:
        check_positive(duration, "duration")
        self.start, self.end, self.duration = start, end, duration

    def __call__(self, count: int) -> float:
        """Value after ``count`` steps or epochs."""
        return self.curve()(self.start, self.end, min(max(count / self.duration, 0.0), 1.0))

    @abstractmethod
    def curve(self) -> Callable[[float, float, float], float]:
        """Return the function of (start, end, progress in [0, 1])."""


class Linear(Schedule):
    """Straight line from ``start`` to ``end``.

    Args:
        start: Value at count 0.
        end: Value from count ``duration`` onwards.
        duration: Steps or epochs, > 0.
    """

    def curve(self) -> Callable[[float, float, float], float]:
        """Straight line."""
        return curves.linear


class Cosine(Schedule):
    """Half a cosine wave from ``start`` to ``end``, flat at both.

    Args:
        start: Value at count 0.
        end: Value from count ``duration`` onwards.
        duration: Steps or epochs, > 0.
    """

    def curve(self) -> Callable[[float, float, float], float]:
        """Half a cosine wave."""
        return curves.cosine


class Exponential(Schedule):
    """Constant ratio per count from ``start`` to ``end``; both share a sign and are not 0.

    Args:
        start: Value at count 0.
        end: Value from count ``duration`` onwards.
        duration: Steps or epochs, > 0.
    """

    def __init__(self, start: float, end: float, duration: int) -> None:
        if start * end <= 0:
            raise ValueError(
                f"Expected start and end of one sign and not 0 for an exponential schedule, got "
                f"{start} and {end}: use Linear or Cosine to reach 0."
            )
        super().__init__(start, end, duration)

    def curve(self) -> Callable[[float, float, float], float]:
        """Constant ratio."""
        return curves.exponential


class SigmoidRampUp(Schedule):
    """The ramp of Mean Teacher and ONE: exp(-5 (1 - t)^2) of the way from ``start`` to ``end``.

    Args:
        start: Value the ramp starts from (at count 0 it is already 0.7 % of the way).
        end: Value from count ``duration`` onwards.
        duration: Steps or epochs, > 0; the literature uses 80 epochs of 300.
    """

    def curve(self) -> Callable[[float, float, float], float]:
        """Sigmoid-shaped ramp."""
        return curves.sigmoid_ramp_up
