"""What is refused and remarked of teachers before they are loaded."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.load import recipe_from_flags
from megatron_moe_inject.teachers.base import Comparison, TeacherInfo
from megatron_moe_inject.teachers.fit import check_fit, remarks
from megatron_moe_inject.teachers.occurrences import occurrences


def info(shared=None, **more) -> TeacherInfo:
    given = dict(
        name="teacher", source="hf:/t", kind="hf", path="/t", architecture="A", num_layers=2,
        hidden_size=8, vocab_rows=9, vocab_size=9, parameters=1, max_positions=None,
        vocabulary="not compared: why" if shared is None else shared.told,
        shared=shared or Comparison("not compared: why"),
    )  # fmt: skip
    return TeacherInfo(**given | more)


def recipe(**objective):
    return recipe_from_flags(data=[0], experts="0:1", teacher="hf:/t", **objective)


def test_a_prefix_needs_a_position_of_its_own():
    exact = {"teacher": info(max_positions=64, prefix=(2,))}
    check_fit(recipe(), exact, 63)
    check_fit(recipe(), exact, None)
    with pytest.raises(RecipeError) as caught:
        check_fit(recipe(), exact, 64)
    assert str(caught.value) == (
        "teachers.teacher.prefix: hf:/t has positions up to 64, but --seq-length is 64 and ids [2] "
        "stand in front; write prefix: none, or use shorter sequences"
    )
    with pytest.raises(
        RecipeError, match=r"teachers\.teacher\.source: hf:/t has positions up to 64"
    ):
        check_fit(recipe(), exact, 65)


LACKING = Comparison("the same 7 tokens as the student's", True, 9, {7: "<tool>"}, {9: "<bos>"})


def test_reverse_kl_needs_a_teacher_with_all_ids():
    with pytest.raises(RecipeError, match=r"objective\.divergence: 'reverse_kl' is infinite"):
        check_fit(recipe(divergence="reverse_kl"), {"teacher": info(LACKING)}, 8)
    only_more = Comparison("", True, 9, {}, {9: "<bos>"})
    check_fit(recipe(divergence="reverse_kl"), {"teacher": info(only_more)}, 8)
    check_fit(recipe(divergence="jsd"), {"teacher": info(LACKING)}, 8)


def test_remarks():
    assert remarks({"t": info()}, 8, {}) == ["teacher t: not compared: why"]
    sizes = Comparison("sizes agree (9 ids), tokens not compared: /t holds no tokenizer.json")
    assert remarks({"t": info(sizes)}, 8, {}) == [f"teacher t: {sizes.told}"]
    same = Comparison("the same 9 tokens", True, 9)
    assert remarks({"t": info(same, prefix_told="as its tokenizer does")}, 8, {}) == []
    told = "its tokenizer cannot be read, so that nobody knows what stood in front"
    said = remarks({"t": info(same, prefix_told=told, trained_positions=8)}, 8, {})
    assert said == [f"teacher t reads the text with nothing in front ({told})"]
    (said,) = remarks({"t": info(same, trained_positions=8)}, 9, {})
    assert said == (
        "teacher t has rotary positions for 8 tokens and reads 9: it may predict badly beyond the "
        "first 8"
    )
    said = remarks({"t": info(LACKING)}, 8, {})
    assert said[1].endswith("; how often they occur was not counted")


def test_occurrences_are_counted_in_the_beginning(tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    paths = []
    for name, dtype, tokens in (("a", np.uint16, [7, 1, 7, 3]), ("b", np.int32, [1, 8, 7, 7])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        builder.add_document(torch.tensor(tokens), [4])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        paths.append(str(tmp_path / name))
    told = occurrences(paths, {7: "<tool>", 8: "<x>", 9: "<y>"})
    assert told.endswith("(8 in all) occur 7 '<tool>' 4 times, 8 '<x>' 1 times")
    monkeypatch.setattr("megatron_moe_inject.teachers.occurrences.READ", 2)
    told = occurrences(paths, {9: "<y>"})
    assert told == "they do not occur in the first 2 tokens of each of its 2 texts (4 in all)"
    assert occurrences([str(tmp_path / "no")], {7: "x"}) == "how often they occur was not counted"


def test_a_teacher_pass_stands_something_in_for_what_cannot_be_read():
    from megatron_moe_inject.teachers.step_pass import TeacherPass

    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    teacher = SimpleNamespace(logit_transform=None)
    own = TeacherPass(
        teacher, torch.zeros(2, 2), tp_group=group, cp_group=group, share_group=group, window=0,
        unknown=[7, 8],
    )  # fmt: skip
    own._rows = [1, 2]
    own._read(torch.tensor([[1, 2, 3], [1, 7, 3], [8, 7, 2]]))
    assert own._known.tolist() == [[1, 2, 3], [1, 0, 3], [0, 0, 2]]
    assert own.readable().tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert torch.equal(own.readable(1), own.readable()[1:])
