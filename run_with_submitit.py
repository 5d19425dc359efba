"""Submit main.py to Slurm, or run it here as Slurm would, with submitit.

`python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --output_dir OUT …` takes every flag of main.py besides
its own. A job that is preempted, requeued by hand or at its time limit goes on from the step it was in.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from util import options
from util.errors import InputError
from util.parser import Parser

ROOT = Path(__file__).resolve().parent
PREEMPTED = 75  # main.py's exit status where a signal stopped it
BEFORE_THE_END = 120  # seconds, in which a step is finished and saved


class Task:
    """One process of a job; submitit pickles it."""

    def __init__(self, flags: Sequence[str]) -> None:
        self.flags = list(flags)

    def __call__(self) -> int:
        import submitit

        environment = submitit.JobEnvironment()
        meet(environment)
        import main  # only now: it reads what `meet` sets

        status = main.main(self.flags)
        if status not in (0, PREEMPTED):
            raise RuntimeError(f"main.py ended with status {status}")
        if status == PREEMPTED and environment.cluster == "slurm" and environment.global_rank == 0:
            requeue(environment.job_id)
        return status

    def checkpoint(self):
        """Be run again as it is, where submitit meets the signal before main.py listens."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def meet(environment) -> None:
    """Tell main.py's processes where they meet, by the job's own numbers: a requeued job meets elsewhere."""
    if environment.cluster == "slurm":
        return  # main.py reads Slurm's variables itself
    values = {
        "RANK": environment.global_rank,
        "LOCAL_RANK": environment.local_rank,
        "WORLD_SIZE": environment.num_tasks,
        "LOCAL_WORLD_SIZE": environment.num_tasks // environment.num_nodes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 20000 + int("".join(filter(str.isdigit, environment.job_id)) or 0) % 20000,
    }
    os.environ |= {name: str(value) for name, value in values.items()}


def requeue(job: str) -> None:
    """Have Slurm run the job again, which ends this one."""
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    print(f"run_with_submitit.py: requeued job {job} {done.stderr.strip()}", flush=True)
    time.sleep(60)  # the end of this process would be the job's


class SlurmFlags(options.KeyValues):
    """KEY=VALUE with sbatch's names, which have dashes."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = (word.partition("=") for word in values)
        words = [key.replace("-", "_") + equals + value for key, equals, value in pairs]
        super().__call__(parser, namespace, words, option_string)


def build_parser() -> Parser:
    parser = Parser(
        prog="run_with_submitit.py",
        description=__doc__.partition("\n")[0],
        epilog="All other flags are main.py's: python main.py --help",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="local: here; debug: in this process")
    add("--dry-run", action="store_true", help="print the job script, and submit nothing")
    add("--job-name", default="dhvt")
    add("--nodes", type=int, default=1)
    add("--ngpus", type=int, default=0, help="GPUs a node, each with a process; on the CPU, see --tasks-per-node")
    add("--tasks-per-node", type=int, default=None, help="processes a node; default: one a GPU, at least one")
    add("--cpus-per-task", type=int, default=10)
    add("--mem", default=None, help="memory a node, as 120GB")
    add("--timeout", type=int, default=2800, metavar="MINUTES", help="after which the job is requeued, and goes on")
    add("--partition", default=None)
    add("--account", default=None)
    add("--qos", default=None)
    add("--constraint", default=None)
    add("--comment", default=None)
    add("--slurm", nargs="*", default={}, action=SlurmFlags, metavar="KEY=VALUE", help="any of sbatch's flags")
    return parser


def find_parameters(args: argparse.Namespace) -> dict[str, object]:
    """Give submitit's parameters of a Slurm job."""
    tasks = args.tasks_per_node or max(1, args.ngpus)
    named = ("partition", "account", "qos", "constraint", "comment", "mem")
    found = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    found |= {"job_name": args.job_name, "nodes": args.nodes, "ntasks_per_node": tasks, "time": args.timeout}
    found |= {"cpus_per_task": args.cpus_per_task, "signal_delay_s": BEFORE_THE_END}
    found |= {"gpus_per_node": args.ngpus} if args.ngpus else {}
    found["additional_parameters"] = {"requeue": True, **{k.replace("_", "-"): v for k, v in args.slurm.items()}}
    found["srun_args"] = ["--kill-on-bad-exit=1"]  # a process that dies takes the others with it
    return found


