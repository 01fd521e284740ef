#!/usr/bin/env python3
"""The benchmark of ChatRTC: `python bench_chatrtc.py`, one command, one table.

It starts the server on a core of its own, drives it from client processes on the other cores, and
does the same, in turns within the same run, to what it is compared with:

    obvious   the same stack written the obvious way: stock emit, aiosqlite, a commit per message
    ceiling   one `socket.send` of a ready frame per client and message, and nothing else
    node      Node's socket.io and better-sqlite3, synchronous=FULL, a commit per message
    turn      the same with one commit per turn of the event loop
    empty     an aiohttp handler that parses the JSON of a post and answers (also on uvloop)

They do less than ChatRTC (one token, no roles, no limits), so the ratios flatter them. A message is
outstanding until every client of its room has it. Every message is counted at every client: a
process parses a room's stream once and checks that its numbers follow each other, and what each
client receives must then be those very bytes.

The rooms of this file: settings, machine, servers, listeners, sender, bench, scenarios, history,
report, command line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import select
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

# ---- Settings ----------------------------------------------------------
# What a full run and a quick run do. A visit is one server process, started for it and ended after
# it: it measures everything named in VISIT. The rest comes after, on processes of its own.

HERE = Path(__file__).resolve().parent
VISIT = ("start", "connect", "fanout1000", "latency", "fanout100", "posts")
AFTER = ("history", "growth", "idle")
CONTENT = 100  # bytes of a message
WINDOW = 64  # messages outstanding in a room, and connections that post
PACE = 50  # messages a second in a room where the rate is given


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    runs: int = 3
    clients: int = 1000
    few: int = 100
    seconds: float = 3.0  # of each measurement
    warm: float = 1.0  # before it
    rows: int = 1_000_000
    idle: int = 5000


QUICK = Plan(runs=1, clients=300, few=100, seconds=1.0, warm=0.5, rows=100_000, idle=1000)


Room = tuple[int, int]  # server_id, channel_id


class BenchError(Exception):
    """Something that makes a figure meaningless."""


# ---- Machine -----------------------------------------------------------
# What the kernel says about a process, and what the table says about the machine.


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def fsync_ms(directory: Path) -> float:
    """Median time of writing 4 kB and syncing it: what one commit cannot be faster than."""
    took = []
    with (directory / "fsync").open("wb") as file:
        for _ in range(50):
            before = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - before)
    return statistics.median(took) * 1000


def machine(directory: Path) -> str:
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.+)", text)
    packages = ("aiohttp", "python-socketio", "aiosqlite", "msgspec", "uvloop")
    versions = []
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return (
        f"{os.cpu_count()} cores, {model[1].strip() if model else platform.machine()}, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {', '.join(versions)}; "
        f"{node_versions()}; fdatasync of 4 kB {fsync_ms(directory):.2f} ms"
    )


# ---- Servers -----------------------------------------------------------
# The servers that ChatRTC is compared with. Each answers the requests the bench makes (register, make
# a server, post, read), speaks Socket.IO to the listeners, and prints where it listens.

TABLE = """
CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, channel_id INTEGER NOT NULL,
    author_id INTEGER NOT NULL, content TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS messages_channel ON messages (channel_id, id);
CREATE VIRTUAL TABLE IF NOT EXISTS found
    USING fts5 (content, content = 'messages', content_rowid = 'id');
"""
INSERT = "INSERT INTO messages (channel_id, author_id, content, created_at) VALUES (?, 1, ?, ?)"
PAGE = "SELECT * FROM messages WHERE channel_id = ? AND id < ? ORDER BY id DESC LIMIT 50"
SEARCH = """SELECT messages.* FROM found JOIN messages ON messages.id = found.rowid
    WHERE found MATCH ? ORDER BY found.rowid DESC LIMIT 50"""

NODE = r"""
const http = require("http"), { Server } = require("socket.io");
const [, , path, mode, table, insertSql, pageSql, searchSql] = process.argv, turn = mode === "turn";
const db = new (require("better-sqlite3"))(path);
db.pragma("journal_mode = WAL"); db.pragma("synchronous = FULL"); db.exec(table);
const insert = db.prepare(insertSql), page = db.prepare(pageSql), search = db.prepare(searchSql);
const counts = new Map();  // messages of each channel
let made = 0, waiting = [];
const shape = row => ({ channel_id: row.channel_id, message_id: row.id, content: row.content,
  author_id: row.author_id, author_username: "bench", created_at: row.created_at, seq: row.id });
function answer(res, status, body) {
  const text = JSON.stringify(body), length = Buffer.byteLength(text);
  res.writeHead(status, { "Content-Type": "application/json", "Content-Length": length });
  res.end(text);
}
function commit() {
  db.exec("COMMIT");
  for (const done of waiting.splice(0)) done();
}
function post(res, { channel_id, content }) {
  if (typeof content !== "string" || !content.trim()) return answer(res, 400, {});
  if (turn && !db.inTransaction) { db.exec("BEGIN"); setImmediate(commit); }
  const created_at = new Date().toISOString().slice(0, 19) + "Z";
  const id = Number(insert.run(channel_id, content, created_at).lastInsertRowid);
  const seq = (counts.get(channel_id) || 0) + 1;
  counts.set(channel_id, seq);
  const done = () => {
    const message = { ...shape({ id, channel_id, author_id: 1, content, created_at }), seq };
    io.to(`server:${channel_id}`).emit("message:new", message);
    answer(res, 201, message);
  };
  if (turn) waiting.push(done); else done();
}
function handle(req, res, text) {
  const url = new URL(req.url, "http://x"), q = url.searchParams;
  if (url.pathname === "/healthz") return answer(res, 200, { status: "ok" });
  if (url.pathname === "/auth/register") return answer(res, 201, { user_id: 1, token: "bench" });
  if (req.headers.authorization !== "Bearer bench") return answer(res, 401, {});
  if (url.pathname === "/servers")
    return answer(res, 201, { server_id: ++made, channels: [{ channel_id: made }] });
  if (req.method === "POST") return post(res, JSON.parse(text));
  const before = +(q.get("before") || Number.MAX_SAFE_INTEGER);
  const rows = q.has("q") ? search.all(q.get("q"))
    : page.all(+url.pathname.split("/")[2], before).reverse();
  answer(res, 200, { messages: rows.map(shape), has_more: rows.length === 50 });
}
const server = http.createServer((req, res) => {
  let text = "";
  req.setEncoding("utf8").on("data", part => { text += part; });
  req.on("end", () => handle(req, res, text));
});
const io = new Server(server, { transports: ["websocket"] });
io.use((s, next) => s.handshake.auth.token === "bench" ? next() : next(new Error("UNAUTHORIZED")));
io.on("connection", s => s.on("join_server", ({ server_id }, ack) => {
  s.join(`server:${server_id}`); ack({ success: true, connected_users: [1], seq: 0 });
}));
server.listen(0, "127.0.0.1", 1024, () =>
  console.log(`listening on http://127.0.0.1:${server.address().port}`));
