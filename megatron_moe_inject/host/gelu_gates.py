"""MLPs gated by a GELU by tanh, as in Gemma.

    --swiglu --spec megatron_moe_inject.host.gelu_gates layers

Megatron has the function and a gate, but no flag for both: ``--swiglu`` is the gate, whose function
is another one here. Gemma's norms add one to their weights (``--apply-layernorm-1p``). Its
embedding is multiplied by the square root of the hidden size, which Megatron does not do: a
checkpoint holds the product, and the head apart (``--untie-embeddings-and-output-weights``).
"""

from __future__ import annotations

from typing import Any

from megatron.core.activations import fast_gelu


def layers(config: Any, vp_stage: int | None = None) -> Any:
    """The layers of Megatron's ``GPTModelConfig``, all of whose MLPs have that function.

    Raises:
        ValueError: MLPs are not gated.
    """
    from megatron.training.models.gpt import default_layer_spec

    model = config.transformer
    if not model.gated_linear_unit:
        raise ValueError(f"--spec {__name__}: add --swiglu, whose gate it uses")
    model.activation_func = fast_gelu
    model.bias_activation_fusion = False  # Megatron has one for SiLU, and for another GELU
    return default_layer_spec(config, vp_stage)
