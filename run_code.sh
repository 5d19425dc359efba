#!/usr/bin/env bash
# Train DHVT-T on scikit-learn's handwritten digits: bash run_code.sh [main.py flags…]
# Flags given here win over the recipe's; OUT=FOLDER says where the run goes. Called again, it goes on where it stopped.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")

exec python "$here/main.py" \
    --model dhvt_tiny_cifar_patch4 --data-set DIGITS \
    --epochs 8 --batch-size 32 --lr 1e-3 --unscale-lr --warmup-epochs 1 --warmup-lr 3e-4 \
    --no-repeated-aug --mixup 0 --cutmix 0 --aa none --reprob 0 --drop-path 0 --model-ema-decay 0.98 \
    --output_dir "${OUT:-output/digits}" --resume auto "$@"
