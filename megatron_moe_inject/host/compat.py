"""The only place that knows Megatron versions.

Everything else asks this module for symbols whose place or signature changed between
Megatron-Core 0.18, 0.19 and the development branch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.megatron_types import Chunk, Groups, Optimizer
from megatron_moe_inject.host.uses import HELPERS
from megatron_moe_inject.host.wrap import Call, wrap_function, wrap_of

if TYPE_CHECKING:
    import torch

SUPPORTED = ("0.18.2", "0.19", "0.20 (development)")


def megatron_version() -> str:
    """Version of the Megatron-Core that is imported, with the commit of a checkout of its own.

    Megatron asks git about the folder that it lies in, so one that is installed below some other
    checkout would be given that one's commit.
    """
    from megatron.core import package_info

    is_checkout = (Path(package_info.__file__).resolve().parents[2] / ".git").exists()
    return package_info.__version__ if is_checkout else package_info.__version__.partition("+")[0]


def call_with_pre_wrap_hook(
    setup_model_and_optimizer: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    hook: Callable[[list[Chunk]], list[Chunk]],
) -> Any:
    """Call ``setup_model_and_optimizer`` so that ``hook`` sees the bare chunks before DDP does.

    0.19 scripts hand over a model config with ``pre_wrap_hooks``; otherwise (0.18, or a script
    that passes ``model_provider``) the provider is wrapped, and the hook then gets each virtual
    pipeline chunk on its own.
    """
    bound = inspect.signature(setup_model_and_optimizer).bind(*args, **kwargs)
    container = bound.arguments.get("cfg_container")
    model_config = getattr(container, "model", None)
    if model_config is not None:
        model_config.pre_wrap_hooks.append(hook)
        try:
            return setup_model_and_optimizer(*bound.args, **bound.kwargs)
        finally:
            model_config.pre_wrap_hooks.remove(hook)
    provider = bound.arguments["model_provider_func"]

    def hooked_provider(*provider_args: Any, **provider_kwargs: Any) -> Chunk:
        return hook([provider(*provider_args, **provider_kwargs)])[0]

    bound.arguments["model_provider_func"] = hooked_provider
    return setup_model_and_optimizer(*bound.args, **bound.kwargs)


def bare_chunks(model: Sequence[torch.nn.Module]) -> list[Chunk]:
    """Model chunks without DDP and Float16 wrappers."""
    from megatron.core.utils import unwrap_model

    return list(unwrap_model(list(model)))


def tokenizer_vocab_size() -> int:
    """Ids of the tokenizer that Megatron built from its flags, without padding."""
    from megatron.training.global_vars import get_tokenizer

    return int(get_tokenizer().vocab_size)


def tokenize() -> Callable[[str], list[int]] | None:
    """Ids of a text, by Megatron's tokenizer; None for one that has no text."""
    from megatron.training import get_args
    from megatron.training.global_vars import get_tokenizer

    if get_args().tokenizer_type.startswith("Null"):
        return None
    return get_tokenizer().tokenize


def end_of_text() -> int | None:
    """The id that ends a document, by Megatron's tokenizer; None for one that has none."""
    from megatron.training import get_args
    from megatron.training.global_vars import get_tokenizer

    if get_args().tokenizer_type.startswith("Null"):
        return None
    try:
        found = get_tokenizer().eod
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, int) and found >= 0 else None


def text_length() -> Callable[[list[int]], int] | None:
    """UTF-8 length of ids as text, by Megatron's tokenizer; None for one that has no text.

    Special tokens, such as an end of document, have no length where the tokenizer can leave them
    out.
    """
    from megatron.training import get_args
    from megatron.training.global_vars import get_tokenizer

    if get_args().tokenizer_type.startswith("Null"):
        return None
    detokenize = get_tokenizer().detokenize
    options = accepted(detokenize, {"skip_special_tokens": True})
    return lambda ids: len(detokenize(ids, **options).encode("utf-8", "replace"))


def validation_loader(dataset: Any, consumed_samples: int) -> Any:
    """Megatron's data loader over a dataset."""
    from megatron.training import training

    build = training.build_pretraining_data_loader
    return getattr(build, "__wrapped__", build)(dataset, consumed_samples)


