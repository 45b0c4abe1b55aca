"""Teachers asked once: the same losses, no teacher in training, nothing stale."""

import errno
import json
import os

import pytest
import torch

from lightning_kd import MultiTeacher, PeerCohort, Supervised, Teacher
from lightning_kd.data import Digits, ImageFolder
from lightning_kd.data.batches import as_bits
from lightning_kd.losses import Hint, LogitMSE, SoftTarget, SubsetTarget
from lightning_kd.models import Normalized
from lightning_kd.teachers import TeacherCache
from lightning_kd.weighting import Confidence, Switching
from tests.conftest import TinyNet, assert_same_state, state_of
from tests.modules.test_distributed import launch

DATA = {"batch_size": 40, "subset": 200, "val_split": 40, "crop_padding": 1, "flip": True}


def module(**options):
    torch.manual_seed(1)
    return MultiTeacher(TinyNet(), [TinyNet(8), TinyNet(6)], **options)


@pytest.fixture
def fit(make_trainer, tmp_path):
    def go(made=None, cache=None, data=(), resume=None, **options):
        torch.manual_seed(0)
        made = module() if made is None else made
        source = Digits(**{**DATA, **dict(data)}, teacher_cache=cache)
        source.shuffle_seed = 3
        trainer = make_trainer(**options)
        trainer.fit(made, datamodule=source, ckpt_path=resume, weights_only=True)
        return made, trainer

    return go


@pytest.fixture
def cache(tmp_path):
    return lambda **o: TeacherCache(str(tmp_path / "cache"), **o)


@pytest.mark.parametrize("weighting", [None, Confidence, Switching])
def test_training_is_as_with_live_teachers(fit, cache, weighting):
    """Without crops, where views are alike; answers are half precision."""
    plain = {"crop_padding": 0, "flip": False}
    options = {} if weighting is None else {"weighting": weighting()}
    live, one = fit(module(**options), data=plain, num_sanity_val_steps=0)
    options = {} if weighting is None else {"weighting": weighting()}
    cached, two = fit(module(**options), cache(), data=plain, num_sanity_val_steps=0)
    for name, value in live.student.state_dict().items():
        torch.testing.assert_close(cached.student.state_dict()[name], value, atol=2e-3, rtol=2e-3)
    for key, value in one.callback_metrics.items():
        torch.testing.assert_close(two.callback_metrics[key], value, atol=2e-2, rtol=2e-2)


def test_each_view_is_what_the_teacher_says_of_the_images_the_student_sees(fit, cache):
    made, _ = fit(cache=cache(views=3, seed=5), max_epochs=1)
    source = Digits(**DATA, teacher_cache=cache(views=3, seed=5))
    source.setup("fit")
    facts = json.loads((cache().folder / "facts.json").read_text())
    images = facts.pop("images")
    assert source.teacher_cache.find(facts, images)
    loader = source.train_dataloader()
    seen = {}
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            x, _, bits = source.on_after_batch_transfer(batch, 0)
            said = bits.view(torch.half)
            live = torch.stack([t(x).logits for t in made.teachers], 1)
            torch.testing.assert_close(said.float(), live, atol=5e-3, rtol=5e-3)
            seen.setdefault(epoch, []).append(said)
    first, second, fourth = (torch.cat(seen[e]).sum((1, 2)).sort().values for e in (0, 1, 3))
    assert not torch.allclose(first, second, atol=1e-2)
    torch.testing.assert_close(first, fourth)  # epoch 3 is view 0 again, in another order


def test_teachers_run_once_for_each_image_and_view(fit, cache):
    made = module()
    seen = []
    for network in (t.network for t in made.teachers):
        network.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    fit(made, cache(views=2), limit_val_batches=0, max_epochs=4)
    assert sum(seen) == 2 * 2 * 200 + 2 + 2 * 32  # and the dry run, and a few to compare with
    seen.clear()
    fit(made, cache(views=2), limit_val_batches=0, max_epochs=2)
    assert sum(seen) == 2 * 32


