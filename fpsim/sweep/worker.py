"""What a worker of Dask does for a sweep: it trains one trial and answers with plain data, as JSON text."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from fpsim.errors import ConfigError, FpsimError

_one_at_a_time = threading.Lock()  # torch has one random state a process


def train(config_yaml: str, run_dir: str, topic: str) -> str:
    """Train a configuration in its run directory, as far as that has not been done; the answer as JSON text.

    `results`: the content of results.json; `estimate`: see `_estimated`; or `error`, a text, and `is_mistake`: whether
    it is the user's, so that another attempt would end alike. topic: of the event by which Dask tells that it is
    begun. Waits while another process trains in the same directory.
    """
    from distributed import get_worker
    from filelock import FileLock

    folder = Path(run_dir)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time, FileLock(f"{run_dir}.lock"):
            get_worker().log_event(topic, folder.name)
            answer = _train(config_yaml, folder)
    except FpsimError as error:
        answer = {"error": str(error), "is_mistake": isinstance(error, ConfigError)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}", "is_mistake": False}
    return json.dumps(answer)


def _train(config_yaml: str, folder: Path) -> dict[str, Any]:
    from fpsim import extensions, memory  # before torch, see accel/kernels/openmp.py

    memory.keep_freed_memory()
    extensions.import_of_environment()

    import torch

    from fpsim import runner
    from fpsim.config import parse_config
    from fpsim.config.tree import to_data
    from fpsim.config.yaml_loader import parse_yaml
    from fpsim.run_directory import CONFIG_FILE, RESULTS_FILE

    config = parse_config(to_data(parse_yaml(config_yaml, "<trial>")))
    threads = torch.get_num_threads()
    try:
        if not (folder / CONFIG_FILE).is_file():
            runner.run(config, folder, quiet=True)
        elif not (folder / RESULTS_FILE).is_file():
            runner.resume(folder, quiet=True)
    finally:
        torch.set_num_threads(threads)
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    machine = None if config.emulation is None else config.emulation.machine
    return {"results": results, "estimate": None if machine is None else _estimated(machine, folder)}


def _estimated(machine: Any, folder: Path) -> dict[str, Any]:
    """A step of the run on a machine: its description, and by scheme (see `accel.machine.compare`) seconds, joules and
    more; or the `error` of a machine that does not take the run's formats."""
    from accel.machine import compare
    from fpsim.run_directory import ledger_of

    described = machine.model_dump(mode="json")
    try:
        return {"machine": described, "schemes": compare([machine.estimate(ledger_of(folder))])}
    except ValueError as error:
        return {"machine": described, "schemes": [], "error": str(error)}
