from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from dlmone_fast.errors import PromptError, TokenizerMissingError, UsageError
from dlmone_fast.runtime import GenerationOutput, Generator, ties
from dlmone_fast.runtime.engines import Runner
from dlmone_fast.runtime.rows import RowBatch
from dlmone_fast.samplers import METHODS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Thousands of tiny calls: a second thread costs more than it brings.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def student() -> Generator:
    return tiny.generator()


@pytest.fixture(scope="module")
def teacher() -> Generator:
    return tiny.generator("teacher")


def test_a_str_gives_a_str_and_a_list_a_list_in_order(student: Generator):
    prompts = tiny.prompts(9)
    texts = student.generate(prompts, batch_size=4)
    assert [student.generate(prompt) for prompt in prompts] == texts
    assert student.generate([]) == []
    assert len(set(texts)) > 1


def test_seeds_decide_the_noise(student: Generator):
    prompts = tiny.prompts(3)
    one, two = student.generate(prompts, seed=1), student.generate(prompts, seed=2)
    assert one != two
    assert student.generate(prompts, seed=[1, 2, 1]) == [one[0], two[1], one[2]]
    output = student.generate(prompts, seed=None, return_dict=True)
    assert len(set(output.seeds)) == 3
    assert student.generate(prompts, seed=output.seeds) == output.texts


def test_candidates_and_selection(student: Generator):
    prompts = tiny.prompts(4)
    candidates = student.generate(prompts, num_candidates=3)
    assert [len(texts) for texts in candidates] == [3, 3, 3, 3]
    assert [texts[0] for texts in candidates] == student.generate(prompts)
    assert student.generate(prompts[0], num_candidates=3) == candidates[0]
    selected = student.generate(prompts, num_candidates=3, select="mbr")
    assert all(text in texts for text, texts in zip(selected, candidates, strict=True))


def test_return_dict(student: Generator):
    prompts = [*tiny.prompts(2), " ".join(tiny.WORDS[:12])]
    output = student.generate(
        prompts, num_candidates=2, seed=5, on_overflow="truncate", return_dict=True
    )
    assert isinstance(output, GenerationOutput)
    assert output.truncated == [False, False, True]
    assert output.seeds == [5, 5, 5]
    assert output.steps == 1
    assert [texts[0] for texts in output.candidates] == output.texts
    decoded = [student.tokenizer.decode_clean(ids) for ids in output.token_ids]
    assert decoded == output.texts


def test_steps_change_a_students_text(student: Generator):
    prompts = tiny.prompts(5)
    assert student.generate(prompts, steps=4) != student.generate(prompts)
    assert student.generate(prompts, steps=2, return_dict=True).steps == 2


def test_overflow_is_an_error_or_a_cut(student: Generator):
    long = " ".join(tiny.WORDS[:12])
    with pytest.raises(PromptError, match="14 tokens"):
        student.generate(long)
    with pytest.raises(PromptError, match=r"batch\[1\]: more than 8 tokens .*'truncate'"):
        student.generate(["ba", "ba " * 1000])
    cut = " ".join(tiny.WORDS[: tiny.MAX_SOURCE_TOKENS - 2])
    assert student.generate(long, on_overflow="truncate") == student.generate(cut)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 31), ("steps", True), ("steps", 1.0),
        ("num_candidates", 0), ("num_candidates", 65), ("batch_size", 0), ("batch_size", 4097),
        ("seed", -1), ("seed", 1 << 64), ("seed", [1, 2]), ("seed", [1.5]), ("seed", "1"),
        ("select", "best"), ("on_overflow", "cut"), ("sampler", "ddim"),
    ],
)  # fmt: skip
def test_arguments_are_bounded(student: Generator, name: str, value: object):
    with pytest.raises(UsageError, match=name):
        student.generate(["ba"], **{name: value})


@pytest.mark.parametrize("batch", [None, 3, b"ba", ["ba", 3], {"ba"}, "\ud800", "ba " * 100])
def test_prompts_that_cannot_be_read(student: Generator, batch: object):
    with pytest.raises(PromptError):
        student.generate(batch)