def test_resumed_run_equals_the_uninterrupted_one(fit, cache, tmp_path):
    whole, _ = fit(cache=cache(views=2), max_epochs=3)
    _, trainer = fit(cache=cache(views=2), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, _ = fit(cache=cache(views=2), max_epochs=3, resume=tmp_path / "half.ckpt")
    assert_same_state(state_of(again.student), state_of(whole.student))


def test_the_largest_logits_keep_their_probability(fit, cache):
    fit(cache=cache(top_k=3), max_epochs=1)
    kept = cache(top_k=3)
    facts = json.loads((kept.folder / "facts.json").read_text())
    kept.find({k: v for k, v in facts.items() if k != "images"}, facts["images"])
    said = kept.read(0, torch.arange(50)).float().exp()
    torch.testing.assert_close(said.sum(2), torch.ones(50, 2), atol=1e-2, rtol=0)
    least = said.sort(2).values[..., :7]
    torch.testing.assert_close(least.amax(2), least.amin(2))
    source = Digits(**DATA, teacher_cache=kept)
    source.setup("fit")
    x = source.training[0][:50]
    x = source.on_after_batch_transfer((x, None, as_bits(kept.draws(0, 200, 3)[:50])), 0)[0]
    live = torch.stack([t(x).logits.softmax(1) for t in module().teachers], 1)
    top = live.topk(3, 2)
    torch.testing.assert_close(said.gather(2, top.indices), top.values, atol=2e-3, rtol=2e-3)


def test_teachers_of_some_classes(fit, cache):
    teachers = [
        Teacher(TinyNet(num_classes=4), classes=[0, 1, 2, 3], num_classes=10),
        Teacher(TinyNet(num_classes=7), classes=list(range(3, 10)), num_classes=10),
    ]
    made = MultiTeacher(TinyNet(), teachers, losses=[SubsetTarget(weight=1.0)])
    _, trainer = fit(made, cache(), max_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_bf16(fit, cache):
    _, trainer = fit(cache=cache(), max_epochs=1, precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


# ---------------------------------------------------------------------- nothing stale


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"cache": {"seed": 1}}, r"seed \(0, now 1\)"),
        ({"cache": {"views": 2}}, r"views \(1, now 2\)"),
        ({"cache": {"top_k": 2}}, r"top_k \(None, now 2\)"),
        ({"data": {"split_seed": 1}}, "data"),
        ({"data": {"crop_padding": 2}}, "data"),
        ({"data": {"flip": False}}, "data"),
        ({"data": {"subset": 199}}, r"data, images \(200, now 199\)"),
        ({"teacher": True}, "teachers"),
    ],
)
def test_answers_about_something_else_are_refused(fit, cache, change, what):
    fit(cache=cache(), max_epochs=1)
    made = module()
    if "teacher" in change:
        made.teachers[0].network.linear.bias.data += 1
    with pytest.raises(ValueError, match=f"but {what} changed since"):
        fit(made, cache(**change.get("cache", {})), data=change.get("data", {}))


def test_an_interrupted_filling_starts_again(fit, cache):
    folder = cache().folder
    made = module()
    made.teachers[0].network.register_forward_hook(
        lambda m, x, y: (_ for _ in ()).throw(KeyboardInterrupt) if len(y) > 1 else None
    )
    with pytest.raises(SystemExit):
        fit(made, cache(), max_epochs=1)
    assert not (folder / "facts.json").exists()
    fit(cache=cache(), max_epochs=1)
    assert (folder / "facts.json").exists()


def test_other_batches_of_three_are_still_refused():
    batch = (torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4))
    with pytest.raises(TypeError, match=r"batches of \(images, labels\), got"):
        module().unpack(batch)


