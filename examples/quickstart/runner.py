"""Runs Megatron on processes of this machine with the quickstart's flags, for studies.

Everything a run prints goes to its log; a run that fails ends the study with the end of that log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parent
QUIET = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
WHOLE_EXPERTS = (
    "train.experts=selected",
    "train.adapters=[]",
    "train.embedding=false",
    "train.output_layer=false",
)
"""For ``--inject-set``: the chosen experts train whole, instead of what the quickstart trains."""


def flags(*names: str) -> list[str]:
    """Arrays of the quickstart's flags.sh, one after the other."""
    script = 'source "$0"; for n in "$@"; do r="$n[@]"; printf "%s\\n" "${!r}"; done'
    command = ["bash", "-c", script, str(QUICKSTART / "flags.sh"), *names]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.splitlines()


def logged(log: Path, *command: str) -> None:
    """Runs a command of this Python; raises SystemExit with the end of its log where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, *command], stdout=output, stderr=output, env=os.environ | QUIET
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{tail}\nfailed; the whole log is {log}")


def megatron(log: Path, *arguments: str, processes: int = 1) -> None:
    """One run of Megatron's training loop on gloo processes."""
    distributed = ("-m", "torch.distributed.run", "--standalone")
    distributed += ("--nproc-per-node", str(processes))
    logged(log, *distributed, "-m", "megatron_moe_inject.pretrain", "--cpu", *arguments)
