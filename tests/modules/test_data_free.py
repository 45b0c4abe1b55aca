"""A student without data: rounds, resume, several processes, precision, and what is left alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kd import Teacher
from lightning_kd.callbacks import ChannelsLast, ReplayBuffer
from lightning_kd.data import Digits, Rounds
from lightning_kd.data_free.generators import Generator, MetaGenerator, Noise, Pixels
from lightning_kd.data_free.image_losses import (
    Activation,
    Adversarial,
    BatchNormStatistics,
    ClassBalance,
    Contrastive,
    ImageLoss,
    OneHot,
    TotalVariation,
)
from lightning_kd.data_free.replay import Memory, Prioritized, Uniform
from lightning_kd.data_free.targets import TeacherLabels
from lightning_kd.functional import kl_divergence
from lightning_kd.losses import AttentionTransfer
from lightning_kd.models import ImageGenerator
from lightning_kd.modules import DataFree
from tests.modules.test_distributed import launch


def network():
    return ImageGenerator((1, 8, 8), latent=8, width=4)


GENERATORS = {
    "generator": lambda: Generator(network()),
    "fomaml": lambda: MetaGenerator(network()),
    "reptile": lambda: MetaGenerator(network(), meta="reptile"),
    "none": lambda: MetaGenerator(network(), meta="none"),
    "pixels": lambda: Pixels(),
    "noise": Noise,
}


VIEWS = {"flip": True, "views": 2}


@pytest.fixture
def build(tiny):
    def make(generator="fomaml", seed=1, **options):
        torch.manual_seed(0)
        teacher = tiny(8)
        torch.manual_seed(seed)
        losses = [
            BatchNormStatistics(1.0, momentum=0.5),
            OneHot(0.5, modulate=True),
            Adversarial(1.0, masked=False),
        ]
        defaults = {
            "image_losses": [] if generator == "noise" else losses, "round_images": 16,
            "generator_steps": 2, "student_steps": 3, "batch_size": 8, "warm_up": 1,
            "temperature": 4.0,
        }  # fmt: skip
        return DataFree(tiny(4), teacher, GENERATORS[generator](), **{**defaults, **options})

    return make


def rounds(count=4, measured=False):
    if measured:
        return Rounds(count, Digits(subset=64, val_split=32))
    return Rounds(count, num_classes=10, image_shape=(1, 8, 8))


def memory(**options):
    return ReplayBuffer(**{"capacity": 40, "sampler": Prioritized(), **options})


def weights(module):
    return copy.deepcopy({k: v for k, v in module.state_dict().items() if torch.is_tensor(v)})


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


@pytest.mark.parametrize("source", GENERATORS)
def test_every_source_trains_the_student_and_nothing_else(build, make_trainer, source):
    module = build(source)
    teacher = module.teachers[0].network
    before, mine = copy.deepcopy(teacher.state_dict()), copy.deepcopy(module.student.state_dict())
    trainer = make_trainer(max_epochs=2, callbacks=[memory()])
    trainer.fit(module, datamodule=rounds(measured=True))
    assert_equal(before, dict(teacher.state_dict()))
    assert all(p.grad is None for p in teacher.parameters())
    assert any(not torch.equal(mine[k], v) for k, v in module.student.state_dict().items())
    assert module.rounds == 8
    assert trainer.global_step == 7 * 3  # the student's steps alone, without the warm-up
    assert 0 <= float(trainer.callback_metrics["val/accuracy"]) <= 1


def test_inversion_leaves_the_student_alone(build, make_trainer):
    module = build(warm_up=100)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    fresh = build(warm_up=100)
    assert_equal(dict(fresh.student.state_dict()), dict(module.student.state_dict()))
    assert all(p.grad is None or not p.grad.any() for p in module.student.parameters())
    start = fresh.synthesizer.generator.state_dict()
    assert any(
        not torch.equal(start[k], v) for k, v in module.synthesizer.generator.state_dict().items()
    )


@pytest.mark.parametrize("source", ["generator", "fomaml", "reptile", "pixels"])
@pytest.mark.parametrize("evict", ["oldest", "lowest_priority"])
def test_resumed_run_equals_the_uninterrupted_one(build, make_trainer, tmp_path, source, evict):
    """Bit for bit: networks, optimizers, contents and priorities, in the middle of the ring."""
    whole, buffer = build(source), memory(evict=evict)
    make_trainer(max_epochs=3, callbacks=[buffer]).fit(whole, datamodule=rounds())
    first = make_trainer(max_epochs=1, callbacks=[memory(evict=evict)])
    first.fit(build(source), datamodule=rounds())
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    again, resumed = build(source, seed=7), memory(evict=evict)
    trainer = make_trainer(max_epochs=3, callbacks=[resumed])
    trainer.fit(again, datamodule=rounds(), ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(whole), weights(again))
    for name in ("images", "logits", "priorities", "counts"):
        mine = getattr(resumed.memory, name)
        assert torch.equal(getattr(buffer.memory, name), mine), name
    assert buffer.memory.position == resumed.memory.position
    assert len(buffer.memory) == 40


def test_equal_seeds_give_equal_runs_whatever_else_draws(build, make_trainer):
    ends = []
    for noise in (0, 5):
        module = build(seed=1)
        torch.rand(noise)
        trainer = make_trainer(max_epochs=1, callbacks=[memory()])
        module.seed = 3
        trainer.fit(module, datamodule=rounds())
        ends.append(weights(module))
    assert_equal(*ends)


METHODS = {
    "dafl": {
        "generator": "generator", "reuse": True, "student_steps": 1, "generator_steps": 1,
        "targets": TeacherLabels(),
        "image_losses": [OneHot(1.0), ClassBalance(5.0), Activation("relu", 0.1)],
    },
    "dfad": {"generator": "generator", "distance": "l1", "image_losses": [Adversarial(1.0, "l1")]},
    "zskt": {
        "generator": "generator", "reuse": True, "image_losses": [Adversarial(1.0)],
        "losses": [AttentionTransfer("relu", "relu", weight=10.0)],
    },
    "js": {
        "generator": "generator", "distance": "mse",
        "image_losses": [Adversarial(1.0, "js"), TotalVariation(0.1)],
    },
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods_without_a_memory(build, make_trainer, method):
    module = build(warm_up=0, **METHODS[method])
    before = copy.deepcopy(module.student.state_dict())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=rounds())
    assert any(not torch.equal(before[k], v) for k, v in module.student.state_dict().items())
    assert torch.isfinite(trainer.callback_metrics["train/distil"])
    if (
        "adversarial" in module.synthesizer.image_losses
    ):  # public code gave the teacher in the student's place
        assert float(trainer.callback_metrics["train/invert/adversarial"]) < -1e-6


class HalfPrecision(MixedPrecision):
    """``16-mixed``, which Lightning offers on a GPU only."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_stays_finite(build, make_trainer, precision):
    module = build()
    half = {"plugins": HalfPrecision()} if precision == "16-mixed" else {"precision": precision}
    trainer = make_trainer(max_epochs=5, callbacks=[memory()], **half)
    trainer.fit(module, datamodule=rounds(40))
    assert module.rounds == 200
    assert all(torch.isfinite(v).all() for v in weights(module).values())
    assert torch.isfinite(trainer.callback_metrics["train/distil"])


