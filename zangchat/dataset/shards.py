"""Shards on disk: parquet, .jsonl, .txt and token files, each as numbered groups of documents.

The group is the unit of reading: the data loader needs (shard, group, row) to find its place again,
in every format.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.parquet
from pyarrow import types

from zangchat.bpe import repair_surrogates
from zangchat.conversation import all_text
from zangchat.errors import UserError, explain
from zangchat.runtime.files import (
    BOM,
    LeftOut,
    converted,
    read_jsonl,
    unpacked,
    unpacked_name,
)

if TYPE_CHECKING:
    import pyarrow

FORMATS = (".parquet", ".jsonl", ".ndjson", ".txt")
OFFSET_BYTES = 8
GROUP_DOCUMENTS = 1024  # documents in a parquet row group
TEXT_GROUP_BYTES = 4 << 20  # .jsonl and .txt files are read in ranges of about this size
SCAN_BYTES = 1 << 16  # read at a time in search of the beginning of a file's last line
TXT_DOCUMENT_CHARS = 8192  # longest document cut from a .txt file without <|endoftext|> marks
RECORD_FIELDS = ("text", "prompt", "completion", "messages")
REPLACE = "put an intact copy in its place"


def as_list(texts: "pyarrow.ChunkedArray | list[Any]") -> list[Any]:
    return texts if isinstance(texts, list) else [text for text in texts.to_pylist() if text]


def has_documents(texts: "pyarrow.ChunkedArray | list[Any]") -> bool:
    """Whether one of the texts is neither null nor empty."""
    if isinstance(texts, list):
        return any(len(text) for text in texts)
    return bool(pc.any(pc.greater(pc.binary_length(texts), 0)).as_py())


class _File:
    """A shard on disk, as numbered groups of documents; one that is compressed is unpacked.

    A row that cannot be read raises UserError, unless there is a `left_out` for it.
    """

    def __init__(self, path: Path, repair_hint: str, left_out: LeftOut | None = None) -> None:
        self.path, self.unpacked = path, unpacked(path)
        self.repair_hint = repair_hint
        self.left_out = left_out

    def num_groups(self) -> int:
        raise NotImplementedError

    def read_group(self, group: int) -> "pyarrow.ChunkedArray | list[str]":
        """Its documents, see `Dataset.read_arrow`."""
        raise NotImplementedError

    def has_text(self) -> bool:
        return any(has_documents(self.read_group(group)) for group in range(self.num_groups()))

    def explained(self, *kinds: type[Exception]) -> contextlib.AbstractContextManager[None]:
        return explain(f"{self.path} is damaged", self.repair_hint, *kinds)


class ParquetFile(_File):
    def num_groups(self) -> int:
        return self._open().num_row_groups

    def read_group(self, group: int) -> "pyarrow.ChunkedArray | list[str]":
        file = self._open()
        if "text" in file.schema_arrow.names:
            self._check_column(file.schema_arrow)
            with self.explained(pyarrow.ArrowException, OSError):
                texts = file.read_row_group(group, columns=["text"]).column("text")
                if texts.type not in (pyarrow.string(), pyarrow.large_string()):
                    texts = texts.cast(pyarrow.string())
                texts.validate(full=True)  # that it is UTF-8: readers do not check
            return texts
        with self.explained(pyarrow.ArrowException, OSError):
            rows = file.read_row_group(group).to_pylist()
        where = f"{self.path}, row group {group}"
        places = ((f"{where}, row {number}", row) for number, row in enumerate(rows))
        return [text for _, text in converted(places, record_text, self.left_out) if text]

    def _open(self) -> Any:
        with self.explained(pyarrow.ArrowException, OSError):
            return pyarrow.parquet.ParquetFile(self.unpacked)

    def _check_column(self, schema: "pyarrow.Schema") -> None:
        """Raises UserError unless there is one column `text`, of strings."""
        columns = schema.get_all_field_indices("text")
        if len(columns) > 1:
            raise UserError(f"{self.path} has {len(columns)} columns `text`: rename all but one")
        kind = schema.field(columns[0]).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        is_binary = types.is_binary(value) or types.is_large_binary(value)
        is_string = types.is_string(value) or types.is_large_string(value)
        if not (is_string or is_binary or types.is_string_view(value) or types.is_null(value)):
            problem = f"{self.path}: its column `text` holds {kind}, not strings"
            raise UserError(f"{problem}: write a column `text` of strings")


class LineFile(_File):
    """.jsonl or .txt, in byte ranges that begin and end at line ends: no index is needed.

    The last range is the one in which the last line begins, so that it is never empty.
    """

    def num_groups(self) -> int:
        with self.unpacked.open("rb") as file:
            return _last_line_start(file) // TEXT_GROUP_BYTES + 1

    def read_group(self, group: int) -> list[str]:
        with self.unpacked.open("rb") as file:
            start = _line_start(file, group * TEXT_GROUP_BYTES)
            end = _line_start(file, (group + 1) * TEXT_GROUP_BYTES)
            if text_format(self.path) != ".txt":
                records = read_jsonl(self.path, start=start, end=end, left_out=self.left_out)
                texts = converted(records, record_text, self.left_out)
                return [text for _, text in texts if text]
            file.seek(start)
            raw = file.read(max(0, end - start))
        if start == 0 and raw.startswith(BOM):
            start, raw = len(BOM), raw.removeprefix(BOM)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"byte {start + error.start} is not UTF-8"
            raise UserError(f"{self.path} is damaged ({reason}): {self.repair_hint}") from error
        return cut_text(text.replace("\r\n", "\n"))


def text_format(path: Path) -> str:
    """The ending in lower case, without that of a compressed file: .jsonl of A.JSONL.gz."""
    return unpacked_name(path).suffix.lower()


def open_shard(
    path: Path, repair_hint: str, left_out: LeftOut | None = None
) -> ParquetFile | LineFile:
    kind = ParquetFile if text_format(path) == ".parquet" else LineFile
    return kind(path, repair_hint, left_out)


def _line_start(file: Any, position: int) -> int:
    """The first beginning of a line at or after `position`, or the end of the file."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def _last_line_start(file: Any) -> int:
    """The beginning of the last line that is not blank; 0 if all are."""
    end, found = file.seek(0, os.SEEK_END), False
    while end > 0:
        start = max(0, end - SCAN_BYTES)
        file.seek(start)
        block = file.read(end - start)
        if not found:
            block = block.rstrip()  # blank lines at the end of the file
            found = bool(block)
        if (newline := block.rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


def cut_text(text: str, limit: int = TXT_DOCUMENT_CHARS) -> list[str]:
    """Plain text -> documents, cut at <|endoftext|>.

    One longer than `limit` is cut at a blank line, else a line end, else anywhere.
    """
    documents = []
    for piece in text.split("<|endoftext|>"):
        piece = piece.strip()
        start = 0  # of the rest: an index, since slicing the rest each time would be quadratic
        while len(piece) - start > limit:
            end = start + limit
            cut = max(piece.rfind("\n\n", start + 1, end), start)
            if cut == start:
                cut = max(piece.rfind("\n", start + 1, end), start)
            cut = end if cut == start else cut
            documents.append(piece[start:cut].rstrip())
            start = cut
            while piece[start].isspace():  # the piece does not end with a space
                start += 1
        documents.append(piece[start:])
    return [document for document in documents if document]


def record_text(record: Any, where: str) -> str:
    """A record as plain text: `text`, else prompt + completion, else the messages, one paragraph
    each.

    Empty for a record whose text is null; surrogates of a careless exporter are repaired. Raises
    UserError, beginning with `where`, if it has none.
    """
    return repair_surrogates(_text_of(record, where))


def _text_of(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        record = {}
    text, messages = record.get("text"), record.get("messages")
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(text, str):
        return text
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + _gap(prompt, completion) + completion
    if isinstance(messages, list):
        problem, remedy = (
            f"{where} has a message without role or text",
            "see the README for the format",
        )
        with explain(problem, remedy, KeyError, TypeError, AttributeError):
            return "\n\n".join(
                f"{m['role'].capitalize()}: {all_text(m['content'])}" for m in messages
            )
    if any(name in record and record[name] is None for name in RECORD_FIELDS):
        return ""
    detail = f" (its `text` is a JSON {type(text).__name__})" if "text" in record else ""
    needed = "a record needs `text`, `prompt` and `completion`, or `messages`"
    raise UserError(f"{where} has no text{detail}: {needed}")


def _gap(prompt: str, completion: str) -> str:
    return "" if prompt[-1:].isspace() or completion[:1].isspace() else "\n"


def write_shard(path: Path, texts: Sequence[str]) -> None:
    """Documents -> one parquet shard in the hub's format."""
    table = pyarrow.table({"text": pyarrow.array(texts, type=pyarrow.string())})
    pyarrow.parquet.write_table(
        table, path, row_group_size=GROUP_DOCUMENTS, compression="zstd", use_dictionary=False
    )


class TokenFile:
    """A shard of ids on disk: numbered groups of documents, each an (n,) array that looks into the
    file.
    """

    def __init__(self, path: Path, entry: dict[str, Any], dtype: str) -> None:
        self.groups: list[int] = entry["groups"]
        documents, tokens = sum(self.groups), entry["tokens"]
        size = tokens * np.dtype(dtype).itemsize
        start = size + -size % OFFSET_BYTES
        if path.stat().st_size != start + (documents + 1) * OFFSET_BYTES:
            raise UserError(
                f"{path} is damaged: its size is not that of {tokens:,} tokens in {documents:,} "
                "documents"
            )
        self._ids = (
            np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))
            if tokens
            else np.zeros(0, dtype=dtype)
        )
        self._offsets = np.memmap(path, dtype="<i8", mode="r", offset=start, shape=(documents + 1,))

    def num_groups(self) -> int:
        return len(self.groups)

    def read_group(self, group: int) -> list[np.ndarray]:
        first = sum(self.groups[:group])
        ends = self._offsets[first : first + self.groups[group] + 1].tolist()
        return [self._ids[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
