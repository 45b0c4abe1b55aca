from __future__ import annotations

import re
from argparse import Action
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

SHOWN = 12


class ShortHelp(DefaultHelpFormatter):
    """Help in terms of YAML, without every ``nn.Module`` there is (1,500 lines for one option)."""

    def _expand_help(self, action: Action) -> str:
        def shorten(match: re.Match[str]) -> str:
            names = match[1].split(", ")
            return match[0] if len(names) <= SHOWN else ", any of them by class_path)"

        text = super()._expand_help(action).replace("``None``", "null")
        return re.sub(r", known subclasses: ([^()]*)\)", shorten, text)


class Parser(LightningArgumentParser):
    """LightningCLI's parser with readable help; parsers made for nested help inherit it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", ShortHelp)
        super().__init__(*args, **kwargs)
