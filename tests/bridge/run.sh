#!/usr/bin/env bash
# The real Megatron-Bridge beside the plugin, on the CPU: its training is refused, its conversion compared.
#
#   bash tests/bridge/run.sh          pytest arguments go on
#
# Makes .venv-bridge with megatron-bridge (BRIDGE, 0.6.2) and what it imports, without torch, Megatron and the rest,
# which come from .venv. Transformer Engine and ModelOpt, which it imports as well, are stood in for
# (tests/harness/bridge_job.py). Exit status 3: the environment cannot be made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/environment.sh || exit 3
bridge=${VENV_BRIDGE:-$PWD/.venv-bridge}
export BRIDGE_PYTHON=$bridge/bin/python

if ! "$BRIDGE_PYTHON" -c 'import importlib.metadata as m; m.version("megatron-bridge")' 2>/dev/null; then
  rm -rf "$bridge"
  "$PYTHON" -m venv "$bridge" || exit 3
  "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$BRIDGE_PYTHON" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_main.pth"
  "$BRIDGE_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
    transformers==5.12.1 tokenizers==0.22.2 'huggingface_hub<2' einops peft datasets hydra-core \
    antlr4-python3-runtime==4.9.3 nvidia-resiliency-ext nvidia-ml-py mlflow-skinny comet-ml diffusers \
    megatron-energon multi-storage-client webdataset braceexpand rapidyaml mfusepy filetype wcmatch bracex \
    xattr cffi lark dill multiprocess pandas pyarrow scipy pulp orloge cpsat_logutils deprecation defusedxml \
    ipython traitlets "megatron-bridge==${BRIDGE:-0.6.2}" || { rm -rf "$bridge"; exit 3; }
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest tests/bridge "$@"
