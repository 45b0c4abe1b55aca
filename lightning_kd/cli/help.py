from __future__ import annotations

import re
import sys
from argparse import Action
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_kd.cli.errors import short_message

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

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the key, what is near, and how to see more."""
        if not self.exit_on_error:  # of a class's own parser: the outer one reports it
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        options = [o.lstrip("-") for action in parser._actions for o in action.option_strings]
        sys.stderr.write(f"error: {short_message(message, options)}\n")
        kinds = re.findall(r"class_path '(lightning_kd\.[^']+)':\n(?! *module)", message)
        more = f"--model.help {kinds[0]}" if kinds else "--help"
        sys.stderr.write(f"help: {parser.prog.replace(' [options]', '')} {more}\n")
        self.exit(2)
