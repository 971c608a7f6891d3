"""Ranks on this machine: the command line once a rank, through torch's own elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(ranks: int, arguments: list[str]) -> int:
    """Run `fpsim arguments` as so many ranks that train together; returns the exit code of the first that fails, or 0.

    Each rank gets its share of the processor's cores, where OMP_NUM_THREADS says nothing else.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    logging.disable(logging.CRITICAL)  # the ranks tell what goes wrong
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "fpsim", *arguments)  # -P: as the command is installed
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"fpsim: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return max(failure.exitcode, 1)
    except SignalException:
        return 1
    return 0
