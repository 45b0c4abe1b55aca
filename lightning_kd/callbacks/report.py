from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_kd.atomic_files import write_atomically
from lightning_kd.callbacks.cost import cost_of, name_of
from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.callbacks.plot import plot_report
from lightning_kd.modules import Distiller


class DistillationReport(Callback):
    """Write ``report.json`` and ``report.png`` at the end of a run, and print a summary.

    Keys: ``student`` (``name``, ``accuracy``, ``ece``, ``parameters``, ``flops`` of one image,
    ``latency_ms`` of one image on the device), ``teachers`` (a list of the same),
    ``ensemble.accuracy``, ``agreement`` of student and ensemble, ``split`` (what the accuracies
    are measured on: ``val`` after ``fit``; ``test`` writes ``report_test.json``), ``epoch``
    (counted from 0), ``seconds``,
    ``samples_per_second`` of training, ``seed``, ``versions``, ``config`` (path of the saved
    configuration) and ``history`` (what was logged, epoch by epoch). What was not measured is null.
    Of a cohort ``peers`` lists every network, ``student`` is the most accurate of them (``peer``
    says which), and ``agreement`` holds that of each pair, ``{"0_1": ...}``.
    After ``fit`` the accuracies are those of the epoch that the first monitoring
    ``ModelCheckpoint`` calls best (which ``ExportStudent`` exports), else of the last.

    Args:
        folder: Where to write; ``None``: the Trainer's ``default_root_dir``.
        plot: Draw ``report.png`` (needs the extra ``plot``).
        overwrite: Replace the report of an earlier run.

    Raises:
        FileExistsError: At the start of training, if an earlier run's report is there.
    """

    def __init__(
        self, folder: str | None = None, plot: bool = True, overwrite: bool = False
    ) -> None:
        self.folder, self.plot, self.overwrite = folder, plot, overwrite
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.samples = 0
        self._training = 0.0
        self._validated = False
        self._started = self._batch_started = 0.0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "seconds": self._elapsed(),
            "samples": self.samples,
            "training": self._training,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.seconds, self.samples = state_dict["seconds"], state_dict["samples"]
        self._training = state_dict["training"]

    # ------------------------------------------------------------------ measuring

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Distiller):
            raise TypeError(
                f"DistillationReport expected a module of lightning_kd, got "
                f"{type(pl_module).__name__}."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = run_folder(trainer, self.folder) / "report.json"
        refuse_to_overwrite(trainer, path, self.overwrite)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = False
        self._batch_started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # only the module knows the layout of its batch
        assert isinstance(pl_module, Distiller)
        copies: int = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        self.samples += pl_module.loss_tracker.samples * copies

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True
        self._batch_started = time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()
        assert isinstance(pl_module, Distiller)
        pl_module.loss_tracker.log(pl_module)  # an epoch that ended early has not logged yet
        row = _row(trainer)
        if not self._validated:  # then Lightning still has the values of an earlier epoch
            row = {k: v for k, v in row.items() if not k.startswith("val/")}
        self.history.append({"epoch": float(trainer.current_epoch), **row})

    def _pause(self) -> None:
        if self._batch_started:
            self._training += time.perf_counter() - self._batch_started
            self._batch_started = 0.0

    def _elapsed(self) -> float:
        running = time.perf_counter() - self._started if self._started else 0.0
        return self.seconds + running

    # ------------------------------------------------------------------ writing

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        folder = run_folder(trainer, self.folder)  # a collective, so before ranks part
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.seconds, self._started = self._elapsed(), 0.0
        row = self._best_row(trainer)
        report = self._measured(row, "val", pl_module) | {
            "epoch": None if row.get("epoch") is None else int(row["epoch"]),
            "seconds": round(self.seconds, 3),
            "samples_per_second": round(self.samples / self._training, 1)
            if self._training
            else None,
            "seed": _seed(),
            "versions": _versions(),
            "config": _config(folder),
            "history": self.history,
        }
        path = folder / "report.json"
        self._write(path, report)
        if self.plot and report["history"] and plot_report(report, path.with_suffix(".png")):
            rank_zero_info(f"plot:    {path.with_suffix('.png')}")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        folder = run_folder(trainer, self.folder)  # a collective, so before ranks part
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        row = _row(trainer)
        report = self._measured(row, "test", pl_module) | {
            "seed": _seed(),
            "versions": _versions(),
            "config": _config(folder),
        }
        self._write(folder / "report_test.json", report)

    def _best_row(self, trainer: Trainer) -> dict[str, Any]:
        """Row of the history that the exported student belongs to."""
        rows: list[dict[str, Any]] = [*self.history] or [{}]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor:
                best = callback.best_model_score
                for row in rows:
                    if best is not None and row.get(callback.monitor) == float(best):
                        return row
        return rows[-1]

    def _measured(self, row: dict[str, Any], split: str, module: Distiller) -> dict[str, Any]:
        core, watched = module.distillation, module.task.watched

        def about(network: nn.Module, prefix: str, label: str = "") -> dict[str, Any]:
            return {
                "name": label + name_of(network),
                watched: row.get(f"{split}/{prefix}{watched}"),
                **cost_of(network, core.input_shape, module.device),
            }

        measured: dict[str, Any] = {
            "split": split,
            "watched": watched,
            "student": None,
            "teachers": [],
            "ensemble": {watched: row.get(f"{split}/ensemble/{watched}")},
            "agreement": row.get(f"{split}/agreement"),
        }
        networks = core.exported_networks()
        if len(networks) == 1:
            (only,) = networks.values()
            student = about(only, "") | {"ece": row.get(f"{split}/ece")}
            named = zip(core.teachers.networks(), core.teachers.labels(), strict=True)
            teachers = [
                about(network, f"teacher_{index}/", label)
                for index, (network, label) in enumerate(named)
            ]
            return measured | {"student": student, "teachers": teachers}
        peers = {name: about(peer, f"{name}/") for name, peer in networks.items()}
        scores = [peer[watched] for peer in peers.values()]
        best = core.best_network([] if None in scores else scores)
        pairs = {
            key.removeprefix(f"{split}/agreement_"): value
            for key, value in row.items()
            if key.startswith(f"{split}/agreement_")
        }
        ensemble = measured["ensemble"] | {"ece": row.get(f"{split}/ensemble/ece")}
        return measured | {
            "student": peers[best] | {"peer": best, "ece": None},
            "peers": list(peers.values()),
            "ensemble": ensemble,
            "agreement": pairs or None,
        }

    def _write(self, path: Path, report: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(report, indent=2).encode() + b"\n")
        rank_zero_info(summary(report))
        rank_zero_info(f"report:  {path}")


def _row(trainer: Trainer) -> dict[str, float]:
    """What was logged last, without NaN (no labelled image, say), which is not valid JSON."""
    row = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {k: v for k, v in row.items() if not math.isnan(v)}


def _config(folder: Path) -> str | None:
    """Path of the configuration that the command line saved, if it did."""
    path = folder / "config.yaml"
    return str(path) if path.is_file() else None


def summary(report: dict[str, Any]) -> str:
    """A small table of accuracy and cost, one line per network."""

    def percent(value: float | None) -> str:
        return "     -" if value is None else f"{100 * value:5.1f} %"

    def line(label: str, entry: dict[str, Any]) -> str:
        cost = ""
        if "parameters" in entry:
            flops = f"{entry['flops'] / 1e6:9.1f} MFLOP" if entry["flops"] else f"{'-':>15}"
            cost = f"{entry['parameters']:>12,} parameters {flops} {entry['latency_ms']:8.2f} ms"
        return f"{label:<28} {percent(entry.get(report['watched'])):>8} {cost}"

    student, teachers = report["student"], report["teachers"]
    lines = ["", f"{report['watched'] + ' on ' + report['split']:<28}"]
    if "peers" in report:
        lines += [line(f"peer {i} {p['name']}", p) for i, p in enumerate(report["peers"])]
        lines.append(line("the cohort together", report["ensemble"]))
        agreements = list((report["agreement"] or {}).values())
        if agreements:
            mean = sum(agreements) / len(agreements)
            lines.append(f"{'two peers agree, on average':<28} {percent(mean):>8}")
        return "\n".join(lines)
    lines.append(line(f"student  {student['name']}", student))
    lines += [line(f"teacher {i} {t['name']}", t) for i, t in enumerate(teachers)]
    if teachers:
        lines.append(line("ensemble of the teachers", report["ensemble"]))
        lines.append(f"{'student agrees with ensemble':<28} {percent(report['agreement']):>8}")
    return "\n".join(lines)


def _seed() -> int | None:
    import os

    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("lightning-kd", "torch", "torchvision", "lightning", "torchmetrics", "jsonargparse")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
