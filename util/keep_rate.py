"""EViT's keep rate: its schedule, and which epochs may be compared.

Reference:
    Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, arXiv 2202.07800
    https://github.com/youweiliang/evit
"""

import math
from typing import Any


def keep_rate_at(
    update: int,
    start_epoch: int,
    end_epoch: int,
    updates_per_epoch: int,
    base_rate: float,
    max_rate: float = 1.0,
) -> float:
    """Return the share of tokens to keep at an update, counted from 0 over the whole training.

    It is `max_rate` before `start_epoch` and `base_rate` from `end_epoch` on, with half a cosine between them.
    """
    start = start_epoch * updates_per_epoch
    end = end_epoch * updates_per_epoch
    if update < start:
        return max_rate
    # also where both epochs are the same: nothing is divided by 0
    if update >= end:
        return base_rate
    progress = (update - start) / (end - start)
    return base_rate + 0.5 * (max_rate - base_rate) * (1 + math.cos(math.pi * progress))


def at_lowest_keep_rate(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of a log.txt that compete for the best epoch: those at the lowest keep rate, or all."""
    rate = min((line.get("keep_rate", 1) for line in lines), default=1)
    return [line for line in lines if line.get("keep_rate", 1) == rate]
