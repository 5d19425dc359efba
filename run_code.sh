#!/usr/bin/env bash
# Train by a recipe: [VARIABLES] bash run_code.sh [RECIPE] [main.py flags…]
#
#   digits (the default)    DHVT-T on scikit-learn's handwritten digits; nothing to download
#   folder                  DHVT on your own train/CLASS/ and val/CLASS/, 224 px
#   small                   DHVT on a few thousand images of your own, in the same folders: 32 px where their short sides
#                           are up to 48 px (the median of up to 200 images), 64 px up to 112 px, both with patch size 4,
#                           else 224 px; each image once per epoch, padded by 4 px and cropped
#   cifar100                DHVT on CIFAR-100, which is downloaded to DATA
#   deit-cifar100           DeiT instead, the paper's baseline
#   clipart infograph painting quickdraw real sketch    DHVT on one of DomainNet's sets
#   imagenet                DHVT on ImageNet-1k
#   cifar100-224 clipart-100 painting-100 sketch-100    100 epochs at 224 px, the paper's Table 16
#   ablation ROW            a row of the paper's ablations, on CIFAR-100; the rows are listed below
#   digits-ablation [ROW]   a row with a small model on the digits; without ROW the ten of Tables 5 and 6, seeds 0 1 2
#                           (30 runs), and compare.py
#   fashion [ROW]           a model on 60 or 300 images per class of Fashion-MNIST: a tenth of them, held out, to
#                           choose one of three learning rates; then two more seeds, and one evaluation of each seed on
#                           the test set. Without ROW all of {60,300}-{dhvt,deit,resnet,cct}, then compare.py
#   evit                    EViT-S on ImageNet-1k, tokens fused, keep rate 0.7
#   digits-evit             a small EViT on the digits that keeps all its tokens
#   finetune-clipart finetune-painting finetune-sketch finetune-cifar100
#                           DHVT-S from an ImageNet checkpoint (finetune.sh runs these and what follows)
#   finetune-evit           EViT-S from DeiT-S's checkpoint
#   finetune-digits-evit    what digits-evit trained, tokens fused, keep rate 0.7
#
# Flags after the recipe's name override it. Run the same command again to resume.
#   DATA=FOLDER   the data
#   OUT=FOLDER    the output folder; default: output/RECIPE, with -SIZE, -patchN and -paper where they are set
#   CKPT=FILE     what fine-tuning starts from
#   SIZE=NAME     tiny or small: DHVT-T, the default except in fine-tuning, or DHVT-S
#   PATCH=N       4, the default, or 2: patch size of cifar100 and deit-cifar100
#   PAPER=1       batch size and learning rate as in the paper, where the published scripts differ from it
#   SEEDS="0 1"   one run per seed, in OUT/seed0, OUT/seed1
#   NGPU=N        number of processes; default: all GPUs, at most the recipe's 1, 2 or 8, and a divisor of it. The batch
#                 size per process stays the recipe's; with fewer processes gradients are accumulated so that the
#                 effective batch size stays the same.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
recipes="digits, folder, small, digits-evit, cifar100, deit-cifar100, imagenet, evit, clipart, infograph, painting, quickdraw, real, sketch, cifar100-224, clipart-100, painting-100, sketch-100, ablation, digits-ablation, fashion, finetune-clipart, finetune-painting, finetune-sketch, finetune-cifar100, finetune-evit and finetune-digits-evit"
# in the paper's order: which of position embedding (ape), SOPE and DAFF; heads; norms of SOPE and DAFF, and batch size
table5=(table5-{ape,ape-sope,ape-daff,ape-sope-daff,none,sope,daff,sope-daff})
rows=("${table5[@]}" table6-{baseline,head-tokens,dhvt} table8-{mlp,split,split-aggregate,split-avgpool}
    table9-{dhvt,all-tokens,no-shortcut} b22-{dhvt,vit-sope}-no-affine table10-{deit-tiny-{3,4},tiny-{3,4},small-{4,6,8}}
    table11-{bn,ln}-{bn,ln}-{128,256,512})
fashion_rows=({60,300}-{dhvt,deit,resnet,cct})

stop() {
    echo "run_code.sh: error: $1" >&2
    exit 2
}

# Run a command, pass signals on to it, and stop where it fails or was stopped.
run() {
    local status=0 pid='' signalled=''
    # before the command starts, since a signal may come at once
    trap 'signalled=1; [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP QUIT USR1 USR2
    "$@" &
    pid=$!
    [[ -z $signalled ]] || kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" || status=$?
    # a signal ends the first wait only
    ((status <= 128)) || { status=0 && wait "$pid" || status=$?; }
    trap - TERM INT HUP QUIT USR1 USR2
    ((status == 0)) || exit "$status"
}

