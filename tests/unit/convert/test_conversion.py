"""A folder as Megatron's model and back, without Megatron's model: values, options, mistakes."""

import filecmp
import json
import multiprocessing
import re
import resource
import shlex
import shutil
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.convert import command, importing
from megatron_moe_inject.convert.architectures.table import Slot
from megatron_moe_inject.convert.exporting import export_folder
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.convert.importing import import_folder
from megatron_moe_inject.convert.trained import TrainedCheckpoint
from megatron_moe_inject.experts.delta.delta import apply_delta, export_delta
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint
from megatron_moe_inject.host.torch_dist_copy import replaced, rewritten_copy
from tests.harness.checkpoints import whole
from tests.harness.hf_folder import FP8, in_fp8, write_file
from tests.harness.tiny_folders import CASES, config_of, save_folder

MODEL = "model.safetensors"
QWEN = "qwen3_moe"
FC1_OF_LAYER = "mlp.experts.experts.linear_fc1.weight"
FC1 = f"decoder.layers.{FC1_OF_LAYER}"
GATES = [f"model.layers.{i}.mlp.experts.{{}}.gate_proj.weight" for i in range(2)]
ROUND_TRIPS = [
    (case, layout)
    for case in CASES
    for layout in (("gpt", "hybrid") if case.startswith(("qwen", "deepseek_v3")) else (None,))
]


def bring_in(folder: Path, output: Path, *extra: object) -> Path:
    words = ["import-hf", str(folder), "--output", str(output), *map(str, extra)]
    assert main(words) == 0
    return output


def take_out(hf: Path, output: Path, *source: object) -> Path:
    words = ["export-hf", *map(str, source), "--hf", str(hf), "--output", str(output)]
    assert main(words) == 0
    return output


def opened(folder: Path) -> TorchDistCheckpoint:
    return CheckpointPlace("CKPT", folder).open()


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if sorted(path.name for path in other.iterdir()) != names:
        return False
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def trained(checkpoint: Path, output: Path, changes) -> Path:
    """A checkpoint with some slices replaced: ``{name: {place: function of the old}}``."""
    before = opened(checkpoint)

    def new(name, place, change):
        return lambda: change(whole(before, name)[place])

    by_tensor = {
        name: replaced({place: new(name, place, change) for place, change in places.items()})
        for name, places in changes.items()
    }
    rewritten_copy(before, output, by_tensor, lambda items, total: items)
    return output


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "qwen"
    save_folder(QWEN, folder)
    write_tokenizer(folder, "abcdefgh")
    return folder


def write_tokenizer(folder: Path, tokens, **added: int) -> None:
    """A tokenizer of these tokens, numbered from 0, and of added ones."""
    content = {
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}},
        "added_tokens": [{"content": token, "id": number} for token, number in added.items()],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def checkpoint(hf):
    return bring_in(hf, hf.parent / "checkpoint")


