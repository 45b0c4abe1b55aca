from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Allow ``train`` and ``eval`` inside; afterwards every part has its earlier mode."""
    modes = [(part, part.training) for part in network.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def ready_to_train(network: nn.Module) -> nn.Module:
    """Put a network that is wholly in eval mode, as one with loaded weights is, into train mode.

    One that is partly in eval mode (its BatchNorm is frozen, say) is left as its owner made it.
    """
    return network if any(part.training for part in network.modules()) else network.train()


def put_in_eval(network: nn.Module) -> None:
    """Put a network in eval mode; a program of ``torch.export``, which refuses it, has no modes."""
    try:
        network.eval()
    except NotImplementedError:
        for part in network.modules():
            part.training = False


def in_precision_of(network: nn.Module, x: Tensor) -> Tensor:
    """Floating-point images in the precision of a network's parameters."""
    precision = next((p.dtype for p in network.parameters() if p.is_floating_point()), x.dtype)
    return x.to(precision) if x.is_floating_point() else x


Output = TypeVar("Output")


class OutputError(ValueError):
    """A network's output is not what its place needs; the message says what to do."""


def dry_run(name: str, network: nn.Module, call: Callable[[Tensor], Output], x: Tensor) -> Output:
    """Run ``call(x)`` without gradient or autocast, with ``network`` temporarily in eval mode.

    What is sized by its outputs then has the network's own precision, not that of autocast.

    Raises:
        ValueError: If the network cannot take these images, with the likely reason.
    """
    autocasts = torch.is_autocast_enabled(x.device.type)
    try:
        autocast = torch.autocast(x.device.type, enabled=False)
        with modes_kept(network), torch.no_grad(), autocast:
            put_in_eval(network)
            return call(in_precision_of(network, x) if autocasts else x)
    except OutputError:  # already explains what to do
        raise
    except (RuntimeError, ValueError) as error:
        convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        hint = ""
        if convolution is not None and convolution.in_channels != x.shape[1]:
            hint = (
                f" Its first convolution expects {convolution.in_channels} channels, got "
                f"{x.shape[1]}: build it with in_channels={x.shape[1]}, if it has that option, or "
                f"change the data."
            )
        wanted = in_precision_of(network, torch.empty(0, device=x.device)).dtype
        if x.dtype != wanted:
            hint += (
                f" The images are {x.dtype}, the network is {wanted}: convert them in the data, or "
                f"in unpack()" + ("." if x.is_floating_point() else ", to [0, 1].")
            )
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"Expected {name} ({type(network).__name__}) to take images of shape "
            f"{tuple(x.shape[1:])}, got: {first_line}.{hint}"
        ) from error
