"""Mutated configuration files and flags: exit code 2, and the key path in the message."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from config_keys import BOUNDS, KINDS, WRONG_WORDS
from figures import Figure
from startup import best_seconds, seconds_allowed

from dlmone_fast import train
from dlmone_fast.cli import run_command
from dlmone_fast.config import PRESETS, resolve, to_toml

KEYS = [path for path in KINDS if path != "preset"]
WRONG = {
    int: ['"1"', "1.5", "true", "[1]", "{a = 1}", "1979-05-27", "nan"],
    float: ['"1"', "true", "[1.0]", "nan", "inf", "-inf", "07:32:00", "1e999"],
    str: ["1", "true", "[]", "{}", "2.5", "1979-05-27T07:32:00Z"],
    bool: ["1", "0", '"true"', "[true]", "{}"],
}


@dataclass(frozen=True)
class Mutated:
    """The arguments of a command, and what its message must hold."""

    arguments: list[str]
    says: str


def misspelt(word: str, rng: random.Random) -> str:
    """One letter left out, doubled, exchanged with its neighbour, or another one."""
    place = rng.randrange(len(word))
    before, letter, after = word[:place], word[place], word[place + 1 :]
    kinds = [before + after, before + letter * 2 + after, before + "x" + after]
    if after and after[0] != letter:
        kinds.append(before + after[0] + letter + after[1:])
    return rng.choice(kinds)


class ConfigFile:
    """A preset as TOML, whose lines can be changed by key path."""

    def __init__(self, preset: str, path: Path) -> None:
        self.path = path
        self.lines = to_toml(resolve(preset)).split("\n")

    def line(self, key: str) -> int:
        """The place of a key's line."""
        section, _, name = key.rpartition(".")
        start = self.lines.index(f"[{section}]") if section else 0
        return next(
            i for i in range(start, len(self.lines)) if self.lines[i].startswith(f"{name} = ")
        )

    def set(self, key: str, value: str) -> None:
        place = self.line(key)
        self.lines[place] = f"{self.lines[place].split(' = ')[0]} = {value}"

    def write(self, says: str) -> Mutated:
        self.path.write_text("\n".join(self.lines), encoding="utf-8")
        return Mutated([f"--config={self.path}"], says)


