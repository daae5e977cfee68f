"""Dataclass -> command line, for every script (layer 0: no torch, so `--help` answers at once).

A script states its flags once, as a dataclass: the comment after a field is its help, the default its default.

    @dataclass
    class Config(RunConfig):
        depth: int = 20  # layers of the model
        prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None  # ask this and leave

    def main(argv: Sequence[str] | None = None) -> int:
        return configurator.run(Config, train, argv)

Spellings: `--device_batch_size=8`, `--device-batch-size 8`; booleans `--dry_run`, `--dry_run=1/0`, `=true/false`, `--no_dry_run`; a lone
`--` is skipped; of a repeated flag the last one counts. tyro converts the values and writes the help; the flags are checked here first,
so that every mistake gets one sentence instead of a panel.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from zangchat.config import USER_LIMITS
from zangchat.errors import UserError
from zangchat.runtime.logs import setup_default_logging

C = TypeVar("C")

DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}
USER_ERROR = 2  # exit codes
INTERRUPTED = 130
READER_LEFT = 141  # as a shell names the end of what wrote into a closed pipe
BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

# What other trainers call our flags. A command suggests those of them that it has.
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr")
OTHER_NAMES = {
    "learning_rate": RATES,
    "lr": RATES,
    "batch_size": ("device_batch_size", "total_batch_size"),
    "max_steps": ("num_iterations",),
    "max_iters": ("num_iterations",),
    "n_layer": ("depth",),
    "block_size": ("max_seq_len",),
    "resume_step": ("resume",),
}
# Flags of other trainers that have no counterpart in a training command, and why.
ABSENT = {
    "num_workers": "one thread reads and packs text ahead of training, and there is nothing to set",
    "dropout": "there is no dropout, since text is read about once",
    "eval_metrics_max_problems": "tasks are scored after training, by `python -m scripts.chat_eval -x PROBLEMS`",
}


def run(config_cls: type[C], command: Callable[[C], int | None], argv: Sequence[str] | None = None) -> int:
    """The entry point of every script: parse `argv` (default: the process's), call `command(config)`, return the exit code.

    A UserError, or a disk that is full or forbidden, becomes one line on stderr and code 2, Ctrl-C code 130; every other exception keeps
    its traceback.
    """
    _settle_streams()
    try:
        try:
            config = parse(config_cls, argv)
        except SystemExit as stop:  # --help was answered
            return int(stop.code or 0)
        setup_default_logging()
        return command(config) or 0
    except UserError as error:
        _complain(f"error: {error}")
        return USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return READER_LEFT
        if error.errno not in DISK_REFUSES:
            raise
        _complain(f"error: {error}: make room, or set ZANGCHAT_BASE_DIR to a folder on a disk that takes it")
        return USER_ERROR
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def _reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more, as `| head` leaves it. What is still buffered goes nowhere, then."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _settle_streams() -> None:
    """So that no character stops a command: Windows gives files and pipes an encoding that lacks most of them (a terminal keeps its own),
    and half of a character may be typed or piped."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 (what was closed, as by `<&-`)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    chosen = "PYTHONIOENCODING" in os.environ
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if chosen or stream.isatty() else "utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # the program that calls this has read of it already
            sys.stdin.reconfigure(errors="replace")


def _complain(message: str) -> None:
    rank = os.environ.get("RANK") or "0"
    sys.stdout.flush()
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)


def parse(config_cls: type[C], argv: Sequence[str] | None = None) -> C:
    """`argv` (default: sys.argv[1:]) -> an instance of the dataclass. Raises UserError; `--help` prints and raises SystemExit(0)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = {flag.name: flag for flag in _flags(config_cls)}
    given, positionals = _read(arguments, flags)
    if any(argument in ("-h", "--help") for argument in positionals):
        return _tyro(config_cls, ["--help"])
    missing = [f"--{flag.name}" for flag in flags.values() if flag.required and not flag.positional and flag.name not in given]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; {_help_hint()}")
    tokens = [flags[name].token(value) for name, value in given.items()]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = _tyro(config_cls, [*positionals, *tokens])
    except SystemExit as stop:
        raise UserError(_diagnose(config_cls, flags, given, positionals, stop, errors.getvalue())) from None
    for name, value in given.items():
        if isinstance(number := getattr(config, name), float) and not math.isfinite(number):
            raise UserError(f"--{name}={value} is not possible: give a finite number")
    return config


def list_flags(config_cls: type) -> list[str]:
    """Every flag in the order of its field, aliases behind it: ["--depth", "--prompt -p"]; a positional without dashes."""
    return [" ".join((flag.name if flag.positional else f"--{flag.name}", *flag.aliases)) for flag in _flags(config_cls)]


def check_range(least: int, config: Any, *names: str, most: float = math.inf) -> None:
    """Raises UserError for the first of these flags that is below `least` or above `most`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            bound = f" and at most {most}" if most < math.inf else ""
            raise UserError(f"--{name}={value} is not possible: give at least {least}{bound}")


