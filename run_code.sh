#!/usr/bin/env bash
# Train by a recipe: [VARIABLES] bash run_code.sh [RECIPE] [main.py flags…]
#
#   digits (the default)    DHVT-T on scikit-learn's handwritten digits; nothing to download
#   folder                  DHVT-T on your own train/CLASS/ and val/CLASS/, 224 px
#   cifar100                DHVT-T on CIFAR-100, which is downloaded to DATA
#   clipart infograph painting quickdraw real sketch    DHVT-T on one of DomainNet's sets
#   imagenet                DHVT-T on ImageNet-1k
#   evit                    EViT-S on ImageNet-1k, tokens fused, keep rate 0.7
#   digits-evit             a small EViT on the digits that keeps all its tokens
#   finetune-clipart        DHVT-S from an ImageNet checkpoint to clipart (finetune.sh runs this and what follows)
#   finetune-evit           EViT-S from DeiT-S's checkpoint
#   finetune-digits-evit    what digits-evit trained, tokens fused, keep rate 0.7
#
# Flags after the recipe's name override it. Run the same command again to resume.
#   DATA=FOLDER   the data
#   OUT=FOLDER    the output folder; default: output/RECIPE
#   CKPT=FILE     what fine-tuning starts from
#   NGPU=N        number of processes; default: all GPUs, at most the recipe's 2 or 8, and a divisor of it. The batch
#                 size per process stays the recipe's; with fewer processes gradients are accumulated so that the
#                 effective batch size stays the same.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")

stop() {
    echo "run_code.sh: error: $1" >&2
    exit 2
}

recipe=digits
case ${1:-} in
-h | --help)
    # the comment at the top of this file
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"
    exit
    ;;
'' | -*) ;;
*)
    recipe=$1
    shift
    ;;
esac

common=(--opt adamw --weight-decay 0.05)
processes=2
case $recipe in
digits)
    processes=1
    flags=(--model dhvt_tiny_cifar_patch4 --data-set DIGITS --epochs 8 --batch-size 32 --lr 1e-3 --unscale-lr
        --warmup-epochs 1 --warmup-lr 3e-4 --no-repeated-aug --mixup 0 --cutmix 0 --aa none --reprob 0 --drop-path 0
        --model-ema-decay 0.98)
    ;;
folder)
    flags=("${common[@]}" --model dhvt_tiny_imagenet_patch16 --data-set FOLDER --batch-size 128
        --lr 1e-3 --epochs 300 --warmup-epochs 20)
    ;;
cifar100)
    flags=("${common[@]}" --model dhvt_tiny_cifar_patch4 --data-set CIFAR --input-size 32 --batch-size 256
        --lr 1e-3 --epochs 300 --warmup-epochs 5)
    ;;
clipart | infograph | painting | quickdraw | real | sketch)
    flags=("${common[@]}" --model dhvt_tiny_domain_patch16 --data-set "$recipe" --input-size 224 --batch-size 128
        --lr 1e-3 --epochs 300 --warmup-epochs 20)
    ;;
digits-evit | finetune-digits-evit)
    processes=1
    flags=(--model deit_tiny_patch16_shrink_base --data-set DIGITS --input-size 28
        --model-kwargs patch_size=4 embed_dim=64 num_heads=2 depth=6 --drop_loc 2,4 --batch-size 32 --unscale-lr
        --no-repeated-aug --mixup 0 --cutmix 0 --aa none --reprob 0 --drop-path 0 --model-ema-decay 0.98)
    if [[ $recipe == digits-evit ]]; then
        flags+=(--epochs 40 --lr 2e-3 --warmup-epochs 3 --base_keep_rate 1)
    else
        flags+=(--epochs 15 --lr 1e-3 --warmup-epochs 0 --fuse_token --base_keep_rate 0.7 --shrink_start_epoch 0
            --shrink_epochs 5)
    fi
    ;;
evit)
    processes=8
    flags=("${common[@]}" --model deit_small_patch16_shrink_base --data-set IMNET --input-size 224 --batch-size 256
        --lr 5e-4 --epochs 300 --warmup-epochs 5 --fuse_token --base_keep_rate 0.7 --shrink_start_epoch 10
        --shrink_epochs 100)
    ;;
finetune-evit)
    processes=8
    flags=("${common[@]}" --model deit_small_patch16_shrink_base --data-set IMNET --input-size 224 --batch-size 256
        --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --epochs 30 --warmup-epochs 0 --fuse_token --base_keep_rate 0.7
        --shrink_start_epoch 0 --shrink_epochs 0)
    ;;
imagenet)
    flags=("${common[@]}" --model dhvt_tiny_imagenet_patch16 --data-set IMNET --input-size 224 --batch-size 128
        --lr 5e-4 --epochs 300 --warmup-epochs 10)
    ;;
finetune-clipart)
    flags=("${common[@]}" --model dhvt_small_imagenet_patch16 --data-set clipart --input-size 224 --batch-size 128
        --lr 5e-4 --min-lr 1e-6 --weight-decay 1e-8 --epochs 100 --warmup-epochs 2 --no-repeated-aug)
    ;;
*)
    stop "no recipe $recipe; they are digits, folder, digits-evit, cifar100, imagenet, evit, clipart, infograph, painting, quickdraw, real, sketch, finetune-clipart, finetune-evit and finetune-digits-evit"
    ;;
esac

if [[ $recipe == finetune-* ]]; then
    [[ -n ${CKPT:-} ]] || stop "$recipe needs the checkpoint to start from: CKPT=FILE bash finetune.sh …"
    [[ -f $CKPT || $CKPT == http*://* ]] || stop "CKPT=$CKPT: no such file"
    flags+=(--finetune "$CKPT")
fi
if [[ $recipe != *digits* ]]; then
    [[ -n ${DATA:-} ]] || stop "$recipe needs its data: set DATA=FOLDER before the command"
    [[ -d $DATA || $recipe == cifar100 ]] || stop "DATA=$DATA: no such folder"
    flags+=(--data-path "$DATA")
fi

ngpu=${NGPU:-}
if [[ -z $ngpu ]]; then # all there are, but no more than the recipe's
    ngpu=1
    if ((processes > 1)); then
        found=$(python -c "import torch; print(torch.accelerator.device_count())")
        while ((ngpu * 2 <= found && ngpu * 2 <= processes)); do ngpu=$((ngpu * 2)); done
    fi
fi
[[ $ngpu =~ ^[1-9][0-9]*$ ]] || stop "NGPU=$ngpu: give a number of processes, at least 1"
((processes % ngpu == 0)) || stop "NGPU=$ngpu does not divide the recipe's $processes processes: give a number that does"

launch=(python)
# a signal reaches the processes, which save the step they are in
((ngpu == 1)) || launch=(torchrun --standalone --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    "--nproc_per_node=$ngpu")
exec "${launch[@]}" "$here/main.py" "${flags[@]}" --accum-steps $((processes / ngpu)) \
    --output_dir "${OUT:-output/$recipe}" --resume auto "$@"
