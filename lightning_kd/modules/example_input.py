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
from torch.utils.data import BatchSampler, IterableDataset


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
    source = loop._data_source
    with isolate_rng():
        batch = _first_batch(source, together=loop is trainer.fit_loop)
        batch = (datamodule or module).on_after_batch_transfer(batch, 0)
    x = unpack(batch)[0][:1]
    wanted, got = convert(torch.zeros(1, dtype=torch.float32)).dtype, convert(x).dtype
    if x.is_floating_point() and got != wanted:
        raise ValueError(
            f"Expected images as this Trainer has them, {wanted}, got {got}: convert them in the "
            f"data, or in unpack()."
        )
    return x


def _first_batch(source: Any, together: bool) -> Any:
    """First batch as a loop sees it: training gets that of all loaders ``together``."""
    loaders = source.dataloader()
    once = isinstance(loaders, Iterator) and not isinstance(loaders, CombinedLoader)
    if once:  # there is no second pass: hand the batch back
        batch = _first(loaders)
        source.instance, source.name = itertools.chain([batch], loaders), ""
        return batch
    loaders = loaders.iterables if isinstance(loaders, CombinedLoader) else loaders
    leaves, structure = tree_flatten(loaders)
    if not together:
        return _first(leaves[0])
    return tree_unflatten([_first(loader) for loader in leaves], structure)


def _first(loader: Any) -> Any:
    dataset: Any = getattr(loader, "dataset", None)
    sampler = getattr(loader, "batch_sampler", None)
    try:
        if sampler is None or isinstance(dataset, IterableDataset):
            batch = next(iter(loader), None)
        else:  # as the loader does, but no worker starts
            if hasattr(dataset, "__len__") and not len(dataset):
                raise _empty("an empty dataset: check its path and filters")
            if type(sampler) is not BatchSampler:  # one of the user's own may count what it gives
                with contextlib.suppress(Exception):
                    return loader.collate_fn([dataset[0]])
            with _generators_kept(loader):
                places = next(iter(sampler), None)
            batch = places and loader.collate_fn([dataset[place] for place in places])
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"Expected a first batch from {type(loader).__name__}, to see the shape of the images, "
            f"got {type(error).__name__}: {error}. If the data is right, set example_input_array "
            f"of the module to one image, shape (1, C, H, W)."
        ) from error
    if batch is None:
        raise _empty("a loader without a batch")
    return batch


def _empty(got: str) -> ValueError:
    return ValueError(f"Expected data, got {got}.")


@contextlib.contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Inside, indices may be drawn; the generators of a loader and its samplers do not move."""
    batch_sampler = loader.batch_sampler
    owners = (loader, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    generators = [each for each in found if isinstance(each, torch.Generator)]
    states = [each.get_state() for each in generators]
    try:
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)


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
