"""A local Hugging Face causal language model as a teacher.

Any architecture that ``transformers`` loads by itself: weights from safetensors only, no remote
code, no network. A teacher must satisfy ``logits = hidden @ head.T``; that is checked on a few
random tokens when it is loaded, also with the head's input scaled up, because soft-capping
shows only on large logits.

Shapes: n sequences, s sequence length, h_t teacher hidden, v vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
    show,
)
from megatron_moe_inject.host.files import is_plain_name
from megatron_moe_inject.host.rng import untouched_rng
from megatron_moe_inject.losses.spec import LogitTransform
from megatron_moe_inject.teachers import trained_folder, vocabulary
from megatron_moe_inject.teachers.base import (
    RoutedExperts,
    Source,
    Teacher,
    TeacherInfo,
    padded_rows,
)
from megatron_moe_inject.teachers.prefix import resolved_prefix
from megatron_moe_inject.teachers.sources import Folder, SourceKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)
_INDEX = "model.safetensors.index.json"
_READ_BESIDE = ("*.json", "*.model", "*.txt")
# Config entries that scale the logits, with the power of the value that multiplies them.
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Config entries that say how many routed experts a layer has."""
_SOFTCAP = "final_logit_softcapping"
_PLAIN_LOGITS = "use a teacher whose logits are head @ hidden, scaled or soft-capped"
_PROBE_LOGIT = 256.0


class HuggingFaceTeacher(Teacher):
    """See ``base.Teacher``.

    Args:
        name: its key in the recipe.
        model: the loaded model.
        vocab_size: number of ids in use.
        logit_transform: what it does to head @ hidden.
        resets_documents: whether it takes positions and masks.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        vocab_size: int,
        logit_transform: LogitTransform,
        resets_documents: bool,
    ) -> None:
        self.name = name
        self.logit_transform = logit_transform
        self._resets_documents = resets_documents
        self._base = model.base_model
        self._head = model.get_output_embeddings().weight.detach()
        self.hidden_size = self._head.shape[1]
        self.num_layers = model.config.get_text_config().num_hidden_layers
        self.vocab_size = vocab_size

    @torch.no_grad()
    def states(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """See ``base.Teacher``; positions and masks need ``resets_documents`` at loading."""
        resets = position_ids is not None or attention_mask is not None
        assert self._resets_documents or not resets, "load the teacher with resets_documents"
        inputs: dict[str, Any] = {"input_ids": tokens}
        if position_ids is None and attention_mask is not None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
            # Without a mask, transformers reads restarting positions as packed documents and
            # separates them, which Megatron does only when a mask says so.
            inputs["attention_mask"] = torch.ones_like(tokens)
        if attention_mask is not None:
            inputs["attention_mask"] = self._additive(attention_mask, len(tokens))
        if layers:
            inputs["output_hidden_states"] = True
        with untouched_rng(tokens.device):
            outputs = self._base(**inputs, use_cache=False, return_dict=True)
        # ``hidden_states`` begins with the embedding's.
        layer_states = [
            outputs.last_hidden_state,
            *(outputs.hidden_states[layer + 1] for layer in layers),
        ]
        return [states.to(self._head.dtype).contiguous() for states in layer_states]

    def head_weight(self, start: int, stop: int) -> torch.Tensor:
        """See ``base.Teacher``."""
        return padded_rows(self._head, self.vocab_size, start, stop)

    def _additive(self, forbidden: torch.Tensor, count: int) -> torch.Tensor:
        """Megatron's bool mask as what every attention of ``transformers`` adds to its scores."""
        dtype = self._head.dtype
        mask = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
        mask.masked_fill_(forbidden, torch.finfo(dtype).min)
        return mask.expand(count, -1, -1, -1)


def check(
    source: Source, student: vocabulary.Vocabulary, prefix: str | Sequence[int]
) -> TeacherInfo:
    """What the folder says about itself; see ``teachers.check_teacher``."""
    config = _config(source)
    text = config.get_text_config()
    shapes = _stored_shapes(source)
    teacher_vocabulary = _vocabulary(source, text.vocab_size)
    positions = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_act")
    details = {name: getattr(text, name) for name in names if hasattr(text, name)}
    shared = vocabulary.check_vocabulary(student, teacher_vocabulary, source)
    front, prefix_origin = resolved_prefix(
        source,
        prefix,
        files=trained_folder.tokenizer_folder(source.path),
        ids=teacher_vocabulary.ids,
        rows=text.vocab_size,
    )
    return TeacherInfo(
        name=source.name,
        source=source.text,
        kind=source.kind,
        path=str(source.path),
        architecture=(config.architectures or [type(config).__name__])[0],
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_rows=text.vocab_size,
        vocab_size=teacher_vocabulary.size or text.vocab_size,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        max_positions=None if rotary else positions,
        vocabulary=shared.told,
        config={"model_type": config.model_type, **details},
        shared=shared,
        trained_positions=positions if rotary else None,
        prefix=front,
        prefix_told=prefix_origin,
        experts=_routed(text, shapes),
    )


