"""What a store says about itself: whose knowledge it is, about which text, in which files.

``manifest.json`` names the teacher's weights, its tokenizer and the data sets by SHA-256, how the
teacher read them, and every shard by the SHA-256 of its header. A shard's header in turn has the
checksums of all that is in the shard (``shard.py``), so that whoever trusts the manifest, by its
signature (``signing.py``), can trust every byte.

``plan.json`` is the part of it that is known before the first shard. A writer that goes on with a
folder finds there whether it is about to write the same store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from megatron_moe_inject.host import typed
from megatron_moe_inject.host.errors import Failure, RecipeError, one_line
from megatron_moe_inject.host.files import readable_json, replace_file
from megatron_moe_inject.teachers.store.chunk_format import ChunkFormat
from megatron_moe_inject.teachers.store.row_format import DRAWN, RowFormat
from megatron_moe_inject.teachers.store.signing import check_signature
from megatron_moe_inject.teachers.store.state_format import StateFormat

FORMAT = "megatron_moe_inject store"
VERSION = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer"
_LARGEST = 1 << 30
_PIECE, _PIECES = 4096, 256


@dataclass(frozen=True)
class StoredTeacher:
    """Whose knowledge it is.

    Attributes:
        source: as it was written for the writer.
        architecture: class of the model.
        parameters: how many it has.
        weights: SHA-256 of the files in its folder, by name.
        dtype: of its parameters and states.
        prefix: ids that stood in front of each text.
    """

    source: str
    architecture: str
    parameters: int
    weights: dict[str, str]
    dtype: str
    prefix: list[int]


@dataclass(frozen=True)
class StoredData:
    """A data set of Megatron's (``.bin`` and ``.idx``).

    Attributes:
        name: its path prefix without folders.
        idx_sha256: of the ``.idx`` file.
        bin_bytes: size of the ``.bin`` file.
        bin_sample_sha256: of some of its bytes, see ``sample_sha256``.
        documents: in it.
        tokens: in it.
        first, last: documents ``first`` to ``last`` - 1 are stored.
    """

    name: str
    idx_sha256: str
    bin_bytes: int
    bin_sample_sha256: str
    documents: int
    tokens: int
    first: int
    last: int


@dataclass(frozen=True)
class StoredStates:
    """A store of hidden states instead of ids.

    Attributes:
        hidden_size: of a state.
        dtype: of the teacher's head and states, such as ``bfloat16``.
        excluded: ids that get no probability.
    """

    hidden_size: int
    dtype: str
    excluded: list[int]


@dataclass(frozen=True)
class StoredChunks:
    """A store of chunks of text, of a teacher with a tokenizer of its own.

    Attributes:
        tokenizer: SHA-256 of the teacher's tokenizer files, by name.
        ids: how many it has.
    """

    tokenizer: dict[str, str]
    ids: int


@dataclass(frozen=True)
class StorePlan:
    """What decides every byte of the shards.

    Attributes:
        teacher: whose knowledge it is.
        tokenizer: SHA-256 of the tokenizer's files, by name; empty where it has none.
        vocab_size: ids of the teacher.
        slots: ids of a token at most; how many are drawn; 1 of states and chunks.
        mass: each token has as many ids as have this probability together; None for all of them.
        log_probs: their precision, see ``row_format``, or that of states, see ``state_format``, or
            of chunks, see ``chunk_format``.
        temperatures: of which the probability of the rest is known; the first is 1. Of ids that
            were drawn the only one, at which they were.
        context: tokens that the teacher reads at once, of one document.
        overlap: how many of these it has read before, in documents that are longer.
        shard_tokens: a shard ends with the document that reaches so many.
        data: what was read.
        versions: of the packages that ran the teacher.
        labels: whether the label's log-probability is kept.
        states: of a store of states; None of others.
        chunks: of a store of chunks of text, likewise; its ``context`` is in the teacher's tokens.
    """

    teacher: StoredTeacher
    tokenizer: dict[str, str]
    vocab_size: int
    slots: int
    mass: float | None
    log_probs: str
    temperatures: list[float]
    context: int
    overlap: int
    shard_tokens: int
    data: list[StoredData]
    versions: dict[str, str] = field(default_factory=dict)
    labels: bool = True
    states: StoredStates | None = None
    chunks: StoredChunks | None = None

    @property
    def row_format(self) -> Layout:
        """How its rows are laid out.

        Raises:
            ValueError: there are no such rows.
        """
        if self.states is not None:
            return state_format(self.states, self.vocab_size, self.log_probs)
        if self.chunks is not None:
            return ChunkFormat(self.vocab_size, self.log_probs)
        temperatures = len(self.temperatures)
        return RowFormat(self.vocab_size, self.slots, self.log_probs, temperatures, self.labels)

    @property
    def drawn(self) -> bool:
        """Whether its ids were drawn."""
        return self.states is None and self.chunks is None and self.log_probs == DRAWN

    @property
    def counted(self) -> bool:
        """Whether its rows have numbers of ids of their own."""
        return self.mass is not None or self.drawn

    @property
    def identity(self) -> str:
        """SHA-256 of it all, by which shards know that they belong together."""
        whole = asdict(self)
        if self.chunks is None:  # as stores without it were named
            del whole["chunks"]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StoredShard:
    """A shard: some consecutive documents of a data set.

    Attributes:
        data: position of the data set in the plan.
        number: of the shard in it.
        first_document: the first of its documents.
        documents: how many.
        first_token: of the first document in the ``.bin`` file, counted in tokens.
        tokens: of all its documents.
        rows: tokens that something is known of.
        bytes: of the file.
        header_sha256: of its first bytes, up to the tensors.
    """

    data: int
    number: int
    first_document: int
    documents: int
    first_token: int
    tokens: int
    rows: int
    bytes: int
    header_sha256: str

    @property
    def file(self) -> str:
        """Its name in the store's folder."""
        return shard_name(self.data, self.number)


