"""Find the commands in any text (a message, a docstring, a page) and check that they parse.

Placeholders are filled in first. The program that a command names then parses it.

A command in backticks ends at the closing backtick. Any other command ends at the end of its line,
at two spaces (a column of descriptions) or at punctuation. A command that is not set off from its
sentence therefore swallows words of it, which its parser refuses.
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from zangchat import configurator

ROOT = Path(__file__).resolve().parents[1]
OURS = ("zangchat", "scripts", "tasks", "dev")
SUFFIXES = (".py", ".sh", ".sbatch", ".yaml", ".yml", ".rs")
FOREIGN = ("lm_eval", "pip", "pytest", "venv")  # modules of other projects that a text may name
SHELL = ("source", "lm_eval")  # first words of documented lines that other tests run
OPEN = "\ue000"  # placeholder for a value that a program fills in
VARIABLE = r"[A-Z][A-Z_]*=(?:'[^']*'|\"[^\"]*\"|[^\s'\"`]+)"
START = re.compile(
    rf"(?P<tick>`)?(?P<line>(?:(?<![\w/.-]){VARIABLE}[ ]+)*(?<![\w/.-])"
    r"(?:python3?[ ]-m[ ](?=\S)|bash[ ](?=[\w./$~-]*\.sh\b)|torchrun[ ](?=-)"
    r"|sbatch[ ](?=-|\S+\.sbatch\b)))"
)
PROSE = re.compile(
    r"[ ]{2,}|[ ]#|[,;:)](?=\s|$)|\.(?=\s|$)(?<!\.\.\.)|[ ](?:\||&&|\|\||2?>)[ ]|['\"]?\\n",
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = {  # subcommand -> its config class
    ("zangchat.dataset", "verify"): "VerifyConfig",
    ("zangchat.dataset", "tokenize"): "TokenizeConfig",
}
SAMPLES: dict[Any, str] = {int: "4", float: "0.5", bool: "1", Path: "a.jsonl"}


def find(text: str) -> list[str]:
    """Return the commands in a text, in order."""
    if not any(start in text for start in ("python", "bash ", "torchrun ", "sbatch ")):
        return []
    text = re.sub(r"\\\n[#\s]*", "", ANSI.sub("", text))
    found, end = [], 0
    for match in START.finditer(text):
        if match.start("line") >= end:  # not inside the previous command
            found.append(_cut(text[match.start("line") :].partition("\n")[0], bool(match["tick"])))
            end = match.start("line") + len(found[-1])
    return found


def _cut(line: str, ticks: bool) -> str:
    """The command at the beginning of a line."""
    if ticks:
        return line.partition("`")[0].strip()
    quoted = [match.span() for match in re.finditer(r"'[^']*'|\"[^\"]*\"", line)]
    for end in PROSE.finditer(line):
        if not any(start < end.start() < stop for start, stop in quoted):
            line = line[: end.start()]
            break
    return line.partition("`")[0].strip()


def problem(line: str) -> str:
    """Why a command is invalid, in the words of its own parser; empty if it is valid."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return f"the shell does not read it ({error})"
    variables = []
    while words and re.fullmatch(r"[A-Z][A-Z_]*=.*", words[0], re.DOTALL):
        variables.append(words.pop(0).partition("=")[0])
    if not words:
        return "no command after its variables"
    program, *arguments = words
    if program in ("bash", "sbatch", "sky"):
        return _script_problem(arguments, variables)
    if unread := [name for name in variables if name not in all_names()]:
        return f"nothing reads {', '.join(unread)}"
    if program == "torchrun":
        return _torchrun_problem(arguments)
    if program in ("python", "python3"):
        return _module_problem(arguments[1:]) if arguments[:1] == ["-m"] else "it needs -m"
    return "" if program in SHELL else f"unknown command {program}"


def _script_problem(arguments: list[str], variables: list[str]) -> str:
    scripts = [i for i, word in enumerate(arguments) if word.endswith((".sh", ".sbatch", ".yaml"))]
    place = min(scripts, default=None)
    if place is None:
        return "it names no script"
    name = arguments[place]
    path = ROOT / name
    if not path.is_file():
        return f"there is no {name}"
    script = path.read_text(encoding="utf-8")
    read = script + "".join(text_of_script(other) for other in re.findall(r"[\w/]+\.sh\b", script))
    for before, word in zip(arguments, arguments[1:], strict=False):  # sky launch --env NAME=value
        variables += [word.partition("=")[0]] if before == "--env" else []
    for word in arguments:
        if word.startswith("--export="):
            variables += [part.partition("=")[0] for part in word.split(",") if "=" in part][1:]
    if unread := [variable for variable in variables if not re.search(rf"\b{variable}\b", read)]:
        return f"{name} does not read {', '.join(unread)}"
    for word in arguments[place + 1 :]:
        if name.endswith(".sh") and not _takes(script, word):
            return f"{name} does not take {word}"
    return ""


