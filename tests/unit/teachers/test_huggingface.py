"""Hugging Face teachers: tiny random models saved to folders, loaded, and refused when unfit."""

import builtins
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers import (
    StudentTokenizer,
    Teacher,
    huggingface,
    load_teacher,
)
from megatron_moe_inject.teachers.forward import shared_forward
from tests.harness.huggingface import IDS, SIZES, check, save

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def load(folder: Path, dtype=torch.float32, **more) -> Teacher:
    source = f"hf:{folder}"
    return load_teacher("coder", source, params_dtype=dtype, device="cpu", **more)


def tokens() -> torch.Tensor:
    return torch.randint(IDS, (5, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, save(folder, transformers.LlamaConfig(**SIZES))


@pytest.fixture
def copy(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama[0], tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "qwen2-tied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "opt-projected": lambda: transformers.OPTConfig(
        vocab_size=IDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=IDS, hidden_size=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_and_head_give_the_models_logits(tmp_path, name):
    model = save(tmp_path, CONFIGS[name]())
    info, teacher = check(tmp_path), load(tmp_path)
    assert isinstance(teacher, Teacher)
    hidden = teacher.hidden_states(tokens())
    with torch.no_grad():
        logits = model(tokens()).logits
    torch.testing.assert_close(hidden @ teacher.head_weight(0, IDS).T, logits)
    assert not hidden.requires_grad
    assert hidden.shape == (5, 10, teacher.hidden_size)
    stored = [b for key, b in model.named_buffers() if key.endswith("_correction_bias")]
    assert info.parameters == sum(p.numel() for p in (*model.parameters(), *stored))
    assert info.architecture == type(model).__name__
    assert (info.num_layers, info.vocab_rows) == (2, IDS)


@pytest.mark.parametrize(
    ("name", "layers", "number"), [("mixtral", 2, 4), ("qwen3-moe", 2, 8), ("deepseek-v3", 1, 8)]
)
def test_routed_experts_are_counted(tmp_path, name, layers, number):
    """A token passes two of them; shared experts and the layers without any are the rest."""
    save(tmp_path, CONFIGS[name]())
    info = check(tmp_path)
    width = SIZES["intermediate_size"] if name == "mixtral" else 24
    one = layers * 3 * SIZES["hidden_size"] * width
    assert (info.experts.number, info.experts.topk) == (number, 2)
    assert info.experts.parameters == number * one
    assert info.active_parameters == info.parameters - (number - 2) * one
    assert info.held_parameters(2) == info.parameters - number // 2 * one


def test_facts_of_a_folder(llama):
    info = check(llama[0])
    assert (info.kind, info.hidden_size, info.max_positions) == ("hf", 32, None)
    assert info.config["num_key_value_heads"] == 2
    assert "sizes agree" in info.vocabulary


def test_gguf_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError) as caught:
        check(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"teachers.coder.source: 'hf:{tmp_path}' holds its weights as GGUF")
    for part in ("model-Q4_K_M.gguf", "from_pretrained(FOLDER, gguf_file='model-Q4_K_M.gguf'"):
        assert part in message
    assert "save_pretrained(OUT)" in message


def test_learned_positions_limit_the_length(tmp_path):
    save(tmp_path, transformers.GPT2Config(**GPT2))
    assert check(tmp_path).max_positions == 64


def test_dtype_eval_and_frozen(llama):
    teacher = load(llama[0], torch.bfloat16)
    assert teacher.hidden_states(tokens()).dtype == torch.bfloat16
    assert teacher.head_weight(0, 4).dtype == torch.bfloat16
    assert not teacher._base.training
    assert not any(p.requires_grad for p in teacher._base.parameters())


def test_random_numbers_stay_as_they_were(llama):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    check(llama[0])
    load(llama[0]).hidden_states(tokens())
    assert torch.equal(before, torch.get_rng_state())


def test_the_tokenizer_tells_padding(copy):
    vocabulary = {f"t{index}": index for index in range(90)}
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    student = StudentTokenizer("HuggingFaceTokenizer", model=str(copy))
    info = check(copy, student)
    assert (info.vocab_size, info.vocab_rows) == (90, 96)
    assert "the same 90 tokens" in info.vocabulary
    teacher = load(copy)
    assert teacher.vocab_size == 90
    assert not teacher.head_weight(88, 100)[2:].any()
    assert teacher.head_weight(88, 100)[:2].any()
    other = {**vocabulary, "t5": 6, "t6": 5}
    (copy / "other.json").write_text(json.dumps(other))
    with pytest.raises(RecipeError, match="id 5 is 't6' for the student and 't5' for the teacher"):
        check(copy, StudentTokenizer("HuggingFaceTokenizer", model=str(copy / "other.json")))
    vocabulary |= {f"t{index}": index for index in range(90, 100)}
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(RecipeError, match="96 embedding rows for a tokenizer with 100 ids"):
        check(copy)


def test_another_vocabulary_size_is_refused(llama):
    with pytest.raises(RecipeError, match=r"another vocabulary: 1 to 96 ids .* student's 97 ids"):
        check(llama[0], StudentTokenizer("NullTokenizer", vocab_size=97))


def test_positions_without_a_mask_do_not_split_documents(llama):
    teacher = load(llama[0], resets_documents=True)
    restarting = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).expand(5, 10)
    causal = torch.ones(10, 10, dtype=torch.bool).triu(1)
    whole = teacher.hidden_states(tokens(), restarting)
    torch.testing.assert_close(
        whole, teacher.hidden_states(tokens(), restarting, causal[None, None])
    )
    assert not torch.allclose(whole, teacher.hidden_states(tokens()), atol=1e-3)


def test_a_mask_separates_documents(llama):
    teacher = load(llama[0], resets_documents=True)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]).expand(5, 10)
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    mask[4:, :4] = True
    packed = teacher.hidden_states(tokens(), positions, mask.expand(5, 1, 10, 10))
    second = teacher.hidden_states(tokens()[:, 4:])
    torch.testing.assert_close(packed[:, 4:], second)
    (shared,) = shared_forward(teacher, tokens(), positions, mask[None, None], group=None)
    torch.testing.assert_close(shared, packed)


