"""Run by a Python that has PEFT: transformers' model with adapters, and the same with them merged

Reads cases as JSON from standard input, ``[{"base": ..., "merged": ..., "adapters": ...}]``: a
folder, the same with adapters in its weights, and the adapters. Prints one line of JSON for each:
the largest difference of their logits, of the merged ones to those of the base, and names in the
file that PEFT's model has not.
"""

import json
import sys


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr
    for case in json.load(sys.stdin):
        answers.write(json.dumps(_answer(**case)) + "\n")


def _answer(base: str, merged: str, adapters: str) -> dict:
    import peft
    import torch
    from safetensors import safe_open

    tokens = torch.arange(40)[None]
    with torch.no_grad():
        model = _model(base)
        before, expected = model(tokens).logits, _model(merged)(tokens).logits
        model = peft.PeftModel.from_pretrained(model, adapters)
        off = (model(tokens).logits - expected).abs().max().item()
    with safe_open(f"{adapters}/adapter_model.safetensors", framework="pt") as file:
        dropped = set(file.keys()) - set(peft.get_peft_model_state_dict(model))
    moved = (expected - before).abs().max().item()
    return {"off": off, "moved": moved, "dropped": sorted(dropped)}


def _model(folder: str):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


if __name__ == "__main__":
    main()