def evaluate_before_training(train: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Evaluate with what ``train`` is about to be called with, as its loop would.

    The hooks that gather parameters in the forward pass are off meanwhile, as in the loop's own
    evaluations: what was loaded is complete. Samples that are read do not count as consumed.
    """
    from megatron.training import get_args, training

    options = get_args()
    bound = inspect.signature(train).bind(*args, **kwargs).arguments
    evaluate = training.evaluate_and_print_results
    iteration = optimizer_steps(options)
    arguments = {
        "prefix": f"iteration {iteration} before training",
        "forward_step_func": bound["forward_step_func"],
        "data_iterator": bound["valid_data_iterator"],
        "model": bound["model"],
        "iteration": iteration,
        "process_non_loss_data_func": bound["process_non_loss_data_func"],
        "config": bound["config"],
        "non_loss_data_func": bound.get("non_loss_data_func"),
        "pg_collection": bound.get("pg_collection"),
        "p2p_communicator": bound.get("p2p_communicator"),
    }
    consumed = options.consumed_valid_samples
    hooked = training.should_disable_forward_pre_hook(options)
    if hooked:
        training.disable_forward_pre_hook(bound["model"], param_sync=False)
    evaluate(**accepted(evaluate, arguments))
    if hooked:
        training.enable_forward_pre_hook(bound["model"])
    options.consumed_valid_samples = consumed


def evaluate_all(given: dict[str, Any], data_iterator: Any, batches: int) -> bool:
    """Evaluate on other data, as ``evaluate_and_print_results`` does on the data that it is given;
    whether there was time for all of it. Samples that are read do not count as consumed.

    Args:
        given: arguments of ``evaluate_and_print_results`` by name.
        data_iterator: of the other data.
        batches: how many there are.
    """
    from megatron.training import get_args, training

    options = get_args()
    consumed = options.consumed_valid_samples
    arguments = {**given, "data_iterator": data_iterator, "eval_iters": batches}
    arguments |= {"process_non_loss_data_func": None, "non_loss_data_func": None}
    *_, out_of_time = training.evaluate(**accepted(training.evaluate, arguments))
    options.consumed_valid_samples = consumed
    return not out_of_time


def bound_arguments(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> dict:
    """The arguments of a call by name."""
    return inspect.signature(function).bind(*args, **kwargs).arguments


def run_forward_pre_hooks(module: torch.nn.Module, *inputs: Any) -> None:
    """Run a module's forward pre-hooks, for code that uses its weight without calling it.

    Under ``--overlap-param-gather`` DDP's pre-hook waits for the all-gather of the module's
    parameters; before it the weight is stale. What other hooks return is not used.
    """
    takes_kwargs = module._forward_pre_hooks_with_kwargs
    for key, hook in list(module._forward_pre_hooks.items()):
        hook(module, inputs, {}) if key in takes_kwargs else hook(module, inputs)


def process_groups(chunk: Chunk) -> Groups:
    """The ``ProcessGroupCollection`` that a bare model chunk was built with."""
    groups = getattr(chunk, "pg_collection", None)
    if groups is not None and all(hasattr(groups, g) for g in ("tp", "pp", "cp", "mp", "tp_cp")):
        return groups
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def schedule_groups() -> Groups:
    """The ``ProcessGroupCollection`` that a pipeline schedule makes when it is given none.

    It must be given one along with a communicator. 0.18 makes it inside its schedules.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.process_groups_config import ProcessGroupCollection

    if hasattr(schedules, "_build_default_pg_collection"):
        return schedules._build_default_pg_collection()
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return groups


def use_prebuilt_dataset_helpers() -> None:
    """Use the compiled dataset helper that is there instead of running ``make`` at every start.

    ``megatron.training.initialize`` runs ``make`` in the package folder and exits when that
    fails. Wheels (0.17 to 0.19) ship the compiled helper but no Makefile, so there it always
    fails; in a checkout it compiles for the ``python3`` of the PATH, which need not be this one.
    The stock build still runs when the helper is missing or older than its source. Idempotent.
    """
    from megatron.core.datasets import utils

    def compile_helpers(call: Call) -> None:
        folder = os.path.dirname(utils.__file__)
        helper = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
        source = os.path.join(folder, "helpers.cpp")
        built = None if helper is None else helper.origin
        if built is None or (
            os.path.exists(os.path.join(folder, "Makefile"))
            and os.path.getmtime(built) < os.path.getmtime(source)
        ):
            call()

    if wrap_of(utils.compile_helpers) is None:
        wrap_function(HELPERS, compile_helpers)


def megatron_origin() -> tuple[str, list[str]]:
    """Where the imported Megatron comes from, and what would be taken from elsewhere.

    ``megatron`` is a namespace package: ``core`` of one checkout or wheel and ``training`` of
    another are imported side by side without a word. The second value lists the packages found
    outside the first folder that it does not have itself (``.../megatron/post_training``).
    """
    import megatron
    import megatron.core

    root = os.path.dirname(os.path.dirname(os.path.abspath(megatron.core.__file__)))
    foreign = []
    for folder in map(os.path.abspath, megatron.__path__):
        for part in ("core", "training", "post_training"):
            package = os.path.join(folder, part)
            missing_at_home = not os.path.isdir(os.path.join(root, part))
            if folder != root and os.path.isdir(package) and missing_at_home:
                foreign.append(package)
    return root, foreign


@functools.cache
def say_which_megatron() -> None:
    """Print, once per process, which Megatron is used, and warn when two would mix."""
    root, foreign = megatron_origin()
    print(f"moe-inject: Megatron-Core {megatron_version()} from {root}", flush=True)
    if foreign:
        print(
            f"moe-inject: warning: {', '.join(foreign)} would come from another Megatron and mix "
            "in silently; keep one Megatron on PYTHONPATH",
            flush=True,
        )


def batch_on_this_tp_rank(batch: dict, *, packed: bool, **arguments: Any) -> dict:
    """Stock ``get_batch_on_this_tp_rank``; 0.18 calls the packed flag ``is_sft``."""
    from megatron.core.utils import get_batch_on_this_tp_rank as stock

    flag = "has_cu_seqlens" if "has_cu_seqlens" in inspect.signature(stock).parameters else "is_sft"
    return stock(batch, **{flag: packed}, **arguments)


def flatten_packed_batch(batch: dict) -> dict:
    """Stock ``flatten_batch_for_packed_sequences`` (0.19+); 0.18 has one sample per pack."""
    from megatron.core import utils

    flatten = getattr(utils, "flatten_batch_for_packed_sequences", None)
    return batch if flatten is None else flatten(batch)


def batch_on_this_cp_rank(batch: dict, *, per_sequence: bool, **arguments: Any) -> dict:
    """Stock ``get_batch_on_this_cp_rank``; 0.18 cannot balance packs per sequence."""
    from megatron.core.utils import get_batch_on_this_cp_rank as stock

    if "use_per_sequence_balancing" in inspect.signature(stock).parameters:
        arguments["use_per_sequence_balancing"] = per_sequence
    return stock(batch, **arguments)


def accepted(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those ``arguments`` that this version of ``function`` (or dataclass) has."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def model_config(args: Any) -> Any:
    """Megatron's own model config with its builder: of a hybrid model where there is a pattern,
    else of GPT (0.19+); None where there is none (GPT in 0.18)."""
    from megatron.training import argument_utils

    if getattr(args, "hybrid_layer_pattern", None) is not None:
        return argument_utils.hybrid_config_from_args(args)
    from_args = getattr(argument_utils, "gpt_config_from_args", None)
    return None if from_args is None else from_args(args)


def logs_balance_of_any_stage() -> bool:
    """Whether Megatron's log of balance losses takes hybrid stages without experts (0.20 does)."""
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

    return "num_moe_layers" in inspect.signature(MoEMetricsTracker.report).parameters


def numbers_experts_of_prediction() -> bool:
    """Whether Megatron logs the experts behind a pattern's slash by numbers of their own, for which
    its log has one place for each depth (0.20, since the same change: Megatron-LM #6748)."""
    return logs_balance_of_any_stage()


def builds_from_config() -> bool:
    """Whether ``pretrain`` builds the model that its config describes (0.19+); that of 0.18 takes a
    ``model_provider`` alone."""
    from megatron.training import training

    parameters = inspect.signature(training.pretrain).parameters
    return parameters["model_provider"].default is not inspect.Parameter.empty


def translates_gpt_checkpoints() -> bool:
    """Whether Megatron loads a GPT model's checkpoint into a hybrid model (0.19+)."""
    interop = "megatron.core.dist_checkpointing.gpt_checkpoint_interop"
    return importlib.util.find_spec(interop) is not None


def first_node(layer_plan: Any) -> Any:
    """The node of a layer's schedule plan that runs first; 0.18 calls it ``attn``."""
    if hasattr(layer_plan, "pre_dispatch_computation"):
        return layer_plan.pre_dispatch_computation
    return layer_plan.attn


def step_was_rejected() -> bool:
    """Whether a check of Megatron's rerun state machine failed in the step that just ran.

    It then repeats the step to tell a faulty device from a faulty run, and ends the run.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    return bool(getattr(get_rerun_state_machine(), "rerun_requested", False))


def take_step_back() -> None:
    """Let Megatron's rerun machinery, which is saved with a checkpoint, forget the step that it has
    begun and that will not be made."""
    from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

    machine = get_rerun_state_machine()
    if machine.state != RerunState.NOT_RUNNING_YET:
        machine.state = RerunState.NOT_RUNNING_YET
        machine.current_iteration -= 1


def runs_in_high_precision(config: Any, layer: int) -> bool:
    """Whether a model that trains in FP8 runs a 0-based decoder layer without it."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    return is_first_last_bf16_layer(config, layer)


def logit_scale(config: Any) -> float:
    """What a GPT model with this ``TransformerConfig`` multiplies its logits by (MuP)."""
    return float(config.mup_output_mult) if getattr(config, "use_mup", False) else 1.0


def optimizer_steps(args: Any) -> int:
    """Optimiser steps taken since the start of training, a resumed run's earlier ones included.

    Megatron's loop sets ``curr_iteration`` before each step; before the first, and in a run that
    only evaluates, it is where the checkpoint left off.
    """
    return int(getattr(args, "curr_iteration", None) or args.iteration or 0)


def batch_sizes(args: Any) -> list[int]:
    """Samples of each iteration of the whole run, from the first, by Megatron's own calculator.

    To be called before training starts: like Megatron, when it counts the iterations of a run, it
    moves the calculator on and back to the start.
    """
    from megatron.core import num_microbatches_calculator as calculator

    iterations, samples = args.train_iters, args.train_samples or 0
    if not iterations and not getattr(args, "step_batch_size_schedule", None):
        iterations = samples // args.global_batch_size  # a batch that is not full is not trained on
    sizes: list[int] = []
    consumed = 0
    while len(sizes) < iterations if iterations else consumed < samples:
        calculator.update_num_microbatches(consumed, consistency_check=False)
        sizes.append(calculator.get_current_running_global_batch_size())
        consumed += sizes[-1]
    calculator.update_num_microbatches(0, consistency_check=False)
    return sizes


def optimized_part(optimizer: Optimizer, parameter: torch.nn.Parameter) -> tuple[slice, int | None]:
    """Which part of a flat parameter this rank's optimizer updates, and how many ranks do.

    Returns:
        The part; and of a distributed optimizer the number of its instances, which update the same,
        ``None`` of one that updates whole parameters.
    """
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        parts = getattr(inner, "model_param_gbuf_map", {})
        if not any(parameter in buffer.param_index_map for buffer in getattr(inner, "buffers", ())):
            continue
        part = slice(0, 0)
        if parameter in parts:
            param_range = inner._get_model_param_range_map(parameter)["param"]
            part = slice(param_range.start, param_range.end)
        return part, inner.ddp_config.num_distributed_optimizer_instances
    return slice(0, parameter.numel()), None


def optimized_values(parameter: torch.nn.Parameter, part: slice) -> torch.Tensor:
    """What an optimizer updates of a parameter, flat: its float32 values where it keeps some."""
    main = getattr(parameter, "main_param", None)
    if main is None:
        return parameter.detach().view(-1)[part]
    values = main.detach().view(-1)
    return values if getattr(parameter, "main_param_sharded", False) else values[part]


def seconds_in_steps() -> float:
    """Seconds that this process spent in training steps so far, evaluations and saving excluded;
    exact right after Megatron logged."""
    from megatron.training.global_vars import get_timers

    return get_timers()("interval-time", log_level=0).active_time()


def sharded_state_metadata(args: Any) -> dict[str, Any]:
    """What this Megatron passes to ``sharded_state_dict`` when it saves with these arguments."""
    from megatron.training import checkpointing

    build = checkpointing._build_sharded_state_dict_metadata
    return build(args)
