"""``moe-inject prepare-data`` and ``prepare-pairs``.

What reads tokenizers and writes data sets is imported when it runs: the other commands do without.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.text import table

if TYPE_CHECKING:
    from megatron_moe_inject.data.document_ids import Encoding
    from megatron_moe_inject.data.json_lines import Lines
    from megatron_moe_inject.data.prepare import Prepared

_EXAMPLES = """examples:
  moe-inject prepare-data --input code.jsonl.gz --tokenizer Qwen3-30B-A3B --output data/code
  moe-inject prepare-data --input text/*.jsonl --field content --tokenizer Qwen3-30B-A3B \\
      --output data/text --held-out 0.01 --seed 1 --workers 16
"""


_PAIR_EXAMPLES = """examples:
  moe-inject prepare-pairs --input pairs.jsonl --tokenizer Qwen3-30B-A3B --output data/pairs \\
      --max-length 4096
  moe-inject prepare-pairs --input ultra.jsonl.gz --fields instruction good bad \\
      --tokenizer Qwen3-30B-A3B --output data/pairs
"""


def add_commands(commands: Commands) -> None:
    """Add them to ``moe-inject``; ``run`` of the parsed options returns the text."""
    _add_prepare_data(commands)
    _add_prepare_pairs(commands)


def _add_prepare_pairs(commands: Commands) -> None:
    command = add_command(
        commands,
        "prepare-pairs",
        "write pairs of answers in JSON lines as a data set for objective.preference",
        "Encode prompts with a chosen and a rejected answer (texts, lists of ids, or chat messages "
        "where the tokenizer has a template; without a prompt, the messages that both begin with) "
        "and write them as a data set of Megatron's (PREFIX.bin, PREFIX.idx): a pair is a document "
        "of three sequences. Pairs whose answers are the same are left out. PREFIX.json says how "
        "much is in it and how it was made. An interrupted run leaves no data set.",
        _PAIR_EXAMPLES,
        run=_prepare_pairs,
    )
    _add_files(command)
    command.add_argument(
        "--fields", metavar=("PROMPT", "CHOSEN", "REJECTED"), nargs=3,
        default=["prompt", "chosen", "rejected"],
        help="the keys of a line (default: prompt chosen rejected)",
    )  # fmt: skip
    command.add_argument(
        "--max-length", metavar="N", type=int,
        help="leave out pairs of which prompt and an answer have more tokens; training takes none "
        "above its --seq-length",
    )  # fmt: skip
    _add_tokens(command, "answer", "prompt")


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input", metavar="FILE", type=Path, nargs="+", required=True,
        help="JSON Lines: an object in each line (.jsonl, also .gz, .bz2, .xz)",
    )  # fmt: skip
    command.add_argument(
        "--tokenizer", metavar="HF_DIR", type=Path, required=True,
        help="the folder of the student, or of its tokenizer",
    )  # fmt: skip
    command.add_argument(
        "--output", metavar="PREFIX", type=Path, required=True, help="as --data-path names it"
    )


def _add_tokens(command: argparse.ArgumentParser, ended: str, begun: str) -> None:
    command.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help=f"end each {ended} with the tokenizer's end of a document",
    )  # fmt: skip
    command.add_argument(
        "--eod-token", metavar="TOKEN", help="the token that ends a document (default: eos_token)"
    )
    command.add_argument(
        "--no-special-tokens", action="store_true",
        help=f"without the tokens that the tokenizer puts around a {begun} by itself",
    )  # fmt: skip


def _add_prepare_data(commands: Commands) -> None:
    command = add_command(
        commands,
        "prepare-data",
        "write text in JSON lines as Megatron's data sets",
        "Encode the texts of JSON Lines files with a Hugging Face tokenizer and write them as a "
        "data set of Megatron's (PREFIX.bin, PREFIX.idx), with --held-out also the documents that "
        "are held out (PREFIX_held_out). PREFIX.json says how much is in them and how they were "
        "made. An interrupted run leaves no data set.",
        _EXAMPLES,
        run=_prepare,
    )
    _add_files(command)
    command.add_argument(
        "--field", metavar="KEY", default="text", help="the key of the text (default: text)"
    )
    command.add_argument(
        "--held-out", metavar="SHARE", type=float, default=0.0,
        help="share of the documents to hold out, such as 0.01; which ones follows from a hash of "
        "the text and the seed",
    )  # fmt: skip
    command.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of that hash (default 0)"
    )
    _add_tokens(command, "document", "text")
    command.add_argument(
        "--workers", metavar="N", type=int, default=len(os.sched_getaffinity(0)),
        help="processes that encode (default: one for each core)",
    )  # fmt: skip


def _prepare(options: argparse.Namespace) -> str:
    if options.workers < 1:
        raise fail("--workers", options.workers, "is below 1", "use at least 1")
    if not 0 <= options.held_out < 1:
        raise fail("--held-out", options.held_out, "is no share", "use one from 0 to below 1")
    _check_options(options)
    from megatron_moe_inject.data.document_ids import end_of_document, load_tokenizer
    from megatron_moe_inject.data.json_lines import check_inputs
    from megatron_moe_inject.data.prepare import prepare

    check_inputs(options.input)
    tokenizer = load_tokenizer("--tokenizer", options.tokenizer)
    end = end_of_document(tokenizer, options.eod_token) if options.append_eod else None
    begin = time.monotonic()
    encoding = _encoding(options, end)
    done = prepare(
        options.input,
        options.output,
        tokenizer,
        encoding,
        workers=options.workers,
        watch=lambda lines: _watched(lines, options.input),
    )
    return "\n".join(_report(options, tokenizer, encoding, done, time.monotonic() - begin))


def _check_options(options: argparse.Namespace) -> None:
    if options.output.name in ("", ".", "..") or options.output.is_dir():
        raise fail("--output", str(options.output), "is a folder", "add a name, such as data/code")
    if not options.append_eod and options.eod_token:
        raise RecipeError("--eod-token: goes with --append-eod; leave one of them out")


def _prepare_pairs(options: argparse.Namespace) -> str:
    _check_options(options)
    if options.max_length is not None and options.max_length < 2:
        raise fail("--max-length", options.max_length, "is below 2", "use --seq-length's")
    from megatron_moe_inject.data.document_ids import end_of_document, load_tokenizer
    from megatron_moe_inject.data.json_lines import check_inputs
    from megatron_moe_inject.data.prepare_pairs import PairEncoding, prepare_pairs

    check_inputs(options.input)
    tokenizer = load_tokenizer("--tokenizer", options.tokenizer)
    end = end_of_document(tokenizer, options.eod_token) if options.append_eod else None
    encoding = PairEncoding(
        fields=tuple(options.fields),
        special_tokens=not options.no_special_tokens,
        end=end,
        rows=_rows(options.tokenizer),
        max_length=options.max_length,
    )
    done = prepare_pairs(options.input, options.output, tokenizer, encoding)
    lines = [
        f"{options.output}: {done.pairs:,} pairs, {done.tokens:,} tokens; the longest takes "
        f"--seq-length {done.longest:,}"
    ]
    if done.alike:
        lines.append(f"{done.alike:,} pairs of twice the same answer were left out")
    if done.too_long:
        lines.append(f"{done.too_long:,} pairs above {options.max_length:,} were left out")
    lines.append(
        f"recipe: objective: {{preference: {{data: [{options.output}]}}}}, and a share in mixing; "
        f"Megatron's flags: --train-data-path TEXT ... {options.output}"
    )
    return "\n".join(lines)


def _encoding(options: argparse.Namespace, end: int | None) -> Encoding:
    from megatron_moe_inject.data.document_ids import Encoding

    return Encoding(
        field=options.field,
        special_tokens=not options.no_special_tokens,
        end=end,
        rows=_rows(options.tokenizer),
        held_out=options.held_out,
        seed=options.seed,
    )


def _rows(folder: Path) -> int | None:
    """Rows of the embedding of the model in the same folder; ``None`` where there is none."""
    from megatron_moe_inject.host.safetensors_folder import read_json

    if not (folder / "config.json").exists():
        return None
    config = read_json(
        folder, "config.json", lambda problem, remedy: fail("--tokenizer", folder, problem, remedy)
    )
    text = config.get("text_config")
    rows = (text if isinstance(text, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _watched(chunks: Iterable[Lines], inputs: list[Path]) -> Iterator[Lines]:
    from tqdm import tqdm

    from megatron_moe_inject.data.json_lines import is_compressed

    known = not any(map(is_compressed, inputs))
    total = sum(path.stat().st_size for path in inputs) if known else None
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(sum(map(len, chunk.lines)))


def _report(
    options: argparse.Namespace, tokenizer: Any, encoding: Encoding, done: Prepared, seconds: float
) -> list[str]:
    rows = [("data set", "documents", "tokens", "bytes of text", "bytes a token")]
    rows += [
        (
            f"{options.output}{name}",
            f"{size.documents:,}",
            f"{size.tokens:,}",
            f"{size.bytes:,}",
            f"{size.bytes / size.tokens:.2f}",
        )
        for name, size in done.sets.items()
    ]
    lines = table(rows, right=(1, 2, 3, 4))
    lines += _ends(tokenizer, encoding, done)
    known = "" if encoding.rows is None else f"; the model in its folder has {encoding.rows:,} rows"
    lines.append(f"largest id {done.largest_id:,} of a vocabulary of {len(tokenizer):,}{known}")
    if done.empty:
        lines.append(f"{done.empty:,} lines without text were left out")
    tokens = sum(size.tokens for size in done.sets.values())
    lines.append(
        f"{seconds:.1f} s: {done.read_bytes / seconds / 1e6:.1f} MB and {tokens / seconds:,.0f} "
        f"tokens a second with {options.workers} processes"
    )
    model = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {options.tokenizer}"
    if len(done.sets) > 1:
        data = " ".join(
            f"--{split}-data-path {options.output}{name}"
            for split, name in zip(("train", "valid"), done.sets, strict=True)
        )
    else:
        data = f"--data-path {options.output}"
    return [*lines, f"Megatron's flags: {model} {data}"]


def _ends(tokenizer: Any, encoding: Encoding, done: Prepared) -> list[str]:
    """What stands around a document, and what may surprise."""
    if encoding.end is None:
        return ["documents have no token that ends them"]
    word = tokenizer.convert_ids_to_tokens(encoding.end)
    lines = [f"each document ends with {word} ({encoding.end})"]
    if word != (own := tokenizer.eos_token or tokenizer.sep_token):
        lines.append(
            f"Megatron takes {own} for the end of a document (--reset-position-ids, "
            "--eod-mask-loss and the like)"
        )
    if done.ends_within:
        lines.append(f"{done.ends_within:,} documents hold {word} within their text as well")
    return lines
