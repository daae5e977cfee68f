"""Python sources and documentation as clean documents: prose of docstrings and comments, and code.

The same source gives the same documents.
"""

import ast
import importlib
import inspect
import re
import string
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

FILE_TEXT_BYTES = 100_000  # of prose, and of code, from one file
DOCUMENT_CHARS = range(200, 8001)
JOINED_CHARS = 1500  # short docstrings of a file are joined until they amount to this
ENTRY_CHARS = 60  # a docstring or comment below this says too little

# Read by importing them, like the modules of the interpreter: written in C, and without side
# effects.
BUILT_IN_MODULES = {
    "array",
    "binascii",
    "builtins",
    "cmath",
    "math",
    "select",
    "unicodedata",
    "zlib",
}
LICENCE = re.compile(
    r"licensed under|permission is hereby granted|redistribution and use|without warrant|all "
    r"rights reserved|spdx-",
    re.I,
)
GENERATED = re.compile(
    r"do not (edit|modify)|auto-?generated|@generated|generated (by|from|code|file)|automatically "
    r"generated",
    re.I,
)
LETTERS = string.ascii_letters.encode()
DIGITS = string.digits.encode()
COMMON_WORDS = frozenset(
    """
    a an and are as at be been but by can does each for from has have how if in into is it its may
    more most must no not of on one only or other should so such than that the their them then there
    these they this those to two use used using was were what when where which while will with
    without you your
    """.split()
)

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Extract(NamedTuple):
    """The documents of a source, and the key that keeps them together in one split."""

    key: str
    prose: list[str]
    code: list[str]


# ---- prose ---------------------------------------------------------------------------------------


def from_source(source: str, key: str, with_code: bool = True) -> tuple[list[str], list[str]]:
    """Python source -> (prose documents, code documents)."""
    if GENERATED.search(source[:1000]) or max(map(len, source.split("\n"))) > 1000:
        return [], []
    comments = documents_of(_long_comments(source))
    if not with_code and sum(map(len, source.split('"""')[1::2])) < DOCUMENT_CHARS.start:
        return comments, []  # nothing worth the time of parsing it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [], []
    module = key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    documented = [
        (node, name)
        for node, name in _definitions(tree, module)
        if ast.get_docstring(node, clean=False)
    ]
    prose = documents_of(_docstring_entry(node, name) for node, name in documented) + comments
    return capped(prose), capped(
        code_documents(source, tree, [node for node, _ in documented], key)
    ) if with_code else []


def _definitions(node: Definition, name: str) -> Iterator[tuple[Definition, str]]:
    """The module, its classes and functions, and those within them, each with its dotted name, in
    source order.
    """
    yield node, name
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")


def _docstring_entry(node: Definition, name: str) -> str:
    """The docstring below the name that it documents; empty if it is too short."""
    docstring = clean_markup(ast.get_docstring(node) or "")
    if len(docstring) < ENTRY_CHARS:
        return ""
    arguments = (
        f"({ast.unparse(node.args)})"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        else ""
    )
    return f"{name}{arguments if len(arguments) < 300 else '(...)'}\n\n{docstring}"


def _long_comments(source: str) -> list[str]:
    """Blocks of three or more comment lines, without their marks."""
    comments = []
    for block in re.findall(r"(?:^[ \t]*#(?!!).*\n){3,}", source, flags=re.M):
        lines = [re.sub(r"^[ \t]*#+:? ?|[-=#*~ ]+$", "", line) for line in block.splitlines()]
        text = "\n".join(lines).strip()
        if (
            len(text) >= 3 * ENTRY_CHARS
            and not LICENCE.search(text)
            and "copyright" not in text.lower()
            and looks_english(text)
        ):
            comments.append(text)
    return comments