"""


def node_modules() -> Path | None:
    """The folder that holds the Node packages, when `node` and both packages are here."""
    places = [Path.cwd(), HERE]
    folders = [place / "node_modules" for place in places]
    folders += [Path(part) for part in os.environ.get("NODE_PATH", "").split(os.pathsep) if part]
    if not shutil.which("node"):
        return None
    wanted = ("socket.io", "better-sqlite3")
    return next((f for f in folders if all((f / name).is_dir() for name in wanted)), None)


def node_versions() -> str:
    folder = node_modules()
    if not folder:
        return "no Node"
    found = [
        f"{name} {json.loads((folder / name / 'package.json').read_text())['version']}"
        for name in ("socket.io", "better-sqlite3")
    ]
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    return f"Node {node.stdout.strip().lstrip('v')}, {', '.join(found)}"


def shape(number: int, seq: int, channel: int, content: str, at: str) -> dict[str, Any]:
    """A message as it goes over the wire."""
    author = {"author_id": 1, "author_username": "bench", "created_at": at, "seq": seq}
    return {"channel_id": channel, "message_id": number, "content": content, **author}


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


async def obvious(database: str) -> None:
    """The stack of ChatRTC as its documentation suggests to use it."""
    import aiosqlite
    import socketio
    from aiohttp import web

    sio = socketio.AsyncServer(async_mode="aiohttp")
    app, counts = small_app(), Counter[int]()
    sio.attach(app)
    db = await aiosqlite.connect(database, isolation_level=None)
    await db.execute("PRAGMA journal_mode = WAL")
    await db.execute("PRAGMA synchronous = FULL")
    await db.executescript(TABLE)

    async def connect(sid: str, environ: dict[str, Any], auth: dict[str, str] | None) -> bool:
        return auth is not None and auth["token"] == "bench"

    async def join_server(sid: str, data: dict[str, int]) -> dict[str, Any]:
        await sio.enter_room(sid, f"server:{data['server_id']}")
        return {"success": True, "connected_users": [1], "seq": 0}

    async def post(request: web.Request) -> web.Response:
        body, at = await request.json(), stamp()
        channel, content = body["channel_id"], body["content"]
        if request.headers.get("Authorization") != "Bearer bench" or not content.strip():
            raise web.HTTPUnauthorized
        cursor = await db.execute(INSERT, (channel, content, at))
        counts[channel] += 1
        message = shape(cursor.lastrowid or 0, counts[channel], channel, content, at)
        await sio.emit("message:new", message, room=f"server:{channel}")
        return web.json_response(message, status=201)

    sio.on("connect", connect)
    sio.on("join_server", join_server)
    app.add_routes([web.post("/messages", post)])
    await listen(app)


async def empty(database: str) -> None:
    """A handler that parses the JSON of a post and answers."""
    from aiohttp import web

    app = small_app()

    async def post(request: web.Request) -> web.Response:
        body = await request.json()
        message = shape(1, 1, body["channel_id"], body["content"], "2025-01-01T00:00:00Z")
        return web.json_response(message, status=201)

    app.add_routes([web.post("/messages", post)])
    await listen(app)


def small_app() -> Any:
    """What a server needs besides posting."""
    from aiohttp import web

    made = itertools.count(1)

    async def healthz(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def register(request: web.Request) -> web.Response:
        return web.json_response({"user_id": 1, "token": "bench"}, status=201)

    async def servers(request: web.Request) -> web.Response:
        number = next(made)
        body = {"server_id": number, "channels": [{"channel_id": number}]}
        return web.json_response(body, status=201)

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.post("/auth/register", register)])
    app.add_routes([web.post("/servers", servers)])
    return app


async def listen(app: Any) -> None:
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def frame(payload: bytes) -> bytes:
    """A text frame as a server sends it."""
    size = len(payload)
    head = bytes((0x81, size)) if size < 126 else b"\x81\x7e" + size.to_bytes(2, "big")
    return head + payload


def ceiling(database: str) -> None:
    """One send per client and message. What it says to a new client is said at once, unread."""
    hello = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frame(b"0{}") + frame(b"40{}")
    hello += frame(b'430[{"success":true}]')
    made = json.dumps({"token": "bench", "server_id": 1, "channels": [{"channel_id": 1}]}).encode()
    done = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b"
    listener, poll = socket.create_server(("127.0.0.1", 0), backlog=1024), select.epoll()
    peers: dict[int, socket.socket] = {}
    clients: dict[int, socket.socket] = {}
    poll.register(listener, select.EPOLLIN)
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    number = 0
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                peer, _address = listener.accept()
                peers[peer.fileno()] = peer
                poll.register(peer, select.EPOLLIN)
                continue
            peer, data = peers[fd], b""
            with suppress(ConnectionError):
                data = peer.recv(65536)
            if not data:
                clients.pop(fd, None)
                peers.pop(fd).close()
            elif data.startswith(b"GET /socket.io"):
                peer.send(hello)
                clients[fd] = peer
            elif data.startswith(b"POST /messages"):
                number += 1
                body = json.loads(data.partition(b"\r\n\r\n")[2])
                message = json.dumps(shape(number, number, 1, body["content"], stamp())).encode()
                ready = frame(b'42["message:new",' + message + b"]")
                for client in clients.values():
                    client.send(ready)
                peer.send(done % (201, len(message), message))
            elif fd not in clients:
                peer.send(done % (200, len(made), made))


def serve_inline(name: str, database: str) -> None:
    """What `--serve NAME` runs: one of the servers above, in a process of its own."""
    if name == "ceiling":
        return ceiling(database)
    main = obvious if name == "obvious" else empty
    if name == "empty-uvloop":
        import uvloop

        return uvloop.run(main(database))
    return asyncio.run(main(database))


LABELS = {
    "chatrtc": "ChatRTC",
    "obvious": "obvious",
    "ceiling": "write ceiling",
    "node": "Node, commit per message",
    "turn": "Node, commit per turn",
    "empty": "empty aiohttp",
    "empty-uvloop": "empty aiohttp, uvloop",
}
DELIVERS = ("chatrtc", "obvious", "ceiling", "node", "turn")
READS = ("chatrtc", "node")


def takes_part(server: str, step: str) -> bool:
    """The ceiling stores nothing, the empty handlers deliver nothing."""
    if step == "start":
        return server in ("chatrtc", "obvious", "node")
    return server != "ceiling" if step == "posts" else server in DELIVERS


@dataclass
class Server:
    """A running server process."""

    name: str
    process: subprocess.Popen[str]
    port: int
    started: float  # seconds from the start of the process to its first answer
    token: str = ""
    rooms: list[Room] = field(default_factory=list)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request on a connection of its own, for the preparations."""
        link = Http(self.port)
        link.sock.setblocking(True)
        link.sock.settimeout(10)
        link.send(request(method, path, self.token, body))
        while not (status := link.receive()):
            pass
        link.sock.close()
        if status >= 300:
            raise BenchError(f"{self.name}: {method} {path} answered {status}: {link.body!r}")
        return json.loads(link.body) if link.body else None

    def prepare(self, rooms: int = 1) -> None:
        """An account that owns as many servers as asked."""
        if not self.token:
            login = {"username": "bench", "password": "bench-chatrtc"}
            self.token = self.call("POST", "/auth/register", login)["token"]
        while len(self.rooms) < rooms:
            made = self.call("POST", "/servers", {"name": "bench"})
            self.rooms.append((made["server_id"], made["channels"][0]["channel_id"]))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def request(method: str, path: str, token: str, body: dict[str, Any] | None = None) -> bytes:
    text = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


