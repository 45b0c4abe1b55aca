"""Data distillation: labels written by predict, read back, mixed in a fixed ratio."""

import itertools

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from lightning_kd import MultiTeacher, PeerCohort, Supervised
from lightning_kd.callbacks import PseudoLabels
from lightning_kd.cli import main
from lightning_kd.data import Digits, ImageFolder, PseudoLabelled
from lightning_kd.data.pseudo_labelled import TwoKinds
from lightning_kd.models import Averaged, Plain, Scale, pretrained, resnet8
from lightning_kd.weighting import Confidence
from tests.conftest import assert_same_state, state_of
from tests.modules.test_distributed import launch

SPLIT = {"subset": 400, "val_split": 64, "labelled_fraction": 0.2, "batch_size": 50}


class Knows(torch.nn.Module):
    """Least squares on a few digits: says of each image what can be computed again."""

    def __init__(self):
        super().__init__()
        images, labels = Digits().load(train=True)
        x, y = images[:300].flatten(1).float() / 255, torch.eye(10)[labels[:300]]
        self.linear = torch.nn.Linear(64, 10, bias=False)
        self.linear.weight.data = torch.linalg.lstsq(x, y, driver="gelsd").solution.T.contiguous()

    def forward(self, x):
        return 5 * self.linear(x.flatten(1))


def write(folder, make_trainer):
    data = Digits(**SPLIT, predict_split="train")
    trainer = make_trainer(callbacks=[PseudoLabels(str(folder))])
    trainer.predict(Supervised(Knows()), datamodule=data)


def ready(folder, **options):
    own = {k: options.pop(k) for k in ("labels", "share") if k in options}
    data = PseudoLabelled(Digits(**{**SPLIT, **options}), str(folder), **own)
    data.setup("fit")
    return data


@pytest.fixture
def folder(tmp_path, make_trainer):
    write(tmp_path / "labels", make_trainer)
    return tmp_path / "labels"


def test_what_is_read_is_what_the_network_says_of_each_image(folder):
    data = ready(folder, labels="soft")
    images, known = data.data.training
    said = Knows()(images.float() / 255).softmax(1)
    hidden = known < 0
    assert 0 < hidden.sum() < 400
    torch.testing.assert_close(data.targets[hidden], said[hidden])
    assert torch.equal(data.targets[~hidden].argmax(1), known[~hidden])
    assert torch.equal(data.targets[~hidden].amax(1), torch.ones(int((~hidden).sum())))


def test_hard_labels_keep_true_labels_and_the_classes_shares(folder):
    data = ready(folder)
    images, known = data.data.training
    hidden = known < 0
    assert torch.equal(data.targets[~hidden], known[~hidden])
    kept = data.targets[hidden]
    said = Knows()(images.float() / 255).argmax(1)[hidden]
    assert torch.equal(kept[kept >= 0], said[kept >= 0])
    assert (kept < 0).any()
    counts = torch.bincount(kept[kept >= 0], minlength=10).float()
    wanted = torch.bincount(known[~hidden], minlength=10).float()
    assert (counts / counts.sum() - wanted / wanted.sum()).abs().max() < 0.1


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_every_batch_has_its_share_and_an_epoch_shows_all(folder, labels):
    data = ready(folder, labels=labels, share=0.4)
    order = data.train_dataloader().sampler
    _, known = data.data.training
    usable = data.targets >= 0 if labels == "hard" else torch.ones(len(known), dtype=bool)
    seen = []
    for indices, draws in order.batches():
        assert len(indices) == len(draws) == 50
        assert (known[indices] < 0).tolist() == [False] * 30 + [True] * 20
        seen += indices[30:].tolist()
    assert len(seen) == len(set(seen)) == len(order) * 20
    assert int(((known < 0) & usable).sum()) - len(seen) < 20


def test_labelled_images_come_equally_often():
    order = TwoKinds(torch.arange(7), torch.arange(100, 200), 10, 0.5, lambda: 1)
    counts = torch.zeros(7)
    for indices, _ in order.batches():
        counts += torch.bincount(indices[:5], minlength=7)
    assert counts.max() - counts.min() <= 1
    order.set_epoch(1)
    other = torch.cat([i for i, _ in order.batches()])
    order.set_epoch(0)
    assert not torch.equal(other, torch.cat([i for i, _ in order.batches()]))


