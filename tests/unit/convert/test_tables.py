"""Each architecture's table: a folder's tensors taken once each, Megatron's own keys and shapes.

The folders are tiny and random (``tests/harness/tiny_folders.py``). The models are Megatron's,
built from the table's flags by Megatron's own parser and builder on the CPU lane
(``tests/harness/stored_keys.py``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.convert.architectures import architecture_of
from tests.harness.tiny_folders import CASES, config_of, save_folder

ROOT = Path(__file__).resolve().parents[3]
OTHER = os.environ.get("MEGATRON_OTHER")
NORMS = (  # of local layers, as they are stored but in multi-latent attention
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)
GPT_ALONE = ("--num-layers", "--moe-layer-freq", "--mtp-num-layers")
LAYOUTS = [
    (case, layout)
    for case in CASES
    for layout in architecture_of(config_of(case)).layouts(config_of(case))
]


def command_line(flags):
    words = []
    for name, value in flags.items():
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [name, *map(str, values)]
    return words


def flags_of(table, config, layout):
    flags = dict(table.flags(config))
    if layout == "hybrid" and "gpt" in table.layouts(config):
        flags = {name: value for name, value in flags.items() if name not in GPT_ALONE}
        flags["--hybrid-layer-pattern"] = table.layer_pattern(config)
    return flags


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


def all_flags():
    return {
        f"{case} as {layout}": command_line(
            flags_of(architecture_of(config_of(case)), config_of(case), layout)
        )
        for case, layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def stored():
    return stored_by(all_flags())


@pytest.fixture(scope="module")
def stored_by_other():
    return stored_by(all_flags(), OTHER)


class StoredKeys:
    """Keys and shapes of a table's entries, as Megatron's local layers store them."""

    def __init__(self, table, config, layout):
        self.hybrid = layout == "hybrid"
        self.blocks = "gpt" in table.layouts(config)
        self.stacked = config.num_hidden_layers if table.stacked_layers(config) else None
        self.latent = "+" in table.layer_pattern(config)
        entries = list(table.entries(config))
        self.experts = 1 + max((e.slot.expert or 0 for e in entries), default=0)
        self.shapes = {}
        for entry in entries:
            key, axes = self.place(entry.slot)
            pieces = {f"{key}.{name}": rows for name, rows in entry.pieces}
            for name, rows in (pieces or {key: entry.shape[0]}).items():
                self.shapes[name] = [*axes, rows, *entry.shape[1:]]

    def place(self, slot):
        name, axes = slot.name, []
        if self.hybrid:
            name = name.replace("decoder.final_layernorm", "decoder.final_norm")
            name = name.replace("transformer_layer.", self.inner_layer(name))
        attention = name.startswith(("self_attention.", "input_layernorm."))
        if not self.latent:
            for module, stored_as in NORMS:
                name = name.replace(module, stored_as)
        if slot.layer is not None:
            layer = slot.layer
            if self.hybrid and self.blocks:
                layer = 2 * layer + (not attention)
            if not self.hybrid and self.stacked is not None:
                name, axes = f"decoder.layers.{name}", [self.stacked]
            else:
                name = f"decoder.layers.{layer}.{name}"
        return name, [*axes, self.experts] if slot.expert is not None else axes

    @staticmethod
    def inner_layer(name):
        attention = ("self_attention." in name) or ("input_layernorm." in name)
        return f"mtp_model_layer.layers.{0 if attention else 1}."


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
    @pytest.mark.parametrize(("case", "layout"), LAYOUTS)
    def test_keys_and_shapes_are_those_that_the_model_of_the_flags_stores(
        self, case, layout, stored
    ):
        self.compare(case, layout, stored)

    @pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
    @pytest.mark.parametrize(("case", "layout"), LAYOUTS)
    def test_the_other_megatron_has_them_too_or_refuses_the_flags(
        self, case, layout, stored_by_other
    ):
        if case == "gpt_oss":
            error = stored_by_other[f"{case} as {layout}"]["error"]
            assert error == "SystemExit: 2"
        else:
            self.compare(case, layout, stored_by_other)

    @staticmethod
    def compare(case, layout, stored):
        result = stored[f"{case} as {layout}"]
        assert result["error"] is None
        config = config_of(case)
        table = architecture_of(config)
        shapes = StoredKeys(table, config, layout).shapes
        shapes = {
            key: [48 if size == config.vocab_size else size for size in shape]
            for key, shape in shapes.items()
        }
        assert shapes == result["tensors"]
