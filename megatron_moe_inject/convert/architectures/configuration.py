"""Which keys of a ``config.json`` a table has read, and a refusal of all others.

A converter that overlooks a key writes another model, and nobody is told. So a table lists the keys
that it reads and the values that it serves; what changes no logits is listed here. A key that
stands in no list is refused unless it has the default of transformers' class: a later transformers
may know keys that this table does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron_moe_inject.host.errors import fail, listing, show


def key_names(text: str) -> frozenset[str]:
    """Keys of a configuration, written with spaces between."""
    return frozenset(text.split())


_RUNNING = key_names(
    "model_type transformers_version architectures dtype torch_dtype name_or_path return_dict "
    "output_hidden_states use_cache id2label label2id problem_type chunk_size_feed_forward "
    "pad_token_id bos_token_id eos_token_id auto_map quantization_config "
    "ignore_keys_at_rope_validation unsloth_version unsloth_fixed task_specific_params "
    "tokenizer_class model_max_length sep_token_id unk_token_id"
)
"""Keys of how a model is run, generates text, and is stored."""

_TRAINING = key_names(
    "initializer_range output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux "
    "pretraining_tp"
)
"""Keys of how it was, or would be, trained."""

NO_EFFECT = _RUNNING | _TRAINING
"""Keys that change no logits."""

SILU = ("silu", "swish")


@dataclasses.dataclass(frozen=True)
class Keys:
    """What a table knows of a configuration.

    Attributes:
        read: keys that its flags and entries follow, checked elsewhere where they need be.
        only: keys of which it serves some values.
    """

    read: frozenset[str]
    only: Mapping[str, Collection[Any]]

    def check(self, config: Any) -> None:
        """RecipeError for the first key, in the order of the alphabet, that is not served."""
        if getattr(config, "is_heterogeneous", False):
            raise fail(key_of("per_layer_config"), True, "is not served", "layers must be alike")
        defaults = _defaults(config)
        mapped = config.attribute_map
        known = {mapped.get(name, name) for name in (*self.read, *NO_EFFECT)}
        only = {mapped.get(name, name): values for name, values in self.only.items()}
        present = {name for name in vars(config) if not name.startswith("_")}
        for name in sorted(present | set(defaults)):
            value = getattr(config, name)
            if name in only:
                if value not in only[name]:
                    served = listing(show(one) for one in only[name])
                    raise fail(key_of(name), value, "is not served", f"served: {served}")
            elif name in known:
                continue
            elif name in defaults:
                if value != defaults[name]:
                    default = show(defaults[name])
                    raise fail(key_of(name), value, "is not known here", f"served: {default}")
            elif value not in _OFF:
                remedy = "if the model is the same without it, take it out of config.json"
                raise fail(key_of(name), value, "is not known here", remedy)
        _check_task(config)


_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a key of no class that mean that there is nothing."""


def key_of(name: str) -> str:
    """How an error calls a key of the configuration."""
    return f"config.json: {name}"


def _defaults(config: Any) -> dict[str, Any]:
    """Keys of transformers' class with their defaults, by the names that instances have."""
    defaults = {}
    for field in dataclasses.fields(config):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        defaults[config.attribute_map.get(field.name, field.name)] = default
    return defaults


def _check_task(config: Any) -> None:
    """RecipeError for a model that ends in something else than logits of the next token."""
    for name in config.architectures or ():
        if not name.endswith("ForCausalLM"):
            remedy = "only models that end in ForCausalLM are converted"
            raise fail(key_of("architectures"), name, "is not served", remedy)
