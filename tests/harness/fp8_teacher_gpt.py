"""Our GPT entry where teachers run in a stand-in for FP8, which rounds nothing.

Inside it each linear layer refuses rows that FP8 cannot multiply, as Transformer Engine's do; at
its end every rank prints how many products there were: ``products: <number>``.
"""

import contextlib
import functools

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_moe_inject.host import gpt_entry
from megatron_moe_inject.teachers import megatron

MULTIPLE = 16
products = []


def run_in_fp8() -> None:
    """Teachers with ``fp8`` get the stand-in, where there is no GPU."""
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    def refusing(stock):
        @functools.wraps(stock)
        def forward(self, rows, *args, **kwargs):
            if inside:
                number = rows.shape[:-1].numel()
                if number == 0 or number % MULTIPLE:
                    raise ValueError(f"FP8 multiplies by {MULTIPLE} rows, not {number}")
                products.append(number)
            return stock(self, rows, *args, **kwargs)

        return forward

    for kind in (ColumnParallelLinear, RowParallelLinear):
        kind.forward = refusing(kind.forward)
    megatron.fp8_context = lambda source, saved, fp8, device: context


if __name__ == "__main__":
    run_in_fp8()
    gpt_entry.main()
    print(f"products: {len(products)}", flush=True)
