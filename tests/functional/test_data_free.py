import math

import pytest
import torch

from lightning_kd.functional import (
    channel_statistics,
    class_balance,
    importance_weights,
    info_nce,
    logit_l1,
    modulating_weights,
    priority_probabilities,
    soft_cross_entropy,
    statistics_gap,
    total_variation,
)
from tests import reference


def doubles(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def assert_equal_with_gradients(ours, slow, *inputs):
    """Values and gradients of two functions of the same tensors agree."""
    results = []
    for function in (ours, slow):
        value = function(*inputs)
        results.append((value.detach(), torch.autograd.grad((value**2).sum(), inputs)))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------- what is wanted


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("remembered", [0, 1, 23])
def test_modulating_weights_equal_the_reference(classes, batch, gamma, remembered):
    logits = doubles(batch, classes, scale=2)
    contents = torch.randint(0, classes, (remembered,))
    share = torch.bincount(contents, minlength=classes).double() / max(remembered, 1)

    def slow(z):
        rows = [reference.modulating_weight(row, contents.tolist(), gamma) for row in z]
        return torch.stack([row + 0 * z.sum() for row in rows])

    assert_equal_with_gradients(lambda z: modulating_weights(z, share, gamma), slow, logits)


def test_normalized_diversity_is_one_where_classes_are_balanced():
    logits, share = torch.randn(6, 4).double(), torch.full((4,), 0.25).double()
    plain = modulating_weights(logits, share, 1.0)
    normed = modulating_weights(logits, share, 1.0, diversity_norm=True)
    torch.testing.assert_close(normed, plain * 4 / 3)
    torch.testing.assert_close(normed, 1 - logits.softmax(1).max(1).values)


def test_modulating_weights_by_hand():
    """Memory: 6 of class 0, 3 of class 1, 1 of class 2; gamma 2."""
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]]).double().log()
    share = torch.tensor([0.6, 0.3, 0.1]).double()
    wanted = torch.tensor([0.4 * 0.5**2, 0.7 * 0.2**2, 0.9 * 0.5**2]).double()
    torch.testing.assert_close(modulating_weights(logits, share, 2.0), wanted)


def test_an_empty_memory_leaves_the_difficulty_alone():
    logits = torch.randn(6, 4).double()
    hard = 1 - logits.softmax(1).amax(1)
    for gamma in (0.0, 0.5, 1.0, 2.0):
        torch.testing.assert_close(
            modulating_weights(logits, torch.zeros(4).double(), gamma), hard**gamma
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_certain_teacher_gives_finite_gradients(gamma, dtype):
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 90.0, 0.0]], dtype=dtype).requires_grad_()
    value = modulating_weights(logits, torch.zeros(3), gamma)
    assert value.requires_grad
    assert ((value >= 0) & (value <= 1)).all()
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_modulating_weights_differentiate_the_difficulty():
    logits = doubles(4, 3)
    share = torch.tensor([0.2, 0.3, 0.5]).double()
    for gamma in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(lambda z, g=gamma: modulating_weights(z, share, g), logits)


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_probabilities_equal_the_reference(alpha, epsilon):
    priorities = torch.randn(11).double()
    priorities[3] = 0
    found = priority_probabilities(priorities, alpha, epsilon)
    slow = reference.priority_probabilities(priorities.tolist(), alpha, epsilon)
    torch.testing.assert_close(found, torch.tensor(slow).double())
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    assert (found > 0).all()


def test_probabilities_by_hand():
    found = priority_probabilities(torch.tensor([1.0, -4.0, 9.0]).double(), 0.5, 1e-300)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 3.0]).double() / 6)


