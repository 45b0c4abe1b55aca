import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_kd import MultiTeacher
from lightning_kd.base_distillation import cut_prefix
from lightning_kd.callbacks import DistillationReport, ExportStudent
from lightning_kd.models import Normalized, pretrained, resnet8
from tests.conftest import assert_same_state


def small(width=4):
    return resnet8(num_classes=10, in_channels=1, width=width)


@pytest.fixture
def run(make_trainer, digits, tmp_path):
    def go(callbacks, student=None, **options):
        torch.manual_seed(3)
        module = MultiTeacher(student or small(), [small(8)], task_weight=5.0)
        trainer = make_trainer(callbacks=callbacks, **options)
        trainer.fit(module, datamodule=digits())
        return module, trainer

    return go


def test_report_has_stable_keys_and_right_numbers(run, digits, tmp_path):
    module, trainer = run([DistillationReport()])
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {
        "watched",
        "split",
        "student",
        "teachers",
        "ensemble",
        "agreement",
        "epoch",
        "seconds",
        "samples_per_second",
        "seed",
        "versions",
        "config",
        "history",
    }
    assert {"accuracy", "parameters", "flops", "latency_ms", "name"} <= set(report["student"])
    assert set(report["teachers"][0]) == {"accuracy", "parameters", "flops", "latency_ms", "name"}
    assert report["student"]["parameters"] == sum(p.numel() for p in module.student.parameters())
    assert report["student"]["accuracy"] == pytest.approx(
        trainer.callback_metrics["val/accuracy"].item()
    )
    assert report["split"] == "val"
    assert report["student"]["flops"] == 2 * macs(module.student)
    assert report["student"]["latency_ms"] > 0
    assert report["samples_per_second"] > 0
    assert [row["epoch"] for row in report["history"]] == [0, 1]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    trainer.test(module, datamodule=digits(), verbose=False)
    assert json.loads((tmp_path / "report.json").read_text()) == report  # it stays
    tested = json.loads((tmp_path / "report_test.json").read_text())
    assert tested["split"] == "test"
    assert tested["student"]["accuracy"] == pytest.approx(
        trainer.callback_metrics["test/accuracy"].item()
    )
    assert tested["seed"] == report["seed"]


def macs(network):
    """Multiply-adds of convolutions and linear layers for one 8 x 8 image, counted by hooks."""
    total = 0

    def hook(module, inputs, output):
        nonlocal total
        weight = module.weight
        total += weight.numel() * (output[0, 0].numel() if weight.dim() == 4 else 1)

    handles = [
        m.register_forward_hook(hook)
        for m in network.modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    network.eval()(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return total


def test_export_and_report_are_of_the_best_epoch(run, tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", monitor="val/accuracy", mode="min", save_top_k=1)
    module, _ = run(
        [saver, ExportStudent(), DistillationReport(plot=False)],
        max_epochs=4,
        enable_checkpointing=True,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    accuracies = [row["val/accuracy"] for row in report["history"]]
    assert min(accuracies) < accuracies[-1]
    assert report["student"]["accuracy"] == min(accuracies)
    best = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    exported = load_file(tmp_path / "student.safetensors")
    assert_same_state(
        exported,
        cut_prefix(best, "distillation.student."),
    )
    assert not torch.equal(exported["linear.weight"], module.student.linear.weight)


@pytest.mark.parametrize("wrap", [False, True])
def test_export_reloads_without_lightning_and_gives_the_same_logits(wrap, run, tmp_path):
    student = Normalized(small(), [0.3], [0.4]) if wrap else small()
    module, _ = run([ExportStudent()], student)
    x = torch.rand(3, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    code = f"""
import sys, torch
from lightning_kd.models import pretrained
network = pretrained({str(tmp_path / "student.safetensors")!r})
torch.save(network(torch.load({str(tmp_path / "x.pt")!r})).detach(), {str(tmp_path / "y.pt")!r})
assert "lightning" not in sys.modules and "lightning_kd.modules" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), module.student.eval()(x).detach())


def test_a_network_of_unknown_making_needs_to_be_given(run, tiny, tmp_path):
    module, _ = run([ExportStudent()], tiny())
    path = str(tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="give `network`"):
        pretrained(path)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(pretrained(path, network=tiny())(x), module.student.eval()(x))


def test_graphs_take_any_batch_size(run, tmp_path):
    module, _ = run([ExportStudent(formats=["torch", "onnx"])])
    x = torch.rand(5, 1, 8, 8)
    right = module.student.eval()(x).detach()
    program = torch.export.load(tmp_path / "student.pt2").module()
    torch.testing.assert_close(program(x).detach(), right)
    import numpy as np
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    graph = load(str(tmp_path / "student.onnx"))
    (name,) = [i.name for i in graph.graph.input]
    got = ReferenceEvaluator(graph).run(None, {name: x.numpy()})[0]
    np.testing.assert_allclose(got, right.numpy(), rtol=1e-3, atol=1e-4)


def test_a_second_run_into_the_same_folder_loses_nothing(run, tmp_path):
    run([ExportStudent(), DistillationReport(plot=False)])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for callback in (ExportStudent(), DistillationReport()):
        with pytest.raises(FileExistsError, match=r"another folder .*--overwrite"):
            run([callback])
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    run([ExportStudent(overwrite=True), DistillationReport(overwrite=True, plot=False)])


def test_fast_dev_run_writes_nothing(run, tmp_path):
    run([ExportStudent(), DistillationReport()], fast_dev_run=True)
    assert not list(tmp_path.iterdir())


def test_unknown_format_and_foreign_module_are_reported(make_trainer, tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(ValueError, match=r"got \['tflite'\]"):
        ExportStudent(formats=["tflite"])
    for callback in (ExportStudent(), DistillationReport()):
        with pytest.raises(TypeError, match="module of lightning_kd, got BoringModel"):
            make_trainer(callbacks=[callback]).fit(BoringModel())