def check_fraction(config: Any, *names: str) -> None:
    """Raises UserError for the first of these flags that is not above 0 and at most 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value <= 1:
            raise UserError(f"--{name}={value:g} is not possible: give a number above 0 and at most 1")


def check_sampling(config: Any) -> None:
    """Raises UserError for the first of a command's sampling flags that is outside of its limits."""
    for name in ("max_tokens", "temperature", "top_k", "top_p"):
        value, limits = getattr(config, name, None), USER_LIMITS[name]
        if value is not None and not limits.allow(value):
            raise UserError(f"--{name}={value:g} is not possible: give a number {limits}")


def to_dict(config: Any) -> dict[str, Any]:
    """The flags and their values as JSON knows them: paths are strings."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(config).items()}


def as_flags(config: Any) -> list[str]:
    """The flags that give this configuration: those that are not at their defaults. The way back is `parse`."""
    values = ((f.name, getattr(config, f.name), f.default) for f in dataclasses.fields(config))
    return [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value, default in values if value != default]


# ---- flags of a dataclass -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Flag:
    name: str  # the field's name, underscores
    hint: Any  # its type, Annotated stripped
    aliases: tuple[str, ...]  # "-p"
    required: bool
    positional: bool

    @property
    def is_bool(self) -> bool:
        return self.hint is bool

    def token(self, value: str) -> str:
        """What tyro is to read: one unambiguous spelling, so that a value may begin with a dash."""
        if self.is_bool:
            return f"--{self.name}" if BOOLEANS[value.lower()] else f"--no_{self.name}"
        if bool in _options(self.hint):  # or None; tyro knows True and False alone
            value = str(BOOLEANS.get(value.lower(), value))
        return f"--{self.name}={value}"

    def expectation(self) -> str:
        """Its type in words."""
        names = {int: "a whole number", float: "a number", str: "a text", Path: "a path", bool: "true or false", type(None): "None"}
        words = []
        for option in _options(self.hint):
            if get_origin(option) is Literal:
                words.append("one of " + ", ".join(str(choice) for choice in get_args(option)))
            else:
                words.append(names.get(option, str(option)))
        return " or ".join(words)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _flags(config_cls: type) -> Iterator[_Flag]:
    hints = get_type_hints(config_cls, include_extras=True)
    for field in dataclasses.fields(config_cls):
        if not field.init:
            continue
        hint = hints[field.name]
        metadata: tuple[Any, ...] = ()
        if get_origin(hint) is Annotated:
            hint, metadata = get_args(hint)[0], hint.__metadata__
        yield _Flag(
            name=field.name,
            hint=hint,
            aliases=tuple(alias for item in metadata for alias in getattr(item, "aliases", None) or ()),
            required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            positional=any(item == tyro.conf.Positional for item in metadata),
        )


def _read(arguments: list[str], flags: dict[str, _Flag]) -> tuple[dict[str, str], list[str]]:
    """Command line -> ({flag name: its value}, what is no flag). Raises UserError for what cannot be meant."""
    spellings = {f"--{name}": name for name, flag in flags.items() if not flag.positional}
    spellings |= {alias: name for name, flag in flags.items() for alias in flag.aliases}
    negations = {f"--no_{name}": name for name, flag in flags.items() if flag.is_bool}
    allowed_positionals = sum(flag.positional for flag in flags.values())
    given: dict[str, str] = {}
    positionals: list[str] = []
    queue = list(arguments)

    def is_flag(argument: str) -> bool:
        return _spelling(argument) in spellings or argument.startswith("--")

    while queue:
        argument = queue.pop(0)
        if argument == "--":
            continue
        if argument in ("-h", "--help"):
            return {}, [argument]
        spelling, equals, value = _spelling(argument), "=" in argument, argument.partition("=")[2]
        if not argument.startswith("-") or (spelling not in spellings | negations and _is_number(argument)):
            positionals.append(argument)
            if len(positionals) > allowed_positionals:
                raise UserError(f"{argument!r} belongs to no flag: values are written --flag=value or --flag value; {_help_hint()}")
        elif spelling in negations:
            if equals:
                raise UserError(f"{spelling} takes no value; {_help_hint()}")
            given[negations[spelling]] = "false"
        elif spelling not in spellings:
            raise UserError(_unknown(argument.partition("=")[0], [*spellings, *negations]))
        else:
            flag = flags[spellings[spelling]]
            given.pop(flag.name, None)  # the last one counts, in its place
            if flag.is_bool:
                if not equals:
                    value = queue.pop(0) if queue and queue[0].lower() in BOOLEANS and not allowed_positionals else "true"
                if value.lower() not in BOOLEANS:
                    raise UserError(f"{spelling}={value} is not understood: write {spelling}, {spelling}=1 or {spelling}=0")
            elif not equals:
                if not queue or is_flag(queue[0]):
                    raise UserError(f"{spelling} needs a value: {flag.expectation()}; {_help_hint()}")
                value = queue.pop(0)
            given[flag.name] = value
    return given, positionals


def _spelling(argument: str) -> str:
    """`--device-batch-size=8` -> `--device_batch_size`; short aliases stay as they are."""
    flag = argument.partition("=")[0]
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


def _is_number(argument: str) -> bool:
    try:
        float(argument)
    except ValueError:
        return False
    return True


def _unknown(flag: str, known: list[str]) -> str:
    spelling = _spelling(flag)
    name = spelling.removeprefix("--")
    meant = [f"--{ours}" for ours in OTHER_NAMES.get(name, ()) if f"--{ours}" in known]
    meant = meant or difflib.get_close_matches(spelling, known, n=1, cutoff=0.6)
    if name in ABSENT and "--num_iterations" in known:
        advice = f": {ABSENT[name]}"
    elif len(meant) > 1:
        advice = f", there are {('two', 'three')[len(meant) - 2]}: {', '.join(meant)}"
    else:
        advice = f", did you mean {meant[0]}?" if meant else ""
    return f"unknown flag {flag}{advice} ({_help_hint()})"


def _diagnose(
    config_cls: type, flags: dict[str, _Flag], given: dict[str, str], positionals: list[str], stop: SystemExit, printed: str
) -> str:
    """Which flag tyro refused: each is tried alone. Otherwise the dataclass's own check (a ValueError in __post_init__) did."""
    required = [flag.token(given[name]) for name, flag in flags.items() if flag.required and name in given]
    for name, value in given.items():
        with contextlib.redirect_stderr(io.StringIO()) as alone:
            try:
                _tyro(config_cls, [*required, flags[name].token(value)])
                continue
            except SystemExit:
                pass
        if "Error parsing " + config_cls.__name__ not in alone.getvalue():
            return f"--{name}={value} is not understood: expected {flags[name].expectation()}"
    for value, flag in zip(positionals, (flag for flag in flags.values() if flag.positional), strict=False):
        if f"argument '{flag.name}'" in printed or f"parsing {flag.name.upper()}" in printed:
            return f"{value!r} is not understood: expected {flag.expectation()}"
    cause = stop.__context__
    if isinstance(cause, ValueError) and str(cause):
        return str(cause)
    text = " ".join(line.strip("│╭╰╮╯─ ") for line in printed.splitlines())
    return " ".join(text.split()) or f"these arguments are not understood; {_help_hint()}"


# ---- tyro -----------------------------------------------------------------------------------------------------------


def _tyro(config_cls: type[C], tokens: list[str]) -> C:
    return tyro.cli(config_cls, args=tokens, prog=_program(), description=_description(config_cls), use_underscores=True)


def _program() -> str:
    """How the user started this: `python -m scripts.base_train`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name not in ("pytest.__main__", "__main__"):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name or "python"


def _help_hint() -> str:
    return f"see {_program()} --help"


def _description(config_cls: type) -> str:
    """The first paragraph of the script's docstring."""
    module = sys.modules.get(config_cls.__module__)
    paragraph = ((module.__doc__ if module else None) or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())
