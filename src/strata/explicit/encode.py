"""References read by the decoder, and what its memory heads keep of them.

Shapes: n references, h query heads, s memory heads of all layers, g memory heads of one layer,
r query heads that share a KV head, t tokens of the longest reference, m tokens of the marker, k
tokens kept, l tokens of the whole input, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from strata.errors import ConfigError, DataError
from strata.explicit.cut import Tokens
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.select import LayerStates, keep_highest, make_selector
from strata.explicit.settings import ExplicitMemoryConfig

_BEGINNING = "<s>"
# Asked of the model between a reference and its repetition; KVzip asks nearly the same.
_REQUEST = "\n\nRepeat the previous context:\n\n"
_QUESTIONS, _ANSWER = "invented_questions.txt", "\nAnswer:"


def marker_ids(tokenizer: Any, marker: str) -> list[int]:
    """The marker's tokens; a leading "<s>" is the tokenizer's own beginning of sequence."""
    ids: list[int] = []
    if marker.startswith(_BEGINNING):
        marker = marker[len(_BEGINNING) :]
        if getattr(tokenizer, "bos_token_id", None) is not None:
            ids.append(int(tokenizer.bos_token_id))
    return [*ids, *tokenizer.encode(marker, add_special_tokens=False)]


class Encoder:
    """Turns texts into memories of one decoder.

    A text is read alone, behind the marker, by the decoder's layers up to the last one with memory,
    whose attention ends the pass. The same text gives the same memory in any batch. Nothing of the
    model changes, also while its attention is intercepted by others.

    Args:
        host: the decoder.
        tokenizer: the decoder's own.
        config: layers, heads, selector, marker and lengths.
        in_training: the model's weights change between calls. Selectors that ask the model first
            then ask at every call, else once. (Not every optimizer leaves a trace to go by.)

    Attributes:
        shape: of each memory.
        marker_ids: tokens before each reference, the beginning-of-sequence token included.

    Raises:
        HostError: this decoder has no such layers or heads.
        ConfigError: an unknown selector, no memory head, or references longer than the decoder's
            positions.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: Any,
        config: ExplicitMemoryConfig,
        *,
        in_training: bool = False,
    ) -> None:
        self.host = host
        self.config = config
        self.shape = host.memory_shape(config)
        if not self.shape.heads:
            raise ConfigError("heads names no KV head of any memory layer: give at least one")
        self._selector = make_selector(config.selector)
        self._tokens = Tokens(tokenizer)
        bos = getattr(tokenizer, "bos_token_id", None)
        self._beginning_ids: list[int] = [] if bos is None else [int(bos)]
        self.marker_ids = marker_ids(tokenizer, config.marker)
        self._embedding: Any = host.model.get_input_embeddings()
        self._exercises = _exercises(self._tokens) if self._selector.asks else []
        self._in_training = in_training
        self._asked: dict[int, Tensor] | None = None  # queries (g, r, q, d) by layer
        self._request_ids = self._tokens.ids([_REQUEST])[0] if self._selector.repeats else []
        longest = len(self.marker_ids) + config.reference_tokens
        if self._selector.repeats:
            longest += len(self._request_ids) + config.reference_tokens
        for ids, _ in self._exercises:
            longest = max(longest, len(self._beginning_ids) + len(ids))
        text_config = host.model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", longest)
        if longest > positions:
            raise ConfigError(
                f"selector {config.selector} and reference_tokens {config.reference_tokens} make "
                f"inputs of {longest} tokens, above the {positions} positions of "
                f"{type(host.model).__name__}: lower reference_tokens, or take another selector"
            )

    def encode(
        self, texts: Sequence[str], *, batch_size: int = 32, with_grad: bool = False
    ) -> Memories:
        """Memories of texts, in their order.

        Args:
            texts: at least one, each of 1 to `reference_tokens` tokens.
            batch_size: texts read at once; of similar length, whatever their order.
            with_grad: keep the graph from the memories to the decoder's weights, and the decoder in
                its mode of training; else it is read as in evaluation.

        Returns:
            Memories in the decoder's dtype, on its device.

        Raises:
            DataError: no text, an empty or too long one, or ids that the decoder does not have.
        """
        ids = self._ids(texts)
        for number, row in enumerate(ids):
            if len(row) > self.config.reference_tokens:
                raise DataError(
                    f"text {number} has {len(row)} tokens, above reference_tokens "
                    f"{self.config.reference_tokens}: cut it with strata.explicit.cut"
                )
        self._ask()
        with torch.set_grad_enabled(with_grad), _mode(self.host.model, evaluate=not with_grad):
            return _in_batches(
                ids, batch_size, partial(self._encode, with_grad=with_grad), Memories.cat
            )

    def queries(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, batch_size: int = 32
    ) -> Tensor:
        """What the memory heads look for while the model reads each text, as one vector a head.

        The mean, over tokens and over the query heads of a KV head, of the queries before rotary
        positions. With `key_vectors` it is a retriever without a second model: their dot product,
        averaged over heads, is the mean of q . k over heads, tokens of a text and tokens kept of a
        reference, positions aside. A plain choice: a mean over tokens blurs what single tokens ask
        for, and a decoder's keys were not trained for search.

        Args:
            texts: ordinary text, or token ids; of longer ones the last `reference_tokens` tokens
                are read, behind the beginning-of-sequence token.
            batch_size: texts read at once.

        Returns:
            (n, s, d), fp32, on the decoder's device, memory heads as in `shape`.

        Raises:
            DataError: no text, an empty one, or ids that the decoder does not have.
        """
        ids = self._last_ids(texts)
        with torch.no_grad(), _mode(self.host.model, evaluate=True):
            return _in_batches(ids, batch_size, self._mean_queries, torch.cat)

    def keys(
        self, texts: Sequence[str] | Sequence[Sequence[int]], *, batch_size: int = 32
    ) -> Tensor:
        """The mean key of each memory head, were each text a reference: as `key_vectors`.

        Args:
            texts: ordinary text, or token ids; of longer ones the last `reference_tokens` tokens.
            batch_size: texts read at once.

        Returns:
            (n, s, d), fp32, on the decoder's device, memory heads as in `shape`.

        Raises:
            DataError: no text, an empty one, or ids that the decoder does not have.
        """
        ids = self._last_ids(texts)
        self._ask()
        with torch.no_grad(), _mode(self.host.model, evaluate=True):
            read = partial(self._encode, with_grad=False)
            memories: Memories = _in_batches(ids, batch_size, read, Memories.cat)
        return key_vectors(memories)

    def _last_ids(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """As `_ids`, the last `reference_tokens` of each."""
        return [row[-self.config.reference_tokens :] for row in self._ids(texts)]

    def _ids(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        if isinstance(texts, str):
            raise DataError("texts is one string: give a list of texts")
        if not len(texts):
            raise DataError("no texts to encode: give at least one")
        words = [text for text in texts if isinstance(text, str)]
        tokenized = iter(self._tokens.ids(words))
        ids = [next(tokenized) if isinstance(text, str) else list(text) for text in texts]
        num_embeddings = int(self._embedding.num_embeddings)
        for number, row in enumerate(ids):
            if not row:
                raise DataError(f"text {number} is empty: leave it out")
            if not 0 <= min(row) <= max(row) < num_embeddings:
                raise DataError(
                    f"text {number} has token {max(row)}, and the model only {num_embeddings}: the "
                    "tokenizer is not this model's own"
                )
        return ids

    def _encode(self, ids: Sequence[list[int]], *, with_grad: bool) -> Memories:
        if self._selector.repeats:
            tails = [[*self._request_ids, *row] for row in ids]
        else:
            tails = [[] for _ in ids]
        batch = _Batch.of(self.marker_ids, ids, tails, self.host.device)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        received: list[_Received] = []

        def take(states: _Received) -> None:
            # A checkpointed layer is computed again in the backward pass, without our work in it.
            if with_grad:
                received.append(states)
            else:
                parts.append(self._keep(batch, states))

        self._read(batch.ids_nl, take)
        parts += [self._keep(batch, states) for states in received]
        keys, values, places = zip(*parts, strict=True)
        kept_n = batch.lengths_n.clamp(max=self.shape.tokens)
        return Memories(torch.cat(keys, 1), torch.cat(values, 1), torch.cat(places, 1), kept_n)

    def _ask(self) -> None:
        """Find out what the model looks for where it answers questions."""
        if not self._exercises or (self._asked is not None and not self._in_training):
            return
        ids = [ids for ids, _ in self._exercises]
        batch = _Batch.of(self._beginning_ids, ids, [[] for _ in ids], self.host.device)
        at_t = torch.arange(batch.longest)
        answers_nt = torch.stack(
            [(at_t >= begin) & (at_t < len(i)) for i, begin in self._exercises]
        )
        queries: dict[int, Tensor] = {}

        def take(states: _Received) -> None:
            query_ntgrd = self._queries(batch, states).permute(0, 3, 1, 2, 4)
            answering_qgrd = query_ntgrd[answers_nt.to(query_ntgrd.device)]
            queries[states.layer] = answering_qgrd.permute(1, 2, 0, 3)

        with torch.no_grad(), _mode(self.host.model, evaluate=True):
            self._read(batch.ids_nl, take)
        self._asked = queries

    def _mean_queries(self, ids: Sequence[list[int]]) -> Tensor:
        batch = _Batch.of(self._beginning_ids, ids, [[] for _ in ids], self.host.device)
        parts: list[Tensor] = []

        def take(states: _Received) -> None:
            query_ngrtd = self._queries(batch, states)
            valid_nt = batch.valid_nt.to(query_ngrtd.device)
            sum_ngrd = (query_ngrtd * valid_nt[:, None, None, :, None]).sum(3)
            mean_ngd = sum_ngrd.mean(2) / valid_nt.sum(1)[:, None, None]
            parts.append(mean_ngd.to(self.host.device))

        self._read(batch.ids_nl, take)
        return torch.cat(parts, 1)

    def _read(self, ids_nl: Tensor, take: Callable[[_Received], None]) -> None:
        """Run the decoder on `ids` until the last memory layer has queries, keys and values.

        No mask is given: padding stands on the right, where a causal attention does not look.
        """
        layers, last = set(self.shape.layers), self.shape.layers[-1]

        def attend(
            underneath: Callable[..., tuple[Tensor, Tensor | None]],
            module: Any,
            query_nhld: Tensor,
            key_nhld: Tensor,
            value_nhld: Tensor,
            mask: Tensor | None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)
            if layer in layers:
                scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
                if scaling is None:
                    scaling = module.head_dim**-0.5
                take(_Received(layer, query_nhld, key_nhld, value_nhld, float(scaling), softcap))
            if layer == last:
                raise _Enough
            return underneath(module, query_nhld, key_nhld, value_nhld, mask, **kwargs)

        with self.host.intercepted(attend):
            try:
                self.host.model.get_decoder()(input_ids=ids_nl, use_cache=False)
            except _Enough:
                return
        raise AssertionError(f"layer {last} was never reached")

    def _heads(self, layer: int) -> tuple[int, ...]:
        return tuple(head for at, head in self.shape.heads if at == layer)

    def _keep(self, batch: _Batch, states: _Received) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (n, g, k, d) and places (n, g, k) that one layer's memory heads keep."""
        device = states.key_nhld.device
        with torch.autocast(device.type, enabled=False):
            heads = self._heads(states.layer)
            key_ngtd = self._unrotated(batch, states.layer, _pick(states.key_nhld, heads, 1))
            value_ngtd = batch.reference(_pick(states.value_nhld, heads, 1))
            valid_nt = batch.valid_nt.to(device)
            with torch.no_grad():
                scores_ngt = self._selector.scores(
                    LayerStates(
                        layer=states.layer,
                        heads=heads,
                        ids_nt=batch.reference(batch.ids_nl, dim=1).to(device),
                        valid_nt=valid_nt,
                        keys_ngtd=key_ngtd,
                        values_ngtd=value_ngtd,
                        scaling=states.scaling,
                        softcap=states.softcap,
                        make_queries=lambda: self._queries(batch, states),
                        make_repeat_weights=(
                            partial(self._repeat_weights, batch, states)
                            if self._selector.repeats
                            else None
                        ),
                        reader_queries_grqd=(
                            None if self._asked is None else self._asked[states.layer]
                        ),
                    )
                )
            places_ngk = keep_highest(scores_ngt, valid_nt, tokens=self.shape.tokens)
            filled_ngk = valid_nt[:, None].expand_as(scores_ngt).gather(2, places_ngk)
            index_ngkd = places_ngk[..., None].expand(*places_ngk.shape, self.shape.head_dim)
            missing = self.shape.tokens - places_ngk.shape[2]

            def kept(states_ngtd: Tensor) -> Tensor:
                chosen = states_ngtd.gather(2, index_ngkd).to(self.host.dtype)
                chosen = chosen.masked_fill(~filled_ngk[..., None], 0)
                return F.pad(chosen, (0, 0, 0, missing)).to(self.host.device)

            places = F.pad(places_ngk * filled_ngk, (0, missing)).to(torch.int16)
            return kept(key_ngtd), kept(value_ngtd), places.to(self.host.device)

    def _unrotated(self, batch: _Batch, layer: int, states: Tensor) -> Tensor:
        """States (..., l, d) of the reference tokens (..., t, d) before rotary, fp32."""
        positions_t = torch.arange(batch.num_before, batch.num_before + batch.longest)
        return self.host.unrotate(layer, batch.reference(states), positions_t)

    def _by_memory_head(self, layer: int, query_nhld: Tensor) -> Tensor:
        query_ngrld = query_nhld.unflatten(1, (self.host.num_kv_heads, -1))
        return _pick(query_ngrld, self._heads(layer), 1)

    def _queries(self, batch: _Batch, states: _Received) -> Tensor:
        query_ngrld = self._by_memory_head(states.layer, states.query_nhld)
        return self._unrotated(batch, states.layer, query_ngrld)

    def _repeat_weights(self, batch: _Batch, states: _Received) -> Tensor:
        """As in `LayerStates.repeat_weights_ngrqt`."""
        begin = batch.num_before + batch.shortest  # where the first repetition begins
        heads, device = self._heads(states.layer), states.key_nhld.device
        query_ngrqd = self._by_memory_head(states.layer, states.query_nhld)[:, :, :, begin:].float()
        key_ngld = _pick(states.key_nhld, heads, 1).float()
        logits_ngrql = query_ngrqd @ key_ngld[:, :, None].mT * states.scaling
        if states.softcap is not None:
            logits_ngrql = torch.tanh(logits_ngrql / states.softcap) * states.softcap
        at_l = torch.arange(batch.ids_nl.shape[1], device=device)
        at_q = at_l[begin:]
        logits_ngrql = logits_ngrql.masked_fill_(at_l > at_q[:, None], -torch.inf)
        weights_ngrqt = batch.reference(logits_ngrql.softmax(-1), dim=4)
        first_n1 = batch.num_before + batch.lengths_n.to(device)[:, None]
        repeats_nq = (at_q >= first_n1) & (at_q < batch.ends_n.to(device)[:, None])
        return weights_ngrqt * repeats_nq[:, None, None, :, None]


def key_vectors(memories: Memories) -> Tensor:
    """The mean key of each memory head, to be searched with `Encoder.queries`.

    Returns:
        (n, s, d), fp32, before rotary positions.
    """
    # Empty places hold zeros, so that the sum is over what was kept.
    sum_nsd = memories.keys_nstd.float().sum(2)
    return sum_nsd / memories.kept_n[:, None, None]


def _exercises(tokens: Tokens) -> list[tuple[list[int], int]]:
    """Token ids of each invented question with its answer, and where the first query stands that
    looks for the answer."""
    text = resources.files(__package__).joinpath(_QUESTIONS).read_text(encoding="utf-8")
    wholes = text.strip().split("\n\n")
    prompts = [whole[: whole.index(_ANSWER) + len(_ANSWER)] for whole in wholes]
    found = []
    for whole, prompt in zip(tokens.ids(wholes), tokens.ids(prompts), strict=True):
        same = [a == b for a, b in zip(whole, prompt, strict=False)]
        begin = same.index(False) if False in same else len(same)
        found.append((list(whole), max(0, begin - 1)))
    return found


class _Enough(Exception):
    """The last memory layer has been read."""


@dataclass(frozen=True)
class _Received:
    """What the attention of one layer was called with."""

    layer: int
    query_nhld: Tensor
    key_nhld: Tensor
    value_nhld: Tensor
    scaling: float
    softcap: float | None


@dataclass(frozen=True)
class _Batch:
    """Inputs of one forward pass: what stands before each reference, the reference, its tail.

    Attributes:
        ids_nl: int64, padded on the right with id 0.
        num_before: m, the same for all.
        shortest, longest: tokens of a reference; numbers here, so that no GPU is waited for.
        lengths_n: tokens of each reference.
        ends_n: tokens of each input, its padding left out.
        valid_nt: which tokens are of the reference.
    """

    ids_nl: Tensor
    num_before: int
    shortest: int
    longest: int
    lengths_n: Tensor
    ends_n: Tensor
    valid_nt: Tensor

    @classmethod
    def of(
        cls,
        before: list[int],
        references: Sequence[list[int]],
        tails: Sequence[list[int]],
        device: torch.device,
    ) -> _Batch:
        rows = [[*before, *row, *tail] for row, tail in zip(references, tails, strict=True)]
        ids_nl = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for number, row in enumerate(rows):
            ids_nl[number, : len(row)] = torch.tensor(row)
        lengths_n, ends_n = (torch.tensor([len(x) for x in y]) for y in (references, rows))
        shortest, longest = int(lengths_n.min()), int(lengths_n.max())
        valid_nt = torch.arange(longest) < lengths_n[:, None]
        return cls(
            ids_nl=ids_nl.to(device),
            num_before=len(before),
            shortest=shortest,
            longest=longest,
            lengths_n=lengths_n.to(device),
            ends_n=ends_n.to(device),
            valid_nt=valid_nt.to(device),
        )

    def reference(self, states: Tensor, *, dim: int = -2) -> Tensor:
        """The part of the input where references stand, l -> t; `valid_nt` says how far each."""
        return states.narrow(dim, self.num_before, self.longest)


def _pick(states: Tensor, heads: tuple[int, ...], dim: int) -> Tensor:
    if heads == tuple(range(states.shape[dim])):
        return states
    return states.index_select(dim, torch.tensor(heads, device=states.device))


def _in_batches(
    rows: Sequence[list[int]],
    batch_size: int,
    work: Callable[[Sequence[list[int]]], Any],
    cat: Callable[[list[Any]], Any],
) -> Any:
    """Results of all rows, in order, from batches of rows of similar length."""
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1")
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    done = cat(
        [
            work([rows[number] for number in order[begin : begin + batch_size]])
            for begin in range(0, len(order), batch_size)
        ]
    )
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return done[back]


@contextmanager
def _mode(model: nn.Module, *, evaluate: bool) -> Iterator[None]:
    """Keep dropout out of memories; flags are set one by one, for `train()` may do more."""
    training = [module for module in model.modules() if module.training] if evaluate else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
