"""The landing: immutable Parquet parts, written atomically, durable once written.

Each table of the landing is a directory of parts, and a part appears whole or not at all. Every row
has a ``row_id``, a UUID of version 7 (RFC 9562), and so is a part's name. They order the rows of a
key, and the last is in force. Who writes after having read gets greater ones than all that were
read, whatever the clocks of the hosts say (a hybrid logical clock: Kulkarni et al., "Logical
Physical Clocks", OPODIS 2014).

Compaction merges several parts into one, whose footer names the parts it supersedes. Superseded
parts are not read any more, deleted or not, so the rows move at the one rename that makes the
merged part appear.
"""

import json
import logging
import math
import os
import secrets
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from audio_assets.features.base import Column
from audio_assets.library.files import fsync_folder
from audio_assets.library.text import masked
from audio_assets.warehouse.part_names import MERGED, NAME, PART, written_at
from audio_assets.warehouse.schema import ROW_ID, Table, arrow_schema, in_memory, quoted

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TEMPORARY = ".tmp"
_SUPERSEDES = b"supersedes"
_ABANDONED_AFTER_S = 3600.0
_LISTING_TRIES = 20
_CLOCK_TOLERANCE_S = 60.0

# Parts of one size class, a factor of _FAN_IN wide, are merged once there are that many: each row
# is rewritten once per class, and a class never holds more than _FAN_IN parts for long.
_FAN_IN = 8
_SMALLEST_TIER_BYTES = 4096
_LARGEST_PART_BYTES = 64 * 2**20

# Of small parts, which are many until they are merged, the columns that decide which row is in
# force are kept in memory: up to 64 MiB.
_SMALL_BYTES = 2**17
_MOST_KEPT = 512


class LandingError(Exception):
    """The landing does not exist, or refuses access: only a person can correct that.

    Parameters
    ----------
    url : str
        The landing.
    reason : str
        The storage's error.
    """

    error_type = "permission"
    """For the error classifier: another attempt would fail as well."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            masked(
                f"the landing {url} cannot be used: {reason.rstrip('.')}; correct AUDIO_LANDING, "
                "or the permissions or credentials"
            )
        )


class CorruptPartError(Exception):
    """A part of the landing cannot be read, or is not one of its table.

    Parameters
    ----------
    part : str
        The part, with its table.
    reason : str
        The Parquet reader's error, or what does not fit.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"the landing's part {part} is damaged: {reason}")
        self.part = part


class PartVanishedError(Exception):
    """A part was superseded and deleted after it was listed."""


@dataclass(frozen=True)
class Part:
    """Rows and the name of the part that holds them, written or not."""

    table: str
    name: str
    rows: pa.Table


class _RowIds:
    """UUIDs of version 7, each greater than all before it (RFC 9562, 6.2, method 3)."""

    def __init__(self) -> None:
        self._last = 0
        self._lock = threading.Lock()
        self._has_warned = False

    def next(self) -> UUID:
        """Return the next identifier: 48 bits of ms, 12 bits of its fraction, 62 random bits."""
        with self._lock:
            self._last = stamp = max(_clock(), self._last + 1)
        value = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64
        return UUID(int=value | 0b10 << 62 | secrets.randbits(62))

    def see(self, part: str) -> None:
        """Make all further identifiers greater than a part's; warn if the clock is behind it."""
        value = UUID(part.partition(".")[0]).int
        stamp = (value >> 80) << 12 | (value >> 64) & 0xFFF
        with self._lock:
            self._last = max(self._last, stamp)
        behind_s = ((stamp - _clock()) >> 12) / 1000
        if behind_s > _CLOCK_TOLERANCE_S and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The clock is %.0f s behind the newest part of the landing, of %s. Later results "
                "still replace earlier ones, but the times recorded with them are wrong",
                behind_s,
                written_at(part).isoformat(" ", "seconds"),
            )