# ---- Listeners ---------------------------------------------------------
# A listener process holds many WebSocket clients. A room's stream is kept once (Feed); a client is
# an offset into it, and what it receives must be the bytes that follow. So checking a delivery costs
# a comparison in C, and only the client that is ahead of all others pays for parsing. What is not a
# message (pings, acks) is taken out frame by frame.

MESSAGE = b'42["message:new",'
SEQ = re.compile(rb'"seq": ?(\d+)')
DUE = re.compile(rb'"content": ?"(\d+) ')
GONE = 1 << 62  # the offset of a client that the server has cut


class Feed:
    """What one room has said: its bytes, and where each message ends and when it was due."""

    def __init__(self, seen: Callable[[int], None]) -> None:
        self.seen = seen  # told the number of messages that every client here has
        self.data, self.ends, self.due = bytearray(), [0], array("q", [0])
        self.seq: int | None = None
        self.offsets: list[int] = []  # of each client
        self.floor, self.behind = 0, 0  # the lowest offset, and how many clients are there
        self.faults, self.cut, self.recording = 0, 0, False
        self.log = array("q")  # time, offset before, offset after, for each read

    def enter(self) -> tuple[int, int]:
        """A client joins at the end of what is known: its index and its offset."""
        self.offsets.append(self.ends[-1])
        self.settle()
        return len(self.offsets) - 1, self.ends[-1]

    def after(self, offset: int, message: bytes) -> int:
        """The offset after a message that is new, or the next of the known ones, or a fault."""
        if offset == len(self.data):
            self.add(message)
        elif not self.data.startswith(message, offset):
            self.faults += 1
        return self.ends[self.count(offset) + 1]

    def add(self, message: bytes) -> None:
        number, due = SEQ.search(message), DUE.search(message)
        seq = int(number[1]) if number else -1
        self.faults += self.seq is not None and seq != self.seq + 1
        self.seq = seq
        self.data += message
        self.ends.append(len(self.data))
        self.due.append(int(due[1]) if due else 0)

    def moved(self, index: int, before: int, after: int) -> None:
        self.offsets[index] = after
        if self.recording and after > before:
            self.log.extend((time.monotonic_ns(), before, after))
        if before == self.floor:
            self.behind -= 1
            if not self.behind:
                self.settle()

    def settle(self) -> None:
        self.floor = min(self.offsets, default=0)
        self.behind = self.offsets.count(self.floor)
        self.seen(self.count(self.floor) if self.floor < GONE else 0)

    def count(self, offset: int) -> int:
        """How many messages end at or before the offset."""
        return bisect_right(self.ends, offset) - 1

    def received(self) -> int:
        return sum(self.count(offset) for offset in self.offsets if offset < GONE)

    def forget(self) -> None:
        self.data, self.ends, self.due, self.log = bytearray(), [0], array("q", [0]), array("q")
        self.offsets = [offset if offset == GONE else 0 for offset in self.offsets]
        self.faults, self.cut = 0, 0
        self.settle()

    def latencies(self) -> Counter[int]:
        """Of every delivery on the log, in tenths of a millisecond."""
        found: Counter[int] = Counter()
        log, due = self.log, self.due
        for i in range(0, len(log), 3):
            now, first = log[i], self.count(log[i + 1]) + 1
            for k in range(first, self.count(log[i + 2]) + 1):
                found[(now - due[k]) // 100_000] += 1
        return found


class Client:
    """One WebSocket client: connects, authenticates in the handshake, joins a server, listens."""

    def __init__(self, port: int, token: str, server_id: int, feed: Feed) -> None:
        self.token, self.server_id, self.feed = token, server_id, feed
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setblocking(False)
        self.open, self.joined, self.rest = False, False, b""
        self.index, self.at = -1, 0  # its place in the feed's offsets, and the offset itself
        self.sock.send(
            b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: Y2hhdHJ0Yy1iZW5jaC1rZQ==\r\n\r\n" % port
        )

    def say(self, text: str) -> None:
        """A masked text frame; the mask is zero, which leaves the bytes as they are."""
        data = text.encode()
        size = len(data)
        head = bytes((0x81, 0x80 | size)) if size < 126 else b"\x81\xfe" + size.to_bytes(2, "big")
        self.sock.send(head + bytes(4) + data)

    def take(self, chunk: memoryview) -> None:
        """What was received: the room's bytes as far as they are known, then frame by frame."""
        if self.joined and not self.rest:
            known = chunk[: len(self.feed.data) - self.at]
            if self.feed.data.startswith(known, self.at):
                self.place(self.at + len(known))
                chunk = chunk[len(known) :]
        if chunk:
            self.frames(bytes(chunk)) if self.open else self.upgrade(bytes(chunk))

    def upgrade(self, chunk: bytes) -> None:
        self.rest += chunk
        head, found, rest = self.rest.partition(b"\r\n\r\n")
        if found:
            if b" 101 " not in head:
                raise BenchError(f"no upgrade: {head[:200]!r}")
            self.open, self.rest = True, b""
            self.frames(rest)

    def frames(self, chunk: bytes) -> None:
        """Start again at the message that was under way, if any, and take whole frames."""
        feed, begun = self.feed, b""
        if self.joined:
            start = feed.ends[feed.count(self.at)]
            begun = bytes(feed.data[start : self.at])
            self.place(start)
        data, at = begun + self.rest + chunk, 0
        while (end := frame_end(data, at)) and end <= len(data):
            payload = at + (2 if data[at + 1] < 126 else 4 if data[at + 1] == 126 else 10)
            if self.joined and data.startswith(MESSAGE, payload):
                self.place(feed.after(self.at, data[at:end]))
            else:
                self.other(data[payload:end])
            at = end
        self.rest = data[at:]
        if self.joined and self.rest and feed.data.startswith(self.rest, self.at):
            self.place(self.at + len(self.rest))
            self.rest = b""

    def place(self, at: int) -> None:
        before, self.at = self.at, at
        if before != at:
            self.feed.moved(self.index, before, at)

    def other(self, payload: bytes) -> None:
        if payload == b"2":
            self.say("3")
        elif payload.startswith(b"0"):
            self.say("40" + json.dumps({"token": self.token}))
        elif payload.startswith(b"430"):
            if b'"success":true' not in payload.replace(b" ", b""):
                raise BenchError(f"join_server: {payload[:200]!r}")
            self.joined, self.index, self.at = True, *self.feed.enter()
        elif payload.startswith(b"40"):
            self.say(f'420["join_server",{{"server_id":{self.server_id}}}]')
        elif payload.startswith(b"44"):
            raise BenchError(f"refused: {payload[:200]!r}")


def frame_end(data: bytes, at: int) -> int:
    """Where the frame at this place ends; 0 where its header is not all here."""
    if len(data) < at + 2:
        return 0
    size = data[at + 1]
    if size < 126:
        return at + 2 + size
    wide = 2 if size == 126 else 8
    if len(data) < at + 2 + wide:
        return 0
    return at + 2 + wide + int.from_bytes(data[at + 2 : at + 2 + wide], "big")


class Listener:
    """The process that holds the clients. It obeys the bench over a pipe."""

    in_flight = 32  # handshakes at a time

    def __init__(self, control: Connection, progress: Any, bell: int) -> None:
        self.control, self.progress, self.bell = control, progress, bell
        self.poll = select.epoll()
        self.poll.register(control.fileno(), select.EPOLLIN)
        self.feeds: list[Feed] = []
        self.clients: dict[int, Client] = {}
        self.wanted: deque[tuple[int, str, int, Feed]] = deque()
        self.opening, self.rung = 0, False
        self.buffer = memoryview(bytearray(1 << 18))

    def run(self) -> None:
        while True:
            for fd, _ in self.poll.poll():
                client = self.clients.get(fd)
                if client is None:
                    command, *arguments = self.control.recv()
                    if command == "end":
                        return
                    getattr(self, command)(*arguments)
                else:
                    self.read(fd, client)
            if self.rung:
                self.rung = False
                os.eventfd_write(self.bell, 1)

    def read(self, fd: int, client: Client) -> None:
        try:
            size = client.sock.recv_into(self.buffer)
        except ConnectionError:
            size = 0
        if not size:
            return self.lose(fd, client)
        waiting = not client.joined
        client.take(self.buffer[:size])
        if waiting and client.joined:
            self.opening -= 1
            self.dial()
        return None

    def lose(self, fd: int, client: Client) -> None:
        """The server has closed the connection."""
        self.poll.unregister(fd)
        self.clients.pop(fd).sock.close()
        if not client.joined:
            raise BenchError("the server closed a connection during its handshake")
        client.feed.cut += 1
        client.feed.offsets[client.index] = GONE
        client.feed.settle()

    def join(self, port: int, token: str, rooms: list[int], each: int, counted: bool) -> None:
        """Connect `each` clients to every room; the answer comes when all have joined."""
        for number, server_id in enumerate(rooms):
            feed = Feed(self.told(number) if counted else lambda count: None)
            if counted:
                self.feeds.append(feed)
            self.wanted.extend((port, token, server_id, feed) for _ in range(each))
        self.dial()

    def told(self, number: int) -> Callable[[int], None]:
        def seen(count: int) -> None:
            self.progress[number] = count
            self.rung = True

        return seen

    def dial(self) -> None:
        while self.wanted and self.opening < self.in_flight:
            client = Client(*self.wanted.popleft())
            self.clients[client.sock.fileno()] = client
            self.poll.register(client.sock, select.EPOLLIN)
            self.opening += 1
        if not self.wanted and not self.opening:
            self.control.send("joined")

    def counts(self) -> None:
        """Of each room: clients, messages received by all of them together, faults, clients cut."""
        rooms = [(len(f.offsets), f.received(), f.faults, f.cut) for f in self.feeds]
        self.control.send(rooms)

    def forget(self) -> None:
        """Begin to count anew; between two measurements nobody waits for anything."""
        for client in self.clients.values():
            client.at = 0
        for feed in self.feeds:
            feed.forget()
        self.control.send("ok")

    def record(self, on: bool) -> None:
        for feed in self.feeds:
            feed.recording = on
        self.control.send("ok")

    def latencies(self) -> None:
        self.control.send(sum((feed.latencies() for feed in self.feeds), Counter()))
        for feed in self.feeds:
            feed.log = array("q")

    def leave(self) -> None:
        for client in self.clients.values():
            self.poll.unregister(client.sock)
            client.sock.close()
        self.clients, self.feeds = {}, []
        self.progress[:] = [0] * len(self.progress)
        self.control.send("ok")


# ---- Sender ------------------------------------------------------------
# The process that posts, or reads, over keep-alive connections: as fast as the window allows, or on a
# schedule. A message carries the time it was due: a sender that is late makes the latency longer.


class Http:
    """A keep-alive connection with one request outstanding."""

    length = re.compile(rb"\r\ncontent-length: ?(\d+)", re.IGNORECASE)

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.buffer, self.body, self.sent = b"", b"", 0

    def send(self, data: bytes) -> None:
        self.sent = time.monotonic_ns()
        self.sock.sendall(data)

    def receive(self) -> int:
        """The status once the answer is complete, else 0."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise BenchError("the server closed a connection that posts")
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return 0
        size = self.length.search(head)
        if size and len(body) < int(size[1]):
            return 0
        self.body, self.buffer = body, b""
        return int(head[9:12])


@dataclass
class Work:
    """What the sender is asked to do until it is told to stop."""

    port: int
    token: str
    channels: list[int] = field(default_factory=list)  # post to these in turn
    reads: list[str] = field(default_factory=list)  # or get these paths in turn
    window: int = 0  # messages outstanding in a channel; 0: as many as there are connections
    rate: float = 0.0  # messages a second; 0: as fast as the window allows
    connections: int = WINDOW


class Sender:
    """One piece of work, from its first request to its last answer."""

    def __init__(self, work: Work, control: Connection, bell: int, progress: list[Any]) -> None:
        self.work, self.control, self.bell, self.progress = work, control, bell, progress
        self.poll, self.links = select.epoll(), {}
        self.free: list[Http] = []
        self.sent, self.answered, self.stopping = 0, 0, False
        self.took = array("q")
        self.start = time.monotonic_ns()
        for _ in range(work.connections):
            link = Http(work.port)
            self.links[link.sock.fileno()] = link
            self.poll.register(link.sock, select.EPOLLIN)
            self.free.append(link)
        for fd in (control.fileno(), bell):
            self.poll.register(fd, select.EPOLLIN)
        head = request("POST", "/messages", work.token).split(b"Content-Length")[0]
        self.post = head.replace(b"%", b"%%") + b"Content-Length: %d\r\n\r\n%b"

    def run(self) -> None:
        while self.answered < self.sent or not self.stopping:
            self.fill()
            # poll rounds to milliseconds, select does not, and an epoll can be selected.
            select.select([self.poll], [], [], max(0.0, self.pause()))
            for fd, _ in self.poll.poll(0):
                self.event(fd)
        for link in self.links.values():
            link.sock.close()

    def pause(self) -> float:
        if self.work.rate and self.free and not self.stopping:
            return (self.due() - time.monotonic_ns()) / 1e9
        return 1.0

    def event(self, fd: int) -> None:
        link = self.links.get(fd)
        if link is not None:
            status = link.receive()
            if status:
                if status >= 300:
                    raise BenchError(f"a request was answered {status}: {link.body[:200]!r}")
                self.answered += 1
                self.took.append(time.monotonic_ns() - link.sent)
                self.free.append(link)
        elif fd == self.bell:
            os.eventfd_read(self.bell)
        else:
            self.command(self.control.recv())

    def command(self, name: str) -> None:
        if name == "stop":
            self.stopping = True
        elif name == "forget":
            self.took = array("q")
            self.control.send(self.answered)
        else:
            self.control.send(self.answered)

    def due(self) -> int:
        return self.start + int(self.sent / self.work.rate * 1e9)

    def fill(self) -> None:
        """Send what may be sent now."""
        while self.free and not self.stopping and self.may():
            self.free.pop().send(self.next())
            self.sent += 1

    def may(self) -> bool:
        if self.work.rate:
            return self.due() <= time.monotonic_ns()
        if not self.work.window:
            return True
        rooms = range(len(self.work.channels))
        seen: int = sum(min(part[room] for part in self.progress) for room in rooms)
        return self.sent - seen < self.work.window * len(rooms)

    def next(self) -> bytes:
        work = self.work
        if work.reads:
            return request("GET", work.reads[self.sent % len(work.reads)], work.token)
        due = self.due() if work.rate else time.monotonic_ns()
        content = b"%d " % due
        channel = work.channels[self.sent % len(work.channels)]
        body = b'{"channel_id":%d,"content":"%b"}' % (channel, content.ljust(CONTENT, b"x"))
        return self.post % (len(body), body)


def sender_main(control: Connection, bell: int, progress: list[Any]) -> None:
    while (work := control.recv()) != "end":
        sender = Sender(work, control, bell, progress)
        control.send("started")
        sender.run()
        took = sorted(sender.took)
        control.send((sender.sent, [took[int(len(took) * p)] / 1e6 for p in (0.5, 0.99)] if took else []))


def child(target: Callable[..., None], control: Connection, cpu: int, *arguments: Any) -> None:
    """The body of a process of ours: on its cores, deaf to Ctrl-C, telling what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.sched_setaffinity(0, {cpu})
    try:
        target(control, *arguments)
    except (BenchError, OSError) as error:
        with suppress(OSError):
            control.send(BenchError(str(error)))


def listener_main(control: Connection, progress: Any, bell: int) -> None:
    Listener(control, progress, bell).run()


# ---- Bench -------------------------------------------------------------
# Starts and ends the processes, and takes the figures between two moments.


@dataclass
class Span:
    """What happened between two moments."""

    deliveries: float  # a second
    answers: float  # a second
    cpu: float  # seconds of the server
    seconds: float
    idle: float  # share of the busiest core of the client processes

    def each(self, rate: float) -> float:
        """CPU of the server for each of what has this rate, in microseconds."""
        return self.cpu / max(1.0, rate * self.seconds) * 1e6


class Bench:
    """The client processes, and one server at a time."""

    def __init__(self, plan: Plan, cpus: list[int], directory: Path, chatrtc: Path) -> None:
        self.plan, self.directory, self.chatrtc = plan, directory, chatrtc
        self.server_cpu, others = cpus[0], cpus[1:] or cpus
        self.context = multiprocessing.get_context("fork")
        self.links: list[Connection] = []
        self.processes: list[tuple[int, Any]] = []  # and their cores
        self.servers: list[Server] = []
        self.number = 0
        self.results: dict[tuple[str, str], list[float]] = defaultdict(list)
        bell = os.eventfd(0, os.EFD_NONBLOCK)
        crowd = max(1, len(others) - 1)
        shared = [self.context.RawArray("Q", 64) for _ in range(crowd)]
        for i, progress in enumerate(shared):
            self.spawn(listener_main, others[i % len(others)], progress, bell)
        self.spawn(sender_main, others[-1], bell, shared)
        self.listeners, self.sender = self.links[:-1], self.links[-1]
        os.sched_setaffinity(0, set(others))

    def spawn(self, target: Callable[..., None], cpu: int, *arguments: Any) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=child, args=(target, theirs, cpu, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.links.append(ours)
        self.processes.append((cpu, process))

    def end(self) -> None:
        for server in self.servers:
            server.stop()
        for _, process in self.processes:
            process.kill()
            process.join(5)

    def ask(self, link: Connection, *command: Any, within: float = 30) -> Any:
        """Send a command, if there is one, and wait for the answer."""
        with suppress(BrokenPipeError):  # a process that failed has said why
            if command:
                link.send(command[0] if link is self.sender else command)
        if not link.poll(within):
            raise BenchError(f"no answer to {command[:1]} within {within:.0f} s")
        try:
            answer = link.recv()
        except EOFError:
            raise BenchError("a client process has died") from None
        if isinstance(answer, BenchError):
            raise answer
        return answer

    def everyone(self, *command: Any, within: float = 30) -> list[Any]:
        for link in self.listeners:
            with suppress(BrokenPipeError):
                link.send(command)
        return [self.ask(link, within=within) for link in self.listeners]

    # -- servers --

    def command(self, name: str, database: Path) -> list[str]:
        if name == "chatrtc":
            options = ["--port", "0", "--database", str(database), "--no-rate-limit"]
            return [sys.executable, str(self.chatrtc), "serve", *options]
        if name in ("node", "turn"):
            script = self.directory / "server.js"
            script.write_text(NODE)
            return ["node", str(script), str(database), name, TABLE, INSERT, PAGE, SEARCH]
        inline = ["--serve", name, "--database", str(database)]
        return [sys.executable, str(Path(__file__).resolve()), *inline]

    def launch(self, name: str, database: Path | None = None) -> Server:
        """Start a server on its core, and wait for its first answer."""
        self.number += 1
        if database is None:
            folder = self.directory / f"{self.number}-{name}"
            folder.mkdir()
            database = folder / "bench.db"
        environment = {**os.environ, "NODE_PATH": str(node_modules() or "")}
        log = (self.directory / f"{self.number}-{name}.log").open("w+")
        before = time.perf_counter()
        with pinned(self.server_cpu):  # the process inherits it, with every thread it will start
            process = subprocess.Popen(
                self.command(name, database),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
                cwd=database.parent,
            )
        server = Server(name, process, 0, 0.0)
        self.servers.append(server)
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 20)[0]
        found = re.search(r"http://[^:]+:(\d+)", process.stdout.readline()) if ready else None
        if not found:
            log.seek(0)
            raise BenchError(f"{name} does not start: {log.read()[-2000:]}")
        server.port = int(found[1])
        if name != "ceiling":
            server.call("GET", "/healthz")
        server.started = time.perf_counter() - before
        return server

    def drop(self, server: Server) -> None:
        server.stop()
        self.servers.remove(server)

    # -- measuring --

    def join(self, server: Server, rooms: list[Room], clients: int, counted: bool = True) -> float:
        """Connect clients, spread over rooms and processes; the seconds it took."""
        ids, spread, before = [room[0] for room in rooms], len(self.listeners), time.perf_counter()
        for i, link in enumerate(self.listeners):
            each = clients // len(ids)
            each = each // spread + (i < each % spread)
            link.send(("join", server.port, server.token, ids, each, counted))
        for link in self.listeners:
            self.ask(link, within=90)
        return time.perf_counter() - before

    def leave(self, server: Server) -> None:
        """All clients go; it is over when the server has come to rest."""
        self.everyone("leave")
        for _ in range(50):
            before = cpu_seconds(server.process.pid)
            time.sleep(0.2)
            if cpu_seconds(server.process.pid) - before < 0.04:
                break

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Of each room, over all processes: clients, messages received, faults, clients cut."""
        answers = self.everyone("counts")
        totals = [[sum(column) for column in zip(*room, strict=True)] for room in zip(*answers, strict=True)]
        return [(a, b, c, d) for a, b, c, d in totals]

    def look(self, server: Server) -> list[float]:
        """Now: the time, deliveries, answers, CPU of the server, CPU of the clients of each core."""
        answers = self.ask(self.sender, "answered")
        deliveries = sum(room[1] for room in self.counts())
        clients: defaultdict[int, float] = defaultdict(float)
        for core, process in self.processes:
            clients[core] += cpu_seconds(process.pid)
        return [time.perf_counter(), deliveries, answers, cpu_seconds(server.process.pid), *clients.values()]

    def span(self, server: Server, seconds: float) -> Span:
        """Let the time pass, and say what happened in it."""
        before = self.look(server)
        time.sleep(seconds)
        took, deliveries, answers, cpu, *clients = (b - a for a, b in zip(before, self.look(server), strict=True))
        return Span(deliveries / took, answers / took, cpu, took, 1 - min(1.0, max(clients) / took))

    def note(self, server: str, key: str, value: float) -> None:
        self.results[server, key].append(value)

    def drive(self, server: Server, work: Work, record: bool = False) -> tuple[Span, list[float]]:
        """Do the work, measure its steady part, and check that every client has every message."""
        self.everyone("forget")
        self.ask(self.sender, work)
        time.sleep(self.plan.warm)
        self.everyone("record", record)
        self.ask(self.sender, "forget")
        span = self.span(server, 1.0 if work.reads else self.plan.seconds)
        self.everyone("record", False)
        sent, took = self.ask(self.sender, "stop", within=90)
        if work.channels:
            self.check(server, work, sent)
        return span, took

    def check(self, server: Server, work: Work, sent: int) -> None:
        """Every client has every message, once and in order; what comes late is waited for."""
        rooms = len(work.channels)
        posted = [sent // rooms + (room < sent % rooms) for room in range(rooms)]
        before, deadline = None, time.monotonic() + 30
        while (now := self.counts()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(0.3)
        for messages, (clients, received, faults, cut) in zip(posted, now, strict=False):
            lost = abs(clients * messages - received)
            figures = (("lost", lost), ("faults", faults), ("cut", cut), ("counted", received))
            for key, value in figures:
                self.note(server.name, key, value)


@contextmanager
def pinned(cpu: int) -> Iterator[None]:
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usual)


# ---- Scenarios ---------------------------------------------------------
# What is measured. A scenario notes figures; what becomes of them is the report's business.


def visit(bench: Bench, name: str, steps: set[str]) -> None:
    """One process of one server: its start, its clients, its fan-out, its posts."""
    server = bench.launch(name)
    if takes_part(name, "start"):
        bench.note(name, "start ms", server.started * 1000)
        bench.note(name, "idle MiB", rss_kib(server.process.pid) / 1024)
    server.prepare()
    if steps & {"connect", "fanout1000", "latency"} and takes_part(name, "connect"):
        everybody(bench, server, steps)
    if "fanout100" in steps and takes_part(name, "fanout100"):
        bench.join(server, server.rooms, bench.plan.few)
        fan_out(bench, server, "few", server.rooms)
        bench.leave(server)
    if "posts" in steps and takes_part(name, "posts"):
        durable_posts(bench, server, server.rooms[0], "posts")
    bench.drop(server)


def everybody(bench: Bench, server: Server, steps: set[str]) -> None:
    plan, name = bench.plan, server.name
    before = rss_kib(server.process.pid)
    bench.note(name, "connect ms", bench.join(server, server.rooms, plan.clients) * 1000)
    bench.note(name, "KiB a connection", (rss_kib(server.process.pid) - before) / plan.clients)
    if steps & {"fanout1000", "latency"}:
        rate = fan_out(bench, server, "all", server.rooms) / plan.clients / 2
        if "latency" in steps:
            latency(bench, server, rate, "half")
            theirs = bench.results["node", "all /s"]
            if name == "chatrtc" and theirs:
                latency(bench, server, statistics.median(theirs) / plan.clients / 2, "node")
    bench.leave(server)


def fan_out(bench: Bench, server: Server, key: str, rooms: list[Room]) -> float:
    """Deliveries a second with 64 messages outstanding in every room."""
    channels = [channel for _, channel in rooms]
    span, _ = bench.drive(server, Work(server.port, server.token, channels, window=WINDOW))
    bench.note(server.name, f"{key} /s", span.deliveries)
    bench.note(server.name, f"{key} us", span.each(span.deliveries))
    bench.note(server.name, f"{key} posts a delivery", span.answers / max(1, span.deliveries))
    bench.note(server.name, f"{key} idle %", span.idle * 100)
    return span.deliveries


def latency(bench: Bench, server: Server, rate: float, key: str) -> None:
    """From the moment a message was due to its receipt, over every delivery."""
    channels = [server.rooms[0][1]]
    work = Work(server.port, server.token, channels, rate=max(rate, 2))
    bench.drive(server, work, record=True)
    found: Counter[int] = sum(bench.everyone("latencies"), Counter())
    for share in (50, 99):
        bench.note(server.name, f"{key} p{share} ms", percentile(found, share / 100))
    bench.note(server.name, f"{key} rate", rate)


def percentile(found: Counter[int], share: float) -> float:
    """Of tenths of a millisecond, in milliseconds."""
    left = sum(found.values()) * share
    for value in sorted(found):
        left -= found[value]
        if left <= 0:
            return value / 10
    return float("nan")


def durable_posts(bench: Bench, server: Server, room: Room, key: str) -> None:
    """As fast as 64 connections can, each waiting for its 201; nobody listens."""
    span, took = bench.drive(server, Work(server.port, server.token, [room[1]]))
    bench.note(server.name, f"{key} /s", span.answers)
    bench.note(server.name, f"{key} us", span.each(span.answers))
    bench.note(server.name, f"{key} p99 ms", took[1])
    bench.note(server.name, f"{key} idle %", span.idle * 100)


def growth(bench: Bench) -> None:
    """The same number of clients in ten rooms and in one, each hearing as many messages a second.

    Ten rooms take ten times the posts for that, so the cost of a delivery is what the clients add to
    the cost of the same posts that nobody hears.
    """
    server = bench.launch("chatrtc")
    server.prepare(10)
    for _ in range(bench.plan.runs):
        for key, rooms in (("one", server.rooms[:1]), ("ten", server.rooms)):
            channels = [channel for _, channel in rooms]
            work = Work(server.port, server.token, channels, rate=PACE * len(rooms))
            unheard, _ = bench.drive(server, work)
            bench.join(server, rooms, bench.plan.clients)
            heard, _ = bench.drive(server, work)
            bench.leave(server)
            added = heard.cpu / heard.seconds - unheard.cpu / unheard.seconds
            bench.note("chatrtc", f"{key} us", added / heard.deliveries * 1e6)
    bench.drop(server)


def idle_clients(bench: Bench) -> None:
    """The same posts and the same fan-out before and after a crowd connects to another server."""
    server = bench.launch("chatrtc")
    server.prepare(3)
    for _ in range(bench.plan.runs):
        for key, crowd in (("alone", 0), ("crowd", bench.plan.idle)):
            bench.join(server, server.rooms[1:2], crowd, counted=False)
            durable_posts(bench, server, server.rooms[2], f"{key} posts")
            bench.join(server, server.rooms[:1], bench.plan.clients)
            fan_out(bench, server, key, server.rooms[:1])
            bench.leave(server)
    bench.drop(server)


# ---- History -----------------------------------------------------------
# A million messages, put into the databases by plain SQL. Each server has a file of its own; all run
# at the same time and are asked in turns.

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett")
QUERIES = ("alpha", "bravo n17", "m4321", "echo m765")  # in a tenth of the rows, and in ever fewer
OURS = """INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq)
    SELECT server_id, :channel, 1, :content, '2025-01-01T00:00:00Z', seq + :number FROM servers
    WHERE server_id = :server"""
FINISH = """
    UPDATE servers SET seq = (SELECT max(seq) FROM messages m WHERE m.server_id = servers.server_id);
    INSERT INTO messages_fts (rowid, content, server_id) SELECT message_id, content, server_id FROM messages;
    UPDATE search SET indexed_id = (SELECT max(message_id) FROM messages);
