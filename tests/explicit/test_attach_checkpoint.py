"""Dense memory against the same text in the prompt, on a real checkpoint.

STRATA_TEST_CHECKPOINT=folder pytest -m slow tests/explicit/test_attach_checkpoint.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from tiny_memories import TinyHit
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from strata.explicit.attach import attach
from strata.explicit.encode import marker_ids
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import MARKER, ExplicitMemoryConfig

FOLDER = os.environ.get("STRATA_TEST_CHECKPOINT")
TEXT = "The lighthouse of Arvik was built in 1847 by Elin Dahl, who painted it green."
PROMPT = "The lighthouse of Arvik was built in"


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="set STRATA_TEST_CHECKPOINT to a decoder's folder")
def test_a_checkpoint_reads_as_if_the_text_were_there() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    host = Host(model)
    if any(host.is_sliding(n) for n in range(host.num_layers)):
        pytest.skip("the text can only be the same where every layer holds memory")
    marker = marker_ids(tokenizer, MARKER)
    reference = tokenizer.encode(" " + TEXT, add_special_tokens=False)
    prompt = tokenizer.encode(" " + PROMPT, add_special_tokens=False)
    config = ExplicitMemoryConfig(
        layers=tuple(range(host.num_layers)), selector="all", reference_tokens=len(reference)
    )
    shape = host.memory_shape(config)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([marker + reference]), past_key_values=cache)
    at = torch.arange(len(marker) + len(reference))
    keys = [host.unrotate(n, layer.keys[0], at) for n, layer in enumerate(cache.layers)]
    own = slice(len(marker), None)
    memory = Memories(
        torch.stack([keys[layer][head, own] for layer, head in shape.heads])[None],
        torch.stack([cache.layers[layer].values[0, head, own] for layer, head in shape.heads])[
            None
        ],
        torch.arange(len(reference), dtype=torch.int16).expand(1, len(shape.heads), -1),
        torch.tensor([len(reference)]),
    )

    class OneReference:
        def find(self, queries: Sequence[str], top_k: int) -> list[list[TinyHit]]:
            return [[TinyHit("r", 1.0, TEXT)] for _ in queries]

        def load(self, ids: Sequence[str]) -> Memories:
            return memory

    options = dict(
        max_new_tokens=16, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    want = model.generate(torch.tensor([marker + reference + prompt]), **options)
    with attach(model, OneReference(), tokenizer=tokenizer, config=config):
        got = model.generate(torch.tensor([prompt]), **options)
    made = got.sequences[0, len(prompt) :]
    assert torch.equal(made, want.sequences[0, -len(made) :])
    logits, wanted = torch.stack(got.logits), torch.stack(want.logits)
    # fp32 sums of a trained model's wide activations: relative to its largest logit
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
