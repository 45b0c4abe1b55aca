"""Each mistake gets one clear sentence, before an hour is lost."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd import MultiTeacher, PeerCohort, Supervised
from lightning_kd.losses import Hint, SoftTarget
from lightning_kd.models import resnet8
from lightning_kd.weighting import Weighting
from tests.conftest import TinyNet


def test_no_teacher():
    with pytest.raises(ValueError, match=r"at least one teacher, got none.*Supervised"):
        MultiTeacher(TinyNet(), [])


def test_class_counts_differ(make_module, make_trainer, digits):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"teacher 0 and the student .* got 7 and 10"):
        trainer.fit(make_module(teachers=[TinyNet(num_classes=7)]), datamodule=digits())
    with pytest.raises(ValueError, match="student to have 10 classes, as the data has, got 7"):
        trainer.fit(Supervised(TinyNet(num_classes=7), num_classes=10), datamodule=digits())


def test_wrong_channels(make_trainer, digits):
    with pytest.raises(ValueError, match=r"the student .*\(1, 8, 8\).*expects 3 channels, got 1"):
        make_trainer().fit(Supervised(resnet8()), datamodule=digits())
    module = MultiTeacher(TinyNet(), [resnet8()])
    with pytest.raises(ValueError, match=r"teacher 0 .*in_channels=1"):
        make_trainer().fit(module, datamodule=digits())


def test_layer_that_does_not_exist(make_module, make_trainer, digits):
    for loss, near in ((Hint("bm", "relu"), "bn"), (Hint("relu", "linaer"), "linear")):
        with pytest.raises(ValueError, match=f"Near names: .*{near}"):
            make_trainer().fit(make_module(losses=[loss]), datamodule=digits())


def test_parts_of_the_wrong_kind():
    with pytest.raises(TypeError, match="losses of type DistillationLoss, got KLDivLoss"):
        MultiTeacher(TinyNet(), [TinyNet()], losses=[torch.nn.KLDivLoss()])
    with pytest.raises(TypeError, match="teachers of type Module, got str"):
        MultiTeacher(TinyNet(), ["resnet50"])
    with pytest.raises(ValueError, match='"epoch" or "step"'):
        Supervised(TinyNet(), scheduler_interval="batch")


def test_empty_dataset_and_strange_batches(make_trainer):
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)))
    with pytest.raises(ValueError, match="empty dataset"):
        make_trainer().fit(Supervised(TinyNet()), empty)
    triples = DataLoader(TensorDataset(*(torch.zeros(4, 1, 8, 8),) * 3))
    with pytest.raises(TypeError, match="list of 3: override unpack"):
        make_trainer().fit(Supervised(TinyNet()), triples)


def test_labels_out_of_range(make_trainer):
    data = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 12])), 4)
    with pytest.raises(ValueError, match=r"labels from 0 to 9.*got 0 to 12"):
        make_trainer().fit(Supervised(TinyNet()), data)


def test_nothing_to_learn_from(make_trainer):
    images = DataLoader(torch.zeros(4, 1, 8, 8), 4)
    with pytest.raises(ValueError, match="at least one loss"):
        make_trainer().fit(Supervised(TinyNet()), images)
    MultiTeacher(TinyNet(), [TinyNet()])  # with teachers the same images are enough
    make_trainer().fit(MultiTeacher(TinyNet(), [TinyNet()]), images)


class Breaks(SoftTarget):
    """Infinite from its sixth batch on."""

    calls = 0

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args) * (float("inf") if self.calls > 5 else 1.0)


def test_a_term_that_breaks_is_named_and_the_last_good_checkpoint_kept(
    make_module, make_trainer, digits, tmp_path
):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(
        FloatingPointError, match=r"Loss breaks became NaN .*checkpoint is .*step=5"
    ):
        trainer.fit(make_module(losses=[Breaks()]), datamodule=digits())
    kept = sorted(p.name for p in tmp_path.glob("*.ckpt"))
    assert kept == [f"step={n}.ckpt" for n in range(1, 6)]
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() for v in state.values())


def test_a_broken_state_is_never_saved(make_module, make_trainer, digits, tmp_path):
    """Where the device is only looked at now and then, saving looks."""
    module = make_module()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    module.loss_tracker.add({"hint": torch.tensor(float("nan"))}, {}, 1)
    with pytest.raises(FloatingPointError, match="Loss hint"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([2.0, 1.0]), "sum of 3"),
        (torch.tensor([2.0, -1.0]), "least weight of -1"),
        (torch.ones(4, 2) / 2, r"of shape \(2,\) or \(2, 4\)"),
        ([0.5, 0.5], "got list"),
    ],
)
def test_weights_that_are_none_are_reported(weights, message, make_module):
    class Strange(Weighting):
        def forward(self, student, teachers, target):
            return weights

    module = make_module(weighting=Strange())
    module._build(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=f"Expected Strange to return weights.*{message}"):
        module.compute_losses(torch.rand(4, 1, 8, 8), torch.arange(4))


def test_losses_that_are_no_list_are_reported(make_module):
    with pytest.raises(
        TypeError,
        match="Expected a list of losses, or a mapping of names to losses, got SoftTarget",
    ):
        make_module(losses=SoftTarget())


@pytest.mark.parametrize("norm", [0, -1.0, float("nan"), float("inf")])
def test_a_norm_to_clip_to_is_positive_and_finite(norm, tiny):
    with pytest.raises(ValueError, match="clip_norm > 0 and finite"):
        PeerCohort([tiny(), tiny()], clip_norm=norm)
