"""Files are replaced whole or not at all, whatever interrupts the writer."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_moe_inject.host.errors import (
    RecipeError,
)
from megatron_moe_inject.host.files import (
    append_line,
    is_plain_name,
    new_files,
    new_folder,
    replace_file,
    try_file,
)


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
        from megatron_moe_inject.host.files import replace_file
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


@pytest.mark.parametrize("path", ["/", ".", "a\0b"])
@pytest.mark.parametrize("write", [replace_file, append_line])
def test_what_no_file_can_be_called(tmp_path, monkeypatch, write, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="cannot be written"):
        write(path, b"")
    assert os.listdir(tmp_path) == []


def test_plain_names():
    assert all(map(is_plain_name, ("__0_0.distcp", "größe.bin", "a b", ".x", "..x")))
    for name in ("", ".", "..", "/a", "a/b", "../a", "a\\b", "a\0", None, 3, b"a", ["a"]):
        assert not is_plain_name(name), name


def _killed(script):
    code = textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def test_the_next_writer_removes_what_killed_ones_left(tmp_path):
    target = tmp_path / "delta"
    _killed(
        f"""
        import os, signal
        from pathlib import Path
        from megatron_moe_inject.host.files import new_folder, replace_file
        with new_folder(Path({str(target)!r})) as folder:
            (folder / "a").write_bytes(b"a")
            os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            replace_file({str(tmp_path / "a.bin")!r}, b"new")
        """
    )
    others = [tmp_path / name for name in (".delta.more.123.part", ".other.1.part", "delta.1.part")]
    old, young = tmp_path / ".delta.77.part", tmp_path / ".delta.elsewhere-1f.part"
    for folder in (*others, old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    with new_folder(target) as folder:
        (folder / "b").write_bytes(b"b")
        with new_folder(target.with_name("delta.more")):
            pass
        replace_file(target.with_name("a.bin"), b"new")
    kept = {path.name for path in (*others, young)}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"delta", "delta.more", "a.bin"}
    assert os.listdir(target) == ["b"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask_whatever_library_writes(tmp_path, umask):
    """As safetensors, which writes for its owner alone."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "delta") as folder:
            handle = os.open(folder / "a.safetensors", os.O_WRONLY | os.O_CREAT, 0o600)
            os.close(handle)
        replace_file(tmp_path / "a.json", b"{}")
    finally:
        os.umask(before)
    modes = [
        p.stat().st_mode & 0o777 for p in (tmp_path / "delta/a.safetensors", tmp_path / "a.json")
    ]
    assert modes == [0o666 & ~umask] * 2


def test_writers_of_one_name_do_not_meet(tmp_path):
    """As two containers that share a disk and count processes alike."""
    target = tmp_path / "delta"

    def write(first):
        with new_folder(target) as second:
            assert first.exists()
            assert first != second
            target.mkdir()
            (target / "x").touch()

    with new_folder(target) as first:
        (first / "a").write_bytes(b"first")
        with pytest.raises(RecipeError, match=r"cannot be written \(Directory not empty\)"):
            write(first)
        assert first.exists()
        (target / "x").unlink()
    assert (target / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["delta"]


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RecipeError, match="file/x' cannot be written"),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass
    with pytest.raises(RecipeError, match="No space left"), new_folder(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["file"]


def test_missing_folder(tmp_path):
    with pytest.raises(RecipeError, match="No such file or directory"):
        replace_file(tmp_path / "none" / "a.bin", b"")


def test_new_files_take_their_names_together(tmp_path):
    prefix = tmp_path / "deep" / "set"
    with new_files(prefix, (".json", ".idx")) as folder:
        for name in ("set.idx", "set.bin", "set.json"):
            (folder / name).write_bytes(name.encode())
        assert not any(path.suffix != ".part" for path in prefix.parent.iterdir())
    assert sorted(os.listdir(prefix.parent)) == ["set.bin", "set.idx", "set.json"]
    assert (prefix.parent / "set.idx").read_bytes() == b"set.idx"


def _write_set(prefix):
    with new_files(prefix, (".json", ".idx")) as folder:
        for ending in (".idx", "_b.bin", ".json", ".bin"):
            (folder / f"set{ending}").write_bytes(b"new")


def test_new_files_are_named_in_order(tmp_path, monkeypatch):
    rename, named = os.rename, []

    def watched(source, target):
        rename(source, target)
        named.append(target.name)

    monkeypatch.setattr(os, "rename", watched)
    _write_set(tmp_path / "set")
    assert named[2:] == ["set.json", "set.idx"]
    assert sorted(os.listdir(tmp_path)) == sorted(named)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_new_files_are_named_all_or_none(tmp_path, monkeypatch, after):
    rename, named = os.rename, []

    def full(source, target):
        if len(named) == after:
            raise OSError(28, "No space left on device")
        named.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(RecipeError, match=r"set' cannot be written \(No space left on device\)"):
        _write_set(tmp_path / "set")
    assert os.listdir(tmp_path) == []


def test_new_files_do_not_take_the_place_of_others(tmp_path):
    (tmp_path / "set.idx").write_bytes(b"mine")
    with pytest.raises(RecipeError, match=r"set' cannot be written \(File exists\)"):
        _write_set(tmp_path / "set")
    assert os.listdir(tmp_path) == ["set.idx"]
    assert (tmp_path / "set.idx").read_bytes() == b"mine"


def test_killed_before_all_is_whole_there_is_no_last_file(tmp_path):
    for moment in ("fsync", "rename"):
        prefix = tmp_path / "set"
        _killed(
            f"""
            import os, signal
            from pathlib import Path
            from megatron_moe_inject.host.files import new_files
            with new_files(Path({str(prefix)!r}), (".idx",)) as folder:
                (folder / "set.bin").touch()
                (folder / "set.idx").touch()
                os.{moment} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        assert not prefix.with_name("set.idx").exists()
    with new_files(prefix, (".idx",)) as folder:
        (folder / "set.idx").touch()
    assert os.listdir(tmp_path) == ["set.idx"]