"""
THEIRS = "INSERT INTO messages VALUES (:number, :channel, 1, :content, '2025-01-01T00:00:00Z')"


def content_of(number: int) -> str:
    words = " ".join(WORDS[number // 10**k % 10] for k in range(3))
    return f"{words} n{number % 997} m{number % 9973} the quick brown fox jumps over the lazy dog"


def fill(database: Path, server: Server, rows: int) -> None:
    """The rows of a history, for ChatRTC or for the others."""
    db = sqlite3.connect(database)
    db.execute("PRAGMA synchronous = OFF")
    names = ("server", "channel", "number", "content")
    values = (dict(zip(names, (*server.rooms[0], n, content_of(n)), strict=True)) for n in range(1, rows + 1))
    db.executemany(OURS if server.name == "chatrtc" else THEIRS, values)
    if server.name == "chatrtc":
        db.executescript(FINISH)
    else:
        db.execute("INSERT INTO found (rowid, content) SELECT id, content FROM messages")
    db.commit()
    db.close()


def drop_all(bench: Bench, servers: list[Server]) -> None:
    for server in servers:
        bench.drop(server)


def filled(bench: Bench, name: str, servers: list[Server]) -> None:
    """A server over a filled database: started once to make it, and again when it is full."""
    folder = bench.directory / f"history-{name}"
    folder.mkdir()
    first = bench.launch(name, folder / "bench.db")
    first.prepare()
    bench.drop(first)
    fill(folder / "bench.db", first, bench.plan.rows)
    server = bench.launch(name, folder / "bench.db")
    server.token, server.rooms = first.token, first.rooms
    servers.append(server)


def history(bench: Bench, servers: list[Server]) -> None:
    """The newest page and a deep one, alone and by 16 connections; a search, alone."""
    for server in servers:
        server_id, channel = server.rooms[0]
        page, half = f"/channels/{channel}/messages?limit=50", bench.plan.rows // 2
        deep = [f"{page}&before={half + 997 * k}" for k in range(50)]
        found = [f"/servers/{server_id}/search?q={q.replace(' ', '%20')}" for q in QUERIES]
        for key, paths in (("newest", [page]), ("deep", deep), ("search", found)):
            work = Work(server.port, server.token, reads=paths, connections=1)
            _, took = bench.drive(server, work)
            bench.note(server.name, f"{key} ms", took[0])
            if key != "search":
                work.connections = 16
                span, _ = bench.drive(server, work)
                bench.note(server.name, f"{key} /s", span.answers)


# ---- Report ------------------------------------------------------------
# Medians of the runs, one table of figures and one of the targets.

ROWS = (  # title, key, decimals
    ("{clients} clients in a room: deliveries/s", "all /s", 0),
    ("... CPU a delivery, µs", "all us", 2),
    ("... client processes idle, %", "all idle %", 0),
    ("{few} clients in a room: deliveries/s", "few /s", 0),
    ("... CPU a delivery, µs", "few us", 2),
    ("half of that rate, {clients} clients: messages/s", "half rate", 0),
    ("... latency p50, ms", "half p50 ms", 1),
    ("... latency p99, ms", "half p99 ms", 1),
    ("at half of Node's rate: latency p50, ms", "node p50 ms", 1),
    ("... latency p99, ms", "node p99 ms", 1),
    ("durable posts/s, 64 connections", "posts /s", 0),
    ("... CPU a post, µs", "posts us", 0),
    ("... p99, ms", "posts p99 ms", 1),
    ("... client process idle, %", "posts idle %", 0),
    ("{clients} clients connect, authenticate, join: ms", "connect ms", 0),
    ("memory a connection, KiB", "KiB a connection", 1),
    ("idle process, MiB", "idle MiB", 1),
    ("start to first answer, ms", "start ms", 0),
    ("newest 50 of {rows}: ms alone", "newest ms", 2),
    ("... pages/s, 16 connections", "newest /s", 0),
    ("50 deep in {rows}: ms alone", "deep ms", 2),
    ("... pages/s, 16 connections", "deep /s", 0),
    ("search in {rows}: ms", "search ms", 2),
    (f"{PACE} messages/s in one room of {{clients}}: CPU a delivery, µs", "one us", 2),
    (f"{PACE} messages/s in each of ten rooms: CPU a delivery, µs", "ten us", 2),
    ("{idle} idle clients beside: deliveries/s without", "alone /s", 0),
    ("... with", "crowd /s", 0),
    ("... durable posts/s without", "alone posts /s", 0),
    ("... with", "crowd posts /s", 0),
)


def median(bench: Bench, server: str, key: str) -> float | None:
    values = bench.results.get((server, key))
    return statistics.median(values) if values else None


def figures(bench: Bench) -> list[str]:
    servers = [name for name in LABELS if any(server == name for server, _ in bench.results)]
    lines = ["| | " + " | ".join(LABELS[name] for name in servers) + " |"]
    lines.append("| --- |" + " ---: |" * len(servers))
    for title, key, decimals in ROWS:
        values = [median(bench, name, key) for name in servers]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:,.{decimals}f}" for value in values]
            lines.append(f"| {named(bench, title)} | " + " | ".join(cells) + " |")
    cells = [wrong(bench, name) for name in servers]
    if any(cells):
        lines.append("| lost, doubled or out of order | " + " | ".join(cells) + " |")
    return lines


def wrong(bench: Bench, server: str) -> str:
    """Of all deliveries that were counted; and the clients that the server cut, if any."""
    counted, bad, cut = (
        int(sum(sum(bench.results.get((server, key), ())) for key in keys))
        for keys in (("counted",), ("lost", "faults"), ("cut",))
    )
    return (f"{bad:,} of {counted:,}" if counted else "") + (f", {cut} clients cut" if cut else "")


TARGETS = (  # title, key, server and key it is divided by, if any, and what is asked
    ("fan-out, {clients} clients, to Node, commit per message", "all /s", "node", "", ">=", 10, "x"),
    ("fan-out, {clients} clients, to the write ceiling", "all /s", "ceiling", "", ">=", 4, "x"),
    ("fan-out, {few} clients, to Node, commit per message", "few /s", "node", "", ">=", 5, "x"),
    ("p99 at half of its own rate, to Node's", "half p99 ms", "node", "", "<=", 1, "x"),
    ("p99 at half of Node's rate", "node p99 ms", "node", "half p99 ms", "<=", 1, "x"),
    ("durable posts, to an empty aiohttp handler", "posts /s", "empty", "", ">=", 0.7, "x"),
    ("... to one on uvloop", "posts /s", "empty-uvloop", "", ">=", 0.7, "x"),
    ("durable posts, to Node, commit per message", "posts /s", "node", "", ">=", 3, "x"),
    ("{clients} clients connect: time, to Node's", "connect ms", "node", "", "<=", 1, "x"),
    ("memory a connection", "KiB a connection", "", "", "<=", 25, " KiB"),
    ("idle process", "idle MiB", "", "", "<=", 60, " MiB"),
    ("newest page: requests/s, to Node", "newest /s", "node", "", ">=", 1, "x"),
    ("deep page: requests/s, to Node", "deep /s", "node", "", ">=", 1, "x"),
    ("search, median", "search ms", "", "", "<=", 20, " ms"),
    ("CPU a delivery, ten rooms to one", "ten us", "chatrtc", "one us", "<=", 1.1, "x"),
    ("fan-out beside {idle} idle clients", "crowd /s", "chatrtc", "alone /s", ">=", 0.9, "x"),
    ("posts beside them", "crowd posts /s", "chatrtc", "alone posts /s", ">=", 0.9, "x"),
    ("start to first answer", "start ms", "", "", "<=", 500, " ms"),
)


def targets(bench: Bench) -> list[str]:
    """Each target, what it came to in this run, and whether that is enough."""
    lines = ["| ChatRTC | target | measured | |", "| --- | ---: | ---: | --- |"]
    for title, key, server, other, sign, needed, unit in TARGETS:
        value = median(bench, "chatrtc", key)
        base = median(bench, server, other or key) if server else 1.0
        if value is not None and base is not None:
            value = value / base if base else float("inf")
            met = value >= needed if sign == ">=" else value <= needed
            shown = f"{value:.2f}{unit} | {'met' if met else '**not met**'}"
            lines.append(f"| {named(bench, title)} | {sign} {needed:g}{unit} | {shown} |")
    return lines


def named(bench: Bench, title: str) -> str:
    plan = bench.plan
    numbers = {"clients": plan.clients, "few": plan.few, "rows": plan.rows, "idle": plan.idle}
    return title.format(**{key: f"{number:,}" for key, number in numbers.items()})


def report(bench: Bench, started: float) -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    minutes, runs = (time.monotonic() - started) / 60, bench.plan.runs
    head = (
        f"`python {command}`, {time.strftime('%Y-%m-%d', time.gmtime())}, {minutes:.0f} minutes; the "
        f"server on one core, medians of {runs} run{'s' * (runs > 1)} in turns, {CONTENT}-byte "
        f"messages, {WINDOW} outstanding."
    )
    tail = f"Machine: {machine(bench.directory)}."
    return "\n".join([head, "", *figures(bench), "", *targets(bench), "", tail])


# ---- Command line ------------------------------------------------------
# Everything that was started is ended by its process id, also on Ctrl-C.

INSTALL = (
    "Node, or its packages, are not here: the bench goes on without them. To have them:\n"
    "    npm install --prefix . socket.io@4.8 better-sqlite3\n"
    "(or set NODE_PATH to a node_modules folder that holds both)"
)


def contenders(chosen: tuple[str, ...]) -> list[str]:
    """Who takes part; Node before ChatRTC, which is also measured at Node's rate."""
    order = ["node", "turn", "obvious", "ceiling", "empty", "empty-uvloop", "chatrtc"]
    names = [name for name in order if not chosen or name in chosen]
    if not node_modules():
        click.echo(INSTALL, err=True)
        names = [name for name in names if name not in ("node", "turn")]
    if not find_spec("uvloop"):
        names = [name for name in names if name != "empty-uvloop"]
    return names