class TestRoundTrip:
    @pytest.mark.parametrize(("case", "layout"), ROUND_TRIPS)
    def test_every_architecture_comes_back_bit_for_bit(self, case, layout, tmp_path):
        save_folder(case, tmp_path / "hf")
        words = () if layout is None else ("--layout", layout)
        checkpoint = bring_in(tmp_path / "hf", tmp_path / "checkpoint", *words)
        assert same_files(tmp_path / "hf", take_out(tmp_path / "hf", tmp_path / "out", checkpoint))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("word", ["bf16", "fp32", "folder"])
    def test_in_any_precision(self, tmp_path, dtype, word):
        save_folder("qwen3_moe, one dense layer", tmp_path / "hf")
        tensors = load_file(tmp_path / "hf" / MODEL)
        write_file(tmp_path / "hf" / MODEL, {n: t.to(dtype) for n, t in tensors.items()})
        checkpoint = bring_in(tmp_path / "hf", tmp_path / "checkpoint", "--dtype", word)
        asked = {"bf16": torch.bfloat16, "fp32": torch.float32, "folder": dtype}[word]
        stored = opened(checkpoint)
        assert {t.properties.dtype for t in stored.tensors.values()} == {asked}
        assert stored.args.params_dtype == asked
        exported = take_out(tmp_path / "hf", tmp_path / "out", checkpoint)
        assert same_files(tmp_path / "hf", exported)

    def test_the_vocabulary_is_padded_with_zeros(self, hf, tmp_path):
        checkpoint = bring_in(hf, tmp_path / "checkpoint", "--vocab-multiple", 50)
        table = whole(opened(checkpoint), "embedding.word_embeddings.weight")
        rows = config_of(QWEN).vocab_size
        assert table.shape[0] == 50
        assert table[:rows].any()
        assert not table[rows:].any()

    @pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
    def test_what_the_folder_keeps_once_must_not_have_been_trained(self, name, tmp_path, capsys):
        save_folder("gemma", tmp_path / "hf")
        checkpoint = bring_in(tmp_path / "hf", tmp_path / "checkpoint")
        other = trained(checkpoint, tmp_path / "trained", {name: {(3,): lambda old: old + 1}})
        words = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]
        assert main(["export-hf", str(other), *words]) == 2
        error = capsys.readouterr().err
        assert f"training changed {name} alone; train neither embedding" in error
        assert not (tmp_path / "out").exists()


class TestOptions:
    def test_the_shell_reads_them(self, hf, checkpoint):
        script = 'source flags.sh; printf "%q " "${MODEL[@]}"; echo; printf "%q " "${TOKENIZER[@]}"'
        done = subprocess.run(
            ["bash", "-c", script], cwd=checkpoint, capture_output=True, text=True, check=True
        )
        model, tokenizer = map(shlex.split, done.stdout.splitlines())
        assert model == (checkpoint / "flags.txt").read_text().split()
        assert model[model.index("--padded-vocab-size") + 1] == "128"
        assert tokenizer == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
                             str(hf)]  # fmt: skip

    def test_the_checkpoint_carries_them(self, hf, checkpoint, tmp_path):
        args = opened(checkpoint).args
        assert isinstance(args, Namespace)
        config = config_of(QWEN)
        assert args.num_layers == config.num_hidden_layers
        assert args.num_experts == 4
        assert args.swiglu
        assert not args.add_bias_linear
        assert (args.padded_vocab_size, args.tokenizer_model) == (128, str(hf))
        hybrid = opened(bring_in(hf, tmp_path / "hybrid", "--layout", "hybrid")).args
        assert hybrid.num_layers == LayerPattern(hybrid.hybrid_layer_pattern).num_layers == 4


