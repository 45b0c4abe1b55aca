"""What networks are trained for, and how their outputs are measured."""

from lightning_kd.tasks.base import Task
from lightning_kd.tasks.classification import Classification

__all__ = ["Classification", "Task"]
