"""Shards on disk: parquet, .jsonl, .txt and token files, each as numbered groups of documents.

The group is the unit of reading: the data loader needs (shard, group, row) to find its place again, whatever the format.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zangchat.errors import UserError

if TYPE_CHECKING:
    import pyarrow

OFFSET_BYTES = 8


GROUP_DOCUMENTS = 1024  # documents in a parquet row group
TEXT_GROUP_BYTES = 4 << 20  # .jsonl and .txt files are read in ranges of about this size
SCAN_BYTES = 1 << 16  # read at a time in search of the beginning of a file's last line
TXT_DOCUMENT_CHARS = 8192  # .txt files without <|endoftext|> marks are cut into documents of at most this length
TOKENS = ".tokens"  # ends the name of a shard of token ids


def as_list(texts: "pyarrow.ChunkedArray | list[Any]") -> list[Any]:
    return texts if isinstance(texts, list) else [text for text in texts.to_pylist() if text]


class _File:
    """A shard on disk: `num_groups()` groups of documents, `read_group(i)` a list or, see `Dataset.read_arrow`, an Arrow array."""

    def __init__(self, path: Path, repair_hint: str) -> None:
        self.path = path
        self.repair_hint = repair_hint

    def damaged(self, error: object) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(f"{self.path} is damaged ({reason}): {self.repair_hint}")


class ParquetFile(_File):
    def num_groups(self) -> int:
        return self._open().num_row_groups

    def read_group(self, group: int) -> "pyarrow.ChunkedArray | list[str]":
        import pyarrow

        file = self._open()
        try:
            if "text" in file.schema_arrow.names:
                texts = file.read_row_group(group, columns=["text"]).column("text")
                texts = texts if texts.type in (pyarrow.string(), pyarrow.large_string()) else texts.cast(pyarrow.string())
                texts.validate(full=True)  # that it is UTF-8: readers do not look
                return texts
            rows = file.read_row_group(group).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise self.damaged(error) from error
        return [text for row in rows if (text := record_text(row, f"{self.path}, row group {group}"))]

    def _open(self) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise self.damaged(error) from error


class LineFile(_File):
    """.jsonl or .txt, in byte ranges that begin and end at line ends: random access without an index.

    The last range is the one in which the last line begins, so that it never is empty.
    """

    def num_groups(self) -> int:
        with self.path.open("rb") as file:
            return _last_line_start(file) // TEXT_GROUP_BYTES + 1

    def read_group(self, group: int) -> list[str]:
        with self.path.open("rb") as file:
            start = _line_start(file, group * TEXT_GROUP_BYTES)
            end = _line_start(file, (group + 1) * TEXT_GROUP_BYTES)
            file.seek(start)
            raw = file.read(max(0, end - start))
        try:
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise self.damaged(f"byte {start + error.start} is not UTF-8") from error
        return cut_text(text) if self.path.suffix == ".txt" else self._records(text, start)

    def _records(self, text: str, start: int) -> list[str]:
        texts = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{self.path}, line {number}" + (f" after byte {start}" if start else "")
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where} is not JSON ({error}): correct the line") from error
                texts.append(record_text(record, where))
        return [text for text in texts if text]


def _line_start(file: Any, position: int) -> int:
    """The first beginning of a line at or after `position`, or the end of the file."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def _last_line_start(file: Any) -> int:
    """Where the last line that is not blank begins; 0 if there is none."""
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
    """Plain text -> documents: cut at <|endoftext|>; what is still longer than `limit` at a blank line, else a line end, else anywhere."""
    documents = []
    for piece in text.split("<|endoftext|>"):
        piece = piece.strip()
        while len(piece) > limit:
            cut = max(piece.rfind("\n\n", 1, limit), 0) or max(piece.rfind("\n", 1, limit), 0) or limit
            documents.append(piece[:cut].rstrip())
            piece = piece[cut:].lstrip()
        documents.append(piece)
    return [document for document in documents if document]


def record_text(record: Any, where: str) -> str:
    """One record as plain text: `text`, else prompt + completion, else the messages, one paragraph each. UserErrors name `where`."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            gap = "" if record["prompt"][-1:].isspace() or record["completion"][:1].isspace() else "\n"
            return record["prompt"] + gap + record["completion"]
        if isinstance(record.get("messages"), list):
            try:
                return "\n\n".join(f"{message['role'].capitalize()}: {_content_text(message['content'])}" for message in record["messages"])
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{where} has a message without role or text ({error}): see the README for the format") from error
    raise UserError(f"{where} has no text: a record needs `text`, `prompt` and `completion`, or `messages`")


def _content_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def write_shard(path: Path, texts: Sequence[str]) -> None:
    """Documents -> one parquet shard in the hub's format."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(texts, type=pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=GROUP_DOCUMENTS, compression="zstd", use_dictionary=False)


class TokenFile:
    """A shard of ids on disk: numbered groups of documents, each an (n,) array that looks into the file."""

    def __init__(self, path: Path, entry: dict[str, Any], dtype: str) -> None:
        self.groups: list[int] = entry["groups"]
        documents, tokens = sum(self.groups), entry["tokens"]
        size = tokens * np.dtype(dtype).itemsize
        start = size + -size % OFFSET_BYTES
        if path.stat().st_size != start + (documents + 1) * OFFSET_BYTES:
            raise UserError(f"{path} is damaged: its size is not that of {tokens:,} tokens in {documents:,} documents")
        self._ids = np.memmap(path, dtype=dtype, mode="r", shape=(tokens,)) if tokens else np.zeros(0, dtype=dtype)
        self._offsets = np.memmap(path, dtype="<i8", mode="r", offset=start, shape=(documents + 1,))

    def num_groups(self) -> int:
        return len(self.groups)

    def read_group(self, group: int) -> list[np.ndarray]:
        first = sum(self.groups[:group])
        ends = self._offsets[first : first + self.groups[group] + 1].tolist()
        return [self._ids[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
