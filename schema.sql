-- ChatRTC: everything a chat keeps, in one SQLite file.
--
-- Times are UTC text, YYYY-MM-DDTHH:MM:SSZ, as they go over the wire; they tell a person when, and never order anything.
-- Order is `seq`: every durable change in a server takes that server's next number, in the transaction that makes it.
-- Ids are AUTOINCREMENT, so that the id of a deleted thing never names another.

PRAGMA application_id = 1129468995;  -- "CRTC", by which a database of another program is refused

-- One row an account, for ever: a deleted account keeps its row (and its name), so that its messages keep their author.
CREATE TABLE users (
    user_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    username     TEXT NOT NULL,                    -- as its owner types it
    username_key TEXT NOT NULL UNIQUE,             -- NFKC and case-folded: what makes two names the same
    password     TEXT,                             -- scrypt$n$r$p$salt$hash; NULL: no password (a guest, or deleted)
    status       TEXT NOT NULL DEFAULT 'online' CHECK (status IN ('online', 'away', 'busy', 'invisible')),
    created_at   TEXT NOT NULL,
    generation   INTEGER NOT NULL DEFAULT 0,       -- of its tokens: one of an earlier generation does not stand
    deleted      INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    name         TEXT                              -- the display name; NULL: the username alone
) STRICT;

-- Tokens that were logged out, until they would have expired anyway.
CREATE TABLE revoked_tokens (
    digest     BLOB PRIMARY KEY,                   -- SHA-256 of the token: a leaked database gives nobody a token
    expires_at REAL NOT NULL                       -- Unix seconds
) STRICT, WITHOUT ROWID;

CREATE TABLE servers (
    server_id    INTEGER PRIMARY KEY AUTOINCREMENT,
    name         TEXT NOT NULL,
    created_at   TEXT NOT NULL,
    seq          INTEGER NOT NULL DEFAULT 0,       -- the last number given out
    channels_seq INTEGER NOT NULL DEFAULT 0,       -- ... to a change of its channels
    members_seq  INTEGER NOT NULL DEFAULT 0,       -- ... to a change of its members
    name_seq     INTEGER NOT NULL DEFAULT 0        -- ... to a change of its name
) STRICT;

