"""The tests of ChatRTC, in the order of its rooms: a real server on a free port, real clients, a real SQLite file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
import pytest_asyncio
import socketio
from aiohttp import web
from hypothesis import HealthCheck, given, settings, stateful, strategies
from yarl import URL

import chatrtc

HERE = Path(__file__).resolve().parent
PATIENCE = 10.0  # seconds that a test waits for something that is to happen

# ---- World -----------------------------------------------------------------------------------------------------------
# A server in this process (`world`) or in its own (`Process`), and people who use it with real clients. Waiting is for
# an event, bounded; that nothing happens is shown by a fence: something later, on the same path, that does happen.


def tool(name: str) -> str:
    """The path of a program that some tests need; they are skipped without it, but not in CI."""
    path = shutil.which(name)
    if path is None:
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse(f"{name} is not installed")
    return path


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def code(self) -> str:
        """The code of a refusal; empty where it is none."""
        return str(self.body["code"]) if self.status >= 400 else ""


# What an auditor, who listens in for all tests, found wrong with what the server said.
FAULTS: list[str] = []


def fits(payload: Any, kind: Any) -> bool:
    """Whether these are exactly the keys that the type allows, and the values are of its types."""
    fields = {field.encode_name: field.required for field in msgspec.structs.fields(kind)}
    try:
        msgspec.convert(payload, kind)
    except msgspec.ValidationError:
        return False
    return set(payload) <= set(fields) and all(name in payload for name, required in fields.items() if required)


def audit_event(event: str, *payload: Any) -> None:
    if event not in chatrtc.EVENTS or len(payload) != 1 or not fits(payload[0], chatrtc.EVENTS[event].payload):
        FAULTS.append(f"event {event}: {payload}")


def audit_ack(event: Any, ack: Any) -> None:
    if not isinstance(ack, dict) or not isinstance(ack.get("success"), bool):
        FAULTS.append(f"{event}: an ack says whether it succeeded: {ack}")
    elif not ack["success"]:
        audit_refusal({key: value for key, value in ack.items() if key != "success"})
    else:
        op = next(op for op in chatrtc.OPERATIONS.values() if op.event == event)
        answer = {key: value for key, value in ack.items() if key != "success"}
        if not (fits(answer, op.answer) if op.acks and op.answer is not type(None) else answer == {}):
            FAULTS.append(f"{event}: ack {ack}")


def audit_reply(reply: Reply) -> None:
    if reply.status < 400:
        return
    audit_refusal(reply.body)
    if isinstance(reply.body, dict) and reply.code in chatrtc.ERRORS:
        retry_after = str(reply.body["retry_after"]) if "retry_after" in reply.body else None
        if reply.status != chatrtc.ERRORS[reply.code].status or reply.headers.get("Retry-After") != retry_after:
            FAULTS.append(f"reply {reply}")


def audit_refusal(body: Any) -> None:
    known = isinstance(body, dict) and body.get("code") in chatrtc.ERRORS and bool(body.get("error"))
    if not known or set(body) != {"error", "code"} | ({"retry_after"} if body["code"] == "RATE_LIMITED" else set()):
        FAULTS.append(f"refusal {body}")


@pytest.fixture(autouse=True)
def auditor(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test is about: every event and error is one of the tables, in its shape, and nothing breaks unseen."""
    FAULTS.clear()
    yield
    assert not FAULTS, FAULTS
    for record in caplog.get_records("call"):
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, aiohttp.http_exceptions.HttpProcessingError):  # what is no HTTP, aiohttp answers and logs
            assert error is None, f"{record.getMessage()}: {error!r}"


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
        audit_event(event, *payload)
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
        data = payload[0] if len(payload) == 1 and payload != (None,) else payload or None
        ack = await self.client.call(event, data, timeout=PATIENCE)
        audit_ack(event, ack)
        return ack

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

    async def hears_not(self, *events: str, **fields: Any) -> None:
        """None of these (with such fields) has come by the time that an ack of now comes."""
        await self.call("ping")
        heard = [(name, told) for name, told in self.heard[self._read :] if name in events]
        assert not [told for _, told in heard if all(told.get(key) == value for key, value in fields.items())], heard

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


# ---- Payloads --------------------------------------------------------------------------------------------------------
# The shapes of things: what is a name, what is a text, and that a thing says no more than it has to say.


@pytest.mark.parametrize(
    "name", ["al", "a" * 32, "élodie", "Жанна", "王小明", "नमस्ते", "a.b-c_d", "42", "ﬁona", "عمر", "ΣΊΣΥΦΟΣ"]
)
async def test_a_username_is_of_any_script(world: World, name: str) -> None:
    person = await world.person(name)
    assert (await person.ok("GET", "/users/me"))["username"] == name
    for spelled in (name.upper(), unicodedata.normalize("NFD", name)):
        again = await world.call("POST", "/auth/register", {"username": spelled, "password": "correct horse"})
        assert again.code == "CONFLICT", spelled
    login = await world.call("POST", "/auth/login", {"username": name.upper(), "password": "correct horse"})
    assert (login.status, login.body["user_id"]) == (200, person.user_id)


@pytest.mark.parametrize(
    "name", ["a b", "a@b", "a/b", "a\n", "\u200bab", "a\u202eb", "\u3164\u3164", "ab\x00", "😀😀", "ab:", "\u0301a", "  "]
)
async def test_a_username_holds_nothing_else(world: World, name: str) -> None:
    reply = await world.call("POST", "/auth/register", {"username": name, "password": "correct horse"})
    assert reply.code == "BAD_REQUEST"


async def test_a_plain_message_has_the_keys_of_the_specification_and_seq(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    hears = await ben.socket(place.server_id)
    message = await ana.post(place.channel_id, "hello")
    assert set(message) == MESSAGE_KEYS
    assert await hears.hears("message:new") == message
    assert await ben.ok("GET", f"/messages/{message['message_id']}") == message
    history = await ben.ok("GET", f"/channels/{place.channel_id}/messages")
    assert history == {"messages": [message], "has_more": False}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", message["created_at"])


async def test_an_optional_key_is_there_when_it_has_something_to_say(world: World) -> None:
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
    assert edited["reactions"] == [{"emoji": "👍", "user_ids": [ana.user_id, ben.user_id]}]
    for person in (ana, ben):
        await person.ok("DELETE", f"{path}/reactions/👍")
    assert set(await ben.ok("GET", path)) == MESSAGE_KEYS | {"reply_to", "nonce", "edited_at"}


async def test_things_come_as_the_contract_has_them(world: World) -> None:
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
    (me,) = (await ana.ok("GET", f"{path}/members"))["members"]
    assert set(me) == {"server_id", "user_id", "username", "role", "status", "joined_at", "connected"}
    invite = await ana.ok("POST", f"{path}/invites", {"max_uses": 3, "expires_in": 60})
    assert set(invite) == {"code", "server_id", "max_uses", "uses", "expires_at"}
    assert await ana.ok("GET", f"{path}/invites") == {"invites": [invite]}
    preview = (await world.call("GET", f"/invites/{invite['code']}")).body
    assert preview == {"code": invite["code"], "server_id": server["server_id"]} | {"server_name": "class", "member_count": 1}
    health = await world.call("GET", "/healthz")
    assert (health.status, set(health.body), health.body["status"]) == (200, {"status", "version"}, "ok")


# ---- Events ----------------------------------------------------------------------------------------------------------
# Each event of the contract, told by a short story: who hears it, with which keys, and who, on a path that works, does
# not.

MESSAGE_KEYS = {"channel_id", "message_id", "content", "author_id", "author_username", "created_at", "seq"}
PLACE_KEYS = {"server_id", "user_id", "username"}
TYPING_KEYS = {"channel_id", "user_id", "username"}


class Scene:
    """Ana's class, where she and Ben listen; Cy, a member, has not joined; Dee, a stranger, listens elsewhere."""

    world: World
    ana: Person
    ben: Person
    cy: Person
    dee: Person
    place: Place
    mine: Socket  # Ana's
    here: Socket  # Ben's
    away: Socket  # Cy's
    elsewhere: Socket  # Dee's

    @classmethod
    async def make(cls, world: World) -> Scene:
        self = cls()
        self.world = world
        self.ana, self.ben, self.cy, self.dee = await world.people("ana", "ben", "cy", "dee")
        self.place = await world.place(self.ana, self.ben, self.cy)
        other = await world.place(self.dee, name="other")
        self.mine = await self.ana.socket(self.place.server_id)
        self.here = await self.ben.socket(self.place.server_id)
        self.away = await self.cy.socket()
        self.elsewhere = await self.dee.socket(other.server_id)
        await self.ana.post(self.place.channel_id, "before")  # what came before is over
        await asyncio.gather(self.mine.hears("message:new"), self.here.hears("message:new"))
        return self

    async def post(self) -> Any:
        return await self.ana.post(self.place.channel_id, "told")

    @property
    def server(self) -> str:
        return f"/servers/{self.place.server_id}"


@pytest_asyncio.fixture
async def scene(world: World) -> Scene:
    return await Scene.make(world)


Act = Callable[[Scene], Awaitable[dict[str, Any]]]


class Story(NamedTuple):
    event: str
    keys: set[str]
    act: Act
    speaker_hears: bool = True


STORIES: dict[str, Story] = {}


def story(event: str, keys: set[str], speaker_hears: bool = True) -> Callable[[Act], Act]:
    """What Ana does so that those who listen hear this event; it returns what must stand in the event."""

    def tell(act: Act) -> Act:
        STORIES[f"{event} {act.__name__}".replace("_", " ")] = Story(event, keys, act, speaker_hears)
        return act

    return tell


@story("message:new", MESSAGE_KEYS)
async def by_posting(at: Scene) -> dict[str, Any]:
    message: dict[str, Any] = await at.post()
    return message


@story("message:edit", MESSAGE_KEYS | {"edited_at"})
async def by_editing(at: Scene) -> dict[str, Any]:
    message = await at.post()
    edited: dict[str, Any] = await at.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "better"})
    assert edited["content"] == "better"
    return edited


@story("message:edit", MESSAGE_KEYS | {"edited_at"})
async def by_editing_over_the_socket(at: Scene) -> dict[str, Any]:
    message = await at.post()
    ack = await at.mine.ok("message:edit", {"message_id": message["message_id"], "content": "better"})
    return {key: value for key, value in ack.items() if key != "success"} | {"content": "better"}


@story("message:deleted", {"channel_id", "message_id", "seq"})
async def by_deleting(at: Scene) -> dict[str, Any]:
    message = await at.post()
    await at.ana.ok("DELETE", f"/messages/{message['message_id']}")
    return {"channel_id": at.place.channel_id, "message_id": message["message_id"], "seq": message["seq"] + 1}


REACTION_KEYS = {"channel_id", "message_id", "user_id", "username", "emoji", "seq"}


@story("reaction:add", REACTION_KEYS)
async def by_reacting(at: Scene) -> dict[str, Any]:
    message = await at.post()
    await at.ana.ok("PUT", f"/messages/{message['message_id']}/reactions/🎉")
    return {"message_id": message["message_id"], "user_id": at.ana.user_id, "username": "ana", "emoji": "🎉"}


@story("reaction:add", REACTION_KEYS)
async def by_reacting_over_the_socket(at: Scene) -> dict[str, Any]:
    message = await at.post()
    assert await at.mine.ok("reaction:add", {"message_id": message["message_id"], "emoji": "a/b"}) == {"success": True}
    return {"message_id": message["message_id"], "emoji": "a/b"}


@story("reaction:remove", REACTION_KEYS)
async def by_taking_it_back(at: Scene) -> dict[str, Any]:
    message = await at.post()
    await at.ana.ok("PUT", f"/messages/{message['message_id']}/reactions/a%2Fb")
    await at.ana.ok("DELETE", f"/messages/{message['message_id']}/reactions/a%2Fb")
    return {"message_id": message["message_id"], "emoji": "a/b", "user_id": at.ana.user_id}


@story("reaction:remove", REACTION_KEYS)
async def by_taking_it_back_over_the_socket(at: Scene) -> dict[str, Any]:
    message = await at.post()
    reaction = {"message_id": message["message_id"], "emoji": ":+1:"}
    await at.mine.ok("reaction:add", reaction)
    assert await at.mine.ok("reaction:remove", reaction) == {"success": True}
    return reaction


@story("user:typing", TYPING_KEYS, speaker_hears=False)
async def by_typing(at: Scene) -> dict[str, Any]:
    assert await at.mine.ok("typing_start", {"channel_id": at.place.channel_id}) == {"success": True}
    return {"channel_id": at.place.channel_id, "user_id": at.ana.user_id, "username": "ana"}


@story("typing_stop", TYPING_KEYS, speaker_hears=False)
async def by_stopping(at: Scene) -> dict[str, Any]:
    await at.mine.ok("typing_start", {"channel_id": at.place.channel_id})
    assert await at.mine.ok("typing_stop", {"channel_id": at.place.channel_id}) == {"success": True}
    return {"channel_id": at.place.channel_id, "user_id": at.ana.user_id, "username": "ana"}


@story("typing_stop", TYPING_KEYS, speaker_hears=False)
async def by_posting_what_was_typed(at: Scene) -> dict[str, Any]:
    await at.mine.ok("typing_start", {"channel_id": at.place.channel_id})
    await at.post()
    return {"user_id": at.ana.user_id}


@story("typing_stop", TYPING_KEYS, speaker_hears=False)
async def by_leaving_while_typing(at: Scene) -> dict[str, Any]:
    await at.mine.ok("typing_start", {"channel_id": at.place.channel_id})
    await at.mine.ok("leave_server", {"server_id": at.place.server_id})
    return {"user_id": at.ana.user_id}


@story("user:disconnected", PLACE_KEYS, speaker_hears=False)
async def by_leaving_the_room(at: Scene) -> dict[str, Any]:
    assert await at.mine.ok("leave_server", {"server_id": at.place.server_id}) == {"success": True}
    return {"server_id": at.place.server_id, "user_id": at.ana.user_id, "username": "ana"}


@story("user:connected", PLACE_KEYS)
async def by_coming_back(at: Scene) -> dict[str, Any]:
    await at.mine.ok("leave_server", {"server_id": at.place.server_id})
    await at.mine.ok("join_server", {"server_id": at.place.server_id})
    return {"server_id": at.place.server_id, "user_id": at.ana.user_id, "username": "ana"}


@story("user:status", {"user_id", "username", "status"})
async def by_setting_a_status(at: Scene) -> dict[str, Any]:
    profile = await at.ana.ok("PATCH", "/users/me", {"status": "busy"})
    assert set(profile) == {"user_id", "username", "status", "created_at"}
    return {"user_id": at.ana.user_id, "username": "ana", "status": "busy"}


