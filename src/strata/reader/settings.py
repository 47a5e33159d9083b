"""What the reader's texts are made like: one frozen object, in `data.yaml`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from strata.config import FrozenConfig

Share = Annotated[float, Field(ge=0.0, le=1.0)]
_LEAST_ROW_TOKENS = 96


class Level(FrozenConfig):
    """How hard a text is.

    Attributes:
        tokens: of this level's training text, about; 0 leaves the level out.
        row_tokens: the most tokens of a row, special ones included.
        references: least and most references in front of the questions (as text only).
        facts: least and most statements of a reference.
        repeats: share of lines that repeat a statement instead of asking for it.
        filler: share of references that also hold a sentence or two of prose.
        countries: share of rows, prose aside, whose references tell of countries.
        unanswerable: share of lines that ask for what no reference of the row says.
    """

    tokens: Annotated[int, Field(ge=0)]
    row_tokens: Annotated[int, Field(ge=_LEAST_ROW_TOKENS, le=65_536)]
    references: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(le=64)]] = (1, 1)
    facts: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(le=32)]]
    repeats: Share = 0.0
    filler: Share = 0.0
    countries: Share = 0.0
    unanswerable: Share = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Level:
        for name, (least, most) in (("references", self.references), ("facts", self.facts)):
            if least > most:
                raise ValueError(f"{name} is [{least}, {most}]: give the smaller number first")
        return self


class Knowing(FrozenConfig):
    """What the reader shall know with nothing to read.

    Attributes:
        tokens: of the training text, about; 0 leaves it out.
        row_tokens: the most tokens of a row, special ones included.
        facts: how many.
        reading: share of the tokens that are rows to read, so that reading is not forgotten: by
            turns of the last memory level, and of the text levels, one after another.
    """

    tokens: Annotated[int, Field(ge=0)] = 0
    row_tokens: Annotated[int, Field(ge=_LEAST_ROW_TOKENS, le=65_536)] = 512
    facts: Annotated[int, Field(ge=1)] = 2_000
    reading: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5


class ReaderData(FrozenConfig):
    """All texts that the reader is taught and asked with.

    Attributes:
        seed: of everything that is drawn.
        vocab_size: of the tokenizer.
        tokenizer_rows: of each level that the tokenizer is trained on.
        max_name_bytes: facts with longer names are left out.
        val_share: of the train file's subjects, held out for validation.
        val_rows: of each folder.
        reference_tokens: the most of a reference.
        swapped: share of training statements whose object is another one of the same relation, so
            that only reading answers; 0 keeps every statement true.
        alike: share of rows whose facts are of one or two relations, so that the relation does not
            tell which statement is meant.
        plain: share of rows that are prose alone.
        chunk_tokens: tokens that read the same memories.
        reach: how many chunks back questions go; training reads one more.
        as_text: share of the second stage's rows whose references stand in the text.
        text: levels of the first stage, references as text.
        memory: levels of the second stage, references as memories.
        know: facts to know without any reference.
        bank_references: references of the test bank; a quarter of it for validation.
        questions: of the test set; a quarter of it for validation.
        bank_facts: least and most statements of a reference there.
        bank_filler: share of its references that also hold prose.
    """

    seed: int = 0
    vocab_size: Annotated[int, Field(ge=300, le=65_536)] = 4096
    tokenizer_rows: Annotated[int, Field(ge=1)] = 3_000
    max_name_bytes: Annotated[int, Field(ge=4, le=48)] = 40
    val_share: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.03
    val_rows: Annotated[int, Field(ge=1)] = 400
    reference_tokens: Annotated[int, Field(ge=32, le=4096)] = 128
    swapped: Share = 0.5
    alike: Share = 0.5
    plain: Share = 0.1
    chunk_tokens: Annotated[int, Field(ge=8, le=4096)] = 64
    reach: Annotated[int, Field(ge=1, le=64)] = 4
    as_text: Share = 0.15
    text: dict[str, Level]
    memory: dict[str, Level]
    know: Knowing = Field(default_factory=Knowing)
    bank_references: Annotated[int, Field(ge=4)] = 2_400
    questions: Annotated[int, Field(ge=4)] = 1_200
    bank_facts: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(le=32)]] = (2, 5)
    bank_filler: Share = 0.3

    @model_validator(mode="after")
    def _fits(self) -> ReaderData:
        if self.questions > self.bank_references:
            raise ValueError(
                f"questions is {self.questions}, bank_references {self.bank_references}: at most "
                "one question a reference"
            )
        if self.plain + self.as_text > 1.0:
            raise ValueError("plain and as_text are shares of the same rows: at most 1 together")
        for name, level in (*self.text.items(), *self.memory.items()):
            if level.row_tokens < 2 * min(self.reference_tokens, 64):
                raise ValueError(f"{name}: row_tokens {level.row_tokens} holds no reference")
        levels = [level for level in self.memory.values() if level.tokens]
        if self.know.tokens and self.know.reading and not levels:
            raise ValueError("know.reading takes rows of the last memory level: give one, or 0")
        return self
