"""Faults that were found once, each with the test that would have found it."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_kd.callbacks import DistillationReport, ExportStudent, TemperatureScheduler
from lightning_kd.callbacks.plot import plot_report
from lightning_kd.models import resnet8
from lightning_kd.schedules import Linear


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_end_well(precision, make_module, make_trainer, digits, tmp_path):
    module = make_module(student=resnet8(num_classes=10, in_channels=1, width=4))
    callbacks = [DistillationReport(plot=False), ExportStudent(formats=["torch"])]
    trainer = make_trainer(max_epochs=1, precision=precision, callbacks=callbacks)
    trainer.fit(module, datamodule=digits())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["student"]["latency_ms"] > 0
    assert report["teachers"][1]["flops"] > 0
    assert report["student"]["accuracy"] is not None
    weight = load_file(tmp_path / "student.safetensors")["linear.weight"]
    assert weight.dtype == module.student.linear.weight.dtype != torch.float32
    graph = torch.export.load(tmp_path / "student.pt2").module()
    assert graph(torch.rand(3, 1, 8, 8)).dtype == torch.float32


def test_history_holds_validation_only_where_it_ran(make_module, make_trainer, digits, tmp_path):
    callbacks = [
        TemperatureScheduler(Linear(8, 4, 4)),
        ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max"),
        DistillationReport(),
    ]
    trainer = make_trainer(
        max_epochs=5, check_val_every_n_epoch=2, callbacks=callbacks, enable_checkpointing=True
    )
    trainer.fit(make_module(), datamodule=digits())
    report = json.loads((tmp_path / "report.json").read_text())
    history = report["history"]
    assert [any(k.startswith("val/") for k in row) for row in history] == [0, 1, 0, 1, 0]
    temperatures = [row["schedule/losses.soft_target.temperature"] for row in history]
    assert temperatures == [8, 7, 6, 5, 4]
    assert all("train/soft_target" in row for row in history)
    assert report["epoch"] in (1, 3)
    assert plot_report(report, tmp_path / "again.png")


def test_a_report_of_unlabelled_validation_is_valid_json(make_module, make_trainer, tmp_path):
    images = torch.randn(16, 1, 8, 8)
    loader = DataLoader(TensorDataset(images, torch.full((16,), -1)), batch_size=8)
    trainer = make_trainer(max_epochs=1, callbacks=[DistillationReport()])
    trainer.fit(make_module(), loader, loader)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["agreement"] >= 0
    assert report["student"]["ece"] is None
    assert "val/loss" not in report["history"][0]
