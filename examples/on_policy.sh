#!/usr/bin/env bash
# One machine trains on its student's own text: 20 steps, roll out, 20 steps ... with the quickstart's models,
# against the fixed corpus alone at equal steps and at equal processor time. No GPU; one gloo process.
#
#   bash examples/on_policy.sh [--rounds 3] [--steps 20]
#
# Everything it writes is in runs/on_policy (OUT=... for another folder). Ends with runs/on_policy/table.md.
# The recipe is examples/on_policy/recipe.yaml, the loop examples/on_policy/loop.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh

out=${OUT:-runs/on_policy}
rm -rf "$out"
exec "$PYTHON" examples/on_policy/loop.py "$out" "$@"
