"""Logging of what is measured on validation and test data."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd.functional import is_labelled
from lightning_kd.outputs import NetworkOutput

STAGES = ("val", "test")


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
                {name: metric.clone() for name, metric in {**metrics, **own}.items()},
                prefix=f"{stage}/",
                compute_groups=False,
            )
            for stage in STAGES
        }
    )


def update_own(metrics: Mapping[str, Metric], output: NetworkOutput, target: Tensor | None) -> None:
    """Add the labelled samples of a batch to a user's own metrics, which take logits and labels."""
    if target is None:
        return
    keep = is_labelled(target)
    for metric in metrics.values():
        metric.update(output.logits[keep], target[keep])


def log_metrics(module: LightningModule, metrics: MetricCollection, bar: str) -> None:
    """Log metrics as objects, not values: Lightning computes and resets them over all processes."""
    for key, metric in metrics.items(keep_base=False):
        assert isinstance(metric, Metric)
        if metric.update_called:
            module.log(key, metric, on_step=False, on_epoch=True, prog_bar=key == bar)
