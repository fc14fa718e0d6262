"""``moe-inject export-adapters``: adapters of a checkpoint as a folder that others load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe_inject.adapters.adapter_folder import (
    FORMAT,
    VERSION,
    AdapterBase,
    Planned,
    Progress,
    folder_checksum,
    write_adapter_folder,
)
from megatron_moe_inject.adapters.folder_adapters import FolderAdapters
from megatron_moe_inject.adapters.peft_format import plan_peft
from megatron_moe_inject.adapters.served_formats import plan_sglang, plan_vllm
from megatron_moe_inject.convert.folder_model import FolderModel
from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.commands import must_not_exist
from megatron_moe_inject.host.domain_choice import NOTHING_CHOSEN, DomainChoice

Plan = Callable[[FolderModel, FolderAdapters], tuple[list[Planned], dict[str, Any]]]
FORMATS: Mapping[str, Plan] = {"peft": plan_peft, "vllm": plan_vllm, "sglang": plan_sglang}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        matrices, rows: how many of Megatron's matrices, and of the vocabulary's rows.
        tensors, bytes: of the file.
        config: of ``adapter_config.json``.
        base: what it belongs to.
    """

    matrices: int
    rows: int
    tensors: int
    bytes: int
    config: Mapping[str, Any]
    base: AdapterBase


def export_adapters(
    trained: CheckpointPlace,
    model: FolderModel,
    output: Path,
    consumer: str,
    progress: Progress,
    choice: DomainChoice = NOTHING_CHOSEN,
) -> Exported:
    """Write the adapters of a checkpoint. No collective.

    Args:
        trained: holds adapters or vocabulary rows, and else what an import of the folder gives.
        model: the folder.
        output: must not exist; appears whole or not at all.
        consumer: one of ``FORMATS``.
        progress: wraps slices and tensors to show how far it is.
        choice: of one domain, where each has its own.

    Raises:
        RecipeError: of the checkpoint, or what the consumer would not load.
    """
    must_not_exist(output)
    adapters = FolderAdapters(trained.open(), model, choice)
    tensors, config = FORMATS[consumer](model, adapters)
    adapters.check_base(progress)
    base = AdapterBase(
        format=FORMAT,
        version=VERSION,
        sha256=folder_checksum(model.folder, progress),
        folder=str(model.folder.path),
        checkpoint=adapters.base,
        consumer=consumer,
    )
    size = write_adapter_folder(output, tensors, config, base, progress)
    rows = len(adapters.ids) if adapters.rows else 0
    return Exported(len(adapters.matrices), rows, len(tensors), size, config, base)
