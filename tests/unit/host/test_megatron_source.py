"""What Megatron's source does where the plugin steps in: an addition there must be looked at.

The loss takes the place of the end of ``GPTModel.forward`` and ``HybridModel.forward``: the output
layer's own forward pass and the cross-entropy behind it. Whatever these read, the plugin serves,
refuses or has no use for; a name that stands in none of these tables is new, and this test fails
until somebody has decided. The same for what ``train_step`` calls from the optimizer's step on,
which could move frozen parameters. Sources are read, not imported, so that one run looks at all
versions that are there.

A refused option that Megatron renames would never be refused again: each is one that a parser has.
"""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest

from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.refused_options import REFUSED

ROOTS = {"this": Path(megatron.core.__file__).resolve().parents[1]}
"""Sources by what they are: what is installed; 0.18.2 beside it; a checkout, if one is named."""
for name, variable in (("other", "MEGATRON_OTHER"), ("checkout", "MEGATRON_CHECKOUT")):
    if variable in os.environ:
        ROOTS[name] = Path(os.environ[variable], "megatron")
VERSIONS = pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)

GPT = ("core/models/gpt/gpt_model.py", "GPTModel._postprocess")
HYBRID = ("core/models/hybrid/hybrid_model.py", "HybridModel.forward")
"""From where it runs the decoder on."""
PREDICTION = ("core/transformer/multi_token_prediction.py", "process_mtp_loss")
CROSS_ENTROPY = (
    "core/models/common/language_module/language_module.py",
    "LanguageModule.compute_language_model_loss",
)
SCALE = (CROSS_ENTROPY[0], "LanguageModule._scale_logits")
OUTPUT_LAYER = ("core/tensor_parallel/layers.py", "ColumnParallelLinear.forward")
FROZEN_PRODUCT = (OUTPUT_LAYER[0], "linear_with_frozen_weight")
TRAINED_PRODUCT = (OUTPUT_LAYER[0], "linear_with_grad_accumulation_and_async_allreduce")

