"""The command line. Heavy imports wait until a verb needs them, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fpsim.errors import ConfigError, FpsimError

app = typer.Typer(
    name="fpsim",
    help="Emulate number formats and sparse encodings in training, and report what they save.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to change in CONFIG.")]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of an experiment.")]


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory for the run.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train CONFIG in a new run directory."""
    from fpsim.config import load_config

    loaded = load_config(config, overrides or [])
    from fpsim import memory, runner

    memory.keep_freed_memory()
    _show_result(runner.run(loaded, run_dir, quiet=quiet), as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of runs (its newest).")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run: it ends as if it had not been interrupted."""
    from fpsim import memory, runner

    memory.keep_freed_memory()
    _show_result(runner.resume(run, quiet=quiet), as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of runs.")],
    output: Annotated[Path | None, typer.Option(help="Folder for report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: tables on stdout, and report.html."""
    from rich.console import Console

    from fpsim.report import comparison, load_results
    from fpsim.report import report as write_report
    from fpsim.runner import find_run

    folders, console = [find_run(path) for path in runs], Console()
    text = write_report(folders, output, width=console.width, color=console.is_terminal and not console.no_color)
    print(json.dumps(comparison([load_results(f) for f in folders]), indent=1) if as_json else text)


@app.command()
def validate(config: ConfigName, overrides: Overrides = None) -> None:
    """Check CONFIG's keys, values and formats and print it with every default (data and layers are met by `run`)."""
    from fpsim.config import config_to_yaml, load_config

    print(config_to_yaml(load_config(config, overrides or [])), end="")


@app.command()
def schema() -> None:
    """Print the JSON Schema of configurations, for editors."""
    from fpsim.config import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def presets(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one.")] = None) -> None:
    """List the experiments, accelerators and formats that come with fpsim, or show one."""
    from fpsim.config import presets as all_presets

    found = all_presets()
    if name is None:
        _print_table(["kind", "name", "what it is"], [[one.kind, one.name, one.summary] for one in found])
        return
    chosen = [preset for preset in found if preset.name == name]
    if not chosen:
        raise _unknown("preset", name, [preset.name for preset in found])
    print("\n".join(preset.path.read_text(encoding="utf-8") for preset in chosen), end="")


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A preset or any eXmY.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the number formats, or show one with the value of every code."""
    import accel

    try:
        chosen = accel.formats() if name is None else [accel.format(name)]
    except ValueError as error:
        raise _mistake(str(error)) from None
    rows = [_format_row(fmt) for fmt in chosen]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    cells = [[f"{v:.7g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    _print_table(list(rows[0]), cells)
    if name is not None and chosen[0].bits <= 8:
        values = chosen[0].codes().tolist()
        half = len(values) // 2
        pairs = [[text for c in (i, i + half) for text in (f"0x{c:02x}", f"{values[c]:.7g}")] for i in range(half)]
        _print_table(["code", "value", "code", "value"], pairs)


def main() -> None:
    """Entry point: exit code 0, 1 for a failure, 2 for the user's mistake."""
    try:
        app()
    except ConfigError as error:
        _fail(str(error), 2)
    except FpsimError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)


def _fail(message: str, code: int) -> None:
    print(f"fpsim: {message}" if code == 1 else message, file=sys.stderr)
    sys.exit(code)


def _show_result(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run_dir": str(result.run_dir), **result.results}, indent=1))
        return
    print(f"{result.run_dir}: test accuracy {result.accuracy_percent:.2f} % (seed {result.results['seed']})")
    print(f"report: fpsim report {result.run_dir}")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """A plain table, as wide as its content whatever the terminal: no number is cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in header:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, Console(width=1 << 12).measure(table).maximum)).print(table)


def _format_row(fmt: Any) -> dict[str, object]:
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "policy": fmt.policy,
        "max": fmt.max,
        "min_normal": fmt.min_normal,
        "min_subnormal": fmt.min_subnormal,
        "eps": fmt.eps,
    }


def _mistake(message: str) -> ConfigError:
    from fpsim.errors import Problem

    return ConfigError([Problem("", message)])


def _unknown(what: str, name: str, allowed: list[str]) -> ConfigError:
    from difflib import get_close_matches

    close = get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return _mistake(f"unknown {what} {name!r} (allowed: {', '.join(allowed)}){hint}")


if __name__ == "__main__":
    main()
