"""Memory of the images that a data-free run made, and how batches are drawn from it."""

from lightning_kd.data_free.replay.memory import Memory, ReplayBatch, ReplayMemory
from lightning_kd.data_free.replay.samplers import Prioritized, Sampler, Uniform

__all__ = ["Memory", "Prioritized", "ReplayBatch", "ReplayMemory", "Sampler", "Uniform"]
