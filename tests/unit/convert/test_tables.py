"""Each architecture's table: a folder's tensors taken once each, Megatron's own keys and shapes.

The folders are tiny and random (``tests/harness/tiny_folders.py``). The models are Megatron's,
built from the table's flags by Megatron's own parser and builder on the CPU lane
(``tests/harness/stored_keys.py``).
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.naming import as_hybrid, naming_of
from tests.harness.tiny_folders import CASES, config_of, save_folder

ROOT = Path(__file__).resolve().parents[3]
OTHER = os.environ.get("MEGATRON_OTHER")
NEEDS_TE = ("--moe-latent-size", "--multi-latent-attention")
"""Options of parts that a hybrid model has with Transformer Engine alone."""


def command_line(flags):
    words = []
    for name, value in flags.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [name, *map(str, values)]
    return words


def megatrons(case, layout):
    """Options and naming of a case as a GPT or a hybrid model."""
    config = config_of(case)
    table = architecture_of(config)
    flags = table.flags(config)
    naming = naming_of(flags, table.stacked_layers(config))
    if layout == "gpt":
        return flags, naming
    return as_hybrid(flags, naming, table.layer_pattern(config))


def is_built(case, layout):
    config = config_of(case)
    table = architecture_of(config)
    flags = table.flags(config)
    spec = flags.get("--spec")
    if layout not in table.layouts(config) or (spec and find_spec(spec[0]) is None):
        return False
    return layout == "gpt" or not any(option in flags for option in NEEDS_TE)


BUILT = [(case, layout) for case in CASES for layout in ("gpt", "hybrid") if is_built(case, layout)]


def all_flags():
    return {
        f"{case} as {layout}": command_line(megatrons(case, layout)[0]) for case, layout in BUILT
    }


def stored_by(flags_by_case, megatron=None):
    """What Megatron's models of these flags store."""
    path = os.pathsep.join(filter(None, [megatron, str(ROOT)]))
    run = subprocess.run(
        [sys.executable, "-m", "tests.harness.stored_keys"],
        input=json.dumps(flags_by_case),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stored():
    return stored_by(all_flags())


@pytest.fixture(scope="module")
def stored_by_other():
    return stored_by(all_flags(), OTHER)


class TestFolder:
    @pytest.mark.parametrize("case", CASES)
    def test_every_tensor_is_taken_once_and_comes_back_bitwise(self, case, tmp_path):
        import transformers

        save_folder(case, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        table = architecture_of(config)
        config = table.for_folder(config, tensors)
        table.check(config)
        taken = {}
        for entry in table.entries(config):
            parts = [tensors[part.name][part.index] for part in entry.parts]
            whole = entry.form.join(parts)
            assert tuple(whole.shape) == entry.shape, entry
            assert sum(rows for _, rows in entry.pieces) in (0, entry.shape[0])
            again = entry.form.split(whole)
            for part, tensor in zip(entry.parts, again, strict=True):
                assert torch.equal(tensor, tensors[part.name][part.index]), part
                assert taken.setdefault(part.name, {}).setdefault(part.index, entry) is entry
        for name, indices in taken.items():
            assert set(indices) in ({()}, {(e,) for e in range(tensors[name].shape[0])}), name
        copies = table.copies(config)
        assert set(tensors) - set(taken) <= set(copies)
        assert set(taken) <= set(tensors)
        for name in set(tensors) & set(copies):
            assert torch.equal(tensors[name], tensors[copies[name]])

    @pytest.mark.parametrize("case", CASES)
    def test_no_slot_is_filled_twice(self, case):
        config = config_of(case)
        slots = [entry.slot for entry in architecture_of(config).entries(config)]
        assert len(slots) == len(set(slots))

    def test_a_folder_without_its_layers_of_prediction_is_one_without_prediction(self, tmp_path):
        case = "deepseek_v3, prediction"
        save_folder(case, tmp_path)
        names = set(load_file(tmp_path / "model.safetensors"))
        config = config_of(case)
        table = architecture_of(config)
        assert table.for_folder(config, names).num_nextn_predict_layers == 1
        left = {name for name in names if not name.startswith("model.layers.2.")}
        assert left < names
        without = table.for_folder(config, left)
        assert config.num_nextn_predict_layers == 1
        assert "--mtp-num-layers" not in table.flags(without)
        assert {p.name for e in table.entries(without) for p in e.parts} == left


class TestMegatron:
    @pytest.mark.parametrize(("case", "layout"), BUILT)
    def test_keys_and_shapes_are_those_that_the_model_of_the_flags_stores(
        self, case, layout, stored
    ):
        self.compare(case, layout, stored)

    @pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
    @pytest.mark.parametrize(("case", "layout"), BUILT)
    def test_the_other_megatron_has_them_too_or_refuses_the_flags(
        self, case, layout, stored_by_other
    ):
        error = stored_by_other[f"{case} as {layout}"]["error"]
        flags, _ = megatrons(case, layout)
        if flags["--position-embedding-type"] == "yarn":
            assert error == "SystemExit: 2"
        elif "--spec" in flags:
            assert error.startswith("ValueError: --spec")
        else:
            self.compare(case, layout, stored_by_other)

    @staticmethod
    def compare(case, layout, stored):
        result = stored[f"{case} as {layout}"]
        assert result["error"] is None
        config = config_of(case)
        _, naming = megatrons(case, layout)
        tensors = dict(result["tensors"])
        filled = {}
        for entry in architecture_of(config).entries(config):
            stored = naming.stored(entry.slot)
            whole = 48 if entry.padded else entry.shape[0]
            for piece, rows in entry.pieces or (("", whole),):
                keys = {f"{name}.{piece}" if piece else name for name in stored.names}
                (key,) = keys & set(tensors)
                assert tensors[key] == [*stored.axes, rows, *entry.shape[1:]], key
                assert stored.place not in filled.setdefault(key, {})
                filled[key][stored.place] = stored.axes
        assert set(filled) == set(tensors)
        for key, places in filled.items():
            assert len(places) == math.prod(next(iter(places.values()))), key
