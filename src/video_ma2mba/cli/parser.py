"""The parser of every command, whose help keeps the paragraphs, lists and columns of its text; types of arguments."""

import argparse
import re
import textwrap
from typing import Any, NoReturn

from ..processes import Share


class Parser(argparse.ArgumentParser):
    """As argparse's, but for the help and that an error is one line; its subcommands are parsers of this kind, too."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


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


def parse_bytes(text: str) -> int:
    """ "80GiB", "80 GB", "512MiB", or bytes where there are a million of them -> bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?)?(B)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GiB, 80GB or 512MiB")
    unit = (match[2] or "").lower()
    if not unit and float(match[1]) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} has no unit: for gigabytes write {match[1]}GiB")
    base = 1024 if unit.endswith("i") else 1000
    num_bytes = float(match[1]) * base ** " kmgt".index(unit[:1] or " ")
    if not 1 <= num_bytes < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size that a memory has")
    return int(num_bytes)


def parse_share(text: str) -> Share:
    """ "1/4", for argparse."""
    try:
        return Share.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