class TestChanges:
    def changed(self, one: Path, other: Path) -> set[str]:
        before, after = load_file(one / MODEL), load_file(other / MODEL)
        assert before.keys() == after.keys()
        return {n for n in before if not torch.equal(before[n], after[n])}

    def test_half_of_a_joined_tensor(self, hf, checkpoint, tmp_path, capsys):
        width = config_of(QWEN).moe_intermediate_size

        def gate(value):
            return torch.cat([value[:width] + 1, value[width:]])

        other = trained(checkpoint, tmp_path / "trained", {FC1: {(1, 2): gate}})
        exported = take_out(hf, tmp_path / "out", other)
        assert self.changed(hf, exported) == {GATES[1].format(2)}
        new, old = (load_file(f / MODEL)[GATES[1].format(2)] for f in (exported, hf))
        assert torch.equal(new, old + 1)
        report = capsys.readouterr().out
        assert "model.layers.*.mlp.experts.*.gate_proj.weight" in report
        assert "1 of 45 tensors changed" in report

    def test_rounding_to_the_folder_s_precision_is_told(self, hf, tmp_path, capsys):
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
        tensors = {n: t.bfloat16() for n, t in load_file(hf / MODEL).items()}
        write_file(folder / MODEL, tensors)
        checkpoint = bring_in(folder, tmp_path / "checkpoint", "--dtype", "fp32")
        change = {FC1: {(0, 0): lambda value: value * 1.0009765625}}
        other = trained(checkpoint, tmp_path / "trained", change)
        capsys.readouterr()
        take_out(folder, tmp_path / "out", other)
        rows = [row.split() for row in capsys.readouterr().out.splitlines() if "_proj" in row]
        assert {row[0].split(".")[-2] for row in rows} == {"gate_proj", "up_proj"}
        for *_, largest, mean in rows:
            assert 0 < float(mean) < 2**-8
            assert 0 < float(largest) < 2**-8

    def test_a_delta_gives_what_the_checkpoint_gives(self, hf, checkpoint, tmp_path):
        changes = {
            FC1: {(1, 2): lambda value: value + 1},
            "embedding.word_embeddings.weight": {(): lambda value: value * 2},
            "decoder.layers.mlp.linear_fc1.layer_norm_weight": {(0,): lambda value: value - 1},
            "decoder.layers.pre_mlp_layernorm.weight": {(0,): lambda value: value - 1},
        }
        other = trained(checkpoint, tmp_path / "trained", changes)
        places = CheckpointPlace("--base", checkpoint), CheckpointPlace("--trained", other)
        export_delta(*places, tmp_path / "delta")
        exported = take_out(hf, tmp_path / "out", other)
        assert len(self.changed(hf, exported)) == 4
        assert same_files(exported, take_out(hf, tmp_path / "own", "--delta", tmp_path / "delta"))
        apply_delta(places[0], tmp_path / "delta", tmp_path / "applied")
        again = take_out(hf, tmp_path / "again", tmp_path / "applied")
        assert same_files(exported, again)

    @pytest.mark.parametrize("imported", [torch.bfloat16, torch.float32])
    def test_a_run_in_float32_may_begin_from_either_precision(self, tmp_path, imported):
        """Scales that are no powers of two: what codes mean has more digits than bfloat16."""
        save_in_fp8(tmp_path / "hf")
        model = FolderModel.of(HfFolder.open("--hf", tmp_path / "hf"))
        (changed,) = (e for e in model.entries if e.slot == Slot(FC1_OF_LAYER, 1, 2))

        class Run:
            remarks = ()

            def slice(self, entry):
                value = model.joined(entry, imported).float()
                return value + 1 if entry == changed else value

        export_folder(model, Run(), tmp_path / "out", progress=lambda items, total: items)
        names = {part.name for part in changed.parts}
        found = self.changed(tmp_path / "hf", tmp_path / "out")
        assert {name.removesuffix("_scale_inv") for name in found} == names

    def test_codes_of_what_did_not_change_go_back_as_they_were(self, tmp_path):
        folder = tmp_path / "hf"
        save_in_fp8(folder)
        checkpoint = bring_in(folder, tmp_path / "checkpoint")
        assert same_files(folder, take_out(folder, tmp_path / "out", checkpoint))
        change = {FC1: {(1, 2): lambda value: value + 1}}
        other = trained(checkpoint, tmp_path / "trained", change)
        exported = take_out(folder, tmp_path / "new", other)
        names = {GATES[1].format(2), GATES[1].format(2).replace("gate", "up")}
        changed = self.changed(folder, exported)
        assert {name.removesuffix("_scale_inv") for name in changed} == names
        plain = take_out(folder, tmp_path / "plain", other, "--quantized", "drop")
        assert {t.dtype for t in load_file(plain / MODEL).values()} == {torch.bfloat16}
        assert "quantization_config" not in json.loads((plain / "config.json").read_text())


def save_in_fp8(folder: Path) -> None:
    """A model whose experts are in FP8 by blocks."""
    save_folder(QWEN, folder)
    tensors = {}
    for name, value in load_file(folder / MODEL).items():
        expert = "mlp.experts." in name
        tensors |= in_fp8(name, value) if expert else {name: value.bfloat16()}
    write_file(folder / MODEL, tensors)
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": FP8, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


