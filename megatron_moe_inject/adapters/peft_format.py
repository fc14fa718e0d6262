"""Adapters by the names that PEFT has on a model of transformers 5.

There the experts of a layer are one parameter ``[E, out, in]``, which PEFT adapts as a parameter
(``target_parameters``): A of all experts above each other ``[r E, in]``, B ``[out, r E]`` with the
expert as the faster index of its columns; experts without an adapter have zeros. Linear layers are
modules (``target_modules``), but for those whose names PEFT would take for the experts of older
models (``gate_proj``, a router's ``gate``): these are parameters as well. Two parameters of a
module are wrapped one around the other, and the last one has the module's own name.

Names come from the model itself, built without memory: a tensor that PEFT would not find is an
error here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moe_inject.adapters.adapter_folder import Planned
from megatron_moe_inject.adapters.folder_adapters import FolderAdapters, Matrix
from megatron_moe_inject.adapters.ranks import Scaled, config_of
from megatron_moe_inject.convert.folder_model import FolderModel

_MODEL = "base_model.model."
_WEIGHT = ".weight"
_RENAMED = (("", ""), (".block_sparse_moe.", ".mlp."), ("backbone.", "model."))
"""Parts of names in folders and in models of transformers 5."""
_EXPERT = re.compile(r"(?P<container>.+\.experts)\.\d+\.[^.]+\.weight")
_OLD_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Ends of module names that PEFT 0.21 takes for those of experts that were modules."""


