"""What one feature adds to a step: retentions, imitation, steering, the profile, the evaluation.

    python examples/benchmarks/term_cost.py gamma [--steps 20] [--general 0.1] [--layers 4]

One run of real Megatron on the CPU lane, two of eight experts per layer trained, distilled from a
small teacher. Steps alternate between with and without the feature, so that noise of the machine
hits both alike; compared are medians of the CPU seconds of the process. ``profile`` and
``evaluation`` compare evaluation steps, the others steps that train; ``evaluation`` with steps that
are stock Megatron's, and the teachers' forward, logits included, is told apart. Prints one table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from step_overhead import WARM_UP, model_flags, train

BATCH, SEQUENCE, DOCUMENT = 20, 256, 4096
FEATURES = {
    "gamma": "gamma: 10.0",
    "expert-retention": "beta: 0.0",
    "l2": "beta: 0.0",
    "hidden": "beta: 0.0",
    "experts": "beta: 0.0",
    "profile": "beta: 0.0",
    "evaluation": "beta: 0.0",
    "steering": "beta: 0.0",
    "report": "beta: 0.0",
    "preference": "preference: {data: [2], beta: 0.1}",
    "preference-teacher": "preference: {data: [2], beta: 0.1, reference: teacher}",
}
MORE = {
    "expert-retention": "retention: {experts: 1.0}",
    "l2": "retention: {l2: 0.01}",
    "hidden": "imitation: {hidden: 0.1}",
    "experts": "imitation: {experts: 0.1}",
    "steering": "train: {router: true}\nsteering: {coeff: 0.01, retention: 1.0, detail_every: 0}",
    "report": "train: {router: true}\nsteering: {report: true, detail_every: 0}",
    "preference": "mixing: {general: 0.1, preference: SHARE}",
    "preference-teacher": "mixing: {general: 0.1, preference: SHARE}",
}
"""Beside the objective; ``report`` is steering's part of the log alone."""
INSIDE = {
    "expert-retention": ("experts", "ExpertRetention", ("begin", "_mark", "_hold", "end")),
    "l2": ("start", "PullToStart", ("end",)),
}
"""Methods of ``retention`` whose own time is told too, since it is small beside a step's noise; of
experts' outputs that is all but the backward pass."""
READS_ONLY = {"profile": "--inject-profile", "evaluation": "--inject-evaluate"}
RECIPE = """
domains:
  - name: domain
    data: [1]
    teacher: small
    experts: {{layers: {{{layers}}}}}
teachers:
  small: {{source: "megatron:{teacher}"}}
objective:
  alpha: 1.0
  {feature}
{more}
"""


def write_corpora(folder: Path, vocabulary: int, documents: int) -> list[str]:
    """Two datasets of random tokens; their prefixes."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator, prefixes = np.random.default_rng(0), []
    for name in ("general", "domain"):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=np.uint16)
        for _ in range(documents):
            tokens = generator.integers(vocabulary - 1, size=DOCUMENT)
            builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        builder.finalize(f"{folder}/{name}.idx")
        prefixes.append(f"{folder}/{name}")
    return prefixes


def write_pairs(prefix: str, vocabulary: int, pairs: int, size: int = SEQUENCE // 2) -> str:
    """A data set of pairs of random tokens, ``size`` in the prompt and in each answer; its
    prefix."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(pairs):
        builder.add_document(generator.integers(vocabulary - 1, size=3 * size), [size] * 3)
    builder.finalize(f"{prefix}.idx")
    return prefix


