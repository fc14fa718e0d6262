"""The processes behind the tests of Megatron teachers.

A world of two writes checkpoints at TP=2, PP=2 and TP=1 with Megatron's own code and loads them
as teachers in that same job; then one of them, as a world of its own, loads them again and
meets the damaged ones. Start-up dominates the time, so all of it shares one pair of processes.
"""

import contextlib
import io
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_moe_inject.host.cpu_lane.hybrid import local_stack_spec
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.teachers import (
    StudentTokenizer,
    load_teacher,
)
from megatron_moe_inject.teachers.documents import document_forward
from megatron_moe_inject.teachers.expert_parallel import ExpertRanks
from megatron_moe_inject.teachers.forward import shared_forward

LAYOUTS = ("tp1", "tp2pp1", "tp1pp2")
SEQUENCES, LENGTH, IDS, ROWS = 5, 12, 100, 128
STUDENT = StudentTokenizer("NullTokenizer", vocab_size=IDS)
LLAMA = shlex.split(
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 "
    "--group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope --rotary-percent 0.5 "
    "--untie-embeddings-and-output-weights --qk-layernorm --add-qkv-bias"
)
GPT2 = shlex.split(
    "--num-layers 2 --hidden-size 24 --num-attention-heads 2 --ffn-hidden-size 96 "
    "--position-embedding-type learned_absolute"
)
# Scales its logits by half, as the width is twice the base; the flag for the scale stays unset.
MUP = [*LLAMA, "--use-mup", "--mup-base-hidden-size", "16"]
# A dense layer first; experts of a size of their own, shared ones, sigmoids with groups and a bias.
MOE = [
    *LLAMA,
    *shlex.split(
        "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-layer-freq [0,1,1,1] "
        "--moe-shared-expert-intermediate-size 40 --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-num-groups 2 --moe-router-group-topk 1 "
        "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
    ),
]
"""Of the tests' small sizes, in the manner of DeepSeek-V3."""
EXPERTS = ("moe-tp1", "moe-ep2", "moe-ep2-one-by-one")
"""Folders of one mixture of experts, as it was stored from several layouts and in several forms."""
MAMBA = "--mamba-head-dim 16 --mamba-state-dim 8 --mamba-num-groups 2"
HYBRID = [*LLAMA, *shlex.split(f"--hybrid-layer-pattern M*M-/*- {MAMBA}")]
COMMON = shlex.split(
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 2 "
    "--train-iters 1 --lr 1e-3 --tokenizer-type NullTokenizer --mock-data --transformer-impl local "
    "--no-persist-layer-norm --no-rope-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion "
    "--no-masked-softmax-fusion --no-gradient-accumulation-fusion --make-vocab-size-divisible-by 8"
)


def tokens() -> torch.Tensor:
    return torch.randint(IDS, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def positions() -> torch.Tensor:
    return torch.arange(LENGTH).expand(SEQUENCES, LENGTH)


def _enter(rank: int, folder: Path) -> None:
    os.setpgrp()  # so that a rank ends together with the helper process of checkpoint writing
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    from megatron_moe_inject.host import cpu_lane

    cpu_lane.enable()
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.save(write(rank, folder), folder / f"write{rank}.pt")
    if rank == 0:
        damage(folder)
    dist.barrier()
    torch.save(read_in_job(rank, folder), folder / f"read_in_job{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.save(read_alone(folder), folder / "read_alone0.pt")
        dist.destroy_process_group()


def run_worlds(folder: Path, seconds: float = 400.0) -> None:
    context = mp.spawn(_enter, (folder,), nprocs=2, join=False)
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, f"still running after {seconds} s"
    except BaseException:
        for pid in context.pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        raise


def _layout(tp: int = 1, pp: int = 1, ep: int = 1) -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)


def _arguments(flags: list[str], tp: int = 1, pp: int = 1) -> Namespace:
    from megatron.training.arguments import parse_args, validate_args

    parallel = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    sys.argv = ["pretrain", *flags, *COMMON, "--vocab-size", str(IDS), *shlex.split(parallel)]
    args = parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)
    return args


