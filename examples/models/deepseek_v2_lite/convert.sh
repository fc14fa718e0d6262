#!/usr/bin/env bash
# DeepSeek-V2-Lite as it was published into a Megatron checkpoint, with its flags.
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh convert "$@"
