"""Verification cards of ``examples/models``: what was measured of a model, and how to repeat it.

    python -m tests.harness.cards [NAME ...]      # measure anew and write what came out

``run_here`` of a card has one entry for each of ``CHECKS``, neither more nor fewer; the tests
measure each again (``tests/training/test_cards.py``). ``not_run`` says what nobody has tried here.
"""

from __future__ import annotations

import argparse
import datetime
import filecmp
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.hf_folder import HfFolder
from tests.harness import tiny_models
from tests.harness.model_chain import LAYOUTS, STEPS, ModelChain
from tests.harness.model_scripts import MODELS, NAMES
from tests.harness.served_names import VLLM, incomplete_for_vllm, unknown_to_vllm

LARGEST = 1e-5
"""What logits may differ by in float32, as a share of the largest of them."""
ROUNDING = {"fp8": 1 / 16, "mxfp4": 1 / 4}
"""What encoding may change of a tensor, as a share of its largest value: half a step of E4M3; of
E2M1 half a step, or what is cut off above 6 where the scale is a power of two."""
_PACKAGES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Card:
    """A ``card.yaml``.

    Attributes:
        path: of the file.
        model: what people call it.
        hub: its name on the hub.
        architecture: its ``model_type``.
        command: repeats what was run here.
        date: when.
        versions: of what it was run with.
        machine: on what.
        tiny: keys of the published configuration that were made small.
        tokenizer: that the small model has.
        run_here: by check what came out.
        notes: what is to be known of the small model.
        not_run: what was not.
    """

    path: Path
    model: str
    hub: str
    architecture: str
    command: str
    date: datetime.date
    versions: dict[str, str]
    machine: str
    tiny: dict[str, Any]
    tokenizer: str
    notes: list[str]
    run_here: dict[str, Any]
    not_run: list[str]

    @classmethod
    def read(cls, name: str) -> Card:
        """The card of a folder of ``examples/models``.

        Raises:
            TypeError: a key that a card does not have, or lacks.
        """
        path = MODELS / name / "card.yaml"
        return cls(path=path, **yaml.safe_load(path.read_text()))


@dataclass(frozen=True)
class Check:
    """One thing that is measured.

    Attributes:
        measure: what comes out; raises ``AssertionError`` where something is wrong by itself.
        compare: holds it against what the card has; raises ``AssertionError``.
    """

    measure: Callable[[ModelChain], Any]
    compare: Callable[[Any, Any], None]


def parameters(name: str) -> int:
    """Numbers in a published model, those of multi-token prediction and of routers' biases too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(tiny_models.published(name)))
        config = tiny_models.config_of(Path(folder))
    table = architecture_of(config)
    table.check(config)
    return sum(math.prod(entry.shape) for entry in table.entries(config))


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest that is expected, to two digits."""
    assert logits.shape == expected.shape
    assert expected.abs().max() > 1
    return float(f"{(logits - expected).abs().max() / expected.abs().max():.1e}")


def _imported(chain: ModelChain) -> dict[str, int]:
    tensors, slices = chain.imported
    return {"tensors": tensors, "slices": slices}


def _logits(chain: ModelChain) -> dict[str, float]:
    return {layout: _difference(chain.logits(layout), chain.expected) for layout in LAYOUTS}


def _injected(chain: ModelChain) -> dict[str, Any]:
    run = chain.injected
    assert _difference(run.before, chain.expected) <= LARGEST
    assert _difference(run.after, run.before) > 1e-2
    before, after = (round(loss, 4) for loss in run.kd_losses)
    assert after < before
    return {"steps": STEPS, "kd loss": [before, after], "frozen tensors": run.frozen}


def _exported(chain: ModelChain) -> dict[str, int]:
    before, after = (HfFolder.open("--hf", path) for path in (chain.hf, chain.exported))
    assert before.names == after.names
    experts = {
        name: _changed_experts(name, before.raw(name), after.raw(name)) for name in before.names
    }
    changed = [name for name, ids in experts.items() if ids]
    told, tensors = chain.told_changes
    assert (len(changed), len(before.names)) == (told, tensors)
    others = [path.name for path in chain.hf.iterdir() if path.suffix != ".safetensors"]
    assert filecmp.cmpfiles(chain.hf, chain.exported, others, shallow=False) == (others, [], [])
    return {
        "changed": told,
        "bitwise as published": tensors - told,
        "experts": len(set().union(*experts.values())),
    }


