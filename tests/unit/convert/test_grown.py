"""A folder with more experts than it had: the logits of Megatron's model, and back again."""

import filecmp
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_moe_inject.cli import main
from megatron_moe_inject.convert.grown_folder import CARD
from megatron_moe_inject.convert.hf_folder import HfFolder
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.new_experts import STORED, card_in
from megatron_moe_inject.host.torch_dist_copy import replaced, rewritten_copy
from tests.harness.checkpoints import whole
from tests.harness.hf_folder import FP8, MXFP4, in_fp8, in_mxfp4, write_file
from tests.harness.stored_adapters import entry, write_adapters
from tests.harness.table_keys import ROWS, run_script
from tests.harness.tiny_folders import config_of, save_folder

MODEL = "model.safetensors"
CASES = {
    "qwen3_moe": (None, "hybrid"),
    "mixtral": (None,),
    "deepseek_v3, prediction": (None,),
    "deepseek_v3, experts alone": (None,),
    "gpt_oss": (None,),
    "nemotron_h": (None,),
    "qwen2_moe": (None,),
    "olmoe": (None,),
    "deepseek_v2": (None,),
}
"""Each with its layouts; a hybrid model with latent attention needs Transformer Engine."""
GROUPED = ("--per-layer", "4", "--donors", "0,2,5,6")
TWO = ("--per-layer", "2", "--donors", "3,1")
OPEN = ("--rows", "donor", "--noise", "0.5", "--unmeasured")
PAIRS = [(case, layout) for case, layouts in CASES.items() for layout in layouts]
CLOSED = [(case, None) for case in CASES if case.startswith(("deepseek_v3", "gpt", "nemotron"))]


def do(*words):
    assert main([str(word) for word in words]) == 0


def opened(folder):
    return CheckpointPlace("CKPT", folder).open()


def transformers_logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(tokens).logits


def grow(case, checkpoint, output, *options):
    words = GROUPED if case.startswith("deepseek_v3") else TWO
    do("add-experts", checkpoint, "--output", output, *words, *options)
    return output


def stirred(checkpoint, output):
    """With other rows of new experts, as after training, so that none scores as its donor."""
    before = opened(checkpoint)
    new = card_in(before.args, "here").ids()
    changes = {}
    for name in before.tensors:
        if name.endswith("router.weight"):
            rows = whole(before, name)
            noise = torch.randn(rows[..., new, :].shape)
            rows[..., new, :] += 0.5 * rows.std() * noise
            stacked = name.startswith("decoder.layers.mlp") and rows.dim() == 3
            parts = {(i,): row for i, row in enumerate(rows)} if stacked else {(): rows}
            changes[name] = replaced({at: lambda part=part: part for at, part in parts.items()})
    rewritten_copy(before, output, changes, lambda items, total: items)
    return output


class Chain:
    """A folder, its import, that with new experts in use, and its export."""

    def __init__(self, root, case, layout):
        self.root, self.case = root, case
        self.hf, self.checkpoint = root / "hf", root / "checkpoint"
        self.grown, self.exported = root / "grown", root / "exported"
        save_folder(case, self.hf)
        words = ("--layout", layout) if layout else ()
        self.tokens = torch.randint(config_of(case).vocab_size, (2, 32))
        torch.save(self.tokens, root / "tokens.pt")
        words = (*words, "--vocab-multiple", ROWS)
        do("import-hf", self.hf, "--output", self.checkpoint, *words)
        self.import_words = words
        stirred(grow(case, self.checkpoint, root / "start", *OPEN), self.grown)
        do("export-hf", self.grown, "--hf", self.hf, "--output", self.exported)

    def megatron(self):
        """What ``checkpoint_logits`` is to do."""
        flags = (self.checkpoint / "flags.txt").read_text().split()
        experts = str(opened(self.grown).args.num_experts)
        files = (self.grown, self.root / "tokens.pt", self.root / "megatron.pt")
        return [[*flags, "--num-experts", experts], *map(str, files)]


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    chains = {pair: Chain(tmp_path_factory.mktemp("chain"), *pair) for pair in PAIRS}
    run_script("checkpoint_logits", [chain.megatron() for chain in chains.values()])
    return chains


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_transformers_has_megatrons_logits(chains, case, layout):
    chain = chains[case, layout]
    ours = torch.load(chain.root / "megatron.pt")[..., : config_of(case).vocab_size]
    theirs = transformers_logits(chain.exported, chain.tokens)
    assert (ours - theirs).abs().max() < 2e-5
    before = transformers_logits(chain.hf, chain.tokens)
    assert (before - theirs).abs().max() > 0.01, "new experts are in use"


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_imported_again_it_is_the_checkpoint_with_its_card(chains, case, layout, tmp_path):
    chain = chains[case, layout]
    words = chain.import_words
    do("import-hf", chain.exported, "--output", tmp_path / "again", *words)
    one, other = opened(chain.grown), opened(tmp_path / "again")
    names = one.metadata.state_dict_metadata.keys()
    assert names == other.metadata.state_dict_metadata.keys()
    for name in one.tensors:
        assert torch.equal(whole(one, name), whole(other, name)), name
    assert vars(one.args) == vars(other.args)
    do("remove-experts", tmp_path / "again", "--output", tmp_path / "without")
    do("export-hf", tmp_path / "without", "--hf", chain.hf, "--output", tmp_path / "out")
    files = [path.name for path in chain.hf.iterdir()]
    assert filecmp.cmpfiles(chain.hf, tmp_path / "out", files, shallow=False)[0] == files


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_only_the_number_of_experts_is_another(chains, case, layout):
    chain = chains[case, layout]
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (chain.hf, chain.exported)
    )
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    (key,) = changed
    assert key.endswith("experts")
    assert (before[key], after[key]) in ((4, 6), (8, 12))


