#!/usr/bin/env bash
# gpt-oss-20b as it was published into a Megatron checkpoint, with its flags.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh convert "$@"
