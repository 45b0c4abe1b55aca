import copy
import math

import pytest
import torch
from torch import nn

from lightning_kd.data_free.generators import (
    BaseGenerator,
    Generator,
    MetaGenerator,
    Noise,
    Pixels,
)
from lightning_kd.data_free.targets import RandomLabels, TeacherLabels
from lightning_kd.models import ImageGenerator
from tests import reference
from tests.conftest import assert_same_state, state_of

SHAPE = (1, 8, 8)
METAS = ["fomaml", "reptile"]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """Noise to images of 1 x 2 x 2, with BatchNorm, in float64."""

    def __init__(self):
        super().__init__()
        self.latent = 3
        self.one = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.two = nn.Linear(6, 4)
        self.double()

    def forward(self, noise):
        return self.two(self.norm(self.one(noise)).tanh()).sigmoid().view(-1, 1, 2, 2)


def judge(images):
    """A loss of images whose value every pixel moves."""
    weights = torch.arange(1, images[0].numel() + 1, dtype=images.dtype).view_as(images[0])
    return (weights * (images - 0.2) ** 2).mean()


def generators():
    return [
        Generator(ImageGenerator(SHAPE, latent=6, width=4)),
        MetaGenerator(ImageGenerator(SHAPE, latent=6, width=4)),
    ]


def sources():
    return [*generators(), Noise(), Pixels()]


def name_of(source):
    return type(source).__name__


def a_round(source, optimizer=None, steps=3, count=4, shape=SHAPE, random=None):
    """The images and losses of each step of a round."""
    source.start_round(count, shape, random or draws())
    images, losses = [], []
    for _ in range(steps):
        made = source()
        loss = judge(made)
        images.append(made.detach().clone())
        losses.append(float(loss.detach()))
        source.step(loss, optimizer)
    source.end_round(optimizer)
    return images, losses


# ---------------------------------------------------------------------- all sources


@pytest.mark.parametrize("source", sources(), ids=name_of)
def test_a_round_gives_images_with_the_asked_shape(source):
    optimizer = source.make_optimizer()
    for count in (4, 2):
        images, _ = a_round(source, optimizer, count=count)
        for made in images:
            assert made.shape == (count, *SHAPE)
            assert made.min() >= 0
            assert made.max() <= 1


@pytest.mark.parametrize("make", range(4))
def test_rounds_depend_on_the_given_random_generator_alone(make):
    before = sources()[make]
    first, second, other = (copy.deepcopy(before) for _ in range(3))
    torch.manual_seed(1)
    one, _ = a_round(first, first.make_optimizer(), random=draws(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two, _ = a_round(second, second.make_optimizer(), random=draws(5))
    assert torch.equal(torch.get_rng_state(), state)
    three, _ = a_round(other, other.make_optimizer(), random=draws(6))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], three[0])


@pytest.mark.parametrize("source", [*generators(), Noise()], ids=name_of)
def test_drawn_images_have_no_gradient_and_follow_the_seed(source):
    one, two, other = (source.sample(5, SHAPE, draws(s)) for s in (1, 1, 2))
    assert one.shape == (5, *SHAPE)
    assert not one.requires_grad
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_pixels_cannot_be_drawn_at_once():
    with pytest.raises(NotImplementedError, match=r"Pixels cannot sample.*ReplayBuffer"):
        Pixels().sample(2, SHAPE, draws())


@pytest.mark.parametrize("source", [Noise(), Pixels()], ids=name_of)
def test_sources_without_weights_have_nothing_to_save_or_reset(source):
    assert source.make_optimizer() is None
    source.reset(draws())
    a_round(source)
    assert not source.state_dict()
    assert isinstance(source, BaseGenerator)


# ---------------------------------------------------------------------- noise and pixels


