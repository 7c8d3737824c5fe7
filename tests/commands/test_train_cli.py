from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from dlmone_fast import train
from dlmone_fast.cli import field_docs
from dlmone_fast.config import DiffusionConfig, TeacherConfig, resolve, schema
from dlmone_fast.diffusion import Schedule
from dlmone_fast.errors import ConfigError, DlmOneError, UsageError
from dlmone_fast.losses.teacher import teacher_loss
from dlmone_fast.networks import Backbone, DiffusionLM
from dlmone_fast.tasks.grammar_rules import vocabulary
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.training import plan


def test_dry_run_prints_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "qqp", "--dry-run"])
    printed = capsys.readouterr().out
    assert "teacher φ 91,225,274" in printed
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_file_and_the_file_the_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "run.toml"
    file.write_text("[teacher]\nsteps = 111\nbatch_size = 32\n")
    train.main([f"--config={file}", "--teacher.batch-size", "16", "--dry-run"])
    assert "111 steps of 16 rows" in capsys.readouterr().out


def test_the_last_preset_and_file_count(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("[teacher]\nsteps = 111\n")
    train.main(["--preset", "qqp", "--config", "/none.toml", "--preset=grammar",
                f"--config={file}", "--dry-run"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "preset grammar" in printed
    assert "111 steps" in printed


def test_a_given_teachers_sizes_are_planned_with(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    teacher = tiny.save(tmp_path / "teacher", "teacher")
    steps = ["--distill.t-init", "30", "--distill.t-min", "1", "--distill.t-max", "30"]
    steps += ["--evaluation.teacher-steps", "20 5"]
    arguments = ["--preset", "qqp", "--teacher", str(teacher), *steps, "--dry-run"]
    train.main(arguments)
    printed = capsys.readouterr()
    assert "2 layers of width 32" in printed.out
    assert f"vocabulary {tiny.tokenizer().vocab_size}" in printed.out
    assert printed.err == ""
    train.main([*arguments, "--model.num-layers", "3"])
    printed = capsys.readouterr()
    assert "2 layers of width 32" in printed.out
    assert "its own model and diffusion are used" in printed.err


def test_a_teacher_of_other_text_needs_a_preset_or_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    teacher = tiny.save(tmp_path / "teacher", "teacher")
    file = tmp_path / "run.toml"
    file.write_text("[distill]\nt_init = 30\nt_min = 1\nt_max = 30\n")
    steps = ["--distill.t-init", "30", "--distill.t-min", "1", "--distill.t-max", "30"]
    steps += ["--evaluation.teacher-steps", "20 5", "--dry-run"]
    command = ["--teacher", str(teacher), *steps]
    with pytest.raises(UsageError, match=r"--teacher .*another vocabulary.*--preset") as caught:
        train.main(command)
    assert caught.value.exit_code == 2
    assert str(teacher) in str(caught.value)
    assert capsys.readouterr().out == ""
    for named in (["--preset", "grammar"], ["--preset=qqp"], ["--config", str(file)]):
        train.main([*named, *command])
    train.main([*command, "--data.task", "qqp", "--distill.selection-metric", "bleu"])
    assert capsys.readouterr().out.count("teacher φ") == 4


def test_a_grammars_own_teacher_needs_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    teacher = tiny.save(tmp_path / "teacher", "teacher")
    Tokenizer.from_words(vocabulary()).save(teacher / "tokenizer.json")
    monkeypatch.setattr(train, "_plan", lambda config, teacher: f"planned {config.preset}")
    train.main(["--teacher", str(teacher), "--dry-run"])
    # What is missing is told where the folder is read.
    train.main(["--teacher", str(tmp_path / "none"), "--dry-run"])
    assert capsys.readouterr().out == "planned grammar\n" * 2


def test_parameters_and_the_vocabulary_that_is_known():
    assert plan.count(resolve("qqp")).model == 91_225_274
    assert plan.known_vocabulary(resolve("grammar")) == 199
    assert plan.known_vocabulary(resolve("qqp-small")) == 8000


def test_flops_are_what_torch_counts():
    # torch counts no attention products on a CPU: they are 2 · L · N · 2LH.
    model = resolve("grammar").model
    backbone = Backbone(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.randn(3, model.seq_len, model.embedding_dim), torch.zeros(3))
    attention = 4 * model.num_layers * model.seq_len**2 * model.hidden_size
    assert counter.get_total_flops() == 3 * (plan.forward_flops(model) - attention)


def test_flops_of_self_conditioning_are_what_torch_counts():
    def counted(on: bool, rows: int) -> int:
        model = replace(resolve("grammar").model, vocab_size=20, self_conditioning=on)
        lm, schedule = DiffusionLM(model), Schedule(DiffusionConfig())
        ids = torch.zeros(4, model.seq_len, dtype=torch.int64)
        noise = torch.zeros(4, model.seq_len, model.embedding_dim)
        rows_of = torch.arange(rows) if on else None
        with FlopCounterMode(display=False) as counter:
            terms = teacher_loss(
                lm, schedule, TeacherConfig(), ids, torch.ones_like(ids), torch.zeros(4).long(),
                noise, noise, with_estimate=rows_of,
            )  # fmt: skip
            terms["loss"].sum().backward()
        return counter.get_total_flops()

    config = resolve("grammar", model={"self_conditioning": True})
    attention = 4 * config.model.num_layers * config.model.seq_len**2 * config.model.hidden_size
    # Two rows of four are the default share; torch leaves out their attention products.
    expected = 4 * plan.estimate_flops(config) - 2 * attention
    assert counted(True, 2) - counted(False, 0) == expected
    assert plan.estimate_flops(resolve("grammar")) == 0


def test_the_plan_shows_what_self_conditioning_adds(capsys: pytest.CaptureFixture[str]):
    train.main(["--preset", "qqp-small", "--model.self-conditioning", "--dry-run"])
    assert "per step (self-conditioning " in capsys.readouterr().out
    train.main(["--preset", "qqp-small", "--dry-run"])
    assert "self-conditioning" not in capsys.readouterr().out


def test_the_plan_counts_what_the_options_of_distillation_cost(
    capsys: pytest.CaptureFixture[str],
):
    base = resolve("grammar", model={"vocab_size": 199})
    forward, decoder = plan.forward_flops(base.model), plan.decoder_flops(base.model)
    stage = dataclasses.replace(base.distill.stage1, few_steps=5)
    # Calls 1 … 5, drawn evenly: two more than one on average.
    for cost in (plan.score_step_flops, plan.generator_step_flops):
        assert cost(base.model, stage) == cost(base.model, base.distill.stage1) + 64 * 2 * forward
    assert plan.anchor_step_flops(base.model, stage) == 64 * (3 * forward + 2 * decoder)
    assert plan.pair_flops(base) == 20 * forward + decoder
    assert plan.pair_bytes(base.model) == 4 + 4 + 2 * 28
    train.main(["--dry-run"])
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("pairs", "anchor", "  t  "))
    train.main(
        ["--distill.pairs.count", "4096", "--distill.stage1.anchor-steps", "300",
         "--distill.decodable-margin", "2", "--dry-run"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "4,096 paired endpoints, 4 a source row, 20 teacher calls each (ddim)" in printed
    assert "256 KiB a checkpoint" in printed
    assert "300 updates of θ on pairs before" in printed
    assert re.search(r"  t          from \[\d+, 1976\)", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distill.stage1.mu", "9"], r"distill\.stage1\.mu must be between"),
        (["--teacher.learning-rate", "nan"], r"teacher\.learning_rate must be finite"),
        (["--preset", "qpq"], "unknown preset 'qpq'; did you mean qqp"),
        (["--config", "/none.toml"], r"--config /none\.toml: cannot be read"),
    ],
)
def test_configuration_errors_name_the_key(arguments: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        train.main([*arguments, "--dry-run"])
    assert isinstance(caught.value, DlmOneError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[distill.stage1]\nmuu = 1\n", r"unknown key distill\.stage1\.muu; did you mean dist.*mu"),
        ('[distill.stage1]\nmu = "x"\n', r"distill\.stage1\.mu must be a number, got 'x'"),
        ("teacher = 3\n", "teacher must be a section"),
        ("[", "is not valid TOML"),
    ],
)
def test_errors_of_the_file_name_the_key(
    content: str, message: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        train.main(["--config", str(file), "--dry-run"])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--distill.stage1.muu", "3"], "distill.stage1.mu"),
        (["--seed", "many"], "invalid literal"),
        (["--phase", "third"], "Expected one of"),
    ],
)
def test_usage_errors_end_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_message_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "dlmone_fast.train", "--model.num-heads", "7"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: model.num_heads must divide hidden_size (128), got 7\n"


def test_help_shows_every_docstring_of_the_configuration():
    # The quick reader of docstrings against Python's own parser.
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    found = field_docs(schema)
    compared = 0
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for here, below in zip(kind.body, kind.body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = re.sub(r"\s+", " ", below.value.value)
                assert found[kind.name][here.target.id] == text
                compared += 1
    assert compared > 40
    assert dataclasses.is_dataclass(schema.Config)
