from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_kd.atomic_files import written_atomically

#: a curve that another one may cover
BROAD: dict[str, Any] = {"linewidth": 5, "alpha": 0.4}


def plot_report(report: dict[str, Any], path: Path) -> bool:
    """Draw losses and accuracies by epoch.

    Args:
        report: What ``report.json`` holds.
        path: Of the picture.

    Returns:
        Whether it was drawn: False without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        rank_zero_warn("report.png needs matplotlib: pip install 'lightning-kd[plot]'.")
        return False
    history = report["history"]
    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(e, row[key]) for e, row in zip(epochs, history, strict=True) if key in row]
        return [p[0] for p in points], [p[1] for p in points]

    logged = sorted({k for row in history for k in row})
    for key in (k for k in logged if k.startswith("train/") and "/trust_" not in k):
        broad = BROAD if key == "train/loss" else {}  # the sum may lie on its largest part
        losses.plot(*series(key), marker=".", label=key.removeprefix("train/"), **broad)
    if any(key == "val/loss" for row in history for key in row):
        losses.plot(*series("val/loss"), marker=".", linestyle="--", label="val: cross-entropy")
    losses.set(xlabel="epoch", ylabel="weighted loss", title="Losses")
    # a loss that is maximised is negative
    signed = any(v < 0 for row in history for k, v in row.items() if k.startswith("train/"))
    losses.set_yscale("symlog", linthresh=0.01) if signed else losses.set_yscale("log")
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": "small"}
    losses.legend(**beside)
    drawn = False
    curves = [("val/accuracy", "student"), ("val/agreement", "agreement with ensemble")]
    curves += [
        (f"val/peer_{index}/accuracy", f"peer {index}: {peer['name']}, {peer['parameters']:,}")
        for index, peer in enumerate(report.get("peers", []))
    ]
    for key, label in curves:
        x, y = series(key)
        if x:
            broad = BROAD if key == "val/accuracy" else {}
            accuracies.plot(x, [100 * v for v in y], marker=".", label=label, **broad)
            drawn = True
    for index, teacher in enumerate(report["teachers"]):
        _, y = series(f"val/teacher_{index}/accuracy")
        if y:
            accuracies.axhline(
                100 * y[-1],
                linestyle=(4 * index, (3, 9)),  # several at one height are all seen
                color=f"C{index + 2}",
                label=f"teacher {index}: {teacher['name']}",
            )
    if "peers" in report:
        pairs = [series(key) for key in logged if key.startswith("val/agreement_")]
        means = [statistics.mean(values) for values in zip(*(y for _, y in pairs), strict=False)]
        if means:
            label = "two peers agree, on average"
            accuracies.plot(pairs[0][0], [100 * v for v in means], color="C7", label=label)
    x, y = series("val/ensemble/accuracy")
    if y and "peers" in report:  # it learns, where an ensemble of teachers does not
        accuracies.plot(x, [100 * v for v in y], "k--", label="the cohort together")
    elif y:
        accuracies.axhline(100 * y[-1], color="black", linestyle="--", label="ensemble")
    accuracies.set(xlabel="epoch", ylabel="% of validation images", title="Accuracy and agreement")
    if drawn:
        accuracies.legend(**beside)
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if epochs and epochs[0] == epochs[-1]:  # one epoch, not a part of one
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    top = accuracies.get_ylim()[1]
    accuracies.set_ylim(top=min(top, 102))
    FigureCanvasAgg(figure)
    with written_atomically(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return True
