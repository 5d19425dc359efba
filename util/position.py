"""Where in an epoch a run is, and all that it needs to go on from there as if nothing had happened."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from util import distributed


@dataclass
class Position:
    """How far an epoch is: the updates made, the loss of each (of all processes), and the seconds they took.

    `own` are this process's random streams, where the run goes on exactly.
    """

    update: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    own: dict[str, Any] | None = None


def random_states(device: torch.device) -> dict[str, Any]:
    """Give the states of this process's main random streams, as types that any torch.load takes."""
    name, keys, at, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), at, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


def capture(device: torch.device) -> list[dict[str, Any]] | None:
    """Collect every process's random streams on rank 0; all processes must call this.

    Norms' statistics differ from process to process in an epoch too, but at its end all take rank 0's.
    """
    return distributed.gather_objects(random_states(device))
