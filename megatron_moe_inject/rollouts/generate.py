"""A student writes: a sampling loop over the forward pass of the model that Megatron has built.

Each token takes one pass of Megatron's own schedule, forward only, over all that was written so
far, so it works at every tensor-, pipeline- and expert-parallel layout that trains, for GPT and
hybrid models, and its logits are those of training. Where a model is whole on its ranks (no
pipeline, no sequence parallelism, nothing in FP8, attention with keys and values) and all prompts
of a pass are equally long, Megatron's ``StaticInferenceContext`` keeps keys and values, and a token
takes a pass over itself alone. Megatron's inference engines (``megatron.core.inference.engines``)
need a GPU (CUDA events, streams and generators); large students are served (``rollouts.served``).

Shapes: b texts, s tokens so far, v vocabulary, p tensor-parallel size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megatron_moe_inject.host.forward_passes import allowed_rounds, evaluating
from megatron_moe_inject.recipe.run_part import BuiltStudent
from megatron_moe_inject.rollouts.settings import Sampling

_FP8_ROWS = 16
"""Rows of a product in FP8 are a multiple of this."""


def next_tokens(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """The next token of each text, ``[b]`` int64; of equal logits the lowest id counts first.

    Args:
        logits: ``[b, v]`` without padding of the vocabulary.
        uniforms: ``[b]`` float64 in [0, 1), on the same device.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_p == 1 and not sampling.top_k:  # nothing is left out: no order is needed
        return _drawn(probs, uniforms)[:, 0]
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
    before = ordered.cumsum(-1) - ordered
    ordered = torch.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), ordered, 0.0)
    return ids.gather(-1, _drawn(ordered, uniforms))[:, 0]


