from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.functional import channel_statistics


class InputStatistics:
    """Measures the inputs of a network's BatchNorm layers, inside its context managers only.

    Args:
        network: Any network; layers without running statistics are left out.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [
            m
            for m in network.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> InputStatistics:
        """Share the layers, as copies of a frozen teacher do."""
        return self

    @contextlib.contextmanager
    def measured(self) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        """Inside, one forward pass fills the list with each layer's statistics, new and running.

        Mean and (biased) variance of its input over all but the channels, in float32 at least, and
        its running mean and variance, each (C,).
        """
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = channel_statistics(inputs[0])
            found.append((mean, variance, layer.running_mean, layer.running_var))

        with self._noting(note):
            yield found

    @contextlib.contextmanager
    def described(self) -> Iterator[list[Tensor]]:
        """Inside, one forward pass fills the list with each layer's input, image by image.

        Means over all but samples and channels, in float32 at least, each (B, C).
        """
        found: list[Tensor] = []

        def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            values: Tensor = inputs[0]
            wide = values if values.dtype == torch.float64 else values.float()
            found.append(wide.flatten(2).mean(2) if wide.dim() > 2 else wide)

        with self._noting(note):
            yield found

    @contextlib.contextmanager
    def _noting(self, note: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
        handles = [layer.register_forward_pre_hook(note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
