import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from lightning_kd import models
from lightning_kd.models import CifarResNet, Normalized, WideResNet, wide_resnet


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_cifar_resnets_have_the_published_size(name, parameters):
    network = getattr(models, name)()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_subsamples_and_pads_on_both_sides():
    block = CifarResNet(8, width=4).layer2[0]
    x = torch.randn(1, 4, 6, 6)
    right = torch.zeros(1, 8, 3, 3)
    right[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(block.shortcut(x), right)
    assert isinstance(CifarResNet(8, shortcut="projection").layer2[0].shortcut, nn.Sequential)


def test_wide_resnet_has_the_published_size_and_preactivation():
    # Zagoruyko & Komodakis, table 5: WRN-16-2 has 0.7 M, WRN-40-2 2.2 M, WRN-28-10 36.5 M
    sizes = [
        sum(p.numel() for p in WideResNet(d, k).parameters())
        for d, k in ((16, 2), (40, 2), (28, 10))
    ]
    assert [round(s / 1e6, 1) for s in sizes] == [0.7, 2.2, 36.5]
    block = WideResNet(10, 1).block2[0].eval()
    x = torch.randn(1, 16, 8, 8)
    active = F.relu(block.bn1(x))
    right = block.conv2(F.relu(block.bn2(block.conv1(active)))) + block.shortcut(active)
    torch.testing.assert_close(block(x), right)


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_grey_and_colour_images_of_several_sizes(channels):
    for network in (models.resnet8(7, channels, stem_stride=2), wide_resnet(10, 1, 7, channels)):
        for size in (8, 28, 33):
            assert network.eval()(torch.randn(2, channels, size, size)).shape == (2, 7)


def test_bad_depths_are_reported():
    with pytest.raises(ValueError, match=r"6 n \+ 2"):
        CifarResNet(9)
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        WideResNet(9)
    with pytest.raises(ValueError, match="pad"):
        CifarResNet(8, shortcut="a")


def test_normalized_is_the_transform_of_torchvision(tiny):
    network, x = tiny().eval(), torch.rand(3, 1, 8, 8)
    right = network(torchvision.transforms.v2.Normalize([0.3], [0.2])(x))
    torch.testing.assert_close(Normalized(network, [0.3], [0.2])(x), right)
    with pytest.raises(ValueError, match="1 channels"):
        Normalized(network, [0.3], [0.2])(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="std > 0"):
        Normalized(network, [0.3], [0.0])
