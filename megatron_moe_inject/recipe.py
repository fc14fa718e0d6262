"""The recipe: what is distilled from whom into which experts, and what else trains.

A recipe is a small YAML file (or the plain ``--inject-*`` flags) that becomes one ``Recipe``.
Everything that can be known without the student is checked when it is loaded; what depends on
the student (layers, experts, datasets) is checked by ``student.check_recipe``. Each mistake is
one ``RecipeError`` that names the key, the value and what would be right, because a recipe is
read on every rank of a large job and a stack of frames per rank helps nobody.

Layers are 0-based global decoder layers, as in checkpoint names ``decoder.layers.N``; expert
ids are global. Domain ``i`` of ``domains`` has label ``i``; ``GENERAL`` labels everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_moe_inject import typed
from megatron_moe_inject.recipe_committee import in_words, weights_of
from megatron_moe_inject.recipe_experts import ExpertChoice, parse_experts
from megatron_moe_inject.recipe_retention import Retention
from megatron_moe_inject.recipe_rules import CONFIDENCES, DIVERGENCES, EXPERT_MODES, validate
from megatron_moe_inject.recipe_steering import Steering
from megatron_moe_inject.schedule import Schedule, Weight, ever_positive
from megatron_moe_inject.typed import RecipeError, fail, show_path, suggest

__all__ = [
    "CONFIDENCES",
    "DIVERGENCES",
    "EXPERT_MODES",
    "GENERAL",
    "Domain",
    "EvaluationSpec",
    "ExpertChoice",
    "Features",
    "Objective",
    "Recipe",
    "RecipeError",
    "Retention",
    "Schedule",
    "Steering",
    "TeacherSpec",
    "Train",
    "dump_recipe",
    "load_recipe",
    "located",
    "parse_experts",
    "recipe_from_flags",
    "recipe_from_yaml",
    "validate",
]

GENERAL = -1


@dataclass
class Domain:
    """One body of text with its teacher and its experts.

    Attributes:
        name: appears in logs as ``kd loss/<name>``; letters, digits, ``_`` and ``-``.
        data: entries of the student's data blend, each a 0-based position in the training
            blend or a path prefix exactly as written there.
        teacher: key of ``Recipe.teachers``, or several with weights, whose distributions are mixed;
            None = no distillation here, cross-entropy only.
        committee: how several teachers are weighed: ``fixed``, or at each token also by their
            probability of the ``label`` or of their ``top`` token.
        experts: the experts that this domain's knowledge goes to; YAML also takes their compact
            form, quoted: ``experts: "12:3,40;13:1"``.
        alpha, beta, temperature: override the objective's for this domain.
    """

    name: str = field(metadata={"remedy": "give the domain a name, such as name: code"})
    data: list[int | str] = field(
        metadata={"remedy": "name the blend entries of this domain, such as data: [1]"}
    )
    teacher: str | dict[str, float] | None = None
    experts: ExpertChoice = field(default_factory=ExpertChoice)
    alpha: float | Schedule | None = None
    beta: float | Schedule | None = None
    temperature: float | None = None
    committee: str = "fixed"

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Weight of each of its teachers, summing to 1; empty without a teacher."""
        return weights_of(self.teacher)

    @property
    def taught_by(self) -> str | None:
        """Its teacher or teachers in words."""
        return in_words(self)


@dataclass
class TeacherSpec:
    """Where a teacher comes from and how it runs.

    Attributes:
        source: ``megatron:/dir`` (a ``torch_dist`` checkpoint) or ``hf:/dir`` (a local folder).
        temperature: overrides ``objective.temperature`` for this teacher.
        dtype: ``params`` (the student's parameter type), ``fp32`` or ``bf16``.
        window: micro-batches whose teacher states are kept at once; 0 = the whole step.
        layers: student layer -> teacher layer that it imitates, for ``objective.features``, both
            0-based decoder layers; empty = the layers with experts that its domains chose (all
            layers where none are chosen), each with the teacher's layer at the same relative depth.
        fp8: ``none``, or how a ``megatron`` teacher's layers run in FP8, ``tensorwise`` or
            ``blockwise``, with scales from the values at hand, apart from the student's.
        prefix: what it reads in front of each text: ``auto``, what its own tokenizer puts there,
            ``none``, ``bos``, or ids.
    """

    source: str = field(metadata={"remedy": "write source: megatron:/dir or source: hf:/dir"})
    temperature: float | None = None
    dtype: str = "params"
    window: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    fp8: str = "none"
    prefix: str | list[int] = "auto"

    @property
    def kind(self) -> str:
        """``megatron`` or ``hf``."""
        return self.source.partition(":")[0]

    @property
    def path(self) -> str:
        """The directory behind ``kind:``."""
        return self.source.partition(":")[2]


