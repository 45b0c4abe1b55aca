"""What a file that somebody else may have made can name: networks, and plain values as options."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

#: packages whose networks a file of weights may name
TRUSTED_PACKAGES = ("lightning_kd.models", "torchvision.models", "timm", "torch.nn")
#: packages whose classes the options in a checkpoint may name
TRUSTED_OPTIONS = (
    *TRUSTED_PACKAGES, "lightning_kd", "torchvision.transforms", "torchvision.ops", "torch.optim",
    "torchmetrics", "lightning.pytorch.cli",
)  # fmt: skip
MOST_VALUES, MOST_CHARACTERS, DEEPEST, LARGEST = 10_000, 4_096, 20, 1_000_000
FILES = (".ckpt", ".json", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".yaml", ".yml")
PATH = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")


def is_inside(name: str, packages: Sequence[str]) -> bool:
    """Whether a dotted name is one of these packages, or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def import_network(class_path: Any, trust: Sequence[str] = ()) -> Any:
    """Import the network class, or function that returns a network, of a dotted path.

    Nothing outside of ``TRUSTED_PACKAGES`` and ``trust`` is imported or found: neither another
    package that a trusted one has imported, nor a function that is not meant to build networks.

    Args:
        class_path: Such as ``torchvision.models.resnet18``.
        trust: More packages (``my_project.networks``) whose classes and functions may be used.

    Raises:
        ValueError: If it names anything else.
    """
    found = _import(class_path, TRUSTED_PACKAGES, trust)
    if isinstance(found, type) and not issubclass(found, nn.Module):
        raise ValueError(_refusal(class_path, TRUSTED_PACKAGES, trust))
    if getattr(found, "__name__", None) == "pretrained" and not is_inside(class_path, trust):
        raise ValueError(
            f"Expected a network, got {class_path}: a file of weights may not name another one."
        )
    return found


def check_options(options: Any, trust: Sequence[str] = (), own: Collection[str] = ()) -> None:
    """Check options out of a checkpoint, before anything that they name is imported or built.

    Args:
        options: Values by name, as nested as a YAML file.
        trust: More packages whose classes and functions they may name.
        own: What the user names as well, and so may be named.

    Raises:
        ValueError: If they hold anything but plain values and classes of ``TRUSTED_OPTIONS``.
    """
    check_plain(options, "the checkpoint's hyper_parameters")
    packages = (*TRUSTED_OPTIONS, *trust)
    level = [options]
    while level:
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if "class_path" in each and each["class_path"] not in own:
                    _import(each["class_path"], TRUSTED_OPTIONS, trust)
                if each.get("checkpoint_path"):  # timm reads it with pickle
                    raise ValueError(
                        "Expected networks without a checkpoint_path in the checkpoint's "
                        "hyper_parameters, got one: load it with lightning_kd.models.pretrained."
                    )
            elif isinstance(each, (list, tuple)):
                below += each
            elif isinstance(each, str) and _is_importable(each, packages) and each not in own:
                # jsonargparse imports it where a function is expected
                raise ValueError(_refusal(each, TRUSTED_OPTIONS, trust))
        level = below


def _import(class_path: Any, packages: Sequence[str], trust: Sequence[str]) -> Any:
    """Import a class, or function that builds networks, of these packages alone."""
    if not isinstance(class_path, str) or not PATH.fullmatch(class_path[:MOST_CHARACTERS]):
        raise ValueError(
            f"Expected a dotted path such as torchvision.models.resnet18, got {_short(class_path)}."
        )
    trusted = (*packages, *trust)
    if not is_inside(class_path, trusted):
        raise ValueError(_refusal(class_path, packages, trust))
    found = _find(class_path)
    if found is None:
        raise ValueError(f"Expected a network, found no {class_path}: is the package installed?")
    if is_inside(getattr(found, "__module__", None) or "", trusted) and (
        isinstance(found, type)
        or (inspect.isfunction(found) and (is_inside(class_path, trust) or _builds_networks(found)))
    ):
        return found
    raise ValueError(_refusal(class_path, packages, trust))


def _refusal(class_path: Any, packages: Sequence[str], trust: Sequence[str]) -> str:
    return (
        f"Expected a class of {', '.join((*packages, *trust))}, got {_short(class_path)}: a file "
        f"may not name other code to run. If you trust where it comes from, add the package with "
        f"trust=[...], give the network itself, or name it in your own file with -c."
    )


def _is_importable(text: str, trusted: Sequence[str]) -> bool:
    """Whether a string is a dotted path of another package that is installed."""
    if not PATH.fullmatch(text) or text.endswith(FILES) or is_inside(text, trusted):
        return False
    try:
        spec = importlib.util.find_spec(text.partition(".")[0])  # of the top alone: imports nothing
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _find(class_path: str) -> Any:
    """The object of a dotted path, imported as far as it has to be; None if there is none."""
    parts = class_path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not is_inside(name, (error.name,)):
                raise  # something that this package needs is missing
            continue
        for part in parts[count:]:
            found = getattr(found, part, None)
        return found
    return None


def _builds_networks(function: Any) -> bool:
    """Whether a function of a trusted package is one that it offers for building networks."""
    package = function.__module__.partition(".")[0]
    if package == "lightning_kd":
        models, name = importlib.import_module("lightning_kd.models"), function.__name__
        return name in models.__all__ and getattr(models, name) is function
    if package == "torchvision":
        from torchvision.models import get_model, get_model_builder, list_models

        name = function.__name__
        return function is get_model or (
            name in list_models() and get_model_builder(name) is function
        )
    if package == "timm":
        import timm

        name = function.__name__
        return function is timm.create_model or (
            timm.is_model(name) and timm.model_entrypoint(name) is function
        )
    return False


def check_plain(value: Any, what: str) -> None:
    """Raise ``ValueError`` unless a value out of a file is plain, small and shallow.

    Plain are None, booleans, numbers, strings, lists and mappings of strings to such. Numbers may
    be up to a million: sizes of layers are no larger, and lists are made of them.
    """
    count = 0
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for each in level:
            count += 1
            if isinstance(each, dict) and all(isinstance(key, str) for key in each):
                below += [*each, *each.values()]
            elif isinstance(each, (list, tuple)):
                below += each
            elif isinstance(each, str):
                if len(each) > MOST_CHARACTERS:
                    raise ValueError(
                        f"Expected strings of up to {MOST_CHARACTERS} characters in {what}, got "
                        f"one of {len(each)}."
                    )
            elif isinstance(each, (int, float)):
                if not abs(each) <= LARGEST:
                    raise ValueError(
                        f"Expected numbers of up to {LARGEST} in {what}, got {_short(each)}."
                    )
            elif each is not None:
                raise ValueError(
                    f"Expected numbers, strings, lists and networks in {what}, got "
                    f"{type(each).__name__}."
                )
            if count + len(below) > MOST_VALUES:
                raise ValueError(f"Expected up to {MOST_VALUES} values in {what}, got more.")
        if not below:
            return
        level = below
    raise ValueError(f"Expected {what} nested up to {DEEPEST} deep, got more.")


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a larger one"
    return text if len(text) <= 80 else f"{text[:77]}..."