CREATE TABLE members (
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    user_id   INTEGER NOT NULL REFERENCES users,
    role      TEXT NOT NULL CHECK (role IN ('owner', 'admin', 'member')),
    joined_at TEXT NOT NULL,
    invited_by TEXT,                               -- the code of the invite; NULL: the creator, or unknown
    read_from INTEGER NOT NULL DEFAULT 0,          -- the newest message when the member joined: none up to it is unread
    PRIMARY KEY (server_id, user_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user_id);
CREATE UNIQUE INDEX one_owner ON members (server_id) WHERE role = 'owner';

-- Everybody who was a member and is not one now: only they can be banned, and their names are still shown.
CREATE TABLE former_members (
    server_id  INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    user_id    INTEGER NOT NULL REFERENCES users,
    invited_by TEXT,
    PRIMARY KEY (server_id, user_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE bans (
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    user_id   INTEGER NOT NULL REFERENCES users,
    banned_by INTEGER NOT NULL REFERENCES users,
    banned_at TEXT NOT NULL,
    PRIMARY KEY (server_id, user_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE invites (
    code       TEXT PRIMARY KEY,                   -- ten characters with a dash; before version 2, 22 URL-safe ones
    server_id  INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    created_by INTEGER NOT NULL REFERENCES users,
    max_uses   INTEGER,                            -- NULL: no limit
    uses       INTEGER NOT NULL DEFAULT 0,
    expires_at TEXT,                               -- NULL: never
    CHECK (max_uses IS NULL OR uses <= max_uses)
) STRICT;
CREATE INDEX invites_by_server ON invites (server_id);

-- Sign-in codes for guests, each for one use.
CREATE TABLE links (
    digest     BLOB PRIMARY KEY,                   -- SHA-256 of the code
    user_id    INTEGER NOT NULL REFERENCES users,
    expires_at REAL NOT NULL                       -- Unix seconds
) STRICT, WITHOUT ROWID;

-- Where an account has signed in from: an attack from elsewhere does not lock it out there.
CREATE TABLE known_addresses (
    user_id INTEGER NOT NULL REFERENCES users,
    digest  BLOB NOT NULL,                         -- keyed hash of the address, which is not stored
    seen_at REAL NOT NULL,                         -- Unix seconds
    PRIMARY KEY (user_id, digest)
) STRICT, WITHOUT ROWID;

-- Messages of one author that are being deleted, in steps.
CREATE TABLE purges (
    purge_id   INTEGER PRIMARY KEY,
    server_id  INTEGER REFERENCES servers ON DELETE CASCADE,  -- NULL: in every server
    author_id  INTEGER NOT NULL REFERENCES users,
    last_id    INTEGER NOT NULL                    -- the newest message still to be looked at
) STRICT;

-- Sequence numbers that a restore skipped: a client that has one of them has seen changes that this database never had.
CREATE TABLE gaps (
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    after_seq INTEGER NOT NULL,                    -- the last number of the backup
    until_seq INTEGER NOT NULL,                    -- the number that the restore set
    PRIMARY KEY (server_id, after_seq)
) STRICT, WITHOUT ROWID;

-- A channel without a server is deleted: nobody finds it any more, and its messages go little by little, so that a channel of
-- a million holds up nobody.
CREATE TABLE channels (
    channel_id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id  INTEGER REFERENCES servers ON DELETE SET NULL,
    name       TEXT NOT NULL,
    name_key   TEXT NOT NULL,                      -- NFKC and case-folded, unique in its server
    kind       TEXT NOT NULL CHECK (kind IN ('text', 'voice')),
    topic      TEXT NOT NULL DEFAULT '',
    UNIQUE (server_id, name_key)
) STRICT;

-- A deleted message keeps its row without its text: catching up needs its number, and a retry of its nonce must not post it again.
CREATE TABLE messages (
    message_id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id  INTEGER NOT NULL,                   -- its channel's, here for the index on seq and for search
    channel_id INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
    author_id  INTEGER NOT NULL REFERENCES users,
    content    TEXT NOT NULL,
    created_at TEXT NOT NULL,
    edited_at  TEXT,
    reply_to   INTEGER,                            -- a message of the same channel
    nonce      TEXT,                               -- the author's own key, by which a repeat is known
    seq        INTEGER NOT NULL,                   -- of its last change
    extras     INTEGER NOT NULL DEFAULT 0 CHECK (extras IN (0, 1)),  -- 1: reactions or mentions may hang on it
    deleted    INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1))
) STRICT;
CREATE INDEX messages_page ON messages (channel_id, message_id, author_id) WHERE deleted = 0;
CREATE UNIQUE INDEX messages_changes ON messages (server_id, seq);
CREATE UNIQUE INDEX messages_nonce ON messages (author_id, channel_id, nonce) WHERE nonce IS NOT NULL;

CREATE TABLE reactions (
    message_id INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    emoji      TEXT NOT NULL,
    user_id    INTEGER NOT NULL REFERENCES users,
    PRIMARY KEY (message_id, emoji, user_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE mentions (
    message_id INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    user_id    INTEGER NOT NULL REFERENCES users,
    channel_id INTEGER NOT NULL,
    PRIMARY KEY (message_id, user_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX mentions_unread ON mentions (user_id, channel_id, message_id);

-- How far somebody has read a channel.
CREATE TABLE reads (
    user_id      INTEGER NOT NULL REFERENCES users,
    channel_id   INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
    last_read_id INTEGER NOT NULL,
    PRIMARY KEY (user_id, channel_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX reads_by_channel ON reads (channel_id);

-- Full-text search over the messages that are not deleted. It holds a normalized text (case and accents removed, scripts without
-- spaces split into characters), so the program computes what goes in and what comes out. The server's id is a word of its own,
-- so that a search walks that server alone. Indexing a message costs twice what storing it does, so it is done later, many at
-- once, up to `indexed_id`; a change of what is indexed already changes the index with it.
CREATE TABLE search (
    indexed_id INTEGER NOT NULL,
    stale      INTEGER NOT NULL DEFAULT 0          -- 1: deleted texts may still be in the index or in the -wal
) STRICT;
INSERT INTO search (indexed_id) VALUES (0);
CREATE VIRTUAL TABLE messages_fts USING fts5 (
    content, server_id, content = '', tokenize = "unicode61 remove_diacritics 2 categories 'L* M* N* Co'"
);
