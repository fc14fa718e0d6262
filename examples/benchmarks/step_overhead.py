"""What the plugin adds to a training step beyond the teacher's forward pass.

    python examples/benchmarks/step_overhead.py [--steps 40] [--hidden 256] [--hybrid]

One run of real Megatron on the CPU lane. Steps alternate between stock (cross-entropy) and injected
(the same model and trained parameters, distillation and cross-entropy on every token), so that
noise of the machine hits both alike. The whole body trains, and with --train-head head and
embedding too. Compared are the medians of

    injected step    against    stock step + teacher forward,

where the teacher's forward is its body and its logits, timed in the same run. Prints one table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
domains:
  - {{name: domain, data: [0], teacher: small}}
teachers:
  small: {{source: "megatron:{teacher}"}}
objective: {{alpha: 0.7, beta: 0.3}}
train:
  experts: all
  router: true
  attention: true
  norms: true
  embedding: {head}
  output_layer: {head}
"""
WARM_UP = 4


def model_flags(options: argparse.Namespace, hidden: int) -> list[str]:
    """Flags that student and teacher share."""
    text = (
        f"--num-layers {options.layers} --hidden-size {hidden} --num-attention-heads 8 "
        "--seq-length 256 "
        "--max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm "
        "--swiglu --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data "
        f"--tokenizer-type NullTokenizer --vocab-size {options.vocab - 1} --num-workers 0 "
        "--untie-embeddings-and-output-weights --micro-batch-size 4 --global-batch-size 8 "
        "--lr 1e-4 --eval-interval 100000 --eval-iters 0 --log-interval 1000 "
    )
    return text.split()


def train(nproc: int, *flags: str, module: str, environment: dict[str, str]) -> None:
    """Run ``module`` on ``nproc`` processes; its output is shown only if it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), *module.split(), "--cpu", *flags]
    done = subprocess.run(
        command, env=os.environ | environment, text=True, stdout=-1, stderr=-2, check=False
    )
    if done.returncode:
        sys.exit(done.stdout)


def parent(options: argparse.Namespace) -> None:
    """Make a teacher, run the timed training, print the table."""
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        teacher = f"{folder}/teacher"
        flags = [*model_flags(options, options.teacher_hidden), "--train-iters", "1"]
        module = "-m megatron_moe_inject.pretrain"
        train(
            1,
            *flags,
            "--save",
            teacher,
            "--save-interval",
            "1",
            module=module,
            environment=environment,
        )

        recipe, times = Path(folder, "recipe.yaml"), Path(folder, "times.json")
        recipe.write_text(RECIPE.format(teacher=teacher, head=str(options.train_head).lower()))
        moe = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
        moe += f"--moe-ffn-hidden-size {options.hidden} --moe-router-load-balancing-type none "
        moe += f"--expert-model-parallel-size {options.nproc} --inject-recipe {recipe} "
        moe += "--inject-from-scratch "
        moe += f"--train-iters {2 * options.steps + WARM_UP}"
        if options.hybrid:
            moe += f" --hybrid-layer-pattern {'*E' * options.layers}"
        environment["STEP_OVERHEAD_TIMES"] = str(times)
        flags = [*model_flags(options, options.hidden), *moe.split()]
        train(options.nproc, *flags, module=str(Path(__file__).resolve()), environment=environment)
        print_table(json.loads(times.read_text()), options)


def print_table(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Medians in milliseconds, and the ratio that counts."""
    timed = {name: values for name, values in times.items() if name != "resident"}
    median = {name: 1e3 * statistics.median(values) for name, values in timed.items()}
    expected = median["stock"] + median["teacher"]
    print(
        f"{options.layers} layers, hidden {options.hidden}, teacher {options.teacher_hidden}, "
        f"vocabulary {options.vocab}, "
        f"2,048 tokens a step, {options.nproc} process(es) of {options.threads} thread(s), "
        f"{options.steps} steps each, medians, {'HybridModel' if options.hybrid else 'GPTModel'}, "
        f"head {'trained' if options.train_head else 'frozen'}"
    )
    for name, value in (
        ("stock step", median["stock"]),
        ("teacher forward", median["teacher"]),
        ("stock + teacher", expected),
        ("injected step", median["injected"]),
    ):
        print(f"{name:<18}{value:>9.1f} ms")
    print(f"{'beyond teacher':<18}{100 * (median['injected'] / expected - 1):>+9.1f} %")
    print(f"{'start-up added':<18}{median['start-up'] / 1e3:>9.1f} s (checks, teacher, hooks)")
    print(f"{'resident at most':<18}{times['resident'][0]:>9.0f} MiB (one process, all of it)")


def child() -> None:
    """The training run, with its steps alternating and timed."""
    from megatron_moe_inject import launch

    launch.prepare()
    import runpy

    import torch.distributed as dist

    from megatron_moe_inject.run import Run
    from megatron_moe_inject.step import StepHook
    from megatron_moe_inject.teachers.step_pass import TeacherPass

    times: dict[str, list[float]] = {"stock": [], "injected": [], "teacher": [], "start-up": []}
    number = itertools.count()

    def timed(name: str, function, *args, **kwargs):
        started = time.perf_counter()
        result = function(*args, **kwargs)
        times[name].append(time.perf_counter() - started)
        return result

    check, attach = Run.__init__, Run.attach
    Run.__init__ = lambda *args: timed("start-up", check, *args)
    Run.attach = lambda *args: timed("start-up", attach, *args)
    hook = StepHook.wrap

    def wrap(self, forward_backward):
        injected = hook(self, forward_backward)

        def step(**kwargs):
            if next(number) % 2:
                return timed("injected", injected, **kwargs)
            return timed("stock", forward_backward, **kwargs)

        return step

    begin = TeacherPass.begin

    def begin_with_logits(self, *args, **kwargs):
        started = time.perf_counter()
        begin(self, *args, **kwargs)
        body = time.perf_counter() - started
        sample = next(iter(self._states.values()))[0]
        started = time.perf_counter()
        sample @ self.head.t()
        logits = time.perf_counter() - started
        sequences = sum(len(states) for states in self._states.values())
        times["teacher"].append(body + logits * sequences)
        times["probe"] = times.get("probe", [])
        times["probe"].append(logits)

    StepHook.wrap, TeacherPass.begin = wrap, begin_with_logits
    runpy.run_module("megatron_moe_inject.pretrain", run_name="__main__", alter_sys=True)
    if dist.get_rank() == dist.get_world_size() - 1:
        skip = WARM_UP // 2
        # The probe of the logits ran inside the injected steps: it is no part of them.
        own = [a - b for a, b in zip(times["injected"], times.pop("probe"), strict=True)]
        times["injected"] = own
        start_up = sum(times.pop("start-up"))
        kept = {name: values[skip:] for name, values in times.items()} | {"start-up": [start_up]}
        kept["resident"] = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]
        Path(os.environ["STEP_OVERHEAD_TIMES"]).write_text(json.dumps(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--teacher-hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--hybrid", action="store_true", help="the same student as a HybridModel")
    parser.add_argument("--train-head", action="store_true", help="train head and embedding too")
    parent(parser.parse_args())


if __name__ == "__main__":
    if "STEP_OVERHEAD_TIMES" in os.environ:
        child()
    else:
        main()
