"""Logging of what is measured on validation and test data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric

from lightning_kd.functional import is_labelled
from lightning_kd.outputs import NetworkOutput

STAGES = ("val", "test")
#: counters beside the metrics
BATCHES, LABELLED = "_batches", "_labelled"


def collect(metrics: Mapping[str, Metric], own: Mapping[str, Metric]) -> nn.ModuleDict:
    """Collections of copies of these metrics, one for each stage, named ``<stage>/<name>``.

    Raises:
        ValueError: If a user's ``own`` metrics have a name that is taken.
    """
    taken = sorted(metrics.keys() & own.keys())
    if taken:
        raise ValueError(
            f"Expected metrics whose names are free, got {taken}, which are measured already: "
            f"choose other names."
        )
    return nn.ModuleDict(
        {
            # each metric reads other tensors, so no two may share a state
            stage: MetricCollection(
                {
                    **{name: metric.clone() for name, metric in {**metrics, **own}.items()},
                    **{name: SumMetric(nan_strategy="disable") for name in (BATCHES, LABELLED)},
                },
                prefix=f"{stage}/",
                compute_groups=False,
            )
            for stage in STAGES
        }
    )


def update_own(metrics: Mapping[str, Metric], output: NetworkOutput, target: Tensor | None) -> None:
    """Count a batch, and add its labelled samples to a user's own metrics: logits and labels.

    Raises:
        ValueError: If one of them cannot take these.
    """
    metrics[BATCHES].update(1)
    if target is None:
        return
    keep = is_labelled(target)
    metrics[LABELLED].update(keep.sum())
    for name, metric in metrics.items():
        if name in (BATCHES, LABELLED):
            continue
        try:
            metric.update(output.logits[keep], target[keep])
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Expected a metric of logits {tuple(output.logits.shape)} and labels "
                f"{tuple(target.shape)}, got {name} ({type(metric).__name__}), which says: {reason}"
            ) from error


def collection_of(
    module: LightningModule, stage: str, loader: int
) -> tuple[str, dict[str, Metric]]:
    """Key in the log, and metrics by name, of one loader.

    Args:
        module: Its ``metrics`` are those of ``collect``; another loader's are added to them.
        stage: ``"val"`` or ``"test"``.
        loader: Which of several; its key is ``<stage>/<loader>`` from the second one on.
    """
    key, all_metrics = f"{stage}/{loader}" if loader else stage, module.metrics
    assert isinstance(all_metrics, nn.ModuleDict)
    if key not in all_metrics:
        module._metric_attributes = None  # Lightning's list of metrics, which it would not renew
        first = all_metrics[stage]
        assert isinstance(first, MetricCollection)
        all_metrics[key] = first.clone(prefix=f"{key}/")
        all_metrics[key].reset()  # type: ignore[operator]
    collection = all_metrics[key]
    assert isinstance(collection, MetricCollection)
    return key, dict(collection.items(keep_base=True))


def log_metrics(module: LightningModule, metrics: Mapping[str, Metric], key: str, bar: str) -> None:
    """Log metrics as objects, not values: Lightning computes and resets them over all processes."""
    for name, metric in metrics.items():
        if metric.update_called and name not in (BATCHES, LABELLED):
            module.log(
                f"{key}/{name}", metric, on_step=False, on_epoch=True,
                prog_bar=f"{key}/{name}" == bar, add_dataloader_idx=False,
            )  # fmt: skip


def drop_unmeasured(trainer: Trainer, all_metrics: nn.ModuleDict, stage: str) -> bool:
    """Take back what was logged of loaders without any label: a figure of nothing is not 0.

    Every process must call it, at the end of an epoch.

    Returns:
        Whether the first loader had labels.
    """
    measured = True
    for key, collection in all_metrics.items():
        if key.partition("/")[0] != stage:
            continue
        assert isinstance(collection, MetricCollection)
        metrics = dict(collection.items(keep_base=True))
        counters = [metrics.pop(name) for name in (BATCHES, LABELLED)]
        with warnings.catch_warnings():  # a process may have had no batch
            warnings.filterwarnings("ignore", ".*was called before the ``update`` method.*")
            batches, labelled = (float(counter.compute()) for counter in counters)
        for counter in counters:
            counter.reset()
        if labelled or not batches:
            continue
        measured = measured and key != stage
        names = {f"{key}/{name}" for name in metrics if not name.startswith("agreement")}
        logged: dict[str, Any] = trainer._results or {}
        for entry in [entry for entry in logged if entry.partition(".")[2] in names]:
            logged.pop(entry)
        for name in names:
            trainer._logger_connector._callback_metrics.pop(name, None)
    return measured
