"""The four pages together, and what of HTTP is let through to them.

Gradio's server can do much that these pages never need: hand out files by path, take uploads, follow a proxy, record
the screen. ``Gate`` stands before it and lets pass only what the pages ask for. On loopback it also refuses names that
are not this machine's, so that a page somewhere else cannot reach this one by having its own name point here (DNS
rebinding). Every reply forbids the browser to ask anybody else for anything, in a header, so that neither a mistake
here nor a future Gradio's font can call out.

Gradio's ``launch`` is not used: it asks its makers' server for the newest version, tries ports one after the other, and
can open a tunnel. The pages are mounted on an application of our own, which uvicorn serves.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcot.errors import MissingExtraError, OutputError, RecipeError
from medcot.ui.shelf import Shelf

if TYPE_CHECKING:
    from fastapi import FastAPI

    from medcot.ui.voice import Voice

USER = "medcot"
MOST_BODY = 1 << 20  # bytes of a request; a question is the longest thing sent
# "unsafe-eval" and "unsafe-inline" are how Gradio's own components work; they reach nobody but this server.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
_PAGES = ("/", "/login", "/login/", "/logout", "/config", "/config/", "/theme.css", "/favicon.ico", "/manifest.json",
          "/user", "/gradio_api/heartbeat", "/gradio_api/startup-events", "/gradio_api/reset", "/gradio_api/reset/",
          "/gradio_api/cancel", "/gradio_api/app_id", "/gradio_api/login_check")  # fmt: skip
_FOLDERS = ("/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/")

# The report's accent instead of the theme's, on which white text has a contrast of 2.5:1 only.
_ACCENT, _ACCENT_DARK = "#0b7268", "#45bfb0"
ACCENTS = {
    "button_primary_background_fill": _ACCENT,
    "button_primary_background_fill_dark": _ACCENT,
    "button_primary_background_fill_hover": "#095a52",
    "button_primary_background_fill_hover_dark": "#095a52",
    "button_primary_text_color": "white",
    "slider_color": _ACCENT,
    "slider_color_dark": _ACCENT_DARK,
    "color_accent": _ACCENT,
    "checkbox_background_color_selected": _ACCENT,
    "checkbox_background_color_selected_dark": _ACCENT,
    "block_info_text_color": "*neutral_600",
    "input_placeholder_color": "*neutral_500",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Setting:
    """What the pages show, and to whom.

    Attributes:
        voice: the model; ``None`` where there is none to ask.
        shelf: the runs.
        run: the name of the run that is shown first.
        budget: tokens that the thinking slider begins with.
        answer_tokens: tokens that the longest answer begins with.
        host: the address to listen at.
        password: what others must know; needed beyond loopback.
    """

    voice: Voice | None
    shelf: Shelf
    run: str | None = None
    budget: int = 512
    answer_tokens: int = 512
    host: str = "127.0.0.1"
    password: str | None = None


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, password: str | None) -> None:
    """Refuse to show runs and model to a network without a password.

    Raises:
        RecipeError: another address than loopback, and no password.
    """
    if not is_loopback(host) and not password:
        raise RecipeError(
            f"--host {host} without a password",
            "Whoever reaches the pages can ask the model and read the runs, so others than this machine need one",
            "Put a password into a variable and name it with --password-env, or leave --host out",
        )


def build_blocks(setting: Setting) -> Any:
    """Build the pages.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    gr = load_gradio()
    from medcot.report.page import INTENDED_USE
    from medcot.ui import asking, comparing, examining, watching
    from medcot.ui.drawing import draw, panel

    with gr.Blocks(title="medcot", analytics_enabled=False) as blocks:
        panel(draw("masthead", INTENDED_USE), elem_id="masthead")
        with gr.Tabs():
            with gr.Tab("Ask", id="ask") as ask:
                asking.build_page(setting.voice, setting.budget, setting.answer_tokens)
            with gr.Tab("Compare", id="compare") as compare:
                comparing.build_page(
                    setting.voice, setting.shelf, setting.run, compare, setting.budget, setting.answer_tokens
                )
            with gr.Tab("Runs", id="runs") as runs:
                timer = watching.build_page(setting.shelf, setting.run)
            with gr.Tab("Data", id="data") as data:
                examining.build_page(setting.shelf, setting.run, data, on_loopback=is_loopback(setting.host))
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        runs.select(lambda: gr.Timer(active=True), None, timer, **quiet)
        for other in (ask, compare, data):
            other.select(lambda: gr.Timer(active=False), None, timer, **quiet)
    blocks.queue(default_concurrency_limit=4, api_open=False)
    return blocks


