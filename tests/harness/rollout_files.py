"""Files of rollouts for tests: text like the domain's, as some checkpoint may have written it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_moe_inject.rollouts.file_format import Writer, write_rollouts
from tests.harness.corpus import VOCAB


def texts(count: int, *, seed: int = 0, longest: int = 40) -> list[dict]:
    """Prompts of 4 to 8 ids, with completions of 6 ids to ``longest``; some have a mask."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt, length = int(rng.integers(4, 9)), int(rng.integers(6, longest + 1))
        ids = (rng.integers(VOCAB) + 7 * np.arange(prompt + length)) % VOCAB
        text = {"prompt": ids[:prompt].tolist(), "completion": ids[prompt:].tolist()}
        text["log_probs"] = (-rng.random(length) * 5).round(3).tolist()
        if number % 3 == 0:
            text["mask"] = [1] * (length - 2) + [0, 1]
        found.append(text)
    return found


def write(
    folder: Path | str,
    name: str,
    count: int,
    *,
    writer: Writer,
    seed: int = 0,
    longest: int = 40,
) -> Path:
    """One file of ``count`` texts."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rollouts(path, writer, texts(count, seed=seed, longest=longest), {"seed": seed})
    return path
