"""What people ran into with other tools: labels, images and networks as they come."""

import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate
from torchmetrics import MeanMetric

from lightning_kd import DataFree, MultiTeacher, PeerCohort, SubTeacher, Supervised
from lightning_kd.callbacks import ExportStudent
from lightning_kd.data import ImageFolder
from lightning_kd.losses import FEED, AttentionTransfer, Hint, LogitMSE, Relational, SoftTarget
from lightning_kd.models import pretrained
from lightning_kd.weighting import LearnedGate
from tests.conftest import TinyNet, assert_same_state, state_of

X, Y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10


def load(*tensors, batch_size=16):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def soft(labels, classes=10):
    return nn.functional.one_hot(labels, classes).float()


# ---------------------------------------------------------------- nothing to measure


@pytest.mark.parametrize("teachers", [True, False])
def test_unlabelled_validation_is_no_figure_and_keeps_the_last_state(
    teachers, make_trainer, tmp_path
):
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/accuracy", mode="max")
    stop = EarlyStopping("val/loss", patience=1)
    trainer = make_trainer(
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[best, stop, ExportStudent(str(tmp_path))],
    )
    student = TinyNet()
    module = MultiTeacher(student, [TinyNet(8)]) if teachers else Supervised(student)
    hidden = load(X, torch.full_like(Y, -1))
    train = hidden if teachers else load(X, Y)
    with pytest.warns(UserWarning, match=r"No val sample has a label.*ModelCheckpoint"):
        trainer.fit(module, train, hidden)
    assert trainer.current_epoch == 3
    logged = set(trainer.callback_metrics)
    assert {k for k in logged if k.startswith("val/")} == ({"val/agreement"} if teachers else set())
    assert torch.load(best.best_model_path)["epoch"] == 2
    exported = pretrained(str(tmp_path / "student.safetensors"), TinyNet())
    assert_same_state(state_of(exported), state_of(student))


def test_labels_in_a_later_epochs_batch_are_measured(make_trainer):
    some = Y.clone()
    some[:48] = -1
    trainer = make_trainer(max_epochs=1)
    module = MultiTeacher(TinyNet(), [TinyNet(8)], metrics={"own": Right()})
    trainer.fit(module, load(X, Y), load(X, some))
    right = (module.student.eval()(X[48:]).argmax(1) == Y[48:]).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/accuracy"], right)
    torch.testing.assert_close(trainer.callback_metrics["val/own"], right)


class Right(MeanMetric):
    def update(self, logits, target):
        super().update((logits.argmax(1) == target).float())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_of_several_loaders_has_its_own_figures(stage, make_trainer):
    module = MultiTeacher(TinyNet(), [TinyNet(8)], metrics={"own": Right()})
    loaders = [load(X, Y), load(X[:24], (Y[:24] + 1) % 10), load(X, torch.full_like(Y, -1))]
    trainer = make_trainer(max_epochs=2)
    if stage == "val":
        trainer.fit(module, load(X, Y), loaders)
    else:
        trainer.fit(module, load(X, Y))
        trainer.test(module, loaders, verbose=False)
    found, answers = trainer.callback_metrics, module.student.eval()(X).argmax(1)
    first, second = (answers == Y).float().mean(), (answers[:24] == (Y[:24] + 1) % 10)
    torch.testing.assert_close(found[f"{stage}/accuracy"], first)
    torch.testing.assert_close(found[f"{stage}/own"], first)
    torch.testing.assert_close(found[f"{stage}/1/accuracy"], second.float().mean())
    torch.testing.assert_close(found[f"{stage}/1/own"], second.float().mean())
    assert f"{stage}/2/accuracy" not in found
    assert f"{stage}/2/agreement" in found


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_may_be_of_any_whole_number_type(kind, make_trainer):
    trainer = make_trainer(max_epochs=1)
    module = MultiTeacher(
        TinyNet(), [TinyNet(8)], losses=[SoftTarget()], weighting=LearnedGate("relu")
    )
    trainer.fit(module, load(X, Y.to(kind)), load(X, Y.to(kind)))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    cohort = PeerCohort([TinyNet(), TinyNet()])
    make_trainer(max_epochs=1).fit(cohort, load(X, Y.to(kind)), load(X, Y.to(kind)))


