"""Time and memory of the distillation loss, forward and backward, beside what users have today.

    python examples/benchmarks/loss_bench.py [--tp 1 2] [--json FILE] [--plot FILE.png]

Peers: `pip install nvidia-modelopt liger-kernel`; one that is missing is listed as such. Every
contender (``loss_contenders.py``) runs in processes of its own, is checked against the fp64
reference at a small size first, and takes turns with the others; times are medians. Memory is the
peak beyond the inputs (hidden states, heads, labels), gradients included: on a GPU of torch's
allocator, on a CPU of the process's resident set, the largest of the repetitions. CPU seconds count
the work of the process alone (of the busiest rank): what to compare on a machine that others use.

FLOP rates count the products that the task needs, not those that a contender spends: with t tokens,
2 t v h for the student's logits, 2 t v h_t for the teacher's, 2 t v h for the gradient by the
hidden states and, head trained, 2 t v h for the head's; the total over all ranks. The share of the
limit is that rate divided by the number of ranks and by the GPU's data sheet rate for dense bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from loss_contenders import CONTENDERS, Settings
from loss_report import aims, draw, report

from megatron_moe_inject.losses import KINDS

SIZES = {  # tokens, hidden, teacher_hidden, vocab
    "cpu": (1024, 1024, 512, 131072),
    "cuda": (8192, 4096, 2048, 128256),
}
# Dense bf16 matrix products, FLOP/s, from NVIDIA's data sheets.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
WORKER = Path(__file__).resolve().with_name("loss_worker.py")


class Runner:
    """The processes of one contender at one tensor-parallel size."""

    def __init__(self, name: str, tp: int, options: argparse.Namespace, folder: str):
        self.name, self.tp, self.status = name, tp, ""
        self.folder = tempfile.mkdtemp(dir=folder)
        self.processes = []
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        if options.threads:
            environment["OMP_NUM_THREADS"] = str(options.threads)
        for rank in range(tp):
            settings = Settings(
                name, options.kind, options.temperature, options.alpha, options.beta,
                options.dtype, options.device, options.threads, tp, rank, f"{self.folder}/store",
                options.hidden, options.teacher_hidden, options.topk,
            )  # fmt: skip
            with open(f"{self.folder}/stderr{rank}", "w") as errors:
                command = [sys.executable, "-W", "ignore", str(WORKER)]
                command.append(json.dumps(asdict(settings)))
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
                self.processes.append(
                    subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
                )

    def ask(self, do: str, **command) -> dict | None:
        """The largest of all ranks' answers, by name; None once the contender is out."""
        self.begin(do, **command)
        return self.answer()

    def begin(self, do: str, **command) -> None:
        """Ask without waiting for the answer."""
        if self.status:
            return
        try:
            for process in self.processes:
                process.stdin.write(json.dumps({"do": do, **command}) + "\n")
        except BrokenPipeError:
            pass  # the empty answer tells

    def answer(self) -> dict | None:
        """To what was asked last, see ``ask``."""
        if self.status:
            return None
        answers = [process.stdout.readline() for process in self.processes]
        answers = [json.loads(line) if line else self._died(r) for r, line in enumerate(answers)]
        for answer in answers:
            if "absent" in answer:
                install = CONTENDERS[self.name].install
                self.status = f"not installed (pip install {install}): {answer['absent']}"
            elif "failed" in answer:
                self.status = f"failed: {answer['failed'].splitlines()[0]}"
        if self.status:
            return None
        return {
            key: None if answers[0][key] is None else max(answer[key] for answer in answers)
            for key in answers[0]
        }

    def _died(self, rank: int) -> dict:
        lines = Path(f"{self.folder}/stderr{rank}").read_text().strip().splitlines()
        return {"failed": f"process ended with {self.processes[rank].wait()}: {lines[-1:]}"}

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def unfit(name: str, tp: int, options: argparse.Namespace) -> str:
    """Why a contender cannot do what is asked for, "" if it can."""
    contender = CONTENDERS[name]
    if options.kind not in contender.kinds:
        return f"no {options.kind}"
    if tp > 1 and not contender.shards:
        return "no tensor parallelism"
    if contender.needs_cuda and options.device != "cuda":
        return "needs a GPU"
    if options.device == "cuda" and tp > torch.cuda.device_count():
        return f"needs {tp} GPUs, here {torch.cuda.device_count()}"
    return ""


def needed_flops(name: str, tokens: int, vocab: int, trained: bool, o: argparse.Namespace) -> int:
    """See the module; a stored teacher needs no product."""
    teacher = 0 if CONTENDERS[name].stored_teacher else o.teacher_hidden
    return 2 * tokens * vocab * (teacher + (3 if trained else 2) * o.hidden)


def measure(runners: list[Runner], trained: bool, repeats: int) -> dict[str, dict]:
    """Medians of wall and CPU seconds, peak extra bytes and all samples, taken in turns."""
    runners = [r for r in runners if trained or not CONTENDERS[r.name].trained_only]
    for runner in runners:
        runner.ask("run", train_head=trained)
    results = {runner.name: [] for runner in runners}
    for _ in range(repeats):
        for runner in runners:
            answer = runner.ask("run", train_head=trained)
            if answer is not None:
                results[runner.name].append(answer)
    measured = {}
    for name, answers in results.items():
        if len(answers) == repeats:
            samples = {key: [answer[key] for answer in answers] for key in answers[0]}
            peaks = [peak for peak in samples.pop("extra_bytes") if peak is not None]
            medians = {key: statistics.median(values) for key, values in samples.items()}
            peak = max(peaks, default=None)
            measured[name] = medians | dict(extra_bytes=peak, samples=samples)
    return measured