@story("user:status", {"user_id", "username", "status"})
async def by_setting_a_status_over_the_socket(at: Scene) -> dict[str, Any]:
    assert await at.mine.ok("user:status", {"status": "away"}) == {"success": True}
    return {"user_id": at.ana.user_id, "username": "ana", "status": "away"}


@story("member:joined", {*PLACE_KEYS, "seq"})
async def by_an_invite(at: Scene) -> dict[str, Any]:
    invite = await at.ana.ok("POST", f"{at.server}/invites", {})
    eve = await at.world.person("eve")
    await eve.ok("POST", f"/invites/{invite['code']}")
    return {"server_id": at.place.server_id, "user_id": eve.user_id, "username": "eve"}


@story("member:joined", {*PLACE_KEYS, "seq"})
async def by_registering_with_an_invite(at: Scene) -> dict[str, Any]:
    invite = await at.ana.ok("POST", f"{at.server}/invites", {})
    account = {"username": "eve", "password": "correct horse", "code": invite["code"]}
    reply = await at.world.call("POST", "/auth/register", account)
    return {"user_id": reply.body["user_id"], "username": "eve"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_removing(at: Scene) -> dict[str, Any]:
    await at.ana.ok("DELETE", f"{at.server}/members/{at.cy.user_id}")
    return {"server_id": at.place.server_id, "user_id": at.cy.user_id, "username": "cy"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_banning(at: Scene) -> dict[str, Any]:
    await at.ana.ok("PUT", f"{at.server}/bans/{at.cy.user_id}")
    return {"server_id": at.place.server_id, "user_id": at.cy.user_id, "username": "cy"}


@story("member:left", {*PLACE_KEYS, "seq"})
async def by_going(at: Scene) -> dict[str, Any]:
    await at.cy.ok("DELETE", f"{at.server}/members/{at.cy.user_id}")
    return {"server_id": at.place.server_id, "user_id": at.cy.user_id, "username": "cy"}


CHANNEL_KEYS = {"server_id", "channel_id", "name", "seq"}


@story("channel:created", CHANNEL_KEYS)
async def by_creating(at: Scene) -> dict[str, Any]:
    channel = await at.ana.ok("POST", f"{at.server}/channels", {"name": "new"})
    return {"server_id": at.place.server_id, "channel_id": channel["channel_id"], "name": "new"}


@story("channel:updated", CHANNEL_KEYS)
async def by_renaming(at: Scene) -> dict[str, Any]:
    await at.ana.ok("PATCH", f"/channels/{at.place.channel_id}", {"name": "renamed"})
    return {"server_id": at.place.server_id, "channel_id": at.place.channel_id, "name": "renamed"}


@story("channel:deleted", {"server_id", "channel_id", "seq"})
async def by_closing_it(at: Scene) -> dict[str, Any]:
    await at.ana.ok("DELETE", f"/channels/{at.place.channel_id}")
    return {"server_id": at.place.server_id, "channel_id": at.place.channel_id}


@story("server:updated", {"server_id", "name", "seq"})
async def by_renaming_the_server(at: Scene) -> dict[str, Any]:
    await at.ana.ok("PATCH", at.server, {"name": "better class"})
    return {"server_id": at.place.server_id, "name": "better class"}


@story("server:deleted", {"server_id"})
async def by_deleting_the_server(at: Scene) -> dict[str, Any]:
    await at.ana.ok("DELETE", at.server)
    return {"server_id": at.place.server_id}


VOICE_KEYS = {"channel_id", "user_id", "username", "peer_id"}


async def talk(at: Scene) -> tuple[int, Any]:
    voice = await at.ana.ok("POST", f"{at.server}/channels", {"name": "talk", "kind": "voice"})
    return voice["channel_id"], await at.mine.ok("voice:join", {"channel_id": voice["channel_id"]})


@story("voice:join", VOICE_KEYS)
async def by_entering(at: Scene) -> dict[str, Any]:
    channel_id, ack = await talk(at)
    assert ack == {"success": True, "peer_id": ack["peer_id"], "participants": [], "ice_servers": []}
    return {"channel_id": channel_id, "user_id": at.ana.user_id, "username": "ana", "peer_id": ack["peer_id"]}


@story("voice:leave", VOICE_KEYS)
async def by_leaving_it(at: Scene) -> dict[str, Any]:
    channel_id, ack = await talk(at)
    assert await at.mine.ok("voice:leave", {"channel_id": channel_id}) == {"success": True}
    return {"channel_id": channel_id, "user_id": at.ana.user_id, "username": "ana", "peer_id": ack["peer_id"]}


@pytest.mark.parametrize("name", STORIES)
async def test_an_event_reaches_its_room_and_nobody_else(scene: Scene, name: str) -> None:
    story = STORIES[name]
    told = await story.act(scene)
    heard = await scene.here.hears(story.event)
    assert set(heard) == story.keys
    assert {key: heard[key] for key in told} == told
    if story.speaker_hears:
        assert await scene.mine.hears(story.event) == heard
    else:
        await scene.mine.hears_not(story.event)
    await scene.elsewhere.hears_not(story.event, **heard)
    if not scene.away.closed.is_set():
        await scene.away.hears_not(story.event, **heard)


def test_every_event_of_the_contract_has_its_story() -> None:
    told_below = {"mention", "member:updated", "voice:signal", "error"}
    assert {story.event for story in STORIES.values()} | told_below == set(chatrtc.EVENTS)


async def test_a_mention_reaches_each_socket_of_who_is_named_but_not_its_author(scene: Scene) -> None:
    text = "@BEN, @cy. @ana @dee @nobody"
    message = await scene.ana.post(scene.place.channel_id, text)
    assert message["mentions"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy))
    for hears in (scene.here, scene.away):  # one who has joined, one who has not
        assert await hears.hears("mention") == message | {"server_id": scene.place.server_id}
    await scene.mine.hears_not("mention")
    await scene.elsewhere.hears_not("mention")


async def test_an_edit_notifies_those_whom_it_names_anew(scene: Scene) -> None:
    message = await scene.ana.post(scene.place.channel_id, "@ben")
    await scene.here.hears("mention")
    edited = await scene.ana.ok("PATCH", f"/messages/{message['message_id']}", {"content": "@ben @cy"})
    assert await scene.away.hears("mention") == edited | {"server_id": scene.place.server_id}
    await scene.here.hears("message:edit")
    await scene.here.hears_not("mention")


async def test_a_role_is_told(scene: Scene) -> None:
    member = await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.ben.user_id}", {"role": "admin"})
    assert member["role"] == "admin"
    heard = await scene.here.hears("member:updated")
    assert heard == {"server_id": scene.place.server_id, "user_id": scene.ben.user_id} | {
        "username": "ben",
        "role": "admin",
        "seq": heard["seq"],
    }
    await scene.elsewhere.hears_not("member:updated")


async def test_an_event_without_an_ack_that_fails_is_answered_by_an_error_event(scene: Scene) -> None:
    await scene.here.client.emit("typing_start", {"channel_id": 999})
    heard = await scene.here.hears("error")
    assert set(heard) == {"event", "error", "code"}
    assert (heard["event"], heard["code"]) == ("typing_start", "NOT_FOUND")
    assert (await scene.here.call("typing_start", {"channel_id": 999}))["code"] == "NOT_FOUND"
    await scene.here.hears_not("error")  # what asked for an ack has been answered by it
    await scene.mine.hears_not("error")


async def test_who_is_banned_or_removed_hears_nothing_more(scene: Scene) -> None:
    for verb, path in (("PUT", "bans"), ("DELETE", "members")):
        eve = await scene.world.person(f"eve-{path}")
        invite = await scene.ana.ok("POST", f"{scene.server}/invites", {})
        await eve.ok("POST", f"/invites/{invite['code']}")
        socket = await eve.socket(scene.place.server_id)
        await scene.post()
        await socket.hears("message:new")
        await scene.ana.ok(verb, f"{scene.server}/{path}/{eve.user_id}")
        after = await scene.post()
        await scene.here.hears("message:new", message_id=after["message_id"])
        await asyncio.wait_for(socket.closed.wait(), PATIENCE)
        assert after not in [payload for _, payload in socket.heard]
        assert (await eve.call("GET", f"/channels/{scene.place.channel_id}/messages")).code == "FORBIDDEN"


async def test_who_leaves_hears_it_and_then_nothing(scene: Scene) -> None:
    await scene.ben.ok("DELETE", f"{scene.server}/members/{scene.ben.user_id}")
    assert (await scene.here.hears("member:left"))["user_id"] == scene.ben.user_id
    await scene.post()
    await scene.mine.hears("message:new")
    await scene.here.hears_not("message:new")
    assert (await scene.here.call("join_server", {"server_id": scene.place.server_id}))["code"] == "FORBIDDEN"


# ---- Store -----------------------------------------------------------------------------------------------------------
# One sequence a server: every durable change takes the next number, those who listen hear it in that order, and who was
# away catches up with it, to the same end.


async def test_every_durable_change_takes_the_next_number(scene: Scene) -> None:
    ana, server = scene.ana, scene.server
    start = (await ana.ok("GET", f"{server}/changes"))["seq"]
    message = await scene.post()
    path = f"/messages/{message['message_id']}"
    await ana.ok("PATCH", path, {"content": "better"})
    await ana.ok("PUT", f"{path}/reactions/👍")
    await ana.ok("PUT", f"{path}/reactions/👍")  # changes nothing, and takes no number
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
    await scene.here.hears("member:left")
    told = [payload["seq"] for _, payload in scene.here.heard if "seq" in payload]
    assert told[-11:] == [start + 1 + step for step in range(11)]


async def test_changes_tell_what_came_after_a_number(scene: Scene) -> None:
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
    assert set(changes) == {"seq", "has_more", "messages", "deleted", "members"}
    assert changes["members"] == (await ana.ok("GET", f"{server}/members"))["members"]


async def test_joining_with_after_gives_the_changes_and_then_the_events(scene: Scene) -> None:
    ack = await scene.away.ok("join_server", {"server_id": scene.place.server_id})
    assert set(ack) == {"success", "connected_users", "seq"}
    assert ack["connected_users"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy))
    await scene.away.ok("leave_server", {"server_id": scene.place.server_id})
    missed = await scene.post()
    again = await scene.away.ok("join_server", {"server_id": scene.place.server_id, "after": ack["seq"]})
    assert again["changes"] == {"seq": missed["seq"], "has_more": False, "messages": [missed], "deleted": []}
    assert again["seq"] == missed["seq"]
    told = await scene.post()
    assert (await scene.away.hears("message:new"))["seq"] == told["seq"] == again["seq"] + 1


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


class Replica:
    """A client as the contract has it: it skips what it has, and asks for changes where a number is missing."""

    def __init__(self, person: Person, server_id: int) -> None:
        self.person, self.server_id = person, server_id
        self.seq = 0
        self.messages: dict[int, Any] = {}
        self.channels: dict[int, Any] = {}
        self.members: dict[int, str] = {}
        self.socket: Socket | None = None
        self.read = 0
        self.asked = 0

    async def come(self) -> None:
        self.socket = await self.person.world.socket(self.person.token, transports=["websocket"])
        self.read = 0
        ack = await self.socket.ok("join_server", {"server_id": self.server_id, "after": self.seq})
        self.merge(ack["changes"])
        await self.catch_up(ack["changes"]["has_more"])

    async def go(self) -> None:
        """Drop the line, with whatever was on its way."""
        if self.socket is not None:
            await self.socket.close()
            self.socket = None

    async def catch_up(self, more: bool = True) -> None:
        while more:
            self.asked += 1
            changes = await self.person.ok("GET", f"/servers/{self.server_id}/changes?after={self.seq}&limit=7")
            self.merge(changes)
            more = changes["has_more"]

    def merge(self, changes: Any) -> None:
        for message in changes["messages"]:
            self.messages[message["message_id"]] = message
        for deletion in changes["deleted"]:
            self.messages.pop(deletion["message_id"], None)
        if "channels" in changes:
            self.channels = {channel["channel_id"]: channel for channel in changes["channels"]}
            self.drop_strays()
        if "members" in changes:
            self.members = {member["user_id"]: member["role"] for member in changes["members"]}
        self.seq = changes["seq"]

    def drop_strays(self) -> None:
        self.messages = {key: told for key, told in self.messages.items() if told["channel_id"] in self.channels}

    async def listen(self) -> None:
        """Take in what was heard so far."""
        assert self.socket is not None
        await self.socket.call("ping")
        while self.read < len(self.socket.heard):
            event, payload = self.socket.heard[self.read]
            self.read += 1
            if "seq" not in payload or event == "mention" or payload["seq"] <= self.seq:
                continue
            if payload["seq"] > self.seq + 1:
                await self.catch_up()
            else:
                self.apply(event, dict(payload))
                self.seq = payload["seq"]

    def apply(self, event: str, told: Any) -> None:
        message = self.messages.get(told.get("message_id"))
        match event:
            case "message:new" | "message:edit":
                self.messages[told["message_id"]] = told
            case "message:deleted":
                self.messages.pop(told["message_id"], None)
            case "reaction:add" | "reaction:remove" if message is not None:
                pairs = {(one["emoji"], user) for one in message.pop("reactions", []) for user in one["user_ids"]}
                pair = {(told["emoji"], told["user_id"])}
                pairs = pairs | pair if event == "reaction:add" else pairs - pair
                emojis = sorted({emoji for emoji, _ in pairs})
                if emojis:
                    message["reactions"] = [
                        {"emoji": emoji, "user_ids": sorted(user for one, user in pairs if one == emoji)} for emoji in emojis
                    ]
                message["seq"] = told["seq"]
            case "channel:created" | "channel:updated":
                plain = {"kind": "text", "topic": ""} | told
                plain.pop("seq")
                self.channels[told["channel_id"]] = plain
            case "channel:deleted":
                del self.channels[told["channel_id"]]
                self.drop_strays()
            case "member:joined":
                self.members[told["user_id"]] = "member"
            case "member:left":
                self.members.pop(told["user_id"], None)
            case "member:updated":
                self.members[told["user_id"]] = told["role"]

    def state(self) -> Any:
        return {"seq": self.seq, "messages": self.messages, "channels": self.channels, "members": self.members}


async def truth(person: Person, server_id: int) -> Any:
    """The same, as GET has it."""
    server = f"/servers/{server_id}"
    channels = (await person.ok("GET", f"{server}/channels"))["channels"]
    messages: dict[int, Any] = {}
    for channel in channels:
        path, after, more = f"/channels/{channel['channel_id']}/messages?limit=9", 0, True
        while more:
            page = await person.ok("GET", f"{path}&after={after}")
            messages |= {message["message_id"]: message for message in page["messages"]}
            after, more = max((one["message_id"] for one in page["messages"]), default=0), page["has_more"]
    return {
        "seq": (await person.ok("GET", f"{server}/changes"))["seq"],
        "messages": messages,
        "channels": {channel["channel_id"]: channel for channel in channels},
        "members": {member["user_id"]: member["role"] for member in (await person.ok("GET", f"{server}/members"))["members"]},
    }


