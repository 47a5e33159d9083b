"""Temperature and scale, for decoders that never saw a memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_attach_pieces import ROWS, check
from tiny_memories import make_shelf, sharp, words
from transformers import PreTrainedModel

from strata.explicit.attach import attach, presets
from strata.explicit.attach.layer_memory import LayerMemory, Weighing, attend
from strata.explicit.host import Host
from strata.explicit.settings import ExplicitMemoryConfig

MakeHost = Callable[..., PreTrainedModel]
SETTINGS = ExplicitMemoryConfig(tokens_per_head=4, reference_tokens=16)

pytestmark = pytest.mark.filterwarnings("ignore:no memory was injected")


@pytest.fixture
def host_model(host_model: PreTrainedModel) -> PreTrainedModel:
    return sharp(host_model)


@pytest.fixture
def make_host(make_host: MakeHost) -> MakeHost:
    return lambda name, **changes: sharp(make_host(name, **changes))


def test_ape_is_two_attentions_merged(host_model: PreTrainedModel) -> None:
    """Against loops of float64 that attend twice and weigh by log-sum-exps."""
    config = presets.APE.config(host_model).model_copy(update={"reference_tokens": 16})
    assert config.selector == "all"
    host = Host(host_model)
    assert config.layers == tuple(n for n in range(4) if not host.is_sliding(n))
    check(host_model, config, presets.APE)
    check(host_model, SETTINGS, presets.Preset(temperature=0.3, scale=1.6))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ape_where_some_heads_hold_nothing(make_host: MakeHost, side: str) -> None:
    config = ExplicitMemoryConfig(heads=(1,), tokens_per_head=4, reference_tokens=16)
    check(make_host("llama"), config, presets.Preset(temperature=0.5, scale=0.4), side)


def test_the_paper_s_preset_weighs_nothing(make_host: MakeHost) -> None:
    """Temperature 1 and scale 1 in the general formula give the plain path's attention."""
    assert (presets.PAPER.temperature, presets.PAPER.scale) == (1.0, 1.0)
    rng = torch.Generator().manual_seed(4)
    draw = [torch.randn(2, 2, p, 8, generator=rng) for p in (7, 7, 5, 5)]
    query = torch.randn(2, 4, 5, 8, generator=rng)
    bias = torch.zeros(2, 2, 7)
    bias[1, 0, 4:] = torch.finfo(torch.float32).min
    memory = LayerMemory(draw[0], draw[1], bias, 3)
    plain = attend(memory, query, draw[2], draw[3], None, Weighing(0.3))
    nearly = Weighing(0.3, temperature=1.0 + 1e-7, scale=1.0)
    general = attend(memory, query, draw[2], draw[3], None, nearly)
    torch.testing.assert_close(general, plain, atol=1e-6, rtol=1e-5)


def test_presets_change_what_is_generated(make_host: MakeHost) -> None:
    model = make_host("llama")
    shelf = make_shelf(model, Host(model).memory_shape(SETTINGS))
    logits = []
    for preset in (presets.PAPER, presets.Preset(temperature=0.2), presets.Preset(scale=0.2)):
        with attach(
            model, shelf, tokenizer=words(), config=SETTINGS, preset=preset, chunk_tokens=8
        ):
            out = model.generate(
                torch.tensor([ROWS[0]]), max_new_tokens=2, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            logits.append(out.logits[-1])
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)