def prepare(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], Path]:
    """Tell the job's flags from main.py's, check both, and give the folder of the run. Raises InputError."""
    args, rest = build_parser().parse_known_args(list(argv))
    for name in ("nodes", "cpus_per_task", "timeout", "tasks_per_node"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.ngpus < 0:
        raise InputError(f"--ngpus {args.ngpus} must be 0 or more")
    run = options.parse(rest)
    if not run.output_dir:
        raise InputError("--output_dir FOLDER is needed, for checkpoints and the job's own files")
    if args.cluster != "slurm" and args.nodes > 1:
        raise InputError(f"--nodes {args.nodes} is for --cluster slurm: leave it out")
    out = Path(run.output_dir).absolute()
    rest += ["--output_dir", str(out)]
    if not (run.resume or run.eval or run.only_test_speed):
        rest += ["--resume", "auto"]
    return args, rest, out


def submit(args: argparse.Namespace, flags: list[str], out: Path) -> int:
    """Submit the job, or run it, and give the exit status."""
    try:
        import submitit
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError:
        raise InputError("submitit is not installed: pip install -r requirements-extra.txt") from None
    folder, parameters = out / "submitit", find_parameters(args)
    if args.dry_run:
        print(_make_sbatch_string("python -u -m submitit.core._submit FOLDER", folder, **parameters))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        executor = submitit.AutoExecutor(str(folder), cluster=args.cluster)
    except RuntimeError as error:
        raise InputError(f"--cluster {args.cluster}: {error}; --cluster local runs it here") from None
    if args.cluster == "slurm":
        executor._executor.update_parameters(**parameters)
    else:
        tasks = parameters["ntasks_per_node"]
        executor.update_parameters(tasks_per_node=tasks, gpus_per_node=args.ngpus, timeout_min=args.timeout)
    from run_with_submitit import Task as Importable  # this file's own name is __main__, which a job does not know

    try:
        job = executor.submit(Importable(flags))
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise InputError(f"sbatch refuses the job ({reason}); --dry-run shows its script") from None
    print(f"job {job.job_id}: the run is in {out}, what it prints in {job.paths.stdout}", flush=True)
    return 0 if args.cluster == "slurm" else wait(job)


def wait(job) -> int:
    """Wait for a job that runs here, and give main.py's exit status, or 1 for a job that failed otherwise."""
    print("waiting for its end", flush=True)
    try:
        results = job.results()
    except Exception as error:  # submitit's, with the traceback of the process that failed
        lines = [line for line in str(error).splitlines() if "Error: " in line] or [type(error).__name__]
        files = sorted(job.paths.folder.glob(f"{job.job_id}_*_log.err"))
        reasons = [line for file in files for line in file.read_text().splitlines() if "main.py: error" in line]
        line = f"{(reasons or lines)[0].removeprefix('main.py: error').lstrip(': ')}; see {job.paths.stderr}"
        print(f"run_with_submitit.py: error: {line}", file=sys.stderr, flush=True)
        return 2 if lines[-1].endswith("status 2") else 1
    if PREEMPTED in results:
        print("it was stopped, and the same command goes on with it", flush=True)
        return PREEMPTED
    print("it ended well", flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status: 0, 1 for a job that failed here, 2 for what the caller can mend."""
    try:
        return submit(*prepare(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        print(f"run_with_submitit.py: error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        where = error.filename or "--output_dir"
        print(f"run_with_submitit.py: error: {where}: {error.strerror}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