def load_gradio() -> Any:
    """Import Gradio.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError(
            f"gradio cannot be imported: {error}",
            "The pages are drawn with Gradio",
            "Run pip install -c constraints.txt '.[ui]'",
        ) from None
    return gradio


def build_app(setting: Setting) -> Asgi:
    """Build the application: the pages behind the gate.

    Raises:
        RecipeError: a host beyond loopback without a password.
        MissingExtraError: Gradio is not installed.
    """
    check_host(setting.host, setting.password)
    blocks = build_blocks(setting)
    import fastapi
    from gradio import mount_gradio_app, themes

    from medcot.ui.drawing import style_sheet

    fonts = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    app: FastAPI = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_gradio_app(
        app,
        blocks,
        path="",
        server_name=setting.host,
        auth=_checker(setting.password) if setting.password else None,
        allowed_paths=[],
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        mcp_server=False,
        footer_links=[],
        theme=themes.Base(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono).set(**ACCENTS),
        head=f"<style>\n{style_sheet()}\n</style>",
    )
    return Gate(app, on_loopback=is_loopback(setting.host))


def _checker(password: str) -> Callable[[str, str], bool]:
    def check(user: str, given: str) -> bool:
        same = hmac.compare_digest(given.encode(), password.encode())
        return same and hmac.compare_digest(user.encode(), USER.encode())

    return check


class Gate:
    """Lets pass what the pages need, and puts the policy on every reply.

    Args:
        app: what is behind it.
        on_loopback: whether only names of this machine are answered to.
    """

    def __init__(self, app: Asgi, *, on_loopback: bool) -> None:
        self._app, self._on_loopback = app, on_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = self._refusal(scope) if scope["type"] == "http" else 403
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif status:
            await _reply(send, status)
        else:
            await self._app(scope, _Bounded(receive), _dressed(send))

    def _refusal(self, scope: Scope) -> int:
        """Return why a request is refused, as a status; 0 where it may pass."""
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if self._on_loopback and not is_loopback(_name_in(headers.get("host", ""))):
            return 421
        path = scope["path"]
        if path not in _PAGES and not path.startswith(_FOLDERS):
            return 404
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405
        length = headers.get("content-length", "0")
        return 0 if length.isdecimal() and int(length) <= MOST_BODY else 413


def _name_in(host: str) -> str:
    """Return the name in a Host header, without its port and without the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class _Bounded:
    """Ends a body that is longer than it said, or said nothing."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._num = receive, 0

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._num += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self._num > MOST_BODY else message


def _dressed(send: Send) -> Send:
    async def with_policy(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [(key, value) for key, value in message.get("headers", []) if key.decode().lower() not in HEADERS]
            message["headers"] = [*kept, *_header_bytes()]
        await send(message)

    return with_policy


def _header_bytes() -> list[tuple[bytes, bytes]]:
    return [(key.encode(), value.encode()) for key, value in HEADERS.items()]


async def _reply(send: Send, status: int) -> None:
    body = {404: b"Not here", 405: b"Not this way", 413: b"Too large", 421: b"Not by this name"}[status]
    plain = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": status, "headers": [plain, *_header_bytes()]})
    await send({"type": "http.response.body", "body": body})


# Serving --------------------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        OutputError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OutputError(
            f"{host}:{port} cannot be listened at: {error.strerror or error}",
            "The pages need a free port of this machine",
            "Name another with --port (0 takes a free one), or stop what has it",
        ) from None
    return found


@contextlib.contextmanager
def opened(setting: Setting, port: int) -> Iterator[tuple[str, Any]]:
    """Yield the pages' address and the server that is to run; the model is let go of afterwards.

    Raises:
        MedcotError: as ``build_app`` and ``listen``.
    """
    app = build_app(setting)
    import uvicorn

    with contextlib.closing(listen(setting.host, port)) as found:
        # Browsers keep a stream open as long as a page is; it would never end by itself.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, server_header=False)
        server = _Server(config, found)
        name = f"[{setting.host}]" if ":" in setting.host else setting.host
        try:
            yield f"http://{name}:{found.getsockname()[1]}", server
        finally:
            if setting.voice is not None:
                setting.voice.close()


class _Server:
    """uvicorn on a socket that is bound already, so that a port in use is an error of ours."""

    def __init__(self, config: Any, found: socket.socket) -> None:
        import uvicorn

        self._server, self._socket = uvicorn.Server(config), found

    @property
    def started(self) -> bool:
        """Whether it answers."""
        return bool(self._server.started)

    def run(self) -> None:
        """Serve until Ctrl-C, SIGTERM, or ``stop``."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Let ``run`` return."""
        self._server.should_exit = True
