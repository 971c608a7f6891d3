from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import accel
from fpsim import bench, cli, conformance, runner
from fpsim.config import Config, load_config, presets
from fpsim.report import load_results

pytestmark = pytest.mark.usefixtures("restored_threads")

VERBS = [
    "run",
    "resume",
    "sweep",
    "doctor",
    "report",
    "validate",
    "schema",
    "presets",
    "formats",
    "conformance",
    "bench",
]
CONFIG = """\
name: tiny
threads: 1
data:
  name: synthetic
  train_samples: 24
  test_samples: 8
  image_size: 4
model:
  name: mlp
  hidden: [8]
training:
  epochs: 2
  batch_size: 8
  optimizer:
    name: sgd
    learning_rate: 0.1
emulation:
  weights:
    format: e4m3fn
  gradients:
    format: e5m2
    pruning:
      sparsity: 0.8
    codec: alpha
"""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Fpsim = Callable[..., Answer]


@pytest.fixture
def fpsim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fpsim:
    """The command line in this process, in an empty directory with `tiny.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fpsim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, *capsys.readouterr())

    return call


# --- the user's mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("  hidden: [8]", "  hiden: [8]", "10:3", "model.hiden: unknown key; did you mean 'hidden'?"),
        ("epochs: 2", "epochs: two", "12:11", "training.epochs: must be an integer (got 'two')"),
        ("epochs: 2", "epochs: on", "12:11", "training.epochs: must be an integer (got 'on')"),
        ("sparsity: 0.8", "sparsity: 1.0", "23:17", "emulation.gradients.pruning.sparsity: must be < 1 (got 1.0)"),
        ("sparsity: 0.8", "sparsity: -0.1", "23:17", "emulation.gradients.pruning.sparsity: must be >= 0 (got -0.1)"),
        ("format: e4m3fn", "format: e4m3fm", "19:13", "did you mean 'e4m3fn'"),
        ("name: mlp", "name: mpl", "9:9", "did you mean 'mlp'?"),
        ("name: synthetic", "name: sinthetic", "4:9", "did you mean 'synthetic'?"),
        ("codec: alpha", "codec: alfa", "24:12", "did you mean 'alpha'?"),
        ("name: tiny", "version: 2", "1:10", "config of a newer version (got 2); this fpsim reads version 1"),
        ("name: tiny", "name: tiny\nname: tiny", "2:1", "duplicate key"),
        ("emulation:", "emulation:\n  exclude: [fc9]", "18:13", "pattern 'fc9' matches no matrix layer"),
        ("batch_size: 8", "batch_size: 80", "13:15", "larger than the training set of 24 (got 80)"),
        ("name: mlp\n  hidden: [8]", "name: lenet", "9:3", "lenet needs images of at least 12x12 pixels"),
    ],
)
def test_a_mistake_in_the_file(fpsim: Fpsim, tmp_path: Path, old: str, new: str, place: str, message: str) -> None:
    assert old in CONFIG
    text = CONFIG.replace(old, new)
    (tmp_path / "bad.yaml").write_text(text)
    code, out, err = fpsim("run", "bad.yaml", "--run-dir", "run")
    assert (code, out) == (2, "")
    first, source, caret = err.splitlines()
    assert first.startswith(f"bad.yaml:{place}: ")
    assert message in first
    line, column = map(int, place.split(":"))
    assert source == "    " + text.splitlines()[line - 1]
    assert caret == "    " + " " * (column - 1) + "^"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tiny.yam"], "no such file, nor one of the experiments .* \\(got 'tiny.yam'\\)"),
        (["run", "quickstar"], "did you mean 'quickstart'?"),
        (["run", "tiny.yaml", "training.epoch=3"], "<overrides>: training.epoch: unknown key; did you mean 'epochs'?"),
        (["run", "tiny.yaml", "seed"], "an override must be key=value"),
        (["run", "tiny.yaml", "data={name: mnist, root: nowhere}"], "<overrides>: data.root: .*nowhere.*: not found"),
        (["run", "tiny.yaml", "--run-dir", "."], "run directory exists already"),
        (["run", "tiny.yaml", "--run-dir", "tiny.yaml"], "run directory exists already"),
        (["run", "tiny.yaml", "output=tiny.yaml"], "^<overrides>: output: tiny.yaml/.*: Not a directory$"),
        (["validate", "tiny.yaml", "emulation.gradients.codec=alfa"], "did you mean 'alpha'?"),
        (["resume", "nowhere"], "nowhere: .*run directory"),
        (["resume", "."], "holds neither a run nor runs"),
        (["report", "nowhere"], "nowhere: no such run directory"),
        (["formats", "e4m3fm"], "unknown format 'e4m3fm'.*did you mean 'e4m3fn'?"),
        (["formats", "e9m3"], "e9m3"),
        (["formats", "mxfp6-blok16"], "unknown format 'mxfp6-blok16' \\(did you mean the format file 'mxfp6-block16'"),
        (["formats", "nowhere.yaml"], "no such file, nor one of the formats .* \\(got 'nowhere.yaml'\\)"),
        (["formats", "nvfp5", "--json"], "did you mean 'nvfp4'"),
        (["presets", "quickstar"], "did you mean 'quickstart'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(fpsim: Fpsim, arguments: list[str], message: str) -> None:
    code, out, err = fpsim(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["run"], ["resume"], ["report"], ["run", "tiny.yaml", "--wrong"]]
)
def test_wrong_usage(fpsim: Fpsim, arguments: list[str]) -> None:
    code, out, err = fpsim(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err


# --- failures -------------------------------------------------------------------------------------------------------


def test_activations_that_do_not_fall_into_blocks(fpsim: Fpsim) -> None:
    activations = "emulation.activations={format: {base: mxfp4, axis: 2}}"
    code, out, err = fpsim("run", "tiny.yaml", activations, "-q")
    assert (code, out) == (1, "")
    assert err.startswith(
        "fpsim: activation of layer '1': format 'mxfp4*': axis 2 is out of range for x of shape (8, 16)"
    )


def test_a_loss_that_is_not_finite(fpsim: Fpsim, tmp_path: Path) -> None:
    code, out, err = fpsim(
        "run", "tiny.yaml", "emulation=null", "training.optimizer.learning_rate=1e30", "--run-dir", "run", "-q"
    )
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("fpsim: output of layer '")
    assert re.search(r"is not finite at step 1 \(\d+ NaN, \d+ inf of \d+\); the state .*, the tensor in run/", line)
    assert (tmp_path / "run" / "failed" / "step-1" / "state.json").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
    code, _, err = fpsim("report", "run")
    assert code == 2
    assert "fpsim resume" in err


def test_a_damaged_checkpoint(fpsim: Fpsim, tmp_path: Path) -> None:
    """The one before it is taken, with a warning; where none is whole, the error names the newest."""
    assert fpsim("run", "tiny.yaml", "--run-dir", "run", "-q").code == 0
    older, newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "model.safetensors").write_bytes(b"")
    code, _, err = fpsim("resume", "run", "-q")
    assert code == 0
    (line,) = err.splitlines()
    assert line.startswith(f"fpsim: warning: run/checkpoints/{newest.name}/model.safetensors: damaged")
    for path in (older, newest):
        (path / "model.safetensors").write_bytes(b"")
    code, out, err = fpsim("resume", "run", "-q")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"fpsim: run/checkpoints/{newest.name}/model.safetensors: ")
    assert line.endswith("no checkpoint of this run is whole")


def test_a_run_of_a_newer_version_is_not_resumed(fpsim: Fpsim, tmp_path: Path) -> None:
    assert fpsim("run", "tiny.yaml", "--run-dir", "run", "-q").code == 0
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("version: 1", "version: 2"))
    code, out, err = fpsim("resume", "run")
    assert (code, out) == (2, "")
    assert err.startswith("run/config.yaml:1:10: version: config of a newer version (got 2)")


def test_stopped_once_and_stopped_at_once(fpsim: Fpsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first Ctrl-C ends the step under way and saves; the second ends the process there and then."""
    train_step, presses, ended = runner._train_step, 1, []

    def step(session: Any) -> dict[str, Any]:
        if session.step == 1:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        row = train_step(session)
        ended.append(row["step"])
        return row

    before = signal.getsignal(signal.SIGINT)
    warning = "fpsim: SIGINT: stopping after this step (once more to stop at once)"
    monkeypatch.setattr(runner, "_train_step", step)
    code, out, err = fpsim("run", "tiny.yaml", "--run-dir", "once", "-q")
    assert (code, out, ended) == (1, "", [1, 2])
    first, second = err.splitlines()
    assert first == warning
    assert second.startswith("fpsim: stopped by SIGINT at step 2 of 6; the state is saved")
    assert (tmp_path / "once" / "checkpoints" / "step-2").is_dir()

    presses = 2
    ended.clear()
    assert fpsim("run", "tiny.yaml", "--run-dir", "at-once", "-q") == Answer(130, "", warning + "\n")
    assert ended == [1]
    assert not (tmp_path / "at-once" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


# --- verbs ----------------------------------------------------------------------------------------------------------


def test_run_then_resume_then_report(fpsim: Fpsim, tmp_path: Path) -> None:
    code, out, err = fpsim("run", "tiny.yaml", "seed=5", "--run-dir", "a")
    assert code == 0
    results = load_results(tmp_path / "a")
    assert out == (f"a: test accuracy {results['test_accuracy_percent']:.2f} % (seed 5)\nreport: fpsim report a\n")
    lines = err.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["tiny: epoch 1", "tiny: epoch 2"]
    assert lines[0].startswith("a: synthetic")
    assert "\x1b" not in err
    assert "\r" not in err

    assert fpsim("resume", "a", "--quiet") == Answer(0, out, "")
    assert fpsim("run", "tiny.yaml", "emulation=null", "--run-dir", "b", "-q").code == 0

    code, out, err = fpsim("report", "b", "a")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "a/report.html"
    assert 'id="plot-accuracy"' in (tmp_path / "a" / "report.html").read_text()
    code, out, err = fpsim("report", "b", "a", "--output", "page")
    assert (tmp_path / "page" / "report.html").is_file()
    code, out, err = fpsim("report", "b", "a", "--json")
    assert (code, err) == (0, "")
    assert [run["name"] for run in json.loads(out)["runs"]] == ["tiny", "tiny"]


def test_an_option_is_never_ignored(fpsim: Fpsim, tmp_path: Path) -> None:
    """--output with --json: the page is written as well."""
    assert fpsim("run", "tiny.yaml", "--run-dir", "a", "-q").code == 0
    code, out, err = fpsim("report", "a", "--json", "--output", "page")
    assert (code, err) == (0, "")
    assert [run["name"] for run in json.loads(out)["runs"]] == ["tiny"]
    assert (tmp_path / "page" / "report.html").is_file()


def test_run_as_json_and_quiet(fpsim: Fpsim, tmp_path: Path) -> None:
    code, out, err = fpsim("run", "tiny.yaml", "--run-dir", "a", "--json", "--quiet")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer.pop("run_dir") == "a"
    assert answer == load_results(tmp_path / "a")
    code, out, err = fpsim("resume", "a", "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out)["history"] == answer["history"]


def test_report_takes_the_newest_run_of_a_folder(fpsim: Fpsim, tmp_path: Path) -> None:
    """The one that began last, whatever the names."""
    for seed, name in enumerate(("b", "c", "a")):
        assert fpsim("run", "tiny.yaml", f"seed={seed}", "--run-dir", f"runs/{name}", "-q").code == 0
    code, out, _ = fpsim("report", "runs", "--json")
    assert code == 0
    assert [run["seed"] for run in json.loads(out)["runs"]] == [2]


def test_validate_prints_the_resolved_configuration(fpsim: Fpsim, tmp_path: Path) -> None:
    code, out, err = fpsim("validate", "tiny.yaml", "seed=5", "training.optimizer={name: adam, learning_rate: 1e-3}")
    assert (code, err) == (0, "")
    (tmp_path / "resolved.yaml").write_text(out)
    resolved = load_config(tmp_path / "resolved.yaml")
    assert resolved == load_config("tiny.yaml", ["seed=5", "training.optimizer={name: adam, learning_rate: 1e-3}"])
    assert resolved.training.optimizer.name == "adam"
    assert yaml.safe_load(out)["training"]["checkpoint"] == {"every_steps": 100, "keep": 2}


def test_schema(fpsim: Fpsim) -> None:
    code, out, err = fpsim("schema")
    assert (code, err) == (0, "")
    assert set(Config.model_fields) < set(json.loads(out)["properties"])


def test_presets(fpsim: Fpsim) -> None:
    code, out, err = fpsim("presets")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    for preset in presets():
        assert any(row[:2] == [preset.kind, preset.name] for row in rows)
    assert fpsim("presets", "quickstart").out == next(p for p in presets() if p.name == "quickstart").path.read_text()


def test_formats_as_json(fpsim: Fpsim) -> None:
    code, out, err = fpsim("formats", "--json")
    assert (code, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out, parse_constant=pytest.fail)}
    files = {preset.name: str(preset.path) for preset in presets() if preset.kind == "formats"}
    assert set(rows) == {fmt.name for fmt in accel.formats()} | set(files)
    assert {name: row["file"] for name, row in rows.items() if "file" in row} == files
    for fmt in accel.formats():
        if isinstance(fmt, accel.Format):
            assert (rows[fmt.name]["kind"], rows[fmt.name]["max"]) == ("scalar", fmt.max)
        else:
            assert (rows[fmt.name]["kind"], rows[fmt.name]["block_size"]) == ("block", fmt.block_size)
    (row,) = json.loads(fpsim("formats", "e3m2", "--json").out)
    assert (row["bits"], row["exponent_bits"], row["mantissa_bits"], row["max"]) == (6, 3, 2, 28.0)
    assert len(row["values"]) == 64


def test_formats_shows_every_number_whole(fpsim: Fpsim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the terminal is narrow, and where there is none."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = fpsim("formats")
    assert (code, err) == (0, "")
    assert "…" not in out
    assert "\x1b" not in out
    rows = [row.split() for row in out.splitlines()]
    for fmt in accel.formats():
        bits = fmt.bits if isinstance(fmt, accel.Format) else fmt.bits_per_element
        assert any(row[:2] == [fmt.name, f"{bits:g}"] for row in rows)
    for preset in presets():
        if preset.kind == "formats":
            assert [preset.name, *preset.summary.split()] in rows


def test_one_format_with_its_codes(fpsim: Fpsim) -> None:
    code, out, err = fpsim("formats", "e2m1")
    assert (code, err) == (0, "")
    values = ["0", "0.5", "1", "1.5", "2", "3", "4", "6", "-0", "-0.5", "-1", "-1.5", "-2", "-3", "-4", "-6"]
    for number, value in enumerate(values):
        fields = f"{number >> 3:b} {number >> 1 & 3:02b} {number & 1:b}"
        assert re.search(rf"(^|  )0x{number:x}  {fields} {re.escape(value)}(  |$)", out, re.MULTILINE), number


@pytest.mark.parametrize(
    ("name", "first_line"),
    [
        ("fixed<8,4>", "fixed<8,4>: 8 bits, s mmmmmmm"),
        ("e3m4", "e3m4: 8 bits, s eee mmmm"),
        ("fp32", "fp32: 32 bits, s e8 m23"),
        ("bfp8", "bfp8: blocks of e0m7 that share a scale e8m0fnu"),
        ("mxfp4", "mxfp4: blocks of e2m1 that share a scale e8m0fnu"),
        ("mxfp6-block16", "mxfp6-block16: blocks of e3m2 that share a scale e8m0fnu"),
        ("own.yaml", "own: 6 bits, s eee mm"),
        ("{base: mxfp4, block_size: 16}", "mxfp4*: blocks of e2m1 that share a scale e8m0fnu"),
    ],
)
def test_a_format_by_name_text_file_or_mapping(fpsim: Fpsim, tmp_path: Path, name: str, first_line: str) -> None:
    (tmp_path / "own.yaml").write_text("base: e3m2\nbias: 6\n")
    code, out, err = fpsim("formats", name)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == first_line


def test_a_mistake_in_a_format_file(fpsim: Fpsim, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("base: mxfp4\nblok_size: 16\n")
    code, out, err = fpsim("formats", "own.yaml")
    assert (code, out) == (2, "")
    assert err == "own.yaml:2:1: blok_size: unknown key; did you mean 'block_size'?\n    blok_size: 16\n    ^\n"


def test_bench_runs_every_script(fpsim: Fpsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, json; json.dump(sys.argv[1:-2], open(sys.argv[-1], 'w')); print('ran'); sys.exit(CODE)"
    codes = dict.fromkeys(bench.SCRIPTS, "0") | {"training_step": "3", "gpu": "2"}  # 2: no device
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(script.replace("CODE", code))
    monkeypatch.setattr(bench, "scripts_folder", lambda: tmp_path)
    code, _, err = fpsim("bench")
    assert (code, err) == (1, "fpsim: benchmarks failed: training_step (exit code 3)\n")
    assert fpsim("bench", "--full", "--output", "all").code == 1
    for name, (quick, full) in bench.SCRIPTS.items():
        assert json.loads((tmp_path / "bench" / f"{name}.json").read_text()) == quick
        assert json.loads((tmp_path / "all" / f"{name}.json").read_text()) == full


def test_bench_finds_its_scripts() -> None:
    assert {path.stem for path in bench.scripts_folder().glob("*.py")} >= set(bench.SCRIPTS)


def test_conformance(fpsim: Fpsim, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    first = conformance.Mismatch("e5m2", "quantize", "0x7f800000", "0x47600000", "0x7f800000")
    rows = [
        conformance.Row("torch", "e4m3fn", "nearest_even", 1 << 24, 0, None, 0.5),
        conformance.Row("gfloat", "5 ieee", "stochastic", 1000, 2, first, 1.25),
    ]

    def run(full: bool, progress: Callable[[int, int, str], None]) -> list[conformance.Row]:
        given.append(full)
        for done in (1, 2):
            progress(done, 2, rows[done - 1].format)
        return [row for row in rows if full or row.mismatches == 0]

    monkeypatch.setattr(conformance, "run", run)
    code, out, err = fpsim("conformance")
    assert (code, err) == (0, "conformance: 1 of 2, e4m3fn\nconformance: 2 of 2, 5 ieee\n")
    assert out.splitlines()[1].split() == ["torch", "e4m3fn", "nearest_even", "16,777,216", "0", "0.5"]
    assert out.splitlines()[-1] == "16,777,216 pairs compared, 0 mismatches"
    code, out, err = fpsim("conformance", "--full", "--quiet")
    assert (code, err) == (1, "")
    assert out.splitlines()[2].split() == ["gfloat", "5", "ieee", "stochastic", "1,000", "2", "1.2"]
    assert out.splitlines()[3] == "gfloat, e5m2: quantize 0x7f800000: 0x47600000, not 0x7f800000"
    assert out.splitlines()[-1] == "16,778,216 pairs compared, 2 mismatches"
    code, out, err = fpsim("conformance", "--full", "--json", "-q")
    assert (code, err) == (1, "")
    answer = json.loads(out)
    assert (answer["full"], answer["pairs"], answer["mismatches"]) == (True, 16778216, 2)
    assert answer["rows"][1]["first"]["input"] == "0x7f800000"
    assert given == [False, True, True]


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(fpsim: Fpsim, verb: str) -> None:
    code, out, err = fpsim(verb, "--help")
    assert (code, err) == (0, "")
    assert f"fpsim {verb} " in out
    assert verb in fpsim("--help").out


def test_light_verbs_import_nothing_heavy() -> None:
    """Help, the schema and the presets answer at once."""
    script = """
import sys
from fpsim import cli
for arguments in (["--help"], ["run", "--help"], ["sweep", "--help"], ["presets"], ["run", "nothing-of-the-kind"]):
    sys.argv = ["fpsim", *arguments]
    try:
        cli.main()
    except SystemExit:
        pass
    heavy = {"torch", "numba", "numpy", "scipy", "matplotlib", "accel", "models", "dask"} & set(sys.modules)
    print("HEAVY", arguments, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert len(found) == 5
    assert [line for line in found if not line.endswith(" []")] == []
