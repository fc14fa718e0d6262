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
from megatron_moe_inject.recipe.plan import render_plan

if TYPE_CHECKING:
    from argparse import Namespace

    from megatron_moe_inject.evaluation.evaluator import Evaluator
    from megatron_moe_inject.injection import Injection
    from megatron_moe_inject.recipe.schema import Recipe
    from megatron_moe_inject.runs import (
        EvaluationRun,
        ProfileRun,
    )

_MARK = "_megatron_moe_inject"
_HELD_OUT = {
    "num_samples": "get_train_valid_test_num_samples",
    "loader": "build_pretraining_data_loader",
}
"""Where ``HeldOutText`` stands in the building of data, by its methods."""


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
    run = _Run()
    _wrap(arguments, "add_megatron_arguments", run.add_arguments)
    _wrap(training, "pretrain", run.pretrain)
    megatron.training.pretrain = training.pretrain
    _wrap(training, "setup_model_and_optimizer", run.setup_model_and_optimizer)
    _wrap(checkpointing, "_load_base_checkpoint", run.load_base_checkpoint)
    _wrap(training, "get_megatron_optimizer", run.get_megatron_optimizer)
    _wrap(training, "build_train_valid_test_data_iterators", run.build_data_iterators)
    _wrap(training, "build_train_valid_test_datasets", run.datasets)
    for name, symbol in _HELD_OUT.items():
        _wrap(training, symbol, functools.partial(run.held_out, name))
    _wrap(training, "evaluate_and_print_results", run.evaluate)
    _wrap(training, "evaluate", run.evaluate_terms)
    _wrap(training, "get_forward_backward_func", run.get_forward_backward_func)
    _wrap(training, "train", run.train)
    _wrap(training, "training_log", run.training_log)


def _wrap(module: ModuleType, name: str, around: Callable) -> None:
    """Replace ``module.name`` by ``around(stock, *args, **kwargs)``, keeping its signature."""
    stock = getattr(module, name)

    @functools.wraps(stock)
    def wrapper(*args, **kwargs):
        return around(wrapper.__wrapped__, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(module, name, wrapper)


class _Run:
    """Holds the injection of the ``pretrain()`` that is running, ``None`` when off."""

    def __init__(self) -> None:
        self._injection: Injection | ProfileRun | EvaluationRun | None = None
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
            if mistake is not None:
                raise mistake
            made = self._made(recipe, options)
            return made.recipe, made

        meeting = Meeting.of_job(options, kwargs.get("store"))
        try:
            self._injection = begin_alike(meeting, options, make)
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
            self._injection = self._verify = None

    @staticmethod
    def _made(recipe: Recipe, options: Namespace) -> Injection | ProfileRun | EvaluationRun:
        if options.inject_evaluate is not None:
            from megatron_moe_inject.runs import (
                EvaluationRun,
            )

            return EvaluationRun(recipe, options, compat.tokenizer_vocab_size())
        if options.inject_profile is not None and options.skip_train:
            from megatron_moe_inject.runs import (
                ProfileRun,
            )

            return ProfileRun(recipe, options)
        from megatron_moe_inject.injection import Injection

        return Injection(recipe, options, compat.tokenizer_vocab_size())

    def setup_model_and_optimizer(self, stock, *args, **kwargs):
        injection = self._injection
        if injection is None:
            return stock(*args, **kwargs)
        if self._verify is not None:
            _print_rank_0(self._verify())
        injection.claim_folder()
        injection.try_outputs()
        with injection.building():
            built = compat.call_with_pre_wrap_hook(stock, args, kwargs, injection.freeze)
        injection.attach(compat.bare_chunks(built[0]), built[1])
        _print_rank_0(None if injection.plan is None else render_plan(injection.plan))
        if injection.dry_run:
            _leave(0)
        return built

    def load_base_checkpoint(self, stock, *args, **kwargs):
        if self._injection is None:
            return stock(*args, **kwargs)
        return self._injection.student_load.read(stock, *args, **kwargs)

    def get_megatron_optimizer(self, stock, *args, **kwargs):
        optimizer = stock(*args, **kwargs)
        if self._injection is None:
            return optimizer
        from megatron_moe_inject.experts.train.optimizer_state import make_checkpointable

        return make_checkpointable(optimizer)

    def build_data_iterators(self, stock, *args, **kwargs):
        iterators = stock(*args, **kwargs)
        if self._injection is None:
            return iterators
        if self._injection.blend is not None:
            self._injection.blend.check()
        self._injection.measured_text.check()
        if self._evaluator is not None:
            iterators = self._evaluator.text.iterators(compat.validation_loader, iterators)
        self._injection.splits.register(*iterators)
        return iterators

    @property
    def _evaluator(self) -> Evaluator | None:
        return None if self._injection is None else self._injection.evaluator

    def held_out(self, name, stock, *args, **kwargs):
        """Megatron asks for numbers of samples or a loader."""
        if self._evaluator is None:
            return stock(*args, **kwargs)
        text = self._evaluator.text
        if name == "loader":
            return text.loader(stock, *args, **kwargs)
        return text.num_samples(stock(*args, **kwargs))

    def datasets(self, stock, *args, **kwargs):
        built = stock(*args, **kwargs)
        if self._injection is None:
            return built
        self._injection.measured_text.datasets(built)
        if self._injection.blend is not None:
            built = self._injection.blend.datasets(built)
        return built if self._evaluator is None else self._evaluator.text.datasets(built)

    def evaluate(self, stock, *args, **kwargs):
        if self._evaluator is None:
            return stock(*args, **kwargs)
        return self._evaluator.evaluate(stock, *args, **kwargs)

    def get_forward_backward_func(self, stock, *args, **kwargs):
        forward_backward = stock(*args, **kwargs)
        if self._injection is None:
            return forward_backward
        return self._injection.step_hook.wrap(forward_backward)

    def train(self, stock, *args, **kwargs):
        injection = self._injection
        if injection is None:
            return stock(*args, **kwargs)
        injection.begin_training()
        if injection.evaluator is not None:
            injection.evaluator.before_training(stock, args, kwargs)
        if injection.run_log is not None:
            injection.run_log.begin(injection.plan)
        try:
            return stock(*args, **kwargs)
        except SystemExit:  # --exit-interval and the like leave this way, with everything saved
            self._finish()
            raise

    def _finish(self) -> None:
        """What is left to do when all is saved, so that its failure costs no checkpoint."""
        for said in self._injection.finish():
            _print_rank_0(said)

    def evaluate_terms(self, stock, *args, **kwargs):
        terms = None if self._injection is None else self._injection.terms
        if terms is None:
            return stock(*args, **kwargs)
        return terms.evaluate(stock, *args, **kwargs)

    def training_log(self, stock, *args, **kwargs):
        if self._injection is None or self._injection.terms is None:
            return stock(*args, **kwargs)
        given = compat.bound_arguments(stock, args, kwargs)
        result, read = self._injection.terms.log(stock, given)
        if self._injection.run_log is not None:
            self._injection.run_log.log(given, read)
        return result


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
