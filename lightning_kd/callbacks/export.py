from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import override

from lightning_kd.atomic_files import write_atomically
from lightning_kd.base_distillation import cut_prefix
from lightning_kd.callbacks.files import refuse_to_overwrite, run_folder
from lightning_kd.models.pretrained import normalisation
from lightning_kd.models.weight_files import stored_tensors
from lightning_kd.modules import Distiller


class ExportStudent(Callback):
    """Write the best student at the end of ``fit``, to be used without Lightning.

    ``student.safetensors`` holds the weights, ``student.json`` how the network is built;
    ``lightning_kd.models.pretrained("student.safetensors")`` puts them together. The best student
    is that of the first ``ModelCheckpoint`` that monitors something, else the last. Of a cohort
    every peer is written (``peer_0.safetensors`` ...), and the most accurate one as the student.

    Args:
        folder: Where to write; ``None``: the Trainer's ``default_root_dir``.
        formats: More files, for batches of any size: ``"torch"`` (``torch.export``, ``.pt2``) and
            ``"onnx"`` (needs the extra ``onnx``).
        overwrite: Replace the export of an earlier run.

    Raises:
        ValueError: If a format is unknown.
        FileExistsError: At the start of training, if an earlier run's export is there.
    """

    def __init__(
        self, folder: str | None = None, formats: list[str] | None = None, overwrite: bool = False
    ) -> None:
        unknown = set(formats or ()) - {"torch", "onnx"}
        if unknown:
            raise ValueError(f'Expected formats among "torch" and "onnx", got {sorted(unknown)}.')
        self.folder, self.formats, self.overwrite = folder, formats or [], overwrite
        self.path: Path | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Distiller):
            raise TypeError(
                f"ExportStudent expected a module of lightning_kd, got {type(pl_module).__name__}."
            )
        if "onnx" in self.formats:
            try:
                import onnxscript  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    "formats: [onnx] needs pip install 'lightning-kd[onnx]'"
                ) from error

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = run_folder(trainer, self.folder) / "student.safetensors"
        refuse_to_overwrite(trainer, target, self.overwrite)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        folder = run_folder(trainer, self.folder)  # a collective, so before ranks part
        if trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        state, scores = best_state(trainer, pl_module)
        networks, core = pl_module.exported_networks(), pl_module.distillation
        best = core.best_network(scores)
        # of several networks each has a file, and the best one is the student
        for name, network in (networks | {"student": networks[best]}).items():
            own = name if name in networks else best
            weights = {
                k: v.detach().cpu().contiguous() for k, v in core.exported_state(own, state).items()
            }
            path = folder / f"{name}.safetensors"
            write_atomically(path, save(_unshared(weights)))
            spec = network_spec(core.exported_config(own, pl_module.hparams), network) | {
                "input_shape": list(core.input_shape or ()),
                "num_classes": pl_module.num_classes,
            }
            content = json.dumps(spec, indent=2).encode() + b"\n"
            write_atomically(path.with_suffix(".json"), content)
        if self.formats:
            self._export_graphs(path, networks[best], pl_module, weights)
        self.path = path
        kept = "" if best == "student" else f" ({best} of {len(networks)})"
        rank_zero_info(f"student: {path}{kept}")

    def _export_graphs(
        self, path: Path, learner: nn.Module, module: Distiller, state: dict[str, Tensor]
    ) -> None:
        import copy

        network = copy.deepcopy(learner).cpu()
        network.load_state_dict(state)
        network.float().eval()  # users of the graph expect float32
        example = (torch.zeros(2, *(module.distillation.input_shape or ())),)
        dynamic = ({0: torch.export.Dim("batch")},)
        if "torch" in self.formats:
            program = torch.export.export(network, example, dynamic_shapes=dynamic)
            torch.export.save(program, path.with_suffix(".pt2"))
        if "onnx" in self.formats:
            torch.onnx.export(
                network,
                example,
                path.with_suffix(".onnx"),
                dynamo=True,
                verbose=False,
                dynamic_shapes=dynamic,
            )


def best_state(trainer: Trainer, module: Distiller) -> tuple[dict[str, Tensor], list[float]]:
    """State of the core in this run's best checkpoint, else now, and the scores of its networks."""
    for callback in trainer.checkpoint_callbacks:
        if (
            isinstance(callback, ModelCheckpoint)
            and callback.monitor
            and Path(callback.best_model_path).is_file()
        ):
            saved = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
            return cut_prefix(saved["state_dict"], "distillation."), saved.get("scores", [])
    core = module.distillation
    return core.state_dict(), core.scores(trainer.callback_metrics)


def network_spec(config: Any, network: nn.Module) -> dict[str, Any]:
    """How a network is built: ``class_path`` and ``init_args``, null if unknown."""
    if config is None:
        return _spec_of(network)
    try:
        spec: dict[str, Any] = _plain(config)
    except (OSError, ValueError, KeyError):  # a file that it began from is gone
        return {"class_path": None, "init_args": None}
    return spec


def _spec_of(network: nn.Module) -> dict[str, Any]:
    """Description of a network that records how it was built, as those of this package do."""
    spec = getattr(network, "init_args", None)
    path = f"{type(network).__module__}.{type(network).__qualname__}"
    if spec is None:
        return {"class_path": None, "init_args": None}
    nested = {k: _spec_of(v) if isinstance(v, nn.Module) else v for k, v in spec.items()}
    return {"class_path": path, "init_args": nested}


def _plain(value: Any) -> Any:
    """A parsed configuration as JSON can write it, which needs no other file."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if not hasattr(value, "items"):
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    if value.get("class_path") is None:
        return {k: _plain(v) for k, v in value.items()}
    # dict_kwargs are what a function takes by **kwargs
    given = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
    if value["class_path"] == "lightning_kd.models.pretrained":
        return _of_pretrained(given)
    return {
        "class_path": value["class_path"],
        "init_args": {k: _plain(v) for k, v in given.items()},
    }


def _of_pretrained(options: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a file of weights, without that file."""
    path = Path(options["checkpoint"]).expanduser()
    if options.get("network") is not None:
        spec: dict[str, Any] = _plain(options["network"])
    else:
        beside = json.loads(path.with_suffix(".json").read_bytes())
        spec = {key: beside[key] for key in ("class_path", "init_args")}
    with stored_tensors(path) as (_, metadata):
        mean, std = normalisation(metadata, options.get("mean"), options.get("std"))
    if mean is not None and spec["class_path"] != (wrapper := "lightning_kd.models.Normalized"):
        spec = {"class_path": wrapper, "init_args": {"network": spec, "mean": mean, "std": std}}
    return spec


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        pointer = value.untyped_storage().data_ptr()
        result[key] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return result