class TestCheckpoints:
    """Checkpoints that a folder is exported from."""

    def test_rows_and_layers_that_training_left_out_are_the_folder_s(self, tmp_path, capsys):
        folder = tmp_path / "hf"
        save_folder("deepseek_v3, prediction", folder)
        checkpoint = bring_in(folder, tmp_path / "checkpoint", "--vocab-multiple", 1)
        before = opened(checkpoint)
        for name in [n for n in before.metadata.state_dict_metadata if n.startswith("mtp.")]:
            del before.metadata.state_dict_metadata[name]
        kept = before.metadata.state_dict_metadata
        before.metadata.storage_data = {
            index: info for index, info in before.metadata.storage_data.items() if index.fqn in kept
        }
        rewritten_copy(before, tmp_path / "without", {}, lambda items, total: items)
        capsys.readouterr()
        assert same_files(folder, take_out(folder, tmp_path / "out", tmp_path / "without"))
        assert "no layers of multi-token prediction" in capsys.readouterr().out

    def test_another_model_is_refused_by_name(self, hf, checkpoint, tmp_path, capsys):
        other = tmp_path / "other"
        save_folder("qwen3_moe, one dense layer", other)
        capsys.readouterr()
        words = ["export-hf", str(checkpoint), "--hf", str(other), "--output", str(tmp_path / "o")]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"CKPT {checkpoint} is not the qwen3_moe model of {other}" in error
        assert "decoder.layers" in error
        assert not (tmp_path / "o").exists()

    def test_a_delta_of_another_base_is_refused(self, hf, checkpoint, tmp_path, capsys):
        other = trained(checkpoint, tmp_path / "one", {FC1: {(1, 2): lambda value: value + 1}})
        more = trained(checkpoint, tmp_path / "two", {FC1: {(1, 2): lambda value: value + 2}})
        places = CheckpointPlace("--base", other), CheckpointPlace("--trained", more)
        export_delta(*places, tmp_path / "delta")
        words = ["--delta", str(tmp_path / "delta"), "--output", str(tmp_path / "out")]
        assert main(["export-hf", *words, "--hf", str(hf)]) == 2
        error = capsys.readouterr().err
        assert f"was not made from an import of {hf}" in error
        assert f"other values of {FC1} [1, 2]" in error
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("source", [(), ("checkpoint", "--delta", "delta")])
    def test_one_source(self, source, hf, tmp_path, capsys):
        words = ["export-hf", *source, "--hf", str(hf), "--output", str(tmp_path / "out")]
        assert main(words) == 2
        assert "name either a checkpoint or --delta" in capsys.readouterr().err


