-- The database of ChatRTC, in its newest format. Older databases are migrated by MIGRATIONS in chatrtc.py.
--
-- Times are UTC text, YYYY-MM-DDTHH:MM:SSZ, as in the API. They are shown to people and never used for ordering.
-- The order is `seq`: each change in a server gets that server's next sequence number, in the transaction that makes the change.
-- Ids are AUTOINCREMENT, so that the id of a deleted row is never used again.

PRAGMA application_id = 1129468995;  -- "CRTC": marks the file as a database of ChatRTC

-- Accounts. A deleted account keeps its row and its name, so that its messages keep their author. `source` says who made it:
-- a person, the host (the program that embeds the chat) or, for a bot, an admin.
CREATE TABLE users (
    user_id      INTEGER PRIMARY KEY AUTOINCREMENT,
    username     TEXT NOT NULL,                    -- as the user typed it
    username_key TEXT NOT NULL UNIQUE,             -- normalized (NFKC, case folding): no two names are equal in this form
    password     TEXT,                             -- scrypt$n$r$p$salt$hash; NULL: no password (or deleted)
    status       TEXT NOT NULL DEFAULT 'online' CHECK (status IN ('online', 'away', 'busy', 'invisible')),
    created_at   TEXT NOT NULL,
    generation   INTEGER NOT NULL DEFAULT 0,       -- tokens of an earlier generation are revoked
    deleted      INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    name         TEXT,                             -- display name; NULL: the username is shown
    source       TEXT NOT NULL DEFAULT 'person' CHECK (source IN ('person', 'host', 'bot')),
    external_id  TEXT,                             -- the host's own id for an account of the host
    guest        INTEGER AS (password IS NULL AND source = 'person' AND deleted = 0)
) STRICT;
CREATE UNIQUE INDEX users_external ON users (external_id) WHERE external_id IS NOT NULL;

-- Tokens that were revoked by a logout. Rows are deleted once the token has expired.
CREATE TABLE revoked_tokens (
    digest     BLOB PRIMARY KEY,                   -- SHA-256 of the token, so that a leaked database contains no tokens
    expires_at REAL NOT NULL                       -- Unix seconds
) STRICT, WITHOUT ROWID;

-- Servers (communities) and the sequence numbers of their last changes.
CREATE TABLE servers (
    server_id    INTEGER PRIMARY KEY AUTOINCREMENT,
    name         TEXT NOT NULL,
    created_at   TEXT NOT NULL,
    seq          INTEGER NOT NULL DEFAULT 0,       -- the last sequence number that was assigned
    channels_seq INTEGER NOT NULL DEFAULT 0,       -- that of the last change of its channels
    members_seq  INTEGER NOT NULL DEFAULT 0,       -- that of the last change of its members
    name_seq     INTEGER NOT NULL DEFAULT 0,       -- that of the last change of its name
    kind         TEXT NOT NULL DEFAULT 'server' CHECK (kind IN ('server', 'direct')),  -- direct: a private conversation
    pair         TEXT,                             -- of a conversation of two: their ids, `lower-higher`; else NULL
    started_by   INTEGER REFERENCES users          -- who started the conversation; NULL: not a conversation
) STRICT;
CREATE UNIQUE INDEX one_conversation ON servers (pair) WHERE pair IS NOT NULL;
CREATE INDEX servers_by_starter ON servers (started_by) WHERE started_by IS NOT NULL;

