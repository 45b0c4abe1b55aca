"""What a data-free run remembers of the images it made, and how it draws from them."""

from lightning_kd.data_free.replay.memory import Memory, ReplayBatch, ReplayMemory
from lightning_kd.data_free.replay.samplers import Prioritized, Sampler, Uniform

__all__ = ["Memory", "Prioritized", "ReplayBatch", "ReplayMemory", "Sampler", "Uniform"]