def test_soft_labels_are_measured_by_their_likeliest_class(make_trainer):
    trainer = make_trainer(max_epochs=1)
    module = MultiTeacher(TinyNet(), [TinyNet(8)])
    trainer.fit(module, load(X, soft(Y)), load(X, soft(Y)))
    right = (module.student.eval()(X).argmax(1) == Y).float().mean()
    torch.testing.assert_close(trainer.callback_metrics["val/accuracy"], right)


@pytest.mark.parametrize("paradigm", [
    lambda: MultiTeacher(TinyNet(), [TinyNet(8)]), lambda: Supervised(TinyNet()),
    lambda: PeerCohort([TinyNet(), TinyNet()]),
])  # fmt: skip
def test_several_labels_an_image_are_no_classification(paradigm, make_trainer):
    several = (torch.rand(64, 10) < 0.4).float()
    with pytest.raises(ValueError, match="MultiLabel"):
        make_trainer(max_epochs=1).fit(paradigm(), load(X, several))


@pytest.mark.parametrize("paradigm", [
    lambda: MultiTeacher(TinyNet(num_classes=1), [TinyNet(num_classes=1)]),
    lambda: Supervised(TinyNet(num_classes=1)),
    lambda: PeerCohort([TinyNet(num_classes=1), TinyNet(num_classes=1)]),
])  # fmt: skip
def test_one_output_is_no_classification(paradigm, make_trainer):
    with pytest.raises(ValueError, match="two or more outputs, one for each class, got 1"):
        make_trainer(max_epochs=1).fit(paradigm(), load(X, Y % 2))


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("kind", [torch.float64, torch.uint8, torch.float16])
def test_images_of_another_type_are_told_in_one_sentence(kind, make_trainer):
    images = (X * 255).to(kind) if kind == torch.uint8 else X.to(kind)
    with pytest.raises(ValueError, match=rf"(got|images are) {kind}.*convert them in the data"):
        make_trainer(max_epochs=1).fit(MultiTeacher(TinyNet(), [TinyNet(8)]), load(images, Y))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_trainers_precision_is_that_of_the_images(precision, make_trainer):
    module = MultiTeacher(TinyNet(), [TinyNet(8)], losses=[SoftTarget(), Hint("relu", "relu")])
    trainer = make_trainer(max_epochs=1, precision=precision)
    trainer.fit(module, load(X, Y), load(X, Y))
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_image_is_not_the_learning_rates_fault(value, make_trainer):
    images = X.clone()
    images[3, 0, 2, 2] = value
    for module in (MultiTeacher(TinyNet(), [TinyNet(8)]), PeerCohort([TinyNet(), TinyNet()])):
        with pytest.raises(FloatingPointError, match="finite images, got 1 of 16") as raised:
            make_trainer(max_epochs=1).fit(module, load(images, Y))
        assert "learning rate" not in str(raised.value)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "loss",
    [
        lambda: Hint("relu", "relu"),
        lambda: Relational("relu", "relu"),
        lambda: AttentionTransfer("relu", "relu"),
        lambda: FEED("relu", "relu"),
    ],
)
@pytest.mark.parametrize("outputs", [1000, 7, 1])
def test_features_of_a_teacher_with_another_head_teach(loss, outputs, make_trainer):
    module = MultiTeacher(TinyNet(), [TinyNet(8, outputs)], losses=[loss()])
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, load(X, Y), load(X, Y))
    logged = trainer.callback_metrics
    assert torch.isfinite(logged["train/loss"])
    assert "val/accuracy" in logged
    assert not [name for name in logged if "teacher" in name or "ensemble" in name]


def test_logits_of_a_teacher_with_another_head_are_refused(make_trainer):
    losses = [Hint("relu", "relu"), LogitMSE()]
    module = MultiTeacher(TinyNet(), [TinyNet(8, 7)], losses=losses)
    with pytest.raises(ValueError, match="to have the same classes, got 7 and 10"):
        make_trainer(max_epochs=1).fit(module, load(X, Y))


