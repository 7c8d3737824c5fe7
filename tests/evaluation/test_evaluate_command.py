from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from dlmone_fast.cli import run_command
from dlmone_fast.errors import DataError, ModelFileError, UsageError
from dlmone_fast.evaluate import main
from dlmone_fast.evaluation.generations import write_generations
from dlmone_fast.evaluation.scores import METRICS

SOURCES = ["is tea good for you", "how far is the moon"]
REFERENCES = ["is drinking tea healthy", "what is the distance to the moon"]
OUTPUTS = [["is tea healthy", "how far away is the moon"], ["is tea good", "what is the moon"]]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"seed{index}.jsonl" for index in range(2)]
    for path, texts in zip(paths, OUTPUTS, strict=True):
        write_generations(path, SOURCES, REFERENCES, texts)
    return [str(path) for path in paths]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dlmone_fast.evaluate", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_json_is_one_object_with_the_documented_keys(files: list[str]) -> None:
    done = command("--generations", *files, "--mbr", "--json", "--bootstrap", "50")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    documented = {*METRICS, "sacrebleu_signature", "intervals", "mbr"}
    assert documented <= result.keys()
    assert documented - {"mbr"} == result["mbr"].keys()
    assert result["run"]["rows"] == 2


def test_tables_are_printed_without_json(
    files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out" / "scores.json"
    options = ["--task", "qqp", "--bootstrap", "20", "--output", str(output)]
    assert main(["--generations", *files, *options]) == 0
    printed = capsys.readouterr().out
    for row in ("generations", "copy of the source", "reference", "paper: DLM-One, 1 NFE"):
        assert f"| {row} " in printed
    assert json.loads(output.read_text())["run"]["num_candidates"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got neither"),
        (["model", "--generations", "x"], "got both"),
        (["model"], "--data-dir: MODEL needs a folder"),
        (["--generations", "x", "--data-dir", "d"], "leave it out"),
        (["--generations", "x", "--task", "qpq"], "--task: expected one of qqp"),
        (["--generations", "x", "--bootstrap", "-5"], "bootstrap: expected 0"),
        (["--generations", "x", "--mbr"], "--mbr: needs .* several --generations"),
        (["model", "--data-dir", "d", "--mbr"], "--mbr: needs .* --num-candidates"),
        (["model", "--data-dir", "d", "--device", "abacus"], "device must be"),
        (["model", "--data-dir", "d", "--dtype", "fp64"], "dtype must be"),
        (["model", "--data-dir", "d", "--dtype", "int8"], "--dtype int8: .*--calibration FILE"),
        (["model", "--data-dir", "d", "--calibration", "f"], "--calibration: belongs to"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(arguments)


def test_exit_codes_and_messages(files: list[str]) -> None:
    typo = command("--generatons", files[0])
    assert typo.returncode == 2
    assert "--generations" in typo.stderr
    assert command("--generations", files[0], "--seed", "x").returncode == 2
    missing = command("--generations", files[0] + ".gone")
    assert missing.returncode == DataError.exit_code == 3
    assert missing.stderr.startswith("error: ")
    assert "Traceback" not in missing.stderr
    model = command("--generations", files[0], "--bertscore-model", "nowhere")
    assert model.returncode == ModelFileError.exit_code == 4


def test_help_is_quick_and_imports_no_torch(files: list[str]) -> None:
    seconds = []
    # The best of some tries, since a busy machine slows even that.
    for _ in range(6):
        # Processor time: what others run on this machine is not this command's cost.
        before = os.times()
        done = command("--help")
        after = os.times()
        used = after.children_user + after.children_system
        seconds.append(used - before.children_user - before.children_system)
        assert done.returncode == 0
        assert "--generations" in done.stdout
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3
    code = (
        "import sys; from dlmone_fast.evaluate import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'typeguard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_scoring_files_needs_no_torch(files: list[str]) -> None:
    code = (
        "import sys; from dlmone_fast.evaluate import main\n"
        f"main(['--generations', {files[0]!r}, '--bootstrap', '0'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_run_command_maps_outcomes_to_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def outcome(error: BaseException | None) -> int | str | None:
        def run() -> int | None:
            if error is not None:
                raise error
            return None

        with pytest.raises(SystemExit) as caught:
            run_command(run)
        return caught.value.code

    assert outcome(None) == 0
    assert outcome(DataError("rows.jsonl, line 3: no")) == 3
    assert capsys.readouterr().err == "error: rows.jsonl, line 3: no\n"
    assert outcome(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_a_full_disk_at_standard_output_is_one_message(files: list[str]) -> None:
    command = [sys.executable, "-m", "dlmone_fast.evaluate", "--generations", files[0], "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--bootstrap", "0"], stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr == (
        "error: standard output: No space left on device; free space and run it again\n"
    )


def test_the_exit_code_is_right_where_the_message_cannot_be_written() -> None:
    code = (
        "import sys\n"
        "from dlmone_fast.cli import run_command\n"
        "from dlmone_fast.errors import DataError\n"
        "def main():\n"
        "    print('a line')\n"
        "    raise DataError('no rows')\n"
        "run_command(main)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stderr=full, timeout=60, check=False)
    assert done.returncode == 3


def test_a_closed_pipe_is_no_traceback() -> None:
    code = (
        "from dlmone_fast.cli import run_command\n"
        "def main():\n"
        "    for number in range(100000): print(number)\n"
        "run_command(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


def test_the_backend_is_chosen_and_told(tmp_path: Path) -> None:
    model, output = tiny.save(tmp_path / "model"), tmp_path / "scores.json"
    rows = [{"src": text, "trg": text} for text in tiny.prompts(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = [str(model), "--data-dir", str(tmp_path), "--bootstrap", "0", "--device", "cpu"]
    assert main([*command, "--backend", "eager", "--output", str(output)]) == 0
    run = json.loads(output.read_text())["run"]
    assert (run["device"], run["precision"], run["backend"]) == ("cpu", "fp32", "eager")
    with pytest.raises(UsageError, match="backend must be one of"):
        main([*command, "--backend", "abacus"])
