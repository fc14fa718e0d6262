"""Our GPT entry with a stand-in for Transformer Engine's grouped linear layers."""

import os

from megatron_moe_inject import gpt_entry, injection
from megatron_moe_inject.cpu_lane import flags
from tests import grouped_linear

if __name__ == "__main__":
    if os.environ.get("TESTS_DO_NOT_SPLIT"):
        injection.split_grouped_experts = lambda chunks: 0
    flags._REFUSED.pop("moe_grouped_gemm")
    grouped_linear.use_for_grouped_gemm()
    gpt_entry.main()
