"""Files are replaced whole or not at all, whatever interrupts the writer."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_moe_inject.files import replace_file, try_file
from megatron_moe_inject.typed import RecipeError


def test_new_content_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    replace_file(path, b"one")
    replace_file(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    expected = RecipeError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        replace_file(path, b"new")
    if isinstance(error, OSError):
        assert f"'{path}' cannot be written (No space left on device)" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_place_is_tried_without_a_trace(tmp_path):
    (tmp_path / "file").write_bytes(b"here")
    for path in (tmp_path / "file", tmp_path / "new.json", tmp_path / "a" / "b" / "new.json"):
        try_file(path, "--flag")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]
    assert (tmp_path / "file").read_bytes() == b"here"
    assert os.listdir(tmp_path / "a" / "b") == []
    for path, reason in (
        (tmp_path / "a", "Is a directory"),
        (tmp_path / "file" / "new.json", "File exists"),
        (tmp_path / "nu\0ll", "ValueError"),
    ):
        with pytest.raises(RecipeError) as caught:
            try_file(path, "--flag")
        assert str(caught.value).startswith(f"--flag: {path} cannot be written ({reason})")


@pytest.mark.parametrize(("step", "left"), [("fsync", b"old"), ("replace", b"old")])
def test_killed_writer_leaves_the_old_file(tmp_path, step, left):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = textwrap.dedent(
        f"""
        import os, signal
        from megatron_moe_inject.files import replace_file, try_file
        os.{step} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        replace_file({str(path)!r}, b"new" * 1000)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == left
    replace_file(path, b"later")
    assert path.read_bytes() == b"later"


def test_links_keep_pointing(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to("real.bin")
    replace_file(tmp_path / "link.bin", b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


def test_missing_folder(tmp_path):
    with pytest.raises(RecipeError, match="No such file or directory"):
        replace_file(tmp_path / "none" / "a.bin", b"")
