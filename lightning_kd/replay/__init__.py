"""What a data-free run remembers of the images it made, and how it draws from them."""

from lightning_kd.replay.memory import Drawn, Memory, Remembers
from lightning_kd.replay.samplers import Prioritized, Sampler, Uniform

__all__ = ["Drawn", "Memory", "Prioritized", "Remembers", "Sampler", "Uniform"]