def bench(tp: int, options: argparse.Namespace, folder: str, sweep: bool) -> Iterator[dict]:
    """All contenders at one tensor-parallel size: rows, the sweep's points, the product's rate.

    What there is so far, after the rows of each kind of head and after the sweep.
    """
    part = dict(rows=[], sweep=[], product=None)
    runners, reasons, checks = [], {}, {}
    try:
        for name in options.contenders:
            reasons[name] = unfit(name, tp, options)
            if not reasons[name]:
                runners.append(Runner(name, tp, options, folder))
        for runner in runners:  # all at once, as some compile
            runner.begin("check")
        for runner in runners:
            checks[runner.name] = runner.answer()
            runner.ask("inputs", tokens=options.tokens, vocab=options.vocab)
            say(f"TP {tp}: {runner.name} {runner.status or 'ready'}")
        if runners:
            rate = runners[0].ask("product")
            part["product"] = rate and rate["rate"]
        for head in options.head:
            say(f"TP {tp}: timing, head {head}")
            measured = measure(runners, head == "trained", options.repeats)
            gradients = options.tokens * options.hidden
            gradients += options.vocab // tp * options.hidden * (head == "trained")
            gradients *= getattr(torch, options.dtype).itemsize
            for name in options.contenders:
                status = {r.name: r.status for r in runners}.get(name, reasons[name])
                if CONTENDERS[name].trained_only and head == "frozen":
                    status = status or "the same as with upstream_mask"
                row = dict(contender=name, tp=tp, head=head, status=status or "measured")
                row |= checks.get(name) or {}
                if name in measured:
                    flops = needed_flops(
                        name, options.tokens, options.vocab, head == "trained", options
                    )
                    row |= measured[name] | dict(gradient_bytes=gradients)
                    row |= dict(flops_per_second=flops / row["seconds"])
                part["rows"].append(row)
            yield part
        if sweep:
            part["sweep"] = run_sweep(runners, options)
            yield part
    finally:
        for runner in runners:
            runner.close()


def run_sweep(runners: list[Runner], options: argparse.Namespace) -> list[dict]:
    """Head frozen: four lengths at a quarter of the vocabulary, and the other way round."""
    points = []
    quarter = {"tokens": options.tokens // 4, "vocab": options.vocab // 4}
    for axis, whole in (("tokens", options.tokens), ("vocab", options.vocab)):
        for part in (8, 4, 2, 1):
            size = quarter | {axis: max(whole // part, 1)}
            say(f"sweep: {size}")
            for runner in runners:
                runner.ask("inputs", **size)
            for name, figures in measure(runners, False, options.sweep_repeats).items():
                points.append(dict(axis=axis, **size, contender=name) | figures)
    return points


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*:\s*(.+)", text)[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {model}, {options.threads or 'all'} thread(s) a process"


def versions() -> dict[str, str | None]:
    """Of torch and the peers; None where one is not installed."""
    found = {}
    for name in ("torch", "megatron-core", "nvidia-modelopt", "liger-kernel"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("--tokens", "--hidden", "--teacher-hidden", "--vocab"):
        add(name, type=int, help="default by device")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="float32, on a GPU bfloat16")
    add("--kind", choices=KINDS, default="forward_kl")
    add("--temperature", type=float, default=2.0)
    add("--alpha", type=float, default=0.7, help="weight of the divergence")
    add("--beta", type=float, default=0.3, help="weight of the cross-entropy")
    add("--topk", type=int, default=128, help="ids per token of the top-k contenders")
    add("--tp", type=int, nargs="+", default=[1, 2])
    add("--head", choices=("frozen", "trained"), nargs="+", default=["frozen", "trained"])
    add("--contenders", choices=CONTENDERS, nargs="+", default=list(CONTENDERS))
    add("--threads", type=int, help="per process; default 1 on a CPU, torch's choice on a GPU")
    add("--repeats", type=int, default=5)
    add("--sweep-repeats", type=int, default=3)
    add("--json", metavar="FILE", help="write all figures")
    add("--plot", metavar="FILE.png", help="sweep tokens and vocabulary, and draw")
    options = parser.parse_args()
    for name, default in zip(
        ("tokens", "hidden", "teacher_hidden", "vocab"), SIZES[options.device], strict=True
    ):
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.threads is None:
        options.threads = 1 if options.device == "cpu" else 0
    uneven = [tp for tp in options.tp if options.vocab % (4 * tp) or 1000 % tp]
    if uneven or options.topk > options.vocab // 4:
        parser.error(
            f"--vocab {options.vocab} must be divisible by 4 x --tp {max(options.tp)}, "
            f"--tp divide 1000, and --topk {options.topk} be at most a quarter of it"
        )
    return options


def collect(options: argparse.Namespace, parts: dict[int, dict]) -> dict:
    """What ``--json`` writes, of parts by tensor-parallel size."""
    where = machine(options)
    bf16 = options.device == "cuda" and options.dtype == "bfloat16"
    result = dict(
        command=shlex.join(["python", "examples/benchmarks/loss_bench.py", *sys.argv[1:]]),
        machine=where,
        versions=versions(),
        options=vars(options),
        peak_flops_per_second=next((v for k, v in PEAK.items() if bf16 and k in where), None),
        product={tp: part["product"] for tp, part in parts.items()},
        rows=[row for part in parts.values() for row in part["rows"]],
        sweep=[point for part in parts.values() for point in part["sweep"]],
    )
    return result | dict(aims=aims(result))


def main() -> None:
    options = parse()
    parts: dict[int, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tp in options.tp:
            for part in bench(tp, options, folder, bool(options.plot) and tp == 1):
                parts[tp] = part
                result = collect(options, parts)
                if options.json:  # so far, in case that it is cut off
                    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    if options.plot and result["sweep"]:
        draw(result, options.plot)


if __name__ == "__main__":
    main()
