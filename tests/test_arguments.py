"""One text is no list of texts, and an argument that nothing reads is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

import dlmone_fast
from dlmone_fast import evaluate
from dlmone_fast.config import PRESETS, Config, DataConfig, resolve
from dlmone_fast.config.unread import refuse_unread
from dlmone_fast.errors import ConfigError, ModelFileError, PromptError, UsageError
from dlmone_fast.evaluation.bertscore import bertscore_f1
from dlmone_fast.evaluation.diversity import div_4, self_bleu
from dlmone_fast.evaluation.generations import read_generations, write_generations
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.run import evaluate_generations, evaluate_model
from dlmone_fast.evaluation.scores import score_generations
from dlmone_fast.models.folder import load_folder
from dlmone_fast.runtime import Generator
from dlmone_fast.tasks import grammar
from dlmone_fast.tokenizer import Tokenizer
from dlmone_fast.train import main as train
from dlmone_fast.training.pipeline import with_teacher

TEXT: Any = "ba be bi"
LISTS: dict[str, Callable[[Generator, Any], object]] = {
    "prompts": lambda model, one: model.generate_iter(one),
    "texts": lambda model, one: model.generate_candidates(one, seeds=[0] * 8),
    "batch_sizes": lambda model, one: model.warmup(one),
    "calibration": lambda model, one: tiny.generator(
        precision="int8", backend="openvino", calibration=one
    ),
    "rows": lambda model, one: evaluate_model(model, rows=one),
    "generations": lambda model, one: evaluate_generations(one),
    "vocabulary": lambda model, one: Tokenizer(one),
    "words": lambda model, one: Tokenizer.from_words(one),
    "sources": lambda model, one: score_generations(one, [TEXT] * 8, [[TEXT] * 8]),
    "references": lambda model, one: score_generations([TEXT] * 8, one, [[TEXT] * 8]),
    "recovered": lambda model, one: write_generations("x", [TEXT] * 8, [TEXT] * 8, one),
    "hypotheses": lambda model, one: bertscore_f1(one, [TEXT] * 8, "folder"),
    "candidates": lambda model, one: select_mbr(one),
}


@pytest.mark.parametrize("one", [TEXT, TEXT.encode(), Path("f.jsonl"), 7], ids=repr)
@pytest.mark.parametrize("name", LISTS)
def test_one_text_is_not_read_letter_by_letter(name: str, one: Any):
    with pytest.raises(UsageError, match=rf"^{name}: expected a list, got one .*; wrap it"):
        LISTS[name](tiny.generator(), one)


def test_lists_within_lists_and_other_readers_of_texts_are_checked_too():
    for meet in (
        lambda: Tokenizer.learn(TEXT, 100),
        lambda: tiny.tokenizer().encode(TEXT),
        lambda: read_generations(TEXT),
        lambda: div_4(TEXT),
        lambda: self_bleu(TEXT),
        lambda: grammar.score(TEXT, [[TEXT]] * 8),
        lambda: grammar.score([TEXT] * 8, TEXT),
        lambda: score_generations(["ba"], ["be"], ["b"]),
    ):
        with pytest.raises(UsageError, match=r"^(texts|generations|candidates|sources)(\[0\])?: "):
            meet()
    # Whatever else can be gone through is welcome.
    assert len(list(tiny.generator().generate_iter({"ba": 1, "be": 2}))) == 2


def test_errors_use_the_name_of_the_argument():
    model, long, odd = tiny.generator(), "ba" * 15_000, "\ud800"
    for prompt, said in ((long, r"\d+ characters"), (odd, "lone surrogate"), ("ba " * 9, "11 tok")):
        for meet, name in (
            (lambda text: model.generate(text), "batch"),
            (lambda text: model.generate(["ba", text]), r"batch\[1\]"),
            (lambda text: dlmone_fast.generate(["ba", text], model=model), r"batch\[1\]"),
            (lambda text: list(model.generate_iter(["ba", text])), r"prompts\[1\]"),
            (lambda text: model.generate_candidates(["ba", text], seeds=[0, 0]), r"texts\[1\]"),
            (lambda text: model.check_prompt(text), "prompt"),
        ):
            with pytest.raises(PromptError, match=f"^{name}: {said}"):
                meet(prompt)
    with pytest.raises(PromptError, match=r"^text: lone surrogate"):
        model.normalize_text(odd)
    with pytest.raises(PromptError, match=r"^target: lone surrogate"):
        model.encode_jointly("ba", odd)
    with pytest.raises(PromptError, match=r"^calibration\[1\]: lone surrogate"):
        tiny.generator(precision="int8", backend="openvino", calibration=["ba", odd])


def test_generate_refuses_what_it_would_not_read(tmp_path: Path):
    model, folder = tiny.generator(), tiny.save(tmp_path / "m")
    with pytest.raises(UsageError, match=r"select: 'mbr' needs candidates .*num_candidates=10"):
        model.generate("ba", select="mbr")
    with pytest.raises(UsageError, match=r"calibration: belongs to int8, and .* fp32"):
        dlmone_fast.load(folder, "cpu", calibration=["ba"])
    with pytest.raises(UsageError, match="calibration: belongs to int8"):
        tiny.generator(calibration=["ba"])
    for option in ({"revision": "v1"}, {"download": True}):
        with pytest.raises(UsageError, match=f"^{next(iter(option))}=.*belongs to a hub id"):
            dlmone_fast.from_pretrained(folder, **option)


def test_evaluation_refuses_what_it_would_not_read(tmp_path: Path):
    model, rows = tiny.generator(), [object()]
    for options, said in (
        ({"rows": rows, "split": "valid"}, "split: 'valid' belongs to data_dir"),
        ({"rows": rows, "mbr": True}, "mbr: needs candidates .* num_candidates=10"),
        ({"rows": rows, "bertscore_layer": 3}, "bertscore_layer: 3 belongs to bertscore_model"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate_model(model, **options)
    with pytest.raises(UsageError, match=r"mbr: needs candidates .*several files"):
        evaluate_generations(["f.jsonl"], mbr=True)
    with pytest.raises(UsageError, match="bertscore_layer: 3 belongs"):
        evaluate_generations(["f.jsonl"], bertscore_layer=3)


@pytest.mark.parametrize(
    "option",
    [
        "--split valid", "--num-candidates 2", "--steps 7", "--sampler ddim", "--temperature 0.5",
        "--batch-size 8", "--device cuda", "--dtype int8", "--backend eager",
        "--calibration nofile", "--joint-truncation", "--generations-dir g",
    ],
)  # fmt: skip
def test_options_of_generating_do_not_go_with_files(option: str):
    flag = option.split()[0]
    with pytest.raises(UsageError, match=f"^{flag}: belongs to MODEL"):
        evaluate.main(["--generations", "f.jsonl", *option.split()])


def test_a_layer_alone_is_refused():
    with pytest.raises(UsageError, match="--bertscore-layer: belongs to --bertscore-model"):
        evaluate.main(["--generations", "f.jsonl", "--bertscore-layer", "3"])


def test_a_student_is_not_distilled_again(tmp_path: Path):
    student, teacher = tiny.save(tmp_path / "s"), tiny.save(tmp_path / "t", kind="teacher")
    config = resolve(
        "grammar", output_dir=str(tmp_path / "run"), distill={"t_init": 30, "t_max": 40}
    )
    config = replace(config, evaluation=replace(config.evaluation, teacher_steps="5"))
    assert with_teacher(config, load_folder(teacher)).model.hidden_size == 32
    said = r"teacher .*/s: holds a student, .* RUN/teacher"
    with pytest.raises(UsageError, match=said):
        dlmone_fast.distill(config, student)
    with pytest.raises(UsageError, match=said):
        train(["--teacher", str(student), "--preset", "grammar", "--dry-run"])


def test_a_grammar_has_no_data_of_one_s_own(tmp_path: Path):
    said = "data_dir is .*writes its own; name a preset .* leave data_dir out"
    with pytest.raises(ConfigError, match=said):
        train(["--data-dir", str(tmp_path), "--dry-run"])
    with pytest.raises(ConfigError, match=said):
        resolve("grammar", data_dir="data")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data.vocab-size 900", "data.vocab_size is 900"),
        ("--data.vocab-file v.txt", "data.vocab_file is 'v.txt'"),
        ("--data.no-lowercase", "data.lowercase is False"),
        ("--preset qqp --data.vocab-size 900", "data.vocab_size is 900"),
        ("--preset qqp --data.train-rows 900", "data.train_rows is 900"),
        ("--teacher.log-snr-scale 3", "teacher.log_snr_scale is 3.0"),
        ("--teacher.self-conditioning-share 0.3", "teacher.self_conditioning_share is 0.3"),
        ("--distill.pairs.steps 9", "distill.pairs.steps is 9"),
        ("--distill.pairs.targets data", "distill.pairs.targets is 'data'"),
        ("--data.strip-accents on", "data.strip_accents is 'on'"),
        ("--preset g2p --data.strip-accents on", "data.strip_accents is 'on'"),
        ("--preset g2p --data.vocab-size 900", "data.vocab_size is 900"),
        (
            "--preset g2p --distill.pairs.targets data --distill.pairs.steps 9",
            "distill.pairs.steps is 9",
        ),
    ],
)
def test_keys_that_nothing_reads_are_refused(flags: str, said: str):
    with pytest.raises(ConfigError, match=f"^{said}, and nothing reads it here: it belongs to"):
        train([*flags.split(), "--dry-run"])


def test_keys_that_are_read_and_presets_as_they_are_pass():
    for name in PRESETS:
        refuse_unread(resolve(name))
    for name in ("qqp", "qqp-small"):
        refuse_unread(resolve(name, data={"strip_accents": "off"}))
    refuse_unread(resolve("g2p", distill={"pairs": {"targets": "data"}}))
    refuse_unread(Config())
    refuse_unread(replace(Config(), data=DataConfig(vocab_size=900, lowercase=False)))


def test_a_tokenizer_json_is_no_vocabulary_file(tmp_path: Path):
    file = tmp_path / "tokenizer.json"
    tiny.tokenizer().save(file)
    with pytest.raises(ModelFileError, match=r"is JSON, .*expected a vocab\.txt"):
        Tokenizer.from_vocab_file(file)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["{", *tiny.tokenizer().vocabulary]))
    assert Tokenizer.from_vocab_file(vocabulary).vocabulary[0] == "{"
