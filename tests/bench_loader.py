"""Measure how many training images per second the loader delivers: python -m tests.bench_loader DATA.

The default path, and an LMDB where there is a train.lmdb beside the folders, in turns with timm's transform: whole
epochs of the default recipe.
"""

import argparse
from collections import deque
from functools import partial
from pathlib import Path

import datasets
import engine
from util.config import AugmentConfig, DataConfig, ModelConfig

# --transform, and where the images are
WAYS = ("timm", "fast", "fast, LMDB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_loader", description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of train/CLASS/, with or without train.lmdb")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, datasets.default_workers()])
    parser.add_argument("--no-repeated-aug", action="store_true")
    parser.add_argument("--pairs", type=int, default=5, help="number of turns")
    args = parser.parse_args(argv)
    size = args.input_size, args.input_size
    repeated_aug = not args.no_repeated_aug
    for workers in args.workers:
        print(
            f"{args.input_size} px, batch {args.batch_size}, {workers} worker(s), repeated augmentation {repeated_aug}"
        )
        timm_step = None
        for name in WAYS:
            transform, _, lmdb = name.partition(", ")
            if lmdb and not Path(args.data, "train.lmdb").exists():
                continue
            data = DataConfig("FOLDER", args.data, lmdb=bool(lmdb), transform=transform, num_workers=workers)
            dataset = datasets.build_train_set(data, ModelConfig("", input_size=size), AugmentConfig())
            loader = datasets.build_train_loader(
                dataset, data, batch_size=args.batch_size, repeated_aug=repeated_aug, seed=0
            )
            # a deque without room runs through an epoch
            step = partial(deque, loader, maxlen=0)
            timm_step = timm_step or step
            row = engine.compare_steps(step, timm_step, len(loader) * args.batch_size, args.pairs)
            print(
                f"{name:<12}{row['images_per_s']:>9.1f} images/s, {row['ratio']:.2f} times timm's "
                f"(quartiles {row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    main()
