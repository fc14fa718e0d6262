"""The process that plans: it imports Megatron once, and forks for each layout.

    python -m megatron_moe_inject.planning.server

Megatron's globals are made once in a process, and a layout's are of no use to the next, so each
request is answered by a fork. One JSON request a line on stdin (``answer``), one JSON answer a line
on stdout: ``{"plan": ...}`` or ``{"error": ...}``, a mistake in the user's flags.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from typing import Any

import torch

from megatron_moe_inject.host import cpu_lane
from megatron_moe_inject.host.errors import RecipeError, one_line


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Plan one layout in this process, which can plan no other afterwards.

    Args:
        request: ``recipe`` (YAML), ``flags`` and ``gpus``; ``teachers``, ``memory``, ``stock``,
            ``activations`` and ``on_gpus`` as ``plan.JobPlanner`` takes them, where they are not
            its defaults.
    """
    from megatron_moe_inject.planning import job, relaxed
    from megatron_moe_inject.planning.plan import JobPlanner
    from megatron_moe_inject.recipe.load import recipe_from_yaml
    from megatron_moe_inject.recipe.student import student_facts_from_args

    given = job.parse(request["flags"])
    recipe = recipe_from_yaml(request["recipe"])
    facts = student_facts_from_args(given)
    args = job.prepare(given, request["gpus"])
    planner = JobPlanner(
        given,
        args,
        recipe,
        facts,
        request["gpus"],
        infos=_infos(request.get("teachers")),
        memory=request.get("memory"),
        stock=request.get("stock", False),
        activations=request.get("activations", True),
        on_gpus=request.get("on_gpus", True),
    )
    return {"plan": planner.plan(), "steps": args.train_iters, "remarks": relaxed.estimated(given)}


def _infos(teachers: dict[str, Any] | None) -> dict[str, Any] | None:
    """What teachers' files would say, of teachers that are not there."""
    from megatron_moe_inject.teachers.base import RoutedExperts, TeacherInfo

    if teachers is None:
        return None
    infos = {}
    for name, info in teachers.items():
        experts = info.get("experts")
        routed = None if experts is None else RoutedExperts(**experts)
        infos[name] = TeacherInfo(**info | {"experts": routed})
    return infos


def _in_a_fork(request: dict[str, Any]) -> bytes:
    """The answer of a child that does nothing else, as one line."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            line = pipe.read()
        os.waitpid(child, 0)
        return line or b'{"broken": "the planning process ended without an answer"}'
    os.close(reading)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    with os.fdopen(writing, "wb") as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(_line(request))
    os._exit(0)


def _line(request: dict[str, Any]) -> bytes:
    from megatron_moe_inject.planning.job_plan import as_json

    try:
        found = answer(request)
        found["plan"] = as_json(found["plan"])
    except RecipeError as error:
        found = {"error": str(error)}
    except SystemExit as error:
        found = {"error": f"Megatron flags: {one_line(str(error.code), 400)}"}
    except Exception as error:
        found = {"broken": traceback.format_exc()}
        if _from_megatron(error):
            reason = one_line(str(error) or type(error).__name__, 400)
            found = {"error": f"Megatron flags: {reason}"}
    return json.dumps(found).encode()


def _from_megatron(error: Exception) -> bool:
    """Whether Megatron has refused something: its own code has raised it, in its own words."""
    refusals = (AssertionError, ValueError, ImportError, NotImplementedError)
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, refusals) and "/megatron/" in frames[-1].filename


def main() -> None:
    """Answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Megatron prints must not stand among the answers
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu_lane.enable(force=True)
    torch.set_num_threads(1)
    from megatron.training import arguments, training  # noqa: F401

    from megatron_moe_inject.planning import plan  # noqa: F401  what every fork needs

    for line in sys.stdin:
        answers.write(_in_a_fork(json.loads(line)) + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
