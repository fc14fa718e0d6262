#!/usr/bin/env bash
# Qwen3-235B-A22B as it was published into a Megatron checkpoint, with its flags.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh convert "$@"
