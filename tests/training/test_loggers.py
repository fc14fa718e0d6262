"""The terms under their names in TensorBoard and in W&B."""

import json

import pytest

from tests.training.test_injection import inject

TAGS = {
    "lm loss",
    "kd loss",
    "total loss",
    "lm loss/code",
    "lm loss/general",
    "kd loss/code",
}

# What Megatron uses of the module; what it logs goes to a file of JSON lines.
WANDB = """
import json, os

config = {}


def init(**settings):
    pass


def finish():
    pass


def log(values, step=None, **_):
    with open(os.environ["LOGGED"], "a") as out:
        numbers = {k: float(v) for k, v in values.items() if hasattr(v, "__float__")}
        out.write(json.dumps({"step": step, **numbers}) + "\\n")
"""


def test_tensorboard(material, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = inject(
        material, extra=("--tensorboard-dir", str(tmp_path), "--tensorboard-log-interval", "1")
    )
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    for tag in TAGS:
        logged = [event.value for event in events.Scalars(tag)]
        assert logged == pytest.approx(run.losses(tag), rel=1e-6), tag


def test_wandb(material, tmp_path):
    logged = tmp_path / "logged"
    (tmp_path / "wandb.py").write_text(WANDB)
    pytest.importorskip("tensorboard")  # Megatron logs to W&B only beside TensorBoard
    flags = (
        *(
            "--wandb-project",
            "inject",
            "--wandb-exp-name",
            "test",
            "--wandb-save-dir",
            str(tmp_path),
        ),
        *("--tensorboard-dir", str(tmp_path / "board"), "--tensorboard-log-interval", "1"),
    )
    run = inject(material, extra=flags, path=[str(tmp_path)], env={"LOGGED": str(logged)})
    by_tag = {}
    for line in logged.read_text().splitlines():
        for tag, value in json.loads(line).items():
            by_tag.setdefault(tag, []).append(value)
    for tag in TAGS:
        assert by_tag[tag] == pytest.approx(run.losses(tag), rel=1e-6), tag
