"""Curves from a start to an end value as functions of progress in [0, 1]."""

from __future__ import annotations

import math


def linear(start: float, end: float, progress: float) -> float:
    """Straight line; ``progress`` in [0, 1].

    Example:
        >>> linear(8.0, 2.0, 0.5)
        5.0
    """
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave: flat at both ends.

    Source:
        Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983, equation 5.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential(start: float, end: float, progress: float) -> float:
    """Constant ratio per unit of progress; ``start`` and ``end`` share a sign and are not 0.

    Example:
        >>> exponential(1.0, 16.0, 0.5)
        4.0
    """
    return start * math.pow(end / start, progress)


def sigmoid_ramp_up(start: float, end: float, progress: float) -> float:
    r""":math:`e^{-5 (1 - progress)^2}` of the way from ``start`` to ``end``.

    At progress 0 it is :math:`e^{-5} = 0.0067` of the way, as published, not at 0.

    Source:
        Laine & Aila 2017, https://arxiv.org/abs/1610.02242, section 2.1; used by Mean Teacher, ONE,
        OKDDip and FFL.
    """
    return start + (end - start) * math.exp(-5.0 * (1.0 - progress) ** 2)
