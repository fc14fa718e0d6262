"""The strengthened teacher's parts: prompts, the reward, and folders in the models' shapes."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "strengthened_teacher"
sys.path.insert(0, str(EXAMPLE))

import reward  # noqa: E402

PROMPT = "def f(x):\n    if x:"


@pytest.mark.parametrize(
    ("completion", "ended", "earned"),
    [
        ("\n        return 1\n", False, 1.0),
        ("\n        return 1\n    return (", False, 1.0),  # the last line was cut off
        ("\n        return 1\n    return (", True, 0.5),
        ("\n        return 1\n\n    return (\n", False, 0.5),
        ("\n        f(1,\n          2)\n", False, 1.0),  # parses with its second line alone
        ("\n    return 1\n", False, 0.0),  # no block behind the colon
        ("\n        x = )\n        return 1\n", False, 0.0),  # behind a mistake nothing counts
        ("\n        return", False, 0.0),
        ("\n        return", True, 1.0),
        ("", True, 0.0),
        ("\n\n", False, 0.0),
        ("\n        x = '\0'\n", False, 0.0),
    ],
)
def test_the_reward_is_the_share_of_whole_lines_that_parse(completion, ended, earned):
    assert reward.reward(PROMPT, completion, ended) == earned


def test_prompts_end_where_a_block_must_follow():
    text = (
        "import os\n\ndef f(x):\n    if x:\n        return 1\n    else:\n        return 2\n"
        "X = {1: 2,\n 3:\n 4}\nclass A:\n    y = 1\n"
    )
    prompts = reward.prompts_of(text)
    assert prompts == [
        "def f(x):",
        "def f(x):\n    if x:",
        "def f(x):\n    if x:\n        return 1\n    else:",
        "class A:",
    ]
    assert all(not reward.parses(prompt) for prompt in prompts)


def test_held_out_prompts_are_of_held_out_modules(monkeypatch):
    documents = [
        reward.corpora.Document(f"module{i}", f"def f{i}(x):\n    return {i}\n") for i in range(100)
    ]
    monkeypatch.setattr(reward.corpora, "read_documents", lambda with_tests: ([], documents, []))
    training, held_out = reward.all_prompts(lambda text: {"input_ids": text.split()})
    expected = [i for i in range(100) if reward.corpora.is_held_out(f"module{i}")]
    assert held_out == [f"def f{i}(x):" for i in expected] != []
    assert len(training) == 100 - len(held_out)


def test_the_folders_have_the_shapes_of_the_shipped_models(tmp_path, monkeypatch):
    """Tied heads count once on both sides, so equal numbers of parameters are equal models."""
    transformers = pytest.importorskip("transformers")
    import folders

    monkeypatch.setattr(sys, "argv", ["folders.py", str(tmp_path)])
    folders.main()
    for name in ("teacher", "student"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        shipped = json.loads((ROOT / f"examples/quickstart/models/{name}.json").read_text())
        assert model.num_parameters() == shipped["parameters"]
        assert (tmp_path / name / "tokenizer.json").is_file()
