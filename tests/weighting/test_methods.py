"""Confidence, Entropy, LowestLoss, GradientSpace, Switching, LearnedGate, SelfPaced, ..."""

import collections

import pytest
import torch

from lightning_kd.losses import SoftTarget
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.weighting import (
    AttentionOverLayers,
    Confidence,
    DomainSimilarity,
    Entropy,
    GradientSpace,
    LearnedGate,
    LowestLoss,
    SelfPaced,
    Switching,
    Uniform,
    save_domain,
)
from tests import reference

MAKE = {
    "attention": lambda: AttentionOverLayers("a", "a"),
    "confidence": Confidence,
    "entropy": Entropy,
    "gradient_space": lambda: GradientSpace(c_max=1.0),
    "learned_gate": lambda: LearnedGate("a"),
    "lowest_loss": LowestLoss,
    "self_paced": SelfPaced,
    "switching": Switching,
    "uniform": Uniform,
}


def knowledge(batch=4, classes=3, width=2, scale=3.0):
    logits = scale * torch.randn(batch, classes)
    return NetworkOutput(logits, {"a": torch.randn(batch, width, 2, 2)})


def weigh(weighting, teachers, student, target):
    weighting.build(student, teachers)
    indices = list(weighting.active(len(teachers)))
    return weighting(student, [teachers[m] for m in indices], target), indices


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("m", "batch", "classes"), [(1, 1, 2), (1, 4, 3), (3, 1, 2), (3, 5, 4)])
@pytest.mark.parametrize("labels", ["all", "some", "none"])
def test_weights_sum_to_one_and_identical_teachers_give_the_single_teacher_loss(
    name, m, batch, classes, labels
):
    weighting, student, teacher = MAKE[name](), knowledge(batch, classes), knowledge(batch, classes)
    target = None if labels == "none" else torch.randint(0, classes, (batch,))
    if labels == "some":
        target[0] = -1
    weights, indices = weigh(weighting, [teacher] * m, student, target)
    assert weights.shape in ((len(indices),), (len(indices), batch))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights.sum(0)))
    teachers = TeacherOutputs([teacher] * len(indices), weights, "probability", indices)
    one = SoftTarget()(student, TeacherOutputs([teacher], torch.ones(1)), target)
    torch.testing.assert_close(SoftTarget()(student, teachers, target), one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["confidence", "entropy", "gradient_space", "lowest_loss"])
def test_weights_move_with_their_teachers(name):
    student, teachers = knowledge(), [knowledge() for _ in range(4)]
    target, order = torch.tensor([0, 1, 2, -1]), [2, 0, 3, 1]
    weights, _ = weigh(MAKE[name](), teachers, student, target)
    moved, _ = weigh(MAKE[name](), [teachers[m] for m in order], student, target)
    torch.testing.assert_close(moved, weights[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_and_half_precision_stay_finite(name, dtype):
    def extreme():
        logits = 30 * torch.sign(torch.randn(4, 3))
        return NetworkOutput(logits.to(dtype), {"a": torch.randn(4, 2, 2, 2).to(dtype)})

    student, teachers = extreme(), [extreme() for _ in range(3)]
    weighting = MAKE[name]()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        weights, _ = weigh(weighting, teachers, student, torch.tensor([0, 1, 2, -1]))
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.float().sum(0), torch.ones_like(weights.sum(0).float()))


def test_gradient_space_equals_the_gradients_of_the_losses():
    student, teachers = knowledge(), [knowledge() for _ in range(3)]
    gradients = torch.stack(
        [reference.soft_target_gradient(student.logits, t.logits, 4.0) for t in teachers]
    )
    weights, _ = weigh(GradientSpace(0.6, 4.0), teachers, student, None)
    wanted = torch.tensor(reference.min_norm_weights(gradients.double(), 0.6))
    torch.testing.assert_close(weights, wanted, atol=1e-4, rtol=0)
    units = gradients / gradients.norm(dim=1, keepdim=True)
    lengths = gradients.norm(dim=1)
    wanted = torch.tensor(reference.min_norm_weights(units.double(), 0.6)) / lengths
    weights, _ = weigh(GradientSpace(0.6, 4.0, normalize=True), teachers, student, None)
    torch.testing.assert_close(weights, wanted / wanted.sum(), atol=1e-4, rtol=0)


def test_gradient_space_tells_of_too_many_teachers_or_too_small_a_bound():
    with pytest.raises(ValueError, match="at most 8 teachers"):
        GradientSpace().active(9)
    with pytest.raises(ValueError, match="c_max >= 1 / M"):
        GradientSpace(c_max=0.4).active(2)


def test_switching_runs_one_teacher_as_often_as_it_should_and_goes_on_after_a_checkpoint():
    weighting = Switching([3.0, 0.0, 1.0])
    drawn = [weighting.active(3) for _ in range(400)]
    assert all(len(d) == 1 for d in drawn)
    counts = collections.Counter(d[0] for d in drawn)
    assert counts[1] == 0
    assert 0.68 < counts[0] / 400 < 0.82
    twin = Switching([3.0, 0.0, 1.0])
    twin.load_state_dict(weighting.state_dict())
    assert [twin.active(3) for _ in range(50)] == [weighting.active(3) for _ in range(50)]
    weighting.eval()
    assert list(weighting.active(3)) == [0, 1, 2]
    weights = weighting(knowledge(), [knowledge()] * 3, None)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 0.25]))
    with pytest.raises(ValueError, match="one probability for each"):
        Switching([1.0]).active(2)
    with pytest.raises(ValueError, match="weights >= 0"):
        Switching([-1.0, 2.0])


