"""What a network is asked is a part of its own; metrics of one's own beside it."""

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_kd import MultiTeacher, NetworkOutput, PeerCohort, Supervised
from lightning_kd.callbacks import DistillationReport
from lightning_kd.cli import main
from lightning_kd.data import Digits
from lightning_kd.tasks import Classification, Task
from lightning_kd.teachers import TeacherCache
from tests.conftest import TinyNet
from tests.test_configs import ROOT


def test_classification_is_the_default_and_smooths_labels_in_training_alone(make_trainer):
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 10
    module = Supervised(TinyNet(), task=Classification(label_smoothing=0.2))
    assert isinstance(Supervised(TinyNet()).task, Classification)
    module._build(x)
    module.eval()
    logits = module(x)
    smooth = F.cross_entropy(logits, y, label_smoothing=0.2)
    torch.testing.assert_close(module.compute_losses(x, y)["task"], smooth)
    loader = DataLoader(TensorDataset(x, y), batch_size=12)
    got = make_trainer().validate(module, loader, verbose=False)[0]["val/loss"]
    assert got == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\), got 1"):
        Classification(label_smoothing=1.0)


def test_per_sample_losses_and_what_is_read_of_labels():
    task, output = Classification(), NetworkOutput(torch.randn(4, 3))
    target = torch.tensor([0, -1, 2, 1])
    values = task.loss(output, target)
    assert values.shape == (4,)
    assert values[1] == 0
    torch.testing.assert_close(task.mean_loss(output, target), values.sum() / 3)
    assert task.class_logits(output) is output.logits
    soft = torch.tensor([[0.1, 0.9], [0.6, 0.4]])
    assert task.hard_target(soft).tolist() == [1, 0]
    assert task.hard_target(None) is None
    assert torch.equal(task.predict(output), output.logits.softmax(1))


class Sign(Task):
    """Is the one number that a network gives above zero? A question of one's own."""

    watched = "error"
    higher_is_better = False

    def loss(self, output, target):
        return (output.logits[:, 0] - target).square()

    def class_logits(self, output):
        return None

    def hard_target(self, target):
        return target

    def check(self, students, teachers=(), num_classes=None):
        if any(output.logits.shape[1] != 1 for output in (*students.values(), *teachers)):
            raise ValueError("Expected networks of one output.")

    def metrics(self, output):
        return {"error": MeanAbsoluteError()}

    def update(self, metrics, output, target):
        metrics["error"].update(output.logits[:, 0], target)

    def agreement(self, output):
        return MeanAbsoluteError()

    def update_agreement(self, metric, output, reference):
        metric.update(output.logits[:, 0], reference.logits[:, 0])

    def predict(self, output):
        return output.logits[:, 0] > 0


def test_a_task_of_ones_own_is_followed_everywhere(make_trainer, tmp_path):
    """Loss, metrics, report, predictions, and which peer is best, where less is better."""
    x = torch.rand(32, 1, 8, 8)
    loader = DataLoader(TensorDataset(x, x.mean((1, 2, 3))), batch_size=8)
    peers = [TinyNet(num_classes=1), TinyNet(num_classes=1)]
    torch.nn.init.constant_(peers[0].linear.bias, 50.0)  # the worse one, however it learns
    module = PeerCohort(peers, losses=[], task=Sign(), optimizer=lambda p: torch.optim.SGD(p, 1e-5))
    trainer = make_trainer(max_epochs=1, callbacks=[DistillationReport(plot=False)])
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    assert {"val/peer_0/error", "val/peer_1/error", "val/agreement_0_1"} <= set(logged)
    assert "val/peer_0/accuracy" not in logged
    assert logged["val/peer_0/error"] > 10 * logged["val/peer_1/error"]
    assert module.student is peers[1]
    report = yaml.safe_load((tmp_path / "report.json").read_text())
    assert report["watched"] == "error"
    assert report["student"]["peer"] == "peer_1"
    assert report["student"]["error"] == pytest.approx(float(logged["val/peer_1/error"]))
    student = Supervised(TinyNet(num_classes=1), task=Sign())
    assert make_trainer().predict(student, loader)[0].dtype == torch.bool
    with pytest.raises(ValueError, match="networks of one output"):
        make_trainer().fit(Supervised(TinyNet(), task=Sign()), loader)


