#!/usr/bin/env bash
# Nemotron-3-Nano-30B-A3B as it was published into a Megatron checkpoint, with its flags.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh convert "$@"
