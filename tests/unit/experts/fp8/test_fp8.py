"""FP8 codes by blocks; experts kept in them; published FP8 weights."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.fp8.blocks import BLOCK, CODES, LARGEST
from megatron_moe_inject.experts.fp8.native import NativeFp8
from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.experts.train.frozen_fp8 import FrozenFp8, drop_transposes
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import LayerPattern
from tests.harness import fp8_tensor


def _weight(m: int, k: int, seed: int = 0, spread: float = 6.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp2(spread * torch.randn(m, 1, generator=generator))
    return (torch.randn(m, k, generator=generator) * size).bfloat16()


def _reference(weight: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Block by block, in plain words."""
    out = torch.empty_like(weight, dtype=torch.float32)
    for i in range(0, weight.shape[0], BLOCK):
        for j in range(0, weight.shape[1], BLOCK):
            block = weight[i : i + BLOCK, j : j + BLOCK].float()
            scale = LARGEST / block.abs().max() if block.any() else torch.ones(())
            if power_of_two:
                scale = 2.0 ** torch.floor(torch.log2(scale))
            out[i : i + BLOCK, j : j + BLOCK] = (block * scale).to(
                CODES
            ).float() * scale.reciprocal()
    return out


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("shape", [(256, 384), (130, 100), (1, 1), (128, 129)])
def test_codes_are_those_of_the_definition(shape, power_of_two):
    weight = _weight(*shape)
    weight[: shape[0] // 3] = 0
    codes, scales = fp8_blocks.encode(weight, power_of_two=power_of_two)
    assert codes.shape == weight.shape
    assert scales.shape == fp8_blocks.block_shape(*shape)
    found = fp8_blocks.decode(codes, scales, torch.float32)
    assert torch.equal(found, _reference(weight, power_of_two))
    assert found.isfinite().all()


def test_error_is_that_of_three_mantissa_bits():
    weight = _weight(256, 256, spread=0.0)
    found = fp8_blocks.decode(*fp8_blocks.encode(weight), torch.float32)
    ordinary = weight.abs() > 0.05
    error = ((found - weight.float()).abs() / weight.float().abs())[ordinary]
    assert error.max() <= 2**-4
    assert error.mean() > 2**-7


@settings(max_examples=60)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6), st.floats(0, 20), st.booleans()
)
def test_encoding_what_was_decoded_changes_nothing(m, k, seed, spread, whole):
    """So a checkpoint in bfloat16 holds the weights exactly, however often it is resumed."""
    weight = _weight(m, k, seed, spread)
    once = fp8_blocks.encode(weight, whole=whole)
    decoded = fp8_blocks.decode(*once, torch.bfloat16)
    assert torch.equal(decoded.float(), fp8_blocks.decode(*once, torch.float32)), "exact in bf16"
    again = fp8_blocks.decode(*fp8_blocks.encode(decoded, whole=whole), torch.bfloat16)
    assert torch.equal(again, decoded)


@pytest.fixture
def stand_in(monkeypatch):
    make = fp8_weights._blockwise_tensor
    fp8_tensor.use_for_frozen_experts()
    yield
    fp8_weights._blockwise_tensor = make


class _Linear(torch.nn.Module):
    def __init__(self, experts, m, k):
        super().__init__()
        for i in range(experts):
            parameter = torch.nn.Parameter(_weight(m, k, seed=i, spread=1.0))
            parameter.allreduce, parameter.partition_dim = False, 0
            setattr(self, f"weight{i}", parameter)

    def forward(self, rows):
        for weight in self.parameters():
            if fp8_weights.is_fp8(weight):
                weight.update_usage(columnwise_usage=True)
        return rows * 2


class _Experts(torch.nn.Module):
    def __init__(self, experts=3, h=128, f=256):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = _Linear(experts, 2 * f, h), _Linear(experts, h, f)

    def forward(self, permuted_local_hidden_states):
        return self.linear_fc2(self.linear_fc1(permuted_local_hidden_states)), None


class _Config:
    first_last_layers_bf16 = False
    num_layers = 8


