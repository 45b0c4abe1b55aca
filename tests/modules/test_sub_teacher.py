"""Several answers of one teacher: what they are, what they cost, resume, ranks, precision."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_kd import SubTeacher, Supervised, Teacher
from lightning_kd.losses import AttentionTransfer, Hint, LogitMSE, SoftTarget, SubsetTarget
from lightning_kd.models import Mirror, Plain, Scale, resnet8, resnet14
from lightning_kd.teachers import (
    MultiView,
    NoisyTeacher,
    Snapshot,
    StochasticDepth,
)
from lightning_kd.weighting import Confidence, Fixed, GradientSpace, LearnedGate, Switching
from tests import reference
from tests.modules.test_distributed import launch

SOURCES = {
    "depth": lambda **o: StochasticDepth(**{"count": 3, "survival": 0.5, **o}),
    "noisy": lambda **o: NoisyTeacher(**{"count": 2, **o}),
    "views": lambda **o: MultiView([Plain(), Mirror(), Scale(1.5)]),
}


def teacher():
    torch.manual_seed(0)
    network = resnet14(in_channels=1, width=4)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture
def build():
    def make(source="depth", seed=1, **options):
        network = teacher()
        torch.manual_seed(seed)
        source = SOURCES[source]() if isinstance(source, str) else source
        return SubTeacher(resnet8(in_channels=1, width=4), network, source, **options)

    return make


def asked(source, images, layers=(), training=True):
    """What the sub-teachers of one frozen network say."""
    frozen = Teacher(teacher().to(images.dtype))
    frozen.record_layers(layers)
    source.attach(frozen, layers, images)
    source.train(training)
    with torch.no_grad():
        return frozen, source(frozen, images, range(source.count))


IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()


# ---------------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    "source",
    [
        StochasticDepth(4, survival=1.0),
        NoisyTeacher(3, sigma=0.0),
        NoisyTeacher(3, probability=0.0),
        MultiView([Plain(), Plain()]),
    ],
    ids=["survival 1", "noise 0", "probability 0", "plain views"],
)
def test_sub_teachers_that_change_nothing_are_the_teacher(source):
    frozen, said = asked(source, IMAGES, ["layer2"])
    with torch.no_grad():
        plain = frozen(IMAGES)
    assert len(said) == source.count
    for one in said:
        torch.testing.assert_close(one.logits, plain.logits)
        torch.testing.assert_close(one.feature("layer2"), plain.feature("layer2"))


def test_paths_are_drawn_as_said():
    source = StochasticDepth(survival=0.4)
    source.prepare(teacher(), torch.zeros(1, 1, 8, 8))
    assert source.names == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    assert source.probabilities() == pytest.approx([0.85, 0.7, 0.55, 0.4])
    kept = torch.tensor(source.draw(4000, 7)).double()
    torch.testing.assert_close(
        kept.mean(0), torch.tensor(source.probabilities()).double(), atol=0.03, rtol=0
    )
    assert float(torch.corrcoef(kept.T).fill_diagonal_(0).abs().max()) < 0.06  # independent
    constant = StochasticDepth(survival=0.4, decay="constant")
    constant.prepare(teacher(), torch.zeros(1, 1, 8, 8))
    assert constant.probabilities() == [0.4] * 4


def test_sub_teachers_are_the_drawn_paths_with_their_features():
    source = StochasticDepth(4, survival=0.5, decay="constant", seed=3)
    frozen, said = asked(source, IMAGES, ["layer1", "layer2.1", "layer3"])
    kept = source.draw(4, _seed_of_first(source))
    assert len({tuple(path) for path in kept}) > 1
    for path, one in zip(kept, said, strict=True):
        network, features = copy.deepcopy(frozen.network), {}
        for name, takes in zip(source.names, path, strict=True):
            block = network.get_submodule(name)
            block.forward = lambda y, run=block.forward, takes=takes: (
                y + (run(y) - y) / 0.5 if takes else y
            )
        for layer in ("layer1", "layer2.1", "layer3"):
            network.get_submodule(layer).register_forward_hook(
                lambda m, i, o, layer=layer, found=features: found.__setitem__(layer, o)
            )
        with torch.no_grad():
            torch.testing.assert_close(one.logits, network(IMAGES))
        for layer, value in features.items():
            torch.testing.assert_close(one.feature(layer), value)


def _seed_of_first(source):
    """The seed of the batch that was asked about."""
    again = copy.copy(source)
    again.times = source.times - 1
    return again.next_seed()


def test_the_mean_over_paths_is_the_whole_block():
    """What a block adds is divided by its probability; a network of one block, linear around it."""
    source = StochasticDepth(1, survival=0.25, blocks=["layer3.1"])
    network = teacher().double()
    source.prepare(network, IMAGES[:1])
    with torch.no_grad():
        seen = []
        network.layer3[1].register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
        for kept in (True, False):
            with source.on([[kept]]):
                network(IMAGES)
        (x, kept), (_, left) = seen
        whole = network.layer3[1](x)
    torch.testing.assert_close(0.25 * kept + 0.75 * left, whole)


def test_noise_equals_the_reference_and_has_the_moments_that_were_asked_for():
    source = NoisyTeacher(1, probability=0.3, sigma=0.2, seed=5)
    logits = torch.randn(6, 4).double()
    found = source.perturb(logits, torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(1)
    coins = torch.rand(6, generator=random) < 0.3
    noise = 0.2 * torch.randn(6, 4, generator=random)
    torch.testing.assert_close(found, reference.noisy_logits(logits, coins, noise.double()))
    many = source.perturb(torch.ones(20_000, 3).double(), torch.Generator().manual_seed(2))
    touched = (many != 1).any(1)
    assert float(touched.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert (many[touched] != 1).all()  # one coin for a sample, not for a logit
    assert float((many[touched] - 1).mean()) == pytest.approx(0, abs=0.01)
    assert float((many[touched] - 1).std()) == pytest.approx(0.2, rel=0.03)


def test_noise_is_in_training_only_and_leaves_unknown_classes_alone():
    source = NoisyTeacher(2, probability=1.0, sigma=0.5)
    frozen, said = asked(source, IMAGES)
    assert not torch.equal(said[0].logits, said[1].logits)
    _, quiet = asked(source, IMAGES, training=False)
    assert torch.equal(quiet[0].logits, frozen(IMAGES).logits)
    partial = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert source.perturb(partial, torch.Generator())[0, 1] == -torch.inf


def test_views_are_mapped_back():
    views = MultiView([Plain(), Mirror(), Scale(2.0)])
    frozen, said = asked(views, IMAGES, ["layer1"])
    with torch.no_grad():
        mirrored = frozen(IMAGES.flip(-1))
    torch.testing.assert_close(said[1].logits, mirrored.logits)
    torch.testing.assert_close(said[1].feature("layer1"), mirrored.feature("layer1").flip(-1))
    assert [one.feature("layer1").shape for one in said] == [said[0].feature("layer1").shape] * 3
    for view in (Plain(), Mirror()):
        assert torch.equal(view.back(view(IMAGES), IMAGES.shape[2:]), IMAGES)
    smooth = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    torch.testing.assert_close(
        Scale(2.0).back(Scale(2.0)(smooth), smooth.shape[2:]), smooth, atol=0.05, rtol=0
    )


def test_views_of_one_size_are_one_batch():
    sizes = []
    frozen = Teacher(teacher())
    frozen.network.register_forward_hook(lambda m, i, o: sizes.append(tuple(i[0].shape)))
    views = MultiView([Plain(), Scale(1.5), Mirror()])
    views(frozen, IMAGES.float(), range(3))
    assert sizes == [(10, 1, 8, 8), (5, 1, 12, 12)]


def test_snapshots_are_the_networks_of_their_files(tmp_path):
    from safetensors.torch import save_file

    olds = []
    for k in range(2):
        torch.manual_seed(10 + k)
        olds.append(resnet14(in_channels=1, width=4).eval())
        save_file(olds[-1].state_dict(), tmp_path / f"{k}.safetensors")
    source = Snapshot([str(tmp_path / f"{k}.safetensors") for k in range(2)])
    images = IMAGES.float()
    frozen, said = asked(source, images, ["layer2"])
    assert source.count == 3
    with torch.no_grad():
        for one, network in zip(said, [frozen.network, *olds], strict=True):
            torch.testing.assert_close(one.logits, network(images))
    assert not torch.allclose(said[0].feature("layer2"), said[1].feature("layer2"))
    assert set(source.state_dict()) == {"_extra_state"}  # what was given is not saved
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint"):
        asked(Snapshot([str(tmp_path / "none.safetensors")]), images)
    save_file(resnet8(in_channels=1).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        asked(Snapshot([str(tmp_path / "other.safetensors")]), images)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"losses": [SoftTarget(4.0), Hint("layer2", "layer2", weight=0.1)]},
        {"losses": [AttentionTransfer("layer3", "layer3")], "weighting": Confidence()},
        {"weighting": LearnedGate()},
        {"weighting": Switching()},
        {"losses": [LogitMSE()], "weighting": GradientSpace()},
    ],
    ids=["default", "hint", "attention", "gate", "switching", "gradient space"],
)
def test_losses_and_weightings_apply(source, options, build, make_trainer, digits):
    module = build(source, **copy.deepcopy(options))
    network = module.teachers[0].network
    before = copy.deepcopy(network.state_dict())
    start = copy.deepcopy(module.student.state_dict())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not network.training
    assert not any("forward" in vars(part) for part in network.modules())
    assert any(not torch.equal(v, start[k]) for k, v in module.student.state_dict().items())
    logged = trainer.callback_metrics
    assert torch.isfinite(logged["train/loss"])
    assert {f"val/teacher_{m}/accuracy" for m in range(len(module.teachers))} <= set(logged)
    assert f"val/teacher_{len(module.teachers)}/accuracy" not in logged


def test_every_sub_teacher_is_in_the_report(build, make_trainer, digits, tmp_path):
    from lightning_kd.callbacks import DistillationReport

    report = DistillationReport(str(tmp_path))
    make_trainer(max_epochs=1, callbacks=[report]).fit(build(), datamodule=digits())
    found = json.loads((tmp_path / "report.json").read_text())["teachers"]
    assert [entry["name"] for entry in found] == ["StochasticDepth of CifarResNet-14"] * 3
    assert all(0 <= entry["accuracy"] <= 1 for entry in found)


def test_plain_views_give_the_plain_loss(build, make_trainer, digits):
    """One teacher that looks twice at the same is one teacher."""
    from lightning_kd import MultiTeacher

    two = build(MultiView([Plain(), Plain()]))
    network = teacher()
    torch.manual_seed(1)
    one = MultiTeacher(resnet8(in_channels=1, width=4), [network])
    for module in (one, two):
        make_trainer(max_epochs=1).fit(module, datamodule=digits())
    for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_run_equals_the_uninterrupted_one(source, build, make_trainer, digits, tmp_path):
    whole, half, again = build(source), build(source), build(source)
    make_trainer(max_epochs=2).fit(whole, datamodule=digits())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, datamodule=digits())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any(name.startswith("teachers") for name in saved["state_dict"])
    make_trainer(max_epochs=2).fit(again, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.teachers.source.times == again.teachers.source.times


def test_seeds_set_the_paths_and_batches_differ(build, make_trainer, digits):
    drawn = {}

    def run(seed):
        source = StochasticDepth(2, survival=0.5, seed=seed)
        draw = source.draw
        source.draw = lambda *a: drawn.setdefault(seed, []).append(draw(*a)) or drawn[seed][-1]
        make_trainer(max_epochs=1).fit(build(source), datamodule=digits())

    for seed in (1, 2):
        run(seed)
    assert drawn[1] != drawn[2]
    assert len({str(paths) for paths in drawn[1]}) > 2
    first = drawn.pop(1)
    run(1)
    assert drawn[1] == first


@pytest.mark.parametrize("source", SOURCES)
def test_bf16(source, build, make_trainer, digits):
    trainer = make_trainer(max_epochs=1, precision="bf16-mixed")
    trainer.fit(build(source), datamodule=digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_the_teacher_is_trained_with_blocks_left_out(make_trainer, digits):
    torch.manual_seed(0)
    network = resnet14(in_channels=1, width=4)
    module = Supervised(network, stochastic_depth=StochasticDepth(survival=0.5))
    drawn = []
    draw = module.distillation.stochastic_depth.draw
    module.distillation.stochastic_depth.draw = lambda *a: drawn.append(draw(*a)) or drawn[-1]
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, datamodule=digits())
    assert len(drawn) == trainer.global_step
    assert all(len(paths) == 1 for paths in drawn)
    assert len({str(paths) for paths in drawn}) > 2
    assert "forward" not in vars(network.layer1[0])
    with torch.no_grad():  # in validation all blocks are taken
        module.eval()
        assert torch.equal(
            module.distillation.student_output(IMAGES.float()).logits, network(IMAGES.float())
        )


def test_a_resumed_training_of_such_a_teacher_goes_on_bit_for_bit(make_trainer, digits, tmp_path):
    def make():
        torch.manual_seed(0)
        return Supervised(
            resnet14(in_channels=1, width=4), stochastic_depth=StochasticDepth(survival=0.5)
        )

    whole, half, again = make(), make(), make()
    make_trainer(max_epochs=2).fit(whole, datamodule=digits())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, datamodule=digits())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(max_epochs=2).fit(again, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticDepth(0), "at least one sub-teacher"),
        (lambda: StochasticDepth(survival=0.0), "survival in"),
        (lambda: StochasticDepth(decay="square"), '"linear" or "constant"'),
        (lambda: NoisyTeacher(probability=1.5), "probability from 0 to 1"),
        (lambda: NoisyTeacher(sigma=-1.0), "sigma >= 0"),
        (lambda: Scale(0), "factor > 0"),
        (lambda: MultiView([]), "at least one view"),
    ],
)
def test_wrong_numbers_are_reported(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_parts_are_reported(build, digits, make_trainer):
    with pytest.raises(TypeError, match="source of type SubTeachers, got CifarResNet"):
        build(resnet8())
    with pytest.raises(TypeError, match="views of type View"):
        MultiView([nn.Identity()])
    inside = build(losses=[Hint("layer2", "layer1.1.conv1")])
    with pytest.raises(ValueError, match=r"'layer1.1.conv1' inside block 'layer1.1'"):
        make_trainer().fit(inside, datamodule=digits())
    with pytest.raises(ValueError, match="3"):
        make_trainer().fit(build(weighting=Fixed([0.5, 0.5])), datamodule=digits())


@pytest.mark.parametrize("source", SOURCES)
def test_a_copy_shares_the_teacher_and_draws_the_same_paths(source, build):
    module = build(source)
    x = torch.rand(4, 1, 8, 8)
    module._build(x)
    twin = copy.deepcopy(module)
    mine, theirs = (
        [k.logits for k in m.train().distillation.teacher_outputs(x, range(len(m.teachers)))]
        for m in (module, twin)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    network = module.teachers[0].network
    assert twin.teachers[0].network is network
    if source == "depth":
        blocks = {dict(network.named_modules())[name] for name in twin.teachers.source.names}
        assert set(twin.teachers.source._paths._blocks) == blocks


def test_a_copy_of_a_teacher_in_training_has_its_own_blocks():
    module = Supervised(teacher(), stochastic_depth=StochasticDepth(survival=0.5))
    x = torch.rand(4, 1, 8, 8)
    module._build(x)
    twin = copy.deepcopy(module)
    blocks = {
        dict(twin.student.named_modules())[name]
        for name in twin.distillation.stochastic_depth.names
    }
    assert set(twin.distillation.stochastic_depth._paths._blocks) == blocks
    assert torch.equal(
        module.train().distillation.student_output(x).logits,
        twin.train().distillation.student_output(x).logits,
    )


def test_losses_reach_the_network_of_each_snapshot(tmp_path, build):
    from lightning_kd.losses import ConfidentHint

    first, second = teacher(), teacher()
    second.linear.bias.data += 1
    save_file(second.state_dict(), tmp_path / "second.safetensors")
    loss = ConfidentHint("layer3", "layer3", "linear")
    snapshots = Snapshot([str(tmp_path / "second.safetensors")])
    torch.manual_seed(0)
    module = SubTeacher(resnet8(in_channels=1, width=4), first, snapshots, losses=[loss])
    module._build(torch.rand(2, 1, 8, 8))
    mine = next(iter(module.distillation.losses.values()))
    assert mine._classifiers[0] is first.linear
    assert torch.equal(mine._classifiers[1].bias, second.linear.bias)


def test_paths_through_a_teacher_of_some_classes():
    network = resnet14(in_channels=1, width=4, num_classes=3).eval()
    some = Teacher(network, classes=[0, 2, 4], num_classes=5)
    student = resnet8(in_channels=1, width=4, num_classes=5)
    source = StochasticDepth(3, survival=0.5)
    module = SubTeacher(student, some, source, losses=[SubsetTarget()])
    x = torch.rand(4, 1, 8, 8)
    module._build(x)
    module.train()
    for _ in range(5):
        assert torch.isfinite(module.compute_losses(x, torch.tensor([0, 1, 2, 3]))["subset_target"])
    said = module.distillation.teacher_outputs(x, range(3))
    assert all(torch.isinf(k.logits[:, [1, 3]]).all() for k in said)


def test_blocks_that_cannot_be_left_out_are_reported():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(1, 1, 3, 1, 1), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.conv(self.relu(x)) + x

    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(InPlace()))
    x = torch.rand(1, 1, 8, 8)
    with pytest.raises(ValueError, match="InPlace that changes it in place"):
        StochasticDepth().prepare(network, x)
    for blocks in (["layer1.0", "layer1.0"], ["layer1", "layer1.0"]):
        with pytest.raises(ValueError, match="each block once and none inside another"):
            StochasticDepth(blocks=blocks).prepare(teacher(), x)


def test_a_forward_of_somebody_else_is_left_in_place():
    network = teacher()
    block = network.layer1[0]
    block.forward = own = block.forward
    source = StochasticDepth(2, survival=0.5)
    source.prepare(network, torch.rand(1, 1, 8, 8))
    with source.on(source.draw(2, 0)):
        network(torch.rand(2, 1, 8, 8))
    assert block.__dict__["forward"] is own


def test_processes_draw_the_noise_of_one(monkeypatch):
    from lightning_kd.teachers import noisy_teacher

    source = NoisyTeacher(probability=0.5, sigma=0.3)
    logits = torch.randn(6, 10)
    whole = source.perturb(logits, torch.Generator().manual_seed(1))
    monkeypatch.setattr(noisy_teacher, "world_size", lambda: 2)
    for rank, part in enumerate(logits.split(3)):
        monkeypatch.setattr(noisy_teacher, "rank", lambda rank=rank: rank)
        found = source.perturb(part, torch.Generator().manual_seed(1))
        assert torch.equal(found, whole[3 * rank : 3 * rank + 3])


# ---------------------------------------------------------------------- two processes

RANKS = """
import sys
import torch
from lightning.pytorch import Trainer
from lightning_kd import SubTeacher, Supervised
from lightning_kd.data import Digits
from lightning_kd.teachers import StochasticDepth
from lightning_kd.models import resnet8, resnet14