def test_noise_is_uniform_and_stays_for_a_round():
    source = Noise()
    source.start_round(50, (2, 16, 16), draws())
    images = source()
    source.step(judge(images), None)
    assert torch.equal(source(), images)
    assert float(images.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(images.var()) == pytest.approx(1 / 12, abs=0.003)


@pytest.mark.parametrize("shift", [0, 2])
def test_pixels_are_reproducible_from_the_seed(shift):
    rounds = [a_round(Pixels(shift=shift), steps=8, random=draws(s))[0] for s in (4, 4, 5)]
    assert all(torch.equal(a, b) for a, b in zip(rounds[0], rounds[1], strict=True))
    assert not torch.equal(rounds[0][0], rounds[2][0])


def test_pixels_begin_anew_each_round():
    source = Pixels()
    first, _ = a_round(source, random=draws(1))
    a_round(source, random=draws(2))
    again, _ = a_round(source, random=draws(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not hasattr(source, "pixels")


def test_pixels_take_steps_of_adam():
    source, adam = Pixels(0.1, shift=0), reference.AdamOfOne(0.1, betas=(0.9, 0.999))
    source.start_round(3, (1, 2, 2), draws())
    slow = source.pixels.detach().clone()
    for _ in range(4):
        source.step(judge(source()), None)
        leaf = slow.clone().requires_grad_()
        adam.step(slow, torch.autograd.grad(judge(leaf.sigmoid()), leaf)[0])
        torch.testing.assert_close(source.pixels.detach(), slow)


def test_pixels_lower_the_loss():
    _, losses = a_round(Pixels(0.1), steps=40)
    assert losses[-1] < 0.8 * losses[0]


def test_pixels_are_rolled_by_at_most_the_shift():
    source, found = Pixels(shift=2), set()
    source.start_round(1, (1, 9, 9), draws())
    still = source.pixels.detach().sigmoid()
    for _ in range(300):
        images = source().detach()
        found |= {
            (i, j)
            for i in range(-4, 5)
            for j in range(-4, 5)
            if torch.equal(images, still.roll((i, j), (2, 3)))
        }
    assert found == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_all_images_of_a_look_are_rolled_alike_and_gradients_come_back():
    source = Pixels(shift=2)
    source.start_round(2, (1, 5, 5), draws(1))
    images = source()
    (gradient,) = torch.autograd.grad(images[:, :, 0, 0].sum(), source.pixels)
    assert (gradient != 0).sum() == 2
    assert torch.equal(gradient[0] != 0, gradient[1] != 0)


# ---------------------------------------------------------------------- generator


def test_a_generator_learns():
    source = Generator(Small(), 0.02)
    _, losses = a_round(source, source.make_optimizer(), steps=60, count=64, shape=(1, 2, 2))
    assert losses[-1] < 0.5 * losses[0]


def test_a_generator_takes_steps_of_adam_on_new_noise():
    source = Generator(Small(), 0.01)
    slow, optimizer, random = copy.deepcopy(source.network), source.make_optimizer(), draws(9)
    adams = [reference.AdamOfOne(0.01) for _ in slow.parameters()]
    source.start_round(5, (1, 2, 2), draws(9))
    for _ in range(4):
        source.step(judge(source()), optimizer)
        noise = torch.randn(5, 3, generator=random, dtype=torch.float64)
        step_of_adam(slow, adams, judge(slow(noise)))
    source.end_round(optimizer)
    for mine, theirs in zip(source.network.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def step_of_adam(network, adams, loss):
    """One step of the slow Adam on each parameter; the gradients."""
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    for parameter, adam, gradient in zip(network.parameters(), adams, gradients, strict=True):
        adam.step(parameter.data, gradient)
    return gradients


@pytest.mark.parametrize("source", [*generators(), Pixels()], ids=name_of)
def test_a_step_touches_the_source_alone(tiny, source):
    """A student that the images went through keeps its gradients, weights and statistics."""
    student, teacher = tiny(), tiny(6).eval().requires_grad_(False)
    student.eval()
    before = [state_of(student), state_of(teacher)]
    optimizer = source.make_optimizer()
    mine = state_of(source)
    source.start_round(4, SHAPE, draws())
    for _ in range(2):
        images = source()
        source.step(-(student(images) - teacher(images)).abs().mean(), optimizer)
    source.end_round(optimizer)
    assert_same_state(state_of(student), before[0])
    assert_same_state(state_of(teacher), before[1])
    assert all(p.grad is None for n in (student, teacher) for p in n.parameters())
    for key, value in source.named_parameters():
        assert not torch.equal(value, mine[key]), key


@pytest.mark.parametrize("source", generators(), ids=name_of)
def test_the_optimizer_is_adam_over_the_network(source):
    optimizer = source.make_optimizer()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam)
    assert group["betas"] == (0.5, 0.999)
    assert group["lr"] == source.learning_rate
    assert {id(p) for p in group["params"]} == {id(p) for p in source.network.parameters()}


@pytest.mark.parametrize("kind", [Generator, MetaGenerator])
def test_a_network_must_say_how_much_noise_it_takes(kind):
    with pytest.raises(TypeError, match=r"attribute `latent`.*got Linear.*ImageGenerator"):
        kind(nn.Linear(3, 4))


# ---------------------------------------------------------------------- reset


@pytest.mark.parametrize("source", generators(), ids=name_of)
def test_a_reset_draws_the_first_linear_and_norm_layers_alone(source):
    with torch.no_grad():
        for parameter in source.network.parameters():
            parameter.add_(1)
    before = state_of(source)
    source.reset(draws(3))
    changed = {k for k, v in source.state_dict().items() if not torch.equal(v, before[k])}
    first = {"network.project.weight", "network.project.bias"}
    assert changed == first | {"network.layers.0.weight", "network.layers.0.bias"}
    assert float(source.network.layers[0].weight.abs().max()) < 0.1
    assert not source.network.layers[0].bias.any()
    assert torch.equal(source.network.project.bias, torch.zeros_like(source.network.project.bias))
    weight = source.network.project.weight
    assert float(weight.mean()) == pytest.approx(0, abs=0.005)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.15)
    drawn = weight.detach().clone()
    source.reset(draws(3))
    assert torch.equal(weight, drawn)
    source.reset(draws(4))
    assert not torch.equal(weight, drawn)


def test_a_reset_of_two_linear_layers_takes_the_first_and_needs_no_bias():
    network = Small()
    network.one = nn.Linear(3, 6, bias=False).double()
    source = Generator(network)
    before = state_of(source)
    source.reset(draws())
    changed = {k for k, v in source.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"network.one.weight"}


def test_a_reset_without_a_linear_layer_says_so():
    """Not by StopIteration, which a training loop takes for the end of its data."""
    network = nn.Sequential(nn.Unflatten(1, (3, 1, 1)), nn.Upsample(8), nn.Conv2d(3, 1, 1))
    network.latent = 3
    with pytest.raises((TypeError, ValueError), match=r"(?i)linear"):
        Generator(network).reset(draws())


# ---------------------------------------------------------------------- meta generator


def begun(meta="fomaml", rate=0.01, latent_rate=0.05, count=5):
    source = MetaGenerator(Small(), rate, latent_rate, meta)
    source.start_round(count, (1, 2, 2), draws())
    return source, source.make_optimizer()


def test_one_step_of_fomaml_has_the_plain_gradient():
    source, optimizer = begun()
    start = copy.deepcopy(source.network)
    plain = torch.autograd.grad(judge(start(source.noise.detach())), list(start.parameters()))
    source.step(judge(source()), optimizer)
    source.end_round(optimizer)
    for mine, theirs in zip(source.network.parameters(), plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_round_of_fomaml_equals_the_slow_one(steps):
    """The copy and its noise take steps; their summed gradients move the start, once."""
    source, optimizer = begun()
    start, twin = copy.deepcopy(source.network), copy.deepcopy(source.network)
    noise = source.noise.detach().clone()
    adams = [reference.AdamOfOne(0.01) for _ in twin.parameters()]
    of_noise, total = reference.AdamOfOne(0.05), [0.0] * len(adams)
    for _ in range(steps):
        images = source()
        leaf = noise.clone().requires_grad_()
        slow = twin(leaf)
        torch.testing.assert_close(images, slow)
        loss = judge(slow)
        (for_noise,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        gradients = step_of_adam(twin, adams, loss)
        total = [a + b for a, b in zip(total, gradients, strict=True)]
        of_noise.step(noise, for_noise)
        source.step(judge(images), optimizer)
        torch.testing.assert_close(source.noise.detach(), noise)
        for mine, theirs in zip(source.network.parameters(), start.parameters(), strict=True):
            assert torch.equal(mine, theirs)  # the start waits for the end
    source.end_round(optimizer)
    outer = [reference.AdamOfOne(0.01 * steps) for _ in total]
    for parameter, adam, gradient in zip(start.parameters(), outer, total, strict=True):
        adam.step(parameter.data, gradient)
    for mine, theirs, gradient in zip(
        source.network.parameters(), start.parameters(), total, strict=True
    ):
        torch.testing.assert_close(mine.grad, gradient)
        torch.testing.assert_close(mine, theirs)


def test_reptile_moves_the_start_towards_the_copy():
    source, optimizer = begun("reptile")
    start = [p.detach().clone() for p in source.network.parameters()]
    for _ in range(3):
        source.step(judge(source()), optimizer)
    copied = [p.detach().clone() for p in source._twin[0].parameters()]
    source.end_round(optimizer)
    for now, old, goal in zip(source.network.parameters(), start, copied, strict=True):
        way = goal - old
        assert (way != 0).any()
        torch.testing.assert_close(now.grad, -way)
        moved = now.detach() - old
        assert torch.equal(moved.sign()[way.abs() > 1e-6], way.sign()[way.abs() > 1e-6])
        # the first step of Adam goes its rate far, whatever the gradient
        far = way.abs() > 1e-4
        torch.testing.assert_close(
            moved[far].abs(), torch.full_like(moved[far], 3 * 0.01), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("meta", METAS)
def test_the_start_learns_over_rounds(meta):
    source = MetaGenerator(Small(), 0.01, 0.01, meta)
    optimizer, losses = source.make_optimizer(), []
    for seed in range(40):
        losses.append(a_round(source, optimizer, 2, 32, (1, 2, 2), draws(seed))[1][0])
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("meta", METAS)
def test_each_round_begins_at_the_start_with_new_noise(meta):
    source, optimizer = begun(meta)
    for seed in range(3):
        source.start_round(5, (1, 2, 2), draws(seed))
        noise = torch.randn(5, 3, generator=draws(seed), dtype=torch.float64)
        assert torch.equal(source.noise.detach(), noise)
        torch.testing.assert_close(source(), copy.deepcopy(source.network)(noise))
        for _ in range(2):
            source.step(judge(source()), optimizer)
        source.end_round(optimizer)
        assert not hasattr(source, "noise")


@pytest.mark.parametrize("meta", METAS)
def test_gradients_of_a_round_are_forgotten_in_the_next(meta):
    source, optimizer = begun(meta)
    source.step(judge(source()), optimizer)
    source.end_round(optimizer)
    source.start_round(5, (1, 2, 2), draws(1))
    start = copy.deepcopy(source.network)
    plain = torch.autograd.grad(judge(start(source.noise.detach())), list(start.parameters()))
    source.step(judge(source()), optimizer)
    if meta == "fomaml":
        for mine, theirs in zip(source.network.parameters(), plain, strict=True):
            torch.testing.assert_close(mine.grad, theirs)
    else:
        assert all(p.grad is None for p in source.network.parameters())


@pytest.mark.parametrize("meta", METAS)
def test_the_copy_is_not_saved_and_a_restored_source_goes_on_identically(meta):
    source, other = (MetaGenerator(Small(), meta=meta) for _ in range(2))
    optimizer, others = source.make_optimizer(), other.make_optimizer()
    names = set(source.state_dict())
    for seed in range(2):
        a_round(source, optimizer, 2, 4, (1, 2, 2), draws(seed))
    assert set(source.state_dict()) == names
    other.load_state_dict(copy.deepcopy(source.state_dict()))
    others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2, 5):
        one, _ = a_round(source, optimizer, 2, 4, (1, 2, 2), draws(seed))
        two, _ = a_round(other, others, 2, 4, (1, 2, 2), draws(seed))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert_same_state(state_of(source), state_of(other))


@pytest.mark.parametrize("kind", [Generator, MetaGenerator])
def test_a_source_can_be_copied_and_pickled_between_rounds(kind, tmp_path):
    source = kind(Small())
    a_round(source, source.make_optimizer(), 2, 4, (1, 2, 2))
    copied = copy.deepcopy(source)
    torch.save(source, tmp_path / "source.pt")
    loaded = torch.load(tmp_path / "source.pt", weights_only=False)
    for other in (copied, loaded):
        assert_same_state(state_of(source), state_of(other))


def test_a_drawing_meta_generator_uses_its_start():
    source, optimizer = begun()
    source.step(judge(source()), optimizer)
    noise = torch.randn(4, 3, generator=draws(7), dtype=torch.float64)
    drawn = source.sample(4, (1, 2, 2), draws(7))
    torch.testing.assert_close(drawn, copy.deepcopy(source.network)(noise))


def test_an_unknown_meta_step_is_refused():
    with pytest.raises(ValueError, match='"fomaml", "reptile" or "none", got \'maml\''):
        MetaGenerator(Small(), meta="maml")


# ---------------------------------------------------------------------- targets


def test_random_labels_are_uniform_and_follow_the_seed():
    labels = RandomLabels().sample(100_000, 7, draws())
    counts = torch.bincount(labels, minlength=7)
    assert len(counts) == 7
    mean = 100_000 / 7
    square = float(((counts - mean) ** 2 / mean).sum())
    assert square < 6 + 5 * math.sqrt(12)
    assert torch.equal(RandomLabels().sample(9, 7, draws(1)), RandomLabels().sample(9, 7, draws(1)))


def test_the_teachers_labels_are_left_to_the_teacher():
    assert TeacherLabels().sample(5, 7, draws()) is None


# ---------------------------------------------------------------------- image generator


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 8, 16)])
@pytest.mark.parametrize("doublings", [0, 1, 2])
def test_images_have_the_shape_of_the_data(shape, doublings):
    network = ImageGenerator(shape, latent=5, width=4, doublings=doublings)
    images = network(torch.randn(3, 5))
    assert images.shape == (3, *shape)
    assert ((images > 0) & (images < 1)).all()
    images.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_default_is_the_published_network():
    """Linear to 128 x 8 x 8, then two doublings to 128 and 64 channels."""
    network = ImageGenerator((3, 32, 32))
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert network.latent == 256
    assert tuple(network.project.weight.shape) == (128 * 8 * 8, 256)
    assert shapes == [(128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 3
    assert network(torch.randn(2, 256)).shape == (2, 3, 32, 32)


def test_four_doublings_reach_large_images():
    network = ImageGenerator((3, 48, 64), latent=4, width=2, doublings=4)
    assert network(torch.randn(2, 4)).shape == (2, 3, 48, 64)


def test_the_generator_can_be_built_again_from_its_arguments():
    network = ImageGenerator((1, 8, 8), latent=5, width=4, doublings=1)
    other = ImageGenerator(**network.init_args)
    other.load_state_dict(network.state_dict())
    noise = torch.randn(2, 5)
    assert torch.equal(network(noise), other(noise))


@pytest.mark.parametrize("shape", [None, (28, 28), (1, 1, 28, 28), ()])
def test_a_missing_or_odd_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"image_shape as \(channels, height, width\)"):
        ImageGenerator(shape)


@pytest.mark.parametrize(
    ("shape", "doublings", "step"), [((1, 28, 28), 3, 8), ((3, 32, 30), 2, 4), ((3, 31, 32), 1, 2)]
)
def test_sides_that_cannot_be_halved_are_refused(shape, doublings, step):
    with pytest.raises(ValueError, match=rf"divisible by {step}.*set doublings lower"):
        ImageGenerator(shape, doublings=doublings)


def test_without_meta_learning_each_round_begins_with_new_weights():
    source = MetaGenerator(Small(), 0.01, 0.05, "none")
    assert source.needs_replay
    assert source.make_optimizer() is None
    before, seen = state_of(source), []
    state = torch.get_rng_state()
    for seed in (0, 0, 1):
        source.start_round(5, (1, 2, 2), draws(seed))
        seen.append([p.detach().clone() for p in source._twin[0].parameters()])
        for _ in range(2):
            source.step(judge(source()), None)
        source.end_round(None)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True))
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
