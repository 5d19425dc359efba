#!/usr/bin/env bash
# Fine-tune by a recipe of run_code.sh: CKPT=FILE DATA=FOLDER bash finetune.sh [clipart] [main.py flags…]
# [clipart] may be painting, sketch, cifar100, evit or digits-evit too.
# The model trains in training mode, so DHVT's norms adapt; --no-train-mode is the published way.
set -euo pipefail

recipe=clipart
case ${1:-} in
-h | --help) exec bash "$(dirname "${BASH_SOURCE[0]}")/run_code.sh" --help ;;
'' | -*) ;;
*)
    recipe=$1
    shift
    ;;
esac

exec bash "$(dirname "${BASH_SOURCE[0]}")/run_code.sh" "finetune-$recipe" "$@"
