"""Commands whose standard streams were closed by the shell that started them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "model")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("dlmone", f"{sys.executable} -m dlmone_fast")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_closed_standard_input_is_named(model: Path) -> None:
    done = shell(f"dlmone.sample {model} <&-")
    assert done.returncode == 3
    assert done.stderr == (
        "error: standard input is closed; name a file to read instead (--input FILE)\n"
    )


@pytest.mark.parametrize(
    "command", ["sample MODEL", "evaluate MODEL --data-dir .", "train --dry-run"]
)
def test_a_result_that_has_nowhere_to_go_is_not_made(model: Path, command: str) -> None:
    done = shell(f"echo ba | dlmone.{command.replace('MODEL', str(model))} >&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output is closed, and the result goes there; ")


def test_a_result_that_goes_to_a_file_needs_no_standard_output(model: Path, tmp_path: Path) -> None:
    done = shell(f"echo ba | dlmone.sample {model} --output {tmp_path / 'out'} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "out").read_text().splitlines()) == 1


def test_what_is_told_on_a_closed_standard_error_is_not_printed_among_the_results(
    model: Path,
) -> None:
    # Python's print has None for both "no stream" and "standard output".
    done = shell(f"echo ba ce da fe ga he ka le ma na ba ce | dlmone.sample {model} 2>&-")
    assert done.returncode == 0
    assert "were cut" not in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_help_needs_no_stream() -> None:
    assert shell("dlmone.sample --help >&- <&- 2>&-").returncode == 0
