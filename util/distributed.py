"""Processes and devices: the only place, the benchmark apart, that speaks to torch.distributed and torch.cuda."""

import contextlib
import gc
import os
import re
import resource
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from util.errors import InputError

BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # gloo elsewhere


def _env_int(*names: str, default: int) -> int:
    for name in names:
        if name in os.environ:
            try:
                return int(os.environ[name])
            except ValueError:
                raise InputError(f"{name}={os.environ[name]!r} in the environment is not a number") from None
    return default


def _first_host(nodelist: str) -> str:
    """Give the first host of a Slurm node list such as "n[03-07,9],m1" or "a1,b2"."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else "127.0.0.1"


def _slurm_rendezvous() -> None:
    """Derive what torch needs from Slurm's variables; a requeued job gets another port than its dead predecessor."""
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")))
    job, step, restart = (_env_int(f"SLURM_{name}", default=0) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    os.environ.setdefault("MASTER_PORT", str(20000 + (job * 31 + step * 7 + restart) % 20000))


def find_world() -> tuple[int, int, int]:
    """Read rank, local rank and number of processes from torchrun's variables or Slurm's; alone, (0, 0, 1).

    An interactive Slurm shell, a step of one task, is one process whatever the job was allotted.
    """
    if "WORLD_SIZE" in os.environ:
        world = _env_int("WORLD_SIZE", default=1)
        rank = _env_int("RANK", default=0)
        if world > 1 and not 0 <= rank < world:
            raise InputError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}: use torchrun")
        return (rank, _env_int("LOCAL_RANK", default=0), world) if world > 1 else (0, 0, 1)
    world = _env_int("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", default=1)
    if world > 1 and "SLURM_PROCID" in os.environ:
        _slurm_rendezvous()
        return _env_int("SLURM_PROCID", default=0), _env_int("SLURM_LOCALID", default=0), world
    return 0, 0, 1


def make_deterministic() -> None:
    """Have torch take algorithms that give the same numbers each time, or raise RuntimeError; after `init`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which finds reads of it, and costs time
    torch.backends.cudnn.benchmark = False


def local_world_size() -> int:
    """Count this run's processes on this machine."""
    return _env_int("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=1) if is_distributed() else 1


def pick_device(name: str | None, local_rank: int = 0) -> torch.device:
    """Resolve --device; None is the best there is. Ranks share the devices of their machine in turn."""
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found is not None else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; for example cuda, cuda:1 or cpu") from None
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type:
        here = f"this machine offers {found.type} and cpu" if found is not None else "this machine offers only cpu"
        raise InputError(f"--device {name}: not available, {here}")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise InputError(f"--device {name}: there are {count}, numbered from 0")
    index = device.index if device.index is not None and find_world()[2] == 1 else local_rank % count
    device = torch.device(device.type, index)
    torch.accelerator.set_device_index(index)
    torch.backends.cudnn.benchmark = True  # one input size: the fastest convolution is found once
    return device


_ballots: list[tuple[dist.Work, Tensor]] = []  # the vote under way
_voters: list[dist.ProcessGroup] = []  # all processes, by gloo: votes wait for no device


def init(device_name: str | None, backend: str | None = None, timeout_s: float = 600.0) -> torch.device:
    """Join the other processes, if there are any, and choose this one's device.

    `timeout_s` is how long a process waits for the others before it gives them up.
    """
    rank, local_rank, world = find_world()
    device = pick_device(device_name, local_rank)
    if world > 1 and not dist.is_initialized():
        backend = backend or BACKENDS.get(device.type, "gloo")
        if not dist.is_backend_available(backend):
            raise InputError(f"--dist-backend {backend}: this torch has no such backend; gloo is for any device")
        try:
            timeout = timedelta(seconds=timeout_s)
            store = next(rendezvous("env://", rank, world, timeout=timeout))[0]
            # torchrun gives a restarted run the store of its dead predecessor, whose addresses are in it
            attempt = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=timeout)
            _voters[:] = [dist.new_group(timeout=timeout, backend="gloo")]
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the {world} processes of WORLD_SIZE do not meet: {reason}; use torchrun") from None
    return device


def is_lost_connection(error: Exception) -> bool:
    """Tell whether an error of a collective says no more than that another process is gone."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    lost += ("Timed out waiting", "timed out", "Timeout")
    return is_distributed() and any(words in str(error) for words in lost)


def shutdown() -> None:
    """Leave the group; a wrapped model must be gone by then, or the threads that it has may abort the process."""
    if is_distributed():
        gc.collect()
        _ballots.clear()
        _voters.clear()
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_primary() -> bool:
    return rank() == 0


def print0(*values: object, file=None) -> None:
    """Print on rank 0, at once. Raises InputError where nothing can be printed, as on a full disk."""
    if not is_primary():
        return
    try:
        print(*values, file=file or sys.stdout, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # what it still holds would be a second error when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
        raise InputError(
            f"the output cannot be written ({error.strerror}): send it elsewhere, and start again"
        ) from None


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast_object(value: object) -> object:
    """Give every process rank 0's value."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def agree(value: int) -> int:
    """Give the largest value that any process gave at its call before this one, and 0 at the first; alone, `value`.

    No process waits for another's device here, nor for another that is less than a call behind.
    """
    if not is_distributed():
        return value
    ballot = torch.tensor(value)
    _ballots.append((dist.all_reduce(ballot, dist.ReduceOp.MAX, group=_voters[0], async_op=True), ballot))
    if len(_ballots) == 1:
        return 0
    work, ballot = _ballots.pop(0)
    work.wait()
    return int(ballot)


def smallest(value: int) -> int:
    """Give the smallest of all processes' values."""
    return _reduce(value, dist.ReduceOp.MIN)


def total(value: int) -> int:
    """Give the sum of all processes' values."""
    return _reduce(value, dist.ReduceOp.SUM)


def _reduce(value: int, operation: dist.ReduceOp) -> int:
    if not is_distributed():
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, operation, group=_voters[0])
    return int(box)


def gather_objects(value: object) -> list | None:
    """Give rank 0 every process's value, by rank; the others get None."""
    if not is_distributed():
        return [value]
    box = [None] * world_size() if is_primary() else None
    dist.gather_object(value, box, group=_voters[0])
    return box


def broadcast_state(module: nn.Module) -> None:
    """Give every process rank 0's weights and buffers."""
    if is_distributed():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def broadcast_buffers(*modules: nn.Module | None) -> None:
    """Give every process rank 0's buffers: batch norms are local to a rank while training."""
    if is_distributed():
        for module in modules:
            for buffer in module.buffers() if module is not None else ():
                dist.broadcast(buffer, 0)


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap for training in several processes; buffers stay local, see `broadcast_buffers`."""
    if not is_distributed():
        return model
    # of DAFF's channels-last weights: it copies them, which is right
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def bf16_supported(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Read the peak of the device's memory since the last reset; on the CPU, the whole process's so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