def without(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def with_more(tensors):
    return {**tensors, "model.layers.0.adapter.weight": torch.ones(2)}


FOLDERS = {
    "sizes that disagree": (
        {"moe_intermediate_size": 40},
        None,
        "has model.layers.0.mlp.experts.0.gate_proj.weight as [24, 32], where the sizes of its "
        "config ask for [40, 32]",
    ),
    "fewer layers": (
        {"num_hidden_layers": 1},
        None,
        "holds 21 tensors that no part of a qwen3_moe model of its config takes: model.layers.1.",
    ),
    "more layers": (
        {"num_hidden_layers": 3},
        None,
        "lacks 21 tensors of a qwen3_moe model of its config: model.layers.2.",
    ),
    "a tensor missing": (
        {},
        without("model.layers.1.self_attn.q_norm.weight"),
        "lacks 1 tensors of a qwen3_moe model of its config: "
        "model.layers.1.self_attn.q_norm.weight",
    ),
    "a tensor left over": (
        {},
        with_more,
        "holds 1 tensors that no part of a qwen3_moe model of its config takes: "
        "model.layers.0.adapter.weight",
    ),
    "another architecture": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        None,
        "config.json: model_type: 'gpt2'",
    ),
    "a tied head of other values": (
        {"tie_word_embeddings": True},
        None,
        "holds other values of lm_head.weight than of model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_its_config_s_is_one_error(name, hf, tmp_path, capsys):
    keys, change, message = FOLDERS[name]
    folder = tmp_path / "hf"
    folder.mkdir()
    config = json.loads((hf / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    tensors = load_file(hf / MODEL)
    save_file(tensors if change is None else change(tensors), folder / MODEL, {"format": "pt"})
    assert main(["import-hf", str(folder), "--output", str(tmp_path / "checkpoint")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_buffer_that_says_nothing_is_left_as_it_is(hf, tmp_path, capsys):
    folder, name = tmp_path / "hf", "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder.mkdir()
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    save_file({**load_file(hf / MODEL), name: torch.ones(8)}, folder / MODEL, {"format": "pt"})
    checkpoint = bring_in(folder, tmp_path / "checkpoint")
    assert f"not taken, as they follow from others: {name}" in capsys.readouterr().out
    assert same_files(folder, take_out(folder, tmp_path / "out", checkpoint))


def test_a_tokenizer_with_more_ids_than_rows_is_another_s(hf, tmp_path, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(hf, folder)
    rows = config_of(QWEN).vocab_size
    write_tokenizer(folder, map(str, range(rows)), image=rows + 1)
    bring_in(folder, tmp_path / "checkpoint")
    write_tokenizer(folder, map(str, range(rows + 2)))
    assert main(["import-hf", str(folder), "--output", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert f"has {rows} rows of vocabulary for a tokenizer of {rows + 2} ids" in error


@pytest.mark.parametrize("layout", ["gpt", "hybrid"])
def test_an_architecture_that_has_no_such_layout(layout, tmp_path, capsys):
    save_folder({"gpt": "nemotron_h", "hybrid": "gpt_oss"}[layout], tmp_path / "hf")
    words = ["--output", str(tmp_path / "out"), "--layout", layout]
    assert main(["import-hf", str(tmp_path / "hf"), *words]) == 2
    assert f"--layout: '{layout}'" in capsys.readouterr().err


def test_a_disk_without_room_is_known_at_once(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    output = tmp_path / "checkpoint"
    assert main(["import-hf", str(hf), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"--output: '{output}' needs [\d.]+ KiB, of which 10 B are free", error)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(hf, checkpoint, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ways = (
        ["import-hf", str(hf), "--output", str(tmp_path / "in")],
        ["export-hf", str(checkpoint), "--hf", str(hf), "--output", str(tmp_path / "out")],
    )
    for words in ways:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            assert main(words) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "cannot be written (File too large)" in error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_killed_command_leaves_nothing_that_looks_whole(way, hf, checkpoint, tmp_path):
    output, halfway = tmp_path / "output", tmp_path / "halfway"

    def stop_halfway(items, total):
        for number, item in enumerate(items):
            if number == total // 2:
                halfway.touch()
                time.sleep(600)
            yield item

    def begin():
        folder = HfFolder.open("--hf", hf)
        if way == "import":
            import_folder(folder, output, progress=stop_halfway)
        else:
            model = FolderModel.of(folder)
            values = TrainedCheckpoint(opened(checkpoint), model)
            export_folder(model, values, output, progress=stop_halfway)

    process = multiprocessing.get_context("fork").Process(target=begin)
    process.start()
    deadline = time.monotonic() + 60
    while not halfway.exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    halfway.unlink()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].endswith(".part")
    if way == "import":
        bring_in(hf, output)
    else:
        assert same_files(hf, take_out(hf, output, checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_outputs_are_never_overwritten(hf, checkpoint, capsys):
    for words in (["import-hf", str(hf)], ["export-hf", str(checkpoint), "--hf", str(hf)]):
        assert main([*words, "--output", str(hf)]) == 2
        assert f"--output: '{hf}' is there already" in capsys.readouterr().err


def test_the_command_offers_what_there_is():
    assert tuple(importing.DTYPES) == command._DTYPES
    assert command._LAYOUTS == importing.LAYOUTS
