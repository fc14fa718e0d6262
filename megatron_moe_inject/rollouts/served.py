"""Servers write: vLLM or SGLang with a copy of a saved student, over HTTP. Needs no torch.

Prompts are sent as ids and completions are taken as ids, so that no tokenizer stands between. Each
prompt has a seed of its own, and every setting of sampling is sent, since servers take what a
request leaves out from the model's ``generation_config.json``. A completion comes with the
log-probability of each of its tokens, which training compares with its own. A server that fails is
left for another, or asked again, until patience ends; files that are whole by then stay, and the
same command goes on behind them. That servers have the checkpoint that is named is for who starts
them to see to; a larger vocabulary is found out at once.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.rollouts.file_format import Tokenize
from megatron_moe_inject.rollouts.parts import (
    Completion,
    missing,
    parts_of,
    say_begin,
    say_done,
    write_part,
)
from megatron_moe_inject.rollouts.prompts import FLAG, Prompt, checksum, read_prompts
from megatron_moe_inject.rollouts.settings import Asked, Sampling, told
from megatron_moe_inject.teachers.served.address import (
    Address,
    holds_credentials,
    parse_addresses,
)
from megatron_moe_inject.teachers.served.client import Connection, Fault, api_key

_FLAG = "--server"
_PATIENCE = 5
"""Times that a text is asked for, over all servers, before the command ends."""
_MOST_WAIT = 30.0
_NEUTRAL = {
    "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "n": 1,
}  # fmt: skip
"""What a model's ``generation_config.json`` would set, and a student's own distribution has not."""


@dataclass(frozen=True)
class At:
    """Which servers, and how they are asked.

    Attributes:
        servers: URLs with commas between them.
        model: its name there; None = the only one.
        protocol: ``vllm``, ``sglang`` or ``auto``.
        timeout: seconds for one text.
        key_from: environment variable with the API key.
        tokenizer: Hugging Face folder, for prompts that are text.
    """

    servers: str
    model: str | None = None
    protocol: str = "auto"
    timeout: float = 300.0
    key_from: str | None = None
    tokenizer: Path | None = None

    def addresses(self) -> list[Address]:
        """Raises ``RecipeError`` for a URL that is none."""
        if holds_credentials(self.servers):
            raise fail(
                _FLAG, "(not shown)", "holds credentials in a URL",
                "put a key into an environment variable, and name it with --key-from",
            )  # fmt: skip
        return parse_addresses(
            self.servers, lambda problem, remedy: fail(_FLAG, self.servers, problem, remedy)
        )


def write_at_servers(asked: Asked, at: At) -> str:
    """Write all files that are not there; what to print.

    Raises:
        RecipeError: servers, prompts, checkpoint or files are not as they must be.
    """
    from megatron_moe_inject.rollouts.identity import vocabulary_of, writer_of_folder

    begin = time.monotonic()
    addresses, key = at.addresses(), api_key(at.key_from, "--key-from")
    if not 0 < at.timeout < 1e6:
        raise fail("--timeout", at.timeout, "is no time", "write seconds")
    prompts = read_prompts(asked, _tokenize(at.tokenizer), None)
    assert asked.checkpoint is not None, "the command asks for it"
    writer = writer_of_folder(asked.checkpoint, asked.step)
    servers = _Servers(
        addresses, at, key, asked.sampling, vocabulary_of(asked.checkpoint, asked.step)
    )
    servers.check(prompts)
    settings = told(asked, checksum(prompts), servers.protocol)
    parts = parts_of(asked.folder, prompts, asked.per_file, writer, settings)
    todo = missing(parts, writer)
    say_begin(todo, parts)
    tokens, surprise = 0, 0.0
    workers = max(1, asked.batch * len(addresses))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        texts = {place: pool.map(servers.complete, parts[place].prompts) for place in todo}
        try:
            for done, place in enumerate(todo, 1):
                completions = list(texts.pop(place))
                tokens += sum(len(completion.ids) for completion in completions)
                surprise -= sum(sum(completion.log_probs or ()) for completion in completions)
                write_part(parts[place], completions, writer, settings)
                say_done(done, len(todo), time.monotonic() - begin)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    there = len(parts) - len(todo)
    earlier = f", {there} were there" if there else ""
    return (
        f"rollouts: {len(todo)} files written to {asked.folder}{earlier}; {len(prompts)} prompts, "
        f"iteration {writer.iteration}, {tokens:,} tokens in {time.monotonic() - begin:.1f} s"
        + (f", mean log-probability {-surprise / tokens:.3f}" if tokens else "")
    )


def _tokenize(folder: Path | None) -> Tokenize | None:
    if folder is None:
        return None
    from megatron_moe_inject.data.document_ids import load_tokenizer

    tokenizer = load_tokenizer("--tokenizer", folder)
    # As Megatron's tokenizer: training text has no other special tokens than those in it.
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Servers:
    """All of them; each thread has connections of its own."""

    def __init__(
        self,
        addresses: Sequence[Address],
        at: At,
        key: str | None,
        sampling: Sampling,
        vocabulary: int | None,
    ) -> None:
        self._addresses, self._timeout, self._key = addresses, at.timeout, key
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._rooms: dict[Address, int] = {}
        self._local = threading.local()
        found = [self._what(address, at) for address in addresses]
        if len(set(found)) > 1:
            raise RecipeError(
                f"{_FLAG}: {addresses[0]} has {found[0][1]} ({found[0][0]}), and another server "
                f"{next(f for f in found if f != found[0])[1]}; name servers of one model"
            )
        self.protocol, self._model = found[0]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ``RecipeError`` for a prompt that leaves no room in a server's context."""
        for address, room in self._rooms.items():
            long = next((prompt for prompt in prompts if len(prompt.ids) >= room), None)
            if long is not None:
                raise RecipeError(
                    f"{FLAG}: the prompt of document or line {long.source} has {len(long.ids)} "
                    f"tokens, which leaves none of the {room} of {address} (max_model_len); "
                    "shorten it (--prompt-tokens), or start the server with more"
                )

    def _most(self, prompt: Prompt) -> int:
        """Tokens that a completion may have, the same whichever server writes it."""
        room = min(self._rooms.values(), default=None)
        most = self._sampling.max_tokens
        return most if room is None else min(most, room - len(prompt.ids))

    def _connection(self, address: Address) -> Connection:
        known: dict[Address, Connection] = self._local.__dict__.setdefault("known", {})
        if address not in known:
            known[address] = Connection(address, self._timeout, self._key)
        return known[address]

    def _what(self, address: Address, at: At) -> tuple[str, str]:
        """Protocol and model of a server, by what it says of itself."""
        try:
            cards = self._connection(address).get("/v1/models")["data"]
            names = [str(card["id"]) for card in cards]
            owners = {str(card.get("owned_by")) for card in cards}
            rooms = {str(card["id"]): card.get("max_model_len") for card in cards}
        except Fault as fault:
            raise RecipeError(f"{_FLAG}: {address} {fault}; start it, or name another") from None
        except (TypeError, KeyError, AttributeError):
            raise RecipeError(
                f"{_FLAG}: {address} does not say what models it has (/v1/models); name a server "
                "of vLLM or SGLang"
            ) from None
        protocol = at.protocol
        if protocol == "auto":
            known = owners & set(_PROTOCOLS)
            if len(known) != 1:
                raise RecipeError(
                    f"{_FLAG}: {address} says neither that it is vLLM nor that it is SGLang; write "
                    "--protocol"
                )
            protocol = known.pop()
        if at.model is None and len(names) != 1:
            raise RecipeError(
                f"{_FLAG}: {address} has {listing(names) or 'no model'}; name one with --model"
            )
        if at.model is not None and at.model not in names:
            raise fail(
                "--model", at.model, f"is not at {address}", f"it has {listing(names) or 'none'}"
            )
        name = at.model or names[0]
        if isinstance(rooms[name], int):
            self._rooms[address] = rooms[name]
        return protocol, name

    def complete(self, prompt: Prompt) -> Completion:
        """What some server writes behind a prompt.

        Raises:
            RecipeError: none does.
        """
        path, request, answer = _PROTOCOLS[self.protocol]
        most = self._most(prompt)
        body = request(prompt, replace(self._sampling, max_tokens=most), self._model)
        count, problem = len(self._addresses), ""
        for turn in range(_PATIENCE * count):
            address = self._addresses[(prompt.number + turn) % count]
            try:
                found = answer(self._connection(address).post(path, body))
                return _checked(found, most, self._vocabulary)
            except _Unusable as bad:
                raise RecipeError(f"{_FLAG}: {address} sent an answer that {bad}") from None
            except Fault as fault:
                problem = f"{address} {fault}"
                if fault.of_text:
                    break
                if turn % count == count - 1 and turn + 1 < _PATIENCE * count:
                    time.sleep(min(max(fault.wait, 2.0 ** (turn // count)), _MOST_WAIT))
        raise RecipeError(
            f"{_FLAG}: prompt {prompt.number}: {problem}; see to it, and give the same command "
            "again, which goes on behind the files that are whole"
        )


class _Unusable(Exception):
    """The answer is none to be written down; the message is a clause without subject."""


def _seed(sampling: Sampling, number: int) -> int:
    text = f"{sampling.seed}:{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def _vllm_request(prompt: Prompt, sampling: Sampling, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt.ids,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        **_NEUTRAL,
        "seed": _seed(sampling, prompt.number),
        "stop_token_ids": list(sampling.stop),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # no text beside each: a server may have no tokenizer
        "logprobs": 0,
    }


def _vllm_answer(content: Any) -> Completion:
    try:
        (choice,) = content["choices"]
        return Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"])
    except (TypeError, KeyError, ValueError):
        raise _Unusable(
            "has no single choice with token_ids and logprobs; use vLLM 0.10.2 or later"
        ) from None


def _sglang_request(prompt: Prompt, sampling: Sampling, model: str) -> dict[str, Any]:
    return {
        "input_ids": prompt.ids,
        "sampling_params": {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            **_NEUTRAL,
            "stop_token_ids": list(sampling.stop),
            "sampling_seed": _seed(sampling, prompt.number),
        },
        "return_logprob": True,
    }


def _sglang_answer(content: Any) -> Completion:
    try:
        told = content["meta_info"]["output_token_logprobs"]
        return Completion(content["output_ids"], [one[0] for one in told])
    except (TypeError, KeyError, IndexError):
        raise _Unusable(
            "has no output_ids and output_token_logprobs; use a release of SGLang that gives them"
        ) from None


def _checked(found: Completion, most: int, vocabulary: int | None) -> Completion:
    ids, log_probs = found
    whole = isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids)
    if not whole or not 0 < len(ids) <= most:
        raise _Unusable(f"has no 1 to {most} ids, which were asked for")
    if vocabulary is not None and max(ids) >= vocabulary:
        raise _Unusable(
            f"has id {max(ids)}, where the student of --checkpoint has rows for ids below "
            f"{vocabulary}: it serves another model; start it with a copy of that student"
        )
    numbers = isinstance(log_probs, list) and all(
        isinstance(value, int | float) and math.isfinite(value) for value in log_probs
    )
    if log_probs is None or not numbers or len(log_probs) != len(ids):
        raise _Unusable(f"has no log-probability for each of its {len(ids)} ids")
    return found


_PROTOCOLS: Mapping[str, tuple[str, Any, Any]] = {
    "vllm": ("/v1/completions", _vllm_request, _vllm_answer),
    "sglang": ("/generate", _sglang_request, _sglang_answer),
}
"""Where texts are sent to, how they are asked for, and what an answer says."""