def test_batch_norm_that_its_owner_froze_stays_frozen(make_trainer):
    def frozen():
        network = TinyNet()
        network.bn.eval().requires_grad_(False)
        return network

    student, peer, source = frozen(), frozen(), TinyNet().eval()
    for module in (MultiTeacher(student, [TinyNet(8)]), PeerCohort([peer, source])):
        networks = list(module.exported_networks().values())
        before = state_of(networks[0])
        make_trainer(max_epochs=1).fit(module, load(X, Y), load(X, Y))
        after = state_of(networks[0])
        assert torch.equal(before["bn.running_mean"], after["bn.running_mean"])
        assert not torch.equal(before["conv.weight"], after["conv.weight"])
    assert int(source.bn.num_batches_tracked) > 0  # wholly in eval mode: loaded weights


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("size", [(4, 8, 8), (2, 4, 4), (6, 10, 12), (1, 1, 1)])
def test_features_of_volumes_meet(size, depth):
    student = torch.randn(3, 4, 4, 8, 8, requires_grad=True)
    loss = FEED("a", "b") if depth else Hint("a", "b")
    loss(student, torch.randn(3, 6, *size)).backward()
    assert torch.isfinite(student.grad).all()


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize(("mode", "watched"), [("min", "val/loss"), ("max", "val/accuracy")])
def test_torchs_plateau_watches_what_its_mode_means(mode, watched, make_trainer):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode)

    module = MultiTeacher(TinyNet(), [TinyNet(8)], scheduler=plateau)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, load(X, Y), load(X, Y))
    (config,) = trainer.lr_scheduler_configs
    assert config.monitor == watched
    assert config.scheduler.best == pytest.approx(float(trainer.callback_metrics[watched]), rel=0.5)


def test_an_optimizer_that_forgets_adapters_is_told(make_trainer, recwarn):
    class Own(MultiTeacher):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.student.parameters())

    losses = {"near": Hint("relu", "relu")}
    with pytest.warns(UserWarning, match=r"No optimizer trains losses\.near\.projections"):
        make_trainer(max_epochs=1).fit(Own(TinyNet(), [TinyNet(8)], losses=losses), load(X, Y))
    recwarn.clear()
    make_trainer(max_epochs=1).fit(MultiTeacher(TinyNet(), [TinyNet(8)], losses=losses), load(X, Y))
    assert not [w for w in recwarn if "No optimizer" in str(w.message)]


def test_a_metric_that_does_not_fit_is_told_by_its_name(make_trainer):
    from torchmetrics.classification import MulticlassF1Score

    module = MultiTeacher(TinyNet(), [TinyNet(8)], metrics={"f1": MulticlassF1Score(7)})
    with pytest.raises(ValueError, match=r"logits \(16, 10\) and labels \(16,\), got f1"):
        make_trainer(max_epochs=1).fit(module, load(X, Y), load(X, Y))


@pytest.mark.parametrize("paradigm", [DataFree, MultiTeacher, PeerCohort, SubTeacher, Supervised])
def test_losses_are_found_where_students_and_teachers_are(paradigm):
    assert isinstance(paradigm.losses, property)


# ---------------------------------------------------------------- folders of images


def pictures(root, split, count, kinds=("png", "bmp", "tif", "ppm"), classes="ab"):
    for name in classes:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = root / split / name / f"{i}.{kinds[i % len(kinds)]}"
            Image.new("RGB", (8, 8), (20 * i, i, 200)).save(path)


def folder(root, **options):
    return ImageFolder(root=str(root), image_size=8, num_workers=0, **options)


def test_a_folder_as_programs_leave_it(tmp_path, caplog):
    pictures(tmp_path, "train", 12)
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / hidden).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / hidden / "a.png")
    (tmp_path / "train" / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "train" / "a" / "._0.png").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        data = folder(tmp_path)
        data.setup("fit")
    assert data.class_names == ["a", "b"]
    assert len(data.training[1]) + sum(len(b[1]) for b in data.val_dataloader()) == 24
    assert "24 images; 4 other files are left out" in caplog.text
    images, labels, *_ = next(iter(data.train_dataloader()))
    assert images.shape == (len(labels), 3, 8, 8)
    assert int(images[:, 2].min()) == 200