CREATE TABLE members (
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    user_id   INTEGER NOT NULL REFERENCES users,
    role      TEXT NOT NULL CHECK (role IN ('owner', 'admin', 'member')),
    joined_at TEXT NOT NULL,
    invited_by TEXT,                               -- code of the invite; NULL: none (the creator), or unknown
    read_from INTEGER NOT NULL DEFAULT 0,          -- newest message when the member joined; messages up to it are not unread
    muted_until TEXT,                              -- NULL or a past time: not muted
    PRIMARY KEY (server_id, user_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_by_user ON members (user_id);
CREATE UNIQUE INDEX one_owner ON members (server_id) WHERE role = 'owner';

-- Users who left a server or were removed. They can still be banned, and their names are still shown. A mute that has not ended
-- applies again when they come back.
CREATE TABLE former_members (
    server_id  INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    user_id    INTEGER NOT NULL REFERENCES users,
    invited_by TEXT,
    muted_until TEXT,
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
    code       TEXT PRIMARY KEY,                   -- ten characters and a dash; codes of format 1 have 22 URL-safe characters
    server_id  INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    created_by INTEGER NOT NULL REFERENCES users,
    max_uses   INTEGER,                            -- NULL: no limit
    uses       INTEGER NOT NULL DEFAULT 0,
    expires_at TEXT,                               -- NULL: does not expire
    CHECK (max_uses IS NULL OR uses <= max_uses)
) STRICT;
CREATE INDEX invites_by_server ON invites (server_id);

-- Sign-in codes for guests. Each can be used once.
CREATE TABLE links (
    digest     BLOB PRIMARY KEY,                   -- SHA-256 of the code
    user_id    INTEGER NOT NULL REFERENCES users,
    expires_at REAL NOT NULL                       -- Unix seconds
) STRICT, WITHOUT ROWID;

-- Addresses from which an account has signed in. From these, it can sign in while attacks from other addresses are limited.
CREATE TABLE known_addresses (
    user_id INTEGER NOT NULL REFERENCES users,
    digest  BLOB NOT NULL,                         -- keyed hash of the address, which itself is not stored
    seen_at REAL NOT NULL,                         -- Unix seconds
    PRIMARY KEY (user_id, digest)
) STRICT, WITHOUT ROWID;

-- Deletions in progress, in steps: all messages of an author, or those of all authors in a channel.
CREATE TABLE purges (
    purge_id   INTEGER PRIMARY KEY,
    server_id  INTEGER REFERENCES servers ON DELETE CASCADE,  -- NULL: in all servers
    author_id  INTEGER REFERENCES users,           -- NULL: of all authors
    channel_id INTEGER REFERENCES channels ON DELETE CASCADE,  -- NULL: in all channels
    last_id    INTEGER NOT NULL,                   -- the newest message that is still to be processed
    CHECK ((author_id IS NULL) <> (channel_id IS NULL))
) STRICT;

-- The moderation log: actions of admins. Entries are kept for 90 days.
CREATE TABLE moderation (
    entry_id  INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    at        REAL NOT NULL,                       -- Unix seconds
    user_id   INTEGER NOT NULL REFERENCES users,   -- who did it
    action    TEXT NOT NULL,                       -- the word that the operation declares as `logged`
    target_id INTEGER REFERENCES users,            -- the member, or the author of the message
    detail    TEXT                                 -- the channel and the arguments, in a few words
) STRICT;
CREATE INDEX moderation_by_server ON moderation (server_id, entry_id);
CREATE INDEX moderation_by_time ON moderation (at);

-- Sequence numbers that a restore skipped. A client that has one of them has seen changes that this database never had.
CREATE TABLE gaps (
    server_id INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    after_seq INTEGER NOT NULL,                    -- the last sequence number of the backup
    until_seq INTEGER NOT NULL,                    -- the sequence number that the restore set
    PRIMARY KEY (server_id, after_seq)
) STRICT, WITHOUT ROWID;

-- A channel without a server is deleted. Its messages are then deleted in small steps, so that a million of them block nobody.
CREATE TABLE channels (
    channel_id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id  INTEGER REFERENCES servers ON DELETE SET NULL,
    name       TEXT NOT NULL,
    name_key   TEXT NOT NULL,                      -- normalized like username_key
    kind       TEXT NOT NULL CHECK (kind IN ('text', 'voice')),
    topic      TEXT NOT NULL DEFAULT '',
    posting    TEXT NOT NULL DEFAULT 'everyone' CHECK (posting IN ('everyone', 'staff')),
    slow_seconds INTEGER NOT NULL DEFAULT 0,       -- minimum time between two posts of a member
    keep_days  INTEGER,                            -- older messages are deleted; NULL: as --keep-days says
    UNIQUE (server_id, name_key)
) STRICT;

-- Incoming hooks: whoever has the secret of a hook posts in its channel, as its bot. A hook is deleted with its bot.
CREATE TABLE hooks (
    hook_id    INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id  INTEGER NOT NULL REFERENCES servers ON DELETE CASCADE,
    channel_id INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
    name       TEXT NOT NULL,
    user_id    INTEGER NOT NULL UNIQUE REFERENCES users,  -- the bot
    secret     BLOB NOT NULL UNIQUE,               -- its SHA-256, so that a leaked database contains no secrets
    created_at TEXT NOT NULL
) STRICT;
CREATE INDEX hooks_by_server ON hooks (server_id);
CREATE INDEX hooks_by_channel ON hooks (channel_id);

-- A deleted message keeps its row, without its text: clients that were away need its seq, and its nonce must not post it again.
CREATE TABLE messages (
    message_id INTEGER PRIMARY KEY AUTOINCREMENT,
    server_id  INTEGER NOT NULL,                   -- copied from its channel, for the index on seq and for search
    channel_id INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
    author_id  INTEGER NOT NULL REFERENCES users,
    content    TEXT NOT NULL,
    created_at TEXT NOT NULL,
    edited_at  TEXT,
    reply_to   INTEGER,                            -- a message of the same channel
    nonce      TEXT,                               -- chosen by the client, so that a repeated post is recognized
    seq        INTEGER NOT NULL,                   -- sequence number of its last change
    extras     INTEGER NOT NULL DEFAULT 0 CHECK (extras IN (0, 1)),  -- 1: it may have reactions, mentions, files or a pin
    deleted    INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    everyone   INTEGER NOT NULL DEFAULT 0 CHECK (everyone IN (0, 1)), -- 1: it mentions all members, by @everyone
    author_name TEXT                               -- of a post by a hook: the name that it gave; NULL: that of the author
) STRICT;
CREATE INDEX messages_page ON messages (channel_id, message_id, author_id) WHERE deleted = 0;
CREATE INDEX messages_everyone ON messages (channel_id, message_id, author_id) WHERE everyone = 1;
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

CREATE TABLE pins (
    pin_id     INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order: the latest pin has the highest
    channel_id INTEGER NOT NULL,
    message_id INTEGER NOT NULL UNIQUE REFERENCES messages ON DELETE CASCADE
) STRICT;
CREATE INDEX pins_by_channel ON pins (channel_id, pin_id);

-- Files. The bytes are in `pieces`. A file is complete once it has a digest. When it is posted, it belongs to one message. A file
-- without a channel is deleted: its pieces are removed in small steps. Files that belong to no message are deleted an hour after
-- the upload.
CREATE TABLE files (
    file_id     INTEGER PRIMARY KEY AUTOINCREMENT,
    channel_id  INTEGER REFERENCES channels ON DELETE SET NULL,
    uploader_id INTEGER NOT NULL REFERENCES users,
    uploaded_at REAL NOT NULL,                     -- Unix seconds
    name        TEXT NOT NULL,
    type        TEXT NOT NULL,                     -- media type, found from the content
    size        INTEGER NOT NULL,                  -- bytes
    width       INTEGER,                           -- of a picture or video, in pixels
    height      INTEGER,
    alt         TEXT,                              -- describes it to people who do not see it
    digest      BLOB,                              -- SHA-256 of the bytes; NULL: still being uploaded
    message_id  INTEGER REFERENCES messages ON DELETE SET NULL,
    place       INTEGER NOT NULL DEFAULT 0         -- position among the files of its message
) STRICT;
CREATE INDEX files_by_message ON files (message_id) WHERE message_id IS NOT NULL;
CREATE INDEX files_unattached ON files (uploader_id) WHERE message_id IS NULL;
CREATE INDEX files_by_channel ON files (channel_id);

CREATE TABLE pieces (
    file_id INTEGER NOT NULL REFERENCES files,
    number  INTEGER NOT NULL,                      -- from 0
    data    BLOB NOT NULL,                         -- 256 KiB; less in the last piece
    PRIMARY KEY (file_id, number)
) STRICT;

-- One row: the bytes in `pieces`.
CREATE TABLE stored (
    bytes INTEGER NOT NULL
) STRICT;
INSERT INTO stored (bytes) VALUES (0);

-- Read marks: the newest message that a user has read in a channel, and when the user last posted there, for slow mode.
CREATE TABLE reads (
    user_id      INTEGER NOT NULL REFERENCES users,
    channel_id   INTEGER NOT NULL REFERENCES channels ON DELETE CASCADE,
    last_read_id INTEGER NOT NULL,
    posted_at    REAL,                             -- Unix seconds; NULL: no post since the migration to format 4
    PRIMARY KEY (user_id, channel_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX reads_by_channel ON reads (channel_id);

-- Full-text search over the messages that are not deleted. The program computes the indexed text, because it is normalized (without
-- case and accents, scripts without spaces split into characters). The server's id is indexed as a word, so that a search reads
-- the entries of one server only. Indexing a message costs twice as much as storing it. New messages are therefore indexed later,
-- many at once, up to `indexed_id`; a change of a message that is already indexed updates the index at once.
CREATE TABLE search (
    indexed_id INTEGER NOT NULL,
    stale      INTEGER NOT NULL DEFAULT 0          -- deleted texts may be 1: in the index or the -wal, 2: in the -wal only
) STRICT;
INSERT INTO search (indexed_id) VALUES (0);
CREATE VIRTUAL TABLE messages_fts USING fts5 (
    content, server_id, content = '', tokenize = "unicode61 remove_diacritics 2 categories 'L* M* N* Co'"
);
-- With 4, the default, deleting 50 messages can cause a merge of 0.2 s.
INSERT INTO messages_fts (messages_fts, rank) VALUES ('automerge', 8);

-- The commit log, for other processes: each row has the effects of one recent commit, as JSON. Commands and servers that share
-- the database (--redis) add rows. Each server applies the rows of others in the order of their ids.
CREATE TABLE log (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    written_at REAL NOT NULL,                      -- Unix seconds
    bytes      INTEGER NOT NULL,                   -- total size of the effects up to this row
    effects    BLOB NOT NULL
) STRICT;

-- One row: a keyed hash by which servers that share the database recognize that they have the same secret.
CREATE TABLE secret_check (
    digest BLOB NOT NULL
) STRICT;
