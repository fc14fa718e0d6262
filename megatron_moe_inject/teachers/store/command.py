"""``moe-inject store-teacher``: write what a teacher says about the data of its domains.

torch and Megatron are imported when it runs: the other commands do without them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.host.text import memory_text

if TYPE_CHECKING:
    import torch

    from megatron_moe_inject.teachers.store.job import StoreJob
    from megatron_moe_inject.teachers.store.kept import Choices
    from megatron_moe_inject.teachers.store.writer import StoreWriter

NAME = "store-teacher"
STATES = ("native", "fp8")
_EXAMPLES = """examples:
  moe-inject store-teacher recipe.yaml --output stores/coder --top 64 --temperatures 2 --
    --data-path 9 text 1 code --split 99,1,0 --seq-length 4096 --bf16
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen3-30B-A3B
  CUDA_VISIBLE_DEVICES=1 moe-inject store-teacher ... --part 1/4 -- ...     # one of four processes
  moe-inject store-teacher recipe.yaml --output stores/states --states fp8 -- ...
  torchrun ... --inject-recipe recipe.yaml --inject-set teachers.coder.source=store:stores/coder
"""


def add_commands(commands: Commands) -> None:
    """Add the command to ``moe-inject``; ``writes_store`` takes the options and the flags."""
    parser = add_command(
        commands,
        NAME,
        "write what a teacher says about the data of its domains, for source: store:/dir",
        "Run a teacher of a recipe over the data of its domains and write what it says of each "
        "token, with shards that are whole or not there; the same command goes on with what was "
        "interrupted. Behind -- stand the flags that name the data, its tokenizer and, by "
        "--seq-length, how much the teacher reads at once; those of a student do no harm.",
        _EXAMPLES,
        writes_store=write_store,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML)")
    parser.add_argument("--output", type=Path, required=True, help="the store's folder")
    parser.add_argument("--teacher", metavar="NAME", help="of the recipe, if it has several")
    parser.add_argument(
        "--inject-set", metavar="KEY=VALUE", action="append", nargs="+", default=[],
        help="override recipe fields, as in training",
    )  # fmt: skip
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--top", metavar="K", type=int, help="the K most likely ids of each token (default 64)"
    )
    kept.add_argument(
        "--draw", metavar="N", type=int,
        help="draw N ids of each token instead, at one temperature; for tail: sample",
    )  # fmt: skip
    kept.add_argument(
        "--states", choices=STATES, nargs="?", const="native",
        help="keep what the teacher's head reads instead, as it is or in fp8, and the head once: "
        "all that a teacher says, many bytes a token",
    )  # fmt: skip
    parser.add_argument(
        "--mass", metavar="P", type=float,
        help="of the K ids only as many as have this probability together, such as 0.99",
    )  # fmt: skip
    parser.add_argument(
        "--log-probs", choices=("packed", "bf16", "fp32", "fp16"),
        help="their precision: six bits (default), or as they are; of a teacher with align: chunks "
        "fp16 (default) or fp32",
    )  # fmt: skip
    parser.add_argument(
        "--temperatures", metavar="T", type=float, nargs="+",
        help="at which it will be distilled, beside 1 (default those of the recipe)",
    )  # fmt: skip
    parser.add_argument(
        "--context", metavar="TOKENS", type=int,
        help="that the teacher reads at once (default --seq-length)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", metavar="TOKENS", type=int,
        help="of longer documents: how many of them were read before (default a quarter)",
    )  # fmt: skip
    parser.add_argument(
        "--documents", metavar="A:B", help="only these of each data set, such as 0:1000"
    )
    parser.add_argument(
        "--shard-tokens", metavar="N", type=int,
        help="tokens of a shard, which is in memory whole (default 1,048,576; of states 131,072)",
    )  # fmt: skip
    parser.add_argument(
        "--pass-tokens", metavar="N", type=int, default=1 << 14,
        help="tokens of one forward pass (default 16,384)",
    )  # fmt: skip
    parser.add_argument(
        "--part", metavar="I/N", default="0/1",
        help="this is process I of N, which share the shards (default 0/1)",
    )  # fmt: skip
    parser.add_argument(
        "--sign", metavar="KEY", type=Path,
        help="sign the whole store with this Ed25519 private key (PEM)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", metavar="N", type=int, default=0,
        help="run the teacher again over N documents, and say how far the store is from it",
    )  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")


def write_store(options: argparse.Namespace, recipe_args: argparse.Namespace) -> str:
    """Write, or go on; what to print.

    Args:
        options: of this command.
        recipe_args: Megatron's flags with the recipe's.

    Raises:
        RecipeError: a mistake in any of them, or a store that cannot be written.
    """
    from megatron_moe_inject.recipe.flags import name_error, recipe_from_args
    from megatron_moe_inject.teachers.store.job import StoreJob
    from megatron_moe_inject.teachers.store.manifest import MANIFEST
    from megatron_moe_inject.teachers.store.signing import check_package, private_key, sign
    from megatron_moe_inject.teachers.store.writer import StoreWriter

    choices, part = _choices(options), _part(options.part)
    key = None
    if options.sign is not None:
        check_package("--sign")
        key = private_key(options.sign)
    recipe = recipe_from_args(recipe_args)
    assert recipe is not None, "the command line names it"
    try:
        job = StoreJob(recipe, recipe_args, choices)
    except RecipeError as error:
        raise name_error(error, recipe_args) from None
    if job.told is None:
        _device_there(options.cpu)
    elif options.verify:
        raise fail("--verify", options.verify, "runs a teacher again, and this one is served",
                   "leave it out")  # fmt: skip
    writer = StoreWriter(choices.output, job.plan, job.pieces(), choices.failure)
    job.copy_tokenizer()
    print("\n".join(_announced(job, writer)), flush=True)
    lines = _written(job, writer, part, options.cpu)
    manifest = writer.finish(job.bin_sha256)
    if manifest is None:
        return "\n".join([*lines, f"{len(writer.missing)} shards are left to other processes"])
    if options.verify:
        lines.append(_verified(job, options.verify, options.cpu))
    if key is not None:
        signer = sign(choices.output / MANIFEST, key)
        lines.append(f"signed; to have that checked: teachers.{job.name}.trusted: [{signer}]")
    return "\n".join(
        [
            *lines,
            f"{choices.output}: {manifest.rows:,} tokens in {len(manifest.shards)} shards, "
            f"{memory_text(manifest.bytes)}, "
            f"{manifest.bytes / max(1, manifest.rows):.1f} bytes a token",
            f"to train from it: --inject-set teachers.{job.name}.source=store:{choices.output}",
        ]
    )


def _choices(options: argparse.Namespace) -> Choices:
    from megatron_moe_inject.teachers.store.kept import Choices

    if options.verify < 0:
        raise fail("--verify", options.verify, "is negative", "write a number of documents")
    for flag in ("top", "draw", "shard_tokens", "pass_tokens", "context"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise fail(f"--{flag.replace('_', '-')}", value, "is not positive", "write 1 or more")
    if options.mass is not None and not 0 < options.mass < 1:
        raise fail("--mass", options.mass, "is not in (0, 1)", "write such as 0.99")
    beside = {"draw": ("mass", "log_probs"), "states": ("mass", "log_probs", "temperatures")}
    for kind, others in beside.items():
        for other in others if getattr(options, kind) is not None else ():
            if getattr(options, other) is not None:
                flag = f"--{other.replace('_', '-')}"
                raise fail(
                    flag, getattr(options, other), f"is of the most likely ids, and --{kind} keeps "
                    "others", f"leave out {flag} or --{kind}",
                )  # fmt: skip
    if options.draw is not None and options.verify:
        raise fail(
            "--verify", options.verify, "compares probabilities, which drawn ids do not have",
            "leave it out, or write another store of a few --documents with --top",
        )  # fmt: skip
    documents = None
    if options.documents is not None:
        first, colon, last = options.documents.partition(":")
        if not (colon and first.isdigit() and last.isdigit()):
            raise fail("--documents", options.documents, "is no range", "write such as 0:1000")
        documents = int(first), int(last)
    names = (
        "output", "teacher", "mass", "temperatures", "context", "overlap", "shard_tokens",
        "pass_tokens", "states",
    )  # fmt: skip
    return Choices(
        **{name: getattr(options, name) for name in names},
        top=options.top,
        log_probs=options.log_probs,
        draw=options.draw or 0,
        documents=documents,
    )


def _part(text: str) -> tuple[int, int]:
    own, slash, count = text.partition("/")
    if not (slash and own.isdigit() and count.isdigit() and int(own) < int(count)):
        raise fail("--part", text, "is no part", "write 0/4 to 3/4 for four processes")
    return int(own), int(count)


def _device_there(cpu: bool) -> None:
    import torch

    if not cpu and not torch.cuda.is_available():
        raise RecipeError("--cpu: missing; there is no GPU here: add it to run on the CPU")


def _announced(job: StoreJob, writer: StoreWriter) -> list[str]:
    """Before anything runs: what it will be."""
    from megatron_moe_inject.teachers.store.part import what_is_kept

    plan, layout = job.plan, job.plan.row_format
    rows = sum(piece.rows for piece in writer.pieces)
    largest = layout.widest
    most = "at most " if plan.counted else ""
    kept = f"{most}{plan.slots} of {plan.vocab_size:,} ids, {plan.log_probs} log-probabilities, "
    kept += f"temperatures {', '.join(f'{t:g}' for t in plan.temperatures)}"
    if plan.chunks is not None:
        kept = what_is_kept(plan)
    elif plan.drawn or plan.states is not None:
        kept = f"{what_is_kept(plan)}, of {plan.vocab_size:,} ids"
    lines = [
        f"teacher {job.name}: {plan.teacher.source} ({plan.teacher.architecture}), "
        f"{plan.teacher.dtype}, reads {plan.context} tokens at once",
        f"{kept}: {most}{largest} bytes a token",
        f"{sum(d.last - d.first for d in plan.data):,} documents, {rows:,} tokens, "
        f"{len(writer.pieces)} shards: {most}{memory_text(rows * largest)}",
    ]
    lines += job.remarks
    if job.told is not None:
        lines.append(job.told.told)
    done = len(writer.pieces) - len(writer.missing)
    return [*lines, f"{done} shards are there already"] if done else lines


def _written(job: StoreJob, writer: StoreWriter, part: tuple[int, int], cpu: bool) -> list[str]:
    """Write this process' shards; how fast it went."""
    from megatron_moe_inject.teachers.store.head import HEAD, write_head
    from megatron_moe_inject.teachers.store.produce import Producer

    own, count = part
    mine = {piece.file for piece in writer.pieces[own::count]}
    todo = [piece for piece in writer.missing if piece.file in mine]
    if not todo:
        return []
    with job.writing(lambda: _device(job, cpu)) as producer:
        begin = time.monotonic()
        if job.plan.states is not None and not (job.choices.output / HEAD).is_file():
            assert isinstance(producer, Producer), "only a model has states"
            write_head(job.choices.output, *producer.head)
        size = rows = 0
        from tqdm import tqdm

        total = sum(piece.rows for piece in todo)
        with tqdm(total=total, unit="tokens", unit_scale=True, disable=None, leave=False) as bar:
            for piece in todo:
                content = producer.rows(
                    job.tokens(piece),
                    piece.lengths.tolist(),
                    data=piece.data,
                    first_token=piece.first_token,
                )
                size += writer.write(piece, content)
                rows += piece.rows
                bar.update(piece.rows)
        seconds = time.monotonic() - begin
    return [
        f"{rows:,} tokens in {seconds:.1f} s: {rows / seconds:,.0f} tokens and "
        f"{size / seconds / 1e6:.1f} MB a second"
    ]


