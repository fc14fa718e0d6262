#!/usr/bin/env bash
# Text in JSON lines into token files: DOMAIN=code.jsonl GENERAL=web.jsonl bash prepare.sh
# sbatch runs a copy of this file, in the folder that it was submitted from
[ ! -f "$(dirname "$0")/model.sh" ] || cd "$(dirname "$0")" || exit
source ../steps.sh prepare "$@"
