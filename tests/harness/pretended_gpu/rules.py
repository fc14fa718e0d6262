"""What an operation on a GPU makes the host wait for, by the name that torch's dispatcher has.

As the kernels of CUDA do it (``torch.cuda.set_sync_debug_mode`` warns at the same ones), but for
copies and indices, which ``copies`` and ``operations`` decide by the places of what is copied.
"""

from __future__ import annotations

from typing import Any

DISPATCHES = (
    "megatron/core/transformer/moe/token_dispatcher.py",
    "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
)
"""Megatron's wait for the numbers of rows, in each forward pass of a layer of experts."""
NEEDED = {
    # How many rows of general tokens each expert has: the host sets the sizes of their products.
    ("megatron_moe_inject/retention/experts.py", "ExpertRetention._hold"): DISPATCHES,
    # Of the step that ends, for the next one. Megatron waits for the gradient's norm right behind.
    ("megatron_moe_inject/teachers/confidence.py", "RunningConfidence.end"): 1,
}
"""Where the package waits, by file and function, and at most how often in a step: a number, or as
often as another wait."""
COPIES = {
    *("aten::copy_", "aten::copy", "aten::_to_copy", "aten::_foreach_copy_"),
    "aten::_foreach_copy",
}
INDEXING = {
    *("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_"),
    *("aten::_index_put_impl_", "aten::_unsafe_index_put"),
}
ANY_PLACE = {
    *("aten::set_", "aten::record_stream", "aten::_pin_memory", "aten::resize_"),
    "aten::_has_compatible_shallow_copy_type",
}
UNSET = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"),
    "aten::new_empty_strided",
}
MAKERS = {
    *UNSET,
    *("aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::rand_like"),
    *("aten::randn_like", "aten::randint_like", "aten::new_zeros", "aten::new_ones"),
    "aten::new_full",
}
SHAPES = {
    *("aten::view", "aten::detach", "aten::alias", "aten::slice", "aten::select", "aten::expand"),
    *("aten::unsqueeze", "aten::squeeze", "aten::permute", "aten::t", "aten::transpose"),
    *("aten::split", "aten::unbind", "aten::_unsafe_view", "aten::as_strided", "aten::set_"),
    *("aten::copy_", "aten::_to_copy", *UNSET),
}
"""Operations that read no values."""

_WAITING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"),
    *(
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::unique_dim_consecutive",
    ),
    *("aten::bincount", "aten::is_nonzero", "aten::_linalg_check_errors", "aten::histc"),
    *("aten::argwhere"),
}
_BY_VALUE = {"aten::masked_fill", "aten::masked_fill_", "aten::index_fill", "aten::index_fill_"}


def waits(name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why an operation on GPU tensors makes the host wait, or None."""
    short = name.partition("::")[2]
    if name in _WAITING:
        return short
    if name in _BY_VALUE and func._overloadname.endswith("Tensor"):
        return f"{short}: the value is a tensor, whose number the host reads"
    if name == "aten::repeat_interleave" and func._overloadname == "Tensor":
        return None if kwargs.get("output_size") is not None else short
    return None
