"""Adapters by the names that vLLM and SGLang read: one module for each of a folder's tensors.

Experts are modules of their own, ``mlp.experts.3.gate_proj``, and the adapter of a matrix that the
server keeps together (q, k and v; gate and up) has its A once for each. A server packs the experts
of a layer: all of them have one rank, and those without an adapter zeros. Where a folder keeps a
layer's experts in one tensor (gpt-oss) vLLM reads them as PEFT writes them.

vLLM takes rank and scale of each module from patterns. SGLang has one rank and one scale, so that
others are padded with zeros and scaled.

Both drop some names without an error, or read them and leave them out of what they compute; what is
known to be so, and what was not looked at, is refused (``VLLM``, ``SGLANG``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_moe_inject.adapters.adapter_folder import Planned
from megatron_moe_inject.adapters.folder_adapters import FolderAdapters, Matrix
from megatron_moe_inject.adapters.ranks import Scaled, config_of
from megatron_moe_inject.convert.folder_model import FolderModel

_MODEL = "base_model.model."
_EXPERT = re.compile(r"(?P<container>.+\.experts)\.\d+\.[^.]+\.weight")
_SGLANG_RENAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MERGED = "export it with its weights: moe-inject merge-adapters, then export-hf"

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_GATED = frozenset({"gate_proj", "up_proj", "down_proj"})
_LATENT = frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"})
_DENSE = _ATTENTION | _GATED
_HEAD = frozenset({"lm_head"})
_ROUTER = frozenset({"gate"})


@dataclass(frozen=True)
class Server:
    """What a server reads.

    Attributes:
        name: of it, with the version that was looked at.
        modules: last parts of module names, by ``model_type``.
        fused: model types whose experts in one tensor it reads.
    """

    name: str
    modules: Mapping[str, frozenset[str]]
    fused: frozenset[str] = frozenset()


VLLM = Server(
    "vLLM 0.33",
    {
        "llama": _DENSE | _HEAD,
        "qwen2": _DENSE,
        "qwen3": _DENSE | _HEAD,
        "gemma": _DENSE,
        "qwen3_moe": _DENSE | _ROUTER | _HEAD,
        "qwen2_moe": _DENSE | _ROUTER,
        "olmoe": _DENSE | _ROUTER,
        "mixtral": _ATTENTION | _ROUTER | _HEAD | {"w1", "w2", "w3"},
        "deepseek_v2": _LATENT | _GATED | _ROUTER,
        "deepseek_v3": _LATENT | _GATED | _ROUTER,
        "gpt_oss": _ATTENTION | {"router"},
        "nemotron_h": _ATTENTION | {"up_proj", "down_proj"} | _HEAD,
    },
    frozenset({"gpt_oss"}),
)
SGLANG = Server(
    "SGLang 0.5.23",
    {
        "llama": _DENSE,
        "qwen2": _DENSE,
        "qwen3": _DENSE,
        "qwen3_moe": _DENSE,
        "qwen2_moe": _DENSE,
        "olmoe": _DENSE,
        "mixtral": _ATTENTION | {"w1", "w2", "w3"},
        "deepseek_v3": (_LATENT - {"q_proj"}) | _GATED | {"kv_b_proj"},
    },
)


@dataclass(frozen=True)
class _Module:
    """A module with an adapter, or one without beside experts that have one.

    Attributes:
        name: of the module.
        group: pattern of those that must have one rank and scale.
        matrix, part: what it is of.
    """

    name: str
    group: str
    matrix: Matrix
    part: int


@dataclass(frozen=True)
class _Fused:
    """The experts of a layer in one tensor, ``[E, ...]``.

    Attributes:
        module: that has their factors.
        group: what a configuration calls it.
        matrices: of all experts, in their order.
    """

    module: str
    group: str
    matrices: list[Matrix]


def plan_vllm(model: FolderModel, adapters: FolderAdapters) -> tuple[list[Planned], dict[str, Any]]:
    """The tensors and the configuration that vLLM reads.

    Args:
        model: the folder.
        adapters: of it.

    Raises:
        RecipeError: it would not load them, or not use them.
    """
    modules, fused = _modules(model, adapters, VLLM)
    scaled = _scaled(modules, fused)
    return _plan(model, adapters, modules, fused, scaled)


def plan_sglang(
    model: FolderModel, adapters: FolderAdapters
) -> tuple[list[Planned], dict[str, Any]]:
    """The same for SGLang."""
    modules, fused = _modules(model, adapters, SGLANG)
    scaled = _scaled(modules, fused)
    rank = max(one.rank for one in scaled.values())
    scale = Counter(one.scale for one in scaled.values()).most_common(1)[0][0]
    planned, config = _plan(
        model, adapters, modules, fused, dict.fromkeys(scaled, Scaled(rank, scale))
    )
    # SGLang renames these weights, and not the targets that it reads them for.
    targets = {_SGLANG_RENAMES.get(name, name) for name in config["target_modules"]}
    return planned, config | {"target_modules": sorted(targets)}


def _modules(
    model: FolderModel, adapters: FolderAdapters, server: Server
) -> tuple[list[_Module], list[_Fused]]:
    """What is to be written; RecipeError for what the server would not load."""
    kind = model.folder.config.model_type
    if kind not in server.modules:
        raise adapters.error(
            f"is of a {kind} model, whose adapters {server.name} was not seen to load", _MERGED
        )
    if adapters.rows:
        names = ", ".join(adapters.rows)
        raise adapters.error(f"has vocabulary rows ({names}), which {server.name} has not", _MERGED)
    if not adapters.matrices:
        raise adapters.error("holds no adapters", _MERGED)
    layers = {_container(matrix) for matrix in adapters.matrices} - {None}
    modules: list[_Module] = []
    fused: dict[str, list[Matrix]] = {}
    adapted = {matrix.entry.slot for matrix in adapters.matrices}
    for entry in model.entries:
        matrix = adapters.matrix_of(entry)
        if matrix is None or (entry.slot not in adapted and _container(matrix) not in layers):
            continue
        if entry.parts[0].index:
            fused.setdefault(entry.parts[0].name, []).append(matrix)
            continue
        for at, name in enumerate(matrix.names):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in server.modules[kind]:
                raise adapters.error(
                    f"has adapters of {module}, which {server.name} does not apply", _MERGED
                )
            container = _container(matrix)
            group = module if container is None else rf"{container}\.\d+\.\w+"
            modules.append(_Module(module, group, matrix, at))
    if fused and kind not in server.fused:
        name = next(iter(fused))
        raise adapters.error(f"has adapters of {name}, which {server.name} does not apply", _MERGED)
    return modules, [_fused(name, matrices) for name, matrices in fused.items()]


def _container(matrix: Matrix) -> str | None:
    """What the experts of a layer stand in; ``None`` for what is no expert's."""
    name = matrix.names[0]
    if matrix.entry.parts[0].index:
        return name.rpartition(".")[0]
    match = _EXPERT.fullmatch(name)
    return None if match is None or matrix.expert is None else match["container"]


