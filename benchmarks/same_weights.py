"""Whether a change leaves every shipped YAML as it was, bit for bit.

    python benchmarks/same_weights.py record before.json     # in the old checkout
    python benchmarks/same_weights.py compare before.json    # in the new one

Each YAML of ``configs/`` trains for two epochs of three batches, in miniature where its data or
teachers are not at hand. What is recorded is a digest of every tensor of the module's state and of
the replay memory (names do not count, so that renamed entries compare) and every logged metric.
Digests depend on the CPU and on torch: compare runs of one machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from lightning_kd.cli import main  # noqa: E402
from lightning_kd.data import vision  # noqa: E402
from tests import test_configs as shipped  # noqa: E402

SMALLER = {  # a round without data
    "student_steps": 3, "source_steps": 2, "generator_steps": 2, "warm_up": 0, "round_images": 24,
    "batch_size": 24, "capacity": 100,
}  # fmt: skip
IMAGES = {"MNIST": (28, ()), "FashionMNIST": (28, ()), "CIFAR10": (32, (3,))}


def run(path: Path, folder: Path) -> dict:
    """Train one YAML for six batches."""
    torch.manual_seed(0)
    text = path.read_text()

    def place(match: re.Match) -> str:
        at_hand = (ROOT / match[1]).exists() and "digits" in match[1]
        return match[1] if at_hand else shipped.untrained(match[1], folder)

    if path.parent.name == "data_distillation":
        text = text.replace("runs/", f"{folder}/runs/")
    else:
        text = re.sub(r"(?<=checkpoint: )([\w/.]+\.safetensors)", place, text)
    text = re.sub(r"(?<=folder: )runs/", f"{folder}/", text)
    if "DataFree" in text:
        for name, value in SMALLER.items():
            text = re.sub(rf"\b{name}: \d+", f"{name}: {value}", text)
    config = folder / path.name
    config.write_text(text)
    command = "predict" if "pseudo_labels" in path.name else "fit"
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    arguments = [command, "-c", str(config), "--trainer.accelerator=cpu", *quiet]
    if "1_teacher" in path.name:  # the next step needs a teacher that knows something
        arguments += ["--trainer.max_epochs=40"]
    elif command == "fit":
        arguments += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3",
                      "--trainer.limit_val_batches=2"]  # fmt: skip
    if path.parent.name != "data_distillation":
        arguments += [f"--trainer.default_root_dir={folder}/run"]
    if "peer_per_process" in path.name:  # processes of its own: tests/modules
        arguments += ["--trainer.devices=1", "--trainer.strategy=auto"]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        cli = main(arguments)
    tensors = [v for v in tree_leaves(cli.model.state_dict()) if isinstance(v, torch.Tensor)]
    memory = getattr(cli.model, "memory", None)
    if memory is not None:
        kept = memory.state_dict()
        tensors += [v for v in tree_leaves(kept) if isinstance(v, torch.Tensor)]
    metrics = {k: float(v).hex() for k, v in sorted(cli.trainer.callback_metrics.items())}
    return {"tensors": sorted(digest(t) for t in tensors if t.numel()), "metrics": metrics}


def digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's values and shape."""
    data = tensor.detach().cpu().contiguous()
    raw = data.view(torch.uint8).numpy().tobytes() if data.dim() else str(data.item()).encode()
    return hashlib.sha256(str(tuple(data.shape)).encode() + raw).hexdigest()[:16]


def run_all(only: str) -> dict:
    """Train every YAML whose path contains ``only``."""
    for name, (size, channels) in IMAGES.items():
        made = type(name, (shipped.Miniature,), {"shape": (size, channels)})
        getattr(vision, name).dataset = made
    os.chdir(ROOT)
    found = {}
    with tempfile.TemporaryDirectory() as steps:
        for path in sorted((ROOT / "configs").rglob("*.yaml")):
            name = str(path.relative_to(ROOT))
            if only not in name:
                continue
            with tempfile.TemporaryDirectory() as own, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one_after_the_other = path.parent.name == "data_distillation"
                try:
                    found[name] = run(path, Path(steps if one_after_the_other else own))
                except (Exception, SystemExit) as error:
                    found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(name, found[name].get("error", len(found[name].get("tensors", ()))), flush=True)
    return found


def compare(before: dict, after: dict) -> int:
    """Print what differs; returns how many YAMLs do."""
    changed = 0
    for name, now in after.items():
        then = before.get(name)
        if then == now and "error" not in now:
            continue
        changed += 1
        if then is None or "error" in now or "error" in then:
            print(f"{name}: {now.get('error', 'not recorded before')}")
            continue
        lost = set(then["tensors"]) ^ set(now["tensors"])
        keys = {*then["metrics"], *now["metrics"]}
        moved = sorted(k for k in keys if then["metrics"].get(k) != now["metrics"].get(k))
        print(f"{name}: {len(lost)} tensors differ; metrics that differ: {moved[:6]}")
    print(f"{len(after) - changed} of {len(after)} YAMLs as before, bit for bit")
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="part of a YAML's path")
    options = parser.parse_args()
    result = run_all(options.only)
    if options.command == "record":
        options.file.write_text(json.dumps(result, indent=1))
    else:
        sys.exit(bool(compare(json.loads(options.file.read_text()), result)))
