"""The wiring: which Megatron extension point gets what. Read this first.

| Megatron symbol | what is added |
|---|---|
| ``arguments.add_megatron_arguments`` | the ``--inject-*`` flags; ``--help`` prints |
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
| ``training.train_step`` | where a step cannot be made: a checkpoint, and the end |
| ``training.train`` | the first evaluation; what must not change is remembered |
| ``training.training_log``, ``training.evaluate`` | our terms, as sums over the interval |
| ``training.training_log`` | with ``evaluation``: the run's list, for ``moe-inject report`` |
| ``checkpointing._load_base_checkpoint`` | what is asked of the student's checkpoint, and lacks |
| ``training.get_megatron_optimizer`` | the optimizer can be saved where little trains |

Not patched: the optimizer's maths, DDP, schedules, the checkpoint format, and any class of the
model; the loss goes through ``GPTModel.forward``'s own ``output_processor``, or the last two calls
of a ``HybridModel``, whose forward takes none (``host/hybrid_seam.py``). What else is wrapped
are methods of this run's own objects (transformer block, routers, experts, dispatchers, optimizer),
by the features that the recipe has in use. ``contracts.py`` has the rows of these functions, each
room's ``uses.py`` those of its methods; ``moe-inject plan RECIPE --wraps`` lists them, and
``--inject-dry-run`` what was wrapped. Each wrapper keeps what it wraps in ``__wrapped__``
(``host/wrap.py``), and these functions call it untouched when no recipe is given. Where
Megatron-Bridge is there, its own training loops end with an error (``host/bridge.py``).
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.contract import Wrapped
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.wrap import Call, wrap_function, wrap_of

if TYPE_CHECKING:
    from megatron_moe_inject.recipe.schema import Recipe
    from megatron_moe_inject.run import Run


def install() -> None:
    """See ``megatron_moe_inject.install``.

    Raises:
        ImportError: this Megatron lacks a symbol the plugin needs; all of them are named.
    """
    from megatron_moe_inject import contracts
    from megatron_moe_inject.host.bridge import refuse_training

    contracts.require_always()
    import megatron.training
    from megatron.training import training

    if wrap_of(training.pretrain) is not None:
        return
    wiring = _Wiring()
    wrapped: tuple[tuple[Wrapped, Callable[..., Any]], ...] = (
        (contracts.ARGUMENTS, wiring.add_arguments),
        (contracts.PRETRAIN, wiring.pretrain),
        (contracts.SETUP, wiring.setup_model_and_optimizer),
        (contracts.ITERATORS, wiring.build_data_iterators),
        (contracts.SCHEDULE, wiring.get_forward_backward_func),
        (contracts.LOOP, wiring.train),
        *(
            (function, functools.partial(wiring.around, function.name))
            for function in contracts.AROUND
        ),
    )
    for function, around in wrapped:
        wrap_function(function, functools.partial(_spread, around))
    megatron.training.pretrain = training.pretrain
    refuse_training()


def _spread(around: Callable, call: Call) -> Any:
    """``around(stock, *args, **kwargs)`` for a call."""
    return around(call.stock, *call.args, **call.kwargs)


class _Wiring:
    """Holds the run of the ``pretrain()`` that is running, ``None`` when off."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._verify: Callable[[], str] | None = None

    def add_arguments(self, stock: Callable, parser: ArgumentParser) -> ArgumentParser:
        from megatron_moe_inject.host.help_texts import make_printable
        from megatron_moe_inject.recipe.flags import add_inject_arguments

        return add_inject_arguments(make_printable(stock(parser)))

    def pretrain(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
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

        def make() -> tuple[Recipe, Run]:
            from megatron_moe_inject.run import Run, run_kind

            if mistake is not None:
                raise mistake
            assert recipe is not None
            run = Run(run_kind(options), recipe, options, compat.tokenizer_vocab_size())
            return run.recipe, run

        meeting = Meeting.of_job(options, kwargs.get("store"))
        try:
            self._run = run = begin_alike(meeting, options, make)
            if options.inject_verify_inputs:
                from megatron_moe_inject.teachers.verify_inputs import verify_inputs

                self._verify = functools.partial(verify_inputs, run.recipe, options)
            result = stock(*args, **kwargs)
            _finish(run)
            return result
        except RecipeError as error:
            # One message per node and no traceback, whether every rank came here or one.
            failure.end(str(name_error(error, options)), meeting)
        finally:
            self._run = self._verify = None

    def setup_model_and_optimizer(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
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
            from megatron_moe_inject.contracts import EVERYTHING
            from megatron_moe_inject.host.wrap_list import render_in_place

            objects = [*compat.bare_chunks(built[0]), built[1]]
            _print_rank_0(render_in_place(objects, EVERYTHING))
            _leave()
        return built

    def around(self, name: str, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """A function that features' parts may stand around."""
        if self._run is None:
            return stock(*args, **kwargs)
        return self._run.call(name, stock, *args, **kwargs)

    def build_data_iterators(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            _refuse_bypass()
        iterators = self.around("build_train_valid_test_data_iterators", stock, *args, **kwargs)
        if self._run is not None:
            self._run.splits.register(*iterators)
        return iterators

    def get_forward_backward_func(self, stock: Callable, *args: Any, **kwargs: Any) -> Callable:
        forward_backward = stock(*args, **kwargs)
        if self._run is None:
            return forward_backward
        hook = self._run.step_hook
        assert hook is not None, "a schedule is asked for once the student is built"
        return hook.wrap(forward_backward)

    def train(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return stock(*args, **kwargs)
        run.begin_training()

        @functools.wraps(stock)
        def training(*args: Any, **kwargs: Any) -> Any:
            try:
                return stock(*args, **kwargs)
            except SystemExit:  # --exit-interval and the like leave so, with everything saved
                _finish(run)
                raise

        return run.call("train", training, *args, **kwargs)


def _refuse_bypass() -> None:
    """Ends a job that asks for the plugin and trains by a ``pretrain()`` that is not wrapped.

    Its script bound Megatron's name before ``install()``: flags are read, and nothing else is done.
    """
    from megatron.training import get_args

    from megatron_moe_inject.host import failure
    from megatron_moe_inject.host.meeting import Meeting
    from megatron_moe_inject.recipe.flags import recipe_from_args

    options = get_args()
    if recipe_from_args(options) is not None:
        message = (
            "--inject-*: this script took pretrain() from megatron.training before "
            "megatron_moe_inject.install() was called, so that it would train without the recipe; "
            "call it above the script's first import of megatron.training"
        )
        failure.end(message, Meeting.of_job(options))


def _finish(run: Run) -> None:
    """What is left to do when all is saved, so that its failure costs no checkpoint."""
    for message in run.finish():
        _print_rank_0(message)


def _print_rank_0(text: str | None) -> None:
    import torch.distributed as dist

    if text is not None and dist.get_rank() == 0:
        print(text, flush=True)


def _leave() -> NoReturn:
    """End this process; every rank comes here, before or after process groups exist."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(0)
