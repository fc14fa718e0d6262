"""The wiring: which Megatron extension point gets what. Read this first.

| Megatron symbol | what is added |
|---|---|
| ``arguments.add_megatron_arguments`` | the ``--inject-*`` flags |
| ``training.pretrain`` | reads and checks the recipe before anything is built |
| the same | when all is saved: the proof of what is frozen; the routing profile |
| ``training.setup_model_and_optimizer`` | before: checksums of inputs; the lock on ``--save`` |
| the same | before DDP: freezing |
| the same | after: hooks, boundary, teachers |
| ``training.build_train_valid_test_data_iterators`` | which split each iterator reads |
| ``training.get_train_valid_test_num_samples`` | with ``evaluation``: how much text is held out |
| ``training.build_train_valid_test_datasets`` | ... which data set that is |
| the same | that what is measured on is there and read once |
| the same | where shares of the training blend change, the order of its samples |
| ``training.build_pretraining_data_loader`` | ... and that it is read from its beginning |
| ``training.evaluate_and_print_results`` | ... and what was measured on it |
| ``training.get_forward_backward_func`` | the step hook |
| ``training.train`` | the first evaluation; what must not change is remembered |
| ``training.training_log``, ``training.evaluate`` | our terms, as sums over the interval |
| ``training.training_log`` | with ``evaluation``: the run's list, for ``moe-inject report`` |
| ``checkpointing._load_base_checkpoint`` | what is asked of the student's checkpoint, and lacks |
| ``training.get_megatron_optimizer`` | the optimizer can be saved where little trains |

Not patched: the optimizer's maths, DDP, schedules, the checkpoint format, and any class of the
model; the loss goes through ``GPTModel.forward``'s own ``output_processor``, and where a recipe
watches or steers routing, methods of that student's own routers are wrapped (``routing/``). Each
wrapper keeps the stock function in ``__wrapped__`` and calls it untouched when no recipe is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import RecipeError

if TYPE_CHECKING:
    from megatron_moe_inject.run import Run

_MARK = "_megatron_moe_inject"
_AROUND = (
    "get_train_valid_test_num_samples",
    "build_train_valid_test_datasets",
    "build_pretraining_data_loader",
    "get_megatron_optimizer",
    "evaluate_and_print_results",
    "evaluate",
    "training_log",
)
"""Of ``training``: what features' parts may stand around (``RunPart.around``), besides
``train``, ``build_train_valid_test_data_iterators`` and ``checkpointing._load_base_checkpoint``."""


def install() -> None:
    """See ``megatron_moe_inject.install``.

    Raises:
        ImportError: this Megatron lacks a symbol the plugin needs; all of them are named.
    """
    compat.require_symbols()
    import megatron.training
    from megatron.training import arguments, checkpointing, training

    if hasattr(training.pretrain, _MARK):
        return
    wiring = _Wiring()
    _wrap(arguments, "add_megatron_arguments", wiring.add_arguments)
    _wrap(training, "pretrain", wiring.pretrain)
    megatron.training.pretrain = training.pretrain
    _wrap(training, "setup_model_and_optimizer", wiring.setup_model_and_optimizer)
    _wrap(training, "build_train_valid_test_data_iterators", wiring.build_data_iterators)
    _wrap(training, "get_forward_backward_func", wiring.get_forward_backward_func)
    _wrap(training, "train", wiring.train)
    for module, names in ((training, _AROUND), (checkpointing, ("_load_base_checkpoint",))):
        for name in names:
            _wrap(module, name, functools.partial(wiring.around, name))


def _wrap(module: ModuleType, name: str, around: Callable) -> None:
    """Replace ``module.name`` by ``around(stock, *args, **kwargs)``, keeping its signature."""
    stock = getattr(module, name)

    @functools.wraps(stock)
    def wrapper(*args, **kwargs):
        return around(wrapper.__wrapped__, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(module, name, wrapper)


class _Wiring:
    """Holds the run of the ``pretrain()`` that is running, ``None`` when off."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._verify: Callable[[], str] | None = None

    def add_arguments(self, stock, parser):
        from megatron_moe_inject.recipe.flags import add_inject_arguments

        return add_inject_arguments(stock(parser))

    def pretrain(self, stock, *args, **kwargs):
        from megatron.training import get_args

        from megatron_moe_inject.host import failure
        from megatron_moe_inject.host.meeting import Meeting
        from megatron_moe_inject.recipe.flags import name_error, recipe_from_args
        from megatron_moe_inject.recipe.same_recipe import begin_alike

        options, recipe, mistake = get_args(), None, None
        try:
            recipe = recipe_from_args(options)
        except RecipeError as error:
            mistake = error
        if recipe is None and mistake is None:
            return stock(*args, **kwargs)

        def make():
            from megatron_moe_inject.run import Run, run_kind

            if mistake is not None:
                raise mistake
            run = Run(run_kind(options), recipe, options, compat.tokenizer_vocab_size())
            return run.recipe, run

        meeting = Meeting.of_job(options, kwargs.get("store"))
        try:
            self._run = begin_alike(meeting, options, make)
            if options.inject_verify_inputs:
                from megatron_moe_inject.teachers.verify_inputs import verify_inputs

                self._verify = functools.partial(verify_inputs, recipe, options)
            result = stock(*args, **kwargs)
            self._finish()
            return result
        except RecipeError as error:
            # One message per node and no traceback, whether every rank came here or one.
            failure.end(str(name_error(error, options)), meeting)
        finally:
            self._run = self._verify = None

    def setup_model_and_optimizer(self, stock, *args, **kwargs):
        run = self._run
        if run is None:
            return stock(*args, **kwargs)
        if self._verify is not None:
            _print_rank_0(self._verify())
        run.claim_folder()
        run.try_outputs()
        with run.building():
            built = compat.call_with_pre_wrap_hook(stock, args, kwargs, run.before_ddp)
        run.attach(compat.bare_chunks(built[0]), built[1])
        _print_rank_0(run.context.plan or None)
        if run.dry_run:
            _leave(0)
        return built

    def around(self, name, stock, *args, **kwargs):
        """A function that features' parts may stand around."""
        if self._run is None:
            return stock(*args, **kwargs)
        return self._run.call(name, stock, *args, **kwargs)

    def build_data_iterators(self, stock, *args, **kwargs):
        iterators = self.around("build_train_valid_test_data_iterators", stock, *args, **kwargs)
        if self._run is not None:
            self._run.splits.register(*iterators)
        return iterators

    def get_forward_backward_func(self, stock, *args, **kwargs):
        forward_backward = stock(*args, **kwargs)
        if self._run is None:
            return forward_backward
        return self._run.step_hook.wrap(forward_backward)

    def train(self, stock, *args, **kwargs):
        run = self._run
        if run is None:
            return stock(*args, **kwargs)
        run.begin_training()

        @functools.wraps(stock)
        def training(*args, **kwargs):
            try:
                return stock(*args, **kwargs)
            except SystemExit:  # --exit-interval and the like leave so, with everything saved
                self._finish()
                raise

        return run.call("train", training, *args, **kwargs)

    def _finish(self) -> None:
        """What is left to do when all is saved, so that its failure costs no checkpoint."""
        for said in self._run.finish():
            _print_rank_0(said)


def _print_rank_0(text: str | None) -> None:
    import torch.distributed as dist

    if text is not None and dist.get_rank() == 0:
        print(text, flush=True)


def _leave(code: int) -> NoReturn:
    """End this process; every rank comes here, before or after process groups exist."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(code)
