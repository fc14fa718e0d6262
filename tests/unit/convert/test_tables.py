"""Each architecture's table: a folder's tensors taken once each, Megatron's own keys and shapes.

The folders are tiny and random (``tests/harness/tiny_folders.py``). The models are Megatron's,
built from the table's flags by Megatron's own parser and builder on the CPU lane
(``tests/harness/stored_keys.py``).
"""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.architectures.configuration import NO_EFFECT
from megatron_moe_inject.convert.arguments import option_words
from megatron_moe_inject.host.errors import RecipeError
from tests.harness.table_keys import (
    compare,
    layouts,
    megatrons,
    models_of,
    name_of,
    run_script,
)
from tests.harness.tiny_folders import CASES, SIZES, config_of, save_folder

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = Path(__file__).parent / "configs"
OTHER = os.environ.get("MEGATRON_OTHER")
BUILT = layouts(without=("--moe-latent-size", "--multi-latent-attention"))
"""A hybrid model has these with Transformer Engine alone (``tests/te/test_tables.py``)."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each case, with tokens and transformers' logits."""
    import transformers

    root = tmp_path_factory.mktemp("folders")
    folders = {case: root / str(number) for number, case in enumerate(CASES)}
    for case, folder in folders.items():
        save_folder(case, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        tokens = torch.randint(config_of(case).vocab_size, (2, 32))
        torch.save(tokens, folder / "tokens.pt")
        with torch.no_grad():
            torch.save(model(tokens).logits, folder / "published.pt")
    return folders


@pytest.fixture(scope="module")
def stored(folders):
    """What Megatron's models store; those that run leave their logits in the folders."""
    models = [(*pair, str(folders[pair[0]])) for pair in BUILT]
    return json.loads(run_script("table_logits", models).splitlines()[-1])


@pytest.fixture(scope="module")
def stored_by_other():
    return models_of(BUILT, megatron=OTHER)


class TestFolder:
    @pytest.mark.parametrize("case", CASES)
    def test_every_tensor_is_taken_once_and_comes_back_bitwise(self, case, folders):
        import transformers

        tensors = load_file(folders[case] / "model.safetensors")
        config = transformers.AutoConfig.from_pretrained(folders[case])
        table = architecture_of(config)
        config = table.for_folder(config, tensors)
        table.check(config)
        taken = {}
        for entry in table.entries(config):
            parts = [tensors[part.name][part.index] for part in entry.parts]
            whole = entry.form.join(parts)
            assert tuple(whole.shape) == entry.shape, entry
            assert sum(rows for _, rows in entry.pieces) in (0, entry.shape[0])
            if entry.follows:
                continue
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

    def test_a_folder_without_its_layers_of_prediction_is_one_without_prediction(self, folders):
        case = "deepseek_v3, prediction"
        names = set(load_file(folders[case] / "model.safetensors"))
        config = config_of(case)
        table = architecture_of(config)
        assert table.for_folder(config, names).num_nextn_predict_layers == 1
        left = {name for name in names if not name.startswith("model.layers.2.")}
        assert left < names
        without = table.for_folder(config, left)
        assert config.num_nextn_predict_layers == 1
        assert "--mtp-num-layers" not in table.flags(without)
        assert {p.name for e in table.entries(without) for p in e.parts} == left

    def test_nemotrons_prediction_is_refused_where_the_folder_has_it(self, folders):
        config = changed_config("nemotron_h", {"num_nextn_predict_layers": 1})
        table = architecture_of(config)
        names = set(load_file(folders["nemotron_h"] / "model.safetensors"))
        table.check(table.for_folder(config, names))
        with pytest.raises(RecipeError, match="num_nextn_predict_layers: 1 is not served"):
            table.check(table.for_folder(config, {*names, "mtp.layers.0.eh_proj.weight"}))


class TestMegatron:
    @pytest.mark.parametrize(("case", "layout"), BUILT)
    def test_keys_and_shapes_are_those_that_the_model_of_the_flags_stores(
        self, case, layout, stored
    ):
        compare(case, layout, stored[name_of(case, layout)])

    @pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
    @pytest.mark.parametrize(("case", "layout"), BUILT)
    def test_the_other_megatron_has_them_too_or_refuses_the_flags(
        self, case, layout, stored_by_other
    ):
        error = stored_by_other[name_of(case, layout)]["error"]
        flags, _ = megatrons(case, layout)
        if flags["--position-embedding-type"] == "yarn":
            assert error == "SystemExit: 2"
        elif "--spec" in flags:
            assert "--spec" in error
        else:
            compare(case, layout, stored_by_other[name_of(case, layout)])


@pytest.mark.usefixtures("stored")
class TestLogits:
    @pytest.mark.parametrize("pair", BUILT, ids=" as ".join)
    def test_megatrons_model_has_those_of_transformers(self, pair, folders):
        case, layout = pair
        published = torch.load(folders[case] / "published.pt")
        ours = torch.load(folders[case] / f"{layout}.pt")
        assert published.std() > 0.5
        assert (published - ours).abs().max() < 2e-5


def config_of_json(name, folder):
    import transformers

    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    return transformers.AutoConfig.from_pretrained(folder)


PUBLISHED = {  # parameters of the published model; prediction and router biases are further down
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "qwen1_5_moe_a2_7b": 14_315_784_192,
    "mixtral_8x7b": 46_702_792_704,
    "olmoe": 6_919_161_856,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "nemotron3_nano": 31_577_937_344,
    "llama3_1_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gemma_7b": 8_537_680_896,
}
BESIDE = {"deepseek_v3": (11_610_067_968, 59 * 256), "nemotron3_nano": (0, 23 * 128)}
"""Parameters of multi-token prediction, and numbers of the biases of routers."""


class TestPublished:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_entries_have_the_parameters_of_the_published_model(self, name, tmp_path):
        config = config_of_json(name, tmp_path)
        table = architecture_of(config)
        table.check(config)
        decoder = prediction = biases = 0
        for entry in table.entries(config):
            size = math.prod(entry.shape) * (not entry.follows)
            if entry.dtype is not None:
                biases += size
            elif entry.slot.name.startswith("mtp."):
                prediction += size
            else:
                decoder += size
        assert decoder == PUBLISHED[name]
        assert (prediction, biases) == BESIDE.get(name, (0, 0))

    def test_every_file_is_of_a_model_that_is_counted(self):
        assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)

    @pytest.mark.parametrize("later", ["gemma2", "gemma3_text"])
    def test_later_gemmas_are_refused(self, later):
        import transformers

        config = transformers.AutoConfig.for_model(later)
        with pytest.raises(RecipeError, match=rf"model_type: '{later}' .* norms behind .* hf:<fol"):
            architecture_of(config).check(config)

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_megatrons_parser_takes_the_flags(self, name, tmp_path, parse):
        config = config_of_json(name, tmp_path)
        flags = architecture_of(config).flags(config)
        args = vars(parse(" ".join(option_words(flags))))
        for flag, value in flags.items():
            stored = args.get(flag.removeprefix("--").replace("-", "_"), "another name")
            if isinstance(value, (int, float)) and stored != "another name":
                assert stored == value, flag

    def test_first_dense_layers_are_a_short_pattern(self, tmp_path):
        config = config_of_json("deepseek_v3", tmp_path)
        assert architecture_of(config).flags(config)["--moe-layer-freq"] == "[0]*3+[1]*58"


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ("llama", {"rope_parameters": {"rope_theta": 10000.5}}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier"),
    ("llama", {"per_layer_config": {0: {"intermediate_size": 64}}}, "per_layer_config"),
    ("llama, scaled", {"rope_parameters": {"factor": 32.0}}, "factor"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm"),
    ("qwen3_moe", {"qkv_bias": True}, "qkv_bias"),
    ("qwen2_moe", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    (
        "deepseek_v2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 4,
        },
        "topk_group",
    ),
    ("deepseek_v2, latent queries", {"rope_parameters": {"beta_fast": 16}}, "beta_fast"),
    ("deepseek_v2, latent queries", {"rope_parameters": {"mscale": None}}, "mscale_all_dim"),
    ("deepseek_v2", {"n_shared_experts": 0}, "n_shared_experts"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("deepseek_v3", {"topk_group": 1}, "topk_group"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("gpt_oss", {"rope_parameters": {"attention_factor": 1.5}}, "attention_factor"),
    ("nemotron_h", {"sliding_window": 8}, "sliding_window"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
    ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
    ("nemotron_h", {"residual_in_fp32": True}, "residual_in_fp32"),
    ("nemotron_h", {"mamba_proj_bias": True}, "mamba_proj_bias"),
]


def changed_config(case, changes):
    config = config_of(case)
    for name, value in changes.items():
        if name == "rope_parameters" and "rope_type" not in value:
            value = {**config.rope_parameters, **value}
        elif name == "rope_parameters":
            value = {"rope_theta": 10000.0, **value}
        elif name == "partial_rotary_factor":
            name, value = "rope_parameters", {**config.rope_parameters, name: value}
        setattr(config, name, value)
    return config


class TestRefusals:
    @pytest.mark.parametrize(("case", "changes", "key"), REFUSED)
    def test_what_megatron_cannot_express_is_one_error_that_names_the_key(self, case, changes, key):
        config = changed_config(case, changes)
        with pytest.raises(RecipeError) as refused:
            architecture_of(config).check(config)
        assert re.match(rf"config.json: (rope_parameters\.)?{key}: ", str(refused.value))

    @pytest.mark.parametrize("case", CASES)
    def test_what_is_not_changed_is_served(self, case):
        config = config_of(case)
        architecture_of(config).check(config)

    @pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in CASES.values()}))
    def test_every_key_of_transformers_class_is_listed(self, model_type):
        case = next(case for case, (of, _) in CASES.items() if of == model_type)
        config = config_of(case)
        keys = architecture_of(config).keys
        listed = keys.read | set(keys.only) | NO_EFFECT
        listed |= {config.attribute_map.get(name, name) for name in listed}
        names = {field.name for field in dataclasses.fields(config)}
        names = {config.attribute_map.get(name, name) for name in names}
        assert names - listed == set()
        assert not keys.read & set(keys.only)

    def test_a_key_of_a_later_transformers_is_served_at_its_default_alone(self):
        config = config_of("llama")
        later = dataclasses.make_dataclass(
            "LlamaConfig", [("attn_output_gate", bool, False)], bases=(type(config),), kw_only=True
        )
        served = later(**{**SIZES, "model_type": "llama"})
        architecture_of(served).check(served)
        served.attn_output_gate = True
        with pytest.raises(RecipeError, match="attn_output_gate: True is not known here"):
            architecture_of(served).check(served)

    def test_another_architecture_is_an_error_that_lists_those_that_are_there(self):
        import transformers

        with pytest.raises(RecipeError, match=r"model_type: 'gpt2' has no table here; .*qwen3_moe"):
            architecture_of(transformers.GPT2Config())

    def test_keys_of_newer_folders_that_agree_with_the_table_are_no_obstacle(self):
        beside = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
        config = changed_config("qwen3_moe", beside)
        architecture_of(config).check(config)

    def test_a_key_that_means_nothing_is_no_obstacle(self):
        config = changed_config("llama", {"scale_emb": None, "use_mrope": False, "layers": []})
        architecture_of(config).check(config)
