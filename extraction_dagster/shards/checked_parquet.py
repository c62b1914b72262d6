"""Parquet files that somebody else may have written: no page is decoded before its sizes were looked at.

Arrow believes a file: a page of a kilobyte may say that it unpacks to two gigabytes, and a dictionary that one picture
stands in a million rows. Both are in the headers of the pages, which stand between the pages and not in the footer:

    | header: 64 KiB, 41 KiB packed, 300 values, plain | 41 KiB | header … | 40 KiB | … | footer | its length | PAR1

They are read here (Thrift's compact protocol, `parquet.thrift`), one row group at a time, before Arrow sees the group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import pyarrow as pa
    import pyarrow.parquet as pq

_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _DICTIONARY_ENCODINGS = 0, frozenset({2, 8})
_LONGEST_HEADER = 65_536
_DEEPEST = 4
_MOST_GROUPS = 100_000
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = frozenset({4, 5, 6})


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file must look like, or it is refused.

    Attributes:
        schema: Names and types of its columns.
        codec: How pages may be packed.
        dictionaries: The columns whose values may stand in a dictionary.
        max_group_rows: Most rows of a row group.
        max_bytes: Most bytes of all pages, unpacked.
        max_group_bytes: Most bytes of the pages of each row group instead, for a file of any length.
        nullable: The columns that may hold NULL.
        list_sizes: How many numbers each value of a column of lists has.
        as_dictionaries: The columns of texts that are read as they stand in the file: each text once.
    """

    schema: pa.Schema
    codec: str
    dictionaries: Collection[str] = field(default=())
    max_group_rows: int = 2**31
    max_bytes: int = 2**32
    max_group_bytes: int | None = None
    nullable: Collection[str] = field(default=())
    list_sizes: Mapping[str, int] = field(default_factory=dict)
    as_dictionaries: Collection[str] = field(default=())


class CheckedParquet:
    """A file's row groups, each checked when it is read.

    Args:
        file: Open.
        layout: What it must look like.

    Raises:
        ValueError: It looks otherwise; Arrow's errors are of that kind too.
    """

    def __init__(self, file: IO[bytes], layout: Layout) -> None:
        import pyarrow.parquet as pq  # noqa: PLC0415 - 0.3 s that importing the room need not pay

        self._file, self._layout, self._left = file, layout, layout.max_bytes
        there = pq.read_metadata(file)
        kept = [name for name in layout.as_dictionaries if name in there.schema.names]
        self._parquet = pq.ParquetFile(
            file, metadata=there, page_checksum_verification=True, pre_buffer=False, read_dictionary=kept
        )
        self._size = file.seek(0, 2)
        metadata = self._parquet.metadata
        if metadata.num_row_groups > _MOST_GROUPS:
            raise ValueError(f"it has {metadata.num_row_groups} row groups")
        found = self._parquet.schema_arrow.remove_metadata()
        if not found.equals(layout.schema) or metadata.num_columns != len(layout.schema):
            raise ValueError(f"its columns are {', '.join(f'{item.name} {item.type}' for item in found)}")
        self.group_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        wrong = [rows for rows in self.group_rows if not 0 <= rows <= layout.max_group_rows]
        if wrong or sum(self.group_rows) != metadata.num_rows:
            raise ValueError(f"it has row groups of {wrong or self.group_rows} rows, {metadata.num_rows} in all")

    def read(self, group: int) -> pa.Table:
        """A row group; no value of it is NULL, unless its column may hold that."""
        rows = self._parquet.metadata.row_group(group)
        self._left = self._layout.max_group_bytes or self._left
        for number, name in enumerate(self._layout.schema.names):
            self._check(rows.column(number), name, rows.num_rows)
        table = self._parquet.read_row_group(group, use_threads=False)
        if any(table[name].null_count for name in table.schema.names if name not in self._layout.nullable):
            raise ValueError("it has values that are NULL")
        return table.replace_schema_metadata()

    def _check(self, column: pq.ColumnChunkMetaData, name: str, num_rows: int) -> None:
        """See that a column's pages are what the footer says, and no more than may be."""
        size = self._layout.list_sizes.get(name)
        path, values = (name, num_rows) if size is None else (f"{name}.list.element", num_rows * size)
        if column.path_in_schema != path or column.num_values != values:
            raise ValueError(f"column {name} has {column.num_values} values in {num_rows} rows")
        if column.compression != self._layout.codec:
            raise ValueError(f"column {name} is packed by {column.compression}")
        start, length = column.data_page_offset, column.total_compressed_size
        if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
            start = column.dictionary_page_offset
        if not (0 <= start <= self._size and 0 <= length <= self._size - start):
            raise ValueError(f"column {name} lies outside of the file")
        self._file.seek(start)
        pages = self._file.read(length)
        if len(pages) != length:
            raise ValueError("it is cut short")
        may_look_up, may_be_null = name in self._layout.dictionaries, name in self._layout.nullable
        for unpacked, packed in _page_sizes(pages, values, may_look_up=may_look_up, may_be_null=may_be_null):
            self._left -= unpacked
            if self._left < 0 or (column.compression == "UNCOMPRESSED" and unpacked != packed):
                most = self._layout.max_group_bytes or self._layout.max_bytes
                raise ValueError(f"column {name} has pages of more than {most} bytes")


