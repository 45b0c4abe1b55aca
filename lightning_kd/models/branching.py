from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Branching(nn.Module, ABC):
    """One network of several answers that share what comes first: the trunk runs once.

    A cohort asks ``trunk``, then each of ``branches`` with what ``scaled`` makes of its output.
    """

    trunk: nn.Module
    branches: nn.ModuleList

    def scaled(self, features: Tensor) -> Tensor:
        """Trunk's output as the branches are given it."""
        return features

    @abstractmethod
    def branch_network(self, index: int) -> nn.Module:
        """A network of its own that answers as this branch does, without its weights."""

    @abstractmethod
    def branch_state(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of that network out of the state of this one."""

    @abstractmethod
    def branch_config(self, index: int, config: Any) -> Any:
        """Configuration of that network out of the configuration of this one."""
