"""One rank of a large job in one process: a fake process group, and every tensor on meta.

``prepare`` makes Megatron's globals for a job of any size, ``simulated_rank`` is a context manager
inside which Megatron sees one rank of it. Collectives return at once and say nothing; what needs an
answer of other ranks is computed from the recipe instead (``stages``). Nothing is allocated.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch.distributed as dist

from megatron_moe_inject.host.cpu_lane import torch_device
from megatron_moe_inject.host.errors import RecipeError, one_line
from megatron_moe_inject.planning.layout import Layout
from megatron_moe_inject.planning.relaxed import relaxed
from megatron_moe_inject.recipe.flags import add_inject_arguments


class _Parser(ArgumentParser):
    """Megatron's parser, except that an error is one line and not its whole usage."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"Megatron flags: {message}")


def parse(flags: Sequence[str]) -> Namespace:
    """Megatron's arguments and the plugin's, parsed and not validated; unknown flags are left out.

    Raises:
        RecipeError: a flag without its value, or with a wrong one.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(prog="moe-inject plan", allow_abbrev=False)
    add_megatron_arguments(parser)
    if "--inject-recipe" not in parser._option_string_actions:
        add_inject_arguments(parser)
    return parser.parse_known_args(list(flags))[0]


def prepare(given: Namespace, gpus: int) -> Namespace:
    """Megatron's globals for a job with these arguments; to be called once in a process.

    Args:
        given: as ``parse`` gives them.

    Returns:
        The arguments that are built with (``relaxed``), validated by Megatron's own rules.

    Raises:
        RecipeError: Megatron refuses them, in its words.
    """
    from megatron.training import arguments, global_vars, training

    args = relaxed(given)
    # Nothing of a quantiser is built here, and looking for it needs packages that are not there.
    training.has_nvidia_modelopt = False
    args.rank, args.world_size, args.local_rank = 0, gpus, 0
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(gpus), LOCAL_WORLD_SIZE="8")
    Layout(
        gpus,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
    ).check(bool(args.num_experts))
    try:
        inspect.unwrap(arguments.validate_args)(args, {"tokenizer_type": "GPT2BPETokenizer"})
        global_vars.set_global_variables(args)
    except (AssertionError, ValueError, RuntimeError, OSError, ImportError) as error:
        raise RecipeError(f"Megatron flags: {one_line(str(error) or repr(error), 400)}") from error
    return args


@contextlib.contextmanager
def simulated_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Inside, process groups are those of one rank of the job, and a CUDA device is meta.

    Args:
        args: of ``prepare``.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training import initialize

    args.rank = rank
    with torch_device.on_meta(), _groups_of(rank):
        try:
            initialize._initialize_distributed(None, None, None)
            model_parallel_cuda_manual_seed(1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()


@contextlib.contextmanager
def _groups_of(rank: int) -> Iterator[None]:
    """Inside, only the groups of this rank are made: thousands of ranks have as many of others."""
    stock = dist.new_group

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return stock(ranks, *args, **kwargs)

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = stock
