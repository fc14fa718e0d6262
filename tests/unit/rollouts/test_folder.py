"""What the first rank finds in a folder: late, twice, damaged, of another student, too old."""

import os

import pytest

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.rollouts.file_format import Writer
from megatron_moe_inject.rollouts.folder import Folder, News, Student
from megatron_moe_inject.rollouts.shelf import AgePolicy, Shelf
from tests.harness.rollout_files import write

OWN = Writer("ab" * 16, 4)
STUDENT = Student("ab" * 16, "cd" * 32, 2, 61)


@pytest.fixture
def folder(tmp_path):
    def made(age=None):
        age = age or AgePolicy()
        return Folder(tmp_path, STUDENT, sequence_length=32, packed=False, age=age, tokenize=None)

    return made


def look(folder, shelf, iteration=4):
    news = News.of_plain(folder.look(shelf, iteration).plain())
    shelf.add(news.files)
    return news


def test_files_are_found_as_they_come_each_once(folder, tmp_path):
    seen, shelf = folder(), Shelf()
    assert look(seen, shelf) == ([], [], [])
    write(tmp_path, "b.jsonl", 2, writer=OWN)
    write(tmp_path, "a.jsonl", 3, writer=Writer(OWN.injection, 3), seed=1)
    (tmp_path / ".c.jsonl").write_text("half")
    (tmp_path / "d.part").write_text("half")
    assert [(f.name, f.samples, f.iteration) for f in look(seen, shelf).files] == [
        ("a.jsonl", 3, 3),
        ("b.jsonl", 2, 4),
    ]
    write(tmp_path, "c.jsonl", 1, writer=OWN, seed=2)
    assert [f.name for f in look(seen, shelf).files] == ["c.jsonl"]
    assert look(folder(), shelf) == ([], [], [])  # as after a resume


def test_a_folder_that_is_not_there_yet_is_empty(folder, tmp_path):
    other = Folder(
        tmp_path / "x", STUDENT, sequence_length=8, packed=False, age=AgePolicy(), tokenize=None
    )
    assert look(other, Shelf()) == ([], [], [])


def test_what_is_no_file_hides_no_other(folder, tmp_path):
    """A link to nothing, which waits for what it names, a folder, and a pipe without a writer."""
    (tmp_path / "a.jsonl").symlink_to("later")
    (tmp_path / "b.jsonl").mkdir()
    os.mkfifo(tmp_path / "c.jsonl")
    write(tmp_path, "d.jsonl", 2, writer=OWN)
    seen, shelf = folder(), Shelf()
    news = look(seen, shelf)
    assert [f.name for f in news.files] == ["d.jsonl"]
    assert [fault.endswith("is no file") for fault in news.faults] == [True, True]
    write(tmp_path, "later", 1, writer=OWN, seed=1)
    assert [f.name for f in look(seen, shelf).files] == ["a.jsonl"]


def test_a_copy_is_read_once_and_said_once(folder, tmp_path):
    seen, shelf = folder(), Shelf()
    write(tmp_path, "a.jsonl", 2, writer=OWN)
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    news = look(seen, shelf)
    assert [f.name for f in news.files] == ["a.jsonl"]
    assert len(news.copies) == 1
    assert "b.jsonl' is a copy of a.jsonl" in news.copies[0]
    (tmp_path / "c.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert "c.jsonl' is a copy of a.jsonl" in look(seen, shelf).copies[0]
    assert look(seen, shelf) == ([], [], [])


def test_half_a_file_is_said_once_and_read_when_it_is_whole(folder, tmp_path):
    seen, shelf = folder(), Shelf()
    path = write(tmp_path, "a.jsonl", 2, writer=OWN)
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    news = look(seen, shelf)
    assert news.files == []
    assert "a.jsonl' is half a file" in news.faults[0]
    assert look(seen, shelf).faults == []
    path.write_bytes(content)
    assert [f.name for f in look(seen, shelf).files] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("writer", "said"),
    [
        (Writer("ef" * 16, 4), "was written by injection efefefef, not by this injection (abab"),
        (Writer(None, 4, "ee" * 32), "by a checkpoint of no injection (model eeeeeeee)"),
        (Writer(None, 4), "by a checkpoint of no injection (model unknown)"),
    ],
)
def test_another_students_text_is_refused(folder, tmp_path, writer, said):
    write(tmp_path, "a.jsonl", 2, writer=writer)
    news = look(folder(), Shelf())
    assert news.files == []
    assert said in news.faults[0]


def test_the_model_that_an_injection_began_with_may_have_written(folder, tmp_path):
    write(tmp_path, "a.jsonl", 2, writer=Writer(None, 700, "cd" * 32))
    (found,) = look(folder(), Shelf()).files
    assert found.iteration == STUDENT.start_iteration


def test_old_text_is_refused_unless_it_is_weighed(folder, tmp_path):
    write(tmp_path, "a.jsonl", 2, writer=OWN)
    news = look(folder(AgePolicy(10)), Shelf(), iteration=15)
    assert news.files == []
    assert "is of iteration 4, 11 steps ago, where rollouts.max_age is 10" in (news.faults[0])
    assert len(look(folder(AgePolicy(10)), Shelf(), iteration=14).files) == 1
    assert len(look(folder(AgePolicy(10, weighed=True)), Shelf(), iteration=15).files) == 1


def test_text_of_a_checkpoint_to_come_waits(folder, tmp_path):
    seen, shelf = folder(), Shelf()
    write(tmp_path, "a.jsonl", 2, writer=OWN)
    assert look(seen, shelf, iteration=3) == ([], [], [])
    assert [f.name for f in look(seen, shelf, iteration=4).files] == ["a.jsonl"]


def test_what_has_no_token_to_learn_from_is_refused(folder, tmp_path):
    from megatron_moe_inject.rollouts.file_format import write_rollouts

    text = {"prompt": [1, 2], "completion": [3], "mask": [0]}
    write_rollouts(tmp_path / "a.jsonl", OWN, [text])
    assert "has no token to learn from" in look(folder(), Shelf()).faults[0]


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "x").write_text("")
    other = Folder(
        tmp_path / "x", STUDENT, sequence_length=8, packed=False, age=AgePolicy(), tokenize=None
    )
    with pytest.raises(RecipeError, match=r"x' cannot be listed \(Not a directory\)"):
        look(other, Shelf())
