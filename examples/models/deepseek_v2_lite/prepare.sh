#!/usr/bin/env bash
# Text in JSON lines into token files: DOMAIN=code.jsonl GENERAL=web.jsonl bash prepare.sh
[ -f model.sh ] || cd "$(dirname "$0")"
source ../steps.sh prepare "$@"