def test_no_alpha_draws_uniformly():
    found = priority_probabilities(torch.tensor([0.0, 1e-9, 3.0, 1e9]).double(), 0.0)
    torch.testing.assert_close(found, torch.full((4,), 0.25).double())
    weights = importance_weights(found, 4, 0.7, "none")
    torch.testing.assert_close(weights, torch.ones(4).double())


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_equal_the_reference(beta):
    probabilities = torch.rand(9).double().softmax(0)
    slow = torch.tensor(reference.importance_weights(probabilities.tolist(), 9, beta)).double()
    none = importance_weights(probabilities, 9, beta, "none")
    torch.testing.assert_close(none, slow)
    mean = importance_weights(probabilities, 9, beta)
    torch.testing.assert_close(mean, slow / (sum(slow.tolist()) / 9))
    largest = importance_weights(probabilities, 9, beta, "max")
    torch.testing.assert_close(largest, slow / max(slow.tolist()))


def test_full_correction_is_unbiased():
    """sum_i P_i w_i f_i is the plain mean at beta = 1."""
    values = torch.randn(50).double()
    probabilities = priority_probabilities(torch.rand(50).double() * 5, 0.8)
    weights = importance_weights(probabilities, 50, 1.0, "none")
    torch.testing.assert_close((probabilities * weights * values).sum(), values.mean())
    half = importance_weights(probabilities, 50, 0.5, "none")
    assert abs((probabilities * half * values).sum() - values.mean()) > 1e-4


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 0.4), (0.6, 0.4), (1.0, 0.0), (0.9, 0.9), (2.0, 0.3), (0.0, 1.0)]
)
@pytest.mark.parametrize("normalize", ["none", "mean", "max"])
def test_priorities_settle_at_a_power_of_the_divergence(alpha, beta, normalize):
    """Equations 4 to 6 on constant divergences reach P ~ KL^(alpha / (1 + alpha beta))."""
    divergences = torch.tensor([0.01, 0.2, 0.5, 1.0, 3.0, 7.5]).double()
    priorities = divergences.clone()
    for _ in range(400):
        probabilities = priority_probabilities(priorities, alpha, 1e-12)
        weights = importance_weights(probabilities, 6, beta, normalize)
        priorities = weights * divergences
    wanted = divergences ** (alpha / (1 + alpha * beta))
    torch.testing.assert_close(probabilities, wanted / wanted.sum(), rtol=1e-5, atol=0)


def test_priorities_never_settle_where_the_product_is_one():
    divergences = torch.tensor([0.1, 1.0, 5.0]).double()
    priorities, seen = divergences.clone(), []
    for _ in range(200):
        probabilities = priority_probabilities(priorities, 1.0, 1e-300)
        priorities = importance_weights(probabilities, 3, 1.0, "none") * divergences
        seen.append(probabilities)
    assert (seen[-1] - seen[-2]).abs().max() > 0.1
    torch.testing.assert_close(seen[-1], seen[-3])


# ---------------------------------------------------------------------- terms


def test_statistics_gap_equals_the_reference():
    wanted = [(torch.randn(c).double(), torch.rand(c).double()) for c in (3, 1, 5)]
    found = [doubles(c) for c in (3, 3, 1, 1, 5, 5)]

    def layers(values):
        return [(values[2 * k], values[2 * k + 1], *wanted[k]) for k in range(3)]

    assert_equal_with_gradients(
        lambda *v: statistics_gap(layers(v)), lambda *v: reference.statistics_gap(layers(v)), *found
    )


def test_statistics_gap_by_hand():
    layer = (torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]), torch.zeros(2), torch.ones(2))
    other = (torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([1.0]))
    assert float(statistics_gap(iter([layer, other]))) == 5 + 0 + 1 + 2


def test_no_gap_has_gradient_zero():
    mean, variance = doubles(4), doubles(4)
    value = statistics_gap([(mean, variance, mean.detach().clone(), variance.detach().clone())])
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(mean.grad, torch.zeros(4).double())
    assert torch.equal(variance.grad, torch.zeros(4).double())


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 3), (7, 10)])
def test_class_balance_equals_the_reference(batch, classes):
    logits = doubles(batch, classes, scale=3)
    assert_equal_with_gradients(class_balance, reference.class_balance, logits)


