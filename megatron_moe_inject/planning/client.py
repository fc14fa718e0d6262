"""Asks the planning process for plans of layouts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.planning.job_plan import JobPlan, plan_of_json


@dataclass(frozen=True)
class Answer:
    """A plan, and what belongs to it.

    Attributes:
        steps: of the whole run, where the flags say them.
        remarks: what is estimated.
    """

    plan: JobPlan
    steps: int | None
    remarks: Sequence[str]


class Planner:
    """Plans by a process that lives until ``close``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        # It lives as long as the process.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def plan(self, recipe: str, flags: Sequence[str], gpus: int, **options: Any) -> Answer:
        """The plan of a layout.

        Args:
            recipe: YAML, its experts resolved.
            flags: Megatron's.
            gpus: ranks of the job.
            options: see ``server.answer``.

        Raises:
            RecipeError: the flags do not go together, or do not fit that many GPUs.
        """
        request = {"recipe": recipe, "flags": list(flags), "gpus": gpus, **options}
        asked, answers = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its answer tells
            asked.write(json.dumps(request) + "\n")
            asked.flush()
        found = json.loads(answers.readline() or "{}")
        if "error" in found:
            raise RecipeError(found["error"])
        if "plan" not in found:
            raise RuntimeError(found.get("broken") or f"the planning process ended: {self._said()}")
        return Answer(plan_of_json(found["plan"]), found["steps"], found["remarks"])

    def _said(self) -> str:
        """The end of what the process has written to stderr."""
        self._log.seek(0)
        return self._log.read()[-2000:]

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        if self._process is None:
            hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RANK": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_moe_inject.planning.server"],
                env=os.environ | hidden,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        asked, answers = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answers is not None
        return asked, answers

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            asked, answers = self._pipes()
            with contextlib.suppress(BrokenPipeError):
                asked.close()
            answers.close()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def planner() -> Iterator[Planner]:
    """A ``Planner`` that is closed at the end."""
    made = Planner()
    try:
        yield made
    finally:
        made.close()
