"""``moe-inject import-hf`` and ``moe-inject export-hf``.

torch is imported when one of them runs: the other commands do without it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe_inject.host.commands import (
    Commands,
    add_command,
    cost,
    must_not_exist,
    progress_bar,
)
from megatron_moe_inject.host.domain_choice import add_choice, choice_of
from megatron_moe_inject.host.errors import RecipeError, listing
from megatron_moe_inject.host.text import memory_text, ranges, table

if TYPE_CHECKING:
    from megatron_moe_inject.convert.exporting import Exported, Trained
    from megatron_moe_inject.convert.folder_model import FolderModel
    from megatron_moe_inject.host.new_experts import NewExperts

_IMPORT_EXAMPLES = """examples:
  moe-inject import-hf Qwen3-30B-A3B --output ckpt/qwen3
  source ckpt/qwen3/flags.sh
  torchrun ... pretrain_gpt.py "${MODEL[@]}" "${TOKENIZER[@]}" --load ckpt/qwen3 ...
"""
_EXPORT_EXAMPLES = """examples:
  moe-inject export-hf ckpt/injected --hf Qwen3-30B-A3B --output Qwen3-30B-A3B-injected
  moe-inject export-hf --delta deltas/code --hf Qwen3-30B-A3B --output Qwen3-30B-A3B-injected