def _routed(text: Any, shapes: Mapping[str, tuple[int, ...]]) -> RoutedExperts | None:
    number = next((n for n in (getattr(text, name, None) for name in _EXPERTS) if n), 0)
    size = sum(math.prod(shape) for key, shape in shapes.items() if ".experts." in key)
    topk = getattr(text, "num_experts_per_tok", None)
    return RoutedExperts(number, topk, size) if number and topk and size else None


def load(
    source: Source,
    *,
    params_dtype: torch.dtype,
    device: torch.device,
    resets_documents: bool,
    fp8: str = "none",
) -> HuggingFaceTeacher:
    """Load and probe the folder's model on ``device``; see ``teachers.load_teacher``."""
    assert fp8 == "none", "the rules of a recipe refuse it"
    config = _config(source)
    _stored_shapes(source)
    with untouched_rng(device):
        model = _load_model(source, params_dtype)
        model.to(device).eval().requires_grad_(False)
        _check_head(source, model)
        transform = _logit_transform(source, config)
        _check_logits(source, model, transform, device)
        rows = model.get_output_embeddings().weight.shape[0]
        teacher_vocabulary = _vocabulary(source, config.get_text_config().vocab_size)
        ids = min(teacher_vocabulary.size or rows, rows)
        teacher = HuggingFaceTeacher(source.name, model, ids, transform, resets_documents)
        if resets_documents:
            _check_documents(source, model, teacher, device)
    return teacher


def _config(source: Source) -> Any:
    """The folder's config, of an architecture that is a causal language model here."""
    if importlib.util.find_spec("transformers") is None:
        raise source.error("needs the transformers package", "pip install megatron-moe-inject[hf]")
    import transformers

    _refuse_gguf(source)
    trained_folder.check_is_model(source)
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(source.path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise source.error(
            f"has a config that transformers {transformers.__version__} cannot read by itself: "
            f"{_first_line(error)}",
            "use an architecture that transformers ships, or a newer transformers",
        ) from error
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise source.error(
            f"is a {config.model_type} model, which transformers does not load as a causal "
            "language model",
            "use a causal language model",
        )
    trained_folder.check_purpose(source, config)
    if getattr(config, "quantization_config", None) is not None:
        raise source.error(
            "is quantized",
            "use the unquantized model, or load this one with transformers, dequantize() it and "
            "save that",
        )
    _logit_transform(source, config)
    return config


def _refuse_gguf(source: Source) -> None:
    """A folder whose only weights are GGUF files, which llama.cpp and its like quantise."""
    names = sorted(path.name for path in source.path.glob("*.gguf"))
    if not names or any(source.path.glob("*.safetensors")):
        return
    raise source.error(
        f"holds its weights as GGUF ({listing(names, 2)})",
        "dequantise them into another folder OUT: transformers.AutoModelForCausalLM"
        f".from_pretrained(FOLDER, gguf_file={names[0]!r}, dtype='bfloat16').save_pretrained(OUT), "
        "and the same with AutoTokenizer (both need pip install gguf); then name hf:OUT. Better, "
        "use the model that it was quantised from",
    )


def _logit_transform(source: Source, config: Any) -> LogitTransform:
    """What the config says that the model does to its logits; ``_check_logits`` tries it."""
    text, scale = config.get_text_config(), 1.0
    try:
        for name, power in _LOGIT_SCALES.items():
            value = getattr(text, name, None)
            if isinstance(value, (int, float)):
                scale *= float(value) ** power
        return LogitTransform(scale, getattr(text, _SOFTCAP, None))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise source.error(f"has a config that cannot be: {error}", _PLAIN_LOGITS) from error


def _stored_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Shapes by name from the headers of the safetensors files; they must all be whole."""
    index = source.path / _INDEX
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(source, index, error) from error
    for name in names:
        if not is_plain_name(name):
            raise source.error(
                f"names a file {show(name)} in {_INDEX}, which is none of its own",
                "take the model from its source again",
            )
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = source.path / name
        if not path.is_file():
            raise trained_folder.without_safetensors(source, name)
        try:
            with safe_open(path, framework="pt") as file:
                stored = list(file.keys())
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in stored}
        except (OSError, SafetensorError) as error:
            raise _damaged(source, path, error) from error
    trained_folder.check_is_merged(source, shapes)
    return shapes


def _vocabulary(source: Source, rows: int) -> vocabulary.Vocabulary:
    origin = f"tokenizer of {source.path.name}"
    files = trained_folder.tokenizer_folder(source.path)
    teacher_vocabulary = vocabulary.vocabulary_of_files(files, origin=origin, rows=rows)
    remedy = "resize the embedding or restore the tokenizer that it was trained with"
    return vocabulary.within_rows(teacher_vocabulary, source, remedy)


def _load_model(source: Source, params_dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    try:
        with _no_progress_bar():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(source.path),
                dtype=params_dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise source.error(
            f"cannot be loaded: {_first_line(error)}", "check the folder with transformers alone"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise source.error(
            f"lacks weights of {type(model).__name__}: {listing(missing, 4)}",
            "copy the folder again; a head or layer that was never saved cannot teach",
        )
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if mismatched or info.get("error_msgs"):
        problem = listing(mismatched or info["error_msgs"], 4)
        raise source.error(
            f"holds weights that do not fit its config: {problem}",
            "restore the config.json that belongs to the weights",
        )
    if info["unexpected_keys"]:
        _LOG.warning(
            "teacher %s: %s does not use these stored weights: %s",
            source.name,
            type(model).__name__,
            listing(sorted(info["unexpected_keys"]), 4),
        )
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise source.error(
            f"holds weights that are not finite: {listing(bad, 4)}", "use an undamaged model"
        )
    return model


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Every rank would draw its own."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _check_head(source: Source, model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None or model.base_model is model:
        raise source.error(
            f"is a {type(model).__name__}, which has no separate head", _PLAIN_LOGITS
        )
    if getattr(head, "bias", None) is not None:
        raise source.error(f"is a {type(model).__name__}, whose head has a bias", _PLAIN_LOGITS)


@torch.no_grad()
def _check_logits(
    source: Source, model: PreTrainedModel, transform: LogitTransform, device: torch.device
) -> None:
    """Compare the model's logits with ours on a few tokens, also with a larger input."""
    head = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(head.weight.shape[0], (2, 8), generator=generator).to(device)
    hidden = model.base_model(input_ids=tokens, use_cache=False, return_dict=True)
    plain = torch.nn.functional.linear(hidden.last_hidden_state, head.weight).float()
    largest = plain.abs().max().item()
    gain = 2.0 ** math.ceil(math.log2(_PROBE_LOGIT / largest)) if largest > 0 else 1.0
    for factor in (1.0, max(gain, 1.0)):
        with _scaled_input(head, factor) as ran:
            logits = model(input_ids=tokens, use_cache=False, return_dict=True).logits.float()
        if factor != 1.0 and not ran:
            continue
        expected = transform.apply_(factor * plain)
        tolerance = 32 * torch.finfo(head.weight.dtype).eps * expected.abs().max().item()
        error = (logits - expected).abs().max().item()
        if not error <= tolerance:
            raise source.error(
                f"transforms its logits: {type(model).__name__} differs from {transform} of "
                f"head @ hidden by {error:.3g} at logits up to {factor * largest:.3g} (another "
                "soft-capping or scaling, a bias or a projection)",
                _PLAIN_LOGITS,
            )


def _check_documents(
    source: Source, model: PreTrainedModel, teacher: HuggingFaceTeacher, device: torch.device
) -> None:
    """Given the ordinary positions and mask from outside, the states must stay the same."""
    architecture = type(model).__name__
    remedy = "drop --reset-position-ids and --reset-attention-mask, or use another teacher"
    if _has_windowed_layers(model.config):
        raise source.error(
            f"is a {architecture} with sliding-window layers, which take no mask from outside",
            remedy,
        )
    tokens = torch.arange(min(8, teacher.vocab_size), device=device)[None]
    positions = torch.arange(tokens.shape[1], device=device)[None]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=device).triu(1)
    try:
        masked = teacher.hidden_states(tokens, positions, mask[None, None]).float()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise source.error(
            f"is a {architecture}, which takes no positions and mask from outside", remedy
        ) from error
    plain = teacher.hidden_states(tokens).float()
    tolerance = 64 * torch.finfo(teacher.head_weight(0, 0).dtype).eps
    if not (masked - plain).abs().max() <= tolerance * plain.abs().max():
        raise source.error(
            f"is a {architecture}, which reads positions or masks in its own way", remedy
        )


