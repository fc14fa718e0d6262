"""The recipe: what is distilled from whom into which experts, and what else trains.

A recipe is a small YAML file (or the plain ``--inject-*`` flags) that becomes one ``Recipe``.
Everything that can be known without the student is checked when it is loaded; what depends on
the student (layers, experts, datasets) is checked by ``recipe.student.check_recipe``. Each mistake
is one ``RecipeError`` that names the key, the value and what would be right, because a recipe is
read on every rank of a large job and a stack of frames per rank helps nobody.

Layers are 0-based global decoder layers, as in checkpoint names ``decoder.layers.N``, or blocks
of a GPT model (``recipe.layer_numbers``); expert
ids are global. Domain ``i`` of ``domains`` has label ``i``; ``GENERAL`` labels everything else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_moe_inject.losses.kinds import COMMITTEES, CONFIDENCES, KINDS, TAILS
from megatron_moe_inject.recipe.adapter import Adapter, FactorSet, VocabularyRows
from megatron_moe_inject.recipe.committee import in_words, weights_of
from megatron_moe_inject.recipe.expert_choice import ExpertChoice
from megatron_moe_inject.recipe.preference import Preference
from megatron_moe_inject.recipe.schedule import Schedule, Weight, rest
from megatron_moe_inject.recipe.section import Section
from megatron_moe_inject.recipe.server import ServerSpec

KERNELS = ("auto", "torch")
EXPERT_MODES = ("selected", "all", "none")
TEACHER_DTYPES = ("params", "fp32", "bf16")
FP8_SCALINGS = ("blockwise", "tensorwise")
"""Values of ``--fp8-recipe`` whose weights need no history."""
TEACHER_RANKS = ("auto", "last", "pipeline")
TEACHER_FP8 = ("none", *FP8_SCALINGS)
TEACHER_ALIGN = ("none", "chunks")
FROZEN_EXPERTS = ("params", "fp8")
LAYER_NUMBERS = ("gpt", "hybrid")


@dataclass
class Domain:
    """One body of text with its teacher and its experts.

    Attributes:
        name: appears in logs as ``kd loss/<name>``; letters, digits, ``_`` and ``-``.
        data: entries of the student's data blend, each a 0-based position in the training
            blend or a path prefix exactly as written there; besides, ``rollouts:/dir``, a folder
            with text of the student's own, which takes the places of their samples.
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
    committee: str = field(default="fixed", metadata={"choices": COMMITTEES})

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Weight of each of its teachers, summing to 1; empty without a teacher."""
        return weights_of(self.teacher)

    @property
    def taught_by(self) -> str | None:
        """Its teacher or teachers in words."""
        return in_words(self.teacher_weights, self.committee)


@dataclass
class TeacherSpec:
    """Where a teacher comes from and how it runs.

    Attributes:
        source: ``megatron:/dir`` (a ``torch_dist`` checkpoint), ``hf:/dir`` (a local folder),
            ``store:/dir`` (what one of these said, by ``moe-inject store-teacher``) or
            ``server:URL`` (vLLM or SGLang; several URLs, with commas, share the work).
        temperature: overrides ``objective.temperature`` for this teacher.
        dtype: ``params`` (the student's parameter type), ``fp32`` or ``bf16``.
        window: micro-batches whose teacher states are kept at once; 0 = the whole step.
        layers: student layer -> teacher layer that it imitates, for ``imitation``, both
            0-based decoder layers; empty = the layers with experts that its domains chose (all
            layers where none are chosen), each with the teacher's layer at the same relative depth.
        fp8: ``none``, or how a ``megatron`` teacher's layers run in FP8, ``tensorwise`` or
            ``blockwise``, with scales from the values at hand, apart from the student's.
        prefix: what it reads in front of each text: ``auto``, what its own tokenizer puts there,
            ``none``, ``bos``, or ids.
        ranks: which pipeline stages hold it and run it before the step: ``last``, ``pipeline`` (all
            together), or ``auto``: all, if it has no window and leaves the others three quarters of
            what the student leaves of their memory.
        tail: of a ``store`` or ``server``, what becomes of the ids that it does not tell:
            ``bucket`` (one outcome together), ``renormalize`` (nothing), or ``sample``.
        trusted: public keys (Ed25519, 44 characters each), one of which must have signed a
            ``store``; empty = whoever wrote it.
        align: ``none``, it has the student's tokenizer; or ``chunks``: it has one of its own, and
            both are compared by how likely they find the same pieces of text (ALM).
        server: how a ``server`` is asked.
        ep: ranks of a pipeline stage that hold the experts of a ``megatron`` teacher together, each
            its part of them; 1 = every rank holds all. Apart from the student's own.
    """

    source: str = field(metadata={"remedy": "write source: megatron:/dir or source: hf:/dir"})
    temperature: float | None = None
    dtype: str = field(default="params", metadata={"choices": TEACHER_DTYPES})
    window: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    fp8: str = field(default="none", metadata={"choices": TEACHER_FP8})
    prefix: str | list[int] = "auto"
    ranks: str = field(default="auto", metadata={"choices": TEACHER_RANKS})
    tail: str = field(default="bucket", metadata={"choices": TAILS})
    trusted: list[str] = field(default_factory=list)
    align: str = field(default="none", metadata={"choices": TEACHER_ALIGN})
    server: ServerSpec = field(default_factory=ServerSpec)
    ep: int = 1

    @property
    def aligned(self) -> bool:
        """Whether it has a tokenizer of its own."""
        return self.align != "none"

    @property
    def kind(self) -> str:
        """``megatron``, ``hf``, ``store`` or ``server``."""
        return self.source.partition(":")[0]

    @property
    def path(self) -> str:
        """What stands behind ``kind:``, a directory or URLs."""
        return self.source.partition(":")[2]


@dataclass
class Objective:
    """L = alpha * T^2 * D(teacher || student) + beta * CE + gamma * R(original).

    A weight is a number or a schedule, ``{points: {0: 0.0, 500: 0.7}, shape: cosine}``.

    Attributes:
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd`` or ``skew_kl``.
        temperature: softens both distributions; the loss is scaled by its square.
        alpha: weight of the distillation term on domain tokens that have a teacher.
        beta: weight of cross-entropy on all tokens.
        general_beta: weight of cross-entropy on general tokens; None = beta.
        gamma: weight of KL(original || student) on general tokens, with the model as it was when
            the injection began (where it is kept: ``Retention.originals``).
        ce_share: shortcut for the form c * CE + (1 - c) * T^2 * KL in place of alpha and beta.
        confidence: weighs each token's distillation by the teacher's confidence there: ``none``
            (not), ``label`` (its probability of the label) or ``entropy`` (1 - entropy /
            log(vocabulary)).
        skip_worse: no distillation on tokens whose label the teacher predicts worse than the
            student does.
        jsd_beta, skew: the teacher's weight in the mixture of ``jsd`` and of ``skew_kl``.
        masked_sum: the script's loss is the sum of the token losses times the loss mask, times one
            number, as Megatron's. A trained output layer then costs no second pass over its logits,
            but a float32 buffer of its size from a micro-batch's forward to its backward pass.
        kernels: what goes through the logits between the matrix products: ``auto`` (Triton kernels
            where there are a GPU and Triton) or ``torch`` (its operations everywhere).
        preference: of one answer to another, on pairs of answers, see ``Preference``.
    """

    divergence: str = field(default="forward_kl", metadata={"choices": KINDS})
    temperature: float = 1.0
    alpha: float | Schedule = 1.0
    beta: float | Schedule = 0.0
    general_beta: float | Schedule | None = None
    gamma: float | Schedule = 0.0
    ce_share: float | Schedule | None = None
    confidence: str = field(default="none", metadata={"choices": CONFIDENCES})
    skip_worse: bool = False
    jsd_beta: float = 0.5
    skew: float = 0.1
    masked_sum: bool = True
    kernels: str = field(default="auto", metadata={"choices": KERNELS})
    preference: Preference | None = None

    def row_kernels(self) -> str | None:
        """What ``losses.fused_linear_distillation`` calls ``kernels``."""
        return None if self.kernels == "torch" else self.kernels

    def weights(self) -> tuple[Weight, Weight]:
        """alpha and beta, also where ``ce_share`` says them."""
        if self.ce_share is None:
            return self.alpha, self.beta
        return rest(self.ce_share), self.ce_share


@dataclass
class Train:
    """What trains; everything else stays bitwise as it was.

    Attributes:
        experts: ``selected`` (those of the domains), ``all`` or ``none``.
        router_rows: of each router, the rows of the experts that the domains chose.
        everything: the whole student, as stock Megatron trains it: nothing is frozen, so that no
            other key here is written beside it.
        mlp: the MLPs of dense layers. The other names are the model's components.
        mamba: the mixers of Mamba layers, of a hybrid student.
        layers: 0-based decoder layers that train whole.
        patterns: parameters by name, with shell wildcards, as in
            ``decoder.layers.3.self_attention.*`` or ``*.experts.17.*``. Layers and experts have
            their global numbers; a name is that of ``named_parameters()`` with ``experts.17`` for
            ``experts.local_experts.1`` of the rank that holds expert 17.
        adapters: low-rank changes beside matrices that do not train.
        vocabulary_rows: rows of embedding and output layer that train, see ``VocabularyRows``.
        frozen_experts: how experts that do not train are kept: as ``params``, or in ``fp8`` alone,
            one byte a parameter.
        fp8_source: with ``fp8``, where the student was published in FP8 by blocks of 128 x 128,
            ``hf:/dir``; its codes are then taken as they are. None = encoded from what is loaded.
    """

    experts: str = field(default="selected", metadata={"choices": EXPERT_MODES})
    everything: bool = False
    router: bool = False
    router_rows: bool = False
    shared_experts: bool = False
    attention: bool = False
    norms: bool = False
    mlp: bool = False
    mamba: bool = False
    embedding: bool = False
    output_layer: bool = False
    layers: list[int] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    vocabulary_rows: VocabularyRows | None = None
    frozen_experts: str = field(default="params", metadata={"choices": FROZEN_EXPERTS})
    fp8_source: str | None = None

    def components(self) -> list[str]:
        """Names of the components besides the experts that train whole, where they are named."""
        named = asdict(self).items()
        return [name for name, value in named if value is True and name != "everything"]

    @property
    def routers(self) -> bool:
        """Whether routers train whole, or may."""
        return self.everything or self.router or bool(self.layers or self.patterns)

    @property
    def beside(self) -> bool:
        """Whether something trains beside what stays as it is."""
        return bool(self.adapters) or self.vocabulary_rows is not None

    @property
    def whole(self) -> bool:
        """Whether something of the student itself trains."""
        named = [*self.components(), *self.layers, *self.patterns]
        return self.everything or self.experts != "none" or bool(named)


@dataclass
class Recipe:
    """The whole recipe. Build one with ``load_recipe``, ``recipe_from_flags`` or directly.

    Attributes:
        domains: bodies of text, each with its teacher and its experts.
        teachers: by name, where each comes from and how it runs.
        general_data: blend entries that belong to no domain. The rest of a blend is general
            without being named; naming helps only where a validation or test blend of its own
            cannot be matched to the training blend.
        layer_numbers: what the recipe's layers count: ``gpt``, the blocks of a GPT model, or
            ``hybrid``, the layers of ``--hybrid-layer-pattern``; None = the student's own.
        verify_frozen: compare checksums of frozen parameters before and after training.
        sections: by key, those of the features (``recipe.features``) that are not as their
            defaults; ``recipe[section]`` reads one.
        remarks: what is worth telling of how it was written.
    """

    domains: list[Domain] = field(
        metadata={"remedy": "a recipe needs at least one domain with a name and data"}
    )
    teachers: dict[str, TeacherSpec] = field(default_factory=dict)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    general_data: list[int | str] = field(default_factory=list)
    layer_numbers: str | None = field(default=None, metadata={"choices": LAYER_NUMBERS})
    verify_frozen: bool = False
    version: int = 1
    sections: dict[str, Any] = field(default_factory=dict, metadata={"written": False})
    remarks: list[str] = field(default_factory=list, compare=False, metadata={"written": False})

    def __getitem__[T](self, section: Section[T]) -> T:
        """A feature's section, its default where it was not written."""
        return self.sections.get(section.key, section.default())

    def plain(self) -> dict[str, Any]:
        """As it would be written, in plain values."""
        values = asdict(self)
        del values["remarks"]
        return values | values.pop("sections")

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
        beta = self.objective.general_beta
        return self.objective.weights()[1] if beta is None else beta

    def reference_teacher(self) -> str | None:
        """The teacher that pairs of answers are measured against; None where none is."""
        pairs = self.objective.preference
        if pairs is None or pairs.reference != "teacher":
            return None
        return pairs.teacher if pairs.teacher is not None else next(iter(self.teachers), None)

    def experts_by_layer(self) -> dict[int, list[int]]:
        """Union of all domains' chosen experts: layer -> sorted global ids, layers sorted."""
        union: dict[int, set[int]] = {}
        for domain in self.domains:
            assert not domain.experts.undecided, "resolve_experts comes first"
            for layer, ids in domain.experts.layers.items():
                union.setdefault(layer, set()).update(ids)
        return {layer: sorted(union[layer]) for layer in sorted(union)}

    def factor_sets(self) -> list[FactorSet]:
        """The sets of adapters in their order: of each entry one, or with ``by: domain`` one for
        each of its domains, in the order in which they are named."""
        union, labels = self.experts_by_layer(), {d.name: i for i, d in enumerate(self.domains)}
        sets: list[FactorSet] = []
        for number, entry in enumerate(self.train.adapters):
            if entry.by is None:
                sets.append(FactorSet(entry, number, union))
                continue
            for name in entry.domains or labels:
                own = self.domains[labels[name]].experts.layers
                sets.append(FactorSet(entry, number, own, name, labels[name]))
        return sets
