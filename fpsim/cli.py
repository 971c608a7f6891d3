"""The command line. Heavy imports wait until a verb needs them, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fpsim.errors import ConfigError, FpsimError, ToldError, reason_of

app = typer.Typer(
    name="fpsim",
    help="Emulate number formats and sparse encodings in training, and report what they save.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class SchemaOf(StrEnum):
    """What `fpsim schema` takes."""

    config = "config"
    sweep = "sweep"
    results = "results"
    report = "report"


class ReportFormat(StrEnum):
    """What `fpsim report --format` takes."""

    md = "md"
    csv = "csv"
    json = "json"
    html = "html"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ranks = Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks that train together on this machine.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to change in CONFIG.")]
ConfigName = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of an experiment.")]


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory for the run.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of a step goes: profile.json, trace.json.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained, emulated, stored; train and write nothing.")
    ] = False,
    nproc: Ranks = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train CONFIG in a new run directory; on several ranks by --nproc, or started by torchrun -m fpsim run."""
    from fpsim.config import load_config

    loaded = load_config(config, overrides or [])
    if dry_run and (profile or (nproc or 1) > 1):
        raise _mistake("--dry-run trains nothing, on one rank: leave out --profile and --nproc")
    if nproc is not None and _is_rank():
        raise _mistake("--nproc: torchrun has started the ranks: leave it out")
    if nproc is not None and nproc > 1:
        loaded.check_parts(nproc)
        _launch(nproc, _without_nproc(sys.argv[1:]))
    from fpsim import memory

    memory.keep_freed_memory()
    if dry_run:
        from fpsim import plan

        found = plan.plan(loaded, run_dir)
        print(json.dumps(found, indent=1, allow_nan=False)) if as_json else plan.show(found)
        return
    from fpsim import runner

    result = runner.run(loaded, run_dir, quiet=quiet, profile=profile)
    if not profile or _is_later_rank():
        _show_result(result, as_json)
        return
    from fpsim import profile as profiles

    profiled = profiles.load(result.run_dir)
    _show_result(result, as_json, profile=profiled)
    if not as_json:
        profiles.show(profiled, result.run_dir)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of runs (its newest).")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run: it ends as if it had not been interrupted. On as many ranks as it was begun."""
    from fpsim.run_directory import environment_of, run_folder

    folder = run_folder(run)
    if not _is_rank() and (ranks := environment_of(folder)["world_size"]) > 1:
        _launch(ranks, ["resume", str(folder), *["--quiet"] * quiet, *["--json"] * as_json])
    from fpsim import memory, runner

    memory.keep_freed_memory()
    _show_result(runner.resume(folder, quiet=quiet), as_json)


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A sweep's YAML file, or the name of a preset.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the trials and how far they are.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train every trial of a sweep on Dask's workers and compare them; again, it goes on with what is not finished."""
    from fpsim.sweep import load_sweep, page, read_outcomes, run_sweep

    plan = load_sweep(config, overrides or [])
    if dry_run:
        outcomes = read_outcomes(plan)
        if as_json:
            rows = [
                {"config_hash": one.trial.config_hash, "varied": one.trial.varied, "status": one.status}
                for one in outcomes
            ]
            print(json.dumps(rows, indent=1))
        else:
            page.show_plan(plan, outcomes)
        return
    summary = run_sweep(plan, quiet=quiet)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        page.show(summary)
        print(plan.folder / "report.html")
    if any(row["status"] == "failed" for row in summary["trials"]):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of runs.")],
    format_name: Annotated[
        ReportFormat | None,
        typer.Option("--format", help="This alone: html as a file, the others on stdout or, with --output, as a file."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, or report.md, .csv, .json.")] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(help="An accelerator with a machine, by name or file; may be repeated. Else those of the runs."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: tables on stdout, and report.html; or in another format."""
    from rich.console import Console

    from fpsim import report as reports
    from fpsim.run_directory import find_run

    if as_json and format_name is not None:
        raise _mistake(f"--json and --format {format_name.value} exclude each other")
    folders, machines, console = [find_run(path) for path in runs], machine or [], Console()
    if format_name is not None:
        print(reports.report_as(format_name.value, folders, output, machines=machines), end="")
        return
    color = console.is_terminal and not console.no_color
    text = reports.report(folders, output, machines=machines, width=console.width, color=color)
    print(json.dumps(reports.compared(folders, machines), indent=1) if as_json else text)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory, or a folder of runs (its newest).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """Show what two runs differ in: configuration, environment, results, bits."""
    from fpsim import differences

    found = differences.differences(a, b)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        differences.show(found)


