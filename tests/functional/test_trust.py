import itertools

import pytest
import torch

from lightning_kd import functional
from tests import reference


def logits(m, b, k, scale=3.0):
    return scale * torch.randn(m, b, k, dtype=torch.float64)


@pytest.mark.parametrize(("m", "b", "k"), [(1, 1, 2), (2, 1, 2), (3, 4, 5), (3, 2, 10)])
def test_confidence_and_entropy_equal_the_reference(m, b, k):
    z, y = logits(m, b, k), torch.randint(0, k, (b,))
    torch.testing.assert_close(
        functional.confidence_weights(z, y), reference.confidence_weights(z, y).double()
    )
    torch.testing.assert_close(functional.entropy_weights(z), reference.entropy_weights(z).double())


def test_confidence_has_the_value_of_the_published_weights():
    """Rorozhl/CA-MKD, distiller_zoo/CAMKD.py: (1 - softmax of the stacked losses) / (M - 1)."""
    z, y = logits(3, 4, 5), torch.randint(0, 5, (4,))
    losses = torch.stack([torch.nn.functional.cross_entropy(t, y, reduction="none") for t in z])
    torch.testing.assert_close(functional.confidence_weights(z, y), (1 - losses.softmax(0)) / 2)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_weights_sum_to_one_follow_the_teachers_and_stay_finite_at_the_extremes(m):
    y = torch.tensor([0, 1, -1])
    for z in (logits(m, 3, 4), 10 * logits(m, 3, 4), torch.zeros(m, 3, 4), 1e4 * logits(m, 3, 4)):
        for weigh in (
            lambda t: functional.confidence_weights(t, y),
            functional.entropy_weights,
            lambda t: functional.lowest_loss_weights(t, y),
            lambda t: functional.lowest_loss_weights(t, None),
        ):
            weights = weigh(z)
            torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
            assert (weights >= 0).all()
            order = torch.randperm(m)
            if 0 < float(z.abs().max()) < 100:  # beyond, and of equal teachers, there are ties
                torch.testing.assert_close(weigh(z[order]), weights[order])


def test_the_lowest_loss_is_chosen_and_without_a_label_the_lowest_entropy():
    z = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    weights = functional.lowest_loss_weights(z, torch.tensor([1, -1]))
    assert weights.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("slack", [0.0, 0.3, 1.0])
def test_min_norm_equals_pairwise_exchange(m, slack):
    g = torch.randn(m, 6, dtype=torch.float64) + 0.5
    c_max = 1 / m + slack * (1 - 1 / m)
    weights = functional.min_norm_weights(g, c_max)
    expected = torch.tensor(reference.min_norm_weights(g, c_max), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights.max()) <= c_max + 1e-9


def test_min_norm_properties():
    g = torch.randn(4, 10, dtype=torch.float64)
    direction = functional.min_norm_weights(g) @ g
    assert (g @ direction >= direction @ direction - 1e-7).all()  # nobody is acted against
    torch.testing.assert_close(
        functional.min_norm_weights(g, 0.25), torch.full((4,), 0.25).double()
    )
    same = functional.min_norm_weights(g[:1].expand(3, 10), 0.6)
    torch.testing.assert_close(same, torch.full((3,), 1 / 3).double(), atol=1e-5, rtol=0)
    assert torch.isfinite(functional.min_norm_weights(torch.zeros(3, 4))).all()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        functional.min_norm_weights(g[order], 0.6), functional.min_norm_weights(g, 0.6)[order]
    )
    with pytest.raises(ValueError, match="at most 8"):
        functional.min_norm_weights(torch.randn(9, 2))
    with pytest.raises(ValueError, match="c_max from"):
        functional.min_norm_weights(g, 0.1)


def test_simplex_projection_is_the_nearest_point():
    for _ in range(20):
        v = 2 * torch.randn(3, dtype=torch.float64)
        found = functional.simplex_projection(v)
        assert float(found.sum()) == pytest.approx(1)
        grid = [i / 40 for i in range(41)]
        best = min(
            (torch.tensor([a, b, 1 - a - b]).double() for a, b in itertools.product(grid, grid)
             if a + b <= 1 + 1e-12),
            key=lambda p: float((p - v).norm()),
        )  # fmt: skip
        assert float((found - v).norm()) <= float((best - v).norm()) + 1e-12


def test_divergences_of_domains_equal_the_reference():
    p, q = torch.rand(6).double(), torch.rand(6).double()
    p[0] = 0.0
    p, q = p / p.sum(), q / q.sum()
    assert float(functional.jensen_shannon(p, q)) == pytest.approx(reference.jensen_shannon(p, q))
    assert float(functional.renyi(p, q, 0.9)) == pytest.approx(reference.renyi(p, q, 0.9))
    assert float(functional.jensen_shannon(p, p)) == pytest.approx(0.0, abs=1e-12)
    s, t = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 1
    assert float(functional.maximum_mean_discrepancy(s, t)) == pytest.approx(reference.mmd(s, t))
    assert float(functional.maximum_mean_discrepancy(s, s)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("c_max", [0.6, 0.9])
def test_min_norm_equals_the_one_class_svm_of_the_published_code(m, c_max):
    """AnTuo1998/AE-KD, helper/optimization.py: dual of a one-class SVM on the Gram matrix."""
    svm = pytest.importorskip("sklearn.svm")
    g = torch.randn(m, 10, dtype=torch.float64) + 0.3
    fitted = svm.OneClassSVM(kernel="precomputed", nu=1 / (c_max * m), tol=1e-9)
    fitted.fit((g @ g.T).numpy())
    weights = torch.zeros(m, dtype=torch.float64)
    weights[torch.as_tensor(fitted.support_).long()] = torch.as_tensor(fitted.dual_coef_[0])
    weights = weights / weights.sum()
    torch.testing.assert_close(functional.min_norm_weights(g, c_max), weights, atol=1e-5, rtol=0)
