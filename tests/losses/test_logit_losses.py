"""DecoupledKL, LogitStandardization, SubsetTarget."""

import pytest
import torch

from lightning_kd import Teacher
from lightning_kd.losses import DecoupledKL, LogitStandardization, SoftTarget, SubsetTarget
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from tests import reference


def logits(batch=3, classes=4, scale=3.0):
    return scale * torch.randn(batch, classes, dtype=torch.float64)


def uniform(*members):
    count = len(members)
    return TeacherOutputs(members, torch.full((count,), 1 / count, dtype=torch.float64))


def gradient(loss, s, teachers, y):
    s = s.clone().requires_grad_()
    value = loss(NetworkOutput(s), teachers, y)
    value.backward()
    return value.detach(), s.grad


def test_decoupled_of_several_teachers_is_of_their_mean_answer():
    s, a, b, y = logits(), logits(), logits(), torch.tensor([0, 3, 1])
    mean = ((a / 4).softmax(1) + (b / 4).softmax(1)).log() * 4
    wanted = 16 * reference.decoupled_kl(s, mean, y, 4.0, 1.0, 8.0).mean()
    torch.testing.assert_close(
        DecoupledKL()(NetworkOutput(s), uniform(*map(NetworkOutput, (a, b))), y), wanted
    )
    assert DecoupledKL()(NetworkOutput(s), uniform(NetworkOutput(a)), None).isfinite()


def test_logit_standardization_equals_the_reference_and_ignores_scale_and_shift():
    s, t = logits(), logits()
    z_s, z_t = reference.standardize(s), reference.standardize(t)
    wanted = 4 * reference.kl_divergence(z_s, z_t, 2.0, 2.0).mean()
    loss = LogitStandardization()
    torch.testing.assert_close(loss(NetworkOutput(s), uniform(NetworkOutput(t)), None), wanted)
    shifted = loss(NetworkOutput(5 * s + 2), uniform(NetworkOutput(0.1 * t - 7)), None)
    torch.testing.assert_close(shifted, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8]])
def test_subset_target_slices_and_renormalises_the_student(weights):
    s, classes = logits(3, 5), [[0, 2], [1, 2, 3, 4]]
    answers = [logits(3, 2), logits(3, 4)]
    members = []
    for answer, own in zip(answers, classes, strict=True):
        wide = torch.full((3, 5), -torch.inf, dtype=torch.float64)
        wide[:, own] = answer
        members.append(NetworkOutput(wide))
    teachers = TeacherOutputs(members, torch.tensor(weights, dtype=torch.float64))
    wanted = 16 * sum(
        w * reference.subset_kl(s, answer, own, 4.0).mean()
        for w, answer, own in zip(weights, answers, classes, strict=True)
    )
    value, grad = gradient(SubsetTarget(4.0), s, teachers, None)
    torch.testing.assert_close(value, wanted)
    assert torch.isfinite(grad).all()
    # exact answers of overlapping subsets have the joint posterior as their only common fit
    joint = s.softmax(1)
    exact = [
        NetworkOutput(joint.log().masked_fill(m.logits == -torch.inf, -torch.inf)) for m in members
    ]
    assert float(SubsetTarget()(NetworkOutput(s), uniform(*exact), None)) == pytest.approx(
        0, abs=1e-9
    )
    assert (
        float(SoftTarget()(NetworkOutput(s), uniform(*exact), None)) > 0.01
    )  # zero-padding is biased


def test_subset_target_may_ask_only_about_own_samples():
    s = logits(2, 3)
    teacher = torch.tensor([[1.0, 2.0, -torch.inf]] * 2, dtype=torch.float64)
    y = torch.tensor([0, 2])
    value = SubsetTarget(1.0, own_samples=True)(
        NetworkOutput(s), uniform(NetworkOutput(teacher)), y
    )
    wanted = reference.subset_kl(s[:1], teacher[:1, :2], [0, 1], 1.0).sum() / 2
    torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("loss", [DecoupledKL(), LogitStandardization(), SubsetTarget()], ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(1, 3), (4, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_and_half_precision_stay_finite(loss, batch, classes, dtype):
    s = (30 * torch.sign(torch.randn(batch, classes))).to(dtype)
    t = (30 * torch.sign(torch.randn(batch, classes))).to(dtype)
    value, grad = gradient(loss, s, uniform(NetworkOutput(t)), torch.zeros(batch, dtype=torch.long))
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()


def test_a_teacher_of_some_classes_says_nothing_of_the_others(tiny):
    network = tiny(num_classes=2)
    teacher = Teacher(network, classes=[3, 1], num_classes=4)
    x = torch.randn(2, 1, 8, 8)
    said = teacher(x).logits
    assert torch.equal(said[:, [3, 1]], network(x))
    assert (said[:, [0, 2]] == -torch.inf).all()
    with pytest.raises(ValueError, match="distinct classes"):
        Teacher(network, classes=[1, 1], num_classes=4)
    with pytest.raises(ValueError, match="distinct classes"):
        Teacher(network, classes=[0, 1])
    with pytest.raises(ValueError, match="one for each of its classes"):
        Teacher(network, classes=[0, 1, 2], num_classes=4)(x)