@app.command()
def validate(config: ConfigName, overrides: Overrides = None, nproc: Ranks = None) -> None:
    """Check CONFIG's keys, values and formats and print it with every default (data and layers are met by `run`)."""
    from fpsim.config import config_to_yaml, load_config

    loaded = load_config(config, overrides or [])
    loaded.check_parts(nproc or 1)
    print(config_to_yaml(loaded), end="")


@app.command()
def schema(
    of: Annotated[
        SchemaOf, typer.Argument(metavar="[config|sweep|results|report]", help="What it describes.")
    ] = SchemaOf.config,
) -> None:
    """Print a JSON Schema: of configurations and sweeps, for editors; of results.json and of the report as JSON."""
    if of is SchemaOf.config:
        from fpsim.config import json_schema as found
    elif of is SchemaOf.sweep:
        from fpsim.sweep.schema import json_schema as found
    elif of is SchemaOf.results:
        from fpsim.report.results import results_schema as found
    else:
        from fpsim.report.document import document_schema as found
    print(json.dumps(found(), indent=2))


@app.command()
def presets(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one.")] = None) -> None:
    """List the experiments, accelerators and formats that come with fpsim, or show one."""
    from fpsim.config import presets as all_presets
    from fpsim.console import print_table

    found = all_presets()
    if name is None:
        print_table(["kind", "name", "what it is"], [[one.kind, one.name, one.summary] for one in found])
        return
    chosen = [preset for preset in found if preset.name == name]
    if not chosen:
        raise _unknown("preset", name, [preset.name for preset in found])
    print("\n".join(preset.path.read_text(encoding="utf-8") for preset in chosen), end="")


@app.command()
def formats(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A preset, a format file, or a text such as e3m4, int6 or bfp8."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the number formats, or show one: its properties, codes and number line."""
    from fpsim import format_page
    from fpsim.config import load_format

    if as_json:
        rows = format_page.listed() if name is None else [format_page.in_full(load_format(name))]
        print(json.dumps(rows, indent=1, allow_nan=False))
    elif name is None:
        format_page.print_list()
    else:
        format_page.print_page(load_format(name))


@app.command()
def doctor(
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Look for MNIST, CIFAR or image folders there; may be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder that runs would go to.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Check this installation and machine, with a self-test; exit code 1 if anything failed."""
    try:
        from fpsim import doctor as verb
    except (ImportError, OSError) as error:
        raise FpsimError(f"a library cannot be loaded: {error} (try: pip install --upgrade fpsim)") from error

    checks = verb.examine(output, data or [])
    if as_json:
        print(json.dumps(verb.to_data(checks), indent=1))
    else:
        verb.show(checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


@app.command()
def conformance(
    full: Annotated[bool, typer.Option("--full", help="All 2^32 float32 patterns, not a sample: minutes.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare the emulator's bits with ml_dtypes, torch and gfloat; exit code 1 if any differ."""
    from dataclasses import asdict

    from fpsim.conformance import run as compare
    from fpsim.console import counting, print_table

    with counting("conformance", quiet) as progress:
        rows = compare(full, progress)
    pairs, mismatches = sum(row.pairs for row in rows), sum(row.mismatches for row in rows)
    if as_json:
        totals = {"full": full, "pairs": pairs, "mismatches": mismatches}
        print(json.dumps(totals | {"rows": [asdict(row) for row in rows]}, indent=1, allow_nan=False))
    else:
        counts = [(f"{row.pairs:,}", f"{row.mismatches:,}", f"{row.seconds:.1f}") for row in rows]
        cells = [(row.reference, row.format, row.modes, *count) for row, count in zip(rows, counts, strict=True)]
        print_table(["reference", "format", "modes", "pairs", "mismatches", "seconds"], cells)
        for row in rows:
            if (first := row.first) is not None:
                results = f"{first.ours}, not {first.theirs}"
                print(f"{row.reference}, {first.format}: {first.operation} {first.input}: {results}")
        print(f"{pairs:,} pairs compared, {mismatches:,} mismatches")
    if mismatches:
        raise typer.Exit(1)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .npy, a .safetensors or a packed stream.")],
    fmt: Annotated[str, typer.Option("--format", help="Of the codes; a packed stream has its own.")] = "e4m3fn",
    alpha: Annotated[
        float | None, typer.Option(help="The +-alpha of pruned values; else a frequent one of the smallest magnitudes.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a file's tensors take under every codec, the entropies, and the best codec."""
    from fpsim.inspect import pages, show, to_data

    found = pages(file, fmt, alpha)
    if as_json:
        print(json.dumps([to_data(page) for page in found], indent=1))
        return
    for page in found:
        show(page)


@app.command()
def analyze(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|RUN",
            help="A .npy or a .safetensors file, or a run directory: what the run recorded of its gradients.",
        ),
    ],
    tensor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this one of a .safetensors file; of a run, such as 'dW conv1'."),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the float to advise, its sign included.")] = 8,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros that pruning shall reach.")] = None,
    cosine: Annotated[float | None, typer.Option(help="Cosine between the tensor and the pruned one.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf to write: densities, QQ plots.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which distribution tensors follow, and the format, scale and alpha that follow from it."""
    from fpsim import analyze as verb
    from fpsim.recommend import check_outputs

    check_outputs(plot, None)
    verb.check_options(bits, sparsity, cosine)
    if file.is_dir():
        _analyze_run(file, tensor, bits, sparsity, cosine, plot, as_json)
        return
    found = verb.pages(file, tensor, bits, sparsity, cosine)
    if as_json:
        print(json.dumps([verb.to_data(page) for page in found], indent=1, allow_nan=False))
    else:
        verb.show(found)
    if plot is not None:
        verb.save_plot(found, verb.tensors(file, tensor), plot)


def _analyze_run(
    place: Path, tensor: str | None, bits: int, sparsity: float | None, cosine: float | None, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    from fpsim import analyze, analyze_run

    run = analyze_run.run_of(place)
    recorded = analyze_run.rows(run)
    drawn = analyze.tensors(analyze_run.samples_file(run), tensor)
    if tensor is None:
        drawn = analyze_run.of_neural_gradients(drawn, recorded)
    found = [analyze.page(name, x, bits, sparsity, cosine) for name, x in drawn]
    if as_json:
        pages = [analyze.to_data(page) for page in found]
        print(json.dumps({**analyze_run.to_data(run, recorded), "last": pages}, indent=1, allow_nan=False))
    else:
        analyze_run.show(run, recorded)
        analyze.show(found)
    if plot is not None:
        analyze_run.save_plot(recorded, found, drawn, plot)


@app.command()
def recommend(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A .npy or a .safetensors file.")] = None,
    lognormal: Annotated[
        str | None, typer.Option(metavar="MU,SIGMA", help="Instead of FILE: the fit of ln|x|, natural logarithm.")
    ] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Which one of a .safetensors file.")] = None,
    budget_bits: Annotated[float | None, typer.Option(help="Most bits an element.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Largest error.")] = None,
    error: Annotated[str, typer.Option(help="rms: ||y - x|| / ||x||; relative: mean error of rounding alone.")] = "rms",
    sparsity: Annotated[list[float] | None, typer.Option(help="A share of zeros to try; may be repeated.")] = None,
    fmt: Annotated[list[str] | None, typer.Option("--format", help="A format to try; may be repeated.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="A codec to try; may be repeated.")] = None,
    alphas: Annotated[
        list[str] | None, typer.Option(help="snap, reserved, streams; rounded to compare; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the pruning.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf to write: bits against error.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="A file to write with every point.")] = None,
) -> None:
    """Advise sparsity, format, codec and the way to keep +-alpha together, from what each combination really costs."""
    from fpsim import recommend as verb

    verb.check_outputs(plot, as_json)
    given = {"sparsities": sparsity, "formats": fmt, "codecs": codec, "alphas": alphas}
    found = verb.recommend(
        verb.source_of(file, tensor, lognormal), budget_bits=budget_bits, max_error=max_error, error=error, seed=seed,
        **{name: value for name, value in given.items() if value},
    )  # fmt: skip
    verb.show(found)
    if as_json is not None:
        from fpsim.files import write_json

        write_json(as_json, verb.to_data(found))
    if plot is not None:
        verb.save_plot(found, plot)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of runs: the newest.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the files; else RUN/export.")] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help="Of the weights, if not the run's: a name, a file, a description.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="Of the weights, if not the run's, such as bitmask or csr.")] = None,
    scale: Annotated[str | None, typer.Option(help="Of the weights, if not the run's; amax where it has none.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Of the scale, if not the run's: tensor or channel.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's pruned and rounded weights: as packed streams, and as a plain state dict."""
    from fpsim import export as verb

    exported = verb.export(run_dir, output, fmt, codec, scale, granularity)
    if as_json:
        print(json.dumps(verb.to_data(exported), indent=1))
        return
    verb.show(exported)


@app.command()
def estimate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of runs: the newest.")],
    machine: Annotated[
        list[str] | None,
        typer.Option(help="An accelerator with a machine, by name or file; may be repeated. Else that of the run."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for tables by pass (CSV, JSON) and plots.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the time, traffic and energy of a run's training step on machines, beside dense fp32 and bf16."""
    from fpsim import estimate as verb

    found = verb.estimate(run_dir, machine or [])
    if as_json:
        print(json.dumps(verb.to_data(found), indent=1, allow_nan=False))
    else:
        verb.show(found)
    for path in verb.write(found, output) if output is not None else []:
        print(path, file=sys.stderr if as_json else sys.stdout)


@app.command()
def timeloop(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder of runs: the newest.")],
    output: Annotated[Path | None, typer.Option(help="Folder for the files; else RUN/timeloop.")] = None,
    storage: Annotated[
        str, typer.Option(help="The level of your architecture that holds the encoded tensors.")
    ] = "DRAM",
    compute: Annotated[str, typer.Option(help="The level of your architecture that multiplies.")] = "MAC",
    action: Annotated[str, typer.Option(help="What zeros of an operand save: skipping or gating.")] = "skipping",
    as_json: AsJson = False,
) -> None:
    """Describe a run's next training step to Timeloop and Sparseloop: problems, densities, encodings, masks."""
    from fpsim import timeloop as verb

    described = verb.describe(run_dir, output, storage, compute, action)
    if as_json:
        print(json.dumps(verb.to_data(described), indent=1))
        return
    verb.show(described)


@app.command()
def reproduce(
    figure: Annotated[
        str,
        typer.Argument(
            metavar="FIGURE",
            help="As the source numbers it: fig2, fig3a, fig3b, fig3c, fig4, fig5-left, fig5-right, table1; also "
            "gradient-formats, and snr of the second source; accumulators of neither.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the numbers and the picture.")] = Path("figures"),
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=FOLDER]",
            help="What to train on, such as fashion_mnist=FOLDER, for fig2, fig4, fig5-left, fig5-right, table1, "
            "gradient-formats, accumulators and snr (its images); else mnist5k, which VGG16 cannot take, or what the "
            "experiment says. May be repeated for table1 and snr.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of that training, the first of several; else 0, or what the experiment says.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="fig5-left, gradient-formats: another experiment, by name or file; else fig5_left. snr, accumulators: "
            "another plan of configs/figures, such as snr_full; else that of the name."
        ),
    ] = None,
) -> None:
    """Measure a figure of the source again: FIGURE.json and .csv with its numbers, FIGURE.png and .svg."""
    from fpsim import figures

    if figure not in figures.FIGURES:
        raise _unknown("figure", figure, list(figures.FIGURES))
    print(figures.FIGURES[figure].title)
    for path in figures.reproduce(figure, output, data, seed, config):
        print(path)


@app.command()
def bench(
    full: Annotated[bool, typer.Option("--full", help="Every row, other libraries and first calls: an hour.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the figures, as JSON.")] = Path("bench"),
) -> None:
    """Measure this machine: operations as multiples of a copy, an emulated training step over a plain one."""
    from fpsim.bench import run as measure

    measure(full, output)


def main() -> None:
    """Entry point: exit code 0, 1 for a failure, 2 for the user's mistake."""
    if _is_rank():  # else every rank is warned of what `fpsim.exchange` asks of DistributedDataParallel
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app()
    except ToldError:
        sys.exit(0)
    except ConfigError as error:
        _fail(str(error), 2)
    except FpsimError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(reason_of(error), 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get("FPSIM_TRACEBACK"):
        traceback.print_exc()
    rank = f"rank {os.environ['RANK']}: " if _is_later_rank() else ""
    print(f"fpsim: {rank}{message}" if code == 1 else f"{rank}{message}", file=sys.stderr)
    sys.exit(code)


def _is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _is_later_rank() -> bool:
    """Whether it is not the one that tells."""
    return _is_rank() and os.environ.get("RANK") != "0"


def _launch(ranks: int, arguments: list[str]) -> NoReturn:
    """`fpsim arguments` once a rank."""
    from fpsim.launch import launch

    sys.exit(launch(ranks, arguments))


def _without_nproc(arguments: list[str]) -> list[str]:
    kept, given = [], iter(arguments)
    for argument in given:
        if argument == "--nproc":
            next(given)
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept


def _show_result(result: Any, as_json: bool, **more: Any) -> None:
    if _is_later_rank():
        return
    if as_json:
        print(json.dumps({"run_dir": str(result.run_dir), **result.results, **more}, indent=1))
        return
    print(f"{result.run_dir}: test accuracy {result.accuracy_percent:.2f} % (seed {result.results['seed']})")
    print(f"report: fpsim report {result.run_dir}")


def _mistake(message: str) -> ConfigError:
    from fpsim.errors import Problem

    return ConfigError([Problem("", message)])


def _unknown(what: str, name: str, allowed: list[str]) -> ConfigError:
    from difflib import get_close_matches

    close = get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return _mistake(f"unknown {what} {name!r} (allowed: {', '.join(allowed)}){hint}")
