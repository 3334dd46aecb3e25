"""Questions to the Hugging Face hub that end in time, and whether it can be reached: its clients retry each file for most of a minute."""

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import huggingface_hub.constants
import huggingface_hub.utils

T = TypeVar("T")


def hub_answers() -> bool:
    """Whether the hub answers within ten seconds; false in its client's offline mode."""
    session = huggingface_hub.utils.get_session()
    try:
        within(10.0, lambda: session.head(huggingface_hub.constants.ENDPOINT, timeout=10.0))
    except Exception:  # the client's own network errors, or its offline mode
        return False
    return True


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What a call gives, if it ends in time; clients limit the wait for each byte alone, and a hub may send one now and then for days.

    Raises:
        TimeoutError: It has not ended; it goes on in a thread that does not keep the process.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value
