"""Entries that most architectures share: embeddings, attention, feed-forwards, experts.

Megatron's names are without the layer's prefix; norms have those of their modules. h hidden,
d head width, g groups of keys and values, q queries of a group, f width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe_inject.convert.architectures.forms import Form, Qkv, Same, Stacked
from megatron_moe_inject.convert.architectures.table import Entry, Part, Slot


@dataclass(frozen=True)
class Block:
    """A layer on both sides.

    Attributes:
        folder: what its names in the folder begin with, ``model.layers.3.``.
        layer: Megatron's number; ``None`` for one that stands outside of the decoder.
        prefix: what Megatron's names of such a one begin with.
    """

    folder: str
    layer: int | None = None
    prefix: str = ""

    def entry(
        self,
        name: str,
        parts: str | Sequence[str | Part],
        shape: tuple[int, ...],
        form: Form | None = None,
        **slot_or_entry: Any,
    ) -> Entry:
        """The entry of one tensor; ``parts`` are names behind the layer's prefix, or a whole
        ``Part`` where the folder keeps experts in one tensor. ``expert`` goes to the slot, other
        keywords to the entry."""
        names = [parts] if isinstance(parts, str) else parts
        taken = tuple(
            Part(self.folder + part)
            if isinstance(part, str)
            else Part(self.folder + part.name, part.index)
            for part in names
        )
        slot = Slot(self.prefix + name, self.layer, slot_or_entry.pop("expert", None))
        return Entry(slot, taken, shape, form or Same(), **slot_or_entry)


def outside(name: str, part: str, shape: tuple[int, ...], **entry: Any) -> Entry:
    """The entry of a tensor that stands in no layer."""
    return Entry(Slot(name), (Part(part),), shape, **entry)


@dataclass(frozen=True)
class Heads:
    """Sizes of grouped-query attention.

    Attributes:
        hidden, groups, queries, width: h, g, q, d.
    """

    hidden: int
    groups: int
    queries: int
    width: int

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Those of a configuration with the usual keys."""
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        return cls(config.hidden_size, groups, heads // groups, head_width(config))

    @property
    def form(self) -> Qkv:
        return Qkv(self.groups, self.queries, self.width)

    @property
    def rows(self) -> int:
        """Of queries, keys and values together."""
        return self.groups * (self.queries + 2) * self.width

    @property
    def joined(self) -> int:
        """Width of all heads' outputs beside each other."""
        return self.groups * self.queries * self.width


def head_width(config: Any) -> int:
    """Width of a head: ``head_dim``, or what is left where the model's heads share h."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention(
    block: Block,
    heads: Heads,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    norms: tuple[int, int] | None = None,
    within: str = "self_attn.",
    norm: str = "input_layernorm.weight",
) -> Iterator[Entry]:
    """Grouped-query attention and the norm in front of it.

    Args:
        within, norm: the folder's prefix of the projections, and its name of the norm.
        qkv_bias: queries, keys and values have biases.
        out_bias: the projection behind them has.
        norms: widths of the norms of queries and keys, where there are any.
    """
    qkv = [f"{within}{name}_proj." for name in "qkv"]
    linear = "self_attention.linear_"
    h = heads.hidden
    yield block.entry("input_layernorm.weight", norm, (h,))
    weights = [f"{name}weight" for name in qkv]
    yield block.entry(f"{linear}qkv.weight", weights, (heads.rows, h), heads.form)
    if qkv_bias:
        biases = [f"{name}bias" for name in qkv]
        yield block.entry(f"{linear}qkv.bias", biases, (heads.rows,), heads.form)
    yield block.entry(f"{linear}proj.weight", f"{within}o_proj.weight", (h, heads.joined))
    if out_bias:
        yield block.entry(f"{linear}proj.bias", f"{within}o_proj.bias", (h,))
    for name, width in zip("qk", norms or (), strict=False):
        part = f"{within}{name}_norm.weight"
        yield block.entry(f"self_attention.{name}_layernorm.weight", part, (width,))


def mlp_norm(block: Block, hidden: int) -> Entry:
    """The norm in front of a feed-forward, dense or of experts."""
    part = "post_attention_layernorm.weight"
    return block.entry("pre_mlp_layernorm.weight", part, (hidden,))


def gated(
    block: Block,
    hidden: int,
    width: int,
    *,
    name: str = "mlp.",
    within: str = "mlp.",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    expert: int | None = None,
) -> Iterator[Entry]:
    """A gated feed-forward ``down(act(gate x) * up x)``.

    Args:
        name: Megatron's prefix of ``linear_fc1``.
        within: the folder's prefix of the parts.
        parts: names of gate, up and down.
        expert: number, for that of an expert.
    """
    gate, up, down = (f"{within}{part}.weight" for part in parts)
    shape, form = (2 * width, hidden), Stacked((width, width))
    yield block.entry(f"{name}linear_fc1.weight", [gate, up], shape, form, expert=expert)
    yield block.entry(f"{name}linear_fc2.weight", down, (hidden, width), expert=expert)


def gated_experts(
    block: Block,
    count: int,
    hidden: int,
    width: int,
    *,
    within: str = "mlp.",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Entry]:
    """A router and ``count`` experts, each in tensors of its own."""
    yield block.entry("mlp.router.weight", f"{within}gate.weight", (count, hidden))
    for expert in range(count):
        yield from gated(
            block,
            hidden,
            width,
            name="mlp.experts.experts.",
            within=f"{within}experts.{expert}.",
            parts=parts,
            expert=expert,
        )


@dataclass(frozen=True)
class Latents:
    """Sizes of multi-latent attention.

    Attributes:
        hidden, heads: h and how many heads.
        query_rank, rank: of the latents of queries (``None`` without one) and of keys and values.
        plain, rotated, value: widths of a head's parts without and with rotation, and of values.
    """

    hidden: int
    heads: int
    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int

    @classmethod
    def of(cls, config: Any) -> Latents:
        """Those of a configuration with DeepSeek's keys."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )


def latent_attention(block: Block, sizes: Latents) -> Iterator[Entry]:
    """Multi-latent attention and the norm in front of it. Megatron de-interleaves rotated pairs as
    it runs, so that rows stand as they are in the folder."""
    h, query = sizes.hidden, sizes.heads * (sizes.plain + sizes.rotated)
    ours, theirs = "self_attention.", "self_attn."
    yield block.entry("input_layernorm.weight", "input_layernorm.weight", (h,))

    def linear(name: str, part: str, rows: int, columns: int) -> Entry:
        return block.entry(f"{ours}linear_{name}.weight", f"{theirs}{part}.weight", (rows, columns))

    if sizes.query_rank is None:
        yield linear("q_proj", "q_proj", query, h)
    else:
        rank = sizes.query_rank
        yield linear("q_down_proj", "q_a_proj", rank, h)
        yield block.entry(f"{ours}q_layernorm.weight", f"{theirs}q_a_layernorm.weight", (rank,))
        yield linear("q_up_proj", "q_b_proj", query, rank)
    rank = sizes.rank
    yield linear("kv_down_proj", "kv_a_proj_with_mqa", rank + sizes.rotated, h)
    yield block.entry(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight", (rank,))
    yield linear("kv_up_proj", "kv_b_proj", sizes.heads * (sizes.plain + sizes.value), rank)
    yield linear("proj", "o_proj", h, sizes.heads * sizes.value)
