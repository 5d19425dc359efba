"""EViT's schedule of the keep rate (arXiv 2202.07800): 1, then a half cosine to the base rate, by iteration."""

import math


def keep_rate_at(
    iteration: int, start_epoch: int, end_epoch: int, iterations_per_epoch: int, base_rate: float, max_rate: float = 1.0
) -> float:
    """Give the share of tokens to keep at an iteration, counted from 0 over the whole training.

    It is `max_rate` before `start_epoch` and `base_rate` from `end_epoch` on.
    """
    start, end = start_epoch * iterations_per_epoch, end_epoch * iterations_per_epoch
    if iteration < start:
        return max_rate
    if iteration >= end:
        return base_rate
    progress = (iteration - start) / (end - start)
    return base_rate + 0.5 * (max_rate - base_rate) * (1 + math.cos(math.pi * progress))
