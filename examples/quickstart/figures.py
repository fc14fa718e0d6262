"""Reads what Megatron's training loop printed: loss terms by iteration, and held-out losses.

Megatron prints ` iteration  10/ 300 | ... | lm loss: 2.5E+00 | ... |` while it trains and
` validation loss at iteration 10 | lm loss value: 2.5E+00 | ... |` when it evaluates, with -NAME
behind validation where each held-out set has a loss of its own. Both give the plugin's terms too,
such as `kd loss/code`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

_ITERATION = re.compile(r"\biteration\s+(\d+)/\s*\d+ \|(.*)")
_VALIDATION = re.compile(r"validation(?:-(\S+))? loss at iteration (\d+)(.*)")
_VALUE = re.compile(r"([^|:]+) value: ([-+0-9.eE]+|nan|inf) *(?=\|)")
_TERM = re.compile(r"([^|:]+): +([-+0-9.eE]+|nan|inf) *(?=\|)")

Series = list[tuple[int, float]]


@dataclass
class Run:
    """One run: series of (iteration, value) by name.

    Attributes:
        terms: by the name in the log line, such as "lm loss" or "kd loss/code".
        validation: the same on held-out text; a set evaluated alone is "lm loss/NAME".
    """

    terms: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)

    def tokens_per_step(self, sequence_length: int) -> int:
        """Tokens of one step, from the batch size in the log."""
        return int(self.terms["global batch size"][-1][1]) * sequence_length


def read_log(path: Path) -> Run:
    """Parses the output of one run. An evaluation printed twice for one iteration counts once."""
    run = Run()
    for line in path.read_text(errors="replace").splitlines():
        if found := _ITERATION.search(line):
            for name, value in _TERM.findall(found[2]):
                run.terms.setdefault(name.strip(), []).append((int(found[1]), float(value)))
        elif found := _VALIDATION.search(line):
            for name, value in _VALUE.findall(found[3]):
                key = name.strip() + (f"/{found[1]}" if found[1] else "")
                series = run.validation.setdefault(key, [])
                if not series or series[-1][0] != int(found[2]):
                    series.append((int(found[2]), float(value)))
    return run


def bits_per_byte(loss: float, size: dict[str, int]) -> float:
    """Mean loss per token [nats] as bits per byte of a text of size["tokens"] and size["bytes"]."""
    return loss / math.log(2) * size["tokens"] / size["bytes"]