def language_topics() -> Iterator[Extract]:
    """The language reference that `help("topic")` prints."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Extract(f"topics/{name}", documents_of([clean_markup(topics[name])]), [])


def built_in_docstrings() -> Iterator[Extract]:
    """Docstrings of names written in C, without a source file: `len`, `str.split`, `math.sqrt`,
    ...
    """
    linked = {name for name in sys.builtin_module_names if not name.startswith(("_", "xx"))}
    for name in sorted(BUILT_IN_MODULES | linked):
        module = importlib.import_module(name)
        entries = [f"{name}\n\n{module.__doc__}"]
        for attribute, value in sorted(vars(module).items()):
            if inspect.isbuiltin(value) or inspect.isclass(value):
                entries.append(_describe(f"{name}.{attribute}".removeprefix("builtins."), value))
            if inspect.isclass(value) and not issubclass(value, BaseException):
                members = sorted(
                    (key, member) for key, member in vars(value).items() if not key.startswith("_")
                )
                entries += [_describe(f"{attribute}.{key}", member) for key, member in members]
        yield Extract(f"builtin/{name}", documents_of(map(clean_markup, entries)), [])


def _describe(name: str, value: object) -> str:
    docstring = inspect.cleandoc(value.__doc__) if isinstance(value.__doc__, str) else ""
    # without the implicit first argument
    signature = re.sub(r"\$\w+(, )?(/, |/)?", "", getattr(value, "__text_signature__", None) or "")
    return f"{name}{signature}\n\n{docstring}" if docstring else ""


def clean_markup(text: str) -> str:
    """reStructuredText and markdown -> text as a person would type it: no badges, HTML, link
    targets, directives, roles.
    """
    text = text.expandtabs(4)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    # images, linked or not
    text = re.sub(r"\[?!\[[^\]]*\][(\[][^)\]]*[)\]](\]\(?[^)\s]*\)?)?", "", text)
    text = re.sub(
        r"</?(?:p|a|img|br|div|h\d|b|i|em|strong|sub|sup|span|center|picture|source|details|summary|table|tr|td|th|code|kbd)\b[^>]*>",
        "",
        text,
    )
    text = re.sub(r"\[([^\]\n]+)\]\((?:https?:|#|/|\.)[^)\s]*\)", r"\1", text)  # [words](target)
    text = re.sub(r"`([^`<>\n]+) <[^>`\n]+>`__?", r"\1", text)  # `words <target>`_
    # :func:`name`
    text = re.sub(r"(?<![\w`]):[a-z:]+:`~?\.?([^`<\n]+?)(?: <[^>`]+>)?`", r"`\1`", text)
    # link targets
    text = re.sub(r"^[ ]*(?:\[[^\]\n]+\]:|\.\. _[^:\n]+:)[ ]+\S+.*\n?", "", text, flags=re.M)
    text = re.sub(
        r"^[ ]*\.\. "
        r"(?:versionadded|versionchanged|deprecated|currentmodule|module|toctree|index|contents|image|figure).*\n?",
        "",
        text,
        flags=re.M,
    )
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def documents_of(entries: Iterable[str]) -> list[str]:
    """Entries of one file -> documents of sensible length that read as English: short ones joined,
    long ones cut between paragraphs.
    """
    documents: list[str] = []
    pending = ""
    for entry in entries:
        if not entry or LICENCE.search(entry[:600]):
            continue
        if pending and (
            len(pending) >= JOINED_CHARS or len(pending) + len(entry) > 2 * JOINED_CHARS
        ):
            documents.append(pending)
            pending = ""
        pending = f"{pending}\n\n{entry}" if pending else entry
    documents.append(pending)
    pieces = [piece for document in documents for piece in cut_between(document, "\n\n")]
    return [piece for piece in pieces if len(piece) in DOCUMENT_CHARS and looks_english(piece)]


def cut_between(text: str, separator: str) -> list[str]:
    """Cut at separators into pieces of at most a document's length; longer ones are left out."""
    limit = DOCUMENT_CHARS.stop - 1
    pieces: list[str] = []
    for part in text.split(separator):
        if pieces and len(pieces[-1]) + len(separator) + len(part) <= limit:
            pieces[-1] += separator + part
        else:
            pieces.append(part)
    return [piece.strip("\n") for piece in pieces if len(piece) <= limit]


