"""What vLLM and SGLang are asked, and what is read of their answers. Needs no torch.

A text is a list of ids, which is sent as such, so that no server puts anything in front of it. An
answer has a row for every id but the first: the most likely ids at its place and the id of the text
itself, each with its log-probability at temperature 1. An answer is taken for what was asked only
if it is whole: of as many places, of these ids, with as many of the most likely as were asked for,
and log-probabilities that some distribution can have.

- vLLM: ``POST /v1/completions`` with ``prompt_logprobs``: a list with one JSON object for each
  place, by id, the id of the text among them; ``null`` at the first. -inf is written -9999.
  With 0 of them it is the id of the text alone.
- SGLang: ``POST /generate`` with ``top_logprobs_num``: lists of triples, or, where the server is
  new enough to take ``return_flat_raw_top_logprobs_b64``, the numbers as they are in memory; those
  of the text itself are in a list of their own, the only one with 0. -inf and NaN are written
  ``null``.

vLLM also scores ids that are named beforehand (``prompt_logprob_token_ids``). Which ids of a text
are likely is what a teacher is asked for, so that is of no use here.

Shapes: t ids of a text, k asked for.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_LEAST = -9000.0
"""Log-probabilities below stand for -inf."""
_ROUNDING = 1e-2
"""How much more than 1 the probabilities of a row may be in sum."""


class Answer(NamedTuple):
    """What was said of a text.

    Attributes:
        ids: [t - 1, k + 1] int32, by falling probability; -1 behind the last where there are fewer.
        log_probs: [t - 1, k + 1] float32 at temperature 1, -inf behind the last.
    """

    ids: np.ndarray
    log_probs: np.ndarray


class BadAnswer(Exception):
    """An answer that cannot be taken for what was asked; the message is a clause without
    subject."""


class ServerProtocol(Protocol):
    """How servers of one kind are spoken to.

    Attributes:
        name: in a recipe.
        path: where texts are sent to.
        raises_top: what lets a server give more ids of each token.
    """

    name: str
    path: str
    raises_top: str

    def request(self, tokens: np.ndarray, top: int, model: str) -> dict[str, Any]:
        """The JSON object that asks for the k = ``top`` most likely ids of a text [t]; 0 asks for
        its own ids alone."""
        ...

    def answer(self, content: Any, tokens: np.ndarray, top: int) -> Answer:
        """What the JSON value that came back says.

        Raises:
            BadAnswer: it is not what was asked for.
        """
        ...


class VLLM:
    """vLLM's completions."""

    name = "vllm"
    path = "/v1/completions"
    raises_top = "start it with a larger --max-logprobs"

    def request(self, tokens: np.ndarray, top: int, model: str) -> dict[str, Any]:
        """See ``ServerProtocol``; one token is generated, which is the least that it takes."""
        return {
            "model": model,
            "prompt": tokens.tolist(),
            "prompt_logprobs": top,
            "max_tokens": 1,
            "temperature": 0.0,
            "return_token_ids": True,
        }

    def answer(self, content: Any, tokens: np.ndarray, top: int) -> Answer:
        """See ``ServerProtocol``."""
        try:
            (choice,) = content["choices"]
            rows, read = choice["prompt_logprobs"], choice.get("prompt_token_ids")
        except (TypeError, KeyError, ValueError, AttributeError):
            raise BadAnswer("has no single choice with prompt_logprobs") from None
        _check_text(read, tokens)
        pairs = []
        for row in _rows(rows, len(tokens)):
            if not isinstance(row, dict):
                raise BadAnswer("has a place without an object of ids")
            try:
                pairs.append(([int(i) for i in row], [entry["logprob"] for entry in row.values()]))
            except (TypeError, KeyError, ValueError):
                raise BadAnswer("has an id without a logprob") from None
        return _answer(pairs, tokens, top)


class SGLang:
    """SGLang's own endpoint."""

    name = "sglang"
    path = "/generate"
    raises_top = "ask for fewer"

    def request(self, tokens: np.ndarray, top: int, model: str) -> dict[str, Any]:
        """See ``ServerProtocol``; nothing is generated."""
        asked = {
            "input_ids": tokens.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top,
        }
        flat = ("return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64")
        return {**asked, **dict.fromkeys(flat, True)} if top else asked

    def answer(self, content: Any, tokens: np.ndarray, top: int) -> Answer:
        """See ``ServerProtocol``."""
        try:
            told = content["meta_info"]
            own = told["input_token_logprobs"]
            read = [entry[1] for entry in own]
            values = [entry[0] for entry in own]
        except (TypeError, KeyError, IndexError):
            raise BadAnswer("has no meta_info with input_token_logprobs") from None
        _check_text(read, tokens)
        if top == 0:
            own_pairs = [([int(t)], [v]) for t, v in zip(tokens[1:], values[1:], strict=True)]
            return _answer(own_pairs, tokens, top)
        if "input_top_logprobs_val_flat_b64" in told:
            return _answer_of_arrays(*_flat(told, len(tokens)), values[1:], tokens, top)
        pairs = []
        for row, value, token in zip(
            _rows(told.get("input_top_logprobs"), len(tokens)), values[1:], tokens[1:], strict=True
        ):
            try:
                ids, log_probs = [int(e[1]) for e in row], [e[0] for e in row]
            except (TypeError, IndexError, ValueError):
                raise BadAnswer("has an id without a log-probability") from None
            if int(token) not in ids:
                ids, log_probs = [*ids, int(token)], [*log_probs, value]
            pairs.append((ids, log_probs))
        return _answer(pairs, tokens, top)


