"""Every public error says what is wrong, where, and what to do next.

Each class of dlmone_fast.errors has ways of meeting it here, and each of its raises in the sources
a message of that form.
"""

from __future__ import annotations

import ast
import inspect
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from figures import Figure
from resealing import edit_json, edit_tensors
from tiny_training import tiny_config

import dlmone_fast
from dlmone_fast import errors, evaluate, import_diffuseq, sample, train
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import DlmOneError
from dlmone_fast.kernels.nearest_token import nearest_token
from dlmone_fast.models.checkpoint import list_checkpoints, resolve_resume
from dlmone_fast.runtime.loading import load_model
from dlmone_fast.serving import processes, server
from dlmone_fast.serving.options import ServeOptions
from dlmone_fast.training import run
from dlmone_fast.training.ranks import open_ranks
from dlmone_fast.training.teacher_phase import TeacherPhase

PACKAGE = Path(dlmone_fast.__file__).parent
PUBLIC = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, DlmOneError) and kind is not DlmOneError
}


@dataclass(frozen=True)
class Way:
    """A way to meet an error, and the parts of its message."""

    meet: Callable[[Path, pytest.MonkeyPatch], object]
    what: str
    where: str
    next: str


def _spoilt_model(folder: Path, _: object) -> None:
    path = tiny.save(folder / "m") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    dlmone_fast.load(path.parent)


def _unfit_model(folder: Path, _: object) -> None:
    path = tiny.save(folder / "m") / "model.safetensors"
    edit_tensors(path, lambda tensors: tensors.pop("tokens.bias"))
    dlmone_fast.load(path.parent)


def _newer_model(folder: Path, _: object) -> None:
    path = tiny.save(folder / "m")
    edit_json(path / "config.json", lambda config: config.update(version=2))
    dlmone_fast.load(path)


def _pickle_with_code(folder: Path, _: object) -> None:
    torch.save({"a": Path}, folder / "ema_0.9_1.pt")
    source = Path(__file__).parents[1] / "data" / "diffuseq-tiny" / "training_args.json"
    (folder / "training_args.json").write_bytes(source.read_bytes())
    import_diffuseq.main([str(folder), str(folder / "out")])


def _bad_row(folder: Path, _: object) -> None:
    (folder / "in.jsonl").write_text('{"src": "ba"}\n{"src": 3}\n')
    model = tiny.save(folder / "m")
    sample.main([str(model), "-i", str(folder / "in.jsonl"), "-o", str(folder / "out")])


def _no_data(folder: Path, _: object) -> None:
    train.main(["--preset", "qqp", "--output-dir", str(folder / "run"), "--phase", "teacher"])


def _all_damaged(folder: Path, _: object) -> None:
    config = tiny_config(folder / "run", teacher={"steps": 2})
    run(config, "teacher")
    root = folder / "run" / "checkpoints" / "teacher"
    for _, path in list_checkpoints(root):
        (path / "model.safetensors").unlink()
    resolve_resume(root, "auto")


def _no_queue(folder: Path, _: object) -> None:
    generator = tiny.generator(max_queued=0)
    with generator._executor.pool.call():
        generator.generate("ba")