@contextlib.contextmanager
def _scaled_input(head: torch.nn.Module, factor: float) -> Iterator[list[bool]]:
    """Multiply what enters ``head`` by a power of two; the list tells whether it was called."""
    ran: list[bool] = []

    def scale(
        module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        ran.append(True)
        return (inputs[0] * factor, *inputs[1:])

    handle = head.register_forward_pre_hook(scale)
    try:
        yield ran
    finally:
        handle.remove()


def _has_windowed_layers(config: Any) -> bool:
    """Whether some layers see a part of the sequence only, so that no one mask fits them all."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(text, "sliding_window", None) is not None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _damaged(source: Source, path: Path, error: Exception) -> RecipeError:
    return source.error(f"cannot be read at {path}: {_first_line(error)}", "copy it again")


def read_files(folder: Folder) -> list[Path]:
    """What is read of a folder: its shards, and what stands beside them."""
    index = folder.path / _INDEX
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise folder.error(f"cannot be read at {index} ({error})", "copy it again") from None
    files = [folder.path / name for name in names]
    places = dict.fromkeys((folder.path, trained_folder.tokenizer_folder(folder.path)))
    return files + [
        path for place in places for kind in _READ_BESIDE for path in sorted(place.glob(kind))
    ]


def source_kind() -> SourceKind:
    """``hf:/dir``: a folder of any causal language model that ``transformers`` loads."""
    return SourceKind(
        "hf:/dir",
        check,
        load,
        files=read_files,
        tokenizer=lambda source: trained_folder.tokenizer_folder(source.path),
    )
