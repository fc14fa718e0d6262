"""Our GPT entry; at its end every rank prints what the schedule plans of its layers did.

``plans: {"<global layer>": {"forwards": ..., "saved": ..., "backwards": ...}}`` counts forward
passes of a layer's nodes, tensors that autograd kept inside them, and backward passes.
"""

import json
from collections import defaultdict

import torch
from megatron.core.models.common import model_chunk_schedule_plan as plans

from megatron_moe_inject.host import gpt_entry

try:
    from megatron.core.models.common.utils import TransformerLayerNode
except ImportError:  # before 0.19
    from megatron.core.models.gpt.fine_grained_callables import TransformerLayerNode

if __name__ == "__main__":
    counts = defaultdict(lambda: {"forwards": 0, "saved": 0, "backwards": 0})
    build = plans.TransformerLayerSchedulePlan.__init__
    run_forward, run_backward = (
        TransformerLayerNode.forward_impl,
        TransformerLayerNode.backward_impl,
    )

    def init(self, layer, *args, **kwargs):
        build(self, layer, *args, **kwargs)
        for node in vars(self).values():
            if isinstance(node, TransformerLayerNode):
                node.count = counts[layer.layer_number - 1]

    def forward_impl(self, *args):
        self.count["forwards"] += 1

        def keep(tensor):
            self.count["saved"] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return run_forward(self, *args)

    def backward_impl(self, *args):
        self.count["backwards"] += 1
        return run_backward(self, *args)

    plans.TransformerLayerSchedulePlan.__init__ = init
    TransformerLayerNode.forward_impl = forward_impl
    TransformerLayerNode.backward_impl = backward_impl
    gpt_entry.main()
    print("plans: " + json.dumps(counts), flush=True)