def _clock() -> int:
    """Return the time since the epoch in ms, times 4096."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    return (milliseconds << 12) | (rest * 4096 // 1_000_000)


_row_ids = _RowIds()


class Landing:
    """Append-only tables of Parquet parts in a directory or an object store.

    Parameters
    ----------
    root_url : str
        Local path or fsspec URL (``s3://bucket/prefix``). A local part is written under a
        temporary name, fsynced and renamed; on an object store it is put in one atomic request.
    tables : iterable of Table
        The tables, see `schema.warehouse_tables`.
    """

    def __init__(self, root_url: str, tables: Iterable[Table]) -> None:
        self._url = root_url
        self._tables = {table.landing_name: table for table in tables if table.columns}
        self._superseded: dict[str, dict[str, frozenset[str]]] = {}
        """What the listed parts of each table were merged from."""
        self._small: OrderedDict[tuple[str, str, tuple[str, ...]], pa.Table] = OrderedDict()

    @property
    def is_local(self) -> bool:
        """Whether the parts are in a local file system."""
        return isinstance(self._fs, LocalFileSystem)

    def append(self, table: str, rows: Sequence[Mapping[str, Any]]) -> str:
        """Write rows as one part; they are durable when this returns.

        Parameters and errors are those of `prepare` and `save`.

        Returns
        -------
        str
            Name of the part.
        """
        part = self.prepare(table, rows)
        self.save(part)
        return part.name

    def prepare(self, table: str, rows: Sequence[Mapping[str, Any]]) -> Part:
        """Make a part of rows for `save`; saving it twice adds nothing.

        Parameters
        ----------
        table : str
            Table, for instance ``features/rhythm``.
        rows : sequence of mapping
            Values by column name; a column left out is NULL.

        Raises
        ------
        KeyError
            If there is no such table.
        ValueError
            If there are no rows, or a row has a column that the table does not.
        pyarrow.ArrowInvalid, pyarrow.ArrowTypeError
            If a value does not fit its column.
        """
        schema = arrow_schema(self._tables[table].columns)
        if not rows:
            raise ValueError(f"no rows to append to {table}")
        unknown = sorted(set().union(*rows) - set(schema.names))
        if unknown:
            raise ValueError(f"table {table} has no columns {unknown}")
        part = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        ids = pa.array([_row_ids.next().bytes for _ in rows], pa.uuid())
        name = f"{_row_ids.next()}{PART}"
        return Part(table, name, part.append_column(ROW_ID, ids))

    def save(self, part: Part) -> None:
        """Write a part; its rows are durable when this returns.

        Raises
        ------
        OSError
            If the part was not written, or perhaps not. Object stores raise other classes as
            well.
        LandingError
            If the landing does not exist, or refuses access.
        """
        with self._usable():
            self._write(part.table, part.name, part.rows)

    def parts(self, table: str) -> list[str]:
        """Return the names of the parts that hold a table's rows, oldest first."""
        return self._consistent(lambda: self._live(table))

    def read_part(self, table: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of one part, with the columns it was written with.

        Columns of the table have its types; a value is NULL if it does not fit its column's.

        Parameters
        ----------
        table, name : str
            The table and the part.
        columns : sequence of str, optional
            Columns to read besides `ROW_ID`; those that the part does not have are left out.
            Default: all.

        Raises
        ------
        PartVanishedError
            If the part has been superseded and deleted.
        CorruptPartError
            If the part is damaged, or does not fit the table.
        """
        with self._opened(table, name) as file:
            present = file.schema_arrow.names
            wanted = columns and [
                name for name in dict.fromkeys([*columns, ROW_ID]) if name in present
            ]
            rows = file.read(columns=wanted).replace_schema_metadata(None)
            for column in {ROW_ID, *self._tables[table].key} & {*rows.column_names}:
                if rows[column].null_count:
                    raise ValueError(f"a row has no {column}")
            return _fitted(rows, self._tables[table].columns)

    def latest(
        self,
        table: str,
        columns: Collection[str] | None = None,
        where: tuple[str, Collection[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the latest row of each key.

        A damaged part is logged and left out.

        Parameters
        ----------
        table : str
            The table.
        columns : collection of str, optional
            Columns to read. Default: all.
        where : (str, collection of str), optional
            A column, and the values of it to which the latest rows are limited.

        Returns
        -------
        list of dict
            Values by column name, as for `append`.
        """
        definition = self._tables[table]
        schema = arrow_schema(definition.columns).append(pa.field(ROW_ID, pa.uuid()))
        wanted = list(columns or (column.name for column in definition.columns))
        deciding = (*definition.key, *([where[0]] if where else []))

        def latest_rows() -> list[dict[str, Any]]:
            parts: list[str] = []
            keys: list[pa.Table] = []
            for name in self._live(table):
                with self._left_out_if_damaged():
                    rows = self._read_deciding(table, name, deciding)
                    keys.append(_with_position(rows, len(parts)))
                    parts.append(name)
            if not keys:
                return []
            written = pa.concat_tables(keys, promote_options="permissive")
            if where:
                asked = pa.array(list(where[1]), written.schema.field(where[0]).type)
                if not pc.any(pc.is_in(written[where[0]], asked)).as_py():
                    return []  # as of new files, without a query
            found = _latest_places(written, definition, where)
            chosen = [schema.empty_table().select([*wanted, ROW_ID])]
            for number, positions in found.items():
                with self._left_out_if_damaged():
                    chosen.append(self.read_part(table, parts[number], wanted).take(positions))
            selected = pa.concat_tables(chosen, promote_options="permissive").select(wanted)
            found_rows: list[dict[str, Any]] = selected.to_pylist(maps_as_pydicts="strict")
            return found_rows

        return self._consistent(latest_rows)

    def _read_deciding(self, table: str, name: str, columns: tuple[str, ...]) -> pa.Table:
        """Return columns of a part, as `read_part` does; those of small parts are kept."""
        rows = self._small.get((table, name, columns))
        if rows is None:
            rows = self.read_part(table, name, columns)
            if rows.nbytes <= _SMALL_BYTES:
                self._small[table, name, columns] = rows
            if len(self._small) > _MOST_KEPT:
                self._small.popitem(last=False)
        return rows

    @contextmanager
    def _left_out_if_damaged(self) -> Iterator[None]:
        """Leave a damaged part out, as its cells can be computed again."""
        try:
            yield
        except CorruptPartError as error:
            logger.error("%s; its rows are left out", error)

    def supersedes(self, table: str, name: str) -> frozenset[str]:
        """Return the names of the parts that a part was merged from.

        Raises
        ------
        PartVanishedError
            If the part has been superseded and deleted.
        CorruptPartError
            If the part is damaged.
        """
        if not name.endswith(MERGED):
            return frozenset()
        sources = self._superseded.get(table, {}).get(name)
        if sources is None:
            with self._opened(table, name) as file:
                sources = _sources(file)
        return sources

    def compact(self, table: str, only: Collection[str] | None = None) -> list[str]:
        """Merge parts of similar size, so that their number grows with the logarithm of the rows.

        Readers and writers need not stop, and a crash at any point neither loses nor duplicates
        rows. One process compacts at a time: locally by a lock, on an object store the caller must
        see that no other does.

        Parameters
        ----------
        table : str
            The table.
        only : collection of str, optional
            Parts that may be merged. Default: all.

        Returns
        -------
        list of str
            Names of the merged parts written.
        """
        with self._compacting(table) as alone:
            if not alone:
                return []
            # A superseded part must be deleted before the part that supersedes it is superseded
            # itself. Parts written from here on are not listed, and so are left alone.
            listed = self._list(table)
            live = self.parts(table)
            self._delete(table, listed - set(live))
            self._delete_abandoned(table)
            candidates = [name for name in live if only is None or name in only]
            return [
                self._merge(table, schema, names)
                for names in self._similar_in_size(table, candidates)
                for schema, names in self._by_schema(table, names).items()
                if len(names) > 1
            ]

    def _consistent(self, read: Callable[[], T]) -> T:
        """Repeat a read until no compaction deletes parts during it."""
        for _ in range(_LISTING_TRIES):
            try:
                return read()
            except PartVanishedError as error:
                vanished = error
        raise vanished

    def _live(self, table: str) -> list[str]:
        # A listing is not a snapshot: it may miss both a part that appears meanwhile and another
        # that is deleted. Parts are deleted only after the one that supersedes them has appeared,
        # so if the first listing misses deleted parts, the second has the part merged from them.
        listed = self._list(table) | self._list(table)
        superseded: dict[str, frozenset[str]] = {}
        for name in listed:
            try:
                superseded[name] = self.supersedes(table, name)
            except CorruptPartError:
                # The parts it was merged from may still exist; reading it raises the error.
                logger.exception("%s/%s cannot be read", table, name)
        self._superseded[table] = superseded  # forgets parts that are gone
        return sorted(listed.difference(*superseded.values()))

    def _list(self, table: str) -> set[str]:
        self._fs.invalidate_cache()
        paths: list[str] = []
        with self._usable(), suppress(FileNotFoundError):
            paths = self._fs.ls(self._path(table), detail=False)
        names = (path.rsplit("/", 1)[-1] for path in paths)
        parts = {name for name in names if name.endswith(PART) and not name.startswith(".")}
        if own := list(filter(NAME.fullmatch, parts)):
            _row_ids.see(max(own))
        return parts

    @cached_property
    def _place(self) -> tuple[AbstractFileSystem, str]:
        """The file system, and the path in it; some connect to their server for that."""
        try:
            found: tuple[AbstractFileSystem, str] = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise LandingError(self._url, str(error)) from error
        return found

    @property
    def _fs(self) -> AbstractFileSystem:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    def _path(self, table: str, name: str = "") -> str:
        return "/".join(filter(None, (self._root.rstrip("/"), table, name)))

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Raise a LandingError where a bucket is missing, or credentials are or are refused."""
        try:
            yield
        except Exception as error:
            refused = isinstance(error, FileNotFoundError | PermissionError)
            if refused or "Credential" in type(error).__name__:
                raise LandingError(self._url, str(error)) from error
            raise

    @contextmanager
    def _opened(self, table: str, name: str) -> Iterator[pq.ParquetFile]:
        """Open and check a part; whatever its reader raises is a CorruptPartError."""
        try:
            if not NAME.fullmatch(name):
                raise ValueError("its name is not a UUID of version 7")
            with pq.ParquetFile(
                self._path(table, name), filesystem=self._fs, page_checksum_verification=True
            ) as file:
                _check_columns(file.schema_arrow, self._tables[table])
                if name.endswith(MERGED):
                    _sources(file)
                yield file
        except FileNotFoundError as error:
            raise PartVanishedError(f"{table}/{name}") from error
        except Exception as error:
            if _is_of_storage(error):
                raise
            raise CorruptPartError(f"{table}/{name}", str(error)) from error

    def _write(self, table: str, name: str, rows: pa.Table) -> None:
        buffer = BytesIO()
        pq.write_table(rows, buffer, compression="zstd", write_page_checksum=True)
        if not self.is_local:
            self._fs.pipe_file(self._path(table, name), buffer.getvalue())
            return
        folder = Path(self._path(table))
        _make_durable_folder(folder)
        temporary = folder / f".{name}{_TEMPORARY}"
        try:
            with temporary.open("xb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(folder / name)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(folder)  # errors of writing do not name the file
            raise
        fsync_folder(folder)

    def _similar_in_size(self, table: str, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield groups of parts to merge: many of one size class, together not too large."""
        tiers: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name in names:
            size = self._fs.size(self._path(table, name))
            tier = int(math.log(max(size, _SMALLEST_TIER_BYTES) / _SMALLEST_TIER_BYTES, _FAN_IN))
            tiers[tier].append((name, size))
        for sized in tiers.values():
            group: list[str] = []
            total = 0
            for name, size in sized:
                group.append(name)
                total += size
                if total >= _LARGEST_PART_BYTES:
                    yield group
                    group, total = [], 0
            if len(group) >= _FAN_IN:
                yield group

    def _by_schema(self, table: str, names: Sequence[str]) -> dict[pa.Schema, list[str]]:
        grouped: dict[pa.Schema, list[str]] = defaultdict(list)
        for name in names:
            with self._left_out_if_damaged(), self._opened(table, name) as file:
                grouped[file.schema_arrow.remove_metadata()].append(name)
        return grouped

    def _merge(self, table: str, schema: pa.Schema, names: Sequence[str]) -> str:
        parts = []
        for name in names:
            with self._opened(table, name) as file:
                parts.append(file.read().replace_schema_metadata(None).cast(schema))
        rows = pa.concat_tables(parts)
        merged = f"{_row_ids.next()}{MERGED}"
        footer = {_SUPERSEDES: json.dumps(names).encode()}
        self._write(table, merged, rows.replace_schema_metadata(footer))
        self._delete(table, names)
        return merged

    def _delete(self, table: str, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(table, name))

    def _delete_abandoned(self, table: str) -> None:
        """Delete temporary files of killed writers, once they are too old to be in use."""
        if self.is_local:
            for path in Path(self._path(table)).glob(f".*{_TEMPORARY}"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                        path.unlink()

    @contextmanager
    def _compacting(self, table: str) -> Iterator[bool]:
        folder = Path(self._path(table))
        if not self.is_local or not folder.exists():
            yield True
            return
        try:
            with FileLock(folder / ".compacting.lock", blocking=False):
                yield True
        except Timeout:
            yield False


def _is_of_storage(error: Exception) -> bool:
    """Return whether an error is one of the file system or object store, not of the reader.

    The reader raises errors of Python, of its libraries, and a plain OSError without errno. The
    operating system's errors have one; those of object stores are subclasses, or of their package.
    """
    if isinstance(error, OSError):
        return type(error) is not OSError or error.errno is not None
    package = type(error).__module__.partition(".")[0]
    return package not in ("builtins", "json", "pyarrow", "duckdb", "_duckdb")


def _check_columns(schema: pa.Schema, table: Table) -> None:
    """Raise ValueError if a part has no key or row identifiers, or its types are others."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("it has two columns of one name")
    right = arrow_schema(table.columns).append(pa.field(ROW_ID, pa.uuid()))
    for name, kind in zip(right.names, right.types, strict=True):
        if name not in schema.names:
            if name in (ROW_ID, *table.key):
                raise ValueError(f"it has no column {name}")
        elif _family(schema.field(name).type) != _family(kind):
            raise ValueError(f"its column {name} is {schema.field(name).type}, not {kind}")


def _family(kind: pa.DataType) -> str:
    """Return the same text for types of which one can be cast to the other."""
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"list of {_family(kind.value_type)}"
    if pa.types.is_map(kind):
        return f"map from {_family(kind.key_type)} to {_family(kind.item_type)}"
    if pa.types.is_temporal(kind):
        return "time"
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return "number" if is_number else str(kind)


def _sources(file: pq.ParquetFile) -> frozenset[str]:
    """Return the names of the parts that a part was merged from."""
    names = json.loads((file.metadata.metadata or {}).get(_SUPERSEDES, "null"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its footer does not name the parts that it was merged from")
    return frozenset(names)


def _fitted(rows: pa.Table, columns: Iterable[Column]) -> pa.Table:
    """Return rows with the types of a table's columns; a value is NULL if it does not fit."""
    right = arrow_schema(tuple(columns))
    wrong = [
        column
        for column in columns
        if column.name in rows.column_names
        and rows.schema.field(column.name).type != right.field(column.name).type
    ]
    if not wrong:
        return rows
    selected = ", ".join(f"TRY_CAST({quoted(c.name)} AS {c.type})" for c in wrong)
    with in_memory() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("part_rows", rows.select([column.name for column in wrong]))
        cast = connection.sql(f"SELECT {selected} FROM part_rows").to_arrow_table()
    for column, values in zip(wrong, cast.columns, strict=True):
        place = rows.schema.get_field_index(column.name)
        rows = rows.set_column(place, column.name, values)
    return rows


def _with_position(rows: pa.Table, part: int) -> pa.Table:
    """Add two columns: the number of the rows' part, and each row's place in it."""
    rows = rows.append_column("part", pa.repeat(pa.scalar(part, pa.int32()), rows.num_rows))
    return rows.append_column("place", pa.array(range(rows.num_rows), pa.int64()))


def _latest_places(
    rows: pa.Table, table: Table, where: tuple[str, Collection[str]] | None
) -> dict[int, list[int]]:
    """Return the places of the latest row of each key, by part."""
    key = ", ".join(map(quoted, table.key))
    with in_memory() as connection:
        connection.register("written", rows)
        found = connection.execute(
            f"""
            SELECT part, list(place ORDER BY place) FROM (
                SELECT * FROM written
                QUALIFY row_number() OVER (
                    PARTITION BY {key} ORDER BY {ROW_ID} DESC
                ) = 1
            )
            WHERE {f"list_contains(?, {quoted(where[0])})" if where else "true"}
            GROUP BY part ORDER BY part
            """,
            [list(where[1])] if where else [],
        ).fetchall()
    return dict(found)


def _make_durable_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_durable_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)