def parent(options: argparse.Namespace) -> None:
    """Make a teacher and data, run the timed steps, print the table."""
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        teacher = f"{folder}/teacher"
        train(
            1,
            *model_flags(options, options.teacher_hidden),
            *("--train-iters", "1", "--save", teacher, "--save-interval", "1"),
            module="-m megatron_moe_inject.pretrain",
            environment=environment,
        )
        steps = 2 * options.steps + WARM_UP
        held_out = BATCH * (steps + 1) * SEQUENCE // DOCUMENT + 1  # each sample is read once
        general, domain = write_corpora(Path(folder), options.vocab, 5 * held_out)
        recipe, times = Path(folder, "recipe.yaml"), Path(folder, "times.json")
        layers = ", ".join(f"{layer}: [0, 1]" for layer in range(options.layers))
        recipe.write_text(
            RECIPE.format(
                teacher=teacher,
                layers=layers,
                feature=FEATURES[options.feature],
                more=MORE.get(options.feature, "").replace("SHARE", str(options.pairs)),
            )
        )
        flags = [f for f in model_flags(options, options.hidden) if f != "--mock-data"]
        share = options.general
        data = f"--data-path {share} {general} {1 - share} {domain} --split 80,20,0 "
        if options.feature.startswith("preference"):
            pairs = write_pairs(f"{folder}/pairs", options.vocab, 200)
            data = f"--train-data-path {general} {domain} {pairs} --valid-data-path {general} "
        flags += (
            "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
            f"--moe-ffn-hidden-size {options.hidden} --moe-router-load-balancing-type none "
            f"{data}--inject-recipe {recipe} --train-iters {steps} --eval-iters {steps} "
            f"--inject-from-scratch --micro-batch-size 1 --global-batch-size {BATCH}"
        ).split()
        if options.feature in READS_ONLY:
            flags += ["--skip-train", READS_ONLY[options.feature], f"{folder}/found.json"]
        environment |= {"TERM_COST_TIMES": str(times), "TERM_COST_FEATURE": options.feature}
        train(1, *flags, module=str(Path(__file__).resolve()), environment=environment)
        print_table(json.loads(times.read_text()), options)


