"""The study's domains, and what each needs before its first arm: text, student, teacher, profile.

Every part is made once and recognised by the file that is written last, so that a study which was
interrupted goes on. The student is the quickstart's for all domains. A teacher is shipped as
safetensors; ``--from-scratch`` pretrains it again.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import arms  # noqa: E402
import runner  # noqa: E402

LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: of its datasets and in recipes.
        title: in the table.
        text: the script that cuts it, and English, into a folder.
        models: folder of the shipped teacher.
        teacher: its name there.
        iterations: steps of 4,096 tokens that the teacher is pretrained for.
    """

    name: str
    title: str
    text: Path
    models: Path
    teacher: str
    iterations: int


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain(
            "code", "Python code", QUICKSTART / "corpora.py", QUICKSTART / "models", "teacher", 900
        ),
        Domain("html", "HTML", HERE / "pages.py", HERE / "models", "html_teacher", 600),
    )
}


def prepare(domain: Domain, folder: Path, *, from_scratch: bool = False) -> None:
    """Makes what is missing in ``folder``: data/, student/, teacher/, profile.json."""
    data = folder / "data"
    if not (data / "manifest.json").exists():
        print(f"{domain.name}: cutting the text", flush=True)
        runner.logged(folder / "text.log", str(domain.text), str(data))
    if from_scratch:
        pretrain(domain, folder)
    unpack("student", QUICKSTART / "models", folder / "student", "STUDENT")
    unpack(domain.teacher, domain.models, folder / "teacher", "TEACHER")
    if not (folder / "profile.json").exists():
        print(f"{domain.name}: profiling the student's routing", flush=True)
        profile(domain, folder)


def unpack(name: str, models: Path, folder: Path, architecture: str) -> None:
    """Writes a shipped model as a Megatron checkpoint, if there is none."""
    if not (folder / LATEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [str(QUICKSTART / "models.py"), "unpack", name, str(folder)]
        command += ["--models", str(models), "--", *runner.flags(architecture, "BOTH")]
        runner.logged(folder.parent / f"unpack-{folder.name}.log", *command)


def grown(domain: str, folder: Path, options: tuple[str, ...]) -> tuple[Path, int]:
    """The student that an arm trains, and how many experts its layers have.

    Args:
        domain: of ``DOMAINS``.
        folder: prepared.
        options: of ``moe-inject add-experts``; none = the student as it is.
    """
    student = folder / "student"
    if not options:
        return student, arms.EXPERTS
    output = folder / "-".join(["grown", *(option.strip("-") for option in options)])
    if not output.exists():
        of_domain = ("--domain", domain, "--profile", str(folder / "profile.json"), "--unmeasured")
        command = ("-m", "megatron_moe_inject.cli", "add-experts", str(student))
        log = output.with_name(f"{output.name}.log")
        runner.logged(log, *command, "--output", str(output), *of_domain, *options)
    return output, arms.EXPERTS + int(options[options.index("--per-layer") + 1])


def profile(domain: Domain, folder: Path) -> None:
    """Where the student sends the domain and English: 40 batches of training text, half of each."""
    slices = [str(folder / "data" / f"{name}_slice") for name in (domain.name, "english")]
    recipe = folder / "profile.yaml"
    recipe.write_text(
        f"domains: [{{name: {domain.name}, data: [0]}}]\n"
        "train: {experts: all}\nobjective: {alpha: 0.0, beta: 1.0}\n"
    )
    blend = ("0.5", slices[0], "0.5", slices[1])
    runner.logged(
        folder / "profile.log",
        *("-m", "megatron_moe_inject.cli", "profile", str(recipe), "--cpu"),
        *("--output", str(folder / "profile.json"), "--"),
        *runner.flags("STUDENT", "BOTH", "TRAINING"),
        *("--train-data-path", *blend, "--valid-data-path", *blend),
        *("--data-cache-path", str(folder / "cache-profile"), "--train-iters", "1"),
        *("--lr", "1e-3", "--eval-interval", "1", "--eval-iters", "40"),
        *("--load", str(folder / "student"), "--finetune", "--no-load-optim", "--no-load-rng"),
    )


def pretrain(domain: Domain, folder: Path) -> None:
    """Trains the domain's teacher on all its training text and ships it; once for a folder."""
    work = folder / "pretraining"
    saved, data, log = work / "teacher", work / "data", work / "teacher.log"
    if (saved / LATEST).exists():
        return
    print(f"{domain.name}: pretraining the teacher, {domain.iterations} steps; {log}", flush=True)
    runner.logged(work / "text.log", str(domain.text), str(data), "--pretraining")
    held_out = [str(data / f"{name}_held_out") for name in (domain.name, "english")]
    runner.megatron(
        log,
        *runner.flags("TEACHER", "BOTH", "TRAINING"),
        *("--full-validation", "--multiple-validation-sets"),
        *("--validation-set-names", domain.name, "english"),
        *("--train-data-path", str(data / f"{domain.name}_train"), "--valid-data-path", *held_out),
        *("--data-cache-path", str(work / "cache"), "--train-iters", str(domain.iterations)),
        *("--lr", "3e-3", "--min-lr", "1e-4", "--eval-interval", str(domain.iterations // 2)),
        *("--save", str(saved), "--save-interval", str(domain.iterations), "--no-save-optim"),
    )
    command = [str(QUICKSTART / "models.py"), "pack", domain.teacher, str(saved), str(log)]
    command += ["--models", str(domain.models)]
    command += ["--made-by", f"examples/study.sh --from-scratch --domains {domain.name}"]
    runner.logged(work / "pack.log", *command, "--", *runner.flags("TEACHER", "BOTH"))
