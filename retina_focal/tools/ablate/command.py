"""Tables of the paper, or any grid of keys, on one's own data: `retina-focal ablate`."""

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Protocol

import yaml
from tqdm import tqdm

from retina_focal.data.registration import use_datasets
from retina_focal.errors import UserError
from retina_focal.files import whole_file
from retina_focal.tools.ablate import report
from retina_focal.tools.ablate.runs import (
    Run,
    execute,
    grid_rows,
    iterations_done,
    plan,
    read_row,
    row_names,
)
from retina_focal.tools.common import add_dataset_argument, command

POLL_SECONDS = 1.0
EPILOG = """
A row is a name in configs/ablations (a pattern such as 'table_1a_*' is several) or a YAML file.
With --base its own keys are merged onto that config; without, the file runs as it is: the paper's
setting. Finished runs are in the results file and are never repeated; a run that was stopped goes
on from its last checkpoint. Rows that come to the same settings share their runs.

Examples:
  %(prog)s 'table_1b_*' --base quick_start/bccd.yaml --iterations 250 --jobs 2
  %(prog)s --base mine.yaml --grid MODEL.RETINANET.FOCAL_LOSS_GAMMA=0,1,2 \\
    --grid MODEL.RETINANET.FOCAL_LOSS_ALPHA=0.25,0.5,0.75 --seeds 1,2,3
  %(prog)s 'table_1d_*' --cluster slurm --cluster-option slurm_partition=gpu \\
    --cluster-option gpus_per_node=1 --cluster-option timeout_min=1440
"""


class Job(Protocol):
    """A future of the standard library, or a job of submitit."""

    def done(self) -> bool: ...

    def result(self) -> dict: ...


Submit = Callable[[Run], Job]


@command
def main(argv: list[str]) -> None:
    """``retina-focal ablate``: run what is not in the results file yet, then write the tables."""
    args = parse_args(argv)
    rows = [read_row(name) for pattern in args.rows for name in row_names(pattern)]
    rows += grid_rows(dict(args.grid)) if args.grid else []
    if len({row.name for row in rows}) < len(rows):
        raise UserError("a row is given twice; give each row once, repetitions by --seeds")
    opts = [*args.opts]
    if args.iterations:
        opts += ["SOLVER.MAX_ITER", str(args.iterations)]
    planned = plan(rows, args.base, opts, args.dataset, args.seeds, args.output)
    check_runs(planned)
    results = load_results(args.results)
    submit = launcher(args)
    runs = {(run.settings, run.seed): run for runs in planned.values() for run in runs}
    waiting = [run for key, run in runs.items() if key not in results]
    failures: dict[Run, str] = {}
    try:
        run_all(waiting, submit, args.jobs or len(waiting), partial(record, args.results), failures)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
    results = load_results(args.results)
    report.write(rows, planned, list(results.values()), args.output)
    print(report.markdown(rows, planned, list(results.values())))
    print(f"results: {args.results}; table and plot: {args.output}")
    for run, error in failures.items():
        print(f"{run.name}, seed {run.seed} failed: {error}; see {run.folder / 'output.txt'}")
    if failures:
        raise SystemExit(1)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="retina-focal ablate",
        description=__doc__.splitlines()[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="name, pattern or YAML file")
    parser.add_argument("--base", metavar="CFG", help="config that the rows' keys are merged onto")
    parser.add_argument(
        "--grid",
        type=_axis,
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="values of a key; may be repeated: all combinations",
    )
    add_dataset_argument(parser)
    parser.add_argument("--iterations", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--seeds", type=_seeds, default=[1], metavar="1,2,3", help="default: 1")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs side by side, each with its part of the cores; default: 1, on slurm all",
    )
    parser.add_argument("--cluster", choices=["local", "slurm"], help="run through submitit")
    parser.add_argument(
        "--cluster-option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of submitit's executor; may be repeated",
    )
    parser.add_argument("--output", type=Path, default=Path("output/ablate"), metavar="DIR")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="default: results.json in the output folder"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for every run"
    )
    args = parser.parse_args(argv)
    if not args.rows and not args.grid:
        parser.error("nothing to run; name rows, such as 'table_1b_*', or give --grid KEY=V,V")
    if args.grid and not args.base:
        parser.error("--grid needs --base CFG, the config that it varies")
    if len(dict(args.grid)) < len(args.grid):
        keys = ", ".join(key for key, _ in args.grid)
        parser.error(f"--grid has the keys {keys}; give each key once, with all of its values")
    if args.cluster_option and not args.cluster:
        parser.error("--cluster-option needs --cluster local or slurm")
    args.results = args.results or args.output / "results.json"
    args.jobs = args.jobs or (None if args.cluster == "slurm" else 1)
    return args


def check_runs(planned: dict[str, list[Run]]) -> None:
    """Refuse datasets before hours of training rather than between them."""
    for runs in planned.values():
        cfg = runs[0].cfg
        use_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))


def run_all(
    runs: Sequence[Run],
    submit: Submit,
    jobs: int,
    record: Callable[[Run, dict], None],
    failures: dict[Run, str],
) -> None:
    """Run all, `jobs` at a time, with one progress line; what fails does not stop the others."""
    waiting, running = deque(runs), {}
    total = sum(run.cfg.SOLVER.MAX_ITER for run in runs)
    finished = 0
    with tqdm(total=total, unit="it", smoothing=0.05, disable=not runs) as progress:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                running[run] = submit(run)
            for run, job in list(running.items()):
                if not job.done():
                    continue
                del running[run]
                finished += run.cfg.SOLVER.MAX_ITER
                try:
                    record(run, job.result())
                except Exception as error:  # whatever the run, or the cluster, raised
                    failures[run] = str(error) or type(error).__name__
            progress.n = min(finished + sum(map(iterations_done, running)), total)
            done = len(runs) - len(waiting) - len(running)
            names = ", ".join(run.name for run in running)
            progress.set_description(f"{done}/{len(runs)} runs; {names}", refresh=True)
            if running:
                time.sleep(POLL_SECONDS)


def launcher(args: argparse.Namespace) -> Submit:
    """What starts a run: a process of this machine, or a job of submitit."""
    if not args.cluster:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        return partial(_start_process, threads=threads)
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "--cluster needs submitit, which is not installed; type: pip install submitit"
        ) from error
    executor = submitit.AutoExecutor(folder=args.output / "jobs", cluster=args.cluster)
    executor.update_parameters(name="ablate", **dict(args.cluster_option))
    return lambda run: executor.submit(execute, run.cfg.dump())


def _start_process(run: Run, threads: int) -> Job:
    # A process a run: what it leaves in memory, or its crash, is its own.
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent)
    job = pool.submit(execute, run.cfg.dump(), threads)
    pool.shutdown(wait=False)
    return job


def _end_with_parent() -> None:
    """A killed sweep leaves nothing running."""
    parent = parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def load_results(path: Path) -> dict[tuple[str, int], dict]:
    """Results of finished runs, by settings and seed; none where there is no file.

    Raises:
        UserError: the file is not what this tool writes.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())["runs"]
        return {(result["settings"], result["seed"]): result for result in results}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a results file of this tool ({error!r}); choose another by --results"
        ) from error


def record(path: Path, run: Run, result: dict) -> None:
    """Add a finished run to the results file."""
    results = load_results(path)
    results[run.settings, run.seed] = {"row": run.name, "settings": run.settings, **result}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"runs": list(results.values())}, indent=1) + "\n")


def _axis(text: str) -> tuple[str, list[object]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE,VALUE")
    return key, yaml.safe_load(f"[{values}]")


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, yaml.safe_load(value)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,3") from error
