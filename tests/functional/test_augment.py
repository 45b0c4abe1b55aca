"""Crops and flips: each image its own, against slices by hand; gradients come back."""

import pytest
import torch
import torch.nn.functional as F

from lightning_kd.functional import crop_and_flip, resized_crop


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("flip", [True, False])
def test_crops_are_slices_of_padded_images(padding, flip):
    images, draws = torch.randn(9, 2, 6, 5), torch.rand(9, 3)
    found = crop_and_flip(images, draws, padding, flip)
    for image, draw, mine in zip(images, draws, found, strict=True):
        wide = F.pad(image, (padding,) * 4)
        row, column = (int(d * (2 * padding + 1)) for d in draw[:2])
        slow = wide[:, row : row + 6, column : column + 5]
        assert torch.equal(mine, slow.flip(2) if flip and draw[2] < 0.5 else slow)


def test_crops_hand_gradients_back():
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: crop_and_flip(x, DRAWS[:, :3], 1, True), images)
    assert torch.autograd.gradcheck(lambda x: resized_crop(x, DRAWS, 0.3), images)


DRAWS = torch.tensor(
    [[0.2, 0.7, 0.1, 0.8, 0.3], [0.6, 0.5, 0.9, 0.4, 0.7], [0.9, 0.1, 0.5, 0.5, 0]]
)


def test_a_crop_of_everything_is_the_image_or_its_mirror():
    images = torch.rand(2, 3, 5, 7)
    draws = torch.tensor([[1.0, 0.5, 0.3, 0.3, 0.9], [1.0, 0.5, 0.3, 0.3, 0.1]])
    found = resized_crop(images, draws, 0.25)
    torch.testing.assert_close(found[0], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], images[1].flip(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("column", [0.0, 0.5, 1.0])
def test_a_crop_of_a_quarter_is_that_quarter_enlarged(row, column):
    """Rows and columns of a ramp: the crop's mean is the middle of the area it came from."""
    size = 16
    ramp = (torch.arange(size) + 0.5) / size
    images = torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size)])[None]
    draws = torch.tensor([[0.0, 0.5, row, column, 0.9]])
    down, across = resized_crop(images, draws, 0.25)[0].mean((1, 2)).tolist()
    assert down == pytest.approx(0.25 + 0.5 * row, abs=0.01)
    assert across == pytest.approx(0.25 + 0.5 * column, abs=0.01)


def test_crops_have_areas_and_shapes_as_asked():
    """On ramps the range of a crop tells its height and width."""
    size, count = 64, 400
    ramp = (torch.arange(size) + 0.5) / size
    images = torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size)])
    found = resized_crop(images.expand(count, -1, -1, -1), torch.rand(count, 5), 0.25)
    step = (found[:, :, -1, -1] - found[:, :, 0, 0]).abs() * size / (size - 1)
    height, width = step.unbind(1)
    area, aspect = height * width, width / height
    assert float(area.min()) > 0.23
    assert float(area.max()) > 0.9
    assert float(area.mean()) == pytest.approx(0.6, abs=0.05)
    assert float(aspect.min()) > 0.74
    assert float(aspect.max()) < 1.35
    assert float((height - width).abs().max()) > 0.1
