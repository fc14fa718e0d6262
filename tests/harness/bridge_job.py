"""Run by a Python that has Megatron-Bridge: Bridge itself on the CPU lane, converting or training

    bridge_job.py convert FOLDER OUT [ours]   a Hugging Face folder into a checkpoint and out again
    bridge_job.py train FOLDER [--inject-...] Bridge's own pretrain() for three steps of mock data

Bridge imports Transformer Engine and ModelOpt wherever it stands, and a resiliency package that
Megatron-Core 0.19 wants newer than any on PyPI. Megatron is imported without them; after that their
names are empty classes. No layer of theirs is built: the model is of Megatron's local layers.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path

_STOOD_IN_FOR = ("transformer_engine", "transformer_engine_torch", "modelopt")
_NEEDS_A_GPU = {
    **dict.fromkeys(
        (
            *("moe_grouped_gemm", "bias_activation_fusion", "masked_softmax_fusion"),
            *("gradient_accumulation_fusion", "apply_rope_fusion", "moe_router_fusion"),
            *("moe_permute_fusion", "persist_layer_norm", "bias_dropout_fusion"),
            *("cross_entropy_loss_fusion", "bf16", "fp16"),
        ),
        False,
    ),
    "transformer_impl": "local",
}


class _Empty(types.ModuleType):
    """A module that has every name: classes, and modules that answer a call with nothing."""

    __path__ = ()
    __version__ = "2.20.0"

    def __getattr__(self, name: str):
        import torch

        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        value = _Empty(full) if name[0].islower() else type(name, (torch.nn.Module,), {})
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs) -> None:
        return None


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _STOOD_IN_FOR:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module) -> None:
        pass


def prepare() -> None:
    """The CPU lane, Megatron imported without what Bridge needs, then the stand-ins."""
    sys.modules["nvidia_resiliency_ext"] = None  # type: ignore[assignment]
    from megatron_moe_inject.host import cpu_lane

    cpu_lane.enable()
    import megatron.core.extensions.transformer_engine
    import megatron.core.models.hybrid.hybrid_layer_specs
    import megatron.training.training  # noqa: F401
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    for name in [name for name in sys.modules if name.partition(".")[0] in _STOOD_IN_FOR]:
        del sys.modules[name]
    del sys.modules["nvidia_resiliency_ext"]
    sys.meta_path.append(_Finder())
    attention = DotProductAttention.__init__

    def with_latent_sizes(self, *args, k_channels=None, v_channels=None, **kwargs) -> None:
        """Latent attention is built, and never run: its core has no parameters."""
        attention(self, *args, **kwargs)

    DotProductAttention.__init__ = with_latent_sizes


def _provider(folder: str, load_weights: bool):
    import torch
    from megatron.bridge import AutoBridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=load_weights)
    for name, value in _NEEDS_A_GPU.items():
        if hasattr(provider, name):
            setattr(provider, name, value)
    provider.params_dtype = torch.float32
    provider.transformer_layer_spec = lambda config, vp_stage=None: get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, vp_stage=vp_stage
    )
    return bridge, provider


def convert(folder: str, out: str) -> None:
    """Bridge's model as a checkpoint in ``out``, and what it exports against the folder.

    Prints a line of JSON: names that are not there again, and those with another value.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from safetensors.torch import load_file

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    bridge, provider = _provider(folder, load_weights=True)
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    target = Path(out) / "iter_0000001"
    target.mkdir(parents=True)
    dist_checkpointing.save(model[0].sharded_state_dict(), str(target))
    (Path(out) / "latest_checkpointed_iteration.txt").write_text("1")
    published: dict = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        published |= load_file(path)
    exported = {k: v.clone() for k, v in bridge.export_hf_weights(model, show_progress=False)}
    both = published.keys() & exported.keys()
    answer = {
        "provider": type(provider).__name__,
        "missing": sorted(published.keys() ^ exported.keys()),
        "other": sorted(key for key in both if not torch.equal(published[key], exported[key])),
    }
    print(json.dumps(answer))


def train(folder: str) -> None:
    """Bridge's recipe for pretraining, cut down to three steps on mock data."""
    from megatron.bridge.recipes.common import _pretrain_common
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    config = _pretrain_common()
    _, model = _provider(folder, load_weights=False)
    config.model = model
    model.seq_length = config.dataset.seq_length = 32
    model.tensor_model_parallel_size = model.pipeline_model_parallel_size = 1
    model.sequence_parallel = False
    config.mixed_precision = None
    config.optimizer.bf16 = False
    for part in (config.optimizer, config.ddp):
        part.use_distributed_optimizer = False
    config.optimizer.use_precision_aware_optimizer = False
    config.ddp.overlap_grad_reduce = config.ddp.overlap_param_gather = False
    config.train.train_iters = config.scheduler.lr_decay_iters = 3
    config.train.global_batch_size, config.train.micro_batch_size = 2, 1
    config.scheduler.lr_warmup_iters = 0
    config.validation.eval_iters = 0
    config.dataset.blend, config.dataset.num_workers = None, 0
    config.tokenizer.tokenizer_type, config.tokenizer.vocab_size = "NullTokenizer", 127
    config.checkpoint.save = config.checkpoint.load = None
    config.dist.distributed_backend = "gloo"
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    pretrain(config, forward_step)


if __name__ == "__main__":
    job, arguments = sys.argv[1], sys.argv[2:]
    prepare()
    if any(word.startswith("--inject") for word in arguments):
        import megatron_moe_inject

        megatron_moe_inject.install()
    if job == "convert":
        convert(*arguments[:2])
    else:
        train(arguments[0])