CONFIG = {
    "use_mup": "served: compat.logit_scale",
    "mup_output_mult": "served: compat.logit_scale",
    "mtp_num_layers": "multi-token prediction runs before the output processor",
    "defer_embedding_wgrad_compute": "refused",
    "wgrad_deferral_limit": "only with defer_embedding_wgrad_compute",
    "cross_entropy_loss_fusion": "another way to the same cross-entropy",
    "cross_entropy_fusion_impl": "another way to the same cross-entropy",
    "cuda_graph_impl": "refused for whole steps",
    "_cpu_offloading_context": "is entered inside the decoder alone",
    "cpu_offloading": "inside _cpu_offloading_context",
    "cpu_offloading_activations": "inside _cpu_offloading_context",
    "materialize_only_last_token_logits": "inference's",
    "inference_cuda_graph_scope": "inference's",
}
"""What these functions read of configs, and what the plugin makes of it."""
OF_LAYER = {
    "allreduce_dgrad": "served: reduce_hidden_grad",
    "sequence_parallel": "served: the states are gathered",
    "gradient_accumulation_fusion": "served: accumulate_main_grad",
    "tp_group": "served",
    "weight": "served",
    "bias": "a GPT model's output layer has none",
    "skip_bias_add": "a GPT model's output layer has none",
    "gather_output": "whole logits, which never exist",
    "gtp_remat_size": "refused: gtp_weight_remat_size",
    "embedding_activation_buffer": "defer_embedding_wgrad_compute",
    "grad_output_buffer": "defer_embedding_wgrad_compute",
    "explicit_expert_comm": "of layers in experts",
    "disable_grad_reduce": "of adapters",
    "input_size": "sizes",
    "output_size_per_partition": "sizes",
    "use_inference_optimized_all_gather": "inference's",
    "training": "inference's",
    "config": "see CONFIG",
    "output_dtype": "refused: logit_dtype",
    "_forward_impl": "the two products",
}
CALLED = {
    GPT: {
        "process_mtp_loss", "self.mtp", "output_processor", "self.output_layer",
        "self._scale_logits", "self.compute_language_model_loss",
        "self.shared_embedding_or_output_weight",
        *("has_config_logger_enabled", "log_config_to_disk", "OrderedDict"),  # refused
        *("InferenceMode.is_active", "gather_from_sequence_parallel_region"),  # inference
    },
    HYBRID: {
        "self.decoder", "self.mtp", "process_mtp_loss", "output_processor", "self.output_layer",
        "self._scale_logits", "self.compute_language_model_loss",
        "self.shared_embedding_or_output_weight",
        "gather_from_sequence_parallel_region",  # inference
    },
    OUTPUT_LAYER: {
        "self._forward_impl", "copy_to_tensor_model_parallel_region",
        "gather_from_tensor_model_parallel_region", "RuntimeError", "len", "tuple",
        "inference_all_gather_from_tensor_model_parallel_region",
        "self.embedding_activation_buffer.append",
    },
    FROZEN_PRODUCT: {
        "LinearWithFrozenWeight.apply", "gather_from_sequence_parallel_region",
        "get_tensor_model_parallel_group_if_none", "weight.all_gather_and_prefetch",
    },
    TRAINED_PRODUCT: {
        "LinearWithGradAccumulationAndAsyncCommunication.apply", "os.environ.get",
        "warnings.warn", "get_tensor_model_parallel_group_if_none",
    },
    CROSS_ENTROPY: {
        "fused_vocab_parallel_cross_entropy", "te_parallel_cross_entropy",
        "tensor_parallel.vocab_parallel_cross_entropy", "torch.as_strided", "hasattr",
        *("is_te_min_version", "get_te_version", "AssertionError", "RuntimeError"),
    },
    SCALE: set(),
}  # fmt: skip
"""What each of them calls, methods of tensors and of inference's contexts left out."""
OUTPUT_LAYERS = {"TELMHeadColumnParallelLinear", "tensor_parallel.ColumnParallelLinear"}
"""What a GPT model's output layer can be; the first is refused as ``fp8_output_proj``."""
AFTER_THE_STEP = {
    "optimizer.step": "moves what trains",
    "clip_qk": "moves attention: refused where it is frozen",
    "unwrapped_model.update_momentum": "of vision models",
    "unwrap_model": "of vision models",
    "opt_param_scheduler.step": "moves learning rates",
    "_save_state_dict": "reads",
    "logical_and_across_model_parallel_group": "numbers",
    "reduce_max_stat_across_model_parallel_group": "numbers",
    "torch.distributed.all_reduce": "of losses",
    "torch.cat": "losses",
    "torch.vstack": "losses",
    "torch.cuda.empty_cache": "memory",
    "timers": "times",
    "ValueError": "errors",
    "getattr": "looks",
    "bool": "looks",
    "_otel_set_attrs": "tells a tracer",
    "get_num_microbatches": "numbers",
    "get_attr_wrapped_model": "groups",
    "ProcessGroupCollection.use_mpu_process_groups": "groups",
    "is_pp_last_stage": "groups",
    "mpu.is_pipeline_last_stage": "groups",
    "mpu.get_data_parallel_group": "groups",
}
"""What ``train_step`` calls from ``optimizer.step()`` on, and what that can move."""


def function(root, file, name):
    tree = ast.parse((root / file).read_text())
    for part in name.split("."):
        tree = next(
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
        )
    return tree


def dotted(node):
    """``a.b.c`` as written; "" where it begins with something else than a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def called(nodes, objects=()):
    """What is called in ``nodes``, but for methods of those ``objects``."""
    calls = (c for node in nodes for c in ast.walk(node) if isinstance(c, ast.Call))
    names = {dotted(call.func) for call in calls} - {""}
    return {name for name in names if name.split(".")[0] not in objects or "." not in name}


def read_of(tree, owner):
    """Attributes of ``owner`` that are read or set."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if dotted(node.value) in owner}


@VERSIONS
@pytest.mark.parametrize("where", CALLED, ids=[name for _, name in CALLED])
def test_what_the_loss_stands_in_for_does_nothing_unknown(root, where):
    tree = function(root, *where)
    if where == HYBRID:
        start = next(i for i, part in enumerate(tree.body) if "self.decoder" in called([part]))
        tree = ast.Module(tree.body[start:], [])
    objects = {"hidden_states", "logits", "labels", "loss", "inference_context"}
    assert called([tree], objects) - CALLED[where] == set()
    configs = read_of(tree, {"config", "self.config", "inference_context.config"})
    assert configs - set(CONFIG) == set()
    if where == OUTPUT_LAYER:
        assert read_of(tree, {"self"}) - set(OF_LAYER) == set()


