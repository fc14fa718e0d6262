"""Training with a teacher that vLLM itself serves (``VLLM_SERVER``), against the model live."""

import pytest

from tests.harness import lane
from tests.harness.injection import assert_clean_end, recipe_file
from tests.harness.training_recipes import TOLD
from tests.harness.vllm_server import vllm_server

pytestmark = pytest.mark.slow
ROWS = 69
"""Rows of the teacher's head, eight of them beyond the student's ids."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose heads are of a size that vLLM has kernels for on a CPU."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=ROWS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
        num_key_value_heads=1, intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(model, log, "--skip-tokenizer-init", "--max-logprobs", str(ROWS)) as url:
        yield url


@pytest.fixture(scope="module")
def train(material):
    def run(source, *sets, nproc=1, check=True, **layout):
        ours = ["--inject-recipe", recipe_file(material, TOLD), "--inject-verify-frozen"]
        overrides = ("--inject-set", f"teachers.coder.source={source}", *sets)
        flags = material.flags(*ours, *overrides, **layout)
        return lane.run(flags, nproc=nproc, check=check)

    return run


@pytest.mark.parametrize("layout", [{}, dict(nproc=2, pp=2)], ids=["one", "pp2"])
def test_vllm_says_what_the_live_model_says(train, model, url, layout):
    """All ids asked for: losses and gradients are the live teacher's, as far as vLLM's kernels
    round like transformers'."""
    live = train(f"hf:{model}")
    served = train(f"'server:{url}'", f"teachers.coder.server.top={ROWS}", **layout)
    assert max(served.losses("server misses")) == 0
    for term in ("lm loss", "kd loss", "total loss", "steering loss", "grad norm"):
        assert served.losses(term) == lane.approx(live.losses(term), rel=2e-4, abs=1e-6), term


def test_more_ids_than_vllm_tells_is_one_message_at_start(train, url):
    run = train(f"'server:{url}'", f"teachers.coder.server.top={ROWS + 1}", check=False)
    told = f"set teachers.coder.server.top to less than {ROWS + 1}"
    assert_clean_end(run, (f"teachers.coder.source: 'server:{url}'", told))
