"""The scripts of ``examples/models``, whose commands are seen by a test instead of run.

    scripts = ModelScripts("olmoe", folder)
    (command,) = scripts.commands("convert.sh")
    command.module, command.words, command.processes

Bash runs them as a user would, with an interpreter that writes down what it is asked to do.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
NAMES = tuple(sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir()))
_RECORDER = r"""#!/usr/bin/env bash
printf '%s\0' "$@" $'\x1e' >>"$RECORDED"
"""
_END = "\x1e"


@dataclass(frozen=True)
class Command:
    """``python -m module words``, by ``torchrun`` with so many processes where that starts it."""

    module: str
    words: tuple[str, ...]
    processes: int | None

    @classmethod
    def of(cls, argv: list[str]) -> Command:
        """Read what an interpreter was given."""
        processes = None
        assert argv[0] == "-m", argv
        if argv[1] == "torch.distributed.run":
            processes = int(argv[argv.index("--nproc-per-node") + 1])
            argv = argv[argv.index("-m", 2) :]
        return cls(argv[1], tuple(argv[2:]), processes)


class ModelScripts:
    """A model's scripts in an environment.

    Args:
        name: of the model's folder.
        folder: for what the scripts write (``WORK``).
        environment: variables of ``steps.sh``.
    """

    def __init__(self, name: str, folder: Path, **environment: str) -> None:
        self.name, self.folder = name, folder
        self._recorder = folder / "recorder"
        self._recorder.write_text(_RECORDER)
        self._recorder.chmod(0o755)
        self.environment = {"WORK": str(folder), **environment}

    def commands(
        self, script: str, *words: str, folder: Path | None = None, **environment: str
    ) -> list[Command]:
        """What a script would run, in order, called from a folder.

        Raises:
            AssertionError: it failed; with what it printed.
        """
        run, recorded = self.run(script, *words, folder=folder, **environment)
        assert run.returncode == 0, run.stdout + run.stderr
        return recorded

    def run(
        self, script: str, *words: str, folder: Path | None = None, **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], list[Command]]:
        """The script's end, and what it would have run until then."""
        record = self.folder / "recorded"
        record.unlink(missing_ok=True)
        run = subprocess.run(
            ["bash", str(MODELS / self.name / script), *words],
            cwd=folder,
            env=self._variables(environment) | {"RECORDED": str(record)},
            capture_output=True,
            text=True,
            check=False,
        )
        words_of_all = record.read_text().split("\0")[:-1] if record.exists() else []
        recorded: list[list[str]] = [[]]
        for word in words_of_all:
            if word == _END:
                recorded.append([])
            else:
                recorded[-1].append(word)
        return run, [Command.of(argv) for argv in recorded[:-1]]

    def _variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        ours = {"PYTHON": str(self._recorder), **self.environment, **environment}
        outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        return outside | ours
