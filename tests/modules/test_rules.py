"""The rules of the house: teachers untouched, resume, checkpoints, ranks."""

import copy

import pytest
import torch
import torch.distributed
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import MultiTeacher, Supervised, Teacher
from lightning_kd.callbacks import TemperatureScheduler
from lightning_kd.losses import AttentionTransfer, Hint, LogitMSE, SoftTarget
from lightning_kd.schedules import Linear
from tests.conftest import Frozen, TinyNet, assert_same_state, state_of


def all_losses():
    return [
        SoftTarget(4.0, weight=0.9),
        Hint("relu", "relu"),
        AttentionTransfer("relu", "relu", weight=10.0),
        LogitMSE(weight=0.1),
    ]


def test_fit_leaves_teachers_bit_identical_and_trains_the_student(
    make_module, digits, make_trainer
):
    module = make_module(losses=all_losses())
    before = [state_of(t.network) for t in module.teachers]
    student = state_of(module.student)
    module.train()
    make_trainer(callbacks=[Frozen()]).fit(module, datamodule=digits())
    for teacher, state in zip(module.teachers, before, strict=True):
        assert_same_state(state_of(teacher.network), state)
        assert all(p.grad is None for p in teacher.network.parameters())
    assert all(not torch.equal(v, student[k]) for k, v in module.student.state_dict().items())


def test_a_run_gives_teachers_back_as_they_were(tiny, make_trainer, digits):
    """Half in train mode and half trainable, as somebody may hand a network over."""
    network = tiny(8)
    network.bn.eval()
    network.conv.requires_grad_(False)

    def ways():
        modes = [part.training for part in network.modules()]
        return modes, [p.requires_grad for p in network.parameters()]

    before = ways()
    module = MultiTeacher(tiny(), [network])
    assert not network.training
    trainer = make_trainer(max_epochs=1, callbacks=[Frozen()])
    trainer.fit(module, datamodule=digits())
    assert ways() == before
    trainer.test(module, datamodule=digits(), verbose=False)
    assert ways() == before
    make_trainer(max_epochs=1, callbacks=[Frozen()]).fit(module, datamodule=digits())
    assert ways() == before


def test_teacher_stays_in_eval_even_if_somebody_trains_its_network(tiny):
    network = tiny()
    teacher = Teacher(network)
    network.train()
    before = state_of(network)
    teacher(torch.randn(4, 1, 8, 8))
    assert_same_state(state_of(network), before)


def test_optimizer_holds_student_and_adapters_only(make_module, digits, make_trainer):
    module = make_module(losses=all_losses())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    wanted = [*module.student.parameters(), *module.distillation.losses["hint"].parameters()]
    assert len(list(module.distillation.losses["hint"].parameters())) == 6
    assert held == {id(p) for p in wanted}


def test_student_that_is_its_own_teacher_is_refused(tiny):
    network = tiny()
    with pytest.raises(ValueError, match="shared weights"):
        MultiTeacher(network, [network])
    MultiTeacher(network, [copy.deepcopy(network)])


def test_gradient_flows_through_a_teacher_to_its_input(tiny):
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    Teacher(tiny())(x).logits.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_deepcopy_shares_the_teacher_but_not_the_student(make_module):
    module = make_module()
    twin = copy.deepcopy(module)
    assert twin.teachers[0].network is module.teachers[0].network
    assert twin.student is not module.student


