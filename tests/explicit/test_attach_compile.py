"""Decoding through torch.compile while memory is attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_memories import make_shelf, sharp, words
from transformers import CompileConfig, PreTrainedModel, StaticCache

from strata.explicit.attach import AttachError, attach
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
SETTINGS = ExplicitMemoryConfig(tokens_per_head=4, reference_tokens=16)
IDS = torch.randint(5, 96, (2, 13), generator=torch.Generator().manual_seed(6))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_decode_is_one_graph(make_host: MakeHost, name: str) -> None:
    """Through refreshes: the room for memories is fixed, only whether places are empty varies."""
    model = sharp(make_host(name))
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    options: dict[str, Any] = dict(
        do_sample=False, eos_token_id=None, max_new_tokens=26, cache_implementation="static"
    )
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiled._compile_all_devices = True
    with attach(model, shelf, tokenizer=words(), config=SETTINGS, chunk_tokens=4) as memory:
        want = model.generate(IDS, **options)
        memory.used.clear()
        got = model.generate(IDS, compile_config=compiled, **options)
    assert torch.equal(got, want)
    assert len({(r.row, r.injected) for r in memory.used}) > 3
    # all rows have memories, some have, none has
    assert 1 <= len(graphs) <= 3


def test_a_compiled_model_decodes_and_refuses_prompts(make_host: MakeHost) -> None:
    model = sharp(make_host("llama"))
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), attach(compiled, shelf, tokenizer=words(), config=SETTINGS):
        outs = []
        for step in (model, compiled):
            cache = StaticCache(config=model.config, max_cache_len=32)
            logits = [model(input_ids=IDS, past_key_values=cache).logits[:, -1]]
            for at in range(13, 19):
                token = logits[-1].argmax(-1, keepdim=True)
                out = step(
                    input_ids=token, past_key_values=cache, position_ids=torch.tensor([[at]])
                )
                logits.append(out.logits[:, -1])
            outs.append(torch.stack(logits))
        torch.testing.assert_close(outs[0], outs[1], atol=1e-6, rtol=1e-5)
        with pytest.raises(Exception, match="give the prompt to the model itself") as error:
            compiled(input_ids=IDS)
        assert isinstance(error.value, AttachError) or "AttachError" in str(error.value)
    plain = compiled(input_ids=IDS).logits
    torch.testing.assert_close(plain, model(input_ids=IDS).logits)