class History:
    """Random things that people do in one server."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.random = scene, random.Random(seed)
        self.channels = [scene.place.channel_id]
        self.messages: list[int] = []
        self.code = ""

    async def step(self) -> None:
        """One more thing; one that comes too late is refused, and that is all right."""
        pick, scene = self.random.choice, self.scene
        person, path = pick([scene.ana, scene.ben]), f"/messages/{pick(self.messages or [1])}"
        match self.random.choices(
            ["post", "edit", "delete", "react", "unreact", "open", "rename", "close", "leave", "join", "role", "name"],
            [20, 8, 5, 8, 4, 2, 2, 1, 2, 3, 1, 1],
        )[0]:
            case "post":
                reply = await person.call("POST", "/messages", {"channel_id": pick(self.channels), "content": "@ben hi"})
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


async def converge(scene: Scene, seed: int, steps: int) -> None:
    history = History(scene, seed)
    steady, flighty = (Replica(scene.ben, scene.place.server_id) for _ in range(2))
    await asyncio.gather(steady.come(), flighty.come())
    for _ in range(steps):
        await asyncio.gather(*(history.step() for _ in range(history.random.randint(1, 5))))
        if history.random.random() < 0.3:
            await (flighty.go() if flighty.socket else flighty.come())
        for replica in (steady, flighty):
            if replica.socket is not None and history.random.random() < 0.5:
                await replica.listen()
    if flighty.socket is None:
        await flighty.come()
    await asyncio.gather(steady.listen(), flighty.listen())
    expected = await truth(scene.ben, scene.place.server_id)
    assert steady.state() == expected
    assert flighty.state() == expected
    assert steady.asked == 0, "who never left is never missing a number"


@pytest.mark.parametrize("seed", range(4))
async def test_a_client_that_comes_and_goes_ends_equal_to_one_that_never_left(scene: Scene, seed: int) -> None:
    await converge(scene, seed, 60)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 140))
async def test_clients_converge_after_long_histories(scene: Scene, seed: int) -> None:
    await converge(scene, seed, 400)


async def frames(person: Person, server_id: int, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
    """A socket joined to that server, as bare frames: a hundred of python-socketio's would measure python-socketio."""
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


async def hear_posts(socket: aiohttp.ClientWebSocketResponse, count: int) -> list[Any]:
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


async def test_a_thousand_concurrent_posts_are_heard_by_a_hundred_sockets_in_order(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    start = (await ana.ok("GET", f"/servers/{place.server_id}/changes"))["seq"]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        sockets = [await frames(ben, place.server_id, session) for _ in range(100)]
        hearing = [asyncio.create_task(hear_posts(socket, 1000)) for socket in sockets]
        replies = await asyncio.gather(*(ana.post(place.channel_id, str(number)) for number in range(1000)))
        heard = await asyncio.gather(*hearing)
    assert sorted(reply["seq"] for reply in replies) == [start + 1 + number for number in range(1000)]
    expected = sorted(replies, key=lambda reply: int(reply["seq"]))
    assert all(posts == expected for posts in heard)


async def test_a_server_that_starts_again_has_all_that_it_acknowledged(tmp_path: Path) -> None:
    process = await Process.start(tmp_path / "chat.db")
    world = process.world()
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    message = await ana.post(place.channel_id, "kept", nonce="n")
    await world.close()
    await process.stop(signal.SIGKILL)
    process = await Process.start(tmp_path / "chat.db")
    world = process.world()
    ben.world = ana.world = world  # tokens stand: the secret was kept
    history = await ben.ok("GET", f"/channels/{place.channel_id}/messages")
    assert history == {"messages": [message], "has_more": False}
    assert await ana.post(place.channel_id, "kept", nonce="n") == message
    again = await ana.post(place.channel_id, "next")
    assert (again["message_id"], again["seq"]) == (message["message_id"] + 1, message["seq"] + 1)
    await world.close()
    assert await process.stop() == (0, "")


# ---- Presence --------------------------------------------------------------------------------------------------------
# Who is here and who types: several tabs are one person, and nothing stays of a socket that has gone.


class PresenceMachine(stateful.RuleBasedStateMachine):
    """Presence against the plainest model: a set of (server, user, socket)."""

    def __init__(self) -> None:
        super().__init__()
        self.presence = chatrtc.Presence()
        self.joined: set[tuple[int, int, str]] = set()

    sids = strategies.sampled_from(["a", "b", "c", "d"])
    servers = strategies.integers(1, 2)
    owners: ClassVar[dict[str, int]] = {"a": 1, "b": 1, "c": 2, "d": 3}  # whose socket

    def users(self, server_id: int) -> set[int]:
        return {user_id for server, user_id, _ in self.joined if server == server_id}

    @stateful.rule(server_id=servers, sid=sids)
    def join(self, server_id: int, sid: str) -> None:
        user_id = self.owners[sid]
        seen = user_id not in self.users(server_id) | self.presence.hidden
        assert self.presence.join(server_id, user_id, sid) == seen
        self.joined.add((server_id, user_id, sid))

    @stateful.rule(server_id=servers, sid=sids)
    def leave(self, server_id: int, sid: str) -> None:
        user_id, before = self.owners[sid], self.users(server_id)
        self.joined.discard((server_id, user_id, sid))
        seen = user_id in before - self.users(server_id) - self.presence.hidden
        assert self.presence.leave(server_id, user_id, sid) == seen

    @stateful.rule(user_id=strategies.integers(1, 3))
    def hide_or_show(self, user_id: int) -> None:
        self.presence.hidden ^= {user_id}

    @stateful.invariant()
    def agrees(self) -> None:
        for server_id in (1, 2):
            for viewer in (0, 1):
                seen = {user for user in self.users(server_id) if user == viewer or user not in self.presence.hidden}
                assert self.presence.visible(server_id, viewer) == sorted(seen)
        for user_id in (1, 2, 3):
            servers = {server for server, user, _ in self.joined if user == user_id}
            assert set(self.presence.servers(user_id)) == servers


TestPresence = PresenceMachine.TestCase
TestPresence.settings = settings(max_examples=60, stateful_step_count=30, derandomize=True, database=None, deadline=None)


def test_a_user_is_heard_typing_once_a_second_and_for_three() -> None:
    typists = chatrtc.Typists()
    assert typists.start(1, 7, "ana", "a", 10.0)
    assert not typists.start(1, 7, "ana", "a", 10.9)
    assert not typists.start(2, 7, "ana", "a", 10.95), "once a second for a user, wherever"
    assert typists.start(1, 8, "ben", "b", 10.95), "others have their own second"
    assert typists.start(1, 7, "ana", "a", 11.0)
    assert typists.over(13.9) == []
    assert typists.over(14.0) == [(1, 8), (1, 7)] or set(typists.over(14.0)) == {(1, 7), (1, 8)}
    assert typists.stop(1, 7) is not None
    assert typists.stop(1, 7) is None


async def test_typing_is_heard_once_a_second_and_ends_after_three(scene: Scene) -> None:
    loop, typing = asyncio.get_running_loop(), {"channel_id": scene.place.channel_id}
    start = loop.time()
    for _ in range(5):
        await scene.mine.ok("typing_start", typing)
    assert await scene.here.hears("user:typing") == typing | {"user_id": scene.ana.user_id, "username": "ana"}
    await scene.here.hears_not("user:typing")
    stop = await scene.here.hears("typing_stop")
    assert stop == typing | {"user_id": scene.ana.user_id, "username": "ana"}
    assert 2.9 <= loop.time() - start < 4.5
    await scene.mine.ok("typing_start", typing)
    await scene.here.hears("user:typing")
    await scene.mine.close()
    await scene.here.hears("typing_stop", user_id=scene.ana.user_id)


async def test_typing_is_heard_by_the_other_tab_of_who_types(scene: Scene) -> None:
    tab = await scene.ana.socket(scene.place.server_id)
    await scene.mine.ok("typing_start", {"channel_id": scene.place.channel_id})
    await tab.hears("user:typing", user_id=scene.ana.user_id)
    await scene.mine.hears_not("user:typing")


async def test_several_tabs_are_one_person(scene: Scene) -> None:
    scene.here.heard.clear()
    scene.here._read = 0
    tabs = [await scene.cy.socket(scene.place.server_id) for _ in range(3)]
    assert (await scene.here.hears("user:connected"))["user_id"] == scene.cy.user_id
    await tabs[0].close()
    await tabs[1].ok("leave_server", {"server_id": scene.place.server_id})
    await scene.here.hears_not("user:connected", "user:disconnected")
    ack = await scene.here.ok("join_server", {"server_id": scene.place.server_id})
    assert scene.cy.user_id in ack["connected_users"]
    await tabs[2].close()
    assert (await scene.here.hears("user:disconnected"))["user_id"] == scene.cy.user_id
    ack = await scene.here.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted([scene.ana.user_id, scene.ben.user_id])


async def test_joining_twice_is_joining_once(scene: Scene) -> None:
    await scene.mine.ok("join_server", {"server_id": scene.place.server_id})
    await scene.here.hears_not("user:connected")
    await scene.post()
    await scene.mine.hears("message:new")
    await scene.mine.hears_not("message:new")
    await scene.mine.ok("leave_server", {"server_id": scene.place.server_id})
    await scene.here.hears("user:disconnected", user_id=scene.ana.user_id)
    await scene.mine.ok("leave_server", {"server_id": scene.place.server_id})  # again: nothing to do
    await scene.here.hears_not("user:disconnected")


async def connected(person: Person, scene: Scene) -> dict[int, bool]:
    members = (await person.ok("GET", f"{scene.server}/members"))["members"]
    return {member["user_id"]: member["connected"] for member in members}


async def test_the_invisible_count_as_not_connected_to_others(scene: Scene) -> None:
    ana = scene.ana.user_id
    assert (await connected(scene.ben, scene))[ana]
    assert not (await connected(scene.ben, scene))[scene.cy.user_id], "who has not joined is not connected"
    await scene.mine.ok("user:status", {"status": "invisible"})
    assert (await scene.here.hears("user:disconnected"))["user_id"] == ana
    assert not (await connected(scene.ben, scene))[ana]
    assert (await connected(scene.ana, scene))[ana]
    ack = await scene.here.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == [scene.ben.user_id]
    members = (await scene.ben.ok("GET", f"{scene.server}/members"))["members"]
    assert "invisible" not in {member["status"] for member in members}
    await scene.mine.ok("typing_start", {"channel_id": scene.place.channel_id})
    tab = await scene.ana.socket(scene.place.server_id)
    await scene.mine.close()
    await scene.here.hears_not("user:connected", "user:disconnected", "user:typing", "typing_stop", "user:status")
    await tab.ok("user:status", {"status": "online"})
    assert (await scene.here.hears("user:connected"))["user_id"] == ana
    assert "user:status" in scene.here.names()
    assert (await connected(scene.ben, scene))[ana]


async def test_who_comes_invisible_is_not_seen_to_come(scene: Scene) -> None:
    await scene.cy.ok("PATCH", "/users/me", {"status": "invisible"})
    await scene.away.close()
    socket = await scene.cy.socket()
    ack = await socket.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy)), "oneself included"
    await socket.close()
    await scene.here.hears_not("user:connected", "user:disconnected", "user:status")


async def test_a_socket_that_goes_while_it_joins_leaves_no_presence(scene: Scene) -> None:
    for _ in range(10):
        socket = await scene.cy.socket(transports=["websocket"])
        await socket.client.emit("join_server", {"server_id": scene.place.server_id})
        await socket.client.emit("typing_start", {"channel_id": scene.place.channel_id})
        await socket.close()
    last = await scene.cy.socket(scene.place.server_id)
    await last.close()
    await scene.here.hears("user:disconnected", user_id=scene.cy.user_id)
    ack = await scene.here.ok("join_server", {"server_id": scene.place.server_id})
    assert ack["connected_users"] == sorted([scene.ana.user_id, scene.ben.user_id])


# ---- Keys ------------------------------------------------------------------------------------------------------------
# Passwords and tokens: what is not a token that we signed, for a user who is there, and that still stands, opens no
# door.

SECRET = "a secret of thirty-two bytes or more"
HOUR = 3600


def claims_of(person: Person, **changes: Any) -> dict[str, Any]:
    """Claims that stand, with changes; one that is None is left out."""
    now = int(time.time())
    claims = {"sub": str(person.user_id), "iat": now, "exp": now + HOUR} | changes
    return {name: value for name, value in claims.items() if value is not None}


def sign(claims: dict[str, Any], secret: str = SECRET, algorithm: str = "HS256") -> str:
    """A token made by hand, as PyJWT would not make some of them."""
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
    await world.chat.chat.store.write(lambda db: chatrtc.delete_user(db, person.name))
    return person.token


WRONG_TOKENS: dict[str, Callable[[Person], str]] = {
    "stale": lambda me: sign(claims_of(me, iat=1, exp=int(time.time()) - 1)),
    "forged": lambda me: sign(claims_of(me))[:-4] + "AAAA",
    "of another secret": lambda me: sign(claims_of(me), secret="x" * 32),
    "of algorithm none": lambda me: sign(claims_of(me), algorithm="none"),
    "of algorithm HS384": lambda me: sign(claims_of(me), algorithm="HS384"),
    "of algorithm HS512": lambda me: sign(claims_of(me), algorithm="HS512"),
    "without exp": lambda me: sign(claims_of(me, exp=None)),
    "without iat": lambda me: sign(claims_of(me, iat=None)),
    "without sub": lambda me: sign(claims_of(me, sub=None)),
    "with exp as a string": lambda me: sign(claims_of(me, exp=str(int(time.time()) + HOUR))),
    "with iat as a string": lambda me: sign(claims_of(me, iat="now")),
    "with exp a list": lambda me: sign(claims_of(me, exp=[])),
    "with exp true": lambda me: sign(claims_of(me, exp=True)),
    "with exp not a number": lambda me: sign(claims_of(me, exp=float("nan"))),
    "not yet good": lambda me: sign(claims_of(me, nbf=int(time.time()) + HOUR)),
    "of nobody": lambda me: sign(claims_of(me, sub="999")),
    "of a number beyond numbers": lambda me: sign(claims_of(me, sub="9" * 30)),
    "of a name": lambda me: sign(claims_of(me, sub=me.name)),
    "of a number that is not text": lambda me: sign(claims_of(me, sub=me.user_id)),
    "of a later generation": lambda me: sign(claims_of(me, gen=1)),
    "of a strange generation": lambda me: sign(claims_of(me, gen=False)),
    "cut short": lambda me: me.token.rpartition(".")[0],
    "of five kilobytes": lambda me: sign(claims_of(me, pad="x" * 5000), secret="x" * 32),
    "garbage": lambda me: "a.b.c",
    "one word": lambda me: "token",
    "dots": lambda me: "..",
}
ENDED_TOKENS = {"of an old password": password_changed, "logged out": logged_out, "of the dead": account_deleted}


