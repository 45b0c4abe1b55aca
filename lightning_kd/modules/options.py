"""What of a module's arguments is kept in its checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


def is_plain(value: Any) -> bool:
    """Whether a value loads with ``weights_only``: numbers, strings, None and lists of them."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def remember_options(module: LightningModule, frame: Any) -> None:
    """Save options: the plain configuration under the command line, plain values in Python.

    Live objects would be pickled into the checkpoint, which then loads no more with
    ``weights_only``; and without their configuration a checkpoint of the command line could not
    rebuild them.

    Args:
        module: Whose ``hparams`` are set.
        frame: Of the paradigm's ``__init__``.
    """
    live = [name for name, value in frame.f_locals.items() if not is_plain(value)]
    module.save_hyperparameters(ignore=live, frame=frame)
    if "_instantiator" in module.hparams:
        module.save_hyperparameters(frame=frame)
    else:
        options = {k: v for k, v in dict(module.hparams).items() if is_plain(v)}
        for name in ("_hparams", "_hparams_initial"):  # replaced, where Lightning would add to them
            setattr(module, name, type(module.hparams)(options))  # type: ignore[call-arg]