def _forked(folder: Path, _: object) -> None:
    generator = tiny.generator()
    generator.generate("ba")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            generator.generate("ba")
        except DlmOneError as error:
            os.write(write, f"{type(error).__name__}\n{error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as stream:
        name, _, message = stream.read().partition("\n")
    os.waitpid(child, 0)
    raise PUBLIC[name](message)


def _not_finite(folder: Path, patch: pytest.MonkeyPatch) -> None:
    update = TeacherPhase.update

    def poisoned(self: TeacherPhase, step: int) -> dict[str, float]:
        next(self.lm.parameters()).data.fill_(torch.nan)
        return update(self, step)

    patch.setattr(TeacherPhase, "update", poisoned)
    run(tiny_config(folder / "run", max_bad_steps=1), "teacher")


def _out_of_time(folder: Path, _: object) -> None:
    run(tiny_config(folder / "run", max_minutes=1e-6), "teacher")


def _nothing_loaded(folder: Path, patch: pytest.MonkeyPatch) -> None:
    dlmone_fast.unload()
    patch.delenv("DLMONE_FAST_MODEL", raising=False)
    dlmone_fast.generate("ba")


def _configured(**overrides: object) -> Callable[[Path, pytest.MonkeyPatch], object]:
    return lambda folder, patch: dlmone_fast.resolve("grammar", **overrides)


def _asked(batch: object, **call: object) -> Callable[[Path, pytest.MonkeyPatch], object]:
    return lambda folder, patch: tiny.generator().generate(batch, **call)


def _forced(folder: Path, _: object) -> None:
    nearest_token(torch.eye(3), torch.eye(3), kernel_backend="cuda")


def _no_graphs(folder: Path, _: object) -> None:
    load_model(tiny.save(folder / "m"), "cpu", backend="graph")


def _no_tokenizer(folder: Path, _: object) -> None:
    dlmone_fast.load(tiny.save(folder / "m", with_tokenizer=False)).generate("ba")


def _no_other_rank(_: Path, patch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in variables.items():
        patch.setenv(name, str(value))
    patch.setenv("MASTER_ADDR", "127.0.0.1")
    with open_ranks("cpu", minutes=0.01):
        pass


def _no_queues_left(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def run(**_: object) -> None:
        raise EOFError

    patch.setattr(processes, "make_server", lambda *_: SimpleNamespace(run=run))
    options = ServeOptions(str(folder))
    listening = server.bound_sockets("127.0.0.1", 0)
    try:
        server._run(options, server._Stop(os.getpid()), listening)
    finally:
        for socket in listening:
            socket.close()


TABLE: dict[str, list[Way]] = {
    "ConfigError": [
        Way(_configured(teacher={"steps": 0}), "got 0", "teacher.steps", "must be between 1 and"),
        Way(_configured(teacher={"stesp": 1}), "unknown key", "teacher.stesp", "did you mean"),
        Way(_configured(distill={"stage1": {"anchor_steps": 3}}), "pairs.count is 0",
            "distill.stage1 has anchor_steps", "set that, or both of them to 0"),
        Way(lambda f, p: train.main(["--config", str(f / "x.toml"), "--dry-run"]),
            "cannot be read", "x.toml", "name the TOML file"),
    ],
    "UsageError": [
        Way(_asked("ba", num_candidates=0), "got 0", "num_candidates", "from 1 to 64"),
        Way(_asked("ba", sampler="ddim"), "need a teacher", "sampler='ddim'",
            "choices are steps"),
        Way(lambda f, p: evaluate.main([]), "got neither", "MODEL", "see --help"),
        Way(lambda f, p: dlmone_fast.from_pretrained("owner/name"), "no folder here",
            "owner/name", "pass download=True"),
    ],
    "PromptError": [
        Way(_asked(["ba", 3]), "got int", "batch[1]", "must be a str"),
        Way(_asked(["ba", "x" * 20_001]), "20001 characters", "batch[1]", "shorten the text"),
        Way(_asked(["\ud800"]), "lone surrogate", "batch[0]", "decode the input as UTF-8"),
        Way(_asked(["ba " * 30]), "the limit is 8", "batch[0]", "shorten"),
    ],
    "BackendUnavailableError": [
        Way(_forced, "cannot run", "nearest_token", "Available here: "),
        Way(_no_graphs, "cannot run", "'graph'", "backend='auto'"),
    ],
    "DataError": [
        Way(_bad_row, "expected an object", "line 2", "string"),
        Way(_no_data, "is missing", "--data-dir", "name the folder"),
        Way(lambda f, p: load_rows(f, "test"), "is there", "test.jsonl", "write one with"),
    ],
    "ModelFileError": [
        Way(_spoilt_model, "sha256", "model.safetensors", "copy the folder again"),
        Way(_unfit_model, "1 tensor missing: tokens.bias", "/m", "use a file written for"),
        Way(_newer_model, "version 2", "config.json", "install a newer dlmone_fast"),
        Way(lambda f, p: dlmone_fast.load(f / "none"), "no such folder", "none", "check the path"),
        Way(_pickle_with_code, "asks for", "ema_0.9_1.pt", "save one alone"),
    ],
    "CheckpointError": [
        Way(_all_damaged, "none of its", "checkpoints/teacher", "choose another run folder"),
        Way(lambda f, p: resolve_resume(f, f / "step-00000001"), "no such folder",
            "step-00000001", "check the path"),
    ],
    "ModelNotLoadedError": [
        Way(_nothing_loaded, "no model is loaded", "DLMONE_FAST_MODEL", "call dlmone_fast.load"),
    ],
    "QueueFullError": [Way(_no_queue, "wait", "max_queued", "try again later")],
    "ForkedProcessError": [Way(_forked, "was forked", "this process", "load the model in each")],
    "TokenizerMissingError": [
        Way(_no_tokenizer, "no tokenizer.json", "this model folder", "import the checkpoint again"),
    ],
    "DivergedError": [
        Way(_not_finite, "not finite 1 steps in a row", "DiffusionLM|teacher",
            "Lower the learning rate"),
    ],
    "RankLostError": [
        Way(_no_other_rank, "another rank of this run", "rank", "start torchrun again"),
    ],
    "ServerLostError": [
        Way(_no_queues_left, "ended (EOFError())", "holds the queues", "start the server again"),
    ],
    "InterruptedAndSavedError": [
        Way(_out_of_time, "stopped by --max-minutes", "of teacher", "the same command continues"),
    ],
}  # fmt: skip


MET = Counter[str]()
"""By class, the ways whose messages were found good."""


def test_every_class_has_its_ways() -> None:
    assert TABLE.keys() == PUBLIC.keys()
    assert all(TABLE.values())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name}-{number}")
        for name, ways in TABLE.items()
        for number, way in enumerate(ways)
    ],
)
def test_a_message_says_what_and_where_and_what_next(
    name: str, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PUBLIC[name]) as caught:
        way.meet(tmp_path, monkeypatch)
    assert caught.type is PUBLIC[name]
    message = str(caught.value)
    assert way.what in message
    assert any(where in message for where in way.where.split("|")), message
    assert way.next in message
    # The way out is not the beginning, and the whole is a message and not a report.
    assert message.index(way.next) > 0
    assert "\n" not in message
    assert len(message) < 1000
    MET[name] += 1