def test_two_processes_see_what_one_sees():
    first, second = torch.arange(30), torch.arange(100, 180)
    one = TwoKinds(first, second, 20, 0.4, lambda: 5)
    two = [TwoKinds(first, second, 10, 0.4, lambda: 5, rank, 2) for rank in range(2)]
    assert len(one) == len(two[0])
    for (whole, draws), *halves in zip(one.batches(), *(t.batches() for t in two), strict=True):
        pairs = [tuple(p) for p in zip(whole.tolist(), draws[:, 0].tolist(), strict=True)]
        found = [p for i, d in halves for p in zip(i.tolist(), d[:, 0].tolist(), strict=True)]
        assert sorted(pairs) == sorted(found)


def test_a_run_that_is_resumed_sees_the_same_batches():
    order = TwoKinds(torch.arange(30), torch.arange(100, 180), 10, 0.4, lambda: 5)
    whole = list(order.batches())
    for (a, b), (c, d) in zip(whole[7:], order.batches(7), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_resumed_run_equals_the_uninterrupted_one(folder, labels, make_trainer, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)

    def fit(resume=None):
        torch.manual_seed(0)
        module = Supervised(resnet8(in_channels=1, width=4))
        data = PseudoLabelled(Digits(**SPLIT, crop_padding=1), str(folder), labels)
        options = {} if resume else {"enable_checkpointing": True, "callbacks": [saver]}
        trainer = make_trainer(max_epochs=2, **options)
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        assert trainer.num_training_batches > 4
        return state_of(module.student)

    whole = fit()
    assert_same_state(fit(str(tmp_path / "step=4.ckpt")), whole)


@pytest.mark.parametrize("kind", ["multi_teacher", "cohort"])
def test_every_paradigm_takes_soft_labels(folder, kind, make_trainer, tiny):
    if kind == "cohort":
        module = PeerCohort([tiny(), tiny()])
    else:
        module = MultiTeacher(tiny(), [tiny(), tiny()], weighting=Confidence())
    data = PseudoLabelled(Digits(**SPLIT), str(folder), "soft")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


# ---------------------------------------------------------------------- what goes wrong


def test_other_images_are_refused(folder):
    for change in ({"split_seed": 1}, {"subset": 399}, {"labelled_fraction": 0.3}):
        with pytest.raises(ValueError, match="about other images"):
            ready(folder, **change)


def test_missing_and_damaged_files_are_reported(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected pseudo-labels in"):
        ready(tmp_path / "elsewhere")
    path = folder / "pseudo_labels_0.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged"):
        ready(folder)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a file of pseudo-labels"):
        ready(folder)
    from safetensors import safe_open

    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    save_file({k: v[:-1] for k, v in tensors.items()}, path, facts)
    with pytest.raises(ValueError, match=r"all 400 images .* got 399"):
        ready(folder)
    save_file(tensors, path, {**facts, "files": "2"})
    with pytest.raises(FileNotFoundError, match="2 files"):
        ready(folder)


def test_files_of_two_runs_are_not_mixed(folder, tmp_path, make_trainer):
    from safetensors import safe_open

    path = folder / "pseudo_labels_0.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata() | {"files": "2"}
    save_file(load_file(path), path, facts)
    save_file(load_file(path), folder / "pseudo_labels_1.safetensors", facts | {"run": "other"})
    with pytest.raises(ValueError, match="comes from another run"):
        ready(folder)


def test_dense_answers_and_cached_data_are_refused(tmp_path, make_trainer):
    from lightning_kd.teachers import TeacherCache

    dense = torch.nn.Conv2d(1, 10, 3)
    trainer = make_trainer(callbacks=[PseudoLabels(str(tmp_path))])
    with pytest.raises(ValueError, match="PseudoLabels is for classification"):
        trainer.predict(Supervised(dense), datamodule=Digits(**SPLIT, predict_split="train"))
    with pytest.raises(ValueError, match="without teacher_cache"):
        PseudoLabelled(Digits(teacher_cache=TeacherCache("x")), "x")


def test_wrong_data_is_reported(folder, tmp_path, make_trainer):
    with pytest.raises(ValueError, match="with and without a label"):
        ready_all(tmp_path, make_trainer)
    for options, message in (
        ({"share": 0.0}, "share between"), ({"share": 1.0}, "share between"),
        ({"labels": "best"}, "hard"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PseudoLabelled(Digits(), "x", **options)
    data = ready(folder, share=0.001)
    with pytest.raises(ValueError, match="hold both kinds"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match="setup"):
        PseudoLabelled(Digits(), "x").train_dataloader()


def ready_all(tmp_path, make_trainer):
    data = {**SPLIT, "labelled_fraction": 1.0}
    trainer = make_trainer(callbacks=[PseudoLabels(str(tmp_path / "all"))])
    trainer.predict(Supervised(Knows()), datamodule=Digits(**data, predict_split="train"))
    return ready(tmp_path / "all", labelled_fraction=1.0)


def test_labels_are_not_overwritten_and_belong_to_training_images(folder, make_trainer):
    with pytest.raises(FileExistsError, match="earlier run"):
        write(folder, make_trainer)
    trainer = make_trainer(callbacks=[PseudoLabels(str(folder))])
    with pytest.raises(ValueError, match="predict_split train"):
        trainer.predict(Supervised(Knows()), datamodule=Digits(**SPLIT))


# ---------------------------------------------------------------------- the four steps


def test_the_command_line_runs_all_steps(tmp_path):
    common = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    here = "configs/digits/data_distillation"
    teacher, labels = tmp_path / "teacher", tmp_path / "labels"
    main(["fit", "-c", f"{here}/1_teacher.yaml", f"--trainer.default_root_dir={teacher}",
          "--trainer.max_epochs=20", *common])  # fmt: skip
    weights = f"--model.student.networks.checkpoint={teacher}/student.safetensors"
    main(["predict", "-c", f"{here}/2_pseudo_labels.yaml",
          f"--trainer.default_root_dir={labels}", weights, *common])  # fmt: skip
    cli = main(["fit", "-c", f"{here}/3_student.yaml", f"--data.folder={labels}",
                f"--trainer.default_root_dir={tmp_path / 'student'}", "--data.labels=soft",
                "--trainer.max_epochs=2", *common])  # fmt: skip
    images, known = cli.datamodule.data.training
    network = pretrained(str(teacher / "student.safetensors"))
    with torch.no_grad():
        said = Averaged([network], [Plain(), Scale(1.25)])(images.float() / 255).exp()
    torch.testing.assert_close(cli.datamodule.targets[known < 0], said[known < 0])


def test_image_folders_are_reported_apart_by_their_names(tmp_path):
    from torchvision.utils import save_image

    for name, count in (("a", 3), ("b", 3), (".", 6)):
        for number in range(count):
            path = tmp_path / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(torch.rand(3, 8, 8), path)

    def fingerprint():
        data = ImageFolder(str(tmp_path), image_size=8, class_names=["a", "b"], val_split=0.0)
        data.setup("fit")
        return data.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "train" / "5.png").rename(tmp_path / "train" / "6.png")
    assert fingerprint() != before


RANKS = """
import sys
import torch
from lightning.pytorch import Trainer
from lightning_kd import Supervised
from lightning_kd.callbacks import PseudoLabels
from lightning_kd.data import Digits
from tests.data.test_pseudo_labelled import SPLIT, Knows

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
        callbacks=[PseudoLabels(sys.argv[1])], enable_model_summary=False,
    )
    trainer.predict(Supervised(Knows()), datamodule=Digits(**SPLIT, predict_split="train"))
"""


def test_each_process_writes_its_share(folder, tmp_path):
    launch(RANKS, tmp_path, str(tmp_path / "two"))
    files = sorted((tmp_path / "two").glob("*.safetensors"))
    assert [f.name for f in files] == [f"pseudo_labels_{n}.safetensors" for n in range(2)]
    shares = [set(load_file(f)["indices"].tolist()) for f in files]
    assert not shares[0] & shares[1]
    assert set(itertools.chain(*shares)) == set(range(400))
    one, two = ready(folder, labels="soft"), ready(tmp_path / "two", labels="soft")
    torch.testing.assert_close(one.targets, two.targets)
