"""The tests of ChatRTC, in the order of its sections: a real server on a free port, real clients, a real SQLite file."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import datetime
import functools
import gc
import gzip
import hashlib
import hmac
import html
import inspect
import io
import itertools
import json
import mimetypes
import os
import random
import re
import shutil
import signal
import socket as socket_module
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

import aiohttp
import click
import jsonschema
import msgspec
import openapi_spec_validator
import pytest
import pytest_asyncio
import redis
import socketio
from aiohttp import web
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, stateful, strategies
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from playwright.async_api import Browser, FilePayload, Locator, Page, async_playwright, expect
from yarl import URL

import chatrtc

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent
PATIENCE = 30.0  # seconds that a test waits for an event, a reply or a condition
# Durations are checked only in the soak, on an idle machine. On a busy machine tight bounds would fail.
SOAK = any("soak" in argument and "not soak" not in argument for argument in sys.argv)


def bound(seconds: float) -> float:
    """Return the seconds that something may take: `seconds` in the soak, otherwise at least PATIENCE."""
    return seconds if SOAK else max(seconds, PATIENCE)


# ---- Helpers --------------------------------------------------------------------------------------------------------
# How to add a test:
#
# 1. Find its section. The sections have the names and the order of those in chatrtc.py. After them come Guarantees (one
#    part for each promise of the README), Several processes, Page (in a real browser), Packaging, Descriptions and The tree
#    itself.
# 2. Take a fixture:
#      scene       a server with a channel, four users and their sockets: most tests begin with it
#      world       a server in this process, without rate limits; `make_world(port=...)` starts one with other settings
#      Process     a server in a process of its own, started by its command line: for signals, restarts and files
#      bare        the Socket.IO server alone, with raw clients
#      tab, two    browser tabs
# 3. Use the server as a client does. `ok` returns the result and fails on an error, `call` also returns an error:
#
#        async def test_a_deleted_message_is_emitted(scene: Scene) -> None:
#            message = await scene.post()
#            await scene.ana.ok("DELETE", f"/messages/{message['message_id']}")
#            assert (await scene.ben_socket.receive("message:deleted"))["message_id"] == message["message_id"]
#            await scene.dee_socket.receive_none("message:deleted")
#            assert (await scene.ben.call("GET", f"/messages/{message['message_id']}")).code == "NOT_FOUND"
#
# 4. Never sleep in order to wait: wait for an event (`receive`) or for a condition (`until`). Show that nothing happens by
#    something that happens later on the same path: `receive_none` sends a ping and waits for its ack.
#    The fixture `auditor` compares every reply, ack and event with its declaration, so tests need not list all keys.
# 5. The third test of the same shape becomes a table: `pytest.mark.parametrize`, or a dict such as STORIES or PERMISSIONS.
#
# A change of the program needs tests in several sections, and each says what is missing when it fails:
#      an operation     a row in PERMISSIONS, a rate limit, and a sequence number if it changes something durable
#      an event         a function with @story, a handler in the page, and its effect in Replica.apply if it is durable
#      a column         a step in MIGRATIONS, an entry in RELEASED, and clearing it on deletion
#      a reason         a sentence in both languages of the page
#      a setting        `README=write pytest -k readme_has_the_tables` writes it, and all of the above, into the docs
#
# `pytest -k NAME` runs the tests whose names contain NAME; `pytest -m soak` runs the long ones.


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, because this machine lacks something. In CI it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def find_program(name: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name)
    if path is None:
        skip_or_fail(f"{name} is not installed")
    return path


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """Wait until the condition is true; return how many seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"still false after {seconds} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def eventually(check: Callable[[], Awaitable[Any]], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until the check returns something true, and return it."""
    try:
        async with asyncio.timeout(seconds):
            while not (found := await check()):
                await asyncio.sleep(0.03)
            return found
    except TimeoutError:
        pytest.fail(f"waited {seconds} s for: {what}")


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def code(self) -> str:
        """The code of the error, or an empty string."""
        return str(self.body["code"]) if self.status >= 400 else ""


class Boom(Exception):
    """The error that handlers of these tests raise."""


# Replies, acks and events that do not match the tables of the program. Every test fails if it causes one.
FAULTS: list[str] = []


def matches_type(payload: Any, kind: Any) -> bool:
    """Return whether a payload has exactly the keys of the type, with values of their types."""
    fields = {field.encode_name: field.required for field in msgspec.structs.fields(kind)}
    try:
        msgspec.convert(payload, kind)
    except msgspec.ValidationError:
        return False
    return set(payload) <= set(fields) and all(name in payload for name, required in fields.items() if required)


def audit_event(event: str, *payload: Any) -> None:
    if event not in chatrtc.EVENTS or len(payload) != 1 or not matches_type(payload[0], chatrtc.EVENTS[event].payload):
        FAULTS.append(f"event {event}: {payload}")


def audit_ack(event: Any, ack: Any) -> None:
    if not isinstance(ack, dict) or not isinstance(ack.get("success"), bool):
        FAULTS.append(f"{event}: the ack has no boolean `success`: {ack}")
    elif not ack["success"]:
        audit_error({key: value for key, value in ack.items() if key != "success"})
    else:
        op = next(op for op in chatrtc.OPERATIONS.values() if op.event == event)
        answer = {key: value for key, value in ack.items() if key != "success"}
        if not (matches_type(answer, op.result) if op.acks and op.result is not type(None) else answer == {}):
            FAULTS.append(f"{event}: ack {ack}")


def audit_reply(reply: Reply) -> None:
    if reply.status < 400:
        return
    audit_error(reply.body)
    if isinstance(reply.body, dict) and reply.code in chatrtc.ERRORS:
        retry_after = str(reply.body["retry_after"]) if "retry_after" in reply.body else None
        if reply.status != chatrtc.ERRORS[reply.code][0] or reply.headers.get("Retry-After") != retry_after:
            FAULTS.append(f"reply {reply}")


def audit_error(body: Any) -> None:
    known = isinstance(body, dict) and body.get("code") in chatrtc.ERRORS and bool(body.get("error"))
    keys = {"error", "code"} | ({"retry_after"} if known and body["code"] == "RATE_LIMITED" else set())
    if not known or not keys <= set(body) <= keys | {"reason", "field"}:
        FAULTS.append(f"refusal {body}")
    elif "reason" in body and body["code"] != chatrtc.REASONS.get(body["reason"], ("",))[0]:
        FAULTS.append(f"reason {body}")


@pytest.fixture(autouse=True)
def auditor(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Check in every test that each event and error matches its declaration, and that no exception was logged."""
    FAULTS.clear()
    yield
    assert not FAULTS, FAULTS
    for record in caplog.get_records("call"):
        error = record.exc_info[1] if record.exc_info else None
        # aiohttp logs an exception for a request that is not HTTP.
        if not isinstance(error, Boom | aiohttp.http_exceptions.HttpProcessingError):
            assert error is None, f"{record.getMessage()}: {error!r}"


class Socket:
    """A Socket.IO client that stores the events it receives."""

    def __init__(self) -> None:
        self.client = socketio.AsyncClient(reconnection=False)
        self.received: list[tuple[str, Any]] = []
        self.received_at: list[float] = []
        self.closed = asyncio.Event()
        self._read = 0
        self._changed = asyncio.Condition()
        self.client.on("*", self._handle_event)
        self.client.on("disconnect", self._leave)

    async def _handle_event(self, event: str, *payload: Any) -> None:
        audit_event(event, *payload)
        async with self._changed:
            self.received.append((event, payload[0] if payload else None))
            self.received_at.append(time.monotonic())
            self._changed.notify_all()

    async def _leave(self, reason: str = "") -> None:
        self.closed.set()

    async def connect(self, url: str, token: str | None = None, path: str = "socket.io", **options: Any) -> Socket:
        auth = {"token": token} if token else None
        await self.client.connect(url, auth=auth, socketio_path=path, wait_timeout=PATIENCE, **options)
        return self

    async def call(self, event: str, *payload: Any) -> Any:
        """Emit and return the ack."""
        data = payload[0] if len(payload) == 1 and payload != (None,) else payload or None
        ack = await self.client.call(event, data, timeout=PATIENCE)
        audit_ack(event, ack)
        return ack

    async def ok(self, event: str, *payload: Any) -> Any:
        ack = await self.call(event, *payload)
        assert ack["success"] is True, ack
        return ack

    async def receive(self, event: str, **fields: Any) -> Any:
        """Wait for the next event of this name with these fields and return its payload. Events before it are skipped."""
        async with asyncio.timeout(PATIENCE), self._changed:
            while True:
                for index in range(self._read, len(self.received)):
                    name, payload = self.received[index]
                    if name == event and all(payload.get(key) == value for key, value in fields.items()):
                        self._read = index + 1
                        return payload
                await self._changed.wait()

    async def receive_none(self, *events: str, **fields: Any) -> None:
        """Check that no such event was emitted before now: send a ping and wait for its ack."""
        await self.call("ping")
        received = [(name, payload) for name, payload in self.received[self._read :] if name in events]
        assert not [payload for _, payload in received if all(payload.get(key) == value for key, value in fields.items())], (
            received
        )

    def names(self) -> list[str]:
        return [name for name, _ in self.received]

    async def close(self) -> None:
        await self.client.disconnect()


class Person:
    """An account with its token, and requests in its name."""

    def __init__(self, world: World, name: str, user_id: int, token: str) -> None:
        self.world, self.name, self.user_id, self.token = world, name, user_id, token

    async def call(self, method: str, path: str | URL, body: Any = None, **options: Any) -> Reply:
        return await self.world.call(method, path, body, token=self.token, **options)

    async def ok(self, method: str, path: str, body: Any = None) -> Any:
        reply = await self.call(method, path, body)
        assert reply.status < 300, reply
        return reply.body

    async def post(self, channel_id: int, content: str = "hello", **fields: Any) -> Any:
        return await self.ok("POST", "/messages", {"channel_id": channel_id, "content": content, **fields})

    async def invite(self, server_id: int, **limits: int) -> str:
        """Create an invite and return its code."""
        return str((await self.ok("POST", f"/servers/{server_id}/invites", limits))["code"])

    async def channel(self, server_id: int, name: str, kind: str = "text") -> int:
        """Create a channel and return its id."""
        return int((await self.ok("POST", f"/servers/{server_id}/channels", {"name": name, "kind": kind}))["channel_id"])

    async def socket(self, server_id: int | None = None, **options: Any) -> Socket:
        """Return a new socket of this account, joined to the server if one is given."""
        socket = await self.world.socket(self.token, **options)
        if server_id is not None:
            await socket.ok("join_server", {"server_id": server_id})
        return socket


class Place(NamedTuple):
    """The ids of a server and of its first channel."""

    server_id: int
    channel_id: int


class World:
    def __init__(self, url: str, session: aiohttp.ClientSession, chat: chatrtc.ChatRTC | None = None) -> None:
        self.url, self.session = url, session
        self._chat = chat
        self.sockets: list[Socket] = []

    @property
    def chat(self) -> chatrtc.ChatRTC:
        """The server, if it runs in this process."""
        assert self._chat is not None
        return self._chat

    async def call(self, method: str, path: str | URL, body: Any = None, *, token: str | None = None, **options: Any) -> Reply:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= options.pop("headers", {})
        if body is not None:
            options["json"] = body
        url = path if isinstance(path, URL) else self.url + path
        async with self.session.request(method, url, headers=headers, **options) as response:
            content = await response.read()
            is_json = response.content_type == "application/json"
            reply = Reply(response.status, await response.json() if content and is_json else content, response.headers)
            audit_reply(reply)
            return reply

    async def person(self, name: str) -> Person:
        reply = await self.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
        assert reply.status == 201, reply
        return Person(self, name, reply.body["user_id"], reply.body["token"])

    async def people(self, *names: str) -> list[Person]:
        """Register accounts one after another, so that their ids ascend."""
        return [await self.person(name) for name in names]

    async def place(self, owner: Person, *members: Person, name: str = "class") -> Place:
        """Create a server with these members."""
        server = await owner.ok("POST", "/servers", {"name": name})
        if members:
            code = await owner.invite(server["server_id"])
            for member in members:
                await member.ok("POST", f"/invites/{code}")
        return Place(server["server_id"], server["channels"][0]["channel_id"])

    def at(self, address: str) -> World:
        """Return the same server as seen by a client at another loopback address. The caller closes it."""
        return World(self.url, aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(address, 0))), self._chat)

    async def sign_in(self, name: str, password: str = "correct horse") -> Reply:
        return await self.call("POST", "/auth/login", {"username": name, "password": password})

    async def socket(self, token: str | None = None, **options: Any) -> Socket:
        socket = Socket()
        self.sockets.append(socket)
        return await socket.connect(self.url, token, **options)

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await asyncio.gather(*(socket.close() for socket in self.sockets), return_exceptions=True)
        await self.session.close()


MakeWorld = Callable[..., Awaitable[World]]


@pytest_asyncio.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    """Start servers in this process with the given settings. Rate limits are off by default."""
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
    """A server in a process of its own, started by `chatrtc serve`."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process, self.url = process, url

    @classmethod
    async def start(
        cls, database: Path, *options: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> Process:
        """Start the server and wait for the line that contains its URL."""
        program = (sys.executable, str(HERE / "chatrtc.py"))
        command = [*prefix, *program, "serve", "--port", "0", "--database", str(database), *options]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ) | (env or {})
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(2 * PATIENCE):
                line = (await process.stdout.readline()).decode()
        except TimeoutError:
            process.kill()
            raise
        assert line.startswith("ChatRTC listening on http"), line + (await process.stderr.read()).decode()
        return cls(process, line.split()[-1])

    def world(self) -> World:
        return World(self.url, aiohttp.ClientSession())

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and what the server wrote to standard error."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            async with asyncio.timeout(30):
                _, errors = await self.process.communicate()
        except TimeoutError:
            self.process.kill()
            raise
        return self.process.returncode or 0, errors.decode()


class Finished(NamedTuple):
    status: int
    out: str
    err: str


async def run_command(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> Finished:
    """Run a command of chatrtc and wait until it exits."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "chatrtc.py"), *args, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env=dict(os.environ) | (env or {}), cwd=cwd,
    )  # fmt: skip
    try:
        async with asyncio.timeout(3 * PATIENCE):
            out, err = await process.communicate(stdin.encode())
    finally:
        if process.returncode is None:
            process.kill()
    return Finished(process.returncode or 0, out.decode(), err.decode())


async def run_ok(*args: str, stdin: str = "", env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command that must succeed and return what it printed."""
    ended = await run_command(*args, stdin=stdin, env=env, cwd=cwd)
    assert ended.status == 0, ended
    return ended.out


def expect_error(ended: Finished, *words: str) -> None:
    """Check that a command failed with a one-line error that contains these words, and without a traceback."""
    assert ended.status in (1, 2), ended
    assert ended.out == "", ended
    assert ended.err.startswith("Error: "), ended
    assert ended.err.count("\n") == 1, ended
    for word in words:
        assert word in ended.err, ended


class Scene:
    """A server of Ana with the members Ben and Cy, and another of Dee. The sockets of all but Cy have joined their servers."""

    world: World
    ana: Person
    ben: Person
    cy: Person
    dee: Person
    place: Place
    ana_socket: Socket
    ben_socket: Socket
    cy_socket: Socket  # signed in, not joined to any server
    dee_socket: Socket  # joined to Dee's own server

    @classmethod
    async def make(cls, world: World) -> Scene:
        self = cls()
        self.world = world
        self.ana, self.ben, self.cy, self.dee = await world.people("ana", "ben", "cy", "dee")
        self.place = await world.place(self.ana, self.ben, self.cy)
        other = await world.place(self.dee, name="other")
        self.ana_socket = await self.ana.socket(self.place.server_id)
        self.ben_socket = await self.ben.socket(self.place.server_id)
        self.cy_socket = await self.cy.socket()
        self.dee_socket = await self.dee.socket(other.server_id)
        await self.ana.post(self.place.channel_id, "before")  # its event is received here, so that tests do not see it
        await asyncio.gather(self.ana_socket.receive("message:new"), self.ben_socket.receive("message:new"))
        return self

    async def post(self) -> Any:
        return await self.ana.post(self.place.channel_id, "told")

    @property
    def server(self) -> str:
        return f"/servers/{self.place.server_id}"


@pytest_asyncio.fixture
async def scene(world: World) -> Scene:
    return await Scene.make(world)


async def channel_history(person: Person, channel_id: int) -> list[Any]:
    """Return every message of a channel, read page by page from its beginning."""
    messages: list[Any] = []
    while True:
        after = messages[-1]["message_id"] if messages else 0
        page = await person.ok("GET", f"/channels/{channel_id}/messages?after={after}&limit=100")
        messages += page["messages"]
        if not page["has_more"]:
            return messages


async def server_history(world: World, server_id: int, token: str) -> list[Any]:
    """Return every message of a server in the order of `seq`, as a client that catches up from 0 reads them."""
    messages: list[Any] = []
    after = 0
    while True:
        reply = await world.call("GET", f"/servers/{server_id}/changes?after={after}", token=token)
        assert reply.status == 200, reply
        messages += reply.body["messages"]
        after = reply.body["seq"]
        if not reply.body["has_more"]:
            return messages


def member_facts(member: Any) -> tuple[str, str | None]:
    """Return what a copy of a server keeps of a member: the role and the mute."""
    return member.get("role", "member"), member.get("muted_until")


class Replica:
    """A client's copy of a server, kept as the contract says: apply the next change, skip a known one, fetch missing ones."""

    def __init__(self, person: Person, server_id: int, transport: str = "websocket", page: int = 7) -> None:
        self.person, self.server_id, self.transport, self.page = person, server_id, transport, page
        self.seq = 0
        self.messages: dict[int, Any] = {}
        self.channels: dict[int, Any] = {}
        self.members: dict[int, tuple[str, str | None]] = {}
        self.name = "class"
        self.socket: Socket | None = None
        self.read = 0  # how many of the socket's events have been handled
        self.requests = 0  # how often it asked for changes that it had not received
        self.resets = 0

    async def connect(self) -> None:
        self.socket = await self.person.world.socket(self.person.token, transports=[self.transport])
        self.read = 0
        ack = await self.socket.ok("join_server", {"server_id": self.server_id, "after": self.seq})
        self.merge(ack["changes"])
        await self.catch_up(ack["changes"]["has_more"])

    async def disconnect(self) -> None:
        """Close the connection; events that are on their way are lost."""
        if self.socket is not None:
            await self.socket.close()
            self.socket = None

    def _tcp(self) -> Any:
        """Return the asyncio transport of the WebSocket."""
        assert self.socket is not None
        return self.socket.client.eio.ws._response.connection.transport

    def reset_connection(self) -> None:
        """Reset the TCP connection without a close frame. A polling client has none: it abandons its session."""
        if self.transport == "websocket":
            linger = (socket_module.SOL_SOCKET, socket_module.SO_LINGER, struct.pack("ii", 1, 0))
            self._tcp().get_extra_info("socket").setsockopt(*linger)
            self._tcp().abort()

    def pause_reading(self) -> None:
        """Stop reading from an open connection, with a small receive buffer."""
        if self.transport == "websocket":
            self._tcp().pause_reading()
            self._tcp().get_extra_info("socket").setsockopt(socket_module.SOL_SOCKET, socket_module.SO_RCVBUF, 4096)

    def resume_reading(self) -> None:
        self._tcp().resume_reading()

    async def catch_up(self, more: bool = True) -> None:
        while more:
            self.requests += 1
            changes = await self.person.ok("GET", f"/servers/{self.server_id}/changes?after={self.seq}&limit={self.page}")
            self.merge(changes)
            more = changes["has_more"]

    def merge(self, changes: Any) -> None:
        if changes.get("reset"):
            self.messages, self.channels, self.members, self.name = {}, {}, {}, ""
            self.resets += 1
        for message in changes["messages"]:
            self.messages[message["message_id"]] = message
        for deletion in changes["deleted"]:
            self.messages.pop(deletion["message_id"], None)
        if "channels" in changes:
            self.channels = {channel["channel_id"]: channel for channel in changes["channels"]}
            self.drop_orphans()
        if "members" in changes:
            self.members = {member["user_id"]: member_facts(member) for member in changes["members"]}
        self.name = changes.get("name", self.name)
        self.seq = changes["seq"]

    def drop_orphans(self) -> None:
        self.messages = {key: message for key, message in self.messages.items() if message["channel_id"] in self.channels}

    async def receive(self) -> None:
        """Apply all events that the server has emitted so far."""
        assert self.socket is not None
        await self.socket.call("ping")
        while self.read < len(self.socket.received):
            event, payload = self.socket.received[self.read]
            self.read += 1
            if "seq" not in payload or event == "mention" or payload["seq"] <= self.seq:
                continue
            if payload["seq"] > self.seq + 1:
                await self.catch_up()
            else:
                self.apply(event, dict(payload))
                self.seq = payload["seq"]

    def apply(self, event: str, payload: Any) -> None:
        message = self.messages.get(payload.get("message_id"))
        match event:
            case "message:new" | "message:edit":
                self.messages[payload["message_id"]] = payload
            case "message:deleted":
                self.messages.pop(payload["message_id"], None)
            case "reaction:add" | "reaction:remove" if message is not None:
                pairs = {(one["emoji"], user) for one in message.pop("reactions", []) for user in one["user_ids"]}
                pair = {(payload["emoji"], payload["user_id"])}
                pairs = pairs | pair if event == "reaction:add" else pairs - pair
                emojis = sorted({emoji for emoji, _ in pairs})
                if emojis:
                    message["reactions"] = [
                        {"emoji": emoji, "user_ids": sorted(user for one, user in pairs if one == emoji)} for emoji in emojis
                    ]
                message["seq"] = payload["seq"]
            case "channel:created" | "channel:updated":
                plain = {"kind": "text", "topic": ""} | payload
                plain.pop("seq")
                self.channels[payload["channel_id"]] = plain
            case "channel:deleted":
                del self.channels[payload["channel_id"]]
                self.drop_orphans()
            case "member:joined" | "member:updated":
                self.members[payload["user_id"]] = member_facts(payload)
            case "member:left":
                self.members.pop(payload["user_id"], None)
            case "server:updated":
                self.name = payload["name"]

    def state(self) -> Any:
        return {
            "seq": self.seq,
            "name": self.name,
            "messages": self.messages,
            "channels": self.channels,
            "members": self.members,
        }


async def server_state(person: Person, server_id: int) -> Any:
    """Return the state that a replica of the server must have, as the GET routes return it."""
    server = f"/servers/{server_id}"
    channels = (await person.ok("GET", f"{server}/channels"))["channels"]
    messages: dict[int, Any] = {}
    for channel in channels:
        path, after, more = f"/channels/{channel['channel_id']}/messages?limit=9", 0, True
        while more:
            page = await person.ok("GET", f"{path}&after={after}")
            messages |= {message["message_id"]: message for message in page["messages"]}
            after, more = max((one["message_id"] for one in page["messages"]), default=0), page["has_more"]
    seq, more = 0, True
    while more:
        changes = await person.ok("GET", f"{server}/changes?after={seq}")
        seq, more = changes["seq"], changes["has_more"]
    return {
        "seq": seq,
        "name": (await person.ok("GET", server))["name"],
        "messages": messages,
        "channels": {channel["channel_id"]: channel for channel in channels},
        "members": {one["user_id"]: member_facts(one) for one in (await person.ok("GET", f"{server}/members"))["members"]},
    }


# Each text with the members that it mentions. Both the server and the page are tested with this table.
MENTIONED = [
    "ana",
    "ana.b",
    "ben",
    "x_y",
    "o-neil",
    "José",
    "straße",
    "ΟΔΥΣΣΕΥΣ",
    "田中",
    "林小雨",
    "ユーザー",
    "สมชาย",
    "민수",
    "محمد",
    "राम",
]
MENTION_CASES = {
    "@ana": "ana",
    "hello @ANA, @Ben!": "ana ben",
    "@ana.Thanks": "ana",
    "@ana.": "ana",
    "@ana... well": "ana",
    "@ana-lyse": "ana",
    "@ana.b": "ana.b",
    "@ana.b.": "ana.b",
    "@ana.bc": "ana",
    "@ana's": "ana",
    "@ana/@ben": "ana",
    "@ana@ben": "ana",
    "@ana,@ben;(@x_y)": "ana ben x_y",
    "@analyse @ana_ @ana2 @ana\u0301": "",
    "@x_y @x_ @x": "x_y",
    "@o-neil @o-": "o-neil",
    "@nobody @ @@ @@ana @.ana": "ana",
    "@jose @josé @jose\u0301 @JOSÉ": "José",
    "@strasse @STRASSE": "straße",
    "@οδυσσευς @οδυσσευσ": "ΟΔΥΣΣΕΥΣ",
    "@\uff41\uff4e\uff41": "ana",
    "@ana😀 and 😀@ben ❤\ufe0f@x_y": "ana ben x_y",
    # Before the `@`
    "info@ana a.@ana -@ana /@ana _@ana 7@ana é@ana e\u0301@ana": "",
    "(@ana) \"@ben\" '@x_y'": "ana ben x_y",
    "*@ana* **@ben** ~~@x_y~~ >@o-neil": "ana ben x_y o-neil",
    "你好@林小雨": "林小雨",
    "ねえ@田中さん": "田中",
    "สวัสดี@สมชาย": "สมชาย",
    "안녕@민수 مرحبا@محمد नमस्ते@राम": "",
    # After the handle
    "@田中さん": "田中",
    "@田中2": "田中",
    "@田中": "田中",
    "@ユーザーさん、@林小雨你好": "ユーザー 林小雨",
    "@ana你好 @benさん": "ana ben",
    "@민수야 @민수": "민수",
    "@ana님": "ana",
    "@สมชายครับ": "สมชาย",
    "@محمد، @محمدا": "محمد",
    "@राम। @रामा": "राम",
    "@रामा": "",
    # Code
    "`@ana`": "",
    "``@ana ` @ben``": "",
    "`@ana` @ben `": "ben",
    "`@ana": "ana",
    "`@ana``": "ana",
    "`a\n@ana`": "ana",
    "\\`@ana\\`": "ana",
    "\\\\`@ana`": "",
    "```\n@ana\n```": "",
    "```py\n@ana\n``` @ben": "ben",
    "```@ana``` @ben": "ben",
    "```@ana\n@ben``` @x_y": "x_y",
    "look: ```\n@ana\n``` @ben": "ben",
    "look: ``` @ana": "ana",
    "```\n@ana": "",
    "````\n```\n@ana\n```\n````\n@ben": "ben",
    "```\n> ```\n@ana": "ana",
    "> ```\n> @ana\n> ```\n> @ben": "ben",
    "> ```\n> @ana\n@ben": "ben",
    "> > `@ana`\n> @ben": "ben",
    "- `@ana`\n- @ben": "ben",
    "1. ```\n@ana\n```\n2. @ben": "ben",
    "~~~\n@ana\n~~~": "ana",
    # Addresses and links
    "mail ana@ben.example and @ana": "ana",
    "https://example.org/@ana https://example.org/?to=@ana": "",
    "HTTPS://example.org?q=@ana": "",
    "https://example.org/(@ana)?q=(@ben) @x_y": "x_y",
    "(https://example.org?)@ana": "ana",
    "https://example.org\uff0c@ana 见https://example.org?q=@ana": "ana",
    "www.example.org?q=@ana .www.example.org?q=@ben": "ben",
    "xhttps://example.org?q=@ana _https://example.org?q=@ben_": "ana",
    "https://?q=@ana": "ana",
    "[@ana](https://example.org/?q=@ben)": "ana",
    "[`@ana`](https://example.org)": "",
    "[@ana](javascript:@ben)": "ana ben",
    "[@ana](https://example.org": "ana",
    "[a](mailto:x@ana.example) @ben": "ben",
    "\\[@ana](https://example.org?q=@ben)": "ana",
    # Escapes
    "\\@ana": "",
    "\\\\@ana": "ana",
    "\\\\\\@ana": "",
    "¯\\_(ツ)_/¯ @ana": "ana",
    "2*x + 3*y @ana": "ana",
}


# Each text with the HTML that the page makes of it: `<a ADDRESS>` is a link, `<li NUMBER>` a list item, `<pre WORD>` code.
MARKDOWN_CASES = {
    # Code
    "```print(1)```\nand so on": "<pre>print(1)</pre><p>and so on</p>",
    "```print(1)\nprint(2)```": "<pre>print(1)\nprint(2)</pre>",
    "```print(1)\nprint(2)``` thanks": "<pre>print(1)\nprint(2)</pre><p> thanks</p>",
    "```py\nprint(1)\n```": "<pre py>print(1)</pre>",
    "``` c++\nint x;\n\nint y;\n```\nso": "<pre c++>int x;\n\nint y;</pre><p>so</p>",
    "```py": "<pre>py</pre>",
    "```\npy\n```": "<pre>py</pre>",
    "```not a language\n1\n```": "<pre>not a language\n1</pre>",
    "```\n  indented": "<pre>  indented</pre>",
    "````\n```\nx\n```\n````": "<pre>```\nx\n```</pre>",
    "look: ```\na\n``` see": "<p>look: </p><pre>a</pre><p> see</p>",
    "look: ```a``` see": "<p>look: <code>a</code> see</p>",
    "use ``` for code": "<p>use ``` for code</p>",
    "```": "<p>```</p>",
    "```\n```": "<p>```\n```</p>",
    "``````": "<p>``````</p>",
    "> ```\n> a\n> ```": "<blockquote><pre>a</pre></blockquote>",
    "`a` ``b ` c`` `` ` `` `*x*`": "<p><code>a</code> <code>b ` c</code> <code>`</code> <code>*x*</code></p>",
    "`a": "<p>`a</p>",
    "`a\nb`": "<p>`a\nb`</p>",
    "``a`": "<p>``a`</p>",
    # Emphasis
    "*a* _b_ **c** ~~d~~ ***e***": "<p><em>a</em> <em>b</em> <strong>c</strong> <del>d</del> <em><strong>e</strong></em></p>",
    "**a *b* c** *a **b***": "<p><strong>a <em>b</em> c</strong> <em>a <strong>b</strong></em></p>",
    "*a\nb*": "<p><em>a\nb</em></p>",
    "2*x + 3*y": "<p>2*x + 3*y</p>",
    "2**x + 3**y = (a)*b*(c) * 5 * 6": "<p>2**x + 3**y = (a)*b*(c) * 5 * 6</p>",
    "snake_case_name __init__ _x": "<p>snake_case_name __init__ _x</p>",
    "f(*args, **kwargs)": "<p>f(*args, **kwargs)</p>",
    "(*^_^*) *_* T_T >_< -_-": "<p>(*^_^*) *_* T_T &gt;_&lt; -_-</p>",
    "¯\\_(ツ)_/¯ ¯_(ツ)_/¯ \\(^o^)/": "<p>¯\\_(ツ)_/¯ ¯_(ツ)_/¯ \\(^o^)/</p>",
    "这是**重点**内容 **“你好”**了": "<p>这是<strong>重点</strong>内容 <strong>“你好”</strong>了</p>",
    "**중요**합니다": "<p><strong>중요</strong>합니다</p>",
    "**😂** *ok 👍*": "<p><strong>😂</strong> <em>ok 👍</em></p>",
    "** a** *b * ~c~ ****": "<p>** a** *b * ~c~ ****</p>",
    # Escapes
    "\\*a\\* \\_b\\_ \\`c\\` \\[d](https://e.example)": "<p>*a* _b_ `c` [d](<a https://e.example>https://e.example</a>)</p>",
    "snake\\_case \\\\*a*": "<p>snake_case \\*a*</p>",
    "\\> a\n\\- b\n1\\. c": "<p>&gt; a\n- b\n1. c</p>",
    "C:\\Users\\ana \\\\server\\share a\\-b": "<p>C:\\Users\\ana \\\\server\\share a\\-b</p>",
    # Quotes
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    ">\n> a": "<blockquote><p>a</p></blockquote>",
    ">:( >x\n>>> x = 5": "<p>&gt;:( &gt;x\n&gt;&gt;&gt; x = 5</p>",
    ">": "<p>&gt;</p>",
    "a\n> b\nc": "<p>a</p><blockquote><p>b</p></blockquote><p>c</p>",
    # Lists
    "2. B\n4. D\n7. A": "<ol><li 2>B</li><li 4>D</li><li 7>A</li></ol>",
    "- a\n- b\n  more\n- c": "<ul><li>a</li><li>b\nmore</li><li>c</li></ul>",
    "- a\n  - b\n    - c\n  - d\n- e": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li><li>d</li></ul></li><li>e</li></ul>",
    "1. a\n   - b\n2. c": "<ol><li 1>a<ul><li>b</li></ul></li><li 2>c</li></ol>",
    "a:\n* b\n1) c\nd": "<p>a:</p><ul><li>b</li></ul><ol><li 1>c</li></ol><p>d</p>",
    "1. a\n```\nb\n```\n2. c": "<ol><li 1>a</li></ol><pre>b</pre><ol><li 2>c</li></ol>",
    "-1 1.5 -a\n-": "<p>-1 1.5 -a\n-</p>",
    # Links
    "https://en.wikipedia.org/wiki/Rust_(programming_language).": "<p><a https://en.wikipedia.org/wiki/Rust_(programming_language)>"
    "https://en.wikipedia.org/wiki/Rust_(programming_language)</a>.</p>",
    "(see https://a.example/b)": "<p>(see <a https://a.example/b>https://a.example/b</a>)</p>",
    "见https://example.org/docs\uff0c谢谢": "<p>见<a https://example.org/docs>https://example.org/docs</a>\uff0c谢谢</p>",
    "「https://a.example」https://b.example。": "<p>「<a https://a.example>https://a.example</a>」<a"
    " https://b.example>https://b.example</a>。</p>",
    "Https://a.example HTTP://b.example/C": "<p><a https://a.example>Https://a.example</a> <a"
    " http://b.example/C>HTTP://b.example/C</a></p>",
    "www.a.example, xwww.b.example": "<p><a https://www.a.example>www.a.example</a>, xwww.b.example</p>",
    "to info@a.example. or x@y": "<p>to <a mailto:info@a.example>info@a.example</a>. or x@y</p>",
    "联系info@a.example谢谢": "<p>联系<a mailto:info@a.example>info@a.example</a>谢谢</p>",
    "**https://a.example** _https://b.example/_": "<p><strong><a https://a.example>https://a.example</a></strong> "
    "<em><a https://b.example/>https://b.example/</a></em></p>",
    '"https://a.example/?q=1&r=2", <https://b.example>!': '<p>"<a https://a.example/?q=1&amp;r=2>'
    'https://a.example/?q=1&amp;r=2</a>", '
    "&lt;<a https://b.example>https://b.example</a>&gt;!</p>",
    "https://a.example/x_y_z*w*": "<p><a https://a.example/x_y_z*w>https://a.example/x_y_z*w</a>*</p>",
    "[the *docs*](https://a.example/(x))": "<p><a https://a.example/(x)>the <em>docs</em></a></p>",
    "[write](mailto:a@b.example)": "<p><a mailto:a@b.example>write</a></p>",
    "[a] (https://b.example) [c]": "<p>[a] (<a https://b.example>https://b.example</a>) [c]</p>",
    "[x](javascript:alert(1)) [y](data:text/html,z) javascript:1": "<p>[x](javascript:alert(1)) [y](data:text/html,z)"
    " javascript:1</p>",
    "https:// http://. www.": "<p>https:// http://. www.</p>",
    # Links whose text is another address than their target
    "[https://bank.example](https://evil.example)": "<p><a https://evil.example>https://bank.example (evil.example)</a></p>",
    "[bank.example](https://evil.example)": "<p><a https://evil.example>bank.example (evil.example)</a></p>",
    "[ https://bank.example ](https://evil.example)": "<p><a https://evil.example> https://bank.example "
    " (evil.example)</a></p>",
    "[www.bank.example/x](https://evil.example/x)": "<p><a https://evil.example/x>www.bank.example/x (evil.example)</a></p>",
    "[go to bank.example now](https://evil.example)": "<p><a https://evil.example>go to bank.example now"
    " (evil.example)</a></p>",
    "[bank\u200b.exam\u202eple](https://evil.example)": "<p><a https://evil.example>bank\u200b.exam\u202eple"
    " (evil.example)</a></p>",
    "[bank\uff0eexample](https://evil.example)": "<p><a https://evil.example>bank\uff0eexample (evil.example)</a></p>",
    "[a@bank.example](mailto:a@evil.example)": "<p><a mailto:a@evil.example>a@bank.example (a@evil.example)</a></p>",
    "[https://bank.example@evil.example](https://evil.example)": "<p><a https://evil.example>https://bank.example@evil.example"
    " (evil.example)</a></p>",
    "https://bank.example@evil.example": "<p><a https://bank.example@evil.example>https://bank.example@evil.example"
    " (evil.example)</a></p>",
    "[https://a.example/b](https://a.example/c)": "<p><a https://a.example/c>https://a.example/b</a></p>",
    "[www.a.example](https://a.example)": "<p><a https://a.example>www.a.example</a></p>",
    "[a@b.example](mailto:a@b.example)": "<p><a mailto:a@b.example>a@b.example</a></p>",
    # Paragraphs
    "a\nb\n\nc": "<p>a\nb</p><p>c</p>",
    "😂👨‍👩‍👧 🇫🇷": "<p big>😂👨‍👩‍👧 🇫🇷</p>",
    "😂" * 90 + " that was so funny": "<p>" + "😂" * 90 + " that was so funny</p>",
    "# a\n| b |": "<p># a\n| b |</p>",
    "<b>a</b> &amp;": "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp;</p>",
}


# ---- Settings -------------------------------------------------------------------------------------------------------


def all_commands() -> dict[str, click.Command]:
    """Return every command by its name, such as "user add"."""
    commands: dict[str, click.Command] = {}
    for name, one in chatrtc.main.commands.items():
        below = one.commands if isinstance(one, click.Group) else {"": one}
        commands |= {f"{name} {sub}".strip(): command for sub, command in below.items()}
    return commands


def all_options() -> list[tuple[str, str]]:
    return [
        (name, option.name or "")
        for name, one in all_commands().items()
        for option in one.params
        if isinstance(option, click.Option)
    ]


@pytest.mark.parametrize(("name", "option"), all_options())
def test_an_option_reads_its_variable(name: str, option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = all_commands()[name]
    args = ["x" for parameter in one.params if isinstance(parameter, click.Argument)]
    for needed in one.params:
        if isinstance(needed, click.Option) and needed.required and needed.name != option:
            args += [needed.opts[0], "x"]
    parameter = next(parameter for parameter in one.params if parameter.name == option)
    choices = parameter.type.choices if isinstance(parameter.type, click.Choice) else ()
    given = "123" if parameter.type is click.INT else str(tmp_path / "given")
    given = choices[-1] if choices else "1" if getattr(parameter, "is_flag", False) else given
    for variable in [variable for variable in os.environ if variable.startswith("CHATRTC_")]:
        monkeypatch.delenv(variable)
    unset = [] if option == "yes" else ["--yes"] * any(parameter.name == "yes" for parameter in one.params)
    monkeypatch.setenv(f"CHATRTC_{option.upper()}", given)
    with one.make_context(name, [*args, *unset]) as context:
        value = context.params.get(option, True)  # a confirmation is not passed on
    value = value[0] if isinstance(value, tuple) else value
    assert str(getattr(value, "name", value)) == {"1": "True"}.get(given, given)


def test_settings_have_one_list() -> None:
    flags = {option for option in chatrtc.main.commands["serve"].params if isinstance(option, click.Option)}
    assert {flag.name for flag in flags} == set(chatrtc.Settings.__struct_fields__)
    assert all(flag.help for flag in flags)


def test_an_invalid_setting_is_rejected(tmp_path: Path) -> None:
    wrongs: tuple[dict[str, Any], ...] = (
        {"port": "3000"}, {"port": 65536}, {"token_ttl": 0}, {"registration": "maybe"}, {"nonsense": 1},
        {"conversations": "some"}, {"database": ""},
        {"tls_cert": "cert.pem"}, {"secret": "short"}, {"secret": ""}, {"secret": "é" * 15},
        *({"cors_origin": [origin]} for origin in (
            "https://x/", "x.example", "ftp://x", "https://x/path", "https://x?", "https://a b", "null", "",
            "https://x:65536", "https://bücher.example", "https://u@x",
        )),
        *({"trusted_proxy": [proxy]} for proxy in ("", "proxy", "10.0.0.0/33", "10.0.0.1:80", "::1/200")),
        *({"public_url": url} for url in (
            "", "chat.example", "ftp://x", "https://x?a=b", "https://x/#a", "https://x y", "https://u@x", "https://x:70000/a",
            "https://x/" + "y" * 999,
        )),
    )  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(chatrtc.StartError):
            chatrtc.ChatRTC(**({"database": str(tmp_path / "chat.db")} | wrong))
    chatrtc.ChatRTC(
        database=str(tmp_path / "chat.db"), secret="é" * 16, port=0, cors_origin=["*", "HTTPS://X:443", "http://[::1]:5"],
        trusted_proxy=["10.0.0.1", "10.0.0.1/8", "::1", "::ffff:10.0.0.1", "unix"], public_url="https://X.example:8443/chat/",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


# ---- Text -----------------------------------------------------------------------------------------------------------
# Usernames, display names and other texts: which are valid, and how they are normalized.


JOINED_NAME = "می\u200cنا"  # with a joiner that the script needs  # noqa: RUF001


@pytest.mark.portable
@pytest.mark.parametrize(
    "name",
    [
        "al", "a" * 32, "élodie", "Жанна", "王小明", "नमस्ते", "a.b-c_d", "42", "ﬁona", "عمر", "ΣΊΣΥΦΟΣ", "Nguyễn", "田中さんA",
        JOINED_NAME, "क्\u200dष", "A민수", "ကြွေး", "عمر٣",
    ],
)  # fmt: skip
async def test_a_username_may_use_any_script(world: World, name: str) -> None:
    person = await world.person(name)
    assert (await person.ok("GET", "/users/me"))["username"] == name
    for spelled in (name.upper(), unicodedata.normalize("NFD", name)):
        again = await world.call("POST", "/auth/register", {"username": spelled, "password": "correct horse"})
        assert again.code == "CONFLICT", spelled
    login = await world.call("POST", "/auth/login", {"username": name.upper(), "password": "correct horse"})
    assert (login.status, login.body["user_id"]) == (200, person.user_id)


@pytest.mark.portable
@pytest.mark.parametrize(
    "name",
    [
        "a b", "a@b", "a/b", "a\n", "\u200bab", "a\u202eb", "\u3164\u3164", "ab\x00", "😀😀", "ab:", "\u0301a", "  ",
        "Teacher\u17b5", "Teacher\U000e0100", "\u03a4eacher", "Te\u0430cher", "x" + "\u0301" * 30, "x\u0301\u0302\u0303",
        "ab\u200cd", "\u200cab", "می\u200c", "عمر३", "a\u0661", "カㄅ한", "ก" + "ี" * 5, "ab\u00ad", "ab\ufe0f",
        "ana\u20dd", "a\u0488b",
    ],
)  # fmt: skip
async def test_an_invalid_username_is_rejected(world: World, name: str) -> None:
    reply = await world.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
    assert (reply.code, reply.body["reason"], reply.body["field"]) == ("BAD_REQUEST", "USERNAME_FORM", "username")


BLANKS = [" ", "\n\t ", "\u200b", "\u3164", "\u2800", "\ufe0f\u200d", "\U000e0041", "\u00ad\u2060"]
CONTROLS = ["a\x00", "a\x1b[0m", "a\x85b", "\x9b"]
JOINED = ["👩\u200d🎓", "❤️", JOINED_NAME, "1️⃣", "🏴\U000e0067\U000e0062\U000e007f", "🏳️\u200d🌈", "क्\u200dष", "O'Neil"]
HIDDEN = [
    "a\nb",
    "ab\n",
    "a\tb",
    "a\u202eb",
    "a\u2066b",
    "a\u200fb",
    "a\u061c",
    "a\u200bb",
    "Ti\u200cm",
    "\u200dab",
    "می\u200c",
]


@pytest.mark.portable
async def test_every_text_needs_visible_characters(world: World) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    server = f"/servers/{place.server_id}"

    async def codes(text: str) -> list[str]:
        """Use a text as a message, a topic, and the name of a channel, a server and a user; return the error codes."""
        calls = [
            ("POST", "/messages", {"channel_id": place.channel_id, "content": text}),
            ("PATCH", f"/channels/{place.channel_id}", {"topic": text}),
            ("PATCH", f"/channels/{place.channel_id}", {"name": text}),
            ("PATCH", server, {"name": text}),
            ("PATCH", "/users/me", {"name": text}),
        ]
        return [(await ana.call(*call)).code for call in calls]

    for text in BLANKS + CONTROLS:
        assert await codes(text) == ["BAD_REQUEST"] * 5, ascii(text)
    for text in (*BLANKS[:2], *CONTROLS):
        assert (await ana.call("GET", f"{server}/search", params={"q": text})).code == "BAD_REQUEST", ascii(text)
    for text in HIDDEN[3:]:
        assert await codes(text) == ["", "", *["BAD_REQUEST"] * 3], ascii(text)
    for text in HIDDEN[:3]:  # spaces around a user's name are removed
        assert await codes(text) == ["", "", "BAD_REQUEST", "BAD_REQUEST", "" if text[-1] == "\n" else "BAD_REQUEST"], ascii(
            text
        )
    for text in JOINED:
        assert await codes(text) == [""] * 5, ascii(text)
    for name in ("\u200b", "Ana" + "\u0301" * 3, "x" + "\u0489" * 30):
        reply = await ana.call("PATCH", "/users/me", {"name": name})
        assert (reply.body["reason"], reply.body["field"]) == ("NAME_FORM", "name")
    assert (await ana.call("PATCH", f"/channels/{place.channel_id}", {"topic": ""})).status == 200


@pytest.mark.portable
@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Tim Meier", "Tim.Meier", "Tim.Meier2"), ("O'Neil", "ONeil", "ONeil2"), ("😀", "user", "user2"), ("李", "李2", "李3"),
        ("Tim Тимов", "Tim", "Tim2"), ("Te\u0430cher", "user", "user2"), (JOINED_NAME, JOINED_NAME, JOINED_NAME + "2"),
        ("n" * 62, "n" * 30, "n" * 30 + "2"), ("ben", "ben", "ben2"), ("عمر ٣", "عمر.3", "عمر.32"), ("1️⃣ A", "1.A", "1.A2"),
    ],
)  # fmt: skip
async def test_a_username_is_derived_from_a_name(world: World, name: str, first: str, second: str) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    invite = await ana.ok("POST", f"/servers/{place.server_id}/invites", {})
    one = await world.call("POST", "/auth/register", {"name": f" {name} ", "password": "correct horse"})
    two = await world.call("POST", "/auth/guest", {"name": name, "code": invite["code"]})
    assert [one.body["username"], two.body["username"]] == [first, second]
    assert one.body.get("name", first) == two.body["name"] == name
    login = await world.call("POST", "/auth/login", {"username": first.upper(), "password": "correct horse"})
    assert (login.body["user_id"], login.body.get("name")) == (one.body["user_id"], one.body.get("name"))


@pytest.mark.portable
async def test_people_with_the_same_name_get_different_usernames(world: World) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    invite = await ana.ok("POST", f"/servers/{place.server_id}/invites", {})
    guests = [world.call("POST", "/auth/guest", {"name": "Li Na", "code": invite["code"]}) for _ in range(40)]
    names = [reply.body["username"] for reply in await asyncio.gather(*guests)]
    assert len({chatrtc.name_key(name) for name in names}) == 40
    assert {"Li.Na", "Li.Na2", "Li.Na3"} <= set(names)
    reply = await world.call("POST", "/auth/guest", {"code": invite["code"]})
    assert (reply.code, reply.body["reason"], reply.body["field"]) == ("BAD_REQUEST", "FIELD_MISSING", "username")


# ---- File types -----------------------------------------------------------------------------------------------------
# Names, media types and picture sizes, for files of every type and for files that pretend to be another.


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG picture: valid with `data` from `gray_pixels`."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    written = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def gray_pixels(width: int, height: int) -> bytes:
    return zlib.compress(bytes(1 + width) * height)


def jpeg(width: int, height: int, metadata: int = 0, frame: int = 0xC0) -> bytes:
    """Return the beginning of a JPEG picture with so many bytes of metadata, in segments of up to 65,000."""
    parts = [bytes(min(65_000, metadata - at)) for at in range(0, metadata, 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    tables = b"\xff\xdb\0\x43" + bytes(65) + b"\xff\xff\xc4\0\x04\0\0"
    return b"\xff\xd8" + segments + tables + bytes([0xFF, frame]) + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"


def gif(width: int, height: int, colors: int = 0, then: bytes = b"!\xf9\4\0\0\0\0\0") -> bytes:
    """Return a GIF picture of one pixel on a screen of this size. `colors` is the exponent of the number of colors."""
    flags = 0x80 | (colors - 1) if colors else 0
    image = b",\0\0\0\0\1\0\1\0\x80\0\0\0\xff\xff\xff\2\2D\1\0;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, flags, 0, 0) + bytes(3 << colors if colors else 0) + then + image


def webp(chunk: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    rows = (width * bits // 8 + 3) // 4 * 4 * abs(height) if width * abs(height) < 10_000 else 0
    header = struct.pack("<IiiHHIIIIII", 40, width, height, 1, bits, 0, rows, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + rows, 0, 0, 54) + header + bytes(rows)


def ftyp(brand: bytes, then: bytes = b"") -> bytes:
    return b"\0\0\0\x14ftyp" + brand + bytes(4) + b"mif1" + then


def ispe(width: int, height: int) -> bytes:
    """Return the box with the size of a picture in an AVIF file."""
    return b"\0\0\0\x14ispe" + bytes(4) + struct.pack(">II", width, height)


HTML_FILE = b"<!doctype html><script>alert(1)</script>"
SVG_FILE = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
UNKNOWN = "application/octet-stream"
# What a file is: its first bytes, its type, and its size if it is a picture that may be shown.
FILE_CASES: dict[str, tuple[bytes, str, tuple[int, int] | None]] = {
    "png": (png(640, 480), "image/png", (640, 480)),
    "png with html": (png(8, 9) + HTML_FILE, "image/png", (8, 9)),
    "png of 50 million pixels": (png(10_000, 5_000), "image/png", (10_000, 5_000)),
    "png of more": (png(10_000, 5_001), UNKNOWN, None),
    "png of 10,000 x 10,000": (png(10_000, 10_000), UNKNOWN, None),
    "png of no pixels": (png(0, 480), UNKNOWN, None),
    "png of 4 billion columns": (png(2**32 - 1, 1), UNKNOWN, None),
    "png, cut": (png(640, 480)[:28], UNKNOWN, None),
    "png without header": (b"\x89PNG\r\n\x1a\n" + png(640, 480)[33:] + bytes(40), UNKNOWN, None),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", UNKNOWN, None),
    "jpeg": (jpeg(640, 480), "image/jpeg", (640, 480)),
    "jpeg, progressive": (jpeg(640, 480, frame=0xC2), "image/jpeg", (640, 480)),
    "jpeg with metadata": (jpeg(640, 480, 200_000), "image/jpeg", (640, 480)),
    "jpeg with more metadata than a piece": (jpeg(640, 480, 300_000)[: chatrtc.PIECE_BYTES], UNKNOWN, None),
    "jpeg of too many pixels": (jpeg(65_500, 65_500), UNKNOWN, None),
    "jpeg, cut": (jpeg(640, 480)[:-6], UNKNOWN, None),
    "jpeg of 1,000 segments": (b"\xff\xd8" + b"\xff\xe1\0\2" * 1000 + jpeg(8, 8)[2:], UNKNOWN, None),
    "jpeg with html": (b"\xff\xd8\xff" + HTML_FILE, UNKNOWN, None),
    "jpeg with a segment of no bytes": (b"\xff\xd8\xff\xe1\0\0" + jpeg(8, 8)[2:], UNKNOWN, None),
    "gif": (gif(640, 480), "image/gif", (640, 480)),
    "gif with colors": (gif(640, 480, 8), "image/gif", (640, 480)),
    "gif with an image first": (gif(3, 4, then=b""), "image/gif", (3, 4)),
    "gif with html at its end": (gif(3, 4) + HTML_FILE, "image/gif", (3, 4)),
    "gif of too many pixels": (gif(65_535, 65_535), UNKNOWN, None),
    "gif and html": (b"GIF89a/*" + HTML_FILE + b"*/=1", UNKNOWN, None),
    "gif and javascript": (b"GIF89a=1;alert(1)//" + bytes(40), UNKNOWN, None),
    "gif, cut": (gif(640, 480)[:13], UNKNOWN, None),
    "webp, lossy": (webp(b"VP8 " + bytes(7) + b"\x9d\1\x2a" + struct.pack("<HH", 640 | 0x4000, 480)), "image/webp", (640, 480)),
    "webp, lossless": (webp(b"VP8L" + bytes(4) + b"\x2f" + struct.pack("<I", 639 | 479 << 14)), "image/webp", (640, 480)),
    "webp, extended": (webp(b"VP8X" + bytes(8) + b"\x7f\2\0\xdf\1\0"), "image/webp", (640, 480)),
    "webp of too many pixels": (webp(b"VP8X" + bytes(8) + b"\xff" * 6), UNKNOWN, None),
    "webp, cut": (webp(b"VP8X" + bytes(8) + b"\x7f\2"), UNKNOWN, None),
    "bmp": (bmp(64, 48), "image/bmp", (64, 48)),
    "bmp, top down": (bmp(64, -48), "image/bmp", (64, 48)),
    "bmp of too many pixels": (bmp(2**31 - 1, -(2**31)), UNKNOWN, None),
    "a text that begins like a bmp": (b"BMW 320d, 2019", "text/plain", None),
    "avif": (ftyp(b"avif", ispe(64, 64) + ispe(640, 480)), "image/avif", (640, 480)),
    "avif without a size": (ftyp(b"avif"), UNKNOWN, None),
    "heic": (ftyp(b"heic", ispe(640, 480)), UNKNOWN, None),
    "mp3": (b"\xff\xfb\x90\x64" + bytes(400), "audio/mpeg", None),
    "mp3 with tags": (b"ID3\4\0\0\0\0\0\x21" + bytes(400), "audio/mpeg", None),
    "ogg": (b"OggS\0\2" + bytes(20) + b"\1\x13OpusHead", "audio/ogg", None),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt ", "audio/wav", None),
    "flac": (b"fLaC\0\0\0\x22" + bytes(34), "audio/flac", None),
    "m4a": (ftyp(b"M4A "), "audio/mp4", None),
    "mp4": (ftyp(b"isom"), "video/mp4", None),
    "mov": (ftyp(b"qt  "), "video/quicktime", None),
    "webm": (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x84webm", "video/webm", None),
    "matroska": (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\1B\xf7\x81\1B\xf2\x81\4B\xf3\x81\x08B\x82\x88matroska", UNKNOWN, None),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "application/pdf", None),
    "zip": (b"PK\3\4\x14\0", "application/zip", None),
    "an empty zip": (b"PK\5\6" + bytes(18), "application/zip", None),
    "svg": (SVG_FILE, "text/plain", None),
    "html": (HTML_FILE, "text/plain", None),
    "xml": (b'<?xml version="1.0"?><x/>', "text/plain", None),
    "a script": (b"#!/bin/sh\nrm -rf ~\n", "text/plain", None),
    "text": ("Grüße, 你好\r\n\t😀".encode(), "text/plain", None),
    "text with a byte order mark": (b"\xef\xbb\xbfa", "text/plain", None),
    "text, cut in a character": ("日本".encode()[:-1], "text/plain", None),
    "utf-16": ("text".encode("utf-16"), UNKNOWN, None),
    "latin-1": ("Grüße".encode("latin-1"), UNKNOWN, None),
    "text with NUL": (b"text\0", UNKNOWN, None),
    "a program": (b"\x7fELF\2\1\1" + bytes(40), UNKNOWN, None),
    "gzip": (gzip.compress(b"text"), UNKNOWN, None),
    "nothing": (b"", "text/plain", None),
}  # fmt: skip


@pytest.mark.portable
@pytest.mark.parametrize("case", FILE_CASES)
def test_the_type_of_a_file_comes_from_its_content(case: str) -> None:
    head, media_type, size = FILE_CASES[case]
    assert (chatrtc.detect_type(head), chatrtc.picture_size(head)) == (media_type, size)
    assert media_type == UNKNOWN or (media_type in chatrtc.INLINE_TYPES) == media_type.startswith(
        ("image/", "audio/", "video/", "application/pdf")
    )


@pytest.mark.portable
@given(st.sampled_from([*FILE_CASES.values()]), st.integers(0, 300), st.binary(max_size=300), st.binary(max_size=40))
def test_no_bytes_confuse_the_detection(case: tuple[bytes, str, Any], at: int, damage: bytes, more: bytes) -> None:
    """Bytes are overwritten or cut off anywhere. Whatever the type, only a picture has a size, and it is within its limit."""
    head = (case[0][:at] + damage + case[0][at + len(damage) :] + more)[: chatrtc.PIECE_BYTES]
    for damaged in (head, head[:at]):
        media_type, size = chatrtc.detect_type(damaged), chatrtc.picture_size(damaged)
        assert media_type in {*chatrtc.FILE_TYPES, "text/plain", UNKNOWN}
        assert (size is not None) == media_type.startswith("image/")
        assert size is None or 0 < size[0] * size[1] <= chatrtc.MAX_PIXELS


FILE_NAMES = {  # a name that a client sends -> the name that is kept
    "photo.jpg": "photo.jpg",
    "../../etc/passwd": "passwd",
    "..\\..\\autoexec.bat": "autoexec.bat",
    "C:\\Users\\Ana\\Grüße.txt": "Grüße.txt",
    "annual\u202egnp.exe": "annualgnp.exe",
    "a\u2066b\u200b\ufeff.txt": "ab.txt",
    "a\0b.txt\0": "ab.txt",
    "a\r\nSet-Cookie: b.txt": "aSet-Cookie_ b.txt",
    'say "hi"; it\'s.txt': "say 'hi'; it's.txt",
    "<script>.html": "_script_.html",
    "a:b|c?d*.txt": "a_b_c_d_.txt",
    "  two   words\u00a0.txt ": "two words.txt",
    "Gru\u0308\u00dfe.txt": "Gr\u00fc\u00dfe.txt",
    "a" * 300: "a" * 120,
    "a" * 300 + ".jpeg": "a" * 115 + ".jpeg",
    "報告" * 100 + ".pdf": ("報告" * 100)[:65] + ".pdf",
    "😀" * 120 + ".png": "😀" * 49 + ".png",
    "a." + "b" * 300: "a." + "b" * 118,
    "a" * 117 + ". b.txt": "a" * 116 + ".txt",
    ".htaccess": "htaccess",
    "name. . ": "name",
    "\ud800.txt": "txt",
    "100% #1 & ü.txt": "100% #1 & ü.txt",
    **dict.fromkeys(["", ".", "..", "../", "\0", " ", "\u202e", "a/b/", "\\", "\u2028"], "file"),
}  # fmt: skip


@pytest.mark.portable
@pytest.mark.parametrize("name", FILE_NAMES, ids=ascii)
def test_a_file_name_is_cleaned(name: str) -> None:
    assert chatrtc.clean_file_name(name) == FILE_NAMES[name]


@pytest.mark.portable
@given(st.text(st.one_of(st.characters(), st.sampled_from("/\\. \t\n\0\"'\u202e\u200d\u0308u😀報")), max_size=300))
def test_a_clean_file_name_is_safe_everywhere(name: str) -> None:
    clean = chatrtc.clean_file_name(name)
    assert 0 < len(clean) <= 120
    assert len(clean.encode()) <= 200
    assert clean == clean.strip(". ") == chatrtc.clean_file_name(clean)
    assert not re.search(r'[\x00-\x1f\x7f-\x9f/\\"<>:|?*\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]', clean)


async def test_browsers_read_the_same_picture_sizes(browser: Browser) -> None:
    """The size that is kept reserves the space in which a browser shows the picture."""
    page = await browser.new_page()
    draw = """async type => {
        const canvas = Object.assign(document.createElement("canvas"), {width: 37, height: 23})
        canvas.getContext("2d").fillRect(1, 2, 3, 4)
        const blob = await new Promise(done => canvas.toBlob(done, type, 0.8))
        return [...new Uint8Array(await blob.arrayBuffer())]
    }"""
    show = """async bytes => {
        const picture = await createImageBitmap(new Blob([new Uint8Array(bytes)]))
        return [picture.width, picture.height]
    }"""
    for media_type in ("image/png", "image/jpeg", "image/webp"):
        drawn = bytes(await page.evaluate(draw, media_type))
        assert (chatrtc.detect_type(drawn), chatrtc.picture_size(drawn)) == (media_type, (37, 23))
    for made in (png(37, 23, gray_pixels(37, 23)), gif(37, 23), bmp(37, 23), bmp(37, -23)):
        assert tuple(await page.evaluate(show, [*made])) == chatrtc.picture_size(made) == (37, 23)
    await page.close()


# ---- Payloads -------------------------------------------------------------------------------------------------------
# The errors of invalid arguments, and the keys of results.


@pytest.mark.portable
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"channel_id": 1, "content": ""}, "content must not be empty"),
        ({"channel_id": 1, "content": " \n"}, "content is blank or contains a character that is not allowed"),
        ({"channel_id": 1, "content": "x" * 4001}, "content must have at most 4000 characters"),
        ({"channel_id": 0, "content": "x"}, "channel_id must be at least 1"),
        ({"content": "x"}, "channel_id is missing"),
        ({"channel_id": 1, "content": "x", "colour": "red"}, "Unknown field: colour"),
        ({"channel_id": "one", "content": "x"}, "channel_id: Expected 'int', got 'str'"),
        ([], "The request: Expected 'object', got 'array'"),
    ],
)
async def test_validation_errors_are_plain_sentences(world: World, body: Any, sentence: str) -> None:
    ana = await world.person("ana")
    assert (await ana.call("POST", "/messages", body)).body["error"] == sentence


@pytest.mark.portable
async def test_a_plain_message_has_the_keys_of_the_specification_and_seq(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    listener = await ben.socket(place.server_id)
    message = await ana.post(place.channel_id, "hello")
    assert set(message) == MESSAGE_KEYS
    assert await listener.receive("message:new") == message
    assert await ben.ok("GET", f"/messages/{message['message_id']}") == message
    history = await ben.ok("GET", f"/channels/{place.channel_id}/messages")
    assert history == {"messages": [message], "has_more": False}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", message["created_at"])


@pytest.mark.portable
async def test_an_optional_key_is_omitted_while_it_equals_its_default(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    first = await ana.post(place.channel_id, "first")
    full = await ana.post(place.channel_id, "@ben look", reply_to=first["message_id"], nonce="n1")
    assert set(full) == MESSAGE_KEYS | {"reply_to", "nonce", "mentions"}
    assert (full["reply_to"], full["nonce"], full["mentions"]) == (first["message_id"], "n1", [ben.user_id])
    path = f"/messages/{full['message_id']}"
    await ben.ok("PUT", f"{path}/reactions/👍")
    await ana.ok("PUT", f"{path}/reactions/👍")
    edited = await ana.ok("PATCH", path, {"content": "nobody"})
    assert set(edited) == MESSAGE_KEYS | {"reply_to", "nonce", "edited_at", "reactions"}
    assert edited["reactions"] == [{"emoji": "👍", "user_ids": sorted([ana.user_id, ben.user_id])}]
    for person in (ana, ben):
        await person.ok("DELETE", f"{path}/reactions/👍")
    assert set(await ben.ok("GET", path)) == MESSAGE_KEYS | {"reply_to", "nonce", "edited_at"}


@pytest.mark.portable
async def test_results_have_the_keys_of_the_contract(world: World) -> None:
    ana = await world.person("ana")
    account = (await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})).body
    assert set(account) == {"user_id", "username", "token", "expires_at"}
    assert set(await ana.ok("GET", "/users/me")) == {"user_id", "username", "status", "created_at"}
    server = await ana.ok("POST", "/servers", {"name": "class"})
    assert set(server) == {"server_id", "name", "owner_id", "created_at", "role", "channels"}
    assert (server["name"], server["owner_id"], server["role"]) == ("class", ana.user_id, "owner")
    assert [channel["name"] for channel in server["channels"]] == ["general"]
    path = f"/servers/{server['server_id']}"
    assert await ana.ok("GET", "/servers") == {"servers": [server]}
    assert await ana.ok("GET", path) == server
    voice = await ana.ok("POST", f"{path}/channels", {"name": "talk", "kind": "voice", "topic": "aloud"})
    assert voice == {"server_id": server["server_id"], "channel_id": voice["channel_id"], "name": "talk"} | {
        "kind": "voice",
        "topic": "aloud",
    }
    assert await ana.ok("GET", f"{path}/channels") == {"channels": [*server["channels"], voice]}
    (member,) = (await ana.ok("GET", f"{path}/members"))["members"]
    assert set(member) == {"server_id", "user_id", "username", "role", "status", "joined_at", "connected"}
    invite = await ana.ok("POST", f"{path}/invites", {"max_uses": 3, "expires_in": 60})
    assert set(invite) == {"code", "server_id", "max_uses", "uses", "expires_at"}
    assert await ana.ok("GET", f"{path}/invites") == {"invites": [invite]}
    preview = (await world.call("GET", f"/invites/{invite['code']}")).body
    assert preview == {"code": invite["code"], "server_id": server["server_id"]} | {"server_name": "class", "member_count": 1}
    health = await world.call("GET", "/healthz")
    assert (health.status, set(health.body), health.body["status"]) == (200, {"status", "version"}, "ok")


# ---- Events ---------------------------------------------------------------------------------------------------------
# For each event of the contract: a function that causes it, the keys of its payload, and the sockets that receive it.

MESSAGE_KEYS = {"channel_id", "message_id", "content", "author_id", "author_username", "created_at", "seq"}
PLACE_KEYS = {"server_id", "user_id", "username"}
TYPING_KEYS = {"channel_id", "user_id", "username"}


Act = Callable[[Scene], Awaitable[dict[str, Any]]]


class Story(NamedTuple):
    event: str
    keys: set[str]
    act: Act
    actor_receives: bool = True


STORIES: dict[str, Story] = {}


def story(event: str, keys: set[str], actor_receives: bool = True) -> Callable[[Act], Act]:
    """Add a function to STORIES in which Ana causes the event. It returns fields that the payload must contain."""

    def register(act: Act) -> Act:
        STORIES[f"{event} {act.__name__}".replace("_", " ")] = Story(event, keys, act, actor_receives)
        return act

    return register


@story("message:new", MESSAGE_KEYS)
async def by_posting(scene: Scene) -> dict[str, Any]:
    message: dict[str, Any] = await scene.post()
    return message


@story("message:new", MESSAGE_KEYS)
async def by_posting_over_the_socket(scene: Scene) -> dict[str, Any]:
    ack = await scene.ana_socket.ok("message:send", {"channel_id": scene.place.channel_id, "content": "told"})
    assert ack.pop("success") is True
    assert await scene.ana.ok("GET", f"/messages/{ack['message_id']}") == ack
    return dict(ack)


@story("message:edit", MESSAGE_KEYS | {"edited_at"})
async def by_editing(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    edited: dict[str, Any] = await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "better"})
    assert edited["content"] == "better"
    return edited


@story("message:edit", MESSAGE_KEYS | {"edited_at"})
async def by_editing_over_the_socket(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    ack = await scene.ana_socket.ok("message:edit", {"message_id": message["message_id"], "content": "better"})
    return {key: value for key, value in ack.items() if key != "success"} | {"content": "better"}


@story("message:edit", MESSAGE_KEYS | {"pinned"})
async def by_pinning(scene: Scene) -> dict[str, Any]:
    message: dict[str, Any] = await scene.post()
    await scene.ana.ok("PUT", f"/messages/{message['message_id']}/pin")
    return message | {"pinned": True, "seq": message["seq"] + 1}


@story("message:edit", MESSAGE_KEYS)
async def by_unpinning(scene: Scene) -> dict[str, Any]:
    message: dict[str, Any] = await scene.post()
    await scene.ana.ok("PUT", f"/messages/{message['message_id']}/pin")
    await scene.ana_socket.receive("message:edit")
    await scene.ben_socket.receive("message:edit")
    await scene.ana.ok("DELETE", f"/messages/{message['message_id']}/pin")
    return message | {"seq": message["seq"] + 2}


@story("message:deleted", {"channel_id", "message_id", "seq"})
async def by_clearing_the_channel(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    reply = await scene.ana.call("DELETE", f"/channels/{scene.place.channel_id}/messages")
    assert (reply.status, reply.body) == (202, b"")
    return {"channel_id": scene.place.channel_id, "message_id": message["message_id"], "seq": message["seq"] + 1}


@story("message:deleted", {"channel_id", "message_id", "seq"})
async def by_deleting(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    await scene.ana.ok("DELETE", f"/messages/{message['message_id']}")
    return {"channel_id": scene.place.channel_id, "message_id": message["message_id"], "seq": message["seq"] + 1}


REACTION_KEYS = {"channel_id", "message_id", "user_id", "username", "emoji", "seq"}


@story("reaction:add", REACTION_KEYS)
async def by_reacting(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    await scene.ana.ok("PUT", f"/messages/{message['message_id']}/reactions/🎉")
    return {"message_id": message["message_id"], "user_id": scene.ana.user_id, "username": "ana", "emoji": "🎉"}


@story("reaction:add", REACTION_KEYS)
async def by_reacting_over_the_socket(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    assert await scene.ana_socket.ok("reaction:add", {"message_id": message["message_id"], "emoji": "a/b"}) == {"success": True}
    return {"message_id": message["message_id"], "emoji": "a/b"}


@story("reaction:remove", REACTION_KEYS)
async def by_removing_a_reaction(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    await scene.ana.ok("PUT", f"/messages/{message['message_id']}/reactions/a%2Fb")
    await scene.ana.ok("DELETE", f"/messages/{message['message_id']}/reactions/a%2Fb")
    return {"message_id": message["message_id"], "emoji": "a/b", "user_id": scene.ana.user_id}


@story("reaction:remove", REACTION_KEYS)
async def by_removing_a_reaction_over_the_socket(scene: Scene) -> dict[str, Any]:
    message = await scene.post()
    reaction = {"message_id": message["message_id"], "emoji": ":+1:"}
    await scene.ana_socket.ok("reaction:add", reaction)
    assert await scene.ana_socket.ok("reaction:remove", reaction) == {"success": True}
    return reaction


@story("user:typing", TYPING_KEYS, actor_receives=False)
async def by_typing(scene: Scene) -> dict[str, Any]:
    assert await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id}) == {"success": True}
    return {"channel_id": scene.place.channel_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("typing_stop", TYPING_KEYS, actor_receives=False)
async def by_stopping_typing(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    assert await scene.ana_socket.ok("typing_stop", {"channel_id": scene.place.channel_id}) == {"success": True}
    return {"channel_id": scene.place.channel_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("typing_stop", TYPING_KEYS, actor_receives=False)
async def by_posting_while_typing(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await scene.post()
    return {"user_id": scene.ana.user_id}


@story("typing_stop", TYPING_KEYS, actor_receives=False)
async def by_posting_over_the_socket_while_typing(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await scene.ana_socket.ok("message:send", {"channel_id": scene.place.channel_id, "content": "told"})
    return {"channel_id": scene.place.channel_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("typing_stop", TYPING_KEYS, actor_receives=False)
async def by_unsubscribing_while_typing(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id})
    return {"user_id": scene.ana.user_id}


@story("user:disconnected", PLACE_KEYS, actor_receives=False)
async def by_unsubscribing(scene: Scene) -> dict[str, Any]:
    assert await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id}) == {"success": True}
    return {"server_id": scene.place.server_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("user:connected", PLACE_KEYS)
async def by_subscribing_again(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id})
    await scene.ana_socket.ok("join_server", {"server_id": scene.place.server_id})
    return {"server_id": scene.place.server_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("user:status", {"user_id", "username", "status"})
async def by_setting_a_status(scene: Scene) -> dict[str, Any]:
    profile = await scene.ana.ok("PATCH", "/users/me", {"status": "busy"})
    assert set(profile) == {"user_id", "username", "status", "created_at"}
    return {"user_id": scene.ana.user_id, "username": "ana", "status": "busy"}


@story("user:status", {"user_id", "username", "status"})
async def by_setting_a_status_over_the_socket(scene: Scene) -> dict[str, Any]:
    assert await scene.ana_socket.ok("user:status", {"status": "away"}) == {"success": True}
    return {"user_id": scene.ana.user_id, "username": "ana", "status": "away"}


@story("member:joined", {*PLACE_KEYS, "seq"})
async def by_accepting_an_invite(scene: Scene) -> dict[str, Any]:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    eve = await scene.world.person("eve")
    await eve.ok("POST", f"/invites/{invite['code']}")
    return {"server_id": scene.place.server_id, "user_id": eve.user_id, "username": "eve"}


@story("member:joined", {*PLACE_KEYS, "seq"})
async def by_registering_with_an_invite(scene: Scene) -> dict[str, Any]:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    account = {"username": "eve", "password": "correct horse", "code": invite["code"]}
    reply = await scene.world.call("POST", "/auth/register", account)
    return {"user_id": reply.body["user_id"], "username": "eve"}


async def add_eve(scene: Scene) -> tuple[Person, dict[str, Any]]:
    """Let Eve join the class, and start a conversation of Ana, Cy and Eve. Return Eve and the conversation."""
    eve = await scene.world.person("eve")
    await eve.ok("POST", f"/invites/{await scene.ana.invite(scene.place.server_id)}")
    return eve, await scene.ana.ok("POST", "/conversations", {"user_ids": [scene.cy.user_id, eve.user_id]})


@story("member:joined", {*PLACE_KEYS, "seq"})
async def by_adding_a_participant(scene: Scene) -> dict[str, Any]:
    eve, _ = await add_eve(scene)
    group = await scene.ana.ok("POST", "/conversations", {"user_ids": [scene.ben.user_id, scene.cy.user_id]})
    for socket in (scene.ana_socket, scene.ben_socket):
        await socket.receive("member:joined")  # of Eve in the class
        await socket.ok("join_server", {"server_id": group["server_id"]})
    await scene.ana.ok("PUT", f"/servers/{group['server_id']}/members/{eve.user_id}")
    return {"server_id": group["server_id"], "user_id": eve.user_id, "username": "eve"}


async def leave_ben(scene: Scene) -> dict[str, Any]:
    """Start a conversation of Ana and Ben, which Ben's socket joins and Ana leaves. Return it."""
    pair: dict[str, Any] = await scene.ana.ok("POST", "/conversations", {"user_ids": [scene.ben.user_id]})
    await scene.ben_socket.ok("join_server", {"server_id": pair["server_id"]})
    await scene.ana.ok("DELETE", f"/servers/{pair['server_id']}/members/{scene.ana.user_id}")
    return pair


@story("member:joined", {*PLACE_KEYS, "seq"}, actor_receives=False)
async def by_returning_to_a_conversation(scene: Scene) -> dict[str, Any]:
    pair = await leave_ben(scene)
    await scene.ana.ok("PUT", f"/servers/{pair['server_id']}/members/{scene.ana.user_id}")
    return {"server_id": pair["server_id"], "user_id": scene.ana.user_id, "username": "ana"}


@story("member:joined", {*PLACE_KEYS, "seq"}, actor_receives=False)
async def by_starting_a_conversation_again(scene: Scene) -> dict[str, Any]:
    pair = await leave_ben(scene)
    assert await scene.ana.ok("POST", "/conversations", {"user_ids": [scene.ben.user_id]}) == pair
    return {"server_id": pair["server_id"], "user_id": scene.ana.user_id, "username": "ana"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_removing_a_member(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    return {"server_id": scene.place.server_id, "user_id": scene.cy.user_id, "username": "cy"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_banning_a_member(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("PUT", f"{scene.server}/bans/{scene.cy.user_id}")
    return {"server_id": scene.place.server_id, "user_id": scene.cy.user_id, "username": "cy"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_leaving_the_server(scene: Scene) -> dict[str, Any]:
    await scene.cy.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    return {"server_id": scene.place.server_id, "user_id": scene.cy.user_id, "username": "cy"}


@story("member:left", {*PLACE_KEYS, "seq", "guest"})
async def by_removing_guests(scene: Scene) -> dict[str, Any]:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    reply = await scene.world.call("POST", "/auth/guest", {"username": "eve", "code": invite["code"]})
    assert await scene.ana.ok("DELETE", f"{scene.server}/guests") == {"removed": 1}
    return {"server_id": scene.place.server_id, "user_id": reply.body["user_id"], "username": "eve", "guest": True}


@story("member:updated", {*PLACE_KEYS, "name", "role", "seq"})
async def by_changing_the_display_name(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("PATCH", "/users/me", {"name": "Ana Lima"})
    return {"server_id": scene.place.server_id, "user_id": scene.ana.user_id, "username": "ana", "name": "Ana Lima"}


@story("message:deleted", {"channel_id", "message_id", "seq"})
async def by_banning_its_author(scene: Scene) -> dict[str, Any]:
    message = await scene.cy.post(scene.place.channel_id)
    await scene.ana.ok("PUT", f"{scene.server}/bans/{scene.cy.user_id}", {"delete_messages": True})
    return {"channel_id": scene.place.channel_id, "message_id": message["message_id"]}


CHANNEL_KEYS = {"server_id", "channel_id", "name", "seq"}


@story("channel:created", CHANNEL_KEYS)
async def by_creating_a_channel(scene: Scene) -> dict[str, Any]:
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "new"})
    return {"server_id": scene.place.server_id, "channel_id": channel["channel_id"], "name": "new"}


@story("channel:updated", CHANNEL_KEYS)
async def by_renaming_a_channel(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"name": "renamed"})
    return {"server_id": scene.place.server_id, "channel_id": scene.place.channel_id, "name": "renamed"}


@story("channel:deleted", {"server_id", "channel_id", "seq"})
async def by_deleting_the_channel(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("DELETE", f"/channels/{scene.place.channel_id}")
    return {"server_id": scene.place.server_id, "channel_id": scene.place.channel_id}


@story("server:updated", {"server_id", "name", "seq"})
async def by_renaming_the_server(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("PATCH", scene.server, {"name": "better class"})
    return {"server_id": scene.place.server_id, "name": "better class"}


@story("server:deleted", {"server_id"})
async def by_deleting_the_server(scene: Scene) -> dict[str, Any]:
    await scene.ana.ok("DELETE", scene.server)
    return {"server_id": scene.place.server_id}


@story("channel:updated", CHANNEL_KEYS | {"posting", "slow_seconds", "keep_days"})
async def by_setting_the_rules_of_a_channel(scene: Scene) -> dict[str, Any]:
    rules = {"posting": "staff", "slow_seconds": 30, "keep_days": 7}
    channel = await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", rules)
    assert {key: channel[key] for key in rules} == rules
    return rules | {"channel_id": scene.place.channel_id, "name": "general"}


@story("member:updated", {*PLACE_KEYS, "role", "seq", "muted_until"})
async def by_muting_a_member(scene: Scene) -> dict[str, Any]:
    member = await scene.ana.ok("PUT", f"{scene.server}/members/{scene.cy.user_id}/mute", {"seconds": 300})
    return {"user_id": scene.cy.user_id, "role": "member", "muted_until": member["muted_until"]}


HAND_KEYS = PLACE_KEYS | {"at"}


@story("hand:raised", HAND_KEYS)
async def by_raising_a_hand(scene: Scene) -> dict[str, Any]:
    assert await scene.ana_socket.ok("hand:raise", {"server_id": scene.place.server_id}) == {"success": True}
    return {"server_id": scene.place.server_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("hand:lowered", PLACE_KEYS)
async def by_lowering_a_hand(scene: Scene) -> dict[str, Any]:
    await scene.ana_socket.ok("hand:raise", {"server_id": scene.place.server_id})
    assert await scene.ana_socket.ok("hand:lower", {"server_id": scene.place.server_id}) == {"success": True}
    return {"server_id": scene.place.server_id, "user_id": scene.ana.user_id, "username": "ana"}


@story("hand:lowered", PLACE_KEYS)
async def by_lowering_the_hand_of_another(scene: Scene) -> dict[str, Any]:
    await scene.ben_socket.ok("hand:raise", {"server_id": scene.place.server_id})
    await scene.ana_socket.ok("hand:lower", {"server_id": scene.place.server_id, "user_id": scene.ben.user_id})
    return {"user_id": scene.ben.user_id, "username": "ben"}


VOICE_KEYS = {"channel_id", "user_id", "username", "peer_id"}


CONVERSATION_KEYS = {"server_id", "name", "owner_id", "created_at", "role", "channels", "kind", "participants"}


@story("server:joined", CONVERSATION_KEYS | {"pair"}, actor_receives=False)
async def by_starting_a_conversation(scene: Scene) -> dict[str, Any]:
    pair = await scene.ana.ok("POST", "/conversations", {"user_ids": [scene.ben.user_id]})
    assert pair["name"] == "ben"
    (found,) = [one for one in (await scene.ben.ok("GET", "/servers"))["servers"] if one["server_id"] == pair["server_id"]]
    assert found == pair | {"name": "ana"}
    return found  # type: ignore[no-any-return]


@story("server:joined", CONVERSATION_KEYS, actor_receives=False)
async def by_adding_somebody_to_a_conversation(scene: Scene) -> dict[str, Any]:
    _, group = await add_eve(scene)
    path = f"/servers/{group['server_id']}"
    await scene.ana.ok("PUT", f"{path}/members/{scene.ben.user_id}")
    found: dict[str, Any] = await scene.ben.ok("GET", path)
    assert found["name"] == "ana, cy, eve"
    return found


async def join_voice(scene: Scene) -> tuple[int, Any]:
    voice = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"})
    return voice["channel_id"], await scene.ana_socket.ok("voice:join", {"channel_id": voice["channel_id"]})


@story("voice:join", VOICE_KEYS)
async def by_joining_voice(scene: Scene) -> dict[str, Any]:
    channel_id, ack = await join_voice(scene)
    assert ack == {"success": True, "peer_id": ack["peer_id"], "participants": [], "ice_servers": []}
    return {"channel_id": channel_id, "user_id": scene.ana.user_id, "username": "ana", "peer_id": ack["peer_id"]}


@story("voice:leave", VOICE_KEYS)
async def by_leaving_voice(scene: Scene) -> dict[str, Any]:
    channel_id, ack = await join_voice(scene)
    assert await scene.ana_socket.ok("voice:leave", {"channel_id": channel_id}) == {"success": True}
    return {"channel_id": channel_id, "user_id": scene.ana.user_id, "username": "ana", "peer_id": ack["peer_id"]}


@pytest.mark.portable
@pytest.mark.parametrize("name", STORIES)
async def test_an_event_reaches_its_room_and_nobody_else(scene: Scene, name: str) -> None:
    story = STORIES[name]
    expected = await story.act(scene)
    received = await scene.ben_socket.receive(story.event)
    assert set(received) == story.keys
    assert {key: received[key] for key in expected} == expected
    if story.actor_receives:
        assert await scene.ana_socket.receive(story.event) == received
    else:
        await scene.ana_socket.receive_none(story.event)
    await scene.dee_socket.receive_none(story.event, **received)
    if not scene.cy_socket.closed.is_set():
        await scene.cy_socket.receive_none(story.event, **received)


@pytest.mark.portable
def test_every_event_of_the_contract_has_its_story() -> None:
    tested_below = {"mention", "channel:read", "member:updated", "voice:signal", "error"}
    missing = set(chatrtc.EVENTS) - {story.event for story in STORIES.values()} - tested_below
    assert not missing, f"write a function with @story for {missing}: it causes the event, once for each way to cause it"


@pytest.mark.portable
async def test_a_mention_reaches_each_socket_of_the_mentioned_members(scene: Scene) -> None:
    text = "@BEN, @cy. @ana @dee @nobody"
    message = await scene.ana.post(scene.place.channel_id, text)
    assert message["mentions"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy))
    for listener in (scene.ben_socket, scene.cy_socket):  # one socket that has joined the server, and one that has not
        assert await listener.receive("mention") == message | {"server_id": scene.place.server_id}
    await scene.ana_socket.receive_none("mention")
    await scene.dee_socket.receive_none("mention")


@pytest.mark.portable
async def test_mentions_match_the_table(world: World) -> None:
    people = {name: await world.person(name) for name in MENTIONED}
    ana = people["ana"]
    place = await world.place(ana, *(person for person in people.values() if person is not ana))
    names = {person.user_id: name for name, person in people.items()}
    for text, expected in MENTION_CASES.items():
        message = await ana.post(place.channel_id, text)
        assert {names[user_id] for user_id in message.get("mentions", [])} == set(expected.split()), text


@pytest.mark.portable
async def test_a_reply_mentions_the_author_of_the_original(scene: Scene) -> None:
    channel_id = scene.place.channel_id
    original = await scene.ben.post(channel_id, "who is coming?")
    reply = await scene.ana.post(channel_id, "me, and @cy", reply_to=original["message_id"])
    assert reply["mentions"] == sorted([scene.ben.user_id, scene.cy.user_id])
    assert await scene.ben_socket.receive("mention") == reply | {"server_id": scene.place.server_id}
    edited = await scene.ana.ok("PATCH", f"/messages/{reply['message_id']}", {"content": "only me"})
    assert edited["mentions"] == [scene.ben.user_id]
    await scene.ben_socket.receive_none("mention")
    own = await scene.ben.post(channel_id, "anybody?", reply_to=original["message_id"])
    assert "mentions" not in own
    await scene.ben.ok("DELETE", f"/servers/{scene.place.server_id}/members/{scene.ben.user_id}")
    late = await scene.ana.post(channel_id, "oh", reply_to=original["message_id"])
    assert "mentions" not in late


@pytest.mark.portable
async def test_a_message_mentions_at_most_fifty_members(world: World) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    invite = await ana.ok("POST", f"/servers/{place.server_id}/invites", {})
    for number in range(60):
        guest = {"username": f"user{number}", "code": invite["code"]}
        assert (await world.call("POST", "/auth/guest", guest)).status == 201
    message = await ana.post(place.channel_id, " ".join(f"@user{number}" for number in range(60)))
    assert len(message["mentions"]) == 50
    text = "".join("@" + chr(0x4E00 + number) * 31 for number in range(120))
    assert sum(map(len, chatrtc.possible_mentions(text))) <= chatrtc.MAX_MENTION_KEYS + 31


@pytest.mark.portable
async def test_an_edit_notifies_only_members_mentioned_for_the_first_time(scene: Scene) -> None:
    message = await scene.ana.post(scene.place.channel_id, "@ben")
    await scene.ben_socket.receive("mention")
    edited = await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "@ben @cy"})
    assert await scene.cy_socket.receive("mention") == edited | {"server_id": scene.place.server_id}
    await scene.ben_socket.receive("message:edit")
    await scene.ben_socket.receive_none("mention")


@pytest.mark.portable
async def test_a_moved_read_mark_is_emitted_to_its_users_sockets(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}/read"
    first, second = await scene.post(), await scene.ana.post(scene.place.channel_id, "@ben")
    await scene.ben.ok("PUT", path, {"message_id": first["message_id"]})
    state = {"channel_id": scene.place.channel_id, "last_read_id": first["message_id"], "unread": 1, "mentions": 1}
    assert await scene.ben_socket.receive("channel:read") == state
    own = await scene.ben.post(scene.place.channel_id)
    posted = state | {"last_read_id": own["message_id"], "unread": 0, "mentions": 0}
    assert await scene.ben_socket.receive("channel:read") == posted
    await scene.ben.ok("PUT", path, {"message_id": own["message_id"]})
    await scene.ben.ok("PUT", path, {"message_id": second["message_id"]})
    await scene.ben_socket.receive_none("channel:read")
    await scene.ben.ok("PUT", path, {"message_id": first["message_id"], "back": True})
    assert await scene.ben_socket.receive("channel:read") == state
    for socket in (scene.cy_socket, scene.dee_socket):
        await socket.receive_none("channel:read")
    await scene.ana_socket.receive_none("channel:read", last_read_id=own["message_id"])


def name_in(payload: dict[str, Any]) -> Any:
    return payload.get("author_name" if "author_id" in payload else "name")


async def payloads_with_names(scene: Scene, seq: int, voice: int) -> list[dict[str, Any]]:
    """Return one payload of each kind that names Ana: results, acks and events."""
    ana, server, channel_id = scene.ana, scene.server, scene.place.channel_id
    message = await ana.post(channel_id, "@ben hello")
    number = {"message_id": message["message_id"]}
    await scene.ana_socket.ok("reaction:add", number | {"emoji": "x"})
    edited = await scene.ana_socket.ok("message:edit", number | {"content": "better"})
    received = [await scene.ben_socket.receive(event) for event in ("message:new", "mention", "reaction:add", "message:edit")]
    async with asyncio.timeout(PATIENCE):
        while "user:typing" not in scene.ben_socket.names()[scene.ben_socket._read :]:
            await scene.ana_socket.ok("typing_start", {"channel_id": channel_id})  # emitted once a second
            await scene.ben_socket.ok("ping")
    await scene.ana_socket.ok("typing_stop", {"channel_id": channel_id})
    received += [await scene.ben_socket.receive(event) for event in ("user:typing", "typing_stop")]
    await ana.ok("PATCH", "/users/me", {"status": "busy"})
    received.append(await scene.ben_socket.receive("user:status"))
    joined = await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id, "after": seq})
    talking = await scene.ben_socket.ok("voice:join", {"channel_id": voice})
    await scene.ben_socket.ok("voice:leave", {"channel_id": voice})
    await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id})
    received += [
        await scene.ben_socket.receive("voice:leave", user_id=ana.user_id),
        await scene.ben_socket.receive("user:disconnected"),
    ]
    await scene.ana_socket.ok("join_server", {"server_id": scene.place.server_id})
    await scene.ana_socket.ok("voice:join", {"channel_id": voice})
    received += [await scene.ben_socket.receive("user:connected"), await scene.ben_socket.receive("voice:join")]
    history = (await scene.ben.ok("GET", f"/channels/{channel_id}/messages"))["messages"]
    account = await scene.world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})
    listed = await scene.ben.ok("GET", f"{server}/members")
    more = [
        message,
        edited,
        account.body,
        await ana.ok("GET", "/users/me"),
        await ana.ok("GET", f"/messages/{number['message_id']}"),
    ]
    return [*received, *more, history[0], listed["members"][0], joined["changes"]["members"][0], talking["participants"][0]]


@pytest.mark.portable
async def test_a_display_name_accompanies_every_username(scene: Scene) -> None:
    voice = (await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"}))["channel_id"]
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await scene.ana_socket.ok("voice:join", {"channel_id": voice})
    seq = (await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id}))["seq"]
    for _ in range(2):  # the second call changes nothing
        assert (await scene.ana.ok("PATCH", "/users/me", {"name": "Ana Lima"}))["name"] == "Ana Lima"
    updated = await scene.ben_socket.receive("member:updated")
    facts = {"user_id": scene.ana.user_id, "username": "ana", "name": "Ana Lima", "role": "owner", "seq": seq + 1}
    assert updated == {"server_id": scene.place.server_id} | facts
    assert {name_in(payload) for payload in await payloads_with_names(scene, seq, voice)} == {"Ana Lima"}
    assert "name" not in await scene.ana.ok("PATCH", "/users/me", {"name": None})
    assert "name" not in await scene.ben_socket.receive("member:updated")
    assert {name_in(payload) for payload in await payloads_with_names(scene, seq, voice)} == {None}


@pytest.mark.portable
async def test_a_display_name_equal_to_the_username_is_omitted(scene: Scene) -> None:
    assert "name" not in await scene.ana.ok("PATCH", "/users/me", {"name": "ana"})
    await scene.ben_socket.receive_none("member:updated")
    ack = await (await scene.ana.socket()).ok("authenticate", {"token": scene.ana.token})
    assert ack == {"success": True, "user_id": scene.ana.user_id, "username": "ana"}


@pytest.mark.portable
async def test_former_members_keep_their_names(scene: Scene) -> None:
    message = await scene.post()
    await scene.ben.ok("PUT", f"/messages/{message['message_id']}/reactions/x")
    await scene.ben.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
    former = [{"user_id": scene.ben.user_id, "username": "ben"}]
    assert (await scene.ana.ok("GET", f"{scene.server}/members"))["former"] == former
    assert (await scene.ana.ok("GET", f"{scene.server}/changes?after={message['seq']}"))["former"] == former
    history = f"/channels/{scene.place.channel_id}/messages"
    posted = await scene.cy.post(scene.place.channel_id)
    await scene.cy.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    assert (await scene.ana.ok("GET", history))["messages"][-1] == posted
    await scene.cy.ok("PATCH", "/users/me", {"name": "Cy Young"})
    assert (await scene.ana.ok("GET", history))["messages"][-1]["author_name"] == "Cy Young", (
        "also in a server that the user has left"
    )
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    for person in (scene.ben, scene.cy):
        await person.ok("POST", f"/invites/{invite['code']}")
    assert "former" not in await scene.ana.ok("GET", f"{scene.server}/members")


@pytest.mark.portable
async def test_a_change_of_role_is_emitted(scene: Scene) -> None:
    member = await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "admin"})
    assert member["role"] == "admin"
    received = await scene.ben_socket.receive("member:updated")
    assert received == {"server_id": scene.place.server_id, "user_id": scene.ben.user_id} | {
        "username": "ben",
        "role": "admin",
        "seq": received["seq"],
    }
    await scene.dee_socket.receive_none("member:updated")


@pytest.mark.portable
def test_every_event_is_emitted_by_an_operation() -> None:
    emitted = {event for op in chatrtc.OPERATIONS.values() for event in op.emits}
    assert emitted | {"error"} == set(chatrtc.EVENTS)


@pytest.mark.portable
async def test_a_failed_event_without_an_ack_gets_an_error_event(scene: Scene) -> None:
    await scene.ben_socket.client.emit("typing_start", {"channel_id": 999})
    received = await scene.ben_socket.receive("error")
    assert set(received) == {"event", "error", "code", "reason"}
    assert (received["event"], received["code"], received["reason"]) == ("typing_start", "NOT_FOUND", "NO_CHANNEL")
    assert (await scene.ben_socket.call("typing_start", {"channel_id": 999}))["code"] == "NOT_FOUND"
    await scene.ben_socket.receive_none("error")  # an event with an ack gets its error in the ack
    await scene.ana_socket.receive_none("error")


@pytest.mark.portable
async def test_banned_and_removed_members_receive_no_further_events(scene: Scene) -> None:
    for verb, path in (("PUT", "bans"), ("DELETE", "members")):
        eve = await scene.world.person(f"eve-{path}")
        invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
        await eve.ok("POST", f"/invites/{invite['code']}")
        socket = await eve.socket(scene.place.server_id)
        await scene.post()
        await socket.receive("message:new")
        await scene.ana.ok(verb, f"{scene.server}/{path}/{eve.user_id}")
        after = await scene.post()
        await scene.ben_socket.receive("message:new", message_id=after["message_id"])
        await socket.receive("member:left", user_id=eve.user_id)
        await socket.receive_none("message:new")
        assert after not in [payload for _, payload in socket.received]
        assert (await socket.call("join_server", {"server_id": scene.place.server_id}))["code"] == "FORBIDDEN"
        assert (await eve.call("GET", f"/channels/{scene.place.channel_id}/messages")).code == "FORBIDDEN"


@pytest.mark.portable
@pytest.mark.parametrize("transport", ["polling", "websocket"])
@pytest.mark.parametrize("kind", ["ban", "removal", "leaving"])
async def test_a_socket_stays_joined_to_its_users_other_servers(scene: Scene, transport: str, kind: str) -> None:
    other = await scene.world.place(scene.dee, scene.cy, name="second")
    socket = await scene.cy.socket(scene.place.server_id, transports=[transport])
    await socket.ok("join_server", {"server_id": other.server_id})
    channel_id, _ = await join_voice(scene)
    await socket.ok("voice:join", {"channel_id": channel_id})
    await socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    match kind:
        case "ban":
            await scene.ana.ok("PUT", f"{scene.server}/bans/{scene.cy.user_id}")
        case "removal":
            await scene.ana.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
        case "leaving":
            await scene.cy.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    await scene.ben_socket.receive("typing_stop", user_id=scene.cy.user_id)
    await scene.ben_socket.receive("voice:leave", user_id=scene.cy.user_id)
    await scene.ben_socket.receive("user:disconnected", user_id=scene.cy.user_id)
    await scene.post()
    await scene.ben_socket.receive("message:new")
    for event, payload in (
        ("typing_start", {"channel_id": scene.place.channel_id}),
        ("typing_stop", {"channel_id": scene.place.channel_id}),
        ("voice:join", {"channel_id": channel_id}),
        ("voice:signal", {"channel_id": channel_id, "to": "nobody", "data": {}}),
    ):
        assert (await socket.call(event, payload))["code"] == "FORBIDDEN"
    posted = await scene.dee.post(other.channel_id, "elsewhere")
    assert await socket.receive("message:new") == posted, "the next message of either server"
    await socket.close()


@pytest.mark.portable
async def test_a_socket_must_join_a_server_to_type_or_talk(scene: Scene) -> None:
    channel_id, peer = await join_voice(scene)
    typing = {"channel_id": scene.place.channel_id}
    second = await scene.ana.socket()  # another tab of a user who types and talks here
    await scene.ana_socket.ok("typing_start", typing)
    for socket in (second, scene.cy_socket):
        for event, payload in (
            ("typing_start", typing),
            ("typing_stop", typing),
            ("voice:join", {"channel_id": channel_id}),
            ("voice:signal", {"channel_id": channel_id, "to": peer["peer_id"], "data": {}}),
        ):
            ack = await socket.call(event, payload)
            assert (ack["code"], ack["reason"]) == ("FORBIDDEN", "NOT_JOINED"), event
    await scene.ben_socket.receive("user:typing", user_id=scene.ana.user_id)
    await scene.ben_socket.receive_none("typing_stop", "user:typing", "voice:leave")
    await second.close()


@pytest.mark.portable
async def test_typing_and_voice_fail_in_a_deleted_server(scene: Scene) -> None:
    channel_id, peer = await join_voice(scene)
    typing = {"channel_id": scene.place.channel_id}
    await scene.cy_socket.ok("join_server", {"server_id": scene.place.server_id})
    await scene.cy_socket.ok("typing_start", typing)
    await scene.cy_socket.ok("voice:join", {"channel_id": channel_id})
    await scene.ana.ok("DELETE", scene.server)
    signal_to_ana = {"channel_id": channel_id, "to": peer["peer_id"], "data": {}}
    for event, payload in (("typing_start", typing), ("voice:signal", signal_to_ana)):
        assert (await scene.cy_socket.call(event, payload))["code"] == "NOT_FOUND"
    await scene.ben_socket.receive("server:deleted")
    await scene.ben_socket.receive_none("voice:leave", "typing_stop")


@pytest.mark.portable
async def test_a_leaving_member_receives_member_left_and_nothing_after(scene: Scene) -> None:
    await scene.ben.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
    assert (await scene.ben_socket.receive("member:left"))["user_id"] == scene.ben.user_id
    await scene.post()
    await scene.ana_socket.receive("message:new")
    await scene.ben_socket.receive_none("message:new")
    assert (await scene.ben_socket.call("join_server", {"server_id": scene.place.server_id}))["code"] == "FORBIDDEN"


# ---- Files ----------------------------------------------------------------------------------------------------------
# Formats of the database: migrating older ones. (Files that are damaged or in use: section Command line.)

# The schema of each database format, without comments and compressed: databases of each are in use, so an entry never changes.
RELEASED = {
    1: (
        b"c-p;JU2~f{5dACrW;4S>(z)$4)B1rpYQogPErzCjVq{PgHMVe(>?HTsUwt6Jw(OAJwhuNMw7c3pd$hZJii6AR0Pt$Hpg9(_WEm}B1gEF3&i;Ax_U"
        b"!ESI~d0(NDw5!`2@k5lZwMoKb2@0CFl~x@F@<jgZLYKMBgAtlW7=9wQCe5z7}P8NgzRA6Nskrmrf?_`|O@PZSO%Eg`ZR8!wPf$P*#QB_JIp5)_h0"
        b"y0(}V5NdkkCEhr-c7+<0BM;O+^VFW|F<--6!;3xH*uep9wwxOKP7i8dhKI9d_f)p7RyUyMcMk)<Z6Y`!1Cq5KpL8O5rGS<CT5{6Ro)bqfDSrUiiW"
        b"C!w!Y|4A-l#u^SVPDW&!Udd9rsrMUeISo3S`n_?mj)*7>DICjH(_!$O%sTxH{r$3K{6j3lU=jwnO|3K4+F``&!Y(DcbGA<;MsG6OR}6xZ=aRZ6gw"
        b"_-2>JR5Cm@ZL7=1u7ipFTx062}L?Fo{0#=&eHTp)k%zPQx&-SVL-7dv=b&gdOO=m$wh&F5lCnOYcMHH&|glI$+*yGa~2AvMl<&+;UUF3{Ho`T0|("
        b"G*!3_Qr1+XVy<$nSu&Do*SB;UPdvD}l3*AFMo>q&lax7Te>)>{Mae?O`vT!VfWC=eRV+ai1bJE1MA@nW{~H;5dHcn?#E*&w+{)^J_|YrbsZ*w~*Z"
        b"gix&5X`8HpbqMnqwSg(r~NBMX}Pvrb27LYB{z8r>!>%PqXY<_V!^uitY?q9=PhIyAS$sPg&uv1$sx<0zn>yssNjk=BAB_az*n)ZBmNXcd|=D>wtH"
        b"-7IKbnHSg->FXPl{6Z?p}nAYUTK~}sLcV*v;oR>@xCi-_PQqazZtj%P#c#@sCB|9rwPV9W*=rW4!qQbn#NYDt{iQsq76SjPtOlB+jZwj$ZZJQ6jl"
        b"jRP`wnE#}MsVV;^vxm4q_VwrPKS6BGw&G_2I4IPjYC}y)yc3v8Z}i)YS8xPDx9l<?f|7-G-@1h5Roj)AJjGD_T=VPd+36%4ZpZeEG5r>UvMvo<H("
        b"&p66A|V5EEUtW-^V1A%_jPwzW--_Aqas2ZigC=GS8ETelXNi%cEe11Lv8eSy-!sh(J?Dp%@&JI3}t1aOt#!BDms@<^N>wzVaUW++aSz|<;!2_~rw"
        b"e|XXw{u0JXDnCiKn@RRva7bribP00xTF*4PLU-CmTeU}O$~B6E=51D$5BigJ&}Mj`TA=(`qW|hKa?Pk3mEN4n$d~1YWCg`}MFq_{yc&S_?mxNmm6"
        b"-"
    ),
    2: (
        b"c-qBSOLN*t5dJG&xqw_c*r`owU0Dt?p4h5jkrg6NPO3o~;|XZQY6Ld>>vtY{fg}*Yl|2}yJUu<#Uw{1=zPi@kg9UiCTG9ZgG-f^xVE|WG@2~&(_~-TY"
        b"hfgqck>w%qteX*nH75y&zWSD;w&S5Y<ic0iez4ph@CE$<YwC?{M;v=Vj%O-Sh9d$V`tE@<7Jt*xsQkabAluzNm^${~Q)I#lbN&)1q1rZqr#M~nJ=t6I"
        b"*_w_#=*4VF8R^0B9u2=hKNGec=;vD|^zaMb%J12lt8dCSl+)Rg^bEs<AR#y<p^wvjW9NjCL;+N|T(jWPgpe$WP;fvdH?Ne0zBqU#uP;$DVB)#<(Az^l"
        b"A)9z1>`TQblVJ$yobVKGM&p}m2uvWaE1D24JrN2<r6IXy6CQ2vemwQS9Y5N)dl!k&Y;>UYs$-~|!rYE2C;uD-GkC^~ktO$!2}UHE32TqaDYhLJYC}G|"
        b"q7jfni;F%Z7db;TDF7ThLiY#>Jwt0Uv~H1EOP!|UD$Ptt;^iKmIepZQ=JtzVrlNKjQ6?AKRz>KavEY3Z_LBE9Dzj~tTOvxK|CGehK?JL@?-xiEJ{d>p"
        b"WjnX%dl9hN)|V$GN(I2Vs^W+)2HDA&5np+{bEdGwfX91*p$2XM88~~fe2SAuNdG?}tpR^Fq}r(&X208&nM_aRNq6Bo6W_>xjjMzph{G&tb}Hi8$mE5r"
        b"o4*l$mE7jJta6ASOs-1J*3`&yy;L>PXU48p_Sc}e#;6xAoiG_LGS#$i(zODtGI93c6#a5>u)&<blQVnKf{85laTp36oHPv|2kx%gU+p}E)y&zWVs=Tc"
        b"qAL$q>twEsREw6r*~G?fB*g3VIqvHG67#fCw57?-@#;-#2!2Y%`KCrIc*9b<Y}soo1%<w@LC7ZuSq=2E;{bDFSSBbpy=n4k9&SxoP!=|Kb+x0qdP-hX"
        b"*~>RE4fJf9#w!}M&Avi3Ym-&nas!O^sfKf`>6$Hn8K=s?S4X^wKShkrWqA;@l(4k>+(|-O*^r~pYPl6Nby=!e%mR`>IvS}e!joX$Va_iE%Q63)M?zbf"
        b"&m-xt#HXH(^3ay?Fe_26fSeCa`E3KZY#zRfOQcGvd*_}C@notVQK2E;QBW9E<xm!k+(vy&Ho^?F+6xH>@|D&?=_VQ#1~d?nMDb7B^l<IS&7F!?1z#yX"
        b"dB}+b&)?3u6Z|-k(+8Y9`Bk93^VdwiMl?Bchl_UHOlPCcgYd*r;SK7RYPjkpbsVS$hq?l#oRbq>c2t^@Ib2azd(z`1covX|9z$M9i-|nN>S5X8eQY}u"
        b"<a$zeTqrMf8}Q8<O$A>4%hHl>w(CvB$hF&j{HK(|bYeSqAXXpL2(L<drO%XQexSOY`UQmkD<669){M%T|KpVaA&NJ|4=D~3n$m#7dk91qn8yhfInWzj"
        b"z{3SN7ch)_@4)!<A0gPq5d"
    ),
    3: (
        b"c-qBSO>^2v5dAA%xd1L5?9?W;u7rb(6<ZZ7vO>hkNi|3Vo&Y0OGhnm7KJ%e3&<KmgwR<qAte&3k*RQAF@XfdH9&AAC^^!!0lZ1vOhCW<fy}$nB<Db{p"
        b"A3njrckIA{z`hweuwgi5&{f~k)b#@A&hg=!?>^Z6Px$Km1bY&UTu&@}aJ;}$rWCC(1kR5Dypi~u42R|a!v)^$zk`YA{xxwdSR=-slQdSZEnpn+4Lh*C"
        b"b-vh>VE~<kE(ygQ7~DI9uh7kmT@SkXD+@a48SUivbi>p)p<BYpbcs8?o&`~g5yx?e_+hYfOmV6JDpIaRaA`q|msmJBVv~ngT0&PWypr3ODD_|*`0gM$"
        b"KtILXWFg|?;*-iU#AJ>chnwN(rdk3E@XMN{n8{3pgJBs+?%9GzH@F{70`NzV?(M-wqBL7wX#Lc()TS~wW6JQ~N5PDq5T$s@!q*H}cr_K#zG|n~cHF25"
        b"`D_a#AcYs-`QrGFH*m%UfFn=%9y-F$z#b3mTgR%kj%m4SGYisWd4Ok5AN59a`&lqkQ9E7{Dj#&LiqO9j!Fv<-lJ~MI(_PkEqDpZ%OOw@61go|07DyC1"
        b"^<Jfy>)kp(ih@mdp<F3ZDge%16-)GCkgZH84pqi`Yl=vE@OUpU)WG#21LvTYvm{*!>;I>uHQ>*NR3|k>^uJDJD%(?K(%!hv#5c-c<0>JDk~nLcy%X_l"
        b"Wb%WoUA`;yBDu|STa^$y+FX@0TT>(J_0rW?uNnE;+2?+-O|O1%>4wR0k*%h4lc^P8m5p-%r<j+EqXXsyo}4+07F2X`h~ilIVAv!+j_h5HzdCs^t%Y+y"
        b"#cY$@MOz-OH|bmjsU8~UriqR1NQgH4DQTPh5;1NxZ5VQMw0@H_1kJcuZyL0MH<XiQ!@H)VpzznW2)S~Qr-6QKDPT@4%h<_7Hz^;pxV2zGXl$P9>W!M}"
        b"9KUcm%eM)Mv^M3*nnX?7SD0pFvWi<CK(ATVForZ;v&VmpQ$_IA5jXLtsL{DBj}po;<?VGRj!ET(ls@a_PH5`#sHO>xaDM49QdN{EMXZI+FAPhWf6gVL"
        b">6p(e8Lq{r)<$`0%X(OqDpx?xMN__8A1=+}tJp-kl)m@&sSr=L>MJfZ#Cr~kfT|qIijl{tm&rkxfmXXAp-A4+8Ypd|Q4xTFh<KI!BBqOLOK$F+XjSl)"
        b"<C8_sO7Q&ck~<-fBRzd2$&+sdI=gT~<!wZhBTu*($7VYB>O6=~lnQTfZmEH*Zc?uUWk{$kP%1g8=(43Ulq}(jv)Yv&rO}gsM9dicf*V3)9I1<Ci~F(b"
        b"jU7Lbwxhy%>AMHt?cqe=)x9hu`R@9`L`bgv=@ZU4gUQ(S?m#?!P!e7p>6JNC9`k)Q?bI(I<R5v-d$*xPYW|N`0)$nv#bHcPloC!N2JayfQ(&H?MD##s"
        b"cmWR=;9bBV>AZuQ=1t}jo>l|!S@`Eh5jov)gU%NnKbzr5B)TU>n+7w(VtjE?UmPtCRCs;qZ^uObiU"
    ),
    4: (
        b"c-qBTZFAZ<5dJHgegQgsXgb$UJ6CRo61QbapvOyJJ~6@;pkgeaEs}7*{#GxxWm|Ggle_zn;NaD2_t|GxyULgO@Z-%8;W!Sdk2z)0ng(cquC89b{q6Oe"
        b"w{Ktljz)8Dxb)C+_<rJ{Q%aH)b>*iJ9Z#3uM{kb4%*Qvw`49Bj`+<h5<!n5KWjEe**_WabJ`%L_zAw>q20yFGr1*Y)Am{Qsw3?3pTzP#I<21cvNg!YM"
        b"QOYqtr4`w0@5694S)vY$LK=|{8h!FcpHWu}kEf`cz3QV5zQbqnxjCislSa2RrJIm+dc8jK6M{Jj)|gj~-I0hS5}@4WnguWVC?FvL1r0Kpd4(kE!on-D"
        b"eSuOBEtd1~Xjwr&A-C)R_Hp<fi7*6oM^cX7PiF7U5cCnbk7+_u;Rz_16ozD)`{>(v`DwOVqWSFG_`0$YgyvQST0ON4wJpqUOjGh#BbfdkM-d6r^+SS3"
        b"a@>Hm56VflJtTCXQQ)GO0wbrG6qN+iFMv=1!0vO&rWn(tU~VEn*qrmd=iUcz?oCJDLMK%%<|+$d!L|1tv52gF7Kx}R8qTIgl*CRw^z9QURJ)EBx%Ig^"
        b"rAMy;OV-M$q@<}ZG}C9AZqcgvq9b7COAe#qakd|9eeF#=&@&n?M#F2bU#l#(<r1(yN?2H-TNWAlMy38;qymG3BaOs^vQ<XtCxfzJqoybe+G!O)AaStX"
        b"ChXWu#FJQbiZ~7RIx|_iIX1bMy$ADAMJ;1EL`|#|xaE*%s@%Mh7?jrJmSj<ufDMp_s}kKUOO7D@{{*=fihluQ<>m%Q|Fv@)QQ=Bu;bGxATc5~(g|vXc"
        b"XMs+v(xLKbWU{lMoxewXFW8=DveKcnF#(NZPf<hHgF@9pt(nc0vUh`gn_j&Fs}$0>$dW026Rzc86{%E#6IzZ#;~9McPab)kA0o)>H4XyMkrG?~*08r}"
        b"zj=6*sAf)uih7ewMOz-mr(`FMln;*9!^XyTB*Z7aXRdYHXWe=@gtErOrai<dw*i||v1{zF$k;>g{y<%GOZ|P%)dwCSKXo_SMI_?Mxn+a)=nSq$`~oIn"
        b"Uz%L0UeI6c2yc!@KseUr-j$^VCgnsmu`+67hFY&t4X4o1R+L~~&Ga3PpXA`cTWH6u4JyDa&O66DSN+fRwavVo*j-x&T*RwJj~8BMx@}^x4~5pwyw-?w"
        b"a?eGRcgv`+W;)Jd>bn|x5RF;NX|!`m5HS7BjJYzCm)qrUVM}O~w_CYo8nQcp9oqGv`M5d|60ZY%HjX&myqRIl@Nky{sOngiO#S%ia$qfiHaa)e!g{4`"
        b"C=P%Yhoo#jK9YbMFGPzThmf(Xz%pWyPqGQjnmNFh1g9;=^<1!+)*m<PXUu7{cOjascNRg-gmnzRRmY!EqljnUV2Kf=Y!t|>9iSI3?YTw2wnM&rfUfLQ"
        b"OTLrPDU_EsGIB!{w+B=x7L*j^7MV2He94Sd%iJR`@KPRUj;ymWJvYFTE9A(2Qri_-%k(Lo0VeuV@x`;i5mNE#oV&n}hO*P(<i+E(@(!j*G1x0|WDe(D"
        b"tDVo)!#}1HCHQDrbQ?Wv0$bC&73Qu2A*>aRjW$9oR1TQVDqpIOZfPiw81eb*t~MVXMPqP^LxzLaw9(>$WhAk+82lX9zDw!f#1fG^8t{E_rtAsb?RoJx"
        b"4zu&en3Jq=Y>r#uc^qQD@mO$#R>nufR%;i^b<7O*>gs0N=e#Ra8cz}C9Q%6`7#fZ6I8?gSmC2{o6-2407xAsMvynk+gNUERMU^F%0p_?m$d+n~-Xv4u"
        b"?6^|S62PO2HfL_Tk|>sqrwebs6cV$1m0Z+AUx$+w7~Or*s~;`Fg+uxibZc^QmG_+1$|U;UBEMXdz7fclwOBe^VTA_3&5D%Z#NPu%(D;*k;xHLH@~~wl"
        b"mBOTz7rL#n`Z}I3S5RrnJ@|UdQ?y!)rymhKy^@z{vavO~?V{No$Pq;TJ4aNX0eW_dsJMN5eFY#K*)3TI6#EI~)KAe%<U=pKV+jS$btccz&2uz;jz+BW"
        b"4E4%Bl+5Xxe?g;+qeJ0Q2bv*vBrt=6C2wk%SZpUyZdL8?z)Wtv6|!du^d{Ra@xj1SN;-3nz%0OlCd5BfuGQ*G{{ej$&y4"
    ),
}  # fmt: skip


def released_database(path: Path, version: int, messages: int = 60) -> Path:
    """Create a database of an older format with two users, a server, a deleted channel and indexed messages."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = wal")
        db.executescript(zlib.decompress(base64.b85decode(RELEASED[version])).decode() + f"PRAGMA user_version = {version}")
        db.executescript(
            """INSERT INTO users (username, username_key, created_at) VALUES ('Ana', 'ana', 't'), ('Ben', 'ben', 't');
               INSERT INTO servers (name, created_at, channels_seq, members_seq) VALUES ('class', 't', 1, 1);
               INSERT INTO members (server_id, user_id, role, joined_at) VALUES (1, 1, 'owner', 't');
               INSERT INTO channels (server_id, name, name_key, kind) VALUES (1, 'general', 'general', 'text'),
                                                                             (NULL, 'old', 'old', 'text')"""
        )
        rows = [
            (1 + n % 2, 1 + n % 7 // 6, "" if n % 5 == 0 else f"Grüße number{n} to Ana", n, n % 5 == 0) for n in range(messages)
        ]
        db.executemany(
            """INSERT INTO messages (server_id, author_id, channel_id, content, seq, deleted, created_at)
               VALUES (1, ?, ?, ?, ?, ?, 't')""",
            rows,
        )
        db.executescript(
            """INSERT INTO messages_fts (rowid, content, server_id) SELECT message_id, content, server_id FROM messages
               WHERE deleted = 0;
               UPDATE search SET indexed_id = (SELECT max(message_id) FROM messages);
               UPDATE servers SET seq = (SELECT max(seq) FROM messages);
               INSERT INTO reactions SELECT message_id, '👍', 1 FROM messages WHERE deleted = 0"""
        )
        db.commit()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def packed_schema() -> str:
    """Return schema.sql as the lines of an entry of RELEASED."""
    schema = re.sub(r"\s+", " ", re.sub(r"--.*", "", chatrtc.asset("schema.sql").decode())).strip()
    packed = base64.b85encode(zlib.compress(schema.encode(), 9)).decode()
    return "\n".join(f'        b"{packed[start : start + 115]}"' for start in range(0, len(packed), 115))


def words_of(sql: str) -> tuple[str, ...]:
    """Return the parts of a CREATE statement, with columns and constraints sorted: ALTER TABLE adds columns at the end."""
    plain = re.sub(r"\s*([(),=])\s*", r"\1", re.sub(r"\s+", " ", re.sub(r"--.*", "", sql)))
    parts: list[str] = []
    depth = start = 0
    for at, letter in enumerate(plain):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if (letter, depth) in {("(", 1), (",", 1), (")", 0)}:
            parts.append(plain[start:at].strip())
            start = at + 1
    return *parts[:1], *sorted(parts[1:]), plain[start:].strip()


def schema_of(db: sqlite3.Connection) -> Any:
    """Return the tables, their columns with types and defaults in order, indexes and triggers of a database."""
    objects = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    tables = sorted(name for kind, name, _, _ in objects if kind == "table")
    columns = {name: db.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in tables}
    return sorted((kind, name, table, words_of(sql or "")) for kind, name, table, sql in objects), columns


def migrated_schema(path: Path, version: int) -> Any:
    released_database(path, version)
    with contextlib.closing(chatrtc.prepare(path)) as db:
        return schema_of(db)


@pytest.mark.portable
def test_a_change_of_the_schema_is_a_new_format(tmp_path: Path) -> None:
    newest = chatrtc.SCHEMA_FORMAT
    expected = set(range(1, newest + 1))
    assert set(RELEASED) == expected, f"add the new schema.sql to RELEASED:\n    {newest}: (\n{packed_schema()}\n    ),"
    with contextlib.closing(sqlite3.connect(":memory:")) as released, contextlib.closing(sqlite3.connect(":memory:")) as now:
        released.executescript(zlib.decompress(base64.b85decode(RELEASED[newest])).decode())
        now.executescript(chatrtc.asset("schema.sql").decode())
        assert schema_of(now) == schema_of(released), (
            f"schema.sql differs from format {newest}, which is in use: append a step to MIGRATIONS that makes the same change "
            "to an existing database, and run this test again. It will print the new entry of RELEASED."
        )


@pytest.mark.portable
@pytest.mark.parametrize("version", RELEASED)
def test_a_migrated_database_equals_a_new_one(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(chatrtc.prepare(tmp_path / "new.db")) as db:
        new = schema_of(db)
    assert migrated_schema(tmp_path / "old.db", version) == new, (
        f"a migrated database of format {version} differs from a new one: change MIGRATIONS until it makes the same schema"
    )
    schema = chatrtc.asset("schema.sql").decode()
    for number, (before, after) in enumerate(
        {  # changes of schema.sql alone that this comparison must notice
            "    name         TEXT ": "    name         TEXT, forgotten INTEGER",
            "role IN ('owner', 'admin', 'member')": "role IN ('owner', 'admin', 'member', 'bot')",
            "CREATE TABLE search": "CREATE INDEX forgotten ON users (name); CREATE TABLE search",
            "CREATE UNIQUE INDEX messages_nonce": "CREATE INDEX messages_nonce",
            "last_id    INTEGER NOT NULL": "last_id    INTEGER NOT NULL DEFAULT 0",
        }.items()
    ):
        assert before in schema
        changed = schema.replace(before, after, 1)
        monkeypatch.setattr(chatrtc, "asset", lambda name, changed=changed: changed.encode())
        with contextlib.closing(chatrtc.prepare(tmp_path / f"{number}.db")) as db:
            assert schema_of(db) != new


@pytest.mark.portable
async def test_a_migrated_database_has_servers_and_takes_conversations(make_world: MakeWorld, tmp_path: Path) -> None:
    path = released_database(tmp_path / "chat.db", 3)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO members (server_id, user_id, role, joined_at) VALUES (1, 2, 'member', 't')")
    chat = (await make_world()).chat
    (server,) = (await chat.list_servers(author_id=2)).servers
    assert (server.owner_id, server.kind, server.participants) == (1, msgspec.UNSET, [])
    first = await chat.start_conversation(author_id=1, user_ids=[2])
    again = await chat.start_conversation(author_id=2, user_ids=[1])
    assert (first.server_id, first.name, again.name) == (again.server_id, "Ben", "Ana")
    assert chat.hub.store.read_inline(chatrtc.check_integrity) == []


def dump(path: Path) -> str:
    """Return all rows of all tables, and the format."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return "\n".join([*db.iterdump(), str(db.execute("PRAGMA user_version").fetchone())])


@pytest.mark.parametrize("way", ["an error", "a kill"])
async def test_an_interrupted_migration_leaves_the_old_format(tmp_path: Path, way: str) -> None:
    path = released_database(tmp_path / "chat.db", 1)
    before = dump(path)
    last = {"an error": "INSERT INTO missing VALUES (1)", "a kill": "SELECT cut_off()"}[way]
    code = f"""
import chatrtc, contextlib, os, pathlib, signal, sqlite3
chatrtc.MIGRATIONS = tuple(step + ';{last};' for step in chatrtc.MIGRATIONS)
db = sqlite3.connect({str(path)!r}, isolation_level=None)
db.create_function('cut_off', 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
chatrtc.migrate(db)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=HERE, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    assert process.returncode == {"an error": 1, "a kill": -signal.SIGKILL}[way], errors
    assert dump(path) == before
    with contextlib.closing(chatrtc.prepare(path)) as db:
        assert chatrtc.read_format(db) == chatrtc.SCHEMA_FORMAT
        assert chatrtc.check_integrity(db) == []


async def test_a_hundred_thousand_messages_are_migrated(tmp_path: Path) -> None:
    path = released_database(tmp_path / "chat.db", 1, 100_000)
    ended = await run_command("migrate", "--database", str(path))
    assert ended == (0, f"{path} has format {chatrtc.SCHEMA_FORMAT}\n", "")  # the progress bar is only for terminals
    assert (await run_ok("check", "--database", str(path))).startswith("sound: 2 users, 1 servers, 100000 messages")
    ana = (await run_ok("token", "ana", "--database", str(path))).strip()
    process = await Process.start(path)
    async with process.world() as world:
        found = await world.call("GET", "/servers/1/search?q=number99998", token=ana)
        assert [message["content"] for message in found.body["messages"]] == ["Grüße number99998 to Ana"]
        changes = (await world.call("GET", "/servers/1/changes?after=99990", token=ana)).body
        assert len(changes["messages"]) + len(changes["deleted"]) == len([n for n in range(99_991, 100_000) if n % 7 != 6])
    assert await process.stop() == (0, "")


async def test_only_serve_and_migrate_change_an_older_format(tmp_path: Path) -> None:
    path = released_database(tmp_path / "chat.db", 1)
    database = ("--database", str(path))
    before = dump(path)
    for line in ("export", "check", "user list", "token ana", "user add cy", "user delete ana --yes"):
        expect_error(await run_command(*line.split(), *database, stdin="correct horse\n"), "older format", "`chatrtc migrate`")
    assert "verified" in await run_ok("backup", str(tmp_path / "copy"), *database)
    assert dump(path) == dump(tmp_path / "copy") == before
    copied = tmp_path / "copied.db"  # copied by hand, then migrated by `serve`
    shutil.copy(tmp_path / "copy", copied)
    process = await Process.start(copied)
    assert await process.stop() == (0, "")
    await run_ok("restore", str(tmp_path / "copy"), *database)
    for one in (path, copied):
        # The server may have had the time to delete the 8 messages of the deleted channel.
        assert re.search("60 messages" if one == path else "(60|52) messages", await run_ok("check", "--database", str(one)))
        assert await run_ok("migrate", "--database", str(one)) == f"{one} has format {chatrtc.SCHEMA_FORMAT}\n"
    expect_error(await run_command("migrate", "--database", str(tmp_path / "missing.db")), "no database")


# ---- Store ----------------------------------------------------------------------------------------------------------
# Each server has one sequence: every durable change takes the next number, joined sockets receive changes in this order, and
# a client that reconnects reads the missed ones and ends with the same state.


@pytest.mark.portable
async def test_every_durable_change_takes_the_next_sequence_number(scene: Scene) -> None:
    ana, server = scene.ana, scene.server
    start = (await ana.ok("GET", f"{server}/changes"))["seq"]
    message = await scene.post()
    path = f"/messages/{message['message_id']}"
    await ana.ok("PATCH", path, {"content": "better"})
    await ana.ok("PUT", f"{path}/reactions/👍")
    await ana.ok("PUT", f"{path}/reactions/👍")  # changes nothing and takes no number
    await ana.ok("DELETE", f"{path}/reactions/👍")
    await ana.ok("DELETE", f"{path}/reactions/👍")
    await ana.ok("DELETE", path)
    await ana.ok("PATCH", server, {"name": "renamed"})
    channel = await ana.ok("POST", f"{server}/channels", {"name": "new"})
    await ana.ok("PATCH", f"/channels/{channel['channel_id']}", {"topic": "news"})
    await ana.ok("DELETE", f"/channels/{channel['channel_id']}")
    await ana.ok("PATCH", f"{server}/members/{scene.ben.user_id}", {"role": "admin"})
    await ana.ok("DELETE", f"{server}/members/{scene.cy.user_id}")
    assert (await ana.ok("GET", f"{server}/changes"))["seq"] == start + 11
    await scene.ben_socket.receive("member:left")
    emitted = [payload["seq"] for _, payload in scene.ben_socket.received if "seq" in payload]
    assert emitted[-11:] == [start + 1 + step for step in range(11)]


@pytest.mark.portable
async def test_changes_list_everything_after_a_sequence_number(scene: Scene) -> None:
    ana, server = scene.ana, scene.server
    seq = (await ana.ok("GET", f"{server}/changes"))["seq"]
    assert await ana.ok("GET", f"{server}/changes?after={seq}") == {
        "seq": seq,
        "has_more": False,
        "messages": [],
        "deleted": [],
    }
    kept, gone = await scene.post(), await scene.post()
    edited = await ana.ok("PATCH", f"/messages/{kept['message_id']}", {"content": "better"})
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")
    changes = await scene.ben.ok("GET", f"{server}/changes?after={seq}")
    deletion = {"channel_id": scene.place.channel_id, "message_id": gone["message_id"], "seq": seq + 4}
    assert changes == {"seq": seq + 4, "has_more": False, "messages": [edited], "deleted": [deletion]}
    await ana.ok("POST", f"{server}/channels", {"name": "new"})
    changes = await ana.ok("GET", f"{server}/changes?after={seq + 4}")
    assert set(changes) == {"seq", "has_more", "messages", "deleted", "channels"}
    assert changes["channels"] == (await ana.ok("GET", f"{server}/channels"))["channels"]
    await ana.ok("DELETE", f"{server}/members/{scene.cy.user_id}")
    changes = await ana.ok("GET", f"{server}/changes?after={seq + 5}")
    assert set(changes) == {"seq", "has_more", "messages", "deleted", "members", "former"}
    assert changes["members"] == (await ana.ok("GET", f"{server}/members"))["members"]
    await ana.ok("PATCH", server, {"name": "renamed"})
    changes = await ana.ok("GET", f"{server}/changes?after={seq + 6}")
    assert changes == {"seq": seq + 7, "has_more": False, "messages": [], "deleted": [], "name": "renamed"}


@pytest.mark.portable
async def test_joining_with_after_gives_the_changes_and_then_the_events(scene: Scene) -> None:
    ack = await scene.cy_socket.ok("join_server", {"server_id": scene.place.server_id})
    assert set(ack) == {"success", "connected_users", "seq"}
    assert ack["connected_users"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy))
    await scene.cy_socket.ok("leave_server", {"server_id": scene.place.server_id})
    missed = await scene.post()
    again = await scene.cy_socket.ok("join_server", {"server_id": scene.place.server_id, "after": ack["seq"]})
    assert again["changes"] == {"seq": missed["seq"], "has_more": False, "messages": [missed], "deleted": []}
    assert again["seq"] == missed["seq"]
    posted = await scene.post()
    assert (await scene.cy_socket.receive("message:new"))["seq"] == posted["seq"] == again["seq"] + 1


@pytest.mark.portable
async def test_changes_come_in_pages(scene: Scene) -> None:
    seq = (await scene.ana.ok("GET", f"{scene.server}/changes"))["seq"]
    posted = [await scene.ana.post(scene.place.channel_id, str(number)) for number in range(7)]
    gone = posted.pop(3)
    await scene.ana.ok("DELETE", f"/messages/{gone['message_id']}")
    messages, deleted, after, more = [], [], seq, True
    while more:
        page = await scene.ana.ok("GET", f"{scene.server}/changes?after={after}&limit=3")
        assert len(page["messages"]) + len(page["deleted"]) <= 3
        messages += page["messages"]
        deleted += page["deleted"]
        after, more = page["seq"], page["has_more"]
    assert messages == posted
    assert [deletion["message_id"] for deletion in deleted] == [gone["message_id"]]
    assert after == seq + 8


ANSWER_MAX = 512 * 1024  # bytes


async def test_responses_are_bounded_in_bytes(scene: Scene) -> None:
    server, start = scene.server, (await scene.ana.ok("GET", f"{scene.server}/changes"))["seq"]
    posted = await asyncio.gather(*(scene.ana.post(scene.place.channel_id, f"wide {'😀' * 3995}") for _ in range(70)))
    ids = sorted(message["message_id"] for message in posted)
    pages = f"/channels/{scene.place.channel_id}/messages?limit=100"
    walks: list[
        tuple[str, int, Callable[[Any], int]]
    ] = [  # path, limit, and a function that returns the cursor of the next page
        (f"{server}/changes?after=", start, lambda page: page["seq"]),
        (f"{pages}&after=", ids[0] - 1, lambda page: page["messages"][-1]["message_id"]),
        (f"{pages}&before=", ids[-1] + 1, lambda page: page["messages"][0]["message_id"]),
        (f"{server}/search?q=wide&limit=100&before=", ids[-1] + 1, lambda page: page["messages"][-1]["message_id"]),
    ]
    for path, cursor, following in walks:
        read, more = [], True
        while more:
            page = await scene.ana.ok("GET", f"{path}{cursor}")
            assert len(json.dumps(page, ensure_ascii=False, separators=(",", ":")).encode()) <= ANSWER_MAX, path
            assert len(page["messages"]) > 20 or not page["has_more"]
            read += [message["message_id"] for message in page["messages"]]
            cursor, more = following(page), page["has_more"]
        assert len(read) == len(set(read)), path
        assert sorted(set(read) & set(ids)) == ids, path
    around = await scene.ana.ok("GET", f"{pages}&around={ids[35]}")
    assert ids[35] in [message["message_id"] for message in around["messages"]]
    assert around["has_more"]
    ack = await scene.cy_socket.ok("join_server", {"server_id": scene.place.server_id, "after": start})
    assert ack["changes"]["has_more"]
    for answer in (around, ack):
        assert len(json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()) <= ANSWER_MAX


async def test_a_long_member_list_is_in_the_changes_once(scene: Scene) -> None:
    """With 10,000 new members the list is larger than a response may be, and is sent only once."""
    server_id, start = scene.place.server_id, (await scene.ana.ok("GET", f"{scene.server}/changes"))["seq"]

    def crowd(db: sqlite3.Connection) -> chatrtc.Result[None]:
        for number in range(10_000):
            user_id = chatrtc.insert_user(db, f"pupil{number}", None, "2026-01-01T00:00:00Z")
            chatrtc.insert_member(db, server_id, user_id, "member", "2026-01-01T00:00:00Z")
        return chatrtc.Result(None)

    before = await asyncio.gather(*(scene.ana.post(scene.place.channel_id, "x" * 4000) for _ in range(60)))
    await scene.world.chat.hub.store.write(crowd, slow=True)
    await asyncio.gather(*(scene.ana.post(scene.place.channel_id, "x" * 4000) for _ in range(90)))
    after, more, lists = start, True, []
    messages: list[Any] = []
    while more:
        page = await scene.ana.ok("GET", f"{scene.server}/changes?after={after}")
        size = len(json.dumps(page, separators=(",", ":")))
        assert size <= ANSWER_MAX or (page["messages"], page["deleted"]) == ([], []), (
            "a list larger than a response is sent alone"
        )
        if "members" in page:
            lists.append(page["members"])
            assert {message["message_id"] for message in before} <= {message["message_id"] for message in messages}
        messages += page["messages"]
        assert page["seq"] > after
        after, more = page["seq"], page["has_more"]
    assert lists == [(await scene.ana.ok("GET", f"{scene.server}/members"))["members"]]
    assert len(messages) == 150


FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


async def test_slow_reads_of_one_user_do_not_delay_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "SLOW_READ_SECONDS", 1.0)
    monkeypatch.setattr(chatrtc, "READER_WAIT_SECONDS", 2.5)
    store, started = scene.world.chat.hub.store, Counter[object]()

    def endless(db: sqlite3.Connection, user: object) -> Any:
        started[user] += 1
        return db.execute(FOREVER).fetchall()

    greedy = [asyncio.ensure_future(store.read_slow("eve", lambda: False, endless, "eve")) for _ in range(100)]
    await until(lambda: started["eve"] == chatrtc.SLOW_READS_PER_USER)
    for person in (scene.ana, scene.ben):
        await person.ok("GET", f"{scene.server}/search?q=before")
        await person.ok("GET", f"{scene.server}/changes")
        await person.ok("GET", "/users/me/reads")
    assert (await scene.world.call("GET", "/healthz")).status == 200
    assert started["eve"] == chatrtc.SLOW_READS_PER_USER, "other users do not wait for them"
    outcomes = Counter(error.reason for error in await asyncio.gather(*greedy, return_exceptions=True))
    assert outcomes["TOO_OFTEN"] >= 100 - chatrtc.MAX_QUEUED_SLOW_READS
    assert set(outcomes) == {"TOO_OFTEN", "TOO_SLOW"}
    assert outcomes["TOO_SLOW"] >= chatrtc.SLOW_READS_PER_USER
    await scene.ana.ok("GET", f"{scene.server}/search?q=before")


async def test_a_slow_read_is_cancelled_with_its_caller(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed socket and a cancelled task release their reader soon afterwards."""
    monkeypatch.setattr(chatrtc, "SLOW_READ_SECONDS", 600)
    store, started, ended = scene.world.chat.hub.store, set[str](), Counter[str]()

    def endless(db: sqlite3.Connection, how: str) -> Any:
        started.add(how)
        try:
            return db.execute(FOREVER).fetchall()
        finally:
            ended[how] += 1

    gone: list[int] = []
    reads = [asyncio.ensure_future(store.read_slow(how, lambda: bool(gone), endless, how)) for how in ("gone", "cancelled")]
    await until(lambda: len(started) == 2)
    reads[1].cancel()
    await until(lambda: ended["cancelled"] == 1)
    assert not ended["gone"]
    gone.append(1)
    await until(lambda: ended["gone"] == 1)
    outcomes = await asyncio.gather(*reads, return_exceptions=True)
    assert isinstance(outcomes[0], chatrtc.ChatError)
    assert outcomes[0].reason == "TOO_SLOW"
    for _ in range(chatrtc.SLOW_READERS + 1):
        await scene.ana.ok("GET", f"{scene.server}/changes")


def insert_words(db: sqlite3.Connection, place: Place, author_id: int, count: int) -> chatrtc.Result[None]:
    """Insert messages with many words that begin with each letter, and index them."""
    dice, at = random.Random(1), "2026-01-01T00:00:00Z"
    words = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(20_000)]
    row = "INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq) VALUES (?, ?, ?, ?, ?, ?)"
    last = chatrtc.load_seq(db, place.server_id)
    many = ((*place, author_id, " ".join(dice.choices(words, k=15)), at, last + n) for n in range(1, count + 1))
    db.executemany(row, many)
    db.execute("UPDATE servers SET seq = seq + ? WHERE server_id = ?", (count, place.server_id))
    while chatrtc.index_messages(db).value < chatrtc.load_index_progress(db)[0]:
        pass
    return chatrtc.Result(None)


@pytest.mark.soak
async def test_a_hundred_searches_of_half_a_million_messages_delay_nobody(scene: Scene) -> None:
    for _ in range(100):
        await scene.world.chat.hub.store.write(lambda db: insert_words(db, scene.place, scene.ana.user_id, 5_000), slow=True)
    eve = await scene.world.person("eve")
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    await eve.ok("POST", f"/invites/{invite['code']}")
    heavy = "e t a o i n s h r d l u"
    searches = [asyncio.ensure_future(eve.call("GET", f"{scene.server}/search?q={heavy}")) for _ in range(100)]
    searches += [asyncio.ensure_future(eve.call("GET", f"/channels/{scene.place.channel_id}/read")) for _ in range(200)]
    times = []
    while not all(search.done() for search in searches):
        for path in ("/healthz", f"{scene.server}/search?q=eta", f"/channels/{scene.place.channel_id}/read", "/users/me/reads"):
            start = time.monotonic()
            reply = await scene.ben.call("GET", path)
            times.append(time.monotonic() - start)
            assert reply.status == 200, (path, reply)
        await scene.post()
    statuses = Counter(search.result().status for search in searches)
    assert max(times) < 3, (statuses, max(times))
    assert statuses[200] >= 200
    assert set(statuses) <= {200, 429, 503}


async def test_no_event_is_lost_between_the_ack_of_joining_and_the_first_event(scene: Scene) -> None:
    start = (await scene.ana.ok("GET", f"{scene.server}/changes"))["seq"]
    posting = asyncio.gather(*(scene.post() for _ in range(300)))
    joins = []
    while not posting.done():
        socket = await scene.ben.socket(transports=["websocket"])
        joins.append((socket, await socket.ok("join_server", {"server_id": scene.place.server_id, "after": start})))
    expected = sorted(message["seq"] for message in await posting)
    assert joins
    for socket, ack in joins:
        page = ack["changes"]
        missed = [message["seq"] for message in page["messages"]]
        assert not page["has_more"]
        await socket.ok("ping")
        live = [payload["seq"] for event, payload in socket.received if event == "message:new"]
        assert missed + [seq for seq in live if seq > page["seq"]] == expected


class History:
    """Random changes of one server by its members."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.random = scene, random.Random(seed)
        self.channels = [scene.place.channel_id]
        self.messages: list[int] = []
        self.code = ""

    async def step(self) -> None:
        """Make one change. An error is fine: another change may have come first."""
        pick, scene = self.random.choice, self.scene
        person, path = pick([scene.ana, scene.ben]), f"/messages/{pick(self.messages or [1])}"
        weights = {
            "post": 20, "edit": 8, "delete": 5, "react": 8, "unreact": 4, "pin": 4, "unpin": 2, "clear": 1,
            "open": 2, "rename": 2, "close": 1, "leave": 2, "join": 3, "role": 1, "name": 1, "rule": 3, "mute": 3,
        }  # fmt: skip
        match self.random.choices([*weights], [*weights.values()])[0]:
            case "post":
                reply = await person.call(
                    "POST", "/messages", {"channel_id": pick(self.channels), "content": pick(["@ben hi", "@everyone"])}
                )
                if reply.status == 201:
                    self.messages.append(reply.body["message_id"])
            case "edit":
                await person.call("PATCH", path, {"content": f"edited {self.random.random()}"})
            case "delete":
                await scene.ana.call("DELETE", path)
            case "react":
                await person.call("PUT", f"{path}/reactions/{pick('ab👍')}")
            case "unreact":
                await person.call("DELETE", f"{path}/reactions/{pick('ab👍')}")
            case "pin":
                await scene.ana.call("PUT", f"{path}/pin")
            case "unpin":
                await scene.ana.call("DELETE", f"{path}/pin")
            case "clear":
                await scene.ana.call("DELETE", f"/channels/{pick(self.channels)}/messages")
            case "open":
                body = {"name": f"c{self.random.random()}", "kind": pick(["text", "voice"]), "topic": pick(["", "t"])}
                self.channels.append((await scene.ana.ok("POST", f"{scene.server}/channels", body))["channel_id"])
            case "rename":
                await scene.ana.call("PATCH", f"/channels/{pick(self.channels)}", {"topic": str(self.random.random())})
            case "close" if len(self.channels) > 1:
                await scene.ana.call("DELETE", f"/channels/{self.channels.pop()}")
            case "leave":
                await scene.cy.call("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
            case "join":
                self.code = self.code or (await scene.ana.ok("POST", f"{scene.server}/invites", {}))["code"]
                await scene.cy.call("POST", f"/invites/{self.code}")
            case "role":
                role = {"role": pick(["admin", "member"])}
                await scene.ana.call("PATCH", f"{scene.server}/members/{scene.cy.user_id}", role)
            case "name":
                await scene.ana.call("PATCH", scene.server, {"name": str(self.random.random())})
            case "rule":
                rules = {"posting": pick(["everyone", "staff"]), "slow_seconds": pick([0, 1]), "keep_days": pick([None, 7])}
                await scene.ana.call("PATCH", f"/channels/{pick(self.channels)}", rules)
            case "mute":
                member = f"{scene.server}/members/{pick([scene.ben, scene.cy]).user_id}/mute"
                await scene.ana.call(pick(["PUT", "DELETE"]), member)


async def converge(scene: Scene, seed: int, steps: int) -> None:
    history = History(scene, seed)
    stable, reconnecting = (Replica(scene.ben, scene.place.server_id) for _ in range(2))
    await asyncio.gather(stable.connect(), reconnecting.connect())
    for _ in range(steps):
        await asyncio.gather(*(history.step() for _ in range(history.random.randint(1, 5))))
        if history.random.random() < 0.3:
            await (reconnecting.disconnect() if reconnecting.socket else reconnecting.connect())
        for replica in (stable, reconnecting):
            if replica.socket is not None and history.random.random() < 0.5:
                await replica.receive()
    if reconnecting.socket is None:
        await reconnecting.connect()
    await asyncio.gather(stable.receive(), reconnecting.receive())
    expected = await server_state(scene.ben, scene.place.server_id)
    assert stable.state() == expected
    assert reconnecting.state() == expected
    assert stable.requests == 0, "a client that stays connected misses no number"


@pytest.mark.portable
@pytest.mark.parametrize("seed", range(4))
async def test_a_reconnecting_client_ends_equal_to_a_connected_one(scene: Scene, seed: int) -> None:
    await converge(scene, seed, 60)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 140))
async def test_clients_converge_after_long_histories(scene: Scene, seed: int) -> None:
    await converge(scene, seed, 400)


async def join_raw(person: Person, server_id: int, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
    """Return a WebSocket joined to the server. (A hundred clients of python-socketio would measure python-socketio.)"""
    url = f"{person.world.url}/socket.io/?EIO=4&transport=websocket"
    socket = await session.ws_connect(url)
    assert (await socket.receive_str()).startswith("0{")
    await socket.send_str("40" + json.dumps({"token": person.token}))
    assert (await socket.receive_str()).startswith("40{")
    await socket.send_str("420" + json.dumps(["join_server", {"server_id": server_id}]))
    while not (frame := await socket.receive_str()).startswith("430"):
        assert frame.startswith('42["user:connected"'), frame
    assert json.loads(frame[3:])[0]["success"] is True
    return socket


async def receive_posts(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[Any]:
    posts: list[Any] = []
    async with asyncio.timeout(30):
        while len(posts) < count:
            frame = await socket.receive_str()
            if frame == "2":
                await socket.send_str("3")
            elif frame.startswith("42"):
                event, payload = msgspec.json.decode(frame[2:])
                assert event == "message:new"
                posts.append(payload)
    return posts


@pytest.mark.parametrize("by", ["another author's", "the server's", "every server's"])
async def test_an_authors_messages_are_deleted_in_steps_and_each_is_emitted(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(chatrtc, "PURGE_STEP", 30)
    monkeypatch.setattr(chatrtc, "PURGE_SCAN_STEP", 150)
    world = await make_world()
    scene = await Scene.make(world)
    await scene.ben.ok("POST", "/servers", {"name": "empty"})
    other = await world.place(scene.dee, scene.ben, name="third")
    replica = Replica(scene.cy, scene.place.server_id)
    await replica.connect()

    def fill(db: sqlite3.Connection) -> chatrtc.Result[None]:
        for number in range(600):
            person, channel_id = [(scene.ben, scene.place.channel_id), (scene.ana, scene.place.channel_id),
                                  (scene.ben, other.channel_id)][number % 3]  # fmt: skip
            author = chatrtc.Principal(person.user_id, person.name)
            server_id = other.server_id if channel_id == other.channel_id else scene.place.server_id
            chatrtc.insert_message(db, server_id, author, chatrtc.NewMessage(channel_id, "spam"), "2026-01-01T00:00:00Z")
        return chatrtc.Result(None)

    await world.chat.hub.store.write(fill, slow=True)
    author = scene.cy if by == "another author's" else scene.ben
    server_id = None if by == "every server's" else scene.place.server_id
    purge = functools.partial(chatrtc.start_purge, server_id=server_id, author_id=author.user_id)
    await world.chat.hub.store.write(lambda db: chatrtc.Result(None, purge(db)), slow=True)
    await world.chat.stop()  # while messages are being deleted
    await world.chat.start()
    posted = await scene.post()  # deleting goes on; messages posted after its beginning stay
    again = await author.post(scene.place.channel_id, "again")
    while world.chat.hub.store.read_inline(chatrtc.load_pending_purge):
        await asyncio.sleep(0.02)
    authors = Counter(message["author_id"] for message in await channel_history(scene.ana, scene.place.channel_id))
    spam = 200 if by == "another author's" else 0
    assert authors == Counter({scene.ana.user_id: 202, scene.ben.user_id: spam}) + Counter([author.user_id])
    kept = Counter(message["author_id"] for message in await channel_history(scene.dee, other.channel_id))
    assert kept == ({} if by == "every server's" else {scene.ben.user_id: 200})
    replica.requests = 0
    await replica.receive()
    assert {posted["message_id"], again["message_id"]} <= set(replica.messages)
    await replica.catch_up()
    assert replica.state() == await server_state(scene.cy, scene.place.server_id)


@pytest.mark.portable
async def test_a_thousand_concurrent_posts_reach_a_hundred_sockets_in_order(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    start = (await ana.ok("GET", f"/servers/{place.server_id}/changes"))["seq"]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        sockets = [await join_raw(ben, place.server_id, session) for _ in range(100)]
        receiving = [asyncio.create_task(receive_posts(socket, 1000)) for socket in sockets]
        replies = await asyncio.gather(*(ana.post(place.channel_id, str(number)) for number in range(1000)))
        received = await asyncio.gather(*receiving)
    assert sorted(reply["seq"] for reply in replies) == [start + 1 + number for number in range(1000)]
    expected = sorted(replies, key=lambda reply: int(reply["seq"]))
    assert all(posts == expected for posts in received)


async def test_a_bug_in_publishing_one_job_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    published: list[Any] = []

    def publish(effects: Any, foreign: bool) -> None:
        published.extend(effects)
        if effects[0] % 2:
            raise Boom

    store = chatrtc.Store(tmp_path / "chat.db", publish)
    await store.open(lambda db, first: None)
    jobs = [functools.partial(lambda number, db: chatrtc.Result(number, [number]), number) for number in range(300)]
    done = await asyncio.gather(*map(store.write, jobs))
    await store.close()
    assert [outcome.value for outcome in done] == published == list(range(300))
    assert "Boom" in caplog.text


async def test_a_restarted_server_has_everything_it_acknowledged(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    world = process.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    message = await ana.post(place.channel_id, "kept", nonce="n")
    await world.close()
    await process.stop(signal.SIGKILL)
    process = await Process.start(tmp_path / "chat.db")
    world = process.world()
    ben.world = ana.world = world  # tokens are still valid: the secret was kept
    history = await ben.ok("GET", f"/channels/{place.channel_id}/messages")
    assert history == {"messages": [message], "has_more": False}
    assert await ana.post(place.channel_id, "kept", nonce="n") == message
    again = await ana.post(place.channel_id, "next")
    assert (again["message_id"], again["seq"]) == (message["message_id"] + 1, message["seq"] + 1)
    await world.close()
    assert await process.stop() == (0, "")


@pytest.mark.parametrize("slow", [True, False])
async def test_slow_jobs_copy_the_wal_into_the_database_early(world: World, tmp_path: Path, slow: bool) -> None:
    """Copying 16 MiB at once would delay everybody's posts. The control: fast jobs do it once the -wal is that large."""

    def write(db: sqlite3.Connection) -> chatrtc.Result[None]:
        db.execute("INSERT INTO log (written_at, bytes, effects) VALUES (?, 0, zeroblob(262144))", (time.time(),))
        return chatrtc.Result(None)

    for _ in range(40):
        await world.chat.hub.store.write(write, slow=slow)
    assert ((tmp_path / "chat.db-wal").stat().st_size < 5 << 20) is slow


# ---- File queries ---------------------------------------------------------------------------------------------------
# The life of a file: it is uploaded, posted, read and removed. Whatever fails leaves nothing behind.


async def try_upload(person: Person, channel_id: int, data: Any = b"hello", **query: Any) -> Reply:
    body = io.BytesIO(data) if isinstance(data, bytes) else data
    return await person.call("POST", f"/channels/{channel_id}/files", data=body, params={"name": "a.txt"} | query)


async def uploaded(person: Person, channel_id: int, data: Any = b"hello", **query: Any) -> Any:
    """Upload a file and return what the server says about it."""
    reply = await try_upload(person, channel_id, data, **query)
    assert reply.status == 201, reply
    return reply.body


async def in_parts(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    """Yield a body whose length is not known in advance."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def stored_now(world: World) -> tuple[int, int, int]:
    """Return the number of files, the number of pieces, and the total of their bytes."""
    query = "SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM pieces), (SELECT bytes FROM stored)"
    found: tuple[int, int, int] = world.chat.hub.store.read_inline(lambda db: db.execute(query).fetchone())
    return found


async def until_nothing_is_stored(world: World) -> None:
    await until(lambda: stored_now(world) == (0, 0, 0))


@pytest.mark.portable
@pytest.mark.parametrize("size", [0, 1, chatrtc.PIECE_BYTES, 2 * chatrtc.PIECE_BYTES, 3 * chatrtc.PIECE_BYTES + 7])
async def test_a_file_is_uploaded_posted_and_read(scene: Scene, size: int) -> None:
    ana, ben, channel_id, data = scene.ana, scene.ben, scene.place.channel_id, os.urandom(size)
    file = await uploaded(ana, channel_id, in_parts(data), name="../Gr\u202eüße.bin", alt="a picture", width=7)
    kind = "application/octet-stream" if data and chatrtc.detect_type(data) != "text/plain" else "text/plain"
    assert file == {"file_id": file["file_id"], "name": "Grüße.bin", "type": kind, "size": size, "alt": "a picture"}
    path = f"/files/{file['file_id']}"
    assert (await ana.call("GET", path)).body == data
    assert (await ben.call("GET", path)).code == "FORBIDDEN"
    message = await ana.post(channel_id, "", files=[file["file_id"]])
    assert message["files"] == [file]
    assert await scene.ben_socket.receive("message:new") == message
    assert (await ben.call("GET", path)).body == data
    assert (await scene.dee.call("GET", path)).code == "FORBIDDEN"
    await scene.dee_socket.receive_none("message:new")


@pytest.mark.portable
async def test_files_accompany_their_message_everywhere(scene: Scene, tmp_path: Path) -> None:
    ana, ben, channel_id = scene.ana, scene.ben, scene.place.channel_id
    files = [await uploaded(ana, channel_id, f"file {number}".encode(), name=f"{number}.txt") for number in range(10)]
    files.reverse()  # the order of a message is that of its author
    message = await ana.post(channel_id, "for @ben", files=[file["file_id"] for file in files])
    assert message["files"] == files
    assert (await scene.ben_socket.receive("message:new")) == message
    assert (await scene.ben_socket.receive("mention"))["files"] == files
    await scene.ben.ok("PUT", f"/messages/{message['message_id']}/reactions/x")
    edited = await ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": ""})
    assert (edited["content"], edited["files"]) == ("", files)
    assert (await scene.ben_socket.receive("message:edit"))["files"] == files
    assert (await ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "found"}))["files"] == files
    found = [
        (await ben.ok("GET", f"/messages/{message['message_id']}")),
        (await ben.ok("GET", f"/channels/{channel_id}/messages"))["messages"][-1],
        (await ben.ok("GET", f"{scene.server}/changes?after={message['seq'] - 1}"))["messages"][-1],
        (await ben.ok("GET", f"{scene.server}/search?q=found"))["messages"][-1],
    ]
    assert [one["files"] for one in found] == [files] * 4
    lines = (await run_ok("export", "--database", str(tmp_path / "chat.db"))).splitlines()
    exported = [record for record in map(json.loads, lines) if record["type"] == "message"]
    assert exported[-1] == {"type": "message"} | found[0]
    text = await ana.post(channel_id, "text only")
    assert "files" not in text
    reply = await ana.call("PATCH", f"/messages/{text['message_id']}", {"content": ""})
    assert (reply.code, reply.body["reason"]) == ("BAD_REQUEST", "FIELD_EMPTY")


@pytest.mark.portable
async def test_only_own_unposted_files_of_the_channel_can_be_posted(scene: Scene) -> None:
    ana, channel_id = scene.ana, scene.place.channel_id
    elsewhere = await ana.channel(scene.place.server_id, "elsewhere")
    attached, twice, deleted = [(await uploaded(ana, channel_id))["file_id"] for _ in range(3)]
    first = await ana.post(channel_id, "one", files=[attached])
    gone = await ana.post(channel_id, "gone", files=[deleted])
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")
    wrong: list[tuple[Any, str, str]] = [
        ([attached], "CONFLICT", "FILE_ATTACHED"),
        ([deleted], "NOT_FOUND", "NO_FILE"),
        ([(await uploaded(ana, elsewhere))["file_id"]], "NOT_FOUND", "NO_FILE"),
        ([(await uploaded(scene.ben, channel_id))["file_id"]], "NOT_FOUND", "NO_FILE"),
        ([twice, 10**9], "NOT_FOUND", "NO_FILE"),
        ([*range(1, 12)], "BAD_REQUEST", "FIELD_TYPE"),
        ([0], "BAD_REQUEST", "FIELD_SMALL"),
        ([], "BAD_REQUEST", "FIELD_EMPTY"),
    ]
    for files, code, reason in wrong:
        body = {"channel_id": channel_id, "content": "", "files": files}
        for answer in ((await ana.call("POST", "/messages", body)).body, await scene.ana_socket.call("message:send", body)):
            assert (answer["code"], answer["reason"]) == (code, reason), files
            assert answer["field"] == ("content" if not files else "files")
    body = {"channel_id": channel_id, "content": "", "files": [twice, twice], "nonce": "n"}
    message = await scene.ana_socket.ok("message:send", body)
    assert [file["file_id"] for file in message["files"]] == [twice]
    assert (await ana.ok("POST", "/messages", body))["message_id"] == message["message_id"]  # a repeat, not a conflict
    assert message["seq"] == first["seq"] + 3  # posted, deleted, posted: the failures changed nothing


FILE_BYTES = bytes(range(256)) * 4
RANGES: dict[str, tuple[int, slice]] = {  # a Range header -> the status, and which of the 1,024 bytes are sent
    "bytes=0-": (206, slice(0, None)),
    "bytes=0-0": (206, slice(0, 1)),
    "bytes=1000-1999": (206, slice(1000, None)),
    "bytes=1023-": (206, slice(1023, None)),
    "bytes=-1": (206, slice(-1, None)),
    "bytes=-9999": (206, slice(0, None)),
    "BYTES=5-6": (206, slice(5, 7)),
    "bytes=1024-": (416, slice(0, 0)),
    "bytes=9999999999999999999-": (416, slice(0, 0)),
    "bytes=0-1,3-4": (200, slice(0, None)),
    "bytes=6-5": (200, slice(0, None)),
    "bytes=a-b": (200, slice(0, None)),
    "bytes=-": (200, slice(0, None)),
    "bytes=": (200, slice(0, None)),
    "bytes = 0-1": (200, slice(0, None)),
    "lines=0-1": (200, slice(0, None)),
    "bytes=٣-٤": (200, slice(0, None)),
    "bytes=0x1-2": (200, slice(0, None)),
    "bytes=--1": (200, slice(0, None)),
    "bytes=" + "9" * 5000 + "-": (200, slice(0, None)),
}


async def ask_for(scene: Scene, path: str, method: str = "GET", **headers: str) -> Reply:
    """Request a file and return the answer, whose status may be 416."""
    given = {name.replace("_", "-"): value for name, value in headers.items()} | {"Authorization": f"Bearer {scene.ana.token}"}
    async with scene.world.session.request(method, scene.world.url + path, headers=given) as response:
        return Reply(response.status, await response.read(), response.headers)


@pytest.mark.portable
async def test_ranges(scene: Scene) -> None:
    path = f"/files/{(await uploaded(scene.ana, scene.place.channel_id, FILE_BYTES))['file_id']}"
    for header, (status, part) in RANGES.items():
        reply = await ask_for(scene, path, Range=header)
        start, stop, _ = part.indices(len(FILE_BYTES))
        expected = {200: None, 206: f"bytes {start}-{stop - 1}/1024", 416: "bytes */1024"}[status]
        assert (reply.status, reply.headers.get("Content-Range")) == (status, expected), header
        assert status == 416 or reply.body == FILE_BYTES[part], header
    large = os.urandom(2 * chatrtc.PIECE_BYTES + 100)
    path = f"/files/{(await uploaded(scene.ana, scene.place.channel_id, large))['file_id']}"
    for start, stop in ((0, 1), (chatrtc.PIECE_BYTES - 1, chatrtc.PIECE_BYTES + 1), (1, len(large)), (70_000, 400_000)):
        reply = await ask_for(scene, path, Range=f"bytes={start}-{stop - 1}")
        assert (reply.status, reply.body) == (206, large[start:stop])


@pytest.mark.portable
async def test_conditions_on_a_file(scene: Scene) -> None:
    path = f"/files/{(await uploaded(scene.ana, scene.place.channel_id, FILE_BYTES))['file_id']}"
    whole = await ask_for(scene, path)
    tag = whole.headers["ETag"]
    assert tag == f'"{hashlib.sha256(FILE_BYTES).hexdigest()}"'
    for match, status in [(tag, 304), (f'"x", W/{tag}', 304), ("*", 304), ('"x"', 200), ("x", 200), ('"', 200)]:
        reply = await ask_for(scene, path, If_None_Match=match)
        assert (reply.status, reply.body, reply.headers["ETag"]) == (status, FILE_BYTES if status == 200 else b"", tag), match
    for match, status in [(tag, 206), (f"W/{tag}", 200), ('"x"', 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200), ("*", 200)]:
        assert (await ask_for(scene, path, Range="bytes=0-1", If_Range=match)).status == status, match
    head = await ask_for(scene, path, "HEAD", Range="bytes=0-1")
    assert (head.status, head.body, head.headers["Content-Length"], head.headers["ETag"]) == (200, b"", "1024", tag)
    assert (await ask_for(scene, path)).body == FILE_BYTES  # the connection is still in order


@pytest.mark.portable
async def test_the_headers_of_a_file_keep_it_from_running(scene: Scene) -> None:
    page = b"<!doctype html><script>alert(1)</script>"
    for data, name, disposition, kind in [
        (page, 'x".html', "attachment; filename=\"x'.html\"; filename*=UTF-8''x%27.html", "text/plain"),
        (page, "Grüße, 你.png", "attachment; filename=\"Gr__e, _.png\"; filename*=UTF-8''Gr%C3%BC%C3%9Fe%2C%20%E4%BD%A0.png",
         "text/plain"),
        (png(2, 3, gray_pixels(2, 3)) + page, "a.png", "inline; filename=\"a.png\"; filename*=UTF-8''a.png", "image/png"),
        (b"%PDF-1.7\n", "a.pdf", "inline; filename=\"a.pdf\"; filename*=UTF-8''a.pdf", "application/pdf"),
    ]:  # fmt: skip
        file = await uploaded(scene.ana, scene.place.channel_id, data, name=name)
        headers = (await ask_for(scene, f"/files/{file['file_id']}", Origin=scene.world.url)).headers
        assert headers["Content-Disposition"] == disposition
        assert headers["Content-Type"] == file["type"] == kind
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'; ")
        assert headers["Cache-Control"] == "private, no-cache"
        assert headers["Access-Control-Allow-Origin"] == scene.world.url
        assert file.get("width") == (2 if kind == "image/png" else None)
    video = await uploaded(scene.ana, scene.place.channel_id, ftyp(b"isom") + bytes(99), width=640, height=480)
    assert (video["type"], video["width"], video["height"]) == ("video/mp4", 640, 480)


@pytest.mark.portable
async def test_files_have_limits(make_world: MakeWorld) -> None:
    """Of size and number; what exceeds them is refused and leaves nothing."""
    scene = await Scene.make(await make_world(file_max=1, files_max=2))
    ana, channel_id, world = scene.ana, scene.place.channel_id, scene.world
    mib = 1 << 20
    for data in (bytes(mib + 1), in_parts(bytes(mib + 1))):
        reply = await try_upload(ana, channel_id, data)
        assert (reply.code, reply.body["reason"]) == ("TOO_LARGE", "BODY_LONG")
    await until_nothing_is_stored(world)
    files = [await uploaded(ana, channel_id, bytes(mib)) for _ in range(2)]
    for data in (b"x", in_parts(b"x")):
        reply = await try_upload(scene.ben, channel_id, data)
        assert (reply.code, reply.body["reason"]) == ("UNAVAILABLE", "FILES_FULL")
    message = await ana.post(channel_id, "", files=[file["file_id"] for file in files])
    await ana.ok("DELETE", f"/messages/{message['message_id']}")
    await until_nothing_is_stored(world)
    assert (await uploaded(scene.ben, channel_id, bytes(mib)))["size"] == mib
    for name, value, code in [("alt", "x" * 1001, "TOO_LARGE"), ("width", "0", "BAD_REQUEST"), ("more", "1", "BAD_REQUEST")]:
        assert (await try_upload(ana, channel_id, **{name: value})).code == code
    assert (await ana.ok("GET", "/config"))["file_max"] == mib


async def test_compressed_uploads_and_uploads_without_files_are_refused(make_world: MakeWorld) -> None:
    scene = await Scene.make(await make_world(file_max=0))
    path = f"/channels/{scene.place.channel_id}/files"
    reply = await scene.ana.call("POST", path, data=b"x", headers={"Content-Encoding": "gzip"})
    assert reply.body["reason"] == "BODY_COMPRESSED"
    reply = await try_upload(scene.ana, scene.place.channel_id)
    assert (reply.code, reply.body["reason"]) == ("FORBIDDEN", "FILES_OFF")
    assert (await scene.ana.ok("GET", "/config"))["file_max"] == 0


@pytest.mark.portable
async def test_an_account_has_a_hundred_unposted_files(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "MAX_UNATTACHED_FILES", 3)
    ana, channel_id = scene.ana, scene.place.channel_id
    file_ids = [(await uploaded(ana, channel_id))["file_id"] for _ in range(3)]
    reply = await try_upload(ana, channel_id)
    assert (reply.code, reply.body["reason"]) == ("CONFLICT", "TOO_MANY")
    await uploaded(scene.ben, channel_id)
    await ana.post(channel_id, files=file_ids)
    await uploaded(ana, channel_id)


@pytest.mark.portable
async def test_files_that_are_not_posted_within_an_hour_are_removed(scene: Scene) -> None:
    ana, channel_id, store = scene.ana, scene.place.channel_id, scene.world.chat.hub.store
    file_ids = [(await uploaded(ana, channel_id, FILE_BYTES))["file_id"] for _ in range(3)]
    message = await ana.post(channel_id, files=file_ids[:1])

    def age(db: sqlite3.Connection) -> chatrtc.Result[None]:
        seconds = chatrtc.UNATTACHED_SECONDS + 1
        db.execute("UPDATE files SET uploaded_at = uploaded_at - ? WHERE file_id <> ?", (seconds, file_ids[2]))
        return chatrtc.remove_unattached_files(db)

    await store.write(age)
    assert (await ana.call("GET", f"/files/{file_ids[1]}")).code == "NOT_FOUND"
    await until(lambda: stored_now(scene.world) == (2, 2, 2 * len(FILE_BYTES)))
    assert (await ana.ok("GET", f"/messages/{message['message_id']}"))["files"][0]["file_id"] == file_ids[0]
    assert (await ana.call("GET", f"/files/{file_ids[2]}")).body == FILE_BYTES


class RawUpload:
    """An upload whose body is sent bit by bit, over a connection of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def start(cls, person: Person, channel_id: int, size: int | None = 10**6) -> RawUpload:
        """Send the headers. `size`: the announced length; None: a chunked body."""
        self = cls(*await asyncio.open_connection("127.0.0.1", urlsplit(person.world.url).port))
        length = "Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}"
        headers = f"Host: localhost\r\nAuthorization: Bearer {person.token}\r\n{length}\r\n\r\n"
        self.writer.write(f"POST /channels/{channel_id}/files?name=a HTTP/1.1\r\n{headers}".encode())
        return self

    async def send_pieces(self, world: World, count: int) -> None:
        """Send pieces, and wait until they are stored."""
        pieces = stored_now(world)[1]
        self.writer.write(os.urandom(count * chatrtc.PIECE_BYTES))
        await until(lambda: stored_now(world)[1] == pieces + count)

    async def answer(self) -> tuple[int, Any]:
        """Return the status and the body of the response."""
        async with asyncio.timeout(PATIENCE):
            head = await self.reader.readuntil(b"\r\n\r\n")
            size = int(re.findall(rb"Content-Length: (\d+)", head)[0])
            return int(head.split()[1]), json.loads(await self.reader.readexactly(size))


async def stop_sending(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more is sent."""


async def disconnect(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    upload.writer.close()


async def lose_membership(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.ana.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
    upload.writer.write(bytes(chatrtc.PIECE_BYTES))


async def lose_the_token(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.ben.ok("POST", "/auth/logout")
    upload.writer.write(bytes(chatrtc.PIECE_BYTES))


async def lose_the_channel(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.ana.ok("DELETE", f"/channels/{scene.place.channel_id}")
    upload.writer.write(bytes(chatrtc.PIECE_BYTES))


async def lose_the_server(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.ana.ok("DELETE", scene.server)
    upload.writer.write(bytes(chatrtc.PIECE_BYTES))


async def send_too_much(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    upload.writer.write(bytes(2 * chatrtc.PIECE_BYTES))


async def break_the_chunks(scene: Scene, upload: RawUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    upload.writer.write(b"this is not a chunk\r\n")


FAILED_UPLOADS: dict[Callable[[Scene, RawUpload, pytest.MonkeyPatch], Awaitable[None]], tuple[int, str]] = {
    stop_sending: (400, "BODY_BROKEN"),
    disconnect: (0, ""),
    lose_membership: (403, "NOT_MEMBER"),
    lose_the_token: (401, "TOKEN_INVALID"),
    lose_the_channel: (404, "NO_CHANNEL"),
    lose_the_server: (404, "NO_CHANNEL"),
    send_too_much: (413, "BODY_LONG"),
    break_the_chunks: (400, "BODY_BROKEN"),
}


@pytest.mark.portable
@pytest.mark.parametrize("fail", FAILED_UPLOADS, ids=lambda fail: fail.__name__)
async def test_a_failed_upload_leaves_nothing(make_world: MakeWorld, fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = await Scene.make(await make_world(file_max=1))
    if fail in (stop_sending, break_the_chunks):  # aiohttp does not tell of a wrong chunk: it waits for a right one
        monkeypatch.setattr(chatrtc, "UPLOAD_STALL_SECONDS", 0.5)
    chunked = fail in (send_too_much, break_the_chunks)
    started = await RawUpload.start(scene.ben, scene.place.channel_id, None if chunked else 10**6)
    try:
        if chunked:
            started.writer.write(
                f"{10**7:x}\r\n".encode() if fail is send_too_much else f"{3 * chatrtc.PIECE_BYTES:x}\r\n".encode()
            )
        await started.send_pieces(scene.world, 3)
        if fail is break_the_chunks:
            started.writer.write(b"\r\n")
        assert stored_now(scene.world) == (1, 3, 3 * chatrtc.PIECE_BYTES)
        await fail(scene, started, monkeypatch)
        status, reason = FAILED_UPLOADS[fail]
        if status:
            answered, body = await started.answer()
            assert (answered, body.get("reason")) == (status, reason)
        await until_nothing_is_stored(scene.world)
    finally:
        started.writer.close()
    again = scene.ana if fail in (lose_membership, lose_the_token) else scene.ben
    if fail not in (lose_the_channel, lose_the_server):
        await uploaded(again, scene.place.channel_id)


async def test_a_full_disk_ends_an_upload(make_world: MakeWorld, small_disk: Path) -> None:
    world = await make_world(database=str(small_disk / "chat.db"), disk_reserve=0)
    ana = await world.person("ana")
    place = await world.place(ana)
    reply = await try_upload(ana, place.channel_id, in_parts(os.urandom(5 << 20)))
    assert (reply.status, reply.body["reason"]) == (503, "DISK_FULL")
    subprocess.run([find_program("mount"), "-o", "remount,size=20m", small_disk], check=True)
    await until_healthy(world)
    await world.chat.hub.store.write(lambda db: chatrtc.Result(chatrtc.remove_unfinished_files(db)))  # as its retry does
    await until_nothing_is_stored(world)
    await uploaded(ana, place.channel_id, os.urandom(1 << 20))


@pytest.mark.portable
async def test_a_link_reads_one_file_while_its_user_may(scene: Scene) -> None:
    ana, ben, world, channel_id = scene.ana, scene.ben, scene.world, scene.place.channel_id
    file_ids = [(await uploaded(ana, channel_id, FILE_BYTES))["file_id"] for _ in range(2)]
    path = f"/files/{file_ids[0]}"
    assert (await ben.call("POST", f"{path}/link")).code == "FORBIDDEN"  # not posted yet
    await ana.post(channel_id, "", files=file_ids)
    link = await ben.ok("POST", f"{path}/link")
    assert link["url"].startswith(f"{path}?link=")
    assert 3500 < datetime.datetime.fromisoformat(link["expires_at"]).timestamp() - time.time() <= 3601
    secret = link["url"].partition("=")[2]

    async def status(url: str, **headers: str) -> int:
        return (await world.call("GET", url, headers=headers)).status

    assert (await world.call("GET", link["url"])).body == FILE_BYTES
    assert (await world.call("GET", link["url"], headers={"Range": "bytes=1-2"})).body == FILE_BYTES[1:3]
    assert await status(path) == 401
    assert await status(f"/files/{file_ids[1]}?link={secret}") == 401
    assert await status(path, Authorization=f"Bearer {secret}") == 401
    assert await status(f"{path}?link={ben.token}") == 401
    assert await status(f"/channels/{channel_id}/messages?link={secret}") == 401
    for wrong in ("", "x", "%FF", secret[:-1], secret + "x", secret.rpartition(".")[0] + ".", "." * 100, "é"):
        assert await status(f"{path}?link={wrong}") == 401, wrong
    user = world.chat.hub.authenticate_token(ben.token)
    old = world.chat.hub.signer.sign_link(file_ids[0], user, int(time.time()) - 1)
    assert await status(f"{path}?link={old}") == 401
    await ana.ok("DELETE", f"{scene.server}/members/{ben.user_id}")
    assert await status(link["url"]) == 403
    await ben.ok("POST", f"/invites/{await ana.invite(scene.place.server_id)}")
    assert await status(link["url"]) == 200
    await ben.ok("POST", "/auth/logout")
    assert await status(link["url"]) == 401


@pytest.mark.parametrize("what", ["message", "channel", "server", "account"])
async def test_deleting_a_message_deletes_its_files(
    scene: Scene, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are then neither in the database nor in its -wal."""
    ana, ben, world, store = scene.ana, scene.ben, scene.world, scene.world.chat.hub.store
    marker = b"The bytes of a file that is deleted. "
    data = marker * (5 * chatrtc.PIECE_BYTES // len(marker))
    file_ids = [(await uploaded(ben, scene.place.channel_id, data))["file_id"] for _ in range(3)]
    message = await ben.post(scene.place.channel_id, "", files=file_ids[:2])
    other = await ben.post(scene.place.channel_id, "", files=file_ids[2:])
    database = tmp_path / "chat.db"

    def is_in_the_files() -> bool:
        """Search in another process: closing the database in this one would end the locks of SQLite."""
        found = subprocess.run([find_program("grep"), "-qa", marker, database, f"{database}-wal"], stderr=subprocess.DEVNULL)
        return found.returncode == 0

    assert is_in_the_files()
    match what:
        case "message":
            await ana.ok("DELETE", f"/messages/{message['message_id']}")
            await ana.ok("DELETE", f"/messages/{other['message_id']}")
        case "channel":
            await ana.ok("DELETE", f"/channels/{scene.place.channel_id}")
        case "server":
            await ana.ok("DELETE", scene.server)
        case "account":
            await run_ok("user", "delete", "ben", "--messages", "--yes", "--database", str(database))
            await scene.ana_socket.receive("message:deleted")
    for file_id in file_ids:
        assert (await ana.call("GET", f"/files/{file_id}")).code == "NOT_FOUND"
    await until_nothing_is_stored(world)
    await until(lambda: not store.read_inline(chatrtc.has_stale_texts))
    await until(lambda: not is_in_the_files())
    assert (await run_ok("check", "--database", str(database))).startswith("sound")


async def test_a_download_ends_when_its_reader_loses_access(make_world: MakeWorld) -> None:
    scene = await Scene.make(await make_world(file_max=32))
    file = await uploaded(scene.ana, scene.place.channel_id, os.urandom(32 << 20))
    await scene.ana.post(scene.place.channel_id, "", files=[file["file_id"]])
    headers = {"Authorization": f"Bearer {scene.ben.token}"}
    async with scene.world.session.get(f"{scene.world.url}/files/{file['file_id']}", headers=headers) as response:
        await response.content.readexactly(100_000)
        await scene.ana.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
        with pytest.raises(aiohttp.ClientError):
            await response.content.read()
    assert (await scene.ana.call("GET", f"/files/{file['file_id']}")).status == 200


async def test_a_slow_reader_takes_little_memory_and_is_disconnected(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatrtc, "MAX_STALL_SECONDS", 1.0)
    scene = await Scene.make(await make_world(file_max=32))
    file = await uploaded(scene.ana, scene.place.channel_id, os.urandom(32 << 20))
    engine = scene.world.chat.sio.eio
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(scene.world.url).port, limit=1000)
    writer.write(
        f"GET /files/{file['file_id']} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {scene.ana.token}\r\n\r\n".encode()
    )
    await until(lambda: len(engine.slow_clients.waiting) == 1)
    (client,) = engine.slow_clients.waiting
    assert client.get_write_buffer_size() <= 3 * chatrtc.PART_BYTES
    await until(client.is_closing)
    with contextlib.suppress(ConnectionError):
        while await reader.read(1 << 16):
            pass
    writer.close()
    await until(lambda: scene.world.chat.hub.downloads._free == chatrtc.DOWNLOADS)
    assert engine.slow_clients.total == 0


async def test_the_program_uploads_and_reads_files(scene: Scene) -> None:
    chat, at = scene.world.chat, {"author_id": scene.ana.user_id, "channel_id": scene.place.channel_id}
    data = os.urandom(chatrtc.PIECE_BYTES + 9)
    for source in (data, in_parts(data, 100_000), in_parts(data, 1 << 20)):
        file = await chat.upload_file(**at, name="a.bin", data=source)
        assert file.size == len(data)
        content = await chat.read_file(author_id=scene.ana.user_id, file_id=file.file_id)
        assert b"".join([part async for part in content.parts()]) == data
        assert content.digest == hashlib.sha256(data).digest()
        with pytest.raises(chatrtc.ChatError, match="FORBIDDEN"):
            await chat.read_file(author_id=scene.ben.user_id, file_id=file.file_id)
    link = await chat.create_file_link(author_id=scene.ana.user_id, file_id=file.file_id)
    assert (await scene.world.call("GET", link.url)).body == data

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(chatrtc.PIECE_BYTES)
        raise Boom

    before = stored_now(scene.world)
    with pytest.raises(Boom):
        await chat.upload_file(**at, name="a.bin", data=broken())
    await until(lambda: stored_now(scene.world) == before)
    with pytest.raises(chatrtc.ChatError, match="Unknown field"):
        await chat.post_message(**at, content="x", data=b"x")


async def test_a_restart_removes_unfinished_uploads(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        ana = await world.person("ana")
        place = await world.place(ana)
        message = await ana.post(place.channel_id, "", files=[(await uploaded(ana, place.channel_id))["file_id"]])
        running = await RawUpload.start(ana, place.channel_id)
        running.writer.write(bytes(2 * chatrtc.PIECE_BYTES))

        def pieces() -> int:
            with contextlib.closing(sqlite3.connect(tmp_path / "chat.db")) as db:
                return int(db.execute("SELECT count(*) FROM pieces").fetchone()[0])

        await until(lambda: pieces() == 3)
        await process.stop(signal.SIGKILL)
        running.writer.close()
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        await until(lambda: pieces() == 1)
        ana.world = world
        assert (await ana.ok("GET", f"/messages/{message['message_id']}"))["files"] == message["files"]
        assert (await ana.call("GET", f"/files/{message['files'][0]['file_id']}")).body == b"hello"
    await process.stop()
    assert (await run_ok("check", "--database", str(tmp_path / "chat.db"))).startswith("sound")


async def test_uploads_of_one_user_take_turns(scene: Scene) -> None:
    """The fourth waits until one of the other three ends, and the uploads of others do not wait for it."""
    ben, channel_id, world = scene.ben, scene.place.channel_id, scene.world
    started = [await RawUpload.start(ben, channel_id) for _ in range(chatrtc.UPLOADS_PER_USER)]
    for one in started:
        await one.send_pieces(world, 1)
    fourth = asyncio.create_task(uploaded(ben, channel_id))
    await until(lambda: world.chat.hub.uploads.count_waiting(ben.user_id) == 1)
    await uploaded(scene.ana, channel_id)
    assert not fourth.done()
    started[0].writer.close()
    assert (await fourth)["size"] == 5
    for one in started[1:]:
        one.writer.close()
    await until(lambda: stored_now(world)[:2] == (2, 2))


# ---- Message queries ------------------------------------------------------------------------------------------------
# What remains of a deleted message or account.

KEPT_OF_A_MESSAGE = {  # columns and rows that remain of a deleted message, with the reason
    "message_id": "ids are never reused", "server_id": "catching up", "channel_id": "catching up", "seq": "catching up",
    "author_id": "catching up", "created_at": "it is not sent any more", "edited_at": "it is not sent any more",
    "reply_to": "it is not sent any more", "extras": "nothing depends on it", "deleted": "says that it is deleted",
    "nonce": "a retry must not post the message again",
}  # fmt: skip
KEPT_OF_A_USER = {  # columns and rows that remain of a deleted account, with the reason
    "user_id": "ids are never reused", "username": "its messages show it", "username_key": "nobody else can take the name",
    "name": "its messages show it", "status": "it is not sent any more", "created_at": "it is not sent any more",
    "generation": "its tokens stay invalid", "deleted": "says that it is deleted",
    "messages.author_id": "a deleted message keeps its author", "purges.author_id": "the rest of its messages is deleted later",
    "former_members.user_id": "its name is still shown", "invites.created_by": "the invites belong to the server",
    "servers.started_by": "the conversation belongs to its participants",
    "bans.banned_by": "the bans belong to the server", "bans.user_id": "harmless", "reads.user_id": "harmless",
    "links.user_id": "expires in minutes, and is of no use for a deleted account",
    "files.uploader_id": "the files of deleted messages are deleted in steps, the others belong to their messages",
    "moderation.user_id": "the log shows it for 90 days", "moderation.target_id": "the log shows it for 90 days",
}  # fmt: skip
COLUMN_VALUES = {  # valid values of columns that have a CHECK
    "status": "busy", "role": "member", "servers.kind": "server", "kind": "text", "deleted": 0, "extras": 1, "stale": 0,
    "posting": "staff", "everyone": 1, "purges.channel_id": None,
}  # fmt: skip


@pytest.fixture
def filled_tables(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Return a database with one row in each table and a value in each column; all refer to user, server and message 1."""
    with contextlib.closing(chatrtc.prepare(tmp_path / "filled.db")) as db:
        for table in tables_of(db):
            columns = db.execute(f"PRAGMA table_xinfo({table})").fetchall()
            by_type = {"INTEGER": 1, "REAL": 1.0, "TEXT": "x", "BLOB": b"x"}
            values = [
                COLUMN_VALUES.get(f"{table}.{name}", COLUMN_VALUES.get(name, by_type[kind])) for _, name, kind, *_ in columns
            ]
            db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
        db.execute("DELETE FROM former_members")  # user 1 is still a member
        yield db


def tables_of(db: sqlite3.Connection) -> list[str]:
    """Return the tables in the order of schema.sql, without those of SQLite and FTS5, and without `search`."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name NOT LIKE 'messages_fts%'"
    return [name for (name,) in db.execute(query + " ORDER BY rowid") if name != "search"]


def remains_of(db: sqlite3.Connection, table: str, key: str) -> set[str]:
    """Return the columns of row 1 that are not empty, and each `table.column` of other tables that refers to this row."""
    cursor = db.execute(f"SELECT * FROM {table} WHERE {key} = 1")  # noqa: S608
    remains = {name for (name, *_), value in zip(cursor.description, cursor.fetchone(), strict=True) if value}
    for other in tables_of(db):
        names = {name for _, name, *_ in db.execute(f"PRAGMA table_xinfo({other})") if other != table and name == key}
        names |= {name for _, _, target, name, *_ in db.execute(f"PRAGMA foreign_key_list({other})") if target == table}
        remains |= {f"{other}.{name}" for name in names if db.execute(f"SELECT 1 FROM {other} WHERE {name} = 1").fetchone()}  # noqa: S608
    return remains


@pytest.mark.portable
def test_a_deleted_message_keeps_only_what_is_listed(filled_tables: sqlite3.Connection) -> None:
    assert remains_of(filled_tables, "messages", "message_id") >= {
        "content", "reactions.message_id", "mentions.message_id", "pins.message_id",
    }  # fmt: skip
    chatrtc.delete_message(filled_tables, 1, 1)
    remains = remains_of(filled_tables, "messages", "message_id")
    extra = remains - set(KEPT_OF_A_MESSAGE)
    assert not extra, f"clear {extra} in delete_message(), or add it to KEPT_OF_A_MESSAGE with the reason"
    assert remains == set(KEPT_OF_A_MESSAGE), "KEPT_OF_A_MESSAGE lists something that is cleared"


@pytest.mark.portable
def test_a_deleted_account_keeps_only_what_is_listed(filled_tables: sqlite3.Connection) -> None:
    assert remains_of(filled_tables, "users", "user_id") >= {"password", "known_addresses.user_id", "reactions.user_id"}
    chatrtc.delete_user(filled_tables, "x", messages=True)
    remains = remains_of(filled_tables, "users", "user_id")
    extra = remains - set(KEPT_OF_A_USER)
    assert not extra, f"clear {extra} in close_account(), or add it to KEPT_OF_A_USER with the reason"
    assert remains == set(KEPT_OF_A_USER), "KEPT_OF_A_USER lists something that is cleared"


# ---- Transcript -----------------------------------------------------------------------------------------------------
# A channel as one HTML file, made while it is sent.


class TranscriptParser(HTMLParser):
    """Collects the elements of a transcript, and the text of each message."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[tuple[str, str]] = set()  # (tag, attribute)
        self.open: list[str] = []
        self.messages: dict[int, dict[str, str]] = {}  # by id: the text in each kind of element
        self.pictures: list[dict[str, str | None]] = []
        self.text: dict[str, str] = {}
        self.current: dict[str, str] = self.text
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(tag, name) for name, _ in attrs}
        values = dict(attrs)
        if tag == "p":
            self.current = self.messages[int((values["id"] or "")[1:])] = {}
        if tag == "img":
            self.pictures.append(values)
        if tag not in ("meta", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "p":
            self.current = self.text

    def handle_data(self, data: str) -> None:
        self.current[self.open[-1] if self.open else ""] = self.current.get(self.open[-1] if self.open else "", "") + data


async def get_transcript(person: Person, channel_id: int, query: str = "") -> TranscriptParser:
    """Return the transcript of a channel, whose tags are all closed, and all known."""
    reply = await person.call("GET", f"/channels/{channel_id}/transcript{query}")
    assert reply.status == 200, reply
    page = TranscriptParser(reply.body.decode())
    assert page.open == []
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "small", "a", "b", "time", "img", "hr",
    }  # fmt: skip
    assert {name for tag, name in page.attributes if tag not in ("meta", "html")} <= {"id", "href", "src", "alt"}
    assert reply.body.endswith(b"</body></html>\n")
    return page


@pytest.mark.portable
async def test_a_transcript_shows_replies_reactions_edits_and_pins(scene: Scene) -> None:
    ana, ben, channel = scene.ana, scene.ben, scene.place.channel_id
    first = await ana.post(channel, "the first\nline")
    answer = await ben.post(channel, "an answer", reply_to=first["message_id"])
    await ben.ok("PATCH", f"/messages/{answer['message_id']}", {"content": "a better answer"})
    gone = await ben.post(channel, "deleted since")
    late = await ana.post(channel, "too late", reply_to=gone["message_id"])
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")
    for person in (ana, ben, scene.cy):
        await person.ok("PUT", f"/messages/{first['message_id']}/reactions/👍")
    await scene.cy.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    await ana.ok("PUT", f"/messages/{first['message_id']}/pin")
    await ben.ok("PATCH", "/users/me", {"name": "Ben Ray"})
    page = await get_transcript(ana, channel)
    assert (page.text["h1"], page.text["h2"]) == ("class", "general")
    assert list(page.messages)[1:] == [first["message_id"], answer["message_id"], late["message_id"]]
    at = first["created_at"][:16].replace("T", " ")
    texts = [page.messages[one["message_id"]] for one in (first, answer, late)]
    assert texts[0] == {"b": "ana", "p": " \nthe first\nline", "time": f"{at} (pinned)", "small": "👍 ana, Ben Ray, cy"}
    assert texts[1]["a"] == "ana: the first line"
    assert (texts[1]["b"], texts[1]["p"]) == ("Ben Ray", " \na better answer")
    assert texts[1]["time"].endswith(" (edited)")
    assert texts[2]["a"] == "a deleted message"
    assert ("a", "href") in page.attributes
    assert "deleted since" not in str(page.messages)


@pytest.mark.portable
async def test_no_text_is_markup_in_a_transcript(scene: Scene) -> None:
    hostile = [
        "<script>alert('&')</script>", '"><img src=x onerror=alert(1)>', "</p></body><h1>", "<!--", "]]>", "</style><style>",
        "&lt;b&gt; {0} {name} %s %(x)s", "\U0001f600\nnext\tline",
    ]  # fmt: skip
    ana = scene.ana
    await ana.ok("PATCH", scene.server, {"name": hostile[1]})
    channel = await ana.channel(scene.place.server_id, hostile[2])
    await scene.ben.ok("PATCH", "/users/me", {"name": hostile[0]})
    posted = [await scene.ben.post(channel, text) for text in hostile]
    answers = [await ana.post(channel, "yes", reply_to=one["message_id"]) for one in posted]
    await ana.call("PUT", f"/messages/{posted[0]['message_id']}/reactions/" + quote('"><script>', safe=""))
    page = await get_transcript(ana, channel)
    assert (page.text["title"], page.text["h1"], page.text["h2"]) == (hostile[1], hostile[1], hostile[2])
    for text, one, answer in zip(hostile, posted, answers, strict=True):
        assert page.messages[one["message_id"]]["p"] == f" \n{text}"
        assert page.messages[one["message_id"]]["b"] == hostile[0]
        assert page.messages[answer["message_id"]]["a"] == f"{hostile[0]}: {' '.join(text.split())}"
    assert page.messages[posted[0]["message_id"]]["small"] == f'"><script> {"ana"}'


@pytest.mark.portable
async def test_a_transcript_can_hide_all_names(scene: Scene) -> None:
    channel, people = scene.place.channel_id, [scene.ana, scene.ben, scene.cy]
    asian = await scene.world.person("小明")
    await asian.ok("POST", f"/invites/{await scene.ana.invite(scene.place.server_id)}")
    for person, name in zip(people, ("Anastasia", "Benedikt", "Cyrano"), strict=True):
        await person.ok("PATCH", "/users/me", {"name": name})
    first = await scene.ben.post(channel, "@ana, @BEN! `@cy` ben@ana.example @小明你好 @ana.@nobody @dee " + "x" * 45 + " @ana")
    answer = await scene.cy.post(channel, "yes", reply_to=first["message_id"])
    await scene.ana.ok("PUT", f"/messages/{first['message_id']}/reactions/👍")
    await scene.cy.ok("DELETE", f"{scene.server}/members/{scene.cy.user_id}")
    shown = await get_transcript(scene.ana, channel)
    assert "Anastasia" in str(shown.messages) and "@ana" in str(shown.messages)
    page = await get_transcript(scene.ana, channel, "?names=hidden")
    numbers = {
        person.name: page.messages[one]["b"]
        for person, one in ((scene.ben, first["message_id"]), (scene.cy, answer["message_id"]))
    }
    numbers["ana"] = page.messages[first["message_id"]]["small"].removeprefix("👍 ")
    assert sorted({*numbers.values()}) == sorted(numbers.values()), "different people have different numbers"
    assert all(re.fullmatch(r"Person [1-5]", number) for number in numbers.values())
    text = page.messages[first["message_id"]]["p"]
    assert text.startswith(f" \n@{numbers['ana']}, @{numbers['ben']}! `@{numbers['cy']}` ben@{numbers['ana']}.example @Person ")
    assert "你好 @" + numbers["ana"] + ".@nobody @Person" in text, "an account of another server, too"
    everything = json.dumps([page.messages, page.text], ensure_ascii=False)
    for name in ("ana", "ben", "@cy", "dee", "小明", "Anastasia", "Benedikt", "Cyrano"):
        assert name not in everything.replace("ben@Person", ""), name
    assert page.messages[answer["message_id"]]["a"] == f"{numbers['ben']}: {text[2:102]}", "cut after the names are hidden"
    assert (await scene.ana.call("GET", f"/channels/{channel}/transcript?names=maybe")).code == "BAD_REQUEST"


@pytest.mark.portable
async def test_a_transcript_is_a_download(scene: Scene) -> None:
    channel = await scene.ana.channel(scene.place.server_id, 'Über "uns"/a.b')
    reply = await scene.ana.call("GET", f"/channels/{channel}/transcript")
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    name = "filename*=UTF-8''%C3%9Cber%20%27uns%27_a.b.html"
    assert reply.headers["Content-Disposition"].startswith("attachment;") and reply.headers["Content-Disposition"].endswith(
        name
    )
    assert reply.headers["Content-Security-Policy"] == "sandbox; " + chatrtc.TRANSCRIPT_POLICY
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    parts = (await scene.world.chat.get_transcript(author_id=scene.ana.user_id, channel_id=channel)).parts
    assert b"".join([part async for part in parts]) == reply.body
    with pytest.raises(chatrtc.ChatError, match="FORBIDDEN"):
        await scene.world.chat.get_transcript(author_id=scene.ben.user_id, channel_id=channel)


async def begin_transcript(scene: Scene) -> tuple[aiohttp.ClientResponse, bytes]:
    """Request the transcript of a long channel, and read its beginning only."""
    await insert_many(scene, 100_000)
    headers = {"Authorization": f"Bearer {scene.ana.token}"}
    session = aiohttp.ClientSession(headers=headers, read_bufsize=1 << 12)
    scene.world.sockets.append(session)  # type: ignore[arg-type]  # closed at the end
    response = await session.get(f"{scene.world.url}/channels/{scene.place.channel_id}/transcript")
    assert response.status == 200
    return response, await response.content.readany()


@pytest.mark.portable
async def test_a_transcript_ends_where_its_reader_loses_access(scene: Scene) -> None:
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "owner"})
    response, beginning = await begin_transcript(scene)
    await scene.ben.ok("PATCH", f"{scene.server}/members/{scene.ana.user_id}", {"role": "member"})
    assert beginning.startswith(b"<!doctype html>")
    with pytest.raises(aiohttp.ClientError):
        await response.content.read()
    await scene.ben.ok("PATCH", f"{scene.server}/members/{scene.ana.user_id}", {"role": "admin"})
    page = await get_transcript(scene.ana, scene.place.channel_id)
    assert len(page.messages) == 100_001


@pytest.mark.portable
async def test_a_transcript_ends_with_its_client(scene: Scene) -> None:
    hub = scene.world.chat.hub
    response, _ = await begin_transcript(scene)
    assert hub.downloads._running
    response.close()
    await until(lambda: not hub.downloads._running)
    assert len((await get_transcript(scene.ana, scene.place.channel_id)).messages) == 100_001


@pytest.mark.portable
async def test_a_transcript_has_what_was_there_at_its_beginning(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "TRANSCRIPT_STEP", 3)
    monkeypatch.setattr(chatrtc, "TRANSCRIPT_PART", 500)
    posted = [(await scene.post())["message_id"] for _ in range(20)]
    found = await scene.world.chat.get_transcript(author_id=scene.ana.user_id, channel_id=scene.place.channel_id)
    pages = b""
    async for part in found.parts:
        pages += part
        await scene.ben.post(scene.place.channel_id, "later")  # else, as fast as it reads, there would be more
    assert list(TranscriptParser(pages.decode()).messages)[1:] == posted


@pytest.mark.soak
async def test_a_transcript_of_a_million_messages_needs_little_memory(launch: Launch, tmp_path: Path) -> None:
    """Its reader gets all of them; meanwhile, the memory of the server grows by less than 64 MiB and nobody else waits."""
    server = await launch(tmp_path / "chat.db", "--no-rate-limit")
    world = server.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    other = await ana.channel(place.server_id, "other")
    await server.stop_well()
    with contextlib.closing(chatrtc.prepare(tmp_path / "chat.db")) as db:
        row = "INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq) VALUES (?, ?, ?, ?, ?, ?)"
        text, last = "message {} of the lesson, about the causes of the revolution", chatrtc.load_seq(db, place.server_id)
        many = ((*place, ana.user_id, text.format(n), "2026-01-01T00:00:00Z", last + n) for n in range(1, 1_000_001))
        db.execute("BEGIN")
        db.executemany(row, many)
        db.execute("UPDATE servers SET seq = seq + 1000000")
        db.commit()
        chatrtc.index_all(db)
    server = await launch(tmp_path / "chat.db", "--no-rate-limit")
    ana.world = ben.world = server.world()
    status = Path(f"/proc/{server.process.pid}/status")

    def memory(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) // 1024  # type: ignore[index]

    for _ in range(50):
        await ben.post(other)
    before, times, size, tail, began = memory("VmRSS"), list[float](), 0, b"", time.monotonic()

    async def post() -> None:
        while True:
            start = time.monotonic()
            await ben.post(other)
            times.append(time.monotonic() - start)
            await asyncio.sleep(0.02)

    posting = asyncio.create_task(post())
    url = f"{server.url}/channels/{place.channel_id}/transcript?names=hidden"
    async with ana.world.session.get(
        url, headers={"Authorization": f"Bearer {ana.token}"}, timeout=aiohttp.ClientTimeout()
    ) as page:
        async for part in page.content.iter_any():
            size, tail = size + len(part), (tail + part)[-200:]
    posting.cancel()
    p99 = sorted(times)[len(times) * 99 // 100] * 1000
    grown = memory("VmHWM") - before
    print(f"{size >> 20} MiB in {time.monotonic() - began:.0f} s, memory +{grown} MiB; {len(times)} posts, p99 {p99:.1f} ms")
    assert b"1000000 messages." in tail
    assert grown < 64
    assert p99 < bound(0.05) * 1000
    await server.stop_well()


# ---- Presence -------------------------------------------------------------------------------------------------------
# Users who are connected or typing: several tabs count as one user, and a closed socket leaves nothing.


class PresenceMachine(stateful.RuleBasedStateMachine):
    """Compare Presence with a simple model: a set of (server, user, socket)."""

    def __init__(self) -> None:
        super().__init__()
        self.presence = chatrtc.Presence()
        self.joined: set[tuple[int, int, str]] = set()

    sids = strategies.sampled_from(["a", "b", "c", "d"])
    servers = strategies.integers(1, 2)
    owners: ClassVar[dict[str, int]] = {"a": 1, "b": 1, "c": 2, "d": 3}  # the user of each socket

    def users(self, server_id: int) -> set[int]:
        return {user_id for server, user_id, _ in self.joined if server == server_id}

    @stateful.rule(server_id=servers, sid=sids)
    def join(self, server_id: int, sid: str) -> None:
        user_id = self.owners[sid]
        seen = user_id not in self.users(server_id) | self.presence.invisible
        assert self.presence.join(server_id, user_id, sid) == seen
        self.joined.add((server_id, user_id, sid))

    @stateful.rule(server_id=servers, sid=sids)
    def leave(self, server_id: int, sid: str) -> None:
        user_id, before = self.owners[sid], self.users(server_id)
        self.joined.discard((server_id, user_id, sid))
        seen = user_id in before - self.users(server_id) - self.presence.invisible
        assert self.presence.leave(server_id, user_id, sid) == seen

    @stateful.rule(user_id=strategies.integers(1, 3))
    def hide_or_show(self, user_id: int) -> None:
        self.presence.invisible ^= {user_id}

    @stateful.invariant()
    def agrees(self) -> None:
        for server_id in (1, 2):
            for viewer in (0, 1):
                seen = {user for user in self.users(server_id) if user == viewer or user not in self.presence.invisible}
                assert self.presence.visible(server_id, viewer) == sorted(seen)
        for user_id in (1, 2, 3):
            servers = {server for server, user, _ in self.joined if user == user_id}
            assert set(self.presence.servers(user_id)) == servers


TestPresence = PresenceMachine.TestCase
TestPresence.settings = settings(max_examples=60, stateful_step_count=30, derandomize=True, database=None, deadline=None)


@pytest.mark.portable
def test_typing_is_limited_per_user_and_channel() -> None:
    typists = chatrtc.TypingTracker()
    assert typists.start(5, chatrtc.ChannelUser(1, 7, "ana"), "a", 10.0)
    assert not typists.start(5, chatrtc.ChannelUser(1, 7, "ana"), "a", 10.9)
    assert not typists.start(5, chatrtc.ChannelUser(2, 7, "ana"), "a", 10.95), "once a second per user, in any tab"
    assert typists.start(5, chatrtc.ChannelUser(1, 8, "ben"), "b", 10.95), "other users are counted separately"
    assert typists.start(5, chatrtc.ChannelUser(1, 7, "ana"), "a", 11.0)
    assert typists.expired(13.9) == []
    assert typists.expired(14.0) == [(1, 8), (1, 7)] or set(typists.expired(14.0)) == {(1, 7), (1, 8)}
    assert typists.pop((1, 7), None) is not None
    assert typists.pop((1, 7), None) is None


async def test_typing_is_emitted_once_a_second_and_ends_after_three(scene: Scene) -> None:
    loop, typing = asyncio.get_running_loop(), {"channel_id": scene.place.channel_id}
    start = loop.time()
    for _ in range(5):
        await scene.ana_socket.ok("typing_start", typing)
    assert await scene.ben_socket.receive("user:typing") == typing | {"user_id": scene.ana.user_id, "username": "ana"}
    await scene.ben_socket.receive_none("user:typing")
    stop = await scene.ben_socket.receive("typing_stop")
    assert stop == typing | {"user_id": scene.ana.user_id, "username": "ana"}
    assert 2.9 <= loop.time() - start < bound(4.5)
    await scene.ana_socket.ok("typing_start", typing)
    await scene.ben_socket.receive("user:typing")
    await scene.ana_socket.close()
    await scene.ben_socket.receive("typing_stop", user_id=scene.ana.user_id)


@pytest.mark.portable
async def test_typing_is_emitted_to_the_users_other_tab(scene: Scene) -> None:
    tab = await scene.ana.socket(scene.place.server_id)
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await tab.receive("user:typing", user_id=scene.ana.user_id)
    await scene.ana_socket.receive_none("user:typing")


@pytest.mark.portable
async def test_several_tabs_count_as_one_user(scene: Scene) -> None:
    scene.ben_socket.received.clear()
    scene.ben_socket._read = 0
    tabs = [await scene.cy.socket(scene.place.server_id) for _ in range(3)]
    assert (await scene.ben_socket.receive("user:connected"))["user_id"] == scene.cy.user_id
    await tabs[0].close()
    await tabs[1].ok("leave_server", {"server_id": scene.place.server_id})
    await scene.ben_socket.receive_none("user:connected", "user:disconnected")
    ack = await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id})
    assert scene.cy.user_id in ack["connected_users"]
    await tabs[2].close()
    assert (await scene.ben_socket.receive("user:disconnected"))["user_id"] == scene.cy.user_id
    ack = await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted([scene.ana.user_id, scene.ben.user_id])


@pytest.mark.portable
async def test_joining_twice_is_joining_once(scene: Scene) -> None:
    await scene.ana_socket.ok("join_server", {"server_id": scene.place.server_id})
    await scene.ben_socket.receive_none("user:connected")
    await scene.post()
    await scene.ana_socket.receive("message:new")
    await scene.ana_socket.receive_none("message:new")
    await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id})
    await scene.ben_socket.receive("user:disconnected", user_id=scene.ana.user_id)
    await scene.ana_socket.ok("leave_server", {"server_id": scene.place.server_id})  # the second call changes nothing
    await scene.ben_socket.receive_none("user:disconnected")


async def connected(person: Person, scene: Scene) -> dict[int, bool]:
    members = (await person.ok("GET", f"{scene.server}/members"))["members"]
    return {member["user_id"]: member["connected"] for member in members}


@pytest.mark.portable
async def test_invisible_users_appear_disconnected_to_others(scene: Scene) -> None:
    ana = scene.ana.user_id
    assert (await connected(scene.ben, scene))[ana]
    assert not (await connected(scene.ben, scene))[scene.cy.user_id], "a user is connected only after joining"
    await scene.ana_socket.ok("user:status", {"status": "invisible"})
    assert (await scene.ben_socket.receive("user:disconnected"))["user_id"] == ana
    assert not (await connected(scene.ben, scene))[ana]
    assert (await connected(scene.ana, scene))[ana]
    ack = await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == [scene.ben.user_id]
    members = (await scene.ben.ok("GET", f"{scene.server}/members"))["members"]
    assert "invisible" not in {member["status"] for member in members}
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    tab = await scene.ana.socket(scene.place.server_id)
    await scene.ana_socket.close()
    await scene.ben_socket.receive_none("user:connected", "user:disconnected", "user:typing", "typing_stop", "user:status")
    await tab.ok("user:status", {"status": "online"})
    assert (await scene.ben_socket.receive("user:connected"))["user_id"] == ana
    assert "user:status" in scene.ben_socket.names()
    assert (await connected(scene.ben, scene))[ana]


@pytest.mark.portable
async def test_turning_invisible_emits_typing_stop(scene: Scene) -> None:
    await scene.ana_socket.ok("typing_start", {"channel_id": scene.place.channel_id})
    await scene.ben_socket.receive("user:typing", user_id=scene.ana.user_id)
    await scene.ana_socket.ok("user:status", {"status": "invisible"})
    await scene.ben_socket.receive("typing_stop", user_id=scene.ana.user_id)
    await scene.ben_socket.receive("user:disconnected", user_id=scene.ana.user_id)


@pytest.mark.portable
async def test_an_invisible_user_connects_without_an_event(scene: Scene) -> None:
    await scene.cy.ok("PATCH", "/users/me", {"status": "invisible"})
    await scene.cy_socket.close()
    socket = await scene.cy.socket()
    ack = await socket.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy)), (
        "the user is included"
    )
    await socket.close()
    await scene.ben_socket.receive_none("user:connected", "user:disconnected", "user:status")


@pytest.mark.portable
async def test_a_socket_that_disconnects_while_joining_leaves_no_presence(scene: Scene) -> None:
    for _ in range(10):
        socket = await scene.cy.socket(transports=["websocket"])
        await socket.client.emit("join_server", {"server_id": scene.place.server_id})
        await socket.client.emit("typing_start", {"channel_id": scene.place.channel_id})
        await socket.close()
    last = await scene.cy.socket(scene.place.server_id)
    await last.close()
    await scene.ben_socket.receive("user:disconnected", user_id=scene.cy.user_id)
    ack = await scene.ben_socket.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted([scene.ana.user_id, scene.ben.user_id])


# ---- Authentication -------------------------------------------------------------------------------------------------
# Passwords and tokens: only a valid token of an existing account is accepted, by every interface.

SECRET = "a secret of thirty-two bytes or more"
HOUR = 3600


def claims_of(person: Person, **changes: Any) -> dict[str, Any]:
    """Return valid claims with these changes; claims that are None are omitted."""
    now = int(time.time())
    claims = {"sub": str(person.user_id), "iat": now, "exp": now + HOUR} | changes
    return {name: value for name, value in claims.items() if value is not None}


def sign(claims: dict[str, Any], secret: str = SECRET, algorithm: str = "HS256") -> str:
    """Return a token made by hand: PyJWT refuses to make some of them."""
    hashes = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}
    parts = [json.dumps({"alg": algorithm, "typ": "JWT"}).encode(), json.dumps(claims).encode()]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    digest = b""
    if algorithm in hashes:
        digest = hmac.new(secret.encode(), signed, hashes[algorithm]).digest()
    return (signed + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


async def password_changed(world: World, person: Person) -> str:
    words = {"old_password": "correct horse", "new_password": "battery staple"}
    renewed = await person.ok("POST", "/auth/password", words)
    assert set(renewed) == {"user_id", "username", "token", "expires_at"}
    assert (await world.call("GET", "/users/me", token=renewed["token"])).status == 200
    return person.token


async def logged_out(world: World, person: Person) -> str:
    assert (await person.call("POST", "/auth/logout")).status == 204
    return person.token


async def account_deleted(world: World, person: Person) -> str:
    await world.chat.hub.store.write(lambda db: chatrtc.delete_user(db, person.name))
    return person.token


WRONG_TOKENS: dict[str, Callable[[Person], str]] = {
    "expired": lambda user: sign(claims_of(user, iat=1, exp=int(time.time()) - 1)),
    "forged": lambda user: sign(claims_of(user))[:-4] + "AAAA",
    "of another secret": lambda user: sign(claims_of(user), secret="x" * 32),
    "of algorithm none": lambda user: sign(claims_of(user), algorithm="none"),
    "of algorithm HS384": lambda user: sign(claims_of(user), algorithm="HS384"),
    "of algorithm HS512": lambda user: sign(claims_of(user), algorithm="HS512"),
    "without exp": lambda user: sign(claims_of(user, exp=None)),
    "without iat": lambda user: sign(claims_of(user, iat=None)),
    "without sub": lambda user: sign(claims_of(user, sub=None)),
    "with exp as a string": lambda user: sign(claims_of(user, exp=str(int(time.time()) + HOUR))),
    "with iat as a string": lambda user: sign(claims_of(user, iat="now")),
    "with exp a list": lambda user: sign(claims_of(user, exp=[])),
    "with exp true": lambda user: sign(claims_of(user, exp=True)),
    "with exp not a number": lambda user: sign(claims_of(user, exp=float("nan"))),
    "not yet valid": lambda user: sign(claims_of(user, nbf=int(time.time()) + HOUR)),
    "for another audience": lambda user: sign(claims_of(user, aud="elsewhere", iss="chatrtc")),
    "for several audiences": lambda user: sign(claims_of(user, aud=["chatrtc", "elsewhere"], iss="chatrtc")),
    "for no audience": lambda user: sign(claims_of(user) | {"aud": None}),
    "of another issuer": lambda user: sign(claims_of(user, iss="elsewhere")),
    "of a missing user": lambda user: sign(claims_of(user, sub="999")),
    "with sub too large for SQLite": lambda user: sign(claims_of(user, sub="9" * 30)),
    "with a username as sub": lambda user: sign(claims_of(user, sub=user.name)),
    "with sub as a number": lambda user: sign(claims_of(user, sub=user.user_id)),
    "of a later generation": lambda user: sign(claims_of(user, gen=1)),
    "with a boolean generation": lambda user: sign(claims_of(user, gen=False)),
    "cut short": lambda user: user.token.rpartition(".")[0],
    "of five kilobytes": lambda user: sign(claims_of(user, pad="x" * 5000), secret="x" * 32),
    "garbage": lambda user: "a.b.c",
    "one word": lambda user: "token",
    "dots": lambda user: "..",
}
REVOKED_TOKENS = {"of an old password": password_changed, "logged out": logged_out, "of a deleted account": account_deleted}


async def assert_token_rejected(world: World, token: str) -> None:
    reply = await world.call("GET", "/users/me", token=token)
    assert (reply.status, reply.code) == (401, "UNAUTHORIZED")
    assert (await world.call("POST", "/messages", {"channel_id": 1, "content": "x"}, token=token)).status == 401
    with pytest.raises(socketio.exceptions.ConnectionError):
        await world.socket(token)
    socket = await world.socket()
    ack = await socket.call("authenticate", {"token": token})
    if len(token) < 5000:
        assert (ack["success"], ack["error"], ack["code"]) == (False, "Invalid token", "UNAUTHORIZED")
    assert ack["success"] is False
    assert (await socket.call("join_server", {"server_id": 1}))["code"] == "UNAUTHORIZED"
    await socket.close()


@pytest.mark.portable
async def test_a_token_with_only_sub_iat_and_exp_is_valid(make_world: MakeWorld) -> None:
    world = await make_world(secret=SECRET)
    ana = await world.person("ana")
    token = sign(claims_of(ana))
    assert (await world.call("GET", "/users/me", token=token)).body["user_id"] == ana.user_id
    claims = json.loads(base64.urlsafe_b64decode(ana.token.split(".")[1] + "=="))
    assert (claims["iss"], claims["aud"]) == ("chatrtc", "chatrtc")
    socket = await world.socket(token)
    assert (await socket.ok("user:status", {"status": "away"})) == {"success": True}
    socket = await world.socket()
    ack = await socket.ok("authenticate", {"token": token})
    assert ack == {"success": True, "user_id": ana.user_id, "username": "ana"}


@pytest.mark.portable
async def test_a_missing_token_is_rejected_like_a_wrong_one(world: World) -> None:
    socket = await world.socket()
    for payload in ({}, {"token": None}, {"token": ""}):
        ack = await socket.call("authenticate", payload)
        assert (ack["error"], ack["code"]) == ("Invalid token", "UNAUTHORIZED")


@pytest.mark.portable
@pytest.mark.parametrize("kind", WRONG_TOKENS)
async def test_a_wrong_token_is_rejected_by_every_interface(make_world: MakeWorld, kind: str) -> None:
    world = await make_world(secret=SECRET)
    ana = await world.person("ana")
    await assert_token_rejected(world, WRONG_TOKENS[kind](ana))


async def test_a_token_of_ten_kilobytes_is_rejected_by_every_interface(make_world: MakeWorld) -> None:
    world = await make_world(secret=SECRET)
    token = sign(claims_of(await world.person("ana"), pad="x" * 7500))
    headers = {"Authorization": f"Bearer {token}"}
    async with world.session.get(f"{world.url}/users/me", headers=headers) as response:
        assert response.status in (400, 401)  # 400 is from the HTTP server, which rejects such a header
    with pytest.raises(socketio.exceptions.ConnectionError):
        await world.socket(token)
    socket = await world.socket()
    assert (await socket.call("authenticate", {"token": token}))["code"] == "TOO_LARGE"


@pytest.mark.portable
@pytest.mark.parametrize("kind", REVOKED_TOKENS)
async def test_a_revoked_token_is_rejected_and_its_sockets_are_closed(world: World, kind: str) -> None:
    ana = await world.person("ana")
    socket = await ana.socket()
    await socket.ok("ping")
    token = await REVOKED_TOKENS[kind](world, ana)
    await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    await assert_token_rejected(world, token)


async def test_logging_out_revokes_one_token_and_closes_only_its_sockets(world: World) -> None:
    ana = await world.person("ana")
    other = await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})
    ends, stays = await ana.socket(), await world.socket(other.body["token"])
    await ana.ok("POST", "/auth/logout")
    await asyncio.wait_for(ends.closed.wait(), PATIENCE)
    await stays.ok("ping")
    assert (await world.call("GET", "/users/me", token=other.body["token"])).status == 200


async def test_no_other_spelling_of_a_revoked_token_is_valid(world: World) -> None:
    ana = await world.person("ana")
    stem, last = ana.token[:-1], ana.token[-1]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    same_bytes = digits[digits.index(last) ^ 1]
    await logged_out(world, ana)
    for spelling in (ana.token + "=", ana.token + "==", stem + same_bytes, stem + "!" + last, ana.token + "\n"):
        with pytest.raises(chatrtc.ChatError, match="UNAUTHORIZED"):
            world.chat.hub.authenticate_token(spelling)


async def test_a_socket_is_closed_when_its_token_expires(make_world: MakeWorld) -> None:
    world = await make_world(token_ttl=2)
    ana = await world.person("ana")
    socket = await ana.socket()
    await socket.ok("ping")
    await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    assert (await ana.call("GET", "/users/me")).code == "UNAUTHORIZED"


@pytest.mark.portable
async def test_a_wrong_old_password_changes_nothing(world: World) -> None:
    ana = await world.person("ana")
    reply = await ana.call("POST", "/auth/password", {"old_password": "wrong horse", "new_password": "battery staple"})
    assert reply.code == "FORBIDDEN"
    assert (await ana.call("POST", "/auth/password", {"new_password": "battery staple"})).code == "BAD_REQUEST"
    assert (await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})).status == 200


async def test_logging_in_with_an_unknown_name_takes_as_much_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.person("ana")
    work: list[tuple[int, int, int]] = []
    scrypt = hashlib.scrypt

    def counted(password: bytes, *, n: int, r: int, p: int, **options: Any) -> bytes:
        work.append((n, r, p))
        return scrypt(password, n=n, r=r, p=p, **options)

    monkeypatch.setattr(hashlib, "scrypt", counted)
    answers = []
    for name in ("ana", "nobody"):
        work.clear()
        reply = await world.call("POST", "/auth/login", {"username": name, "password": "a wrong one"})
        answers.append((reply.status, reply.body, list(work)))
    assert answers[0] == answers[1]
    assert answers[0][0] == 401
    assert len(answers[0][2]) == 1


@pytest.mark.portable
async def test_a_rejected_handshake_carries_the_error(world: World) -> None:
    socket, failed = Socket(), asyncio.get_running_loop().create_future()
    socket.client.on("connect_error", failed.set_result)
    with pytest.raises(socketio.exceptions.ConnectionError):
        await socket.connect(world.url, "not a token")
    error = await asyncio.wait_for(failed, PATIENCE)
    assert error == {
        "message": "Invalid token",
        "data": {"error": "Invalid token", "code": "UNAUTHORIZED", "reason": "TOKEN_INVALID"},
    }


async def test_a_socket_that_does_not_authenticate_in_time_is_closed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "LOGIN_SECONDS", 0.3)
    ana = await world.person("ana")
    stays, goes = await ana.socket(), await world.socket()
    assert (await goes.call("ping"))["code"] == "UNAUTHORIZED"
    await asyncio.wait_for(goes.closed.wait(), PATIENCE)
    await stays.ok("ping")


async def test_a_socket_cannot_change_its_user(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    socket = await ana.socket()
    again = await socket.ok("authenticate", {"token": ana.token})
    assert again == {"success": True, "user_id": ana.user_id, "username": "ana"}
    assert (await socket.call("authenticate", {"token": ben.token}))["success"] is False
    await socket.ok("user:status", {"status": "busy"})
    assert (await ben.ok("GET", "/users/me"))["status"] == "online"


# ---- Rate limits ----------------------------------------------------------------------------------------------------
# A client over its limit gets the seconds to wait, and other clients are not affected.


async def test_wrong_passwords_are_limited_by_account_and_address(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana, _ = await world.people("ana", "ben")
    for _ in range(5):
        assert (await world.sign_in("ana", "a wrong one")).code == "UNAUTHORIZED"
    for password in ("a wrong one", "correct horse"):
        reply = await world.sign_in("ANA", password)
        assert (reply.status, reply.code) == (429, "RATE_LIMITED")
        assert 1 <= int(reply.headers["Retry-After"]) <= 13
    words = {"old_password": "correct horse", "new_password": "battery staple"}
    assert (await ana.call("POST", "/auth/password", words)).code == "RATE_LIMITED"
    assert (await world.sign_in("ben")).status == 200
    async with world.at("127.0.0.2") as other_address:
        assert (await other_address.sign_in("ana")).status == 200


@pytest.mark.parametrize("name", ["ana", "nobody"])
async def test_an_attack_from_many_addresses_does_not_limit_known_addresses(make_world: MakeWorld, name: str) -> None:
    world = await make_world(no_rate_limit=False)
    await world.person("ana")
    answers = []
    for number in range(2, 14):
        async with world.at(f"127.0.0.{number}") as other_address:
            answers += [(await other_address.sign_in(name, "a wrong one")).code for _ in range(5)]
    assert answers[:50] == ["UNAUTHORIZED"] * 50, "an unknown name gets the same replies"
    assert answers[-1] == "RATE_LIMITED"
    async with world.at("127.0.0.14") as other_address:
        assert (await other_address.sign_in(name)).code == "RATE_LIMITED"
    assert (await world.sign_in("ana")).status == 200


async def test_only_wrong_passwords_are_counted(make_world: MakeWorld) -> None:
    """Correct passwords and those that the full queue rejects do not count. One address cannot block others."""
    world = await make_world(no_rate_limit=False)
    await world.people("ana", "ben")
    async with world.at("127.0.0.2") as other_address:
        many = [asyncio.create_task(world.sign_in("ana")) for _ in range(90)]
        await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
        assert (await other_address.sign_in("ben")).status == 200
        replies = await asyncio.gather(*many)
    rejected = {reply.body["reason"] for reply in replies if reply.status != 200}
    assert "SIGN_IN_BUSY" in rejected
    assert rejected <= {"SIGN_IN_BUSY", "TOO_SLOW"}
    assert [(await world.sign_in("ana", "a wrong one")).status for _ in range(6)] == [401] * 5 + [429]


async def test_the_hashing_queue_is_shared_fairly_by_address() -> None:
    """Addresses take turns; a full queue rejects the newest entry of the longest line; a cancelled entry leaves no gap."""
    passwords, turns = chatrtc.PasswordHasher(bounded=True), asyncio.Queue[str]()
    gates = [asyncio.Event() for _ in range(2)]

    async def hold(gate: asyncio.Event) -> None:
        async with passwords.turn("holder"):
            await gate.wait()

    async def wait(address: str) -> None:
        async with passwords.turn(address):
            turns.put_nowait(address)

    holders = [asyncio.create_task(hold(gate)) for gate in gates]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(wait(f"bad-{number % 4}")) for number in range(4 * 64)]
    await asyncio.sleep(0)
    with pytest.raises(chatrtc.ChatError, match="RATE_LIMITED"):
        await wait("bad-0")
    good = [asyncio.create_task(wait("good")) for _ in range(2)]
    await asyncio.sleep(0)
    good[0].cancel()
    waiting[0].cancel()
    for gate in gates:
        gate.set()
    outcomes = await asyncio.gather(*holders, *waiting, good[1], return_exceptions=True)
    assert sum(isinstance(outcome, chatrtc.ChatError) for outcome in outcomes) == 2
    order = [turns.get_nowait() for _ in range(turns.qsize())]
    assert len(order) == 4 * 64 - 3 + 1
    assert "good" in order[:5]
    assert (passwords._free, passwords._queues) == (chatrtc.HASHERS, {})
    passwords.close()


async def test_an_account_keeps_its_newest_addresses(world: World) -> None:
    ana, store = await world.person("ana"), world.chat.hub.store
    for number in range(30):
        digest = world.chat.hub.signer.address_digest(ana.user_id, f"192.0.2.{number}")
        await store.write(
            functools.partial(chatrtc.insert_known_address, user_id=ana.user_id, digest=digest, clock=1e10 + number)
        )
    seen = [
        store.read_inline(
            chatrtc.load_address_seen_at, ana.user_id, world.chat.hub.signer.address_digest(ana.user_id, f"192.0.2.{number}")
        )
        for number in range(30)
    ]
    assert seen == [None] * 10 + [1e10 + number for number in range(10, 30)]


def test_a_full_limit_table_drops_only_full_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "MAX_BUCKETS", 100)
    limiter = chatrtc.Limiter(enabled=True)
    limiter.count("login_account", "ana", 50)
    for number in range(1000):
        limiter.count("login_account", number)
    with pytest.raises(chatrtc.ChatError, match="RATE_LIMITED") as rejected:
        limiter.check("login_account", "ana")
    assert rejected.value.retry_after is not None
    limiter.check("login_account", 1)
    with pytest.raises(chatrtc.ChatError, match="RATE_LIMITED"):
        limiter.check("login_account", "somebody who finds the table full of attackers")
    limiter.check("login", "ana")
    assert all(len(table) <= 101 for table in limiter._tables.values())
    for number in range(1000):
        limiter.count("post", number)
        limiter.count("post", number, -1)
    limiter.check("post", "a newcomer")
    assert len(limiter._tables["post"]) <= 101


def test_an_attempt_that_succeeds_is_refunded() -> None:
    limiter, limits = chatrtc.Limiter(enabled=True), [("login", "ana"), ("login_address", "here")]
    for _ in range(20):
        with contextlib.suppress(TimeoutError), limiter.attempt(limits):
            raise TimeoutError
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(limiter.attempt(limits))
        with pytest.raises(chatrtc.ChatError, match="RATE_LIMITED"), limiter.attempt(limits):
            pass
    for _ in range(5):
        with limiter.attempt(limits) as failed:
            failed()
    with pytest.raises(chatrtc.ChatError, match="RATE_LIMITED"):
        limiter.check("login", "ana")


LIMITED_CALLS = {  # how often one user makes the call at once, how many of these succeed at least, and how many fail at least
    "POST /messages": (40, 1, 10), "message:send": (40, 1, 10), "message:edit": (40, 1, 1), "ping": (170, 100, 1),
    "voice:signal": (330, 300, 1),
}  # fmt: skip


@pytest.mark.parametrize("call", LIMITED_CALLS)
async def test_calls_are_limited_by_user(make_world: MakeWorld, call: str) -> None:
    scene = await Scene.make(await make_world(no_rate_limit=False))
    message, (voice_id, peer) = await scene.post(), await join_voice(scene)
    edit = {"message_id": message["message_id"], "content": "better"}
    arguments: Any = {
        "POST /messages": {"channel_id": scene.place.channel_id, "content": "much"}, "message:edit": edit, "ping": None,
        "message:send": {"channel_id": scene.place.channel_id, "content": "much"},
        "voice:signal": {"channel_id": voice_id, "to": peer["peer_id"], "data": 1},
    }[call]  # fmt: skip

    async def make(person: Person, socket: Socket) -> Any:
        if call == "POST /messages":
            reply = await person.call("POST", "/messages", arguments)
            return reply.body | {"success": reply.status == 201}
        return await socket.call(call, arguments)

    times, succeed, fail = LIMITED_CALLS[call]
    results = await asyncio.gather(*(make(scene.ana, scene.ana_socket) for _ in range(times)))
    rejected = [result for result in results if not result["success"]]
    assert fail <= len(rejected) <= times - succeed
    assert call == "POST /messages" or all(result["success"] for result in results[:succeed])
    for result in rejected:
        assert (result["code"], result["reason"], result["retry_after"] >= 1) == ("RATE_LIMITED", "TOO_OFTEN", True)
    if call in ("POST /messages", "message:send"):  # an edit counts against the same limit
        edits = await asyncio.gather(*(scene.ana_socket.call("message:edit", edit) for _ in range(20)))
        assert "RATE_LIMITED" in {ack.get("code") for ack in edits}
    if call != "ping":  # pings have another limit
        await scene.ana_socket.ok("ping")
    assert not scene.ana_socket.closed.is_set()
    assert (await make(scene.ben, scene.ben_socket)).get("code") != "RATE_LIMITED", "another user is not limited"


async def test_a_user_has_at_most_twenty_sockets(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana, ben = await world.people("ana", "ben")
    sockets = [await ana.socket(transports=["websocket"]) for _ in range(20)]
    with pytest.raises(socketio.exceptions.ConnectionError):
        await ana.socket(transports=["websocket"])
    late = await world.socket(transports=["websocket"])
    ack = await late.call("authenticate", {"token": ana.token})
    assert (ack["code"], ack["retry_after"] >= 1) == ("RATE_LIMITED", True)
    await ben.socket()
    await sockets[0].close()
    async with asyncio.timeout(PATIENCE):
        while not (await late.call("authenticate", {"token": ana.token}))["success"]:
            await sockets[1].ok("ping")  # until the server has noticed the disconnect


async def test_a_whole_class_joins_by_one_invite_at_once(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana = await world.person("ana")
    place = await world.place(ana)
    invite = await ana.ok("POST", f"/servers/{place.server_id}/invites", {})
    guests = [
        world.call("POST", "/auth/guest", {"username": f"guest-{number}", "code": invite["code"]}) for number in range(30)
    ]
    assert [reply.status for reply in await asyncio.gather(*guests)] == [201] * 30


async def test_a_valid_code_works_despite_wrong_guesses_by_others(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana, ben, cy = await world.people("ana", "ben", "cy")
    place = await world.place(ana)
    codes = [await ana.invite(place.server_id) for _ in range(2)]
    credentials = {"password": "correct horse"}
    tries: list[Callable[[str, str], Awaitable[Reply]]] = [
        lambda code, name: world.call("GET", f"/invites/{code}"),
        lambda code, name: world.call("GET", f"/invites/{code}.svg"),
        lambda code, name: world.call("POST", "/auth/guest", {"username": name, "code": code}),
        lambda code, name: world.call("POST", "/auth/register", {"username": name, "code": code} | credentials),
        lambda code, name: ben.call("POST", f"/invites/{code}"),
        lambda code, name: ana.call("DELETE", f"/invites/{code}"),
    ]
    wrong = [await tries[number % 6](f"wrong-{number}", f"wrong-{number}") for number in range(150)]
    assert [reply.code for reply in wrong[:100]] == ["NOT_FOUND"] * 100
    for number, attempt in enumerate(tries):
        assert "RATE_LIMITED" in [(await attempt("wrong", f"guest-{number}")).code for _ in range(12)]
        assert (await attempt(codes[0], f"guest-{number}")).status < 300
    assert (await world.call("POST", "/auth/register", {"username": "without"} | credentials)).status == 201
    assert (await cy.call("POST", f"/invites/{codes[1]}")).status == 201


@pytest.mark.parametrize("route", ["/auth/guest", "/auth/register"])
async def test_a_wrong_code_does_not_reveal_taken_names(world: World, route: str) -> None:
    await world.person("ana")
    password = {"password": "correct horse"} if route == "/auth/register" else {}
    bodies = [{"username": name, "code": "wrong"} | password for name in ("ana", "free")]
    taken, free = [await world.call("POST", route, body) for body in bodies]
    assert taken.code == "NOT_FOUND"
    assert taken.body == free.body


# ---- Authorization --------------------------------------------------------------------------------------------------
# Every operation is called by each kind of caller on each kind of target (their own, another user's, another server's, a
# deleted and a missing one), by each interface that offers it. The expected results follow from PERMISSIONS.

CALLERS = ["anonymous", "outsider", "member", "admin", "owner", "banned", "left", "removed", "revoked"]
RANKS = {"member": 1, "admin": 2, "owner": 3, "nobody": 9}
TARGETS = ["own", "another server's", "deleted", "missing"]


class Permission(NamedTuple):
    target_kind: str  # the kind of object that the operation names; "": none
    lowest_role: str  # that may call it; "open": anybody, "user": anybody with a token
    others_role: str = ""  # the lowest role for a target of another user; "": `lowest_role`
    exceptions: dict[tuple[str, str], str] = {}  # (caller, target) -> code  # noqa: RUF012

    @property
    def targets(self) -> list[str]:
        """The targets to try. Only messages, files and members belong to one user."""
        if not self.target_kind:
            return [""]
        return ["own", "other's", *TARGETS[1:]] if self.target_kind in ("message", "file", "member") else TARGETS


NOT_FOUND_ELSEWHERE = {(caller, "another server's"): "NOT_FOUND" for caller in ("admin", "owner")}
PERMISSIONS = {
    "register": Permission("", "open"),
    "register_guest": Permission("", "open"),
    "login": Permission("", "open"),
    "logout": Permission("", "user"),
    "change_password": Permission("", "user"),
    "authenticate": Permission("", "user"),
    "heartbeat": Permission("", "user"),
    "check_health": Permission("", "open"),
    "get_configuration": Permission("", "open"),
    "get_profile": Permission("", "user"),
    "set_status": Permission("", "user"),
    "update_profile": Permission("", "user"),
    "list_servers": Permission("", "user"),
    "create_server": Permission("", "user"),
    "start_conversation": Permission(  # with a member of the server
        "", "user", exceptions={(caller, ""): "FORBIDDEN" for caller in ("outsider", "banned", "left", "removed")}
    ),
    "add_participant": Permission("member", "nobody", "nobody"),  # see CONVERSATION_CALLS
    "get_server": Permission("server", "member"),
    "rename_server": Permission("server", "admin"),
    "delete_server": Permission("server", "owner"),
    "list_members": Permission("server", "member"),
    "list_bans": Permission("server", "admin"),
    "list_log": Permission("server", "admin"),
    "create_invite": Permission("server", "admin"),
    "list_invites": Permission("server", "admin"),
    "list_channels": Permission("server", "member"),
    "create_channel": Permission("server", "admin"),
    "list_changes": Permission("server", "member"),
    "search_messages": Permission("server", "member"),
    "join_server": Permission("server", "member"),
    "leave_server": Permission("server", "member"),
    "set_role": Permission(
        "member", "nobody", "owner", NOT_FOUND_ELSEWHERE | {("admin", "another server's"): "FORBIDDEN NOT_FOUND"}
    ),
    "remove_member": Permission("member", "member", "admin", NOT_FOUND_ELSEWHERE | {("owner", "own"): "FORBIDDEN"}),
    "ban": Permission("member", "nobody", "admin", NOT_FOUND_ELSEWHERE),
    "create_link": Permission("member", "nobody", "admin", NOT_FOUND_ELSEWHERE),
    "use_link": Permission("", "open"),
    "remove_guests": Permission("server", "admin"),
    "mute": Permission("member", "nobody", "admin", NOT_FOUND_ELSEWHERE),
    "unmute": Permission("member", "nobody", "admin", NOT_FOUND_ELSEWHERE),
    "raise_hand": Permission("server", "member"),
    "lower_hand": Permission("server", "member"),
    "unban": Permission("member", "nobody", "admin", NOT_FOUND_ELSEWHERE),
    "get_invite": Permission("invite", "open"),
    "accept_invite": Permission("invite", "user", exceptions={("banned", "own"): "FORBIDDEN"}),
    "revoke_invite": Permission("invite", "admin"),
    "edit_channel": Permission("channel", "admin"),
    "delete_channel": Permission("channel", "admin"),
    "clear_channel": Permission("channel", "admin"),
    "get_transcript": Permission("channel", "admin"),
    "list_pins": Permission("channel", "member"),
    "list_messages": Permission("channel", "member"),
    "post_message": Permission("channel", "member"),
    "upload_file": Permission("channel", "member"),
    "read_file": Permission("file", "member"),
    "create_file_link": Permission("file", "member"),
    "get_read": Permission("channel", "member"),
    "list_reads": Permission("", "user"),
    "mark_read": Permission("channel", "member"),
    "typing_start": Permission("channel", "member"),
    "typing_stop": Permission("channel", "member"),
    "voice_join": Permission("channel", "member"),
    "voice_leave": Permission("channel", "member"),
    "voice_signal": Permission("channel", "member"),
    "get_message": Permission("message", "member"),
    "edit_message": Permission("message", "member", "nobody"),
    "remove_message": Permission("message", "member", "admin"),
    "pin_message": Permission("message", "admin"),
    "unpin_message": Permission("message", "admin"),
    "add_reaction": Permission("message", "member"),
    "remove_reaction": Permission("message", "member"),
}


def expectation(permission: Permission, caller: str, target: str) -> str:
    """Return the expected code, "" for success, or several codes of which any is correct."""
    if permission.lowest_role != "open" and caller in ("anonymous", "revoked"):
        return "UNAUTHORIZED"
    if (caller, target) in permission.exceptions:
        return permission.exceptions[caller, target]
    rank = RANKS.get(caller, 0)
    lowest_role = permission.others_role if permission.others_role and target != "own" else permission.lowest_role
    if target in ("deleted", "missing"):
        if permission.target_kind != "member":
            return "NOT_FOUND"
        return "FORBIDDEN" if not rank else "NOT_FOUND" if rank >= RANKS[lowest_role] else "FORBIDDEN NOT_FOUND"
    if lowest_role in ("open", "user"):
        return ""
    if target == "another server's" or not rank:
        return "FORBIDDEN"
    return "" if rank >= RANKS[lowest_role] else "FORBIDDEN"


class Setup(NamedTuple):
    """The caller and the arguments of one case, which has a server of its own."""

    token: str | None
    args: dict[str, Any]
    server_id: int  # the server of the case


class PermissionMatrix:
    """Prepares the cases, and holds the other server, which all of them share and none changes."""

    def __init__(self, world: World) -> None:
        self.world, self.chat = world, world.chat
        self.names = itertools.count()

    async def open(self) -> PermissionMatrix:
        self.outsider = await self.world.person("keeper")
        self.outside = await self.world.place(self.outsider, name="another")
        self.outside_invite = await self.chat.create_invite(author_id=self.outsider.user_id, server_id=self.outside.server_id)
        self.outside_message = await self.post(self.outsider.user_id, self.outside.channel_id, chatrtc.OPERATIONS["read_file"])
        self.outside_voice = await self.chat.create_channel(
            author_id=self.outsider.user_id, server_id=self.outside.server_id, name="talk", kind="voice"
        )
        return self

    async def post(self, author_id: int, channel_id: int, op: chatrtc.Operation) -> Any:
        """Post a message, with a file if the operation is about files."""
        at, files = {"author_id": author_id, "channel_id": channel_id}, []
        if PERMISSIONS[op.name].target_kind == "file":
            files = [(await self.chat.upload_file(**at, name="hello.txt", data=b"hello")).file_id]
        return await self.chat.post_message(**at, content="hello", files=files)

    def name(self) -> str:
        return f"n{next(self.names)}"

    async def user(self) -> Person:
        """Return a new account. It has no password, because hashing one takes time."""
        name, now = self.name(), time.time()
        store = self.chat.hub.store
        done = await store.write(lambda db: chatrtc.Result(chatrtc.insert_user(db, name, None, "2026-01-01T00:00:00Z")))
        return Person(self.world, name, done.value, self.chat.hub.signer.issue(done.value, name, 0, now).token)

    async def set_up(self, op: chatrtc.Operation, caller: str, target: str) -> Setup:
        chat = self.chat
        owner, other = await self.user(), await self.user()
        user = owner if caller == "owner" else await self.user()
        server = await chat.create_server(author_id=owner.user_id, name="place")
        place = {"author_id": owner.user_id, "server_id": server.server_id}
        invite = await chat.create_invite(**place)
        await chat.accept_invite(author_id=other.user_id, code=invite.code)
        channel_id = server.channels[0].channel_id
        if op.name.startswith("voice"):
            channel_id = (await chat.create_channel(**place, name="talk", kind="voice")).channel_id
        message = await self.post(other.user_id, channel_id, op)
        if caller not in ("anonymous", "outsider", "owner"):
            await chat.accept_invite(author_id=user.user_id, code=invite.code)
        own_message = message
        if caller not in ("anonymous", "outsider"):
            own_message = await self.post(user.user_id, channel_id, op)
        match caller:
            case "admin":
                await chat.set_role(**place, user_id=user.user_id, role="admin")
            case "banned":
                await chat.ban(**place, user_id=user.user_id)
            case "left":
                await chat.remove_member(author_id=user.user_id, server_id=server.server_id, user_id=user.user_id)
            case "removed":
                await chat.remove_member(**place, user_id=user.user_id)
            case "revoked":
                reply = await self.world.call("POST", "/auth/logout", token=user.token)
                assert reply.status == 204
        ids = {"server_id": server.server_id, "channel_id": channel_id, "code": invite.code} | {
            "message_id": own_message.message_id,
            "file_id": own_message.files[0].file_id if own_message.files else 0,
            "user_id": user.user_id,
            "user_ids": [other.user_id if user is owner else owner.user_id],
        }
        target_kind = PERMISSIONS[op.name].target_kind
        if target_kind:
            key = {"invite": "code", "member": "user_id"}.get(target_kind, f"{target_kind}_id")
            ids[key] = await self.target_id(op, target_kind, target, ids[key], owner, other, place, channel_id, message)
        if op.name == "use_link":
            ids["code"] = (await chat.create_link(**place, user_id=other.user_id)).code
        if op.name == "unban" and target == "other's":
            await chat.ban(**place, user_id=ids["user_id"])
        return Setup(None if caller == "anonymous" else user.token, self.arguments(op, ids, user), server.server_id)

    async def target_id(
        self, op: chatrtc.Operation, target_kind: str, target: str, own: Any, owner: Person, other: Person,
        place: dict[str, Any], channel_id: int, message: Any,
    ) -> Any:  # fmt: skip
        """Return the id of the target."""
        chat, key = self.chat, f"{target_kind}_id"
        if target == "own":
            return own
        if target == "missing":
            return "missing" if target_kind == "invite" else 10**9
        if target == "other's":
            return other.user_id if target_kind == "member" else getattr(message.files[0] if message.files else message, key)
        if target == "another server's":
            voice = op.name.startswith("voice")
            return {
                "server": self.outside.server_id,
                "channel": self.outside_voice.channel_id if voice else self.outside.channel_id,
                "message": self.outside_message.message_id,
                "file": self.outside_message.files[0].file_id,
                "member": self.outsider.user_id,
                "invite": self.outside_invite.code,
            }[target_kind]
        match target_kind:  # a deleted one
            case "server":
                gone = await chat.create_server(author_id=owner.user_id, name="gone")
                await chat.delete_server(author_id=owner.user_id, server_id=gone.server_id)
                return gone.server_id
            case "channel":
                kind = "voice" if op.name.startswith("voice") else "text"
                channel = await chat.create_channel(**place, name="gone", kind=kind)
                await chat.delete_channel(author_id=owner.user_id, channel_id=channel.channel_id)
                return channel.channel_id
            case "message" | "file":
                await chat.remove_message(author_id=owner.user_id, message_id=message.message_id)
                return getattr(message.files[0] if message.files else message, key)
            case "invite":
                await chat.revoke_invite(author_id=owner.user_id, code=own)
                return own
        await chat.hub.store.write(lambda db: chatrtc.delete_user(db, other.name))
        return other.user_id

    def arguments(self, op: chatrtc.Operation, ids: dict[str, Any], user: Person) -> dict[str, Any]:
        """Return the required arguments of an operation."""
        values = ids | {
            "name": self.name(), "username": self.name(), "password": "correct horse", "new_password": "battery staple",
            "content": "hello", "emoji": "x", "role": "admin", "status": "away", "q": "hello", "token": user.token,
            "to": "nobody", "data": {"sdp": "x"},
        }  # fmt: skip
        if op.name == "login":
            values["username"] = "keeper"
        if op.name == "register_guest":
            values["code"] = self.outside_invite.code
        fields = msgspec.structs.fields(op.args)
        optional = ("token", "username", "content")
        return {field.name: values[field.name] for field in fields if field.required or field.name in optional}


async def call_route(world: World, token: str | None, op: chatrtc.Operation, args: dict[str, Any]) -> Reply:
    """Call an operation by its route, with each argument in the path, the query or the body."""
    assert op.method is not None
    assert op.path is not None
    in_path = set(re.findall(r"{(\w+)}", op.path))
    path = op.path.format(**{name: quote(str(args[name]), safe="") for name in in_path})
    rest = {name: value for name, value in args.items() if name not in in_path}
    if op.has_body:
        return await world.call(op.method, path, rest, token=token)
    return await world.call(op.method, path, token=token, params={name: str(value) for name, value in rest.items()})


def test_every_operation_has_its_row() -> None:
    missing = set(chatrtc.OPERATIONS) - set(PERMISSIONS)
    assert not missing, (
        f"add a row for {missing} to PERMISSIONS: the kind of object that it is about, and the lowest role that may call it"
    )
    assert set(PERMISSIONS) <= set(chatrtc.OPERATIONS), "PERMISSIONS names operations that do not exist"


EVENTS_WITHOUT_SEQ = {  # events of which a client that missed them needs nothing, with the reason
    "channel:read": "read marks belong to one user, whose client reads them after a reconnect",
    "mention": "carries the message with its number",
    "user:typing": "presence", "typing_stop": "presence", "user:connected": "presence", "user:disconnected": "presence",
    "user:status": "presence", "voice:join": "presence", "voice:leave": "presence", "voice:signal": "presence",
    "hand:raised": "join_server lists the raised hands", "hand:lowered": "join_server lists the raised hands",
    "server:deleted": "the sequence ends with its server", "error": "a reply",
    "server:joined": "clients list their servers after a reconnect",
}  # fmt: skip
OPERATIONS_WITHOUT_LIMIT = {  # operations for which the general limit of requests and events is enough, with the reason
    "set_status": "a change of one row", "logout": "ends with its token", "mark_read": "a change of one row",
    "delete_server": "the owner", "set_role": "the owner", "ban": "admins", "unban": "admins",
    "mute": "admins", "unmute": "admins",
    "edit_channel": "admins", "delete_channel": "admins", "clear_channel": "admins",
    "remove_member": "coming back is limited",
    "remove_message": "posting is limited",
    "read_file": "changes nothing", "create_file_link": "changes nothing",
    "change_password": "limits itself", "register": "limits itself", "register_guest": "limits itself",
    "login": "limits itself", "use_link": "limits itself",
    "get_transcript": "changes nothing", "search_messages": "changes nothing", "check_health": "changes nothing",
    "get_configuration": "changes nothing",
    "authenticate": "changes nothing", "heartbeat": "changes nothing", "join_server": "presence", "leave_server": "presence",
    "voice_join": "presence", "voice_leave": "presence",
}  # fmt: skip


OPERATIONS_WITHOUT_SEQ = {  # writing operations that take no sequence number, with the reason
    "create_server": "its first number is 1", "delete_server": "the sequence ends with its server",
    "set_status": "presence", "mark_read": "read marks are of one user", "create_invite": "invites are listed on request",
    "revoke_invite": "invites are listed on request", "create_link": "a sign-in code", "use_link": "a sign-in code",
    "unban": "bans are listed on request", "logout": "tokens", "change_password": "tokens", "login": "tokens",
    "authenticate": "tokens", "check_health": "changes nothing", "get_configuration": "changes nothing",
    "upload_file": "the message to which it is attached does", "read_file": "changes nothing",
    "create_file_link": "changes nothing",
    "heartbeat": "changes nothing", "search_messages": "changes nothing", "get_transcript": "changes nothing",
    "join_server": "presence",
    "leave_server": "presence", "typing_start": "presence", "typing_stop": "presence", "voice_join": "presence",
    "voice_leave": "presence", "voice_signal": "presence", "raise_hand": "presence", "lower_hand": "presence",
}  # fmt: skip


def has_seq(event: str) -> bool:
    return "seq" in chatrtc.EVENTS[event].payload.__struct_fields__ and event != "mention"


def test_an_event_carries_seq_unless_nothing_durable_happened() -> None:
    applied = inspect.getsource(Replica.apply)
    for event in chatrtc.EVENTS:
        assert has_seq(event) != (event in EVENTS_WITHOUT_SEQ), (
            f"{event}: if the change is durable, take a number by next_seq() in the transaction and emit it as `seq`; "
            "if not, add it to EVENTS_WITHOUT_SEQ with the reason"
        )
        assert event in EVENTS_WITHOUT_SEQ or f'"{event}"' in applied, f"{event}: add its effect to Replica.apply"


def test_every_writing_operation_takes_a_sequence_number() -> None:
    for op in chatrtc.OPERATIONS.values():
        in_sequence = any(has_seq(event) for event in op.emits)
        assert op.kind == "read" or in_sequence != (op.name in OPERATIONS_WITHOUT_SEQ), (
            f"{op.name}: a client that was away must learn of the change. Take a number by next_seq() in the transaction, "
            "emit an event that carries it as `seq`, and name the event in `emits`. If no other client sees the change, "
            "add the operation to OPERATIONS_WITHOUT_SEQ with the reason"
        )
    assert set(OPERATIONS_WITHOUT_SEQ) <= set(chatrtc.OPERATIONS)


def test_every_writing_operation_has_a_rate_limit() -> None:
    for op in chatrtc.OPERATIONS.values():
        assert op.kind == "read" or op.limit or op.name in OPERATIONS_WITHOUT_LIMIT, (
            f"{op.name}: declare a `limit` of LIMITS. If the general limit of requests is enough, add the operation to "
            "OPERATIONS_WITHOUT_LIMIT with the reason"
        )
    assert set(OPERATIONS_WITHOUT_LIMIT) <= set(chatrtc.OPERATIONS)


async def test_a_durable_operation_takes_a_number_that_its_event_carries(world: World) -> None:
    matrix, chat = await PermissionMatrix(world).open(), world.chat.hub
    emitted: list[chatrtc.Emit] = []
    apply_effects = chat.store._publish

    def listen(effects: Sequence[chatrtc.Effect], foreign: bool) -> None:
        emitted.extend(effect for effect in effects if isinstance(effect, chatrtc.Emit) and has_seq(effect.event))
        apply_effects(effects, foreign)

    chat.store._publish = listen

    def last(server_id: int) -> int:
        return chat.store.read_inline(chatrtc.load_seq, server_id)

    for op in chatrtc.OPERATIONS.values():
        if op.kind != "write" or op.path is None or op.name in ("delete_server", "create_server", "start_conversation"):
            continue  # the sequence begins or ends with these
        if op.name == "add_participant":
            continue  # not in ordinary servers; see test_a_conversation_takes_sequence_numbers
        permission, durable = PERMISSIONS[op.name], {event for event in op.emits if has_seq(event)}
        order = ["outsider"] if op.name == "accept_invite" else ["owner", "member"]
        callers = [(caller, target) for caller in order for target in ("other's", "own", "")]
        caller, target = next(one for one in callers if one[1] in permission.targets and not expectation(permission, *one))
        setup = await matrix.set_up(op, caller, target)
        newest = chat.store.read_inline(lambda db: int(db.execute("SELECT max(server_id) FROM servers").fetchone()[0]))
        if op.name == "update_profile":
            setup.args["name"] = "A new name"
        if op.name == "remove_reaction":
            await call_route(world, setup.token, chatrtc.OPERATIONS["add_reaction"], setup.args)
        if op.name == "unmute":
            await call_route(world, setup.token, chatrtc.OPERATIONS["mute"], setup.args)
        if op.name == "unpin_message":
            await call_route(world, setup.token, chatrtc.OPERATIONS["pin_message"], setup.args)
        before = last(newest)
        emitted.clear()
        reply = await call_route(world, setup.token, op, setup.args)
        assert reply.status < 300, (op.name, reply)
        numbers = [emit.payload.seq for emit in emitted]  # type: ignore[attr-defined]
        assert {emit.event for emit in emitted} <= durable, op.name
        assert numbers == list(range(before + 1, last(newest) + 1)), (
            f"{op.name}: take each number by next_seq() in its transaction and emit it as `seq` of one event"
        )
        assert bool(numbers) == bool(durable), f"{op.name} emits {durable}, and should take a number"


async def test_a_conversation_takes_sequence_numbers(world: World) -> None:
    chat, (ana, ben, cy, dee) = world.chat, await world.people("ana", "ben", "cy", "dee")
    await world.place(ana, ben, cy, dee)
    group = await chat.start_conversation(author_id=ana.user_id, user_ids=[ben.user_id, cy.user_id])
    path = f"/servers/{group.server_id}"
    seq = (await ana.ok("GET", f"{path}/changes"))["seq"]
    assert seq == 4, "three members and a channel"
    socket = await ana.socket(group.server_id)
    calls = [
        (ana, "PUT", f"{path}/members/{dee.user_id}", None, "member:joined"),
        (ben, "PATCH", path, {"name": "four"}, "server:updated"),
        (dee, "DELETE", f"{path}/members/{dee.user_id}", None, "member:left"),
        (dee, "PUT", f"{path}/members/{dee.user_id}", None, "member:joined"),
        (dee, "PUT", f"{path}/members/{dee.user_id}", None, ""),
    ]
    for person, method, route, body, event in calls:
        assert (await person.call(method, route, body)).status < 300
        if event:
            seq += 1
            assert (await socket.receive(event))["seq"] == seq
    assert (await ana.ok("GET", f"{path}/changes"))["seq"] == seq


def cases(interface: str) -> list[tuple[chatrtc.Operation, str, str]]:
    return [
        (op, caller, target)
        for op in chatrtc.OPERATIONS.values()
        if (op.path if interface == "rest" else op.event)
        for caller in CALLERS
        for target in PERMISSIONS[op.name].targets
    ]


@pytest.mark.portable
@pytest.mark.parametrize("interface", ["rest", "socket"])
async def test_permissions_match_the_table(make_world: MakeWorld, interface: str) -> None:
    world = await make_world(create_servers="everyone")  # the accounts of this test have no password, like guests
    matrix, gate = await PermissionMatrix(world).open(), asyncio.Semaphore(24)
    wrong: list[str] = []
    outcomes: set[tuple[str, str]] = set()

    async def call_event(setup: Setup, op: chatrtc.Operation, caller: str) -> str:
        token = None if caller == "revoked" else setup.token
        socket = await world.socket(token, transports=["websocket"])
        try:
            if caller == "revoked" and op.name != "authenticate":
                assert (await socket.call("authenticate", {"token": setup.token}))["code"] == "UNAUTHORIZED"
            if PERMISSIONS[op.name].target_kind == "channel" or op.name == "raise_hand":  # they need a joined socket
                await socket.call("join_server", {"server_id": setup.server_id})
            if op.name == "voice_signal":
                ack = await socket.call("voice:join", {"channel_id": setup.args["channel_id"]})
                setup.args["to"] = ack.get("peer_id", "nobody")
            args = setup.args if setup.token or op.name != "authenticate" else {"token": "none"}
            return str((await socket.call(op.event or "", *([args] if args else []))).get("code", ""))
        finally:
            await socket.close()

    async def try_case(op: chatrtc.Operation, caller: str, target: str) -> None:
        async with gate:
            setup = await matrix.set_up(op, caller, target)
            if interface == "rest":
                code = (await call_route(world, setup.token, op, setup.args)).code
            else:
                code = await call_event(setup, op, caller)
        expected = expectation(PERMISSIONS[op.name], caller, target)
        outcomes.add((op.name, code))
        if code not in (expected.split() or [""]):
            wrong.append(f"{op.name}, {caller}, {target or 'nothing'}: {code or 'done'}, expected {expected or 'done'}")

    await asyncio.gather(*(try_case(*cell) for cell in cases(interface)))
    assert not wrong, "\n".join(sorted(wrong))
    for op, _, _ in cases(interface):  # each succeeded at least once, and failed at least once unless it is open
        assert op.name == "add_participant" or (op.name, "") in outcomes
        assert PERMISSIONS[op.name].lowest_role == "open" or any(name == op.name and code for name, code in outcomes)


class ConversationMatrix(PermissionMatrix):
    """Prepares the cases in conversations: each has a group of its own, whose participants share a server."""

    async def set_up(self, op: chatrtc.Operation, caller: str, target: str) -> Setup:
        chat, (teacher, other, third, user) = self.chat, [await self.user() for _ in range(4)]
        shared = await chat.create_server(author_id=teacher.user_id, name="place")
        invite = await chat.create_invite(author_id=teacher.user_id, server_id=shared.server_id)
        for person in (other, third, user):
            await chat.accept_invite(author_id=person.user_id, code=invite.code)
        user = teacher if caller == "owner of the server" else user
        others = [third.user_id, *([user.user_id] if caller in ("participant", "left") else [])]
        fourth = await self.user()
        await chat.accept_invite(author_id=fourth.user_id, code=invite.code)
        group = await chat.start_conversation(author_id=other.user_id, user_ids=[fourth.user_id, *others])
        channel_id = group.channels[0].channel_id
        message = own = await chat.post_message(author_id=other.user_id, channel_id=channel_id, content="hello")
        if caller in ("participant", "left"):
            own = await chat.post_message(author_id=user.user_id, channel_id=channel_id, content="hello")
        if caller == "left":
            await chat.remove_member(author_id=user.user_id, server_id=group.server_id, user_id=user.user_id)
        ids = {
            "server_id": group.server_id, "channel_id": channel_id,
            "message_id": (own if target == "own" else message).message_id,
            "user_id": (user if target == "own" else other).user_id,
        }  # fmt: skip
        return Setup(user.token, self.arguments(op, ids, user), group.server_id)


def expected_in_conversation(op: chatrtc.Operation, caller: str, target: str) -> str:
    """Return the expected code for a call in a conversation."""
    if caller != "participant":
        return "" if (op.name, caller, target) == ("add_participant", "left", "own") else "FORBIDDEN"
    permission = PERMISSIONS[op.name]
    lowest_role = permission.others_role if permission.others_role and target == "other's" else permission.lowest_role
    return "" if lowest_role == "member" or op.name in ("rename_server", "add_participant") else "FORBIDDEN"


@pytest.mark.portable
@pytest.mark.parametrize("interface", ["rest", "socket"])
async def test_permissions_in_conversations_match_the_table(make_world: MakeWorld, interface: str) -> None:
    world = await make_world(create_servers="everyone")
    matrix, gate = ConversationMatrix(world), asyncio.Semaphore(24)
    wrong: list[str] = []
    outcomes: set[tuple[str, str]] = set()

    async def try_case(op: chatrtc.Operation, caller: str, target: str) -> None:
        async with gate:
            setup = await matrix.set_up(op, caller, target)
            if interface == "rest":
                code = (await call_route(world, setup.token, op, setup.args)).code
            else:
                socket = await world.socket(setup.token, transports=["websocket"])
                await socket.call("join_server", {"server_id": setup.server_id})
                code = str((await socket.call(op.event or "", setup.args)).get("code", ""))
                await socket.close()
        outcomes.add((op.name, code))
        if code != expected_in_conversation(op, caller, target):
            wrong.append(f"{op.name}, {caller}, {target}: {code or 'done'}")

    tried = [
        (op, caller, target)
        for op in chatrtc.OPERATIONS.values()
        if (op.path if interface == "rest" else op.event) and not op.name.startswith("voice")
        if PERMISSIONS[op.name].target_kind in ("server", "channel", "message", "member")
        for caller in ("participant", "left", "outsider", "owner of the server")
        for target in ("own", "other's")
        if target == "own" or PERMISSIONS[op.name].target_kind in ("message", "member")
    ]
    await asyncio.gather(*(try_case(*case) for case in tried))
    assert not wrong, "\n".join(sorted(wrong))
    assert all((op.name, "FORBIDDEN") in outcomes for op, _, _ in tried)


class Talk(NamedTuple):
    """A conversation, in which each of two people has a socket and a message."""

    server_id: int
    channel_id: int
    people: tuple[Person, Person]
    sockets: tuple[Socket, Socket]
    messages: tuple[Any, Any]


async def start_talk(world: World, one: Person, other: Person, *more: Person) -> Talk:
    """Start a conversation by the program, which no setting restricts."""
    chat = world.chat
    group = await chat.start_conversation(author_id=one.user_id, user_ids=[person.user_id for person in (other, *more)])
    channel_id = group.channels[0].channel_id
    messages = [
        msgspec.to_builtins(await chat.post_message(author_id=person.user_id, channel_id=channel_id, content="hello word"))
        for person in (one, other)
    ]
    await chat.add_reaction(author_id=one.user_id, message_id=messages[0]["message_id"], emoji="x")
    sockets = [await person.socket(group.server_id) for person in (one, other)]
    return Talk(group.server_id, channel_id, (one, other), (sockets[0], sockets[1]), (messages[0], messages[1]))


# Every way to write in a conversation: the operation, and its route or event with the body.
WRITES: list[tuple[str, str, str, Any]] = [
    ("post_message", "POST", "/messages", {"channel_id": 0, "content": "hello"}),
    ("post_message", "emit", "message:send", {"channel_id": 0, "content": "hello"}),
    ("upload_file", "upload", "/channels/{channel_id}/files?name=a.txt", None),
    ("edit_message", "PATCH", "/messages/{message_id}", {"content": "better"}),
    ("edit_message", "emit", "message:edit", {"message_id": 0, "content": "better"}),
    ("add_reaction", "PUT", "/messages/{message_id}/reactions/y", None),
    ("add_reaction", "emit", "reaction:add", {"message_id": 0, "emoji": "z"}),
    ("remove_reaction", "DELETE", "/messages/{message_id}/reactions/x", None),
    ("remove_reaction", "emit", "reaction:remove", {"message_id": 0, "emoji": "x"}),
    ("typing_start", "emit", "typing_start", {"channel_id": 0}),
    ("rename_server", "PATCH", "/servers/{server_id}", {"name": "us"}),
]
READS = [
    "/servers/{server_id}", "/servers/{server_id}/members", "/servers/{server_id}/changes", "/channels/{channel_id}/messages",
    "/servers/{server_id}/search?q=word", "/messages/{message_id}", "/channels/{channel_id}/read",
]  # fmt: skip


async def try_writes(talk: Talk, reason: str, who: int = 0) -> None:
    """Check that each way to write is refused for this reason, without an effect, or works if `reason` is empty."""
    person, socket, message = talk.people[who], talk.sockets[who], talk.messages[who]
    ids = {"server_id": talk.server_id, "channel_id": talk.channel_id, "message_id": message["message_id"]}
    before = await person.ok("GET", f"/servers/{talk.server_id}/changes")
    for name, method, path, body in WRITES:
        given = body if body is None else {key: ids.get(key, value) for key, value in body.items()}
        if method == "emit":
            answer = await socket.call(path, given)
            assert (answer["success"], answer.get("reason", "")) == (not reason, reason), (name, path, answer)
        else:
            options = {"data": b"text"} if method == "upload" else {}
            reply = await person.call("POST" if options else method, path.format(**ids), given, **options)
            assert (reply.code, (reply.body or {}).get("reason", "")) == ("FORBIDDEN" if reason else "", reason), (name, reply)
    for path in READS:
        await person.ok("GET", path.format(**ids))
    await person.ok("PUT", f"/channels/{talk.channel_id}/read", {"message_id": talk.messages[1]["message_id"]})
    await socket.ok("join_server", {"server_id": talk.server_id, "after": 0})
    await socket.ok("typing_stop", {"channel_id": talk.channel_id})
    after = await person.ok("GET", f"/servers/{talk.server_id}/changes")
    assert (after["seq"] == before["seq"]) == bool(reason)


def test_every_way_to_write_is_tried() -> None:
    writing = {chatrtc.Access.WRITER, chatrtc.Access.AUTHOR, chatrtc.Access.RENAMER}
    writes = {op.name for op in chatrtc.OPERATIONS.values() if op.access in writing}
    assert {name for name, *_ in WRITES} == writes, "add the call to WRITES"


@pytest.mark.portable
async def test_a_conversation_that_somebody_left_can_only_be_read(world: World) -> None:
    ana, ben, cy = await world.people("ana", "ben", "cy")
    await world.place(ana, ben, cy)
    talk, group = await start_talk(world, ana, ben), await start_talk(world, ana, ben, cy)
    await try_writes(talk, "")
    await ben.ok("DELETE", f"/servers/{talk.server_id}/members/{ben.user_id}")
    await try_writes(talk, "LEFT")
    await ana.ok("DELETE", f"/messages/{talk.messages[0]['message_id']}")
    await ben.ok("DELETE", f"/servers/{group.server_id}/members/{ben.user_id}")
    await try_writes(group, "")


@pytest.mark.portable
@pytest.mark.parametrize(("setting", "reason"), [("staff", "CONVERSATIONS_STAFF"), ("nobody", "CONVERSATIONS_OFF")])
async def test_the_setting_restricts_every_way_to_write(make_world: MakeWorld, setting: str, reason: str) -> None:
    world = await make_world(conversations=setting)
    assert (await world.call("GET", "/config")).body["conversations"] == setting
    teacher, ana, ben, cy = await world.people("teacher", "ana", "ben", "cy")
    await world.place(teacher, ana, ben, cy)
    talk = await start_talk(world, ana, ben)  # by the program, which may
    await try_writes(talk, reason)
    await try_writes(await start_talk(world, ana, ben, cy), reason)
    with_teacher, class_talk = await start_talk(world, ana, teacher), await start_talk(world, ana, ben, teacher)
    for one in (with_teacher, class_talk):
        for who in (0, 1):
            await try_writes(one, "" if setting == "staff" else reason, who)
    await ana.ok("DELETE", f"/messages/{talk.messages[0]['message_id']}")
    await ana.ok("DELETE", f"/servers/{talk.server_id}/members/{ana.user_id}")
    await ana.ok("PUT", f"/servers/{talk.server_id}/members/{ana.user_id}")
    starts = {(ben,): reason, (ben, cy): reason, (teacher,): "", (ben, teacher): ""}
    for others, expected in starts.items():
        expected = reason if setting == "nobody" else expected
        reply = await ana.call("POST", "/conversations", {"user_ids": [person.user_id for person in others]})
        assert (reply.code, reply.body.get("reason", "")) == ("FORBIDDEN" if expected else "", expected), others
    reply = await teacher.call("POST", "/conversations", {"user_ids": [ana.user_id]})
    assert reply.status == (403 if setting == "nobody" else 200)
    add = await ana.call("PUT", f"/servers/{class_talk.server_id}/members/{cy.user_id}")
    assert (add.code, add.status) == (("FORBIDDEN", 403) if setting == "nobody" else ("", 204))


@pytest.mark.portable
async def test_conversations_with_staff_follow_the_roles(make_world: MakeWorld) -> None:
    """The role counts in a server that all participants share, and counts at once."""
    world = await make_world(conversations="staff")
    owner, teacher, ana, ben, far = await world.people("owner", "teacher", "ana", "ben", "far")
    place = await world.place(owner, teacher, ana, ben)
    role = f"/servers/{place.server_id}/members/{teacher.user_id}"
    await owner.ok("PATCH", role, {"role": "admin"})
    pair = await ana.call("POST", "/conversations", {"user_ids": [teacher.user_id]})
    assert pair.status == 201
    talk, group = await start_talk(world, ana, teacher), await start_talk(world, ana, ben, teacher)
    assert talk.server_id == pair.body["server_id"]
    await try_writes(talk, "")
    await ana.ok("PATCH", f"/messages/{talk.messages[0]['message_id']}", {"content": "hello word"})
    await talk.sockets[0].ok("typing_start", {"channel_id": talk.channel_id})
    await owner.ok("PATCH", role, {"role": "member"})
    await talk.sockets[1].ok("ping")
    announced, ack = talk.sockets[1].names().count("user:typing"), {"success": True, "reason": ""}
    while ack["success"]:  # at the latest when the next `user:typing` would be emitted
        ack = await talk.sockets[0].call("typing_start", {"channel_id": talk.channel_id})
    assert ack["reason"] == "CONVERSATIONS_STAFF"
    await talk.sockets[1].ok("ping")
    assert talk.sockets[1].names().count("user:typing") == announced
    for one in (talk, group):
        for who in (0, 1):
            await try_writes(one, "CONVERSATIONS_STAFF", who)
    reply = await ana.call("POST", "/conversations", {"user_ids": [teacher.user_id]})
    assert reply.body["reason"] == "CONVERSATIONS_STAFF"
    await owner.ok("PATCH", role, {"role": "admin"})
    await try_writes(group, "")
    await teacher.ok("DELETE", f"/servers/{group.server_id}/members/{teacher.user_id}")
    await try_writes(group, "CONVERSATIONS_STAFF", 1)
    await teacher.ok("PUT", f"/servers/{group.server_id}/members/{teacher.user_id}")
    await try_writes(group, "", 1)
    # Eve shares with the others only a server in which nobody of the conversation is staff.
    other = await world.place(far, teacher, ana, ben, name="other")
    eve = await world.person("eve")
    await eve.ok("POST", f"/invites/{await far.invite(other.server_id)}")
    add = await ana.call("PUT", f"/servers/{group.server_id}/members/{eve.user_id}")
    assert (add.code, add.body["reason"]) == ("FORBIDDEN", "CONVERSATIONS_STAFF")
    await teacher.ok("DELETE", role)
    await try_writes(talk, "CONVERSATIONS_STAFF")


async def test_a_changed_setting_holds_for_older_conversations(tmp_path: Path) -> None:
    servers: dict[str, Any] = {}
    for setting in ("everyone", "staff", "nobody", "everyone"):
        process = await Process.start(tmp_path / "chat.db", "--conversations", setting)
        async with process.world() as world:
            if not servers:
                people = await world.people("teacher", "ana", "ben")
                await world.place(*people)
            teacher, ana, ben = (Person(world, person.name, person.user_id, person.token) for person in people)
            for names, others in {"pupils": [ben], "teacher": [teacher], "group": [ben, teacher]}.items():
                allowed = setting == "everyone" or (setting == "staff" and names != "pupils")
                if names not in servers:
                    ids = [person.user_id for person in others]
                    servers[names] = await ana.ok("POST", "/conversations", {"user_ids": ids})
                channel_id = servers[names]["channels"][0]["channel_id"]
                reply = await ana.call("POST", "/messages", {"channel_id": channel_id, "content": setting})
                assert reply.status == (201 if allowed else 403), (setting, names, reply)
                assert len((await ana.ok("GET", f"/channels/{channel_id}/messages"))["messages"]) >= 1
        assert (await process.stop())[0] == 0


# Rules: what a mute and the rules of a channel refuse. Each way to say something, with the message that it is about.


class Speaker(NamedTuple):
    """Somebody who tries to speak: their socket, the channels, and their own message with their own reaction."""

    person: Person
    socket: Socket
    place: Place
    voice: int
    message_id: int
    emoji: str

    async def say(self, way: str) -> str:
        """Say something and return the reason for which it is refused, or an empty string."""
        message, text = {"message_id": self.message_id}, {"channel_id": self.place.channel_id}
        path, reaction = f"/messages/{self.message_id}", {"emoji": f"{self.emoji}{way}"}
        match way:
            case "post":
                return await self.request("POST", "/messages", text | {"content": "hello"})
            case "message:send":
                return await self.emit(way, text | {"content": "hello"})
            case "edit":
                return await self.request("PATCH", path, {"content": "better"})
            case "message:edit":
                return await self.emit(way, message | {"content": "better"})
            case "react":
                return await self.request("PUT", f"{path}/reactions/{reaction['emoji']}")
            case "reaction:add":
                return await self.emit(way, message | reaction)
            case "typing_start":
                return await self.emit(way, text)
            case "voice:join" | "voice:signal":
                return await self.emit(way, {"channel_id": self.voice, **({"to": "x", "data": 1} if "sig" in way else {})})
            case "file":
                return await self.request("POST", f"/channels/{self.place.channel_id}/files?name=a.txt", data=b"text")
            case "remove reaction":
                return await self.request("DELETE", f"{path}/reactions/{self.emoji}")
            case "delete":
                return await self.request("DELETE", path)
            case "read":
                return await self.request("GET", f"/channels/{self.place.channel_id}/messages")
            case "typing_stop" | "voice:leave":
                return await self.emit(way, {"channel_id": self.voice})
            case "hand:raise":
                return await self.emit(way, {"server_id": self.place.server_id})
        pytest.fail(way)

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> str:
        reply = await self.person.call(method, path, body, **options)
        if reply.status == 429:
            assert 1 <= int(reply.headers["Retry-After"]) == reply.body["retry_after"] <= 21_600
        return str(reply.body["reason"]) if reply.status >= 400 else ""

    async def emit(self, event: str, payload: Any) -> str:
        return str((await self.socket.call(event, payload)).get("reason", ""))


SAY_POST = ("post", "message:send")
SAY_EDIT = ("edit", "message:edit")
SAY_REACT = ("react", "reaction:add")
SAY_LIVE = ("typing_start", "voice:join", "voice:signal")
ALWAYS_ALLOWED = ("remove reaction", "read", "typing_stop", "voice:leave", "hand:raise", "delete")
WAYS = (*SAY_POST, *SAY_EDIT, *SAY_REACT, "file", *SAY_LIVE, *ALWAYS_ALLOWED)
RULES: dict[str, dict[str, tuple[str, ...]]] = {  # rule -> reason -> what it refuses
    "none": {},
    "read-only": {"READ_ONLY": (*SAY_POST, *SAY_EDIT, "file", *SAY_LIVE)},
    "slow": {"SLOW_MODE": SAY_POST},
    "muted": {"MUTED": (*SAY_POST, *SAY_EDIT, *SAY_REACT, "file", *SAY_LIVE)},
    "muted, read-only and slow": {"MUTED": (*SAY_POST, *SAY_EDIT, *SAY_REACT, "file", *SAY_LIVE)},
    "read-only and slow": {"READ_ONLY": (*SAY_POST, *SAY_EDIT, "file", *SAY_LIVE)},
    "lifted": {},
}
SPEAKERS = ("owner", "admin", "member", "guest")


async def make_speaker(scene: Scene, role: str) -> Speaker:
    """Return a member of that role who has posted a message and reacted to it."""
    place, person = scene.place, {"owner": scene.ana, "admin": scene.ben, "member": scene.cy}.get(role)
    if role == "admin":
        await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "admin"})
    if person is None:
        account = await scene.world.call(
            "POST", "/auth/guest", {"name": "Gus", "code": await scene.ana.invite(place.server_id)}
        )
        person = Person(scene.world, "Gus", account.body["user_id"], account.body["token"])
    voice = await scene.ana.channel(place.server_id, "talk", "voice")
    message_id = (await person.post(place.channel_id))["message_id"]
    await person.ok("PUT", f"/messages/{message_id}/reactions/x")
    return Speaker(person, await person.socket(place.server_id), place, voice, message_id, "x")


async def set_rules(scene: Scene, rule: str, speaker: Speaker) -> None:
    """Set the rules in both channels, and mute the speaker, if the rule says so. What was lifted had been set."""
    is_lifted = rule == "lifted"
    posting = {"posting": "staff"} if "read-only" in rule or is_lifted else {}
    slow = {"slow_seconds": 21_600} if "slow" in rule or is_lifted else {}
    for rules in [posting | slow, *([{"posting": "everyone", "slow_seconds": 0}] if is_lifted else [])]:
        for channel_id in (speaker.place.channel_id, speaker.voice):
            await scene.ana.ok("PATCH", f"/channels/{channel_id}", rules)
    mute = f"{scene.server}/members/{speaker.person.user_id}/mute"
    if "muted" in rule or is_lifted:
        await scene.ana.ok("PUT", mute, {})
    if is_lifted:
        await scene.ana.ok("DELETE", mute)


@pytest.mark.portable
@pytest.mark.parametrize("role", SPEAKERS)
@pytest.mark.parametrize("rule", RULES)
async def test_each_rule_refuses_what_the_table_says(scene: Scene, rule: str, role: str) -> None:
    speaker = await make_speaker(scene, role)
    if role == "owner" and ("muted" in rule or rule == "lifted"):
        reply = await scene.ana.call("PUT", f"{scene.server}/members/{scene.ana.user_id}/mute", {})
        assert reply.body["reason"] == "ROLE_TOO_LOW", "nobody can mute the owner"
        return
    await set_rules(scene, rule, speaker)
    refused = {
        way: reason for reason, ways in RULES[rule].items() for way in ways if role in ("member", "guest") or reason == "MUTED"
    }
    found = {way: reason for way in WAYS if (reason := await speaker.say(way)) not in ("", "NOT_IN_VOICE", "NO_PEER")}
    assert found == refused


def test_every_way_to_speak_is_in_the_table() -> None:
    """Each operation that declares how it speaks has its route and its event among the ways that are tried."""
    tried = {
        "post": SAY_POST,
        "edit": SAY_EDIT,
        "react": SAY_REACT,
        "type": SAY_LIVE[:1],
        "talk": SAY_LIVE[1:],
        "file": ("file",),
    }
    for op in chatrtc.OPERATIONS.values():
        assert op.speaks is None or (op.event or "file") in tried[op.speaks], f"add the event of {op.name} to WAYS"
    assert {way for ways in chatrtc.REFUSED.values() for way in ways} == {*tried}


@pytest.mark.portable
async def test_slow_mode_counts_all_posts_of_a_member_in_the_channel(scene: Scene) -> None:
    """Also posts made before it was set, deleted ones, and those of other sockets; not edits, staff and other channels."""
    text, other = {"channel_id": scene.place.channel_id}, await scene.ana.channel(scene.place.server_id, "other")
    path = f"/channels/{scene.place.channel_id}"
    await scene.ana.ok("PATCH", path, {"slow_seconds": 21_600})
    assert (await scene.ben_socket.ok("message:send", text | {"content": "first", "nonce": "one"}))["content"] == "first"
    repeat = await scene.ben.call("POST", "/messages", text | {"content": "first", "nonce": "one"})
    assert (repeat.status, repeat.headers["Idempotent-Replayed"]) == (201, "true")
    await scene.ben.ok("PATCH", f"/messages/{repeat.body['message_id']}", {"content": "better"})
    await scene.ben.ok("PUT", path + "/read", {"message_id": repeat.body["message_id"], "back": True})
    await scene.ben.ok("DELETE", f"/messages/{repeat.body['message_id']}")
    second = await scene.ben.socket()
    for body in (text | {"content": "second"}, text | {"content": "second", "nonce": "two"}):
        assert (await scene.ben.call("POST", "/messages", body)).body["reason"] == "SLOW_MODE"
        ack = await second.call("message:send", body)
        assert (ack["code"], ack["reason"]) == ("RATE_LIMITED", "SLOW_MODE") and 21_500 < ack["retry_after"] <= 21_600
    await scene.ben.post(other)
    await scene.cy.post(scene.place.channel_id, "everybody waits for themselves")
    for _ in range(2):
        await scene.ana.post(scene.place.channel_id, "staff")
    code = await scene.ana.invite(scene.place.server_id)
    await scene.ben.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
    await scene.ben.ok("POST", f"/invites/{code}")
    assert (await scene.ben.call("POST", "/messages", text | {"content": "back"})).body["reason"] == "SLOW_MODE"
    program = scene.world.chat.post_message
    assert (await program(author_id=scene.ben.user_id, content="the embedding program has no limits", **text)).message_id
    await scene.ana.ok("PATCH", path, {"slow_seconds": 0})
    await scene.ben.post(scene.place.channel_id)


@pytest.mark.portable
async def test_one_of_many_posts_at_once_passes_slow_mode(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "hello"}
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"slow_seconds": 21_600})
    replies = await asyncio.gather(*(scene.ben.call("POST", "/messages", body) for _ in range(20)))
    assert sorted(reply.code for reply in replies) == ["", *["RATE_LIMITED"] * 19]
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"slow_seconds": 0})
    replies = await asyncio.gather(*(scene.ben.call("POST", "/messages", body) for _ in range(20)))
    assert {reply.code for reply in replies} == {""}


@pytest.mark.portable
async def test_slow_mode_ends_after_its_time(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "again"}
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"slow_seconds": 1})
    before = time.time()
    await scene.ben.ok("POST", "/messages", body)

    async def accepted() -> bool:
        return (await scene.ben.call("POST", "/messages", body)).status == 201

    await eventually(accepted, "the next post")
    assert time.time() - before >= 1


async def test_slow_mode_survives_a_restart(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        ana, ben = await world.people("ana", "ben")
        place = await world.place(ana, ben)
        await ben.post(place.channel_id)
        await ana.ok("PATCH", f"/channels/{place.channel_id}", {"slow_seconds": 600})
    assert (await process.stop())[0] == 0
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        reply = await at(world, ben).call("POST", "/messages", {"channel_id": place.channel_id, "content": "again"})
        assert (reply.code, reply.body["reason"]) == ("RATE_LIMITED", "SLOW_MODE")
    assert (await process.stop())[0] == 0


@pytest.mark.portable
async def test_a_repeated_post_is_not_refused(scene: Scene) -> None:
    """Its author may have been muted since, or the channel may be read-only: the post has succeeded."""
    body = {"channel_id": scene.place.channel_id, "content": "once", "nonce": "n"}
    first = await scene.ben.ok("POST", "/messages", body)
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"posting": "staff"})
    await scene.ana.ok("PUT", f"{scene.server}/members/{scene.ben.user_id}/mute", {})
    reply = await scene.ben.call("POST", "/messages", body)
    assert (reply.status, reply.body["message_id"]) == (201, first["message_id"])
    assert (await scene.ben.call("POST", "/messages", body | {"nonce": "other"})).body["reason"] == "MUTED"
    await scene.ana_socket.receive("message:new", message_id=first["message_id"])
    await scene.ana_socket.receive_none("message:new")
    talk = await scene.ben.ok("POST", "/conversations", {"user_ids": [scene.cy.user_id]})
    body["channel_id"] = talk["channels"][0]["channel_id"]
    first = await scene.ben.ok("POST", "/messages", body)
    await scene.cy.ok("DELETE", f"/servers/{talk['server_id']}/members/{scene.cy.user_id}")
    assert await scene.ben.ok("POST", "/messages", body) == first
    assert (await scene.ben.call("POST", "/messages", body | {"nonce": "other"})).body["reason"] == "LEFT"


BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({"posting": "nobody"}, "posting"), ({"posting": 1}, "posting"),
    ({"slow_seconds": -1}, "slow_seconds"), ({"slow_seconds": 21_601}, "slow_seconds"), ({"slow_seconds": 1.5}, "slow_seconds"),
    ({"slow_seconds": "9"}, "slow_seconds"), ({"slow_seconds": 10**30}, "slow_seconds"),
    ({"keep_days": 0}, "keep_days"), ({"keep_days": 36_501}, "keep_days"), ({"keep_days": "week"}, "keep_days"),
    ({"keep_days": True}, "keep_days"), ({"slow": 1}, "slow"),
]  # fmt: skip


@pytest.mark.portable
async def test_bad_rules_change_nothing(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}"
    for body, field in BAD_RULES:
        reply = await scene.ana.call("PATCH", path, {"name": "renamed"} | body)
        assert (reply.code, reply.body["field"]) == ("BAD_REQUEST", field), body
    channels = (await scene.ana.ok("GET", f"{scene.server}/channels"))["channels"]
    assert channels == [{"server_id": scene.place.server_id, "channel_id": scene.place.channel_id} | {
        "name": "general", "kind": "text", "topic": "",
    }]  # fmt: skip
    assert (await scene.ben.call("PATCH", path, {"posting": "staff"})).body["reason"] == "ROLE_TOO_LOW"


@pytest.mark.portable
async def test_rules_are_omitted_while_they_have_no_effect(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}"
    plain = (await scene.ana.ok("GET", f"{scene.server}/channels"))["channels"][0]
    assert set(plain) == {"server_id", "channel_id", "name", "kind", "topic"}
    rules = {"posting": "staff", "slow_seconds": 21_600, "keep_days": 36_500}
    assert await scene.ana.ok("PATCH", path, rules) == plain | rules
    assert await scene.ana.ok("PATCH", path, {"topic": "maths"}) == plain | rules | {"topic": "maths"}
    assert (await scene.ben.ok("GET", "/servers"))["servers"][0]["channels"] == [plain | rules | {"topic": "maths"}]
    undone = await scene.ana.ok("PATCH", path, {"topic": "", "posting": "everyone", "slow_seconds": 0, "keep_days": None})
    assert undone == plain
    for _ in range(3):
        received = await scene.ben_socket.receive("channel:updated")
    assert set(received) == CHANNEL_KEYS


@pytest.mark.portable
async def test_a_mute_ends_after_its_time(scene: Scene) -> None:
    """No event says so: clients have the time. After it, members have no `muted_until`."""
    path, before = f"{scene.server}/members/{scene.ben.user_id}", time.time()
    member = await scene.ana.ok("PUT", path + "/mute", {"seconds": 1})
    assert chatrtc.utc(before + 1) <= member["muted_until"] <= chatrtc.utc(time.time() + 2)
    assert (await scene.ben.call("POST", "/messages", {"channel_id": scene.place.channel_id, "content": "x"})).body[
        "reason"
    ] == "MUTED"

    async def over() -> bool:
        reply = await scene.ben.call("POST", "/messages", {"channel_id": scene.place.channel_id, "content": "x"})
        return reply.status == 201

    await eventually(over, "the end of the mute")
    assert time.time() - before >= 1
    members = (await scene.ana.ok("GET", f"{scene.server}/members"))["members"]
    assert not any("muted_until" in one for one in members)


@pytest.mark.portable
async def test_a_mute_lasts_until_it_is_lifted(scene: Scene) -> None:
    path, message = f"{scene.server}/members/{scene.ben.user_id}/mute", {"channel_id": scene.place.channel_id, "content": "x"}
    member = await scene.ana.ok("PUT", path)
    assert member["muted_until"] == "9999-12-31T23:59:59Z"
    received = await scene.ben_socket.receive("member:updated", user_id=scene.ben.user_id)
    assert (received["muted_until"], received["role"]) == (member["muted_until"], "member")
    assert (await scene.ana.ok("PUT", path, {"seconds": 31_536_000}))["muted_until"] < member["muted_until"]
    for _ in range(2):  # the second time, nothing changes
        await scene.ana.ok("DELETE", path)
    await scene.ben_socket.receive("member:updated")
    assert "muted_until" not in await scene.ben_socket.receive("member:updated")
    await scene.ben_socket.receive_none("member:updated")
    await scene.ben.ok("POST", "/messages", message)


@pytest.mark.portable
async def test_a_mute_outlasts_leaving_and_is_lifted_from_a_new_owner(scene: Scene) -> None:
    member = f"{scene.server}/members/{scene.ben.user_id}"
    until = (await scene.ana.ok("PUT", member + "/mute"))["muted_until"]
    await scene.ben.ok("DELETE", member)
    assert (await scene.ana.call("DELETE", member + "/mute")).body["reason"] == "NO_MEMBER"
    await scene.ben.ok("POST", f"/invites/{await scene.ana.invite(scene.place.server_id)}")
    assert (await scene.ana_socket.receive("member:joined"))["muted_until"] == until
    message = {"channel_id": scene.place.channel_id, "content": "back"}
    assert (await scene.ben.call("POST", "/messages", message)).body["reason"] == "MUTED"
    assert (await scene.ana.ok("PATCH", member, {"role": "admin"}))["muted_until"] == until
    assert "muted_until" not in await scene.ana.ok("PATCH", member, {"role": "owner"})
    await scene.ben.ok("POST", "/messages", message)


@pytest.mark.portable
async def test_the_program_mutes_and_sets_rules(scene: Scene) -> None:
    chat, ben, ids = scene.world.chat, scene.ben, {"channel_id": scene.place.channel_id}
    call = {"author_id": scene.ana.user_id, "server_id": scene.place.server_id, "user_id": ben.user_id}
    assert (await chat.mute(**call, seconds=60)).muted_until > chatrtc.utc(time.time())
    with pytest.raises(chatrtc.ChatError, match="You are muted"):
        await chat.post_message(author_id=ben.user_id, content="hello", **ids)
    assert await chat.unmute(**call) is None
    await chat.edit_channel(author_id=scene.ana.user_id, posting="staff", **ids)
    with pytest.raises(chatrtc.ChatError, match="Only admins"):
        await chat.post_message(author_id=ben.user_id, content="hello", **ids)
    assert (await chat.edit_channel(author_id=scene.ana.user_id, posting="everyone", **ids)).posting == "everyone"
    assert (await chat.post_message(author_id=ben.user_id, content="hello", **ids)).content == "hello"


@pytest.mark.portable
async def test_only_a_higher_role_mutes_a_member(scene: Scene) -> None:
    members = f"{scene.server}/members"
    for person in (scene.ben, scene.cy):
        await scene.ana.ok("PATCH", f"{members}/{person.user_id}", {"role": "admin"})
    for target in (scene.ana, scene.ben, scene.cy):  # the owner, oneself, and staff of the same role
        for method in ("PUT", "DELETE"):
            reply = await scene.ben.call(method, f"{members}/{target.user_id}/mute")
            assert (reply.code, reply.body["reason"]) == ("FORBIDDEN", "ROLE_TOO_LOW")
    for user_id in (scene.dee.user_id, 10**9):
        assert (await scene.ben.call("PUT", f"{members}/{user_id}/mute")).body["reason"] == "NO_MEMBER"
    for seconds in (0, -1, 31_536_001, 1.5, "9", 10**30):
        reply = await scene.ana.call("PUT", f"{members}/{scene.ben.user_id}/mute", {"seconds": seconds})
        assert (reply.code, reply.body["field"]) == ("BAD_REQUEST", "seconds"), seconds
    await scene.ben_socket.receive("member:updated", user_id=scene.cy.user_id)
    await scene.ben_socket.receive_none("member:updated")


# ---- Operations -----------------------------------------------------------------------------------------------------
# The features over REST: messages, pages, reactions, read marks, search, members, invites and channels.


@pytest.mark.portable
async def test_a_repeated_nonce_gives_the_first_message_and_no_second_event(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "once", "nonce": "n"}
    first = await scene.ana.call("POST", "/messages", body)
    assert (first.status, first.headers.get("Idempotent-Replayed")) == (201, None)
    for content in ("once", "something else"):
        again = await scene.ana.call("POST", "/messages", body | {"content": content})
        assert (again.status, again.body, again.headers["Idempotent-Replayed"]) == (201, first.body, "true")
    assert await scene.ben_socket.receive("message:new") == first.body
    await scene.ben_socket.receive_none("message:new")
    other = await scene.ben.call("POST", "/messages", body)  # a nonce belongs to its author
    assert other.body["message_id"] != first.body["message_id"]
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "next"})
    elsewhere = await scene.ana.call("POST", "/messages", body | {"channel_id": channel["channel_id"]})
    assert "Idempotent-Replayed" not in elsewhere.headers


@pytest.mark.portable
async def test_concurrent_repeats_of_a_nonce_post_once(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "once", "nonce": "n"}
    replies = await asyncio.gather(*(scene.ana.call("POST", "/messages", body) for _ in range(20)))
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body["message_id"] for reply in replies}) == 1
    assert sum("Idempotent-Replayed" in reply.headers for reply in replies) == 19


@pytest.mark.portable
async def test_posting_by_the_event_does_what_the_route_does(scene: Scene) -> None:
    ana, ben, socket = scene.ana, scene.ben, scene.ana_socket
    first, channel_id = await scene.post(), scene.place.channel_id
    await scene.ben_socket.receive("message:new")
    for more in ({}, {"reply_to": first["message_id"]}, {"nonce": "n"}, {"content": "@ben hello", "nonce": "m"}):
        body: dict[str, Any] = {"channel_id": channel_id, "content": "hello"} | more
        posted = (await ana.call("POST", "/messages", body)).body
        ack = await socket.ok("message:send", body | ({"nonce": "by event"} if body.get("nonce") == "n" else {}))
        ack.pop("success")
        assert await ana.ok("GET", f"/messages/{ack['message_id']}") == ack
        told = [await scene.ben_socket.receive("message:new") for _ in range(1 if ack == posted else 2)]
        assert told[-1] == ack
        assert await ben.ok("GET", f"/channels/{channel_id}/messages?limit={len(told)}") == {"messages": told, "has_more": True}
        changing = {"message_id", "seq", "created_at", "nonce"}
        assert {key: ack[key] for key in ack.keys() - changing} == {key: posted[key] for key in posted.keys() - changing}
        assert (ack == posted) == (body.get("nonce") == "m"), "a nonce counts for the route and the event together"
    assert (await scene.ben_socket.receive("mention"))["author_id"] == ana.user_id
    await scene.ben_socket.receive_none("message:new", "mention")
    assert (await ana.ok("GET", f"/channels/{channel_id}/read"))["unread"] == 0, "posting marks the channel as read"


@pytest.mark.portable
async def test_refused_posts_by_the_event_have_the_errors_of_the_route(scene: Scene) -> None:
    channel_id, other = scene.place.channel_id, await scene.world.place(scene.dee, name="other")
    gone = await scene.ana.post(channel_id, "gone", nonce="gone")
    await scene.ana.ok("DELETE", f"/messages/{gone['message_id']}")
    wrongs: list[dict[str, Any]] = [
        {}, {"channel_id": channel_id}, {"content": "x"}, {"channel_id": channel_id, "content": ""},
        {"channel_id": channel_id, "content": " \n"}, {"channel_id": channel_id, "content": "x" * 4001},
        {"channel_id": channel_id, "content": 5}, {"channel_id": "1", "content": "x"}, {"channel_id": 0, "content": "x"},
        {"channel_id": 10**9, "content": "x"}, {"channel_id": other.channel_id, "content": "x"},
        {"channel_id": channel_id, "content": "x", "reply_to": 10**9}, {"channel_id": channel_id, "content": "x", "nonce": ""},
        {"channel_id": channel_id, "content": "x", "nonce": "n" * 65}, {"channel_id": channel_id, "content": "x", "more": 1},
        {"channel_id": channel_id, "content": "again", "nonce": "gone"},
    ]  # fmt: skip
    for body in wrongs:
        reply, ack = await scene.ana.call("POST", "/messages", body), await scene.ana_socket.call("message:send", body)
        assert reply.status >= 400, body
        assert ack == {"success": False} | reply.body, body
        await scene.ana_socket.client.emit("message:send", body)  # without an ack, an event tells of the error
        assert await scene.ana_socket.receive("error") == {"event": "message:send"} | reply.body
    plain = await scene.world.socket()
    ack = await plain.call("message:send", {"channel_id": channel_id, "content": "x"})
    assert (ack["code"], ack["reason"]) == ("UNAUTHORIZED", "SIGN_IN_FIRST")
    await scene.ben_socket.receive("message:deleted")
    await scene.ben_socket.receive_none("message:new")


@pytest.mark.portable
@pytest.mark.parametrize("transport", ["polling", "websocket"])
async def test_messages_of_one_socket_are_posted_in_the_order_they_were_sent(scene: Scene, transport: str) -> None:
    """The client waits for no ack. A nonce that is repeated later, by event or route, posts nothing."""
    socket = await scene.ben.socket(transports=[transport])
    texts = [f"number {n}" for n in range(60)]
    for text in texts:
        await socket.client.emit("message:send", {"channel_id": scene.place.channel_id, "content": text, "nonce": text})
    await socket.ok("ping")
    again = [{"channel_id": scene.place.channel_id, "content": "again", "nonce": text} for text in texts[:10]]
    acks, replies = await asyncio.gather(
        asyncio.gather(*(socket.ok("message:send", body) for body in again)),
        asyncio.gather(*(scene.ben.call("POST", "/messages", body) for body in again)),
    )
    received = [await scene.ana_socket.receive("message:new") for _ in texts]
    assert [message["content"] for message in received] == texts
    assert [message["seq"] for message in received] == list(range(received[0]["seq"], received[0]["seq"] + len(texts)))
    assert [reply.body for reply in replies] == received[:10]
    assert acks == [{"success": True} | message for message in received[:10]]
    await scene.ana_socket.receive_none("message:new")


@pytest.mark.portable
async def test_a_reply_is_to_a_message_of_the_same_channel(scene: Scene) -> None:
    first = await scene.post()
    reply = await scene.ben.post(scene.place.channel_id, "yes", reply_to=first["message_id"])
    assert reply["reply_to"] == first["message_id"]
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "next"})
    for channel_id, message_id in ((channel["channel_id"], first["message_id"]), (scene.place.channel_id, 10**6)):
        body = {"channel_id": channel_id, "content": "?", "reply_to": message_id}
        assert (await scene.ben.call("POST", "/messages", body)).code == "NOT_FOUND"


@pytest.mark.portable
async def test_a_deleted_message_cannot_be_found_anywhere(scene: Scene) -> None:
    message = await scene.ana.post(scene.place.channel_id, "@ben secretword")
    await scene.ben.ok("PUT", f"/messages/{message['message_id']}/reactions/x")
    await scene.ana.ok("DELETE", f"/messages/{message['message_id']}")
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"content": "again"}),
        ("DELETE", "", None),
        ("PUT", "/reactions/x", None),
        ("DELETE", "/reactions/x", None),
    ):
        reply = await scene.ana.call(method, f"/messages/{message['message_id']}{path}", body)
        assert reply.code == "NOT_FOUND", method
    everything = [
        await scene.ana.ok("GET", f"/channels/{scene.place.channel_id}/messages"),
        await scene.ana.ok("GET", f"{scene.server}/changes"),
        await scene.ana.ok("GET", f"{scene.server}/search?q=secretword"),
    ]
    assert "secretword" not in json.dumps(everything)
    assert (await scene.ben.ok("GET", f"/channels/{scene.place.channel_id}/read"))["mentions"] == 0


@pytest.mark.portable
async def test_pages(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}/messages"
    first = (await scene.ana.ok("GET", path))["messages"][0]
    posted = [first, *[await scene.ana.post(scene.place.channel_id, str(number)) for number in range(1, 60)]]
    ids = [message["message_id"] for message in posted]

    async def page(query: str) -> tuple[list[Any], bool]:
        reply = await scene.ben.ok("GET", path + query)
        assert set(reply) == {"messages", "has_more"}
        return reply["messages"], reply["has_more"]

    assert await page("") == (posted[10:], True)
    assert await page("?limit=100") == (posted, False)
    assert await page("?limit=1") == (posted[-1:], True)
    assert await page(f"?before={ids[10]}") == (posted[:10], False)
    assert await page(f"?before={ids[10]}&limit=3") == (posted[7:10], True)
    assert await page(f"?before={ids[0]}") == ([], False)
    assert await page(f"?after={ids[0]}&limit=59") == (posted[1:], False)
    assert await page(f"?after={ids[5]}&limit=4") == (posted[6:10], True)
    assert await page(f"?after={ids[-1]}") == ([], False)
    assert await page("?after=0&limit=2") == (posted[:2], True)
    around, more = await page(f"?around={ids[30]}&limit=11")
    assert posted[30] in around
    assert more
    assert len(around) == 11
    assert around == posted[posted.index(around[0]) :][:11], "a page has no gap"
    around, _ = await page(f"?around={ids[0]}&limit=10")
    assert around == posted[: len(around)]
    around, _ = await page(f"?around={ids[-1]}&limit=10")
    assert around == posted[-10:]
    for query in ("?limit=0", "?limit=101", "?before=x", "?before=1&after=1", "?around=1&before=1", "?before=0"):
        assert (await scene.ben.call("GET", path + query)).code == "BAD_REQUEST", query


@pytest.mark.portable
async def test_long_pages_are_not_cached(scene: Scene) -> None:
    pages, path = scene.world.chat.hub.pages, f"/channels/{scene.place.channel_id}/messages"
    for _ in range(9):
        await scene.ana.post(scene.place.channel_id, "\N{GRINNING FACE}" * 4000)
    kept = len(pages)
    assert len((await scene.ana.ok("GET", path))["messages"]) == 10
    assert len(pages) == kept
    assert len((await scene.ana.ok("GET", f"{path}?limit=8"))["messages"]) == 8
    assert len(pages) == kept + 1


@pytest.mark.portable
@pytest.mark.parametrize("limit", [1, 7, 100])
async def test_paging_in_either_direction_returns_each_message_once(scene: Scene, limit: int) -> None:
    posted = [(await scene.post())["message_id"] for _ in range(20)]
    await scene.ana.ok("DELETE", f"/messages/{posted.pop(7)}")
    path = f"/channels/{scene.place.channel_id}/messages?limit={limit}"
    up: list[int] = []
    down: list[int] = []
    more, cursor = True, posted[0] - 1
    while more:
        page = await scene.ben.ok("GET", f"{path}&after={cursor}")
        up += [message["message_id"] for message in page["messages"]]
        more, cursor = page["has_more"], up[-1]
    more, cursor = True, posted[-1] + 1
    while more and len(down) < 20:
        page = await scene.ben.ok("GET", f"{path}&before={cursor}")
        down = [message["message_id"] for message in page["messages"]] + down
        more, cursor = page["has_more"], down[0]
    assert up == posted
    assert down[-len(posted) :] == posted


@pytest.mark.portable
async def test_reactions_are_idempotent(scene: Scene) -> None:
    message = await scene.post()
    path = f"/messages/{message['message_id']}"
    for _ in range(2):
        assert (await scene.ben.call("PUT", f"{path}/reactions/👍🏽")).status == 204
    await scene.ben_socket.receive("reaction:add")
    await scene.ben_socket.receive_none("reaction:add")
    assert (await scene.ana.ok("GET", path))["reactions"] == [{"emoji": "👍🏽", "user_ids": [scene.ben.user_id]}]
    assert (await scene.ana.call("DELETE", f"{path}/reactions/👍🏽")).status == 204, "a reaction of another user is not removed"
    for _ in range(2):
        assert (await scene.ben.call("DELETE", f"{path}/reactions/👍🏽")).status == 204
    await scene.ben_socket.receive("reaction:remove", user_id=scene.ben.user_id)
    await scene.ben_socket.receive_none("reaction:remove")


@pytest.mark.portable
async def test_an_emoji_with_and_without_its_variation_selector_is_one_reaction(scene: Scene) -> None:
    ana, ben = scene.ana, scene.ben
    for first, second in (("\u2764\ufe0f", "\u2764"), ("\u2764", "\u2764\ufe0f"), ("🏳\ufe0f\u200d🌈", "🏳\u200d🌈")):
        path = f"/messages/{(await scene.post())['message_id']}"
        await ana.ok("PUT", f"{path}/reactions/{first}")
        assert (await scene.ben_socket.receive("reaction:add"))["emoji"] == first
        await ana.ok("PUT", f"{path}/reactions/{second}")  # changes nothing
        await ben.ok("PUT", f"{path}/reactions/{second}")
        assert (await scene.ben_socket.receive("reaction:add"))["emoji"] == first, "the form that the first reaction used"
        both = [{"emoji": first, "user_ids": [ana.user_id, ben.user_id]}]
        assert (await ana.ok("GET", path))["reactions"] == both
        for person in (ana, ben):
            await person.ok("DELETE", f"{path}/reactions/{second}")
            assert (await scene.ben_socket.receive("reaction:remove"))["emoji"] == first
        assert "reactions" not in await ana.ok("GET", path)


@pytest.mark.portable
async def test_a_message_has_a_maximum_of_different_reactions(scene: Scene) -> None:
    path = f"/messages/{(await scene.post())['message_id']}/reactions"
    for number in range(chatrtc.MAX_REACTIONS):
        await scene.ana.ok("PUT", f"{path}/e{number}")
    assert (await scene.ana.call("PUT", f"{path}/one-more")).code == "CONFLICT"
    assert (await scene.ben.call("PUT", f"{path}/e0")).status == 204, "an existing reaction is not a new one"
    assert (await scene.ben.call("PUT", f"{path}/e1\ufe0f")).status == 204, "nor is one with a variation selector"


@pytest.mark.portable
async def test_unread_counts_the_later_messages_of_others(scene: Scene) -> None:
    path, ben = f"/channels/{scene.place.channel_id}/read", scene.ben
    start = await ben.ok("GET", path)
    assert start == {"channel_id": scene.place.channel_id, "last_read_id": 0, "unread": 1, "mentions": 0}
    first, second = await scene.post(), await scene.ana.post(scene.place.channel_id, "@ben hello")
    assert (await ben.ok("GET", path)) == start | {"unread": 3, "mentions": 1}
    own = await ben.post(scene.place.channel_id, "@ben my own")
    assert (await ben.ok("GET", path)) == start | {"last_read_id": own["message_id"], "unread": 0}, (
        "posting marks the channel as read"
    )
    assert (await ben.call("PUT", path, {"message_id": first["message_id"], "back": True})).status == 204
    read = start | {"last_read_id": first["message_id"]}
    assert (await ben.ok("GET", path)) == read | {"unread": 1, "mentions": 1}
    await scene.ana.ok("PATCH", f"/messages/{second['message_id']}", {"content": "hello"})
    assert (await ben.ok("GET", path)) == read | {"unread": 1, "mentions": 0}
    await scene.ana.ok("PATCH", f"/messages/{second['message_id']}", {"content": "hello @ben"})
    assert (await ben.ok("GET", path)) == read | {"unread": 1, "mentions": 1}, "a mention added by an edit counts"
    await scene.ana.ok("DELETE", f"/messages/{second['message_id']}")
    assert (await ben.ok("GET", path)) == read | {"unread": 0, "mentions": 0}, "deleted messages are not unread"
    await ben.ok("PUT", path, {"message_id": second["message_id"]})
    await ben.ok("PUT", path, {"message_id": first["message_id"]})  # without `back` the mark never moves back
    assert (await ben.ok("GET", path)) == start | {"last_read_id": second["message_id"], "unread": 0}
    await ben.ok("PUT", path, {"message_id": 0, "back": True})
    assert (await ben.ok("GET", path)) == start | {"unread": 2}
    for body in ({"message_id": 10**6}, {"message_id": 10**6, "back": True}, {"message_id": 0}):
        assert (await ben.call("PUT", path, body)).code == "NOT_FOUND", body


@pytest.mark.portable
async def test_one_request_returns_the_read_states_of_all_channels(scene: Scene) -> None:
    ana, ben = scene.ana, scene.ben
    second = await ana.ok("POST", f"{scene.server}/channels", {"name": "second"})
    await ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"})
    other = await scene.world.place(ben, name="mine")
    await ana.post(second["channel_id"], "@ben")
    reads = (await ben.ok("GET", "/users/me/reads"))["reads"]
    channels = [scene.place.channel_id, second["channel_id"], other.channel_id]
    assert reads == [await ben.ok("GET", f"/channels/{channel_id}/read") for channel_id in channels]
    assert [state["unread"] for state in reads] == [1, 1, 0]


@pytest.mark.portable
async def test_messages_from_before_joining_are_not_unread(scene: Scene) -> None:
    await scene.ana.post(scene.place.channel_id, "hello @eve")
    eve, path = await scene.world.person("eve"), f"/channels/{scene.place.channel_id}/read"
    for _ in range(2):  # the second time as a member who returns
        invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
        await eve.ok("POST", f"/invites/{invite['code']}")
        assert (await eve.ok("GET", path))["unread"] == 0
        await eve.ok("PUT", path, {"message_id": 0, "back": True})
        assert (await eve.ok("GET", path))["unread"] == 0
        await scene.ana.post(scene.place.channel_id, "welcome @eve")
        state = await eve.ok("GET", path)
        assert (state["unread"], state["mentions"]) == (1, 1)
        await eve.ok("DELETE", f"{scene.server}/members/{eve.user_id}")


@pytest.mark.portable
async def test_unread_is_counted_to_a_thousand(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}/read"
    ids = [await scene.world.chat.post_message(author_id=scene.ana.user_id, channel_id=scene.place.channel_id, content="@ben")]
    await asyncio.gather(*(scene.post() for _ in range(chatrtc.MAX_UNREAD - 2)))
    assert (await scene.ben.ok("GET", path))["unread"] == chatrtc.MAX_UNREAD
    await asyncio.gather(*(scene.post() for _ in range(5)))
    state = await scene.ben.ok("GET", path)
    assert (state["unread"], state["mentions"]) == (chatrtc.MAX_UNREAD, 1)
    await scene.ben.ok("PUT", path, {"message_id": ids[0].message_id})
    assert (await scene.ben.ok("GET", path))["unread"] == chatrtc.MAX_UNREAD
    assert (await scene.ana.ok("GET", path))["unread"] == 0


async def found(person: Person, server: str, q: str, **narrow: Any) -> list[str]:
    reply = await person.call("GET", f"{server}/search", params={"q": q} | {key: str(narrow[key]) for key in narrow})
    assert reply.status == 200, (q, reply)
    assert set(reply.body) == {"messages", "has_more"}
    return [message["content"] for message in reply.body["messages"]]


@pytest.mark.portable
async def test_search_finds_words_newest_first(scene: Scene) -> None:
    ana, server, channel_id = scene.ana, scene.server, scene.place.channel_id
    texts = ["red apple", "Green Apple pie", "a pear", "crème brûlée", "привет мир", "日本語 テスト", "C++ & C#", "x OR y"]
    posted = {text: await ana.post(channel_id, text) for text in texts}
    assert await found(ana, server, "apple") == ["Green Apple pie", "red apple"]
    assert await found(ana, server, "apple red") == ["red apple"]
    assert await found(ana, server, "APPLE PIE") == ["Green Apple pie"]
    assert await found(ana, server, "creme") == ["crème brûlée"]
    assert await found(ana, server, "ПРИВЕТ") == ["привет мир"]
    assert await found(ana, server, "テスト") == ["日本語 テスト"]
    assert await found(ana, server, "apple !!!") == ["Green Apple pie", "red apple"]
    assert await found(ana, server, "orange") == []
    assert await found(ana, server, "apple", limit=1) == ["Green Apple pie"]
    assert await found(ana, server, "apple", before=posted["Green Apple pie"]["message_id"]) == ["red apple"]
    assert await found(ana, server, "apple", author_id=scene.ben.user_id) == []
    assert await found(ana, server, "apple", author_id=ana.user_id, channel_id=channel_id) != []
    found_messages = (await ana.ok("GET", f"{server}/search?q=pear"))["messages"]
    assert found_messages == [posted["a pear"]], "the result is the message itself"


SPELLINGS = {  # message -> queries that find it, and queries that do not
    "Homework: due on Monday": (
        ["home", "HOMEW", "mon due", '"due on"', '"Homework due"', '"due on', "“due on”"],
        ["work", '"home"'],
    ),
    "Gehe die Hauptstraße entlang": (["hauptstrasse", "HAUPTSTRASSE", "hauptstraße", "HAUPTSTRAẞE"], ["strasse"]),
    "crème brûlée à la Łódź, sœur Ørsted": (["creme brulee", "CRÈME", "cre\u0300me", "lodz", "soeur", "orsted"], ["rème"]),
    "Ο ΣΟΦΟΣ ΆΝΘΡΩΠΟΣ": (["σοφος", "ΣΟΦΟΣ", "σοφοσ", "ανθρωπος"], ["φος"]),  # noqa: RUF001
    "Ёлка и Йод": (["елка", "ёлка", "ИОД"], ["лка"]),
    "Diyarbakır ve İSTANBUL, ISPARTA": (["diyarbakir", "DİYARBAKIR", "istanbul", "ısparta"], ["stanbul"]),  # noqa: RUF001
    "أَهْلًا وَسَهْلًا": (["اهلا", "أهلا", "وسهلا"], ["سهلا"]),
    "שָׁלוֹם עולם": (["שלום", "שָׁלוֹם"], ["לום"]),
    "病院は機能していない。": (["病院", "機能", "していない", "院は", '"病院は"', "病院　機能"], ["院病", "病機"]),
    "Python入門 ﾊﾝｶｸ ガラス": (["入門", "python入", "ハンカク", "ガラス"], ["カラス", "門入"]),
    "วันนี้มีสอบคณิตศาสตร์ ฟรีน้ำ": (["สอบ", "คณิต", "ศาสตร์", "วันนี้", "น้ำ"], ["บอส"]),
    "ມື້ນີ້ມີສອບເສັງ": (["ສອບ", "ມື້ນີ້"], ["ບອສ"]),
    "ថ្ងៃនេះមានការប្រឡង": (["ប្រឡង", "ការ"], ["រកា"]),
    "ဒီနေ့စာမေးပွဲရှိတယ်": (["စာမေးပွဲ", "ရှိ"], ["ဲပွ"]),
    "학교에서 만나요": (["학교", "만나"], ["에서"]),
    "version 2.14 of user_name@example.org ❤️": (["2.14", "vers", "user_name", "example.org"], ["4"]),
}


@pytest.mark.portable
@pytest.mark.parametrize("text", SPELLINGS)
async def test_search_finds_other_spellings(scene: Scene, text: str) -> None:
    await scene.ana.post(scene.place.channel_id, "another message")
    message, (hits, misses) = await scene.ana.post(scene.place.channel_id, text), SPELLINGS[text]
    for how in ("posted", "edited"):
        for q in hits:
            assert await found(scene.ana, scene.server, q) == [text], (how, q)
        for q in misses:
            assert await found(scene.ana, scene.server, q) == [], (how, q)
        await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "in between"})
        assert await found(scene.ana, scene.server, hits[0]) == []
        await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": text})


@pytest.mark.portable
async def test_search_finds_nothing_that_was_deleted(scene: Scene) -> None:
    texts = [*SPELLINGS, "ﷺ" * 4000, "a\u0301\ufe0f" * 1000, "ᾼ ŉ ǰ", "ﬃ", "x\u200by\u00adz", '\uff02"']
    for text in [*texts, "", "hello"]:
        await scene.ana.post(scene.place.channel_id, text or "to be edited")
    assert await found(scene.ana, scene.server, "hello") == ["hello"]
    store = scene.world.chat.hub.store
    messages = (await scene.ana.ok("GET", f"/channels/{scene.place.channel_id}/messages?limit=100"))["messages"]
    for message, text in zip(messages, reversed(texts), strict=False):
        await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": text})
    for message in messages:
        await scene.ana.ok("DELETE", f"/messages/{message['message_id']}")
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute("CREATE VIRTUAL TABLE temp.vocabulary USING fts5vocab (main, messages_fts, row)")
        assert db.execute("SELECT * FROM vocabulary").fetchall() == []


ODD_QUERIES = [
    *[
        '"',
        '""',
        '"a',
        "OR",
        "NOT",
        "AND",
        "a*",
        "^a",
        "content:a",
        "(",
        ")",
        "a-b",
        "{a}:c",
        "+",
        "'",
        "\\",
        "%",
        "_",
        ";--",
        "😀",
        "\u202e",
        "ﷺ",
        "\ufeff",
        "日本",
    ],
    *["a OR", "NOT a", "NEAR(a b)", "server_id : 1", "a\tb", "a" * 200, "a " * 100, 'a" OR "b', "a b c"],
]


@pytest.mark.portable
async def test_a_search_without_words_finds_nothing(scene: Scene) -> None:
    await scene.ana.post(scene.place.channel_id, "a b c OR")
    for q in ODD_QUERIES:
        await found(scene.ana, scene.server, q)
    assert await found(scene.ana, scene.server, ODD_QUERIES[-1]) == ["a b c OR"]
    for q in ('"', '""', '" "', "!!!", "...", "(", "😀", '"?" !', "\u200b!"):
        assert await found(scene.ana, scene.server, q) == [], "the query contains no word"


@pytest.mark.portable
async def test_search_finds_edited_texts_and_nothing_of_other_servers(scene: Scene) -> None:
    ana, server, channel_id = scene.ana, scene.server, scene.place.channel_id
    other = await scene.world.place(scene.ana, name="mine too")
    await ana.post(other.channel_id, "needle elsewhere")
    edited, gone = await ana.post(channel_id, "needle one"), await ana.post(channel_id, "needle two")
    assert await found(ana, server, "needle") == ["needle two", "needle one"]
    await ana.ok("PATCH", f"/messages/{edited['message_id']}", {"content": "haystack"})
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")
    assert await found(ana, server, "needle") == []
    assert await found(ana, server, "haystack") == ["haystack"]
    for q in (f"needle {other.server_id}", f'server_id:"{other.server_id}"', f'needle" OR server_id:"{other.server_id}'):
        assert "needle elsewhere" not in await found(ana, server, q)
    assert await found(ana, f"/servers/{other.server_id}", "needle") == ["needle elsewhere"]
    second = await ana.ok("POST", f"{server}/channels", {"name": "second"})
    await ana.post(second["channel_id"], "needle in a channel that goes")
    assert len(await found(ana, server, "needle")) == 1
    await ana.ok("DELETE", f"/channels/{second['channel_id']}")
    assert await found(ana, server, "needle") == []


@pytest.mark.portable
async def test_the_ownership_of_a_server_is_transferred(scene: Scene) -> None:
    ana, ben, server = scene.ana, scene.ben, scene.server
    assert (await ana.call("DELETE", f"{server}/members/{ana.user_id}")).code == "FORBIDDEN"
    await ana.ok("PATCH", f"{server}/members/{ben.user_id}", {"role": "owner"})
    seen = await ben.ok("GET", server)
    assert (seen["owner_id"], seen["role"]) == (ben.user_id, "owner")
    assert (await ana.ok("GET", server))["role"] == "admin"
    updates = [await scene.ben_socket.receive("member:updated") for _ in range(2)]
    assert {(one["user_id"], one["role"]) for one in updates} == {(ana.user_id, "admin"), (ben.user_id, "owner")}
    assert (await ana.call("DELETE", server)).code == "FORBIDDEN"
    await ana.ok("DELETE", f"{server}/members/{ana.user_id}")
    assert (await ana.call("GET", server)).code == "FORBIDDEN"
    await ben.ok("DELETE", server)
    assert (await ben.call("GET", server)).code == "NOT_FOUND"


@pytest.mark.portable
async def test_admins_remove_only_members_of_a_lower_role(scene: Scene) -> None:
    for admin in (scene.ben, scene.cy):
        await scene.ana.ok("PATCH", f"{scene.server}/members/{admin.user_id}", {"role": "admin"})
    for target in (scene.ana, scene.cy):
        for verb, path in (("DELETE", "members"), ("PUT", "bans")):
            assert (await scene.ben.call(verb, f"{scene.server}/{path}/{target.user_id}")).code == "FORBIDDEN"
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.cy.user_id}", {"role": "member"})
    assert (await scene.ben.call("DELETE", f"{scene.server}/members/{scene.cy.user_id}")).status == 204


@pytest.mark.portable
async def test_bans(scene: Scene) -> None:
    server, cy = scene.server, scene.cy
    invite = await scene.ana.ok("POST", f"{server}/invites", {})
    assert (await scene.ana.call("PUT", f"{server}/bans/{cy.user_id}")).status == 204
    (entry,) = (await scene.ana.ok("GET", f"{server}/bans"))["bans"]
    assert (entry["user_id"], entry["username"], entry["banned_by"]) == (cy.user_id, "cy", scene.ana.user_id)
    assert cy.user_id not in await connected(scene.ana, scene)
    assert (await cy.call("POST", f"/invites/{invite['code']}")).code == "FORBIDDEN"
    assert (await scene.ana.call("PUT", f"{server}/bans/{cy.user_id}")).status == 204, "the second call changes nothing"
    assert (await scene.ana.call("DELETE", f"{server}/bans/{cy.user_id}")).status == 204
    assert await scene.ana.ok("GET", f"{server}/bans") == {"bans": []}
    assert (await cy.call("POST", f"/invites/{invite['code']}")).status == 201
    assert (await scene.ana.call("DELETE", f"{server}/members/{cy.user_id}")).status == 204
    assert (await scene.ana.call("PUT", f"{server}/bans/{cy.user_id}")).status == 204, "a former member"
    assert (await cy.call("POST", f"/invites/{invite['code']}")).body["reason"] == "BANNED"
    strangers = [await scene.ana.call("PUT", f"{server}/bans/{user_id}") for user_id in (scene.dee.user_id, 10**9)]
    assert [reply.status for reply in strangers] == [404, 404]
    assert strangers[0].body == strangers[1].body, "an account that was never a member looks like a missing one"
    assert [ban["user_id"] for ban in (await scene.ana.ok("GET", f"{server}/bans"))["bans"]] == [cy.user_id]


@pytest.mark.portable
async def test_bans_come_in_pages(scene: Scene) -> None:
    for person in (scene.ben, scene.cy):
        await scene.ana.ok("PUT", f"{scene.server}/bans/{person.user_id}")
    page = await scene.ana.ok("GET", f"{scene.server}/bans?limit=1")
    assert ([ban["username"] for ban in page["bans"]], page["has_more"]) == (["ben"], True)
    page = await scene.ana.ok("GET", f"{scene.server}/bans?limit=1&after={scene.ben.user_id}")
    assert ([ban["username"] for ban in page["bans"]], "has_more" in page) == (["cy"], False)


async def guest(scene: Scene, code: str, name: str = "Zoe") -> Person:
    """Return a guest who joined by the invite."""
    reply = await scene.world.call("POST", "/auth/guest", {"name": name, "code": code})
    assert reply.status == 201, reply
    return Person(scene.world, reply.body["username"], reply.body["user_id"], reply.body["token"])


@pytest.mark.portable
async def test_a_ban_can_delete_the_messages_and_revoke_the_invite(scene: Scene) -> None:
    server, channel_id = scene.server, scene.place.channel_id
    invite, other = [await scene.ana.ok("POST", f"{server}/invites", {}) for _ in range(2)]
    zoe = await guest(scene, invite["code"])
    posted = [(await zoe.post(channel_id, f"spam {number}"))["message_id"] for number in range(5)]
    kept = await scene.post()
    await zoe.ok("DELETE", f"{server}/members/{zoe.user_id}")  # a former member can be banned, too
    ban = {"revoke_invite": True, "delete_messages": True}
    assert (await scene.ana.call("PUT", f"{server}/bans/{zoe.user_id}", ban)).status == 204
    deleted = [(await scene.ben_socket.receive("message:deleted"))["message_id"] for _ in posted]
    assert sorted(deleted) == posted
    page = await scene.ana.ok("GET", f"/channels/{channel_id}/messages")
    assert [message["message_id"] for message in page["messages"]][-1] == kept["message_id"]
    assert not {message["author_id"] for message in page["messages"]} & {zoe.user_id}
    again = await scene.world.call("POST", "/auth/guest", {"name": "Zoe", "code": invite["code"]})
    assert (again.code, again.body["reason"]) == ("NOT_FOUND", "INVITE_UNKNOWN")
    await guest(scene, other["code"])
    assert (await scene.ana.call("PUT", f"{server}/bans/{scene.ben.user_id}", {"colour": 1})).code == "BAD_REQUEST"


@pytest.mark.portable
async def test_only_admins_see_by_which_invite_a_member_joined(scene: Scene) -> None:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    zoe = await guest(scene, invite["code"], "Zoe Ray")
    joined = await scene.ben_socket.receive("member:joined")
    facts = {
        "server_id": scene.place.server_id,
        "user_id": zoe.user_id,
        "username": "Zoe.Ray",
        "name": "Zoe Ray",
        "guest": True,
    }
    assert joined == facts | {"seq": joined["seq"]}
    for path in (f"{scene.server}/members", f"{scene.server}/changes"):
        for person, seen in ((scene.ana, {"invited_by": invite["code"]}), (scene.ben, {})):
            members = (await person.ok("GET", path))["members"]
            (member,) = [member for member in members if member["user_id"] == zoe.user_id]
            hidden = {"role": "member", "status": "online", "joined_at": member["joined_at"], "connected": False}
            assert member == facts | hidden | seen
    assert (await zoe.ok("GET", "/users/me"))["guest"] is True
    account = await zoe.ok("POST", "/auth/password", {"new_password": "correct horse"})
    updated = await scene.ben_socket.receive("member:updated")
    assert ("guest" in updated, updated["role"], updated["name"]) == (False, "member", "Zoe Ray")
    zoe.token = account["token"]
    assert "guest" not in await zoe.ok("GET", "/users/me")


@pytest.mark.portable
async def test_a_guest_signs_in_again_by_a_link(scene: Scene) -> None:
    server, world = scene.server, scene.world
    invite = await scene.ana.ok("POST", f"{server}/invites", {})
    zoe = await guest(scene, invite["code"], "Zoe Ray")
    path = f"{server}/members/{zoe.user_id}/link"
    await zoe.ok("POST", "/auth/logout")
    first, second = await scene.ana.ok("POST", path), await scene.ana.ok("POST", path)
    assert set(second) == {"code", "expires_at"}
    assert re.fullmatch(r"[A-HJ-NP-Z2-9]{5}-[A-HJ-NP-Z2-9]{5}", second["code"])
    rejected = await world.call("POST", "/auth/link", {"code": first["code"]})
    assert (rejected.code, rejected.body["reason"], rejected.body["field"]) == ("NOT_FOUND", "LINK_UNKNOWN", "code"), (
        "the old token is revoked"
    )
    replies = await asyncio.gather(
        *(world.call("POST", "/auth/link", {"code": f" {second['code'].lower()}"}) for _ in range(3))
    )
    assert sorted(reply.status for reply in replies) == [200, 404, 404], "once"
    account = next(reply.body for reply in replies if reply.status == 200)
    assert (account["user_id"], account["username"], account["name"]) == (zoe.user_id, "Zoe.Ray", "Zoe Ray")
    zoe.token = account["token"]
    await zoe.ok("GET", server)
    store = world.chat.hub.store
    late = await scene.ana.ok("POST", path)
    assert not store.read_inline(
        lambda db: db.execute("SELECT 1 FROM links WHERE hex(digest) LIKE ?", (late["code"],)).fetchall()
    )
    await store.write(lambda db: chatrtc.Result(db.execute("UPDATE links SET expires_at = ?", (time.time() - 1,)).rowcount))
    assert (await world.call("POST", "/auth/link", {"code": late["code"]})).code == "NOT_FOUND"
    await store.write(lambda db: chatrtc.Result(chatrtc.delete_expired(db, time.time())))
    assert store.read_inline(lambda db: db.execute("SELECT count(*) FROM links").fetchone()) == (0,)
    last = await scene.ana.ok("POST", path)
    await zoe.ok("POST", "/auth/password", {"new_password": "correct horse"})
    assert (await world.call("POST", "/auth/link", {"code": last["code"]})).code == "NOT_FOUND"
    assert (await scene.ana.call("POST", path)).body["reason"] == "NOT_A_GUEST"


@pytest.mark.portable
async def test_a_guest_of_another_server_gets_no_link(scene: Scene) -> None:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    zoe = await guest(scene, invite["code"])
    other = await scene.world.place(scene.dee, zoe)
    path = f"{scene.server}/members/{zoe.user_id}/link"
    assert (await scene.ana.call("POST", path)).body["reason"] == "LINK_ELSEWHERE"
    await zoe.ok("DELETE", f"/servers/{other.server_id}/members/{zoe.user_id}")
    assert (await scene.ana.call("POST", path)).status == 201


@pytest.mark.portable
async def test_all_guests_are_removed_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "GUESTS_PER_STEP", 2)
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    guests = [await guest(scene, invite["code"]) for _ in range(5)]
    socket = await guests[1].socket(scene.place.server_id)
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "admin"})
    await scene.ana.ok("PATCH", f"{scene.server}/members/{guests[0].user_id}", {"role": "admin"})
    assert await scene.ben.ok("DELETE", f"{scene.server}/guests") == {"removed": 4}
    left = [await scene.ben_socket.receive("member:left") for _ in range(4)]
    assert [one["user_id"] for one in left] == [one.user_id for one in guests[1:]]
    await socket.receive("member:left", user_id=guests[1].user_id)
    await scene.post()
    await scene.ben_socket.receive("message:new")
    await socket.receive_none("message:new")
    assert await scene.ana.ok("DELETE", f"{scene.server}/guests") == {"removed": 1}
    members = (await scene.ana.ok("GET", f"{scene.server}/members"))["members"]
    assert [member["username"] for member in members] == ["ana", "ben", "cy"]


@pytest.mark.portable
async def test_an_invite_code_is_accepted_in_any_spelling(scene: Scene) -> None:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
    code = invite["code"]
    assert re.fullmatch(r"[A-HJ-NP-Z2-9]{5}-[A-HJ-NP-Z2-9]{5}", code)
    for typed in (code, code.lower(), code.replace("-", ""), f" {code.replace('-', '').lower()} ", code.replace("-", " ")):
        preview = await scene.world.call("GET", f"/invites/{quote(typed)}")
        assert (preview.status, preview.body["code"]) == (200, code), typed
        assert (await scene.world.call("GET", f"/invites/{quote(typed)}.svg")).status == 200, typed
        assert (await scene.cy.call("POST", f"/invites/{quote(typed)}")).status == 200, typed
        account = await scene.world.call("POST", "/auth/guest", {"name": "Zoe", "code": typed})
        assert account.status == 201, typed
    old = "aB3-_" * 4 + "xy"
    change = "UPDATE invites SET code = ? WHERE rowid = (SELECT min(rowid) FROM invites)"  # a code as version 1 made them
    await scene.world.chat.hub.store.write(lambda db: chatrtc.Result(db.execute(change, (old,)).rowcount))
    assert (await scene.world.call("GET", f"/invites/{old}")).body["code"] == old
    assert (await scene.world.call("GET", f"/invites/{old.lower()}")).body["reason"] == "INVITE_UNKNOWN"
    assert (await scene.ana.call("DELETE", f"/invites/{code.lower()}")).status == 204
    assert (await scene.world.call("GET", f"/invites/{code}")).body["reason"] == "INVITE_UNKNOWN"


@pytest.mark.portable
async def test_create_servers_decides_who_creates_servers(make_world: MakeWorld, tmp_path: Path) -> None:
    for setting, registration, account, guests, host in (
        ("everyone", "open", "", "", ""),
        ("accounts", "open", "", "NOT_FOR_GUESTS", ""),
        ("nobody", "open", "CREATE_SERVERS_OFF", "CREATE_SERVERS_OFF", ""),
        ("everyone", "invite", "", "", ""),
        ("accounts", "invite", "", "NOT_FOR_GUESTS", "NOT_FOR_GUESTS"),
        ("nobody", "invite", "CREATE_SERVERS_OFF", "CREATE_SERVERS_OFF", "NOT_FOR_GUESTS"),
    ):
        options = {"create_servers": setting, "registration": registration}
        world = await make_world(database=str(tmp_path / f"{setting}-{registration}.db"), **options)
        store = world.chat.hub.store
        owner = (
            await store.write(lambda db: chatrtc.Result(chatrtc.insert_user(db, "ana", None, "2026-01-01T00:00:00Z")))
        ).value
        server = await world.chat.create_server(author_id=owner, name="class")  # the embedding program is always allowed
        place = {"author_id": owner, "server_id": server.server_id}
        code = (await world.chat.create_invite(**place)).code
        ids, tokens = [], []
        for path, body in (("register", {"password": "correct horse"}), ("guest", {}), ("guest", {})):
            reply = await world.call("POST", f"/auth/{path}", {"name": "Zoe", "code": code} | body)
            ids.append(reply.body["user_id"])
            tokens.append(reply.body["token"])

        async def reason(path: str, token: str, body: Any = None, world: World = world) -> str:
            reply = await world.call("POST", path, body or {}, token=token)
            return str(reply.body["reason"]) if reply.status >= 400 else ""

        for number, expected in ((0, account), (1, guests)):
            await world.chat.set_role(**place, user_id=ids[number], role="admin")
            assert await reason("/servers", tokens[number], {"name": "mine"}) == expected, (options, number)
        for number, expected in ((0, ""), (1, host)):
            for path in ("invites", f"members/{ids[2]}/link"):
                assert await reason(f"/servers/{server.server_id}/{path}", tokens[number]) == expected, (options, number, path)


@pytest.mark.portable
async def test_servers_channels_and_invites_have_a_maximum(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    ana, ben, server = scene.ana, scene.ben, scene.server
    for name, most in (("MAX_OWNED_SERVERS", 3), ("MAX_CHANNELS", 3), ("MAX_INVITES", 4)):
        monkeypatch.setattr(chatrtc, name, most)

    async def expect_limit(person: Person, method: str, path: str, body: Any) -> None:
        reply = await person.call(method, path, body)
        assert (reply.code, reply.body["reason"]) == ("CONFLICT", "TOO_MANY"), path

    for name in ("two", "three"):
        await ana.ok("POST", "/servers", {"name": name})
        await ana.ok("POST", f"{server}/channels", {"name": name})
        await ben.ok("POST", "/servers", {"name": name})
    await ben.ok("POST", "/servers", {"name": "one"})
    await expect_limit(ana, "POST", "/servers", {"name": "four"})
    await expect_limit(ana, "PATCH", f"{server}/members/{ben.user_id}", {"role": "owner"})
    await expect_limit(ana, "POST", f"{server}/channels", {"name": "four"})
    listed = (await ana.ok("GET", "/servers"))["servers"]
    assert listed == [await ana.ok("GET", f"/servers/{one['server_id']}") for one in listed]
    assert [len(one["channels"]) for one in listed] == [3, 1, 1]
    first = (await ana.ok("GET", f"{server}/invites"))["invites"]
    spent = await ana.ok("POST", f"{server}/invites", {"max_uses": 1})
    live = [await ana.ok("POST", f"{server}/invites", {}) for _ in range(2)]
    await expect_limit(ana, "POST", f"{server}/invites", {})
    await scene.dee.ok("POST", f"/invites/{spent['code']}")
    assert (await scene.world.call("GET", f"/invites/{spent['code']}")).body["reason"] == "INVITE_SPENT"
    new = await ana.ok("POST", f"{server}/invites", {})
    listed = (await ana.ok("GET", f"{server}/invites"))["invites"]
    assert [one["code"] for one in listed] == [one["code"] for one in [*first, *live, new]], "the used invite was replaced"
    await expect_limit(ana, "POST", f"{server}/invites", {})


@pytest.mark.portable
async def test_lists_take_one_query_each(scene: Scene) -> None:
    """The number of queries does not depend on the number of servers and channels."""
    queries: list[str] = []

    def count(number: int) -> int:
        with contextlib.closing(chatrtc.connect_reader(scene.world.chat.hub.store.path)) as db:
            queries.clear()
            db.set_trace_callback(queries.append)
            assert len(chatrtc.load_servers(db, scene.dee.user_id)) == number
        return len(queries)

    few = count(1)
    for number in range(5):
        await scene.dee.ok("POST", "/servers", {"name": f"s{number}"})
    assert few == count(6) == 2


@pytest.mark.portable
async def test_a_path_that_ends_like_the_socket_endpoint_is_checked_like_any(world: World) -> None:
    for path in ("/nothing/socket.io", "/nothing/socket.io/"):
        assert (await world.call("GET", path)).code == "NOT_FOUND"
    for path in ("/nothing/socket.io", "/invites/socket.io"):
        reply = await world.call("GET", path, headers={"Origin": "https://evil.example"})
        assert reply.code == "FORBIDDEN"


@pytest.mark.portable
async def test_invites_expire_by_use_and_by_time(scene: Scene) -> None:
    server = scene.server
    once = await scene.ana.ok("POST", f"{server}/invites", {"max_uses": 1})
    brief = await scene.ana.ok("POST", f"{server}/invites", {"expires_in": 1})
    assert (await scene.cy.call("POST", f"/invites/{once['code']}")).status == 200, "a member does not use the invite"
    joined = await scene.dee.call("POST", f"/invites/{once['code']}")
    assert (joined.status, joined.body["server_id"], joined.body["role"]) == (201, scene.place.server_id, "member")
    assert (await scene.dee.call("POST", f"/invites/{once['code']}")).status == 200
    eve = await scene.world.person("eve")
    assert (await eve.call("POST", f"/invites/{once['code']}")).body["reason"] == "INVITE_SPENT"
    assert (await scene.world.call("GET", f"/invites/{once['code']}")).code == "NOT_FOUND"
    listed = (await scene.ana.ok("GET", f"{server}/invites"))["invites"]
    assert [invite["uses"] for invite in listed if invite["code"] == once["code"]] == [1]
    async with asyncio.timeout(PATIENCE):  # until its second has passed
        while (await scene.world.call("GET", f"/invites/{brief['code']}")).status == 200:
            await scene.ben_socket.ok("ping")
    assert (await eve.call("POST", f"/invites/{brief['code']}")).body["reason"] == "INVITE_EXPIRED"
    assert (await scene.cy.call("POST", f"/invites/{brief['code']}")).status == 200, "a member may use it"
    revoked = await scene.ana.ok("POST", f"{server}/invites", {})
    assert (await scene.ana.call("DELETE", f"/invites/{revoked['code']}")).status == 204
    assert (await eve.call("POST", f"/invites/{revoked['code']}")).code == "NOT_FOUND"


@pytest.mark.portable
async def test_an_invite_for_one_admits_one_user(scene: Scene) -> None:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {"max_uses": 1})
    people = await scene.world.people(*(f"p{number}" for number in range(6)))
    replies = await asyncio.gather(*(person.call("POST", f"/invites/{invite['code']}") for person in people))
    assert sorted(reply.status for reply in replies) == [201] + [404] * 5


@pytest.mark.portable
async def test_channel_names_are_unique_in_their_server(scene: Scene) -> None:
    await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "Straße"})
    for name in ("Straße", "STRASSE", "strasse"):
        reply = await scene.ana.call("POST", f"{scene.server}/channels", {"name": name})
        assert (reply.status, reply.code) == (409, "CONFLICT")
    renamed = await scene.ana.call("PATCH", f"/channels/{scene.place.channel_id}", {"name": "strasse"})
    assert renamed.code == "CONFLICT"
    same = await scene.ana.call("PATCH", f"/channels/{scene.place.channel_id}", {"name": "GENERAL"})
    assert (same.status, same.body["name"]) == (200, "GENERAL"), "its own name may change in spelling"


@pytest.mark.portable
async def test_a_new_channel_emits_events_at_once_and_a_deleted_one_none(scene: Scene) -> None:
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "new"})
    await scene.ben_socket.receive("channel:created")
    await scene.ana_socket.ok("typing_start", {"channel_id": channel["channel_id"]})
    await scene.ben_socket.receive("user:typing", channel_id=channel["channel_id"])
    await scene.ana.ok("DELETE", f"/channels/{channel['channel_id']}")
    await scene.ben_socket.receive("channel:deleted")
    for reply in (
        await scene.ana.call("GET", f"/channels/{channel['channel_id']}/messages"),
        await scene.ana.call("POST", "/messages", {"channel_id": channel["channel_id"], "content": "x"}),
    ):
        assert reply.code == "NOT_FOUND"
    assert (await scene.ana_socket.call("typing_start", {"channel_id": channel["channel_id"]}))["code"] == "NOT_FOUND"


@pytest.mark.portable
async def test_a_deleted_server_leaves_nothing(scene: Scene) -> None:
    message = await scene.post()
    await scene.ana.ok("DELETE", scene.server)
    await scene.ben_socket.receive("server:deleted")
    for path in (scene.server, f"/channels/{scene.place.channel_id}/messages", f"/messages/{message['message_id']}"):
        assert (await scene.ben.call("GET", path)).code == "NOT_FOUND"
    assert (await scene.ben_socket.call("join_server", {"server_id": scene.place.server_id}))["code"] == "NOT_FOUND"
    again = await scene.world.place(scene.ana)
    assert again.server_id > scene.place.server_id, "ids are never reused"
    assert again.channel_id > scene.place.channel_id


async def start(person: Person, *others: Person, **more: Any) -> Any:
    """Start a conversation and return it as the person who starts it receives it."""
    return await person.ok("POST", "/conversations", {"user_ids": [other.user_id for other in others], **more})


def refusal(reply: Reply) -> tuple[int, str]:
    return reply.status, (reply.body or {}).get("reason", "")


@pytest.mark.portable
async def test_two_people_have_one_conversation(scene: Scene) -> None:
    ana, ben = scene.ana, scene.ben
    replies = await asyncio.gather(
        *(
            person.call("POST", "/conversations", {"user_ids": [other.user_id]})
            for person, other in [(ana, ben), (ben, ana)] * 4
        )
    )
    assert sorted(reply.status for reply in replies) == [200] * 7 + [201]
    (server_id,) = {reply.body["server_id"] for reply in replies}
    assert [reply.body["name"] for reply in replies] == ["ben", "ana"] * 4
    identities = [{"user_id": person.user_id, "username": person.name} for person in (ana, ben)]
    for person in (ana, ben):
        (conversation,) = [one for one in (await person.ok("GET", "/servers"))["servers"] if "kind" in one]
        assert conversation == await person.ok("GET", f"/servers/{server_id}")
        assert conversation in [reply.body for reply in replies]
        assert (conversation["kind"], conversation["owner_id"], conversation["role"]) == ("direct", None, "member")
        assert conversation["participants"] == identities
        assert [channel["name"] for channel in conversation["channels"]] == ["general"]
    starter = next(reply.body["name"] for reply in replies if reply.status == 201)  # shows the name of the other one
    told = scene.ben_socket if starter == "ben" else scene.ana_socket
    other = scene.ana_socket if starter == "ben" else scene.ben_socket
    assert (await told.receive("server:joined"))["server_id"] == server_id
    for socket in (told, other, scene.cy_socket):
        await socket.receive_none("server:joined")


@pytest.mark.portable
async def test_the_ids_of_a_conversation_are_checked(scene: Scene) -> None:
    ana, ben, cy, dee = scene.ana, scene.ben, scene.cy, scene.dee
    pair = await start(ana, ben)
    assert await start(ana, ana, ben, ben, ana, name="ignored: it exists") == pair
    store = scene.world.chat.hub.store
    await store.write(lambda db: chatrtc.Result([chatrtc.insert_user(db, f"user{n}", None, "t") for n in range(60)]))
    await store.write(lambda db: chatrtc.delete_user(db, "user0"))
    deleted = dee.user_id + 1
    many = list(range(1, 53))
    for user_ids, code, reason in (
        ([], "BAD_REQUEST", "PARTICIPANTS"), ([ana.user_id], "BAD_REQUEST", "PARTICIPANTS"),
        (many, "BAD_REQUEST", "PARTICIPANTS"), ([ben.user_id] * 101, "BAD_REQUEST", "FIELD_TYPE"),
        ([0], "BAD_REQUEST", "FIELD_SMALL"), (["2"], "BAD_REQUEST", "FIELD_TYPE"), ([None], "BAD_REQUEST", "FIELD_TYPE"),
        ([2**63], "BAD_REQUEST", "FIELD_BIG"), ("2", "BAD_REQUEST", "FIELD_TYPE"),
        ([10**9], "NOT_FOUND", "NO_USER"), ([ben.user_id, 10**9], "NOT_FOUND", "NO_USER"),
        ([deleted], "NOT_FOUND", "NO_USER"), ([dee.user_id], "FORBIDDEN", "NO_SHARED_SERVER"),
        ([ben.user_id, dee.user_id], "FORBIDDEN", "NO_SHARED_SERVER"),
    ):  # fmt: skip
        reply = await ana.call("POST", "/conversations", {"user_ids": user_ids})
        assert (reply.code, reply.body["reason"]) == (code, reason), (user_ids, reply)
        assert reply.body.get("field", "user_ids") == "user_ids"
    # Each two of the three share a server, but all three do not; and a conversation is no server that people share.
    await scene.world.place(ben, dee, name="second")
    await scene.world.place(ana, dee, name="third")
    assert refusal(await ana.call("POST", "/conversations", {"user_ids": [ben.user_id, dee.user_id]}))[1] == "NO_SHARED_SERVER"
    await start(ana, dee)
    await start(ben, dee)
    await cy.ok("DELETE", f"{scene.server}/members/{cy.user_id}")
    assert refusal(await ana.call("POST", "/conversations", {"user_ids": [cy.user_id]}))[1] == "NO_SHARED_SERVER"
    for name in ("", " ", "x" * 101, 5):
        assert (await ana.call("POST", "/conversations", {"user_ids": [ben.user_id], "name": name})).code in (
            "BAD_REQUEST",
            "TOO_LARGE",
        )


@pytest.mark.portable
async def test_a_conversation_is_named_after_the_others(scene: Scene) -> None:
    ana, ben, cy = scene.ana, scene.ben, scene.cy
    eve, group = await add_eve(scene)
    assert group["name"] == "cy, eve"
    path = f"/servers/{group['server_id']}"
    assert (await cy.ok("GET", path))["name"] == "ana, eve"
    await eve.ok("PATCH", "/users/me", {"name": "Eve " + "e" * 60})
    await cy.ok("PATCH", "/users/me", {"name": "Cy " + "\N{GRINNING FACE}" * 60})
    found = await ana.ok("GET", path)
    assert found["name"] == ("Cy " + "\N{GRINNING FACE}" * 60 + ", Eve " + "e" * 60)[:100]
    assert [one.get("name", "")[:3] for one in found["participants"]] == ["", "Cy ", "Eve"]
    seq = (await ana.ok("GET", f"{path}/changes"))["seq"]
    await eve.ok("DELETE", f"{path}/members/{eve.user_id}")
    changes = await ana.ok("GET", f"{path}/changes?after={seq}")
    assert changes["name"] == (await ana.ok("GET", path))["name"] == "Cy " + "\N{GRINNING FACE}" * 60
    await cy.ok("DELETE", f"{path}/members/{cy.user_id}")
    assert (await ana.ok("GET", path))["name"] == "ana", "alone"
    pair = await start(ana, ben)
    await ben.ok("DELETE", f"/servers/{pair['server_id']}/members/{ben.user_id}")
    left = await ana.ok("GET", f"/servers/{pair['server_id']}")
    assert left == pair | {"participants": pair["participants"][:1]}, "still named after the one who left"


@pytest.mark.portable
async def test_every_participant_renames_a_conversation(scene: Scene) -> None:
    ana, ben, cy = scene.ana, scene.ben, scene.cy
    pair, group = await start(ana, ben, name="two"), await start(ana, ben, cy, name="three")
    assert (pair["name"], group["name"], (await ben.ok("GET", f"/servers/{pair['server_id']}"))["name"]) == (
        "two",
        "three",
        "two",
    )
    assert (await start(ana, ben, cy))["server_id"] != group["server_id"], "each is a new group"
    for server_id in (pair["server_id"], group["server_id"]):
        path, seq = f"/servers/{server_id}", (await ana.ok("GET", f"/servers/{server_id}/changes"))["seq"]
        await scene.ana_socket.ok("join_server", {"server_id": server_id})
        renamed = await ben.ok("PATCH", path, {"name": "ours"})
        assert renamed == await ben.ok("GET", path)
        event = {"server_id": server_id, "name": "ours", "seq": seq + 1}
        assert await scene.ana_socket.receive("server:updated") == event
        assert (await ana.ok("GET", f"{path}/changes?after={seq}"))["name"] == "ours"
    assert refusal(await scene.dee.call("PATCH", f"/servers/{group['server_id']}", {"name": "x"})) == (403, "NOT_MEMBER")


@pytest.mark.portable
async def test_who_left_a_conversation_is_not_brought_back_by_others(scene: Scene) -> None:
    ana, ben, cy = scene.ana, scene.ben, scene.cy
    eve, _ = await add_eve(scene)
    pair, group = await start(ana, ben), await start(ana, ben, cy)
    await scene.ana_socket.receive("member:joined")  # of Eve in the class
    for conversation in (pair, group):
        path = f"/servers/{conversation['server_id']}"
        await scene.ben_socket.ok("join_server", {"server_id": conversation["server_id"]})
        await scene.ana_socket.ok("join_server", {"server_id": conversation["server_id"]})
        assert refusal(await ana.call("DELETE", f"{path}/members/{ben.user_id}"))[0] == 403
        assert refusal(await ben.call("PUT", f"{path}/members/{ben.user_id}")) == (204, ""), "a member already"
        await ben.ok("DELETE", f"{path}/members/{ben.user_id}")
        assert (await scene.ana_socket.receive("member:left"))["user_id"] == ben.user_id
        assert refusal(await ben.call("GET", path)) == (403, "NOT_MEMBER")
        assert conversation["server_id"] not in [one["server_id"] for one in (await ben.ok("GET", "/servers"))["servers"]]
        for person in (ana, cy) if conversation is group else (ana,):
            assert refusal(await person.call("PUT", f"{path}/members/{ben.user_id}")) == (403, "LEFT")
        for outsider in (eve, scene.dee):
            for user_id in (outsider.user_id, ben.user_id, ana.user_id):
                assert refusal(await outsider.call("PUT", f"{path}/members/{user_id}")) == (403, "NOT_MEMBER")
        assert refusal(await ben.call("PUT", f"{path}/members/{eve.user_id}")) == (403, "NOT_MEMBER")
    assert refusal(await ana.call("POST", "/conversations", {"user_ids": [ben.user_id]})) == (403, "LEFT")
    await scene.ben_socket.receive("server:joined", server_id=pair["server_id"])
    await scene.ben_socket.receive("server:joined", server_id=group["server_id"])
    posted = await ana.post(group["channels"][0]["channel_id"], "without Ben")
    await scene.ben_socket.receive_none("message:new", "server:joined", "member:joined")

    # Ben returns: to the group by PUT, to the conversation of two by POST.
    assert (await ben.call("PUT", f"/servers/{group['server_id']}/members/{ben.user_id}")).status == 204
    back = await scene.ana_socket.receive("member:joined")
    assert (back["server_id"], back["user_id"]) == (group["server_id"], ben.user_id)
    reply = await ben.call("POST", "/conversations", {"user_ids": [ana.user_id]})
    assert (reply.status, reply.body["server_id"]) == (200, pair["server_id"])
    assert (await scene.ana_socket.receive("member:joined"))["server_id"] == pair["server_id"]
    await scene.ben_socket.receive_none("server:joined")
    assert await start(ana, ben) == pair
    await ana.post(pair["channels"][0]["channel_id"], "together again")
    page = await ben.ok("GET", f"/channels/{group['channels'][0]['channel_id']}/messages")
    assert page["messages"] == [posted]
    assert (await ben.ok("GET", f"/channels/{group['channels'][0]['channel_id']}/read"))["unread"] == 0
    # Both leave the conversation of two. Who returns waits for the other one.
    for person in (ana, ben):
        await person.ok("DELETE", f"/servers/{pair['server_id']}/members/{person.user_id}")
    assert (await start(ana, ben))["participants"] == pair["participants"][:1]
    body = {"channel_id": pair["channels"][0]["channel_id"], "content": "hello"}
    assert refusal(await ana.call("POST", "/messages", body)) == (403, "LEFT")
    await ben.ok("PUT", f"/servers/{pair['server_id']}/members/{ben.user_id}")
    await ana.ok("POST", "/messages", body)


@pytest.mark.portable
async def test_participants_add_others_to_a_group(scene: Scene) -> None:
    ana, ben, cy, dee = scene.ana, scene.ben, scene.cy, scene.dee
    eve, _ = await add_eve(scene)
    pair, group = await start(ana, ben), await start(ana, ben, cy)
    path = f"/servers/{group['server_id']}"
    assert refusal(await ana.call("PUT", f"/servers/{pair['server_id']}/members/{eve.user_id}")) == (403, "TWO_ONLY")
    assert refusal(await ana.call("PUT", f"{path}/members/{dee.user_id}")) == (403, "NO_SHARED_SERVER")
    assert refusal(await ana.call("PUT", f"{path}/members/{10**9}")) == (404, "NO_USER")
    for user_id in (ana.user_id, ben.user_id, eve.user_id, dee.user_id, 10**9):
        for person in (ana, ben, dee):
            assert (await person.call("PUT", f"{scene.server}/members/{user_id}")).code == "FORBIDDEN", "no conversation"
    eve_socket, seq = await eve.socket(), (await ana.ok("GET", f"{path}/changes"))["seq"]
    await scene.ana_socket.ok("join_server", {"server_id": group["server_id"]})
    for _ in range(2):  # the second time changes nothing
        assert (await ben.call("PUT", f"{path}/members/{eve.user_id}")).status == 204
    joined = await eve_socket.receive("server:joined")
    assert joined == await eve.ok("GET", path)
    assert [one["user_id"] for one in joined["participants"]] == [ana.user_id, ben.user_id, cy.user_id, eve.user_id]
    event = await scene.ana_socket.receive("member:joined", server_id=group["server_id"])
    assert (event["user_id"], event["seq"]) == (eve.user_id, seq + 1)
    await eve_socket.receive_none("server:joined")
    changes = await ana.ok("GET", f"{path}/changes?after={seq}")
    assert [member["user_id"] for member in changes["members"]] == [ana.user_id, ben.user_id, cy.user_id, eve.user_id]
    assert changes["name"] == (await ana.ok("GET", path))["name"] == "ben, cy, eve"
    await eve_socket.ok("join_server", {"server_id": group["server_id"]})
    message = await eve.post(group["channels"][0]["channel_id"], "@cy hello")
    assert await scene.ana_socket.receive("message:new") == message
    assert (await scene.cy_socket.receive("mention"))["server_id"] == group["server_id"]


@pytest.mark.portable
async def test_conversations_have_limits(world: World) -> None:
    chat, (ana, ben, cy) = world.chat, await world.people("ana", "ben", "cy")
    place = await world.place(ana, ben, cy)

    def fill(db: sqlite3.Connection) -> chatrtc.Result[list[int]]:
        users = [chatrtc.insert_user(db, f"user{number}", None, "2026-01-01T00:00:00Z") for number in range(50)]
        for user_id in users:
            chatrtc.insert_member(db, place.server_id, user_id, "member", "2026-01-01T00:00:00Z")
        return chatrtc.Result(users)

    users = (await chat.hub.store.write(fill)).value
    full = await chat.start_conversation(author_id=ana.user_id, user_ids=[ben.user_id, *users[:49]])
    assert len(full.participants) == chatrtc.MAX_PARTICIPANTS
    reply = await ana.call("PUT", f"/servers/{full.server_id}/members/{cy.user_id}")
    assert (reply.code, reply.body["reason"]) == ("CONFLICT", "TOO_MANY")
    for _ in range(chatrtc.MAX_STARTED_GROUPS - 1):
        await chat.start_conversation(author_id=ana.user_id, user_ids=[ben.user_id, cy.user_id])
    reply = await ana.call("POST", "/conversations", {"user_ids": [ben.user_id, cy.user_id]})
    assert (reply.code, reply.body["reason"]) == ("CONFLICT", "TOO_MANY")
    await start(ana, cy)  # conversations of two are not counted
    await start(ben, ana, cy)
    await chat.create_server(author_id=ana.user_id, name="conversations are no owned servers")


@pytest.mark.portable
async def test_a_conversation_counts_and_searches_like_a_server(scene: Scene) -> None:
    ana, ben = scene.ana, scene.ben
    pair = await start(ana, ben)
    channel_id, path = pair["channels"][0]["channel_id"], f"/servers/{pair['server_id']}"
    first, second = await ana.post(channel_id, "a secret word"), await ana.post(channel_id, "@ben read this")
    state = await ben.ok("GET", f"/channels/{channel_id}/read")
    assert (state["unread"], state["mentions"]) == (2, 1)
    assert state in (await ben.ok("GET", "/users/me/reads"))["reads"]
    assert await found(ben, path, "secret") == ["a secret word"]
    assert await found(ben, scene.server, "secret") == []
    for request in (f"{path}/search?q=secret", f"/messages/{first['message_id']}", f"{path}/members", f"{path}/changes"):
        assert refusal(await scene.cy.call("GET", request)) == (403, "NOT_MEMBER"), request
    socket = await ben.socket(pair["server_id"])
    ack = await scene.ana_socket.ok("join_server", {"server_id": pair["server_id"], "after": first["seq"]})
    assert ack["connected_users"] == [ana.user_id, ben.user_id]
    assert ack["changes"]["messages"] == [second]
    await ben.ok("PATCH", "/users/me", {"status": "busy"})
    assert (await socket.receive("user:status"))["status"] == "busy"
    await socket.ok("typing_start", {"channel_id": channel_id})
    assert (await scene.ana_socket.receive("user:typing"))["user_id"] == ben.user_id
    await scene.cy_socket.receive_none("message:new", "mention", "user:typing")
    # It takes part in nothing that only roles allow.
    assert ana.user_id == (await ana.ok("GET", scene.server))["owner_id"]
    for method, request in (("DELETE", path), ("POST", f"{path}/invites"), ("DELETE", f"/messages/{second['message_id']}")):
        assert (await ben.call(method, request, {} if method == "POST" else None)).code == "FORBIDDEN"


@pytest.mark.portable
@pytest.mark.parametrize("name", ["three", None])
async def test_a_client_that_was_away_catches_up_with_a_conversation(scene: Scene, name: str | None) -> None:
    """Changes of each kind: a client that stayed and one that comes back at any time end in the same state."""
    ana, ben, cy = scene.ana, scene.ben, scene.cy
    eve, _ = await add_eve(scene)
    group = await start(ana, ben, cy, **({"name": name} if name else {}))
    server_id, channel_id, path = group["server_id"], group["channels"][0]["channel_id"], f"/servers/{group['server_id']}"
    stable = Replica(ana, server_id)
    stable.name = group["name"]
    await stable.connect()
    away: list[Replica] = []

    async def go_away() -> None:
        replica = Replica(ana, server_id)
        replica.name = (await ana.ok("GET", path))["name"]
        await replica.connect()
        await replica.disconnect()
        away.append(replica)

    await go_away()
    message = await ben.post(channel_id, "first")
    await cy.ok("PUT", f"/messages/{message['message_id']}/reactions/x")
    await go_away()
    await ben.ok("PUT", f"{path}/members/{eve.user_id}")
    await ben.ok("PATCH", f"/messages/{message['message_id']}", {"content": "better"})
    await go_away()
    await cy.ok("DELETE", f"{path}/members/{cy.user_id}")
    await eve.ok("PATCH", "/users/me", {"name": "Eve"})
    await go_away()
    if name:
        await eve.ok("PATCH", path, {"name": "four"})
    await cy.ok("PUT", f"{path}/members/{cy.user_id}")
    await cy.ok("DELETE", f"/messages/{(await cy.post(channel_id, 'gone'))['message_id']}")
    for replica in away:
        await replica.connect()
    await stable.receive()
    expected = await server_state(ana, server_id)
    assert expected["name"] == ("four" if name else "ben, cy, Eve")
    assert stable.requests == 0
    if not name:
        stable.name = expected["name"]  # it is made of the members, which a client has
    for replica in (stable, *away):
        assert replica.state() == expected


@pytest.mark.portable
async def test_a_conversation_without_accounts_is_deleted(scene: Scene) -> None:
    ana, ben, cy = scene.ana, scene.ben, scene.cy
    store = scene.world.chat.hub.store
    pair, group = await start(ben, cy), await start(ben, ana, cy)
    await ben.post(pair["channels"][0]["channel_id"], "hello")
    await cy.ok("DELETE", f"/servers/{pair['server_id']}/members/{cy.user_id}")

    async def servers() -> dict[int, str]:
        return {row["server_id"]: row["name"] for row in await store.read(chatrtc.load_all_servers)}

    await store.write(lambda db: chatrtc.delete_user(db, "ben"))
    assert {pair["server_id"], group["server_id"]} <= (await servers()).keys(), "Cy can still return"
    assert (await cy.call("PUT", f"/servers/{pair['server_id']}/members/{cy.user_id}")).status == 204
    assert (await cy.ok("GET", f"/servers/{pair['server_id']}"))["name"] == "ben"
    body = {"channel_id": pair["channels"][0]["channel_id"], "content": "hello?"}
    assert refusal(await cy.call("POST", "/messages", body)) == (403, "LEFT")
    assert refusal(await cy.call("POST", "/conversations", {"user_ids": [ben.user_id]})) == (404, "NO_USER")
    assert refusal(await cy.call("PUT", f"/servers/{group['server_id']}/members/{ben.user_id}")) == (404, "NO_USER")
    assert (await cy.ok("GET", f"/servers/{group['server_id']}"))["owner_id"] is None, "nobody becomes the owner"
    await cy.ok("DELETE", f"/servers/{pair['server_id']}/members/{cy.user_id}")
    socket = await scene.cy.socket(group["server_id"])
    await store.write(lambda db: chatrtc.delete_user(db, "cy"))
    await socket.closed.wait()
    assert pair["server_id"] not in await servers(), "both accounts are deleted, though Cy had left"
    await store.write(lambda db: chatrtc.delete_user(db, "ana"))
    assert group["server_id"] not in await servers()
    assert await store.read(chatrtc.check_integrity) == []


@pytest.mark.portable
async def test_a_guest_with_conversations_gets_a_sign_in_code(scene: Scene) -> None:
    body = {"name": "Tim", "code": await scene.ana.invite(scene.place.server_id)}
    tim = (await scene.world.call("POST", "/auth/guest", body)).body
    guest = Person(scene.world, "Tim", tim["user_id"], tim["token"])
    pair = await start(guest, scene.ben)
    assert pair["participants"][1] == {"user_id": tim["user_id"], "username": "Tim", "guest": True}
    assert (await scene.ana.call("POST", f"{scene.server}/members/{tim['user_id']}/link")).status == 201


@pytest.mark.portable
async def test_the_program_starts_conversations(make_world: MakeWorld) -> None:
    world = await make_world(conversations="nobody")
    chat, (ana, ben, cy) = world.chat, await world.people("ana", "ben", "cy")
    await world.place(ana, ben, cy)
    socket = await ben.socket()
    group = await chat.start_conversation(author_id=ana.user_id, user_ids=[cy.user_id, ben.user_id], name="help")
    assert (group.kind, group.owner_id, group.name) == ("direct", None, "help")
    assert await socket.receive("server:joined") == await ben.ok("GET", f"/servers/{group.server_id}")
    assert await chat.add_participant(author_id=ana.user_id, server_id=group.server_id, user_id=ben.user_id) is None
    await chat.post_message(author_id=ana.user_id, channel_id=group.channels[0].channel_id, content="hello")
    assert (await chat.rename_server(author_id=ana.user_id, server_id=group.server_id, name="more help")).name == "more help"
    eve = await world.person("eve")
    for call in (
        chat.rename_server(author_id=eve.user_id, server_id=group.server_id, name="x"),
        chat.start_conversation(author_id=ana.user_id, user_ids=[eve.user_id]),
    ):
        with pytest.raises(chatrtc.ChatError, match="FORBIDDEN"):
            await call


@pytest.mark.portable
async def test_raised_hands_are_listed_in_order(scene: Scene) -> None:
    server = {"server_id": scene.place.server_id}
    assert (await scene.cy_socket.call("hand:raise", server))["reason"] == "NOT_JOINED"
    await scene.ana.ok("PUT", f"{scene.server}/members/{scene.cy.user_id}/mute")
    assert "hands" not in await scene.cy_socket.ok("join_server", server)
    for socket in (scene.ben_socket, scene.cy_socket, scene.ana_socket, scene.ben_socket):  # the second time changes nothing
        assert await socket.ok("hand:raise", server) == {"success": True}
    hands = (await scene.ana_socket.ok("join_server", server))["hands"]
    assert [(hand["user_id"], hand["username"]) for hand in hands] == [
        (scene.ben.user_id, "ben"), (scene.cy.user_id, "cy"), (scene.ana.user_id, "ana"),
    ]  # fmt: skip
    assert all(set(hand) == {"user_id", "username", "at"} for hand in hands)
    assert [await scene.cy_socket.receive("hand:raised") for _ in range(3)] == [server | hand for hand in hands]
    await scene.cy_socket.receive_none("hand:raised")
    await scene.ben.ok("PATCH", "/users/me", {"name": "Ben Lima"})
    assert (await scene.ana_socket.ok("join_server", server))["hands"][0] == hands[0] | {"name": "Ben Lima"}
    await scene.dee_socket.receive_none("hand:raised")
    assert (await scene.dee_socket.call("hand:raise", server))["reason"] == "NOT_MEMBER"


@pytest.mark.portable
async def test_a_hand_is_lowered_by_its_owner_or_by_admins(scene: Scene) -> None:
    server = {"server_id": scene.place.server_id}
    await scene.cy_socket.ok("join_server", server)
    for socket in (scene.ana_socket, scene.ben_socket, scene.cy_socket):
        await socket.ok("hand:raise", server)
    ack = await scene.ben_socket.call("hand:lower", server | {"user_id": scene.cy.user_id})
    assert (ack["code"], ack["reason"]) == ("FORBIDDEN", "ROLE_TOO_LOW")
    await scene.ben_socket.ok("hand:lower", server | {"user_id": scene.ben.user_id})
    await scene.cy_socket.receive("hand:lowered", user_id=scene.ben.user_id)
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "admin"})
    for person in (scene.cy, scene.ana):
        for _ in range(2):  # the second time, it is not raised
            await scene.ben_socket.ok("hand:lower", server | {"user_id": person.user_id})
        await scene.cy_socket.receive("hand:lowered", user_id=person.user_id)
    await scene.cy_socket.receive_none("hand:lowered")
    for user_id, reason in ((scene.dee.user_id, "NO_MEMBER"), (10**9, "NO_MEMBER"), (0, "FIELD_SMALL"), ("all", "FIELD_TYPE")):
        assert (await scene.ben_socket.call("hand:lower", server | {"user_id": user_id}))["reason"] == reason
    assert "hands" not in await scene.ana_socket.ok("join_server", server)


@pytest.mark.portable
async def test_a_hand_is_kept_while_its_owner_reconnects(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds after the last socket has gone, it is lowered. Each absence has its own ten seconds."""
    assert chatrtc.HAND_SECONDS == 10
    monkeypatch.setattr(chatrtc, "HAND_SECONDS", 1.5)
    server = {"server_id": scene.place.server_id}
    await scene.ben_socket.ok("hand:raise", server)
    await scene.ana_socket.ok("hand:raise", server)
    began = time.monotonic()
    while time.monotonic() - began < 2:
        await scene.ben_socket.close()
        await scene.ana_socket.receive("user:disconnected")
        scene.ben_socket = await scene.ben.socket(scene.place.server_id)
        await scene.ana_socket.receive("user:connected")
    ack = await scene.ben_socket.ok("join_server", server)
    assert [hand["user_id"] for hand in ack["hands"]] == [scene.ben.user_id, scene.ana.user_id]
    second = await scene.ben.socket(scene.place.server_id)
    await scene.ben_socket.close()
    await scene.ana_socket.receive_none("hand:lowered")
    began = time.monotonic()
    await second.ok("leave_server", server)
    await scene.ana_socket.receive("hand:lowered", user_id=scene.ben.user_id)
    assert 1.4 < time.monotonic() - began < bound(2)


@pytest.mark.portable
@pytest.mark.parametrize("way", ["leaving", "removal", "ban", "deletion"])
async def test_the_hand_of_a_former_member_is_lowered_at_once(scene: Scene, way: str) -> None:
    server, ben = {"server_id": scene.place.server_id}, scene.ben
    await scene.ben_socket.ok("hand:raise", server)
    match way:
        case "leaving" | "removal":
            await (ben if way == "leaving" else scene.ana).ok("DELETE", f"{scene.server}/members/{ben.user_id}")
        case "ban":
            await scene.ana.ok("PUT", f"{scene.server}/bans/{ben.user_id}")
        case "deletion":
            await scene.world.chat.hub.store.write(lambda db: chatrtc.delete_user(db, "ben"))
    began = time.monotonic()
    await scene.ana_socket.receive("hand:lowered", user_id=ben.user_id)
    assert time.monotonic() - began < bound(1)
    assert not scene.world.chat.hub.hands


@pytest.mark.portable
async def test_hands_end_with_their_server(scene: Scene) -> None:
    for socket in (scene.ana_socket, scene.ben_socket):
        await socket.ok("hand:raise", {"server_id": scene.place.server_id})
    await scene.ana.ok("DELETE", scene.server)
    await scene.ben_socket.receive("server:deleted")
    await scene.ben_socket.receive_none("hand:lowered")
    assert not scene.world.chat.hub.hands


async def test_hands_do_not_survive_a_restart(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        ana = await world.person("ana")
        server = {"server_id": (await world.place(ana)).server_id}
        socket = await ana.socket(server["server_id"])
        await socket.ok("hand:raise", server)
        assert len((await socket.ok("join_server", server))["hands"]) == 1
    assert (await process.stop())[0] == 0
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        assert "hands" not in await (await world.socket(ana.token)).ok("join_server", server)
    assert (await process.stop())[0] == 0


@pytest.mark.portable
async def test_a_hand_is_raised_by_the_embedding_program(scene: Scene) -> None:
    chat, ids = scene.world.chat, {"author_id": scene.ben.user_id, "server_id": scene.place.server_id}
    await chat.raise_hand(**ids)
    await scene.ana_socket.receive("hand:raised", user_id=scene.ben.user_id)
    await chat.lower_hand(**ids)
    await scene.ana_socket.receive("hand:lowered", user_id=scene.ben.user_id)
    with pytest.raises(chatrtc.ChatError, match="not a member"):
        await chat.raise_hand(author_id=scene.dee.user_id, server_id=scene.place.server_id)


EVERYONE_CASES = {  # each text of a teacher -> whether it mentions everyone
    "@everyone": True, "Hello @Everyone!": True, "@EVERYONE.": True, "(@everyone)": True, "你好@everyone": True,
    "`@everyone`": False, "```\n@everyone\n```": False, "mail@everyone": False, "https://example.org/@everyone": False,
    "@everyones": False, "@every": False, "everyone": False, "\\@everyone": False,
}  # fmt: skip


@pytest.mark.portable
async def test_staff_mention_everyone(scene: Scene) -> None:
    """Sent once, with the message: no `mention`, no entry in `mentions`. From members it is plain text."""
    channel_id = scene.place.channel_id
    for text, expected in EVERYONE_CASES.items():
        message = await scene.ana.post(channel_id, text)
        assert message.get("everyone", False) == expected, text
        assert "mentions" not in message, text
        assert await scene.ben_socket.receive("message:new") == message
    await scene.ben_socket.receive_none("mention")
    assert "everyone" not in await scene.ben.post(channel_id, "@everyone")
    both = await scene.ana.post(channel_id, "@everyone and @ben")
    assert (both["everyone"], both["mentions"]) == (True, [scene.ben.user_id])
    await scene.ben_socket.receive("mention", message_id=both["message_id"])
    await scene.cy_socket.receive_none("mention")
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.cy.user_id}", {"role": "admin"})
    assert (await scene.cy.post(channel_id, "@everyone"))["everyone"]


@pytest.mark.portable
async def test_everyone_counts_as_a_mention_for_all_but_its_author(scene: Scene) -> None:
    channel_id = scene.place.channel_id

    async def mentions(*people: Person) -> list[int]:
        return [(await one.ok("GET", f"/channels/{channel_id}/read"))["mentions"] for one in people]

    first = await scene.ana.post(channel_id, "@everyone")
    both = await scene.ana.post(channel_id, "@everyone, above all @ben")
    await scene.ana.post(channel_id, "@ben")
    assert await mentions(scene.ana, scene.ben, scene.cy) == [0, 3, 2]
    reads = (await scene.cy.ok("GET", "/users/me/reads"))["reads"]
    assert [state["mentions"] for state in reads] == [2]
    edited = await scene.ana.ok("PATCH", f"/messages/{first['message_id']}", {"content": "nobody"})
    assert "everyone" not in edited and await mentions(scene.ben, scene.cy) == [2, 1]
    assert (await scene.ben_socket.receive("message:edit")) == edited
    again = await scene.ana.ok("PATCH", f"/messages/{first['message_id']}", {"content": "all: @everyone"})
    assert again["everyone"] and await mentions(scene.ben, scene.cy) == [3, 2]
    await scene.ben_socket.receive("message:edit", seq=again["seq"])
    await scene.ben_socket.receive_none("mention")
    assert scene.ben_socket.names().count("mention") == 2, "of the messages that name Ben"
    await scene.ana.ok("DELETE", f"/messages/{first['message_id']}")
    await scene.cy.ok("PUT", f"/channels/{channel_id}/read", {"message_id": both["message_id"]})
    assert await mentions(scene.ben, scene.cy) == [2, 0]
    dee = scene.dee
    await dee.ok("POST", f"/invites/{await scene.ana.invite(scene.place.server_id)}")
    assert await mentions(dee) == [0], "messages from before are read"


@pytest.mark.portable
async def test_nobody_can_be_called_everyone(world: World) -> None:
    for name in ("everyone", "Everyone", "\uff45veryone"):
        reply = await world.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
        assert (reply.code, reply.body["reason"], reply.body["field"]) == ("CONFLICT", "USERNAME_TAKEN", "username")
    derived = await world.call("POST", "/auth/register", {"name": "Everyone", "password": "correct horse"})
    assert (derived.status, derived.body["username"]) == (201, "Everyone2")


@pytest.mark.portable
async def test_the_mentions_of_everyone_are_counted_by_their_index(scene: Scene) -> None:
    """Otherwise the messages of a channel would be read one by one."""
    query = chatrtc.READ_STATE_ROWS + "WHERE channel_id = :channel_id"
    values = {"user_id": scene.ben.user_id, "channel_id": scene.place.channel_id} | chatrtc.READ_LIMITS
    plan = scene.world.chat.hub.store.read_inline(lambda db: db.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall())
    assert any("messages_everyone" in row[3] for row in plan) and not any("SCAN x" in row[3] for row in plan), plan


def ids_of(page: Any) -> list[int]:
    return [message["message_id"] for message in page["messages"]]


@pytest.mark.portable
async def test_pins_are_listed_latest_first(scene: Scene) -> None:
    ana, pins = scene.ana, f"/channels/{scene.place.channel_id}/pins"
    first, second, third = [await scene.post() for _ in range(3)]
    assert await scene.ben.ok("GET", pins) == {"messages": [], "has_more": False}
    await ana.ok("PATCH", f"/messages/{second['message_id']}", {"content": "better"})
    edited = await scene.ben_socket.receive("message:edit")
    for message in (second, third, first):
        await ana.ok("PUT", f"/messages/{message['message_id']}/pin")
    assert await scene.ben_socket.receive("message:edit") == edited | {"pinned": True, "seq": edited["seq"] + 1}, "not an edit"
    page = await scene.ben.ok("GET", pins)
    assert ids_of(page) == [first["message_id"], third["message_id"], second["message_id"]]
    assert page["messages"] == [await scene.ben.ok("GET", f"/messages/{message_id}") for message_id in ids_of(page)]
    again = await ana.call("PUT", f"/messages/{second['message_id']}/pin")
    assert (again.status, again.headers.get("Idempotent-Replayed")) == (204, "true")
    assert ids_of(await ana.ok("GET", pins)) == ids_of(page), "pinning again changes nothing"
    for _ in range(2):
        await ana.ok("DELETE", f"/messages/{third['message_id']}/pin")
    assert "pinned" not in await ana.ok("GET", f"/messages/{third['message_id']}")
    await ana.ok("PUT", f"/messages/{third['message_id']}/pin")
    assert ids_of(await ana.ok("GET", pins)) == [third["message_id"], first["message_id"], second["message_id"]]
    await scene.ben_socket.receive("message:edit", message_id=third["message_id"], pinned=True)
    await scene.ben_socket.receive("message:edit", message_id=third["message_id"])
    await scene.ben_socket.receive("message:edit", message_id=third["message_id"], pinned=True)
    await scene.ben_socket.receive_none("message:edit")


@pytest.mark.portable
async def test_a_channel_has_fifty_pins(scene: Scene) -> None:
    posted = [(await scene.post())["message_id"] for _ in range(52)]
    for message_id in posted[:50]:
        await scene.ana.ok("PUT", f"/messages/{message_id}/pin")
    refused = await scene.ana.call("PUT", f"/messages/{posted[50]}/pin")
    assert (refused.code, refused.body["reason"]) == ("CONFLICT", "TOO_MANY")
    assert (await scene.ana.call("PUT", f"/messages/{posted[0]}/pin")).status == 204, "it is pinned already"
    await scene.ana.ok("DELETE", f"/messages/{posted[7]}")  # its pin goes with it
    assert (await scene.ana.call("PUT", f"/messages/{posted[7]}/pin")).body["reason"] == "NO_MESSAGE"
    assert (await scene.ana.call("PUT", f"/messages/{posted[50]}/pin")).status == 204
    assert (await scene.ana.call("PUT", f"/messages/{posted[51]}/pin")).code == "CONFLICT"
    page = await scene.ana.ok("GET", f"/channels/{scene.place.channel_id}/pins")
    assert ids_of(page) == [posted[50], *(one for one in reversed(posted[:50]) if one != posted[7])]
    other = await scene.ana.channel(scene.place.server_id, "other")
    elsewhere = await scene.ana.post(other)
    assert (await scene.ana.call("PUT", f"/messages/{elsewhere['message_id']}/pin")).status == 204


@pytest.mark.portable
async def test_long_pins_come_in_pages(scene: Scene) -> None:
    posted = [(await scene.ana.post(scene.place.channel_id, "\U0001f600" * 4000))["message_id"] for _ in range(40)]
    for message_id in posted:
        await scene.ana.ok("PUT", f"/messages/{message_id}/pin")
    found: list[int] = []
    more, path = True, f"/channels/{scene.place.channel_id}/pins"
    while more:
        reply = await scene.ana.call("GET", path + (f"?before={found[-1]}" if found else ""))
        assert int(reply.headers["Content-Length"]) < ANSWER_MAX
        found, more = found + ids_of(reply.body), reply.body["has_more"]
    assert found == posted[::-1]
    await scene.ana.ok("DELETE", f"/messages/{found[3]}/pin")
    assert ids_of(await scene.ana.ok("GET", f"{path}?before={found[3]}")) == [], "it is not pinned"


@pytest.mark.portable
async def test_a_channel_is_cleared_in_steps(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "PURGE_STEP", 30)
    world = await make_world()
    scene = await Scene.make(world)
    other = await scene.ana.channel(scene.place.server_id, "other")
    replicas = [Replica(scene.cy, scene.place.server_id) for _ in range(2)]
    await asyncio.gather(*(replica.connect() for replica in replicas))

    def fill(db: sqlite3.Connection) -> chatrtc.Result[None]:
        for number in range(400):
            author = chatrtc.Principal(*[(scene.ana.user_id, "ana"), (scene.ben.user_id, "ben")][number % 2])
            args = chatrtc.NewMessage(other if number % 4 == 3 else scene.place.channel_id, "spam")
            chatrtc.insert_message(db, scene.place.server_id, author, args, "2026-01-01T00:00:00Z")
        return chatrtc.Result(None)

    await world.chat.hub.store.write(fill, slow=True)
    await replicas[1].disconnect()
    clear = f"/channels/{scene.place.channel_id}/messages"
    assert (await scene.ana.call("DELETE", clear)).status == 202
    page = await scene.ana.ok("GET", f"{clear}?limit=100")
    left = 301 - 30  # the first step runs at once, the newest messages first
    assert len(await channel_history(scene.ana, scene.place.channel_id)) <= left
    assert page["messages"][0]["content"] == "spam" or len(page["messages"]) < 100
    kept = await scene.post()
    await world.chat.stop()  # while messages are being deleted
    await world.chat.start()
    again = await scene.post()
    await until(lambda: not world.chat.hub.store.read_inline(chatrtc.load_pending_purge))
    assert ids_of(await scene.ben.ok("GET", clear)) == [kept["message_id"], again["message_id"]]
    assert len(await channel_history(scene.ana, other)) == 100
    await replicas[1].connect()
    await replicas[0].receive()
    await replicas[0].catch_up()  # the events before the restart are not emitted again
    expected = await server_state(scene.cy, scene.place.server_id)
    assert [replica.state() for replica in replicas] == [expected, expected]
    for _ in range(2):  # clearing twice is clearing once
        assert (await scene.ana.call("DELETE", clear)).status == 202
    await until(lambda: not world.chat.hub.store.read_inline(chatrtc.load_pending_purge))
    assert ids_of(await scene.ben.ok("GET", clear)) == []
    assert (await scene.ana.call("DELETE", f"/channels/{other}/messages")).status == 202
    await scene.ana.ok("DELETE", f"/channels/{other}")  # while it is being cleared
    await until(lambda: not world.chat.hub.store.read_inline(chatrtc.load_pending_purge))
    assert await server_state(scene.cy, scene.place.server_id)


async def insert_many(scene: Scene, count: int, author: Person | None = None, at: str = "2026-01-01T00:00:00Z") -> None:
    """Insert messages into the channel without events, in steps."""
    user_id, place = (author or scene.ana).user_id, scene.place
    row = "INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq) VALUES (?, ?, ?, ?, ?, ?)"

    def insert(db: sqlite3.Connection, number: int) -> chatrtc.Result[None]:
        last = chatrtc.load_seq(db, place.server_id)
        texts = (f"message {last + n} of the lesson, about the causes of the revolution" for n in range(1, number + 1))
        db.executemany(row, ((*place, user_id, text, at, last + n) for n, text in enumerate(texts, 1)))
        db.execute("UPDATE servers SET seq = seq + ? WHERE server_id = ?", (number, place.server_id))
        return chatrtc.Result(None)

    store = scene.world.chat.hub.store
    while count:
        step = min(count, 10_000)
        await store.write(functools.partial(insert, number=step), slow=True)
        count -= step


@pytest.mark.soak
async def test_clearing_a_million_messages_delays_nobody(scene: Scene) -> None:
    store = scene.world.chat.hub.store
    await insert_many(scene, 1_000_000)
    other = await scene.ana.channel(scene.place.server_id, "other")

    async def post_times(number: int) -> list[float]:
        times = []
        for _ in range(number):
            began = time.monotonic()
            await scene.ben.post(other)
            times.append(time.monotonic() - began)
            await asyncio.sleep(0.4)  # longer than maintenance waits: the deletion goes on
        return sorted(times)

    await until(
        lambda: store.read_inline(chatrtc.load_index_progress)[0] == store.read_inline(chatrtc.load_index_progress)[1], 300
    )
    before = await post_times(50)
    assert (await scene.ana.call("DELETE", f"/channels/{scene.place.channel_id}/messages")).status == 202
    during = await post_times(300)
    assert store.read_inline(chatrtc.load_pending_purge), "it is still being cleared"
    p50, p99 = during[150] * 1000, during[-4] * 1000
    print(f"posts: at most {before[-1] * 1000:.1f} ms before; p50 {p50:.1f} ms, p99 {p99:.1f} ms meanwhile")
    assert during[-4] < bound(0.05)


LOG_KEYS = {"entry_id", "at", "user_id", "username", "action"}


@pytest.mark.portable
async def test_the_log_has_each_action_of_admins_once(scene: Scene) -> None:
    ana, ben, cy, server, channel = scene.ana, scene.ben, scene.cy, scene.server, scene.place.channel_id
    invite = await ana.ok("POST", f"{server}/invites", {})
    zoe = await guest(scene, invite["code"], "Zoe Ray")
    other = await ana.channel(scene.place.server_id, "other")
    theirs, more = [f"/messages/{(await ben.post(channel))['message_id']}" for _ in range(2)]
    own = await scene.post()

    async def entries() -> list[Any]:
        return list((await ana.ok("GET", f"{server}/log?limit=100"))["entries"])

    before = await entries()
    assert [(entry["action"], entry.get("detail")) for entry in before] == [
        ("channel_create", "name: other"), ("invite", None), ("invite", None)
    ]  # fmt: skip
    steps: list[tuple[str, str, str, Any, Person | None, str | None]] = [
        ("pin", "PUT", f"{theirs}/pin", None, ben, "general"),
        ("unpin", "DELETE", f"{theirs}/pin", None, ben, "general"),
        ("delete_message", "DELETE", more, None, ben, "general"),
        ("clear", "DELETE", f"/channels/{channel}/messages", None, None, "general"),
        ("invite", "POST", f"{server}/invites", {"max_uses": 5}, None, "max_uses: 5"),
        ("revoke_invite", "DELETE", f"/invites/{invite['code']}", None, None, f"code: {invite['code']}"),
        ("link", "POST", f"{server}/members/{zoe.user_id}/link", None, zoe, None),
        ("remove_guests", "DELETE", f"{server}/guests", None, None, None),
        ("mute", "PUT", f"{server}/members/{ben.user_id}/mute", {"seconds": 60}, ben, "seconds: 60"),
        ("unmute", "DELETE", f"{server}/members/{ben.user_id}/mute", None, ben, None),
        ("role", "PATCH", f"{server}/members/{ben.user_id}", {"role": "admin"}, ben, "role: admin"),
        ("remove", "DELETE", f"{server}/members/{ben.user_id}", None, ben, None),
        ("ban", "PUT", f"{server}/bans/{cy.user_id}", {"delete_messages": True}, cy, "delete_messages: True"),
        ("unban", "DELETE", f"{server}/bans/{cy.user_id}", None, cy, None),
        ("channel_create", "POST", f"{server}/channels", {"name": "<b>"}, None, "name: <b>"),
        ("rules", "PATCH", f"/channels/{other}", {"name": "quiet"}, None, "other, name: quiet"),
        (
            "rules",
            "PATCH",
            f"/channels/{other}",
            {"slow_seconds": 9, "posting": "staff"},
            None,
            "quiet, posting: staff, slow_seconds: 9",
        ),
        ("rules", "PATCH", f"/channels/{other}", {"keep_days": None}, None, "quiet, keep_days: None"),
        ("channel_delete", "DELETE", f"/channels/{other}", None, None, "quiet"),
        ("rename", "PATCH", server, {"name": "lesson"}, None, "name: lesson"),
    ]
    for action, method, path, body, target, detail in steps:
        await ana.ok(method, path, body)
        entry, *rest = await entries()
        about = {} if target is None else {"target_id": target.user_id, "target_username": target.name}
        about |= {"target_name": "Zoe Ray"} if target is zoe else {}
        expected = (
            {"user_id": ana.user_id, "username": "ana", "action": action} | about | ({"detail": detail} if detail else {})
        )
        assert {key: value for key, value in entry.items() if key not in ("entry_id", "at")} == expected
        assert rest == before, action
        before = [entry, *rest]
        if method in ("PUT", "DELETE") and action not in (
            "ban",
            "clear",
            "mute",
        ):  # nothing is left to do: an error, or no change
            await ana.call(method, path, body)
            assert await entries() == before, f"{action} again"
    await ana.ok("PUT", f"{server}/bans/{cy.user_id}")
    before = await entries()
    await ana.ok("PUT", f"{server}/bans/{cy.user_id}")  # changes nothing
    assert await entries() == before
    logged = {op.logged for op in chatrtc.OPERATIONS.values() if op.logged}
    assert logged == {step[0] for step in steps}, "add a step for the action"
    assert own["message_id"] > 0


@pytest.mark.portable
async def test_the_log_leaves_out_what_members_do_themselves(scene: Scene) -> None:
    ana, server = scene.ana, scene.server
    before = await ana.ok("GET", f"{server}/log")
    own = [await person.post(scene.place.channel_id) for person in (ana, scene.ben)]
    await ana.ok("DELETE", f"/messages/{own[0]['message_id']}")
    await scene.ben.ok("DELETE", f"/messages/{own[1]['message_id']}")
    await scene.cy.ok("DELETE", f"{server}/members/{scene.cy.user_id}")
    assert (await scene.ben.call("DELETE", f"{server}/members/{ana.user_id}")).code == "FORBIDDEN"
    assert (await ana.call("PATCH", f"{server}/members/{ana.user_id}", {"role": "member"})).body["reason"] == "OWNER_STAYS"
    assert await ana.ok("GET", f"{server}/log") == before
    await ana.ok("DELETE", f"/messages/{(await scene.ben.post(scene.place.channel_id))['message_id']}")
    assert len((await ana.ok("GET", f"{server}/log"))["entries"]) == len(before["entries"]) + 1


@pytest.mark.portable
async def test_the_log_comes_in_pages_and_keeps_deleted_accounts(scene: Scene) -> None:
    ana, server = scene.ana, scene.server
    await ana.ok("PATCH", f"{server}/members/{scene.ben.user_id}", {"role": "admin"})
    await scene.ben.ok("PUT", f"{server}/bans/{scene.cy.user_id}")
    for number in range(7):
        await ana.ok("PATCH", server, {"name": f"name {number}"})
    whole = (await ana.ok("GET", f"{server}/log"))["entries"]
    assert [entry["entry_id"] for entry in whole] == sorted((entry["entry_id"] for entry in whole), reverse=True)
    found: list[Any] = []
    more = True
    while more:
        page = await ana.ok("GET", f"{server}/log?limit=4" + (f"&before={found[-1]['entry_id']}" if found else ""))
        assert 0 < len(page["entries"]) <= 4
        found, more = found + page["entries"], page["has_more"]
    assert found == whole
    await scene.world.chat.hub.store.write(lambda db: chatrtc.delete_user(db, "ben"))
    await scene.world.chat.hub.store.write(lambda db: chatrtc.delete_user(db, "cy"))
    assert (await ana.ok("GET", f"{server}/log"))["entries"] == whole, "deleted accounts keep their names"
    other = await ana.ok("POST", "/servers", {"name": "another"})
    assert await ana.ok("GET", f"/servers/{other['server_id']}/log") == {"entries": [], "has_more": False}
    assert (await ana.call("GET", f"{server}/log?limit=101")).code == "BAD_REQUEST"


@pytest.mark.portable
async def test_the_log_is_kept_for_90_days(make_world: MakeWorld) -> None:
    world = await make_world()
    scene = await Scene.make(world)
    for name in ("old", "new"):
        await scene.ana.ok("PATCH", scene.server, {"name": name})
    older = "UPDATE moderation SET at = ? WHERE detail = ?"

    def age(db: sqlite3.Connection) -> chatrtc.Result[None]:
        for days, name in ((91, "old"), (89, "new")):
            db.execute(older, (time.time() - days * 86400, f"name: {name}"))
        return chatrtc.Result(None)

    await world.chat.hub.store.write(age)
    assert len((await scene.ana.ok("GET", f"{scene.server}/log"))["entries"]) == 3
    await world.chat.stop()
    await world.chat.start()  # maintenance begins

    async def names() -> bool:
        return [one.get("detail") for one in (await scene.ana.ok("GET", f"{scene.server}/log"))["entries"]] == [
            "name: new",
            None,
        ]

    await eventually(names, "the old entry is deleted")


class Old(NamedTuple):
    """Messages of two channels, some of which are older than a limit."""

    scene: Scene
    other: int  # a channel
    old: list[int]
    new: list[int]


async def make_old(scene: Scene, days: float, number: int = 40) -> Old:
    """Insert messages into two channels, which are otherwise empty: old ones and newer ones in each."""
    await scene.ana.ok("DELETE", f"/channels/{scene.place.channel_id}/messages")
    await scene.ben_socket.receive("message:deleted")
    other = await scene.ana.channel(scene.place.server_id, "other")

    def insert(db: sqlite3.Connection, age: float) -> chatrtc.Result[list[int]]:
        author, at = chatrtc.Principal(scene.ana.user_id, "ana"), chatrtc.utc(time.time() - age * 86400)
        channels = [scene.place.channel_id, other]
        many = [chatrtc.NewMessage(channels[n % 2], f"number {n}") for n in range(number)]
        return chatrtc.Result([chatrtc.insert_message(db, scene.place.server_id, author, one, at).message_id for one in many])

    store = scene.world.chat.hub.store
    old, new = [(await store.write(functools.partial(insert, age=days + more))).value for more in (0.01, -0.01)]
    return Old(scene, other, old, new)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Look for old messages in each round of maintenance, delete few at a time, and record the rounds."""
    recorded: list[int] = []
    expire = chatrtc.expire_messages

    async def expire_and_record(hub: chatrtc.Hub) -> None:
        await expire(hub)
        recorded.append(len(recorded))

    for name, value in (("EXPIRY_INTERVAL", 1), ("MAINTENANCE_INTERVAL", 0.05), ("PURGE_STEP", 7)):
        monkeypatch.setattr(chatrtc, name, value)
    monkeypatch.setattr(chatrtc, "expire_messages", expire_and_record)
    return recorded


@pytest.mark.portable
@pytest.mark.usefixtures("rounds")
async def test_old_messages_are_deleted_as_if_by_hand(make_world: MakeWorld) -> None:
    scene = await Scene.make(await make_world(keep_days=30))
    replicas = [Replica(scene.cy, scene.place.server_id) for _ in range(2)]
    await asyncio.gather(*(replica.connect() for replica in replicas))
    await replicas[1].disconnect()
    held = await make_old(scene, 30)
    deleted = [await scene.ben_socket.receive("message:deleted") for _ in held.old]
    assert sorted(one["message_id"] for one in deleted) == held.old
    assert [one["seq"] for one in deleted] == list(range(deleted[0]["seq"], deleted[0]["seq"] + len(deleted)))
    left = [ids_of({"messages": await channel_history(scene.ana, one)}) for one in (scene.place.channel_id, held.other)]
    assert sorted(left[0] + left[1]) == held.new
    await replicas[1].connect()
    await replicas[0].receive()
    expected = await server_state(scene.cy, scene.place.server_id)
    assert [replica.state() for replica in replicas] == [expected, expected]
    await scene.ben_socket.receive_none("message:deleted")


@pytest.mark.portable
@pytest.mark.parametrize(
    "setting, limit, deleted",
    [(0, 9, [0]), (30, 9, [0]), (9, 30, [0, 1]), (9, None, [0, 1]), (0, None, []), (30, None, []), (30, 20, [])],
)
async def test_the_smaller_limit_of_channel_and_server_counts(
    make_world: MakeWorld, rounds: list[int], setting: int, limit: int | None, deleted: list[int]
) -> None:
    """The messages of the first channel, which has a limit of its own, and of the second one are ten days old."""
    scene = await Scene.make(await make_world(keep_days=setting))
    await scene.ana.ok("PATCH", f"/channels/{scene.place.channel_id}", {"keep_days": limit})
    held = await make_old(scene, 10)
    await until(lambda: not scene.world.chat.hub.store.is_busy())
    seen = len(rounds)
    await until(lambda: len(rounds) > seen + 1)
    for number, channel_id in enumerate((scene.place.channel_id, held.other)):
        left = set(ids_of({"messages": await channel_history(scene.ana, channel_id)}))
        assert set(held.new[number::2]) - left == (set(held.new[number::2]) if number in deleted else set())
        assert set(held.old[number::2]) & left == (set() if number in deleted else set(held.old[number::2]))


@pytest.mark.portable
async def test_old_messages_are_not_deleted_while_people_write(make_world: MakeWorld, rounds: list[int]) -> None:
    scene = await Scene.make(await make_world(keep_days=30))
    held = await make_old(scene, 30)
    seen = len(rounds)
    while len(rounds) < seen + 5:
        await scene.post()
    await scene.ben_socket.receive_none("message:deleted")
    for _ in held.old:
        await scene.ben_socket.receive("message:deleted")


# ---- Engine.IO and Socket.IO ----------------------------------------------------------------------------------------
# The sections Engine.IO sessions, Engine.IO server and Socket.IO server: the server that `socket_server()` returns, with raw
# clients. Order, limits, how connections end, and attacks.


class BareServer:
    """A running Socket.IO server without ChatRTC, and queues of what its handlers received."""

    def __init__(self, **options):
        options = {"ping_interval": 60, "ping_timeout": 60, **options}
        self.sio = chatrtc.socket_server(**options)
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.disconnects: asyncio.Queue[Any] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.sio.on("connect", self.connect)
        self.sio.on("disconnect", self.disconnect)
        self.sio.on("echo", self.echo)
        self.sio.on("wait", self.wait)
        self.sio.on("boom", self.boom)
        self.sio.on("*", self.other)

    async def connect(self, sid, environ, auth=None):
        self.events.put_nowait(("connect", sid, auth))
        if auth and "wait" in auth:
            await self.gate.wait()
        if auth and "boom" in auth:
            raise Boom("boom")

    async def disconnect(self, sid, reason):
        self.disconnects.put_nowait((sid, reason))

    async def echo(self, sid, *args):
        return args

    async def wait(self, sid, *args):
        await self.gate.wait()
        self.events.put_nowait(("waited", *args))

    async def boom(self, sid, *args):
        raise Boom("boom")

    async def other(self, event, sid, *args):
        return {"unknown": event}

    async def __aenter__(self):
        app, sub = web.Application(), web.Application()
        self.sio.attach(app)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, auto_decompress=False)
        self.sio.attach(sub)
        app.add_subapp("/chat", sub)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.port = self.runner.addresses[0][1]
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *_):
        self.gate.set()
        await self.sio.eio.drain(0.5)
        await self.http.close()
        await self.runner.cleanup()

    async def ws(self, query="", **options):
        path = f"/socket.io/?EIO=4&transport=websocket{query}"
        return WebSocketClient(await self.http.ws_connect(path, max_msg_size=0, **options))

    async def join(self, auth=""):
        """Return a WebSocket client that has joined the namespace."""
        ws = await self.ws()
        await ws.next()
        await ws.send("40" + auth)
        ws.sid = json.loads((await ws.next())[2:])["sid"]
        return ws

    def polling(self, query="", **options):
        return PollingClient(self, f"/socket.io/?EIO=4&transport=polling{query}", options)

    async def poller(self):
        """Return a polling client that has joined the namespace."""
        client = self.polling()
        await client.open()
        assert (await client.post("40"))[0] == 200
        _, body = await client.get()
        client.sio_sid = json.loads(body[2:])["sid"]
        return client

    async def next_disconnect(self):
        return await asyncio.wait_for(self.disconnects.get(), PATIENCE)

    async def next_event(self):
        return await asyncio.wait_for(self.events.get(), PATIENCE)

    async def is_empty(self):
        """Return whether the server has released everything of its clients within two seconds."""
        sio = self.sio
        for _ in range(200):
            rest = [sio.eio.sockets, sio.manager.rooms, sio.packet_queues, sio.environ, sio._binary_packet]
            rest += [sio.eio.per_address, sio.manager.callbacks, sio.eio.tasks]
            if not any(rest):
                return True
            await asyncio.sleep(0.01)
        return False


class WebSocketClient:
    def __init__(self, ws):
        self.ws = ws

    async def next(self):
        while True:
            message = await asyncio.wait_for(self.ws.receive(), PATIENCE)
            if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                return None
            if message.data == "2":
                await self.ws.send_str("3")
            else:
                return message.data

    async def send(self, *packets):
        for packet in packets:
            await (self.ws.send_bytes if isinstance(packet, bytes) else self.ws.send_str)(packet)

    async def ask(self, packet):
        await self.send(packet)
        return await self.next()

    async def closed(self):
        began = time.monotonic()
        while await self.next() is not None:
            assert time.monotonic() - began < PATIENCE
        return True


class PollingClient:
    def __init__(self, bare, path, options):
        self.bare, self.path, self.options = bare, path, options

    async def open(self):
        status, body = await self.get()
        assert status == 200 and body[0] == "0"
        self.sid = json.loads(body[1:])["sid"]
        self.path += f"&sid={self.sid}"

    async def request(self, method, **options):
        options = {**self.options, **options}
        call = self.bare.http.request(method, self.path, **options)
        async with asyncio.timeout(PATIENCE), call as response:
            return response.status, await response.text()

    async def get(self):
        return await self.request("GET")

    async def post(self, body, **options):
        return await self.request("POST", data=body, **options)


@pytest_asyncio.fixture
async def bare():
    async with BareServer() as bare:
        yield bare


def event(*args, ack=None):
    return f"42{'' if ack is None else ack}{json.dumps(args)}"


# Order


@pytest.mark.portable
async def test_events_are_handled_in_order_and_acked(bare):
    ws = await bare.join()
    await ws.send(event("wait", 1), event("wait", 2), event("echo", "ä", ack=0))
    bare.gate.set()
    assert await ws.next() == '430["ä"]'
    assert [await bare.next_event() for _ in range(3)][1:] == [("waited", 1), ("waited", 2)]


async def test_slow_handler_does_not_hold_up_the_heartbeat():
    async with BareServer(ping_interval=0.1, ping_timeout=0.2) as bare:
        ws = await bare.join()
        await ws.send(event("wait", 1))
        for _ in range(5):
            message = await asyncio.wait_for(ws.ws.receive(), PATIENCE)
            assert message.data == "2"
            await ws.ws.send_str("3")
        bare.gate.set()
        assert await ws.ask(event("echo", 1, ack=1)) == "431[1]"


async def test_a_full_packet_queue_pauses_reading_and_loses_nothing(bare):
    bare.sio.eio.options.frames_per_second = None
    ws = await bare.join()
    many = 3 * chatrtc.PACKET_QUEUE_LENGTH
    await ws.send(*[event("wait", n) for n in range(many)])
    queue = next(iter(bare.sio.packet_queues.values()))
    await bare.next_event()
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(queue.jobs) <= chatrtc.PACKET_QUEUE_LENGTH
    bare.gate.set()
    assert [(await bare.next_event())[1] for _ in range(many)] == list(range(many))


async def test_waiting_events_are_discarded_on_disconnect(bare):
    ws = await bare.join()
    await bare.next_event()
    await ws.send(event("wait", 1, ack=1), event("wait", 2), "3")
    while not next(iter(bare.sio.packet_queues.values())).jobs:
        await asyncio.sleep(0)
    await ws.ws.close()
    assert (await bare.next_disconnect())[1] == "transport close"
    bare.gate.set()
    assert await bare.next_event() == ("waited", 1)
    assert await bare.is_empty() and bare.events.empty()


@pytest.mark.portable
async def test_broadcasts_acks_and_emits_keep_their_order(bare):
    clients = [await bare.join(), await bare.poller()]
    sids = [clients[0].sid, clients[1].sio_sid]
    for sid in sids:
        bare.sio.enter(sid, "r")
    for n in range(100):
        bare.sio.publish("e", {"n": n}, "r")
        if n % 10 == 0:
            await bare.sio.emit("f", n, room="r")
            for sid in sids:
                await bare.sio.emit("g", n, to=sid)
    expected = []
    for n in range(100):
        expected.append(f'42["e",{{"n":{n}}}]')
        if n % 10 == 0:
            expected += [f'42["f",{n}]', f'42["g",{n}]']
    received = [await clients[0].next() for _ in expected]
    polled: list[str] = []
    while len(polled) < len(expected):
        polled += (await clients[1].get())[1].split("\x1e")
    assert received == expected
    assert [p for p in polled if p != "2"] == expected


async def test_a_room_buffer_keeps_the_order_of_all_packets_of_a_client(bare):
    """Interleaved rooms, single clients, skipped clients and changing members: each client receives its packets in order."""
    clients = [await bare.join() for _ in range(3)]
    expected: dict[str, list[str]] = {client.sid: [] for client in clients}
    rooms: dict[str, set[str]] = {"r": set(), "s": set()}
    chance = random.Random(7)
    for number in range(400):
        room, client = chance.choice("rs"), chance.choice(clients)
        match chance.randrange(10):
            case 0:
                bare.sio.enter(client.sid, room)
                rooms[room].add(client.sid)
            case 1:
                bare.sio.leave(client.sid, room)
                rooms[room].discard(client.sid)
            case 2:
                bare.sio.publish("e", number, client.sid)
                expected[client.sid].append(f'42["e",{number}]')
            case 3:
                await asyncio.sleep(0)
            case skip:
                skipped = client.sid if skip == 4 else None
                bare.sio.publish("e", number, room, skipped)
                for sid in rooms[room] - {skipped}:
                    expected[sid].append(f'42["e",{number}]')
    assert min(map(len, expected.values())) > 50
    for client in clients:
        assert [await client.next() for _ in expected[client.sid]] == expected[client.sid]


async def test_a_poll_returns_no_more_packets_than_clients_accept(bare):
    client = await bare.poller()
    for number in range(40):
        bare.sio.publish("e", number, client.sio_sid)
    sizes: list[int] = []
    received: list[str] = []
    while len(received) < 40:
        packets = [packet for packet in (await client.get())[1].split("\x1e") if packet != "2"]
        sizes.append(len(packets))
        received += packets
    assert received == [f'42["e",{number}]' for number in range(40)] and max(sizes) <= chatrtc.POLL_PACKETS


async def test_nothing_is_kept_for_empty_rooms(bare):
    ws = await bare.join()
    bare.sio.enter(ws.sid, "r")
    for number in range(3):
        bare.sio.publish("e", number, "nobody")
        bare.sio.publish("e", number, "r")
        assert await ws.next() == f'42["e",{number}]'
    assert set(bare.sio.room_buffers) <= {("/", "r")}
    await ws.ws.close()
    await bare.next_disconnect()
    assert await bare.is_empty() and not bare.sio.room_buffers


async def test_call_from_a_handler_gets_its_answer(bare):
    async def ask_client(sid):
        return await bare.sio.call("question", to=sid, timeout=PATIENCE)

    bare.sio.on("asks", ask_client)
    ws = await bare.join()
    assert await ws.ask(event("asks", ack=5)) == '421["question"]'
    assert await ws.ask('431["answer"]') == '435["answer"]'


# Rooms


async def test_publish_reaches_members_only(bare):
    a, b, c = [await bare.join() for _ in range(3)]
    for ws in (a, b):
        bare.sio.enter(ws.sid, "r")
    assert sorted(bare.sio.sids_in("r")) == sorted([a.sid, b.sid])
    bare.sio.publish("e", {"n": 1}, "r", skip_sid=a.sid)
    assert await b.next() == '42["e",{"n":1}]'
    assert await a.ask(event("echo", ack=1)) == "431[]"
    assert await c.ask(event("echo", ack=1)) == "431[]"
    bare.sio.leave(b.sid, "r")
    bare.sio.publish("e", {"n": 2}, "r")
    assert await a.next() == '42["e",{"n":2}]'
    assert await b.ask(event("echo", ack=1)) == "431[]"
    with pytest.raises(AssertionError):
        bare.sio.publish("e", {}, "")


async def test_entering_a_room_after_the_session_has_ended_leaves_nothing(bare):
    ws = await bare.join()
    bare.sio.enter(ws.sid, "r")
    assert bare.sio.sids_in("r") == [ws.sid]
    await ws.ws.close()
    await bare.next_disconnect()
    assert await bare.is_empty()
    bare.sio.enter(ws.sid, "r")
    bare.sio.leave(ws.sid, "r")
    bare.sio.enter("nobody", "r")
    assert not bare.sio.manager.rooms and bare.sio.sids_in("r") == []


@pytest.mark.portable
async def test_binary_reaches_polling_and_websocket(bare):
    ws, poll = await bare.join(), await bare.poller()
    for sid in (ws.sid, poll.sio_sid):
        bare.sio.enter(sid, "r")
    for _ in range(2):
        await bare.sio.emit("b", b"\x01\x02", room="r")
        assert await ws.next() == '451-["b",{"_placeholder":true,"num":0}]'
        assert await ws.next() == b"\x01\x02"
        got = (await poll.get())[1].split("\x1e")
        while len(got) < 2:
            got += (await poll.get())[1].split("\x1e")
        assert got == ['451-["b",{"_placeholder":true,"num":0}]', "bAQI="]


async def test_the_address_is_that_of_the_peer(bare):
    ws = await bare.join()
    assert bare.sio.address(ws.sid) == "127.0.0.1"
    assert bare.sio.get_environ(ws.sid)["REMOTE_ADDR"] == "127.0.0.1"
    assert bare.sio.address("nobody") == ""


# Invalid packets


@pytest.mark.parametrize("name", sorted(chatrtc.RESERVED))
async def test_reserved_names_reach_only_the_catch_all(bare, name):
    ws = await bare.join()
    await bare.next_event()
    assert await ws.ask(event(name, {"x": 1}, {}, ack=1)) == f'431[{{"unknown":"{name}"}}]'
    assert await ws.ask(event("echo", 1, ack=2)) == "432[1]"
    assert bare.events.empty() and bare.disconnects.empty()


@pytest.mark.parametrize("name", [1, None, True, {"a": 1}, ["connect"]])
async def test_names_that_are_not_text_reach_only_the_catch_all(bare, name):
    ws = await bare.join()
    answer = json.loads((await ws.ask(event(name, ack=1)))[3:])
    assert json.loads(answer[0]["unknown"]) == name


async def test_without_a_handler_nothing_is_answered(bare):
    del bare.sio.handlers["/"]["*"]
    ws = await bare.join()
    await ws.send(event("connect", {}, ack=1), event(3, ack=2), event("nothing", ack=3))
    assert await ws.ask(event("echo", ack=4)) == "434[]"


@pytest.mark.parametrize("text", ['"\\ud800"', "NaN", "1" * 400, "Infinity", "1e999"])
async def test_json_that_only_python_reads_reaches_the_handler(bare, text):
    ws = await bare.join()
    assert (await ws.ask(f'421["echo",{text}]')).startswith("431[")


BROKEN = [
    "", "0", "2", "5", "6", "7", "abc", "bAQID", "4", "4x", "47", "42", "42{}", "42[]", "42null",
    "42[", '42"x"', "42[" * 3 + "[" * 100000, "43", "43[]", "430[]", "431{}", "44", '44{"a":1}',
    "40[]", "401", '40"x"', "45-[]", '450-["e"]', '465-1["e"]', '459999999999-["x"]', "451-[]",
    "42" + "9" * 5000 + '["echo"]', '42["echo",' + "1" * 10000 + "]", '421-["echo"]', "40",
    b"\x01", "4²", "42٣",
]  # fmt: skip


@pytest.mark.portable
@pytest.mark.parametrize("packet", BROKEN, ids=lambda p: repr(p)[:24])
async def test_broken_packets_end_the_connection(bare, packet, caplog):
    ws = await bare.join()
    assert await ws.ask(event("echo", ack=1)) == "431[]"
    await ws.send(packet)
    assert await ws.closed()
    sid, _ = await bare.next_disconnect()
    assert sid == ws.sid and await bare.is_empty()
    assert len(caplog.records) == 1 and "Traceback" not in caplog.text


@pytest.mark.parametrize("packet", [p for p in BROKEN if p and p not in ("40", "bAQID", b"\x01")],
                         ids=lambda p: repr(p)[:24])  # fmt: skip
async def test_broken_packets_end_polling(bare, packet):
    client = await bare.poller()
    assert (await client.post(event("echo", ack=1)))[0] == 200
    status, body = await client.post(packet)
    assert status == 400 and json.loads(body)["code"] == "BAD_REQUEST"
    assert (await client.get())[0] == 400
    assert (await bare.next_disconnect())[0] == client.sio_sid and await bare.is_empty()


BAD_BINARY = [
    ['451-["echo",{"_placeholder":true,"num":0}]', event("echo")],
    ['451-["echo",{"_placeholder":true,"num":1}]', b"x"],
    ['451-["echo",{"_placeholder":true,"num":"x"}]', b"x"],
    ['451-["echo",{"_placeholder":true,"num":0}]', "40"],
    ['455-["echo"]', b"x", "40"],
]


@pytest.mark.parametrize("packets", BAD_BINARY, ids=range(len(BAD_BINARY)))
async def test_bad_attachments_end_the_connection(bare, packets):
    ws = await bare.join()
    good = ['451-7["echo",{"_placeholder":true,"num":0}]', b"good"]
    await ws.send(*good)
    assert (await ws.next(), await ws.next()) == ('461-7[{"_placeholder":true,"num":0}]', b"good")
    await ws.send(*packets)
    assert await ws.closed() and (await bare.next_disconnect())[0] == ws.sid
    assert await bare.is_empty()


@pytest.mark.parametrize(
    ("count", "size", "code"), [(5, 1, "BAD_REQUEST"), (100, 9000, "BAD_REQUEST"), (2, 70000, "TOO_LARGE")]
)
async def test_too_many_or_too_large_attachments_are_rejected_and_not_kept(bare, count, size, code):
    ws = await bare.join()
    places = json.dumps([{"_placeholder": True, "num": number} for number in range(count)])
    await ws.send(f'45{count}-7["echo",{places}]', *[b"x" * size] * (count - 1))
    waiting = bare.sio._binary_packet
    await until(lambda: any(len(packet.attachments) == count - 1 for packet in waiting.values()))
    (packet,) = waiting.values()
    assert sum(map(len, filter(None, packet.attachments))) <= 131072
    answer = await ws.ask(b"x" * size)
    assert answer.startswith("437[")
    (ack,) = json.loads(answer[3:])
    assert set(ack) == {"success", "error", "code"} and (ack["success"], ack["code"]) == (False, code)
    await ws.send(f'45{count}-["echo",{places}]', *[b"x" * size] * count)
    name, failure = json.loads((await ws.next())[2:])
    assert (name, failure["event"], failure["code"]) == ("error", "echo", code)
    assert await ws.ask(event("echo", 1, ack=8)) == "438[1]"


async def test_too_many_attachments_by_polling_are_rejected(bare):
    client = await bare.poller()
    assert (await client.post("\x1e".join(['455-7["echo"]', *["bAQI="] * 5, event("echo", 1, ack=8)])))[0] == 200
    got: list[str] = []
    while len(got) < 2:
        got += (await client.get())[1].split("\x1e")
    assert json.loads(got[0][3:])[0]["code"] == "BAD_REQUEST" and got[1] == "438[1]"


async def test_no_ghosts_after_close_or_second_connect(bare):
    for packets in (["1", "40"], ["41", "1", "40"]):
        ws = await bare.ws()
        await ws.next()
        await ws.send(*packets)
        assert await ws.closed()
    assert await bare.is_empty()
    client = bare.polling()
    await client.open()
    assert (await client.post("1\x1e40"))[0] == 400
    assert await bare.is_empty() and bare.events.empty()


async def test_events_outside_the_namespace_are_ignored(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send(event("echo", ack=1), "40")
    assert (await ws.next()).startswith("40")
    assert await ws.ask("40/x,") == '44/x,{"message":"Invalid namespace"}'


async def test_a_client_that_disconnects_while_connecting_leaves_no_ghost(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send('40{"wait":1}')
    assert (await bare.next_event())[0] == "connect"
    await ws.ws.close()
    while bare.sio.eio.sockets:
        await asyncio.sleep(0)
    bare.gate.set()
    await bare.next_disconnect()
    assert await bare.is_empty()


async def test_a_failing_connect_handler_ends_the_connection(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send('40{"boom":1}')
    assert await ws.closed() and await bare.is_empty()


async def test_a_failing_handler_harms_nothing_else(bare, caplog):
    ws = await bare.join()
    await ws.send(*[event("boom", ack=1)] * 100, event("boom"))
    for _ in range(100):
        (ack,) = json.loads((await ws.next())[3:])
        assert (ack["success"], ack["code"]) == (False, "INTERNAL_ERROR") and "boom" not in ack["error"]
    name, failure = json.loads((await ws.next())[2:])
    assert (name, failure["event"], failure["code"]) == ("error", "boom", "INTERNAL_ERROR")
    assert await ws.ask(event("echo", ack=2)) == "432[]"
    assert 1 <= len(caplog.records) <= 30


async def test_a_handler_may_raise_a_chat_error(bare):
    async def no(sid):
        raise chatrtc.ChatError("CONFLICT", "Not now.")

    bare.sio.on("no", no)
    ws = await bare.join()
    assert await ws.ask(event("no", ack=1)) == '431[{"success":false,"error":"Not now.","code":"CONFLICT"}]'


async def test_too_many_frames_end_the_connection():
    async with BareServer(frames_per_second=10) as bare:
        ws = await bare.join()
        await ws.send(*[event("echo")] * 30)
        assert await ws.ask(event("echo", ack=1)) == "431[]"
        await ws.send(*[event("echo")] * 30)
        assert await ws.closed() and (await bare.next_disconnect())[0] == ws.sid
        client = await bare.poller()
        status, body = await client.post("\x1e".join([event("echo")] * 60))
        assert status == 429 and json.loads(body)["code"] == "RATE_LIMITED"


# Polling


@pytest.mark.portable
async def test_many_packets_in_one_post(bare):
    client = await bare.poller()
    assert (await client.post("\x1e".join(event("echo", n, ack=n) for n in range(256))))[0] == 200
    got: list[str] = []
    while len(got) < 256:
        got += (await client.get())[1].split("\x1e")
    assert got == [f"43{n}[{n}]" for n in range(256)]
    assert (await client.post("\x1e".join([event("echo")] * 257)))[0] == 413


@pytest.mark.parametrize("status, kwargs", [
    (413, {"data": b"4" * 131073}),
    (400, {"data": b""}),
    (400, {"data": b"4\xff"}),
    (415, {"data": b"42", "headers": {"Content-Encoding": "gzip"}}),
])  # fmt: skip
async def test_bad_posts_are_rejected_at_once(bare, status, kwargs):
    client = await bare.poller()
    assert (await client.post(event("echo")))[0] == 200
    got, body = await client.request("POST", **kwargs)
    assert got == status and set(json.loads(body)) == {"error", "code"}
    assert (await client.get())[0] == 400 and await bare.is_empty()


async def raw(bare, text):
    reader, writer = await asyncio.open_connection("127.0.0.1", bare.port)
    writer.write(text.encode())
    answer = await asyncio.wait_for(reader.read(4000), PATIENCE)
    writer.close()
    return answer


async def test_posts_without_a_length_and_without_a_body(bare, monkeypatch):
    monkeypatch.setattr(chatrtc, "POST_SECONDS", 0.1)
    for header in ("Transfer-Encoding: chunked", "Content-Length: 131073", "Content-Length: 9"):
        client = await bare.poller()
        text = f"POST {client.path} HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n"
        assert b"HTTP/1.1 4" in await raw(bare, text)
    assert await bare.is_empty()


async def test_an_incomplete_body(bare, caplog):
    client = await bare.poller()
    text = f"POST {client.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n42["
    _, writer = await asyncio.open_connection("127.0.0.1", bare.port)
    writer.write(text.encode())
    while not bare.sio.eio.sockets[client.sid].posting:
        await asyncio.sleep(0)
    writer.close()
    assert (await bare.next_disconnect())[0] == client.sio_sid and await bare.is_empty()
    assert "Traceback" not in caplog.text


async def test_two_polls_end_the_session_but_a_lost_poll_does_not(bare):
    client = await bare.poller()
    lost = asyncio.create_task(client.get())
    session = bare.sio.eio.sockets[client.sid]
    while session.wakeup is None:
        await asyncio.sleep(0)
    lost.cancel()
    while session.has_poll():
        await asyncio.sleep(0)
    bare.sio.publish("e", 1, client.sio_sid)
    assert (await client.get())[1] == '42["e",1]'
    first = asyncio.create_task(client.get())
    while not session.has_poll():
        await asyncio.sleep(0)
    assert (await client.get())[0] == 400
    assert (await first) == (200, "1")


async def test_http_errors_are_json(bare):
    for path in ("", "?EIO=3&transport=polling", "?EIO=4&transport=x", "?EIO=4&transport=polling&sid=x"):
        async with bare.http.get("/socket.io/" + path) as response:
            assert response.status == 400 and set(await response.json()) == {"error", "code"}
    async with bare.http.get("/chat/socket.io?EIO=4&transport=polling") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("forwarded", "address"),
    {
        "": "127.0.0.1", "203.0.113.9": "203.0.113.9", "198.51.100.1, 203.0.113.9": "203.0.113.9",
        "203.0.113.9, 10.1.2.3": "203.0.113.9", "10.1.2.3, 10.1.2.4": "10.1.2.3", "garbage": "127.0.0.1",
        "203.0.113.9, garbage": "127.0.0.1", "203.0.113.9,,": "127.0.0.1", " 203.0.113.9:4711 ": "203.0.113.9",
        "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "[2001:db8:1:2::9]:443": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64",
        "::ffff:203.0.113.9": "203.0.113.9", "::ffff:10.0.0.1": "10.0.0.1", "unknown": "127.0.0.1", "9" * 4000: "127.0.0.1",
        "203.0.113.9," + ",".join(["10.0.0.1"] * 40): "10.0.0.1", "1.2.3.4\t": "1.2.3.4", "\"1.2.3.4\"": "127.0.0.1",
    }.items(),
)  # fmt: skip
async def test_a_trusted_proxy_reports_the_address_of_a_client(forwarded: str, address: str):
    async with BareServer(proxies=[chatrtc.parse_network("127.0.0.1"), chatrtc.parse_network("10.0.0.0/8")]) as bare:
        ws = await bare.ws(headers={"X-Forwarded-For": forwarded})
        await ws.next()
        await ws.ask("40")
        assert list(bare.sio.eio.per_address) == [address]
    async with BareServer(proxies=[chatrtc.parse_network("10.0.0.0/8"), None]) as bare:
        await (await bare.ws(headers={"X-Forwarded-For": forwarded})).next()
        assert list(bare.sio.eio.per_address) == ["127.0.0.1"], "the header of another peer is ignored"


async def test_repeated_forwarded_headers_are_one_list():
    async with BareServer(proxies=[chatrtc.parse_network("127.0.0.1")]) as bare:
        headers = [("X-Forwarded-For", "198.51.100.1"), ("X-Forwarded-For", "203.0.113.9")]
        await (await bare.ws(headers=headers)).next()
        assert list(bare.sio.eio.per_address) == ["203.0.113.9"]


async def test_anonymous_sessions_do_not_use_up_the_limit_of_others(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    engine, (ana, ben) = world.chat.sio.eio, await world.people("ana", "ben")
    engine.options.max_sessions_per_address, engine.options.max_anonymous_per_address = 2, 3
    first = await ana.socket(transports=["websocket"])
    crowd = [await world.socket(transports=["websocket"]) for _ in range(9)]
    second = await ben.socket(transports=["websocket"])
    for socket in crowd[:6]:
        await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    await first.ok("ping")
    await second.ok("ping")
    assert len(engine.anonymous) <= 3
    with pytest.raises(socketio.exceptions.ConnectionError):
        await ben.socket(transports=["websocket"])
    engine.options.max_sessions_per_address, engine.options.max_sessions = 9, 4 * 2
    for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
        url = f"{world.url}/socket.io/?EIO=4&transport=polling"
        async with world.at(address) as elsewhere, elsewhere.session.get(url) as response:
            assert response.status == 200
    assert len(engine.anonymous) == 2, "at most one in four sessions, of all addresses together"
    await first.ok("ping")


HOSTS = {
    "127.0.0.1:9": True, "localhost:3000": True, "LOCALHOST": True, "chat.localhost": True, "localhost.": True,
    "[::1]:80": True, "127.8.9.1": True, "chat.example": True, "cors.example:8080": True, "evil.example": False,
    "evil.example:80": False,
    "localhost.evil.example": False, "127.0.0.1.evil.example": False, "192.0.2.1": False, "[2001:db8::1]": False,
    "h" * 900: False, "::1": False, "a b": False, "localhost:80:80": False,
}  # fmt: skip


@pytest.mark.parametrize(("host", "allowed"), HOSTS.items())
async def test_a_loopback_server_accepts_only_its_own_host_names(make_world: MakeWorld, host: str, allowed: bool) -> None:
    """A page cannot reach the server by a name of its own that resolves to 127.0.0.1 (DNS rebinding)."""
    world = await make_world(public_url="https://Chat.example/x", cors_origin=["https://cors.example"])
    reply = await world.call("GET", "/healthz", headers={"Host": host})
    assert (reply.status, reply.body.get("reason")) == ((200, None) if allowed else (403, "HOST"))
    sockets = f"{world.url}/socket.io/?EIO=4&transport="
    async with world.session.get(sockets + "polling", headers={"Host": host}) as response:
        assert response.status == (200 if allowed else 403)
    if not allowed:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await world.session.ws_connect(sockets + "websocket", headers={"Host": host})


async def test_a_server_outside_loopback_accepts_any_host_name(make_world: MakeWorld, tmp_path: Path) -> None:
    for name, value in {"host": "0.0.0.0", "lan": True, "trusted_proxy": ["127.0.0.1"]}.items():
        world = await make_world(database=str(tmp_path / f"{name}.db"), **{name: value})
        assert (await world.call("GET", "/healthz", headers={"Host": "chat.example"})).status == 200


ORIGINS = [  # Origin header, Host header, forwarded headers, whether it is allowed
    ("http://x.example:3000", "x.example:3000", {}, True),
    ("HTTP://X.example:3000", "x.EXAMPLE:3000", {}, True),
    ("https://x.example", "x.example:443", {}, True),
    ("https://x.example", "x.example", {}, True),
    ("http://x.example:80", "x.example", {}, True),
    ("https://x.example", "x.example:80", {}, False),
    ("https://x.example:444", "x.example", {}, False),
    ("javascript://127.0.0.1", "127.0.0.1", {}, False),
    ("ftp://x.example", "x.example", {}, False),
    ("null", "x.example", {}, False),
    ("", "x.example", {}, False),
    ("https://", "x.example", {}, False),
    ("x.example", "x.example", {}, False),
    ("https://x.example/", "x.example", {}, False),
    ("https://x.example, https://x.example", "x.example", {}, False),
    ("https://u@x.example", "x.example", {}, False),
    ("https://ok.example:443", "x.example", {}, True),
    ("https://ok.example", "x.example", {}, True),
    ("http://ok.example", "x.example", {}, False),
    ("https://x.example", "x.example", {"Proto": "https"}, True),
    ("https://x.example", "x.example", {"Proto": "wss"}, True),
    ("http://x.example", "x.example", {"Proto": "https"}, False),
    ("https://x.example", "x.example", {"Proto": "http"}, False),
    ("https://y.example", "127.0.0.1:3000", {"Proto": "https", "Host": "y.example"}, True),
    ("https://y.example", "127.0.0.1:3000", {"Host": "evil.example, y.example"}, True),
    ("https://y.example", "y.example", {"Proto": "nonsense", "Host": "non sense"}, True),
]


@pytest.mark.parametrize("number", range(len(ORIGINS)))
async def test_other_origins_are_rejected(make_world: MakeWorld, number: int) -> None:
    origin, host, forwarded, allowed = ORIGINS[number]
    trust = {"trusted_proxy": ["127.0.0.0/8"]} if forwarded else {"host": "0.0.0.0"}
    world = await make_world(cors_origin=["https://OK.example"], **trust)
    headers = {"Origin": origin, "Host": host} | {f"X-Forwarded-{name}": value for name, value in forwarded.items()}
    reply = await world.call("GET", "/healthz", headers=headers)
    assert (reply.status, reply.body.get("reason")) == ((200, None) if allowed else (403, "ORIGIN"))
    assert reply.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
    async with world.session.get(f"{world.url}/socket.io/?EIO=4&transport=polling", headers=headers) as response:
        assert response.status == (200 if allowed else 403)


async def test_origins():
    async with BareServer(origins=["https://good.example"]) as bare:
        same = f"http://127.0.0.1:{bare.port}"
        for origin, status in [
            ("https://good.example", 200), (same, 200), ("null", 403), ("https://evil.example", 403),
            ("https://good.example.evil", 403), (f"{same}.evil", 403), ("http://[", 403),
        ]:  # fmt: skip
            client = bare.polling(headers={"Origin": origin})
            got, body = await client.get()
            assert got == status and (status == 200 or json.loads(body)["code"] == "FORBIDDEN")
            if status == 200:
                assert (await (await bare.ws(headers={"Origin": origin})).next())[0] == "0"
            else:
                with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                    await bare.ws(headers={"Origin": origin})
                assert caught.value.status == 403
        for origin, allowed in [("https://good.example", True), ("https://evil.example", False)]:
            async with bare.http.options("/socket.io/", headers={"Origin": origin}) as response:
                assert ("Access-Control-Allow-Methods" in response.headers) is allowed
                assert "Access-Control-Allow-Credentials" not in response.headers


async def test_the_number_of_sessions_is_limited():
    async with BareServer(max_sessions=3, max_sessions_per_address=2) as bare:
        first, second = await bare.join(), await bare.join()
        assert (await bare.polling().get())[0] == 429
        await first.ws.close()
        assert (await bare.next_disconnect())[0] != second.sid
        client = await bare.poller()
        bare.sio.eio.options.max_sessions = 2
        status, body = await bare.polling().get()
        assert status == 503 and json.loads(body)["code"] == "UNAVAILABLE"
        await client.post("1")
        await bare.next_disconnect()
        bare.sio.eio.options.max_sessions = 3
        await bare.poller()


# Upgrade


async def upgrade(bare, client):
    ws = await bare.ws(f"&sid={client.sid}")
    assert await ws.ask("2probe") == "3probe"
    return ws


async def test_upgrade_under_fire_keeps_the_order(bare):
    client = await bare.poller()
    bare.sio.enter(client.sio_sid, "r")
    poll, received, count = asyncio.create_task(client.get()), [], 0

    def fire(times):
        nonlocal count
        for _ in range(times):
            bare.sio.publish("e", count, "r")
            count += 1

    fire(10)
    ws = await upgrade(bare, client)
    fire(10)
    received += (await poll)[1].split("\x1e")
    await ws.send("5")
    fire(10)
    while not bare.sio.eio.sockets[client.sid].upgraded:
        fire(1)
        await asyncio.sleep(0)
    fire(10)
    while len([h for h in received if h != "6"]) < count:
        received.append(await ws.next())
    assert [h for h in received if h != "6"] == [f'42["e",{n}]' for n in range(count)]
    assert (await client.get())[0] == 400
    assert await ws.ask(event("echo", ack=1)) == "431[]"


async def test_polling_goes_on_until_the_probe(bare):
    client = await bare.poller()
    ws = await bare.ws(f"&sid={client.sid}")
    poll = asyncio.create_task(client.get())
    while not bare.sio.eio.sockets[client.sid].has_poll():
        await asyncio.sleep(0)
    bare.sio.publish("e", 1, client.sio_sid)
    assert await poll == (200, '42["e",1]')
    assert await ws.ask("2probe") == "3probe" and await client.get() == (200, "6")


async def test_only_one_upgrade_at_a_time(bare):
    client = await bare.poller()
    pair = await asyncio.gather(*[bare.ws(f"&sid={client.sid}") for _ in range(2)])
    answers = await asyncio.gather(*[ws.ask("2probe") for ws in pair])
    assert sorted(answers, key=str) == ["3probe", None]
    winner = pair[answers.index("3probe")]
    await winner.send("5")
    assert await winner.ask(event("echo", ack=1)) == "431[]"


async def test_a_failed_upgrade_leaves_polling_intact(bare):
    client = await bare.poller()
    ws = await upgrade(bare, client)
    await ws.ws.close()
    while bare.sio.eio.sockets[client.sid].upgrading:
        await asyncio.sleep(0)
    bare.sio.publish("e", 1, client.sio_sid)
    assert (await client.get())[1] == '42["e",1]'


# How connections end


@pytest.mark.parametrize("flushed", [True, False])
async def test_disconnecting_a_websocket(bare, flushed):
    ws, other = await bare.join(), await bare.join()
    for client in (ws, other):
        bare.sio.enter(client.sid, "r")
    bare.sio.publish("before", 1, "r")
    received = [await ws.next()] if flushed else []
    bare.sio.disconnect_now(ws.sid)
    bare.sio.publish("after", 1, "r")
    assert bare.sio.sids_in("r") == [other.sid]
    while (packet := await ws.next()) is not None:
        received.append(packet)
    assert received == ['42["before",1]', "41"]
    assert (await bare.next_disconnect())[0] == ws.sid
    assert [await other.next(), await other.next()] == ['42["before",1]', '42["after",1]']
    bare.sio.disconnect_now(ws.sid)
    bare.sio.disconnect_now("nobody")


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("pending", [True, False])
async def test_disconnecting_a_polling_client(bare, waiting, pending):
    client = await bare.poller()
    poll = asyncio.create_task(client.get()) if pending else None
    while pending and not bare.sio.eio.sockets[client.sid].has_poll():
        await asyncio.sleep(0)
    if waiting:
        bare.sio.publish("before", 1, client.sio_sid)
    bare.sio.disconnect_now(client.sio_sid)
    assert await (poll or client.get()) == (200, '42["before",1]\x1e41' if waiting else "41")
    assert (await client.get())[0] == 400 and (await client.post(event("echo")))[0] == 400
    assert (await bare.next_disconnect())[0] == client.sio_sid and await bare.is_empty()


@pytest.mark.parametrize("last", ["poll", "5"])
async def test_disconnecting_during_an_upgrade(bare, last):
    client = await bare.poller()
    ws = await upgrade(bare, client)
    bare.sio.disconnect_now(client.sio_sid)
    bare.sio.publish("after", 1, client.sio_sid)
    if last == "poll":
        assert await client.get() == (200, "41")
    else:
        assert await ws.ask("5") == "41"
    assert await ws.closed()
    assert (await client.get())[0] == 400 and await bare.is_empty()


async def join_without_reading(bare, receive=4096):
    """Return a raw WebSocket client that has joined the namespace and reads nothing more."""
    while not bare.events.empty():
        bare.events.get_nowait()
    sock = socket_module.socket()
    sock.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_RCVBUF, receive)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", bare.port))
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13"
    head = f"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}"
    text = f"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\n{head}\r\n\r\n".encode()
    await loop.sock_sendall(sock, text)
    while b"pingInterval" not in await loop.sock_recv(sock, 4096):
        pass
    await loop.sock_sendall(sock, masked("40"))
    _, sid, _ = await bare.next_event()
    while not bare.sio.manager.is_connected(sid, "/"):
        await asyncio.sleep(0)
    return sock, sid


def masked(text):
    return struct.pack("!BB", 0x81, 0x80 | len(text)) + b"\0\0\0\0" + text.encode()


async def test_disconnecting_a_client_that_does_not_read(bare):
    sock, sid = await join_without_reading(bare)
    while not (tcp := next(iter(bare.sio.eio.sockets.values())).tcp).get_write_buffer_size():
        bare.sio.publish("e", "x" * 50000, sid)
        await asyncio.sleep(0)
    began = time.monotonic()
    bare.sio.disconnect_now(sid)
    assert (await bare.next_disconnect())[0] == sid and time.monotonic() - began < bound(0.2)
    assert await bare.is_empty() and time.monotonic() - began < bound(1.0)
    assert tcp.is_closing()
    sock.close()


async def test_the_buffer_of_a_client_that_never_reads_is_bounded(bare):
    sock, sid = await join_without_reading(bare)
    healthy = await bare.join()
    for ws in (sid, healthy.sid):
        bare.sio.enter(ws, "r")
    sent = 0
    while bare.disconnects.empty():
        bare.sio.publish("e", "x" * 50000, "r")
        assert len(await healthy.next()) > 50000
        sent += 1
        assert sent < 500
    assert (await bare.next_disconnect()) == (sid, "transport error")
    assert await healthy.ask(event("echo", ack=1)) == "431[]"
    sock.close()


async def test_the_buffer_of_a_client_that_never_polls_is_bounded(bare):
    client, other = await bare.poller(), await bare.poller()
    for n in range(chatrtc.BACKLOG_PACKETS + 1):
        bare.sio.publish("e", n, client.sio_sid)
    assert (await bare.next_disconnect())[0] == client.sio_sid
    for _ in range(12):
        bare.sio.publish("e", "x" * 100000, other.sio_sid)
    assert (await bare.next_disconnect())[0] == other.sio_sid
    assert await bare.is_empty()


async def test_pongs_do_not_keep_a_client_that_never_polls_connected():
    async with BareServer(ping_interval=0.1, ping_timeout=0.2) as bare:
        client = bare.polling()
        await client.open()
        await client.post("40")
        for _ in range(40):
            if (await client.post("3"))[0] == 400:
                break
            await asyncio.sleep(0.02)
        assert (await bare.next_disconnect())[1] == "ping timeout" and await bare.is_empty()


async def test_frozen_clients_are_found_in_time():
    async with BareServer(ping_interval=0.3, ping_timeout=0.2) as bare:
        began = time.monotonic()
        sock, sid = await join_without_reading(bare)
        poller = await bare.poller()
        disconnects = {(await bare.next_disconnect()), (await bare.next_disconnect())}
        assert disconnects == {(sid, "ping timeout"), (poller.sio_sid, "ping timeout")}
        assert 0.5 <= time.monotonic() - began < bound(1.0) and await bare.is_empty()
        sock.close()


async def test_a_paused_server_does_not_drop_its_clients():
    async with BareServer(ping_interval=0.1, ping_timeout=0.2) as bare:
        ws = await bare.join()
        assert (await asyncio.wait_for(ws.ws.receive(), PATIENCE)).data == "2"
        time.sleep(1.5)  # noqa: ASYNC251
        await ws.send("3")
        assert (await asyncio.wait_for(ws.ws.receive(), PATIENCE)).data == "2"
        await ws.send("3")
        assert await ws.ask(event("echo", ack=1)) == "431[]"


async def test_sessions_that_never_connect_are_closed():
    async with BareServer(connect_timeout=0.2) as bare:
        joined, ws, client = await bare.join(), await bare.ws(), bare.polling()
        await client.open()
        assert (await ws.next())[0] == "0" and await ws.closed()
        left = await bare.join()
        await left.send("41")
        assert await left.closed()
        assert (await client.get()) in [(200, "1"), (400, (await client.get())[1])]
        assert await joined.ask(event("echo", ack=1)) == "431[]"


async def test_drain_notifies_all_clients_and_accepts_no_more(bare):
    ws, client = await bare.join(), await bare.poller()
    poll = asyncio.create_task(client.get())
    while not bare.sio.eio.sockets[client.sid].has_poll():
        await asyncio.sleep(0)
    sock, sid = await join_without_reading(bare)
    began = time.monotonic()
    listener = asyncio.create_task(ws.closed())
    await bare.sio.eio.drain(30)
    assert await listener and time.monotonic() - began < bound(1.2)
    assert (await poll)[0] == 400  # no CLOSE: after one the Python client never reconnects
    disconnects = {(await bare.next_disconnect())[0] for _ in range(3)}
    assert disconnects == {ws.sid, client.sio_sid, sid} and await bare.is_empty()
    assert (await bare.polling().get())[0] == 503
    sock.close()


async def test_oversized_messages_end_the_connection(bare):
    ws = await bare.join()
    fits = event("echo", "x" * (131072 - 20), ack=1)
    assert (await ws.ask(fits)).startswith('431["xxx')
    await ws.send("4" * 131073)
    assert await ws.closed() and (await bare.next_disconnect())[0] == ws.sid


@pytest.mark.parametrize("frame", [b"\x89\x80\0\0\0\0", b"\x8a\x80\0\0\0\0"], ids=["ping", "pong"])
async def test_control_frames_count(bare, frame):
    bare.sio.eio.options.frames_per_second = 10
    sock, sid = await join_without_reading(bare)
    for _ in range(100):
        await asyncio.get_running_loop().sock_sendall(sock, frame)
    assert (await bare.next_disconnect()) == (sid, "transport error")
    sock.close()


async def test_websocket_compression_is_off(bare):
    ws = await bare.ws(compress=15)
    assert (await ws.next())[0] == "0" and ws.ws.compress == 0


# Engine.IO handlers, and the client of python-socketio


async def test_engine_handlers_can_be_replaced(bare):
    async def message(sid, data):
        await bare.sio.eio.send(sid, data)

    bare.sio.eio.on("message", message)
    ws = await bare.ws()
    await ws.next()
    assert await ws.ask("4hello") == "4hello" and await ws.ask(b"\x01\x02") == b"\x01\x02"


@pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]])
async def test_the_client_of_python_socketio(bare, transports):
    client = socketio.AsyncClient(reconnection=False)
    await client.connect(f"http://127.0.0.1:{bare.port}", transports=transports)
    assert await client.call("echo", {"a": b"\x01"}, timeout=PATIENCE) == {"a": b"\x01"}
    assert await client.call("nope", timeout=PATIENCE) == {"unknown": "nope"}
    await client.disconnect()
    await bare.next_disconnect()
    assert await bare.is_empty()


async def test_a_server_with_an_incompatible_library_does_not_start(monkeypatch):
    assert chatrtc.missing_private_names() == []
    monkeypatch.setitem(chatrtc.PRIVATE_NAMES, socketio.AsyncServer, "_no_such_name")
    with pytest.raises(chatrtc.StartError, match=r"^.*AsyncServer\._no_such_name$"):
        chatrtc.socket_server()


# ---- Hub ------------------------------------------------------------------------------------------------------------
# Listeners of the embedding program.


@pytest.mark.portable
async def test_a_listener_receives_the_events_of_sockets(world: World) -> None:
    published: asyncio.Queue[Any] = asyncio.Queue()

    @world.chat.on("message:new")
    async def listen(payload: Any) -> None:
        await published.put(payload)

    ana = await world.person("ana")
    place = await world.place(ana)
    socket = await ana.socket(place.server_id)
    posted = await world.chat.post_message(author_id=ana.user_id, channel_id=place.channel_id, content="by program")
    received = await socket.receive("message:new")
    assert received == msgspec.to_builtins(posted) == await asyncio.wait_for(published.get(), PATIENCE)


@pytest.mark.portable
async def test_a_slow_listener_delays_no_other(world: World) -> None:
    received: dict[str, list[str]] = {"slow": [], "quick": []}
    gate = asyncio.Event()

    @world.chat.on("message:new")
    async def slow(payload: Any) -> None:
        received["slow"].append(payload["content"])
        await gate.wait()

    @world.chat.on("message:new")
    async def quick(payload: Any) -> None:
        received["quick"].append(payload["content"])

    ana = await world.person("ana")
    place = await world.place(ana)
    posted = [(await ana.post(place.channel_id, str(number)))["content"] for number in range(20)]
    await until(lambda: received["quick"] == posted)
    assert received["slow"] == ["0"]
    gate.set()
    await until(lambda: received["slow"] == posted)


@pytest.mark.portable
async def test_a_listener_that_falls_behind_misses_the_oldest_with_a_warning(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chatrtc, "LISTENER_EVENTS", 4)
    received: list[str] = []
    gate = asyncio.Event()

    @world.chat.on("message:new")
    async def slow(payload: Any) -> None:
        received.append(payload["content"])
        await gate.wait()

    ana = await world.person("ana")
    place = await world.place(ana)
    for number in range(20):
        await ana.post(place.channel_id, str(number))
    gate.set()
    await until(lambda: received == ["0", "16", "17", "18", "19"])
    assert ["too slow" in record.message for record in caplog.records] == [True], "one line per minute"


# ---- Async operations -----------------------------------------------------------------------------------------------
# Voice and its relay, and registration.


@pytest.mark.portable
async def test_two_people_talk_through_the_relay(make_world: MakeWorld) -> None:
    world = await make_world(ice_server=["stun:example.org:3478"])
    scene = await Scene.make(world)
    voice = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"})
    channel = {"channel_id": voice["channel_id"]}
    first = await scene.ana_socket.ok("voice:join", channel)
    assert first["participants"] == []
    assert first["ice_servers"] == [{"urls": "stun:example.org:3478"}]
    second = await scene.ben_socket.ok("voice:join", channel)
    assert second["participants"] == [{"user_id": scene.ana.user_id, "username": "ana", "peer_id": first["peer_id"]}]
    offer = {"type": "offer", "sdp": "v=0", "list": [1, None, {"deep": True}]}
    assert await scene.ben_socket.ok("voice:signal", channel | {"to": first["peer_id"], "data": offer}) == {"success": True}
    received = await scene.ana_socket.receive("voice:signal")
    assert received == channel | {"from": second["peer_id"], "user_id": scene.ben.user_id, "data": offer}
    await scene.ben_socket.receive_none("voice:signal")
    outsider = await scene.cy_socket.call("voice:signal", channel | {"to": first["peer_id"], "data": offer})
    assert outsider["code"] == "FORBIDDEN"
    assert (await scene.ben_socket.call("voice:signal", channel | {"to": "nobody", "data": 1}))["code"] == "NOT_FOUND"
    await scene.ana_socket.receive_none("voice:signal")
    assert (await scene.ben_socket.ok("voice:join", channel))["peer_id"] == second["peer_id"], "the second call changes nothing"
    await scene.ana_socket.close()
    assert (await scene.ben_socket.receive("voice:leave"))["peer_id"] == first["peer_id"]
    text = {"channel_id": scene.place.channel_id}
    assert (await scene.ben_socket.call("voice:join", text))["code"] == "BAD_REQUEST"
    assert await scene.ben_socket.ok("voice:leave", text) == {"success": True}, (
        "leaving a channel without being in it changes nothing"
    )


@pytest.mark.portable
async def test_a_second_device_takes_over_in_voice(scene: Scene) -> None:
    channel_id, peer = await join_voice(scene)
    channel = {"channel_id": channel_id}
    await scene.ben_socket.ok("voice:join", channel)
    phone = await scene.ana.socket(scene.place.server_id)
    ack = await phone.ok("voice:join", channel)
    assert [peer["username"] for peer in ack["participants"]] == ["ben"]
    assert (await scene.ana_socket.receive("voice:leave"))["peer_id"] == peer["peer_id"] != ack["peer_id"]
    assert (await scene.ben_socket.receive("voice:join", user_id=scene.ana.user_id, peer_id=ack["peer_id"]))[
        "channel_id"
    ] == channel_id
    signal_to_ben = channel | {"to": ack["participants"][0]["peer_id"], "data": 1}
    assert (await scene.ana_socket.call("voice:signal", signal_to_ben))["reason"] == "NOT_IN_VOICE"
    await phone.ok("voice:signal", signal_to_ben)
    assert (await scene.ben_socket.receive("voice:signal"))["from"] == ack["peer_id"]
    await scene.ana_socket.ok("voice:leave", channel)  # this device has already left; the phone stays
    assert len((await scene.ben_socket.ok("voice:join", channel))["participants"]) == 1


@pytest.mark.portable
async def test_a_voice_channel_has_a_maximum_of_participants(make_world: MakeWorld) -> None:
    scene = await Scene.make(await make_world(voice_max=2))
    channel_id, _ = await join_voice(scene)
    other = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "second", "kind": "voice"})
    channel = {"channel_id": channel_id}
    await scene.ben_socket.ok("voice:join", channel)
    await scene.cy_socket.ok("join_server", {"server_id": scene.place.server_id})
    first = await scene.cy_socket.ok("voice:join", {"channel_id": other["channel_id"]})
    rejected = await scene.cy_socket.call("voice:join", channel)
    assert (rejected["code"], rejected["reason"]) == ("CONFLICT", "VOICE_FULL")
    assert await scene.cy_socket.ok("voice:join", {"channel_id": other["channel_id"]}) == first, "they stay in their channel"
    phone = await scene.ben.socket(scene.place.server_id)
    await phone.ok("voice:join", channel)  # replaces the user's other device
    await scene.ana_socket.ok("voice:leave", channel)
    await scene.cy_socket.ok("voice:join", channel)


@pytest.mark.portable
async def test_signals_are_bounded_and_drop_nobody(scene: Scene) -> None:
    channel_id, _ = await join_voice(scene)
    wire = await Wire.join(scene.ben, scene.place, window=4096)  # a peer that stops reading for a while
    await wire.say('421["voice:join",' + json.dumps({"channel_id": channel_id}) + "]")
    joined = await scene.ana_socket.receive("voice:join", user_id=scene.ben.user_id)
    to_ben = {"channel_id": channel_id, "to": joined["peer_id"]}
    for data in ("x" * 120_000, {"sdp": "ä" * 8192}, ["x" * 16384]):
        rejected = await scene.ana_socket.call("voice:signal", to_ben | {"data": data})
        assert (rejected["code"], rejected["reason"], rejected["field"]) == ("TOO_LARGE", "FIELD_LONG", "data")
    assert (await scene.ana_socket.call("voice:signal", to_ben | {"data": {"sdp": b"x"}}))["code"] == "BAD_REQUEST"
    acks = [await scene.ana_socket.call("voice:signal", to_ben | {"data": "x" * 16382}) for _ in range(400)]
    assert acks[0] == {"success": True}
    assert acks[-1]["reason"] == "PEER_BEHIND", "the queue of the peer is limited far below the size that ends a connection"
    wire.listen()
    await until(lambda: sum(event == "voice:signal" for _, event, _ in wire.received) == acks.count({"success": True}))
    await scene.ana_socket.ok("voice:signal", to_ben | {"data": 1})
    assert wire.open()


@pytest.mark.portable
async def test_the_registration_setting_decides_who_registers(make_world: MakeWorld, tmp_path: Path) -> None:
    closed = await make_world(registration="closed", database=str(tmp_path / "closed.db"))
    account = {"username": "ana", "password": "correct horse"}
    assert (await closed.call("POST", "/auth/register", account)).code == "FORBIDDEN"
    world = await make_world(registration="invite")
    assert (await world.call("POST", "/auth/register", account)).code == "FORBIDDEN"
    await world.chat.hub.store.write(lambda db: chatrtc.add_user(db, "ana", chatrtc.DUMMY_HASH))
    server = await world.chat.create_server(author_id=1, name="class")
    invite = await world.chat.create_invite(author_id=1, server_id=server.server_id, max_uses=1)
    ben = {"username": "ben", "password": "correct horse", "code": invite.code}
    assert (await world.call("POST", "/auth/register", ben | {"code": "wrong"})).code == "NOT_FOUND"
    assert (await world.call("POST", "/auth/register", ben)).status == 201
    assert (await world.call("POST", "/auth/register", ben | {"username": "cy"})).code == "NOT_FOUND"


@pytest.mark.portable
async def test_the_embedding_program_has_no_token_to_revoke(world: World) -> None:
    ana = await world.person("ana")
    with pytest.raises(chatrtc.ChatError):
        await world.chat.logout(author_id=ana.user_id)
    assert (await world.chat.get_profile(author_id=ana.user_id)).username == "ana"


# ---- API ------------------------------------------------------------------------------------------------------------
# Arguments are validated by their declarations, field by field, by REST and by Socket.IO. Any other input gets a reply too and
# breaks nothing.


class Mistake(NamedTuple):
    operation: str
    field: str
    wrong: str
    value: Any
    code: str


MISSING = object()


def mistakes_for(name: str, kind: msgspec.inspect.Type, required: bool) -> Iterator[tuple[str, Any, str]]:
    """Yield invalid values for a field of this type: a description, the value and the expected code."""
    types = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
    if any(isinstance(one, msgspec.inspect.AnyType) for one in types):
        return
    yield "of the wrong type", {"a": []}, "BAD_REQUEST"
    if not any(isinstance(one, msgspec.inspect.NoneType) for one in types):
        yield "null", None, "BAD_REQUEST"
    for one in types:
        if isinstance(one, msgspec.inspect.StrType):
            yield "a number", 7, "BAD_REQUEST"
            if one.max_length is not None:
                yield "too long", "x" * (one.max_length + 1), "TOO_LARGE"
            if one.min_length:
                yield "too short", "x" * (one.min_length - 1), "BAD_REQUEST"
            if one.pattern is not None:
                yield "not matching its pattern", "a\x00b", "BAD_REQUEST"
        elif isinstance(one, msgspec.inspect.IntType):
            yield "a string", "one", "BAD_REQUEST"
            yield "true", True, "BAD_REQUEST"
            yield "a fraction", 1.5, "BAD_REQUEST"
            yield "too large for SQLite", 10**40, "BAD_REQUEST"
            assert one.ge is not None
            yield "too small", one.ge - 1, "BAD_REQUEST"
            assert one.le is not None
            yield "too large", one.le + 1, "BAD_REQUEST"
        elif isinstance(one, msgspec.inspect.LiteralType):
            yield "none of its values", "nothing", "BAD_REQUEST"


def mistakes(op: chatrtc.Operation) -> Iterator[Mistake]:
    kind = msgspec.inspect.type_info(op.args)
    assert isinstance(kind, msgspec.inspect.StructType)
    yield Mistake(op.name, "unknown", "there", 1, "BAD_REQUEST")
    for field in kind.fields:
        if field.required:
            yield Mistake(op.name, field.name, "missing", MISSING, "BAD_REQUEST")
        for wrong, value, code in mistakes_for(field.name, field.type, field.required):
            yield Mistake(op.name, field.name, wrong, value, code)


def mistakes_for_interface(interface: str, op: chatrtc.Operation) -> list[Mistake]:
    """Return the mistakes that can be made by an interface: in a path or a query all values are text."""
    if interface == "socket":
        return list(mistakes(op)) if op.event else []
    in_path = set(re.findall(r"{(\w+)}", op.path or ""))
    in_text = in_path if op.has_body else {field.name for field in fields_of(op)}
    fitting = []
    for mistake in mistakes(op) if op.path else ():
        if mistake.field in in_path and mistake.value in (MISSING, ""):
            continue  # that would be another route
        if mistake.field in in_text:
            numeric = "integer" in str(msgspec.json.schema(op.args)["$defs"][op.args.__name__]["properties"][mistake.field])
            if not (isinstance(mistake.value, str | int) and (numeric or mistake.wrong != "a number")):
                continue  # any text is valid there
        fitting.append(mistake)
    return fitting


def fields_of(op: chatrtc.Operation) -> tuple[Any, ...]:
    return msgspec.structs.fields(op.args)


@pytest.mark.portable
@pytest.mark.parametrize("interface", ["rest", "socket"])
async def test_invalid_arguments_are_rejected_by_their_declaration(scene: Scene, interface: str) -> None:
    chat, owner = scene.world.chat, scene.ana.user_id
    message, code = await scene.post(), (await chat.create_invite(author_id=owner, server_id=1)).code
    right: dict[str, Any] = {
        "server_id": 1, "channel_id": 1, "message_id": message["message_id"], "user_id": scene.cy.user_id, "code": code,
        "name": "name", "username": "eve", "password": "correct horse", "new_password": "battery staple", "q": "told",
        "content": "hello", "emoji": "x", "role": "member", "status": "away", "token": scene.ana.token, "to": "x",
        "data": {}, "file_id": 1, "user_ids": [scene.cy.user_id],
    }  # fmt: skip
    tried, wrong = 0, []
    for op in chatrtc.OPERATIONS.values():
        for mistake in mistakes_for_interface(interface, op):
            args = {field.name: right[field.name] for field in fields_of(op) if field.required}
            args |= {mistake.field: mistake.value}
            args = {name: value for name, value in args.items() if value is not MISSING}
            if interface == "rest":
                got = (await call_route(scene.world, scene.ana.token, op, args)).code
            else:
                got = (await scene.ana_socket.call(op.event or "", args)).get("code")
            tried += 1
            if got != mistake.code:
                wrong.append(f"{op.name}: {mistake.field} {mistake.wrong}: {got}, expected {mistake.code}")
    assert not wrong, "\n".join(wrong)
    assert tried > 100
    assert (await scene.post())["seq"] == message["seq"] + 1, "none of the calls changed anything"


@pytest.mark.portable
async def test_a_body_must_be_an_object(scene: Scene) -> None:
    for body in (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b'{"content": "\xff"}', b"{}" * 2, b"[" * 10_000):
        reply = await scene.ana.call("POST", "/messages", data=body)
        assert reply.code == "BAD_REQUEST", body
    lone = b'{"channel_id": 1, "content": "\\ud800"}'
    assert (await scene.ana.call("POST", "/messages", data=lone)).code == "BAD_REQUEST"
    huge = b'{"content": "' + b"x" * 300_000 + b'"}'
    assert (await scene.ana.call("POST", "/messages", data=huge)).code == "TOO_LARGE"
    packed = gzip.compress(b'{"channel_id": 1, "content": "x"}')
    reply = await scene.ana.call("POST", "/messages", data=packed, headers={"Content-Encoding": "gzip"})
    assert reply.code == "BAD_REQUEST"
    twice = await scene.ana.call("PATCH", "/servers/1", {"server_id": 2, "name": "x"})
    assert twice.code == "BAD_REQUEST", "an argument of the path cannot also be in the body"
    for method, path in (("GET", "/nothing"), ("POST", "/healthz"), ("DELETE", "/messages"), ("GET", "/servers/1/x")):
        assert (await scene.ana.call(method, path)).code == "NOT_FOUND"
    await scene.post()


@pytest.mark.portable
@pytest.mark.parametrize("transport", ["polling", "websocket"])
async def test_events_of_one_socket_are_handled_in_the_order_they_were_sent(scene: Scene, transport: str) -> None:
    message = await scene.post()
    socket = await scene.world.socket(transports=[transport])
    await socket.client.emit("authenticate", {"token": scene.ana.token})
    await socket.client.emit("join_server", {"server_id": scene.place.server_id})
    for number in range(30):
        await socket.client.emit("message:edit", {"message_id": message["message_id"], "content": str(number)})
    await socket.client.emit("typing_start", {"channel_id": scene.place.channel_id})
    await socket.client.emit("leave_server", {"server_id": scene.place.server_id})
    await socket.client.emit("join_server", {"server_id": scene.place.server_id})
    for number in range(30):
        assert (await scene.ben_socket.receive("message:edit"))["content"] == str(number)
    await scene.ben_socket.receive("user:typing")
    await scene.ben_socket.receive("typing_stop")
    await socket.receive("message:edit", content="29")
    await socket.receive_none("error")


RESERVED = ["connect", "disconnect", "connect_error", "newListener", "message", "*", "error", "", "__proto__"]


@pytest.mark.portable
async def test_every_event_gets_its_ack(scene: Scene) -> None:
    for event in [*RESERVED, "message:new", "user:connected", "x" * 5000]:
        for payload in ((), ({"server_id": 1},), ("spoofed",), (None,)):
            ack = await scene.ana_socket.call(event, *payload)
            assert (ack["success"], ack["code"]) == (False, "NOT_FOUND"), event
    for event in chatrtc.CLIENT_EVENTS:
        wrong: list[tuple[Any, ...]] = [({}, {}), (b"\x00\xff",), ({"server_id": b"x"},), ([],), ("x",), (1,), ({"x": 1},)]
        for arguments in wrong if event == "ping" else [*wrong, (), (None,)]:
            ack = await scene.ana_socket.call(event, *arguments)
            assert (ack["success"], ack["code"]) == (False, "BAD_REQUEST"), (event, arguments)
    assert (await scene.ana_socket.call("ping", None))["success"] is True
    await scene.ana_socket.ok("ping")
    await scene.ben_socket.receive_none("user:disconnected")


SCRAPS = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.sampled_from([0, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30])
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(strategies.characters(exclude_categories=()), max_size=20)
    | strategies.sampled_from(["", "\x00", "\ud800", "\udfff", "x" * 5000, "__proto__", "../..", "%00", "1", "'\"--"]),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.text(max_size=8) | strategies.sampled_from(["server_id", "_placeholder"]), inner)
        | strategies.just({"_placeholder": True, "num": 0})
    ),
    max_leaves=6,
)
PLAIN = SCRAPS | strategies.integers(1, 6) | strategies.sampled_from(["hello", "online", "member", "x", "general"])


@strategies.composite
def nearly_valid_arguments(draw: strategies.DrawFn, op: chatrtc.Operation) -> dict[str, Any]:
    """Draw arguments of an operation, most of them valid."""
    args = {}
    for field in fields_of(op):
        if field.required or draw(strategies.booleans()):
            is_id = field.name.endswith("_id") or field.name in ("limit", "after", "before", "around")
            fit: strategies.SearchStrategy[Any] = strategies.integers(1, 6) if is_id else strategies.text(max_size=9)
            args[field.name] = draw(fit if draw(strategies.integers(0, 3)) else PLAIN)
    if not draw(strategies.integers(0, 9)):
        args[draw(strategies.text(max_size=5))] = draw(SCRAPS)
    return args


@strategies.composite
def event_emissions(draw: strategies.DrawFn) -> tuple[Any, tuple[Any, ...]]:
    """Draw an event and its arguments, most of them valid."""
    names = [name for name in chatrtc.CLIENT_EVENTS if name is not None]
    event = draw(strategies.sampled_from(names))
    if draw(strategies.integers(0, 4)):
        return event, (draw(nearly_valid_arguments(chatrtc.CLIENT_EVENTS[event])),)
    wild = SCRAPS | strategies.binary(max_size=9) | strategies.dictionaries(strategies.text(), strategies.binary(), max_size=2)
    event = draw(strategies.sampled_from(names + RESERVED) | strategies.text(max_size=12))
    return event, tuple(draw(strategies.lists(wild, max_size=2)))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


NEVER = {"INTERNAL_ERROR", "UNAVAILABLE"}


async def try_events(scene: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    for event, payload in tries:
        ack = await scene.ana_socket.call(event, *payload)
        assert ack.get("code") not in NEVER, (event, payload, ack)
    assert not scene.ana_socket.closed.is_set()
    await scene.ana_socket.ok("ping")


@fuzz(80)
@given(tries=strategies.lists(event_emissions(), min_size=8, max_size=12))
async def test_no_event_breaks_anything(fuzzed: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    await try_events(fuzzed, tries)


@pytest.mark.soak
@fuzz(2000)
@given(tries=strategies.lists(event_emissions(), min_size=8, max_size=12))
async def test_no_event_breaks_anything_for_long(fuzzed: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    await try_events(fuzzed, tries)


@pytest_asyncio.fixture
async def fuzzed(scene: Scene) -> Scene:
    """A scene with some messages and a voice channel, shared by all examples."""
    await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"})
    for _ in range(4):
        await scene.post()
    return scene


@strategies.composite
def requests(draw: strategies.DrawFn) -> tuple[chatrtc.Operation, dict[str, Any], bytes | None]:
    """Draw an operation, its arguments, and sometimes a body that replaces them."""
    op = draw(strategies.sampled_from([op for op in chatrtc.OPERATIONS.values() if op.path]))
    broken = strategies.binary(max_size=30) | SCRAPS.map(lambda scrap: json.dumps(scrap).encode())
    return op, draw(nearly_valid_arguments(op)), draw(broken) if not draw(strategies.integers(0, 5)) else None


async def try_requests(scene: Scene, tries: list[tuple[chatrtc.Operation, dict[str, Any], bytes | None]]) -> None:
    for op, args, body in tries:
        ends = op.name in ("logout", "change_password", "delete_server")  # these would end the test: called without a token
        in_path = set(re.findall(r"{(\w+)}", op.path or ""))
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in args.items()}
        place = {name: quote(texts[name].encode("utf-8", "surrogatepass"), safe="") or "0" for name in in_path}
        path = (op.path or "").format(**place)
        rest = {name: value for name, value in args.items() if name not in in_path}
        options: dict[str, Any] = {"data": json.dumps(rest).encode() if body is None else body}
        if op.method in ("GET", "DELETE"):
            pairs = ((name, texts[name]) for name in rest)
            query = "&".join(f"{escape(name)}={escape(text)}" for name, text in pairs)
            path, options = f"{path}?{query}", {}
        if len(path) > 8000:
            continue  # aiohttp rejects such a request line
        url = URL(scene.world.url + path, encoded=True)
        reply = await scene.world.call(op.method or "", url, token=None if ends else scene.ana.token, **options)
        assert reply.code not in NEVER, (op.name, args, body, reply)
    assert (await scene.ana.call("GET", "/users/me")).status == 200


def escape(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")


@fuzz(80)
@given(tries=strategies.lists(requests(), min_size=8, max_size=12))
async def test_no_request_breaks_anything(
    fuzzed: Scene, tries: list[tuple[chatrtc.Operation, dict[str, Any], bytes | None]]
) -> None:
    await try_requests(fuzzed, tries)


@pytest.mark.soak
@fuzz(2000)
@given(tries=strategies.lists(requests(), min_size=8, max_size=12))
async def test_no_request_breaks_anything_for_long(
    fuzzed: Scene, tries: list[tuple[chatrtc.Operation, dict[str, Any], bytes | None]]
) -> None:
    await try_requests(fuzzed, tries)


async def test_head_requests_and_braces_in_paths_work(world: World) -> None:
    reply = await world.call("HEAD", "/healthz")
    assert (reply.status, reply.body) == (200, b"")
    ana = await world.person("ana")
    place = await world.place(ana)
    message = await ana.post(place.channel_id)
    for emoji in ("{x}", "a/b", "%", "👩‍🚀"):
        path = f"/messages/{message['message_id']}/reactions/{quote(emoji, safe='')}"
        assert (await ana.call("PUT", URL(world.url + path, encoded=True))).status == 204
    reactions = (await ana.ok("GET", f"/messages/{message['message_id']}"))["reactions"]
    assert {reaction["emoji"] for reaction in reactions} == {"{x}", "a/b", "%", "👩‍🚀"}


# The sample of the specification, unchanged, with the official JavaScript client.

SAMPLE = """
import { io } from 'socket.io-client';

const socket = io('http://localhost:3000');

// Authentification
socket.emit('authenticate', { token: 'YOUR_JWT_TOKEN' });

// Écouter les nouveaux messages
socket.on('message:new', (data) => {
  console.log('New message:', data);
});

// Rejoindre un serveur
socket.emit('join_server', { server_id: 1 });

// Indiquer que l'on tape
socket.emit('typing_start', { channel_id: 3 });
"""
REPORT = """
socket.onAny((event, data) => console.log('HEARD ' + JSON.stringify([event, data])));
socket.on('disconnect', (reason) => console.log('GONE ' + reason));
"""


async def run_node(folder: Path, script: str) -> asyncio.subprocess.Process:
    """Run a script with the packages of the node_modules next to this file."""
    program, packages = find_program("node"), HERE / "node_modules"
    if not (packages / "socket.io-client").is_dir():
        skip_or_fail("npm install --no-save --no-package-lock socket.io-client@^4.8 has not been run")
    (folder / "node_modules").symlink_to(packages)
    (folder / "sample.mjs").write_text(script)
    return await asyncio.create_subprocess_exec(
        program, "sample.mjs", cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def test_the_sample_of_the_specification_works_unchanged(world: World, tmp_path: Path) -> None:
    ana, ben = await world.people("ana", "john_doe")
    place = await world.place(ana, ben)
    for name in ("two", "three"):
        channel = await ana.ok("POST", f"/servers/{place.server_id}/channels", {"name": name})
    assert (place.server_id, channel["channel_id"]) == (1, 3)
    listener = await ana.socket(place.server_id)
    script = SAMPLE.replace("http://localhost:3000", world.url).replace("YOUR_JWT_TOKEN", ben.token)
    process = await run_node(tmp_path, script + REPORT)
    try:
        facts = {"user_id": ben.user_id, "username": "john_doe"}
        assert await listener.receive("user:connected", user_id=ben.user_id) == facts | {"server_id": 1}
        assert await listener.receive("user:typing") == facts | {"channel_id": 3}
        message = await ana.post(3, "Hello world!")
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            output = ""
            while "content:" not in output:
                line = (await process.stdout.readline()).decode()
                assert line, output
                output += line
        assert "New message: {" in output
        assert "content: 'Hello world!'" in output
        assert f"HEARD {json.dumps(['message:new', message], separators=(',', ':'))}" in output
        assert '["error"' not in output
        assert "GONE" not in output
    finally:
        process.kill()
        await process.wait()
    assert (await listener.receive("user:disconnected"))["user_id"] == ben.user_id


# ---- Application ----------------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def running(app: web.Application) -> AsyncIterator[str]:
    """Run an application on a free port; yield its URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_every_response_has_the_security_headers(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    head, upgrade = b" HTTP/1.1\r\nHost: localhost\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    requests = {
        b"GET /healthz" + head: 200, b"GET /nothing" + head: 404, b"PUT /healthz" + head: 404,
        b"GET /socket.io/?EIO=4&transport=polling" + head: 200, b"GET /socket.io/?EIO=3" + head: 400,
        b"OPTIONS /socket.io/" + head: 204, b"GET /socket.io/?EIO=4&transport=websocket" + head + upgrade + key: 101,
        b"GET /socket.io/?EIO=4&transport=websocket" + head + upgrade: 400, b"nonsense\r\n": 400,
        b"GET /healthz" + head + b"Host: twice\r\n": 400, b"GET /" + b"x" * 9000 + head: 400, b"GET /healthz HTTP/9\r\n": 400,
        b"GET /healthz" + head + b"Expect: nonsense\r\n": 417, b"GET /healthz" + head + b"X: " + b"y" * 9000 + b"\r\n": 400,
        b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n": 403, b"GET /" + head: 200, b"GET /openapi.json" + head: 200,
    }  # fmt: skip
    for request, status in requests.items():
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(process.url).port)
        writer.write(request + b"\r\n")
        async with asyncio.timeout(PATIENCE):
            answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.close()
        assert int(answer.split()[1]) == status, (request[:80], answer)
        assert re.findall(r"(?im)^(server|x-content-type-options): *(.*?)\r$", answer) != [], answer
        assert "\r\nServer: ChatRTC\r\n" in answer, (request[:80], answer)
        assert "aiohttp" not in answer, answer
    assert (await process.stop())[0] == 0


@pytest.mark.portable
async def test_the_page_is_compressed_and_cached(world: World) -> None:
    whole = len(chatrtc.asset("chatrtc.html"))
    for path in ("/", "/openapi.json", "/asyncapi.json"):
        tags = set()
        for accepted, packed in {
            "gzip": True, "deflate, gzip;q=0.5": True, "GZIP": True, "": False, "br": False,
            "gzip;q=0": False, "gzip; q=0.00": False,
        }.items():  # fmt: skip
            async with world.session.get(world.url + path, headers={"Accept-Encoding": accepted}, compress=None) as response:
                assert (response.headers.get("Content-Encoding") == "gzip") is packed, accepted
                assert "Accept-Encoding" in response.headers["Vary"]
                assert response.headers["Cache-Control"] == "no-cache"
                assert int(response.headers["Content-Length"]) < whole / 2 or not packed
                body, tag, policy = await response.read(), response.headers["ETag"], response.headers["Content-Security-Policy"]
                assert body == chatrtc.asset("chatrtc.html") or path != "/"
                tags.add(tag)
        assert len(tags) == 2
        for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            reply = await world.call("GET", path, headers={"If-None-Match": known, "Accept-Encoding": ""})
            assert (reply.status, reply.body, reply.headers["ETag"]) == (304, b"", tag)
            assert reply.headers["Content-Security-Policy"] == policy
        assert (await world.call("GET", path, headers={"If-None-Match": '"x"'})).status == 200


@pytest.mark.parametrize(
    ("settings", "headers", "link"),
    [
        ({}, {"Host": "localhost:3000"}, "http://localhost:3000"),
        ({"public_url": "https://chat.example/x/"}, {"Host": "localhost"}, "https://chat.example/x"),
        ({"host": "0.0.0.0"}, {"Host": "chat.example:81"}, "http://chat.example:81"),
        ({"host": "0.0.0.0"}, {"Host": "h" * 900}, "http://localhost"),
        ({"host": "0.0.0.0"}, {"Host": "chat.example", "X-Forwarded-Host": "evil.example"}, "http://chat.example"),
        (
            {"trusted_proxy": ["127.0.0.1"]},
            {"X-Forwarded-Host": "chat.example", "X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/x"},
            "https://chat.example/x",
        ),
        ({"trusted_proxy": ["127.0.0.1"]}, {"Host": "chat.example", "X-Forwarded-Prefix": '/../"<'}, "http://chat.example"),
    ],
)
async def test_the_qr_code_of_an_invite_contains_the_public_address(
    make_world: MakeWorld, settings: dict[str, Any], headers: dict[str, str], link: str
) -> None:
    world = await make_world(**settings)
    ana = await world.person("ana")
    place = await world.place(ana)
    code = await ana.invite(place.server_id)
    reply = await world.call("GET", f"/invites/{code}.svg", headers=headers)
    assert reply.headers["Content-Type"] == "image/svg+xml"
    assert reply.body == chatrtc.draw(f"{link}/#/invite/{code}")
    assert (await world.call("GET", "/config")).body.get("public_url") == settings.get("public_url")


@pytest.mark.parametrize(
    ("options", "headers", "link"),
    [
        ((), {"Host": "localhost:9"}, "http://127.0.0.1:{port}"),
        (("--host", "0.0.0.0"), {"Host": "evil.example"}, "http://{lan}:{port}"),
        (("--trusted-proxy", "127.0.0.1"), {"Host": "chat.example", "X-Forwarded-Proto": "https"}, "https://chat.example"),
    ],
)
async def test_a_standalone_server_ignores_the_host_header_for_its_address(
    tmp_path: Path, options: tuple[str, ...], headers: dict[str, str], link: str
) -> None:
    process = await Process.start(tmp_path / "chat.db", *options)
    try:
        async with process.world() as world:
            ana = await world.person("ana")
            place = await world.place(ana)
            code = await ana.invite(place.server_id)
            reply = await world.call("GET", f"/invites/{code}.svg", headers=headers)
        address = link.format(port=urlsplit(process.url).port, lan=chatrtc.lan_address())
        assert reply.body == chatrtc.draw(f"{address}/#/invite/{code}")
    finally:
        assert (await process.stop())[0] == 0


FAILING_HOST = """
import sys
from aiohttp import web
import chatrtc

async def fail(app):
    raise RuntimeError("the host's own error")

app = web.Application()
chatrtc.ChatRTC(database=sys.argv[1]).attach(app, prefix=sys.argv[2])
app.on_startup.append(fail)
web.run_app(app, port=0)
"""


@pytest.mark.parametrize("prefix", ["", "/chat"])
async def test_an_application_that_cannot_start_exits(tmp_path: Path, prefix: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FAILING_HOST, str(tmp_path / "chat.db"), prefix, cwd=HERE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(3 * PATIENCE):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 1
    assert errors.decode().rstrip().endswith("RuntimeError: the host's own error")
    lock = chatrtc.FileLock(tmp_path / "chat.db")
    assert lock.acquire()
    lock.close()


async def test_errors_and_administration_are_logged(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db", "--trusted-proxy", "127.0.0.1")
    async with process.world() as world:
        ana, ben = await world.people("ana", "ben")
        place = await world.place(ana, ben)
        for address in ("203.0.113.5", "2001:db8::5", "evil %n <b>"):
            headers = {"X-Forwarded-For": address}
            body = {"username": "ana", "password": "a wrong one"}
            for _ in range(7):
                await world.call("POST", "/auth/login", body, headers=headers)
                await world.call("GET", "/invites/wrong", headers=headers)
        member = f"/servers/{place.server_id}/members/{ben.user_id}"
        await ana.ok("PATCH", member, {"role": "admin"})
        await ana.ok("PUT", f"/servers/{place.server_id}/bans/{ben.user_id}")
        await ana.ok("DELETE", f"/servers/{place.server_id}/bans/{ben.user_id}")
        await ana.ok("DELETE", f"/servers/{place.server_id}")
        words = {"old_password": "correct horse", "new_password": "battery staple"}
        assert (await ben.call("POST", "/auth/password", words)).status == 200
        await run_ok("user", "delete", "ben", "--yes", "--database", str(tmp_path / "chat.db"))
    status, log = await process.stop()
    assert status == 0
    for address in ("203.0.113.5", "2001:db8::/64", "127.0.0.1"):
        lines = [line for line in log.splitlines() if f"Refused for {address}: " in line]
        assert len(lines) == 2, "one at once, and one for the rest of the minute"
        times = Counter[str]()
        for what, number in re.findall(r"(wrong password|unknown code|limit) \((\d+)\)", " ".join(lines)):
            times[what] += int(number)
        assert times == {"wrong password": 5, "unknown code": 7, "limit": 2}
    for act in (
        "set_role by user 1", "ban by user 1", "unban by user 1", "delete_server by user 1", "change_password by user 2",
        "delete_user on the command line for 'ben'",
    ):  # fmt: skip
        assert log.count(f" {act}") == 1, log
    assert not re.search(r"horse|staple|wrong one|eyJ|\x1b", log)
    assert set(chatrtc.OPERATIONS) >= chatrtc.LOGGED


@pytest.mark.portable
async def test_a_chat_can_be_mounted_under_a_prefix(tmp_path: Path) -> None:
    async def own(request: web.Request) -> web.Response:
        return web.Response(text="mine")

    app = web.Application()
    app.router.add_get("/", own)
    chat = chatrtc.ChatRTC(database=str(tmp_path / "chat.db"))
    chat.attach(app, prefix="/chat")
    assert isinstance(chat.sio, socketio.AsyncServer)
    async with running(app) as url, World(f"{url}/chat", aiohttp.ClientSession(), chat) as world:
        ana = await world.person("ana")
        place = await world.place(ana)
        for transports in (["websocket"], ["polling"], ["polling", "websocket"]):
            socket = Socket()
            world.sockets.append(await socket.connect(url, ana.token, path="chat/socket.io", transports=transports))
            await socket.ok("join_server", {"server_id": place.server_id})
            posted = await ana.post(place.channel_id)
            assert await socket.receive("message:new") == posted
        file = await chat.upload_file(author_id=ana.user_id, channel_id=place.channel_id, name="a.txt", data=b"hello")
        link = await ana.ok("POST", f"/files/{file.file_id}/link")
        async with world.session.get(url + link["url"]) as response:  # the prefix is part of the address
            assert await response.text() == "hello"
        async with world.session.get(f"{url}/") as response:
            assert await response.text() == "mine"
            assert "Content-Security-Policy" not in response.headers
        assert (await world.call("GET", "/")).status == 200
        async with world.session.get(f"{url}/chat") as response:  # without the slash, as users type it
            assert (response.status, str(response.url)) == (200, f"{url}/chat/")
        async with world.session.get(f"{url}/auth/login") as response:
            assert response.status == 404
    assert not (tmp_path / "chat.db-wal").exists()
    lock = chatrtc.FileLock(tmp_path / "chat.db")
    assert lock.acquire()
    lock.close()


@pytest.mark.portable
async def test_a_method_does_the_same_as_its_route(world: World, caplog: pytest.LogCaptureFixture) -> None:
    chat, published = world.chat, asyncio.Queue[Any]()

    @chat.on("message:new")
    async def remember(message: Any) -> None:
        await published.put(message)
        if message["content"] == "stumble":
            raise ValueError("a listener's own defect")

    with pytest.raises(ValueError, match="nonsense"):
        chat.on("nonsense")
    ana = await world.person("ana")
    place = await world.place(ana)
    socket = await ana.socket(place.server_id)
    for content in ("stumble", "hello"):
        message = await chat.post_message(channel_id=place.channel_id, author_id=ana.user_id, content=content)
        assert isinstance(message, chatrtc.Message)
        received = await socket.receive("message:new")
        assert received["content"] == content
        assert received["message_id"] == message.message_id
        async with asyncio.timeout(PATIENCE):
            assert await published.get() == received
    assert [record.getMessage() for record in caplog.records] == ["a listener failed"]
    caplog.clear()
    page = await chat.list_messages(channel_id=place.channel_id, author_id=ana.user_id)
    assert [message.content for message in page.messages] == ["stumble", "hello"]
    for code, call in {
        "NOT_FOUND": chat.post_message(channel_id=place.channel_id, author_id=99, content="hello"),
        "BAD_REQUEST": chat.post_message(channel_id=place.channel_id, author_id=ana.user_id, content=""),
        "UNAUTHORIZED": chat.post_message(channel_id=place.channel_id, content="hello"),
    }.items():
        with pytest.raises(chatrtc.ChatError) as error:
            await call
        assert error.value.code == code
    with pytest.raises(AttributeError):
        _ = chat.no_such_operation


async def test_routes_of_the_host_application_are_unchanged(tmp_path: Path) -> None:
    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    async def unauthorized(request: web.Request) -> web.Response:
        raise web.HTTPUnauthorized(text="who are you?")

    app = web.Application()
    app.router.add_get("/leave", redirect)
    chatrtc.ChatRTC(database=str(tmp_path / "chat.db")).attach(app)
    app.router.add_get("/private", unauthorized)
    foreign = {"Origin": "https://elsewhere.example"}
    async with running(app) as url, aiohttp.ClientSession() as session:
        async with session.get(f"{url}/leave", allow_redirects=False, headers=foreign) as response:
            assert (response.status, response.headers["Location"]) == (302, "/elsewhere")
        async with session.get(f"{url}/private", headers=foreign) as response:
            assert (response.status, await response.text()) == (401, "who are you?")
        world = World(url, session)
        assert (await world.call("GET", "/healthz", headers=foreign)).code == "FORBIDDEN"
        assert (await world.call("GET", "/nowhere")).code == "NOT_FOUND"


@pytest.mark.portable
async def test_two_chats_in_one_application(tmp_path: Path) -> None:
    app = web.Application()
    chats = {name: chatrtc.ChatRTC(database=str(tmp_path / f"{name}.db")) for name in ("one", "two")}
    for name, chat in chats.items():
        chat.attach(app, prefix=f"/{name}")
    async with running(app) as url, aiohttp.ClientSession() as session:
        received = {}
        for name, chat in chats.items():
            world = World(f"{url}/{name}", session, chat)
            ana = await world.person("ana")
            place = await world.place(ana)
            assert (ana.user_id, place) == (1, Place(1, 1))
            received[name] = await Socket().connect(url, ana.token, path=f"{name}/socket.io")
            await received[name].ok("join_server", {"server_id": 1})
        stranger = await World(f"{url}/two", session).call("GET", "/users/me", token=ana.token)
        assert stranger.status == 200
        assert (await World(f"{url}/one", session).call("GET", "/users/me", token=ana.token)).status == 401
        await chats["one"].post_message(channel_id=1, author_id=1, content="in one")
        await received["one"].receive("message:new", content="in one")
        await received["two"].receive_none("message:new")
        for socket in received.values():
            await socket.close()


@pytest.mark.portable
async def test_a_database_serves_one_chat(world: World, tmp_path: Path) -> None:
    app = web.Application()
    chatrtc.ChatRTC(database=str(tmp_path / "chat.db")).attach(app)
    with pytest.raises(chatrtc.StartError, match="in use"):
        async with running(app):
            pass
    (tmp_path / "other.db").symlink_to(tmp_path / "chat.db")
    app = web.Application()
    chatrtc.ChatRTC(database=str(tmp_path / "other.db")).attach(app)
    with pytest.raises(chatrtc.StartError, match="in use"):
        async with running(app):
            pass
    assert (await world.call("GET", "/healthz")).status == 200


async def test_a_chat_leaves_no_task_behind(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    threads = threading.enumerate()
    app = web.Application()
    chat = chatrtc.ChatRTC(database=str(tmp_path / "chat.db"))
    chat.attach(app)

    @chat.on("message:new")
    async def listen(payload: Any) -> None:
        await asyncio.Event().wait()

    async with running(app) as url:
        world = World(url, aiohttp.ClientSession(), chat)
        ana = await world.person("ana")
        await ana.post((await world.place(ana)).channel_id)
        await (await world.socket(ana.token)).close()
        await world.close()
        assert len(asyncio.all_tasks() - before) > 1
    left = [task for task in asyncio.all_tasks() - before if not task.done()]
    if left:
        await asyncio.wait(left, timeout=PATIENCE)
    assert [task for task in left if not task.done()] == []
    for thread in threading.enumerate():
        if thread not in threads and "asyncio" not in thread.name:
            await asyncio.to_thread(thread.join, 1)
    assert [thread for thread in threading.enumerate() if thread not in threads and "asyncio" not in thread.name] == []


@pytest.mark.portable
async def test_the_bare_socket_server() -> None:
    sio = chatrtc.socket_server()
    assert isinstance(sio, socketio.AsyncServer)

    @sio.on("echo")
    async def echo(sid: str, *payload: Any) -> Any:
        return payload

    app = web.Application()
    sio.attach(app)
    async with running(app) as url:
        for transport in ("websocket", "polling"):
            socket = await Socket().connect(url, transports=[transport])
            assert await socket.client.call("echo", {"a": 1}, timeout=PATIENCE) == {"a": 1}
            await socket.close()


async def test_accepted_requests_are_answered_during_a_shutdown(tmp_path: Path) -> None:
    """SIGTERM arrives while ten users sign in, which takes about 50 ms each; all ten get their token."""
    process = await Process.start(tmp_path / "chat.db", "--no-rate-limit")
    async with process.world() as world:
        await world.person("ana")
    body = json.dumps({"username": "ana", "password": "correct horse"})
    login = f"POST /auth/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        return head + await reader.readexactly(int(length[1]) if length else 0)

    async with asyncio.timeout(PATIENCE):
        links = [await asyncio.open_connection("127.0.0.1", urlsplit(process.url).port) for _ in range(11)]
        for link in links:
            assert b" 200 " in await ask(*link, health)
        logins = [asyncio.create_task(ask(*link, login)) for link in links[1:]]
        await asyncio.sleep(0)  # all requests are sent now, and the server reads them before the signal
        assert b" 200 " in await ask(*links[0], health)
        assert not all(task.done() for task in logins)
        process.process.terminate()
        answers = await asyncio.gather(*logins)
    assert [answer.split()[1] for answer in answers] == [b"200"] * 10
    assert await process.stop() == (0, "")
    for _, writer in links:
        writer.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_signal_ends_the_server_cleanly(tmp_path: Path, name: str, times: int) -> None:
    number = signal.Signals[name]
    if signal.getsignal(number) is signal.SIG_IGN:  # `nohup` ignores SIGHUP for its children, and the server respects that
        signal.signal(number, signal.SIG_DFL)
    process = await Process.start(tmp_path / "chat.db", "--no-rate-limit")
    world = process.world()
    ana = await world.person("ana")
    place = await world.place(ana)
    sockets = [await ana.socket(place.server_id, transports=[way]) for way in ("websocket", "polling") for _ in range(3)]
    kept: list[str] = []

    async def post(writer: int) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            for turn in itertools.count():
                reply = await ana.call("POST", "/messages", {"channel_id": place.channel_id, "content": f"{writer}.{turn}"})
                assert reply.status in (201, 503), reply
                kept.extend([f"{writer}.{turn}"] * (reply.status == 201))

    writers = [asyncio.create_task(post(writer)) for writer in range(8)]
    await sockets[0].receive("message:new")
    started = time.monotonic()
    for _ in range(times):
        process.process.send_signal(number)
    status, errors = await process.stop(number) if times == 1 else (await process.process.wait(), "")
    assert time.monotonic() - started < bound(10)
    assert (status, errors) == (0, "")
    await asyncio.wait_for(asyncio.gather(*writers), PATIENCE)
    for socket in sockets:
        await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    await world.close()
    assert kept
    exported = [json.loads(line) for line in (await run_ok("export", "--database", str(tmp_path / "chat.db"))).splitlines()]
    assert set(kept) <= {thing["content"] for thing in exported if thing["type"] == "message"}


async def test_it_serves_https_with_a_self_signed_certificate(tmp_path: Path) -> None:
    """It is made once for the addresses of this machine, and only its owner can read it. Clients trust it by its file."""
    kept = []
    for _ in range(2):
        process = await Process.start(tmp_path / "chat.db", "--tls-self-signed")
        try:
            pem = tmp_path / "chat.db.tls.pem"
            kept.append(pem.read_bytes())
            assert process.url.startswith("https://127.0.0.1:")
            trust = ssl.create_default_context(cafile=str(pem))
            session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust))
            async with World(process.url, session) as world:
                assert (await world.call("GET", "/healthz")).status == 200
                async with session.ws_connect(f"{process.url}/socket.io/?EIO=4&transport=websocket") as wire:
                    assert (await wire.receive_str(timeout=PATIENCE)).startswith("0{")
            with pytest.raises(aiohttp.ClientConnectorCertificateError):  # a client without that file rejects it
                async with aiohttp.ClientSession() as stranger:
                    await stranger.get(f"{process.url}/healthz")
        finally:
            assert (await process.stop())[0] == 0
    assert kept[0] == kept[1]
    assert pem.stat().st_mode & 0o777 == 0o600


async def test_lan_mode_prints_the_address_and_a_qr_code(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db", "--lan")
    try:
        assert process.url.startswith("http://0.0.0.0:")
        assert process.process.stdout is not None
        line = (await process.process.stdout.readline()).decode()
        assert line.startswith("Others on your network: http://")
        assert "█" in (await process.process.stdout.readline()).decode()
        async with asyncio.timeout(PATIENCE):
            while "--tls-self-signed" not in (await process.process.stdout.readline()).decode():
                assert not process.process.stdout.at_eof()
        async with process.world() as world:
            config = (await world.call("GET", "/config")).body
        assert urlsplit(config["lan_url"]).port == urlsplit(process.url).port
        assert config["create_servers"] == "accounts"
    finally:
        assert (await process.stop())[0] == 0


# ---- Command line ---------------------------------------------------------------------------------------------------
DatabaseOption = tuple[str, str]


@pytest.fixture
def database(tmp_path: Path) -> DatabaseOption:
    """The option that names the database of the test."""
    return ("--database", str(tmp_path / "chat.db"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a database with messages, after a normal stop and after a kill, which leaves a -wal."""
    path = tmp_path_factory.mktemp("filled") / "chat.db"
    with contextlib.closing(chatrtc.prepare(path)) as db:
        user_id = chatrtc.insert_user(db, "ana", None, "2026-01-01T00:00:00Z")
        server_id = chatrtc.insert_server(db, "class", "2026-01-01T00:00:00Z")
        chatrtc.insert_member(db, server_id, user_id, "owner", "2026-01-01T00:00:00Z")
        channel, _ = chatrtc.insert_channel(db, server_id, "general", "text", "")
        author = chatrtc.Principal(user_id, "ana", "online", 0)

        def post(first: int, last: int) -> None:
            db.execute("BEGIN")
            for number in range(first, last):
                args = chatrtc.NewMessage(channel.channel_id, f"message {number} " + "of some length " * 9)
                chatrtc.insert_message(db, server_id, author, args, "2026-01-01T00:00:00Z")
            db.execute("COMMIT")

        post(0, 2000)
        while chatrtc.index_messages(db).value < 2000:
            pass
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        stopped = path.read_bytes()
        post(2000, 2500)
        return {"stopped": stopped, "killed": path.read_bytes(), "wal": Path(f"{path}-wal").read_bytes()}


def run_sql(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(";".join(statements))


def with_damage(image: bytes, kind: str, random: Random) -> bytes:
    """Return the file as a failing disk might leave it."""
    size, pages = 4096, len(image) // 4096
    one, two = sorted(random.sample(range(pages), 2))
    match kind:
        case "zeroed page":
            return image[: one * size] + bytes(size) + image[one * size + size :]
        case "swapped pages":
            first, second = image[one * size : one * size + size], image[two * size : two * size + size]
            return image[: one * size] + second + image[one * size + size : two * size] + first + image[two * size + size :]
        case "cut off":
            return image[: random.randrange(1, len(image))]
        case "noise":
            at = random.randrange(len(image) - 512)
            return image[:at] + random.randbytes(512) + image[at + 512 :]
    raise ValueError(kind)


def is_sound(path: Path) -> bool:
    """Tell if SQLite finds no fault in the file."""
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            return bool(db.execute("PRAGMA integrity_check(1)").fetchone()[0] == "ok")
    except (sqlite3.Error, UnicodeDecodeError):
        return False


def start_error(path: Path) -> str:
    """Return the reason why the database is not opened, or an empty string."""
    try:
        chatrtc.prepare(path).close()
    except chatrtc.StartError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["zeroed page", "swapped pages", "cut off", "noise"])
def test_a_damaged_database_is_never_opened(kind: str, cases: int, filled: dict[str, bytes], tmp_path: Path) -> None:
    random, opened, refusals = Random(kind), 0, 0
    for case in range(cases):
        folder = tmp_path / str(case)
        folder.mkdir()
        image = filled["killed" if case % 2 else "stopped"]
        image = with_damage(image, kind, random) if case > 1 else image  # the first two are whole
        for name in ("chat.db", "copy.db"):
            (folder / name).write_bytes(image)
            if case % 2:
                (folder / f"{name}-wal").write_bytes(filled["wal"])
        if why := start_error(folder / "chat.db"):
            refusals += 1
            assert "\n" not in why
            assert "chatrtc restore" in why or "not an SQLite database" in why
            assert (folder / "chat.db").read_bytes() == image
            assert not case % 2 or (folder / "chat.db-wal").read_bytes() == filled["wal"]
        else:
            opened += 1
            assert is_sound(folder / "copy.db")
        shutil.rmtree(folder)
    assert refusals > cases / 4
    assert opened >= 2


@pytest.mark.parametrize("kind", ["cut off", "noise"])
def test_a_damaged_wal_loses_only_its_end(kind: str, filled: dict[str, bytes], tmp_path: Path) -> None:
    """A -wal does not record its length: SQLite applies it up to the damage, which is a state that was committed."""
    random = Random(kind)
    for case in range(20):
        path = tmp_path / f"{case}.db"
        path.write_bytes(filled["killed"])
        Path(f"{path}-wal").write_bytes(with_damage(filled["wal"], kind, random) if case else filled["wal"])
        with contextlib.closing(chatrtc.prepare(path)) as db:
            assert chatrtc.check_integrity(db) == []
            assert chatrtc.count_rows(db)[2] == 2500 if case == 0 else chatrtc.count_rows(db)[2] in (2000, 2500)


def write_unusable(folder: Path, name: str, filled: dict[str, bytes]) -> str:
    """Write something that cannot be served to the place of the database; return a word of its error."""
    path = folder / "chat.db"
    match name:
        case "text":
            path.write_text("Dear diary\n" * 1000)
            return "not an SQLite database"
        case "foreign":
            run_sql(path, "CREATE TABLE diary (day)", "INSERT INTO diary VALUES (1)")
            return "another program"
        case "foreign in WAL mode":
            run_sql(path, "PRAGMA journal_mode = wal", "CREATE TABLE diary (day)")
            return "another program"
        case "newer":
            path.write_bytes(filled["stopped"])
            run_sql(path, f"PRAGMA user_version = {chatrtc.SCHEMA_FORMAT + 1}")
            return "newer"
        case "zeroed":
            path.write_bytes(filled["stopped"][:8192] + bytes(65536) + filled["stopped"][73728:])
            return "damaged"
        case "cut off":
            path.write_bytes(filled["stopped"][:30000])
            return "damaged"
        case "cut off in its header":
            path.write_bytes(filled["stopped"][:50])
            return "damaged"
        case "emptied":
            path.write_bytes(b"")
            (folder / "chat.db.secret").write_text("s" * 64)
            return "was in use"
        case "missing next to its -wal":
            Path(f"{path}-wal").write_bytes(filled["wal"])
            return "was in use"
        case "damaged next to its -wal":
            path.write_bytes(filled["killed"][:4096] + bytes(65536) + filled["killed"][69632:])
            Path(f"{path}-wal").write_bytes(filled["wal"])
            return "damaged"
        case "a folder":
            path.mkdir()
            return "Is a directory"
    raise ValueError(name)


UNUSABLE = [
    "text", "foreign", "foreign in WAL mode", "newer", "zeroed", "cut off", "cut off in its header", "emptied",
    "missing next to its -wal", "damaged next to its -wal", "a folder",
]  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
async def test_an_unusable_database_is_not_changed(
    name: str, filled: dict[str, bytes], tmp_path: Path, database: DatabaseOption
) -> None:
    word = write_unusable(tmp_path, name, filled)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    expect_error(await run_command("serve", "--port", "0", *database), word)
    expect_error(await run_command("user", "add", "ana", *database, stdin="correct horse\n"), word)
    for args in (["check"], ["backup", str(tmp_path / "copy")]):
        expect_error(await run_command(*args, *database))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name: after.get(name) for name in before} == before
    assert {name for name in set(after) - set(before) if not name.endswith(".lock")} <= {"chat.db-shm"}


USAGE_ERRORS = {
    "bogus": "No such command",
    "--bogus": "No such option",
    "serve --bogus": "No such option",
    "serve --port x": "--port",
    "serve --port 65536": "port",
    "serve --token-ttl 0": "token_ttl",
    "serve --registration maybe": "'open', 'invite', 'closed'",
    "serve --secret short": "32 bytes",
    "serve --database missing/chat.db": "does not exist",
    "serve --database :memory:": "keep nothing",
    "serve --host no.such.invalid": "no.such.invalid",
    "serve --tls-cert cert.pem": "--tls-key",
    "serve --tls-cert cert.pem --tls-key key.pem": "certificate",
    "serve extra": "unexpected",
    "user add": "USERNAME",
    "user bogus": "No such command",
    "user list": "no database",
    "user delete ana --database missing/chat.db --yes": "does not exist",
    "token": "USERNAME",
    "token ana": "no database",
    "backup copy.db": "no database",
    "restore copy.db": "no backup",
    "check": "no database",
    "export --format pdf": "'jsonl', 'html'",
    "export --server x": "--server",
    "export": "no database",
}  # fmt: skip


@pytest.mark.parametrize("line", USAGE_ERRORS)
async def test_a_usage_error_is_one_clear_line(line: str, tmp_path: Path) -> None:
    expect_error(await run_command(*line.split(), cwd=tmp_path, stdin="correct horse\n"), USAGE_ERRORS[line])
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} <= {"chatrtc.db", "chatrtc.db.secret"}
    assert not (tmp_path / "chatrtc.db").exists() or "--host" in line


async def test_an_invalid_variable_is_rejected_like_an_option(tmp_path: Path) -> None:
    expect_error(await run_command("serve", env={"CHATRTC_PORT": "x"}, cwd=tmp_path), "--port")
    expect_error(await run_command("serve", env={"CHATRTC_SECRET": "short"}, cwd=tmp_path), "32 bytes")


async def test_the_command_line_needs_no_temporary_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    nowhere = {"TMPDIR": str(tmp_path / ("missing" * 20))}
    database = ("--database", str(folder / "chat.db"))
    killed = await Process.start(folder / "chat.db")
    await killed.stop(signal.SIGKILL)
    process = await Process.start(folder / "chat.db", env=nowhere)
    try:
        assert "has the id 1" in await run_ok("user", "add", "ana", *database, stdin="correct horse\n", env=nowhere)
        assert (await run_ok("user", "list", *database)).count("\n") == 1
    finally:
        status, log = await process.stop()
    assert (status, "Traceback" in log) == (0, False), log


async def test_a_command_waits_for_its_turn(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "TURN_SECONDS", 0.2)
    database = str(tmp_path / "chat.db")
    ana = await world.person("ana")
    place = await world.place(ana)
    socket = await ana.socket(place.server_id)
    turn = chatrtc.Turn(Path(database))
    assert turn.try_acquire()
    with pytest.raises(chatrtc.StartError, match="does not let others write"):
        await asyncio.to_thread(chatrtc.run_admin_job, database, "delete_user", "ana")
    turn.release()
    await asyncio.to_thread(chatrtc.run_admin_job, database, "delete_user", "ana")
    await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    turn.close()


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_learns_that_the_server_is_ready_and_alive(tmp_path: Path, abstract: bool) -> None:
    address = f"@chatrtc-{tmp_path.name}-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket_module.socket(socket_module.AF_UNIX, socket_module.SOCK_DGRAM) as notices:
        notices.bind(address.replace("@", "\0"))
        notices.settimeout(PATIENCE)
        process = await Process.start(tmp_path / "chat.db", env={"NOTIFY_SOCKET": address})
        received = [await asyncio.to_thread(notices.recv, 100) for _ in range(3)]
        await process.stop()
        assert received == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        while await asyncio.to_thread(notices.recv, 100) != b"STOPPING=1":
            pass


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can read the limits of another process")
async def test_the_server_raises_its_limit_of_open_files(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db", prefix=(find_program("prlimit"), "--nofile=256:1024", "--"))
    assert resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE) == (1024, 1024)
    assert (await process.stop())[0] == 0


async def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db", prefix=(find_program("nohup"),))
    process.process.send_signal(signal.SIGHUP)
    async with process.world() as world:
        assert (await world.call("GET", "/healthz")).status == 200
    assert process.process.returncode is None
    assert (await process.stop())[0] == 0


OTHER_OWNER = 12345  # a user id and group id that own no file


def occupy(folder: Path, name: str, kind: str) -> Path:
    """Create something else at the path of a server's file; return the file that a link leads to."""
    path, target = folder / name, folder / "target"
    target.write_text("t" * 64)
    target.chmod(0o600)
    match kind:
        case "a link":
            path.symlink_to(target)
        case "a pipe":
            os.mkfifo(path, 0o600)
        case "another user's":
            path.write_text("s" * 64)
            path.chmod(0o600)
            os.chown(path, OTHER_OWNER, OTHER_OWNER)
        case mode:
            path.write_text("s" * 64)
            path.chmod(int(mode, 8))
    return target


@pytest.mark.parametrize("suffix", [".secret", ".tls.pem"])
def test_private_files_are_next_to_the_database_that_a_link_names(tmp_path: Path, suffix: str) -> None:
    database, real = tmp_path / "link.db", tmp_path / "data" / "chat.db"
    real.parent.mkdir()
    database.symlink_to(real)
    old, new = Path(f"{database}{suffix}"), Path(f"{real}{suffix}")
    assert chatrtc.private_path(database, suffix) == new
    old.touch()
    assert chatrtc.private_path(database, suffix) == old, "a file that an older version made is still used"
    new.touch()
    assert chatrtc.private_path(database, suffix) == new


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        *((".secret", mode, "chmod 600") for mode in ("644", "640", "604", "620", "601")),
        (".secret", "another user's", "another user"),
        (".tls.pem", "another user's", "another user"),
        (".tls.pem", "644", "chmod 600"),
        *((end, kind, "not a regular file") for end in (".secret", ".lock", ".tls.pem") for kind in ("a link", "a pipe")),
    ],
)
async def test_a_file_that_others_can_read_or_created_is_rejected(
    tmp_path: Path, name: str, kind: str, word: str, database: DatabaseOption
) -> None:
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can change the owner of a file")
    target = occupy(tmp_path, f"chat.db{name}", kind)
    expect_error(await run_command("serve", "--port", "0", "--tls-self-signed", *database), word)
    assert target.read_text() == "t" * 64


@pytest.mark.parametrize("kind", ["a link", "a pipe", "666", "another user's"])
@pytest.mark.parametrize("name", ["chat.db.secret.part", "copy.part"])
async def test_a_part_file_of_another_user_is_not_used(tmp_path: Path, name: str, kind: str, database: DatabaseOption) -> None:
    if kind == "another user's" and os.geteuid() != 0:
        pytest.skip("only root can change the owner of a file")
    target = occupy(tmp_path, name, kind)
    with contextlib.ExitStack() as stack:
        if kind != "a pipe":
            held = stack.enter_context((tmp_path / name).open("rb"))  # the other user might keep it open
        await run_ok("user", "add", "ana", *database, stdin="correct horse\n")
        await run_ok("token", "ana", *database)
        await run_ok("backup", str(tmp_path / "copy"), *database)
        assert kind == "a pipe" or held.read(64) in (b"s" * 64, b"t" * 64)
    assert target.read_text() == "t" * 64
    assert set(file_modes(tmp_path).values()) == {"0o600"}


@pytest.mark.skipif(chatrtc.effective_user() != 0, reason="only root can change the owner of a file")
async def test_root_keeps_the_owner_of_the_files(tmp_path: Path, filled: dict[str, bytes]) -> None:
    folder, backup = tmp_path / "data", tmp_path / "copy"
    folder.mkdir()
    os.chown(folder, OTHER_OWNER, OTHER_OWNER)
    database = ("--database", str(folder / "chat.db"))
    await run_ok("user", "add", "ana", *database, stdin="correct horse\n")
    await run_ok("token", "ana", *database)
    await run_ok("backup", str(backup), *database)
    (folder / "chat.db").chmod(0o640)
    os.chown(folder, 0, 0)
    await run_ok("restore", str(backup), *database)
    assert (folder / "chat.db").stat().st_mode & 0o777 == 0o640

    def owners() -> set[tuple[int, int]]:
        return {(file.stat().st_uid, file.stat().st_gid) for file in folder.iterdir()}

    assert owners() == {(OTHER_OWNER, OTHER_OWNER)}
    for file in folder.iterdir():
        file.unlink()
    os.chown(folder, OTHER_OWNER, OTHER_OWNER)  # if there was no database, the files belong to the owner of the folder
    await run_ok("restore", str(backup), *database)
    await run_ok("token", "ana", *database)
    assert owners() == {(OTHER_OWNER, OTHER_OWNER)}


@pytest.mark.parametrize("content", [b"short", b"\xff" * 64], ids=["short", "no text"])
async def test_an_invalid_secret_file_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat.db.secret").write_bytes(content)
    expect_error(await run_command("serve", "--port", "0", "--database", str(tmp_path / "chat.db")), "chat.db.secret")
    assert (tmp_path / "chat.db.secret").read_bytes() == content


async def test_every_command_has_help() -> None:
    for name in ["", "user", *all_commands()]:
        run = CliRunner().invoke(chatrtc.main, [*name.split(), "--help"], prog_name="chatrtc")
        assert run.exit_code == 0, run
        assert run.output.startswith("Usage: chatrtc")
    assert (await run_ok("--help")).startswith("Usage: chatrtc")
    expect_error(await run_command("user", "bogus"))
    assert (await run_ok("--version")).split() == ["ChatRTC,", "version", chatrtc.__version__]


async def test_a_port_or_a_database_in_use_is_rejected(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    port = str(urlsplit(process.url).port)
    expect_error(await run_command("serve", "--port", port, "--database", str(tmp_path / "other.db")), "Address already in use")
    expect_error(await run_command("serve", "--port", "0", "--database", str(tmp_path / "chat.db")), "in use by another")
    expect_error(await run_command("restore", str(tmp_path / "other.db"), "--database", str(tmp_path / "chat.db")), "in use")
    async with process.world() as world:
        assert (await world.call("GET", "/healthz")).status == 200
    assert await process.stop() == (0, "")


async def test_accounts_are_managed_while_the_server_runs(tmp_path: Path, database: DatabaseOption) -> None:
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        assert await run_ok("user", "add", "ana", *database, stdin="correct horse\n") == "ana has the id 1\n"
        ana, ben = await sign_in_as(world, "ana"), await world.person("ben")
        place = await world.place(ana, ben)
        sockets = [await one.socket(place.server_id) for one in (ana, ben)]
        expect_error(await run_command("user", "add", "ANA", *database, stdin="correct horse\n"), "taken")
        expect_error(await run_command("user", "add", "a b", *database, stdin="correct horse\n"), "username")
        expect_error(await run_command("user", "add", "cy", *database, stdin="short\n"), "at least 8 characters")
        expect_error(await run_command("user", "password", "nobody", *database, stdin="correct horse\n"), "nobody")
        rows = [line.split("\t") for line in (await run_ok("user", "list", *database)).splitlines()]
        assert [row[:2] for row in rows] == [["1", "ana"], ["2", "ben"]]

        assert await run_ok("user", "password", "ana", *database, stdin="another horse\n") == "ana has a new password\n"
        await asyncio.wait_for(sockets[0].closed.wait(), PATIENCE)
        assert (await ana.call("GET", "/users/me")).status == 401
        assert (await ben.call("GET", "/users/me")).status == 200
        for password, status in {"correct horse": 401, "another horse": 200}.items():
            assert (await world.sign_in("ana", password)).status == status

        ana.token = (await run_ok("token", "ana", *database)).strip()
        posted = await ana.post(place.channel_id, "said before")
        assert await run_ok("user", "delete", "ana", "--yes", *database) == "ana is deleted\n"
        assert (await ana.call("GET", "/users/me")).status == 401
        assert (await sockets[1].receive("member:left"))["user_id"] == ana.user_id
        assert (await sockets[1].receive("member:updated"))["role"] == "owner"
        assert (await ben.ok("GET", f"/messages/{posted['message_id']}"))["author_username"] == "ana"
        expect_error(await run_command("token", "ana", *database), "ana")
        assert (await run_ok("user", "list", *database)).split("\t")[1:2] == ["ben"]
    assert (await process.stop())[0] == 0  # its log has a line for each command
    assert (await run_ok("check", *database)).startswith("sound: 2 users, 1 servers, 1 messages")


async def test_concurrent_commands_wait_for_each_other(tmp_path: Path, database: DatabaseOption) -> None:
    names = [f"user{number}" for number in range(6)]
    await asyncio.gather(*(run_ok("user", "add", name, *database, stdin="correct horse\n") for name in names))
    assert {line.split("\t")[1] for line in (await run_ok("user", "list", *database)).splitlines()} == set(names)


async def test_a_live_database_is_backed_up_and_restored(tmp_path: Path, database: DatabaseOption) -> None:
    process = await Process.start(tmp_path / "chat.db", "--no-rate-limit")
    world = process.world()
    ana = await world.person("ana")
    place = await world.place(ana)
    kept: list[int] = []

    async def post() -> None:
        with contextlib.suppress(aiohttp.ClientError):
            while True:
                kept.append((await ana.post(place.channel_id))["message_id"])

    writers = [asyncio.create_task(post()) for _ in range(8)]
    copies: dict[str, int] = {}
    for name in ("one", "two", "three"):
        copies[name] = len(kept)
        assert "verified" in await run_ok("backup", str(tmp_path / name), *database)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    await process.stop(signal.SIGKILL)
    await asyncio.gather(*writers)
    await world.close()
    assert len(kept) > copies["three"] > 0
    assert (tmp_path / "chat.db-wal").stat().st_size > 0

    # The backup is copied over the database by hand; the -wal of the old one, which must not be applied to it, is still there.
    crashed = {end: Path(f"{tmp_path}/chat.db{end}").read_bytes() for end in ("", "-wal")}
    shutil.copy(tmp_path / "three", tmp_path / "chat.db")
    expect_error(await run_command("serve", "--port", "0", *database), "-wal of another database", "chatrtc restore")
    assert (tmp_path / "chat.db-wal").read_bytes() == crashed["-wal"]
    (tmp_path / "chat.db").write_bytes(crashed[""])

    out = await run_ok("restore", str(tmp_path / "three"), *database)
    aside = Path(out.strip().rpartition(" kept as ")[2])
    assert {end: Path(f"{aside}{end}").read_bytes() for end in ("", "-wal")} == crashed
    assert (tmp_path / "chat.db").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "chat.db-wal").exists()
    assert not list(tmp_path.glob("*.part"))
    process = await Process.start(tmp_path / "chat.db")
    async with process.world() as world:
        ana.world = world
        history = [message["message_id"] for message in await channel_history(ana, place.channel_id)]
        assert set(kept[: copies["three"]]) <= set(history)
        assert history == sorted(history)
        posted = await ana.post(place.channel_id, "after the restore")
        assert posted["message_id"] > history[-1]
    assert await process.stop() == (0, "")
    assert "sound" in await run_ok("check", "--database", str(aside))  # the old database is still usable
    with contextlib.closing(sqlite3.connect(aside)) as db:
        assert {row[0] for row in db.execute("SELECT message_id FROM messages")} >= set(kept)


@pytest.mark.parametrize("way", ["restore", "restore of a lost one", "a copy by hand", "a clock set back"])
async def test_a_restore_reuses_no_number(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, database: DatabaseOption
) -> None:
    path = tmp_path / "chat.db"
    process = await Process.start(path, "--no-rate-limit")
    world = process.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    server = f"/servers/{place.server_id}"
    early, stayed, missed = (Replica(person, place.server_id) for person in (ana, ben, ben))
    for replica in (early, stayed, missed):
        await replica.connect()
    posted = [await ana.post(place.channel_id, str(number)) for number in range(5)]
    for replica in (early, stayed, missed):
        await replica.receive()
    await early.disconnect()
    await ana.ok("DELETE", f"/messages/{posted[0]['message_id']}")
    await missed.receive()  # up to the last number of the backup
    await missed.disconnect()
    await run_ok("backup", str(tmp_path / "copy"), *database)
    lost = [await ana.post(place.channel_id, "lost") for _ in range(5)]
    await ana.ok("PATCH", server, {"name": "lost"})
    channel = await ana.ok("POST", f"{server}/channels", {"name": "lost"})
    cy = await world.person("cy")
    other = await cy.ok("POST", "/servers", {"name": "lost"})
    await stayed.receive()
    assert stayed.name == "lost"
    await world.close()
    await process.stop()

    if way in ("restore of a lost one", "a copy by hand"):
        path.unlink()
    if way == "a copy by hand":
        shutil.copy(tmp_path / "copy", path)
    elif way == "a clock set back":
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert chatrtc.main(["restore", str(tmp_path / "copy"), *database], standalone_mode=False) is None
        monkeypatch.undo()
    else:
        await run_ok("restore", str(tmp_path / "copy"), *database)
    process = await Process.start(path, "--no-rate-limit")
    async with process.world() as world:
        ana.world = ben.world = world
        for replica in (early, stayed, missed):
            await replica.connect()
        assert [replica.resets for replica in (early, stayed, missed)] == [0, 1, 0]
        new = await ana.post(place.channel_id, "new")
        late = Replica(ana, place.server_id)
        await late.connect()
        await late.catch_up()
        await ana.ok("PATCH", f"/messages/{new['message_id']}", {"content": "newer"})
        for replica in (early, stayed, missed, late):
            await replica.receive()
            assert replica.state() == await server_state(ana, place.server_id) | {"seq": new["seq"] + 1}
        assert (new["message_id"] > lost[-1]["message_id"], new["seq"] > lost[-1]["seq"] + 2) == (True, True)
        assert (await world.person("dee")).user_id > cy.user_id
        assert (await ana.ok("POST", f"{server}/channels", {"name": "new"}))["channel_id"] > channel["channel_id"]
        assert (await ana.ok("POST", "/servers", {"name": "new"}))["server_id"] > other["server_id"]
        for after in (lost[0]["seq"], 2**60):  # not numbers of this database
            changes = await ana.ok("GET", f"{server}/changes?after={after}&limit=2")
            assert (changes["reset"], changes["has_more"], changes["messages"][0]["content"]) == (True, True, "1")
    assert await process.stop() == (0, "")


async def test_a_copy_stays_marked_until_it_is_renumbered(tmp_path: Path, filled: dict[str, bytes]) -> None:
    """A power cut while a copied backup is renumbered leaves a -journal, which the next start rolls back."""
    path = tmp_path / "chat.db"
    path.write_bytes(filled["stopped"])
    await run_ok("backup", str(tmp_path / "copy"), "--database", str(path))
    code = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE servers SET seq = 1")
db.execute("UPDATE messages SET content = 'half of it'")
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path / "copy"))
    assert await process.wait() == -signal.SIGKILL
    assert (tmp_path / "copy-journal").stat().st_size > 0
    with contextlib.closing(chatrtc.prepare(tmp_path / "copy")) as db:
        assert chatrtc.check_integrity(db) == []
        assert db.execute("SELECT count(*) FROM messages WHERE content = 'half of it'").fetchone() == (0,)
        seq, after, until = db.execute("SELECT seq, after_seq, until_seq FROM servers JOIN gaps USING (server_id)").fetchone()
        assert after < 3000 < until == seq
    chatrtc.prepare(tmp_path / "copy").close()
    with contextlib.closing(chatrtc.prepare(tmp_path / "copy")) as db:
        assert db.execute("SELECT count(*) FROM gaps").fetchone() == (1,)


async def test_a_failed_backup_leaves_no_file(filled: dict[str, bytes], tmp_path: Path, database: DatabaseOption) -> None:
    (tmp_path / "chat.db").write_bytes(filled["stopped"])
    (tmp_path / "there").write_text("keep me")
    expect_error(await run_command("backup", str(tmp_path / "there"), *database), "exists")
    assert (tmp_path / "there").read_text() == "keep me"
    expect_error(await run_command("backup", str(tmp_path / "missing" / "copy"), *database), "does not exist")
    limited = f"ulimit -f 100; exec {sys.executable} {HERE / 'chatrtc.py'} backup {tmp_path}/full {' '.join(database)}"
    process = await asyncio.create_subprocess_exec("sh", "-c", limited, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()  # a limit on the file size simulates a full disk
    expect_error(Finished(process.returncode or 0, "", err.decode()), "deleted")
    assert not list(tmp_path.glob("full*"))
    assert "verified" in await run_ok("backup", str(tmp_path / "copy"), *database)
    assert (tmp_path / "chat.db").read_bytes() == filled["stopped"]


@pytest.mark.parametrize("name", [name for name in UNUSABLE if "-wal" not in name and name != "emptied"])
async def test_only_a_sound_backup_is_restored(name: str, filled: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    write_unusable(tmp_path / "backups", name, filled)
    (tmp_path / "chat.db").write_bytes(filled["stopped"])
    restore = ("restore", str(tmp_path / "backups" / "chat.db"), "--database", str(tmp_path / "chat.db"))
    expect_error(await run_command(*restore))
    assert (tmp_path / "chat.db").read_bytes() == filled["stopped"]
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} <= {"backups", "chat.db"}


async def test_a_restore_needs_no_database_to_replace(filled: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(filled["stopped"])
    await run_ok("restore", str(tmp_path / "copy"), "--database", str(tmp_path / "chat.db"))
    assert "2000 messages" in await run_ok("check", "--database", str(tmp_path / "chat.db"))
    (tmp_path / "chat.db").write_bytes(bytes(4096))  # a damaged one can be replaced, too
    await run_ok("restore", str(tmp_path / "copy"), "--database", str(tmp_path / "chat.db"))
    assert "2000 messages" in await run_ok("check", "--database", str(tmp_path / "chat.db"))


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM members",
        "UPDATE servers SET kind = 'direct'",
        "UPDATE messages SET seq = seq + 100000 WHERE message_id = 7",
        "UPDATE messages SET deleted = 1 WHERE message_id = 7",
        "UPDATE messages SET author_id = 99 WHERE message_id = 7",
        "UPDATE messages SET server_id = 99 WHERE message_id = 7",
        "INSERT INTO pins (channel_id, message_id) VALUES (99, 7)",
    ],
)
async def test_check_finds_what_sqlite_accepts(
    statement: str, filled: dict[str, bytes], tmp_path: Path, database: DatabaseOption
) -> None:
    (tmp_path / "chat.db").write_bytes(filled["stopped"])
    assert (await run_command("check", *database)).status == 0
    run_sql(tmp_path / "chat.db", statement)
    ended = await run_command("check", *database)
    assert ended.status == 1
    assert ended.out
    assert "has errors: 1" in ended.err


# A file in two pieces that belongs to message 1, as rows.
STORED_FILE = f"""
    INSERT INTO files (file_id, channel_id, uploader_id, uploaded_at, name, type, size, digest, message_id)
        VALUES (1, 1, 1, 0, 'a', 'text/plain', 262147, x'{hashlib.sha256(bytes(262144) + b"abc").hexdigest()}', 1);
    INSERT INTO pieces VALUES (1, 0, zeroblob(262144)), (1, 1, x'616263');
    UPDATE stored SET bytes = 262147
"""  # noqa: S608


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("UPDATE pieces SET data = x'616264' WHERE number = 1", "a file whose bytes have changed: 1"),
        ("UPDATE pieces SET number = 2 WHERE number = 1", "a file whose bytes have changed: 1"),
        ("DELETE FROM pieces WHERE number = 1; UPDATE stored SET bytes = 262144", "a file whose bytes have changed: 1"),
        ("INSERT INTO pieces VALUES (1, 2, x''); UPDATE files SET size = 262147", "a file whose bytes have changed: 1"),
        ("UPDATE files SET size = 262146", "a file whose bytes have changed: 1"),
        ("UPDATE files SET digest = x'00'", "a file whose bytes have changed: 1"),
        ("UPDATE stored SET bytes = 262146", "a wrong total size of all files: 262146"),
        ("UPDATE messages SET deleted = 1, content = '' WHERE message_id = 1", "message is deleted or in another channel: 1"),
        ("UPDATE files SET file_id = 2; UPDATE pieces SET file_id = 2 WHERE number = 0", "pieces 2 refers to a missing row"),
        ("UPDATE files SET message_id = NULL", ""),
        ("UPDATE files SET message_id = NULL, digest = NULL, size = 0", ""),  # still being uploaded
        ("UPDATE files SET message_id = NULL, channel_id = NULL; DELETE FROM pieces WHERE number = 1; "
         "UPDATE stored SET bytes = 262144", ""),  # being removed
    ],
)  # fmt: skip
async def test_check_reads_all_files(
    statement: str, error: str, filled: dict[str, bytes], tmp_path: Path, database: DatabaseOption
) -> None:
    (tmp_path / "chat.db").write_bytes(filled["stopped"])
    run_sql(tmp_path / "chat.db", STORED_FILE)
    assert (await run_command("check", *database)).status == 0
    run_sql(tmp_path / "chat.db", statement)
    ended = await run_command("check", *database)
    assert (ended.status, error in ended.out) == (1 if error else 0, True)
    copied = await run_command("backup", str(tmp_path / "copy"), *database)
    assert (copied.status, (tmp_path / "copy").exists()) == (ended.status, not error), "only a sound database is copied"


async def test_export_writes_everything(world: World, tmp_path: Path, database: DatabaseOption) -> None:
    ana, ben = await world.people("ana", "ben")
    places = [await world.place(ana, ben, name=name) for name in ("<b>first</b>", "second")]
    nasty = "<script>alert('&')</script> {0} {content} %s \U0001f600\nnext line"
    posted = [await ben.post(place.channel_id, nasty) for place in places]
    await ana.ok("PUT", f"/messages/{posted[0]['message_id']}/reactions/%F0%9F%91%8D")
    gone = await ana.post(places[0].channel_id, "deleted since")
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")

    things = [json.loads(line) for line in (await run_ok("export", *database)).splitlines()]
    kinds = [thing["type"] for thing in things]
    assert kinds == ["server", "member", "member", "channel", "message"] * 2
    message = await ana.ok("GET", f"/messages/{posted[0]['message_id']}")
    assert message["reactions"]
    assert things[4] == {"type": "message"} | message
    assert things[0]["kind"] == "server"
    one = await run_ok("export", "--server", str(places[1].server_id), *database)
    assert [json.loads(line)["type"] for line in one.splitlines()] == kinds[:5]
    expect_error(await run_command("export", "--server", "99", *database), "no server 99")

    await run_ok("export", "--format", "html", "--output", str(tmp_path / "all.html"), *database)
    written = (tmp_path / "all.html").read_text("utf-8")
    assert html.escape(nasty) in written
    assert "<h1>&lt;b&gt;first&lt;/b&gt;</h1>" in written
    assert "<script" not in written
    assert "deleted since" not in written
    expect_error(await run_command("export", "--output", "/dev/full", *database), "No space left")


async def test_an_exported_page_shows_replies_reactions_and_edits(
    world: World, tmp_path: Path, database: DatabaseOption
) -> None:
    ana, ben, cyd = await world.people("ana", "ben", "cyd")
    place = await world.place(ana, ben, cyd)
    first = await ana.post(place.channel_id, "<i>first</i>\nline")
    answer = await ben.post(place.channel_id, "answer", reply_to=first["message_id"])
    await ben.ok("PATCH", f"/messages/{answer['message_id']}", {"content": "better <b>"})
    for person in (ana, ben, cyd):
        await person.ok("PUT", f"/messages/{first['message_id']}/reactions/<3")
    await cyd.ok("DELETE", f"/servers/{place.server_id}/members/{cyd.user_id}")
    page = await run_ok("export", "--format", "html", *database)
    assert '<small>In reply to <a href="#m1">ana: &lt;i&gt;first&lt;/i&gt; line</a></small>' in page
    assert "(edited)</time>\nbetter &lt;b&gt;</p>" in page
    assert page.count("(edited)") == 1
    assert "<small>&lt;3 ana, ben, cyd</small>" in page, "reactions of former members are shown"
    assert not re.search(r"<(i|script|3)\b", page)


async def test_conversations_are_exported_and_checked(world: World, tmp_path: Path, database: DatabaseOption) -> None:
    ana, ben, cy = await world.people("ana", "ben", "cy")
    place = await world.place(ana, ben, cy)
    pair, group = await start(ana, ben), await start(ana, ben, cy, name="three")
    message = await ben.post(pair["channels"][0]["channel_id"], "in private")
    await ben.ok("DELETE", f"/servers/{pair['server_id']}/members/{ben.user_id}")
    things = [json.loads(line) for line in (await run_ok("export", *database)).splitlines()]
    servers = {thing["server_id"]: (thing["kind"], thing["name"]) for thing in things if thing["type"] == "server"}
    ids = [place.server_id, pair["server_id"], group["server_id"]]
    assert servers == dict(zip(ids, [("server", "class"), ("direct", "ana, ben"), ("direct", "three")], strict=True))
    assert {"type": "message"} | message in things
    at = [thing["type"] for thing in things].index("former")
    assert (things[at]["user_id"], things[at - 1]["user_id"]) == (ben.user_id, ana.user_id)
    page = await run_ok("export", "--format", "html", *database)
    assert "<h1>ana, ben</h1>" in page and "in private" in page
    assert "3 servers" in await run_ok("check", *database)
    await run_ok("user", "delete", "ben", "--yes", *database)
    assert "3 servers" in await run_ok("check", *database), "Ana is still in the conversation"
    await run_ok("user", "delete", "ana", "--yes", *database)
    assert "2 servers" in await run_ok("check", *database), "Cy has the group and owns the class"
    await run_ok("user", "delete", "cy", "--yes", *database)
    assert "0 servers" in await run_ok("check", *database)


async def test_an_export_contains_the_files(world: World, tmp_path: Path, database: DatabaseOption) -> None:
    ana, ben = await world.people("ana", "ben")
    place, other = await world.place(ana, ben), await world.place(ana)
    contents = {"a 100% <b> & ü.png": png(3, 4) + bytes(600_000), "two.txt": b"line\r\nline\n", "empty": b""}
    files = [(await post_file(ana, place.channel_id, content, name)).body for name, content in contents.items()]
    await ben.post(place.channel_id, "no files")
    message = await ana.post(place.channel_id, "with files", files=[file["file_id"] for file in files])
    hidden = await post_file(ana, other.channel_id, b"elsewhere", "else")
    await ana.post(other.channel_id, "", files=[hidden.body["file_id"]])
    await post_file(ana, place.channel_id, b"in no message")
    gone = await post_file(ana, place.channel_id, b"deleted")
    deleted = await ana.post(place.channel_id, "", files=[gone.body["file_id"]])
    await ana.ok("DELETE", f"/messages/{deleted['message_id']}")

    folder, victim = tmp_path / "out", tmp_path / "victim"
    names = ["1-a 100% _b_ & ü.png", "2-two.txt", "3-empty"]
    folder.mkdir()
    victim.write_text("mine")
    for name in (names[0], "2.part"):
        (folder / name).symlink_to(victim)
    export = ("export", "--server", str(place.server_id), "--files", str(folder), *database)
    for _ in range(2):  # again into the same folder
        lines = [json.loads(line) for line in (await run_ok(*export)).splitlines()]
        assert lines[-1] == {"type": "message"} | message
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == dict(zip(names, contents.values(), strict=True))
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert victim.read_text() == "mine"
    await run_ok("export", "--files", str(folder), *database)
    assert {path.name for path in folder.iterdir()} == {*names, "4-else"}

    page = await run_ok(*export, "--format", "html")
    address = "out/1-a%20100%25%20_b_%20%26%20%C3%BC.png"
    picture = base64.b64encode(contents["a 100% <b> & ü.png"]).decode()
    picture = f'<img alt="a 100% _b_ &amp; ü.png" src="data:image/png;base64,{picture}">'
    assert f'{picture}<small><a href="{address}">a 100% _b_ &amp; ü.png (600' in page
    assert '<a href="out/2-two.txt">two.txt (11 bytes)</a>' in page
    without = await run_ok("export", "--format", "html", *database)
    assert "two.txt (11 bytes)" in without
    assert picture in without and "<a href" not in without
    expect_error(await run_command(*export[:3], "--files", str(victim), *database), "is a file")
    expect_error(await run_command(*export[:3], "--files", str(tmp_path / "missing" / "out"), *database), "No such file")


async def test_servers_are_added_while_the_server_runs(world: World, tmp_path: Path, database: DatabaseOption) -> None:
    ana = await world.person("ana")
    assert await run_ok("server", "add", "Our class", "--owner", "ANA", *database) == "Our class has the id 1\n"
    (server,) = (await ana.ok("GET", "/servers"))["servers"]
    assert (server["name"], server["role"], server["channels"][0]["name"]) == ("Our class", "owner", "general")
    expect_error(await run_command("server", "add", "x", "--owner", "nobody", *database), "nobody")
    expect_error(await run_command("server", "add", "", "--owner", "ana", *database), "name")
    expect_error(await run_command("server", "add", "x", *database), "--owner")


async def test_an_account_is_deleted_with_its_messages(scene: Scene, tmp_path: Path, database: DatabaseOption) -> None:
    posted = [await scene.ben.post(scene.place.channel_id, str(number)) for number in range(3)]
    await run_ok("user", "delete", "ben", "--yes", "--messages", *database)
    for message in reversed(posted):
        assert (await scene.ana_socket.receive("message:deleted"))["message_id"] == message["message_id"]
    history = await channel_history(scene.ana, scene.place.channel_id)
    assert [message["content"] for message in history] == ["before"]


async def test_a_deleted_text_leaves_every_file(make_world: MakeWorld, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    world = await make_world(database=str(tmp_path / "data" / "chat.db"))
    ana = await world.person("ana")
    place = await world.place(ana)
    secret = [f"{word}{number}" for word in ("zirkonium", "quetzal", "xylophon") for number in range(40)]
    kept = await ana.post(place.channel_id, "stays here")
    posted = [await ana.post(place.channel_id, f"{word} and others") for word in secret]
    found = await ana.ok("GET", f"/servers/{place.server_id}/search?q={secret[0]}")  # so that they are indexed
    assert len(found["messages"]) == 1
    assert b"zirkonium" in database_bytes(tmp_path / "data")
    for message in posted[:80]:
        await ana.ok("DELETE", f"/messages/{message['message_id']}")
    for message in posted[80:]:
        await ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "changed"})

    def is_erased() -> bool:
        stored = database_bytes(tmp_path / "data")
        return not any(word in stored for word in (b"zirkonium", b"quetzal", b"xylophon"))

    await until(is_erased)
    assert (tmp_path / "data" / "chat.db-wal").stat().st_size == 0
    found = await ana.ok("GET", f"/servers/{place.server_id}/search?q=stays")
    assert [message["message_id"] for message in found["messages"]] == [kept["message_id"]]
    assert len((await ana.ok("GET", f"/servers/{place.server_id}/search?q=changed"))["messages"]) > 0


async def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    lax = ("sh", "-c", 'umask 000; exec "$0" "$@"')
    process = await Process.start(tmp_path / "chat.db", prefix=lax)
    async with process.world() as world:
        await world.person("ana")
        await run_ok("backup", str(tmp_path / "copy"), "--database", str(tmp_path / "chat.db"))
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    await process.stop()
    names = [
        "chat.db",
        "chat.db-shm",
        "chat.db-wal",
        "chat.db.lock",
        "chat.db.next.lock",
        "chat.db.turn.lock",
        "chat.db.secret",
        "copy",
        "copy.lock",
    ]
    assert modes == {name: 0o600 for name in names if name in modes}
    assert set(modes) >= set(names[:-1])


async def test_secrets_stay_secret(tmp_path: Path, database: DatabaseOption) -> None:
    """No secret is printed, logged, or among the arguments that every user of the machine can read."""
    secret, password = "a secret of thirty-two bytes or so", "correct horse battery"
    process = await Process.start(tmp_path / "chat.db", env={"CHATRTC_SECRET": secret})
    printed = await run_ok("user", "add", "ana", *database, stdin=password + "\n")
    token = (await run_ok("token", "ana", *database, env={"CHATRTC_SECRET": secret})).strip()
    async with process.world() as world:
        assert (await world.call("GET", "/users/me", token=token)).status == 200
        await world.sign_in("ana", password)
        await world.sign_in("ana", password + "!")
        await world.call("GET", f"/users/me?token={token}", token=token + "x")
        await world.call("POST", "/auth/login", headers={"Content-Type": "application/json"}, data=password)
        with contextlib.suppress(socketio.exceptions.ConnectionError):
            await world.socket(token + "x")
        with contextlib.suppress(socketio.exceptions.ConnectionError):
            await world.socket(headers={"Authorization": token})
        arguments = Path(f"/proc/{process.process.pid}/cmdline").read_bytes().decode()
    assert "chatrtc.py" in arguments
    status, errors = await process.stop()
    assert status == 0
    for text in (printed, errors, arguments):
        for word in (secret, password, token):
            assert word not in text
    expect_error(await run_command("serve", "--secret", secret[:31], *database))


# What Windows lacks. There is no Windows in the tests: they hide it on Linux. The names are from the stubs that mypy contains.


def stub_names(body: list[ast.stmt], platform: str) -> Iterator[str]:
    """Yield the names that a stub defines on a platform, for the oldest Python."""
    for node in body:
        match node:
            case ast.If():
                system = types.SimpleNamespace(platform=platform, version_info=(3, 11))
                yield from stub_names(node.body if eval(ast.unparse(node.test), {"sys": system}) else node.orelse, platform)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.ImportFrom():
                yield from (alias.asname for alias in node.names if alias.asname)


@functools.cache
def absent_on_windows() -> dict[str, list[str]]:
    """Return, for each module that chatrtc.py imports, the names that it lacks on Windows; all of them if it is missing."""
    folder = Path(str(find_spec("mypy").origin)).parent / "typeshed" / "stdlib"
    found = {}
    for name in {alias.name for node in ast.walk(TREE) if isinstance(node, ast.Import) for alias in node.names}:
        for stub in (folder / f"{name}.pyi", folder / name / "__init__.pyi"):
            if stub.exists():
                body = ast.parse(stub.read_text("utf-8")).body
                found[name] = sorted({*stub_names(body, "linux")} - {*stub_names(body, "win32")})
    return found


# A sitecustomize.py, which Python runs at its start. It hides modules and names from chatrtc.py and its tests; for chatrtc.py,
# files behave as on Windows, on a disk without hard links. The libraries have other code for Windows.
WINDOWS = """
import asyncio, builtins, fcntl, importlib, json, os, signal, struct, sys, types

ABSENT = json.loads(os.environ["ABSENT_ON_WINDOWS"])
VIEWS = {}


def refuse(error, *args):
    raise error(*args)


def is_called():
    frame = sys._getframe()
    while frame and os.path.basename(frame.f_code.co_filename) != "chatrtc.py":
        frame = frame.f_back
    return bool(frame)


def is_open(path):
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    for name in os.listdir("/proc/self/fd"):
        try:
            file = os.stat(int(name))
        except OSError:
            continue
        if os.path.samestat(file, found):
            return True
    return False


def closed_only(call, may_exist=True):
    def wrapped(*paths, **options):
        if not may_exist and is_called() and os.path.exists(paths[1]):
            raise FileExistsError(17, "Cannot create a file when that file already exists", os.fspath(paths[1]))
        for path in paths:
            if is_called() and is_open(path):
                raise PermissionError(13, "The file is being used by another process", os.fspath(path))
        return call(*paths, **options)

    return wrapped


def open_file(path, *args, real=os.open, **options):
    if is_called() and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return real(path, *args, **options)


def sync(file, real=os.fsync):
    number = file if isinstance(file, int) else file.fileno()
    if is_called() and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    real(number)


def without_modes(file, real=os.fstat):
    found = real(file)
    return os.stat_result((found.st_mode | 0o066, *found[1:4], 0, 0, *found[6:]))


class Locks:  # msvcrt.locking by Linux's locks of open files
    LK_UNLCK, LK_NBLCK = 0, 2

    def __init__(self):
        self.held = set()

    def locking(self, file, mode, size):
        start = os.lseek(file, 0, os.SEEK_CUR)
        mine = [(first, number) for other, first, number in self.held if other == file]
        if mode == self.LK_UNLCK:
            if (start, size) not in mine:
                raise PermissionError(13, "Permission denied")
            self.held.remove((file, start, size))
        elif any(first < start + size and start < first + number for first, number in mine):
            raise PermissionError(13, "Permission denied")
        kind = fcntl.F_UNLCK if mode == self.LK_UNLCK else fcntl.F_WRLCK
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))
        except OSError:
            raise PermissionError(13, "Permission denied") from None
        if mode != self.LK_UNLCK:
            self.held.add((file, start, size))

    def close(self, file, real=os.close):
        self.held = {one for one in self.held if one[0] != file}
        real(file)


def hide(real):
    def import_module(name, *args, **options):
        if name == "uvloop":
            raise ModuleNotFoundError(name)
        caller = sys._getframe().f_back
        if caller and os.path.basename(caller.f_code.co_filename) in ("chatrtc.py", "test_chatrtc.py"):
            if name in VIEWS:
                return VIEWS[name]
            if name in ("fcntl", "grp", "pwd", "resource", "termios"):
                raise ModuleNotFoundError(name)
        return real(name, *args, **options)

    return import_module


locks = Locks()
os.rename = closed_only(os.rename, may_exist=False)
os.replace, os.unlink, os.remove = closed_only(os.replace), closed_only(os.unlink), closed_only(os.remove)
os.close, os.open, os.fsync = locks.close, open_file, sync
os.link = lambda *args, **options: refuse(OSError, 22, "Incorrect function")
asyncio.SelectorEventLoop.add_signal_handler = lambda *args: refuse(NotImplementedError)
for name in ("errno", "os", "signal", "socket", "sys", "time"):
    VIEWS[name] = types.ModuleType(name)
    vars(VIEWS[name]).update({key: value for key, value in vars(sys.modules[name]).items() if key not in ABSENT[name]})
VIEWS["os"].fstat = without_modes
VIEWS["signal"].SIGBREAK = signal.SIGUSR1
VIEWS["msvcrt"] = locks
builtins.__import__, importlib.import_module = hide(builtins.__import__), hide(importlib.import_module)
"""


@pytest.fixture
def windows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python process in which chatrtc.py finds only what Windows has."""
    folder = tmp_path_factory.mktemp("windows")
    (folder / "sitecustomize.py").write_text(WINDOWS, "utf-8")
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]),
        "PYTHONIOENCODING": "cp1252",  # as when standard input and output are redirected
        "PYTHONWARNDEFAULTENCODING": "1",  # to standard error, which has to be empty
        "ABSENT_ON_WINDOWS": json.dumps(absent_on_windows()),
    }


def test_only_guarded_code_uses_what_windows_lacks() -> None:
    absent = {f"{module}.{name}" for module, names in absent_on_windows().items() for name in names}
    assert {"os.geteuid", "os.statvfs", "signal.SIGHUP", "socket.AF_UNIX", "time.tzset"} <= absent
    used = {ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Attribute)} & absent
    guarded = {"os.O_DIRECTORY", "os.fchown", "socket.AF_UNIX"}  # used only where the system has them
    assert used == guarded, "this raises AttributeError on Windows"


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        *((f"import {name}", "ModuleNotFoundError") for name in ("fcntl", "termios", "resource", "pwd", "grp", "uvloop")),
        *((f"import os; os.{name}", "AttributeError") for name in ("geteuid", "fchown", "statvfs", "O_NOFOLLOW", "pwrite")),
        ("import signal; signal.SIGHUP", "AttributeError"),
        ("from socket import AF_UNIX", "ImportError"),
        ("import os; os.open('.', os.O_RDONLY)", "PermissionError"),
        ("import os; os.rename('chatrtc.py', 'other')", "FileExistsError"),
        ("import os; file = open('other'); os.replace('chatrtc.py', 'other')", "PermissionError"),
        ("from pathlib import Path; file = open('other'); Path('other').unlink()", "PermissionError"),
        ("import os; file = open('other'); os.fsync(file.fileno())", "OSError"),
        ("import asyncio; asyncio.SelectorEventLoop().add_signal_handler(2, print)", "NotImplementedError"),
        ("import msvcrt; file = open('other', 'r+b'); [msvcrt.locking(file.fileno(), 2, 1) for _ in '12']", "PermissionError"),
        ("import msvcrt; files = [open('other', 'r+b') for _ in '12']; "
         "[msvcrt.locking(file.fileno(), 2, 9) for file in files]", "PermissionError"),
        ("import msvcrt; file = open('other', 'r+b'); msvcrt.locking(file.fileno(), 0, 1)", "PermissionError"),
        ("import msvcrt; file = open('other', 'r+b'); msvcrt.locking(file.fileno(), 2, 9)", ""),
        ("import os; os.replace('chatrtc.py', 'other')", ""),
    ],
)  # fmt: skip
def test_the_tests_hide_what_windows_lacks(tmp_path: Path, windows: dict[str, str], statement: str, error: str) -> None:
    program = tmp_path / "chatrtc.py"
    program.write_text(statement, "utf-8")
    (tmp_path / "other").touch()
    ended = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env=os.environ | windows, capture_output=True, encoding="utf-8"
    )
    assert f"{error}" in ended.stderr if error else ended.returncode == 0, ended


async def test_the_server_runs_without_what_windows_lacks(tmp_path: Path, windows: dict[str, str]) -> None:
    path, copy = tmp_path / "Schüler.db", tmp_path / "copy.db"
    database = ("--database", str(path))
    process = await Process.start(path, "--no-rate-limit", env=windows)
    async with process.world() as world:
        ana, ben = await world.people("ana", "ben")
        place = await world.place(ana, ben)
        sockets = [await ben.socket(place.server_id, transports=[way]) for way in ("websocket", "polling")]
        message = await ana.post(place.channel_id, "hello 👋")
        for socket in sockets:
            assert (await socket.receive("message:new"))["content"] == "hello 👋"
        expect_error(await run_command("serve", "--port", "0", *database, env=windows), "in use")
        port = world.url.rpartition(":")[2]
        expect_error(await run_command("serve", "--port", port, env=windows, cwd=tmp_path), "Cannot listen")
        await run_ok("user", "add", "Zoë王", *database, stdin="pässwörd王\n", env=windows)
        assert "Zoë王" in await run_ok("user", "list", *database, env=windows)
        assert (await world.sign_in("Zoë王", "pässwörd王")).status == 200
        await run_ok("server", "add", "club", "--owner", "ana", *database, env=windows)
        assert "verified" in await run_ok("backup", str(copy), *database, env=windows)
        assert "hello 👋" in await run_ok("export", *database, env=windows)
        assert "hello 👋" in await run_ok("export", "--format", "html", *database, env=windows)
        assert (await run_ok("check", *database, env=windows)) == "sound: 3 users, 2 servers, 1 messages\n"
        expect_error(await run_command("restore", str(copy), *database, env=windows), "stop the server first")
        after = await ana.post(place.channel_id, "after the backup")
        assert (await sockets[0].receive("message:new"))["message_id"] == after["message_id"] > message["message_id"]
    status, errors = await process.stop(signal.SIGINT)
    assert (status, "Traceback" in errors) == (0, False), errors
    process = await Process.start(path, env=windows)
    async with process.world() as world:
        ana = Person(world, "ana", ana.user_id, ana.token)
        history = await ana.ok("GET", f"/channels/{place.channel_id}/messages")
        assert [one["content"] for one in history["messages"]] == ["hello 👋", "after the backup"]
    assert await process.stop(signal.SIGUSR1) == (0, ""), "this signal stands for Ctrl-Break"
    assert "is kept as" in await run_ok("restore", str(copy), *database, env=windows)
    assert [is_sound(file) for file in tmp_path.glob("Schüler.db.2*Z")] == [True], "the old database was copied"
    process = await Process.start(path, "--tls-self-signed", env=windows)
    assert await process.stop() == (0, "")
    assert (await run_ok("check", *database, env=windows)) == "sound: 3 users, 2 servers, 1 messages\n"


@pytest.mark.soak
async def test_the_portable_tests_pass_without_what_windows_lacks(windows: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "portable",
        "-k", "packets or binary or migrated or bare or listener", str(HERE / "test_chatrtc.py"),
        env=os.environ | windows | {"PYTHONWARNDEFAULTENCODING": ""}, cwd=HERE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode("utf-8", "replace")
    assert (passed := re.search(rb"(\d+) passed", out)) and int(passed[1]) > 20


# ---- Guarantees -----------------------------------------------------------------------------------------------------
# Each promise of the README is tested by causing the real fault: kills, power cuts, full disks, hostile clients. The numbers
# here are those of every commit; `pytest -m soak` runs the same tests with the full ones. A test that shows that something
# does not happen also shows that it would have noticed it (its control).


def trials(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with `tries` trials: `few` in every run, `many` in the soak."""
    return pytest.mark.parametrize("tries", [few, pytest.param(many, marks=pytest.mark.soak)])


GONE = (aiohttp.ClientError, OSError, TimeoutError)  # what a request raises if its server dies


class Writers:
    """People who post messages, each with a nonce, and the answers that they received."""

    def __init__(self, place: Place, people: list[Person]) -> None:
        self.place, self.people = place, people
        self.answered: dict[str, Any] = {}  # nonce -> the message of the first 201
        self.asked: dict[str, Person] = {}  # nonce -> its author
        self.refused: list[Reply] = []
        self.received: list[Any] = []  # messages that a socket received
        self._number = 0

    @property
    def unanswered(self) -> list[str]:
        return [nonce for nonce in self.asked if nonce not in self.answered]

    async def post(self, world: World, nonce: str) -> bool:
        """Post the message of this nonce, maybe again; tell if the answer was 201."""
        message = {"channel_id": self.place.channel_id, "content": f"this is {nonce}", "nonce": nonce}
        try:
            reply = await world.call("POST", "/messages", message, token=self.asked[nonce].token)
        except GONE:
            return False
        if reply.status != 201:
            self.refused.append(reply)
            return False
        first = self.answered.setdefault(nonce, reply.body)
        assert reply.body == first, "a retry was answered with another message"
        return True

    async def post_on(self, world: World, person: Person) -> None:
        """Post until the server is gone or answers with an error."""
        while True:
            self._number += 1
            nonce = f"nonce-{self._number}"
            self.asked[nonce] = person
            if not await self.post(world, nonce):
                return

    def start(self, world: World) -> list[asyncio.Task[None]]:
        """Let everybody post in the background."""
        return [asyncio.create_task(self.post_on(world, person)) for person in self.people]

    async def progress(self) -> None:
        """Wait for 50 more answers."""
        before = len(self.answered)
        await until(lambda: len(self.answered) > before + 50)

    async def listen(self, world: World) -> Socket:
        """Return a socket that adds its messages to `received`."""
        socket = await world.socket(self.people[0].token)
        socket.client.on("message:new", self._handle_message)
        await socket.ok("join_server", {"server_id": self.place.server_id})
        return socket

    async def _handle_message(self, message: Any) -> None:
        self.received.append(message)

    async def settle(self, world: World) -> None:
        """Post all messages without an answer again."""
        waiting = self.unanswered
        for start in range(0, len(waiting), 64):
            some = waiting[start : start + 64]
            assert all(await asyncio.gather(*(self.post(world, nonce) for nonce in some))), self.refused[-1:]

    async def losses(self, world: World) -> dict[str, list[Any]]:
        """Return the violations of the promise, by kind."""
        stored = await server_history(world, self.place.server_id, self.people[0].token)
        by_nonce: dict[str, list[Any]] = {}
        for message in stored:
            by_nonce.setdefault(message["content"].removeprefix("this is "), []).append(message)
        by_id = {message["message_id"]: message for message in stored}
        seqs = [message["seq"] for message in stored]
        in_order = sorted(stored, key=lambda message: message["message_id"]) == stored
        first = seqs[0] if seqs else 0
        return {
            "lost": [nonce for nonce, message in self.answered.items() if message not in by_nonce.get(nonce, [])],
            "twice": [nonce for nonce, messages in by_nonce.items() if len(messages) > 1],
            "received but not stored": [message for message in self.received if by_id.get(message["message_id"]) != message],
            "never posted": [nonce for nonce in by_nonce if nonce not in self.asked],
            "out of order": [] if in_order and seqs == list(range(first, first + len(seqs))) else seqs,
        }

    async def check(self, world: World) -> None:
        losses = await self.losses(world)
        assert not any(losses.values()), losses


class Server(Process):
    """A server in a process of its own, without rate limits, which its test ends."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        super().__init__(process, url)
        self.seconds = 0.0  # from launch to ready
        self.worlds: list[World] = []

    def world(self) -> World:
        self.worlds.append(super().world())
        return self.worlds[-1]

    async def end(self) -> None:
        for world in self.worlds:
            await world.close()
        if self.process.returncode is None:
            await self.stop(signal.SIGKILL)

    async def stop_well(self, tracebacks: bool = False) -> None:
        """Stop with status 0 and a short log, which has a traceback only if that is allowed."""
        status, log = await self.stop()
        assert status == 0
        assert tracebacks or "Traceback" not in log, log
        assert len(log) < 100_000


Launch = Callable[..., Awaitable[Server]]


@pytest_asyncio.fixture
async def launch() -> AsyncIterator[Launch]:
    """Start servers in processes of their own."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(database: Path, *options: str, limits: bool = False, **given: Any) -> Server:
            began = time.monotonic()
            process = await Server.start(database, *options, *(() if limits else ("--no-rate-limit",)), **given)
            assert isinstance(process, Server)
            process.seconds = time.monotonic() - began
            stack.push_async_callback(process.end)
            return process

        yield start


# 1. A 201 survives kill -9 and a power cut.
#
# A killed process loses nothing that it passed to the kernel, so a kill alone would not reveal a missing sync. For a power cut
# the server runs with a library under its file system calls that records every write and sync in the database's folder. After
# the kill, the folder is rewritten as a disk would hold it: everything that was synced and, of the rest, nothing or pieces.

SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FILES = 65536 };
static const char *folder, *broken;              /* watched; a file whose presence makes every sync fail with EIO */
static int journal = -1;
static unsigned long long watched[FILES];        /* fd -> inode of a file of the folder, or 0 */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULT_JOURNAL");
    broken = getenv("FAULT_BROKEN");
    if (path) journal = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    folder = getenv("FAULT_FOLDER");
}

static void record(char kind, unsigned long long inode, long long offset, const void *data, unsigned long long length) {
    struct __attribute__((packed)) { char kind; unsigned long long inode; long long offset; unsigned long long length; }
        head = {kind, inode, offset, length};
    struct iovec parts[2] = {{&head, sizeof head}, {(void *)data, length}};
    if (journal >= 0 && writev(journal, parts, 2) != (ssize_t)(sizeof head + length)) abort();
}

static const char *inside(const char *path) {    /* the name of a file of the folder, "." for itself, else NULL */
    size_t length = folder ? strlen(folder) : 0, all = strlen(path);
    if (!length || strncmp(path, folder, length)) return NULL;
    if (!path[length]) return ".";
    if (path[length] != '/' || strchr(path + length + 1, '/')) return NULL;
    if (all > 4 && !strcmp(path + all - 4, "-shm")) return NULL;
    if (all > 5 && !strcmp(path + all - 5, ".lock")) return NULL;
    return path + length + 1;
}

static unsigned long long of(int fd) { return fd >= 0 && fd < FILES ? watched[fd] : 0; }

static int open_file(int at, const char *path, int flags, mode_t mode) {
    const char *name = inside(path);
    if (!name) return syscall(SYS_openat, at, path, flags, mode);
    pthread_mutex_lock(&lock);
    int there = !syscall(SYS_faccessat, at, path, F_OK);
    int fd = syscall(SYS_openat, at, path, flags, mode);
    struct stat about;
    if (fd >= 0 && fd < FILES && !fstat(fd, &about)) {
        watched[fd] = about.st_ino;
        if (!there) record('C', about.st_ino, 0, name, strlen(name));
        else if (flags & O_TRUNC) record('T', about.st_ino, 0, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); return open_file(AT_FDCWD, path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more); return open_file(at, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)

int close(int fd) {
    if (fd >= 0 && fd < FILES) watched[fd] = 0;
    return syscall(SYS_close, fd);
}

static ssize_t write_at(int fd, const void *data, size_t length, off_t offset) {
    pthread_mutex_lock(&lock);
    ssize_t done = syscall(SYS_pwrite64, fd, data, length, offset);
    if (done > 0) record('W', of(fd), offset, data, done);
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t length, off_t offset) {
    return of(fd) ? write_at(fd, data, length, offset) : syscall(SYS_pwrite64, fd, data, length, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) { return pwrite(fd, data, length, offset); }
ssize_t write(int fd, const void *data, size_t length) {
    if (!of(fd)) return syscall(SYS_write, fd, data, length);
    ssize_t done = write_at(fd, data, length, lseek(fd, 0, SEEK_CUR));
    if (done > 0) lseek(fd, done, SEEK_CUR);
    return done;
}

int ftruncate(int fd, off_t size) {
    if (!of(fd)) return syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int failed = syscall(SYS_ftruncate, fd, size);
    if (!failed) record('T', of(fd), size, NULL, 0);
    pthread_mutex_unlock(&lock);
    return failed;
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

static int sync_file(int fd, int call) {
    if (!of(fd)) return syscall(call, fd);
    if (broken && !syscall(SYS_faccessat, AT_FDCWD, broken, F_OK)) { errno = EIO; return -1; }
    usleep(2000);                                /* the time that a disk takes: most cuts happen here */
    pthread_mutex_lock(&lock);
    record('S', of(fd), 0, NULL, 0);             /* the journal is the disk, so this record is the sync */
    pthread_mutex_unlock(&lock);
    return 0;
}
int fsync(int fd) { return sync_file(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_file(fd, SYS_fdatasync); }

int unlink(const char *path) {
    const char *name = inside(path);
    if (!name) return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    pthread_mutex_lock(&lock);
    int failed = syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    if (!failed) record('U', 0, 0, name, strlen(name));
    pthread_mutex_unlock(&lock);
    return failed;
}

int rename(const char *from, const char *to) {
    const char *old = inside(from), *new = inside(to);
    if (!old || !new) return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    pthread_mutex_lock(&lock);
    int failed = syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    char both[1024];
    int length = snprintf(both, sizeof both, "%s/%s", old, new);
    if (!failed) record('R', 0, 0, both, length);
    pthread_mutex_unlock(&lock);
    return failed;
}
"""


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library under a server's file system calls, to be preloaded."""
    if sys.platform != "linux":
        pytest.skip("needs LD_PRELOAD")
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(SHIM)
    command = [find_program("cc"), "-shared", "-fPIC", "-O2", "-w", "-o", "faults.so", "faults.c", "-lpthread"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "faults.so"


class Disk:
    """The folder of a database, on a disk that can lose power."""

    RECORD = struct.Struct("<cQqQ")

    def __init__(self, folder: Path, faults: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir()
        self.journal = folder.with_suffix(".journal")
        self.broken = folder.with_suffix(".broken")
        self.env = {
            "LD_PRELOAD": str(faults),
            "FAULT_FOLDER": str(self.folder),
            "FAULT_JOURNAL": str(self.journal),
            "FAULT_BROKEN": str(self.broken),
        }
        self.sync_all()

    def sync_all(self) -> None:
        """Take the folder as it is now as the state of the disk."""
        self.journal.unlink(missing_ok=True)
        paths = [path for path in self.folder.iterdir() if path.suffix != ".lock" and not path.name.endswith("-shm")]
        self.names = {path.name: path.stat().st_ino for path in paths}
        self.held = {path.stat().st_ino: bytearray(path.read_bytes()) for path in paths}

    def records(self) -> Iterator[tuple[bytes, int, int, bytes]]:
        with self.journal.open("rb") as file:
            while len(head := file.read(self.RECORD.size)) == self.RECORD.size:
                kind, inode, offset, length = self.RECORD.unpack(head)
                yield kind, inode, offset, file.read(length)

    def lose_power(self, dice: random.Random) -> int:
        """Leave in the folder what was synced and, of the rest, nothing or pieces; return the number of pending writes."""
        tear = dice.choice((0, 512, 4096))
        itself = self.folder.stat().st_ino
        pending: dict[int, list[tuple[bytes, int, bytes]]] = {}
        entries: list[tuple[bytes, int, bytes]] = []  # changes of the folder itself, which a disk makes in order
        for kind, inode, offset, data in self.records():
            if kind in b"CUR":
                entries.append((kind, inode, data))
                if kind == b"C":
                    self.held[inode], pending[inode] = bytearray(), []
            elif kind != b"S":
                pending.setdefault(inode, []).append((kind, offset, data))
            elif inode == itself:
                self.rename(entries)
                entries.clear()
            else:
                for change in pending.pop(inode, []):
                    self.write(inode, *change)
        self.rename(entries[: dice.randint(0, len(entries)) if tear else 0])
        for inode, changes in pending.items():
            for kind, offset, data in changes:
                if tear and dice.random() < 0.5:
                    for start in range(0, max(1, len(data)), tear):
                        if dice.random() < 0.7:
                            self.write(inode, kind, offset + start, data[start : start + tear])
        for path in self.folder.iterdir():
            if path.suffix != ".lock":
                path.unlink()
        for name, inode in self.names.items():
            (self.folder / name).touch(0o600)
            (self.folder / name).write_bytes(self.held[inode])
        self.sync_all()
        return sum(map(len, pending.values()))

    def rename(self, entries: list[tuple[bytes, int, bytes]]) -> None:
        for kind, inode, data in entries:
            if kind == b"C":
                self.names[data.decode()] = inode
            elif kind == b"U":
                self.names.pop(data.decode(), None)
            else:
                old, new = data.decode().split("/")
                self.names[new] = self.names.pop(old)

    def write(self, inode: int, kind: bytes, offset: int, data: bytes) -> None:
        content = self.held[inode]
        if len(content) < offset:
            content.extend(bytes(offset - len(content)))
        if kind == b"T":
            del content[offset:]
        else:
            content[offset : offset + len(data)] = data


def patched(statement: str) -> tuple[str, ...]:
    """Return a command prefix that runs a server after this statement has changed its module."""
    start = "import sys; sys.argv = sys.argv[2:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); import chatrtc"
    return (sys.executable, "-c", f"{start}\n{statement}\nchatrtc.main()")


WRITERS = [f"writer{number}" for number in range(16)]


async def start_writers(process: Process) -> Writers:
    world = process.world()
    people = await world.people(*WRITERS)
    place = await world.place(*people)
    return Writers(place, people)


async def write_and_kill(process: Process, writers: Writers, seconds: float) -> None:
    """Retry the unanswered posts, post from all sides, and kill the server meanwhile."""
    world = process.world()
    await writers.settle(world)
    await writers.listen(world)
    posting = writers.start(world)
    await writers.progress()
    await asyncio.sleep(seconds)
    await process.stop(signal.SIGKILL)
    await asyncio.gather(*posting)


@trials(10, 200)
async def test_acknowledged_posts_survive_a_kill(launch: Launch, tmp_path: Path, tries: int) -> None:
    database, dice, starts = tmp_path / "chat.db", random.Random(1), []
    process = await launch(database)
    writers = await start_writers(process)
    for _ in range(tries):
        await write_and_kill(process, writers, dice.uniform(0, 0.3))
        process = await launch(database)
        starts.append(process.seconds)
    world = process.world()
    await writers.settle(world)
    await writers.check(world)
    assert await process.stop() == (0, "")
    assert (await run_ok("check", "--database", str(database))).startswith("sound")
    assert not writers.refused
    print(f"{tries} kills, {len(writers.answered)} answered, start at most {max(starts):.2f} s")
    assert max(starts) < bound(2)


@trials(5, 100)
async def test_acknowledged_posts_survive_a_power_cut(launch: Launch, tmp_path: Path, faults: Path, tries: int) -> None:
    disk, dice, starts, dropped = Disk(tmp_path / "disk", faults), random.Random(2), [], 0
    database = disk.folder / "chat.db"
    process = await launch(database, env=disk.env)
    writers = await start_writers(process)
    for number in range(4 * tries):
        if number >= tries and dropped:
            break  # by chance, a few cuts can find everything synced: then more are needed
        await write_and_kill(process, writers, dice.uniform(0, 0.3))
        dropped += disk.lose_power(dice)
        if number % 10 == 0:
            assert (await run_ok("check", "--database", str(database))).startswith("sound")
            disk.sync_all()
        process = await launch(database, env=disk.env)
        starts.append(process.seconds)
    world = process.world()
    await writers.settle(world)
    await writers.check(world)
    assert await process.stop() == (0, "")
    assert dropped, "everything was synced before each cut, so the cuts show nothing"
    print(f"{tries} cuts, {len(writers.answered)} answered, {dropped} writes undone, start at most {max(starts):.2f} s")
    assert max(starts) < bound(2)


async def test_a_power_cut_reveals_a_missing_sync(launch: Launch, tmp_path: Path, faults: Path) -> None:
    """The control: if SQLite syncs only at checkpoints, a cut loses acknowledged posts."""
    disk = Disk(tmp_path / "disk", faults)
    database = disk.folder / "chat.db"
    careless = patched("chatrtc.PRAGMAS['synchronous'] = 1")
    process = await launch(database, env=disk.env)
    writers = await start_writers(process)
    assert (await process.stop())[0] == 0
    disk.sync_all()
    process = await launch(database, env=disk.env, prefix=careless)
    await write_and_kill(process, writers, 0.2)
    disk.lose_power(random.Random(3))
    process = await launch(database)
    world = process.world()
    losses = await writers.losses(world)
    assert losses["lost"]
    assert losses["received but not stored"]
    await process.stop()


# 2. A retry never duplicates, and a cut never leaves a gap.


@trials(50, 1250)
async def test_a_nonce_posts_once(world: World, tries: int) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    listener = await ben.socket(place.server_id)
    for start in range(0, tries, 50):
        nonces = [f"nonce-{number}" for number in range(start, min(start + 50, tries))]
        posts = [{"channel_id": place.channel_id, "content": nonce, "nonce": nonce} for nonce in nonces]
        replies = await asyncio.gather(*(ana.call("POST", "/messages", post) for post in posts for _ in range(8)))
        for index in range(len(nonces)):
            same = replies[index * 8 : index * 8 + 8]
            assert [reply.status for reply in same] == [201] * 8
            assert len({reply.body["message_id"] for reply in same}) == 1
            assert [reply.headers.get("Idempotent-Replayed") for reply in same].count("true") == 7
    # A nonce belongs to its author: another author's is another message, and a deleted message does not come back.
    first = (await ana.post(place.channel_id, "mine", nonce="nonce-0"))["message_id"]
    theirs = await ben.post(place.channel_id, "nonce-0", nonce="nonce-0")
    assert theirs["author_id"] == ben.user_id
    await ana.ok("DELETE", f"/messages/{first}")
    again = await ana.call("POST", "/messages", {"channel_id": place.channel_id, "content": "again", "nonce": "nonce-0"})
    assert again.status == 409, again
    stored = await server_history(world, place.server_id, ana.token)
    assert len(stored) == tries  # one was deleted, one is by ben
    await listener.receive("message:new", message_id=theirs["message_id"])
    assert listener.names().count("message:new") == tries + 1


async def change_messages(world: World, people: list[Person], place: Place, dice: random.Random) -> None:
    """Post, edit, delete and react, some 200 times per second, until the server is gone."""
    mine: dict[str, list[int]] = {person.name: [] for person in people}
    everything: list[int] = []

    async def work(person: Person) -> None:
        ids = mine[person.name]
        while True:
            await asyncio.sleep(dice.uniform(0, 0.04))
            what = dice.random()
            try:
                if what < 0.55 or not ids:
                    body = {"channel_id": place.channel_id, "content": f"by {person.name}"}
                    reply = await world.call("POST", "/messages", body, token=person.token)
                    ids.append(reply.body["message_id"])
                    everything.append(ids[-1])
                elif what < 0.7:
                    text = {"content": f"edited {dice.random()}"}
                    await world.call("PATCH", f"/messages/{dice.choice(ids)}", text, token=person.token)
                elif what < 0.8:
                    gone = ids.pop(dice.randrange(len(ids)))
                    await world.call("DELETE", f"/messages/{gone}", token=person.token)
                else:
                    method = dice.choice(("PUT", "PUT", "DELETE"))
                    where = f"/messages/{dice.choice(everything[-50:])}/reactions/{dice.choice('✓✗')}"
                    await world.call(method, where, token=person.token)
            except GONE:
                return

    await asyncio.gather(*map(work, people))


@trials(40, 1000)
async def test_a_cut_leaves_no_gap(launch: Launch, tmp_path: Path, tries: int) -> None:
    dice = random.Random(4)
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    people = await world.people(*(f"user{number}" for number in range(20)))
    place = await world.place(*people)
    replicas = [
        Replica(person, place.server_id, "polling" if index % 10 == 9 else "websocket", page=500)
        for index, person in enumerate(people)
    ]
    await asyncio.gather(*(replica.connect() for replica in replicas))
    load = asyncio.create_task(change_messages(world, people[:5], place, dice))
    kills, cuts = 0, 0

    async def cut(replica: Replica) -> None:
        if dice.random() < 0.3:
            replica.pause_reading()
            await asyncio.sleep(dice.uniform(0, 0.3))
        replica.reset_connection()
        await asyncio.sleep(dice.uniform(0, 0.2))
        await replica.connect()

    while cuts < tries:
        some = dice.sample(replicas, 4)
        await asyncio.gather(*map(cut, some))
        await asyncio.gather(*(replica.receive() for replica in replicas))
        cuts += len(some)
        if cuts * 4 // tries > kills and cuts < tries:  # three times the server itself is killed
            kills += 1
            await process.stop(signal.SIGKILL)
            await load
            process = await launch(tmp_path / "chat.db")
            world = process.world()
            for person in people:
                person.world = world
            await asyncio.gather(*(replica.connect() for replica in replicas))
            load = asyncio.create_task(change_messages(world, people[:5], place, dice))
    assert kills == 3
    load.cancel()
    await asyncio.gather(load, return_exceptions=True)
    await people[0].ok("PATCH", f"/servers/{place.server_id}", {"name": "the end"})
    await asyncio.gather(*(replica.receive() for replica in replicas))
    stored = {message["message_id"]: message for message in await server_history(world, place.server_id, people[0].token)}
    assert len(stored) > tries
    assert [replica.person.name for replica in replicas if replica.messages != stored] == []
    assert {replica.name for replica in replicas} == {"the end"}
    missing = sum(replica.requests for replica in replicas)
    print(f"{tries} cuts and {kills} kills, {len(stored)} messages, {replicas[0].seq} changes, {missing} requests")


# 3. Revocation reaches open sockets, also those that have stopped reading.


def event_packet(kind: str, event: str, payload: Any) -> str:
    """Return the packet of an event; its kind is 42 and, if there is to be an ack, the number of that."""
    return kind + json.dumps([event, payload])


class Wire:
    """A Socket.IO client over a bare connection, which reads only on demand."""

    made: ClassVar[list[Wire]] = []

    def __init__(self, connection: socket_module.socket) -> None:
        self.connection = connection
        self.made.append(self)
        self.received: list[tuple[float, str, Any]] = []  # when, event, payload
        self.acks: set[int] = set()
        self.closed: float | None = None  # when the server closed the connection, once that was read
        self.data = b""
        self.task: asyncio.Task[None] | None = None
        self.path = ""  # of its polls, if it polls

    @classmethod
    async def reach(cls, url: str, window: int | None = None) -> Wire:
        """Open a TCP connection; `window` limits the bytes that it buffers unread."""
        connection = socket_module.socket()
        connection.setblocking(False)
        if window is not None:
            connection.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_RCVBUF, window)
        host, port = url.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
        return cls(connection)

    @classmethod
    async def join(cls, person: Person, place: Place, window: int | None = None) -> Wire:
        """Return a client that is connected by WebSocket, authenticated, and has joined the server."""
        wire = await cls.reach(person.world.url, window)
        await wire.upgrade()
        await wire.say("40" + json.dumps({"token": person.token}))
        assert (await wire.frame()).startswith(b"40")
        await wire.say(event_packet("420", "join_server", {"server_id": place.server_id}))
        assert b'"success":true' in await wire.frame_with(b"430")
        return wire

    async def upgrade(self, sid: str = "") -> None:
        """Upgrade to a WebSocket: of a new session or, with `sid=...`, of one that polls."""
        await self.send(
            f"GET /socket.io/?EIO=4&transport=websocket&{sid} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.data:
            await self.receive()
        head, _, self.data = self.data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise ConnectionError(head)
        if not sid:
            assert (await self.frame()).startswith(b"0")

    async def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        """Send an HTTP request and return the status and the body of the answer."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        await self.send(head.encode() + body)
        while b"\r\n\r\n" not in self.data:
            await self.receive()
        about, _, self.data = self.data.partition(b"\r\n\r\n")
        length = int(about.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(self.data) < length:
            await self.receive()
        body, self.data = self.data[:length], self.data[length:]
        return int(about.split()[1]), body

    async def until_closed(self) -> None:
        """Read until the server has closed the connection."""
        with contextlib.suppress(OSError):
            while True:
                await self.receive()
                self.data = b""
        self.connection.close()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_sendall(self.connection, data)

    async def say(self, text: str) -> None:
        """Send a text frame, masked with zeros."""
        data = text.encode()
        length = bytes([128 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        await self.send(b"\x81" + length + bytes(4) + data)

    async def receive(self) -> None:
        async with asyncio.timeout(60):
            data = await asyncio.get_running_loop().sock_recv(self.connection, 65536)
        if not data:
            raise ConnectionError("closed")
        self.data += data

    async def frame(self) -> bytes:
        """Return the payload of the next frame."""
        while True:
            if len(self.data) >= 2:
                length, start = self.data[1] & 127, 2
                if length == 126 and len(self.data) >= 4:
                    length, start = struct.unpack_from(">H", self.data, 2)[0], 4
                elif length == 127 and len(self.data) >= 10:
                    length, start = struct.unpack_from(">Q", self.data, 2)[0], 10
                if len(self.data) >= start + length and (length < 126 or start > 2):
                    payload = self.data[start : start + length]
                    self.data = self.data[start + length :]
                    return payload
            await self.receive()

    async def frame_with(self, prefix: bytes) -> bytes:
        """Skip frames up to the next one with this prefix, and return that."""
        while not (payload := await self.frame()).startswith(prefix):
            pass
        return payload

    def listen(self) -> None:
        """Read in the background."""
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            while True:
                payload = await self.frame()
                if payload == b"2":
                    await self.say("3")
                elif payload.startswith(b"42"):
                    self.received.append((time.monotonic(), *json.loads(payload[2:])))
                elif payload.startswith(b"43"):
                    self.acks.add(int(payload[2 : payload.index(b"[")]))
        except (OSError, TimeoutError):
            self.closed = time.monotonic()

    def open(self) -> bool:
        """Tell if the kernel has the connection as established; that needs no read."""
        established = 1
        state = self.connection.getsockopt(socket_module.IPPROTO_TCP, socket_module.TCP_INFO, 1)[0]
        return state == established

    @property
    def port(self) -> int:
        return int(self.connection.getsockname()[1])

    async def stop_reading(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    async def end(self) -> None:
        await self.stop_reading()
        self.connection.close()

    def reset(self) -> None:
        self.connection.setsockopt(socket_module.SOL_SOCKET, socket_module.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@pytest_asyncio.fixture(autouse=True)
async def wires() -> AsyncIterator[None]:
    """Close the connections of a test at its end."""
    yield
    await asyncio.gather(*(wire.end() for wire in Wire.made))
    Wire.made.clear()


Revocation = Callable[["RevocationCase"], Awaitable[Any]]


POSTS = "SELECT count(*) FROM messages WHERE server_id = ?"


class RevocationCase:
    """A server whose owner revokes a right of a member; another member watches."""

    def __init__(self, place: Place, owner: Person, member: Person, witness: Person) -> None:
        self.place, self.owner, self.member, self.witness = place, owner, member, witness
        self.chat = owner.world.chat

    async def call(self, person: Person, method: str, path: str, body: Any = None) -> None:
        await person.ok(method, path.format(server=self.place.server_id, channel=self.place.channel_id), body)

    async def admin(self, name: str) -> None:
        """Run a job as the command line has a running server do it."""
        await self.chat.hub.store.write(lambda db: chatrtc.ADMIN_JOBS[name](db, self.member.name))


async def expire(stage: RevocationCase) -> None:
    """Wait until the member's token has expired."""
    _, _, end = stage.chat.hub.signer.verify(stage.member.token)
    await asyncio.sleep(end - time.time())


REVOCATIONS: dict[str, tuple[Revocation, bool]] = {  # the action, and if it closes the connection
    "ban": (lambda s: s.call(s.owner, "PUT", f"/servers/{{server}}/bans/{s.member.user_id}"), False),
    "removal": (lambda s: s.call(s.owner, "DELETE", f"/servers/{{server}}/members/{s.member.user_id}"), False),
    "leaving": (lambda s: s.call(s.member, "DELETE", f"/servers/{{server}}/members/{s.member.user_id}"), False),
    "deleted channel": (lambda s: s.call(s.owner, "DELETE", "/channels/{channel}"), False),
    "deleted server": (lambda s: s.call(s.owner, "DELETE", "/servers/{server}"), False),
    "logout": (lambda s: s.call(s.member, "POST", "/auth/logout"), True),
    "password": (
        lambda s: s.call(
            s.member, "POST", "/auth/password", {"old_password": "correct horse", "new_password": "battery staple"}
        ),
        True,
    ),
    "expiry": (expire, True),
    "deleted user": (lambda s: s.admin("delete_user"), True),
}


@contextlib.asynccontextmanager
async def posting(person: Person, channel_id: int, pause: float = 0.01, **fields: Any) -> AsyncIterator[list[Any]]:
    """Post all the while; yield the list of the messages that were accepted."""
    accepted: list[Any] = []

    async def work() -> None:
        while True:
            body = {"channel_id": channel_id, "content": "on and on", **fields}
            reply = await person.call("POST", "/messages", body)
            accepted.extend([reply.body] if reply.status == 201 else [])
            await asyncio.sleep(pause)

    task = asyncio.create_task(work())
    try:
        yield accepted
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("kind", REVOCATIONS)
@trials(1, 25)
async def test_revocation_reaches_open_sockets(make_world: MakeWorld, kind: str, tries: int) -> None:
    revoke, closes = REVOCATIONS[kind]
    latest, slowest = 0.0, 0.0
    owning = await make_world()
    for number in range(tries):
        owner, witness = await owning.people(f"owner{number}", f"witness{number}")
        member = await owning.person(f"member{number}")
        if kind == "expiry":
            keys = owning.chat.hub.signer
            member.token = keys.issue(member.user_id, member.name, 0, time.time() + 3 - keys._ttl).token
        place = await owning.place(owner, member, witness)
        stage = RevocationCase(place, owner, member, witness)
        reading = await Wire.join(member, place)
        reading.listen()
        frozen = await Wire.join(member, place)
        looking = await Wire.join(witness, place)
        looking.listen()
        async with posting(owner, place.channel_id) as taken:
            await until(lambda taken=taken, reading=reading: len(taken) > 5 and len(reading.received) > 5)  # type: ignore[misc]
            await revoke(stage)
            answered = time.monotonic()
            if closes:
                slowest = max(slowest, await until(lambda wires=(reading, frozen): not any(w.open() for w in wires), 1))  # type: ignore[misc]
            await asyncio.sleep(max(0.0, answered + 0.5 - time.monotonic()))
        received = [when - answered for when, event, _ in reading.received if event.startswith("message")]
        latest = max(latest, *received, 0)
        assert not closes or not (reading.open() or frozen.open())
        if "deleted" not in kind or kind == "deleted user":
            assert looking.received[-1][0] > answered + 0.25, "there was nothing to receive"
        for wire in (reading, frozen, looking):
            await wire.end()
    print(f"{kind}: {tries} times, last event {latest * 1000:.0f} ms after, closed within {slowest * 1000:.0f} ms")
    assert latest <= 0.25


@pytest.mark.parametrize("kind", ["password", "logout", "expiry"])
async def test_revocation_closes_a_full_connection(make_world: MakeWorld, kind: str) -> None:
    """The client reads nothing, so a closing frame would wait behind data that cannot be sent."""
    world = await make_world()
    owner, member, witness = await world.people("owner", "member", "witness")
    if kind == "expiry":
        keys = world.chat.hub.signer
        member.token = keys.issue(member.user_id, member.name, 0, time.time() + 6 - keys._ttl).token
    place = await world.place(owner, member, witness)
    before = set(transports())
    frozen = await Wire.join(member, place, window=4096)
    (ours,) = {transport for transport in set(transports()) - before if port_of(transport) == frozen.port}
    long = {"channel_id": place.channel_id, "content": "x" * 4000}
    for _ in range(100):
        await asyncio.gather(*(owner.ok("POST", "/messages", long) for _ in range(16)))
        if ours.get_write_buffer_size() > 65536:
            break
    else:
        pytest.fail("the connection never got full")
    assert frozen.open()
    await REVOCATIONS[kind][0](RevocationCase(place, owner, member, witness))
    seconds = await until(lambda: not frozen.open(), 1)
    print(f"{kind}: a full connection closed within {seconds * 1000:.0f} ms")
    await frozen.end()


def transports() -> Iterator[Any]:
    """Yield the TCP connections of this process."""
    for thing in gc.get_objects():
        if isinstance(thing, asyncio.Transport) and hasattr(thing, "get_write_buffer_size"):
            with contextlib.suppress(Exception):
                if thing.get_extra_info("peername"):
                    yield thing


def port_of(transport: Any) -> Any:
    return transport.get_extra_info("peername")[1]


@trials(5, 50)
async def test_nothing_commits_after_a_revocation(world: World, tries: int) -> None:
    """Fifty posts are under way when the right is revoked: each commits before that, or not at all."""
    kinds = ["ban", "removal", "leaving", "logout", "password", "deleted user", "deleted channel"]
    refused = accepted = 0
    for number in range(tries):
        owner, member = await world.people(f"owner{number}", f"member{number}")
        place = await world.place(owner, member)
        stage = RevocationCase(place, owner, member, owner)
        body = {"channel_id": place.channel_id, "content": "in time?"}
        posts = [asyncio.create_task(member.call("POST", "/messages", body)) for _ in range(25)]
        await asyncio.sleep(0)
        revoking = asyncio.create_task(asyncio.wait_for(REVOCATIONS[kinds[number % len(kinds)]][0](stage), PATIENCE))
        posts += [asyncio.create_task(member.call("POST", "/messages", body)) for _ in range(25)]
        await revoking
        ask = world.chat.hub.store.read
        (then,) = await ask(lambda db, place=place: db.execute(POSTS, (place.server_id,)).fetchone())
        replies = await asyncio.gather(*posts)
        late = await member.call("POST", "/messages", body)
        assert late.status in (401, 403, 404), late
        (now,) = await ask(lambda db, place=place: db.execute(POSTS, (place.server_id,)).fetchone())
        statuses = [reply.status for reply in replies]
        assert now == then == statuses.count(201), statuses
        accepted += statuses.count(201)
        refused += 50 - statuses.count(201)
    assert accepted
    assert refused


async def test_a_role_is_lost_at_once(world: World) -> None:
    owner, admin = await world.people("owner", "admin")
    place = await world.place(owner, admin)
    role = f"/servers/{place.server_id}/members/{admin.user_id}"
    await owner.ok("PATCH", role, {"role": "admin"})
    first, second = [(await owner.post(place.channel_id))["message_id"] for _ in range(2)]
    await admin.ok("DELETE", f"/messages/{first}")
    await owner.ok("PATCH", role, {"role": "member"})
    assert (await admin.call("DELETE", f"/messages/{second}")).status == 403
    assert (await admin.call("POST", f"/servers/{place.server_id}/invites", {})).status == 403


# 4. Presence shows no ghost users.


def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers that start from now on ping every second and wait one second for the pong."""
    quick = functools.partial(chatrtc.socket_server, ping_interval=1, ping_timeout=1)
    monkeypatch.setattr(chatrtc, "socket_server", quick)


GHOST_SECONDS = 1 + 1 + 1  # ping interval, ping timeout, and one


class Crowd(RuleBasedStateMachine):
    """People whose tabs open, close, break and freeze, and a server that restarts, compared with a plain set of users."""

    NAMES = ("ana", "ben", "cat", "dan")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.tabs: list[tuple[str, Wire]] = []  # joined
        self.away: list[tuple[str, Wire]] = []  # connected but not joined
        self.frozen: list[tuple[str, Wire, float]] = []  # with the time by which the server must have noticed
        self.people: dict[str, Person] = {}
        self.runner.run(self.begin())

    async def begin(self) -> None:
        await self.start()
        owner = await self.world.person("owner")
        self.place = await self.world.place(owner)
        invite = await owner.ok("POST", f"/servers/{self.place.server_id}/invites", {})
        for name in self.NAMES:
            account = (await self.world.call("POST", "/auth/guest", {"username": name, "code": invite["code"]})).body
            self.people[name] = Person(self.world, name, account["user_id"], account["token"])
        self.people["owner"] = owner
        await self.watch_events()

    async def start(self) -> None:
        chat = chatrtc.ChatRTC(database=f"{self.folder.name}/chat.db", no_rate_limit=True)
        app = web.Application()
        chat.attach(app)
        self.server = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.server.setup()
        await web.TCPSite(self.server, "127.0.0.1", 0).start()
        self.world = World(f"http://127.0.0.1:{self.server.addresses[0][1]}", aiohttp.ClientSession(), chat)
        for person in self.people.values():
            person.world = self.world

    async def watch_events(self) -> None:
        """Let the owner follow the presence events alone."""
        self.witness = await self.world.socket(self.people["owner"].token)
        ack = await self.witness.ok("join_server", {"server_id": self.place.server_id})
        self.seen: set[int] = set(ack["connected_users"])

    async def stop(self) -> None:
        await self.world.close()
        await self.server.cleanup()

    # Rules

    @rule(name=st.sampled_from(NAMES))
    def open_tab(self, name: str) -> None:
        if len(self.tabs) < 12:
            wire = self.runner.run(Wire.join(self.people[name], self.place))
            self.runner.get_loop().call_soon(wire.listen)
            self.tabs.append((name, wire))

    def take(self, data: st.DataObject) -> tuple[str, Wire]:
        return self.tabs.pop(data.draw(st.integers(0, len(self.tabs) - 1)))

    @precondition(lambda self: self.tabs)
    @rule(data=st.data(), how=st.sampled_from(["41", "1", "close", "reset"]))
    def close_tab(self, data: st.DataObject, how: str) -> None:
        _, wire = self.take(data)
        self.runner.run(self.end(wire, how))

    async def end(self, wire: Wire, how: str) -> None:
        if how in ("41", "1"):
            await wire.say(how)
        await wire.stop_reading()
        if how == "reset":
            wire.reset()
        elif how == "close":
            wire.connection.close()

    @precondition(lambda self: self.tabs)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name, wire = self.take(data)
        self.runner.run(wire.say(event_packet("42", "leave_server", {"server_id": self.place.server_id})))
        self.away.append((name, wire))

    @precondition(lambda self: self.away)
    @rule()
    def come_back(self) -> None:
        name, wire = self.away.pop()
        self.runner.run(wire.say(event_packet("42", "join_server", {"server_id": self.place.server_id})))
        self.tabs.append((name, wire))

    @precondition(lambda self: self.tabs)
    @rule(data=st.data(), name=st.sampled_from(["disconnect", "connect"]))
    def forge(self, data: st.DataObject, name: str) -> None:
        """A client sends a forged event: it is online or has been disconnected, but neither a ghost nor hidden."""
        who, wire = self.take(data)
        if self.runner.run(self.forged(wire, name)):
            self.tabs.append((who, wire))

    async def forged(self, wire: Wire, name: str) -> bool:
        await wire.say(f'42["{name}","transport close"]')
        with contextlib.suppress(OSError):
            await wire.say('427["ping"]')
        await until(lambda: wire.closed is not None or 7 in wire.acks)
        wire.acks.clear()
        return wire.closed is None

    @precondition(lambda self: self.tabs and not self.frozen)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """A laptop is closed: the connection stays open and nobody answers."""
        name, wire = self.take(data)
        self.runner.run(wire.stop_reading())
        self.frozen.append((name, wire, time.monotonic() + GHOST_SECONDS))

    @precondition(lambda self: self.tabs)
    @rule()
    def restart(self) -> None:
        self.runner.run(self.restarted())

    async def restarted(self) -> None:
        await self.stop()
        self.tabs, self.away, self.frozen = [], [], []
        await self.start()
        await self.watch_events()

    # Invariants

    @invariant()
    def nobody_is_a_ghost(self) -> None:
        self.runner.run(self.compare())

    async def compare(self, patient: bool = False) -> None:
        """Compare the set, the server's list of members, and the events, which must agree within 2 s."""
        began = time.monotonic()
        while True:
            here = {self.people[name].user_id for name, _ in self.tabs} | {self.people["owner"].user_id}
            now = time.monotonic()
            perhaps = {self.people[name].user_id for name, _, gone in self.frozen if now < gone}
            members = (await self.people["owner"].ok("GET", f"/servers/{self.place.server_id}/members"))["members"]
            said = {member["user_id"] for member in members if member["connected"]}
            for event, payload in self.witness.received:
                if event in ("user:connected", "user:disconnected"):
                    (self.seen.add if event == "user:connected" else self.seen.discard)(payload["user_id"])
            self.witness.received.clear()
            if here <= said <= here | perhaps and self.seen == said and not (patient and perhaps):
                return
            assert now - began < 2 or (patient and perhaps), (here, perhaps, said, self.seen)
            await asyncio.sleep(0.01)

    def teardown(self) -> None:
        self.runner.run(self.finish())
        self.runner.close()
        self.folder.cleanup()

    async def finish(self) -> None:
        try:
            await self.compare(patient=True)
        finally:
            await asyncio.gather(*(wire.end() for wire in Wire.made))
            Wire.made.clear()
            await self.stop()


@trials(8, 300)
def test_presence_has_no_ghosts(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    quick_pings(monkeypatch)
    checks = settings(
        max_examples=tries,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Crowd, settings=checks)


async def test_a_frozen_client_goes_offline_in_time(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_pings(monkeypatch)
    world = await make_world()
    ana, ben, cat = await world.people("ana", "ben", "cat")
    place = await world.place(ana, ben, cat)
    looks = await ana.socket(place.server_id)
    awake, asleep = await Wire.join(ben, place), await Wire.join(cat, place)
    awake.listen()
    froze = time.monotonic()
    await looks.receive("user:disconnected", user_id=cat.user_id)
    seconds = time.monotonic() - froze
    print(f"frozen client gone after {seconds:.2f} s")
    assert seconds <= bound(GHOST_SECONDS)
    await until(lambda: not asleep.open(), 1)
    assert awake.open()
    assert "user:disconnected" not in [event for event, payload in looks.received if payload["user_id"] == ben.user_id]


# 5. A slow client takes at most 1 MiB and is disconnected; other clients notice nothing.


def memory(process: Server) -> int:
    """Return the resident memory of the server, in bytes."""
    lines = Path(f"/proc/{process.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def files_open(process: Server) -> int:
    return len(os.listdir(f"/proc/{process.process.pid}/fd"))


async def post_timed(people: list[Person], place: Place, count: int) -> list[float]:
    """Post `count` long messages, some 400 per second, and return the seconds that each took, sorted."""
    seconds: list[float] = []

    async def work(person: Person) -> None:
        while len(seconds) < count:
            began = time.monotonic()
            seconds.append(0)
            index = len(seconds) - 1
            await person.post(place.channel_id, "x" * 4000)
            seconds[index] = time.monotonic() - began
            await asyncio.sleep(0.008)

    await asyncio.gather(*map(work, people))
    return sorted(seconds)


@trials(1500, 10_000)
async def test_slow_clients_are_disconnected_and_nobody_notices(launch: Launch, tmp_path: Path, tries: int) -> None:
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    people = await world.people(*(f"user{number}" for number in range(12)))
    place = await world.place(*people)
    posters, readers, slow, pollers = people[:4], people[4:8], people[7:11], people[10:12]
    healthy = [await person.socket(place.server_id) for person in readers]
    late = Replica(people[11], place.server_id, page=500)
    await late.connect()
    warm = await post_timed(posters, place, tries // 3)  # lets the memory of the process reach its usual size
    start = memory(process)
    before = await post_timed(posters, place, tries // 3)
    size = memory(process)
    late.pause_reading()
    frozen = [await Wire.join(person, place, window=4096) for person in slow]
    never = [await polling(person, place) for person in pollers]
    largest = 0

    async def watch() -> None:
        nonlocal largest
        while True:
            largest = max(largest, memory(process))
            for wire in frozen:
                with contextlib.suppress(OSError, TimeoutError):
                    await wire.say("3")  # it answers all pings
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    after = await post_timed(posters, place, tries)
    await until(lambda: not any(wire.open() for wire in frozen))
    for poller in never:
        assert (await (await Wire.reach(world.url)).request("GET", poller.path))[0] == 400
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    for socket in healthy:
        await socket.call("ping")
        assert socket.names().count("message:new") == len(warm) + len(before) + len(after)
    # The disconnected client notices when it reads again, reconnects, and catches up.
    late.resume_reading()
    assert late.socket is not None
    await asyncio.wait_for(late.socket.closed.wait(), PATIENCE)
    await late.connect()
    stored = await server_history(world, place.server_id, people[0].token)
    assert late.messages == {message["message_id"]: message for message in stored}
    p99 = before[len(before) * 99 // 100], after[len(after) * 99 // 100]
    count = len(frozen) + len(never) + 1
    print(
        f"{count} slow clients, {len(after)} messages of 4 kB: {(largest - size) / 2**20:.0f} MiB more, "
        f"{(size - start) / 2**20:.0f} MiB more without them, "
        f"p99 of a post {p99[0] * 1000:.1f} ms without and {p99[1] * 1000:.1f} ms with them"
    )
    assert largest - size <= (size - start) + (count << 20)
    assert p99[1] <= 1.5 * p99[0] + bound(0.02)


def page_requests(person: Person, place: Place, times: int = 1) -> bytes:
    """Return the bytes of requests whose answers have 400 kB each."""
    return request(f"GET /channels/{place.channel_id}/messages?limit=100", f"Authorization: Bearer {person.token}") * times


async def long_channel(world: World) -> tuple[Person, Place]:
    """Return a person and a server whose channel has 100 messages of 4 kB."""
    person = await world.person("ana")
    place = await world.place(person)
    await asyncio.gather(*(person.post(place.channel_id, "x" * 4000) for _ in range(100)))
    return person, place


async def test_a_client_that_reads_no_answer_is_disconnected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    person, place = await long_channel(world)
    slow_clients = world.chat.sio.eio.slow_clients
    join = event_packet("421", "join_server", {"server_id": place.server_id, "after": 0})
    wires = [await Wire.reach(world.url, window=4096) for _ in range(4)]
    slow = await Wire.reach(world.url, window=4096)
    for wire in [*wires, slow]:
        await wire.send(page_requests(person, place, 40))
    frozen = await Wire.join(person, place, window=4096)
    while not any(session.tcp in slow_clients.waiting for session in world.chat.sio.eio.sockets.values()):
        world.chat.sio.publish("e", "x" * 400_000, f"user:{person.user_id}")
        await asyncio.sleep(0.1)
    poller = await polling(person, place)
    assert (await poller.request("POST", poller.path, join.encode()))[0] == 200
    await until(lambda: len(slow_clients.waiting) == 7)
    assert max(size for size, *_ in slow_clients.waiting.values()) < 2**20, "a client has at most one unread answer"
    reading = asyncio.create_task(read_slowly(slow))
    monkeypatch.setattr(chatrtc, "MAX_STALL_SECONDS", 3.0)
    await until(lambda: not any(wire.open() for wire in [*wires, frozen]), 20)
    assert (await poller.request("GET", poller.path))[0] == 400
    assert slow.open() and len(slow_clients.waiting) == 1
    reading.cancel()
    await slow.end()
    await until(lambda: not slow_clients.waiting)


async def read_slowly(wire: Wire) -> None:
    while True:
        await asyncio.get_running_loop().sock_recv(wire.connection, 1000)
        await asyncio.sleep(0.02)


async def test_unread_answers_of_all_clients_together_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatrtc, "MAX_UNSENT_BYTES", 2 << 20)
    person, place = await long_channel(world)
    slow_clients = world.chat.sio.eio.slow_clients
    wires = [await Wire.reach(world.url, window=4096) for _ in range(12)]
    largest = 0
    for wire in wires:
        await wire.send(page_requests(person, place, 40))
        await until(lambda wire=wire: not wire.open() or wire.port in map(port_of, slow_clients.waiting))  # type: ignore[misc]
        largest = max(largest, sum(size for size, *_ in slow_clients.waiting.values()))
        messages = await person.ok("GET", f"/channels/{place.channel_id}/messages?limit=100")
        assert len(messages["messages"]) == 100, "other clients get their answers"
    assert 2**20 < largest <= (2 << 20) + 2**19
    await until(lambda: sum(wire.open() for wire in wires) <= 8)


@trials(120, 1000)
async def test_unread_answers_take_no_memory(launch: Launch, tmp_path: Path, tries: int) -> None:
    process = await launch(tmp_path / "chat.db")
    person, place = await long_channel(process.world())
    join = event_packet("422", "join_server", {"server_id": place.server_id, "after": 0})
    async with Health(process) as health:
        for number in range(tries):
            wire = await (Wire.join(person, place, window=4096) if number % 2 else Wire.reach(process.url, window=4096))
            for _ in range(12):
                await (wire.say(join) if number % 2 else wire.send(page_requests(person, place)))
        await asyncio.sleep(3)
        for wire in Wire.made:
            await wire.end()
    print(f"{tries} connections that read no answer: {health}")


# 5b. A connection leaves nothing behind, however it ends.


async def polling(person: Person, place: Place) -> Wire:
    """Return a client that has joined the server by long polling; its `path` is the address of its polls."""
    wire = await Wire.reach(person.world.url)
    _, body = await wire.request("GET", POLLING)
    wire.path = f"{POLLING}&sid={json.loads(body[1:])['sid']}"
    for packet in (
        "40" + json.dumps({"token": person.token}),
        event_packet("420", "join_server", {"server_id": place.server_id}),
    ):
        await wire.request("POST", wire.path, packet.encode())
        await wire.request("GET", wire.path)
    return wire


async def opened(person: Person, *packets: str) -> Wire:
    """Return a WebSocket that has sent these packets."""
    wire = await Wire.reach(person.world.url)
    await wire.upgrade()
    for packet in packets:
        await wire.say(packet)
    return wire


async def closes_the_websocket(person: Person, place: Place) -> None:
    wire = await Wire.join(person, place)
    await wire.say(event_packet("421", "typing_start", {"channel_id": place.channel_id}))
    await wire.send(b"\x88\x82" + bytes(4) + b"\x03\xe8")
    await wire.until_closed()


async def resets_the_connection(person: Person, place: Place) -> None:
    (await Wire.join(person, place)).reset()


async def closes_the_connection(person: Person, place: Place) -> None:
    (await Wire.join(person, place)).connection.close()


async def reset_together(person: Person, place: Place) -> None:
    """Each is closed while it is still notified about the others."""
    for wire in await asyncio.gather(*(Wire.join(person, place) for _ in range(10))):
        wire.reset()


async def disconnects(person: Person, place: Place) -> None:
    wire = await Wire.join(person, place)
    await wire.say("41")
    await wire.say("1")
    await wire.until_closed()


async def never_connects(person: Person, place: Place) -> None:
    await (await opened(person)).until_closed()


async def never_authenticates(person: Person, place: Place) -> None:
    await (await opened(person, "40")).until_closed()


async def is_rejected(person: Person, place: Place) -> None:
    wire = await opened(person, '40{"token":"wrong"}')
    assert (await wire.frame()).startswith(b"44")
    wire.connection.close()


async def fails_to_authenticate(person: Person, place: Place) -> None:
    wire = await opened(person, "40", '421["authenticate",{"token":"wrong"}]', '422["nothing"]')
    await wire.frame_with(b"432")
    wire.connection.close()


async def breaks_the_protocol(person: Person, place: Place) -> None:
    wire = await Wire.join(person, place)
    await wire.say("9")
    await wire.until_closed()


async def is_of_another_origin(person: Person, place: Place) -> None:
    wire = await Wire.reach(person.world.url)
    status, _ = await wire.request("GET", POLLING, headers="Origin: https://evil.example\r\n")
    assert status == 403
    wire.connection.close()


async def loses_its_token(person: Person, place: Place) -> None:
    """Its token is revoked."""
    guest = await person.world.person(f"cut-{random.getrandbits(40)}")
    wire = await opened(guest, "40" + json.dumps({"token": guest.token}))
    assert (await wire.frame()).startswith(b"40")
    await guest.ok("POST", "/auth/logout")
    await wire.until_closed()


async def closes_its_polling_session(person: Person, place: Place) -> None:
    wire = await polling(person, place)
    await wire.request("POST", wire.path, b"1")
    wire.connection.close()


async def stops_polling(person: Person, place: Place) -> None:
    (await polling(person, place)).connection.close()


async def closes_during_a_poll(person: Person, place: Place) -> None:
    wire = await polling(person, place)
    await wire.send(request(f"GET {wire.path}"))
    wire.connection.close()


async def upgrades(person: Person, place: Place) -> None:
    wire = await polling(person, place)
    socket = await Wire.reach(person.world.url)
    await socket.upgrade(wire.path.partition("&")[2].partition("&")[2])
    await socket.say("2probe")
    assert await socket.frame() == b"3probe"
    await socket.say("5")
    await socket.say('421["ping"]')
    await socket.frame_with(b"431")
    socket.connection.close()
    wire.connection.close()


async def freezes(person: Person, place: Place) -> None:
    """It answers no ping."""
    await (await Wire.join(person, place)).until_closed()


ENDINGS: dict[str, Callable[[Person, Place], Awaitable[None]]] = {
    ending.__name__.replace("_", " "): ending
    for ending in (
        closes_the_websocket, resets_the_connection, closes_the_connection, reset_together, disconnects, never_connects,
        never_authenticates, is_rejected, fails_to_authenticate, breaks_the_protocol, is_of_another_origin, loses_its_token,
        closes_its_polling_session, stops_polling, closes_during_a_poll, upgrades, freezes,
    )
}  # fmt: skip
WAITS = {"never connects": 10, "never authenticates": 10, "stops polling": 36, "closes during a poll": 36, "freezes": 36}


def is_of_the_server(thing: object) -> bool:
    """Tell if an object belongs to the server's side of a connection."""
    if isinstance(thing, types.FrameType):
        return thing.f_code.co_filename.endswith("chatrtc.py") and "test_" not in thing.f_code.co_filename
    return type(thing).__module__.split(".")[0] in ("chatrtc", "aiohttp", "engineio", "socketio")


@contextlib.contextmanager
def cycles() -> Iterator[list[object]]:
    """Yield a list that finally holds the objects of the block that only a full garbage collection frees."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [thing for thing in gc.garbage if is_of_the_server(thing)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_connection_leaves_no_cycle(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(chatrtc, "LOGIN_SECONDS", 0.2)
    world = await make_world()
    engine = world.chat.sio.eio
    engine.options.connect_timeout = 0.2
    if WAITS.get(ending, 0) > 10:
        engine.options.ping_interval = engine.options.ping_timeout = 0.2
    person = await world.person("ana")
    place = await world.place(person)

    async def end(times: int) -> None:
        for _ in range(times):
            await ENDINGS[ending](person, place)
        await until(lambda: not (engine.sockets or engine.tasks or world.chat.hub.connections))
        await asyncio.sleep(chatrtc.CLOSE_GRACE + 0.1)  # until then a timer may hold the connection
        Wire.made.clear()

    await end(1)
    with cycles() as found:
        await end(3)
    assert not found, Counter(type(thing).__name__ for thing in found)


@pytest.mark.soak
@pytest.mark.parametrize(
    "ending", [ending for ending in ENDINGS if ending != "loses its token"]
)  # which would need an account for each
async def test_ten_thousand_connections_leave_no_memory(launch: Launch, tmp_path: Path, ending: str) -> None:
    """The memory after 10,000 connections that end this way is within 8 MiB of that after 2,000."""
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    person = await world.person("ana")
    place = await world.place(person)
    at_once = 400 if ending in WAITS else 20  # more at once take longer to connect than the server allows
    each, figures = 10 if ending == "reset together" else 1, []
    for goal in (2000, 10_000):
        done = 0 if goal == 2000 else 2000
        while done < goal:
            await asyncio.gather(*(ENDINGS[ending](person, place) for _ in range(max(1, at_once // each))))
            done += max(each, at_once)
            Wire.made.clear()
            if done % 2000 == 0:  # never more at once than the first 2,000
                await asyncio.sleep(2 + WAITS.get(ending, 0))
        figures.append(memory(process))
    print(f"{ending}: {figures[0] / 2**20:.1f} MiB after 2,000, {figures[1] / 2**20:.1f} MiB after 10,000")
    assert figures[1] - figures[0] <= 8 << 20


@pytest.mark.soak
async def test_an_hour_of_connections_leaves_no_memory(launch: Launch, tmp_path: Path) -> None:
    """After an hour (or CHURN_MINUTES) the memory is within 8 MiB of that after a tenth of the time."""
    minutes = float(os.environ.get("CHURN_MINUTES", "60"))
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    person = await world.person("ana")
    place = await world.place(person)
    quick = [ending for ending in ENDINGS if ending not in WAITS and ending != "loses its token"]
    began, count, early = time.monotonic(), 0, 0
    chance = Random(7)
    while (passed := time.monotonic() - began) < minutes * 60:
        if not early and passed > minutes * 6:
            early = memory(process)
        await asyncio.gather(*(ENDINGS[chance.choice(quick)](person, place) for _ in range(20)))
        count += 20
        Wire.made.clear()
    print(f"{count} connections in {minutes:.0f} minutes: {early / 2**20:.1f} MiB, then {memory(process) / 2**20:.1f} MiB")
    assert memory(process) - early <= 8 << 20


# 6. Hostile connections do no harm.

Attack = Callable[[str, int], Awaitable[Wire]]


async def trickle(wire: Wire, byte: bytes = b"x", pause: float = 1.0) -> None:
    """Send one byte after another until the server closes the connection."""
    with contextlib.suppress(OSError, TimeoutError):
        while wire.open():
            await wire.send(byte)
            await asyncio.sleep(pause)


def attack_with(data: bytes, *, upgraded: bool = False, more: bytes | None = None, pause: float = 1.0) -> Attack:
    """Return an attack that sends this data and never ends its request; `more` is sent again and again."""

    async def attack(url: str, number: int) -> Wire:
        wire = await Wire.reach(url)
        if upgraded:
            try:
                await wire.upgrade()
            except ConnectionError:
                return wire  # beyond the limit of sessions per address: hold the connection without one
        if data:
            await wire.send(data)
        if more is not None:
            wire.task = asyncio.create_task(trickle(wire, more, pause))
        return wire

    return attack


def request(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


JSON_BODY = "Content-Type: application/json"
POLLING = "/socket.io/?EIO=4&transport=polling"


async def endless_poll_post(url: str, number: int) -> Wire:
    """Open an Engine.IO session by polling whose POST never ends."""
    wire = await Wire.reach(url)
    await wire.send(request(f"GET {POLLING}"))
    while b'"sid":"' not in wire.data:
        await wire.receive()
        if b" 429 " in wire.data:
            return wire
    sid = wire.data.partition(b'"sid":"')[2].partition(b'"')[0].decode()
    wire.data = b""
    await wire.send(request(f"POST {POLLING}&sid={sid}", "Content-Length: 1000") + b"4")
    wire.task = asyncio.create_task(trickle(wire))
    return wire


HELD: dict[str, Attack] = {
    "half open": attack_with(b""),
    "half a request": attack_with(b"GET /healthz HTTP/1.1\r\nHost"),
    "slow headers": attack_with(b"GET /healthz HTTP/1.1\r\nX-Slow: ", more=b"x"),
    "slow body": attack_with(request("POST /auth/login", "Content-Length: 1000", JSON_BODY), more=b"x"),
    "no body": attack_with(request("POST /auth/login", "Content-Length: 1000", JSON_BODY)),
    "body of a GET": attack_with(request("GET /healthz", "Content-Length: 1000"), more=b"x"),
    "body to nowhere": attack_with(request("POST /nowhere", "Content-Length: 1000"), more=b"x"),
    "chunks without end": attack_with(
        request("POST /auth/login", "Transfer-Encoding: chunked", JSON_BODY), more=b"1\r\nx\r\n", pause=0.3
    ),
    "a session that says nothing": attack_with(b"", upgraded=True),
    "half a frame": attack_with(b"\x81\xfe\xff", upgraded=True),
    "a session that never authenticates": attack_with(b"\x81\x82\x00\x00\x00\x0040", upgraded=True),
    "a polling POST without end": endless_poll_post,
    "idle after a request": attack_with(request("GET /config")),
}


class Health:
    """The state of a server during a test, sampled five times per second: its health check, memory and open files."""

    def __init__(self, process: Server, room: int = 64 << 20) -> None:
        self.process, self.world, self.room = process, process.world(), room
        self.slowest, self.largest = 0.0, 0
        self.size, self.files = 0, 0  # at the beginning

    async def __aenter__(self) -> Health:
        await self.world.call("GET", "/healthz")
        self.size, self.files = memory(self.process), files_open(self.process)
        self._task = asyncio.create_task(self._watch())
        return self

    async def _watch(self) -> None:
        while True:
            began = time.monotonic()
            assert (await self.world.call("GET", "/healthz")).status == 200
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.largest = max(self.largest, memory(self.process))
            await asyncio.sleep(0.2)

    async def __aexit__(self, *about: object) -> None:
        self._task.cancel()
        (error,) = await asyncio.gather(self._task, return_exceptions=True)
        if about[0] is not None:
            return
        assert isinstance(error, asyncio.CancelledError), error
        await until(lambda: files_open(self.process) <= self.files + 8, 5)  # SQLite may open some
        assert self.slowest < bound(1)
        assert self.largest - self.size <= self.room

    def __str__(self) -> str:
        grown = max(0, self.largest - self.size) >> 20
        return f"health within {self.slowest * 1000:.0f} ms, {grown} MiB more"


SLOW_BODIES = ["slow body", "no body", "body of a GET", "body to nowhere", "chunks without end"]
SLOW_BODIES_LIMIT = 80 << 20  # the README's limit: 5,000 unfinished bodies take 65 to 77 MiB in aiohttp, 14 kB each


@pytest.mark.parametrize(
    ("attacks", "count"), [(list(HELD), 300), *(pytest.param([name], 5000, marks=pytest.mark.soak) for name in HELD)]
)
async def test_held_connections_are_closed(launch: Launch, tmp_path: Path, attacks: list[str], count: int) -> None:
    process = await launch(tmp_path / "chat.db", limits=True)
    async with Health(process, SLOW_BODIES_LIMIT if count == 5000 and attacks[0] in SLOW_BODIES else 64 << 20) as health:
        began = time.monotonic()
        wires: list[Wire] = []
        for start in range(0, count, 50):
            some = range(start, min(start + 50, count))
            wires += await asyncio.gather(*(HELD[name](process.url, n) for name in attacks for n in some))
        opened = time.monotonic()
        # The control: they were open. Of the sessions that have not signed in, new ones replace the oldest.
        assert sum(wire.open() for wire in wires) > min(len(wires), chatrtc.ANONYMOUS_PER_ADDRESS) * 0.9
        await until(lambda: not any(wire.open() for wire in wires), 30)
        closed = time.monotonic()
        for wire in wires:
            await wire.end()
    print(f"{', '.join(attacks)}: {len(wires)} in {opened - began:.1f} s, closed within {closed - began:.1f} s, {health}")
    await process.stop_well(tracebacks=True)


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """Return a client's frame, masked with zeros."""
    head = bytes([opcode])
    if len(payload) < 126:
        return head + bytes([128 | len(payload)]) + bytes(4) + payload
    if len(payload) < 65536:
        return head + b"\xfe" + struct.pack(">H", len(payload)) + bytes(4) + payload
    return head + b"\xff" + struct.pack(">Q", len(payload)) + bytes(4) + payload


DEFLATED = zlib.compress(b"\0" * 200_000_000, 9)
FRAMES = {  # invalid frames of a WebSocket client
    "text that is no packet": masked_frame(0x81, b"abc"),
    "an unknown packet": masked_frame(0x81, b"49[]"),
    "no UTF-8": masked_frame(0x81, b"\xff\xfe"),
    "not masked": b"\x81\x03abc",
    "a reserved opcode": masked_frame(0x83, b"abc"),
    "compressed, unasked": masked_frame(0xC1, DEFLATED[:60_000]),
    "a frame of 2^63 bytes": b"\x81\xff" + b"\x7f" + b"\xff" * 7 + bytes(4) + b"x",
    "a frame of 1 MB": masked_frame(0x81, b"4" * 1_000_000),
    "fragments without end": masked_frame(0x01, b"4") + masked_frame(0x00, b"x" * 1000) * 500,
    "a ping too long": masked_frame(0x89, b"x" * 200),
    "attachments without end": masked_frame(0x81, b'459999999999-["x"]') + masked_frame(0x82, b"x" * 60_000) * 10,
    "a forged connect": masked_frame(0x81, b'42["connect",{},{}]'),
    "an ack of 5000 digits": masked_frame(0x81, b"42" + b"1" * 5000 + b'["ping"]'),
    "deep nesting": masked_frame(0x81, b'42["ping",' + b"[" * 50_000),
    "half a surrogate": masked_frame(0x81, b'42["ping","\\ud800"]'),
    "noise": bytes(range(256)) * 4,
}


@trials(16, 5000)
async def test_malformed_frames_are_harmless(launch: Launch, tmp_path: Path, tries: int) -> None:
    process = await launch(tmp_path / "chat.db")
    async with Health(process) as health:
        kinds = list(FRAMES.items())
        for start in range(0, tries, 100):
            wires: list[Wire] = []
            for number in range(start, min(start + 100, tries)):
                wire = await Wire.reach(process.url)
                await wire.upgrade()
                _, data = kinds[number % len(kinds)]
                with contextlib.suppress(OSError, TimeoutError):
                    await wire.send(masked_frame(0x81, b"40") + data)
                wires.append(wire)
            await until(lambda wires=wires: not any(wire.open() for wire in wires), 12)  # type: ignore[misc]
            await asyncio.gather(*(wire.end() for wire in wires))
    print(f"{tries} malformed frames: {health}")
    await process.stop_well()


async def status_of(url: str, data: bytes, feed: bytes = b"", most: int = 0) -> int:
    """Send the bytes and, until an answer comes, `feed` again and again; return the status (0: no answer)."""
    wire = await Wire.reach(url)
    sent = 0
    with contextlib.suppress(OSError):
        await wire.send(data)
        reading = asyncio.create_task(wire.receive())
        while feed and sent < most and not reading.done():
            await wire.send(feed)
            sent += len(feed)
        with contextlib.suppress(OSError):
            await reading
    await wire.end()
    return int(wire.data.split()[1]) if wire.data else 0


BODIES: dict[str, bytes] = {  # malicious JSON; each is to be rejected
    "depth 10^5": b"[" * 100_000,
    "depth 10^5 in a field": b'{"username":' + b'{"a":' * 50_000,
    "an integer of 10^5 digits": b'{"username":' + b"9" * 100_000 + b"}",
    "a float beyond all": b'{"username":1e999999}',
    "NaN": b'{"username":NaN}',
    "half a surrogate": b'{"username":"\\ud800 \\ud800","password":"correct horse"}',
    "a surrogate in UTF-8": b'{"username":"\xed\xa0\x80","password":"correct horse"}',
    "NUL": b'{"username":"ab\\u0000c","password":"correct horse"}',
    "raw NUL": b'{"username":"ab\x00c","password":"correct horse"}',
    "not JSON": b"\xff\xfe",
    "the same key twice": b'{"username":"ana","username":1,"password":"correct horse"}',
}


async def test_malicious_bodies_are_rejected(launch: Launch, tmp_path: Path) -> None:
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    ana = await world.person("ana")
    place = await world.place(ana)
    async with Health(process) as health:
        for name, body in BODIES.items():
            for path in ("/auth/register", "/messages", "/servers"):
                reply = await ana.call("POST", path, data=body, headers={"Content-Type": "application/json"})
                assert 400 <= reply.status < 500, (name, path, reply)
                assert reply.code in ("BAD_REQUEST", "TOO_LARGE"), (name, path, reply)
                assert reply.body["reason"] in chatrtc.REASONS, (name, path, reply)
                assert reply.body.get("field", "").isidentifier() or "field" not in reply.body, (name, path, reply)
        for content in ("ab\0c", "\ud800", "", " \n "):
            body = json.dumps({"channel_id": place.channel_id, "content": content}).encode()
            assert (await ana.call("POST", "/messages", data=body)).status == 400
        for coding, data in {"gzip": gzip.compress(b" " * 100_000_000), "deflate": DEFLATED, "br": b"x"}.items():
            reply = await ana.call("POST", "/messages", data=data[:200_000], headers={"Content-Encoding": coding})
            assert reply.status in (400, 413, 415), reply
        megabyte = b"x" * (1 << 20)
        for path in ("/auth/login", "/messages", "/nowhere", POLLING):
            whole = request(f"POST {path}", "Content-Length: 100000000", f"Authorization: Bearer {ana.token}")
            assert 400 <= await status_of(process.url, whole, megabyte, 100 << 20) < 500
            chunked = request(f"POST {path}", "Transfer-Encoding: chunked", f"Authorization: Bearer {ana.token}")
            endless = b"100000\r\n" + megabyte + b"\r\n"
            assert 400 <= await status_of(process.url, chunked, endless, 100 << 20) < 500
        assert await server_history(world, place.server_id, ana.token) == []
        await ana.post(place.channel_id, "it still works")
    print(f"bombs: {health}")
    await process.stop_well()


SMUGGLED = request("GET /config")
BROKEN_HTTP = {  # HTTP that proxies and servers have been known to interpret differently
    "two lengths": request("POST /auth/login", "Content-Length: 5", "Content-Length: 6") + b"{}   ",
    "length and chunks": request("POST /auth/login", "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunked twice": request("POST /auth/login", "Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "chunks by another name": request("POST /auth/login", "Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "space before the colon": request("POST /auth/login", "Content-Length : 2") + b"{}",
    "a length with a sign": request("POST /auth/login", "Content-Length: +2") + b"{}",
    "a negative length": request("POST /auth/login", "Content-Length: -2") + b"{}",
    "a bare line end": b"GET /config HTTP/1.1\nHost: localhost\n\n",
    "a bare return": b"GET /config HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n",
    "NUL in a header": request("GET /config", "X: a\0b"),
    "a folded header": request("GET /config", "X: a", " b"),
    "a header of 100 kB": request("GET /config", "X: " + "a" * 100_000),
    "10,000 headers": request("GET /config", *(f"X{n}: a" for n in range(10_000))),
    "a path of 100 kB": request("GET /" + "a" * 100_000),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
    "an old version": b"GET /config HTTP/0.9\r\n\r\n",
    "an upgrade with a body": request("GET /config", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 3") + b"abc",
}


@trials(1, 60)
async def test_broken_http_is_rejected(launch: Launch, tmp_path: Path, tries: int) -> None:
    process = await launch(tmp_path / "chat.db")
    dice = random.Random(6)
    async with Health(process):
        for _ in range(tries):
            for name, data in BROKEN_HTTP.items():
                status = await status_of(process.url, data + SMUGGLED)
                assert status == 0 or 200 <= status < 500, (name, status)
                if "length" in name or "chunk" in name or "colon" in name:
                    assert status in (0, 400), (name, status)
            noise = dice.randbytes(1000) + b"\r\n\r\n"
            assert await status_of(process.url, noise) in (0, 400)
    await process.stop_well()


async def test_the_sockets_of_a_user_are_limited(launch: Launch, tmp_path: Path) -> None:
    process = await launch(tmp_path / "chat.db", limits=True)
    world = process.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    wires: list[Wire] = []
    for _ in range(chatrtc.SOCKETS_PER_USER):
        wires.append(await Wire.join(ana, place))
    for _ in range(30):
        refused = await Wire.reach(world.url)
        await refused.upgrade()
        await refused.say("40" + json.dumps({"token": ana.token}))
        answer = await refused.frame()
        assert answer.startswith(b"44"), answer
        assert b"RATE_LIMITED" in answer
    await Wire.join(ben, place)  # the control: other users are not affected
    await wires.pop().end()
    async with asyncio.timeout(PATIENCE):
        while True:
            again = await Wire.reach(world.url)
            await again.upgrade()
            await again.say("40" + json.dumps({"token": ana.token}))
            if (await again.frame()).startswith(b"40"):
                break
    assert (await process.stop())[0] == 0


async def test_the_anonymous_sessions_of_an_address_are_limited(launch: Launch, tmp_path: Path) -> None:
    """Sessions that have not signed in have a limit of their own: a new one replaces the oldest."""
    process = await launch(tmp_path / "chat.db", limits=True)
    world = process.world()
    async with Health(process) as health:
        sids: list[str] = []
        for _ in range(25):
            for reply in await asyncio.gather(*(world.call("GET", POLLING) for _ in range(100))):
                assert reply.status == 200, reply
                sids.append(json.loads(reply.body[1:])["sid"])
        pongs = [await world.call("POST", f"{POLLING}&sid={sid}", data="3") for sid in sids]
        alive = [sid for sid, reply in zip(sids, pongs, strict=True) if reply.status == 200]
        assert 0 < len(alive) <= chatrtc.ANONYMOUS_PER_ADDRESS
        await world.session.close()
    print(f"2500 sessions of one address: {len(alive)} at once, {health}")
    assert (await process.stop())[0] == 0


# 7. The server stops and starts well.


@trials(5, 100)
async def test_a_stop_finishes_accepted_posts(launch: Launch, tmp_path: Path, tries: int) -> None:
    """Every stored post has been answered although the signal came meanwhile, and sockets are closed."""
    database, dice, slowest = tmp_path / "chat.db", random.Random(7), 0.0
    process = await launch(database)
    writers = await start_writers(process)
    for number in range(tries):
        world = process.world()
        socket = await writers.listen(world)
        load = writers.start(world)
        await writers.progress()
        await asyncio.sleep(dice.uniform(0, 0.1))
        began = time.monotonic()
        assert await process.stop(signal.SIGINT if number % 2 else signal.SIGTERM) == (0, "")
        slowest = max(slowest, time.monotonic() - began)
        await asyncio.gather(*load)
        await asyncio.wait_for(socket.closed.wait(), PATIENCE)
        process = await launch(database)
        stored = await server_history(process.world(), writers.place.server_id, writers.people[0].token)
        nonces = {message["content"].removeprefix("this is ") for message in stored}
        assert nonces == set(writers.answered), "stored but not answered"
        await writers.check(process.world())
        for nonce in writers.unanswered:
            del writers.asked[nonce]  # rejected before they were stored
    print(f"{tries} stops, {len(writers.answered)} answered, exit within {slowest:.2f} s")
    assert slowest < bound(10)


def fill(database: Path, place: Place, author_id: int, count: int, words: int = 1) -> None:
    """Insert `count` messages, each with fewer than `words` extra words, as if they had been posted."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        (last,) = db.execute("SELECT seq FROM servers WHERE server_id = ?", (place.server_id,)).fetchone()
        row = "INSERT INTO messages (server_id, channel_id, author_id, content, created_at, seq) VALUES (?, ?, ?, ?, ?, ?)"
        at = "2026-01-01T00:00:00Z"
        many = (
            (*place, author_id, f"message number {n} of many{' long' * (n % words)}", at, last + n) for n in range(1, count + 1)
        )
        db.executemany(row, many)
        db.execute("UPDATE servers SET seq = seq + ? WHERE server_id = ?", (count, place.server_id))
        db.execute("INSERT INTO messages_fts (rowid, content, server_id) SELECT message_id, content, server_id FROM messages")
        db.execute("UPDATE search SET indexed_id = (SELECT max(message_id) FROM messages)")


@trials(50_000, 1_000_000)
async def test_recovery_is_quick(launch: Launch, tmp_path: Path, tries: int) -> None:
    database = tmp_path / "chat.db"
    process = await launch(database)
    writers = await start_writers(process)
    assert (await process.stop())[0] == 0
    await asyncio.to_thread(fill, database, writers.place, writers.people[0].user_id, tries)
    process = await launch(database)
    await write_and_kill(process, writers, 1)
    process = await launch(database)
    print(f"{tries} messages, {database.stat().st_size >> 20} MiB: started in {process.seconds:.2f} s after a kill")
    assert process.seconds < bound(2)
    await writers.settle(process.world())


async def test_the_server_recovers_from_a_lack_of_file_descriptors(launch: Launch, tmp_path: Path) -> None:
    limited = (find_program("prlimit"), "--nofile=256", "--")
    process = await launch(tmp_path / "chat.db", prefix=limited)
    world = process.world()
    ana = await world.person("ana")
    place = await world.place(ana)
    crowd = [await Wire.reach(process.url) for _ in range(400)]
    async with asyncio.timeout(PATIENCE):
        await ana.post(place.channel_id, "over an open connection")  # which was kept alive
    with pytest.raises(GONE):  # the control: no new connection is possible
        await asyncio.wait_for(process.world().call("GET", "/healthz"), 1)
    await asyncio.gather(*(wire.end() for wire in crowd))
    began = time.monotonic()
    newcomer = process.world()
    async with asyncio.timeout(bound(5)):
        assert (await newcomer.call("GET", "/healthz")).status == 200
    print(f"out of file descriptors: back after {time.monotonic() - began:.2f} s")
    await ana.post(place.channel_id, "and on")
    await process.stop_well(tracebacks=True)


async def test_a_frozen_server_loses_nothing(launch: Launch, tmp_path: Path) -> None:
    """The process is suspended three times under load, as when its machine sleeps."""
    process = await launch(tmp_path / "chat.db")
    writers = await start_writers(process)
    world = process.world()
    socket = await writers.listen(world)
    load = writers.start(world)
    for _ in range(3):
        await writers.progress()
        process.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.7)
        process.process.send_signal(signal.SIGCONT)
    await writers.progress()
    assert not socket.closed.is_set()
    await process.stop(signal.SIGKILL)
    await asyncio.gather(*load)
    process = await launch(tmp_path / "chat.db")
    world = process.world()
    await writers.settle(world)
    await writers.check(world)


# 8. Neither a full disk nor a failing one is fatal.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = find_program("mount")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m,mode=700", "none", folder], capture_output=True)
    if done.returncode:
        message = "a small disk cannot be mounted here: " + done.stderr.decode().strip()
        pytest.fail(message) if os.environ.get("CI") and os.geteuid() == 0 else pytest.skip(message)
    yield folder
    subprocess.run([find_program("umount"), "-l", folder], check=True)


async def is_healthy(world: World) -> bool:
    reply = await world.call("GET", "/healthz")
    assert reply.status in (200, 503)
    return reply.status == 200


async def until_healthy(world: World, healthy: bool = True, seconds: float = 5) -> None:
    async with asyncio.timeout(bound(seconds)):
        while await is_healthy(world) is not healthy:
            await asyncio.sleep(0.05)


@trials(1, 20)
async def test_a_full_disk_is_not_fatal(launch: Launch, small_disk: Path, tries: int) -> None:
    process = await launch(small_disk / "chat.db", "--disk-reserve", "0")
    writers = await start_writers(process)
    world = process.world()
    ana = writers.people[0]
    ana.world = world
    for number in range(tries):
        assert await is_healthy(world)
        long = {"channel_id": writers.place.channel_id, "content": "x" * 4000}
        acknowledged = []
        while (reply := await timed(world, long, ana))[0].status == 201:
            acknowledged.append(reply[0].body)
        assert reply[0].status == 503, reply
        assert (reply[0].code, reply[0].body["reason"]) == ("UNAVAILABLE", "DISK_FULL")
        many = await asyncio.gather(*(timed(world, long, ana) for _ in range(16)))
        assert {answer.status for answer, _ in many} <= {503, 201}
        acknowledged += [answer.body for answer, _ in many if answer.status == 201]
        assert max(seconds for _, seconds in [reply, *many]) < bound(1)
        page = await ana.ok("GET", f"/channels/{writers.place.channel_id}/messages")
        assert page["messages"][-1] in acknowledged
        size = 3 + 8 * (number + 1)
        subprocess.run([find_program("mount"), "-o", f"remount,size={size}m", small_disk], check=True)
        await until_healthy(world)
        last = await ana.post(writers.place.channel_id, "there is room again")
        stored = {message["message_id"]: message for message in await server_history(world, writers.place.server_id, ana.token)}
        assert all(stored[message["message_id"]] == message for message in [*acknowledged, last])
    await process.stop_well(tracebacks=True)
    assert (await run_ok("check", "--database", str(small_disk / "chat.db"))).startswith("sound")


async def test_a_disk_reserve_is_kept_for_deleting(make_world: MakeWorld, small_disk: Path) -> None:
    """With little space left, adding data is rejected; deleting, protecting and reading work."""
    deletions = [op for op in chatrtc.OPERATIONS.values() if op.method == "DELETE" and op.kind == "write"]
    assert [op.name for op in deletions if not op.frees_space] == []
    world = await make_world(database=str(small_disk / "chat.db"), disk_reserve=1)
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    posted = await ana.post(place.channel_id)
    server, path = f"/servers/{place.server_id}", f"/messages/{posted['message_id']}"
    disk = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_frsize - (3 << 18)))
    await until_healthy(world, False)
    for method, route, body in [
        ("POST", "/messages", {"channel_id": place.channel_id, "content": "x"}), ("PATCH", path, {"content": "x"}),
        ("PUT", f"{path}/reactions/👍", None), ("POST", "/servers", {"name": "x"}), ("POST", f"{server}/invites", {}),
        ("POST", f"{server}/channels", {"name": "x"}),
        ("POST", "/auth/register", {"username": "late", "password": "correct horse"}),
    ]:  # fmt: skip
        reply = await ana.call(method, route, body)
        assert (reply.status, reply.body.get("reason")) == (503, "DISK_FULL"), (route, reply)
    for route in (server, f"{server}/changes", f"{server}/search?q=x", f"/channels/{place.channel_id}/messages", path):
        assert (await ana.call("GET", route)).status == 200
    login = await world.sign_in("ana")
    assert login.status == 200
    assert (await world.call("POST", "/auth/logout", token=login.body["token"])).status == 204
    for route in (path, f"/channels/{place.channel_id}", f"{server}/members/{ben.user_id}", server):
        await ana.ok("DELETE", route)
    assert "is deleted" in await run_ok("user", "delete", "ben", "--yes", "--database", str(small_disk / "chat.db"))
    (small_disk / "ballast").unlink()
    await until_healthy(world)
    await ana.ok("POST", "/servers", {"name": "x"})


MOVES: dict[str, Callable[[Path], object]] = {
    "moved": lambda path: path.rename(path.with_name("elsewhere.db")),
    "moved with its folder": lambda path: path.parent.rename(path.parent.with_name("elsewhere")),
    "deleted": Path.unlink,
    "replaced by a copy": lambda path: Path(shutil.copy(path, f"{path}.new")).rename(path),
    "without its -wal": lambda path: Path(f"{path}-wal").unlink(),
}


@pytest.mark.parametrize("name", MOVES)
async def test_a_moved_database_rejects_writes(make_world: MakeWorld, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "chat.db"
    world = await make_world(database=str(path))
    ana = await world.person("ana")
    place = await world.place(ana)
    before = await ana.post(place.channel_id)
    MOVES[name](path)
    for _ in range(3):
        reply = await ana.call("POST", "/messages", {"channel_id": place.channel_id, "content": "lost"})
        assert (reply.status, reply.code) == (503, "UNAVAILABLE")
        assert not await is_healthy(world)
    assert (await ana.ok("GET", f"/channels/{place.channel_id}/messages"))["messages"] == [before]
    if name == "moved":
        (tmp_path / "data" / "elsewhere.db").rename(path)
    elif name == "moved with its folder":
        (tmp_path / "elsewhere").rename(path.parent)
    else:
        return
    await until_healthy(world)
    await ana.post(place.channel_id)


async def timed(world: World, message: Any, person: Person) -> tuple[Reply, float]:
    began = time.monotonic()
    reply = await world.call("POST", "/messages", message, token=person.token)
    return reply, time.monotonic() - began


@trials(2, 20)
async def test_a_failing_disk_turns_health_red(launch: Launch, tmp_path: Path, faults: Path, tries: int) -> None:
    """Every sync fails with EIO for a while: no 201 and an unhealthy server; afterwards all works as before."""
    disk = Disk(tmp_path / "disk", faults)
    process = await launch(disk.folder / "chat.db", env=disk.env)
    writers = await start_writers(process)
    world = process.world()
    for _ in range(tries):
        load = writers.start(world)
        await writers.progress()
        disk.broken.touch()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*load)  # each writer stops at its first error
        assert {reply.code for reply in writers.refused} == {"UNAVAILABLE"}
        await until_healthy(world, False)
        answer, seconds = await timed(world, {"channel_id": writers.place.channel_id, "content": "x"}, writers.people[0])
        assert answer.status == 503
        assert seconds < bound(1)
        await server_history(world, writers.place.server_id, writers.people[0].token)
        disk.broken.unlink()
        await until_healthy(world)
        await writers.settle(world)
        await writers.check(world)
    await process.stop(signal.SIGKILL)
    disk.lose_power(random.Random(8))
    process = await launch(disk.folder / "chat.db")
    await writers.check(process.world())


async def test_a_dead_writer_turns_health_red(world: World) -> None:
    assert await is_healthy(world)
    committer = world.chat.hub.store._committer
    assert committer is not None
    committer.cancel()
    await asyncio.wait([committer])
    assert not await is_healthy(world)


# 9. The parts of the security checklist that no other section tests.


async def test_an_unknown_name_takes_as_long_as_a_wrong_password(world: World) -> None:
    await world.person("ana")
    seconds: dict[str, list[float]] = {"ana": [], "nobody": []}
    replies = []
    for _ in range(40):
        for name, times in seconds.items():
            began = time.perf_counter()
            replies.append(await world.sign_in(name, "a wrong one"))
            times.append(time.perf_counter() - began)
    assert {(reply.status, reply.body["error"]) for reply in replies} == {(401, replies[0].body["error"])}
    assert len({tuple(sorted(set(reply.headers) - {"Date"})) for reply in replies}) == 1
    wrong, missing = (sorted(times)[:20] for times in seconds.values())  # the faster half, which other load has not slowed down
    ratio = sum(missing) / sum(wrong)
    print(f"a login takes {sum(wrong) / 20 * 1000:.1f} ms; a missing name {ratio:.2f} times as long")
    assert 0.8 < ratio < 1.25 or (not SOAK and 0.4 < ratio < 2.5)


async def test_hashing_delays_nobody(world: World) -> None:
    """A hundred people sign in at once; meanwhile other requests are answered."""
    await world.person("ana")
    logins = [asyncio.create_task(world.sign_in("ana", "a wrong one")) for _ in range(100)]
    slowest = 0.0
    while not all(task.done() for task in logins):
        began = time.perf_counter()
        assert (await world.call("GET", "/config")).status == 200
        slowest = max(slowest, time.perf_counter() - began)
        await asyncio.sleep(0.01)
    print(f"100 logins at once; another request took {slowest * 1000:.0f} ms at most")
    assert slowest < bound(1)


@trials(50, 200)
async def test_an_invite_is_used_no_more_than_allowed(world: World, tries: int) -> None:
    owner = await world.person("owner")
    place = await world.place(owner)
    invites = f"/servers/{place.server_id}/invites"
    guests = []
    code = (await owner.ok("POST", invites, {}))["code"]
    for number in range(8):
        account = await world.call("POST", "/auth/guest", {"username": f"guest{number}", "code": code})
        guests.append(Person(world, f"guest{number}", account.body["user_id"], account.body["token"]))
    for number in range(tries):
        await asyncio.gather(*(guest.call("DELETE", f"/servers/{place.server_id}/members/{guest.user_id}") for guest in guests))
        uses = 1 + number % 2
        last = (await owner.ok("POST", invites, {"max_uses": uses}))["code"]
        replies = await asyncio.gather(*(guest.call("POST", f"/invites/{last}") for guest in guests))
        assert [reply.status for reply in replies].count(201) == uses
        assert {reply.status for reply in replies} == {201, 404}
    rows = (await owner.ok("GET", invites))["invites"]
    assert all(row["max_uses"] is None or row["uses"] == row["max_uses"] for row in rows)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Forwarded-For": "10.0.0.{n}"},
        {"X-Real-IP": "10.0.0.{n}"},
        {"Forwarded": "for=10.0.0.{n}"},
        {"X_Forwarded_For": "10.0.0.{n}"},
        {"X-Forwarded-For": "2001:db8::{n}"},
    ],
)
async def test_forwarded_headers_avoid_no_limit(make_world: MakeWorld, headers: dict[str, str]) -> None:
    """Guesses of invites are limited by address, whatever address the request claims to come from."""
    world = await make_world(no_rate_limit=False)
    statuses = []
    burst = int(chatrtc.LIMITS["invite"].burst)
    for number in range(burst + 30):
        given = {name: value.format(n=number) for name, value in headers.items()}
        statuses.append((await world.call("GET", f"/invites/guess{number}", headers=given)).status)
    assert burst <= statuses.count(404) < burst + 30, statuses
    assert set(statuses) == {404, 429}


LOOK_ALIKES = [
    ("alice", ["ALICE", "Alice", "\uff41lice", "\uff41\uff4c\uff49\uff43\uff45", "\U0001d41alice", "\u24d0lice"]),
    ("straße", ["STRASSE", "strasse", "straẞe"]),
    ("josé", ["jose\u0301", "JOSÉ", "JOSE\u0301"]),
    ("\ufb01ona", ["fiona", "FIONA"]),
]
INVISIBLE_CHARS = "\u200b\u200d\u202e\u2066\ufeff\u00ad\u2060\u3164\u180e\0\n \ufffe"


async def test_names_that_look_alike_are_rejected(world: World) -> None:
    for name, others in LOOK_ALIKES:
        await world.person(name)
        for other in others:
            reply = await world.call("POST", "/auth/register", {"username": other, "password": "correct horse"})
            if other[0] == "\u24d0":
                assert reply.status == 400  # not a letter
                continue
            assert (reply.status, reply.code) == (409, "CONFLICT"), (name, other, reply)
            assert (await world.sign_in(other)).body["username"] == name
    for sign in INVISIBLE_CHARS:
        for name in (f"bob{sign}by", f"{sign}bobby", f"bobby{sign}"):
            reply = await world.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
            assert reply.status == 400, (ascii(name), reply)
    await world.person("bobby")  # the control


async def test_every_answer_has_its_headers(world: World) -> None:
    ana = await world.person("ana")
    paths = {(op.method, op.path) for op in chatrtc.OPERATIONS.values() if op.method and op.path}
    paths |= {("GET", "/openapi.json"), ("GET", "/asyncapi.json"), ("GET", "/nowhere"), ("PUT", "/servers"), ("GET", "/")}
    for method, path in sorted(paths, key=str):
        for token in (ana.token, None):
            filled = re.sub(r"{[a-z_]+}", "1", path)
            reply = await world.call(method, filled, {} if method not in ("GET", "DELETE") else None, token=token)
            assert reply.headers["X-Content-Type-Options"] == "nosniff", (method, path)
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy, (method, path)
            assert "unsafe" not in policy, (method, path)
            assert "frame-ancestors 'none'" in policy, (method, path)
            cached = reply.headers["Cache-Control"]
            kept = path in ("/", "/openapi.json", "/asyncapi.json")  # with an ETag, so that it is revalidated each time
            assert cached == ("no-cache" if kept else "no-store"), (method, path, cached)


def file_modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}


def database_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("chat.db*") if path.suffix != ".secret")


async def test_no_secret_is_in_a_file_mode_or_a_log(launch: Launch, tmp_path: Path) -> None:
    process = await launch(tmp_path / "chat.db", limits=True)
    world = process.world()
    password = "a password nobody logs"
    names = {"username": "ana", "password": password}
    token = (await world.call("POST", "/auth/register", names)).body["token"]
    broken = f"GET /users/me HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\0\r\n\r\n".encode()
    assert await status_of(world.url, broken) == 400
    for path in (f"/users/me?token={token}", f"/nowhere/{token}"):
        await world.call("GET", path, token=token)
    await world.sign_in("ana\n\x1b[31m", password)
    await world.call("POST", "/auth/login", names, headers={"Authorization": f"Bearer {token}x"})
    wire = await Wire.reach(world.url)
    await wire.upgrade()
    await wire.say("40" + json.dumps({"token": token + "x", "password": password}))
    secret = await asyncio.to_thread((tmp_path / "chat.db.secret").read_text)
    assert set(file_modes(tmp_path).values()) == {"0o600"}, file_modes(tmp_path)
    arguments = await asyncio.to_thread(Path(f"/proc/{process.process.pid}/cmdline").read_text)
    status, log = await process.stop()
    assert status == 0
    for known in (token, password, secret):
        assert known not in log + arguments
    stored = database_bytes(tmp_path)
    assert password.encode() not in stored
    assert token.encode() not in stored
    assert b"ana" in stored  # the control


# One hostile client against a server with its limits on, while a class signs in, opens an invite, posts and searches.

# The program that embeds the server has a handler that takes longer than the time between messages.
SLOW_HOST = """
import asyncio, sys, chatrtc

class Slow(chatrtc.ChatRTC):
    def __init__(self, *given, **settings):
        super().__init__(*given, **settings)
        self.on("message:new")(self.sleep)

    async def sleep(self, payload):
        await asyncio.sleep(3)

chatrtc.ChatRTC = Slow
chatrtc.main(sys.argv[3:])
"""


class Hostile(NamedTuple):
    """The hostile client: its account, its server of 100,000 messages, the invite to the class by which it has joined, and the
    channel and peer id of the teacher in a voice channel."""

    world: World
    me: Person
    place: Place
    code: str
    class_id: int
    voice: dict[str, Any]
    turn: Iterator[int]


async def draw_invites_for_any_host(hostile: Hostile) -> None:
    await hostile.world.call("GET", f"/invites/{hostile.code}.svg", headers={"Host": "h" * 900})


async def guess_codes(hostile: Hostile) -> None:
    await hostile.world.call("GET", f"/invites/wrong-{next(hostile.turn)}")


async def guess_passwords(hostile: Hostile) -> None:
    await hostile.world.sign_in(f"pupil-{next(hostile.turn) % 20}", "a wrong one")


async def sign_in_correctly(hostile: Hostile) -> None:
    await hostile.world.sign_in(hostile.me.name)


async def guess_under_fresh_names(hostile: Hostile) -> None:
    await hostile.world.sign_in(f"nobody-{next(hostile.turn)}", "a wrong one")


async def open_sockets(hostile: Hostile) -> None:
    async with hostile.world.session.ws_connect(f"{hostile.world.url}/socket.io/?EIO=4&transport=websocket") as wire:
        await wire.receive(timeout=PATIENCE)
        await asyncio.sleep(0.5)


async def register_many(hostile: Hostile) -> None:
    body = {"username": f"guest-{next(hostile.turn)}", "code": hostile.code}
    await hostile.world.call("POST", "/auth/guest", body)


async def ask_and_not_read(hostile: Hostile) -> None:
    async def ask() -> None:
        url = f"{hostile.world.url}/servers/{hostile.place.server_id}/changes?after=0"
        async with hostile.world.session.get(url, headers={"Authorization": f"Bearer {hostile.me.token}"}):
            await asyncio.sleep(3)

    await asyncio.gather(*(ask() for _ in range(6)), return_exceptions=True)


async def search_much(hostile: Hostile) -> None:
    await hostile.me.call("GET", f"/servers/{hostile.place.server_id}/search?q=e t a o i n s h r d l u")
    await hostile.me.call("GET", f"/channels/{hostile.place.channel_id}/read")


async def post_much(hostile: Hostile) -> None:
    body = {"channel_id": hostile.place.channel_id, "content": ("@" + "\ufdf2" * 10 + "." * 50) * 65}
    await hostile.me.call("POST", "/messages", body)


async def create_servers(hostile: Hostile) -> None:
    await hostile.me.call("POST", "/servers", {"name": "x"})
    await hostile.me.call("GET", "/servers")


async def signal_the_teacher(hostile: Hostile) -> None:
    events = [("join_server", {"server_id": hostile.class_id}), ("voice:join", {"channel_id": hostile.voice["channel_id"]})]
    events += [("voice:signal", hostile.voice | {"data": "x" * 16_000})] * 100
    async with hostile.world.session.ws_connect(f"{hostile.world.url}/socket.io/?EIO=4&transport=websocket") as wire:
        await wire.receive(timeout=PATIENCE)
        await wire.send_str("40" + json.dumps({"token": hostile.me.token}))
        for event in events:
            await wire.send_str("42" + json.dumps(event))
        await asyncio.sleep(0.5)


ATTACKS = (
    draw_invites_for_any_host, guess_codes, guess_passwords, sign_in_correctly, guess_under_fresh_names, open_sockets,
    register_many, ask_and_not_read, search_much, post_much, create_servers, signal_the_teacher,
)  # fmt: skip


def from_address(url: str, address: str, forwarded: str) -> World:
    """Return a client at that loopback address that sends X-Forwarded-For, as a proxy would."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0), limit=0)
    return World(url, aiohttp.ClientSession(connector=connector, headers={"X-Forwarded-For": forwarded}))


async def sign_in_as(world: World, name: str) -> Person:
    signed_in = await world.sign_in(name)
    assert signed_in.status == 200, (name, signed_in)
    return Person(world, name, signed_in.body["user_id"], signed_in.body["token"])


async def be_a_pupil(url: str, name: str, number: int, code: str) -> None:
    """Sign in, open an invite, post and search; each must succeed at once."""
    async with from_address(url, "127.0.0.1", f"198.51.100.{number}") as world:
        me = await sign_in_as(world, name)
        assert (await world.call("GET", f"/invites/{code}")).status == 200
        joined = await me.call("POST", f"/invites/{code}")
        assert joined.status in (200, 201), joined
        await me.post(joined.body["channels"][0]["channel_id"], f"good morning from {name}")
        found = await me.ok("GET", f"/servers/{joined.body['server_id']}/search?q=morning")
        assert len(found["messages"]) >= 1, found


# Requests the health in a process of its own, so that the attackers' CPU time does not count as the server's.
WATCH_HEALTH = """
import sys, time, urllib.request
request = urllib.request.Request(sys.argv[1] + "/healthz", headers={"X-Forwarded-For": "198.51.100.250"})
slowest = 0.0
while True:
    began = time.monotonic()
    with urllib.request.urlopen(request, timeout=30) as reply:
        assert reply.status == 200
    slowest = max(slowest, time.monotonic() - began)
    print(slowest, flush=True)
    time.sleep(0.25)
"""


async def attack_until(end: float, attack: Callable[[Hostile], Awaitable[None]], hostile: Hostile) -> None:
    while time.monotonic() < end:
        with contextlib.suppress(*GONE):
            await attack(hostile)


PUPILS = [f"pupil-{number}" for number in range(20)]


@pytest_asyncio.fixture(scope="session")
async def school(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place, Place]:
    """A database with a class and its pupils, and a hostile user's server of 100,000 messages."""
    path = tmp_path_factory.mktemp("school") / "chat.db"
    process = await Server.start(path, "--no-rate-limit")
    async with process.world() as world:
        teacher, mallory, *_ = await world.people("teacher", "mallory", *PUPILS)
        place, theirs = await world.place(teacher), await world.place(mallory, name="theirs")
    await process.stop()
    with contextlib.closing(sqlite3.connect(path)) as db:
        for _ in range(10):
            insert_words(db, theirs, mallory.user_id, 10_000)
            db.commit()
    return path, place, theirs


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.1"], ids=["from another address", "behind the same proxy"])
async def test_one_hostile_client_stops_nobody(
    launch: Launch,
    tmp_path: Path,
    school: tuple[Path, Place, Place],
    attack: Callable[[Hostile], Awaitable[None]],
    address: str,
) -> None:
    path, place, theirs = school
    for file in (path, path.with_name("chat.db.secret")):
        shutil.copy(file, tmp_path)
    prefix = (sys.executable, "-c", SLOW_HOST)
    env = {"PYTHONPATH": str(HERE)}
    process = await launch(tmp_path / "chat.db", "--trusted-proxy", "127.0.0.1", limits=True, prefix=prefix, env=env)
    near = from_address(process.url, "127.0.0.1", "198.51.100.251")
    async with near as world, from_address(process.url, address, "203.0.113.66") as far:
        teacher, me = await sign_in_as(world, "teacher"), await sign_in_as(far, "mallory")
        code = await teacher.invite(place.server_id)
        await me.ok("POST", f"/invites/{code}")
        channel = await teacher.ok("POST", f"/servers/{place.server_id}/channels", {"name": "talk", "kind": "voice"})
        here = await teacher.socket(place.server_id)
        peer = await here.ok("voice:join", {"channel_id": channel["channel_id"]})
        voice = {"channel_id": channel["channel_id"], "to": peer["peer_id"]}
        hostile = Hostile(far, me, theirs, code, place.server_id, voice, itertools.count())
        before = memory(process)
        watch = [sys.executable, "-c", WATCH_HEALTH, process.url]
        health = await asyncio.create_subprocess_exec(*watch, stdout=asyncio.subprocess.PIPE)
        end = time.monotonic() + 20
        attackers = [asyncio.create_task(attack_until(end, attack, hostile)) for _ in range(20)]
        await asyncio.sleep(3)
        pupils = (be_a_pupil(process.url, name, number, code) for number, name in enumerate(PUPILS))
        outcomes = await asyncio.gather(*pupils, return_exceptions=True)
        await asyncio.gather(*attackers)
        grown = memory(process) - before
        if health.returncode is None:
            health.terminate()
        times, _ = await health.communicate()
        slowest = float(times.split()[-1])
        print(f"{attack.__name__} from {address}: health within {slowest:.2f} s, memory {grown / 2**20:+.0f} MiB")
        assert [outcome for outcome in outcomes if outcome is not None] == []
        greetings = {payload["content"] for event, payload in here.received if event == "message:new"}
        assert {f"good morning from {name}" for name in PUPILS} <= greetings
        await here.ok("ping")
        assert health.returncode == -signal.SIGTERM  # every answer was 200
        assert slowest < 1
        assert grown < 128 << 20


async def post_file(person: Person, channel_id: int, data: Any, name: str = "a.bin", **options: Any) -> Reply:
    """Upload a file: bytes, or an iterator of their parts."""
    url = URL(f"{person.world.url}/channels/{channel_id}/files").with_query(name=name)
    return await person.call("POST", url, data=data, **options)


# 10. Files: one that was acknowledged is whole, nothing that could run is shown, and no upload does harm.


def stored_files(database: Path) -> tuple[int, int, int]:
    """Return the number of files, the number of pieces, and the bytes that the program counts."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        row = db.execute("SELECT (SELECT count(*) FROM files), (SELECT count(*) FROM pieces), bytes FROM stored").fetchone()
    return (int(row[0]), int(row[1]), int(row[2]))


def zip_bomb() -> bytes:
    """Return an archive of some kB whose only file has 8 MiB."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(8 << 20))
    return output.getvalue()


HOSTILE_FILES: dict[str, tuple[bytes, str, str, str]] = {  # -> content, Content-Type that the client sends, type, disposition
    "gif and html, a valid picture": (gif(3, 4) + HTML_FILE, "text/html", "image/gif", "inline"),
    "gif and html, no valid picture": (b"GIF89a/*" + HTML_FILE + b"*/=1", "image/gif", UNKNOWN, "attachment"),
    "gif and javascript": (b"GIF89a=1;alert(1)//" + bytes(40), "text/javascript", UNKNOWN, "attachment"),
    "svg with a script": (SVG_FILE, "image/svg+xml", "text/plain", "attachment"),
    "svg after a comment": (b"<!-- -->" + SVG_FILE, "image/png", "text/plain", "attachment"),
    "html that pretends to be a picture": (HTML_FILE, "image/png", "text/plain", "attachment"),
    "xml with a style sheet": (b'<?xml-stylesheet href="x.xsl"?><x/>', "application/pdf", "text/plain", "attachment"),
    "javascript": (b"alert(1)", "text/javascript", "text/plain", "attachment"),
    "html in utf-16": (HTML_FILE.decode().encode("utf-16"), "text/html", UNKNOWN, "attachment"),
    "html in utf-7": (b"+ADw-script+AD4-alert(1)+ADw-/script+AD4-", "text/html; charset=utf-7", "text/plain", "attachment"),
    "zip bomb": (zip_bomb(), "application/zip", "application/zip", "attachment"),
    "java archive after a gif": (gif(3, 4) + zip_bomb(), "application/java-archive", "image/gif", "inline"),
    "picture of 10,000 x 10,000": (png(10_000, 10_000), "image/png", UNKNOWN, "attachment"),
    "pdf with javascript": (b"%PDF-1.7\n<</S/JavaScript/JS(alert(1))>>", "text/html", "application/pdf", "inline"),
    "video without a picture": (ftyp(b"isom"), "text/html", "video/mp4", "inline"),
    "a program": (b"MZ\x90\0\3" + bytes(60), "image/png", UNKNOWN, "attachment"),
    "a Content-Type with a line end": (b"%PDF-1.7", "text/html;\tx=y", "application/pdf", "inline"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_FILES)
async def test_what_could_run_is_sent_as_a_download(world: World, case: str) -> None:
    content, claimed, media_type, shown = HOSTILE_FILES[case]
    ana = await world.person("ana")
    place = await world.place(ana)
    reply = await post_file(ana, place.channel_id, content, "x.html", headers={"Content-Type": claimed})
    assert (reply.status, reply.body["type"], reply.body["size"]) == (201, media_type, len(content))
    sent = await ana.call("GET", f"/files/{reply.body['file_id']}")
    assert (sent.status, sent.body) == (200, content)
    assert sent.headers["Content-Type"].partition(";")[0] == media_type
    assert sent.headers["Content-Disposition"].partition(";")[0] == shown
    assert sent.headers["X-Content-Type-Options"] == "nosniff"
    policy = {one.strip() for one in sent.headers["Content-Security-Policy"].split(";")}
    assert {"sandbox", "default-src 'none'"} <= policy
    assert not [one for one in policy if "script" in one]
    assert sent.headers["Cache-Control"] == "private, no-cache"


@pytest.mark.parametrize("name", [*FILE_NAMES, "a" * 1000], ids=ascii)
async def test_a_hostile_file_name_is_cleaned(world: World, tmp_path: Path, name: str) -> None:
    """In the answer, in the header of a download and in the folder of an export."""
    ana = await world.person("ana")
    place = await world.place(ana)
    if re.search("[\ud800-\udfff]", name):
        pytest.skip("no client can send it")
    reply = await post_file(ana, place.channel_id, b"content", name)
    clean = FILE_NAMES.get(name, "a" * 120)
    assert (reply.status, reply.body["name"]) == (201, clean)
    file_id = reply.body["file_id"]
    await ana.post(place.channel_id, "", files=[file_id])
    sent = await ana.call("GET", f"/files/{file_id}")
    header = sent.headers["Content-Disposition"]
    assert re.fullmatch(r"attachment; filename=\"[ -!#-\[\]-~]*\"; filename\*=UTF-8''[\w.%!~*'()&+$#^`|-]+", header), header
    assert unquote(header.rpartition("''")[2]) == clean
    await run_ok("export", "--files", str(tmp_path / "out"), "--database", str(tmp_path / "chat.db"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{file_id}-{clean}"]
    assert (tmp_path / "out" / f"{file_id}-{clean}").read_bytes() == b"content"


async def test_a_file_name_that_is_much_too_long_is_rejected(world: World, tmp_path: Path) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    reply = await post_file(ana, place.channel_id, b"content", "a" * 1001)
    assert (reply.code, reply.body["field"]) == ("TOO_LARGE", "name")
    for query in ("name=a&name=b", "name=%ff", "name=a&width=x", "name=a&width=0", "name=a&size=7", "name=a&alt=%00"):
        reply = await ana.call("POST", URL(f"{world.url}/channels/{place.channel_id}/files?{query}", encoded=True), data=b"x")
        assert reply.code == "BAD_REQUEST" or (query == "name=%ff" and reply.status == 201), (query, reply)
    assert stored_files(tmp_path / "chat.db")[0] <= 1


# A body that is cut, stopped, malformed or too long: its headers, its bytes, and the status of the answer (0: the client
# disconnects instead).
HOSTILE_BODIES: dict[str, tuple[str, Iterable[bytes], int]] = {
    "cut off": ("Content-Length: 900000", [bytes(600_000)], 0),
    "cut off in a chunk": ("Transfer-Encoding: chunked", [b"fffff\r\n", bytes(600_000)], 0),
    "nothing sent": ("Content-Length: 900000", [], 400),
    "stopped": ("Content-Length: 900000", [bytes(600_000)], 400),
    "stopped between chunks": ("Transfer-Encoding: chunked", [b"7a120\r\n", bytes(500_000), b"\r\n"], 400),
    "malformed chunk": ("Transfer-Encoding: chunked", [b"7a120\r\n", bytes(500_000), b"\r\nzz\r\n"], 400),
    "negative chunk": ("Transfer-Encoding: chunked", [b"-5\r\nabcde\r\n0\r\n\r\n"], 400),
    "a chunk of 2**64 bytes": ("Transfer-Encoding: chunked", [b"10000000000000000\r\n", bytes(500_000)], 400),
    "two lengths": ("Content-Length: 5\r\nContent-Length: 6", [b"abcdef"], 400),
    "a length and chunks": ("Content-Length: 5\r\nTransfer-Encoding: chunked", [b"5\r\nabcde\r\n0\r\n\r\n"], 400),
    "a negative length": ("Content-Length: -5", [b"abcde"], 400),
    "compressed": (f"Content-Encoding: gzip\r\nContent-Length: {len(gzip.compress(b'x'))}", [gzip.compress(b"x")], 400),
    "said to be too long": ("Content-Length: 1048577", [], 413),
    "said to be much too long": (f"Content-Length: {2**62}", [], 413),
    "said to be more than a number": (f"Content-Length: {10**20}", [], 400),
    "too long in chunks": ("Transfer-Encoding: chunked", [b"100001\r\n", bytes(0x100001), b"\r\n0\r\n\r\n"], 413),
    "chunks without end": ("Transfer-Encoding: chunked", itertools.repeat(b"8000\r\n" + bytes(0x8000) + b"\r\n"), 413),
}


@pytest.mark.parametrize("case", HOSTILE_BODIES)
async def test_a_hostile_body_leaves_nothing(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(chatrtc, "UPLOAD_STALL_SECONDS", 0.5)
    world = await make_world(file_max=1)
    ana = await world.person("ana")
    place = await world.place(ana)
    headers, parts, status = HOSTILE_BODIES[case]
    wire = await Wire.reach(world.url)
    path = f"/channels/{place.channel_id}/files?name=x"
    await wire.send(request(f"POST {path}", f"Authorization: Bearer {ana.token}", *headers.split("\r\n")))
    with contextlib.suppress(ConnectionError):
        for part in parts:
            await wire.send(part)
    if status == 0:
        await until(lambda: stored_files(tmp_path / "chat.db")[1] > 0)  # the control: a piece was stored
        wire.connection.close()
    else:
        with contextlib.suppress(ConnectionError):
            while b"\r\n\r\n" not in wire.data:
                await wire.receive()
        assert re.match(rb"HTTP/1\.[01] %d " % status, wire.data), wire.data[:200]
    await until(lambda: stored_files(tmp_path / "chat.db") == (0, 0, 0))
    assert (await post_file(ana, place.channel_id, bytes(1 << 20))).status == 201


async def test_an_upload_in_chunks_is_whole(world: World) -> None:
    """Chunks of any size become pieces of one size."""
    ana = await world.person("ana")
    place = await world.place(ana)
    for size in (0, 1, chatrtc.PIECE_BYTES - 1, chatrtc.PIECE_BYTES, chatrtc.PIECE_BYTES + 1, 3 * chatrtc.PIECE_BYTES):
        content = Random(size).randbytes(size)

        async def chunks(content: bytes = content) -> AsyncIterator[bytes]:
            dice, at = Random(1), 0
            while at < len(content):
                step = dice.choice((1, 100, 5000, 70_000, 400_000))
                yield content[at : at + step]
                at += step

        reply = await post_file(ana, place.channel_id, chunks())
        assert (reply.status, reply.body["size"]) == (201, size)
        sent = await ana.call("GET", f"/files/{reply.body['file_id']}")
        assert (sent.body, sent.headers["ETag"]) == (content, f'"{hashlib.sha256(content).hexdigest()}"')


IGNORED_RANGES = [
    "", " ", "bytes", "bytes=", "bytes=-", "bytes=--1", "bytes=1", "bytes=a-b", "bytes=5-2", "bytes=0-1,3-4", "bytes=0-1,",
    "bytes=,0-1", "bytes= 0-1", "bytes=0 -1", "bytes=0-1-2", "bytes=+1-2", "bytes=0x1-2", "bytes=1.0-2", "items=0-1", "0-1",
    "bytes:0-1", "bytes=\u0661-2",
]  # fmt: skip


async def test_a_malformed_range_is_ignored(world: World) -> None:
    ana = await world.person("ana")
    place = await world.place(ana)
    content = Random(1).randbytes(300_000)
    path = f"/files/{(await post_file(ana, place.channel_id, content)).body['file_id']}"
    for header, expected in (*((one, 200) for one in IGNORED_RANGES), ("bytes=0-99999", 206), ("bytes=" + "0-1," * 3000, 400)):
        wire = await Wire.reach(world.url)
        fields = f"Authorization: Bearer {ana.token}\r\nRange: {header}\r\n"
        status, body = await wire.request("GET", path, headers=fields)
        assert (status, len(body)) == (expected, {200: 300_000, 206: 100_000}.get(expected, len(body))), header
        wire.connection.close()


async def test_uploads_that_are_never_attached_are_limited_and_removed(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = await make_world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    kept = (await post_file(ana, place.channel_id, b"kept")).body["file_id"]
    await ana.post(place.channel_id, "", files=[kept])
    replies = []
    for _ in range(20):
        replies += await asyncio.gather(*(post_file(ana, place.channel_id, bytes(100)) for _ in range(50)))
    assert Counter(reply.status for reply in replies) == {201: 100, 409: 900}
    assert stored_files(tmp_path / "chat.db") == (101, 101, 10_004)
    assert (await post_file(ben, place.channel_id, b"mine")).status == 201, "the limit is for each account"
    monkeypatch.setattr(chatrtc, "UNATTACHED_SECONDS", -1)
    monkeypatch.setattr(chatrtc, "FILE_PURGE_INTERVAL", 1)
    await until(lambda: stored_files(tmp_path / "chat.db") == (1, 1, 4))
    assert (await ana.call("GET", f"/files/{kept}")).body == b"kept"


class Uploaders:
    """People who upload files and post each in a message, and the answers that they received."""

    def __init__(self, place: Place, people: list[Person]) -> None:
        self.place, self.people, self.dice = place, people, Random(7)
        self.sent: set[str] = set()  # digests of all contents that were sent
        self.answered: dict[int, str] = {}  # file id -> digest
        self.posted: set[int] = set()
        self.owners: dict[int, Person] = {}

    @property
    def waiting(self) -> list[int]:
        return [file_id for file_id in self.answered if file_id not in self.posted]

    async def attach(self, world: World, file_id: int) -> bool:
        """Post a file, maybe again, and tell if the answer was 201."""
        message = {"channel_id": self.place.channel_id, "content": "", "files": [file_id], "nonce": f"file {file_id}"}
        try:
            reply = await world.call("POST", "/messages", message, token=self.owners[file_id].token)
        except GONE:
            return False
        assert reply.status == 201, reply
        assert [file["file_id"] for file in reply.body["files"]] == [file_id]
        self.posted.add(file_id)
        return True

    async def upload_on(self, world: World, person: Person) -> None:
        """Upload and post files until the server is gone."""
        while True:
            content = self.dice.randbytes(self.dice.choice((10, 40_000, 262_144, 900_000, 1_500_000)))
            digest = hashlib.sha256(content).hexdigest()
            self.sent.add(digest)
            path = f"/channels/{self.place.channel_id}/files?name=x.bin"
            try:
                reply = await world.call("POST", path, token=person.token, data=io.BytesIO(content))
            except GONE:
                return
            assert reply.status == 201, reply
            self.answered[reply.body["file_id"]], self.owners[reply.body["file_id"]] = digest, person
            if not await self.attach(world, reply.body["file_id"]):
                return

    def start(self, world: World) -> list[asyncio.Task[None]]:
        """Let everybody upload in the background."""
        return [asyncio.create_task(self.upload_on(world, person)) for person in self.people]

    async def progress(self, count: int) -> None:
        """Wait for so many more posted files."""
        before = len(self.posted)
        await until(lambda: len(self.posted) > before + count)

    async def upload_and_kill(self, process: Process, seconds: float) -> None:
        """Post the files that are still to be posted, upload from all sides, and kill the server meanwhile."""
        world = process.world()
        for file_id in self.waiting:
            assert await self.attach(world, file_id)
        tasks = self.start(world)
        await self.progress(8)
        await asyncio.sleep(seconds)
        await process.stop(signal.SIGKILL)
        await asyncio.gather(*tasks)
        await world.close()

    async def check(self, world: World) -> int:
        """Check that each acknowledged file is whole, and that no part of a file is served. Return how many are served."""
        served, tokens = 0, {person.token for person in self.people}
        for file_id in range(1, max(self.answered) + 20):
            replies = [await world.call("GET", f"/files/{file_id}", token=token) for token in tokens]
            for reply in replies:
                if reply.status == 200:
                    assert hashlib.sha256(reply.body).hexdigest() in self.sent, "a part of a file was served"
                    assert reply.headers["ETag"] == f'"{hashlib.sha256(reply.body).hexdigest()}"'
            digests = {reply.headers["ETag"].strip('"') for reply in replies if reply.status == 200}
            served += len(digests)
            if file_id in self.answered:
                assert digests == {self.answered[file_id]}, "an acknowledged file is lost"
        return served


async def start_uploaders(process: Process) -> Uploaders:
    async with process.world() as world:
        people = await world.people(*(f"uploader{number}" for number in range(4)))
        return Uploaders(await world.place(*people), people)


@trials(5, 100)
async def test_acknowledged_files_survive_a_kill(launch: Launch, tmp_path: Path, tries: int) -> None:
    database, dice, starts = tmp_path / "chat.db", random.Random(1), []
    process = await launch(database)
    uploaders = await start_uploaders(process)
    for _ in range(tries):
        await uploaders.upload_and_kill(process, dice.uniform(0, 0.3))
        process = await launch(database)
        starts.append(process.seconds)
    served = await uploaders.check(process.world())
    await eventually(lambda: no_unfinished_files(database), "all that was unfinished is removed")
    assert await process.stop() == (0, "")
    assert (await run_ok("check", "--database", str(database))).startswith("sound")
    print(f"{tries} kills, {len(uploaders.answered)} files answered, {served} served, start at most {max(starts):.2f} s")
    assert max(starts) < bound(2)


async def no_unfinished_files(database: Path) -> bool:
    with contextlib.closing(sqlite3.connect(database)) as db:
        unfinished = "SELECT 1 FROM files WHERE digest IS NULL OR channel_id IS NULL LIMIT 1"
        return db.execute(unfinished).fetchone() is None


@trials(4, 60)
async def test_acknowledged_files_survive_a_power_cut(launch: Launch, tmp_path: Path, faults: Path, tries: int) -> None:
    disk, dice, dropped = Disk(tmp_path / "disk", faults), random.Random(2), 0
    database = disk.folder / "chat.db"
    process = await launch(database, env=disk.env)
    uploaders = await start_uploaders(process)
    for number in range(4 * tries):
        if number >= tries and dropped:
            break  # by chance, a few cuts can find everything synced: then more are needed
        await uploaders.upload_and_kill(process, dice.uniform(0, 0.3))
        dropped += disk.lose_power(dice)
        assert (await run_ok("check", "--database", str(database))).startswith("sound")
        disk.sync_all()
        process = await launch(database, env=disk.env)
    served = await uploaders.check(process.world())
    assert await process.stop() == (0, "")
    assert dropped, "everything was synced before each cut, so the cuts show nothing"
    print(f"{len(uploaders.answered)} files answered, {served} served, {dropped} writes undone")


@trials(3, 20)
async def test_a_backup_during_uploads_has_whole_files(
    launch: Launch, tmp_path: Path, database: DatabaseOption, tries: int
) -> None:
    process = await launch(tmp_path / "chat.db")
    uploaders = await start_uploaders(process)
    world = process.world()
    tasks = uploaders.start(world)
    copies: list[tuple[Path, set[int]]] = []
    for number in range(tries):
        await uploaders.progress(5)
        posted, copy = set(uploaders.posted), tmp_path / f"copy{number}"
        assert "verified" in await run_ok("backup", str(copy), *database)
        copies.append((copy, posted))
    await process.stop(signal.SIGKILL)
    await asyncio.gather(*tasks)
    unfinished = 0
    for copy, posted in copies:
        with contextlib.closing(sqlite3.connect(copy)) as db:
            unfinished += db.execute("SELECT count(*) FROM files WHERE digest IS NULL").fetchone()[0]
            stored = dict(db.execute("SELECT file_id, lower(hex(digest)) FROM files WHERE digest IS NOT NULL"))
        assert {file_id: uploaders.answered[file_id] for file_id in posted}.items() <= stored.items()
        await run_ok("restore", str(copy), *database)
        process = await launch(tmp_path / "chat.db")
        async with process.world() as restored:
            for file_id in posted:
                reply = await restored.call("GET", f"/files/{file_id}", token=uploaders.people[0].token)
                assert hashlib.sha256(reply.body).hexdigest() == uploaders.answered[file_id]
            person = uploaders.people[0]
            reply = await restored.call(
                "POST", f"/channels/{uploaders.place.channel_id}/files?name=x", token=person.token, data=b"new"
            )
            assert reply.body["file_id"] > max(uploaders.answered), "no id is used again"
        await eventually(lambda: no_unfinished_files(tmp_path / "chat.db"), "all that was unfinished is removed")
        assert await process.stop() == (0, "")
        assert "sound" in await run_ok("check", *database)
    print(f"{len(copies)} backups with {unfinished} unfinished uploads, {len(uploaders.answered)} files answered")
    assert unfinished or tries < 5, "no backup was taken during an upload"


# Clients in processes of their own, so that their work delays no measurement. The last argument is the pause after each 64 KiB.
UPLOAD_PROGRAM = """
import http.client, sys, time
host, path, token, size, pause = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
def parts():
    for at in range(0, size, 65536):
        yield bytes([at >> 16 & 255]) * min(65536, size - at)
        time.sleep(pause)
connection = http.client.HTTPConnection(host, timeout=600)
headers = {"Authorization": "Bearer " + token, "Content-Length": str(size)}
connection.request("POST", path, parts(), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""
DOWNLOAD_PROGRAM = """
import hashlib, http.client, sys, time
host, path, token, size, pause = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
connection = http.client.HTTPConnection(host, timeout=600)
connection.request("GET", path, headers={"Authorization": "Bearer " + token})
answer, digest, count = connection.getresponse(), hashlib.sha256(), 0
while part := answer.read(65536):
    digest.update(part)
    count += len(part)
    time.sleep(pause)
print(answer.status, count, digest.hexdigest() == answer.headers["ETag"].strip('"'))
"""


@pytest.mark.parametrize("megabytes", [12, pytest.param(100, marks=pytest.mark.soak)])
async def test_a_large_file_takes_little_memory_and_delays_nobody(launch: Launch, tmp_path: Path, megabytes: int) -> None:
    """It is uploaded and downloaded fast, and downloaded slowly, while other people post."""
    process = await launch(tmp_path / "chat.db", "--file-max", "200")
    world = process.world()
    people = await world.people("ana", "ben", "cyd", "dee")
    ana, posters = people[0], people[1:]
    place = await world.place(*people)
    upload_path = f"/channels/{place.channel_id}/files?name=large"

    async def run_client(program: str, path: str, size: int, pause: float = 0) -> str:
        arguments = (process.url.removeprefix("http://"), path, ana.token, str(size), str(pause))
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", program, *arguments, stdout=asyncio.subprocess.PIPE)
        out, _ = await client.communicate()
        return out.decode()

    async def measure(work: Awaitable[str] | None = None) -> tuple[str, float, int]:
        """Post until the work is done (or for two seconds); return its result, the p99 of a post and the largest memory."""
        seconds: list[float] = []
        task = asyncio.ensure_future(work or asyncio.sleep(2, ""))
        largest = 0

        async def post(person: Person) -> None:
            nonlocal largest
            while not task.done():
                began = time.monotonic()
                await person.post(place.channel_id)
                seconds.append(time.monotonic() - began)
                largest = max(largest, memory(process))
                await asyncio.sleep(0.02)

        await asyncio.gather(*map(post, posters))
        return await task, sorted(seconds)[len(seconds) * 99 // 100], largest

    small = json.loads((await run_client(UPLOAD_PROGRAM, upload_path, 3 << 20)).partition(" ")[2])
    assert (await run_client(DOWNLOAD_PROGRAM, f"/files/{small['file_id']}", 0)).startswith("200")
    _, usual, size = await measure()
    large = megabytes << 20
    uploaded, up, up_size = await measure(run_client(UPLOAD_PROGRAM, upload_path, large))
    status, _, body = uploaded.partition(" ")
    assert (status, json.loads(body)["size"]) == ("201", large)
    path = f"/files/{json.loads(body)['file_id']}"
    downloaded, down, down_size = await measure(run_client(DOWNLOAD_PROGRAM, path, large))
    slowly, slow, slow_size = await measure(run_client(DOWNLOAD_PROGRAM, path, large, 0.01))
    assert downloaded.split() == slowly.split() == ["200", str(large), "True"]
    print(
        f"{megabytes} MiB: upload {(up_size - size) / 2**20:+.1f} MiB, download {(down_size - size) / 2**20:+.1f} MiB, "
        f"slow download {(slow_size - size) / 2**20:+.1f} MiB; p99 of a post {usual * 1000:.1f} ms without, "
        f"{up * 1000:.1f}, {down * 1000:.1f} and {slow * 1000:.1f} ms meanwhile"
    )
    assert max(up_size, down_size, slow_size) - size <= 4 << 20
    assert max(up, down, slow) < bound(0.05)
    await process.stop_well()


# ---- Several processes ----------------------------------------------------------------------------------------------
# Servers with --redis on one database. Redis is killed, frozen, emptied and lied to; servers are killed, frozen and restarted.
# Nothing that was acknowledged is lost, and every client ends with the same copy.


def free_port() -> int:
    with socket_module.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Redis:
    """A Redis server without persistence, which keeps its port when it is restarted."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: asyncio.subprocess.Process

    async def start(self, *options: str) -> None:
        given = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", str(self.port), *options)
        self.process = await asyncio.create_subprocess_exec(
            find_program("redis-server"), *given, stdout=asyncio.subprocess.DEVNULL
        )
        await until(self.answers)

    def answers(self) -> bool:
        assert self.process.returncode is None
        with contextlib.suppress(OSError), socket_module.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def ask(self, *command: str | bytes) -> Any:
        with redis.Redis.from_url(self.url, socket_timeout=PATIENCE) as client:
            return client.execute_command(*command)

    @functools.cached_property  # while the servers reconnect, Redis does not know it
    def channel(self) -> bytes:
        """The name of the channel that the servers use."""
        (name,) = self.ask("PUBSUB", "CHANNELS", "*")
        return bytes(name)

    def tell(self, packet: Any) -> None:
        """Publish a packet to the servers."""
        self.ask("PUBLISH", self.channel, json.dumps(packet))

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest_asyncio.fixture
async def redis_server() -> AsyncIterator[Redis]:
    server = Redis()
    await server.start()
    yield server
    if server.process.returncode is None:
        await server.kill()


@pytest_asyncio.fixture
async def pair(make_world: MakeWorld, redis_server: Redis) -> list[World]:
    """Two servers in this process, on one database."""
    return [await join_redis(make_world, redis_server, name) for name in ("one", "two")]


async def join_redis(make_world: MakeWorld, redis_server: Redis, name: str, **settings: Any) -> World:
    """Start a server that uses Redis, and wait until it hears itself."""
    world = await make_world(redis=redis_server.url, process=name, **settings)
    await until(lambda: world.chat.hub.redis == "up")
    return world


def at(world: World, person: Person) -> Person:
    """Return the same person as a client of another server."""
    return Person(world, person.name, person.user_id, person.token)


class Split(NamedTuple):
    """A server whose members Ana and Ben are connected to different processes."""

    ana: Person
    ben: Person
    place: Place
    ana_socket: Socket
    ben_socket: Socket


@pytest_asyncio.fixture
async def split(pair: list[World]) -> Split:
    one, two = pair
    ana, ben = await one.people("ana", "ben")
    place = await one.place(ana, ben)
    ben = at(two, ben)
    ana_socket = await ana.socket(place.server_id)
    await until(lambda: two.chat.hub.presence.visible(place.server_id) == [ana.user_id])
    ben_socket = await ben.socket(place.server_id)
    await ana_socket.receive("user:connected", user_id=ben.user_id)
    return Split(ana, ben, place, ana_socket, ben_socket)


async def test_presence_is_shared(split: Split) -> None:
    """Each change is emitted once, on both processes, whichever a user's sockets are connected to."""
    server_id, ana, ben = split.place.server_id, split.ana, split.ben
    other_way = at(ana.world, ben)
    ack = await split.ben_socket.ok("join_server", {"server_id": server_id})
    assert ack["connected_users"] == [ana.user_id, ben.user_id]
    members = (await ana.ok("GET", f"/servers/{server_id}/members"))["members"]
    assert [member["connected"] for member in members] == [True, True]
    second = await other_way.socket(server_id)
    await second.close()
    await split.ben_socket.close()
    gone = await split.ana_socket.receive("user:disconnected")
    assert gone["user_id"] == ben.user_id and gone["username"] == "ben"
    changes = [name for name in split.ana_socket.names() if name in ("user:connected", "user:disconnected")]
    assert changes == ["user:connected", "user:connected", "user:disconnected"]  # Ana, Ben, Ben


async def test_conversations_are_shared(split: Split) -> None:
    """Started on both processes at once there is one; what happens in it is emitted on both."""
    ana, ben = split.ana, split.ben
    replies = await asyncio.gather(
        *(
            person.call("POST", "/conversations", {"user_ids": [other.user_id]})
            for person, other in [(ana, ben), (ben, ana)] * 4
        )
    )
    assert sorted(reply.status for reply in replies) == [200] * 7 + [201]
    (server_id,) = {reply.body["server_id"] for reply in replies}
    starter, other = (ana, ben) if 201 in {reply.status for reply in replies[::2]} else (ben, ana)
    sockets = {ana.user_id: split.ana_socket, ben.user_id: split.ben_socket}
    told = await sockets[other.user_id].receive("server:joined")
    assert told == await other.ok("GET", f"/servers/{server_id}")
    for socket in sockets.values():
        await socket.ok("join_server", {"server_id": server_id})
    channel_id, path = told["channels"][0]["channel_id"], f"/servers/{server_id}/members/{other.user_id}"
    message = await starter.post(channel_id)
    assert await sockets[other.user_id].receive("message:new") == message
    await other.ok("DELETE", path)
    assert (await sockets[starter.user_id].receive("member:left"))["user_id"] == other.user_id
    reply = await starter.call("POST", "/messages", {"channel_id": channel_id, "content": "hello?"})
    assert (reply.code, reply.body["reason"]) == ("FORBIDDEN", "LEFT")
    await other.ok("PUT", path)
    assert (await sockets[starter.user_id].receive("member:joined"))["user_id"] == other.user_id
    await starter.post(channel_id)
    for socket in sockets.values():
        await socket.receive_none("server:joined")


async def test_an_invisible_user_is_invisible_on_all_servers(split: Split) -> None:
    server_id, ana, ben = split.place.server_id, split.ana, split.ben
    other_way = at(ana.world, ben)
    await split.ben_socket.ok("typing_start", {"channel_id": split.place.channel_id})
    await split.ana_socket.receive("user:typing", user_id=ben.user_id)
    assert (await ben.call("PATCH", "/users/me", {"status": "invisible"})).status == 200
    await split.ana_socket.receive("typing_stop", user_id=ben.user_id)
    await split.ana_socket.receive("user:disconnected", user_id=ben.user_id)
    second = await other_way.socket(server_id)  # more sockets, here and there, change nothing
    third = await ben.socket(server_id)
    await second.close()
    await split.ben_socket.close()
    await third.close()
    fourth = await ben.socket(server_id)
    await until(lambda: ana.world.chat.hub.presence.has(server_id, ben.user_id, foreign_sid(ana.world)))
    ack = await split.ana_socket.ok("join_server", {"server_id": server_id})
    assert ack["connected_users"] == [ana.user_id]
    await split.ana_socket.receive_none("user:connected", "user:disconnected")
    assert (await other_way.call("PATCH", "/users/me", {"status": "online"})).status == 200
    await split.ana_socket.receive("user:connected", user_id=ben.user_id)
    await fourth.receive("user:connected", user_id=ben.user_id)
    await split.ana_socket.receive_none("user:connected")
    await fourth.close()
    await split.ana_socket.receive("user:disconnected", user_id=ben.user_id)


def foreign_sid(world: World) -> str:
    """Return the name under which a server keeps the users of the only other one."""
    sids = {sid for users in world.chat.hub.presence._online.values() for sids in users.values() for sid in sids}
    (sid,) = filter(chatrtc.is_foreign, sids)
    return sid


async def test_any_server_stores_and_sends_files(split: Split, make_world: MakeWorld, redis_server: Redis) -> None:
    """A file that one server receives can be read on the others, and no other server removes it while it is uploaded."""
    ana, ben, channel_id, one = split.ana, split.ben, split.place.channel_id, split.ana.world
    file = await uploaded(ana, channel_id, FILE_BYTES)
    await ana.post(channel_id, "", files=[file["file_id"]])
    assert (await split.ben_socket.receive("message:new"))["files"] == [file]
    assert (await ben.call("GET", f"/files/{file['file_id']}")).body == FILE_BYTES
    link = await at(one, ben).ok("POST", f"/files/{file['file_id']}/link")
    assert (await ben.world.call("GET", link["url"])).body == FILE_BYTES
    running = await RawUpload.start(ana, channel_id, 3 * chatrtc.PIECE_BYTES)
    await running.send_pieces(one, 2)
    third = await join_redis(make_world, redis_server, "three")  # neither its start nor any maintenance removes the upload
    for world in (one, ben.world, third):
        await world.chat.hub.store.write(chatrtc.remove_unattached_files)
        await chatrtc.run_maintenance(world.chat.hub)
    running.writer.write(os.urandom(chatrtc.PIECE_BYTES))
    status, answer = await running.answer()
    assert (status, answer["size"]) == (201, 3 * chatrtc.PIECE_BYTES)
    message = await at(third, ana).post(channel_id, "", files=[answer["file_id"]])
    running.writer.close()
    await ben.ok("POST", "/auth/logout")
    assert (await one.call("GET", link["url"])).code == "UNAUTHORIZED"
    await at(third, ana).ok("DELETE", f"/messages/{message['message_id']}")
    await until(lambda: stored_now(one) == (1, 1, len(FILE_BYTES)))


async def test_typing_is_shown_on_all_servers(split: Split) -> None:
    channel = {"channel_id": split.place.channel_id}
    await split.ben_socket.ok("typing_start", channel)
    assert (await split.ana_socket.receive("user:typing"))["username"] == "ben"
    await split.ben_socket.ok("typing_stop", channel)
    await split.ana_socket.receive("typing_stop", user_id=split.ben.user_id)
    await asyncio.sleep(chatrtc.TYPING_INTERVAL)
    await split.ben_socket.ok("typing_start", channel)
    await split.ana_socket.receive("user:typing")
    await split.ben.post(split.place.channel_id)
    await split.ana_socket.receive("typing_stop")
    await asyncio.sleep(chatrtc.TYPING_INTERVAL)
    await split.ben_socket.ok("typing_start", channel)
    await split.ana_socket.receive("user:typing")
    await split.ana_socket.receive("typing_stop")  # after three seconds
    await split.ana_socket.receive_none("typing_stop")


async def test_voice_connects_peers_on_all_servers(split: Split) -> None:
    server_id, ana, ben = split.place.server_id, split.ana, split.ben
    voice = {"channel_id": await ana.channel(server_id, "talk", "voice")}
    await split.ben_socket.receive("channel:created")
    mine = (await split.ana_socket.ok("voice:join", voice))["peer_id"]
    assert (await split.ben_socket.receive("voice:join"))["peer_id"] == mine
    joined = await split.ben_socket.ok("voice:join", voice)
    assert [one["peer_id"] for one in joined["participants"]] == [mine]
    await split.ana_socket.receive("voice:join", user_id=ben.user_id)
    data = {"sdp": '\u2028 "quoted"', "n": [1, None]}
    await split.ben_socket.ok("voice:signal", voice | {"to": mine, "data": data})
    signal_ = await split.ana_socket.receive("voice:signal")
    assert signal_["data"] == data and signal_["from"] == joined["peer_id"] and signal_["user_id"] == ben.user_id
    other = await at(ana.world, ben).socket(server_id)  # Ben's other device takes over
    assert len((await other.ok("voice:join", voice))["participants"]) == 1
    await split.ben_socket.receive("voice:leave", peer_id=joined["peer_id"])
    await split.ben_socket.receive("voice:join", user_id=ben.user_id)
    assert (await split.ben_socket.call("voice:signal", voice | {"to": mine, "data": 1}))["reason"] == "NOT_IN_VOICE"
    ack = await split.ben_socket.ok("join_server", {"server_id": server_id})
    assert {peer["user_id"] for peer in ack["voice"]} == {ana.user_id, ben.user_id}
    await other.close()
    await split.ben_socket.receive("voice:leave", user_id=ben.user_id)


SILENCED_BY: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    # what Ana does while Ben types and talks: method, path, body, and what ends
    "a mute": ("PUT", "/servers/{server}/members/{ben}/mute", {}, ("typing_stop", "voice:leave")),
    "a read-only channel": ("PATCH", "/channels/{text}", {"posting": "staff"}, ("typing_stop",)),
    "a read-only voice channel": ("PATCH", "/channels/{voice}", {"posting": "staff"}, ("voice:leave",)),
    "a lower role": ("PATCH", "/servers/{server}/members/{ben}", {"role": "member"}, ("typing_stop", "voice:leave")),
    "a ban": ("PUT", "/servers/{server}/bans/{ben}", {}, ("typing_stop", "voice:leave")),
}


@pytest.mark.parametrize("what", SILENCED_BY)
async def test_typing_and_calls_end_when_they_are_no_longer_allowed(split: Split, what: str) -> None:
    """At once, on both servers. Ana's own go on."""
    ana, ben, place = split.ana, split.ben, split.place
    voice = await ana.channel(place.server_id, "talk", "voice")
    ids = {"server": place.server_id, "ben": ben.user_id, "text": place.channel_id, "voice": voice}
    if what == "a lower role":
        await ana.ok("PATCH", "/servers/{server}/members/{ben}".format(**ids), {"role": "admin"})
        for channel_id in (place.channel_id, voice):
            await ana.ok("PATCH", f"/channels/{channel_id}", {"posting": "staff"})
    sockets = [(split.ana_socket, split.ben_socket), (split.ben_socket, split.ana_socket)]
    await split.ben_socket.receive("channel:created")
    for socket, other in sockets:
        await socket.ok("voice:join", {"channel_id": voice})
        await other.receive("voice:join")
    for socket, other in sockets:
        await socket.ok("typing_start", {"channel_id": place.channel_id})
        await other.receive("user:typing")
    method, path, body, ended = SILENCED_BY[what]
    assert (await ana.call(method, path.format(**ids), body)).status < 300
    began = time.monotonic()
    for event in ended:
        await split.ana_socket.receive(event, user_id=ben.user_id)
    assert time.monotonic() - began < bound(1)
    for world in (ana.world, ben.world):
        peers = world.chat.hub.voice_peers
        expected = {ana.user_id} if "voice:leave" in ended else {ana.user_id, ben.user_id}
        await until(lambda peers=peers, expected=expected: {one.notice.user_id for one in peers.values()} == expected)
    for socket, _ in sockets:
        await socket.receive_none("voice:leave", user_id=ana.user_id)
    for event, channel_id in (("typing_stop", place.channel_id), ("voice:leave", voice)):
        attempt = {"typing_stop": "typing_start", "voice:leave": "voice:join"}[event]
        ack = await split.ben_socket.call(attempt, {"channel_id": channel_id})
        assert ack.get("reason") == (
            {"a mute": "MUTED", "a ban": "NOT_MEMBER"}.get(what, "READ_ONLY") if event in ended else None
        )


async def test_rules_hold_on_all_servers(split: Split) -> None:
    """Slow mode and mutes are in the database, which the servers share."""
    ana, ben, message = split.ana, split.ben, {"channel_id": split.place.channel_id, "content": "hello"}
    await ana.ok("PATCH", f"/channels/{split.place.channel_id}", {"slow_seconds": 600})
    await split.ben_socket.ok("message:send", message)
    other_way = at(ana.world, ben)
    assert (await other_way.call("POST", "/messages", message)).body["reason"] == "SLOW_MODE"
    mute = f"/servers/{split.place.server_id}/members/{ben.user_id}/mute"
    await ana.ok("PUT", mute)
    await split.ben_socket.receive("member:updated")
    assert (await split.ben_socket.call("message:send", message))["reason"] == "MUTED"
    await ana.ok("DELETE", mute)
    assert (await split.ben_socket.call("message:send", message))["reason"] == "SLOW_MODE"


async def hands_of(person: Person, server_id: int) -> list[int]:
    """Return whose hands are raised, in order, as a new socket of this person learns it."""
    socket = await person.world.socket(person.token)
    hands = (await socket.ok("join_server", {"server_id": server_id})).get("hands", [])
    await socket.close()
    return [hand["user_id"] for hand in hands]


async def test_hands_are_raised_on_all_servers(split: Split, make_world: MakeWorld, redis_server: Redis) -> None:
    """In the same order. A server that starts later, or that missed something, asks the others."""
    ana, ben, server = split.ana, split.ben, {"server_id": split.place.server_id}
    await split.ben_socket.ok("hand:raise", server)
    raised = await split.ana_socket.receive("hand:raised")
    await split.ana_socket.ok("hand:raise", server)
    assert raised == server | {"user_id": ben.user_id, "username": "ben", "at": raised["at"]}
    await split.ben_socket.receive("hand:raised", user_id=ana.user_id)
    third = await join_redis(make_world, redis_server, "three")
    await until(lambda: len(third.chat.hub.hands) == 2)
    for world in (ana.world, ben.world, third):
        assert await hands_of(at(world, ana), split.place.server_id) == [ben.user_id, ana.user_id]
    ben.world.chat.hub.reconnect_all()  # as if it had missed events
    await until(lambda: len(ben.world.chat.hub.hands) == 2)
    await split.ana_socket.ok("hand:lower", server | {"user_id": ben.user_id})
    await until(lambda: all(world.chat.hub.hands.keys() == {(1, ana.user_id)} for world in (ana.world, ben.world, third)))


async def test_a_hand_survives_a_reconnect_to_another_server(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner has ten seconds, and keeps the place. When they have gone from all servers, it is lowered on all."""
    monkeypatch.setattr(chatrtc, "HAND_SECONDS", 1.0)
    ana, ben, server = split.ana, split.ben, {"server_id": split.place.server_id}
    hubs, heard = [world.chat.hub for world in (ana.world, ben.world)], list[str]()
    for world in (ana.world, ben.world):

        @world.chat.on("hand:lowered")
        async def listen(payload: Any) -> None:
            heard.append(payload["username"])

    await split.ben_socket.ok("hand:raise", server)
    await split.ana_socket.ok("hand:raise", server)
    await split.ben_socket.close()
    await split.ana_socket.receive("user:disconnected")
    moved = await at(ana.world, ben).socket(split.place.server_id)
    await until(lambda: all(hub.presence.is_connected(1, ben.user_id) and not hub._hand_timers for hub in hubs))
    assert await hands_of(ana, split.place.server_id) == [ben.user_id, ana.user_id]
    await moved.close()
    await split.ana_socket.receive("hand:lowered", user_id=ben.user_id)
    await until(lambda: all(hub.hands.keys() == {(1, ana.user_id)} for hub in hubs))
    await until(lambda: heard == ["ben"])


async def test_a_voice_channel_is_full_on_all_servers(make_world: MakeWorld, redis_server: Redis) -> None:
    one, two = [await join_redis(make_world, redis_server, name, voice_max=2) for name in ("one", "two")]
    people = await one.people("ana", "ben", "cy")
    place = await one.place(*people)
    voice = {"channel_id": await people[0].channel(place.server_id, "talk", "voice")}
    sockets = [await at(world, person).socket(place.server_id) for world, person in zip((one, one, two), people, strict=True)]
    for socket in sockets[:2]:
        await socket.ok("voice:join", voice)
        await sockets[2].receive("voice:join")
    assert (await sockets[2].call("voice:join", voice))["reason"] == "VOICE_FULL"
    await sockets[1].ok("voice:leave", voice)
    await sockets[2].receive("voice:leave")
    await sockets[2].ok("voice:join", voice)


async def test_failed_sign_ins_are_counted_on_all_servers(make_world: MakeWorld, redis_server: Redis) -> None:
    """Only failures are announced: a right password is not counted anywhere."""
    one, two = [await join_redis(make_world, redis_server, name, no_rate_limit=False) for name in ("one", "two")]
    await one.person("ana")
    burst = int(chatrtc.LIMITS["login"].burst)
    for _ in range(burst + 1):
        assert (await one.sign_in("ana")).status == 200
    table = two.chat.hub.limiter._tables["login"]
    for _ in range(burst):
        assert (await one.sign_in("ana", "wrong wrong")).code == "UNAUTHORIZED"
    await until(
        lambda: bool(table) and two.chat.hub.limiter._bucket("login", ("ana", "127.0.0.1"), 0.0)[1] > time.monotonic() + 50
    )
    assert (await two.sign_in("ana", "wrong wrong")).code == "RATE_LIMITED"
    code = {"code": "nocode", "name": "Guest"}
    assert (await one.call("POST", "/auth/guest", code)).code == "NOT_FOUND"
    await until(lambda: "127.0.0.1" in two.chat.hub.limiter._tables["invite"])
    assert "127.0.0.1" in two.chat.hub.limiter._tables["register"]  # Ana's account


HOSTILE_ENTRIES = {
    "a user who does not exist": ["Change", "user:connected", 1, 999],
    "a user who is not a member": ["Change", "user:connected", 1, 3],
    "a server that does not exist": ["Change", "user:connected", 999, 1],
    "an id of zero": ["Change", "user:connected", 0, 1],
    "an id that is too large": ["Change", "user:connected", 1, 2**63],
    "a text as an id": ["Change", "user:connected", "1", 1],
    "a list without a beginning": ["Hello", "last", [[1, 1]], []],
    "a list that is too long": ["Hello", "first", [[1, 2]] * 1000, []],
    "a user who types but is not connected": ["Change", "user:typing", 1, 3],
    "typing in no channel": ["Change", "user:typing", 999, 2],
    "a peer who is not connected": ["Change", "voice:join", 2, 3, "peer"],
    "a peer with a long id": ["Change", "voice:join", 2, 2, "p" * 1000],
    "a signal from nobody": ["Signal", "nobody", "peer", "{}"],
    "a signal that is not JSON": ["Signal", "nobody", "peer", "["],
    "an unknown limit": ["Counted", "posts", ["ana"]],
    "a limit by user": ["Counted", "post", ["1"]],
    "a key of another form": ["Counted", "login", ["ana"]],
    "a hand of a user who is not a member": ["Hello", "first", [], [], [[1, 3, "2026-01-01T00:00:00Z"]]],
    "a hand at no time": ["Hello", "first", [], [], [[1, 2, "soon"]]],
    "an unknown kind": ["Drop", "everything"],
    "another event": ["Change", "message:new", 1, 2],
    "no kind": [],
}
HOSTILE_PACKETS = [b"", b"[]", b"null", b"\xff" * 100, b"[" * 100_000, b"x" * (33 << 20), b'["a b",1,[]]', b'["liar",-1,[]]']


async def test_messages_of_a_hostile_redis_change_nothing(split: Split, redis_server: Redis) -> None:
    """Control: a well-formed lie about a member is believed."""
    dee = await split.ana.world.person("dee")
    hub, server_id = split.ana.world.chat.hub, split.place.server_id
    assert (server_id, split.ben.user_id, dee.user_id) == (1, 2, 3)
    voice = await split.ana.channel(server_id, "talk", "voice")
    before = hub.presence.users_of(), hub.presence.visible(server_id), len(hub.limiter._tables["login"])
    channel = redis_server.channel
    for number, entry in enumerate(HOSTILE_ENTRIES.values()):
        redis_server.tell(["liar", number + 1, [entry]])
    for packet in HOSTILE_PACKETS:
        redis_server.ask("PUBLISH", channel, packet)
    await until(lambda: len(redis_server.ask("PUBSUB", "CHANNELS")) == 1)  # Redis cuts who is sent 33 MB

    def is_believed() -> bool:  # told again and again, because the server may just be reconnecting
        redis_server.tell(["liar", 1, [["Change", "user:connected", server_id, split.ben.user_id]]])
        return hub.presence.has(server_id, split.ben.user_id, "@liar/")

    await until(is_believed, 30)
    assert (hub.presence.users_of(), hub.presence.visible(server_id), len(hub.limiter._tables["login"])) == before
    assert not hub.typing_tracker and not hub.voice_peers and not hub.hands and voice
    assert len(split.ana.world.chat.hub.sio.manager.rooms) < 10
    for name in ("user:connected", "user:disconnected", "user:typing", "voice:join", "voice:signal"):
        await split.ana_socket.receive_none(name)
    await until(lambda: not hub.presence.has(server_id, split.ben.user_id, "@liar/"), 30)  # which is silent
    for number in range(1000):
        redis_server.tell([f"liar-{number}", 0, [["Notice", "beat"], ["Notice", "want"]]])
    assert hub.presence.visible(server_id) == before[1]
    await until(lambda: hub.redis == "up")


async def test_missed_messages_are_repaired(split: Split, redis_server: Redis) -> None:
    """While the connections to Redis are cut, users come and go. Afterwards both servers agree."""
    server_id, one, two = split.place.server_id, split.ana.world, split.ben.world
    others = await one.people(*(f"user{n}" for n in range(8)))
    code = await split.ana.invite(server_id)
    for person in others:
        await person.ok("POST", f"/invites/{code}")
    for person in others[:4]:
        await at(two, person).socket(server_id)
    await until(lambda: len(one.chat.hub.presence.visible(server_id)) == 6)
    redis_server.ask("CLIENT", "KILL", "TYPE", "normal")
    for socket in two.sockets[1:5]:
        await socket.close()
    redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
    for person in others[4:]:
        await at(two, person).socket(server_id)
    expected = sorted([split.ana.user_id, split.ben.user_id, *(person.user_id for person in others[4:])])
    await until(lambda: one.chat.hub.presence.visible(server_id) == expected)
    await until(lambda: two.chat.hub.presence.visible(server_id) == expected)


async def test_a_server_that_stops_says_good_bye(launch: Launch, tmp_path: Path, redis_server: Redis) -> None:
    options = ("--redis", redis_server.url)
    one, two = [await launch(tmp_path / "chat.db", *options) for _ in range(2)]
    world = one.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    socket = await ana.socket(place.server_id)
    await at(two.world(), ben).socket(place.server_id)
    await socket.receive("user:connected", user_id=ben.user_id)
    await two.stop_well()
    began = time.monotonic()
    await socket.receive("user:disconnected", user_id=ben.user_id)
    assert time.monotonic() - began < 1
    await one.stop_well()


async def test_redis_that_is_away_is_reported(
    make_world: MakeWorld, redis_server: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.ask("CONFIG", "SET", "requirepass", "s3cret")
    redis_server.url = f"redis://:s3cret@127.0.0.1:{redis_server.port}"
    world = await join_redis(make_world, redis_server, "one")
    assert (await world.call("GET", "/healthz")).body["redis"] == "up"
    redis_server.freeze()
    await until(lambda: world.chat.hub.redis == "down")
    assert (await world.call("GET", "/healthz")).status == 200
    ana = await world.person("ana")
    place = await world.place(ana)
    socket = await ana.socket(place.server_id)
    await socket.ok("typing_start", {"channel_id": place.channel_id})
    redis_server.thaw()
    await until(lambda: world.chat.hub.redis == "up")
    await redis_server.kill()
    await until(lambda: world.chat.hub.redis == "down")
    assert (await world.call("GET", "/healthz")).body == {"status": "ok", "version": chatrtc.__version__, "redis": "down"}
    await asyncio.sleep(2)
    lines = [record.getMessage() for record in caplog.records if "edis" in record.getMessage()]
    assert 1 <= len(lines) <= 2 and "s3cret" not in "".join(lines)
    await redis_server.start("--requirepass", "s3cret")
    await until(lambda: world.chat.hub.redis == "up")


async def test_without_redis_nothing_of_it_shows(world: World) -> None:
    assert "redis" not in (await world.call("GET", "/healthz")).body
    assert len((await world.socket()).client.eio.sid) == 20  # without a prefix


async def test_session_ids_begin_with_the_name_of_the_process(pair: list[World]) -> None:
    for name, world in zip(("one", "two"), pair, strict=True):
        for transport in ("polling", "websocket"):
            socket = await world.socket(transports=[transport])
            assert socket.client.eio.sid.startswith(f"{name}-")


@pytest.mark.parametrize("secret", [None, SECRET])
async def test_chats_on_one_redis_do_not_hear_each_other(
    make_world: MakeWorld, redis_server: Redis, tmp_path: Path, secret: str | None
) -> None:
    """Not even if they have the same secret. Control: a third server, which has the database of the second, hears it."""
    one, two, third = [
        await join_redis(make_world, redis_server, name, database=str(tmp_path / database), secret=secret)
        for name, database in (("one", "one.db"), ("two", "two.db"), ("three", "two.db"))
    ]
    for world in (one, two):
        ana = await world.person("ana")
        await world.place(ana)
    await ana.socket(1)
    await until(lambda: third.chat.hub.presence.visible(1) == [1])
    assert one.chat.hub.presence.visible(1) == []


WRONG_REDIS_URLS = [
    "", "localhost", "http://localhost:6379", "redis://", "redis://:s3cret@", "redis://:s3cret@host:99999", "redis://host/name",
    "redis://:s3cret@host?db=x", "unix://:s3cret@socket", "redis://:s3 cret@host", "redis://:s3/cret@host", "redis://host\n",
]  # fmt: skip


@pytest.mark.parametrize("url", WRONG_REDIS_URLS)
async def test_a_wrong_redis_url_is_refused(tmp_path: Path, url: str) -> None:
    ended = await run_command("serve", "--port", "0", "--database", str(tmp_path / "chat.db"), "--redis", url)
    expect_error(ended, "--redis")
    assert "s3cret" not in ended.err and "cret@" not in ended.err


async def test_redis_is_an_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['redis'] = None; import chatrtc; chatrtc.main()"
    serve = ("serve", "--port", "0", "--database", str(tmp_path / "chat.db"), "--redis", "redis://:s3cret@localhost")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *serve, cwd=HERE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    expect_error(Finished(process.returncode or 0, out.decode(), err.decode()), "pip install 'chatrtc[redis]'")
    expect_error(
        await run_command("serve", "--database", str(tmp_path / "chat.db"), "--process", "one"), "--process", "--redis"
    )


async def test_redis_may_need_tls_and_a_password(make_world: MakeWorld, tmp_path: Path) -> None:
    pem = chatrtc.self_signed(tmp_path / "redis")
    tls = ("--port", "0", "--tls-auth-clients", "no", "--tls-cert-file", pem, "--tls-key-file", pem, "--requirepass", "s3cret")
    server = Redis()
    await server.start("--tls-port", str(server.port), *tls)
    try:
        server.url = f"rediss://:s3cret@127.0.0.1:{server.port}?ssl_ca_certs={pem}"
        world = await join_redis(make_world, server, "one")
        untrusted = await make_world(redis=server.url.partition("?")[0], database=str(tmp_path / "other.db"))
        assert (await untrusted.call("GET", "/healthz")).body["redis"] == "down"
        assert (await world.call("GET", "/healthz")).body["redis"] == "up"
    finally:
        await server.kill()


class Group:
    """Servers with --redis on one database, by the names of their processes."""

    def __init__(self, launch: Launch, database: Path, redis_server: Redis) -> None:
        self.launch, self.database, self.redis = launch, database, redis_server
        self.servers: dict[str, Server] = {}
        self.worlds: dict[str, World] = {}

    async def start(self, *names: str, port: int = 0, prefix: tuple[str, ...] = ()) -> None:
        """Start these servers together."""
        shared = ("--redis", self.redis.url, "--port", str(port))
        starting = (self.launch(self.database, *shared, "--process", name, prefix=prefix) for name in names)
        for name, server in zip(names, await asyncio.gather(*starting), strict=True):
            self.servers[name], self.worlds[name] = server, server.world()

    async def kill(self, name: str) -> None:
        """Kill a server. Nobody begins a request to it any more."""
        del self.worlds[name]
        await self.servers.pop(name).stop(signal.SIGKILL)

    async def freeze(self, name: str) -> None:
        """Suspend a server; not while it has the turn to write, which would suspend the others as well."""
        with contextlib.closing(chatrtc.Turn(self.database)) as turn:
            for _ in range(20):
                self.servers[name].process.send_signal(signal.SIGSTOP)
                with contextlib.suppress(AssertionError):
                    await until(turn.try_acquire, 0.5)
                    return
                self.thaw(name)
        pytest.fail(f"{name} always has the turn")

    def thaw(self, name: str) -> None:
        self.servers[name].process.send_signal(signal.SIGCONT)

    def on(self, name: str, person: Person) -> Person:
        """Return the same person as a client of this server."""
        return Person(self.worlds[name], person.name, person.user_id, person.token)

    def any(self, person: Person) -> Person:
        """Return the same person as a client of a server that runs."""
        return self.on(next(iter(self.worlds)), person)

    async def redis_is(self, state: str) -> None:
        """Wait until all servers report this state of Redis."""

        async def reported() -> bool:
            replies = [await world.call("GET", "/healthz") for world in self.worlds.values()]
            assert {reply.status for reply in replies} == {200}
            return {reply.body["redis"] for reply in replies} == {state}

        await eventually(reported, f"redis: {state}")

    async def connected(self, person: Person, server_id: int, expected: set[int]) -> None:
        """Wait until every server reports that exactly these users are connected."""

        async def reported() -> bool:
            found = [
                {member["user_id"] for member in reply.body["members"] if member["connected"]}
                for world in self.worlds.values()
                for reply in [await world.call("GET", f"/servers/{server_id}/members", token=person.token)]
            ]
            return all(users == expected for users in found)

        await eventually(reported, f"connected: {sorted(expected)}", bound(8))

    async def stop_well(self) -> None:
        """Stop all servers: each with status 0, without a traceback and with a short log. Check the database."""
        await asyncio.gather(*(server.stop_well() for server in self.servers.values()))
        assert (await run_ok("check", "--database", str(self.database))).startswith("sound")


@pytest.fixture
def group(launch: Launch, tmp_path: Path, redis_server: Redis) -> Group:
    return Group(launch, tmp_path / "chat.db", redis_server)


# 1. The storm.


class Storm:
    """People who post, edit, delete and react, each time on any of the servers, and what was acknowledged to them."""

    def __init__(self, group: Group, place: Place, dice: random.Random) -> None:
        self.group, self.place, self.dice = group, place, dice
        self.texts: dict[int, str] = {}  # message -> its text
        self.answered: dict[int, float] = {}  # message -> when its 201 came
        self.seconds: list[float] = []  # from a post to its answer
        self.failed: list[Reply] = []
        self.running = True
        self.number = 0

    async def request(self, person: Person, method: str, path: str, body: Any = None) -> Reply:
        """Send the request to another server, as long as it dies instead of answering."""
        while True:
            world = self.dice.choice(list(self.group.worlds.values()))
            began = time.monotonic()
            try:
                reply = await world.call(method, path, body, token=person.token)
            except GONE:
                await asyncio.sleep(0.01)
                continue
            self.seconds += [time.monotonic() - began] if path == "/messages" else []
            self.failed += [reply] if reply.status >= 500 else []
            return reply

    async def write(self, person: Person) -> None:
        mine: list[int] = []
        while self.running:
            await asyncio.sleep(self.dice.uniform(0, 0.1))
            what = self.dice.random()
            self.number += 1
            text = f"text {self.number}"
            if what < 0.55 or not mine:
                body = {"channel_id": self.place.channel_id, "content": text, "nonce": text}
                reply = await self.request(person, "POST", "/messages", body)
                assert reply.status == 201, reply
                mine.append(reply.body["message_id"])
                self.answered[mine[-1]] = time.monotonic()
                self.texts[mine[-1]] = text
            elif what < 0.7:
                edited = self.dice.choice(mine)
                assert (await self.request(person, "PATCH", f"/messages/{edited}", {"content": text})).status == 200
                self.texts[edited] = text
            elif what < 0.8:
                deleted = mine.pop(self.dice.randrange(len(mine)))
                assert (await self.request(person, "DELETE", f"/messages/{deleted}")).status in (204, 404)
                del self.texts[deleted]
            else:
                method = self.dice.choice(("PUT", "PUT", "DELETE"))
                target = f"/messages/{self.dice.choice(list(self.texts))}/reactions/{self.dice.choice('✓✗')}"
                assert (await self.request(person, method, target)).status in (204, 404)

    @contextlib.asynccontextmanager
    async def writing(self, people: list[Person]) -> AsyncIterator[None]:
        """Let these people write in the body, and finish what they have begun."""
        self.running = True
        tasks = [asyncio.create_task(self.write(person)) for person in people]
        try:
            yield
        finally:
            self.running = False
            await asyncio.gather(*tasks)

    async def settle(self, owner: Person, name: str, clients: list[StormClient]) -> None:
        """Rename the server, wait until these clients know it, and compare their copies with the history."""
        server = f"/servers/{self.place.server_id}"
        assert (await self.request(owner, "PATCH", server, {"name": name})).status == 200
        for client in clients:
            await eventually(functools.partial(client.knows, name), f"{client.person.name} knows the name {name}")
        world = self.dice.choice(list(self.group.worlds.values()))
        stored = {one["message_id"]: one for one in await server_history(world, self.place.server_id, owner.token)}
        assert {message_id: message["content"] for message_id, message in stored.items()} == self.texts
        assert [client.person.name for client in clients if client.messages != stored] == []


class StormClient(Replica):
    """A client in a storm, which connects to another server when its own dies."""

    def __init__(self, person: Person, storm: Storm) -> None:
        super().__init__(person, storm.place.server_id, page=500)
        self.storm = storm
        self.server = ""  # the name of the server that it is connected to
        self.late: list[float] = []  # seconds from the 201 of a message to its receipt
        self.ready = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def stay(self) -> None:
        """Be connected to some server until the task is cancelled."""
        while True:
            self.server = self.storm.dice.choice(list(self.storm.group.worlds))
            self.person = self.storm.group.on(self.server, self.person)
            known, is_back = set(self.messages), self.socket is not None
            try:
                await asyncio.wait_for(self.connect(), 5)
            except (*GONE, socketio.exceptions.SocketIOError):
                await asyncio.sleep(0.01)
                continue
            now = time.monotonic()
            if is_back:
                self.late += [now - self.storm.answered.get(message_id, now) for message_id in set(self.messages) - known]
            self.ready.set()
            assert self.socket is not None
            await self.socket.closed.wait()
            self.ready.clear()
            self.measure()

    async def begin(self) -> None:
        self.task = asyncio.create_task(self.stay())
        await asyncio.wait_for(self.ready.wait(), PATIENCE)

    async def leave(self) -> None:
        """Disconnect until the next `begin`."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.measure()
        self.ready.clear()
        await self.disconnect()

    async def knows(self, name: str) -> bool:
        await self.ready.wait()
        await self.receive()
        return self.name == name

    def measure(self) -> None:
        """Note how late its messages came."""
        assert self.socket is not None
        for (event, payload), at in zip(self.socket.received, self.socket.received_at, strict=True):
            if event == "message:new" and payload["message_id"] in self.storm.answered:
                self.late.append(max(0.0, at - self.storm.answered[payload["message_id"]]))


def at_share(seconds: Sequence[float], share: float) -> float:
    """Return the milliseconds within which this share of the durations lies."""
    return sorted(seconds)[int(len(seconds) * share)] * 1000


async def expect_last(socket: Socket, event: str, **fields: Any) -> None:
    """Check that nothing follows the first event of this name with these fields, which is missing only if the socket closed."""
    if not socket.closed.is_set():
        await socket.receive(event, **fields)
        await socket.call("ping")
    matches = [name == event and fields.items() <= payload.items() for name, payload in socket.received]
    assert not any(matches) or matches.index(True) == len(matches) - 1, socket.received[matches.index(True) :]


async def cause_fault(kind: str, group: Group, seconds: float, dice: random.Random) -> None:
    match kind:
        case "Redis killed":
            await group.redis.kill()
            await asyncio.sleep(seconds)
            await group.redis.start()
        case "Redis frozen":
            group.redis.freeze()
            await asyncio.sleep(seconds)
            group.redis.thaw()
        case "Redis emptied":
            await asyncio.sleep(seconds / 2)
            group.redis.ask("FLUSHALL")
            await asyncio.sleep(seconds / 2)
        case "a server killed":
            name = dice.choice(list(group.worlds))
            await group.kill(name)
            await asyncio.sleep(seconds)
            await group.start(name)


STORM_FAULTS = ("Redis killed", "Redis frozen", "Redis emptied", "a server killed")


@trials(8, 80)
async def test_a_storm_leaves_every_copy_equal_to_the_history(group: Group, tries: int) -> None:
    """Twenty clients on three servers; six of them write, and one more is banned in each round."""
    dice = random.Random(11)
    await group.start("a", "b", "c")
    people = await group.worlds["a"].people(*(f"user{number}" for number in range(20)))
    owner, victim = people[0], await group.worlds["a"].person("victim")
    place = await group.worlds["a"].place(*people)
    code, server = await owner.invite(place.server_id), f"/servers/{place.server_id}"
    storm = Storm(group, place, dice)
    clients = [StormClient(person, storm) for person in people]
    away = clients
    for number in range(tries):
        kind = STORM_FAULTS[number % len(STORM_FAULTS)]
        await asyncio.gather(*(client.begin() for client in away))
        assert (await storm.request(victim, "POST", f"/invites/{code}")).status == 201
        listener = await group.on(dice.choice(list(group.worlds)), victim).socket(place.server_id)
        async with storm.writing(people[:6]):
            fault = asyncio.create_task(cause_fault(kind, group, dice.uniform(0.3, 3 if SOAK else 0.8), dice))
            await asyncio.sleep(dice.uniform(0.1, 0.3))
            assert (await storm.request(owner, "PUT", f"{server}/bans/{victim.user_id}")).status == 204
            away = dice.sample(clients[6:], 2)
            await asyncio.gather(*(client.leave() for client in away))
            await fault
        present = [client for client in clients if client not in away]
        await storm.settle(owner, f"round {number}", present)
        await expect_last(listener, "member:left", user_id=victim.user_id)
        await group.connected(group.any(owner), place.server_id, {client.person.user_id for client in present})
        assert (await storm.request(owner, "DELETE", f"{server}/bans/{victim.user_id}")).status == 204
    await asyncio.gather(*(client.begin() for client in away))
    await storm.settle(owner, "the end", clients)
    for name in group.worlds:
        state = await server_state(group.on(name, owner), place.server_id)
        assert [client.person.name for client in clients if client.state() != state] == []
    await asyncio.gather(*(client.leave() for client in clients))
    late = sorted(itertools.chain(*(client.late for client in clients)))
    print(
        f"{tries} faults, {len(storm.answered)} posts, {clients[0].seq} changes, {len(late)} receipts: at most"
        f" {late[-1] * 1000:.0f} ms after the 201, 99 % within {at_share(late, 0.99):.0f} ms; posts took at most"
        f" {max(storm.seconds) * 1000:.0f} ms, 99 % {at_share(storm.seconds, 0.99):.0f} ms"
    )
    assert storm.failed == []
    assert sum(client.requests for client in clients) == 0, "a client saw a gap"
    assert late[-1] < bound(2)
    await group.stop_well()


# 2. Revocation reaches the sockets of all servers.


class DistantCase(RevocationCase):
    """A case in which the requests are made on one server, and the sockets are on another."""

    def __init__(self, group: Group, place: Place, owner: Person, member: Person, witness: Person) -> None:
        self.place, self.owner, self.member, self.witness = place, owner, member, witness
        self.database = group.database

    async def admin(self, name: str) -> None:
        assert name == "delete_user"
        await run_ok("user", "delete", self.member.name, "--yes", "--database", str(self.database))


async def revoke_elsewhere(group: Group, kind: str, number: int) -> tuple[float, float]:
    """Revoke a right on one server while the sockets are on another. Return the seconds from the answer to the last event
    that a socket still received, and until the sockets were closed."""
    revoke, closes = REVOCATIONS[kind]
    name = f"{kind.replace(' ', '-')}.{number}"
    owner, witness, member = await group.worlds["a"].people(f"{name}.owner", f"{name}.witness", f"{name}.member")
    place = await group.worlds["a"].place(owner, witness, member)
    spare = await owner.channel(place.server_id, "spare")
    hearing, frozen, looking = [await Wire.join(group.on("b", one), place) for one in (member, member, witness)]
    hearing.listen()
    looking.listen()
    async with posting(owner, place.channel_id, 0.05) as taken:
        await until(lambda: len(taken) > 3 and len(hearing.received) > 3)
        await revoke(DistantCase(group, place, owner, member, witness))
        answered = time.monotonic()
        closed = await until(lambda: not (hearing.open() or frozen.open()), bound(1)) if closes else 0.0
        if kind == "deleted server":
            await until(lambda: [event for _, event, _ in hearing.received][-1] == "server:deleted")
        else:
            after = await owner.post(spare, "after")
            await until(lambda: any(payload == after for _, _, payload in looking.received))
    if not closes:
        await hearing.say('421["ping"]')
        await until(lambda: 1 in hearing.acks)
        assert hearing.open()
    events = [payload for _, _, payload in hearing.received]
    if kind == "deleted channel":  # the socket hears the rest of the server, but nothing more of this channel
        assert after in events
        of_channel = [event for _, event, payload in hearing.received if payload.get("channel_id") == place.channel_id]
        assert of_channel.index("channel:deleted") == len(of_channel) - 1
    elif kind != "deleted server":
        assert after not in events
    late = [at - answered for at, event, payload in hearing.received if payload.get("channel_id") == place.channel_id]
    return max(late), closed


@pytest.mark.parametrize("state", ["up", "down", "frozen"])
@trials(1, 10)
async def test_revocation_reaches_sockets_on_other_servers(group: Group, state: str, tries: int) -> None:
    await group.start("a", "b")
    if state == "down":
        await group.redis.kill()
    elif state == "frozen":
        group.redis.freeze()
    latest = slowest = 0.0
    for number in range(tries):
        kinds = [kind for kind in REVOCATIONS if kind != "expiry"]
        found = await asyncio.gather(*(revoke_elsewhere(group, kind, number) for kind in kinds))
        latest, slowest = max(latest, *(late for late, _ in found)), max(slowest, *(closed for _, closed in found))
    await group.redis_is("up" if state == "up" else "down")
    print(f"Redis {state}: {tries} times, last event {latest * 1000:.0f} ms after, closed within {slowest * 1000:.0f} ms")
    assert latest < bound(1)
    await group.stop_well()


# 3. Presence survives the death of servers and of Redis.


@pytest.mark.parametrize("fault", ["a killed server", "a server and Redis killed", "Redis away"])
@trials(1, 7)
async def test_presence_has_no_ghosts_on_other_servers(group: Group, fault: str, tries: int) -> None:
    """Five users are on one server, another one on both; a socket on the other server hears who comes and goes."""
    await group.start("a", "b")
    people = await group.worlds["a"].people(*(f"user{number}" for number in range(7)))
    place = await group.worlds["a"].place(*people)
    *crowd, both, witness = people
    ids = sorted(person.user_id for person in crowd)
    await group.on("b", both).socket(place.server_id)
    looking = await group.on("b", witness).socket(place.server_id)
    await looking.receive("user:connected", user_id=witness.user_id)
    slowest = 0.0

    def told(event: str) -> list[int]:
        return sorted(payload["user_id"] for name, payload in looking.received if name == event)

    for _ in range(tries):
        looking.received.clear()
        looking._read = 0
        for person in (*crowd, both):
            await group.on("a", person).socket(place.server_id)
        await until(lambda: told("user:connected") == ids)
        began = time.monotonic()
        if fault == "Redis away":
            await group.redis.kill()
            await asyncio.sleep(8 if SOAK else 4)
            await group.freeze("a")
            await group.redis.start()
            await asyncio.sleep(1.5)  # meanwhile the other server hears Redis again, but not yet the frozen one
            group.thaw("a")
            await group.redis_is("up")
            await asyncio.sleep(4 if SOAK else 1)  # a beat is missed after three seconds, if at all
            await asyncio.gather(*(socket.close() for socket in group.worlds["a"].sockets))  # the control
        else:
            if fault == "a server and Redis killed":
                await group.redis.kill()
            await group.kill("a")
            if fault == "a server and Redis killed":
                await asyncio.sleep(2)
                await group.redis.start()
            assert told("user:disconnected") == []
        await until(lambda: told("user:disconnected") == ids)
        slowest = max(slowest, time.monotonic() - began)
        await group.connected(group.on("b", witness), place.server_id, {both.user_id, witness.user_id})
        assert (told("user:connected"), told("user:disconnected")) == (ids, ids)
        if fault != "Redis away":
            await group.start("a")
    print(f"{fault}: {tries} times, everybody gone after at most {slowest:.1f} s")
    assert fault == "Redis away" or slowest < bound(4 if fault == "a killed server" else 8)
    await group.stop_well()


# 4. A server that was frozen for longer than the log is kept.


@trials(2, 20)
async def test_a_server_frozen_for_too_long_disconnects_its_clients(group: Group, tries: int) -> None:
    """With a log of 64 rows: after five commits its clients notice nothing, after a hundred they reconnect with `after`."""
    await group.start("a", "b", prefix=patched("chatrtc.LOG_ROWS = 64"))
    people = await group.worlds["a"].people(*(f"user{number}" for number in range(5)))
    place = await group.worlds["a"].place(*people)
    replicas = [Replica(group.on("ab"[index % 2], one), place.server_id, page=500) for index, one in enumerate(people)]
    distant = replicas[1::2]
    await asyncio.gather(*(replica.connect() for replica in replicas))
    for _ in range(tries):
        for posts in (5, 100):
            await group.freeze("b")
            for number in range(posts):
                message = await people[0].post(place.channel_id, f"message {number}")
            group.thaw("b")
            if posts == 100:
                for replica in distant:
                    await asyncio.wait_for(replica.socket.closed.wait(), PATIENCE)
                    await replica.connect()
            for replica in distant:
                await eventually(functools.partial(has_message, replica, message), "the last message")
            assert not any(replica.socket.closed.is_set() for replica in replicas)
    assert sum(replica.requests for replica in replicas) == 0, "a client saw a gap"
    await group.on("b", people[1]).post(place.channel_id, "and on")
    state = await server_state(people[0], place.server_id)
    for replica in replicas:
        await eventually(functools.partial(has_state, replica, state), "equal copies")
    await group.stop_well()


async def has_message(replica: Replica, message: Any) -> bool:
    await replica.receive()
    return bool(replica.messages.get(message["message_id"]) == message)


async def has_state(replica: Replica, state: Any) -> bool:
    await replica.receive()
    return bool(replica.state() == state)


# 5. What Redis says is not trusted.

GARBAGE = [
    b"", b"\xff\xfe\x00", b"null", b"0", b'"text"', b"[]", b"{}", b"[[]]", b"[{}]", b"[null, null, null]", b"[" * 100_000,
    b"1" * 100_000, b'{"kind": ' * 50_000, b"NaN", b'["' + b"x" * 1_000_000 + b'"]', b"\x00" * 1_000_000,
]  # fmt: skip


def altered(message: bytes, dice: random.Random) -> bytes:
    """Return a message of a server as an attacker might change it."""
    match dice.randrange(5):
        case 0:
            return message  # once more
        case 1:
            return message[: dice.randrange(len(message) + 1)]
        case 2:
            return re.sub(rb"\d+", lambda _: str(dice.choice((0, -1, 1, 2**31, 2**63, 2**70, 10**30))).encode(), message)
        case 3:
            return re.sub(rb"\d+", lambda _: dice.choice((b"null", b'"x"', b"[]", b"{}", b"1.5", b"true")), message)
        case _:
            return bytes(byte if dice.random() > 0.02 else dice.randrange(256) for byte in message)


@trials(1, 7)
async def test_garbage_in_redis_is_ignored(group: Group, tries: int) -> None:
    dice = random.Random(12)
    await group.start("a", "b")
    ana, ben = await group.worlds["a"].people("ana", "ben")
    place = await group.worlds["a"].place(ana, ben)
    looking = await group.on("b", ben).socket(place.server_id)
    channel, seen = group.redis.channel, list[bytes]()
    ask: Any = functools.partial(asyncio.to_thread, group.redis.ask)  # the health checks go on meanwhile
    for _ in range(tries):
        with redis.Redis(port=group.redis.port) as client, client.pubsub(ignore_subscribe_messages=True) as bus:
            bus.subscribe(channel)
            await come_and_go(group.on("a", ana), place, looking)
            while len(seen) < 8:
                message = bus.get_message(timeout=PATIENCE)
                seen += [message["data"]] if message else []
        async with Health(group.servers["a"], 256 << 20), Health(group.servers["b"], 256 << 20):
            for message in [*GARBAGE, *(altered(dice.choice(seen), dice) for _ in range(500))]:
                await ask("PUBLISH", channel, message)
            await come_and_go(group.on("a", ana), place, looking)
            await ask("CLIENT", "PAUSE", "1000")
            await come_and_go(group.on("a", ana), place, looking)
            await ask("PUBLISH", channel, b"x" * (33 << 20))  # for which Redis disconnects its subscribers
            await eventually(functools.partial(listens, group.redis, channel, 2), "both listen again")
            await come_and_go(group.on("a", ana), place, looking)
    await group.redis_is("up")
    await group.connected(ana, place.server_id, {ben.user_id})
    await group.stop_well()


async def listens(server: Redis, channel: bytes, count: int) -> bool:
    """Return whether this many connections listen to the channel."""
    return bool(server.ask("PUBSUB", "NUMSUB", channel) == [channel, count])


async def come_and_go(person: Person, place: Place, looking: Socket) -> None:
    """Connect, type and disconnect; the socket on another server hears each of it."""
    who = {"user_id": person.user_id}
    socket = await person.socket(place.server_id)
    await looking.receive("user:connected", **who)

    async def types() -> bool:  # what is said while a connection to Redis is replaced is lost
        await socket.ok("typing_start", {"channel_id": place.channel_id})
        return ("user:typing", person.user_id) in [(name, payload.get("user_id")) for name, payload in looking.received]

    looking.received.clear()
    looking._read = 0
    await eventually(types, "typing is told")
    await socket.close()
    await looking.receive("user:disconnected", **who)


# 6. Joining during changes made on another server.


@trials(200, 1000)
async def test_nothing_is_missed_between_servers(group: Group, tries: int) -> None:
    """Sockets join on one server while another one posts, creates channels and bans a user who is joining."""
    dice = random.Random(13)
    await group.start("a", "b")
    owner, victim, *people = await group.worlds["a"].people(*(f"user{number}" for number in range(10)))
    place = await group.worlds["a"].place(owner, *people)
    code, server = await owner.invite(place.server_id), f"/servers/{place.server_id}"
    replicas = [Replica(group.on("b", person), place.server_id, page=500) for person in people]
    await asyncio.gather(*(replica.connect() for replica in replicas))
    ban, excluded = f"{server}/bans/{victim.user_id}", await group.on("b", victim).socket()
    channels, outcomes = [], []

    async def rejoin(replica: Replica) -> None:
        await replica.receive()
        await replica.socket.ok("leave_server", {"server_id": place.server_id})
        await asyncio.sleep(dice.uniform(0, 0.02))
        ack = await replica.socket.ok("join_server", {"server_id": place.server_id, "after": replica.seq})
        replica.merge(ack["changes"])

    async def join_and_be_banned() -> None:
        await victim.ok("POST", f"/invites/{code}")
        banning = asyncio.create_task(owner.ok("PUT", ban))
        await asyncio.sleep(dice.uniform(0, 0.005))
        outcomes.append((await excluded.call("join_server", {"server_id": place.server_id}))["success"])
        await banning
        told = await owner.post(place.channel_id, "not for the banned")
        await replicas[0].socket.receive("message:new", message_id=told["message_id"])
        await excluded.receive_none("message:new", message_id=told["message_id"])
        await owner.ok("DELETE", ban)

    async with posting(owner, place.channel_id):
        for number in range(tries // len(replicas)):
            joining = asyncio.gather(*map(rejoin, replicas[1:]))
            channels.append(await owner.channel(place.server_id, f"channel {number}"))
            await joining
            await rejoin(replicas[0])
            await join_and_be_banned()
    channels.append(await owner.channel(place.server_id, "created while all are joined"))
    assert {True, False} <= set(outcomes), "the ban never raced with the join"
    state = await server_state(owner, place.server_id)
    for replica in replicas:
        await eventually(functools.partial(has_state, replica, state), "equal copies")
    assert sum(replica.requests for replica in replicas) == 0, "a client saw a gap"
    for replica, channel in zip(replicas, channels[-8:], strict=True):
        await replica.socket.ok("typing_start", {"channel_id": channel})
        for other in replicas:
            if other is not replica:
                await other.socket.receive("user:typing", channel_id=channel)
    print(f"{tries} joins, {state['seq']} changes, {outcomes.count(True)} of {len(outcomes)} bans came after the join")
    await group.stop_well()


# 7. Administration and embedding.


async def test_the_command_line_reaches_all_servers(group: Group, database: DatabaseOption) -> None:
    await group.start("a", "b")
    ana, ben = await group.worlds["a"].people("ana", "ben")
    place = await group.worlds["a"].place(ana, ben)
    looking = [await group.on(name, ana).socket(place.server_id) for name in "ab"]
    await run_ok("user", "add", "cy", *database, stdin="correct horse\n")
    assert [(await group.worlds[name].sign_in("cy")).status for name in "ab"] == [200, 200]
    await run_ok("server", "add", "Club", "--owner", "ana", *database)
    for name in "ab":
        servers = (await group.on(name, ana).ok("GET", "/servers"))["servers"]
        assert [server["name"] for server in servers] == ["class", "Club"]
    closing = [await group.on(name, ben).socket(place.server_id) for name in "ab"]
    await run_ok("user", "password", "ben", *database, stdin="battery staple\n")
    async with asyncio.timeout(bound(1)):
        await asyncio.gather(*(socket.closed.wait() for socket in closing))
    assert [(await group.on(name, ben).call("GET", "/servers")).status for name in "ab"] == [401, 401]
    ben.token = (await group.worlds["b"].sign_in("ben", "battery staple")).body["token"]
    closing = [await group.on(name, ben).socket(place.server_id) for name in "ab"]
    await run_ok("user", "delete", "ben", "--yes", *database)
    async with asyncio.timeout(bound(1)):
        await asyncio.gather(*(socket.closed.wait() for socket in closing))
        assert [(await socket.receive("member:left"))["user_id"] for socket in looking] == [ben.user_id] * 2
    await group.stop_well()


async def test_what_a_program_emits_reaches_all_servers(group: Group, make_world: MakeWorld) -> None:
    await group.start("a")
    host = await make_world(database=str(group.database), redis=group.redis.url, process="host")
    group.worlds["host"] = host
    await group.redis_is("up")
    ana = await host.person("ana")
    place, other = await host.place(ana), await host.place(ana, name="other")
    wires = [await Wire.join(group.on(name, ana), place) for name in group.worlds]
    outside = await Wire.join(group.on("a", ana), other)
    for wire in (*wires, outside):
        wire.listen()
    await host.chat.sio.emit("quiz:question", {"text": "why?"}, room=f"server:{place.server_id}")
    await host.chat.sio.emit("quiz:question", {"text": "who?"}, room=[f"server:{other.server_id}"])
    for wrong in ([], [["a"]], object()):
        with pytest.raises((IndexError, TypeError)):
            await host.chat.sio.emit("quiz:question", {}, room=wrong)
    await until(lambda: all(("quiz:question", {"text": "why?"}) in [one[1:] for one in wire.received] for wire in wires))
    await until(lambda: bool(outside.received))
    assert [one[1:] for one in outside.received] == [("quiz:question", {"text": "who?"})]
    assert all(("quiz:question", {"text": "who?"}) not in [one[1:] for one in wire.received] for wire in wires)


async def test_listeners_of_a_program_run_once(group: Group, make_world: MakeWorld) -> None:
    """On the server that made the change, not on each that emits it."""
    await group.start("a")
    hosts = [await make_world(database=str(group.database), redis=group.redis.url, process=name) for name in ("one", "two")]
    received: list[tuple[str, str]] = []
    for name, host in zip(("one", "two"), hosts, strict=True):

        @host.chat.on("message:new")
        async def note(payload: Any, name: str = name) -> None:
            received.append((name, payload["content"]))

    ana = await hosts[0].person("ana")
    place = await hosts[0].place(ana)
    looking = [await Person(host, "ana", ana.user_id, ana.token).socket(place.server_id) for host in hosts]
    await group.on("a", ana).post(place.channel_id, "on a")
    await hosts[0].chat.post_message(author_id=ana.user_id, channel_id=place.channel_id, content="on one")
    await hosts[1].chat.post_message(author_id=ana.user_id, channel_id=place.channel_id, content="on two")
    for socket in looking:
        await socket.receive("message:new", content="on two")
    await until(lambda: len(received) >= 2)
    assert sorted(received) == [("one", "on one"), ("two", "on two")]


async def test_a_server_that_gets_no_turn_refuses_all_waiting_calls_together(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would wait for a turn of its own otherwise, and the calls behind them for all of these."""
    monkeypatch.setattr(chatrtc, "JOB_TURN_SECONDS", 1)
    ana = await world.person("ana")
    place = await world.place(ana)
    body = {"channel_id": place.channel_id, "content": "hello"}
    with contextlib.closing(chatrtc.Turn(tmp_path / "chat.db")) as turn:
        await until(turn.try_acquire)
        began = time.monotonic()
        replies = await asyncio.gather(*(ana.call("POST", "/messages", body) for _ in range(30)))
        assert time.monotonic() - began < 15  # not 30
    assert {(reply.status, reply.body["reason"]) for reply in replies} == {(503, "DATABASE_DOWN")}
    assert "does not let others write" in replies[0].body["error"] and str(tmp_path) not in replies[0].body["error"]
    await ana.post(place.channel_id)


async def test_servers_and_commands_that_start_together_wait_for_each_other(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that checks the file has it alone. A server that starts meanwhile waits instead of being refused."""
    path, checking, end, check = tmp_path / "chat.db", threading.Event(), threading.Event(), chatrtc.check_openable
    chatrtc.prepare(path).close()

    def slow_check(path: Path) -> int:
        checking.set()
        assert end.wait(PATIENCE)
        return check(path)

    def read() -> None:
        with chatrtc.open_reader(str(path)):
            pass

    monkeypatch.setattr(chatrtc, "check_openable", slow_check)
    command = asyncio.create_task(asyncio.to_thread(read))
    await until(checking.is_set)
    asyncio.get_running_loop().call_later(0.3, end.set)
    world = await make_world()
    assert (await world.call("GET", "/healthz")).status == 200
    await command


async def test_one_of_several_servers_migrates(tmp_path: Path) -> None:
    """A server that waited while another one migrated the database, and opened it, just goes on."""
    path = released_database(tmp_path / "chat.db", 1)
    with contextlib.closing(chatrtc.Turn(path)) as turn, contextlib.closing(chatrtc.FileLock(path)) as lock:
        turn.acquire()
        second = asyncio.create_task(asyncio.to_thread(chatrtc.migrate_file, path))
        await asyncio.sleep(0.2)  # it waits for its turn
        chatrtc.prepare(path).close()
        assert lock.acquire(shared=True)
        turn.release()
        await second
        path = released_database(tmp_path / "other.db", 1)
    with contextlib.closing(chatrtc.FileLock(path)) as lock:
        assert lock.acquire(shared=True)
        with pytest.raises(chatrtc.StartError, match="in use"):
            chatrtc.migrate_file(path)


async def test_the_log_forgets_deleted_texts(
    make_world: MakeWorld, redis_server: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the rows have been deleted, the files do not contain them either, although nobody writes any more."""
    monkeypatch.setattr(chatrtc, "LOG_SECONDS", 3.0)
    (tmp_path / "data").mkdir()
    world = await make_world(redis=redis_server.url, database=str(tmp_path / "data" / "chat.db"))
    ana = await world.person("ana")
    place = await world.place(ana)
    gone, changed = [await ana.post(place.channel_id, text) for text in ("zirkonium", "quetzal")]
    await ana.ok("DELETE", f"/messages/{gone['message_id']}")
    await ana.ok("PATCH", f"/messages/{changed['message_id']}", {"content": "better"})
    stored = functools.partial(database_bytes, tmp_path / "data")
    await until(lambda: not world.chat.hub.store.read_inline(chatrtc.has_stale_texts))
    assert b"zirkonium" in stored() and b"quetzal" in stored()  # in the log
    await until(lambda: b"zirkonium" not in stored() and b"quetzal" not in stored())


async def test_maintenance_waits_while_another_server_writes(split: Split) -> None:
    store = split.ben.world.chat.hub.store
    await until(lambda: not store.is_busy())
    await split.ana.post(split.place.channel_id)
    await split.ben_socket.receive("message:new")
    assert store.is_busy()


async def test_a_server_that_has_missed_events_knows_who_is_invisible(group: Group) -> None:
    await group.start("a", "b", prefix=patched("chatrtc.LOG_ROWS = 16"))
    ana, ben = await group.worlds["a"].people("ana", "ben")
    place = await group.worlds["a"].place(ana, ben)
    await ana.socket(place.server_id)
    looking = await group.on("b", ben).socket(place.server_id)
    await group.connected(ben, place.server_id, {ana.user_id, ben.user_id})
    await group.freeze("b")
    await ana.ok("PATCH", "/users/me", {"status": "invisible"})
    for number in range(20):
        await ana.post(place.channel_id, f"message {number}")
    group.thaw("b")
    await asyncio.wait_for(looking.closed.wait(), PATIENCE)
    again = await group.on("b", ben).socket()
    assert (await again.ok("join_server", {"server_id": place.server_id}))["connected_users"] == [ben.user_id]
    await group.stop_well()


async def test_servers_that_cannot_share_a_database_are_refused(
    group: Group, launch: Launch, tmp_path: Path, database: DatabaseOption
) -> None:
    shared, secret = ("--redis", group.redis.url), ("--secret", "a secret of at least thirty-two bytes")
    await group.start("a")
    ana = await group.worlds["a"].person("ana")
    expect_error(await run_command("serve", "--port", "0", *database), "--redis")
    expect_error(await run_command("serve", "--port", "0", *database, *shared, *secret), "secret")
    assert (await ana.ok("GET", "/users/me"))["username"] == "ana"
    await group.stop_well()
    alone = await launch(group.database)
    expect_error(await run_command("serve", "--port", "0", *database, *shared), "--redis")
    await alone.stop_well()
    for name in ("", "a b", "a/b", "ä", "x" * 33):
        with pytest.raises(chatrtc.StartError, match="process"):
            chatrtc.ChatRTC(database=str(group.database), redis=group.redis.url, process=name)


async def test_servers_work_without_redis(launch: Launch, tmp_path: Path) -> None:
    """Redis has not been started yet: everything but presence, typing and voice passes between the servers."""
    redis_server = Redis()
    group = Group(launch, tmp_path / "chat.db", redis_server)
    await group.start("a", "b")
    await group.redis_is("down")
    ana, ben = await group.worlds["a"].people("ana", "ben")
    place = await group.worlds["a"].place(ana, ben)
    looking = await group.on("b", ben).socket(place.server_id)
    message = await ana.post(place.channel_id, "without Redis")
    assert await looking.receive("message:new") == message
    await redis_server.start()
    await group.redis_is("up")
    await come_and_go(ana, place, looking)
    await group.stop_well()
    await redis_server.kill()


# 8. The writers of a database take turns.

WRITER = """
import asyncio, json, os, signal, sys, time
from aiohttp import web
import chatrtc

async def main(database, url, name):
    chat = chatrtc.ChatRTC(database=database, redis=url, process=name, no_rate_limit=True)
    app = web.Application()
    chat.attach(app)
    runner = web.AppRunner(app)
    await runner.setup()
    waits = []

    async def post(end):
        while (began := time.monotonic()) < end:
            await chat.post_message(author_id=1, channel_id=1, content="x" * 100)
            waits.append(time.monotonic() - began)

    def die(db):
        db.execute("UPDATE servers SET name = 'never'")
        os.kill(os.getpid(), signal.SIGKILL)

    print("ready", flush=True)
    match (await asyncio.to_thread(sys.stdin.readline)).split():
        case ["post", seconds]:
            end = time.monotonic() + float(seconds)
            await asyncio.gather(*(post(end) for _ in range(16)))
            print(json.dumps([len(waits), max(waits)]), flush=True)
            await runner.cleanup()
        case ["die"]:
            await chat.hub.store.write(die)

asyncio.run(main(*sys.argv[1:]))
"""


class Writer:
    """A program in a process of its own that shares a database, and writes to it on command."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, group: Group, name: str) -> Writer:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(group.database), group.redis.url, name, cwd=HERE,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert (await process.stdout.readline()) == b"ready\n"
        return cls(process)

    async def tell(self, command: str) -> Any:
        """Tell it what to do, wait until it ends, and return what it printed."""
        out, _ = await asyncio.wait_for(self.process.communicate(command.encode() + b"\n"), 2 * PATIENCE)
        return json.loads(out) if out else None


@trials(2, 10)
async def test_busy_writers_have_equal_shares(group: Group, tries: int) -> None:
    """Three processes post as fast as they can for `tries` seconds."""
    await group.start("a")
    await group.worlds["a"].place(await group.worlds["a"].person("ana"))
    writers = await asyncio.gather(*(Writer.start(group, name) for name in ("one", "two", "three")))
    found = await asyncio.gather(*(writer.tell(f"post {tries}") for writer in writers))
    total = sum(posts for posts, _ in found)
    shares, longest = [posts / total for posts, _ in found], max(wait for _, wait in found)
    shown = ", ".join(f"{share:.2f}" for share in shares)
    print(f"{total / tries:.0f} posts a second by three processes, shares {shown}, longest wait {longest * 1000:.0f} ms")
    assert min(shares) > (0.28 if SOAK else 0.1)
    assert longest < bound(0.25)
    assert [writer.process.returncode for writer in writers] == [0, 0, 0]
    await group.stop_well()


@trials(2, 100)
async def test_a_process_killed_in_its_transaction_stops_nobody(group: Group, tries: int) -> None:
    await group.start("a")
    ana = await group.worlds["a"].person("ana")
    place = await group.worlds["a"].place(ana)
    slowest = 0.0
    async with posting(ana, place.channel_id, 0.002) as taken:
        for _ in range(tries):
            writer = await Writer.start(group, "dies")
            assert await writer.tell("die") is None
            assert writer.process.returncode == -signal.SIGKILL
            count = len(taken)
            slowest = max(slowest, await until(lambda count=count: len(taken) > count, bound(1)))  # type: ignore[misc]
    assert (await ana.ok("GET", f"/servers/{place.server_id}"))["name"] == "class"
    history = [message["message_id"] for message in await server_history(group.worlds["a"], place.server_id, ana.token)]
    assert {message["message_id"] for message in taken} <= set(history)
    print(f"{tries} kills in a transaction: the next post was answered within {slowest * 1000:.0f} ms")
    await group.stop_well()


# 9. Servers behind nginx are restarted one after another.

NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    log_format short "$msec $status $request_method $request_uri";
    access_log {folder}/access.log short;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    error_page 502 =444 @gone;  # closes the connection of a request whose server has gone
    {documented}
}}
"""


def documented_nginx(addresses: dict[str, str], port: int) -> str:
    """Return the configuration of docs/operations.md, for servers with these names and addresses."""
    blocks = re.findall(r"```nginx\n(.*?)```", (HERE / "docs" / "operations.md").read_text("utf-8"), re.DOTALL)
    server, upstreams = blocks
    for name, address in addresses.items():
        upstreams = upstreams.replace(f"127.0.0.1:300{name}", address)
    server = re.sub(r"\n +(server_name|ssl_).*", "", server).replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    server = server.replace("location / {", "location @gone { return 444; }\n    location / {")
    return str(upstreams + server.replace("proxy_pass http://127.0.0.1:3000;", "proxy_pass http://$chatrtc;"))


@contextlib.asynccontextmanager
async def nginx_before(group: Group, folder: Path) -> AsyncIterator[World]:
    """Run nginx in front of the servers of a group."""
    addresses, port = {name: urlsplit(server.url).netloc for name, server in group.servers.items()}, free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, documented=documented_nginx(addresses, port)))
    process = await asyncio.create_subprocess_exec(find_program("nginx"), "-c", str(config), "-e", str(folder / "error.log"))
    world = World(f"http://127.0.0.1:{port}", aiohttp.ClientSession())
    try:

        async def answers() -> bool:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                return (await world.call("GET", "/healthz")).status == 200
            return False

        await eventually(answers, "nginx answers")
        yield world
    finally:
        await world.close()
        process.terminate()
        await process.wait()


@trials(1, 10)
async def test_a_rolling_restart_behind_nginx_loses_nothing(group: Group, tmp_path: Path, tries: int) -> None:
    """Six clients poll and two use WebSockets, while three servers are restarted one after another and six people write."""
    await group.start("1", "2", "3")
    folder = tmp_path / "nginx"
    folder.mkdir()
    async with nginx_before(group, folder) as world:
        behind = Group(group.launch, group.database, group.redis)
        behind.worlds["nginx"] = world
        people = await world.people(*(f"user{number}" for number in range(8)))
        place = await world.place(*people)
        storm = Storm(behind, place, random.Random(14))
        clients = [StormClient(person, storm) for person in people]
        stops: dict[str, list[float]] = {"": [], "1": [], "2": [], "3": []}
        for client in clients[:6]:
            client.transport = "polling"
        await asyncio.gather(*(client.begin() for client in clients))
        for number in range(tries):
            async with storm.writing(people[:6]):
                for name in "123":
                    await asyncio.sleep(0.3)
                    port = urlsplit(group.servers[name].url).port
                    stops[name].append(time.time())
                    await group.servers[name].stop_well()
                    await group.start(name, port=port or 0)
            await storm.settle(people[0], f"round {number}", clients)
        state = await server_state(people[0], place.server_id)
        assert [client.person.name for client in clients if client.state() != state] == []
        assert sum(client.requests for client in clients) == 0, "a client saw a gap"
        await asyncio.gather(*(client.leave() for client in clients))
    log = (folder / "access.log").read_text().splitlines()
    opened: dict[str, float] = {}
    failed = []
    for at, status, method, path in map(str.split, log):
        sid = parse_qs(urlsplit(path).query).get("sid", [""])[0]
        opened.setdefault(sid, float(at))
        # Of the requests of sessions, only the last poll of one whose server was stopped may fail; its client connects again.
        was_stopped = any(opened[sid] < stop <= float(at) for stop in stops[sid[:1]])
        refused = path.startswith("/socket.io/") and status[0] == "4"
        failed += [(status, method, path)] if (refused or status[0] == "5") and not (was_stopped and method == "GET") else []
    assert failed == []
    assert len(opened) > 6, "nobody polled"
    assert storm.failed == []
    print(f"{tries} rolling restarts: {len(log)} requests, {len(opened)} sessions, {clients[0].seq} changes")
    await group.stop_well()


# ---- Page -----------------------------------------------------------------------------------------------------------
# The page in a real browser: several people at once, a network that fails, hostile text, voice, and accessibility.

SHOTS = os.environ.get("CHATRTC_SCREENSHOTS")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
expect.set_options(timeout=PATIENCE * 1000)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"),
    *("--use-fake-ui-for-media-stream", "--disable-features=WebRtcHideLocalIpsWithMdns"),
    "--host-resolver-rules=MAP chat.test 127.0.0.1",  # to the browser a network address, which is no secure context
]

NETWORK_ERRORS = "ERR_|WebSocket|Failed to load"  # that the browser logs if the network fails

# A server, a browser, people


EMBEDDED = """
import sys
from aiohttp import web
from chatrtc import ChatRTC

app = web.Application()
ChatRTC(database=sys.argv[1]).attach(app, prefix="/chat")
web.run_app(app, host="127.0.0.1", port=0, print=lambda line: print(line, flush=True))
"""


async def printed_address(process: asyncio.subprocess.Process) -> str:
    """Wait until the process prints the address of its server, and return that."""
    assert process.stdout is not None
    async with asyncio.timeout(3 * PATIENCE):
        while b"http://" not in (line := await process.stdout.readline()):
            assert line, "the server did not start"
    return next(word for word in line.decode().split() if word.startswith("http://"))


async def create_class(api: World, *names: str) -> tuple[list[Person], Place]:
    """Register people and create a server of the first, which the others join."""
    people = await api.people(*names)
    return people, await api.place(*people, name="Biology 3B")


class Tab:
    """A page in the browser, and the person who uses it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.ignored = ""  # a pattern of the errors that the test expects
        self.post_answer: dict[str, Any] | None = None  # see intercept_posts; empty: there is no answer
        page.on("console", lambda message: self.add_error(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.add_error(f"{error} {error.stack}"))

    def add_error(self, text: str) -> None:
        if not (self.ignored and re.search(self.ignored, text)):
            self.errors.append(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    async def open(self, path: str = "/") -> None:
        await self.page.goto(self.url + path)

    async def store_session(self, person: Person) -> None:
        """Open the page as somebody who is signed in."""
        self.api = person
        await self.open()
        session = {"user_id": person.user_id, "username": person.name, "token": person.token}
        await self.page.evaluate("text => localStorage.setItem('chatrtc::session', text)", json.dumps(session))
        await self.page.reload()

    async def enter(self, person: Person) -> Tab:
        await self.store_session(person)
        await expect(self.page.locator("#my-status b")).to_have_text(person.name)
        await expect(self.page.locator("#log")).to_have_attribute("aria-busy", "false")
        return self

    async def sign_in(self, username: str, password: str) -> None:
        await self.page.fill("#username", username)
        await self.page.fill("#password", password)
        await self.page.click("#enter")

    async def sign_out(self) -> None:
        await self.page.click('[data-do="settings"]')
        await self.page.click('#preferences [data-do="signOut"]')

    async def fill_and_enter(self, selector: str, text: str) -> None:
        await self.page.fill(selector, text)
        await self.page.press(selector, "Enter")

    async def write(self, text: str) -> None:
        await self.fill_and_enter("#text", text)

    async def search(self, query: str) -> None:
        await self.fill_and_enter("#q", query)

    async def answer(self, **fields: str) -> None:
        """Fill in the fields of the open dialog and press Enter."""
        for name, text in fields.items():
            await self.page.fill(f'#ask input[name="{name}"]', text)
        await self.page.press(f'#ask input[name="{name}"]', "Enter")

    async def confirm(self) -> None:
        await self.page.click("#ask .main")

    async def choose(self, opener: str, entry: str) -> None:
        """Open a menu and click an entry."""
        await self.page.click(opener)
        await self.page.click(f"#menu >> text={entry}")

    async def join_voice(self) -> None:
        await self.page.get_by_role("button", name="Join voice: Study room").click()

    async def open_channel(self, name: str) -> None:
        await self.page.click(f'[data-do="openChannel"] >> text={name}')

    async def reject(self, pattern: str, status: int, code: str, **more: Any) -> None:
        """Answer the requests to these addresses with an error, until `unroute`."""
        headers = {"Retry-After": str(more["retry_after"])} if "retry_after" in more else {}
        body = {"error": "Not today", "code": code, **more}
        await self.page.route(pattern, lambda route: route.fulfill(status=status, headers=headers, json=body))

    async def intercept_posts(self) -> None:
        """Answer the posts by sockets that the page opens from now on with `post_answer`, if it is set."""

        def connect(socket: Any) -> None:
            server = socket.connect_to_server()

            def forward(frame: str) -> None:
                if self.post_answer is None or '"message:send"' not in frame:
                    server.send(frame)
                elif self.post_answer:
                    number = frame[2 : frame.index("[")]
                    socket.send(f"43{number}{json.dumps([{'success': False} | self.post_answer])}")

            socket.on_message(forward)

        await self.page.route_web_socket("**/socket.io/**", connect)

    def row(self, text: str) -> Locator:
        return self.page.locator("#log .row", has=self.page.locator(".said", has_text=text))

    async def sees(self, text: str) -> Locator:
        row = self.row(text)
        await expect(row).to_have_count(1)
        await expect(row).not_to_have_class(re.compile("waiting|failed"))
        return row

    async def tool(self, text: str, name: str) -> None:
        row = self.row(text)
        await row.hover()
        await row.locator(f'[data-do="{name}"]').click()

    async def texts(self) -> list[str]:
        return await self.page.locator("#log .row .said").all_inner_texts()

    async def attach(self, *files: tuple[str, bytes]) -> None:
        """Choose files, as (name, content)."""
        async with self.page.expect_file_chooser() as chooser:
            await self.page.click("#attach")
        chosen: list[FilePayload] = [
            {"name": name, "mimeType": mimetypes.guess_type(name)[0] or "", "buffer": data} for name, data in files
        ]
        await (await chooser.value).set_files(chosen)

    def attachment(self, name: str) -> Locator:
        return self.page.locator(".attachment", has_text=name)

    async def create_class(self) -> None:
        """Create an account and a server, as somebody who opens the page for the first time."""
        await self.open()
        await self.sign_in("Maya", "correct horse")
        await self.locator("#empty").get_by_role("button", name="Create a server").click()
        await self.answer(name="Biology 3B")
        await expect(self.locator("#room-name")).to_have_text("general")

    async def sees_qr_code(self) -> None:
        await eventually(lambda: self.page.evaluate("document.querySelector('#qr').naturalWidth > 0"), "the QR code")

    async def shot(self, name: str) -> None:
        if SHOTS:
            await self.page.screenshot(path=f"{SHOTS}/{name}.png")


class Proxy:
    """A proxy whose connections can be cut, and that rejects requests which contain `rejected`."""

    def __init__(self, url: str) -> None:
        self.target, self.port, self.rejected = urlsplit(url), 0, b""
        self.server: asyncio.Server | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, *tabs: Tab) -> None:
        """Accept connections, and wait until these pages are online again."""
        self.server = await asyncio.start_server(self._join, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        for tab in tabs:
            await expect(tab.locator("#offline")).to_be_hidden(timeout=30000)

    async def cut(self, *tabs: Tab) -> None:
        """Cut all connections, and wait until these pages show that they are offline."""
        assert self.server is not None
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        for tab in tabs:
            await expect(tab.locator("#offline")).to_be_visible()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self.target.hostname, self.target.port)
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            while data := await reader.read(65536):
                if self.rejected and self.rejected in data:
                    break
                writer.write(data)
                await writer.drain()
        finally:
            self.writers.discard(writer)
            writer.close()


@contextlib.asynccontextmanager
async def page_server(database: Path, *options: str, **given: Any) -> AsyncIterator[World]:
    """Run a server as a process and yield a client of it."""
    process = await Process.start(database, "--no-rate-limit", *options, **given)
    async with process.world() as api:
        yield api
    assert (await process.stop())[0] == 0


@pytest.fixture
async def api(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A server for each test, as a process; a parameter is a statement that changes its module."""
    prefix = patched(request.param) if hasattr(request, "param") else ()
    async with page_server(tmp_path / "chat.db", prefix=prefix) as api:
        yield api


@pytest.fixture
async def proxy(api: World) -> AsyncIterator[Proxy]:
    """A proxy in front of that server."""
    proxy = Proxy(api.url)
    await proxy.start()
    yield proxy
    await proxy.cut()


@pytest_asyncio.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """One browser for all tests, because starting it takes longer than most of them; each `tab` has its own storage."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def tab(browser: Browser, api: World) -> AsyncIterator[Callable[..., Awaitable[Tab]]]:
    """A function that opens tabs, each with its own storage; at the end none may have logged an error."""
    tabs: list[Tab] = []

    async def open_tab(person: Person | None = None, at: str = api.url, **options: Any) -> Tab:
        context = await browser.new_context(**({"viewport": {"width": 1280, "height": 800}, "locale": "en-GB"} | options))
        context.set_default_timeout(PATIENCE * 1000)
        await context.add_init_script(
            "addEventListener('securitypolicyviolation', (one) => (window.__csp ??= []).push(one.violatedDirective))"
        )
        tabs.append(Tab(await context.new_page(), at))
        if person is not None:
            await tabs[-1].enter(person)
        return tabs[-1]

    yield open_tab
    errors = []
    for one in tabs:
        errors += one.errors + ([] if one.page.is_closed() else await one.page.evaluate("window.__csp ?? []"))
        await one.page.context.close()
    assert errors == []


# Common tasks


async def test_a_guest_joins_by_link(api: World, tab: Any) -> None:
    maya = await tab()
    await maya.create_class()
    await maya.choose("#server", "Invite people")
    await expect(maya.locator("#invite")).to_be_visible()
    link = await maya.locator("#invite-link").input_value()
    assert re.fullmatch(re.escape(maya.url) + r"/#/invite/[\w-]+", link)
    await maya.sees_qr_code()
    await maya.keyboard.press("Escape")
    guest = await tab()
    await guest.goto(link)
    await expect(guest.locator("#invited strong")).to_have_text("Biology 3B")
    await guest.shot("guest")
    await guest.fill_and_enter("#username", "Jonas")
    await expect(guest.locator("#room-name")).to_have_text("general")
    await guest.write("hello from a guest")
    await maya.sees("hello from a guest")
    await maya.write("welcome, *Jonas*")
    row = await guest.sees("welcome, Jonas")
    await expect(row.locator("em")).to_have_text("Jonas")
    await expect(guest.locator("#people")).to_contain_text("Maya")
    await guest.reload()
    await guest.sees("hello from a guest")
    await guest.click('[data-do="settings"]')
    await guest.click("#set-password")
    await guest.answer(new_password="a better one")
    await expect(guest.locator("#toasts")).to_have_text("Password saved.")
    await guest.write("still here")
    await maya.sees("still here")
    assert (await api.sign_in("Jonas", "a better one")).body["username"] == "Jonas"


@pytest.fixture
async def two(api: World, tab: Any) -> tuple[Tab, Tab, Place]:
    """Maya, who owns the server, and Jonas, both in its channel."""
    (maya, jonas), place = await create_class(api, "Maya", "Jonas")
    return await tab(maya), await tab(jonas), place


async def test_typing_presence_edit_delete_reaction_reply(two: Any) -> None:
    maya, jonas, _ = two
    await expect(maya.locator('.person[aria-label="Jonas, Online"]')).to_be_visible()
    await jonas.locator("#text").press_sequentially("good mo")
    await expect(maya.locator("#typing")).to_have_text("Jonas is typing…")
    await jonas.write("good mornng")
    await maya.sees("good mornng")
    await expect(maya.locator("#typing")).to_be_empty()
    await jonas.press("#text", "ArrowUp")
    await expect(jonas.locator("#about")).to_contain_text("Editing your message")
    await jonas.write("good morning")
    await expect((await maya.sees("good morning")).locator(".edited")).to_be_visible()
    await maya.tool("good morning", "react")
    await maya.click("#emoji button >> text=🎉")
    chip = jonas.row("good morning").locator(".reactions button")
    await expect(chip).to_have_text("🎉 1")
    await chip.click()
    await expect(maya.row("good morning").locator(".reactions button")).to_have_text("🎉 2")
    await chip.click()
    await expect(maya.row("good morning").locator(".reactions button")).to_have_text("🎉 1")
    await maya.tool("good morning", "reply")
    await expect(maya.locator("#about")).to_contain_text("Replying to Jonas")
    await maya.write("and to you")
    quote = (await jonas.sees("and to you")).locator(".quote")
    await expect(quote).to_contain_text("good morning")
    await quote.click()
    await expect(jonas.row("good morning")).to_be_focused()
    await jonas.tool("good morning", "remove")
    await jonas.confirm()
    await expect(maya.row("good morning")).to_have_count(0)
    await expect(maya.row("and to you").locator(".quote")).to_contain_text("Message deleted")
    await jonas.choose("#my-status", "Busy")
    await expect(maya.locator('.person[aria-label="Jonas, Busy"]')).to_be_visible()
    await jonas.page.close()
    await expect(maya.locator('.person[aria-label="Jonas, Offline"]')).to_be_visible()


async def test_mention_unread_and_search(two: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    other = await maya.api.channel(server_id, "homework")
    await jonas.open_channel("homework")
    await expect(jonas.locator("#room-name")).to_have_text("homework")
    await maya.locator("#text").press_sequentially("look here @jo")
    await expect(maya.locator("#names li")).to_have_text(re.compile("Jonas"))
    await maya.press("#text", "Enter")
    await expect(maya.locator("#text")).to_have_value("look here @Jonas ")
    await maya.press("#text", "Enter")
    await maya.sees("look here @Jonas")
    await maya.write("and a plain one")
    general = jonas.locator(f'#text-channels [data-id="{channel_id}"] .badge')
    await expect(general).to_have_text("1")
    await expect(general).to_have_class(re.compile("hot"))
    await expect(jonas.page).to_have_title(re.compile(r"^\(2\) homework"))
    assert await jonas.locator("#icon").get_attribute("data-mark") == "#d93025"
    await jonas.reload()
    await expect(general).to_have_text("1")
    await jonas.open_channel("general")
    await expect(jonas.row("look here")).to_have_class(re.compile("named"))
    await expect(jonas.locator(".fresh")).to_be_visible()
    await expect(general).to_be_hidden()
    await expect(jonas.page).to_have_title(re.compile("^general"))
    await jonas.reload()
    await expect(jonas.row("plain one")).to_be_visible()
    await expect(general).to_be_hidden()
    await maya.api.post(other, "the needle is in this haystack")
    for number in range(120):
        await maya.api.post(other, f"straw {number}")

    async def found() -> bool:
        await jonas.search("needle")
        await expect(jonas.locator("#found > *").first).not_to_have_text("Searching…")
        return bool(await jonas.locator(".hit").count())

    await eventually(found, "the search index")
    await jonas.click(".hit")
    await expect(jonas.locator("#room-name")).to_have_text("homework")
    await expect(jonas.row("needle")).to_be_focused()
    await expect(jonas.row("needle")).to_be_in_viewport()
    await jonas.click("#newest")
    await expect(jonas.row("straw 119")).to_be_in_viewport()


# Private conversations


async def test_two_people_talk_in_private(two: Any, tab: Any) -> None:
    """Started from the menu of a person, the conversation appears at once on the other side and on the second device."""
    maya, jonas, (_, channel_id) = two
    maya.ignored = "403"  # when Jonas has left
    device = await tab(maya.api, viewport={"width": 390, "height": 800})
    await maya.choose(".person >> text=Jonas", "Send private message")
    await expect(maya.locator("#room-name")).to_have_text("Jonas")
    await expect(maya.locator("#topic")).to_have_text("Online")
    await expect(maya.locator("#text")).to_have_attribute("placeholder", "Write to Jonas")
    await expect(jonas.locator("#private")).to_have_attribute("aria-label", "Private messages")
    await maya.write("may I ask you something?")
    await expect(jonas.locator("#home .badge.hot")).to_have_text("1")
    await expect(jonas.locator('#unread-conversations [aria-label="Maya, 1 new message"]')).to_be_visible()
    await expect(jonas.page).to_have_title("(1) general · Biology 3B · ChatRTC")
    await jonas.click("#unread-conversations button")
    await jonas.sees("may I ask you something?")
    await expect(jonas.page).to_have_title("Maya · ChatRTC")
    await expect(jonas.locator("#home .badge")).to_be_hidden()
    await jonas.locator("#text").press_sequentially("of cou")
    await expect(maya.locator("#typing")).to_have_text("Jonas is typing…")
    await jonas.write("of course, @maya!")
    await expect((await maya.sees("of course")).locator(".at")).to_have_text("@maya")
    # the other device, on a phone: the list, the conversation, and the way back
    await device.click("#open-nav")
    await expect(device.locator("#private")).to_have_attribute("aria-label", re.compile("Private messages"))
    await device.click("#private")
    await device.get_by_role("button", name="Jonas Online", exact=True).click()
    await device.sees("of course, @maya!")
    conversation = await device.evaluate("location.hash")
    await device.go_back()
    await expect(device.locator("#room-name")).to_have_text("general")
    await device.open(f"/{conversation}")
    await expect(device.locator("#room-name")).to_have_text("Jonas")
    await device.sees("may I ask you something?")
    # nothing here is for admins
    for opener, entries in (
        ("#conversation-menu", ["Rename conversation", "Leave conversation"]),
        (".person >> text=Jonas", ["Mention"]),
    ):
        await maya.click(opener)
        await expect(maya.locator("#menu button")).to_have_text(entries)
        await maya.keyboard.press("Escape")
    await expect(maya.locator('#channels [data-do="addChannel"]')).to_be_hidden()
    await maya.row("of course").hover()
    await expect(maya.row("of course").locator('[data-do="remove"]')).to_be_hidden()
    # status, drafts and search
    await jonas.choose("#my-status", "Away")
    await expect(maya.locator("#topic")).to_have_text("Away")
    await expect(maya.locator("#conversations .dot.away")).to_have_count(1)
    await maya.fill("#text", "a draft for Jonas")
    await maya.click('#servers [aria-label="Biology 3B"]')
    await expect(maya.locator("#text")).to_have_value("")
    await maya.click("#private")
    await expect(maya.locator("#text")).to_have_value("a draft for Jonas")

    async def found() -> bool:
        await maya.search("course from:jonas")
        await expect(maya.locator("#found > *").first).not_to_have_text("Searching…")
        return bool(await maya.locator(".hit").count())

    await eventually(found, "the search index")
    await maya.api.post(channel_id, "for everybody")
    await expect(maya.locator(".hit")).to_have_count(1)
    # rename, leave, return
    await maya.choose("#conversation-menu", "Rename conversation")
    await maya.answer(name="Pond project")
    for one in (maya, jonas):
        await expect(one.locator("#room-name")).to_have_text("Pond project")
    await jonas.choose("#conversation-menu", "Leave conversation")
    await expect(jonas.locator("#ask")).to_contain_text("can still read, but not write")
    await jonas.confirm()
    await expect(jonas.locator("#room-name")).to_have_text("general")
    await expect(maya.locator("#closed")).to_have_text("Jonas has left: you can read, but not write.")
    await expect(maya.locator("#compose")).to_be_hidden()
    await maya.click('#servers [aria-label="Biology 3B"]')
    await maya.click("#show-people")
    await maya.choose(".person >> text=Jonas", "Send private message")
    await expect(maya.locator("#toasts")).to_contain_text("has left the conversation")
    await jonas.choose(".person >> text=Maya", "Send private message")
    await jonas.sees("may I ask you something?")
    await maya.click("#private")
    await expect(maya.locator("#compose")).to_be_visible()
    await maya.write("welcome back")
    await jonas.sees("welcome back")


async def test_a_group_of_five_is_started_with_the_keyboard_and_nobody_brings_back_who_left(api: World, tab: Any) -> None:
    people, _ = await create_class(api, "Maya", "Jonas", "Zoe", "Ada", "Ben", "Eve")
    maya, jonas, zoe, eve = [await tab(people[number]) for number in (0, 1, 2, 5)]
    press, kind = maya.keyboard.press, maya.keyboard.type
    await reach(maya, "#private", "Shift+Tab")
    await press("Enter")
    await expect(maya.locator("#notice")).to_contain_text("Only the people in a conversation see it.")
    await reach(maya, '#notice [data-do="newMessage"]')
    await press("Enter")
    for name in ("jon", "zo", "eve"):
        await kind(name)
        await expect(maya.locator("#found-names li")).to_have_count(1)
        await press("Enter")
    await press("Backspace")
    await expect(maya.locator("#picked li")).to_have_text(["Jonas", "Zoe"])
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):  # Ada
        await press(key)
    await kind("BEN")
    await press("Enter")
    await reach(maya, "#group-name")
    await kind("Pond project")
    await press("Enter")
    await expect(maya.locator("#room-name")).to_have_text("Pond project")
    await expect(maya.locator("#topic")).to_have_text("5 people")
    await kind("who brings boots?")
    await press("Enter")
    await maya.sees("who brings boots?")
    for one in (jonas, zoe):
        await expect(one.locator("#home .badge:not(.hot)")).to_have_text("1")
        await one.click('#unread-conversations [aria-label="Pond project, 1 new message"]')
        await one.sees("who brings boots?")
    await zoe.write("I do, @jonas!")
    await jonas.sees("I do")
    await jonas.choose("#conversation-menu", "Rename conversation")
    await jonas.answer(name="Boots")
    for one in (maya, jonas, zoe):
        await expect(one.locator("#room-name")).to_have_text("Boots")
    # add somebody, who can read the earlier messages
    await expect(eve.locator("#home")).to_be_visible()
    await jonas.choose("#conversation-menu", "Add people")
    await expect(jonas.locator("#finder")).to_contain_text("They can read the earlier messages, too.")
    await expect(jonas.locator("#found-names li")).to_have_text([re.compile("Eve")])
    await jonas.press("#find", "Enter")
    await jonas.press("#find", "Enter")
    await expect(jonas.locator("#finder")).to_be_hidden()
    await eve.click("#private")
    await eve.sees("who brings boots?")
    await expect(maya.locator("#topic")).to_have_text("6 people")
    # leave, and come back
    await zoe.choose("#conversation-menu", "Leave conversation")
    await expect(zoe.locator("#ask")).to_contain_text("Nobody can add you again.")
    await zoe.confirm()
    await expect(zoe.locator("#room-name")).to_have_text("general")
    await expect(maya.locator("#topic")).to_have_text("5 people")
    maya.ignored = "403"
    await maya.choose("#conversation-menu", "Add people")
    await maya.fill_and_enter("#find", "zoe")
    await maya.press("#find", "Enter")
    await expect(maya.locator("#finder .wrong")).to_contain_text("Only they can come back.")
    await maya.keyboard.press("Escape")
    await zoe.click("#private")
    await zoe.click('#notice [data-do="newMessage"]')
    await zoe.click("#found-names >> text=You left. Come back")
    await zoe.sees("who brings boots?")
    await zoe.write("here again")
    await maya.sees("here again")


NOTES = """
    document.hasFocus = () => false;
    window.notes = [];
    window.Notification = class {
        static permission = "granted";
        constructor(title, { body }) { notes.push(`${title}: ${body}`); }
    };
    localStorage.setItem("chatrtc::notify", '"mentions"');
"""


async def test_private_messages_are_reported(api: World, tab: Any) -> None:
    """Even a message that was written before the page has joined the new conversation, and each once."""
    (maya, jonas, zoe), (_, channel_id) = await create_class(api, "Maya", "Jonas", "Zoe")
    watched = await tab()
    await watched.page.add_init_script(NOTES)
    await watched.enter(maya)
    seen: list[str] = []
    for people, name in (([maya], {}), ([maya, zoe], {"name": "Pond project"})):
        await jonas.post(channel_id, "for everybody")
        made = await jonas.ok("POST", "/conversations", {"user_ids": [one.user_id for one in people], **name})
        for text in ("first", "second"):
            await jonas.post(made["channels"][0]["channel_id"], text)
            seen.append(f"{' · '.join(['Jonas', *name.values()])}: {text}")
            await eventually(lambda: watched.evaluate(f"notes.length >= {len(seen)}"), "the notification")
    assert await watched.evaluate("notes") == seen
    await expect(watched.locator("#home .badge")).to_have_text("4")


async def test_a_conversation_without_a_name_is_named_after_its_people(api: World, tab: Any) -> None:
    (maya_api, jonas, zoe), _ = await create_class(api, "Maya", "Jonas", "Zoe")
    group = await maya_api.ok("POST", "/conversations", {"user_ids": [jonas.user_id, zoe.user_id]})
    maya = await tab(maya_api)
    await maya.open(f"/#/channel/{group['channels'][0]['channel_id']}")
    name = maya.locator("#room-name")
    await expect(name).to_have_text("Jonas, Zoe")
    await jonas.ok("PATCH", "/users/me", {"name": "Jonas Weber"})
    await expect(name).to_have_text("Jonas Weber, Zoe")
    await zoe.ok("DELETE", f"/servers/{group['server_id']}/members/{zoe.user_id}")
    await expect(name).to_have_text("Jonas Weber")
    await zoe.ok("PUT", f"/servers/{group['server_id']}/members/{zoe.user_id}")
    await expect(name).to_have_text("Jonas Weber, Zoe")
    await maya.reload()
    await expect(name).to_have_text("Jonas Weber, Zoe")
    await zoe.ok("PATCH", f"/servers/{group['server_id']}", {"name": "Pond project"})
    await expect(name).to_have_text("Pond project")
    await jonas.ok("PATCH", "/users/me", {"name": "Jonas W."})
    await expect(maya.locator("#people")).to_contain_text("Jonas W.")
    await expect(name).to_have_text("Pond project")


async def test_ctrl_k_goes_to_channels_conversations_and_people(two: Any) -> None:
    maya, jonas, (server_id, _) = two
    await maya.api.channel(server_id, "homework")
    await expect(maya.locator("#text-channels")).to_contain_text("homework")

    async def go(typed: str, to: str) -> None:
        await maya.keyboard.press("Control+k")
        await maya.keyboard.type(typed)
        await expect(maya.locator("#found-names li").first).to_contain_text(re.compile(typed, re.IGNORECASE))
        await maya.keyboard.press("Enter")
        await expect(maya.locator("#room-name")).to_have_text(to)
        await expect(maya.locator("#text")).to_be_focused()

    await go("home", "homework")
    await go("jon", "Jonas")
    await maya.write("found you")
    await expect(jonas.locator("#home .badge")).to_have_text("1")
    await go("gen", "general")
    await go("jon", "Jonas")
    await expect(maya.locator("#conversations li")).to_have_count(1)
    await maya.keyboard.press("Control+k")
    await expect(maya.locator("#found-names li")).to_have_count(3)
    await maya.keyboard.type("nobody is called that")
    await expect(maya.locator("#none-found")).to_have_text("Nothing was found.")
    await maya.keyboard.press("Escape")
    await expect(maya.locator("#finder")).to_be_hidden()


async def test_the_page_offers_only_conversations_that_the_settings_allow(tmp_path: Path, tab: Any) -> None:
    """With `staff`, pupils find the teacher only, and classmates together with the teacher."""
    database = tmp_path / "rules.db"
    async with page_server(database, "--conversations", "staff") as api:
        (_, jonas_api, zoe_api), _ = await create_class(api, "Maya", "Jonas", "Zoe")
        jonas = await tab(jonas_api, at=api.url)
        await jonas.click(".person >> text=Zoe")
        await expect(jonas.locator("#menu button")).to_have_text(["Mention"])
        await jonas.keyboard.press("Escape")
        await jonas.keyboard.press("Control+k")
        await jonas.keyboard.type("zoe")
        await expect(jonas.locator("#none-found")).to_be_visible()
        await jonas.keyboard.press("Escape")
        await jonas.click("#private")
        await jonas.click('#notice [data-do="newMessage"]')
        await expect(jonas.locator("#found-names li")).to_have_text([re.compile("Maya")])
        await jonas.press("#find", "Enter")
        await expect(jonas.locator("#found-names li")).to_have_text([re.compile("Zoe")])
        await jonas.press("#find", "Enter")
        await expect(jonas.locator("#room-name")).to_have_text("Maya")
        await jonas.write("may I?")
        await jonas.sees("may I?")
        await jonas.page.close()
    async with page_server(database, "--conversations", "nobody") as api:
        jonas, zoe = await tab(jonas_api, at=api.url), await tab(zoe_api, at=api.url)
        await jonas.click("#private")
        await jonas.sees("may I?")
        await expect(jonas.locator("#closed")).to_contain_text("Private conversations are turned off on this site.")
        await expect(jonas.locator("#compose")).to_be_hidden()
        await expect(jonas.locator('#private-list [data-do="newMessage"]')).to_be_hidden()
        await expect(zoe.locator("#servers li")).to_have_count(1)
        await expect(zoe.locator("#home")).to_be_hidden()
        for one in (jonas, zoe):
            await one.page.close()


# Text

VISIBLE_TEXT = """(ids) => {
    const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
    const inside = (node) => [...node.childNodes].map(say).join("");
    const tag = (name, note, node) => `<${note ? `${name} ${escape(note)}` : name}>${inside(node)}</${name}>`;
    const say = (node) => {
        if (node.nodeType === Node.TEXT_NODE) return escape(node.data);
        const name = node.localName;
        if (name === "button" || node.className === "language") return "";
        if (name === "bdi") return inside(node);
        const language = node.querySelector(".language")?.textContent;
        if (node.className === "code") return tag("pre", language, node.querySelector("pre > code"));
        if (node.className === "at") return tag("at", "", node);
        const note = name === "a" ? node.getAttribute("href") : name === "li" && node.value ? `${node.value}` : node.className;
        return tag(name, note, node);
    };
    return ids.map((id) => inside(document.querySelector(`#log .row[data-id="${id}"] .said`)));
}"""


async def rendered(tab: Tab, who: Person, channel_id: int, texts: list[str]) -> list[str]:
    """Post the texts and return how the page renders them, as simplified HTML."""
    ids = [(await who.post(channel_id, text))["message_id"] for text in texts]
    await expect(tab.locator(f'#log .row[data-id="{ids[-1]}"]')).to_have_count(1)
    found: list[str] = await tab.evaluate(VISIBLE_TEXT, ids)
    return found


async def test_markdown_is_rendered_as_in_the_table(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    assert (
        dict(zip(MARKDOWN_CASES, await rendered(maya, maya_api, channel_id, list(MARKDOWN_CASES)), strict=True))
        == MARKDOWN_CASES
    )
    blocks = "document.querySelectorAll('.said > *, .said li, .said pre, .said blockquote > *')"
    odd = f"[...{blocks}].filter((node) => !node.matches('.code, [dir]')).length"
    assert await maya.evaluate(odd) == 0


async def test_the_page_marks_the_mentions_that_the_server_counts(api: World, tab: Any) -> None:
    (ana, *_), (_, channel_id) = await create_class(api, *MENTIONED)
    page = await tab(ana)
    texts = list(MENTION_CASES)
    for text, drawn in zip(texts, await rendered(page, ana, channel_id, texts), strict=True):
        chips = {chatrtc.name_key(chip) for chip in re.findall("<at>@(.*?)</at>", drawn)}
        assert chips == {chatrtc.name_key(name) for name in MENTION_CASES[text].split()}, (text, drawn)


PIECES = [
    "😂", "👨‍👩‍👧", "\u0301", "a\u0301", "ﷲ", "田", "a", "0", " ", "*", "**", "***", "*a", "a*", "_", "_a_", "~~", "`", "``",
    "```", "a`", "[", "]", "(", ")", "[a](", "[a](https://b.example", "](https://b.example)", "@", "@a", "@田", "@ana ", ".",
    "a.", "-", "'\"", ">", "> ", "\n", "\n- ", "\n  1. ", "\n> ", "\n```", "\\", "\\*", "\\`", "https://",
    "https://a.example/(", "www.", "a@b.",
]  # fmt: skip


def worst_texts() -> list[str]:
    """200 texts of 4,000 characters: each piece repeated, several pieces repeated, and pieces in any order."""
    pick, texts = Random(9), []
    for number in range(200):
        unit = PIECES[number] if number < len(PIECES) else "".join(pick.choices(PIECES, k=pick.randint(2, 6)))
        text = "".join(pick.choices(PIECES, k=4000)) if number >= 150 else pick.choice(PIECES) + unit * 4000
        tail = pick.choice([" that was so funny", "x", "*", "`", ")", "@ana"])
        texts.append(text[: 4000 - len(tail)] + tail)
    return texts


# What else a browser may be slow at: marks, joiners, directions, fonts, lines, and each kind of block and element.
NEIGHBOURS = [
    "\u0483", "\u0591", "\u064b", "\u0951", "\u0e48", "\u20dd", "\u3099", "\U0001d165", "\u0316\u0301", "\u0301\u034f",
    "\u0301\u200d", "\u0301\u00ad", "\u0301\ufe0f", "a" + "\u0301" * 30, "a" + "\u0316\u0301" * 15, "*a*\u0301",
    "q\u0301", "क्", "र्क", "कि", "\u093f", "\u0f40\u0f90", "\u0f90", "\u1100", "\u1161", "\u1100\u1161\u11a8",
    "\u1780\u17d2", "\u1000\u1039", "ක්\u200dර", "กำ", "محمد ", "لا", "ﷺ", "שָׁלוֹם ", "\u200d", "\u200c", "👩\u200d",
    "❤\ufe0f\u200d", "\ufe0f", "\U000e0100", "田\U000e0100", "\U000e0061", "🇫", "👍🏽", "🏽", "1\ufe0f\u20e3", "\u202e",
    "\u202d\u202ea", "\u2067a", "\u2066a\u2067ب", "\u202ea\u202c", "aب", "1ب", "(ب[a", "a\u00ad", "\u200b", "a\u200b",
    "\u2028a", "\t", " ", "\u00a0", "a\n", "a\n\n", " \n", "ب\n", "😂\n", "aب田क\n", "- a\n", "- ب\n", "1. a\n",
    "00) ب\n", "- a\n1. a\n", "- a\n  1. a\n", "- a\n\n", "- a\nb\n", "- a\n  b\n", "- `a`\n", "- > a\n",
    "".join("  " * depth + "- a\n" for depth in range(12)), "> a\n", "> a\n\n", "> > > > a\n", "> a\nb\n", "> - a\n\n",
    "> ```a```\n", "```a```\n", "```a```\nb\n", "```\na\n```\n", "~~a. \n```a. \n", "`a` ", "`a`\n", "***a*** ",
    "~~a~~\n", "*a **b ~~c ", "@Maya ", "@Maya\n", "https://a.example ", "www.a.example\n", "a@b.cd ",
    "[a.example](https://b.example) ", "https://a:b@c.example ", "https://ä.example ",
    "| [a](https://b.example) | [c](https://d.example) |\n", "[*a* ~~b~~ `c`](https://b.example) ", "W", "fi", "a-",
    "a/", "aعक田", "a\u03b1\u0431אعक田กᄀ", "a\U0001d4b3", "\ue000", "\u0378",
]  # fmt: skip


def neighbour_texts() -> list[str]:
    """Each neighbour repeated, neighbours and pieces mixed, and characters that all differ, so that each needs a font."""
    pick, parts = Random(11), [part for part in NEIGHBOURS + PIECES if len(part) < 20]
    mixed = ["".join(pick.choices(parts, k=pick.randint(2, 6))) * 2000 for _ in range(60)]
    mixed += ["".join(pick.choices(parts, k=4000)) for _ in range(20)]
    distinct = ["".join(map(chr, range(first, first + 4000))) for first in (0x4E00, 0xAC00, 0xE000, 0x10000, 0x20000)]
    return [text[:3999] + "x" for text in [unit * 4000 for unit in NEIGHBOURS] + mixed + distinct]


LETTERS = """(id) => {
    const said = document.querySelector(`#log .row[data-id="${id}"] .said`).cloneNode(true);
    for (const node of said.querySelectorAll("button, bdi")) node.remove();
    for (const link of said.querySelectorAll("a")) {  // the address of [label](address) is not shown
        const typed = link.getAttribute("href"), text = link.textContent;
        if (![text, `https://${text}`, `mailto:${text}`].includes(typed)) link.append(typed);
    }
    return (said.textContent.match(/[\\p{L}\\p{So}]/gu) ?? []).join("");
}"""


async def test_no_text_blocks_the_page_or_loses_letters(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    texts = worst_texts()
    async with asyncio.timeout(300):
        for start in range(0, len(texts), 10):
            said = {(await maya_api.post(channel_id, text))["message_id"]: text for text in texts[start : start + 10]}
            await expect(maya.locator(f'#log .row[data-id="{max(said)}"]')).to_have_count(1)
            for message_id, text in said.items():
                letters = "".join(char for char in text if unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lm", "Lo", "So"))
                assert await maya.evaluate(LETTERS, message_id) == letters, text[:80]


async def test_a_letter_shows_at_most_thirty_marks(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    few, many = "a" + "\u0316" * 30, "a" + "\u0316" * 31
    intact = [
        "👩🏽\u200d❤\ufe0f\u200d💋\u200d👨🏽",
        "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
        "क्षत्रिय",
        "שָׁלוֹם",
        "مُحَمَّدٌ",
        "น้ำ",
        few,
    ]
    shown = await rendered(maya, maya_api, channel_id, [f"so {text}" for text in intact])
    assert shown == [f"<p>so {text}</p>" for text in intact]
    typed = f"{many}\u200d\u0316x **{many}** `{many}` https://a.example/{many} {' '.join([many] * 100)}"
    assert len(typed) < 4000
    (one,) = await rendered(maya, maya_api, channel_id, [typed])
    link = f"<a https://a.example/{many}>https://a.example/{few}</a>"  # the link leads to the whole address
    assert one == f"<p>{few}x <strong>{few}</strong> <code>{few}</code> {link} {' '.join([few] * 100)}</p>"
    await maya.tool("https", "reply")
    await maya.write("so it is")
    quote = (await maya.sees("so it is")).locator(".quote")
    await expect(quote).to_contain_text(f"{few}x {few} {few}")
    await expect(quote).not_to_contain_text(many)
    await maya.tool("https", "edit")
    await expect(maya.locator("#text")).to_have_value(typed)


@pytest.mark.parametrize(
    "unit",
    ["- a\n", "- a\n\n", "1. a\n- a\n", "a\n\n", "> a\n\n", "> > > a\nb\n", "```a```\nb\n", "*a* ", "***a***\n", "`a` ",
     "www.a.example ", "[a.example](https://b.example)\n", "@Jonas ", "https://a.example/(\n- \n  1. )", "~~a. \n```a. \n"],
)  # fmt: skip
async def test_after_200_elements_a_message_is_plain_text(api: World, tab: Any, unit: str) -> None:
    (maya_api, _), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya = await tab(maya_api)
    text = (unit * 4000)[:3980] + "\nthe\n\n*end*"
    said = (await maya_api.post(channel_id, text))["message_id"]
    row = maya.locator(f'#log .row[data-id="{said}"]')
    await expect(row).to_have_count(1)
    assert (await row.locator(".said").inner_text()).endswith("\nthe\n\n*end*")
    assert 60 <= await row.locator(".said *").count() <= 210
    assert await maya.evaluate(LETTERS, said) == "".join(filter(str.isalpha, text))


@pytest.mark.soak
async def test_every_text_renders_within_fifty_milliseconds(api: World, tab: Any) -> None:
    """Measure the CPU time of the page's thread for one message: script, style and layout.

    Text whose script changes at each letter has one run per letter, and browsers shape each run by itself. That takes 15 us a
    run, however the page builds the message, so 4,000 of them take up to 65 ms.
    """
    maya_api = await api.person("Maya")
    costs: list[tuple[float, str]] = []
    worst = worst_texts()
    for number, text in enumerate(worst + neighbour_texts()):
        if number % 20 == 0:
            _, channel_id = await api.place(maya_api, name=f"Class {number}")
            maya = await tab(maya_api)
            await maya.open(f"/#/channel/{channel_id}")
            cdp = await maya.context.new_cdp_session(maya.page)
            await cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
        cost = 50.0
        for _ in range(4):  # other load of the machine may have slowed it down
            if cost >= 50:
                before = await page_time(cdp)
                message_id = (await maya_api.post(channel_id, text))["message_id"]
                await expect(maya.locator(f'#log .row[data-id="{message_id}"]')).to_have_count(1)
                cost = (await page_time(cdp) - before) * 1000
        costs.append((cost, text[:40]))
    print(f"\nthe most expensive texts, ms: {sorted(costs, reverse=True)[:5]}")
    assert max(costs[: len(worst)])[0] < 50
    assert max(costs)[0] < 75


async def page_time(cdp: Any) -> float:
    """Return the seconds that the page's thread has spent on script, style and layout."""
    metrics = {one["name"]: one["value"] for one in (await cdp.send("Performance.getMetrics"))["metrics"]}
    return float(metrics["ScriptDuration"] + metrics["LayoutDuration"] + metrics["RecalcStyleDuration"])


async def test_names_are_completed_regardless_of_case_and_accents(two: Any) -> None:
    maya, jonas, _ = two
    await jonas.api.ok("PATCH", "/users/me", {"name": "José Ángel"})
    for typed in ("@jo", "(@JOSE", "hi @angel", "@sé"):
        await maya.fill("#text", "")
        await maya.locator("#text").press_sequentially(typed)
        await expect(maya.locator("#names li")).to_contain_text(["José Ángel@Jonas"])
    await maya.press("#text", "Enter")
    await expect(maya.locator("#text")).to_have_value("@Jonas ")
    for typed in ("me@jo", "@jo nas", "@nobody"):
        await maya.fill("#text", "")
        await maya.locator("#text").press_sequentially(typed)
        await expect(maya.locator("#names")).to_be_hidden()


async def test_each_block_has_its_own_direction(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    await rendered(maya, maya_api, channel_id, ["hello\n\nمحمد\n\n> سلم\n\n- شكر\n- ok\n\n```\nשלם\n```\n\nhello\nمحمد بكم"])
    blocks = "[...document.querySelectorAll('.said :is(p, blockquote, ul, li, pre)')]"
    found = await maya.evaluate(f"{blocks}.map((node) => `${{node.localName}} ${{getComputedStyle(node).direction}}`)")
    assert found == ["p ltr", "p rtl", "blockquote rtl", "p rtl", "ul rtl", "li rtl", "li ltr", "pre rtl", "p ltr"]
    last = """() => { const range = document.createRange(), text = [...document.querySelectorAll(".said p")].pop();
        range.selectNodeContents(text); const lines = [...range.getClientRects()]; return lines.pop().left - lines[0].left; }"""
    assert await maya.evaluate(last) > 100  # the Arabic line of a paragraph that begins in English is on the right


async def test_a_network_failure_loses_and_doubles_nothing(api: World, proxy: Proxy, tab: Any) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    doomed = await jonas_api.post(channel_id, "will be deleted")
    changed = await jonas_api.post(channel_id, "will be edited")
    jonas = await tab(jonas_api)
    maya = await tab(maya_api, at=proxy.url)
    maya.ignored = NETWORK_ERRORS
    for number in range(10):
        await maya.write(f"before {number}")
    await jonas.sees("before 9")
    for round_ in range(3):
        await maya.write(f"on the edge {round_}")
        await proxy.cut(maya)
        for number in range(5):
            await maya.write(f"while cut {round_}.{number}")
            await jonas.write(f"other side {round_}.{number}")
        await expect(maya.locator(".row.waiting").last).to_contain_text("Sending")
        await maya.locator("#text").press_sequentially("half a thought")
        if round_ == 1:
            await maya_api.call("PATCH", f"/messages/{doomed['message_id']}", {"content": "x"})
            await jonas_api.ok("DELETE", f"/messages/{doomed['message_id']}")
            await jonas_api.ok("PATCH", f"/messages/{changed['message_id']}", {"content": "has been edited"})
        await jonas.sees(f"other side {round_}.4")
        await proxy.start(maya)
        await expect(maya.locator(".row.waiting")).to_have_count(0, timeout=30000)
        await expect(maya.locator("#text")).to_have_value("half a thought")
        await jonas.sees(f"while cut {round_}.4")
        await maya.fill("#text", "")
    await expect(maya.row("has been edited")).to_have_count(1)
    await expect(maya.row("will be deleted")).to_have_count(0)
    truth = [message["content"] for message in await channel_history(maya_api, channel_id)]
    assert len(truth) == len(set(truth)) == 1 + 10 + 3 * 11
    for one in (maya, jonas):
        await eventually(lambda one=one: shows_exactly(one, truth), "the messages of the server, in order")


async def shows_exactly(tab: Tab, truth: list[str]) -> bool:
    return [text.removesuffix(" (edited)") for text in await tab.texts()] == truth


async def test_the_page_posts_by_its_socket(api: World, tab: Any) -> None:
    """By REST if it has none. A post that is refused for the moment, or whose ack is lost, is posted once in the end."""
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    jonas, maya, sockets = await tab(jonas_api), await tab(), []
    maya.ignored = NETWORK_ERRORS
    asked: list[str] = []
    maya.page.on("request", lambda request: asked.append(request.method) if request.url.endswith("/messages") else None)
    lost: list[str] = []
    reachable = True

    def connect(socket: Any) -> None:
        if not reachable:
            return
        server = socket.connect_to_server()
        sockets.append(socket)

        async def take(frame: str) -> None:
            if '"loses its ack"' not in frame or len(lost) == 2:
                socket.send(frame)
            else:
                lost.append(frame)
                if len(lost) == 2:  # the event and the ack
                    await socket.close()

        server.on_message(take)

    await maya.page.route_web_socket("**/socket.io/**", connect)
    await maya.enter(maya_api)
    await maya.write("by the socket")
    await maya.sees("by the socket")
    assert asked == []
    await maya.write("loses its ack")
    await jonas.sees("loses its ack")
    await maya.sees("loses its ack")
    assert len(lost) == 2
    await expect(maya.locator("#offline")).to_be_hidden()
    asked.clear()
    reachable = False
    await maya.page.route("**/socket.io/*polling*", lambda route: route.abort())
    await sockets[-1].close()
    await expect(maya.locator("#offline")).to_be_visible()
    await maya.write("without a socket")
    await jonas.sees("without a socket")
    await maya.sees("without a socket")
    assert asked == ["POST"]
    texts = [message["content"] for message in await channel_history(maya_api, channel_id)]
    assert texts == ["by the socket", "loses its ack", "without a socket"]


async def test_a_post_that_is_refused_for_the_moment_is_tried_again(api: World, tab: Any) -> None:
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab()
    await maya.intercept_posts()
    await maya.enter(maya_api)
    for code in ("UNAVAILABLE", "RATE_LIMITED", "INTERNAL_ERROR"):
        maya.post_answer = {"code": code, "error": "Not now"}
        await maya.write(f"first {code}")
        await expect(maya.row(f"first {code}")).to_have_class(re.compile("waiting"))
        maya.post_answer = None
        await maya.sees(f"first {code}")
    maya.post_answer = {"code": "BAD_REQUEST", "error": "Never"}
    await maya.write("refused for good")
    await expect(maya.row("refused for good").locator(".fate")).to_contain_text("Not sent. Never")


# The server notices the end of a polling client by a missing pong: after 10 s instead of 45 s.
QUICK_PINGS = """import functools
chatrtc.socket_server = functools.partial(chatrtc.socket_server, ping_interval=5, ping_timeout=5)"""


@pytest.mark.parametrize("api", [QUICK_PINGS], indirect=True, ids=["quick pings"])
async def test_long_polling_if_a_proxy_rejects_websocket(api: World, proxy: Proxy, tab: Any) -> None:
    """The page falls back to polling, works as usual, and uses WebSocket again once a connection allows it."""
    proxy.rejected = b"Upgrade: websocket"
    (maya_api, jonas_api), _ = await create_class(api, "Maya", "Jonas")
    jonas = await tab(jonas_api)
    maya = await tab(at=proxy.url)
    maya.ignored = NETWORK_ERRORS
    await maya.enter(maya_api)
    await maya.write("through the proxy")
    await jonas.sees("through the proxy")
    await asyncio.gather(*(jonas_api.post(1, f"many at once {number};") for number in range(40)))
    await maya.sees("many at once 39;")
    await maya.locator("#text").press_sequentially("typing now", delay=250)
    await expect(jonas.locator("#typing")).to_have_text("Maya is typing…")
    await proxy.cut(maya)
    await jonas.write("while it was cut")
    proxy.rejected = b"transport=polling"
    await proxy.start(maya)
    await maya.sees("while it was cut")
    await maya.page.close()
    await expect(jonas.locator('.person[aria-label="Maya owner, Offline"]')).to_be_visible(timeout=60000)


OLD_BROWSER = """
delete Array.prototype.findLast;
delete Array.prototype.toSorted;
delete URL.canParse;
delete AbortSignal.timeout;
delete CanvasRenderingContext2D.prototype.roundRect;
"""


async def test_the_page_works_in_the_oldest_supported_browsers(api: World, tab: Any) -> None:
    """Chrome 100, Firefox 102 and Safari 15.4 lack these methods."""
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab()
    await maya.page.add_init_script(OLD_BROWSER)
    await maya.enter(maya_api)
    await maya.write("see https://example.org and *this*")
    await expect((await maya.sees("see https")).locator("a")).to_have_attribute("href", "https://example.org")
    await expect(maya.locator("#log .row")).to_have_count(1)


async def test_an_unsupported_browser_shows_a_notice(tab: Any) -> None:
    maya = await tab()
    maya.ignored = "is not a function"
    await maya.page.add_init_script("delete window.structuredClone; delete Array.prototype.at;")
    await maya.open()
    await expect(maya.locator(".unable")).to_have_text([re.compile("too old for ChatRTC"), re.compile("trop ancien")])
    await expect(maya.locator("#sign-in")).to_be_hidden()


async def test_a_message_that_cannot_be_rendered_hides_no_other(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    for text in ("before", "a *broken* one", "after"):
        await maya_api.post(channel_id, text)
    maya = await tab()
    maya.ignored = "cannot draw"
    await maya.page.add_init_script("""
        const append = Element.prototype.append;
        Element.prototype.append = function (...nodes) {
            if (nodes.some((node) => node.tagName === "EM" || node.querySelector?.("em"))) throw new Error("cannot draw");
            return append.apply(this, nodes);
        };""")
    await maya.enter(maya_api)
    await expect(maya.locator("#log .row .said")).to_have_text(["before", "a *broken* one", "after"])


def test_the_page_uses_only_features_of_supported_browsers() -> None:
    """No look-behind, no newer method, and newer CSS functions only with a fallback."""
    page = (HERE / "chatrtc.html").read_text()
    newer = ("(?<!", "(?<=", ".findLast", ".toSorted", "canParse", "AbortSignal.", ".roundRect", ":has(", "groupBy(")
    assert [one for one in newer if one in page] == []
    for found in re.finditer(r"[\w-]+: [^;{}]*\d[ds]vh[^;]*;", page):
        assert re.search(r"\dvh[^;]*; *$", page[: found.start()]), f"no fallback: {found[0]}"


async def test_a_reload_keeps_drafts_and_unsent_messages(api: World, proxy: Proxy, tab: Any) -> None:
    (maya_api,), (server_id, channel_id) = await create_class(api, "Maya")
    await maya_api.channel(server_id, "homework")
    maya = await tab()
    await maya.intercept_posts()
    await maya.enter(maya_api)
    await maya.fill("#text", "a draft for general")
    await maya.open_channel("homework")
    await expect(maya.locator("#text")).to_have_value("")
    await maya.fill("#text", "another for homework")
    await maya.reload()
    await expect(maya.locator("#text")).to_have_value("another for homework")
    await maya.open_channel("general")
    await expect(maya.locator("#text")).to_have_value("a draft for general")
    maya.post_answer = {}
    await maya.press("#text", "Enter")
    await expect(maya.row("a draft for general")).to_have_class(re.compile("waiting"))
    await maya.reload()
    await expect(maya.row("a draft for general")).to_have_class(re.compile("waiting"))
    maya.post_answer = None
    await maya.sees("a draft for general")
    maya.post_answer = {"code": "FORBIDDEN", "error": "Not today"}
    await maya.write("refused at first")
    await expect(maya.row("refused at first").locator(".fate")).to_contain_text("Not sent. Not today")
    maya.post_answer = None
    await maya.reload()
    await maya.row("refused at first").get_by_role("button", name="Try again").click()
    await maya.sees("refused at first")
    texts = [message["content"] for message in await channel_history(maya_api, channel_id)]
    assert texts == ["a draft for general", "refused at first"]


async def test_people_are_managed(api: World, tab: Any, two: Any) -> None:
    maya, jonas, (server_id, _) = two
    zoe_api = await api.person("Zoë")
    await zoe_api.ok("POST", f"/invites/{await maya.api.invite(server_id)}")
    zoe = await tab(zoe_api)
    await maya.choose(".person >> text=Jonas", "Make admin")
    await expect(jonas.locator("#people")).to_contain_text("admin")
    await jonas.locator('#channels [data-do="addChannel"]').first.click()
    await jonas.answer(name="lab notes", topic="what we saw")
    await expect(jonas.locator("#room-name")).to_have_text("lab notes")
    await expect(maya.locator("#text-channels")).to_contain_text("lab notes")
    await maya.choose("#server", "Rename server")
    await maya.answer(name="Biology 4A")
    await expect(zoe.locator("#server")).to_contain_text("Biology 4A")
    await jonas.choose(".person >> text=Zoë", "Ban")
    await jonas.confirm()
    await expect(zoe.locator("#empty")).to_be_visible()
    await expect(zoe.locator("#toasts")).to_contain_text("no longer in Biology 4A")
    await maya.choose("#server", "Banned people")
    await maya.locator("#people-list").get_by_role("button", name="Lift the ban").click()
    await eventually(lambda: none_banned(maya.api, server_id), "the ban is lifted")
    await maya.keyboard.press("Escape")
    await jonas.locator(".channel", has_text="lab notes").hover()
    await jonas.locator(".channel", has_text="lab notes").locator('[data-do="channelMenu"]').click()
    await jonas.click("#menu >> text=Delete channel")
    await jonas.confirm()
    await expect(maya.locator("#text-channels")).not_to_contain_text("lab notes")
    await expect(jonas.locator("#room-name")).to_have_text("general")
    await jonas.choose("#server", "Leave server")
    await jonas.confirm()
    await expect(jonas.locator("#empty")).to_be_visible()
    await expect(maya.locator("#people")).not_to_contain_text("Jonas")
    await maya.api.ok("POST", "/auth/logout")
    await expect(maya.locator("#sign-in-wrong")).to_contain_text("You have been signed out")


async def none_banned(who: Person, server_id: int) -> bool:
    return not (await who.ok("GET", f"/servers/{server_id}/bans"))["bans"]


async def test_a_signed_in_person_follows_an_invite(two: Any, api: World) -> None:
    maya, jonas, (_, channel_id) = two
    doomed = await maya.api.post(channel_id, "soon gone")
    await jonas.api.post(channel_id, "an answer", reply_to=doomed["message_id"])
    await maya.api.ok("DELETE", f"/messages/{doomed['message_id']}")
    club = await api.place(maya.api, name="Robotics club")
    code = await maya.api.invite(club.server_id)
    await jonas.goto("about:blank")
    await jonas.open(f"/#/invite/{code}")
    await expect(jonas.locator("#ask")).to_contain_text("Join Robotics club?")
    await jonas.confirm()
    await expect(jonas.locator("#server")).to_contain_text("Robotics club")
    await jonas.write("hello, robots")
    await jonas.sees("hello, robots")
    await jonas.click('#rail [aria-label="Biology 3B"]')
    await expect(jonas.row("an answer").locator(".quote")).to_contain_text("Message deleted")
    await jonas.go_back()
    await expect(jonas.locator("#server")).to_contain_text("Robotics club")


async def test_a_late_configuration_keeps_the_chosen_form(tab: Any) -> None:
    visitor, notified = await tab(), asyncio.Event()

    async def hold(route: Any) -> None:
        await notified.wait()
        await route.continue_()

    await visitor.page.route("**/config", hold)
    await visitor.open()
    await visitor.click('#swap [data-mode="code"]')
    await visitor.fill("#code", "K7QF2")
    async with visitor.page.expect_response("**/config") as answer:
        notified.set()
    await (await answer.value).finished()
    await expect(visitor.locator('#swap [data-mode="register"]')).to_be_visible()
    await expect(visitor.locator("#code")).to_have_value("K7QF2")
    await expect(visitor.locator("#code")).to_be_visible()


async def test_a_username_is_made_of_the_name(tab: Any) -> None:
    """A name with a space yields a username, which is shown and is used to sign in."""
    leo = await tab()
    leo.ignored = "401"
    await leo.open()
    await leo.fill("#username", "Léo Martin")
    await leo.fill_and_enter("#password", "correct horse")
    await expect(leo.locator("#ask")).to_contain_text("You sign in as Léo.Martin")
    await leo.keyboard.press("Enter")
    await expect(leo.locator("#my-status b")).to_have_text("Léo Martin")
    await leo.click('[data-do="settings"]')
    await expect(leo.locator("#profile")).to_contain_text("@Léo.Martin")
    await leo.click('#preferences [data-do="changeName"]')
    await leo.answer(name="Léo O'Neil")
    await expect(leo.locator("#profile bdi")).to_have_text("Léo O'Neil")
    await leo.click('#preferences [data-do="signOut"]')
    for username, password in (("Léo Martin", "correct horse"), ("Léo.Martin", "wrong horse")):
        await leo.sign_in(username, password)
        await expect(leo.locator("#sign-in-wrong")).to_have_text("Wrong username or password.")
        await expect(leo.locator("#username-bad")).to_be_visible(visible=" " in username)
    await leo.fill("#password", "correct horse")
    await leo.click("#enter")
    await expect(leo.locator("#my-status b")).to_have_text("Léo O'Neil")


async def test_a_new_name_is_shown_at_once(two: Any) -> None:
    maya, jonas, _ = two
    await jonas.write("who am I?")
    await maya.sees("who am I?")
    await jonas.api.ok("PATCH", "/users/me", {"name": "Jonas Weber"})
    await expect(maya.row("who am I?").locator(".who")).to_have_text("Jonas Weber")
    await expect(maya.locator('.person[aria-label="Jonas Weber, Online"]')).to_have_attribute("title", re.compile("^@Jonas"))
    await expect(jonas.locator("#my-status b")).to_have_text("Jonas Weber")
    await jonas.locator("#text").press_sequentially("hm, hm, hm", delay=400)
    await expect(maya.locator("#typing")).to_have_text("Jonas Weber is typing…")
    await maya.click(".person >> text=Jonas Weber")
    await expect(maya.locator("#menu header")).to_have_text(re.compile("Jonas Weber *@Jonas"))
    await maya.keyboard.press("Escape")
    await jonas.api.ok("PATCH", "/users/me", {"name": None})
    await expect(maya.row("who am I?").locator(".who")).to_have_text("Jonas")


@pytest.fixture
async def guest_class(api: World, tab: Any) -> tuple[Tab, Tab, int, str]:
    """Maya, who owns the server, and Léo, a guest who typed the code of its invite."""
    (maya_api,), (server_id, _) = await create_class(api, "Maya")
    code = await maya_api.invite(server_id)
    leo = await tab()
    leo.ignored = "404"
    await leo.open()
    await leo.click('#swap [data-mode="code"]')
    await leo.fill_and_enter("#code", "not-a-code")
    await expect(leo.locator("#code-bad")).to_contain_text("Nothing was found for this code")
    await leo.fill_and_enter("#code", f" {code.lower().replace('-', ' ')} ")
    await expect(leo.locator("#invited strong")).to_have_text("Biology 3B")
    await expect(leo.locator("#username")).to_be_focused()
    await leo.fill_and_enter("#username", "Léo Martin")
    await expect(leo.locator("#room-name")).to_have_text("general")
    return await tab(maya_api), leo, server_id, code


async def test_a_guest_returns_on_another_device(guest_class: Any, tab: Any) -> None:
    """A guest who signs out is warned, and returns by a link or a code from an admin; then all guests are removed."""
    maya, leo, _, _ = guest_class
    await leo.write("good evening")
    await leo.sign_out()
    await expect(leo.locator("#ask")).to_contain_text("you will need a sign-in link from an admin")
    await leo.confirm()
    await expect(leo.locator("#sign-in-title")).to_have_text("Sign in")
    await expect(maya.locator('.person[aria-label="Léo Martin guest, Offline"]')).to_be_visible()
    for typed in (False, True):
        await maya.choose(".person >> text=Léo Martin", "Sign-in link")
        await expect(maya.locator("#invite")).to_contain_text("Sign-in link for Léo Martin")
        await expect(maya.locator("#invite-code")).to_have_text(re.compile(r"^\w{5}-\w{5}$"))
        await expect(maya.locator("#invite-list")).to_be_hidden()
        await maya.sees_qr_code()
        code = await maya.locator("#invite-code").inner_text()
        link = await maya.locator("#invite-link").input_value()
        assert link == f"{maya.url}/#/link/{code}"
        phone = await tab()
        phone.ignored = "404"
        if typed:
            await phone.open()
            await phone.click('#swap [data-mode="code"]')
            await phone.fill("#code", code.lower())
        else:
            await phone.goto(link)
            await expect(phone.locator("#sign-in-title")).to_have_text("Welcome back")
        await phone.click("#enter")
        await expect(phone.locator("#my-status b")).to_have_text("Léo Martin")
        await phone.sees("good evening")
        await expect(phone.locator("dialog[open]")).to_have_count(0)
        await maya.keyboard.press("Escape")
    await maya.choose("#server", "Remove all guests")
    await maya.confirm()
    await expect(maya.locator("#toasts")).to_have_text("1 guest removed")
    await expect(phone.locator("#empty")).to_be_visible()
    await expect(phone.locator('#empty [data-do="createServer"]')).to_be_hidden()


async def test_a_ban_can_include_the_invite_and_the_messages(guest_class: Any) -> None:
    maya, leo, server_id, _ = guest_class
    await leo.write("spam")
    await maya.sees("spam")
    await maya.choose(".person >> text=Léo Martin", "Ban")
    await maya.get_by_label("Also revoke the invite they used").check()
    await maya.get_by_label("Also delete their messages").check()
    await maya.confirm()
    await expect(leo.locator("#toasts")).to_contain_text("no longer in Biology 3B")
    await expect(maya.row("spam")).to_have_count(0)
    assert (await maya.api.ok("GET", f"/servers/{server_id}/invites"))["invites"] == []
    assert len((await maya.api.ok("GET", f"/servers/{server_id}/bans"))["bans"]) == 1


async def test_a_message_leads_to_its_author(guest_class: Any) -> None:
    """The name and the picture of a message open a menu to mention its author, or to ban them even if they have left."""
    maya, leo, server_id, code = guest_class
    await leo.write("spam")
    await maya.sees("spam")
    await maya.row("spam").locator(".face").click()
    await maya.click("#menu >> text=Mention")
    await expect(maya.locator("#text")).to_have_value("@Léo.Martin ")
    await maya.api.ok("DELETE", f"/servers/{server_id}/members/{await author_of(maya.api, 'spam', server_id)}")
    await expect(maya.locator("#people")).not_to_contain_text("Léo")
    await maya.row("spam").focus()
    await maya.keyboard.press("Tab")
    await expect(maya.row("spam").locator(".who")).to_be_focused()
    await maya.keyboard.press("Enter")
    await expect(maya.locator("#menu header")).to_have_text(re.compile("Léo Martin *@Léo.Martin · no longer a member"))
    await expect(maya.locator("#menu button")).to_have_text(["Ban"])
    await maya.keyboard.press("Enter")
    await maya.get_by_label("Also delete their messages").check()
    await maya.confirm()
    await expect(maya.row("spam")).to_have_count(0)
    leo.ignored = "403|404"
    await leo.open(f"/#/invite/{code}")
    await leo.confirm()
    await expect(leo.locator("#ask")).to_contain_text("You are banned from this server.")


async def author_of(who: Person, text: str, server_id: int) -> int:
    found = await who.ok("GET", f"/servers/{server_id}/search?q={text}")
    return int(found["messages"][0]["author_id"])


async def test_invites_are_listed_and_revoked(api: World, tab: Any) -> None:
    (maya_api,), (server_id, _) = await create_class(api, "Maya")
    jonas_api = await api.person("Jonas")
    limited = await maya_api.invite(server_id, max_uses=2, expires_in=3600)
    spent = await maya_api.invite(server_id, max_uses=1)
    await jonas_api.ok("POST", f"/invites/{spent}")
    maya = await tab(maya_api)
    await maya.choose("#server", "Invite people")
    shown, link, rows = maya.locator("#invite-code"), maya.locator("#invite-link"), maya.locator("#invites li")
    await expect(rows).to_have_count(3)
    free = await shown.inner_text()
    assert free not in (limited, spent)
    await expect(maya.locator("#invite-warning")).to_contain_text("--lan")
    await expect(rows.filter(has_text=spent)).to_contain_text("used up")
    await expect(rows.filter(has_text=limited)).to_contain_text("2 of 2 left")
    await rows.filter(has_text=limited).locator("button").first.click()
    await expect(shown).to_have_text(limited)
    await expect(link).to_have_value(f"{maya.url}/#/invite/{limited}")
    await maya.locator('#invites li:has([aria-current="true"])').get_by_role("button", name="Revoke").click()
    await expect(shown).to_have_text(free)
    await expect(rows).to_have_count(2)
    await rows.filter(has_text=free).get_by_role("button", name="Revoke").click()
    await expect(maya.locator("#invite")).to_contain_text("No invite is valid now")
    await expect(maya.locator("#shared")).to_be_hidden()
    left = (await maya_api.ok("GET", f"/servers/{server_id}/invites"))["invites"]
    assert [one["code"] for one in left] == [spent]


async def test_invites_lead_to_the_public_address(tmp_path: Path, tab: Any) -> None:
    async with page_server(tmp_path / "public.db", "--public-url", "https://chat.example.org/") as public:
        maya = await tab(at=public.url)
        await maya.create_class()
        await maya.choose("#server", "Invite people")
        await expect(maya.locator("#invite-link")).to_have_value(re.compile("^https://chat.example.org/#/invite/"))
        await expect(maya.locator("#invite-warning")).to_be_hidden()
        await maya.page.close()


async def test_errors_are_shown_in_french(api: World, tab: Any) -> None:
    (maya_api,), (server_id, _) = await create_class(api, "Maya")
    code = await maya_api.invite(server_id)
    visitor = await tab(locale="fr-FR")
    visitor.ignored = "4[0-9]{2}"
    await visitor.open(f"/#/invite/{code}")
    await visitor.fill_and_enter("#username", "Maya")
    await expect(visitor.locator("#username-bad")).to_contain_text("Ce nom est déjà pris.")
    await visitor.click('#swap [data-mode="signIn"]')
    await expect(visitor.locator("#username-bad")).to_be_hidden()
    await visitor.sign_in("Maya", "wrong horse")
    await expect(visitor.locator("#sign-in-wrong")).to_have_text("Identifiant ou mot de passe incorrect.")
    await visitor.reject("**/auth/login", 429, "RATE_LIMITED", reason="TOO_OFTEN", retry_after=90)
    await visitor.click("#enter")
    waiting = visitor.locator('#sign-in-wrong [aria-hidden="true"]')
    await expect(waiting).to_have_text(re.compile("Réessayez dans (8[0-9]|90) s."))
    first = await waiting.inner_text()
    await expect(waiting).not_to_have_text(first)


async def second_tab(one: Tab) -> Tab:
    """Open a second tab of the same browser."""
    tab = Tab(await one.page.context.new_page(), one.url)
    await tab.open()
    return tab


async def test_only_rows_that_changed_are_rendered_again(two: Any, api: World) -> None:
    maya, _, (server_id, channel_id) = two
    await maya.api.post(channel_id, "hello @Jonas")
    message = await maya.api.post(channel_id, "as it was")
    await maya.sees("hello @Jonas")
    await maya.sees("as it was")
    await maya.evaluate("() => document.querySelectorAll('#log .row').forEach((row) => { row.isOld = true; })")
    (zoe,) = await api.people("Zoë")
    await zoe.ok("POST", f"/invites/{await maya.api.invite(server_id)}")
    await expect(maya.locator("#people")).to_contain_text("Zoë")
    await maya.api.ok("PATCH", f"/messages/{message['message_id']}", {"content": "as it is"})
    await maya.sees("as it is")
    old = await maya.evaluate("() => [...document.querySelectorAll('#log .row')].slice(-2).map((row) => row.isOld)")
    assert old == [True, None]


async def test_tabs_of_a_browser_share_a_draft(api: World, tab: Any) -> None:
    """What is typed in one tab appears in the others, so that none overwrites it."""
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab(maya_api)
    second = await second_tab(maya)
    await expect(second.locator("#my-status b")).to_have_text("Maya")
    await maya.fill("#text", "begun in one tab")
    await expect(second.locator("#text")).to_have_value("begun in one tab")
    await second.fill("#text", "begun in one tab, ended in another")
    await expect(maya.locator("#text")).to_have_value("begun in one tab, ended in another")
    await maya.reload()
    await expect(maya.locator("#text")).to_have_value("begun in one tab, ended in another")
    await maya.press("#text", "Enter")
    await second.sees("begun in one tab, ended in another")
    await expect(second.locator("#text")).to_have_value("")


async def test_a_password_change_keeps_the_tabs_of_this_browser(api: World, tab: Any) -> None:
    """Other browsers are signed out; signing out in one tab signs out all tabs of a browser."""
    (maya_api,), _ = await create_class(api, "Maya")
    maya, phone = await tab(maya_api), await tab(maya_api)
    second = await second_tab(maya)
    await expect(second.locator("#my-status b")).to_have_text("Maya")
    await maya.click('[data-do="settings"]')
    await maya.click("#set-password")
    await maya.fill('#ask input[name="old_password"]', "wrong horse")
    await maya.fill('#ask input[name="new_password"]', "a better one")
    maya.ignored = second.ignored = phone.ignored = NETWORK_ERRORS
    await maya.press('#ask input[name="new_password"]', "Enter")
    await expect(maya.locator("#ask-old_password-bad")).to_have_text("This is not your current password.")
    await expect(maya.locator('#ask input[name="new_password"]')).to_have_value("a better one")
    await maya.answer(old_password="correct horse")
    await expect(maya.locator("#toasts")).to_have_text("Password saved.")
    await expect(phone.locator("#sign-in-wrong")).to_contain_text("signed out")
    await second.write("still here")
    await maya.sees("still here")
    await second.sees("still here")
    await maya.sign_out()
    for one in (maya, second):
        await expect(one.locator("#sign-in-title")).to_have_text("Sign in")


async def test_a_dialog_keeps_what_was_typed(api: World, tab: Any) -> None:
    """A selection that ends outside does not close it, Escape keeps the text, and an error keeps the fields."""
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab(maya_api)
    field = maya.locator('#ask input[name="name"]')
    await maya.click('#channels [data-do="addChannel"]')
    await field.fill("homework")
    await maya.fill('#ask input[name="topic"]', "due on Monday")
    box = await field.bounding_box()
    await maya.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
    await maya.page.mouse.down()
    await maya.page.mouse.move(20, box["y"])
    await maya.page.mouse.up()
    await expect(field).to_have_value("homework")
    await expect(maya.locator("#ask")).to_be_visible()
    await maya.keyboard.press("Escape")
    await expect(maya.locator("#ask")).to_be_hidden()
    await maya.click('#channels [data-do="addChannel"]')
    await expect(field).to_have_value("homework")
    await field.fill("general")
    maya.ignored = "409"
    await field.press("Enter")
    await expect(maya.locator("#ask .bad:visible, #ask .wrong:visible")).to_have_text(
        "There is already a channel of this name."
    )
    await expect(maya.locator('#ask input[name="topic"]')).to_have_value("due on Monday")
    await maya.click("#ask .button >> text=Cancel")
    await maya.click('#channels [data-do="addChannel"]')
    await expect(field).to_have_value("")


async def test_the_next_user_of_a_tab_sees_nothing_that_was_typed(api: World, tab: Any) -> None:
    """The page keeps the text of a dialog and of the search until the user signs out."""
    people = await api.people("Maya", "Jonas")
    for person in people:
        await api.place(person)
    maya = await tab(people[0])
    field = maya.locator('#ask input[name="name"]')
    await maya.click('#channels [data-do="addChannel"]')
    await field.fill("private")
    await maya.keyboard.press("Escape")
    await maya.fill("#q", "secret")
    await maya.sign_out()
    await expect(maya.locator("#sign-in-title")).to_have_text("Sign in")
    await maya.sign_in("Jonas", "correct horse")
    await expect(maya.locator("#my-status b")).to_have_text("Jonas")
    await expect(maya.locator("#q")).to_have_value("")
    await maya.click('#channels [data-do="addChannel"]')
    await expect(field).to_have_value("")


async def test_an_answer_for_the_previous_user_of_a_tab_is_dropped(api: World, tab: Any) -> None:
    """Maya signs out before the page's first requests are answered. It does not go on with her answers: Jonas, who signs in
    next, does not see her servers, and nothing is requested without a token (a 401 would fail the test)."""
    maya_api, _ = await api.people("Maya", "Jonas")
    await api.place(maya_api, name="Biology 3B")
    held, released = asyncio.Event(), asyncio.Event()

    async def hold(route: Any) -> None:
        answer = await route.fetch()
        held.set()
        await released.wait()
        await route.fulfill(response=answer)

    maya = await tab()
    await maya.page.route("**/users/me/reads", hold, times=1)
    await maya.store_session(maya_api)
    async with asyncio.timeout(15):
        await held.wait()
    await maya.sign_out()
    await expect(maya.locator("#sign-in-title")).to_have_text("Sign in")
    async with maya.page.expect_response("**/users/me/reads") as answer:
        released.set()
    await (await answer.value).finished()
    await maya.sign_in("Jonas", "correct horse")
    await expect(maya.locator("#my-status b")).to_have_text("Jonas")
    await expect(maya.locator('#rail [aria-label="Biology 3B"]')).to_have_count(0)
    await expect(maya.locator("#empty")).to_be_visible()
    await expect(maya.locator("#toasts")).to_have_text("")


async def test_the_page_works_under_a_prefix(tmp_path: Path, tab: Any) -> None:
    """The server is mounted at /chat in another application."""
    arguments = [sys.executable, "-c", EMBEDDED, str(tmp_path / "embedded.db")]
    process = await asyncio.create_subprocess_exec(*arguments, cwd=HERE, stdout=asyncio.subprocess.PIPE)
    maya = await tab(at=await printed_address(process) + "/chat")
    await maya.create_class()
    await maya.write("from under a prefix")
    await maya.sees("from under a prefix")
    await maya.page.close()
    process.terminate()
    await process.communicate()


# Reading


BADGE = '#text-channels [data-id="%d"] .badge'
LEAVE = "document.hasFocus = () => false; dispatchEvent(new Event('blur'))"
RETURN = "document.hasFocus = () => true; dispatchEvent(new Event('focus'))"


async def unread_of(who: Person, channel_id: int) -> int:
    state = await who.ok("GET", f"/channels/{channel_id}/read")
    return int(state["unread"])


async def test_messages_on_screen_are_marked_as_read(two: Any) -> None:
    """The line and the button show where 300 unread messages begin; scrolling marks them as read step by step."""
    maya, jonas, (server_id, channel_id) = two
    other = await maya.api.channel(server_id, "homework")
    await maya.write("seen by both")
    await jonas.sees("seen by both")
    await eventually(lambda: fewer_unread(jonas.api, channel_id, 1), "the first message is read")
    await jonas.open_channel("homework")
    for start in range(0, 300, 50):
        await asyncio.gather(*(maya.api.post(channel_id, f"number {start + one};") for one in range(50)))
    await expect(jonas.locator(BADGE % channel_id)).to_have_text("99")
    await jonas.open_channel("general")
    await expect(jonas.locator("#log .fresh")).to_be_in_viewport()
    await expect(jonas.locator("#unread")).to_contain_text("new messages since")
    await expect(jonas.row("seen by both")).to_be_in_viewport()
    await jonas.shot("unread")
    first = await jonas.locator("#log .fresh + .row").inner_text()
    await eventually(lambda: fewer_unread(jonas.api, channel_id, 300), "messages on screen are read")
    assert await unread_of(jonas.api, channel_id) > 250
    for _ in range(3):
        before = await unread_of(jonas.api, channel_id)
        await jonas.evaluate("document.querySelector('#log').scrollBy(0, 500)")
        await eventually(lambda before=before: fewer_unread(jonas.api, channel_id, before), "messages on screen are read")
    await jonas.click('#unread [data-do="toUnread"]')
    await expect(jonas.locator("#log .fresh")).to_be_in_viewport()
    assert await jonas.locator("#log .fresh + .row").inner_text() == first, "the line has not moved"
    await jonas.click('#unread [data-do="markAll"]')
    await expect(jonas.locator("#unread")).to_be_hidden()
    await eventually(lambda: fewer_unread(jonas.api, channel_id, 1), "all are marked as read")
    await jonas.keyboard.press("Escape")
    await expect(jonas.locator("#log .row").last).to_be_in_viewport()
    await jonas.open_channel("homework")
    await maya.api.post(other, "in homework")
    await jonas.sees("in homework")
    assert await unread_of(jonas.api, channel_id) == 0


async def fewer_unread(who: Person, channel_id: int, before: int) -> bool:
    return await unread_of(who, channel_id) < before


async def test_unread_counts_agree_on_two_devices(two: Any, tab: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    await maya.api.channel(server_id, "homework")
    phone = await tab(jonas.api)
    for one in (jonas, phone):
        await one.open_channel("homework")
    for text in ("first;", "second @Jonas;", "third;"):
        await maya.write(text)
    for one in (jonas, phone):
        await expect(one.page).to_have_title(re.compile(r"^\(3\)"))
        await expect(one.locator(BADGE % channel_id)).to_have_class(re.compile("hot"))
    await phone.open_channel("general")
    for one in (jonas, phone):
        await expect(one.locator(BADGE % channel_id)).to_be_hidden()
    await phone.tool("second", "unread")
    for one in (jonas, phone):
        await expect(one.page).to_have_title(re.compile(r"^\(2\)"))
    await expect(phone.locator("#log .fresh + .row")).to_contain_text("second")
    second = await maya.api.ok("GET", f"/channels/{channel_id}/messages?limit=2")
    await maya.api.ok("PATCH", f"/messages/{second['messages'][0]['message_id']}", {"content": "second, for nobody;"})
    await expect(jonas.locator(BADGE % channel_id)).not_to_have_class(re.compile("hot"))
    await expect(phone.row("for nobody")).not_to_have_class(re.compile("named"))
    await maya.api.ok("DELETE", f"/messages/{second['messages'][1]['message_id']}")
    for one in (jonas, phone):
        await expect(one.page).to_have_title(re.compile(r"^\(1\)"))
    await phone.write("my own answer")
    for one in (jonas, phone):
        await expect(one.page).to_have_title(re.compile(r"^\w"))


async def test_a_line_marks_where_the_tab_was_left(two: Any) -> None:
    maya, jonas, (_, channel_id) = two
    await jonas.evaluate(
        "window.titles = []; new MutationObserver(() => titles.push(document.title))"
        ".observe(document.querySelector('title'), {childList: true})"
    )
    await maya.write("while he looks")
    await jonas.sees("while he looks")
    await eventually(lambda: fewer_unread(jonas.api, channel_id, 1), "it is read")
    assert [one for one in await jonas.evaluate("titles") if one.startswith("(")] == [], "the title does not flash"
    await jonas.evaluate(LEAVE)
    for number in range(40):
        await maya.write(f"while he is away {number};")
    await expect(jonas.page).to_have_title(re.compile(r"^\(40\)"))
    await expect(jonas.locator("#log .fresh")).to_be_in_viewport()
    await jonas.evaluate(RETURN)
    await expect(jonas.page).not_to_have_title(re.compile(r"^\(40\)"))
    await expect(jonas.locator("#log .fresh + .row")).to_contain_text("away 0;")
    await jonas.click("#newest")
    await expect(jonas.page).to_have_title(re.compile(r"^general"))
    await maya.write("and on")
    await jonas.sees("and on")
    await expect(jonas.locator("#log .fresh + .row")).to_contain_text("away 0;")


@pytest.mark.parametrize("path, number", [("**/channels/*/read", 1), ("**/users/me/reads", 2)])
async def test_a_late_answer_does_not_lower_the_unread_count(api: World, tab: Any, path: str, number: int) -> None:
    """A message arrives while an older read mark is on its way: it stays counted, and the page fetches the mark again."""
    (maya, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    requests, held, released = itertools.count(1), asyncio.Event(), asyncio.Event()

    async def hold(route: Any) -> None:
        if route.request.method != "GET" or next(requests) != number:
            await route.continue_()
            return
        answer = await route.fetch()
        held.set()
        await released.wait()
        await route.fulfill(response=answer)

    jonas = await tab()
    await jonas.page.route(path, hold)
    await jonas.enter(jonas_api)
    await jonas.evaluate(LEAVE)
    first = await maya.post(channel_id, "first")
    await expect(jonas.page).to_have_title(re.compile(r"^\(1\)"))
    await maya.ok("PATCH", f"/messages/{first['message_id']}", {"content": "first, edited"})
    async with asyncio.timeout(15):
        await held.wait()
    await maya.post(channel_id, "second")
    await expect(jonas.page).to_have_title(re.compile(r"^\(2\)"))
    await jonas.evaluate(
        "window.titles = []; new MutationObserver(() => titles.push(document.title))"
        ".observe(document.querySelector('title'), {childList: true})"
    )
    async with jonas.page.expect_request(f"**/channels/{channel_id}/read") as again:
        released.set()
    await (await again.value).response()
    await expect(jonas.page).to_have_title(re.compile(r"^\(2\)"))
    assert [one for one in await jonas.evaluate("titles") if not one.startswith("(2)")] == []


async def test_rows_have_days_reactions_and_times(api: World, tab: Any) -> None:
    """Days follow the calendar even after a clock was set back; former members keep a name; the time is in the margin."""
    (maya_api, jonas_api), (server_id, channel_id) = await create_class(api, "Maya", "Jonas")
    rows = [await maya_api.post(channel_id, f"row {number}") for number in range(5)]
    jonas_id = jonas_api.user_id
    await jonas_api.ok("DELETE", f"/servers/{server_id}/members/{jonas_id}")
    days = (
        "2026-03-28T12:00:00Z",
        "2026-03-29T12:00:00Z",
        "2026-03-28T13:00:00Z",
        "2026-03-29T21:00:00Z",
        "2026-03-29T21:01:00Z",
    )
    for row, day in zip(rows, days, strict=True):
        row["created_at"] = day
    reactions = [("\u2764", [jonas_id]), ("\u2764\ufe0f", [jonas_id, maya_api.user_id])]
    rows[0]["reactions"] = [{"emoji": emoji, "user_ids": user_ids} for emoji, user_ids in reactions]
    maya = await tab(timezone_id="Europe/Paris")
    await maya.page.route("**/messages?*", lambda route: route.fulfill(json={"messages": rows, "has_more": False}))
    await maya.page.clock.set_fixed_time("2026-03-29T22:30:00Z")  # half past midnight, after a day of 23 hours
    await maya.enter(maya_api)
    saturday = "Saturday 28 March"
    await expect(maya.locator("#log .day")).to_have_text([saturday, "Yesterday", saturday, "Yesterday"])
    await expect(maya.locator("#log > *").last).to_contain_text("row 4")
    await expect(maya.row("row 0").locator(".reactions button")).to_have_text("\u2764\ufe0f 2")
    await expect(maya.row("row 0").locator(".reactions button")).to_have_attribute("title", "Jonas, Maya")
    await maya.row("row 4").hover()
    time_box = await maya.row("row 4").locator("> time").bounding_box()
    text_box = await maya.row("row 4").locator(".said").bounding_box()
    await expect(maya.row("row 4").locator("> time")).to_be_visible()
    assert time_box["x"] + time_box["width"] <= text_box["x"]


# Writing


async def test_enter_that_ends_a_composition_sends_nothing(two: Any) -> None:
    maya, jonas, _ = two
    await maya.fill("#text", "にほん")
    for init in ({"keyCode": 229}, {"isComposing": True}):
        await maya.evaluate(
            """init => document.querySelector('#text').dispatchEvent(
                new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...init}))""",
            init,
        )
    await expect(maya.locator("#text")).to_have_value("にほん")
    await expect(maya.locator("#log .row")).to_have_count(0)
    await maya.press("#text", "Enter")
    await jonas.sees("にほん")


async def test_nothing_typed_is_lost(two: Any) -> None:
    maya, jonas, _ = two
    await maya.intercept_posts()
    await maya.reload()
    maya.post_answer = {"code": "FORBIDDEN", "error": "Not today"}
    await maya.write("refused text")
    await expect(maya.row("refused text").locator(".fate")).to_contain_text("Not sent")
    maya.post_answer = None
    await maya.fill("#text", "a draft")
    await maya.row("refused text").get_by_role("button", name="Edit").click()
    await expect(maya.locator("#text")).to_have_value("a draft\nrefused text")
    await maya.fill("#text", "")
    # while an edit is being saved, the composer is free for other text
    await maya.write("to be changed")
    row = await maya.sees("to be changed")
    held = asyncio.Event()

    async def hold(route: Any) -> None:
        if route.request.method == "PATCH":
            await held.wait()
        await route.continue_()

    await maya.page.route("**/messages/*", hold)
    await maya.fill("#text", "typed before")
    await maya.tool("to be changed", "edit")
    await maya.write("has been changed")
    await expect(maya.row("has been changed")).to_have_class(re.compile("waiting"))
    await expect(maya.locator("#text")).to_have_value("typed before")
    await maya.fill("#text", "typed meanwhile")
    held.set()
    await jonas.sees("has been changed")
    await maya.sees("has been changed")
    await expect(maya.locator("#text")).to_have_value("typed meanwhile")
    await expect(maya.locator("#about")).to_be_hidden()
    # an edit that is interrupted by a reply is kept, and so is the draft
    await maya.tool("has been changed", "edit")
    await maya.fill("#text", "half an edit")
    await maya.tool("has been changed", "reply")
    await expect(maya.locator("#text")).to_have_value("typed meanwhile")
    await maya.tool("has been changed", "edit")
    await expect(maya.locator("#text")).to_have_value("half an edit")
    await maya.press("#text", "Escape")
    await expect(maya.locator("#text")).to_have_value("typed meanwhile")
    assert await row.count() == 0


async def test_text_for_a_deleted_channel_is_kept(api: World, proxy: Proxy, tab: Any) -> None:
    (maya_api, jonas_api), (server_id, _) = await create_class(api, "Maya", "Jonas")
    doomed = await maya_api.channel(server_id, "doomed")
    jonas = await tab(jonas_api, at=proxy.url)
    jonas.ignored = NETWORK_ERRORS
    await jonas.open_channel("doomed")
    await proxy.cut(jonas)
    await jonas.write("written offline")
    await expect(jonas.row("written offline")).to_have_class(re.compile("waiting"))
    await maya_api.ok("DELETE", f"/channels/{doomed}")
    await proxy.start()
    lost = jonas.locator("#orphans .orphan")
    await expect(lost).to_contain_text("written offline", timeout=30000)
    await jonas.shot("orphan")
    await jonas.reload()
    await expect(lost).to_contain_text("written offline")
    await lost.get_by_role("button", name="Discard").click()
    await expect(lost).to_have_count(0)


async def test_unknown_channels_and_an_unreachable_server_are_reported(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    maya.ignored = NETWORK_ERRORS
    await maya.open("/#/channel/999")
    await expect(maya.locator("#notice")).to_contain_text("Channel not found")
    await expect(maya.locator("#log")).to_be_hidden()
    await maya.reload()
    await expect(maya.locator("#notice")).to_contain_text("not a member of its server")
    await maya.click("#notice .button")
    await expect(maya.locator("#room-name")).to_have_text("general")
    await maya.write("for a reply")
    await maya.sees("for a reply")
    doomed = await maya_api.post(channel_id, "soon gone")
    await maya.tool("soon gone", "reply")
    await maya.fill("#text", "an answer")
    await maya_api.ok("DELETE", f"/messages/{doomed['message_id']}")
    await expect(maya.row("soon gone")).to_have_count(0)
    await expect(maya.locator("#about")).to_contain_text("Message deleted")
    await maya.page.route("**/users/me", lambda route: route.abort())
    await maya.reload()
    await expect(maya.locator("#notice")).to_contain_text("The server does not answer")
    await maya.shot("late")
    await maya.page.unroute("**/users/me")
    await expect(maya.locator("#room-name")).to_have_text("general")
    await maya.reject("**/messages?*", 503, "UNAVAILABLE")
    await maya.reload()
    await expect(maya.locator("#log")).to_contain_text("The server does not answer")
    await maya.page.unroute("**/messages?*")
    await maya.sees("for a reply")


def test_the_page_handles_every_event() -> None:
    page = (HERE / "chatrtc.html").read_text("utf-8")
    tables = re.findall(r"^Object\.assign\(onEvent, \{\n(.*?)^\}\);", page, re.DOTALL | re.MULTILINE)
    assert tables, "the page's tables of event handlers, Object.assign(onEvent, {...}), were not found"
    handlers = dict(re.findall(r'^  "([\w:]+)"(.*)', "".join(tables), re.MULTILINE))
    missing = sorted(set(chatrtc.EVENTS) - set(handlers))
    assert not missing, f"add a handler for {missing} to `onEvent` in chatrtc.html, or an empty one with the reason"
    unknown = sorted(set(handlers) - set(chatrtc.EVENTS))
    assert not unknown, f"the server emits no {unknown}: delete the handlers in `onEvent` of chatrtc.html"
    idle = [event for event, code in handlers.items() if "=> {}" in code and "//" not in code]
    assert not idle, f"say in a comment why the page does nothing on {idle}"


async def test_search_marks_its_matches(two: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    lab = await maya.api.channel(server_id, "lab notes")
    texts = {
        "病院": "今日の病院は機能していない",
        "สอบ": "วันนี้มีสอบคณิตศาสตร์",
        "home": f"{'a long beginning ' * 60}then Homework at last{' and so on' * 40}",
        "strasse": "die Straße",
        '"white mouse"': "a white mouse, not a mouse that is white",
        "eleve": "l'Élève",
    }
    for text in texts.values():
        await maya.api.post(channel_id, text)
    await jonas.api.post(lab, "homework from Jonas")
    marks = {"home": ["Home", "home"], "strasse": ["Straße"], '"white mouse"': ["white mouse"], "eleve": ["Élève"]}

    async def ask(q: str, hits: int) -> bool:
        await jonas.search(q)
        await expect(jonas.locator("#found > *").first).not_to_have_text("Searching…")
        return bool(await jonas.locator(".hit").count() == hits)

    for q in texts:
        await eventually(lambda q=q: ask(q, len(marks.get(q, [q]))), f"search finds {q}")
        found = await jonas.locator(".hit mark").all_inner_texts()
        assert sorted(found) == sorted(marks.get(q, [q]))
        for mark in await jonas.locator(".hit mark").all():
            hit = mark.locator("xpath=ancestor::p")
            box, edge = await mark.bounding_box(), await hit.bounding_box()
            assert box["y"] + box["height"] <= edge["y"] + edge["height"] + 1, "the excerpt contains the mark"
    for q in ("home from:jonas", 'home in:"lab notes"', "from:@Jonas home"):
        assert await ask(q, 1)
        await expect(jonas.locator(".hit")).to_contain_text("from Jonas")
    await ask("home from:nobody", 0)
    await expect(jonas.locator("#found")).to_have_text("Nobody here is called “nobody”.")
    await ask("home in:nowhere", 0)
    await expect(jonas.locator("#found")).to_have_text("No channel is called “nowhere”.")
    await jonas.fill("#q", "from:")
    assert "from:Maya " in await jonas.locator("#q-names option").evaluate_all("all => all.map((one) => one.value)")
    jonas.ignored = NETWORK_ERRORS
    await jonas.page.route("**/search?*", lambda route: route.abort())
    await ask("mouse", 0)
    await expect(jonas.locator("#found")).to_contain_text("The server does not answer.")
    await jonas.page.unroute("**/search?*")
    await jonas.click("#found .button")
    await expect(jonas.locator(".hit mark").first).to_have_text("mouse")


# Connections


async def test_a_reconnect_needs_few_requests(api: World, proxy: Proxy, tab: Any) -> None:
    """15 servers cost no request each, and a new member re-renders no message."""
    maya_api, jonas_api = await api.people("Maya", "Jonas")
    servers = [await api.place(maya_api, name=f"Class {number}") for number in range(14)]
    servers.append(await api.place(maya_api, jonas_api, name="Class 14"))
    for text in ("hello", "to @nobody", "and so on"):
        await maya_api.post(servers[0].channel_id, text)
    maya = await tab(maya_api, at=proxy.url)
    maya.ignored = NETWORK_ERRORS
    await maya.sees("and so on")
    await expect(maya.locator("#people")).to_contain_text("Maya")
    asked: list[str] = []
    maya.page.on("request", lambda request: asked.append(request.url) if "/socket.io/" not in request.url else None)
    await proxy.cut(maya)
    asked.clear()
    await jonas_api.post(servers[14].channel_id, "while away")
    await proxy.start(maya)
    await expect(maya.locator('#rail [aria-label="Class 14, 1 new message"]')).to_be_visible()
    await eventually(lambda: has_counted(asked), "the page has counted the unread messages")
    await jonas_api.post(servers[14].channel_id, "when it is back")
    await expect(maya.locator('#rail [aria-label="Class 14, 2 new messages"]')).to_be_visible()
    assert len(asked) <= 6, asked
    await maya.evaluate("for (const row of document.querySelectorAll('#log .row')) row.known = true")
    await jonas_api.ok("POST", f"/invites/{await maya_api.invite(servers[0].server_id)}")
    await expect(maya.locator("#people")).to_contain_text("Jonas")
    await jonas_api.post(servers[0].channel_id, "here I am")
    await maya.sees("here I am")
    assert await maya.evaluate("[...document.querySelectorAll('#log .row')].map((row) => Boolean(row.known))") == [
        True, True, True, False,
    ]  # fmt: skip


async def has_counted(asked: list[str]) -> bool:
    """Tell if the page has requested all read marks for the second time, which is its last request."""
    return sum(one.endswith("/users/me/reads") for one in asked) == 2


async def test_an_unknown_event_makes_the_page_fetch_changes(api: World, tab: Any) -> None:
    """If a newer server sends an unknown event, the page fetches the changes, again if that fails."""
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    message = await maya_api.post(channel_id, "Rain on Friday")
    maya = await tab()

    def rename(socket: Any) -> None:
        server = socket.connect_to_server()
        server.on_message(lambda text: socket.send(text.replace('"reaction:add"', '"message:starred"')))

    await maya.page.route_web_socket("**/socket.io/**", rename)
    await maya.enter(maya_api)
    await maya.sees("Rain on Friday")
    maya.ignored = NETWORK_ERRORS
    await maya.page.route("**/changes?*", lambda route: route.abort(), times=1)
    await jonas_api.ok("PUT", f"/messages/{message['message_id']}/reactions/{quote('👍')}")
    await expect(maya.row("Rain on Friday").locator(".reactions")).to_have_text("👍 1")
    await maya.write("and on Saturday")
    await maya.sees("and on Saturday")


async def test_the_page_reloads_its_data_after_a_restore(tmp_path: Path, tab: Any, unused_tcp_port: int) -> None:
    """A page with messages that the restored database lacks discards its copy and loads everything again."""
    database = ("--database", str(tmp_path / "restored.db"))
    address = ("--port", str(unused_tcp_port), "--no-rate-limit")
    process = await Process.start(tmp_path / "restored.db", *address)
    async with process.world() as restored:
        (maya_api,), (_, channel_id) = await create_class(restored, "Maya")
        await maya_api.post(channel_id, "kept;")
        gone = await maya_api.post(channel_id, "deleted after the backup;")
        await run_ok("backup", str(tmp_path / "copy"), *database)
        maya = await tab(maya_api, at=process.url)
        maya.ignored = NETWORK_ERRORS
        await maya.sees("kept;")
        await maya_api.post(channel_id, "lost;")
        await maya_api.ok("DELETE", f"/messages/{gone['message_id']}")
        await maya.sees("lost;")
        await process.stop()
        await run_ok("restore", str(tmp_path / "copy"), *database)
        process = await Process.start(tmp_path / "restored.db", *address)
        await expect(maya.locator("#offline")).to_be_hidden(timeout=30000)
        await expect(maya.locator("#log .row .said")).to_have_text(["kept;", "deleted after the backup;"])
        await maya.write("after the restore")
        await maya.sees("after the restore")
        await maya.page.close()
    await process.stop()


# Two browsers


class Device:
    """A browser that is used as a person would: with keys, and with a pointer on visible elements."""

    async def evaluate(self, expression: str) -> Any:
        raise NotImplementedError

    async def open(self, url: str) -> None:
        raise NotImplementedError

    async def keys(self, text: str) -> None:
        raise NotImplementedError

    async def point(self, x: int, y: int) -> None:
        raise NotImplementedError

    async def find(self, selector: str, text: str = "", then: str = "true") -> Any:
        """Wait for a visible element (`one`) with the text and return the value of the script `then`."""
        script = f"""(() => {{ const one = [...document.querySelectorAll({json.dumps(selector)})]
            .find((one) => one.getClientRects().length && one.innerText.includes({json.dumps(text)}));
            if (!one) return null; one.scrollIntoView({{block: "nearest"}}); return {then}; }})()"""
        return await eventually(lambda: self.evaluate(script), f"{text!r} in {selector}", 30)

    async def sees(self, text: str, selector: str = "body") -> None:
        await self.find(selector, text)

    async def type(self, selector: str, text: str) -> None:
        await self.find(selector, then="(one.focus(), true)")
        await self.keys(text)

    async def click(self, selector: str, text: str = "") -> None:
        """Click on the element as soon as nothing covers it."""
        at = """(() => { const {x, y, width, height} = one.getBoundingClientRect(), at = [x + width / 2, y + height / 2];
            return one.contains(document.elementFromPoint(...at)) && at.map(Math.round).join(" "); })()"""
        await self.point(*map(int, (await self.find(selector, text, at)).split()))


class Chromium(Device):
    """Chromium, driven by Playwright."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab

    async def evaluate(self, expression: str) -> Any:
        return await self.tab.evaluate(expression)

    async def open(self, url: str) -> None:
        await self.tab.goto(url)

    async def keys(self, text: str) -> None:
        await self.tab.keyboard.type(text)

    async def point(self, x: int, y: int) -> None:
        await self.tab.mouse.click(x, y)


class Firefox(Device):
    """Firefox itself, driven by WebDriver BiDi."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, context: str = "", numbers: Iterator[int] | None = None) -> None:
        self.ws, self.context, self.numbers = ws, context, numbers or itertools.count(1)

    async def ask(self, method: str, **params: Any) -> Any:
        number = next(self.numbers)
        await self.ws.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await self.ws.receive_json(timeout=60)
            if answer.get("id") == number:
                assert answer["type"] == "success", answer
                return answer["result"]

    async def new_window(self) -> Firefox:
        """Open a window with its own storage."""
        user = (await self.ask("browser.createUserContext"))["userContext"]
        made = await self.ask("browsingContext.create", type="window", userContext=user)
        await self.ask("browsingContext.setViewport", context=made["context"], viewport={"width": 1280, "height": 800})
        return Firefox(self.ws, made["context"], self.numbers)

    async def evaluate(self, expression: str) -> Any:
        target = {"context": self.context}
        found = await self.ask("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert found["type"] == "success", found
        return found["result"].get("value")

    async def open(self, url: str) -> None:
        await self.ask("browsingContext.activate", context=self.context)
        await self.ask("browsingContext.navigate", context=self.context, url=url, wait="complete")

    async def keys(self, text: str) -> None:
        keys = [{"type": kind, "value": key} for key in text.replace("\n", "\ue007") for kind in ("keyDown", "keyUp")]
        await self._perform({"type": "key", "id": "keys", "actions": keys})

    async def point(self, x: int, y: int) -> None:
        move = {"type": "pointerMove", "x": x, "y": y}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        await self._perform({"type": "pointer", "id": "mouse", "actions": [move, *press]})

    async def _perform(self, actions: dict[str, Any]) -> None:
        await self.ask("browsingContext.activate", context=self.context)
        await self.ask("input.performActions", context=self.context, actions=[actions])


FIREFOX = os.environ.get("FIREFOX", "/usr/bin/firefox-esr")
BROWSERS = [
    "chromium",
    pytest.param("firefox", marks=pytest.mark.skipif(not Path(FIREFOX).exists(), reason="needs firefox-esr")),
]


@contextlib.asynccontextmanager
async def firefox_running(home: Path) -> AsyncIterator[Firefox]:
    home.mkdir()
    process = await asyncio.create_subprocess_exec(
        *(FIREFOX, "--headless", "--no-remote", "--remote-debugging-port", "0", "--profile", str(home)),
        env=os.environ | {"HOME": str(home), "MOZ_DISABLE_CONTENT_SANDBOX": "1"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(90):
            while not (found := re.search(r"BiDi listening on (ws://\S+)", line := (await process.stderr.readline()).decode())):
                assert line, "Firefox did not start"
        drain = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as http, http.ws_connect(found[1] + "/session", max_msg_size=0) as ws:
            one = Firefox(ws)
            await one.ask("session.new", capabilities={})
            yield one
            await one.ask("browser.close")
        await asyncio.wait_for(process.wait(), 30)
        await drain
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def device(request: pytest.FixtureRequest, tab: Any, tmp_path: Path) -> AsyncIterator[Callable[[], Awaitable[Device]]]:
    """A function that opens devices, all with the browser that the test names."""
    if request.param == "firefox":
        async with firefox_running(tmp_path / "home") as firefox:
            yield firefox.new_window
        return

    async def chromium() -> Device:
        opened = await tab()
        opened.ignored = "401"  # a request that was under way during a sign-out
        return Chromium(opened)

    yield chromium


async def give_name(device: Device, name: str, password: str = "") -> None:
    if password:
        await device.type("#username", name)
        await device.type("#password", f"{password}\n")
    else:
        await device.type("#username", f"{name}\n")
    await device.sees(name, "#my-status b")


@pytest.mark.parametrize("device", BROWSERS, indirect=True)
async def test_a_newcomers_class_talks_on_all_its_devices(api: World, device: Any) -> None:
    """A teacher creates a server, a guest joins by its code, talks, and returns by a sign-in link; two devices agree."""
    maya, leo, phone = await device(), await device(), await device()
    await maya.open(api.url)
    await give_name(maya, "Maya", "correct horse")
    await maya.click("#empty button", "Create a server")
    await maya.type("#ask input", "Biology 3B\n")
    await maya.sees("general", "#room-name")
    await maya.click("#channels [data-do=addChannel]")
    await maya.type("#ask input[name=name]", "homework\n")
    await maya.sees("homework", "#room-name")
    await maya.click("#server")
    await maya.click("#menu button", "Invite people")
    code = await maya.find("#invite-code", "-", "one.innerText")
    assert await maya.find("#qr", then="one.naturalWidth > 0")
    assert await maya.evaluate("document.querySelector('#invite-link').value") == f"{api.url}/#/invite/{code}"
    await maya.click("#invite [data-do=close]")
    await leo.open(api.url)
    await leo.click("#swap button", "I have a code")
    await leo.type("#code", f"{code.lower()}\n")
    await leo.sees("Biology 3B", "#invited")
    await give_name(leo, "Léo Martin")
    await leo.sees("general", "#room-name")
    await phone.open(api.url)
    await phone.click("#swap button", "I already have an account")
    await give_name(phone, "Maya", "correct horse")
    await phone.click("#text-channels button", "homework")
    await phone.sees("homework", "#room-name")
    for text in ("hello from *Léo*", "is the `pH` right, @Maya?", "see https://example.org/ponds"):
        await leo.type("#text", f"{text}\n")
        await leo.sees(text.split()[0], "#log .row:not(.waiting) .said")
    for one in (maya, phone):
        await one.sees("1", "#text-channels .badge.hot")
        assert (await one.evaluate("document.title")).startswith("(3) homework")
    await phone.click("#text-channels button", "general")
    await phone.sees("@Maya", "#log .row.named .at")
    for one in (maya, phone):
        await eventually(lambda one=one: one.evaluate("!document.title.startsWith('(')"), "the messages are read", 30)
    await maya.click("#text-channels button", "general")
    await maya.sees("Léo", "#log .said em")
    await maya.type("#text", "welcome, @le\n\n")
    await leo.sees("@Léo.Martin", "#log .row.named .at")
    await leo.click("#people .person", "Maya")
    await leo.click("#menu button", "Send private message")
    await leo.sees("Maya", "#room-name")
    await leo.type("#text", "may I ask you something?\n")
    await maya.click("#unread-conversations button")
    await phone.click("#private")
    for one in (maya, phone):
        await one.sees("may I ask you something?", "#log .said")
        await one.sees("Léo Martin", "#conversations .here")
        await one.click("#servers button")
        await one.sees("general", "#room-name")
    await leo.click("#me [data-do=settings]")
    await leo.click("#preferences button", "Sign out")
    await leo.click("#ask button", "Sign out")
    await leo.sees("Sign in", "#sign-in-title")
    await maya.click("#people .person", "Léo Martin")
    await maya.click("#menu button", "Sign-in link")
    await maya.sees("Sign-in link for Léo Martin", "#invite-title")
    tomorrow = await device()
    await tomorrow.open(await maya.evaluate("document.querySelector('#invite-link').value"))
    await tomorrow.click("#enter")
    await tomorrow.sees("Léo Martin", "#my-status b")
    await tomorrow.sees("welcome, @Léo.Martin", "#log .said")
    await tomorrow.type("#text", "back again\n")
    await phone.sees("back again", "#log .said")
    for one in (maya, phone, tomorrow):
        assert await one.evaluate("document.documentElement.scrollWidth <= innerWidth")


# Hostile text

RUN = "window.__xss=1"
VECTORS = [
    f"<script>{RUN}</script>", f"<img src=x onerror={RUN}>", f"<svg onload={RUN}>", f"<svg><script>{RUN}</script></svg>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'>", f"<body onload={RUN}>", f"<details open ontoggle={RUN}>",
    f"<input autofocus onfocus={RUN}>", f"<video><source onerror={RUN}>", f"<a href=javascript:{RUN}>x</a>",
    f"[x](javascript:{RUN})", f"[x](data:text/html,<script>{RUN}</script>)", f'[x](https://a.b/"onmouseover="{RUN})',
    f"javascript:{RUN}", f"https://a.b/'onclick='{RUN}", f"<style>@import 'javascript:{RUN}'</style>",
    f"<template><script>{RUN}</script></template>", f"<math href=javascript:{RUN}>x",
    f"<form action=javascript:{RUN}><button>x", f"${{{RUN}}}", f"{{{{constructor.constructor('{RUN}')()}}}}",
    f"<object data=javascript:{RUN}>", f"<meta http-equiv=refresh content='0;javascript:{RUN}'>",
    f"<base href=javascript:{RUN}//>", f"<x tabindex=0 autofocus onfocus={RUN}>",
]  # fmt: skip
WRAPS = [
    "%s", '">%s', "'>%s", "</span>%s", "`%s`", "**%s**", "> %s", "```\n%s\n```", "- %s", "@Maya %s", "[%s](https://a.b)",
    "</textarea></title></style>%s",
]  # fmt: skip
ODD = """[...document.querySelectorAll(`#app :is(script, style, iframe, object, base, meta, form:not([id]), video,
    math, details, body, template), #log :is(img, input), [onerror], [onload], [onfocus], [onclick], [onmouseover],
    [ontoggle], a:not([href^=http], [href^="mailto:"], .skip)`)].map((node) => node.outerHTML)"""
PAYLOADS = [wrap % vector for vector, wrap in itertools.product(VECTORS, WRAPS)]


async def test_no_hostile_text_is_executed(two: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    assert len(PAYLOADS) == 300
    for number, payload in enumerate(PAYLOADS):
        name = " ".join(payload.split())[:100]
        await maya.api.call("PATCH", f"/servers/{server_id}", {"name": name})
        await maya.api.call("PATCH", f"/channels/{channel_id}", {"name": name, "topic": payload})
        await maya.api.call("POST", "/auth/register", {"username": payload[:32], "password": payload})
        said = await jonas.api.post(channel_id, f"{payload}\n\nno. {number};")
        emoji = quote("/".join(payload.split())[:32], safe="")
        await maya.api.call("PUT", f"/messages/{said['message_id']}/reactions/{emoji}")
        if number % 10 == 0:
            await expect(maya.row(f"no. {number};")).to_have_count(1)
            await maya.search(payload.replace("\n", " ")[:100])
            await expect(maya.locator("#side h2")).to_contain_text("Results for")
            await maya.tool(f"no. {number};", "react")
            await maya.fill_and_enter("#emoji input", "/".join(payload.split())[:32])
            await expect(jonas.row(f"no. {number};").locator(".reactions button").first).to_be_visible()
            await jonas.fill("#text", payload)
            await jonas.tool(f"no. {number};", "reply")
            await jonas.write(f"{payload} again {number};")
            await expect(maya.row(f"again {number};").locator(".quote")).to_be_visible()
    await maya.reload()
    await expect(maya.row(f"no. {len(PAYLOADS) - 1};")).to_have_count(1)
    for one in (maya, jonas):
        assert await one.evaluate("window.__xss") is None
        assert await one.evaluate(ODD) == []


# Files

PAINT = """([width, height, type]) => {
    const canvas = Object.assign(document.createElement("canvas"), {width, height}), pen = canvas.getContext("2d");
    const colours = pen.createLinearGradient(0, 0, width, height);
    for (const [at, colour] of ["#0b6b5c", "#efbd67", "#4a6fb5"].entries()) colours.addColorStop(at / 2, colour);
    pen.fillStyle = colours;
    pen.fillRect(0, 0, width, height);
    return canvas.toDataURL(type, 0.9).replace(/.*,/, "");
}"""
COPY = """async (data) => {
    const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
    await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
}"""
IS_LOADED = "(img) => img.complete && img.naturalWidth > 0"


async def paint(tab: Tab, width: int, height: int, kind: str = "image/png") -> bytes:
    """Return a picture of this size."""
    return base64.b64decode(await tab.evaluate(PAINT, [width, height, kind]))


def with_location(jpeg: bytes, orientation: int) -> bytes:
    """Add Exif data as a phone's camera does: how it was held, and where."""
    fields = [struct.pack(">HHIHH", 0x112, 3, 1, orientation, 0), struct.pack(">HHII", 0x8825, 4, 1, 38)]
    place = [struct.pack(">HHI4s", 1, 2, 2, b"N"), struct.pack(">HHII", 2, 5, 3, 68)]
    tables = [struct.pack(">H", 2) + b"".join(rows) + bytes(4) for rows in (fields, place)]
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + b"".join(tables) + struct.pack(">6I", 52, 1, 31, 1, 12, 1)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


async def upload(who: Person, channel_id: int, name: str, data: bytes, **facts: Any) -> int:
    """Upload a file and return its id."""
    return int((await uploaded(who, channel_id, data, name=name, **facts))["file_id"])


async def loaded(picture: Locator) -> None:
    await picture.wait_for()
    await eventually(lambda: picture.evaluate(IS_LOADED), "the picture")


async def files_of(who: Person, channel_id: int) -> list[dict[str, Any]]:
    """Return the files of the last message."""
    return list((await channel_history(who, channel_id))[-1]["files"])


@pytest.mark.parametrize("width", [1280, 390])
async def test_a_pasted_picture_arrives(api: World, tab: Any, width: int) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya, jonas = [await tab(one, viewport={"width": width, "height": 800}) for one in (maya_api, jonas_api)]
    await maya.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    await maya.evaluate(COPY, base64.b64encode(await paint(maya, 300, 200)).decode())
    await maya.fill("#text", "look at this")
    start = time.monotonic()
    await maya.press("#text", "Control+V")
    await maya.press("#text", "Enter")
    await loaded(jonas.locator("#log .picture img"))
    assert time.monotonic() - start < bound(2)
    await maya.sees("look at this")
    await loaded(maya.locator("#log .picture img"))
    assert (await files_of(maya_api, channel_id))[0] | {"size": 0} == {
        "file_id": 1, "name": "image.png", "type": "image/png", "size": 0, "width": 300, "height": 200,
    }  # fmt: skip
    await expect(maya.locator("#attachments")).to_be_hidden()
    await maya.press("#text", "Control+V")
    await maya.press("#text", "Enter")
    await expect(jonas.locator("#log .row")).to_have_count(2)
    await jonas.locator("#log .row").last.hover()
    await jonas.locator('#log .row [data-do="reply"]').last.click()
    await jonas.write("nice")
    await expect((await maya.sees("nice")).locator(".quote")).to_contain_text("📎 image.png")
    assert await jonas.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_files_are_dropped_cancelled_and_limited(api: World, tab: Any, tmp_path: Path) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya, jonas = await tab(maya_api), await tab(jonas_api)
    for name in ("notes.txt", "more.txt"):
        (tmp_path / name).write_text("three ponds")
    await slow_down(maya, 200_000)
    await drag(maya, tmp_path / "notes.txt", tmp_path / "more.txt", drop=False)
    await expect(maya.locator("#drop")).to_have_text("Drop files to attach them")
    await maya.shot("drop")
    await drag(maya, tmp_path / "notes.txt", tmp_path / "more.txt")
    await expect(maya.locator("#drop")).to_be_hidden()
    await maya.attach(("film.bin", bytes(4_000_000)), ("huge.bin", bytes(11 << 20)))
    await expect(maya.attachment("huge.bin")).to_contain_text("Larger than 10 MB, the most that is allowed here.")
    await maya.press("#text", "Enter")
    await expect(maya.locator("#toasts")).to_have_text("A file was not uploaded. Try again, or remove it.")
    await maya.click('[aria-label="Remove huge.bin"]')
    await expect(maya.attachment("film.bin").locator(".size")).to_have_text(re.compile(r"^3\.8 MB, [1-9]\d? %$"))
    assert 0 < float(await maya.attachment("film.bin").locator("progress").evaluate("(one) => one.value")) < 1
    await maya.click('[aria-label="Cancel the upload of film.bin"]')
    await expect(maya.locator(".attachment")).to_have_count(2)
    await slow_down(maya, -1)
    await maya.attach(*((f"{number}.txt", b"x") for number in range(10)))
    await expect(maya.locator("#toasts")).to_have_text("A message has at most 10 files. The others were not attached.")
    await expect(maya.locator(".attachment")).to_have_count(10)
    await maya.click('[aria-label="Remove 0.txt"]')
    await maya.press("#text", "Enter")
    await expect(jonas.locator("#log .document b")).to_have_text(["notes.txt", "more.txt", *(f"{n}.txt" for n in range(1, 8))])
    assert [file["size"] for file in await files_of(jonas_api, channel_id)] == [11, 11, *[1] * 7]


async def slow_down(tab: Tab, speed: int) -> None:
    """Limit the uploads of a page to so many bytes a second; -1: no limit."""
    cdp = await tab.page.context.new_cdp_session(tab.page)
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": speed}
    await cdp.send("Network.emulateNetworkConditions", limits)


async def drag(tab: Tab, *paths: Path, drop: bool = True) -> None:
    """Drag files over the messages."""
    cdp = await tab.page.context.new_cdp_session(tab.page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", *(["drop"] if drop else [])):
        await cdp.send("Input.dispatchDragEvent", {"type": step, "x": 600, "y": 400, "data": data})


async def test_an_upload_continues_after_a_lost_connection(api: World, proxy: Proxy, tab: Any) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya, jonas = await tab(maya_api, at=proxy.url), await tab(jonas_api)
    maya.ignored = NETWORK_ERRORS
    await slow_down(maya, 500_000)
    data = random.Random(1).randbytes(3_000_000)
    await maya.attach(("data.bin", data))
    await maya.write("the measurements")  # is sent when the upload has ended
    await maya.write("a message meanwhile")
    await jonas.sees("a message meanwhile")
    await expect(maya.row("the measurements").locator("progress")).to_be_visible()
    await proxy.cut(maya)
    await expect(maya.row("the measurements")).to_have_class(re.compile("waiting"))
    await maya.row("the measurements").get_by_role("button", name="Cancel").click()
    await expect(maya.attachment("data.bin")).to_contain_text("Waiting for the connection…")
    await expect(maya.attachment("data.bin").get_by_role("button", name="Try again")).to_be_visible()
    await expect(maya.locator("#text")).to_have_value("the measurements")
    await maya.press("#text", "Enter")
    await slow_down(maya, -1)
    await proxy.start(maya)
    await (await maya.sees("the measurements")).locator("a.document").wait_for()
    await jonas.sees("the measurements")
    (file,) = await files_of(jonas_api, channel_id)
    assert (await jonas_api.call("GET", f"/files/{file['file_id']}")).body == data


async def test_a_message_whose_upload_ended_with_the_page_is_kept(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    await slow_down(maya, 100_000)
    await maya.attach(("notes.txt", b"three ponds"))
    await expect(maya.attachment("notes.txt").locator(".size")).to_have_text("1 kB")
    await maya.attach(("data.bin", bytes(5_000_000)))
    await maya.write("the measurements")
    await expect(maya.row("the measurements").locator("progress")).to_be_visible()
    await maya.reload()
    await expect(maya.row("the measurements").locator(".fate")).to_contain_text("An attached file is no longer on the server.")
    await maya.row("the measurements").get_by_role("button", name="Edit").click()
    await expect(maya.locator(".attachment b")).to_have_text(["notes.txt", "data.bin"])
    await expect(maya.attachment("data.bin").locator(".bad")).to_be_visible()
    await maya.click('[aria-label="Remove data.bin"]')
    await maya.press("#text", "Enter")
    await maya.sees("the measurements")
    assert [file["name"] for file in await files_of(maya_api, channel_id)] == ["notes.txt"]


async def test_a_draft_keeps_its_files(api: World, tab: Any) -> None:
    (maya_api,), (server_id, channel_id) = await create_class(api, "Maya")
    await maya_api.channel(server_id, "homework")
    maya = await tab(maya_api)
    await maya.attach(("pond.png", await paint(maya, 200, 100)), ("notes.txt", b"three ponds"))
    await maya.attachment("pond.png").locator(".alt").fill("A pond with reeds")
    await maya.press("#text", "Tab")
    await expect(maya.locator(".attachment progress:visible")).to_have_count(0)
    await maya.open_channel("homework")
    await expect(maya.locator("#attachments")).to_be_hidden()
    await maya.reload()
    await maya.open_channel("general")
    await loaded(maya.attachment("pond.png").locator("img"))
    await expect(maya.attachment("pond.png").locator(".alt")).to_have_value("A pond with reeds")
    other = await second_tab(maya)
    await expect(other.locator(".attachment b")).to_have_text(["pond.png", "notes.txt"])
    await other.click('[aria-label="Remove notes.txt"]')
    await expect(maya.locator(".attachment b")).to_have_text(["pond.png"])
    await maya.attachment("pond.png").locator(".alt").fill("A pond with ducks")  # the page no longer has its bytes
    await maya.attachment("pond.png").locator(".alt").press("Enter")
    await expect(maya.locator("#text")).to_be_focused()
    await maya.press("#text", "Enter")
    await expect(maya.locator("#log .row:not(.waiting) img")).to_have_attribute("alt", "A pond with ducks")
    await expect(other.locator("#attachments")).to_be_hidden()
    (file,) = await files_of(maya_api, channel_id)
    assert (file["name"], file["alt"], file["width"]) == ("pond.png", "A pond with ducks", 200)
    await other.page.close()


async def test_a_picture_is_sent_without_its_place(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab(maya_api)
    photo = with_location(await paint(maya, 3000, 1500, "image/jpeg"), 6)
    assert b"Exif" in photo
    await maya.attach(("pond.jpg", photo))
    await expect(maya.locator(".attachment .size")).to_have_text(re.compile("kB$"))
    await maya.write("scaled")
    await maya.sees("scaled")
    (file,) = await files_of(maya_api, channel_id)
    assert (file["type"], file["width"], file["height"]) == ("image/jpeg", 1024, 2048)
    sent = (await maya_api.call("GET", f"/files/{file['file_id']}")).body
    assert b"Exif" not in sent
    assert b"\xff\xe1" not in sent[:100]
    await maya.attach(("pond.jpg", photo), ("clear.png", await paint(maya, 40, 40)), ("anim.gif", GIF))
    await expect(maya.locator(".attachment progress:visible")).to_have_count(0)
    await expect(maya.attachment("anim.gif").locator(".check")).to_be_hidden()
    await maya.attachment("pond.jpg").get_by_label("Send the original").check()
    await maya.write("as it is")
    await maya.sees("as it is")
    original, clear, anim = await files_of(maya_api, channel_id)
    assert (await maya_api.call("GET", f"/files/{original['file_id']}")).body == photo
    assert (await maya_api.call("GET", f"/files/{anim['file_id']}")).body == GIF
    assert clear["type"] == "image/png"


GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


async def test_pictures_open_large(api: World, tab: Any) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya = await tab(maya_api)
    names = ("one.png", "two.png", "three.png")
    for name in names:
        file_id = await upload(jonas_api, channel_id, name, await paint(maya, 1600, 1000), alt=f"Pond {name[:-4]}")
        await jonas_api.post(channel_id, "", files=[file_id])
    await loaded(maya.get_by_alt_text("Pond two"))
    viewer, press = maya.locator("#viewer"), maya.keyboard.press
    await maya.get_by_alt_text("Pond two").click()
    await expect(viewer).to_contain_text("two.png")
    await expect(viewer).to_contain_text("Picture 2 of 3")
    await expect(viewer.locator("#stage img")).to_have_attribute("alt", "Pond two")
    await loaded(viewer.locator("#stage img"))
    await press("ArrowRight")
    await expect(viewer).to_contain_text("three.png")
    await expect(viewer.get_by_role("button", name="Next picture")).to_be_disabled()
    await press("ArrowRight")
    await press("ArrowLeft")
    await press("ArrowLeft")
    await expect(viewer).to_contain_text("one.png")
    await loaded(viewer.locator("#stage img"))
    width = "(img) => img.getBoundingClientRect().width"
    before = await viewer.locator("#stage img").evaluate(width)
    await press("+")
    assert await viewer.locator("#stage img").evaluate(width) == pytest.approx(1.5 * before, abs=2)
    await maya.mouse.move(600, 400)
    await maya.mouse.down()
    await maya.mouse.move(500, 380)
    await maya.mouse.up()
    assert "translate(-100px" in await viewer.locator("#stage img").get_attribute("style")
    await press("-")
    assert await viewer.locator("#stage img").evaluate(width) == pytest.approx(before, abs=2)
    async with maya.page.expect_download() as download:
        await viewer.get_by_label("Download").click()
    assert (await download.value).suggested_filename == "one.png"
    await press("Escape")
    await expect(viewer).to_be_hidden()
    await expect(maya.locator(".picture").nth(1)).to_be_focused()
    await press("Enter")
    await expect(viewer).to_be_visible()
    await jonas_api.ok("DELETE", "/messages/2")
    await expect(viewer).to_be_hidden()


async def test_a_picture_is_zoomed_with_two_fingers(api: World, tab: Any) -> None:
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    phone = await tab(maya_api, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    for name in ("one.png", "two.png"):
        file_id = await upload(maya_api, channel_id, name, await paint(phone, 900, 900))
        await maya_api.post(channel_id, name, files=[file_id])
    await loaded(phone.get_by_alt_text("one.png"))
    await phone.get_by_alt_text("one.png").tap()
    img = phone.locator("#stage img")
    await loaded(img)
    cdp = await phone.page.context.new_cdp_session(phone.page)

    async def touch(kind: str, *points: tuple[int, int]) -> None:
        touches = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        await cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

    before = (await img.bounding_box())["width"]
    await touch("touchStart", (180, 400), (210, 400))
    for step in range(1, 5):
        await touch("touchMove", (180 - 15 * step, 400), (210 + 15 * step, 400))
    await touch("touchEnd")
    assert (await img.bounding_box())["width"] == pytest.approx(5 * before, rel=0.1)
    await phone.keyboard.press("0")
    await touch("touchStart", (300, 400))
    for step in range(1, 5):
        await touch("touchMove", (300 - 40 * step, 400))
    await touch("touchEnd")
    await expect(phone.locator("#viewer-name")).to_have_text("two.png")


async def test_files_move_nothing(api: World, tab: Any) -> None:
    """Each picture has its place before it is loaded, and addresses are requested only near the screen."""
    (maya_api,), (_, channel_id) = await create_class(api, "Maya")
    maya = await tab()
    for number in range(30):
        size = (100 + 40 * number, 1200 - 35 * number)
        file_id = await upload(maya_api, channel_id, f"{number}.png", await paint(maya, *size))
        await maya_api.post(channel_id, f"no. {number};", files=[file_id])
    waiting = asyncio.Event()
    asked: list[str] = []

    async def hold(route: Any) -> None:
        asked.append(route.request.url)
        await waiting.wait()
        await route.continue_()

    await maya.page.route("**/files/*?link=*", hold)
    await maya.enter(maya_api)
    await eventually(lambda: true_of(len(asked) > 2), "requests of pictures")
    places = "[...document.querySelectorAll('#log .row')].map((row) => row.getBoundingClientRect().top)"
    before = await maya.evaluate(places)
    assert before[-1] < 800
    waiting.set()
    await loaded(maya.get_by_alt_text("29.png"))
    assert await maya.evaluate(places) == before
    assert len(asked) < 15
    await maya.evaluate("document.querySelector('#log').scrollTop = 0")
    await loaded(maya.get_by_alt_text("0.png", exact=True))
    assert await maya.evaluate("Object.keys(localStorage).every((key) => !localStorage[key].includes('link='))")
    assert "link" not in maya.page.url


async def true_of(value: Any) -> bool:
    return bool(value)


async def test_nothing_that_could_run_is_shown(api: World, tab: Any) -> None:
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab(maya_api)
    script = b"<script>parent.__xss = window.__xss = 1</script>"
    hostile = {
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'>" + script + b"</svg>",
        "page.html": b"<!doctype html>" + script,
        "picture.png": b"<html>" + script,
        "both.gif": GIF[:6] + b"/*" + script,
        "<img src=x onerror=__xss=1>.txt": b"x",
    }
    await maya.attach(*hostile.items())
    await maya.write("harmless")
    await maya.sees("harmless")
    assert await maya.evaluate("document.querySelectorAll('#log :is(img, video, audio, iframe, object, embed)').length") == 0
    links = maya.locator("#log a.document")
    await expect(links).to_have_count(5)
    for name, link in zip(hostile, await links.all(), strict=True):
        await expect(link).to_have_attribute("href", re.compile("link="))
        async with maya.page.expect_download() as download:
            await link.click()
        assert (await (await download.value).path()).read_bytes() == hostile[name]
    assert len(maya.page.context.pages) == 1
    assert await maya.evaluate("window.__xss") is None


def silence(seconds: int) -> bytes:
    """Return a WAV file."""
    data = bytes([128]) * 8000 * seconds
    head = struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + head + b"data" + struct.pack("<I", len(data)) + data


async def test_sounds_play_on_while_the_message_changes(two: Any) -> None:
    maya, jonas, (_, channel_id) = two
    file_id = await upload(maya.api, channel_id, "bird.wav", silence(10))
    await maya.api.post(channel_id, "listen", files=[file_id])
    row = await jonas.sees("listen")
    await expect(row).to_contain_text("bird.wav")
    sound = row.locator("audio")
    await sound.evaluate("(one) => { one.muted = true; window.__sound = one; return one.play(); }")
    await jonas.tool("listen", "react")
    await jonas.click("#emoji button >> nth=0")
    await expect(row.locator(".reactions button")).to_have_count(1)
    assert await jonas.evaluate("__sound.isConnected && !__sound.paused")
    await eventually(lambda: jonas.evaluate("__sound.currentTime > 0.2"), "the sound")


async def test_refused_files_are_explained(tmp_path: Path, tab: Any) -> None:
    async with page_server(tmp_path / "small.db", "--file-max", "1") as api:
        (maya_api,), _ = await create_class(api, "Maya")
        maya = await tab(maya_api, at=api.url, locale="fr-FR")
        maya.ignored = NETWORK_ERRORS
        await maya.attach(("grand.bin", bytes(2 << 20)))
        await expect(maya.attachment("grand.bin")).to_contain_text("Plus de 1 Mo, le maximum autorisé ici.")
        await maya.click('[aria-label="Retirer grand.bin"]')
        await maya.reject("**/files?*", 503, "UNAVAILABLE", reason="FILES_FULL")
        await maya.attach(("notes.txt", b"x"))
        await expect(maya.attachment("notes.txt")).to_contain_text("plus de place pour les fichiers.")
        await maya.page.unroute("**/files?*")
        await maya.attachment("notes.txt").get_by_role("button", name="Réessayer").click()
        await expect(maya.attachment("notes.txt").locator(".size")).to_have_text("1 ko")
        await maya.page.close()
    async with page_server(tmp_path / "none.db", "--file-max", "0") as api:
        (maya_api,), _ = await create_class(api, "Maya")
        maya = await tab(maya_api, at=api.url)
        await drag(maya, tmp_path / "small.db", drop=False)
        for part in ("#attach", "#drop"):
            await expect(maya.locator(part)).to_be_hidden()
        await maya.page.close()


@pytest.mark.parametrize("device", BROWSERS, indirect=True)
async def test_a_chosen_picture_is_seen_by_others(api: World, device: Any) -> None:
    people, _ = await create_class(api, "Maya", "Jonas")
    maya, jonas = await device(), await device()
    for one, person in zip((maya, jonas), people, strict=True):
        await one.open(api.url)
        await one.click("#swap button", "I already have an account")
        await give_name(one, person.name, "correct horse")
        await one.sees("general", "#room-name")
    await maya.find("#attach")
    await maya.evaluate(CHOOSE % "photo.jpg")
    await maya.find(".attachment .size", "kB")
    await maya.type(".attachment .alt", "A pond\n")
    await maya.keys("look\n")
    await jonas.find("#log .picture img", then="one.complete && one.naturalWidth === 2048 && one.alt === 'A pond'")
    await jonas.click("#log .picture")
    await jonas.find("#stage img", then="one.complete && one.naturalWidth === 2048")
    await jonas.sees("photo.jpg", "#viewer-name")
    await jonas.keys("+")
    await jonas.find("#stage img", then="one.style.transform.includes('scale(1.5)')")
    await jonas.click("#viewer [data-do=close]")
    await jonas.sees("look", "#log .said")


CHOOSE = """new Promise((done) => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 3000, height: 2000});
    canvas.getContext("2d").fillRect(0, 0, 1500, 2000);
    canvas.toBlob((blob) => {
        const chosen = new DataTransfer(), input = document.querySelector("#pick");
        chosen.items.add(new File([blob], "%s", {type: "image/jpeg"}));
        input.files = chosen.files;
        input.dispatchEvent(new Event("change"));
        done(true);
    }, "image/jpeg");
})"""


# Voice

STATS = """async () => {
    const seen = {links: 0, sent: 0, received: 0};
    for (const link of window.__links ?? []) {
        if (link.connectionState !== "connected") continue;
        seen.links++;
        for (const one of (await link.getStats()).values()) {
            if (one.type === "outbound-rtp" && one.kind === "audio") seen.sent += one.packetsSent;
            if (one.type === "inbound-rtp" && one.kind === "audio") seen.received += one.packetsReceived;
        }
    }
    return seen;
}"""
KEEP_LINKS = """{
    const Link = RTCPeerConnection;
    window.__links = [];
    window.RTCPeerConnection = class extends Link { constructor(...given) { super(...given); __links.push(this); } };
}"""


async def test_three_people_hear_each_other(api: World, tab: Any) -> None:
    people, (server_id, _) = await create_class(api, "Maya", "Jonas", "Zoë")
    await people[0].channel(server_id, "Study room", "voice")
    tabs = []
    for who in people:
        one = await tab()
        await one.page.add_init_script(KEEP_LINKS)
        await one.enter(who)
        tabs.append(one)
    for one in tabs:
        await one.join_voice()
    for one in tabs:
        await expect(one.locator("#call li")).to_have_count(3)
        first = await eventually(lambda one=one: has_voice(one, 2), "sound from two others")
        await eventually(lambda one=one, first=first: has_more_voice(one, first), "more sound")
        await expect(one.locator("#call .speaking").first).to_be_visible(timeout=10000)
    await tabs[0].shot("voice")
    await tabs[0].click("#mute")
    await expect(tabs[0].locator("#mute")).to_have_attribute("aria-pressed", "true")
    await tabs[2].click("#hang-up")
    for one in tabs[:2]:
        await expect(one.locator("#call li")).to_have_count(2)
        await eventually(lambda one=one: has_voice(one, 1), "sound from the other")
    await expect(tabs[2].locator("#call")).to_be_hidden()


async def test_mute_is_shown_and_a_second_device_takes_over(api: World, tab: Any) -> None:
    (maya_api, jonas_api), (server_id, _) = await create_class(api, "Maya", "Jonas")
    await maya_api.channel(server_id, "Study room", "voice")
    maya, jonas, phone = await tab(maya_api), await tab(jonas_api), await tab(jonas_api)
    for one in (maya, jonas):
        await one.join_voice()
        await expect(one.locator("#call li", has_text="Maya")).to_be_visible()
    await jonas.click("#mute")
    await expect(jonas.locator("#mute")).to_have_text("Muted")
    for one in (maya, jonas):
        await expect(one.locator("#call li", has_text="Jonas")).to_contain_text("Muted")
        await expect(one.locator("#call li", has_text="Maya")).not_to_contain_text("Muted")
    await maya.click("#mute")
    await phone.join_voice()
    await expect(jonas.locator("#toasts")).to_have_text("The call continues on your other device.")
    await expect(jonas.locator("#call")).to_be_hidden()
    for one in (maya, phone):
        await expect(one.locator("#call li")).to_have_count(2)
        await expect(one.locator("#call li", has_text="Maya")).to_contain_text("Muted")
        await expect(one.locator("#call li", has_text="Jonas")).not_to_contain_text("Muted")


async def has_voice(tab: Tab, links: int) -> Any:
    seen = await tab.evaluate(STATS)
    return seen["links"] == links and min(seen["sent"], seen["received"]) > 20 * links and seen


async def has_more_voice(tab: Tab, before: dict[str, int]) -> bool:
    seen = await tab.evaluate(STATS)
    return all(seen[key] > before[key] + 20 for key in ("sent", "received"))


async def test_a_blocked_microphone_is_explained(tmp_path: Path, tab: Any) -> None:
    async with page_server(tmp_path / "named.db", "--public-url", "http://chat.test") as named:
        (maya_api,), (server_id, _) = await create_class(named, "Maya")
        await maya_api.channel(server_id, "Study room", "voice")
        maya = await tab(maya_api, at=named.url.replace("127.0.0.1", "chat.test"))
        await maya.join_voice()
        await expect(maya.locator("#ask")).to_contain_text("--tls-self-signed")
        await expect(maya.locator("#ask")).to_contain_text("--tls-cert")
        await maya.page.close()


# Accessibility

AXE = next(
    (path for path in (HERE / "node_modules/axe-core/axe.min.js", Path(os.environ.get("AXE", "/nowhere"))) if path.exists()),
    None,
)


AXE_RUN = """axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]})
    .then((found) => found.violations.map((one) => [one.id, one.help, one.nodes.map((node) => node.html)]))"""


async def check_accessibility(tab: Tab, view: str) -> None:
    await eventually(
        lambda: tab.evaluate("document.getAnimations().every((one) => one.playState === 'finished')"), "the animations to end"
    )
    await tab.evaluate(AXE.read_text())
    found = await tab.evaluate(AXE_RUN)
    assert found == [], f"{view}: {json.dumps(found, indent=1)}"


@pytest.mark.skipif(AXE is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 360])
async def test_axe_finds_nothing(api: World, tab: Any, scheme: str, width: int) -> None:
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    (maya_api, jonas_api), (server_id, channel_id) = await create_class(api, "Maya", "Jonas")
    code = await maya_api.invite(server_id)
    await fill_channel(maya_api, jonas_api, server_id, channel_id)
    visitor = await tab(**look)
    for view, path in (("sign in", "/"), ("guest", f"/#/invite/{code}")):
        await visitor.open(path)
        await visitor.reload()
        await expect(visitor.locator("#sign-in-title")).not_to_be_empty()
        await check_accessibility(visitor, view)
        await visitor.shot(f"{view.replace(' ', '-')}-{width}-{scheme}")
    await visitor.open()
    await visitor.reload()
    await visitor.click('#swap [data-mode="code"]')
    await check_accessibility(visitor, "code")
    maya = await tab(maya_api, **look)
    await maya.sees("bring boots")
    assert await maya.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await check_accessibility(maya, "room")
    await maya.shot(f"room-{width}-{scheme}")
    if width < 760:
        await maya.click("#open-nav")
        await check_accessibility(maya, "drawer")
        await maya.shot(f"drawer-{width}-{scheme}")
    await maya.click("#server")
    await check_accessibility(maya, "menu")
    await maya.click("#menu >> text=Invite people")
    await expect(maya.locator("#invite")).to_be_visible()
    await check_accessibility(maya, "invite")
    await maya.shot(f"invite-{width}-{scheme}")
    await maya.keyboard.press("Escape")
    await maya.click('[data-do="settings"]')
    await check_accessibility(maya, "settings")
    await maya.shot(f"settings-{width}-{scheme}")
    await maya.keyboard.press("Escape")
    if width < 760:
        await maya.keyboard.press("Escape")
    await maya.search("water")
    await check_accessibility(maya, "search")
    await maya.shot(f"search-{width}-{scheme}")
    await maya.click('[data-do="closeSide"]')
    if width < 1100:
        await maya.click("#show-people")
    await maya.click(".person >> text=Jonas")
    await check_accessibility(maya, "member menu")
    await maya.click("#menu >> text=Ban")
    await check_accessibility(maya, "ban")
    await maya.shot(f"ban-{width}-{scheme}")
    await maya.keyboard.press("Escape")
    if width < 1100:
        await maya.click('[data-do="closeSide"]')
    await maya.tool("bring boots", "react")
    await check_accessibility(maya, "emoji")


@pytest.mark.skipif(AXE is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 360)])
async def test_axe_finds_nothing_in_conversations(api: World, tab: Any, scheme: str, width: int) -> None:
    people, _ = await create_class(api, "Maya", "Jonas", "Zoe", "Ada")
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    maya, phone = await tab(people[0], **look), width < 760

    async def check(view: str) -> None:
        await check_accessibility(maya, view)
        assert await maya.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        await maya.shot(f"{view.replace(' ', '-')}-{width}-{scheme}")

    async def open_list() -> None:
        if phone:
            await maya.click("#open-nav")

    await open_list()
    await maya.click("#private")
    await check("no conversation")
    if phone:
        await maya.click('#notice [data-do="newMessage"]')
    else:
        await maya.click('#private-list [data-do="newMessage"]')
    await check("new message")
    await maya.fill_and_enter("#find", "jonas")
    await maya.fill_and_enter("#find", "zoe")
    await check("people picked")
    await maya.fill_and_enter("#group-name", "Pond project")
    await expect(maya.locator("#room-name")).to_have_text("Pond project")
    await check("conversation")
    await maya.click("#conversation-menu")
    await check("conversation menu")
    await maya.keyboard.press("Escape")
    pair = await people[3].ok("POST", "/conversations", {"user_ids": [people[0].user_id]})
    await people[3].post(pair["channels"][0]["channel_id"], "may I ask you something?")
    await open_list()
    await expect(maya.locator("#conversations .badge")).to_have_text(["1", ""])
    await check("conversations")
    await maya.click('#servers [aria-label="Biology 3B"]')
    await open_list()
    await expect(maya.locator("#unread-conversations li")).to_have_count(1)
    await check("unread conversation")
    await maya.click("#unread-conversations button")
    await maya.sees("may I ask you something?")
    await people[3].ok("DELETE", f"/servers/{pair['server_id']}/members/{people[3].user_id}")
    await expect(maya.locator("#closed")).to_be_visible()
    await check("left conversation")
    await maya.keyboard.press("Control+k")
    await check("quick switch")


async def fill_channel(maya: Person, jonas: Person, server_id: int, channel_id: int) -> None:
    await maya.ok("PATCH", f"/channels/{channel_id}", {"topic": "The field trip on Friday"})
    homework_id = await maya.channel(server_id, "homework")
    await maya.channel(server_id, "Study room", "voice")
    first = await maya.post(channel_id, "Good morning! Please **bring boots** and a water bottle on Friday.")
    await maya.post(
        channel_id, "The plan:\n1. Water samples at three ponds\n2. Lunch by the mill\n3. Microscopes back in the lab"
    )
    await jonas.post(channel_id, "Do we need our own tubes? @Maya", reply_to=first["message_id"])
    await jonas.post(
        channel_id,
        "> a quote\n```\nreadings = [7.1, 6.9]\n"
        "print(f'mean pH {sum(readings) / len(readings):.2f}, out of a long, long line of code that has to scroll')\n"
        "```\nand `code`, see https://example.org/ponds",
    )
    await jonas.ok("PUT", f"/messages/{first['message_id']}/reactions/{quote('👍')}")
    await jonas.post(homework_id, "Exercise 3 is due on Monday, @Maya")


@pytest.mark.skipif(AXE is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1920, 1280, 390, 360])
async def test_axe_finds_nothing_about_files(api: World, tab: Any, scheme: str, width: int) -> None:
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya = await tab(maya_api, **look)
    pictures = [await paint(maya, *size, "image/jpeg") for size in ((1600, 900), (700, 1100), (60, 40))]
    picture, tall, tiny = pictures
    files = [
        ("pond.jpg", picture),
        ("reeds.jpg", tall),
        ("bird.wav", silence(10)),
        ("report.pdf", b"%PDF-1.4"),
        ("dot.jpg", tiny),
    ]
    ids = [await upload(jonas_api, channel_id, name, data) for name, data in [*files, ("wide.jpg", picture)]]
    await jonas_api.post(channel_id, "from the field trip", files=[ids.pop()])
    await jonas_api.post(channel_id, "and two more", files=ids[:2])
    await jonas_api.post(channel_id, "", files=ids[2:])
    await loaded(maya.get_by_alt_text("reeds.jpg"))
    assert await maya.evaluate(FITS_WIDTH, "#log")
    await check_accessibility(maya, "messages")
    await maya.shot(f"files-{width}-{scheme}")
    await maya.reject("**/files?name=full*", 503, "UNAVAILABLE", reason="FILES_FULL")
    maya.ignored = NETWORK_ERRORS
    long = f"{'a very long name ' * 5}.jpg"
    await maya.attach(("pond.jpg", picture), (long, tall), ("full.txt", b"x"), ("notes.txt", b"three ponds"))
    await maya.locator(".attachment .bad:visible").wait_for()
    await expect(maya.locator(".attachment progress:visible")).to_have_count(0)
    assert await maya.evaluate(FITS_WIDTH, "#attachments")
    await check_accessibility(maya, "attachments")
    await maya.shot(f"attachments-{width}-{scheme}")
    await maya.get_by_alt_text("pond.jpg").click()
    await loaded(maya.locator("#stage img"))
    await check_accessibility(maya, "viewer")
    await maya.shot(f"viewer-{width}-{scheme}")


@pytest.mark.parametrize("width", [360, 820, 1280])
async def test_long_names_fit(api: World, tab: Any, width: int) -> None:
    """The longest names that the server accepts, without a space, hide and move nothing."""
    maya_api = await api.person("M" * 32)
    await maya_api.ok("PATCH", "/users/me", {"name": "W" * 64})
    place = await api.place(maya_api, name="x" * 100)
    channel_id = place.channel_id
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"name": "y" * 100, "topic": "z" * 250})
    first = await maya_api.post(channel_id, "first")
    await maya_api.post(channel_id, "second", reply_to=first["message_id"])
    maya = await tab(viewport={"width": width, "height": 800})
    await maya.store_session(maya_api)
    quote_line = (await maya.sees("second")).locator(".quote")
    await expect(quote_line).to_contain_text("first")
    assert (await quote_line.bounding_box())["height"] < 30
    assert await maya.evaluate(FITS_WIDTH, "#log")
    if width < 760:
        await maya.click("#open-nav")
    await maya.click('[data-do="settings"]')
    assert await maya.evaluate(FITS_WIDTH, "#preferences")
    await maya.click('[data-do="changeName"]')
    assert await maya.evaluate(FITS_WIDTH, "#ask")
    jonas = await api.person("J" * 32)
    await jonas.ok("PATCH", "/users/me", {"name": "W" * 63 + "J"})
    await jonas.ok("POST", f"/invites/{await maya_api.invite(place.server_id)}")
    pair = await jonas.ok("POST", "/conversations", {"user_ids": [maya_api.user_id]})
    await maya.open(f"/#/channel/{pair['channels'][0]['channel_id']}")
    await maya.reload()
    await expect(maya.locator("#room-name")).to_have_text("W" * 63 + "J")
    assert await maya.evaluate(FITS_WIDTH, "#head")
    assert (await maya.locator("#conversation-menu").bounding_box())["width"] >= 36
    await maya.keyboard.press("Control+k")
    assert await maya.evaluate(FITS_WIDTH, "#finder")
    await maya.keyboard.press("Escape")
    if width < 760:
        await maya.click("#open-nav")
    await maya.click('#private-list [data-do="newMessage"]')
    await maya.press("#find", "Enter")
    assert await maya.evaluate(FITS_WIDTH, "#finder")
    assert await maya.evaluate(FITS_WIDTH, "#private-list")


FITS_WIDTH = "(selector) => { const box = document.querySelector(selector); return box.scrollWidth <= box.clientWidth; }"


async def test_the_page_works_with_the_keyboard_alone(tab: Any) -> None:
    maya = await tab()
    await maya.open()
    press, kind = maya.keyboard.press, maya.keyboard.type
    await expect(maya.locator("#username")).to_be_focused()
    await kind("Maya")
    await press("Tab")
    await kind("correct horse")
    await press("Enter")
    await expect(maya.locator("#empty")).to_be_visible()
    await reach(maya, "#empty .main")
    await press("Enter")
    await kind("Biology")
    await press("Enter")
    await expect(maya.locator("#text")).to_be_focused()
    await kind("first line")
    await press("Shift+Enter")
    await kind("second line")
    await press("Enter")
    await maya.sees("second line")
    await reach(maya, "#log", "Shift+Tab")
    await press("ArrowUp")
    await expect(maya.row("second line")).to_be_focused()
    await reach(maya, '.row [data-do="react"]')
    await press("Enter")
    await press("ArrowRight")
    await press("Enter")
    await expect(maya.row("second line").locator(".reactions button")).to_have_text("👎 1")
    await reach(maya, '.row [data-do="remove"]')
    await press("Enter")
    await expect(maya.locator("#ask .main")).to_be_focused()
    await press("Enter")
    await expect(maya.row("second line")).to_have_count(0)
    await expect(maya.locator("#text")).to_be_focused()


async def reach(tab: Tab, selector: str, key: str = "Tab") -> None:
    """Press a key until the focus is on the element, as a person would."""
    for _ in range(40):
        await tab.keyboard.press(key)
        if await tab.evaluate("selector => document.activeElement?.matches(selector)", selector):
            return
    pytest.fail(f"the keyboard does not reach {selector}")


async def test_tab_stays_in_a_drawer_without_inert(api: World, tab: Any) -> None:
    """Firefox before 112 and Safari before 15.5 do not support `inert`."""
    (maya_api,), _ = await create_class(api, "Maya")
    phone = await tab(viewport={"width": 390, "height": 800})
    await phone.page.add_init_script("delete HTMLElement.prototype.inert")
    await phone.enter(maya_api)
    for button, drawer in (("#open-nav", "#nav"), ("#show-people", "#side")):
        await phone.click(button)
        await expect(phone.locator(f"{drawer} button").first).to_be_visible()
        for key in ["Tab"] * 12 + ["Shift+Tab"] * 12:
            await phone.keyboard.press(key)
            assert not await phone.evaluate("document.activeElement.closest('#room')")
        await reach(phone, f"{drawer} button")
        await phone.keyboard.press("Escape")
    await reach(phone, "#text")


# Rules, mutes and raised hands


CLOSED = "#closed [role=status]"


async def set_rule(tab: Tab, rule: str, choice: str) -> None:
    """Choose a rule in the menu of the open channel."""
    await tab.click("#room-menu")
    await tab.locator("#menu button", has_text=rule).click()
    await tab.locator("#menu").get_by_role("button", name=choice, exact=True).click()


async def test_a_teacher_closes_a_channel_and_opens_it(two: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    await jonas.write("written before")
    await maya.sees("written before")
    await maya.write("a question")
    await jonas.sees("a question")
    await jonas.fill("#text", "my draft")
    await set_rule(maya, "Who can write", "Only teachers")
    await expect(jonas.locator(CLOSED)).to_have_text("Only teachers can write here")
    await expect(jonas.locator("#text")).to_have_value("my draft")
    await expect(jonas.locator("#text")).not_to_be_editable()
    await expect(jonas.locator("#send")).to_be_hidden()
    await jonas.press("#text", "Enter")
    await jonas.row("written before").hover()
    await expect(jonas.row("written before").locator('[data-do="edit"]')).to_be_hidden()
    await expect(jonas.row("a question").locator('[data-do="reply"]')).to_be_hidden()
    await jonas.tool("a question", "react")
    await jonas.click("#emoji button >> text=👍")
    await expect(maya.row("a question").locator(".reactions button")).to_have_text("👍 1")
    await expect(maya.locator("#rule")).to_have_text("Only teachers can write here")
    await maya.write("staff can")
    await jonas.sees("staff can")
    for one in (maya, jonas):
        await one.shot(f"closed-{'maya' if one is maya else 'jonas'}")
    await jonas.reload()
    await expect(jonas.locator(CLOSED)).to_have_text("Only teachers can write here")
    await expect(jonas.locator("#text")).to_have_value("my draft")
    await maya.click("#room-menu")
    await expect(maya.locator("#menu button", has_text="Who can write")).to_contain_text("Only teachers")
    await maya.click("#menu >> text=Who can write")
    await expect(maya.locator('#menu [aria-pressed="true"]')).to_have_text("Only teachers")
    await maya.click("#menu >> text=Everyone")
    await expect(jonas.locator("#closed")).to_be_hidden()
    await jonas.press("#text", "Enter")
    await maya.sees("my draft")
    await expect(maya.locator("#rule")).to_be_hidden()
    await jonas.locator("#text").focus()
    await maya.api.ok("PATCH", f"/channels/{channel_id}", {"posting": "staff"})
    await expect(jonas.locator("#compose")).to_be_hidden()
    await expect(jonas.locator("#log")).to_be_focused()
    await maya.api.ok("PATCH", f"/servers/{server_id}/members/{jonas.api.user_id}", {"role": "admin"})
    await expect(jonas.locator("#text")).to_be_focused()
    await jonas.write("now I may")
    await maya.sees("now I may")


async def test_slow_mode_counts_down(two: Any, tab: Any) -> None:
    maya, jonas, (_, channel_id) = two
    other = await tab(jonas.api)
    await set_rule(maya, "Slow mode", "5 seconds")
    await expect(maya.locator("#rule")).to_have_text("Slow mode (5 seconds)")
    await expect(jonas.locator("#rule")).to_have_text("Slow mode (5 seconds)")
    await expect(jonas.locator("#send")).to_be_enabled()
    await jonas.write("first")
    for one in (jonas, other):
        await expect(one.locator("#rule")).to_have_text(re.compile(r"^Slow mode: [1-5] s$"))
        await expect(one.locator("#send")).to_be_disabled()
    await jonas.write("second")
    await expect(jonas.locator("#rule")).to_have_class(re.compile("flash"))
    await expect(jonas.locator("#text")).to_have_value("second")
    await jonas.shot("slow-jonas")
    await jonas.tool("first", "edit")
    await jonas.write("first, edited")
    await maya.sees("first, edited")
    await expect(jonas.locator("#text")).to_have_value("second")
    await expect(jonas.locator("#rule")).to_have_text("Slow mode (5 seconds)")
    await expect(jonas.locator("#spoken")).to_have_text("You can write again.")
    await jonas.press("#text", "Enter")
    await maya.sees("second")
    await maya.write("staff are exempt")
    await maya.write("from it")
    await jonas.sees("from it")
    await jonas.reload()
    await expect(jonas.locator("#rule")).to_have_text(re.compile("^Slow mode: "))
    await set_rule(maya, "Slow mode", "Off")
    await expect(jonas.locator("#rule")).to_be_hidden()
    await jonas.write("third")
    await maya.sees("third")
    assert [one["content"] for one in await channel_history(maya.api, channel_id)][-1] == "third"


async def test_messages_wait_for_slow_mode(api: World, proxy: Proxy, tab: Any) -> None:
    """Messages written without a connection are sent as slow mode allows it, and hold up no other channel."""
    (maya_api, jonas_api), (server_id, channel_id) = await create_class(api, "Maya", "Jonas")
    await maya_api.channel(server_id, "homework")
    jonas = await tab(jonas_api, at=proxy.url)
    jonas.ignored = NETWORK_ERRORS
    await expect(jonas.locator("#people")).to_contain_text("Maya")
    await proxy.cut(jonas)
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"slow_seconds": 5})
    for text in ("one", "two"):
        await jonas.write(text)
    await jonas.open_channel("homework")
    await jonas.write("elsewhere")
    await jonas.open_channel("general")
    await proxy.start(jonas)
    await jonas.sees("one")
    await expect(jonas.row("two").locator(".fate")).to_contain_text("this will be sent as soon as it may")
    await jonas.open_channel("homework")
    await jonas.sees("elsewhere")
    await jonas.open_channel("general")
    await jonas.sees("two")
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"slow_seconds": 0})
    await expect(jonas.locator("#rule")).to_be_hidden()
    await proxy.cut(jonas)
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"slow_seconds": 3600})
    await jonas.write("three")
    await proxy.start(jonas)
    await expect(jonas.row("three").locator(".fate")).to_contain_text("this will be sent as soon as it may")
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"slow_seconds": 0})
    await jonas.sees("three")
    assert [one["content"] for one in await channel_history(maya_api, channel_id)] == ["one", "two", "three"]


async def test_a_teacher_mutes_and_lifts_the_mute(two: Any) -> None:
    maya, jonas, (server_id, _) = two
    study = await maya.api.channel(server_id, "Study room", "voice")
    await jonas.write("too loud")
    await maya.sees("too loud")
    await maya.tool("too loud", "react")
    await maya.click("#emoji button >> text=🎉")
    await jonas.join_voice()
    await expect(maya.locator(f'#voice-channels [data-id="{study}"] .talkers')).to_contain_text("Jonas")
    await maya.choose(".person >> text=Jonas", "Mute for 5 minutes")
    await expect(jonas.locator(CLOSED)).to_have_text(re.compile(r"^Muted until \d\d:\d\d$"))
    await expect(jonas.locator("#call")).to_be_hidden()
    await expect(jonas.locator("#toasts")).to_contain_text("Muted until")
    await expect(maya.locator(f'#voice-channels [data-id="{study}"] .talkers')).to_be_hidden()
    await expect(jonas.locator("#compose")).to_be_hidden()
    await jonas.row("too loud").hover()
    for name in ("edit", "reply", "react"):
        await expect(jonas.row("too loud").locator(f'[data-do="{name}"]')).to_be_hidden()
    await jonas.row("too loud").locator(".reactions button").click()
    await expect(jonas.locator("#toasts")).to_contain_text("Muted until")
    await jonas.join_voice()
    await expect(jonas.locator("#call")).to_be_hidden()
    await jonas.shot("muted-jonas")
    await expect(maya.locator('.person[aria-label^="Jonas, Online, Muted until"]')).to_be_visible()
    await maya.click(".person >> text=Jonas")
    await expect(maya.locator("#menu header")).to_contain_text("Muted until")
    await maya.shot("muted-maya")
    await maya.click("#menu >> text=Lift the mute")
    await expect(jonas.locator("#closed")).to_be_hidden()
    await jonas.write("quiet again")
    await maya.sees("quiet again")
    await maya.choose(".person >> text=Jonas", "Mute until lifted")
    await expect(jonas.locator(CLOSED)).to_have_text("Muted")
    await maya.api.ok("PUT", f"/servers/{server_id}/members/{jonas.api.user_id}/mute", {"seconds": 2})
    await expect(jonas.locator("#closed")).to_be_hidden()
    await expect(maya.locator('.person[aria-label="Jonas, Online"]')).to_be_visible()
    await jonas.write("it ends by itself")
    await maya.sees("it ends by itself")


async def test_a_refused_message_is_kept(two: Any) -> None:
    """The server refuses what the page did not know to be refused: the row says why, and nothing is lost."""
    maya, jonas, _ = two
    jonas.ignored = "403"
    refusal = '{"success": false, "error": "You are muted", "code": "FORBIDDEN", "reason": "MUTED"}'
    await jonas.evaluate(f"""() => {{
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (packet) {{
            const id = /^42(\\d+)\\["message:send"/.exec(packet)?.[1];
            id ? this.onmessage({{ data: `43${{id}}[{refusal}]` }}) : send.call(this, packet);
        }};
    }}""")
    await jonas.write("refused")
    await expect(jonas.row("refused").locator(".fate")).to_contain_text("Not sent. You are muted in this server.")
    await jonas.row("refused").get_by_role("button", name="Edit").click()
    await expect(jonas.locator("#text")).to_have_value("refused")
    assert maya.errors == []


COUNT_SOUNDS = """
    window.sounds = 0;
    const start = OscillatorNode.prototype.start;
    OscillatorNode.prototype.start = function (...more) { window.sounds++; return start.apply(this, more); };
"""


async def test_hands_are_raised_and_lowered(api: World, tab: Any) -> None:
    people, (server_id, _) = await create_class(api, "Maya", "Jonas", "Zoë")
    maya = await tab()
    await maya.page.add_init_script(COUNT_SOUNDS)
    await maya.enter(people[0])
    await maya.click("#text")
    jonas, zoe = await tab(people[1]), await tab(people[2])
    await reach(jonas, "#hand", "Shift+Tab")
    await jonas.keyboard.press("Enter")
    await expect(jonas.locator("#hand")).to_have_attribute("aria-pressed", "true")
    await zoe.click("#hand")
    for one in (maya, jonas, zoe):
        await expect(one.locator("#show-hands")).to_have_attribute("aria-label", "2 raised hands")
    await expect(maya.locator("#spoken")).to_have_text("Zoë raised a hand.")
    await eventually(lambda: maya.evaluate("window.sounds"), "the sound")
    await maya.click("#show-hands")
    names = maya.locator("#hands li bdi")
    await expect(names).to_have_text(["Jonas", "Zoë"])
    await expect(maya.locator("#hands time").first).to_have_text(re.compile(r"^\d\d:\d\d$"))
    await maya.shot("hands-maya")
    await jonas.click("#show-hands")
    await expect(jonas.locator("#hands li bdi")).to_have_text(["Jonas", "Zoë"])
    await expect(jonas.locator('#hands [data-do="lowerHand"]')).to_have_count(1)
    await expect(jonas.locator('#hands [data-do="lowerAll"]')).to_be_hidden()
    await jonas.reload()
    await expect(jonas.locator("#hand")).to_have_attribute("aria-pressed", "true")
    await expect(names).to_have_text(["Jonas", "Zoë"])
    await maya.get_by_label("Lower the hand of Jonas").click()
    await expect(jonas.locator("#hand")).to_have_attribute("aria-pressed", "false")
    await zoe.click("#hand")
    await expect(maya.locator("#hands")).to_contain_text("Nobody has raised a hand.")
    await expect(maya.locator("#show-hands")).to_be_hidden()
    await maya.get_by_label("Play a sound when a hand is raised").uncheck()
    await maya.reload()
    await maya.click("#text")
    await jonas.click("#hand")
    await zoe.click("#hand")
    await expect(maya.locator("#spoken")).to_have_text("Zoë raised a hand.")
    assert await maya.evaluate("window.sounds") == 0
    await maya.click("#show-hands")
    await expect(maya.get_by_label("Play a sound when a hand is raised")).not_to_be_checked()
    await maya.locator('#hands [data-do="lowerAll"]').click()
    for one in (jonas, zoe):
        await expect(one.locator("#hand")).to_have_attribute("aria-pressed", "false")
    await jonas.click("#hand")
    await maya.choose("#room-menu", "Lower all hands")
    await expect(jonas.locator("#hand")).to_have_attribute("aria-pressed", "false")
    await people[0].ok("PUT", f"/servers/{server_id}/members/{people[1].user_id}/mute", {})
    await jonas.click("#closed >> text=Raise your hand")
    await expect(maya.locator("#show-hands")).to_have_text("1")


async def test_the_page_offers_everyone_to_staff(two: Any) -> None:
    maya, jonas, (server_id, channel_id) = two
    await maya.api.channel(server_id, "homework")
    await jonas.open_channel("homework")
    await expect(jonas.locator("#room-name")).to_have_text("homework")
    await maya.locator("#text").press_sequentially("hello @ev")
    await expect(maya.locator("#names li").first).to_contain_text("@everyone")
    await maya.press("#text", "Enter")
    await expect(maya.locator("#text")).to_have_value("hello @everyone ")
    await maya.locator("#text").press_sequentially("and `@everyone`")
    await maya.press("#text", "Enter")
    row = await maya.sees("hello @everyone")
    await expect(row.locator(".at")).to_have_text(["@everyone"])
    await expect(row).not_to_have_class(re.compile("named"))
    badge = jonas.locator(f'#text-channels [data-id="{channel_id}"] .badge')
    await expect(badge).to_have_class(re.compile("hot"))
    await jonas.open_channel("general")
    await expect(jonas.row("hello @everyone")).to_have_class(re.compile("named"))
    await jonas.locator("#text").press_sequentially("me too @ev")
    await expect(jonas.locator("#names")).to_be_hidden()
    await jonas.write("me too @everyone")
    await expect((await maya.sees("me too @everyone")).locator(".at")).to_have_count(0)
    await expect(jonas.row("me too").locator(".at")).to_have_count(0)


async def test_rules_are_set_with_the_keyboard_alone(api: World, tab: Any) -> None:
    (maya_api, jonas_api), (_, channel_id) = await create_class(api, "Maya", "Jonas")
    maya, jonas = await tab(maya_api), await tab(jonas_api, locale="fr-FR")
    press = maya.keyboard.press
    await jonas.click("#text")
    await reach(maya, "#room-menu", "Shift+Tab")
    for key in ("Enter", "Enter", "ArrowDown", "Enter"):  # the menu, its first entry, the choice below the current one
        await press(key)
    await expect(jonas.locator(CLOSED)).to_have_text("Seuls les enseignants peuvent écrire ici")
    await expect(jonas.locator("#log")).to_be_focused()
    await reach(jonas, '#closed [data-do="hand"]')
    await jonas.keyboard.press("Enter")
    await reach(maya, "#show-hands")
    await press("Enter")
    await reach(maya, '#hands [data-do="lowerHand"]')
    await press("Enter")
    await expect(jonas.locator("#hand")).to_have_attribute("aria-pressed", "false")
    await maya_api.ok("PATCH", f"/channels/{channel_id}", {"posting": "everyone", "slow_seconds": 90})
    await expect(jonas.locator("#rule")).to_have_text("Mode lent (90 secondes)")
    await jonas.click("#text")
    await jonas.keyboard.type("bonjour")
    await jonas.keyboard.press("Enter")
    await expect(jonas.locator("#rule")).to_have_text(re.compile(r"^Mode lent : 1 min \d+ s$"))
    await jonas.keyboard.type("encore")
    await jonas.keyboard.press("Enter")
    await expect(jonas.locator("#text")).to_have_value("encore")
    await expect(jonas.locator("#text")).to_be_focused()


async def test_messages_are_kept_for_some_days(two: Any) -> None:
    maya, jonas, _ = two
    await set_rule(maya, "Keep messages", "30 days")
    await expect(maya.locator("#ask")).to_contain_text("Older messages of “general” will be deleted for everybody")
    await maya.confirm()
    await expect(jonas.locator("#rule")).to_have_text("Kept for 30 days")
    await set_rule(maya, "Keep messages", "Always")
    await expect(jonas.locator("#rule")).to_be_hidden()


@pytest.mark.skipif(AXE is None, reason="needs axe-core: npm install axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
async def test_axe_finds_nothing_in_a_lesson(api: World, tab: Any, scheme: str, width: int) -> None:
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "reduced_motion": "reduce"}
    people, (server_id, channel_id) = await create_class(api, "Maya", "Jonas", "Zoë")
    await fill_channel(people[0], people[1], server_id, channel_id)
    maya, jonas, zoe = [await tab(one, **look) for one in people]

    async def check(one: Tab, view: str) -> None:
        assert await one.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        await check_accessibility(one, view)
        await one.shot(f"{view}-{width}-{scheme}")

    await jonas.click("#hand")
    await zoe.click("#hand")
    await expect(maya.locator("#show-hands")).to_have_text("2")
    await check(maya, "teacher")
    await maya.click("#room-menu")
    await check(maya, "channel-menu")
    await maya.click("#menu >> text=Slow mode")
    await check(maya, "slow-menu")
    await maya.click("#menu >> text=1 hour")
    await jonas.fill("#text", "May I say something?")
    await jonas.press("#text", "Enter")
    await jonas.fill("#text", "And one more thing")
    await expect(jonas.locator("#rule")).to_contain_text("min")
    await check(jonas, "slow-mode")
    await set_rule(maya, "Who can write", "Only teachers")
    await check(jonas, "draft-in-a-closed-channel")
    await expect(zoe.locator(CLOSED)).to_be_visible()
    await check(zoe, "closed-channel")
    await maya.click("#show-hands")
    await expect(maya.locator("#hands li")).to_have_count(2)
    await check(maya, "hands")
    await zoe.click("#show-hands")
    await check(zoe, "hands-of-a-pupil")
    await maya.click('[data-do="closeSide"]')
    if width < 1100:
        await maya.click("#show-people")
    await maya.choose(".person >> text=Jonas", "Mute for 1 hour")
    await expect(maya.locator('.person[aria-label*="Muted until"]')).to_be_visible()
    await check(maya, "people-in-a-lesson")
    await maya.click(".person >> text=Jonas")
    await check(maya, "muted-member-menu")
    await expect(jonas.locator(CLOSED)).to_contain_text("Muted until")
    await check(jonas, "muted")


@pytest.mark.parametrize("device", BROWSERS, indirect=True)
async def test_a_lesson_is_led_in_both_browsers(api: World, device: Any) -> None:
    """A teacher closes and opens a channel, slows it down, answers a raised hand, and mutes a pupil for a while."""
    (maya_api, jonas_api), _ = await create_class(api, "Maya", "Jonas")
    maya, jonas = await device(), await device()
    for one, person in ((maya, maya_api), (jonas, jonas_api)):
        await one.open(api.url)
        session = {"user_id": person.user_id, "username": person.name, "token": person.token}
        await one.evaluate(f"localStorage.setItem('chatrtc::session', {json.dumps(json.dumps(session))})")
        await one.open(f"{api.url}/?again")
        await one.sees(person.name, "#my-status b")
    await jonas.type("#text", "a draft")
    await maya.click("#room-menu")
    await maya.click("#menu button", "Who can write")
    await maya.click("#menu button", "Only teachers")
    await jonas.sees("Only teachers can write here", "#closed")
    await jonas.click("#closed button", "Raise your hand")
    await maya.click("#show-hands")
    await maya.sees("Jonas", "#hands li")
    await maya.click("#hands [data-do=lowerHand]")
    await maya.sees("Nobody has raised a hand.", "#hands")
    await maya.click("#room-menu")
    await maya.click("#menu button", "Who can write")
    await maya.click("#menu button", "Everyone")
    await maya.click("#room-menu")
    await maya.click("#menu button", "Slow mode")
    await maya.click("#menu button", "5 seconds")
    await jonas.sees("Slow mode (5 seconds)", "#rule")
    await jonas.type("#text", "\n")
    await maya.sees("a draft", "#log .said")
    await jonas.sees("Slow mode: ", "#rule.waiting")
    await jonas.sees("Slow mode (5 seconds)", "#rule:not(.waiting)")
    await jonas.type("#text", "once more\n")
    await maya.sees("once more", "#log .said")
    await maya.click("#side [data-do=closeSide]")
    await maya.click("#people .person", "Jonas")
    await maya.click("#menu button", "Mute for 5 minutes")
    await jonas.sees("Muted until", "#closed")
    await maya.click("#people .person", "Jonas")
    await maya.click("#menu button", "Lift the mute")
    await jonas.find("#compose")
    await maya.type("#text", "thank you, @ev\n\n")
    await jonas.sees("@everyone", "#log .row.named .at")


async def test_language_and_theme_can_be_chosen(api: World, tab: Any) -> None:
    (maya_api,), _ = await create_class(api, "Maya")
    maya = await tab(maya_api, locale="fr-FR", color_scheme="dark")
    await expect(maya.locator("html")).to_have_attribute("lang", "fr")
    await expect(maya.locator("html")).to_have_attribute("data-theme", "dark")
    await expect(maya.locator("#text")).to_have_attribute("placeholder", "Écrire dans general")
    await maya.click('[data-do="settings"]')
    await maya.select_option("#language", "en")
    await maya.select_option("#theme", "light")
    await maya.reload()
    await expect(maya.locator("html")).to_have_attribute("lang", "en")
    await expect(maya.locator("html")).to_have_attribute("data-theme", "light")
    await expect(maya.locator("#text")).to_have_attribute("placeholder", "Write to general")


TEXT = r'((?:"(?:[^"\\]|\\.)*"\s*(?:\+\s*)?)+)'
PAGE_TEXTS = re.compile(rf"\b([A-Z_]{{3,}}): \[\s*{TEXT},\s*{TEXT}")


def test_each_reason_has_a_text_in_both_languages() -> None:
    """A new code or reason needs its English and its French text in ERROR_TEXTS of chatrtc.html."""
    table = PAGE.split("const ERROR_TEXTS = {")[1].split("\n};")[0]
    words = {
        reason: tuple("".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text)) for text in texts)
        for reason, *texts in PAGE_TEXTS.findall(table)
    }
    assert set(words) == {*chatrtc.REASONS, *chatrtc.ERRORS, "OFFLINE", "CODE_UNKNOWN", "FILE_LOST"}
    for reason, (english, french) in words.items():
        assert english != french, reason
        assert english[-1] == french[-1] == ".", reason
        places = [set(re.findall(r"\{\w+\}", text)) for text in (english, french)]
        assert places[0] == places[1] <= {"{n}"}, reason


async def test_ten_thousand_messages_scroll_without_jumps(api: World, tab: Any, tmp_path: Path) -> None:
    (maya_api,), place = await create_class(api, "Maya")
    await asyncio.to_thread(fill, tmp_path / "chat.db", place, maya_api.user_id, 10_000, words=40)
    maya = await tab(maya_api)
    await expect(maya.locator("#log .row").last).to_be_in_viewport()
    seen: set[str] = set()
    most = 0
    for _ in range(60):
        before = await maya.evaluate(PLACE)
        moved = await maya.evaluate(SCROLL)
        await eventually(
            lambda: maya.evaluate("document.querySelector('#log').scrollTop > 600 || !!document.querySelector('.start')"),
            "older rows",
        )
        ids = await maya.evaluate("[...document.querySelectorAll('#log .row')].map((row) => Number(row.dataset.id))")
        assert ids == list(range(ids[0], ids[-1] + 1)), "a gap, or out of order"
        seen.update(ids)
        most = max(most, len(ids))
        after = await maya.evaluate(
            "key => document.querySelector(`[data-key='${key}']`)?.getBoundingClientRect().top ?? null", before["key"]
        )
        assert after is None or abs(after - before["top"] - moved) < 3, "the view jumped"
    assert most <= 350
    assert len(seen) > 500
    await maya.click("#newest")
    await expect(maya.locator("#newest")).to_be_hidden()
    await expect(maya.locator("#log .row").last).to_be_in_viewport()


PLACE = """(() => {
    const log = document.querySelector("#log"), top = log.getBoundingClientRect().top;
    const row = [...log.querySelectorAll(".row")].find((one) => one.getBoundingClientRect().top > top);
    return {key: row.dataset.key, top: row.getBoundingClientRect().top};
})()"""
SCROLL = """(() => {
    const log = document.querySelector("#log"), from = log.scrollTop;
    log.scrollBy(0, -1500);
    return from - log.scrollTop;
})()"""


# ---- Packaging ------------------------------------------------------------------------------------------------------
async def run(*args: str | Path, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *map(str, args), cwd=cwd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_the_wheel_serves(tmp_path: Path) -> None:
    """Installed in its own environment, outside the checkout, it serves by its command and embedded."""
    await run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=HERE)
    (wheel,) = tmp_path.glob("chatrtc-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("chatrtc.sql") == (HERE / "schema.sql").read_bytes()
    assert names == {"chatrtc.py", "chatrtc.sql", "chatrtc.html"}
    await run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    there = tmp_path / "venv" / "bin"
    await run(there / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)
    assert chatrtc.__version__ in await run(there / "chatrtc", "--version", cwd=tmp_path)
    (tmp_path / "embedded.py").write_text(EMBEDDED)
    for prefix, args in {
        "": (there / "chatrtc", "serve", "--port", "0", "--database", "served.db"),
        "/chat": (there / "python", "embedded.py", "embedded.db"),
    }.items():
        process = await asyncio.create_subprocess_exec(*map(str, args), cwd=tmp_path, stdout=asyncio.subprocess.PIPE)
        address = await printed_address(process)
        async with World(address + prefix, aiohttp.ClientSession()) as world:
            ana = await world.person("ana")
            place = await world.place(ana)
            socket = Socket()
            world.sockets.append(await socket.connect(address, ana.token, path=f"{prefix}/socket.io"))
            await socket.ok("join_server", {"server_id": place.server_id})
            assert await ana.post(place.channel_id) == await socket.receive("message:new")
            assert b"<title>" in (await world.call("GET", "/")).body
        process.terminate()
        async with asyncio.timeout(PATIENCE):
            await process.communicate()
        assert process.returncode == 0


# ---- Descriptions ---------------------------------------------------------------------------------------------------
def references_in(schema: Any) -> Iterator[str]:
    """Yield every $ref of a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from references_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references_in(value)


def resolve(whole: Any, pointer: str) -> Any:
    for part in pointer.removeprefix("#/").split("/"):
        whole = whole[part.replace("~1", "/").replace("~0", "~")]
    return whole


def check_schema(whole: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    """Check that the value has the schema's shape and no key that the schema lacks."""
    jsonschema.Draft202012Validator(schema | {"components": whole["components"]}).validate(value)
    if "$ref" in schema and isinstance(value, dict):
        assert set(value) <= set(resolve(whole, schema["$ref"])["properties"]), (schema, value)


async def test_the_descriptions_are_served_and_complete(world: World) -> None:
    openapi = (await world.call("GET", "/openapi.json")).body
    asyncapi = (await world.call("GET", "/asyncapi.json")).body
    openapi_spec_validator.validate(openapi)
    described = {(method.upper(), path) for path, methods in openapi["paths"].items() for method in methods}
    assert described == {(op.method, op.path) for op in chatrtc.OPERATIONS.values() if op.path}
    for whole in (openapi, asyncapi):
        references = set(references_in(whole))
        assert references
        for reference in references:
            assert resolve(whole, reference) is not None
    emitted = {f"emit {op.event}" for op in chatrtc.OPERATIONS.values() if op.event}
    assert set(asyncapi["operations"]) == emitted | {f"hear {event}" for event in chatrtc.EVENTS}
    assert {code for code in openapi["components"]["schemas"]["Error"]["properties"]["code"]["enum"]} == set(chatrtc.ERRORS)


async def test_all_operations_match_their_descriptions(world: World) -> None:
    """Run every operation once, by REST or as an event: all answers, acks and events have the described shape."""
    openapi, asyncapi = chatrtc.openapi(), chatrtc.asyncapi()
    ana, ben, cy = await world.people("ana", "ben", "cy")
    place = await world.place(ana, ben)
    at = {
        "server_id": place.server_id, "channel_id": place.channel_id, "user_id": ben.user_id, "message_id": 1,
        "emoji": "x", "code": "",
    }  # fmt: skip
    tried: set[str] = set()

    async def rest(name: str, body: Any = None, query: str = "", who: Person = ana, **ids: Any) -> Any:
        op = chatrtc.OPERATIONS[name]
        assert op.method is not None
        assert op.path is not None
        options = {"data": body} if isinstance(body, bytes) else {"body": body}
        reply = await who.call(op.method, op.path.format(**(at | ids)) + query, **options)
        described = openapi["paths"][op.path][op.method.lower()]["responses"]
        assert str(reply.status) in described, reply
        if reply.status not in (202, 204) and op.result not in (chatrtc.FileContent, chatrtc.Document):
            check_schema(openapi, described[str(reply.status)]["content"]["application/json"]["schema"], reply.body)
        tried.add(name)
        return reply.body

    async def emit(socket: Socket, event: str, payload: Any = None) -> Any:
        ack = await socket.ok(event, *([] if payload is None else [payload]))
        answer = {key: value for key, value in ack.items() if key != "success"}
        schema = resolve(asyncapi, f"#/channels/socket/messages/{event}.ack")["payload"]
        assert ("allOf" in schema) == bool(answer)
        if answer:
            check_schema(asyncapi, schema["allOf"][1], answer)
        tried.add(chatrtc.CLIENT_EVENTS[event].name)
        return ack

    listener, talker = await ben.socket(), await world.socket()
    await emit(listener, "join_server", {"server_id": place.server_id, "after": 0})
    await emit(talker, "authenticate", {"token": ana.token})
    await emit(talker, "ping")
    await emit(talker, "join_server", {"server_id": place.server_id})
    channel = await rest("create_channel", {"name": "voices", "kind": "voice", "topic": "talk"})
    first = await emit(listener, "voice:join", {"channel_id": channel["channel_id"]})
    await emit(talker, "voice:join", {"channel_id": channel["channel_id"]})
    await emit(talker, "voice:signal", {"channel_id": channel["channel_id"], "to": first["peer_id"], "data": {"sdp": "x"}})
    await emit(talker, "voice:leave", {"channel_id": channel["channel_id"]})
    await emit(talker, "typing_start", {"channel_id": place.channel_id})
    await emit(talker, "typing_stop", {"channel_id": place.channel_id})
    await emit(talker, "hand:raise", {"server_id": place.server_id})
    await emit(await ben.socket(), "join_server", {"server_id": place.server_id})
    await emit(talker, "hand:lower", {"server_id": place.server_id})
    await rest("mute", {"seconds": 60})
    await rest("unmute")
    message = await rest("post_message", {"channel_id": place.channel_id, "content": "hello @ben", "nonce": "1"})
    at["message_id"] = message["message_id"]
    await rest("post_message", {"channel_id": place.channel_id, "content": "yes", "reply_to": message["message_id"]})
    file = await rest("upload_file", b"hello", query="?name=hello.txt&alt=greeting")
    at["file_id"] = file["file_id"]
    assert await rest("read_file") == b"hello"
    await rest("create_file_link")
    await rest("post_message", {"channel_id": place.channel_id, "content": "", "files": [file["file_id"]]})
    await rest("add_reaction")
    await rest("pin_message")
    lists = ("list_messages", "list_pins", "list_changes", "list_channels", "list_members", "list_bans")
    for name in ("get_message", "get_read", "get_transcript", *lists):
        await rest(name)
    for name in ("get_profile", "list_servers", "get_server", "check_health", "get_configuration"):
        await rest(name)
    await rest("search_messages", query="?q=hello")
    await rest("mark_read", {"message_id": message["message_id"]})
    await rest("unpin_message")
    await rest("remove_reaction")
    await rest("edit_message", {"content": "hello again"})
    await rest("remove_message")
    await rest("clear_channel")
    await emit(talker, "user:status", {"status": "invisible"})
    await rest("update_profile", {"status": "away", "name": "Ana Lima"})
    await rest("list_reads")
    rules = {"posting": "staff", "slow_seconds": 5, "keep_days": 30}
    await rest("edit_channel", {"topic": "more"} | rules, channel_id=channel["channel_id"])
    await rest("rename_server", {"name": "classes"})
    listening = await cy.socket()
    await rest("accept_invite", who=cy, code=await ana.invite(place.server_id))
    group = await rest("start_conversation", {"user_ids": [ben.user_id, cy.user_id], "name": "three"})
    await listening.receive("server:joined")
    await rest("remove_member", who=ben, server_id=group["server_id"])
    await rest("add_participant", who=ben, server_id=group["server_id"])
    await cy.ok("DELETE", f"/servers/{place.server_id}/members/{cy.user_id}")
    await rest("delete_channel", channel_id=channel["channel_id"])
    invite = await rest("create_invite", {"max_uses": 9, "expires_in": 999})
    at["code"] = invite["code"]
    await rest("list_invites")
    await rest("get_invite")
    await rest("accept_invite", who=cy)
    guest = await rest("register_guest", {"username": "guest", "code": invite["code"]})
    link = await rest("create_link", user_id=guest["user_id"])
    await rest("use_link", {"code": link["code"]})
    await rest("remove_guests")
    await rest("revoke_invite")
    await rest("ban", user_id=cy.user_id)
    await rest("unban", user_id=cy.user_id)
    await rest("set_role", {"role": "admin"})
    await rest("list_log")
    await listener.client.emit("typing_start", {"channel_id": 999})
    await listener.receive("error")
    await emit(talker, "leave_server", {"server_id": place.server_id})
    await rest("create_server", {"name": "another"}, who=cy)
    await rest("remove_member", user_id=ben.user_id, who=ben)
    await rest("delete_server")
    await rest("register", {"username": "dee", "password": "correct horse"})
    await rest("login", {"username": "dee", "password": "correct horse"})
    await rest("change_password", {"old_password": "correct horse", "new_password": "another horse"}, who=cy)
    await rest("logout")
    assert tried == set(chatrtc.OPERATIONS), "call the operation once in this test"
    for event, payload in listener.received + talker.received + listening.received:
        check_schema(asyncapi, resolve(asyncapi, f"#/channels/socket/messages/{event}")["payload"], payload)
    assert set(chatrtc.EVENTS) - {name for name, _ in listener.received + talker.received + listening.received} <= {
        "server:deleted"
    }


# ---- The tree itself ------------------------------------------------------------------------------------------------
# Rules about the source of chatrtc.py, and the tables of the docs.

SECTION = re.compile(r"^# ---- (.+?) -+$", re.MULTILINE)
SOURCE = (HERE / "chatrtc.py").read_text("utf-8")
TREE = ast.parse(SOURCE)
AnyFunction = (ast.FunctionDef, ast.AsyncFunctionDef)


def sections(source: str) -> dict[str, range]:
    """Return the lines of each section."""
    found = [(match[1], source.count("\n", 0, match.start()) + 1) for match in SECTION.finditer(source)]
    ends = [line for _, line in found[1:]] + [source.count("\n") + 2]
    return {name: range(line, end) for (name, line), end in zip(found, ends, strict=True)}


def section_of(node: ast.stmt | ast.expr) -> str:
    return next((name for name, lines in sections(SOURCE).items() if node.lineno in lines), "")


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(TREE) if isinstance(node, AnyFunction)]


def bound_in(node: ast.AST) -> set[str]:
    """Return the names that a statement binds."""
    names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    names |= {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}
    return names | {one.name for one in ast.walk(node) if one is not node and isinstance(one, (*AnyFunction, ast.ClassDef))}


def uses_of(node: ast.AST) -> Iterator[ast.Name]:
    """Yield the names that a statement reads, except those in annotations."""
    for field, value in ast.iter_fields(node):
        for one in value if isinstance(value, list) else [value]:
            if field in ("annotation", "returns"):
                continue
            if isinstance(one, ast.Name):
                yield one
            elif isinstance(one, ast.AST):
                yield from uses_of(one)


def test_names_point_upward() -> None:
    home: dict[str, int] = {}
    bound = {node: bound_in(node) for node in TREE.body}
    for node in TREE.body:
        for name in {node.name} if isinstance(node, (*AnyFunction, ast.ClassDef)) else bound[node]:
            home.setdefault(name, node.lineno)
    downward = [
        f"line {name.lineno}: {name.id}"
        for node in TREE.body
        for name in uses_of(node)
        if name.id not in bound[node] and home.get(name.id, 0) > (node.end_lineno or 0)
    ]
    assert len(home) > 300
    assert downward == [], "move the definition above its use, or the use into a later section"


def test_the_sections_of_the_tests_are_in_the_order_of_the_module() -> None:
    ours, theirs = sections(Path(__file__).read_text("utf-8")), sections(SOURCE)
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


PAGE = (HERE / "chatrtc.html").read_text("utf-8")
SCRIPT = PAGE.split('<script type="module">')[1].split("</script>")[0]
PAGE_SECTIONS = (
    "Connection", "State", "Text (Markdown)", "Render", "Sync", "Timeline", "Files", "Composer", "Sign-in", "Dialogs",
    "Viewer", "Conversations", "Administration", "Raised hands", "Voice", "Start",
)  # fmt: skip
JS_SKIPPED = re.compile(r"""\s+|//.*|/\*(?s:.*?)\*/|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
JS_REGEX = re.compile(r"/(?:\\.|\[(?:\\.|[^]\\])*\]|[^/\\\[\n])+/\w*")
JS_TEMPLATE = re.compile(r"[`}](?:\\.|(?!\$\{)[^`\\])*(?:`|\$\{)")
JS_TOKEN = re.compile(r"[\w$#]+|\.\.\.|\?\.|=>|\S")


def js_tokens(script: str) -> Iterator[tuple[str, int]]:
    """Yield each token of the script with its position, without comments, strings and regular expressions. Code inside a
    template literal is included."""
    at, last, braces = 0, "", [""]
    while at < len(script):
        template = script[at] == "`" or (script[at] == "}" and braces[-1] == "`")
        pattern = JS_TEMPLATE if template else JS_REGEX if script[at] == "/" and last in "(,=:[!&|?{};=>" else JS_TOKEN
        found = JS_SKIPPED.match(script, at) or pattern.match(script, at)
        assert found is not None, script[at : at + 80]
        token, position, at = found[0], at, found.end()
        if found.re is JS_SKIPPED and token[0] not in "\"'":
            continue
        if token[0] == "}":
            braces.pop()
        if token[-1] == "{":
            braces.append("`" if template else "{")
        last = token if found.re is JS_TOKEN else "literal"
        if found.re is JS_TOKEN:
            yield token, position


def js_names(script: str) -> Iterator[tuple[str, int]]:
    """Yield each name that the script declares or uses; names of properties are left out."""
    tokens = list(js_tokens(script))
    for (before, _), (token, at), (after, _) in zip([("", 0), *tokens], tokens, [*tokens[1:], ("", 0)], strict=False):
        if re.match(r"[A-Za-z_$]", token) and before not in (".", "?.") and not (before in "{," and after == ":"):
            yield token, at


def test_page_names_point_upward() -> None:
    """Above its definition a name of the page's script is not even mentioned."""
    home = {
        found[1]: found.start() for found in re.finditer(r"^(?:async )?(?:function|class|const|let) ([\w$]+)", SCRIPT, re.M)
    }
    early = [f"{name} in line {SCRIPT[:at].count(chr(10))}" for name, at in js_names(SCRIPT) if at < home.get(name, 0)]
    assert len(home) > 300
    assert early == []


def test_the_page_has_its_sections() -> None:
    """Each with a paragraph, in lines of at most 110 columns with one statement in each."""
    assert tuple(re.findall(r"^/\* ── (.+?) ─+\n   [A-Z]", SCRIPT, re.M)) == PAGE_SECTIONS
    assert [line for line in PAGE.splitlines() if len(line) > 110] == []
    tokens = [(token, SCRIPT[:at].count("\n")) for token, at in js_tokens(SCRIPT)]
    lines = SCRIPT.split("\n")
    crowded = [
        lines[line]
        for (token, line), (after, next_line) in itertools.pairwise(tokens)
        if token == ";" and line == next_line and after != "}"
    ]
    assert [line for line in crowded if "for (" not in line] == []


def test_calls_that_point_down_the_page_are_listed() -> None:
    listed = re.findall(r"^     (\w+)\(.*\)  +[A-Z]", SCRIPT, re.M)
    added = [
        name
        for found in re.findall(r"Object\.assign\(below, \{(.*)\}\)", SCRIPT)
        for name in re.findall(r"(\w+)(?=,|:| )", found)
    ]
    assert set(listed) == set(re.findall(r"\bbelow\.(\w+)\(", SCRIPT)) <= set(added)


def test_each_button_of_the_page_has_an_action() -> None:
    tables = re.findall(r"^Object\.assign\(actions, \{\n(.*?)^\}\);", SCRIPT, re.M | re.S)
    actions = {name for table in tables for name in re.findall(r"^  (\w+)(?=[:(,])", table, re.M)}
    assert set(re.findall(r'data-do="(\w+)"', PAGE.split("<script>")[0])) <= actions


def test_the_map_names_the_sections() -> None:
    assert re.findall(r"^    ([A-Z][A-Za-z. ]+?)  +\S", ast.get_docstring(TREE, clean=False) or "", re.M) == list(
        sections(SOURCE)
    )


def calls_of(*attributes: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in attributes
    ]


SQL_SECTIONS = {"Files", "Store", "Queries", "File queries", "Message queries"}


def test_sql_is_in_the_store() -> None:
    calls = calls_of("execute", "executemany", "executescript")
    assert len(calls) > 80
    assert {section_of(call) for call in calls} == SQL_SECTIONS, "move the query into a function of Queries or Message queries"


def test_no_data_is_formatted_into_sql() -> None:
    """Values are parameters. Only names and numbers that the program itself chooses are formatted into SQL."""
    ours = {
        "name",
        "value",
        "steps",
        "SCHEMA_FORMAT",
        "CHECKPOINT_PAGES",
        "SLOW_CHECKPOINT_PAGES",
        "also",
        "table",
        "where",
        "order",
        "MESSAGE_ROWS",
        "'integrity' if full else 'quick'",
        "pragma",
    }
    formatted = {
        ast.unparse(part.value)
        for call in calls_of("execute", "executemany", "executescript")
        for part in ast.walk(call)
        if isinstance(part, ast.FormattedValue)
    }
    assert formatted <= ours, "pass the value as a parameter; if it never comes from a client, add it to `ours`"
    assert not [call.lineno for call in calls_of("format") if section_of(call) in SQL_SECTIONS]


def test_only_one_except_catches_everything() -> None:
    """A handler that raises the exception again does not count."""
    broad = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & names_in(node.type))
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    ]
    assert len(broad) == 1, f"catch the exceptions that you expect: lines {[node.lineno for node in broad]}"


def names_in(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def test_events_leave_by_one_function() -> None:
    """Only `Hub.emit` and replies to a single socket call `publish`, and nothing calls the `emit` of the library."""
    assert len(calls_of("publish")) <= 3
    emitters = [call.func for call in calls_of("emit") if section_of(call) != "Socket.IO server"]
    assert {ast.unparse(func.value) for func in emitters if isinstance(func, ast.Attribute)} == {"self"}


def test_functions_are_small() -> None:
    sizes = {f"{one.name}, line {one.lineno}": (one.end_lineno or 0) - one.lineno + 1 for one in functions()}
    assert statistics.median(sizes.values()) <= 10
    assert {name: size for name, size in sizes.items() if size > 45} == {}, "split the function"


async def test_the_top_level_is_tidy() -> None:
    tracked = await run("git", "ls-files", cwd=HERE) if (HERE / ".git").exists() else ""
    assert {name.split("/")[0] for name in tracked.splitlines()} <= {
        ".ci", ".github", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "bench_chatrtc.py",
        "chatrtc.html", "chatrtc.py", "docs", "pyproject.toml", "schema.sql", "test_chatrtc.py",
    }  # fmt: skip
    hidden = {name for name in tracked.splitlines() if name.startswith((".ci", ".github/"))}
    assert hidden <= {".ci/run", ".github/page.png", ".github/workflows/ci.yml"}


def table(*rows: tuple[str, ...]) -> str:
    first, *rest = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {row} |" for row in [first, " | ".join(["---"] * len(rows[0])), *rest])


def code(text: str) -> str:
    return f"`{text}`"


def description_of(op: chatrtc.Operation) -> str:
    """Return what an operation does, who may do it, and which events it emits."""
    emits = " → " + " ".join(map(code, op.emits)) if op.emits else ""
    return f"{op.summary.split('. ')[0].rstrip('.')} ({op.access.value}){emits}"


def operation_rows() -> list[tuple[str, str]]:
    """Return a row for each path, with its methods, and one for each event that has no route."""
    paths: dict[str, list[str]] = {}
    for op in chatrtc.OPERATIONS.values():
        also = f", or the event {code(op.event)}" if op.event else ""
        what = f"{code(op.method)}{also}: {description_of(op)}" if op.method else description_of(op)
        paths.setdefault(op.path or op.event or "", []).append(what)
    return [(code(path), "<br>".join(what)) for path, what in paths.items()]


def event_rows() -> list[tuple[str, str, str, str]]:
    """Return a row for each group of events with the same keys and the same room."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, kind in chatrtc.EVENTS.items():
        keys = ", ".join(field.encode_name for field in msgspec.structs.fields(kind.payload))
        alike.setdefault((kind.room, keys), []).append(name)
    return [
        (" ".join(map(code, names)), " ".join(chatrtc.EVENTS[name].description for name in names),
         code(f"{room}:{{id}}") if room != "socket" else "the socket", keys)
        for (room, keys), names in alike.items()
    ]  # fmt: skip


def readme_tables() -> dict[str, str]:
    """Return the generated tables of docs/, each with its name in the comment before it."""
    limits = [
        (limit.counts, f"{limit.burst:g}, then {limit.per_second * 60:g} a minute", limit.by)
        for limit in chatrtc.LIMITS.values()
    ]
    settings = [
        (code(flag), "" if field.default in (None, (), False) else code(str(field.default)), sentence_of(field))
        for flag, field in chatrtc.setting_flags()
    ]
    reasons = [(code(name), code(error), text) for name, (error, text) in chatrtc.REASONS.items()]
    return {
        "reasons": table(("reason", "code", "text"), *reasons),
        "operations": table(("route or event", "what it does (who may do it) → events it emits"), *operation_rows()),
        "events": table(("event", "when", "to", "keys (optional keys are omitted when empty)"), *event_rows()),
        "errors": " · ".join(f"{code(name)} {status}" for name, (status, _) in chatrtc.ERRORS.items()),
        "limits": table(("what", "burst, then rate", "for each"), *limits),
        "settings": table(("option", "default", "meaning"), *settings),
    }


def sentence_of(field: msgspec.structs.FieldInfo) -> str:
    return str(field.type.__metadata__[0].description)


def documents() -> dict[Path, str]:
    """Return README.md and the pages of docs/, with their text."""
    return {path: path.read_text("utf-8") for path in [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]}


def test_the_readme_has_the_tables() -> None:
    """The generated tables of docs/ equal the program's; README=write renews them."""
    missing = set(readme_tables())
    for path, text in documents().items():
        written = text
        for name, rows in readme_tables().items():
            block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            missing -= {name} if block.search(written) else set()
            written = block.sub(lambda match, rows=rows: match[1] + rows + "\n" + match[2], written)  # type: ignore[misc]
        if os.environ.get("README") == "write":
            path.write_text(written, "utf-8")
        assert path.read_text("utf-8") == written, f"{path.name} is stale: run README=write python -m pytest -q -k readme"
    assert not missing, f"no document has the tables {missing}"
    assert (HERE / "README.md").read_text("utf-8").count("\n") <= 200


def test_the_readme_names_every_command() -> None:
    written = "".join(documents().values())
    for name in all_commands():
        assert f"chatrtc {name}" in written or f"chatrtc.py {name}" in written, (
            f"describe `chatrtc {name}` in docs/operations.md"
        )


def test_the_readme_and_the_guide_name_what_exists() -> None:
    """Every name of code in CONTRIBUTING.md occurs in the program, its schema, its page or its tests."""
    sources = "chatrtc.py", "schema.sql", "chatrtc.html", "test_chatrtc.py"
    known = "".join((HERE / name).read_text("utf-8") for name in sources)
    guide = re.sub(r"```.*?```", "", (HERE / "CONTRIBUTING.md").read_text("utf-8"), flags=re.DOTALL)
    names = set(re.findall(r"[A-Za-z]+_\w+|[A-Za-z]+[A-Z]\w+", " ".join(re.findall(r"`([^`]+)`", guide))))
    assert len(names) > 40
    unknown = [name for name in sorted(names) if name not in known]
    assert not unknown, f"CONTRIBUTING.md uses names that were renamed or deleted: {unknown}"


def readme_program(marker: str) -> str:
    """Return the Python block of README.md that contains the marker."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    return str(next(block for block in blocks if marker in block))


async def test_the_listener_of_the_readme_survives_a_restart(tmp_path: Path) -> None:
    server = await Process.start(tmp_path / "chat.db")
    port = urlsplit(server.url).port
    async with server.world() as world:
        ana = await world.person("ana")
        place = await world.place(ana)
        (tmp_path / "listen.py").write_text(readme_program("sys.argv").replace("http://localhost:3000", server.url), "utf-8")
        command = (sys.executable, tmp_path / "listen.py", ana.token)
        listener = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert listener.stdout is not None
        try:
            for content in ("before", "after"):
                async with asyncio.timeout(30):
                    assert b"'success': True" in await listener.stdout.readline()
                await ana.post(place.channel_id, content)
                async with asyncio.timeout(30):
                    assert (await listener.stdout.readline()).decode() == f"ana says: {content}\n"
                if content == "before":
                    await server.stop()
                    server = await Process.start(tmp_path / "chat.db", "--port", str(port))
        finally:
            listener.kill()
            await listener.wait()
            await server.stop()


def test_the_readme_programs_are_programs() -> None:
    written = (HERE / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", written, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