def test_cached_answers_equal_fresh_ones(build, make_trainer, monkeypatch):
    """Without augmentation the teacher is asked when an image comes, and not again."""
    asked = []
    module = build()
    core, ask = module.distillation, module.distillation.teacher_outputs
    core.teacher_outputs = lambda x, *rest: asked.append(len(x)) or ask(x, *rest)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    assert not asked
    drawn = module.memory.sample(8, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(drawn.logits, module.teachers[0](drawn.images).logits)


def test_augmented_images_are_asked_about_anew(build, make_trainer):
    asked = []
    module = build(crop_padding=1, flip=True)
    core, ask = module.distillation, module.distillation.teacher_outputs
    core.teacher_outputs = lambda x, *rest: asked.append(len(x)) or ask(x, *rest)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    assert asked == [8] * 9


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_remembered_with_their_answers(build, make_trainer, views):
    """The teacher is asked about each view when it comes, and at no draw."""
    asked = []
    module = build(crop_padding=1, flip=True, views=views)
    core, ask = module.distillation, module.distillation.teacher_outputs
    core.teacher_outputs = lambda x, *rest: asked.append(len(x)) or ask(x, *rest)
    buffer = memory(capacity=200)
    make_trainer(max_epochs=1, callbacks=[buffer]).fit(module, datamodule=rounds())
    assert not asked
    assert len(buffer.memory) == 4 * 16 * views
    kept = buffer.memory.images[-16 * views :][: 16 * views]
    drawn = buffer.sample(50, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(drawn.logits, module.teachers[0](drawn.images).logits)
    assert len({image.numpy().tobytes() for image in kept}) > 16 * (views - 1)


def test_nothing_in_a_students_step_waits_for_the_device(build, make_trainer):
    """Numbers are never fetched: no item(), no mask of unknown size, no copy to the host."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.overloadpacket.__name__
            seen.add(name)
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
            return operation(*args, **(kwargs or {}))

    seen = set()
    module = build(crop_padding=1, views=2)

    def watched(plain):
        def call(images):
            with Watch():
                return plain(images)

        return call

    module._remember, module._distil = watched(module._remember), watched(module._distil)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    assert {"searchsorted", "convolution", "convolution_backward", "index_put_"} <= seen


def test_refreshed_priorities_are_those_of_the_student_now(build, make_trainer):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, *args):
            kept = buffer.memory
            if len(kept):
                images = kept.images[: kept.size].float() / 255
                with torch.no_grad():
                    student = module.student.eval()(images)
                gap = kl_divergence(student, kept.logits[: kept.size])
                seen.append((kept.priorities[: kept.size].clone(), gap))

    for refresh in (True, False):
        buffer = memory(refresh=refresh)
        trainer = make_trainer(max_epochs=1, callbacks=[buffer, Look()])
        trainer.fit(build(), datamodule=rounds())
    for mine, gap in seen[:3]:
        torch.testing.assert_close(mine, gap)
    assert not torch.allclose(*seen[-1])


def test_a_contrastive_term_learns_and_goes_on_bit_for_bit(build, make_trainer, tmp_path):
    """Its head, that head's optimizer and the bank are in the checkpoint."""

    def make():
        term = Contrastive(width=8, bank=20, negatives=10)
        return build("none", image_losses=[OneHot(), term])

    whole = make()
    whole._build(torch.rand(2, 1, 8, 8))
    start = weights(whole)
    make_trainer(max_epochs=2, callbacks=[memory()]).fit(whole, datamodule=rounds(3))
    head = [k for k in start if k.startswith("synthesizer.image_losses.contrastive.head")]
    assert len(head) == 4
    assert not any(torch.equal(start[k], whole.state_dict()[k]) for k in head)
    half = make()
    half._build(torch.rand(2, 1, 8, 8))
    trainer = make_trainer(max_epochs=1, callbacks=[memory()])
    trainer.fit(half, datamodule=rounds(3))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = make()
    trainer = make_trainer(max_epochs=2, callbacks=[memory()])
    trainer.fit(again, datamodule=rounds(3), ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(whole), weights(again))
    banks = [
        m.synthesizer.image_losses["contrastive"].get_extra_state()["bank"] for m in (whole, again)
    ]
    assert torch.equal(*banks)
    assert len(banks[0]) == 20


def test_networks_with_channels_last_learn_the_same(build, make_trainer):
    found = []
    for callbacks in ([], [ChannelsLast()]):
        module = build()
        make_trainer(max_epochs=1, callbacks=[memory(), *callbacks]).fit(
            module.double(), datamodule=rounds(2)
        )
        found.append(weights(module))
        convolutions = [p for p in module.parameters() if p.dim() == 4 and p.shape[1] > 1]
        convolutions += [p for p in module.teachers.parameters() if p.dim() == 4 and p.shape[1] > 1]
        last = [p.is_contiguous(memory_format=torch.channels_last) for p in convolutions]
        assert all(last) if callbacks else not any(last)
    torch.testing.assert_close(*found)


def test_teacher_without_batch_norm_drops_that_term_and_says_so(tiny, make_trainer):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1))

    module = DataFree(
        tiny(4), Plain(), Generator(network()), [BatchNormStatistics(), OneHot()],
        round_images=8, generator_steps=1, student_steps=1, batch_size=8, warm_up=0,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no BatchNorm layers"):
        make_trainer(max_epochs=1).fit(module, datamodule=rounds())
    assert set(module.synthesizer.image_losses) == {"one_hot"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_steps": 0}, "student_steps >= 1"),
        ({"distance": "cosine"}, '"kl", "l1" or "mse"'),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"views": 2}, "views >= 1, with crop_padding"),
        ({"generator": "pixels", "reset_rounds": [3]}, "no reset_rounds with this Pixels"),
        ({"generator": "none", "reset_rounds": [3]}, "no reset_rounds with this MetaGenerator"),
        ({"crop_padding": -1}, "crop_padding >= 0"),
    ],
)
def test_wrong_options_are_reported(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_memory_smaller_than_a_round_is_reported(build, make_trainer):
    with pytest.raises(ValueError, match="capacity"):
        make_trainer(callbacks=[memory(capacity=8)]).fit(build(), datamodule=rounds())


@pytest.mark.parametrize(("source", "options"), [("pixels", {}), ("none", {}), ("fomaml", VIEWS)])
def test_a_missing_memory_is_reported(build, make_trainer, source, options):
    with pytest.raises(ValueError, match="ReplayBuffer"):
        make_trainer().fit(build(source, warm_up=9, **options), datamodule=rounds())


def test_parts_of_other_types_are_reported(build, tiny):
    with pytest.raises(TypeError, match="Expected image_losses as a list, or as a mapping"):
        build(image_losses=OneHot())
    with pytest.raises(TypeError, match="Expected targets of type"):
        build(targets=3)
    with pytest.raises(TypeError, match="OneHot, the class: add"):
        build(image_losses=[OneHot])
    with pytest.raises(TypeError, match="wrap it in Generator or MetaGenerator"):
        DataFree(tiny(4), tiny(8), network(), [OneHot()])


class Mine(ImageLoss):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, seen):
        return self.answer(seen)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            lambda seen: seen.images.mean((1, 2, 3)),
            ValueError,
            r"image loss mine, got shape \(16,\)",
        ),
        (lambda seen: 3.0, ValueError, "scalar tensor of image loss mine, got 3.0"),
        (lambda seen: torch.zeros(()), ValueError, "no gradient reaches them from mine"),
        (lambda seen: seen.student.logits.mean(), RuntimeError, "reads_student = True"),
        (lambda seen: sum(s[0] for s in seen.statistics), RuntimeError, "reads_statistics = True"),
        (lambda seen: seen.describe(seen.images).mean(), None, ""),
    ],
)
def test_mistakes_in_a_term_of_ones_own_are_reported(build, make_trainer, answer, error, message):
    trainer = make_trainer(max_epochs=1, callbacks=[memory()])
    module = build(image_losses=[Mine(answer)])
    if error is None:
        trainer.fit(module, datamodule=rounds())
        return
    with pytest.raises(error, match=message):
        trainer.fit(module, datamodule=rounds())