def steps_of(bench: Bench, names: list[str], only: set[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Everything there is to do, in order, each with a name for the progress bar."""
    visits, read = only & set(VISIT), [name for name in names if name in READS]
    for run in range(bench.plan.runs if visits else 0):
        for name in names:
            if any(takes_part(name, step) for step in visits):
                yield f"run {run + 1}: {LABELS[name]}", partial(visit, bench, name, visits)
    if "history" in only:
        full: list[Server] = []
        for name in read:
            yield f"a history for {LABELS[name]}", partial(filled, bench, name, full)
        for run in range(bench.plan.runs):
            yield f"run {run + 1}: history", partial(history, bench, full)
        yield "history", partial(drop_all, bench, full)
    if "growth" in only and "chatrtc" in names:
        yield "ten rooms and one", partial(growth, bench)
    if "idle" in only and "chatrtc" in names:
        yield "idle clients", partial(idle_clients, bench)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Smaller numbers, one run: to see that it works.")
@click.option("--only", multiple=True, type=click.Choice(VISIT + AFTER), help="Only this; repeatable.")
@click.option("--servers", multiple=True, type=click.Choice(list(LABELS)), help="Only these.")
@click.option("--runs", type=click.IntRange(1), help="Runs of which the median is taken.")
@click.option("--cpus", help="Cores to use, the server's first (0,1,2,3).")
@click.option("--chatrtc", type=click.Path(path_type=Path), default=HERE / "chatrtc.py", hidden=True)
@click.option("--serve", hidden=True)
@click.option("--database", default="", hidden=True)
def main(
    quick: bool,
    only: tuple[str, ...],
    servers: tuple[str, ...],
    runs: int | None,
    cpus: str | None,
    chatrtc: Path,
    serve: str | None,
    database: str,
) -> None:
    """Measure ChatRTC beside what it is compared with, and print one table."""
    if serve:
        return serve_inline(serve, database)
    plan = QUICK if quick else Plan()
    plan = replace(plan, runs=runs) if runs else plan
    cores = [int(part) for part in cpus.split(",")] if cpus else sorted(os.sched_getaffinity(0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, names = time.monotonic(), contenders(servers)
    with tempfile.TemporaryDirectory(prefix="bench-chatrtc-", ignore_cleanup_errors=True) as folder:
        bench = Bench(plan, cores, Path(folder), chatrtc.resolve())
        try:
            steps = list(steps_of(bench, names, set(only or VISIT + AFTER)))
            bar = click.progressbar(steps, label="bench", item_show_func=lambda step: step[0] if step else "", file=sys.stderr)
            with bar:
                for _, step in bar:
                    step()
            text = report(bench, started)
        except BenchError as error:
            raise click.ClickException(str(error)) from None
        finally:
            bench.end()
    click.echo(text)
    return None


if __name__ == "__main__":
    main()
