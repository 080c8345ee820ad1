"""The conversations of `g3n chat` in one SQLite file, which its user alone may read.

The file is opened when there is something to read or write and closed again, so that several chats may write to it in
turn. It has a rollback journal: a write-ahead log needs memory that processes share, which a home on a network has not.
"""

import json
import os
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g3n_mlx.failures import BadValue, Error, FileProblem
from g3n_mlx.history.shown import Content, Entry, short, words

BUSY_S = 10.0  # how long one writer waits for another; a turn is written in milliseconds
APPLICATION_ID = 0x67336E68  # "g3nh", in the file's header
SCHEMA_VERSION = 1
# With AUTOINCREMENT no id is given twice: one that was removed never means another conversation.
SCHEMA = (
    """CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        system TEXT
    )""",
    """CREATE TABLE turns (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        question TEXT NOT NULL, -- JSON: what a message holds, text or a list of parts
        answer TEXT NOT NULL, -- likewise
        model TEXT NOT NULL,
        answered_at TEXT NOT NULL -- ISO 8601, UTC
    )""",
    "CREATE INDEX turns_of_conversation ON turns (conversation)",
)
PATH_LETTERS = 4096  # of a file's name, as systems have it
WAY_OUT = "move it away to begin anew (`sqlite3 FILE .recover` reads what is left of it), or chat with --no-history"


class Removed(Error):
    """The conversation to go on with is no longer in the history."""