EXIT_CODES = {
    "ConfigError": 2, "UsageError": 2, "PromptError": 2, "BackendUnavailableError": 2,
    "QueueFullError": 2, "ForkedProcessError": 2, "DataError": 3, "ModelFileError": 4,
    "CheckpointError": 4, "ModelNotLoadedError": 4, "TokenizerMissingError": 4,
    "DivergedError": 5, "RankLostError": 6, "ServerLostError": 7, "InterruptedAndSavedError": 75,
}  # fmt: skip

ENDINGS = """
import os, sys
from dlmone_fast import errors
from dlmone_fast.cli import run_command

def main():
    raise getattr(errors, sys.argv[1])("here: it failed; do this")

run_command(main)
"""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_command_ends_with_the_message_and_the_documented_code(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS, name], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (EXIT_CODES[name], "error: here: it failed; do this\n")


# Messages made elsewhere: by a function that is read as well, or around another error's message.
MADE_BY = {"unreadable", "unwritable", "_unknown", "_refusal"}
AROUND = (
    "{error}",
    "{reason}",
    "{problem}",
    "{clash}",
    "{_near(text, error)}",
    "{_near_line(before, -1)}",
)
# Whose way out the loop adds, see the table.
UNFINISHED = {"DivergedError"}
FILES = {"CheckpointError", "DataError", "ModelFileError", "error"}
# How a wrong value's message tells the right ones.
RIGHT_ONES = (
    " must ", "expected ", "did you mean", " need", "; ", "Available here", "here (", "belongs to",
    ": load ", ": set ", ": start ", ": train ",
)  # fmt: skip


def messages() -> Iterator[tuple[str, str, str]]:
    """Place, class and text of every public error that the package raises or makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        yield from messages_of(where, path.read_text(encoding="utf-8"))


def messages_of(where: str, source: str) -> Iterator[tuple[str, str, str]]:
    """The same of one source; what is raised without a message has an empty one."""
    nodes = list(ast.walk(ast.parse(source)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        made = node.func if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Raise) and node.exc and id(node.exc) not in called:
            made = node.exc
        name = made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")
        if name in PUBLIC or (name == "error" and isinstance(node, ast.Call)):
            given = node.args[:1] if isinstance(node, ast.Call) else []
            yield f"{where}:{node.lineno}", name, text_of(given[0]) if given else ""


def text_of(node: ast.expr) -> str:
    """The text of a string expression, with its values' own expressions in braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(part) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return f"<{ast.unparse(node)}>"


def is_complete(name: str, text: str) -> bool:
    """Whether a message has a way out, as far as its source tells."""
    if any(f"<{function}(" in text for function in MADE_BY) or text.endswith(AROUND):
        return True
    if (text and name in UNFINISHED) or text.startswith("<"):
        return True
    if name in FILES:
        return "; " in text or "expected " in text
    return any(words in text for words in RIGHT_ONES)


def test_every_message_has_a_way_out(campaign: bool, figure: Figure) -> None:
    found = list(messages())
    counts = Counter(name for _, name, _ in found)
    assert [place for place, name, text in found if not is_complete(name, text)] == []
    # Nothing raises the base, which says nothing about what is wrong.
    assert "DlmOneError" not in counts
    assert PUBLIC.keys() - {"TokenizerMissingError"} <= counts.keys() | {"TokenizerMissingError"}
    if campaign:
        assert {name: len(ways) for name, ways in TABLE.items()} == MET
    figure(
        "R28", "what, where and the next action", "every public error class",
        f"{len(MET)} of {len(PUBLIC)} classes met in {MET.total()} ways; a way out in the source "
        f"of {len(found)} of {len(found)} messages",
    )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "raise UsageError('steps: bad')",
        "raise errors.UsageError('steps: bad')",
        "raise dlmone_fast.errors.UsageError('steps: bad') from None",
        "return UsageError('steps: bad')",
        "raise UsageError",
        "raise errors.UsageError()",
    ],
)
def test_each_way_to_make_an_error_is_seen(line: str) -> None:
    source = f"def f():\n    {line}\n"
    ((where, name, text),) = messages_of("a.py", source)
    assert (where, name) == ("a.py:2", "UsageError")
    assert not is_complete(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [("ModelFileError", "{path}: is bad"), ("UsageError", "steps: bad"), ("error", "{where}: no")],
)
def test_a_message_without_a_way_out_is_seen(name: str, text: str) -> None:
    assert not is_complete(name, text)