async def refused_everywhere(world: World, token: str) -> None:
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


async def test_a_token_of_sub_iat_and_exp_alone_is_good(make_world: MakeWorld) -> None:
    world = await make_world(secret=SECRET)
    ana = await world.person("ana")
    token = sign(claims_of(ana))
    assert (await world.call("GET", "/users/me", token=token)).body["user_id"] == ana.user_id
    socket = await world.socket(token)
    assert (await socket.ok("user:status", {"status": "away"})) == {"success": True}
    socket = await world.socket()
    ack = await socket.ok("authenticate", {"token": token})
    assert ack == {"success": True, "user_id": ana.user_id, "username": "ana"}


@pytest.mark.parametrize("kind", WRONG_TOKENS)
async def test_a_wrong_token_is_refused_at_every_door(make_world: MakeWorld, kind: str) -> None:
    world = await make_world(secret=SECRET)
    ana = await world.person("ana")
    await refused_everywhere(world, WRONG_TOKENS[kind](ana))


async def test_a_token_of_ten_kilobytes_is_refused_at_every_door(make_world: MakeWorld) -> None:
    world = await make_world(secret=SECRET)
    token = sign(claims_of(await world.person("ana"), pad="x" * 7500))
    headers = {"Authorization": f"Bearer {token}"}
    async with world.session.get(f"{world.url}/users/me", headers=headers) as response:
        assert response.status in (400, 401)  # the HTTP server itself takes no header of that size
    with pytest.raises(socketio.exceptions.ConnectionError):
        await world.socket(token)
    socket = await world.socket()
    assert (await socket.call("authenticate", {"token": token}))["code"] == "TOO_LARGE"


@pytest.mark.parametrize("kind", ENDED_TOKENS)
async def test_a_token_that_has_ended_is_refused_and_its_sockets_are_cut(world: World, kind: str) -> None:
    ana = await world.person("ana")
    socket = await ana.socket()
    await socket.ok("ping")
    token = await ENDED_TOKENS[kind](world, ana)
    await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    await refused_everywhere(world, token)


async def test_logging_out_ends_one_token_and_its_sockets_alone(world: World) -> None:
    ana = await world.person("ana")
    other = await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})
    ends, stays = await ana.socket(), await world.socket(other.body["token"])
    await ana.ok("POST", "/auth/logout")
    await asyncio.wait_for(ends.closed.wait(), PATIENCE)
    await stays.ok("ping")
    assert (await world.call("GET", "/users/me", token=other.body["token"])).status == 200


async def test_a_socket_does_not_outlive_its_token(make_world: MakeWorld) -> None:
    world = await make_world(token_ttl=2)
    ana = await world.person("ana")
    socket = await ana.socket()
    await socket.ok("ping")
    await asyncio.wait_for(socket.closed.wait(), PATIENCE)
    assert (await ana.call("GET", "/users/me")).code == "UNAUTHORIZED"


async def test_a_wrong_old_password_changes_nothing(world: World) -> None:
    ana = await world.person("ana")
    reply = await ana.call("POST", "/auth/password", {"old_password": "wrong horse", "new_password": "battery staple"})
    assert reply.code == "FORBIDDEN"
    assert (await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})).status == 200


async def test_logging_in_as_nobody_is_as_much_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---- Limits ----------------------------------------------------------------------------------------------------------
# How often: who does too much is told how long to wait, and others notice nothing.


async def test_failed_logins_are_limited_by_account(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    await world.people("ana", "ben")
    for _ in range(5):
        reply = await world.call("POST", "/auth/login", {"username": "ana", "password": "a wrong one"})
        assert reply.code == "UNAUTHORIZED"
    for password in ("a wrong one", "correct horse"):
        reply = await world.call("POST", "/auth/login", {"username": "ANA", "password": password})
        assert (reply.status, reply.code) == (429, "RATE_LIMITED")
        assert 1 <= int(reply.headers["Retry-After"]) <= 13
    assert (await world.call("POST", "/auth/login", {"username": "ben", "password": "correct horse"})).status == 200


async def test_logins_that_succeed_are_not_counted(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    await world.person("ana")
    for _ in range(8):
        reply = await world.call("POST", "/auth/login", {"username": "ana", "password": "correct horse"})
        assert reply.status == 200


async def test_messages_are_limited_by_user(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    message = await ana.post(place.channel_id)
    socket = await ana.socket(place.server_id)
    body = {"channel_id": place.channel_id, "content": "much"}
    replies = await asyncio.gather(*(ana.call("POST", "/messages", body) for _ in range(40)))
    refused = [reply for reply in replies if reply.status != 201]
    assert 10 <= len(refused) < 40
    for reply in refused:
        assert (reply.status, reply.code) == (429, "RATE_LIMITED")
        assert int(reply.headers["Retry-After"]) >= 1
    acks = [
        await socket.call("message:edit", {"message_id": message["message_id"], "content": str(number)}) for number in range(20)
    ]
    assert next(ack["code"] for ack in acks if not ack["success"] and ack["retry_after"] >= 1) == "RATE_LIMITED"
    assert (await ben.call("POST", "/messages", body)).status == 201


async def test_events_are_limited_by_user(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana, ben = await world.people("ana", "ben")
    socket, other = await ana.socket(), await ben.socket()
    acks = [await socket.call("ping") for _ in range(170)]
    refused = [ack for ack in acks if not ack["success"]]
    assert refused
    assert {ack["code"] for ack in refused} == {"RATE_LIMITED"}
    assert all(ack["retry_after"] >= 1 for ack in refused)
    assert all(ack["success"] for ack in acks[:100])
    await other.ok("ping")
    assert not socket.closed.is_set()


async def test_a_user_has_twenty_sockets_at_most(make_world: MakeWorld) -> None:
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
            await sockets[1].ok("ping")  # until the server has seen the other go


async def test_a_whole_class_comes_in_by_one_invite_at_once(make_world: MakeWorld) -> None:
    world = await make_world(no_rate_limit=False)
    ana = await world.person("ana")
    place = await world.place(ana)
    invite = await ana.ok("POST", f"/servers/{place.server_id}/invites", {})
    guests = [
        world.call("POST", "/auth/guest", {"username": f"guest-{number}", "code": invite["code"]}) for number in range(30)
    ]
    assert [reply.status for reply in await asyncio.gather(*guests)] == [201] * 30
    wrong = [await world.call("GET", f"/invites/wrong-{number}") for number in range(14)]
    assert [reply.code for reply in wrong[:10]] == ["NOT_FOUND"] * 10
    assert wrong[-1].code == "RATE_LIMITED"


# ---- Policy ----------------------------------------------------------------------------------------------------------
# Who may do what: every operation, for everybody, with their own thing, another's, another server's, a deleted one and
# one that never was, by each door that has it. What is to be expected stands in one table, a row an operation.

CALLERS = ["anonymous", "outsider", "member", "admin", "owner", "banned", "left", "removed", "revoked"]
RANKS = {"member": 1, "admin": 2, "owner": 3, "nobody": 9}
WHOSE = ["own", "another server's", "deleted", "missing"]


class Row(NamedTuple):
    thing: str  # what the operation is about
    least: str  # the lowest role that may; "open": anybody, "user": anybody with a token
    other: str = ""  # the lowest role that may with somebody else's; the same, unless told
    but: dict[tuple[str, str], str] = {}  # exceptions, by caller and whose thing it is: the code  # noqa: RUF012

    @property
    def whose(self) -> list[str]:
        """Whose things there are; a server, a channel and an invite are of nobody in particular."""
        if not self.thing:
            return [""]
        return ["own", "other's", *WHOSE[1:]] if self.thing in ("message", "member") else WHOSE


STRANGER = {(caller, "another server's"): "NOT_FOUND" for caller in ("admin", "owner")}
ROWS = {
    "register": Row("", "open"),
    "register_guest": Row("", "open"),
    "login": Row("", "open"),
    "logout": Row("", "user"),
    "change_password": Row("", "user"),
    "authenticate": Row("", "user"),
    "heartbeat": Row("", "user"),
    "check_health": Row("", "open"),
    "get_configuration": Row("", "open"),
    "get_profile": Row("", "user"),
    "set_status": Row("", "user"),
    "list_servers": Row("", "user"),
    "create_server": Row("", "user"),
    "get_server": Row("server", "member"),
    "rename_server": Row("server", "admin"),
    "delete_server": Row("server", "owner"),
    "list_members": Row("server", "member"),
    "list_bans": Row("server", "admin"),
    "create_invite": Row("server", "admin"),
    "list_invites": Row("server", "admin"),
    "list_channels": Row("server", "member"),
    "create_channel": Row("server", "admin"),
    "list_changes": Row("server", "member"),
    "search_messages": Row("server", "member"),
    "join_server": Row("server", "member"),
    "leave_server": Row("server", "member"),
    "set_role": Row("member", "nobody", "owner", STRANGER | {("admin", "another server's"): "FORBIDDEN NOT_FOUND"}),
    "remove_member": Row("member", "member", "admin", STRANGER | {("owner", "own"): "FORBIDDEN"}),
    "ban": Row("member", "nobody", "admin", {(caller, "another server's"): "" for caller in ("admin", "owner")}),
    "unban": Row("member", "nobody", "admin", STRANGER),
    "get_invite": Row("invite", "open"),
    "accept_invite": Row("invite", "user", but={("banned", "own"): "FORBIDDEN"}),
    "revoke_invite": Row("invite", "admin"),
    "edit_channel": Row("channel", "admin"),
    "delete_channel": Row("channel", "admin"),
    "list_messages": Row("channel", "member"),
    "post_message": Row("channel", "member"),
    "get_read": Row("channel", "member"),
    "mark_read": Row("channel", "member"),
    "typing_start": Row("channel", "member"),
    "typing_stop": Row("channel", "member"),
    "voice_join": Row("channel", "member"),
    "voice_leave": Row("channel", "member"),
    "voice_signal": Row("channel", "member"),
    "get_message": Row("message", "member"),
    "edit_message": Row("message", "member", "nobody"),
    "remove_message": Row("message", "member", "admin"),
    "add_reaction": Row("message", "member"),
    "remove_reaction": Row("message", "member"),
}


def expectation(row: Row, caller: str, whose: str) -> str:
    """The code, or several where a client can rely on any of them; empty for success."""
    if row.least != "open" and caller in ("anonymous", "revoked"):
        return "UNAUTHORIZED"
    if (caller, whose) in row.but:
        return row.but[caller, whose]
    rank = RANKS.get(caller, 0)
    least = row.other if row.other and whose != "own" else row.least
    if whose in ("deleted", "missing"):
        if row.thing != "member":
            return "NOT_FOUND"
        return "FORBIDDEN" if not rank else "NOT_FOUND" if rank >= RANKS[least] else "FORBIDDEN NOT_FOUND"
    if least in ("open", "user"):
        return ""
    if whose == "another server's" or not rank:
        return "FORBIDDEN"
    return "" if rank >= RANKS[least] else "FORBIDDEN"


class Stage(NamedTuple):
    """A server of its own for one cell, with who calls and the thing that it is about."""

    token: str | None
    args: dict[str, Any]


class Matrix:
    """A world, and what all cells may share since none of them changes it."""

    def __init__(self, world: World) -> None:
        self.world, self.chat = world, world.chat
        self.names = itertools.count()

    async def open(self) -> Matrix:
        self.keeper = await self.world.person("keeper")
        self.far = await self.world.place(self.keeper, name="another")
        self.lobby = await self.chat.create_invite(author_id=self.keeper.user_id, server_id=self.far.server_id)
        self.far_message = await self.chat.post_message(
            author_id=self.keeper.user_id, channel_id=self.far.channel_id, content="far"
        )
        self.far_voice = await self.chat.create_channel(
            author_id=self.keeper.user_id, server_id=self.far.server_id, name="talk", kind="voice"
        )
        return self

    def name(self) -> str:
        return f"n{next(self.names)}"

    async def user(self) -> Person:
        """A new account, without the time that a password takes."""
        name, now = self.name(), time.time()
        store = self.chat.chat.store
        done = await store.write(lambda db: chatrtc.Done(chatrtc.insert_user(db, name, None, "2026-01-01T00:00:00Z")))
        return Person(self.world, name, done.answer, self.chat.chat.keys.issue(done.answer, name, 0, now).token)

    async def stage(self, op: chatrtc.Operation, caller: str, whose: str) -> Stage:
        chat = self.chat
        owner, other = await self.user(), await self.user()
        me = owner if caller == "owner" else await self.user()
        server = await chat.create_server(author_id=owner.user_id, name="place")
        place = {"author_id": owner.user_id, "server_id": server.server_id}
        invite = await chat.create_invite(**place)
        await chat.accept_invite(author_id=other.user_id, code=invite.code)
        channel_id = server.channels[0].channel_id
        if op.name.startswith("voice"):
            channel_id = (await chat.create_channel(**place, name="talk", kind="voice")).channel_id
        message = await chat.post_message(author_id=other.user_id, channel_id=channel_id, content="hello")
        if caller not in ("anonymous", "outsider", "owner"):
            await chat.accept_invite(author_id=me.user_id, code=invite.code)
        mine = message
        if caller not in ("anonymous", "outsider"):
            mine = await chat.post_message(author_id=me.user_id, channel_id=channel_id, content="hello")
        match caller:
            case "admin":
                await chat.set_role(**place, user_id=me.user_id, role="admin")
            case "banned":
                await chat.ban(**place, user_id=me.user_id)
            case "left":
                await chat.remove_member(author_id=me.user_id, server_id=server.server_id, user_id=me.user_id)
            case "removed":
                await chat.remove_member(**place, user_id=me.user_id)
            case "revoked":
                reply = await self.world.call("POST", "/auth/logout", token=me.token)
                assert reply.status == 204
        ids = {"server_id": server.server_id, "channel_id": channel_id, "code": invite.code} | {
            "message_id": mine.message_id,
            "user_id": me.user_id,
        }
        thing = ROWS[op.name].thing
        if thing:
            key = {"invite": "code", "member": "user_id"}.get(thing, f"{thing}_id")
            ids[key] = await self.thing(op, thing, whose, ids[key], owner, other, place, channel_id, message)
        if op.name == "unban" and whose == "other's":
            await chat.ban(**place, user_id=ids["user_id"])
        return Stage(None if caller == "anonymous" else me.token, self.arguments(op, ids, me))

    async def thing(
        self, op: chatrtc.Operation, thing: str, whose: str, own: Any, owner: Person, other: Person,
        place: dict[str, Any], channel_id: int, message: Any,
    ) -> Any:  # fmt: skip
        """The id of such a thing."""
        chat = self.chat
        if whose == "own":
            return own
        if whose == "missing":
            return "missing" if thing == "invite" else 10**9
        if whose == "other's":
            return other.user_id if thing == "member" else message.message_id
        if whose == "another server's":
            voice = op.name.startswith("voice")
            return {
                "server": self.far.server_id,
                "channel": self.far_voice.channel_id if voice else self.far.channel_id,
                "message": self.far_message.message_id,
                "member": self.keeper.user_id,
                "invite": self.lobby.code,
            }[thing]
        match thing:  # deleted
            case "server":
                gone = await chat.create_server(author_id=owner.user_id, name="gone")
                await chat.delete_server(author_id=owner.user_id, server_id=gone.server_id)
                return gone.server_id
            case "channel":
                kind = "voice" if op.name.startswith("voice") else "text"
                channel = await chat.create_channel(**place, name="gone", kind=kind)
                await chat.delete_channel(author_id=owner.user_id, channel_id=channel.channel_id)
                return channel.channel_id
            case "message":
                await chat.remove_message(author_id=owner.user_id, message_id=message.message_id)
                return message.message_id
            case "invite":
                await chat.revoke_invite(author_id=owner.user_id, code=own)
                return own
        await chat.chat.store.write(lambda db: chatrtc.delete_user(db, other.name))
        return other.user_id

    def arguments(self, op: chatrtc.Operation, ids: dict[str, Any], me: Person) -> dict[str, Any]:
        """What the operation requires."""
        values = ids | {
            "name": self.name(), "username": self.name(), "password": "correct horse", "new_password": "battery staple",
            "content": "hello", "emoji": "x", "role": "admin", "status": "away", "q": "hello", "token": me.token,
            "to": "nobody", "data": {"sdp": "x"},
        }  # fmt: skip
        if op.name == "login":
            values["username"] = "keeper"
        if op.name == "register_guest":
            values["code"] = self.lobby.code
        return {field.name: values[field.name] for field in msgspec.structs.fields(op.args) if field.required}


async def by_rest(world: World, token: str | None, op: chatrtc.Operation, args: dict[str, Any]) -> Reply:
    """Call an operation by its route: each argument in its place."""
    assert op.method is not None
    assert op.path is not None
    in_path = set(re.findall(r"{(\w+)}", op.path))
    path = op.path.format(**{name: quote(str(args[name]), safe="") for name in in_path})
    rest = {name: value for name, value in args.items() if name not in in_path}
    if op.method in ("POST", "PUT", "PATCH"):
        return await world.call(op.method, path, rest, token=token)
    return await world.call(op.method, path, token=token, params={name: str(value) for name, value in rest.items()})


def test_every_operation_has_its_row() -> None:
    assert set(ROWS) == set(chatrtc.OPERATIONS)


def cells(door: str) -> list[tuple[chatrtc.Operation, str, str]]:
    return [
        (op, caller, whose)
        for op in chatrtc.OPERATIONS.values()
        if (op.path if door == "rest" else op.event)
        for caller in CALLERS
        for whose in ROWS[op.name].whose
    ]


@pytest.mark.parametrize("door", ["rest", "socket"])
async def test_who_may_do_what(world: World, door: str) -> None:
    matrix, gate = await Matrix(world).open(), asyncio.Semaphore(24)
    wrong: list[str] = []
    outcomes: set[tuple[str, str]] = set()

    async def by_socket(stage: Stage, op: chatrtc.Operation, caller: str) -> str:
        token = None if caller == "revoked" else stage.token
        socket = await world.socket(token, transports=["websocket"])
        try:
            if caller == "revoked" and op.name != "authenticate":
                assert (await socket.call("authenticate", {"token": stage.token}))["code"] == "UNAUTHORIZED"
            if op.name == "voice_signal":
                ack = await socket.call("voice:join", {"channel_id": stage.args["channel_id"]})
                stage.args["to"] = ack.get("peer_id", "nobody")
            args = stage.args if stage.token or op.name != "authenticate" else {"token": "none"}
            return str((await socket.call(op.event or "", *([args] if args else []))).get("code", ""))
        finally:
            await socket.close()

    async def try_cell(op: chatrtc.Operation, caller: str, whose: str) -> None:
        async with gate:
            stage = await matrix.stage(op, caller, whose)
            if door == "rest":
                code = (await by_rest(world, stage.token, op, stage.args)).code
            else:
                code = await by_socket(stage, op, caller)
        expected = expectation(ROWS[op.name], caller, whose)
        outcomes.add((op.name, code))
        if code not in (expected.split() or [""]):
            wrong.append(f"{op.name}, {caller}, {whose or 'nothing'}: {code or 'done'}, expected {expected or 'done'}")

    await asyncio.gather(*(try_cell(*cell) for cell in cells(door)))
    assert not wrong, "\n".join(sorted(wrong))
    for op, _, _ in cells(door):  # each was done at least once, and refused at least once where it is not open
        assert (op.name, "") in outcomes
        assert ROWS[op.name].least == "open" or any(name == op.name and code for name, code in outcomes)


# ---- Operations ------------------------------------------------------------------------------------------------------
# Stories of the product, over REST: messages, pages, reactions, reading, searching, people and channels.


async def test_a_repeated_nonce_gives_the_first_message_and_no_second_event(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "once", "nonce": "n"}
    first = await scene.ana.call("POST", "/messages", body)
    assert (first.status, first.headers.get("Idempotent-Replayed")) == (201, None)
    for content in ("once", "something else"):
        again = await scene.ana.call("POST", "/messages", body | {"content": content})
        assert (again.status, again.body, again.headers["Idempotent-Replayed"]) == (201, first.body, "true")
    assert await scene.here.hears("message:new") == first.body
    await scene.here.hears_not("message:new")
    other = await scene.ben.call("POST", "/messages", body)  # a nonce is its author's own
    assert other.body["message_id"] != first.body["message_id"]
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "next"})
    elsewhere = await scene.ana.call("POST", "/messages", body | {"channel_id": channel["channel_id"]})
    assert "Idempotent-Replayed" not in elsewhere.headers


async def test_concurrent_repeats_of_a_nonce_post_once(scene: Scene) -> None:
    body = {"channel_id": scene.place.channel_id, "content": "once", "nonce": "n"}
    replies = await asyncio.gather(*(scene.ana.call("POST", "/messages", body) for _ in range(20)))
    assert {reply.status for reply in replies} == {201}
    assert len({reply.body["message_id"] for reply in replies}) == 1
    assert sum("Idempotent-Replayed" in reply.headers for reply in replies) == 19


async def test_a_reply_is_to_a_message_of_the_same_channel(scene: Scene) -> None:
    first = await scene.post()
    reply = await scene.ben.post(scene.place.channel_id, "yes", reply_to=first["message_id"])
    assert reply["reply_to"] == first["message_id"]
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "next"})
    for channel_id, message_id in ((channel["channel_id"], first["message_id"]), (scene.place.channel_id, 10**6)):
        body = {"channel_id": channel_id, "content": "?", "reply_to": message_id}
        assert (await scene.ben.call("POST", "/messages", body)).code == "NOT_FOUND"


