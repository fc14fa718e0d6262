"""What a student asks of a checkpoint, by the names that it has, and what does not fit."""

from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from megatron_moe_inject.host import compat, student_load
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.norm_names import stored_name
from megatron_moe_inject.host.stored_checkpoint import StoredCheckpoint
from megatron_moe_inject.host.student_load import Request, StudentLoad, _ChunkLoad, fit, model_names

PRE = "decoder.layers.3.pre_mlp_layernorm.weight"
IN_MLP = "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"


@pytest.mark.parametrize(
    ("name", "stored", "asked"),
    [
        (PRE, {PRE: 1, IN_MLP: 1}, PRE),
        (PRE, {IN_MLP: 1}, IN_MLP),
        (IN_MLP, {PRE: 1}, PRE),
        (f"optimizer.state.exp_avg.{PRE}@7", {f"optimizer.state.exp_avg.{IN_MLP}@7": 1}, None),
        ("input_layernorm.bias", {"self_attention.linear_qkv.layer_norm_bias": 1}, None),
        (PRE, {"decoder.layers.4.mlp.linear_fc1.layer_norm_weight": 1}, PRE),
        ("mlp.router.weight", {}, "mlp.router.weight"),
    ],
)
def test_the_name_that_is_stored(name, stored, asked):
    assert stored_name(name, stored) == (asked or next(iter(stored)))


def tensor(key: str, *shape: int, padded=False) -> ShardedTensor:
    data = torch.zeros(shape)
    return ShardedTensor.from_rank_offsets(key, data, allow_shape_mismatch=padded)


def halves(key: str, *shape: int) -> ShardedTensorFactory:
    """Stored as two, as a gated MLP is."""

    def build(key, data, replica_id, flattened_range):
        return [
            tensor(f"{key}_{side}", *half.shape)
            for side, half in zip("wv", data.chunk(2), strict=True)
        ]

    return ShardedTensorFactory(key, torch.zeros(shape), build, lambda state: state)


def state() -> dict:
    extra = ShardedObject(f"{PRE[:-6]}_extra_state", None, (1,), (0,))
    return {
        "args": None,
        "model0": {
            "norm": tensor(PRE, 8),
            "norm_extra_state": extra,
            "head": tensor("output_layer.weight", 64, 8, padded=True),
        },
        "model1": {"mlp": halves("fc1", 4, 8), "rows": tensor("router.inject_rows.3", 1, 8)},
        "optimizer": [{0: tensor(f"optimizer.state.exp_avg.{PRE}", 8)}],
        "opt_param_scheduler": {"steps": 3},
    }


STORED = {
    IN_MLP: (8,),
    "output_layer.weight": (64, 8),
    "fc1_w": (2, 8),
    "fc1_v": (2, 8),
    f"optimizer.state.exp_avg.{IN_MLP}": (8,),
    "rng_state": None,
}


def test_it_fits_a_checkpoint_of_the_other_kind_of_layers():
    fitted = fit(state(), STORED)
    assert "norm_extra_state" not in fitted["model0"]
    assert fitted["model0"]["norm"].key == IN_MLP
    assert fitted["opt_param_scheduler"] == {"steps": 3}
    lacking, wrong, states, asked = Request.of(fitted).compared(STORED, 61)
    assert (lacking, wrong, states) == ([], [], []), "its own names are not asked of stock ones"
    assert asked == bytes([1, 1, 1, 1])
    kept = fit(state(), STORED | {f"{PRE[:-6]}_extra_state": None})
    assert "norm_extra_state" in kept["model0"]


def test_the_second_name_of_a_norm_is_asked_for_with_the_first():
    """A converted model holds both, and a run asks for one."""
    stored = {**STORED, PRE: (8,), IN_MLP: (8,)}
    *_, asked = Request.of(fit(state(), stored)).compared(stored, 61)
    assert all(asked)
    assert {PRE, IN_MLP} <= set(model_names(stored))


def test_what_does_not_fit_is_named():
    stored = {"output_layer.weight": (32, 8), "fc1_w": (2, 9), "fc1_v": (2, 8), "more": (1,)}
    lacking, wrong, states, asked = Request.of(fit(state(), stored)).compared(stored, 61)
    assert lacking == [PRE]
    assert states == [f"optimizer.state.exp_avg.{PRE}"]
    assert wrong == [
        "output_layer.weight of 32 rows for a tokenizer of 61 ids",
        "fc1_w of shape [2, 9], not [2, 8]",
    ]
    names = model_names(stored)
    assert [name for name, own in zip(names, asked, strict=True) if not own] == ["more"]


def test_padding_of_the_vocabulary_may_differ():
    stored = STORED | {"output_layer.weight": (62, 8)}
    assert Request.of(fit(state(), stored)).compared(stored, 61)[1] == []


def arguments(load, **changed) -> Namespace:
    given = {"load": load, "finetune": True, "ckpt_format": "torch_dist"}
    return Namespace(**given | changed)


def test_no_checkpoint_is_an_error_unless_it_is_meant(tmp_path):
    for load, told in ((None, "--load: missing, so"), (str(tmp_path), f"--load {tmp_path} holds")):
        with pytest.raises(RecipeError, match="random weights") as error:
            StudentLoad(arguments(load))
        assert str(error.value).startswith(told)
        assert StudentLoad(arguments(load, inject_from_scratch=True)).checkpoint is None


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        (
            {"num_layers": 2},
            "was saved by a GPT model, which Megatron-Core .*--hybrid-layer-pattern",
        ),
        ({"hybrid_layer_pattern": "*E"}, None),
        ({"hybrid_override_pattern": "*E"}, None),
    ],
)
def test_a_gpt_checkpoint_goes_into_a_hybrid_model_where_megatron_translates_it(
    monkeypatch, tmp_path, saved, told
):
    stored = StoredCheckpoint("--load", tmp_path, tmp_path, 3, "torch_dist", resumes=False)
    monkeypatch.setattr(StoredCheckpoint, "arguments", lambda self: Namespace(**saved))
    monkeypatch.setattr(student_load, "checkpoint_to_load", lambda args: stored)
    hybrid = arguments(tmp_path, hybrid_layer_pattern="*E")
    for can in (True, False):
        monkeypatch.setattr(compat, "translates_gpt_checkpoints", lambda can=can: can)
        assert StudentLoad(arguments(tmp_path, hybrid_layer_pattern=None)).checkpoint is stored
        if can or told is None:
            assert StudentLoad(hybrid).checkpoint is stored
        else:
            with pytest.raises(RecipeError, match=f"--load {tmp_path} {told}") as error:
                StudentLoad(hybrid)
            assert "run Megatron-Core 0.19 or later" in str(error.value)


def test_what_a_chunk_was_not_given():
    """Also where Megatron loads a second time, less strictly, and is not told what is left."""
    chunk = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    watched = _ChunkLoad(1, chunk)
    assert watched.lacking == ["model1"], "nothing was loaded yet"
    given = {k: v for k, v in chunk.state_dict().items() if k != "b.weight"} | {"c": torch.zeros(1)}
    with pytest.raises(RuntimeError):
        chunk.load_state_dict(given, strict=True)
    chunk.load_state_dict(given, strict=False)
    assert (watched.lacking, watched.left) == (["b.weight"], ["c"])
    watched.forget()
    chunk.load_state_dict(chunk.state_dict())
    assert watched.lacking == ["b.weight"]
