"""The student as a recipe sees it: sizes, layout, precision, data and options in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_moe_inject.host.layer_pattern import LayerPattern


@dataclass(frozen=True)
class ParallelFacts:
    """Sizes of the student's parallel layout; ``vpp`` is None without virtual stages."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1


@dataclass(frozen=True)
class PrecisionFacts:
    """How the student multiplies; ``fp8`` is Megatron's ``--fp8-format``, None without FP8."""

    fp8: str | None = None
    fp8_recipe: str | None = None
    transformer_engine: bool = False
    grouped_gemm: bool = False

    @property
    def groups_with_histories(self) -> bool:
        """Whether grouped experts carry histories of what they have seen, by delayed scaling."""
        return self.grouped_gemm and self.fp8 is not None and self.fp8_recipe == "delayed"


@dataclass(frozen=True)
class StudentFacts:
    """The student as the recipe sees it.

    Attributes:
        num_layers: decoder layers, multi-token-prediction layers not counted.
        pattern: what the layers of a hybrid student are; None for a GPT model, whose layers are
            blocks of an attention and an MLP each.
        num_moe_experts: experts of each MoE layer; None for a dense student.
        router_topk: experts per token; None for a dense student.
        moe_layers: 0-based global ids of the MoE layers.
        data_paths: split -> blend entries in order; a split without data is absent. Under
            ``--data-path`` all three splits have the same entries.
        shared_experts: the MoE layers have shared experts.
        tied_embeddings: embedding and output layer are one matrix.
        mock_data: ``--mock-data``: one dataset at position 0, whatever the paths.
        options: all of Megatron's options, by name.
    """

    num_layers: int
    num_moe_experts: int | None = None
    router_topk: int | None = None
    moe_layers: tuple[int, ...] = ()
    shared_experts: bool = False
    tied_embeddings: bool = False
    data_paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mock_data: bool = False
    hidden_size: int | None = None
    parallel: ParallelFacts = ParallelFacts()
    precision: PrecisionFacts = PrecisionFacts()
    options: Mapping[str, Any] = field(default_factory=dict)
    pattern: LayerPattern | None = None

    @property
    def has_dense_layers(self) -> bool:
        """Whether the student has MLPs that are no experts."""
        if self.pattern is not None:
            return bool(self.pattern.where("-"))
        return len(self.moe_layers) < self.num_layers
