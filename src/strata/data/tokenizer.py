"""A byte-level BPE tokenizer of one's own, in the form that transformers opens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from strata.data.order import content_fraction
from strata.data.progress import ProgressBar
from strata.data.readers import Document, ReadOptions, read_documents
from strata.data.sources import Source, find_sources
from strata.data.tokenizer_folder import begin_with, refuse_existing, save_tokenizer
from strata.errors import DataError

PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 2**20

_BATCH_BYTES = 2**20


def train_tokenizer(
    sources: Sequence[Path],
    *,
    out: Path,
    vocab_size: int,
    text_field: str = "text",
    txt_documents: Literal["file", "paragraph"] = "file",
    sample_fraction: float = 1.0,
    seed: int = 42,
    add_bos: bool = False,
    progress: bool = False,
) -> int:
    """Train a byte-level BPE tokenizer and save it for `AutoTokenizer.from_pretrained(out)`.

    Any UTF-8 text comes back from its ids exactly. Ids 0, 1 and 2 are `<pad>`, `<bos>` and
    `<eos>`; encoding adds none of them on its own, or `<bos>` with `add_bos`. Equal arguments make
    equal files.

    Args:
        sources: files or folders, as for `prepare`; prompts and completions are both read.
        out: the folder to make; it appears only when it is whole.
        vocab_size: how many tokens, the 256 bytes and 3 special ones included.
        text_field: the field or column that holds a text.
        txt_documents: as for `prepare`.
        sample_fraction: learn from this share of the documents, chosen by a hash of their content;
            the counting of words takes memory with the size of the sample.
        seed: of that choice.
        add_bos: let encoding begin a text with `<bos>`, for models whose documents are prepared
            with `prepend_bos`: prompts then begin as documents do.
        progress: show a progress bar on stderr.

    Returns:
        The size of the vocabulary, which stays below `vocab_size` where the text is too small.

    Raises:
        DataError: a source cannot be read, `out` exists, or an argument is out of its range.
        StorageError: `out` cannot be written.
    """
    out = Path(out)
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"vocab_size is {vocab_size}: give {MIN_VOCAB_SIZE} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens) to {MAX_VOCAB_SIZE}"
        )
    if not 0.0 < sample_fraction <= 1.0:
        raise DataError(f"sample_fraction is {sample_fraction}: give more than 0, at most 1")
    refuse_existing(out)
    files = find_sources([Path(source) for source in sources])
    texts = _Texts(files, ReadOptions(text_field, txt_documents), sample_fraction, seed)
    tokenizer = _train(texts, vocab_size=vocab_size, progress=progress)
    if not texts.num_documents:
        raise DataError(f"no text in {files[0].path}: every record is empty, or there are none")
    if add_bos:
        begin_with(tokenizer, BOS)
    save_tokenizer(tokenizer, out, {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS})
    return tokenizer.get_vocab_size(with_added_tokens=True)


class _Texts:
    """The sampled texts of the sources, counted while they are read."""

    def __init__(
        self, files: list[Source], options: ReadOptions, sample_fraction: float, seed: int
    ) -> None:
        self._files = files
        self._options = options
        self._sample_fraction = sample_fraction
        self._seed = seed
        self.total_bytes = sum(file.entry.num_bytes for file in files)
        self.num_documents = 0

    def batches(self, bar: ProgressBar) -> Iterator[list[str]]:
        batch: list[str] = []
        size = done_bytes = 0
        for file in self._files:
            for document in read_documents(file, options=self._options):
                if not self._is_sampled(document):
                    continue
                self.num_documents += 1
                batch += [text for text in (document.prompt, document.text) if text]
                size += len(document.prompt) + len(document.text)
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
                    bar.update(done_bytes + document.bytes_read)
            done_bytes += file.entry.num_bytes
        bar.update(done_bytes, note="merging")
        yield batch

    def _is_sampled(self, document: Document) -> bool:
        if not document.text and not document.prompt:
            return False
        if self._sample_fraction == 1.0:
            return True
        content = f"{document.prompt}\0{document.text}".encode()
        fraction = content_fraction(content, seed=self._seed, purpose="tokenizer sample")
        return fraction < self._sample_fraction


def _train(texts: _Texts, *, vocab_size: int, progress: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with ProgressBar("training tokenizer", total=texts.total_bytes, enabled=progress) as bar:
        tokenizer.train_from_iterator(texts.batches(bar), trainer)
    return tokenizer
