"""`layercard app`: cards explored in a browser."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from layercard.commands.terminal import out


def app(
    cards: Annotated[
        list[Path] | None,
        typer.Option(
            "--cards", metavar="DIR", help="Folder with cards, placements and run records; may be given more than once. Here if not."
        ),
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option("--models", metavar="DIR", help="Folder with model folders and data files to profile; as --cards when not given."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; any other than this machine's own lets others in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, metavar="N", help="Port; the first free one from 7860 on when not given.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open a browser.")] = False,
) -> None:
    """Explore cards in a browser: move budgets and see the placement, pick layers by hand, compare cards, count savings, start a profile.

    Only files in the given folders are read. Ends with Ctrl-C, and a running profile with it.
    """
    from layercard.report.app.guard import is_local
    from layercard.report.app.server import check_installed, serving

    check_installed()
    from layercard.report.app.library import Library

    library = Library(cards or [Path()], models or [])
    if not is_local(host):
        sys.stderr.write(f"warning: {host} can be reached from other machines; whoever does sees these files and can start a profile\n")
    signal.signal(signal.SIGTERM, _interrupt)
    with serving(library, host, port, browser=not no_browser) as address:
        out().print(f"layercard app: {address} (Ctrl-C ends it)", soft_wrap=True)
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            out().print("ended")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
