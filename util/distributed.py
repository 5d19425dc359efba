"""Processes and devices: the only file outside tests/ that uses torch.distributed and torch.cuda."""

import ctypes
import gc
import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from util.errors import InputError, first_line

# what gloo and nccl say of a process that has ended, or is silent
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "imed out")

# for numbers on the CPU: such a collective does not wait for the device
_gloo_group: dist.ProcessGroup | None = None


def env_int(name: str, default: int = 0) -> int:
    """Return an environment variable as a number. Raises InputError."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} in the environment is not a number")
    return int(text)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list, for example "n03" of "n[03-07,9],m1"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodelist).partition(",")[0]


def read_world() -> tuple[int, int, int]:
    """Return (rank, local rank, number of processes) from torchrun's variables or Slurm's; (0, 0, 1) without either.

    Under Slurm, set MASTER_ADDR and MASTER_PORT where they are not set. Raises InputError.
    """
    if "WORLD_SIZE" in os.environ:
        return env_int("RANK"), env_int("LOCAL_RANK"), env_int("WORLD_SIZE")
    # an interactive shell and a batch script have one process, however many tasks the allocation is for
    world = env_int("SLURM_STEP_NUM_TASKS", 1)
    if world == 1:
        return 0, 0, 1
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    # a requeued job gets another port than its predecessor, which may not be gone yet
    number = 31 * env_int("SLURM_JOB_ID") + 7 * env_int("SLURM_STEP_ID") + env_int("SLURM_RESTART_COUNT")
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 20000))
    return env_int("SLURM_PROCID"), env_int("SLURM_LOCALID"), world


def is_restarted() -> bool:
    """Return whether Slurm or torchrun has started this run before."""
    return env_int("SLURM_RESTART_COUNT") + env_int("TORCHELASTIC_RESTART_COUNT") > 0


def local_world_size() -> int:
    """Return the number of this run's processes on this machine."""
    if read_world()[2] == 1:
        return 1
    # Slurm lists tasks per node as "2(x3),1": assume the first node's count on all
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return env_int("LOCAL_WORLD_SIZE", int(tasks[0]))


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """Make the device of --device the current one and return it; by default the accelerator, else the CPU.

    Processes on one machine take its devices in turn. Raises InputError.
    """
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name or best.type)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; for example cuda, cuda:1 or cpu") from None
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    index = device.index or 0
    if device.type != best.type or index >= count:
        raise InputError(
            f"--device {name}: not available; this machine has {best.type} (accelerators: {count}, counted from 0)"
        )
    index = (index + local_rank) % count
    torch.accelerator.set_device_index(index)
    # nearly all batches have one size: find the fastest convolution for it once
    torch.backends.cudnn.benchmark = True
    return torch.device(device.type, index)


def init(device_name: str | None, backend: str | None = None, timeout_s: float = 600.0) -> torch.device:
    """Join the other processes, if there are any, and return this one's device. Raises InputError.

    Collectives fail when a process does not answer for `timeout_s` seconds.
    """
    global _gloo_group
    rank, local_rank, world = read_world()
    device = pick_device(device_name, local_rank)
    if world == 1 or dist.is_initialized():
        return device

    # nccl, the default on CUDA, refuses processes that share a device
    processes, devices = local_world_size(), torch.accelerator.device_count()
    shared = processes > devices
    if shared and device.type != "cpu" and backend is None and rank == 0:
        print(
            f"{processes} processes on this machine see {devices} accelerators, and so exchange gradients by gloo; if "
            "the launcher shows each process only its own, add --dist-backend nccl"
        )
    backend = backend or ("gloo" if shared else dist.get_default_backend_for_device(device))
    if not dist.is_backend_available(backend):
        raise InputError(f"--dist-backend {backend}: this torch does not have it; gloo works on any device")

    timeout = timedelta(seconds=timeout_s)
    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=timeout))
        # torchrun's own store outlives a restart, and holds the addresses of the processes before it
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        _gloo_group = dist.new_group(timeout=timeout, backend="gloo")
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the {world} processes cannot connect: {first_line(error)}; start them with torchrun, and across machines "
            "set GLOO_SOCKET_IFNAME to the network interface"
        ) from None
    return device


def shutdown() -> None:
    """Leave the process group."""
    global _gloo_group
    # DDP's threads must end first, or they may abort the process
    gc.collect()
    _gloo_group = None
    dist.destroy_process_group()


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when torchrun, this process's parent, is killed, so that the run saves and stops."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error of a collective means only that another process is gone."""
    return is_distributed() and isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def make_deterministic() -> None:
    """Restrict torch to deterministic algorithms; where there is none, it raises RuntimeError. Call after `init`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # filling uninitialised memory finds reads of it, and costs time
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def seed_everything(*numbers: int, torch_seed: Callable = torch.manual_seed) -> None:
    """Seed the random streams of Python, NumPy and torch from a few numbers, for example (seed, epoch, update)."""
    a, b, c = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(a)
    np.random.seed(b)
    torch_seed(c)


def is_distributed() -> bool:
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_primary() -> bool:
    return rank() == 0


def print0(*values: object) -> None:
    """Print on rank 0, at once."""
    if is_primary():
        print(*values, flush=True)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """Return the largest value of all processes, without waiting for their devices."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_gloo_group)
    return int(tensor)


def broadcast_object(value: object) -> object:
    """Return rank 0's value on every process."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values, group=_gloo_group)
    return values[0]


def gather_object(value: object) -> list | None:
    """Return the values of all processes on rank 0, by rank; None elsewhere."""
    if not is_distributed():
        return [value]
    values = [None] * world_size() if is_primary() else None
    dist.gather_object(value, values, group=_gloo_group)
    return values


@contextmanager
def primary_first() -> Iterator[None]:
    """Run a block on rank 0 before the others run it: they find what it has downloaded."""
    if not is_distributed():
        yield
        return
    # a download may take longer than --dist-timeout; where rank 0 fails it ends, and the others with it
    group = dist.new_group(timeout=timedelta(days=1), backend="gloo")
    if not is_primary():
        dist.barrier(group)
    yield
    if is_primary():
        dist.barrier(group)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copy rank 0's tensors to every process, in place."""
    if not is_distributed():
        return
    for tensor in tensors:
        # nccl has no tensors on the CPU, such as those of --model-ema-force-cpu
        dist.broadcast(tensor, 0, group=_gloo_group if tensor.device.type == "cpu" else None)


def broadcast_state(module: nn.Module) -> None:
    """Copy rank 0's weights and buffers to every process."""
    broadcast_tensors(module.state_dict().values())


def broadcast_buffers(module: nn.Module) -> None:
    """Copy rank 0's buffers to every process: batch norms are local to a process while training."""
    broadcast_tensors(module.buffers())


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model for training in several processes; buffers stay local, see `broadcast_buffers`."""
    if not is_distributed():
        return model
    # DAFF's weights are channels-last: DDP copies their gradients, which is right
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # torch 2.14; its successor does not exist in the pinned version
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of a CUDA device since the last reset, in MiB; 0 for other devices."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0


def supports_bf16(device: torch.device) -> bool:
    """Return whether a device computes bf16 natively; where it does not, torch emulates it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe(device: torch.device) -> str:
    """Return the device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
