"""Soft targets that are drawn from a teacher's weights."""

import pytest
import torch
from torch import nn

from lightning_kd.data_free.targets import DirichletTargets, SoftTransferTargets


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_units_of_a_layer_vary_together_as_their_weights_do():
    """Sample covariance against sigma^2 times the cosines of the rows."""
    network, targets = teacher(), SoftTransferTargets("2", sigma=1.5)
    targets.attach(network)
    drawn = targets.sample(200_000, 4, generator())
    torch.testing.assert_close(drawn.sum(1), torch.ones(200_000))
    logs = drawn.log()
    said = logs - logs.mean(1, keepdim=True)  # logits up to a shift
    rows = network[2].weight.detach()
    rows = rows / rows.norm(dim=1, keepdim=True)
    centre = torch.eye(4) - 1 / 4
    wanted = centre @ (1.5**2 * rows @ rows.T) @ centre
    torch.testing.assert_close(said.T.cov(), wanted, rtol=0.03, atol=0.03)


def test_a_hidden_layer_passes_through_the_rest():
    network, targets = teacher(), SoftTransferTargets("0", ["1", "2"], sigma=2.0, mean=0.5)
    targets.attach(network)
    drawn = targets.sample(7, 4, generator(3))
    rows = network[0].weight / network[0].weight.norm(dim=1, keepdim=True)
    hidden = 0.5 + 2.0 * torch.randn(7, 6, generator=generator(3)) @ rows.T
    torch.testing.assert_close(drawn, network[2](hidden.relu()).softmax(1).detach())
    assert not drawn.requires_grad


def test_dirichlet_means_follow_similarities_and_scales_differ():
    """E[y] of one class is its similarities over their sum; a small scale gives peaks."""
    network = teacher()
    rows = network[2].weight.detach()
    rows = rows / rows.norm(dim=1, keepdim=True)
    alike = rows @ rows.T
    alike = (alike - alike.min(1, True).values) / (
        alike.max(1, True).values - alike.min(1, True).values
    )
    means = (alike + 1e-4) / (alike + 1e-4).sum(1, keepdim=True)
    targets = DirichletTargets("2", scales=[1.0])
    targets.attach(network)
    drawn = targets.sample(100_000, 4, generator())
    torch.testing.assert_close(drawn.mean(0), means.mean(0), rtol=0.02, atol=0.005)
    peaked = DirichletTargets("2", scales=[0.1])
    peaked.attach(network)
    assert peaked.sample(5000, 4, generator()).amax(1).mean() > drawn.amax(1).mean() + 0.1
    assert torch.equal(drawn, targets.sample(100_000, 4, generator()))


def test_drawing_leaves_the_global_generator_alone():
    targets = DirichletTargets("2")
    targets.attach(teacher())
    before = torch.get_rng_state()
    targets.sample(5, 4, generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [SoftTransferTargets, DirichletTargets])
def test_layers_that_are_not_linear_are_reported(kind):
    with pytest.raises(ValueError, match="to be linear, got ReLU"):
        kind("1").attach(teacher())


def test_wrong_numbers_are_reported():
    with pytest.raises(ValueError, match="sigma > 0"):
        SoftTransferTargets("2", sigma=0.0)
    with pytest.raises(ValueError, match="scales > 0"):
        DirichletTargets("2", scales=[0.0])