@pytest.mark.parametrize(("case", "layout"), CLOSED)
def test_closed_experts_leave_the_folder_s_logits(chains, case, layout, tmp_path):
    """In the groups of DeepSeek-V3 as well, whose scores are of their best two."""
    chain = chains[case, layout]
    grow(case, chain.checkpoint, tmp_path / "grown")
    do("export-hf", tmp_path / "grown", "--hf", chain.hf, "--output", tmp_path / "out")
    before, after = (transformers_logits(f, chain.tokens) for f in (chain.hf, tmp_path / "out"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_other_layouts_of_the_import_have_the_card_in_their_numbers(chains, tmp_path):
    chain = chains["qwen3_moe", None]
    do("import-hf", chain.exported, "--output", tmp_path / "hybrid", "--layout", "hybrid")
    card = card_in(opened(tmp_path / "hybrid").args, "here")
    assert (card.layers, sorted(card.new)) == ("*E*E", [1, 3])
    do("remove-experts", tmp_path / "hybrid", "--output", tmp_path / "without")
    do("export-hf", tmp_path / "without", "--hf", chain.hf, "--output", tmp_path / "out")
    assert filecmp.cmp(chain.hf / MODEL, tmp_path / "out" / MODEL, shallow=False)


def test_trained_further_it_is_exported_to_the_grown_folder_too(chains, tmp_path):
    chain = chains["qwen3_moe", None]
    words = ("--hf", chain.exported, "--output", tmp_path / "out")
    do("export-hf", chain.grown, *words)
    files = [path.name for path in chain.exported.iterdir()]
    assert CARD in files
    assert filecmp.cmpfiles(chain.exported, tmp_path / "out", files, shallow=False)[0] == files


@pytest.mark.parametrize(("case", "layout"), PAIRS)
def test_a_delta_against_the_base_is_exported_as_the_checkpoint_is(chains, case, layout, tmp_path):
    chain = chains[case, layout]
    between = ("--base", chain.checkpoint, "--trained", chain.grown)
    do("export-delta", *between, "--output", tmp_path / "delta")
    words = ("--delta", tmp_path / "delta", "--hf", chain.hf, "--output", tmp_path / "out")
    do("export-hf", *words)
    files = [path.name for path in chain.exported.iterdir()]
    assert filecmp.cmpfiles(chain.exported, tmp_path / "out", files, shallow=False)[0] == files


def test_a_delta_of_a_hybrid_model_adds_its_experts_to_a_gpt_model(chains, tmp_path):
    gpt, hybrid = (chains["qwen3_moe", layout] for layout in (None, "hybrid"))
    between = ("--base", gpt.checkpoint, "--trained", hybrid.grown)
    do("export-delta", *between, "--output", tmp_path / "delta")
    for base, name in ((gpt, "gpt"), (hybrid, "hybrid")):
        words = ("--base", base.checkpoint, "--delta", tmp_path / "delta")
        do("apply-delta", *words, "--output", tmp_path / name)
        do("export-hf", tmp_path / name, "--hf", gpt.hf, "--output", tmp_path / f"{name}-hf")
        same = filecmp.cmp(hybrid.exported / MODEL, tmp_path / f"{name}-hf" / MODEL, shallow=False)
        assert same, name
    assert card_in(opened(tmp_path / "gpt").args, "here").layers is None
    assert card_in(opened(tmp_path / "hybrid").args, "here").layers == "*E*E"


def test_adapters_on_new_experts_go_into_files_too(chains, tmp_path, capsys):
    """By the grown folder: exported for PEFT, merged, in a delta."""
    chain, adapted = chains["qwen3_moe", None], tmp_path / "adapted"
    fc1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    sites = {(fc1, (layer, expert)): [0] for layer, expert in ((1, 5), (0, 1))}
    write_adapters(chain.grown, adapted, sites, [entry(2, 1.0)])
    words = ("export-adapters", str(adapted), "--output", str(tmp_path / "peft"), "--hf")
    assert main([*words, str(chain.hf)]) == 2
    error = capsys.readouterr().err
    assert "has 6 experts in a layer, and" in error
    assert "name as --hf the folder that moe-inject export-hf makes of what add-experts" in error
    do(*words, chain.exported)
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = {name: t for name, t in factors.items() if "lora_A" in name and "layers.1." in name}
    (stacked,) = rows.values()
    used = stacked.view(6, -1, 32).flatten(1).any(1)
    assert used.tolist() == [False] * 5 + [True]
    do("merge-adapters", "--trained", adapted, "--output", tmp_path / "merged")
    do("export-hf", tmp_path / "merged", "--hf", chain.hf, "--output", tmp_path / "whole")
    between = ("--base", chain.grown, "--trained", adapted)
    do("export-delta", *between, "--output", tmp_path / "delta")
    words = ("--delta", tmp_path / "delta", "--hf", chain.exported, "--output", tmp_path / "out")
    do("export-hf", *words)
    assert filecmp.cmp(tmp_path / "whole" / MODEL, tmp_path / "out" / MODEL, shallow=False)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_codes_of_old_experts_go_where_they_move(tmp_path, kind, capsys):
    """And new experts are encoded as the others are."""
    case, codes = {"fp8": ("deepseek_v3", FP8), "mxfp4": ("gpt_oss", MXFP4)}[kind]
    folder, encoded = tmp_path / "hf", {"fp8": in_fp8, "mxfp4": in_mxfp4}[kind]
    save_folder(case, folder)
    tensors = {}
    for name, value in load_file(folder / MODEL).items():
        expert = ".experts." in name and not name.endswith(("_bias", "experts.down_proj"))
        tensors |= encoded(name, value) if expert else {name: value.bfloat16()}
    write_file(folder / MODEL, tensors)
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": codes, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    do("import-hf", folder, "--output", tmp_path / "checkpoint")
    grow(case, tmp_path / "checkpoint", tmp_path / "grown", *OPEN)
    do("export-hf", tmp_path / "grown", "--hf", folder, "--output", tmp_path / "out")
    moved = card_in(opened(tmp_path / "grown").args, "here").moved
    old, new = (HfFolder.open("--hf", tmp_path / f) for f in ("hf", "out"))
    if kind == "mxfp4":
        name = "model.layers.1.mlp.experts.gate_up_proj"
        before, after = old.pieces(name), new.pieces(name)
        for ending in before:
            assert torch.equal(after[ending][moved], before[ending])
        assert new.shape(name)[0] == 6
    else:
        name = "model.layers.1.mlp.experts.{}.up_proj.weight"
        for expert, now in enumerate(moved):
            before, after = old.pieces(name.format(expert)), new.pieces(name.format(now))
            for ending in before:
                assert torch.equal(
                    after[ending].view(torch.uint8), before[ending].view(torch.uint8)
                )
    do("import-hf", tmp_path / "out", "--output", tmp_path / "again")
    fc1 = next(n for n in opened(tmp_path / "again").tensors if n.endswith("fc1.weight")
               and ".experts." in n and "mtp" not in n)  # fmt: skip
    one, other = (whole(opened(tmp_path / f), fc1).float() for f in ("grown", "again"))
    assert not torch.equal(one, other), "new experts were rounded"
    assert (one - other).norm() < {"fp8": 0.04, "mxfp4": 0.2}[kind] * one.norm()
    plain = ("--output", tmp_path / "plain", "--quantized", "drop")
    do("export-hf", tmp_path / "grown", "--hf", folder, *plain)
    assert {t.dtype for t in load_file(tmp_path / "plain" / MODEL).values()} == {torch.bfloat16}


def test_files_of_many_parts_have_a_true_index(tmp_path):
    folder = tmp_path / "hf"
    save_folder("qwen3_moe", folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / MODEL).unlink()
    do("import-hf", folder, "--output", tmp_path / "checkpoint")
    grow("", tmp_path / "checkpoint", tmp_path / "grown", *OPEN)
    do("export-hf", tmp_path / "grown", "--hf", folder, "--output", tmp_path / "out")
    do("import-hf", tmp_path / "out", "--output", tmp_path / "again")
    for name in opened(tmp_path / "grown").tensors:
        one, other = (whole(opened(tmp_path / f), name) for f in ("grown", "again"))
        assert torch.equal(one, other), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert len(files) > 3
    assert {n: f for f, held in files.items() for n in held} == index["weight_map"]
    sizes = sum(t.nbytes for held in files.values() for t in held.values())
    assert index["metadata"]["total_size"] == sizes


class TestMistakes:
    def refused(self, capsys, *words):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.count("moe-inject: ") == 1
        return error

    def without_card(self, chain, folder):
        """As a run without the plugin saves it."""

        def common(state):
            delattr(state["args"], STORED)
            return state

        rewritten_copy(opened(chain.grown), folder, {}, lambda items, n: items, common=common)
        return folder

    def test_a_checkpoint_without_its_card_is_named(self, chains, tmp_path, capsys):
        chain = chains["deepseek_v3, prediction", None]
        bare = self.without_card(chain, tmp_path / "bare")
        words = ("export-hf", bare, "--hf", chain.hf, "--output", tmp_path / "out")
        error = self.refused(capsys, *words)
        assert "has 12 experts in a layer and no card of new ones" in error
        assert "name with --card the checkpoint that moe-inject add-experts wrote" in error
        error = self.refused(capsys, *words, "--card", chain.checkpoint)
        assert "--card" in error
        assert "has no card of new experts" in error
        do(*words, "--card", chain.grown)
        assert filecmp.cmp(chain.exported / MODEL, tmp_path / "out" / MODEL, shallow=False)

    def test_another_folder(self, chains, tmp_path, capsys):
        save_folder("qwen3_moe, one dense layer", tmp_path / "hf")
        capsys.readouterr()
        chain = chains["deepseek_v3, experts alone", None]
        words = ("--hf", tmp_path / "hf", "--output", tmp_path / "out")
        error = self.refused(capsys, "export-hf", chain.grown, *words)
        assert "has 4 experts in a layer, and new ones were added to 8" in error

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"experts": 7}, "has 6 experts in a layer, and inject_new_experts.json says 7"),
            ({"moved": [0, 1, 2, 9]}, "moved: names an id twice, or one that is not there"),
            ({"moved": [0, 1, 2, 2]}, "moved: names an id twice"),
            ({"new": {"0": [1]}}, "they name experts that are not new"),
            ({"version": 9}, "of another version; this reads version 1"),
            ({"rows": 3}, "a card of new experts that cannot be"),
        ],
    )
    def test_a_card_that_cannot_be(self, chains, tmp_path, capsys, change, message):
        chain = chains["qwen3_moe", None]
        (tmp_path / "hf").mkdir()
        for path in chain.exported.iterdir():
            (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
        card = json.loads((tmp_path / "hf" / CARD).read_text())
        (tmp_path / "hf" / CARD).write_text(json.dumps(card | change))
        words = ("import-hf", tmp_path / "hf", "--output", tmp_path / "out")
        error = self.refused(capsys, *words)
        assert message in error
        assert "take that file out of it" in error
        assert not (tmp_path / "out").exists()

    def test_a_delta_whose_base_had_them(self, chains, tmp_path, capsys):
        chain = chains["qwen3_moe", None]
        changed = {
            name: replaced({(0, 5): lambda: torch.ones(48, 32)})
            for name in opened(chain.grown).tensors
            if ".experts." in name and name.endswith("fc1.weight")
        }
        rewritten_copy(opened(chain.grown), tmp_path / "more", changed, lambda items, n: items)
        between = ("--base", chain.grown, "--trained", tmp_path / "more")
        do("export-delta", *between, "--output", tmp_path / "own")
        words = ("export-hf", "--delta", tmp_path / "own", "--output", tmp_path / "out", "--hf")
        error = self.refused(capsys, *words, chain.hf)
        assert "has 6 experts or more in a layer" in error
        assert "export that base to a folder (moe-inject export-hf) and name this as --hf" in error
        do(*words, chain.exported)
        do("export-hf", tmp_path / "more", "--hf", chain.hf, "--output", tmp_path / "whole")
        files = [path.name for path in (tmp_path / "whole").iterdir()]
        same = filecmp.cmpfiles(tmp_path / "whole", tmp_path / "out", files, shallow=False)[0]
        assert same == files

    def test_layers_of_prediction_that_would_lack_new_experts(self, chains, tmp_path, capsys):
        chain = chains["deepseek_v3, prediction", None]
        skip = {"left_out": lambda name: name.startswith("mtp.")}
        bare = tmp_path / "bare"
        rewritten_copy(opened(chain.grown), bare, {}, lambda items, n: items, **skip)
        words = ("--hf", chain.hf, "--output", tmp_path / "out")
        error = self.refused(capsys, "export-hf", bare, *words)
        assert "has new experts and no layers of multi-token prediction" in error