@pytest.mark.parametrize("sampler", METHODS)
def test_a_teacher_generates_with_every_sampler(teacher: Generator, sampler: str):
    steps = 40 if sampler == "ancestral" else 5
    prompts = tiny.prompts(3)
    texts = teacher.generate(prompts, sampler=sampler, steps=steps)
    assert texts == teacher.generate(prompts, sampler=sampler, steps=steps)
    assert len(texts) == 3


def test_a_teachers_own_sampler_and_a_wrong_one(teacher: Generator):
    prompts = tiny.prompts(2)
    assert teacher.generate(prompts) == teacher.generate(prompts, sampler="ddim", steps=3)
    with pytest.raises(UsageError, match="sampler must be one of"):
        teacher.generate(prompts, sampler="euler")


def test_a_model_without_a_tokenizer_says_how_to_add_one():
    generator = Generator(tiny.denoiser(), None, tiny.settings())
    with pytest.raises(TokenizerMissingError, match="--vocab"):
        generator.generate("ba")


def test_ids_are_the_same_alone_in_any_batch_and_in_any_order(student: Generator):
    prompts = tiny.prompts(2000)
    seeds = list(range(len(prompts)))
    expected = ids_of(student, prompts, seeds, 64)
    order = random.Random(0).sample(seeds, len(seeds))
    for batch_size in (1, 7):
        shuffled = ids_of(student, [prompts[i] for i in order], order, batch_size)
        assert shuffled == [expected[i] for i in order]


def test_near_ties_are_decided_by_the_row_alone(monkeypatch: pytest.MonkeyPatch):
    # Every embedding has a twin beside it, and the batch's size moves the outputs.
    network = tiny.denoiser()
    weight = network.lm.tokens.weight
    half, numbers = len(weight) // 2, torch.Generator().manual_seed(0)
    weight[half : 2 * half] = weight[:half]
    weight[half : 2 * half] += 1e-4 * torch.randn(half, 16, generator=numbers)
    generator = Generator(network, tiny.tokenizer(), tiny.settings())
    runner = generator._executor.pool.engine.runner()

    def moved_by_the_batch(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(len(x_t))
        x0 = predict(x_t, t)
        return x0 + 1e-3 * torch.randn(x0.shape, generator=draws)

    predict = runner.predict
    monkeypatch.setattr(runner, "predict", moved_by_the_batch)
    monkeypatch.setattr(runner, "predict_from", partial(Runner.predict_from, runner))
    monkeypatch.setattr(generator._executor.pool.engine, "runner", lambda: runner)
    prompts = tiny.prompts(70)
    seeds = list(range(len(prompts)))
    alone = ids_of(generator, prompts, seeds, 1)
    assert ids_of(generator, prompts, seeds, 64) == alone
    assert ids_of(generator, prompts, seeds, 7) == alone
    monkeypatch.setattr(generator._executor, "_clear", -1.0)
    assert ids_of(generator, prompts, seeds, 64) != alone, "the case is too easy"


def test_rows_with_a_choice_that_is_not_clear_are_named():
    clear = ties.clear_margin(2 * torch.eye(4))
    assert clear == pytest.approx(4 * ties.THRESHOLD)
    margins = torch.tensor([1.0, clear / 2, float("inf"), float("nan"), 0.0])
    assert ties.unclear_rows(margins, clear) == [1, 3, 4]
    assert ties.unclear_rows(margins[:0], clear) == []


@pytest.mark.parametrize("steps", [1, 4])
def test_the_threshold_is_far_above_the_noise_of_products(student: Generator, steps: int):
    encoded = student.tokenizer.encode(tiny.prompts(64))
    rows, _ = student._rows(encoded, tiny.MAX_SOURCE_TOKENS, range(64), 1, "error")
    executor = student._executor
    pipeline = executor.pipeline(tiny.settings(steps=steps))
    batch, predict = rows.batch(steps), executor.pool.engine.runner().predict

    def embeddings(part: RowBatch) -> torch.Tensor:
        return pipeline.embeddings(predict, part.ids, part.mask, part.draws)[part.mask != 0]

    together = embeddings(batch)
    alone = [embeddings(batch.part(i, i + 1)) for i in range(64)]
    moved = (together - torch.cat(alone)).norm(dim=-1).max()
    table = student.denoiser.embedding
    # |margin change| = 2 |<moved, e1 - e2>| <= 4 |moved| |e|.
    worst = 4 * moved * table.norm(dim=-1).max() / table.square().sum(-1).mean()
    assert worst < ties.THRESHOLD / 100


def ids_of(
    generator: Generator, prompts: list[str], seeds: list[int], batch_size: int
) -> list[list[int]]:
    return generator.generate(
        prompts, seed=seeds, batch_size=batch_size, return_dict=True, progress=False
    ).token_ids


def test_eta_is_the_noise_of_a_teachers_ddim(student: Generator, teacher: Generator):
    plain = teacher.generate("ba be", sampler="ddim", steps=6, eta=0.0)
    assert plain == teacher.generate("ba be", sampler="ddim", steps=6)
    assert plain != teacher.generate("ba be", sampler="ddim", steps=6, eta=1.0)
    for eta in (-0.1, 1.1, "high"):
        with pytest.raises(UsageError, match="eta must be a number from 0 to 1"):
            teacher.generate("ba", sampler="ddim", eta=eta)
    with pytest.raises(UsageError, match="belongs to the ddim sampler"):
        teacher.generate("ba", sampler="q-sampling", eta=0.5)
    with pytest.raises(UsageError, match="need a teacher"):
        student.generate("ba", eta=0.5)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "q-sampling", "ancestral"])
