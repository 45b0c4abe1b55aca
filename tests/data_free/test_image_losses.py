import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_kd.data_free.generators import Pixels
from lightning_kd.data_free.image_losses import (
    Activation,
    Adversarial,
    BatchNormStatistics,
    ClassBalance,
    Contrastive,
    ImageLoss,
    ImageLossInputs,
    OneHot,
    TotalVariation,
)
from lightning_kd.data_free.statistics import InputStatistics
from lightning_kd.functional import channel_statistics, resized_crop, statistics_gap
from lightning_kd.modules import DataFree
from lightning_kd.outputs import NetworkOutput
from tests import reference

NOTHING = (torch.empty(0), lambda images: images)
DISTANCES = ["kl", "l1", "js"]


class Layers(nn.Module):
    """Convolutions and BatchNorm layers, one of them without statistics."""

    def __init__(self, classes=4):
        super().__init__()
        self.first = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.second = nn.BatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.linear = nn.Linear(3 * 16, 5)
        self.third = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, classes)

    def forward(self, x):
        x = self.plain(self.second(self.conv(self.first(x))).relu())
        return self.last(self.third(self.linear(x.flatten(1))))


def layers(dtype=torch.float64):
    """In eval mode, frozen, with statistics that are not those of a new layer."""
    network = Layers().to(dtype).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network


def hooks_of(network):
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
        for m in network.modules()
    )


def inputs_of(network):
    """What each BatchNorm layer with statistics is given, by wrapping its forward."""
    noted = []

    def watch(layer):
        original = layer.forward

        def forward(x):
            noted.append((layer, x.detach()))
            return original(x)

        layer.forward = forward

    for layer in (network.first, network.second, network.third):
        watch(layer)
    return noted


def seen(
    logits=None, target=None, student=None, images=None, statistics=(), share=None, features=None
):
    """A batch in the making of which only this matters."""
    if images is None:
        images = torch.rand(2, 1, 4, 4)
    logits = torch.zeros(len(images), 3) if logits is None else logits
    return ImageLossInputs(
        images,
        target,
        NetworkOutput(logits, features or {}),
        None if student is None else NetworkOutput(student),
        list(statistics),
        share,
    )


def doubles(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


# ---------------------------------------------------------------------- input statistics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_measured_statistics_equal_the_reference(dtype):
    network = layers(dtype)
    noted = inputs_of(network)
    measure = InputStatistics(network)
    assert measure.layers == [network.first, network.second, network.third]
    with measure.measured() as found:
        network(torch.randn(6, 1, 4, 4, dtype=dtype))
    assert len(found) == len(noted) == 3
    for (mean, variance, wanted_mean, wanted_variance), (layer, values) in zip(
        found, noted, strict=True
    ):
        assert mean.dtype == variance.dtype == dtype
        slow = reference.channel_statistics(values)
        torch.testing.assert_close((mean, variance), tuple(s.to(dtype) for s in slow))
        assert torch.equal(wanted_mean, layer.running_mean)
        assert torch.equal(wanted_variance, layer.running_var)


def test_measured_statistics_are_in_full_precision_under_autocast():
    network = layers(torch.float32)
    network.first.running_mean.fill_(-30.0)  # far off, where half precision is missed
    noted = inputs_of(network)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        InputStatistics(network).measured() as found,
    ):
        network(torch.randn(16, 1, 4, 4))
    assert noted[1][1].dtype == torch.bfloat16
    for (mean, variance, *_), (_, values) in zip(found, noted, strict=True):
        assert mean.dtype == variance.dtype == torch.float32
        slow = reference.channel_statistics(values)
        torch.testing.assert_close(
            (mean, variance), tuple(s.float() for s in slow), rtol=1e-5, atol=1e-6
        )


def test_measured_statistics_do_not_overflow_in_half_precision():
    network = nn.Sequential(nn.BatchNorm2d(2)).half().eval()
    images = torch.full((4, 2, 8, 8), 400.0).half()
    images[:, :, ::2] = -400.0
    with InputStatistics(network).measured() as found:
        network(images)
    assert float(found[0][1][0]) == 160_000.0
    assert torch.isfinite(statistics_gap(found))


