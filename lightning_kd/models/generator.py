from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_kd.utils.checks import check_positive


class ImageGenerator(nn.Module):
    """Noise to images in [0, 1]: a linear layer, then convolutions that double the resolution.

    Args:
        image_shape: (C, H, W) of the images; H and W divisible by ``2 ** doublings``. The command
            line fills it in from the data.
        latent: Length of the noise.
        width: Channels of the last hidden layer; those before have twice as many.
        doublings: How often the resolution doubles; 2 as published for 32 pixels, 4 for 128 and
            224.

    Raises:
        ValueError: If a side is not divisible.

    Source:
        Fang et al. 2022 (Fast-Datafree), https://arxiv.org/abs/2112.06253, appendix.
    """

    def __init__(
        self,
        image_shape: Sequence[int] | None = None,
        latent: int = 256,
        width: int = 64,
        doublings: int = 2,
    ) -> None:
        super().__init__()
        check_positive(width, "width")
        check_positive(latent, "latent")
        if image_shape is None or len(image_shape) != 3:
            raise ValueError(
                f"Expected image_shape as (channels, height, width), got {image_shape}."
            )
        channels, height, columns = image_shape
        step = 2**doublings
        if height % step or columns % step:
            raise ValueError(
                f"Expected image sides divisible by {step}, got {height} x {columns}: set "
                f"doublings lower."
            )
        self.init_args = {
            "image_shape": list(image_shape), "latent": latent, "width": width,
            "doublings": doublings,
        }  # fmt: skip
        self.latent = latent
        self.start = (2 * width, height // step, columns // step)
        self.project = nn.Linear(latent, 2 * width * self.start[1] * self.start[2])
        layers: list[nn.Module] = [nn.BatchNorm2d(2 * width)]
        before = 2 * width
        for index in range(doublings):
            after = width if index == doublings - 1 else 2 * width
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, channels, 3, padding=1))

    def forward(self, noise: Tensor) -> Tensor:
        """Images (B, C, H, W) for noise (B, latent)."""
        features = self.project(noise).view(len(noise), *self.start)
        images: Tensor = self.layers(features).sigmoid()
        return images
