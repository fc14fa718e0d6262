#!/usr/bin/env bash
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --requeue
# Which experts does it use for which text?
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh profile "$@"