async def test_a_deleted_message_is_gone_from_everywhere(scene: Scene) -> None:
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
    assert around == posted[posted.index(around[0]) :][:11], "a page has no hole"
    around, _ = await page(f"?around={ids[0]}&limit=10")
    assert around == posted[: len(around)]
    around, _ = await page(f"?around={ids[-1]}&limit=10")
    assert around == posted[-10:]
    for query in ("?limit=0", "?limit=101", "?before=x", "?before=1&after=1", "?around=1&before=1", "?before=0"):
        assert (await scene.ben.call("GET", path + query)).code == "BAD_REQUEST", query


@pytest.mark.parametrize("limit", [1, 7, 100])
async def test_walking_pages_either_way_gives_the_history_once(scene: Scene, limit: int) -> None:
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


async def test_reactions_are_idempotent(scene: Scene) -> None:
    message = await scene.post()
    path = f"/messages/{message['message_id']}"
    for _ in range(2):
        assert (await scene.ben.call("PUT", f"{path}/reactions/👍🏽")).status == 204
    await scene.here.hears("reaction:add")
    await scene.here.hears_not("reaction:add")
    assert (await scene.ana.ok("GET", path))["reactions"] == [{"emoji": "👍🏽", "user_ids": [scene.ben.user_id]}]
    assert (await scene.ana.call("DELETE", f"{path}/reactions/👍🏽")).status == 204, "not mine, and nothing happens"
    for _ in range(2):
        assert (await scene.ben.call("DELETE", f"{path}/reactions/👍🏽")).status == 204
    await scene.here.hears("reaction:remove", user_id=scene.ben.user_id)
    await scene.here.hears_not("reaction:remove")


async def test_what_is_unread_is_what_others_wrote_since(scene: Scene) -> None:
    path = f"/channels/{scene.place.channel_id}/read"
    start = await scene.ben.ok("GET", path)
    assert start == {"channel_id": scene.place.channel_id, "last_read_id": 0, "unread": 1, "mentions": 0}
    first, second = await scene.post(), await scene.ana.post(scene.place.channel_id, "@ben hello")
    await scene.ben.post(scene.place.channel_id, "@ben my own")
    assert (await scene.ben.ok("GET", path)) == start | {"unread": 3, "mentions": 1}
    assert (await scene.ben.call("PUT", path, {"message_id": first["message_id"]})).status == 204
    read = start | {"last_read_id": first["message_id"]}
    assert (await scene.ben.ok("GET", path)) == read | {"unread": 1, "mentions": 1}
    await scene.ana.ok("PATCH", f"/messages/{second['message_id']}", {"content": "hello"})
    assert (await scene.ben.ok("GET", path)) == read | {"unread": 1, "mentions": 0}
    await scene.ben.ok("PUT", path, {"message_id": second["message_id"]})
    await scene.ben.ok("PUT", path, {"message_id": first["message_id"]})  # the mark never goes back
    assert (await scene.ben.ok("GET", path)) == start | {"last_read_id": second["message_id"], "unread": 0}
    assert (await scene.ben.call("PUT", path, {"message_id": 10**6})).code == "NOT_FOUND"
    assert (await scene.ana.ok("GET", path))["last_read_id"] == 0


async def found(person: Person, server: str, q: str, **narrow: Any) -> list[str]:
    reply = await person.call("GET", f"{server}/search", params={"q": q} | {key: str(narrow[key]) for key in narrow})
    assert reply.status == 200, (q, reply)
    assert set(reply.body) == {"messages", "has_more"}
    return [message["content"] for message in reply.body["messages"]]


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
    assert found_messages == [posted["a pear"]], "what is found is the message as it is"


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


async def test_no_search_is_an_error(scene: Scene) -> None:
    await scene.ana.post(scene.place.channel_id, "a b c OR")
    for q in ODD_QUERIES:
        await found(scene.ana, scene.server, q)
    assert await found(scene.ana, scene.server, ODD_QUERIES[-1]) == ["a b c OR"]


async def test_search_finds_an_edit_anew_and_nothing_deleted_nor_of_other_servers(scene: Scene) -> None:
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


async def test_a_server_is_handed_over(scene: Scene) -> None:
    ana, ben, server = scene.ana, scene.ben, scene.server
    assert (await ana.call("DELETE", f"{server}/members/{ana.user_id}")).code == "FORBIDDEN"
    await ana.ok("PATCH", f"{server}/members/{ben.user_id}", {"role": "owner"})
    seen = await ben.ok("GET", server)
    assert (seen["owner_id"], seen["role"]) == (ben.user_id, "owner")
    assert (await ana.ok("GET", server))["role"] == "admin"
    told = [await scene.here.hears("member:updated") for _ in range(2)]
    assert {(one["user_id"], one["role"]) for one in told} == {(ana.user_id, "admin"), (ben.user_id, "owner")}
    assert (await ana.call("DELETE", server)).code == "FORBIDDEN"
    await ana.ok("DELETE", f"{server}/members/{ana.user_id}")
    assert (await ana.call("GET", server)).code == "FORBIDDEN"
    await ben.ok("DELETE", server)
    assert (await ben.call("GET", server)).code == "NOT_FOUND"


async def test_admins_remove_those_of_a_lower_role_alone(scene: Scene) -> None:
    for admin in (scene.ben, scene.cy):
        await scene.ana.ok("PATCH", f"{scene.server}/members/{admin.user_id}", {"role": "admin"})
    for target in (scene.ana, scene.cy):
        for verb, path in (("DELETE", "members"), ("PUT", "bans")):
            assert (await scene.ben.call(verb, f"{scene.server}/{path}/{target.user_id}")).code == "FORBIDDEN"
    await scene.ana.ok("PATCH", f"{scene.server}/members/{scene.cy.user_id}", {"role": "member"})
    assert (await scene.ben.call("DELETE", f"{scene.server}/members/{scene.cy.user_id}")).status == 204


async def test_bans(scene: Scene) -> None:
    server, cy = scene.server, scene.cy
    invite = await scene.ana.ok("POST", f"{server}/invites", {})
    assert (await scene.ana.call("PUT", f"{server}/bans/{cy.user_id}")).status == 204
    (entry,) = (await scene.ana.ok("GET", f"{server}/bans"))["bans"]
    assert (entry["user_id"], entry["username"], entry["banned_by"]) == (cy.user_id, "cy", scene.ana.user_id)
    assert cy.user_id not in await connected(scene.ana, scene)
    assert (await cy.call("POST", f"/invites/{invite['code']}")).code == "FORBIDDEN"
    assert (await scene.ana.call("PUT", f"{server}/bans/{cy.user_id}")).status == 204, "again: nothing changes"
    assert (await scene.ana.call("DELETE", f"{server}/bans/{cy.user_id}")).status == 204
    assert await scene.ana.ok("GET", f"{server}/bans") == {"bans": []}
    assert (await cy.call("POST", f"/invites/{invite['code']}")).status == 201
    assert (await scene.ana.call("PUT", f"{server}/bans/{scene.dee.user_id}")).status == 204, "who is no member yet"
    assert (await scene.dee.call("POST", f"/invites/{invite['code']}")).code == "FORBIDDEN"


