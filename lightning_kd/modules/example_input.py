"""Images that are like those of a run, without disturbing it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import IterableDataset


def example_input(module: LightningModule, unpack: Callable[[Any], tuple[Tensor, Any]]) -> Tensor:
    """One image of the shape that the data has, (1, C, H, W), without disturbing any generator.

    Raises:
        ValueError: If the data is empty, or images have another precision than the Trainer.
    """
    trainer = module.trainer
    datamodule: Any = getattr(trainer, "datamodule", None)
    shape = getattr(datamodule, "image_shape", None)
    convert: Any = trainer.precision_plugin.convert_input
    given = torch.zeros(1, *shape) if shape is not None else module.example_input_array
    if isinstance(given, Tensor):
        return given
    loop: Any = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }[str(trainer.state.fn and trainer.state.fn.value)]
    with isolate_rng():
        batch = _first_batch(loop._data_source.dataloader(), together=loop is trainer.fit_loop)
        batch = (datamodule or module).on_after_batch_transfer(batch, 0)
    x = unpack(batch)[0][:1]
    wanted, got = convert(torch.zeros(1, dtype=torch.float32)).dtype, convert(x).dtype
    if x.is_floating_point() and got != wanted:
        raise ValueError(
            f"Expected images as this Trainer has them, {wanted}, got {got}: convert them in the "
            f"data, or in unpack()."
        )
    return x


def _first_batch(loaders: Any, together: bool) -> Any:
    """First batch as a loop sees it: training gets that of all loaders ``together``."""
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    leaves, structure = tree_flatten(loaders)
    if not together:
        return _first(leaves[0])
    return tree_unflatten([_first(loader) for loader in leaves], structure)


def _first(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    mapped = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    if mapped and getattr(loader, "batch_sampler", None) is not None:
        if not len(dataset):  # type: ignore[arg-type]
            raise ValueError("Expected data, got an empty dataset: check its path and filters.")
        return loader.collate_fn([dataset[0]])  # type: ignore[index]  # no worker starts
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("Expected data, got a loader without a batch.")
    return batch


def training_images(
    module: LightningModule, unpack: Callable[[Any], tuple[Tensor, Any]], batches: int = 16
) -> list[Tensor]:
    """Images of the first training batches, without disturbing any generator."""
    trainer = module.trainer
    transfer = (getattr(trainer, "datamodule", None) or module).on_after_batch_transfer
    convert = trainer.precision_plugin.convert_input
    with isolate_rng():
        loader = trainer.fit_loop._data_source.dataloader()
        if not isinstance(loader, CombinedLoader):
            loader = CombinedLoader(loader, "max_size_cycle")  # as the training loop does
        first = itertools.islice(loader, batches)
        return [unpack(transfer(convert(batch), 0))[0] for batch, _, _ in first]


@contextlib.contextmanager
def plain_defaults(device: torch.device) -> Iterator[None]:
    """Inside, new parts are float32 on this device, as the student was made, to be cast with it.

    A Trainer sets other defaults while a model is configured.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)
