"""Routing profiles: what is written is read, what is damaged is refused, what is merged adds up."""

import copy
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.experts.choose.profile_file import (
    merge_profiles,
    profile_checksum,
    read_profile,
    write_profile,
)
from megatron_moe_inject.experts.choose.routing_profile import (
    RouterSettings,
    RoutingProfile,
    Spread,
)
from megatron_moe_inject.host.errors import (
    RecipeError,
)
from tests.harness.profiles import changed, profile, provenance, statistics

ARRAYS = ("tokens", "selections", "gate_sums", "prob_sums", "dropped", "coselections")


def assert_same(a, b):
    assert a.provenance == b.provenance
    assert a.parts == b.parts
    assert list(a.classes) == list(b.classes)
    for name, ours in a.classes.items():
        theirs = b.classes[name]
        assert ours.data == theirs.data
        for key in ARRAYS:
            x, y = getattr(ours, key), getattr(theirs, key)
            assert (x is None) == (y is None), key
            if x is not None:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)
        assert (ours.spread is None) == (theirs.spread is None)
        if ours.spread is not None:
            assert ours.spread.sequences == theirs.spread.sequences
            np.testing.assert_array_equal(ours.spread.share_sums, theirs.spread.share_sums)
            np.testing.assert_array_equal(ours.spread.share_squares, theirs.spread.share_squares)


def message_of(call):
    with pytest.raises(RecipeError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def sign(plain):
    """The checksum as the format defines it: SHA-256 over sorted, tight JSON of the content."""
    content = {key: plain[key] for key in ("parts", "provenance", "classes")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**plain, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.fixture
def written(tmp_path):
    """A file and its plain content."""
    path = tmp_path / "p.json"
    write_profile(path, profile())
    return path, json.loads(path.read_text())


@settings(max_examples=20)
@given(
    seed=st.integers(0, 99),
    experts=st.sampled_from([1, 2, 5, 8]),
    layers=st.sampled_from([(0,), (1, 2), (0, 3, 7)]),
    spread=st.booleans(),
    pairs=st.booleans(),
    dropped=st.booleans(),
)
def test_round_trip(tmp_path_factory, seed, experts, layers, spread, pairs, dropped):
    capacity = 1.25 if dropped else None
    router = RouterSettings(experts, min(2, experts), "sigmoid", expert_capacity_factor=capacity)
    source = provenance(experts, moe_layers=layers, router=router, checkpoint='/ü \n"x')
    options = {"spread": spread, "pairs": pairs, "dropped": dropped}
    ours = RoutingProfile(source, {"a-1": statistics(source, seed, 3, **options, data=["/ü", "1"])})
    path = tmp_path_factory.mktemp("profile") / "p.json"
    checksum = write_profile(path, ours)
    found = read_profile(path)
    assert_same(found, ours)
    assert checksum == profile_checksum(found) == profile_checksum(ours)
    assert checksum == sign(json.loads(path.read_text()))["sha256"]


def test_white_space_and_order_do_not_matter(written):
    path, plain = written
    path.write_text(json.dumps(dict(reversed(plain.items())), indent=3))
    assert_same(read_profile(path), profile())


def test_integral_sums_may_lose_their_point(tmp_path):
    ours = profile()
    gates = np.where(ours.classes["code"].selections > 0, 3.0, 0.0)
    ours = changed(ours, "code", gate_sums=gates)
    path = tmp_path / "p.json"
    write_profile(path, ours)
    assert " 3.0" in path.read_text()
    path.write_text(path.read_text().replace("3.0,", "3,"))
    assert_same(read_profile(path), ours)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is damaged or no JSON"),
        (b"\xff\xfe", "cannot be read (not UTF-8 text)"),
        (b"[]", "is not a routing profile"),
        (b"{}", "is not a routing profile"),
        (b'{"format": "other"}', "is not a routing profile"),
        (b'{"a": 1, "a": 2}', "has a key twice among a"),
        (b'{"a": NaN}', "has the number NaN"),
        (b'{"a": -Infinity}', "has the number -Infinity"),
        (b"[" * 200_000, "is nested too deeply"),
        (b"1" * 9999, "is damaged or no JSON"),
    ],
)
def test_files_that_are_no_profile(tmp_path, content, part):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    message = message_of(lambda: read_profile(path))
    assert message.startswith(f"{path}: {part}")
    assert ";" in message or "format" in message


def test_missing_file_and_folder(tmp_path):
    message = message_of(lambda: read_profile(tmp_path / "none.json"))
    assert message.startswith(f"{tmp_path}/none.json: cannot be read (No such file")
    assert "Is a directory" in message_of(lambda: read_profile(tmp_path))


