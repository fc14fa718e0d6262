"""A Hugging Face folder: its configuration, and its tensors by logical name, whatever stores them.

A logical tensor is what ``transformers`` would have in its state dict, had the model not been
quantised: ``X`` alone where the folder holds FP8 codes and scales or MXFP4 blocks and scales.
Opening reads the configuration and the files' headers and no weights; every mistake is an error
then. Nothing is fetched from a network, no code of the folder runs, nothing pickled is opened.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.convert.published import Fp8Blocks, Mxfp4, Plain, Storage
from megatron_moe_inject.experts.fp8 import blocks as fp8_blocks
from megatron_moe_inject.host.errors import RecipeError, one_line, show_path
from megatron_moe_inject.host.safetensors_file import is_lfs_pointer
from megatron_moe_inject.host.safetensors_folder import (
    INDEX,
    SafetensorsFolder,
    TensorFiles,
    read_json,
    refuse_foreign_link,
)

CONFIG = "config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".ot", ".npz",
)  # fmt: skip
_OTHER_INDEX = (".safetensors.index.json", ".bin.index.json")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError)
_SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


class HfFolder:
    """A folder that ``save_pretrained`` wrote or that was downloaded; see ``open``.

    Attributes:
        path: of the folder.
        json: ``config.json`` as it is.
        config: what ``transformers.AutoConfig`` makes of it.
        files: its safetensors files.
        names: logical tensors, in the files' order.
    """

    def __init__(self, flag: str, path: Path) -> None:
        self._flag = flag
        self.path = path
        self._check_place()
        self.json: Mapping[str, Any] = read_json(path, CONFIG, self.error)
        self._storages = self._known_storages()
        self.config = self._read_config()
        self._enter(SafetensorsFolder.open(path, self.error))

    @classmethod
    def open(cls, flag: str, path: str | Path) -> HfFolder:
        """Open one.

        Args:
            flag: what names it, for messages.
            path: of the folder.

        Raises:
            RecipeError: no such folder, or one that is damaged, incomplete, not in safetensors, or
                quantised in a way that is not known here.
        """
        return cls(flag, Path(path).expanduser())

    def seen_as(self, files: TensorFiles, json: Mapping[str, Any], config: Any) -> HfFolder:
        """The same folder with other files of weights and another configuration."""
        seen = copy.copy(self)
        seen.json, seen.config = json, config
        seen._enter(files)
        return seen

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "flag: path problem; remedy"."""
        return RecipeError(f"{self._flag}: {show_path(self.path)} {problem}; {remedy}", self._flag)

    def __contains__(self, name: object) -> bool:
        return name in self._storage_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape; a tensor in MXFP4 has that of the one ``transformers`` makes of it."""
        stored = {ending: tensor.shape for ending, tensor in self._stored(name).items()}
        shape = self._storage_of[name].shape(stored)
        assert shape is not None, "looked at when the folder was opened"
        return shape

    def dtype(self, name: str) -> torch.dtype:
        """Logical type: bfloat16 for what is quantised."""
        stored = {ending: tensor.dtype for ending, tensor in self._stored(name).items()}
        return self._storage_of[name].dtype(stored)

    def storage(self, name: str) -> str:
        """ "plain", "fp8" or "mxfp4"."""
        return self._storage_of[name].kind

    def storage_of(self, name: str) -> Storage:
        """How it is stored."""
        return self._storage_of[name]

    def logical(self, stored: str) -> tuple[str, str]:
        """The logical name of a stored tensor, and the ending that the stored one has besides."""
        return self._logical[stored]

    def size(self, name: str) -> int:
        """Bytes stored."""
        return sum(tensor.bytes for tensor in self._stored(name).values())

    def read(
        self, name: str, index: tuple[int, ...] = (), dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A logical tensor on the host, decoded.

        Args:
            index: on its leading axes, where one slice alone is wanted: no other bytes are read.
                Not on the two axes of a quantised matrix.
            dtype: what to round to, once; default ``self.dtype(name)``.

        Raises:
            RecipeError: a file cannot be read.
        """
        matrix_axes = 0 if self.storage(name) == "plain" else 2
        assert len(index) <= len(self.shape(name)) - matrix_axes, (name, index)
        pieces = self._pieces(name, index)
        return self._storage_of[name].decode(pieces, dtype or self.dtype(name))

    def pieces(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of a logical tensor, by the endings of its storage."""
        return self._pieces(name, ())

    def raw(self, name: str) -> dict[str, torch.Tensor]:
        """What is stored of a logical tensor, by the names there."""
        return {name + ending: piece for ending, piece in self.pieces(name).items()}

    def plain_files(self) -> tuple[list[Path], list[Path]]:
        """Other files than the model's weights, their index and ``config.json``, as paths within
        the folder: those that belong to a copy of it, and those that hold weights in another form.

        Folders whose names begin with a dot (git's, a download's notes) are left aside.

        Raises:
            RecipeError: a link that leads out of the folder, no plain file, a pointer of git-lfs.
        """
        kept: list[Path] = []
        weights: list[Path] = []
        folders = [self.path]
        while folders:
            folder = folders.pop()
            for path in sorted(folder.iterdir()):
                within = path.relative_to(self.path)
                refuse_foreign_link(self.path, path, self.error)
                if path.is_dir():
                    if not path.name.startswith("."):
                        folders.append(path)
                elif str(within) in (CONFIG, INDEX, *self.files.files):
                    continue
                elif not path.is_file():
                    raise self.error(f"holds {within}, which is no plain file", "remove it")
                elif path.name.endswith((*_WEIGHT_SUFFIXES, *_OTHER_INDEX)):
                    weights.append(within)
                elif is_lfs_pointer(path):
                    raise self.error(
                        f"holds {within}, which is a pointer of git-lfs and not the file itself",
                        "run git lfs pull in it",
                    )
                else:
                    kept.append(within)
        return sorted(kept), sorted(weights)

    def _check_place(self) -> None:
        path = self.path
        if not path.is_dir():
            problem = "is no directory" if path.exists() else "is no directory on this machine"
            text = str(path)
            if not path.exists() and _HUB_NAME.fullmatch(text):
                remedy = f"download the model first: hf download {text} --local-dir DIR; name DIR"
            else:
                remedy = "name the folder of a model"
            raise self.error(problem, remedy)
        if (path / CONFIG).exists():
            return
        snapshots = sorted((path / "snapshots").glob(f"*/{CONFIG}"))
        if snapshots:
            raise self.error(
                "is the cache of a model on the hub",
                f"name a snapshot in it: {snapshots[-1].parent}",
            )
        if (path / "adapter_config.json").exists():
            raise self.error(
                "is an adapter, not a whole model", "merge it into its base model and save that"
            )
        raise self.error(f"has no {CONFIG}", "name a folder that save_pretrained() wrote")

    def _known_storages(self) -> list[Storage]:
        """Those that its ``quantization_config`` announces, beside the plain one."""
        config = self.json.get("quantization_config")
        if config is None:
            return []
        method = config.get("quant_method") if isinstance(config, dict) else config
        if method == "mxfp4":
            return [Mxfp4()]
        blocks = config.get("weight_block_size") if isinstance(config, dict) else None
        if method == "fp8" and blocks == [fp8_blocks.BLOCK] * 2:
            return [Fp8Blocks(power_of_two=config.get("scale_fmt") == "ue8m0")]
        shown = f"weight_block_size {blocks}" if method == "fp8" else f"quant_method {method}"
        raise self.error(
            f"is quantised in a way that is not known here ({one_line(shown)})",
            "use the model in bfloat16, in FP8 by blocks of 128 x 128 or in MXFP4",
        )

    def _read_config(self) -> Any:
        if importlib.util.find_spec("transformers") is None:
            raise self.error(
                "needs the transformers package", "pip install megatron-moe-inject[hf]"
            )
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        try:
            config = transformers.AutoConfig.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )
        except (*_UNREADABLE, StrictDataclassError) as error:
            reason = one_line(str(error) or type(error).__name__, 200)
            raise self.error(
                f"has a {CONFIG} that transformers {transformers.__version__} does not read: "
                f"{reason}",
                "use an architecture that transformers ships, or a newer transformers",
            ) from error
        if not dataclasses.is_dataclass(config):  # whose fields tell what a table does not know
            raise self.error(
                f"is read by transformers {transformers.__version__}, which does not tell the "
                "defaults of its configurations",
                "install transformers 5.24 or later",
            )
        return config

    def _enter(self, files: TensorFiles) -> None:
        """Take the tensors of these files."""
        self.files = files
        self._storage_of: dict[str, Storage] = {}
        self._logical: dict[str, tuple[str, str]] = {}
        for name in files.file_of:
            self._take(name)
        self.names = tuple(self._storage_of)
        for name in self.names:
            self._check_stored(name)

    def _take(self, stored: str) -> None:
        """Enter the logical tensor that a stored one begins or belongs to."""
        for storage in self._storages:
            for ending in storage.endings:
                name = stored.removesuffix(ending)
                names = [name + other for other in storage.endings]
                if stored != name + ending or not all(n in self.files.file_of for n in names):
                    continue
                self._storage_of.setdefault(name, storage)
                self._logical[stored] = (name, ending)
                return
        self._storage_of[stored] = Plain()
        self._logical[stored] = (stored, "")

    def _stored(self, name: str) -> dict[str, Any]:
        endings = self._storage_of[name].endings
        return {ending: self.files.stored(name + ending) for ending in endings}

    def _pieces(self, name: str, index: tuple[int, ...]) -> dict[str, torch.Tensor]:
        endings = self._storage_of[name].endings
        return {ending: self.files.read(name + ending, index) for ending in endings}

    def _check_stored(self, name: str) -> None:
        """RecipeError for codes without scales, scales that do not fit, and other types."""
        storage, stored = self._storage_of[name], self._stored(name)
        types = [tensor.dtype for tensor in stored.values()]
        if storage.kind == "plain":
            fits = not types[0].is_floating_point or types[0].itemsize > 1
            why = "these are codes, whose scales or quantization_config are missing"
        elif storage.kind == "fp8":
            fits = types[0] == fp8_blocks.CODES and types[1] in _SCALES
            why = "codes are float8_e4m3fn, scales one for each block of 128 x 128"
        else:
            fits = types == [torch.uint8] * 2
            why = "blocks are uint8 [..., G, 16], scales uint8 [..., G]"
        shape = storage.shape({ending: tensor.shape for ending, tensor in stored.items()})
        if not fits or shape is None:
            held = ", ".join(f"{t.name} as {t.dtype} {list(t.shape)}" for t in stored.values())
            raise self.error(f"holds {held}: {why}".replace("torch.", ""), "copy it again")