def print_table(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Medians in milliseconds of CPU time, and their ratio."""
    without, with_it = (1e3 * statistics.median(times[name]) for name in ("without", "with"))
    kind = "evaluation" if options.feature in READS_ONLY else "training"
    print(
        f"{options.feature}: {options.layers} layers, hidden {options.hidden}, teacher "
        f"{options.teacher_hidden}, vocabulary {options.vocab}, 20 micro-batches of 256 tokens, "
        f"{options.general:.0%} general, {options.threads} thread(s), {options.steps} {kind} steps "
        "each, medians of CPU time"
    )
    print(f"without{without:>14.1f} ms\nwith{with_it:>17.1f} ms")
    print(f"added{100 * (with_it / without - 1):>+15.1f} %")
    if times.get("inside"):
        inside = 1e3 * statistics.median(times["inside"])
        print(f"inside{inside:>15.1f} ms, {100 * inside / without:.1f} % of a step")
    if options.feature.startswith("preference"):
        forward = 1e3 * statistics.median(times["forward"])
        added = (with_it - without) / (options.pairs * forward)
        print(f"forward{forward:>14.1f} ms (evaluation)")
        print(f"added is{added:>12.2f} x the pairs' share of a forward")
    if options.feature == "gamma":
        forward = 1e3 * statistics.median(times["forward"])
        added = (with_it - without) / (options.general * forward)
        print(f"forward{forward:>14.1f} ms (evaluation)")
        print(f"added is{added:>12.2f} x the general share of a forward")
    if options.feature == "evaluation":
        teacher = 1e3 * statistics.median(times["teacher"])
        beyond = 100 * (with_it / (without + teacher) - 1)
        print(f"teacher{teacher:>14.1f} ms\nbeyond it{beyond:>+11.1f} %")
        print(f"throughput{100 * (without + teacher) / with_it:>10.1f} % of both forwards")


def child() -> None:
    """The run, with the feature on in every other step."""
    from megatron_moe_inject import launch

    launch.prepare()
    import runpy

    from megatron_moe_inject.experts.choose.recorder import RoutingRecorder
    from megatron_moe_inject.host.labels import (
        GENERAL,
    )
    from megatron_moe_inject.host.step import Step
    from megatron_moe_inject.loss_hook import LossHook
    from megatron_moe_inject.losses.objective import TermWeights
    from megatron_moe_inject.preference.step import PreferenceStep
    from megatron_moe_inject.retention.part import RetentionStep
    from megatron_moe_inject.routing.part import RoutingStep
    from megatron_moe_inject.run import Run
    from megatron_moe_inject.step import StepHook
    from megatron_moe_inject.teachers.imitation.hook import ImitationHook
    from megatron_moe_inject.teachers.step_teachers import StepTeachers

    feature_parts = (ImitationHook, RoutingRecorder, RoutingStep, RetentionStep, PreferenceStep)

    times: dict[str, list[float]] = {"without": [], "with": []}
    feature, number = os.environ["TERM_COST_FEATURE"], itertools.count()
    hook = StepHook.wrap
    spent: list[float] = []
    if feature in INSIDE:
        time_methods(*INSIDE[feature], spent)

    @contextlib.contextmanager
    def switched_off(self: StepHook):
        """The same step hook without the feature."""
        parts, teachers, loss = self.parts, part_of(self, StepTeachers), part_of(self, LossHook)
        self.parts = tuple(part for part in parts if not isinstance(part, feature_parts))
        if teachers is not None:
            original, teachers.original = teachers.original, None
        if loss is not None:
            weights_at, preference = loss.weights_at, loss._preference
            loss._preference = None
            without = {GENERAL: TermWeights(0.0, 0.0)}
            loss.weights_at = lambda iteration: weights_at(iteration) | without
        try:
            yield
        finally:
            self.parts = parts
            if teachers is not None:
                teachers.original = original
            if loss is not None:
                loss.weights_at, loss._preference = weights_at, preference

    def wrap(self, forward_backward):
        injected = hook(self, forward_backward)

        def step(**kwargs):
            evaluation = bool(kwargs.get("forward_only"))
            if feature == "evaluation":
                return evaluation_step(self, kwargs)
            if evaluation != (feature == "profile"):
                with switched_off(self):
                    started = time.process_time()
                    result = forward_alone(forward_backward, kwargs)
                    times.setdefault("forward", []).append(time.process_time() - started)
                return result
            on = next(number) % 2
            with contextlib.nullcontext() if on else switched_off(self):
                started = time.process_time()
                result = injected(**kwargs)
                times["with" if on else "without"].append(time.process_time() - started)
            if on and feature in INSIDE:
                times.setdefault("inside", []).append(sum(spent))
            spent.clear()
            return result

        def evaluation_step(self: StepHook, kwargs):
            """In turn stock Megatron's and the measured; the log wants the same keys from both."""
            on = next(number) % 2
            started = time.process_time()
            result = injected(**kwargs) if on else forward_alone(forward_backward, kwargs)
            times["with" if on else "without"].append(time.process_time() - started)
            if on:
                started = time.process_time()
                for head, states in teachers:
                    for rows in states:
                        rows.flatten(0, 1) @ head.t()
                times["teacher"][-1] += time.process_time() - started
            kept.update(result[0] if on else {})
            return result if on else [dict(kept)] * len(result)

        def run_teachers(own: StepTeachers, step: Step):
            started = time.process_time()
            stock_teachers(own, step)
            times.setdefault("teacher", []).append(time.process_time() - started)
            teachers[:] = [(run.head, list(run._states.values())) for run in own.passes.values()]

        kept: dict = {}
        teachers: list = []
        stock_teachers = StepTeachers.begin
        if feature == "evaluation":
            StepTeachers.begin = run_teachers
        return step

    StepHook.wrap = wrap
    # Half of the text is measured, which is no evaluation to write.
    Run.finish = lambda self: iter(())
    runpy.run_module("megatron_moe_inject.pretrain", run_name="__main__", alter_sys=True)
    kept = {name: values[WARM_UP // 2 :] for name, values in times.items()}
    Path(os.environ["TERM_COST_TIMES"]).write_text(json.dumps(kept))


def part_of(hook, kind: type):
    """The hook's part of that kind, ``None`` without one."""
    return next((part for part in hook.parts if isinstance(part, kind)), None)


def time_methods(module: str, owner: str, names: Sequence[str], spent: list[float]) -> None:
    """Append the CPU seconds of each call of these methods to ``spent``."""
    kind = getattr(importlib.import_module(f"megatron_moe_inject.retention.{module}"), owner)

    def timed(method):
        def wrapper(*args, **kwargs):
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                spent.append(time.process_time() - started)

        return wrapper

    for name in names:
        setattr(kind, name, timed(getattr(kind, name)))


def forward_alone(forward_backward, arguments):
    """Megatron's step without the plugin, on data that it can read."""
    from megatron_moe_inject.data import labels

    iterator = arguments["data_iterator"]
    batches = labels.for_stock_code(labels.pull(iterator, arguments["num_microbatches"]))
    return forward_backward(**arguments | {"data_iterator": iter(batches)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("feature", choices=FEATURES)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--general", type=float, default=0.1, help="share of general data")
    parser.add_argument("--pairs", type=float, default=0.2, help="share of answers of pairs")
    parser.add_argument("--threads", type=int, default=1)
    parent(parser.parse_args())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if "TERM_COST_TIMES" in os.environ:
        child()
    else:
        main()