def test_switching_expects_the_gradient_of_the_average():
    student, teachers = knowledge(), [knowledge() for _ in range(2)]
    z = student.logits.clone().requires_grad_()
    mean = SoftTarget()(NetworkOutput(z), TeacherOutputs(teachers, torch.full((2,), 0.5)), None)
    (wanted,) = torch.autograd.grad(mean, z)
    each = [
        torch.autograd.grad(
            SoftTarget()(NetworkOutput(z), TeacherOutputs([t], torch.ones(1)), None), z
        )[0]
        for t in teachers
    ]
    torch.testing.assert_close((each[0] + each[1]) / 2, wanted)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_gate_learns_from_the_labels_alone_and_finds_the_good_teacher(space):
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    good = NetworkOutput(3 * torch.nn.functional.one_hot(labels, 4).float())
    bad = NetworkOutput(3 * torch.randn(40, 4))
    student = NetworkOutput(torch.randn(40, 4, requires_grad=True))
    gate = LearnedGate(space=space)
    gate.build(student, [bad, good])
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)
    for _ in range(50):
        weights = gate(student, [bad, good], labels)
        assert not weights.requires_grad  # nothing flows in from the losses
        loss = gate.loss(TeacherOutputs([bad, good], weights, space), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert student.logits.grad is None
    assert float(gate(student, [bad, good], labels)[1].mean()) > 0.8


def test_gate_loss_is_the_cross_entropy_of_the_weighted_answer_over_labelled_samples():
    student, teachers = knowledge(), [knowledge(), knowledge()]
    target = torch.tensor([2, -1, 0, 1])
    gate = LearnedGate("a")
    gate.build(student, teachers)
    torch.nn.init.normal_(gate.gate.weight)
    w = gate(student, teachers, target)
    answer = w[0, :, None] * teachers[0].logits.softmax(1) + w[1, :, None] * teachers[
        1
    ].logits.softmax(1)
    wanted = -sum(answer[b, target[b]].log() for b in (0, 2, 3)) / 3
    loss = gate.loss(TeacherOutputs(teachers, w), target)
    torch.testing.assert_close(loss, wanted)
    gate(student, teachers, None)
    assert float(gate.loss(TeacherOutputs(teachers, w), None)) == 0.0


def test_attention_keeps_the_gradient_of_its_weights_and_of_nothing_else():
    student = NetworkOutput(torch.randn(4, 3), {"a": torch.randn(4, 2, 2, 2, requires_grad=True)})
    teachers = [knowledge(), knowledge(width=5)]
    attention = AttentionOverLayers("a", "a")
    attention.build(student, teachers)
    weights = attention(student, teachers, None)
    q = attention.query(student.features["a"].mean((2, 3)))
    scores = torch.stack(
        [
            (q * attention.keys[m](t.features["a"].mean((2, 3)))).sum(1) / 32**0.5
            for m, t in enumerate(teachers)
        ]
    )
    torch.testing.assert_close(weights, scores.softmax(0))
    TeacherOutputs(teachers, weights).average([torch.rand(4), torch.rand(4)]).backward()
    assert all(p.grad is not None for p in attention.parameters())
    assert student.features["a"].grad is None


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_self_paced_weights_equal_the_reference_and_stop_at_the_experts_level(threshold):
    classes, labels = [[0, 1], [2, 3]], torch.arange(40) % 4

    def right_on(rate):
        logits = torch.zeros(40, 4)
        for i, y in enumerate(labels.tolist()):
            logits[i, y if (i // 4) / 10 < rate[y // 2] else (y + 1) % 4] = 5.0
        return NetworkOutput(logits)

    student, experts = right_on([0.1, 0.6]), [right_on([0.8, 0.0]), right_on([0.0, 0.9])]
    paced = SelfPaced(threshold, classes=classes)
    paced.build(student, experts)
    assert paced.expert_weights.tolist() == [1.0, 1.0]
    paced.observe(student, experts, labels)
    paced.after_validation()
    wanted = [
        reference.self_paced_weight(0.1, 0.8, threshold),
        reference.self_paced_weight(0.6, 0.9, threshold),
    ]
    torch.testing.assert_close(paced.expert_weights, torch.tensor(wanted))
    assert float(paced.strength) == pytest.approx(sum(wanted) / 2)
    torch.testing.assert_close(paced(student, experts, None), torch.tensor(wanted) / sum(wanted))
    twin = SelfPaced(threshold, classes=classes)
    twin.build(student, experts)
    twin.load_state_dict(paced.state_dict())
    assert torch.equal(twin.expert_weights, paced.expert_weights)
    paced.observe(experts[0], experts, labels)  # the student has caught up with the first
    paced.after_validation()
    assert list(paced.active(2)) == [1]
    paced.observe(right_on([1.0, 1.0]), experts, labels)
    paced.after_validation()
    assert list(paced.active(2)) == []
    paced.fade = False  # then nobody is better than anybody else
    assert list(paced.active(2)) == [0, 1]
    assert paced.strength == 1.0
    paced.fade = True
    paced.eval()  # measured, the ensemble is of all
    assert list(paced.active(2)) == [0, 1]
    torch.testing.assert_close(paced(student, experts, None), torch.tensor([0.5, 0.5]))


def test_self_paced_finds_the_experts_classes_in_their_logits_and_ignores_unlabelled():
    first = torch.randn(4, 3)
    first[:, 2] = -torch.inf
    paced = SelfPaced()
    paced.build(knowledge(), [NetworkOutput(first), knowledge()])
    assert paced.known.tolist() == [[True, True, False], [True, True, True]]
    paced.observe(knowledge(), [NetworkOutput(first), knowledge()], torch.tensor([0, 2, -1, 2]))
    assert paced.counts[0].tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match="one list of classes for each of 2"):
        SelfPaced(classes=[[0]]).build(knowledge(), [knowledge()] * 2)
    with pytest.raises(ValueError, match="threshold in"):
        SelfPaced(1.0)


@pytest.mark.parametrize("divergence", ["jensen_shannon", "renyi", "mmd"])
def test_domain_similarity_prefers_the_teacher_of_the_same_domain(divergence, tiny, tmp_path):
    torch.manual_seed(0)
    network = tiny(8).eval()
    near = [torch.rand(32, 1, 8, 8) for _ in range(2)]
    far = [torch.rand(32, 1, 8, 8) * torch.linspace(0, 3, 8) - 1 for _ in range(2)]
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("near", "far")]
    for path, images in zip(paths, (near, far), strict=True):
        save_domain(path, network, "relu", images)
    weighting = DomainSimilarity(paths, "relu", divergence)
    assert list(weighting.active(2)) == [0, 1]
    torch.testing.assert_close(weighting(knowledge(), [knowledge()] * 2, None), torch.ones(2) / 2)
    weighting.calibrate([torch.rand(32, 1, 8, 8)], [network, network])
    weights = weighting(knowledge(), [knowledge()] * 2, None)
    assert float(weights.sum()) == pytest.approx(1)
    assert weights[0] > weights[1]
    kept = weights.clone()
    weighting.calibrate(far, [network, network])  # once only
    assert torch.equal(weighting.weights, kept)
    with pytest.raises(ValueError, match="one file and layer for each of 3"):
        weighting.active(3)
    with pytest.raises(FileNotFoundError, match="save_domain"):
        DomainSimilarity(["nowhere"], "relu")
    with pytest.raises(ValueError, match="jensen_shannon"):
        DomainSimilarity(paths, "relu", "wasserstein")
    other = DomainSimilarity(paths, "linear")
    with pytest.raises(ValueError, match="another network or layer"):
        other.calibrate(near, [network, network])
