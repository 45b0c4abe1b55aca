from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Resized(nn.Module):
    """A network that is given its images at the resolution it was trained at.

    Args:
        network: The network.
        size: Height and width to resize images to, bilinearly (antialiased where they shrink).

    Raises:
        ValueError: If ``size`` is not positive.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"Expected size >= 1, got {size}.")
        self.init_args = {"network": network, "size": size}  # for an export
        self.network = network
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of any size to the network's output."""
        if x.shape[-2:] != (self.size, self.size):
            shrinks = x.shape[-2] > self.size or x.shape[-1] > self.size
            x = F.interpolate(
                x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=shrinks
            )
        output: Tensor = self.network(x)
        return output
