from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_kd.data import ImageData, PseudoLabelled, Rounds


def import_path(path: str) -> Callable[..., Any]:
    """Import an object by its dotted path."""
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    return found


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a function or class by name, with those that ``**options`` passes to bases."""
    kinds = target.__mro__ if inspect.isclass(target) else (target,)
    found: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        own = inspect.signature(kind).parameters
        found = {**own, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def keep_checkpoints_together(trainer: Namespace) -> None:
    """Put checkpoints without a folder into that of the run.

    Lightning's default changes when a run is resumed, and then the best one is forgotten.
    """
    root = trainer.get("default_root_dir")
    if root is None:
        return
    given = trainer.get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        kind = import_path(callback["class_path"])
        known = inspect.isclass(kind) and issubclass(kind, ModelCheckpoint)
        if known and callback.get("init_args.dirpath") is None:
            callback["init_args.dirpath"] = str(Path(root) / "checkpoints")


def fill_in(model: Namespace, data: Namespace) -> None:
    """Fill in ``num_classes``, ``in_channels`` and ``image_shape`` of networks from the data.

    LightningCLI's links cannot do it: jsonargparse refuses a link to the arguments of a function,
    which is how most networks are specified.
    """
    kind = import_path(data["class_path"])
    for wrapper, inner in ((Rounds, "measure"), (PseudoLabelled, "data")):
        if inspect.isclass(kind) and issubclass(kind, wrapper):
            wrapped = data.get(f"init_args.{inner}")
            if wrapped is not None:
                fill_in(model, wrapped)
            return
    if not (inspect.isclass(kind) and issubclass(kind, ImageData)):
        return
    # folders are only listed if the classes are not known beforehand
    options = vars(data["init_args"]) if data.get("init_args") else {}
    fixed = hasattr(kind, "num_classes") and not options.get("classes")
    source = kind if fixed else kind(**options)
    known = {
        "num_classes": source.num_classes,
        "in_channels": source.image_shape[0],
        "image_shape": list(source.image_shape),
    }

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        if isinstance(node, dict):
            for item in node.values():
                walk(item)
        if not isinstance(node, Namespace):
            return
        if "class_path" in node:
            accepted = parameters_of(import_path(node["class_path"]))
            for name, value in known.items():
                if name in accepted and node.get(f"init_args.{name}") is None:
                    node[f"init_args.{name}"] = value
        for value in list(vars(node).values()):
            walk(value)

    walk(model)
