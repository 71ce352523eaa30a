"""The parser of every command: help keeps the paragraphs, lists and columns that its text has."""

import argparse
import textwrap
from typing import Any


class Parser(argparse.ArgumentParser):
    """As argparse's; its subcommands are parsers of this kind, too."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, **options)


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs and "- " items are wrapped; a line with two spaces in a row, as in columns, stays as it is."""
        parts: list[str] = []
        for line in text.strip().splitlines():
            goes_on = bool(line and parts and parts[-1]) and not line.startswith("- ") and "  " not in parts[-1]
            if goes_on and ("  " not in line or parts[-1].startswith("- ")):
                parts[-1] += " " + line.strip()
            else:
                parts.append(line)
        return "\n".join(part if "  " in part else self._wrapped(part, width, indent) for part in parts)

    def _wrapped(self, part: str, width: int, indent: str) -> str:
        further = indent + ("  " if part.startswith("- ") else "")
        return textwrap.fill(part, width, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)
