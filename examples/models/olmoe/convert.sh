#!/usr/bin/env bash
# OLMoE-1B-7B as it was published into a Megatron checkpoint, with its flags.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh convert "$@"
