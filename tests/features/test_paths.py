"""Paths through a network: equal to running each alone, nothing twice, nothing left behind."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from lightning_kd.features.paths import Paths
from lightning_kd.models import resnet14, wide_resnet

NETWORKS = {
    "resnet": lambda: resnet14(in_channels=1, width=4),
    "wide_resnet": lambda: wide_resnet(16, 1, in_channels=1),
    "torchvision": lambda: torchvision.models.resnet18(),
}


def slow(network, names, kept, survival, x):
    """One path: each block by hand, in a copy of the network."""
    network = copy.deepcopy(network)
    for name, takes, p in zip(names, kept, survival, strict=True):
        block = network.get_submodule(name)

        def forward(y, run=block.forward, takes=takes, p=p):
            return y + (run(y) - y) / p if takes else y

        block.forward = forward
    return network(x)


@pytest.fixture(params=NETWORKS)
def case(request):
    network = NETWORKS[request.param]().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    channels = 3 if request.param == "torchvision" else 1
    x = torch.randn(3, channels, 16, 16, dtype=torch.float64)
    return network, Paths(network, None, x[:1]), x


@pytest.mark.parametrize("count", [1, 2, 5])
def test_paths_equal_running_each_alone(case, count):
    network, paths, x = case
    assert len(paths) > 2
    survival = [1 - 0.1 * k for k in range(len(paths))]
    kept = (torch.rand(count, len(paths)) < 0.6).tolist()
    with torch.no_grad():
        with paths.taken(kept, survival) as branches:
            found = branches.of(network(x))
        for path, mine in zip(kept, found, strict=True):
            torch.testing.assert_close(mine, slow(network, paths.names, path, survival, x))


def test_gradients_of_one_path_equal_those_by_hand(case):
    network, paths, x = case
    kept, survival = [k % 2 == 0 for k in range(len(paths))], [0.8] * len(paths)
    copied = copy.deepcopy(network)
    with paths.taken([kept], survival):
        network(x).square().sum().backward()
    for name, takes, p in zip(paths.names, kept, survival, strict=True):
        block = copied.get_submodule(name)
        block.forward = lambda y, run=block.forward, takes=takes, p=p: (
            y + (run(y) - y) / p if takes else y
        )
    copied(x).square().sum().backward()
    for mine, theirs in zip(network.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad if mine.grad is not None else torch.zeros_like(mine),
            theirs.grad if theirs.grad is not None else torch.zeros_like(theirs),
        )


def test_all_blocks_of_all_paths_are_the_network_itself(case):
    network, paths, x = case
    with torch.no_grad():
        plain = network(x)
        with paths.taken([[True] * len(paths)] * 4, [1.0] * len(paths)) as branches:
            found = network(x)
    assert torch.equal(found, plain)  # of one batch: the paths never part
    assert all(torch.equal(rows, plain) for rows in branches.of(found))


def test_what_paths_have_in_common_runs_once(case):
    """Rows that each block was given: those of different pasts, times the batch."""
    network, paths, x = case
    rows = []
    last = len(paths) - 1
    kept = [[True] * last + [True], [True] * last + [False], [False] + [True] * last]
    for name in paths.names:
        part = next(m for m in network.get_submodule(name).modules() if isinstance(m, nn.Conv2d))
        part.register_forward_hook(lambda m, i, o, name=name: rows.append((name, len(o))))
    with torch.no_grad(), paths.taken(kept, [1.0] * len(paths)):
        network(x)
    wanted = [1] + [2] * (last - 1) + [2]
    assert rows == [(name, 3 * k) for name, k in zip(paths.names, wanted, strict=True)]


def test_nothing_is_left_behind_even_after_a_failure(case):
    network, paths, x = case
    with (
        pytest.raises((RuntimeError, ValueError)),
        paths.taken([[False] * len(paths)], [1.0] * len(paths)),
    ):
        network(x[:, :, 0])
    assert not any("forward" in vars(module) for module in network.modules())


def test_finding_blocks_leaves_the_network_as_it_was():
    network = resnet14(in_channels=1, width=4)
    network.layer2[0].eval()
    before, modes = copy.deepcopy(network.state_dict()), [m.training for m in network.modules()]
    paths = Paths(network, None, torch.randn(1, 1, 8, 8))
    assert paths.names == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks for m in network.modules())


def test_named_blocks_come_in_the_order_in_which_they_run():
    paths = Paths(resnet14(), ["layer3.1", "layer1.0"], torch.randn(1, 3, 8, 8))
    assert paths.names == ["layer1.0", "layer3.1"]


@pytest.mark.parametrize(
    ("network", "blocks", "message"),
    [
        (resnet14, ["layer2.0"], "keep the shape of their input, got 'layer2.0'"),
        (resnet14, ["layer9"], "name of a layer of CifarResNet, got 'layer9'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()), None, "name them in `blocks`"),
    ],
)
def test_wrong_blocks_are_reported(network, blocks, message):
    with pytest.raises(ValueError, match=message):
        Paths(network(), blocks, torch.randn(1, 3, 8, 8))


def test_an_idle_block_in_training_has_a_gradient_of_zero():
    """DDP expects one of every parameter."""
    network = resnet14(in_channels=1, width=4)
    paths = Paths(network, None, torch.randn(1, 1, 8, 8))
    with paths.taken([[False] * len(paths)], [0.5] * len(paths)):
        network(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert not any(p.grad.any() for p in network.layer1[0].parameters())
