"""The landing: immutable Parquet parts, written atomically, durable once written.

Each table of the landing is a folder of parts. A part is never changed: its name sorts by the
time it was made, and it appears whole or not at all. Every row carries a ``row_id`` of its own
(a UUID of version 7, RFC 9562), by which the same row is known again wherever it turns up.

Compaction writes the rows of several parts into one, which names in its footer the parts it
supersedes. A part named so by another is not read any more, whether or not it has been deleted
yet, so that the one rename that makes the merged part appear is the moment the rows move.
"""

import json
import logging
import math
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem

from audio_assets.warehouse.schema import Table, arrow_schema, quoted

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROW_ID = "row_id"
"""Column of every landed row: its UUID, ordered by the time it landed."""

_PART = ".parquet"
_MERGED = ".merged.parquet"
_TEMPORARY = ".tmp"
_SUPERSEDES = b"supersedes"
_ABANDONED_AFTER_S = 3600.0
_LISTING_TRIES = 20

# Parts of one size class, a factor of _FAN_IN wide, are merged once there are that many: each row
# is rewritten once per class, and a class never holds more than _FAN_IN parts for long.
_FAN_IN = 8
_SMALLEST_TIER_BYTES = 4096
_LARGEST_PART_BYTES = 64 * 2**20


class CorruptPartError(Exception):
    """A part of the landing cannot be read.

    Parameters
    ----------
    part : str
        The part, with its table.
    reason : str
        What the Parquet reader said.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"the landing's part {part} is damaged: {reason}")
        self.part = part


class PartVanishedError(Exception):
    """A part was superseded and deleted after it was listed."""


@dataclass(frozen=True)
class Part:
    """Rows with a name, as they are or will be in the landing."""

    table: str
    name: str
    rows: pa.Table


class _RowIds:
    """UUIDs of version 7 that strictly increase within a process (RFC 9562, 6.2, method 3)."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> UUID:
        """Return the next identifier: 48 bits of ms, 12 bits of its fraction, 62 random bits."""
        nanoseconds = time.time_ns()
        milliseconds, rest = divmod(nanoseconds, 1_000_000)
        stamp = max((milliseconds << 12) | (rest * 4096 // 1_000_000), self._last + 1)
        self._last = stamp
        value = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64
        return UUID(int=value | 0b10 << 62 | secrets.randbits(62))


_row_ids = _RowIds()


def landed_at(part: str) -> datetime:
    """Return when a part was made, which its name tells."""
    return datetime.fromtimestamp((UUID(part.split(".")[0]).int >> 80) / 1000, UTC)


class Landing:
    """Append-only tables of Parquet parts under a folder or an object store.

    Parameters
    ----------
    root_url : str
        Local path or fsspec URL (``s3://bucket/prefix``). Locally a part is written under a
        temporary name, fsynced and renamed; on an object store it is put in one request, which
        is atomic there.
    tables : iterable of Table
        The tables, see `schema.warehouse_tables`.
    """

    def __init__(self, root_url: str, tables: Iterable[Table]) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(root_url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._tables = {table.landing_name: table for table in tables if table.columns}
        self._superseded: dict[tuple[str, str], frozenset[str]] = {}

    @property
    def is_local(self) -> bool:
        """Whether the parts lie on this machine's own file system."""
        return self._local

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

    def prepare(self, table: str, rows: Sequence[Mapping[str, Any]]) -> "Part":
        """Make a part of rows, to be saved; saving it again adds nothing.

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
            If there are no rows, or a row has a column that the table has not.
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
        name = f"{_row_ids.next()}{_PART}"
        return Part(table, name, part.append_column(ROW_ID, ids))

    def save(self, part: "Part") -> None:
        """Write a part; its rows are durable when this returns.

        Raises
        ------
        OSError
            If it cannot be written, or may not have been. File systems of other packages raise
            classes of their own as well.
        """
        self._write(part.table, part.name, part.rows)

    def parts(self, table: str) -> list[str]:
        """Return the names of the parts that hold a table's rows, oldest first."""
        return self._settled(lambda: self._live(table))

    def read_part(self, table: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of one part, with the columns it was written with.

        Parameters
        ----------
        table, name : str
            The table and the part.
        columns : sequence of str, optional
            Columns wanted, to which `ROW_ID` is added; those the part has not are left out. All
            if not given.

        Raises
        ------
        PartVanishedError
            If the part has been superseded and deleted.
        CorruptPartError
            If the part is damaged.
        """
        with self._opened(table, name) as file:
            present = file.schema_arrow.names
            # A part that has none of the columns wanted still has its rows.
            wanted = columns and [
                name for name in dict.fromkeys([*columns, ROW_ID]) if name in present
            ]
            return file.read(columns=wanted).replace_schema_metadata(None)

    def read(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of a table, each once, in no particular order.

        Parameters
        ----------
        table : str
            The table.
        columns : sequence of str, optional
            Columns wanted, `ROW_ID` among those possible; the table's own and `ROW_ID` if not
            given. What a part does not have is NULL for its rows.

        Raises
        ------
        CorruptPartError
            If a part is damaged.
        pyarrow.ArrowTypeError
            If a column has had types that have none in common.
        """
        schema = arrow_schema(self._tables[table].columns).append(pa.field(ROW_ID, pa.uuid()))
        wanted = list(columns) if columns is not None else schema.names
        empty = schema.empty_table().select(list(dict.fromkeys([*wanted, ROW_ID])))

        def all_rows() -> pa.Table:
            tables = [self.read_part(table, name, wanted) for name in self._live(table)]
            return pa.concat_tables([empty, *tables], promote_options="permissive").select(wanted)

        return self._settled(all_rows)

    def latest(
        self,
        table: str,
        columns: Collection[str] | None = None,
        where: tuple[str, Collection[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the rows in force: of each key, the one that replaces the others.

        A damaged part is left out, which is logged.

        Parameters
        ----------
        table : str
            A table whose rows have versions.
        columns : collection of str, optional
            Columns wanted; the table's own if not given.
        where : (str, collection of str), optional
            A column, and the values one of which the rows in force must have there.

        Returns
        -------
        list of dict
            Values by column name, as `append` takes them.
        """
        definition = self._tables[table]
        schema = arrow_schema(definition.columns).append(pa.field(ROW_ID, pa.uuid()))
        wanted = list(columns or (column.name for column in definition.columns))
        filtered = [where[0]] if where else []
        deciding = list(
            dict.fromkeys([*definition.key, str(definition.version), *filtered, ROW_ID])
        )

        def rows_in_force() -> list[dict[str, Any]]:
            parts: list[str] = []
            keys: list[pa.Table] = []
            for name in self._live(table):
                with self._left_out_if_damaged():
                    rows = self.read_part(table, name, deciding)
                    keys.append(_with_position(rows, len(parts)))
                    parts.append(name)
            if not keys:
                return []
            found = _in_force(
                pa.concat_tables(keys, promote_options="permissive"), definition, where
            )
            chosen = [schema.empty_table().select([*wanted, ROW_ID])]
            for number, positions in found.items():
                with self._left_out_if_damaged():
                    chosen.append(self.read_part(table, parts[number], wanted).take(positions))
            selected = pa.concat_tables(chosen, promote_options="permissive").select(wanted)
            found_rows: list[dict[str, Any]] = selected.to_pylist(maps_as_pydicts="strict")
            return found_rows

        return self._settled(rows_in_force)

    @contextmanager
    def _left_out_if_damaged(self) -> Iterator[None]:
        """Do without a part that is damaged, as what its rows stand for can be computed anew."""
        try:
            yield
        except CorruptPartError as error:
            logger.error("%s; its rows are taken not to be there", error)

    def supersedes(self, table: str, name: str) -> frozenset[str]:
        """Return the names of the parts whose rows a part has taken over.

        Raises
        ------
        PartVanishedError
            If the part has been superseded and deleted.
        CorruptPartError
            If the part is damaged.
        """
        if not name.endswith(_MERGED):
            return frozenset()
        known = self._superseded.get((table, name))
        if known is None:
            with self._opened(table, name) as file:
                known = frozenset(json.loads(file.metadata.metadata[_SUPERSEDES]))
            self._superseded[table, name] = known
        return known

    def compact(self, table: str, only: Collection[str] | None = None) -> list[str]:
        """Merge parts of like size, so that their number grows with the logarithm of the rows.

        Readers and writers need not stop, and a crash at any point loses and doubles nothing.
        One process compacts at a time: locally a lock sees to it, on an object store the caller.

        Parameters
        ----------
        table : str
            The table.
        only : collection of str, optional
            Parts that may be merged; all if not given.

        Returns
        -------
        list of str
            Names of the merged parts written.
        """
        with self._compacting(table) as alone:
            if not alone:
                return []
            # A superseded part must be gone before the part that says so is itself superseded.
            # What lands from here on is not in the first listing, and so is left alone.
            listed = self._list(table)
            live = self.parts(table)
            self._delete(table, listed - set(live))
            self._delete_abandoned(table)
            candidates = [name for name in live if only is None or name in only]
            return [
                self._merge(table, schema, names)
                for names in self._like_sized(table, candidates)
                for schema, names in self._by_schema(table, names).items()
                if len(names) > 1
            ]

    def _settled(self, read: Callable[[], T]) -> T:
        """Return what a read returns once no compaction deletes parts under its hands."""
        for _ in range(_LISTING_TRIES):
            try:
                return read()
            except PartVanishedError as error:
                vanished = error
        raise vanished

    def _live(self, table: str) -> list[str]:
        # A listing is not a snapshot: a part that appears and another that is deleted meanwhile
        # may both escape it. Parts are deleted only after the one that supersedes them has
        # appeared, so what a second listing misses of the new, the first has of the old.
        listed = self._list(table) | self._list(table)
        superseded: set[str] = set()
        for name in listed:
            try:
                superseded |= self.supersedes(table, name)
            except CorruptPartError:
                # Its sources, where they still are, hold its rows; reading it will name it.
                logger.exception("%s/%s cannot be read", table, name)
        return sorted(listed - superseded)

    def _list(self, table: str) -> set[str]:
        self._fs.invalidate_cache()
        try:
            paths: list[str] = self._fs.ls(self._path(table), detail=False)
        except FileNotFoundError:
            return set()
        names = (path.rsplit("/", 1)[-1] for path in paths)
        return {name for name in names if name.endswith(_PART) and not name.startswith(".")}

    def _path(self, table: str, name: str = "") -> str:
        return "/".join(filter(None, (self._root.rstrip("/"), table, name)))

    @contextmanager
    def _opened(self, table: str, name: str) -> Iterator[pq.ParquetFile]:
        try:
            with pq.ParquetFile(
                self._path(table, name), filesystem=self._fs, page_checksum_verification=True
            ) as file:
                yield file
        except FileNotFoundError as error:
            raise PartVanishedError(f"{table}/{name}") from error
        except (pa.ArrowException, OSError) as error:
            # What the Parquet reader says is a plain OSError without errno; what the operating
            # system says has one, and what an object store says is a class of its own.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
                raise
            raise CorruptPartError(f"{table}/{name}", str(error)) from error

    def _write(self, table: str, name: str, rows: pa.Table) -> None:
        buffer = BytesIO()
        pq.write_table(rows, buffer, compression="zstd", write_page_checksum=True)
        if not self._local:
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
                error.filename = str(folder)  # writing says why it failed, not where
            raise
        fsync_folder(folder)

    def _like_sized(self, table: str, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield groups of parts worth merging: many of one size class, together not too large."""
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
            with self._opened(table, name) as file:
                grouped[file.schema_arrow.remove_metadata()].append(name)
        return grouped

    def _merge(self, table: str, schema: pa.Schema, names: Sequence[str]) -> str:
        rows = pa.concat_tables([self.read_part(table, name).cast(schema) for name in names])
        merged = f"{_row_ids.next()}{_MERGED}"
        footer = {_SUPERSEDES: json.dumps(names).encode()}
        self._write(table, merged, rows.replace_schema_metadata(footer))
        self._delete(table, names)
        return merged

    def _delete(self, table: str, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(table, name))

    def _delete_abandoned(self, table: str) -> None:
        """Delete what writers killed in mid-write have left, once no writer can be that slow."""
        if self._local:
            for path in Path(self._path(table)).glob(f".*{_TEMPORARY}"):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                        path.unlink()

    @contextmanager
    def _compacting(self, table: str) -> Iterator[bool]:
        folder = Path(self._path(table))
        if not self._local or not folder.exists():
            yield True
            return
        try:
            with FileLock(folder / ".compacting.lock", blocking=False):
                yield True
        except Timeout:
            yield False


def _with_position(rows: pa.Table, part: int) -> pa.Table:
    """Return the rows with two more columns: the number of their part, their place in it."""
    rows = rows.append_column("part", pa.repeat(pa.scalar(part, pa.int32()), rows.num_rows))
    return rows.append_column("place", pa.array(range(rows.num_rows), pa.int64()))


def _in_force(
    rows: pa.Table, table: Table, where: tuple[str, Collection[str]] | None
) -> dict[int, list[int]]:
    """Return the places of the rows in force, by part."""
    key = ", ".join(map(quoted, table.key))
    with duckdb.connect() as connection:
        connection.register("landed", rows)
        found = connection.execute(
            f"""
            SELECT part, list(place ORDER BY place) FROM (
                SELECT * FROM landed
                QUALIFY row_number() OVER (
                    PARTITION BY {key}
                    ORDER BY {quoted(str(table.version))} DESC NULLS LAST, {ROW_ID} DESC
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


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