def test_a_val_folder_is_the_validation_set(tmp_path):
    pictures(tmp_path, "train", 12)
    pictures(tmp_path, "val", 3)
    data = folder(tmp_path)
    for stage in ("fit", "test"):
        data.setup(stage)
    assert len(data.training[1]) == 24
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert sum(len(batch[1]) for batch in loader) == 6
    held = folder(tmp_path, val_split=0.25)
    held.setup("fit")
    assert len(held.training[1]) == 18


def test_a_class_without_an_image_is_reported(tmp_path):
    pictures(tmp_path, "train", 4)
    (tmp_path / "train" / "c").mkdir()
    with pytest.warns(UserWarning, match=r"Classes without an image in .*: c"):
        folder(tmp_path).setup("fit")


# ---------------------------------------------------------------- loaders


class ByTuples(Dataset):
    """Is asked for an image by more than its number."""

    def __len__(self):
        return 64

    def __getitem__(self, key):
        index, mirrored = key
        return (X[index].flip(-1) if mirrored else X[index]), Y[index]


class Pairs(Sampler):
    def __len__(self):
        return 64

    def __iter__(self):
        return ((i, i % 2 == 0) for i in range(64))


def without_broken(batch):
    return default_collate([each for each in batch if each is not None])


def mixed(batch):
    """As timm's Mixup: only of an even number of images."""
    images, labels = default_collate(batch)
    assert len(images) % 2 == 0
    targets = soft(labels)
    return (images + images.flip(0)) / 2, (targets + targets.flip(0)) / 2


LOADERS = {
    "mixup": lambda: DataLoader(TensorDataset(X, Y), 16, collate_fn=mixed),
    "sampler_of_tuples": lambda: DataLoader(ByTuples(), 16, sampler=Pairs()),
    "first_image_broken": lambda: DataLoader(
        [None, *zip(X, Y, strict=True)], 16, collate_fn=without_broken
    ),
    "one_shot_stream": lambda: ((X[:16], Y[:16]) for _ in range(4)),
    "shuffled": lambda: DataLoader(
        TensorDataset(X, Y), 16, shuffle=True, generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_look_at_the_first_batch_disturbs_no_loader(kind, make_trainer):
    """Training sees what it sees without the look, in the same order."""

    class Seen(Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.batches.append(batch[0].clone())

    runs = []
    for look in (True, False):
        module = MultiTeacher(TinyNet(), [TinyNet(8)])
        if not look:
            module.example_input_array = X[:1]
        seen = Seen()
        torch.manual_seed(0)
        make_trainer(max_epochs=1, callbacks=[seen]).fit(module, LOADERS[kind]())
        runs.append(seen.batches)
    assert len(runs[0]) == len(runs[1]) >= 4
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_loader_that_fails_is_told_how_to_do_without(make_trainer):
    def broken(batch):
        raise KeyError("image")

    loader = DataLoader(TensorDataset(X, Y), 16, collate_fn=broken)
    with pytest.raises(ValueError, match="set example_input_array"):
        make_trainer(max_epochs=1).fit(MultiTeacher(TinyNet(), [TinyNet(8)]), loader)


# ---------------------------------------------------------------- teachers that are programs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "trace", "export"])
def test_programs_teach(kind, make_trainer):
    network = TinyNet(8).eval()
    make = {
        "script": lambda: torch.jit.script(network),
        "trace": lambda: torch.jit.trace(network, X[:2]),
        "export": lambda: torch.export.export(
            network, (X[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).module(),
    }
    module = MultiTeacher(TinyNet(), [make[kind]()])
    (taught,) = module.distillation.teacher_outputs(X)
    torch.testing.assert_close(taught.logits, network(X))
    assert not any(p.requires_grad for p in module.teachers[0].network.parameters())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, load(X, Y), load(X, Y))
    assert torch.isfinite(trainer.callback_metrics["train/soft_target"])
