"""``moe-inject rollouts``: a saved student writes, by Megatron or at servers.

With a recipe and the flags of the training command behind ``--`` it becomes a run that writes, in
this process or, under ``torchrun``, in all of them (``generation_part``). With ``--server`` nothing
of Megatron's model is built (``served``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_moe_inject.host.commands import Commands, add_command
from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.rollouts.settings import Asked, Sampling

_EXAMPLES = """examples:
  moe-inject rollouts recipe.yaml --prompts data/code --output own -- <flags of training>
  torchrun --nproc-per-node 8 -m megatron_moe_inject.cli rollouts recipe.yaml --prompts data/code
    --output own -- <flags of training>, where --load names the folder that it saves to
  moe-inject rollouts --server http://a:8000,http://b:8000 --checkpoint save --prompts data/code
    --output own

A command that was interrupted goes on where it stopped, if it is given again as it was.
"""


def add_commands(commands: Commands) -> None:
    """Add the command; ``evaluates`` takes the options and returns our flags for a run that only
    evaluates, ``run``, with ``--server``, the text to print."""
    command = add_command(
        commands,
        "rollouts",
        "let a saved student write text to learn from",
        "Let a saved student go on from prompts, and write what it wrote, with the checkpoint's "
        "identity, for a recipe's data: [..., rollouts:DIR]. Megatron writes small models' text by "
        "a loop over the forward pass, at the layout of the training command; servers (vLLM, "
        "SGLang) write that of large ones.",
        _EXAMPLES,
        evaluates=_flags,
        run=_at_servers,
    )
    command.usage = (
        "%(prog)s [-h] --prompts DATA --output DIR [options] (RECIPE -- MEGATRON FLAGS | "
        "--server URLS --checkpoint DIR)"
    )
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe file (YAML)")
    command.add_argument("--cpu", action="store_true", help="gloo processes without a GPU")
    for flag, kind, metavar, default, text in (
        ("prompts", str, "DATA", None, "prefix of a data set (.bin, .idx), or JSON Lines with "
         '{"prompt": ids or text}'),
        ("output", str, "DIR", None, "the folder that gets the files"),
        ("prompt-tokens", int, "N", 32, "of a stretch of text that are a prompt (default 32)"),
        ("count", int, "N", None, "prompts at most (default: all)"),
        ("documents", str, "A:B", None, "take prompts of documents A to B - 1 alone; keep held-out "
         "ones out"),
        ("max-tokens", int, "N", 64, "of a completion (default 64)"),
        ("temperature", float, "T", 1.0, "0 takes the most likely token (default 1)"),
        ("top-k", int, "K", 0, "so many of the most likely tokens alone (default 0: all)"),
        ("top-p", float, "P", 1.0, "most likely tokens with so much probability (default 1)"),
        ("seed", int, "N", 0, "of the order of documents and of the draws (default 0)"),
        ("per-file", int, "N", 64, "texts of a file (default 64)"),
        ("batch", int, "N", 16, "texts that are written at once, by each data-parallel rank or "
         "server (default 16)"),
    ):  # fmt: skip
        command.add_argument(
            f"--{flag}", type=kind, metavar=metavar, default=default, help=text,
            required=flag in ("prompts", "output"),
        )  # fmt: skip
    command.add_argument(
        "--stop",
        type=int,
        metavar="ID",
        nargs="+",
        default=[],
        help="ids that end a completion, beside the tokenizer's end of text",
    )
    command.add_argument(
        "--no-cache", action="store_true", help="compute all keys and values anew for each token"
    )
    command.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the folder that training saves to, where a copy of its student writes: at servers, "
        "or merged with its adapters (--load)",
    )
    command.add_argument(
        "--ckpt-step", type=int, metavar="N", help="its iteration (default: newest)"
    )
    served = command.add_argument_group("at servers")
    for flag, metavar, text in (
        ("server", "URLS", "http://host:port of vLLM or SGLang, several with commas"),
        ("model", "NAME", "its name at the servers (default: the only one)"),
        ("tokenizer", "DIR", "Hugging Face folder, for prompts that are text"),
        ("key-from", "VARIABLE", "environment variable with the servers' API key"),
    ):
        served.add_argument(f"--{flag}", metavar=metavar, help=text)
    served.add_argument(
        "--protocol", choices=("auto", "vllm", "sglang"), default="auto", help="(default auto)"
    )
    served.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="seconds for one text"
    )


def asked_of(options: argparse.Namespace) -> Asked:
    """What the options ask for.

    Raises:
        RecipeError: a number that is none.
    """
    documents = None
    if options.documents is not None:
        first, colon, stop = options.documents.partition(":")
        if not (colon and first.isdecimal() and stop.isdecimal()):
            raise fail("--documents", options.documents, "is no range", "write such as 0:1000")
        documents = int(first), int(stop)
    asked = Asked(
        prompts=options.prompts,
        output=options.output,
        prompt_tokens=options.prompt_tokens,
        count=options.count,
        documents=documents,
        per_file=options.per_file,
        batch=options.batch,
        cache=not options.no_cache,
        sampling=Sampling(
            options.max_tokens,
            options.temperature,
            options.top_p,
            options.seed,
            tuple(options.stop),
            options.top_k,
        ),
        checkpoint=options.checkpoint,
        step=options.ckpt_step,
    )
    asked.check()
    if asked.folder.exists() and not asked.folder.is_dir():
        raise fail("--output", options.output, "is no folder", "name one")
    return asked


def _flags(options: argparse.Namespace) -> list[str]:
    """Our flags for a run that writes."""
    if options.recipe is None:
        raise RecipeError(
            "rollouts: RECIPE is missing; name it and put -- and the flags of the training command "
            "behind the options, or name --server and --checkpoint"
        )
    for name in ("model", "tokenizer", "key_from"):
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{flag}: is about servers; add --server, or leave it out", flag)
    if options.ckpt_step is not None and options.checkpoint is None:
        raise RecipeError(
            "--ckpt-step: is about --checkpoint here; for the iteration of --load, write it behind "
            "--, with the flags of the training command"
        )
    ours = asked_of(options).plain()
    return ["--inject-recipe", options.recipe, "--inject-rollouts", ours, "--eval-iters", "0"]


def _at_servers(options: argparse.Namespace) -> str:
    from megatron_moe_inject.rollouts.served import At, write_at_servers

    if options.recipe is not None or options.flags:
        raise RecipeError("--server: needs no recipe and no training flags; leave them out")
    if options.checkpoint is None:
        raise RecipeError(
            "--checkpoint: missing; name the folder that training saves to, so that files say "
            "whose text they have"
        )
    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    return write_at_servers(
        asked_of(options),
        At(
            options.server,
            options.model,
            options.protocol,
            options.timeout,
            options.key_from,
            tokenizer,
        ),
    )
