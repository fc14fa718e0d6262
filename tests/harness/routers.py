"""Megatron's own router in a small chunk, on one rank without process groups."""

from types import SimpleNamespace

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter

LENGTH, EXPERTS, TOPK, HIDDEN = 5, 6, 2, 8


class Alone:
    """A process group of this rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


GROUPS = SimpleNamespace(
    **{name: Alone() for name in ("tp", "pp", "cp", "dp", "dp_cp", "tp_cp", "tp_dp_cp", "mp")}
)


class Layer(torch.nn.Module):
    """A router, whose gates take part in the graph but not in the states."""

    def __init__(self, number, router):
        super().__init__()
        self.layer_number = number
        self.mlp = torch.nn.Module()
        self.mlp.router = router

    def forward(self, hidden):
        gates, _ = self.mlp.router(hidden)
        return torch.tanh(hidden) + 0 * gates.sum(-1).view(*hidden.shape[:2], 1)


class Chunk(torch.nn.Module):
    """Two layers with routers, recomputed in the backward pass if asked."""

    def __init__(self, recompute=False, **settings):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=2,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            num_moe_experts=EXPERTS,
            moe_router_topk=TOPK,
            use_cpu_initialization=True,
            add_bias_linear=False,
            **{"moe_router_load_balancing_type": "none"} | settings,
        )
        self._recompute = recompute
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        generator = torch.Generator().manual_seed(3)
        for number in (1, 2):
            router = TopKRouter(self.config, GROUPS)
            router.set_layer_number(number)
            router.weight.data = torch.randn(EXPERTS, HIDDEN, generator=generator)
            self.decoder.layers.append(Layer(number, router))

    @property
    def routers(self):
        return [layer.mlp.router for layer in self.decoder.layers]

    def _run(self, hidden):
        for layer in self.decoder.layers:
            hidden = layer(hidden)
        return hidden

    def forward(self, hidden):
        if self._recompute:
            return torch.utils.checkpoint.checkpoint(self._run, hidden, use_reentrant=True)
        return self._run(hidden)


def inputs(micro_batches, samples=2, seed=9):
    """States ``[l, b, h]`` of each micro-batch."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LENGTH, samples, HIDDEN)
    return [torch.randn(shape, generator=generator) for _ in range(micro_batches)]
