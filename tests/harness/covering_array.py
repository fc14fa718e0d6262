"""The covering array: which features train together, at which layouts. Data, and what is missing.

A set of features is one recipe. Every pair of two features stands in some set, every pair of a
feature and a layout in some row, but those that are refused (``REFUSED``). ``gaps`` finds what is
missing; ``tests/unit/test_array.py`` asks it, ``tests/training/test_array_*.py`` run the rows
(``array_tests.py``). Weights are schedules where they can be, so that each row follows some.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tests.harness import lane
from tests.harness.array_features import (
    ALIGNED,
    EVERYTHING,
    FEATURES,
    HYBRID,
    WITH_EXPERTS,
)
from tests.harness.array_layouts import LAYOUTS, VIRTUAL, Layout
from tests.harness.material import Material
from tests.harness.pairs import data_flags, write_pairs


@dataclass(frozen=True)
class FeatureSet:
    """A recipe by its features.

    Attributes:
        experts: layer -> experts that the domain chose.
        features: names in ``FEATURES``.
        instead: values by dotted path that fields of these features have instead.
        slow_at: layouts at which the main suite leaves it to the slow one.
    """

    experts: Mapping[int, list[int]]
    features: frozenset[str]
    instead: Mapping[str, Any] = field(default_factory=dict)
    slow_at: frozenset[str] = frozenset()

    @property
    def grouped(self) -> bool:
        """Whether its experts are grouped, which takes the script with the stand-in for TE's."""
        return "frozen experts in fp8" in self.features

    @property
    def freezes(self) -> bool:
        """Whether anything is frozen, so that a run can prove that it stayed."""
        return EVERYTHING not in self.features

    @property
    def shared_experts(self) -> bool:
        """Whether its student has shared experts, and so is another than the others' one."""
        return "trained shared experts" in self.features


IMITATED = {"imitated states", "imitated experts"}
TRAINED = {"trained router", "trained head", "trained attention", "trained shared experts"}
_ALWAYS = frozenset(FEATURES) - IMITATED - TRAINED - {
    "store of states", "window", "trained rows", "frozen experts in fp8", "expert retention",
    "adapters", "rollouts", ALIGNED, WITH_EXPERTS, HYBRID, EVERYTHING,
}  # fmt: skip
# A second domain has its share.
_FOR_TWO: Mapping[str, Any] = {"mixing.general": {"points": {0: 0.5, 3: 0.25}}}
_FEW = {1: [2], 2: [0, 3], 3: [3]}
SETS: dict[str, FeatureSet] = {
    # The one whose originals are on the device.
    "router": FeatureSet(
        _FEW,
        _ALWAYS - {"originals on the host"}
        | IMITATED
        | TRAINED
        | {"expert retention", "adapters", "rollouts", WITH_EXPERTS},
        instead={"steering.confidence": "top", "objective.confidence": "entropy"},
        slow_at=frozenset({"full recompute", "per-token loss"}),
    ),
    # Nothing trains on the last of two stages, no expert on the last of two expert ranks.
    "rows": FeatureSet(
        {0: [1], 1: [0, 1]},
        _ALWAYS | {"store of states", "window", "trained rows", "frozen experts in fp8", ALIGNED},
        instead={"domains.0.committee": "top", **_FOR_TWO},
        slow_at=frozenset({"selective recompute", "micro-batches of one"}),
    ),
    # Routers are frozen: nothing trains on the first stage, nor on the first of two expert ranks.
    "nothing first": FeatureSet(
        {2: [3], 3: [3]},
        _ALWAYS - {"divergence", "weighted tokens", "router retention", "pattern"}
        | {"expert retention"},
    ),
    # The other pairs of what excludes each other.
    "router, fp8": FeatureSet(
        _FEW,
        _ALWAYS
        | IMITATED
        | TRAINED
        | {"frozen experts in fp8", "adapters", "rollouts", WITH_EXPERTS},
    ),
    "rows, imitation": FeatureSet(
        _FEW,
        _ALWAYS
        | IMITATED
        | TRAINED - {"trained router"}
        | {"trained rows", "expert retention", "adapters", "rollouts", WITH_EXPERTS},
    ),
    "router, window": FeatureSet(
        _FEW,
        _ALWAYS
        | TRAINED
        | {"store of states", "window", "expert retention", "adapters", ALIGNED, WITH_EXPERTS},
        instead=_FOR_TWO,
    ),
    "rollouts, window": FeatureSet(
        _FEW,
        _ALWAYS - {"router retention"} | {"window", "rollouts", ALIGNED},
        instead=_FOR_TWO,
        slow_at=frozenset({"cp2"}),
    ),
    # The domain's experts are for steering and imitation.
    "everything": FeatureSet(
        _FEW,
        _ALWAYS - {"pattern"}
        | IMITATED
        | {EVERYTHING, "expert retention", "rollouts", WITH_EXPERTS},
        slow_at=frozenset(LAYOUTS) - {"ep2", "pp2-vpp2"},
    ),
    "everything, window": FeatureSet(
        _FEW,
        _ALWAYS - {"pattern"} | {EVERYTHING, "store of states", "window", ALIGNED},
        instead=_FOR_TWO,
        slow_at=frozenset({"cp2"}),
    ),
}
SETS |= {
    "hybrid": replace(
        SETS["router"],
        features=SETS["router"].features | {HYBRID},
        slow_at=frozenset(LAYOUTS) - {"ep2", "tp2-sp", "pp2-vpp2"},
    ),
    "hybrid, rows": replace(SETS["rows"], features=SETS["rows"].features | {HYBRID}),
    "hybrid, everything": replace(
        SETS["everything"], features=SETS["everything"].features | {HYBRID}
    ),
}
ROWS = (
    *itertools.product(LAYOUTS, ("router", "rows")),
    *((layout, "nothing first") for layout in ("ep2", "pp2", "pp2-vpp2", "pp4", "tp2-ep2")),
    ("dp2, distributed optimizer", "router, fp8"),
    ("ep2", "rows, imitation"),
    ("cp2", "router, window"),
    ("cp2", "rollouts, window"),
    *((layout, "hybrid") for layout in LAYOUTS),
    ("pp2", "hybrid, rows"),
    *((layout, "everything") for layout in LAYOUTS),
    ("cp2", "everything, window"),
    ("pp2", "hybrid, everything"),
)
"""Layout and set of each run."""


