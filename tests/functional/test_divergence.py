import pytest
import torch
import torch.nn.functional as F

from lightning_kd.functional import combine_teachers, kl_divergence, logit_mse, task_cross_entropy
from tests import reference


def logits(batch, classes, scale=3.0):
    return scale * torch.randn(batch, classes, dtype=torch.float64)


def assert_same_value_and_gradient(ours, slow, *inputs):
    """Two scalar functions of the same tensors agree, gradients included."""
    results = []
    for function in (ours, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (4.0, 4.0), (1.0, 0.1)])
def test_kl_divergence_equals_reference(batch, classes, temperatures):
    s, t = logits(batch, classes), logits(batch, classes)
    weights = torch.rand(batch, dtype=torch.float64)
    assert_same_value_and_gradient(
        lambda s, t: (kl_divergence(s, t, *temperatures) * weights).sum(),
        lambda s, t: (reference.kl_divergence(s, t, *temperatures) * weights).sum(),
        s,
        t,
    )


def test_kl_divergence_passes_gradcheck():
    s, t = logits(3, 4).requires_grad_(), logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a, b, 2.0, 3.0), (s, t))


def test_kl_divergence_is_zero_only_for_equal_answers():
    z = logits(4, 5)
    assert torch.equal(kl_divergence(z, z), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(kl_divergence(z + 3, z), torch.zeros(4, dtype=torch.float64))
    assert (kl_divergence(logits(4, 5), z) > 0).all()


def test_kl_divergence_is_summed_over_classes():
    """A default KLDivLoss divides by C too, as nocotan BAN, KD_Lib BANN and ARD do."""
    s, t = logits(6, 10), logits(6, 10)
    right = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl_divergence(s, t).mean(), right)
    doubled = (
        torch.cat([s, torch.full_like(s, -1e9)], 1),
        torch.cat([t, torch.full_like(t, -1e9)], 1),
    )
    torch.testing.assert_close(kl_divergence(*doubled), kl_divergence(s, t))


def test_temperature_squared_keeps_the_gradient_as_temperature_grows():
    s, t = logits(4, 6).requires_grad_(), logits(4, 6)
    sizes = []
    for temperature in (50.0, 5000.0):
        loss = temperature**2 * kl_divergence(s, t, temperature, temperature).sum()
        sizes.append(torch.autograd.grad(loss, s)[0])
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.2, atol=0.05)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    torch.testing.assert_close(sizes[1], centred.detach() / 6, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite_in_any_precision(dtype):
    s = torch.tensor([[30.0, -30.0, 0.0], [-30.0, 30.0, -30.0]], dtype=dtype, requires_grad=True)
    t = -s.detach()
    value = kl_divergence(s, t)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()


def test_losses_are_float32_under_autocast():
    s, t = torch.randn(4, 3), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = kl_divergence(s.bfloat16(), t.bfloat16())
        matrix = torch.ones(2, 2) @ torch.ones(2, 2)
    assert matrix.dtype == torch.bfloat16
    torch.testing.assert_close(inside, kl_divergence(s.bfloat16().float(), t.bfloat16().float()))


def test_dense_outputs_are_averaged_over_positions():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (s, t)]
    torch.testing.assert_close(
        kl_divergence(s, t), kl_divergence(*flat).view(2, 20).mean(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"student_temperature > 0"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2), temperature)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(1, 3\)"):
        kl_divergence(torch.zeros(1, 2), torch.zeros(1, 3))


def test_logit_mse_equals_reference():
    s, t = logits(3, 4), logits(3, 4)
    assert_same_value_and_gradient(
        lambda s, t: logit_mse(s, t).sum(), lambda s, t: reference.logit_mse(s, t).sum(), s, t
    )
    assert (logit_mse(t, t) == 0).all()


def test_task_cross_entropy_equals_reference_and_leaves_out_unlabelled():
    z, y = logits(4, 3), torch.tensor([2, -1, 0, 1])
    assert_same_value_and_gradient(
        lambda z: task_cross_entropy(z, y).sum(), lambda z: reference.cross_entropy(z, y).sum(), z
    )
    assert task_cross_entropy(z, y)[1] == 0


@pytest.mark.parametrize("label", [3, -2])
def test_labels_out_of_range_are_reported(label):
    with pytest.raises(ValueError, match="Expected labels from 0 to 2, or -1 for unlabelled"):
        task_cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("per_sample", [False, True])
def test_weighted_kls_and_kl_to_the_weighted_mean_have_one_gradient(per_sample):
    """Fact 1: so weighting is implemented once; dvornik's logit mean would fail this."""
    s = logits(5, 4).requires_grad_()
    teachers = torch.stack([logits(5, 4) for _ in range(3)])
    weights = (
        torch.rand(3, 5, dtype=torch.float64) if per_sample else torch.rand(3, dtype=torch.float64)
    )
    weights = weights / weights.sum(0)
    target = combine_teachers(teachers, weights, 3.0, "probability")
    joint = torch.autograd.grad(kl_divergence(s, target, 3.0).mean(), s)[0]
    column = weights if per_sample else weights[:, None].expand(3, 5)
    single = sum((column[m] * kl_divergence(s, teachers[m], 3.0, 3.0)).mean() for m in range(3))
    torch.testing.assert_close(joint, torch.autograd.grad(single, s)[0])
    geometric = combine_teachers(teachers, weights, 3.0, "logit")
    other = torch.autograd.grad(kl_divergence(s, geometric, 3.0).mean(), s)[0]
    assert (other - joint).abs().max() > 1e-3


def test_combine_equals_reference_in_both_spaces_and_sums_to_one():
    teachers = torch.stack([logits(4, 5) for _ in range(3)])
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    got = combine_teachers(teachers, weights, 2.0, "logit").exp()
    torch.testing.assert_close(got, reference.logit_mean_probabilities(teachers, weights, 2.0))
    mean = combine_teachers(teachers, weights, 2.0, "probability").exp()
    rows = [[torch.stack(reference.softmax(z, 2.0)) for z in t] for t in teachers]
    right = sum(w * torch.stack(r) for w, r in zip(weights, rows, strict=True))
    torch.testing.assert_close(mean, right)
    torch.testing.assert_close(mean.sum(1), torch.ones(4, dtype=torch.float64))


def test_combine_survives_a_weight_of_zero_and_extreme_logits():
    teachers = torch.tensor([[[30.0, -30.0]], [[-30.0, 30.0]]])
    answer = combine_teachers(teachers, torch.tensor([1.0, 0.0]), 1.0, "probability")
    torch.testing.assert_close(answer, teachers[0].log_softmax(1))


def test_unknown_space_is_reported():
    with pytest.raises(ValueError, match='"probability" or "logit"'):
        combine_teachers(torch.zeros(1, 1, 2), torch.ones(1), 1.0, "mean")
