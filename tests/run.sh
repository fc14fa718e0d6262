#!/usr/bin/env bash
# Sets up .venv where needed, then runs style checks and the tests.
#
#   bash tests/run.sh                 everything but the tests marked slow or gpu
#   bash tests/run.sh -m slow         the slow ones; any other pytest arguments work as well
#
# Test files are shared by TEST_WORKERS processes (three: the runs of small models wait a lot), in
# their order: those with training runs come before the many short ones of tests/unit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# The other supported Megatron-Core, beside the installed one, for the tests of the contract with it.
export MEGATRON_OTHER=${MEGATRON_OTHER:-$(cd "$(dirname "$PYTHON")/.." && pwd)/megatron-0.18.2}
if [ ! -d "$MEGATRON_OTHER/megatron" ]; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$MEGATRON_OTHER" megatron-core==0.18.2
fi

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet .
"$PYTHON" -m mypy --no-error-summary
set -- -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
case " $* " in
  *" -m "*) exec "$PYTHON" -m pytest "$@" ;;
  *) exec "$PYTHON" -m pytest -m "not slow and not gpu" "$@" ;;
esac
