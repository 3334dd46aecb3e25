"""`layercard app`: cards explored in a browser."""

import signal
import sys
import threading
from pathlib import Path

from layercard.commands.terminal import out, say
from layercard.settings import setting


def app(
    cards: list[Path] | None = setting(
        None, "Folder with cards, placements and run records; may be given more than once. Here if not.", metavar="DIR"
    ),
    models: list[Path] | None = setting(
        None, "Folder with model folders and data files to profile; as --cards when not given.", metavar="DIR"
    ),
    host: str = setting("127.0.0.1", "Address to listen on; any other than this machine's own lets others in.", metavar="ADDRESS"),
    port: int | None = setting(None, "Port; the first free one from 7860 on when not given.", low=0, high=65535),
    no_browser: bool = setting(False, "Do not open a browser."),
) -> None:
    """Explore cards in a browser.

    See a card, move budgets and see the layers, pick them by hand, compare cards, start a run, count savings. Only files in the given
    folders are read. Ends with Ctrl-C, and what it runs with it.
    """
    from layercard.report.app.library import Library
    from layercard.report.app.server import is_local, serving

    library = Library(cards or [Path()], models or [])
    if not is_local(host):
        say(f"warning: {host} can be reached from other machines; whoever does sees these files and can start a training")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    with serving(library, host, port, browser=not no_browser) as address:
        out().print(f"layercard app: {address} (Ctrl-C ends it)", soft_wrap=True)
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            out().print("ended")
