"""What a model knows alone, behind a text that states it, and with that text's explicit memory.

    alone     the question and nothing else
    text      each stating text in front of the question, as `strata eval memory` puts references
    explicit  the question alone, while the text's memory is read

Under teacher forcing: of each answer token the probability after the question and the answer's
tokens before it. The classes are those of `strata.theory.knowledge`.

Shapes: n facts that a model lacks, s bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from strata.errors import DataError
from strata.evals.facts import Fact
from strata.evals.scoring import (
    Completion,
    context_limit,
    encode_completion,
    encode_prompt,
    score_completions,
)
from strata.explicit.attach import attach
from strata.explicit.codec import make_codec
from strata.explicit.encode import Encoder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig
from strata.theory.knowledge import KINDS, Kind, classify, supplied

WAYS = ("alone", "text", "explicit")
_TRAINING_MEMORIES = 512
_SAMPLES = 2_000
_INTERVAL = (2.5, 97.5)  # percentiles: 95% of the samples lie between them

Probabilities = tuple[float, ...]


@dataclass(frozen=True)
class ProbedFact:
    """One fact.

    Attributes:
        id, prompt, answer: of the fact.
        kind: its class by text.
        kind_explicit: its class where memories of the texts stand for them.
        alone: probability of each answer token.
        text, explicit: the same, by the name of the wording.
    """

    id: str
    prompt: str
    answer: str
    kind: Kind
    kind_explicit: Kind
    alone: Probabilities
    text: Mapping[str, Probabilities]
    explicit: Mapping[str, Probabilities]


@dataclass(frozen=True)
class WayScore:
    """One way, over all facts, each with all its wordings.

    Attributes:
        way: of `WAYS`.
        wording: the only one that counts here, or None for all.
        answer: mean probability of the whole answer.
        least: mean of the least likely answer token's.
        supplied: share of pairs of a fact that the model lacks and a wording in which every answer
            token gets 0.9 or more; None for alone, and where nothing is lacking.
    """

    way: str
    wording: str | None
    answer: float
    least: float
    supplied: float | None


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval, by a bootstrap over facts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recovery:
    """What explicit memory recovers of what text recovers, on facts that the model lacks.

    Attributes:
        supplied: pairs of fact and wording that memory supplies, over those that text does.
        both: of the pairs that text supplies, the share that memory supplies too.
        gain: the mean answer's probability with memory less that alone, over the same with text.
    """

    supplied: Estimate | None
    both: Estimate | None
    gain: Estimate | None


@dataclass(frozen=True)
class KnowledgeSummary:
    """All facts.

    Attributes:
        num_facts: asked.
        num_lacking: that the model lacks.
        num_pairs: of a fact and a wording.
        shares, shares_explicit: of facts by class, by text and by explicit memory.
        ways: for all wordings together, then for each, in which any fact is stated.
        recovery: see there.
    """

    num_facts: int
    num_lacking: int
    num_pairs: int
    shares: Mapping[Kind, float]
    shares_explicit: Mapping[Kind, float]
    ways: tuple[WayScore, ...]
    recovery: Recovery


class KnowledgeProbe:
    """Probes facts with one model.

    Args:
        model, tokenizer: whom.
        facts: all that will be probed, so that what is too long is refused before work begins.
        config: what stating texts become; the codec included.
        batch_size: sequences of one forward pass.

    Raises:
        DataError: there is no fact, a text is no reference of this config, or a fact does not fit
            the model's context.
        HostError: the model cannot have memory, or not as asked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        facts: Sequence[Fact],
        *,
        config: ExplicitMemoryConfig,
        batch_size: int = 32,
    ) -> None:
        if not facts:
            raise DataError("no facts: give at least one")
        self._model, self._tokenizer = model, tokenizer
        self._config, self._batch_size = config, batch_size
        self._encoder = Encoder(Host(model), tokenizer, config)
        self.shape = self._encoder.shape
        end = tokenizer.eos_token_id
        self._ends = [0 if end is None else int(end)]  # of no concern to probabilities
        self._check(facts)
        self._codec = make_codec(config.codec, self.shape)
        if not self._codec.trained:
            texts = [text for fact in facts for text in fact.texts.values()]
            self._codec.train(self._encoder.encode(texts[:_TRAINING_MEMORIES]).to("cpu"))

    def probe(self, facts: Sequence[Fact]) -> list[ProbedFact]:
        """Probe some facts; but for rounding, no result depends on the other facts.

        Raises:
            ModelError: the model's logits are not numbers.
        """
        pairs = [(fact, name) for fact in facts for name in fact.texts]
        alone = self._score([self._asked(fact) for fact in facts])
        text = iter(self._score([self._asked(fact, fact.texts[name]) for fact, name in pairs]))
        explicit = iter(self._explicit(pairs))
        probed = []
        for fact, own in zip(facts, alone, strict=True):
            by_text = {name: next(text) for name in fact.texts}
            by_memory = {name: next(explicit) for name in fact.texts}
            probed.append(
                ProbedFact(
                    id=fact.id,
                    prompt=fact.prompt,
                    answer=fact.answer,
                    kind=classify(own, list(by_text.values())),
                    kind_explicit=classify(own, list(by_memory.values())),
                    alone=own,
                    text=by_text,
                    explicit=by_memory,
                )
            )
        return probed

    def _asked(self, fact: Fact, text: str | None = None) -> Completion:
        prompt = fact.prompt if text is None else f"{text}\n\n{fact.prompt}"
        answer = encode_completion(self._tokenizer, fact.answer)
        return Completion(encode_prompt(self._tokenizer, prompt), answer, f"fact {fact.id}")

    def _score(self, completions: Sequence[Completion]) -> list[Probabilities]:
        scores = score_completions(
            self._model, completions, terminators=self._ends, batch_size=self._batch_size
        )
        return [tuple(math.exp(-nats) for nats in score.token_nats) for score in scores]

    def _explicit(self, pairs: Sequence[tuple[Fact, str]]) -> list[Probabilities]:
        """With the memory of each fact's text, stored and read back as a bank would."""
        encoded = self._encoder.encode([fact.texts[name] for fact, name in pairs]).to("cpu")
        memories = self._codec.decode(self._codec.encode(encoded))
        asked = [self._asked(fact) for fact, _ in pairs]
        lengths = [len(one.prompt) + len(one.tokens) for one in asked]
        found: dict[int, Probabilities] = {}
        source = _Chosen(memories)
        with attach(
            self._model,
            source,
            tokenizer=self._tokenizer,
            config=self._config,
            top_k=1,
            chunk_tokens=max(lengths),  # a row is one piece, and reads one memory
        ) as session:
            for chosen in self._batches(asked, lengths):
                source.places = {self._query(asked[place]): place for place in chosen}
                scored = self._score([asked[place] for place in chosen])
                found.update(zip(chosen, scored, strict=True))
            assert session.stats.injected == len(pairs), "a fact was asked without its memory"
        return [found[place] for place in range(len(pairs))]

    def _batches(self, asked: Sequence[Completion], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of rows of one length, of which no two search with the same text.

        A padded batch would put memories in place anew for every column where a row ends.
        """
        waiting = sorted(range(len(asked)), key=lambda place: lengths[place])
        while waiting:
            batch: dict[str, int] = {}
            for place in waiting:
                alike = lengths[place] == lengths[waiting[0]]
                if not alike or len(batch) == self._batch_size:
                    break
                batch.setdefault(self._query(asked[place]), place)
            yield list(batch.values())
            taken = set(batch.values())
            waiting = [place for place in waiting if place not in taken]

    def _query(self, asked: Completion) -> str:
        """What `attach` searches with for a row: all its text."""
        ids = [*asked.prompt, *asked.tokens]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _check(self, facts: Iterable[Fact]) -> None:
        limit, most = context_limit(self._model), self._config.reference_tokens
        for fact in facts:
            for name, text in fact.texts.items():
                size = len(encode_completion(self._tokenizer, text))
                if size > most:
                    raise DataError(
                        f"fact {fact.id}: {name!r} has {size} tokens, a reference {most} at most: "
                        "shorten it, or raise reference_tokens where the model allows"
                    )
                asked = self._asked(fact, text)
                size = len(asked.prompt) + len(asked.tokens)
                if limit is not None and size > limit:
                    raise DataError(
                        f"fact {fact.id}: {name!r}, question and answer are {size} tokens long, "
                        f"the model reads {limit}: shorten or drop it"
                    )


class _Chosen:
    """A source that finds for a row the memory that it is to read.

    Attributes:
        places: of the memories, by the row's text.
    """

    def __init__(self, memories: Memories) -> None:
        self._memories = memories
        self.places: dict[str, int] = {}

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        names = [str(self.places[query]) for query in queries]
        return [[Hit(id=name, score=0.0, text=name, source=name, start=0, end=0)] for name in names]

    def load(self, ids: Sequence[str]) -> Memories:
        return self._memories[[int(name) for name in ids]]


def summarise(facts: Sequence[ProbedFact]) -> KnowledgeSummary:
    """All figures of at least one probed fact."""
    lacking = [fact for fact in facts if fact.kind != "known"]
    wordings = list(dict.fromkeys(name for fact in facts for name in fact.text))
    ways = [_alone(facts), *(_way(way, None, facts) for way in WAYS[1:])]
    if len(wordings) > 1:
        ways += [_way(way, name, facts) for name in wordings for way in WAYS[1:]]
    return KnowledgeSummary(
        num_facts=len(facts),
        num_lacking=len(lacking),
        num_pairs=sum(len(fact.text) for fact in facts),
        shares=_shares([fact.kind for fact in facts]),
        shares_explicit=_shares([fact.kind_explicit for fact in facts]),
        ways=tuple(ways),
        recovery=_recovery(lacking),
    )


def _shares(kinds: Sequence[Kind]) -> dict[Kind, float]:
    return {kind: kinds.count(kind) / len(kinds) for kind in KINDS}


def _alone(facts: Sequence[ProbedFact]) -> WayScore:
    answers, leasts = zip(*((math.prod(f.alone), min(f.alone)) for f in facts), strict=True)
    return WayScore("alone", None, sum(answers) / len(facts), sum(leasts) / len(facts), None)


def _way(way: str, wording: str | None, facts: Sequence[ProbedFact]) -> WayScore:
    pairs = [
        (fact.kind != "known", probabilities)
        for fact in facts
        for name, probabilities in _of(fact, way).items()
        if wording in (None, name)
    ]
    lacked = [supplied(probabilities) for lacking, probabilities in pairs if lacking]
    return WayScore(
        way=way,
        wording=wording,
        answer=sum(math.prod(probabilities) for _, probabilities in pairs) / len(pairs),
        least=sum(min(probabilities) for _, probabilities in pairs) / len(pairs),
        supplied=sum(lacked) / len(lacked) if lacked else None,
    )


def _of(fact: ProbedFact, way: str) -> Mapping[str, Probabilities]:
    return fact.text if way == "text" else fact.explicit


def _recovery(lacking: Sequence[ProbedFact]) -> Recovery:
    if not lacking:
        return Recovery(None, None, None)
    columns_n = np.array([_recovered(fact) for fact in lacking]).T
    text_n, explicit_n, both_n, text_gain_n, explicit_gain_n = columns_n
    return Recovery(
        supplied=_ratio(explicit_n, text_n),
        both=_ratio(both_n, text_n),
        gain=_ratio(explicit_gain_n, text_gain_n),
    )


def _recovered(fact: ProbedFact) -> tuple[float, float, float, float, float]:
    """Wordings that text, memory and both supply, and what either gains over nothing, summed."""
    text = {name: supplied(probabilities) for name, probabilities in fact.text.items()}
    explicit = {name: supplied(probabilities) for name, probabilities in fact.explicit.items()}
    alone = math.prod(fact.alone)
    return (
        sum(text.values()),
        sum(explicit.values()),
        sum(text[name] and explicit[name] for name in text),
        sum(math.prod(probabilities) - alone for probabilities in fact.text.values()),
        sum(math.prod(probabilities) - alone for probabilities in fact.explicit.values()),
    )


def _ratio(above_n: NDArray[np.float64], below_n: NDArray[np.float64]) -> Estimate | None:
    """A ratio of sums over facts; None where text gives nothing to recover."""
    if below_n.sum() <= 0:
        return None
    drawn_sn = np.random.default_rng(0).integers(len(below_n), size=(_SAMPLES, len(below_n)))
    above_s, below_s = above_n[drawn_sn].sum(1), below_n[drawn_sn].sum(1)
    there_s = below_s > 0
    low, high = np.percentile(above_s[there_s] / below_s[there_s], _INTERVAL)
    return Estimate(float(above_n.sum() / below_n.sum()), float(low), float(high))
