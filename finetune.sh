#!/usr/bin/env bash
# Fine-tune by a recipe of run_code.sh: CKPT=FILE DATA=FOLDER bash finetune.sh [clipart] [main.py flags…]
# [clipart] may be painting, sketch, cifar100, evit or digits-evit too.
# DHVT's batch norms adapt to the data; --no-train-mode freezes them, as the published script does.
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