def test_gradients_of_the_gap_equal_the_reference():
    network, images = layers(), doubles(3, 1, 4, 4)
    with InputStatistics(network).measured() as found:
        network(images)
    ours = torch.autograd.grad(statistics_gap(found), images)[0]
    network = copy.deepcopy(network)
    x, slow = images, []
    for layer, between in (
        (network.first, network.conv),
        (network.second, lambda y: network.linear(network.plain(y.relu()).flatten(1))),
        (network.third, lambda y: y),
    ):
        mean, variance = reference.channel_statistics(x)
        slow.append((mean, variance, layer.running_mean, layer.running_var))
        x = between(layer(x))
    theirs = torch.autograd.grad(reference.statistics_gap(slow), images)[0]
    torch.testing.assert_close(ours, theirs)


def test_nothing_is_measured_outside(monkeypatch):
    network = layers()
    measure = InputStatistics(network)
    network(torch.randn(2, 1, 4, 4).double())
    with measure.measured() as found:
        assert hooks_of(network) == 3
    assert hooks_of(network) == 0

    def forbidden(*_, **__):
        raise AssertionError("statistics were computed")

    monkeypatch.setattr("lightning_kd.data_free.statistics.channel_statistics", forbidden)
    network(torch.randn(2, 1, 4, 4).double())
    assert found == []


def test_hooks_are_removed_when_something_fails():
    network = layers()
    with pytest.raises(RuntimeError), InputStatistics(network).measured():
        network(torch.randn(2, 7, 4, 4).double())
    assert hooks_of(network) == 0


def test_each_measurement_begins_anew():
    network = layers()
    measure = InputStatistics(network)
    with measure.measured() as first:
        network(torch.randn(2, 1, 4, 4).double())
    kept = list(first)
    with measure.measured() as second:
        network(torch.randn(2, 1, 4, 4).double())
    assert len(first) == len(second) == 3
    assert all(a is b for a, b in zip(first, kept, strict=True))
    assert not torch.equal(first[0][0], second[0][0])


def test_measuring_changes_neither_answers_nor_statistics():
    network, images = layers(), torch.randn(3, 1, 4, 4).double()
    before, state = network(images), copy.deepcopy(network.state_dict())
    with InputStatistics(network).measured():
        assert torch.equal(network(images), before)
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def test_images_of_the_wanted_statistics_have_no_gap_and_a_finite_gradient():
    network = nn.Sequential(nn.BatchNorm2d(2)).double().eval()
    images = doubles(5, 2, 3, 3)
    mean, variance = channel_statistics(images.detach())
    network[0].running_mean.copy_(mean)
    network[0].running_var.copy_(variance)
    with InputStatistics(network).measured() as found:
        network(images)
    value = BatchNormStatistics()(seen(images=images, statistics=found))
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(images.grad, torch.zeros_like(images))


def test_a_network_without_statistics_has_no_layers():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert InputStatistics(network).layers == []


# ---------------------------------------------------------------------- BatchNorm


def gradient(term, network, images):
    """Value of the term and its gradient at these images."""
    images = images.detach().requires_grad_()
    with InputStatistics(network).measured() as found:
        network(images)
    value = term(seen(images=images, statistics=found))
    return value.detach(), torch.autograd.grad(value, images)[0]


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_momentum_shrinks_the_gradient_from_the_second_round_on(momentum):
    network, images = layers(), torch.randn(4, 1, 4, 4).double()
    plain, term = BatchNormStatistics(), BatchNormStatistics(momentum=momentum)
    value, whole = gradient(plain, network, images)
    plain.after_round(*NOTHING)
    torch.testing.assert_close(gradient(term, network, images), (value, whole))
    # until the round is over nothing is remembered
    torch.testing.assert_close(gradient(term, network, images), (value, whole))
    for _ in range(3):
        term.after_round(*NOTHING)
        again, part = gradient(term, network, images)
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(part, (1 - momentum) * whole)
    torch.testing.assert_close(gradient(plain, network, images), (value, whole))


