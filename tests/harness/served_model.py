"""Run by a Python that has vLLM: its own model classes, on the CPU, read folders of weights

Reads cases as JSON from standard input, ``[{"folder": ..., "drop": [keys], "add": {key: shape}}]``.
Prints one line of JSON for each: parameters that ``load_weights`` did not report (``unreported``;
vLLM ends there), parameters that it left uninitialised (``unwritten``: all were NaN before), and
the error, if there was one. No forward pass runs; neither a GPU nor vLLM's compiled parts are
needed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_TARGET_DEVICE="cpu")
    answers = sys.stdout
    sys.stdout = sys.stderr
    cases = json.load(sys.stdin)
    _prepare()
    models: dict[str, tuple] = {}
    for case in cases:
        folder = case["folder"]
        if folder not in models:
            models[folder] = _build(folder)
        answers.write(json.dumps(_load(*models[folder], case)) + "\n")


def _prepare() -> None:
    """The CPU as vLLM's platform, and one process as its world."""
    import vllm.model_executor.layers.fused_moe.config as moe_config
    import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as moe_method
    import vllm.platforms
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.platforms.cpu import CpuPlatform

    platform = vllm.platforms._current_platform = CpuPlatform()

    class AnyMoe:
        """Experts without a gate are built for GPUs alone, though reading them needs none."""

        def __getattr__(self, name: str):
            return (lambda: True) if name == "is_cuda_alike" else getattr(platform, name)

    moe_config.current_platform = AnyMoe()
    select = moe_method.select_unquantized_moe_backend

    def any_backend(moe_config):
        try:
            return select(moe_config)
        except NotImplementedError:
            triton = unquantized.UnquantizedMoeBackend.TRITON
            return triton, unquantized.backend_to_kernel_cls(triton)[0]

    moe_method.select_unquantized_moe_backend = any_backend


def _build(folder: str) -> tuple:
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    config = VllmConfig(
        model_config=ModelConfig(
            model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float32",
            max_model_len=64, enforce_eager=True,
        ),
        cache_config=CacheConfig(block_size=16),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(device="cpu"),
    )  # fmt: skip
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        destroy_model_parallel()  # groups of experts exist for models with experts alone
        initialize_model_parallel(1)
        return config, initialize_model(config)


def _load(config, model, case: dict) -> dict:
    import torch
    import vllm
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    tensors = {}
    for path in sorted(Path(case["folder"]).glob("*.safetensors")):
        tensors |= load_file(path)
    for key in case.get("drop", ()):
        del tensors[key]
    tensors |= {key: torch.zeros(shape) for key, shape in case.get("add", {}).items()}
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(float("nan"))
    answer = {"vllm": vllm.__version__, "class": type(model).__name__, "error": None}
    try:
        with set_current_vllm_config(config):
            reported = model.load_weights(iter(tensors.items()))
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        return answer | {"error": f"{type(error).__name__}: {error}"}
    return answer | {
        "unreported": sorted(set(parameters) - set(reported)),
        "unwritten": sorted(name for name, value in parameters.items() if value.isnan().any()),
    }


if __name__ == "__main__":
    main()
