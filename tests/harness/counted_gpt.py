"""Our GPT entry; at its end every rank prints what its layers and its pipeline did in training.

``layers: {"<global layer>": {"forwards": ..., "saved": ..., "graphs": ...}}`` counts forward
passes, tensors that autograd kept inside them, and outputs with a graph.
``pipeline: {"rank": ..., "forward": ..., "backward": ..., "received": ..., "operations": ...,
"bytes": ..., "kept": ...}`` counts activations sent, gradients sent, gradients received, all
sends and receives as torch.distributed saw them, bytes of gradients sent, and received
activations that were still whole when their backward began.
"""

import json
import os
import sys
from collections import defaultdict

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_moe_inject.host import gpt_entry


def count_messages() -> dict[str, int]:
    """Count what this rank's pipeline stage sends and receives in training steps."""
    names = ("forward", "backward", "received", "operations", "bytes", "kept")
    messages = dict.fromkeys(names, 0)
    stock, stock_step = P2PCommunicator._communicate, schedules.backward_step

    def communicate(self, **kwargs):
        if torch.is_grad_enabled():
            gradient = kwargs["tensor_send_prev"]
            messages["forward"] += kwargs["tensor_send_next"] is not None
            messages["received"] += kwargs["recv_next"]
            if gradient is not None:
                messages["backward"] += 1
                messages["bytes"] += gradient.nbytes
        return stock(self, **kwargs)

    def backward_step(input_tensor, *args):
        given = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        messages["kept"] += sum(x is not None and x.numel() > 1 for x in given)
        return stock_step(input_tensor, *args)

    def counting(operation, count):
        def counted(*args, **kwargs):
            messages["operations"] += torch.is_grad_enabled() and count(*args, **kwargs)
            return operation(*args, **kwargs)

        return counted

    P2PCommunicator._communicate = communicate
    schedules.backward_step = backward_step
    dist.batch_isend_irecv = counting(dist.batch_isend_irecv, len)
    if not sends_in_batches():
        for name in ("isend", "irecv"):
            setattr(dist, name, counting(getattr(dist, name), lambda *_, **__: 1))
    return messages


def sends_in_batches() -> bool:
    """Whether the schedule does; then its operations must stay torch.distributed's functions."""
    virtual = any("virtual" in flag or "parallel-layout" in flag for flag in sys.argv)
    return not virtual or "--no-overlap-p2p-communication" in sys.argv


def count_layers() -> dict[int, dict[str, int]]:
    """Count what this rank's decoder layers do in training steps, by global layer."""
    counts = defaultdict(lambda: {"forwards": 0, "saved": 0, "graphs": 0})

    def counted(stock):
        def forward(self, *args, **kwargs):
            if not self.training:
                return stock(self, *args, **kwargs)
            count = counts[self.layer_number - 1]

            def keep(tensor):
                count["saved"] += 1
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = stock(self, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            count["forwards"] += 1
            count["graphs"] += torch.is_grad_enabled() and hidden.requires_grad
            return output

        return forward

    for kind in (TransformerLayer, MambaLayer):
        kind.forward = counted(kind.forward)
    return counts


if __name__ == "__main__":
    messages = count_messages()
    counts = count_layers()
    gpt_entry.main()
    messages["rank"] = int(os.environ["RANK"])
    print("pipeline: " + json.dumps(messages), flush=True)
    print("layers: " + json.dumps(counts), flush=True)