def test_a_run_within_the_warm_up_and_unused_data_are_reported(build, make_trainer, digits):
    with pytest.warns(UserWarning, match="4 rounds, all of them within the warm-up of 9"):
        make_trainer(max_epochs=1, callbacks=[memory()]).fit(build(warm_up=9), datamodule=rounds())
    with pytest.warns(UserWarning, match="uses no training data"):
        make_trainer(max_epochs=1, callbacks=[memory()]).fit(build(), datamodule=digits())


def test_images_of_another_shape_are_reported(build, make_trainer):
    module = build()
    module.synthesizer.generator = Generator(ImageGenerator((3, 8, 8), latent=8, width=4))
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\).*got \(3, 8, 8\) from Generator"):
        make_trainer(callbacks=[memory()]).fit(module, datamodule=rounds())


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"got no image_shape\."):
        Rounds(2, num_classes=10)
    with pytest.raises(ValueError, match="whole number"):
        ReplayBuffer("8")


def test_a_teacher_of_some_classes_is_refused(tiny):
    teacher = Teacher(tiny(8), classes=list(range(10)), num_classes=12)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    module = DataFree(student, teacher, Generator(network()), [OneHot()])
    with pytest.raises(ValueError, match="knows all classes"):
        module._build(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_any_number_of_processes_goes_on_with_the_newest(monkeypatch, build, before, after):
    """By the shares that the callback deals out; the ring is what the processes had together."""
    capacity = 40
    shards, state = [], {"sizes": [], "positions": []}
    for rank in range(before):
        ring = Memory(capacity // before, Uniform(), "oldest", 10, torch.device("cpu"))
        for turn in range(7):  # image number `turn` of this process, all pixels alike
            images = torch.full((capacity // before // 4, 1, 2, 2), turn / 255)
            ring.extend(
                images, torch.eye(10)[rank].expand(len(images), 10), torch.ones(len(images))
            )
        shards.append(ring.state_dict())
        state["sizes"].append(len(ring))
        state["positions"].append(ring.position)
    for name in ("images", "logits", "priorities"):
        state[name] = torch.cat([shard[name] for shard in shards])
    kept = []
    for rank in range(after):
        monkeypatch.setattr("lightning_kd.callbacks.replay_buffer.world_size", lambda: after)
        buffer = ReplayBuffer(capacity)
        buffer.load_state_dict(state)
        buffer.on_train_start(
            SimpleNamespace(global_rank=rank, ckpt_path="a.ckpt"), build(num_classes=10)
        )
        assert len(buffer.memory) <= capacity // after
        ages = buffer.memory.images[:, 0, 0, 0].roll(-buffer.memory.position, 0).tolist()
        assert ages == sorted(ages)  # the oldest goes first
        kept += ages
    every = sorted(state["images"][:, 0, 0, 0].tolist())
    assert sorted(kept) == every[len(every) - len(kept) :]
    assert len(kept) == min(len(every), capacity // after * after)


def test_a_memory_of_another_module_is_not_taken_over(build, make_trainer):
    buffer = memory()
    make_trainer(max_epochs=1, callbacks=[buffer]).fit(build(), datamodule=rounds())
    other = build(seed=5)
    make_trainer(max_epochs=1, callbacks=[buffer]).fit(other, datamodule=rounds(1))
    assert len(buffer.memory) == 16


def test_a_module_can_be_copied_after_a_fit(build, make_trainer):
    module = build()
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    twin = copy.deepcopy(module)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(twin, datamodule=rounds())
    assert twin.rounds == 8


class Odd(nn.Module):
    """A teacher with a layer that does not run, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.twice, self.idle = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(7)
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(self.twice(self.twice(self.conv(x)).relu()).mean((2, 3)))


def test_contrastive_counts_the_layers_that_run(tiny, make_trainer):
    module = DataFree(
        tiny(4), Odd(), Generator(network()), [BatchNormStatistics(), Contrastive(width=4)],
        round_images=8, generator_steps=1, student_steps=1, batch_size=8, warm_up=0,
    )  # fmt: skip
    make_trainer(max_epochs=1).fit(module, datamodule=rounds())
    assert module.synthesizer.image_losses["contrastive"].head[0].in_features == 6


def test_a_term_may_hold_frozen_weights(build, make_trainer):
    class Fixed(Contrastive):
        def build(self, description):
            super().build(description)
            self.head[0].requires_grad_(False)

    module = build(image_losses=[OneHot(), Fixed(width=4)])
    module._build(torch.rand(1, 1, 8, 8))
    start = weights(module)
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(module, datamodule=rounds())
    changed = {k for k, v in weights(module).items() if not torch.equal(v, start[k])}
    assert "synthesizer.image_losses.fixed.head.2.weight" in changed
    assert "synthesizer.image_losses.fixed.head.0.weight" not in changed


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precisions(build, make_trainer, precision):
    module = build(
        image_losses=[BatchNormStatistics(), OneHot(), Adversarial(), Contrastive(width=4)]
    )
    trainer = make_trainer(max_epochs=1, precision=precision, callbacks=[memory()])
    trainer.fit(module, datamodule=rounds())
    assert torch.isfinite(trainer.callback_metrics["train/distil"])


def test_the_warm_up_leaves_the_learning_rate_alone(build, make_trainer):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = build(
        warm_up=2, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1),
        scheduler_interval="step",
    )  # fmt: skip
    make_trainer(max_epochs=1, callbacks=[memory(), Look()]).fit(module, datamodule=rounds())
    assert seen == pytest.approx([0.05, 0.05, 0.005, 0.0005])


def test_a_second_fit_goes_on_with_the_memory_and_a_loaded_seed_does_not_win(
    build, make_trainer, tmp_path
):
    module, buffer = build(), memory()
    trainer = make_trainer(max_epochs=1, callbacks=[buffer])
    trainer.fit(module, datamodule=rounds())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert len(buffer.memory) == 40
    kept = buffer.memory.images.clone()
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            seen.append(buffer.memory.images.clone())

    again = make_trainer(max_epochs=1, callbacks=[buffer, Look()])
    again.fit(module, datamodule=rounds())
    assert torch.equal(seen[0], kept)
    loaded = build(seed=3)
    loaded.seed = 99
    loaded.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    make_trainer(max_epochs=1, callbacks=[memory()]).fit(loaded, datamodule=rounds())
    assert loaded.seed == 99
    assert loaded.rounds == 4


def test_replay_buffer_elsewhere_is_refused(make_module, make_trainer, digits):
    with pytest.raises(TypeError, match="DataFree"):
        make_trainer(callbacks=[memory()]).fit(make_module(), datamodule=digits())


RANKS = """
import sys
import torch
from lightning.pytorch import Trainer
from tests.conftest import TinyNet
from lightning_kd import DataFree
from lightning_kd.callbacks import ReplayBuffer
from lightning_kd.data import Rounds
from lightning_kd.data_free.image_losses import Adversarial, BatchNormStatistics
from lightning_kd.data_free.image_losses import Contrastive, OneHot
from lightning_kd.models import ImageGenerator
from lightning_kd.data_free.replay import Prioritized
from lightning_kd.data_free.generators import Generator, MetaGenerator

def make(source):
    torch.manual_seed(1)
    net = ImageGenerator((1, 8, 8), latent=8, width=4)
    return DataFree(
        TinyNet(4), TinyNet(8), {"g": Generator, "m": MetaGenerator}[source](net),
        [BatchNormStatistics(momentum=0.9), OneHot(modulate=True), Adversarial(),
         Contrastive(width=8, bank=20)], round_images=16,
        generator_steps=2, student_steps=2, batch_size=8, warm_up=1,
    )

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[1]
    for source in ("g", "m"):
        torch.manual_seed(1)
        refresh = source == "m"
        module, buffer = make(source), ReplayBuffer(40, Prioritized(), refresh=refresh)
        def trainer(epochs, callback, devices=2):
            return Trainer(
                max_epochs=epochs, accelerator="cpu", devices=devices, logger=False,
                strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
                enable_model_summary=False, enable_progress_bar=False, callbacks=[callback],
            )
        data = Rounds(4, num_classes=10, image_shape=(1, 8, 8))
        run = trainer(2, buffer)
        run.fit(module, datamodule=data)
        images = buffer.memory.images.clone()
        shards = [torch.empty_like(images) for _ in range(2)]
        torch.distributed.all_gather(shards, images)
        assert not torch.equal(*shards), "both processes remember the same images"
        assert len(images) == 20
        flat = torch.cat([p.detach().flatten() for p in module.parameters()])
        everyone = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(everyone, flat)
        assert torch.equal(*everyone), "networks differ between processes"
        share = buffer.class_share()
        counts = sum(torch.bincount(s, minlength=10) for s in [buffer.memory.logits.argmax(1)])
        total = counts.float()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(share, total / 40)

        assert module.rounds == 8
        half, first = make(source), ReplayBuffer(40, Prioritized(), refresh=refresh)
        run = trainer(1, first)
        run.fit(half, datamodule=data)
        run.save_checkpoint(f"{folder}/{source}.ckpt")
        again, resumed = make(source), ReplayBuffer(40, Prioritized(), refresh=refresh)
        run = trainer(2, resumed)
        run.fit(again, datamodule=data, ckpt_path=f"{folder}/{source}.ckpt")
        for a, b in zip(module.parameters(), again.parameters()):
            assert torch.equal(a, b)
        assert torch.equal(resumed.memory.images, images)
        assert torch.equal(resumed.memory.priorities, buffer.memory.priorities)
        for term in ("batch_norm_statistics", "contrastive"):
            one, two = (m.synthesizer.image_losses[term].get_extra_state() for m in (module, again))
            for a, b in zip(*(list(s.values())[0] for s in (one, two))):
                assert torch.equal(a, b), term
        # nobody has a gradient, and nothing is said about it
        waiting = make(source)
        images = waiting.synthesizer
        kept = {"adversarial": images.image_losses["adversarial"]}
        images.image_losses = torch.nn.ModuleDict(kept)
        trainer(1, ReplayBuffer(40)).fit(waiting, datamodule=Rounds(1, None, 10, (1, 8, 8)))
        if run.is_global_zero:
            torch.save(module.state_dict(), f"{folder}/{source}.pt")
"""


def test_two_processes_share_the_memory_and_one_goes_on_with_all_of_it(tmp_path, make_trainer):
    """Under plain ``ddp``: images apart, networks together, resume bit for bit."""
    launch(RANKS, tmp_path, str(tmp_path))
    saved = torch.load(tmp_path / "g.ckpt", weights_only=True)
    (state,) = [v for k, v in saved["callbacks"].items() if "ReplayBuffer" in k]
    assert state["sizes"] == [20, 20]
    scope = {}
    exec(RANKS, scope)
    found = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            kept = buffer.memory
            found.append([image.numpy().tobytes() for image in kept.images.roll(-kept.position, 0)])

    buffer = memory()
    module = scope["make"]("g")
    trainer = make_trainer(max_epochs=2, callbacks=[buffer, Look()])
    trainer.fit(module, datamodule=rounds(), ckpt_path=tmp_path / "g.ckpt")
    # the oldest of both first, in turn
    shards = [
        list(shard.roll(-k, 0))
        for shard, k in zip(state["images"].split(20), state["positions"], strict=True)
    ]
    aged = [image.numpy().tobytes() for pair in zip(*shards, strict=True) for image in pair]
    assert found[0] == aged
    assert len(set(aged)) == 40