def _drawn(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The place ``[b, 1]`` where each row's sum has come to its share; ``weights`` ``[b, n]``."""
    ends = weights.cumsum(-1)
    drawn = uniforms[:, None] * ends[:, -1:]
    return (ends <= drawn).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


class Generator:
    """Writes with one student.

    Args:
        student: built and loaded.
        args: Megatron's arguments.
        vocab_size: ids of the tokenizer; those beyond are padding, which is never written.
        cache: whether keys and values may be kept.
    """

    def __init__(
        self, student: BuiltStudent, args: Namespace, vocab_size: int, *, cache: bool = True
    ) -> None:
        self._student = student
        self._vocab_size = vocab_size
        self._length = args.seq_length
        self._mask = bool(getattr(args, "create_attention_mask_in_dataloader", True))
        chunks, groups = student.chunks, student.groups
        self._config = chunks[0].config
        self._stages = groups.pp.size()
        self._multiple = groups.tp.size() if self._config.sequence_parallel else 1
        if getattr(self._config, "fp8", None):
            self._multiple *= _FP8_ROWS
        self._group = self._config.microbatch_group_size_per_vp_stage if len(chunks) > 1 else 1
        self._group = self._group or self._stages
        self._caches = (
            cache
            and isinstance(chunks[0], GPTModel)
            and self._stages == self._multiple == 1
            and not self._config.multi_latent_attention
        )
        self._context: StaticInferenceContext | None = None

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        sampling: Sampling,
        size: int,
    ) -> list[list[int]]:
        """Completions of this data-parallel rank's prompts, at most ``size`` of them.

        All ranks call it together, also with nothing to write; ranks of one data-parallel index
        with the same prompts.

        Args:
            prompts: ids of each.
            numbers: of each, see ``Sampling.uniforms``.
            size: texts of a pass, the same on every rank.

        Collectives: one all-reduce of two numbers over the world, and one for each token; those of
        a forward pass for each; on the last stage an all-gather of ``[b, v/p]`` over the
        tensor-parallel group; a broadcast of ``[b]`` over the pipeline.
        """
        device = self._student.device
        rounds = allowed_rounds(1, self._stages, self._group)
        size = -(-size // rounds) * rounds
        common = self._common_length([len(prompt) for prompt in prompts])
        filler = [0] * (common or 1)
        texts = [list(prompt) for prompt in prompts]
        texts += [list(filler) for _ in range(size - len(prompts))]
        limits = [min(len(prompt) + sampling.max_tokens, self._length) for prompt in prompts]
        draws = [sampling.uniforms(number) for number in numbers]
        ends = [len(prompt) for prompt in prompts]
        open_ones = [at for at, end in enumerate(ends) if end < limits[at]]
        self._context = None
        if common:
            self._context = StaticInferenceContext(
                max_batch_size=size,
                max_sequence_length=min(common + sampling.max_tokens, self._length),
            )
        with torch.no_grad(), evaluating(self._student.chunks):
            while True:
                longest = max((ends[at] for at in open_ones), default=0)
                state = torch.tensor([len(open_ones), longest], device=device)
                dist.all_reduce(state, op=dist.ReduceOp.MAX)
                going, longest = state.tolist()
                if not going:
                    break
                uniforms = np.zeros(size)
                for at in open_ones:
                    uniforms[at] = draws[at][ends[at] - len(prompts[at])]
                logits = self._logits(texts, longest, rounds)
                found = self._chosen(logits, sampling, torch.from_numpy(uniforms).to(device))
                for at in range(size) if common else open_ones:  # a cache has all rows go along
                    texts[at].append(found[at])
                for at in open_ones:
                    ends[at] += 1
                open_ones = [
                    at
                    for at in open_ones
                    if found[at] not in sampling.stop and ends[at] < limits[at]
                ]
        self._context = None
        return [
            text[len(prompt) : end] for text, prompt, end in zip(texts, prompts, ends, strict=False)
        ]

    def _common_length(self, lengths: Sequence[int]) -> int:
        """The length of all prompts of this pass on all ranks, where keys and values are kept; 0
        where they are not."""
        longest, shortest = max(lengths, default=0), min(lengths, default=self._length)
        state = torch.tensor([longest, -shortest], device=self._student.device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        longest, shortest = state.tolist()
        return longest if self._caches and longest == -shortest else 0

    def _chosen(
        self, logits: torch.Tensor | None, sampling: Sampling, uniforms: torch.Tensor
    ) -> list[int]:
        """The next token of each text, on every stage."""
        if logits is None:
            found = torch.empty(len(uniforms), dtype=torch.int64, device=uniforms.device)
        else:
            found = next_tokens(logits, sampling, uniforms)
        group = self._student.groups.pp
        if group.size() > 1:
            dist.broadcast(found, src=dist.get_process_group_ranks(group)[-1], group=group)
        return found.tolist()

    def _logits(
        self, texts: Sequence[Sequence[int]], longest: int, rounds: int
    ) -> torch.Tensor | None:
        """Logits behind the last token of each text, ``[b, v]`` float32 on the last stage."""
        if self._context is not None:
            return self._gathered(self._behind(texts, self._context))
        length = -(-longest // self._multiple) * self._multiple
        device = self._student.device
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[: min(len(text), length)] = torch.tensor(text[:length])
        ends = torch.tensor([min(len(text), length) - 1 for text in texts], device=device)
        inputs = [
            (part, at)
            for part, at in zip(tokens.to(device).chunk(rounds), ends.chunk(rounds), strict=True)
        ]
        chunks = list(self._student.chunks)
        several = len(chunks) > 1
        iterators = [iter(inputs) for _ in chunks]
        found = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=rounds,
            seq_length=length,
            micro_batch_size=len(texts) // rounds,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if self._student.last is None:
            return None
        return torch.cat([found[at] for at in range(rounds)])

    def _forward_step(self, inputs: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        tokens, ends = next(inputs)
        count, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(count, -1)
        output = model(tokens, positions, self._causal(count, length))

        def of_ends(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return self._gathered(logits[torch.arange(count, device=logits.device), ends])

        return output, of_ends

    def _behind(
        self, texts: Sequence[Sequence[int]], context: StaticInferenceContext
    ) -> torch.Tensor:
        """Logits ``[b, v/p]`` by what is new of each text; all are equally long."""
        begin = context.sequence_len_offset
        new = torch.tensor([text[begin:] for text in texts], device=self._student.device)
        count, length = new.shape
        positions = torch.arange(begin, begin + length, device=new.device).expand(count, -1)
        mask = None if begin else self._causal(count, length)
        if begin:
            context.enable_decode_mode()
        logits = self._student.chunks[0](new, positions, mask, inference_context=context)
        context.sequence_len_offset += length
        return logits[:, -1]

    def _causal(self, count: int, length: int) -> torch.Tensor | None:
        """The mask that data loaders give, ``[b, 1, s, s]``, where they do."""
        if not self._mask:
            return None
        whole = torch.ones(length, length, dtype=torch.bool, device=self._student.device)
        return whole.triu(1).expand(count, 1, -1, -1)

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """``[b, v]`` float32 without padding, of ``[b, v/p]``."""
        own, group = own.float(), self._student.groups.tp
        if group.size() > 1:
            parts = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(parts, own.contiguous(), group=group)
            own = torch.cat(parts, -1)
        return own[:, : self._vocab_size]