class Interrupt(Callback):
    """Stop at a batch, as a kill would, after a checkpoint."""

    def __init__(self, at, path):
        self.at, self.path, self.seen = at, path, 0

    def on_train_batch_end(self, trainer, *args):
        self.seen += 1
        if self.seen == self.at:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def run(make_module, make_trainer, digits, path=None, stop=None, resume=None):
    torch.manual_seed(7)
    module = make_module(
        losses=all_losses(),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
    )
    callbacks = [TemperatureScheduler(Linear(8, 2, 12), interval="step")]
    if stop:
        callbacks.append(Interrupt(stop, path))
    trainer = make_trainer(max_epochs=4, callbacks=callbacks)
    torch.manual_seed(
        11 if resume is None else 12345
    )  # a resumed process starts with another state
    try:
        trainer.fit(module, datamodule=digits(), ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop
    return module, trainer, callbacks[0]


# 4 batches an epoch: inside an epoch, at its end, and in a later one
@pytest.mark.parametrize("stop", [2, 4, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    stop, make_module, make_trainer, digits, tmp_path
):
    whole, trainer, _ = run(make_module, make_trainer, digits)
    path = str(tmp_path / "stopped.ckpt")
    run(make_module, make_trainer, digits, path, stop)
    resumed, again, scheduler = run(make_module, make_trainer, digits, resume=path)
    assert again.global_step == trainer.global_step == 16
    assert scheduler.count == 16
    assert_same_state(whole.state_dict(), resumed.state_dict())
    ours, theirs = whole.optimizers().state_dict(), resumed.optimizers().state_dict()
    assert str(ours) == str(theirs)


def test_resume_from_the_end_of_an_epoch_by_model_checkpoint(
    make_module, make_trainer, digits, tmp_path
):
    def go(epochs, **fit):
        torch.manual_seed(5)
        module = make_module()
        saver = ModelCheckpoint(tmp_path, filename=f"{epochs}", save_on_train_epoch_end=False)
        trainer = make_trainer(max_epochs=epochs, callbacks=[saver], enable_checkpointing=True)
        trainer.fit(module, datamodule=digits(), **fit)
        return module

    whole = go(4)
    go(2)
    resumed = go(4, ckpt_path=str(tmp_path / "2.ckpt"))
    assert_same_state(whole.state_dict(), resumed.state_dict())


def test_same_seed_same_weights_and_other_seed_others(make_module, make_trainer, digits):
    def go(seed):
        module = make_module()
        torch.manual_seed(seed)
        make_trainer().fit(module, datamodule=digits())
        return module.student.state_dict()

    assert_same_state(go(1), go(1))
    assert not torch.equal(go(1)["linear.weight"], go(2)["linear.weight"])


def test_checkpoint_is_free_of_teachers_and_pickle(make_module, make_trainer, digits, tmp_path):
    module = make_module(losses=all_losses())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"]
    assert not [k for k in checkpoint["state_dict"] if "teacher" in k]
    again = MultiTeacher.load_from_checkpoint(
        path,
        student=TinyNet(),
        teachers=[TinyNet(8), TinyNet(6)],
        losses=all_losses(),
        weights_only=True,
    )
    assert again.hparams["task_weight"] == 0.1
    assert_same_state(again.state_dict(), module.state_dict())


def test_supervised_learns_and_its_checkpoint_becomes_a_teacher(
    tiny, make_trainer, digits, tmp_path
):
    from lightning_kd.models import pretrained

    module = Supervised(tiny(8), optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
    trainer = make_trainer(max_epochs=12)
    trainer.fit(module, datamodule=digits(subset=None))
    assert trainer.callback_metrics["val/accuracy"] > 0.7  # guessing: 0.1
    trainer.save_checkpoint(tmp_path / "t.ckpt")
    loaded = pretrained(str(tmp_path / "t.ckpt"), network=tiny(8))
    assert_same_state(state_of(loaded), state_of(module.student))


def test_unlabelled_samples_have_no_task_loss_but_are_distilled(make_module):
    module = make_module()
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([1, -1, 2, -1, -1, 3])
    module._build(x)
    module.eval()
    known = module.compute_losses(x[y >= 0], y[y >= 0])["task"]
    assert torch.allclose(module.compute_losses(x, y)["task"], known)
    none = module.compute_losses(x, torch.full_like(y, -1))
    assert none["task"] == 0
    assert none["soft_target"] > 0


def test_terms_are_named_weighted_and_logged(make_module, make_trainer, digits):
    module = make_module(losses=[SoftTarget(2.0, weight=0.5), SoftTarget(8.0, weight=0.25)])
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    parts = logged["train/task"] + logged["train/soft_target"] + logged["train/soft_target_2"]
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert {
        "val/accuracy",
        "val/ece",
        "val/agreement",
        "val/ensemble/accuracy",
        "val/teacher_1/accuracy",
    } <= logged.keys()
    module.eval()
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    before = module.compute_losses(x, y)
    module.distillation.losses["soft_target"].weight = 1.0
    assert torch.allclose(module.compute_losses(x, y)["soft_target"], 2 * before["soft_target"])


def test_validation_metrics_equal_a_plain_computation(make_module, make_trainer, digits):
    module, data = make_module(), digits()
    trainer = make_trainer()
    trainer.fit(module, datamodule=data)
    got = trainer.validate(module, datamodule=data, verbose=False)[0]
    images, labels = data._val
    x = images.float() / 255
    with torch.no_grad():
        student = module.student.eval()(x)
        teachers = [t(x).logits for t in module.teachers]
        mean = sum(t.softmax(1) for t in teachers) / 2
    right = {
        "val/accuracy": student.argmax(1) == labels,
        "val/agreement": student.argmax(1) == mean.argmax(1),
        "val/ensemble/accuracy": mean.argmax(1) == labels,
        "val/teacher_0/accuracy": teachers[0].argmax(1) == labels,
        "val/teacher_1/accuracy": teachers[1].argmax(1) == labels,
    }
    for key, value in right.items():
        assert got[key] == pytest.approx(value.float().mean().item(), abs=1e-6), key


def test_plain_loaders_and_a_dict_batch_by_overriding_unpack(tiny, make_trainer):
    class Mine(MultiTeacher):
        def unpack(self, batch):
            return batch["image"], batch["label"]

    samples = [{"image": torch.randn(1, 8, 8), "label": i % 10} for i in range(32)]
    module = Mine(tiny(), [tiny(8)])
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, DataLoader(samples, batch_size=8), DataLoader(samples, batch_size=8))
    assert "val/accuracy" in trainer.callback_metrics


def test_one_hundred_steps_overfit_a_batch(tiny, make_trainer):
    torch.manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    module = MultiTeacher(
        tiny(8),
        [tiny(8)],
        task_weight=1.0,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        losses=[SoftTarget(weight=0.01)],
    )
    trainer = make_trainer(max_epochs=100)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
    assert (module.eval()(x).argmax(1) == y).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions(precision, make_module, make_trainer, digits):
    module = make_module(losses=all_losses())
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(module, datamodule=digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_gradient_accumulation_and_clipping(make_module, make_trainer, digits):
    module = make_module()
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
    trainer.fit(module, datamodule=digits())
    assert trainer.global_step == 2


def test_every_stage_runs_with_tapped_layers_and_without_a_fit(make_module, make_trainer, digits):
    for stage in ("validate", "test", "predict"):
        module, trainer = make_module(losses=all_losses()), make_trainer()
        answers = getattr(trainer, stage)(module, datamodule=digits())
        assert len(answers) > 0
    assert answers[0].shape == (64, 10)
    torch.testing.assert_close(answers[0].sum(1), torch.ones(64))


def test_fit_without_validation_data(make_module, make_trainer, digits):
    for options, data in (({"limit_val_batches": 0}, {}), ({}, {"val_split": 0})):
        trainer = make_trainer(**options)
        trainer.fit(make_module(losses=all_losses()), datamodule=digits(**data))
        assert "val/accuracy" not in trainer.callback_metrics
        assert trainer.callback_metrics["train/loss"] > 0
