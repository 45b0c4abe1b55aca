"""Faults that were found once, each with the test that would have found it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_kd import MultiTeacher, Supervised
from lightning_kd.functional import kl_divergence
from lightning_kd.losses import DistillationLoss, Hint, SoftTarget, losses_by_name
from lightning_kd.weighting import Uniform
from tests.conftest import TinyNet, assert_same_state


class Watches(Uniform):
    """Keeps what it is shown beside the training steps."""

    wants_images = True

    def __init__(self):
        super().__init__()
        self.images, self.observed, self.updates = [], 0, 0

    def calibrate(self, images, teachers):
        self.images = images
        self.answers = [network(x) for network in teachers for x in images]

    def observe(self, student, teachers, target):
        self.observed += len(target)

    def after_validation(self):
        self.updates += 1


def images_and_labels(count=24):
    return TensorDataset(torch.randn(count, 1, 8, 8), torch.arange(count) % 10)


# ---------------------------------------------------------------------- what is measured


def test_sanity_batches_count_in_no_metric_and_teach_no_weighting(
    make_module, make_trainer, digits
):
    results = []
    for steps in (0, 2):
        weighting = Watches()
        torch.manual_seed(2)
        trainer = make_trainer(max_epochs=1, num_sanity_val_steps=steps)
        trainer.fit(make_module(weighting=weighting), datamodule=digits(val_split=150))
        assert (weighting.observed, weighting.updates) == (150, 1)
        results.append({k: v.item() for k, v in trainer.callback_metrics.items()})
    assert results[0] == results[1]
    assert "val/ece" in results[0]


def test_validation_loss_is_the_mean_over_labelled_samples(make_module, make_trainer):
    images, labels = images_and_labels(22).tensors
    labels[[0, 1, 2, 3, 4, 5, 6, 9, 21]] = -1  # batches of 1, 7 and 5 labels
    module, trainer = make_module(), make_trainer()
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    got = trainer.validate(module, loader, verbose=False)[0]
    known = labels >= 0
    right = F.cross_entropy(module.student.eval()(images[known]), labels[known])
    assert got["val/loss"] == pytest.approx(right.item(), rel=1e-5)


def test_a_teacher_that_rules_a_class_out_gives_finite_values_and_gradients():
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    teacher[0, 1] = teacher[2, 3] = -torch.inf
    teacher.requires_grad_()
    value = kl_divergence(student, teacher, 2.0, 3.0)
    value.sum().backward()
    assert teacher.grad.isfinite().all()
    p, log_q = (teacher.detach() / 3).softmax(1), (student.detach() / 2).log_softmax(1)
    right = (torch.special.xlogy(p, p) - p * log_q).sum(1)
    torch.testing.assert_close(value.detach(), right)
    torch.testing.assert_close(student.grad, (log_q.exp() - p) / 2)


# ---------------------------------------------------------------------- random state


def test_a_checkpoint_restores_the_random_state_only_where_it_is_resumed(
    make_module, make_trainer, digits, tmp_path
):
    def data():
        made = digits()
        made.shuffle_seed = 5  # so that only dropout depends on the seed
        return made

    def go(seed, **resume):
        module = MultiTeacher.load_from_checkpoint(
            tmp_path / "a.ckpt",
            student=TinyNet(dropout=0.3),
            teachers=[TinyNet(8), TinyNet(6)],
            weights_only=True,
        )
        for teacher, given in zip(module.teachers, first.teachers, strict=True):
            teacher.network.load_state_dict(given.network.state_dict())
        torch.manual_seed(seed)
        make_trainer(max_epochs=2).fit(module, datamodule=data(), **resume)
        return module.student.state_dict()

    first, trainer = make_module(), make_trainer(max_epochs=1)
    trainer.fit(first, datamodule=data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_same_state(go(1), go(1))
    assert not torch.equal(go(1)["linear.weight"], go(2)["linear.weight"])
    resume = {"ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    assert_same_state(go(1, **resume), go(2, **resume))


# ---------------------------------------------------------------------- whatever loads data


class Stream(IterableDataset):
    def __iter__(self):
        yield from images_and_labels()


class OfTwo(MultiTeacher):
    """Learns from the second of two loaders that are read together."""

    def unpack(self, batch):
        return super().unpack(batch["b"] if isinstance(batch, dict) else batch)


class OfThree(MultiTeacher):
    def unpack(self, batch):
        return super().unpack(batch[2] if len(batch) == 3 else batch)


def loaders():
    data = images_and_labels()
    plain = DataLoader(data, batch_size=8)
    return {
        "stream": (MultiTeacher, DataLoader(Stream(), batch_size=8)),
        "no batch size": (MultiTeacher, DataLoader([data[:8], data[8:16]], batch_size=None)),
        "batch sampler": (MultiTeacher, DataLoader(data, batch_sampler=[[0, 1], [2, 3]])),
        "dict": (OfTwo, {"a": DataLoader(torch.zeros(9)), "b": plain}),
        "list": (OfThree, [DataLoader(torch.zeros(9)), DataLoader(torch.zeros(9)), plain]),
        "combined": (OfTwo, CombinedLoader({"a": plain, "b": plain}, "min_size")),
    }


@pytest.mark.parametrize("kind", loaders())
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_any_loader_trains_and_shows_its_images_to_a_weighting(kind, precision, make_trainer):
    paradigm, loader = loaders()[kind]
    weighting = Watches()
    module = paradigm(TinyNet(), [TinyNet(8)], weighting=weighting)
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(module, loader)
    assert module.distillation.input_shape == (1, 8, 8)
    assert trainer.callback_metrics["train/loss"] > 0
    assert weighting.images[0].shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("pack", [lambda loader: [loader], lambda loader: {"x": loader}])
def test_evaluation_reads_loaders_one_after_the_other(pack, make_trainer):
    loader = DataLoader(images_and_labels(), batch_size=8)
    module = MultiTeacher(TinyNet(), [TinyNet(8)])
    assert make_trainer().test(module, pack(loader), verbose=False)[0]["test/loss"] > 0


def test_the_dry_run_draws_nothing_from_a_batch_sampler(make_trainer):
    drawn = []

    class Sampler(list):
        def __iter__(self):
            drawn.append(1)
            return super().__iter__()

    loader = DataLoader(images_and_labels(), batch_sampler=Sampler([[0, 1], [2, 3]]))
    make_trainer(max_epochs=1).fit(Supervised(TinyNet()), loader)
    assert len(drawn) == 1


def test_batches_of_one_tensor_are_images_without_labels(make_module, make_trainer):
    loader = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8)), batch_size=8)
    module, trainer = make_module(), make_trainer(max_epochs=1)
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["train/soft_target"] > 0
    assert {"train/task", "val/accuracy"}.isdisjoint(trainer.callback_metrics)
    assert 0 <= trainer.callback_metrics["val/agreement"] <= 1
    assert len(trainer.predict(module, loader)) == 2


# ---------------------------------------------------------------------- layers that are replaced


class Sync(Callback):
    """What Trainer(sync_batchnorm=True) does around a fit, on one CPU."""

    def on_fit_start(self, trainer, pl_module):
        TorchSyncBatchNorm().apply(pl_module)

    def on_train_start(self, trainer, pl_module):
        self.student = type(pl_module.student.bn)
        self.teacher = type(pl_module.teachers[0].network.bn)

    def teardown(self, trainer, pl_module, stage):
        TorchSyncBatchNorm().revert(pl_module)


def test_tapped_layers_may_be_replaced_around_a_fit(make_module, make_trainer, digits):
    module = make_module(losses=[Hint("bn", "bn")])
    sync, data = Sync(), digits()
    trainer = make_trainer(max_epochs=1, callbacks=[sync])
    trainer.fit(module, datamodule=data)
    assert (sync.student, sync.teacher) == (nn.SyncBatchNorm, nn.BatchNorm2d)
    assert trainer.callback_metrics["train/hint"] > 0
    assert trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"] >= 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)


def test_a_copy_of_a_prepared_module_taps_its_own_student(make_module):
    module = make_module(losses=[Hint("relu", "relu")])
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    module._build(x)
    module.eval()
    module(x).sum().backward()
    twin = copy.deepcopy(module)
    nn.init.zeros_(twin.student.bn.weight)
    assert twin.distillation.student_output(x).features["relu"].sum() == 0
    assert module.distillation.student_output(x).features["relu"].sum() > 0
    assert twin.compute_losses(x, y)["hint"] != module.compute_losses(x, y)["hint"]


# ---------------------------------------------------------------------- names in the log


def test_reserved_names_are_reported_and_equal_ones_numbered_by_themselves():
    class HintExtra(Hint):
        pass

    named = losses_by_name([Hint("a", "a"), HintExtra("a", "a"), Hint("a", "a"), SoftTarget()])
    assert list(named) == ["hint", "hint_extra", "hint_2", "soft_target"]
    for name in ("Loss", "Task"):
        loss = type(name, (DistillationLoss,), {"forward": lambda *_: torch.zeros(())})()
        with pytest.raises(ValueError, match=f"taken in the log, got {name.lower()!r} for {name}"):
            losses_by_name([loss])


@pytest.mark.parametrize("limits", [{"max_epochs": 1}, {"max_steps": 2}])
def test_logged_means_weigh_every_sample_the_same(make_module, make_trainer, limits):
    """Uneven batches, and an epoch that a number of steps cuts short."""
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((float(outputs["task"]), len(batch[0])))

    trainer = make_trainer(callbacks=[Watch()], **{"max_epochs": 5, **limits})
    trainer.fit(make_module(task_weight=1.0), loader)
    assert len(seen) == (2 if "max_steps" in limits else 3)
    wanted = sum(v * n for v, n in seen) / sum(n for _, n in seen)
    assert float(trainer.callback_metrics["train/task"]) == pytest.approx(wanted, rel=1e-5)
    assert float(trainer.callback_metrics["train/loss"]) > wanted
