"""What Megatron's models of given flags store: a script that builds them on one process.

Standard input has ``{name: [flag, ...]}`` as JSON; the last line of the output has
``{name: {"tensors": {key: global shape}, "objects": [key, ...], "error": null}}``, or the error of
a model that could not be built. Megatron's own parser reads and validates the flags. With ``--te``
the modules are those of Transformer Engine, on the CPU (``te_on_cpu.py``).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

import torch

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}

FIXED = shlex.split(
    "--micro-batch-size 1 --seq-length 32 --tokenizer-type NullTokenizer --vocab-size 44 "
    "--make-vocab-size-divisible-by 48 --use-cpu-initialization"
)


def built(flags: list[str]):
    """The model of these flags, as Megatron's training loop builds it; they become the global
    ones."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import global_vars
    from megatron.training.arguments import parse_and_validate_args

    from megatron_moe_inject.host import compat, gpt_entry

    if global_vars._GLOBAL_ARGS is not None:
        global_vars.unset_global_variables()
    sys.argv = ["stored_keys", *flags, *FIXED]
    args = parse_and_validate_args(args_defaults={})
    gpt_entry.check_supported(args)
    config = compat.model_config(args)
    if config is None:
        return gpt_entry.model_provider()
    if not compat.builds_from_config():
        return gpt_entry.hybrid_model_provider(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return config.get_builder_cls()(config).build_model(groups)


def sharded_values(chunk) -> list[Any]:
    """What a model stores: tensors that lie over its parameters, and objects."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = chunk.sharded_state_dict(prefix="", metadata={"dp_cp_group": None})
    apply_factories(state)
    return list(nested_values(state))


def stored(chunk) -> dict[str, Any]:
    """Keys and global shapes of the tensors that a model stores, and keys of the objects."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    values = sharded_values(chunk)
    tensors = (value for value in values if isinstance(value, ShardedTensor))
    return {
        "tensors": {tensor.key: list(tensor.global_shape) for tensor in tensors},
        "objects": [value.unique_key for value in values if isinstance(value, ShardedObject)],
        "error": None,
    }


def begin(te: bool = False) -> None:
    """The CPU lane, one process that is a group by itself, and random numbers."""
    if te:
        from tests.harness import te_on_cpu

        te_on_cpu.allow()
    from megatron_moe_inject.host import cpu_lane

    cpu_lane.enable()
    if te:
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
    import torch.distributed as dist
    from megatron.core import mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    mpu.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)


def main() -> None:
    models = json.load(sys.stdin)
    begin("--te" in sys.argv)
    results = {}
    for name, flags in models.items():
        try:
            results[name] = stored(built(flags))
        except (Exception, SystemExit) as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
