"""How likely a model finds a completion, and whether greedy decoding would give it.

Shapes: b sequences of a batch, t their tokens, p the positions whose logits are kept, a those that
speak of one answer, v vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import ConfigError, DataError, ModelError

Progress = Callable[[int, int], None]
"""Called as progress(done, total) while a long evaluation runs."""


@dataclass(frozen=True)
class Completion:
    """Tokens to be scored after a prompt.

    Attributes:
        prompt: token ids the model is given, at least one.
        tokens: token ids to be scored, at least one.
        name: what to call it in an error.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    name: str = "completion"


@dataclass(frozen=True)
class CompletionScore:
    """What the model makes of one completion.

    Attributes:
        nats: negative log-likelihood of the completion's tokens, the terminator left out.
        num_tokens: tokens of the completion, the terminator left out.
        greedy: greedy decoding from the prompt gives these tokens, then a terminator.
        token_nats: of each token, in order.
    """

    nats: float
    num_tokens: int
    greedy: bool
    token_nats: tuple[float, ...]


def score_completions(
    model: PreTrainedModel,
    completions: Sequence[Completion],
    *,
    terminators: Sequence[int],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[CompletionScore]:
    """Score completions under teacher forcing, several in one padded batch.

    Greedy decoding is recursive, yet whether it gives a known token string is not: by induction
    over the positions, it gives (a_1 ... a_n, end) if and only if every a_i is the arg-max after
    (prompt, a_1 ... a_{i-1}) and a terminator is the arg-max after (prompt, a_1 ... a_n). As long
    as the string holds, decoding has exactly this prefix in front of it; at the first position
    where it does not hold, decoding has left the string and cannot come back. All these positions
    stand in one forward pass over prompt + answer. Another tokenisation of the same text does not
    count, so the share of greedy answers is a lower bound of those right as text.

    Args:
        model: a causal language model; its training mode is kept.
        completions: what to score, in any order.
        terminators: token ids that end an answer, such as eos or a newline; any one will do.
        batch_size: sequences of one forward pass.
        progress: told of the completions done.

    Returns:
        One score a completion, in the given order.

    Raises:
        ConfigError: no terminator, or a batch size below one.
        ModelError: the model's logits are not numbers.
        DataError: a prompt or a completion has no tokens, a token is outside the vocabulary, or
            both together are longer than the model's context.
    """
    check_batch_size(batch_size)
    if not terminators:
        raise ConfigError("no terminator: name at least one token id that ends an answer")
    _check_completions(model, completions)
    ends = torch.tensor(sorted(set(terminators)), device=model.device)
    # Sequences of like length share a batch, so that little of it is padding.
    order = sorted(range(len(completions)), key=lambda i: _length(completions[i]))
    scores: dict[int, CompletionScore] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = _score_batch(model, [completions[i] for i in chosen], ends=ends)
            scores.update(zip(chosen, batch, strict=True))
            if progress is not None:
                progress(len(scores), len(order))
    return [scores[i] for i in range(len(completions))]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a prompt: as the tokenizer encodes a text, less a closing eos if it adds one."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or bare[-1] != tokenizer.eos_token_id:
            ids.pop()
    return tuple(ids)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of an answer or a document, as `strata data prepare` makes them.

    Encoded apart from its prompt; no special token is added, and "<eos>" in it stays text.
    """
    # Not verbose: a document longer than the context is no mistake here, it is cut into windows.
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return tuple(encoded["input_ids"])


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens the model was made to read at once, or None where its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless the batch holds at least one sequence."""
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is not allowed: give 1 or more")


def check_tokens(model: PreTrainedModel, ids: Sequence[int], *, name: str) -> None:
    """Raise DataError unless there is a token, and each has a row in the model's vocabulary."""
    if not ids:
        raise DataError(f"{name} has no tokens: give some text")
    vocab_size = model.config.get_text_config().vocab_size
    if max(ids) >= vocab_size:
        raise DataError(
            f"{name} has token {max(ids)}, outside the model's vocabulary of {vocab_size}: the "
            "tokenizer belongs to another model"
        )


class RefuseNaN(LogitsProcessor):
    """Ends generation where the logits are not numbers, instead of writing what they select."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isnan(scores).any():
            raise ModelError("the model's logits are not numbers: its weights are damaged")
        return scores


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off and no autograd inside; the model's training mode comes back after."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: a tensor that a model caches here must still serve its training.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def logits_at(model: PreTrainedModel, batch: dict[str, Tensor], positions_p: Tensor) -> Tensor:
    """Logits at some positions of every sequence, in fp32.

    Args:
        model: a causal language model.
        batch: arguments of its forward pass.
        positions_p: int64 positions to keep.

    Returns:
        fp32 logits, shape (b, p, v).
    """
    # The head over all positions is the largest tensor of an evaluation; most models can skip it.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_bpv = model(**batch, use_cache=False, logits_to_keep=positions_p).logits
    else:
        logits_bpv = model(**batch, use_cache=False).logits[:, positions_p]
    return logits_bpv.float()


def _score_batch(
    model: PreTrainedModel, completions: Sequence[Completion], *, ends: Tensor
) -> list[CompletionScore]:
    longest = max(_length(completion) for completion in completions)
    ids_bt = torch.zeros(len(completions), longest, dtype=torch.int64)
    mask_bt = torch.zeros(len(completions), longest, dtype=torch.int64)
    # Padding stands on the right, where a causal model does not see it from the answer.
    for row, completion in enumerate(completions):
        ids_bt[row, : _length(completion)] = torch.tensor(completion.prompt + completion.tokens)
        mask_bt[row, : _length(completion)] = 1
    first = min(len(completion.prompt) for completion in completions) - 1
    positions_p = torch.arange(first, longest, device=model.device)
    batch = {"input_ids": ids_bt.to(model.device), "attention_mask": mask_bt.to(model.device)}
    logits_bpv = logits_at(model, batch, positions_p)
    scores = []
    for row, completion in enumerate(completions):
        # The logits at position i speak of token i + 1: from the prompt's last token, which
        # foretells the answer's first, to the answer's last, which foretells the terminator.
        start = len(completion.prompt) - 1 - first
        logits_av = logits_bpv[row, start : start + len(completion.tokens) + 1]
        scores.append(_score_answer(logits_av, completion, ends=ends))
    return scores


def _score_answer(logits_av: Tensor, completion: Completion, *, ends: Tensor) -> CompletionScore:
    tokens_a = torch.tensor(completion.tokens, device=logits_av.device)
    nats_a = torch.nn.functional.cross_entropy(logits_av[:-1], tokens_a, reduction="none")
    nats = nats_a.double().sum().item()
    if math.isnan(nats):
        raise ModelError(f"the model's logits are not numbers at {completion.name}: it is damaged")
    picks_a = logits_av.argmax(dim=-1)
    greedy = bool((picks_a[:-1] == tokens_a).all()) and bool(torch.isin(picks_a[-1], ends))
    return CompletionScore(nats, len(completion.tokens), greedy, tuple(nats_a.tolist()))


def _length(completion: Completion) -> int:
    return len(completion.prompt) + len(completion.tokens)


def _check_completions(model: PreTrainedModel, completions: Sequence[Completion]) -> None:
    limit = context_limit(model)
    for completion in completions:
        check_tokens(model, completion.prompt, name=f"{completion.name}, prompt")
        check_tokens(model, completion.tokens, name=f"{completion.name}, answer")
        if limit is not None and _length(completion) > limit:
            raise DataError(
                f"{completion.name}: prompt and answer are {_length(completion)} tokens long, "
                f"the model reads {limit}: shorten or drop it"
            )
