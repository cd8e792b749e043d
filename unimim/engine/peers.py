"""Tells every rank when another one has ended, which a collective may notice much later or never.

Each rank keeps a connection to rank 0. The kernel closes it with the process, however it ended and
whatever it was doing; a host that is gone shows by TCP's own probes.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from unimim.engine.distributed import (
    before_leaving,
    exit_at_once,
    from_first_rank,
    gathered,
    has_peers,
)
from unimim.logs import log

CONNECT_SECONDS = 30
GRACE_SECONDS = 3  # for a rank's own sentence of what has happened to it
# How a rank ends, and what the others say of it.
STATES = {
    "left": "",
    "stopped": "was stopped by a signal before its first step",
    "failed": "has ended with an error",
    "ended": "has ended",
}


class PeerWatch:
    """Watches the other ranks from a thread, and calls `on_death(state, sentence)` once when one
    ends without having left."""

    def __init__(self, on_death: Callable[[str, str], None]):
        self.on_death = on_death
        self.links: dict[int, socket.socket] = {}  # by rank
        self.names = dict(enumerate(gathered(f"{socket.gethostname()}, process {os.getpid()}")))
        self.closing = False
        self._send_lock = threading.Lock()
        self.rank = dist.get_rank()
        server = socket.create_server(("", 0), backlog=1024) if self.rank == 0 else None
        secret = secrets.token_hex(16)
        port, secret = from_first_rank((server.getsockname()[1] if server else 0, secret))
        connected = self._accept(server, secret) if server else self._connect(port, secret)
        missing = [r for r, fine in enumerate(gathered(connected)) if not fine]
        if missing and server:
            log.warning(
                "ranks %s cannot connect to rank 0 at port %d: their end will show late", missing,
                port,
            )  # fmt: skip
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self, state: str) -> None:
        """Tell the others how this rank ends: a key of STATES."""
        self.closing = True
        self._tell({"rank": self.rank, "state": state})

    def _accept(self, server: socket.socket, secret: str) -> bool:
        end = time.monotonic() + CONNECT_SECONDS
        with server:
            while len(self.links) < dist.get_world_size() - 1 and time.monotonic() < end:
                server.settimeout(max(end - time.monotonic(), 0.01))
                with suppress(OSError, ValueError, KeyError, TypeError):
                    link, _ = server.accept()
                    link.settimeout(5)
                    hello = json.loads(_line(link))
                    if hello["secret"] == secret:
                        self._keep(int(hello["rank"]), link)
        return True

    def _connect(self, port: int, secret: str) -> bool:
        try:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
            link = socket.create_connection(address, timeout=CONNECT_SECONDS)
            link.sendall(json.dumps({"rank": self.rank, "secret": secret}).encode() + b"\n")
        except OSError:
            return False
        self._keep(0, link)
        return True

    def _keep(self, peer: int, link: socket.socket) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.links[peer] = link

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for peer, link in self.links.items():
            selector.register(link, selectors.EVENT_READ, peer)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    line = _line(key.fileobj)
                except OSError:
                    line = b""
                news = json.loads(line) if line else {"rank": key.data, "state": "ended"}
                if news["rank"] == key.data:
                    selector.unregister(key.fileobj)
                if news["state"] != "left" and not self.closing:
                    self._report(news)
                    return

    def _report(self, news: dict) -> None:
        if self.rank == 0:
            self._tell(news)
        time.sleep(GRACE_SECONDS)
        if not self.closing:
            self.on_death(
                news["state"],
                f"rank {news['rank']} ({self.names[news['rank']]}) {STATES[news['state']]}, so "
                "this one ends too; what it said last tells why. The last checkpoint is whole",
            )

    def _tell(self, news: dict) -> None:
        with self._send_lock:
            for peer, link in self.links.items():
                if peer != news["rank"]:
                    with suppress(OSError):
                        link.sendall(json.dumps(news).encode() + b"\n")

    def _close(self) -> None:
        """Close the connections in a forked child, which would keep them open after this rank's
        end."""
        for link in self.links.values():
            link.close()


def _line(link: socket.socket) -> bytes:
    """Return what a connection sends up to a line's end; empty when it is closed."""
    text = b""
    while not text.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            return b""
        text += byte
    return text


_watch: PeerWatch | None = None


def watch_peers(stop_status: int) -> None:
    """Let this process end with a sentence when another rank has ended, with `stop_status` where a
    signal has stopped that one."""
    global _watch

    def end(state: str, sentence: str) -> None:
        if state == "stopped":
            log.info("%s", sentence)
            exit_at_once(stop_status)
        log.error("error: %s", sentence)
        exit_at_once(1)

    if has_peers() and _watch is None:
        _watch = PeerWatch(end)
        before_leaving.append(leave_peers)


def leave_peers(state: str = "left") -> None:
    """Tell the other ranks how this one ends: a key of STATES."""
    global _watch
    if _watch is not None:
        _watch.leave(state)
        _watch = None


def wait_for_news() -> None:
    """Give a lost connection the time to be explained: this process may end in here."""
    if _watch is not None:
        time.sleep(GRACE_SECONDS + 2)
