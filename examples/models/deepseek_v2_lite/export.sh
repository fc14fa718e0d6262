#!/usr/bin/env bash
# The injected model as a Hugging Face folder that a server loads.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh export_hf "$@"