async def test_invites_end_by_use_and_by_time(scene: Scene) -> None:
    server = scene.server
    once = await scene.ana.ok("POST", f"{server}/invites", {"max_uses": 1})
    brief = await scene.ana.ok("POST", f"{server}/invites", {"expires_in": 1})
    assert (await scene.cy.call("POST", f"/invites/{once['code']}")).status == 200, "a member uses nothing up"
    joined = await scene.dee.call("POST", f"/invites/{once['code']}")
    assert (joined.status, joined.body["server_id"], joined.body["role"]) == (201, scene.place.server_id, "member")
    assert (await scene.dee.call("POST", f"/invites/{once['code']}")).status == 200
    eve = await scene.world.person("eve")
    assert (await eve.call("POST", f"/invites/{once['code']}")).code == "NOT_FOUND"
    assert (await scene.world.call("GET", f"/invites/{once['code']}")).code == "NOT_FOUND"
    listed = (await scene.ana.ok("GET", f"{server}/invites"))["invites"]
    assert [invite["uses"] for invite in listed if invite["code"] == once["code"]] == [1]
    async with asyncio.timeout(PATIENCE):  # until its second is over
        while (await scene.world.call("GET", f"/invites/{brief['code']}")).status == 200:
            await scene.here.ok("ping")
    assert (await eve.call("POST", f"/invites/{brief['code']}")).code == "NOT_FOUND"
    revoked = await scene.ana.ok("POST", f"{server}/invites", {})
    assert (await scene.ana.call("DELETE", f"/invites/{revoked['code']}")).status == 204
    assert (await eve.call("POST", f"/invites/{revoked['code']}")).code == "NOT_FOUND"


async def test_an_invite_for_one_lets_one_in(scene: Scene) -> None:
    invite = await scene.ana.ok("POST", f"{scene.server}/invites", {"max_uses": 1})
    people = await scene.world.people(*(f"p{number}" for number in range(6)))
    replies = await asyncio.gather(*(person.call("POST", f"/invites/{invite['code']}") for person in people))
    assert sorted(reply.status for reply in replies) == [201] + [404] * 5


async def test_channel_names_are_unique_in_their_server(scene: Scene) -> None:
    await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "Straße"})
    for name in ("Straße", "STRASSE", "strasse"):
        reply = await scene.ana.call("POST", f"{scene.server}/channels", {"name": name})
        assert (reply.status, reply.code) == (409, "CONFLICT")
    renamed = await scene.ana.call("PATCH", f"/channels/{scene.place.channel_id}", {"name": "strasse"})
    assert renamed.code == "CONFLICT"
    same = await scene.ana.call("PATCH", f"/channels/{scene.place.channel_id}", {"name": "GENERAL"})
    assert (same.status, same.body["name"]) == (200, "GENERAL"), "its own name in another spelling"


async def test_a_new_channel_is_heard_at_once_and_a_deleted_one_no_more(scene: Scene) -> None:
    channel = await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "new"})
    await scene.here.hears("channel:created")
    await scene.mine.ok("typing_start", {"channel_id": channel["channel_id"]})
    await scene.here.hears("user:typing", channel_id=channel["channel_id"])
    await scene.ana.ok("DELETE", f"/channels/{channel['channel_id']}")
    await scene.here.hears("channel:deleted")
    for reply in (
        await scene.ana.call("GET", f"/channels/{channel['channel_id']}/messages"),
        await scene.ana.call("POST", "/messages", {"channel_id": channel["channel_id"], "content": "x"}),
    ):
        assert reply.code == "NOT_FOUND"
    assert (await scene.mine.call("typing_start", {"channel_id": channel["channel_id"]}))["code"] == "NOT_FOUND"


async def test_what_a_deleted_server_leaves_is_nothing(scene: Scene) -> None:
    message = await scene.post()
    await scene.ana.ok("DELETE", scene.server)
    await scene.here.hears("server:deleted")
    for path in (scene.server, f"/channels/{scene.place.channel_id}/messages", f"/messages/{message['message_id']}"):
        assert (await scene.ben.call("GET", path)).code == "NOT_FOUND"
    assert (await scene.here.call("join_server", {"server_id": scene.place.server_id}))["code"] == "NOT_FOUND"
    again = await scene.world.place(scene.ana)
    assert again.server_id > scene.place.server_id, "an id is never used again"
    assert again.channel_id > scene.place.channel_id


# ---- Engine and Transport ------------------------------------------------------------------------------------------
# The bare server, as `socket_server()` gives it, with raw clients: order, bounds, clean ends, and each attack on it. Most of it
# runs with the fast delivery and with the one that uses only what the libraries promise.


class Bare:
    """A running server, and what its handlers have seen."""

    def __init__(self, **options):
        options = {"ping_interval": 60, "ping_timeout": 60, **options}
        self.sio = chatrtc.socket_server(**options)
        self.seen: asyncio.Queue[Any] = asyncio.Queue()
        self.gone: asyncio.Queue[Any] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.sio.on("connect", self.connect)
        self.sio.on("disconnect", self.disconnect)
        self.sio.on("echo", self.echo)
        self.sio.on("wait", self.wait)
        self.sio.on("boom", self.boom)
        self.sio.on("*", self.other)

    async def connect(self, sid, environ, auth=None):
        self.seen.put_nowait(("connect", sid, auth))
        if auth and "wait" in auth:
            await self.gate.wait()
        if auth and "boom" in auth:
            raise ValueError("boom")

    async def disconnect(self, sid, reason):
        self.gone.put_nowait((sid, reason))

    async def echo(self, sid, *args):
        return args

    async def wait(self, sid, *args):
        await self.gate.wait()
        self.seen.put_nowait(("waited", *args))

    async def boom(self, sid, *args):
        raise RuntimeError("boom")

    async def other(self, event, sid, *args):
        return {"unknown": event}

    async def __aenter__(self):
        app, sub = web.Application(), web.Application()
        self.sio.attach(app)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        self.sio.attach(sub)
        app.add_subapp("/chat", sub)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.port = self.runner.addresses[0][1]
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        return self

    async def __aexit__(self, *_):
        self.gate.set()
        await self.sio.drain(0.5)
        await self.http.close()
        await self.runner.cleanup()

    async def ws(self, query="", **options):
        path = f"/socket.io/?EIO=4&transport=websocket{query}"
        return Ws(await self.http.ws_connect(path, max_msg_size=0, **options))

    async def join(self, auth=""):
        """A WebSocket client that is in the namespace."""
        ws = await self.ws()
        await ws.next()
        await ws.send("40" + auth)
        ws.sid = json.loads((await ws.next())[2:])["sid"]
        return ws

    def polling(self, query="", **options):
        return Poll(self, f"/socket.io/?EIO=4&transport=polling{query}", options)

    async def poller(self):
        """A polling client that is in the namespace."""
        client = self.polling()
        await client.open()
        assert (await client.post("40"))[0] == 200
        _, body = await client.get()
        client.sio_sid = json.loads(body[2:])["sid"]
        return client

    async def next_gone(self):
        return await asyncio.wait_for(self.gone.get(), PATIENCE)

    async def next_seen(self):
        return await asyncio.wait_for(self.seen.get(), PATIENCE)

    async def settled(self):
        """Nothing is left of clients that went: neither sessions nor rooms nor lanes."""
        sio = self.sio
        for _ in range(200):
            rest = [sio.eio.sockets, sio.manager.rooms, sio.lanes, sio.environ, sio._binary_packet]
            rest += [sio.eio.per_address, sio.manager.callbacks, sio.eio.links]
            if not any(rest):
                return True
            await asyncio.sleep(0.01)
        return False


class Ws:
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


class Poll:
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


@pytest_asyncio.fixture(params=[True, False], ids=["fast", "stock"])
async def bare(request):
    async with Bare(fast=request.param) as bare:
        yield bare


def event(*args, ack=None):
    return f"42{'' if ack is None else ack}{json.dumps(args)}"


# Order


async def test_events_are_handled_in_order_and_acked(bare):
    ws = await bare.join()
    await ws.send(event("wait", 1), event("wait", 2), event("echo", "ä", ack=0))
    bare.gate.set()
    assert await ws.next() == '430["ä"]'
    assert [await bare.next_seen() for _ in range(3)][1:] == [("waited", 1), ("waited", 2)]


async def test_slow_handler_does_not_hold_up_the_heartbeat():
    async with Bare(ping_interval=0.1, ping_timeout=0.2) as bare:
        ws = await bare.join()
        await ws.send(event("wait", 1))
        for _ in range(5):
            message = await asyncio.wait_for(ws.ws.receive(), PATIENCE)
            assert message.data == "2"
            await ws.ws.send_str("3")
        bare.gate.set()
        assert await ws.ask(event("echo", 1, ack=1)) == "431[1]"


async def test_a_full_lane_stops_the_reading_and_loses_nothing(bare):
    bare.sio.eio.rules.frames_per_second = None
    ws = await bare.join()
    many = 3 * chatrtc.LANE_LENGTH
    await ws.send(*[event("wait", n) for n in range(many)])
    lane = next(iter(bare.sio.lanes.values()))
    await bare.next_seen()
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(lane.jobs) <= chatrtc.LANE_LENGTH
    bare.gate.set()
    assert [(await bare.next_seen())[1] for _ in range(many)] == list(range(many))


async def test_waiting_events_are_discarded_on_disconnect(bare):
    ws = await bare.join()
    await bare.next_seen()
    await ws.send(event("wait", 1, ack=1), event("wait", 2), "3")
    while not next(iter(bare.sio.lanes.values())).jobs:
        await asyncio.sleep(0)
    await ws.ws.close()
    assert (await bare.next_gone())[1] == "transport close"
    bare.gate.set()
    assert await bare.next_seen() == ("waited", 1)
    assert await bare.settled() and bare.seen.empty()


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
    heard = [await clients[0].next() for _ in expected]
    polled: list[str] = []
    while len(polled) < len(expected):
        polled += (await clients[1].get())[1].split("\x1e")
    if bare.sio.fast:
        assert heard == expected
    assert sorted(heard) == sorted(expected)
    assert [p for p in polled if p != "2"] == expected or not bare.sio.fast


async def test_a_rooms_batch_keeps_the_order_of_all_that_a_client_is_told(bare):
    """Interleaved rooms, single clients, skipped clients and changing members: each hears its own, in the order of telling."""
    clients = [await bare.join() for _ in range(3)]
    told: dict[str, list[str]] = {client.sid: [] for client in clients}
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
                told[client.sid].append(f'42["e",{number}]')
            case 3:
                await asyncio.sleep(0)
            case skip:
                skipped = client.sid if skip == 4 else None
                bare.sio.publish("e", number, room, skipped)
                for sid in rooms[room] - {skipped}:
                    told[sid].append(f'42["e",{number}]')
    assert min(map(len, told.values())) > 50
    for client in clients:
        assert [await client.next() for _ in told[client.sid]] == told[client.sid]


async def test_call_from_a_handler_gets_its_answer(bare):
    async def asks(sid):
        return await bare.sio.call("question", to=sid, timeout=PATIENCE)

    bare.sio.on("asks", asks)
    ws = await bare.join()
    assert await ws.ask(event("asks", ack=5)) == '421["question"]'
    assert await ws.ask('431["answer"]') == '435["answer"]'


# Rooms


async def test_publish_reaches_members_only(bare):
    a, b, c = [await bare.join() for _ in range(3)]
    for ws in (a, b):
        bare.sio.enter(ws.sid, "r")
    assert sorted(bare.sio.members("r")) == sorted([a.sid, b.sid])
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


async def test_entering_a_room_after_the_end_leaves_nothing(bare):
    ws = await bare.join()
    bare.sio.enter(ws.sid, "r")
    assert bare.sio.members("r") == [ws.sid]
    await ws.ws.close()
    await bare.next_gone()
    assert await bare.settled()
    bare.sio.enter(ws.sid, "r")
    bare.sio.leave(ws.sid, "r")
    bare.sio.enter("nobody", "r")
    assert not bare.sio.manager.rooms and bare.sio.members("r") == []


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


async def test_address_is_the_peers(bare):
    ws = await bare.join()
    assert bare.sio.address(ws.sid) == "127.0.0.1"
    assert bare.sio.get_environ(ws.sid)["REMOTE_ADDR"] == "127.0.0.1"
    assert bare.sio.address("nobody") == ""


# What clients must not do


@pytest.mark.parametrize("name", sorted(chatrtc.RESERVED))
async def test_reserved_names_reach_only_the_catch_all(bare, name):
    ws = await bare.join()
    await bare.next_seen()
    assert await ws.ask(event(name, {"x": 1}, {}, ack=1)) == f'431[{{"unknown":"{name}"}}]'
    assert await ws.ask(event("echo", 1, ack=2)) == "432[1]"
    assert bare.seen.empty() and bare.gone.empty()


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
    "40[]", "401", '40"x"', "45-[]", '450-["e"]', '455-["e"]', '459999999999-["x"]', "451-[]",
    "42" + "9" * 5000 + '["echo"]', '42["echo",' + "1" * 10000 + "]", '421-["echo"]', "40",
    b"\x01", "4²", "42٣",
]  # fmt: skip


@pytest.mark.parametrize("packet", BROKEN, ids=lambda p: repr(p)[:24])
async def test_broken_packets_end_the_connection(bare, packet, caplog):
    ws = await bare.join()
    assert await ws.ask(event("echo", ack=1)) == "431[]"
    await ws.send(packet)
    assert await ws.closed()
    sid, _ = await bare.next_gone()
    assert sid == ws.sid and await bare.settled()
    assert len(caplog.records) == 1 and "Traceback" not in caplog.text


@pytest.mark.parametrize("packet", [p for p in BROKEN if p and p not in ("40", "bAQID", b"\x01")],
                         ids=lambda p: repr(p)[:24])  # fmt: skip
async def test_broken_packets_end_polling(bare, packet):
    client = await bare.poller()
    assert (await client.post(event("echo", ack=1)))[0] == 200
    status, body = await client.post(packet)
    assert status == 400 and json.loads(body)["code"] == "BAD_REQUEST"
    assert (await client.get())[0] == 400
    assert (await bare.next_gone())[0] == client.sio_sid and await bare.settled()


BAD_BINARY = [
    ['451-["echo",{"_placeholder":true,"num":0}]', event("echo")],
    ['451-["echo",{"_placeholder":true,"num":1}]', b"x"],
    ['451-["echo",{"_placeholder":true,"num":"x"}]', b"x"],
    ['452-["echo",{"_placeholder":true,"num":0}]', b"x" * 100000, b"x" * 100000],
    ['451-["echo",{"_placeholder":true,"num":0}]', "40"],
]


@pytest.mark.parametrize("packets", BAD_BINARY, ids=range(len(BAD_BINARY)))
async def test_bad_attachments_end_the_connection(bare, packets):
    ws = await bare.join()
    good = ['451-7["echo",{"_placeholder":true,"num":0}]', b"good"]
    await ws.send(*good)
    assert (await ws.next(), await ws.next()) == ('461-7[{"_placeholder":true,"num":0}]', b"good")
    await ws.send(*packets)
    assert await ws.closed() and (await bare.next_gone())[0] == ws.sid
    assert await bare.settled()


async def test_no_ghosts_after_close_or_second_connect(bare):
    for packets in (["1", "40"], ["41", "1", "40"]):
        ws = await bare.ws()
        await ws.next()
        await ws.send(*packets)
        assert await ws.closed()
    assert await bare.settled()
    client = bare.polling()
    await client.open()
    assert (await client.post("1\x1e40"))[0] == 400
    assert await bare.settled() and bare.seen.empty()