PROTOCOLS: Mapping[str, ServerProtocol] = {"vllm": VLLM(), "sglang": SGLang()}


def _check_text(read: Any, tokens: np.ndarray) -> None:
    """The server read these ids; one that does not say which (None) may have."""
    if read is None:
        return
    if not isinstance(read, list) or len(read) != len(tokens):
        count = len(read) if isinstance(read, list) else "no"
        raise BadAnswer(f"is about {count} tokens, where {len(tokens)} were sent")
    if read != tokens.tolist():
        raise BadAnswer("is about other tokens than were sent")


def _rows(rows: Any, length: int) -> Sequence[Any]:
    """The rows of all tokens but the first."""
    if not isinstance(rows, list) or len(rows) != length:
        count = len(rows) if isinstance(rows, list) else "no"
        raise BadAnswer(f"has {count} places for {length} tokens")
    return rows[1:]


def _flat(told: Mapping[str, Any], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [t - 1, n] that were sent as they are in memory."""
    try:
        if told["input_top_logprobs_null_prefix"] != 1:
            raise BadAnswer(f"begins at token {told['input_top_logprobs_null_prefix']}")
        rows, width = told["input_top_logprobs_shape"]
        arrays = []
        for name, kind in (("idx", "int32"), ("val", "float32")):
            if told[f"input_top_logprobs_{name}_flat_b64_dtype"] != kind:
                raise BadAnswer(f"has numbers that are not {kind}")
            content = base64.b64decode(told[f"input_top_logprobs_{name}_flat_b64"], validate=True)
            arrays.append(np.frombuffer(content, np.dtype(kind).newbyteorder("<")))
        ids, log_probs = (array.reshape(rows, width) for array in arrays)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise BadAnswer("has flat log-probabilities that do not fit together") from None
    if rows != length - 1:
        raise BadAnswer(f"has {rows + 1} places for {length} tokens")
    return ids, log_probs


def _numbers(values: Iterable[Any]) -> list[float]:
    """Floats; NaN for ``null``."""
    return [float("nan") if value is None else float(value) for value in values]


def _answer(pairs: Sequence[tuple[list[int], list[Any]]], tokens: np.ndarray, top: int) -> Answer:
    """Of ids and log-probabilities of each place, that of the text among them."""
    ids = np.full((len(pairs), top + 1), -1, np.int64)
    log_probs = np.full((len(pairs), top + 1), -np.inf, np.float32)
    for place, (own, values) in enumerate(pairs):
        if not top <= len(own) <= top + 1:
            raise BadAnswer(f"has {len(own)} ids at a place, where {top} were asked for")
        ids[place, : len(own)] = own
        try:
            log_probs[place, : len(own)] = _numbers(values)
        except (TypeError, ValueError):
            raise BadAnswer("has a log-probability that is no number") from None
    return _checked(ids, log_probs, tokens)


def _answer_of_arrays(
    ids: np.ndarray, log_probs: np.ndarray, values: Sequence[Any], tokens: np.ndarray, top: int
) -> Answer:
    """Of the most likely [t - 1, n], and what the text itself has."""
    if ids.shape[1] != top:
        raise BadAnswer(f"has {ids.shape[1]} ids at a place, where {top} were asked for")
    missing = ~(ids == tokens[1:, None]).any(1)
    own = np.where(missing, tokens[1:], -1)
    try:
        own_values = np.where(missing, np.array(_numbers(values), np.float32), -np.inf)
    except (TypeError, ValueError):
        raise BadAnswer("has a log-probability that is no number") from None
    return _checked(
        np.column_stack([ids.astype(np.int64), own]),
        np.column_stack([log_probs, own_values]).astype(np.float32),
        tokens,
    )


def _checked(ids: np.ndarray, log_probs: np.ndarray, tokens: np.ndarray) -> Answer:
    """In falling order, once it is seen that a distribution can have these."""
    nan = np.isnan(log_probs) & (ids >= 0)
    # JSON has no word for -inf, which is NaN then too, beside numbers. Alone it is NaN.
    if (nan.any(1) & ~np.isfinite(log_probs).any(1)).any():
        raise BadAnswer("has NaN for log-probabilities")
    log_probs = np.where(nan | (log_probs < _LEAST), -np.inf, log_probs)
    if not (ids == tokens[1:, None]).any(1).all():
        raise BadAnswer("does not say how likely the text itself is")
    with np.errstate(over="ignore"):
        mass = np.exp(log_probs.astype(np.float64)).sum(1)
    if not (mass > 0).all() or not (mass <= 1 + _ROUNDING).all():
        raise BadAnswer(
            f"has probabilities of {mass.min():.3g} to {mass.max():.3g} in sum, which are no "
            "log-probabilities at temperature 1 (vLLM: --logprobs-mode raw_logprobs)"
        )
    ids = np.where(np.isfinite(log_probs), ids, -1)
    ordered = np.sort(ids, 1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise BadAnswer("has an id twice at a place")
    order = np.lexsort((ids, -log_probs), axis=1)
    return Answer(
        np.take_along_axis(ids, order, 1).astype(np.int32), np.take_along_axis(log_probs, order, 1)
    )
