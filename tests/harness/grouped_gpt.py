"""Our GPT entry with stand-ins for Transformer Engine's grouped linear layers and FP8 tensors."""

import dataclasses
import os

from megatron.core.transformer.module import MegatronModule

from megatron_moe_inject.experts.train import feature, part
from megatron_moe_inject.host import gpt_entry
from megatron_moe_inject.host.cpu_lane import flags
from megatron_moe_inject.recipe.facts import PrecisionFacts
from tests.harness import fp8_tensor, grouped_linear


def take_for_an_fp8_student() -> None:
    """The lane has no FP8; that only the frozen experts are in FP8 is all that differs."""
    stock = part.frozen_fp8
    precision = PrecisionFacts("e4m3", "blockwise", True, True)

    def frozen_fp8(recipe, policy, facts):
        return stock(recipe, policy, dataclasses.replace(facts, precision=precision))

    part.frozen_fp8 = frozen_fp8
    feature._check_frozen_fp8 = lambda recipe, facts: None
    MegatronModule.set_is_first_microbatch = _begin_step
    fp8_tensor.use_for_frozen_experts()


def _begin_step(model):
    """As Megatron's where the student trains in FP8."""
    for module in model.modules():
        if hasattr(module, "is_first_microbatch"):
            module.is_first_microbatch = True


if __name__ == "__main__":
    if os.environ.get("TESTS_STOCK_GROUPS"):
        part.train_grouped_experts = lambda chunks: 0
    take_for_an_fp8_student()
    flags._REFUSED.pop("moe_grouped_gemm")
    grouped_linear.use_for_grouped_gemm()
    gpt_entry.main()