def test_positions_need_the_promise(llama):
    with pytest.raises(AssertionError, match="resets_documents"):
        load(llama[0]).hidden_states(tokens(), torch.zeros_like(tokens()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.MistralConfig(**SIZES, sliding_window=4), "sliding-window layers"),
        (CONFIGS["bloom"], "takes no positions and mask from outside"),
    ],
)
def test_models_that_cannot_take_masks_are_refused_where_masks_are_used(tmp_path, config, message):
    save(tmp_path, config())
    load(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, resets_documents=True)


TRANSFORMED = {
    "softcapping": (
        lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0),
        LogitTransform(softcap=2.0),
    ),
    "scale-up": (
        lambda: transformers.CohereConfig(**SIZES, logit_scale=2.0),
        LogitTransform(2.0),
    ),
    "scale-down": (
        lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
        LogitTransform(0.25),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed_logits_are_those_of_the_model(tmp_path, name):
    config, transform = TRANSFORMED[name]
    model = save(tmp_path, config())
    check(tmp_path)
    teacher = load(tmp_path)
    assert teacher.logit_transform == transform
    plain = teacher.hidden_states(tokens()) @ teacher.head_weight(0, IDS).T
    with torch.no_grad():
        logits = model(tokens()).logits
    assert not torch.allclose(plain, logits, atol=1e-3)
    torch.testing.assert_close(transform.apply_(plain), logits)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_that_no_config_entry_tells_is_found_by_the_probe(tmp_path, monkeypatch, name):
    save(tmp_path, TRANSFORMED[name][0]())
    monkeypatch.setattr(huggingface, "_LOGIT_SCALES", {})
    monkeypatch.setattr(huggingface, "_SOFTCAP", "")
    with pytest.raises(RecipeError, match=r"transforms its logits: .* differs from"):
        load(tmp_path)


def test_a_transform_that_cannot_be_is_refused(tmp_path):
    save(tmp_path, transformers.CohereConfig(**SIZES, logit_scale=2.0))
    edit_config(tmp_path, logit_scale=-1.0)
    with pytest.raises(RecipeError, match=r"scale=-1.0 of the logits must be positive"):
        check(tmp_path)


def test_a_head_with_bias_is_refused(tmp_path):
    save(tmp_path, transformers.GPTJConfig(**GPT2, rotary_dim=4))
    with pytest.raises(RecipeError, match="GPTJForCausalLM, whose head has a bias"):
        load(tmp_path)


def test_missing_weights_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights.pop("lm_head.weight")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RecipeError, match=r"lacks weights of .*lm_head\.weight, model\.layers\.1\.mlp\.up_proj"
    ):
        load(copy)


def test_mismatched_weights_are_refused(copy):
    edit_config(copy, intermediate_size=64)
    with pytest.raises(
        RecipeError, match=r"do not fit its config: model\.layers\.0\.mlp\.down_proj"
    ):
        load(copy)


def test_weights_that_are_not_finite_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"not finite: .*norm\.weight"):
        load(copy)


def test_a_truncated_file_is_refused_at_check(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RecipeError, match=r"cannot be read at .*model\.safetensors"):
        check(copy)


def test_a_missing_shard_is_refused_at_check(copy):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match=r"has no model-00002\.safetensors"):
        check(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "a/b", 3])
def test_an_index_names_only_files_of_its_own(copy, name):
    (copy.parent / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(RecipeError, match=r"names a file .* which is none of its own"):
        check(copy)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    for action in (check, load):
        with pytest.raises(RecipeError, match=r"only pytorch_model\.bin; save .* safetensors"):
            action(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "nosuch"}, "config that transformers .* cannot read by itself"),
        ({"model_type": "nosuch", "auto_map": {"AutoConfig": "x.Y"}}, "cannot read by itself"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    ],
)
def test_unfit_configs_are_refused(copy, changes, message):
    edit_config(copy, **changes)
    with pytest.raises(RecipeError, match=message):
        check(copy)


def test_encoder_decoders_and_other_folders_are_refused(copy, tmp_path):
    config = transformers.T5Config(vocab_size=IDS, d_model=32, num_layers=2, num_heads=4)
    config.save_pretrained(str(tmp_path / "t5"))
    with pytest.raises(RecipeError, match=r"is a t5 model, .* not load as a causal"):
        check(tmp_path / "t5")
    with pytest.raises(RecipeError, match=r"config\.json is not there"):
        check(tmp_path)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="is an adapter, not a whole model"):
        check(copy)


def test_without_transformers_the_extra_is_named(llama, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    stock = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("transformers"), "must not be imported"
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RecipeError, match=r"pip install megatron-moe-inject\[hf\]"):
        check(llama[0])
