"""Shipped YAMLs run as the command line runs them, on data in miniature where it is not at hand.

Every YAML of the digits is trained in tests/conformance; here are some of them, and all others.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_kd import models
from lightning_kd.cli import main
from lightning_kd.data import vision

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    p.relative_to(ROOT)
    for p in (ROOT / "configs").rglob("*.yaml")
    if p.parent.name != "data_distillation"  # steps that need each other: tests/data
)
DIGITS = ("multi_teacher", "cohort", "data_free", "sub_teacher", "tree", "teacher", "teacher_cache",
          "peer_per_process", "adversarial", "single_teacher", "multi_head", "cmi")  # fmt: skip
RUN = [p for p in CONFIGS if p.parent.name != "digits" or p.stem in DIGITS]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_first_line_is_the_command(config):
    first = (ROOT / config).read_text().splitlines()[0]
    assert first.startswith(f"# lightning-kd fit -c {config}")


class Miniature:
    """Stands in for a torchvision data set that is not on this machine."""

    def __init__(self, root, train, download):
        size, channels = self.shape
        self.data = torch.randint(0, 256, (600, size, size, *channels), dtype=torch.uint8)
        self.targets = torch.arange(600) % 10


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name, shape in (
        ("MNIST", (28, ())),
        ("FashionMNIST", (28, ())),
        ("CIFAR10", (32, (3,))),
    ):
        monkeypatch.setattr(
            getattr(vision, name), "dataset", type(name, (Miniature,), {"shape": shape})
        )


def untrained(spec_path, tmp_path):
    """Weights for a teacher that this machine may not have, in the place of the real file."""
    name = Path(spec_path).parent.name if "runs/" in spec_path else Path(spec_path).stem
    if "cifar10" in name:
        network, spec = getattr(models, name.removeprefix("cifar10_"))(), None
    else:
        made = {
            "wide_resnet": ("wide_resnet", {"depth": 10, "widen_factor": 2}),
            "resnet20": ("resnet20", {}),
            "resnet8": ("resnet8", {"width": 32}),
            "multi_teacher": ("resnet8", {"width": 4}),
        }[name]
        stride = 1 if "runs/digits" in spec_path else 2
        init = {**made[1], "num_classes": 10, "in_channels": 1, "stem_stride": stride}
        network = getattr(models, made[0])(**init)
        spec = {"class_path": f"lightning_kd.models.{made[0]}", "init_args": init}
    path = tmp_path / f"{name}.safetensors"
    save_file(network.state_dict(), path)
    if spec:
        import json

        path.with_suffix(".json").write_text(json.dumps(spec))
    return str(path)


@pytest.mark.parametrize("config", RUN, ids=str)
def test_config_runs(config, tmp_path):
    text = (ROOT / config).read_text()

    def place(match):
        return (
            match[1]
            if (ROOT / match[1]).exists() and "digits" in match[1]
            else untrained(match[1], tmp_path)
        )

    text = re.sub(r"(?<=checkpoint: )([\w/.]+\.safetensors)", place, text)
    (tmp_path / "c.yaml").write_text(text)
    args = [
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    if "peer_per_process" in config.name:  # processes of its own: tests/modules
        args += ["--trainer.devices=1", "--trainer.strategy=auto"]
    cli = main(
        ["fit", "-c", str(tmp_path / "c.yaml"), f"--trainer.default_root_dir={tmp_path}", *args]
    )
    # not global_step, which counts the steps of every optimizer
    assert cli.trainer.fit_loop.epoch_loop.batch_progress.total.completed == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])


def test_plain_distillation_is_fifteen_lines():
    lines = (ROOT / "configs/digits/single_teacher.yaml").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith("#")]) <= 15


@pytest.mark.parametrize("name", ["resnet14", "resnet20", "wide_resnet"])
def test_shipped_digit_teachers_know_the_digits(name):
    from lightning_kd.data import Digits

    teacher = models.pretrained(str(ROOT / f"configs/digits/teachers/{name}.safetensors"))
    data = Digits()
    data.setup("test")
    images, labels = data._test
    accuracy = (teacher(images.float() / 255).argmax(1) == labels).float().mean()
    assert accuracy > 0.95