def _typo(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(KEYS)
    section, dot, name = key.rpartition(".")
    # A typo that is another key of the section would be a value of it.
    typo = next(
        t for t in iter(lambda: misspelt(name, rng), "") if t and f"{section}{dot}{t}" not in KINDS
    )
    place = file.line(key)
    file.lines[place] = file.lines[place].replace(name, typo, 1)
    return file.write(f"unknown key {section}{dot}{typo}; ")


def _section_typo(file: ConfigFile, rng: random.Random) -> Mutated:
    place = rng.choice([i for i, line in enumerate(file.lines) if line.startswith("[")])
    inner = file.lines[place].strip("[]").split(".")
    inner[-1] = misspelt(inner[-1], rng) + "y"
    file.lines[place] = f"[{'.'.join(inner)}]"
    return file.write(f"unknown key {'.'.join(inner)}; ")


def _wrong_type(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(KEYS)
    file.set(key, rng.choice(WRONG[KINDS[key]]))
    return file.write(f"{key} must be ")


def _out_of_bounds(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(sorted(BOUNDS))
    low, high = BOUNDS[key]
    far = rng.choice([1, 10, 10**6, 10**30])
    # Some lower bounds are other keys' values, none of them below 0.
    value = rng.choice([min(low, 0) - far, high + far])
    file.set(key, repr(int(value) if KINDS[key] is int else float(value)))
    return file.write(f"{key} must be between ")


def _wrong_word(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(sorted(WRONG_WORDS))
    file.set(key, repr(rng.choice([WRONG_WORDS[key], "x" * 200, "é", " "])))
    return file.write(f"{key} must be one of ")


def _no_section(file: ConfigFile, rng: random.Random) -> Mutated:
    place = rng.choice(
        [i for i, line in enumerate(file.lines) if line.startswith("[") and "." not in line]
    )
    name = file.lines[place].strip("[]")
    file.lines = [f"{name} = {rng.choice(['3', '[]', 'true'])}"]
    return file.write(f"{name} must be a section of keys")


def _broken_line(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(KEYS)
    place = file.line(key)
    broken = rng.choice([" ", " == ", " = = ", " = [", ' = """', " = \\x00", " = 'a", ": "])
    file.lines[place] = file.lines[place].replace(" = ", broken, 1)
    return file.write(f"; see {key}, line {place + 1}")


def _twice(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(KEYS)
    place = file.line(key)
    file.lines.insert(place, file.lines[place])
    return file.write(f"; see {key}, line {place + 2}")


def _not_text(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice([key for key in KEYS if KINDS[key] is str])
    mutated = file.write("")
    content = file.path.read_bytes().split(b"\n")
    place = file.line(key)
    content[place] = content[place][:-1] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + b'"'
    file.path.write_bytes(b"\n".join(content))
    return Mutated(mutated.arguments, f"; see {key}, line {place + 1}")


def _flag_typo(file: ConfigFile, rng: random.Random) -> Mutated:
    section, dot, name = rng.choice(KEYS).rpartition(".")
    flag = f"--{section}{dot}{misspelt(name, rng)}-y".replace("_", "-")
    return Mutated([flag, "1"], f"Unrecognized options: {flag}")


def _flag_value(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(sorted(BOUNDS))
    flag = f"--{key}".replace("_", "-")
    value = rng.choice(["many", "1.2.3", "", "²x", "0x10z"])
    return Mutated([flag, value], f"Error parsing {flag}: ")


def _flag_out_of_bounds(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(sorted(BOUNDS))
    low, high = BOUNDS[key]
    value = rng.choice([min(low, 0) - 7, high * 10 + 7])
    text = repr(int(value) if KINDS[key] is int else float(value))
    return Mutated([f"--{key}={text}"], f"{key} must be between ")


def _flag_wrong_word(file: ConfigFile, rng: random.Random) -> Mutated:
    key = rng.choice(sorted(WRONG_WORDS))
    return Mutated([f"--{key}", "nothing-of-this"], f"{key} must be one of ")


def _flag_alone(file: ConfigFile, rng: random.Random) -> Mutated:
    flag = f"--{rng.choice(sorted(BOUNDS))}".replace("_", "-")
    return Mutated([flag], f"Missing value for argument '{flag}'")


def _preset(file: ConfigFile, rng: random.Random) -> Mutated:
    name = misspelt(rng.choice(sorted(PRESETS)), rng) + "y"
    return Mutated(["--preset", name], f"unknown preset '{name}'; ")


FILE_KINDS: tuple[Callable[[ConfigFile, random.Random], Mutated], ...] = (
    _typo, _section_typo, _wrong_type, _out_of_bounds, _wrong_word, _no_section, _broken_line,
    _twice, _not_text,
)  # fmt: skip
FLAG_KINDS: tuple[Callable[[ConfigFile, random.Random], Mutated], ...] = (
    _flag_typo, _flag_value, _flag_out_of_bounds, _flag_wrong_word, _flag_alone, _preset,
)  # fmt: skip


def mutation(
    kinds: Sequence[Callable[[ConfigFile, random.Random], Mutated]], case: int, folder: Path
) -> tuple[str, Mutated]:
    """A seeded mutation, of all kinds in turn."""
    rng = random.Random(f"configuration {case}")
    kind = kinds[case % len(kinds)]
    file = ConfigFile(rng.choice(sorted(PRESETS)), folder / f"{case}.toml")
    return kind.__name__, kind(file, rng)


def flowing(text: str) -> str:
    """A message without the box that usage errors stand in, and its line breaks."""
    return " ".join(text.translate(dict.fromkeys(map(ord, "│─╭╮╰╯"), " ")).split())


def check(case: int, kind: str, mutated: Mutated, code: int, errors: str) -> None:
    where = f"case {case}, {kind}, {mutated.arguments}: {errors}"
    assert code == 2, where
    assert "Traceback" not in errors, where
    # Long flags break at the end of a line.
    assert flowing(mutated.says).replace(" ", "") in flowing(errors).replace(" ", ""), where
    assert len(errors) < 6000, where


@pytest.mark.parametrize(
    ("what", "kinds", "few", "many"),
    [("TOML files", FILE_KINDS, 45, 500), ("flags", FLAG_KINDS, 24, 250)],
    ids=["files", "flags"],
)
def test_every_mutation_is_named(
    campaign: bool, figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    what: str, kinds: Sequence[Callable[[ConfigFile, random.Random], Mutated]], few: int, many: int,
) -> None:  # fmt: skip
    count, seen = many if campaign else few, Counter[str]()
    for case in range(count):
        kind, mutated = mutation(kinds, case, tmp_path)
        with pytest.raises(SystemExit) as ended:
            run_command(lambda m=mutated: train.main([*m.arguments, "--dry-run"]))
        check(case, kind, mutated, int(ended.value.code or 0), capsys.readouterr().err)
        seen[kind] += 1
    assert len(seen) == len(kinds)
    figure(
        "R27", f"mutated {what}, {len(seen)} kinds",
        f"{count} of {count}: exit code 2 with the key path, no traceback",
        f"{seen.total():,} of {count:,}",
    )  # fmt: skip


def test_the_command_itself_says_the_same(campaign: bool, tmp_path: Path) -> None:
    for case in range(1000, 1030 if campaign else 1004):
        kinds = FLAG_KINDS if case % 3 == 2 else FILE_KINDS
        kind, mutated = mutation(kinds, case, tmp_path)
        # A refusal is the same where the run would begin.
        arguments = [*mutated.arguments, *(["--dry-run"] if case % 2 else [])]
        done = subprocess.run(
            [sys.executable, "-m", "dlmone_fast.train", *arguments],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        check(case, kind, mutated, done.returncode, done.stderr)
        assert done.stdout == ""
    assert [path for path in tmp_path.iterdir() if path.suffix != ".toml"] == []


def _a_file(folder: Path) -> Path:
    (folder / "taken").write_text("")
    return folder / "taken"


# Folders of a run that no configuration shows to be wrong.
UNUSABLE: dict[str, Callable[[Path], Path]] = {
    "a file": _a_file,
    "below a file": lambda folder: _a_file(folder) / "run",
    "a name that is too long": lambda folder: folder / ("x" * 300),
    "in a folder of the system": lambda _: Path("/proc/run"),
}


def test_a_folder_that_cannot_be_made_is_named(
    campaign: bool, figure: Figure, tmp_path: Path
) -> None:
    ways = list(UNUSABLE.items())[: None if campaign else 1]
    for number, (what, make) in enumerate(ways):
        (own := tmp_path / str(number)).mkdir()
        folder = make(own)
        done = subprocess.run(
            [sys.executable, "-m", "dlmone_fast.train", "--preset", "grammar",
             "--output-dir", str(folder)],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode in (2, 3, 4), (what, done.stderr)
        assert "Traceback" not in done.stderr, what
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert str(folder) in said, what
        assert "; " in said, what
    figure(
        "R27", "an output_dir that cannot be made, without --dry-run",
        "exit code 2 to 4 with the path and a way out, no traceback",
        f"{len(ways)} of {len(ways)} ways",
    )  # fmt: skip


TYPOS = {
    "a key of a file": (["train", "--config", "FILE"], "did you mean teacher.steps?"),
    "a preset": (["train", "--preset", "gramar"], "did you mean grammar?"),
    "a flag of train": (["train", "--teacher.setps", "3"], "--teacher.steps"),
    "a flag of evaluate": (["evaluate", "--bach-size", "3"], "--batch-size"),
    "a flag of sample": (["sample", "model", "--sed", "3"], "--seed"),
    "a flag of import_diffuseq": (["import_diffuseq", "a", "b", "--vocb", "x"], "--vocab"),
    "a flag of serve": (["serve", "--model", "m", "--prot", "3"], "--port"),
    "a flag of generate_bulk": (
        ["generate_bulk", "a", "b", "--model", "m", "--batch-sise", "3"], "--batch-size",
    ),
    "a flag of doctor": (["doctor", "--jsn"], "--json"),
    "a flag of release": (["release", "--data-dir", "d", "--shedule", "cpu"], "--schedule"),
}  # fmt: skip


COMMANDS = (
    "train", "evaluate", "sample", "serve", "generate_bulk", "import_diffuseq", "doctor", "release",
)  # fmt: skip


def test_a_typo_is_answered_at_once(campaign: bool, figure: Figure, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[teacher]\nsetps = 3\n")
    allowed, slowest = seconds_allowed(exactly=campaign), 0.0
    for what, ((command, *flags), suggestion) in TYPOS.items():
        arguments = ["-m", f"dlmone_fast.{command}", *flags]
        arguments = [str(file) if word == "FILE" else word for word in arguments]
        slowest = max(slowest, best_seconds(arguments, code=2))
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False
        )
        assert suggestion in flowing(done.stderr), what
    assert slowest < allowed
    assert {command for (command, *_), _ in TYPOS.values()} == set(COMMANDS)
    figure(
        "R26", f"a typo, {len(TYPOS)} ways",
        f"exit code 2 with a suggestion, < {allowed:.2g} s of processor time",
        f"at most {slowest:.2f} s of processor time",
    )  # fmt: skip


def test_help_is_answered_at_once(campaign: bool, figure: Figure) -> None:
    allowed = seconds_allowed(exactly=campaign)
    spent = [best_seconds(["-m", f"dlmone_fast.{name}", "--help"]) for name in COMMANDS]
    assert max(spent) < allowed
    figure(
        "R26", f"--help of {len(COMMANDS)} commands",
        f"exit code 0, < {allowed:.2g} s of processor time",
        f"at most {max(spent):.2f} s of processor time",
    )  # fmt: skip
