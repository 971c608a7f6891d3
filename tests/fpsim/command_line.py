"""The command line as a test calls it."""

from __future__ import annotations

import pytest

from fpsim.cli import main


def command(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[str, str, int]:
    """What `fpsim VERB ARGUMENTS` prints on stdout and on stderr, and its exit code."""
    monkeypatch.setattr("sys.argv", ["fpsim", verb, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr()
    return output.out, output.err, int(stop.value.code or 0)
