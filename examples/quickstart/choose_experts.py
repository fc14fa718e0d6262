"""Measures where the shipped student routes code and English, and proposes experts for the recipe.

    python choose_experts.py DATA [--experts 2] -- MEGATRON FLAGS

The experts to train are those that code uses more than English does: their change moves the domain
most and general text least. Per layer the score of an expert is its share of code's routing choices
over its share of English's. recipe.yaml holds what this printed for the shipped student, and
changes only when the student does.

Shapes: t tokens, E experts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import models

WINDOWS = 160
LEAST_SHARE = 0.02
"""Added to English's shares, so that an expert that nobody uses does not win by a division."""


def measure(model, prefix: Path, sequence_length: int) -> list[list[float]]:
    """Each expert's share of the routing choices on a dataset, one list of E shares per MoE layer.

    Reads `WINDOWS` sequences spread evenly over the dataset.
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.transformer.moe.router import TopKRouter

    chosen: dict[int, torch.Tensor] = {}

    def count(router, inputs, output) -> None:
        routing_map = output[1]  # bool [t, E]
        layer = router.layer_number
        chosen[layer] = chosen.get(layer, 0) + routing_map.sum(0).double()

    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    hooks = [router.register_forward_hook(count) for router in routers]
    dataset = IndexedDataset(str(prefix))
    tokens = np.concatenate([dataset[i] for i in range(len(dataset))]).astype(np.int64)
    starts = np.linspace(0, len(tokens) - sequence_length, WINDOWS).astype(int)
    windows = torch.from_numpy(np.stack([tokens[s : s + sequence_length] for s in starts]))
    positions = torch.arange(sequence_length)
    unseen = torch.ones(sequence_length, sequence_length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        for batch in windows.split(16):
            model(batch, positions.expand_as(batch), unseen)
    for hook in hooks:
        hook.remove()
    return [(chosen[layer] / chosen[layer].sum()).tolist() for layer in sorted(chosen)]


def choose(code: list[list[float]], english: list[list[float]], count: int) -> list[list[int]]:
    """Per layer, the ids of the `count` experts that code prefers most, in rising order."""
    chosen = []
    for on_code, on_english in zip(code, english, strict=True):
        scores = [c / (e + LEAST_SHARE) for c, e in zip(on_code, on_english, strict=True)]
        best = sorted(range(len(scores)), key=lambda expert: -scores[expert])[:count]
        chosen.append(sorted(best))
    return chosen


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder written by corpora.py")
    parser.add_argument("--experts", type=int, default=2, help="how many per layer")
    given = parser.parse_args(sys.argv[1:split])
    args = models.start_megatron(sys.argv[split + 1 :])
    model = models.build_model(args)
    models.load_shipped("student", model)
    code, english = (
        measure(model, given.data / name, args.seq_length)
        for name in ("code_slice", "english_slice")
    )
    chosen = choose(code, english, given.experts)
    print("layer: share of code's choices / of English's, by expert; * = chosen")
    for layer, experts in enumerate(chosen):
        shares = [
            f"{100 * c:3.0f}/{100 * e:2.0f}{'*' if expert in experts else ' '}"
            for expert, (c, e) in enumerate(zip(code[layer], english[layer], strict=True))
        ]
        total = sum(code[layer][expert] for expert in experts)
        print(f"{layer}: {' '.join(shares)}  chosen carry {100 * total:.0f} % of code")
    print("    layers: {" + ", ".join(f"{i}: {experts}" for i, experts in enumerate(chosen)) + "}")


if __name__ == "__main__":
    main()
