#!/usr/bin/env bash
# Fine-tune by a recipe of run_code.sh: CKPT=FILE DATA=FOLDER bash finetune.sh [clipart|evit] [main.py flags…]
# The model trains in training mode, so DHVT's norms adapt; --no-train-mode is the published way.
set -euo pipefail

recipe=clipart
case ${1:-} in
'' | -*) ;;
*)
    recipe=$1
    shift
    ;;
esac

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_code.sh" "finetune-$recipe" "$@"
