"""Knowledge distillation for vision networks as PyTorch Lightning modules and callbacks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_kd.cli import main
    from lightning_kd.cohort import Cohort
    from lightning_kd.distillation import Distillation
    from lightning_kd.modules import (
        DataFree,
        Distiller,
        MultiTeacher,
        PeerCohort,
        SubTeacher,
        Supervised,
    )
    from lightning_kd.outputs import NetworkOutput, TeacherOutputs
    from lightning_kd.teachers import Teacher

__version__ = "0.1.0"

# resolved on first use, so that an exported student loads in a process that never imports Lightning
_HOMES = {
    "Cohort": "cohort",
    "DataFree": "modules",
    "Distillation": "distillation",
    "Distiller": "modules",
    "MultiTeacher": "modules",
    "NetworkOutput": "outputs",
    "PeerCohort": "modules",
    "SubTeacher": "modules",
    "Supervised": "modules",
    "Teacher": "teachers",
    "TeacherOutputs": "outputs",
    "main": "cli",
}

__all__ = [
    "Cohort",
    "DataFree",
    "Distillation",
    "Distiller",
    "MultiTeacher",
    "NetworkOutput",
    "PeerCohort",
    "SubTeacher",
    "Supervised",
    "Teacher",
    "TeacherOutputs",
    "main",
]


# what else ``dir(lightning_kd)`` shows; each is imported on first use
_ROOMS = (
    "callbacks",
    "cli",
    "data",
    "data_free",
    "exchange",
    "features",
    "functional",
    "losses",
    "models",
    "modules",
    "schedules",
    "strategies",
    "tasks",
    "teachers",
    "weighting",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        if _HOMES[name] == "modules":  # strategies are chosen by name, once they are known
            importlib.import_module(f"{__name__}.strategies")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    try:  # lightning_kd.losses works without importing it first
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if (
            error.name != f"{__name__}.{name}"
        ):  # a room is there, but something that it needs is not
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS, "__version__"]
