"""Serving the page, until Ctrl-C."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from textdiffusion.errors import UserError
from textdiffusion.ui.canvas import head
from textdiffusion.ui.loaded import load_runs
from textdiffusion.ui.page import CSS, SCRIPT, Page


def launch(app: gr.Blocks, server_name: str | None, port: int | None, share: bool) -> str:
    """Serve an app in the background; returns its address.

    Raises:
        UserError: the port is taken, or the name is none of this machine's.
    """
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        # _frontend=False: gradio does not ask its own address first, and give up after three seconds on a busy machine.
        _, local, shared = app.launch(
            server_name=server_name, server_port=port, share=share, prevent_thread_lock=True, quiet=True,
            inbrowser=False, show_error=False, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False,
            enable_monitoring=False, theme=theme, css=CSS, head=head() + SCRIPT,
            _frontend=False,
        )  # fmt: skip
    except OSError as reason:
        place = f"{server_name or '127.0.0.1'}:{port or '7860-7959'}"
        raise UserError(f"the page cannot be served at {place} ({reason}); choose another --port") from None
    return shared or local


def serve(paths: Sequence[Path], device: str, server_name: str | None, port: int | None, share: bool) -> None:
    """Load the runs, serve the page, and wait for Ctrl-C.

    Raises:
        UserError: no run, a damaged one, or a port that is taken.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {port}")
    app = Page(load_runs(paths, device)).build()
    address = launch(app, server_name, port, share)
    print(f"the page is at {address} ; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    app.close(verbose=False)
