"""Headers and tensors of safetensors files, against the library that defines them."""

import json
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_moe_inject.host.safetensors_file import (
    DTYPES,
    DamagedFileError,
    SafetensorsFile,
    header_of,
    is_lfs_pointer,
    stored_bytes,
)

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(string.ascii_letters + string.digits + '._äß"\\ ', min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
PLANS = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6, unique_by=lambda p: p[0]
)
METADATA = st.none() | st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3)


def _filled(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    content = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator)
    if dtype == torch.bool:
        content %= 2
    return content.to(torch.uint8).view(dtype).view(shape)


def _write(path, tensors, metadata=None):
    plan = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    header, places = header_of(plan, metadata)
    with path.open("wb") as file:
        file.write(header)
        for name, place in places.items():
            assert file.tell() == place.begin
            file.write(stored_bytes(tensors[name]))


@settings(max_examples=80)
@given(PLANS, METADATA)
def test_what_is_written_is_what_is_read(tmp_path_factory, plan, metadata):
    """By the reader here, by safetensors, and again from its bytes."""
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    tensors = {n: _filled(DTYPES[d], s, seed) for seed, (n, d, s) in enumerate(plan)}
    _write(path, tensors, metadata)
    file = SafetensorsFile.open(path)
    assert set(file.tensors) == set(tensors)
    assert file.metadata == metadata
    assert len(file.header) % 8 == 0
    assert path.read_bytes().startswith(file.header)
    for name, tensor in tensors.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert stored_bytes(found) == stored_bytes(tensor)
        assert b"".join(map(bytes, file.chunks(name))) == stored_bytes(tensor)
        assert file.tensors[name].begin % tensor.dtype.itemsize == 0
    with safe_open(path, framework="pt") as theirs:
        assert set(theirs.keys()) == set(tensors)
        assert (theirs.metadata() or {}) == (metadata or {})
        for name, tensor in tensors.items():
            assert theirs.get_slice(name).get_shape() == list(tensor.shape)


@settings(max_examples=40)
@given(PLANS)
def test_files_of_the_library_are_read(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    tensors = {n: _filled(DTYPES[d], s, seed) for seed, (n, d, s) in enumerate(plan)}
    tensors = {n: t for n, t in tensors.items() if t.dtype not in UNKNOWN_TO_THE_LIBRARY}
    save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile.open(path)
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert stored_bytes(file.read(name)) == stored_bytes(tensor)


UNKNOWN_TO_THE_LIBRARY = (torch.float8_e8m0fnu,)


@given(st.data())
def test_slices_are_those_of_the_tensor(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    tensor = _filled(torch.bfloat16, tuple(shape), 0)
    _write(path, {"before": tensor.flatten(), "a": tensor})
    axes = data.draw(st.integers(0, len(shape)))
    index = tuple(data.draw(st.integers(0, size - 1)) for size in shape[:axes])
    found = SafetensorsFile.open(path).read("a", index)
    assert stored_bytes(found) == stored_bytes(tensor[index])
    with pytest.raises(IndexError, match="has no"):
        SafetensorsFile.open(path).read("a", (shape[0],))


def _damaged(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        SafetensorsFile.open(path)
    if not content.startswith(b"version"):
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass
    return str(caught.value)


def _with_header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


def _entry(begin=0, end=4, shape=(2,), dtype="BF16"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_file_that_was_cut_off_is_damaged_wherever(tmp_path):
    _write(tmp_path / "whole", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.uint8)})
    whole = (tmp_path / "whole").read_bytes()
    messages = {_damaged(tmp_path, whole[:length]) for length in range(len(whole))}
    assert messages == {"is no whole safetensors file"} | {
        f"is cut off: {length} of {len(whole)} bytes are there"
        for length in range(len(whole) - 14, len(whole))
    }
    assert _damaged(tmp_path, whole + b"x") == "has 1 bytes more than its header tells of"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no whole safetensors file"),
        (b"<!DOCTYPE html><html>Sign in", "no whole safetensors file"),
        (_with_header(b"{'a': 1}"), "damaged header"),
        (_with_header(b"[1, 2]  "), "it is no mapping"),
        (_with_header(b"\xff\xfe    "), "damaged header"),
        (_with_header(b'{"a":' + b"[" * 10**5), "damaged header"),
        (_with_header(json.dumps({"a": _entry(2, 6)}).encode(), b"123456"), "'a' is misplaced"),
        (
            _with_header(json.dumps({"a": _entry(), "b": _entry(2, 6)}).encode(), b"123456"),
            "'b' is misplaced",
        ),
        (_with_header(json.dumps({"a": _entry(0, 5)}).encode(), b"12345"), "size of 'a'"),
        (_with_header(json.dumps({"a": _entry(shape=(-2,))}).encode(), b"1234"), "incomplete"),
        (_with_header(json.dumps({"a": [1]}).encode(), b"1234"), "incomplete"),
        (_with_header(json.dumps({"__metadata__": {"a": 1}}).encode()), "more than texts"),
    ],
)
def test_damaged_headers(tmp_path, content, problem):
    assert problem in _damaged(tmp_path, content)


def test_a_name_that_occurs_twice_is_damage(tmp_path):
    """The library takes the last one."""
    entry = json.dumps(_entry())
    path = tmp_path / "a.safetensors"
    path.write_bytes(_with_header(f'{{"a":{entry},"a":{entry}}}'.encode(), b"1234"))
    with pytest.raises(DamagedFileError, match="a name occurs twice"):
        SafetensorsFile.open(path)


def test_types_that_are_not_known_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(_with_header(json.dumps({"a": _entry(dtype="F4")}).encode(), b"1234"))
    with pytest.raises(DamagedFileError, match="holds a as 'F4'"):
        SafetensorsFile.open(path)


def test_pointers_of_git_lfs_are_known(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    assert "a pointer of git-lfs" in _damaged(tmp_path, pointer)
    assert is_lfs_pointer(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    _write(path, {"a": torch.ones(100)})
    file = SafetensorsFile.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match="ends within a"):
        file.read("a")
    with pytest.raises(DamagedFileError, match="ends within a"):
        list(file.chunks("a"))
