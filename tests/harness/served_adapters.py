"""Run by a Python that has vLLM: its own code, on the CPU, reads folders of adapters

Reads cases as JSON from standard input, ``[{"base": ..., "merged": ..., "adapters": ...}]``: a
folder, the same with adapters in its weights, and the adapters. Prints one line of JSON for each:
modules of the adapters that no layer took (``unused``), matrices of vLLM's whose low-rank change is
not that of the weights (``wrong``), how many are right and changed (``right``), and the error, if
there was one. No forward pass runs. Layers of experts get their adapters without the kernels that
only GPUs have.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_TARGET_DEVICE="cpu")
    answers = sys.stdout
    sys.stdout = sys.stderr
    cases = json.load(sys.stdin)
    from served_model import _prepare

    _prepare()
    _without_kernels()
    for case in cases:
        answers.write(json.dumps(_answer(case)) + "\n")


def _without_kernels() -> None:
    import torch
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.layers.base import BaseLayerWithLoRA

    def begin(self, base_layer, slices=None):
        BaseLayerWithLoRA.__init__(self)
        self.base_layer, self.moe_config = base_layer, base_layer.moe_config
        self._shared_experts = base_layer._shared_experts
        self.tp_size, self.tp_rank, self.device = 1, 0, torch.device("cpu")
        gated = 2 if base_layer.moe_config.is_act_and_mul else 1
        self._w13_slices = slices or gated
        self.enable_moe_shared_loras = False
        self.n_slices = self.local_num_experts * (self._w13_slices + 1)

    FusedMoEWithLoRA.__init__ = begin
    FusedMoE3DWithLoRA.__init__ = lambda self, base_layer: begin(self, base_layer, 1)
    FusedMoEWithLoRA.set_mapping = lambda self, wrapper: None


def _answer(case: dict) -> dict:
    import torch
    from served_model import _build
    from vllm.config import set_current_vllm_config

    torch.manual_seed(0)
    answer = {"unused": [], "wrong": [], "right": 0, "error": None}
    config, model = _build(case["base"])
    with set_current_vllm_config(config):
        before, after = (_loaded(model, case[name]) for name in ("base", "merged"))
        changes = {name: (after[name] - value).double() for name, value in before.items()}
        try:
            manager, lora = _manager(config, model, case["adapters"])
        except (AssertionError, KeyError, RuntimeError, ValueError) as error:
            return answer | {"error": f"{type(error).__name__}: {error}"[:600]}
    taken = {name for name in manager.modules if manager._get_lora_layer_weights(lora, name)}
    answer["unused"] = sorted(set(lora.loras) - taken)
    seen = set()
    for name, layer in manager.modules.items():
        for parameter, product in _products(name, layer, changes):
            seen.add(parameter)
            change = changes[parameter]
            fits = change.numel() == product.numel()
            if not fits or not torch.allclose(change.view_as(product), product, atol=1e-5):
                answer["wrong"].append(parameter)
            elif change.abs().max() > 1e-3:
                answer["right"] += 1
    left = [n for n, change in changes.items() if n not in seen and change.abs().max() > 1e-5]
    answer["wrong"] += sorted(left)
    return answer


def _loaded(model, folder: str) -> dict:
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    model.load_weights(iter(tensors.items()))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _manager(config, model, folder: str):
    """vLLM's manager of a model, and the adapters that it loaded."""
    import torch
    from vllm.config.lora import LoRAConfig
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager

    lora_config = LoRAConfig(max_lora_rank=16, max_loras=1, lora_dtype=torch.float32)
    vocabulary = config.model_config.get_vocab_size()
    device = torch.device("cpu")
    manager = LoRAModelManager(model, 1, 64, vocabulary, lora_config, device, config)
    worker = object.__new__(WorkerLoRAManager)
    worker._adapter_manager, worker.lora_config = manager, lora_config
    worker.vocab_size, worker.max_position_embeddings = vocabulary, 64
    from vllm.lora.lora_model import LoRAModel

    worker._lora_model_cls = LoRAModel
    fused = config.model_config.hf_config.model_type == "gpt_oss"
    lora = worker._load_adapter(LoRARequest("one", 1, folder, is_3d_lora_weight=fused))
    assert manager.add_adapter(lora)
    assert manager.activate_adapter(1)
    return manager, lora


def _products(name: str, layer, changes: dict):
    """The low-rank changes of a layer, in the shapes of its parameters."""
    import torch

    def product(a, b):
        return b.double() @ a.double()

    if hasattr(layer, "w13_lora_a_stacked"):
        pairs = zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked, strict=True)
        first = torch.cat([product(a[0], b[0]) for a, b in pairs], dim=1)
        second = product(layer.w2_lora_a_stacked[0][0], layer.w2_lora_b_stacked[0][0])
        for end, value in (("w13_weight", first), ("w2_weight", second)):
            (parameter,) = [n for n in changes if n.startswith(f"{name}.") and n.endswith(end)]
            yield parameter, value
        return
    if name.endswith("embed_tokens") or not hasattr(layer, "lora_a_stacked"):
        return  # none of the adapters' is there; a change of its weight would be told
    a, b = layer.lora_a_stacked, layer.lora_b_stacked
    if torch.is_tensor(a):
        a, b = (a,), (b,)
    value = torch.cat([product(x[0, 0], y[0, 0]) for x, y in zip(a, b, strict=True)])
    if f"{name}.weight" in changes:
        yield f"{name}.weight", value


if __name__ == "__main__":
    main()
