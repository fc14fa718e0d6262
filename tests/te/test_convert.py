"""Imported Hugging Face models in Transformer Engine's own modules, without a GPU.

Megatron loads what ``import-hf`` wrote with its default strictness and without a recipe, and saves
it: exported again, that is the folder bit for bit. Forward passes need a GPU.
"""

import filecmp
import shlex

import pytest

from megatron_moe_inject.cli import main
from tests.harness import lane
from tests.harness.tiny_folders import save_folder

pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")

RUN = shlex.split(
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 45 --num-workers 0 --eval-iters 1 "
    "--eval-interval 100 "
    "--use-cpu-initialization --moe-token-dispatcher-type alltoall --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --transformer-impl transformer_engine "
    "--attention-backend unfused"
)
GROUPED = ("--bf16", "--moe-grouped-gemm")
CASES = {
    "qwen3_moe": (),
    "qwen3_moe, one dense layer": GROUPED,
    "deepseek_v3, prediction": GROUPED,
}


@pytest.mark.parametrize("layout", ["gpt", "hybrid"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_and_saved_is_the_folder(tmp_path, case, layout):
    hf, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    save_folder(case, hf)
    dtype = ("--dtype", "bf16") if "--bf16" in CASES[case] else ()
    words = ["--output", str(checkpoint), "--layout", layout, *dtype]
    assert main(["import-hf", str(hf), *words]) == 0
    model = (checkpoint / "flags.txt").read_text().split()
    saved = ("--load", str(checkpoint), "--save", str(tmp_path / "saved"), "--save-interval", "9")
    run = lane.run(
        [*RUN, *CASES[case], *model, *saved],
        env={"TESTS_TE_ON_CPU": "1", "CUDA_VISIBLE_DEVICES": ""},
        fresh=True,
    )
    assert "successfully loaded checkpoint" in run.output
    words = ["--hf", str(hf), "--output", str(tmp_path / "out")]
    assert main(["export-hf", str(tmp_path / "saved"), *words]) == 0
    names = sorted(path.name for path in hf.iterdir())
    assert filecmp.cmpfiles(hf, tmp_path / "out", names, shallow=False) == (names, [], [])