def _device(job: StoreJob, cpu: bool) -> torch.device:
    """Where the teacher runs; on the CPU Megatron's needs the stand-ins of the CPU lane."""
    import torch

    if cpu and job.info.kind == "megatron":
        from megatron_moe_inject.host import cpu_lane

        cpu_lane.enable(force=True)
    return torch.device("cpu" if cpu else "cuda")


def _verified(job: StoreJob, count: int, cpu: bool) -> str:
    """How far the store is from its teacher, over some documents of its first data set."""
    import numpy as np
    import torch

    from megatron_moe_inject.teachers.store.chunk_rows import ChunkProducer, verify_chunks
    from megatron_moe_inject.teachers.store.produce import Producer
    from megatron_moe_inject.teachers.store.reader import Store
    from megatron_moe_inject.teachers.store.verify import verify

    text, stored, device = job.texts[0], job.plan.data[0], _device(job, cpu)
    known = np.arange(stored.first, stored.last)
    chosen = np.random.default_rng(0).permutation(known[text.lengths[known] > 1])[:count]
    spans = [(text.starts[n], text.lengths[n]) for n in np.sort(chosen)]
    places = np.concatenate([np.arange(a, a + n) for a, n in spans] or [np.zeros(0, np.int64)])
    tokens = text.at(places)
    with job.teacher(device) as teacher, torch.no_grad():
        once, twice = (job.producer(teacher, device, pass_tokens=size) for size in (None, 1))
        store = Store(job.choices.output, job.choices.failure)
        lengths = [int(length) for _, length in spans]
        if isinstance(once, ChunkProducer) and isinstance(twice, ChunkProducer):
            return verify_chunks(store, (once, twice), tokens, lengths, places, 0).told()
        assert isinstance(once, Producer) and isinstance(twice, Producer), "of ids or states"  # noqa: PT018
        return verify(store, (once, twice), tokens, lengths, places, 0).told()