def test_the_running_statistics_move_as_said():
    """What is compared is .9 times the running mean plus .1 times the batch."""
    network, term, running = layers(), BatchNormStatistics(momentum=0.9), None
    for _ in range(4):
        images = torch.randn(4, 1, 4, 4).double()
        noted = inputs_of(copied := copy.deepcopy(network))
        copied(images)
        now = [s for _, values in noted for s in reference.channel_statistics(values)]
        compared = now
        if running is not None:
            compared = [0.1 * a + 0.9 * b for a, b in zip(now, running, strict=True)]
        wanted = [
            (layer.running_mean, layer.running_var)
            for layer in (network.first, network.second, network.third)
        ]
        slow = reference.statistics_gap(
            [(compared[2 * k], compared[2 * k + 1], *wanted[k]) for k in range(3)]
        )
        value, _ = gradient(term, network, images)
        torch.testing.assert_close(value, slow)
        term.after_round(*NOTHING)
        running = compared


def test_running_statistics_go_through_a_checkpoint():
    network = layers()
    term, other = (BatchNormStatistics(momentum=0.9) for _ in range(2))
    for _ in range(2):
        gradient(term, network, torch.randn(4, 1, 4, 4).double())
        term.after_round(*NOTHING)
    assert not list(term.buffers())  # which several processes would overwrite
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    for _ in range(2):
        images = torch.randn(4, 1, 4, 4).double()
        for a, b in zip(
            gradient(term, network, images), gradient(other, network, images), strict=True
        ):
            assert torch.equal(a, b)
        term.after_round(*NOTHING)
        other.after_round(*NOTHING)


def test_running_statistics_follow_the_network_after_a_checkpoint():
    """A checkpoint lies on the CPU, the statistics of the next round on the accelerator."""
    term = BatchNormStatistics(momentum=0.9)
    term.set_extra_state({"running": [torch.zeros(2), torch.ones(2)]})
    layer = [torch.ones(2, device="meta") for _ in range(4)]
    term(seen(statistics=[tuple(layer)]))
    term.after_round(*NOTHING)
    assert [value.device.type for value in term._running] == ["meta", "meta"]
    term(seen(statistics=[tuple(layer)]))


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5])
def test_bad_momentum_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum"):
        BatchNormStatistics(momentum=momentum)


# ---------------------------------------------------------------------- one hot


def slow_one_hot(logits, target, contents, gamma, detach, normalize, temperature):
    losses = (
        reference.soft_cross_entropy(logits / temperature, target)
        if target.dim() == 2
        else reference.cross_entropy(logits / temperature, target)
    )
    rows = [reference.modulating_weight(row, contents, gamma) for row in logits]
    phi = torch.stack([row + 0 * logits.sum() for row in rows])
    phi = phi.detach() if detach else phi
    if normalize:
        phi = phi / (sum(phi) / len(phi))
    return sum(p * loss for p, loss in zip(phi, losses, strict=True)) / len(losses)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_modulated_one_hot_equals_the_reference(soft, detach, normalize, gamma, temperature):
    logits, contents = doubles(6, 4, scale=2), [0, 0, 1, 2, 2, 2, 2]
    target = torch.randn(6, 4).double().softmax(1) if soft else torch.randint(0, 4, (6,))
    share = torch.bincount(torch.tensor(contents), minlength=4).double() / len(contents)
    term = OneHot(
        modulate=True, gamma=gamma, detach=detach, normalize=normalize, temperature=temperature
    )
    ours = term(seen(logits, target, share=share))
    slow = slow_one_hot(logits, target, contents, gamma, detach, normalize, temperature)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(slow, logits))


@pytest.mark.parametrize("soft", [False, True])
def test_plain_one_hot_is_cross_entropy_whatever_is_remembered(soft):
    logits = doubles(5, 3)
    target = torch.randn(5, 3).double().softmax(1) if soft else torch.randint(0, 3, (5,))
    slow = reference.soft_cross_entropy if soft else reference.cross_entropy
    value = OneHot()(seen(logits, target, share=torch.tensor([0.9, 0.1, 0.0])))
    torch.testing.assert_close(value, slow(logits, target).mean())