def test_class_balance_runs_from_minus_log_k_to_zero():
    sure = 200 * torch.eye(4).double()
    assert float(class_balance(sure)) == pytest.approx(-math.log(4), abs=1e-12)
    assert float(class_balance(sure[:1].repeat(4, 1))) == pytest.approx(0, abs=1e-12)
    assert float(class_balance(torch.zeros(3, 4))) == pytest.approx(-math.log(4), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_class_balance_is_finite_where_a_class_has_vanished(dtype):
    logits = torch.tensor([[900.0, 0.0, -900.0]] * 2, dtype=dtype).requires_grad_()
    value = class_balance(logits)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 5)])
def test_total_variation_equals_the_reference(shape):
    assert_equal_with_gradients(total_variation, reference.total_variation, doubles(*shape))


def test_total_variation_by_hand():
    image = torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]])
    assert float(total_variation(image)) == (0.5 + 0.75) / 2 + (1 + 0.25) / 2
    assert float(total_variation(torch.full((2, 3, 4, 4), 0.7))) == 0


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (4, 6)])
def test_logit_l1_equals_the_reference(batch, classes):
    s, t = doubles(batch, classes), doubles(batch, classes)
    assert_equal_with_gradients(logit_l1, reference.logit_l1, s, t)


def test_logit_l1_wants_equal_shapes():
    with pytest.raises(ValueError, match="one shape"):
        logit_l1(torch.zeros(2, 3), torch.zeros(2, 4))


def test_soft_cross_entropy_equals_the_reference():
    logits, targets = doubles(5, 4), torch.randn(5, 4).double().softmax(1)
    assert_equal_with_gradients(
        lambda z: soft_cross_entropy(z, targets),
        lambda z: reference.soft_cross_entropy(z, targets),
        logits,
    )
    labels = torch.randint(0, 4, (5,))
    assert_equal_with_gradients(
        lambda z: soft_cross_entropy(z, labels),
        lambda z: reference.cross_entropy(z, labels),
        logits,
    )


def test_everything_is_computed_in_full_precision_under_autocast():
    logits, other = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    share, labels = torch.rand(5), torch.randint(0, 5, (4,))
    for function, inputs in (
        (modulating_weights, (logits, share)),
        (class_balance, (logits,)),
        (total_variation, (torch.rand(2, 3, 4, 4).bfloat16(),)),
        (logit_l1, (logits, other)),
        (soft_cross_entropy, (logits, labels)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(*inputs)
        wide = function(*(v.float() if v.is_floating_point() else v for v in inputs))
        assert found.dtype == torch.float32, function
        assert torch.equal(found, wide), function


# ---------------------------------------------------------------------- statistics, contrast


@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 5), (3, 2, 4, 3), (1, 2, 1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_channel_statistics_equal_the_reference_with_gradients(shape, last):
    values = doubles(*shape).detach() + 5
    if last and len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    values.requires_grad_()

    def joined(function):
        return lambda x: torch.cat(function(x))

    assert_equal_with_gradients(
        joined(channel_statistics), joined(reference.channel_statistics), values
    )
    assert torch.autograd.gradcheck(channel_statistics, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channel_statistics_of_half_precision_are_whole(dtype):
    values = (300 * torch.randn(8, 2, 4, 4)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, variance = channel_statistics(values)
    assert mean.dtype == variance.dtype == torch.float32
    assert float(variance.detach().min()) > 65504  # more than float16 holds
    slow = reference.channel_statistics(values.detach())
    torch.testing.assert_close((mean.detach(), variance.detach()), tuple(s.float() for s in slow))
    (mean.sum() + variance.sqrt().sum()).backward()
    assert values.grad.dtype == dtype
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("more", [0, 5])
def test_info_nce_equals_the_reference(temperature, more):
    anchors, others = doubles(4, 3), doubles(4 + more, 3)
    assert_equal_with_gradients(
        lambda a, o: info_nce(a, o, temperature),
        lambda a, o: reference.info_nce(a, o, temperature),
        anchors,
        others,
    )


def test_info_nce_by_hand():
    """Orthogonal strangers: -log(e / (e + 2))."""
    others = torch.eye(3)
    found = info_nce(3 * others[:1], others, 1.0)
    assert float(found) == pytest.approx(math.log(1 + 2 / math.e), rel=1e-5)
