"""Reads what DistillKit's logit capture has written, as DistillKit v1 does (commit a61c2e7, March
2026): ``sample_logits_vllm`` puts into a folder

    compression_config.yaml     how the log-probabilities were packed
    data_0.parquet, ...         a row for each sample: ``input_ids`` [n], and of the n - 1 tokens
                                behind the first ``compressed_logprobs`` and ``bytepacked_indices``

A token's packed log-probabilities, largest first, are ``exact_k`` numbers; coefficients of a sum of
powers, square root or exponential of the place, for the others; and bins of what that sum leaves,
each one scale and some bits a number. With delta encoding each number is its distance to the one
before. Ids are ceil(log2 d) bits each, the highest first. All are at temperature 1, and of the
whole vocabulary.

Older files (``packed_indices``: logits less their mean) do not tell what the other ids have, and
files that ``distillkit-pack-logits`` has joined not where samples begin: both are refused.

Shapes: n tokens, k ids of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe_inject.host.errors import Failure, one_line

CONFIG = "compression_config.yaml"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_SAMPLES = 64
"""Read at once."""


@dataclass(frozen=True)
class Packing:
    """How log-probabilities were packed, by DistillKit's own names.

    Attributes:
        d: ids of the vocabulary.
        k: ids of a token.
        exact_k: of these as they are.
        exact_dtype, term_dtype: of those, and of the coefficients.
        polynomial_terms: powers, ``sqrt`` or ``exp`` of the place.
        residual_bins: scale's dtype, bits and numbers of each.
        delta_encoding: each number is its distance to the one before.
        normalize_t: places go from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: torch.dtype
    term_dtype: torch.dtype
    polynomial_terms: tuple[int | str, ...]
    residual_bins: tuple[tuple[torch.dtype, int, int], ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Packing:
        """Of a configuration's fields; ValueError, KeyError or TypeError if it is none."""
        known = {
            "d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins",
            "delta_encoding", "error_diffusion", "normalize_t",
        }  # fmt: skip
        if unknown := sorted(set(content) - known):
            raise ValueError(f"{unknown[0]} is not known")
        bins = tuple(
            (_DTYPES[b["scale_dtype"]], int(b["element_bits"]), int(b["num_elements"]))
            for b in content["residual_bins"]
        )
        terms = tuple(content.get("polynomial_terms") or ())
        found = cls(
            int(content["d"]),
            int(content["k"]),
            int(content["exact_k"]),
            _DTYPES[content.get("exact_dtype", "float32")],
            _DTYPES[content.get("term_dtype", "float32")],
            terms,
            bins,
            bool(content.get("delta_encoding", True)),
            bool(content.get("normalize_t", False)),
        )
        others = found.k - found.exact_k
        if not 0 <= found.exact_k <= found.k or not 1 <= found.k <= found.d:
            raise ValueError(f"exact_k {found.exact_k}, k {found.k} and d {found.d} do not fit")
        if any(not 1 <= bits <= 32 or count < 1 for _, bits, count in bins) or (
            sum(count for _, _, count in bins) > others
        ):
            raise ValueError("residual_bins do not fit")
        if any(not isinstance(t, int) and t not in ("sqrt", "exp") for t in terms):
            raise ValueError(f"polynomial_terms {terms} are not known")
        return found

    @property
    def id_bits(self) -> int:
        """Of each id."""
        return int(torch.tensor(float(self.d)).log2().ceil())

    @property
    def row_bytes(self) -> int:
        """Of a token's log-probabilities."""
        size = self.exact_k * self.exact_dtype.itemsize
        size += len(self.polynomial_terms) * self.term_dtype.itemsize
        return size + sum(d.itemsize + -(-bits * n // 8) for d, bits, n in self.residual_bins)

    def log_probs(self, content: Tensor) -> Tensor:
        """Of bytes [n, ``row_bytes``], float32 [n, k]."""
        at, others, count = 0, self.k - self.exact_k, len(content)

        def take(numbers: int, dtype: torch.dtype) -> Tensor:
            nonlocal at
            part = content[:, at : at + numbers * dtype.itemsize]
            at += numbers * dtype.itemsize
            return part.clone(memory_format=torch.contiguous_format).view(dtype)

        exact = torch.zeros(count, 0, dtype=self.exact_dtype)
        if self.exact_k:
            exact = take(self.exact_k, self.exact_dtype)
        sums = torch.zeros(count, others, dtype=self.exact_dtype)
        if self.polynomial_terms:
            factors = take(len(self.polynomial_terms), self.term_dtype)
            sums = (self._terms(others) * factors[:, None]).sum(-1)
        left = torch.zeros(count, others)
        begin = 0
        for dtype, bits, numbers in self.residual_bins:
            scale = take(1, dtype).float()
            size = -(-bits * numbers // 8)
            codes = big_endian(content[:, at : at + size], bits, numbers).float()
            at += size
            signed = 2 * codes - 1 if bits == 1 else codes - 2.0 ** (bits - 1)
            left[:, begin : begin + numbers] = signed * scale
            begin += numbers
        whole = torch.cat([exact, sums + left.to(self.exact_dtype)], 1)
        if self.delta_encoding:
            whole = whole.float().cumsum(-1).to(self.exact_dtype)
        return whole.float()

    def _terms(self, count: int) -> Tensor:
        """[count, terms] of the places behind the exact ones, in the coefficients' type."""
        places = torch.arange(count, dtype=self.term_dtype)
        if self.normalize_t:
            places = torch.linspace(0, 1, count, dtype=self.term_dtype)
        columns = [
            places**term if isinstance(term, int) else getattr(torch, term)(places)
            for term in self.polynomial_terms
        ]
        return torch.stack(columns, -1)


def big_endian(content: Tensor, bits: int, count: int) -> Tensor:
    """Numbers int64 [n, count] of so many bits each, the highest first, of bytes [n, w]."""
    places = torch.arange(7, -1, -1)
    flat = ((content.long()[..., None] >> places) & 1).flatten(1)[:, : bits * count]
    powers = 1 << torch.arange(bits - 1, -1, -1)
    return (flat.view(len(content), count, bits) * powers).sum(-1)


class Capture:
    """A folder of DistillKit's, sample by sample.

    Args:
        folder: that it was written into.
        failure: makes errors about it.

    Attributes:
        packing: how its log-probabilities were packed.
        files: the parquet files, in order.

    Raises:
        RecipeError: it is none, or one that cannot be read.
    """

    def __init__(self, folder: Path, failure: Failure) -> None:
        self._failure = failure
        self.packing = self._packing(folder / CONFIG)
        named = {p: re.fullmatch(r"data_(\d+)\.parquet", p.name) for p in folder.iterdir()}
        numbers = {int(match[1]): path for path, match in named.items() if match}
        if not numbers:
            raise failure("has no data_0.parquet", "name what sample_logits_vllm has written")
        if sorted(numbers) != list(range(len(numbers))):
            raise failure(f"lacks data_{_gap(numbers)}.parquet", "copy it again")
        self.files = [numbers[n] for n in range(len(numbers))]

    def _packing(self, path: Path) -> Packing:
        import yaml

        try:
            content = yaml.safe_load(path.read_text("utf-8"))
            return Packing.of(content)
        except OSError as error:
            problem = f"has no {CONFIG} that can be read ({error.strerror})"
        except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"has a {CONFIG} that is not DistillKit's ({one_line(repr(error))})"
        raise self._failure(problem, "name what sample_logits_vllm has written")

    @property
    def vocab_size(self) -> int:
        """Ids that its rows can hold."""
        return self.packing.d

    @property
    def slots(self) -> int:
        """Ids of a token at most."""
        return self.packing.k

    def texts(self) -> Iterator[np.ndarray]:
        """Tokens [n] of each sample."""
        for sample in self._samples(_COLUMNS[:1]):
            yield np.array(sample[0], np.int64)

    def said(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and log-probabilities [n - 1, k] of what follows each of a sample's tokens but the
        last; -inf where a place is not used."""
        packing = self.packing
        for tokens, packed, ids in self._samples(_COLUMNS):
            count = max(0, len(tokens) - 1)
            if len(packed) != count or len(ids) != count:
                raise self._failure(
                    f"has a sample of {len(tokens)} tokens with {len(packed)} rows, not {count}",
                    "convert what sample_logits_vllm has written, before anything joins or cuts it",
                )
            if not count:
                yield torch.zeros(0, packing.k).long(), torch.zeros(0, packing.k)
                continue
            rows = torch.tensor(packed, dtype=torch.uint8).view(count, -1)
            numbers = torch.tensor(ids, dtype=torch.uint8).view(count, -1)
            wide = -(-packing.id_bits * packing.k // 8)
            if (rows.shape[1], numbers.shape[1]) != (packing.row_bytes, wide):
                raise self._failure(
                    f"has rows of {rows.shape[1]} and {numbers.shape[1]} bytes, and its {CONFIG} "
                    f"makes {packing.row_bytes} and {wide}",
                    "copy both again",
                )
            yield big_endian(numbers, packing.id_bits, packing.k), packing.log_probs(rows)

    def _samples(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        from pyarrow import ArrowException, parquet

        for path in self.files:
            try:
                file = parquet.ParquetFile(path)
                names = set(file.schema_arrow.names)
                if not set(_COLUMNS) <= names:
                    raise self._failure(
                        f"has {path.name} with other columns ({', '.join(sorted(names))})",
                        "capture again with DistillKit v1: only its compressed rows are read",
                    )
                if names & {"attention_mask", "labels"}:
                    raise self._failure(
                        f"has {path.name}, whose samples were joined",
                        "convert what sample_logits_vllm has written",
                    )
                for batch in file.iter_batches(_SAMPLES, columns=list(columns)):
                    found = batch.to_pydict()
                    yield from zip(*(found[name] for name in columns), strict=True)
            except (OSError, ArrowException) as error:
                problem = f"has {path.name}, which is damaged ({one_line(str(error))})"
                raise self._failure(problem, "copy it again") from None


def _gap(numbers: Mapping[int, Path]) -> int:
    return next(n for n in range(len(numbers) + 1) if n not in numbers)
