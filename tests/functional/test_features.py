import pytest
import torch

from lightning_kd.functional import attention_distance, attention_map, hint_distance
from tests import reference
from tests.functional.test_divergence import assert_same_value_and_gradient


def maps(channels=3, size=4, batch=2):
    return torch.randn(batch, channels, size, size, dtype=torch.float64)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_hint_distance_equals_reference(power, batch):
    assert_same_value_and_gradient(
        lambda s, t: hint_distance(s, t, power).sum(),
        lambda s, t: reference.hint_distance(s, t, power).sum(),
        maps(batch=batch),
        maps(batch=batch),
    )


def test_attention_distance_equals_reference_for_other_widths():
    assert_same_value_and_gradient(
        lambda s, t: attention_distance(s, t).sum(),
        lambda s, t: reference.attention_distance(s, t).sum(),
        maps(3),
        maps(5),
    )


def test_attention_ignores_scale_and_pools_the_larger_map():
    small, large = maps(2, 4), maps(2, 8)
    torch.testing.assert_close(attention_map(small), attention_map(5 * small))
    pooled = torch.nn.functional.adaptive_avg_pool2d(large, 4)
    for a, b in ((small, large), (large, small)):
        torch.testing.assert_close(attention_distance(a, b), attention_distance(small, pooled))


def test_attention_of_a_dead_layer_has_a_finite_gradient():
    dead = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention_distance(dead, torch.randn(1, 2, 3, 3)).sum().backward()
    assert torch.isfinite(dead.grad).all()


def test_wrong_shapes_are_reported():
    with pytest.raises(ValueError, match="one shape"):
        hint_distance(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="power 1 or 2"):
        hint_distance(torch.zeros(1, 2), torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        attention_map(torch.zeros(2, 3))
