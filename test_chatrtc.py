"""The tests of ChatRTC, in the order of its rooms: a real server on a free port, real clients, a real SQLite file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import aiohttp
import msgspec
import pytest
import pytest_asyncio
import socketio
from aiohttp import web
from hypothesis import settings, stateful, strategies

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
    broken = [record for record in caplog.get_records("call") if record.exc_info]
    assert not broken, [f"{record.getMessage()}: {record.exc_info}" for record in broken]


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
    "name",
    ["a b", "a@b", "a/b", "a\n", "\u200bab", "a\u202eb", "\u3164\u3164", "ab\x00", "😀😀", "ab:", "\u0301a", "  "],
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
    assert preview == {"code": invite["code"], "server_id": server["server_id"]} | {
        "server_name": "class",
        "member_count": 1,
    }
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
                        {"emoji": emoji, "user_ids": sorted(user for one, user in pairs if one == emoji)}
                        for emoji in emojis
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
        "members": {
            member["user_id"]: member["role"] for member in (await person.ok("GET", f"{server}/members"))["members"]
        },
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
                reply = await person.call(
                    "POST", "/messages", {"channel_id": pick(self.channels), "content": "@ben hi"}
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


async def test_a_thousand_concurrent_posts_are_heard_by_a_hundred_sockets_in_order(world: World) -> None:
    ana, ben = await world.people("ana", "ben")
    place = await world.place(ana, ben)
    start = (await ana.ok("GET", f"/servers/{place.server_id}/changes"))["seq"]
    sockets = await asyncio.gather(*(ben.socket(place.server_id, transports=["websocket"]) for _ in range(100)))
    replies = await asyncio.gather(*(ana.post(place.channel_id, str(number)) for number in range(1000)))
    assert sorted(reply["seq"] for reply in replies) == [start + 1 + number for number in range(1000)]
    expected = sorted(replies, key=lambda reply: int(reply["seq"]))
    for socket in sockets:
        await socket.hears("message:new", seq=start + 1000)
        assert [payload for event, payload in socket.heard if event == "message:new"] == expected


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
TestPresence.settings = settings(
    max_examples=60, stateful_step_count=30, derandomize=True, database=None, deadline=None
)


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
    assert ack["connected_users"] == sorted(person.user_id for person in (scene.ana, scene.ben, scene.cy)), (
        "oneself included"
    )
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


# ---- Operations ------------------------------------------------------------------------------------------------------
