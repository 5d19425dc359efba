"""Submit main.py to Slurm with submitit, or run it on this machine as Slurm would.

`python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --output_dir OUT …` takes all flags of main.py besides
its own. A job that reaches its time limit, is preempted or requeued resumes from its last update.

Reference: https://github.com/facebookincubator/submitit
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util import options, stop_signal
from util.command import STOPPED, Parser, add_flags, nonnegative_int, positive_int, run_command
from util.errors import InputError

SIGNAL_DELAY = 120  # seconds before the time limit at which Slurm sends SIGUSR2: enough to finish an update and save
SLURM_GRACE = 600  # seconds within which Slurm ends the processes of a stopped job
SBATCH_FLAGS = ("mem", "partition", "account", "qos", "constraint", "comment")

FLAGS = (
    (
        "--cluster",
        ("slurm", "local", "debug"),
        "slurm",
        "local: processes on this machine; debug: within this process",
    ),
    ("--dry-run", bool, False, "print the job script instead of submitting it"),
    ("--job-name", str, "dhvt", "name of the job in the queue"),
    ("--nodes", positive_int, 1, "number of nodes"),
    ("--ngpus", nonnegative_int, 0, "GPUs per node, each with a process; 0: on the CPU"),
    ("--tasks-per-node", positive_int, None, "processes per node; default: one per GPU, at least one"),
    ("--cpus-per-task", positive_int, 10, "CPU cores per process"),
    ("--timeout", positive_int, 2800, "time limit in minutes, at which the job is requeued and resumes"),
    *((f"--{name}", str, None, "passed to sbatch") for name in SBATCH_FLAGS),
    ("--slurm", [str], (), "KEY=VALUE or KEY: any other flags of sbatch, for example gres=gpu:8 exclusive"),
)


@dataclass
class Task:
    """What one process of a job runs; submitit pickles it, and calls it in that process."""

    flags: list[str]

    def __call__(self) -> int:
        """Run main.py and return its exit status."""
        from submitit import JobEnvironment, helpers

        environment = JobEnvironment()
        on_slurm = environment.cluster == "slurm"
        if not on_slurm:
            # main.py reads Slurm's variables itself; here the host's name need not resolve
            os.environ.pop("MASTER_PORT", None)
            helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            os.environ["MASTER_ADDR"] = "127.0.0.1"

        # imported here, as it reads the environment
        import main

        status = main.main(self.flags)
        if on_slurm and status == STOPPED and environment.global_rank == 0:
            leave_to_slurm(environment.job_id)
        if on_slurm and status not in (0, STOPPED):
            # an exception fails the task, and --kill-on-bad-exit the others
            raise RuntimeError(f"main.py ended with status {status}")
        return status

    def checkpoint(self):
        """Return this same task for submitit to requeue, if its signal comes before main.py has installed a handler."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def leave_to_slurm(job_id: str) -> None:
    """Requeue the job if it was stopped by submitit's signal, and wait for Slurm to end this process.

    SIGTERM comes from scancel, which ends the job, or from a preemption, after which Slurm requeues it. But a job whose
    processes end by themselves counts as completed.
    """
    if stop_signal.received == signal.SIGUSR2:
        print(f"run_with_submitit.py: requeuing job {job_id}", flush=True)
        subprocess.run(["scontrol", "requeue", job_id])
    time.sleep(SLURM_GRACE)


def build_parser() -> Parser:
    parser = Parser(
        prog="run_with_submitit.py",
        description="Submit main.py to Slurm with submitit, or run it on this machine as Slurm would.",
        epilog="All other flags are passed to main.py: python main.py --help",
    )
    add_flags(parser, FLAGS)
    return parser


def slurm_parameters(args: argparse.Namespace) -> dict[str, object]:
    """Return the parameters of submitit's SlurmExecutor; None is Slurm's default."""
    additional = {"requeue": True}
    for word in args.slurm:
        # a word alone is a switch of sbatch, such as exclusive
        key, _, value = word.partition("=")
        additional[key] = value or True
    return {
        **{name: getattr(args, name) for name in SBATCH_FLAGS},
        "job_name": args.job_name,
        "nodes": args.nodes,
        "ntasks_per_node": args.tasks_per_node or max(1, args.ngpus),
        "gpus_per_node": args.ngpus or None,
        "cpus_per_task": args.cpus_per_task,
        "time": args.timeout,
        "signal_delay_s": SIGNAL_DELAY,
        "additional_parameters": additional,
        # Slurm 22.05 to 23.02: srun does not inherit --cpus-per-task from sbatch
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
    }


def run(argv: list[str]) -> int:
    args, flags = build_parser().parse_known_args(argv)
    main_args = options.parse(flags)
    if not main_args.output_dir:
        raise InputError("--output_dir FOLDER is required, for checkpoints and the job's logs")
    if args.cluster != "slurm" and args.nodes > 1:
        raise InputError(f"--nodes {args.nodes}: --cluster {args.cluster} has one node; leave it out")

    # The job may run in another folder. Started again, it resumes from its own checkpoints.
    out = Path(main_args.output_dir).absolute()
    flags += ["--output_dir", str(out)]
    if options.trains(main_args) and not main_args.resume:
        flags += ["--resume", "auto"]
    return submit(args, flags, out)


def submit(args: argparse.Namespace, flags: list[str], out: Path) -> int:
    """Submit the job, or run it here, and return the exit status."""
    try:
        import submitit
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError:
        raise InputError("submitit is not installed: pip install -r requirements-extra.txt") from None
    parameters = slurm_parameters(args)
    if args.dry_run:
        # the only function of submitit that is not public: a public executor needs srun on this machine
        print(_make_sbatch_string("python -u -m submitit.core._submit FOLDER", out / "submitit", **parameters))
        return 0

    # the job's processes import main.py, wherever they run
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        executor = submitit.AutoExecutor(out / "submitit", cluster=args.cluster)
    except RuntimeError as error:
        raise InputError(f"--cluster {args.cluster}: {error}; --cluster local runs it on this machine") from None
    # submitit ignores the parameters of clusters other than the executor's
    executor.update_parameters(
        tasks_per_node=parameters["ntasks_per_node"],
        gpus_per_node=parameters["gpus_per_node"],
        timeout_min=args.timeout,
        **{f"slurm_{name}": value for name, value in parameters.items()},
    )
    try:
        job = executor.submit(Task(flags))
    except RuntimeError as error:
        reason = str(error).rpartition("\n")[2]
        raise InputError(f"sbatch refuses the job ({reason}); --dry-run prints its script") from None
    print(f"job {job.job_id}: output folder {out}, log {job.paths.stdout}", flush=True)
    if args.cluster == "slurm":
        return 0
    return job.result() if args.cluster == "debug" else wait(job)


def wait(job) -> int:
    """Wait for a job of --cluster local and return main.py's exit status."""
    job.wait()
    # rank 0 comes first
    logs = sorted(job.paths.folder.glob(f"{job.job_id}_*_log.err"))
    errors = [line for path in logs for line in path.read_text().splitlines() if line.startswith("main.py: error")]
    try:
        status = max(job.results())
    except RuntimeError:
        # one of several processes ended at once after its error, without a result
        status = 2 if errors else 1
    if status == STOPPED:
        print("it was stopped; run the same command again to resume", flush=True)
    elif status:
        reason, *_ = [*errors, "the job failed"]
        print(f"run_with_submitit.py: error: {reason}; see {job.paths.stderr}", file=sys.stderr, flush=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("run_with_submitit.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
