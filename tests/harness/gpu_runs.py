"""Training runs on one GPU, many at once, each a process of its own through real ``pretrain()``.

runs = Runs(folder)
runs.start("bf16", ...)            # returns at once
runs["bf16"].losses("lm loss")     # waits; raises with the end of the output where the run failed

The student has sizes that FP8 can multiply: 128 and multiples of it. With ``GPU_RUNS`` in the
environment only runs whose name it matches (a regular expression) are started; tests that ask for
another are skipped.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shlex
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import lane
from tests.harness.corpus import write_corpora

AT_ONCE = 14
MODELS = ("student", "teacher", "experts")
DONE = "latest_checkpointed_iteration.txt"
SIZES = shlex.split(
    "--no-persist-layer-norm --num-layers 4 --hidden-size 128 --num-attention-heads 4 "
    "--ffn-hidden-size 256 "
    "--seq-length 128 --max-position-embeddings 128 --tokenizer-type NullTokenizer "
    "--vocab-size 61 --make-vocab-size-divisible-by 64 --lr 2e-3 --weight-decay 0.1 "
    "--global-batch-size 8 --train-iters 6 --no-gradient-accumulation-fusion "
    "--distributed-timeout-minutes 3"
)
LENIENT = ("--dist-ckpt-strictness", "log_unexpected")
"""What stock Megatron needs to load the student, which was saved without TE, into TE's layers."""
TE = ("--transformer-impl", "transformer_engine", "--moe-grouped-gemm", "--attention-backend")
BF16 = ("--bf16", *TE, "unfused")
FP8 = {
    "tensorwise": ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
    "blockwise": ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    "delayed": (
        *("--fp8-format", "hybrid", "--fp8-recipe", "delayed"),
        *("--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max"),
    ),
}
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
EXACT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}
"""What ``--deterministic-mode`` wants in the environment."""
FUSED = {"TESTS_FUSED_WGRAD": "1"}
"""With a stand-in for Apex's kernel, weight gradients are added to ``main_grad`` at once."""
APEX = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda")
"""Of Apex, what Megatron imports."""
MULTI_RANK = 23000
"""The first NCCL version that lets processes share a device."""
RECIPE = """
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {layers: {2: [0, 3], 3: [3]}}
teachers:
  coder: {source: "megatron:{teacher}"}
objective: {alpha: 0.7, beta: 0.3, temperature: 2.0}
"""
MLA = (
    *("--multi-latent-attention", "--kv-channels", "32", "--kv-lora-rank", "64"),
    *("--q-lora-rank", "64", "--qk-head-dim", "32", "--qk-pos-emb-head-dim", "16"),
    *("--v-head-dim", "32", "--rotary-scaling-factor", "1.0"),
)
DISTRIBUTED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
EP2 = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
TP2 = (
    *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    *("--make-vocab-size-divisible-by", "32"),
)
PP2 = ("--pipeline-model-parallel-size", "2")


def nccl_version() -> int:
    """Of the library that processes of ``two`` would use: 22809 for 2.28.9."""
    library = os.environ.get("NCCL_LIBRARY")
    if not library:
        major, minor, patch = torch.cuda.nccl.version()[:3]
        return 10000 * major + 100 * minor + patch
    version = ctypes.c_int()
    ctypes.CDLL(library).ncclGetVersion(ctypes.byref(version))
    return version.value


def two() -> dict[str, Any] | None:
    """Options of a run of two processes, on two devices or sharing one; None where neither goes.

    ``NCCL_LIBRARY`` in the environment names another NCCL than torch's.
    """
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if torch.cuda.device_count() < 2:
        if nccl_version() < MULTI_RANK:
            return None
        env |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "LOCAL_RANK": "0"}
        if "NCCL_LIBRARY" in os.environ:
            env["LD_PRELOAD"] = os.environ["NCCL_LIBRARY"]
    return {"nproc": 2, "env": env, "timeout": 120.0}


