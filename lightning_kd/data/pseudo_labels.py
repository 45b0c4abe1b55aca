from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: of the files that the callback ``PseudoLabels`` writes
NAME = "pseudo_labels"


def read_pseudo_labels(folder: Path, fingerprint: str) -> Tensor:
    """Read the files of one run of ``PseudoLabels``.

    Args:
        folder: Where they are.
        fingerprint: Of the images to be labelled.

    Returns:
        Class probabilities of every image, shape (N, K).

    Raises:
        FileNotFoundError: If there are none, or not all.
        ValueError: If they are about other images, damaged, or do not cover all images.
    """
    first = folder / f"{NAME}_0.safetensors"
    advice = "write them with lightning-kd predict and the callback PseudoLabels."
    if not first.is_file():
        raise FileNotFoundError(
            f"Expected pseudo-labels in {folder.resolve()}, found no {first.name}: {advice}"
        )
    found: Tensor | None = None
    covered = torch.zeros(0, dtype=torch.bool)
    files, number, run = 1, 0, None
    while number < files:
        path = folder / f"{NAME}_{number}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected {files} files of pseudo-labels in {folder}, found no {path.name}: "
                f"another process did not finish; {advice}"
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata()
                indices, probabilities = (
                    file.get_tensor("indices"), file.get_tensor("probabilities"),
                )  # fmt: skip
            files, count, run = int(facts["files"]), int(facts["images"]), run or facts["run"]
            _check(indices, probabilities, count)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a file of pseudo-labels: {error}"
            ) from error
        if facts["run"] != run:
            raise ValueError(f"{path} comes from another run than {first.name}: {advice}")
        if facts["fingerprint"] != fingerprint:
            raise ValueError(
                f"{path} is about other images than these: give the data the root, split_seed, "
                f"val_split, subset, classes, labelled_fraction and keep_unlabelled that it had "
                f"under lightning-kd predict."
            )
        if found is not None and probabilities.shape[1:] != found.shape[1:]:
            raise ValueError(
                f"Expected {found.shape[1]} classes in {path}, got {probabilities.shape[1]}."
            )
        if found is None:
            found = torch.zeros(count, probabilities.shape[1])
            covered = torch.zeros(count, dtype=torch.bool)
        if len(indices):
            found[indices] = probabilities
            covered[indices] = True
        number += 1
    assert found is not None
    if not covered.all():
        raise ValueError(
            f"Expected pseudo-labels of all {len(covered)} images in {folder}, got "
            f"{int(covered.sum())}: {advice}"
        )
    return found


def _check(indices: Tensor, probabilities: Tensor, count: int) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1 or not 0 < count < 2**32:
        raise ValueError(f"indices {tuple(indices.shape)} of {indices.dtype} into {count} images")
    if not probabilities.is_floating_point() or probabilities.dim() != 2:
        raise ValueError(f"probabilities {tuple(probabilities.shape)} of {probabilities.dtype}")
    if len(indices) != len(probabilities) or len(indices) > count:
        raise ValueError(f"{len(probabilities)} rows for {len(indices)} of {count} images")
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < count):
        raise ValueError(f"an image's number is not from 0 to {count - 1}")
    sums = probabilities.float().sum(1)
    if not bool(((sums - 1).abs() < 0.02).all() and (probabilities >= 0).all()):  # NaN is neither
        raise ValueError("rows are not probabilities that sum to 1")