def text_of_script(name: str) -> str:
    path = next((path for path in (ROOT / name, ROOT / "dev" / name) if path.is_file()), None)
    return path.read_text(encoding="utf-8") if path else ""


def _takes(script: str, word: str) -> bool:
    """Whether a script forwards its arguments or has a case for this one."""
    case = rf"^\s*(?:\S+\|)*\"?{re.escape(word)}\"?(?:\|\S+)*\) "
    return '"$@"' in script or bool(re.search(case, script, re.MULTILINE))


def _torchrun_problem(arguments: list[str]) -> str:
    module = arguments[arguments.index("-m") + 1 :] if "-m" in arguments else []
    if not module:
        return "it names no module"
    if module[1:] and module[1] != "--":  # torchrun takes --run for an abbreviation of its own flag
        return "it needs `--` after the module"
    return _module_problem(module)


def entry_point(name: str) -> ModuleType:
    """The module that `python -m NAME` runs."""
    package = (
        importlib.util.find_spec(f"{name}.__main__")
        if importlib.util.find_spec(name).submodule_search_locations
        else None
    )
    return importlib.import_module(f"{name}.__main__" if package else name)


def _module_problem(words: list[str]) -> str:
    """`module flags...` as the module itself would parse it."""
    name, *arguments = words
    if name in FOREIGN:
        return ""
    if name.partition(".")[0] not in OURS or importlib.util.find_spec(name) is None:
        return f"there is no module {name}"
    module = entry_point(name)
    config = COMMANDS.get((name, arguments[0])) if arguments else None
    if config:
        arguments = arguments[1:]
    found = getattr(module, config or "Config", None)
    if found is None:
        return f"{name} has no flags" if arguments else ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            configurator.parse(found, _filled(arguments, found))
    except configurator.UserError as error:
        return str(error)
    except SystemExit:  # --help
        return ""
    return ""


def _filled(arguments: list[str], config: type) -> list[str]:
    """Replace placeholders (OPEN, N, PATH and the like) by plausible values."""
    flags = {f"--{flag.name}": flag for flag in configurator._flags(config)}
    flags |= {alias: flag for flag in flags.values() for alias in flag.aliases}
    present = {configurator._spelling(word) for word in arguments}
    more = "..." in arguments
    missing = [f"--{flag.name}=d4" for flag in flags.values() if flag.required and more]
    filled = [word for word in missing if configurator._spelling(word) not in present]
    for word in arguments:
        word = word.strip("[]") if word[:1] == "[" or word[-1:] == "]" else word
        flag = flags.get(configurator._spelling(word))
        last = filled[-1] if filled and "=" not in filled[-1] else ""
        before = flags.get(configurator._spelling(last))
        if word == "..." or (word.startswith(OPEN) and before is None):
            continue  # stands for further flags
        if flag is not None and "=" in word:
            name, _, value = word.partition("=")
            word = f"{name}={_plausible(value, flag.hint)}"
        elif flag is None and before is not None:
            word = _plausible(word, before.hint)
        filled.append(word)
    return filled


def _plausible(value: str, hint: Any) -> str:
    if OPEN not in value and not re.fullmatch(r"[A-Z]+", value):
        return value
    for option in configurator._options(hint):
        if get_origin(option) is Literal:
            choices = [str(choice) for choice in get_args(option)]
            return value if value in choices else choices[0]
        if option in SAMPLES:
            return SAMPLES[option]
    return value.replace(OPEN, "d4")


def is_open(line: str) -> bool:
    """Whether the module name is a placeholder, so that only the printed command can be parsed."""
    return bool(re.search(rf" -m( \S*(?:{OPEN}|\b[A-Z]+\b)|$)", line))


@functools.cache
def all_names() -> set[str]:
    """All upper-case words in the sources, which include every environment variable they read."""
    texts = (path.read_text(encoding="utf-8") for path in sources())
    return {name for text in texts for name in re.findall(r"[A-Z][A-Z_]+", text)}


def sources() -> Iterator[Path]:
    """The Python, shell and Rust sources and the configuration files of other programs."""
    for folder in (*OURS, "rustbpe", "ruststep", ".github", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and "target" not in path.parts:
                yield path
    yield from sorted(ROOT.glob("*.sh"))
