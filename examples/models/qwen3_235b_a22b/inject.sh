#!/usr/bin/env bash
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --requeue
# Moves the teacher into Qwen3-235B-A22B, on this machine (bash) or on nodes of a cluster (sbatch).
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh train "$@"