@VERSIONS
def test_prediction_calls_the_output_layer_once_for_each_depth_before_the_model_does(root):
    """The seam of a hybrid model counts these calls."""
    (depths,) = (n for n in ast.walk(function(root, *PREDICTION)) if isinstance(n, ast.For))
    assert ast.unparse(depths.iter) == "range(config.mtp_num_layers)"
    calls = [dotted(n.func) for n in ast.walk(function(root, *PREDICTION)) if hasattr(n, "func")]
    within = [dotted(n.func) for n in ast.walk(depths) if hasattr(n, "func")]
    assert within.count("output_layer") == calls.count("output_layer") == 1
    body = function(root, *HYBRID).body
    lines = [
        [i for i, part in enumerate(body) if name in called([part])]
        for name in ("process_mtp_loss", "self.output_layer", "self.compute_language_model_loss")
    ]
    assert lines == sorted(lines)
    assert all(len(found) == 1 for found in lines)


def output_layer_made(tree):
    """The one assignment to ``self.output_layer``."""
    (made,) = (
        node for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "self.output_layer"
    )  # fmt: skip
    given = {word.arg: word.value for word in made.value.keywords}
    assert given["bias"].value is False
    return made.value


@VERSIONS
def test_the_output_layer_of_a_hybrid_model_is_the_one_that_is_known(root):
    made = output_layer_made(function(root, HYBRID[0], "HybridModel.__init__"))
    assert dotted(made.func) == "tensor_parallel.ColumnParallelLinear"


@VERSIONS
def test_the_output_layer_is_one_that_is_known_and_has_no_bias(root):
    tree = function(root, "core/models/gpt/gpt_model.py", "GPTModel.__init__")
    output_layer_made(tree)
    chosen = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "output_layer_cls"
    ]  # fmt: skip
    kinds = [node for c in chosen for node in (c.value.body, c.value.orelse)]
    assert {dotted(kind) for kind in kinds} == OUTPUT_LAYERS


@VERSIONS
def test_after_the_optimizers_step_nothing_unknown_moves_parameters(root):
    body = function(root, "training/training.py", "train_step").body
    names = [called([statement]) for statement in body]
    start = next(i for i, found in enumerate(names) if "optimizer.step" in found)
    assert called(body[start:], {"val", "losses_reduced"}) - set(AFTER_THE_STEP) == set()


def test_what_is_said_to_be_refused_is():
    names = {option.name for option in REFUSED}
    said = {key for key, what in CONFIG.items() if what == "refused"}
    said |= {"config_logger_dir", "fp8_output_proj", "gtp_weight_remat_size", "logit_dtype"}
    assert said <= names
    assert "qk_clip" in {option.name for option in refusals()}


@functools.cache
def options(root):
    """What a parser of Megatron's sets in its arguments, and what its training code reads there."""
    code = (
        "import argparse, json; "
        "from megatron.training.arguments import add_megatron_arguments as add; "
        "print(json.dumps([a.dest for a in add(argparse.ArgumentParser())._actions]))"
    )
    paths = [str(root.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    parsed = set(json.loads(done.stdout.splitlines()[-1]))
    assert len(parsed) > 500
    text = "\n".join(path.read_text() for path in (root / "training").glob("*.py"))
    return parsed, parsed | set(re.findall(r"\bargs(?:\.|, [\"'])(\w+)", text))


def refusals():
    """What the plugin and its features refuse."""
    yield from REFUSED
    for feature in FEATURES:
        for beside in feature.refuses:
            yield from beside.options


def test_every_refused_option_is_one_of_megatrons():
    released = [options(ROOTS[name]) for name in ("this", "other") if name in ROOTS]
    for option in refusals():
        flag = option.flag.split()[0].removeprefix("--").replace("-", "_")
        parsed = any(flag in dests or option.name in dests for dests, _ in released)
        read = any(option.name in names for _, names in released)
        if option.since is None:
            assert read, f"no supported Megatron has {option.name}"
            assert parsed or option.name == "modelopt_enabled", f"no parser has {option.flag}"
        else:
            assert not read, f"{option.name} is in a released Megatron: leave out since"
    if "checkout" in ROOTS:
        parsed, _ = options(ROOTS["checkout"])
        new = {option.name for option in refusals() if option.since is not None}
        assert new - parsed == set()
