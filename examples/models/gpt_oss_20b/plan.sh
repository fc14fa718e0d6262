#!/usr/bin/env bash
# Does it fit, and what would a step take? Nothing is started.
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh plan "$@"
