#!/usr/bin/env bash
#SBATCH --nodes=16 --ntasks-per-node=1 --gpus-per-node=8 --requeue
# Which experts does it use for which text?
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh profile "$@"
