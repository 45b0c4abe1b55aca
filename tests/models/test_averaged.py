"""Ensembles and views as one network."""

import pytest
import torch
from torch import nn

from lightning_kd.models import Averaged, Mirror, Plain, Scale, resnet8


def nets(count):
    torch.manual_seed(0)
    return [resnet8(in_channels=1, width=4).eval() for _ in range(count)]


def test_it_is_the_mean_of_probabilities_over_networks_and_views():
    networks, views = nets(2), [Plain(), Scale(1.5), Mirror()]
    x = torch.rand(5, 1, 8, 8)
    expected = torch.stack([n(v(x)).softmax(1) for n in networks for v in views]).mean(0)
    torch.testing.assert_close(Averaged(networks, views)(x).exp(), expected)


def test_one_network_as_it_is_answers_as_ever():
    (network,) = nets(1)
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(Averaged([network])(x), network(x).log_softmax(1))


def test_dense_answers_are_mapped_back():
    network = nn.Conv2d(1, 3, 3, padding=1)
    x = torch.rand(2, 1, 6, 6)
    expected = (network(x).softmax(1) + network(x.flip(-1)).flip(-1).softmax(1)) / 2
    torch.testing.assert_close(Averaged([network], [Plain(), Mirror()])(x).exp(), expected)


@pytest.mark.parametrize("factor", [0.4, 0.75, 1.1, 1.25, 6 / 7])
@pytest.mark.parametrize("size", [7, 8, 28, 30])
def test_scaled_views_come_back_to_the_size_of_the_image(factor, size):
    view = Scale(factor)
    x = torch.rand(2, 3, size, size)
    for stride in (1, 2):
        network = nn.Conv2d(3, 4, 3, stride, 1)
        plain, seen = network(x), network(view(x))
        assert abs(view.back(seen, x.shape[2:]).shape[-1] - plain.shape[-1]) <= (stride > 1)
    assert view.back(seen.mean((2, 3), keepdim=True), x.shape[2:]).shape[2:] == (1, 1)
    assert view.back(view(x), x.shape[2:]).shape == x.shape
    assert view(x.bfloat16()).dtype == torch.bfloat16


def test_wrong_parts_are_reported():
    with pytest.raises(ValueError, match="at least one network"):
        Averaged([])
    with pytest.raises(ValueError, match="at least one view"):
        Averaged(nets(1), [])
    with pytest.raises(TypeError, match="of type View, got ReLU"):
        Averaged(nets(1), [nn.ReLU()])
