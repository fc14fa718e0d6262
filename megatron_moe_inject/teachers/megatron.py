"""A GPT or hybrid model from a Megatron ``torch_dist`` checkpoint as a teacher.

``megatron_model`` builds it whole on this rank, of groups that hold this rank alone, so that only
the ranks that want a teacher load one, inside a job of any layout. Of a mixture of experts each of
several ranks may hold some (``expert_parallel``).

Every parameter is NaN before the checkpoint is read and must be finite afterwards, and the
checkpoint may hold no model tensor that the built model does not have: a teacher is either the
model that was trained or an error.

Trust: see ``torch_dist``; a teacher checkpoint must be trusted like the student's own.

Shapes: n sequences, s sequence length, h_t teacher hidden, v vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
)
from megatron_moe_inject.host.hybrid_seam import takes_output_processor
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.megatron_types import Chunk, MegatronModule
from megatron_moe_inject.host.norm_names import other_name, stored_name
from megatron_moe_inject.host.open_door import refuse_half_open
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.torch_dist import Piece, TorchDistCheckpoint, iteration_folder
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers import megatron_args, vocabulary
from megatron_moe_inject.teachers.base import (
    RoutedExperts,
    Source,
    Teacher,
    TeacherInfo,
    padded_rows,
)
from megatron_moe_inject.teachers.expert_parallel import ExpertRanks
from megatron_moe_inject.teachers.expert_rows import fill_up_experts
from megatron_moe_inject.teachers.fp8 import LENGTH_MULTIPLE, fp8_context
from megatron_moe_inject.teachers.megatron_model import build, sharded_state_dict
from megatron_moe_inject.teachers.prefix import resolved_prefix
from megatron_moe_inject.teachers.sources import SourceKind

EMBEDDING = "embedding.word_embeddings.weight"

_ONE_EXPERT = re.compile(r"(.*\.experts\.experts\.)\d+(\..*)")
_KEY_LAYOUTS: tuple[dict[str, bool], ...] = (
    {},
    {"non_homogeneous_layers": True},
    {"singleton_local_shards": True},
)


class MegatronTeacher(Teacher):
    """See ``base.Teacher``.

    Args:
        name: its key in the recipe.
        model: the loaded model.
        vocab_size: number of ids in use.
        precision: makes the context that its layers run in.
        experts: the ranks that hold its experts together; None holds all here.
    """

    def __init__(
        self,
        name: str,
        model: Chunk,
        vocab_size: int,
        precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        experts: ExpertRanks | None = None,
    ) -> None:
        self.name = name
        self._experts = experts
        self._precision = precision
        self.hidden_size = model.config.hidden_size
        self.num_layers = len(model.decoder.layers)
        self.vocab_size = vocab_size
        self.logit_transform = LogitTransform(scale=compat.logit_scale(model.config))
        self._model = model
        processor = takes_output_processor(model)
        self._until_the_head = {"output_processor": _keep_hidden_states} if processor else {}
        tied = model.share_embeddings_and_output_weights
        layer = model.embedding.word_embeddings if tied else model.output_layer
        self._head = layer.weight.detach()

    @torch.no_grad()
    def states(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """See ``base.Teacher``. Transformer Engine's causal attention ignores the mask, as it
        does for the student."""
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with untouched_rng(self._head.device), self._after(layers) as by_layer, self._precision():
            states = self._model(tokens, position_ids, attention_mask, **self._until_the_head)
        layer_states = [states, *(by_layer[layer] for layer in layers)]
        return [s.transpose(0, 1).to(self._head.dtype).contiguous() for s in layer_states]

    @contextlib.contextmanager
    def _after(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Inside, the states after each of ``layers`` are kept as ``[s, n, h_t]``."""
        by_layer: dict[int, torch.Tensor] = {}

        def keep(layer: int, module: MegatronModule, inputs: Any, output: Any) -> None:
            by_layer[layer] = output[0] if isinstance(output, tuple) else output

        blocks = self._model.decoder.layers
        handles = [
            blocks[layer].register_forward_hook(functools.partial(keep, layer)) for layer in layers
        ]
        try:
            yield by_layer
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def passes(self, own: int) -> Iterator[None]:
        """See ``base.Teacher``. Where other ranks run more, passes of a few tokens follow."""
        most = own if self._experts is None else self._experts.most(own)
        yield
        tokens = torch.zeros(1, LENGTH_MULTIPLE, dtype=torch.int64, device=self._head.device)
        for _ in range(most - own):
            self.states(tokens)

    def head_weight(self, start: int, stop: int) -> torch.Tensor:
        """See ``base.Teacher``."""
        return padded_rows(self._head, self.vocab_size, start, stop)