# Set model, kwargs (its arguments) and batch (effective batch size) to those of a row of the ablations.
set_row() {
    local vit=(sope=false daff=false head_tokens=false pos_embed=learn)
    model=dhvt_tiny_cifar_patch4
    kwargs=()
    batch=512
    [[ " ${rows[*]} " == *" $1 "* ]] || stop "$recipe ${1:-without a row}: the rows are ${rows[*]}"
    case $1 in
    table5-*)
        kwargs=(head_tokens=false)
        [[ $1 != *-ape* ]] || kwargs+=(pos_embed=learn)
        [[ $1 == *-sope* ]] || kwargs+=(sope=false)
        [[ $1 == *-daff* ]] || kwargs+=(daff=false)
        ;;
    table6-baseline | table8-mlp) kwargs=("${vit[@]}") ;;
    table6-head-tokens) kwargs=(sope=false daff=false pos_embed=learn) ;;
    table6-dhvt | table9-dhvt) ;;
    table8-*) kwargs=("${vit[@]}" "ffn=$(tr - _ <<<"${1#table8-}")") ;;
    table9-all-tokens) kwargs=(aggregate=all) ;;
    table9-no-shortcut) kwargs=(shortcut=false) ;;
    b22-dhvt-no-affine) kwargs=(affine=false) ;;
    b22-vit-sope-no-affine) kwargs=(daff=false head_tokens=false pos_embed=learn affine=false) ;;
    table10-deit-tiny-*) kwargs=("${vit[@]}" "num_heads=${1##*-}") ;;
    table10-tiny-*) kwargs=("num_heads=${1##*-}") ;;
    table10-small-*)
        model=dhvt_small_cifar_patch4
        batch=256
        kwargs=("num_heads=${1##*-}")
        ;;
    table11-*)
        IFS=- read -r _ sope_norm daff_norm batch <<<"$1"
        kwargs=("sope_norm=$sope_norm" "daff_norm=$daff_norm")
        ;;
    esac
}

