"""Tables of architectures against what Megatron's own models store: keys, shapes, objects.

results = models_of(all_flags(cases))       # a child process (``stored_keys.py``) builds them
compare(case, layout, results[name_of(case, layout)])
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.arguments import option_words
from megatron_moe_inject.convert.naming import Naming, as_hybrid, naming_of, pieces_of
from tests.harness.tiny_folders import CASES, config_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = 48
"""Of the padded vocabulary (``stored_keys.FIXED``)."""


def megatrons(case: str, layout: str) -> tuple[dict[str, Any], Naming]:
    """Options and naming of a case as a GPT or a hybrid model."""
    config = config_of(case)
    table = architecture_of(config)
    flags = dict(table.flags(config))
    naming = naming_of(flags, table.stacked_layers(config))
    if layout == "gpt":
        return flags, naming
    return as_hybrid(flags, naming, table.layer_pattern(config))


def layouts(without: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Every case in each layout that its table has.

    Args:
        without: options of a hybrid model that cannot be built.
    """
    pairs = []
    for case in CASES:
        config = config_of(case)
        table = architecture_of(config)
        flags = table.flags(config)
        for layout in table.layouts(config):
            if layout == "gpt" or not set(without) & set(flags):
                pairs.append((case, layout))
    return pairs


def name_of(case: str, layout: str) -> str:
    """Of a model that is built."""
    return f"{case} as {layout}"


def models_of(
    pairs: Iterable[tuple[str, str]],
    further: Sequence[str] = (),
    options: Sequence[str] = (),
    megatron: str | None = None,
) -> dict[str, Any]:
    """What Megatron's models of these cases store, by name.

    Args:
        further: flags behind the table's.
        options: of ``stored_keys``.
        megatron: folder of another Megatron.
    """
    flags = {
        name_of(case, layout): [*option_words(megatrons(case, layout)[0]), *further]
        for case, layout in pairs
    }
    output = run_script("stored_keys", flags, options, megatron)
    return json.loads(output.splitlines()[-1])


def run_script(
    name: str, stdin: Any, options: Sequence[str] = (), megatron: str | None = None
) -> str:
    """The output of a script of this folder that reads JSON, in a process of its own."""
    path = (megatron, str(ROOT), os.environ.get("PYTHONPATH"))
    run = subprocess.run(
        [sys.executable, "-m", f"tests.harness.{name}", *options],
        input=json.dumps(stdin),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def compare(case: str, layout: str, model: Mapping[str, Any]) -> None:
    """Every tensor of the model is one entry's, or one of each of its layers and experts, of the
    same shape; every entry is there; and every object that the model asks for is stored."""
    assert model["error"] is None
    config = config_of(case)
    _, naming = megatrons(case, layout)
    tensors = model["tensors"]
    places: dict[str, set] = {}
    objects = {"output_layer._extra_state/shard_0_1"} if layout == "hybrid" else set()
    for entry in architecture_of(config).entries(config):
        where = naming.stored(entry.slot)
        objects.update(where.extra_states())
        rows = range(ROWS if entry.padded else entry.shape[0])
        for piece, its_rows in pieces_of(entry, where):
            (key,) = set(piece.names) & set(tensors)
            shape = [*where.axes, len(rows[its_rows]), *entry.shape[1:]]
            assert tensors[key] == shape, key
            assert where.place not in places.setdefault(key, set())
            places[key].add(where.place)
            assert math.prod(where.axes) == 1 or len(where.place) == len(where.axes)
    assert set(places) == set(tensors)
    for key, filled in places.items():
        axes = len(next(iter(filled)))
        assert len(filled) == math.prod(tensors[key][:axes]), key
    assert set(model["objects"]) <= objects
