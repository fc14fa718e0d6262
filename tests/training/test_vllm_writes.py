"""vLLM itself writes rollouts (``VLLM_SERVER``): what Megatron writes with the same student."""

import contextlib
import shlex

import numpy as np
import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.rollouts.file_format import read_rollouts
from megatron_moe_inject.rollouts.identity import writer_of_folder
from megatron_moe_inject.rollouts.settings import Asked, Sampling
from tests.harness import lane
from tests.harness.corpus import write_corpora
from tests.harness.vllm_server import vllm_server

pytestmark = pytest.mark.slow
VOCAB, LENGTH, MOST, END = 64, 48, 16, 63
"""Ids, tokens of a text and of a completion, and the id that ends a text."""
COUNT = 24
RECIPE = """
domains: [{{name: code, data: [1], teacher: coder}}]
teachers: {{coder: {{source: "hf:{folder}"}}}}
train: {{everything: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Mixtral with sharp logits, of sizes that vLLM has kernels for on a CPU."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(5)
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, sliding_window=None, initializer_range=0.15,
        bos_token_id=None, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(path))
    # What every server takes for settings that a request leaves out.
    (path / "generation_config.json").write_text(
        f'{{"eos_token_id": {END}, "top_k": 1, "repetition_penalty": 1.8, "temperature": 0.3}}'
    )
    return path


@pytest.fixture(scope="module")
def student(folder, tmp_path_factory):
    """The folder as Megatron's checkpoint."""
    checkpoint = tmp_path_factory.mktemp("student") / "checkpoint"
    assert main(["import-hf", str(folder), "--dtype", "fp32", "--output", str(checkpoint)]) == 0
    return checkpoint


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    ids = np.random.default_rng(1).integers(END, size=(COUNT, 6)).tolist()
    path.write_text("".join(f'{{"prompt": {one}}}\n' for one in ids))
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--skip-tokenizer-init", "--max-model-len", str(LENGTH))
    with vllm_server(folder, log, *flags) as url:
        yield url


def texts(folder):
    return [r for path in sorted(folder.iterdir()) for r in read_rollouts(path).rollouts]


def completions(folder):
    return [text.completion.tolist() for text in texts(folder)]


@pytest.fixture(scope="module")
def serve(server, student, prompts):
    def write(output, *more, temperature=0.0, code=0):
        options = ("--prompts", str(prompts), "--output", str(output), "--checkpoint", str(student))
        sampling = ("--max-tokens", str(MOST), "--temperature", str(temperature), "--per-file", "8")
        assert main(["rollouts", *options, *sampling, "--server", server, *more]) == code
        return completions(output) if output.exists() else []

    return write


@pytest.fixture(scope="module")
def megatron(folder, student, prompts, tmp_path_factory):
    place = tmp_path_factory.mktemp("recipe")
    general, domain = write_corpora(place)
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))

    def write(output, **sampling):
        asked = Asked(
            str(prompts), str(output), per_file=8, batch=8,
            sampling=Sampling(max_tokens=MOST, **sampling),
        )  # fmt: skip
        model = (student / "flags.txt").read_text().split()
        run = shlex.split(
            f"--seq-length {LENGTH} --micro-batch-size 1 --global-batch-size 1 --train-iters 1 "
            f"--lr 1e-3 --tokenizer-type NullTokenizer --vocab-size {VOCAB} --num-workers 0 "
            "--use-cpu-initialization --moe-token-dispatcher-type alltoall --eval-iters 0 "
            f"--data-path 0.4 {general} 0.6 {domain} --split 90,5,5 --load {student} "
            "--no-load-optim --no-load-rng --skip-train"
        )
        ours = ("--inject-recipe", str(recipe), "--inject-rollouts", asked.plain())
        lane.run([*model, *run, *ours])
        return completions(output)

    return write


