"""How a teacher that is served over HTTP is asked: the keys of ``teachers.NAME.server``."""

from __future__ import annotations

from dataclasses import dataclass, field

PROTOCOLS = ("auto", "vllm", "sglang")


@dataclass
class ServerSpec:
    """How servers are asked what a teacher says.

    Attributes:
        protocol: ``vllm``, ``sglang``, or ``auto``: as the servers say themselves.
        model: its name at the servers; None = the only one that they have.
        top: ids of each token; that of the text itself comes besides. vLLM gives at most as many as
            its ``--max-logprobs``.
        timeout: seconds for one answer.
        patience: seconds in which a text that a step waits for is asked for again and again, at all
            servers, until training ends with a checkpoint.
        ahead: steps whose text is asked for ahead.
        concurrent: texts that each server is asked for at once, by each data-parallel rank.
        key_from: name of the environment variable that holds the servers' API key.
        tokenizer: with ``align: chunks``, a folder or file of this machine with the served model's
            tokenizer.
    """

    protocol: str = field(default="auto", metadata={"choices": PROTOCOLS})
    model: str | None = None
    top: int = 64
    timeout: float = 120.0
    patience: float = 900.0
    ahead: int = 2
    concurrent: int = 8
    key_from: str | None = None
    tokenizer: str | None = None