@dataclass(frozen=True)
class Resumed:
    """A run that is also stopped and resumed.

    Attributes:
        layout, name: of the layout and the set.
        flags: further ones.
        slow: whether the main suite leaves it to the slow one.
    """

    layout: str
    name: str
    flags: tuple[str, ...] = ()
    slow: bool = False


RESUMED = (
    Resumed("pp2", "router"),
    Resumed("pp2-vpp2", "rows"),
    Resumed("ep2", "nothing first"),
    Resumed("pp2-vpp2", "hybrid", slow=True),
    Resumed("ep2, distributed optimizer", "router", ("--bf16",)),
    Resumed("dp2, distributed optimizer", "rows, imitation", ("--bf16",), slow=True),
    Resumed("ep2, distributed optimizer", "everything", ("--bf16",), slow=True),
)


@dataclass(frozen=True)
class Refusal:
    """Why two features do not go together: what the error begins with, and what it says."""

    key: str
    says: str


REFUSED = {
    frozenset({"trained router", "trained rows"}): Refusal(
        "train.router_rows", "stands beside train.router"
    ),
    frozenset({"window", "imitated states"}): Refusal(
        "teachers.coder.window", "splits the step's teacher forward"
    ),
    frozenset({"window", "imitated experts"}): Refusal(
        "teachers.coder.window", "splits the step's teacher forward"
    ),
    frozenset({"store of states", "imitated states"}): Refusal(
        "imitation.hidden", "compares layers, and teacher third"
    ),
    frozenset({"store of states", "imitated experts"}): Refusal(
        "imitation.experts", "compares layers, and teacher third"
    ),
    frozenset({ALIGNED, "imitated states"}): Refusal(
        "imitation.hidden", "compares layers token by token, and teacher other"
    ),
    frozenset({ALIGNED, "imitated experts"}): Refusal(
        "imitation.experts", "compares layers token by token, and teacher other"
    ),
    frozenset({"store of states", "rollouts"}): Refusal(
        "domains[0].teacher", "is a store, which knows nothing of text that is still to be written"
    ),
    frozenset({"frozen experts in fp8", "expert retention"}): Refusal(
        "--fp8-format", "does not let experts run again as they were"
    ),
}
"""Pairs that no run can have. The last is of the student's flag that FP8 needs."""
for _name, _key in {
    "trained router": "router",
    "trained rows": "router_rows",
    "trained head": "embedding",
    "trained attention": "attention",
    "trained shared experts": "shared_experts",
    "pattern": "patterns",
    "adapters": "adapters",
    "frozen experts in fp8": "frozen_experts",
}.items():
    REFUSED[frozenset({EVERYTHING, _name})] = Refusal(
        f"train.{_key}", "stands beside train.everything"
    )


