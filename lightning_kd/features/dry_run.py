from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput


@contextlib.contextmanager
def modes_kept(network: nn.Module) -> Iterator[None]:
    """Inside, ``train`` and ``eval`` may be called; afterwards every part is as it was before."""
    modes = [(part, part.training) for part in network.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def dry_run(
    who: str, network: nn.Module, call: Callable[[Tensor], NetworkOutput], x: Tensor
) -> NetworkOutput:
    """Run ``call(x)`` without gradient and with ``network`` in eval mode for the moment.

    Raises:
        ValueError: If the network cannot take these images, with the likely reason.
    """
    try:
        with modes_kept(network), torch.no_grad():
            network.eval()
            return call(x)
    except (RuntimeError, ValueError) as error:
        if str(error).startswith("Expected a teacher"):  # it says itself what to do
            raise
        convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        hint = ""
        if convolution is not None and convolution.in_channels != x.shape[1]:
            hint = (
                f" Its first convolution expects {convolution.in_channels} channels, got "
                f"{x.shape[1]}: build it with in_channels={x.shape[1]}, if it has that option, or "
                f"change the data."
            )
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"Expected {who} ({type(network).__name__}) to take images of shape "
            f"{tuple(x.shape[1:])}, got: {first_line}.{hint}"
        ) from error
