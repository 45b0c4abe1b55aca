import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet18

from lightning_kd.features import Projection, Tap
from lightning_kd.models import Normalized


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 3, 8, 8), (2, 5, 4, 4)),
        ((2, 3, 4, 4), (2, 5, 7, 7)),
        ((2, 3, 7, 5), (2, 3, 7, 5)),
        ((2, 6), (2, 9)),
        ((2, 4, 6), (2, 4, 8)),
    ],
)
def test_projection_reaches_the_teachers_shape(student, teacher):
    out = Projection(torch.Size(student), torch.Size(teacher))(torch.randn(student))
    assert out.shape == teacher


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 3, 4, 4)), ((2, 4, 6), (2, 5, 6))])
def test_shapes_that_cannot_be_mapped_are_reported(student, teacher):
    with pytest.raises(ValueError, match="Expected"):
        Projection(torch.Size(student), torch.Size(teacher))


def test_tap_records_named_layers_of_a_torchvision_network():
    network = resnet18(num_classes=5).eval()
    tap = Tap(network, ["layer1", "layer4.0.conv1"])
    x = torch.randn(2, 3, 32, 32)
    knowledge = tap(x)
    assert torch.equal(knowledge.logits, network(x))
    stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    assert torch.equal(knowledge.features["layer1"], network.layer1(stem))
    assert set(knowledge.features) == {"layer1", "layer4.0.conv1"}
    tap.remove()
    assert not network.layer1._forward_hooks


def test_tap_looks_inside_normalized(tiny):
    network = Normalized(tiny(), [0.5], [0.5])
    assert Tap(network, ["relu"])(torch.rand(2, 1, 8, 8)).features["relu"].shape == (2, 4, 4, 4)


def test_a_layer_that_does_not_exist_lists_near_names(tiny):
    with pytest.raises(ValueError, match=r"got 'lineer'.*Near names: linear"):
        Tap(tiny(), ["lineer"])


def test_a_feature_that_is_changed_in_place_is_reported():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
    with pytest.raises(RuntimeError, match="changed in place"):
        Tap(network, ["0"])(torch.randn(1, 1, 4, 4))


def test_nothing_is_kept_outside_a_call(tiny):
    network = tiny()
    tap = Tap(network, ["relu"])
    x = torch.randn(2, 1, 8, 8)
    for forward in (network, tap):
        forward(x)
        assert not tap._store
        copy.deepcopy(network)(x)  # tensors with a graph cannot be copied
    with pytest.raises(RuntimeError):
        tap(x[..., :5, :5])
    assert not tap._store
    network(x)
    assert not tap._store


def test_a_layer_that_was_replaced_is_hooked_again(tiny):
    network = tiny().eval()
    plain, tap = network.bn, Tap(network, ["bn", "relu"])
    x = torch.randn(2, 1, 8, 8)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert network.bn is not plain
    with pytest.raises(RuntimeError, match="'bn' did not run"):
        tap(x)
    for _ in range(2):
        tap.hook()
        assert not plain._forward_hooks
        assert [len(layer._forward_hooks) for layer in (network.bn, network.relu)] == [1, 1]
        features = tap(x).features
        assert torch.equal(features["bn"], network.bn(network.conv(x)))
        assert torch.equal(features["relu"], features["bn"].relu())


def test_a_layer_that_did_not_run_is_reported(tiny):
    network = tiny()
    network.spare = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="'spare' did not run"):
        Tap(network, ["spare"])(torch.randn(1, 1, 8, 8))


def test_outputs_other_than_tensors():
    class Wraps(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, x):
            return self.output

    logits = torch.randn(1, 3)
    assert Tap(Wraps({"out": logits}))(logits).logits is logits
    with pytest.raises(TypeError, match="return logits"):
        Tap(Wraps([1, 2]))(logits)


def test_a_pass_that_stops_early_gives_the_features_of_a_whole_one():
    """torchvision's blocks run one ReLU twice: the second output is the one that counts."""
    network = torchvision.models.resnet18(num_classes=3).eval()
    tap, x = Tap(network, ["layer1.0.relu", "layer2"]), torch.randn(2, 3, 32, 32)
    ran = []
    network.layer3.register_forward_hook(lambda *_: ran.append(1))
    whole = tap(x)
    early = tap(x, need_logits=False)
    assert len(ran) == 1
    assert early.logits.shape == (2, 0)
    for layer in tap.layers:
        assert torch.equal(whole.features[layer], early.features[layer])
    assert tap(x).logits.shape == (2, 3)
