"""The command line: ``lightning-kd fit -c file.yaml``."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

# imported so that bare class names resolve
import lightning_kd.callbacks
import lightning_kd.losses
import lightning_kd.models
import lightning_kd.weighting  # noqa: F401
from lightning_kd.atomic_files import refuse_unwritable
from lightning_kd.callbacks import KeepFreedMemory, SaveOnSigterm
from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.cli.fill import fill_in, keep_checkpoints_together
from lightning_kd.cli.generations import generations
from lightning_kd.cli.help import Parser
from lightning_kd.cli.overrides import drop_leaked
from lightning_kd.modules import Distiller
from lightning_kd.modules.checkpoint_io import DurableCheckpointIO, read_options
from lightning_kd.utils.bounded import bounded_by_memory
from lightning_kd.utils.trust import check_options


class SaveRunConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder when ``fit`` starts, and guard that folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: whether a run is resumed is known only in ``on_fit_start``."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that holds another run; else write the configuration."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = run_folder(trainer) / self.config_filename
        refuse_to_overwrite(trainer, path, self.overwrite)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.overwrite and trainer.ckpt_path is None:
                for old in (path.parent / "checkpoints").glob("*.ckpt"):
                    old.unlink()  # else a run that fails early would seem to have left them
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class DistillationCLI(LightningCLI):
    """LightningCLI that fills in the data's classes and channels, and avoids jsonargparse traps."""

    given_args: list[str]
    from_checkpoint = False  # whether options came out of one

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--overwrite``."""
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace the results of an earlier run in the same folder.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and remember what was given."""
        args = sys.argv[1:] if args is None else args
        self.given_args = args if isinstance(args, list) else []
        for arg in self.given_args:
            if re.match(r"--[\w.]+\.\d+\.", arg):
                parser.error(
                    f"Expected options by name, got the index of a list in {arg}: write losses as "
                    f"a mapping of names in the file (losses: {{kd: ...}}), then give "
                    f"--model.losses.kd.weight 2; edit other lists in the file."
                )
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Fill in the data's properties, reset leaked options, and note ``--overwrite``."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        undone = drop_leaked(config, self.given_args)
        if undone:
            rank_zero_info(
                f"Options of a class that was replaced were reset to their defaults: "
                f"{', '.join(undone)}."
            )
        if config.get("data") is not None:
            fill_in(config.model, config.data)
        keep_checkpoints_together(config.trainer)
        self.save_config_kwargs["overwrite"] = bool(config.get("overwrite"))

    def instantiate_classes(self) -> None:
        """Build all parts; what a checkpoint names may not fill the memory."""
        with bounded_by_memory() if self.from_checkpoint else contextlib.nullcontext():
            super().instantiate_classes()

    def before_fit(self) -> None:
        """Pass ``--overwrite`` on to the callbacks, and check that results can be written."""
        root = str(self.trainer.default_root_dir)
        if not self.trainer.fast_dev_run and "://" not in root:  # type: ignore[attr-defined]
            refuse_unwritable(Path(root))
        if self.save_config_kwargs["overwrite"]:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "overwrite"):
                    callback.overwrite = True

    before_predict = before_fit

    def before_test(self) -> None:
        """Say so where nothing that was trained is measured."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if not config.get("ckpt_path"):
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path: networks are measured as they are built, "
                f"with the weights of lightning_kd.models.pretrained where it is named, not as a "
                f"run has trained them."
            )

    before_validate = before_test

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, whose checkpoints are never half-written."""
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        given = config.trainer.get("plugins") or []
        given = given if isinstance(given, list) else [given]
        if not any(isinstance(plugin, CheckpointIO) for plugin in given):
            kwargs["plugins"] = [*given, DurableCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Warn if the options saved in a checkpoint replace those of the command line."""
        subcommand = self.config.get("subcommand")
        self._refuse_missing(self.config[subcommand].get("ckpt_path") if subcommand else None)
        requested = self.config.clone()
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path and Path(path).is_file():
            own = {v for _, v in flatten(self.config[subcommand]) if isinstance(v, str)}
            check_options(read_options(path), own=own)
            self.from_checkpoint = True
        super()._parse_ckpt_path()
        if not subcommand:
            return
        before, after = requested[subcommand].get("model"), self.config[subcommand].get("model")
        if before is None or after is None:
            return
        old, new = dict(flatten(before)), dict(flatten(after))
        changed = sorted(
            k for k in old if old[k] is not None and k in new and old[k] != new[k]
        )  # what is null was filled in from the data when the checkpoint was made
        if changed:
            listed = ", ".join(f"{k} = {new[k]} (requested: {old[k]})" for k in changed[:8])
            rank_zero_warn(
                f"The checkpoint's own options replace those of the command line: {listed}. To "
                f"change options, start a new run from the weights "
                f"(lightning_kd.models.pretrained)."
            )

    @staticmethod
    def _refuse_missing(given: Any) -> None:
        if not given or given in ("last", "best", "hpc", "registry") or ":" in str(given):
            return
        path = Path(given)
        if path.exists():
            return
        near = sorted(p.name for p in path.parent.glob("*.ckpt"))
        raise FileNotFoundError(
            f"Expected a checkpoint at {path}, found none. In {path.parent} there are: "
            f"{', '.join(near) or 'no checkpoints'}."
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


def quieten() -> None:
    """Hide warnings about Lightning's internals, which no user can act on."""
    for message in (
        # Lightning's own use of a torch function that newer versions of torch renamed
        r".*isinstance\(treespec, LeafSpec\).*",
        # the CSV logger is what we want if tensorboard is not installed
        r".*`tensorboardX` has been removed.*",
        # loaders of this package hold their data in memory and need no workers
        r".*is smaller than the logging interval.*",
        # a resumed run finds its own
        r".*Checkpoint directory .* exists and is not empty.*",
        r"Total length of `list` across ranks is zero.*",
        # we call it from Python on purpose
        r"LightningCLI's args parameter is intended.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def main(args: ArgsType = None, run: bool = True) -> LightningCLI | None:
    """Run ``lightning-kd``; ``args`` as on the command line, or as a dict.

    With ``run=False`` nothing is run and ``args`` name no subcommand: only model, data and trainer
    are built, for example in a notebook.

    Returns:
        The command line object, with its ``model``, ``trainer`` and ``datamodule``; ``None`` for
        ``lightning-kd generations``, which runs several.
    """
    quieten()
    args = sys.argv[1:] if args is None else args
    if isinstance(args, list) and args[:1] == ["generations"]:
        generations(args[1:], main)
        return None
    return DistillationCLI(
        Distiller,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [SaveOnSigterm(), KeepFreedMemory()]},
        # else --optimizer would optimize the teachers too
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        run=run,
        parser_class=Parser,
        parser_kwargs={
            "prog": "lightning-kd",
            "description": "Knowledge distillation with Lightning's Trainer. Also: lightning-kd "
            "generations, a series of networks, each taught by the one before (--help).",
        },
        args=args,
    )


def run() -> None:
    """Console entry point: ``main``, with this package's own errors reported in one sentence."""
    try:
        main()
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # as shells do
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        home = Path(__file__).parents[1]
        cause: BaseException | None = error  # jsonargparse wraps what constructors raise
        while cause is not None:
            raised_in = traceback.extract_tb(cause.__traceback__)[-1].filename
            if Path(raised_in).is_relative_to(home):
                sys.exit(f"lightning-kd: {cause}")
            cause = cause.__cause__ or cause.__context__
        raise  # a bug in other code needs its traceback
    finally:
        if torch.distributed.is_initialized():  # else its threads may abort the process at its end
            torch.distributed.destroy_process_group()


__all__ = ["DistillationCLI", "main", "run"]
