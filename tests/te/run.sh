#!/usr/bin/env bash
# The plugin around Transformer Engine's modules on a machine without a GPU: what is built and saved.
#
#   WHEELS=DIR bash tests/te/run.sh     DIR holds wheels of Transformer Engine; pytest arguments go on
#
# Makes .venv-te with the torch that the wheels were compiled for (TORCH, 2.11.0) and unpacks them into
# .venv-te/te. Exit status 3: there are no wheels, or the environment cannot be made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
WHEELS=${WHEELS:-../shared/gpu/whl}
export VENV=${VENV:-$PWD/.venv-te}
site=$VENV/te

ls "$WHEELS"/transformer_engine*.whl >/dev/null 2>&1 || { echo "tests/te: no wheels of Transformer Engine in $WHEELS" >&2; exit 3; }
PIP_CONSTRAINT=$(mktemp)
export PIP_CONSTRAINT
echo "torch==${TORCH:-2.11.0}" >"$PIP_CONSTRAINT"
source examples/environment.sh || exit 3
if [ ! -d "$site/transformer_engine" ]; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check einops onnxscript pydantic &&
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$site" \
      "$WHEELS"/transformer_engine*.whl || { rm -rf "$site"; exit 3; }
fi

export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} NVTE_FRAMEWORK=pytorch
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest tests/te "$@"