def _model(flags: list[str], tp: int = 1, pp: int = 1):
    """A stock GPT or hybrid model with weights that do not depend on the layout, and its
    arguments."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training.argument_utils import core_transformer_config_from_args

    args = _arguments(flags, tp, pp)
    args.padded_vocab_size = ROWS
    config = core_transformer_config_from_args(args)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    whole = {
        "config": config,
        "vocab_size": ROWS,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
    }
    if args.hybrid_layer_pattern:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        stack = local_stack_spec()
        model = HybridModel(
            **whole, hybrid_stack_spec=stack, hybrid_layer_pattern=args.hybrid_layer_pattern
        )
    else:
        model = GPTModel(**whole, transformer_layer_spec=spec)
    return model.eval(), args


def _sharded(model) -> dict:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})


def _save(state: dict, args: Namespace, folder: Path, **content) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {**state, "args": args, "iteration": 3, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(folder), content_metadata=content)


def _randomize(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, bias in model.named_buffers():
            if name.endswith(".expert_bias"):
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))


def _stock_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(), positions(), None)[..., :IDS].contiguous()


def _saved_tracker_states() -> dict:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}


def _untouched(before: tuple) -> bool:
    cpu, states = before
    now = _saved_tracker_states()
    same = states.keys() == now.keys() and all(torch.equal(states[k], now[k]) for k in now)
    return same and torch.equal(cpu, torch.get_rng_state())


def write(rank: int, folder: Path) -> dict:
    """Checkpoints of several layouts and the stock logits of each."""
    from megatron.core import dist_checkpointing

    logits = {}
    originals = {}
    _layout()
    models = (
        *(("llama", LLAMA, 3), ("gpt2", GPT2, 4), ("mup", MUP, 5), ("hybrid", HYBRID, 6)),
        ("moe", MOE, 7),
    )
    for name, flags, seed in models:
        model, args = _model(flags)
        _randomize(model, seed)
        logits[name] = _stock_logits(model)
        originals[name] = folder / f"{name}-tp1" / "iter_0000003"
        _save(_sharded(model), args, originals[name], singleton_local_shards=False)
    for name in ("llama", "hybrid", "moe"):
        (folder / f"{name}-tp1" / "latest_checkpointed_iteration.txt").write_text("3")

    model, args = _model(LLAMA)
    model.output_layer.weight.data[0, 0] = float("nan")
    _save(_sharded(model), args, folder / "nan")
    args.num_query_groups = 4
    _save(_sharded(model), args, folder / "wrong-args")

    _layout(ep=2)
    moe, args = _model([*MOE, "--expert-model-parallel-size", "2"])
    state = dist_checkpointing.load(_sharded(moe), str(originals["moe"]))
    moe.load_state_dict({k: v for k, v in state.items() if "." in k}, strict=False)
    _save(_sharded(moe), args, folder / "moe-ep2")
    alone = {"dp_cp_group": _data_group(), "singleton_local_shards": True}
    one_by_one = moe.sharded_state_dict(metadata=alone)
    _save(one_by_one, args, folder / "moe-ep2-one-by-one", singleton_local_shards=True)

    for name, flags, tp, pp in (
        ("llama", LLAMA, 2, 1),
        ("gpt2", GPT2, 2, 1),
        ("llama", LLAMA, 1, 2),
        ("hybrid", HYBRID, 2, 1),
        ("hybrid", [f.replace("M*M-", "M*|M-") for f in HYBRID], 1, 2),
    ):
        _layout(tp, pp)
        model, args = _model(flags, tp, pp)
        state = dist_checkpointing.load(_sharded(model), str(originals[name]))
        model.load_state_dict({k: v for k, v in state.items() if "." in k}, strict=False)
        # Optimizer state and newer key layouts travel with the model in real checkpoints.
        content = {"non_homogeneous_layers": True} if pp == 2 else {}
        group = {"dp_cp_group": _data_group()}
        state = model.sharded_state_dict(metadata=group | content)
        if tp == 2:
            state |= _optimizer_state(model)
        _save(state, args, folder / f"{name}-tp{tp}pp{pp}", **content)
    return {"logits": logits}


def _data_group():
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _optimizer_state(model) -> dict:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    moments = {}
    for name, value in _sharded(model).items():
        if isinstance(value, ShardedTensor):
            key = f"optimizer.state.exp_avg.{value.key}"
            moments[f"moment.{name}"] = replace(value, key=key, data=torch.ones_like(value.data))
    return moments


def _edit_metadata(folder: Path, edit) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))


def damage(folder: Path) -> None:
    """Copies of one checkpoint that lack something or hold too much."""
    base = folder / "llama-tp1" / "iter_0000003"
    for name in ("missing", "unexpected", "hole", "truncated", "gone", "pickle"):
        shutil.copytree(base, folder / name)
    norm = "decoder.final_layernorm.weight"
    _edit_metadata(folder / "missing", lambda keys: keys.pop(norm))
    _edit_metadata(folder / "unexpected", lambda keys: keys.update({"decoder.extra": keys[norm]}))
    head = "output_layer.weight"
    _edit_metadata(folder / "hole", lambda keys: keys[head].chunks.clear())
    shutil.copytree(folder / "moe-ep2-one-by-one", folder / "lost-expert")
    expert = "decoder.layers.2.mlp.experts.experts.3.linear_fc2.weight"
    _edit_metadata(folder / "lost-expert", lambda keys: keys.pop(expert))
    largest = max((folder / "truncated").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    for path in (folder / "gone").glob("*.distcp"):
        path.unlink()


def read_in_job(rank: int, folder: Path) -> dict:
    """Load inside a TP=2 job, on both ranks and on one alone; share a step's work."""
    from torch.distributed import distributed_c10d

    _layout(tp=2)
    torch.manual_seed(5)
    before = torch.get_rng_state(), _saved_tracker_states()
    groups = distributed_c10d._world.group_count
    hidden = {}
    names = [f"{model}-{layout}" for model in ("llama", "hybrid") for layout in LAYOUTS]
    for name in (*names, "gpt2-tp2pp1"):
        teacher = load_teacher(
            name, f"megatron:{folder / name}", params_dtype=torch.float32, device="cpu"
        )
        hidden[name] = teacher.hidden_states(tokens())
    experts = ExpertRanks(dist.group.WORLD, dist.group.WORLD)
    of_experts, unequal = _with_experts_on_both(rank, folder, experts)
    facts = {"rng": _untouched(before), "groups": distributed_c10d._world.group_count - groups}

    teacher = load_teacher(
        "coder", f"megatron:{folder / 'llama-tp1'}", params_dtype=torch.float32, device="cpu"
    )
    mask = torch.ones(SEQUENCES, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    mask[1::2, :, 6:, :6] = True
    shared = {}
    for count in (0, 1, 2, 5):
        inputs = tokens()[:count], positions()[:count], mask[:count]
        plain = shared_forward(teacher, *inputs, group=None, max_sequences=1, layers=(0, 1))
        parts = shared_forward(
            teacher, *inputs, group=dist.group.WORLD, max_sequences=1, layers=(0, 1)
        )
        shared[count] = (plain, parts)
    half = load_teacher(
        "coder", f"megatron:{folder / 'llama-tp1'}", params_dtype=torch.bfloat16, device="cpu"
    )
    shared["bf16"] = tuple(
        shared_forward(half, tokens(), group=group, max_sequences=1)
        for group in (None, dist.group.WORLD)
    )
    one_mask = shared_forward(
        teacher, tokens(), None, mask[1:2], group=dist.group.WORLD, max_sequences=2
    )

    alone = None
    if rank == 1:
        source = f"megatron:{folder / 'gpt2-tp2pp1'}"
        alone = load_teacher("one", source, params_dtype=torch.float32, device="cpu")
        alone = alone.hidden_states(tokens())
    later = dist.new_group([0, 1])
    meeting = torch.ones(1)
    dist.all_reduce(meeting, group=later)
    facts |= {"meeting": meeting.item(), "training": teacher._model.training}
    facts["trainable"] = sum(p.requires_grad for p in teacher._model.parameters())
    facts |= {"of_experts": of_experts, "unequal": unequal}
    return facts | {"hidden": hidden, "shared": shared, "one_mask": one_mask, "alone": alone}


def _with_experts_on_both(rank: int, folder: Path, experts: ExpertRanks) -> tuple[dict, list]:
    """States where each rank holds half of the experts, of each folder of ``EXPERTS``, and of
    samples of which rank 0 has five and rank 1 has none, then the reverse, in passes of two."""
    states, unequal = {}, []
    for name in EXPERTS:
        teacher = load_teacher(
            name,
            f"megatron:{folder / name}",
            params_dtype=torch.float32,
            device="cpu",
            experts=experts,
        )
        states[name] = teacher.hidden_states(tokens())
    for first in (0, 1):
        own = tokens() if rank == first else tokens()[:0]
        unequal += shared_forward(teacher, own, group=None, max_sequences=2)
        lengths = [[LENGTH - 7, 7]] * len(own)
        unequal += document_forward(teacher, own, lengths, group=None)
    with pytest.raises(RecipeError, match="its part"):
        experts.agree_loaded(None if rank else RecipeError("its part is damaged"))
    return states, unequal


def read_alone(folder: Path) -> dict:
    """Load in a world of one: the undamaged ones, and the errors of the others."""
    _layout()
    hidden, heads, errors = {}, {}, {}
    transforms = {}
    names = ("llama-tp1", "llama-tp2pp1", "gpt2-tp1/iter_0000003", "gpt2-tp2pp1", "hybrid-tp1")
    for name in (*names, "mup-tp1/iter_0000003", *EXPERTS):
        teacher = load_teacher(
            name, f"megatron:{folder / name}", params_dtype=torch.float32, device="cpu"
        )
        hidden[name] = teacher.hidden_states(tokens())
        heads[name] = teacher.head_weight(0, ROWS + 8), teacher.head_weight(7, 50)
        transforms[name] = teacher.logit_transform.scale
    of_documents = document_forward(teacher, tokens(), [[LENGTH - 7, 7]] * SEQUENCES, group=None)
    for name in ("nan", "wrong-args", "lost-expert", "missing", "unexpected", "hole"):
        try:
            source = f"megatron:{folder / name}"
            load_teacher("coder", source, params_dtype=torch.float32, device="cpu")
        except RecipeError as error:
            errors[name] = str(error)
    os.environ |= {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0"}
    os.environ.pop("NVTE_UNFUSED_ATTN", None)
    load_teacher("x", f"megatron:{folder / 'llama-tp1'}", params_dtype=torch.float32, device="cpu")
    switches = {k: v for k, v in os.environ.items() if k.startswith("NVTE_")}
    return {
        **{"hidden": hidden, "heads": heads, "scales": transforms},
        **{"errors": errors, "switches": switches, "of_documents": of_documents[0]},
    }
