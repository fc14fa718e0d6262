"""Our GPT entry with a stand-in for the package that reads conversations for ``--sft``.

Megatron's ``SFTDataset`` wants ``datasets`` for one call; here that call reads JSON lines.
"""

import json
import sys
import types
from pathlib import Path

from megatron_moe_inject.host import gpt_entry


class Lines(list):
    """The lines of a file, each an object."""


def load_dataset(kind: str, data_files: str, split: str) -> Lines:
    """``datasets.load_dataset`` of one local file of JSON lines."""
    assert (kind, split) == ("json", "all"), (kind, split)
    return Lines(map(json.loads, Path(data_files).read_text().splitlines()))


if __name__ == "__main__":
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = load_dataset
    gpt_entry.main()
