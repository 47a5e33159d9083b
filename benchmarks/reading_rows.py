"""What a decoder makes of validation rows: their loss, and whether it gives the answers in them.

Answers are scored under teacher forcing: one is right if each of its tokens is the likeliest after
those before it. So a row of questions is asked in one pass, and read as in training, by chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from strata.train.continual import ContinualReading
from strata.train.feed import Feed
from strata.train.recipe import Recipe

_INPUTS = ("input_ids", "labels", "position_ids")
_BEFORE = "\nAnswer:"


class Rows:
    """The first validation rows of a level, the same for every seed.

    Of a level whose references are memories, rows without any (prose, references as text) are left
    out.

    Args:
        recipe: of a run on that level.
        rows: how many are looked at, whole batches.
    """

    def __init__(self, recipe: Recipe, *, rows: int) -> None:
        batches = -(-rows // recipe.data.batch_size)
        run = recipe.run.model_copy(update={"validate_every": 1, "validate_batches": batches})
        self._recipe = recipe.model_copy(update={"run": run, "seed": 0})
        self._feed = Feed(self._recipe)
        self._answers = AnswerTokens(self._feed.tokenizer)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, *, reads: bool = True) -> dict[str, float]:
        """What the model makes of them.

        Args:
            model: in evaluation mode.
            reads: False gives the same rows without their memories.

        Returns:
            loss: nats a token; answer_loss: nats a token of an answer; answers: share given right;
            asked: how many; read: references that a chunk reads, mean over those that read.
        """
        reading = None
        if reads and self._feed.references is not None and self._recipe.reading is not None:
            reading = ContinualReading(
                model,
                self._feed.tokenizer,
                self._feed.references,
                self._recipe.reading,
                document_mask=self._recipe.data.document_mask,
            )
        sums = dict.fromkeys(("nats", "tokens", "answer_nats", "answer_tokens", "right"), 0.0)
        asked, read = 0, list[float]()
        for given in self._feed.validation:
            own_bc = given.get("own_references")
            wanted_b = None if own_bc is None else (own_bc >= 0).any(1)
            if reading is not None and own_bc is not None:
                per_chunk = (reading.reading.within_reach(own_bc) >= 0).sum(-1).float()
                read += per_chunk[per_chunk > 0].tolist()
            nats_bt, right_bt, spans = self._score(model, given, reading)
            for row in range(len(nats_bt)):
                if wanted_b is not None and not bool(wanted_b[row]):
                    continue
                sums["nats"] += float(nats_bt[row].sum())
                sums["tokens"] += float((given["labels"][row, 1:] >= 0).sum())
                for start, stop in spans[row]:
                    sums["answer_nats"] += float(nats_bt[row, start:stop].sum())
                    sums["answer_tokens"] += stop - start
                    sums["right"] += float(right_bt[row, start:stop].all())
                    asked += 1
        found = {
            "loss": sums["nats"] / max(1.0, sums["tokens"]),
            "answer_loss": sums["answer_nats"] / max(1.0, sums["answer_tokens"]),
            "answers": sums["right"] / max(1, asked),
            "asked": float(asked),
        }
        return found | ({"read": sum(read) / len(read)} if read else {})

    def _score(
        self, model: PreTrainedModel, given: dict[str, Tensor], reading: ContinualReading | None
    ) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
        """Nats (b, t) and whether it is the likeliest (b, t) of each token; spans of answers."""
        batch: dict[str, Any] = dict(given)
        block: AbstractContextManager[Any] = nullcontext() if reading is None else reading(batch)
        with block:  # takes out of the batch what is not for a model
            inputs = {name: batch[name] for name in _INPUTS if name in batch and name != "labels"}
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            logits_btv = model(**inputs, use_cache=False).logits[:, :-1].float().cpu()
        targets_bt = given["labels"][:, 1:]
        nats_bt = F.cross_entropy(
            logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="none", ignore_index=-100
        ).view_as(targets_bt)
        right_bt = logits_btv.argmax(-1) == targets_bt
        spans = [self._answers.spans(ids) for ids in given["input_ids"].tolist()]
        # Places of tokens; what is predicted stands one column earlier, and so do both tensors.
        pad = (1, 0)
        return F.pad(nats_bt, pad), F.pad(right_bt, pad), spans


class AnswerTokens:
    """Finds answers in rows: what follows "Answer:" up to the end of the line."""

    def __init__(self, tokenizer: Any) -> None:
        self._before = tokenizer.encode(_BEFORE, add_special_tokens=False)
        self._ends = set(tokenizer.all_special_ids)
        self._ends |= {n for n in range(len(tokenizer)) if tokenizer.decode([n])[:1] == "\n"}

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Columns [start, stop) of each answer in a row; one that the row cuts off is none."""
        found, before = [], self._before
        for start in range(len(before), len(ids)):
            if list(ids[start - len(before) : start]) == before:
                ends = (n for n in range(start, len(ids)) if ids[n] in self._ends)
                stop = next(ends, None)
                if stop is not None and stop > start:
                    found.append((start, stop))
        return found
