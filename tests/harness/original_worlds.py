"""The processes behind the tests of stored originals: every layout writes, every layout reads.

One process alone writes, then two in a job at each of their layouts write, and read what all have
written; then one alone reads. What is read must be what plain Megatron loads of the student.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.retention.originals import OriginalParameters
from tests.harness import teacher_worlds
from tests.harness.teacher_worlds import LLAMA, ROWS

MOE = [flag for flag in LLAMA if flag not in ("--untie-embeddings-and-output-weights",)]
MOE += ["--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"]
ALONE = {"one process": {}}
JOB = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
}
POLICIES = {
    "the first expert of the first layer": ({0: {0}}, (), None),
    "the last expert of the last layer": ({3: {3}}, (), None),
    "an expert in the middle": ({1: {2}}, (), None),
    "tied embeddings": ({}, ("embedding", "output_layer"), None),
    "the last norm and the routers": ({}, ("norms", "router"), None),
    "nothing of what is kept": ({0: {0}}, (), ("router",)),
}
"""Experts by layer, other components that train, and the components to keep originals of."""


def enter(rank: int, folder: Path) -> None:
    os.setpgrp()  # so that a rank ends together with the helper process of checkpoint writing
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    from megatron_moe_inject.host import cpu_lane

    cpu_lane.enable()
    if rank == 0:
        _alone(lambda: _base(folder))
        _alone(lambda: _write(folder, ALONE))
    _together(rank, folder, "write", lambda: _write(folder, JOB))
    found = _together(rank, folder, "read", lambda: _read(folder, JOB))
    if rank == 0:
        found += _alone(lambda: _read(folder, ALONE))
    torch.save(found, folder / f"found{rank}.pt")


def _alone(action):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result = action()
    dist.destroy_process_group()
    return result


def _together(rank, folder, name, action):
    meeting = f"file://{folder / name}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    result = action()
    dist.barrier()
    dist.destroy_process_group()
    return result


def _chunks(tp=1, pp=1, ep=1, vpp=None):
    """The bare chunks of a student, with weights that another call does not have."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.training.argument_utils import core_transformer_config_from_args

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, pp, vpp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    layout = ["--expert-model-parallel-size", str(ep), "--expert-tensor-parallel-size", "1"]
    layout += ["--sequence-parallel"] if tp > 1 else []
    layout += ["--num-layers-per-virtual-pipeline-stage", "1"] if vpp else []
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    args = teacher_worlds._arguments([*MOE, *layout], tp, pp)
    config = core_transformer_config_from_args(args)
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        chunk = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage),
            ROWS,
            args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            vp_stage=vp_stage,
        )
        teacher_worlds._randomize(chunk, seed=50 + stage)
        chunks.append(chunk)
    return chunks


def _metadata():
    return {"dp_cp_group": teacher_worlds._data_group(), "singleton_local_shards": False}


def _base(folder):
    from megatron.core import dist_checkpointing

    (chunk,) = _chunks()
    (folder / "base").mkdir()
    dist_checkpointing.save(chunk.sharded_state_dict(metadata=_metadata()), str(folder / "base"))


def _load_base(folder, chunks):
    """As plain Megatron loads a student."""
    from megatron.core import dist_checkpointing

    state = {
        f"model{i}": chunk.sharded_state_dict(metadata=_metadata())
        for i, chunk in enumerate(chunks)
    }
    found = dist_checkpointing.load(state, str(folder / "base"))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(found[f"model{i}"], strict=False)


def _originals(chunks, policy):
    experts, components, kept = POLICIES[policy]
    experts = {layer: frozenset(ids) for layer, ids in experts.items()}
    policy = FreezePolicy(experts, frozenset(components))
    policy.apply(chunks)
    return OriginalParameters(chunks, policy.described(), kept)


def _write(folder, layouts):
    for layout, sizes in layouts.items():
        chunks = _chunks(**sizes)
        _load_base(folder, chunks)
        for policy in POLICIES:
            _originals(chunks, policy).save(folder / f"{policy}, {layout}", _metadata(), "1dea")


def _read(folder, layouts):
    """What went wrong, and how many parameters of this rank were right."""
    found = []
    for layout, sizes in layouts.items():
        chunks = _chunks(**sizes)
        for policy in POLICIES:
            _load_base(folder, chunks)
            truth = {p: p.detach().clone() for chunk in chunks for p in chunk.parameters()}
            with torch.no_grad():
                for parameter in truth:
                    parameter.add_(1)
            for writer in (*ALONE, *JOB):
                originals = _originals(chunks, policy)
                case = (policy, writer, layout)
                try:
                    originals.load(folder / f"{policy}, {writer}", _metadata())
                except (RecipeError, LookupError) as error:
                    found.append((*case, repr(error), 0))
                    continue
                own = originals.parameters
                wrong = [p for p in own if not torch.equal(originals.of(p), truth[p])]
                found.append((*case, f"{len(wrong)} wrong" if wrong else "", len(own)))
    return found
