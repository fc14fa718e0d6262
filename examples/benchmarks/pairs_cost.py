"""What packed pairs of answers save in training, and what held-out pairs cost in an evaluation.

    python examples/benchmarks/pairs_cost.py [--steps 6] [--answer 24] [--layers 4]

Two runs of real Megatron on the CPU lane with the same pairs, much shorter than a sample: one
answer to a sample, and whole pairs packed (``--dataloader-inter-document-masking``). Half of each
batch is text. Compared are medians of the process's CPU seconds of a training step for each pair in
it, and of an evaluation of all held-out pairs against one of text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from step_overhead import model_flags, train
from term_cost import DOCUMENT, SEQUENCE, write_corpora, write_pairs

BATCH, WARM_UP, HELD_OUT = 8, 1, 40
RECIPE = """
domains: [{{name: domain, data: [1], experts: {{layers: {{0: [0, 1]}}}}}}]
objective: {{alpha: 0, beta: 1, preference: {{data: [2]}}}}
mixing: {{general: 0.25, preference: 0.5}}
"""


def parent(options: argparse.Namespace) -> None:
    """Make data, run both, print the table."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    steps, found = options.steps + WARM_UP, {}
    with tempfile.TemporaryDirectory() as folder:
        documents = BATCH * (steps + 2) * SEQUENCE // DOCUMENT + 4
        general, domain = write_corpora(Path(folder), options.vocab, documents)
        pairs = write_pairs(f"{folder}/pairs", options.vocab, 400, options.answer)
        held_out = write_pairs(f"{folder}/held_out", options.vocab, HELD_OUT, options.answer)
        recipe, times = Path(folder, "recipe.yaml"), Path(folder, "times.json")
        recipe.write_text(RECIPE.format())
        for name, packed in (("one by one", []), ("packed", [_FLAG])):
            flags = [f for f in model_flags(options, options.hidden) if f != "--mock-data"]
            flags += (
                "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
                f"--moe-ffn-hidden-size {options.hidden} --moe-router-load-balancing-type none "
                f"--train-data-path {general} {domain} {pairs} "
                f"--valid-data-path {general} {domain} {held_out} --inject-recipe {recipe} "
                f"--train-iters {steps} --eval-iters 2 --eval-interval {steps} "
                f"--inject-from-scratch --micro-batch-size 1 --global-batch-size {BATCH}"
            ).split() + packed
            environment |= {"PAIRS_COST_TIMES": str(times)}
            train(1, *flags, module=str(Path(__file__).resolve()), environment=environment)
            found[name] = json.loads(times.read_text())
    print_table(found, options)


_FLAG = "--dataloader-inter-document-masking"


def print_table(found: dict, options: argparse.Namespace) -> None:
    """Medians in milliseconds of CPU time."""
    print(
        f"{options.layers} layers of 8 experts, hidden {options.hidden}, vocabulary "
        f"{options.vocab}, samples of {SEQUENCE} tokens, {BATCH} a step, half of them pairs with "
        f"{options.answer} tokens in the prompt and in each answer, {options.steps} steps, "
        f"{HELD_OUT} held-out pairs, medians of CPU time"
    )
    for name, times in found.items():
        step, text = (1e3 * statistics.median(times[kind]) for kind in ("step", "text"))
        pairs, measured = statistics.median(times["pairs"]), times["measured"]
        print(
            f"{name:>10}: step {step:.0f} ms with {pairs:.0f} pairs, {step / pairs:.1f} ms a pair; "
            f"evaluation of {BATCH} samples of text {text:.0f} ms, of all pairs "
            f"{1e3 * sum(measured) / times['evaluations']:.0f} ms in "
            f"{len(measured) / times['evaluations']:.0f} batches"
        )


def child() -> None:
    """One run, timed."""
    from megatron_moe_inject import launch

    launch.prepare()
    import runpy

    from megatron_moe_inject.host import compat
    from megatron_moe_inject.preference import step as preference
    from megatron_moe_inject.step import StepHook

    times: dict = {"step": [], "text": [], "measured": [], "pairs": [], "evaluations": 0}
    wrap, find, evaluate = StepHook.wrap, preference.pairing, compat.evaluate_all
    of_pairs = [False]

    def timed(self, forward_backward):
        injected = wrap(self, forward_backward)

        def step(**arguments):
            started = time.process_time()
            result = injected(**arguments)
            kind = "measured" if of_pairs[0] else "text"
            kind = kind if arguments.get("forward_only") else "step"
            times[kind].append(time.process_time() - started)
            return result

        return step

    def pairing(*arguments):
        found = find(*arguments)
        times["pairs"].append(found.pairs)
        return found

    def evaluation(*arguments):
        of_pairs[0] = True
        times["evaluations"] += 1
        whole = evaluate(*arguments)
        of_pairs[0] = False
        return whole

    StepHook.wrap, preference.pairing, compat.evaluate_all = timed, pairing, evaluation
    runpy.run_module("megatron_moe_inject.pretrain", run_name="__main__", alter_sys=True)
    for kind in ("step", "pairs"):
        times[kind] = times[kind][WARM_UP:]
    Path(os.environ["PAIRS_COST_TIMES"]).write_text(json.dumps(times))


def main() -> None:
    """Parent, or the timed process."""
    if "PAIRS_COST_TIMES" in os.environ:
        child()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--answer", type=int, default=24)
    parent(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