def looks_english(text: str) -> bool:
    """Mostly ASCII letters, no very long lines, and the small words that hold English sentences
    together.
    """
    if not is_clean(text, longest_line=2000) or _count(text, LETTERS + b" \n") < 0.75 * len(text):
        return False
    words = re.findall(r"[a-z]+", text.lower())
    return len(words) >= 20 and sum(word in COMMON_WORDS for word in words) >= 0.15 * len(words)


def is_clean(text: str, longest_line: int) -> bool:
    """No control characters, few beyond ASCII, no line that is longer than a person writes it."""
    if len(text.encode("ascii", "ignore")) < 0.97 * len(text) or re.search(
        r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", text
    ):
        return False
    return max(map(len, text.split("\n"))) <= longest_line


# ---- code ----------------------------------------------------------------------------------------


def code_documents(
    source: str, tree: ast.Module, documented: Iterable[Definition], key: str
) -> list[str]:
    """The file without docstrings and header comment, cut before top-level definitions into
    documents that begin with the file's name.
    """
    lines = source.split("\n")
    dropped = _docstring_lines(documented)
    starts = {
        min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        for node in tree.body
    }
    pieces: list[list[str]] = [[]]
    begun = False
    for number, line in enumerate(lines, 1):
        begun = begun or not (line.startswith("#") or not line.strip() or number in dropped)
        if not begun or number in dropped:
            continue
        if number in starts and re.match(r"@|class |def |async def ", line):
            pieces.append([])
        pieces[-1].append(line.rstrip())
    header = f"# {key}\n"
    documents = [header]
    for piece in (re.sub(r"\n{3,}", "\n\n\n", "\n".join(piece)).strip("\n") for piece in pieces):
        if len(documents[-1]) + len(piece) > 2 * JOINED_CHARS and len(documents[-1]) > len(header):
            documents.append(header)
        documents[-1] += "\n\n\n" * (len(documents[-1]) > len(header)) + piece
    documents = [piece for document in documents for piece in cut_between(document, "\n\n")]
    return [
        document
        for document in documents
        if len(document) in DOCUMENT_CHARS and looks_like_code(document)
    ]


def _docstring_lines(documented: Iterable[Definition]) -> set[int]:
    """Lines of docstrings that may go: those that are not all there is in their body."""
    found: set[int] = set()
    for node in documented:
        if len(node.body) > 1:
            first = node.body[0]
            found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def looks_like_code(text: str) -> bool:
    """Statements rather than tables: letters outweigh digits and marks, and no very long lines."""
    visible = len(text) - _count(text, b" \n")
    return (
        is_clean(text, longest_line=200)
        and _count(text, LETTERS) >= 0.6 * visible
        and _count(text, DIGITS) <= 0.1 * visible
    )


def _count(text: str, characters: bytes) -> int:
    """How many of the text's characters are among the (ASCII) `characters`."""
    ascii_only = text.encode("ascii", "ignore")
    return len(ascii_only) - len(ascii_only.translate(None, characters))


def first_bytes(documents: list[tuple[str, str]], limit: int) -> tuple[list[tuple[str, str]], int]:
    """As many documents from the front as fit into `limit` bytes of UTF-8, and their size."""
    size = 0
    for count, (text, _) in enumerate(documents):
        if size + len(text.encode("utf-8")) > limit:
            return documents[:count], size
        size += len(text.encode("utf-8"))
    return documents, size


def capped(documents: list[str]) -> list[str]:
    kept, _ = first_bytes([(document, "") for document in documents], FILE_TEXT_BYTES)
    return [document for document, _ in kept]
