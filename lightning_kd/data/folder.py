from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as image_ops

from lightning_kd.data.base import ImageData, Labelled
from lightning_kd.teachers import TeacherCache

#: what torchvision decodes; Pillow reads the rest
DECODED = (".jpg", ".jpeg", ".png", ".gif", ".webp")
#: what Pillow lists, and opens only with help that is not installed
STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


def image_suffixes() -> frozenset[str]:
    """Endings of image files that can be read, in lower case."""
    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(end for end, kind in known if kind in Image.OPEN and kind not in STUBS)


def is_hidden(path: Path) -> bool:
    """Whether a path relative to a data set is one that programs leave (``.ipynb_checkpoints``)."""
    return any(part.startswith((".", "__")) for part in path.parts)


class _Files:
    """Reads image files, scaled and cropped to one square size."""

    def __init__(self, paths: list[Path], labels: Tensor, shape: tuple[int, int, int]) -> None:
        self.paths, self.labels, self.shape = paths, labels, shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Labelled:
        path = self.paths[index]
        grey = self.shape[0] == 1
        try:
            if path.suffix.lower() in DECODED:
                mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
                image = decode_image(str(path), mode=mode)
            else:
                with Image.open(path) as file:
                    image = image_ops.pil_to_tensor(file.convert("L" if grey else "RGB"))
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"Expected an image at {path}: {error}") from error
        image = image_ops.resize(image, [self.shape[1]])
        return image_ops.center_crop(image, [self.shape[1]]), self.labels[index]


class ImageFolder(ImageData):
    """Your own images: ``root/train`` and, optionally, ``root/val`` and ``root/test``.

    In each, one folder per class; images directly in it have no label (-1). All are scaled and
    centre-cropped to one square size, by worker processes, since they need not fit in memory.
    Every type that Pillow reads is an image; what is skipped is counted and reported. Hidden
    folders and files are left out. ``test`` runs on ``root/val`` where there is no ``root/test``
    (ImageNet's layout).

    Args:
        root: Folder that holds ``train``, ``val`` and ``test``; ``None``: the variable
            LIGHTNING_KD_DATA, else ``data``.
        image_size: Side of the images in pixels.
        channels: 3 (colour) or 1 (grey).
        num_workers: Processes that read files.
        class_names: Classes in the order of their labels; ``None``: the folders of ``train``,
            sorted. Needed if no image has a label.
        batch_size: Images per batch and process.
        val_split: Held out of the training images for validation: a fraction below 1, or a count.
            ``None``: the images of ``root/val``, if there is such a folder, else a tenth.
        subset: Use only this many training images: a fraction up to 1, or a count; ``None``: all.
        labelled_fraction: Share of each class whose labels are kept; the others become -1.
        keep_unlabelled: Keep images without a label in training; a baseline leaves them out.
        crop_padding: Random crops after padding by this many pixels; 0: none.
        flip: Random horizontal flips.
        drop_last: Drop a last training batch that is not full.
        split_seed: Chooses validation images, subset and labelled images; not the run's seed.
        predict_split: Images that ``predict`` runs on: ``"test"``, or ``"train"``, in order and
            without augmentation (for ``PseudoLabels``).
        teacher_cache: Run the teachers of ``MultiTeacher`` once for each training image and
            view; ``None``: at each step.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If no class can be found, or a number is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 224,
        channels: int = 3,
        num_workers: int = 2,
        class_names: list[str] | None = None,
        batch_size: int = 128,
        val_split: float | None = None,
        subset: float | None = None,
        labelled_fraction: float = 1.0,
        keep_unlabelled: bool = True,
        crop_padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        split_seed: int = 0,
        predict_split: Literal["test", "train"] = "test",
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(
            root=root,
            batch_size=batch_size,
            val_split=0.1 if val_split is None else val_split,
            subset=subset,
            labelled_fraction=labelled_fraction,
            keep_unlabelled=keep_unlabelled,
            crop_padding=crop_padding,
            flip=flip,
            drop_last=drop_last,
            download=False,
            split_seed=split_seed,
            predict_split=predict_split,
            teacher_cache=teacher_cache,
        )
        self.has_val = val_split is None and (self.root / "val").is_dir()
        if self.has_val:
            self.val_split = 0
        self.image_shape = (channels, image_size, image_size)
        self.num_workers = num_workers
        if class_names is None:
            folder = self.root / "train"
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"Expected the training images in {folder.resolve()}, found no such folder. "
                    f"Set --data.root."
                )
            folders = (p for p in folder.iterdir() if p.is_dir())
            class_names = sorted(p.name for p in folders if not is_hidden(Path(p.name)))
            if not class_names:
                raise ValueError(
                    f"Expected one folder per class in {folder}, found none. If the images have no "
                    f"labels, name the teacher's classes: --data.class_names."
                )
        self.class_names = class_names
        self.num_classes = len(class_names)

    def load(self, train: bool) -> tuple[Any, Tensor]:
        """Paths of the images and their labels (N,); the files are read batch by batch."""
        test = "test" if (self.root / "test").is_dir() or not self.has_val else "val"
        return self._list("train" if train else test)

    def _split(self, images: Any, labels: Tensor) -> tuple[Labelled, Labelled]:
        train, val = super()._split(images, labels)
        return train, self._list("val") if self.has_val else val

    def _list(self, split: str) -> tuple[Any, Tensor]:
        folder = self.root / split
        if not folder.is_dir():
            raise FileNotFoundError(f"Expected images in {folder.resolve()}, found no such folder.")
        files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
        suffixes = image_suffixes()
        images = [p for p in files if p.suffix.lower() in suffixes and not is_hidden(p)]
        paths, labels = sorted(folder / p for p in images), []
        for path in paths:
            parts = path.relative_to(folder).parts
            name = parts[0] if len(parts) > 1 else None
            if name is not None and name not in self.class_names:
                raise ValueError(
                    f"Expected the folders of {folder} to be classes of "
                    f"{', '.join(self.class_names[:8])}, got {name!r}."
                )
            labels.append(-1 if name is None else self.class_names.index(name))
        empty = [name for index, name in enumerate(self.class_names) if index not in set(labels)]
        if split == "train" and paths and empty and len(empty) < len(self.class_names):
            rank_zero_warn(f"Classes without an image in {folder}: {', '.join(empty[:8])}.")
        if skipped := len(files) - len(images):
            rank_zero_info(f"{folder}: {len(images)} images; {skipped} other files are left out.")
        return paths, torch.tensor(labels, dtype=torch.int64)

    def take(self, images: Any, labels: Tensor, indices: Tensor) -> tuple[Any, Tensor]:
        """Part of the paths, in the given order."""
        return [images[i] for i in indices.tolist()], labels[indices]

    def content(self, images: Any) -> bytes:
        """Names of the files below the root, and their sizes."""
        lines = (f"{path.relative_to(self.root)} {path.stat().st_size}" for path in images)
        return "\n".join(lines).encode()

    def fetch(self, source: Any, plan: Iterator[Tensor]) -> Iterator[Labelled]:
        """Yield (images, labels), read by worker processes."""
        paths, labels = source
        files: Any = _Files(paths, labels, self.image_shape)  # as much of a Dataset as is needed
        loader = DataLoader(
            files,
            batch_sampler=[indices.tolist() for indices in plan],
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),  # else it draws from the global one
        )
        yield from loader