# ---------------------------------------------------------------------- metrics of one's own


class Hits(MulticlassAccuracy):
    """Counts the samples that it saw, too."""

    def __init__(self):
        super().__init__(10, average="micro")
        self.rows = 0

    def update(self, preds, target):
        super().update(preds, target)
        self.rows += len(target)


@pytest.mark.parametrize("kind", ["student", "cohort"])
def test_own_metrics_see_labelled_samples_alone(kind, make_trainer):
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    y[[0, 5, 19]] = -1
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    own = {"mine": Hits()}
    module = {
        "student": lambda: MultiTeacher(TinyNet(), [TinyNet(8)], metrics=own),
        "cohort": lambda: PeerCohort([TinyNet(), TinyNet(6)], metrics=own),
    }[kind]()
    got = make_trainer().validate(module, loader, verbose=False)[0]
    usual = "val/accuracy" if kind == "student" else "val/ensemble/accuracy"
    assert got["val/mine"] == pytest.approx(got[usual])
    assert module.metrics["val"]["mine"].rows == 17
    assert own["mine"].rows == 0  # each stage has a copy


def test_configure_metrics_in_a_subclass(make_trainer, digits):
    class Mine(Supervised):
        def configure_metrics(self) -> dict[str, Metric]:
            return {"f1": MulticlassF1Score(10)}

    trainer = make_trainer(max_epochs=1)
    module = Mine(TinyNet())
    trainer.fit(module, datamodule=digits())
    assert 0 <= trainer.callback_metrics["val/f1"] <= 1
    assert "test/f1" in trainer.test(module, datamodule=digits(), verbose=False)[0]


def test_metrics_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs/digits/single_teacher.yaml").read_text())
    kind = {"class_path": "torchmetrics.classification.MulticlassF1Score",
            "init_args": {"num_classes": 10}}  # fmt: skip
    config["model"]["init_args"]["metrics"] = {"f1": kind}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    cli = main(["fit", "-c", str(tmp_path / "c.yaml"), f"--trainer.default_root_dir={tmp_path}",
                "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
                "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"])  # fmt: skip
    assert 0 <= cli.trainer.callback_metrics["val/f1"] <= 1


def test_names_that_are_taken_are_refused(make_trainer, digits):
    module = Supervised(TinyNet(), metrics={"accuracy": MulticlassF1Score(10)})
    with pytest.raises(ValueError, match=r"names are free, got \['accuracy'\]"):
        make_trainer().fit(module, datamodule=digits())


# ---------------------------------------------------------------------- losses of one's own


class Penalised(MultiTeacher):
    """Adds a penalty to what the core computes."""

    def compute_losses(self, x, target):
        weights = self.student.linear.weight
        return {**super().compute_losses(x, target), "penalty": 0.01 * weights.square().sum()}


@pytest.mark.parametrize("cached", [False, True])
def test_own_losses_are_used_with_live_and_cached_teachers(cached, make_trainer, tmp_path):
    cache = TeacherCache(str(tmp_path / "cache")) if cached else None
    data = Digits(batch_size=64, subset=128, val_split=32, teacher_cache=cache)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Penalised(TinyNet(), [TinyNet(8)]), datamodule=data)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    parts = logged["train/task"] + logged["train/soft_target"] + logged["train/penalty"]
    assert logged["train/penalty"] > 0
    assert logged["train/loss"] == pytest.approx(parts, rel=1e-5)


def test_own_losses_are_refused_where_steps_do_not_ask_for_them():
    class Mine(PeerCohort):
        def compute_losses(self, x, target):
            return {}

    Mine([TinyNet(), TinyNet()])
    with pytest.raises(TypeError, match="Expected Mine without compute_losses"):
        Mine([TinyNet(), TinyNet()], update="sequential")
