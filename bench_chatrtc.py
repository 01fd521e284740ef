"""The benchmark of ChatRTC: `python bench_chatrtc.py` prints tables of figures and of targets.

It pins the server to one core, drives it from client processes on the other cores, and in turns, within the same run, does
the same to the servers that ChatRTC is compared with:

    obvious   the same stack written the obvious way: stock emit, aiosqlite, a commit per message
    ceiling   one `socket.send` of a ready frame per client and message, and nothing else
    node      Node's socket.io and better-sqlite3, synchronous=FULL, a commit per message
    turn      the same with one commit per turn of the event loop
    empty     an aiohttp handler that parses the JSON of a post and answers (also on uvloop)
    least     an aiohttp handler on uvloop that stores a post by the least SQL, with one commit per turn of the event loop

Node announces who is connected, as ChatRTC does. They all do less than ChatRTC (one token, no roles, no limits), so the
comparison favors them. A message is outstanding until every client of its room has received it. Every message is counted at
every client: a process parses a room's stream once, checks that the sequence numbers follow each other, and compares what each
client receives with those bytes.

Sections: Settings, Machine, Servers, Listeners, Sender, Bench, Scenarios, History, Report, Command line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import py_compile
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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click

# ---- Settings ----------------------------------------------------------
# The numbers of a full and of a quick run. A visit starts one server process and takes the measurements in VISIT; those in
# AFTER follow, on processes of their own.

HERE = Path(__file__).resolve().parent
VISIT = ("start", "connect", "fanout1000", "latency", "fanout100", "posts")
AFTER = ("history", "growth", "idle", "processes", "installed", "storm", "ways", "small", "sockets", "page")
CONTENT = 100  # bytes of a message
NODE_PACKAGES = ("socket.io", "better-sqlite3")
WINDOW = 64  # outstanding messages in a room, and connections that post
HANDSHAKES, STORM_HANDSHAKES = 32, 256  # that a client process has in progress at a time
MISSED = 100  # messages that each client of a storm has missed
SMALL_ROOMS = ((100, 10), (20, 50))  # rooms, and clients in each
FEW_MEMBERS = 10
WAYS_TURNS = 5  # parts of each measurement of a way to post
SPARE_FILES = 200  # files that a process has open, besides its sockets
PING_SECONDS = 20.0  # every idle socket is pinged once in this time
PACE = 50  # messages per second in a room if the rate is fixed
Room = tuple[int, int]  # server_id, channel_id
Names = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The numbers of a run."""

    runs: int = 3
    clients: int = 1000
    few: int = 100
    seconds: float = 3.0  # of each measurement
    warm: float = 1.0  # seconds before a measurement
    rows: int = 1_000_000
    idle: int = 5000
    storm: int = 1000  # different members who connect at once, and then twice as many
    members: int = 10_000  # of a large server
    sockets: int = 20_000  # that only answer pings


QUICK = Plan(
    runs=1, clients=300, few=100, seconds=1.0, warm=0.5, rows=100_000, idle=1000, storm=250, members=500, sockets=2000
)  # fmt: skip


class BenchError(Exception):
    """An error that makes the figures meaningless."""


# ---- Machine -----------------------------------------------------------
# The kernel's figures for a process, and the description of the machine.


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process with all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def fsync_ms(directory: Path) -> float:
    """Return the median time of writing and syncing 4 kB, a lower bound for one commit."""
    times = []
    with (directory / "fsync").open("wb") as file:
        for _ in range(50):
            before = time.perf_counter()
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - before)
    return statistics.median(times) * 1000


def node_modules() -> Path | None:
    """Return the folder of the Node packages, or None if `node` or a package is missing."""
    folders = [Path.cwd() / "node_modules", HERE / "node_modules"]
    folders += [Path(part) for part in os.environ.get("NODE_PATH", "").split(os.pathsep) if part]
    complete = (f for f in folders if all((f / name).is_dir() for name in NODE_PACKAGES))
    return next(complete, None) if shutil.which("node") else None


def find_browser() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-headless-shell")


def describe_machine(directory: Path) -> str:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    versions = []
    for name in ("aiohttp", "python-socketio", "aiosqlite", "msgspec", "uvloop"):
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    if folder := node_modules():
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
        versions.append(f"Node {node.stdout.strip().lstrip('v')}")
        for name in NODE_PACKAGES:
            versions.append(f"{name} {json.loads((folder / name / 'package.json').read_text())['version']}")
    return (
        f"{os.cpu_count()} cores, {model[1].strip() if model else platform.machine()}, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, {', '.join(versions)}; fdatasync of 4 kB {fsync_ms(directory):.2f} ms"
    )


# ---- Servers -----------------------------------------------------------
# The servers that ChatRTC is compared with. Each answers the requests of the bench (register, create a server, post, read),
# speaks Socket.IO to the listeners, and prints its address.

TABLE = """
CREATE TABLE IF NOT EXISTS messages (id INTEGER PRIMARY KEY, channel_id INTEGER NOT NULL,
    author_id INTEGER NOT NULL, content TEXT NOT NULL, created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS messages_channel ON messages (channel_id, id);
CREATE VIRTUAL TABLE IF NOT EXISTS found USING fts5 (content, content = 'messages', content_rowid = 'id');
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
function post({ channel_id, content }, answered) {
  if (typeof content !== "string" || !content.trim()) return answered(400, {});
  if (turn && !db.inTransaction) { db.exec("BEGIN"); setImmediate(commit); }
  const created_at = new Date().toISOString().slice(0, 19) + "Z";
  const id = Number(insert.run(channel_id, content, created_at).lastInsertRowid);
  const seq = (counts.get(channel_id) || 0) + 1;
  counts.set(channel_id, seq);
  const done = () => {
    const message = { ...shape({ id, channel_id, author_id: 1, content, created_at }), seq };
    io.to(`server:${channel_id}`).emit("message:new", message);
    answered(201, message);
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
  if (req.method === "POST") return post(JSON.parse(text), (status, body) => answer(res, status, body));
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
const online = new Map();  // server -> user -> number of sockets
io.use((s, next) => {
  const [word, user] = `${s.handshake.auth.token}`.split(":");
  s.data.user_id = +(user || 1);
  next(word === "bench" ? undefined : new Error("UNAUTHORIZED"));
});
function announce(s, server_id, change) {
  if (!online.has(server_id)) online.set(server_id, new Map());
  const users = online.get(server_id), user_id = s.data.user_id, count = (users.get(user_id) || 0) + change;
  if (count) users.set(user_id, count); else users.delete(user_id);
  const event = count === 0 ? "user:disconnected" : count === 1 && change === 1 && "user:connected";
  if (event) io.to(`server:${server_id}`).emit(event, { server_id, user_id, username: `member${user_id}` });
  return [...users.keys()];
}
io.on("connection", s => {
  const joined = new Set();
  s.on("join_server", ({ server_id }, ack) => {
    s.join(`server:${server_id}`);
    const connected_users = announce(s, server_id, joined.has(server_id) ? 0 : 1);
    joined.add(server_id);
    ack({ success: true, connected_users, seq: 0 });
  });
  s.on("disconnect", () => { for (const server_id of joined) announce(s, server_id, -1); });
  s.on("message:send", (body, ack) =>
    post(body, (status, message) => ack({ success: status === 201, ...message })));
});
server.listen(0, "127.0.0.1", 1024, () =>
  console.log(`listening on http://127.0.0.1:${server.address().port}`));
"""

# Programs whose memory is compared with that of ChatRTC. They get the path of a database and the folder of the installed files.
LIBRARIES = """
import sys
import asyncio, signal, sqlite3, ssl
sys.modules.update(redis=None, cryptography=None, ssl=None)  # as chatrtc.py does
import aiohttp.web
sys.modules.update(ssl=ssl)
import aiosqlite, click, jwt, msgspec, socketio, uvloop
"""
CODE = """
import signal, sys, uvloop
sys.path.insert(0, sys.argv[2])
sys.argv[0] = "chatrtc"
import chatrtc
"""
PAUSE = """
print("listening on http://127.0.0.1:0", flush=True)
signal.pause()
"""
ONE_ROUTE = """
async def answer(request):
    return aiohttp.web.Response()
async def serve():
    db = await aiosqlite.connect(sys.argv[1])
    await db.execute("PRAGMA journal_mode = WAL")
    await db.executescript(open(f"{sys.argv[2]}/chatrtc.sql").read())
    app = aiohttp.web.Application()
    socketio.AsyncServer(async_mode="aiohttp").attach(app)
    app.router.add_get("/healthz", answer)
    runner = aiohttp.web.AppRunner(app, access_log=None)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()
uvloop.run(serve())
"""
PROGRAMS = {"libraries": LIBRARIES + PAUSE, "code": CODE + PAUSE, "one route": LIBRARIES + ONE_ROUTE}


def message_payload(message_id: int, seq: int, channel: int, content: str) -> dict[str, Any]:
    created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    author = {"author_id": 1, "author_username": "bench", "created_at": created_at, "seq": seq}
    return {"channel_id": channel, "message_id": message_id, "content": content, **author}


async def serve_obvious(database: str) -> None:
    """The stack of ChatRTC, used as its documentation suggests."""
    import aiosqlite
    import socketio
    from aiohttp import web

    sio, counts = socketio.AsyncServer(async_mode="aiohttp"), Counter[int]()
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
        body = await request.json()
        channel, content = body["channel_id"], body["content"]
        if request.headers.get("Authorization") != "Bearer bench" or not content.strip():
            raise web.HTTPUnauthorized
        counts[channel] += 1
        message = message_payload(0, counts[channel], channel, content)
        cursor = await db.execute(INSERT, (channel, content, message["created_at"]))
        message["message_id"] = cursor.lastrowid
        await sio.emit("message:new", message, room=f"server:{channel}")
        return web.json_response(message, status=201)

    sio.on("connect", connect)
    sio.on("join_server", join_server)
    await serve_aiohttp(post, sio)


