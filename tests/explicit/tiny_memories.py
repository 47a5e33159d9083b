"""Memories of tiny decoders, a source that finds them, and their reading written out in loops.

Nothing here uses `strata.explicit.attach`: it is what attach is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from strata.explicit.host import Host
from strata.explicit.memories import Memories, MemoryShape

MARKER = [1, 3, 4]  # <s> Reference :


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    """With attention that prefers some tokens to others: at random weights all weigh the same."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(6)
            elif name.endswith(("v_proj.weight", "o_proj.weight")):
                parameter.mul_(3)
    return model


def words(size: int = 96) -> PreTrainedTokenizerFast:
    """One word a token: w5, w6, ..."""
    names = ["<pad>", "<s>", "</s>", "Reference", ":", *(f"w{n}" for n in range(5, size))]
    plain = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="w5"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def dense(model: PreTrainedModel, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys before rotary and values of every layer and head for marker + ids: (l, k, t, d)."""
    host = Host(model)
    cache = DynamicCache()  # without a config it forgets nothing in sliding layers
    with torch.no_grad():
        model(input_ids=torch.tensor([[*MARKER, *ids]]), past_key_values=cache)
    positions = torch.arange(len(MARKER) + len(ids))
    keys = [host.unrotate(n, layer.keys[0], positions) for n, layer in enumerate(cache.layers)]
    return torch.stack(keys), torch.stack([layer.values[0].float() for layer in cache.layers])


def write(
    model: PreTrainedModel, ids: Sequence[int], shape: MemoryShape, *, seed: int | None = None
) -> Memories:
    """One memory; each head keeps tokens drawn by seed, or (None) the first ones."""
    keys, values = dense(model, ids)
    keys, values = keys[:, :, len(MARKER) :], values[:, :, len(MARKER) :]
    kept = min(shape.tokens, len(ids))
    s, t, d = len(shape.heads), shape.tokens, shape.head_dim
    memory = Memories(
        torch.zeros(1, s, t, d),
        torch.zeros(1, s, t, d),
        torch.zeros(1, s, t, dtype=torch.int16),
        torch.tensor([kept]),
    )
    rng = torch.Generator().manual_seed(seed or 0)
    for n, (layer, head) in enumerate(shape.heads):
        places = torch.arange(kept)
        if seed is not None:
            places = torch.randperm(len(ids), generator=rng)[:kept].sort().values
        memory.keys_nstd[0, n, :kept] = keys[layer, head, places]
        memory.values_nstd[0, n, :kept] = values[layer, head, places]
        memory.places_nst[0, n, :kept] = places.to(torch.int16)
    return memory


@dataclass(frozen=True)
class TinyHit:
    """As a bank gives it."""

    id: str
    score: float
    text: str
    source: str = "shelf.txt"
    start: int = 0
    end: int = 9


Choose = Callable[[str], list[TinyHit]]


@dataclass
class Shelf:
    """A source: which memories a text finds is a function of the text."""

    memories: dict[str, Memories]
    choose: Choose
    asked: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def find(self, queries: Sequence[str], top_k: int) -> list[list[TinyHit]]:
        import threading

        self.threads.add(threading.current_thread().name)
        self.asked.extend(queries)
        return [self.choose(query)[:top_k] for query in queries]

    def load(self, ids: Sequence[str]) -> Memories:
        return Memories.cat([self.memories[name] for name in ids])


def by_sum(query: str) -> list[TinyHit]:
    """None to three of five memories, drawn by the numbers in the text."""
    total = sum(int(word[1:]) for word in query.split() if word.startswith("w"))
    first = total // 4
    return [
        TinyHit(str((first + n) % 5), 1.0 - n / 10, f"text {(first + n) % 5}")
        for n in range(total % 4)
    ]


def make_shelf(model: PreTrainedModel, shape: MemoryShape, choose: Choose = by_sum) -> Shelf:
    """Five memories of references of 5 to 13 tokens, some shorter than what heads may keep."""
    rng = torch.Generator().manual_seed(11)
    memories = {
        str(n): write(
            model,
            torch.randint(5, 96, (5 + 2 * n,), generator=rng).tolist(),
            shape,
            seed=n + 1,
        )
        for n in range(5)
    }
    return Shelf(memories, choose)


def reads(
    ids: Sequence[int],
    prompt: int,
    *,
    chunk: int,
    choose: Choose,
    tokenizer: Any,
    ahead: int = 0,
    query: str = "own",
) -> list[list[str]]:
    """For each token of one row without padding, the ids of the memories that it reads."""

    def found(start: int, stop: int) -> list[str]:
        asked = list(ids[max(0, start) : max(0, stop)])
        text = tokenizer.decode(asked, skip_special_tokens=True).strip()
        return [hit.id for hit in choose(text)] if text else []

    out: list[list[str]] = []
    for at in range(len(ids)):
        if at < prompt + chunk:
            from_end = (prompt - 1 - min(at, prompt - 1)) // chunk
            stop = prompt - from_end * chunk
            if query == "previous" and at < prompt:
                stop -= chunk
            out.append(found(stop - chunk, stop))
        else:
            border = prompt + (at - prompt) // chunk * chunk
            out.append(found(border - ahead - chunk, border - ahead))
    return out


@dataclass
class Loops:
    """Attention with memory by its definition, in float64, token by token and head by head."""

    model: PreTrainedModel
    shape: MemoryShape
    memories: dict[str, Memories]
    reference_tokens: int
    positions: str = "parallel"
    temperature: float = 1.0
    scale: float = 1.0

    def logits(self, ids: Sequence[int], read: Sequence[Sequence[str]]) -> Tensor:
        """Of one row: (t, vocabulary)."""
        host = Host(self.model)
        marker_keys, marker_values = (x[:, :, : len(MARKER)] for x in dense(self.model, []))

        def attention(
            underneath: Any,
            module: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Any,
            **kw: Any,
        ) -> tuple[Tensor, None]:
            layer, groups = module.layer_idx, module.num_key_value_groups
            out = torch.zeros(1, query.shape[2], query.shape[1], query.shape[3])
            window = host.window(layer) or 10**9
            for i in range(query.shape[2]):
                names = read[i]
                behind = len(names) if self.positions == "sequential" else 1
                start = -behind * self.reference_tokens - len(MARKER)
                for h in range(query.shape[1]):
                    k = h // groups
                    low = max(0, i - window + 1)
                    keys, values = [key[0, k, low : i + 1]], [value[0, k, low : i + 1]]
                    held = []
                    if names:
                        at = torch.arange(start, start + len(MARKER))
                        near = i - at < window
                        turned = host.rotate(layer, marker_keys[layer, k], at)
                        keys.append(turned[near])
                        values.append(marker_values[layer, k][near])
                        if (layer, k) in self.shape.heads:
                            s = self.shape.heads.index((layer, k))
                            for n, name in enumerate(names):
                                shift = behind - n if self.positions == "sequential" else 1
                                one = self.memories[name]
                                kept = int(one.kept_n[0])
                                where = one.places_nst[0, s, :kept].long()
                                where = where - shift * self.reference_tokens
                                raw = one.keys_nstd[0, s, :kept].float()
                                held.append(
                                    (host.rotate(layer, raw, where), one.values_nstd[0, s, :kept])
                                )
                    score = self._scores(query[0, h, i], torch.cat(keys), kw)
                    value_rows = torch.cat(values).double()
                    if held:
                        mine = self._scores(query[0, h, i], torch.cat([a for a, _ in held]), kw)
                        mine = mine / self.temperature
                        together = mine.exp().sum().log()
                        # two attentions, each with a weight of its own
                        weight = torch.stack([score.exp().sum().log(), self.scale * together])
                        weight = weight.softmax(0)
                        first = score.softmax(0) @ value_rows
                        second = mine.softmax(0) @ torch.cat([b for _, b in held]).double()
                        out[0, i, h] = weight[0] * first + weight[1] * second
                    else:
                        out[0, i, h] = score.softmax(0) @ value_rows
            return out, None

        with torch.no_grad(), host.intercepted(attention):
            return self.model(input_ids=torch.tensor([list(ids)])).logits[0]

    @staticmethod
    def _scores(query: Tensor, keys: Tensor, kw: dict[str, Any]) -> Tensor:
        scores = keys.double() @ query.double() * kw["scaling"]
        cap = kw.get("softcap")
        return scores if cap is None else torch.tanh(scores / cap) * cap
