"""The terms under their names in TensorBoard and in W&B, the real package where it is installed."""

import json

import pytest

from tests.harness import wandb_file
from tests.harness.injection import inject
from tests.harness.training_recipes import STEERED

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


def wandb_flags(folder):
    pytest.importorskip("tensorboard")  # Megatron logs to W&B only beside TensorBoard
    return (
        *("--wandb-project", "inject", "--wandb-exp-name", "test"),
        *("--wandb-save-dir", str(folder)),
        *("--tensorboard-dir", str(folder / "board"), "--tensorboard-log-interval", "1"),
    )


def test_wandb(material, tmp_path):
    """By a stand-in, which is there everywhere."""
    logged = tmp_path / "logged"
    (tmp_path / "wandb.py").write_text(WANDB)
    flags = wandb_flags(tmp_path)
    run = inject(material, extra=flags, path=[str(tmp_path)], env={"LOGGED": str(logged)})
    by_tag = {}
    for line in logged.read_text().splitlines():
        for tag, value in json.loads(line).items():
            by_tag.setdefault(tag, []).append(value)
    for tag in TAGS:
        assert by_tag[tag] == pytest.approx(run.losses(tag), rel=1e-6), tag


def test_the_real_wandb_takes_the_terms_and_the_details_by_layer(material, tmp_path):
    """Offline; two stages, each with steered layers, and details every second step."""
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run = inject(material, STEERED, nproc=2, pp=2, extra=wandb_flags(tmp_path), env=quiet)
    steps = wandb_file.logged(tmp_path)
    for place, step in enumerate((1, 2, 3, 4)):
        for tag in (*TAGS, "steering loss", "target share/code"):
            assert steps[step][tag] == pytest.approx(run.losses(tag)[place], rel=1e-6), (step, tag)
        detailed = {tag for tag in steps[step] if tag.startswith("inject-routing/code/")}
        assert bool(detailed) == (step % 2 == 0)
        if detailed:
            shares = [steps[step][f"inject-routing/code/target share/{i}"] for i in (1, 2, 3)]
            assert sum(shares) / 3 == pytest.approx(steps[step]["target share/code"], rel=1e-4)
            assert {f"inject-routing/code/balance outside/{i}" for i in (1, 2, 3)} <= detailed
