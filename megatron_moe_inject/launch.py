"""Run an unmodified Megatron training script with the plugin installed.

    python -m megatron_moe_inject.launch [--cpu] [--cpu-force] (SCRIPT | -m MODULE) ARGS...

The script runs as ``__main__`` with the ``sys.argv`` and ``sys.path`` that python itself would
give it, so that relative imports of its neighbours, pickling and spawned workers find what they
expect. The plugin goes in first, because scripts bind Megatron's names when they are imported.
``--cpu`` enables the CPU lane, ``--cpu-force`` does so although there is a GPU.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

_NO_DEVICE = (
    "add --cpu before the other flags to run on CPUs with gloo (for development), or see why "
    "torch.cuda.is_available() is false here"
)
USAGE = "usage: python -m megatron_moe_inject.launch [--cpu] [--cpu-force] (SCRIPT | -m MODULE) ..."


def prepare() -> None:
    """Take our own options off ``sys.argv``, enable the lane if asked, and install the plugin.

    Options count only in front of the first other argument. Rank 0 says which Megatron is used.
    Everything is idempotent.

    Raises:
        SystemExit: with one line, when the CPU lane refuses this machine.
    """
    from megatron_moe_inject import install
    from megatron_moe_inject.host import compat, cpu_lane

    wanted = set()
    while len(sys.argv) > 1 and sys.argv[1] in ("--cpu", "--cpu-force"):
        wanted.add(sys.argv.pop(1))
    if wanted:
        try:
            cpu_lane.enable(force="--cpu-force" in wanted)
        except cpu_lane.GpuPresentError as error:
            sys.exit(f"moe-inject: {error}")
    compat.use_prebuilt_dataset_helpers()
    install()
    if os.environ.get("RANK", "0") == "0":
        compat.say_which_megatron()


def require_device() -> None:
    """See, before Megatron complains of what follows from it, that there is a GPU or the CPU lane.

    To be called after ``prepare``; who only asks for help needs none.

    Raises:
        SystemExit: with one line, without either.
    """
    if not _has_device() and not {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(f"moe-inject: no GPU found: {_NO_DEVICE}")


def _has_device() -> bool:
    import torch

    from megatron_moe_inject.host import cpu_lane

    return cpu_lane.is_enabled() or torch.cuda.is_available()


def main() -> None:
    """Become the script named on the command line."""
    options = []
    while len(sys.argv) > 1 and sys.argv[1] in ("--cpu", "--cpu-force"):
        options.append(sys.argv.pop(1))
    as_module = sys.argv[1:2] == ["-m"]
    if as_module:
        del sys.argv[1]
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(USAGE)
    target = sys.argv[1]
    if not as_module:
        if not os.path.exists(target):
            sys.exit(f"moe-inject: can't open script {target!r}: no such file")
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(os.path.abspath(target))
    script_arguments = sys.argv[2:]
    sys.argv[1:] = options
    prepare()
    sys.argv = [target, *script_arguments]
    if as_module:
        if not _module_exists(target):
            sys.exit(f"moe-inject: no module named {target!r}")
        _say_without_device()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        _say_without_device()
        runpy.run_path(target, run_name="__main__")


def _say_without_device() -> None:
    """A script that does not train may run without a GPU, so this is a remark."""
    if os.environ.get("RANK", "0") == "0" and not _has_device():
        print(f"moe-inject: no GPU found; to train: {_NO_DEVICE}", file=sys.stderr, flush=True)


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any: nobody else connects
}


def only_evaluate(flags: Sequence[str], ours: Sequence[str], *, cpu: bool) -> None:
    """Become a run of a training command's ``flags`` and ``ours`` that only evaluates.

    Raises:
        SystemExit: 2 with one line for a mistake in the recipe or the flags.
    """
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    needed = []
    if "--train-iters" not in flags and "--train-samples" not in flags:
        needed = ["--train-iters", "1"]  # Megatron wants to know, also where nothing trains
    sys.argv[1:] = [*(["--cpu"] if cpu else []), *flags, *ours, *needed, "--skip-train"]
    prepare()
    require_device()
    from megatron_moe_inject.host import gpt_entry

    gpt_entry.main()


if __name__ == "__main__":
    main()
