"""A module tree with the parameter names of Megatron's GPT model."""

import torch
from torch import nn


class Bag(nn.Module):
    """A module tree from dotted parameter names."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            module, *rest = name.split(".")
            if not rest:
                self.register_parameter(module, nn.Parameter(torch.zeros(2)))
                continue
            tails = [n.split(".", 1)[1] for n in names if n.split(".")[0] == module]
            if not hasattr(self, module):
                self.add_module(module, Bag(*tails))

    def __iter__(self):
        return iter(self.children())

    def __len__(self):
        return len(list(self.children()))


LAYER = {
    "input_layernorm.weight": "norms",
    "self_attention.linear_proj.weight": "attention",
    "self_attention.linear_qkv.weight": "attention",
    "self_attention.linear_qkv.layer_norm_weight": "norms",
    "self_attention.q_layernorm.weight": "norms",
    "pre_mlp_layernorm.weight": "norms",
    "mlp.router.weight": "router",
    "mlp.shared_experts.linear_fc1.weight": "shared_experts",
    "mlp.experts.local_experts.0.linear_fc1.weight": "experts",
    "mlp.experts.local_experts.1.linear_fc2.weight": "experts",
}
OUTSIDE = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.final_layernorm.weight": "norms",
    "output_layer.weight": "output_layer",
    "mtp.layers.0.transformer_layer.mlp.experts.local_experts.0.linear_fc1.weight": "mtp",
}


def student(first_layer=4, layers=2, local_experts=(6, 7), extra=()):
    names = [f"decoder.layers.{i}.{n}" for i in range(layers) for n in (*LAYER, *extra)]
    chunk = Bag(*names, *OUTSIDE)
    for number, layer in enumerate(chunk.decoder.layers):
        layer.layer_number = first_layer + number + 1
        layer.mlp.local_expert_indices = list(local_experts)
    chunk.pre_process = True
    return chunk
