#!/usr/bin/env bash
# A dense student of the quickstart's mixture of experts, and the other way round. No GPU; two to five
# minutes a run on one core.
#
#   bash examples/moe_to_dense.sh                                      nine runs of one seed, then the table
#   bash examples/moe_to_dense.sh --seeds 3                            three seeds
#   bash examples/moe_to_dense.sh --direction dense_to_moe             a weaker dense model, upcycled
#   bash examples/moe_to_dense.sh --direction densify                  what densify's options give
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
exec "$PYTHON" examples/moe_to_dense/compare.py "$@"
