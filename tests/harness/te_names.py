"""Our entry with the names of norms that Transformer Engine's layers give them in a checkpoint.

Local layers store the norm in front of experts as if it lay in a linear layer behind it, as that in
front of a dense MLP does with Transformer Engine.
"""

from megatron.core.transformer.transformer_layer import TransformerLayer

_stock = TransformerLayer.sharded_state_dict


def _sharded_state_dict(self, *args, **kwargs):
    spec = self.submodules_config
    names = spec.sharded_state_dict_keys_map
    spec.sharded_state_dict_keys_map = {k: v for k, v in names.items() if "pre_mlp" not in k}
    try:
        return _stock(self, *args, **kwargs)
    finally:
        spec.sharded_state_dict_keys_map = names


if __name__ == "__main__":
    TransformerLayer.sharded_state_dict = _sharded_state_dict
    from megatron_moe_inject.host import gpt_entry

    gpt_entry.main()
