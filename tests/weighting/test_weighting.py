import pytest
import torch

from lightning_kd.outputs import NetworkOutput
from lightning_kd.weighting import Fixed, Uniform


def knowledge(n):
    return [NetworkOutput(torch.randn(4, 3)) for _ in range(n)]


@pytest.mark.parametrize("n", [1, 3])
def test_uniform_weights_sum_to_one(n):
    weights = Uniform()(None, knowledge(n), None)
    torch.testing.assert_close(weights, torch.full((n,), 1 / n))


def test_fixed_weights_are_scaled_and_skip_teachers_of_weight_zero():
    weighting = Fixed([3.0, 0.0, 1.0])
    assert list(weighting.active(3)) == [0, 2]
    torch.testing.assert_close(weighting(None, knowledge(2), None), torch.tensor([0.75, 0.25]))


def test_a_teacher_of_weight_zero_is_not_run(make_module):
    module = make_module(weighting=Fixed([1.0, 0.0]))
    module._build(torch.zeros(1, 1, 8, 8))
    calls = []
    for index, teacher in enumerate(module.teachers):
        teacher.network.register_forward_hook(lambda *_, index=index: calls.append(index))
    module.compute_losses(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))
    assert calls == [0]


@pytest.mark.parametrize("weights", [[], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_bad_weights_are_reported(weights):
    with pytest.raises(ValueError, match="Expected weights >= 0"):
        Fixed(weights)


def test_wrong_number_of_weights_is_told_before_training(make_module):
    with pytest.raises(ValueError, match="one weight for each of 2 teachers, got 3"):
        make_module(weighting=Fixed([1, 1, 1]))._build(torch.zeros(1, 1, 8, 8))


def test_unknown_space_is_reported():
    with pytest.raises(ValueError, match='"probability" or "logit"'):
        Uniform(space="median")
