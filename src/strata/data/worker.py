"""A process that encodes batches, as `workers.py` starts it."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

from strata.data.encode import TextEncoder
from strata.data.memory import held_bytes


def serve(descriptor: int) -> None:
    """Answer batches with encoded ones until the other end closes.

    The first message is the encoder and whether special tokens in a text stay text; it is answered
    with the memory held.

    Args:
        descriptor: of a socket.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end decides when to stop
    with Connection(descriptor) as pipe:
        try:
            encoder: TextEncoder
            encoder, encode_special_tokens = pipe.recv()
            encoder.tokenizer.encode_special_tokens = encode_special_tokens
            pipe.send(held_bytes())
            while True:
                pipe.send(encoder.encode(pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # it was closed, or the process there was killed