def _keep_hidden_states(*, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """``output_processor`` of ``GPTModel``: the ``[s, n, h_t]`` states instead of logits."""
    return hidden_states


def check(
    source: Source, student: vocabulary.Vocabulary, prefix: str | Sequence[int]
) -> TeacherInfo:
    """What the checkpoint says about itself; see ``teachers.check_teacher``."""
    checkpoint = _opened(source)
    args = checkpoint.args
    megatron_args.refuse_unsupported(source, args)
    rows = _rows(checkpoint)
    teacher_vocabulary = _vocabulary(source, checkpoint, rows)
    kind = getattr(args, "position_embedding_type", None)
    learned, rotary = kind == "learned_absolute", kind == "rope"
    sizes = [tensor.size.numel() for key, tensor in checkpoint.tensors.items() if _is_own(key)]
    iteration = checkpoint.common.get("iteration", checkpoint.folder.name)
    shared = vocabulary.check_vocabulary(student, teacher_vocabulary, source)
    flags = vocabulary.TokenizerFlags.from_args(args)
    front, prefix_origin = resolved_prefix(
        source,
        prefix,
        files=flags.files(checkpoint.folder / "tokenizer"),
        ids=teacher_vocabulary.ids,
        rows=rows,
        adds=not getattr(args, "tokenizer_hf_no_include_special_tokens", False),
    )
    positions = getattr(args, "max_position_embeddings", None)
    return TeacherInfo(
        name=source.name,
        source=source.text,
        kind=source.kind,
        path=str(checkpoint.folder),
        architecture="GPTModel" if pattern_of(args) is None else "HybridModel",
        num_layers=megatron_args.number_of_layers(args),
        hidden_size=args.hidden_size,
        vocab_rows=rows,
        vocab_size=teacher_vocabulary.size or rows,
        parameters=sum(sizes),
        max_positions=positions if learned else None,
        vocabulary=shared.told,
        config=megatron_args.describe(args) | {"iteration": iteration},
        shared=shared,
        trained_positions=positions if rotary else None,
        prefix=front,
        prefix_told=prefix_origin,
        experts=_routed(checkpoint),
    )


def load(
    source: Source,
    *,
    params_dtype: torch.dtype,
    device: torch.device,
    resets_documents: bool,
    fp8: str = "none",
    experts: ExpertRanks | None = None,
) -> MegatronTeacher:
    """Build the checkpoint's model on ``device`` and fill it; see ``teachers.load_teacher``.

    Positions and masks are Megatron's own, which layers with a state do not look at.

    Collectives: with ``experts`` that of ``ExpertRanks.agree_loaded``.
    """
    if experts is None:
        return _loaded(source, params_dtype, device, resets_documents, fp8, None)
    teacher, error = None, None
    try:
        teacher = _loaded(source, params_dtype, device, resets_documents, fp8, experts)
    except RecipeError as failure:
        error = failure
    experts.agree_loaded(error)
    assert teacher is not None, "what failed was raised"
    return teacher


def _loaded(
    source: Source,
    params_dtype: torch.dtype,
    device: torch.device,
    resets_documents: bool,
    fp8: str,
    experts: ExpertRanks | None,
) -> MegatronTeacher:
    """The teacher; no collective."""
    checkpoint = _opened(source)
    precision = fp8_context(source, checkpoint.args, fp8, device)
    megatron_args.refuse_unsupported(source, checkpoint.args)
    if resets_documents:
        megatron_args.refuse_states_across_documents(source, checkpoint.args)
    rows = _rows(checkpoint)
    on_gpu = device.type == "cuda"
    context = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
    with untouched_rng(device), context:
        group = None if experts is None else experts.group
        model = build(source, checkpoint.args, rows, params_dtype, on_gpu, group)
        model.to(device=device, dtype=params_dtype).eval().requires_grad_(False)
        for _, bias in _expert_biases(model):
            bias.data = bias.data.float()  # as routers keep it, whatever the parameters are
        _fill(checkpoint, model)
    if fp8 != "none":
        fill_up_experts(model, LENGTH_MULTIPLE)
    size = _vocabulary(source, checkpoint, rows).size or rows
    return MegatronTeacher(source.name, model, size, precision, experts)


def _opened(source: Source) -> TorchDistCheckpoint:
    """The checkpoint; RecipeError where adapters beside its weights would be left out."""
    checkpoint = TorchDistCheckpoint.open(source)
    refuse_adapters(checkpoint.tensors, source.error)
    refuse_half_open(checkpoint, source.error)
    return checkpoint


def _is_own(key: str) -> bool:
    """Whether a stored tensor belongs to the decoder rather than to multi-token prediction."""
    return not key.startswith("mtp.")


def _rows(checkpoint: TorchDistCheckpoint) -> int:
    """Rows of the embedding, padding included."""
    tensors = checkpoint.tensors
    if EMBEDDING not in tensors:
        raise checkpoint.source.error(
            f"holds no {EMBEDDING} but {listing(tensors, 4) or 'no model at all'}",
            "use a checkpoint of a GPT or hybrid model that Megatron's training loop saved",
        )
    return tensors[EMBEDDING].size[0]


def _routed(checkpoint: TorchDistCheckpoint) -> RoutedExperts | None:
    number = megatron_args.number_of_experts(checkpoint.args)
    if not number:
        return None
    tensors = checkpoint.tensors.items()
    sizes = [t.size.numel() for key, t in tensors if ".experts." in key and _is_own(key)]
    return RoutedExperts(number, checkpoint.args.moe_router_topk, sum(sizes))


def _expert_biases(model: Chunk) -> list[tuple[str, torch.Tensor]]:
    """What routers add to scores before they choose, by name."""
    return [(name, b) for name, b in model.named_buffers() if name.endswith(".expert_bias")]


def _vocabulary(
    source: Source, checkpoint: TorchDistCheckpoint, rows: int
) -> vocabulary.Vocabulary:
    flags = vocabulary.TokenizerFlags.from_args(checkpoint.args)
    teacher_vocabulary = dataclasses.replace(
        flags.vocabulary(checkpoint.folder / "tokenizer"), rows=rows
    )
    remedy = "its tokenizer files were replaced since it was trained"
    return vocabulary.within_rows(teacher_vocabulary, source, remedy)


def tokenizer_files(source: Source) -> Path | None:
    """The folder or file of the tokenizer that the checkpoint was trained with."""
    checkpoint = _opened(source)
    flags = vocabulary.TokenizerFlags.from_args(checkpoint.args)
    return flags.files(checkpoint.folder / "tokenizer")


def _fill(checkpoint: TorchDistCheckpoint, model: Chunk) -> None:
    """Read every parameter of ``model`` from the checkpoint and prove that it was read."""
    source = checkpoint.source
    values = [*model.named_parameters(), *_expert_biases(model)]
    with torch.no_grad():
        for _, value in values:
            value.fill_(float("nan"))
    stored = {key: tuple(t.size) for key, t in checkpoint.tensors.items() if _is_own(key)}
    pieces = [
        piece._replace(key=stored_name(piece.key, stored))
        for piece in _best_pieces(model, checkpoint, stored)
    ]
    wanted = {piece.key: tuple(piece.global_shape) for piece in pieces}
    missing = sorted(wanted.keys() - stored.keys())
    known = {*wanted, *_of_other_ranks(checkpoint, wanted)}
    unexpected = sorted(n for n in stored if n not in known and other_name(n) not in known)
    if missing or unexpected:
        parts = [f"lacks {listing(missing, 4)}"] if missing else []
        parts += [f"holds {listing(unexpected, 4)} besides"] if unexpected else []
        raise source.error(
            f"does not hold the model that its arguments describe: it {' and '.join(parts)}",
            "use a checkpoint of a stock GPT or hybrid model",
        )
    for key, shape in wanted.items():
        if stored[key] != shape:
            raise source.error(
                f"holds {key} of shape {list(stored[key])} where its arguments ask for "
                f"{list(shape)}",
                "its arguments do not belong to its weights",
            )
    checkpoint.read(pieces)
    bad = [name for name, value in values if not torch.isfinite(value).all()]
    if bad:
        raise source.error(
            f"leaves weights missing or not finite: {listing(bad, 4)}",
            "the checkpoint is damaged or its training diverged; name another iteration",
        )


def _of_other_ranks(checkpoint: TorchDistCheckpoint, wanted: Iterable[str]) -> list[str]:
    """Names of experts that other ranks hold, where each expert is stored by itself."""
    number = megatron_args.number_of_experts(checkpoint.args)
    parts = (_ONE_EXPERT.fullmatch(name) for name in wanted)
    return [f"{part[1]}{expert}{part[2]}" for part in parts if part for expert in range(number)]


def _best_pieces(
    model: Chunk, checkpoint: TorchDistCheckpoint, stored: dict[str, tuple[int, ...]]
) -> list[Piece]:
    """The model's pieces under the naming that the checkpoint was written with.

    Megatron stores layers stacked or one by one, and gated MLPs whole or as halves; newer
    checkpoints say which, older ones are recognised by their names.
    """
    content = checkpoint.common.get("content_metadata") or {}
    candidates = [_pieces(model, layout) for layout in (content, *_KEY_LAYOUTS)]
    return max(candidates, key=lambda pieces: len({p.key for p in pieces} & stored.keys()))


def _pieces(model: Chunk, layout: dict[str, Any]) -> list[Piece]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = sharded_state_dict(model, layout)
    apply_factories(sharded)
    return [
        Piece(value.key, tuple(value.global_shape), tuple(value.global_offset), value.data)
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor)
    ]


def source_kind() -> SourceKind:
    """``megatron:/dir``: a ``torch_dist`` checkpoint of a GPT or hybrid model."""
    return SourceKind(
        "megatron:/dir",
        check,
        load,
        folder=iteration_folder,
        takes_fp8=True,
        takes_ep=True,
        tokenizer=tokenizer_files,
    )