class Elsewhere(Error):
    """The conversation to go on with has gone on, or back, in another chat."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer."""

    question: Content
    answer: Content
    model: str
    answered_at: str  # ISO 8601, UTC
    id: int = 0  # 0 before it is written


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was said in one conversation."""

    id: int
    system: str | None
    turns: Sequence[Turn]  # at least one

    @property
    def entry(self) -> Entry:
        first, last = self.turns[0], self.turns[-1]
        name = short(words(first.question))
        return Entry(self.id, name, len(self.turns), last.model, first.answered_at, last.answered_at)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """User and assistant in turn, without the system message."""
        return [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in (("user", turn.question), ("assistant", turn.answer))
        ]


def default_path() -> Path:
    """Where the chats of this user are kept."""
    import platformdirs

    return platformdirs.user_data_path("g3n_mlx", appauthor=False) / "history.db"


class History:
    """The kept conversations. Every method raises BadValue for a file that is damaged, of a newer version or of
    something else, and FileProblem (an OSError) for one that can't be read or written now.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = default_path() if path is None else path

    def check(self) -> None:
        """Raises an error where the file is there and can't be used."""
        with self._reading() as db:
            db.execute("SELECT * FROM turns ORDER BY id DESC LIMIT 1").fetchone()

    def entries(self) -> list[Entry]:
        """All conversations, the one that was spoken in last first."""
        query = """
            SELECT first.conversation, first.question, count, last.model, first.answered_at, last.answered_at
            FROM (SELECT min(id) AS begin, max(id) AS end, count(*) AS count FROM turns GROUP BY conversation)
            JOIN turns AS first ON first.id = begin
            JOIN turns AS last ON last.id = end
            ORDER BY end DESC"""
        with self._reading() as db:
            return [Entry(key, short(words(json.loads(asked))), *rest) for key, asked, *rest in db.execute(query)]

    def search(self, text: str) -> list[Entry]:
        """Those in which one turn has all words of a text, in letters of either case; the last one first."""
        wanted, found = text.casefold().split(), set[int]()
        with self._reading() as db:
            for key, *turn in db.execute("SELECT conversation, question, answer FROM turns"):
                said = "\n".join(words(json.loads(content)) for content in turn).casefold()
                if all(word in said for word in wanted):
                    found.add(key)
        return [entry for entry in self.entries() if entry.id in found]

    def last(self) -> Conversation:
        """The one that was spoken in last; raises ValueError when there is none."""
        with self._reading() as db:
            newest = db.execute("SELECT conversation FROM turns ORDER BY id DESC LIMIT 1").fetchone()
            conversation = None if newest is None else _conversation(db, newest[0])
        if conversation is None:
            raise BadValue(f"there is no conversation to go on with: {self.path} has none")
        return conversation

    def find(self, name: str) -> Conversation:
        """The one with this id, or else the one whose name has these words; raises ValueError for none or several."""
        key = int(name) if name.isascii() and name.isdigit() and len(name) < 19 else None
        if key is None:
            found = [entry for entry in self.entries() if name.casefold() in entry.name.casefold()]
            if len(found) > 1:
                ids = ", ".join(str(entry.id) for entry in found[:10])
                raise BadValue(f"the names of {len(found)} conversations have {short(name)!r}: take the id, of {ids}")
            key = found[0].id if found else 0
        with self._reading() as db:
            conversation = _conversation(db, key)
        if conversation is None:
            raise BadValue(
                f"there is no conversation {short(name)!r}: `g3n history` lists those that are kept, "
                "`g3n history search` looks into them"
            )
        return conversation

    def write(
        self, conversation: int | None, system: str | None, known: Sequence[int], keep: int, turns: Sequence[Turn]
    ) -> tuple[int, list[int]]:
        """Goes on with a conversation, or with None begins one, in one transaction; returns its id and the new turns'.

        known: ids of the turns that it had; keep: how many of them stay; turns: what follows these. Without any turn
        the conversation is removed. Raises Removed or Elsewhere, and changes nothing, where the conversation no longer
        has the known turns.
        """
        with self._writing() as db:
            if conversation is None:
                conversation = _inserted(db, "INSERT INTO conversations DEFAULT VALUES", ())
            elif not db.execute("SELECT 1 FROM conversations WHERE id = ?", (conversation,)).fetchone():
                raise Removed(f"conversation {conversation} is no longer there")
            rows = db.execute("SELECT id FROM turns WHERE conversation = ? ORDER BY id", (conversation,))
            if [key for (key,) in rows] != list(known):
                raise Elsewhere(f"conversation {conversation} was changed elsewhere")
            db.execute("UPDATE conversations SET system = ? WHERE id = ?", (system and _text(system), conversation))
            db.executemany("DELETE FROM turns WHERE id = ?", [(key,) for key in known[keep:]])
            insert = "INSERT INTO turns (conversation, question, answer, model, answered_at) VALUES (?, ?, ?, ?, ?)"
            rows = [(_json(turn.question), _json(turn.answer), _text(turn.model), turn.answered_at) for turn in turns]
            ids = [_inserted(db, insert, (conversation, *row)) for row in rows]
            if not keep and not ids:
                db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))
            return conversation, ids

    def remove(self, ids: Sequence[int]) -> None:
        """Removes conversations, and overwrites what they held."""
        with self._writing() as db:
            db.executemany("DELETE FROM conversations WHERE id = ?", [(key,) for key in ids])

    def clear(self) -> int:
        """Removes all, as `remove` does; returns how many there were."""
        if not self.path.exists():
            return 0
        with self._writing() as db:
            return db.execute("DELETE FROM conversations").rowcount

    @contextmanager
    def _reading(self) -> Generator[sqlite3.Connection]:
        with self._errors(), closing(self._to_read()) as db:
            yield db

    def _to_read(self) -> sqlite3.Connection:
        """Of no file, or of one whose tables another chat is about to create, an empty history."""
        if self.path.exists():
            db = self._connection()
            if self._version(db):
                return db
            db.close()
        empty = sqlite3.connect(":memory:")
        _create_tables(empty)
        return empty

    @contextmanager
    def _writing(self) -> Generator[sqlite3.Connection]:
        """A transaction, of which nothing is written when it raises."""
        with self._errors():
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives its journal beside it the same mode.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            with closing(self._connection()) as db:
                if not self.path.stat().st_size:
                    db.execute("PRAGMA auto_vacuum = FULL")  # the file shrinks with what it holds
                db.execute("PRAGMA secure_delete = ON")
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("BEGIN IMMEDIATE")
                try:
                    if self._version(db) == 0:
                        _create_tables(db)
                    yield db
                except BaseException:
                    if db.in_transaction:  # a full disk has ended it already
                        db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        # Mode rw falls back to reading where writing is not allowed; where it is, it can take back what a writer that
        # was killed had begun.
        uri = f"{self.path.absolute().as_uri()}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)

    def _version(self, db: sqlite3.Connection) -> int:
        """The version of the tables, 0 of an empty file; raises ValueError for a file of something else."""
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and (application or version or tables):
            raise BadValue(f"{self.path} is a database of something else; {WAY_OUT}")
        if version > SCHEMA_VERSION:
            raise BadValue(
                f"{self.path} was written by a newer g3n-mlx (version {version} of its tables, this one knows "
                f"{SCHEMA_VERSION}): upgrade g3n-mlx, or chat with --no-history"
            )
        return version

    @contextmanager
    def _errors(self) -> Generator[None]:
        """SQLite's and the system's errors as the package's own, with the file's name."""
        try:
            yield
        except Error:
            raise
        except (sqlite3.Error, OSError, ValueError) as error:
            # The last: a table or column that should be there is not.
            damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
            if isinstance(error, ValueError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in damage:
                raise BadValue(f"{self.path} is damaged ({error}); {WAY_OUT}") from error
            reason = error.strerror if isinstance(error, OSError) else error
            raise FileProblem(f"{self.path} can't be used: {reason}") from error


def without_bytes(content: Content) -> Content:
    """A message's content with the names of media alone: bytes within it, as of the clipboard, are left out."""
    if isinstance(content, str):
        return content
    return [part if isinstance(part, str) or part.get("type") == "text" else _names(part) for part in content]


def _names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _names(inner) for key, inner in value.items()}
    is_bytes = isinstance(value, str) and (value.startswith("data:") or len(value) > PATH_LETTERS)
    return "data:," if is_bytes else value


def _create_tables(db: sqlite3.Connection) -> None:
    for statement in SCHEMA:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _conversation(db: sqlite3.Connection, key: int) -> Conversation | None:
    rows = db.execute(
        "SELECT question, answer, model, answered_at, id FROM turns WHERE conversation = ? ORDER BY id", (key,)
    )
    turns = [Turn(json.loads(question), json.loads(answer), *rest) for question, answer, *rest in rows]
    if not turns:
        return None
    (system,) = db.execute("SELECT system FROM conversations WHERE id = ?", (key,)).fetchone()
    return Conversation(key, system, turns)


def _inserted(db: sqlite3.Connection, statement: str, values: Sequence[Any]) -> int:
    key = db.execute(statement, values).lastrowid
    assert key is not None
    return key


def _json(content: Content) -> str:
    return _text(json.dumps(without_bytes(content), ensure_ascii=False))


def _text(text: str) -> str:
    """A text that SQLite takes: the name of a file may be no Unicode, and what stands for its bytes is written out."""
    return text.encode("utf-8", "backslashreplace").decode()