def gaps(
    features: Iterable[str] = FEATURES,
    layouts: Iterable[str] = LAYOUTS,
    sets: Mapping[str, FeatureSet] = SETS,
    rows: Iterable[tuple[str, str]] = ROWS,
    refused: Iterable[frozenset[str]] = REFUSED,
) -> list[tuple[str, str]]:
    """Pairs of features that stand in no row's set, and of a feature and a layout in no row.

    What a hybrid student shows of others' pairs is not counted: a GPT student has rows of its own.
    """
    features, rows, refused = list(features), list(rows), set(refused)

    def shown(pair: tuple[str, str]) -> bool:
        return any(
            set(pair) <= sets[name].features | {layout}
            and (HYBRID in pair or HYBRID not in sets[name].features)
            for layout, name in rows
        )

    pairs = [
        *(p for p in itertools.combinations(features, 2) if frozenset(p) not in refused),
        *itertools.product(features, layouts),
    ]
    return [pair for pair in pairs if not shown(pair)]


def recipe_of(own: FeatureSet, more: Mapping[str, Any] | None = None) -> str:
    """The recipe of a set as YAML, with ``{teacher}``, ``{experts}``, ``{llama}``, ``{other}``,
    ``{rollouts}`` and ``{folder}`` to fill in.

    Args:
        own: the set. The teacher of Hugging Face is the second of a committee, a store the third.
        more: further fields by dotted path.
    """
    weights: Any = {"coder": 0.7, "second": 0.3} if "committee" in own.features else {"coder": 1.0}
    if "store of states" in own.features:
        weights |= {"third": 0.2}
    names = list(weights)
    domain = {"name": "code", "data": [1], "experts": {"layers": dict(own.experts)}}
    domain["teacher"] = weights if len(names) > 1 else "coder"
    tree: dict[str, Any] = {
        "domains": [domain],
        "teachers": {name: {"source": "megatron:{teacher}"} for name in names},
        "objective": {"alpha": 0.0, "beta": 0.3},
    }
    if ALIGNED in own.features:
        prose = {"name": "prose", "data": [3], "teacher": "other", "experts": domain["experts"]}
        tree["domains"].append(prose)
        tree["teachers"]["other"] = {"source": "hf:{other}"}
    for name in sorted(own.features):
        for dotted, value in FEATURES[name].recipe.items():
            _set(tree, dotted, own.instead.get(dotted, value))
    for dotted, value in (more or {}).items():
        _set(tree, dotted, value)
    return yaml.safe_dump(tree, sort_keys=False)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """One field; of a teacher that there is not, nothing."""
    parts = [int(part) if part.isdigit() else part for part in dotted.split(".")]
    if parts[0] == "teachers" and parts[1] not in tree["teachers"]:
        return
    node: Any = tree
    for part in parts[:-1]:
        node = node[part] if isinstance(part, int) else node.setdefault(part, {})
    node[parts[-1]] = value


def flags_of(own: FeatureSet, at: Layout, folder: Path) -> list[str]:
    """Flags of a set at a layout, in a run that may write to ``folder``; ``{tokenizer}`` is left to
    fill in."""
    flags = [flag for name in sorted(own.features) for flag in FEATURES[name].flags]
    own_flags = at.flags
    if HYBRID in own.features:  # whose virtual stages are in the pattern
        own_flags = (
            "--hybrid-layer-pattern",
            at.pattern,
            *(at.flags if at.flags != VIRTUAL else ()),
        )
    return [
        *lane.layout(**at.sizes),
        *(*own_flags, *(at.grouped if own.grouped else ())),
        *(flag.replace("{folder}", str(folder)) for flag in flags),
    ]


def is_slow(layout: str, name: str) -> bool:
    """Whether the main suite leaves a row to the slow one."""
    return LAYOUTS[layout].slow or layout in SETS[name].slow_at


def blend_of(own: FeatureSet, material: Material) -> Sequence[str]:
    """Data flags: shares by a schedule take a blend without weights; pairs are not evaluated on."""
    if "preference" in own.features:
        pairs = material.folder / "pairs"
        if not pairs.with_suffix(".idx").exists():
            write_pairs(pairs)
        prose = [prose_of(material)] if ALIGNED in own.features else []
        return data_flags(material, str(pairs), *prose)
    if "scheduled shares" in own.features:
        return ("--data-path", material.general, material.domain, "--split", "90,5,5")
    return material.blend


def prose_of(material: Material) -> str:
    """A data set like the domain's under another name."""
    prose = material.folder / "prose"
    for suffix in (".bin", ".idx"):
        if not (copied := prose.with_suffix(suffix)).exists():
            shutil.copy(f"{material.domain}{suffix}", copied)
    return str(prose)
