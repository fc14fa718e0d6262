"""A Hugging Face model through real ``pretrain()`` and back: loaded, injected, exported, served.

Logits are compared with those of ``transformers`` on the way in and on the way out.
"""

import filecmp
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe_inject.cli import main
from tests.harness import huggingface, lane
from tests.harness.checkpoints import SAVE
from tests.harness.corpus import write_corpora
from tests.harness.injection import OTHER, PROVEN

LOGITS = (str(lane.HARNESS / "logits_gpt.py"),)
VOCAB = 61
SEQUENCE = 32
RUN = shlex.split(
    f"--seq-length {SEQUENCE} --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --eval-iters 0 "
    "--log-interval 1 --eval-interval 1000 --tokenizer-type NullTokenizer --num-workers 0 "
    f"--vocab-size {VOCAB} --use-cpu-initialization --moe-token-dispatcher-type alltoall"
)
EP2 = ("--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
TP2 = ("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
TP2 = (*TP2, "--sequence-parallel")
RECIPE = """
layer_numbers: gpt
domains:
  - name: code
    data: [1]
    teacher: coder
    experts: {layers: {1: [0, 3], 2: [3]}}
teachers:
  coder: {source: "SOURCE"}
objective: {alpha: 0.7, beta: 0.3}
"""
NEW_EXPERTS = (
    RECIPE.replace("{layers: {1: [0, 3], 2: [3]}}", "{new: all}")
    + """
train: {router_rows: true}
steering: {coeff: 1.0, target_mass: 0.9}
"""
)
CHANGED = {
    f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
    for layer, expert in ((1, 0), (1, 3), (2, 3))
    for name in ("gate", "up", "down")
}


def moe_config():
    import transformers

    sizes = {**huggingface.SIZES, "vocab_size": VOCAB, "num_hidden_layers": 3, "head_dim": 8}
    return transformers.Qwen3MoeConfig(
        **sizes,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def dense_config():
    import transformers

    return transformers.Qwen3Config(**{**huggingface.SIZES, "vocab_size": VOCAB}, head_dim=8)


def stirred(folder: Path, config) -> Path:
    """A random model in which norms and routers count."""
    model = huggingface.save(folder, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.mul_(5)
    model.save_pretrained(str(folder))
    return folder


def options(checkpoint: Path) -> list[str]:
    """Megatron's of the model, as a launch script takes them from ``flags.sh``."""
    script = f'source {checkpoint}/flags.sh; printf "%q " "${{MODEL[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout)
    assert words == (checkpoint / "flags.txt").read_text().split()
    return words


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


class Chain:
    """One model on its way, in one layout."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.folder, self.layout = folder, layout
        self.hf = stirred(folder / "hf", moe_config())
        self.teacher = stirred(folder / "teacher", dense_config())
        self.checkpoint, self.injected = folder / "checkpoint", folder / "injected"
        self.tokens = torch.randint(VOCAB, (2, SEQUENCE))
        torch.save(self.tokens, folder / "tokens.pt")
        assert main(["import-hf", str(self.hf), *self.output(self.checkpoint, layout)]) == 0
        general, domain = write_corpora(folder)
        self.data = ("--data-path", "0.4", general, "0.6", domain, "--split", "90,5,5")

    @staticmethod
    def output(path: Path, layout: str) -> list[str]:
        return ["--output", str(path), "--layout", layout]

    def flags(self, load: Path, *extra: str) -> list[str]:
        begin = () if load == self.checkpoint else ("--finetune", "--no-load-optim")
        model = options(self.checkpoint)
        return [*RUN, *model, *self.data, "--train-iters", "1", *begin, "--load", str(load), *extra]

    def logits(self, load: Path, *extra: str, nproc=1, **run) -> torch.Tensor:
        """What Megatron makes of the tokens once it has loaded a checkpoint."""
        env = {"LOGITS": str(self.folder)}
        lane.run(self.flags(load, *extra), nproc=nproc, script=LOGITS, env=env, **run)
        return torch.load(self.folder / "megatron_logits.pt")[..., :VOCAB]

    def inject(self, source: str, *extra: str, nproc=1) -> lane.Run:
        """Ten steps with a teacher."""
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(RECIPE.replace("SOURCE", source))
        ours = ("--inject-recipe", str(recipe), "--inject-verify-frozen", "--train-iters", "10")
        run = lane.run(self.flags(self.checkpoint, *ours, *extra), nproc=nproc)
        assert PROVEN.search(run.output)
        losses = run.losses("kd loss")
        assert losses[-1] < losses[0]
        return run

    def grow(self, source: str) -> Path:
        """New experts, trained for ten steps at EP 2."""
        grown, saved = self.folder / "grown", self.folder / "grown-injected"
        words = ["add-experts", str(self.checkpoint), "--output", str(grown), "--per-layer", "2"]
        assert main([*words, "--unmeasured"]) == 0
        recipe = self.folder / "new.yaml"
        recipe.write_text(NEW_EXPERTS.replace("SOURCE", source))
        ours = ("--inject-recipe", str(recipe), "--train-iters", "10", *SAVE, str(saved))
        lane.run(self.flags(grown, *ours, *EP2, "--num-experts", "6"), nproc=2)
        return saved

    def export(self, name: str, *arguments) -> Path:
        output = self.folder / name
        words = ["export-hf", *map(str, arguments), "--hf", str(self.hf), "--output", str(output)]
        assert main(words) == 0
        return output


GPT_FIRST = pytest.mark.parametrize(
    "chain", ["gpt", pytest.param("hybrid", marks=pytest.mark.slow)], indirect=True, scope="module"
)


@pytest.fixture(scope="module", params=["gpt", "hybrid"])
def chain(request, tmp_path_factory):
    return Chain(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(chain):
    """An injection whose teacher is the Hugging Face folder."""
    return chain.inject(f"hf:{chain.teacher}", *EP2, *SAVE, str(chain.injected), nproc=2)


@pytest.fixture(scope="module")
def exported(chain, run):
    return chain.export("exported", chain.injected)


@pytest.mark.parametrize("layout", [EP2, TP2], ids=["ep2", "tp2"])
def test_megatron_loads_what_is_imported_and_has_the_same_logits(chain, layout):
    expected = transformers_logits(chain.hf, chain.tokens)
    found = chain.logits(chain.checkpoint, *layout, nproc=2)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-5


@GPT_FIRST
def test_a_script_that_knows_nothing_of_the_plugin_loads_it(chain):
    stock = lane.run(chain.flags(chain.checkpoint), script=lane.MINIMAL_GPT)
    own = lane.run(chain.flags(chain.checkpoint))
    assert "successfully loaded checkpoint" in stock.output
    assert stock.losses() == own.losses()


@pytest.mark.skipif(OTHER is None, reason="MEGATRON_OTHER names another Megatron")
@pytest.mark.slow
def test_another_megatron_loads_it(chain):
    found = chain.logits(chain.checkpoint, pythonpath=(OTHER,), fresh=True)
    assert (found - transformers_logits(chain.hf, chain.tokens)).abs().max() < 1e-5


def test_what_was_injected_is_exported_and_the_rest_is_bitwise_as_it_was(chain, exported):
    before, after = (load_file(f / "model.safetensors") for f in (chain.hf, exported))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == CHANGED


def test_transformers_has_the_logits_of_the_trained_student(chain, exported):
    found = transformers_logits(exported, chain.tokens)
    before = transformers_logits(chain.hf, chain.tokens)
    assert (found - chain.logits(chain.injected)).abs().max() < 1e-5
    assert (found - before).abs().max() > 1e-2


def test_a_delta_is_exported_as_the_checkpoint_is(chain, exported):
    delta = chain.folder / "delta"
    base = ["--base", str(chain.checkpoint), "--trained", str(chain.injected)]
    assert main(["export-delta", *base, "--output", str(delta)]) == 0
    from_delta = chain.export("from-delta", "--delta", delta)
    names = sorted(path.name for path in exported.iterdir())
    assert sorted(path.name for path in from_delta.iterdir()) == names
    assert filecmp.cmpfiles(exported, from_delta, names, shallow=False) == (names, [], [])


@GPT_FIRST
def test_new_experts_are_trained_and_exported(chain):
    """The folder has six experts in each layer, of which two were trained, and the same logits;
    imported, with its card, they are taken out again."""
    saved = chain.grow(f"hf:{chain.teacher}")
    exported = chain.export("grown-hf", saved)
    found = transformers_logits(exported, chain.tokens)
    assert (found - chain.logits(saved, "--num-experts", "6")).abs().max() < 1e-5
    assert (found - transformers_logits(chain.hf, chain.tokens)).abs().max() > 1e-2
    again, without = chain.folder / "grown-again", chain.folder / "grown-without"
    assert main(["import-hf", str(exported), *chain.output(again, chain.layout)]) == 0
    assert main(["remove-experts", str(again), "--output", str(without)]) == 0
    name = "model.safetensors"
    assert filecmp.cmp(chain.hf / name, chain.export("same", without) / name, shallow=False)


@GPT_FIRST
def test_an_imported_dense_model_is_the_same_teacher(chain, run):
    teacher = chain.folder / "megatron-teacher"
    words = chain.output(teacher, chain.layout)
    assert main(["import-hf", str(chain.teacher), *words]) == 0
    own = chain.inject(f"megatron:{teacher}", *EP2, nproc=2)
    for name in ("kd loss", "lm loss", "grad norm"):
        assert own.losses(name) == pytest.approx(run.losses(name), rel=1e-4)
    assert own.losses("kd loss")[0] == pytest.approx(run.losses("kd loss")[0], rel=1e-6)
