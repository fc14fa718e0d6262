#!/usr/bin/env bash
# The injected model as a Hugging Face folder that a server loads.
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh export_hf "$@"
