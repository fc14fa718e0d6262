"""Our GPT entry as a script that took ``pretrain`` from Megatron before the plugin was put in."""

import inspect

if __name__ == "__main__":
    from megatron_moe_inject.host import gpt_entry

    gpt_entry.pretrain = inspect.unwrap(gpt_entry.pretrain)
    gpt_entry.main()
