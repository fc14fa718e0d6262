"""What servers are, asked once when a run begins: the protocol, the model, its tokens, its limits.

Every server must have the same model, take the student's longest text and give as many ids as the
recipe asks for. Whether its ids are the student's is seen by a text: both tokenizers must make the
same ids of it; where one has no text (NullTokenizer, a server without tokenizer), only that the
largest id is taken. A short text and what was said of it are kept, by which a server that was gone
is known again.

Nothing runs here but the requests; the first rank does it for all. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moe_inject.host.errors import Failure, RecipeError, listing, show, suggest
from megatron_moe_inject.recipe.server import ServerSpec
from megatron_moe_inject.teachers.served.address import Address
from megatron_moe_inject.teachers.served.client import Connection, Fault
from megatron_moe_inject.teachers.served.pool import SAME_MODEL, log_probs_of_text, mean_gap
from megatron_moe_inject.teachers.served.protocols import PROTOCOLS, Answer, BadAnswer
from megatron_moe_inject.teachers.served.wire import Settings

SHORT = 24
"""Ids of the text by which a model is known."""
TEXT = (
    "The patient's temperature rose to 38.5 °C at 6:30 p.m.; she was given 2 x 500 mg.\n"
    "def area(r):\n    return 3.14159 * r ** 2  # in m²\n"
    "Größe, naïve, señor, Привет, 你好, こんにちは, 🙂 <b>bold</b> \\frac{a}{b} -> 0xFF\t[end]"
)
"""Words, numbers, code and scripts that tokenizers cut in different ways."""

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Probed:
    """What the servers of a teacher are.

    Attributes:
        settings: how they are asked from here on.
        told: one line for the plan.
        longest: ids of a text that all of them take, of a teacher with a tokenizer of its own; None
            where they do not say.
    """

    settings: Settings
    told: str
    longest: int | None = None


@dataclass(frozen=True)
class _Model:
    """What one server says of itself."""

    protocol: str
    name: str
    root: str
    most_tokens: int | None
    version: str


def probe(
    name: str,
    spec: ServerSpec,
    addresses: Sequence[Address],
    key: str | None,
    *,
    length: int,
    vocab_size: int,
    tokenize: Tokenize | None,
    failure: Failure,
    own_files: str | None = None,
) -> Probed:
    """Ask every server what it is, and try it.

    Args:
        name: of the teacher in the recipe.
        spec: how it is asked.
        addresses: the servers.
        key: the API key.
        length: tokens of the longest text; with ``own_files`` of a text to try, if the servers take
            so many.
        vocab_size: ids of the tokenizer whose ids are sent, the student's.
        tokenize: that tokenizer; None for one without text.
        failure: makes the error of what does not fit.
        own_files: where the teacher's own tokenizer is from, if the ids are that's.

    Raises:
        RecipeError: the first thing that does not fit.
    """
    found: list[_Model] = []
    spoken: list[tuple[Answer, np.ndarray]] = []
    words: list[str] = []
    seconds, longest = 0.0, None
    for address in addresses:
        connection = Connection(address, spec.timeout, key)
        tried = _Tried(name, spec, address, connection, failure, own_files)
        try:
            model = tried.model()
            if own_files is None:
                tried.check_length(model, length)
            elif model.most_tokens is not None:
                most = model.most_tokens - (model.protocol == "vllm")
                longest = most if longest is None else min(longest, most)
                length = min(length, most)
            words.append(tried.check_tokens(model, tokenize))
            tokens = _short_text(vocab_size, None if tokenize is None else list(tokenize(TEXT)))
            spoken.append((tried.say(model, tokens), tokens))
            begin = time.monotonic()
            tried.say(model, np.resize(tokens, length))
            seconds = max(seconds, time.monotonic() - begin)
        finally:
            connection.close()
        found.append(model)
    _check_alike(addresses, found, spoken, failure)
    answer, tokens = spoken[0]
    settings = Settings(
        tuple(addresses), found[0].protocol, found[0].name, spec.top, spec.timeout, spec.patience,
        spec.concurrent, spec.key_from, tuple(tokens.tolist()),
        tuple(log_probs_of_text(answer, tokens).tolist()),
    )  # fmt: skip
    told = _told(name, spec, addresses, found[0], words[0], length, seconds)
    return Probed(settings, told, longest)


class _Tried:
    """One server while it is tried; all that fails is an error that names it."""

    def __init__(
        self,
        name: str,
        spec: ServerSpec,
        address: Address,
        connection: Connection,
        fails: Failure,
        own_files: str | None,
    ) -> None:
        self._key = f"teachers.{name}.server"
        self._whose, self._remedy = "the student's", "use a teacher with the student's tokenizer"
        if own_files is not None:
            self._whose = f"the tokenizer in {own_files}"
            self._remedy = f"name the tokenizer of the served model: {self._key}.tokenizer"
        self._spec, self._address, self._connection = spec, address, connection
        self._failure = fails

    def _fails(self, problem: str, remedy: str) -> RecipeError:
        return self._failure(f"{self._address} {problem}", remedy)

    def _error_of(self, fault: Fault) -> RecipeError:
        remedy = "start it, or name another"
        if "HTTP 401" in str(fault) or "HTTP 403" in str(fault):
            remedy = f"name the variable that holds its key: {self._key}.key_from"
        return self._fails(str(fault), remedy)

    def _maybe(self, path: str) -> dict | None:
        """The JSON object at a path; None where the server has none."""
        try:
            value = self._connection.get(path)
        except Fault as fault:
            if "HTTP 404" in str(fault) or fault.of_text:
                return None
            raise self._error_of(fault) from None
        return value if isinstance(value, dict) else None

    def model(self) -> _Model:
        """What it has, by what it says of itself.

        Raises:
            RecipeError: it is neither vLLM nor SGLang, or has another model.
        """
        models = self._maybe("/v1/models") or {}
        cards = [c for c in models.get("data") or () if isinstance(c, dict) and "id" in c]
        owners = {str(card.get("owned_by")) for card in cards}
        protocol, version = self._spec.protocol, ""
        if protocol in ("auto", "vllm") and "sglang" not in owners:
            version = str((self._maybe("/version") or {}).get("version", ""))
            if "vllm" in owners or (version and protocol == "auto"):
                protocol = "vllm"
        if protocol == "auto":
            own = self._maybe("/model_info") or self._maybe("/get_model_info") or {}
            if "sglang" in owners or "model_path" in own:
                protocol = "sglang"
                cards = cards or [{"id": own.get("served_model_name") or own["model_path"]}]
        if protocol == "auto":
            raise self._fails(
                "says neither that it is vLLM nor that it is SGLang (/v1/models, /version, "
                "/model_info)",
                f"write {self._key}.protocol, if it speaks like one of them",
            )
        names = [str(card["id"]) for card in cards]
        wanted = self._spec.model
        if wanted is None and len(names) != 1:
            raise self._fails(
                f"has {listing(names) or 'no models that it names'}",
                f"name one: {self._key}.model",
            )
        wanted = names[0] if wanted is None else wanted
        card = next((c for c in cards if str(c["id"]) == wanted), None)
        if card is None and names:
            raise self._fails(
                f"has no model {show(wanted)}", suggest(wanted, names, f"{self._key}.model")
            )
        card = card or {}
        longest = card.get("max_model_len")
        longest = longest if isinstance(longest, int) else None
        return _Model(protocol, wanted, str(card.get("root") or wanted), longest, version)

    def check_length(self, model: _Model, length: int) -> None:
        """It takes the longest text; vLLM generates a token behind it."""
        needed = length + (model.protocol == "vllm")
        if model.most_tokens is not None and needed > model.most_tokens:
            raise self._fails(
                f"takes {model.most_tokens} tokens, and {needed} are needed (a sample, its last "
                "label, and for vLLM one that it generates)",
                "start it with a larger --max-model-len (SGLang: --context-length), or train on "
                "shorter samples",
            )

    def check_tokens(self, model: _Model, tokenize: Tokenize | None) -> str:
        """Its tokenizer makes the same ids of a text; how that was seen, as a clause."""
        if tokenize is None:
            return "tokens not compared: the student's tokenizer has no text"
        request = {"model": model.name, "prompt": TEXT, "add_special_tokens": False}
        try:
            found = self._connection.post("/tokenize", request).get("tokens")
        except (Fault, AttributeError):
            return "tokens not compared: the server has no /tokenize"
        ours = [int(i) for i in tokenize(TEXT)]
        # A beginning that the student's tokenizer adds, and text does not have, says nothing.
        if not isinstance(found, list) or ours not in (found, ours[:1] + found):
            theirs = found if isinstance(found, list) else []
            at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise self._fails(
                f"has another tokenizer: of a text of {len(TEXT)} characters it makes "
                f"{len(theirs)} ids and {self._whose} {len(ours)}, first other at {at}: "
                f"{theirs[at : at + 3]} against {ours[at : at + 3]}",
                self._remedy,
            )
        whose = "the student's tokenizer" if self._whose == "the student's" else self._whose
        return f"the same {len(found)} ids of a text as {whose}"

    def say(self, model: _Model, tokens: np.ndarray) -> Answer:
        """What it says of a text.

        Raises:
            RecipeError: it does not answer, or not what was asked.
        """
        protocol, top = PROTOCOLS[model.protocol], self._spec.top
        request = protocol.request(tokens, top, model.name)
        try:
            return protocol.answer(self._connection.post(protocol.path, request), tokens, top)
        except BadAnswer as bad:
            remedy = "use a release whose answers this version reads, or another server"
            if "were asked for" in str(bad):
                remedy = f"{protocol.raises_top}, or set {self._key}.top to less"
            raise self._fails(f"sent an answer that {bad}", remedy) from None
        except Fault as fault:
            if not fault.of_text:
                raise self._error_of(fault) from None
            remedy = "see that it has the student's ids and room for its samples"
            if "logprobs" in str(fault):
                remedy = f"{protocol.raises_top}, or set {self._key}.top to less than {top}"
            elif "vocab" in str(fault) or "token id" in str(fault).lower():
                remedy = self._remedy
            raise self._fails(str(fault), remedy) from None


def _short_text(vocab_size: int, tokens: Sequence[int] | None) -> np.ndarray:
    """Ids of a text where there is one, else spread over the vocabulary; the largest is last."""
    ids = np.linspace(0, vocab_size - 1, SHORT).astype(np.int32)
    if tokens is not None:
        ids[: min(len(tokens), SHORT - 1)] = tokens[: SHORT - 1]
    return ids


def _check_alike(
    addresses: Sequence[Address],
    found: Sequence[_Model],
    spoken: Sequence[tuple[Answer, np.ndarray]],
    failure: Failure,
) -> None:
    first = log_probs_of_text(*spoken[0])
    for address, model, answer in zip(addresses, found, spoken, strict=True):
        if (model.protocol, model.name) != (found[0].protocol, found[0].name):
            raise failure(
                f"names servers of {found[0].protocol} with {found[0].name} ({addresses[0]}) and "
                f"of {model.protocol} with {model.name} ({address})",
                "name servers of one kind with one model",
            )
        gap = mean_gap(log_probs_of_text(*answer), first)
        if gap > SAME_MODEL:
            raise failure(
                f"names servers with different models: log-probabilities of one text at {address} "
                f"are {gap:.2f} nats from those at {addresses[0]} in the mean",
                "serve one model at all of them",
            )


def _told(
    name: str,
    spec: ServerSpec,
    addresses: Sequence[Address],
    model: _Model,
    words: str,
    length: int,
    seconds: float,
) -> str:
    kind = {"vllm": "vLLM", "sglang": "SGLang"}[model.protocol]
    kind += f" {model.version}" if model.version else ""
    where = str(addresses[0]) if len(addresses) == 1 else f"{len(addresses)} servers"
    asked = f"{spec.top} ids" if spec.top else "the log-probability"
    root = "" if model.root == model.name else f" ({model.root})"
    return (
        f"teacher {name}: {model.name}{root} at {where}, {kind}; {words}; {asked} of each "
        f"token; one text of {length} tokens took {seconds:.2f} s"
    )
