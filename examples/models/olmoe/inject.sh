#!/usr/bin/env bash
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --requeue
# Moves the teacher into OLMoE-1B-7B, on this machine (bash) or on nodes of a cluster (sbatch).
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh train "$@"
