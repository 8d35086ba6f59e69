"""Serving the page, until Ctrl-C. Its address answers before torch and gradio are loaded (door.py)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiffusion.config import SHIPPED, SHIPPED_INSTEAD, read_config, run_to_use
from textdiffusion.errors import UserError
from textdiffusion.ui.door import Door

if TYPE_CHECKING:
    import gradio as gr

    from textdiffusion.ui.loaded import Loaded


def look() -> dict[str, Any]:
    """What both ways of serving are given: style, script, and nothing of gradio's own around the page."""
    import gradio as gr

    from textdiffusion.display.replay.canvas import head
    from textdiffusion.ui.page import CSS, SCRIPT

    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {
        "theme": theme, "css": CSS, "head": head() + SCRIPT, "footer_links": [], "run_history": False,
        "ssr_mode": False, "mcp_server": False, "enable_monitoring": False, "show_error": False,
    }  # fmt: skip


def mounted(app: gr.Blocks) -> Any:
    """An ASGI app that is the page alone."""
    import gradio as gr
    from fastapi import FastAPI

    return gr.mount_gradio_app(FastAPI(openapi_url=None), app, path="/", **look())


def serve(paths: Sequence[Path], device: str, server_name: str | None, port: int | None, share: bool) -> None:
    """Serve a page of runs, and wait for Ctrl-C.

    Raises:
        UserError: no run, a damaged one, or a port that is taken.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port must be from 1 to 65535, not {port}")
    chosen = list(paths) or [run_to_use()]
    for path in chosen:
        read_config(path)  # a slip of the finger is told before anything is opened
    if not paths and chosen == [SHIPPED]:
        print(f"{SHIPPED_INSTEAD}; train one with `textdiffusion train`", flush=True)
    if share:
        _share(chosen, device, server_name, port)
        return
    door = Door(server_name, port)
    print(f"the page is at {door.address} ; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            door.doing = "loading torch"
            import torch  # noqa: F401

            door.doing = "loading gradio"
            import gradio  # noqa: F401

            door.doing = "loading " + ", ".join(path.resolve().name for path in chosen)
            from textdiffusion.ui.loaded import load_runs
            from textdiffusion.ui.page import Page

            runs = load_runs(chosen, device)
            door.hand_over(mounted(Page(runs).build()))
            threading.Thread(target=warm, args=(runs,), daemon=True).start()
            threading.Event().wait()
        finally:
            door.close()


def warm(runs: Sequence[Loaded]) -> None:
    """Call each network once: the first call sets up what all later ones need, and the first visitor need not wait."""
    for run in runs:
        for _ in run.model.stream(1, calls=1):
            pass


def _share(paths: Sequence[Path], device: str, server_name: str | None, port: int | None) -> None:
    """Serve through gradio's servers, and wait for Ctrl-C."""
    from textdiffusion.ui.loaded import load_runs
    from textdiffusion.ui.page import Page

    app = Page(load_runs(paths, device)).build()
    try:
        # _frontend=False: gradio does not ask its own address first, and give up after three seconds on a busy machine.
        _, local, shared = app.launch(
            server_name=server_name, server_port=port, share=True, prevent_thread_lock=True, quiet=True,
            inbrowser=False, _frontend=False, **look(),
        )  # fmt: skip
    except OSError as reason:
        place = f"{server_name or '127.0.0.1'}:{port or '7860-7959'}"
        raise UserError(f"the page cannot be served at {place} ({reason}); choose another --port") from None
    print(f"the page is at {shared or local} ; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    app.close(verbose=False)