"""
_DTYPES = ("bf16", "fp32", "folder")
_LAYOUTS = ("gpt", "hybrid")


def add_commands(commands: Commands) -> None:
    """Add both commands to ``moe-inject``; ``run`` of the parsed options returns the text."""
    imports = add_command(
        commands,
        "import-hf",
        "write a Hugging Face folder as a Megatron checkpoint",
        "Write the model of a Hugging Face folder as a checkpoint that Megatron loads at any "
        "layout, and its options as flags.sh and flags.txt beside it. One tensor is in memory at a "
        "time; no GPU, no process group.",
        _IMPORT_EXAMPLES,
        run=_import,
    )
    imports.add_argument("folder", metavar="HF_DIR", type=Path, help="the folder of the model")
    imports.add_argument("--output", type=Path, required=True, help="a --save directory to write")
    imports.add_argument(
        "--dtype", choices=_DTYPES, default="folder",
        help="precision of the weights; folder keeps what the folder has (default)",
    )  # fmt: skip
    imports.add_argument(
        "--layout", choices=_LAYOUTS,
        help="a GPTModel (default where the architecture can be one) or a HybridModel",
    )  # fmt: skip
    imports.add_argument(
        "--vocab-multiple", metavar="N", type=int, default=128,
        help="pad the vocabulary with zeros to a multiple of N (default 128); N must be one of "
        "the tensor-parallel size",
    )  # fmt: skip
    exports = add_command(
        commands,
        "export-hf",
        "write a trained checkpoint, or a delta, as a Hugging Face folder",
        "Write the folder that a model was imported from anew, with the values that training "
        "changed. All else stays bitwise as it is stored there, codes and scales of quantised "
        "weights included.",
        _EXPORT_EXAMPLES,
        run=_export,
    )
    exports.add_argument(
        "checkpoint", metavar="CKPT", nargs="?", type=Path,
        help="a --save directory or an iteration in it",
    )  # fmt: skip
    exports.add_argument(
        "--delta", type=Path, help="a folder of export-delta, instead of a checkpoint"
    )
    add_choice(exports)
    exports.add_argument("--hf", type=Path, required=True, help="the folder it was imported from")
    exports.add_argument("--output", type=Path, required=True, help="a folder to write")
    exports.add_argument(
        "--card", type=Path, metavar="CKPT",
        help="what add-experts wrote, if a run without the plugin saved CKPT with new experts",
    )  # fmt: skip
    exports.add_argument(
        "--quantized", choices=("keep", "drop"), default="keep",
        help="encode what changed as the folder stores it (default), or write all in bfloat16 and "
        "take quantization_config out of config.json",
    )  # fmt: skip


def _import(options: argparse.Namespace) -> str:
    begin = time.monotonic()
    must_not_exist(options.output)
    if options.vocab_multiple < 1:
        raise RecipeError(f"--vocab-multiple: {options.vocab_multiple} is below 1; use 128")
    from megatron_moe_inject.convert.hf_folder import HfFolder
    from megatron_moe_inject.convert.importing import import_folder

    imported = import_folder(
        HfFolder.open("HF_DIR", options.folder),
        options.output,
        dtype=options.dtype,
        layout=options.layout,
        vocab_multiple=options.vocab_multiple,
        progress=progress_bar,
    )
    lines = [
        f"{options.output}: {imported.model_type}, {imported.tensors} tensors of the folder as "
        f"{imported.slices} slices, {memory_text(imported.bytes)}, {imported.rows} rows of "
        "vocabulary"
    ]
    if imported.left_out:
        lines.append(f"not taken, as they follow from others: {listing(imported.left_out, 4)}")
    if imported.card is not None:
        lines.append(
            f"{ranges(imported.card.ids())} of {imported.card.experts} experts are new, says "
            "the folder's card, which the checkpoint has too"
        )
    lines.append(f"Megatron's options of the model: {options.output / 'flags.sh'}")
    return "\n".join([*lines, cost(begin)])


def _export(options: argparse.Namespace) -> str:
    begin = time.monotonic()
    if (options.checkpoint is None) == (options.delta is None):
        raise RecipeError("export-hf: name either a checkpoint or --delta")
    must_not_exist(options.output)
    from megatron_moe_inject.convert.exporting import export_folder
    from megatron_moe_inject.convert.folder_model import FolderModel
    from megatron_moe_inject.convert.grown_folder import CARD
    from megatron_moe_inject.convert.hf_folder import HfFolder

    model, trained, card = _trained(options, FolderModel.of(HfFolder.open("--hf", options.hf)))
    exported = export_folder(
        model,
        trained,
        options.output,
        quantized=options.quantized,
        card=card,
        progress=progress_bar,
    )
    lines = _report(exported, options.output)
    if card is not None:
        lines.append(
            f"{card.experts} experts in a layer, of which {ranges(card.ids())} were added to "
            f"{card.base_experts}; {CARD} says so, for an import of the folder"
        )
    return "\n".join([*lines, cost(begin)])


def _trained(
    options: argparse.Namespace, model: FolderModel
) -> tuple[FolderModel, Trained, NewExperts | None]:
    """What is exported, the folder as it is to be, and the card of new experts."""
    from megatron_moe_inject.convert.grown_folder import with_new_experts
    from megatron_moe_inject.convert.trained import TrainedCheckpoint, TrainedDelta
    from megatron_moe_inject.experts.delta.index import DeltaFolder
    from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
    from megatron_moe_inject.host.new_experts import card_in

    choice = choice_of(options)
    card: NewExperts | None = None
    if options.delta is not None:
        if options.card is not None:
            raise RecipeError("--card: goes with a checkpoint, not with --delta", "--card")
        delta = DeltaFolder(options.delta)
        card = delta.index.new_experts
        model = with_new_experts(model, card)
        return model, TrainedDelta(delta, model, choice), card
    if choice.weights:
        raise RecipeError(
            "export-hf: --domain and --weights choose among the adapters of a delta; merge those "
            "of a checkpoint by moe-inject merge-adapters first"
        )
    place = CheckpointPlace("CKPT", options.checkpoint)
    checkpoint = place.open()
    place = place if options.card is None else CheckpointPlace("--card", options.card)
    args = (checkpoint if options.card is None else place.open()).common.get("args")
    card = card_in(args, str(place.path))
    if card is None and options.card is not None:
        raise place.error("has no card of new experts", "name what moe-inject add-experts wrote")
    experts = getattr(checkpoint.common.get("args"), "num_experts", None) or 0
    if card is None and experts > model.naming.experts > 0:
        raise place.error(
            f"has {experts} experts in a layer and no card of new ones, and the folder has "
            f"{model.naming.experts}",
            "name with --card the checkpoint that moe-inject add-experts wrote",
        )
    model = with_new_experts(model, card)
    return model, TrainedCheckpoint(checkpoint, model), card


def _report(exported: Exported, output: Path) -> list[str]:
    changed = {name: row for name, row in exported.rows.items() if row.changed}
    rows = [("changed tensor", "stored as", "changed", "of", "largest rounding", "mean")]
    rows += [
        (
            name,
            row.storage,
            str(row.changed),
            str(row.tensors),
            _rounding(row.largest),
            _rounding(row.mean),
        )
        for name, row in changed.items()
    ]
    total = sum(row.tensors for row in exported.rows.values())
    number = sum(row.changed for row in changed.values())
    lines = table(rows, right=(2, 3, 4, 5)) if changed else []
    lines.append(
        f"{output}: {number} of {total} tensors changed, the others are bitwise what the folder "
        f"holds; {memory_text(exported.written.bytes)}"
    )
    lines += exported.remarks
    if exported.written.left_out:
        names = listing(map(str, exported.written.left_out), 4)
        lines.append(f"not copied, weights as they were before training: {names}")
    return lines


def _rounding(value: float) -> str:
    return f"{value:.2g}" if value else "none"