# Train a row of the recipe fashion, with flags of main.py after it.
train_fashion() {
    local row=$1 out=${OUT:-output/fashion/$1} model share epochs rate best seed
    shift
    case ${row#*-} in
    dhvt) model=(dhvt_tiny_cifar_patch4) ;;
    deit) model=(deit_tiny_patch16_224 --model-kwargs patch_size=4 num_heads=4) ;;
    resnet) model=(resnet18_cifar) ;;
    cct) model=(cct_7_3x1_32) ;;
    esac
    # of 6,000 training images per class
    [[ $row == 60-* ]] && share=0.01 epochs=20 || share=0.05 epochs=10
    local train=(run python "$here/main.py" --model "${model[@]}" --data-set FASHION --data-path "$DATA"
        --train-fraction "$share" --val-fraction 0.1 --input-size 32 "${few_images[@]}" --batch-size 32
        --epochs $epochs --warmup-epochs 2 --resume auto)
    for rate in 5e-4 1e-3 2e-3; do
        "${train[@]}" --lr $rate --output_dir "$out/rates/$rate" "$@"
    done
    # the best on the hold-out, of all epochs
    best=$(python - "$out"/rates/*/log.txt <<'END'
import json, sys
def best_accuracy(log):
    return max(line.get("test_acc1", -1) for line in map(json.loads, open(log)))
print(max(sys.argv[1:], key=best_accuracy).split("/")[-2])
END
    )
    mkdir -p "$out/seeds"
    rm -rf "$out/copy"
    # at once, so that no half of a run is left
    [[ -d $out/seeds/0 ]] || { cp -r "$out/rates/$best" "$out/copy" && mv "$out/copy" "$out/seeds/0"; }
    for seed in 1 2; do
        "${train[@]}" --lr "$best" --output_dir "$out/seeds/$seed" "$@" --seed $seed
    done
    for seed in 0 1 2; do
        [[ -f $out/seeds/$seed/test/report.json ]] || run python "$here/main.py" --eval --split test \
            --resume "$out/seeds/$seed/best_checkpoint.pth" --report "$out/seeds/$seed/test"
    done
}

recipe=digits
case ${1:-} in
-h | --help)
    # the comment at the top of this file
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "${BASH_SOURCE[0]}"
    echo "rows: ${rows[*]}"
    exit
    ;;
'' | -*) ;;
*)
    recipe=$1
    shift
    ;;
esac

size=${SIZE:-tiny}
patch=${PATCH:-4}
name=$recipe${SIZE:+-$SIZE}${PATCH:+-patch$PATCH}${PAPER:+-paper}
common=(--opt adamw --weight-decay 0.05)
few_images=("${common[@]}" --unscale-lr --no-repeated-aug --crop pad --model-ema-warmup)
digits=(--data-set DIGITS --batch-size 32 --unscale-lr --no-repeated-aug --mixup 0 --cutmix 0 --aa none --reprob 0
    --drop-path 0 --model-ema-decay 0.98)
processes=2
# which variables choose a variant of the recipe, and the paper's effective batch size
takes=
paper_batch=
case $recipe in
digits)
    processes=1
    flags=(--model dhvt_tiny_cifar_patch4 "${digits[@]}" --epochs 9 --lr 1e-3 --warmup-epochs 1 --warmup-lr 3e-4)
    ;;
folder)
    takes=SIZE
    flags=("${common[@]}" --model "dhvt_${size}_imagenet_patch16" --data-set FOLDER --batch-size 128
        --lr 1e-3 --epochs 300 --warmup-epochs 20)
    ;;
small)
    processes=1
    takes=SIZE
    flags=("${few_images[@]}" --data-set FOLDER --batch-size 64 --lr 1e-3 --epochs 100 --warmup-epochs 5)
    ;;
cifar100 | deit-cifar100)
    takes="SIZE PATCH PAPER"
    [[ $size == tiny ]] && paper_batch=512 || paper_batch=256
    model=(--model "dhvt_${size}_cifar_patch$patch")
    [[ $recipe == cifar100 ]] || model=(--model "deit_${size}_patch16_224" --model-kwargs "patch_size=$patch")
    # heads: the paper's DeiT-T has four, like DHVT-T; DeiT-S keeps its six
    [[ $recipe-$size != deit-cifar100-tiny ]] || model+=(num_heads=4)
    flags=("${common[@]}" "${model[@]}" --data-set CIFAR --input-size 32 --batch-size 256
        --lr 1e-3 --epochs 300 --warmup-epochs 5)
    ;;
ablation)
    takes=PAPER
    set_row "${1:-}"
    name+=/$1
    shift
    paper_batch=$batch
    flags=("${common[@]}" --model "$model" --model-kwargs "${kwargs[@]}" --data-set CIFAR --input-size 32
        --batch-size $((batch / 2)) --lr 1e-3 --epochs 300 --warmup-epochs 10)
    ;;
digits-ablation)
    processes=1
    if [[ ${1:-} == '' || $1 == -* ]]; then
        out=${OUT:-output/$recipe}
        # the baseline is the first row of both tables
        ten=("${table5[@]}" table6-head-tokens table6-dhvt)
        for row in "${ten[@]}"; do
            SEEDS=${SEEDS:-0 1 2} OUT=$out/$row run bash "${BASH_SOURCE[0]}" digits-ablation "$row" "$@"
        done
        exec python "$here/compare.py" "${ten[@]/#/$out/}" --out "$out"
    fi
    set_row "$1"
    name+=/$1
    shift
    flags=(--model "$model" --model-kwargs "${kwargs[@]}" embed_dim=64 depth=6 "${digits[@]}" --epochs 10 --lr 2e-3
        --warmup-epochs 1)
    ;;
fashion)
    processes=1
    [[ -z ${SIZE:-}${PATCH:-}${PAPER:-}${SEEDS:-}${NGPU:-} ]] || stop "fashion takes DATA and OUT only: leave others out"
    [[ -d ${DATA:-} ]] || stop "fashion needs its data: set DATA=FOLDER, to which Fashion-MNIST is downloaded"
    if [[ ${1:-} == '' || $1 == -* ]]; then
        out=${OUT:-output/$recipe}
        for row in "${fashion_rows[@]}"; do
            OUT=$out/$row run bash "${BASH_SOURCE[0]}" fashion "$row" "$@"
        done
        exec python "$here/compare.py" "$out"/*/seeds --x train_fraction --out "$out"
    fi
    [[ " ${fashion_rows[*]} " == *" $1 "* ]] || stop "fashion $1: the rows are ${fashion_rows[*]}"
    train_fashion "$@"
    exit
    ;;
clipart | infograph | painting | quickdraw | real | sketch | clipart-100 | painting-100 | sketch-100 | cifar100-224)
    takes="SIZE PAPER"
    [[ $size == tiny ]] && paper_batch=256 || paper_batch=128
    [[ $recipe == *-* ]] && epochs=100 || epochs=300
    data_set=${recipe%-*}
    flags=("${common[@]}" --model "dhvt_${size}_domain_patch16" --data-set "${data_set/cifar100/CIFAR}" --input-size 224
        --batch-size 128 --lr 1e-3 --epochs $epochs --warmup-epochs 20)
    ;;