async def test_events_outside_the_namespace_are_not_heard(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send(event("echo", ack=1), "40")
    assert (await ws.next()).startswith("40")
    assert await ws.ask("40/x,") == '44/x,{"message":"Invalid namespace"}'


async def test_client_that_leaves_while_it_connects_leaves_no_ghost(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send('40{"wait":1}')
    assert (await bare.next_seen())[0] == "connect"
    await ws.ws.close()
    while bare.sio.eio.sockets:
        await asyncio.sleep(0)
    bare.gate.set()
    await bare.next_gone()
    assert await bare.settled()


async def test_connect_handler_that_fails_ends_the_connection(bare):
    ws = await bare.ws()
    await ws.next()
    await ws.send('40{"boom":1}')
    assert await ws.closed() and await bare.settled()


async def test_handler_that_fails_harms_nothing_else(bare, caplog):
    ws = await bare.join()
    await ws.send(*[event("boom", ack=1)] * 100)
    assert await ws.ask(event("echo", ack=2)) == "432[]"
    assert 1 <= len(caplog.records) <= 30


async def test_too_many_frames_end_the_connection():
    async with Bare(frames_per_second=10) as bare:
        ws = await bare.join()
        await ws.send(*[event("echo")] * 30)
        assert await ws.ask(event("echo", ack=1)) == "431[]"
        await ws.send(*[event("echo")] * 30)
        assert await ws.closed() and (await bare.next_gone())[0] == ws.sid
        client = await bare.poller()
        status, body = await client.post("\x1e".join([event("echo")] * 60))
        assert status == 429 and json.loads(body)["code"] == "RATE_LIMITED"


# Polling


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
async def test_bad_posts_are_refused_at_once(bare, status, kwargs):
    client = await bare.poller()
    assert (await client.post(event("echo")))[0] == 200
    got, body = await client.request("POST", **kwargs)
    assert got == status and set(json.loads(body)) == {"error", "code"}
    assert (await client.get())[0] == 400 and await bare.settled()


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
    assert await bare.settled()


async def test_body_that_breaks_off(bare, caplog):
    client = await bare.poller()
    text = f"POST {client.path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n42["
    _, writer = await asyncio.open_connection("127.0.0.1", bare.port)
    writer.write(text.encode())
    while not bare.sio.eio.sockets[client.sid].posting:
        await asyncio.sleep(0)
    writer.close()
    assert (await bare.next_gone())[0] == client.sio_sid and await bare.settled()
    assert "Traceback" not in caplog.text


async def test_two_polls_end_the_session_but_a_lost_poll_does_not(bare):
    client = await bare.poller()
    lost = asyncio.create_task(client.get())
    session = bare.sio.eio.sockets[client.sid]
    while session.news is None:
        await asyncio.sleep(0)
    lost.cancel()
    while session.polled():
        await asyncio.sleep(0)
    bare.sio.publish("e", 1, client.sio_sid)
    assert (await client.get())[1] == '42["e",1]'
    first = asyncio.create_task(client.get())
    while not session.polled():
        await asyncio.sleep(0)
    assert (await client.get())[0] == 400
    assert (await first) == (200, "1")


async def test_http_errors_are_json(bare):
    for path in ("", "?EIO=3&transport=polling", "?EIO=4&transport=x", "?EIO=4&transport=polling&sid=x"):
        async with bare.http.get("/socket.io/" + path) as response:
            assert response.status == 400 and set(await response.json()) == {"error", "code"}
    async with bare.http.get("/chat/socket.io?EIO=4&transport=polling") as response:
        assert response.status == 200


async def test_origins():
    async with Bare(origins=["https://good.example"]) as bare:
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


async def test_session_caps():
    async with Bare(max_sessions=3, max_sessions_per_address=2) as bare:
        first, second = await bare.join(), await bare.join()
        assert (await bare.polling().get())[0] == 429
        await first.ws.close()
        assert (await bare.next_gone())[0] != second.sid
        client = await bare.poller()
        bare.sio.eio.rules.max_sessions = 2
        status, body = await bare.polling().get()
        assert status == 503 and json.loads(body)["code"] == "RATE_LIMITED"
        await client.post("1")
        await bare.next_gone()
        bare.sio.eio.rules.max_sessions = 3
        await bare.poller()


# Upgrade


async def upgrade(bare, client):
    ws = await bare.ws(f"&sid={client.sid}")
    assert await ws.ask("2probe") == "3probe"
    return ws


async def test_upgrade_under_fire_keeps_the_order(bare):
    client = await bare.poller()
    bare.sio.enter(client.sio_sid, "r")
    poll, heard, count = asyncio.create_task(client.get()), [], 0

    def fire(times):
        nonlocal count
        for _ in range(times):
            bare.sio.publish("e", count, "r")
            count += 1

    fire(10)
    ws = await upgrade(bare, client)
    fire(10)
    heard += (await poll)[1].split("\x1e")
    await ws.send("5")
    fire(10)
    while not bare.sio.eio.sockets[client.sid].upgraded:
        fire(1)
        await asyncio.sleep(0)
    fire(10)
    while len([h for h in heard if h != "6"]) < count:
        heard.append(await ws.next())
    assert [h for h in heard if h != "6"] == [f'42["e",{n}]' for n in range(count)]
    assert (await client.get())[0] == 400
    assert await ws.ask(event("echo", ack=1)) == "431[]"


async def test_polling_goes_on_until_the_probe(bare):
    client = await bare.poller()
    ws = await bare.ws(f"&sid={client.sid}")
    poll = asyncio.create_task(client.get())
    while not bare.sio.eio.sockets[client.sid].polled():
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


async def test_upgrade_that_fails_leaves_polling_intact(bare):
    client = await bare.poller()
    ws = await upgrade(bare, client)
    await ws.ws.close()
    while bare.sio.eio.sockets[client.sid].upgrading:
        await asyncio.sleep(0)
    bare.sio.publish("e", 1, client.sio_sid)
    assert (await client.get())[1] == '42["e",1]'


# Ends


@pytest.mark.parametrize("final", [True, False])
async def test_cut_of_a_websocket(bare, final):
    ws, other = await bare.join(), await bare.join()
    for client in (ws, other):
        bare.sio.enter(client.sid, "r")
    bare.sio.publish("before", 1, "r")
    bare.sio.cut(ws.sid, final=final)
    bare.sio.publish("after", 1, "r")
    assert bare.sio.members("r") == [other.sid]
    heard = []
    while (packet := await ws.next()) is not None:
        heard.append(packet)
    assert heard == ['42["before",1]'] + ["41"] * final
    assert (await bare.next_gone())[0] == ws.sid
    assert [await other.next(), await other.next()] == ['42["before",1]', '42["after",1]']
    bare.sio.cut(ws.sid, final=final)
    bare.sio.cut("nobody", final=final)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("pending", [True, False])
async def test_cut_of_a_polling_client(bare, final, pending):
    client = await bare.poller()
    poll = asyncio.create_task(client.get()) if pending else None
    while pending and not bare.sio.eio.sockets[client.sid].polled():
        await asyncio.sleep(0)
    bare.sio.cut(client.sio_sid, final=final)
    assert await (poll or client.get()) == (200, "41" if final else "1")
    assert (await client.get())[0] == 400 and (await client.post(event("echo")))[0] == 400
    assert (await bare.next_gone())[0] == client.sio_sid and await bare.settled()


@pytest.mark.parametrize("last", ["poll", "5"])
async def test_cut_in_the_middle_of_an_upgrade(bare, last):
    client = await bare.poller()
    ws = await upgrade(bare, client)
    bare.sio.cut(client.sio_sid, final=True)
    bare.sio.publish("after", 1, client.sio_sid)
    if last == "poll":
        assert await client.get() == (200, "41")
    else:
        assert await ws.ask("5") == "41"
    assert await ws.closed()
    assert (await client.get())[0] == 400 and await bare.settled()


async def deaf(bare, receive=4096):
    """A raw WebSocket client in the namespace that reads no further."""
    while not bare.seen.empty():
        bare.seen.get_nowait()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
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
    _, sid, _ = await bare.next_seen()
    while not bare.sio.manager.is_connected(sid, "/"):
        await asyncio.sleep(0)
    return sock, sid


def masked(text):
    return struct.pack("!BB", 0x81, 0x80 | len(text)) + b"\0\0\0\0" + text.encode()


async def test_cut_of_a_client_that_does_not_read(bare):
    sock, sid = await deaf(bare)
    while not (link := next(iter(bare.sio.eio.links))).get_write_buffer_size():
        bare.sio.publish("e", "x" * 50000, sid)
        await asyncio.sleep(0)
    began = time.monotonic()
    bare.sio.cut(sid, final=True)
    assert (await bare.next_gone())[0] == sid and time.monotonic() - began < 0.2
    assert await bare.settled() and time.monotonic() - began < 1.0
    assert link.is_closing()
    sock.close()


async def test_client_that_answers_pings_but_never_reads_is_bounded(bare):
    sock, sid = await deaf(bare)
    healthy = await bare.join()
    for ws in (sid, healthy.sid):
        bare.sio.enter(ws, "r")
    sent = 0
    while bare.gone.empty():
        bare.sio.publish("e", "x" * 50000, "r")
        assert len(await healthy.next()) > 50000
        sent += 1
        assert sent < 500
    assert (await bare.next_gone()) == (sid, "transport error")
    assert await healthy.ask(event("echo", ack=1)) == "431[]"
    sock.close()


async def test_polling_client_that_never_polls_is_bounded(bare):
    client, other = await bare.poller(), await bare.poller()
    for n in range(chatrtc.BACKLOG_PACKETS + 1):
        bare.sio.publish("e", n, client.sio_sid)
    assert (await bare.next_gone())[0] == client.sio_sid
    for _ in range(12):
        bare.sio.publish("e", "x" * 100000, other.sio_sid)
    assert (await bare.next_gone())[0] == other.sio_sid
    assert await bare.settled()


async def test_pongs_do_not_keep_a_client_that_never_polls():
    async with Bare(ping_interval=0.1, ping_timeout=0.2) as bare:
        client = bare.polling()
        await client.open()
        await client.post("40")
        for _ in range(40):
            if (await client.post("3"))[0] == 400:
                break
            await asyncio.sleep(0.02)
        assert (await bare.next_gone())[1] == "ping timeout" and await bare.settled()


async def test_frozen_clients_are_found_in_time():
    async with Bare(ping_interval=0.3, ping_timeout=0.2) as bare:
        began = time.monotonic()
        sock, sid = await deaf(bare)
        poller = await bare.poller()
        gone = {(await bare.next_gone()), (await bare.next_gone())}
        assert gone == {(sid, "ping timeout"), (poller.sio_sid, "ping timeout")}
        assert 0.5 <= time.monotonic() - began < 1.0 and await bare.settled()
        sock.close()


async def test_a_server_that_was_stopped_does_not_blame_its_clients():
    async with Bare(ping_interval=0.1, ping_timeout=0.2) as bare:
        ws = await bare.join()
        assert (await asyncio.wait_for(ws.ws.receive(), PATIENCE)).data == "2"
        time.sleep(1.5)  # noqa: ASYNC251
        await ws.send("3")
        assert (await asyncio.wait_for(ws.ws.receive(), PATIENCE)).data == "2"
        await ws.send("3")
        assert await ws.ask(event("echo", ack=1)) == "431[]"


async def test_sessions_that_never_connect_are_cut():
    async with Bare(connect_timeout=0.2) as bare:
        joined, ws, client = await bare.join(), await bare.ws(), bare.polling()
        await client.open()
        assert (await ws.next())[0] == "0" and await ws.closed()
        left = await bare.join()
        await left.send("41")
        assert await left.closed()
        assert (await client.get()) in [(200, "1"), (400, (await client.get())[1])]
        assert await joined.ask(event("echo", ack=1)) == "431[]"


async def test_drain_tells_all_and_takes_no_more(bare):
    ws, client = await bare.join(), await bare.poller()
    poll = asyncio.create_task(client.get())
    while not bare.sio.eio.sockets[client.sid].polled():
        await asyncio.sleep(0)
    sock, sid = await deaf(bare)
    began = time.monotonic()
    listener = asyncio.create_task(ws.closed())
    await bare.sio.drain(1.5)
    assert await listener and time.monotonic() - began < 1.2
    assert (await poll) == (200, "1")
    gone = {(await bare.next_gone())[0] for _ in range(3)}
    assert gone == {ws.sid, client.sio_sid, sid} and await bare.settled()
    assert (await bare.polling().get())[0] == 503
    sock.close()


async def test_oversized_messages_end_the_connection(bare):
    ws = await bare.join()
    fits = event("echo", "x" * (131072 - 20), ack=1)
    assert (await ws.ask(fits)).startswith('431["xxx')
    await ws.send("4" * 131073)
    assert await ws.closed() and (await bare.next_gone())[0] == ws.sid


@pytest.mark.parametrize("frame", [b"\x89\x80\0\0\0\0", b"\x8a\x80\0\0\0\0"], ids=["ping", "pong"])
async def test_control_frames_count(bare, frame):
    bare.sio.eio.rules.frames_per_second = 10
    sock, sid = await deaf(bare)
    for _ in range(100):
        await asyncio.get_running_loop().sock_sendall(sock, frame)
    assert (await bare.next_gone()) == (sid, "transport error")
    sock.close()


async def test_no_deflate(bare):
    ws = await bare.ws(compress=15)
    assert (await ws.next())[0] == "0" and ws.ws.compress == 0


# The engine below, and the library's client above


async def test_engine_handlers_can_be_replaced(bare):
    async def message(sid, data):
        await bare.sio.eio.send(sid, data)

    bare.sio.eio.on("message", message)
    ws = await bare.ws()
    await ws.next()
    assert await ws.ask("4hello") == "4hello" and await ws.ask(b"\x01\x02") == b"\x01\x02"


@pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]])
async def test_the_librarys_own_client(bare, transports):
    client = socketio.AsyncClient(reconnection=False)
    await client.connect(f"http://127.0.0.1:{bare.port}", transports=transports)
    assert await client.call("echo", {"a": b"\x01"}, timeout=PATIENCE) == {"a": b"\x01"}
    assert await client.call("nope", timeout=PATIENCE) == {"unknown": "nope"}
    await client.disconnect()
    await bare.next_gone()
    assert await bare.settled()


def test_the_check_finds_what_is_missing(monkeypatch, caplog):
    assert chatrtc.transport_check() == [] and chatrtc.socket_server().fast
    monkeypatch.setitem(chatrtc.PRIVATE_NAMES, socketio.AsyncServer, "_no_such_name")
    caplog.set_level(logging.WARNING)
    assert not chatrtc.socket_server().fast and "_no_such_name" in caplog.text


