"""What a run builds, for entries that look at it: model, optimizer, and the copies of the start."""

import functools

from megatron.training import training

from megatron_moe_inject.retention.originals import OriginalParameters

built, originals = [], []
"""What ``setup_model_and_optimizer`` returned, and every ``OriginalParameters``."""


def keep_what_is_built():
    stock, stock_init = training.setup_model_and_optimizer, OriginalParameters.__init__

    @functools.wraps(stock)
    def setup(*args, **kwargs):
        built[:] = stock(*args, **kwargs)
        return tuple(built)

    def init(self, *args, **kwargs):
        stock_init(self, *args, **kwargs)
        originals.append(self)

    training.setup_model_and_optimizer = setup
    OriginalParameters.__init__ = init
