"""What a student gains from a store of its teacher, by how much of each token is kept.

    nice python examples/benchmarks/store_gain.py [--steps 200] [--arms live 16 64 256 all draw64]

The quickstart's models, text and recipe with the chosen experts trained whole, on one process. Of
each arm: bytes a token, seconds a step, and the losses per token on held-out text before and after.
``live`` runs the teacher beside the student; a number is that many ids of each token, packed;
``all`` the whole vocabulary in fp32; ``drawN`` N drawn ids; ``states`` and ``fp8`` hidden states.
Arms that are done are kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import figures  # noqa: E402
from runner import QUICKSTART, WHOLE_EXPERTS, flags, logged, megatron  # noqa: E402

CLI = ("-m", "megatron_moe_inject.cli")
KEPT = {
    "all": ("--top", "1000000", "--log-probs", "fp32"),
    "states": ("--states", "native"),
    "fp8": ("--states", "fp8"),
}
FRESH = ("--finetune", "--no-load-optim", "--no-load-rng")
_STEP = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def prepare(folder: Path) -> None:
    """Text, student, teacher and routing profile of the quickstart."""
    data = folder / "data"
    if not (data / "manifest.json").is_file():
        logged(folder / "corpora.log", str(QUICKSTART / "corpora.py"), str(data))
    for name in ("student", "teacher"):
        if not (folder / name).is_dir():
            unpack = (str(QUICKSTART / "models.py"), "unpack", name, str(folder / name), "--")
            logged(folder / f"unpack-{name}.log", *unpack, *flags(name.upper(), "BOTH"))
    profile = folder / "profile.json"
    if not profile.is_file():
        slices = ["0.5", str(data / "code_slice"), "0.5", str(data / "english_slice")]
        logged(
            folder / "profile.log", *CLI, "profile", str(QUICKSTART / "recipe.yaml"), "--cpu",
            "--output", str(profile), "--", *flags("STUDENT", "BOTH", "TRAINING"),
            "--train-data-path", *slices, "--valid-data-path", *slices,
            "--data-cache-path", str(data / "cache-profile"), "--train-iters", "1", "--lr", "1e-3",
            "--eval-interval", "1", "--eval-iters", "40", "--load", str(folder / "student"), *FRESH,
        )  # fmt: skip


def overrides(folder: Path, source: str) -> list[str]:
    """The recipe's fields that name files, and what trains."""
    profile = f"domains[0].experts.profile={folder / 'profile.json'}"
    return ["--inject-set", f"teachers.coder.source={source}", profile, *WHOLE_EXPERTS]


def blend(folder: Path) -> list[str]:
    """Training text, as in the quickstart."""
    data = folder / "data"
    return ["0.9", str(data / "code_slice"), "0.1", str(data / "english_slice")]


def store(folder: Path, arm: str) -> Path:
    """The arm's store, written unless it is there."""
    output = folder / f"store-{arm}"
    kept = KEPT.get(arm, ("--top", arm))
    if arm.startswith("draw"):
        kept = ("--draw", arm.removeprefix("draw"))
    if not (output / "manifest.json").is_file():
        logged(
            folder / f"store-{arm}.log", *CLI, "store-teacher", str(QUICKSTART / "recipe.yaml"),
            "--output", str(output), "--cpu", *kept,
            *overrides(folder, f"megatron:{folder / 'teacher'}"),
            "--", *flags("BOTH"), "--train-data-path", *blend(folder),
        )  # fmt: skip
    return output


def run(folder: Path, arm: str, steps: int) -> dict:
    """Train one arm, unless that was done; its numbers."""
    result = folder / f"{arm}-{steps}.json"
    if result.is_file():
        return json.loads(result.read_text())
    size, source, more = 0.0, f"megatron:{folder / 'teacher'}", []
    if arm != "live":
        output = store(folder, arm)
        manifest = json.loads((output / "manifest.json").read_text())
        shards = manifest["shards"]
        size = sum(s["bytes"] for s in shards) / sum(s["rows"] for s in shards)
        source = f"store:{output}"
        more = ["teachers.coder.tail=sample"] if arm.startswith("draw") else []
    data, log, saved = folder / "data", folder / f"{arm}-{steps}.log", folder / f"{arm}-{steps}"
    megatron(
        log, *flags("STUDENT", "BOTH", "TRAINING"),
        "--inject-recipe", str(QUICKSTART / "recipe.yaml"), *overrides(folder, source), *more,
        "--train-data-path", *blend(folder), "--data-cache-path", str(data / f"cache-{arm}"),
        "--train-iters", str(steps), "--lr", "1e-3", "--min-lr", "1e-4",
        "--eval-iters", "0", "--eval-interval", str(steps),
        "--load", str(folder / "student"), *FRESH,
        "--save", str(saved), "--save-interval", str(steps), "--no-save-optim",
    )  # fmt: skip
    times = [float(x) for x in _STEP.findall(log.read_text(errors="replace"))][1:]
    found = {
        "bytes a token": size,
        **held_out(folder, f"{arm}-{steps}", saved, "STUDENT"),
        "ms a step": sorted(times)[len(times) // 2] if times else None,
    }
    result.write_text(json.dumps(found))
    return found


def held_out(folder: Path, name: str, checkpoint: Path, model: str) -> dict[str, float]:
    """Losses per token on held-out text, by stock Megatron."""
    data, log = folder / "data", folder / f"evaluation-{name}.log"
    megatron(
        log, *flags(model, "BOTH", "TRAINING", "HELD_OUT"),
        "--train-data-path", str(data / "code_slice"),
        "--valid-data-path", str(data / "code_held_out"), str(data / "english_held_out"),
        "--data-cache-path", str(data / "cache-evaluation"), "--train-iters", "1", "--lr", "1e-3",
        "--eval-interval", "1", "--load", str(checkpoint), *FRESH, "--skip-train",
    )  # fmt: skip
    losses = figures.read_log(log).validation
    return {kind: losses[f"lm loss/{kind}"][-1][1] for kind in ("code", "english")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="+", default=["live", "16", "64", "256", "all"])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "store_gain")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folder = options.output.resolve()
    prepare(folder)
    before = held_out(folder, "before", folder / "student", "STUDENT")
    teacher = held_out(folder, "teacher", folder / "teacher", "TEACHER")
    print(f"student before: {before}\nteacher: {teacher}", flush=True)
    for arm in options.arms:
        found = run(folder, arm, options.steps)
        lead = before["code"] - teacher["code"]
        share = 100 * (before["code"] - found["code"]) / lead
        print(f"{arm}: {found}, {share:.1f} % of the teacher's lead on code", flush=True)


if __name__ == "__main__":
    main()