def test_one_hot_by_hand():
    """Probabilities .5, .3, .2; the memory holds class 0 alone at 60 percent."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    share = torch.tensor([0.6, 0.2, 0.2]).double()
    value = OneHot(modulate=True, gamma=2.0)(seen(logits, torch.tensor([1]), share=share))
    torch.testing.assert_close(
        value, 0.4 * 0.5**2 * -torch.tensor(0.3).log().double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("share", [None, torch.zeros(4).double()])
def test_without_memories_only_the_difficulty_counts(share):
    logits, target = doubles(5, 4), torch.randint(0, 4, (5,))
    hard = 1 - logits.detach().softmax(1).amax(1)
    losses = reference.cross_entropy(logits, target)
    value = OneHot(modulate=True)(seen(logits, target, share=share))
    torch.testing.assert_close(value, (hard * losses).mean())


def test_detaching_changes_the_gradient_and_not_the_value():
    logits, target = doubles(5, 4), torch.randint(0, 4, (5,))
    values, gradients = [], []
    for detach in (True, False):
        value = OneHot(modulate=True, detach=detach)(seen(logits, target))
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, logits)[0])
    assert torch.equal(*values)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_certain_teacher_gives_finite_gradients(gamma, detach, normalize):
    logits = torch.tensor([[900.0, 0.0, -900.0]] * 2).requires_grad_()
    term = OneHot(modulate=True, gamma=gamma, detach=detach, normalize=normalize)
    value = term(seen(logits, torch.tensor([0, 2])))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_normalized_weights_have_mean_one():
    logits = torch.randn(6, 4).double()
    target = torch.zeros(6, dtype=torch.long)
    same = torch.zeros(6, 4).double()  # where all losses are equal only the mean weight matters
    assert float(OneHot(modulate=True, normalize=True)(seen(same, target))) == pytest.approx(
        float(OneHot()(seen(same, target)))
    )
    term = OneHot(modulate=True, normalize=True)
    term(seen(logits, target))
    torch.testing.assert_close(term.phi, 1 - logits.softmax(1).amax(1))


@pytest.mark.parametrize("options", [{"gamma": -0.1}, {"temperature": 0.0}])
def test_bad_numbers_of_one_hot_are_refused(options):
    with pytest.raises(ValueError, match="gamma >= 0 and temperature > 0"):
        OneHot(**options)


def test_one_hot_is_in_full_precision_under_autocast():
    logits, target = torch.randn(8, 5).bfloat16(), torch.randint(0, 5, (8,))
    for options in ({}, {"temperature": 3.0}, {"modulate": True}):
        term = OneHot(**options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = term(seen(logits, target))
        torch.testing.assert_close(found, term(seen(logits.float(), target)), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------- adversarial


def slow_distance(student, teacher, distance, temperature):
    if distance == "kl":
        return reference.kl_divergence(student, teacher, temperature, temperature)
    if distance == "l1":
        return reference.logit_l1(student, teacher)
    return reference.jensen_shannon_of_logits(student, teacher, temperature)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_adversarial_equals_the_reference(distance, masked, temperature):
    student, teacher = doubles(9, 3), doubles(9, 3)
    term = Adversarial(distance=distance, masked=masked, temperature=temperature)
    ours = term(seen(teacher, student=student))
    rows = slow_distance(student, teacher, distance, temperature)
    first = [[row.index(max(row)) for row in z.tolist()] for z in (student, teacher)]
    agreeing = [k for k in range(9) if not masked or first[0][k] == first[1][k]]
    assert 0 < len(agreeing) < 9 or not masked
    slow = -sum(rows[k] for k in agreeing) / 9
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (student, teacher)),
        torch.autograd.grad(slow, (student, teacher)),
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_adversarial_is_negative_where_networks_differ(distance):
    """Public code once gave the teacher as the student, so that the term was always 0."""
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    assert Adversarial.reads_student
    assert float(Adversarial(distance=distance)(seen(teacher, student=student))) < -0.01
    assert float(Adversarial(distance=distance)(seen(teacher, student=teacher))) == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_only_agreeing_images_count(distance):
    teacher = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0]]).double().requires_grad_()
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).double().requires_grad_()
    masked = Adversarial(distance=distance, masked=True)
    value = masked(seen(teacher, student=student))
    alone = Adversarial(distance=distance)(seen(teacher[:1], student=student[:1]))
    torch.testing.assert_close(value, alone / 3)
    value.backward()
    for x in (teacher, student):
        assert (x.grad[0] != 0).any()
        assert (x.grad[1:] == 0).all()
    nobody = masked(seen(teacher[1:], student=student[1:]))
    assert float(nobody.detach()) == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_images_drive_student_and_teacher_apart(distance):
    torch.manual_seed(3)
    teacher, student = (layers(torch.float32) for _ in range(2))
    source, term = Pixels(0.05, shift=0), Adversarial(distance=distance)
    source.start_round(8, (1, 4, 4), torch.Generator().manual_seed(0))
    apart = []
    for _ in range(25):
        images = source()
        logits, answer = teacher(images), student(images)
        apart.append(float(slow_distance(answer.detach(), logits.detach(), distance, 1.0).mean()))
        source.step(term(seen(logits, student=answer, images=images)), None)
    assert apart[0] > 0
    assert apart[-1] > 1.05 * apart[0]
    assert all(p.grad is None for n in (teacher, student) for p in n.parameters())


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_module_asks_its_student_not_its_teacher(distance):
    torch.manual_seed(0)
    student, teacher = Layers(), Layers()
    module = DataFree(student, teacher, Pixels(), [Adversarial(distance=distance)], warm_up=0)
    images = torch.rand(6, 1, 4, 4)
    module._build(images)
    module.eval()
    target = torch.zeros(6, dtype=torch.long)
    losses = module.synthesizer.compute_losses(
        module.distillation, images.requires_grad_(), target, None, False, torch.Generator()
    )
    found = losses["adversarial"]
    slow = slow_distance(student(images), teacher.eval()(images), distance, 1.0).mean()
    torch.testing.assert_close(found, -slow, rtol=1e-4, atol=1e-6)
    assert float(found.detach()) < 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_adversarial_is_in_full_precision_under_autocast(distance):
    student, teacher = torch.randn(8, 5).bfloat16(), torch.randn(8, 5).bfloat16()
    term = Adversarial(distance=distance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = term(seen(teacher, student=student))
    wide = term(seen(teacher.float(), student=student.float()))
    torch.testing.assert_close(found, wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_sure_networks_give_finite_gradients(distance):
    student = torch.tensor([[900.0, 0.0, -900.0]] * 2).requires_grad_()
    teacher = torch.tensor([[900.0, 0.0, -900.0], [-900.0, 0.0, 900.0]]).requires_grad_()
    value = Adversarial(distance=distance)(seen(teacher, student=student))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(teacher.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"distance": "l2"}, "distance"), ({"temperature": 0.0}, "temperature")],
)
def test_bad_choices_of_adversarial_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adversarial(**options)


# ---------------------------------------------------------------------- the others


def test_class_balance_and_total_variation_equal_the_reference():
    logits, images = doubles(5, 4, scale=2), doubles(2, 3, 4, 5)
    for term, batch, slow, x in (
        (ClassBalance(), seen(logits), reference.class_balance, logits),
        (TotalVariation(), seen(images=images), reference.total_variation, images),
    ):
        ours, theirs = term(batch), slow(x)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def test_activation_is_the_negative_mean_response():
    feature = doubles(3, 4, 2)
    term = Activation("pool.last")
    assert list(term.teacher_layers()) == ["pool.last"]
    value = term(seen(features={"pool.last": feature}))
    slow = -sum(abs(v) for v in feature.flatten()) / feature.numel()
    torch.testing.assert_close(value.double(), slow, rtol=1e-5, atol=0)
    with pytest.raises(KeyError, match="was not recorded"):
        term(seen())


def test_terms_have_names_weights_and_say_what_they_read():
    terms = [
        Activation("x", 2.0), Adversarial(2.0), BatchNormStatistics(2.0), ClassBalance(2.0),
        OneHot(2.0), TotalVariation(2.0),
    ]  # fmt: skip
    assert [t.name for t in terms] == [
        "activation", "adversarial", "batch_norm_statistics", "class_balance", "one_hot",
        "total_variation",
    ]  # fmt: skip
    assert all(isinstance(t, ImageLoss) and t.weight == 2.0 for t in terms)
    assert [t.name for t in terms if t.reads_student] == ["adversarial"]
    assert [t.name for t in terms if t.waits] == ["adversarial"]
    assert [t.name for t in terms if t.reads_statistics] == ["batch_norm_statistics"]


def test_weights_multiply_in_the_loss_alone():
    """Terms are unweighted; who adds them up weighs them."""
    logits = torch.randn(4, 3)
    assert torch.equal(ClassBalance(7.0)(seen(logits)), ClassBalance()(seen(logits)))


# ---------------------------------------------------------------------- contrastive


def test_descriptions_are_means_of_each_image():
    network = layers()
    noted = inputs_of(network)
    with InputStatistics(network).described() as found:
        network(torch.randn(5, 1, 4, 4).double())
    for mine, (_, values) in zip(found, noted, strict=True):
        slow = [[channel.mean() for channel in image.flatten(1)] for image in values.unsqueeze(-1)]
        torch.testing.assert_close(mine, torch.tensor(slow, dtype=torch.float64))
    assert hooks_of(network) == 0


def contrast(term, network, images, seed=0):
    """Value of a contrastive term as the module asks for it."""
    measure = InputStatistics(network)

    def describe(x):
        with measure.described() as found:
            network(x)
        return torch.cat(found, 1)

    made = seen(images=images)
    random = torch.Generator().manual_seed(seed)
    return term(replace(made, description=describe(images), describe=describe, random=random))


def contrastive(**options):
    term = Contrastive(**{"width": 4, "bank": 7, "negatives": 7, **options})
    term.build(torch.zeros(1, 9, dtype=torch.float64))
    return term


def test_contrastive_equals_the_reference_and_remembers_so_many():
    network, term = layers(), contrastive()
    bank = torch.empty(0, 9, dtype=torch.float64)

    def describe(x):
        noted = inputs_of(copied := copy.deepcopy(network))
        copied(x)
        return torch.cat([v.reshape(3, v.shape[1], -1).mean(2) for _, v in noted], 1)

    for _ in range(4):
        images = torch.rand(3, 1, 4, 4).double()
        value = contrast(term, network, images)
        whole = describe(images)
        draws = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
        crop = describe(resized_crop(images, draws, 0.25))
        others = torch.cat([whole, bank])
        slow = reference.info_nce(term.head(crop), term.head(others).detach(), 0.1).mean()
        torch.testing.assert_close(value, slow)
        learned = list(term.head.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(value, learned), torch.autograd.grad(slow, learned)
        )
        term.after_round(images, describe)
        bank = torch.cat([bank, whole])[-7:]
        torch.testing.assert_close(term._bank, bank)


def test_contrastive_gives_gradients_to_images_and_head():
    network, term = layers(), contrastive()
    images = torch.rand(4, 1, 4, 4).double().requires_grad_()
    contrast(term, network, images).backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(float(p.grad.abs().sum()) > 0 for p in term.head.parameters())


def test_contrastive_spreads_equal_images_apart():
    """Descending it makes images more different, as the teacher describes them."""
    network, term = layers(), contrastive()
    images = (torch.rand(1, 1, 4, 4) + 0.01 * torch.randn(6, 1, 4, 4)).double().requires_grad_()
    optimizer = torch.optim.Adam([images, *term.parameters()], lr=0.05)
    before = float(images.detach().std(0).mean())
    for step in range(40):
        optimizer.zero_grad()
        contrast(term, network, images, step).backward()
        optimizer.step()
    assert float(images.detach().std(0).mean()) > 2 * before


def test_contrastive_goes_through_a_checkpoint():
    network, term = layers(), contrastive(bank=5)
    for _ in range(2):
        term.after_round(torch.rand(3, 9).double(), lambda images: images)
    other = contrastive(bank=5)
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    images = torch.rand(3, 1, 4, 4).double()
    assert torch.equal(contrast(term, network, images), contrast(other, network, images))
    assert not list(term.buffers())  # which several processes would overwrite


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature and learning_rate > 0"),
        ({"learning_rate": -1.0}, "temperature and learning_rate > 0"),
        ({"smallest": 0.0}, "smallest in"),
        ({"width": 0}, "whole numbers"),
        ({"bank": -1}, "whole numbers"),
        ({"negatives": 2.5}, "whole numbers"),
    ],
)
def test_bad_numbers_of_contrastive_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Contrastive(**options)