def log_probs(folder, found):
    """Of the completions, by ``transformers``."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in found:
        ids = torch.from_numpy(np.concatenate([text.prompt, text.completion]))
        with torch.no_grad():
            said = model(ids[None]).logits[0].log_softmax(-1)
        begin = len(text.prompt) - 1
        yield said[begin:-1].gather(-1, ids[begin + 1 :, None])[:, 0].numpy()


def test_greedy_text_is_megatrons_token_for_token(serve, megatron, student, tmp_path):
    """Both end at the end of text, and where asked to."""
    ours = megatron(tmp_path / "ours", temperature=0.0, stop=(END,))
    theirs = serve(tmp_path / "theirs")
    assert theirs == ours
    assert {read_rollouts(p).writer for p in (tmp_path / "theirs").iterdir()} == {
        writer_of_folder(str(student))
    }
    stop = next(text[2] for text in ours if len({*text[:3], END}) == 4)
    cut = [_until(text, {stop, END}) for text in ours]
    assert cut != ours
    assert serve(tmp_path / "stopped", "--stop", str(stop)) == cut


def _until(text, ends):
    """Up to the first of some ids, with it."""
    at = next((at for at, one in enumerate(text) if one in ends), len(text))
    return text[: at + 1]


def test_drawn_text_is_the_students_own(serve, megatron, folder, tmp_path):
    """As likely as Megatron's, with the log-probabilities that the student has; a seed is kept."""
    own = serve(tmp_path / "own", temperature=1.0)
    assert serve(tmp_path / "again", temperature=1.0) == own
    assert serve(tmp_path / "other", "--seed", "1", temperature=1.0) != own
    found = texts(tmp_path / "own")
    said = np.concatenate([text.log_probs for text in found])
    expected = np.concatenate(list(log_probs(folder, found)))
    assert np.abs(said - expected).max() < 1e-3
    megatron(tmp_path / "ours", temperature=1.0, stop=(END,))
    ours = np.concatenate(list(log_probs(folder, texts(tmp_path / "ours"))))
    error = np.hypot(said.std() / len(said) ** 0.5, ours.std() / len(ours) ** 0.5)
    assert abs(said.mean() - ours.mean()) < 4 * error
    assert error < 0.3
    few = serve(tmp_path / "few", "--top-k", "1", temperature=1.0)
    assert few == serve(tmp_path / "greedy")


def test_what_a_server_has_no_room_for(serve, tmp_path, capsys):
    """A completion ends with the context, as Megatron's does; a prompt that fills it is named."""
    long = serve(tmp_path / "long", "--max-tokens", "400", temperature=1.0)
    assert max(map(len, long)) <= LENGTH - 6
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": {[1] * LENGTH}}}\n')
    serve(tmp_path / "none", "--prompts", str(path), code=2)
    assert f"which leaves none of the {LENGTH} of" in capsys.readouterr().err
    serve(tmp_path / "none", "--model", "other", code=2)
    assert "--model: 'other' is not at" in capsys.readouterr().err
    path.write_text(f'{{"prompt": [1, {VOCAB + 5}]}}\n')
    serve(tmp_path / "none", "--prompts", str(path), code=2)
    assert "prompt 0: http" in capsys.readouterr().err


def test_a_server_that_dies_leaves_whole_files(folder, student, tmp_path, capsys, monkeypatch):
    """The same command goes on at another server."""
    from megatron_moe_inject.rollouts import served

    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1, 2, 3]}\n' * 4)
    common = [
        *("rollouts", "--prompts", str(path), "--output", str(tmp_path / "own")),
        *("--checkpoint", str(student), "--max-tokens", "8", "--per-file", "1", "--batch", "1"),
    ]
    write, written = served.write_part, []
    flags = ("--skip-tokenizer-init", "--max-model-len", str(LENGTH))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(vllm_server(folder, tmp_path / "one", *flags))

        def then_dies(*parts):
            write(*parts)
            written.append(parts[0].path)
            stack.close()

        monkeypatch.setattr(served, "write_part", then_dies)
        assert main([*common, "--server", url]) == 2
    assert "give the same command again" in capsys.readouterr().err
    assert 1 <= len(written) < 4
    monkeypatch.setattr(served, "write_part", write)
    with vllm_server(folder, tmp_path / "two", *flags) as url:
        assert main([*common, "--server", url]) == 0
    assert f"{len(written)} were there" in capsys.readouterr().out
