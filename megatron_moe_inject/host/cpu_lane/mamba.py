"""Mamba-2 layers (``M`` of ``--hybrid-layer-pattern``) without the kernels of ``mamba_ssm``.

Megatron's ``MambaMixer`` calls fused Triton kernels. Here is their maths in differentiable
PyTorch, in fp32 whatever the model's dtype: a causal convolution of a few tokens in each channel,
then the recurrence

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,    y_t = S_t C_t + D x_t

of a state S for each head, A a number, in chunks: within one as attention masked by decays,
between chunks by their states (state space duality, "Transformers are SSMs", arXiv 2405.21060).
Projections, sharding and checkpoints stay Megatron's.

Shapes: b batch, l sequence, c chunk, h heads of p channels, g groups of heads that share B and C,
n state, d channels of the convolution, w its width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_moe_inject.host.cpu_lane.axes import rearrange


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, seq_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """SiLU of each channel's convolution with the tokens up to each one.

    Args:
        x: ``[b, l, d]``.
        weight, bias: ``[d, w]``, whose last column is of the token itself, and ``[d]``.
        seq_idx: ``[b, l]``, the document of each token; no token sees another document.
    """
    length, width = x.shape[1], weight.shape[1]
    out = x.float() * weight[:, -1].float() + bias.float()
    for back in range(1, min(width, length)):
        earlier = x[:, :-back].float() * weight[:, -1 - back].float()
        if seq_idx is not None:
            same = seq_idx[:, back:] == seq_idx[:, :-back]
            earlier = earlier * same.unsqueeze(-1)
        out = out + F.pad(earlier, (0, 0, back, 0))
    return F.silu(out).to(x.dtype)


def chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    return_final_states: bool = False,
) -> Any:
    """The recurrence, as ``mamba_ssm``'s ``mamba_chunk_scan_combined``.

    Args:
        x: ``[b, l, h, p]``.
        dt: ``[b, l, h]``, time steps; ``dt_bias`` ``[h]`` is added, then softplus is taken.
        A: ``[h]``, negative.
        B, C: ``[b, l, g, n]``.
        chunk_size: tokens whose scores are made at once.
        D: ``[h]`` or ``[h, p]``, what is passed on of ``x`` itself.
        z: ``[b, l, h, p]``, whose SiLU multiplies the result.
        initial_states: ``[b, h, p, n]``, before the first token; zeros unless given.
        seq_idx: ``[b, l]``, the document of each token; a state ends with its document.
        return_final_states: give the last state too.

    Returns:
        ``[b, l, h, p]`` in ``x``'s dtype, alone or with ``[b, h, p, n]``.
    """
    batch, length, heads, channels = x.shape
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = F.softplus(steps) if dt_softplus else steps
    inputs, log_decay = x.float() * steps.unsqueeze(-1), steps * A.float()
    B, C = (part.float().repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    if seq_idx is None:
        seq_idx = torch.zeros(1, 1, dtype=torch.int32, device=x.device).expand(batch, length)
    state = x.new_zeros(batch, heads, channels, B.shape[-1], dtype=torch.float32)
    if initial_states is not None:
        state = initial_states.float()
    document, parts = seq_idx[:, 0], []
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        y, state = _one_chunk(
            inputs[:, chunk], log_decay[:, chunk], B[:, chunk], C[:, chunk], state,
            seq_idx[:, chunk], document,
        )  # fmt: skip
        document = seq_idx[:, chunk][:, -1]
        parts.append(y)
    out = torch.cat(parts, dim=1)
    if D is not None:
        out = out + x.float() * (D if D.dim() == 2 else D.unsqueeze(-1)).float()
    if z is not None:
        out = out * F.silu(z.float())
    out = out.to(x.dtype)
    return (out, state) if return_final_states else out


def _one_chunk(
    inputs: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    seq_idx: torch.Tensor,
    document: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[b, c, h, p]`` of one chunk and the state after it; ``state`` is of ``document``."""
    total = log_decay.cumsum(1)
    from_start, to_end = total.exp(), (total[:, -1:] - total).exp()
    decay = (total.unsqueeze(2) - total.unsqueeze(1)).permute(0, 3, 1, 2)
    later = torch.ones(decay.shape[-2:], dtype=torch.bool, device=decay.device).triu(1)
    other = seq_idx.unsqueeze(2) != seq_idx.unsqueeze(1)
    decay = decay.masked_fill((later | other).unsqueeze(1), float("-inf")).exp()
    scores = torch.einsum("bihn,bjhn->bhij", C, B) * decay
    goes_on = (seq_idx == document.unsqueeze(1)).unsqueeze(-1)
    reaches = (seq_idx == seq_idx[:, -1:]).unsqueeze(-1)
    y = torch.einsum("bhij,bjhp->bihp", scores, inputs)
    y = y + torch.einsum("bihn,bhpn,bih->bihp", C, state, from_start * goes_on)
    added = torch.einsum("bjhp,bjhn,bjh->bhpn", inputs, B, to_end * reaches)
    kept = (from_start * goes_on)[:, -1]
    return y, state * kept[..., None, None] + added


