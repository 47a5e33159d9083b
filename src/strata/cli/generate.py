"""`strata generate`: continue a prompt and print the tokens as they come."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from strata.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class SampleConfig:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: longest continuation, in tokens; None is 64 or what the context leaves.
        temperature: 0 for greedy decoding, otherwise the divisor of the logits.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the random numbers.
        num_samples: continuations to draw.
    """

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    num_samples: int

    def check(self) -> None:
        """Raise ConfigError for the first setting out of its range."""
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens {self.max_new_tokens}: give 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: give a share above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: give 0 or more, below 2**63")
        if self.num_samples < 1:
            raise ConfigError(f"--num-samples {self.num_samples}: give 1 or more")
        if self.num_samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"--num-samples {self.num_samples} would all be the same: set --temperature above 0"
            )


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        text: the new text, without the prompt.
        num_tokens: tokens generated, the end token included.
        ended: the model ended it; otherwise it ran into `max_new_tokens`.
    """

    text: str
    num_tokens: int
    ended: bool


def generate(
    model: Path = typer.Argument(help="Folder written by save_pretrained or strata train."),
    prompt: str = typer.Argument(help="The text to continue; - reads standard input."),
    max_new_tokens: int | None = typer.Option(
        None, help="Longest continuation, in tokens; default: 64, or what the context leaves."
    ),
    temperature: float = typer.Option(0.0, help="0 is greedy; above it, sampling."),
    top_p: float = typer.Option(1.0, help="Sample from the likeliest tokens up to this share."),
    seed: int = typer.Option(0, help="Of the random numbers."),
    num_samples: int = typer.Option(1, help="Continuations to draw."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    values: str | None = typer.Option(
        None, help="Value tables: int8, fp8 or mapped (left on disk); default: as saved."
    ),
    cache_gb: float = typer.Option(1.0, help="Memory for hot rows of mapped tables, GiB."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object instead of a stream."),
) -> None:
    """Continue a prompt; the text goes to standard output, the speed to standard error."""
    config = SampleConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        num_samples=num_samples,
    )
    config.check()
    text = _read_prompt(prompt)

    import torch

    from strata.cli.device import open_model

    opened, tokenizer = open_model(model, device=device, values=values, cache_gb=cache_gb)
    ids_bt = _encode(opened, tokenizer, text)
    room = _room(opened, ids_bt.shape[1], asked=max_new_tokens)
    config = replace(config, max_new_tokens=room)
    torch.manual_seed(seed)
    samples = []
    started = time.perf_counter()
    for number in range(1, num_samples + 1):
        if num_samples > 1 and not as_json:
            print(f"--- {number} of {num_samples}", file=sys.stderr, flush=True)
        samples.append(_continue(opened, tokenizer, ids_bt, config=config, stream=not as_json))
    seconds = time.perf_counter() - started
    speed = sum(sample.num_tokens for sample in samples) / seconds
    if as_json:
        tree = {"model": str(model), "prompt": text, **asdict(config), "tokens_per_s": speed}
        print(json.dumps({**tree, "samples": [asdict(sample) for sample in samples]}))
    total = sum(sample.num_tokens for sample in samples)
    print(f"{total} tokens in {seconds:.2f} s, {speed:.1f} tokens/s", file=sys.stderr)


def _read_prompt(prompt: str) -> str:
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 (byte {error.start})") from None
    if not prompt:
        raise ConfigError("the prompt is empty: give some text to continue")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    return prompt


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The prompt as int64 ids of shape (1, tokens) on the model's device."""
    import torch

    from strata.evals.scoring import check_tokens, encode_prompt

    ids = encode_prompt(tokenizer, text)
    check_tokens(model, ids, name="the prompt")
    return torch.tensor([ids], device=model.device)


def _room(model: PreTrainedModel, prompt_tokens: int, *, asked: int | None) -> int:
    """How many tokens to generate: those asked for, if the context has room for them."""
    from strata.evals.scoring import context_limit

    limit = context_limit(model)
    if limit is None:
        return asked or DEFAULT_NEW_TOKENS
    left = limit - prompt_tokens
    if left < 1:
        raise ConfigError(
            f"prompt of {prompt_tokens} tokens fills the model's context of {limit}: shorten it"
        )
    if asked is not None and asked > left:
        raise ConfigError(
            f"prompt of {prompt_tokens} tokens and {asked} new ones do not fit the model's context "
            f"of {limit}: shorten the prompt or set --max-new-tokens {left}"
        )
    return asked or min(DEFAULT_NEW_TOKENS, left)


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_bt: Tensor,
    *,
    config: SampleConfig,
    stream: bool,
) -> Sample:
    import torch
    from transformers import LogitsProcessorList, TextStreamer

    from strata.evals.scoring import RefuseNaN

    sampling: dict[str, Any] = {"do_sample": False}
    if config.temperature > 0:
        # top_k is named because transformers cuts to 50 tokens where it is not.
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": 0,
        }
    ends = _end_tokens(model, tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        written_bt = model.generate(  # type: ignore[operator]
            ids_bt,
            attention_mask=torch.ones_like(ids_bt),
            max_new_tokens=config.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            streamer=streamer if stream else None,
            logits_processor=LogitsProcessorList([RefuseNaN()]),
            **sampling,
        )
    new_tokens = written_bt[0, ids_bt.shape[1] :].tolist()
    return Sample(
        text=str(tokenizer.decode(new_tokens, skip_special_tokens=True)),
        num_tokens=len(new_tokens),
        ended=new_tokens[-1] in ends,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a text: the model's own list (chat models have several), else the tokenizer's."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    if own is None:
        own = tokenizer.eos_token_id
    if own is None:
        return []
    return [own] if isinstance(own, int) else list(own)
