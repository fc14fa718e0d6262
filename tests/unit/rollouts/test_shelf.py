"""Which rollouts each step reads: order, age, and what a checkpoint keeps."""

import json

import pytest

from megatron_moe_inject.rollouts.shelf import AgePolicy, Shelf, ShelfFile

ANY = AgePolicy()


def file(name, samples, iteration=0):
    return ShelfFile(name, name * 64, iteration, samples)


def names(places):
    return [(place.file.name, place.sample) for place in places]


def test_files_are_read_in_order_each_sample_once():
    shelf = Shelf()
    shelf.add([file("a", 2), file("b", 3), file("a", 2)])
    assert names(shelf.take(3, 0, ANY)) == [("a", 0), ("a", 1), ("b", 0)]
    shelf.add([file("a", 2), file("c", 1)])
    assert names(shelf.take(9, 0, ANY)) == [("b", 1), ("b", 2), ("c", 0)]
    assert shelf.take(1, 0, ANY) == []
    assert shelf.taken == 6


@pytest.mark.parametrize("before", range(7))
def test_a_checkpoint_keeps_what_is_still_to_be_read(before):
    whole, part = Shelf(), Shelf()
    for shelf in (whole, part):
        shelf.add([file("a", 2), file("b", 3), file("c", 1)])
    expected = names(whole.take(6, 0, ANY))
    found = names(part.take(before, 0, ANY))
    part = Shelf.of_plain(json.loads(json.dumps(part.plain())))
    part.add([file("a", 2)])  # is still in the folder
    assert found + names(part.take(6, 0, ANY)) == expected


def test_what_became_too_old_is_left_out_for_good():
    shelf, age = Shelf(), AgePolicy(max_age=10)
    shelf.add([file("a", 3, iteration=0), file("b", 2, iteration=5)])
    assert names(shelf.take(1, 10, age)) == [("a", 0)]
    assert shelf.waiting(11, age, 9) == 2
    assert names(shelf.take(9, 11, age)) == [("b", 0), ("b", 1)]
    assert (shelf.taken, shelf.stale) == (3, 2)


def test_older_text_is_read_more_rarely_by_half_each_max_age():
    age = AgePolicy(max_age=10, weighed=True)
    for iteration, share in ((10, 1.0), (20, 0.5), (30, 0.25)):
        shelf = Shelf()
        shelf.add([file("a", 4000)])
        first = names(shelf.take(4000, iteration, age))
        assert len(first) / 4000 == pytest.approx(share, abs=0.03)
        again = Shelf()
        again.add([file("a", 4000)])
        assert names(again.take(4000, iteration, age)) == first
        assert shelf.taken + shelf.stale == 4000


def test_looking_takes_nothing():
    shelf = Shelf()
    shelf.add([file("a", 3)])
    assert shelf.waiting(0, ANY, 2) == 2
    assert shelf.waiting(0, ANY, 9) == 3
    assert (len(shelf.files), shelf.next, shelf.taken) == (1, 0, 0)
