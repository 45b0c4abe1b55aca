from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Branching(nn.Module, ABC):
    """One network of several outputs that share their first layers: the trunk runs once.

    A cohort runs ``trunk``, then each of ``branches`` on the result of ``scaled``.
    """

    trunk: nn.Module
    branches: nn.ModuleList

    def branch_input(self, features: Tensor) -> Tensor:
        """Trunk's output as it is passed to the branches."""
        return features

    @abstractmethod
    def branch_network(self, index: int) -> nn.Module:
        """A separate network that computes what this branch does, without its weights."""

    @abstractmethod
    def branch_state(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of that network, from the state of this one."""

    @abstractmethod
    def branch_config(self, index: int, config: Any) -> Any:
        """Configuration of that network, from the configuration of this one."""
