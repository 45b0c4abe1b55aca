"""Pictures of what a data-free run makes, and the warning when it is all the same."""

import warnings

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from lightning_kd.callbacks import InversionReport, ReplayBuffer
from lightning_kd.data import Rounds
from lightning_kd.data_free.generators import Generator
from lightning_kd.data_free.image_losses import OneHot
from lightning_kd.modules import DataFree


class Network(nn.Module):
    latent = 8

    def __init__(self, spread):
        super().__init__()
        self.linear, self.spread = nn.Linear(8, 64), spread

    def forward(self, z):
        return (self.spread * self.linear(z)).sigmoid().view(-1, 1, 8, 8)


def fit(
    tiny, make_trainer, tmp_path, spread=1.0, callbacks=(), trainer=None, teacher=None, **options
):
    torch.manual_seed(0)
    module = DataFree(
        tiny(4), teacher or tiny(8), Generator(Network(spread)), [OneHot(modulate=True)],
        round_images=32, generator_steps=1, student_steps=1, batch_size=8, warm_up=0,
    )  # fmt: skip
    report = InversionReport(str(tmp_path), **{"least_entropy": 0.0, **options})
    trainer = make_trainer(max_epochs=3, callbacks=[report, *callbacks], **(trainer or {}))
    trainer.fit(module, datamodule=Rounds(2, num_classes=10, image_shape=(1, 8, 8)))
    return report, trainer


@pytest.mark.parametrize("remembers", [True, False])
def test_pictures_and_numbers(tiny, make_trainer, tmp_path, remembers):
    callbacks = [ReplayBuffer(64)] if remembers else []
    report, trainer = fit(tiny, make_trainer, tmp_path, callbacks=callbacks, every=2)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["epoch_000.png", "epoch_002.png"]
    assert imread(tmp_path / "images" / names[0]).std() > 0.05
    assert len(report.history) == 3
    assert 0 < report.history[-1]["phi"] <= 1
    logged = trainer.callback_metrics
    assert float(logged["inversion/class_entropy"]) == pytest.approx(
        report.history[-1]["class_entropy"]
    )
    assert float(logged["inversion/pixel_spread"]) > 0.02


def test_pictures_under_mixed_precision(tiny, make_trainer, tmp_path):
    """The generator gives half precision, the teacher is asked outside of the training step."""
    report, _ = fit(tiny, make_trainer, tmp_path, trainer={"precision": "bf16-mixed"}, every=2)
    assert len(report.history) == 3


def test_collapse_is_reported(tiny, make_trainer, tmp_path):
    with pytest.warns(UserWarning, match="generator collapses"):
        fit(tiny, make_trainer, tmp_path, spread=1e-3, every=0)
    assert not (tmp_path / "images").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tiny, make_trainer, tmp_path, spread=3.0, every=0)
    assert not [w for w in caught if "collapses" in str(w.message)]


def test_one_class_is_a_collapse_even_of_an_unsure_teacher(tiny, make_trainer, tmp_path):
    """Its soft answers are all even; the class that it sees is always the same."""
    teacher = tiny(8)
    with torch.no_grad():
        teacher.linear.weight.zero_()
        teacher.linear.bias.zero_()[3] = 0.1
    report, _ = fit(tiny, make_trainer, tmp_path, teacher=teacher, every=0)
    assert [row["class_entropy"] for row in report.history] == [0.0] * 3


def test_the_last_epoch_is_always_shown(tiny, make_trainer, tmp_path):
    fit(tiny, make_trainer, tmp_path, every=50)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["epoch_000.png", "epoch_002.png"]


def test_other_modules_are_refused(make_module, make_trainer, digits):
    with pytest.raises(TypeError, match="DataFree"):
        make_trainer(callbacks=[InversionReport()]).fit(make_module(), datamodule=digits())
