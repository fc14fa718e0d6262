"""A model of ``examples/models`` on its whole way, with small sizes, by its own scripts.

    chain = ModelChain("olmoe", sizes, folder)
    chain.logits("tp 2")         # what Megatron makes of the imported model
    chain.injected.frozen        # ten steps by inject.sh, two processes
    chain.exported               # a folder again

A script's commands are those that a user's would be, but for small sizes behind the model's flags;
they run in processes that are forked instead of started (``lane.run``). Each step is taken once,
when it is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_moe_inject.cli import main
from tests.harness import lane, tiny_models
from tests.harness.corpus import write_prepared
from tests.harness.model_scripts import Command, ModelScripts

LOGITS = (str(lane.HARNESS / "logits_gpt.py"),)
SEQUENCE = 32
STEPS = 10
SIZES = (
    *("--seq-length", str(SEQUENCE), "--global-batch-size", "8", "--num-workers", "0"),
    *("--train-iters", str(STEPS), "--save-interval", str(STEPS), "--eval-interval", str(STEPS)),
    *("--eval-iters", "2", "--log-interval", "1", "--use-cpu-initialization"),
)
"""What the sizes of a run are set to, behind a script's own."""
INJECTION = (
    *("--lr", "5e-3", "--min-lr", "5e-3"),
    *("--inject-set", "domains[0].experts.n=2", "domains[0].experts.ep=2"),
)
"""A learning rate at which ten steps are seen, and two experts of each layer."""
LAYOUTS = {
    "one process": (1, "--expert-model-parallel-size 1"),
    "tp 2": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
        "--expert-model-parallel-size 2",
    ),
    "pp 2": (2, "--pipeline-model-parallel-size 2"),
    "ep 2": (2, "--expert-model-parallel-size 2"),
}
"""Processes and flags by name; tensor parallelism shares the experts out as well."""
_FROZEN = re.compile(r"frozen check: (\d+) frozen tensors on 2 ranks bitwise unchanged")
_TAKEN = re.compile(r"(\d+) tensors of the folder as (\d+) slices")
_ENCODED = re.compile(r" (fp8|mxfp4) +\d+ +\d+ +([-.\de]+) +([-.\de]+)")
_CHANGED = re.compile(r"(\d+) of (\d+) tensors changed")


@dataclass(frozen=True)
class Injected:
    """Ten steps of ``inject.sh`` at EP 2, which is stopped after five and called again.

    Attributes:
        kd_losses: on held-out text of the domain, before the first step and after the last.
        frozen: tensors that were proven to be bitwise as before, over both ranks.
        before, after: logits of the model that was loaded, and of the one that was trained.
    """

    kd_losses: list[float]
    frozen: int
    before: torch.Tensor
    after: torch.Tensor


