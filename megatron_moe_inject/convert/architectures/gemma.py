"""Gemma, which Megatron's options cannot express: an error that says so."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, NoReturn

from megatron_moe_inject.convert.architectures.configuration import key_of
from megatron_moe_inject.convert.architectures.table import Architecture, Entry
from megatron_moe_inject.host.errors import fail


class Gemma(Architecture):
    """Gemma 1 to 3: gated GELU and embeddings times the root of h, 2 and 3 with more norms.

    Megatron has a switch for neither (``--swiglu``, ``--quick-geglu``, ``--squared-relu``).
    """

    model_types = ("gemma", "gemma2", "gemma3", "gemma3_text")

    def layouts(self, config: Any) -> tuple[str, ...]:
        return ()

    def for_folder(self, config: Any, names: Container[str]) -> Any:
        return config

    def check(self, config: Any) -> None:
        self._refuse(config)

    def flags(self, config: Any) -> dict[str, Any]:
        self._refuse(config)

    def entries(self, config: Any) -> Iterator[Entry]:
        self._refuse(config)

    def copies(self, config: Any) -> dict[str, str]:
        self._refuse(config)

    def stacked_layers(self, config: Any) -> bool:
        self._refuse(config)

    def layer_pattern(self, config: Any) -> str:
        self._refuse(config)

    def _refuse(self, config: Any) -> NoReturn:
        problem = "cannot be a Megatron model: no option for its gated GELU and scaled embedding"
        remedy = "as a teacher it needs no conversion (source: hf:<folder>)"
        raise fail(key_of("model_type"), config.model_type, problem, remedy)
