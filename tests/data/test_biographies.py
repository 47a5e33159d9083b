"""Made-up people: the same for a seed, none twice, uniform facts, and a question never told."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from strata.data.facts.biographies import (
    FACTS,
    NUM_TOLD,
    PARTS,
    VALUES,
    WORDINGS,
    Biographies,
    save_word_tokenizer,
    vocabulary,
)
from strata.errors import DataError


def test_a_person_holds_the_bits_of_the_source() -> None:
    sizes = {part: len(set(values)) for part, values in VALUES.items()}
    assert tuple(VALUES) == tuple(dict.fromkeys(PARTS)) and len(PARTS) == 8
    assert math.prod(sizes.values()) == 12 * 28 * 200 * 200 * 300 * 100 * 263 * 2
    assert Biographies(1).bits_per_person == pytest.approx(47.6, abs=0.01)


def test_people_depend_on_seed_and_number_only() -> None:
    few, many, other = Biographies(50, seed=1), Biographies(3000, seed=1), Biographies(50, seed=2)
    assert few.names == many.names[:50] and (few.values == many.values[:50]).all()
    assert list(few.statements()) == list(Biographies(50, seed=1).statements())
    assert set(few.names) != set(other.names) and (few.values != other.values).any()


def test_a_million_people_have_names_of_their_own() -> None:
    people = Biographies(1_000_000, seed=3)
    assert len(set(people.names)) == 1_000_000 and people.values.shape == (1_000_000, 8)


def test_names_are_drawn_anew_where_two_are_alike() -> None:
    crowded = Biographies(500, name_words=(10, 10, 10))  # half of all, so many are drawn twice
    assert len(set(crowded.names)) == 500
    assert crowded.names[:200] == Biographies(200, name_words=(10, 10, 10)).names


def test_values_are_uniform_and_independent() -> None:
    people = Biographies(40_000, seed=5)
    for number, part in enumerate(PARTS):
        count = len(VALUES[part])
        found = np.bincount(people.values[:, number], minlength=count)
        expected = people.num_people / count
        chi2 = float(((found - expected) ** 2 / expected).sum())
        # Within five deviations of what uniform draws give; the seed is fixed.
        assert abs(chi2 - (count - 1)) < 5 * math.sqrt(2 * (count - 1)), part
    together = np.corrcoef(people.values.T) - np.eye(len(PARTS))
    assert np.abs(together).max() < 5 / math.sqrt(people.num_people)


def test_a_question_is_never_told_and_its_wording_is() -> None:
    people = Biographies(60, seed=1)
    told = list(people.statements())
    assert len(told) == 60 * len(FACTS) * NUM_TOLD
    prompts = {said.prompt for said in told}
    asked = list(people.questions(range(60)))
    assert len(asked) == 60 * len(PARTS)
    for part, question in asked:
        assert question.prompt not in prompts
        assert question.completion.strip() in VALUES[part]
    held_out = {(fact, int(people.held_out[i, n])) for i in range(60)
                for n, fact in enumerate(FACTS)}  # fmt: skip
    assert held_out == {(fact, w) for fact in FACTS for w in range(len(WORDINGS[fact]))}


def test_parts_of_a_date_are_asked_behind_one_another() -> None:
    people = Biographies(5)
    questions = dict(people.questions([3]))
    day, month, year = (questions[part] for part in FACTS["birth date"])
    assert month.prompt == day.prompt + day.completion
    assert year.prompt == month.prompt + month.completion
    whole = people.tell(3, "birth date", int(people.held_out[3, 0]))
    assert whole.prompt + whole.completion == year.prompt + year.completion


def test_biographies_tell_every_fact_once_in_every_wording() -> None:
    people = Biographies(40, seed=2)
    texts = list(people.biographies())
    assert len(texts) == 40 * NUM_TOLD == len(set(texts))
    orders = set()
    for person in range(40):
        mine = texts[person * NUM_TOLD : (person + 1) * NUM_TOLD]
        told = Counter(said.prompt + said.completion for said in list(people.statements())
                       [person * 30 : (person + 1) * 30])  # fmt: skip
        assert sum(text.count(people.names[person]) for text in mine) == len(told) == 30
        assert all(sum(sentence in text for text in mine) == 1 for sentence in told)
        orders |= {tuple(word in text.split(".")[0] for word in ("born", "is a")) for text in mine}
    assert len(orders) > 1


def test_every_word_is_one_token(tmp_path: Path) -> None:
    names = (20, 20, 30)
    size = save_word_tokenizer(tmp_path / "words", name_words=names)
    tokenizer = Tokenizer.from_file(str(tmp_path / "words" / "tokenizer.json"))
    assert size == tokenizer.get_vocab_size() == 4 + len(vocabulary(names))
    people = Biographies(30, name_words=names)
    unknown = tokenizer.token_to_id("<unk>")
    for text in [*people.biographies(), *(s.prompt + s.completion for s in people.statements())]:
        encoding = tokenizer.encode(text)
        assert unknown not in encoding.ids and encoding.tokens[0] == "<bos>"
        assert len(encoding.ids) == 1 + len(re.sub(r"[.?:]", r" \g<0>", text).split())
    assert tokenizer.encode("Nobody").ids[1:] == [unknown]
    with pytest.raises(DataError, match="exists"):
        save_word_tokenizer(tmp_path / "words", name_words=names)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_people": 0}, "0 people .* give 1 to 80000000"),
        ({"num_people": 5, "name_words": (2, 2, 2)}, "give 1 to 4, half of the names"),
        ({"num_people": 1, "name_words": (0, 2, 2)}, "0 x 2 x 2 names"),
        ({"num_people": 1, "name_words": (9,)}, "names of 1 words: give 2 or 3"),
    ],
)
def test_too_many_people_are_refused(given: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Biographies(**given)


def test_more_words_than_syllables_give_are_refused() -> None:
    with pytest.raises(DataError, match="5000 words for first name: give at most"):
        Biographies(1, name_words=(5000, 1, 1)).names  # noqa: B018
