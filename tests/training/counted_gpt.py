"""Our GPT entry; at its end every rank prints what its decoder layers did while training.

``layers: {"<global layer>": {"forwards": ..., "saved": ..., "graphs": ...}}`` counts forward
passes, tensors that autograd kept inside them, and outputs with a graph.
"""

import json
from collections import defaultdict

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_moe_inject import gpt_entry

if __name__ == "__main__":
    counts = defaultdict(lambda: {"forwards": 0, "saved": 0, "graphs": 0})
    stock = TransformerLayer.forward

    def forward(self, *args, **kwargs):
        if not self.training:
            return stock(self, *args, **kwargs)
        count = counts[self.layer_number - 1]

        def keep(tensor):
            count["saved"] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = stock(self, *args, **kwargs)
        count["forwards"] += 1
        count["graphs"] += torch.is_grad_enabled() and output[0].requires_grad
        return output

    TransformerLayer.forward = forward
    gpt_entry.main()
    print("layers: " + json.dumps(counts), flush=True)
