"""Configuration: presets, precedence, round trip, and an error with the key path for the rest."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from config_keys import BOUNDS, KINDS, WRONG_WORDS, nested

from dlmone_fast import train
from dlmone_fast.config import (
    PRESETS,
    Config,
    ModelConfig,
    from_dict,
    load_toml,
    merge,
    resolve,
    to_dict,
    to_toml,
    unchecked,
)
from dlmone_fast.errors import ConfigError


def message(preset: str = "qqp", **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(preset, **overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_table_of_bounds_holds_every_numeric_key() -> None:
    assert set(BOUNDS) == {path for path, kind in KINDS.items() if kind in (int, float)}


@pytest.mark.parametrize("path", BOUNDS)
def test_a_number_out_of_bounds_is_refused_with_its_key_path(path: str) -> None:
    low, high = BOUNDS[path]
    whole = KINDS[path] is int
    below = int(low) - 1 if whole else math.nextafter(low, -math.inf)
    above = int(high) + 1 if whole else math.nextafter(high, math.inf)
    for value in (below, above):
        expected = f"{path} must be between {low:g} and {high:g}, got {value!r}"
        assert message(**nested(path, value)) == expected


@pytest.mark.parametrize("path", KINDS)
def test_a_value_of_the_wrong_type_is_refused_with_its_key_path(path: str) -> None:
    if path == "preset":
        return
    kind = KINDS[path]
    of_kind: dict[type, list[Any]] = {
        int: ["1", 1.0, True],
        float: ["1", True, math.nan, math.inf, 10**400],
        str: [1, True],
        bool: [1, "true"],
    }
    wrong = [["x"], {"x": 1}, *of_kind[kind]]
    for value in wrong:
        assert message(**nested(path, value)).startswith(f"{path} must be ")


@pytest.mark.parametrize("value", ["a\0b", "\0", "a\udcffb", "\ud800"])
def test_a_string_that_no_path_or_file_can_hold_is_refused(value: str) -> None:
    paths = [path for path, kind in KINDS.items() if kind is str and path != "preset"]
    assert {"output_dir", "data_dir", "data.vocab_file"} < set(paths)
    for path in paths:
        text = message(**nested(path, value))
        assert text.startswith(f"{path} must be text that a path and a UTF-8 file can hold")
        assert text.endswith(f", got {value!r}")
        text.encode()
    assert resolve(output_dir="é\u200d 🙂\n").output_dir == "é\u200d 🙂\n"


@pytest.mark.parametrize(("path", "value"), WRONG_WORDS.items())
def test_a_word_that_is_no_choice_is_refused_with_the_choices(path: str, value: str) -> None:
    text = message(**nested(path, value))
    assert text.startswith(f"{path} must be one of ")
    assert text.endswith(f"; got {value!r}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model": {"embedding_dim": 33}}, "model.embedding_dim must be even, got 33"),
        ({"model": {"num_heads": 7}}, "model.num_heads must divide hidden_size (768), got 7"),
        ({"distill": {"t_min": 1976}}, "distill.t_max must be above t_min (1976), got 1976"),
        (
            {"diffusion": {"num_timesteps": 1975}, "distill": {"t_max": 1976}},
            "must lie within diffusion.num_timesteps (1975)",
        ),
        ({"data": {"max_source_tokens": 126}}, "data.max_source_tokens must leave room"),
        ({"model": {"source_positions": 127}}, "model.source_positions must be between 0 and 126"),
        ({"model": {"source_positions": 2}}, "model.source_positions must be 0, or hold [CLS]"),
        (
            {"model": {"source_positions": 40}, "data": {"max_source_tokens": 40}},
            "and for [SEP] in model.source_positions (40), got 40",
        ),
        ({"distill": {"selection_metric": "balanced"}}, "needs data.task = 'grammar'"),
        (
            {"distill": {"selection_metric": "word_accuracy"}},
            "'word_accuracy' belongs to data.task = 'g2p', got 'word_accuracy' and 'qqp'",
        ),
        ({"data": {"task": "g2p"}}, "'word_accuracy' belongs to data.task = 'g2p', got 'bleu'"),
        (
            {"data": {"tokenizer": "aligned", "task": "g2p", "both_directions": True}},
            "data.both_directions is True, which tokenizer = 'aligned' cannot use",
        ),
        ({"data": {"tokenizer": "aligned"}}, "data.task must be 'g2p' with tokenizer = 'aligned'"),
        (
            {"data": {"tokenizer": "aligned", "task": "g2p", "vocab_file": "v"}},
            "data.vocab_file is 'v', which",
        ),
        (
            {"data": {"tokenizer": "aligned", "task": "g2p", "vocab_file": "", "lowercase": False}},
            "data.lowercase is False, which",
        ),
        (
            {"distill": {"stage1": {"anchor_steps": 5}}},
            "distill.stage1 has anchor_steps or anchor_weight, which need the teacher's paired",
        ),
        (
            {"distill": {"stage2": {"anchor_weight": 0.1, "anchor_decay_steps": 5}}},
            "distill.stage2 has anchor_steps or anchor_weight",
        ),
        (
            {"distill": {"stage1": {"anchor_weight": 0.1}}},
            "distill.stage1.anchor_weight is 0.1 and anchor_decay_steps is 0",
        ),
        (
            {"model": {"self_conditioning": True}, "teacher": {"self_conditioning_share": 1.0}},
            "teacher.self_conditioning_share must lie between 0 and 1 with",
        ),
        (
            {"teacher": {"timestep_sampler": "log-snr"}},
            "teacher.timestep_sampler = 'log-snr' needs model.normalize_embedding",
        ),
        (
            {"distill": {"decodable_margin": 2.0}},
            "distill.decodable_margin needs model.normalize_embedding",
        ),
        (
            {"distill": {"t_init": 3, "stage1": {"few_steps": 4}}},
            "distill.stage1.few_steps must be at most t_init (3), got 4",
        ),
        ({"distill": {"pairs": {"steps": 2001}}}, "distill.pairs.steps must be at most"),
        ({"evaluation": {"teacher_steps": "2000 x"}}, "evaluation.teacher_steps must be whole"),
        ({"evaluation": {"student_steps": "0"}}, "evaluation.student_steps must be whole"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    overrides: dict[str, Any], expected: str
) -> None:
    assert expected in message(**overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"teachr": {}}, "unknown key teachr; did you mean teacher?"),
        ({"teacher": {"step": 1}}, "unknown key teacher.step; did you mean teacher.steps?"),
        (
            {"distill": {"stage1": {"sid_wieght": 1}}},
            "unknown key distill.stage1.sid_wieght; did you mean distill.stage1.sid_weight?",
        ),
        ({"teacher": 3}, "teacher must be a section of keys, got 3"),
    ],
)
def test_unknown_keys_name_the_nearest_one(overrides: dict[str, Any], expected: str) -> None:
    assert message(**overrides) == expected


def test_an_unlike_key_names_all_of_its_section() -> None:
    assert "known: schedule, num_timesteps, rescale_timesteps" in message(diffusion={"zzz": 1})


@pytest.mark.parametrize("preset", ["qpq", 3, ["qqp"]])
def test_an_unknown_preset_is_refused(preset: Any) -> None:
    assert message(preset).startswith("unknown preset")
    assert message("qpq").endswith("did you mean qqp?")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves_and_reads_back_equal(preset: str, tmp_path: Path) -> None:
    config = resolve(preset)
    assert config == PRESETS[preset]
    assert config.preset == preset
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert from_dict(load_toml(file)) == config
    assert resolve(file=file) == config


def test_the_round_trip_keeps_every_kind_of_value() -> None:
    config = resolve(
        "grammar",
        seed=2**63 - 1,
        output_dir='a "b"\\ ç\n',
        compile=True,
        teacher={"learning_rate": 1, "ema_decay": 0.1 + 0.2},
    )
    assert type(config.teacher.learning_rate) is float
    assert from_dict(tomllib.loads(to_toml(config))) == config


def test_the_paper_presets_have_the_paper_values() -> None:
    for name, steps in (("qqp", 50_000), ("quasar-t", 40_000), ("wiki-auto", 80_000)):
        config = PRESETS[name]
        assert config.model == ModelConfig(vocab_size=30_522)
        assert (config.model.hidden_size, config.model.num_layers) == (768, 12)
        assert config.teacher.steps == steps
        assert (config.distill.t_init, config.distill.t_min, config.distill.t_max) == (
            1490,
            0,
            1976,
        )
        for stage in (config.distill.stage1, config.distill.stage2):
            assert (stage.beta1, stage.beta2, stage.weight_decay) == (0, 0.999, 0)
            assert (stage.dsm_weight, stage.score_adversarial_weight) == (0.5, 0.5)
            assert stage.steps == 50_000
    table5 = {
        ("qqp", 1): (1.2, 0.5, 0.5, 3e-5, 1e-5),
        ("qqp", 2): (0.5, 0.9, 0.1, 1e-5, 1e-5),
        ("quasar-t", 1): (1.2, 0.5, 0.5, 1e-5, 1e-5),
        ("quasar-t", 2): (1.2, 0.5, 0.5, 1e-5, 1e-5),
        ("wiki-auto", 1): (1.0, 0.5, 0.5, 1e-5, 1e-5),
    }
    for (name, index), expected in table5.items():
        stage = getattr(PRESETS[name].distill, f"stage{index}")
        found = (
            stage.mu,
            stage.sid_weight,
            stage.generator_adversarial_weight,
            stage.score_learning_rate,
            stage.generator_learning_rate,
        )
        assert found == expected


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "qqp-small"\nseed = 5\n[teacher]\nsteps = 77\nwarmup_steps = 7\n', "utf-8"
    )
    config = resolve(file=file, teacher={"steps": 99})
    assert config.preset == "qqp-small"
    assert (config.seed, config.teacher.steps, config.teacher.warmup_steps) == (5, 99, 7)
    assert config.model == PRESETS["qqp-small"].model
    assert config.teacher.learning_rate == PRESETS["qqp-small"].teacher.learning_rate
    assert resolve("qqp", file=file).model == PRESETS["qqp"].model
    assert resolve("qqp", file=file).teacher.steps == 77


def test_the_merged_values_are_checked_not_the_layers(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[distill]\nt_min = 1980\n", "utf-8")
    assert message("qqp", file=file).startswith("distill.t_max must be above")
    assert resolve("qqp", file=file, distill={"t_max": 1990}).distill.t_min == 1980


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"steps = ", "is not valid TOML"),
        (b"seed = 1\n[teacher]\nsteps 3\n", "see teacher.steps, line 3"),
        (b"seed = 1\nseed = 2\n", "see seed, line 2"),
        (b"[distill.stage1]\nmu = [1,\n", "see distill.stage1.mu, line 2"),
        (b"[distill.stage1]\nmu = " + b"1" * 5000, "see distill.stage1.mu, line 2"),
        (
            b"[distill.stage1]\nmu = '\xff'",
            "is not UTF-8 text (invalid start byte); see distill.sta",
        ),
        (b"]", "see the top, line 1"),
        (b"\xff", "is not UTF-8 text (invalid start byte); see the top, line 1"),
        (b"[teacher]\nstep = 1\n", "unknown key teacher.step"),
        (b"teacher = 1\n", "teacher must be a section"),
        (b"[teacher]\nsteps = 1.5\n", "teacher.steps must be a whole number, got 1.5"),
        (b"seed = 1\nseed = 2\n", "is not valid TOML"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, ""),
        (b"seed = " + b"9" * 5000, "is not valid TOML: Exceeds the limit"),
        (b"seed = 0x" + b"f" * 5000, "seed must be between 0 and 9.22337e+18, got a number of th"),
        (b"# " + b"a" * (1 << 20), "is larger than the 1,048,576 bytes"),
        ('[evaluation]\nteacher_steps = "²"\n'.encode(), "evaluation.teacher_steps must be whole"),
        (b'[evaluation]\nteacher_steps = "' + b"9" * 5000 + b'"', "whole numbers separated by sp"),
        (b'"a\\u001B[2J" = 1\n', r"unknown key 'a\x1b[2J'; known: "),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    assert expected in message("qqp", file=file)


@pytest.mark.parametrize(
    "content", ['{key} = "{long}"', "{key} = ['{long}']", "{long} = 1", '[model]\n"{long}" = 1']
)
@pytest.mark.parametrize("key", ["seed", "precision", "teacher", "preset"])
def test_a_message_repeats_no_long_value(tmp_path: Path, content: str, key: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(content.format(key=key, long="x" * 50_000), "utf-8")
    assert len(message("", file=file)) < 600


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in message("qqp", file=tmp_path / "none.toml")
    assert "cannot be read" in message("qqp", file=tmp_path)


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 5}}, {"d": 4}) == {"a": {"b": 5, "c": 2}, "d": 4}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


def test_checks_can_wait_for_the_merged_result() -> None:
    with unchecked():
        broken = ModelConfig(seq_len=-1)
        config = Config(model=broken)
    with pytest.raises(ConfigError, match=r"model\.seq_len must be between"):
        from_dict(to_dict(config))


def test_inference_reads_half_of_the_layout_unless_told_otherwise() -> None:
    assert resolve("qqp").max_source_tokens == 64
    assert resolve("qqp", data={"max_source_tokens": 125}).max_source_tokens == 125
    assert [name for name in PRESETS if PRESETS[name].is_grammar] == [
        "grammar",
        "grammar-templates",
    ]


@pytest.mark.parametrize(
    ("preset", "chosen", "expected"),
    [
        ("qqp-small", {"model": {"seq_len": 128}},
         {"model.max_positions": 128, "model.source_positions": 64}),
        ("qqp-small", {"model": {"seq_len": 32}},
         {"model.max_positions": 64, "model.source_positions": 16}),
        ("qqp-small", {"model": {"seq_len": 128, "source_positions": 32}},
         {"model.source_positions": 32}),
        ("qqp-small", {"model": {"seq_len": 128, "source_positions": 0}},
         {"model.source_positions": 0}),
        ("qqp-small", {"data": {"max_source_tokens": 40}}, {"model.source_positions": 41}),
        ("qqp", {"model": {"seq_len": 1024}},
         {"model.max_positions": 1024, "model.source_positions": 0}),
        ("qqp-small", {"teacher": {"steps": 500}}, {"teacher.warmup_steps": 20}),
        ("qqp-small", {"teacher": {"steps": 20_000}}, {"teacher.warmup_steps": 1000}),
        ("qqp", {"distill": {"stage1": {"steps": 250}}},
         {"distill.stage1.adversarial_warmup_steps": 2,
          "distill.stage2.adversarial_warmup_steps": 400}),
        ("qqp-small", {"model": {"vocab_size": 700}}, {"data.vocab_size": 700}),
        ("qqp", {"data": {"vocab_file": "", "vocab_size": 900}}, {"model.vocab_size": 0}),
        ("qqp", {"diffusion": {"num_timesteps": 1000}},
         {"distill.t_init": 745, "distill.t_max": 988,
          "evaluation.teacher_steps": "1000 65 20 10"}),
    ],
)  # fmt: skip
def test_sizes_that_nobody_set_follow_those_that_somebody_did(
    preset: str, chosen: dict, expected: dict, tmp_path: Path
):
    def found(config: Config) -> dict:
        values = {}
        for path in expected:
            value = config
            for key in path.split("."):
                value = getattr(value, key)
            values[path] = value
        return values

    assert found(resolve(preset, **chosen)) == expected
    # A file and flags mean the same.
    file = tmp_path / "run.toml"
    file.write_text(tomli_w.dumps({"preset": preset, **chosen}))
    assert found(resolve(file=file)) == expected
    flags = []
    for section, values in chosen.items():
        for key, value in values.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flags += [
                item
                for name, v in inner
                for item in (f"--{section}.{key}{'.' * bool(name)}{name}".replace("_", "-"), str(v))
            ]
    args = ["--preset", preset, *flags]
    assert found(train._configuration(train._arguments(args), args)) == expected


def test_what_a_resolved_configuration_says_is_set(tmp_path: Path):
    before = resolve("qqp-small", model={"seq_len": 128, "source_positions": 32})
    file = tmp_path / "config.toml"
    file.write_text(to_toml(before))
    assert resolve(file=file) == before
    # A flag over a file: what follows the flag is a share of the preset's, not of the file's.
    (tmp_path / "mine.toml").write_text('preset = "qqp-small"\n[model]\nseq_len = 128\n')
    args = ["--config", str(tmp_path / "mine.toml"), "--model.seq-len", "96"]
    config = train._configuration(train._arguments(args), args)
    assert (config.model.source_positions, config.model.max_positions) == (48, 96)