digits-evit | finetune-digits-evit)
    processes=1
    flags=(--model deit_tiny_patch16_shrink_base "${digits[@]}" --input-size 28
        --model-kwargs patch_size=4 embed_dim=64 num_heads=2 depth=6 --drop_loc 2,4)
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
    takes="SIZE PAPER"
    paper_batch=512
    flags=("${common[@]}" --model "dhvt_${size}_imagenet_patch16" --data-set IMNET --input-size 224 --batch-size 128
        --lr 5e-4 --epochs 300 --warmup-epochs 10)
    ;;
finetune-clipart | finetune-painting | finetune-sketch | finetune-cifar100)
    takes="SIZE PAPER"
    paper_batch=256
    data_set=${recipe#finetune-}
    flags=("${common[@]}" --model "dhvt_${SIZE:-small}_imagenet_patch16" --data-set "${data_set/cifar100/CIFAR}"
        --input-size 224 --batch-size 128 --lr 5e-4 --min-lr 1e-6 --weight-decay 1e-8 --epochs 100 --warmup-epochs 2
        --no-repeated-aug)
    ;;
*)
    stop "no recipe $recipe; they are $recipes"
    ;;
esac

for variable in SIZE PATCH PAPER; do
    [[ -z ${!variable:-} || " $takes " == *" $variable "* ]] || stop "$recipe has no $variable: leave it out"
done
[[ $size =~ ^(tiny|small)$ ]] || stop "SIZE=$size: give tiny or small"
[[ $patch =~ ^[24]$ ]] || stop "PATCH=$patch: give 4 or 2"
[[ ${PAPER:-1} == 1 ]] || stop "PAPER=$PAPER: give 1, or leave it out"
# the paper's rates are taken as they stand, not scaled by the batch size
[[ -z ${PAPER:-} ]] || flags+=(--batch-size $((paper_batch / processes)) --unscale-lr)

if [[ $recipe == finetune-* ]]; then
    [[ -n ${CKPT:-} ]] || stop "$recipe needs the checkpoint to start from: CKPT=FILE bash finetune.sh …"
    [[ -f $CKPT || $CKPT == http*://* ]] || stop "CKPT=$CKPT: no such file"
    flags+=(--finetune "$CKPT")
fi
if [[ $recipe != *digits* ]]; then
    [[ -n ${DATA:-} ]] || stop "$recipe needs its data: set DATA=FOLDER before the command"
    [[ -d $DATA || " ${flags[*]} " == *" CIFAR "* ]] || stop "DATA=$DATA: no such folder"
    flags+=(--data-path "$DATA")
fi
if [[ $recipe == small ]]; then
    # the median short side, of images from all parts of the folder
    side=$(PYTHONPATH=$here python -c "if True:
        import sys
        from contextlib import suppress
        from statistics import median
        from PIL import Image
        from data.images import find_images
        files = find_images(sys.argv[1])
        sides = []
        for file in files[:: len(files) // 200 + 1]:
            # main.py names what it cannot read
            with suppress(OSError):
                sides.append(min(Image.open(file).size))
        print(round(median(sides)))
        " "$DATA" 2>/dev/null) || stop "DATA=$DATA: no images in it that can be read; they belong in train/CLASS/ and val/CLASS/"
    pixels=224
    ((side > 112)) || pixels=64
    ((side > 48)) || pixels=32
    model=dhvt_${size}_cifar_patch4
    ((pixels < 224)) || model=dhvt_${size}_imagenet_patch16
    flags+=(--model "$model" --input-size $pixels)
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
# torchrun passes signals on to the processes, which finish their update and save
((ngpu == 1)) || launch=(torchrun --standalone --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    "--nproc_per_node=$ngpu")
out=${OUT:-output/$name}
command=("${launch[@]}" "$here/main.py" "${flags[@]}" --accum-steps $((processes / ngpu)) --resume auto)
[[ -n ${SEEDS:-} ]] || exec "${command[@]}" --output_dir "$out" "$@"
for seed in $SEEDS; do
    run "${command[@]}" --output_dir "$out/seed$seed" "$@" --seed "$seed"
done
