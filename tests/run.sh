#!/usr/bin/env bash
# Sets up .venv where needed, then runs style checks and the tests.
#
#   bash tests/run.sh                 everything but the tests marked slow or gpu
#   bash tests/run.sh -m slow         the slow ones; any other pytest arguments work as well
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet .
case " $* " in
  *" -m "*) exec "$PYTHON" -m pytest "$@" ;;
  *) exec "$PYTHON" -m pytest -m "not slow and not gpu" "$@" ;;
esac
