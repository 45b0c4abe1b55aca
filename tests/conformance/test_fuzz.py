"""Wrong values in a YAML: an error that names the key, or a run that works; nothing in between."""

import copy
import math
import random

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lightning_kd.callbacks import ReplayBuffer
from lightning_kd.cli import main
from tests.test_configs import ROOT

CONFIGS = ("multi_teacher", "sub_teacher", "cohort", "data_free", "stochastic_teacher", "tree",
           "teacher_cache", "hint", "attention", "learned_gate")  # fmt: skip
VALUES = {
    "type": ["banana", [], {"a": 1}, {"class_path": "torch.nn.ReLU"}],
    "range": [-1, 0, math.nan, math.inf, -0.5],
}
UNLIMITED = {"seed_everything"}  # any whole number


def leaves(node, path=()):
    """Every value that is no mapping or list, by the keys that lead to it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, (*path, key))
    elif isinstance(node, list) and node and not isinstance(node[0], (int, float, str)):
        for index, value in enumerate(node):
            yield from leaves(value, (*path, index))
    else:
        yield path, node


def replaced(config, path, value):
    config = copy.deepcopy(config)
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return config


def cases():
    dice = random.Random(0)
    for name in CONFIGS:
        config = yaml.safe_load((ROOT / f"configs/digits/{name}.yaml").read_text())
        config = {k: v for k, v in config.items() if k in ("model", "data")}
        for path, old in leaves(config):
            # T_max is torch's own: it divides by it at the first step
            if path[-1] in ("class_path", "checkpoint", "folder", "T_max", *UNLIMITED):
                continue
            kind = "range" if isinstance(old, (int, float)) and not isinstance(old, bool) else None
            for value in dice.sample(VALUES["type"], 1):
                yield name, path, value, "type"
            if kind:
                for value in dice.sample(VALUES["range"], 2):
                    yield name, path, value, "range"


CASES = list(cases())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "value", "kind"), CASES,
    ids=[f"{n}-{'.'.join(map(str, p))}-{v}" for n, p, v, _ in CASES],
)  # fmt: skip
def test_a_wrong_value_is_told_by_its_key_or_works(
    name, path, value, kind, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(1)
    config = yaml.safe_load((ROOT / f"configs/digits/{name}.yaml").read_text())
    kept = {k: v for k, v in config.items() if k in ("model", "data", "seed_everything")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(replaced(kept, path, value)))
    key = next(k for k in reversed(path) if isinstance(k, str))
    try:
        cli = main(["-c", str(tmp_path / "c.yaml")], run=False)
        trainer = Trainer(
            max_epochs=1, limit_train_batches=1, limit_val_batches=1, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[ReplayBuffer(200)] if name == "data_free" else [],
        )  # fmt: skip
        trainer.fit(cli.model, datamodule=cli.datamodule)
    except SystemExit:
        text = capsys.readouterr().err
    except FloatingPointError:  # it names the term, and says what to do
        return
    except (ValueError, TypeError, OSError, ImportError) as error:
        text = str(error)
    else:
        assert kind == "range" or value in ([], {"a": 1}), f"{path} = {value} was accepted"
        loss = trainer.callback_metrics.get("train/loss")
        assert loss is None or torch.isfinite(loss)
        return
    names = {"lr": "learning rate"}  # as torch says
    words = [key, names.get(key, key), *([str(value)] if value else [])]  # "0" is in many a text
    assert any(word in text or word.removesuffix("s") in text for word in words), text
