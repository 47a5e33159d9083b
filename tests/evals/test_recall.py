"""Teacher-forced recall against real decoding, and both ways of asking."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import ConfigError, DataError, ModelError
from strata.evals.questions import Question
from strata.evals.recall import open_recall, recall
from strata.evals.scoring import Completion, score_completions
from strata.models import load

Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def opened(tiny_model: Path) -> Opened:
    return load(tiny_model)


@pytest.fixture(params=["dense", "memory"])
def dense_or_memory(request: pytest.FixtureRequest) -> Opened:
    name = "tiny_model" if request.param == "dense" else "tiny_memory_model"
    return load(request.getfixturevalue(name))


def ask(prompt: str, *answers: str, name: str = "q") -> Question:
    return Question(id=name, prompt=prompt, answers=answers, completions=answers)


def greedy(
    model: PreTrainedModel, prompt: tuple[int, ...], count: int, end: int | list[int] | None
) -> list[int]:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=1,
    )
    return written[0, len(prompt) :].tolist()


def test_greedy_flag_is_what_generate_does(dense_or_memory: Opened) -> None:
    """Teacher forcing calls a token string greedy exactly where generate writes it and stops."""
    model, _ = dense_or_memory
    draw = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(25):
        prompt = tuple(draw.randrange(320) for _ in range(draw.randrange(1, 20)))
        count = draw.randrange(1, 7)
        *answer, end = greedy(model, prompt, count + 1, end=None)
        if end in answer:
            continue  # generate would have stopped before
        changed = list(answer)
        changed[draw.randrange(count)] = draw.randrange(320)
        completions = [
            Completion(prompt, tuple(tokens)) for tokens in (answer, answer[:-1] or [1], changed)
        ]
        scores = score_completions(model, completions, terminators=[end, 318])
        for completion, score in zip(completions, scores, strict=True):
            written = greedy(model, prompt, len(completion.tokens) + 1, end=[end, 318])
            ended = written[-1] in (end, 318)
            assert score.greedy == (ended and tuple(written[:-1]) == completion.tokens)
            seen[score.greedy] += 1
    assert min(seen.values()) >= 10  # the equivalence is not of two columns of False


def test_nats_match_one_by_one_scoring_in_float64(opened: Opened) -> None:
    model, _ = opened
    draw = random.Random(1)
    completions = [
        Completion(
            tuple(draw.randrange(320) for _ in range(draw.randrange(1, 30))),
            tuple(draw.randrange(320) for _ in range(draw.randrange(1, 12))),
        )
        for _ in range(23)
    ]
    scores = score_completions(model, completions, terminators=[0], batch_size=5)
    for completion, score in zip(completions, scores, strict=True):
        ids = torch.tensor([completion.prompt + completion.tokens])
        logits = model(ids).logits[0].double().log_softmax(-1)
        start = len(completion.prompt) - 1
        picked = [logits[start + i, token].item() for i, token in enumerate(completion.tokens)]
        # fp32 attention over a padded batch adds up in another order
        assert score.nats == pytest.approx(-sum(picked), rel=1e-5)
        assert score.num_tokens == len(completion.tokens)


def test_batch_size_does_not_matter(opened: Opened) -> None:
    model, tokenizer = opened
    questions = [ask("The capital of France is", " Paris", " the city of Rome"), ask("It", " lies")]
    one = recall(model, questions, tokenizer=tokenizer, batch_size=1)
    many = recall(model, questions, tokenizer=tokenizer, batch_size=8)
    for alone, together in zip(one.questions, many.questions, strict=True):
        assert alone.exact == together.exact
        assert alone.answer == together.answer
        assert alone.nats == pytest.approx(together.nats, rel=1e-5)


def test_best_of_several_answers(opened: Opened) -> None:
    model, tokenizer = opened
    single = [
        recall(model, [ask("The river", answer)], tokenizer=tokenizer).questions[0]
        for answer in (" runs", " lies on the sea")
    ]
    (both,) = recall(
        model, [ask("The river", " runs", " lies on the sea")], tokenizer=tokenizer
    ).questions
    assert both.nats == pytest.approx(min(score.nats for score in single), rel=1e-5)
    assert both.answer == min(single, key=lambda score: score.nats).answer


def test_totals_and_training_mode(opened: Opened) -> None:
    model, tokenizer = opened
    model.train()
    result = recall(
        model, [ask("The", " sea", name="a"), ask("A", " river runs")], tokenizer=tokenizer
    )
    assert model.training
    assert result.questions[0].id == "a"
    nats = [question.nats for question in result.questions]
    assert result.nats_per_answer == pytest.approx(sum(nats) / 2)
    num_tokens = sum(question.num_tokens for question in result.questions)
    assert result.nats_per_token == pytest.approx(sum(nats) / num_tokens)
    exact, per_answer, per_token = result.measures("q.jsonl")
    assert (exact.value, exact.num_samples, exact.source) == (result.exact, 2, "q.jsonl")
    assert per_answer.stderr == pytest.approx(abs(nats[0] - nats[1]) / 2)
    assert per_token.stderr is None


def test_open_recall_compares_the_first_line(opened: Opened) -> None:
    model, tokenizer = opened
    prompts = ["The capital of", "Question: which city?\nAnswer:", "It"]
    blind = open_recall(
        model, [ask(prompt, "x") for prompt in prompts], tokenizer=tokenizer, max_new_tokens=6
    )
    for prompt, answer in zip(prompts, blind.answers, strict=True):
        ids = tuple(tokenizer(prompt)["input_ids"])
        alone = tokenizer.decode(greedy(model, ids, 6, end=0), skip_special_tokens=True)
        assert answer.text == alone.strip().partition("\n")[0].strip()
    informed = [
        ask(prompt, answer.text) for prompt, answer in zip(prompts, blind.answers, strict=True)
    ]
    known = open_recall(model, informed, tokenizer=tokenizer, max_new_tokens=6, batch_size=2)
    assert known.exact == known.contains == 1.0
    assert [measure.value for measure in known.measures("q")] == [1.0, 1.0]


def test_wrong_input_is_refused(opened: Opened) -> None:
    model, tokenizer = opened
    question = ask("The", " sea")
    with pytest.raises(ConfigError, match="batch size 0"):
        recall(model, [question], tokenizer=tokenizer, batch_size=0)
    with pytest.raises(ConfigError, match="no questions"):
        recall(model, [], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="no terminator"):
        recall(model, [question], tokenizer=tokenizer, terminators=[])
    with pytest.raises(DataError, match=r"question q: prompt and answer are .* the model reads 64"):
        recall(model, [ask("sea " * 80, " sea")], tokenizer=tokenizer)
    with pytest.raises(DataError, match="fit the model's context of 64"):
        open_recall(model, [question], tokenizer=tokenizer, max_new_tokens=64)
    with pytest.raises(DataError, match="belongs to another model"):
        score_completions(model, [Completion((1,), (999,))], terminators=[0])
    with pytest.raises(DataError, match="prompt has no tokens"):
        score_completions(model, [Completion((), (9,))], terminators=[0])


def test_model_of_nan_is_named_damaged(opened: Opened) -> None:
    model, tokenizer = opened
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        recall(model, [ask("The", " sea")], tokenizer=tokenizer)
    with pytest.raises(ModelError, match="not numbers"):
        open_recall(model, [ask("The", " sea")], tokenizer=tokenizer)
