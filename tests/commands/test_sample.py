from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from installed import skip_without

from dlmone_fast import sample
from dlmone_fast.errors import DataError, ModelFileError, UsageError
from dlmone_fast.evaluation.seeds import row_seeds
from dlmone_fast.runtime import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("sample") / "model")


def run(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], stdin: str | bytes = ""
) -> list[str]:
    content = stdin.encode() if isinstance(stdin, str) else stdin
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", SimpleNamespace(buffer=out))
        assert sample.main([str(argument) for argument in arguments]) == 0
    text = out.getvalue().decode()
    assert not text or text.endswith("\n")
    return text.split("\n")[:-1]


def test_a_line_out_for_each_line_in(model: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = [*tiny.prompts(5), "", "ba\t ce"]
    lines = run(monkeypatch, [model, "--seed", 3], "\n".join(prompts))
    expected = load_model(model).generate(prompts, seed=row_seeds(3, 7))
    assert lines == expected
    assert run(monkeypatch, [model], "") == []


def test_windows_do_not_show_in_the_output(model: Path, monkeypatch: pytest.MonkeyPatch):
    text = "\r\n".join(tiny.prompts(10)) + "\r\n"
    whole = run(monkeypatch, [model], text)
    monkeypatch.setattr(sample, "WINDOW", 3)
    assert run(monkeypatch, [model, "--batch-size", 2], text) == whole
    assert len(whole) == 10


def test_over_long_sources_are_cut_and_counted(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    lines = run(monkeypatch, [model], "ba\n" + "ba " * 10 + "\n" + "ce " * 100 + "\n")
    assert len(lines) == 3
    assert capsys.readouterr().err == "2 of 3 sources were cut to 8 tokens\n"


def test_jsonl_keeps_other_keys(model: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"src": "ba ce", "id": 7}, {"src": "ba " * 10, "trg": "é"}]
    text = "\n".join(json.dumps(row) for row in rows)
    got = [json.loads(line) for line in run(monkeypatch, [model], text)]
    assert [{k: row[k] for k in given} for row, given in zip(got, rows, strict=True)] == rows
    assert [row["truncated"] for row in got] == [False, True]
    several = run(monkeypatch, [model, "--num-candidates", 3], text)
    candidates = [json.loads(line)["candidates"] for line in several]
    assert [texts[0] for texts in candidates] == [row["generated"] for row in got]
    best = run(monkeypatch, [model, "--num-candidates", 3, "--mbr"], text)
    for line, texts in zip(best, candidates, strict=True):
        assert json.loads(line)["generated"] in texts
    assert json.loads(best[0])["id"] == 7


def test_files_in_and_out(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"src": "ba"}\n')
    assert run(monkeypatch, [model, "-i", source, "-o", target]) == []
    assert json.loads(target.read_text())["src"] == "ba"


def test_an_interrupted_run_leaves_no_half_file(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    target = tmp_path / "out.txt"
    target.write_text("before")
    monkeypatch.setattr(sample, "WINDOW", 1)
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        run(monkeypatch, [model, "--output", target], b"ba\n\xff\n")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"src": 3}', "line 2: expected an object with a string"),
        ("[]", "line 2: expected an object"),
        ("{", "line 2: not JSON"),
        ("", "line 2: blank line"),
        ('{"src": "\\ud800"}', "line 2: lone surrogate"),
        ('{"src": "ba", "x": NaN}', "line 2: not JSON"),
        ("[" * 200_000, "line 2: n"),
    ],
)
def test_bad_rows_are_named(model: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str):
    with pytest.raises(DataError, match=message):
        run(monkeypatch, [model], '{"src": "ba"}\n' + line + '\n{"src": "ba"}\n')


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--mbr"], UsageError, "--mbr: needs"),
        (["--num-candidates", 2], UsageError, "one line a source"),
        (["--num-candidates", 0], UsageError, "num_candidates must be"),
        (["--seed", -1], UsageError, "--seed: expected"),
        (["--steps", 0], UsageError, "steps must be"),
        (["--sampler", "ddim"], UsageError, "need a teacher"),
        (["--device", "abacus"], UsageError, "device must be"),
        (["--input", "/none.txt"], DataError, "/none.txt: cannot be read"),
        (["--output", "/none/out.txt"], DataError, "/none/out.txt: cannot be written"),
    ],
)
def test_refusals(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    error: type[Exception],
    message: str,
):
    with pytest.raises(error, match=message):
        run(monkeypatch, [model, *arguments], "ba\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"source": "ba"}', r"line 1: expected an object .*got the keys source;"),
        ('[{"src": "ba"}]', r"line 1: begins a JSON array"),
        ('["ba", "be"]', r"line 1: begins a JSON array"),
        ('[\n{"src": "ba"}\n]', r"line 1: begins a JSON array"),
        ('\n[{"src": "ba"},\n{"src": "be"}]', r"line 2: begins a JSON array"),
        ('{\n"src": "ba"}', "line 1: not JSON"),
        ("{'src': 'ba'}", "line 1: not JSON"),
        ('{"src": "ba"', "line 1: not JSON"),
        ('\n{"source": "ba"}', "line 1: blank line"),
        ("[" * 3000, "begins a JSON array"),
        ('{"a": ' * 3000, "nested too deeply"),
        ('{"src": "ba", "a": ' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
    ],
)
def test_json_that_has_no_sources_is_not_taken_for_text(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, message: str
):
    with pytest.raises(DataError, match=message):
        run(monkeypatch, [model], content)
    # Nor in a file, whatever it is called; who says that it is text means it.
    for name in ("in", "in.txt", "in.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"line [12]"):
            run(monkeypatch, [model, "-i", tmp_path / name])
    assert run(monkeypatch, [model, "--format", "text"], "[1]\n") == [
        load_model(model).generate("[1]", seed=row_seeds(0, 1)[0])
    ]


@pytest.mark.parametrize(
    "text", ["[sic] ba", "{name} ba", '"ba"', "3", "null", "[UNK", "[ba] [be]", '["ba', "{ba", ""]
)
def test_text_with_brackets_is_text(model: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    assert len(run(monkeypatch, [model], f"{text}\nba\n")) == 2


def test_own_fields_are_not_written_over(model: Path, monkeypatch: pytest.MonkeyPatch):
    row = {"src": "ba", "truncated": "mine", "generated": 1, "candidates": 2}
    content = f'{{"src": "ba"}}\n{json.dumps(row)}'
    with pytest.raises(DataError, match=r"line 2: has 'generated' and 'truncated' .*out_"):
        run(monkeypatch, [model], content)
    with pytest.raises(DataError, match=r"line 2: has 'candidates' and 'truncated' "):
        run(monkeypatch, [model, "--num-candidates", 2], content)
    lines = run(monkeypatch, [model, "--field-prefix", "out_"], content)
    kept = json.loads(lines[1])
    assert {name: kept[name] for name in row} == row
    assert isinstance(kept["out_generated"], str)
    assert kept["out_truncated"] is False
    with pytest.raises(DataError, match="line 1: has 'x_truncated' "):
        run(monkeypatch, [model, "--field-prefix", "x_"], '{"src": "ba", "x_truncated": 1}')
    with pytest.raises(UsageError, match="--field-prefix: belongs to jsonl"):
        run(monkeypatch, [model, "--field-prefix", "x_"], "ba")


def test_a_missing_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ModelFileError, match="no such folder"):
        run(monkeypatch, [tmp_path / "none"], "ba\n")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.jsonl.gz", "prompts"])
def test_calibration_files_are_read_as_sources_are(tmp_path: Path, name: str):
    file, prompts = tmp_path / name, tiny.prompts(4)
    lines = [json.dumps({"src": text}) if "jsonl" in name else text for text in prompts]
    content = "\n".join([*lines[:2], *([] if "jsonl" in name else [""]), *lines[2:]]).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert sample.calibration_prompts(str(file), "int8") == prompts
    assert sample.calibration_prompts(None, "auto") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "expected prompts"),
        (b"\n \n", "expected prompts"),
        (b"ba\n\xff", "line 2: not UTF-8"),
    ],
)
def test_calibration_files_that_give_no_prompts(
    tmp_path: Path, content: bytes | None, message: str
):
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        sample.calibration_prompts(str(file), "int8")


def test_int8_needs_calibration_and_nothing_else_does(model: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UsageError, match=r"--dtype int8: .*add --calibration FILE"):
        run(monkeypatch, [model, "--dtype", "int8"], "ba")
    with pytest.raises(UsageError, match=r"--calibration: belongs to --dtype int8, got auto"):
        run(monkeypatch, [model, "--calibration", "prompts"], "ba")


def test_int8_generates(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    skip_without("openvino")
    skip_without("nncf")
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(tiny.prompts(20)), encoding="utf-8")
    options = ["--device", "cpu", "--dtype", "int8", "--calibration", file]
    assert len(run(monkeypatch, [model, *options], "ba\nce ba")) == 2
