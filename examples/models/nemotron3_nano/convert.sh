#!/usr/bin/env bash
# Nemotron-3-Nano-30B-A3B as it was published into a Megatron checkpoint, with its flags.
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh convert "$@"
