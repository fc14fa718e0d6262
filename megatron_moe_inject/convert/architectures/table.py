"""What an architecture's table is made of: which slice of Megatron's is which tensors of a folder.

An architecture is data: for a configuration it lists ``Entry``s, one for each slice of Megatron's
model (a layer's matrix, an expert's matrix, the embedding), with the names of the folder's tensors
that make it up. Import and export walk the same list, so that nothing is mapped twice.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_moe_inject.convert.architectures.forms import Form, Same


@dataclass(frozen=True)
class Slot:
    """A slice of Megatron's model, whatever layout and kind of checkpoint stores it.

    Attributes:
        name: within its layer, such as ``self_attention.linear_qkv.weight``; the whole name of what
            stands in none, such as ``embedding.word_embeddings.weight``.
        layer: the block of the decoder, from 0; ``None`` for what stands in none.
        expert: global number; ``None`` for what is no expert's.
    """

    name: str
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Part:
    """A tensor of the folder, or one slice of it on its first axes.

    Attributes:
        name: such as ``model.layers.0.self_attn.q_proj.weight``.
        index: where the folder keeps experts in one tensor, the expert's number.
    """

    name: str
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One slice of Megatron's model and what it is made of.

    Attributes:
        slot: Megatron's.
        parts: the folder's, in the order that ``form`` takes.
        shape: of Megatron's slice, without axes of layers and experts and without padding.
        form: how the parts make it up.
        padded: the first axis is the vocabulary, which Megatron pads with zeros.
        dtype: "float32" where Megatron keeps it so whatever the model is in (an expert bias).
        pieces: names and rows where checkpoints store it in pieces on its first axis, each under
            ``<name>.<piece>`` (the input projection of a Mamba layer).
        follows: its parts are those of another entry, which an export takes their values from;
            neither slice may have been trained (Gemma's embedding, a multiple of its head).
    """

    slot: Slot
    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    form: Form = field(default_factory=Same)
    padded: bool = False
    dtype: str | None = None
    pieces: tuple[tuple[str, int], ...] = ()
    follows: bool = False


class Architecture(Protocol):
    """A kind of model, known by ``model_type`` in its ``config.json``.

    ``config`` is what ``transformers.AutoConfig`` makes of that file.

    Attributes:
        model_types: those that it serves.
        experts_key: the configuration's key of how many experts a layer has; ``None`` of dense
            models, and where that number alone cannot be changed.
    """

    model_types: tuple[str, ...]
    experts_key: str | None = None

    def for_folder(self, config: Any, names: Container[str]) -> Any:
        """The configuration of what a folder with tensors of these ``names`` holds; the other
        methods take this one. ``config`` itself is not changed."""
        ...

    def layouts(self, config: Any) -> tuple[str, ...]:
        """Megatron's models that it can become, "gpt" and "hybrid"; the first is the usual one."""
        ...

    def check(self, config: Any) -> None:
        """RecipeError for a configuration that Megatron cannot express, naming key and value."""
        ...

    def flags(self, config: Any) -> Mapping[str, Any]:
        """Megatron's options of that model, by name (``"--num-layers": 4``): True for one without
        a value, a tuple for one with several. Sizes of model and vocabulary alone: no layout, no
        precision, no training."""
        ...

    def entries(self, config: Any) -> Iterator[Entry]:
        """Every slice of the model, layer by layer."""
        ...

    def copies(self, config: Any) -> Mapping[str, str]:
        """Tensors that a folder may hold besides, by name, each with the name of the one that it
        must equal, as the head of a tied model."""
        ...

    def stacked_layers(self, config: Any) -> bool:
        """Whether a GPT model stores ``decoder.layers.x`` of all layers as one tensor; not where
        ``--moe-layer-freq`` is a list (``TransformerBlock.sharded_state_dict``)."""
        ...

    def layer_pattern(self, config: Any) -> str:
        """The same model as layers of a hybrid model, one symbol each (``*E*E``), and ``/`` with
        the layers of a depth in front of each depth of multi-token prediction."""
        ...
