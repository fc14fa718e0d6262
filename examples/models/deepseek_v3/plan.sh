#!/usr/bin/env bash
# Does it fit, and what would a step take? Nothing is started.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh plan "$@"
