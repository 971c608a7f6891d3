"""The Dask cluster that a sweep is trained on: one that runs already, or one of this machine's own."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from fpsim.errors import ConfigError, Problem
from fpsim.sweep.schema import Dask

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

ADDRESS_VARIABLE = "DASK_SCHEDULER_ADDRESS"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def check_installed() -> None:
    """Raises ConfigError where Dask is not installed."""
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise ConfigError([Problem("", "a sweep needs Dask: pip install 'fpsim[sweep]'")]) from None


@contextmanager
def connected(spec: Dask, trials: int) -> Iterator[Client]:
    """A client of the scheduler that the section, or else the environment, names; or of worker processes of this
    machine, for that many trials at most, which end with the context.

    Raises ConfigError for a scheduler that cannot be reached.
    """
    from distributed import Client
    from distributed.comm import get_address_host
    from distributed.utils import silence_logging_cmgr

    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        address = spec.scheduler or os.environ.get(ADDRESS_VARIABLE)
        try:
            if address:
                get_address_host(address)  # a client of an address that is none takes a minute to end
            scheduler = address or stack.enter_context(_own_cluster(spec, trials))
            client = Client(scheduler, set_as_default=False, name="fpsim-sweep")
        except (OSError, ValueError) as error:
            key = "dask.scheduler" if spec.scheduler else ADDRESS_VARIABLE
            raise ConfigError([Problem(key, f"no scheduler answers at {address!r}: {error}")]) from None
        yield stack.enter_context(client)


def lacking(client: Client, resources: Mapping[str, float]) -> str | None:
    """The worker that trials wait for, as a text; None where one that offers the resources is there."""
    offers = [worker["resources"] for worker in client.scheduler_info()["workers"].values()]
    if any(all(offer.get(name, 0) >= amount for name, amount in resources.items()) for offer in offers):
        return None
    wanted = ", ".join(f"{name}={amount:g}" for name, amount in resources.items())
    return f"a worker with {wanted}" if wanted else "a worker"


@contextmanager
def _own_cluster(spec: Dask, trials: int) -> Iterator[LocalCluster]:
    """A scheduler and worker processes on the loopback interface; a worker that dies is started again."""
    from distributed import LocalCluster

    workers = spec.workers or max(1, (os.cpu_count() or 1) // spec.threads_per_worker)
    with (
        tempfile.TemporaryDirectory(prefix="fpsim-sweep-") as folder,
        LocalCluster(
            n_workers=min(workers, trials),
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            local_directory=folder,
            memory_limit=None,
            resources=spec.resources,
            env=dict.fromkeys(THREAD_VARIABLES, str(spec.threads_per_worker)),
            silence_logs=logging.CRITICAL,
        ) as cluster,
    ):
        yield cluster