def test_temperature_is_a_factor_of_all_of_a_samplers_noise(teacher: Generator, sampler: str):
    steps = 40 if sampler == "ancestral" else 4

    def texts(**options: float) -> list[str]:
        seeds = list(range(6))
        return teacher.generate(["ba be"] * 6, sampler=sampler, steps=steps, seed=seeds, **options)

    assert texts() == texts(temperature=1.0)
    assert len(set(texts())) > 1
    assert len(set(texts(temperature=0.0))) == 1
    assert texts(temperature=0.5) != texts()


def test_temperature_of_a_student(student: Generator):
    def texts(steps: int, temperature: float | None) -> list[str]:
        seeds = list(range(6))
        prompts = ["ba be"] * 6
        return student.generate(prompts, steps=steps, seed=seeds, temperature=temperature)

    for steps in (1, 3):
        assert texts(steps, None) == texts(steps, 1.0)
        assert len(set(texts(steps, 1.0))) > 1
        assert len(set(texts(steps, 0.0))) == 1
    for temperature in (-0.1, 10.1, "hot"):
        with pytest.raises(UsageError, match="temperature must be a number from 0 to 10"):
            student.generate("ba", temperature=temperature)


def test_a_model_may_have_a_temperature_of_its_own(student: Generator):
    cold = Generator(
        student.denoiser, student.tokenizer, replace(student.settings, temperature=0.0)
    )
    assert len(set(cold.generate(["ba be"] * 6, seed=list(range(6))))) == 1
    assert len(set(cold.generate(["ba be"] * 6, seed=list(range(6)), temperature=1.0))) > 1


def test_the_originals_decoding_takes_the_decoders_choice_and_cuts_nothing(student: Generator):
    found = student.generate_candidates(["ba be"], seeds=[0], decode="diffuseq")
    text, ids = found.texts[0][0], found.token_ids[0][0]
    kept = [i for i in ids if i not in {student.tokenizer.sep_id, student.tokenizer.cls_id,
                                        student.tokenizer.pad_id}]  # fmt: skip
    assert text.split() == student.tokenizer.decode(kept).split()