# ---- Live ------------------------------------------------------------------------------------------------------------
# What is of the moment: voice and its relay, and registration by its three settings.


async def test_two_people_talk_through_the_relay(make_world: MakeWorld) -> None:
    world = await make_world(ice_server=["stun:example.org:3478"])
    at = await Scene.make(world)
    voice = await at.ana.ok("POST", f"{at.server}/channels", {"name": "talk", "kind": "voice"})
    channel = {"channel_id": voice["channel_id"]}
    first = await at.mine.ok("voice:join", channel)
    assert first["participants"] == []
    assert first["ice_servers"] == [{"urls": "stun:example.org:3478"}]
    second = await at.here.ok("voice:join", channel)
    assert second["participants"] == [{"user_id": at.ana.user_id, "username": "ana", "peer_id": first["peer_id"]}]
    offer = {"type": "offer", "sdp": "v=0", "list": [1, None, {"deep": True}]}
    assert await at.here.ok("voice:signal", channel | {"to": first["peer_id"], "data": offer}) == {"success": True}
    heard = await at.mine.hears("voice:signal")
    assert heard == channel | {"from": second["peer_id"], "user_id": at.ben.user_id, "data": offer}
    await at.here.hears_not("voice:signal")
    outsider = await at.away.call("voice:signal", channel | {"to": first["peer_id"], "data": offer})
    assert outsider["code"] == "FORBIDDEN"
    assert (await at.here.call("voice:signal", channel | {"to": "nobody", "data": 1}))["code"] == "NOT_FOUND"
    await at.mine.hears_not("voice:signal")
    assert (await at.here.ok("voice:join", channel))["peer_id"] == second["peer_id"], "again: nothing changes"
    await at.mine.close()
    assert (await at.here.hears("voice:leave"))["peer_id"] == first["peer_id"]
    text = {"channel_id": at.place.channel_id}
    assert (await at.here.call("voice:join", text))["code"] == "BAD_REQUEST"
    assert await at.here.ok("voice:leave", text) == {"success": True}, "not in it: nothing happens"


async def test_who_may_register(make_world: MakeWorld, tmp_path: Path) -> None:
    closed = await make_world(registration="closed", database=str(tmp_path / "closed.db"))
    account = {"username": "ana", "password": "correct horse"}
    assert (await closed.call("POST", "/auth/register", account)).code == "FORBIDDEN"
    world = await make_world(registration="invite")
    assert (await world.call("POST", "/auth/register", account)).code == "FORBIDDEN"
    await world.chat.chat.store.write(lambda db: chatrtc.add_user(db, "ana", chatrtc.DUMMY))
    server = await world.chat.create_server(author_id=1, name="class")
    invite = await world.chat.create_invite(author_id=1, server_id=server.server_id, max_uses=1)
    ben = {"username": "ben", "password": "correct horse", "code": invite.code}
    assert (await world.call("POST", "/auth/register", ben | {"code": "wrong"})).code == "NOT_FOUND"
    assert (await world.call("POST", "/auth/register", ben)).status == 201
    assert (await world.call("POST", "/auth/register", ben | {"username": "cy"})).code == "NOT_FOUND"


async def test_the_program_itself_has_no_token_to_end(world: World) -> None:
    ana = await world.person("ana")
    with pytest.raises(chatrtc.ChatError):
        await world.chat.logout(author_id=ana.user_id)
    assert (await world.chat.get_profile(author_id=ana.user_id)).username == "ana"


async def test_a_listener_hears_what_sockets_hear(world: World) -> None:
    told: asyncio.Queue[Any] = asyncio.Queue()

    @world.chat.on("message:new")
    async def listen(payload: Any) -> None:
        await told.put(payload)

    ana = await world.person("ana")
    place = await world.place(ana)
    socket = await ana.socket(place.server_id)
    posted = await world.chat.post_message(author_id=ana.user_id, channel_id=place.channel_id, content="by program")
    heard = await socket.hears("message:new")
    assert heard == msgspec.to_builtins(posted) == await asyncio.wait_for(told.get(), PATIENCE)


# ---- Doors -----------------------------------------------------------------------------------------------------------
# What comes in: refusals follow from the declarations, field by field, at both doors; and whatever else anybody sends
# is answered, and breaks nothing.


class Mistake(NamedTuple):
    operation: str
    field: str
    wrong: str
    value: Any
    code: str


MISSING = object()


def mistakes_with(name: str, kind: msgspec.inspect.Type, required: bool) -> Iterator[tuple[str, Any, str]]:
    """What can be wrong with a field of that type, by its declaration."""
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
                yield "not fitting its pattern", "a\x00b", "BAD_REQUEST"
        elif isinstance(one, msgspec.inspect.IntType):
            yield "a string", "one", "BAD_REQUEST"
            yield "true", True, "BAD_REQUEST"
            yield "a fraction", 1.5, "BAD_REQUEST"
            yield "beyond all numbers", 10**40, "BAD_REQUEST"
            assert one.ge is not None
            yield "too small", one.ge - 1, "BAD_REQUEST"
            assert one.le is not None
            yield "too large", one.le + 1, "BAD_REQUEST"
        elif isinstance(one, msgspec.inspect.LiteralType):
            yield "none of its words", "nothing", "BAD_REQUEST"


def mistakes(op: chatrtc.Operation) -> Iterator[Mistake]:
    kind = msgspec.inspect.type_info(op.args)
    assert isinstance(kind, msgspec.inspect.StructType)
    yield Mistake(op.name, "unknown", "there", 1, "BAD_REQUEST")
    for field in kind.fields:
        if field.required:
            yield Mistake(op.name, field.name, "missing", MISSING, "BAD_REQUEST")
        for wrong, value, code in mistakes_with(field.name, field.type, field.required):
            yield Mistake(op.name, field.name, wrong, value, code)


def mistakes_at(door: str, op: chatrtc.Operation) -> list[Mistake]:
    """Those that this door can carry: a path or a query is text, and a path has all its parts."""
    if door == "socket":
        return list(mistakes(op)) if op.event else []
    in_path = set(re.findall(r"{(\w+)}", op.path or ""))
    in_text = in_path if op.method in ("POST", "PUT", "PATCH") else {field.name for field in fields_of(op)}
    fitting = []
    for mistake in mistakes(op) if op.path else ():
        if mistake.field in in_path and mistake.value in (MISSING, ""):
            continue  # is another route
        if mistake.field in in_text:
            numeric = "integer" in str(msgspec.json.schema(op.args)["$defs"][op.args.__name__]["properties"][mistake.field])
            if not (isinstance(mistake.value, str | int) and (numeric or mistake.wrong != "a number")):
                continue  # is text like any other there
        fitting.append(mistake)
    return fitting


def fields_of(op: chatrtc.Operation) -> tuple[Any, ...]:
    return msgspec.structs.fields(op.args)


@pytest.mark.parametrize("door", ["rest", "socket"])
async def test_what_does_not_fit_is_refused_by_its_declaration(scene: Scene, door: str) -> None:
    chat, owner = scene.world.chat, scene.ana.user_id
    message, code = await scene.post(), (await chat.create_invite(author_id=owner, server_id=1)).code
    right: dict[str, Any] = {
        "server_id": 1, "channel_id": 1, "message_id": message["message_id"], "user_id": scene.cy.user_id, "code": code,
        "name": "name", "username": "eve", "password": "correct horse", "new_password": "battery staple", "q": "told",
        "content": "hello", "emoji": "x", "role": "member", "status": "away", "token": scene.ana.token, "to": "x",
        "data": {},
    }  # fmt: skip
    tried, wrong = 0, []
    for op in chatrtc.OPERATIONS.values():
        for mistake in mistakes_at(door, op):
            args = {field.name: right[field.name] for field in fields_of(op) if field.required}
            args |= {mistake.field: mistake.value}
            args = {name: value for name, value in args.items() if value is not MISSING}
            if door == "rest":
                got = (await by_rest(scene.world, scene.ana.token, op, args)).code
            else:
                got = (await scene.mine.call(op.event or "", args)).get("code")
            tried += 1
            if got != mistake.code:
                wrong.append(f"{op.name}: {mistake.field} {mistake.wrong}: {got}, expected {mistake.code}")
    assert not wrong, "\n".join(wrong)
    assert tried > 100
    assert (await scene.post())["seq"] == message["seq"] + 1, "none of them changed anything"


async def test_a_body_that_is_no_object_is_refused(scene: Scene) -> None:
    for body in (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b'{"content": "\xff"}', b"{}" * 2, b"[" * 10_000):
        reply = await scene.ana.call("POST", "/messages", data=body)
        assert reply.code == "BAD_REQUEST", body
    lone = b'{"channel_id": 1, "content": "\\ud800"}'
    assert (await scene.ana.call("POST", "/messages", data=lone)).code == "BAD_REQUEST"
    huge = b'{"content": "' + b"x" * 300_000 + b'"}'
    assert (await scene.ana.call("POST", "/messages", data=huge)).code == "TOO_LARGE"
    twice = await scene.ana.call("PATCH", "/servers/1", {"server_id": 2, "name": "x"})
    assert twice.code == "BAD_REQUEST", "an argument has one place"
    for method, path in (("GET", "/nothing"), ("POST", "/healthz"), ("DELETE", "/messages"), ("GET", "/servers/1/x")):
        assert (await scene.ana.call(method, path)).code == "NOT_FOUND"
    await scene.post()


RESERVED = ["connect", "disconnect", "connect_error", "newListener", "message", "*", "error", "", "__proto__"]


async def test_whatever_event_is_sent_gets_its_ack(scene: Scene) -> None:
    for event in [*RESERVED, "message:new", "user:connected", "x" * 5000]:
        for payload in ((), ({"server_id": 1},), ("spoofed",), (None,)):
            ack = await scene.mine.call(event, *payload)
            assert (ack["success"], ack["code"]) == (False, "NOT_FOUND"), event
    for event in chatrtc.EVENTS_IN:
        wrong: list[tuple[Any, ...]] = [({}, {}), (b"\x00\xff",), ({"server_id": b"x"},), ([],), ("x",), (1,), ({"x": 1},)]
        for arguments in wrong if event == "ping" else [*wrong, (), (None,)]:
            ack = await scene.mine.call(event, *arguments)
            assert (ack["success"], ack["code"]) == (False, "BAD_REQUEST"), (event, arguments)
    assert (await scene.mine.call("ping", None))["success"] is True
    await scene.mine.ok("ping")
    await scene.here.hears_not("user:disconnected")


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
def almost(draw: strategies.DrawFn, op: chatrtc.Operation) -> dict[str, Any]:
    """Arguments of an operation, most of them fitting."""
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
def emissions(draw: strategies.DrawFn) -> tuple[Any, tuple[Any, ...]]:
    """An event and what it carries, more or less as it should be."""
    names = [name for name in chatrtc.EVENTS_IN if name is not None]
    event = draw(strategies.sampled_from(names))
    if draw(strategies.integers(0, 4)):
        return event, (draw(almost(chatrtc.EVENTS_IN[event])),)
    wild = SCRAPS | strategies.binary(max_size=9) | strategies.dictionaries(strategies.text(), strategies.binary(), max_size=2)
    event = draw(strategies.sampled_from(names + RESERVED) | strategies.text(max_size=12))
    return event, tuple(draw(strategies.lists(wild, max_size=2)))


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


NEVER = {"INTERNAL_ERROR", "UNAVAILABLE"}


async def try_emissions(scene: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    for event, payload in tries:
        ack = await scene.mine.call(event, *payload)
        assert ack.get("code") not in NEVER, (event, payload, ack)
    assert not scene.mine.closed.is_set()
    await scene.mine.ok("ping")


@fuzz(80)
@given(tries=strategies.lists(emissions(), min_size=8, max_size=12))
async def test_no_event_breaks_anything(fuzzed: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    await try_emissions(fuzzed, tries)


@pytest.mark.soak
@fuzz(2000)
@given(tries=strategies.lists(emissions(), min_size=8, max_size=12))
async def test_no_event_breaks_anything_for_long(fuzzed: Scene, tries: list[tuple[Any, tuple[Any, ...]]]) -> None:
    await try_emissions(fuzzed, tries)


@pytest_asyncio.fixture
async def fuzzed(scene: Scene) -> Scene:
    """A scene with a bit of everything, one for all examples."""
    await scene.ana.ok("POST", f"{scene.server}/channels", {"name": "talk", "kind": "voice"})
    for _ in range(4):
        await scene.post()
    return scene


@strategies.composite
def requests(draw: strategies.DrawFn) -> tuple[chatrtc.Operation, dict[str, Any], bytes | None]:
    """A route, its arguments, and a body instead of them."""
    op = draw(strategies.sampled_from([op for op in chatrtc.OPERATIONS.values() if op.path]))
    broken = strategies.binary(max_size=30) | SCRAPS.map(lambda scrap: json.dumps(scrap).encode())
    return op, draw(almost(op)), draw(broken) if not draw(strategies.integers(0, 5)) else None


async def try_requests(scene: Scene, tries: list[tuple[chatrtc.Operation, dict[str, Any], bytes | None]]) -> None:
    for op, args, body in tries:
        ends = op.name in ("logout", "change_password", "delete_server")  # the story, for who may
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


# ---- Protocol --------------------------------------------------------------------------------------------------------
# The specification's own sample, as it stands there, with the official client.

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


async def node(folder: Path, script: str) -> asyncio.subprocess.Process:
    """Run a script that finds the packages beside the tests."""
    program, packages = tool("node"), HERE / "node_modules"
    if not (packages / "socket.io-client").is_dir():
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse("npm install --no-save --no-package-lock socket.io-client@^4.8 has not been run")
    (folder / "node_modules").symlink_to(packages)
    (folder / "sample.mjs").write_text(script)
    return await asyncio.create_subprocess_exec(
        program, "sample.mjs", cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def test_the_sample_of_the_specification_works_as_it_stands(world: World, tmp_path: Path) -> None:
    ana, ben = await world.people("ana", "john_doe")
    place = await world.place(ana, ben)
    for name in ("two", "three"):
        channel = await ana.ok("POST", f"/servers/{place.server_id}/channels", {"name": name})
    assert (place.server_id, channel["channel_id"]) == (1, 3)
    hears = await ana.socket(place.server_id)
    script = SAMPLE.replace("http://localhost:3000", world.url).replace("YOUR_JWT_TOKEN", ben.token)
    process = await node(tmp_path, script + REPORT)
    try:
        who = {"user_id": ben.user_id, "username": "john_doe"}
        assert await hears.hears("user:connected", user_id=ben.user_id) == who | {"server_id": 1}
        assert await hears.hears("user:typing") == who | {"channel_id": 3}
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
    assert (await hears.hears("user:disconnected"))["user_id"] == ben.user_id
