"""Moves models between safetensors, which ship, and Megatron checkpoints, which run.

    python models.py unpack NAME FOLDER -- MEGATRON FLAGS     models/NAME.* -> torch_dist checkpoint
    python models.py pack NAME FOLDER LOG -- MEGATRON FLAGS   torch_dist checkpoint -> models/NAME.*

Both run Megatron in one process: the model is Megatron's own, and its checkpoint holds the args in
common.pt like any other, so it loads at every parallel layout. Weights ship in fp16, whose rounding
is far below what bits per byte can show; NAME.json beside them has the checksum, the architecture
and how the model was trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import figures

MODELS = Path(__file__).with_name("models")
ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
ONE_PROCESS |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any port: nobody else connects


def start_megatron(flags: list[str]):
    """Starts Megatron in this process on the CPU lane and returns its args.

    Runs the collectives of Megatron's start in a world of one process.
    """
    from megatron_moe_inject.host import cpu_lane

    os.environ.update(ONE_PROCESS)
    cpu_lane.enable()
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    sys.argv = ["models.py", *flags, "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1"]
    args = parse_and_validate_args()
    initialize_megatron()
    return args


def build_model():
    """Megatron's GPTModel for the args that it was started with, whole, in eval mode."""
    from megatron_moe_inject.host.gpt_entry import model_provider

    return model_provider().eval()


def weights_of(model) -> dict:
    """The model's tensors by name, without Transformer Engine's extra state."""
    return {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_shipped(name: str, model, models: Path | None = None) -> dict:
    """Fills a model with shipped weights and returns their description. ValueError if damaged."""
    from safetensors.torch import load_file

    path = (models or MODELS) / f"{name}.safetensors"
    description = json.loads(path.with_suffix(".json").read_text())
    if checksum(path) != description["sha256"]:
        raise ValueError(f"{path} does not match the checksum in {name}.json: fetch it again")
    shipped = load_file(path)
    expected = weights_of(model)
    if {k: v.shape for k, v in shipped.items()} != {k: v.shape for k, v in expected.items()}:
        raise ValueError(
            f"{path} has other tensors than the model that the flags describe; "
            "the flags of the shipped models are in examples/quickstart/flags.sh"
        )
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in shipped.items()}, strict=False)
    return description


def unpack(name: str, folder: Path, models: Path, flags: list[str]) -> None:
    """Writes the shipped model as a Megatron checkpoint; the folder is used only when complete."""
    from megatron.training.checkpointing import save_checkpoint

    start_megatron(
        [*flags, "--ckpt-format", "torch_dist", "--save", str(folder), "--save-interval", "1"]
    )
    model = build_model()
    description = load_shipped(name, model, models)
    save_checkpoint(description["training"]["iterations"], [model], None, None, 0)


def pack(name: str, folder: Path, log: Path, models: Path, made_by: str, flags: list[str]) -> None:
    """Writes NAME.safetensors and NAME.json into `models` from a checkpoint and its log."""
    import torch
    from megatron.core import dist_checkpointing
    from safetensors.torch import save_file

    args = start_megatron(flags)
    model = build_model()
    iteration = int((folder / "latest_checkpointed_iteration.txt").read_text())
    wanted = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(wanted, str(folder / f"iter_{iteration:07d}"))
    model.load_state_dict(loaded["model"])
    weights = {k: v.detach().to(torch.float16).contiguous() for k, v in weights_of(model).items()}
    if not all(torch.isfinite(v).all() for v in weights.values()):
        raise ValueError(f"{folder} has weights that fp16 cannot hold")
    models.mkdir(exist_ok=True)
    path = models / f"{name}.safetensors"
    save_file(weights, path)
    run = figures.read_log(log)
    description = {
        "sha256": checksum(path),
        "parameters": sum(v.numel() for v in weights.values()),
        "stored_as": "float16",
        "flags": " ".join(flags).replace(f"--tokenizer-model {args.tokenizer_model} ", ""),
        "training": {
            "iterations": iteration,
            "tokens": iteration * run.tokens_per_step(args.seq_length),
            "python": ".".join(map(str, sys.version_info[:3])),
            "peak_learning_rate": max(rate for _, rate in run.terms["learning rate"]),
            "held_out_loss": {
                name.removeprefix("lm loss/"): round(series[-1][1], 4)
                for name, series in run.validation.items()
            },
            "made_by": made_by,
        },
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")
    print(f"{path}: {description['parameters']:,d} parameters, {path.stat().st_size:,d} bytes")


def main() -> None:
    arguments, flags = sys.argv[1:], []
    if "--" in arguments:
        flags = arguments[arguments.index("--") + 1 :]
        arguments = arguments[: arguments.index("--")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("unpack", "pack"):
        sub = commands.add_parser(command)
        sub.add_argument("name", help="such as student or teacher")
        sub.add_argument("folder", type=Path, help="folder of the Megatron checkpoint")
        sub.add_argument("--models", type=Path, default=MODELS, help="folder of shipped models")
        if command == "pack":
            sub.add_argument("--made-by", default="examples/quickstart/pretrain_models.sh")
            sub.add_argument("log", type=Path, help="what the training printed")
    given = parser.parse_args(arguments)
    if given.command == "unpack":
        unpack(given.name, given.folder.resolve(), given.models, flags)
    else:
        folder = given.folder.resolve()
        pack(given.name, folder, given.log, given.models, given.made_by, flags)


if __name__ == "__main__":
    main()
