import pytest
import torch
import torch.nn.functional as F

from lightning_kd.losses import AttentionTransfer, DistillationLoss, Hint, LogitMSE, SoftTarget
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from tests import reference


def logits(batch=3, classes=4):
    return 3 * torch.randn(batch, classes, dtype=torch.float64)


def ensemble(members, weights=None, space="probability"):
    if weights is None:
        weights = torch.full((len(members),), 1 / len(members), dtype=torch.float64)
    return TeacherOutputs(members, weights, space)


def maps(channels, size=4, batch=2):
    return torch.randn(batch, channels, size, size)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_soft_target_equals_reference(per_sample, num_teachers, batch):
    student, teachers = logits(batch), [logits(batch) for _ in range(num_teachers)]
    shape = (num_teachers, batch) if per_sample else (num_teachers,)
    weights = torch.rand(shape, dtype=torch.float64)
    weights = weights / weights.sum(0)
    results = []
    for function in (
        lambda s: SoftTarget(4.0)(
            NetworkOutput(s), ensemble([NetworkOutput(t) for t in teachers], weights), None
        ),
        lambda s: reference.soft_target(s, teachers, weights, 4.0),
    ):
        s = student.clone().requires_grad_()
        value = function(s)
        value.backward()
        results.append((value.detach(), s.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_square_of_the_temperature_appears_once_and_only_on_request():
    s, t = NetworkOutput(logits()), ensemble([NetworkOutput(logits())])
    plain = SoftTarget(3.0, temperature_squared=False)(s, t, None)
    torch.testing.assert_close(SoftTarget(3.0)(s, t, None), 9 * plain)
    rusu = SoftTarget(1.0, teacher_temperature=0.01, temperature_squared=False)(s, t, None)
    right = reference.kl_divergence(s.logits, t.outputs[0].logits, 1.0, 0.01).mean()
    torch.testing.assert_close(rusu, right.nan_to_num(), rtol=1e-6, atol=1e-6)


def test_soft_target_is_the_value_of_hintons_published_formula():
    """RepDistiller: F.kl_div(log_softmax(s / T), softmax(t / T), reduction sum) * T^2 / B."""
    s, t = logits(), logits()
    published = F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="sum") * 16 / len(s)
    torch.testing.assert_close(
        SoftTarget(4.0)(NetworkOutput(s), ensemble([NetworkOutput(t)]), None), published
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: SoftTarget(2.0),
        LogitMSE,
        lambda: Hint("a", "a", adapter=False),
        lambda: AttentionTransfer("a", "a"),
    ],
)
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_identical_teachers_give_the_single_teacher_loss(make, space):
    """CA-MKD divides by the number of teachers once more."""
    student = NetworkOutput(logits(), {"a": maps(3, batch=3)})
    teacher = NetworkOutput(logits(), {"a": maps(3, batch=3)})
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    one = make()(student, ensemble([teacher]), None)
    three = make()(student, ensemble([teacher] * 3, weights, space), None)
    torch.testing.assert_close(one, three, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_hint_sizes_one_adapter_for_each_teacher_and_trains_it(power):
    loss = Hint("a", ["b", "c"], power=power)
    student = NetworkOutput(logits(2), {"a": maps(3, 8).requires_grad_()})
    teachers = [
        NetworkOutput(logits(2), {"b": maps(5, 4)}),
        NetworkOutput(logits(2), {"c": maps(2, 16)}),
    ]
    loss.build(student, teachers)
    value = loss(student, ensemble(teachers), None)
    value.backward()
    assert [p.map[0].weight.shape for p in loss.projections] == [(5, 3, 1, 1), (2, 3, 1, 1)]
    # KD_Lib-style torch.tensor(list_of_losses) would cut these
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters() if p.dim() > 1
    )
    assert student.features["a"].grad.abs().sum() > 0


def test_hint_and_attention_average_over_teachers_by_their_weights():
    student = NetworkOutput(logits(2), {"a": maps(3)})
    teachers = [NetworkOutput(logits(2), {"a": maps(3)}) for _ in range(2)]
    weights = torch.tensor([[0.9, 0.2], [0.1, 0.8]])
    got = Hint("a", "a", adapter=False)(student, ensemble(teachers, weights), None)
    each = [reference.hint_distance(student.features["a"], t.features["a"], 2) for t in teachers]
    torch.testing.assert_close(got, (weights[0] * each[0] + weights[1] * each[1]).mean())
    got = AttentionTransfer("a", "a")(student, ensemble(teachers, weights), None)
    each = [reference.attention_distance(student.features["a"], t.features["a"]) for t in teachers]
    torch.testing.assert_close(got, (weights[0] * each[0] + weights[1] * each[1]).mean())


def test_hint_finds_its_adapter_when_a_teacher_did_not_run():
    loss = Hint("a", "a")
    student = NetworkOutput(logits(2), {"a": maps(3)})
    teachers = [NetworkOutput(logits(2), {"a": maps(c)}) for c in (4, 5)]
    loss.build(student, teachers)
    only = TeacherOutputs([teachers[1]], torch.ones(1), "probability", (1,))
    assert loss(student, only, None).isfinite()


@pytest.mark.parametrize("temperature", [0.0, -2.0])
@pytest.mark.parametrize("name", ["temperature", "student_temperature", "teacher_temperature"])
def test_temperature_must_be_positive(name, temperature):
    with pytest.raises(ValueError, match=f"Expected {name} > 0"):
        SoftTarget(**{name: temperature})


def test_missing_layer_names_and_wrong_power_are_reported():
    with pytest.raises(ValueError, match="one teacher_layer for each teacher"):
        Hint("a", ["b"]).teacher_layers(1)
    with pytest.raises(ValueError, match="power 1 or 2"):
        Hint("a", "b", power=3)
    with pytest.raises(KeyError, match="was not recorded"):
        NetworkOutput(logits()).feature("x")


def test_names_are_snake_case():
    class MyOwnKDLoss(DistillationLoss):
        def forward(self, student, teachers, target):
            return student.logits.sum()

    assert MyOwnKDLoss().name == "my_own_kd_loss"
    assert LogitMSE().name == "logit_mse"
    assert SoftTarget().name == "soft_target"


def test_two_teachers_give_the_golden_probability_mean():
    """Public code (dvornikita/fewshot_ensemble) averages logits where it means probabilities."""
    teachers = [
        NetworkOutput(torch.tensor([[0.9, 0.1]]).log()),
        NetworkOutput(torch.tensor([[0.2, 0.8]]).log()),
    ]
    mean = ensemble(teachers).log_probabilities().exp()
    torch.testing.assert_close(mean, torch.tensor([[0.55, 0.45]]))
    geometric = ensemble(teachers, space="logit").log_probabilities().exp()
    torch.testing.assert_close(geometric, torch.tensor([[0.6, 0.4]]))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_the_gradient_does_not_shrink_with_the_number_of_classes(classes):
    """KLDivLoss's default reduction divides by it (LFME, BAN, ARD): sum over classes instead."""
    z = torch.zeros(1, classes, requires_grad=True)
    teacher = torch.full((1, classes), -100.0)
    teacher[0, 0] = 0.0
    SoftTarget(1.0)(NetworkOutput(z), ensemble([NetworkOutput(teacher)]), None).backward()
    assert float(z.grad[0, 0]) == pytest.approx(1 / classes - 1)