def _page_sizes(data: bytes, num_values: int, *, may_look_up: bool, may_be_null: bool) -> Iterator[tuple[int, int]]:
    """The unpacked and the packed size of each page, up to the last value."""
    at = seen = 0
    while seen < num_values:
        reader = _Thrift(data[at : at + _LONGEST_HEADER])
        header = reader.struct()
        kind, unpacked, packed = (_number(header, number) for number in (1, 2, 3))
        at += reader.at + packed
        if at > len(data):
            raise ValueError("a page is cut short")
        facts = header.get(5 if kind == _DATA_PAGE else 7)
        if kind not in {_DATA_PAGE, _DICTIONARY_PAGE} or not isinstance(facts, dict):
            raise ValueError(f"it has pages of kind {kind}")
        values, encoding = _number(facts, 1), _number(facts, 2)
        if kind == _DATA_PAGE:
            seen += values
        looked_up = kind == _DICTIONARY_PAGE or encoding in _DICTIONARY_ENCODINGS
        is_empty = values == 0 and not (may_be_null and kind == _DICTIONARY_PAGE)  # of a column of NULLs alone
        if (encoding != _PLAIN and not looked_up) or (looked_up and not may_look_up) or is_empty:
            raise ValueError(f"it has pages of kind {kind} and encoding {encoding}")
        yield unpacked, packed
    if seen != num_values:
        raise ValueError(f"its pages have {seen} values, expected {num_values}")


def _number(fields: dict[int, Any], number: int) -> int:
    value = fields.get(number)
    if type(value) is not int or value < 0:
        raise ValueError("a page's header lacks its sizes")
    return value


class _Thrift:
    """Reads structures of Thrift's compact protocol: fields by their number, values that nobody asks for as None."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise ValueError("a page's header is too deep")
        found, number = dict[int, Any](), 0
        while (head := self._byte()) != _STOP:
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:  # noqa: ANN401 - whatever the field is
        if kind in {_TRUE, _FALSE}:
            return kind == _TRUE
        if kind in _INTEGERS:
            return self._integer()
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in {_LIST, _SET}:
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):  # noqa: PLR2004 - as the protocol has it
                self._skip(1) if head & 15 in {_TRUE, _FALSE} else self._value(head & 15, depth + 1)
            return None
        sizes = {_BYTE: 1, _DOUBLE: 8}
        if kind != _BINARY and kind not in sizes:
            raise ValueError("a page's header can't be read")
        self._skip(sizes.get(kind) or self._varint())
        return None

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise ValueError("a page's header is cut short")

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:  # noqa: PLR2004 - the last byte's mark
                return value
            if shift > 63:  # noqa: PLR2004 - 64 bits
                raise ValueError("a page's header can't be read")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
