"""Pseudo-labels, remembered images, teacher caches and domain files from somebody else."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lightning_kd import Teacher
from lightning_kd.data.pseudo_labels import read_pseudo_labels
from lightning_kd.data_free.replay.memory import Memory
from lightning_kd.data_free.replay.samplers import Uniform
from lightning_kd.teachers import TeacherCache
from tests.conftest import TinyNet

FACTS = {"files": "1", "images": "6", "run": "a", "fingerprint": "f"}
INDICES, ROWS = torch.arange(6), torch.full((6, 4), 0.25)
LABELS = {
    "indices_that_are_fractions": ({"indices": INDICES.float()}, {}),
    "an_index_outside": ({"indices": INDICES + 1}, {}),
    "an_index_below_0": ({"indices": INDICES - 1}, {}),
    "too_few_rows": ({"probabilities": ROWS[:5]}, {}),
    "rows_of_whole_numbers": ({"probabilities": torch.ones(6, 4).long()}, {}),
    "rows_that_are_no_number": ({"probabilities": ROWS * float("nan")}, {}),
    "rows_that_are_infinite": ({"probabilities": ROWS * float("inf")}, {}),
    "rows_that_sum_to_2": ({"probabilities": ROWS * 2}, {}),
    "rows_below_0": ({"probabilities": torch.tensor([[2.0, -1.0, 0.0, 0.0]] * 6)}, {}),
    "one_number_a_row": ({"probabilities": torch.ones(6)}, {}),
    "no_rows": ({"probabilities": None}, {}),
    "10_to_the_15_images": ({}, {"images": str(10**15)}),
    "a_number_below_0_of_images": ({}, {"images": "-5"}),
    "images_by_words": ({}, {"images": "six"}),
    "10_to_the_9_files": ({}, {"files": str(10**9)}),
    "files_by_words": ({}, {"files": "one"}),
    "another_fingerprint": ({}, {"fingerprint": "g"}),
    "no_run": ({}, {"run": None}),
}


@pytest.mark.parametrize("name", LABELS)
def test_hostile_pseudo_labels(name, tmp_path, refused):
    tensors, facts = LABELS[name]
    content = {"indices": INDICES, "probabilities": ROWS, **tensors}
    known = {k: v for k, v in {**FACTS, **facts}.items() if v is not None}
    kept = {k: v.contiguous() for k, v in content.items() if v is not None}
    save_file(kept, tmp_path / "pseudo_labels_0.safetensors", known)
    refused(lambda: read_pseudo_labels(tmp_path, "f"), "pseudo|images|files")


def test_good_pseudo_labels_are_read(tmp_path):
    save_file(
        {"indices": INDICES, "probabilities": ROWS}, tmp_path / "pseudo_labels_0.safetensors", FACTS
    )
    assert torch.equal(read_pseudo_labels(tmp_path, "f"), ROWS)


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "empty", "zeros"])
def test_what_is_no_file_of_pseudo_labels(kind, tmp_path, refused):
    path = tmp_path / "pseudo_labels_0.safetensors"
    make = {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "empty": path.touch,
        "zeros": lambda: path.write_bytes(bytes(100)),
    }
    make[kind]()
    refused(lambda: read_pseudo_labels(tmp_path, "f"), "pseudo")


IMAGES, LOGITS = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, 10)
MEMORIES = {
    "images_that_are_fractions": {"images": IMAGES.float()},
    "images_without_channels": {"images": IMAGES[:, 0]},
    "logits_of_other_classes": {"logits": LOGITS[:, :3]},
    "too_few_logits": {"logits": LOGITS[:3]},
    "logits_that_are_no_number": {"logits": LOGITS * float("nan")},
    "whole_logits": {"logits": LOGITS.long()},
    "infinite_priorities": {"priorities": torch.full((5,), float("inf"))},
    "too_many_priorities": {"priorities": torch.ones(9)},
    "no_logits": {"logits": None},
    "a_position_that_is_a_text": {"position": "a"},
    "a_view_of_10_to_the_12": {"images": IMAGES[:1].expand(10**12, 1, 8, 8)},
}


@pytest.mark.parametrize("name", MEMORIES)
def test_hostile_memories(name, refused):
    memory = Memory(8, Uniform(), "oldest", 10, torch.device("cpu"))
    state = {"images": IMAGES, "logits": LOGITS, "priorities": torch.ones(5), "position": 0}
    refused(lambda: memory.load_state_dict({**state, **MEMORIES[name]}), "Expected")
    memory.load_state_dict(state)
    assert len(memory) == 5


CACHES = {
    "a_list": [1], "null": None, "a_number": 5, "nothing": {}, "absurd": {"images": 10**15},
    "other_classes": {"classes": "ten"}, "nested": {"views": {"a": [1] * 50}},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CACHES, "brackets", "empty", "short", "fifo", "folder"])
def test_hostile_caches(name, tmp_path, refused):
    cache = TeacherCache(str(tmp_path))
    facts = cache.facts([Teacher(TinyNet())], "data", 10)
    whole = {**facts, "images": 6}
    written = CACHES.get(name, {})
    content = {**whole, **written} if isinstance(written, dict) and written else written
    text = json.dumps(whole if name in ("short", "fifo", "folder") else content)
    text = {"brackets": "[" * 100_000, "empty": ""}.get(name, text)
    (tmp_path / "facts.json").write_text(text)
    outputs = tmp_path / "logits.f16"
    if name == "fifo":
        os.mkfifo(outputs)
    elif name == "folder":
        outputs.mkdir()
    else:
        outputs.write_bytes(bytes(7))
    refused(lambda: cache.find(facts, 6), "Expected|damaged")
    assert not cache.ready
