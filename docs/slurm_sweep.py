"""Run `iontwin sweep` on workers that SLURM starts: python slurm_sweep.py --jobs 20 CONFIG --out STORE [...]

Needs: pip install 'ion-memristor-twin[cluster]' dask-jobqueue, and a file system that the workers share with this
process for the Python environment only: the store is written by this process alone. Start it where a process may stay
for the whole sweep (a login node under tmux, or a job of its own). Killed, the same command goes on.
"""

import argparse
import subprocess
import sys

from dask_jobqueue import SLURMCluster


def main() -> int:
    """Start the cluster, run the sweep on it, and return the exit status of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="SLURM jobs, each with --workers workers")
    parser.add_argument("--workers", type=int, default=1, help="workers of a job, one core each")
    parser.add_argument("--memory", default="4GB", help="memory of a job; sweep.memory_mb is that of one worker")
    parser.add_argument("--walltime", default="04:00:00", help="of a job; a job that ends is replaced")
    parser.add_argument("--queue", help="partition")
    parser.add_argument("--account", help="account that is charged")
    parser.add_argument("--gpu", action="store_true", help="one GPU a job, with one worker (--workers 1)")
    options, sweep = parser.parse_known_args()

    with SLURMCluster(
        cores=options.workers,
        processes=options.workers,  # one thread each, since each chunk may take all of sweep.memory_mb
        memory=options.memory,
        walltime=options.walltime,
        queue=options.queue,
        account=options.account,
        # SLURM sets CUDA_VISIBLE_DEVICES for the job, and the worker then computes there.
        job_extra_directives=["--gres=gpu:1"] if options.gpu else [],
        # Lets a worker end shortly before its job does, so that its chunk goes to another without counting as a death.
        worker_extra_args=["--lifetime", f"{_seconds(options.walltime) - 120}s", "--lifetime-stagger", "60s"],
    ) as cluster:
        cluster.adapt(minimum_jobs=options.jobs, maximum_jobs=options.jobs)  # also replaces the jobs that end
        command = [sys.executable, "-m", "experiments", "sweep", *sweep, "--scheduler", cluster.scheduler_address]
        return subprocess.run(command, check=False).returncode


def _seconds(walltime: str) -> int:
    hours, minutes, seconds = map(int, walltime.split(":"))
    return 3600 * hours + 60 * minutes + seconds


if __name__ == "__main__":
    sys.exit(main())
