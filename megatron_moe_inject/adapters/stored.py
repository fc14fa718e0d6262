"""What a checkpoint says of its adapters, in Megatron's own stored arguments.

The factors are tensors of the checkpoint; which entry they are of stands in their keys. What they
are scaled by, and which model they change, is kept here.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.run_arguments import stored_argument
from megatron_moe_inject.host.stored_adapters import ARGUMENT, VERSION
from megatron_moe_inject.recipe.run_part import RunContext


class Stored:
    """The adapters of one run as its checkpoints describe them.

    Attributes:
        entries: what stands beside the model by position among the recipe's sets
            (``Recipe.factor_sets``), in plain values.
        rows: of the vocabulary that train, see ``recipe.adapter.VocabularyRows``; ``None`` without.
        holds: whether the checkpoint at hand, to be loaded or saved, holds adapters.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self.entries: list[dict[str, Any]] = []
        for factors in run.recipe.factor_sets():
            entry = factors.entry
            named = {name: getattr(entry, name) for name in ("targets", "rank", "scaling")}
            self.entries.append({**named, "alpha": entry.numerator, "scale": entry.scale})
            if factors.domain is not None:
                self.entries[-1]["domain"] = factors.domain
        self.rows: list[int] | None = None
        self.holds = False
        self._base: dict[str, Any] = {}

    def prepare(self) -> None:
        """Look into the checkpoint whose training goes on. No collective.

        Raises:
            RecipeError: it holds other adapters, or in other layers, or is of another format.
        """
        args = self._run.args
        if (args.save or args.load) and args.ckpt_format != "torch_dist":
            raise RecipeError(
                f"train.adapters, train.vocabulary_rows: --ckpt-format {args.ckpt_format} cannot "
                "keep them apart from the student's own tensors; use torch_dist"
            )
        folder, stored = stored_argument(args, ARGUMENT)
        if folder is not None and stored is not None:
            remedy = (
                "keep what the run began with, or write a student of its own with moe-inject "
                "merge-adapters and start from that"
            )
            if stored.get("entries") != self.entries:
                raise RecipeError(
                    f"train.adapters: {folder} holds those of {_shown(stored.get('entries'))}, but "
                    f"now {_shown(self.entries)} are asked for; {remedy}"
                )
            pattern = stored_argument(args, "hybrid_layer_pattern")[1]
            if (pattern is None) != (pattern_of(args) is None):
                kinds = ("a GPT model", "a hybrid model")
                raise RecipeError(
                    f"train.adapters: {folder} holds those of {kinds[pattern is not None]}, whose "
                    f"layers are numbered otherwise; {remedy}"
                )
            self.holds, self._base = True, dict(stored.get("base") or {})
            rows = stored.get("vocabulary_rows")
            self.rows = None if rows is None else list(rows["ids"])
        self._describe()

    def choose(self, ids: list[int]) -> None:
        """The rows of the vocabulary that train from here on. No collective."""
        self.rows = ids
        self._describe()

    def loaded(self) -> None:
        """What was loaded is the model that they change, unless they were there already."""
        self.holds = True
        if not self._base:
            self._base = asdict(self._run.origin)
        self._describe()

    def _describe(self) -> None:
        rows = None if self.rows is None else {"ids": self.rows}
        described = {"version": VERSION, "base": self._base, "entries": self.entries}
        setattr(self._run.args, ARGUMENT, {**described, "vocabulary_rows": rows})


def _shown(entries: Any) -> str:
    if not entries:
        return "none"
    return " and ".join(
        f"rank {e.get('rank')}, alpha {e.get('alpha')} on {', '.join(e.get('targets', ()))}"
        + (f" of {e['domain']}" if "domain" in e else "")
        for e in entries
    )