class ModelChain:
    """A model on its way.

    Args:
        name: of a folder of ``examples/models``.
        sizes: keys of the published configuration that are made small.
        folder: for everything that is written.
    """

    def __init__(self, name: str, sizes: dict, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.hf, self.teacher, data = folder / "published", folder / "teacher", folder / "text"
        tiny_models.make_student(name, self.hf, sizes)
        data.mkdir()
        write_prepared(data)
        tiny_models.make_teacher(self.teacher, data / "domain")
        self.tokens = torch.randint(
            tiny_models.VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1)
        )
        torch.save(self.tokens, folder / "tokens.pt")
        variables = {"HF": self.hf, "TEACHER": self.teacher, "TEXT": data, "CPU": "1"}
        self.scripts = ModelScripts(name, folder, **{k: str(v) for k, v in variables.items()})

    @functools.cached_property
    def imported(self) -> tuple[int, int]:
        """Tensors that ``convert.sh`` took, and slices that it wrote."""
        tensors, slices = _TAKEN.search(self._command("convert.sh")).groups()
        return int(tensors), int(slices)

    def logits(self, layout: str) -> torch.Tensor:
        """What Megatron makes of the imported model at a layout, by ``inject.sh``'s flags."""
        self._profile  # noqa: B018  which the flags name
        self._run("inject.sh", layout, LOGITS_THEN="end")
        return self._written("megatron_logits")

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """Logits of the published model."""
        return tiny_models.logits_of(self.hf, self.tokens)

    @functools.cached_property
    def _profile(self) -> Path:
        self.imported  # noqa: B018
        path = self.folder / self.name / "profile.json"
        path.unlink(missing_ok=True)
        self._run("profile.sh", "ep 2")
        assert path.exists()
        return path

    @functools.cached_property
    def injected(self) -> Injected:
        """What ``inject.sh`` did."""
        self._profile  # noqa: B018
        first = self._run("inject.sh", "ep 2", "--exit-interval", str(STEPS // 2))
        before = self._written("megatron_logits")
        run = self._run("inject.sh", "ep 2", LOGITS_THEN="again")
        steps = [step["iteration"] for step in first.iterations + run.iterations]
        assert steps == list(range(1, STEPS + 1))
        proven = _FROZEN.search(run.output)
        assert proven, run.tail()
        after = self._written("megatron_logits_after")
        ends = first.evaluations[0], run.evaluations[-1]
        losses = [evaluation["kd loss/domain"] for evaluation in ends]
        return Injected(losses, int(proven[1]), before, after)

    @functools.cached_property
    def exported(self) -> Path:
        """The folder that ``export.sh`` wrote."""
        self.injected  # noqa: B018
        self._export_report = self._command("export.sh")
        return self.folder / self.name / "hf"

    @property
    def told_changes(self) -> tuple[int, int]:
        """Tensors that the export says have changed, and all."""
        assert self.exported
        changed, tensors = _CHANGED.search(self._export_report).groups()
        return int(changed), int(tensors)

    @property
    def encoded(self) -> dict[str, dict[str, float]]:
        """By storage (``fp8``, ``mxfp4``) the largest and mean rounding that the export tells."""
        assert self.exported
        worst: dict[str, dict[str, float]] = {}
        for storage, largest, mean in _ENCODED.findall(self._export_report):
            told = worst.setdefault(storage, {"largest": 0.0, "mean": 0.0})
            told["largest"] = max(told["largest"], float(largest))
            told["mean"] = max(told["mean"], float(mean))
        return worst

    @functools.cached_property
    def logits_again(self) -> torch.Tensor:
        """What Megatron makes of the exported folder, imported again."""
        again = self.folder / "again"
        again.mkdir()
        self._command("convert.sh", HF=str(self.exported), WORK=str(again))
        student = str(again / self.name / "student")
        unsaved = str(again / "injected")
        words = ("--pretrained-checkpoint", student, "--load", unsaved, "--save", unsaved)
        self._run("inject.sh", "one process", *words, LOGITS_THEN="end")
        return self._written("megatron_logits")

    @functools.cached_property
    def exported_delta(self) -> Path:
        """The same by way of a delta."""
        own, delta, output = (
            self.folder / self.name,
            self.folder / "delta",
            self.folder / "hf-delta",
        )
        assert self.exported
        base = ["--base", str(own / "student"), "--trained", str(own / "injected")]
        _moe_inject("export-delta", *base, "--output", str(delta))
        words = ["--delta", str(delta), "--hf", str(self.hf), "--output", str(output)]
        _moe_inject("export-hf", *words)
        return output

    def _command(self, script: str, **environment: str) -> str:
        """Run a script of one command here; what it prints."""
        (command,) = self.scripts.commands(script, **environment)
        assert command.module == "megatron_moe_inject.cli"
        return _moe_inject(*command.words)

    def _run(self, script: str, layout: str, *words: str, **env: str) -> lane.Run:
        processes, flags = LAYOUTS[layout]
        words = (*SIZES, *(INJECTION if script == "inject.sh" else ()), *words)
        (command,) = self.scripts.commands(script, *words, GPUS=str(processes), LAYOUT_FLAGS=flags)
        return self._start(command, processes, {"LOGITS": str(self.folder), **env})

    def _start(self, command: Command, processes: int, env: dict[str, str]) -> lane.Run:
        assert command.processes == processes
        if command.module == "megatron_moe_inject.pretrain":
            assert command.words[0] == "--cpu"
            return lane.run(command.words[1:], nproc=processes, script=LOGITS, env=env)
        return lane.run(command.words, nproc=processes, script=("-m", command.module))

    def _written(self, name: str) -> torch.Tensor:
        path = self.folder / f"{name}.pt"
        tensor = torch.load(path)[..., : tiny_models.VOCABULARY]
        path.unlink()
        return tensor


def _moe_inject(*words: str) -> str:
    """A command in this process; what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(list(words)) == 0
    return printed.getvalue()
