"""A model of ``examples/models`` at full size, without its weights: what its scripts ask for.

The published configuration, a checkpoint that only says that it is one, the flags that
``import-hf`` would write, a little text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_moe_inject.convert.architectures import architecture_of
from megatron_moe_inject.convert.arguments import shell_arrays
from tests.harness import tiny_models
from tests.harness.checkpoints import write_described
from tests.harness.corpus import write_prepared
from tests.harness.model_scripts import ModelScripts

_MULTIPLE = 128
"""Of a padded vocabulary, as ``import-hf`` has it."""


def full_scripts(name: str, folder: Path, teacher: Path) -> ModelScripts:
    """The scripts of a model whose earlier steps seem to have been taken, but for the profile.

    Args:
        folder: for everything, new.
        teacher: a folder of a dense model.
    """
    hf, student, text = folder / "published", folder / name / "student", folder / "text"
    shutil.copytree(tiny_models.TOKENIZER, hf)
    (hf / "config.json").write_text(json.dumps(tiny_models.published(name)))
    config = tiny_models.config_of(hf)
    rows = -(-config.vocab_size // _MULTIPLE) * _MULTIPLE
    flags = {**architecture_of(config).flags(config), "--padded-vocab-size": rows}
    student.mkdir(parents=True)
    write_described(student, 0)
    (student / "flags.sh").write_text(shell_arrays(str(hf), {"MODEL": flags}))
    text.mkdir()
    write_prepared(text)
    variables = {"HF": hf, "TEACHER": teacher, "TEXT": text}
    return ModelScripts(name, folder, **{k: str(v) for k, v in variables.items()})
