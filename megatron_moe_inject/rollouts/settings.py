"""What is asked of a student that writes: which prompts, how it samples, where it goes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_moe_inject.host.errors import fail


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: of a completion.
        temperature: 0 = always the most likely token.
        top_p: the most likely tokens that have so much of the probability together, of those that
            ``top_k`` leaves.
        seed: of the draws; each prompt has its own, whatever else is written with it.
        stop: ids that end a completion, which keeps the one that ended it, beside the end of text
            of the model's tokenizer.
        top_k: so many of the most likely tokens alone; 0 = all.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    top_k: int = 0

    def uniforms(self, prompt: int) -> np.ndarray:
        """The draws of a prompt, one for each token that it may get, in [0, 1)."""
        return np.random.default_rng([self.seed, prompt]).random(self.max_tokens)


@dataclass(frozen=True)
class Asked:
    """One command.

    Attributes:
        prompts: prefix of an indexed data set, or a JSON Lines file.
        output: the folder that gets the files.
        prompt_tokens: of a stretch of a document that are a prompt.
        count: prompts at most; None = all.
        documents: the first and the one behind the last that prompts may be of; None = all.
        per_file: texts of a file.
        batch: texts that are written at once, by each data-parallel rank.
        cache: whether keys and values may be kept from one token to the next.
        sampling: how tokens are chosen.
        checkpoint: the folder that training saves to, where another copy of its student writes: a
            merged or exported one; None = what ``--load`` names writes.
        step: its iteration; None = the newest.
    """

    prompts: str
    output: str
    prompt_tokens: int = 32
    count: int | None = None
    documents: tuple[int, int] | None = None
    per_file: int = 64
    batch: int = 16
    cache: bool = True
    sampling: Sampling = field(default_factory=Sampling)
    checkpoint: str | None = None
    step: int | None = None

    def check(self) -> None:
        """Raises ``RecipeError`` for a number that is none."""
        own = self.sampling
        for name, value, least in (
            ("prompt-tokens", self.prompt_tokens, 1),
            ("count", 1 if self.count is None else self.count, 1),
            ("per-file", self.per_file, 1),
            ("batch", self.batch, 1),
            ("max-tokens", own.max_tokens, 1),
            ("seed", own.seed, 0),
            ("top-k", own.top_k, 0),
        ):
            if value < least:
                raise fail(f"--{name}", value, "is too small", f"write {least} or more")
        if not 0 <= own.temperature < 100:
            raise fail("--temperature", own.temperature, "is none", "write 0 or a little more")
        if not 0 < own.top_p <= 1:
            raise fail("--top-p", own.top_p, "is not in (0, 1]", "1 leaves no token out")
        if any(one < 0 for one in own.stop):
            raise fail("--stop", list(own.stop), "has a negative id", "write ids of the tokenizer")
        if self.documents is not None and not 0 <= self.documents[0] < self.documents[1]:
            raise fail(
                "--documents", "{}:{}".format(*self.documents), "is no range",
                "write such as 0:1000",
            )  # fmt: skip

    @property
    def folder(self) -> Path:
        """That gets the files."""
        return Path(self.output)

    def plain(self) -> str:
        """As one line of JSON, for a flag."""
        return json.dumps(asdict(self))

    @classmethod
    def of_plain(cls, text: str) -> Self:
        """Of ``plain``."""
        values = json.loads(text)
        sampling = values.pop("sampling")
        documents = values.pop("documents")
        return cls(
            **values,
            documents=None if documents is None else tuple(documents),
            sampling=Sampling(**sampling | {"stop": tuple(sampling["stop"])}),
        )


def told(asked: Asked, prompts: str, by: str) -> dict[str, Any]:
    """The settings in a file: whoever asks for the same gets the same.

    Args:
        prompts: checksum of all prompts.
        by: what wrote, ``megatron`` or the name of a server's protocol.
    """
    own = asdict(asked.sampling)
    return {**own, "stop": list(own["stop"]), "prompts": prompts, "by": by}


def digest(values: Any) -> str:
    """Eight digits that tell settings apart."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
