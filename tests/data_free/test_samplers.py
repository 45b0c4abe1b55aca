import math

import pytest
import torch

from lightning_kd.data_free.replay import Prioritized, Uniform
from tests import reference


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(indices, probabilities):
    """Of the counts of indices; its mean is N - 1 and its variance 2 (N - 1) if all is well."""
    counts = [0] * len(probabilities)
    for index in indices.tolist():
        counts[index] += 1
    total = len(indices)
    return sum(
        (count - total * p) ** 2 / (total * p)
        for count, p in zip(counts, probabilities, strict=True)
    )


def assert_drawn_with(indices, probabilities):
    freedom = len(probabilities) - 1
    assert chi_square(indices, probabilities) < freedom + 5 * math.sqrt(2 * freedom)


# ---------------------------------------------------------------------- uniform


def test_uniform_draws_all_alike_whatever_the_priorities():
    priorities = torch.tensor([1e-6, 1.0, 1e6, 0.0, 3.0, 2.0, 5.0])
    indices, weights = Uniform()(priorities, 100_000, draws())
    assert_drawn_with(indices, [1 / 7] * 7)
    assert torch.equal(weights, torch.ones(100_000))
    assert not Uniform.prioritizes


# ---------------------------------------------------------------------- prioritized


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(alpha):
    priorities = torch.rand(40) + 0.05
    sampler = Prioritized(alpha, 0.3)
    indices, _ = sampler(priorities, 100_000, draws(3))
    wanted = reference.priority_probabilities(priorities.tolist(), alpha, 1e-6)
    assert indices.shape == (100_000,)
    assert_drawn_with(indices, wanted)


def test_the_chi_square_sees_wrong_draws():
    indices = torch.randint(40, (100_000,), generator=draws())
    wrong = [0.03] * 20 + [0.02] * 20
    assert chi_square(indices, wrong) > 39 + 5 * math.sqrt(78)


def test_no_alpha_is_uniform_with_weights_of_one():
    priorities = torch.tensor([0.0, 1.0, 1e6, 4.0])
    indices, weights = Prioritized(0.0, 0.9, normalize="none")(priorities, 100_000, draws())
    assert_drawn_with(indices, [0.25] * 4)
    torch.testing.assert_close(weights, torch.ones(100_000))


@pytest.mark.parametrize("normalize", ["mean", "max", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
def test_weights_belong_to_the_drawn(beta, normalize):
    priorities = (torch.rand(30) * 4).double()
    indices, weights = Prioritized(0.8, beta, 1e-3, normalize)(priorities, 64, draws())
    chances = reference.priority_probabilities(priorities.tolist(), 0.8, 1e-3)
    slow = reference.importance_weights([chances[i] for i in indices.tolist()], 30, beta)
    scale = {"mean": sum(slow) / 64, "max": max(slow), "none": 1.0}[normalize]
    torch.testing.assert_close(weights, torch.tensor([w / scale for w in slow]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_have_the_type_of_priorities(dtype):
    indices, weights = Prioritized()(torch.rand(5).to(dtype), 7, draws())
    assert weights.dtype == dtype
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("count", [1, 2, 3, 6, 10, 49, 1000])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_index_is_beyond_the_last(monkeypatch, count, alpha):
    """The last sum may be below 1 by rounding, and a draw may lie between."""
    highest = 1 - 2.0**-53
    monkeypatch.setattr(
        torch, "rand", lambda n, dtype=None, **_: torch.full((n,), highest, dtype=dtype)
    )
    indices, weights = Prioritized(alpha, 0.4)(torch.ones(count), 4, draws())
    assert indices.tolist() == [count - 1] * 4
    assert torch.isfinite(weights).all()


def test_that_rounding_does_happen():
    assert float(torch.full((10,), 0.1).double().div(1).cumsum(0)[-1]) != 1.0


def test_the_lowest_draw_is_the_first_index(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, dtype=None, **_: torch.zeros(n, dtype=dtype))
    indices, _ = Prioritized()(torch.rand(8), 3, draws())
    assert indices.tolist() == [0, 0, 0]


def test_a_draw_on_a_border_belongs_to_the_next_index(monkeypatch):
    """Draws lie in [0, 1), so that each index owns its lower border."""
    monkeypatch.setattr(
        torch, "rand", lambda n, dtype=None, **_: torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=dtype)
    )
    indices, _ = Prioritized(0.0)(torch.ones(4), 4, draws())
    assert indices.tolist() == [0, 1, 2, 3]


def test_many_draws_of_many_images_stay_inside():
    priorities = torch.rand(5000) ** 8
    indices, weights = Prioritized(1.0, 0.4)(priorities, 100_000, draws())
    assert int(indices.min()) >= 0
    assert int(indices.max()) < 5000
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize("sampler", [Uniform(), Prioritized()])
def test_images_without_priority_are_drawn_all_the_same(sampler):
    indices, weights = sampler(torch.zeros(6), 100_000, draws())
    assert_drawn_with(indices, [1 / 6] * 6)
    torch.testing.assert_close(weights, torch.ones(100_000))


@pytest.mark.parametrize("sampler", [Uniform(), Prioritized()])
def test_equal_seeds_draw_equally(sampler):
    priorities = torch.rand(50)
    first, second, other = (sampler(priorities, 40, draws(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha >= 0"),
        ({"beta": -0.1}, "beta from 0 to 1"),
        ({"alpha": 0.5, "beta": 1.1}, "beta from 0 to 1"),
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"alpha": 1.0, "beta": 1.0}, "settle"),
        ({"alpha": 2.0, "beta": 0.5}, "settle"),
        ({"alpha": 4.0, "beta": 0.5}, "settle"),
        ({"normalize": "sum"}, "normalize"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prioritized(**options)


def test_products_just_below_one_are_taken():
    for alpha, beta in ((0.999, 1.0), (100.0, 0.0), (0.0, 1.0)):
        _, weights = Prioritized(alpha, beta)(torch.rand(5), 3, torch.Generator())
        assert torch.isfinite(weights).all()