@dataclass
class Features:
    """Imitation of a teacher's layers on domain tokens, beside its predictions.

    Where the widths differ, a trainable linear projection leads to the teacher's.

    Attributes:
        hidden: weight of the student's hidden states after the layers of ``TeacherSpec.layers``.
        experts: weight of the combined output of the domain's chosen experts in those layers, on
            the tokens that reach one of them.
        loss: one of ``FEATURE_LOSSES``; a term is its mean over the layers.
    """

    hidden: float | Schedule = 0.0
    experts: float | Schedule = 0.0
    loss: str = "normalized"

    def in_use(self) -> list[str]:
        """Names of the terms whose weight is ever above 0."""
        return [name for name in ("hidden", "experts") if ever_positive(getattr(self, name))]


@dataclass
class Objective:
    """L = alpha * T^2 * D(teacher || student) + beta * CE + gamma * R(original).

    A weight is a number or a schedule, ``{points: {0: 0.0, 500: 0.7}, shape: cosine}``.

    Attributes:
        divergence: one of ``DIVERGENCES``.
        temperature: softens both distributions; the loss is scaled by its square.
        alpha: weight of the distillation term on domain tokens that have a teacher.
        beta: weight of cross-entropy on all tokens.
        general_beta: weight of cross-entropy on general tokens; None = beta.
        gamma: weight of KL(original || student) on general tokens, with the model as it was when
            the injection began (where it is kept: ``Retention.originals``).
        ce_share: shortcut for the form c * CE + (1 - c) * T^2 * KL in place of alpha and beta.
        confidence: weighs each token's distillation by the teacher's confidence there, one of
            ``CONFIDENCES``: its probability of the label, or 1 - entropy / log(vocabulary).
        skip_worse: no distillation on tokens whose label the teacher predicts worse than the
            student does.
        jsd_beta, skew: the teacher's weight in the mixture of ``jsd`` and of ``skew_kl``.
        features: imitation of the teacher's layers, see ``Features``.
        retention: cheaper ways to hold what trains to its start, see ``Retention``.
        masked_sum: the script's loss is the sum of the token losses times the loss mask, times one
            number, as Megatron's. A trained output layer then costs no second pass over its logits,
            but a float32 buffer of its size from a micro-batch's forward to its backward pass.
        kernels: what goes through the logits between the matrix products, one of
            ``recipe_rules.KERNELS``: Triton kernels where there are a GPU and Triton, or torch
            operations everywhere.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    alpha: float | Schedule = 1.0
    beta: float | Schedule = 0.0
    general_beta: float | Schedule | None = None
    gamma: float | Schedule = 0.0
    ce_share: float | None = None
    confidence: str = "none"
    skip_worse: bool = False
    jsd_beta: float = 0.5
    skew: float = 0.1
    features: Features = field(default_factory=Features)
    retention: Retention = field(default_factory=Retention)
    masked_sum: bool = True
    kernels: str = "auto"

    def weights(self) -> tuple[Weight, Weight]:
        """alpha and beta, also where ``ce_share`` says them."""
        if self.ce_share is None:
            return self.alpha, self.beta
        return 1 - self.ce_share, self.ce_share


@dataclass
class Train:
    """What trains; everything else stays bitwise as it was.

    Attributes:
        experts: ``selected`` (those of the domains), ``all`` or ``none``.
        router_rows: of each router, the rows of the experts that the domains chose.
        mlp: the MLPs of dense layers. The other names are the model's components.
        layers: 0-based decoder layers that train whole.
        patterns: parameters by name, with shell wildcards, as in
            ``decoder.layers.3.self_attention.*`` or ``*.experts.17.*``. Layers and experts have
            their global numbers; a name is that of ``named_parameters()`` with ``experts.17`` for
            ``experts.local_experts.1`` of the rank that holds expert 17.
        frozen_experts: how experts that do not train are kept: as ``params``, or in ``fp8`` alone,
            one byte a parameter.
        fp8_source: with ``fp8``, where the student was published in FP8 by blocks of 128 x 128,
            ``hf:/dir``; its codes are then taken as they are. None = encoded from what is loaded.
    """

    experts: str = "selected"
    router: bool = False
    router_rows: bool = False
    shared_experts: bool = False
    attention: bool = False
    norms: bool = False
    mlp: bool = False
    embedding: bool = False
    output_layer: bool = False
    layers: list[int] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    frozen_experts: str = "params"
    fp8_source: str | None = None

    def components(self) -> list[str]:
        """Names of the components besides the experts that train."""
        return [name for name, value in asdict(self).items() if value is True]


@dataclass
class EvaluationSpec:
    """Measurement of gain and forgetting while training, on the same held-out text each time, and
    the run's list for ``moe-inject report``.

    Attributes:
        file: where the measurements go, one JSON line each; None =
            ``<save>/inject_evaluation.jsonl``.
        gate: stop before the first step when a teacher predicts the held-out text of one of its
            domains no better than the student does.
    """

    file: str | None = None
    gate: bool = True


@dataclass
class Recipe:
    """The whole recipe. Build one with ``load_recipe``, ``recipe_from_flags`` or directly.

    Attributes:
        general_data: blend entries that belong to no domain. The rest of a blend is general
            without being named; naming helps only where a validation or test blend of its own
            cannot be matched to the training blend.
        mixing: share of the training blend by domain name and ``general``, a number or a schedule;
            what is not named shares the rest. Built into a blend without weights, checked in one
            with weights; by a schedule's mean, whose order of samples is then our own.
        verify_frozen: compare checksums of frozen parameters before and after training.
        evaluation: None = Megatron's own evaluation and nothing else.
    """

    domains: list[Domain] = field(
        metadata={"remedy": "a recipe needs at least one domain with a name and data"}
    )
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    steering: Steering = field(default_factory=Steering)
    mixing: dict[str, float | Schedule] = field(default_factory=dict)
    general_data: list[int | str] = field(default_factory=list)
    verify_frozen: bool = False
    evaluation: EvaluationSpec | None = None
    version: int = 1

    def temperature(self, domain: Domain) -> float:
        """Its own temperature, else its teachers', which is one, else the objective's."""
        teachers = [self.teachers[name].temperature for name in domain.teacher_weights]
        return next(t for t in (domain.temperature, *teachers, self.objective.temperature) if t)

    def alpha(self, domain: Domain) -> Weight:
        """Weight of distillation in a domain; 0 without a teacher."""
        if domain.teacher is None:
            return 0.0
        return self.objective.weights()[0] if domain.alpha is None else domain.alpha

    def beta(self, domain: Domain) -> Weight:
        """Weight of cross-entropy in a domain."""
        return self.objective.weights()[1] if domain.beta is None else domain.beta

    def general_beta(self) -> Weight:
        """Cross-entropy weight on general tokens."""
        own = self.objective.general_beta
        return self.objective.weights()[1] if own is None else own

    def experts_by_layer(self) -> dict[int, list[int]]:
        """Union of all domains' chosen experts: layer -> sorted global ids, layers sorted."""
        union: dict[int, set[int]] = {}
        for domain in self.domains:
            assert domain.experts.profile is None, "resolve_experts comes first"
            for layer, ids in domain.experts.layers.items():
                union.setdefault(layer, set()).update(ids)
        return {layer: sorted(union[layer]) for layer in sorted(union)}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and check a recipe file.

    Args:
        path: a YAML file.
        overrides: ``key=value`` strings in OmegaConf's dotlist grammar, applied in order. A
            value replaces what was there (``teachers.coder.temperature=2``,
            ``domains[0].experts.layers.3=[0,5]``); list indices must exist.

    Raises:
        RecipeError: any mistake; the message begins with the file, or with the override that
            set the offending key.
    """
    overrides = list(overrides)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"--inject-recipe {show_path(path)} cannot be read ({reason}); give a YAML file"
        ) from None
    try:
        return recipe_from_yaml(text, overrides)
    except RecipeError as error:
        raise located(error, path, overrides) from None


def located(error: RecipeError, path: str | Path | None, overrides: Iterable[str]) -> RecipeError:
    """The same error, beginning with the override or else the file that set its key.

    Errors that already begin with a flag or with the file stay as they are.
    """
    if str(error).startswith(("--", f"{path}: ")):
        return error
    culprit = next((o for o in reversed(list(overrides)) if _sets(o, error.key)), None)
    where = f"--inject-set {typed.one_line(culprit)}" if culprit else path
    return error if where is None else RecipeError(f"{where}: {error}", error.key)


def _sets(override: str, key: str | None) -> bool:
    """Whether the override wrote ``key`` or something around it."""
    if not key:
        return False
    ours = _path_parts(override.partition("=")[0])
    theirs = _path_parts(key)
    return theirs[: len(ours)] == ours


def _path_parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", key.strip()) if part]


def recipe_from_yaml(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """``load_recipe`` for text that is already in memory; errors do not name a file."""
    return _finish(_expand_experts(typed.parse_yaml(text)), overrides)


def _finish(plain: dict, overrides: Iterable[str]) -> Recipe:
    for override in overrides:
        key, raw = typed.split_override(override)
        plain = _apply(plain, key, raw, override)
    recipe = typed.build(Recipe, _expand_experts(typed.resolve(plain)))
    validate(recipe)
    return recipe


def _apply(plain: dict, key: str, raw: str, override: str) -> dict:
    parts = _path_parts(key)
    teachers = plain.get("teachers")
    try:
        if parts[0] == "teachers" and len(parts) == 3 and parts[2] != "source":
            known = teachers if isinstance(teachers, dict) else {}
            if parts[1] not in known:
                remedy = suggest(parts[1], known, "teachers")
                raise RecipeError(f"{key}: no teacher {parts[1]!r}; {remedy}", key)
        compact = re.match(r"\s*[0-9]+\s*:", raw)  # YAML would read 12:3 as 12 * 60 + 3
        if parts[-1] == "layers" and compact:
            value: Any = parse_experts(raw, key)
        elif parts[0] == "domains" and parts[2:] == ["experts"] and compact:
            value = {"layers": parse_experts(raw, key)}
        else:
            value = typed.parse_scalar(raw)
        return _expand_experts(typed.update(plain, key, value), later_wins=True)
    except RecipeError as error:
        where = f"--inject-set {typed.one_line(override)}"
        raise RecipeError(f"{where}: {error}", error.key or key) from None


def _expand_experts(plain: dict, later_wins: bool = False) -> dict:
    """Compact expert strings become mappings; with ``later_wins`` keys 3 and "3" are unified."""
    domains = plain.get("domains")
    for i, domain in enumerate(domains if isinstance(domains, list) else []):
        experts = domain.get("experts") if isinstance(domain, dict) else None
        path = f"domains[{i}].experts"
        if _is_compact(experts, path):
            domain["experts"] = {"layers": parse_experts(experts, path)}
        layers = experts.get("layers") if isinstance(experts, dict) else None
        if _is_compact(layers, f"{path}.layers"):
            experts["layers"] = parse_experts(layers, f"{path}.layers")
        elif isinstance(layers, dict) and later_wins:
            experts["layers"] = {
                int(k) if isinstance(k, str) and re.fullmatch("[0-9]{1,9}", k) else k: v
                for k, v in layers.items()
            }
    return plain


def _is_compact(value: Any, key: str) -> bool:
    """Whether a value is experts in compact form, whatever is wrong in it."""
    if type(value) is int:  # YAML 1.1 reads 12:3 as 12 * 60 + 3
        raise fail(key, value, "is not a mapping", 'quote the compact form, as in "12:3"')
    return isinstance(value, str) and "${" not in value


def dump_recipe(recipe: Recipe) -> str:
    """YAML that ``load_recipe`` reads back to an equal recipe; every field is written."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(recipe)))


def recipe_from_flags(
    *,
    data: list[int | str],
    experts: str | None = None,
    teacher: str | None = None,
    name: str = "domain",
    router: bool = False,
    overrides: Iterable[str] = (),
    **objective: Any,
) -> Recipe:
    """The recipe of the plain flags: one domain, at most one teacher.

    Args:
        data: blend entries of the domain.
        experts: compact form ``"12:3,40;13:1"``; None trains no experts (router only).
        teacher: ``megatron:/dir`` or ``hf:/dir``; None = cross-entropy only.
        overrides: as for ``load_recipe``.
        objective: fields of ``Objective``; absent ones take its defaults.

    Raises:
        RecipeError: any mistake, named by the recipe's keys.
    """
    plain = {
        "domains": [
            {
                "name": name,
                "data": data,
                "teacher": None if teacher is None else "teacher",
                "experts": {
                    "layers": parse_experts(experts, "domains[0].experts.layers")
                    if experts is not None
                    else {}
                },
            }
        ],
        "teachers": {} if teacher is None else {"teacher": {"source": teacher}},
        "objective": objective,
        "train": {"experts": "none" if experts is None else "selected", "router": router},
    }
    return _finish(plain, overrides)