@pytest.mark.parametrize(
    ("wrap", "other"),
    [
        (lambda n: Normalized(n, [0.2], [0.5]), lambda n: Normalized(n, [0.5], [0.2])),
        (
            lambda n: Teacher(n, list(range(10)), 12),
            lambda n: Teacher(n, list(range(2, 12)), 12),
        ),
        (lambda n: Scaled(n, 1.0), lambda n: Scaled(n, 3.0)),
    ],
)
def test_the_same_weights_in_another_wrapper_are_refused(fit, cache, wrap, other):
    torch.manual_seed(2)
    network = TinyNet(8)
    classes = 12 if isinstance(wrap(network), Teacher) else 10

    def made(wrapped):
        torch.manual_seed(1)
        loss = SubsetTarget(weight=1.0) if classes == 12 else SoftTarget()
        return MultiTeacher(TinyNet(num_classes=classes), [wrapped], losses=[loss])

    fit(made(wrap(network)), cache(), max_epochs=1)
    fit(made(wrap(network)), cache(), max_epochs=1)
    with pytest.raises(ValueError, match=r"teachers changed since|match those of the teachers"):
        fit(made(other(network)), cache(), max_epochs=1)


class Scaled(torch.nn.Module):
    """What it does differently is neither in its weights nor in its description."""

    def __init__(self, network, scale):
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x):
        return self.network(x * self.scale)


def test_answers_that_were_lost_are_reported(fit, cache):
    """As after a power failure: the file has its size, but not all of its values."""
    fit(cache=cache(), max_epochs=1)
    path = cache().folder / "logits.f16"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    with pytest.raises(ValueError, match="match those of the teachers, but they differ"):
        fit(cache=cache(), max_epochs=1)


def test_two_fillings_at_once_do_not_mix(fit, cache):
    one, two = (TeacherCache(str(cache().folder)) for _ in range(2))
    teachers = [Teacher(TinyNet(8)) for _ in range(2)]
    facts = [c.facts([t], "x", 10) for c, t in zip((one, two), teachers, strict=True)]
    said = [torch.full((1, 4, 10), float(n)) for n in (1, 2)]
    for n, each in enumerate((one, two)):
        assert each.create(facts[n], 4, f"run{n}", first=True)
    one.write(0, torch.arange(4), said[0])
    one.finish(facts[0], 4, "run0")
    assert one.find(facts[0], 4)
    two.write(0, torch.arange(4), said[1])
    assert one.read(0, torch.arange(4)).unique().tolist() == [1]
    two.finish(facts[1], 4, "run1")
    assert one.read(0, torch.arange(4)).unique().tolist() == [1]
    with pytest.raises(ValueError, match="teachers changed since"):
        one.find(facts[0], 4)


def test_no_room_for_answers_is_told_before_teachers_are_asked(fit, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"8000 bytes into .*: No space left on device. Free space"):
        fit(cache=cache(), max_epochs=1)
    assert not any(cache().folder.iterdir())


def test_top_k_is_refused_where_it_keeps_too_little(fit, cache):
    with pytest.raises(ValueError, match=r"probabilities with top_k.*LogitMSE"):
        fit(module(losses=[LogitMSE()]), cache(top_k=3))
    teachers = [Teacher(TinyNet(num_classes=4), classes=[0, 1, 2, 3], num_classes=10)]
    made = MultiTeacher(TinyNet(), teachers, losses=[SubsetTarget(weight=1.0)])
    with pytest.raises(ValueError, match="know all classes with top_k"):
        fit(made, cache(top_k=3))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_crops_are_the_same_in_any_precision(fit, cache, precision):
    """Lightning rounds floating point inputs, but must not round where images are cropped."""
    seen = {}
    for kind in ("32-true", precision):
        made = module(losses=[SoftTarget()])
        seen[kind] = []
        made.on_train_batch_start = lambda batch, *_, kept=seen[kind]: kept.append(batch[0].float())
        fit(made, data={"crop_padding": 2}, precision=kind, max_epochs=1, limit_train_batches=2)
    for one, two in zip(*seen.values(), strict=True):
        torch.testing.assert_close(one, two, atol=0.01, rtol=0)


