"""Deterministic weights and inputs: any checkpoint-compatible model can be filled the same way anywhere."""

import zlib

import numpy as np
import torch


def tensor(name, shape):
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("running_var"):
        x = 1 + 0.2 * np.abs(x)
    elif name.endswith("alpha") or (name.endswith("weight") and x.ndim == 1):
        x = 1 + 0.1 * x
    elif name.endswith("weight"):
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 0.1 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


def state_dict(model):
    return {k: tensor(k, tuple(v.shape)) for k, v in model.state_dict().items()}


def images(batch, size, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, 3, size, size)).astype(np.float32))