def split_conv_scan(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    seq_idx: torch.Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """Convolution and gated recurrence, as ``mamba_ssm``'s ``mamba_split_conv1d_scan_combined``
    without its norm and output projection.

    Args:
        zxbcdt: ``[b, l, 2 h p + 2 g n + h]``: the gate, x, B, C and the time steps.
        conv1d_weight, conv1d_bias: ``[d, w]`` and ``[d]``, d = h p + 2 g n.
        dt_bias, A: ``[h]``.
        D: ``[h]``, or ``[h, p]`` where ``headdim`` is None.
        activation, norm_before_gate: as Megatron's mixer always has them.

    Returns:
        ``[b, l, h p]``.
    """
    assert activation in ("silu", "swish"), "as Megatron's mixer has it"
    assert not norm_before_gate, "as Megatron's mixer has it"
    heads, channels = len(A), headdim or D.shape[-1]
    inner = heads * channels
    states = len(conv1d_weight) - inner
    z, conv_in, dt = zxbcdt.split([inner, inner + states, heads], dim=-1)
    convolved = causal_conv(conv_in, conv1d_weight, conv1d_bias, seq_idx)
    x, B, C = convolved.split([inner, states // 2, states // 2], dim=-1)
    x, z = (rearrange(part, "b l (h p) -> b l h p", p=channels) for part in (x, z))
    B, C = (rearrange(part, "b l (g n) -> b l g n", g=ngroups) for part in (B, C))
    y = chunk_scan(
        x, dt, A, B, C, chunk_size, D, z=z, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True
    )
    return y.flatten(2)


class GatedRMSNorm(nn.Module):
    """RMSNorm in groups, gated before: Megatron's ``ExtendedRMSNorm`` around ``mamba_ssm``'s.

    Args:
        hidden_size: channels of this tensor-parallel rank.
        eps: added to the mean square.
        group_size: channels normalised together.
        norm_before_gate: must be False, as in Megatron's mixer.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert not norm_before_gate, "as Megatron's mixer has it"
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps
        self.group_size = group_size

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., h p]`` of the same; the SiLU of ``z`` multiplies ``x`` first."""
        gated = x.float() if z is None else x.float() * F.silu(z.float())
        grouped = gated.unflatten(-1, (-1, self.group_size))
        normed = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight, sharded over tensor-parallel ranks, as Megatron's class has it."""
        from megatron.core import parallel_state
        from megatron.core.ssm.mamba_mixer import make_sharded_tensors_for_checkpoint

        tp_group = getattr(self, "tp_group", None)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=tp_group or parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


def _packing_support(for_inference_not_training: bool = True) -> tuple[bool, str | None]:
    """What Megatron asks the installed kernels: whether documents may be packed."""
    return not for_inference_not_training, "the CPU lane's Mamba layers train and do not generate"


def install() -> None:
    """Put the above where ``MambaMixer`` looks for kernels, and for ``einops`` where that is
    absent."""
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.mamba_chunk_scan_combined = chunk_scan
    mamba_mixer.mamba_split_conv1d_scan_combined = split_conv_scan
    mamba_mixer.ExtendedRMSNorm = GatedRMSNorm
    mamba_mixer._check_mamba_sequence_packing_support = _packing_support
    for module in (mamba_mixer, mamba_context_parallel):
        if not module.HAVE_EINOPS:
            module.HAVE_EINOPS = True
            module.rearrange = module.repeat = rearrange
