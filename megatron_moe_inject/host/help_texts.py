"""Help texts of Megatron's flags, so that ``--help`` prints them.

Megatron takes help texts from the comments of its configs, and argparse formats them: a per cent
sign in one (0.19.2 has "(10% of ...)") ends ``--help`` in a ``ValueError``.
"""

from __future__ import annotations

from argparse import ArgumentParser


def make_printable(parser: ArgumentParser) -> ArgumentParser:
    """Let argparse print each help text that it cannot format as it stands; returns the parser."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if not action.help:
            continue
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser
