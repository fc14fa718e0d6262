"""Shared material of the injection tests: a blend of two corpora, a student and a teacher."""

import functools

import pytest

from tests.harness.aligned import AlignedMaterial, make_aligned_material
from tests.harness.array_runs import run_set
from tests.harness.material import Material, make_material


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Material:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A random Llama of the student's 61 token ids, 8 of them padding, wider than the student."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=69,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def of_text(tmp_path_factory) -> AlignedMaterial:
    """A student of text, and teachers with tokenizers of their own."""
    return make_aligned_material(tmp_path_factory.mktemp("aligned"))


@pytest.fixture(scope="session")
def known_run(material, llama, tmp_path_factory):
    """Each run of the covering array once, with its folder; see ``run_set``."""

    @functools.cache
    def run(*of, **options):
        folder = tmp_path_factory.mktemp("set")
        return run_set(material, llama, folder, *of, **options), folder

    return run


@pytest.fixture
def stopped_run(material, llama, tmp_path):
    """A run of the covering array that was stopped, and goes on; see ``run_set``."""

    def run(*of, **options):
        run_set(material, llama, tmp_path, *of, save=True, **options)
        return run_set(material, llama, tmp_path, *of, load=True, **options), tmp_path

    return run
