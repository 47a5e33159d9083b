"""How many bits of drawn facts a model has learned, from the probabilities of its answers.

A fact drawn uniformly from D values holds log2 D bits. A model that gives the right one probability
p needs -log2 p bits more to know it, so it has learned log2 D + log2 p of them. Over N people

    bits = N * sum over parts of max(0, log2 D - mean over people of -log2 p)

Probabilities are those over the whole vocabulary, so what a model gives to words that cannot be
the answer counts against it. The clip stands behind the mean over people: luck with some is paid
for by others, and a model that knows nothing has nothing. It is a lower bound of what is stored.

Source: "Physics of Language Models: Part 3.3" (arXiv 2404.05405), section 3, without the bits of
the names, which are given here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.data.facts.biographies import PARTS, VALUES, Biographies
from strata.errors import ConfigError
from strata.evals.scoring import (
    Completion,
    Progress,
    encode_completion,
    encode_prompt,
    score_completions,
)


@dataclass(frozen=True)
class LearnedBits:
    """What a model knows of people.

    Attributes:
        by_part: bits a person, 0 to the part's entropy, by part.
        entropy: bits that a person holds.
        num_people: of all that were told.
        num_asked: people of these who were asked about.
    """

    by_part: Mapping[str, float]
    entropy: float
    num_people: int
    num_asked: int

    @property
    def per_person(self) -> float:
        """Bits a person."""
        return sum(self.by_part.values())

    @property
    def total(self) -> float:
        """Bits of all people who were told."""
        return self.num_people * self.per_person

    @property
    def share(self) -> float:
        """Of what there is to know, 0..1."""
        return self.per_person / self.entropy


def learned_bits(nats: Mapping[str, Sequence[float]], *, num_people: int) -> LearnedBits:
    """Bits from the negative log-likelihoods of the right answers.

    Args:
        nats: by part, one number for each person asked; all parts of `PARTS`.
        num_people: how many were told; those asked stand for all of them.

    Raises:
        ConfigError: a part is missing or nobody was asked.
    """
    missing = [part for part in PARTS if not nats.get(part)]
    if missing:
        raise ConfigError(f"no answers about {missing[0]}: ask at least one person every part")
    by_part = {}
    for part in PARTS:
        entropy = math.log2(len(VALUES[part]))
        missing_bits = math.fsum(nats[part]) / len(nats[part]) / math.log(2)
        by_part[part] = max(0.0, entropy - missing_bits)
    return LearnedBits(
        by_part=by_part,
        entropy=sum(math.log2(len(VALUES[part])) for part in PARTS),
        num_people=num_people,
        num_asked=len(nats[PARTS[0]]),
    )


def ask_people(
    model: PreTrainedModel,
    people: Biographies,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_asked: int | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> LearnedBits:
    """Ask a model every fact in the wording that was held out.

    Args:
        model: a causal language model.
        people: those it was told of.
        tokenizer: the model's.
        max_asked: ask about so many people, evenly spread; None asks about all.
        batch_size: questions of one forward pass.
        progress: told of the answers done.

    Raises:
        ConfigError: nobody is asked, or a batch size below one.
        DataError: a question does not fit the model's context.
        ModelError: the model's logits are not numbers.
    """
    if max_asked is not None and max_asked < 1:
        raise ConfigError(f"{max_asked} people asked is not allowed: give 1 or more")
    count = people.num_people if max_asked is None else min(max_asked, people.num_people)
    chosen = [number * people.num_people // count for number in range(count)]
    asked = list(people.questions(chosen))
    completions = [
        Completion(
            prompt=encode_prompt(tokenizer, statement.prompt),
            tokens=encode_completion(tokenizer, statement.completion),
            name=part,
        )
        for part, statement in asked
    ]
    # Nobody reads whether an answer ends, so any token may stand for an end.
    scores = score_completions(
        model, completions, terminators=[0], batch_size=batch_size, progress=progress
    )
    nats: dict[str, list[float]] = {part: [] for part in PARTS}
    for (part, _), score in zip(asked, scores, strict=True):
        nats[part].append(score.nats)
    return learned_bits(nats, num_people=people.num_people)
