"""What the checkpoint writer writes is read by the plugin and by Megatron, bit for bit."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from tests.harness.checkpoints import whole

COMMON = {"args": Namespace(num_layers=2), "iteration": 0, "checkpoint_version": 3.0}
BY_MEGATRON = """
import sys, torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron.core import dist_checkpointing
tensors = dist_checkpointing.load_plain_tensors(sys.argv[1])
common = dist_checkpointing.load_common_state_dict(sys.argv[1])
torch.save({"tensors": tensors, "layers": common["args"].num_layers}, sys.argv[2])
"""


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def write(folder: Path, **sizes) -> dict[str, torch.Tensor]:
    """A model of two layers and two experts; returns its tensors as they should be stored."""
    experts = random(2, 2, 6, 4, dtype=torch.bfloat16)
    model = {
        "embedding": random(10, 4),
        "layers.norm": random(2, 4),
        "layers.experts": experts,
        "scalar": random(),
    }
    with CheckpointWriter(folder, **sizes) as writer:
        writer.tensor(["embedding"], (10, 4), (), model["embedding"])
        for layer in range(2):
            names = ["layers.norm", "layers.norm_of_another_name"]
            writer.tensor(names, (2, 4), (layer,), model["layers.norm"][layer])
            for expert in range(2):
                half = experts[layer, expert].split(3)
                for begin, rows in ((0, half[0]), (3, half[1])):
                    place = (layer, expert, begin)
                    writer.tensor(["layers.experts"], (2, 2, 6, 4), place, rows)
        writer.tensor(["scalar"], (), (), model["scalar"])
        writer.nothing(f"layers.linear._extra_state/shard_{layer}_2" for layer in range(2))
        writer.finish(COMMON)
    return {**model, "layers.norm_of_another_name": model["layers.norm"]}


@pytest.mark.parametrize("sizes", [{}, {"file_bytes": 3000, "chunk_bytes": 40}])
def test_every_tensor_is_read_back(tmp_path, sizes):
    model = write(tmp_path / "release", **sizes)
    checkpoint = CheckpointPlace("--load", tmp_path / "release").open()
    assert checkpoint.tensors.keys() == model.keys()
    for name, tensor in model.items():
        found = whole(checkpoint, name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert checkpoint.args.num_layers == 2
    files = len(list((tmp_path / "release").glob("*.distcp")))
    assert files > 5 if sizes else files == 1


def test_second_names_take_no_room(tmp_path):
    write(tmp_path / "release")
    metadata = CheckpointPlace("--load", tmp_path / "release").open().metadata
    by_name = {}
    for index, info in metadata.storage_data.items():
        by_name.setdefault(index.fqn, []).append((info.relative_path, info.offset))
    assert by_name["layers.norm"] == by_name["layers.norm_of_another_name"]
    states = [f"layers.linear._extra_state/shard_{layer}_2" for layer in range(2)]
    assert by_name[states[0]] == by_name[states[1]]


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 40])
def test_slices_that_are_the_same_take_no_room(tmp_path, chunk_bytes):
    value = random(6, 4)
    with CheckpointWriter(tmp_path / "release", chunk_bytes=chunk_bytes) as writer:
        writer.tensor(["a", "b"], (2, 3, 6, 4), (1, 0), value, also=[(0, 2), (1, 1)])
        for place in ((0, 0), (0, 1), (1, 2)):
            writer.tensor(["a", "b"], (2, 3, 6, 4), place, torch.zeros(6, 4))
        writer.finish(COMMON)
    assert value.nbytes * 4 <= writer.bytes < value.nbytes * 4 + 60_000
    checkpoint = CheckpointPlace("--load", tmp_path / "release").open()
    for name in "ab":
        found = whole(checkpoint, name)
        assert all(torch.equal(found[at], value) for at in ((1, 0), (0, 2), (1, 1))), name
        assert all(not found[at].any() for at in ((0, 0), (0, 1), (1, 2))), name


def test_megatron_reads_it(tmp_path):
    model = write(tmp_path / "release", file_bytes=3000, chunk_bytes=40)
    words = [sys.executable, "-c", BY_MEGATRON, str(tmp_path / "release"), str(tmp_path / "read")]
    subprocess.run(words, check=True, capture_output=True)
    read = torch.load(tmp_path / "read")
    assert read["layers"] == 2
    assert all(torch.equal(read["tensors"][name], model[name]) for name in model)


def test_a_part_of_a_large_tensor_is_not_stored_with_the_rest(tmp_path):
    with CheckpointWriter(tmp_path / "release") as writer:
        writer.tensor(["rows"], (2, 8), (), random(1000, 8)[:2])
        writer.finish(COMMON)
        assert writer.bytes < 10_000


def test_a_tensor_with_a_gap_is_a_bug(tmp_path):
    with CheckpointWriter(tmp_path / "release") as writer:
        writer.tensor(["rows"], (2, 8), (1,), random(8))
        with pytest.raises(AssertionError, match="rows: 8 of 16"):
            writer.finish(COMMON)
    assert not (tmp_path / "release" / ".metadata").exists()


def test_a_slice_outside_is_a_bug(tmp_path):
    with CheckpointWriter(tmp_path / "release") as writer, pytest.raises(AssertionError):
        writer.tensor(["rows"], (2, 8), (2,), random(8))


def test_a_slice_is_compared_with_the_parts_of_its_place_alone(tmp_path):
    write(tmp_path / "release", chunk_bytes=40)
    checkpoint = CheckpointPlace("--load", tmp_path / "release").open()
    stored = checkpoint.tensors["layers.experts"]
    chunk = ChunkStorageMetadata(torch.Size((1, 0, 0, 0)), torch.Size((1, 1, 6, 4)))
    near = checkpoint._near("layers.experts", chunk)
    assert {tuple(part.offsets[:2]) for part in near.chunks} == {(1, 0)}
    assert len(stored.chunks) == 4 * len(near.chunks)
    both = ChunkStorageMetadata(torch.Size((1, 0, 0, 0)), torch.Size((1, 2, 6, 4)))
    assert checkpoint._near("layers.experts", both) is stored
