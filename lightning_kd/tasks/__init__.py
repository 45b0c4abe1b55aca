"""What a network is asked, and how its answer is judged."""

from lightning_kd.tasks.base import Task
from lightning_kd.tasks.classification import Classification

__all__ = ["Classification", "Task"]