class Runs:
    """Runs by name, of at most ``AT_ONCE`` processes at a time on the device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._room, self._entering = threading.Semaphore(AT_ONCE), threading.Lock()
        self._runs: dict[str, Future[lane.Run]] = {}
        self._left_out: dict[str, str] = {}
        self.general, self.domain = write_corpora(folder)
        self.student, self.teacher, self.experts = (str(folder / name) for name in MODELS)

    def __getitem__(self, name: str) -> lane.Run:
        if name in self._left_out:
            pytest.skip(self._left_out[name])
        return self._runs[name].result()

    def outcome(self, name: str) -> tuple[lane.Run | None, str]:
        """The run, or None and why it failed."""
        try:
            return self[name], ""
        except AssertionError as error:
            return None, str(error)

    def names(self) -> list[str]:
        return list(self._runs)

    def start(
        self, name: str, flags: Sequence[str], *, cpu=False, fused=False, after: str | None = None,
        **options,
    ) -> None:  # fmt: skip
        """Start a run on the GPU, or with ``cpu`` on the CPU lane; ``options`` of ``lane.run``.

        ``fused`` accumulates gradients in the products, as ``FUSED`` does, by Apex's own kernel.
        ``after`` names a run that must have ended before.
        """
        wanted = os.environ.get("GPU_RUNS", "")
        if not re.search(wanted, name) and name not in MODELS:
            self._left_out[name] = f"GPU_RUNS leaves out {name!r}"
            return
        where = {"options": ("--cpu",), "fresh": True} if cpu else {"options": ()}
        env = {**(ON_CPU if cpu else {}), **options.pop("env", {})}
        if not cpu:  # on a CPU it is the only way; under TE parameters would stay there
            flags = [flag for flag in flags if flag != "--use-cpu-initialization"]
        if env.items() >= FUSED.items() or fused:
            flags = [flag for flag in flags if flag != "--no-gradient-accumulation-fusion"]
        call = functools.partial(lane.run, list(flags), env=env, **where, **options)
        earlier = None if after is None else self._runs[after]

        def begin() -> lane.Run:
            if earlier is not None:
                earlier.result()
            processes = options.get("nproc", 1)
            with self._entering:  # one after the other, so that no two wait for each other's room
                for _ in range(processes):
                    self._room.acquire()
            try:
                return call()
            finally:
                self._room.release(processes)

        self._runs[name] = self._pool.submit(begin)

    def inject_by_two(self, name: str, *extra: str, recipe: str) -> None:
        """An injection by two processes, where the machine can run them."""
        options = two()
        if options is None:
            self._left_out[name] = (
                f"NCCL {nccl_version()} takes one process a device (run.sh: NCCL)"
            )
            return
        self.inject(name, *extra, recipe=recipe, **options)

    def inject_with_apex(self, name: str, *extra: str, recipe: str, **options) -> None:
        """An injection with gradient accumulation fusion, where Apex and its kernels are."""
        missing = [package for package in APEX if importlib.util.find_spec(package) is None]
        if missing:
            self._left_out[name] = f"needs Apex with its CUDA kernels; missing: {missing}"
            return
        self.inject(name, *extra, recipe=recipe, fused=True, **options)

    def make_models(self) -> None:
        """Train the student (MoE), the teacher (dense) and one with experts for a moment, on the
        CPU lane.

        ``GPU_MODELS`` in the environment names a folder that keeps them for other calls.
        """
        kept = os.environ.get("GPU_MODELS")
        if kept:
            self.student, self.teacher, self.experts = (
                str(Path(kept).resolve() / name) for name in MODELS
            )
            if all((Path(kept) / name / DONE).exists() for name in MODELS):
                return
        small = [f for f in lane.moe() if f != "--mock-data"]
        save = ("--save-interval", "100", "--no-save-optim", "--split", "90,5,5")
        student = [*small, *SIZES, "--data-path", self.general, "--save", self.student, *save]
        dense = [f for f in lane.dense() if f != "--mock-data"]
        taught = [*SIZES, "--num-layers", "2", "--train-iters", "40", "--data-path", self.domain]
        self.start("student", student, cpu=True)
        self.start("teacher", [*dense, *taught, "--save", self.teacher, *save], cpu=True)
        self.start("experts", [*small, *taught, "--save", self.experts, *save], cpu=True)
        for name in MODELS:
            self[name]

    def flags(self, *extra: str, student: bool = True) -> list[str]:
        """Flags that train the student, or without ``student`` a new one, on both corpora."""
        small = [f for f in lane.moe() if f != "--mock-data"]
        blend = ("--data-path", "0.4", self.general, "0.6", self.domain, "--split", "90,5,5")
        start = ("--load", self.student, "--finetune", "--no-load-optim", "--no-load-rng")
        return [*small, *SIZES, *blend, *(start if student else ()), *extra]

    def inject(self, name: str, *extra: str, recipe: str, student=True, **options) -> None:
        """Start an injection with ``recipe``, in which ``{teacher}`` stands for the teacher.

        Later ``extra`` flags win. Without ``student`` nothing is loaded.
        """
        path = self.folder / f"{name.replace(' ', '-')}.yaml"
        path.write_text(recipe.replace("{teacher}", self.teacher))
        ours = ("--inject-recipe", str(path), "--inject-verify-frozen")
        ours += () if student or "--load" in extra else ("--inject-from-scratch",)
        self.start(name, self.flags(*ours, *extra, student=student), **options)
