#!/usr/bin/env bash
# The study: which part of an injection gives what, on code and on HTML, with three seeds. No GPU; about
# three minutes a run on one core, a run for each arm, domain and seed that has no result yet.
#
#   bash examples/study.sh                  what is not done yet, then the table
#   bash examples/study.sh --report         the table of what there is
#   bash examples/study.sh --help           single arms, domains and seeds; other sizes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
exec "$PYTHON" examples/study/study.py "$@"
