"""Learned bits, of models whose probabilities are known."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from strata.data.facts.biographies import PARTS, VALUES, Biographies, save_word_tokenizer
from strata.errors import ConfigError
from strata.evals.learned_bits import ask_people, learned_bits

NAMES = (12, 12, 12)
ENTROPY = {part: math.log2(len(VALUES[part])) for part in PARTS}


class Knowing:
    """A model that gives the right word some probability, and the part's other words the rest.

    Args:
        right: that probability, by the person asked about.
        elsewhere: probability of words that cannot be the answer.
    """

    def __init__(
        self, people: Biographies, tokenizer: Any, right: dict[int, float], elsewhere: float = 0.0
    ) -> None:
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(
                vocab_size=len(tokenizer), max_position_embeddings=64
            )
        )
        self.device, self.training = torch.device("cpu"), False
        self._after: dict[tuple[int, ...], torch.Tensor] = {}
        for person, share in right.items():
            for part, question in people.questions([person]):
                answers = tokenizer.convert_tokens_to_ids(list(VALUES[part]))
                (answer,) = tokenizer(question.completion, add_special_tokens=False)["input_ids"]
                others = (1 - share - elsewhere) / (len(answers) - 1)
                chances = torch.full((len(tokenizer),), elsewhere / (len(tokenizer) - len(answers)))
                chances[answers] = others
                chances[answer] = share
                self._after[tuple(tokenizer(question.prompt)["input_ids"])] = chances.log()

    def eval(self) -> None:
        pass

    def train(self, mode: bool) -> None:
        pass

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, self.config.get_text_config().vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                known = self._after.get(tuple(ids[: place + 1]))
                if known is not None:
                    logits[row, place] = known
        return SimpleNamespace(logits=logits)

    __call__ = forward


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("words") / "tokenizer"
    save_word_tokenizer(folder, name_words=NAMES)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def people() -> Biographies:
    return Biographies(8, seed=1, name_words=NAMES)


def ask(people: Biographies, tokenizer: Any, right: dict[int, float], **given: Any) -> Any:
    elsewhere = given.pop("elsewhere", 0.0)
    model: Any = Knowing(people, tokenizer, right, elsewhere)
    return ask_people(model, people, tokenizer=tokenizer, batch_size=7, **given)


def test_who_knows_all_has_all_bits(people: Biographies, tokenizer: Any) -> None:
    bits = ask(people, tokenizer, dict.fromkeys(range(8), 1.0))
    assert bits.by_part == pytest.approx(ENTROPY, abs=1e-5)
    assert bits.share == pytest.approx(1.0) and bits.per_person == pytest.approx(47.59, abs=0.01)
    assert bits.total == pytest.approx(8 * people.bits_per_person)
    assert (bits.num_people, bits.num_asked) == (8, 8)


def test_half_a_probability_is_a_bit_less(people: Biographies, tokenizer: Any) -> None:
    bits = ask(people, tokenizer, dict.fromkeys(range(8), 0.5))
    assert bits.by_part == pytest.approx({p: n - 1 for p, n in ENTROPY.items()}, abs=1e-5)


def test_uniform_over_the_values_is_nothing(people: Biographies, tokenizer: Any) -> None:
    model: Any = Knowing(people, tokenizer, {})
    for part, values in VALUES.items():
        ids = tokenizer.convert_tokens_to_ids(list(values))
        for person in range(8):
            chances = torch.zeros(len(tokenizer))
            chances[ids] = 1 / len(values)
            prompt = dict(people.questions([person]))[part].prompt
            model._after[tuple(tokenizer(prompt)["input_ids"])] = chances.log()
    bits = ask_people(model, people, tokenizer=tokenizer)
    assert bits.total == pytest.approx(0.0, abs=1e-4)


def test_uniform_over_all_words_is_nothing(people: Biographies, tokenizer: Any) -> None:
    bits = ask(people, tokenizer, {})
    assert bits.total == 0.0 == bits.share


def test_words_that_cannot_be_the_answer_count_against(people: Any, tokenizer: Any) -> None:
    share = {person: 0.5 for person in range(8)}
    sure = ask(people, tokenizer, {person: 0.75 for person in range(8)}, elsewhere=0.25)
    assert sure.by_part["gender"] == pytest.approx(1 + math.log2(0.75), abs=1e-5)
    assert ask(people, tokenizer, share, elsewhere=0.5).by_part["gender"] == pytest.approx(
        0.0, abs=1e-5
    )


def test_luck_with_some_is_paid_for_by_others(people: Biographies, tokenizer: Any) -> None:
    """The clip is behind the mean over people, so a bold guesser has nothing."""
    bits = ask(people, tokenizer, {n: 1.0 - 1e-6 if n < 4 else 1e-6 for n in range(8)})
    assert bits.by_part["gender"] == 0.0
    halves = ask(people, tokenizer, {n: 1.0 if n < 4 else 0.25 for n in range(8)})
    assert halves.by_part["employer"] == pytest.approx(ENTROPY["employer"] - 1, abs=1e-5)


def test_some_people_stand_for_all(people: Biographies, tokenizer: Any) -> None:
    known = {n: 1.0 for n in (0, 2, 5)}  # every third of eight
    bits = ask(people, tokenizer, known, max_asked=3)
    assert bits.num_asked == 3 and bits.total == pytest.approx(8 * people.bits_per_person)


def test_nobody_asked_is_refused(people: Biographies, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="0 people asked is not allowed: give 1 or more"):
        ask(people, tokenizer, {}, max_asked=0)
    with pytest.raises(ConfigError, match="no answers about birth month"):
        learned_bits({"birth day": [1.0]}, num_people=1)