async def serve_empty(database: str) -> None:
    """A handler that parses the JSON of a post and answers."""
    from aiohttp import web

    async def post(request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response(message_payload(1, 1, body["channel_id"], body["content"]), status=201)

    await serve_aiohttp(post)


LEAST_TABLES = """
CREATE TABLE servers (server_id INTEGER PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE channels (channel_id INTEGER PRIMARY KEY, server_id INTEGER NOT NULL);
CREATE TABLE members (server_id INTEGER, user_id INTEGER, role TEXT NOT NULL, PRIMARY KEY (server_id, user_id)) WITHOUT ROWID;
CREATE TABLE messages (message_id INTEGER PRIMARY KEY, channel_id INTEGER NOT NULL, author_id INTEGER NOT NULL,
    content TEXT NOT NULL, created_at TEXT NOT NULL, seq INTEGER NOT NULL, nonce TEXT);
CREATE INDEX messages_by_channel ON messages (channel_id, message_id);
CREATE UNIQUE INDEX messages_by_nonce ON messages (author_id, nonce) WHERE nonce IS NOT NULL;
"""
LEAST_SQL = (  # who may post, the sequence number, the message
    "SELECT server_id, role FROM channels JOIN members USING (server_id) WHERE channel_id = ? AND user_id = 1",
    "UPDATE servers SET seq = seq + 1 WHERE server_id = ? RETURNING seq",
    "INSERT INTO messages (channel_id, author_id, content, created_at, seq) VALUES (?, 1, ?, ?, ?)",
)


async def serve_least(database: str) -> None:
    """A handler that parses the JSON of a post by msgspec, stores it by three statements on the thread of the event loop, with
    one commit for each of its turns, and answers. A chat on aiohttp and SQLite does all this and more for a post."""
    import msgspec
    from aiohttp import web

    db, loop, waiting = sqlite3.connect(database, isolation_level=None), asyncio.get_running_loop(), list[Any]()
    db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + LEAST_TABLES)
    db.execute("BEGIN")
    for server_id in range(1, 100):  # all that `prepare` below may answer with
        db.execute("INSERT INTO servers VALUES (?, 0)", (server_id,))
        db.execute("INSERT INTO channels VALUES (?, ?)", (server_id, server_id))
        db.execute("INSERT INTO members VALUES (?, 1, 'owner')", (server_id,))
    db.execute("COMMIT")
    may_post, number, insert = LEAST_SQL

    def commit() -> None:
        db.execute("COMMIT")
        for done in waiting:
            done.set_result(None)
        waiting.clear()

    async def post(request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        if not waiting:
            db.execute("BEGIN")
            loop.call_soon(commit)
        waiting.append(done := loop.create_future())
        channel, content = body["channel_id"], body["content"]
        server_id, _ = db.execute(may_post, (channel,)).fetchone()
        ((seq,),) = db.execute(number, (server_id,)).fetchall()
        message = message_payload(0, seq, channel, content)
        message["message_id"] = db.execute(insert, (channel, content, message["created_at"], seq)).lastrowid
        await done
        return web.Response(body=msgspec.json.encode(message), content_type="application/json", status=201)

    await serve_aiohttp(post)


async def serve_aiohttp(post: Callable[[Any], Any], sio: Any = None) -> None:
    """Run an application with `post` for messages and one answer to all other requests of the bench."""
    from aiohttp import web

    servers = itertools.count(1)

    async def prepare(request: web.Request) -> web.Response:
        number = next(servers)
        return web.json_response({"token": "bench", "server_id": number, "channels": [{"channel_id": number}]})

    app = web.Application()
    if sio is not None:
        sio.attach(app)
    app.add_routes([web.get("/healthz", prepare), web.post("/auth/register", prepare)])
    app.add_routes([web.post("/servers", prepare), web.post("/messages", post)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def text_frame(payload: bytes, mask: bytes = b"") -> bytes:
    """Return a WebSocket text frame of a server or, with a mask of four zeros, of a client."""
    size, bit = len(payload), 0x80 if mask else 0
    head = bytes((0x81, bit | size)) if size < 126 else bytes((0x81, bit | 126)) + size.to_bytes(2, "big")
    return head + mask + payload


def serve_ceiling() -> None:
    """One send per client and message. A new client gets all answers of its handshake at once, before it asks."""
    hello = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + text_frame(b"0{}") + text_frame(b"40{}")
    hello += text_frame(b'430[{"success":true}]')
    created = json.dumps({"token": "bench", "server_id": 1, "channels": [{"channel_id": 1}]}).encode()
    response = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b"
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
                message = json.dumps(message_payload(number, number, 1, body["content"])).encode()
                frame = text_frame(b'42["message:new",' + message + b"]")
                for client in clients.values():
                    client.send(frame)
                peer.send(response % (201, len(message), message))
            elif fd not in clients:
                peer.send(response % (200, len(created), created))


def serve_inline(name: str, database: str) -> None:
    """Run one of the servers above, in the process of `--serve NAME`."""
    if name == "ceiling":
        return serve_ceiling()
    main = {"obvious": serve_obvious, "least": serve_least}.get(name, serve_empty)(database)
    if name in ON_UVLOOP:
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


LABELS = {
    "chatrtc": "ChatRTC", "obvious": "obvious", "ceiling": "write ceiling", "node": "Node, commit per message",
    "turn": "Node, commit per turn", "empty": "empty aiohttp", "empty-uvloop": "empty aiohttp, uvloop",
    "least": "aiohttp and SQLite, the least",
}  # fmt: skip
DELIVERS = ("chatrtc", "obvious", "ceiling", "node", "turn")
READS = ("chatrtc", "node")
ON_UVLOOP = ("empty-uvloop", "least")
HANDLERS = ("empty", *ON_UVLOOP) if find_spec("uvloop") else ("empty",)


def takes_part(server: str, step: str) -> bool:
    """Return whether a step applies to a server: the ceiling stores nothing, the aiohttp handlers deliver nothing."""
    if step == "start":
        return server in ("chatrtc", "obvious", "node")
    return server != "ceiling" if step == "posts" else server in DELIVERS


@dataclass
class Server:
    """A running server process."""

    name: str
    process: subprocess.Popen[str]
    port: int = 0
    started: float = 0.0  # seconds from the start of the process to its first answer
    token: str = ""  # of the account that posts
    reader: str = ""  # token of the clients' account, which never posts: an author receives a `channel:read` for each post
    rooms: list[Room] = field(default_factory=list)
    others: list[Server] = field(default_factory=list)  # other processes on the same database

    def cpu_seconds(self) -> float:
        """Return the CPU time of all processes on the database."""
        return sum(cpu_seconds(server.process.pid) for server in (self, *self.others))

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, http: Http | None = None) -> Any:
        """Send one request, on a connection of its own unless one is given, and return the JSON of the answer."""
        connection = http or Http(self.port)
        connection.sock.settimeout(10)
        connection.send(request(method, path, self.token, body))
        while not (status := connection.receive()):
            pass
        if http is None:
            connection.sock.close()
        if status >= 300:
            raise BenchError(f"{self.name}: {method} {path} answered {status}: {connection.body!r}")
        return json.loads(connection.body) if connection.body else None

    def prepare(self, rooms: int = 1) -> None:
        """Register the accounts, and create servers of both until there are as many rooms."""
        if not self.token:
            accounts = ({"username": name, "password": "bench-chatrtc"} for name in ("bench", "reader"))
            self.token, self.reader = [self.call("POST", "/auth/register", account)["token"] for account in accounts]
        while len(self.rooms) < rooms:
            made = self.call("POST", "/servers", {"name": "bench"})
            self.rooms.append((made["server_id"], made["channels"][0]["channel_id"]))
            if self.name == "chatrtc":
                code = self.call("POST", f"/servers/{made['server_id']}/invites", {})["code"]
                replace(self, token=self.reader).call("POST", f"/invites/{code}")

    def enrol(self, server_id: int, count: int) -> list[str]:
        """Make `count` guests members of a server and return their tokens."""
        if self.name != "chatrtc":
            return [f"bench:{number}" for number in range(2, count + 2)]
        http = Http(self.port)
        code = self.call("POST", f"/servers/{server_id}/invites", {}, http)["code"]
        names = (f"member{server_id}-{number}" for number in range(count))
        return [self.call("POST", "/auth/guest", {"username": name, "code": code}, http)["token"] for name in names]

    def stop(self) -> None:
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
# A listener process holds many WebSocket clients. A room's stream is stored once (Feed); a client is an offset into it, and
# what it receives must be the bytes that follow. So checking a delivery costs a comparison in C, and only the client that is
# ahead of all others pays for parsing. Other packets (pings, acks) are handled frame by frame.

MESSAGE = b'42["message:new",'
SEQ = re.compile(rb'"seq": ?(\d+)')
DUE = re.compile(rb'"content": ?"(\d+) ')
CLOSED = 1 << 62  # the offset of a client whose connection the server has closed


class Feed:
    """The stream of one room: its bytes, and the end and the due time of each message."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report = report  # called with the number of messages that every client of this process has received
        self.seq: int | None = None
        self.offsets: list[int] = []  # of each client
        self.lowest, self.at_lowest = 0, 0  # the lowest offset, and the number of clients there
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.data, self.ends, self.due = bytearray(), [0], array("q", [0])
        self.log = array("q")  # time, offset before, offset after, for each read
        self.offsets = [offset if offset == CLOSED else 0 for offset in self.offsets]
        self.faults, self.closed = 0, 0
        self.update_lowest()

    def add_client(self) -> tuple[int, int]:
        """Add a client at the end of the stream and return its index and its offset."""
        self.offsets.append(self.ends[-1])
        self.update_lowest()
        return len(self.offsets) - 1, self.ends[-1]

    def offset_after(self, offset: int, message: bytes) -> int:
        """Return the offset after a message, which must be new or the next one of the stream."""
        if offset == len(self.data):
            self.add_message(message)
        elif not self.data.startswith(message, offset):
            self.faults += 1
        return self.ends[self.count(offset) + 1]

    def add_message(self, message: bytes) -> None:
        number, due = SEQ.search(message), DUE.search(message)
        seq = int(number[1]) if number else -1
        self.faults += self.seq is not None and seq != self.seq + 1
        self.seq = seq
        self.data += message
        self.ends.append(len(self.data))
        self.due.append(int(due[1]) if due else 0)

    def move_client(self, index: int, before: int, after: int) -> None:
        self.offsets[index] = after
        if self.recording and after > before:
            self.log.extend((time.monotonic_ns(), before, after))
        if before == self.lowest:
            self.at_lowest -= 1
            if not self.at_lowest:
                self.update_lowest()

    def update_lowest(self) -> None:
        self.lowest = min(self.offsets, default=0)
        self.at_lowest = self.offsets.count(self.lowest)
        self.report(self.count(self.lowest) if self.lowest < CLOSED else 0)

    def count(self, offset: int) -> int:
        """Return the number of messages that end at or before the offset."""
        return bisect_right(self.ends, offset) - 1

    def received(self) -> int:
        return sum(self.count(offset) for offset in self.offsets if offset < CLOSED)

    def latencies(self) -> Counter[int]:
        """Count the latencies of all deliveries in the log, in tenths of a millisecond."""
        found: Counter[int] = Counter()
        for now, before, after in zip(*[iter(self.log)] * 3, strict=True):
            for number in range(self.count(before) + 1, self.count(after) + 1):
                found[(now - self.due[number]) // 100_000] += 1
        self.log = array("q")
        return found


def upgrade_request(port: int) -> bytes:
    return (
        b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: Y2hhdHJ0Yy1iZW5jaC1rZQ==\r\n\r\n" % port
    )


class Client:
    """A WebSocket client that connects, authenticates in the handshake and joins a server."""

    def __init__(self, port: int, token: str, server_id: int, feed: Feed, after: int | None = None) -> None:
        self.token, self.feed = token, feed
        self.join = {"server_id": server_id} | ({} if after is None else {"after": after})
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setblocking(False)
        self.upgraded, self.joined, self.unparsed = False, False, b""
        self.index, self.offset = -1, 0  # its index among the feed's offsets, and that offset
        self.sock.send(upgrade_request(port))

    def send(self, text: str) -> None:
        self.sock.send(text_frame(text.encode(), mask=bytes(4)))

    def receive(self, chunk: memoryview) -> None:
        """Skip the bytes that the feed already has, and parse the others frame by frame."""
        if self.joined and not self.unparsed:
            known = chunk[: len(self.feed.data) - self.offset]
            if self.feed.data.startswith(known, self.offset):
                self.move_to(self.offset + len(known))
                chunk = chunk[len(known) :]
        if chunk:
            self.parse_frames(bytes(chunk)) if self.upgraded else self.parse_upgrade(bytes(chunk))

    def parse_upgrade(self, chunk: bytes) -> None:
        self.unparsed += chunk
        head, found, rest = self.unparsed.partition(b"\r\n\r\n")
        if found:
            if b" 101 " not in head:
                raise BenchError(f"no upgrade: {head[:200]!r}")
            self.upgraded, self.unparsed = True, b""
            self.parse_frames(rest)

    def parse_frames(self, chunk: bytes) -> None:
        """Go back to the start of an incomplete message, if any, and handle all complete frames."""
        feed, begun = self.feed, b""
        if self.joined:
            start = feed.ends[feed.count(self.offset)]
            begun = bytes(feed.data[start : self.offset])
            self.move_to(start)
        data, at = begun + self.unparsed + chunk, 0
        while (frame := find_frame(data, at))[1]:
            payload, end = frame
            if self.joined and data.startswith(MESSAGE, payload):
                self.move_to(feed.offset_after(self.offset, data[at:end]))
            else:
                self.handle_packet(data[payload:end])
            at = end
        self.unparsed = data[at:]
        if self.joined and self.unparsed and feed.data.startswith(self.unparsed, self.offset):
            self.move_to(self.offset + len(self.unparsed))
            self.unparsed = b""

    def move_to(self, offset: int) -> None:
        before, self.offset = self.offset, offset
        if before != offset:
            self.feed.move_client(self.index, before, offset)

    def handle_packet(self, payload: bytes) -> None:
        if payload == b"2":
            self.send("3")
        elif payload.startswith(b"0"):
            self.send("40" + json.dumps({"token": self.token}))
        elif payload.startswith(b"430"):
            if b'"success":true' not in payload.replace(b" ", b""):
                raise BenchError(f"join_server: {payload[:200]!r}")
            self.joined, self.index, self.offset = True, *self.feed.add_client()
        elif payload.startswith(b"40"):
            self.send(f'420["join_server",{json.dumps(self.join)}]')
        elif payload.startswith(b"44"):
            raise BenchError(f"connection rejected: {payload[:200]!r}")


CONNECTED = b'42["user:connected",'
USERS = re.compile(rb'"connected_users": ?\[([\d, ]*)\]')
USER = re.compile(rb'42\["user:connected",\{[^}]*"user_id": ?(\d+)')
PING_FRAME = b"\x81\x012"  # in text that is ASCII, nothing else has these bytes


class Crowd:
    """The members who connect at once, and what each must learn."""

    def __init__(self, total: int, messages: int) -> None:
        self.total, self.messages = total, messages  # members in all processes; messages that each has missed
        self.unaware: set[Member] = set()  # clients that have not yet learned that all members are connected
        self.faults = 0


class Member(Client):
    """A client that counts the members it learns about: those in the ack of `join_server`, and one by each event after it.
    A sampled one also compares their ids."""

    def __init__(self, port: int, token: str, server_id: int, crowd: Crowd, after: int | None, is_sampled: bool) -> None:
        super().__init__(port, token, server_id, Feed(lambda count: None), after)
        self.crowd, self.known, self.ids, self.sample = crowd, 0, list[bytes](), bytearray() if is_sampled else None

    def receive(self, chunk: memoryview) -> None:
        self.parse_frames(bytes(chunk)) if self.upgraded else self.parse_upgrade(bytes(chunk))

    def parse_frames(self, chunk: bytes) -> None:
        if not self.joined:
            data, at = self.unparsed + chunk, 0
            while not self.joined and (frame := find_frame(data, at))[1]:
                at = frame[1]
                self.handle_packet(data[frame[0] : at])
            self.unparsed, chunk = (b"", data[at:]) if self.joined else (data[at:], b"")
        if self.joined:
            self.count_events(chunk)

    def count_events(self, chunk: bytes) -> None:
        data = self.unparsed + chunk
        self.known += data.count(CONNECTED)
        if PING_FRAME in data:
            self.send("3")
        self.unparsed = data[1 - len(CONNECTED) :]
        if self.sample is not None:
            self.sample += chunk
        if self.known >= self.crowd.total and self in self.crowd.unaware:
            self.crowd.unaware.remove(self)
            ids = self.ids + USER.findall(self.sample or b"")
            is_wrong = self.sample is not None and (len(ids), len({*ids})) != (self.known, self.crowd.total)
            self.crowd.faults += self.known > self.crowd.total or is_wrong

    def handle_packet(self, payload: bytes) -> None:
        if not payload.startswith(b"430"):
            return super().handle_packet(payload)
        found = USERS.search(payload)
        if not found or payload.count(b'"content":') != self.crowd.messages:
            raise BenchError(f"join_server: {payload[:200]!r}")
        self.ids = found[1].replace(b" ", b"").split(b",") if self.sample is not None else []
        self.known, self.joined = found[1].count(b",") + 1, True
        return None


def find_frame(data: bytes, at: int) -> tuple[int, int]:
    """Return the start of the payload of the frame at `at` and its end, or (0, 0) if the frame is incomplete."""
    if len(data) < at + 2:
        return 0, 0
    size = data[at + 1]
    start = at + {126: 4, 127: 10}.get(size, 2)
    end = start + (size if size < 126 else int.from_bytes(data[at + 2 : start], "big"))
    return (start, end) if len(data) >= max(start, end) else (0, 0)


class Listener:
    """The process that holds the clients. The bench calls its methods over a pipe."""

    def __init__(self, control: Connection, progress: Any, wakeup: int) -> None:
        self.control, self.progress, self.wakeup = control, progress, wakeup
        self.poll = select.epoll()
        self.poll.register(control.fileno(), select.EPOLLIN)
        self.feeds: list[Feed] = []
        self.clients: dict[int, Client] = {}
        self.waiting: deque[Callable[[], Client]] = deque()  # make the clients that are still to connect
        self.handshakes, self.max_handshakes, self.is_joining, self.progressed = 0, HANDSHAKES, False, False
        self.crowd = Crowd(0, 0)
        self.buffer = memoryview(bytearray(1 << 18))

    def run(self) -> None:
        while True:
            for fd, _ in self.poll.poll():
                if fd == self.control.fileno():
                    self.obey()
                    break  # the command may have closed the next of these clients; for the others, `poll` returns again
                self.read(fd, self.clients[fd])
            if self.progressed:
                self.progressed = False
                os.eventfd_write(self.wakeup, 1)

    def obey(self) -> None:
        command, *arguments = self.control.recv()
        answer = getattr(self, command)(*arguments)
        if command not in ("join", "storm"):  # which answer when all clients have joined
            self.control.send(answer)

    def read(self, fd: int, client: Client) -> None:
        size, was_joined = 0, client.joined
        with suppress(ConnectionError):
            size = client.sock.recv_into(self.buffer)
        if not size:
            return self.remove_client(fd, client)
        client.receive(self.buffer[:size])
        if client.joined and not was_joined:
            self.handshakes -= 1
            self.connect_clients()
        elif self.is_joining:
            self.answer_join()
        return None

    def remove_client(self, fd: int, client: Client) -> None:
        """Count a connection that the server has closed."""
        self.poll.unregister(fd)
        self.clients.pop(fd).sock.close()
        if not client.joined or isinstance(client, Member):
            raise BenchError("the server closed a connection while clients connected")
        client.feed.closed += 1
        client.feed.offsets[client.index] = CLOSED
        client.feed.update_lowest()

    def join(self, port: int, tokens: list[str], rooms: list[int], each: int, counted: bool) -> None:
        """Connect `each` clients to every room, with the tokens in turn; answer when all have joined."""
        for number, server_id in enumerate(rooms):
            feed = Feed(partial(self.report, number) if counted else lambda count: None)
            if counted:
                self.feeds.append(feed)
            self.waiting.extend(partial(Client, port, tokens[i % len(tokens)], server_id, feed) for i in range(each))
        self.max_handshakes = HANDSHAKES
        self.connect_clients()

    def storm(self, port: int, tokens: list[str], server_id: int, after: int | None, total: int) -> None:
        """Connect one client for each token; answer when each knows that all `total` members are connected."""
        self.crowd = Crowd(total, 0 if after is None else MISSED)

        for number, token in enumerate(tokens):
            self.waiting.append(partial(Member, port, token, server_id, self.crowd, after, number % 50 == 0))
        self.max_handshakes = STORM_HANDSHAKES
        self.connect_clients()

    def report(self, number: int, count: int) -> None:
        self.progress[number] = count
        self.progressed = True

    def connect_clients(self) -> None:
        self.is_joining = True
        while self.waiting and self.handshakes < self.max_handshakes:
            client = self.waiting.popleft()()
            self.clients[client.sock.fileno()] = client
            if isinstance(client, Member):
                self.crowd.unaware.add(client)
            self.poll.register(client.sock, select.EPOLLIN)
            self.handshakes += 1
        self.answer_join()

    def answer_join(self) -> None:
        if not self.waiting and not self.handshakes and not self.crowd.unaware:
            self.is_joining = False
            self.control.send(self.crowd.faults)

    def counts(self) -> list[tuple[int, int, int, int]]:
        """Return for each room: clients, messages received by all of them together, faults, closed connections."""
        return [(len(f.offsets), f.received(), f.faults, f.closed) for f in self.feeds]

    def reset(self) -> None:
        """Start counting anew; between two measurements nothing is under way."""
        for client in self.clients.values():
            client.offset = 0
        for feed in self.feeds:
            feed.reset()

    def record(self, on: bool) -> None:
        for feed in self.feeds:
            feed.recording = on

    def latencies(self) -> Counter[int]:
        return sum((feed.latencies() for feed in self.feeds), Counter())

    def leave(self) -> None:
        for client in self.clients.values():
            self.poll.unregister(client.sock)
            client.sock.close()
        self.clients, self.feeds, self.crowd = {}, [], Crowd(0, 0)
        self.progress[:] = [0] * len(self.progress)


# ---- Sender ------------------------------------------------------------
# The process that posts, or reads, over keep-alive connections: as fast as the window allows, or on a schedule. A message
# carries its due time, so that a late sender makes the latency longer.


class Http:
    """A keep-alive connection with one outstanding request."""

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
        """Return the status if the answer is complete, else 0."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise BenchError("the server closed a connection that posts")
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        size = self.length.search(head)
        if not found or (size and len(body) < int(size[1])):
            return 0
        self.body, self.buffer = body, b""
        return int(head[9:12])


class Emitter(Http):
    """A Socket.IO connection with one outstanding `message:send`."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(port)
        self.sock.settimeout(10)
        self.sock.sendall(upgrade_request(port))
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.sock.recv(1 << 16)
        self.sock.sendall(text_frame(b"40" + json.dumps({"token": token}).encode(), mask=bytes(4)))
        while not re.search(rb"40\{.*\}$", self.buffer):
            self.buffer += self.sock.recv(1 << 16)
        self.buffer = b""
        self.sock.setblocking(False)

    def receive(self) -> int:
        """Return the status if the ack is complete, else 0."""
        self.buffer += self.sock.recv(1 << 18)
        while (frame := find_frame(self.buffer, 0))[1]:
            self.body, self.buffer = self.buffer[frame[0] : frame[1]], self.buffer[frame[1] :]
            if self.body == b"2":
                self.sock.sendall(text_frame(b"3", mask=bytes(4)))
            elif self.body.startswith(b"430"):
                return 201 if b'"success":true' in self.body else 500
        return 0


@dataclass
class Work:
    """A job for the sender, which does it until it receives `stop`."""

    port: int
    token: str
    channels: list[int] = field(default_factory=list)  # post to these in turn
    reads: list[str] = field(default_factory=list)  # or get these paths in turn
    window: int = 0  # outstanding messages in a channel; 0: as many as there are connections
    rate: float = 0.0  # messages per second; 0: as fast as the window allows
    connections: int = WINDOW
    more_ports: list[int] = field(default_factory=list)  # of other processes, to which connections go in turn
    by_event: bool = False  # post by `message:send`
    text: str = ""  # in each message


class Sender:
    """One job, from its first request to its last answer."""

    def __init__(self, work: Work, control: Connection, wakeup: int, progress: list[Any]) -> None:
        self.work, self.control, self.wakeup, self.progress = work, control, wakeup, progress
        self.poll = select.epoll()
        ports = [work.port, *work.more_ports]
        connect = partial(Emitter, token=work.token) if work.by_event else Http
        self.idle: list[Http] = [connect(ports[i % len(ports)]) for i in range(work.connections)]
        self.connections = {http.sock.fileno(): http for http in self.idle}
        self.sent, self.answered, self.stopping = 0, 0, False
        self.times = array("q")
        self.start = time.monotonic_ns()
        for fd in (*self.connections, control.fileno(), wakeup):
            self.poll.register(fd, select.EPOLLIN)
        head = request("POST", "/messages", work.token).split(b"Content-Length")[0]
        self.post = head.replace(b"%", b"%%") + b"Content-Length: %d\r\n\r\n%b"

    def run(self) -> None:
        while self.answered < self.sent or not self.stopping:
            while self.idle and not self.stopping and self.may_send():
                self.idle.pop().send(self.next_request())
                self.sent += 1
            pause = 1.0
            if self.work.rate and self.idle and not self.stopping:
                pause = max(0.0, (self.due() - time.monotonic_ns()) / 1e9)
            # poll rounds to milliseconds, select does not, and an epoll can be selected.
            select.select([self.poll], [], [], pause)
            for fd, _ in self.poll.poll(0):
                self.handle(fd)
        for http in self.connections.values():
            http.sock.close()

    def handle(self, fd: int) -> None:
        if http := self.connections.get(fd):
            if status := http.receive():
                if status >= 300:
                    raise BenchError(f"a request was answered {status}: {http.body[:200]!r}")
                self.answered += 1
                self.times.append(time.monotonic_ns() - http.sent)
                self.idle.append(http)
        elif fd == self.wakeup:
            os.eventfd_read(self.wakeup)
        else:
            self.obey(self.control.recv())

    def obey(self, command: str) -> None:
        """Stop, or send the number of answers so far; `reset` also discards the times so far."""
        if command == "stop":
            self.stopping = True
            return
        if command == "reset":
            self.times = array("q")
        self.control.send(self.answered)

    def due(self) -> int:
        return self.start + int(self.sent / self.work.rate * 1e9)

    def may_send(self) -> bool:
        if self.work.rate:
            return self.due() <= time.monotonic_ns()
        if not self.work.window:
            return True
        rooms = range(len(self.work.channels))
        received: int = sum(min(part[room] for part in self.progress) for room in rooms)
        return self.sent - received < self.work.window * len(rooms)

    def next_request(self) -> bytes:
        work = self.work
        if work.reads:
            return request("GET", work.reads[self.sent % len(work.reads)], work.token)
        content = b"%d %b" % (self.due() if work.rate else time.monotonic_ns(), work.text.encode())
        channel = work.channels[self.sent % len(work.channels)]
        body = b'{"channel_id":%d,"content":"%b"}' % (channel, content.ljust(CONTENT, b"x"))
        if work.by_event:
            return text_frame(b'420["message:send",' + body + b"]", mask=bytes(4))
        return self.post % (len(body), body)


def run_sender(control: Connection, progress: list[Any], wakeup: int) -> None:
    while True:
        sender = Sender(control.recv(), control, wakeup, progress)
        control.send("started")
        sender.run()
        times = sorted(sender.times)
        control.send((sender.sent, [times[int(len(times) * p)] / 1e6 for p in (0.5, 0.99)] if times else []))


def run_child(target: Callable[..., None], control: Connection, cpu: int, *arguments: Any) -> None:
    """Run a client process on its core; ignore Ctrl-C and send an error to the bench."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.sched_setaffinity(0, {cpu})
    try:
        target(control, *arguments)
    except (BenchError, OSError) as error:
        with suppress(OSError):
            control.send(BenchError(str(error)))


# ---- Bench -------------------------------------------------------------
# Starts and ends the processes, and measures between two moments.


@dataclass
class Span:
    """The figures between two moments."""

    deliveries: float  # per second
    answers: float  # per second
    cpu: float  # seconds of the server
    seconds: float
    idle: float  # share of the busiest core of the client processes


class Bench:
    """The client processes, and one server at a time."""

    def __init__(self, plan: Plan, cpus: list[int], directory: Path, chatrtc: Path) -> None:
        self.plan, self.directory, self.chatrtc, self.cpus = plan, directory, chatrtc, cpus
        self.server_cpu, others = cpus[0], cpus[1:] or cpus
        self.context = multiprocessing.get_context("fork")
        self.processes: list[tuple[int, Any]] = []  # with their cores
        self.servers: list[Server] = []
        self.redis: subprocess.Popen[bytes] | None = None
        self.redis_port = 0
        self.number = 0
        self.results: dict[tuple[str, str], list[float]] = defaultdict(list)
        wakeup = os.eventfd(0, os.EFD_NONBLOCK)
        shared = [self.context.RawArray("Q", 128) for _ in range(max(1, len(others) - 1))]
        listen, count = lambda *arguments: Listener(*arguments).run(), len(others)
        self.listeners = [self.spawn(listen, others[i % count], progress, wakeup) for i, progress in enumerate(shared)]
        self.sender = self.spawn(run_sender, others[-1], shared, wakeup)
        os.sched_setaffinity(0, set(others))

    def spawn(self, target: Callable[..., None], cpu: int, *arguments: Any) -> Connection:
        """Start a client process and return the pipe to it."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=run_child, args=(target, theirs, cpu, *arguments), daemon=True)
        process.start()
        theirs.close()
        self.processes.append((cpu, process))
        return ours

    def end(self) -> None:
        for server in self.servers:
            server.stop()
        if self.redis is not None:
            self.redis.kill()
            self.redis.wait()
        for _, process in self.processes:
            process.kill()
            process.join(5)

    def send(self, pipe: Connection, *command: Any) -> None:
        with suppress(BrokenPipeError):  # a process that failed has sent its error
            pipe.send(command[0] if pipe is self.sender else command)

    def answer(self, pipe: Connection, within: float = 30) -> Any:
        if not pipe.poll(within):
            raise BenchError(f"no answer from a client process within {within:.0f} s")
        try:
            answer = pipe.recv()
        except EOFError:
            raise BenchError("a client process has died") from None
        if isinstance(answer, BenchError):
            raise answer
        return answer

    def ask_sender(self, command: Any, within: float = 30) -> Any:
        self.send(self.sender, command)
        return self.answer(self.sender, within)

    def ask_listeners(self, *command: Any) -> list[Any]:
        for pipe in self.listeners:
            self.send(pipe, *command)
        return [self.answer(pipe) for pipe in self.listeners]

    # -- servers --

    def command(self, name: str, database: Path) -> list[str]:
        if name in ("chatrtc", "installed"):
            options = ["--port", "0", "--database", str(database), "--no-rate-limit"]
            start = [str(self.chatrtc)] if name == "chatrtc" else ["-c", self.install()]
            return [sys.executable, *start, "serve", *options]
        if name in PROGRAMS:
            self.install()
            return [sys.executable, "-c", PROGRAMS[name], str(database), str(self.directory / "installed")]
        if name in ("node", "turn"):
            script = self.directory / "server.js"
            script.write_text(NODE)
            return ["node", str(script), str(database), name, TABLE, INSERT, PAGE, SEARCH]
        return [sys.executable, str(Path(__file__).resolve()), "--serve", name, "--database", str(database)]

    def install(self) -> str:
        """Copy the files of the wheel into a folder, compile them, and return the code that starts ChatRTC from there."""
        folder = self.directory / "installed"
        if not folder.exists():
            folder.mkdir()
            for source, target in (("chatrtc.py",) * 2, ("chatrtc.html",) * 2, ("schema.sql", "chatrtc.sql")):
                shutil.copy(self.chatrtc.parent / source, folder / target)
            py_compile.compile(str(folder / "chatrtc.py"), doraise=True)
        return f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv[0] = 'chatrtc'; import chatrtc; chatrtc.main()"

    def launch(self, name: str, database: Path | None = None, options: Names = (), cpu: int | None = None) -> Server:
        """Start a server on its core and wait for its first answer."""
        self.number += 1
        if database is None:
            folder = self.directory / f"{self.number}-{name}"
            folder.mkdir()
            database = folder / "bench.db"
        command, pipe, env = (
            [*self.command(name, database), *options],
            subprocess.PIPE,
            {**os.environ, "NODE_PATH": str(node_modules() or "")},
        )
        log = (self.directory / f"{self.number}-{name}.log").open("w+")
        before = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=pipe, stderr=log, text=True, env=env, start_new_session=True, cwd=database.parent,
            preexec_fn=lambda: os.sched_setaffinity(0, {self.server_cpu if cpu is None else cpu}),
        )  # fmt: skip
        server = Server(name, process)
        self.servers.append(server)
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 20)[0]
        found = re.search(r"http://[^:]+:(\d+)", process.stdout.readline()) if ready else None
        if not found:
            log.seek(0)
            raise BenchError(f"{name} does not start: {log.read()[-2000:]}")
        server.port = int(found[1])
        if name not in ("ceiling", "libraries", "code"):
            server.call("GET", "/healthz")
        server.started = time.perf_counter() - before
        return server

    def launch_processes(self, count: int) -> Server:
        """Start `count` servers with --redis on one database, each on a core; 0: one without. Return the first."""
        folder = self.directory / f"{self.number}-processes"
        folder.mkdir()
        options = ("--redis", f"redis://127.0.0.1:{self.start_redis()}") if count else ()
        servers = [
            self.launch("chatrtc", folder / "bench.db", options, self.cpus[i % len(self.cpus)]) for i in range(max(1, count))
        ]
        servers[0].prepare()
        for server in servers[1:]:
            server.token, server.reader, server.rooms = servers[0].token, servers[0].reader, servers[0].rooms
        servers[0].others = servers[1:]
        return servers[0]

    def start_redis(self) -> int:
        """Start Redis, without persistence and on the core of the clients, unless it runs. Return its port."""
        if self.redis is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.redis_port = int(probe.getsockname()[1])
            options = ("--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
            self.redis = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL, start_new_session=True)
            time.sleep(0.5)
        return self.redis_port

    def stop(self, *servers: Server) -> None:
        for server in servers:
            self.stop(*server.others)
            server.stop()
            self.servers.remove(server)

    # -- measuring --

    def join(
        self, server: Server, rooms: list[Room], clients: int, counted: bool = True, tokens: list[str] | None = None
    ) -> float:
        """Connect clients, spread over rooms and processes, and return the seconds that it took."""
        ids, spread, before = [room[0] for room in rooms], len(self.listeners), time.perf_counter()
        each = clients // len(ids)
        for i, pipe in enumerate(self.listeners):
            here = each // spread + (i < each % spread)
            self.send(pipe, "join", server.port, tokens or [server.reader], ids, here, counted)
        for pipe in self.listeners:
            self.answer(pipe, within=180)
        return time.perf_counter() - before

    def storm(self, server: Server, key: str, tokens: list[str], after: int | None = None) -> None:
        """Connect all members at once and note the time until each knows that all are connected, and the server's CPU time."""
        spread, before, cpu = len(self.listeners), time.perf_counter(), server.cpu_seconds()
        for i, pipe in enumerate(self.listeners):
            self.send(pipe, "storm", server.port, tokens[i::spread], server.rooms[0][0], after, len(tokens))
        faults = sum(self.answer(pipe, within=180) for pipe in self.listeners)
        took, cpu = time.perf_counter() - before, server.cpu_seconds() - cpu
        figures = {f"{key} ms": took * 1000, f"{key} CPU ms": cpu * 1000, "faults": faults}
        self.note(server, figures | {"counted": len(tokens) ** 2})
        self.leave(server)

    def leave(self, server: Server) -> None:
        """Disconnect all clients and wait until the server is idle."""
        self.ask_listeners("leave")
        for _ in range(50):
            before = server.cpu_seconds()
            time.sleep(0.2)
            if server.cpu_seconds() - before < 0.04 * (1 + len(server.others)):
                break

    def counts(self) -> list[list[int]]:
        """Return for each room, over all processes: clients, messages received, faults, closed connections."""
        answers = self.ask_listeners("counts")
        return [[sum(column) for column in zip(*room, strict=True)] for room in zip(*answers, strict=True)]

    def sample(self, server: Server) -> list[float]:
        """Return the time, deliveries, answers, CPU time of the server, and CPU time of the clients of each core."""
        answers = self.ask_sender("answered")
        deliveries = sum(room[1] for room in self.counts())
        clients: defaultdict[int, float] = defaultdict(float)
        for core, process in self.processes:
            clients[core] += cpu_seconds(process.pid)
        return [time.perf_counter(), deliveries, answers, server.cpu_seconds(), *clients.values()]

    def measure(self, server: Server, seconds: float) -> Span:
        before = self.sample(server)
        time.sleep(seconds)
        took, deliveries, answers, cpu, *clients = (b - a for a, b in zip(before, self.sample(server), strict=True))
        return Span(deliveries / took, answers / took, cpu, took, 1 - min(1.0, max(clients) / took))

    def note(self, server: Server, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            self.results[server.name, key].append(value)

    def note_rate(self, server: Server, key: str, span: Span, rate: float) -> None:
        """Note a rate, the server's CPU time in microseconds for each event of it, and the idle share of the clients."""
        cpu_us = span.cpu / max(1.0, rate * span.seconds) * 1e6
        self.note(server, {f"{key} /s": rate, f"{key} us": cpu_us, f"{key} idle %": span.idle * 100})

    def median(self, server: str, key: str) -> float | None:
        values = self.results.get((server, key))
        return statistics.median(values) if values else None

    def run_work(self, server: Server, work: Work, record: bool = False) -> tuple[Span, list[float]]:
        """Do the work and return its steady part and [p50, p99] of the answers in ms; check all deliveries."""
        self.ask_listeners("reset")
        self.ask_sender(work)
        time.sleep(self.plan.warm)
        self.ask_listeners("record", record)
        self.ask_sender("reset")
        span = self.measure(server, 1.0 if work.reads else self.plan.seconds)
        self.ask_listeners("record", False)
        sent, times = self.ask_sender("stop", within=90)
        if work.channels:
            self.check_deliveries(server, work, sent)
        return span, times

    def check_deliveries(self, server: Server, work: Work, sent: int) -> None:
        """Count the messages that a client did not receive once and in order, after waiting for late ones."""
        rooms = len(work.channels)
        posted = [sent // rooms + (room < sent % rooms) for room in range(rooms)]
        before, deadline = None, time.monotonic() + 30
        while (now := self.counts()) != before and time.monotonic() < deadline:
            before = now
            time.sleep(0.3)
        for messages, (clients, received, faults, closed) in zip(posted, now, strict=False):
            lost = abs(clients * messages - received)
            self.note(server, {"lost": lost, "faults": faults, "closed": closed, "counted": received})


# ---- Scenarios ---------------------------------------------------------
# The measurements. A scenario notes figures; the report interprets them.


def visit(bench: Bench, name: str, steps: set[str]) -> None:
    """Measure one process of one server: its start, its connections, its fan-out, its posts."""
    server = bench.launch(name)
    if takes_part(name, "start"):
        bench.note(server, {"start ms": server.started * 1000, "idle MiB": rss_kib(server.process.pid) / 1024})
    server.prepare()
    if steps & {"connect", "fanout1000", "latency"} and takes_part(name, "connect"):
        connect_all(bench, server, steps)
    if "fanout100" in steps and takes_part(name, "fanout100"):
        bench.join(server, server.rooms, bench.plan.few)
        fan_out(bench, server, "few", server.rooms)
        bench.leave(server)
    if "posts" in steps and takes_part(name, "posts"):
        durable_posts(bench, server, server.rooms[0], "posts")
    bench.stop(server)


def connect_all(bench: Bench, server: Server, steps: set[str]) -> None:
    """Connect all clients to one room; measure that, their fan-out and their latency."""
    plan, before = bench.plan, rss_kib(server.process.pid)
    seconds = bench.join(server, server.rooms, plan.clients)
    memory = (rss_kib(server.process.pid) - before) / plan.clients
    bench.note(server, {"connect ms": seconds * 1000, "KiB a connection": memory})
    if steps & {"fanout1000", "latency"}:
        rate = fan_out(bench, server, "all", server.rooms) / plan.clients / 2
        if "latency" in steps:
            latency(bench, server, rate, "half")
            if server.name == "chatrtc" and (node := bench.median("node", "all /s")):
                latency(bench, server, node / plan.clients / 2, "node")
    bench.leave(server)


def fan_out(bench: Bench, server: Server, key: str, rooms: list[Room]) -> float:
    """Measure and return the deliveries per second with 64 outstanding messages in every room."""
    channels = [channel for _, channel in rooms]
    span, _ = bench.run_work(server, Work(server.port, server.token, channels, window=WINDOW))
    bench.note_rate(server, key, span, span.deliveries)
    return span.deliveries


def latency(bench: Bench, server: Server, rate: float, key: str) -> None:
    """Measure the time from the moment a message was due to its receipt, over all deliveries."""
    work = Work(server.port, server.token, [server.rooms[0][1]], rate=max(rate, 2))
    bench.run_work(server, work, record=True)
    found: Counter[int] = sum(bench.ask_listeners("latencies"), Counter())
    figures = {f"{key} p{share} ms": percentile(found, share / 100) for share in (50, 99)}
    bench.note(server, figures | {f"{key} rate": rate})


def percentile(found: Counter[int], share: float) -> float:
    """Return a percentile, in milliseconds, of latencies that are counted in tenths of a millisecond."""
    left = sum(found.values()) * share
    for value in sorted(found):
        left -= found[value]
        if left <= 0:
            return value / 10
    return float("nan")


def durable_posts(bench: Bench, server: Server, room: Room, key: str, **more: Any) -> None:
    """Post over 64 connections, each as soon as it has its answer; no client is in the room. `more`: fields of Work."""
    more_ports = [other.port for other in server.others]
    span, times = bench.run_work(server, Work(server.port, server.token, [room[1]], more_ports=more_ports, **more))
    bench.note_rate(server, key, span, span.answers)
    bench.note(server, {f"{key} p99 ms": times[1]})


def growth(bench: Bench) -> None:
    """Compare clients in ten rooms with as many in one, all receiving the same number of messages per second."""
    server = bench.launch("chatrtc")
    server.prepare(10)
    for _ in range(bench.plan.runs):
        for key, rooms in (("one", server.rooms[:1]), ("ten", server.rooms)):
            channels = [channel for _, channel in rooms]
            work = Work(server.port, server.token, channels, rate=PACE * len(rooms))
            without, _ = bench.run_work(server, work)  # ten rooms take ten times the posts, whose cost is subtracted
            bench.join(server, rooms, bench.plan.clients)
            span, _ = bench.run_work(server, work)
            bench.leave(server)
            added = span.cpu / span.seconds - without.cpu / without.seconds
            bench.note(server, {f"{key} us": added / span.deliveries * 1e6})
    bench.stop(server)


def idle_clients(bench: Bench) -> None:
    """Measure posts and fan-out without and with many idle clients connected to another server."""
    server = bench.launch("chatrtc")
    server.prepare(3)
    for _ in range(bench.plan.runs):
        for key, idle in (("alone", 0), ("crowd", bench.plan.idle)):
            bench.join(server, server.rooms[1:2], idle, counted=False)
            durable_posts(bench, server, server.rooms[2], f"{key} posts")
            bench.join(server, server.rooms[:1], bench.plan.clients)
            fan_out(bench, server, key, server.rooms[:1])
            bench.leave(server)
    bench.stop(server)


def processes(bench: Bench, count: int) -> None:
    """Post to all of `count` servers on one database (0: one without --redis), then slowly to the first one, with clients on
    the first and then on another one."""
    server = bench.launch_processes(count)
    time.sleep(1.5)  # until they have found Redis and each other
    durable_posts(bench, server, server.rooms[0], f"shared{count} posts")
    for key, place in zip(("own", "other"), (server, *server.others[:1]), strict=False):
        bench.join(place, server.rooms, 10)
        latency(bench, server, PACE, f"shared{count} {key}")
        bench.leave(server)
    bench.stop(server)


def installed(bench: Bench) -> None:
    """Measure the start and the memory of an installed program, of which Python keeps compiled code only, and then those of
    programs that only import the libraries, only import chatrtc, or answer one route."""
    for name in ("installed", *PROGRAMS):
        server = bench.launch(name)
        figures = {f"{name} ms": server.started * 1000, f"{name} MiB": rss_kib(server.process.pid) / 1024}
        bench.note(replace(server, name="chatrtc"), figures)
        bench.stop(server)


def storm(bench: Bench, name: str) -> None:
    """Let different members connect, authenticate and join at once: without missed messages, with them, and twice as many."""
    server, few = bench.launch(name), bench.plan.storm
    server.prepare()
    tokens = server.enrol(server.rooms[0][0], 2 * few if name == "chatrtc" else few)
    bench.storm(server, "storm", tokens[:few])
    if name == "chatrtc":
        server_id, channel = server.rooms[0]
        after = server.call("GET", f"/servers/{server_id}/changes?after=0")["seq"]
        for number in range(MISSED):
            server.call("POST", "/messages", {"channel_id": channel, "content": f"{number} ".ljust(CONTENT, "x")})
        bench.storm(server, "storm after", tokens[:few], after)
        bench.storm(server, "storm twice", tokens)
    bench.stop(server)


def ways(bench: Bench) -> None:
    """Compare ways to post, in turns: by HTTP, by an event, with an `@` for nobody and for a member, with few members and with
    many. The aiohttp handlers take part. Each measurement is split into short ones, so that other load on the machine slows all
    ways alike."""
    server, others = bench.launch("chatrtc"), [bench.launch(name) for name in HANDLERS]
    for other in others:
        other.prepare()
    server.prepare(2)
    for (server_id, _), members in zip(server.rooms, (FEW_MEMBERS, bench.plan.members), strict=True):
        server.enrol(server_id, members - 1)
    posts = partial(durable_posts, bench, server)
    steps = [partial(durable_posts, bench, other, other.rooms[0], "few plain") for other in others]
    steps.append(partial(posts, server.rooms[0], "event", by_event=True))
    for size, room in zip(("few", "many"), server.rooms, strict=True):
        steps.append(partial(posts, room, f"{size} plain", text="nobody-here "))  # so that all index as many words
        steps.append(partial(posts, room, f"{size} nobody", text="@nobody-here "))
        steps.append(partial(posts, room, f"{size} member", text=f"@member{room[0]}-1 "))
    plan = bench.plan
    bench.plan = replace(plan, seconds=plan.seconds / WAYS_TURNS, warm=plan.warm / WAYS_TURNS)
    for turn in range(plan.runs * WAYS_TURNS):
        for step in steps[turn % len(steps) :] + steps[: turn % len(steps)]:  # so that none is always first
            step()
    bench.plan = plan
    bench.stop(server, *others)


def small_rooms(bench: Bench, name: str) -> None:
    """Measure deliveries with many small rooms."""
    server = bench.launch(name)
    server.prepare(max(rooms for rooms, _ in SMALL_ROOMS))
    for rooms, each in SMALL_ROOMS:
        bench.join(server, server.rooms[:rooms], rooms * each)
        fan_out(bench, server, f"small{each}", server.rooms[:rooms])
        bench.leave(server)
    bench.stop(server)


def idle_sockets(bench: Bench) -> None:
    """Measure the CPU time and the memory of sockets that only answer pings."""
    server, count = bench.launch("chatrtc"), bench.plan.sockets
    server.prepare()
    tokens = server.enrol(server.rooms[0][0], 100)
    before = rss_kib(server.process.pid)
    bench.join(server, server.rooms, count, counted=False, tokens=tokens)
    time.sleep(PING_SECONDS / 4)
    cpu = server.cpu_seconds()
    time.sleep(PING_SECONDS)
    cpu = server.cpu_seconds() - cpu
    memory = (rss_kib(server.process.pid) - before) / count
    bench.note(server, {"socket us": cpu / PING_SECONDS / count * 1e6, "socket KiB": memory})
    bench.leave(server)
    bench.stop(server)


SERVERS, CHANNELS = 15, 21  # of the user whose page reconnects
PAGE_QUIET_SECONDS = 3.0  # the page has everything once it has received nothing for this time
KEEP_SESSION = "session => localStorage.setItem('chatrtc::session', JSON.stringify(session))"


class Traffic:
    """The requests and responses of a page, as the browser reports them."""

    def __init__(self, devtools: Any) -> None:
        self.reset()
        devtools.on("Network.requestWillBeSent", lambda event: self.add(1, 0))
        devtools.on("Network.loadingFinished", lambda event: self.add(0, int(event["encodedDataLength"])))
        devtools.on("Network.webSocketFrameReceived", lambda event: self.add(0, len(event["response"]["payloadData"])))
        devtools.send("Network.enable")

    def reset(self) -> None:
        self.requests, self.size, self.seen_at = 0, 0, time.monotonic()

    def add(self, requests: int, size: int) -> None:
        self.requests, self.size, self.seen_at = self.requests + requests, self.size + size, time.monotonic()

    def wait_until_quiet(self, page: Any) -> None:
        while time.monotonic() - self.seen_at < PAGE_QUIET_SECONDS:
            page.wait_for_timeout(100)


def page_reconnects(bench: Bench) -> None:
    """Restart the server under a page, and count what the page requests and receives until it is up to date."""
    from playwright.sync_api import sync_playwright

    database = bench.directory / "page.db"
    server = bench.launch("chatrtc", database)
    server.prepare(SERVERS)
    account = server.call("GET", "/users/me")
    for number in range(CHANNELS - SERVERS):
        server.call("POST", f"/servers/{server.rooms[number][0]}/channels", {"name": f"more-{number}"})
    session = {"user_id": account["user_id"], "username": account["username"], "token": server.token}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.evaluate(KEEP_SESSION, session)
        traffic = Traffic(page.context.new_cdp_session(page))
        page.reload()
        traffic.wait_until_quiet(page)
        bench.stop(server)
        restarted = bench.launch("chatrtc", database, ("--port", str(server.port)))
        traffic.reset()
        with page.expect_event("websocket", timeout=60_000):
            pass
        traffic.wait_until_quiet(page)
        bench.note(server, {"page requests": traffic.requests, "page kB": traffic.size / 1000})
        traffic.reset()
        page.reload()
        traffic.wait_until_quiet(page)
        bench.note(server, {"reload kB": traffic.size / 1000})
        browser.close()
    bench.stop(restarted)


# ---- History -----------------------------------------------------------
# A million messages, inserted into the databases by plain SQL. Each server has a database of its own; all run at the same
# time and are measured in turns.

WORDS = ("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett")
QUERIES = ("alpha", "bravo n17", "m4321", "echo m765")  # in a tenth of the rows, and in ever fewer
INSERT_CHATRTC = """INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq)
    SELECT server_id, :channel, 1, :content, '2025-01-01T00:00:00Z', seq + :number FROM servers
    WHERE server_id = :server"""
INDEX_CHATRTC = """
    UPDATE servers SET seq = (SELECT max(seq) FROM messages m WHERE m.server_id = servers.server_id);
    INSERT INTO messages_fts (rowid, content, server_id) SELECT message_id, content, server_id FROM messages;
    UPDATE search SET indexed_id = (SELECT max(message_id) FROM messages);
"""
INSERT_OTHERS = "INSERT INTO messages VALUES (:number, :channel, 1, :content, '2025-01-01T00:00:00Z')"
INDEX_OTHERS = "INSERT INTO found (rowid, content) SELECT id, content FROM messages"


def content_of(number: int) -> str:
    words = " ".join(WORDS[number // 10**k % 10] for k in range(3))
    return f"{words} n{number % 997} m{number % 9973} the quick brown fox jumps over the lazy dog"


def insert_history(database: Path, server: Server, rows: int) -> None:
    ours = server.name == "chatrtc"
    db = sqlite3.connect(database)
    db.execute("PRAGMA synchronous = OFF")
    names = ("server", "channel", "number", "content")
    values = (dict(zip(names, (*server.rooms[0], n, content_of(n)), strict=True)) for n in range(1, rows + 1))
    db.executemany(INSERT_CHATRTC if ours else INSERT_OTHERS, values)
    db.commit()
    db.executescript(INDEX_CHATRTC if ours else INDEX_OTHERS)
    db.close()


def start_with_history(bench: Bench, name: str, servers: list[Server]) -> None:
    """Start a server to create its database, insert the messages, and start it again."""
    folder = bench.directory / f"history-{name}"
    folder.mkdir()
    first = bench.launch(name, folder / "bench.db")
    first.prepare()
    bench.stop(first)
    insert_history(folder / "bench.db", first, bench.plan.rows)
    server = bench.launch(name, folder / "bench.db")
    server.token, server.rooms = first.token, first.rooms
    servers.append(server)


def history(bench: Bench, servers: list[Server]) -> None:
    """Read the newest page and a deep one, over one connection and over 16; search, over one."""
    for server in servers:
        server_id, channel = server.rooms[0]
        page, half = f"/channels/{channel}/messages?limit=50", bench.plan.rows // 2
        deep = [f"{page}&before={half + 997 * k}" for k in range(50)]
        searches = [f"/servers/{server_id}/search?q={q.replace(' ', '%20')}" for q in QUERIES]
        for key, paths in (("newest", [page]), ("deep", deep), ("search", searches)):
            work = Work(server.port, server.token, reads=paths, connections=1)
            _, times = bench.run_work(server, work)
            bench.note(server, {f"{key} ms": times[0]})
            if key != "search":
                span, _ = bench.run_work(server, replace(work, connections=16))
                bench.note(server, {f"{key} /s": span.answers})


# ---- Report ------------------------------------------------------------
# Medians of the runs: a table of figures and a table of targets.

ROWS = (  # title, key, decimals
    ("{clients} clients in a room: deliveries/s", "all /s", 0),
    ("... CPU per delivery, µs", "all us", 2),
    ("... client processes idle, %", "all idle %", 0),
    ("{few} clients in a room: deliveries/s", "few /s", 0),
    ("... CPU per delivery, µs", "few us", 2),
    ("{clients} clients at half of their highest rate: messages/s", "half rate", 0),
    ("... latency p50, ms", "half p50 ms", 1),
    ("... latency p99, ms", "half p99 ms", 1),
    ("at half of Node's rate: latency p50, ms", "node p50 ms", 1),
    ("... latency p99, ms", "node p99 ms", 1),
    ("durable posts/s, 64 connections", "posts /s", 0),
    ("... CPU per post, µs", "posts us", 0),
    ("... p99, ms", "posts p99 ms", 1),
    ("... client process idle, %", "posts idle %", 0),
    ("{clients} clients connect, authenticate, join: ms", "connect ms", 0),
    ("memory per connection, KiB", "KiB a connection", 1),
    ("idle process, MiB", "idle MiB", 1),
    ("start to first answer, ms", "start ms", 0),
    ("... installed, not run as a script", "installed ms", 0),
    ("... the libraries alone", "libraries ms", 0),
    ("idle process, installed, MiB", "installed MiB", 1),
    ("... the libraries alone", "libraries MiB", 1),
    ("... the libraries and ChatRTC's code", "code MiB", 1),
    ("... the libraries, one connection, one route", "one route MiB", 1),
    ("newest 50 of {rows}: ms, 1 connection", "newest ms", 2),
    ("... pages/s, 16 connections", "newest /s", 0),
    ("50 deep in {rows}: ms, 1 connection", "deep ms", 2),
    ("... pages/s, 16 connections", "deep /s", 0),
    ("search in {rows}: ms", "search ms", 2),
    (f"{PACE} messages/s in one room of {{clients}}: CPU per delivery, µs", "one us", 2),
    (f"{PACE} messages/s in each of ten rooms: CPU per delivery, µs", "ten us", 2),
    ("{storm} different members connect, join, and all know it: ms", "storm ms", 0),
    ("... CPU, ms", "storm CPU ms", 0),
    (f"... each with {MISSED} missed messages: ms", "storm after ms", 0),
    ("... twice as many members: ms", "storm twice ms", 0),
    (f"a post by HTTP with {FEW_MEMBERS} members: CPU, µs", "few plain us", 0),
    ("... by `message:send`", "event us", 0),
    ("... by HTTP with an `@` that names nobody", "few nobody us", 0),
    ("... with an `@` that names a member", "few member us", 0),
    ("a post by HTTP with {members} members: CPU, µs", "many plain us", 0),
    ("... with an `@` that names nobody", "many nobody us", 0),
    ("... with an `@` that names a member", "many member us", 0),
    ("100 rooms of 10 clients: deliveries/s", "small10 /s", 0),
    ("... CPU per delivery, µs", "small10 us", 1),
    ("20 rooms of 50 clients: deliveries/s", "small50 /s", 0),
    ("... CPU per delivery, µs", "small50 us", 1),
    ("{sockets} idle sockets: CPU per second and socket, µs", "socket us", 1),
    ("... memory of each, KiB", "socket KiB", 1),
    (f"a page with {SERVERS} servers and {CHANNELS} channels reconnects: requests", "page requests", 0),
    ("... kB received", "page kB", 0),
    ("... kB of a reload, the page itself unchanged", "reload kB", 0),
    ("without idle clients: deliveries/s", "alone /s", 0),
    ("... with {idle}", "crowd /s", 0),
    ("without idle clients: durable posts/s", "alone posts /s", 0),
    ("... with {idle}", "crowd posts /s", 0),
)


def table_of_figures(bench: Bench) -> list[str]:
    servers = [name for name in LABELS if any(server == name for server, _ in bench.results)]
    lines = ["| | " + " | ".join(LABELS[name] for name in servers) + " |"]
    lines.append("| --- |" + " ---: |" * len(servers))
    for title, key, decimals in ROWS:
        values = [bench.median(name, key) for name in servers]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:,.{decimals}f}" for value in values]
            lines.append(f"| {filled_in(bench, title)} | " + " | ".join(cells) + " |")
    cells = [delivery_faults(bench, name) for name in servers]
    if any(cells):
        lines.append("| lost, doubled or out of order | " + " | ".join(cells) + " |")
    return [*lines, ""] if len(lines) > 2 else []


PROCESSES = {0: "1 without `--redis`", 1: "1 with `--redis`", 2: "2 with `--redis`", 3: "3 with `--redis`"}
PROCESS_COLUMNS = (  # title, key, decimals
    ("durable posts/s, 64 connections", "posts /s", 0),
    ("CPU per post, µs", "posts us", 0),
    ("p99, ms", "posts p99 ms", 1),
    ("to a client of the same process, p50, ms", "own p50 ms", 1),
    ("p99, ms", "own p99 ms", 1),
    ("to a client of another process, p50, ms", "other p50 ms", 1),
    ("p99, ms", "other p99 ms", 1),
)


def table_of_processes(bench: Bench) -> list[str]:
    """Return the figures of several processes on one database, if they were measured."""
    lines = ["| processes on one database | " + " | ".join(title for title, _, _ in PROCESS_COLUMNS) + " |"]
    lines.append("| --- |" + " ---: |" * len(PROCESS_COLUMNS))
    for count, title in PROCESSES.items():
        values = [(bench.median("chatrtc", f"shared{count} {key}"), decimals) for _, key, decimals in PROCESS_COLUMNS]
        if values[0][0] is not None:
            cells = ["" if value is None else f"{value:,.{decimals}f}" for value, decimals in values]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return [*lines, ""] if len(lines) > 2 else []


def delivery_faults(bench: Bench, server: str) -> str:
    counted, lost, faults, closed = (
        int(sum(bench.results.get((server, key), ()))) for key in ("counted", "lost", "faults", "closed")
    )
    return (f"{lost + faults:,} of {counted:,}" if counted else "") + (f", {closed} connections closed" if closed else "")


TARGETS = (  # title, key, server and key of the divisor (if any), comparison, target, unit
    ("fan-out, {clients} clients, to Node, commit per message", "all /s", "node", "", ">=", 25, "x"),
    ("fan-out, {clients} clients, to the write ceiling", "all /s", "ceiling", "", ">=", 4, "x"),
    ("fan-out, {few} clients, to Node, commit per message", "few /s", "node", "", ">=", 6, "x"),
    ("fan-out, 100 rooms of 10 clients, to Node", "small10 /s", "node", "", ">=", 4, "x"),
    ("fan-out, 20 rooms of 50 clients, to Node", "small50 /s", "node", "", ">=", 4, "x"),
    ("p99 at half of its own rate, to Node's", "half p99 ms", "node", "", "<=", 1, "x"),
    ("p99 at half of Node's rate", "node p99 ms", "node", "half p99 ms", "<=", 1, "x"),
    ("durable posts, to an empty aiohttp handler", "posts /s", "empty", "", ">=", 0.7, "x"),
    ("... to one on uvloop", "posts /s", "empty-uvloop", "", ">=", 0.7, "x"),
    ("durable posts, to Node, commit per message", "posts /s", "node", "", ">=", 3, "x"),
    ("{clients} clients connect: time, to Node's", "connect ms", "node", "", "<=", 1, "x"),
    ("{storm} different members connect: time, to Node's", "storm ms", "node", "", "<=", 0.15, "x"),
    ("... twice as many, to that", "storm twice ms", "chatrtc", "storm ms", "<=", 2.2, "x"),
    (f"... with {MISSED} missed messages, to without", "storm after ms", "chatrtc", "storm ms", "<=", 1.5, "x"),
    ("a post by HTTP: CPU, to an empty aiohttp handler", "few plain us", "empty", "", "<=", 1.3, "x"),
    ("a post by `message:send`: CPU, to one by HTTP", "event us", "chatrtc", "few plain us", "<=", 0.75, "x"),
    ("a post with an `@` for nobody, 10 members: CPU, to without", "few nobody us", "chatrtc", "few plain us", "<=", 1.1, "x"),
    ("... for a member", "few member us", "chatrtc", "few plain us", "<=", 1.3, "x"),
    ("... for nobody, {members} members", "many nobody us", "chatrtc", "many plain us", "<=", 1.1, "x"),
    ("... for a member", "many member us", "chatrtc", "many plain us", "<=", 1.3, "x"),
    ("memory per connection", "KiB a connection", "", "", "<=", 22, " KiB"),
    ("idle process, as a script", "idle MiB", "", "", "<=", 60, " MiB"),
    ("idle process, installed", "installed MiB", "", "", "<=", 45, " MiB"),
    ("{sockets} idle sockets: CPU per second and socket", "socket us", "", "", "<=", 4, " µs"),
    ("a page that reconnects: requests", "page requests", "", "", "<=", 4, ""),
    ("... received", "page kB", "", "", "<=", 60, " kB"),
    ("newest page: requests/s, to Node", "newest /s", "node", "", ">=", 1, "x"),
    ("deep page: requests/s, to Node", "deep /s", "node", "", ">=", 1, "x"),
    ("search, median", "search ms", "", "", "<=", 20, " ms"),
    ("CPU per delivery, ten rooms to one", "ten us", "chatrtc", "one us", "<=", 1.1, "x"),
    ("fan-out with {idle} idle clients, to without", "crowd /s", "chatrtc", "alone /s", ">=", 0.9, "x"),
    ("posts with {idle} idle clients, to without", "crowd posts /s", "chatrtc", "alone posts /s", ">=", 0.9, "x"),
    ("start to first answer, as a script", "start ms", "", "", "<=", 600, " ms"),
    ("start to first answer, installed", "installed ms", "", "", "<=", 350, " ms"),
    ("posts of one process with --redis, to without", "shared1 posts /s", "chatrtc", "shared0 posts /s", ">=", 0.9, "x"),
)


def table_of_targets(bench: Bench) -> list[str]:
    lines = ["| ChatRTC | target | measured | |", "| --- | ---: | ---: | --- |"]
    for title, key, server, other, sign, target, unit in TARGETS:
        value = bench.median("chatrtc", key)
        base = bench.median(server, other or key) if server else 1.0
        if value is not None and base is not None:
            value = value / base if base else float("inf")
            met = value >= target if sign == ">=" else value <= target
            shown = f"{value:.2f}{unit} | {'met' if met else '**not met**'}"
            lines.append(f"| {filled_in(bench, title)} | {sign} {target:g}{unit} | {shown} |")
    return lines


def filled_in(bench: Bench, title: str) -> str:
    return title.format(**{key: f"{number:,}" for key, number in vars(bench.plan).items()})


def report(bench: Bench, started: float) -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    minutes, runs = (time.monotonic() - started) / 60, bench.plan.runs
    head = (
        f"`python {command}`, {time.strftime('%Y-%m-%d', time.gmtime())}, {minutes:.0f} minutes; the server on one core, "
        f"medians of {runs} run{'s' * (runs > 1)} in turns, {CONTENT}-byte messages, {WINDOW} outstanding."
    )
    tail = f"Machine: {describe_machine(bench.directory)}."
    return "\n".join([head, "", *table_of_figures(bench), *table_of_processes(bench), *table_of_targets(bench), "", tail])


# ---- Command line ------------------------------------------------------
# Every process that was started is ended by its id, also on Ctrl-C.

NO_NODE = """Node or its packages are missing; the benchmark runs without them. To install them:
    npm install --prefix . socket.io@4.8 better-sqlite3
(or set NODE_PATH to a node_modules folder that holds both)"""
NO_BROWSER = "chromium or the Python package playwright is missing; the benchmark runs without a page."
NO_REDIS = "redis-server or the Python package redis is missing; the benchmark runs without --redis."


def available(chosen: Names) -> list[str]:
    """Return the chosen servers that can run here; ChatRTC last, since it is also measured at Node's rate."""
    names = [name for name in (*list(LABELS)[1:], "chatrtc") if not chosen or name in chosen]
    if not node_modules():
        click.echo(NO_NODE, err=True)
        names = [name for name in names if name not in ("node", "turn")]
    return names if find_spec("uvloop") else [name for name in names if name not in ON_UVLOOP]


def has_browser() -> bool:
    """Return whether a page can be measured here."""
    found = bool(find_browser() and find_spec("playwright"))
    if not found:
        click.echo(NO_BROWSER, err=True)
    return found


def can_share() -> bool:
    """Return whether servers with --redis can run here."""
    found = bool(shutil.which("redis-server") and find_spec("redis"))
    if not found:
        click.echo(NO_REDIS, err=True)
    return found


def steps_of(bench: Bench, names: list[str], only: set[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield all steps in order, each with a name for the progress bar."""
    visits = only & set(VISIT)
    for run in range(bench.plan.runs if visits else 0):
        for name in names:
            if any(takes_part(name, step) for step in visits):
                yield f"run {run + 1}: {LABELS[name]}", partial(visit, bench, name, visits)
    if "history" in only:
        servers: list[Server] = []
        for name in names:
            if name in READS:
                yield f"a history for {LABELS[name]}", partial(start_with_history, bench, name, servers)
        for run in range(bench.plan.runs):
            yield f"run {run + 1}: history", partial(history, bench, servers)
        yield "history", lambda: bench.stop(*servers)
    if "growth" in only and "chatrtc" in names:
        yield "ten rooms and one", partial(growth, bench)
    if "idle" in only and "chatrtc" in names:
        yield "idle clients", partial(idle_clients, bench)
    for run in range(bench.plan.runs):
        for step, measure, others in (("storm", storm, ["node"]), ("small", small_rooms, ["node", "turn"])):
            for name in (*others, "chatrtc") if step in only else ():
                if name in names:
                    yield f"run {run + 1}: {step}, {LABELS[name]}", partial(measure, bench, name)
        if "installed" in only and "chatrtc" in names:
            yield f"run {run + 1}: installed", partial(installed, bench)
    for step, alone in (("ways", ways), ("sockets", idle_sockets), ("page", page_reconnects)):
        if step in only and "chatrtc" in names and (step != "page" or has_browser()):
            yield step, partial(alone, bench)
    if "processes" in only and "chatrtc" in names and can_share():
        for run in range(bench.plan.runs):
            for count, title in PROCESSES.items():
                yield f"run {run + 1}: processes, {title}", partial(processes, bench, count)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Run once with small numbers, to try the benchmark.")
@click.option("--only", multiple=True, type=click.Choice(VISIT + AFTER), help="Run only this measurement (repeatable).")
@click.option("--servers", multiple=True, type=click.Choice(list(LABELS)), help="Measure only this server (repeatable).")
@click.option("--runs", type=click.IntRange(1), help="Number of runs; the table shows their medians.")
@click.option("--cpus", help="Cores to use, the server's first, such as 0,1,2,3 (default: all).")
@click.option("--chatrtc", type=click.Path(path_type=Path), default=HERE / "chatrtc.py", hidden=True)
@click.option("--serve", hidden=True)
@click.option("--database", default="", hidden=True)
def main(quick: bool, only: Names, servers: Names, runs: int, cpus: str, chatrtc: Path, serve: str, database: str) -> None:
    """Measure ChatRTC and the servers it is compared with. Prints tables of figures and targets."""
    if serve:
        return serve_inline(serve, database)
    plan = QUICK if quick else Plan()
    plan = replace(plan, runs=runs) if runs else plan
    plan = replace(plan, sockets=min(plan.sockets, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_FILES))
    cores = [int(part) for part in cpus.split(",")] if cpus else sorted(os.sched_getaffinity(0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started, names = time.monotonic(), available(servers)
    with tempfile.TemporaryDirectory(prefix="bench-chatrtc-", ignore_cleanup_errors=True) as folder:
        bench = Bench(plan, cores, Path(folder), chatrtc.resolve())
        try:
            steps = list(steps_of(bench, names, set(only or VISIT + AFTER)))
            with click.progressbar(steps, item_show_func=lambda step: step[0] if step else "", file=sys.stderr) as bar:
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