def test_every_truncation_is_refused(written):
    path, _ = written
    text = path.read_text()
    for length in range(0, len(text) - 2, max(1, len(text) // 60)):
        path.write_text(text[:length])
        assert str(path) in message_of(lambda: read_profile(path))


def test_every_changed_number_is_refused(written):
    """A digit that changes no value (the last of a long float) may pass; nothing else does."""
    path, plain = written
    text = path.read_text()
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    refused = 0
    for at in digits[:: len(digits) // 80]:
        other = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        path.write_text(other)
        if json.loads(other) == plain:
            read_profile(path)
        else:
            assert str(path) in message_of(lambda: read_profile(path))
            refused += 1
    assert refused > 60


def test_other_versions_and_checksums(written):
    path, plain = written
    for version in (0, 2, "1", True, None):
        path.write_text(json.dumps({**plain, "version": version}))
        message = message_of(lambda: read_profile(path))
        assert f"version: {version!r} is not known here; this package reads version 1" in message
    path.write_text(json.dumps({**plain, "sha256": "0" * 64}))
    assert "sha256: does not fit the content" in message_of(lambda: read_profile(path))


def at(path, value):
    """A change of the plain content: the dotted path set to a value, or deleted with ``...``."""

    def change(plain):
        *front, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        node = plain
        for part in front:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value

    return change


CONTRADICTIONS = [
    # structure
    (at("parts", ...), "parts: is missing"),
    (at("surprise", 1), "surprise: is not known in this version"),
    (at("classes", []), "classes: is not a mapping"),
    (at("classes", {}), "classes: is empty"),
    (at("classes.a b", {}), "classes.a b.data: is missing"),
    (at("classes.code", None), "classes.code: is not a mapping"),
    (at("classes.code.extra", 1), "classes.code.extra: is not known"),
    (at("classes.code.spread", ...), "classes.code.spread: is missing"),
    (at("classes.code.data", "x"), "classes.code.data: 'x' is not a list"),
    (at("classes.code.spread.sequences", "3"), "spread.sequences: '3' is not an integer"),
    (at("provenance.router.topk", ...), "provenance.router.topk: missing; record the profile"),
    (at("provenance.router.top_k", 2), "provenance.router.top_k: unknown key; did you mean topk?"),
    (at("provenance.checkpoint", 5), "provenance.checkpoint: 5 is not a string"),
    # provenance
    (at("provenance.sequence_length", 0), "provenance.sequence_length: 0 is not positive"),
    (at("provenance.router.topk", 9), "provenance.router.topk: 9 of 8 experts"),
    (at("provenance.router.num_moe_experts", -8), "num_moe_experts: -8 is not positive"),
    (at("provenance.last_iteration", 99), "last_iteration: 99 does not follow first_iteration 100"),
    (at("provenance.moe_layers", []), "moe_layers: [] are not rising"),
    (at("provenance.moe_layers", [1, 3, 2]), "moe_layers: [1, 3, 2] are not rising"),
    (at("provenance.moe_layers", [1, 2, 4]), "moe_layers: 4 is beyond num_layers 4"),
    (at("provenance.parameters", 5), "provenance.parameters: 5, but the experts have 24000"),
    # shapes
    (at("provenance.moe_layers", [1, 2]), "tokens: has 3 entries where the provenance says 2"),
    (at("provenance.router.num_moe_experts", 7), "selections[0]: has 8 entries where the"),
    (at("classes.code.tokens", 5), "classes.code.tokens: is not a list"),
    (at("classes.code.selections.1", 5), "classes.code.selections[1]: is not a list"),
    (at("classes.code.gate_sums.2", [1.0]), "gate_sums[2]: has 1 entries"),
    (at("classes.code.coselections.0", []), "coselections[0]: has 0 entries"),
    (at("classes.code.coselections.0.3", [1]), "coselections[0][3]: has 1 entries"),
    # numbers
    (at("classes.code.tokens.0", True), "tokens: has True in the place of an integer"),
    (at("classes.code.tokens.0", 1.0), "tokens: has 1.0 in the place of an integer"),
    (at("classes.code.tokens.0", 2**60), "tokens: has a number beyond 2**53"),
    (at("classes.code.gate_sums.0.0", "1"), "gate_sums[0]: has '1' in the place of a number"),
    (at("classes.code.gate_sums.0.0", 10**400), "gate_sums[0]: has a number beyond 2**53"),
    (at("classes.code.tokens.1", -1), "classes.code.tokens[1]: -1 is negative"),
    (at("classes.code.selections.1.2", -1), "classes.code.selections[1][2]: -1 is negative"),
    (at("classes.code.gate_sums.1.2", -0.5), "classes.code.gate_sums[1][2]: -0.5 is negative"),
    (at("classes.general.prob_sums.0.7", -1e-9), "prob_sums[0][7]: -1e-09 is negative"),
    (at("classes.code.coselections.0.0.0", -1), "coselections[0][0][1]: -1 is negative"),
    (at("classes.code.spread.sequences", -1), "spread.sequences: -1 is negative"),
    (at("classes.code.spread.share_sums.0.0", -1.0), "share_sums[0][0]: -1.0 is negative"),
    # contradictions
    (at("classes.code.tokens.0", 10), "is more than the layer's tokens"),
    (at("classes.code.tokens.0", 321), "640 in sum is not topk 2 times the layer's tokens"),
    (at("classes.code.prob_sums.0.0", 99.0), "in sum is not the number of the layer's tokens"),
    (at("classes.code.spread.sequences", 21), "in sum is not 21, the sequences"),
    (at("classes.code.spread.share_squares.0.2", 0.1), "share_squares[0][2]: 0.1 does not fit"),
    (at("classes.code.spread.share_squares.0.2", 19.0), "share_squares[0][2]: 19.0 does not fit"),
    (at("classes.code.coselections.2.6.0", 999), "in sum is not (topk 2 - 1) times the expert's"),
    (at("classes.code.dropped", [[0] * 8] * 3), "dropped: disagrees with the router's expert_cap"),
    (at("provenance.router.expert_capacity_factor", 1.0), "classes.code.dropped: disagrees"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "part"), CONTRADICTIONS)
def test_contradictions_are_refused_although_signed(written, change, part):
    path, plain = written
    changed_content = copy.deepcopy(plain)
    change(changed_content)
    if all(key in changed_content for key in ("parts", "provenance", "classes")):
        changed_content = sign(changed_content)
    path.write_text(json.dumps(changed_content))
    message = message_of(lambda: read_profile(path))
    assert message.startswith(f"{path}: ")
    assert part in message
    assert "; " in message  # the remedy


def test_an_overflowing_float_is_refused(written):
    path, plain = written
    value = plain["classes"]["code"]["gate_sums"][0][0]
    path.write_text(path.read_text().replace(repr(value), "1e999"))
    assert "gate_sums[0]: has a number beyond 2**53" in message_of(lambda: read_profile(path))


def test_gates_of_an_expert_without_tokens(tmp_path):
    ours = profile()
    found = ours.classes["code"]
    selections = found.selections.copy()
    selections[0, :2] = 0, selections[0, :2].sum()
    wrong = changed(ours, "code", selections=selections, coselections=None)
    message = message_of(lambda: write_profile(tmp_path / "p.json", wrong))
    assert "classes.code.gate_sums[0][0]:" in message
    assert "no token chose" in message
    assert not (tmp_path / "p.json").exists()


def test_more_dropped_than_selected(tmp_path):
    source = provenance(router=RouterSettings(8, 2, expert_capacity_factor=1.0))
    found = statistics(source, dropped=True)
    wrong = replace(found, dropped=found.selections + 1)
    profile_ = RoutingProfile(source, {"code": wrong})
    assert "is more than was selected" in message_of(
        lambda: write_profile(tmp_path / "p.json", profile_)
    )


def test_interrupted_write_leaves_the_old_profile(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    write_profile(path, profile(seed=1))
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_profile(path, profile(seed=2))
    assert_same(read_profile(path), profile(seed=1))


# spread


def test_standard_error_is_that_of_the_sequences():
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.ones(5), size=(2, 40))  # [L, sequences, E]
    spread = Spread(40, shares.sum(1), (shares**2).sum(1))
    np.testing.assert_allclose(spread.error(), shares.std(1, ddof=1) / np.sqrt(40), rtol=1e-9)
    assert Spread(1, shares[:, 0], shares[:, 0] ** 2).error() is None


# merging


def test_merging_adds_what_was_recorded_apart():
    source = provenance()
    parts = [
        RoutingProfile(source, {"code": statistics(source, i, 5 + i, data=["/c", f"/{i}"])})
        for i in range(3)
    ]
    merged = merge_profiles({f"{i}.json": part for i, part in enumerate(parts)})
    found = merged.classes["code"]
    for key in ("tokens", "selections", "gate_sums", "prob_sums", "coselections"):
        total = sum(getattr(part.classes["code"], key) for part in parts)
        np.testing.assert_allclose(getattr(found, key), total, rtol=1e-12)
    assert found.spread.sequences == 5 + 6 + 7
    assert found.data == ("/c", "/0", "/1", "/2")
    assert merged.parts == tuple(sorted(profile_checksum(part) for part in parts))
    backwards = merge_profiles({f"{i}.json": part for i, part in reversed(list(enumerate(parts)))})
    np.testing.assert_array_equal(backwards.classes["code"].selections, found.selections)


def test_merged_error_is_that_of_all_sequences():
    """Split one recording in two: merged, its standard error is that of the whole."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(8), size=(3, 30))

    def part(chosen):
        return Spread(chosen.shape[1], chosen.sum(1), (chosen**2).sum(1))

    base = profile(names=("code",))
    a, b = (changed(base, "code", spread=part(s)) for s in (shares[:, :11], shares[:, 11:]))
    merged = merge_profiles({"a": a, "b": b}).classes["code"]
    np.testing.assert_allclose(merged.share_error(), shares.std(1, ddof=1) / np.sqrt(30), rtol=1e-9)


def test_classes_may_be_disjoint_and_files_round_trip(tmp_path):
    merged = merge_profiles(
        {"a": profile(1, names=("code", "math")), "b": profile(2, names=("general",))}
    )
    assert list(merged.classes) == ["code", "math", "general"]
    write_profile(tmp_path / "m.json", merged)
    assert_same(read_profile(tmp_path / "m.json"), merged)


def test_merging_in_steps_is_merging_at_once():
    parts = {name: profile(i) for i, name in enumerate("abc")}
    stepwise = merge_profiles({"ab": merge_profiles({k: parts[k] for k in "ab"}), "c": parts["c"]})
    assert_same(stepwise, merge_profiles(parts))


def test_no_recording_counts_twice():
    a, b = profile(1), profile(2)
    assert "b: shares recorded tokens with a" in message_of(
        lambda: merge_profiles({"a": a, "b": a})
    )
    both = merge_profiles({"a": a, "b": b})
    message = message_of(lambda: merge_profiles({"both": both, "b": b}))
    assert "b: shares recorded tokens with both" in message
    assert "merge every recording once" in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"checkpoint": "/other"}, "checkpoint is '/other', but '/ckpt/student' in a"),
        ({"last_iteration": 200}, "last_iteration is 200, but 100 in a"),
        ({"sequence_length": 8}, "sequence_length is 8, but 16 in a"),
        ({"num_layers": 9}, "num_layers is 9, but 4 in a"),
        ({"moe_layers": (0, 1, 2), "num_layers": 4}, "moe_layers is [0, 1, 2], but [1, 2, 3]"),
        ({"experts": 16, "liking": 0, "parameters": 240_000}, "num_moe_experts is 16, but 8 in a"),
        ({"topk": 4}, "router.topk is 4, but 2 in a"),
        ({"router": RouterSettings(8, 2, "sigmoid")}, "score_function is 'sigmoid', but 'softmax'"),
        ({"router": RouterSettings(8, 2, enable_expert_bias=True)}, "enable_expert_bias is True"),
        ({"router": RouterSettings(8, 2, num_groups=2)}, "router.num_groups is 2, but None in a"),
    ],
)
def test_other_students_are_refused(change, part):
    other = profile(2, **change)
    message = message_of(lambda: merge_profiles({"a": profile(1), "b": other}))
    assert message.startswith("b: ")
    assert part in message
    assert "one student" in message


def test_a_checkpoint_is_told_by_what_it_holds_where_both_say():
    """Wherever it lies; files of earlier versions say where alone."""
    a = profile(1, checkpoint_sha256="a" * 64, checkpoint_iteration=3)
    moved = profile(2, checkpoint="/copy", checkpoint_sha256="a" * 64, checkpoint_iteration=3)
    assert merge_profiles({"a": a, "b": moved}).provenance.checkpoint == "/ckpt/student"
    other = profile(2, checkpoint_sha256="b" * 64, checkpoint_iteration=3)
    assert "checkpoint_sha256" in message_of(lambda: merge_profiles({"a": a, "b": other}))
    merge_profiles({"a": a, "b": profile(2)})
    away = profile(2, checkpoint="/copy")
    assert "checkpoint is '/copy'" in message_of(lambda: merge_profiles({"a": a, "b": away}))


def test_files_of_earlier_versions_keep_their_checksum(tmp_path):
    write_profile(tmp_path / "new.json", profile(1, checkpoint_sha256="a" * 64))
    write_profile(tmp_path / "old.json", profile(1))
    assert "checkpoint_sha256" in (tmp_path / "new.json").read_text()
    assert "checkpoint_sha256" not in (tmp_path / "old.json").read_text()
    assert read_profile(tmp_path / "new.json").provenance.checkpoint_sha256 == "a" * 64


def test_megatron_versions_are_joined():
    a = profile(1, megatron_version="0.19.2")
    b = profile(2, megatron_version="0.18.2")
    merged = merge_profiles({"a": a, "b": b})
    assert merged.provenance.megatron_version == "0.18.2, 0.19.2"


@pytest.mark.parametrize("optional", ["spread", "coselections"])
def test_half_a_record_is_not_lost_in_silence(optional):
    bare = changed(profile(2), "code", **{optional: None})
    message = message_of(lambda: merge_profiles({"a": profile(1), "b": bare}))
    assert f"class code has {optional} in a only" in message
    both = changed(profile(1), "code", **{optional: None})
    assert getattr(merge_profiles({"a": both, "b": bare}).classes["code"], optional) is None