@dataclass
class _Target:
    """What PEFT adapts at once: a linear layer, or a parameter.

    Attributes:
        name: of the parameter in the model.
        module: whether it is the weight of a linear layer that PEFT adapts as a module.
        experts: how many matrices it has; ``None`` of a matrix alone.
        parts: the adapters by expert, each with which of the folder's tensors it is; ``None``
            for all of them.
    """

    name: str
    module: bool
    experts: int | None = None
    parts: dict[int, tuple[Matrix, int | None]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What PEFT calls it in a configuration."""
        return self.name.removesuffix(_WEIGHT) if self.module else self.name

    @property
    def scaled(self) -> Scaled:
        """Rank of all its matrices, and scale of the first."""
        matrices = [matrix for matrix, _ in self.parts.values()]
        return Scaled(max(matrix.rank for matrix in matrices), matrices[0].scale)

    def planned(self, prefix: str, adapters: FolderAdapters) -> Iterator[Planned]:
        """Its two tensors."""
        matrix, part = next(iter(self.parts.values()))
        count, rank, outputs = self.experts or 1, self.scaled.rank, matrix.outputs()
        rows = sum(outputs) if part is None else outputs[part]
        shapes = {"A": (rank * count, matrix.inputs), "B": (rows, rank * count)}
        for factor, shape in shapes.items():
            make = functools.partial(self._make, factor, shape, adapters)
            name = f"{_MODEL}{prefix}.lora_{factor}.weight"
            yield Planned(name, matrix.dtype, shape, make)

    def _make(self, factor: str, shape: tuple[int, ...], adapters: FolderAdapters) -> torch.Tensor:
        (rank, scale), count = self.scaled, self.experts or 1
        dtype = next(iter(self.parts.values()))[0].dtype
        value = torch.zeros(shape, dtype=dtype)
        for expert, (matrix, part) in self.parts.items():
            factors = adapters.factors(matrix, rank, scale)
            if factor == "A":
                value.view(count, rank, -1)[expert] = factors.a
            else:
                value.view(-1, rank, count)[..., expert] = (
                    torch.cat(factors.b) if part is None else factors.b[part]
                )
        return value


def plan_peft(model: FolderModel, adapters: FolderAdapters) -> tuple[list[Planned], dict[str, Any]]:
    """The tensors and the configuration that PEFT reads.

    Args:
        model: the folder.
        adapters: of it.

    Raises:
        RecipeError: transformers' model has no such parameter, or there are rows alone.
    """
    if not adapters.matrices:
        raise adapters.error("has vocabulary rows alone, which PEFT does not load as LoRA")
    names = _Names(model)
    targets: dict[str, _Target] = {}
    for matrix in adapters.matrices:
        for name, expert, part in names.places_of(matrix):
            target = targets.setdefault(name, names.target(name))
            target.parts[expert or 0] = matrix, part
    planned = [
        tensor
        for target in targets.values()
        for tensor in target.planned(names.prefix(target, targets), adapters)
    ]
    indices = {}
    for tensor in adapters.rows:
        module = names.of(tensor).removesuffix(_WEIGHT)
        indices[module.rpartition(".")[2]] = list(adapters.ids)
        shape = (len(adapters.ids), names.shape(tensor)[1])
        planned.append(
            Planned(
                f"{_MODEL}{module}.token_adapter.trainable_tokens_delta",
                adapters.rows_dtype(tensor),
                shape,
                functools.partial(adapters.new_rows, tensor),
            )
        )
    config = config_of(
        str(model.folder.path),
        {target.key: target.scaled for target in targets.values()},
        target_modules=sorted(t.key for t in targets.values() if t.module),
        target_parameters=sorted(t.key for t in targets.values() if not t.module) or None,
        trainable_token_indices=indices or None,
    )
    return planned, config


class _Names:
    """Parameters of transformers' model by the names of a folder's tensors.

    Args:
        model: the folder.
    """

    def __init__(self, model: FolderModel) -> None:
        import transformers

        self._folder = model.folder
        with torch.device("meta"):
            self._model = transformers.AutoModelForCausalLM.from_config(model.folder.config)
        parameters = self._model.named_parameters(remove_duplicate=False)
        self._parameters: Mapping[str, torch.Tensor] = dict(parameters)
        self._has_experts = any(".experts." in name for name in self._parameters)

    def of(self, tensor: str) -> str:
        """The parameter that is a tensor of the folder.

        Raises:
            RecipeError: there is none.
        """
        name = self._find(tensor)
        if name is None:
            raise self._folder.error(
                f"has adapters of {tensor}, and transformers' model has no such parameter",
                "export it with its weights: moe-inject merge-adapters, then export-hf",
            )
        return name

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self._parameters[self.of(tensor)].shape)

    def places_of(self, matrix: Matrix) -> Iterator[tuple[str, int | None, int | None]]:
        """The parameters that a matrix is, each with the number of the expert in it and of the
        folder's tensor, ``None`` for a matrix alone and for all of them.

        Raises:
            RecipeError: there is none.
        """
        if matrix.entry.parts[0].index:
            (part,) = matrix.entry.parts
            yield self.of(part.name), part.index[0], None
            return
        expert = _EXPERT.fullmatch(matrix.names[0])
        if matrix.expert is None or expert is None:
            for at, name in enumerate(matrix.names):
                yield self.of(name), None, at
            return
        both = len(matrix.names) == 2
        first = "linear_fc1" in matrix.entry.slot.name
        kind = "gate_up_proj" if both else "up_proj" if first else "down_proj"
        yield self.of(f"{expert['container']}.{kind}"), matrix.expert, None

    def target(self, name: str) -> _Target:
        """What PEFT adapts for a parameter."""
        owner, parameter = name.rpartition(".")[0], self._parameters[name]
        if parameter.dim() == 3:
            return _Target(name, False, parameter.shape[0])
        linear = isinstance(self._model.get_submodule(owner), torch.nn.Linear)
        old = self._has_experts and owner.rpartition(".")[2] in _OLD_EXPERTS
        return _Target(name, linear and not old)

    def prefix(self, target: _Target, targets: Mapping[str, _Target]) -> str:
        """The module that has its factors: the owner, or what the wraps around it leave below."""
        owner = target.name.rpartition(".")[0]
        if target.module:
            return owner
        own = [n for n, _ in self._model.get_submodule(owner).named_parameters(recurse=False)]
        wrapped = [name for name in own if f"{owner}.{name}" in targets]
        outer = len(wrapped) - 1 - wrapped.index(target.name.rpartition(".")[2])
        return owner + ".base_layer" * outer

    def _find(self, tensor: str) -> str | None:
        for old, new in _RENAMED:
            name = tensor.replace(old, new) if old else tensor
            if name in self._parameters:
                return name
        return None
