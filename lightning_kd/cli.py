from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_warn

import lightning_kd.callbacks
import lightning_kd.data
import lightning_kd.losses
import lightning_kd.models
import lightning_kd.modules
import lightning_kd.weighting  # noqa: F401  imported so that bare class names resolve
from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.data import ImageData
from lightning_kd.modules import Distiller


class SaveRunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder when ``fit`` starts, and guard that folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a folder that holds another run; else write the configuration."""
        if stage != "fit" or self.already_saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = run_folder(trainer) / self.config_filename
        refuse_to_overwrite(trainer, path, self.overwrite)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)
        self.already_saved = True


class DistillationCLI(LightningCLI):
    """``lightning-kd``: LightningCLI with the data's classes and channels filled in."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--overwrite``."""
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace the results of an earlier run in the same folder.",
        )

    def before_instantiate_classes(self) -> None:
        """Fill in what the data knows; let ``--overwrite`` reach whoever writes files."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        data = config.get("data")
        if data is not None:
            fill_in(config.model, data)
        self.save_config_kwargs["overwrite"] = bool(config.get("overwrite"))

    def before_fit(self) -> None:
        """Pass ``--overwrite`` on to the callbacks."""
        config = self.config[str(self.subcommand)]
        if config.get("overwrite"):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "overwrite"):
                    callback.overwrite = True

    def _parse_ckpt_path(self) -> None:
        """Say so when the options saved in a checkpoint replace those of the command line."""
        subcommand = self.config.get("subcommand")
        asked = self.config.clone()
        super()._parse_ckpt_path()
        if not subcommand:
            return
        before, after = asked[subcommand].get("model"), self.config[subcommand].get("model")
        if before is None or after is None:
            return
        old, new = dict(flatten(before)), dict(flatten(after))
        changed = sorted(k for k in old if k in new and old[k] != new[k])
        if changed:
            listed = ", ".join(f"{k} = {new[k]} (asked: {old[k]})" for k in changed[:8])
            rank_zero_warn(
                f"The checkpoint's own options replace those of the command line: {listed}. To "
                f"change options, start a new run from the weights (lightning_kd.models.pretrained)."
            )


def flatten(config: Any, prefix: str = "model") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested namespaces, mappings and lists."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, dict):
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}")
    elif isinstance(config, list):
        for index, value in enumerate(config):
            yield from flatten(value, f"{prefix}.{index}")
    else:
        yield prefix, config


def import_path(path: str) -> Callable[..., Any]:
    """Import an object by its dotted path."""
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(__import__(module, fromlist=[name]), name)
    return found


def fill_in(model: Namespace, data: Namespace) -> None:
    """Give each network that has ``num_classes`` or ``in_channels`` unset what the data has.

    LightningCLI's links cannot do it: jsonargparse refuses a link to the arguments of a function,
    which is what most networks are named by.
    """
    kind = import_path(data["class_path"])
    if not (inspect.isclass(kind) and issubclass(kind, ImageData)):
        return
    # folders are only listed where the classes are not known beforehand
    options = vars(data["init_args"]) if data.get("init_args") else {}
    source = kind if hasattr(kind, "num_classes") else kind(**options)
    known = {"num_classes": source.num_classes, "in_channels": source.image_shape[0]}

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                walk(item)
        if not isinstance(node, Namespace):
            return
        if "class_path" in node:
            accepted = inspect.signature(import_path(node["class_path"])).parameters
            for name, value in known.items():
                if name in accepted and node.get(f"init_args.{name}") is None:
                    node[f"init_args.{name}"] = value
        for value in list(vars(node).values()):
            walk(value)

    walk(model)


def main(args: ArgsType = None) -> LightningCLI:
    """Run ``lightning-kd``; ``args`` as on the command line, or a dict of it.

    Returns:
        The command line object, whose ``model``, ``trainer`` and ``datamodule`` live on.
    """
    return DistillationCLI(
        Distiller,
        ImageData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        # else --optimizer would optimize the teachers too
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        parser_kwargs={"prog": "lightning-kd"},
        args=args,
    )


def run() -> None:
    """Console entry point: ``main`` without a return value, which the shell would read as failure."""
    main()


__all__ = ["DistillationCLI", "main"]
