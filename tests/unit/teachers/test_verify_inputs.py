"""Checksums that the user has: every file that is read needs one, and a flipped bit is found."""

import hashlib
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_flags
from megatron_moe_inject.teachers import verify_inputs as module
from megatron_moe_inject.teachers.sources import SOURCES, SourceKind
from tests.harness.checksums import write_sums

READ = ("model.safetensors", "config.json", "tokenizer.json")


@pytest.fixture
def folders(tmp_path):
    hf, megatron = tmp_path / "hf", tmp_path / "saved"
    hf.mkdir()
    for name in (*READ, "README.md", "old.safetensors"):
        (hf / name).write_bytes(name.encode() * 9)
    step = megatron / "iter_0000007"
    (step / "tokenizer").mkdir(parents=True)
    for name in ("__0_0.distcp", "common.pt", ".metadata", "metadata.json", "tokenizer/t.json"):
        (step / name).write_bytes(name.encode() * 9)
    (megatron / "latest_checkpointed_iteration.txt").write_text("7\n")
    return hf, megatron


def verify(source, ranks=3, load=None, **args):
    recipe = recipe_from_flags(data=[0], experts="0:1", teacher=source)
    args = Namespace(load=load, **args)
    said, errors = [], []
    for rank in range(ranks):
        try:
            said.append(module._verify(recipe, args, (rank, ranks), (rank, ranks)))
        except RecipeError as error:
            errors.append(str(error))
    return said, errors


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


def test_a_teacher_that_is_no_folder_has_no_files():
    kind = SourceKind("served:URL", None, None, is_folder=False)
    with SOURCES.registered("served", kind):
        said, errors = verify("served:somewhere", ranks=1)
    assert errors == []
    assert said == ["verified inputs: teacher teacher: not checked, since it is no folder"]


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_one_rank_finds_a_flipped_bit(folders, kind):
    folder = dict(zip(("hf", "megatron"), folders, strict=True))[kind]
    root, weights = folder, "model.safetensors"
    if kind == "megatron":
        root, weights = folder / "iter_0000007", "tokenizer/t.json"
    write_sums(root)
    said, errors = verify(f"{kind}:{folder}")
    assert (len(said), errors) == (3, [])
    assert "verified inputs: teacher teacher: " in said[0]
    (root / "README.md").write_text("changed, and never read") if kind == "hf" else None
    flip(root / weights)
    said, errors = verify(f"{kind}:{folder}")
    assert len(errors) == 1
    assert errors[0].startswith(f"teachers.teacher.source: '{kind}:")
    assert f"is damaged or was changed: {weights} has the SHA-256" in errors[0]


def test_every_file_that_is_read_needs_a_checksum(folders):
    hf, _ = folders
    said, errors = verify(f"hf:{hf}")
    assert not said
    assert len(set(errors)) == 1
    assert f"has files without a checksum ({', '.join(READ)})" in errors[0]
    for name in READ:
        digest = hashlib.sha256((hf / name).read_bytes()).hexdigest()
        (hf / f"{name}.sha256").write_text(f"{digest}  elsewhere/{name}\n")
    assert verify(f"hf:{hf}")[1] == []
    flip(hf / "config.json")
    assert "config.json has the SHA-256" in verify(f"hf:{hf}")[1][0]


def test_the_students_checkpoint_where_it_has_checksums(folders):
    hf, megatron = folders
    write_sums(hf)
    said, _ = verify(f"hf:{hf}", load=str(megatron))
    assert "iter_0000007: not checked, since it has no SHA256SUMS" in said[0]
    write_sums(megatron / "iter_0000007")
    assert "5 files" in verify(f"hf:{hf}", load=str(megatron))[0][0].splitlines()[-1]
    flip(megatron / "iter_0000007" / "__0_0.distcp")
    _, errors = verify(f"hf:{hf}", load=str(megatron), ckpt_step=7)
    assert len(errors) == 1
    assert errors[0].startswith("--load: ")
    assert " is damaged or was changed: __0_0.distcp" in errors[0]


def test_shares_are_a_partition_and_even(tmp_path):
    files = [tmp_path / f"f{i}" for i in range(9)]
    for i, file in enumerate(files):
        file.write_bytes(b"x" * (10 * i + 1))
    shares = [module._share(files, rank, 4) for rank in range(4)]
    assert sorted(path for share in shares for path in share) == sorted(files)
    sizes = [sum(path.stat().st_size for path in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert module._share(files[:1], 2, 4) == []
