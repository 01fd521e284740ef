"""ChatRTC: a chat server in one file.

Users, servers (communities), channels, messages, typing and presence, over Socket.IO and REST, stored in one SQLite file. Start
it with `python chatrtc.py serve`. Three laws: code uses only names defined above it; every call is answered; what is published
has been committed. The sections, to be read in this order:

    Settings            every option, declared once: the command line, the environment and the docs follow from it
    Errors              every error that a client can get: codes, reasons and texts
    Text                names, mentions and search: rules about text
    File types          the names, media types and picture sizes of files
    Payloads            the types of all arguments and results
    Events              the events that the server emits, and the effects of operations
    Files               the database file: opening, checking, migrating, locking, copying
    Store               the open database: one writer, several readers
    Queries             the SQL for accounts, servers and members
    File queries        the SQL for the files that messages contain
    Message queries     the SQL for messages, reactions, read marks and search
    Transcript          the messages of channels as one HTML file
    Presence            users who are connected, typing or in a voice channel: kept in memory only
    Authentication      passwords and tokens
    Rate limits         how often a user or an address may do something
    Authorization       which roles may do what
    Operations          operations that run in one database transaction, in the order a user meets them
    Engine.IO sessions  one client's session: its buffers, its limits and how it ends; the fast fan-out
    Engine.IO server    all sessions, and the HTTP requests that open and reach them
    Socket.IO server    Socket.IO on top of Engine.IO: packets are validated, and handled in order
    Hub                 sockets and their users; applies the effects of operations
    Bus                 messages between the processes that share a database, through Redis
    Async operations    operations that need more than one transaction, or sockets
    API                 REST and Socket.IO handlers, OpenAPI and AsyncAPI, all derived from the table of operations
    Application         starting, stopping, embedding
    Methods             the operations as methods of ChatRTC, and the stubs that declare them to type checkers
    Command line        `chatrtc serve` and the other commands
"""

from __future__ import annotations

import os
import sys

if (
    (__name__, os.path.basename(__file__)) == ("__main__", "chatrtc.py")
    and sys.orig_argv[1:] == sys.argv
    and sys.executable
    and hasattr(os, "fork")
):
    # While Python runs a file as a script, it keeps the file's syntax tree, which takes 25 MiB. So this process replaces itself
    # by one that imports the file. (Not on Windows, where the shell would not wait for it, and not with options of Python.)
    start = """import os, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import chatrtc
chatrtc.main(prog_name="chatrtc")"""
    os.execv(sys.executable, [sys.executable, "-P", "-c", start, os.path.abspath(__file__), *sys.argv[1:]])

import asyncio
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import datetime
import email.utils
import enum
import errno
import functools
import gc
import gzip
import hashlib
import heapq
import hmac
import html
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import time
import traceback
import typing
import unicodedata
import urllib.parse
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import aiosqlite
import click
import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType


@contextlib.contextmanager
def hide(*names: str) -> Iterator[None]:
    """Make imports of these modules fail, if this is the program `chatrtc`. An embedding program may need them."""
    hidden = {name: sys.modules.get(name) for name in names if Path(sys.argv[0]).stem == "chatrtc"}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    yield
    for name, module in hidden.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


# With `ssl`, aiohttp loads all certificates for its client, which the program does not use: 2.5 MiB. python-socketio and PyJWT
# import the others if they are installed, although only --redis and --tls-self-signed need them: 15 MiB and 0.35 s.
with hide("ssl"):
    import aiohttp
    from aiohttp import HttpVersion11, WSMsgType, web
with hide("redis", "cryptography"):
    import engineio
    import jwt
    import socketio
    from socketio import packet as wire

if __name__ not in sys.modules:  # hatchling imports it without an entry, which `typing` needs (see `get_build_hook`)
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules[__name__] = importlib.import_module("chatrtc")

__version__ = "1.0.0"
__all__ = ["CallerInfo", "ChatError", "ChatRTC", "Settings", "socket_server"]

log = logging.getLogger("chatrtc")


def optional_import(name: str) -> Any:
    """Return a module, or None if this system does not have it."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


fcntl, msvcrt, resource, termios = map(optional_import, ("fcntl", "msvcrt", "resource", "termios"))

# ---- Settings ------------------------------------------------------------------------------------------------------
# Each field is an option of `serve`, an environment variable CHATRTC_<NAME>, a keyword argument of ChatRTC() and a row of the
# documentation. All of them take its name, type, default and description from here.

SECRET_BYTES = 32  # minimum length of the key that signs tokens
ProcessName = Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9]*\Z")]
Encodable = Annotated[str, Meta(pattern=r"^[^\ud800-\udfff]*\Z")]  # an argument may have bytes that are not UTF-8


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one and prints it.")] = 3000
    database: Annotated[
        str, Meta(min_length=1, pattern=r"^[^\x00]+$", description="SQLite file in which everything is stored.")
    ] = "chatrtc.db"
    secret: Annotated[
        Encodable | None,
        Meta(description="Token signing key, 32 bytes or more (default: generated). `ps` shows it: use CHATRTC_SECRET."),
    ] = None
    token_ttl: Annotated[int, Meta(ge=1, le=10**9, description="Token lifetime in seconds.")] = 30 * 86400
    cors_origin: Annotated[tuple[str, ...], Meta(description="Also allow pages from this origin (repeatable).")] = ()
    frame_ancestor: Annotated[
        tuple[str, ...], Meta(description="Let pages of this origin, or 'self', show the chat in a frame (repeatable).")
    ] = ()
    registration: Annotated[
        Literal["open", "invite", "closed"], Meta(description="Who may register: anyone, people with an invite, or nobody.")
    ] = "open"
    no_guests: Annotated[bool, Meta(description="Do not accept guests (invited people without a password).")] = False
    create_servers: Annotated[
        Literal["everyone", "accounts", "nobody"],
        Meta(description="Who may create servers: everyone, everyone except guests, or only the command line."),
    ] = "accounts"
    conversations: Annotated[
        Literal["everyone", "staff", "nobody"],
        Meta(description="Which private conversations are allowed: all, those with an admin or owner, or none."),
    ] = "everyone"
    ice_server: Annotated[
        tuple[Encodable, ...],
        Meta(
            description="Server for voice: stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT (repeatable). "
            "`ps` shows the password: use CHATRTC_ICE_SERVER."
        ),
    ] = ()
    tls_cert: Annotated[str | None, Meta(description="Certificate file (PEM) for https.")] = None
    tls_key: Annotated[str | None, Meta(description="Private key file (PEM) of that certificate.")] = None
    tls_self_signed: Annotated[bool, Meta(description="Serve https with a generated certificate (needs chatrtc[tls]).")] = False
    lan: Annotated[bool, Meta(description="Listen on the local network, and show the address and its QR code.")] = False
    public_url: Annotated[str | None, Meta(description="Address that people open, such as https://chat.example.org.")] = None
    trusted_proxy: Annotated[
        tuple[str, ...],
        Meta(description="Proxy whose X-Forwarded headers are trusted: address, network or 'unix' (repeatable)."),
    ] = ()
    file_max: Annotated[int, Meta(ge=0, le=10_000, description="Maximum size of a file in MiB; 0 turns files off.")] = 10
    files_max: Annotated[int, Meta(ge=0, le=10**9, description="Maximum size of all files together in MiB.")] = 4096
    disk_reserve: Annotated[
        int, Meta(ge=0, le=10**9, description="Free disk space in MiB below which nothing can be added.")
    ] = 256
    redis: Annotated[
        str | None,
        Meta(
            description="Share the database with other servers, using Redis at this URL: redis://HOST:PORT. "
            "`ps` shows a password in it: use CHATRTC_REDIS."
        ),
    ] = None
    process: Annotated[
        ProcessName | None, Meta(description="Name of this process, of letters and digits, with --redis (default: generated).")
    ] = None
    max_sockets: Annotated[int, Meta(ge=1, le=10**6, description="Maximum number of sockets; more are refused.")] = 20_000
    voice_max: Annotated[int, Meta(ge=2, le=1000, description="Maximum number of people in a voice channel.")] = 12
    keep_days: Annotated[int, Meta(ge=0, le=36_500, description="Days after which messages are deleted; 0: never.")] = 0
    no_rate_limit: Annotated[
        bool, Meta(description="Turn off rate limits and the limits on sockets per user and address, for benchmarks.")
    ] = False


# ---- Errors --------------------------------------------------------------------------------------------------------
# Every error that a client can get is a ChatError. Any other exception is a bug, which clients see as INTERNAL_ERROR.

ERRORS: dict[str, tuple[int, str]] = {  # code -> HTTP status and text
    "BAD_REQUEST": (400, "The request is invalid"),
    "UNAUTHORIZED": (401, "A valid token is required"),
    "FORBIDDEN": (403, "You are not allowed to do this"),
    "NOT_FOUND": (404, "Not found"),
    "CONFLICT": (409, "This already exists"),
    "TOO_LARGE": (413, "The request is too large"),
    "RATE_LIMITED": (429, "Too many requests; try again in a moment"),
    "INTERNAL_ERROR": (500, "Internal server error; it has been logged"),
    "UNAVAILABLE": (503, "The server cannot do this at the moment; nothing was changed"),
}
REASONS: dict[str, tuple[str, str]] = {  # reason -> code and text; a reason is more specific, and the page translates it
    "FIELD_MISSING": ("BAD_REQUEST", "{what} is missing"),
    "FIELD_UNKNOWN": ("BAD_REQUEST", "Unknown field: {what}"),
    "FIELD_TWICE": ("BAD_REQUEST", "{what} is given twice"),
    "FIELD_EMPTY": ("BAD_REQUEST", "{what} must not be empty"),
    "FIELD_SHORT": ("BAD_REQUEST", "{what} must have at least {n} characters"),
    "FIELD_LONG": ("TOO_LARGE", "{what} must have at most {n} characters"),
    "FIELD_FORM": ("BAD_REQUEST", "{what} is blank or contains a character that is not allowed"),
    "FIELD_SMALL": ("BAD_REQUEST", "{what} must be at least {n}"),
    "FIELD_BIG": ("BAD_REQUEST", "{what} must be at most {n}"),
    "FIELD_RANGE": ("BAD_REQUEST", "{what} contains a number that is out of range"),
    "FIELD_CHOICE": ("BAD_REQUEST", "{what} cannot be {n}"),
    "FIELD_MANY": ("BAD_REQUEST", "{what} must have at most {n} entries"),
    "FIELD_TYPE": ("BAD_REQUEST", "{what}: {n}"),
    "ONE_CURSOR": ("BAD_REQUEST", "Only one of before, after and around can be given"),
    "NOT_TEXT": ("BAD_REQUEST", "The text contains an unpaired surrogate"),
    "NOT_JSON": ("BAD_REQUEST", "The body is not valid JSON"),
    "USERNAME_TAKEN": ("CONFLICT", "This username is already taken"),
    "USERNAME_FORM": ("BAD_REQUEST", "A username has 2 to 32 letters, digits, '_', '.' or '-', all of one script"),
    "NAME_FORM": ("BAD_REQUEST", "A name has 1 to 64 visible characters"),
    "PASSWORD_CHANGED": ("CONFLICT", "The password was changed in the meantime"),
    "WRONG_PASSWORD": ("UNAUTHORIZED", "Wrong username or password"),
    "WRONG_OLD_PASSWORD": ("FORBIDDEN", "The old password is wrong"),
    "TOKEN_INVALID": ("UNAUTHORIZED", "Invalid token"),
    "SIGN_IN_FIRST": ("UNAUTHORIZED", "Authenticate first"),
    "OTHER_SITE": ("FORBIDDEN", "Only this site's own pages can sign in with its login"),
    "NO_HOST_LOGIN": ("NOT_FOUND", "This chat does not use the login of the site that contains it"),
    "HOST_SIGN_IN": ("UNAUTHORIZED", "Sign in on the site that contains this chat"),
    "HOST_FAILED": ("UNAVAILABLE", "The program that contains this chat failed; try again in a moment"),
    "ACCOUNT_DELETED": ("UNAUTHORIZED", "This account was deleted"),
    "NO_PASSWORD": ("FORBIDDEN", "This account cannot have a password"),
    "REGISTRATION_CLOSED": ("FORBIDDEN", "Only the person who runs this chat can create accounts"),
    "INVITE_NEEDED": ("FORBIDDEN", "An invite is required to create an account"),
    "GUESTS_OFF": ("FORBIDDEN", "This chat does not accept guests"),
    "NOT_FOR_GUESTS": ("FORBIDDEN", "Guests cannot do this; set a password first"),
    "NOT_FOR_BOTS": ("FORBIDDEN", "Bots cannot do this"),
    "CREATE_SERVERS_OFF": ("FORBIDDEN", "Only the person who runs this chat can create servers"),
    "NO_TOKEN": ("BAD_REQUEST", "There is no token to revoke: the call came from the embedding program"),
    "NOT_MEMBER": ("FORBIDDEN", "You are not a member of this server"),
    "ROLE_TOO_LOW": ("FORBIDDEN", "Only {who} may do this"),
    "MUTED": ("FORBIDDEN", "You are muted in this server"),
    "READ_ONLY": ("FORBIDDEN", "Only admins and the owner may write in this channel"),
    "SLOW_MODE": ("RATE_LIMITED", "Slow mode: wait a moment before you post here again"),
    "OWNER_STAYS": ("FORBIDDEN", "A server needs an owner; transfer the ownership first"),
    "NOT_BANNED": ("NOT_FOUND", "This user is not banned"),
    "BANNED": ("FORBIDDEN", "You are banned from this server"),
    "NO_MEMBER": ("NOT_FOUND", "Member not found"),
    "NO_USER": ("NOT_FOUND", "User not found"),
    "NO_SERVER": ("NOT_FOUND", "Server not found"),
    "NO_CHANNEL": ("NOT_FOUND", "Channel not found"),
    "NO_MESSAGE": ("NOT_FOUND", "Message not found"),
    "NO_BOT": ("NOT_FOUND", "Bot not found"),
    "NO_HOOK": ("NOT_FOUND", "Hook not found"),
    "HOOK_UNKNOWN": ("NOT_FOUND", "This hook does not exist"),
    "HOOK_BODY": ("BAD_REQUEST", "A hook takes JSON, or a form with the field payload"),
    "LINK_UNKNOWN": ("NOT_FOUND", "This sign-in code is wrong, used or expired; ask for a new one"),
    "NOT_A_GUEST": ("FORBIDDEN", "This member is not a guest; sign-in codes are for guests"),
    "LINK_ELSEWHERE": ("FORBIDDEN", "This guest is also a member of a server where you are not allowed to do this"),
    "INVITE_UNKNOWN": ("NOT_FOUND", "Invite not found"),
    "INVITE_EXPIRED": ("NOT_FOUND", "This invite has expired"),
    "INVITE_SPENT": ("NOT_FOUND", "This invite has been used up"),
    "CHANNEL_TAKEN": ("CONFLICT", "The server already has a channel of this name"),
    "PARTICIPANTS": ("BAD_REQUEST", "A conversation has 1 to {n} other participants"),
    "NO_SHARED_SERVER": ("FORBIDDEN", "The participants of a conversation must be members of the same server"),
    "CONVERSATIONS_OFF": ("FORBIDDEN", "Private conversations are turned off"),
    "CONVERSATIONS_STAFF": ("FORBIDDEN", "An admin or owner of a shared server must take part in a private conversation"),
    "TWO_ONLY": ("FORBIDDEN", "Nobody can be added to a conversation of two; start a new one"),
    "LEFT": ("FORBIDDEN", "This person has left the conversation, and nobody else can bring them back"),
    "TOO_MANY": ("CONFLICT", "The limit of {n} is reached"),
    "MESSAGE_DELETED": ("CONFLICT", "This message was posted and has since been deleted"),
    "NO_REPLY_TARGET": ("NOT_FOUND", "The message to reply to was not found in this channel"),
    "TOO_MANY_REACTIONS": ("CONFLICT", "A message has at most {n} different reactions"),
    "NO_FILE": ("NOT_FOUND", "File not found"),
    "FILE_ATTACHED": ("CONFLICT", "The file already belongs to a message"),
    "FILES_OFF": ("FORBIDDEN", "This chat does not accept files"),
    "FILES_FULL": ("UNAVAILABLE", "The server has no space left for files; reading and writing messages still work"),
    "NOT_JOINED": ("FORBIDDEN", "This socket has not joined the server"),
    "NO_VOICE_CHANNEL": ("BAD_REQUEST", "This is not a voice channel"),
    "NOT_IN_VOICE": ("FORBIDDEN", "You are not in this voice channel"),
    "PEER_BEHIND": ("RATE_LIMITED", "This peer cannot keep up; try again in a moment"),
    "NO_PEER": ("NOT_FOUND", "Peer not found in this voice channel"),
    "VOICE_FULL": ("CONFLICT", "This voice channel is full: it has room for {n} people"),
    "TOO_OFTEN": ("RATE_LIMITED", "Too many requests; try again in a moment"),
    "SIGN_IN_BUSY": ("RATE_LIMITED", "Too many people are signing in; try again in a moment"),
    "TOO_MANY_SOCKETS": ("RATE_LIMITED", "You already have {n} open connections"),
    "CLOSING": ("UNAVAILABLE", "The connection is closing"),
    "TOO_SLOW": ("UNAVAILABLE", "The server did not respond in time; try again in a moment"),
    "DATABASE_DOWN": ("UNAVAILABLE", "The database is not available at the moment"),
    "DISK_FULL": ("UNAVAILABLE", "The disk is nearly full: reading and deleting still work, but nothing can be added"),
    "DISK_SLOW": ("UNAVAILABLE", "The disk did not respond in time; the change may still be saved"),
    "SOCKET_TAKEN": ("CONFLICT", "This socket is already authenticated as {name}"),
    "BODY_COMPRESSED": ("BAD_REQUEST", "Compressed bodies are not accepted"),
    "BODY_LONG": ("TOO_LARGE", "A body has at most {n} bytes"),
    "BODY_BROKEN": ("BAD_REQUEST", "The body was incomplete or arrived too slowly"),
    "NOT_ENGINE_IO": ("BAD_REQUEST", "Not a valid Engine.IO 4 request: {what}"),
    "SESSION_UNKNOWN": ("BAD_REQUEST", "This session does not exist or has ended"),
    "SERVER_FULL": ("UNAVAILABLE", "The server accepts no more connections"),
    "ADDRESS_FULL": ("RATE_LIMITED", "Too many connections from your address"),
    "ORIGIN": ("FORBIDDEN", "Pages of this origin may not use this chat"),
    "HOST": ("FORBIDDEN", "This chat does not accept this host name (see --public-url)"),
    "NO_EVENT": ("NOT_FOUND", "Unknown event"),
    "ONE_OBJECT": ("BAD_REQUEST", "An event takes one object as its argument"),
    "NO_ROUTE": ("NOT_FOUND", "Unknown route"),
    "NO_ACCOUNT": ("NOT_FOUND", "There is no account named {name}"),
    "NO_AUTHOR": ("UNAUTHORIZED", "as_user is missing: the user who performs the action"),
}


class ChatError(Exception):
    """An error for a client: a code of `ERRORS` and a text. Optional: the reason (of `REASONS`), the field that is invalid, the
    seconds to wait (RATE_LIMITED), and an HTTP status other than the code's."""

    def __init__(
        self, code: str, detail: str | None = None, retry_after: float | None = None, status: int | None = None, *,
        reason: str | None = None, field: str | None = None,
    ) -> None:  # fmt: skip
        self.code, self.retry_after, self.reason, self.field = code, retry_after, reason, field
        self.status = status or ERRORS[code][0]
        self.detail = detail or ERRORS[code][1]
        text = f"{code}: {self.detail}"
        super().__init__(text.encode(errors="backslashreplace").decode())  # a log file cannot hold an unpaired surrogate

    def body(self) -> dict[str, Any]:
        wait = None if self.retry_after is None else max(1, math.ceil(self.retry_after))
        more = {"reason": self.reason, "field": self.field, "retry_after": wait}
        return {"error": self.detail, "code": self.code} | {key: value for key, value in more.items() if value is not None}


def chat_error(reason: str, *, field: str | None = None, retry_after: float | None = None, **values: object) -> ChatError:
    """Return the error for a reason of `REASONS`; `values` fill the placeholders in its text."""
    code, text = REASONS[reason]
    return ChatError(code, text.format(**values), retry_after, reason=reason, field=field)


async def result_or_exception(work: Awaitable[Any]) -> Any:
    """Return the result of `work` or the exception it raised. No other function catches all exceptions without raising them."""
    try:
        return await work
    except Exception as error:
        return error
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        return RuntimeError("awaited something that was cancelled").with_traceback(error.__traceback__)
    finally:
        del work  # a task keeps its exception, whose traceback has this frame: see `drop_frames`


class StartError(Exception):
    """An error for the person at the keyboard, in one line: the program cannot start, a command cannot run, or the database
    file was replaced while the server runs."""


# ---- Text ----------------------------------------------------------------------------------------------------------
# Rules about text: which names count as equal, valid usernames, invite codes, mentions in messages, and search.

JOINERS = "\u200c\u200d"  # invisible characters that shape the letters and emojis around them
CONTROLS = "\x00-\x1f\x7f-\x9f"
# Invisible characters except white space: Unicode's Default_Ignorable_Code_Point, and characters that fonts leave blank.
INVISIBLE_CHARS = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U00016fe4\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
BIDI_CONTROLS = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # reorder the text after them
VISIBLE = f"(?=[\\s{INVISIBLE_CHARS}]*[^\\s{INVISIBLE_CHARS}{CONTROLS}])"  # a visible character follows
CONTROL_CHARS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TEXT = "[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"  # no control characters but tab and newline
CONTENT = "[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]*$"  # also carriage returns, which become newlines
VIRAMAS = "\u094d\u09cd\u0a4d\u0acd\u0b4d\u0d4d\u0dca"  # before U+200D at the end of a word: half forms, older Malayalam
# A name may contain spaces. Joiners and emoji selectors are allowed only after a character that they can shape. No two
# alternatives match the same character: a name that fits nearly would take exponential time.
NAME = (
    f"^{VISIBLE}(?:[^{CONTROLS}\u2028\u2029{INVISIBLE_CHARS}]|(?<=[^\x00-\u058f\\s{JOINERS}])[{JOINERS}](?=\\S)|"
    f"(?<=[{VIRAMAS}])\u200d(?!\\S)|"
    "(?<=[#*0-9\u00a9\u00ae\u203c-\ufdff\U0001f000-\U0001ffff])[\ufe0e\ufe0f]|(?<=\U0001f3f4)[\U000e0020-\U000e007f]+)*$(?!\n)"
)
# Sets of scripts that one name may mix. A script is the first word of its characters' Unicode names.
MIXED_SCRIPTS = ({"LATIN", "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"}, {"LATIN", "CJK", "HANGUL"})
SCRIPTS = {  # first word of a Unicode name -> script, if they differ ("": used with any script)
    "IDEOGRAPHIC": "CJK", "HANGZHOU": "CJK", "KATAKANA-HIRAGANA": "KATAKANA", "ARABIC-INDIC": "ARABIC", "EXTENDED": "ARABIC",
    "COMBINING": "", "MODIFIER": "", "DIGIT": "", "LOW": "", "FULL": "", "HYPHEN-MINUS": "",
}  # fmt: skip
CURSIVE = {"ARABIC", "SYRIAC", "MANDAIC", "MONGOLIAN", "NKO"}
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # without I, O, 0 and 1, which are easily confused
VIRAMA = 9  # combining class of signs that join two consonants


def unify_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def name_key(name: str) -> str:
    """Return the form in which names are compared: NFKC and case folding, without joiners."""
    if name.isascii():
        return name.lower()
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(f"[{JOINERS}]", "", unicodedata.normalize("NFKC", folded))  # folding may undo the first NFKC


@functools.lru_cache(maxsize=4096)
def script_of(char: str) -> str:
    """Return the script of a letter, mark or digit, or "" for a character that is used with any script."""
    word = unicodedata.name(char, "").partition(" ")[0]
    return SCRIPTS.get(word, "" if unicodedata.category(char) in ("No", "Nl", "Cf") else word)


@functools.lru_cache(maxsize=4096)
def is_username_char(char: str) -> bool:
    """Return whether a username may contain a character (other than a joiner): a visible letter, digit or mark, or `_.-`."""
    category = unicodedata.category(char)  # Me is a mark that encloses a letter: no script needs it
    return char in "_.-" or (category[0] in "LNM" and category != "Me" and not re.match(f"[{INVISIBLE_CHARS}]", char))


def is_joiner(name: str, at: int) -> bool:
    """Return whether name[at] is a joiner that its script needs: after a virama, or between cursive letters."""
    if name[at] == JOINERS[1] and at and name[at - 1] in VIRAMAS:
        return True
    if name[at] not in JOINERS or not 0 < at < len(name) - 1:
        return False
    before, after = script_of(name[at - 1]), script_of(name[at + 1])
    is_cursive = name[at] == JOINERS[0] and before == after and before in CURSIVE
    return is_cursive or unicodedata.combining(name[at - 1]) == VIRAMA


def has_stacked_marks(name: str) -> bool:
    """Return whether a letter has more marks than any script uses: three accents, five marks, or the same mark twice."""
    for are_marks, run in itertools.groupby(unicodedata.normalize("NFD", name), lambda c: unicodedata.category(c)[0] == "M"):
        marks = "".join(run) if are_marks else ""
        accents = sum(unicodedata.combining(mark) > 0 for mark in marks)
        if accents > 2 or len(marks) > 4 or any(one == next_one for one, next_one in itertools.pairwise(marks)):
            return True
    return False


def is_username(name: str) -> bool:
    """Return whether this is a username: letters and marks of one script, or of scripts that may be mixed, digits of one
    numeral system, `_`, `.` and `-`."""
    plain = unicodedata.normalize("NFKC", name)
    scripts = {script_of(char) for char in plain} - {""}
    zeros = {ord(char) - unicodedata.decimal(char) for char in plain if char.isdecimal()}
    has_length = all(2 <= len(text) <= 32 for text in (name, name_key(name)))
    if not has_length or unicodedata.category(plain[0])[0] == "M" or len(zeros) > 1:
        return False
    allowed = all(is_username_char(text[at]) or is_joiner(text, at) for text in (name, plain) for at in range(len(text)))
    return allowed and not has_stacked_marks(plain) and (len(scripts) <= 1 or any(scripts <= group for group in MIXED_SCRIPTS))


# Mentions: an `@handle` in code, in a URL or in an email address is not a mention. The page follows the same rules (its section
# Text); the tests check both with the same tables of cases. No pattern here backtracks.
MAX_MENTIONS = 50  # per message
EVERYONE = "everyone"  # the handle by which staff mention all members; no new account can have it
# Scripts written without spaces (Thai, Lao, Burmese, Khmer, Han, Kana): a handle may begin and end anywhere. Hangul appends
# particles to names: a handle may end anywhere.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f\u2e80-\u312f\u3190-\u9fff"
UNSPACED += "\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
HANGUL = "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc"
UNSPACED_CHAR, HANGUL_CHAR = re.compile(f"[{UNSPACED}]"), re.compile(f"[{HANGUL}]")
UNSPACED_BOUNDARY = re.compile(f"(?=[{UNSPACED}])|(?<=[{UNSPACED}])")
NOT_IN_URL = (
    r"\x00-\x20\x7f-\xa0\"<>\\`\xab\xbb\u0589\u060c\u061b\u061f\u06d4\u0964\u0965\u104a\u104b\u1362-\u1368\u1680\u17d4\u17d5"
    r"\u2000-\u200f\u2014\u2018-\u201f\u2026-\u202f\u2039\u203a\u205f-\u206f\u3000-\u3003\u3008-\u301f\ufe10-\ufe1f\ufe30-\ufe6f"
    r"\ufeff\uff01\uff08\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff3b\uff3d\uff5b-\uff65"
)
URL_PART = re.compile(rf"[()[\]{{}}]|[^{NOT_IN_URL}()[\]{{}}]+")
URL_BREAK = re.compile(rf"[()[\]{{}}{NOT_IN_URL}]")
AFTER_AT = re.compile(r"[^\s!-,/:-@\[-^`{-~]{2,100}")
LABEL = r"\[(?=(?P<label>[^\[\]\n]{1,300})\]\((?P<scheme>https?://|mailto:))"
MENTION_SYNTAX = re.compile(rf"(?=[\\`@hw\[])(?:\\[\\`@\[]|`+|@|https?://|www\.|{LABEL})", re.IGNORECASE | re.ASCII)
TICKS, ESCAPED_TICKS = re.compile(r"`+"), re.compile(r"\\[\\`]|`+")
QUOTED = re.compile(r" {0,3}>(?:[ \t]|$)")


@functools.lru_cache(8192)
def char_kind(char: str) -> str:
    """Return a character's role in a handle: "free" (a handle may begin and end there), "hangul" (it may end there), "word",
    "joint" (only between other characters) or "" (not part of a handle)."""
    if char in ("", ".", "-", "\u200c", "\u200d"):
        return char and "joint"
    varies_emoji = "\ufe00" <= char <= "\ufe0f" or char == "\u20e3"
    if char != "_" and (unicodedata.category(char)[0] not in "LNM" or varies_emoji):
        return ""
    return "free" if UNSPACED_CHAR.match(char) else "hangul" if HANGUL_CHAR.match(char) else "word"


@functools.lru_cache(256)  # people repeat the same handles: saves 2 of the 6 us that an `@` takes
def handle_keys(text: str) -> tuple[str, ...]:
    """Return every handle that the text after an `@` may begin with, as name keys, shortest first."""
    folded = name_key(text)[:33]
    kinds = [*map(char_kind, folded), ""]
    ends = range(2, min(kinds.index(""), 32) + 1)
    return tuple(folded[:end] for end in ends if kinds[end] != "word" or kinds[end - 1] in ("free", "hangul"))


def closing_ticks(line: str, at: int, length: int, unclosed: set[int]) -> int:
    """Return the end of the run of `length` backticks that closes inline code, or 0. `unclosed` caches lengths without one."""
    for run in TICKS.finditer(line, at) if length not in unclosed else ():
        if len(run[0]) == length:
            return run.end()
    unclosed.add(length)
    return 0


def url_end(text: str, at: int) -> int:
    """Return the end of a URL, which stops before a character not allowed in URLs or a closing bracket it did not open."""
    opened = Counter[str]()
    while part := URL_PART.match(text, at):
        opening = {")": "(", "]": "[", "}": "{"}.get(part[0])
        if opening and not opened[opening]:
            break
        opened[opening or part[0]] += -1 if opening else 1
        at = part.end()
    return at


def link_ends(text: str) -> dict[int, int]:
    """Return for each `(` where a URL after it ends, as `url_end` does, but for all of them in one pass."""
    ends, begun, opened = dict[int, int](), list[int](), {")": list[int](), "]": list[int](), "}": list[int]()}
    for found in URL_BREAK.finditer(text):
        at, char = found.start(), found[0]
        if opening := {"(": ")", "[": "]", "{": "}"}.get(char):
            opened[opening].append(at)
            begun += [at] if char == "(" else []
        else:  # ends the URLs that began after the bracket that it closes, or all of them
            start = opened[char].pop() if opened.get(char) else -1
            while begun and begun[-1] >= start:
                ends[begun.pop()] = at
    return ends | dict.fromkeys(begun, len(text))


def plain_url_end(text: str, start: int, at: int) -> int:
    """Return the end of the URL that begins with text[start:at] (`https://` or `www.`), or 0 if it is not one."""
    before = text[start - 1 : start]
    joined = text[at - 1] == "." and before in ("@", ".", "-", "/")
    if joined or (before != "_" and char_kind(before) in ("word", "hangul")) or not text[at : at + 1].isalnum():
        return 0
    return at + len(text[at : url_end(text, at)].rstrip(".,;:!?'*_~([{"))


def at_signs(text: str) -> Iterator[str]:
    """Yield the text after each `@` that may begin a mention, in a text without code blocks."""
    at, last = 0, text.rfind("@")
    unclosed: set[int] = set()
    ends: dict[int, int] = {}
    while at <= last and (found := MENTION_SYNTAX.search(text, at)):
        start, at = found.span()
        if text[start] == "@":
            before = text[start - 1 : start]
            begins = char_kind(before) not in ("word", "hangul") and before not in (".", "-", "/")
            if begins and (found := AFTER_AT.match(text, at)):
                yield found[0]
        elif text[start] == "`":
            at = closing_ticks(text, at, at - start, unclosed) or at
        elif text[start] not in "\\[":
            at = plain_url_end(text, start, at) or at
        elif text[start] == "[" and re.match(VISIBLE, found["label"]):
            ends = ends or link_ends(text)
            end = ends[found.end("label") + 1]
            if text.startswith(")", end):
                yield from at_signs(found["label"])
                at = end + 1


def fences(line: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each run of three or more backticks that may open a code block: not closed on its line."""
    at, unclosed = 0, set[int]()
    while "```" in line and (found := ESCAPED_TICKS.search(line, at)):
        start, at = found.span()
        if line[start] == "`" and (end := closing_ticks(line, at, at - start, unclosed)):
            at = end
        elif line[start] == "`" and at - start >= 3:
            yield start, at


def fence_end(lines: list[str], number: int, at: int, length: int) -> tuple[int, int] | None:
    """Return the line and position where a code block ends. `length` backticks just before lines[number][at] opened it."""
    for index in range(number, len(lines)):
        for run in TICKS.finditer(lines[index], at if index == number else 0):
            if len(run[0]) >= length:
                return index, run.end()
    return None


def text_lines(lines: list[str], depth: int = 0) -> Iterator[str]:
    """Yield the lines of a message outside its code blocks. A block opened in a quote ends with the quote."""
    number = 0
    while number < len(lines):
        line, quoted = lines[number], []
        while depth < 3 and number < len(lines) and (mark := QUOTED.match(lines[number])):
            quoted.append(lines[number][mark.end() :])
            number += 1
        if quoted:
            yield from text_lines(quoted, depth + 1)
            continue
        number += 1
        for start, at in fences(line):
            end = fence_end(lines, number - 1, at, at - start)
            if end or not line[:start].strip():  # after other text, a block counts only if it is closed
                line, number = line[:start], end[0] if end else len(lines)
                if end:
                    lines[number] = lines[number][end[1] :]
                break
        yield line


def possible_mentions(content: str) -> list[tuple[str, ...]]:
    """Return, for each `@` that may begin a mention, the handles that it may mean (see `handle_keys`), without duplicates."""
    if "@" not in content:
        return []
    lines = text_lines(content.split("\n")) if "`" in content else [content]
    texts = dict.fromkeys(itertools.chain.from_iterable(map(at_signs, lines)))
    return [*map(handle_keys, itertools.islice(texts, MAX_MENTIONS))]


def shorten(name: str, length: int) -> str:
    """Return a name, shortened until it and its key have at most `length` characters."""
    while len(name) > length or len(name_key(name)) > length:
        name = name[:-1]
    return name.rstrip("._-" + JOINERS)


def handle_of(name: str) -> str:
    """Return a username for a display name: as many of its words as fit, joined by dots."""
    plain = unicodedata.normalize("NFKC", re.sub("['\u2019]", "", name))
    words = "".join(f"{unicodedata.decimal(c, c)}" if is_username_char(c) or c in JOINERS else " " for c in plain).split()
    handle = ""
    for word in words:
        longer = shorten(f"{handle}.{word}".strip("._-"), 30)
        if is_username(f"{longer}2") and unicodedata.category(word[0])[0] != "M":
            handle = longer
    return handle or "user"


def numbered(handle: str, number: int) -> str:
    """Return a handle with a number appended, or the handle alone if the number is 1."""
    return shorten(handle, 32 - len(str(number))) + str(number) if number > 1 else handle


def clean_code(code: str) -> str:
    """Return the stored form of an invite or sign-in code: upper case, with a dash. Codes of older versions are unchanged."""
    code = code.strip()
    halves = re.fullmatch(f"([{CODE_LETTERS}]{{5}})[- ]?([{CODE_LETTERS}]{{5}})", code.upper()) if code.isascii() else None
    return f"{halves[1]}-{halves[2]}" if halves else code


def new_code() -> str:
    """Return a random code of 50 bits."""
    return clean_code("".join(secrets.choice(CODE_LETTERS) for _ in range(10)))


# Slack's message format, in which many programs send notifications. It is converted to Markdown. No pattern here backtracks.
SlackText = str | int | float | bool | None
SLACK_SYNTAX = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|<(?P<target>[^<>|\s]+)(?:\|(?P<label>[^<>]*))?>"
    r"|(?<![\w*~])(?P<mark>[*~])(?=\S)(?P<inner>(?:(?!(?P=mark))[^\n])+)(?<=\S)(?P=mark)(?![\w*~])",
    re.DOTALL,
)
NOT_IN_LABEL = str.maketrans("[]\n", "() ")


class SlackField(Struct):
    title: SlackText = None
    value: SlackText = None


class SlackObject(Struct):  # a text, or another element of a block
    type: str = ""
    text: Any = None


class SlackBlock(Struct):
    type: str = ""
    text: SlackObject | str | None = None
    fields: list[SlackObject] | None = None
    elements: list[SlackObject] | None = None


class SlackAttachment(Struct):
    pretext: SlackText = None
    title: SlackText = None
    title_link: SlackText = None
    text: SlackText = None
    fields: list[SlackField] | None = None
    blocks: list[SlackBlock] | None = None
    fallback: SlackText = None  # shown if there is nothing else


def plain_text(text: SlackText) -> str:
    """Return a text of a program without control characters and Slack's escapes."""
    lines = "" if text is None else CONTROL_CHARS.sub("", unify_newlines(str(text)))
    return lines.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()


def bold(text: str) -> str:
    return f"**{text}**" if text else ""


def markdown_link(url: str, label: str) -> str:
    """Return a link in Markdown, or the label and the URL as they are if Markdown cannot link them."""
    label, encoded = label.translate(NOT_IN_LABEL), url.replace("(", "%28").replace(")", "%29")
    if not url or not label or label == url:
        return label or url.removeprefix("mailto:")
    if len(label) <= 300 and re.match(r"(?i:https?://|mailto:)", url) and url_end(encoded, 0) == len(encoded):
        return f"[{label}]({encoded})"
    return f"{label} {url}"


def convert_slack_syntax(found: re.Match[str]) -> str:
    """Return the Markdown of a link, a mention, or a bold or struck text. Code is the same in both."""
    target, label = found["target"] or "", found["label"] or ""
    if found["mark"]:
        return found["mark"] * 2 + SLACK_SYNTAX.sub(convert_slack_syntax, found["inner"]) + found["mark"] * 2
    if target in ("!channel", "!here", "!everyone"):
        return f"@{EVERYONE}"
    if target.startswith(("@", "#", "!")):  # a person, a channel, a group or, after `!date`, a time
        sign, name = "#" if target[0] == "#" else "@", label or target[1:].rpartition("^")[2]
        return name if target.startswith("!date") else sign + name.removeprefix(sign)
    return markdown_link(target, label) if ":" in target else found[0]


def slack_markdown(text: SlackText) -> str:
    """Return the Markdown of a text with Slack's syntax."""
    return plain_text(SLACK_SYNTAX.sub(convert_slack_syntax, "" if text is None else str(text)))


def block_texts(blocks: list[SlackBlock] | None) -> Iterator[str]:
    """Yield the texts of headers, sections and other blocks. Buttons and pictures are left out."""
    for block in blocks or ():
        for one in (block.text, *(block.fields or ()), *(block.elements or ())):
            text = one.text if isinstance(one, SlackObject) else one
            if isinstance(text, str):
                is_slack = isinstance(one, SlackObject) and one.type == "mrkdwn"
                made = slack_markdown(text) if is_slack else plain_text(text)
                yield bold(made) if block.type == "header" else made


def attachment_texts(one: SlackAttachment) -> Iterator[str]:
    yield slack_markdown(one.pretext)
    yield bold(markdown_link(plain_text(one.title_link), plain_text(one.title)) if one.title else "")
    yield slack_markdown(one.text)
    for field in one.fields or ():
        yield ": ".join(filter(None, (bold(plain_text(field.title)), slack_markdown(field.value))))
    yield from block_texts(one.blocks)


def read_slack(text: SlackText, blocks: list[SlackBlock] | None, attachments: list[SlackAttachment] | None) -> str:
    """Return a message in Slack's format as Markdown. Blocks replace the text, as in Slack."""
    parts = ["\n".join(filter(None, block_texts(blocks))) or slack_markdown(text)]
    parts += ["\n".join(filter(None, attachment_texts(one))) or slack_markdown(one.fallback) for one in attachments or ()]
    return "\n".join(filter(None, parts))


# Search ignores accents of Latin, Greek, Cyrillic, Hebrew and Arabic letters, and invisible characters.
ACCENTS = re.compile(
    "[\u00ad\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670"
    "\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u08d3-\u08ff\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]"
)
PLAIN_LETTERS = str.maketrans({"\u0131": "i", "ø": "o", "ł": "l", "đ": "d", "ħ": "h", "æ": "ae", "œ": "oe"})
QUOTES = str.maketrans(dict.fromkeys("“”„‟«»\uff02", '"'))
PHRASE = re.compile(r'"([^"]*)"|[^\s"]+')
MARK_RUN = re.compile(r"[^\w\s\x00-\u02ff]{31,}")  # may have so many marks on a letter that normalizing takes quadratic time
MAX_SEARCH_CHARS = 16_000  # per message; a message has at most 4,000, but expanding ligatures adds more


def limit_marks(run: re.Match[str]) -> str:
    """Return a run of marks and other signs with its first 30 marks. No language needs more on a letter."""
    marks = itertools.count()
    return "".join(char for char in run[0] if unicodedata.category(char)[0] != "M" or next(marks) < 30)


def search_text(text: str) -> str:
    """Return a text as it is indexed: without case and accents, and with each character of `UNSPACED` as a separate word."""
    if text.isascii():
        return text.lower()
    text = text.replace("\uff9e", "\u3099").replace("\uff9f", "\u309a")  # halfwidth letters, which normalizing makes marks
    text = unicodedata.normalize("NFKD", MARK_RUN.sub(limit_marks, text))[:MAX_SEARCH_CHARS]
    letters = ACCENTS.sub("", text).casefold().translate(PLAIN_LETTERS)
    letters = MARK_RUN.sub(limit_marks, letters)  # again, without what was between the marks, such as soft hyphens
    return UNSPACED_BOUNDARY.sub(" ", unicodedata.normalize("NFC", letters))


def search_phrases(q: str) -> str:
    """Return the FTS5 query of a search: a phrase for each quoted phrase, a prefix for each other word. All are quoted, so that
    no input is parsed as FTS5 syntax. A phrase without letters matches nothing if alone, and is otherwise ignored."""
    phrases: dict[str, None] = {}
    for found in PHRASE.finditer(q.translate(QUOTES)):
        text = search_text(found[0] if found[1] is None else found[1]).replace('"', " ").rstrip()
        whole = found[1] is not None or UNSPACED_CHAR.match(text[-1:])
        phrases[f'"{text}"' if whole else f'"{text}" *'] = None
    return " ".join(phrases) or '""'


# ---- File types ----------------------------------------------------------------------------------------------------
# The names and types of files. What a client sends may be malicious: the name is cleaned, and the type is detected from the
# first piece of the content against a short list. Files that a browser could execute (SVG, HTML, scripts) get the type
# text/plain and are sent as downloads. If a file is valid as two types, its first bytes decide.

PIECE_BYTES = 256 * 1024  # pieces of a stored file; the first one contains a JPEG's size, often after 64 KiB of metadata
MAX_PIXELS = 50_000_000  # maximum for a picture; browsers need 4 bytes of memory for each
MAX_FILE_NAME_CHARS, MAX_FILE_NAME_BYTES = 120, 200  # file systems allow 255 bytes
UNSAFE_IN_FILE_NAME = re.compile(f"[{CONTROLS}\u2028\u2029{INVISIBLE_CHARS}\ud800-\udfff]")
RESERVED_ON_WINDOWS = str.maketrans('"<>:|?*', "'______")
MAX_JPEG_SEGMENTS = 500  # segments before the size; a color profile may take 255
JPEG_SEGMENT = re.compile(rb"\xff{1,9}(?:[\xc4\xc8\xcc\xdb-\xfe](..)|[\xc0-\xcf].{3}(.{4}))", re.DOTALL)
AVIF_SIZE = re.compile(rb"\0\0\0\x14ispe\0{4}(.{8})", re.DOTALL)
FILE_TYPES = {  # media type -> a pattern of the first bytes
    "image/png": rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR.{13}",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a.{7}",
    "image/webp": rb"RIFF.{4}WEBPVP8(?: .{7}\x9d\x01\x2a|L.{4}\x2f|X.{10}).{4}",
    "image/bmp": rb"BM.{12}[\x28\x34\x38\x40\x6c\x7c]\0{3}.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0",
    "image/avif": rb"\0{3}.ftypavi[fs]",
    "audio/mpeg": rb"ID3[\x02-\x04].{6}|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xeb]",
    "audio/ogg": rb"OggS\0\x02.{22}(?:OpusHead|\x01vorbis|\x7fFLAC)",
    "audio/wav": rb"RIFF.{4}WAVE",
    "audio/flac": rb"fLaC[\0\x80]\0\0\x22",
    "audio/mp4": rb"\0{3}.ftypM4[AB] ",
    "video/mp4": rb"\0{3}.ftyp(?:iso[m2-9]|mp4[12]|avc1|dash|M4V |MSNV)",
    "video/quicktime": rb"\0{3}.ftypqt  ",
    "video/webm": rb"\x1a\x45\xdf\xa3.{1,40}\x42\x82\x84webm",
    "application/pdf": rb"%PDF-[12]\.\d",
    "application/zip": rb"PK(?:\x03\x04|\x05\x06)",
}
little = functools.partial(int.from_bytes, byteorder="little")
NOT_IN_TEXT = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
UNKNOWN_TYPE = "application/octet-stream"
INLINE_TYPES = frozenset(FILE_TYPES) - {"application/zip"}  # types that browsers may show; all others are downloads


def clean_file_name(name: str) -> str:
    """Return a file name that is safe to show and to save: without folders, invisible characters and characters that Windows
    reserves, shortened before its extension. It is "file" if nothing is left."""
    base = UNSAFE_IN_FILE_NAME.sub("", re.split(r"[/\\]", name)[-1]).translate(RESERVED_ON_WINDOWS)
    base = " ".join(unicodedata.normalize("NFC", base).split()).strip(". ")
    extension = found[0] if (found := re.search(r"\.[^. ]{1,16}$", base)) else ""
    stem = base.removesuffix(extension)[: MAX_FILE_NAME_CHARS - len(extension)]
    stem = stem.encode()[: MAX_FILE_NAME_BYTES - len(extension.encode())].decode(errors="ignore")
    return stem.rstrip(". ") + extension or "file"


def jpeg_size(head: bytes) -> tuple[int, int]:
    """Return the size of a JPEG picture, which follows its metadata, or (0, 0)."""
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = JPEG_SEGMENT.match(head, at)
        if not found or found[2]:
            return (int.from_bytes(found[2][2:]), int.from_bytes(found[2][:2])) if found else (0, 0)
        at = found.start(1) + int.from_bytes(found[1])
    return 0, 0


def gif_size(head: bytes) -> tuple[int, int]:
    """Return the size of a GIF picture, or (0, 0) if no image or extension follows its header and colors."""
    at = 13 + (3 << (head[10] & 7) + 1 if head[10] & 0x80 else 0)
    valid = re.match(rb",|!(?:\xf9\x04|\xff\x0b|\xfe|\x01\x0c)", head[at : at + 3])
    return (little(head[6:8]), little(head[8:10])) if valid else (0, 0)


def webp_size(head: bytes) -> tuple[int, int]:
    """Return the size of a WebP picture: lossy, lossless or extended (with metadata, transparency or animation)."""
    if head[15:16] == b"X":
        return little(head[24:27]) + 1, little(head[27:30]) + 1
    if head[15:16] == b"L":
        return (little(head[21:23]) & 0x3FFF) + 1, (little(head[21:25]) >> 14 & 0x3FFF) + 1
    return little(head[26:28]) & 0x3FFF, little(head[28:30]) & 0x3FFF


PICTURE_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "image/png": lambda head: (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])),
    "image/jpeg": jpeg_size,
    "image/gif": gif_size,
    "image/webp": webp_size,
    "image/bmp": lambda head: (little(head[18:22]), abs(little(head[22:26], signed=True))),
    "image/avif": lambda head: struct.unpack(">II", max(AVIF_SIZE.findall(head), default=bytes(8))),
}


def detect_type(head: bytes) -> tuple[str, tuple[int, int] | None]:
    """Return the media type of a file, given its first piece, and a picture's width and height. The type is UNKNOWN_TYPE for a
    picture that is damaged or too large, and for everything that is neither in FILE_TYPES nor text."""
    for media_type, signature in FILE_TYPES.items():
        if re.match(signature, head, re.DOTALL):
            if media_type not in PICTURE_SIZES:
                return media_type, None
            width, height = PICTURE_SIZES[media_type](head)
            return (media_type, (width, height)) if 0 < width * height <= MAX_PIXELS else (UNKNOWN_TYPE, None)
    with contextlib.suppress(UnicodeDecodeError):
        codecs.utf_8_decode(head)  # the last character may be incomplete
        if head == head.translate(None, NOT_IN_TEXT):
            return "text/plain", None
    return UNKNOWN_TYPE, None


# ---- Payloads ------------------------------------------------------------------------------------------------------
# The types of arguments (unknown fields are rejected) and of results, which msgspec validates, encodes and describes. In a
# result, a field with a default is omitted while it equals that default; a field without one is always present.


def field_error(reason: str, field: str) -> ValueError:
    """Return a validation error for a field, in the same format as msgspec's (see `describe_validation_error`)."""
    return ValueError(f"{reason} - at `$.{field}`")


def clean_name(name: str, field: str = "name") -> str:
    """Return a display name without surrounding spaces. Raises the field error NAME_FORM."""
    if not re.match(NAME, name.strip()) or has_stacked_marks(name):
        raise field_error("NAME_FORM", field)
    return name.strip()


Id = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Username = Annotated[str, Meta(min_length=2, max_length=32)]
Password = Annotated[str, Meta(min_length=8, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=NAME)]
DisplayName = Annotated[str, Meta(min_length=1, max_length=64)]
EMPTY_OR_VISIBLE = f"^(?:$(?!\n)|{VISIBLE})"  # in Python, `$` alone also matches before a last newline
OptionalText = Annotated[str, Meta(max_length=1000, pattern=EMPTY_OR_VISIBLE + TEXT)]
OptionalContent = Annotated[str, Meta(max_length=4000, pattern=EMPTY_OR_VISIBLE + CONTENT)]  # may be empty if there are files
Emoji = Annotated[str, Meta(min_length=1, max_length=32, pattern=f"^{VISIBLE}[^\\s{CONTROLS}{BIDI_CONTROLS}]+$(?!\n)")]
Nonce = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[^\x00]+$")]
Code = Annotated[str, Meta(min_length=1, max_length=64)]
SearchText = Annotated[str, Meta(min_length=1, max_length=200, pattern=f"^\\s*[^\\s{CONTROLS}]{TEXT}")]
PeerId = Annotated[str, Meta(min_length=1, max_length=64)]
Pixels = Annotated[int, Meta(ge=1, le=100_000)]
Role = Literal["owner", "admin", "member"]
Source = Literal["person", "host", "bot"]  # who made an account
Status = Literal["online", "away", "busy", "invisible"]
ChannelKind = Literal["text", "voice"]
Posting = Literal["everyone", "staff"]
Moment = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]


class Args(Struct, forbid_unknown_fields=True):
    """The arguments of an operation: one flat object, whether they came by REST, Socket.IO or a Python call."""


class NoArgs(Args): ...


class ActingUser(Args):
    as_user: Id | None = None


class Credentials(Args):
    username: Username
    password: Annotated[str, Meta(min_length=1, max_length=256)]


class NewIdentity(Args):
    username: Username | None = None  # default: derived from the display name
    name: DisplayName | None = None
    code: Code | None = None

    def __post_init__(self) -> None:
        if self.code is not None:
            self.code = clean_code(self.code)
        if self.name is not None:
            self.name = clean_name(self.name)
        if self.username is None and self.name is None:
            raise field_error("FIELD_MISSING", "username")
        if self.username is not None and not is_username(self.username):
            raise field_error("USERNAME_FORM", "username")


class NewUser(NewIdentity, kw_only=True):
    password: Password


class NewGuest(NewIdentity, kw_only=True):
    code: Code


class HostUser(Args):
    """A user of the embedding program. Without an `external_id`, the username identifies it."""

    username: Annotated[str, Meta(min_length=1, max_length=256, pattern=NAME)]  # if it is not valid, one is derived
    name: DisplayName | None = None  # None: unchanged
    external_id: Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00]+$")] | int | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            self.name = clean_name(self.name)
        if self.external_id is None and not (is_username(self.username) and name_key(self.username) != EVERYONE):
            self.external_id = f"username:{name_key(self.username)}"  # the account gets another username, and is found by this
        if self.external_id is not None:
            self.external_id = str(self.external_id)


class UserArgs(Args):
    user_id: Id


class NewToken(UserArgs):
    ttl: Annotated[int, Meta(ge=1, le=10**9)] | None = None


class DeleteUser(UserArgs):
    messages: bool = False


class NewPassword(Args):
    new_password: Password
    old_password: Annotated[str, Meta(max_length=256)] | None = None


class TokenArgs(Args):
    token: str | None = None  # optional and of any length: a missing token is rejected like an invalid one (UNAUTHORIZED)


class StatusArgs(Args):
    status: Status


class EditProfile(Args):
    status: Status | UnsetType = UNSET
    name: DisplayName | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if isinstance(self.name, str):
            self.name = clean_name(self.name)


class NameArgs(Args):
    name: Name


class ServerArgs(Args):
    server_id: Id


class RenameServer(ServerArgs):
    name: Name


class JoinServer(ServerArgs):
    after: Seq | None = None


class ChangesArgs(ServerArgs):
    after: Seq = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 500


class NewConversation(Args):
    user_ids: Annotated[list[Id], Meta(max_length=100)]  # your own id and duplicates are ignored
    name: Name | None = None


class MemberArgs(ServerArgs):
    user_id: Id


class BanArgs(MemberArgs):
    revoke_invite: bool = False  # the invite that the member used
    delete_messages: bool = False


class BansArgs(ServerArgs):
    after: Seq = 0  # a user id: the last one of the previous page
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000


class LogArgs(ServerArgs):
    before: Id | None = None  # an entry id: the last one of the previous page
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


class RoleArgs(MemberArgs):
    role: Role


class MuteArgs(MemberArgs):
    seconds: Annotated[int, Meta(ge=1, le=31_536_000)] | None = None  # default: until the mute is lifted


class HandArgs(ServerArgs):
    user_id: Id | None = None  # default: your own hand


class NewBot(ServerArgs):
    username: Username
    name: DisplayName | None = None

    def __post_init__(self) -> None:
        self.name = NewIdentity(self.username, self.name).name


class NewHook(ServerArgs):
    channel_id: Id
    name: DisplayName

    def __post_init__(self) -> None:
        self.name = clean_name(self.name)


class HookArgs(ServerArgs):
    hook_id: Id


class NewInvite(ServerArgs):
    max_uses: Annotated[int, Meta(ge=1, le=10**6)] | None = None
    expires_in: Annotated[int, Meta(ge=1, le=10**9)] | None = None


class CodeArgs(Args):
    code: Code

    def __post_init__(self) -> None:
        self.code = clean_code(self.code)


class NewChannel(RenameServer):
    kind: ChannelKind = "text"
    topic: OptionalText = ""


class ChannelArgs(Args):
    channel_id: Id


class EditChannel(ChannelArgs):
    name: Name | None = None
    topic: OptionalText | None = None
    posting: Posting | None = None
    slow_seconds: Annotated[int, Meta(ge=0, le=21_600)] | None = None
    keep_days: Annotated[int, Meta(ge=1, le=36_500)] | UnsetType | None = UNSET  # None: no limit of its own


class NewFile(ChannelArgs):
    name: Annotated[str, Meta(max_length=1000)] = ""
    width: Pixels | None = None  # of a video; those of a picture are read from its content
    height: Pixels | None = None
    alt: OptionalText = ""


class FileArgs(Args):
    file_id: Id


class ReadFile(FileArgs):
    link: Annotated[str, Meta(max_length=4096)] | None = None  # signed, in place of a token


class NewMessage(ChannelArgs):
    content: OptionalContent = ""
    reply_to: Id | None = None
    nonce: Nonce | None = None
    files: Annotated[list[Id], Meta(max_length=10)] = []

    def __post_init__(self) -> None:
        self.content = unify_newlines(self.content)
        if not self.content and not self.files:
            raise field_error("FIELD_EMPTY", "content")


class HookPost(Args, forbid_unknown_fields=False):
    """A post by a hook: `content`, or a message in Slack's format, of which the other fields are ignored."""

    secret: Code
    content: str = ""
    username: Annotated[str, Meta(max_length=64)] | None = None  # shown as the author of this message
    text: str | None = None
    attachments: Annotated[list[SlackAttachment], Meta(max_length=50)] | None = None
    blocks: Annotated[list[SlackBlock], Meta(max_length=50)] | None = None
    nonce: Nonce | None = None  # by REST, the header Idempotency-Key

    def __post_init__(self) -> None:
        self.username = clean_name(self.username, "username") if self.username else None


class PageArgs(ChannelArgs):
    before: Id | None = None
    after: Seq | None = None
    around: Id | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 50

    def __post_init__(self) -> None:
        if sum(cursor is not None for cursor in (self.before, self.after, self.around)) > 1:
            raise ValueError("ONE_CURSOR")


class PinsArgs(ChannelArgs):
    before: Id | None = None  # a pinned message: the last one of the previous page


class TranscriptArgs(ChannelArgs):
    names: Literal["real", "hidden"] = "real"


class MessageArgs(Args):
    message_id: Id


class EditMessage(MessageArgs):
    content: OptionalContent

    def __post_init__(self) -> None:
        self.content = unify_newlines(self.content)


class ReactionArgs(MessageArgs):
    emoji: Emoji


class MarkReadArgs(ChannelArgs):
    message_id: Annotated[int, Meta(ge=0, le=2**63 - 1)]  # the newest message that is read
    back: bool = False


class SearchArgs(ServerArgs):
    q: SearchText
    channel_id: Id | None = None
    author_id: Id | None = None
    before: Id | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


class SignalArgs(ChannelArgs):
    to: PeerId
    data: Any


class Payload(Struct, omit_defaults=True):
    """A result or an event: one flat object."""


class Named(Payload, kw_only=True):
    name: str | None = None  # the display name, if it differs from the username


class Identity(Named):
    user_id: int
    username: str


class ServerUser(Named):
    server_id: int
    user_id: int
    username: str


class ChannelUser(Named):
    channel_id: int
    user_id: int
    username: str


class AuthResponse(Identity):
    token: str
    expires_at: str


class Profile(Identity):
    status: Status
    created_at: str
    guest: bool = False
    bot: bool = False


class Channel(Payload):
    server_id: int
    channel_id: int
    name: str
    kind: ChannelKind
    topic: str
    posting: Posting = "everyone"  # staff: only admins and the owner may write
    slow_seconds: int = 0  # between two posts of a member
    keep_days: int | None = None

    def __post_init__(self) -> None:  # msgspec omits a default only if it is the same object
        self.posting = "everyone" if self.posting == "everyone" else "staff"
        self.kind = "text" if self.kind == "text" else "voice"


class Account(Identity):
    guest: bool = False
    bot: bool = False


class Server(Payload):
    server_id: int
    name: str  # of a conversation without a name: the names of the other participants
    owner_id: int | None  # None: a conversation, which has no owner
    created_at: str
    role: Role
    channels: list[Channel]
    kind: Literal["direct"] | UnsetType = UNSET  # a private conversation
    participants: list[Account] = []  # of a conversation
    pair: bool = False  # a conversation of two, to which nobody can be added


class Servers(Payload):
    servers: list[Server]


class Channels(Payload):
    channels: list[Channel]


class Member(ServerUser):
    role: Role
    status: Status
    joined_at: str
    connected: bool
    guest: bool = False
    invited_by: str | None = None  # the code of the invite; only admins see it
    muted_until: str | None = None
    bot: bool = False


class Members(Payload):
    members: list[Member]
    former: list[Identity] = []  # former members, whose messages and reactions are still shown


class Ban(ServerUser):
    banned_by: int
    banned_at: str


class Bans(Payload):
    bans: list[Ban]
    has_more: bool = False


class LogEntry(Named):
    entry_id: int
    at: str
    user_id: int
    username: str
    action: str
    target_id: int | None = None  # the member that the action was about, or the author of the message
    target_username: str | None = None
    target_name: str | None = None
    detail: str | None = None


class ModerationLog(Payload):
    entries: list[LogEntry]
    has_more: bool


class Hook(Payload):
    hook_id: int
    channel_id: int
    name: str
    user_id: int  # its bot
    created_at: str
    url: str | UnsetType = UNSET  # its address with the secret, only in the response to `create_hook`


class Hooks(Payload):
    hooks: list[Hook]


class Link(Payload):
    code: str
    expires_at: str


class Removed(Payload):
    removed: int


class Invite(Payload):
    code: str
    server_id: int
    max_uses: int | None
    uses: int
    expires_at: str | None


class Invites(Payload):
    invites: list[Invite]


class InvitePreview(Payload):
    code: str
    server_id: int
    server_name: str
    member_count: int


class File(Payload):
    file_id: int
    name: str
    type: str
    size: int
    width: int | None = None  # of a picture or video
    height: int | None = None
    alt: str | None = None


class FileLink(Payload):
    url: str  # a path on the host of the request
    expires_at: str


class Reaction(Payload):
    emoji: str
    user_ids: list[int]


class Message(Payload):
    channel_id: int
    message_id: int
    content: str
    author_id: int
    author_username: str
    created_at: str
    seq: int
    edited_at: str | None = None
    reply_to: int | None = None
    nonce: str | None = None
    reactions: list[Reaction] = []
    mentions: list[int] = []
    author_name: str | None = None
    files: list[File] = []
    everyone: bool = False  # whether it mentions all members
    pinned: bool = False
    bot: bool = False  # whether its author is a bot


class HookMessage(Message, kw_only=True):
    ok: bool  # always true: programs that post to Slack look for it


class Messages(Payload):
    messages: list[Message]
    has_more: bool


class Deletion(Payload):
    channel_id: int
    message_id: int
    seq: int


class Changes(Payload):
    seq: int
    has_more: bool
    messages: list[Message]
    deleted: list[Deletion]
    channels: list[Channel] | UnsetType = UNSET
    members: list[Member] | UnsetType = UNSET
    name: str | UnsetType = UNSET
    reset: bool = False  # true: the client discards its copy, which may have changes that a restored database lacks
    former: list[Identity] = []


class ReadState(Payload):
    channel_id: int
    last_read_id: int
    unread: int
    mentions: int


class ReadStates(Payload):
    reads: list[ReadState]


class VoicePeer(ChannelUser):
    peer_id: str


class RaisedHand(Identity):
    at: str


class JoinServerResult(Payload):
    connected_users: list[int]
    seq: int
    changes: Changes | UnsetType = UNSET
    voice: list[VoicePeer] = []
    hands: list[RaisedHand] = []  # in the order in which they were raised


class Participant(Identity):
    peer_id: str


class IceServer(Payload):
    urls: str
    username: str | UnsetType = UNSET  # of a TURN server
    credential: str | UnsetType = UNSET


class VoiceJoinResult(Payload):
    peer_id: str
    participants: list[Participant]
    ice_servers: list[IceServer]


class Health(Payload):
    status: Literal["ok"]
    version: str
    redis: Literal["up", "down"] | UnsetType = UNSET  # with --redis only


class PublicSettings(Payload):
    registration: str
    guests: bool
    version: str
    create_servers: str
    conversations: str
    file_max: int  # bytes; 0: files are off
    public_url: str | UnsetType = UNSET  # the setting, if it is set
    lan_url: str | UnsetType = UNSET  # the address on the local network, if the server listens there


T = TypeVar("T")
VALIDATION_PATH = re.compile(r" - at `\$(?:\.(\w+))?[^`]*`$")
MAX_QUOTED = 64  # characters of a wrong name or value that an error repeats
VALIDATION_REASONS = {  # msgspec's error -> our reason; `what` is the field, `n` the limit, the value or the rest of the text
    r"Expected `str` of length >= 1": "FIELD_EMPTY",
    r"Expected `str` of length >= (?P<n>\d+)": "FIELD_SHORT",
    r"Expected `str` of length <= (?P<n>\d+)": "FIELD_LONG",
    r"Expected `str` matching regex .*": "FIELD_FORM",
    r"Expected `array` of length <= (?P<n>\d+)": "FIELD_MANY",
    r"Expected `int` >= (?P<n>\d+)": "FIELD_SMALL",
    r"Expected `int` <= (?P<n>\d+)": "FIELD_BIG",
    r"Invalid enum value (?P<n>.*)": "FIELD_CHOICE",
    r"(?P<n>Expected .*)": "FIELD_TYPE",
    r"Number out of range": "FIELD_RANGE",
    r"Object missing required field `(?P<what>\w+)`": "FIELD_MISSING",
    r"Object contains unknown field `(?P<what>.*)`": "FIELD_UNKNOWN",
}


def describe_validation_error(text: str) -> ChatError:
    """Return the error for the text of a msgspec validation error or of a `field_error`."""
    path, detail = VALIDATION_PATH.search(text), VALIDATION_PATH.sub("", text)
    field = path[1] if path else None
    if detail in REASONS:
        return chat_error(detail, field=field, what=field)
    for pattern, reason in VALIDATION_REASONS.items():
        if found := re.fullmatch(pattern, detail, re.DOTALL):
            groups = found.groupdict("")
            what, n = groups.get("what", field), groups.get("n", "").replace("`", "'")
            what = what if what is None else what[:MAX_QUOTED]
            return chat_error(reason, field=what, what="The request" if what is None else what, n=n[:MAX_QUOTED])
    return ChatError("BAD_REQUEST", detail.replace("`", "'"), field=field)


def read_args(kind: type[T], raw: Any) -> T:
    """Convert a JSON value to arguments of type `kind`. Raises BAD_REQUEST or TOO_LARGE."""
    try:
        args = msgspec.convert(raw, kind)
        msgspec.json.encode(raw)  # raises for an unpaired surrogate, which neither the database nor a client can store
    except msgspec.ValidationError as error:
        raise describe_validation_error(str(error)) from None
    except UnicodeEncodeError:
        raise chat_error("NOT_TEXT") from None
    except (RecursionError, TypeError, ValueError):
        raise ChatError("BAD_REQUEST") from None
    return args


# ---- Events --------------------------------------------------------------------------------------------------------
# The events that the server emits, each with its payload and the room that receives it, and the effects of operations, which
# Hub applies after the transaction is committed.

Instance = Annotated[str, Meta(pattern=r"^[A-Za-z0-9-]{0,64}\Z")]  # a run of a process: its name and a random suffix
HELLO_ENTRIES = 200  # maximum length of each list in a Hello
PACKET_MESSAGES = 100  # maximum number of messages in a BusPacket


class MentionNotice(Message, kw_only=True):
    server_id: int


class ReactionChanged(ChannelUser):
    message_id: int
    emoji: str
    seq: int


class StatusChanged(Identity):
    status: Status


class MemberChanged(ServerUser):
    seq: int
    guest: bool = False
    muted_until: str | None = None
    bot: bool = False


class MemberUpdated(MemberChanged, kw_only=True):
    role: Role


class ChannelChanged(Channel, kw_only=True):
    seq: int
    kind: ChannelKind = "text"
    topic: str = ""


class ChannelDeleted(Payload):
    server_id: int
    channel_id: int
    seq: int


class ServerRenamed(Payload):
    server_id: int
    name: str
    seq: int


class ServerDeleted(Payload):
    server_id: int


class HandRaised(ServerUser):
    at: str


class VoiceSignal(Payload):
    channel_id: int
    from_: str = msgspec.field(name="from")
    user_id: int
    data: Any


class ErrorNotice(Payload):
    event: str
    error: str
    code: str
    reason: str | None = None
    field: str | None = None


class EventKind(NamedTuple):
    payload: type[Payload]
    room: Literal["server", "channel", "user", "socket"]
    description: str


EVENTS = {
    "message:new": EventKind(Message, "server", "A message was posted."),
    "message:edit": EventKind(Message, "server", "A message was edited, pinned or unpinned."),
    "message:deleted": EventKind(Deletion, "server", "A message was deleted."),
    "reaction:add": EventKind(ReactionChanged, "server", "Somebody reacted to a message."),
    "reaction:remove": EventKind(ReactionChanged, "server", "Somebody removed a reaction."),
    "mention": EventKind(MentionNotice, "user", "A message mentions you."),
    "channel:read": EventKind(ReadState, "user", "Your read mark in a channel changed, on any of your devices."),
    "user:typing": EventKind(ChannelUser, "channel", "Somebody is typing."),
    "typing_stop": EventKind(ChannelUser, "channel", "Somebody stopped typing."),
    "user:connected": EventKind(ServerUser, "server", "A user's first socket joined the server."),
    "user:disconnected": EventKind(ServerUser, "server", "A user's last socket left the server."),
    "user:status": EventKind(StatusChanged, "server", "A user's status changed."),
    "member:joined": EventKind(MemberChanged, "server", "Somebody became a member."),
    "member:left": EventKind(MemberChanged, "server", "Somebody left, was removed or banned."),
    "member:updated": EventKind(MemberUpdated, "server", "A member's role, name or mute changed, or a guest set a password."),
    "channel:created": EventKind(ChannelChanged, "server", "A channel was created."),
    "channel:updated": EventKind(ChannelChanged, "server", "A channel's name, topic or rules changed."),
    "channel:deleted": EventKind(ChannelDeleted, "server", "A channel was deleted."),
    "server:updated": EventKind(ServerRenamed, "server", "The server was renamed."),
    "server:deleted": EventKind(ServerDeleted, "server", "The server was deleted."),
    "server:joined": EventKind(Server, "user", "Somebody started a conversation with you, or made you a member."),
    "voice:join": EventKind(VoicePeer, "server", "Somebody joined a voice channel."),
    "voice:leave": EventKind(VoicePeer, "server", "Somebody left a voice channel."),
    "hand:raised": EventKind(HandRaised, "server", "Somebody raised a hand."),
    "hand:lowered": EventKind(ServerUser, "server", "A raised hand was lowered."),
    "voice:signal": EventKind(VoiceSignal, "socket", "A peer's WebRTC signal."),
    "error": EventKind(ErrorNotice, "socket", "An event sent without an ack failed."),
}
BUS_EVENTS = {"user:typing", "typing_stop", "voice:join", "voice:leave"}  # reach other processes by Redis, not the commit log


class Emit(NamedTuple):
    event: str
    to: int  # the id of the server, channel or user whose room receives it
    payload: Payload | msgspec.Raw  # Raw: JSON, from the commit log
    server_id: int = 0  # if it is in neither `to` nor the payload


class AddChannelRoom(NamedTuple):  # the server's sockets enter the room of a new channel
    server_id: int
    channel_id: int


class RemoveRoom(NamedTuple):  # all sockets leave the rooms of a deleted channel or, without `channel_id`, of a deleted server
    server_id: int
    channel_id: int | None = None


class Evict(NamedTuple):  # the user's sockets leave the server's rooms, and stay open for the user's other servers
    server_id: int
    user_id: int


class Revoke(NamedTuple):  # sockets are closed: those of the user, or only those of the token with this digest
    user_id: int
    digest: bytes | None = None


class SetStatus(NamedTuple):
    user: Identity
    status: Status
    server_ids: list[int]


class Rename(NamedTuple):  # the user's sockets and cached tokens get the new display name
    user_id: int
    name: str | None


class RecordPost(NamedTuple):  # the author of a post stops typing, and gets `channel:read` soon, once for several posts
    server_id: int
    user_id: int
    channel_id: int
    message_id: int
    foreign: bool = False  # whether another process committed the post


class EmitReadMark(NamedTuple):  # emit the channel's read mark now, if `RecordPost` delayed one
    channel_id: int


class StopForbiddenActivity(NamedTuple):  # end the typing and talking that a mute, a role or a rule has just forbidden
    server_id: int
    user_id: int | None = None  # None: everybody in the channel
    channel_id: int | None = None  # None: in all channels of the server


class SetHand(NamedTuple):
    server_id: int
    user_id: int
    raised: HandRaised | None  # None: it is lowered


class EmitCustom(NamedTuple):  # an event of the embedding program, for the sockets of all processes
    packet: str
    attachments: list[bytes]
    namespace: str
    room: Any
    skipped: list[str | None]


class LogLine(NamedTuple):  # a line about a command or an act of the program, for the log of each server process
    text: str


Effect = (
    Emit | AddChannelRoom | RemoveRoom | Evict | Revoke | SetStatus | Rename | RecordPost | EmitReadMark
    | StopForbiddenActivity | SetHand | EmitCustom | LogLine
)  # fmt: skip
EFFECTS: dict[str, Any] = {kind.__name__: kind for kind in typing.get_args(Effect)}


def encode_effects(effects: Sequence[Effect]) -> bytes:
    """Encode effects for a row of the commit log: a JSON list of [name, fields]."""
    return msgspec.json.encode([(type(effect).__name__, effect) for effect in effects])


def decode_effects(data: bytes) -> list[Effect]:
    """Return the effects of a row of the commit log. Payloads remain JSON, because they are only passed on."""
    effects: list[Effect] = []
    for name, content in msgspec.json.decode(data, type=list[tuple[str, msgspec.Raw]]):
        if name == "Emit":
            effects.append(Emit(*msgspec.json.decode(content, type=tuple[str, int, msgspec.Raw, int])))
        else:
            effects.append(msgspec.json.decode(content, type=EFFECTS[name]))
    return effects


# Messages between processes that share a database. See the section Bus.
class BusMessage(Struct, array_like=True, tag=True): ...


class Notice(BusMessage):
    # wake: the commit log has new rows; beat: the sender is alive; bye: it stops; want: it needs a Hello
    what: Literal["wake", "beat", "bye", "want"]
    instance: Instance = ""  # from this process or, if empty, from all


class Change(BusMessage):  # an event of one of the sender's own users
    event: Annotated[str, Meta(max_length=20)]  # user:connected, user:disconnected or one of BUS_EVENTS
    target_id: Id  # the server for the first two, else the channel
    user_id: Id
    peer_id: PeerId = "-"


class Signal(BusMessage):  # a WebRTC signal to a peer of another process
    from_: PeerId
    to: PeerId
    data: Annotated[str, Meta(max_length=100_000)]  # JSON


class Counted(BusMessage):  # an event that a limit counts on all processes
    limit: Annotated[str, Meta(max_length=20)]
    key: Annotated[list[Annotated[str, Meta(max_length=1000)]], Meta(min_length=1, max_length=2)]


class Hello(BusMessage):  # the list of the sender's users and voice peers, and of all raised hands, in parts
    part: Literal["first", "next", "last"] = "next"
    users: Annotated[list[tuple[Id, Id]], Meta(max_length=HELLO_ENTRIES)] = []
    peers: Annotated[list[tuple[Id, Id, PeerId]], Meta(max_length=HELLO_ENTRIES)] = []
    hands: Annotated[list[tuple[Id, Id, Moment]], Meta(max_length=HELLO_ENTRIES)] = []


class BusPacket(Struct, array_like=True):
    sender: Instance
    number: Annotated[int, Meta(ge=0, le=2**63 - 1)]  # the number of its last message
    messages: Annotated[list[Notice | Change | Signal | Counted | Hello], Meta(max_length=PACKET_MESSAGES)]


class Result(Struct, Generic[T]):
    """The result of an operation: its value, its effects, and whether it replays an earlier call instead of doing it again."""

    value: T
    effects: Sequence[Effect] = ()
    replayed: bool = False


# ---- Files ---------------------------------------------------------------------------------------------------------
# The database file and the files next to it. All checks come before the first change: a file that is damaged, newer or another
# program's is left unchanged, and a StartError says so in one line.

APPLICATION_ID = int.from_bytes(b"CRTC", "big")
# MIGRATIONS[n - 1] converts format n to n + 1; schema.sql has the newest format. The first one resets the search index.
MIGRATIONS = (
    """
    ALTER TABLE users ADD COLUMN name TEXT;
    ALTER TABLE members ADD COLUMN invited_by TEXT;
    ALTER TABLE members ADD COLUMN read_from INTEGER NOT NULL DEFAULT 0;
    CREATE TABLE former_members (
        server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE, user_id INTEGER NOT NULL REFERENCES users,
        invited_by TEXT, PRIMARY KEY (server_id, user_id)) STRICT, WITHOUT ROWID;
    INSERT INTO former_members (server_id, user_id)
        SELECT DISTINCT m.server_id, m.author_id FROM messages m JOIN servers USING (server_id)
        UNION SELECT server_id, user_id FROM bans EXCEPT SELECT server_id, user_id FROM members;
    CREATE TABLE links (
        digest BLOB PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users, expires_at REAL NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE known_addresses (
        user_id INTEGER NOT NULL REFERENCES users, digest BLOB NOT NULL, seen_at REAL NOT NULL,
        PRIMARY KEY (user_id, digest)) STRICT, WITHOUT ROWID;
    CREATE TABLE purges (
        purge_id INTEGER PRIMARY KEY, server_id INTEGER REFERENCES servers ON DELETE CASCADE,
        author_id INTEGER NOT NULL REFERENCES users, last_id INTEGER NOT NULL) STRICT;
    CREATE TABLE gaps (
        server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE, after_seq INTEGER NOT NULL,
        until_seq INTEGER NOT NULL, PRIMARY KEY (server_id, after_seq)) STRICT, WITHOUT ROWID;
    DROP TABLE messages_fts;
    CREATE VIRTUAL TABLE messages_fts USING fts5 (
        content, server_id, content = '', tokenize = "unicode61 remove_diacritics 2 categories 'L* M* N* Co'"
    );
    ALTER TABLE search ADD COLUMN stale INTEGER NOT NULL DEFAULT 0;
    UPDATE search SET indexed_id = 0;
    """,
    """
    CREATE TABLE log (
        id INTEGER PRIMARY KEY AUTOINCREMENT, written_at REAL NOT NULL, bytes INTEGER NOT NULL,
        effects BLOB NOT NULL) STRICT;
    CREATE TABLE secret_check (digest BLOB NOT NULL) STRICT;
    """,
    """
    ALTER TABLE users ADD COLUMN source TEXT NOT NULL DEFAULT 'person' CHECK (source IN ('person', 'host', 'bot'));
    ALTER TABLE users ADD COLUMN external_id TEXT;
    ALTER TABLE users ADD COLUMN guest INTEGER AS (password IS NULL AND source = 'person' AND deleted = 0);
    CREATE UNIQUE INDEX users_external ON users (external_id) WHERE external_id IS NOT NULL;
    ALTER TABLE servers ADD COLUMN kind TEXT NOT NULL DEFAULT 'server' CHECK (kind IN ('server', 'direct'));
    ALTER TABLE servers ADD COLUMN pair TEXT;
    ALTER TABLE servers ADD COLUMN started_by INTEGER REFERENCES users;
    CREATE UNIQUE INDEX one_conversation ON servers (pair) WHERE pair IS NOT NULL;
    CREATE INDEX servers_by_starter ON servers (started_by) WHERE started_by IS NOT NULL;
    CREATE TABLE files (
        file_id INTEGER PRIMARY KEY AUTOINCREMENT, channel_id INTEGER REFERENCES channels ON DELETE SET NULL,
        uploader_id INTEGER NOT NULL REFERENCES users, uploaded_at REAL NOT NULL, name TEXT NOT NULL, type TEXT NOT NULL,
        size INTEGER NOT NULL, width INTEGER, height INTEGER, alt TEXT, digest BLOB,
        message_id INTEGER REFERENCES messages ON DELETE SET NULL, place INTEGER NOT NULL DEFAULT 0) STRICT;
    CREATE INDEX files_by_message ON files (message_id) WHERE message_id IS NOT NULL;
    CREATE INDEX files_unattached ON files (uploader_id) WHERE message_id IS NULL;
    CREATE INDEX files_by_channel ON files (channel_id);
    CREATE TABLE pieces (
        file_id INTEGER NOT NULL REFERENCES files, number INTEGER NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (file_id, number)) STRICT;
    CREATE TABLE stored (bytes INTEGER NOT NULL) STRICT;
    INSERT INTO stored (bytes) VALUES (0);
    ALTER TABLE channels ADD COLUMN posting TEXT NOT NULL DEFAULT 'everyone' CHECK (posting IN ('everyone', 'staff'));
    ALTER TABLE channels ADD COLUMN slow_seconds INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE channels ADD COLUMN keep_days INTEGER;
    ALTER TABLE members ADD COLUMN muted_until TEXT;
    ALTER TABLE former_members ADD COLUMN muted_until TEXT;
    ALTER TABLE reads ADD COLUMN posted_at REAL;
    ALTER TABLE messages ADD COLUMN everyone INTEGER NOT NULL DEFAULT 0 CHECK (everyone IN (0, 1));
    CREATE INDEX messages_everyone ON messages (channel_id, message_id, author_id) WHERE everyone = 1;
    ALTER TABLE messages ADD COLUMN author_name TEXT;
    CREATE TABLE hooks (
        hook_id INTEGER PRIMARY KEY AUTOINCREMENT, server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
        channel_id INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE, name TEXT NOT NULL,
        user_id INTEGER NOT NULL UNIQUE REFERENCES users, secret BLOB NOT NULL UNIQUE, created_at TEXT NOT NULL) STRICT;
    CREATE INDEX hooks_by_server ON hooks (server_id);
    CREATE INDEX hooks_by_channel ON hooks (channel_id);
    ALTER TABLE purges RENAME TO old_purges;
    CREATE TABLE purges (
        purge_id INTEGER PRIMARY KEY, server_id INTEGER REFERENCES servers ON DELETE CASCADE,
        author_id INTEGER REFERENCES users, channel_id INTEGER REFERENCES channels ON DELETE CASCADE,
        last_id INTEGER NOT NULL, CHECK ((author_id IS NULL) <> (channel_id IS NULL))) STRICT;
    INSERT INTO purges (purge_id, server_id, author_id, last_id)
        SELECT purge_id, server_id, author_id, last_id FROM old_purges;
    DROP TABLE old_purges;
    CREATE TABLE moderation (
        entry_id INTEGER PRIMARY KEY AUTOINCREMENT, server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
        at REAL NOT NULL, user_id INTEGER NOT NULL REFERENCES users, action TEXT NOT NULL,
        target_id INTEGER REFERENCES users, detail TEXT) STRICT;
    CREATE INDEX moderation_by_server ON moderation (server_id, entry_id);
    CREATE INDEX moderation_by_time ON moderation (at);
    CREATE TABLE pins (
        pin_id INTEGER PRIMARY KEY AUTOINCREMENT, channel_id INTEGER NOT NULL,
        message_id INTEGER NOT NULL UNIQUE REFERENCES messages ON DELETE CASCADE) STRICT;
    CREATE INDEX pins_by_channel ON pins (channel_id, pin_id);
    INSERT INTO messages_fts (messages_fts, rank) VALUES ('automerge', 8);
    """,
)
SCHEMA_FORMAT = len(MIGRATIONS) + 1
MAX_FULL_CHECK_BYTES = 64 * 1024 * 1024  # largest file whose indexes are compared with its tables at startup (about 1 s)
SQLITE_MAGIC = b"SQLite format 3\0"
BACKUP_MODE = b"\1"  # header[18:19] of a backup; a database that a server has created or opened is in WAL mode (2)
TURN_SECONDS = 10.0  # longest wait for the turn, by a command or by a server that starts or stops
TURN_POLL_SECONDS = 0.0002
READER_CACHE_KIB = 16 * 1024  # cache of a connection that reads
# A commit checkpoints once the -wal has so many pages. With 4,000 (16 MiB), pages that change often are copied less often, but
# a checkpoint takes 50 ms or more. Slow jobs would cause it often, so they checkpoint every 250 pages (1 MiB).
CHECKPOINT_PAGES, SLOW_CHECKPOINT_PAGES = 4000, 250
R = TypeVar("R")
Query = Callable[..., R]  # its first argument is a connection
PRAGMAS = dict(
    journal_mode="wal", synchronous=2, fullfsync=1, foreign_keys=1, trusted_schema=0, cell_size_check=1, secure_delete=1,
    journal_size_limit=64 << 20, wal_autocheckpoint=CHECKPOINT_PAGES,
)  # fmt: skip


def asset(name: str) -> bytes:
    """Return a text file of the program: `name` next to this file or, in an installed wheel, chatrtc.*. Lines end with LF even
    if git on Windows converted them, because the page's Content-Security-Policy has hashes of its scripts."""
    paths = [Path(__file__).resolve().with_name(one) for one in (name, f"chatrtc{Path(name).suffix}")]
    return next(filter(Path.exists, paths)).read_bytes().replace(b"\r\n", b"\n")


@functools.lru_cache(8)  # formatting takes 4 us, and the posts of one second have the same time
def utc_second(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).isoformat()[:19] + "Z"


def utc(moment: float) -> str:
    """Return a time (Unix seconds) in the form of the API, such as 2026-01-31T12:00:00Z."""
    return utc_second(int(moment))


def sibling_path(database: Path, suffix: str) -> Path:
    """Return the path of a database plus a suffix, such as its -wal. Symbolic links are resolved, as SQLite does."""
    return Path(f"{database.resolve()}{suffix}")


def private_path(database: Path, suffix: str) -> Path:
    """Return the path of `.secret` or `.tls.pem`. A file that an older version made next to a symbolic link is still used."""
    path, old = sibling_path(database, suffix), database.with_name(database.name + suffix)
    return old if os.path.lexists(old) and not os.path.lexists(path) else path


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that created and renamed files survive a power failure. Windows cannot open folders."""
    if hasattr(os, "O_DIRECTORY"):
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def connect(path: Path, **options: Any) -> sqlite3.Connection:
    """Open a database file. The path is made absolute, because SQLite takes `file:x` for a URI."""
    db: sqlite3.Connection = sqlite3.connect(path.absolute(), isolation_level=None, **options)
    return db


def connect_reader(path: Path, *, immutable: bool = False, cache_kib: int = READER_CACHE_KIB) -> sqlite3.Connection:
    """Open a read-only connection. With `immutable`, no locks are taken and no -shm is created, so nobody else may write."""
    uri = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if immutable else ''}"
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, cached_statements=256)
    db.execute("PRAGMA query_only = 1")
    db.execute(f"PRAGMA cache_size = -{cache_kib}")
    return db


@contextlib.contextmanager
def as_start_error(path: Path) -> Iterator[None]:
    """Convert errors of opening a database to StartError."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise StartError(f"Cannot open {path}: {getattr(error, 'strerror', error)}") from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the error may quote damaged bytes that are not valid UTF-8
        damage = f"is damaged ({' '.join(str(error).split())}); it was left unchanged"
        raise StartError(f"{path} {damage}. To go back to a backup: `chatrtc restore BACKUP`") from None


def open_private(path: Path, flags: int) -> int:
    """Open a file that only its owner may access. Raises StartError if it is not a regular file, such as a symbolic link."""
    with as_start_error(path):
        try:
            file = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o600)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):
                raise
        else:
            if stat.S_ISREG(os.fstat(file).st_mode):
                return file
            os.close(file)
    raise StartError(f"{path} is not a regular file: move it away")


effective_user: Callable[[], int | None] = getattr(os, "geteuid", lambda: None)  # None on Windows: no owners, no modes


def match_owner(file: int, database: Path) -> None:
    """If run as root, give a file to the owner of the database (or of its folder), so that their server can open it."""
    if effective_user() == 0:
        owner = os.stat(database if database.exists() else database.parent)
        os.fchown(file, owner.st_uid, owner.st_gid)


def part_path(path: Path) -> Path:
    """Return a new name for an incomplete copy of `path`. Another process may write one at the same time."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def write_private(path: Path, data: bytes, database: Path) -> None:
    """Write a file that only its owner can read, atomically, and sync it."""
    part = part_path(path)
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            match_owner(file.fileno(), database)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_private(path: Path, database: Path) -> bytes:
    """Return the content of a secret file. Raises StartError if other users can read it, or if it belongs to one of them."""
    with open(open_private(path, os.O_RDONLY), "rb") as file:
        found, me = os.fstat(file.fileno()), effective_user()
        owners = {me, os.stat(database).st_uid if me == 0 and database.exists() else 0}
        if me is not None and found.st_uid not in owners:
            raise StartError(f"{path} belongs to another user: move it away, and a new one is created")
        if me is not None and found.st_mode & 0o077:
            raise StartError(f"Other users can read {path}: run `chmod 600 {path}`, or move it away and a new one is created")
        return file.read()


def statement(*queries: str) -> Query[int]:
    """Return a query that runs these statements with the same values and returns the number of changed rows."""
    return lambda db, *values: sum(db.execute(query, values).rowcount for query in queries)


def first_value(query: str) -> Query[Any]:
    """Return a query that returns the first column of the first row, or None."""
    return lambda db, *values: (db.execute(query, values).fetchone() or (None,))[0]


read_format: Query[int] = first_value("PRAGMA user_version")  # 0: the database is new
# The highest id or sequence number that a database has assigned.
highest_id: Query[int] = first_value(
    "SELECT coalesce(max(seq), 0) FROM (SELECT seq FROM sqlite_sequence UNION ALL SELECT seq FROM servers)"
)


def require_newest(version: int, path: Path) -> None:
    """Raise StartError if a database has an older format."""
    if version < SCHEMA_FORMAT:
        state = f"has an older format ({version}; this ChatRTC uses {SCHEMA_FORMAT})" if version else "is empty"
        raise StartError(f"{path} {state}: start the server once, or run `chatrtc migrate`")


def check_format(db: sqlite3.Connection, path: Path) -> int:
    """Return the format number of a database. Raises StartError if it belongs to another program or a newer version."""
    version = read_format(db)
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    blank = not version and not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    if not blank and owner != APPLICATION_ID:
        raise StartError(f"{path} is a database of another program; it was left unchanged")
    if version > SCHEMA_FORMAT:
        formats = f"format {version}; this version supports up to {SCHEMA_FORMAT}"
        raise StartError(f"{path} was written by a newer ChatRTC ({formats}): use that version, or restore a backup")
    return version


def read_sqlite_header(path: Path) -> bytes:
    """Return a database file's header, empty if there is no file. Raises StartError if it is not an SQLite database. Call
    this before creating any file next to it."""
    header = b""
    with as_start_error(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path.exists() and not (path.is_file() or path.is_dir()):  # opening a named pipe would wait
            raise StartError(f"{path} is not a regular file")
        with path.open("rb") as file:
            header = file.read(100)
    if header and not header.startswith(SQLITE_MAGIC):
        raise StartError(f"{path} is not an SQLite database; it was left unchanged")
    return header


def check_openable(path: Path) -> int:
    """Check an unused database without changing it, and return its format number. Raises StartError if it cannot be opened.

    SQLite takes any -wal next to a database as part of it: it would mix the two, or discard the -wal.
    """
    header, wal = read_sqlite_header(path), sibling_path(path, "-wal")
    with as_start_error(path):
        unsaved = wal.exists() and wal.stat().st_size > 0
        hint = f"run `chatrtc restore BACKUP`, or move {wal if unsaved else path} away"
        if not header and (unsaved or (path.exists() and private_path(path, ".secret").exists())):
            raise StartError(f"{path} is empty or missing, but the files next to it show that it was in use: {hint}")
        if not header:
            return 0
        if unsaved and header[18:19] == BACKUP_MODE:
            raise StartError(f"{path} is a backup next to the {wal.name} of another database: {hint}")
        with contextlib.closing(connect_reader(path, immutable=not unsaved)) as db:
            version = check_format(db, path)
            full = path.stat().st_size < MAX_FULL_CHECK_BYTES
            outcome = db.execute(f"PRAGMA {'integrity' if full else 'quick'}_check(1)").fetchone()[0]
        if outcome != "ok":
            raise sqlite3.DatabaseError(outcome)
        return version


def migrate(db: sqlite3.Connection) -> None:
    """Convert a database to the newest format, in one transaction."""
    version = read_format(db)
    if version < SCHEMA_FORMAT:
        steps = ";\n".join(MIGRATIONS[version - 1 :]) if version else asset("schema.sql").decode()
        with db:  # rolls back on failure
            db.executescript(f"BEGIN IMMEDIATE;\n{steps};\nPRAGMA user_version = {SCHEMA_FORMAT};\nCOMMIT;")


def open_writer(path: Path) -> sqlite3.Connection:
    """Open the connection that writes, and migrate. Raises StartError if a pragma fails, as WAL does on some network disks."""
    with contextlib.ExitStack() as stack:
        # The timeout in seconds is short: only another program can hold the lock, and waiting may block the event loop.
        db = connect(path, timeout=0.1, check_same_thread=False, cached_statements=256)
        stack.callback(db.close)
        for name, value in PRAGMAS.items():
            db.execute(f"PRAGMA {name} = {value}")
            if db.execute(f"PRAGMA {name}").fetchone()[0] != value:
                raise StartError(f"{path}: SQLite cannot set {name} = {value} here; use a local disk")
        migrate(db)
        stack.pop_all()
    return db


def skip_ids(db: sqlite3.Connection, known: int = 0) -> None:
    """Make a restored database continue above every id and sequence number that was ever assigned, in one transaction.

    Numbers continue at 100,000 times the Unix time: servers make fewer than 100,000 changes a second on average, and JavaScript
    is exact up to 2**53. If the clock was set back, they continue at a million above the highest (`known`: in the old file).
    """
    base = max(int(time.time() * 100_000), max(known, highest_id(db)) + 1_000_000)
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO gaps SELECT server_id, seq, ? FROM servers", (base,))
        db.execute("UPDATE servers SET seq = ?", (base,))
        db.execute("DELETE FROM sqlite_sequence")  # it lacks tables that never had a row
        db.execute("INSERT INTO sqlite_sequence SELECT name, ? FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%'", (base,))


def check_and_open(path: Path, *, may_migrate: bool = True) -> sqlite3.Connection:
    """Check the database file, or create it, and return the connection that writes. Raises StartError."""
    with as_start_error(path):
        copied = read_sqlite_header(path)[18:19] == BACKUP_MODE  # a backup that was copied into place
        if copied and sibling_path(path, "-journal").exists():  # an earlier start failed while converting the backup (below)
            with contextlib.closing(connect(path)) as db:
                read_format(db)  # the first read rolls back
        version = check_openable(path)
        if version and not may_migrate:
            require_newest(version, path)
        if not path.exists():
            write_private(path.resolve(), b"", path)
        if copied:  # the file is marked as a backup until this is done
            with contextlib.closing(connect(path)) as db:
                migrate(db)
                skip_ids(db)
        return open_writer(path)


def join_writers(path: Path) -> sqlite3.Connection:
    """Return a connection that writes to a database which servers have open. Raises StartError if its format is different, or
    if its -shm is missing: with a new one, the commits would overwrite each other."""
    with as_start_error(path):
        if not sibling_path(path, "-shm").exists():
            raise StartError(f"{path} is in use, but {path.name}-shm was deleted: restart the server")
        with contextlib.closing(connect_reader(path)) as db:
            if check_format(db, path) < SCHEMA_FORMAT:
                raise StartError(f"{path} is in use by an older ChatRTC: stop it first")
        return open_writer(path)


class FileLock:
    """A lock file next to a database. Many processes can share its lock, or one can hold it alone. The system releases it when
    a process ends. Without `flock` (on Windows), it locks bytes of the file: one to share the lock, all to hold it alone."""

    SHARES = 64

    def __init__(self, database: Path, suffix: str = ".lock") -> None:
        self.database, self.path = database.resolve(), sibling_path(database, suffix)
        self._file: int | None = None
        self._bytes: tuple[int, int] | None = None  # the start and number of the locked bytes

    def open(self) -> int:
        """Open the lock file, creating it if it is missing. Raises StartError."""
        if self._file is None:
            if self.database.name == ":memory:":
                raise StartError("':memory:' would keep nothing: the database must be a file")
            if not self.path.parent.is_dir():
                raise StartError(f"The directory {self.path.parent} does not exist")
            self._file = open_private(self.path, os.O_RDWR | os.O_CREAT)
            with as_start_error(self.path):
                match_owner(self._file, self.database)
        return self._file

    def acquire(self, *, shared: bool = False) -> bool:
        """Try to acquire the lock and return whether it is held. Raises StartError."""
        file = self.open()
        if fcntl is None:
            parts = [(start, 1) for start in range(self.SHARES)] if shared else [(0, self.SHARES)]
            return any(self._lock_bytes(file, *part) for part in parts)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StartError(f"{self.path} cannot be locked ({error.strerror}); use a local disk") from None
        return True

    def _lock_bytes(self, file: int, start: int, number: int) -> bool:
        os.lseek(file, start, os.SEEK_SET)
        with contextlib.suppress(OSError):
            msvcrt.locking(file, msvcrt.LK_NBLCK, number)
            self._bytes = start, number
            return True
        return False

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None and fcntl is not None:
            with contextlib.suppress(OSError):  # on a disk that has no locks
                fcntl.flock(self._file, fcntl.LOCK_UN)
        elif self._file is not None and self._bytes is not None:
            os.lseek(self._file, self._bytes[0], os.SEEK_SET)
            msvcrt.locking(self._file, msvcrt.LK_UNLCK, self._bytes[1])
            self._bytes = None

    def close(self) -> None:
        """Release the lock and close the file."""
        if self._file is not None:
            self.release()
            os.close(self._file)
            self._file = None


class Turn:
    """The right to write to a database, which its writers take in turn: they commit, checkpoint and close only in their turn.

    Two locks make it fair: a writer that waits for its turn holds the lock `next`, so that a writer that has just had its turn
    cannot overtake it.
    """

    def __init__(self, database: Path) -> None:
        self._next, self._turn = FileLock(database, ".next.lock"), FileLock(database, ".turn.lock")

    def try_acquire(self) -> bool:
        """Take the turn if it is free and nobody waits for it, and return whether it was taken."""
        try:
            return self._next.acquire() and self._turn.acquire()
        finally:
            self._next.release()

    def acquire(self, seconds: float | None = None) -> None:
        """Wait for the turn. Raises StartError after `seconds` (default: TURN_SECONDS)."""
        deadline = time.monotonic() + (TURN_SECONDS if seconds is None else seconds)
        try:
            for lock in (self._next, self._turn):
                while not lock.acquire():
                    if time.monotonic() > deadline:
                        raise StartError("Another program uses the database and does not let others write")  # sent to clients
                    time.sleep(TURN_POLL_SECONDS)
        finally:
            self._next.release()

    def release(self) -> None:
        self._turn.release()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Return a context manager that holds the turn. Raises StartError."""
        with contextlib.closing(self):
            self.acquire()
            yield

    def close(self) -> None:
        self._next.close()
        self._turn.close()


@contextlib.contextmanager
def snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database in a read transaction, whose content does not change while others write. Raises StartError."""
    with contextlib.ExitStack() as stack:
        with as_start_error(path):
            db = stack.enter_context(contextlib.closing(connect_reader(path)))
            db.execute("BEGIN")
            db.execute("SELECT 1 FROM sqlite_master").fetchone()  # a snapshot begins with the first read
        yield db


def copy_database(source: sqlite3.Connection, dest: Path, progress: Callable[[int, int, int], None]) -> None:
    """Copy a database, in steps, into a new file that only its owner can read, and sync it."""
    os.close(os.open(dest, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(connect(dest)) as target:
        source.backup(target, pages=1024, progress=progress, sleep=0)
        target.execute("PRAGMA journal_mode = delete")  # a single file, marked as a backup
    with dest.open("r+b") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def link_or_copy(path: str, kept: str) -> None:
    """Give a file a second name or, if the file system has no hard links, copy it. Raises OSError."""
    try:
        os.link(path, kept)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError:
        shutil.copy2(path, kept)
        with open(kept, "r+b") as file:
            os.fsync(file)


def replace_database(path: Path, part: Path) -> Path | None:
    """Replace a database by the copy `part`. Return the path under which the old one (and its -wal or -journal) is kept, if
    there was one, or only its -wal: the database may have been moved away.

    After an interruption, `path` is either the old database, or the copy next to the old -wal (`check_openable` detects this).
    """
    kept, old = None, [suffix for suffix in ("", "-wal", "-journal") if os.path.exists(f"{path}{suffix}")]
    if old:
        while os.path.lexists(kept := Path(f"{path}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}{old[0]}")):
            time.sleep(0.1)  # an earlier restore in the same second
        for suffix in old:
            link_or_copy(f"{path}{suffix}", f"{kept}{suffix.removeprefix(old[0])}")
    with part.open("r+b") as file:
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        match_owner(file.fileno(), path)
        os.fsync(file)
    sync_folder(path.parent)
    os.replace(part, path)
    sync_folder(path.parent)
    for suffix in ("-wal", "-shm", "-journal"):  # SQLite would apply them to the copy
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    sync_folder(path.parent)
    return kept


# ---- Store ---------------------------------------------------------------------------------------------------------
# The open database. In each process one connection does all writes and checkpoints, and processes take turns: if one connection
# commits while another checkpoints, a bug in SQLite before 3.51.3 can lose rows. Queued jobs are committed together and synced;
# then their effects are published and their callers answered. Each reader has a read-only connection, each query a snapshot.

SLOW_READERS = 3
PARTS_CACHE_KIB = 1024  # cache of the connection that reads files, which are larger than any cache
SLOW_READS_PER_USER = 2  # running at a time; fewer than there are readers, so that one user cannot occupy them all
MAX_QUEUED_SLOW_READS = 64  # per user: a page that reconnects reads all its servers at once
SLOW_READ_SECONDS = 4.0  # time limit of a slow read
READER_WAIT_SECONDS = 3.5  # time limit of the wait for a free reader; the two add up to less than CALL_TIMEOUT
POLL_SECONDS = 0.1  # how often a slow read checks whether its caller is still waiting
MAX_BATCH_JOBS = 256  # jobs in one transaction
MAX_QUEUED_JOBS = 20_000
MAINTENANCE_IDLE_SECONDS = 0.3  # maintenance runs after this time without writes
DISK_CHECK_SECONDS = 1.0  # time between two checks of the free disk space
FAILURE_LOG_SECONDS = 60  # time between two log lines about failed writes
CALL_TIMEOUT = 8.0  # seconds for a client's call, and for a commit; shorter than the ping timeout
# Limits of the commit log. A process that is further behind disconnects its clients, which reconnect and catch up.
LOG_ROWS, LOG_BYTES, LOG_SECONDS = 4096, 32 << 20, 60.0
LOG_STEP = 256  # rows read in one query
LOG_POLL_SECONDS = 0.25  # time between two polls of the commit log; notifications come sooner
JOB_TURN_SECONDS = 3.5  # longest wait of a job for its turn; two such waits fit into CALL_TIMEOUT
APPLIED_POLL_SECONDS = 0.001  # time between two checks in `Store.wait_until_applied`
TRIM_EVERY = 16  # the commit log is trimmed after so many rows, and after each row of more than BIG_ROW_BYTES
BIG_ROW_BYTES = 64 << 10

Job = Callable[[sqlite3.Connection], Result[Any]]


def on_thread(db: aiosqlite.Connection, run: Callable[..., R], *args: Any) -> Awaitable[R]:
    """Call `run` in the connection's thread. This switches threads once; aiosqlite's public API does so for each statement."""
    return db._execute(run, db._conn, *args)  # type: ignore[no-untyped-call]


def run_jobs(db: sqlite3.Connection, jobs: Sequence[Job]) -> list[Result[Any] | ChatError]:
    """Open a transaction and run the jobs in it. If a job raises ChatError before any change, the other jobs continue."""
    outcomes: list[Result[Any] | ChatError] = []
    db.execute("BEGIN IMMEDIATE")
    try:
        for job in jobs:
            changes = db.total_changes
            try:
                outcomes.append(job(db))
            except ChatError as chat_error:
                if db.total_changes != changes:
                    raise
                outcomes.append(chat_error)
    except BaseException:
        db.rollback()
        raise
    return outcomes


# The id of the last row that was ever added to the commit log.
load_log_end: Query[int] = first_value("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'log'")
# 1 if the oldest row of the commit log was added before a time.
has_old_log: Query[int | None] = first_value("SELECT written_at < ? FROM log ORDER BY id LIMIT 1")


def load_log(db: sqlite3.Connection, after: int) -> tuple[list[tuple[int, bytes]], int]:
    """Return the next rows of the commit log, as id and effects, and the id of the last one."""
    rows = db.execute("SELECT id, effects FROM log WHERE id > ? ORDER BY id LIMIT ?", (after, LOG_STEP)).fetchall()
    return rows, load_log_end(db)


def trim_log(db: sqlite3.Connection, clock: float) -> Result[int]:
    """Delete up to LOG_STEP rows of the commit log that are too old or too many, and return how many. If one of them reports a
    deletion or an edit, an earlier row had the old text: mark the -wal for erasing (`stale`)."""
    last_id, total = db.execute("SELECT id, bytes FROM log ORDER BY id DESC LIMIT 1").fetchone() or (0, 0)
    deleted = db.execute(
        """DELETE FROM log WHERE id IN (SELECT id FROM (SELECT id, written_at, bytes FROM log ORDER BY id LIMIT ?)
           WHERE id <= ? OR bytes <= ? OR written_at < ?)
           RETURNING instr(effects, CAST(':deleted"' AS BLOB)) + instr(effects, CAST('message:edit"' AS BLOB))""",
        (LOG_STEP, last_id - LOG_ROWS + TRIM_EVERY, total - LOG_BYTES, clock - LOG_SECONDS),
    ).fetchall()
    if any(found for (found,) in deleted):
        db.execute("UPDATE search SET stale = 1")
    return Result(len(deleted))


def append_log(db: sqlite3.Connection, effects: Sequence[Effect]) -> int:
    """Add the effects of the open transaction to the commit log, and return the id of the row."""
    data, clock = encode_effects(effects), time.time()
    last = db.execute("SELECT bytes FROM log ORDER BY id DESC LIMIT 1").fetchone()
    row = db.execute(
        "INSERT INTO log (written_at, bytes, effects) VALUES (?, ?, ?)", (clock, len(data) + (last[0] if last else 0), data)
    )
    row_id = int(row.lastrowid or 0)
    if row_id % TRIM_EVERY == 0 or len(data) > BIG_ROW_BYTES:
        while trim_log(db, clock).value == LOG_STEP:
            pass
    return row_id


def empty_wal(db: sqlite3.Connection) -> Result[bool]:
    """Checkpoint and truncate the -wal; not in a transaction. The value is False if a reader prevented it: try again later."""
    emptied = not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    if emptied:
        db.execute("UPDATE search SET stale = 0 WHERE stale = 2")
    return Result(emptied)


def is_bug(error: Exception) -> bool:
    """Return whether the error is in the SQL statement or its values, not in the file or the disk."""
    if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):  # the second one: the file is damaged
        return True
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF == sqlite3.SQLITE_ERROR


def in_snapshot(db: sqlite3.Connection, query: Query[R], *args: Any) -> R:
    """Run a query in a read transaction and return its result. Raises UNAVAILABLE if the file cannot be read."""
    db.execute("BEGIN")
    try:
        return query(db, *args)
    except sqlite3.DatabaseError as error:
        if is_bug(error):
            raise
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            log.error("reading the database failed: %s", error)
        raise chat_error("DATABASE_DOWN") from None
    finally:
        db.execute("ROLLBACK")


class ByProgram(NamedTuple):
    """A user for whom the embedding program makes a call. Such calls wait instead of being refused."""

    user: object


class FairQueue:
    """Slots for slow work. Each user (or address) has a limit of `each` slots and a bounded queue; users take turns."""

    def __init__(self, slots: int, each: int) -> None:
        self._free = slots
        self._each = each
        self._running: Counter[object] = Counter()
        self._queues: dict[object, deque[asyncio.Future[None]]] = {}  # user -> waiting calls; in the order of their turns

    def count_waiting(self, user: object) -> int:
        return sum(not turn.done() for turn in self._queues.get(user, ()))

    def check_space(self, user: object) -> None:
        """Raise RATE_LIMITED if the user's queue is full."""
        if self.count_waiting(user) >= MAX_QUEUED_SLOW_READS:
            raise chat_error("TOO_OFTEN", retry_after=1)

    @contextlib.asynccontextmanager
    async def turn(self, user: object, is_program: bool = False) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises RATE_LIMITED if the queue is full and the embedding program is not the caller."""
        if is_program:
            user = ByProgram(user)
        else:
            self.check_space(user)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(user, deque()).append(turn)
        self._fill_slots()
        try:
            await self._wait(turn, user)
            yield
        finally:
            turn.cancel()  # if it still waits
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._free += 1
                self._running[user] -= 1
                self._running += Counter()  # drops users at zero
                self._fill_slots()

    async def _wait(self, turn: asyncio.Future[None], user: object) -> None:
        await turn

    def _fill_slots(self) -> None:
        """Give the free slots to waiting calls, least recently served user first."""
        for user in list(self._queues) if self._free else ():
            if self._running[user] >= self._each:
                continue
            queue = self._queues.pop(user)
            while queue and queue[0].done():
                queue.popleft()
            if queue:
                queue.popleft().set_result(None)
                self._free -= 1
                self._running[user] += 1
            if queue:
                self._queues[user] = queue
            if not self._free:
                return


class QueuedJob(Struct):
    job: Job
    future: asyncio.Future[Result[Any]]
    slow: bool


def is_running(task: asyncio.Task[Any] | None) -> bool:
    return task is not None and not task.done()


class Store:
    """The open database. After each commit, `publish(effects, foreign)` is called on the event loop, in the order of commits;
    `foreign`: another process made the commit. If the database is `shared`, other servers write to it too.

    Fast jobs and queries (a few index lookups) run on the event loop: their pages are in memory, so a job takes 20 us, while
    switching to a thread and back takes 150 us. Commits (they wait for the disk), slow jobs and slow queries run in threads.
    """

    _loop: asyncio.AbstractEventLoop  # set by `open`: `get_running_loop` asks the kernel for the process id, 0.7 us of a post

    def __init__(
        self, path: Path, publish: Callable[[Sequence[Effect], bool], None], reserve: int = 0, shared: bool = False
    ) -> None:
        self.path = path = path.absolute()  # the program that contains the chat may change its working directory
        self.on_commit: Callable[[], None] = lambda: None  # called when this process has added a row to the commit log
        self.on_gap: Callable[[], None] = lambda: None  # called when rows of the commit log cannot be read or were deleted
        self._shared = shared
        self._lock, self._turn = FileLock(path), Turn(path)
        self._read_id = self._applied_id = 0  # the last row of the commit log that was read, and that was applied
        self._use_this_loop()
        self._follower: asyncio.Task[None] | None = None
        self.write_error = ""  # text of the last write error; cleared when a health check's write reaches the disk
        self._reserve = reserve  # bytes; if less disk space is free, only jobs that free space may write
        self._disk_checked_at = self._failure_logged_at = -math.inf
        self._disk_full = self._disk_stuck = self._reopen_writer = self._is_open = False
        self._paths = [path, sibling_path(path, "-wal"), sibling_path(path, "-shm")]  # stored, because each commit checks them
        self.files: list[tuple[int, int]] = []  # the opened files, of these paths (see `_identify`)
        self._publish = publish
        self._queue: deque[QueuedJob] = deque()
        self._readers: list[aiosqlite.Connection] = []  # the first one for `read`, the others for slow reads
        self._idle: list[aiosqlite.Connection] = []  # readers that are free for slow reads
        self._turns = FairQueue(SLOW_READERS, SLOW_READS_PER_USER)
        self._writer: aiosqlite.Connection | None = None
        self._inline_reader: sqlite3.Connection | None = None  # used on the event loop
        self._committer: asyncio.Task[None] | None = None
        self._wrote_at = 0.0  # time of the last call of `write` for a fast job, or of news from another process

    def _use_this_loop(self) -> None:
        """Make what belongs to one event loop: the program may start the chat again in another one."""
        self._reading_log = asyncio.Lock()  # held during a commit too: our own row must not be taken for another process's
        self._news, self._wake = asyncio.Event(), asyncio.Event()

    def _lock_database(self) -> bool:
        """Acquire the lock. Return whether no other server has it. Raises StartError if one has it and not all use --redis."""
        alone = self._lock.acquire()
        if alone and not self._shared:
            return True
        self._lock.release()
        if not self._lock.acquire(shared=True):
            raise StartError(f"{self.path} is in use by another ChatRTC" + (" without --redis: stop it first" * self._shared))
        if not self._shared:
            raise StartError(f"{self.path} is in use by servers that share it: start this one with --redis too")
        return alone

    def _open_writer(self, set_up: Callable[[sqlite3.Connection, bool], None]) -> sqlite3.Connection:
        """Lock the database and open the connection that writes. Raises StartError."""
        with Turn(self.path).hold():
            first = self._lock_database()
            db = check_and_open(self.path) if first else join_writers(self.path)
            try:
                set_up(db, first)
            except BaseException:
                db.close()
                raise
        return db

    async def open(self, set_up: Callable[[sqlite3.Connection, bool], None]) -> None:
        """Acquire the lock, check and migrate the file, start the writer and the readers. Raises StartError.

        `set_up(db, first)` is called before other servers can open the database; `first`: none has it open.
        """
        read_sqlite_header(self.path)
        self._use_this_loop()
        self._loop = asyncio.get_running_loop()
        try:
            db = await asyncio.to_thread(self._open_writer, set_up)
            self._writer = await aiosqlite.Connection(lambda: db, 64)
            for cache_kib in (PARTS_CACHE_KIB, *[READER_CACHE_KIB] * SLOW_READERS):
                connect = functools.partial(connect_reader, self.path, cache_kib=cache_kib)
                self._readers.append(await aiosqlite.Connection(connect, 64))
            self._idle = self._readers[1:]
            self._inline_reader = connect_reader(self.path)
            self.files = self._identify()
            self._read_id = self._applied_id = self.read_inline(load_log_end)
        except BaseException:
            await self.close()
            raise
        self._is_open = True
        self._committer = asyncio.create_task(self._commit_jobs(), name="chatrtc-writer")
        self._follower = asyncio.create_task(self._follow_log(), name="chatrtc-log")

    async def close(self) -> None:
        """Commit the queued jobs, checkpoint and close."""
        self._is_open = False
        self._wake.set()
        self._news.set()
        for task in filter(None, [self._committer, self._follower]):
            await asyncio.wait([task])
        readers, inline_reader, writer = self._readers, self._inline_reader, self._writer
        # Before they are closed, so that reads raise UNAVAILABLE.
        self._committer = self._follower = self._inline_reader = self._writer = None
        self._readers, self._idle = [], []
        for db in readers:
            await db.close()
        if inline_reader is not None:
            inline_reader.close()
        if writer is not None:
            await self._close_writer(writer)
        self._lock.close()  # in the turn, so that a command that gets the next one finds no lock without open files
        self._turn.close()

    async def _close_writer(self, writer: aiosqlite.Connection) -> None:
        """Close the writer in its turn, because the last connection that is closed checkpoints."""
        error = await result_or_exception(asyncio.to_thread(self._turn.acquire))
        if isinstance(error, StartError):
            log.error("closing without a checkpoint: %s", error)  # the process that has the turn will do it
        await writer.close()

    def read_inline(self, query: Query[R], *args: Any) -> R:
        """Run a fast query on the event loop, without waiting. Raises UNAVAILABLE if the database cannot be read."""
        if self._inline_reader is None:
            raise ChatError("UNAVAILABLE")
        return in_snapshot(self._inline_reader, query, *args)

    async def read(self, query: Query[R], *args: Any) -> R:
        """Run a query of some milliseconds in a thread. Raises UNAVAILABLE if the database cannot be read."""
        if not self._readers:
            raise ChatError("UNAVAILABLE")
        return await on_thread(self._readers[0], in_snapshot, query, *args)

    async def read_slow(self, user: object, gone: Callable[[], bool], query: Query[R], is_program: bool = False) -> R:
        """Run a slow query; users take turns. It fails at its time limit or once `gone()` is true. Raises ChatError."""
        wait = None if is_program else READER_WAIT_SECONDS
        try:
            async with asyncio.timeout(wait) as timer, self._turns.turn(user, is_program):
                timer.reschedule(None)
                return await self._run_slow(gone, query)
        except TimeoutError:
            raise chat_error("TOO_OFTEN", retry_after=1) from None

    async def _run_slow(self, gone: Callable[[], bool], query: Query[R]) -> R:
        if not self._idle:
            raise ChatError("UNAVAILABLE")
        loop, idle = asyncio.get_running_loop(), self._idle
        db, deadline = idle.pop(), loop.time() + SLOW_READ_SECONDS
        work: asyncio.Future[R] = asyncio.ensure_future(on_thread(db, in_snapshot, query))
        try:
            while not (await asyncio.wait([work], timeout=POLL_SECONDS))[0]:
                if gone() or loop.time() > deadline:
                    raise chat_error("TOO_SLOW")
            return work.result()
        finally:
            try:
                while not work.done():  # repeat: an interrupt between two statements has no effect
                    db._conn.interrupt()
                    await asyncio.wait([work], timeout=0.02)
                work.exception()  # retrieved, so that asyncio does not log it
            finally:
                idle.append(db)

    def is_busy(self) -> bool:
        """Return whether there was a fast write a moment ago."""
        return asyncio.get_running_loop().time() - self._wrote_at < MAINTENANCE_IDLE_SECONDS

    async def write(self, job: Job, *, slow: bool = False, frees_space: bool = False) -> Result[Any]:
        """Run a job in the next transaction (even if the caller stops waiting) and return its result, synced and published.

        `slow`: the job needs more than a few index lookups. `frees_space`: it may run when the disk is nearly full.
        Raises what the job raises, and UNAVAILABLE if the database cannot be written.
        """
        if not frees_space and self.is_full():
            raise chat_error("DISK_FULL")
        runs = is_running(self._committer) and is_running(self._follower)
        if not runs or self._disk_stuck or len(self._queue) >= MAX_QUEUED_JOBS:
            raise ChatError("UNAVAILABLE")
        future: asyncio.Future[Result[Any]] = self._loop.create_future()
        if not slow:
            self._wrote_at = self._loop.time()
        self._queue.append(QueuedJob(job, future, slow))
        self._wake.set()
        return await future

    def is_full(self) -> bool:
        """Return whether the free disk space is down to the reserve, checked once a second."""
        now = time.monotonic()
        if now - self._disk_checked_at > DISK_CHECK_SECONDS:
            self._disk_checked_at = now
            with contextlib.suppress(OSError):
                self._disk_full = shutil.disk_usage(self.path.resolve().parent).free <= self._reserve
        return self._disk_full

    def _identify(self) -> list[tuple[int, int]]:
        """Return device and inode of the database, its -wal and its -shm, or an empty list if one is missing."""
        with contextlib.suppress(FileNotFoundError):
            return [(file.st_dev, file.st_ino) for file in map(os.stat, self._paths)]
        return []

    def _require_files(self) -> None:
        """Raise StartError if the opened files were moved or replaced: everything written to them would be lost."""
        if self._identify() != self.files:
            raise StartError("The database file was moved or replaced: restart the server")

    async def _commit_jobs(self) -> None:
        """Commit jobs until the store is closed and the queue empty."""
        loop = asyncio.get_running_loop()
        while self._is_open:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                batch = self._next_batch()
                timer = loop.call_later(CALL_TIMEOUT, self._time_out_jobs, batch)
                await self._commit(batch)
                timer.cancel()
                self._disk_stuck = False

    def _next_batch(self) -> list[QueuedJob]:
        """Take the jobs of the next transaction from the queue: a slow job alone, fast jobs together."""
        batch = [self._queue.popleft()]
        while self._queue and len(batch) < MAX_BATCH_JOBS and not batch[0].slow and not self._queue[0].slow:
            batch.append(self._queue.popleft())
        return batch

    async def _commit(self, batch: list[QueuedJob]) -> None:
        """Commit the jobs in one transaction or, if that fails, one by one, so that one bad job does not fail the others."""
        outcomes = await result_or_exception(self._transact(batch))
        if isinstance(outcomes, Exception):
            if len(batch) > 1 and not isinstance(outcomes, StartError):  # a StartError concerns all jobs alike
                for queued in batch:
                    await self._commit([queued])
                return
            outcomes = [self._write_failure(outcomes)] * len(batch)
        loop = asyncio.get_running_loop()
        for queued, outcome in zip(batch, outcomes, strict=True):
            loop.call_soon(self._resolve, queued.future, outcome)
        loop.call_soon(self._mark_applied, self._read_id)

    def _write_failure(self, error: Exception) -> Exception:
        """Log the error of a transaction that failed, and return the error for the callers of its jobs."""
        if not isinstance(error, StartError) and is_bug(error):
            return error
        if time.monotonic() - self._failure_logged_at > FAILURE_LOG_SECONDS:
            self._failure_logged_at = time.monotonic()
            log.error("writing %s failed: %s", self.path, error)
        self.write_error = str(error)
        code = getattr(error, "sqlite_errorcode", 0)
        self._reopen_writer |= code & 0xFF == sqlite3.SQLITE_IOERR  # after a failed sync its state is unknown
        detail = f"The database cannot be written at the moment ({error}); nothing was changed"
        return ChatError("UNAVAILABLE", detail, reason="DISK_FULL" if code == sqlite3.SQLITE_FULL else "DATABASE_DOWN")

    async def _transact(self, batch: list[QueuedJob]) -> list[Result[Any] | ChatError]:
        """Run the jobs and commit, in this process's turn. Then schedule the effects of earlier commits of other processes."""
        assert self._writer is not None
        if not self._turn.try_acquire():
            await on_thread(self._writer, lambda db: self._turn.acquire(JOB_TURN_SECONDS))
        try:
            async with self._reading_log:
                outcomes, own_id, end = await self._run_jobs(batch)
                before = end if own_id is None else own_id - 1
                while self._read_id < before:
                    self._read_log(before)
                    await asyncio.sleep(0)
                self._read_id = end
        finally:
            self._turn.release()
        if own_id is not None:
            self.on_commit()
        return outcomes

    async def _run_jobs(self, batch: list[QueuedJob]) -> tuple[list[Result[Any] | ChatError], int | None, int]:
        """Run the jobs and commit. Return their results, and the ids that `_finish` returns."""
        assert self._writer is not None
        if self._reopen_writer:
            self._require_files()
            # The old one is kept until there is a new one: its thread waits for the turn.
            before, self._writer = self._writer, await aiosqlite.Connection(functools.partial(open_writer, self.path), 64)
            await before.close()
            self._reopen_writer = False
        jobs = [queued.job for queued in batch]
        if jobs == [empty_wal]:
            return [await on_thread(self._writer, empty_wal)], None, self._read_id
        if batch[0].slow:
            outcomes = await on_thread(self._writer, run_jobs, jobs)
        else:
            outcomes = run_jobs(self._writer._conn, jobs)
        effects = [effect for outcome in outcomes if isinstance(outcome, Result) for effect in outcome.effects]
        return outcomes, *await on_thread(self._writer, self._finish, effects, batch[0].slow)

    def _finish(self, db: sqlite3.Connection, effects: Sequence[Effect], slow: bool) -> tuple[int | None, int]:
        """Commit, and end the turn. Return the ids of the row added to the commit log (None: no row) and of its last row."""
        try:
            with db:  # commits, or rolls back on failure
                self._require_files()
                own_id = append_log(db, effects) if self._shared and effects else None
                if slow:
                    db.execute(f"PRAGMA wal_autocheckpoint = {SLOW_CHECKPOINT_PAGES}")
                return own_id, load_log_end(db)
        finally:
            if slow:
                db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self._turn.release()

    def pull(self) -> None:
        """Poll the commit log soon, because another process may have committed."""
        self._news.set()

    async def _follow_log(self) -> None:
        """Apply what other processes commit, until the store is closed."""
        while self._is_open:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOG_POLL_SECONDS):
                    await self._news.wait()
            self._news.clear()
            async with self._reading_log:
                if self._read_log():
                    self.pull()  # in steps, so that other work runs in between

    def _read_log(self, before: int | None = None) -> bool:
        """Schedule the effects of the next rows that other processes added to the commit log. Return whether there may be more.

        Rows up to `before` (this process's own commit follows) must be readable now. If rows are missing, `on_gap` is called.
        """
        loop = asyncio.get_running_loop()
        try:
            rows, end = self.read_inline(load_log, self._read_id)
        except (ChatError, sqlite3.DatabaseError):  # such as a damaged page
            rows, end = [], self._read_id
        end = end if before is None else before
        rows = [row for row in rows if row[0] <= end]
        if rows:
            self._wrote_at = loop.time()
        if end > self._read_id and (not rows or rows[0][0] != self._read_id + 1):
            loop.call_soon(self._report_gap, end)
            self._read_id = end
        for row_id, data in rows if self._read_id < end else ():
            loop.call_soon(self._apply_row, row_id, data)
            self._read_id = row_id
        return self._read_id < end

    def _apply_row(self, row_id: int, data: bytes) -> None:
        """Publish the effects of a row that another process added to the commit log."""
        try:
            effects = decode_effects(data)
        except (msgspec.DecodeError, KeyError) as error:
            log.error("row %d of the commit log cannot be read: %s", row_id, error)
            self._report_gap(row_id)
        else:
            self._mark_applied(row_id)
            self._publish(effects, True)

    def _report_gap(self, last_id: int) -> None:
        self._mark_applied(last_id)
        self.on_gap()

    def _mark_applied(self, row_id: int) -> None:
        self._applied_id = row_id

    async def wait_until_applied(self) -> None:
        """Wait until everything that was committed before this call, by any process, is also applied."""
        end = self.read_inline(load_log_end)  # read once: commits of others may never stop
        while self._applied_id < end:
            self.pull()
            await asyncio.sleep(APPLIED_POLL_SECONDS)

    def _time_out_jobs(self, batch: list[QueuedJob]) -> None:
        """Fail all waiting calls with DISK_SLOW. Their jobs may still be committed. Refuse further ones until this commit ends:
        they would wait for it as long as it takes."""
        self._disk_stuck = True
        self.write_error = self.write_error or f"a commit takes more than {CALL_TIMEOUT:.0f} s"
        for queued in [*batch, *self._queue]:
            if not queued.future.done():
                queued.future.set_exception(chat_error("DISK_SLOW"))

    def _resolve(self, future: asyncio.Future[Result[Any]], outcome: Result[Any] | Exception) -> None:
        """Publish a job's effects, then answer its caller. If publishing raises, the event loop logs it; other jobs go on."""
        try:
            if isinstance(outcome, Result):
                self._publish(outcome.effects, False)
        finally:
            if future.done():
                pass  # the caller stopped waiting
            elif isinstance(outcome, Result):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)


# ---- Queries -------------------------------------------------------------------------------------------------------
# The SQL for accounts, servers and members. A query is a function whose first argument is a connection in a transaction. Names
# begin with what they do: load_, insert_, update_, delete_. Results are payloads, not rows.

INVITE_ROWS = "SELECT code, server_id, max_uses, uses, expires_at FROM invites "
CHANNEL_ROWS = "SELECT server_id, channel_id, name, kind, topic, posting, slow_seconds, keep_days FROM channels "
PRINCIPAL_ROWS = "SELECT u.user_id, u.username, u.generation, u.name, u.source = 'bot', u.password FROM users u "
HOOK_ROWS = "SELECT hook_id, channel_id, name, user_id, created_at FROM hooks "
# The name of a conversation without one: the names of the other participants, in a pair also if the other person has left.
SERVER_FIELDS = """SELECT s.server_id, CASE WHEN s.name <> '' THEN s.name ELSE (SELECT substr(coalesce(
        group_concat(coalesce(u.name, u.username), ', ') FILTER (WHERE u.user_id <> :user_id),
        group_concat(coalesce(u.name, u.username), ', '), ''), 1, 100) FROM users u WHERE u.user_id IN (
        SELECT user_id FROM members WHERE server_id = s.server_id
        UNION SELECT user_id FROM former_members WHERE server_id = s.server_id AND s.pair IS NOT NULL)) END,
    s.created_at, s.kind, s.seq, s.name = '', s.channels_seq, s.members_seq, s.name_seq"""
SERVER_ROWS = SERVER_FIELDS + """, o.user_id, m.role, s.pair IS NOT NULL FROM members m
    JOIN servers s ON s.server_id = m.server_id LEFT JOIN members o ON o.server_id = s.server_id AND o.role = 'owner'
    WHERE m.user_id = :user_id"""  # fmt: skip
PARTICIPANT_ROWS = """SELECT s.server_id, u.user_id, u.username, u.guest, u.source = 'bot', u.name FROM members m
    JOIN servers s ON s.server_id = m.server_id AND s.kind = 'direct' JOIN members p ON p.server_id = m.server_id
    JOIN users u ON u.user_id = p.user_id WHERE m.user_id = :user_id"""
SERVER_IDS = "SELECT m.server_id FROM members m WHERE m.user_id = :user_id"
MEMBER_ROWS = """SELECT m.user_id, u.username, m.role,
        CASE WHEN u.status = 'invisible' AND u.user_id <> :viewer THEN 'online' ELSE u.status END, m.joined_at,
        u.guest, CASE WHEN (SELECT role FROM members v WHERE v.server_id = m.server_id
        AND v.user_id = :viewer) <> 'member' THEN m.invited_by END,
        CASE WHEN m.muted_until > strftime('%Y-%m-%dT%H:%M:%SZ', 'now') THEN m.muted_until END, u.source = 'bot', u.name
    FROM members m JOIN users u ON u.user_id = m.user_id WHERE m.server_id = :server_id """
TARGET_ROWS = """SELECT t.server_id, s.seq, m.role, u.name,
    CASE s.kind WHEN 'direct' THEN coalesce(s.pair, 'group') END, m.muted_until, """
VALID_CALLER = """ LEFT JOIN servers s ON s.server_id = t.server_id
    LEFT JOIN members m ON m.server_id = t.server_id AND m.user_id = u.user_id
    WHERE u.user_id = ? AND u.generation = ? AND u.deleted = 0 AND NOT EXISTS (SELECT 1 FROM revoked_tokens WHERE digest = ?)"""
TARGET_TABLES = {  # argument that names the target -> its rules, and the table with its server (a deleted channel has none)
    "server_id": "NULL, 0 FROM users u LEFT JOIN servers t ON t.server_id = ?",
    "channel_id": "t.posting, t.slow_seconds FROM users u LEFT JOIN channels t ON t.channel_id = ?",
    "message_id": "t.posting, t.slow_seconds FROM users u LEFT JOIN messages x ON x.message_id = ? AND x.deleted = 0 "
        "LEFT JOIN channels t ON t.channel_id = x.channel_id",
    "file_id": "NULL, 0 FROM users u LEFT JOIN files f ON f.file_id = ? AND f.digest IS NOT NULL "
        "LEFT JOIN channels t ON t.channel_id = f.channel_id",
    "code": "NULL, 0 FROM users u LEFT JOIN invites t ON t.code = ?",
}  # fmt: skip
TARGET_QUERIES = {key: TARGET_ROWS + table + VALID_CALLER for key, table in TARGET_TABLES.items()}
# The target's server (None: no such target) and its `seq`, the caller's role and display name, "group" or the `pair` of a
# conversation, the end of the caller's mute, and the channel's `posting` and `slow_seconds`.
Target = tuple[int | None, int | None, Role | None, str | None, str | None, str | None, Posting | None, int | None]
NEXT_SEQ = {
    "": "UPDATE servers SET seq = seq + 1 WHERE server_id = ?",
    "channels": "UPDATE servers SET seq = seq + 1, channels_seq = seq + 1 WHERE server_id = ?",
    "members": "UPDATE servers SET seq = seq + 1, members_seq = seq + 1 WHERE server_id = ?",
    "name": "UPDATE servers SET seq = seq + 1, name_seq = seq + 1 WHERE server_id = ?",
}
MAX_OWNED_SERVERS = 100  # per account
MAX_STARTED_GROUPS = 100  # per account, without those that everybody has left
MAX_PARTICIPANTS = 51  # per conversation
MAX_CHANNELS = 500  # per server
MAX_INVITES = 200  # per server
MAX_BOTS = 50  # per server, those of hooks included
MAX_KNOWN_ADDRESSES = 20  # per account
GUESTS_PER_STEP = 50  # guests removed in one transaction


class Principal(NamedTuple):
    """An authenticated account and the token it presented (empty `digest` for calls made by the embedding program)."""

    user_id: int
    username: str
    generation: int = 0
    name: str | None = None
    bot: bool = False
    digest: bytes = b""
    expires: float = math.inf


def row_as(kind: Callable[..., R], query: str) -> Query[R]:
    """Return a query that returns its first row, which must exist, as an object of that kind."""
    return lambda db, *values: kind(*db.execute(query, values).fetchone())


def rows_as(kind: Callable[..., R], query: str) -> Query[list[R]]:
    """Return a query that returns all rows as objects of that kind."""
    return lambda db, *values: [kind(*row) for row in db.execute(query, values)]


def rows_by_key(query: str) -> Query[dict[Any, Any]]:
    """Return a query that takes keys (?1, JSON) and other values, and returns a dict of the two columns of its rows."""
    return lambda db, keys, *values: dict(db.execute(query, (msgspec.json.encode(list(keys)).decode(), *values)).fetchall())


def named(kind: Callable[..., R]) -> Callable[..., R]:
    """Return a constructor that takes the display name as the last positional argument."""
    return lambda *values: kind(*values[:-1], name=values[-1])


load_seq: Query[int] = first_value("SELECT seq FROM servers WHERE server_id = ?")


def next_seq(db: sqlite3.Connection, server_id: int, part: str = "", before: int | None = None) -> int:
    """Increment and return the server's sequence number. `part`: "channels", "members" or "name" if that list changes.
    `before`: the number, if it is known; reading it takes 3 % of a post, and RETURNING takes longer."""
    db.execute(NEXT_SEQ[part], (server_id,))
    return load_seq(db, server_id) if before is None else before + 1


def server_change(part: str, *queries: str) -> Query[int]:
    """Return a query that runs these statements with a server's id and other values, and returns the change's `seq`."""

    change = statement(*queries)

    def run(db: sqlite3.Connection, server_id: int, *values: object) -> int:
        seq = next_seq(db, server_id, part)
        change(db, server_id, *values)
        return seq

    return run


# Accounts and tokens.
load_accounts: Query[list[tuple[int, str, str]]] = rows_as(
    lambda *row: row, "SELECT user_id, username, created_at FROM users WHERE deleted = 0 ORDER BY user_id"
)
load_profile = row_as(
    lambda user_id, username, status, at, guest, bot, name: Profile(
        user_id, username, status, at, bool(guest), bool(bot), name=name
    ),
    "SELECT user_id, username, status, created_at, guest, source = 'bot', name FROM users WHERE user_id = ?",
)
load_names = rows_by_key(  # id -> name that is shown
    "SELECT u.user_id, coalesce(u.name, u.username) FROM json_each(?) k JOIN users u ON u.user_id = k.value"
)
load_user_ids = rows_by_key(  # name key -> id
    "SELECT u.username_key, u.user_id FROM json_each(?) k JOIN users u ON u.username_key = k.value"
)
load_invisible: Query[list[int]] = rows_as(int, "SELECT user_id FROM users WHERE status = 'invisible'")
load_password_hash: Query[str | None] = first_value("SELECT password FROM users WHERE user_id = ?")
load_address_seen_at: Query[float | None] = first_value("SELECT seen_at FROM known_addresses WHERE user_id = ? AND digest = ?")
update_status = statement("UPDATE users SET status = ?2 WHERE user_id = ?1")
update_display_name = statement("UPDATE users SET name = ?2 WHERE user_id = ?1")
update_external_id = statement("UPDATE users SET external_id = coalesce(external_id, ?2) WHERE user_id = ?1")
close_account = statement(
    "DELETE FROM known_addresses WHERE user_id = ?",
    "DELETE FROM hooks WHERE user_id = ?",
    "DELETE FROM bans WHERE user_id = ?",
    "UPDATE users SET deleted = 1, password = NULL, generation = generation + 1 WHERE user_id = ?",
)
insert_revoked_token = statement("INSERT OR IGNORE INTO revoked_tokens VALUES (?, ?)")
delete_expired = statement(  # tokens and sign-in codes, and entries of the moderation log after 90 days
    "DELETE FROM revoked_tokens WHERE expires_at < ?",
    "DELETE FROM links WHERE expires_at < ?",
    "DELETE FROM moderation WHERE at < ? - 90 * 86400",
)

# Servers and channels.
load_all_servers = rows_as(
    lambda *row: dict(zip(("server_id", "name", "created_at", "kind", "seq"), row[:5], strict=True)),
    SERVER_FIELDS.replace(":user_id", "0") + " FROM servers s ORDER BY s.server_id",
)
load_server_ids = rows_as(int, "SELECT server_id FROM members WHERE user_id = ? ORDER BY server_id")
insert_server: Query[int] = first_value("INSERT INTO servers (name, created_at) VALUES (?, ?) RETURNING server_id")
insert_conversation: Query[int] = first_value(
    """INSERT INTO servers (kind, name, created_at, started_by, pair)
       VALUES ('direct', ?, ?, ?, nullif(?, 'group')) RETURNING server_id"""
)
find_pair: Query[int | None] = first_value("SELECT server_id FROM servers WHERE pair = ?")
count_started_groups: Query[int] = first_value(
    """SELECT count(*) FROM servers s WHERE s.started_by = ? AND s.pair IS NULL
       AND EXISTS (SELECT 1 FROM members m WHERE m.server_id = s.server_id)"""
)
update_server_name = server_change("name", "UPDATE servers SET name = ?2 WHERE server_id = ?1")
delete_server_row = statement("DELETE FROM servers WHERE server_id = ?")
load_channels = rows_as(Channel, CHANNEL_ROWS + "WHERE server_id = ? ORDER BY channel_id")
load_channel = row_as(Channel, CHANNEL_ROWS + "WHERE channel_id = ?")
load_server_of_channel: Query[int | None] = first_value("SELECT server_id FROM channels WHERE channel_id = ?")
# Removes a channel from its server. Its messages are deleted later, by `purge_deleted_channel`.
detach_channel = server_change("channels", "UPDATE channels SET server_id = NULL WHERE server_id = ? AND channel_id = ?")

# Members and bans.
load_member_ids = rows_as(int, "SELECT user_id FROM members WHERE server_id = ? ORDER BY user_id")
load_owner: Query[int | None] = first_value("SELECT user_id FROM members WHERE server_id = ? AND role = 'owner'")
load_role: Query[Role | None] = first_value("SELECT role FROM members WHERE server_id = ? AND user_id = ?")
update_role = server_change(  # nobody could lift the mute of an owner
    "members",
    "UPDATE members SET role = ?3, muted_until = iif(?3 = 'owner', NULL, muted_until) WHERE server_id = ?1 AND user_id = ?2",
)
update_mute = server_change("members", "UPDATE members SET muted_until = ?3 WHERE server_id = ?1 AND user_id = ?2")
delete_member = server_change(
    "members",
    """INSERT INTO former_members (server_id, user_id, invited_by, muted_until)
       SELECT server_id, user_id, invited_by, muted_until FROM members WHERE server_id = ? AND user_id = ?""",
    "DELETE FROM members WHERE server_id = ? AND user_id = ?",
)
# The former members with the 1,000 newest accounts, by id.
load_former_members = rows_as(
    named(Identity),
    """SELECT * FROM (SELECT f.user_id, u.username, u.name FROM former_members f JOIN users u ON u.user_id = f.user_id
       WHERE f.server_id = ? ORDER BY f.user_id DESC LIMIT 1000) ORDER BY user_id""",
)
# 1 if the user is a former member whose account is not deleted.
is_former_member: Query[int | None] = first_value(
    "SELECT 1 FROM former_members JOIN users USING (user_id) WHERE server_id = ? AND user_id = ? AND deleted = 0"
)
# 1 if one of these users (?2: a JSON list that includes ?1) is an admin or owner of a server that all of them share, else 0.
# None: they share no server.
have_staff_in_common: Query[int | None] = first_value(
    """SELECT max((SELECT max(role <> 'member') FROM members m JOIN json_each(?2) p ON p.value = m.user_id
                   WHERE m.server_id = a.server_id))
       FROM members a JOIN servers s ON s.server_id = a.server_id AND s.kind = 'server'
       WHERE a.user_id = ?1 AND NOT EXISTS (SELECT 1 FROM json_each(?2) p WHERE NOT EXISTS (
           SELECT 1 FROM members m WHERE m.server_id = a.server_id AND m.user_id = p.value))"""
)
# The conversations that this user has left and in which nobody has an account any more.
load_abandoned_conversations = rows_as(
    int,
    """SELECT f.server_id FROM former_members f JOIN servers s ON s.server_id = f.server_id AND s.kind = 'direct'
       WHERE f.user_id = ? AND NOT EXISTS (SELECT 1 FROM members m WHERE m.server_id = f.server_id) AND NOT EXISTS (
           SELECT 1 FROM former_members o JOIN users u ON u.user_id = o.user_id
           WHERE o.server_id = f.server_id AND u.deleted = 0)""",
)
# The member who becomes the owner if the owner's account is deleted: the first admin, else the first member, but no bot.
load_next_owner: Query[int | None] = first_value(
    """SELECT m.user_id FROM members m JOIN users u ON u.user_id = m.user_id AND u.source <> 'bot' WHERE m.server_id = ?
       ORDER BY m.role = 'admin' DESC, m.joined_at, m.user_id LIMIT 1"""
)
# 1 if a user (?1) has a higher role than another user (?2) in each of the other user's servers (not conversations), else 0.
outranks_everywhere: Query[int] = first_value(
    """SELECT NOT EXISTS (SELECT 1 FROM members t JOIN servers s USING (server_id)
           WHERE t.user_id = ?2 AND s.kind = 'server' AND NOT EXISTS (
           SELECT 1 FROM members m WHERE m.server_id = t.server_id AND m.user_id = ?1
           AND (m.role = 'owner' OR (m.role = 'admin' AND t.role = 'member'))))"""
)
# The guests of a server (?1) whose role is lower than ?2, by id, at most ?3.
load_guests_below = rows_as(
    int,
    """SELECT m.user_id FROM members m JOIN users u ON u.user_id = m.user_id
       WHERE m.server_id = ? AND u.guest AND (m.role = 'member' OR (m.role = 'admin' AND ? = 'owner'))
       ORDER BY m.user_id LIMIT ?""",
)
load_bans = rows_as(
    named(Ban),
    """SELECT b.server_id, b.user_id, u.username, b.banned_by, b.banned_at, u.name FROM bans b
       JOIN users u ON u.user_id = b.user_id WHERE b.server_id = ? AND b.user_id > ? ORDER BY b.user_id LIMIT ?""",
)
is_banned: Query[int | None] = first_value("SELECT 1 FROM bans WHERE server_id = ? AND user_id = ?")
insert_ban = statement("INSERT OR IGNORE INTO bans VALUES (?, ?, ?, ?)")
delete_ban = statement("DELETE FROM bans WHERE server_id = ? AND user_id = ?")

# Bots and hooks.
load_bot_ids = rows_as(
    int, "SELECT m.user_id FROM members m JOIN users u ON u.user_id = m.user_id AND u.source = 'bot' WHERE m.server_id = ?"
)
load_hooks = rows_as(Hook, HOOK_ROWS + "WHERE server_id = ? ORDER BY hook_id")
load_hook_bots = rows_as(int, "SELECT user_id FROM hooks WHERE channel_id = ? ORDER BY hook_id")
insert_hook: Query[int] = first_value(
    """INSERT INTO hooks (server_id, channel_id, name, user_id, secret, created_at) VALUES (?, ?, ?, ?, ?, ?)
       RETURNING hook_id"""
)

# The moderation log.
insert_log_entry = statement(
    "INSERT INTO moderation (server_id, at, user_id, action, target_id, detail) VALUES (?, ?, ?, ?, ?, ?)"
)
# The entries of a server (?1) before an entry (?2), newest first, at most ?3.
load_log_entries = rows_as(
    named(LogEntry),
    """SELECT l.entry_id, strftime('%Y-%m-%dT%H:%M:%SZ', l.at, 'unixepoch'), l.user_id, u.username, l.action, l.target_id,
           t.username, t.name, l.detail, u.name
       FROM moderation l JOIN users u ON u.user_id = l.user_id LEFT JOIN users t ON t.user_id = l.target_id
       WHERE l.server_id = ? AND l.entry_id < ? ORDER BY l.entry_id DESC LIMIT ?""",
)

# Invites.
load_invites = rows_as(Invite, INVITE_ROWS + "WHERE server_id = ? ORDER BY rowid")
load_invite_preview = row_as(
    InvitePreview,
    """SELECT i.code, s.server_id, s.name, (SELECT count(*) FROM members m WHERE m.server_id = s.server_id)
       FROM invites i JOIN servers s ON s.server_id = i.server_id WHERE i.code = ?""",
)
update_invite_uses = statement("UPDATE invites SET uses = uses + 1 WHERE code = ?")
delete_invite = statement("DELETE FROM invites WHERE code = ?")
# Deletes the invite that a member or former member (server, user) used, if it is recorded.
delete_invite_used_by = statement(
    """DELETE FROM invites WHERE server_id = ?1 AND code IN (
           SELECT invited_by FROM members WHERE server_id = ?1 AND user_id = ?2
           UNION ALL SELECT invited_by FROM former_members WHERE server_id = ?1 AND user_id = ?2)"""
)

# The whole database.
load_secret_check: Query[bytes | None] = first_value("SELECT digest FROM secret_check")
update_secret_check = statement("INSERT OR REPLACE INTO secret_check (rowid, digest) VALUES (1, ?)")
count_rows: Query[tuple[int, int, int]] = row_as(  # users, servers, messages
    lambda *row: row, "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM servers), (SELECT count(*) FROM messages)"
)
# Tests that the disk can be written. Two updates that cancel out, because SQLite does not write an update without a change.
probe_write = statement("UPDATE search SET indexed_id = indexed_id + 1", "UPDATE search SET indexed_id = indexed_id - 1")


def principal_from_row(row: Sequence[Any]) -> Principal:
    return Principal(*row[:4])._replace(bot=bool(row[4]))


def load_principal(db: sqlite3.Connection, user_id: int, digest: bytes) -> Principal | None:
    """Return the account, or None if it is deleted or the token with that digest is revoked."""
    valid = "WHERE user_id = ? AND deleted = 0 AND NOT EXISTS (SELECT 1 FROM revoked_tokens WHERE digest = ?)"
    row = db.execute(PRINCIPAL_ROWS + valid, (user_id, digest)).fetchone()
    return principal_from_row(row) if row else None


def require_user(db: sqlite3.Connection, user_id: int) -> Principal:
    """Return the account. Raises NOT_FOUND if it does not exist or is deleted."""
    if (user := load_principal(db, user_id, b"")) is None:
        raise chat_error("NO_USER", field="user_id")
    return user


def load_hook_by_secret(db: sqlite3.Connection, secret: str) -> tuple[Hook, Principal]:
    """Return the hook that has this secret, and its bot. Raises NOT_FOUND."""
    digest = hashlib.sha256(secret.encode()).digest()
    row = db.execute(HOOK_ROWS + "WHERE secret = ?", (digest,)).fetchone()
    if row is None:
        raise chat_error("HOOK_UNKNOWN", field="secret")
    return Hook(*row), require_user(db, row[3])  # a hook is deleted with its bot


def load_host_user(db: sqlite3.Connection, args: HostUser) -> tuple[Principal, bool] | None:
    """Return the account of a user of the embedding program and whether it already matches `args`. None: there is none. With an
    `external_id`, an account of a person is never returned. Raises UNAUTHORIZED if the account is deleted, CONFLICT if it is a
    bot."""
    row = db.execute(
        """SELECT user_id, username, generation, name, source = 'bot', deleted, ?1 IS NULL OR external_id IS NOT NULL
           FROM users WHERE external_id = ?1 OR (username_key = ?2 AND (
               ?1 IS NULL OR (source = 'host' AND external_id IS NULL AND deleted = 0)))
           ORDER BY external_id IS NULL LIMIT 1""",
        (args.external_id, name_key(args.username)),
    ).fetchone()
    if row is None:
        return None
    user, (is_bot, deleted, is_known) = Principal(*row[:4]), row[4:]
    if deleted or is_bot:
        raise chat_error("ACCOUNT_DELETED" if deleted else "USERNAME_TAKEN", field="username")
    return user, bool(is_known) and args.name in (None, user.name or user.username)


def load_account(db: sqlite3.Connection, username: str) -> tuple[Principal, str | None] | None:
    """Return the account with that username, in any spelling, and its password hash."""
    row = db.execute(PRINCIPAL_ROWS + "WHERE username_key = ? AND deleted = 0", (name_key(username),)).fetchone()
    return (principal_from_row(row), row[5]) if row else None


def is_free_username(db: sqlite3.Connection, username: str) -> bool:
    """Return whether a new account can have this username."""
    found = db.execute("SELECT 1 FROM users WHERE username_key = ?", (name_key(username),)).fetchone()
    return found is None and is_username(username) and name_key(username) != EVERYONE


def find_free_username(db: sqlite3.Connection, name: str) -> str:
    """Return a free username for a display name: `Tim.Meier`, `Tim.Meier2`, ... Takes few look-ups if many share it."""
    handle = handle_of(name)

    def is_free(number: int) -> bool:
        return is_free_username(db, numbered(handle, number))

    top = next(2**power for power in itertools.count() if is_free(2**power))
    return numbered(handle, bisect.bisect_left(range(top), True, top // 2 + 1, top, key=is_free))


def insert_user(
    db: sqlite3.Connection, username: str, password: str | None, now: str, name: str | None = None, source: Source = "person",
    external_id: object = None,
) -> int:  # fmt: skip
    """Insert an account and return its id. `password`: its hash or None. Raises CONFLICT if the username is taken."""
    query = """INSERT INTO users (username, username_key, password, created_at, name, source, external_id)
               VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (username_key) DO NOTHING RETURNING user_id"""
    values = (username, name_key(username), password, now, None if name == username else name, source, external_id)
    row = db.execute(query, values).fetchone() if name_key(username) != EVERYONE else None
    if row is None:
        raise chat_error("USERNAME_TAKEN", field="username")
    return int(row[0])


def insert_known_address(db: sqlite3.Connection, user_id: int, digest: bytes, clock: float) -> Result[None]:
    """Record that the account signed in from an address. The newest `MAX_KNOWN_ADDRESSES` are kept."""
    db.execute("INSERT OR REPLACE INTO known_addresses VALUES (?, ?, ?)", (user_id, digest, clock))
    db.execute(
        """DELETE FROM known_addresses WHERE user_id = ?1 AND digest NOT IN
           (SELECT digest FROM known_addresses WHERE user_id = ?1 ORDER BY seen_at DESC LIMIT ?2)""",
        (user_id, MAX_KNOWN_ADDRESSES),
    )
    return Result(None)


def update_password(db: sqlite3.Connection, user_id: int, before: str | None, password: str) -> int:
    """Replace the password hash `before` and return the new token generation. Raises CONFLICT if another hash is stored."""
    query = """UPDATE users SET password = ?, generation = generation + 1
               WHERE user_id = ? AND password IS ? AND deleted = 0 RETURNING generation"""
    row = db.execute(query, (password, user_id, before)).fetchone()
    if row is None:
        raise chat_error("PASSWORD_CHANGED")
    return int(row[0])


def lookup_target(db: sqlite3.Connection, key: str, target: int | str, user: Principal) -> Target | None:
    """Look up an operation's target. Return None if the caller's token is no longer valid. `key`: one of `TARGET_QUERIES`."""
    values = (target, user.user_id, user.generation, bytearray(user.digest))  # sqlite3 takes 0.5 us longer for bytes
    found: Target | None = db.execute(TARGET_QUERIES[key], values).fetchone()
    return found


def load_servers(db: sqlite3.Connection, user_id: int, server_id: int | None = None) -> list[Server]:
    """Return a member's servers, or only that one, with their channels and participants, in three queries."""
    only = " AND m.server_id = :server_id" if server_id is not None else ""
    values = {"user_id": user_id, "server_id": server_id}
    rows = db.execute(SERVER_ROWS + only + " ORDER BY s.server_id", values)
    servers = {
        one: Server(one, name, owner_id, at, role, [], UNSET if kind == "server" else kind, pair=bool(pair))
        for one, name, at, kind, *_, owner_id, role, pair in rows
    }
    for row in db.execute(CHANNEL_ROWS + "WHERE server_id IN (" + SERVER_IDS + only + ") ORDER BY channel_id", values):
        servers[row[0]].channels.append(Channel(*row))
    for one, user_id, username, guest, bot, name in db.execute(PARTICIPANT_ROWS + only + " ORDER BY u.user_id", values):
        servers[one].participants.append(Account(user_id, username, bool(guest), bool(bot), name=name))
    return list(servers.values())


def check_owned_servers(db: sqlite3.Connection, user_id: int) -> None:
    """Raise CONFLICT if the account owns `MAX_OWNED_SERVERS` already."""
    (owned,) = db.execute("SELECT count(*) FROM members WHERE user_id = ? AND role = 'owner'", (user_id,)).fetchone()
    if owned >= MAX_OWNED_SERVERS:
        raise chat_error("TOO_MANY", n=MAX_OWNED_SERVERS)


def load_members(
    db: sqlite3.Connection, server_id: int, connected: Collection[int], viewer: int, user_id: int | None = None
) -> list[Member]:
    """Return the members of a server, or only `user_id`, as `viewer` sees them: "invisible" only as the viewer's own status,
    `invited_by` only if the viewer is an admin. `connected`: the users whom the viewer sees connected."""
    only = "AND m.user_id = :user_id " if user_id is not None else ""
    values = {"viewer": viewer, "server_id": server_id, "user_id": user_id}
    rows = db.execute(MEMBER_ROWS + only + "ORDER BY m.user_id", values)
    return [
        Member(server_id, one, username, role, status, at, one in connected, bool(guest), code, until, bool(bot), name=name)
        for one, username, role, status, at, guest, code, until, bot, name in rows
    ]


def insert_member(db: sqlite3.Connection, server_id: int, user_id: int, role: Role, now: str, code: str | None = None) -> int:
    """Make an account a member and return the change's `seq`. `code`: the invite it used."""
    db.execute(  # older messages count as read, and a mute remains
        """INSERT INTO members (server_id, user_id, role, joined_at, invited_by, read_from, muted_until)
           VALUES (?1, ?2, ?3, ?4, ?5, (SELECT coalesce(max(message_id), 0) FROM messages),
                   (SELECT muted_until FROM former_members WHERE server_id = ?1 AND user_id = ?2))""",
        (server_id, user_id, role, now, code),
    )
    db.execute("DELETE FROM former_members WHERE server_id = ? AND user_id = ?", (server_id, user_id))
    return next_seq(db, server_id, "members")


def insert_sign_in_code(db: sqlite3.Connection, user_id: int, code: str, expires: float) -> None:
    """Insert a sign-in code for a guest. It replaces an earlier one."""
    db.execute("DELETE FROM links WHERE user_id = ?", (user_id,))
    db.execute("INSERT INTO links VALUES (?, ?, ?)", (hashlib.sha256(code.encode()).digest(), user_id, expires))


def load_guest_by_code(db: sqlite3.Connection, code: str, now: float) -> Principal:
    """Return the guest of a valid sign-in code. Raises NOT_FOUND."""
    valid = "JOIN links l ON u.user_id = l.user_id WHERE l.digest = ? AND l.expires_at > ? AND u.guest"
    row = db.execute(PRINCIPAL_ROWS + valid, (hashlib.sha256(code.encode()).digest(), now)).fetchone()
    if row is None:
        raise chat_error("LINK_UNKNOWN", field="code")
    return principal_from_row(row)


def delete_sign_in_code(db: sqlite3.Connection, code: str, now: float) -> Principal:
    """Delete a valid sign-in code and return its guest. Raises NOT_FOUND."""
    guest = load_guest_by_code(db, code, now)
    db.execute("DELETE FROM links WHERE user_id = ?", (guest.user_id,))
    return guest


def insert_invite(db: sqlite3.Connection, invite: Invite, created_by: int, now: str) -> None:
    """Insert an invite. If there are `MAX_INVITES`, delete the oldest invalid one first; raise CONFLICT if all are valid."""
    (count,) = db.execute("SELECT count(*) FROM invites WHERE server_id = ?", (invite.server_id,)).fetchone()
    oldest = """DELETE FROM invites WHERE rowid = (
                    SELECT rowid FROM invites WHERE server_id = ? AND (uses >= max_uses OR expires_at <= ?)
                    ORDER BY rowid LIMIT 1)"""
    if count >= MAX_INVITES and db.execute(oldest, (invite.server_id, now)).rowcount == 0:
        raise chat_error("TOO_MANY", n=MAX_INVITES)
    values = (invite.code, invite.server_id, created_by, invite.max_uses, invite.expires_at)
    db.execute("INSERT INTO invites (code, server_id, created_by, max_uses, expires_at) VALUES (?, ?, ?, ?, ?)", values)


def load_valid_invite(db: sqlite3.Connection, code: str, now: str) -> Invite:
    """Return an invite. Raises NOT_FOUND if it does not exist, has expired or is used up."""
    row = db.execute(INVITE_ROWS + "WHERE code = ?", (code,)).fetchone()
    if row is None:
        raise chat_error("INVITE_UNKNOWN", field="code")
    invite = Invite(*row)
    if invite.expires_at is not None and invite.expires_at <= now:
        raise chat_error("INVITE_EXPIRED", field="code")
    if invite.max_uses is not None and invite.uses >= invite.max_uses:
        raise chat_error("INVITE_SPENT", field="code")
    return invite


def insert_channel(db: sqlite3.Connection, server_id: int, name: str, kind: ChannelKind, topic: str) -> tuple[Channel, int]:
    """Insert a channel; return it and the change's `seq`. Raises CONFLICT if the name is taken or there are `MAX_CHANNELS`."""
    (count,) = db.execute("SELECT count(*) FROM channels WHERE server_id = ?", (server_id,)).fetchone()
    if count >= MAX_CHANNELS:
        raise chat_error("TOO_MANY", n=MAX_CHANNELS)
    row = db.execute(
        """INSERT INTO channels (server_id, name, name_key, kind, topic) VALUES (?, ?, ?, ?, ?)
           ON CONFLICT (server_id, name_key) DO NOTHING RETURNING server_id, channel_id, name, kind, topic""",
        (server_id, name, name_key(name), kind, topic),
    ).fetchone()
    if row is None:
        raise chat_error("CHANNEL_TAKEN", field="name")
    return Channel(*row), next_seq(db, server_id, "channels")


def update_channel(db: sqlite3.Connection, channel: Channel) -> int:
    """Store a channel's fields and return the change's `seq`. Raises CONFLICT if another channel has that name."""
    change = """UPDATE OR IGNORE channels SET name = :name, name_key = :name_key, topic = :topic, posting = :posting,
                slow_seconds = :slow_seconds, keep_days = :keep_days WHERE channel_id = :channel_id"""
    if not db.execute(change, msgspec.structs.asdict(channel) | {"name_key": name_key(channel.name)}).rowcount:
        raise chat_error("CHANNEL_TAKEN", field="name")
    return next_seq(db, channel.server_id, "channels")


INTEGRITY_CHECKS = {  # what each query finds
    "a server without an owner, or a conversation with one": """SELECT server_id FROM servers s WHERE (kind = 'direct') =
        EXISTS (SELECT 1 FROM members m WHERE m.server_id = s.server_id AND role = 'owner')""",
    "a seq above that of its server": "SELECT message_id FROM messages m JOIN servers s USING (server_id) WHERE m.seq > s.seq",
    "a message whose channel is in another server":
        "SELECT message_id FROM messages m JOIN channels c USING (channel_id) WHERE c.server_id <> m.server_id",
    "a reply to a message that is missing or in another channel":
        """SELECT m.message_id FROM messages m JOIN channels c ON c.channel_id = m.channel_id AND c.server_id IS NOT NULL
        LEFT JOIN messages r ON r.message_id = m.reply_to WHERE m.reply_to IS NOT NULL AND r.channel_id IS NOT m.channel_id""",
    "a pin of a deleted message, or in another channel":
        "SELECT p.pin_id FROM pins p JOIN messages m USING (message_id) WHERE m.deleted = 1 OR p.channel_id <> m.channel_id",
    "a deleted message with text": "SELECT message_id FROM messages WHERE deleted = 1 AND content <> ''",
    "a file whose message is deleted or in another channel":
        "SELECT file_id FROM files f JOIN messages m USING (message_id) WHERE m.deleted = 1 OR m.channel_id <> f.channel_id",
    "a hook whose bot is not a member, or whose channel is in another server": """SELECT hook_id FROM hooks h WHERE NOT EXISTS (
        SELECT 1 FROM members m JOIN channels c USING (server_id)
        WHERE m.server_id = h.server_id AND m.user_id = h.user_id AND c.channel_id = h.channel_id)""",
    "a wrong total size of all files":
        "SELECT bytes FROM stored WHERE bytes <> (SELECT coalesce(sum(length(data)), 0) FROM pieces)",
}  # fmt: skip


def changed_files(db: sqlite3.Connection) -> Iterator[int]:
    """Read all files, and yield the id of each whose bytes are not those that were uploaded."""
    complete = "SELECT file_id, size, digest FROM files WHERE digest IS NOT NULL AND channel_id IS NOT NULL"
    for file_id, size, digest in db.execute(complete):
        end, sha256 = 0, hashlib.sha256()
        for number, data in db.execute("SELECT number, data FROM pieces WHERE file_id = ? ORDER BY number", (file_id,)):
            end = number * PIECE_BYTES + len(data)
            sha256.update(data)
        if (end, sha256.digest()) != (size, digest):
            yield file_id


SCHEMA_PARTS = """SELECT type || ' ' || name FROM sqlite_master UNION
    SELECT 'column ' || t.name || '.' || c.name FROM sqlite_master t JOIN pragma_table_xinfo(t.name) c WHERE t.type = 'table'"""


def missing_parts(db: sqlite3.Connection) -> list[str]:
    """Return the tables, columns and indexes of the newest format that a database lacks."""
    with contextlib.closing(sqlite3.connect(":memory:")) as new:
        new.executescript(asset("schema.sql").decode())
        parts = {row[0] for row in new.execute(SCHEMA_PARTS)}
    return sorted(parts - {row[0] for row in db.execute(SCHEMA_PARTS)})


def check_integrity(db: sqlite3.Connection) -> list[str]:
    """Return the errors found in a database, one per line. The checks of single tables run only on the newest format."""
    lines = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    if read_format(db) == SCHEMA_FORMAT:
        lines += [f"missing: {part}" for part in missing_parts(db)]
    if lines:
        return lines
    lines += [f"{row[0]} {row[1]} refers to a missing row of {row[2]}" for row in db.execute("PRAGMA foreign_key_check")]
    if read_format(db) == SCHEMA_FORMAT:
        lines += [f"{name}: {row[0]}" for name, query in INTEGRITY_CHECKS.items() for row in db.execute(query)]
        lines += [f"a file whose bytes have changed: {file_id}" for file_id in changed_files(db)]
    return lines


# ---- File queries --------------------------------------------------------------------------------------------------
# The SQL for files. A file is removed by taking it out of its channel: from then on nobody can read it. Maintenance deletes its
# pieces in small steps, because `secure_delete` overwrites each of their pages, and at last its row.

MAX_UNATTACHED_FILES = 100  # per account: files that belong to no message yet
UPLOAD_SECONDS = 3600.0  # time limit of an upload
# A file that belongs to no message after this time is removed. By then no process is still uploading it.
UNATTACHED_SECONDS = UPLOAD_SECONDS + 60
PIECES_PER_STEP = 4  # pieces deleted in one transaction


class StoredFile(NamedTuple):
    """A complete file, with the ids that decide who may read it."""

    file: File
    digest: bytes
    uploader_id: int
    channel_id: int
    message_id: int | None  # None: it belongs to no message yet


count_pieces: Query[int] = first_value("SELECT count(*) FROM pieces")
load_removed_file: Query[int | None] = first_value("SELECT file_id FROM files WHERE channel_id IS NULL LIMIT 1")
remove_file = statement("UPDATE files SET channel_id = NULL WHERE file_id = ?")
remove_files_of_messages = statement(  # of the messages of a channel (?1) up to ?2
    """UPDATE files SET channel_id = NULL WHERE message_id IN (
           SELECT message_id FROM messages WHERE channel_id = ? AND message_id <= ?)"""
)
remove_unfinished_files = statement("UPDATE files SET channel_id = NULL WHERE message_id IS NULL AND digest IS NULL")
complete_file = statement(
    """UPDATE files SET name = ?2, type = ?3, size = ?4, width = ?5, height = ?6, alt = ?7, digest = ?8, uploaded_at = ?9
       WHERE file_id = ?1"""
)
attach_file = statement("UPDATE files SET message_id = ?, place = ? WHERE file_id = ?")


def remove_unattached_files(db: sqlite3.Connection) -> Result[None]:
    """Remove the files that belong to no message UNATTACHED_SECONDS after their upload."""
    old = "UPDATE files SET channel_id = NULL WHERE message_id IS NULL AND channel_id IS NOT NULL AND uploaded_at < ?"
    db.execute(old, (time.time() - UNATTACHED_SECONDS,))
    return Result(None)


def load_stored_file(db: sqlite3.Connection, file_id: int) -> StoredFile | None:
    """Return a file, or None if it does not exist, is incomplete or removed."""
    row = db.execute(
        """SELECT file_id, name, type, size, width, height, alt, digest, uploader_id, channel_id, message_id FROM files
           WHERE file_id = ? AND digest IS NOT NULL AND channel_id IS NOT NULL""",
        (file_id,),
    ).fetchone()
    return StoredFile(File(*row[:7]), *row[7:]) if row else None


def load_attachable_file(db: sqlite3.Connection, file_id: int, user_id: int, channel_id: int) -> File:
    """Return a file that a user can post in a channel. Raises NOT_FOUND unless the user uploaded it to this channel, and
    CONFLICT if it was posted already, in this channel or by this user."""
    stored = load_stored_file(db, file_id)
    if stored and stored.message_id is not None and (stored.uploader_id == user_id or stored.channel_id == channel_id):
        raise chat_error("FILE_ATTACHED", field="files")
    if stored is None or (stored.uploader_id, stored.channel_id) != (user_id, channel_id):
        raise chat_error("NO_FILE", field="files")
    return stored.file


def check_file_size(db: sqlite3.Connection, size: int, most: int, more: int, quota: int) -> None:
    """Raise TOO_LARGE if a file of that size is too large, and UNAVAILABLE if `more` bytes of it exceed the quota."""
    if size > most:
        raise chat_error("BODY_LONG", n=most)
    if db.execute("SELECT bytes FROM stored").fetchone()[0] + more > quota:
        raise chat_error("FILES_FULL")


def insert_file(db: sqlite3.Connection, user_id: int, channel_id: int, size: int, most: int, quota: int) -> int:
    """Insert the row of an upload and return its id. Raises CONFLICT if the user has MAX_UNATTACHED_FILES."""
    check_file_size(db, size, most, size, quota)
    unattached = "SELECT count(*) FROM files WHERE uploader_id = ? AND message_id IS NULL AND channel_id IS NOT NULL"
    if db.execute(unattached, (user_id,)).fetchone()[0] >= MAX_UNATTACHED_FILES:
        raise chat_error("TOO_MANY", n=MAX_UNATTACHED_FILES)
    insert = "INSERT INTO files (channel_id, uploader_id, uploaded_at, name, type, size) VALUES (?, ?, ?, '', '', 0)"
    return db.execute(insert, (channel_id, user_id, time.time())).lastrowid or 0


def insert_piece(db: sqlite3.Connection, file_id: int, number: int, data: bytes, most: int, quota: int) -> None:
    """Store a piece of an upload. Raises ChatError if the file is too large, was removed, or would exceed the quota."""
    check_file_size(db, number * PIECE_BYTES + len(data), most, len(data), quota)
    if not db.execute("SELECT 1 FROM files WHERE file_id = ? AND channel_id IS NOT NULL", (file_id,)).fetchone():
        raise chat_error("NO_FILE")
    row = db.execute("INSERT INTO pieces VALUES (?, ?, zeroblob(?))", (file_id, number, len(data)))
    with db.blobopen("pieces", "data", row.lastrowid or 0) as blob:  # saves SQLite two copies
        blob.write(data)
    db.execute("UPDATE stored SET bytes = bytes + ?", (len(data),))


def load_file_part(db: sqlite3.Connection, file_id: int, start: int, size: int) -> bytes:
    """Return at most `size` bytes of a file from `start`, all of one piece. Raises NOT_FOUND if the file was removed."""
    part = """SELECT substr(data, ?, ?) FROM pieces JOIN files USING (file_id)
              WHERE file_id = ? AND number = ? AND channel_id > 0"""
    row = db.execute(part, (start % PIECE_BYTES + 1, size, file_id, start // PIECE_BYTES)).fetchone()
    if not row or not row[0]:
        raise chat_error("NO_FILE")
    return bytes(row[0])


def purge_removed_file(db: sqlite3.Connection) -> Result[None]:
    """Delete the next pieces of a removed file, and its row after the last ones."""
    file_id = load_removed_file(db)
    query = "SELECT length(data), rowid FROM pieces WHERE file_id = ? ORDER BY number DESC LIMIT ?"
    pieces = db.execute(query, (file_id, PIECES_PER_STEP)).fetchall()
    db.executemany("DELETE FROM pieces WHERE rowid = ?", [piece[1:] for piece in pieces])
    db.execute("UPDATE stored SET bytes = bytes - ?", (sum(size for size, _ in pieces),))
    if len(pieces) < PIECES_PER_STEP:
        db.execute("DELETE FROM files WHERE file_id = ?", (file_id,))
        db.execute("UPDATE search SET stale = 1")  # the -wal may still contain its bytes
    return Result(None)


# ---- Message queries -----------------------------------------------------------------------------------------------
# The SQL for messages, reactions, mentions, pages, changes, read marks and search.

MESSAGE_FIELDS = """
    SELECT m.channel_id, m.message_id, m.content, m.author_id, u.username, m.created_at, m.seq, m.edited_at, m.reply_to,
        m.nonce, CASE WHEN m.extras THEN
            (SELECT json_group_array(json_array(r.emoji, r.user_id)) FROM reactions r WHERE r.message_id = m.message_id) END,
        CASE WHEN m.extras THEN
            (SELECT json_group_array(n.user_id) FROM mentions n WHERE n.message_id = m.message_id) END, m.deleted,
        nullif(coalesce(m.author_name, u.name), u.username),
        CASE WHEN m.extras THEN
            (SELECT json_group_array(json_array(file_id, name, type, size, width, height, alt)) FROM (
                SELECT * FROM files WHERE message_id = m.message_id ORDER BY place)) END, m.everyone,
        CASE WHEN m.extras THEN EXISTS (SELECT 1 FROM pins p WHERE p.message_id = m.message_id) END, u.source = 'bot'
"""
MESSAGE_ROWS = MESSAGE_FIELDS + "FROM messages m JOIN users u ON u.user_id = m.author_id "
IN_CHANNEL = "JOIN channels c ON c.channel_id = m.channel_id AND c.server_id = m.server_id "  # leaves out deleted channels
CHANGED_ROWS = MESSAGE_ROWS + IN_CHANNEL + "WHERE m.server_id = ? AND m.seq > ? ORDER BY m.seq LIMIT ?"
SEARCH_ROWS = MESSAGE_FIELDS + "FROM messages_fts f CROSS JOIN messages m ON m.message_id = f.rowid " + IN_CHANNEL
SEARCH_ROWS += "JOIN users u ON u.user_id = m.author_id WHERE messages_fts MATCH :match AND f.rowid < :before "
PURGED_ROWS = """SELECT m.message_id, m.channel_id, c.server_id FROM messages m JOIN channels c ON c.channel_id = m.channel_id
    WHERE m.message_id > ? AND m.message_id <= ? AND m.deleted = 0 AND c.server_id = coalesce(?, c.server_id) AND """
EXPIRED_ROWS = """SELECT message_id, channel_id, server_id FROM (
        SELECT m.message_id, m.channel_id, c.server_id, m.created_at FROM messages m JOIN channels c USING (channel_id)
        WHERE m.channel_id = ? AND m.deleted = 0 AND c.server_id IS NOT NULL ORDER BY m.message_id LIMIT ?)
    WHERE created_at < ?"""
PINNED_ROWS = MESSAGE_FIELDS + "FROM pins q CROSS JOIN messages m ON m.message_id = q.message_id JOIN users u ON "
PINNED_ROWS += """u.user_id = m.author_id WHERE q.channel_id = :channel_id AND (
    :before IS NULL OR q.pin_id < (SELECT pin_id FROM pins WHERE message_id = :before)) ORDER BY q.pin_id DESC"""
INDEXED_ROWS = """SELECT message_id, content, server_id FROM messages
                  WHERE deleted = 0 AND message_id <= (SELECT indexed_id FROM search) AND """
READ_STATE_ROWS = """  -- a user's channels: the last message read, how many are unread, how many mention the user
    SELECT channel_id, last,
        (SELECT count(*) FROM (SELECT 1 FROM (
            SELECT x.author_id FROM messages x WHERE x.channel_id = mine.channel_id AND x.message_id > last AND x.deleted = 0
            ORDER BY x.message_id DESC LIMIT :steps) WHERE author_id <> :user_id LIMIT :most)),
        (SELECT count(*) FROM (SELECT 1 FROM (
            SELECT n.message_id, x.author_id FROM mentions n JOIN messages x ON x.message_id = n.message_id AND x.everyone = 0
            WHERE n.user_id = :user_id AND n.channel_id = mine.channel_id AND n.message_id > last
            UNION ALL SELECT x.message_id, x.author_id FROM messages x
            WHERE x.channel_id = mine.channel_id AND x.message_id > last AND x.everyone = 1
            ORDER BY 1 DESC LIMIT :steps) WHERE author_id <> :user_id LIMIT :most))
    FROM (SELECT c.channel_id, c.kind, max(m.read_from, coalesce(r.last_read_id, 0)) AS last
          FROM members m JOIN channels c ON c.server_id = m.server_id
          LEFT JOIN reads r ON r.user_id = m.user_id AND r.channel_id = c.channel_id WHERE m.user_id = :user_id) AS mine
"""
MAX_UNREAD = 1000  # unread messages and mentions are counted up to this number
READ_LIMITS = {"most": MAX_UNREAD, "steps": 2 * MAX_UNREAD}  # steps: messages examined, the user's own included
MAX_RESULT_BYTES = 448 * 1024  # JSON bytes of the messages and lists in one result, which then stays below 512 KiB
VARIATIONS = {0xFE0E: None, 0xFE0F: None}  # select the plain or colored form of an emoji; the reaction is the same
MAX_REACTIONS = 50  # different emojis on one message
INDEX_STEP = 500  # messages indexed, or deleted with their channel, in one transaction
PURGE_STEP = 50  # messages deleted in one transaction if each deletion is emitted
PURGE_SCAN_STEP = 5000  # messages examined in one transaction to find them
MAX_PINS = 50  # per channel
MAX_KEEP_DAYS = 36_500

# Gives a message (?2) the server's (?1) next sequence number, because its reactions changed.
update_message_seq = server_change(
    "", "UPDATE messages SET seq = (SELECT seq FROM servers WHERE server_id = ?1), extras = 1 WHERE message_id = ?2"
)
# Clears a message (?2) that is no longer indexed. Its row stays, without the text, for clients that catch up.
clear_message = server_change(
    "",
    """UPDATE messages SET content = '', author_name = NULL, everyone = 0, deleted = 1,
           seq = (SELECT seq FROM servers WHERE server_id = ?1) WHERE message_id = ?2""",
    "DELETE FROM reactions WHERE message_id = ?2",
    "DELETE FROM mentions WHERE message_id = ?2",
    "DELETE FROM pins WHERE message_id = ?2",
    "UPDATE files SET channel_id = NULL, message_id = NULL WHERE message_id = ?2",
)
insert_mention = statement("INSERT INTO mentions VALUES (?, ?, ?)")
insert_reaction = statement("INSERT INTO reactions VALUES (?, ?, ?)")
delete_reaction = statement("DELETE FROM reactions WHERE message_id = ? AND emoji = ? AND user_id = ?")
load_last_read: Query[int] = first_value(
    """SELECT max(m.read_from, coalesce(r.last_read_id, 0)) FROM channels c JOIN members m ON m.server_id = c.server_id
       LEFT JOIN reads r ON r.user_id = m.user_id AND r.channel_id = c.channel_id WHERE c.channel_id = ? AND m.user_id = ?"""
)
load_posted_at: Query[float | None] = first_value("SELECT posted_at FROM reads WHERE user_id = ? AND channel_id = ?")
# The author of a message (?2), unless it is ?3, if they are still a member of the server (?1).
load_replied_author = rows_as(
    int,
    """SELECT b.user_id FROM messages m JOIN members b ON b.server_id = ?1 AND b.user_id = m.author_id
       WHERE m.message_id = ?2 AND m.author_id != ?3""",
)
# The ids of the newest message and of the last one in the search index.
load_index_progress: Query[tuple[int, int]] = row_as(
    lambda *row: row, "SELECT (SELECT coalesce(max(message_id), 0) FROM messages), indexed_id FROM search"
)
# Where deleted or replaced texts may still be. 0: nowhere, 1: in the search index or the -wal, 2: in the -wal only.
has_stale_texts: Query[int] = first_value("SELECT stale FROM search")
load_deleted_channel: Query[Any] = first_value("SELECT channel_id FROM channels WHERE server_id IS NULL LIMIT 1")
load_pending_purge: Query[int | None] = first_value("SELECT 1 FROM purges LIMIT 1")
delete_pin = statement("DELETE FROM pins WHERE message_id = ?")
is_pinned: Query[int | None] = first_value("SELECT 1 FROM pins WHERE message_id = ? AND channel_id = ?")
update_author_name = statement("UPDATE messages SET author_name = ?2 WHERE message_id = ?1")
# The channels that have expired messages, and the time before which these were posted. ?1: the time now in Unix seconds. ?2:
# --keep-days, the maximum for all channels.
load_expired_channels: Query[list[tuple[int, str]]] = rows_as(
    lambda *row: row,
    """SELECT channel_id, strftime('%Y-%m-%dT%H:%M:%SZ', ?1 - 86400 * min(coalesce(keep_days, ?2), ?2), 'unixepoch') AS before
       FROM channels c WHERE c.server_id IS NOT NULL AND before > (SELECT m.created_at FROM messages m
           WHERE m.channel_id = c.channel_id AND m.deleted = 0 ORDER BY m.message_id LIMIT 1)""",
)


def message_from_row(row: Sequence[Any]) -> Message:
    message = Message(*row[:10])
    message.author_name, message.everyone, message.bot = row[13], bool(row[15]), bool(row[17])
    if row[10] is not None:
        emojis: dict[str, list[int]] = {}
        for emoji, user_id in json.loads(row[10]):
            emojis.setdefault(emoji, []).append(user_id)
        message.reactions = [Reaction(emoji, user_ids) for emoji, user_ids in emojis.items()]
        message.mentions = json.loads(row[11])
        message.files = [File(*fields) for fields in json.loads(row[14])]
        message.pinned = bool(row[16])
    return message


def load_message(db: sqlite3.Connection, message_id: int) -> Message | None:
    """Return a message, or None if it does not exist or is deleted."""
    row = db.execute(MESSAGE_ROWS + "WHERE m.message_id = ? AND m.deleted = 0", (message_id,)).fetchone()
    return message_from_row(row) if row else None


def load_message_by_nonce(db: sqlite3.Connection, author_id: int, channel_id: int, nonce: str) -> Message | None:
    """Return the message posted with this nonce, or None. Raises CONFLICT if it is deleted."""
    posted = "WHERE m.author_id = ? AND m.channel_id = ? AND m.nonce = ?"
    row = db.execute(MESSAGE_ROWS + posted, (author_id, channel_id, nonce)).fetchone()
    if row is not None and row[12]:
        raise chat_error("MESSAGE_DELETED")
    return message_from_row(row) if row else None


@functools.cache
def member_query(count: int) -> str:
    """Return a query that takes a server and so many name keys. Its value is the id of the member with the first of these keys
    that belongs to one, or NULL. One statement for each key would make an `@` with two keys a third more expensive."""
    members = "SELECT m.user_id FROM users u CROSS JOIN members m ON m.user_id = u.user_id WHERE m.server_id = ?1"
    return f"SELECT coalesce({', '.join(f'({members} AND u.username_key = ?{n + 2})' for n in range(count))}, NULL)"


def mentioned_member(db: sqlite3.Connection, server_id: int, keys: Sequence[str], by_staff: bool) -> int | None:
    """Return the id of the member that the longest of these name keys (shortest first) belongs to, 0 for everyone, or None."""
    names_everyone = by_staff and EVERYONE in keys
    if names_everyone:
        keys = keys[keys.index(EVERYONE) + 1 :]
    user_id: int | None = db.execute(member_query(len(keys)), (server_id, *reversed(keys))).fetchone()[0] if keys else None
    return 0 if user_id is None and names_everyone else user_id


def load_mentions(
    db: sqlite3.Connection, server_id: int, author_id: int, content: str, reply_to: int | None, by_staff: bool
) -> tuple[list[int], bool]:
    """Return the ids of the members whom a message mentions: by `@handle` (for each `@`, the longest handle that matches), and
    the author of the message that it replies to, unless that is its own author. At most `MAX_MENTIONS`, those named first, with
    ascending ids. Also return whether it mentions everyone, as messages by staff can."""
    ids = load_replied_author(db, server_id, reply_to, author_id) if reply_to is not None else []
    everyone = False
    for keys in possible_mentions(content):
        user_id = mentioned_member(db, server_id, keys, by_staff)
        if user_id == 0:
            everyone = True
        elif user_id is not None and user_id not in ids:
            ids.append(user_id)
    return sorted(ids[:MAX_MENTIONS]), everyone


def insert_message(
    db: sqlite3.Connection, server_id: int, author: Principal, args: NewMessage, now: str, by_staff: bool = False,
    before: int | None = None,
) -> Message:  # fmt: skip
    """Add a message. `before`: the server's sequence number so far, if it is known."""
    mentions, everyone = load_mentions(db, server_id, author.user_id, args.content, args.reply_to, by_staff)
    seq, extras = next_seq(db, server_id, before=before), bool(mentions or args.files)
    reply_to, nonce = args.reply_to or 0, args.nonce or ""  # sqlite3 takes 0.5 us longer for each None and bool
    message_id = db.execute(
        """INSERT INTO messages (server_id, channel_id, author_id, content, created_at, reply_to, nonce, seq, extras, everyone)
           VALUES (?, ?, ?, ?, ?, nullif(?, 0), nullif(?, ''), ?, ?, ?)""",
        (server_id, args.channel_id, author.user_id, args.content, now, reply_to, nonce, seq, int(extras), int(everyone)),
    ).lastrowid
    assert message_id is not None
    for user_id in mentions:
        insert_mention(db, message_id, user_id, args.channel_id)
    return Message(
        args.channel_id, message_id, args.content, author.user_id, author.username, now, seq,
        reply_to=args.reply_to, nonce=args.nonce, mentions=mentions, author_name=author.name, everyone=everyone, bot=author.bot,
    )  # fmt: skip


def write_index(db: sqlite3.Connection, command: str | None, rows: Iterable[tuple[int, str, int]]) -> None:
    """Add messages (id, content, server) to the search index, or remove them by the command "delete". It is one statement,
    because the index writes a segment for each, and merging many segments takes long."""
    values = [(message_id, search_text(content), server_id) for message_id, content, server_id in rows]
    statement = """INSERT INTO messages_fts (messages_fts, rowid, content, server_id)
        SELECT ?, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]') FROM json_each(?)"""
    db.execute(statement, (command, msgspec.json.encode(values).decode()))


def unindex(db: sqlite3.Connection, where: str, *values: Any) -> bool:
    """Remove messages from the search index. Call this before their text changes. Return whether any of them was indexed."""
    rows = db.execute(INDEXED_ROWS + where, values).fetchall()
    write_index(db, "delete", rows)
    db.execute("UPDATE search SET stale = 1")
    return bool(rows)


def merge_index(db: sqlite3.Connection) -> Result[bool]:
    """Merge the search index by one step. Return whether it is fully merged: only the -wal may then contain deleted texts."""
    changes = db.total_changes
    db.execute("INSERT INTO messages_fts (messages_fts, rank) VALUES ('merge', -500)")  # pages
    merged = db.total_changes - changes < 2  # documented by SQLite as the sign that nothing was left to merge
    if merged:
        db.execute("UPDATE search SET stale = 2")
    return Result(merged)


def update_message(db: sqlite3.Connection, server_id: int, message: Message, content: str, now: str, by_staff: bool) -> None:
    """Replace the text of a message, and update its mentions and the search index."""
    is_indexed = unindex(db, "message_id = ?", message.message_id)
    mentions, everyone = load_mentions(db, server_id, message.author_id, content, message.reply_to, by_staff)
    values = (content, now, next_seq(db, server_id), everyone, message.message_id)
    db.execute("UPDATE messages SET content = ?, edited_at = ?, seq = ?, everyone = ?, extras = 1 WHERE message_id = ?", values)
    if is_indexed:
        write_index(db, None, [(message.message_id, content, server_id)])
    db.execute("DELETE FROM mentions WHERE message_id = ?", (message.message_id,))
    for user_id in mentions:
        insert_mention(db, message.message_id, user_id, message.channel_id)


def delete_messages(db: sqlite3.Connection, rows: Sequence[tuple[int, int, int]]) -> list[Effect]:
    """Delete messages (id, channel, server) and return an event for each."""
    if not rows:
        return []
    unindex(db, "message_id IN (SELECT value FROM json_each(?))", str([message_id for message_id, _, _ in rows]))
    return [
        Emit("message:deleted", server_id, Deletion(channel_id, message_id, clear_message(db, server_id, message_id)))
        for message_id, channel_id, server_id in rows
    ]


def purge_deleted_channel(db: sqlite3.Connection) -> Result[None]:
    """Delete the next messages of a deleted channel, or the channel if it has none left."""
    channel_id = load_deleted_channel(db)
    last = "SELECT max(message_id) FROM (SELECT message_id FROM messages WHERE channel_id = ? ORDER BY message_id LIMIT ?)"
    (until,) = db.execute(last, (channel_id, INDEX_STEP)).fetchone()
    if until is None:
        db.execute("DELETE FROM channels WHERE channel_id = ?", (channel_id,))
    else:
        unindex(db, "channel_id = ? AND message_id <= ?", channel_id, until)
        remove_files_of_messages(db, channel_id, until)
        db.execute("DELETE FROM messages WHERE channel_id = ? AND message_id <= ?", (channel_id, until))
    return Result(None)


def purge_next_messages(db: sqlite3.Connection) -> Result[None]:
    """Delete the next messages of the newest purge, newest first, and emit an event for each."""
    query = "SELECT purge_id, last_id, author_id, channel_id, server_id FROM purges ORDER BY purge_id DESC LIMIT 1"
    row = db.execute(query).fetchone()
    if row is None:
        return Result(None)
    purge_id, last_id, author_id, channel_id, server_id = row
    first_id = last_id - PURGE_SCAN_STEP if channel_id is None else 0  # a channel's messages are found by an index
    whose = "m.author_id = ?" if channel_id is None else "m.channel_id = ?"
    values = (first_id, last_id, server_id, channel_id or author_id, PURGE_STEP)
    rows = db.execute(PURGED_ROWS + whose + " ORDER BY m.message_id DESC LIMIT ?", values).fetchall()
    before = rows[-1][0] - 1 if len(rows) == PURGE_STEP else first_id
    (left,) = db.execute("SELECT max(message_id) FROM messages WHERE message_id <= ?", (before,)).fetchone()
    if left is None:
        db.execute("DELETE FROM purges WHERE purge_id = ?", (purge_id,))
    else:
        db.execute("UPDATE purges SET last_id = ? WHERE purge_id = ?", (left, purge_id))
    return Result(None, delete_messages(db, rows))


def start_purge(
    db: sqlite3.Connection, server_id: int | None, author_id: int | None, channel_id: int | None = None
) -> Sequence[Effect]:
    """Delete all messages of an author in a server (None: in all servers), or of a channel: the newest now, others in steps.
    Return the effects of the deletions made now. It takes milliseconds, so the operation must be `slow`."""
    db.execute("DELETE FROM purges WHERE channel_id = ?", (channel_id,))  # the new one includes it
    newest = "SELECT ?, ?, ?, coalesce(max(message_id), 0) FROM messages"
    db.execute("INSERT INTO purges (server_id, author_id, channel_id, last_id) " + newest, (server_id, author_id, channel_id))
    return purge_next_messages(db).effects


def delete_expired_messages(db: sqlite3.Connection, channel_id: int, before: str) -> Result[bool]:
    """Delete the oldest messages of a channel that were posted before a time, and return whether there may be more."""
    rows = db.execute(EXPIRED_ROWS, (channel_id, PURGE_STEP, before)).fetchall()
    return Result(len(rows) == PURGE_STEP, delete_messages(db, rows))


def take_messages(rows: Iterable[Sequence[Any]], limit: int, max_bytes: int = MAX_RESULT_BYTES) -> Messages:
    """Return the first messages of the rows: at most `limit`, and at most `max_bytes` of JSON unless the first is larger."""
    taken = Messages([], False)
    for row in rows:
        message = message_from_row(row)
        max_bytes -= len(msgspec.json.encode(message))
        if limit == 0 or (taken.messages and (max_bytes < 0 or len(taken.messages) == limit)):
            return Messages(taken.messages, True)
        taken.messages.append(message)
    return taken


def load_page_part(db: sqlite3.Connection, channel_id: int, where: str, cursor: int, limit: int, max_bytes: int) -> Messages:
    """Return the messages nearest to the cursor on one side of it (`where`: ">", "<" or "<="), oldest first."""
    order = "ASC" if where == ">" else "DESC"
    rows = db.execute(
        f"{MESSAGE_ROWS} WHERE m.channel_id = ? AND m.message_id {where} ? AND m.deleted = 0 "
        f"ORDER BY m.message_id {order} LIMIT ?",
        (channel_id, cursor, limit + 1),
    )
    part = take_messages(rows, limit, max_bytes)
    part.messages.sort(key=operator.attrgetter("message_id"))
    return part


def load_page(db: sqlite3.Connection, args: PageArgs) -> Messages:
    """Return a page of a channel, oldest first. The cost, `limit` index steps, does not depend on the cursor."""
    load_part = functools.partial(load_page_part, db, args.channel_id)
    if args.after is not None:
        return load_part(">", args.after, args.limit, MAX_RESULT_BYTES)
    if args.around is None:
        return load_part("<", args.before if args.before is not None else 2**63 - 1, args.limit, MAX_RESULT_BYTES)
    newer = load_part(">", args.around, args.limit // 2, MAX_RESULT_BYTES // 2)
    older = load_part("<=", args.around, args.limit - len(newer.messages), MAX_RESULT_BYTES // 2)
    return Messages(older.messages + newer.messages, newer.has_more or older.has_more)


class ResultCache(dict[tuple[Any, ...], tuple[int, Any]]):
    """A cache of results, by arguments. An entry is valid while its server's `seq` is unchanged. When 30 pupils open a channel,
    or come back after a restart, all request the same: loading a page takes 120 us, a look-up here 5 us."""

    MAX_ENTRIES = 256
    MAX_BYTES = 131_072  # of text in an entry, so that all entries together take at most 64 MiB

    def find(self, args: Args, seq: int) -> Any:
        """Return the result, or None if there is none, or the server has changed since."""
        cached_seq, result = self.get(msgspec.structs.astuple(args), (-1, None))
        return result if cached_seq == seq else None

    def store(self, args: Args, seq: int, result: Any, size: int) -> None:
        if size <= self.MAX_BYTES:
            self[msgspec.structs.astuple(args)] = seq, result
        if len(self) > self.MAX_ENTRIES:
            del self[next(iter(self))]


def load_pins(db: sqlite3.Connection, args: PinsArgs) -> Messages:
    """Return the pinned messages of a channel, latest pin first. Raises NOT_FOUND if `before` is not one of them."""
    if args.before is not None and not is_pinned(db, args.before, args.channel_id):
        raise chat_error("NO_MESSAGE", field="before")  # its place in the list is not known any more
    return take_messages(db.execute(PINNED_ROWS, msgspec.structs.asdict(args)), MAX_PINS)


def insert_pin(db: sqlite3.Connection, message: Message) -> int:
    """Pin a message and return 1, or 0 if it is pinned already. Raises CONFLICT if the channel has `MAX_PINS`."""
    (count,) = db.execute("SELECT count(*) FROM pins WHERE channel_id = ?", (message.channel_id,)).fetchone()
    if count >= MAX_PINS and not message.pinned:
        raise chat_error("TOO_MANY", n=MAX_PINS)
    values = (message.channel_id, message.message_id)
    return db.execute("INSERT OR IGNORE INTO pins (channel_id, message_id) VALUES (?, ?)", values).rowcount


def load_changes(db: sqlite3.Connection, args: ChangesArgs, connected: Collection[int], viewer: int) -> Changes:
    """Return a server's changes after a sequence number, in order: at most `limit` messages and `MAX_RESULT_BYTES` of JSON, but
    at least one change. A changed list is included whole. If a restore removed changes that the client has seen, return
    everything, with `reset`."""
    values = {"server_id": args.server_id, "user_id": viewer}
    row = db.execute(SERVER_FIELDS + " FROM servers s WHERE s.server_id = :server_id", values).fetchone()
    _, name, _, _, seq, is_unnamed, channels_seq, members_seq, name_seq = row
    gap = "SELECT 1 FROM gaps WHERE server_id = ? AND after_seq < ? AND ? < until_seq"
    reset = args.after > seq or db.execute(gap, (args.server_id, args.after, args.after)).fetchone() is not None
    after = 0 if reset else args.after
    members = functools.partial(load_members, db, args.server_id, connected, viewer)
    made_name: dict[str, Any] = {"name": name} if is_unnamed else {}  # it changes with the members
    lists: dict[int, Callable[[], dict[str, Any]]] = {
        channels_seq: lambda: {"channels": load_channels(db, args.server_id)},
        members_seq: lambda: {"members": members(), "former": load_former_members(db, args.server_id)} | made_name,
        name_seq: lambda: {"name": name},
    }
    list_seqs = [(list_seq, None) for list_seq in sorted(lists) if list_seq > after]
    rows = ((row[6], row) for row in db.execute(CHANGED_ROWS, (args.server_id, after, args.limit + 1)))
    changes = Changes(after, False, [], [], reset=reset, name=name if reset else UNSET)
    size = 0
    for at, row in heapq.merge(rows, list_seqs, key=operator.itemgetter(0)):
        value: Any = lists[at]() if row is None else Deletion(row[0], row[1], at) if row[12] else message_from_row(row)
        size += len(msgspec.json.encode(value))
        is_full = row is not None and len(changes.messages) + len(changes.deleted) == args.limit
        if is_full or (size > MAX_RESULT_BYTES and changes.seq > after):
            changes.has_more = True
            return changes
        if row is None:
            changes = msgspec.structs.replace(changes, **value)
        else:
            (changes.deleted if row[12] else changes.messages).append(value)
        changes.seq = at
    changes.seq = seq
    return changes


def load_read_states(db: sqlite3.Connection, user_id: int, channel_id: int | None = None) -> list[ReadState]:
    """Return a user's read state in each text channel, or in that channel, in one query."""
    where = "WHERE kind = 'text' ORDER BY channel_id" if channel_id is None else "WHERE channel_id = :channel_id"
    values = {"user_id": user_id, "channel_id": channel_id} | READ_LIMITS
    rows = db.execute(READ_STATE_ROWS + where, values)
    return [ReadState(one, last, max(unread, mentions), mentions) for one, last, unread, mentions in rows]


def update_last_read(
    db: sqlite3.Connection, user_id: int, channel_id: int, message_id: int, posted_at: float | None = None
) -> None:
    """Move a read mark, because the user read the message or, at the time `posted_at`, posted it."""
    values = (message_id, posted_at, user_id, channel_id)
    change = "UPDATE reads SET last_read_id = ?, posted_at = coalesce(?, posted_at) WHERE user_id = ? AND channel_id = ?"
    if not db.execute(change, values).rowcount:
        db.execute("INSERT INTO reads (last_read_id, posted_at, user_id, channel_id) VALUES (?, ?, ?, ?)", values)


def move_read_mark(db: sqlite3.Connection, user_id: int, args: MarkReadArgs) -> ReadState | None:
    """Move a read mark, backwards only with `back`. Return the new state, or None if the mark did not move. Raises NOT_FOUND
    unless the message is in the channel; with `back`, any id up to the channel's newest message is accepted."""
    accepted = """SELECT 1 FROM messages WHERE message_id = :message_id AND channel_id = :channel_id UNION ALL SELECT 1
                  WHERE :back AND (:message_id = 0 OR EXISTS (SELECT 1 FROM messages
                        WHERE channel_id = :channel_id AND message_id > :message_id AND deleted = 0))"""
    if not db.execute(accepted, msgspec.structs.asdict(args)).fetchone():
        raise chat_error("NO_MESSAGE", field="message_id")
    before = load_last_read(db, args.channel_id, user_id)
    if args.message_id == before or (args.message_id < before and not args.back):
        return None
    update_last_read(db, user_id, args.channel_id, args.message_id)
    (after,) = load_read_states(db, user_id, args.channel_id)
    return after if after.last_read_id != before else None


def index_messages(db: sqlite3.Connection) -> Result[int]:
    """Add the next messages to the search index and return the id of the last one in it."""
    _, indexed_id = load_index_progress(db)
    rows = db.execute(
        "SELECT message_id, content, server_id, deleted FROM messages WHERE message_id > ? ORDER BY message_id LIMIT ?",
        (indexed_id, INDEX_STEP),
    ).fetchall()
    if rows:
        write_index(db, None, [row[:3] for row in rows if not row[3]])
        indexed_id = rows[-1][0]
        db.execute("UPDATE search SET indexed_id = ?", (indexed_id,))
    return Result(indexed_id)


def load_search_results(db: sqlite3.Connection, args: SearchArgs) -> Messages:
    """Return the messages that contain every word and phrase, newest first."""
    match = f'server_id : "{args.server_id}" AND content : ({search_phrases(args.q)})'
    before = args.before if args.before is not None else 2**63 - 1
    values = msgspec.structs.asdict(args) | {"match": match, "before": before, "limit": args.limit + 1}
    narrow = "".join(f"AND m.{field} = :{field} " for field in ("channel_id", "author_id") if values[field] is not None)
    rows = db.execute(SEARCH_ROWS + narrow + "ORDER BY f.rowid DESC LIMIT :limit", values)
    return take_messages(rows, args.limit)


def load_channel_messages(db: sqlite3.Connection, channel_id: int) -> Iterator[Message]:
    """Return an iterator over all messages of a channel, oldest first."""
    rows = db.execute(MESSAGE_ROWS + "WHERE m.channel_id = ? AND m.deleted = 0 ORDER BY m.message_id", (channel_id,))
    return map(message_from_row, rows)


# ---- Transcript ----------------------------------------------------------------------------------------------------
# The messages of channels as one HTML file. It is made in parts, so that its length does not matter. The parts are small,
# because a thread that works for long delays the event loop.

TRANSCRIPT_STEP, TRANSCRIPT_BYTES = 100, 1 << 16  # messages, and bytes of their JSON, that are loaded together
TRANSCRIPT_PART = 1 << 15  # characters
TRANSCRIPT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TRANSCRIPT_HEAD = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>%s</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{TRANSCRIPT_POLICY}"><style>
body {{ font: 1em/1.5 sans-serif; margin: 2em auto; max-width: 45em; padding: 0 1em; overflow-wrap: anywhere }}
p {{ margin: .5em 0; white-space: pre-wrap; unicode-bidi: plaintext }} b, time {{ unicode-bidi: isolate }}
img {{ display: block; max-width: 100%%; height: auto }}
time, small {{ font-size: .8em; opacity: .8 }} small {{ display: block }}</style></head><body>
"""
HANDLE = re.compile(f"@({AFTER_AT.pattern})")


def export_name(file: File) -> str:
    """Return the name under which a file is exported."""
    return f"{file.file_id}-{clean_file_name(file.name)}"


class Transcript:
    """The messages of channels as an HTML page with pictures and without scripts. `servers`: their names and channels.
    With `hidden`, people are called "Person 1", "Person 2" and so on, also in mentions. `folder`: where the files are,
    %-encoded."""

    def __init__(self, servers: Sequence[tuple[str, list[Channel]]], hidden: bool = False, folder: str | None = None) -> None:
        self.servers, self.hidden, self.folder = servers, hidden, folder
        self.count = 0  # the number of messages so far
        self.numbers: dict[int, int] = {}  # user id -> number
        self.names: dict[int, str] = {}  # user id -> name, for the messages of the current part
        self.handles: dict[str, int] = {}  # name key of a username -> user id, for them
        self.originals: dict[int, Message] = {}  # id -> message that one of them replies to
        self._parts = self._write_page()

    def read(self, db: sqlite3.Connection) -> str | None:
        """Return the next part of the page, None at its end. Each part may be read from a different snapshot."""
        self._db, parts, size = db, list[str](), 0
        while size < TRANSCRIPT_PART and (part := next(self._parts, None)) is not None:
            parts.append(part)
            size += len(part)
        return "".join(parts) if parts else None

    def _write_page(self) -> Iterator[str]:
        newest, _ = load_index_progress(self._db)  # messages posted from now on are left out
        yield TRANSCRIPT_HEAD % html.escape(", ".join(name for name, _ in self.servers))
        for name, channels in self.servers:
            yield f"<h1>{html.escape(name)}</h1>\n"
            for channel in channels:
                yield f"<h2>{html.escape(channel.name)}</h2>\n"
                yield from self._write_channel(channel.channel_id, newest)
        yield f"<hr><small>{self.count} messages. Times are UTC.</small></body></html>\n"

    def _write_channel(self, channel_id: int, newest: int) -> Iterator[str]:
        page = load_page_part(self._db, channel_id, ">", 0, TRANSCRIPT_STEP, TRANSCRIPT_BYTES)
        while messages := [message for message in page.messages if message.message_id <= newest]:
            self._look_up(messages)
            for message in messages:
                yield from self._write_message(message)
                self.count += 1
            page = load_page_part(self._db, channel_id, ">", messages[-1].message_id, TRANSCRIPT_STEP, TRANSCRIPT_BYTES)

    def _look_up(self, messages: list[Message]) -> None:
        """Load what these messages need: the messages they reply to, and names or, if these are hidden, usernames."""
        originals = [load_message(self._db, message.reply_to) for message in messages if message.reply_to]
        self.originals = {message.message_id: message for message in originals if message}
        for message in self.originals.values():
            message.content = message.content[:1000]  # 100 characters of it are shown, after names are hidden
        shown = [*messages, *self.originals.values()]
        if self.hidden:
            handles = {handle for message in shown for handle in HANDLE.findall(message.content)}
            self.handles = load_user_ids(self._db, {key for handle in handles for key in handle_keys(handle)})
        else:
            people = {user_id for message in messages for one in message.reactions for user_id in one.user_ids}
            self.names = load_names(self._db, people)

    def _name(self, user_id: int) -> str:
        if self.hidden:
            return f"Person {self.numbers.setdefault(user_id, len(self.numbers) + 1)}"
        return html.escape(self.names[user_id])

    def _author(self, message: Message) -> str:
        return self._name(message.author_id) if self.hidden else html.escape(message.author_name or message.author_username)

    def _text(self, message: Message) -> str:
        """Return the text of a message, without the usernames that it mentions if names are hidden."""
        return HANDLE.sub(self._hide_handle, message.content) if self.hidden else message.content

    def _hide_handle(self, found: re.Match[str]) -> str:
        key = next((key for key in reversed(handle_keys(found[1])) if key in self.handles), None)
        if key is None:
            return found[0]
        end = next(end for end in range(1, len(found[1]) + 1) if name_key(found[1][:end]).startswith(key))
        return f"@{self._name(self.handles[key])}{found[1][end:]}"

    def _write_message(self, message: Message) -> Iterator[str]:
        yield f"<p id=m{message.message_id}>"
        if message.reply_to is not None:
            original, quote = self.originals.get(message.reply_to), "a deleted message"
            if original is not None:
                words = self._text(original) or ", ".join(file.name for file in original.files)
                quote = f"{self._author(original)}: {html.escape(' '.join(words[:100].split()))}"
            yield f'<small>In reply to <a href="#m{message.reply_to}">{quote}</a></small>'
        marks = " (bot)" * message.bot + " (pinned)" * message.pinned + " (edited)" * (message.edited_at is not None)
        time = message.created_at[:16].replace("T", " ")
        yield f"<b>{self._author(message)}</b> <time>{time}{marks}</time>\n{html.escape(self._text(message))}"
        for file in message.files:
            yield from self._write_file(file)
        for reaction in message.reactions:
            yield f"<small>{html.escape(reaction.emoji)} {', '.join(map(self._name, reaction.user_ids))}</small>"
        yield "</p>\n"

    def _write_file(self, file: File) -> Iterator[str]:
        label = html.escape(f"{file.name} ({file.size} bytes)")
        if self.folder is not None:
            label = f'<a href="{html.escape(f"{self.folder}/{urllib.parse.quote(export_name(file))}")}">{label}</a>'
        if file.type in PICTURE_SIZES:
            yield f'<img alt="{html.escape(file.alt or file.name)}" src="data:{file.type};base64,'
            yield from self._encode(file)
            yield '">'
        if file.type not in PICTURE_SIZES or self.folder is not None:
            yield f"<small>{label}</small>"

    def _encode(self, file: File) -> Iterator[str]:
        at, data = 0, b""
        with contextlib.suppress(ChatError):  # the file may be deleted meanwhile
            while at < file.size:
                part = load_file_part(self._db, file.file_id, at, TRANSCRIPT_PART)
                at, data = at + len(part), data + part
                end = len(data) if at == file.size else len(data) // 3 * 3  # three bytes make four characters
                yield base64.b64encode(data[:end]).decode()
                data = data[end:]


# ---- Presence ------------------------------------------------------------------------------------------------------
# Users who are connected, typing or in a voice channel: kept in memory only, changed by plain functions that never wait.
# A user is connected to a server while one of their sockets has joined it. Invisible users are shown only to themselves.

TYPING_SECONDS = 3.0  # a user stops typing after this time without a new `typing_start`
FOREIGN = "@"  # begins the made-up sids of users and voice peers of other processes; no socket's sid contains it
TYPING_INTERVAL = 1.0  # time between two `user:typing` events of a user


def is_foreign(sid: str) -> bool:
    return sid.startswith(FOREIGN)


class Presence:
    """The users who are connected to each server, and their sockets. A user who is connected to another process has one entry:
    the `sid` of that process, in place of the sockets there. Each process announces only its own users."""

    def __init__(self) -> None:
        self.invisible: set[int] = set()  # all users with that status, connected or not
        self._online: dict[int, dict[int, set[str]]] = {}  # server -> user -> sockets
        self._ids: dict[int, list[int]] = {}  # server -> its users, ascending

    def join(self, server_id: int, user_id: int, sid: str) -> bool:
        """Add a socket. Return whether it makes the user appear to others."""
        sids = self._online.setdefault(server_id, {}).setdefault(user_id, set())
        is_first = not sids
        if is_first:
            bisect.insort(self._ids.setdefault(server_id, []), user_id)
        sids.add(sid)
        return is_first and user_id not in self.invisible

    def leave(self, server_id: int, user_id: int, sid: str) -> bool:
        """Remove a socket. Return whether it makes the user disappear for others."""
        users = self._online.get(server_id, {})
        sids = users.get(user_id, set())
        if sids != {sid}:
            sids.discard(sid)
            return False
        del users[user_id]
        self._ids[server_id].remove(user_id)
        if not users:
            del self._online[server_id], self._ids[server_id]
        return user_id not in self.invisible

    def visible(self, server_id: int, viewer: int = 0) -> list[int]:
        """Return the ids of the connected users that `viewer` may see, ascending."""
        ids = self._ids.get(server_id, []).copy()  # atomic, because reader threads call this too
        hidden = (self.invisible & self._online.get(server_id, {}).keys()) - {viewer}
        return [user_id for user_id in ids if user_id not in hidden] if hidden else ids

    def servers(self, user_id: int) -> list[int]:
        return [server_id for server_id, users in self._online.items() if user_id in users]

    def has(self, server_id: int, user_id: int, sid: str = "") -> bool:
        """Return whether the user is connected by this socket or, without `sid`, by any socket of this process."""
        sids = self._online.get(server_id, {}).get(user_id, set())
        return sid in sids if sid else not all(map(is_foreign, sids))

    def is_connected(self, server_id: int, user_id: int) -> bool:
        """Return whether the user is connected to the server, by any process."""
        return user_id in self._online.get(server_id, ())

    def users_of(self, sid: str = "") -> set[tuple[int, int]]:
        """Return the servers and users of another process or, without `sid`, of this one."""
        return {(server, user) for server, users in self._online.items() for user in users if self.has(server, user, sid)}


class TypingUser(NamedTuple):
    server_id: int
    notice: ChannelUser  # the payload of the events
    sid: str
    expires_at: float  # on the event loop's clock


class TypingTracker(dict[tuple[int, int], TypingUser]):
    """Users who are typing, by channel and user."""

    def __init__(self) -> None:
        super().__init__()
        self._announced_at: dict[int, float] = {}  # user -> time of the last announcement

    def is_due(self, user_id: int, now: float) -> bool:
        """Return whether the user's typing may be announced, which is at most once in `TYPING_INTERVAL`."""
        return now - self._announced_at.get(user_id, -TYPING_INTERVAL) >= TYPING_INTERVAL

    def start(self, server_id: int, notice: ChannelUser, sid: str, now: float) -> bool:
        """Record that a user types. Return whether to announce it."""
        key, is_due = (notice.channel_id, notice.user_id), self.is_due(notice.user_id, now)
        if is_due or key in self:
            self[key] = TypingUser(server_id, notice, sid, now + TYPING_SECONDS)
        if is_due:
            self._announced_at[notice.user_id] = now
        return is_due

    def expired(self, now: float) -> list[tuple[int, int]]:
        """Return the keys of the users who have not typed for `TYPING_SECONDS`."""
        self._announced_at = {user_id: at for user_id, at in self._announced_at.items() if now - at < TYPING_INTERVAL}
        return [key for key, one in self.items() if one.expires_at <= now]

    def of_socket(self, sid: str, server_id: int | None = None) -> list[tuple[int, int]]:
        """Return the keys of a socket's entries, in all servers or in that one."""
        return [key for key, one in self.items() if one.sid == sid and server_id in (None, one.server_id)]

    def remove(self, *, server_id: int = 0, channel_id: int = 0) -> None:
        """Remove all users of a server or of a channel."""
        for key in [key for key, one in self.items() if key[0] == channel_id or one.server_id == server_id]:
            del self[key]


class Peer(NamedTuple):
    sid: str
    server_id: int
    notice: VoicePeer  # the payload of the events


class Hand(NamedTuple):
    notice: HandRaised  # the payload of the event
    foreign: bool  # whether it was raised on another process


class VoicePeers(dict[str, Peer]):
    """The sockets in voice channels. Each socket is in one channel."""

    def in_server(self, server_id: int) -> list[Peer]:
        return [peer for peer in self.values() if peer.server_id == server_id]

    def in_channel(self, channel_id: int) -> list[Peer]:
        return [peer for peer in self.values() if peer.notice.channel_id == channel_id]


# ---- Authentication ------------------------------------------------------------------------------------------------
# Passwords and tokens. Verifying a password takes 16 MiB and about 50 ms in a separate thread, even if the account does not
# exist. A token is a JWT with one algorithm. The Hub looks up in the database whether it is revoked, and caches the result.

ALGORITHM = "HS256"
TOKEN_MAX = 4096  # characters
# Revocation compares digests, so each token must have one spelling. The decoder also accepts padding and unused end bits.
CANONICAL_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]{42}[AEIMQUYcgkosw048]", re.ASCII)
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 1
DUMMY_HASH = f"scrypt${SCRYPT_N}${SCRYPT_R}${SCRYPT_P}${secrets.token_hex(16)}${secrets.token_hex(32)}"  # matches nothing
ISSUER = "chatrtc"  # `iss` and `aud`: another program may sign its own tokens with the same secret
HASHER_THREADS = 2
HASHING_QUEUE = 256  # jobs that may wait for a hasher
HASHING_QUEUE_PER_ADDRESS = 64  # about 2 seconds of work
LINK_SECONDS = 3600  # lifetime of the link to a file
ADDRESS_SECONDS = 86400  # time between two records of the same known address
LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59Z: the expiry of tokens and mutes without an end


def hash_password(password: str, salt: bytes = b"", n: int = SCRYPT_N, r: int = SCRYPT_R, p: int = SCRYPT_P) -> str:
    salt = salt or secrets.token_bytes(16)
    key = hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=128 * n * r * 2, dklen=32)
    return f"scrypt${n}${r}${p}${salt.hex()}${key.hex()}"


def verify_password(password: str, stored: str | None) -> bool:
    """Return whether the password matches the stored hash. Without one (`None`), return False after the same time."""
    _, n, r, p, salt, _ = (stored or DUMMY_HASH).split("$")
    made = hash_password(password, bytes.fromhex(salt), int(n), int(r), int(p))
    return secrets.compare_digest(made, stored or DUMMY_HASH) and stored is not None


class PasswordHasher(FairQueue):
    """Hashes passwords on a few threads. Client addresses take turns."""

    def __init__(self, bounded: bool) -> None:
        super().__init__(HASHER_THREADS, HASHER_THREADS)
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None  # None: the chat is not running
        self._bounded = bounded

    def open(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(HASHER_THREADS, thread_name_prefix="chatrtc-scrypt")

    async def run(self, work: Callable[..., R], *args: Any) -> R:
        """Run a function in a thread. Raises UNAVAILABLE if the chat is stopped, also while the call waited for its turn."""
        if self._threads is None:
            raise ChatError("UNAVAILABLE")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def check_space(self, user: object) -> None:
        """Raise RATE_LIMITED if too many jobs of the address wait. If all queues together are full, reject the newest job of
        the longest queue instead, so that no address can fill them."""
        clients = [one for one in self._queues if not isinstance(one, ByProgram)] if self._bounded else []
        waiting = {one: self.count_waiting(one) for one in clients}
        own, longest = waiting.get(user, 0), max(waiting, key=lambda one: waiting[one], default=None)
        is_full = sum(waiting.values()) >= HASHING_QUEUE
        if own >= HASHING_QUEUE_PER_ADDRESS or (is_full and waiting[longest] <= own + 1):
            raise chat_error("SIGN_IN_BUSY", retry_after=2)
        if is_full:
            newest = next(turn for turn in reversed(self._queues[longest]) if not turn.done())
            newest.set_exception(chat_error("SIGN_IN_BUSY", retry_after=2))

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False)
        self._threads = None


def load_or_create_secret(database: Path) -> str:
    """Return the secret in the file next to the database, readable by its owner only. The first start creates it."""
    path = private_path(database, ".secret")
    with as_start_error(path):
        if not os.path.lexists(path):
            write_private(path, secrets.token_hex(SECRET_BYTES).encode(), database)
    secret = read_private(path, database).decode(errors="ignore").strip()
    if len(secret.encode()) < SECRET_BYTES:
        raise StartError(f"{path} has no secret of {SECRET_BYTES} bytes. Remove it to get a new one (signs everybody out).")
    return secret


def check_ids(user_id: Any, generation: Any) -> tuple[int, int]:
    """Return the user id and generation that a token claims. Raises ValueError if one has another type or is out of range."""
    if type(user_id) is not int or type(generation) is not int or not 0 < user_id < 2**63:
        raise ValueError
    return user_id, generation


class TokenSigner:
    """Signs and verifies tokens. Claims: `sub` (user id), `iat`, `exp`, `jti`, `iss`, `aud`, and `gen`, the account's token
    generation. Tokens of version 1.0, without `iss` and `aud`, are valid too."""

    def __init__(self, secret: str, ttl: int) -> None:
        if len(secret.encode()) < SECRET_BYTES:
            raise StartError(f"The secret is too short: it needs at least {SECRET_BYTES} bytes")
        self._secret = secret
        self._ttl = ttl

    def issue(self, user: Principal, ttl: int | None = None) -> AuthResponse:
        """Return a token for a user, valid for `ttl` seconds (default: the setting `token_ttl`)."""
        now = int(time.time())
        expires = min(now + (ttl or self._ttl), LAST_SECOND)
        claims: dict[str, Any] = {"sub": str(user.user_id), "iat": now, "exp": expires, "iss": ISSUER, "aud": ISSUER}
        claims |= {"jti": secrets.token_hex(8), "gen": user.generation}
        token = jwt.encode(claims, self._secret, algorithm=ALGORITHM)
        return AuthResponse(user.user_id, user.username, token, utc(expires), name=user.name)

    def verify(self, token: str) -> tuple[int, int, float]:
        """Return the user id, generation and expiry (Unix seconds) of a token. Raises UNAUTHORIZED if it is not valid."""
        options: Any = {"verify_iat": False, "verify_aud": False, "require": ["sub", "iat", "exp", "jti", "gen"]}
        try:
            if len(token) > TOKEN_MAX or not CANONICAL_TOKEN.fullmatch(token):
                raise ValueError
            claims = jwt.decode(token, self._secret, algorithms=[ALGORITHM], options=options)
            user_id, generation = check_ids(int(claims["sub"]), claims["gen"])
            has_times = all(type(claims[name]) in (int, float) for name in ("iat", "exp"))
            if not has_times or (claims.get("iss"), claims.get("aud")) not in ((ISSUER, ISSUER), (None, None)):
                raise ValueError
            return user_id, generation, float(claims["exp"])
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise chat_error("TOKEN_INVALID") from None

    def sign_link(self, file_id: int, user: Principal, expires: int) -> str:
        """Return the signed part of a link to a file. Until it expires, it replaces the user's token for reading this file."""
        claims = {"aud": "file", "sub": str(file_id), "exp": expires, "user": user.user_id, "gen": user.generation}
        return jwt.encode(claims | {"token": user.digest.hex()}, self._secret, algorithm=ALGORITHM)

    def verify_link(self, link: str, file_id: str) -> tuple[int, int, float, bytes]:
        """Return what `verify` returns, and the digest of the user's token. Raises UNAUTHORIZED if the link has expired, is for
        another file or is not ours."""
        try:
            claims = jwt.decode(link, self._secret, algorithms=[ALGORITHM], audience="file", subject=file_id)
            return *check_ids(claims["user"], claims["gen"]), float(claims["exp"]), bytes.fromhex(claims["token"])
        except (jwt.PyJWTError, KeyError, ValueError, TypeError, OverflowError, RecursionError):
            raise chat_error("TOKEN_INVALID") from None

    def check_digest(self) -> bytes:
        """Return a keyed hash by which servers recognize that they have the same secret."""
        return hmac.digest(self._secret.encode(), b"the same secret", "sha256")[:16]

    def address_digest(self, user_id: int, address: str) -> bytes:
        """Return a keyed hash by which the database recognizes an address that an account signed in from."""
        return hmac.digest(self._secret.encode(), f"address {user_id} {address}".encode(), "sha256")[:16]


# ---- Rate limits ---------------------------------------------------------------------------------------------------
# How often a user or an address may do something: token buckets on the monotonic clock. A school shares one address, so the
# limits by address allow for 1,000 pupils who register, mistype and sign in within a few minutes.


class Limit(NamedTuple):
    per_second: float
    burst: float
    by: Literal["user", "address", "account", "account and address", "hook"]
    counts: str  # description for the docs
    failures: bool = False  # whether only failures are counted


LIMITS = {
    "post": Limit(
        10,
        20,
        "user",
        "messages, uploads, edits, reactions, pins, hands, bans, profile changes, renamed servers, removing guests, "
        "and new servers, conversations, participants, channels, invites, sign-in codes, bots and hooks",
    ),
    "signal": Limit(20, 300, "user", "WebRTC signals (`voice:signal`)"),
    "event": Limit(8, 120, "user", "Socket.IO events, except `voice:signal` and repeated typing events"),
    "request": Limit(50, 500, "user", "REST requests with a token"),
    # Allows for 1,000 pupils, each trying one taken name first. Sustained: 3,600 accounts an hour for an address.
    "register": Limit(1, 2000, "address", "new accounts, with or without a password"),
    # Allows for one person's typing errors. One address has 7,200 guesses a day at one account's password.
    "login": Limit(5 / 60, 5, "account and address", "wrong passwords", True),
    # Limits guesses at one account's password from many addresses. Addresses that the account has signed in from are exempt.
    "login_account": Limit(5 / 60, 50, "account", "wrong passwords from addresses where the account has never signed in", True),
    # Allows for 1,000 pupils, two thirds of whom mistype. Accounts that have signed in from the address are exempt.
    "login_address": Limit(1, 600, "address", "wrong passwords for accounts that have never signed in there", True),
    # Allows for 4,000 pupils who open the page at the same time. Each page then calls it every five minutes.
    "session": Limit(20, 4000, "address", "sign-ins with the login of the site that contains the chat"),
    # Codes have 50 bits, too many to guess. This bounds the work that guessing causes, and lets one pupil in four mistype.
    "invite": Limit(1, 100, "address", "unknown invite codes, sign-in codes and secrets of hooks", True),
    "hook": Limit(1, 60, "hook", "posts by an incoming hook"),
}
SOCKETS_PER_USER = 20
MAX_BUCKETS = 20_000  # buckets of each limit, about 4 MiB
SHARED_BUCKET = object()  # key of the bucket shared by new keys while a limit's table is full
UNKNOWN_CODE_REASONS = ("INVITE_UNKNOWN", "LINK_UNKNOWN", "HOOK_UNKNOWN")


class Limiter:
    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self.announce: Callable[[str, object], None] = lambda name, key: None  # announces a failure to other processes
        # For each limit: key -> the time at which its bucket is full again, least recently examined first.
        self._tables: dict[str, OrderedDict[object, float]] = {name: OrderedDict() for name in LIMITS}

    def _bucket(self, name: str, key: object, now: float) -> tuple[object, float]:
        """Return the key of the bucket that counts for `key`, and when it is full again. Only a full bucket is removed,
        because any other may be limiting an attacker. While the table has no space, new keys share one bucket."""
        table = self._tables[name]
        for _ in range(4 if key not in table and len(table) >= MAX_BUCKETS else 0):
            oldest, full_at = next(iter(table.items()))
            if full_at > now:
                table.move_to_end(oldest)
            else:
                del table[oldest]
        bucket = key if key in table or len(table) < MAX_BUCKETS else SHARED_BUCKET
        return bucket, max(now, table.get(bucket, now))

    def count(self, name: str, key: object, times: int = 1) -> None:
        """Count `times` events without checking the limit. A negative number refunds them."""
        now = time.monotonic()
        bucket, full_at = self._bucket(name, key, now)
        self._tables[name][bucket] = max(now, full_at + times / LIMITS[name].per_second)

    def check(self, name: str, key: object) -> None:
        """Raise RATE_LIMITED if one more event would exceed the limit."""
        limit, now = LIMITS[name], time.monotonic()
        available = limit.burst - (self._bucket(name, key, now)[1] - now) * limit.per_second
        if available < 1 and self._enabled:
            raise chat_error("TOO_OFTEN", retry_after=(1 - available) / limit.per_second)

    def charge(self, name: str, key: object) -> None:
        """Count one event. Raises RATE_LIMITED if it exceeds the limit."""
        if self._enabled:
            self.check(name, key)
            self.count(name, key)
            if LIMITS[name].by != "user":
                self.announce(name, key)


LOGGED_REASONS = dict.fromkeys(UNKNOWN_CODE_REASONS, "unknown code")
LOGGED_REASONS |= {"WRONG_PASSWORD": "wrong password", "WRONG_OLD_PASSWORD": "wrong password"}
REFUSED_FOR = "Refused for "  # begins the subjects that are addresses
MAX_LOG_SUBJECTS = 30  # subjects with a line of their own in a minute; further addresses share one line


class RateLimitedLog:
    """A log of problems that clients cause: rejected calls, invalid packets, bugs. The first problem of a subject (an address
    or a line of code) is written at once, further ones as one line a minute with counts."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}  # subject -> events since its last line
        self._since = time.monotonic()

    def record_error(self, address: str, error: ChatError) -> None:
        what = LOGGED_REASONS.get(error.reason or "") or ("limit" if error.code == "RATE_LIMITED" else "")
        if what:
            self.record(REFUSED_FOR + address, what)

    def record_bug(self, text: str, error: Exception) -> None:
        """Record an unexpected exception, the first one of a line of code with its traceback."""
        lines = [f"{frame.name}, line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__, -1)]
        self.record(f"{text} ({''.join(lines)})", type(error).__name__, error)

    def record(self, subject: str, what: str, error: Exception | None = None) -> None:
        self.flush()
        is_address = subject.startswith(REFUSED_FOR)
        if is_address and subject not in self._counts and len(self._counts) >= MAX_LOG_SUBJECTS:
            subject = REFUSED_FOR + "other addresses"
        if subject in self._counts:
            self._counts[subject][what] += 1
        else:
            self._counts[subject] = Counter()
            log.warning("%s: %s (1)", subject, what, exc_info=error)

    def flush(self, now: bool = False) -> None:
        """Write the counts if a minute has passed or `now` is true, and remove subjects without new events."""
        if time.monotonic() - self._since < 60 and not now:
            return
        self._since = time.monotonic()
        self._counts, written = {}, self._counts
        for subject, counts in written.items():
            if counts:
                self._counts[subject] = Counter()
                log.warning("%s: %s", subject, ", ".join(f"{what} ({n})" for what, n in counts.items()))


# ---- Authorization -------------------------------------------------------------------------------------------------
# Which roles may do what: decided only here, in the operation's own transaction. An operation declares its `Access`, and its
# arguments name its target: NOT_FOUND if that does not exist, FORBIDDEN if the caller is not a member of its server. An
# operation that posts, types or talks also declares its `action`: a mute or a rule of the channel may forbid it.

RANK: dict[Role | None, int] = {None: 0, "member": 1, "admin": 2, "owner": 3}
ChannelAction = Literal["post", "edit", "react", "file", "type", "talk", "hook"]
# A mute forbids every action, and slow mode posts only. Slow mode and READ_ONLY apply to members only, not to admins and the
# owner. Neither applies to a hook, because an admin created it; a mute of its bot does.
STAFF_ACTIONS: tuple[ChannelAction, ...] = ("post", "edit", "file", "type", "talk")  # forbidden by READ_ONLY
NO_MESSAGE = Message(0, 0, "", 0, "", "", 0)


@dataclass(slots=True)
class OperationContext:
    """The transaction, the time, the caller, and the target that the arguments name."""

    db: sqlite3.Connection
    user: Principal
    clock: float  # Unix seconds
    presence: Presence
    pages: ResultCache
    settings: Settings
    server_id: int = 0
    seq: int = 0  # the server's sequence number when the operation began
    channel_id: int = 0
    role: Role | None = None  # of the caller in that server
    conversation: str | None = None  # "group", the `pair` of a conversation of two, or None: not a conversation
    muted_until: str | None = None
    posting: Posting | None = None  # who may write in the channel
    slow_seconds: int | None = None
    message: Message = NO_MESSAGE
    file: StoredFile | None = None
    target_role: Role | None = None  # of the member that the arguments name
    target_id: int = 0  # the account for the moderation log, if the arguments name none
    author_name: str | None = None  # of a post by a hook

    @property
    def now(self) -> str:
        return utc(self.clock)

    def visible_users(self) -> list[int]:
        return self.presence.visible(self.server_id, self.user.user_id)


class Access(enum.Enum):
    """Who may call an operation. The value completes "Allowed for: ..." and "Only ... may do this"."""

    ANYONE = "anyone, no token needed"
    USER = "any signed-in user"
    PERSON = "any signed-in user, but no bot"
    CREATOR = "signed-in users, as `--create-servers` allows"
    STARTER = "signed-in users, as `--conversations` allows"
    MEMBER = "members"
    WRITER = "members, in conversations as `--conversations` allows"
    PARTICIPANT = "participants of a conversation; former ones only to return"
    FILE = "members; until a message has the file, only its uploader"
    ADMIN = "admins and the owner"
    RENAMER = "admins and the owner, in a conversation every participant"
    INVITER = "admins and the owner (with `--registration invite`, guests only if `--create-servers everyone` is set)"
    OWNER = "the owner"
    AUTHOR = "the message's author"
    AUTHOR_OR_ADMIN = "the message's author, admins and the owner"
    SELF_OR_OUTRANKS = "the member (except the owner), or an admin or owner of a higher role"
    SELF_OR_ADMIN = "the member, admins and the owner"
    OUTRANKS_MEMBER = "admins and the owner, for members of a lower role"
    OUTRANKS = "admins and the owner, for members of a lower role and former members"
    OUTRANKS_GUEST = "admins and the owner, for guests of a lower role"
    OUTRANKS_BOT = "admins and the owner, for bots of a lower role"


# Accesses that are checked alike. They are constants because Python 3.11 takes 0.1 us for each `Access.NAME`.
ACCOUNT_ACCESS = (Access.USER, Access.PERSON, Access.CREATOR, Access.STARTER)  # needs no role in a server
MEMBER_ACCESS = (Access.MEMBER, Access.WRITER, Access.SELF_OR_ADMIN)  # needs no higher role
ADMIN_ACCESS = (Access.ADMIN, Access.INVITER, Access.RENAMER)
WRITING_ACCESS = (Access.WRITER, Access.AUTHOR, Access.RENAMER)  # in conversations as the setting allows
ADMITTING_ACCESS = (Access.INVITER, Access.OUTRANKS_GUEST)  # as the setting `create_servers` allows


def is_permitted(access: Access, ctx: OperationContext) -> bool:
    """Return whether the role or authorship of the caller, who is a member, permits the operation."""
    if access in MEMBER_ACCESS or (access is Access.RENAMER and ctx.conversation):
        return True
    if access is Access.FILE:
        return ctx.file is not None and (ctx.file.message_id is not None or ctx.file.uploader_id == ctx.user.user_id)
    if access is Access.OWNER:
        return ctx.role == "owner"
    is_author = ctx.message.author_id == ctx.user.user_id
    if access is Access.AUTHOR or (access is Access.AUTHOR_OR_ADMIN and is_author):
        return is_author
    rank = RANK[ctx.role]
    return rank >= RANK["admin"] and (access in ADMIN_ACCESS or rank > RANK[ctx.target_role])


@functools.cache
def target_key(kind: type[Args]) -> str:
    """Return the field of these arguments that names the target."""
    return next((key for key in TARGET_QUERIES if key in kind.__struct_fields__), "server_id")


def resolve_target(ctx: OperationContext, args: Args) -> bool:
    """Load the target and the caller's role. Return whether the target exists. Raises UNAUTHORIZED for an invalid token."""
    key = target_key(type(args))
    target = getattr(args, key, 0)
    found = lookup_target(ctx.db, key, target, ctx.user)
    if found is None:
        raise chat_error("TOKEN_INVALID")
    server_id, seq, ctx.role, name, ctx.conversation, ctx.muted_until, ctx.posting, ctx.slow_seconds = found
    ctx.server_id, ctx.seq = server_id or 0, seq or 0
    if name != ctx.user.name:  # the name changed after the token was cached
        ctx.user = ctx.user._replace(name=name)
    if key == "message_id":
        ctx.message = load_message(ctx.db, target) or NO_MESSAGE
    if key == "file_id":
        ctx.file = load_stored_file(ctx.db, target)
    ctx.channel_id = target if key == "channel_id" else ctx.message.channel_id
    return ctx.server_id > 0


def check_settings(access: Access, ctx: OperationContext) -> None:
    """Raise FORBIDDEN unless the settings allow the caller to create servers or admit people. The program always may."""
    may, by_invite = ctx.settings.create_servers, ctx.settings.registration == "invite"
    if may == "everyone" or not ctx.user.digest:
        return
    if access is Access.CREATOR and may == "nobody":
        raise chat_error("CREATE_SERVERS_OFF")
    if (access is Access.CREATOR or by_invite) and load_profile(ctx.db, ctx.user.user_id).guest:
        raise chat_error("NOT_FOR_GUESTS")


def check_conversation(ctx: OperationContext, people: list[int], must_share: bool = False) -> None:
    """Raise FORBIDDEN unless these people, who include the caller, may write to each other in a conversation and, with
    `must_share`, share a server. Neither the setting nor `must_share` restricts the embedding program."""
    setting = ctx.settings.conversations if ctx.user.digest else "everyone"
    must_share = must_share and bool(ctx.user.digest)
    if ctx.conversation != "group" and len(people) < 2:
        raise chat_error("LEFT")
    if setting == "nobody":
        raise chat_error("CONVERSATIONS_OFF")
    if must_share or setting == "staff":
        with_staff = have_staff_in_common(ctx.db, ctx.user.user_id, json.dumps(people))
        if must_share and with_staff is None:
            raise chat_error("NO_SHARED_SERVER")
        if setting == "staff" and not with_staff:
            raise chat_error("CONVERSATIONS_STAFF")


def authorize_start(ctx: OperationContext, args: NewConversation) -> None:
    """Check that the caller may start a conversation. If two people already have one, set its `server_id` and the `role`."""
    people = sorted({ctx.user.user_id, *args.user_ids})
    if not 1 < len(people) <= MAX_PARTICIPANTS:
        raise chat_error("PARTICIPANTS", field="user_ids", n=MAX_PARTICIPANTS - 1)
    if not all(load_principal(ctx.db, user_id, b"") for user_id in people):
        raise chat_error("NO_USER", field="user_ids")
    ctx.conversation = f"{people[0]}-{people[1]}" if len(people) == 2 else "group"
    ctx.server_id = find_pair(ctx.db, ctx.conversation) or 0
    ctx.role = load_role(ctx.db, ctx.server_id, ctx.user.user_id)
    if ctx.role and not all(load_role(ctx.db, ctx.server_id, user_id) for user_id in people):
        raise chat_error("LEFT")
    check_conversation(ctx, people, must_share=not ctx.server_id)


def authorize_participant(ctx: OperationContext, user_id: int) -> None:
    """Check that the caller may add this user to the conversation, and set the role that the user has in it already."""
    if ctx.conversation is None:
        raise chat_error("ROLE_TOO_LOW", who=Access.PARTICIPANT.value)
    has_left, is_self = is_former_member(ctx.db, ctx.server_id, user_id), user_id == ctx.user.user_id
    if ctx.role is None and not (is_self and has_left):
        raise chat_error("NOT_MEMBER")
    ctx.target_role = load_role(ctx.db, ctx.server_id, user_id)
    if ctx.target_role or is_self:
        return
    require_user(ctx.db, user_id)
    if has_left:
        raise chat_error("LEFT")
    if ctx.conversation != "group":
        raise chat_error("TWO_ONLY")
    check_conversation(ctx, [*load_member_ids(ctx.db, ctx.server_id), user_id], must_share=True)


def is_replay(ctx: OperationContext, args: Args) -> bool:
    """Return whether this repeats an earlier post (same nonce). That post is never refused, and returns the first message."""
    nonce = getattr(args, "nonce", None)
    return bool(nonce and load_message_by_nonce(ctx.db, ctx.user.user_id, ctx.channel_id, nonce))


def authorize_on_member(access: Access, ctx: OperationContext, role: Role, user_id: int) -> bool:
    """Check that the caller, a member with this role, may act on the member `user_id`. Return whether the caller acts on
    themselves and is not the owner: then no role is needed."""
    is_self = access in (Access.SELF_OR_OUTRANKS, Access.SELF_OR_ADMIN) and user_id == ctx.user.user_id
    if RANK[role] < RANK["admin"] and not is_self:
        raise chat_error("ROLE_TOO_LOW", who=access.value)
    ctx.target_role, may_have_left = load_role(ctx.db, ctx.server_id, user_id), access is Access.OUTRANKS
    if ctx.target_role is None and not (may_have_left and is_former_member(ctx.db, ctx.server_id, user_id)):
        raise chat_error("NO_USER" if may_have_left else "NO_MEMBER", field="user_id")  # even if an account with this id exists
    if access is Access.OUTRANKS_BOT and not load_profile(ctx.db, user_id).bot:
        raise chat_error("NO_BOT")
    if is_self and role == "owner" and access is Access.SELF_OR_OUTRANKS:
        raise chat_error("OWNER_STAYS")
    return is_self and role != "owner"


def authorize_account(access: Access, ctx: OperationContext, args: Args) -> None:
    """Check an access that needs no role in a server."""
    if access in (Access.PERSON, Access.CREATOR) and ctx.user.bot:
        raise chat_error("NOT_FOR_BOTS")
    if access is Access.CREATOR:
        check_settings(access, ctx)
    if isinstance(args, NewConversation):
        authorize_start(ctx, args)


def check_guest(ctx: OperationContext, user_id: int) -> None:
    """Raise FORBIDDEN unless the member is a guest whom the caller outranks in all the guest's servers."""
    if not load_profile(ctx.db, user_id).guest:
        raise chat_error("NOT_A_GUEST")
    if not outranks_everywhere(ctx.db, ctx.user.user_id, user_id):  # a sign-in code opens all of them
        raise chat_error("LINK_ELSEWHERE")


def authorize(access: Access, ctx: OperationContext, args: Args) -> None:
    """Resolve the target and check the caller's access. Raises UNAUTHORIZED, NOT_FOUND or FORBIDDEN."""
    if access is Access.ANYONE:
        return
    exists = resolve_target(ctx, args)
    user_id: Any = getattr(args, "user_id", None)
    if access in ACCOUNT_ACCESS:
        return authorize_account(access, ctx, args)
    if not exists:
        key = target_key(type(args))
        raise chat_error("INVITE_UNKNOWN" if key == "code" else f"NO_{key.removesuffix('_id').upper()}", field=key)
    if access is Access.PARTICIPANT:
        return authorize_participant(ctx, user_id)
    if ctx.role is None:
        raise chat_error("NOT_MEMBER")
    if user_id is not None and authorize_on_member(access, ctx, ctx.role, user_id):
        return
    if not is_permitted(access, ctx):
        raise chat_error("ROLE_TOO_LOW", who=access.value)
    if ctx.conversation and access in WRITING_ACCESS and not is_replay(ctx, args):
        check_conversation(ctx, load_member_ids(ctx.db, ctx.server_id))
    if access in ADMITTING_ACCESS:
        check_settings(access, ctx)
        if access is Access.OUTRANKS_GUEST:
            check_guest(ctx, user_id)


def find_rule_error(ctx: OperationContext, action: ChannelAction) -> ChatError | None:
    """Return the error if a mute or a rule of the channel forbids this action, else None."""
    if ctx.muted_until is not None and ctx.muted_until > ctx.now:
        return chat_error("MUTED")
    if ctx.role != "member":
        return None
    if ctx.posting == "staff" and action in STAFF_ACTIONS:
        return chat_error("READ_ONLY")
    if ctx.slow_seconds and action == "post" and ctx.user.digest:  # the embedding program has no limits
        since = ctx.clock - (load_posted_at(ctx.db, ctx.user.user_id, ctx.channel_id) or 0.0)
        if 0 <= since < ctx.slow_seconds:  # a negative time: the clock was set back
            return chat_error("SLOW_MODE", retry_after=ctx.slow_seconds - since)
    return None


def check_channel_rules(ctx: OperationContext, args: Args, action: ChannelAction) -> None:
    """Raise FORBIDDEN or RATE_LIMITED if a mute or a rule of the channel forbids this action."""
    if (error := find_rule_error(ctx, action)) is not None and not is_replay(ctx, args):
        raise error


# ---- Operations ----------------------------------------------------------------------------------------------------
# What clients can do, in the order a user meets it. An operation is declared once: its route, its event, its access and the
# events that it emits. Its signature has the types of its arguments and its result, its docstring is its public description.
# REST, Socket.IO, OpenAPI, docs and tests follow from that. Each function here runs in one transaction, without sockets.


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    name: str
    run: Callable[..., Any]
    kind: Literal["write", "read", "async"] = "async"
    event: str | None = None  # the Socket.IO event
    method: str | None
    path: str | None
    access: Access
    action: ChannelAction | None = None  # its action in a channel, which a mute or a rule may forbid
    args: type[Args]
    result: Any
    emits: Sequence[str] = ()
    status: int  # of an HTTP response: 200, or 204 without a result, unless declared
    replay_status: int  # of an HTTP response that replays an earlier call
    logged: str | None = None  # the action in the moderation log
    limit: str | None = None  # in addition to "request" or "event"; "itself": the operation charges its limits by itself
    raw_body: bool = False  # whether the body of the route is bytes; its arguments are then in the query
    acks: bool = True  # whether the ack contains the result
    slow: bool = False  # whether it may take longer than a few index look-ups
    frees_space: bool  # whether it is allowed while the disk is nearly full; by default, if its method is DELETE
    summary: str

    @property
    def has_body(self) -> bool:
        """Return whether the route takes its arguments from the body, not from the query."""
        return self.method in ("POST", "PUT", "PATCH") and not self.raw_body


MAX_DETAIL = 200  # characters of a detail in the moderation log
SIGN_IN_CODE_SECONDS = 900  # lifetime of a sign-in code
FOREVER = utc(LAST_SECOND)  # the end of a mute that lasts until it is lifted
STATUS_EVENTS = ["user:status", "user:connected", "user:disconnected"]
OPERATIONS: dict[str, Operation] = {}
Run = TypeVar("Run", bound=Callable[..., Any])


def operation(http: str | None, access: Access, **more: Any) -> Callable[[Run], Run]:
    """Add a function to `OPERATIONS`. `http`: method and path. `more`: other fields of Operation."""
    method, path = http.split() if http else (None, None)

    def register(run: Run) -> Run:
        hints, name, summary = typing.get_type_hints(run), run.__name__, inspect.getdoc(run) or ""
        (result,) = typing.get_args(hints["return"])
        status = more.get("status", 204 if result is type(None) else 200)
        fields = {"status": status, "replay_status": status, "frees_space": method == "DELETE", "args": hints["args"]} | more
        OPERATIONS[name] = Operation(
            name=name, run=run, method=method, path=path, access=access, result=result, summary=summary, **fields
        )
        return run

    return register


read, write = functools.partial(operation, kind="read"), functools.partial(operation, kind="write")


def describe_action(ctx: OperationContext, args: Args) -> str | None:
    """Return the detail of an entry of the moderation log: the channel, and the arguments that are not ids."""
    fields = [field for field in msgspec.structs.fields(args) if not field.name.endswith("_id")]
    given = [(field.name, getattr(args, field.name)) for field in fields if getattr(args, field.name) != field.default]
    channels = [load_channel(ctx.db, ctx.channel_id).name] if ctx.channel_id else []
    return ", ".join(channels + [f"{name}: {value}" for name, value in given])[:MAX_DETAIL] or None


def run_logged(op: Operation, run: Callable[..., Result[T]], ctx: OperationContext, args: Args) -> Result[T]:
    """Run an operation or a step of one. If an admin thereby changed anything except their own membership or message,
    record it in the moderation log, in the same transaction."""
    changes, detail = ctx.db.total_changes, describe_action(ctx, args)
    result = run(ctx, args)
    target_id = getattr(args, "user_id", None) or ctx.target_id or ctx.message.author_id or None
    is_own = op.access in (Access.SELF_OR_OUTRANKS, Access.AUTHOR_OR_ADMIN) and target_id == ctx.user.user_id
    if ctx.role != "member" and not is_own and ctx.db.total_changes != changes:
        insert_log_entry(ctx.db, ctx.server_id, ctx.clock, ctx.user.user_id, op.logged, target_id, detail)
    return result


@read("GET /users/me", Access.USER)
def get_profile(ctx: OperationContext, args: NoArgs) -> Result[Profile]:
    """Return your own profile."""
    return Result(load_profile(ctx.db, ctx.user.user_id))


def member_event(db: sqlite3.Connection, event: str, server_id: int, user_id: int, seq: int) -> Emit:
    """Return a `member:` event with the account's names, its mute and, if it is `member:updated`, the role."""
    payload: Callable[..., Payload] = EVENTS[event].payload
    user = load_profile(db, user_id)
    fields: dict[str, Any] = {"seq": seq, "guest": user.guest, "bot": user.bot, "name": user.name}
    for member in load_members(db, server_id, (), user_id, user_id):  # none, if the member has left
        fields |= {"muted_until": member.muted_until} | ({"role": member.role} if event == "member:updated" else {})
    return Emit(event, server_id, payload(server_id, user_id, user.username, **fields))


def update_in_servers(db: sqlite3.Connection, user_id: int) -> list[Effect]:
    """Give an account change a sequence number in each of the account's servers, and return the events."""
    servers = load_server_ids(db, user_id)
    return [member_event(db, "member:updated", one, user_id, next_seq(db, one, "members")) for one in servers]


def rename_user(db: sqlite3.Connection, user_id: int, name: str | None) -> list[Effect]:
    """Set an account's display name, and return the effects."""
    update_display_name(db, user_id, name)
    return [Rename(user_id, name), *update_in_servers(db, user_id)]


@write("PATCH /users/me", Access.USER, limit="post", emits=["member:updated", *STATUS_EVENTS])
def update_profile(ctx: OperationContext, args: EditProfile) -> Result[Profile]:
    """Change your status or display name; a `name` of `null` removes it."""
    user_id, effects = ctx.user.user_id, list[Effect]()
    name = ctx.user.name if args.name is UNSET else None if args.name == ctx.user.username else args.name
    if name != ctx.user.name:
        effects += rename_user(ctx.db, user_id, name)
    if args.status is not UNSET:
        update_status(ctx.db, user_id, args.status)
        identity = Identity(user_id, ctx.user.username, name=name)
        effects.append(SetStatus(identity, args.status, load_server_ids(ctx.db, user_id)))
    return Result(load_profile(ctx.db, user_id), effects)


@write(None, Access.USER, event="user:status", emits=STATUS_EVENTS, acks=False)
def set_status(ctx: OperationContext, args: StatusArgs) -> Result[Profile]:
    """Change your status."""
    return update_profile(ctx, EditProfile(status=args.status))


@write("POST /auth/logout", Access.USER, frees_space=True)
def logout(ctx: OperationContext, args: NoArgs) -> Result[None]:
    """Revoke the token of this request and disconnect its sockets."""
    if not ctx.user.digest:
        raise chat_error("NO_TOKEN")
    insert_revoked_token(ctx.db, ctx.user.digest, ctx.user.expires)
    return Result(None, [Revoke(ctx.user.user_id, ctx.user.digest)])


@read("GET /servers", Access.USER, slow=True)
def list_servers(ctx: OperationContext, args: NoArgs) -> Result[Servers]:
    """List your servers with their channels."""
    return Result(Servers(load_servers(ctx.db, ctx.user.user_id)))


def insert_owned_server(db: sqlite3.Connection, name: str, owner_id: int, now: str) -> int:
    """Create a server with the channel `general` and return its id."""
    server_id = insert_server(db, name, now)
    insert_member(db, server_id, owner_id, "owner", now)
    insert_channel(db, server_id, "general", "text", "")
    return server_id


@write("POST /servers", Access.CREATOR, status=201, limit="post")
def create_server(ctx: OperationContext, args: NameArgs) -> Result[Server]:
    """Create a server with one channel, `general`; you become its owner."""
    check_owned_servers(ctx.db, ctx.user.user_id)
    server_id = insert_owned_server(ctx.db, args.name, ctx.user.user_id, ctx.now)
    return Result(load_servers(ctx.db, ctx.user.user_id, server_id)[0])


@read("GET /servers/{server_id}", Access.MEMBER)
def get_server(ctx: OperationContext, args: ServerArgs) -> Result[Server]:
    """Return a server with its channels and your role."""
    return Result(load_servers(ctx.db, ctx.user.user_id, ctx.server_id)[0])


def server_joined(db: sqlite3.Connection, server_id: int, user_id: int) -> Emit:
    return Emit("server:joined", user_id, load_servers(db, user_id, server_id)[0])


def join_conversation(ctx: OperationContext, user_id: int) -> list[Effect]:
    """Make a user a participant of the conversation, and return the effects."""
    seq = insert_member(ctx.db, ctx.server_id, user_id, "member", ctx.now)
    joined = [server_joined(ctx.db, ctx.server_id, user_id)] if user_id != ctx.user.user_id else []
    return [member_event(ctx.db, "member:joined", ctx.server_id, user_id, seq), *joined]


@write(
    "POST /conversations", Access.STARTER, emits=["server:joined", "member:joined"],
    status=201, replay_status=200, limit="post", slow=True,
)  # fmt: skip
def start_conversation(ctx: OperationContext, args: NewConversation) -> Result[Server]:
    """Start a private conversation. If you already have one with this person, return it with status 200 (and rejoin it)."""
    user_id, people = ctx.user.user_id, sorted({ctx.user.user_id, *args.user_ids})
    if ctx.server_id:
        effects = [] if ctx.role else join_conversation(ctx, user_id)
        return Result(load_servers(ctx.db, user_id, ctx.server_id)[0], effects, replayed=True)
    if ctx.conversation == "group" and count_started_groups(ctx.db, user_id) >= MAX_STARTED_GROUPS:
        raise chat_error("TOO_MANY", n=MAX_STARTED_GROUPS)
    server_id = insert_conversation(ctx.db, args.name or "", ctx.now, user_id, ctx.conversation)
    for one in people:
        insert_member(ctx.db, server_id, one, "member", ctx.now)
    insert_channel(ctx.db, server_id, "general", "text", "")
    own = load_servers(ctx.db, user_id, server_id)[0]
    return Result(own, [server_joined(ctx.db, server_id, one) for one in people if one != user_id])


@write("PUT /servers/{server_id}/members/{user_id}", Access.PARTICIPANT, emits=["member:joined", "server:joined"], limit="post")
def add_participant(ctx: OperationContext, args: MemberArgs) -> Result[None]:
    """Add somebody to a conversation of three or more, or return to a conversation that you have left."""
    if ctx.target_role:
        return Result(None)
    if len(load_member_ids(ctx.db, ctx.server_id)) >= MAX_PARTICIPANTS:
        raise chat_error("TOO_MANY", n=MAX_PARTICIPANTS)
    return Result(None, join_conversation(ctx, args.user_id))


@write("PATCH /servers/{server_id}", Access.RENAMER, emits=["server:updated"], limit="post", logged="rename")
def rename_server(ctx: OperationContext, args: RenameServer) -> Result[Server]:
    """Rename a server or a conversation."""
    renamed = ServerRenamed(ctx.server_id, args.name, update_server_name(ctx.db, ctx.server_id, args.name))
    return Result(load_servers(ctx.db, ctx.user.user_id, ctx.server_id)[0], [Emit("server:updated", ctx.server_id, renamed)])


def remove_from_server(db: sqlite3.Connection, server_id: int, user_id: int) -> list[Effect]:
    left = member_event(db, "member:left", server_id, user_id, delete_member(db, server_id, user_id))
    return [left, Evict(server_id, user_id)]


def leave_and_close(db: sqlite3.Connection, user_id: int) -> list[Effect]:
    """Delete an account. The servers that it owned have no owner afterwards."""
    effects = [effect for server_id in load_server_ids(db, user_id) for effect in remove_from_server(db, server_id, user_id)]
    close_account(db, user_id)
    for server_id in load_abandoned_conversations(db, user_id):
        delete_server_row(db, server_id)
        effects.append(RemoveRoom(server_id))
    return [*effects, Revoke(user_id)]


def remove_server(db: sqlite3.Connection, server_id: int) -> list[Effect]:
    """Delete a server and the accounts of its bots."""
    bots = load_bot_ids(db, server_id)
    delete_server_row(db, server_id)
    return [RemoveRoom(server_id), *(effect for user_id in bots for effect in leave_and_close(db, user_id))]


def remove_account(db: sqlite3.Connection, user_id: int, messages: bool = False) -> list[Effect]:
    """Delete an account, with `messages` its messages too. Otherwise they stay, under its name. Each server that it owned
    passes to its first admin, else its first member, else is deleted."""
    owned = [one for one in load_server_ids(db, user_id) if load_role(db, one, user_id) == "owner"]
    effects = leave_and_close(db, user_id)
    for server_id in owned:
        if (next_owner := load_next_owner(db, server_id)) is None:
            effects += remove_server(db, server_id)
        else:
            seq = update_role(db, server_id, next_owner, "owner")
            effects.append(member_event(db, "member:updated", server_id, next_owner, seq))
    return effects + list(start_purge(db, None, user_id) if messages else ())


@write("DELETE /servers/{server_id}", Access.OWNER, emits=["server:deleted"], slow=True)
def delete_server(ctx: OperationContext, args: ServerArgs) -> Result[None]:
    """Delete a server, everything in it, and its bots."""
    deleted = Emit("server:deleted", ctx.server_id, ServerDeleted(ctx.server_id))
    return Result(None, [deleted, *remove_server(ctx.db, ctx.server_id)])


@read("GET /servers/{server_id}/members", Access.MEMBER, slow=True)
def list_members(ctx: OperationContext, args: ServerArgs) -> Result[Members]:
    """List the members of a server, with their roles and whether they are connected, and former members."""
    members = load_members(ctx.db, ctx.server_id, ctx.visible_users(), ctx.user.user_id)
    return Result(Members(members, load_former_members(ctx.db, ctx.server_id)))


def load_member(ctx: OperationContext, user_id: int) -> Member:
    """Return a member as the caller sees them."""
    return load_members(ctx.db, ctx.server_id, ctx.visible_users(), ctx.user.user_id, user_id)[0]


@write("PATCH /servers/{server_id}/members/{user_id}", Access.OWNER, emits=["member:updated"], logged="role")
def set_role(ctx: OperationContext, args: RoleArgs) -> Result[Member]:
    """Change a member's role; `owner` transfers ownership, and the previous owner becomes an admin."""
    if ctx.target_role == "owner" and args.role != "owner":
        raise chat_error("OWNER_STAYS")
    changed = {args.user_id: args.role}
    if args.role == "owner" and ctx.target_role != "owner":
        if load_profile(ctx.db, args.user_id).bot:
            raise chat_error("NOT_FOR_BOTS")
        check_owned_servers(ctx.db, args.user_id)
        changed = {ctx.user.user_id: "admin", args.user_id: "owner"}
    change = functools.partial(update_role, ctx.db, ctx.server_id)
    event = functools.partial(member_event, ctx.db, "member:updated", ctx.server_id)
    events = [event(user_id, change(user_id, role)) for user_id, role in changed.items()]
    return Result(load_member(ctx, args.user_id), [*events, *(StopForbiddenActivity(ctx.server_id, one) for one in changed)])


def add_member(ctx: OperationContext, args: RoleArgs, keeps_role: bool = False) -> Result[Member]:
    """Make an account a member with that role, or change a member's role unless `keeps_role`. `ctx.user` is the owner."""
    ctx.target_role, effects = load_role(ctx.db, ctx.server_id, args.user_id), list[Effect]()
    is_new = ctx.target_role is None
    if is_banned(ctx.db, ctx.server_id, args.user_id):
        raise chat_error("BANNED")
    if is_new and load_profile(ctx.db, args.user_id).bot:  # it would be deleted with either server
        raise chat_error("NOT_FOR_BOTS")
    if is_new:
        seq = insert_member(ctx.db, ctx.server_id, args.user_id, "member", ctx.now)
        effects.append(member_event(ctx.db, "member:joined", ctx.server_id, args.user_id, seq))
    if args.role != (ctx.target_role or "member") and not keeps_role:
        effects += [*set_role(ctx, args).effects, LogLine(f"set_role by the program {msgspec.structs.asdict(args)}")]
    if is_new:
        effects.append(server_joined(ctx.db, ctx.server_id, args.user_id))
    return Result(load_member(ctx, args.user_id), effects)


def set_mute(ctx: OperationContext, user_id: int, until: str | None) -> list[Effect]:
    """Mute a member until that time, or lift the mute, and return the effects."""
    seq = update_mute(ctx.db, ctx.server_id, user_id, until)
    return [member_event(ctx.db, "member:updated", ctx.server_id, user_id, seq), StopForbiddenActivity(ctx.server_id, user_id)]


@write(
    "PUT /servers/{server_id}/members/{user_id}/mute", Access.OUTRANKS_MEMBER,
    emits=["member:updated", "typing_stop", "voice:leave"], logged="mute",
)  # fmt: skip
def mute(ctx: OperationContext, args: MuteArgs) -> Result[Member]:
    """Mute a member for `seconds`, or until the mute is lifted. A muted member can read, delete their own messages and raise a
    hand, but cannot post, edit, react, send files, type or talk."""
    until = FOREVER if args.seconds is None else utc(math.ceil(ctx.clock + args.seconds))
    effects = set_mute(ctx, args.user_id, until)
    return Result(load_member(ctx, args.user_id), effects)


@write("DELETE /servers/{server_id}/members/{user_id}/mute", Access.OUTRANKS_MEMBER, emits=["member:updated"], logged="unmute")
def unmute(ctx: OperationContext, args: MemberArgs) -> Result[None]:
    """Lift a mute; without one, nothing changes."""
    is_muted = load_member(ctx, args.user_id).muted_until is not None
    return Result(None, set_mute(ctx, args.user_id, None) if is_muted else [])


def end_membership(ctx: OperationContext, user_id: int) -> list[Effect]:
    """Remove a member. A bot belongs to one server: if it leaves, its account is deleted."""
    if ctx.conversation is None and load_profile(ctx.db, user_id).bot:
        return remove_account(ctx.db, user_id)
    return remove_from_server(ctx.db, ctx.server_id, user_id)


@write("DELETE /servers/{server_id}/members/{user_id}", Access.SELF_OR_OUTRANKS, emits=["member:left"], logged="remove")
def remove_member(ctx: OperationContext, args: MemberArgs) -> Result[None]:
    """Leave a server, or remove a member of a lower role; the member's sockets stop receiving the server's events."""
    return Result(None, end_membership(ctx, args.user_id))


@write("POST /servers/{server_id}/members/{user_id}/link", Access.OUTRANKS_GUEST, status=201, limit="post", logged="link")
def create_link(ctx: OperationContext, args: MemberArgs) -> Result[Link]:
    """Create a single-use code with which a guest can sign in again; it expires after 15 minutes."""
    code, expires = new_code(), ctx.clock + SIGN_IN_CODE_SECONDS
    insert_sign_in_code(ctx.db, args.user_id, code, expires)
    return Result(Link(code, utc(expires)))


@read("GET /servers/{server_id}/bans", Access.ADMIN, slow=True)
def list_bans(ctx: OperationContext, args: BansArgs) -> Result[Bans]:
    """List the banned users of a server, by user id."""
    bans = load_bans(ctx.db, ctx.server_id, args.after, args.limit + 1)
    return Result(Bans(bans[: args.limit], len(bans) > args.limit))


@write(
    "PUT /servers/{server_id}/bans/{user_id}", Access.OUTRANKS, emits=["member:left", "message:deleted"],
    limit="post", slow=True, frees_space=True, logged="ban",
)  # fmt: skip
def ban(ctx: OperationContext, args: BanArgs) -> Result[None]:
    """Ban a member or former member; optionally delete their messages, and the invite they used."""
    if args.revoke_invite:
        delete_invite_used_by(ctx.db, ctx.server_id, args.user_id)
    effects = end_membership(ctx, args.user_id) if ctx.target_role else []
    if is_former_member(ctx.db, ctx.server_id, args.user_id):  # a bot is deleted instead
        insert_ban(ctx.db, ctx.server_id, args.user_id, ctx.user.user_id, ctx.now)
    if args.delete_messages:
        effects += start_purge(ctx.db, ctx.server_id, args.user_id)
    return Result(None, effects)


@write("DELETE /servers/{server_id}/bans/{user_id}", Access.OUTRANKS, logged="unban")
def unban(ctx: OperationContext, args: MemberArgs) -> Result[None]:
    """Lift a ban."""
    if not delete_ban(ctx.db, ctx.server_id, args.user_id):
        raise chat_error("NOT_BANNED")
    return Result(None)


@read("GET /servers/{server_id}/log", Access.ADMIN)
def list_log(ctx: OperationContext, args: LogArgs) -> Result[ModerationLog]:
    """List what admins did in a server in the last 90 days, newest first."""
    entries = load_log_entries(ctx.db, ctx.server_id, args.before or 2**63 - 1, args.limit + 1)
    return Result(ModerationLog(entries[: args.limit], len(entries) > args.limit))


@write("POST /servers/{server_id}/invites", Access.INVITER, status=201, limit="post", logged="invite")
def create_invite(ctx: OperationContext, args: NewInvite) -> Result[Invite]:
    """Create an invite, for `max_uses` people and `expires_in` seconds if these are given."""
    expires_at = utc(math.ceil(ctx.clock + args.expires_in)) if args.expires_in is not None else None
    invite = Invite(new_code(), ctx.server_id, args.max_uses, 0, expires_at)
    insert_invite(ctx.db, invite, ctx.user.user_id, ctx.now)
    return Result(invite)


@read("GET /servers/{server_id}/invites", Access.ADMIN)
def list_invites(ctx: OperationContext, args: ServerArgs) -> Result[Invites]:
    """List the invites of a server, including expired and used-up ones."""
    return Result(Invites(load_invites(ctx.db, ctx.server_id)))


@read("GET /invites/{code}", Access.ANYONE, limit="invite")
def get_invite(ctx: OperationContext, args: CodeArgs) -> Result[InvitePreview]:
    """Return the server's name and number of members for an invite."""
    return Result(load_invite_preview(ctx.db, load_valid_invite(ctx.db, args.code, ctx.now).code))


def use_invite(db: sqlite3.Connection, invite: Invite, user_id: int, now: str) -> list[Effect]:
    """Make an account a member by an invite, and return the effects."""
    update_invite_uses(db, invite.code)
    seq = insert_member(db, invite.server_id, user_id, "member", now, invite.code)
    return [member_event(db, "member:joined", invite.server_id, user_id, seq)]


@write("POST /invites/{code}", Access.PERSON, emits=["member:joined"], status=201, replay_status=200, limit="invite")
def accept_invite(ctx: OperationContext, args: CodeArgs) -> Result[Server]:
    """Join a server by invite; 200 if you are already a member."""
    if ctx.role is not None:
        return Result(load_servers(ctx.db, ctx.user.user_id, ctx.server_id)[0], replayed=True)
    invite = load_valid_invite(ctx.db, args.code, ctx.now)
    if is_banned(ctx.db, invite.server_id, ctx.user.user_id):
        raise chat_error("BANNED")
    effects = use_invite(ctx.db, invite, ctx.user.user_id, ctx.now)
    return Result(load_servers(ctx.db, ctx.user.user_id, invite.server_id)[0], effects)


@write("DELETE /invites/{code}", Access.ADMIN, limit="invite", logged="revoke_invite")
def revoke_invite(ctx: OperationContext, args: CodeArgs) -> Result[None]:
    """Delete an invite."""
    delete_invite(ctx.db, args.code)
    return Result(None)


@write("DELETE /servers/{server_id}/bots/{user_id}", Access.OUTRANKS_BOT, emits=["member:left"], logged="revoke_bot")
def revoke_bot(ctx: OperationContext, args: MemberArgs) -> Result[None]:
    """Delete a bot, and the hook whose bot it is; its messages stay."""
    return Result(None, remove_account(ctx.db, args.user_id))


@read("GET /servers/{server_id}/hooks", Access.ADMIN)
def list_hooks(ctx: OperationContext, args: ServerArgs) -> Result[Hooks]:
    """List the incoming hooks of a server, without their secrets."""
    return Result(Hooks(load_hooks(ctx.db, ctx.server_id)))


@write("DELETE /servers/{server_id}/hooks/{hook_id}", Access.ADMIN, emits=["member:left"], logged="revoke_hook")
def revoke_hook(ctx: OperationContext, args: HookArgs) -> Result[None]:
    """Delete an incoming hook and its bot; its messages stay."""
    bots = {hook.hook_id: hook.user_id for hook in load_hooks(ctx.db, ctx.server_id)}
    if args.hook_id not in bots:
        raise chat_error("NO_HOOK", field="hook_id")
    ctx.target_id = bots[args.hook_id]
    return Result(None, remove_account(ctx.db, ctx.target_id))


@read("GET /servers/{server_id}/channels", Access.MEMBER)
def list_channels(ctx: OperationContext, args: ServerArgs) -> Result[Channels]:
    """List the channels of a server."""
    return Result(Channels(load_channels(ctx.db, ctx.server_id)))


def channel_event(event: str, channel: Channel, seq: int) -> Emit:
    return Emit(event, channel.server_id, ChannelChanged(**msgspec.structs.asdict(channel), seq=seq))


@write(
    "POST /servers/{server_id}/channels", Access.ADMIN, emits=["channel:created"], status=201, limit="post",
    logged="channel_create",
)  # fmt: skip
def create_channel(ctx: OperationContext, args: NewChannel) -> Result[Channel]:
    """Create a text or voice channel; connected members receive its events at once."""
    channel, seq = insert_channel(ctx.db, ctx.server_id, args.name, args.kind, args.topic)
    return Result(channel, [AddChannelRoom(ctx.server_id, channel.channel_id), channel_event("channel:created", channel, seq)])


@write("PATCH /channels/{channel_id}", Access.ADMIN, emits=["channel:updated", "typing_stop", "voice:leave"], logged="rules")
def edit_channel(ctx: OperationContext, args: EditChannel) -> Result[Channel]:
    """Change a channel's name, topic or rules: who may write, the time between posts, how long messages are kept."""
    fields = msgspec.structs.asdict(args).items()
    given = {key: value for key, value in fields if value is not UNSET and (value is not None or key == "keep_days")}
    before = load_channel(ctx.db, ctx.channel_id)
    channel = msgspec.structs.replace(before, **given)
    if channel == before:
        return Result(channel)
    event = channel_event("channel:updated", channel, update_channel(ctx.db, channel))
    return Result(channel, [event, StopForbiddenActivity(ctx.server_id, channel_id=ctx.channel_id)])


@write(
    "DELETE /channels/{channel_id}", Access.ADMIN, emits=["channel:deleted", "member:left", "typing_stop", "voice:leave"],
    logged="channel_delete",
)  # fmt: skip
def delete_channel(ctx: OperationContext, args: ChannelArgs) -> Result[None]:
    """Delete a channel, its messages and its incoming hooks."""
    effects = [effect for user_id in load_hook_bots(ctx.db, ctx.channel_id) for effect in remove_account(ctx.db, user_id)]
    deleted = ChannelDeleted(ctx.server_id, ctx.channel_id, detach_channel(ctx.db, ctx.server_id, ctx.channel_id))
    effects.append(StopForbiddenActivity(ctx.server_id, channel_id=ctx.channel_id))
    effects += [Emit("channel:deleted", ctx.server_id, deleted), RemoveRoom(ctx.server_id, ctx.channel_id)]
    return Result(None, effects)


@write("DELETE /channels/{channel_id}/messages", Access.ADMIN, emits=["message:deleted"], status=202, slow=True, logged="clear")
def clear_channel(ctx: OperationContext, args: ChannelArgs) -> Result[None]:
    """Delete all messages that a channel has now, in steps, the newest first."""
    return Result(None, start_purge(ctx.db, ctx.server_id, None, ctx.channel_id))


def mention_events(ctx: OperationContext, message: Message, notified: Collection[int]) -> list[Effect]:
    """Return a `mention` event for each member whom the message mentions, except its author and those notified before."""
    if not message.mentions:
        return []
    notice = MentionNotice(**msgspec.structs.asdict(message), server_id=ctx.server_id)
    skipped = {*notified, message.author_id}
    return [Emit("mention", user_id, notice) for user_id in message.mentions if user_id not in skipped]


@write(
    "POST /messages", Access.WRITER, event="message:send", emits=["message:new", "channel:read", "mention", "typing_stop"],
    status=201, limit="post", action="post",
)  # fmt: skip
def post_message(ctx: OperationContext, args: NewMessage) -> Result[Message]:
    """Post a message, with files that you uploaded to the channel, and mark the channel as read. If you posted with the same
    `nonce` in the channel before, that message is returned instead."""
    if args.nonce is not None and (first := load_message_by_nonce(ctx.db, ctx.user.user_id, args.channel_id, args.nonce)):
        return Result(first, replayed=True)
    if args.reply_to is not None:
        original = load_message(ctx.db, args.reply_to)
        if original is None or original.channel_id != args.channel_id:
            raise chat_error("NO_REPLY_TARGET", field="reply_to")
    files = [load_attachable_file(ctx.db, one, ctx.user.user_id, args.channel_id) for one in dict.fromkeys(args.files)]
    message = insert_message(ctx.db, ctx.server_id, ctx.user, args, ctx.now, ctx.role != "member", ctx.seq)
    for place, file in enumerate(files):
        attach_file(ctx.db, message.message_id, place, file.file_id)
    message.files = files
    if ctx.author_name is not None:
        message.author_name = ctx.author_name if ctx.author_name != ctx.user.username else None
        update_author_name(ctx.db, message.message_id, ctx.author_name)
    update_last_read(ctx.db, ctx.user.user_id, args.channel_id, message.message_id, ctx.clock)
    effects: list[Effect] = [
        RecordPost(ctx.server_id, ctx.user.user_id, args.channel_id, message.message_id),
        Emit("message:new", ctx.server_id, message),
    ]
    return Result(message, effects + mention_events(ctx, message, ()))


@read("GET /channels/{channel_id}/messages", Access.MEMBER)
def list_messages(ctx: OperationContext, args: PageArgs) -> Result[Messages]:
    """List messages of a channel: the newest, or those before, after or around a message."""
    if (page := ctx.pages.find(args, ctx.seq)) is None:
        page = load_page(ctx.db, args)
        texts = (len(message.content) + sum(len(file.alt or "") + 200 for file in message.files) for message in page.messages)
        ctx.pages.store(args, ctx.seq, page, 4 * sum(texts))
    return Result(page)


@read("GET /messages/{message_id}", Access.MEMBER)
def get_message(ctx: OperationContext, args: MessageArgs) -> Result[Message]:
    """Return a message."""
    return Result(ctx.message)


@write(
    "PATCH /messages/{message_id}", Access.AUTHOR, event="message:edit", emits=["message:edit", "mention"], limit="post",
    action="edit",
)  # fmt: skip
def edit_message(ctx: OperationContext, args: EditMessage) -> Result[Message]:
    """Change the text of a message."""
    if not args.content and not ctx.message.files:
        raise chat_error("FIELD_EMPTY", field="content", what="content")
    update_message(ctx.db, ctx.server_id, ctx.message, args.content, ctx.now, ctx.role != "member")
    new = load_message(ctx.db, args.message_id) or NO_MESSAGE
    return Result(new, [Emit("message:edit", ctx.server_id, new), *mention_events(ctx, new, ctx.message.mentions)])


@write("DELETE /messages/{message_id}", Access.AUTHOR_OR_ADMIN, emits=["message:deleted"], logged="delete_message")
def remove_message(ctx: OperationContext, args: MessageArgs) -> Result[None]:
    """Delete a message and its files; its text disappears from pages, search and changes."""
    return Result(None, delete_messages(ctx.db, [(args.message_id, ctx.channel_id, ctx.server_id)]))


def change_pin(ctx: OperationContext, changed: int) -> Result[None]:
    """Give a message whose pin has changed a sequence number, and return the event."""
    if not changed:
        return Result(None, replayed=True)
    update_message_seq(ctx.db, ctx.server_id, ctx.message.message_id)
    return Result(None, [Emit("message:edit", ctx.server_id, load_message(ctx.db, ctx.message.message_id) or NO_MESSAGE)])


@write("PUT /messages/{message_id}/pin", Access.ADMIN, emits=["message:edit"], limit="post", logged="pin")
def pin_message(ctx: OperationContext, args: MessageArgs) -> Result[None]:
    """Pin a message to its channel. A channel has at most 50 pins."""
    return change_pin(ctx, insert_pin(ctx.db, ctx.message))


@write("DELETE /messages/{message_id}/pin", Access.ADMIN, emits=["message:edit"], limit="post", logged="unpin")
def unpin_message(ctx: OperationContext, args: MessageArgs) -> Result[None]:
    """Unpin a message."""
    return change_pin(ctx, delete_pin(ctx.db, args.message_id))


@read("GET /channels/{channel_id}/pins", Access.MEMBER)
def list_pins(ctx: OperationContext, args: PinsArgs) -> Result[Messages]:
    """List the pinned messages of a channel, the latest pin first."""
    return Result(load_pins(ctx.db, args))


def same_reactions(ctx: OperationContext, emoji: str) -> list[Reaction]:
    """Return the message's reactions with this emoji, with or without a variation selector."""
    return [one for one in ctx.message.reactions if one.emoji.translate(VARIATIONS) == emoji.translate(VARIATIONS)]


def reaction_event(ctx: OperationContext, event: str, emoji: str) -> Emit:
    message, user = ctx.message, ctx.user
    seq = update_message_seq(ctx.db, ctx.server_id, message.message_id)
    changed = ReactionChanged(ctx.channel_id, user.user_id, user.username, message.message_id, emoji, seq, name=user.name)
    return Emit(event, ctx.server_id, changed)


@write(
    "PUT /messages/{message_id}/reactions/{emoji}", Access.WRITER, event="reaction:add", emits=["reaction:add"], limit="post",
    action="react",
)  # fmt: skip
def add_reaction(ctx: OperationContext, args: ReactionArgs) -> Result[None]:
    """Add your reaction to a message; adding it twice changes nothing."""
    same = same_reactions(ctx, args.emoji)
    if not same and len({one.emoji.translate(VARIATIONS) for one in ctx.message.reactions}) >= MAX_REACTIONS:
        raise chat_error("TOO_MANY_REACTIONS", n=MAX_REACTIONS)
    if any(ctx.user.user_id in reaction.user_ids for reaction in same):
        return Result(None, replayed=True)
    emoji = same[0].emoji if same else args.emoji
    insert_reaction(ctx.db, args.message_id, emoji, ctx.user.user_id)
    return Result(None, [reaction_event(ctx, "reaction:add", emoji)])


@write(
    "DELETE /messages/{message_id}/reactions/{emoji}", Access.WRITER, event="reaction:remove",
    emits=["reaction:remove"], limit="post",
)  # fmt: skip
def remove_reaction(ctx: OperationContext, args: ReactionArgs) -> Result[None]:
    """Remove your reaction from a message; without one, nothing changes."""
    own = [reaction.emoji for reaction in same_reactions(ctx, args.emoji) if ctx.user.user_id in reaction.user_ids]
    for emoji in own:
        delete_reaction(ctx.db, args.message_id, emoji, ctx.user.user_id)
    return Result(None, [reaction_event(ctx, "reaction:remove", emoji) for emoji in own], replayed=not own)


@read("GET /users/me/reads", Access.USER, slow=True)
def list_reads(ctx: OperationContext, args: NoArgs) -> Result[ReadStates]:
    """List your read state in each text channel."""
    return Result(ReadStates(load_read_states(ctx.db, ctx.user.user_id)))


@read("GET /channels/{channel_id}/read", Access.MEMBER)
def get_read(ctx: OperationContext, args: ChannelArgs) -> Result[ReadState]:
    """Return the last message you have read in a channel, and how many are unread or mention you (both counted up to 1,000)."""
    return Result(load_read_states(ctx.db, ctx.user.user_id, ctx.channel_id)[0])


@write("PUT /channels/{channel_id}/read", Access.MEMBER, emits=["channel:read"])
def mark_read(ctx: OperationContext, args: MarkReadArgs) -> Result[None]:
    """Mark a channel as read up to `message_id`. With `back`, the mark may also move backwards; 0 makes everything unread."""
    state = move_read_mark(ctx.db, ctx.user.user_id, args)
    if state is None:
        return Result(None)
    return Result(None, [EmitReadMark(ctx.channel_id), Emit("channel:read", ctx.user.user_id, state, ctx.server_id)])


@write(None, Access.MEMBER, event="hand:raise", emits=["hand:raised"], limit="post", frees_space=True)
def raise_hand(ctx: OperationContext, args: ServerArgs) -> Result[None]:
    """Raise your hand in a server, even while muted; raising it again changes nothing. It is lowered 10 seconds after your last
    socket disconnects."""
    if not ctx.presence.is_connected(ctx.server_id, ctx.user.user_id):
        raise chat_error("NOT_JOINED")
    raised = HandRaised(ctx.server_id, ctx.user.user_id, ctx.user.username, ctx.now, name=ctx.user.name)
    return Result(None, [SetHand(ctx.server_id, ctx.user.user_id, raised)])


@write(None, Access.SELF_OR_ADMIN, event="hand:lower", emits=["hand:lowered"], limit="post", frees_space=True)
def lower_hand(ctx: OperationContext, args: HandArgs) -> Result[None]:
    """Lower your hand or, as an admin, the hand of `user_id`."""
    return Result(None, [SetHand(ctx.server_id, args.user_id or ctx.user.user_id, None)])


@read("GET /servers/{server_id}/changes", Access.MEMBER, slow=True)
def list_changes(ctx: OperationContext, args: ChangesArgs) -> Result[Changes]:
    """List the changes of a server after a sequence number."""
    return Result(load_changes(ctx.db, args, ctx.visible_users(), ctx.user.user_id))


# ---- Engine.IO sessions --------------------------------------------------------------------------------------------
# Engine.IO 4 for one client. Memory and waiting times are bounded. Nothing here depends on the chat. Delivery to a room is
# optimized, because it limits the whole server. Measured per client and message (1,000 WebSocket clients in one room, 380-byte
# frames, one core), the library's own delivery takes 56 to 61 us of CPU time; a frame that is encoded once for all clients and
# written at once takes 9 to 11 us, and frames that are joined into one write take 0.4 to 1.6 us.

BACKLOG_BYTES = 1 << 20  # maximum size of the packets that wait for one client; with more, it is disconnected
BACKLOG_PACKETS = 1000  # maximum number of these packets
POLL_PACKETS = 16  # packets in one poll response; the Python client does not accept more
ROOM_BUFFER_BYTES = 1 << 18  # size of a room's buffer, after which the next event starts a new one
MAX_UNSENT_BYTES = 16 << 20  # bytes that may wait for all clients together
MAX_STALL_SECONDS = 20.0  # a client that receives none of its waiting bytes for this time is disconnected
UNFINISHED_PER_ADDRESS = 500  # requests whose body has not arrived; each takes 14 KiB, most of it in aiohttp
WATCHED_BYTES = 1 << 14  # a write of up to this size fits into the kernel's buffer
PACKET_QUEUE_LENGTH = 64
RETRY_SECONDS = 10  # `retry_after` for a client that sends too much, or has too many sessions
LATE, SOON = 1, 2  # urgency of an event: under load, it may be 250 ms or 50 ms late, so that many share one write
CLOSE_GRACE = 0.7  # time to read the close frame before the connection is aborted

OPEN, CLOSE, PING, PONG, MESSAGE, UPGRADE, NOOP = "0123456"
BASE64 = "b"  # begins an attachment in base64: by polling, and by WebSocket from clients with the option `forceBase64`
REASON = engineio.AsyncServer.reason
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Packet = str | bytes  # one encoded Engine.IO packet: text with its type digit, or an attachment
SLOW_CLIENTS: web.RequestKey[SlowClients] = web.RequestKey("SLOW_CLIENTS")  # watches the client of a request


# What reading a body raises if it is malformed or late, or if the client has gone (RuntimeError). TimeoutError is an OSError.
BODY_ERRORS = (web.HTTPException, web.RequestPayloadError, aiohttp.ClientError, EOFError, OSError, RuntimeError, ValueError)


def decode_attachment(packet: Packet) -> bytes:
    """Return the bytes of an attachment. Raises BAD_REQUEST."""
    try:
        return packet if isinstance(packet, bytes) else base64.b64decode(packet.removeprefix(BASE64), validate=True)
    except ValueError:
        raise chat_error("NOT_ENGINE_IO", what="an attachment is not base64") from None


def is_connected(request: web.BaseRequest) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def drop_frames(error: BaseException | None) -> None:
    """Remove the tracebacks of a stored exception. A frame that refers to the object that stores it would make a reference
    cycle, which only a full garbage collection frees."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def abort(client: asyncio.Transport) -> None:
    """Close with a TCP reset: the kernel then discards unsent data instead of retrying it for a client that does not read."""
    with contextlib.suppress(OSError, ValueError):  # the socket may be closed already
        if (sock := client.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.abort()


def unsent_bytes(client: asyncio.Transport) -> int:
    """Return how many bytes the kernel still holds for a client; 0 if the system does not report it."""
    sock: Any = client.get_extra_info("socket")
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
    return 0


class SlowClients:
    """The clients for which bytes wait. A client that receives none of them for 20 s is disconnected. While more than 16 MiB
    wait for all clients together, so is the one that has received nothing for the longest time.

    Also the clients whose request body has not arrived. If an address has too many, the oldest body times out."""

    def __init__(self) -> None:
        # For each client: bytes held in memory, bytes not yet received (also in the kernel), time of the last progress.
        self.waiting: dict[asyncio.Transport, tuple[int, int, float]] = {}
        self.unfinished: dict[str, dict[asyncio.Transport, aiohttp.StreamReader]] = {}  # bodies by address, oldest first
        self.total = 0
        self.timer: asyncio.TimerHandle | None = None

    def watch(self, client: asyncio.Transport, written: int = 0) -> None:
        """Watch a client while bytes wait for it. `written`: bytes that stay in memory until the last of them is sent."""
        waits = client.get_write_buffer_size()
        if not waits:
            return
        before, left, since = self.waiting.get(client) or (0, waits + unsent_bytes(client), time.monotonic())
        size = max(before, waits, written)
        self.waiting[client] = (size, max(left, waits), since)
        self.total += size - before
        if self.total > MAX_UNSENT_BYTES or self.timer is None:
            self._sweep()

    def _sweep(self) -> None:
        """Update the sizes and disconnect clients, longest without progress first. Repeat every second while there are any."""
        now = time.monotonic()
        for address, clients in list(self.unfinished.items()):
            for client in [client for client in clients if client.is_closing()]:
                del clients[client]
            if not clients:
                del self.unfinished[address]
        self.waiting = {
            client: (size, left := waits + unsent_bytes(client), now if left < before else since)
            for client, (size, before, since) in self.waiting.items()
            if not client.is_closing() and (waits := client.get_write_buffer_size())
        }
        self.total = sum(size for size, _, _ in self.waiting.values())
        for client, (size, _, since) in sorted(self.waiting.items(), key=lambda item: item[1][2]):
            if now - since >= MAX_STALL_SECONDS or self.total > MAX_UNSENT_BYTES:
                self.total -= size
                del self.waiting[client]
                abort(client)
        if self.timer is not None:
            self.timer.cancel()
        is_needed = self.waiting or self.unfinished
        self.timer = asyncio.get_running_loop().call_later(1.0, self._sweep) if is_needed else None

    async def send(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        """Write a part of a body, and wait until the client has read most of it. Raises ConnectionError if it disconnects."""
        if (client := request.transport) is None:
            raise ConnectionResetError
        asyncio.get_running_loop().call_soon(self.watch, client, len(data))  # once `write` waits
        await response.write(data)
        await request.writer.drain()
        self.total -= self.waiting.pop(client, (0, 0, 0.0))[0]  # it has made progress

    def watch_body(self, client: asyncio.Transport, address: str, body: aiohttp.StreamReader) -> None:
        """Watch a client until the body of its request has arrived."""

        def forget() -> None:
            clients.pop(client, None)

        clients = self.unfinished.setdefault(address, {})
        if len(clients) >= UNFINISHED_PER_ADDRESS and client not in clients:
            clients.pop(next(iter(clients))).set_exception(TimeoutError())  # aiohttp may be the one that still reads it
        clients[client] = body
        body.on_eof(forget)
        if self.timer is None:
            self._sweep()

    async def wait_until_read(self, request: web.Request, client: asyncio.Transport) -> None:
        """Wait until the client has read most of the responses to its earlier requests, or is disconnected."""
        self.watch(client)
        with contextlib.suppress(ConnectionError):
            await request.writer.drain()


@functools.lru_cache(1)
def http_date(seconds: int) -> str:
    return email.utils.formatdate(seconds, usegmt=True)


class WatchedResponse(web.Response):
    """A response whose client is watched while it does not read, and whose body is dropped once it is written."""

    is_sent = False  # by `send`

    @property
    def keep_alive(self) -> bool | None:
        return True if self.is_sent else super().keep_alive

    def _watch(self, request: web.BaseRequest, size: int) -> None:
        if size > WATCHED_BYTES and request.transport is not None and SLOW_CLIENTS in request:
            # Called once the body is written: aiohttp then waits until the client has read it.
            asyncio.get_running_loop().call_soon(request[SLOW_CLIENTS].watch, request.transport, size)

    def prepare(self, request: web.BaseRequest) -> Any:
        self._watch(request, self.content_length or 0)
        return super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        await super().write_eof(data)
        self.body = None  # aiohttp keeps the response until the next request

    async def send(self, request: web.BaseRequest) -> bool:
        """Send the response without the steps that aiohttp takes for unusual cases: they are 6 % of a post. Return False, and
        send nothing, in these cases: no body, HTTP/1.0, or the connection does not stay open. Raises ConnectionError."""
        body, headers = self.body, self.headers
        stays_open = request.keep_alive and self.keep_alive is None and "Upgrade" not in request.headers
        if not stays_open or request.version != HttpVersion11 or request.method == "HEAD" or not isinstance(body, bytes):
            return False
        self.is_sent, self.body = True, None
        self._watch(request, len(body))
        headers["Content-Length"], headers["Date"] = str(len(body)), http_date(int(time.time()))
        await request.writer.write_headers(f"HTTP/1.1 {self.status} {self.reason}", headers)
        await request.writer.write_eof(body)
        return True


def frame(packet: Packet) -> bytes:
    """Return a packet as one unmasked WebSocket message (RFC 6455, 5.2)."""
    opcode, body = (0x82, packet) if isinstance(packet, bytes) else (0x81, packet.encode())
    size = len(body)
    if size < 126:
        return bytes((opcode, size)) + body
    if size < 65536:
        return struct.pack("!BBH", opcode, 126, size) + body
    return struct.pack("!BBQ", opcode, 127, size) + body


CLOSE_FRAME = b"\x88\x02\x03\xe8"  # with code 1000
CLOSE_TYPES = (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)


class Flusher:
    """Flushes the room buffers that have something to send, each client once per round. If idle, a round starts at once. After
    a round of d seconds comes a pause of `share` times d (at most `longest`), so fan-out leaves part of the loop to others, and
    under load many frames share one system call."""

    CHUNK = 256

    def __init__(self, share: float, longest: float) -> None:
        self.share, self.longest = share, longest
        self.waiting: list[RoomBuffer] = []
        self.not_before = 0.0

    def schedule(self, buffer: RoomBuffer) -> None:
        if not self.waiting:
            asyncio.get_running_loop().call_at(self.not_before, self._begin)
        self.waiting.append(buffer)

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self.not_before - loop.time() > 0.001:  # the last round was still in progress when this one was scheduled
            loop.call_at(self.not_before, self._begin)
            return
        buffers, self.waiting = self.waiting, []
        self._round([session for buffer in buffers if buffer.close() for session in buffer.sessions], 0.0, {})

    def _round(self, todo: list[Session], spent: float, merged: Merged) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for session in todo[: self.CHUNK]:
            session.flush(merged)
        now = loop.time()
        spent += now - started
        self.not_before = now + min(spent * self.share, self.longest)
        if len(todo) > self.CHUNK:
            loop.call_soon(self._round, todo[self.CHUNK :], spent, merged)


class RoomBuffer:
    """Consecutive events for a room, shared by all its clients. An event is appended once, and the joined events are sent to
    each client by one write per round. 64 messages to 1,000 clients take 0.3 ms; a list for each client took 26 ms. A
    client that enters the room receives the events from then on."""

    __slots__ = ("__weakref__", "is_open", "parts", "polling", "sessions", "size", "urgency")

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []  # (number, frames) of each event; numbers order the events of all rooms
        self.size = self.urgency = 0
        self.is_open = True
        self.sessions: list[Session] = []  # that use a WebSocket
        self.polling: list[Session] = []  # sessions that are sent each event separately

    def add(self, number: int, packets: list[Packet], frames: bytes) -> None:
        self.parts.append((number, frames))
        self.size += len(frames)
        for session in self.polling:
            for packet in packets:
                session.send(packet)

    def close(self) -> bool:
        """Close the buffer to new events. Return whether it was open."""
        was_open, self.is_open = self.is_open, False
        return was_open


Merged = dict[tuple[tuple[RoomBuffer, int, int], ...], bytes]


def merge(pieces: tuple[tuple[RoomBuffer, int, int], ...]) -> bytes:
    """Return these parts of several buffers (from an index to an index), in the order of their events."""
    parts = [part for buffer, start, stop in pieces for part in buffer.parts[start:stop]]
    if len(pieces) > 1:
        parts.sort()
    return b"".join([frames for _, frames in parts])


class PacketQueue:
    """Handles items one by one, in order, in its own task, so that queues take turns. `handle` must not raise exceptions. Each
    client has a queue: an idle one takes 0.2 KiB; a deque and an `asyncio.Event` would take 1.5 KiB."""

    __slots__ = ("handle", "jobs", "length", "running", "space")

    def __init__(self, handle: Callable[[Any], Awaitable[None]], length: int) -> None:
        self.jobs: list[Any] = []
        self.handle, self.length = handle, length
        self.running: asyncio.Task[None] | None = None
        self.space: asyncio.Future[None] | None = None  # what `wait_for_space` waits for

    def is_full(self) -> bool:
        return len(self.jobs) >= self.length

    async def wait_for_space(self) -> None:
        while self.is_full():
            self.space = self.space or asyncio.get_running_loop().create_future()
            await asyncio.wait([self.space])

    def _announce_space(self) -> None:
        if self.space is not None:
            self.space.set_result(None)
            self.space = None

    def put(self, job: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Add an item. If the queue is full, the oldest is dropped. `loop`: the running one, because `asyncio.create_task` asks
        the kernel for the process id, 1 us of a post."""
        if self.is_full():
            del self.jobs[0]
        self.jobs.append(job)
        if self.running is None:
            self.running = loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self.jobs:
                job = self.jobs.pop(0)
                self._announce_space()
                await self.handle(job)
                if self.jobs:  # let other queues run, even if the handler has not waited for anything
                    await asyncio.sleep(0)
        finally:
            self.running = None

    def close(self) -> None:
        """Drop the items that wait; the one being handled may finish."""
        self.jobs.clear()
        self._announce_space()


@dataclass
class EngineOptions:
    """The Engine.IO options of `socket_server`."""

    sid_prefix: str = ""  # of all session ids
    origins: Collection[str] = ()  # origins whose pages may connect, in addition to our own
    proxies: Sequence[Network | None] = ()  # peers whose X-Forwarded headers are trusted; None: all that use a Unix socket
    hosts: Collection[str] | None = None  # names, besides localhost, of a server that listens on loopback; None: any name
    ping_interval: float = 20  # seconds
    ping_timeout: float = 15  # seconds to answer a ping
    max_payload: int = 131072  # maximum bytes of a packet, and of the body of a POST
    connect_timeout: float = 10  # seconds to enter a namespace
    max_sessions: int = 20000
    max_sessions_per_address: int = 4000  # a school's 1,000 pupils, each with two devices and two tabs on each
    max_anonymous_per_address: int | None = None  # sessions without a user, counted separately; None: counted with the others
    frames_per_second: float | None = 100  # average of one client, with bursts of four times as many; None or 0: unlimited


class Session(asyncio.Transport):
    """One client's Engine.IO connection: polling, WebSocket, or in the middle of an upgrade. While the client polls, packets
    wait in `outbox` for the next poll or the upgrade, and `SlowClients` watches the session as if it were a transport. A
    WebSocket has no outbox: its frames go directly to the TCP transport, those for a room through the flusher."""

    __slots__ = (
        "address", "backlog", "charged_until", "closed", "connect_timer", "due", "engine", "loop", "outbox", "pinged", "poll",
        "posting", "room_buffers", "session", "sid", "tcp", "upgraded", "upgrading", "wakeup",
    )  # fmt: skip

    def __init__(self, sid: str, address: str, engine: Engine) -> None:
        super().__init__()
        self.sid, self.address, self.engine = sid, address, engine
        self.session: dict[str, Any] = {}
        self.closed = self.upgraded = self.upgrading = self.posting = False
        self.tcp: asyncio.Transport | None = None  # the connection of the WebSocket, from the start of the upgrade
        self.outbox: list[Packet] = []
        self.backlog = 0  # size of the outbox
        self.room_buffers: dict[RoomBuffer, int] = {}  # buffer with unsent events -> index of the first one
        self.poll: web.Request | None = None
        self.wakeup: asyncio.Future[None] | None = None  # what the poll waits for
        self.loop = asyncio.get_running_loop()
        self.connect_timer: asyncio.TimerHandle | None = None  # ends the session unless it enters a namespace in time
        self.charged_until = 0.0  # see `_charge`
        self.pinged = False
        # The time of the next ping, or until which a pong must arrive.
        self.due = self.loop.time() + engine.options.ping_interval

    # Sending

    def send(self, packet: Packet) -> None:
        """Send a packet to this client only, after everything that was sent before."""
        if self.closed:
            return
        if self.upgraded:
            return self._write(self._take_frames() + frame(packet))
        self.outbox.append(packet)
        self.backlog += len(packet)
        self.wake()
        if self.backlog > BACKLOG_BYTES or len(self.outbox) > BACKLOG_PACKETS:
            self.abort()
        elif self.backlog > WATCHED_BYTES:
            self.engine.slow_clients.watch(self)

    def join_buffer(self, buffer: RoomBuffer) -> None:
        """Send the events that are added to a buffer from now on."""
        if self.upgraded:
            self.room_buffers[buffer] = len(buffer.parts)
            buffer.sessions.append(self)
        else:
            buffer.polling.append(self)

    def _take_frames(self, merged: Merged | None = None) -> bytes:
        """Return the unsent frames of the room buffers. `merged` caches joined frames, for other clients in the same rooms."""
        if not self.room_buffers:
            return b""
        pieces = tuple([(buffer, start, len(buffer.parts)) for buffer, start in self.room_buffers.items()])
        self.room_buffers = {buffer: stop for buffer, _, stop in pieces if buffer.is_open}
        if merged is None:
            return merge(pieces)
        if (data := merged.get(pieces)) is None:
            data = merged[pieces] = merge(pieces)
        return data

    def flush(self, merged: Merged) -> None:
        if not self.closed:
            self._write(self._take_frames(merged))

    def _write(self, data: bytes) -> None:
        if not data or self.tcp is None or self.tcp.is_closing():
            return
        if (waiting := self.tcp.get_write_buffer_size()) > BACKLOG_BYTES:
            abort(self.tcp)
            self.end(REASON.TRANSPORT_ERROR)
        else:
            self.tcp.write(data)
            if waiting or len(data) > WATCHED_BYTES:
                self.engine.slow_clients.watch(self.tcp, len(data))

    def get_write_buffer_size(self) -> int:
        return self.backlog

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.end(REASON.TRANSPORT_ERROR, final_packet=None)

    def wake(self) -> None:
        if self.wakeup is not None and not self.wakeup.done():
            self.wakeup.set_result(None)

    def pop_packets(self, most: int | None = None) -> list[Packet]:
        packets = self.outbox[:most]
        self.outbox = self.outbox[len(packets) :]
        self.backlog = sum(map(len, self.outbox))
        return packets

    async def wait_packets(self, poll: web.Request) -> list[Packet]:
        """Wait for packets and return those for a poll: none if the session ends without any, or the client disconnects."""
        while not self.outbox and not self.closed:
            wakeup = self.loop.create_future()
            self.poll, self.wakeup = poll, wakeup
            try:
                await wakeup
            finally:
                if self.wakeup is wakeup:
                    self.poll = self.wakeup = None
            if not is_connected(poll):
                return []  # the packets are for the client's next poll
        return self.pop_packets(None if self.closed else POLL_PACKETS)

    def is_behind(self) -> bool:
        """Return whether the backlog is above a quarter of its limit."""
        written = self.tcp.get_write_buffer_size() if self.tcp is not None else 0
        return max(written, self.backlog) * 4 > BACKLOG_BYTES or len(self.outbox) * 4 > BACKLOG_PACKETS

    def has_poll(self) -> bool:
        return self.poll is not None and is_connected(self.poll)

    # Heartbeat

    def beat(self) -> None:
        if self.is_overdue():
            return self.end(REASON.PING_TIMEOUT, final_packet=None)
        if not self.pinged:
            self.pinged = True
            self.send(PING)
        self.due = self.loop.time() + self.engine.options.ping_timeout

    def _pong(self) -> None:
        if self.pinged and PING not in self.outbox:
            self.pinged = False
            self.due = self.loop.time() + self.engine.options.ping_interval

    def is_overdue(self) -> bool:
        """Return whether the pong is overdue, even if `beat` has not run yet. A loop that was stopped and wakes late says
        nothing about the client, which then gets the time for an answer once more."""
        return self.pinged and 0 <= self.loop.time() - self.due < 1.0

    # Receiving

    def _charge(self) -> None:
        """Count a packet. Raises RATE_LIMITED if the client is more than four seconds ahead of its packet rate."""
        if rate := self.engine.options.frames_per_second:
            now = self.loop.time()
            self.charged_until = max(self.charged_until, now) + 1 / rate
            if self.charged_until - now > 4:
                raise ChatError("RATE_LIMITED", "Too many packets", RETRY_SECONDS)

    async def handle_packet(self, packet: Packet) -> None:
        self._charge()
        if isinstance(packet, bytes) or packet[:1] == BASE64:
            await self.engine.handlers["message"](self.sid, decode_attachment(packet))
        elif packet[:1] == MESSAGE:
            await self.engine.handlers["message"](self.sid, packet[1:])
        elif packet[:1] == PONG:
            self._pong()
        elif packet[:1] == CLOSE:
            self.end(REASON.CLIENT_DISCONNECT, final_packet=NOOP)
        else:
            raise ChatError("BAD_REQUEST", "Clients may not send this packet")

    async def next_packet(self, ws: web.WebSocketResponse) -> Packet | None:
        """Return the next packet of the WebSocket, or None at its end. Once the session has ended, packets are discarded, but a
        client that completes an upgrade is sent what a poll would have returned."""
        while (message := await ws.receive()).type not in CLOSE_TYPES:
            if self.closed:
                if message.data == UPGRADE and not self.upgraded:
                    self._close_websocket()
                continue
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                data: Packet = message.data
                return data
            self._charge()
            if message.type is WSMsgType.PING:
                await ws.pong(message.data)
        return None

    def use_websocket(self) -> None:
        """Make the WebSocket the transport; the packets in the outbox go first."""
        self.upgraded, self.upgrading = True, False
        self._write(b"".join(map(frame, self.pop_packets())))

    # Closing

    def end(self, reason: str, final_packet: str | None = CLOSE) -> None:
        """End the session. For CLOSE_GRACE seconds the client can still read the packets that wait. A polling client then gets
        `final_packet` ("": no packet); if that is None, the packets that wait are dropped."""
        if self.closed:
            return
        self.closed = True
        if self.upgraded:
            self._close_websocket()
        else:
            self.outbox = [] if final_packet is None else [*self.outbox, *final_packet]
        self.room_buffers = {}
        if self.tcp is not None:
            self.loop.call_later(CLOSE_GRACE, abort, self.tcp)
        self.wake()
        self.engine.release(self, reason)

    def _close_websocket(self) -> None:
        if self.tcp is not None and not self.tcp.is_closing():
            self.tcp.write(self._take_frames() + b"".join(map(frame, self.pop_packets())) + CLOSE_FRAME)


# ---- Engine.IO server ----------------------------------------------------------------------------------------------
# All sessions, and the HTTP requests that open and use them. It runs on aiohttp and replaces python-engineio's own requests,
# sessions and queues.

POST_PACKETS = 256  # maximum number of packets in one POST
POST_SECONDS = 10.0  # time limit for the body of a POST, and for an upgrade
HEADERS = {  # in every response
    "Server": "ChatRTC",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
CORS = {"Vary": "Origin", "Access-Control-Expose-Headers": "Retry-After, Idempotent-Replayed"}
PREFLIGHT = CORS | {
    "Access-Control-Allow-Methods": "GET, POST, PUT, PATCH, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Max-Age": "600",
}
ANONYMOUS_SHARE = 4  # at most a quarter of `max_sessions` may be anonymous (without a user yet)
ANONYMOUS_PER_ADDRESS = 500  # anonymous sessions: a school that reconnects after a restart signs in within a second
HOPS_MAX = 32  # addresses in X-Forwarded-For that are examined
PORTS = {"http": 80, "https": 443}
PORT_MAX = 65535
HOST_MAX = 262  # characters of a name with its port
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)


@functools.lru_cache(4096)
def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address in `text`, with or without a port or a zone, or None. An IPv4-mapped IPv6 address is IPv4."""
    text = text.strip()
    if found := re.fullmatch(r"\[(.*)\](?::[0-9]+)?|([0-9.]+):[0-9]+", text):
        text = found[1] or found[2] or ""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def parse_network(text: str) -> Network | None:
    """Return a network of addresses, or None for `unix`. Raises ValueError."""
    if text == "unix":
        return None
    network = ipaddress.ip_network(text, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}") if mapped and network.prefixlen >= 96 else network


@functools.lru_cache(4096)
def address_key(text: str) -> str:
    """Return the text by which an address is counted and logged; for IPv6 its /64 network, which belongs to one customer."""
    address = parse_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address or "unknown")


def is_trusted(peer: str, options: EngineOptions) -> bool:
    """Return whether the peer is a proxy whose X-Forwarded headers are trusted."""
    if not options.proxies:
        return False
    address = parse_address(peer)
    return any((not peer) if network is None else (address and address in network) for network in options.proxies)


def client_address(request: web.BaseRequest, options: EngineOptions) -> str:
    """Return the client's address: the peer's or, if that is a trusted proxy, the last one in X-Forwarded-For that is not."""
    address = request.remote or ""
    if is_trusted(address, options):
        hops = ",".join(request.headers.getall("X-Forwarded-For", ())).rsplit(",", HOPS_MAX)
        for hop in (hop.strip()[:64] for hop in reversed(hops)):
            if parse_address(hop) is None:
                break
            address = hop
            if not is_trusted(hop, options):
                break
    return address_key(address)


def forwarded(request: web.BaseRequest, options: EngineOptions, name: str) -> str:
    """Return the value of X-Forwarded-`name`, if a trusted proxy sent it; else an empty string."""
    if not is_trusted(request.remote or "", options):
        return ""
    return request.headers.getall(f"X-Forwarded-{name}", [""])[-1].rpartition(",")[2].strip()


@functools.lru_cache(1024)
def parse_host(text: str) -> tuple[str, int | None] | None:
    """Return the name and the port in a Host header, or None if it is malformed."""
    found = HOST.fullmatch(text.lower()) if len(text) < HOST_MAX else None
    if found is None or not 0 < int(found[2] or 1) <= PORT_MAX:
        return None
    return found[1], int(found[2]) if found[2] else None


def parse_origin(text: str) -> tuple[str, str, int] | None:
    """Return the scheme, name and port of an http or https origin, or None if it is anything else."""
    scheme, _, rest = text.lower().partition("://")
    host = parse_host(rest) if scheme in PORTS and len(text) < HOST_MAX else None
    return host and (scheme, host[0], host[1] or PORTS[scheme])


def origin_of(url: str) -> str:
    """Return the scheme, host name and port of a URL."""
    return "/".join(url.split("/")[:3])


def request_scheme(request: web.BaseRequest, options: EngineOptions) -> str:
    """Return http or https, or "" if unknown: a proxy that is not trusted may have received https and sent http."""
    scheme = forwarded(request, options, "Proto").lower().replace("ws", "http")
    return scheme if scheme in PORTS else "https" if request.secure else ""


def request_host(request: web.BaseRequest, options: EngineOptions) -> tuple[str, int | None] | None:
    """Return the name and port by which the client addressed this server."""
    return parse_host(forwarded(request, options, "Host")[:HOST_MAX]) or parse_host(request.headers.get("Host", "")[:HOST_MAX])


@functools.lru_cache(1024)
def is_loopback(name: str) -> bool:
    """Return whether a host name or address means the machine itself."""
    name = name.strip("[]").rstrip(".").lower()
    address = parse_address(name)
    return name == "localhost" or name.endswith(".localhost") or (address is not None and address.is_loopback)


def is_own_host(text: str, names: Collection[str]) -> bool:
    """Return whether a Host header has one of these names, or means the machine itself."""
    host = parse_host(text)
    return host is not None and (host[0] in names or is_loopback(host[0]))


def is_origin_allowed(request: web.BaseRequest, options: EngineOptions, origins: Collection[str] | None = None) -> bool:
    """Return whether the page that sent the request, if any, has our own origin or an allowed one (default: of the options)."""
    text, origins = request.headers.get("Origin"), options.origins if origins is None else origins
    if text is None or "*" in origins:
        return True
    origin, host = parse_origin(text[:HOST_MAX]), request_host(request, options)
    if origin is None:
        return False
    scheme = request_scheme(request, options) or origin[0]
    own = host and (scheme, host[0], host[1] or PORTS[scheme])
    return origin == own or origin in map(parse_origin, origins)


def is_own_page(request: web.BaseRequest, options: EngineOptions, public_url: str | None) -> bool:
    """Return whether a page of our own origin sent the request. A request without Origin and Sec-Fetch-Site is rejected: it may
    be from a page of another site, with the user's cookies."""
    site = request.headers.get("Sec-Fetch-Site", "same-origin" if "Origin" in request.headers else "")
    return site == "same-origin" and is_origin_allowed(request, options, [origin_of(public_url)] if public_url else [])


def check_request(request: web.BaseRequest, options: EngineOptions) -> None:
    """Raise FORBIDDEN if the request is for another server, or from a page that may not use this one. A page of another site
    can point its own name at 127.0.0.1, and would then reach a server that listens there (DNS rebinding)."""
    text = request.headers.get("Host")
    if options.hosts is not None and text and not is_own_host(text[:HOST_MAX], options.hosts):
        listens_on = request.transport.get_extra_info("sockname") if request.transport else None
        is_local = isinstance(listens_on, tuple) and is_loopback(listens_on[0])
        if is_local and not is_trusted(request.remote or "", options):
            raise chat_error("HOST")
    if not is_origin_allowed(request, options):
        raise chat_error("ORIGIN")


def cors_headers(request: web.BaseRequest, options: EngineOptions) -> dict[str, str]:
    origin = request.headers.get("Origin")
    if origin is None or not is_origin_allowed(request, options):
        return {}
    return {"Access-Control-Allow-Origin": origin} | (PREFLIGHT if request.method == "OPTIONS" else CORS)


def encode_payload(packets: Iterable[Packet]) -> str:
    return "\x1e".join(BASE64 + base64.b64encode(one).decode() if isinstance(one, bytes) else one for one in packets)


def decode_payload(body: bytes) -> list[str]:
    try:
        packets = body.decode().split("\x1e")
    except ValueError:
        raise chat_error("NOT_ENGINE_IO", what="the payload is not text") from None
    if len(packets) > POST_PACKETS:
        raise ChatError("TOO_LARGE", "Too many packets in one request", reason="BODY_LONG")
    return packets


def count_down(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


class Engine(engineio.AsyncServer):  # type: ignore[misc]
    def __init__(self, *, options: EngineOptions, **library_options: Any) -> None:
        super().__init__(**library_options)
        self.options = options
        self.sockets: dict[str, Session] = {}
        self.closing_sessions: dict[str, Session] = {}  # sessions that have ended, with packets for one last poll
        self.per_address: Counter[str] = Counter()
        # Sessions whose user is not known yet, oldest first, and their number by address.
        self.anonymous: OrderedDict[str, Session] = OrderedDict()
        self.anonymous_at: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.client_log, self.numbers = RateLimitedLog(), itertools.count()  # numbers: one for each event for a room
        self.ticker: asyncio.TimerHandle | None = None
        self.use_this_loop()

    # Methods that the Socket.IO server and the application call

    def use_this_loop(self) -> None:
        """Make what belongs to one event loop: the program may start the chat again in another one."""
        self.slow_clients, self.draining = SlowClients(), False
        self.flushers = {LATE: Flusher(9, 0.25), SOON: Flusher(1, 0.05)}
        if self.ticker is not None:
            self.ticker.cancel()
            self.ticker = None

    def attach(self, app: web.Application, engineio_path: str = "engine.io") -> None:
        for end in ("/", ""):
            app.router.add_route("*", f"/{engineio_path.strip('/')}{end}", self.handle_request)

    async def send_packet(self, sid: str, pkt: Any) -> None:
        if session := self.sockets.get(sid):
            session.send(pkt.encode())

    async def disconnect(self, sid: str | None = None) -> None:
        sids = self.sockets.keys() if sid is None else self.sockets.keys() & {sid}
        for session in [self.sockets[sid] for sid in sids]:
            session.end(REASON.SERVER_DISCONNECT)

    def add_to_buffer(self, buffer: RoomBuffer, packets: list[Packet], urgency: int) -> None:
        """Add an event to a room's buffer, which is flushed with that urgency."""
        buffer.add(next(self.numbers), packets, b"".join(map(frame, packets)))
        if buffer.urgency < urgency:
            buffer.urgency = urgency
            self.flushers[urgency].schedule(buffer)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def drain(self, grace: float = 2.0) -> None:
        """Close all connections before the process ends; the clients then reconnect."""
        self.draining, sessions = True, list(self.sockets.values())
        for session in sessions:
            session.end(REASON.SERVER_DISCONNECT, final_packet="")
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace)
        for session in sessions:
            if session.tcp is not None:
                abort(session.tcp)

    # Sessions

    def release(self, session: Session, reason: str) -> None:
        """Release everything that is held for a session that has ended, and call the handlers of `disconnect`."""
        del self.sockets[session.sid]
        count_down(self.per_address, session.address)
        self.mark_authenticated(session.sid)
        if session.outbox and not session.has_poll():
            self.closing_sessions[session.sid] = session
            session.loop.call_later(CLOSE_GRACE, self.closing_sessions.pop, session.sid, None)
        self.spawn(self._trigger_event("disconnect", session.sid, reason, run_async=False))

    def _check_capacity(self, address: str) -> None:
        """Raise UNAVAILABLE or RATE_LIMITED if the server, or this address, has the maximum number of sessions. Anonymous ones,
        which anybody can open, are limited separately: if there are too many, the oldest is closed instead of rejecting the
        new one, so that they cannot keep out a client that signs in at once."""
        if self.draining or len(self.sockets) - len(self.anonymous) >= self.options.max_sessions:
            raise chat_error("SERVER_FULL")
        anonymous, share = self.anonymous_at[address], self.options.max_anonymous_per_address
        if self.per_address[address] - anonymous >= self.options.max_sessions_per_address:
            raise chat_error("ADDRESS_FULL", retry_after=RETRY_SECONDS)
        at_share = share is not None and anonymous >= share
        most, count = self.options.max_sessions, len(self.anonymous)
        if at_share or (count and (count >= most // ANONYMOUS_SHARE or len(self.sockets) >= most)):
            oldest = next(session for session in self.anonymous.values() if not at_share or session.address == address)
            oldest.end(REASON.SERVER_DISCONNECT, final_packet=None)

    def mark_anonymous(self, session: Session) -> None:
        """Count the session as anonymous, because it has no user yet, or no longer."""
        if self.options.max_anonymous_per_address is not None and session.sid not in self.anonymous:
            self.anonymous[session.sid] = session
            self.anonymous_at[session.address] += 1

    def mark_authenticated(self, sid: str) -> None:
        """Stop counting the session as anonymous, because it has signed in or ended."""
        if (session := self.anonymous.pop(sid, None)) is not None:
            count_down(self.anonymous_at, session.address)

    async def _open(self, request: web.Request, transport: str) -> Session:
        address, options = client_address(request, self.options), self.options
        self._check_capacity(address)
        sid = options.sid_prefix + self.generate_id()
        session = self.sockets[sid] = Session(sid, address, self)
        self.per_address[address] += 1
        if self.ticker is None:
            self._tick()
        self.mark_anonymous(session)
        may_upgrade = self.allow_upgrades and transport == "polling" and "websocket" in self.transports
        times = {"pingInterval": round(options.ping_interval * 1000), "pingTimeout": round(options.ping_timeout * 1000)}
        hello = {"sid": sid, "upgrades": ["websocket"] * may_upgrade, **times, "maxPayload": options.max_payload}
        session.send(OPEN + msgspec.json.encode(hello).decode())
        environ = {"aiohttp.request": request, "REMOTE_ADDR": address}  # a whole WSGI environment would take 4 KiB
        if await self._trigger_event("connect", sid, environ, run_async=False) not in (None, True):
            session.end(REASON.SERVER_DISCONNECT, final_packet=None)
            raise ChatError("FORBIDDEN", "The connection was rejected", status=401)
        return session

    def _tick(self) -> None:
        """Call `beat` of the sessions that are due, a few times a second while there are any. Because they share the timer, the
        pings and pongs of idle clients share rounds of the event loop."""
        loop = asyncio.get_running_loop()
        now, pause = loop.time(), min(self.options.ping_interval, self.options.ping_timeout, 20) / 40
        self.ticker = loop.call_later(pause, self._tick) if self.sockets else None
        for session in [session for session in self.sockets.values() if session.due <= now]:
            session.beat()

    def _find(self, sid: str) -> Session:
        session = self.sockets.get(sid)
        if session is not None and session.is_overdue():
            session.end(REASON.PING_TIMEOUT, final_packet=None)
        if session is None or session.closed:
            raise chat_error("SESSION_UNKNOWN")
        return session

    # Requests

    async def admit(self, request: web.Request) -> None:
        """Check a request, and wait until its client has read most of the responses to its earlier ones. Raises ChatError."""
        client = request.transport
        if client is not None and not request.content.is_eof():
            self.slow_clients.watch_body(client, client_address(request, self.options), request.content)
        check_request(request, self.options)
        request[SLOW_CLIENTS] = self.slow_clients
        if client is not None and client.get_write_buffer_size():
            await self.slow_clients.wait_until_read(request, client)

    async def handle_request(self, request: web.Request) -> web.StreamResponse:
        try:
            await self.admit(request)
            response = await self._respond(request)
        except ChatError as error:
            self.client_log.record_error(client_address(request, self.options), error)
            headers = {"Retry-After": str(RETRY_SECONDS)} if error.retry_after else {}
            response = web.json_response(error.body(), status=error.status, headers=headers)
        if not response.prepared:
            response.headers.update(HEADERS | cors_headers(request, self.options))
        return response

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        if request.method == "OPTIONS":
            return web.Response(status=204)
        query, method = request.query, request.method
        transport, sid = query.get("transport", ""), query.get("sid")
        if transport not in self.transports or query.get("EIO") != "4":
            raise chat_error("NOT_ENGINE_IO", what="it needs EIO=4 and a transport")
        if method not in ("GET", "POST") or (method == "POST" and sid is None):
            raise chat_error("NOT_ENGINE_IO", what="wrong method")
        if transport == "websocket":
            if method != "GET" or request.headers.get("Upgrade", "").lower() != "websocket":
                raise chat_error("NOT_ENGINE_IO", what="not a WebSocket handshake")
            return await self._websocket(request, sid)
        if sid is None:
            session = await self._open(request, transport)
            return WatchedResponse(text=encode_payload(session.pop_packets()))
        session = self.closing_sessions.pop(sid) if method == "GET" and sid in self.closing_sessions else self._find(sid)
        if session.upgraded:
            raise chat_error("NOT_ENGINE_IO", what="the session uses a WebSocket")
        return await (self._poll(session, request) if method == "GET" else self._post(session, request))

    async def _poll(self, session: Session, request: web.Request) -> web.StreamResponse:
        if session.upgrading and not session.closed:
            return web.Response(text=NOOP)
        if session.has_poll():
            session.end(REASON.TRANSPORT_ERROR)
            raise chat_error("NOT_ENGINE_IO", what="two polls at once")
        session.wake()  # an earlier poll whose client has gone must not take the packets of this one
        packets = await session.wait_packets(request)
        if not packets:
            raise chat_error("SESSION_UNKNOWN")
        return WatchedResponse(text=encode_payload(packets))

    async def _post(self, session: Session, request: web.Request) -> web.StreamResponse:
        try:
            if session.posting:
                raise chat_error("NOT_ENGINE_IO", what="two posts at once")
            session.posting = True
            for packet in await self._read_packets(request):
                await session.handle_packet(packet)
                if session.closed and packet != CLOSE:
                    raise chat_error("SESSION_UNKNOWN")
        except ChatError as error:
            self.end_for_protocol_error(session, error)
            raise
        session.posting = False
        return web.Response(text="ok")

    async def _read_packets(self, request: web.Request) -> list[str]:
        size = request.content_length
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ChatError("BAD_REQUEST", REASONS["BODY_COMPRESSED"][1], status=415, reason="BODY_COMPRESSED")
        if not size:
            raise chat_error("NOT_ENGINE_IO", what="no Content-Length")
        if size > self.options.max_payload:
            raise chat_error("BODY_LONG", n=self.options.max_payload)
        try:
            async with asyncio.timeout(POST_SECONDS):
                return decode_payload(await request.content.readexactly(size))
        except BODY_ERRORS:
            raise chat_error("BODY_BROKEN") from None

    def end_for_protocol_error(self, session: Session, error: Exception) -> None:
        """End the session of a client that broke the protocol, and log why."""
        if not session.closed:
            self.client_log.record(REFUSED_FOR + session.address, getattr(error, "detail", str(error)))
            session.end(REASON.TRANSPORT_ERROR, final_packet=None)

    async def _websocket(self, request: web.Request, sid: str | None) -> web.StreamResponse:
        session = self._find(sid) if sid else await self._open(request, "websocket")
        # Not compressed: that would cost each connection 200 KiB of memory, and CPU time.
        size = self.options.max_payload + 1
        ws = web.WebSocketResponse(timeout=CLOSE_GRACE, autoclose=False, autoping=False, compress=False, max_msg_size=size)
        ws.headers.update(HEADERS)
        try:
            await ws.prepare(request)
        except (web.HTTPException, ConnectionError) as error:
            if sid is None:
                session.end(REASON.TRANSPORT_ERROR)
            if isinstance(error, ConnectionError):  # the client has disconnected
                return web.Response(status=400)
            raise chat_error("NOT_ENGINE_IO", what="not a WebSocket handshake") from None
        tcp = request.transport
        if tcp is not None and session.tcp is None and not session.closed:
            session.tcp = tcp
            await self.spawn(self._serve(session, ws, upgrade=sid is not None))
        if session.upgraded and session.closed and tcp is not None:
            tcp.close()  # the close frame has been sent; aiohttp would send another
        await ws.close()
        drop_frames(ws.exception())
        return ws

    async def _serve(self, session: Session, ws: web.WebSocketResponse, *, upgrade: bool) -> None:
        try:
            if upgrade and not await self._upgrade(session, ws):
                return
            session.use_websocket()
            while (packet := await session.next_packet(ws)) is not None:
                await session.handle_packet(packet)
        except ChatError as error:
            self.end_for_protocol_error(session, error)
            await session.next_packet(ws)
        except ConnectionError:
            pass
        finally:
            if session.upgraded:
                session.end(REASON.TRANSPORT_CLOSE)

    async def _upgrade(self, session: Session, ws: web.WebSocketResponse) -> bool:
        """Upgrade from polling and return whether that succeeded. If it fails, the session continues to poll."""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(POST_SECONDS):
                if await session.next_packet(ws) == PING + "probe":
                    session.upgrading = True
                    await ws.send_str(PONG + "probe")
                    if session.has_poll():
                        session.send(NOOP)
                    if await session.next_packet(ws) == UPGRADE and not session.closed:
                        return True
        session.upgrading, session.tcp = False, None
        return False


# ---- Socket.IO server ----------------------------------------------------------------------------------------------
# A socketio.AsyncServer that uses this Engine.IO server. It handles each client's events in order, and no client can harm
# another. PRIVATE_NAMES lists the private names of the libraries that it uses; they are checked at startup.

ATTACHMENTS = 4  # maximum for one event or ack; if it has more, they are discarded and the event fails
RESERVED = frozenset(["connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener", "*"])


class StrictJson:
    """JSON by msgspec, which is faster; Python's parser handles what msgspec does not accept."""

    @staticmethod
    def loads(text: str) -> Any:
        try:
            return msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError):
            return json.loads(text)

    @staticmethod
    def dumps(value: Any, separators: tuple[str, str] = (",", ":")) -> str:
        try:
            return msgspec.json.encode(value).decode()
        except (TypeError, ValueError, OverflowError):
            return json.dumps(value, separators=separators)


# The type, the number of attachments, the namespace and the id of a Socket.IO packet.
PACKET_HEADER = re.compile(r"([0-6])(?:([0-9]{1,3})-)?(?:(/[^,?]*)(?:\?[^,]*)?(?:,|$))?([0-9]{1,15})?")


class StrictPacket(wire.Packet):  # type: ignore[misc]
    """A Socket.IO packet. Raises ValueError if it is one that a client must not send."""

    json = StrictJson
    error: ChatError | None = None  # the error of an event or ack with too many or too large attachments
    size = 0  # total size of the attachments received so far

    def decode(self, encoded_packet: Packet) -> int:
        head = PACKET_HEADER.match(encoded_packet) if isinstance(encoded_packet, str) else None
        if head is None:
            raise ValueError("not a Socket.IO packet")
        kind, attachments, self.namespace, number = head.groups()
        self.packet_type, self.id, count = int(kind), int(number) if number else None, int(attachments or 0)
        text = str(encoded_packet[head.end() :])
        try:
            self.data = self.json.loads(text) if text else None
        except (ValueError, RecursionError):
            raise ValueError("a packet whose data is not JSON") from None
        self._check_form(count)
        return count

    def _check_form(self, attachments: int) -> None:
        kind, data = self.packet_type, self.data
        valid = (attachments > 0) is (kind in (wire.BINARY_EVENT, wire.BINARY_ACK)) and kind != wire.CONNECT_ERROR
        if kind == wire.CONNECT:
            valid = valid and self.id is None and (data is None or isinstance(data, dict))
        elif kind in (wire.EVENT, wire.BINARY_EVENT):
            valid = valid and isinstance(data, list) and bool(data)
        elif kind in (wire.ACK, wire.BINARY_ACK):  # the id 0 is not an event's: the library stores its counter there
            valid = valid and isinstance(data, list) and bool(self.id)
        if not valid:
            raise ValueError("a malformed Socket.IO packet")
        if attachments > ATTACHMENTS:
            self.error = ChatError("BAD_REQUEST", f"An event has at most {ATTACHMENTS} binary attachments")

    def add_attachment(self, attachment: Packet, limit: int) -> bool:
        if not isinstance(attachment, bytes):
            raise ValueError("text instead of an attachment")
        self.size += len(attachment)
        if self.size > limit and self.error is None:
            self.error = ChatError("TOO_LARGE", f"The attachments of an event have at most {limit} bytes")
        if self.error is not None:
            self.attachments: list[Any] = [None] * (len(self.attachments) + 1)  # counted, not kept
            return bool(len(self.attachments) == self.attachment_count)
        try:
            return bool(super().add_attachment(attachment))
        except (LookupError, TypeError, RecursionError):
            raise ValueError("a placeholder without its attachment") from None


def event_name(data: Any) -> str:
    """Return the name of an event with this content, a list. A client may send anything as the name."""
    return data[0] if isinstance(data[0], str) else StrictJson.dumps(data[0])


class RoomManager(socketio.AsyncManager):  # type: ignore[misc]
    """The library's rooms, also indexed by client; an event for a room is encoded once."""

    def __init__(self) -> None:
        super().__init__()
        # By namespace and sid: the rooms, as the keys of a dict. A set of five takes 0.5 KiB more.
        self.rooms_of: dict[tuple[str, str], dict[str | None, None]] = {}

    def basic_enter_room(self, sid: str, namespace: str, room: str | None, eio_sid: str | None = None) -> None:
        super().basic_enter_room(sid, namespace, room, eio_sid=eio_sid)
        rooms = self.rooms_of.setdefault((namespace, sid), {})
        buffer, session = self.server.open_buffer(namespace, room), self.server.session(sid, namespace)
        if buffer is not None and session is not None and room not in rooms:
            session.join_buffer(buffer)
        rooms[room] = None

    def basic_leave_room(self, sid: str, namespace: str, room: str | None) -> None:
        if self.server.session(sid, namespace) is not None:
            self.server.room_buffers.pop((namespace, room), None)  # the next event gets a new buffer, without this client
        super().basic_leave_room(sid, namespace, room)
        self.rooms_of.get((namespace, sid), {}).pop(room, None)

    def basic_disconnect(self, sid: str, namespace: str, **_: Any) -> None:
        for room in sorted(self.rooms_of.pop((namespace, sid), ()), key=lambda room: room is None):  # None, for all, last
            self.basic_leave_room(sid, namespace, room)
        self.callbacks.pop(sid, None)
        for pending in (self.pending_connect, self.pending_disconnect):
            if sid in pending.get(namespace, ()):
                pending[namespace].remove(sid)

    def get_rooms(self, sid: str, namespace: str) -> list[str]:
        return [room for room in self.rooms_of.get((namespace, sid), ()) if room is not None]

    async def emit(self, event: str, data: Any, namespace: str, room: Any = None, skip_sid: Any = None, **options: Any) -> None:
        room = options.pop("to", None) or room
        if options.get("callback"):
            await super().emit(event, data, namespace, room=room, skip_sid=skip_sid, **options)
            return
        args = list(data) if isinstance(data, tuple) else [] if data is None else [data]
        packet = self.server.packet_class(wire.EVENT, [event, *args], namespace).encode()
        parts = packet if isinstance(packet, list) else [packet]
        parts = [MESSAGE + part if isinstance(part, str) else part for part in parts]
        skipped = skip_sid if isinstance(skip_sid, list | tuple | set) else (skip_sid,)
        if self.server.share is None or (isinstance(room, str) and self.eio_sid_from_sid(room, namespace) is not None):
            self.server.fan_out(parts, namespace, room, skipped)
        else:
            next(self.get_participants(namespace, room), None)  # raises an exception here rather than in all processes
            await self.server.share(EmitCustom(str(parts[0]), parts[1:], namespace, room, list(skipped)))


# The private names of the libraries that this file uses.
PRIVATE_NAMES: dict[type, str] = {
    engineio.AsyncServer: "_trigger_event handlers",
    socketio.AsyncServer: "_engineio_server_class _handle_eio_connect _handle_eio_message _handle_eio_disconnect"
    " _handle_connect _handle_disconnect _handle_ack _handle_event _trigger_event _send_packet"
    " eio handlers namespace_handlers not_handled _binary_packet",
    socketio.AsyncManager: "basic_enter_room basic_leave_room basic_disconnect get_rooms get_participants eio_sid_from_sid"
    " sid_from_eio_sid is_connected trigger_callback rooms callbacks pending_connect pending_disconnect",
    wire.Packet: "decode encode add_attachment",
}


def missing_private_names() -> list[str]:
    """Return the names of PRIVATE_NAMES that the installed libraries do not have."""
    made = [(owner(), name) for owner, names in PRIVATE_NAMES.items() for name in names.split()]
    return [f"{type(owner).__name__}.{name}" for owner, name in made if not hasattr(owner, name)]


class SocketServer(socketio.AsyncServer):  # type: ignore[misc]
    """A Socket.IO server that handles each client's events in order, and in which no client can harm another."""

    eio: Engine
    manager: Any

    def __init__(self, options: EngineOptions, **library_options: Any) -> None:
        self.packet_queues: dict[str, PacketQueue] = {}
        self.share: Callable[[EmitCustom], Awaitable[None]] | None = None  # emits an event on all processes
        # The newest buffer of each room, while it waits to be sent to somebody.
        self.room_buffers: WeakValueDictionary[tuple[str, str], RoomBuffer] = WeakValueDictionary()
        library_options.setdefault("client_manager", RoomManager())
        # `call` requires async_handlers; packet queues keep the order of events nevertheless.
        library_options |= {"async_mode": "aiohttp", "async_handlers": True, "serializer": StrictPacket}
        super().__init__(options=options, **library_options)

    def _engineio_server_class(self) -> type[Engine]:
        return Engine

    # Methods that the application calls

    def session(self, sid: str, namespace: str = "/") -> Session | None:
        return self.eio.sockets.get(self.manager.eio_sid_from_sid(sid, namespace) or "")

    def publish(self, event: str, payload: Any, room: str, skip_sid: str | None = None, urgency: int = SOON) -> None:
        """Send an event to a room, in order with everything else that its clients are sent."""
        assert room, "an event needs a room"
        if room in self.manager.rooms.get("/", ()):
            self.fan_out(["42" + StrictJson.dumps([event, payload])], "/", room, (skip_sid,), urgency)

    def open_buffer(self, namespace: str, room: Any) -> RoomBuffer | None:
        """Return the buffer to which the next event for a room is added, if there is one."""
        buffer = self.room_buffers.get((namespace, room))
        return buffer if buffer is not None and buffer.is_open and buffer.size <= ROOM_BUFFER_BYTES else None

    def fan_out(
        self, packets: list[Packet], namespace: str, room: Any, skipped: Collection[str | None], urgency: int = SOON
    ) -> None:
        """Send an encoded event to the clients in a room or a list of rooms, except those in `skipped`: directly if the room is
        the sid of one client, otherwise through the room's buffer."""
        if isinstance(room, str) and (eio_sid := self.manager.eio_sid_from_sid(room, namespace)) is not None:
            if (session := self.eio.sockets.get(eio_sid)) is not None and room not in skipped:
                for packet in packets:
                    session.send(packet)
            return
        sockets, is_shared = self.eio.sockets, isinstance(room, str) and not any(skipped)
        buffer = self.open_buffer(namespace, room) if is_shared else None
        if buffer is None:
            buffer = RoomBuffer()
            for sid, eio_sid in self.manager.get_participants(namespace, room):
                if sid not in skipped and (session := sockets.get(eio_sid)) is not None:
                    session.join_buffer(buffer)
            if is_shared:
                self.room_buffers[namespace, room] = buffer
        self.eio.add_to_buffer(buffer, packets, urgency)

    def disconnect_now(self, sid: str) -> None:
        """Disconnect a client. It receives no later event, and does not reconnect by itself."""
        session = self.session(sid)
        for room in self.manager.get_rooms(sid, "/"):
            self.manager.basic_leave_room(sid, "/", room)
        if session is not None:
            session.send("41")
            # No CLOSE packet: JavaScript's polling client would act on it before the rest of the poll, and reconnect when it
            # should not; Python's would not reconnect when it should.
            session.end(REASON.SERVER_DISCONNECT, final_packet="")

    async def disconnect(self, sid: str, namespace: str | None = None, ignore_queue: bool = False) -> None:
        session = self.session(sid, namespace or "/")
        await super().disconnect(sid, namespace, ignore_queue=ignore_queue)
        if session is not None and namespace in (None, "/"):
            session.end(REASON.SERVER_DISCONNECT, final_packet="")

    def enter(self, sid: str, room: str) -> None:
        if self.session(sid) is not None:
            self.manager.basic_enter_room(sid, "/", room)

    def leave(self, sid: str, room: str) -> None:
        self.manager.basic_leave_room(sid, "/", room)

    def sids_in(self, room: str) -> list[str]:
        return [sid for sid, _ in self.manager.get_participants("/", room)]

    # Connections and their packets

    async def _handle_eio_connect(self, eio_sid: str, environ: dict[str, Any]) -> None:
        await super()._handle_eio_connect(eio_sid, environ)
        handle = functools.partial(self._handle_packet, eio_sid)
        self.packet_queues[eio_sid] = PacketQueue(handle, PACKET_QUEUE_LENGTH)
        self._await_connect(eio_sid)

    def _await_connect(self, eio_sid: str) -> None:
        """End the session unless it enters a namespace within `connect_timeout`."""
        if session := self.eio.sockets.get(eio_sid):
            timeout = self.eio.options.connect_timeout
            session.connect_timer = session.loop.call_later(timeout, self._end_unless_connected, eio_sid)

    def _end_unless_connected(self, eio_sid: str) -> None:
        session = self.eio.sockets.get(eio_sid)
        if session and not any(self.manager.sid_from_eio_sid(eio_sid, n) for n in self.manager.get_namespaces()):
            session.end(REASON.SERVER_DISCONNECT)

    async def _handle_eio_disconnect(self, eio_sid: str, reason: str) -> None:
        """Release everything that is held for a client whose session has ended."""
        if queue := self.packet_queues.pop(eio_sid, None):
            queue.close()
        self._binary_packet.pop(eio_sid, None)
        await super()._handle_eio_disconnect(eio_sid, reason)

    async def _handle_eio_message(self, eio_sid: str, data: Packet) -> None:
        session, queue = self.eio.sockets.get(eio_sid), self.packet_queues.get(eio_sid)
        if session is None or queue is None:
            return
        try:
            packet = self._assemble(eio_sid, data)
        except ValueError as error:
            return self.eio.end_for_protocol_error(session, error)
        if packet is None:
            return
        if packet.packet_type in (wire.ACK, wire.BINARY_ACK):
            # Acks bypass the queue: the handler that runs in it may be waiting for this one.
            if packet.error is None:  # its attachments were discarded
                await self._handle_ack(eio_sid, packet.namespace, packet.id, packet.data)
        else:
            if queue.is_full():
                await queue.wait_for_space()
            if not session.closed:
                queue.put(packet, session.loop)

    def _assemble(self, eio_sid: str, data: Packet) -> StrictPacket | None:
        """Return the Socket.IO packet that this message completes, or None if attachments are still to come."""
        packet: StrictPacket | None = self._binary_packet.get(eio_sid)
        if packet is None:
            packet = StrictPacket()
            packet.attachment_count = packet.decode(data)
            if packet.attachment_count:
                self._binary_packet[eio_sid] = packet
                return None
        elif not packet.add_attachment(data, self.eio.options.max_payload):
            return None
        self._binary_packet.pop(eio_sid, None)
        return packet

    async def _handle_packet(self, eio_sid: str, packet: StrictPacket) -> None:
        """Handle a packet other than an ack. Answer an event whose handler raises an exception."""
        namespace, kind = packet.namespace or "/", packet.packet_type
        if eio_sid not in self.eio.sockets:
            return
        if kind == wire.CONNECT:
            work = self._handle_connect(eio_sid, namespace, packet.data)
        elif kind == wire.DISCONNECT:
            work = self._handle_disconnect(eio_sid, namespace, REASON.CLIENT_DISCONNECT)
        else:
            work = self._handle_event(eio_sid, namespace, packet.id, packet.data, packet.error)
        error = await result_or_exception(work)
        if error is not None:
            reply = self._error_packet(eio_sid, packet, error)
            drop_frames(error)
            if reply is not None:
                await self._send_packet(eio_sid, reply)
        if kind == wire.DISCONNECT:
            self._await_connect(eio_sid)

    async def _handle_connect(self, eio_sid: str, namespace: str, data: Any) -> None:
        if not {namespace, "*"} & {*self.handlers, *self.namespace_handlers, *self.namespaces}:
            await self._send_packet(eio_sid, StrictPacket(wire.CONNECT_ERROR, {"message": "Invalid namespace"}, namespace))
            return
        if self.manager.sid_from_eio_sid(eio_sid, namespace) is not None:
            return self.eio.end_for_protocol_error(self.eio.sockets[eio_sid], ValueError("connected twice"))
        try:
            await super()._handle_connect(eio_sid, namespace, data)
        finally:
            await self._finish_connect(eio_sid, namespace)

    async def _finish_connect(self, eio_sid: str, namespace: str) -> None:
        """Remove the client from the namespace if its connect handler failed, or if it has gone in the meantime."""
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace)
        if sid is None:
            return self._await_connect(eio_sid)
        session = self.eio.sockets.get(eio_sid)
        if session is not None and self.manager.is_connected(sid, namespace):
            if session.connect_timer is not None:
                session.connect_timer.cancel()  # which frees 0.6 KiB
            return
        if session is not None:
            session.end(REASON.SERVER_DISCONNECT)
        else:
            await self._handle_disconnect(eio_sid, namespace, REASON.TRANSPORT_CLOSE)
        await self.manager.disconnect(sid, namespace, ignore_queue=True)

    async def _handle_disconnect(self, eio_sid: str, namespace: str, reason: str | None = None) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace or "/")
        error = await result_or_exception(super()._handle_disconnect(eio_sid, namespace, reason))
        if isinstance(error, Exception):
            self.eio.client_log.record_bug("A disconnect handler failed", error)
            await self.manager.disconnect(sid, namespace or "/", ignore_queue=True)

    async def _handle_event(self, eio_sid: str, namespace: str, id: int | None, data: Any, error: Any = None) -> None:
        """Call the handler of an event and send the ack, if the client asked for one. Raises what the handler raises."""
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace)
        if not self.manager.is_connected(sid, namespace):
            return
        if error is not None:
            raise error
        result = self._call_handler(event_name(data), namespace, sid, data[1:])
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, msgspec.Raw) and namespace == "/":
            if id is not None and (session := self.eio.sockets.get(eio_sid)) is not None:
                session.send(f"{MESSAGE}{wire.ACK}{id}[{bytes(result).decode()}]")
        elif id is not None and result is not self.not_handled:
            values = list(result) if isinstance(result, tuple) else [] if result is None else [result]
            await self._send_packet(eio_sid, StrictPacket(wire.ACK, values, namespace, id))

    def _call_handler(self, event: str, namespace: str, sid: str, args: list[Any]) -> Any:
        """Call the handler of an event or, if it has none or a reserved name, that of `*`. Return what it returns."""
        handlers = self.handlers.get(namespace, {})
        handler = handlers.get("*")
        if event not in RESERVED and (event in handlers or handler is None):
            return self._trigger_event(event, namespace, sid, *args)
        return handler(event, sid, *args) if handler is not None else self.not_handled

    def _error_packet(self, eio_sid: str, packet: StrictPacket, error: Exception) -> StrictPacket | None:
        """Return the ack of an event that failed or, if it asked for none, an `error` event; None for other packets. Log the
        error."""
        if not isinstance(error, ChatError):
            self.eio.client_log.record_bug("A handler failed", error)
            error = ChatError("INTERNAL_ERROR")
        elif session := self.eio.sockets.get(eio_sid):
            self.eio.client_log.record_error(session.address, error)
        if packet.packet_type not in (wire.EVENT, wire.BINARY_EVENT):
            return None
        if packet.id is not None:
            return StrictPacket(wire.ACK, [{"success": False} | error.body()], packet.namespace, packet.id)
        notice = ErrorNotice(event_name(packet.data)[:100], error.detail, error.code, error.reason, error.field)
        return StrictPacket(wire.EVENT, ["error", msgspec.to_builtins(notice)], packet.namespace)

    async def _handle_ack(self, eio_sid: str, namespace: Any, id: Any, data: Any) -> None:
        sid = self.manager.sid_from_eio_sid(eio_sid, namespace or "/")
        if id in self.manager.callbacks.get(sid, ()):
            error = await result_or_exception(self.manager.trigger_callback(sid, id, data))
            if isinstance(error, Exception):
                self.eio.client_log.record_bug("A callback failed", error)


def socket_server(**options: Any) -> SocketServer:
    """Return a Socket.IO server. `options`: those of `EngineOptions` and of socketio.AsyncServer. Raises StartError."""
    engine_options = EngineOptions(**{one.name: options.pop(one.name) for one in fields(EngineOptions) if one.name in options})
    if missing := missing_private_names():
        raise StartError(f"The installed libraries lack what ChatRTC needs: {', '.join(missing)}")
    more = options.pop("cors_allowed_origins", None) or ()
    engine_options.origins = {*engine_options.origins, *([more] if isinstance(more, str) else more)}
    engine_options.max_payload = options.pop("max_http_buffer_size", engine_options.max_payload)
    return SocketServer(engine_options, **options)


# ---- Hub -----------------------------------------------------------------------------------------------------------
# The state of a running chat: its sockets, their users, and the effects of operations on them. Code here changes that state
# between two awaits, so that nothing else sees half of a change.

LOGIN_SECONDS = 10  # time limit for a socket to authenticate
OWN_MARK_SECONDS = 0.25  # delay of `channel:read` after a user's own post: an event for each post would cost 15 us
MAX_CACHED_TOKENS = 10_000
HOST_SECONDS = 5.0  # time limit for a coroutine of the embedding program; shorter than CALL_TIMEOUT
PRESENCE_EVENTS = ("user:connected", "user:disconnected")  # very many when everybody connects at once
MAX_LOWERED_HANDS = 10_000  # lowered hands whose times are kept; see `Bus._apply_hand`
HAND_SECONDS = 10  # time after which a raised hand is lowered if its user has no socket any more
LISTENER_EVENTS = 4096  # maximum number of events that wait for one listener of the program
LISTENER_END_SECONDS = 1.0  # time limit of the listeners for ending when the chat stops
UPLOADS, UPLOADS_PER_USER = 64, 3  # at a time; each takes up to 0.5 MiB of memory
DOWNLOADS, DOWNLOADS_PER_USER = 128, 8  # at a time; each takes up to 0.2 MiB of memory
TRANSFER_WAIT_SECONDS = 10.0  # time that an upload or download waits for a slot until a slow one is ended
SLOW_TRANSFER_SECONDS, SLOW_TRANSFER_SPEED = 60.0, 8192  # one that lasts longer than this, with fewer bytes per second
PART_BYTES = 64 * 1024  # size of the parts in which a file is read and sent
NOBODY = Principal(0, "")  # the user of a call without a token, and of a socket before it authenticates


class Connection:
    """One socket, from connect to disconnect."""

    __slots__ = ("address", "closed", "servers", "sid", "timer", "user")
    timer: asyncio.TimerHandle  # closes the socket unless it authenticates in time, later when its token expires

    def __init__(self, sid: str, address: str) -> None:
        self.sid, self.address, self.user, self.closed = sid, address, NOBODY, False
        self.servers: dict[int, set[int]] = {}  # joined server -> its channels


class Transfers(FairQueue):
    """Slots for uploads or downloads. If one waits because all slots are taken, the slowest is ended: otherwise clients that
    send or receive a few bytes at a time could keep all slots."""

    def __init__(self, slots: int, each: int) -> None:
        super().__init__(slots, each)
        self._running_since: dict[asyncio.Transport, tuple[float, web.BaseRequest]] = {}

    @contextlib.asynccontextmanager
    async def transfer(self, user_id: int, request: web.BaseRequest) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises RATE_LIMITED if the user's queue is full."""
        client = request.transport
        async with self.turn(user_id):
            if client is not None:
                self._running_since[client] = time.monotonic(), request
            try:
                yield
            finally:
                if client is not None:
                    self._running_since.pop(client, None)

    async def _wait(self, turn: asyncio.Future[None], user: object) -> None:
        while not (await asyncio.wait([turn], timeout=TRANSFER_WAIT_SECONDS))[0]:
            if self._free == 0 and self._running[user] < self._each:
                self._end_slowest()

    def _end_slowest(self) -> None:
        speeds = {}
        for client, (since, request) in self._running_since.items():
            if (seconds := time.monotonic() - since) > SLOW_TRANSFER_SECONDS:
                sent = request.writer.output_size - client.get_write_buffer_size() - unsent_bytes(client)
                speeds[client] = (request.content.total_bytes + sent) / seconds
        if speeds and speeds[client := min(speeds, key=speeds.__getitem__)] < SLOW_TRANSFER_SPEED:
            abort(client)


class Body(NamedTuple):
    """The bytes of an upload, whole or in parts of any size, and how many they are, if that is known."""

    data: bytes | AsyncIterator[bytes]
    size: int | None = None


class CallerInfo(NamedTuple):
    """Who makes a call, for functions of the embedding program. Before sign-in, `user_id` is 0 and `username` is empty."""

    user_id: int
    username: str
    name: str | None  # the display name, if it differs from the username
    address: str


class Caller(Struct):
    """Who makes a call: the user, the address, and the socket or request (None: the embedding program). `body`: the bytes of an
    upload. `action`: the channel action that a mute or a rule may forbid."""

    user: Principal
    address: str
    source: Connection | web.Request | None = None
    body: Body | None = None
    action: ChannelAction | None = None

    @property
    def is_program(self) -> bool:
        return self.source is None

    @property
    def info(self) -> CallerInfo:
        return CallerInfo(self.user.user_id, self.user.username, self.user.name, self.address)

    @property
    def connection(self) -> Connection:
        """The socket of a call that came by one."""
        assert isinstance(self.source, Connection)
        return self.source

    def has_gone(self) -> bool:
        """Return whether the client has disconnected, so that the result is not needed."""
        if isinstance(self.source, Connection):
            return self.source.closed
        return self.source is not None and not is_connected(self.source)


# Returns the user of the embedding program who sent a request, as arguments of `upsert_user`.
Identify = Callable[[web.Request], Awaitable[dict[str, Any] | None]]
HostFunction = Callable[..., Coroutine[Any, Any, Any]]


async def sendable(work: Awaitable[T]) -> T:
    """Await a coroutine of the embedding program. If it raises a ChatError that cannot be sent, raise the reason instead."""
    try:
        return await work
    except ChatError as error:
        msgspec.json.encode(msgspec.convert({"event": ""} | error.body(), ErrorNotice))
        if error.status not in range(400, 600):
            raise ValueError(f"{error.status} is not the status of an error") from error
        raise


class Hub:
    """The parts of one ChatRTC instance. Each async operation receives it."""

    def __init__(self, settings: Settings, sio: SocketServer) -> None:
        self.settings, self.sio = settings, sio
        self.signer = TokenSigner(secrets.token_hex() if settings.secret is None else settings.secret, settings.token_ttl)
        shared = settings.redis is not None
        self.store = Store(Path(settings.database), self.apply_effects, settings.disk_reserve << 20, shared)
        self.store.on_gap = self.reconnect_all
        self.sio.share = self.share if shared else None
        self.uploads, self.downloads = Transfers(UPLOADS, UPLOADS_PER_USER), Transfers(DOWNLOADS, DOWNLOADS_PER_USER)
        self.password_hasher = PasswordHasher(bounded=not settings.no_rate_limit)
        self.limiter, self.unlimited = Limiter(enabled=not settings.no_rate_limit), Limiter(enabled=False)
        self.presence, self.pages, self.missed = Presence(), ResultCache(), ResultCache()
        self.typing_tracker, self.voice_peers = TypingTracker(), VoicePeers()
        self.lowered: dict[tuple[int, int], str] = {}  # (server, user) -> when that hand was lowered, the oldest first
        self._hand_timers: dict[tuple[int, int], asyncio.TimerHandle] = {}  # (server, user) -> lowers the hand
        self.own_url = self.lan_url = ""  # the address it listens on, and its address in the local network; set by `serve`
        self.mount = ""  # the prefix under which it is attached
        self.connections: dict[str, Connection] = {}
        self.listeners: dict[str, list[PacketQueue]] = {}
        self.before: dict[str, list[HostFunction]] = {}  # operation -> functions of the embedding program
        self.host_events: dict[str, Operation] = {}  # events of the embedding program
        self.listening = False
        self.broadcast: Callable[[BusMessage], None] = lambda message: None  # sends to all other processes; set by `Bus`
        self.redis: Literal["up", "down"] | UnsetType = UNSET  # whether Redis connects the processes
        self.foreign = False  # whether the effects that are applied come from another process
        self.erase_after = 0.0  # see `erase_texts`
        self.identify: Identify | None = None
        self._token_cache: dict[str, Principal] = {}  # valid token -> its user
        self._effect_handlers: dict[type[Effect], Callable[..., None]] = {
            Emit: self.emit, AddChannelRoom: self.add_channel_room, RemoveRoom: self.remove_room, Evict: self.evict,
            Revoke: self.revoke, SetStatus: self.emit_status, Rename: self.rename, RecordPost: self.record_post,
            EmitReadMark: self.emit_read_mark, EmitCustom: self.emit_custom, LogLine: log.info,
            StopForbiddenActivity: self.stop_forbidden_activity, SetHand: self.set_hand,
        }  # fmt: skip
        self.use_this_loop()

    def use_this_loop(self) -> None:
        """Make what belongs to one event loop: the program may start the chat again in another one."""
        self.sio.eio.use_this_loop()
        self.qr_lock, self.piece_lock = asyncio.Lock(), asyncio.Lock()
        self.hands: dict[tuple[int, int], Hand] = {}  # (server, user) -> a raised hand
        for timer in self._hand_timers.values():
            timer.cancel()
        self._hand_timers.clear()
        self._own_marks: dict[int, RecordPost] = {}  # channel -> a read mark to emit soon

    def limiter_for(self, caller: Caller) -> Limiter:
        """Return the limiter of a call. The embedding program has no limits."""
        return self.unlimited if caller.is_program else self.limiter

    # Reading the database. The result of `read_inline` stays true until the next await: use it before then.

    def authorized(self, access: Access, caller: Caller, args: Args, run: Callable[[OperationContext, Any], R]) -> Query[R]:
        """Return a job for the store that authorizes the caller in the open transaction, then runs the operation or query."""

        def job(db: sqlite3.Connection) -> R:
            ctx = OperationContext(db, caller.user, time.time(), self.presence, self.pages, self.settings)
            authorize(access, ctx, args)
            if caller.action is not None:
                check_channel_rules(ctx, args, caller.action)
            return run(ctx, args)

        return job

    def query(self, caller: Caller, args: Args, run: Callable[[OperationContext, Any], R], access: Access = Access.MEMBER) -> R:
        """Run a fast query on the target of the arguments, if the caller has access to it. Raises ChatError."""
        return self.store.read_inline(self.authorized(access, caller, args, run))

    async def query_slow(self, caller: Caller, args: Args, query: Callable[[OperationContext, Any], R]) -> R:
        """Like `query`, for a query that may take seconds (see `read_slow`)."""
        return await self.read_slow(caller, self.authorized(Access.MEMBER, caller, args, query))

    async def read_slow(self, caller: Caller, job: Query[R]) -> R:
        """Run a slow query; callers take turns. It is interrupted if the client disconnects."""
        user_key = caller.user.user_id or caller.address
        return await self.store.read_slow(user_key, caller.has_gone, job, caller.is_program)

    def require_member(self, caller: Caller, args: Args) -> None:
        """Raise FORBIDDEN unless the caller is a member."""
        self.query(caller, args, lambda ctx, args: None)

    def authenticate_token(self, token: str) -> Principal:
        """Return the user of a token. Raises UNAUTHORIZED if it is invalid or revoked."""
        cached = self._token_cache.get(token)
        if cached is not None and cached.expires > time.time():
            return cached
        user = self.load_user(*self.signer.verify(token), hashlib.sha256(token.encode()).digest())
        if len(self._token_cache) >= MAX_CACHED_TOKENS:
            del self._token_cache[next(iter(self._token_cache))]
        self._token_cache[token] = user
        return user

    def load_user(self, user_id: int, generation: int, expires: float, digest: bytes) -> Principal:
        """Return the user of a token with this content and digest. Raises UNAUTHORIZED if it is revoked."""
        user = self.store.read_inline(load_principal, user_id, digest)
        if user is None or user.generation != generation:
            raise chat_error("TOKEN_INVALID")
        return user._replace(digest=digest, expires=expires)

    def forget_tokens(self, user_id: int) -> None:
        self._token_cache = {token: user for token, user in self._token_cache.items() if user.user_id != user_id}

    async def call_program(
        self, what: str, work: Coroutine[Any, Any, T], may_refuse: bool = False, failure: ChatError | None = None
    ) -> T:
        """Await a coroutine of the embedding program. Raises `failure` (default: UNAVAILABLE), and logs why, if it fails or
        takes too long. With `may_refuse`, its ChatErrors are sent to the client."""
        task = self.sio.eio.spawn(sendable(work))
        try:
            await asyncio.wait([task], timeout=HOST_SECONDS)
        finally:
            task.cancel()
        outcome: Any = TimeoutError(f"cancelled, or no result within {HOST_SECONDS} seconds")
        if task.done() and not task.cancelled():
            outcome = await result_or_exception(task)
        if isinstance(outcome, ChatError) and may_refuse:
            raise outcome
        if isinstance(outcome, Exception):
            self.sio.eio.client_log.record_bug(f"{what} failed", outcome)
            raise failure or chat_error("HOST_FAILED")
        result: T = outcome
        return result

    # Effects and events

    def apply_effects(self, effects: Iterable[Effect], foreign: bool = False) -> None:
        """Apply the effects of operations. Called once their changes are on disk, in the order of the commits."""
        self.foreign = foreign
        try:
            for effect in effects:
                self._effect_handlers[type(effect)](*effect)
        finally:
            self.foreign = False

    @contextlib.contextmanager
    def as_foreign(self, foreign: bool = True) -> Iterator[None]:
        """Treat the effects of the body as another process's: that process calls the program's listeners, this one does not."""
        before, self.foreign = self.foreign, foreign
        try:
            yield
        finally:
            self.foreign = before

    async def share(self, effect: EmitCustom) -> None:
        """Emit an event of the embedding program on all processes. Raises UNAVAILABLE."""
        await self.store.write(lambda db: Result(None, [effect]))

    def emit_custom(self, packet: str, attachments: list[bytes], namespace: str, room: Any, skipped: list[str | None]) -> None:
        self.sio.fan_out([packet, *attachments], namespace, room, skipped)

    def reconnect_all(self) -> None:
        """Close all sockets, because they have missed events. Their clients reconnect and catch up."""
        log.warning("this process has missed rows of the commit log: its clients reconnect")
        self._token_cache.clear()
        self.pages.clear()
        self.missed.clear()
        self.hands.clear()
        self.broadcast(Notice("want"))  # the others list the raised hands
        with contextlib.suppress(ChatError):
            self.presence.invisible = set(self.store.read_inline(load_invisible))
        for session in list(self.sio.eio.sockets.values()):
            session.end(REASON.TRANSPORT_ERROR, final_packet="")

    def emit(
        self, event: str, to: int, payload: Payload | msgspec.Raw, server_id: int = 0, *, room: str = "",
        skip_sid: str | None = None,
    ) -> None:  # fmt: skip
        """Send an event to its room, and to the program's own listeners."""
        if isinstance(payload, ChannelUser) and event in BUS_EVENTS and not self.foreign:
            self.broadcast(Change(event, payload.channel_id, payload.user_id, getattr(payload, "peer_id", "-")))
        room, urgency = room or EVENTS[event].room, LATE if event in PRESENCE_EVENTS else SOON
        self.sio.publish(event, payload, f"{room}:{to}", skip_sid, urgency)
        for queue in self.listeners.get(event, ()) if self.listening and not self.foreign else ():
            if queue.is_full():
                self.sio.eio.client_log.record(f"A listener of {event} is too slow", "event dropped")
            queue.put((payload, to if room == "server" else server_id), asyncio.get_running_loop())

    def add_listener(self, event: str, call: HostFunction) -> None:
        """Call a coroutine function with the payload of each such event and the server's id. Each listener has its own queue,
        so that a slow one delays no other. If more than LISTENER_EVENTS wait, the oldest is dropped, and the log says so."""

        async def handle(job: tuple[Payload, int]) -> None:
            payload, server_id = job
            content = ({"server_id": server_id} if server_id else {}) | msgspec.to_builtins(payload)
            error = await result_or_exception(call(content))
            if isinstance(error, Exception):
                log.error("a listener failed", exc_info=error)

        self.listeners.setdefault(event, []).append(PacketQueue(handle, LISTENER_EVENTS))

    async def end_listeners(self) -> None:
        """Drop the events that wait for listeners, and cancel the calls in progress."""
        self.listening, queues = False, list(itertools.chain(*self.listeners.values()))
        for queue in queues:
            queue.close()
        if tasks := [queue.running for queue in queues if queue.running is not None]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=LISTENER_END_SECONDS)

    def connections_of(self, user_id: int) -> list[Connection]:
        return [self.connections[sid] for sid in self.sio.sids_in(f"user:{user_id}") if sid in self.connections]

    def add_channel_room(self, server_id: int, channel_id: int) -> None:
        for sid in self.sio.sids_in(f"server:{server_id}"):
            self.connections[sid].servers[server_id].add(channel_id)
            self.sio.enter(sid, f"channel:{channel_id}")

    def record_post(self, server_id: int, user_id: int, channel_id: int, message_id: int, foreign: bool) -> None:
        """End the author's typing. Emit `channel:read` a moment later, so that posting quickly does not double the events."""
        self.stop_typing(channel_id, user_id)
        before = self._own_marks.get(channel_id)
        if before is not None and before.user_id != user_id:
            self.emit_read_mark(channel_id)  # before the other user's post
        has_sockets = f"user:{user_id}" in self.sio.manager.rooms.get("/", ())
        if has_sockets or ("channel:read" in self.listeners and not self.foreign):
            if channel_id not in self._own_marks:
                asyncio.get_running_loop().call_later(OWN_MARK_SECONDS, self.emit_read_mark, channel_id)
            self._own_marks[channel_id] = RecordPost(server_id, user_id, channel_id, message_id, self.foreign)

    def emit_read_mark(self, channel_id: int) -> None:
        if (mark := self._own_marks.pop(channel_id, None)) is not None:
            with self.as_foreign(mark.foreign):
                self.emit("channel:read", mark.user_id, ReadState(channel_id, mark.message_id, 0, 0), mark.server_id)

    def forget_marks(self, server_id: int, user_id: int | None = None) -> None:
        """Drop the delayed read marks of a user in a server that the user has left, or of all users if it is deleted."""
        marks = self._own_marks.items()
        self._own_marks = {k: mark for k, mark in marks if mark.server_id != server_id or user_id not in (None, mark.user_id)}

    def remove_room(self, server_id: int, channel_id: int | None) -> None:
        """Take all sockets out of a deleted channel or server, without events other than the one about the deletion."""
        peers = self.voice_peers.in_server(server_id) if channel_id is None else self.voice_peers.in_channel(channel_id)
        for peer in peers:
            del self.voice_peers[peer.sid]
        if channel_id is None:
            self.hands = {key: hand for key, hand in self.hands.items() if key[0] != server_id}
            self.forget_marks(server_id)
            self.typing_tracker.remove(server_id=server_id)
            for sid in self.sio.sids_in(f"server:{server_id}"):
                self.leave_server(self.connections[sid], server_id, quietly=True)
        else:
            self._own_marks.pop(channel_id, None)
            self.typing_tracker.remove(channel_id=channel_id)
            for sid in self.sio.sids_in(f"channel:{channel_id}"):
                self.connections[sid].servers[server_id].discard(channel_id)
                self.sio.leave(sid, f"channel:{channel_id}")

    def evict(self, server_id: int, user_id: int) -> None:
        self.forget_marks(server_id, user_id)
        connections = [one for one in self.connections_of(user_id) if server_id in one.servers]
        for connection in connections:  # first, so that none of them receives the events that follow
            self.leave_rooms(connection, server_id)
        for connection in connections:
            self.leave_server(connection, server_id)
        self.stop_forbidden_activity(server_id, user_id, None)  # by the user's sockets on other processes
        self.set_hand(server_id, user_id, None)

    def revoke(self, user_id: int, digest: bytes | None) -> None:
        self.forget_tokens(user_id)
        with self.as_foreign(False):  # only this process can say what its own sockets did
            for connection in self.connections_of(user_id):
                if digest in (None, connection.user.digest):
                    self.close(connection)

    def rename(self, user_id: int, name: str | None) -> None:
        self.forget_tokens(user_id)
        self.pages.clear()  # servers that the user has left show the new name too, without a new sequence number
        self.missed.clear()
        typing, voice, hands = self.typing_tracker.values(), self.voice_peers.values(), self.hands.values()
        named: list[TypingUser | Peer | Hand] = [*typing, *voice, *hands]
        for one in named:
            if one.notice.user_id == user_id:
                one.notice.name = name
        for connection in self.connections_of(user_id):
            connection.user = connection.user._replace(name=name)

    def emit_status(self, user: Identity, status: Status, server_ids: list[int]) -> None:
        """Emit a new status. Others see an invisible user as disconnected; only the user's own sockets receive that status."""
        user_id, username, name = user.user_id, user.username, user.name
        self.forget_tokens(user_id)
        payload, was_invisible = StatusChanged(user_id, username, status, name=name), user_id in self.presence.invisible
        if status == "invisible":
            for key in [key for key in self.typing_tracker if key[1] == user_id]:
                self.stop_typing(*key)  # while others can still see it
            self.presence.invisible.add(user_id)
            self.emit("user:status", user_id, payload, room="user")
        else:
            self.presence.invisible.discard(user_id)
            for server_id in server_ids:
                self.emit("user:status", server_id, payload)
        if was_invisible != (status == "invisible"):
            event = "user:connected" if was_invisible else "user:disconnected"
            for server_id in self.presence.servers(user_id):
                self.emit(event, server_id, ServerUser(server_id, user_id, username, name=name))

    # Sockets

    def add_connection(self, sid: str, address: str) -> Connection:
        """Add a socket. It is closed unless it authenticates within LOGIN_SECONDS."""
        connection = self.connections[sid] = Connection(sid, address)
        connection.timer = self._close_later(connection, LOGIN_SECONDS)
        return connection

    def _close_later(self, connection: Connection, seconds: float) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, min(seconds, 10.0**8)), self.close, connection)

    def bind_principal(self, connection: Connection, user: Principal) -> None:
        """Assign the socket to the user until the token expires. Raises UNAVAILABLE, CONFLICT, RATE_LIMITED."""
        if connection.closed:
            raise chat_error("CLOSING")
        if connection.user.user_id not in (NOBODY.user_id, user.user_id):
            raise chat_error("SOCKET_TAKEN", name=connection.user.username)
        others = self.connections_of(user.user_id)
        if len(others) >= SOCKETS_PER_USER and connection not in others and not self.settings.no_rate_limit:
            raise chat_error("TOO_MANY_SOCKETS", retry_after=30, n=SOCKETS_PER_USER)
        connection.user = user
        if (session := self.sio.session(connection.sid)) is not None:
            self.sio.eio.mark_authenticated(session.sid)
        connection.timer.cancel()
        connection.timer = self._close_later(connection, user.expires - time.time())
        self.sio.enter(connection.sid, f"user:{user.user_id}")

    def close(self, connection: Connection) -> None:
        """Close a socket and its connection. The client does not reconnect by itself."""
        self.remove_connection(connection.sid)
        self.sio.disconnect_now(connection.sid)

    def remove_connection(self, sid: str) -> None:
        """Release everything that is held for a socket that has gone, and emit what that changes for others."""
        connection = self.connections.pop(sid, None)
        if connection is None:
            return
        connection.closed = True
        connection.timer.cancel()
        if (session := self.sio.session(sid)) is not None:  # it has only left the namespace
            self.sio.eio.mark_anonymous(session)
        for server_id in list(connection.servers):
            self.leave_server(connection, server_id)

    def join_server(self, connection: Connection, server_id: int, channel_ids: Iterable[int]) -> None:
        if connection.closed:
            raise chat_error("CLOSING")
        self.sio.enter(connection.sid, f"server:{server_id}")
        connection.servers[server_id] = set(channel_ids)
        for channel_id in channel_ids:
            self.sio.enter(connection.sid, f"channel:{channel_id}")
        self.mark_connected(server_id, connection.user, connection.sid)

    def leave_rooms(self, connection: Connection, server_id: int) -> None:
        for channel_id in connection.servers[server_id]:
            self.sio.leave(connection.sid, f"channel:{channel_id}")
        self.sio.leave(connection.sid, f"server:{server_id}")

    def leave_server(self, connection: Connection, server_id: int, quietly: bool = False) -> bool:
        """Take the socket out of a server's rooms, and end its typing and its voice call there, for which it must have joined
        them. Return whether it had."""
        if server_id not in connection.servers:
            return False
        for key in self.typing_tracker.of_socket(connection.sid, server_id):
            self.stop_typing(*key)
        peer = self.voice_peers.get(connection.sid)
        if peer is not None and peer.server_id == server_id:
            self.leave_voice(connection.sid)
        self.leave_rooms(connection, server_id)
        del connection.servers[server_id]
        self.mark_disconnected(server_id, connection.user, connection.sid, quietly)
        return True

    def mark_connected(self, server_id: int, user: Principal | Profile, sid: str) -> None:
        """Record that a user is connected by this socket, or by another process. Emit it if others see a change."""
        was_here = self.presence.has(server_id, user.user_id)
        if self.presence.join(server_id, user.user_id, sid):
            self.emit("user:connected", server_id, ServerUser(server_id, user.user_id, user.username, name=user.name))
        self.watch_hand(server_id, user.user_id)
        if not was_here and not is_foreign(sid):
            self.broadcast(Change("user:connected", server_id, user.user_id))

    def mark_disconnected(self, server_id: int, user: Principal | Profile, sid: str, quietly: bool = False) -> None:
        if self.presence.leave(server_id, user.user_id, sid) and not quietly:
            with self.as_foreign(self.foreign and is_foreign(sid)):  # an eviction by another process, too, may end our socket's
                self.emit("user:disconnected", server_id, ServerUser(server_id, user.user_id, user.username, name=user.name))
        self.watch_hand(server_id, user.user_id)
        if not is_foreign(sid) and not self.presence.has(server_id, user.user_id):
            self.broadcast(Change("user:disconnected", server_id, user.user_id))

    def start_typing(self, server_id: int, channel_id: int, user: Principal | Profile, sid: str) -> None:
        loop = asyncio.get_running_loop()
        notice = ChannelUser(channel_id, user.user_id, user.username, name=user.name)
        is_due = self.typing_tracker.start(server_id, notice, sid, loop.time())
        if is_due and user.user_id not in self.presence.invisible:
            self.emit("user:typing", channel_id, notice, server_id, skip_sid=sid)
        loop.call_later(TYPING_SECONDS + 0.01, self.end_typing)

    def end_typing(self) -> None:
        for channel_id, user_id in self.typing_tracker.expired(asyncio.get_running_loop().time()):
            with self.as_foreign(is_foreign(self.typing_tracker[channel_id, user_id].sid)):
                self.stop_typing(channel_id, user_id)

    def stop_typing(self, channel_id: int, user_id: int) -> None:
        typing_user = self.typing_tracker.pop((channel_id, user_id), None)
        if typing_user is not None and user_id not in self.presence.invisible:
            self.emit("typing_stop", channel_id, typing_user.notice, typing_user.server_id, skip_sid=typing_user.sid)

    def leave_voice(self, sid: str) -> None:
        if (peer := self.voice_peers.pop(sid, None)) is not None:
            self.emit("voice:leave", peer.server_id, peer.notice)
            if self.foreign and not is_foreign(sid):  # `emit` announces no foreign effect, but this peer is ours
                self.broadcast(Change("voice:leave", peer.notice.channel_id, peer.notice.user_id, peer.notice.peer_id))

    def join_voice(self, sid: str, server_id: int, notice: VoicePeer) -> None:
        """Add a peer to a voice channel, which the user's other devices leave."""
        for peer in self.voice_peers.in_channel(notice.channel_id):
            if peer.notice.user_id == notice.user_id:
                self.leave_voice(peer.sid)
        self.voice_peers[sid] = Peer(sid, server_id, notice)
        self.emit("voice:join", server_id, notice)

    def stop_forbidden_activity(self, server_id: int, user_id: int | None, channel_id: int | None) -> None:
        """End a user's typing and voice calls, or those in a channel, if they are no longer allowed."""
        active: list[TypingUser | Peer] = [*self.typing_tracker.values(), *self.voice_peers.values()]
        for one in active:
            channel, user = one.notice.channel_id, one.notice.user_id
            if one.server_id != server_id or user_id not in (None, user) or channel_id not in (None, channel):
                continue
            with contextlib.suppress(ChatError):  # also if the database cannot be read: the effects that follow are applied
                account = self.store.read_inline(load_principal, user, b"") or NOBODY
                caller = Caller(account, "", action="talk" if isinstance(one, Peer) else "type")
                self.require_member(caller, ChannelArgs(channel_id=channel))
                continue
            if isinstance(one, Peer):
                self.leave_voice(one.sid)
            else:
                self.stop_typing(channel, user)

    def set_hand(self, server_id: int, user_id: int, raised: HandRaised | None) -> None:
        """Raise or lower a hand. A hand that is raised again keeps its place."""
        key = server_id, user_id
        before = self.hands.get(key)
        self.lowered.pop(key, None)
        if not raised:
            self.lowered[key] = utc(time.time())
            if len(self.lowered) > MAX_LOWERED_HANDS:
                del self.lowered[next(iter(self.lowered))]
        if raised and not before:
            self.hands[key] = Hand(raised, self.foreign)
            self.emit("hand:raised", server_id, raised)
        elif before and not raised:
            del self.hands[key]
            self.emit("hand:lowered", server_id, ServerUser(*key, before.notice.username, name=before.notice.name))
        self.watch_hand(*key)

    def watch_hand(self, server_id: int, user_id: int) -> None:
        """Lower the hand of a user who has gone, unless they are back within HAND_SECONDS. Each process does so by itself."""
        key = server_id, user_id

        def lower() -> None:
            foreign = key in self.hands and self.hands[key].foreign
            if foreign and self.redis == "down":  # the user may be connected to another process
                return self.watch_hand(*key)
            with self.as_foreign(foreign):
                self.set_hand(*key, None)
            if foreign:  # if the process on which it was raised still lists it, that is right
                del self.lowered[key]

        if (timer := self._hand_timers.pop(key, None)) is not None:
            timer.cancel()
        if key in self.hands and not self.presence.is_connected(*key):
            self._hand_timers[key] = asyncio.get_running_loop().call_later(HAND_SECONDS, lower)

    def send_signal(self, sender: Peer, peer: Peer, data: Any) -> bool:
        """Send a WebRTC signal. Return False if the peer is behind: more signals could fill its backlog and disconnect it."""
        session = self.sio.session(peer.sid)
        if is_foreign(peer.sid):
            self.broadcast(Signal(sender.notice.peer_id, peer.notice.peer_id, StrictJson.dumps(data)))
        elif session is not None and session.is_behind():
            return False
        else:
            notice = VoiceSignal(peer.notice.channel_id, sender.notice.peer_id, sender.notice.user_id, data)
            self.sio.publish("voice:signal", notice, peer.sid)
        return True


class FileContent:
    """The content of a file. The caller's permission is checked again for each part."""

    def __init__(self, hub: Hub, caller: Caller, stored: StoredFile) -> None:
        self.hub, self.caller, self.file, self.digest = hub, caller, stored.file, stored.digest

    async def parts(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` to `stop`. Raises ChatError."""
        end = self.file.size if stop is None else stop

        def load(ctx: OperationContext, args: FileArgs) -> bytes:
            return load_file_part(ctx.db, args.file_id, start, min(PART_BYTES, end - start))

        job = self.hub.authorized(Access.FILE, self.caller, FileArgs(self.file.file_id), load)
        while start < end:
            part = await self.hub.store.read(job)
            start += len(part)
            yield part


class Document(NamedTuple):
    """An HTML file that is made while it is sent."""

    name: str
    parts: AsyncIterator[bytes]


# ---- Bus -----------------------------------------------------------------------------------------------------------
# Messages between the processes that share a database, through Redis: wake-ups, and state that is not in the database. No call
# waits for them, and any may be lost: the commit log is polled too, and each process keeps the complete list of its own users.
# Packets are numbered; a process that misses one requests that list. Messages are not trusted: somebody who controls Redis can
# fake the presence of members, typing, voice, raised hands, signals and failed sign-ins, and nothing else.

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 2.5  # if the own beat has not come back for this time, Redis counts as down
GONE_SECONDS = 2.9  # a process that was silent for this time is removed at the next beat, so in less than 4 seconds
REDIS_SECONDS = 1.0  # time limit to connect, and to publish a packet
RECONNECT_SECONDS = 0.2
PUBLISH_INTERVAL = 0.005  # seconds between two packets: to publish after each commit would double what a single post costs
BUS_QUEUE_LENGTH = 10_000  # messages that wait; if there are more, the oldest are dropped
PACKET_BYTES = 1 << 16  # size of a packet to which no further message is added
PACKET_BYTES_MAX = 1 << 18  # size of a received packet; a larger one is ignored
MAX_PROCESSES = 64
KEY_PARTS = {"address": 1, "account": 1, "account and address": 2, "hook": 1}  # limits of all processes: length of a key

decode_bus_packet = msgspec.json.Decoder(BusPacket).decode


class OtherProcess:
    def __init__(self, instance: str) -> None:
        self.sid = f"{FOREIGN}{instance}/"  # the sid of its users in Presence, and the beginning of its voice peers' sids
        self.number = -1  # the number of its last message
        self.in_sync = False  # whether every packet since its last list has arrived
        self.last_packet_at = self.requested_at = -math.inf
        self.listed: set[object] | None = None  # the users and peers in the parts of its list so far


class Bus:
    def __init__(self, hub: Hub, url: str) -> None:
        try:
            import redis.asyncio as library
        except ImportError:
            raise StartError("--redis needs an extra: pip install 'chatrtc[redis]'") from None
        self._connect = functools.partial(
            library.Redis.from_url, url, protocol=2, retry=None, socket_timeout=None, socket_connect_timeout=REDIS_SECONDS
        )
        self._expected_errors = (library.RedisError, OSError, TimeoutError, ChatError)
        self._hub, self._log, self._loop = hub, hub.sio.eio.client_log, asyncio.get_running_loop()
        self._instance = f"{hub.settings.process}-{secrets.token_hex(4)}"
        # Only processes that have the same database file and the same secret know the channel.
        self._channel = f"chatrtc:{hub.signer.address_digest(0, f'redis {hub.store.files[:1]}').hex()}"
        self._queue, self._queued = deque[BusMessage](maxlen=BUS_QUEUE_LENGTH), asyncio.Event()
        self._number = 0  # the number of the last message
        self._wake_is_queued = self._hello_is_due = self._stopping = self._connected = False
        self._list_sent_at = self._listening_since = self._own_beat_at = -math.inf
        self._others: dict[str, OtherProcess] = {}
        hub.broadcast, hub.redis = self.broadcast, "down"
        hub.store.on_commit, hub.limiter.announce = self.wake, self.announce_failure
        self._publisher = asyncio.create_task(self._keep_running(self._publish))
        self._tasks = [self._publisher, *map(asyncio.create_task, (self._keep_running(self._listen), self._beat()))]

    async def stop(self) -> None:
        """Publish that this process ends, and wait at most a second until everything is published."""
        self._stopping = True
        self.broadcast(Notice("bye"))
        await asyncio.wait([self._publisher], timeout=REDIS_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Sending

    def broadcast(self, message: BusMessage) -> None:
        """Queue a message for all other processes. While Redis is down, it is only counted: a list will replace it."""
        self._number += 1
        if self._connected:
            self._queue.append(message)
            self._queued.set()

    def wake(self) -> None:
        """Notify the other processes that the commit log has new rows. A process that has just started polls it anyway."""
        if self._others and not self._wake_is_queued:
            self._wake_is_queued = True
            self.broadcast(Notice("wake"))

    def announce_failure(self, limit: str, key: object) -> None:
        parts = key if isinstance(key, tuple) else (key,)
        self.broadcast(Counted(limit, [str(part).encode(errors="replace").decode() for part in parts]))

    def _send_list(self) -> None:
        """Send the whole list of this process's users and voice peers, and of all raised hands."""
        self._hello_is_due, self._list_sent_at = False, self._loop.time()
        peers = [(n.channel_id, n.user_id, n.peer_id) for sid, _, n in self._hub.voice_peers.values() if not is_foreign(sid)]
        hands = [(*key, hand.notice.at) for key, hand in self._hub.hands.items()]
        lists: dict[str, Any] = {"users": list(self._hub.presence.users_of()), "peers": peers, "hands": hands}
        self.broadcast(Hello("first"))
        for name, entries in lists.items():
            for at in range(0, len(entries), HELLO_ENTRIES):
                self.broadcast(Hello(**{name: entries[at : at + HELLO_ENTRIES]}))
        self.broadcast(Hello("last"))

    async def _beat(self) -> None:
        while True:
            if self._hello_is_due:
                self._send_list()
            self.broadcast(Notice("beat"))
            await asyncio.sleep(BEAT_SECONDS)

    async def _keep_running(self, work: Callable[[], Awaitable[None]]) -> None:
        """Publish or listen until the bus stops, with a new connection after each error."""
        while not self._stopping:
            error = await result_or_exception(work())
            if isinstance(error, self._expected_errors):
                self._log.record("Redis does not answer", type(error).__name__)  # its text may contain the URL
            elif error is not None:
                self._log.record_bug("The bus failed", error)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _publish(self) -> None:
        async with self._connect() as client:
            async with asyncio.timeout(REDIS_SECONDS):
                await client.ping()
            self._connected = True
            try:
                self._send_list()
                await self._publish_queue(client)
            finally:
                self._connected = False
                self._queue.clear()

    async def _publish_queue(self, client: Any) -> None:
        """Publish the queued messages until the bus stops."""
        while self._queue or not self._stopping:
            if self._queue:
                async with asyncio.timeout(REDIS_SECONDS):
                    await client.publish(self._channel, self._next_packet())
                await asyncio.sleep(PUBLISH_INTERVAL)
            else:
                self._queued.clear()
                await self._queued.wait()

    def _next_packet(self) -> bytes:
        parts, size, self._wake_is_queued = list[msgspec.Raw](), 0, False
        while self._queue and len(parts) < PACKET_MESSAGES and size < PACKET_BYTES:
            part = msgspec.json.encode(self._queue.popleft())
            size += len(part)
            parts.append(msgspec.Raw(part))
        return msgspec.json.encode((self._instance, self._number - len(self._queue), parts))

    # Receiving

    async def _listen(self) -> None:
        """Apply the messages of other processes. Raises TimeoutError if this process's own beats do not come back."""
        async with self._connect() as client, client.pubsub(ignore_subscribe_messages=True) as subscription:
            async with asyncio.timeout(REDIS_SECONDS):
                await subscription.subscribe(self._channel)
            self._listening_since = self._own_beat_at = self._loop.time()
            for process in self._others.values():
                process.in_sync = False
            self.broadcast(Notice("want"))
            try:
                while True:
                    async with asyncio.timeout_at(self._own_beat_at + SILENCE_SECONDS):
                        message = await subscription.get_message(timeout=None)
                    if message is not None:
                        await self._receive(message["data"])
                    await asyncio.sleep(0)  # other work goes on, however much arrives
            finally:
                self._hub.redis = "down"

    async def _receive(self, data: bytes) -> None:
        try:
            packet = decode_bus_packet(data if len(data) <= PACKET_BYTES_MAX else b"")
        except (msgspec.DecodeError, ValueError, RecursionError):
            return self._log.record("A message from Redis was ignored", "invalid")
        if packet.sender == self._instance:
            if Notice("beat") in packet.messages:
                await self._note_own_beat()
        elif packet.sender in self._others or len(self._others) < MAX_PROCESSES:
            await self._apply_packet(self._others.setdefault(packet.sender, OtherProcess(packet.sender)), packet)

    async def _note_own_beat(self) -> None:
        """Redis is up, and all that was published before has arrived: remove the processes that have been silent. Only the
        first of the remaining processes calls its listeners."""
        self._hub.redis, self._own_beat_at = "up", self._loop.time()
        silent_since = self._own_beat_at - GONE_SECONDS
        gone = {name for name, one in self._others.items() if max(one.last_packet_at, self._listening_since) < silent_since}
        removed = [self._others.pop(name) for name in gone]
        foreign = self._instance > min(self._others, default=self._instance)
        for process in removed:
            await self._keep_only(process, set(), foreign=foreign)

    async def _apply_packet(self, process: OtherProcess, packet: BusPacket) -> None:
        process.last_packet_at = now = self._loop.time()
        if packet.number - len(packet.messages) != process.number:
            process.in_sync, process.listed = False, None
        process.number = packet.number
        for message in packet.messages:
            if message == Notice("bye"):
                del self._others[packet.sender]
                return await self._keep_only(process, set())
            if isinstance(message, Hello):
                await self._apply_hello(process, message)
            else:
                self._apply(process, message)
            await asyncio.sleep(0)
        if not process.in_sync and now - process.requested_at >= BEAT_SECONDS:
            process.requested_at = now
            self.broadcast(Notice("want", packet.sender))

    def _apply(self, process: OtherProcess, message: BusMessage) -> None:
        match message:
            case Notice("wake"):
                self._hub.store.pull()
            case Notice("want", instance) if instance in ("", self._instance):
                self._hello_is_due = True
                if self._loop.time() - self._list_sent_at >= BEAT_SECONDS:
                    self._send_list()
            case Change():
                with self._hub.as_foreign():
                    self._apply_change(process, message.event, message.target_id, message.user_id, message.peer_id)
            case Signal():
                self._deliver(process, message)
            case Counted(name, key) if name in LIMITS and len(key) == KEY_PARTS.get(LIMITS[name].by):
                self._hub.limiter.count(name, key[0] if len(key) == 1 else tuple(key))

    def _apply_change(self, process: OtherProcess, event: str, target_id: int, user_id: int, peer_id: str = "") -> None:
        """Apply an event of a user of another process. It is ignored unless the user is a member and, for every event but
        `user:connected`, connected to that process."""
        hub, read, sid, peer_sid = self._hub, self._hub.store.read_inline, process.sid, process.sid + peer_id
        server_id = read(load_server_of_channel, target_id) if event in BUS_EVENTS else target_id
        if server_id is None or hub.presence.has(server_id, user_id, sid) is (event == "user:connected"):
            return
        if event == "user:connected" and read(load_role, server_id, user_id) is None:
            return
        user = read(load_profile, user_id)
        match event:
            case "user:connected":
                if user.status == "invisible" and not hub.presence.servers(user_id):
                    hub.presence.invisible.add(user_id)  # the commit log may say so later
                hub.mark_connected(server_id, user, sid)
            case "user:disconnected":
                hub.mark_disconnected(server_id, user, sid)
            case "user:typing":
                hub.start_typing(server_id, target_id, user, sid)
            case "typing_stop" if (target_id, user_id) in hub.typing_tracker.of_socket(sid):
                hub.stop_typing(target_id, user_id)
            case "voice:join" if peer_sid not in hub.voice_peers:
                hub.join_voice(peer_sid, server_id, VoicePeer(target_id, user_id, user.username, peer_id, name=user.name))
            case "voice:leave":
                hub.leave_voice(peer_sid)

    def _apply_hand(self, server_id: int, user_id: int, at: str) -> None:
        """Add a hand that was raised before this process started, if the database has this member. The list may be out
        of date: a hand that was lowered later stays lowered."""
        hub, read, key = self._hub, self._hub.store.read_inline, (server_id, user_id)
        if key not in hub.hands and hub.lowered.get(key, "") < at and read(load_role, server_id, user_id) is not None:
            user = read(load_profile, user_id)
            hub.set_hand(server_id, user_id, HandRaised(server_id, user_id, user.username, at, name=user.name))

    async def _apply_hello(self, process: OtherProcess, hello: Hello) -> None:
        """Apply a part of another process's list. After the last part, remove what is not in the list."""
        if hello.part == "first":
            process.listed = set()
        if (listed := process.listed) is None:  # a part is missing
            return
        with self._hub.as_foreign():
            for user in hello.users:
                self._apply_change(process, "user:connected", *user)
            for peer in hello.peers:
                self._apply_change(process, "voice:join", *peer)
            for hand in hello.hands:
                self._apply_hand(*hand)
        listed.update(user for user in hello.users if self._hub.presence.has(*user, process.sid))
        listed.update(sid for _, _, peer_id in hello.peers if (sid := process.sid + peer_id) in self._hub.voice_peers)
        if hello.part == "last":
            process.listed, process.in_sync = None, True
            await self._keep_only(process, listed)

    async def _keep_only(self, process: OtherProcess, listed: set[object], *, foreign: bool = True) -> None:
        """Remove the voice peers and the users of a process, except these. `foreign`: see `Hub.as_foreign`."""
        for sid in [sid for sid in self._hub.voice_peers if sid.startswith(process.sid) and sid not in listed]:
            with self._hub.as_foreign(foreign):
                self._hub.leave_voice(sid)
        for server_id, user_id in self._hub.presence.users_of(process.sid) - listed:
            with self._hub.as_foreign(foreign):
                self._apply_change(process, "user:disconnected", server_id, user_id)
            await asyncio.sleep(0)

    def _deliver(self, process: OtherProcess, signal: Signal) -> None:
        """Send a signal from another process to a peer of this one in the same channel."""
        if (sender := self._hub.voice_peers.get(process.sid + signal.from_)) is None:
            return
        for peer in self._hub.voice_peers.in_channel(sender.notice.channel_id):
            if peer.notice.peer_id == signal.to and not is_foreign(peer.sid):
                with contextlib.suppress(ValueError, RecursionError):
                    self._hub.send_signal(sender, peer, StrictJson.loads(signal.data))


# ---- Async operations ----------------------------------------------------------------------------------------------
# Operations that need more than one transaction: passwords, which take time to hash, and sockets, which are kept in memory.

SESSION_SECONDS = 600  # lifetime of a token for a user of the embedding program, whose page renews it while they are signed in
SIGNAL_BYTES = 16 * 1024  # a WebRTC offer for audio has 2 to 6 KiB
PATH = re.compile(r"(/[\w.~!$&'()*+,;=:@%/-]*)?", re.ASCII)
PUBLIC_URL_MAX = 300
ICE_URL = re.compile(
    r"(?P<scheme>stun|turns?):(?:(?P<user>[^\s:/@?#]+):(?P<password>[^\s:/@?#]+)@)?(?P<host>[^\s/@?#]+)"
    r"(?P<transport>\?transport=(?:udp|tcp))?"
)


def parse_ice_server(url: str) -> IceServer | None:
    """Return a server of the setting `ice_server` as browsers take it, or None if they would reject it: a TURN server needs a
    user and a password (%-encoded), a STUN server takes neither these nor a transport, and Firefox rejects `stuns:`."""
    found = ICE_URL.fullmatch(url)
    if found is None or parse_host(found["host"]) is None:
        return None
    is_turn, name, password = found["scheme"] != "stun", found["user"], found["password"]
    if is_turn != (name is not None) or (found["transport"] and not is_turn):
        return None
    urls = f"{found['scheme']}:{found['host']}{found['transport'] or ''}"
    return IceServer(urls, *map(urllib.parse.unquote, (name, password))) if is_turn else IceServer(urls)


def sign_in(hub: Hub, caller: Caller, user: Principal) -> Result[AuthResponse]:
    """Return a token for a user who gave the password, and record their address, at most once a day, in the background."""
    digest, clock = hub.signer.address_digest(user.user_id, caller.address), time.time()
    seen = hub.store.read_inline(load_address_seen_at, user.user_id, digest)
    if seen is None or clock - seen > ADDRESS_SECONDS:
        job = functools.partial(insert_known_address, user_id=user.user_id, digest=digest, clock=clock)
        hub.sio.eio.spawn(result_or_exception(hub.store.write(job)))
    return Result(hub.signer.issue(user))


def create_account(db: sqlite3.Connection, args: NewUser | NewGuest, password: str | None, clock: float) -> Result[Principal]:
    """Create an account and, with an invite, join its server. The invite is checked first, so that an invalid one
    does not reveal which usernames are taken."""
    invite = load_valid_invite(db, args.code, utc(clock)) if args.code is not None else None
    username = args.username or find_free_username(db, args.name or "")
    user_id = insert_user(db, username, password, utc(clock), args.name)
    return Result(require_user(db, user_id), use_invite(db, invite, user_id, utc(clock)) if invite else [])


async def make_account(hub: Hub, caller: Caller, args: NewUser | NewGuest, password: str | None) -> Result[AuthResponse]:
    """Create an account with a password or, without one, for a guest, and return its token."""
    clock = time.time()
    stored: str | None = None
    if args.code is not None:
        hub.store.read_inline(load_valid_invite, args.code, utc(clock))
    hub.limiter_for(caller).charge("register", caller.address)
    if password is not None:
        async with hub.password_hasher.turn(caller.address, caller.is_program):
            stored = await hub.password_hasher.run(hash_password, password)
    account = (await hub.store.write(lambda db: create_account(db, args, stored, clock))).value
    return Result(hub.signer.issue(account)) if stored is None else sign_in(hub, caller, account)


@operation("POST /auth/register", Access.ANYONE, emits=["member:joined"], status=201, limit="invite")
async def register(hub: Hub, caller: Caller, args: NewUser) -> Result[AuthResponse]:
    """Create an account; with `code`, an invite, also join its server."""
    registration = "open" if caller.is_program else hub.settings.registration  # it does not apply to the embedding program
    if registration == "closed":
        raise chat_error("REGISTRATION_CLOSED")
    if registration == "invite" and args.code is None:
        raise chat_error("INVITE_NEEDED")
    return await make_account(hub, caller, args, args.password)


@operation("POST /auth/guest", Access.ANYONE, emits=["member:joined"], status=201, limit="invite")
async def register_guest(hub: Hub, caller: Caller, args: NewGuest) -> Result[AuthResponse]:
    """Create a guest account with an invite and a name. The guest can set a password later."""
    if hub.settings.no_guests or (hub.settings.registration == "closed" and not caller.is_program):
        raise chat_error("GUESTS_OFF")
    return await make_account(hub, caller, args, None)


async def is_password(hub: Hub, caller: Caller, user: Principal, password: str, stored: str | None) -> bool:
    """Return whether `password` is the account's. Raises RATE_LIMITED.

    Only wrong passwords are counted: by account and address and, if the account never signed in from this address, also by
    account (with a token: by token, as an attack on the account must not keep its user from changing the password) and by
    address. For an account that does not exist (`user_id` 0) the work and the limits are the same.
    """
    name, digest = name_key(user.username), hub.signer.address_digest(user.user_id, caller.address)
    limits: list[tuple[str, object]] = [("login", (name, caller.address))]  # the names of limits, and whom they count for
    if hub.store.read_inline(load_address_seen_at, user.user_id, digest) is None:
        limits += [("login_account", caller.user.digest.hex() or name), ("login_address", caller.address)]
    limiter = hub.limiter_for(caller)
    for limit in limits:
        limiter.check(*limit)
    async with hub.password_hasher.turn(caller.address, caller.is_program):
        for limit in limits:
            limiter.check(*limit)
        for limit in limits:  # counted first, so that concurrent attempts stay within the limits
            limiter.count(*limit)
        right = None
        try:
            right = await hub.password_hasher.run(verify_password, password, stored)
        finally:
            for limit in limits:
                if right is False:
                    limiter.announce(*limit)
                else:
                    limiter.count(*limit, times=-1)
    return right


def store_host_user(db: sqlite3.Connection, args: HostUser, clock: float) -> Result[Principal]:
    """Create the account of a user of the embedding program, or give it the `external_id` and the name that `args` have."""
    if (found := load_host_user(db, args)) is None:
        username = args.username
        if not is_free_username(db, username):
            username = find_free_username(db, username if is_username(username) else args.name or username)
        user_id = insert_user(db, username, None, utc(clock), args.name, "host", args.external_id)
        return Result(require_user(db, user_id))
    user = found[0]
    update_external_id(db, user.user_id, args.external_id)
    name = user.name if args.name is None else None if args.name == user.username else args.name
    return Result(user._replace(name=name), rename_user(db, user.user_id, name) if name != user.name else [])


async def find_or_store_host_user(hub: Hub, args: HostUser) -> Principal:
    """Return the account of a user of the embedding program. It is written only if it is missing or has changed, so users can
    sign in while the disk is full."""
    user, is_current = hub.store.read_inline(load_host_user, args) or (NOBODY, False)
    if not is_current:
        user = (await hub.store.write(lambda db: store_host_user(db, args, time.time()))).value
    return user


@operation("POST /auth/session", Access.ANYONE, limit="session")
async def create_session(hub: Hub, caller: Caller, args: NoArgs) -> Result[AuthResponse]:
    """Sign in with the login of the site that contains the chat. Only its own pages can; the token is valid for 10 minutes."""
    identify, request = hub.identify, caller.source
    if identify is None:
        raise chat_error("NO_HOST_LOGIN")
    if not isinstance(request, web.Request) or not is_own_page(request, hub.sio.eio.options, hub.settings.public_url):
        raise chat_error("OTHER_SITE")

    async def find_user() -> HostUser | None:
        found = await identify(request)
        return None if found is None else read_args(HostUser, found)

    fields = await hub.call_program("identify", find_user())
    if fields is None:
        raise chat_error("HOST_SIGN_IN")
    user = await find_or_store_host_user(hub, fields)
    return Result(hub.signer.issue(user, min(hub.settings.token_ttl, SESSION_SECONDS)))


@operation("POST /auth/link", Access.ANYONE, limit="invite")
async def use_link(hub: Hub, caller: Caller, args: CodeArgs) -> Result[AuthResponse]:
    """Sign in as a guest with a single-use code from an admin."""
    clock = time.time()
    hub.store.read_inline(load_guest_by_code, args.code, clock)  # rejects a wrong code without a write
    user = (await hub.store.write(lambda db: Result(delete_sign_in_code(db, args.code, clock)))).value
    return Result(hub.signer.issue(user))


@operation("DELETE /servers/{server_id}/guests", Access.ADMIN, emits=["member:left"], limit="post", logged="remove_guests")
async def remove_guests(hub: Hub, caller: Caller, args: ServerArgs) -> Result[Removed]:
    """Remove all guests of a lower role."""

    def remove_next(ctx: OperationContext, args: ServerArgs) -> Result[int]:
        guests = load_guests_below(ctx.db, ctx.server_id, ctx.role, GUESTS_PER_STEP)
        effects = [effect for user_id in guests for effect in remove_from_server(ctx.db, ctx.server_id, user_id)]
        return Result(len(guests), effects)

    removed, step = 0, GUESTS_PER_STEP
    run: Callable[..., Result[int]] = functools.partial(run_logged, OPERATIONS["remove_guests"], remove_next)
    while step == GUESTS_PER_STEP:  # in steps, so that other writes run in between
        job = hub.authorized(Access.ADMIN, caller, args, run)
        step = (await hub.store.write(job, frees_space=True)).value
        removed, run = removed + step, remove_next
    return Result(Removed(removed))


@operation("POST /auth/login", Access.ANYONE)
async def login(hub: Hub, caller: Caller, args: Credentials) -> Result[AuthResponse]:
    """Sign in. An unknown name and a wrong password take the same time and get the same answer."""
    account, stored = hub.store.read_inline(load_account, args.username) or (Principal(0, args.username), None)
    if not await is_password(hub, caller, account, args.password, stored):
        raise chat_error("WRONG_PASSWORD")
    return sign_in(hub, caller, account)


def replace_password(db: sqlite3.Connection, user_id: int, before: str | None, password: str) -> Result[int]:
    """Set a password, revoke all tokens and return the new generation. Raises CONFLICT unless `before` is the stored hash."""
    generation = update_password(db, user_id, before, password)
    return Result(generation, [Revoke(user_id), *([] if before else update_in_servers(db, user_id))])


@operation("POST /auth/password", Access.USER)
async def change_password(hub: Hub, caller: Caller, args: NewPassword) -> Result[AuthResponse]:
    """Set a new password (a guest needs no `old_password`). All other tokens are revoked and their sockets disconnected."""
    user = caller.user
    stored, old = hub.store.read_inline(load_password_hash, user.user_id), args.old_password
    if stored is not None and old is None:
        raise chat_error("FIELD_MISSING", field="old_password", what="old_password")
    if stored is None and not hub.store.read_inline(load_profile, user.user_id).guest:
        raise chat_error("NO_PASSWORD")
    if stored is not None and not await is_password(hub, caller, user, old or "", stored):
        raise chat_error("WRONG_OLD_PASSWORD", field="old_password")
    async with hub.password_hasher.turn(caller.address, caller.is_program):
        password = await hub.password_hasher.run(hash_password, args.new_password)
    generation = (await hub.store.write(lambda db: replace_password(db, user.user_id, stored, password))).value
    return sign_in(hub, caller, user._replace(generation=generation))


def add_bot(ctx: OperationContext, args: NewBot) -> Result[Principal]:
    """Create the account of a bot, and make it a member."""
    if len(load_bot_ids(ctx.db, ctx.server_id)) >= MAX_BOTS:
        raise chat_error("TOO_MANY", n=MAX_BOTS)
    ctx.target_id = insert_user(ctx.db, args.username, None, ctx.now, args.name, "bot")
    seq = insert_member(ctx.db, ctx.server_id, ctx.target_id, "member", ctx.now)
    joined = member_event(ctx.db, "member:joined", ctx.server_id, ctx.target_id, seq)
    return Result(require_user(ctx.db, ctx.target_id), [joined])


def add_hook(ctx: OperationContext, args: NewHook, secret: str) -> Result[Hook]:
    """Create a hook, with a bot of its own."""
    if load_server_of_channel(ctx.db, args.channel_id) != ctx.server_id:
        raise chat_error("NO_CHANNEL", field="channel_id")
    bot = add_bot(ctx, NewBot(ctx.server_id, find_free_username(ctx.db, args.name), args.name))
    digest, user_id = hashlib.sha256(secret.encode()).digest(), bot.value.user_id
    hook_id = insert_hook(ctx.db, ctx.server_id, args.channel_id, args.name, user_id, digest, ctx.now)
    return Result(Hook(hook_id, args.channel_id, args.name, user_id, ctx.now), bot.effects)


@operation("POST /servers/{server_id}/bots", Access.INVITER, emits=["member:joined"], status=201, limit="post", logged="bot")
async def create_bot(hub: Hub, caller: Caller, args: NewBot) -> Result[AuthResponse]:
    """Create a bot: an account for a program, with a token that does not expire and is not shown again."""
    run: Callable[..., Result[Principal]] = functools.partial(run_logged, OPERATIONS["create_bot"], add_bot)
    bot = (await hub.store.write(hub.authorized(Access.INVITER, caller, args, run))).value
    return Result(hub.signer.issue(bot, LAST_SECOND))


def public_address(hub: Hub, request: web.Request | None, route: str) -> str:
    """Return the URL at which people reach this chat: --public-url, else the one that a trusted proxy names, else the address
    that the server listens on. A chat embedded in another application does not know that address and uses the request's Host.
    `route`: the beginning of the request's path below that URL, such as /invites/."""
    options = hub.sio.eio.options
    if hub.settings.public_url is not None:
        return hub.settings.public_url.rstrip("/")
    if request is None:
        return hub.own_url + hub.mount
    mount = request.path.rpartition(route)[0]
    trusted = not hub.own_url or is_trusted(request.remote or "", options)
    host, scheme = request_host(request, options) if trusted else None, request_scheme(request, options) or "http"
    if host is None:
        return (hub.own_url or "http://localhost") + mount
    prefix = forwarded(request, options, "Prefix").rstrip("/")
    prefix = prefix if len(prefix) <= PUBLIC_URL_MAX and PATH.fullmatch(prefix) else ""
    return f"{scheme}://{host[0]}{f':{host[1]}' if host[1] else ''}{prefix}{mount}"


@operation("POST /servers/{server_id}/hooks", Access.ADMIN, emits=["member:joined"], status=201, limit="post", logged="hook")
async def create_hook(hub: Hub, caller: Caller, args: NewHook) -> Result[Hook]:
    """Create an incoming hook: an address at which programs post in a channel. Each hook posts as its own bot. The address is
    shown only once."""
    secret = secrets.token_urlsafe(24)
    add: Callable[..., Result[Hook]] = functools.partial(add_hook, secret=secret)
    run: Callable[..., Result[Hook]] = functools.partial(run_logged, OPERATIONS["create_hook"], add)
    hook = (await hub.store.write(hub.authorized(Access.ADMIN, caller, args, run))).value
    request = caller.source if isinstance(caller.source, web.Request) else None
    hook.url = f"{public_address(hub, request, '/servers/')}/hooks/{secret}"
    return Result(hook)


@operation(
    "POST /hooks/{secret}", Access.ANYONE, emits=["message:new", "channel:read", "mention"],
    status=201, limit="invite", action="hook",
)  # fmt: skip
async def post_hook(hub: Hub, caller: Caller, args: HookPost) -> Result[HookMessage]:
    """Post in the channel of an incoming hook: `content`, or a message in Slack's format. The channel's rules do not apply, but
    a mute of the hook's bot does."""

    def post(ctx: OperationContext, message: NewMessage) -> Result[Message]:
        ctx.author_name = args.username
        return post_message(ctx, message)

    def job(db: sqlite3.Connection) -> Result[Message]:
        bot = load_hook_by_secret(db, args.secret)[1]  # again: it may have been revoked meanwhile
        return hub.authorized(Access.WRITER, msgspec.structs.replace(caller, user=bot), message, post)(db)

    hook, _ = hub.store.read_inline(load_hook_by_secret, args.secret)
    hub.limiter_for(caller).charge("hook", str(hook.hook_id))
    content = args.content or read_slack(args.text, args.blocks, args.attachments)
    message = read_args(NewMessage, {"channel_id": hook.channel_id, "content": content, "nonce": args.nonce})
    result = await hub.store.write(job)
    posted = HookMessage(**msgspec.structs.asdict(result.value), ok=True)
    return Result(posted, replayed=result.replayed)


@operation("GET /servers/{server_id}/search", Access.MEMBER)
async def search_messages(hub: Hub, caller: Caller, args: SearchArgs) -> Result[Messages]:
    """Find messages with every word of `q` (or words beginning with it), newest first. A quoted phrase matches as a whole."""
    hub.require_member(caller, args)
    newest, indexed = hub.store.read_inline(load_index_progress)
    while indexed < newest and not hub.store.is_full():  # in steps, so that posts are written in between
        indexed = (await hub.store.write(index_messages, slow=True)).value
    return Result(await hub.query_slow(caller, args, lambda ctx, args: load_search_results(ctx.db, args)))


async def split_pieces(data: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the same bytes in pieces of PIECE_BYTES; only the last one may be shorter."""
    if isinstance(data, bytes):
        for at in range(0, len(data), PIECE_BYTES):
            yield data[at : at + PIECE_BYTES]
        return
    waiting = bytearray()
    async for part in data:
        waiting += part
        while len(waiting) >= PIECE_BYTES:
            yield bytes(waiting[:PIECE_BYTES])
            del waiting[:PIECE_BYTES]
    if waiting:
        yield bytes(waiting)


@operation("POST /channels/{channel_id}/files", Access.WRITER, status=201, limit="post", raw_body=True, action="file")
async def upload_file(hub: Hub, caller: Caller, args: NewFile) -> Result[File]:
    """Upload a file; the body is its bytes. Post it in the channel within an hour, or it is deleted."""
    assert caller.body is not None
    most, quota, declared = hub.settings.file_max << 20, hub.settings.files_max << 20, caller.body.size or 0
    file_id, size, digest, (media_type, pixels) = 0, 0, hashlib.sha256(), detect_type(b"")

    async def run(step: Callable[..., R], *values: Any) -> R:
        """Run a step in a transaction of its own, in which the caller's permission is checked again."""
        job = hub.authorized(Access.WRITER, caller, args, lambda ctx, _: Result(step(ctx.db, *values)))
        async with hub.piece_lock:  # one step at a time for all uploads, so that a post waits for at most one
            value: R = (await hub.store.write(job, slow=True)).value
        return value

    def begin(db: sqlite3.Connection) -> None:
        nonlocal file_id  # the id must be known even if the call is cancelled while its row is committed
        file_id = insert_file(db, caller.user.user_id, args.channel_id, declared, most, quota)

    if not most:
        raise chat_error("FILES_OFF")
    user_id, uploads, source = caller.user.user_id, hub.uploads, caller.source
    turn = uploads.transfer(user_id, source) if isinstance(source, web.Request) else uploads.turn(user_id, caller.is_program)
    async with turn:
        try:
            try:
                await run(begin)
            except Exception:
                file_id = 0  # it was rolled back, and another file may get this id
                raise
            async for piece in split_pieces(caller.body.data):
                if not size:
                    media_type, pixels = detect_type(piece)
                number, size = size // PIECE_BYTES, size + len(piece)
                await run(insert_piece, file_id, number, piece, most, quota)
                digest.update(piece)
            width, height = pixels or ((args.width, args.height) if media_type.startswith("video/") else (None, None))
            name = clean_file_name(args.name)
            file = File(file_id, name, media_type, size, width, height, args.alt or None)
            await run(complete_file, *msgspec.structs.astuple(file), digest.digest(), time.time())
            return Result(file)
        except BaseException:
            discard = hub.store.write(lambda db: Result(remove_file(db, file_id)), frees_space=True)
            hub.sio.eio.spawn(result_or_exception(discard))
            raise


@operation("GET /files/{file_id}", Access.FILE)
async def read_file(hub: Hub, caller: Caller, args: ReadFile) -> Result[FileContent]:
    """Return the bytes of a file, or the part that the header `Range` names; `link` replaces the token."""
    stored = hub.query(caller, args, lambda ctx, _: ctx.file, Access.FILE)
    assert stored is not None
    return Result(FileContent(hub, caller, stored))


@operation("POST /files/{file_id}/link", Access.FILE)
async def create_file_link(hub: Hub, caller: Caller, args: FileArgs) -> Result[FileLink]:
    """Return an address of a file for `<img>` and `<video>`, valid for an hour while you may read the file."""
    hub.query(caller, args, lambda ctx, _: None, Access.FILE)
    expires = int(min(time.time() + LINK_SECONDS, caller.user.expires))
    link = hub.signer.sign_link(args.file_id, caller.user, expires)
    mount = caller.source.path.rpartition("/files/")[0] if isinstance(caller.source, web.Request) else hub.mount
    return Result(FileLink(f"{mount}/files/{args.file_id}?link={link}", utc(expires)))


@operation("GET /channels/{channel_id}/transcript", Access.ADMIN)
async def get_transcript(hub: Hub, caller: Caller, args: TranscriptArgs) -> Result[Document]:
    """Return the messages of a channel as one HTML file; `names=hidden` leaves out people's names."""

    def load(ctx: OperationContext, _: TranscriptArgs) -> tuple[str, Channel]:
        return load_servers(ctx.db, ctx.user.user_id, ctx.server_id)[0].name, load_channel(ctx.db, ctx.channel_id)

    async def parts() -> AsyncIterator[bytes]:
        job = hub.authorized(Access.ADMIN, caller, args, lambda ctx, _: transcript.read(ctx.db))
        while (part := await hub.store.read(job)) is not None:
            yield part.encode()

    name, channel = hub.query(caller, args, load, Access.ADMIN)
    transcript = Transcript([(name, [channel])], args.names == "hidden")
    return Result(Document(clean_file_name(re.sub(r"[/\\]", "_", f"{channel.name}.html")), parts()))


@operation("GET /healthz", Access.ANYONE)
async def check_health(hub: Hub, caller: Caller, args: NoArgs) -> Result[Health]:
    """Check that the database can be read and written."""
    try:
        async with asyncio.timeout(2):
            await hub.store.read(load_index_progress)
            if hub.store.write_error:
                await hub.store.write(lambda db: Result(probe_write(db)))
                hub.store.write_error = ""
            else:
                await hub.store.write(lambda db: Result(None))
    except TimeoutError:
        raise chat_error("DATABASE_DOWN") from None
    return Result(Health("ok", __version__, hub.redis))


@operation("GET /config", Access.ANYONE)
async def get_configuration(hub: Hub, caller: Caller, args: NoArgs) -> Result[PublicSettings]:
    """Return the settings that a page needs before sign-in."""
    settings = hub.settings
    guests = not settings.no_guests and settings.registration != "closed"
    public, lan = settings.public_url or UNSET, hub.lan_url or UNSET
    who = settings.create_servers, settings.conversations
    return Result(PublicSettings(settings.registration, guests, __version__, *who, settings.file_max << 20, public, lan))


@operation(None, Access.ANYONE, event="authenticate")
async def authenticate(hub: Hub, caller: Caller, args: TokenArgs) -> Result[Identity]:
    """Authenticate this socket (or pass `auth: {token}` in the handshake)."""
    await hub.store.wait_until_applied()
    user = hub.authenticate_token(args.token or "")
    hub.bind_principal(caller.connection, user)
    return Result(Identity(user.user_id, user.username, name=user.name))


@operation(None, Access.USER, event="ping")
async def heartbeat(hub: Hub, caller: Caller, args: NoArgs) -> Result[None]:
    """Do nothing: the ack shows that the connection works."""
    return Result(None)


async def load_missed(hub: Hub, caller: Caller, since: ChangesArgs) -> tuple[int, msgspec.Raw]:
    """Return the server's last sequence number and the JSON of the changes after `since.after`."""

    def load(ctx: OperationContext, _: Any) -> tuple[int, Changes | msgspec.Raw]:
        found = hub.missed.find(since, ctx.seq)  # another caller may have loaded it while this one waited for a reader
        return ctx.seq, found or load_changes(ctx.db, since, ctx.visible_users(), ctx.user.user_id)

    seq, loaded = await hub.query_slow(caller, since, load)
    if isinstance(loaded, msgspec.Raw):
        return seq, loaded
    data = msgspec.json.encode(loaded)
    if loaded.members is loaded.channels is loaded.name is UNSET and not loaded.has_more:  # it is the same for all members
        hub.missed.store(since, loaded.seq, msgspec.Raw(data), len(data))
    return seq, msgspec.Raw(data)


@operation(None, Access.MEMBER, event="join_server", emits=["user:connected"])
async def join_server(hub: Hub, caller: Caller, args: JoinServer) -> Result[JoinServerResult]:
    """Subscribe to a server's events and, with `after`, get the changes since that sequence number, without a gap."""
    since = ChangesArgs(server_id=args.server_id, after=args.after or 0)

    def look_up(ctx: OperationContext, _: JoinServer) -> tuple[list[Channel], int, msgspec.Raw | None]:
        return load_channels(ctx.db, ctx.server_id), ctx.seq, hub.missed.find(since, ctx.seq)

    await hub.store.wait_until_applied()
    # Every event published until now is committed, so `seq` includes it; later ones are sent to the socket.
    channels, seq, found = hub.query(caller, args, look_up)
    hub.join_server(caller.connection, args.server_id, [channel.channel_id for channel in channels])
    changes: Any = UNSET
    if args.after is not None:
        seq, changes = (seq, found) if found is not None else await load_missed(hub, caller, since)
    voice = [peer.notice for peer in hub.voice_peers.in_server(args.server_id)]
    raised = sorted((hand.notice for hand in hub.hands.values()), key=operator.attrgetter("at"))
    hands = [RaisedHand(one.user_id, one.username, one.at, name=one.name) for one in raised if one.server_id == args.server_id]
    return Result(JoinServerResult(hub.presence.visible(args.server_id, caller.user.user_id), seq, changes, voice, hands))


@operation(None, Access.USER, event="leave_server", emits=["user:disconnected"])
async def leave_server(hub: Hub, caller: Caller, args: ServerArgs) -> Result[None]:
    """Unsubscribe from a server's events."""
    if not hub.leave_server(caller.connection, args.server_id):
        hub.require_member(caller, args)
    return Result(None)


def require_joined(connection: Connection, server_id: int) -> None:
    """Raise FORBIDDEN unless the socket has joined the server. A closed socket has left all servers."""
    if server_id not in connection.servers:
        raise chat_error("NOT_JOINED")


def server_of_channel(hub: Hub, caller: Caller, args: ChannelArgs, access: Access) -> int:
    """Return the channel's server, which the socket must have joined. Charges "event" unless the user is already typing."""
    typist, user_id = hub.typing_tracker.get((args.channel_id, caller.user.user_id)), caller.user.user_id
    if typist is None:
        hub.limiter.charge("event", user_id)
    if typist is None or hub.typing_tracker.is_due(user_id, asyncio.get_running_loop().time()):
        server_id = hub.query(caller, args, lambda ctx, _: ctx.server_id, access)
    else:
        server_id = typist.server_id  # nothing will be announced, so nothing has to be checked
    require_joined(caller.connection, server_id)
    return server_id


@operation(None, Access.WRITER, event="typing_start", emits=["user:typing"], limit="itself", action="type")
async def typing_start(hub: Hub, caller: Caller, args: ChannelArgs) -> Result[None]:
    """Report that the user is typing: emitted at most once a second, expires after three."""
    server_id = server_of_channel(hub, caller, args, Access.WRITER)
    hub.start_typing(server_id, args.channel_id, caller.user, caller.connection.sid)
    return Result(None)


@operation(None, Access.MEMBER, event="typing_stop", emits=["typing_stop"], limit="itself")
async def typing_stop(hub: Hub, caller: Caller, args: ChannelArgs) -> Result[None]:
    """Report that the user has stopped typing."""
    server_of_channel(hub, caller, args, Access.MEMBER)
    hub.stop_typing(args.channel_id, caller.user.user_id)
    return Result(None)


@operation(None, Access.MEMBER, event="voice:join", emits=["voice:join", "voice:leave"], action="talk")
async def voice_join(hub: Hub, caller: Caller, args: ChannelArgs) -> Result[VoiceJoinResult]:
    """Join a voice channel, leaving the previous one, and get its peers. Other devices of the user leave this channel."""
    connection, user = caller.connection, caller.user
    channel = hub.query(caller, args, lambda ctx, _: load_channel(ctx.db, ctx.channel_id))
    require_joined(connection, channel.server_id)
    if channel.kind != "voice":
        raise chat_error("NO_VOICE_CHANNEL", field="channel_id")
    peer = hub.voice_peers.get(connection.sid)
    if peer is None or peer.notice.channel_id != args.channel_id:
        there = [one for one in hub.voice_peers.in_channel(args.channel_id) if one.notice.user_id != user.user_id]
        if len(there) >= hub.settings.voice_max:
            raise chat_error("VOICE_FULL", field="channel_id", n=hub.settings.voice_max)
        hub.leave_voice(connection.sid)
        notice = VoicePeer(args.channel_id, user.user_id, user.username, secrets.token_urlsafe(9), name=user.name)
        hub.join_voice(connection.sid, channel.server_id, notice)
        peer = hub.voice_peers[connection.sid]
    servers = [server for url in hub.settings.ice_server if (server := parse_ice_server(url))]
    others = [peer.notice for peer in hub.voice_peers.in_channel(args.channel_id) if peer.sid != connection.sid]
    participants = [Participant(one.user_id, one.username, one.peer_id, name=one.name) for one in others]
    return Result(VoiceJoinResult(peer.notice.peer_id, participants, servers))


@operation(None, Access.MEMBER, event="voice:leave", emits=["voice:leave"])
async def voice_leave(hub: Hub, caller: Caller, args: ChannelArgs) -> Result[None]:
    """Leave a voice channel. Does nothing if the socket is not in it."""
    peer = hub.voice_peers.get(caller.connection.sid)
    if peer is not None and peer.notice.channel_id == args.channel_id:
        hub.leave_voice(peer.sid)
    else:
        hub.require_member(caller, args)
    return Result(None)


@operation(None, Access.MEMBER, event="voice:signal", emits=["voice:signal"], limit="itself", action="talk")
async def voice_signal(hub: Hub, caller: Caller, args: SignalArgs) -> Result[None]:
    """Send a WebRTC signal (`data`: at most 16 KiB of JSON) to a peer in the same voice channel."""
    hub.limiter.charge("signal", caller.user.user_id)
    try:
        size = len(json.dumps(args.data, separators=(",", ":"), ensure_ascii=False).encode())
    except (TypeError, RecursionError):
        raise chat_error("FIELD_TYPE", field="data", what="data", n="Binary data and deep nesting are not accepted") from None
    if size > SIGNAL_BYTES:
        raise ChatError("TOO_LARGE", f"data must have at most {SIGNAL_BYTES} bytes of JSON", reason="FIELD_LONG", field="data")
    sender = hub.voice_peers.get(caller.connection.sid)
    if sender is None or sender.notice.channel_id != args.channel_id:
        require_joined(caller.connection, hub.query(caller, args, lambda ctx, _: ctx.server_id))
        raise chat_error("NOT_IN_VOICE")
    peer = next((peer for peer in hub.voice_peers.in_channel(args.channel_id) if peer.notice.peer_id == args.to), None)
    if peer is None:
        raise chat_error("NO_PEER", field="to")
    if not hub.send_signal(sender, peer, args.data):
        raise chat_error("PEER_BEHIND", retry_after=1)
    return Result(None)


# ---- API -----------------------------------------------------------------------------------------------------------
# The handlers of REST and Socket.IO. They authenticate the caller, decode the arguments, run the operation and turn its result
# into a response or an ack. Routes, events, OpenAPI and AsyncAPI all follow from the table of operations.

BODY_MAX = 256 * 1024
HOOK_BODY_MAX = 64 * 1024  # decoding and converting it takes at most about 20 ms
BODY_SECONDS = 10
UPLOAD_STALL_SECONDS = 20.0  # an upload is aborted if no bytes arrive for this time
PROGRAM_LOG_OPERATIONS = {"ban", "unban", "set_role", "change_password", "delete_server"}


async def result_or_error(work: Awaitable[T]) -> T | ChatError:
    """Await a call and return its result or its error. A bug is logged and becomes INTERNAL_ERROR."""
    outcome: T | Exception = await result_or_exception(work)
    if isinstance(outcome, Exception) and not isinstance(outcome, ChatError):
        log.error("a call failed", exc_info=outcome)
        return ChatError("INTERNAL_ERROR")
    return outcome


async def dispatch(hub: Hub, op: Operation, caller: Caller, args: Any) -> Result[Any]:
    """Run an operation as its kind requires: in the next write transaction, in a read snapshot, or as a coroutine. Raises
    ChatError."""
    work: Awaitable[Result[Any]]
    if op.kind == "async":
        work = op.run(hub, caller, args)
    else:
        run = op.run if op.logged is None else functools.partial(run_logged, op, op.run)
        job: Query[Result[Any]] = hub.authorized(op.access, caller, args, run)
        if op.kind == "write":
            return await hub.store.write(job, slow=op.slow, frees_space=op.frees_space)
        if not op.slow:
            return hub.store.read_inline(job)
        work = hub.read_slow(caller, job)
    try:
        async with asyncio.timeout(None if op.raw_body or caller.is_program else CALL_TIMEOUT):
            return await work
    except TimeoutError:
        raise chat_error("TOO_SLOW") from None


async def run_before(hub: Hub, op: Operation, caller: Caller, args: Any) -> Any:
    """Call the embedding program's functions for this operation, in order. Return the arguments with the changes they made."""
    for function in hub.before[op.name]:
        changed = await function(caller.info, args)
        if not isinstance(changed, op.args | None):
            raise TypeError(f"{function.__qualname__} must return {op.args.__name__} or None")
        try:
            args = args if changed is None else changed
            args = read_args(op.args, msgspec.to_builtins(args, builtin_types=(bytes,)))
        except ChatError as error:
            raise ValueError(f"{function.__qualname__} made the arguments invalid: {error.detail}") from None
    return args


async def run_operation(hub: Hub, op: Operation, caller: Caller, args: Any) -> Result[Any]:
    """Run an operation within its rate limit, and log it if it is in PROGRAM_LOG_OPERATIONS. Raises ChatError."""
    limit, limiter = LIMITS.get(op.limit or ""), hub.limiter_for(caller)
    name, key_owner = op.limit or "", caller.address if limit and limit.by == "address" else caller.user.user_id
    if limit and not limit.failures:
        limiter.charge(name, key_owner)
    if op.name in hub.before and not caller.is_program:
        args = await hub.call_program(f"before {op.name}", run_before(hub, op, caller, args), may_refuse=True)
    try:
        result = await dispatch(hub, op, caller, args)
    except ChatError as error:
        if limit and limit.failures and error.reason in UNKNOWN_CODE_REASONS:  # known codes work even above the limit
            limiter.charge(name, key_owner)
        raise
    if op.name in PROGRAM_LOG_OPERATIONS:
        target = {name: getattr(args, name) for name in ("server_id", "user_id", "role") if hasattr(args, name)}
        log.info("%s by user %d from %s %s", op.name, caller.user.user_id, caller.address, target or "")
    return result


# REST.

HttpHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
JSON = {"Content-Type": "application/json"}
# Multidicts, because aiohttp copies them: from a dict, that would cost a response 5 us more.
EMPTY_HEADERS, JSON_HEADERS = web.Response(headers=HEADERS).headers, web.Response(headers=HEADERS | JSON).headers
OBJECT_DECODER = msgspec.json.Decoder(dict[str, Any])


def respond(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a response with `body` as JSON, or without a body if that is None."""
    content, shared = (None, EMPTY_HEADERS) if body is None else (msgspec.json.encode(body), JSON_HEADERS)
    response = WatchedResponse(body=content, status=status, headers=shared)
    if headers:
        response.headers.update(headers)
    return response


def error_response(error: ChatError) -> web.Response:
    body = error.body()
    response = respond(body, error.status, {"Retry-After": str(body["retry_after"])} if "retry_after" in body else None)
    if error.code == "TOO_LARGE":
        response.force_close()
    return response


async def read_body(request: web.Request) -> bytes:
    """Return the body, limited in size and time. Raises BAD_REQUEST, TOO_LARGE."""
    if "Content-Encoding" in request.headers:
        raise chat_error("BODY_COMPRESSED")
    if (request.content_length or 0) > BODY_MAX:
        raise chat_error("BODY_LONG", n=BODY_MAX)
    if request.content.is_eof():  # it usually arrives with the headers
        return request.content.read_nowait()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.content.readexactly(BODY_MAX + 1)
    except asyncio.IncompleteReadError as error:  # the body ends before the limit
        return error.partial
    except BODY_ERRORS:
        raise chat_error("BODY_BROKEN") from None
    raise chat_error("BODY_LONG", n=BODY_MAX)


def open_body(request: web.Request) -> Body:
    """Return the body as a stream. It raises BAD_REQUEST if the client disconnects, stops sending, or takes too long."""
    if "Content-Encoding" in request.headers:
        raise chat_error("BODY_COMPRESSED")
    loop = asyncio.get_running_loop()
    deadline = loop.time() + UPLOAD_SECONDS

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                async with asyncio.timeout_at(min(loop.time() + UPLOAD_STALL_SECONDS, deadline)):
                    part = await request.content.readany()
                if not part:
                    return
                yield part
        except BODY_ERRORS:
            raise chat_error("BODY_BROKEN") from None

    return Body(parts(), request.content_length)


FILE_HEADERS = HEADERS | {
    "Accept-Ranges": "bytes",
    "Cache-Control": "private, no-cache",
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src 'self'; media-src 'self'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
}


def requested_range(request: web.Request, size: int, tag: str) -> tuple[int, int] | None:
    """Return the start and end of the part that the header Range names. None if the whole file must be sent: if that header is
    missing, malformed or names several parts, or if If-Range names another version (RFC 9110, 14.2)."""
    with contextlib.suppress(ValueError):
        wanted = request.http_range
        if wanted.start is not None and request.method == "GET" and request.headers.get("If-Range", tag) == tag:
            is_empty = re.fullmatch(r"bytes=-0+", request.headers["Range"])  # the last 0 bytes, which aiohttp reads as all
            return (size, size) if is_empty else wanted.indices(size)[:2]
    return None


def disposition(kind: str, name: str) -> str:
    """Return the header Content-Disposition of a file: `kind` is "inline" or "attachment"."""
    plain = re.sub(r'[^ -~]|["\\%]', "_", name)
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"


async def send_parts(
    hub: Hub, request: web.Request, user: Principal, response: web.StreamResponse, parts: AsyncIterator[bytes]
) -> web.StreamResponse:
    """Send the parts of a body. If the client loses access or disconnects meanwhile, the connection is aborted."""
    complete = False
    async with hub.downloads.transfer(user.user_id, request):
        try:
            await response.prepare(request)
            if request.method != "HEAD":
                async for part in parts:
                    await hub.sio.eio.slow_clients.send(request, response, part)
            complete = True
        except (ChatError, ConnectionError) as error:
            drop_frames(error)
        finally:
            if not complete and request.transport is not None:
                abort(request.transport)
    return response


async def send_document(hub: Hub, request: web.Request, user: Principal, document: Document) -> web.StreamResponse:
    """Send a document as a download."""
    headers = HEADERS | cors_headers(request, hub.sio.eio.options) | {"Content-Type": "text/html; charset=utf-8"}
    headers["Content-Security-Policy"] = f"sandbox; {TRANSCRIPT_POLICY}"
    headers["Content-Disposition"] = disposition("attachment", document.name)
    return await send_parts(hub, request, user, web.StreamResponse(headers=headers), document.parts)


async def send_file(hub: Hub, request: web.Request, content: FileContent) -> web.StreamResponse:
    """Send a file or a part of it."""
    file, tag = content.file, f'"{content.digest.hex()}"'
    headers = FILE_HEADERS | cors_headers(request, hub.sio.eio.options) | {"ETag": tag, "Content-Type": file.type}
    headers["Content-Disposition"] = disposition("inline" if file.type in INLINE_TYPES else "attachment", file.name)
    if {"*", content.digest.hex()} & {cached.value for cached in request.if_none_match or ()}:
        return web.Response(status=304, headers=headers)
    part = requested_range(request, file.size, tag)
    start, stop = part or (0, file.size)
    if part is not None and start >= stop:
        not_satisfiable = error_response(ChatError("BAD_REQUEST", "The range is outside the file", status=416))
        not_satisfiable.headers["Content-Range"] = f"bytes */{file.size}"
        return not_satisfiable
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    response = web.StreamResponse(status=206 if part else 200, headers=headers)
    response.content_length = stop - start
    return await send_parts(hub, request, content.caller.user, response, content.parts(start, stop))


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """Return the JSON of a body, validated. Raises BAD_REQUEST, TOO_LARGE."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise describe_validation_error(str(error)) from None
    except (ValueError, RecursionError):
        raise chat_error("NOT_JSON") from None


def decode_hook_post(request: web.Request, body: bytes) -> dict[str, Any]:
    """Return the arguments in a post to a hook: JSON, or a form whose field `payload` is JSON. Raises BAD_REQUEST."""
    if len(body) > HOOK_BODY_MAX:
        raise chat_error("BODY_LONG", n=HOOK_BODY_MAX)
    kind = request.content_type if "Content-Type" in request.headers else "application/json"
    is_form = kind == "application/x-www-form-urlencoded"
    if is_form and not body.lstrip().startswith(b"{"):  # curl sends JSON as a form, too
        try:
            body = urllib.parse.parse_qs(body.decode(), max_num_fields=100)["payload"][0].encode()
        except (ValueError, KeyError):
            raise chat_error("HOOK_BODY") from None
    elif not is_form and kind != "application/json":
        raise chat_error("HOOK_BODY")
    key = request.headers.get("Idempotency-Key")
    payload = decode(OBJECT_DECODER, body) | ({} if key is None else {"nonce": key})
    payload.pop("secret", None)  # a field of the other program; ours is in the path
    return payload


class Route:
    """The HTTP handler of one operation."""

    def __init__(self, hub: Hub, op: Operation) -> None:
        self.hub, self.op = hub, op
        self.has_path_args = "{" in (op.path or "")
        fields = msgspec.json.schema(op.args)["$defs"][op.args.__name__]["properties"]
        self.integers = {name for name, field in fields.items() if "integer" in json.dumps(field)}
        self.decoder = msgspec.json.Decoder(op.args)

    def authenticate(self, request: web.Request) -> Principal:
        """Return the user of the token or, for reading a file, of the link. Raises UNAUTHORIZED."""
        header = request.headers.get("Authorization")
        if header is None and self.op.args is ReadFile and (link := request.query.get("link")) is not None:
            return self.hub.load_user(*self.hub.signer.verify_link(link, request.match_info["file_id"]))
        scheme, _, token = (header or "").partition(" ")
        if scheme.lower() != "bearer":
            raise chat_error("TOKEN_INVALID")
        return self.hub.authenticate_token(token.strip())

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        """Return the response to a request. Raises ChatError."""
        hub, op, user = self.hub, self.op, NOBODY
        if op.access is not Access.ANYONE:
            user = self.authenticate(request)
            hub.limiter.charge("request", user.user_id)
        body = open_body(request) if op.raw_body else None
        caller = Caller(user, client_address(request, hub.sio.eio.options), request, body, op.action)
        result = await run_operation(hub, op, caller, await self.arguments(request))
        if isinstance(result.value, FileContent):
            return await send_file(hub, request, result.value)
        if isinstance(result.value, Document):
            return await send_document(hub, request, user, result.value)
        status = op.replay_status if result.replayed else op.status
        headers = {"Idempotent-Replayed": "true"} if result.replayed else None
        return respond(None if status == 204 else result.value, status, headers)

    async def arguments(self, request: web.Request) -> Any:
        """Return the operation's arguments, from the path and the body, or from path and query. Each may be given once."""
        body = await read_body(request) if self.op.has_body else b""
        if body and not self.has_path_args:
            return decode(self.decoder, body)
        is_hook = self.op.args is HookPost
        payload = decode_hook_post(request, body) if is_hook else decode(OBJECT_DECODER, body) if body else {}
        in_path = request.match_info.items() if self.has_path_args else ()
        texts = [*in_path, *(() if self.op.has_body else request.query.items())]
        given: dict[str, Any] = dict(texts)
        for name in self.integers & given.keys():
            if re.fullmatch(r"-?[0-9]{1,30}", given[name]):
                given[name] = int(given[name])
        if len(given | payload) < len(texts) + len(payload):
            names = [*(name for name, _ in texts), *payload]
            twice = max(names, key=names.count)
            raise chat_error("FIELD_TWICE", field=twice, what=twice)
        return read_args(self.op.args, given | payload)


async def call_handler(handler: HttpHandler, request: web.Request) -> web.StreamResponse:
    """Answer a preflight request, or call the handler. The router's errors become ChatErrors."""
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return respond(None, 204)
    try:
        return await handler(request)
    except web.HTTPException as error:
        drop_frames(error)  # the request keeps a reference to it
        if error.status in (404, 405):
            raise chat_error("NO_ROUTE") from None
        raise ChatError("TOO_LARGE" if error.status == 413 else "BAD_REQUEST") from None


async def answer(engine: Engine, request: web.Request, handler: HttpHandler) -> web.StreamResponse:
    """Check host and origin, call the handler of a request, and turn every error into a response."""
    try:
        await engine.admit(request)
    except ChatError as error:
        return error_response(error)
    response = await result_or_error(call_handler(handler, request))
    if isinstance(response, ChatError):
        drop_frames(response)
        engine.client_log.record_error(client_address(request, engine.options), response)
        response = error_response(response)
    if "Origin" in request.headers:
        response.headers.update(cors_headers(request, engine.options))
    return response


def error_middleware(engine: Engine, handlers: Collection[object]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Return the middleware that answers requests to our handlers, and those that no route matches."""

    @web.middleware
    async def middleware(request: web.Request, handler: HttpHandler) -> web.StreamResponse:
        if request.match_info.http_exception is None and request.match_info.handler not in handlers:
            return await handler(request)  # Socket.IO, which checks them itself, or a route of the embedding application
        return await answer(engine, request, handler)

    return middleware


# Socket.IO.

CLIENT_EVENTS = {op.event: op for op in OPERATIONS.values() if op.event is not None}
EVENT_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")  # an event of the embedding program
TAKEN_EVENTS = RESERVED | EVENTS.keys() | CLIENT_EVENTS.keys() | {"message"}


def host_operation(name: str, function: HostFunction) -> Operation:
    """Return an event of the embedding program as an operation. Its arguments have the type of the function's second parameter.
    Raises TypeError."""
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if len(parameters) != 2:
        raise TypeError(f"{function.__qualname__} must have two parameters: the caller and the data")
    kind: Any = Any if parameters[1].annotation is inspect.Parameter.empty else parameters[1].annotation
    msgspec.json.schema(kind)  # raises TypeError for a type that msgspec does not know

    async def call(caller: Caller, args: Any) -> dict[str, Any]:
        value = await function(caller.info, args)
        result = msgspec.json.decode(msgspec.json.encode({} if value is None else value))
        if not isinstance(result, dict):
            raise TypeError(f"{function.__qualname__} must return a dict or None")
        return result | {"success": True}

    async def run(hub: Hub, caller: Caller, args: Any) -> Result[dict[str, Any]]:
        failure = ChatError("INTERNAL_ERROR")  # not HOST_FAILED: the function may have changed something
        return Result(await hub.call_program(f"event {name}", call(caller, args), may_refuse=True, failure=failure))

    return Operation(
        name=name, run=run, kind="async", event=name, method=None, path=None, access=Access.USER, args=kind,
        result=type(None), status=200, replay_status=200, frees_space=False, summary=inspect.getdoc(function) or "",
    )  # fmt: skip


def encode_ack(value: Payload | dict[str, Any] | None) -> msgspec.Raw:
    """Return the JSON of a successful ack: encoded once, not converted to a dict first."""
    if value is None or isinstance(value, dict):
        return msgspec.Raw(msgspec.json.encode({"success": True} | (value or {})))
    body = msgspec.json.encode(value)
    return msgspec.Raw(b'{"success":true' + (b"," if body != b"{}" else b"") + body[1:])


async def handle_event(hub: Hub, event: str, sid: str, *payload: Any) -> msgspec.Raw:
    """Run the operation of an event and return its ack. Raises ChatError."""
    op = CLIENT_EVENTS.get(event) or hub.host_events.get(event)
    if op is None:
        raise chat_error("NO_EVENT")
    connection = hub.connections.get(sid)
    if connection is None:
        raise chat_error("CLOSING")
    if connection.user is NOBODY and op.access is not Access.ANYONE:
        raise chat_error("SIGN_IN_FIRST")
    if op.limit != "itself":
        hub.limiter.charge("event", connection.user.user_id or sid)
    if len(payload) > 1 or (not payload and op.args not in (NoArgs, Any)):
        raise chat_error("ONE_OBJECT")
    raw = payload[0] if payload and payload != (None,) else ({} if op.args is NoArgs else None)
    caller = Caller(connection.user, connection.address, connection, action=op.action)
    result = await run_operation(hub, op, caller, read_args(op.args, raw))
    return encode_ack(result.value if op.acks else None)


def add_socket_handlers(hub: Hub) -> None:
    """Handle connections (which may authenticate in the handshake), disconnections and all events of clients."""
    sio, authenticate = hub.sio, CLIENT_EVENTS["authenticate"]

    async def authenticate_handshake(connection: Connection, auth: Any) -> Result[Any]:
        args = read_args(authenticate.args, auth)
        return await run_operation(hub, authenticate, Caller(NOBODY, connection.address, connection), args)

    @sio.on("connect")  # type: ignore[untyped-decorator]
    async def on_connect(sid: str, environ: Any, auth: Any = None) -> None:
        connection = hub.add_connection(sid, environ["REMOTE_ADDR"])
        if not auth:
            return
        outcome = await result_or_error(authenticate_handshake(connection, auth))
        if isinstance(outcome, ChatError):
            sio.eio.client_log.record_error(connection.address, outcome)
            hub.remove_connection(sid)
            raise socketio.exceptions.ConnectionRefusedError(outcome.detail, outcome.body())

    @sio.on("disconnect")  # type: ignore[untyped-decorator]
    async def on_disconnect(sid: str, reason: str) -> None:
        hub.remove_connection(sid)

    sio.on("*", functools.partial(handle_event, hub))


# OpenAPI and AsyncAPI.


def reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def component_schemas(types: Iterable[Any]) -> dict[str, Any]:
    """Return the schemas of these types and of the types of their fields, by name."""
    types = [one for one in types if issubclass(one, Struct)]
    return msgspec.json.schema_components(types, ref_template=reference("{name}")["$ref"])[1]


def json_content(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}, **more}


def describe_operation(op: Operation) -> dict[str, Any]:
    emits = f" Emits {', '.join(op.emits)}." if op.emits else ""
    refused_by = "mute" if op.action == "hook" else "mute or a rule of the channel"
    rules = f" A {refused_by} may refuse it." if op.action else ""
    return {"summary": op.summary, "description": f"Allowed for: {op.access.value}.{rules}{emits}"}


def describe_route(op: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = schemas[op.args.__name__]
    fields, required, in_path = schema["properties"], schema.get("required", []), re.findall(r"{(\w+)}", op.path or "")
    locations = {name: "path" if name in in_path else "query" for name in fields if name in in_path or not op.has_body}
    result = op.result.__name__
    success = {"description": "Done."} if op.result is type(None) else json_content(reference(result), description=result)
    if op.result in (FileContent, Document):
        success = {"description": "The bytes.", "content": {"*/*": {}}}
    answers = {str(status): success for status in (op.status, op.replay_status)}
    if op.result is FileContent:
        answers |= {"206": success, "304": {"description": "The client has the file."}}
    route = describe_operation(op) | {
        "operationId": op.name,
        "parameters": [
            {"name": name, "in": at, "required": name in required, "schema": fields[name]} for name, at in locations.items()
        ],
        "responses": answers | {"default": json_content(reference("Error"), description="An error.")},
        "security": [] if op.access is Access.ANYONE else [{"token": []}],
    }
    if body := {name: field for name, field in fields.items() if name not in locations}:
        needed = [name for name in required if name in body]
        strict = op.args.__struct_config__.forbid_unknown_fields
        schema = {"type": "object", "properties": body, "additionalProperties": not strict, "required": needed}
        route["requestBody"] = json_content(schema, required=bool(needed))
    if op.raw_body:
        route["requestBody"] = {"content": {"*/*": {}}, "required": True}
    return route


def openapi() -> dict[str, Any]:
    """Return the routes as an OpenAPI 3.1 document."""
    schemas = component_schemas(kind for op in OPERATIONS.values() for kind in (op.args, op.result))
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS.values():
        if op.path and op.method:
            paths.setdefault(op.path, {})[op.method.lower()] = describe_route(op, schemas)
    for name in {op.args.__name__ for op in OPERATIONS.values()}:
        schemas.pop(name, None)
    text, codes, reasons = {"type": "string"}, {"enum": list(ERRORS)}, {"enum": list(REASONS)}
    wait = {"type": "integer", "description": "Seconds to wait."}
    body = {"error": text, "code": codes, "reason": reasons, "field": text, "retry_after": wait}
    schemas["Error"] = {"type": "object", "properties": body, "required": ["error", "code"]}
    security = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ChatRTC", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": security},
    }


def channel_message(name: str) -> dict[str, Any]:
    return {"channel": {"$ref": "#/channels/socket"}, "messages": [{"$ref": f"#/channels/socket/messages/{name}"}]}


def asyncapi(host_events: Collection[Operation] = ()) -> dict[str, Any]:
    """Return the events as an AsyncAPI 3.0 document: those that a client may emit, with their acks, and those it receives."""
    types = [kind for op in CLIENT_EVENTS.values() for kind in (op.args, op.result)]
    schemas = component_schemas([*types, *(kind.payload for kind in EVENTS.values())])
    # The embedding program's types may have the same names as ours, so they get a prefix.
    host_args, host_schemas = msgspec.json.schema_components(
        [op.args for op in host_events], ref_template=reference("host.{name}")["$ref"]
    )
    schemas |= {f"host.{name}": schema for name, schema in host_schemas.items()}
    args = [reference(op.args.__name__) for op in CLIENT_EVENTS.values()] + list(host_args)
    payloads = {name: reference(kind.payload.__name__) for name, kind in EVENTS.items()}
    success = {"type": "object", "properties": {"success": {"const": True}}, "required": ["success"]}
    operations: dict[str, Any] = {}
    for op, schema in zip([*CLIENT_EVENTS.values(), *host_events], args, strict=True):
        has_value = op.acks and op.result is not type(None)
        ack = {"allOf": [success, reference(op.result.__name__)]} if has_value else success
        payloads |= {f"{op.event}.in": schema, f"{op.event}.ack": ack}
        receive = {"action": "receive", "reply": channel_message(f"{op.event}.ack")}
        operations[f"emit {op.event}"] = describe_operation(op) | channel_message(f"{op.event}.in") | receive
    for name, kind in EVENTS.items():
        to = "To the socket." if kind.room == "socket" else f"To room {kind.room}:{{id}}."
        operations[f"hear {name}"] = channel_message(name) | {"action": "send", "summary": kind.description, "description": to}
    messages = {key: {"name": key.rpartition(".")[0] or key, "payload": payload} for key, payload in payloads.items()}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "ChatRTC", "version": __version__},
        "channels": {"socket": {"address": "/socket.io/", "messages": messages}},
        "operations": operations,
        "components": {"schemas": schemas},
    }


# ---- Application ---------------------------------------------------------------------------------------------------
# Starting, stopping and embedding. ChatRTC adds routes to an aiohttp application, whose start-up opens the database and whose
# clean-up closes it.

MAINTENANCE_INTERVAL = 0.5  # seconds
EXPIRY_INTERVAL = 120  # rounds of maintenance: a minute
TOKEN_PURGE_INTERVAL = 7200  # rounds of maintenance: an hour
MAX_CACHED_PICTURES = 64  # QR codes, of about 20 KiB each
DELETION_PAUSE_FACTOR = 4  # the pause after a step of a deletion, in multiples of the step: up to 0.2 s with a million messages
DELETION_SECONDS = 1.0  # longest time for one kind of deletion before other maintenance runs, and longest pause
MAX_UNINDEXED = 50_000  # messages that may wait to be indexed: a search then indexes them first, in about 2 seconds
KEEPALIVE = 20.0  # seconds for which an idle HTTP connection stays open
WATCHDOG_SECONDS = 2.0  # between two notices to systemd
PUBLIC_URL = re.compile(rf"(?i:https?://{HOST.pattern}){PATH.pattern}", re.ASCII)
REDIS_URL = re.compile(
    rf"(?:rediss?://(?:[^@/?#\s]*@)?{HOST.pattern}(?:/[0-9]{{1,3}})?(?:\?ssl_ca_certs=[^&#\s]+)?"
    r"|unix://(?:[^@/?#\s]*@)?/[^?#\s]+(?:\?db=[0-9]{1,3})?)",
    re.ASCII | re.IGNORECASE,
)  # fmt: skip


def add_user(db: sqlite3.Connection, username: str, password: str) -> Result[int]:
    """Create an account and return its id. The username is valid. Raises CONFLICT."""
    return Result(insert_user(db, username, password, utc(time.time())))


def require_account(db: sqlite3.Connection, username: str) -> Principal:
    """Return the account with that username. Raises NOT_FOUND, and BAD_REQUEST if the shell's argument is not text."""
    if (found := load_account(db, read_args(str, username))) is None:
        raise chat_error("NO_ACCOUNT", name=username)
    return found[0]


def require_person(db: sqlite3.Connection, username: str) -> int:
    """Return the id of an account that is not a bot's. Raises NOT_FOUND, FORBIDDEN."""
    account = require_account(db, username)
    if account.bot:
        raise chat_error("NOT_FOR_BOTS")
    return account.user_id


def set_password(db: sqlite3.Connection, username: str, password: str) -> Result[int]:
    """Set an account's password and revoke its tokens."""
    user_id = require_person(db, username)
    return replace_password(db, user_id, load_password_hash(db, user_id), password)


def delete_user(db: sqlite3.Connection, username: str, messages: bool = False) -> Result[int]:
    """Delete the account with that username, with `messages` its messages too."""
    user_id = require_account(db, username).user_id
    return Result(user_id, remove_account(db, user_id, messages))


def add_server(db: sqlite3.Connection, name: str, owner: str) -> Result[int]:
    """Create a server for an account and return its id. Raises BAD_REQUEST, NOT_FOUND, FORBIDDEN."""
    args, owner_id = read_args(NameArgs, {"name": name}), require_person(db, owner)
    server_id = insert_owned_server(db, args.name, owner_id, utc(time.time()))
    return Result(server_id, [server_joined(db, server_id, owner_id)])


def check_addresses(settings: Settings) -> None:
    """Raise StartError if the host, an origin, a proxy, the public URL or the URL of Redis is invalid."""
    try:
        settings.host.encode("idna")
    except UnicodeError:
        raise StartError(f"--host {settings.host!r}: not a host name") from None
    redis = REDIS_URL.fullmatch("redis://localhost" if settings.redis is None else settings.redis)
    if redis is None or int(redis[2] or 0) > PORT_MAX:  # the URL may contain a password, so it is not shown
        raise StartError("--redis: must be redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH; %-encode the password")
    origins = [("cors-origin", "*", origin) for origin in settings.cors_origin]
    origins += [("frame-ancestor", "self or *", origin) for origin in settings.frame_ancestor]
    for option, words, origin in origins:
        if origin not in words.split(" or ") and parse_origin(origin) is None:
            raise StartError(f"--{option} {origin!r}: must be {words}, or http:// or https:// and a host name, without a path")
    if None in map(parse_ice_server, settings.ice_server):  # the URL may contain a password, so it is not shown
        raise StartError("--ice-server: must be stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT; %-encode the password")
    for proxy in settings.trusted_proxy:
        try:
            parse_network(proxy)
        except ValueError:
            raise StartError(f"--trusted-proxy {proxy!r}: must be an address, a network or 'unix'") from None
    url = settings.public_url
    if url is not None and not (len(url) <= PUBLIC_URL_MAX and PUBLIC_URL.fullmatch(url) and parse_origin(origin_of(url))):
        raise StartError(f"--public-url {url!r}: must be http:// or https:// with a host name and any path, but no '?' or '#'")


def read_settings(given: dict[str, Any]) -> Settings:
    """Return validated settings. Raises StartError."""
    try:
        settings = msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise StartError(f"Invalid setting: {describe_validation_error(str(error)).detail}") from None
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise StartError("--tls-cert and --tls-key must be given together")
    if settings.tls_self_signed and settings.tls_cert is not None:
        raise StartError("--tls-self-signed and --tls-cert cannot be combined")
    check_addresses(settings)
    if settings.process is not None and settings.redis is None:
        raise StartError("--process needs --redis")
    if settings.redis is not None and settings.process is None:
        settings = msgspec.structs.replace(settings, process=secrets.token_hex(4))
    if settings.lan and is_loopback(settings.host):
        settings = msgspec.structs.replace(settings, host="0.0.0.0")
    return settings


def engine_options(settings: Settings) -> dict[str, Any]:
    """Return the options of `socket_server` that follow from the settings."""
    origins = [*settings.cors_origin, *([origin_of(settings.public_url)] if settings.public_url else [])]
    names = {parsed[1] for origin in origins if (parsed := parse_origin(origin))} | {settings.host.lower()}
    # A host that is a name may turn out to be a loopback address.
    local = is_loopback(settings.host) or (bool(settings.host) and parse_address(settings.host) is None)
    limits: dict[str, Any] = {"max_anonymous_per_address": ANONYMOUS_PER_ADDRESS, "max_sessions": settings.max_sockets}
    if settings.no_rate_limit:
        limits |= {"max_sessions_per_address": 10**6, "max_anonymous_per_address": None, "frames_per_second": None}
    proxies = tuple(map(parse_network, settings.trusted_proxy))
    # Behind a proxy, all requests of a session must reach the same process, whose name begins the session's id. For nginx:
    #     map $arg_sid $upstream { ~^a- chat_a;  ~^b- chat_b;  default chat; }
    prefix = f"{settings.process}-" if settings.process else ""
    return {"sid_prefix": prefix, "origins": origins, "proxies": proxies, "hosts": names if local else None, **limits}


def qr_code(link: str) -> Any:
    """Return a segno QR code."""
    import segno  # only when it is needed: it takes 1.4 MiB

    return segno.make(link, micro=False)


@functools.lru_cache(MAX_CACHED_PICTURES)
def qr_code_svg(link: str) -> bytes:
    """Return the QR code of a link as SVG."""
    picture = io.BytesIO()
    qr_code(link).save(picture, kind="svg", scale=8, border=2, light="#fff")
    return picture.getvalue()


async def send_invite_qr_code(hub: Hub, request: web.Request) -> web.Response:
    """Send the QR code of an invite's link. Raises ChatError."""
    caller = Caller(NOBODY, client_address(request, hub.sio.eio.options), request)
    args = read_args(CodeArgs, dict(request.match_info))
    invite = (await run_operation(hub, OPERATIONS["get_invite"], caller, args)).value
    async with hub.qr_lock:  # one at a time: each takes 10 ms, in which the event loop's thread waits for the GIL
        picture = await asyncio.to_thread(qr_code_svg, f"{public_address(hub, request, '/invites/')}/#/invite/{invite.code}")
    return WatchedResponse(body=picture, headers=HEADERS | {"Content-Type": "image/svg+xml"})


async def erase_texts(hub: Hub) -> None:
    """Erase deleted texts from the search index and the -wal file, if there are any. As this rewrites a large index, the next
    run waits twenty times as long as this one took."""
    began = time.monotonic()
    if began < hub.erase_after or not hub.store.read_inline(has_stale_texts):
        return
    while not hub.store.is_busy() and not (await hub.store.write(merge_index, slow=True, frees_space=True)).value:
        pass
    if not hub.store.is_busy():
        await hub.store.write(empty_wal, slow=True, frees_space=True)
    hub.erase_after = time.monotonic() + 20 * (time.monotonic() - began)


async def expire_messages(hub: Hub) -> None:
    """Delete the messages whose retention time has passed, in short steps, while nobody writes."""
    days = hub.settings.keep_days or MAX_KEEP_DAYS
    for channel_id, before in await hub.store.read(load_expired_channels, time.time(), days):
        step = functools.partial(delete_expired_messages, channel_id=channel_id, before=before)
        while not hub.store.is_busy() and (await hub.store.write(step, slow=True, frees_space=True)).value:
            pass


async def run_maintenance(hub: Hub) -> None:
    """Trim the commit log, delete purged messages and removed files, index new messages and erase deleted texts, in short steps
    that stop while clients write. Even then, one step of each deletion runs, and the index stays within MAX_UNINDEXED messages
    of the newest."""
    if hub.store.read_inline(has_old_log, time.time() - LOG_SECONDS):
        await hub.store.write(lambda db: trim_log(db, time.time()), slow=True, frees_space=True)
    for pending, step in (
        (load_pending_purge, purge_next_messages),
        (load_deleted_channel, purge_deleted_channel),
        (load_removed_file, purge_removed_file),
    ):
        ends_at = time.monotonic() + DELETION_SECONDS
        while hub.store.read_inline(pending):
            began = time.monotonic()
            await hub.store.write(step, slow=True, frees_space=True)
            if hub.store.is_busy() or time.monotonic() > ends_at:
                break
            await asyncio.sleep(min(DELETION_PAUSE_FACTOR * (time.monotonic() - began), DELETION_SECONDS))
    newest, indexed = hub.store.read_inline(load_index_progress)
    while indexed < newest and (not hub.store.is_busy() or newest - indexed > MAX_UNINDEXED):
        indexed = (await hub.store.write(index_messages, slow=True, frees_space=True)).value
    if not hub.store.is_busy():
        await erase_texts(hub)


async def maintenance_loop(hub: Hub) -> None:
    """Run maintenance and flush the log. Every minute, delete old messages and unattached files; every hour, expired tokens
    and old entries of the moderation log."""
    for turn in itertools.count():
        hub.sio.eio.client_log.flush()
        if turn % EXPIRY_INTERVAL == 0:
            await result_or_error(expire_messages(hub))
            await result_or_error(hub.store.write(remove_unattached_files, slow=True, frees_space=True))
        if turn % TOKEN_PURGE_INTERVAL == 0:
            await result_or_error(hub.store.write(lambda db: Result(delete_expired(db, time.time())), frees_space=True))
        await result_or_error(run_maintenance(hub))
        await asyncio.sleep(MAINTENANCE_INTERVAL)


async def add_slash(request: web.Request) -> web.Response:
    """Redirect from /chat to /chat/, relative to any prefix that a proxy removed."""
    return respond(None, 308, {"Location": request.path.rpartition("/")[2] + "/"})


class StaticFile:
    """Sends a file that does not change while the server runs. It is made and compressed in a thread when first requested; a
    client that has it gets a 304."""

    def __init__(self, make: Callable[[], bytes], headers: dict[str, str]) -> None:
        self.make = make
        self.headers = HEADERS | {"Cache-Control": "no-cache", "Vary": "Accept-Encoding"} | headers
        self.versions: asyncio.Task[list[tuple[bytes, dict[str, str]]]] | None = None

    def _make_versions(self) -> list[tuple[bytes, dict[str, str]]]:
        """Return the body and its headers, plain and compressed."""
        body = self.make()
        tag = hashlib.sha256(body).hexdigest()[:24]
        compressed = {"ETag": f'"{tag}-gzip"', "Content-Encoding": "gzip"}
        return [(body, {"ETag": f'"{tag}"'}), (gzip.compress(body, mtime=0), compressed)]

    async def __call__(self, request: web.Request) -> web.Response:
        if self.versions is None:
            self.versions = asyncio.create_task(asyncio.to_thread(self._make_versions))
        versions = await asyncio.shield(self.versions)
        accepted = request.headers.get("Accept-Encoding", "").replace(" ", "")
        # RFC 9110, 12.5.3: a weight of 0 means no.
        takes_gzip = re.search(r"(?i)(^|,)gzip(,|$|;q=(?!0(\.0*)?(,|$)))", accepted)
        body, headers = versions[1 if takes_gzip else 0]
        cached = {f'"{tag.value}"' for tag in request.if_none_match or ()}
        if cached & {'"*"', *(known["ETag"] for _, known in versions)}:
            return web.Response(status=304, headers=self.headers | {"ETag": headers["ETag"]})
        return WatchedResponse(body=body, headers=self.headers | headers)


def page_file(settings: Settings, has_host_login: bool) -> StaticFile:
    """Return the chat page. Its Content-Security-Policy allows only its own scripts and style, by hash."""
    page = asset("chatrtc.html")
    if has_host_login:
        page = page.replace(b"<html ", b'<html data-session="host" ', 1)
    ancestors = " ".join("'self'" if one == "self" else one for one in settings.frame_ancestor) or "'none'"

    def sources(tag: bytes) -> str:
        texts = re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)

    policy = (
        f"default-src 'none'; script-src {sources(b'script')}; style-src {sources(b'style')}; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors {ancestors}"
    )
    return StaticFile(lambda: page, {"Content-Security-Policy": policy, "Content-Type": "text/html; charset=utf-8"})


class Handler(web.RequestHandler):
    """Adds our headers to aiohttp's own responses, and sends its errors, such as for malformed HTTP, as our JSON."""

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            if isinstance(resp, WatchedResponse) and await resp.send(request):
                return resp, False
        except ConnectionError:
            return resp, True
        if isinstance(resp, web.HTTPExpectationFailed):
            resp = error_response(ChatError("BAD_REQUEST", "Only `Expect: 100-continue` is supported", status=417))
        if not resp.prepared and "Server" not in resp.headers:
            resp.headers.update(HEADERS)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if is_connected(request) or not isinstance(exc, ConnectionError):
            super().handle_error(request, status, exc, message)  # logs it
        drop_frames(exc)
        response = error_response(ChatError("INTERNAL_ERROR" if status == 500 else "BAD_REQUEST", status=status))
        response.force_close()
        return response


class HandlerServer(web.Server):
    def __call__(self) -> web.RequestHandler:
        return Handler(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """Runs our own application, with `Handler` for its connections. A request to a path without parameters goes directly to its
    handler in `plain`: aiohttp's router and middlewares would take 7 % of the CPU time of a post."""

    def __init__(self, app: web.Application, engine: Engine, plain: dict[tuple[str, str], HttpHandler], **options: Any) -> None:
        super().__init__(app, **options)
        self._engine, self._plain = engine, plain

    async def _make_server(self) -> web.Server:
        made, engine, plain = await super()._make_server(), self._engine, self._plain

        def handle(request: Any) -> Awaitable[web.StreamResponse]:
            handler = plain.get((request.method, request.raw_path))
            if handler is None or "Expect" in request.headers:
                return made.request_handler(request)
            return answer(engine, request, handler)

        return HandlerServer(handle, request_factory=made.request_factory, loop=made._loop, **self._kwargs)


Function = TypeVar("Function", bound=HostFunction)
PREFIXES = web.AppKey("PREFIXES", set[str])  # of the chats that are mounted in an application


def decorator(register: Callable[[HostFunction], None]) -> Callable[[Function], Function]:
    """Return a decorator that registers a coroutine function. It raises TypeError for any other object."""

    def decorate(function: Function) -> Function:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} must be a coroutine function (async def)")
        register(function)
        return function

    return decorate


class ChatRTC:
    """A chat server to run or to embed:

        chat = ChatRTC(database="chat.db")
        chat.attach(app, prefix="/chat")

    The keywords are the settings of `serve`. Every operation that needs no socket is a method, with the arguments of its route
    as keywords: `await chat.post_message(as_user=1, channel_id=1, content="hello")`. `as_user` is the id of the user who
    performs it (`author_id` is the older name). It returns the result and raises ChatError.

    With `identify`, the page uses the application's own login. It is a coroutine function that takes a request and returns the
    user who sent it, as a dict of arguments for `upsert_user`, or None. With `page=False`, there is no chat page.
    """

    if typing.TYPE_CHECKING:  # the methods are added below; the stubs of the wheel declare them

        def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]: ...

    def __init__(
        self, *, identify: Identify | None = None, page: bool = True, frame_ancestors: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        if identify is not None and not callable(identify):
            raise TypeError("identify must be a coroutine function")
        self.settings = read_settings(settings if frame_ancestors is None else settings | {"frame_ancestor": frame_ancestors})
        self.sio = socket_server(**engine_options(self.settings))
        self.hub = Hub(self.settings, self.sio)
        self.hub.identify, self._page = identify, page
        name = settings.get("process")  # a generated name is unique, and its lock file would remain
        self._name = FileLock(Path(self.settings.database), f".process-{name}.lock") if name is not None else None
        self._running = contextlib.AsyncExitStack()  # what `stop` undoes
        self._started = False  # True from the beginning of `start` until `stop` has ended
        self._plain: dict[tuple[str, str], HttpHandler] = {}  # method and path of the routes without parameters: see `Runner`
        self._asyncapi = StaticFile(lambda: msgspec.json.encode(asyncapi(self.hub.host_events.values())), JSON)
        add_socket_handlers(self.hub)

    def attach(self, app: web.Application, prefix: str = "", *, page: bool = True) -> None:
        """Mount REST, Socket.IO and the page under `prefix`. The chat is open in all cleanup contexts that the application adds
        after this call, and in all its `on_startup` functions; it is closed after those cleanup contexts. Raises ValueError if
        another chat is mounted there."""
        page = page and self._page
        prefix = prefix.strip("/")
        if prefix in app.setdefault(PREFIXES, set()):
            raise ValueError(f"Another chat is mounted under /{prefix}")
        app[PREFIXES].add(prefix)
        self.hub.mount = f"/{prefix}" if prefix else ""
        mounted = web.Application() if prefix else app
        routes = [
            *([web.get("/", page_file(self.settings, self.hub.identify is not None).__call__)] if page else []),
            web.get("/openapi.json", StaticFile(lambda: msgspec.json.encode(openapi()), JSON).__call__),
            web.get("/asyncapi.json", self._asyncapi.__call__),
            web.get("/invites/{code}.svg", functools.partial(send_invite_qr_code, self.hub)),
            *(
                # An emoji may contain a brace or a slash.
                web.route(op.method, op.path.replace("{emoji}", r"{emoji:[\s\S]+}"), Route(self.hub, op).__call__)
                for op in OPERATIONS.values()
                if op.method and op.path
            ),
            *([web.get("", add_slash)] if prefix and page else []),
        ]
        mounted.router.add_routes(routes)
        self._plain = {(route.method, route.path): route.handler for route in routes if "{" not in route.path}
        mounted.middlewares.append(error_middleware(self.sio.eio, {route.handler for route in routes}))
        self.sio.attach(mounted)
        app.cleanup_ctx.append(self._run)  # those of a sub-application start only after all of the application's
        mounted.on_shutdown.append(lambda app: self.sio.eio.drain())
        if prefix:
            app.add_subapp("/" + prefix, mounted)

    def on(self, event: str) -> Callable[[Function], Function]:
        """Return a decorator that calls a coroutine function with the payload of each such event and its `server_id`, in order.
        Listeners do not wait for each other. If one falls 4,096 events behind, the oldest are dropped."""
        if event not in EVENTS or EVENTS[event].room == "socket":
            raise ValueError(f"There is no event named {event} for listeners")
        return decorator(functools.partial(self.hub.add_listener, event))

    def before(self, operation: str) -> Callable[[Function], Function]:
        """Return a decorator that calls a coroutine function before clients perform an operation, with a CallerInfo and the
        operation's arguments. It may return other arguments of that type, or raise ChatError to refuse. Several functions are
        called in the order of their registration. The program's own calls are not affected."""
        if operation not in OPERATIONS:
            raise ValueError(f"There is no operation named {operation}")
        return decorator(lambda function: self.hub.before.setdefault(operation, []).append(function))

    def event(self, name: str) -> Callable[[Function], Function]:
        """Return a decorator that calls a coroutine function for an event that clients emit, with a CallerInfo and the data,
        validated if that parameter is annotated. The ack is `success` and the dict that the function returns."""
        if name in TAKEN_EVENTS or name in self.hub.host_events or not EVENT_NAME.fullmatch(name):
            raise ValueError(f"An event cannot be named {name}: the name is taken, or contains a character that is not allowed")

        def register(function: HostFunction) -> None:
            self.hub.host_events[name] = host_operation(name, function)
            self._asyncapi.versions = None

        return decorator(register)

    async def upsert_user(self, *, username: str, name: str | None = None, external_id: str | int | None = None) -> Profile:
        """Return the account of a user of your application. Creates it, or changes its display name, if necessary.

        It is the account with this `external_id`, your own id of the user. If somebody else has the username, a new account
        gets a number. Without an `external_id` it is the account with this username, whoever created it. Raises BAD_REQUEST,
        UNAUTHORIZED if the account is deleted, and CONFLICT if it is a bot.
        """
        args = read_args(HostUser, {"username": username, "name": name, "external_id": external_id})
        user = await find_or_store_host_user(self.hub, args)
        return self.hub.store.read_inline(load_profile, user.user_id)

    async def create_token(self, *, user_id: int, ttl: int | None = None) -> AuthResponse:
        """Return a token for an account, valid for `ttl` seconds (default: the setting `token_ttl`). Raises NOT_FOUND."""
        args = read_args(NewToken, {"user_id": user_id, "ttl": ttl})
        return self.hub.signer.issue(self.hub.store.read_inline(require_user, args.user_id), args.ttl)

    async def add_member(self, *, server_id: int, user_id: int, role: Role | None = None) -> Member:
        """Make an account a member of a server, or give a member this role; `owner` transfers ownership. Without `role`, a
        new member is a "member" and others keep their role. Raises NOT_FOUND, and FORBIDDEN if the user is banned, is a bot of
        another server, or is the owner and would get a lower role."""
        given = {"server_id": server_id, "user_id": user_id, "role": "member" if role is None else role}
        args, hub = read_args(RoleArgs, given), self.hub

        def job(db: sqlite3.Connection) -> Result[Member]:
            require_user(db, args.user_id)
            if (owner := load_owner(db, args.server_id)) is None:  # none, or a conversation
                raise chat_error("NO_SERVER", field="server_id")
            caller, now = require_user(db, owner), time.time()
            ctx = OperationContext(db, caller, now, hub.presence, hub.pages, hub.settings, args.server_id)
            return add_member(ctx, args, keeps_role=role is None)

        member: Member = (await hub.store.write(job)).value
        return member

    async def delete_user(self, *, user_id: int, messages: bool = False) -> None:
        """Delete an account, with `messages` its messages too. Servers that it owns pass to others. Raises NOT_FOUND."""
        args = read_args(DeleteUser, {"user_id": user_id, "messages": messages})

        def job(db: sqlite3.Connection) -> Result[None]:
            return Result(None, remove_account(db, require_user(db, args.user_id).user_id, args.messages))

        await self.hub.store.write(job, slow=True, frees_space=True)

    async def disconnect(self, *, user_id: int) -> None:
        """Close all sockets of an account, on all processes. Its tokens stay valid. Raises NOT_FOUND."""
        args = read_args(UserArgs, {"user_id": user_id})
        await self.hub.store.write(lambda db: Result(None, [Revoke(require_user(db, args.user_id).user_id)]), frees_space=True)

    async def _call(self, op: Operation, args: dict[str, Any]) -> Any:
        """Perform an operation for the embedding program. Raises ChatError."""
        user_id = args.pop("as_user", None)
        if user_id is None or "author_id" not in op.args.__struct_fields__:
            older = args.pop("author_id", None)
            user_id = older if user_id is None else user_id
        user_id = read_args(ActingUser, {"as_user": user_id}).as_user
        user = self.hub.store.read_inline(load_principal, user_id, b"") if user_id is not None else None
        if user is None and (user_id is not None or op.access is not Access.ANYONE):
            raise chat_error("NO_AUTHOR" if user_id is None else "NO_USER")
        data = args.pop("data") if op.raw_body else b""
        if not isinstance(data, bytes | AsyncIterator):
            raise chat_error("FIELD_TYPE", field="data", what="data", n="Expected bytes or an asynchronous iterator")
        body = Body(data, len(data) if isinstance(data, bytes) else None)
        caller = Caller(user or NOBODY, "program", None, body, op.action)
        given = {name: value for name, value in args.items() if value is not UNSET}
        return (await run_operation(self.hub, op, caller, read_args(op.args, given))).value

    async def _run(self, app: web.Application) -> AsyncIterator[None]:
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    async def start(self) -> None:
        """Open the database and start maintenance. Raises StartError."""
        hub = self.hub
        if self._started:
            raise StartError("This chat is already running: attach it only once")
        hub.use_this_loop()
        async with contextlib.AsyncExitStack() as stack:  # undoes the steps before one that fails
            self._started = True
            stack.callback(setattr, self, "_started", False)
            if self._name is not None:
                stack.callback(self._name.close)
            await hub.store.open(self._set_up)
            stack.push_async_callback(hub.store.close)
            hub.presence.invisible = set(hub.store.read_inline(load_invisible))
            hub.password_hasher.open()
            stack.callback(hub.password_hasher.close)
            stack.callback(self.sio.eio.client_log.flush, now=True)
            if self.settings.redis is not None:
                stack.push_async_callback(Bus(hub, self.settings.redis).stop)
            hub.listening = True
            stack.push_async_callback(hub.end_listeners)
            maintenance = asyncio.create_task(maintenance_loop(hub))
            stack.push_async_callback(asyncio.wait, [maintenance])
            stack.callback(maintenance.cancel)
            self._running = stack.pop_all()

    async def stop(self) -> None:
        """Stop maintenance, commit every accepted write and close the database."""
        await self._running.aclose()

    def _set_up(self, db: sqlite3.Connection, first: bool) -> None:
        """Load the secret. Raises StartError if other servers on the database have another secret, or one has this name."""
        if self._name is not None and not self._name.acquire():
            raise StartError(f"Another server on this database is called {self.settings.process}: give each its own --process")
        if first:
            remove_unfinished_files(db)  # no process uploads them any more
        if self.settings.secret is None:
            self.hub.signer = TokenSigner(load_or_create_secret(self.hub.store.path), self.settings.token_ttl)
        digest = self.hub.signer.check_digest()
        if self.settings.redis is None or load_secret_check(db) == digest:
            return
        if first:
            update_secret_check(db, digest)
        else:
            raise StartError("The servers that share this database have another secret: start all with the same --secret")


def lan_address() -> str:
    """Return this machine's address on the local network, 127.0.0.1 if it has none. Connecting a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def self_signed_certificate(database: Path) -> str:
    """Return the path of a file with a certificate and its key, valid for a year and kept. Raises StartError."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise StartError("--tls-self-signed needs an extra: pip install 'chatrtc[tls]'") from None
    addresses = {ipaddress.ip_address(address) for address in ("127.0.0.1", "::1", lan_address())}
    path, now = private_path(database, ".tls.pem"), datetime.datetime.now(datetime.UTC)
    if os.path.lexists(path):
        try:
            cert = x509.load_pem_x509_certificate(read_private(path, database))
            extension = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except (ValueError, x509.ExtensionNotFound):
            raise StartError(f"{path} is damaged: move it away, and a new one is created") from None
        named = extension.value.get_values_for_type(x509.IPAddress)
        if cert.not_valid_after_utc > now and addresses <= set(named):
            return str(path)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=ChatRTC")
    names = [x509.DNSName("localhost"), *map(x509.IPAddress, addresses)]
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(path, secret + cert.public_bytes(pem), database)
    return str(path)


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context to serve with, or None to serve plain HTTP. Raises StartError."""
    cert = self_signed_certificate(Path(settings.database)) if settings.tls_self_signed else settings.tls_cert
    if cert is None:
        return None
    context, key = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), settings.tls_key or cert
    try:
        for path in (cert, key):  # errors of `load_cert_chain` do not name the file
            open(path, "rb").close()
        context.load_cert_chain(cert, key)
    except ssl.SSLError as error:
        reason = error.reason.replace("_", " ").lower() if error.reason else "one of them is not a PEM file"
        raise StartError(f"The certificate {cert} cannot be used with the key {key}: {reason}") from None
    except OSError as error:
        what = error.filename or f"the pass phrase of {key}"
        raise StartError(f"The certificate cannot be used: {what}: {error.strerror}") from None
    return context


def announce(hub: Hub, address: tuple[str, int], tls: bool) -> None:
    """Print the URLs at which the server can be reached, and store them in the hub."""
    (host, port), settings, scheme, out = address, hub.settings, "https" if tls else "http", io.StringIO()
    url, lan_url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", f"{scheme}://{lan_address()}:{port}"
    print(f"ChatRTC listening on {url}", file=out)
    if settings.public_url is not None:
        print(f"People open {settings.public_url}", file=out)
    everywhere = parse_address(host) in (ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))
    hub.own_url = lan_url if everywhere else url
    if not is_loopback(host):
        hub.lan_url = hub.own_url
        if settings.lan:
            print(f"Others on your network: {settings.public_url or hub.lan_url}", file=out)
            qr_code(settings.public_url or hub.lan_url).terminal(out, compact=True, border=2)
        if not tls and not settings.trusted_proxy:
            print("Passwords cross the network unencrypted. Add --tls-self-signed to serve https.", file=out)
    elif sys.stdout.isatty() and settings.public_url is None:  # only in a terminal: scripts read the first line
        print(f"Only this machine can reach it. With --lan, others on your network can, at {lan_url}", file=out)
    click.echo(out.getvalue(), nl=False)  # at once: a reader such as `head -1` may close the pipe after a line


def handle_signals(handler: Callable[..., Any]) -> None:
    """Call `handler` on Ctrl-C and on every other signal of this system that ends a program."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # nohup ignores it
            signal.signal(number, handler)


def notify_systemd(state: str) -> None:
    """Send a line such as READY=1 to systemd, if it expects one (NOTIFY_SOCKET)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address and hasattr(socket, "AF_UNIX"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice, contextlib.suppress(OSError):
            notice.setblocking(False)
            notice.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


async def wait_for_stop(stopped: asyncio.Event) -> None:
    """Wait until the event is set. Meanwhile notify systemd that the event loop runs: it kills a hung process (WatchdogSec)."""
    while not stopped.is_set():
        notify_systemd("WATCHDOG=1")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCHDOG_SECONDS):
                await stopped.wait()


async def serve_until_stopped(settings: dict[str, Any]) -> None:
    """Run a server until SIGTERM, SIGINT, SIGHUP or SIGBREAK, and then shut it down cleanly. Raises StartError."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()
    # Windows has no add_signal_handler. A signal may also come after the loop was closed.
    handle_signals(lambda *_: loop.is_closed() or loop.call_soon_threadsafe(stopped.set))
    chat = ChatRTC(**settings)
    app = web.Application()
    chat.attach(app)
    context = tls_context(chat.settings)
    runner = Runner(
        app, chat.sio.eio, chat._plain, access_log=None, keepalive_timeout=KEEPALIVE, shutdown_timeout=3, auto_decompress=False,
        handler_cancellation=False,
    )  # fmt: skip
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, chat.settings.host, chat.settings.port, ssl_context=context, backlog=1024).start()
        except OSError as error:
            reason = "Unknown error" if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
            reason = str(error.strerror) if reason.startswith("Unknown error") else reason  # Windows has no texts for sockets
            raise StartError(f"Cannot listen on {chat.settings.host}:{chat.settings.port}: {reason}") from None
        announce(chat.hub, runner.addresses[0][:2], context is not None)
        # A post costs 10 % less if the garbage collector skips the objects loaded so far and runs seldom. Connections leave no
        # cycles; those of libraries are freed with the second generation, after at most 500,000 objects.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 10, 10)
        notify_systemd("READY=1")
        await wait_for_stop(stopped)
        notify_systemd("STOPPING=1")
    finally:
        await runner.cleanup()


# ---- Methods -------------------------------------------------------------------------------------------------------
# The operations as methods of ChatRTC, and the stubs by which type checkers know them. Both follow from `OPERATIONS`; the stubs
# are made when a wheel is built.


def make_method(op: Operation) -> Any:
    """Return an operation as a method of ChatRTC."""
    hints = {"as_user": int | None, "author_id": int | None, **typing.get_type_hints(op.args)}
    defaults: dict[str, Any] = {"as_user": None, "author_id": None}
    for field in msgspec.structs.fields(op.args):
        if not field.required:
            defaults[field.name] = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if op.raw_body:
        hints["data"] = bytes | AsyncIterator[bytes]
    required = hints.keys() - defaults.keys()

    async def run(self: ChatRTC, **args: Any) -> Any:
        if unknown := args.keys() - hints.keys():
            raise TypeError(f"ChatRTC.{op.name}() got an unexpected keyword argument {min(unknown)!r}")
        if missing := required - args.keys():
            raise TypeError(f"ChatRTC.{op.name}() is missing the keyword argument {min(missing)!r}")
        return await self._call(op, args)

    method: Any = run
    method.__name__, method.__qualname__, method.__doc__ = op.name, f"ChatRTC.{op.name}", op.summary
    method.__annotations__ = hints | {"return": op.result}
    make, empty = inspect.Parameter, inspect.Parameter.empty
    keywords = [
        make(name, make.KEYWORD_ONLY, default=defaults.get(name, empty), annotation=hint) for name, hint in hints.items()
    ]
    itself = make("self", make.POSITIONAL_OR_KEYWORD)
    method.__signature__ = inspect.Signature([itself, *keywords], return_annotation=op.result)
    return method


for callable_op in OPERATIONS.values():
    if callable_op.path is not None or callable_op.kind != "async":  # an async operation without a route needs a socket
        setattr(ChatRTC, callable_op.name, make_method(callable_op))

STUBS = '''"""The types of ChatRTC, made from its table of operations."""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, NamedTuple, Optional, TypeVar, Union, overload

import aiohttp.web_app, aiohttp.web_request
from msgspec import UNSET, Struct, UnsetType

__version__: str
A = TypeVar("A")
Before = Callable[[CallerInfo, A], Coroutine[Any, Any, A | None]]
Listener = TypeVar("Listener", bound=Callable[[dict[str, Any]], Coroutine[Any, Any, object]])
Event = TypeVar("Event", bound=Callable[[CallerInfo, Any], Coroutine[Any, Any, dict[str, Any] | Struct | None]])

def socket_server(**options: Any) -> Any: ...

class StartError(Exception): ...

class ChatError(Exception):
    code: str
    detail: str
    retry_after: float | None
    status: int
    reason: str | None
    field: str | None
    def __init__(
        self, code: {codes}, detail: str | None = None, retry_after: float | None = None, status: int | None = None, *,
        reason: str | None = None, field: str | None = None,
    ) -> None: ...
    def body(self) -> dict[str, Any]: ...

class CallerInfo(NamedTuple):
    user_id: int
    username: str
    name: str | None
    address: str

class FileContent:
    digest: bytes
    def parts(self, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]: ...

class Document(NamedTuple):
    name: str
    parts: AsyncIterator[bytes]

{structs}

class ChatRTC:
    settings: Settings
    sio: Any
    def __init__{init}: ...
    def on(self, event: {events}) -> Callable[[Listener], Listener]: ...
    def event(self, name: str) -> Callable[[Event], Event]: ...
    {methods}
'''
QUALIFIER = re.compile(r"\b(chatrtc|collections\.abc|msgspec|typing)\.")


def literal(names: Iterable[str]) -> str:
    return f"Literal[{', '.join(map(repr, names))}]"


def fields_text(kind: type[Struct]) -> list[str]:
    """Return the fields of a struct as they are declared."""
    required = {field.name: field.required for field in msgspec.structs.fields(kind)}
    hints = {name: inspect.formatannotation(hint) for name, hint in typing.get_type_hints(kind).items()}
    return [f"{name}: {hints[name]}{'' if required[name] else ' = ...'}" for name in required]


def method_stubs() -> Iterator[str]:
    """Yield the declarations of the methods of ChatRTC that are not in STUBS."""
    kinds: dict[type[Args], list[str]] = {}
    for op in OPERATIONS.values():
        kinds.setdefault(op.args, []).append(op.name)
    for kind, names in kinds.items():
        function = f"Before[{kind.__name__}]"
        yield f"@overload\n    def before(self, operation: {literal(names)}) -> Callable[[{function}], {function}]: ..."
    for name, method in vars(ChatRTC).items():
        if not inspect.isfunction(method) or name[0] == "_" or name in ("on", "event", "before"):
            continue
        start = f"{'async ' if inspect.iscoroutinefunction(method) else ''}def {name}"
        end = f'{inspect.signature(method, eval_str=True)}:\n        """{inspect.getdoc(method)}"""'
        either = "as_user: int | None = None, author_id: int | None = None"
        if name not in OPERATIONS or OPERATIONS[name].access is Access.ANYONE:
            yield start + end
        elif either in end:  # `author_id` is the older name of `as_user`
            yield f"@overload\n    {start}{end.replace(either, 'as_user: int')}"
            yield f"@overload\n    {start}{end.replace(either, 'author_id: int')}"
        else:
            yield start + end.replace("as_user: int | None = None", "as_user: int")


def stubs() -> str:
    """Return the types of the public names as a stub file."""
    names = component_schemas(kind for op in OPERATIONS.values() for kind in (op.args, op.result))
    kinds = [Settings, *(globals()[name] for name in names)]
    structs = ["\n    ".join([f"class {kind.__name__}(Struct, kw_only=True):", *fields_text(kind), "pass"]) for kind in kinds]
    settings = ", ".join(fields_text(Settings)).replace("tuple[str, ...]", "Sequence[str]")
    init = str(inspect.signature(ChatRTC.__init__, eval_str=True)).replace("**settings: Any", settings)
    texts = {"structs": "\n\n".join(structs), "init": init, "methods": "\n    ".join(method_stubs())}
    events = [name for name, kind in EVENTS.items() if kind.room != "socket"]
    text = STUBS.format(codes=literal(ERRORS), events=literal(events), **texts)
    return QUALIFIER.sub("", text).replace("NoneType", "None")


def get_build_hook() -> type[Any]:
    """Return the hook by which hatchling adds the stubs to a wheel."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # only to build a wheel

    class StubsHook(BuildHookInterface[Any]):
        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            self.stubs = Path(self.directory, "chatrtc.pyi")
            if version == "standard":
                self.stubs.write_text(sys.modules[__name__].stubs(), "utf-8")
                build_data["force_include"][str(self.stubs)] = "chatrtc-stubs/__init__.pyi"

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            self.stubs.unlink(missing_ok=True)

    return StubsHook


# ---- Command line --------------------------------------------------------------------------------------------------
# `chatrtc serve` and the other commands. A StartError or ChatError becomes one line on standard error, and exit status 1.

BAR: dict[str, Any] = {"file": sys.stderr, "hidden": not (sys.stderr and sys.stderr.isatty())}  # for progress bars
LOG_LINES = 60  # maximum for each level in a minute


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """Turn expected errors into one line on standard error."""
    try:
        yield
    except (StartError, ChatError) as error:
        raise click.ClickException(getattr(error, "detail", str(error))) from None
    except sqlite3.Error as error:
        raise click.ClickException(f"The database cannot be used: {error}") from None
    except (BrokenPipeError, click.exceptions.NoArgsIsHelpError):
        raise
    except OSError as error:
        place = "The current directory" if error.errno == errno.ENOENT else "Writing"
        raise click.ClickException(f"{error.filename or place}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.ClickException("Standard input is not valid UTF-8") from None
    except click.UsageError as error:
        click.echo(f"Error: {' '.join(error.format_message().split())}", err=True)
        raise click.exceptions.Exit(error.exit_code) from None


class Group(click.Group):
    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command whose options can also be set as CHATRTC_<OPTION> in the environment."""
        cmd.context_settings = {"auto_envvar_prefix": "CHATRTC", "show_default": True, **cmd.context_settings}
        for option in cmd.params:
            if isinstance(option, click.Option) and option.name != "yes":
                option.show_envvar = True
        super().add_command(cmd, name)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            stream = getattr(sys, name)
            if stream is None:  # it is closed, and the next file that is opened would get its number
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
            if isinstance(stream, io.TextIOWrapper):
                # Windows has another encoding for files and pipes. The name of a file need not be text.
                encoding = stream.encoding if stream.isatty() else "utf-8"
                errors = "strict" if mode == "r" else (stream.errors or "strict").replace("strict", "backslashreplace")
                stream.reconfigure(encoding=encoding, errors=errors)
        with cli_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        os.umask(0o077)
        with cli_errors():
            return super().invoke(ctx)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ChatRTC")
def main() -> None:
    """ChatRTC: a chat server in one file."""


def setting_options(*names: str) -> Callable[[Any], Any]:
    """Return a decorator that adds these settings, or all, to a command as options."""

    def decorate(command: Any) -> Any:
        for field in reversed(msgspec.structs.fields(Settings)):
            inner, meta = typing.get_args(field.type)[:2]
            shape: dict[str, Any] = {"is_flag": inner is bool, "multiple": typing.get_origin(inner) is tuple}
            if typing.get_origin(inner) is Literal:
                shape["type"] = click.Choice(typing.get_args(inner))
            if not names or field.name in names:
                flag = "--" + field.name.replace("_", "-")
                command = click.option(flag, field.name, default=field.default, help=meta.description, **shape)(command)
        return command

    return decorate


class LogRateFilter(logging.Filter):
    """Drops errors on malformed HTTP, which may quote a token, and limits the lines of each level per minute."""

    since, counts = -math.inf, Counter[int]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], aiohttp.http_exceptions.HttpProcessingError):
            return False
        if time.monotonic() - self.since > 60:
            self.since, self.counts = time.monotonic(), Counter()
        self.counts[record.levelno] += 1
        if self.counts[record.levelno] == LOG_LINES:
            record.msg, record.args, record.exc_info = "Log limit reached: further messages this minute are dropped", (), None
        return self.counts[record.levelno] <= LOG_LINES


def index_all(db: sqlite3.Connection) -> None:
    """Index all messages that are not in the search index, with a progress bar."""
    with click.progressbar(length=count_rows(db)[2], label="Indexing", **BAR) as bar:
        while (state := load_index_progress(db))[1] < state[0]:
            with db:
                run_jobs(db, [index_messages])
            bar.update(INDEX_STEP)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a database. Raises StartError if a server has it."""
    with Turn(path).hold(), contextlib.closing(FileLock(path)) as lock:
        if not lock.acquire():
            raise StartError(f"{path} is in use: stop the server first")
        yield


def is_older(path: Path) -> bool:
    """Return whether a database has an older format or is an empty file. Raises StartError."""
    header = read_sqlite_header(path)
    return 0 < int.from_bytes(header[60:64], "big") < SCHEMA_FORMAT if header else path.is_file()  # the user_version


def migrate_file(path: Path) -> None:
    """Migrate a database to the newest format if it has an older one. Raises StartError."""
    try:
        if is_older(path):
            with locked(path), contextlib.closing(check_and_open(path)) as db:
                index_all(db)
    except StartError:
        if is_older(path):  # otherwise another server has just migrated it
            raise


@main.command()
@setting_options()
def serve(**settings: Any) -> None:
    """Run the server until Ctrl-C or SIGTERM."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    log.setLevel(logging.INFO)  # for what admins and the command line do
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)  # it warns of each handshake that names a subprotocol
    for handler in logging.getLogger().handlers:
        handler.addFilter(LogRateFilter())
    migrate_file(Path(read_settings(settings).database))
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no limit, macOS a lower one of its own
        # The hard limit: a school behind one address may have 4,000 sockets.
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    uvloop = optional_import("uvloop")
    with asyncio.Runner(loop_factory=uvloop and uvloop.new_event_loop) as runner:
        runner.run(serve_until_stopped(settings))


@contextlib.contextmanager
def open_reader(database: str, *, any_format: bool = False) -> Iterator[sqlite3.Connection]:
    """Open a snapshot of the database, also while a server runs; otherwise the file is checked first. Raises StartError."""
    path = Path(database)
    if not path.is_file():
        raise StartError(f"There is no database {path}")
    read_sqlite_header(path)
    with contextlib.closing(Turn(path)) as turn, contextlib.closing(FileLock(path)) as lock:
        if turn.try_acquire() and lock.acquire():  # in the turn, so that a server that starts now waits for the lock
            check_openable(path)
    with snapshot(path) as db:
        if not any_format:
            require_newest(read_format(db), path)
        yield db


def run_admin_job(database: str, job: Callable[..., Result[Any]], *args: Any) -> Any:
    """Run a job on the database and return its value. Servers that have the database open apply it from the table `log`."""
    path = Path(database)
    if path.parent.is_dir() and not path.exists() and job is not add_user:
        raise StartError(f"There is no database {path}")
    read_sqlite_header(path)
    with Turn(path).hold(), contextlib.closing(FileLock(path)) as lock:
        alone = lock.acquire()
        with contextlib.closing(check_and_open(path, may_migrate=False) if alone else join_writers(path)) as db, db:
            outcome = run_jobs(db, [lambda db: job(db, *args)])[0]
            if isinstance(outcome, Result) and not alone:
                append_log(db, [*outcome.effects, LogLine(f"{job.__name__} on the command line for {args[0]!a}: done")])
    if isinstance(outcome, ChatError):
        raise outcome
    return outcome.value


user = Group("user", help="Manage accounts. Works while ChatRTC runs.")
server = Group("server", help="Manage servers (communities). Works while ChatRTC runs.")
main.add_command(user)
main.add_command(server)


def read_password_hash() -> str:
    """Return the hash of a password, typed twice or read from standard input. An argument would be visible to other users."""
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    read_args(NewPassword, {"new_password": password})
    return hash_password(password)


@user.command("add")
@click.argument("username")
@setting_options("database")
def user_add(username: str, database: str) -> None:
    """Create an account. Asks for the password, or reads it from standard input."""
    read_args(NewIdentity, {"username": username})
    click.echo(f"{username} has the id {run_admin_job(database, add_user, username, read_password_hash())}")


@user.command("list")
@setting_options("database")
def user_list(database: str) -> None:
    """List the accounts: id, username and creation time."""
    with open_reader(database) as db:
        for row in load_accounts(db):
            click.echo("{}\t{}\t{}".format(*row))


@user.command("password")
@click.argument("username")
@setting_options("database")
def user_password(username: str, database: str) -> None:
    """Set a new password. Signs the account out everywhere."""
    run_admin_job(database, set_password, username, read_password_hash())
    click.echo(f"{username} has a new password")


@user.command("delete")
@click.argument("username")
@click.option("--messages", is_flag=True, help="Also delete its messages.")
@setting_options("database")
@click.confirmation_option(
    prompt="Delete this account? Servers that it owns pass to other members. A server without other people is deleted."
)
def user_delete(username: str, messages: bool, database: str) -> None:
    """Delete an account. Its messages stay, under its name, unless you give --messages."""
    run_admin_job(database, delete_user, username, messages)
    click.echo(f"{username} is deleted")


@server.command("add")
@click.argument("name")
@click.option("--owner", required=True, metavar="USERNAME", help="The account that owns it.")
@setting_options("database")
def server_add(name: str, owner: str, database: str) -> None:
    """Create a server (a community) with the channel general."""
    click.echo(f"{name} has the id {run_admin_job(database, add_server, name, owner)}")


@main.command()
@click.argument("username")
@setting_options("database", "secret", "token_ttl")
def token(username: str, database: str, secret: str | None, token_ttl: int) -> None:
    """Print a token for an account, for scripts and demos."""
    read_settings({"database": database, "secret": secret, "token_ttl": token_ttl})
    with open_reader(database) as db:
        account = require_account(db, username)
    if secret is None:
        exists = os.path.lexists(private_path(Path(database), ".secret"))
        with contextlib.nullcontext() if exists else Turn(Path(database)).hold():  # a server that starts now creates it, too
            secret = load_or_create_secret(Path(database))
    click.echo(TokenSigner(secret, token_ttl).issue(account).token)


def copy_verified(db: sqlite3.Connection, dest: Path, finish: Callable[[sqlite3.Connection], None] | None = None) -> Path:
    """Copy a database next to `dest`, verify it, pass it to `finish`, return its path. Raises StartError, leaving no copy."""
    if not dest.parent.is_dir():
        raise StartError(f"The directory {dest.parent} does not exist")
    part = part_path(dest)
    with contextlib.ExitStack() as undo, click.progressbar(length=1, label="Copying", **BAR) as bar:
        undo.callback(part.unlink, missing_ok=True)  # also on Ctrl-C and SIGTERM

        def show(status: int, remaining: int, total: int) -> None:
            bar.length = total
            bar.update(total - remaining - bar.pos)

        try:
            copy_database(db, part, show)
            with contextlib.closing(connect_reader(part, immutable=True)) as copy:
                if errors := check_integrity(copy):
                    raise sqlite3.DatabaseError(errors[0])
            if finish is not None:
                with contextlib.closing(connect(part)) as copy:
                    finish(copy)
        except (OSError, sqlite3.Error) as error:
            raise StartError(f"Cannot write {dest}: {error}. The incomplete copy was deleted") from None
        undo.pop_all()
    return part


@main.command()
@click.argument("dest", type=click.Path(path_type=Path))
@setting_options("database")
def backup(dest: Path, database: str) -> None:
    """Back up the database to a new file DEST. Verifies the copy; works while the server runs."""
    handle_signals(signal.default_int_handler)  # it raises KeyboardInterrupt
    if dest.exists():
        raise StartError(f"{dest} already exists; it was not changed")
    with open_reader(database, any_format=True) as db:
        part = copy_verified(db, dest)
    os.replace(part, dest)
    sync_folder(dest.parent)
    click.echo(f"{dest} holds {dest.stat().st_size} bytes, verified")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@setting_options("database")
def restore(source: Path, database: str) -> None:
    """Replace the database with the backup SOURCE. Stop the server first. The old database is kept under another name."""
    handle_signals(signal.default_int_handler)
    path = Path(os.path.realpath(database))
    if not source.is_file():
        raise StartError(f"There is no backup {source}")
    if os.path.lexists(path) and not path.is_file():
        raise StartError(f"{path} is not a regular file")
    last_id = 0

    def renew(copy: sqlite3.Connection) -> None:
        migrate(copy)
        skip_ids(copy, last_id)
        index_all(copy)

    with locked(path):
        if not check_openable(source):
            raise StartError(f"{source} is empty: it is not a backup")
        with contextlib.suppress(StartError, sqlite3.Error), snapshot(path) as db:  # it may be missing or damaged
            last_id = highest_id(db)
        with snapshot(source) as db:
            part = copy_verified(db, path, renew)
        try:
            kept = replace_database(path, part)
        finally:
            part.unlink(missing_ok=True)
    click.echo(f"Restored {path} from {source}" + (f"; the old database is kept as {kept}" if kept else ""))


@main.command("migrate")
@setting_options("database")
def migrate_database(database: str) -> None:
    """Migrate the database to this version's format. This cannot be undone. Starting the server does the same."""
    if not Path(database).is_file():
        raise StartError(f"There is no database {database}")
    migrate_file(Path(database))
    with open_reader(database):  # refuses a database that cannot be migrated
        click.echo(f"{database} has format {SCHEMA_FORMAT}")


@main.command()
@setting_options("database")
def check(database: str) -> None:
    """Check the database and its references. The exit status is 1 if something is wrong."""
    with open_reader(database) as db:
        lines, counts = check_integrity(db), count_rows(db)
    for line in lines:
        click.echo(line)
    if lines:
        raise StartError(f"{database} has errors: {len(lines)}")
    click.echo("sound: {} users, {} servers, {} messages".format(*counts))


def export_file(db: sqlite3.Connection, file: File, folder: Path, advance: Callable[[int], None]) -> None:
    """Write a file into a folder, and call `advance` after each piece. Links in the folder are replaced, not followed."""
    part = folder / f"{file.file_id}.part"
    part.unlink(missing_ok=True)
    with part.open("xb") as output:
        for start in range(0, file.size, PIECE_BYTES):
            output.write(load_file_part(db, file.file_id, start, PIECE_BYTES))
            advance(1)
    os.replace(part, folder / export_name(file))


def write_html(db: sqlite3.Connection, servers: list[dict[str, Any]], output: typing.TextIO, folder: Path | None) -> None:
    """Write the messages of servers as one HTML file. It links to exported files, whose folder has to be next to it."""
    contents = [(server["name"], load_channels(db, server["server_id"])) for server in servers]
    # The name of a folder need not be text; that of the current one is empty.
    transcript = Transcript(contents, folder=urllib.parse.quote(os.fsencode(folder.name or ".")) if folder else None)
    with click.progressbar(length=count_rows(db)[2], label="Exporting", **BAR) as bar:
        while (part := transcript.read(db)) is not None:
            output.write(part)
            bar.update(transcript.count - bar.pos)


def export_records(db: sqlite3.Connection, servers: list[dict[str, Any]], folder: Path | None) -> Iterator[tuple[str, Any]]:
    """Yield each server with its members, its channels and their messages, oldest first, and before each its type. Write the
    files into the folder."""
    with click.progressbar(length=count_rows(db)[2] + (count_pieces(db) if folder else 0), label="Exporting", **BAR) as bar:
        for server in servers:
            yield "server", server
            yield from (("member", member) for member in load_members(db, server["server_id"], (), 0))
            yield from (("former", user) for user in load_former_members(db, server["server_id"]))
            for channel in load_channels(db, server["server_id"]):
                yield "channel", channel
                for message in load_channel_messages(db, channel.channel_id):
                    bar.update(1)
                    if folder is not None:
                        for file in message.files:
                            export_file(db, file, folder, bar.update)
                    yield "message", message


@main.command()
@click.option("--format", type=click.Choice(["jsonl", "html"]), default="jsonl", help="JSON objects, or one HTML file.")
@click.option("--server", type=int, help="Export only the server with this id.")
@click.option("--output", type=click.File("w", "utf-8"), default="-", help="File to write; - is standard output.")
@click.option(
    "--files", type=click.Path(file_okay=False, path_type=Path), help="Also write the files of messages into this folder."
)
@setting_options("database")
def export(format: str, server: int | None, output: typing.TextIO, files: Path | None, database: str) -> None:
    """Export one server or all, as JSON lines or as one HTML file."""
    target = Path(str(output.name))  # it is opened, which empties it, by the first `write`
    if target.is_file():
        with target.open("rb") as file:
            if file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC:
                raise StartError(f"{target} is a database; it was not changed")
    with open_reader(database) as db:
        chosen = [row for row in load_all_servers(db) if server in (None, row["server_id"])]
        if server is not None and not chosen:
            raise StartError(f"There is no server {server}")
        if files is not None:
            files.mkdir(exist_ok=True)
        records = export_records(db, chosen, files)
        if format == "html":
            deque(records if files else (), 0)  # writes the files
            write_html(db, chosen, output, files)
        else:
            lines = (json.dumps({"type": kind} | msgspec.to_builtins(record), ensure_ascii=False) for kind, record in records)
            output.writelines(line + "\n" for line in lines)
        output.flush()


if __name__ == "__main__":
    sys.modules.setdefault("chatrtc", sys.modules["__main__"])
    main(prog_name="chatrtc")
