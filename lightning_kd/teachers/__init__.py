"""Who knows."""

from lightning_kd.teachers.teacher import Teacher

__all__ = ["Teacher"]