def test_a_dry_development_run_after_a_real_one_asks_live_teachers(fit, cache, make_trainer):
    source = Digits(**DATA, teacher_cache=cache())
    make_trainer(max_epochs=1).fit(module(), datamodule=source)
    asked = []
    made = module()
    for teacher in made.teachers:
        teacher.network.register_forward_hook(lambda m, x, y: asked.append(m.training))
    make_trainer(fast_dev_run=True).fit(made, datamodule=source)
    assert asked
    assert not source.teacher_cache.ready


def test_teachers_of_more_outputs_than_the_data_has_classes(fit, cache):
    made = MultiTeacher(TinyNet(num_classes=12), [TinyNet(8, num_classes=12)])
    fit(made, cache(), max_epochs=1)
    assert json.loads((cache().folder / "facts.json").read_text())["classes"] == 12


def test_a_subclass_that_reads_batches_sees_pairs(fit, cache):
    class Mine(MultiTeacher):
        def unpack(self, batch):
            x, y = batch
            return x, y

    torch.manual_seed(1)
    made = Mine(TinyNet(), [TinyNet(8)])
    fit(made, cache(), max_epochs=1)
    asked = []
    made.teachers[0].network.register_forward_hook(lambda m, x, y: asked.append(len(y)))
    _, trainer = fit(made, cache(), max_epochs=1, limit_val_batches=0)
    assert asked == [32]  # to compare, not to train
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_damage_is_reported(fit, cache):
    fit(cache=cache(), max_epochs=1)
    folder = cache().folder
    content = (folder / "logits.f16").read_bytes()
    (folder / "logits.f16").write_bytes(content[:-10])
    with pytest.raises(ValueError, match="to hold 8000 bytes, got 7990: delete"):
        fit(cache=cache())
    (folder / "facts.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: delete"):
        fit(cache=cache())


def test_who_cannot_use_it_says_so(fit, cache, tiny):
    with pytest.raises(ValueError, match="read logits with teacher_cache, got Hint"):
        fit(module(losses=[SoftTarget(), Hint("relu", "relu")]), cache())
    for made in (Supervised(tiny()), PeerCohort([tiny(), tiny()])):
        with pytest.raises(ValueError, match=f"got {type(made).__name__}: leave the cache out"):
            fit(made, cache())
    with pytest.raises(ValueError, match="top_k below the number of classes"):
        fit(cache=cache(top_k=10))
    for wrong in ({"views": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="views and top_k"):
            cache(**wrong)


def test_a_folder_of_images_is_cached_too(tmp_path, make_trainer, cache):
    from torchvision.utils import save_image

    for name in "ab":
        for number in range(6):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.rand(1, 8, 8), path)
    data = ImageFolder(
        str(tmp_path), image_size=8, channels=1, num_workers=0, val_split=0.0, batch_size=4,
        crop_padding=1, teacher_cache=cache(views=2),
    )  # fmt: skip
    made = MultiTeacher(TinyNet(num_classes=2), [TinyNet(8, num_classes=2)])
    trainer = make_trainer(max_epochs=3)
    trainer.fit(made, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_logits_that_half_precision_cannot_hold_are_refused(fit, cache, value):
    broken = TinyNet(8)
    broken.linear.bias.data[3] = value
    with pytest.raises(ValueError, match=r"up to 65504.*are they trained"):
        fit(MultiTeacher(TinyNet(), [broken]), cache=cache())


RANKS = """
import sys
import torch
from lightning.pytorch import Trainer
from lightning_kd.data import Digits
from lightning_kd.teachers import TeacherCache
from tests.modules.test_teacher_cache import DATA, module

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )
    cache = TeacherCache(sys.argv[1], views=2)
    data = Digits(**{**DATA, "subset": 199}, teacher_cache=cache)
    trainer.fit(module(), datamodule=data)
"""


def test_processes_share_the_work_and_the_answers(fit, cache, tmp_path):
    launch(RANKS, tmp_path, str(tmp_path / "two"))
    fit(cache=cache(views=2), data={"subset": 199}, max_epochs=1)
    one, two = (
        torch.frombuffer(bytearray((tmp_path / f / "logits.f16").read_bytes()), dtype=torch.float16)
        for f in ("cache", "two")
    )
    torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)