@dataclass(frozen=True)
class Manifest:
    """A whole store.

    Attributes:
        plan: what it was to be.
        bin_sha256: of the ``.bin`` file of each data set.
        shards: in the order of data sets and documents.
        head_sha256: of the file with the teacher's head, of a store of states; else empty.
    """

    plan: StorePlan
    bin_sha256: list[str]
    shards: list[StoredShard]
    head_sha256: str = ""
    format: str = FORMAT
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Tokens that something is known of."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)


Layout = RowFormat | StateFormat | ChunkFormat
"""How rows are laid out; what moves their bytes needs not know which."""


def state_format(states: StoredStates, vocab_size: int, precision: str) -> StateFormat:
    """How rows of states are laid out.

    Raises:
        ValueError: there are no such rows.
    """
    dtype = getattr(torch, states.dtype, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{states.dtype!r} is no type of states")
    return StateFormat(vocab_size, states.hidden_size, precision, dtype)


def sample_sha256(path: Path, failure: Failure) -> str:
    """SHA-256 of 256 pieces of 4 KiB, evenly spread over a file; of all of a small one.

    A run that starts knows by it in a moment which data set it has; what a step reads is compared
    token by token.

    Raises:
        RecipeError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            last = max(0, size - _PIECE)
            for place in sorted({last * n // (_PIECES - 1) for n in range(_PIECES)}):
                file.seek(place)
                digest.update(file.read(_PIECE))
    except OSError as error:
        problem = f"needs {path}, which cannot be read ({error.strerror})"
        raise failure(problem, "see that it is there") from None
    return digest.hexdigest()


def shard_name(data: int, number: int) -> str:
    """A shard's file in the store's folder."""
    return f"data{data}-{number:06d}.safetensors"


def write_json(path: Path, content: Manifest | StorePlan) -> None:
    """Write it as a whole or not at all.

    Raises:
        RecipeError: the file cannot be written.
    """
    replace_file(path, (readable_json(asdict(content)) + "\n").encode())


def read_plan(folder: Path, failure: Failure) -> StorePlan | None:
    """The plan in a folder that a writer has begun; None where there is none.

    Raises:
        RecipeError: it is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    return _parsed(_content(path, failure), path, StorePlan, failure)


def read_manifest(
    folder: Path, failure: Failure, trusted: Sequence[str] = (), key: str = ""
) -> Manifest:
    """The manifest of a store.

    Args:
        trusted: public keys, one of which must have signed it; empty for anybody's or none.
        key: where these stand in the recipe.

    Raises:
        RecipeError: there is none, it is not signed as it must be, damaged or of another version,
            or does not fit itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise failure(
                f"is a store that is not whole: {MANIFEST} is not there",
                "run moe-inject store-teacher again with the same flags; it goes on",
            )
        raise failure(
            f"is no store: {MANIFEST} is not there", "name the --output of moe-inject store-teacher"
        )
    content = _content(path, failure)
    if trusted:
        check_signature(folder, content, trusted, key, failure)
    manifest = _parsed(content, path, Manifest, failure)
    _check(manifest, failure)
    return manifest


def _content(path: Path, failure: Failure) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise failure(f"has a damaged {path.name} (larger than any)", "copy it again")
        return path.read_bytes()
    except OSError as error:
        raise failure(f"has a {path.name} that cannot be read ({error})", "copy it again") from None


def _parsed[T](stored: bytes, path: Path, kind: type[T], failure: Failure) -> T:
    try:
        content = json.loads(stored)
        if kind is Manifest:
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if content.get("version") != VERSION:
                raise failure(
                    f"is a store of version {content.get('version')!r}, and {VERSION} is read here",
                    "use the release that wrote it, or write it again",
                )
        return typed.build(kind, content)
    except RecipeError as error:
        if error.key is None or error.key.startswith("teachers.") or error.key.startswith("--"):
            raise
        raise failure(f"has a damaged {path.name} ({error})", "copy it again") from None
    except (ValueError, RecursionError) as error:
        raise failure(
            f"has a damaged {path.name} ({one_line(str(error))})", "copy it again"
        ) from None


def _check(manifest: Manifest, failure: Failure) -> None:
    """Refuse what no writer writes, so that a reader need not ask again.

    Raises:
        RecipeError: it does not fit itself.
    """
    plan = manifest.plan
    problem = None
    try:
        plan.row_format  # noqa: B018
    except ValueError as error:
        problem = str(error)
    temperatures = plan.temperatures
    if not temperatures or min(temperatures) <= 0 or (temperatures[0] != 1 and not plan.drawn):
        problem = f"temperatures {temperatures} must be positive and begin with 1"
    if plan.drawn and (len(temperatures) != 1 or plan.mass is not None):
        problem = "ids are drawn at one temperature, and not by mass"
    if plan.chunks is not None and plan.states is not None:
        problem = "a store has states or chunks of text, not both"
    if bool(manifest.head_sha256) != (plan.states is not None):
        problem = "a store of states has a head, and one of ids has none"
    if len(manifest.bin_sha256) != len(plan.data):
        problem = "not every data set has a checksum"
    place = [(data.first, 0) for data in plan.data]
    for shard in manifest.shards:
        if not 0 <= shard.data < len(plan.data) or (
            (shard.first_document, shard.number) != place[shard.data]
        ):
            problem = f"{shard.file} is not the one that comes next"
            break
        place[shard.data] = shard.first_document + shard.documents, shard.number + 1
    if problem is None and [end for end, _ in place] != [data.last for data in plan.data]:
        problem = "shards are missing"
    if problem is not None:
        raise failure(f"has a damaged {MANIFEST} ({problem})", "copy it again")