def _changed_experts(
    name: str, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> set[tuple[str, int]]:
    """Layer and number of each expert of which a tensor holds something else now.

    Raises:
        AssertionError: something else than experts has changed.
    """
    assert before.keys() == after.keys()
    different = [key for key, stored in before.items() if not torch.equal(stored, after[key])]
    if not different:
        return set()
    layer, _, rest = name.partition(".experts.")
    assert rest, name
    number = rest.split(".")[0]
    if number.isdigit():
        return {(layer, int(number))}
    rows = [(before[key] != after[key]).flatten(1).any(1).nonzero() for key in different]
    return {(layer, int(row)) for row in torch.cat(rows).flatten()}


def _rounding(chain: ModelChain) -> dict[str, dict[str, float]] | str:
    for storage, worst in chain.encoded.items():
        assert 0 < worst["mean"] < worst["largest"] <= ROUNDING[storage]
    return chain.encoded or "none"


def _exported_logits(chain: ModelChain) -> float:
    logits = tiny_models.logits_of(chain.exported, chain.tokens)
    return _difference(logits, chain.logits_again if chain.encoded else chain.injected.after)


def _delta(chain: ModelChain) -> str:
    names = sorted(path.name for path in chain.exported.iterdir())
    assert names == sorted(path.name for path in chain.exported_delta.iterdir())
    same = filecmp.cmpfiles(chain.exported, chain.exported_delta, names, shallow=False)
    assert same == (names, [], [])
    return "the same files"


def _served_names(chain: ModelChain) -> str:
    folder = HfFolder.open("--hf", chain.exported)
    kind, names = (
        folder.config.model_type,
        [key for name in folder.names for key in folder.raw(name)],
    )
    assert unknown_to_vllm(kind, names) == []
    assert incomplete_for_vllm(kind, names) == []
    return f"all known to vLLM {VLLM}, none missing"


def _same(measured: Any, told: Any) -> None:
    assert measured == told


def _rounded_alike(measured: Any, told: Any) -> None:
    if isinstance(measured, str):
        assert measured == told
    else:
        assert measured.keys() == told.keys()
        for storage, worst in told.items():
            assert 0 < worst["mean"] < worst["largest"] <= ROUNDING[storage]


def _below(measured: Any, told: Any) -> None:
    """Differences: which of them there are, and none above what is allowed, here or in the card."""
    measured, told = (x if isinstance(x, dict) else {"": x} for x in (measured, told))
    assert measured.keys() == told.keys()
    for numbers in (measured, told):
        assert all(isinstance(n, float) and 0 <= n <= LARGEST for n in numbers.values()), numbers


def _alike(measured: dict[str, Any], told: dict[str, Any]) -> None:
    """Losses within a thousandth, which another machine's arithmetic may make of them."""
    assert measured.keys() == told.keys()
    for name, value in measured.items():
        if name == "kd loss":
            pairs = zip(value, told[name], strict=True)
            assert all(math.isclose(ours, theirs, rel_tol=1e-3) for ours, theirs in pairs)
        else:
            assert value == told[name], name


CHECKS: dict[str, Check] = {
    "parameters": Check(lambda chain: parameters(chain.name), _same),
    "imported": Check(_imported, _same),
    "logits": Check(_logits, _below),
    "injected": Check(_injected, _alike),
    "exported": Check(_exported, _same),
    "rounding of what changed": Check(_rounding, _rounded_alike),
    "exported logits": Check(_exported_logits, _below),
    "exported from a delta": Check(_delta, _same),
    "names": Check(_served_names, _same),
}
"""By the word of a card."""


def measured(card: Card, folder: Path) -> dict[str, Any]:
    """What comes out of all checks now."""
    chain = ModelChain(card.path.parent.name, card.tiny, folder)
    return {name: check.measure(chain) for name, check in CHECKS.items()}


def write(card: Card, run_here: dict[str, Any]) -> None:
    """Write a card anew with what came out, today and with the versions that are installed."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    content = vars(card) | {
        "date": datetime.date.today(),
        "versions": {"python": platform.python_version(), **versions},
        "run_here": run_here,
    }
    del content["path"]
    text = yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True)
    card.path.write_text(_HEAD + text)


_HEAD = """# What was measured of this model, small and random, by its own scripts (../README.md).
# python -m tests.harness.cards writes run_here, date and versions.
"""


def main(argv: Sequence[str]) -> int:
    """Measure and write; see the module."""
    parser = argparse.ArgumentParser(description="Measure the cards of examples/models anew.")
    parser.add_argument("names", metavar="NAME", nargs="*", help="default all of them")
    for name in parser.parse_args(argv).names or NAMES:
        card = Card.read(name)
        with tempfile.TemporaryDirectory() as folder:
            write(card, measured(card, Path(folder)))
        print(f"{card.path}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
