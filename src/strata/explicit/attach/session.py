"""`attach`: a decoder reads memories while a `with` block lasts."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from strata.errors import BankError
from strata.explicit.attach import presets
from strata.explicit.attach.fetch import AttachError, Fetcher, Source, Statistics, Window
from strata.explicit.attach.pieces import Query
from strata.explicit.attach.placing import Placer
from strata.explicit.attach.presets import Preset
from strata.explicit.attach.reader import Reader
from strata.explicit.attach.refresh import Refresher, Used
from strata.explicit.bank import Bank
from strata.explicit.encode import marker_ids
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import BankSource

# A way to generate that memory cannot follow: the options that ask for it, and its name.
_REFUSED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "assistant_model": ("assisted generation", lambda v: v is not None),
    "assistant_early_exit": ("assisted generation", lambda v: v is not None),
    "prompt_lookup_num_tokens": ("assisted generation", lambda v: v is not None),
    "use_mtp": ("assisted generation", bool),
    "penalty_alpha": ("contrastive search", lambda v: v is not None and v > 0),
    "dola_layers": ("DoLa decoding", lambda v: v is not None),
    "num_beam_groups": ("group beam search", lambda v: v is not None and v > 1),
    "constraints": ("constrained beam search", lambda v: v is not None),
    "force_words_ids": ("constrained beam search", lambda v: v is not None),
    "guidance_scale": ("classifier-free guidance", lambda v: v is not None and v != 1),
    "token_healing": ("token healing", bool),
    "custom_generate": ("custom generation", lambda v: v is not None),
    "inputs_embeds": ("generating from embeddings", lambda v: v is not None),
}


class Session:
    """What is attached, and what it did.

    Attributes:
        used: one record for each refresh and row: which tokens read which memories. Grows until
            it is cleared.
        stats: counts and times.
        config: the settings that memories are read with.
        preset: how they are read.
    """

    def __init__(
        self,
        host: Host,
        refresher: Refresher,
        reader: Reader,
        used: list[Used],
        stats: Statistics,
        config: ExplicitMemoryConfig,
        preset: Preset,
    ) -> None:
        self.used = used
        self.stats = stats
        self.config = config
        self.preset = preset
        self._host = host
        self._refresher = refresher
        self._reader = reader
        self._generating = False
        self._one_at_a_time = threading.Lock()
        self._warned = False

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model.generate` while attached."""
        given = dict(inspect.signature(original).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        prompt = _Prompt(self._host.model, given)
        if not self._one_at_a_time.acquire(blocking=False):
            raise AttachError(
                "this model is generating in another thread; memory follows one call at a time: "
                "wait for it, or give both prompts as one batch"
            )
        try:
            self._generating = True
            self._refresher.begin(
                prompt.ids_bt,
                prompt.mask_bt,
                prompt.position_ids,
                generating=True,
                expand=prompt.expand,
                eos_ids=prompt.eos_ids,
                past=prompt.past,
            )
            return original(*args, **kwargs)
        finally:
            self._generating = False
            self._refresher.end()
            self._one_at_a_time.release()

    def _prepare(
        self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """`model.prepare_inputs_for_generation` while attached: it sees every row's whole text."""
        if self._generating and not kwargs.get("is_first_iteration"):
            self._refresher.step(input_ids, cached=bool(kwargs.get("use_cache", True)))
        return original(input_ids, *args, **kwargs)

    def _before_forward(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every forward pass of the model, `generate`'s or a direct one."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = ids if ids is not None else kwargs.get("inputs_embeds")
        if torch.compiler.is_compiling():
            if shape is not None and shape.shape[1] > 1:
                raise AttachError(
                    "memory cannot be searched for inside a compiled graph: give the prompt to "
                    "the model itself and single tokens to the compiled one"
                )
            return
        if self._generating:
            plan = self._reader.plan
            if plan is not None and shape is not None and plan.now[1] != plan.stretches[-1][-1]:
                plan.begin(shape.shape[1])
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._reader.plan = None
            current = self._reader.current
            if current is not None and shape is not None and len(current) != len(shape):
                raise AttachError(
                    f"this call has {len(shape)} rows, the prompt before it had {len(current)}; "
                    "memory follows one batch at a time: use generate, or give the prompt again"
                )
            return
        self._refresher.end()
        if ids is None:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "a forward call was given embeddings, which have no text to search with: no "
                    "memory is read (said once)",
                    stacklevel=2,
                )
            return
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise AttachError("memory needs an attention mask of shape (rows, tokens), or none")
        self._refresher.begin(ids, mask, kwargs.get("position_ids"), generating=False)
        assert self._reader.plan is not None
        self._reader.plan.begin(ids.shape[1])

    def _after_forward(self, *_: Any) -> None:
        """After a direct call the prompt is over; tokens that follow read what its end read."""
        if not torch.compiler.is_compiling() and not self._generating:
            self._reader.plan = None


class _Prompt:
    """What `generate` was given, as memory needs it.

    Raises:
        AttachError: a way to generate that memory cannot follow, or no prompt.
    """

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        config = given.get("generation_config")

        def option(name: str) -> Any:
            if name in given:  # also None, which takes back what the model's own config says
                return given[name]
            mine = getattr(config, name, None)
            return getattr(model.generation_config, name, None) if mine is None else mine

        for name, (way, asked) in _REFUSED.items():
            if asked(option(name)):
                raise AttachError(
                    f"{way} ({name}) cannot read memories; use greedy search, sampling or beam "
                    "search"
                )
        if option("cache_implementation") == "paged":
            raise AttachError("continuous batching (cache_implementation='paged') cannot read "
                              "memories; use a dynamic or a static cache")  # fmt: skip
        ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
        if ids is None or ids.shape[1] == 0:
            raise AttachError("the prompt has no token; give generate input_ids")
        self.ids_bt: Tensor = ids
        self.mask_bt: Tensor | None = given.get("attention_mask")
        self.position_ids: Tensor | None = given.get("position_ids")
        cache = given.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if self.past >= ids.shape[1]:
            raise AttachError(
                f"the cache holds {self.past} tokens and the prompt {ids.shape[1]}; give the whole "
                "conversation as input_ids"
            )
        beams = option("num_beams") or 1
        self.expand = max(beams, option("num_return_sequences") or 1)
        eos = option("eos_token_id")
        eos = [] if eos is None else eos
        self.eos_ids = None if beams > 1 else torch.as_tensor(eos, dtype=torch.long).reshape(-1)
        if self.mask_bt is None:
            self.mask_bt = _mask_by_padding(ids, option("pad_token_id"), eos)


def _mask_by_padding(ids_bt: Tensor, pad: int | None, eos: Any) -> Tensor | None:
    """The mask that `generate` makes for itself where it is given none."""
    ends = set(torch.as_tensor(eos).reshape(-1).tolist())
    if pad is None or int(pad) in ends or not bool((ids_bt == pad).any()):
        return None
    return (ids_bt != pad).long()


@contextmanager
def attach(
    model: PreTrainedModel,
    source: Source | Bank,
    *,
    tokenizer: Any,
    config: ExplicitMemoryConfig | None = None,
    preset: Preset = presets.PAPER,
    top_k: int = 5,
    chunk_tokens: int = 64,
    prompt_query: Query = "own",
    prefetch_tokens: int = 0,
    min_score: float | None = None,
) -> Iterator[Session]:
    """Let a decoder read memories while the block lasts; afterwards it is as it was.

    `model.generate` searches with each `chunk_tokens` of the prompt, counted from its end, and
    with every `chunk_tokens` generated tokens for those that follow: greedy search, sampling and
    beam search, with or without a cache, dynamic or static. A direct call `model(input_ids, ...)`
    reads memories for its pieces too; further calls with its cache read on what its last piece
    read. Only single tokens may go through a compiled model. Where nothing is found, attention is
    the decoder's own, bit for bit. Attention weights (`output_attentions`) are given only by calls
    that read nothing. Leaving the block waits for a `generate` in another thread.

    Args:
        model: a transformers decoder with sdpa or eager attention.
        source: finds and loads memories (see `Source`); or this model's bank, searched in its
            default way, to which memories that had to be encoded are added at the end.
        tokenizer: the model's; its `decode` makes queries of tokens.
        config: the settings that the memories were written with; None for those of
            `source.config` if it has one, else `preset.config(model)`.
        preset: how memories are read (see `presets`).
        top_k: memories for a piece, at most.
        chunk_tokens: tokens between two refreshes, at least 1.
        prompt_query: "previous" lets each piece of a prompt read what was found for the piece
            before it, and the first one nothing: for decoders trained with `reading.query` so.
            Generated tokens read what those before them find in any case.
        prefetch_tokens: 0 searches at each border, with all tokens before it, as the paper does;
            k > 0 searches on a thread with the `chunk_tokens` tokens that end k before the border,
            while those k are generated. Outputs are the same at every run either way, but differ
            between values of k, since the queries do: hence 0 unless the search is what costs.
        min_score: leave out hits that score less.

    Yields:
        The session: `used` says what was read where, `stats` counts.

    Raises:
        AttachError: wrong arguments, or the model is attached already.
        HostError: the model cannot have memory, or not as the settings ask.
        RetrievalError: later, from `generate` or a forward call, when the source fails.

    Source: "Memory3" (arXiv 2407.01178), section 3.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    _check(model, top_k=top_k, chunk_tokens=chunk_tokens, prefetch_tokens=prefetch_tokens)
    if prompt_query not in ("own", "previous"):
        raise AttachError(f"prompt_query is own or previous, given {prompt_query!r}")
    with ExitStack() as stack:
        if isinstance(source, Bank):
            source = BankSource.of(source, model, tokenizer)
            stack.callback(_save, source)
        for name in ("find", "load"):
            if not callable(getattr(source, name, None)):
                raise AttachError(
                    f"a source of memories has find and load; {type(source).__name__} has no {name}"
                )
        host = Host(model)
        if any(hasattr(attention, "_strata_attend") for attention in host.attentions):
            raise AttachError("memory is attached to this model already; leave that block first")
        _check_vocabulary(model, tokenizer)
        config = config or getattr(source, "config", None) or preset.config(model)
        shape = host.memory_shape(config)
        marker = marker_ids(tokenizer, config.marker)
        stats, used = Statistics(), list[Used]()

        def decode(window: Window) -> str:
            return str(tokenizer.decode(list(window), skip_special_tokens=True))

        reader = Reader(preset)
        fetcher = Fetcher(source, decode, shape, top_k=top_k, min_score=min_score, statistics=stats)
        stack.callback(fetcher.close)
        placer = Placer(
            host,
            shape,
            marker=marker,
            reference_tokens=config.reference_tokens,
            positions=preset.positions or config.positions,
        )
        refresher = Refresher(
            reader,
            placer,
            fetcher,
            stats,
            chunk_tokens=chunk_tokens,
            prompt_query=prompt_query,
            prefetch_tokens=prefetch_tokens,
            top_k=top_k,
            used=used,
        )
        session = Session(host, refresher, reader, used, stats, config, preset)
        stack.enter_context(host.intercepted(reader))
        for handle in (
            model.register_forward_pre_hook(session._before_forward, with_kwargs=True),
            model.register_forward_hook(session._after_forward, always_call=True),
        ):
            stack.callback(handle.remove)
        stack.enter_context(_replaced(model, "generate", session._generate))
        stack.enter_context(_replaced(model, "prepare_inputs_for_generation", session._prepare))
        try:
            yield session
        finally:
            with session._one_at_a_time:  # a streamer's generate may still run
                refresher.end()


def _save(source: BankSource) -> None:
    """Keep what was encoded; that another process writes is no reason to fail at the end."""
    try:
        source.save()
    except BankError as error:
        warnings.warn(f"memories made now were not stored: {error}", stacklevel=2)


@contextmanager
def _replaced(model: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Let `by(original, ...)` stand for one method of this one model."""
    original = getattr(model, name)
    own = model.__dict__.get(name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return by(original, *args, **kwargs)

    model.__dict__[name] = method
    try:
        yield
    finally:
        if own is None:
            del model.__dict__[name]
        else:
            model.__dict__[name] = own


def _check(model: Any, *, top_k: int, chunk_tokens: int, prefetch_tokens: int) -> None:
    if not isinstance(model, PreTrainedModel):
        raise AttachError(f"a transformers model is needed, given {type(model).__name__}")
    if top_k < 1:
        raise AttachError(f"top_k must be at least 1, given {top_k}")
    if chunk_tokens < 1:
        raise AttachError(f"chunk_tokens must be at least 1, given {chunk_tokens}")
    if not 0 <= prefetch_tokens < chunk_tokens:
        raise AttachError(
            f"prefetch_tokens must be from 0 to chunk_tokens - 1 ({chunk_tokens - 1}), given "
            f"{prefetch_tokens}"
        )


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot be this model's: models have rows to spare, never too few."""
    tokens, rows = len(tokenizer), int(model.get_input_embeddings().num_embeddings)
    if tokens > rows:
        raise AttachError(
            f"the tokenizer has {tokens} tokens and the model {rows}: give the tokenizer that "
            "belongs to this model"
        )
