"""How many tokens go through the head at once: as many as a budget of memory for logits holds."""

from torch import Tensor

from megatron_moe_inject.losses.rows import maths_dtype

# Memory for the logits of one chunk, by device type: GPUs need larger chunks for busy products.
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# The same beside the sum of a head's gradient, as a share of that sum. On an H100 a half took 0.84
# of the time of a quarter, with the same peak, which the end of the sum makes.
_CHUNK_SHARE = {"cpu": 1 / 4, "cuda": 1 / 2}


def default_chunk_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    head_gradient: bool = False,
    mixed: bool = False,
) -> int:
    """Tokens per chunk whose logits stay within 64 MiB on a CPU and 512 MiB on a GPU.

    With ``head_gradient``, for a head's gradient with a sum of its own, also within a quarter of
    that float32 sum on a CPU and half of it on a GPU if it is more: every chunk reads and writes
    the sum once, so a few large chunks are faster, for memory in proportion to what the gradient
    takes.

    A token takes 2 * v/p * itemsize bytes: the student's logits, which its gradient overwrites, and
    the teacher's; with a committee (``mixed``) also those of its mixture in float32. (The float32
    copies of the row maths live in small blocks.) Rounded down to a multiple of 64 where that
    leaves anything, and evened out over the chunks.
    """
    itemsize = 2 * student_weight.element_size()
    if mixed:
        itemsize += maths_dtype(student_weight.dtype).itemsize
    per_token = max(1, student_weight.shape[0] * itemsize)
    budget = _CHUNK_BYTES.get(student_hidden.device.type, _CHUNK_BYTES["cuda"])
    if head_gradient:
        dtype = maths_dtype(student_weight.dtype)
        share = _CHUNK_SHARE.get(student_hidden.device.type, _CHUNK_SHARE["cuda"])
        budget = max(budget, int(student_weight.numel() * dtype.itemsize * share))
    limit = max(1, budget // per_token)
    tokens = max(1, len(student_hidden))
    even = -(-tokens // -(-tokens // limit))
    return min(limit // 64 * 64 or limit, -(-even // 64) * 64)
