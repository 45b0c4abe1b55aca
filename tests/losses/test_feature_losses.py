"""FEED, GramLoss, Relational, NST, PKT, MEAL, KnowledgeFlow, GraphDistillation, ConfidentHint."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.functional import global_average_pool
from lightning_kd.losses import (
    FEED,
    MEAL,
    NST,
    PKT,
    ConfidentHint,
    GramLoss,
    GraphDistillation,
    KnowledgeFlow,
    Relational,
)
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from tests import reference

MAKE = {
    "feed": lambda: FEED("a", "a"),
    "gram": lambda: GramLoss("a", "a"),
    "gram_log": lambda: GramLoss("a", "a", metric="log_euclidean"),
    "gram_learned": lambda: GramLoss("a", "a", learn_weights=True),
    "relational": lambda: Relational("a", "a"),
    "nst": lambda: NST("a", "a"),
    "pkt": lambda: PKT("a", "a"),
    "meal": lambda: MEAL("a", "a"),
    "graph": lambda: GraphDistillation("a", "a"),
    "graph_vertex": lambda: GraphDistillation("a", "a", edges="vertex", distance="mmd"),
}


def knowledge(width, size=4, batch=3, grad=False, classes=4):
    feature = torch.randn(batch, width, size, size).requires_grad_(grad)
    logits = global_average_pool(feature) @ torch.randn(width, classes)
    return NetworkOutput(logits, {"a": feature})


def uniform(members):
    return TeacherOutputs(members, torch.full((len(members),), 1 / len(members)))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_teachers_of_other_widths_and_resolutions_reach_the_student(name, batch):
    loss = MAKE[name]()
    student = knowledge(3, 8, batch, grad=True)
    teachers = [knowledge(5, 4, batch), knowledge(2, 16, batch)]
    loss.build(student, teachers)
    loss(student, uniform(teachers), torch.zeros(batch, dtype=torch.long)).backward()
    grad = student.features["a"].grad
    assert torch.isfinite(grad).all()
    if batch > 2:  # few samples have no relations
        assert grad.abs().sum() > 0
        assert all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("name", [n for n in MAKE if n not in ("feed", "meal")])
def test_identical_teachers_give_the_single_teacher_loss(name):
    student, teacher = knowledge(3), knowledge(4)
    values = []
    for count in (1, 3):
        loss = MAKE[name]()
        torch.manual_seed(0)
        loss.build(student, [teacher] * count)
        for part in ("projections", "scorers"):  # one adapter a teacher: make them alike
            for adapter in list(getattr(loss, part, []))[1:]:
                adapter.load_state_dict(getattr(loss, part)[0].state_dict())
        values.append(loss(student, uniform([teacher] * count), torch.tensor([0, 1, 2])))
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("gram", reference.similarity_distance),
        ("pkt", reference.probabilistic_distance),
        (
            "relational",
            lambda s, t: (
                25 * reference.relational_distance(s, t) + 50 * reference.relational_angle(s, t)
            ),
        ),
        ("nst", lambda s, t: reference.selectivity_distance(s, t).mean()),
    ],
)
def test_losses_without_adapters_are_the_weighted_mean_of_the_reference(name, slow):
    student, teachers = knowledge(3), [knowledge(4), knowledge(2)]
    weights = torch.tensor([[0.9, 0.3, 0.6], [0.1, 0.7, 0.4]])  # of samples; their mean counts here
    got = MAKE[name]()(student, TeacherOutputs(teachers, weights.mean(1)), None)

    def flat(k):
        return k.features["a"] if name == "nst" else k.features["a"].flatten(1)

    each = [slow(flat(student), flat(t)) for t in teachers]
    torch.testing.assert_close(got, 0.6 * each[0] + 0.4 * each[1], rtol=1e-4, atol=1e-6)
    if name != "nst":
        per_sample = MAKE[name]()(student, TeacherOutputs(teachers, weights), None)
        torch.testing.assert_close(per_sample, got)


def test_feed_is_the_unit_distance_of_a_transform_of_three_convolutions():
    loss, student, teacher = FEED("a", "a"), knowledge(3), knowledge(5)
    loss.build(student, [teacher])
    convolutions = [m for m in loss.transforms[0].modules() if isinstance(m, nn.Conv2d)]
    assert [c.kernel_size for c in convolutions] == [(3, 3)] * 3
    loss.eval()
    mapped = loss.transforms[0](student.features["a"])
    wanted = reference.unit_distance(mapped, teacher.features["a"]).mean()
    torch.testing.assert_close(loss(student, uniform([teacher]), None), wanted)


def test_meal_pushes_the_student_towards_what_the_discriminator_calls_a_teacher():
    """Public code leaves the reversal off, which makes the student easier to tell apart."""
    loss = MEAL("a", "a", similarity_weight=0.0)
    student, teacher = knowledge(4, grad=True, batch=8), knowledge(4, batch=8)
    loss.build(student, [teacher])
    loss(student, uniform([teacher]), None).backward()
    feature = student.features["a"]

    def told_apart(x):
        return F.softplus(
            loss.discriminators[0](loss.projections[0](global_average_pool(x)))
        ).mean()

    before = told_apart(feature)
    with torch.no_grad():
        assert told_apart(feature - 10 * feature.grad) > before  # a descent step fools it more
    discriminator = loss.discriminators[0]
    after = copy.deepcopy(discriminator)
    with torch.no_grad():
        for p, g in zip(after.parameters(), discriminator.parameters(), strict=True):
            p -= 0.1 * g.grad
        mapped, real = (
            loss.projections[0](global_average_pool(feature)),
            global_average_pool(teacher.features["a"]),
        )

        def bce(d):
            return (F.softplus(-d(real)) + F.softplus(d(mapped))).mean()

        assert bce(after) < bce(discriminator)  # while its own step tells them apart better


def test_meal_similarity_is_the_divergence_of_softmaxed_features():
    loss = MEAL("a", "a", adversarial_weight=0.0)
    student, teacher = knowledge(3), knowledge(4)
    loss.build(student, [teacher])
    mapped = loss.projections[0](global_average_pool(student.features["a"]))
    wanted = reference.kl_divergence(mapped, global_average_pool(teacher.features["a"])).mean()
    torch.testing.assert_close(loss(student, uniform([teacher]), None), wanted)


def test_learned_gram_weights_follow_the_agreement_with_the_gradient_of_the_labels():
    labels = torch.arange(12) % 3
    clean = F.one_hot(labels, 3).float()
    for seed in range(10):
        torch.manual_seed(seed)
        good, bad = (NetworkOutput(clean, {"a": f}) for f in (clean, torch.randn(12, 3)))
        loss = GramLoss("a", "a", learn_weights=True, learning_rate=0.05)
        feature = torch.randn(12, 3, requires_grad=True)
        student = NetworkOutput(3 * feature, {"a": feature})
        loss.build(student, [good, bad])
        loss(student, uniform([good, bad]), labels).backward()
        task = torch.autograd.grad(F.cross_entropy(3 * feature, labels), feature)[0].flatten()
        step = []
        for teacher in (good, bad):
            value = reference.similarity_distance(feature, teacher.features["a"])
            grad = torch.autograd.grad(value, feature)[0].flatten()
            step.append(0.05 * float(grad @ task / (grad.norm() * task.norm())))
        # on two weights the nearest point of the simplex shares out the rest equally
        wanted = torch.tensor([0.5 + (step[0] - step[1]) / 2, 0.5 + (step[1] - step[0]) / 2])
        torch.testing.assert_close(loss.trust, wanted, atol=1e-5, rtol=0)
    assert "trust" in loss.state_dict()


def test_learned_gram_weights_need_a_layer_that_the_logits_depend_on():
    loss = GramLoss("a", "a", learn_weights=True)
    teacher, feature = knowledge(3), torch.randn(3, 2, requires_grad=True)
    student = NetworkOutput(torch.randn(3, 4, requires_grad=True), {"a": feature})
    loss.build(student, [teacher])
    with pytest.raises(ValueError, match="depend on 'a'"):
        loss(student, uniform([teacher]), torch.tensor([0, 1, 2]))


def test_knowledge_flow_mixes_only_while_training_and_lets_go_of_the_teachers(tiny):
    student, x = tiny(4), torch.randn(3, 1, 8, 8)
    student.eval()
    alone = student(x)
    loss = KnowledgeFlow("relu", "relu", weight=1.0)
    mine = NetworkOutput(alone, {"relu": torch.randn(3, 4, 4, 4)})
    teachers = [NetworkOutput(alone, {"relu": torch.randn(3, w, 4, 4)}) for w in (5, 6)]
    loss.build(mine, teachers)
    loss.attach(student, [])
    assert torch.equal(student(x), alone)
    loss.before_student(teachers, (0, 1))
    mixed = student(x)
    assert not torch.allclose(mixed, alone)
    value = loss(NetworkOutput(mixed), uniform(teachers), None)
    assert float(value) == pytest.approx(torch.log(torch.tensor(3.0)).item())  # -log(1 / 3)
    (mixed.sum() + value).backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert torch.equal(student(x), alone)  # after the loss nobody flows in
    with torch.no_grad():
        loss.scores[0] = 30.0
    loss.before_student(teachers, (0, 1))
    torch.testing.assert_close(student(x), alone, atol=1e-4, rtol=1e-4)
    assert float(loss.independence) > 0.999
    twin = copy.deepcopy(student)  # an export
    assert torch.equal(twin(x), alone)


def test_knowledge_flow_of_one_of_two_teachers_uses_its_own_projection(tiny):
    student, x = tiny(4).eval(), torch.randn(2, 1, 8, 8)
    loss = KnowledgeFlow("relu", "relu")
    teachers = [NetworkOutput(student(x), {"relu": torch.randn(2, w, 4, 4)}) for w in (5, 6)]
    loss.build(NetworkOutput(student(x), {"relu": torch.randn(2, 4, 4, 4)}), teachers)
    loss.attach(student, [])
    loss.before_student(teachers[1:], (1,))
    assert student(x).isfinite().all()
    only = TeacherOutputs(teachers[1:], torch.ones(1), "probability", (1,))
    value = loss(NetworkOutput(student(x)), only, None)
    assert float(value) == pytest.approx(torch.log(torch.tensor(2.0)).item())


@pytest.mark.parametrize("edges", ["sample", "vertex"])
def test_graph_edges_start_equal_sum_to_one_and_learn(edges):
    student, teachers = knowledge(3, grad=True), [knowledge(4), knowledge(5)]
    loss = GraphDistillation("a", "a", edges=edges, feature_weight=0.0)
    loss.build(student, teachers)
    t = 4.0
    each = [t**2 * reference.kl_divergence(student.logits, m.logits, t, t) for m in teachers]
    value = loss(student, uniform(teachers), None)
    torch.testing.assert_close(value, (each[0].mean() + each[1].mean()) / 2)
    value.backward()
    assert sum(float(p.grad.abs().sum()) for p in loss.scorers.parameters()) > 0
    with_self = GraphDistillation("a", "a", edges=edges, feature_weight=0.0, self_edge=True)
    with_self.build(student, teachers)
    torch.testing.assert_close(with_self(student, uniform(teachers), None), value * 2 / 3)


def test_graph_feature_distances():
    student, teacher = knowledge(3), knowledge(4)
    for distance in ("cosine", "mmd"):
        loss = GraphDistillation("a", "a", distance=distance, logit_weight=0.0)
        loss.build(student, [teacher])
        s = loss.projections[0](global_average_pool(student.features["a"]))
        t = global_average_pool(teacher.features["a"])
        if distance == "cosine":
            wanted = sum(1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(s, t, strict=True)) / 3
        else:

            def k(xs, ys):
                return sum(((x / x.norm()) @ (y / y.norm())) ** 2 for x in xs for y in ys) / 9

            wanted = k(s, s) + k(t, t) - 2 * k(s, t)
        torch.testing.assert_close(loss(student, uniform([teacher]), None), wanted)


def test_confident_hint_weighs_by_the_teachers_own_classifiers(tiny):
    networks = [tiny(6).eval().requires_grad_(False), tiny(8).eval().requires_grad_(False)]
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    flat = [network.relu(network.bn(network.conv(x))).flatten(1) for network in networks]
    teachers = [NetworkOutput(n(x), {"f": f}) for n, f in zip(networks, flat, strict=True)]
    student = NetworkOutput(torch.randn(4, 10), {"s": torch.randn(4, 5, requires_grad=True)})
    loss = ConfidentHint("s", "f", "linear")
    loss.build(student, teachers)
    loss.attach(None, networks)
    value = loss(student, uniform(teachers), y)
    adapted = [p(student.features["s"]) for p in loss.projections]
    weights = reference.confidence_weights(
        [n.linear(a) for n, a in zip(networks, adapted, strict=True)], y
    )
    each = [reference.hint_distance(a, f, 2) for a, f in zip(adapted, flat, strict=True)]
    torch.testing.assert_close(value, (weights * torch.stack(each)).sum(0).mean())
    value.backward()
    assert student.features["s"].grad.abs().sum() > 0
    assert all(p.grad is None for n in networks for p in n.parameters())
    assert not any("classifier" in k or "linear" in k for k in loss.state_dict())
    with pytest.raises(ValueError, match="one teacher_classifier for each"):
        ConfidentHint("s", "f", ["linear"]).attach(None, networks)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_stay_finite(name, dtype):
    loss, student, teachers = MAKE[name](), knowledge(3, grad=True), [knowledge(4), knowledge(5)]
    loss.build(student, teachers)

    def half(k):
        feature = (100 * k.features["a"]).to(dtype)
        return NetworkOutput(global_average_pool(feature)[:, :2].repeat(1, 2), {"a": feature})

    with torch.autocast("cpu", dtype):
        value = loss(half(student), uniform([half(t) for t in teachers]), torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert student.features["a"].grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FEED("a", "a", depth=0), "depth >= 1"),
        (lambda: GramLoss("a", "a", metric="cosine"), "log_euclidean"),
        (lambda: GraphDistillation("a", "a", edges="none"), "Expected edges"),
        (lambda: GraphDistillation("a", "a", distance="l2"), "Expected distance"),
        (lambda: GraphDistillation("a", "a", temperature=0), "temperature > 0"),
    ],
)
def test_bad_options_are_reported(make, message):
    with pytest.raises(ValueError, match=message):
        make()