def _fused(name: str, matrices: list[Matrix]) -> _Fused:
    owner, _, parameter = name.rpartition(".")
    module = f"{owner}.base_layer" if parameter == "gate_up_proj" else owner
    return _Fused(module, name, matrices)


def _scaled(modules: list[_Module], fused: list[_Fused]) -> dict[str, Scaled]:
    """Rank and scale of each group: the largest rank, and the scale of the first that has one."""
    groups: dict[str, list[Matrix]] = {}
    for module in modules:
        groups.setdefault(module.group, []).append(module.matrix)
    groups |= {one.group: one.matrices for one in fused}
    scaled = {}
    for group, matrices in groups.items():
        ranks = [matrix.rank for matrix in matrices]
        scale = next((matrix.scale for matrix in matrices if matrix.rank), 1.0)
        scaled[group] = Scaled(max(*ranks, 1), scale)
    return scaled


def _plan(
    model: FolderModel,
    adapters: FolderAdapters,
    modules: list[_Module],
    fused: list[_Fused],
    scaled: Mapping[str, Scaled],
) -> tuple[list[Planned], dict[str, Any]]:
    planned = [t for m in modules for t in _of_module(m, scaled[m.group], adapters)]
    planned += [t for f in fused for t in _of_fused(f, scaled[f.group], adapters)]
    leaves = {module.name.rpartition(".")[2] for module in modules}
    leaves |= {one.group.rpartition(".")[2] for one in fused}
    config = config_of(str(model.folder.path), scaled, target_modules=sorted(leaves))
    return planned, config


def _of_module(module: _Module, scaled: Scaled, adapters: FolderAdapters) -> Iterator[Planned]:
    matrix, part, (rank, scale) = module.matrix, module.part, scaled

    def a() -> torch.Tensor:
        return adapters.factors(matrix, rank, scale).a

    def b() -> torch.Tensor:
        return adapters.factors(matrix, rank, scale).b[part]

    name = f"{_MODEL}{module.name}.lora_"
    yield Planned(f"{name}A.weight", matrix.dtype, (rank, matrix.inputs), a)
    yield Planned(f"{name}B.weight", matrix.dtype, (matrix.outputs()[part], rank), b)


def _of_fused(fused: _Fused, scaled: Scaled, adapters: FolderAdapters) -> Iterator[Planned]:
    (rank, scale), matrices = scaled, fused.matrices
    first, count = matrices[0], len(matrices)

    def stacked(make: Callable[[Matrix], torch.Tensor], axis: int) -> torch.Tensor:
        return torch.stack([make(matrix) for matrix in matrices], dim=axis)

    def a() -> torch.Tensor:
        return stacked(lambda m: adapters.factors(m, rank, scale).a, 0).flatten(0, 1)

    def b() -> torch.Tensor:
        return stacked(lambda m: torch.cat(adapters.factors(m, rank, scale).b), 2).flatten(1, 2)

    name = f"{_MODEL}{fused.module}.lora_"
    yield Planned(f"{name}A.weight", first.dtype, (rank * count, first.inputs), a)
    yield Planned(f"{name}B.weight", first.dtype, (sum(first.outputs()), rank * count), b)
