"""The keep rate schedule of EViT.

Reference:
    Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800
    https://github.com/youweiliang/evit
"""

import math


def keep_rate_at(
    iteration: int,
    start_epoch: int,
    end_epoch: int,
    iterations_per_epoch: int,
    base_rate: float,
    max_rate: float = 1.0,
) -> float:
    """Return the share of tokens to keep at an iteration, counted from 0 over the whole training.

    It is `max_rate` before `start_epoch` and `base_rate` from `end_epoch` on, with half a cosine between them.
    """
    start = start_epoch * iterations_per_epoch
    end = end_epoch * iterations_per_epoch
    if iteration < start:
        return max_rate
    # also where both epochs are the same: nothing is divided by 0
    if iteration >= end:
        return base_rate
    progress = (iteration - start) / (end - start)
    return base_rate + 0.5 * (max_rate - base_rate) * (1 + math.cos(math.pi * progress))
