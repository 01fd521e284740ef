"""The tests of ChatRTC, in the order of its rooms: a real server on a free port, real clients, a real SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
import socketio
from aiohttp import web

import chatrtc

HERE = Path(__file__).resolve().parent
PATIENCE = 10.0  # seconds that a test waits for something that is to happen

# ---- World -----------------------------------------------------------------------------------------------------------
# A server in this process (`world`) or in its own (`Process`), and people who use it with real clients. Waiting is for an
# event, bounded; that nothing happens is shown by a fence: something later, on the same path, that does happen.


def tool(name: str) -> str:
    """The path of a program that some tests need; they are skipped without it, but not in CI."""
    path = shutil.which(name)
    if path is None:
        message = f"{name} is not installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return path


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def code(self) -> str:
        return str(self.body["code"])


class Socket:
    """A Socket.IO client that remembers what it hears."""

    def __init__(self) -> None:
        self.client = socketio.AsyncClient(reconnection=False)
        self.heard: list[tuple[str, Any]] = []
        self.closed = asyncio.Event()
        self._read = 0
        self._news = asyncio.Condition()
        self.client.on("*", self._hear)
        self.client.on("disconnect", self._leave)

    async def _hear(self, event: str, *payload: Any) -> None:
        async with self._news:
            self.heard.append((event, payload[0] if payload else None))
            self._news.notify_all()

    async def _leave(self, reason: str = "") -> None:
        self.closed.set()

    async def connect(self, url: str, token: str | None = None, path: str = "socket.io", **options: Any) -> Socket:
        auth = {"token": token} if token else None
        await self.client.connect(url, auth=auth, socketio_path=path, wait_timeout=PATIENCE, **options)
        return self

    async def call(self, event: str, *payload: Any) -> Any:
        """Emit and return the ack."""
        data = payload[0] if len(payload) == 1 else payload or None
        return await self.client.call(event, data, timeout=PATIENCE)

    async def ok(self, event: str, *payload: Any) -> Any:
        ack = await self.call(event, *payload)
        assert ack["success"] is True, ack
        return ack

    async def hears(self, event: str, **fields: Any) -> Any:
        """The next such event, among those not yet looked at; earlier others are passed over."""
        async with asyncio.timeout(PATIENCE), self._news:
            while True:
                for index in range(self._read, len(self.heard)):
                    name, payload = self.heard[index]
                    if name == event and all(payload.get(key) == value for key, value in fields.items()):
                        self._read = index + 1
                        return payload
                await self._news.wait()

    async def hears_not(self, *events: str) -> None:
        """None of these has come by the time that an ack of now comes."""
        await self.call("ping")
        names = [name for name, _ in self.heard[self._read :]]
        assert not set(events) & set(names), names

    def names(self) -> list[str]:
        return [name for name, _ in self.heard]

    async def close(self) -> None:
        await self.client.disconnect()


class Person:
    """An account and what it can do."""

    def __init__(self, world: World, name: str, user_id: int, token: str) -> None:
        self.world, self.name, self.user_id, self.token = world, name, user_id, token

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Reply:
        return await self.world.call(method, path, body, token=self.token, **options)

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        reply = await self.call(method, path, body)
        assert reply.status < 300, reply
        return reply.body

    async def post(self, channel_id: int, content: str = "hello", **fields: Any) -> Any:
        return await self.ok("POST", "/messages", {"channel_id": channel_id, "content": content, **fields})

    async def socket(self, server_id: int | None = None, **options: Any) -> Socket:
        """A socket of mine, joined to that server."""
        socket = await self.world.socket(self.token, **options)
        if server_id is not None:
            await socket.ok("join_server", {"server_id": server_id})
        return socket


class Place(NamedTuple):
    """A server with its first channel."""

    server_id: int
    channel_id: int


class World:
    def __init__(self, url: str, session: aiohttp.ClientSession, chat: chatrtc.ChatRTC | None = None) -> None:
        self.url, self.session = url, session
        self._chat = chat
        self.sockets: list[Socket] = []

    @property
    def chat(self) -> chatrtc.ChatRTC:
        """The server, where it runs in this process."""
        assert self._chat is not None
        return self._chat

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, **options: Any
    ) -> Reply:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= options.pop("headers", {})
        if body is not None:
            options["json"] = body
        async with self.session.request(method, self.url + path, headers=headers, **options) as response:
            content = await response.read()
            is_json = response.content_type == "application/json"
            return Reply(response.status, await response.json() if content and is_json else content, response.headers)

    async def person(self, name: str) -> Person:
        reply = await self.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
        assert reply.status == 201, reply
        return Person(self, name, reply.body["user_id"], reply.body["token"])

    async def people(self, *names: str) -> list[Person]:
        return list(await asyncio.gather(*map(self.person, names)))

    async def place(self, owner: Person, *members: Person, name: str = "class") -> Place:
        """A server of that owner, with these members."""
        server = await owner.ok("POST", "/servers", {"name": name})
        invite = await owner.ok("POST", f"/servers/{server['server_id']}/invites", {})
        for member in members:
            await member.ok("POST", f"/invites/{invite['code']}")
        return Place(server["server_id"], server["channels"][0]["channel_id"])

    async def socket(self, token: str | None = None, **options: Any) -> Socket:
        socket = Socket()
        self.sockets.append(socket)
        return await socket.connect(self.url, token, **options)

    async def close(self) -> None:
        await asyncio.gather(*(socket.close() for socket in self.sockets), return_exceptions=True)
        await self.session.close()


MakeWorld = Callable[..., Awaitable[World]]


@pytest_asyncio.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Start servers in this process, with the settings given; no rate limits unless told."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**settings: Any) -> World:
            given = {"database": str(tmp_path / "chat.db"), "no_rate_limit": True} | settings
            chat = chatrtc.ChatRTC(**given)
            app = web.Application()
            chat.attach(app)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            world = World(f"http://127.0.0.1:{runner.addresses[0][1]}", aiohttp.ClientSession(), chat)
            stack.push_async_callback(world.close)
            return world

        yield make


@pytest_asyncio.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()


class Process:
    """A server in a process of its own, started by its command line."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    @classmethod
    async def start(
        cls, database: Path, *options: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> Process:
        """Start it and wait for the line that says where it listens."""
        command = [
            *prefix,
            sys.executable,
            str(HERE / "chatrtc.py"),
            "serve",
            "--port",
            "0",
            "--database",
            str(database),
            *options,
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ) | (env or {})
        )
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("ChatRTC listening on http"), line + (await process.stderr.read()).decode()
        return cls(process, line.split()[-1])

    def world(self) -> World:
        return World(self.url, aiohttp.ClientSession())

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send it that signal; its exit status and what it wrote to standard error."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(30):
            _, errors = await self.process.communicate()
        return self.process.returncode or 0, errors.decode()


# ---- Operations ------------------------------------------------------------------------------------------------------


async def test_two_people_talk(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    hears = await ben.socket(place.server_id)
    message = await ana.post(place.channel_id, "hello")
    assert set(message) == {"channel_id", "message_id", "content", "author_id", "author_username", "created_at", "seq"}
    assert await hears.hears("message:new") == message
