"""Tables of architectures against models of Transformer Engine's modules, built without a GPU."""

import pytest

from tests.harness.table_keys import compare, layouts, models_of, name_of

pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

PAIRS = layouts()
TE = ("--transformer-impl", "transformer_engine", "--bf16")


@pytest.fixture(scope="module")
def models():
    return models_of(PAIRS, TE, ("--te",))


@pytest.fixture(scope="module")
def grouped():
    return models_of(PAIRS, (*TE, "--moe-grouped-gemm"), ("--te",))


class TestTables:
    @pytest.mark.parametrize(("case", "layout"), PAIRS)
    def test_keys_shapes_and_objects_are_what_the_model_asks_for(self, case, layout, models):
        compare(case, layout, models[name_of(case, layout)])

    @pytest.mark.parametrize(("case", "layout"), PAIRS)
    def test_with_grouped_experts_they_are_the_same(self, case, layout, grouped):
        compare(case, layout, grouped[name_of(case, layout)])
