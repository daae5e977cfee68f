"""PyDocs: "What does json.dumps do?", answered by the first sentence of the real docstring, read
from the Python that runs this.

The standard library's source files are parsed, not imported; names written in C (len, str.join,
math.sqrt) come from the few modules of BUILT_IN, which are loaded already or harmless to load. No
download; a name belongs to one split.
"""

import ast
import functools
import importlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tasks.common import Content, Conversation, Task, chat, check_split, split_of, visible_text
from zangchat.runtime.seeds import derive_seed

BUILT_IN = (
    "builtins math cmath time itertools operator collections functools array zlib binascii gc "
    "errno sys"
).split()
SKIPPED = set(
    "antigravity distutils ensurepip idlelib lib2to3 pydoc_data test this tkinter turtle "
    "turtledemo __future__".split()
)
MAX_ANSWER = 200  # characters
MIN_ANSWER = 15

QUESTIONS = {
    "function": (
        "What does {name} do?",
        "What does {name} do in Python?",
        "what does {name} do",
        "What is {name} for?",
        "Explain {name}.",
        "What does the function {name} do?",
        "In Python, what does {name} do?",
        "Tell me what {name} does.",
        "{name} 是做什么的？",
        "{name} 有什么作用？",
    ),
    "class": (
        "What is {name}?",
        "What is {name} in Python?",
        "what is {name}",
        "What is the class {name}?",
        "What is {name} for?",
        "Explain {name}.",
        "What does {name} do?",
        "Tell me about {name}.",
        "{name} 是什么？",
    ),
    "module": (
        "What is the module {name}?",
        "What is the {name} module for?",
        "What is the {name} module in Python?",
        "what is the module {name} for",
        "What does the module {name} do?",
        "Tell me about the module {name}.",
        "模块 {name} 是做什么的？",
    ),
}


class Doc(NamedTuple):
    name: str  # json.dumps
    kind: str  # function, class or module
    answer: str


def first_sentence(docstring: str) -> str | None:
    """The first sentence in one line, or None if it is not worth learning (a signature, a stub, a
    very long one).
    """
    paragraphs = [
        " ".join(paragraph.split())
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    ]
    if (
        paragraphs
        and re.fullmatch(r"[\w.]+\(.*\)(\s*-+>.*)?", paragraphs[0])
        and len(paragraphs) > 1
    ):
        paragraphs.pop(0)  # a signature first, as in C modules
    text = re.sub(
        r"^[\w.]+\([^()]*\)\s*(->\s*[\w\[\], |]+?)?\s*(--|:)\s*",
        "",
        paragraphs[0] if paragraphs else "",
    )
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("`", "")
    text = re.split(r"(?<=[a-z0-9)\]'\"]\.)\s+(?=[A-Z(])", text, maxsplit=1)[0].strip()
    if (
        not MIN_ANSWER <= len(text) <= MAX_ANSWER
        or not re.match(r"[A-Z]", text)
        or text.endswith(":")
        or not text.isascii()
    ):
        return None
    if re.search(
        r">>>|^[\w.]+\(.*\)\s*-+>|\bDEPRECATED\b|^Helper\b|^See\b|Override "
        r"this|__\w+__$|\bhelp\(type\(self\)\)",
        text,
    ):
        return None
    return text if text.endswith((".", "!", "?")) else text + "."


def _public(name: str) -> bool:
    return not name.startswith("_")


def _from_source(path: Path, module: str) -> Iterator[Doc]:
    """The module, its public functions and classes, and the classes' public methods."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a deliberately broken file of somebody's
        return
    yield from _doc(module, "module", ast.get_docstring(tree))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and _public(
            node.name
        ):
            name = f"{module}.{node.name}"
            yield from _doc(
                name,
                "class" if isinstance(node, ast.ClassDef) else "function",
                ast.get_docstring(node),
            )
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)) and _public(
                    method.name
                ):
                    yield from _doc(f"{name}.{method.name}", "function", ast.get_docstring(method))


def _from_objects(module: str) -> Iterator[Doc]:
    """Functions and types of a module that has no source, and the methods of the types."""
    loaded = importlib.import_module(module)
    for key, value in sorted(vars(loaded).items()):
        if not _public(key) or not (inspect.isbuiltin(value) or isinstance(value, type)):
            continue
        if isinstance(value, type) and issubclass(value, BaseException) and value.__name__ != key:
            continue  # an alias: IOError is OSError
        name = key if module == "builtins" else f"{module}.{key}"
        yield from _doc(name, "class" if isinstance(value, type) else "function", value.__doc__)
        for method, function in (
            sorted(vars(value).items()) if isinstance(value, type) and module == "builtins" else ()
        ):
            if _public(method) and callable(function):
                yield from _doc(f"{name}.{method}", "function", function.__doc__)


def _doc(name: str, kind: str, docstring: object) -> Iterator[Doc]:
    answer = first_sentence(docstring) if isinstance(docstring, str) and docstring.strip() else None
    if answer:
        yield Doc(name, kind, answer)


@functools.lru_cache(maxsize=1)
def all_docs() -> tuple[Doc, ...]:
    """Every question that can be asked, sorted by name; the same for the same Python."""
    library = Path(sysconfig.get_paths()["stdlib"])
    docs: dict[str, Doc] = {}
    for module in BUILT_IN:
        docs.update((doc.name, doc) for doc in _from_objects(module))
    for top in sorted(sys.stdlib_module_names):
        if not _public(top) or top in SKIPPED:
            continue
        files = (
            [library / f"{top}.py"]
            if (library / f"{top}.py").is_file()
            else sorted((library / top).rglob("*.py"))
        )
        for path in files:
            parts = path.relative_to(library).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if all(_public(part) and part not in ("test", "tests") for part in parts):
                docs.update((doc.name, doc) for doc in _from_source(path, _spoken(".".join(parts))))
    unique: dict[
        str, Doc
    ] = {}  # one name per answer: boiler-plate shared by many methods teaches nothing
    for doc in sorted(docs.values(), key=lambda doc: (doc.name.count("."), doc.name)):
        unique.setdefault(doc.answer, doc)
    return tuple(sorted(unique.values()))


def _spoken(module: str) -> str:
    """How people call it."""
    return "os.path" if module == "posixpath" else module


class PyDocs(Task):
    """Questions about names of the standard library; finite: an epoch asks for each name once."""

    def __init__(self, split: str = "train", **view: int) -> None:
        super().__init__(**view)
        self.split = check_split(split)

    @functools.cached_property
    def docs(self) -> list[Doc]:
        docs = [doc for doc in all_docs() if split_of("pydocs", doc.name) == self.split]
        random.Random(derive_seed("pydocs", self.split)).shuffle(docs)
        return docs

    def num_examples(self) -> int:
        return len(self.docs)

    def get_example(self, index: int) -> Conversation:
        doc = self.docs[index]
        questions = QUESTIONS[doc.kind]
        return chat(
            questions[derive_seed("phrasing", doc.name) % len(questions)].format(name=doc.name),
            doc.answer,
            name=doc.name,
        )

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether at least half of the words are those of the docstring (F1 over words, case and
        order aside).
        """
        expected = _words(conversation["messages"][-1]["content"])
        said = _words(visible_text(completion))
        return (
            bool(expected & said) and 2 * len(expected & said) / (len(expected) + len(said)) >= 0.5
        )


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9_]+", text.lower()))
