"""A reverse proxy that gives an S3 server the conditional writes it lacks: If-None-Match and If-Match of a PUT."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

from tests.s3_forwarding import ForwardingHandler, serving


@contextmanager
def conditional_proxy(endpoint: str) -> Iterator[str]:
    """Serve ``endpoint`` with conditional writes, decided one at a time; yield the proxy's own address."""
    one_writer = threading.Lock()
    etags: dict[str, str] = {}  # of what was written through here; objects of a test are written nowhere else

    class Handler(ForwardingHandler):
        target = urllib.parse.urlsplit(endpoint).netloc

        def do_GET(self) -> None:
            body = self.body()
            if self.command not in ("PUT", "DELETE"):
                return self.answer(self.forward(body))
            with one_writer:
                wanted, found = self.headers.get("If-Match"), etags.get(self.path)
                if wanted is not None and found is None:
                    return self.refuse(404, "NoSuchKey", "refused")
                if (wanted is not None and found != wanted) or (self.headers.get("If-None-Match") == "*" and found):
                    return self.refuse(412, "PreconditionFailed", "refused")
                answer = self.forward(body)
                if self.command == "DELETE":
                    etags.pop(self.path, None)
                elif answer.status == 200:
                    etags[self.path] = next(v for name, v in answer.headers.items() if name.lower() == "etag")
                self.answer(answer)

    with serving(Handler) as address:
        yield address
