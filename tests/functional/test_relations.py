import pytest
import torch

from lightning_kd import functional
from tests import reference


def both(function, slow, student, teacher):
    """Value and gradient of two functions of the student's features."""
    results = []
    for f in (function, slow):
        s = student.clone().requires_grad_()
        value = f(s, teacher)
        value.sum().backward()
        results.append((value.detach(), s.grad))
    return results


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(
    "name",
    ["similarity_distance", "relational_distance", "relational_angle", "probabilistic_distance"],
)
def test_relations_equal_the_reference(name, batch):
    student = torch.randn(batch, 3, dtype=torch.float64)
    teacher = torch.randn(batch, 4, dtype=torch.float64)
    fast, slow = both(getattr(functional, name), getattr(reference, name), student, teacher)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_log_euclidean_equals_the_power_series(batch):
    student = torch.rand(batch, 5, dtype=torch.float64) - 0.1
    teacher = torch.rand(batch, 3, dtype=torch.float64)
    fast, slow = both(
        lambda s, t: functional.log_euclidean_distance(s, t, 0.05),
        lambda s, t: reference.log_euclidean_distance(s, t, 0.05),
        student,
        teacher,
    )
    torch.testing.assert_close(fast, slow, atol=1e-8, rtol=1e-6)


def test_log_euclidean_gradient_is_finite_where_eigenvalues_meet():
    """eigh's gradient divides by their difference; orthogonal samples make them all equal."""
    student = torch.eye(4, dtype=torch.float64).requires_grad_()
    functional.log_euclidean_distance(student, torch.rand(4, 3, dtype=torch.float64)).backward()
    assert torch.isfinite(student.grad).all()
    assert torch.autograd.gradcheck(
        lambda s: functional.log_euclidean_distance(s, torch.rand(4, 3).double() * 0 + 1, 0.1),
        (torch.rand(4, 6, dtype=torch.float64).requires_grad_(),),
    )


def test_more_samples_than_features_make_a_singular_gram_matrix_and_stay_finite():
    student = torch.rand(64, 16, requires_grad=True)
    value = functional.log_euclidean_distance(student, torch.rand(64, 8))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    "name",
    [
        "similarity_distance", "log_euclidean_distance", "relational_distance",
        "relational_angle", "probabilistic_distance",
    ],
)  # fmt: skip
def test_relations_are_zero_for_equal_features_and_finite_for_equal_samples_and_half(name):
    function = getattr(functional, name)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert float(function(x, x)) == pytest.approx(0.0, abs=1e-12)
    same = torch.ones(4, 3, requires_grad=True)
    value = function(same, torch.zeros(4, 2))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(same.grad).all()
    assert function(x.half(), x.half() * 100).dtype == torch.float32
    with pytest.raises(ValueError, match="features"):
        function(x, x[:3])


def test_relational_value_of_the_published_code():
    """lenscloth/RKD, metric/loss.py: pairwise distances with the mean over positive ones."""
    torch.manual_seed(3)
    s, t = torch.randn(6, 4), torch.randn(6, 7)

    def normalised(x):
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return d / d[d > 0].mean()

    published = torch.nn.functional.smooth_l1_loss(normalised(s), normalised(t))
    torch.testing.assert_close(functional.relational_distance(s, t), published)


@pytest.mark.parametrize("batch", [1, 3])
def test_feature_distances_equal_the_reference(batch):
    student = torch.randn(batch, 2, 3, 3, dtype=torch.float64)
    teacher = torch.randn(batch, 2, 3, 3, dtype=torch.float64)
    for name in ("unit_distance", "selectivity_distance"):
        fast, slow = both(getattr(functional, name), getattr(reference, name), student, teacher)
        torch.testing.assert_close(fast, slow)


def test_selectivity_takes_other_widths_and_resolutions():
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    small = torch.nn.functional.adaptive_avg_pool2d(student, 4)
    torch.testing.assert_close(
        functional.selectivity_distance(student, teacher),
        reference.selectivity_distance(small, teacher),
    )
    with pytest.raises(ValueError, match="feature maps"):
        functional.selectivity_distance(torch.randn(2, 3), teacher)


def test_values_of_repdistillers_code():
    """HobbitLong/RepDistiller, distiller_zoo: SP.py, PKT.py and NST.py."""
    s, t = torch.randn(5, 3), torch.randn(5, 6)
    rows = [torch.nn.functional.normalize(x @ x.T) for x in (s, t)]
    published = ((rows[1] - rows[0]) ** 2).sum() / 25
    torch.testing.assert_close(functional.similarity_distance(s, t), published)

    cosines = []
    for x in (s, t):
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        kernel = ((x @ x.T) + 1) / 2
        cosines.append(kernel / kernel.sum(1, keepdim=True))
    published = (cosines[1] * ((cosines[1] + 1e-7) / (cosines[0] + 1e-7)).log()).mean()
    torch.testing.assert_close(
        functional.probabilistic_distance(s, t), published, atol=1e-6, rtol=1e-4
    )

    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)

    def poly(x, y):
        x, y = (torch.nn.functional.normalize(z.flatten(2), dim=2) for z in (x, y))
        return (x.unsqueeze(1) * y.unsqueeze(2)).sum(-1).pow(2)

    published = poly(b, b).mean() + poly(a, a).mean() - 2 * poly(a, b).mean()
    torch.testing.assert_close(functional.selectivity_distance(a, b).mean(), published)
