"""Hidden states read ahead: a thread fetches the records of the next batches from disk while the present one trains."""

from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from layercard.fast.prefix_store import Store

BATCHES = 4
"""Batches that may wait at once; each holds its hidden states in memory, on the CPU."""


class ReadAhead:
    """Reads batches of records from a store in the order in which they are announced, at most `BATCHES` ahead.

    >>> import torch
    >>> store = Store(2, torch.float32)
    >>> store.add(b"a", torch.ones(1, 2))
    True
    >>> ahead = ReadAhead(store, torch.device("cpu"))
    >>> ahead.expect([b"a"])
    >>> ahead.take({b"a"})
    {b'a': tensor([[1., 1.]])}
    >>> ahead.close()
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store = store
        self.pins = device.type == "cuda"  # pinned memory is copied to a GPU while that computes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layercard-read-ahead")
        self._waiting: deque[tuple[frozenset[bytes], Future[dict[bytes, torch.Tensor]]]] = deque()

    def expect(self, keys: Collection[bytes]) -> None:
        """Announce the records of a batch that will be asked for; where `BATCHES` wait already, it is read when it is asked for."""
        if len(self._waiting) < BATCHES:
            batch = frozenset(keys)
            self._waiting.append((batch, self._thread.submit(self._read, batch)))

    def take(self, keys: Collection[bytes]) -> dict[bytes, torch.Tensor]:
        """The hidden states of the records that are in the store; an error of the thread is raised here."""
        wanted = frozenset(keys)
        for number, (batch, future) in enumerate(self._waiting):
            if wanted <= batch:
                for _ in range(number + 1):  # what was announced before it will not be asked for any more
                    self._waiting.popleft()
                rows = future.result()
                return {key: rows[key] for key in keys if key in rows}
        return self._stored(keys)

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._waiting.clear()
        self._thread.shutdown(cancel_futures=True)

    def _read(self, keys: frozenset[bytes]) -> dict[bytes, torch.Tensor]:
        """Copies in memory: what the store gives is a map of the file, which is read where it is touched."""
        return {key: rows.pin_memory() if self.pins else rows.clone() for key, rows in self._stored(keys).items()}

    def _stored(self, keys: Collection[bytes]) -> dict[bytes, torch.Tensor]:
        return {key: rows for key in keys if (rows := self.store.get(key)) is not None}
