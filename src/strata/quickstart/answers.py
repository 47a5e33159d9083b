"""A few questions to show side by side, and what each model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from strata.evals.questions import Question
from strata.models import load
from strata.quickstart.report import Example

NUM_EXAMPLES = 8
MAX_NEW_TOKENS = 16


def pick_examples(questions: Sequence[Question]) -> list[Question]:
    """Evenly spaced through the question list: no choosing of questions that flatter a model."""
    step = max(1, len(questions) // NUM_EXAMPLES)
    return list(questions[step // 2 :: step])[:NUM_EXAMPLES]


def written_answers(
    questions: Sequence[Question], out: Path, kinds: Sequence[str]
) -> tuple[Example, ...]:
    """Let each saved model write its greedy answer to each question."""
    written: dict[str, list[str]] = {}
    for kind in kinds:
        model, tokenizer = load(out / kind / "model")
        written[kind] = []
        for asked in questions:
            ids_bt = torch.tensor([tokenizer(asked.prompt)["input_ids"]])
            generate: Any = model.generate
            out_bt = generate(
                ids_bt,
                attention_mask=torch.ones_like(ids_bt),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            text = tokenizer.decode(out_bt[0, ids_bt.shape[1] :], skip_special_tokens=True)
            written[kind].append(str(text).strip())
    return tuple(
        Example(
            question=asked.prompt,
            answer=asked.completions[0].strip(),
            written={kind: written[kind][i] for kind in kinds},
        )
        for i, asked in enumerate(questions)
    )
