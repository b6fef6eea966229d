"""Limits on the requests of anonymous visitors: their size, uploads, and how much of them is logged."""

from typing import Any, TextIO

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_REQUEST_BYTES = 16_384  # the page sends about one kilobyte
MAX_LINE_LENGTH = 500  # characters
CLOSED = ("upload", "upload_progress", "process_recording")  # Gradio's routes for files, which the page does not use


class RequestLimits:
    """ASGI middleware that refuses large requests and uploads of files before the app reads them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].rstrip("/").rpartition("/")[2] in CLOSED:
            await PlainTextResponse("This app does not accept uploads.", 404)(scope, receive, send)
            return
        body, is_complete = b"", False
        while not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            is_complete = not message.get("more_body", False)
            if len(body) > MAX_REQUEST_BYTES:
                await PlainTextResponse("The request is too large.", 413)(scope, receive, send)
                return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_again, send)


class ShortLines:
    """A text stream that cuts long lines: Gradio prints errors with all the values of a request."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        lines = text.split("\n")
        self.stream.write("\n".join(f"{x[:MAX_LINE_LENGTH]} ..." if len(x) > MAX_LINE_LENGTH else x for x in lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
