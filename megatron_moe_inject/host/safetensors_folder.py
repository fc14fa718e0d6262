"""A model's safetensors files in a Hugging Face folder: which there are, and what each one holds.

Headers alone are read; every mistake is one error in the words of whoever asks (his flag or key).

A symbolic link is followed inside the folder, and where the folder is a snapshot in the cache of
``huggingface_hub``, whose files are links to ``blobs`` beside ``snapshots``. Any other link is an
error: what it points to may be no part of the model.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_moe_inject.host.errors import RecipeError, listing, one_line, show
from megatron_moe_inject.host.files import is_plain_name
from megatron_moe_inject.host.safetensors_file import (
    DamagedFileError,
    SafetensorsFile,
    StoredTensor,
    is_lfs_pointer,
)

INDEX = "model.safetensors.index.json"
ONLY_FILE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth")

Error = Callable[[str, str], RecipeError]
"""Makes the error of a problem, which follows the folder's name, and a remedy."""

_AGAIN = "copy the folder again from its source"


def read_json(folder: Path, name: str, error: Error) -> dict[str, Any]:
    """A mapping in a JSON file of the folder.

    Raises:
        RecipeError: no such file, a damaged one, or no mapping.
    """
    path = folder / name
    try:
        if is_lfs_pointer(path):
            raise error(f"holds {name} as a pointer of git-lfs", "run git lfs pull in it")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        if isinstance(problem, RecipeError):
            raise
        reason = getattr(problem, "strerror", None) or one_line(str(problem))
        raise error(f"has no readable {name} ({reason})", _AGAIN) from None
    if not isinstance(content, dict):
        raise error(f"has a damaged {name} (it is no mapping)", _AGAIN)
    return content


def weight_map(folder: Path, error: Error) -> dict[str, str]:
    """The index: each tensor's file, a plain name.

    Raises:
        RecipeError: there is none, or it is damaged.
    """
    files = read_json(folder, INDEX, error).get("weight_map")
    if not isinstance(files, dict):
        raise error(f"has a damaged {INDEX} (no weight_map)", _AGAIN)
    for name in files.values():
        if not is_plain_name(name):
            raise error(f"names a file {show(name)} in {INDEX}, which is none of its own", _AGAIN)
    return files


def refuse_foreign_link(folder: Path, path: Path, error: Error) -> None:
    """RecipeError where ``path`` leads to what is neither the folder's nor its cache's."""
    real, root = path.resolve(), folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise error(
            f"holds {path.relative_to(folder)}, a symbolic link out of it, which is not followed",
            "copy the folder with the files themselves (cp -rL)",
        )


class TensorFiles(Protocol):
    """Files of tensors, as ``SafetensorsFolder`` has them."""

    @property
    def files(self) -> Mapping[str, SafetensorsFile]:
        """By name, in the order of names."""
        ...

    @property
    def file_of(self) -> Mapping[str, SafetensorsFile]:
        """The file of each tensor, by files and then by place in them."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        ...

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """A tensor, or its slice at ``index`` on the leading axes, as it is stored."""
        ...

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, some at a time."""
        ...


@dataclass(frozen=True)
class SafetensorsFolder:
    """Every file of the model's weights.

    Attributes:
        files: by name, in the order of names.
        file_of: the file of each tensor, by files and then by place in them.
    """

    files: dict[str, SafetensorsFile]
    file_of: dict[str, SafetensorsFile]
    _error: Error

    @classmethod
    def open(cls, folder: Path, error: Error) -> SafetensorsFolder:
        """Read the index and all headers.

        Raises:
            RecipeError: no such files, one that is missing, damaged or behind a link that leads
                elsewhere, a tensor that the index names and its file lacks, or that two files hold.
        """
        indexed = weight_map(folder, error) if (folder / INDEX).exists() else None
        names = sorted(set(indexed.values())) if indexed is not None else [ONLY_FILE]
        if indexed is not None and ONLY_FILE not in names and (folder / ONLY_FILE).exists():
            raise error(
                f"holds both {INDEX} and {ONLY_FILE}, which it does not name",
                "remove the one that is not the model's",
            )
        _refuse_missing(folder, names, error)
        files = {name: _opened(folder, name, error) for name in names}
        file_of: dict[str, SafetensorsFile] = {}
        for file in files.values():
            for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.begin):
                if tensor.name in file_of:
                    both = f"{file_of[tensor.name].path.name} and {file.path.name}"
                    raise error(f"holds {tensor.name} twice, in {both}", _AGAIN)
                file_of[tensor.name] = file
        for name, at in (indexed or {}).items():
            if name not in file_of or file_of[name].path.name != at:
                raise error(f"names {name} in {INDEX}, which {at} does not hold", _AGAIN)
        if not file_of:
            raise error("holds no tensors", _AGAIN)
        return cls(files, file_of, error)

    def stored(self, name: str) -> StoredTensor:
        """What the header says of a tensor."""
        return self.file_of[name].tensors[name]

    def read(self, name: str, index: tuple[int, ...] = ()) -> torch.Tensor:
        """A tensor, or its slice at ``index`` on the leading axes, as it is stored.

        Raises:
            RecipeError: it cannot be read.
        """
        with self._reading(name) as file:
            return file.read(name, index)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, some at a time.

        Raises:
            RecipeError: they cannot be read.
        """
        with self._reading(name) as file:
            yield from file.chunks(name)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[SafetensorsFile]:
        file = self.file_of[name]
        try:
            yield file
        except DamagedFileError as problem:
            raise self._error(f"holds {file.path.name}, which {problem}", problem.remedy) from None
        except OSError as problem:
            reason = problem.strerror or type(problem).__name__
            raise self._error(f"cannot give {name} ({reason})", _AGAIN) from None


def _refuse_missing(folder: Path, names: list[str], error: Error) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    if missing != [ONLY_FILE]:
        text = f"lacks {listing(missing, 3)}, which its index names"
        raise error(text, "download the rest of it (hf download goes on where it stopped)")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise error(f"holds {listing(shards, 2)}, but no {INDEX}", _AGAIN)
    quantised = sorted(path.name for path in folder.glob("*.gguf"))
    if quantised:
        raise error(
            f"holds its weights as GGUF ({listing(quantised, 2)})",
            "use the model that it was made from",
        )
    pickled = sorted(path.name for kind in _PICKLED for path in folder.glob(kind))
    if pickled:
        raise error(
            f"holds its weights as {listing(pickled, 2)} and not as safetensors",
            "convert them to safetensors: transformers.AutoModelForCausalLM.from_pretrained(FOLDER,"
            " dtype='auto').save_pretrained(OUT)",
        )
    raise error(
        f"holds neither {ONLY_FILE} nor {INDEX}", "name a folder that save_pretrained() wrote"
    )


def _opened(folder: Path, name: str, error: Error) -> SafetensorsFile:
    path = folder / name
    refuse_foreign_link(folder, path, error)
    try:
        return SafetensorsFile.open(path)
    except DamagedFileError as problem:
        raise error(f"holds {name}, which {problem}", problem.remedy) from None
    except OSError as problem:
        reason = problem.strerror or type(problem).__name__
        raise error(f"holds {name}, which cannot be read ({reason})", _AGAIN) from None
