from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """A network with the input normalisation it was trained with.

    The data modules yield images in [0, 1]; each network normalises for itself, because real
    teachers differ in that.

    Args:
        network: The network.
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel, > 0.

    Raises:
        ValueError: If the lengths differ or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"Expected mean and std of one length, a number per channel, std > 0, got {mean} "
                f"and {std}."
            )
        self.init_args = {"network": network, "mean": mean, "std": std}  # for an export
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1], shape (B, C, H, W), to the network's output."""
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"Expected images of {len(self.mean)} channels (one mean each), got {x.shape[1]}."
            )
        output: Tensor = self.network((x - self.mean) / self.std)
        return output
