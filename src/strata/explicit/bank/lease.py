"""One writer at a time on an object store, which has no locks: an object that its holder renews.

Who finds the object watches it. If it changes, somebody is writing, and that is said. If it does
not change for STALE_S, its holder is gone, and it is taken over. No two machines' clocks are
compared, and every step is a conditional put, of which the store lets one through.

A holder that was asleep for longer than STALE_S finds out when it renews, which it does before
every commit. What is left open is a commit that itself takes longer after the renewal.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from strata.errors import BankError

RENEW_S = 10.0
STALE_S = 60.0
_LOOK_S = 1.0


class Lease:
    """The lock of one bank.

    Args:
        obstore: the library.
        store: where the bank is.
        name: of the object.
        bank: for people.
    """

    def __init__(self, obstore: Any, store: Any, name: str, bank: str) -> None:
        self._obstore, self._store, self._name, self._bank = obstore, store, name, bank
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex}
        self._tag = ""
        self._number = 0
        self._lost = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="strata-lease", daemon=True)

    def take(self) -> None:
        """Become the writer, or learn who is.

        Raises:
            BankError: somebody else writes.
        """
        since, seen = time.monotonic(), ""
        while not self._put("create"):
            try:
                tag = self._obstore.head(self._store, self._name)["e_tag"]
            except FileNotFoundError:
                continue  # given back just now
            if not seen:
                seen = tag
            if tag != seen:
                raise BankError(f"bank {self._bank} is being written by {self._holder()}: wait")
            if time.monotonic() - since > STALE_S and self._put({"e_tag": seen}):
                break
            time.sleep(min(_LOOK_S, RENEW_S / 4))
        self._thread.start()

    def renew(self) -> None:
        """Say that this writer lives.

        Raises:
            BankError: another one took over, since this one did not say so for too long.
        """
        with self._lock:
            self._lost = self._lost or not self._put({"e_tag": self._tag})
        if self._lost:
            raise BankError(
                f"bank {self._bank} was taken over by {self._holder()} while this process slept: "
                "run again"
            )

    def give_back(self) -> None:
        """Writing is over."""
        self._over.set()
        self._thread.join()
        with self._lock:
            # Renewed once more, so that nobody else's lock is deleted.
            if not self._lost and self._put({"e_tag": self._tag}):
                self._obstore.delete(self._store, self._name)

    def _keep(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                self.renew()
            except BankError:
                return  # the next commit says so
            except (OSError, self._obstore.exceptions.BaseError):
                continue  # tried again, and at the next commit

    def _put(self, mode: Any) -> bool:
        """Write the object under a condition; whether that held."""
        errors = self._obstore.exceptions
        self._number += 1
        content = json.dumps({**self._me, "number": self._number}).encode()
        try:
            put = self._obstore.put(
                self._store, self._name, content, mode=mode, use_multipart=False
            )
        except (errors.AlreadyExistsError, errors.PreconditionError):
            return False
        except FileNotFoundError:
            if mode == "create":
                raise  # no such bucket
            return False  # given back meanwhile
        self._tag = put["e_tag"]
        return True

    def _holder(self) -> str:
        try:
            tree = json.loads(bytes(self._obstore.get(self._store, self._name).bytes()))
            return f"process {tree['process']} on {tree['host']}"
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return "another process"
