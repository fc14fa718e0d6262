"""Child process of ``lane.run``: the launcher, and exact numbers beside Megatron's rounded log.

The last rank prints one JSON line per training step and per evaluation, with every float as
Python writes it (it reads back bit for bit).
"""

import functools
import inspect
import json
import os
import runpy
import sys
import types

PREFIX = "exact: "


def _number(value) -> float:
    return float(value.item() if hasattr(value, "item") else value)


def _print_exact(record: dict) -> None:
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        print(PREFIX + json.dumps(record), flush=True)


def _around(training, name: str, make) -> None:
    """``make`` of the stock function in its place, inside the plugin's wrapper where it has one."""
    ours = getattr(training, name)
    if hasattr(ours, "__wrapped__"):
        ours.__wrapped__ = make(ours.__wrapped__)
    else:
        setattr(training, name, make(ours))


def _report_steps(training) -> None:
    """Losses and grad norm of each step, as Megatron's own ``training_log`` gets them."""

    def make(stock):
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def training_log(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            losses = {name: _number(value) for name, value in given["loss_dict"].items()}
            if given["grad_norm"] is not None:
                losses["grad norm"] = _number(given["grad_norm"])
            _print_exact({"iteration": int(given["iteration"]), **losses})
            return stock(*args, **kwargs)

        return training_log

    _around(training, "training_log", make)


def _no_loader_of_nothing(training) -> None:
    """Megatron fails at the loader of a blend of which ``--eval-iters 0`` leaves no sample."""

    def make(stock):
        @functools.wraps(stock)
        def build_pretraining_data_loader(dataset, *args, **kwargs):
            if dataset is not None and len(dataset) == 0:
                return None
            return stock(dataset, *args, **kwargs)

        return build_pretraining_data_loader

    _around(training, "build_pretraining_data_loader", make)


def _report_evaluations(training) -> None:
    """Losses of each evaluation, as ``evaluate`` returns them."""
    stock = training.evaluate

    @functools.wraps(stock)
    def evaluate(*args, **kwargs):
        result = stock(*args, **kwargs)
        losses = result[0] or {}
        _print_exact({"evaluation": {name: _number(value) for name, value in losses.items()}})
        return result

    training.evaluate = evaluate


def _run_stock() -> None:
    """The script with the plugin never installed, to compare with."""
    from megatron_moe_inject.host import compat, cpu_lane

    if "--cpu" in sys.argv:
        sys.argv.remove("--cpu")
        cpu_lane.enable()
    compat.use_prebuilt_dataset_helpers()
    from megatron.training import training

    _pretend_gpu(training)
    _report_steps(training)
    _no_loader_of_nothing(training)
    _report_evaluations(training)
    assert not hasattr(training.pretrain, "_megatron_moe_inject")
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _poison(training, layer: int) -> None:
    """An infinity in a norm of that decoder layer, from the third step on."""
    from megatron_moe_inject.host import compat

    stock, steps = training.train_step, []

    @functools.wraps(stock)
    def train_step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            model = inspect.signature(stock).bind(*args, **kwargs).arguments["model"]
            for chunk in compat.bare_chunks(model):
                chunk.decoder.layers[layer].pre_mlp_layernorm.weight.data.fill_(float("inf"))
        return stock(*args, **kwargs)

    training.train_step = train_step


def _fail_at_the_end(training, removed: str) -> None:
    """After the second step that folder is gone, and a frozen tensor of the last rank has moved."""
    import shutil

    from megatron_moe_inject.host import compat

    stock, steps = training.train_step, []

    @functools.wraps(stock)
    def train_step(*args, **kwargs):
        result = stock(*args, **kwargs)
        steps.append(1)
        if len(steps) == 2:
            shutil.rmtree(removed, ignore_errors=True)
            if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
                model = inspect.signature(stock).bind(*args, **kwargs).arguments["model"]
                chunk = compat.bare_chunks(model)[0]
                chunk.decoder.layers[0].pre_mlp_layernorm.weight.data.add_(1)
        return result

    training.train_step = train_step


def _forget_identities() -> None:
    """Save what versions before injections had an identity saved."""
    from megatron_moe_inject.host.lineage import Lineage

    Lineage.agree = lambda self: setattr(self, "identity", "")


def _report_host_syncs(training) -> None:
    """From the third step on, say where the package's code makes the host wait for the device.

    Megatron's own waits are left out.
    """
    import traceback
    import warnings

    import torch

    stock, seen, waits = training.train_step, set(), []
    of_torch = os.path.dirname(torch.__file__)

    def show(message, *_, **__):
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
        inner = next(f for f in reversed(frames) if not f.filename.startswith(of_torch))
        waits.append(inner)
        where = f"{inner.filename}:{inner.lineno}"
        mirrored = inner.filename.endswith("gpt_entry.py")  # NVIDIA's script waits there as well
        if "megatron_moe_inject" in inner.filename and not mirrored and where not in seen:
            seen.add(where)
            print(f"host sync: {where} {inner.name} ({inner.line})", flush=True)

    steps = []

    @functools.wraps(stock)
    def train_step(*args, **kwargs):
        steps.append(1)
        if len(steps) < 3:
            return stock(*args, **kwargs)
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return stock(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            print(f"host waits seen, Megatron's included: {len(waits)}", flush=True)

    training.train_step = train_step


def _pretend_gpu(training) -> None:
    """Where the test asks for it: tensors have places, and steps say what the host waits for."""
    if os.environ.get("TESTS_PRETENDED_GPU"):
        from tests.harness.pretended_gpu.machine import install
        from tests.harness.pretended_gpu.reports import report_steps

        # With it Megatron leaves the parameters on the CPU.
        sys.argv = [argument for argument in sys.argv if argument != "--use-cpu-initialization"]
        install()
        report_steps(training)


def _stand_in_for_fused_wgrad() -> None:
    """What Megatron calls of Apex for ``--gradient-accumulation-fusion``, by plain products."""
    module = types.ModuleType("fused_weight_gradient_mlp_cuda")

    def accumulate(inputs, grad_output, main_grad):
        main_grad.add_(grad_output.t().matmul(inputs))

    module.wgrad_gemm_accum_fp32 = module.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[module.__name__] = module
    if "--cpu" in sys.argv:
        from megatron_moe_inject.host.cpu_lane import flags

        flags.DEFAULTS.pop("gradient_accumulation_fusion")


def main() -> None:
    """``sys.argv`` as for the launcher, its own options first."""
    for name in os.environ.get("TESTS_WITHOUT", "").split():
        sys.modules[name] = None  # importing it fails, as where it is missing
    if os.environ.get("TESTS_FUSED_WGRAD"):
        _stand_in_for_fused_wgrad()
    if os.environ.get("STOCK_MEGATRON"):
        _run_stock()
        return
    from megatron_moe_inject import launch

    if os.environ.get("TESTS_TE_ON_CPU"):
        from tests.harness import te_on_cpu

        te_on_cpu.allow()
    launch.prepare()
    from megatron.training import training

    if os.environ.get("TESTS_TE_ON_CPU"):
        te_on_cpu.stop_before_training(training)
    _pretend_gpu(training)
    _report_steps(training)
    _no_loader_of_nothing(training)
    _report_evaluations(training)
    if os.environ.get("TESTS_POISON_LAYER"):
        _poison(training, int(os.environ["TESTS_POISON_LAYER"]))
    if os.environ.get("TESTS_FAIL_AT_THE_END"):
        _fail_at_the_end(training, os.environ["TESTS_FAIL_AT_THE_END"])
    if os.environ.get("TESTS_BEFORE_IDENTITIES"):
        _forget_identities()
    if os.environ.get("TESTS_REPORT_SYNCS"):
        _report_host_syncs(training)
    launch.main()


if __name__ == "__main__":
    main()