def make(kind):
    torch.manual_seed(0)
    if kind == "teacher":
        network = resnet14(in_channels=1, width=4).double().eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0  # statistics of half a batch are others
        return Supervised(network.requires_grad_(), stochastic_depth=StochasticDepth(survival=0.5))
    frozen = resnet14(in_channels=1, width=4).double()
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
    return SubTeacher(student, frozen, StochasticDepth(3, survival=0.5))

def fit(module, devices):
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, precision="64-true",
        strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=Digits(batch_size=64 // devices, subset=256, val_split=0.0))
    return trainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    module = make("student")
    trainer = fit(module, 2)
    seeds = [None, None]
    source = module.teachers.source
    torch.distributed.all_gather_object(seeds, (source.seed, source.times))
    assert seeds[0] == seeds[1], seeds
    if trainer.is_global_zero:
        torch.save(module.student.state_dict(), sys.argv[1] + "/student.pt")
    module = make("teacher")
    trainer = fit(module, 2)  # blocks that are left out have gradients all the same
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(2)]
    torch.distributed.all_gather(everyone, flat)
    assert torch.equal(*everyone)
"""


def test_two_processes_equal_one(tmp_path):
    """The same paths in both; the student learns what it learns alone."""
    launch(RANKS, tmp_path, str(tmp_path))
    scope = {}
    exec(RANKS, scope)
    module = scope["make"]("student")
    scope["fit"](module, 1)
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    for name, value in module.student.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-10)
