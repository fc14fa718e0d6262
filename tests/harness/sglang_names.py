"""Run as a script: what SGLang's own code makes of the names in a folder of adapters

Reads cases as JSON from standard input, ``[{"source": ..., "adapters": ...}]``; ``source`` is where
SGLang's wheel was unpacked. Its adapter classes are imported with stand-ins for what they import of
the server. Prints one line of JSON for each: weights that it has no target for (``dropped``), the
rank of the configuration and those of the weights, and how many weights there are in the end.
"""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

_STAND_INS = (
    "configs", "configs.load_config", "layers", "layers.utils", "lora.backend",
    "lora.backend.base_backend", "model_loader", "model_loader.loader", "utils",
    "utils.hf_transformers_utils", "model_executor", "model_executor.forward_batch_info",
)  # fmt: skip


class _StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    cases = json.load(sys.stdin)
    _prepare(cases[0]["source"])
    for case in cases:
        answers.write(json.dumps(_answer(case["adapters"])) + "\n")


def _prepare(source: str) -> None:
    for name in ("sglang", "sglang.srt", "sglang.srt.lora"):
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [f"{source}/{name.replace('.', '/')}"]
    for name in _STAND_INS:
        sys.modules[f"sglang.srt.{name}"] = module = _StandIn(name)
        module.__path__ = []
    sys.modules["sglang.srt.layers.utils"].get_layer_id = _layer


def _layer(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _answer(folder: str) -> dict:
    from safetensors.torch import load_file
    from sglang.srt.lora import utils
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig

    config = LoRAConfig(path=folder)
    model = SimpleNamespace(num_hidden_layers=8, architectures=[], model_type="")
    adapter = LoRAAdapter("one", config, model, None, None)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    adapter.initialize_weights_from_tensors(tensors)
    targets = utils.get_normalized_target_modules(config.target_modules)
    dropped = [name for name in tensors if _layer(name) is None]
    dropped += sorted(targets - utils._KNOWN_LORA_TARGET_MODULES)
    ranks, count = set(), 0
    for name, weight in (item for layer in adapter.layers for item in layer.weights.items()):
        try:
            target = utils.get_target_module_name(name, targets)
        except ValueError:
            dropped.append(name)
            continue
        count += 1
        rank = weight.shape["lora_A" not in name]
        ranks.add(rank // utils.get_stacked_multiply(target) if "lora_A" in name else rank)
    return {"dropped": dropped, "ranks": sorted(ranks), "rank": config.r, "weights": count}


if __name__ == "__main__":
    main()
