"""Margins of labels: both log P and log(1 - P) of a token to full precision.

The margin of a label is its logit less the log of the sum of exponentials of all *other* logits,

    m = z_label - log sum_{j != label} exp(z_j),    P = sigmoid(m),    1 - P = sigmoid(-m)

so that neither P near 0 nor P near 1 loses digits, where 1 - exp(-cross-entropy) does. Its
gradient by the logits is 1 for the label and minus the softmax of the others, again without a
difference of nearly equal numbers. A loss of label probabilities alone, such as one of chunks of
text (``aligned.py``), needs no more of a token than this one number.

Minus a margin is a cross-entropy whose sum leaves the label out. So the maths of ``rows.py``, its
kernels and the passes of ``fused.py`` give it as they are, once the label's logit is taken out of
the row.

Shapes: t tokens, c columns of this rank that hold real ids.
"""

import torch

from megatron_moe_inject.losses.rows import (
    LogitRows,
    RowStats,
    all_statistics,
    exchange,
    known,
    label_logit,
    merge,
)
from megatron_moe_inject.losses.spec import VocabShard


def hide_labels(logits: LogitRows, shard: VocabShard) -> None:
    """Write -inf over the label's logit of every row; twice is as once."""
    x, labels = logits.x, known(logits.labels)
    if not shard.columns:
        return
    column, in_shard = (part[:, None] for part in shard.locate(labels))
    x.scatter_(1, column, x.gather(1, column).masked_fill_(in_shard, -torch.inf))


def margin_statistics(logits: LogitRows, shard: VocabShard) -> RowStats:
    """``row_statistics`` without a teacher, of the logits other than the labels', which are hidden
    afterwards; ``ce`` is minus the margin, 0 where the label is negative.

    Collectives over the shard's group: one all-gather of 3 numbers per row.
    """
    of_label = label_logit(logits.x, known(logits.labels), shard)
    hide_labels(logits, shard)
    local = all_statistics(logits, None, shard, None)
    return merge(exchange(local | {"label_logit": of_label}, shard), logits, None)