class _Moe(torch.nn.Module):
    """As much of a MoE layer as is looked at: local experts 3, 4 and 5 of a larger set."""

    config = _Config()
    local_expert_indices = (3, 4, 5)

    def __init__(self):
        super().__init__()
        self.experts = _Experts()


class _Layer(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer_number = number
        self.mlp = _Moe()


class _Chunk(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([_Layer(5), _Layer(6)])


POLICY = FreezePolicy({4: frozenset({4})}, frozenset())


def _built(source=None):
    kept = FrozenFp8(POLICY, "blockwise", source)
    with kept.while_building():
        chunk = _Chunk()
    return kept, chunk


def test_frozen_experts_are_encoded_as_they_are_built(stand_in):
    plain = _Chunk().state_dict()
    kept, chunk = _built()
    fp8 = {n for n, p in chunk.named_parameters() if fp8_weights.is_fp8(p)}
    trained = {f"decoder.layers.0.mlp.experts.linear_fc{i}.weight1" for i in (1, 2)}
    assert fp8 == {name for name in plain if name not in trained}
    assert kept.count == sum(plain[name].numel() for name in fp8)
    for name, parameter in chunk.named_parameters():
        assert (parameter.allreduce, parameter.partition_dim) == (False, 0)
        assert parameter.dtype == torch.bfloat16
        if name in fp8:
            stored = fp8_weights.stored(parameter)
            assert stored.codes.element_size() == 1
            assert stored.scales.numel() * BLOCK**2 == parameter.numel()
            assert not parameter.requires_grad
    assert not any(fp8_weights.is_fp8(p) for p in _Chunk().parameters()), "hook still there"


def test_layers_in_high_precision_stay_so(stand_in, monkeypatch):
    monkeypatch.setattr(
        "megatron_moe_inject.host.compat.runs_in_high_precision", lambda c, n: n == 5
    )
    _, chunk = _built()
    found = {fp8_weights.is_fp8(p) for p in chunk.decoder.layers[1].parameters()}
    assert found == {False}


def test_saved_and_loaded(stand_in):
    kept, chunk = _built()
    state = chunk.state_dict()
    assert not any(fp8_weights.is_fp8(value) for value in state.values())
    _, other = _built()
    with torch.no_grad():
        for value in state.values():
            value.mul_(3)  # no power of two
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        wanted = state[name]
        if fp8_weights.is_fp8(dict(other.named_parameters())[name]):
            wanted = fp8_blocks.decode(*fp8_blocks.encode(wanted), torch.bfloat16)
        assert torch.equal(value, wanted), name
    kept.check()


def test_transposes_live_in_a_backward_pass_only(stand_in):
    _, chunk = _built()
    drop_transposes([chunk])
    experts = chunk.decoder.layers[0].mlp.experts
    states = torch.ones(2, 4, requires_grad=True)
    output, _ = experts.forward(states)
    weights = [p for p in experts.parameters() if fp8_weights.is_fp8(p)]
    assert all(weight._columnwise_data is not None for weight in weights)
    output.sum().backward()
    assert all(weight._columnwise_data is None for weight in weights)
    assert torch.equal(states.grad, torch.full((2, 4), 4.0))


def _publish(folder, layers=(4, 5), experts=range(3, 6), h=128, f=256, **config):
    """Weights with scales that are no powers of two, as DeepSeek-V3's; returns them decoded."""
    tensors, decoded = {}, {}
    for layer in layers:
        for expert in experts:
            base = f"model.layers.{layer}.mlp.experts.{expert}"
            for i, (name, shape) in enumerate(
                {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}.items()
            ):
                weight = _weight(*shape, seed=100 * layer + 10 * expert + i, spread=1.0)
                codes, scales = fp8_blocks.encode(weight, power_of_two=False)
                tensors[f"{base}.{name}.weight"] = codes
                tensors[f"{base}.{name}.weight_scale_inv"] = scales
                decoded[layer, expert, name] = fp8_blocks.decode(codes, scales, torch.bfloat16)
    save_file(tensors, folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]} | config
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return decoded


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/model-1.safetensors", 3])
def test_a_published_index_names_only_files_of_its_own(tmp_path, name):
    (tmp_path / "index").mkdir()
    _publish(tmp_path / "index", layers=[4], experts=[3])
    index = tmp_path / "index" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(RecipeError, match=r"names a file .* which is none of its own"):
        NativeFp8(f"hf:{tmp_path / 'index'}")


def _as_loaded(decoded, chunk):
    """The state dict that a conversion of the published weights would give."""
    state = chunk.state_dict()
    for name in state:
        layer = int(name.split(".")[2]) + 4
        expert = int(name[-1]) + 3
        parts = ("gate_proj", "up_proj") if "fc1" in name else ("down_proj",)
        state[name] = torch.cat([decoded[layer, expert, part] for part in parts])
    return state


def test_published_weights_are_taken_as_they_are(stand_in, tmp_path):
    decoded = _publish(tmp_path)
    source = NativeFp8(f"hf:{tmp_path}")
    source.check([(4, 3), (5, 5)])
    kept, chunk = _built(source)
    state = _as_loaded(decoded, chunk)
    chunk.load_state_dict(state)
    kept.check()
    for name, value in chunk.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} is saved as it was loaded"
    hybrid = NativeFp8(f"hf:{tmp_path}", LayerPattern("*E" * 6))
    hybrid.check([(9, 3), (11, 5)])
    alike = hybrid.weight(11, 5, "linear_fc2").codes, source.weight(5, 5, "linear_fc2").codes
    assert torch.equal(*(codes.view(torch.uint8) for codes in alike))
    with pytest.raises(RecipeError, match="numbers the blocks of a GPT model"):
        NativeFp8(f"hf:{tmp_path}", LayerPattern("*E-"))
    own = fp8_weights.stored(chunk.decoder.layers[1].mlp.experts.linear_fc2.weight2)
    theirs = source.weight(5, 5, "linear_fc2")
    assert torch.equal(own.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
    assert torch.equal(own.scales, theirs.scales)


def test_another_model_than_the_published_one_is_named(stand_in, tmp_path):
    decoded = _publish(tmp_path)
    kept, chunk = _built(NativeFp8(f"hf:{tmp_path}"))
    state = _as_loaded(decoded, chunk)
    state["decoder.layers.1.mlp.experts.linear_fc2.weight0"][0, 0] += 1
    chunk.load_state_dict(state)
    with pytest.raises(RecipeError, match="linear_fc2 of expert 3 in layer 5 differs"):
        kept.check()


def test_published_weights_without_the_rest_of_the_student(stand_in, tmp_path):
    _publish(tmp_path)
    kept, _ = _built(NativeFp8(f"hf:{tmp_path}"))
    with pytest.raises(RecipeError, match="no checkpoint of the student was loaded"):
        kept.check()


def test_folders_that_do_not_fit(tmp_path):
    for text, problem in (("fp8:/x", "no source"), ("hf:/not/there", "no directory")):
        with pytest.raises(RecipeError, match=problem):
            NativeFp8(text)
    with pytest.raises(RecipeError, match=r"no readable config.json"):
        NativeFp8(f"hf:{tmp_path}")
    _publish(tmp_path, weight_block_size=[1, 128])
    with pytest.raises(RecipeError, match="not in FP8 by blocks of 128 x 128"):
        NativeFp8(f"hf:{tmp_path}")
    _publish(tmp_path, f=192)
    source = NativeFp8(f"hf:{tmp_path}")
    with pytest.raises(RecipeError, match=r"lacks model.layers.7.mlp.experts.3.gate_proj.weight"):
        source.check([(7, 3)])
    with pytest.raises(RecipeError, match="experts of width 192"):
        source.weight(4, 3, "linear_fc1")
    (tmp_path / "model-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(RecipeError, match=r"cannot give model\.layers\.4"):
        NativeFp8(f"hf:{tmp_path}").weight(4, 3, "linear_fc2")
