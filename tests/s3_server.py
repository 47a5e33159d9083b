"""An S3 server in a thread of this process, for banks on object stores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

BUCKET = "banks"


@contextmanager
def serving() -> Iterator[str]:
    """Serve one empty bucket, and point this process's environment at it; gives its URL."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="nobody",
        AWS_SECRET_ACCESS_KEY="nothing",
        AWS_REGION="us-east-1",
    )
    try:
        with urlopen(Request(f"http://{host}:{port}/{BUCKET}", method="PUT")):
            yield f"s3://{BUCKET}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()
