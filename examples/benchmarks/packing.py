"""What packing short documents saves: tokens per second, packed and one to a padded sample.

    python examples/benchmarks/packing.py [--steps 10] [--share 8] [--layers 4] [--hidden 256]

Two runs of real Megatron on the CPU lane over the same documents, of about an eighth of a sample
(half to one and a half times that): packed (``--dataloader-inter-document-masking``), and each
filled up to a sample of its own. Every token is distilled from a small teacher, which reads
documents as rows of their own in the first run. Counted are tokens that have a loss and CPU seconds
of the process in forward and backward passes, the teacher's included; medians. Prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from step_overhead import WARM_UP, model_flags, train

SEQUENCE, DOCUMENTS = 256, 4096
MASKED = "--dataloader-inter-document-masking"
RECIPE = """
domains:
  - {{name: domain, data: [0], teacher: small}}
teachers:
  small: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3}}
train: {{experts: all, router: true, attention: true, norms: true}}
"""


def write_corpora(folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """The documents as they are, and filled up with ends of documents; prefixes by name."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    end, mean = options.vocab - 2, SEQUENCE // options.share
    prefixes = {name: str(folder / name) for name in ("packed", "padded")}
    builders = {n: IndexedDatasetBuilder(f"{p}.bin", np.uint16) for n, p in prefixes.items()}
    rng = np.random.default_rng(0)
    for _ in range(DOCUMENTS):
        tokens = np.full(SEQUENCE, end)
        length = int(rng.integers(mean // 2, mean + mean // 2 + 1))
        tokens[: length - 1] = rng.integers(end, size=length - 1)
        for name, own in (("packed", tokens[:length]), ("padded", tokens)):
            builders[name].add_document(torch.from_numpy(own), [len(own)])
    for name, builder in builders.items():
        builder.finalize(f"{prefixes[name]}.idx")
    return prefixes


def parent(options: argparse.Namespace) -> None:
    """Make a teacher and the corpora, run both trainings, print the table."""
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        teacher, recipe = f"{folder}/teacher", Path(folder, "recipe.yaml")
        flags = [*model_flags(options, options.teacher_hidden), "--train-iters", "1"]
        flags += ["--save", teacher, "--save-interval", "1"]
        module = "-m megatron_moe_inject.pretrain"
        train(1, *flags, module=module, environment=environment)
        recipe.write_text(RECIPE.format(teacher=teacher))
        moe = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        moe += f"--moe-ffn-hidden-size {options.hidden} --moe-router-load-balancing-type none "
        moe += f"--inject-recipe {recipe} --inject-from-scratch --split 100,0,0 --eod-mask-loss "
        moe += f"--train-iters {options.steps + WARM_UP} --micro-batch-size 1"
        flags = [f for f in model_flags(options, options.hidden) if f != "--mock-data"]
        measured = {}
        for name, prefix in write_corpora(Path(folder), options).items():
            times = Path(folder, f"{name}.json")
            own = [*flags, *moe.split(), "--data-path", prefix]
            own += [MASKED] if name == "packed" else []
            environment["PACKING_TIMES"] = str(times)
            train(1, *own, module=str(Path(__file__).resolve()), environment=environment)
            measured[name] = json.loads(times.read_text())
        print_table(measured, options)


def print_table(measured: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """Medians of CPU seconds, tokens with a loss, and the ratio that counts."""
    print(
        f"{options.layers} layers, hidden {options.hidden}, teacher {options.teacher_hidden}, "
        f"vocabulary {options.vocab}, 8 samples of {SEQUENCE} a step, documents of about "
        f"{SEQUENCE // options.share}, {options.threads} thread(s), {options.steps} steps, medians"
    )
    rates = {}
    for name, found in measured.items():
        seconds, teacher = (statistics.median(found[what]) for what in ("step", "teacher"))
        tokens = statistics.mean(found["tokens"])
        rates[name] = tokens / seconds
        print(
            f"{name:<8}{1e3 * seconds:>9.1f} ms a step, {1e3 * teacher:>7.1f} of them the teacher's"
            f"{tokens:>9.0f} tokens{rates[name]:>9.0f} tokens/s"
        )
    print(f"packed / padded{rates['packed'] / rates['padded']:>9.2f}")


def child() -> None:
    """One training run, its steps timed."""
    from megatron_moe_inject import launch

    launch.prepare()
    import runpy

    from megatron_moe_inject.step import StepHook
    from megatron_moe_inject.teachers.step_pass import TeacherPass

    found: dict[str, list[float]] = {"step": [], "teacher": [], "tokens": []}
    hook, begin = StepHook.wrap, TeacherPass.begin

    def wrap(self, forward_backward):
        injected = hook(self, forward_backward)

        def step(**kwargs):
            started = time.process_time()
            result = injected(**kwargs)
            found["step"].append(time.process_time() - started)
            return result

        return step

    def timed(self, batches, *args, **kwargs):
        found["tokens"].append(sum(float(batch["loss_mask"].sum()) for batch in batches))
        started = time.process_time()
        begin(self, batches, *args, **kwargs)
        found["teacher"].append(time.process_time() - started)

    StepHook.wrap, TeacherPass.begin = wrap, timed
    runpy.run_module("megatron_moe_inject.pretrain", run_name="__main__", alter_sys=True)
    kept = {name: values[WARM_UP:] for name, values in found.items()}
    Path(os.environ["PACKING_TIMES"]).write_text(json.dumps(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--share", type=int, default=8, help="samples are as long as so many")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parent(parser.parse_args())


if __name__ == "__main__":
    if "PACKING_TIMES" in os.environ:
        child()
    else:
        main()
