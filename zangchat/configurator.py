"""Dataclass -> command line, for every script (no torch, so that `--help` answers at once).

A script states its flags once, as a dataclass: the comment after a field is its help text.

    @dataclass
    class Config(RunConfig):
        depth: int = 20  # layers of the model
        prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None  # ask this and leave

    def main(argv: Sequence[str] | None = None) -> int:
        return configurator.run(Config, train, argv)

Spellings: `--device_batch_size=8`, `--device-batch-size 8`; booleans `--dry_run`, `--dry_run=1/0`,
`=true/false`, `--no_dry_run`; a lone `--` is skipped; of a repeated flag the last one counts.
Types: int, float, str, bool, Path, Literal, and unions of them with None. tyro writes the help;
values are read here, so that every mistake gets one sentence instead of a panel.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from zangchat.config import MIN_TEMPERATURE, USER_LIMITS
from zangchat.errors import DISK_ERRORS, UserError
from zangchat.runtime.files import expand_home
from zangchat.runtime.logs import setup_default_logging
from zangchat.runtime.processes import (
    INTERRUPTED,
    compute_cleanup,
    interruptible_imports,
    is_stdout_closed,
    note_failure,
    prepare_hub,
    prepare_streams,
    prepare_threads,
    print_error,
    report_failure,
)

C = TypeVar("C")

FAILED = 1  # exit codes
USER_ERROR = 2
BROKEN_PIPE = 141  # as a shell reports a writer whose reader has closed the pipe
BOOLEANS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}

# Names in other trainers for our flags. A command suggests those that it has.
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr")
OTHER_NAMES = {
    "learning_rate": RATES,
    "lr": RATES,
    "batch_size": ("device_batch_size", "total_batch_size"),
    "steps": ("num_iterations",),
    "max_steps": ("num_iterations",),
    "max_iters": ("num_iterations",),
    "epochs": ("num_epochs", "num_iterations"),
    "data": ("data_path", "dataset"),
    "n_layer": ("depth",),
    "block_size": ("max_seq_len",),
    "resume_step": ("resume",),
}
# Flags of other trainers that have no counterpart in a training command, and why.
ABSENT = {
    "num_workers": "one thread reads and packs text ahead of training, and there is nothing to set",
    "aspect_ratio": "the width follows from --depth, and --n_embd sets another",
    "output_dir": "--model_tag names the folder of a run, which is below ZANGCHAT_BASE_DIR",
    "dropout": "there is no dropout, since text is read about once",
    "eval_metrics_max_problems": "tasks are scored after training, by `python -m scripts.chat_eval "
    "-x PROBLEMS`",
}


def run(
    config_cls: type[C], command: Callable[[C], int | None], argv: Sequence[str] | None = None
) -> int:
    """The entry point of every script: parse `argv`, call `command(config)`, return the exit code.

    `argv` is the process's by default. A UserError, or a disk that is full or forbidden, becomes
    one line on stderr and code 2, Ctrl-C code 130; every other exception keeps its traceback, on
    the first rank that fails. A command that succeeded leaves the process group.
    """
    prepare_streams()
    prepare_threads()
    prepare_hub()
    try:
        try:
            config = parse(config_cls, argv)
        except SystemExit as stop:  # --help was answered
            return int(stop.code or 0)
        setup_default_logging()
        with interruptible_imports():
            code = command(config) or 0
        compute_cleanup()
        return code
    except UserError as error:
        note_failure()
        print_error(f"error: {error}")
        return USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_stdout_closed():
            return BROKEN_PIPE
        if error.errno not in DISK_ERRORS:
            if report_failure(error):
                raise
            return FAILED
        note_failure()
        remedy = "make room, or set ZANGCHAT_BASE_DIR to a folder on a disk that takes it"
        print_error(f"error: {error}: {remedy}")
        return USER_ERROR
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        if report_failure(error):
            raise
        return FAILED


def parse(config_cls: type[C], argv: Sequence[str] | None = None) -> C:
    """`argv` (default: sys.argv[1:]) -> an instance of the dataclass.

    Raises UserError; `--help` prints and raises SystemExit(0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = {flag.name: flag for flag in _flags(config_cls)}
    texts, positionals = _read(arguments, flags)
    if any(argument in ("-h", "--help") for argument in positionals):
        return _print_help(config_cls)
    names = [flag.name for flag in flags.values() if flag.positional]
    texts |= dict(zip(names, positionals, strict=False))
    missing = [flag.spelling for flag in flags.values() if flag.required and flag.name not in texts]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given; {_help_hint()}")
    try:
        return config_cls(**{name: flags[name].value(text) for name, text in texts.items()})
    except ValueError as error:  # the dataclass's own check, in __post_init__
        raise UserError(str(error)) from None


def list_flags(config_cls: type) -> list[str]:
    """Every flag in the order of its field, followed by its aliases: ["--depth", "--prompt -p"].

    A positional has no dashes.
    """
    return [" ".join((flag.spelling, *flag.aliases)) for flag in _flags(config_cls)]


def check_range(least: int, config: Any, *names: str, most: float = math.inf) -> None:
    """Raises UserError for the first flag below `least` or above `most`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            bound = f" and at most {most}" if most < math.inf else ""
            raise UserError(f"--{name}={value} is not possible: give at least {least}{bound}")


def check_folder_name(flag: str, name: str) -> None:
    """Raises UserError for a value of `flag` that cannot name a folder."""
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        expected = "use letters, digits and . _ + -, and begin with no dot"
        raise UserError(f"{flag}={name!r} cannot name a folder: {expected}")


def check_fraction(config: Any, *names: str) -> None:
    """Raises UserError for the first flag that is not above 0 and at most 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value <= 1:
            expected = "give a number above 0 and at most 1"
            raise UserError(f"--{name}={value:g} is not possible: {expected}")


def check_sampling(config: Any) -> None:
    """Raises UserError for the first of a command's sampling flags that is outside of its
    limits.
    """
    for name in ("max_tokens", "temperature", "top_k", "top_p"):
        value, limits = getattr(config, name, None), USER_LIMITS[name]
        if value is not None and not limits.allow(value):
            raise UserError(f"--{name}={value:g} is not possible: give a number {limits}")


def all_alike(config: Any) -> str:
    """The sampling flag for which all samples of a prompt are equal; "" if they differ."""
    if config.temperature < MIN_TEMPERATURE:
        return f"--temperature={config.temperature:g}"
    return "--top_k=1" if config.top_k == 1 else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The flags and their values as JSON has them: paths are strings."""
    values = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def as_flags(config: Any) -> list[str]:
    """The flags that give this configuration: those not at their defaults. Undone by `parse`."""
    fields = ((f.name, getattr(config, f.name), f.default) for f in dataclasses.fields(config))
    return [
        f"--{name}={int(value) if isinstance(value, bool) else value}"
        for name, value, default in fields
        if value != default
    ]


# ---- flags of a dataclass ------------------------------------------------------------------------

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    bool: "true or false",
    types.NoneType: "None",
}


@dataclasses.dataclass
class _Flag:
    name: str  # the field's name, underscores
    hint: Any  # its type, Annotated stripped
    aliases: tuple[str, ...]  # "-p"
    required: bool
    positional: bool

    @property
    def is_bool(self) -> bool:
        return bool in _options(self.hint)

    @property
    def spelling(self) -> str:
        return self.name if self.positional else f"--{self.name}"

    def value(self, text: str) -> Any:
        """The text as the first type of the hint that it can be. Raises UserError."""
        options = _options(self.hint)
        # "None" of `str | None` is None
        for option in sorted(options, key=lambda option: option is not types.NoneType):
            with contextlib.suppress(ValueError):
                value = _convert(option, text)
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"--{self.name}={text} is not possible: give a finite number")
                return value
        given = repr(text) if self.positional else f"--{self.name}={text}"
        raise UserError(f"{given} is not understood: expected {self.expectation()}")

    def expectation(self) -> str:
        """Its type in words."""
        words = []
        for option in _options(self.hint):
            if get_origin(option) is Literal:
                words.append("one of " + ", ".join(str(choice) for choice in get_args(option)))
            else:
                words.append(WORDS.get(option, str(option)))
        return " or ".join(words)


def _convert(option: Any, text: str) -> Any:
    """Raises ValueError if the text is not of this type."""
    if get_origin(option) is Literal:
        choices = {str(choice): choice for choice in get_args(option)}
    elif option is types.NoneType:
        choices = {"None": None}
    elif option is bool:
        choices, text = BOOLEANS, text.lower()
    elif option is Path:
        return expand_home(text)  # in --flag=~/file the shell leaves it
    elif option in (int, float, str):
        return option(text)
    else:
        raise TypeError(f"a flag cannot be of type {option}")
    if text not in choices:
        raise ValueError(text)
    return choices[text]


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
        aliases = (alias for item in metadata for alias in getattr(item, "aliases", None) or ())
        defaults = (field.default, field.default_factory)
        yield _Flag(
            name=field.name,
            hint=hint,
            aliases=tuple(aliases),
            required=all(default is dataclasses.MISSING for default in defaults),
            positional=any(item == tyro.conf.Positional for item in metadata),
        )


def _read(arguments: list[str], flags: dict[str, _Flag]) -> tuple[dict[str, str], list[str]]:
    """Command line -> ({flag name: its text}, positionals).

    Raises UserError for arguments that cannot be meant.
    """
    spellings = {f"--{name}": name for name, flag in flags.items() if not flag.positional}
    spellings |= {alias: name for name, flag in flags.items() for alias in flag.aliases}
    negations = {f"--no_{name}": name for name, flag in flags.items() if flag.is_bool}
    allowed_positionals = sum(flag.positional for flag in flags.values())
    texts: dict[str, str] = {}
    positionals: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            continue
        if argument in ("-h", "--help"):
            return {}, [argument]
        spelling = _spelling(argument)
        known = spelling in spellings or spelling in negations
        if not argument.startswith("-") or (not known and _is_number(argument)):
            positionals.append(argument)
            if len(positionals) > allowed_positionals:
                usage = "values are written --flag=value or --flag value"
                raise UserError(f"{argument!r} belongs to no flag: {usage}; {_help_hint()}")
        elif spelling in negations:
            if "=" in argument:
                raise UserError(f"{spelling} takes no value; {_help_hint()}")
            texts[negations[spelling]] = "false"
        elif spelling in spellings:
            flag = flags[spellings[spelling]]
            texts.pop(flag.name, None)  # the last one counts, in its place
            if flag.is_bool:
                texts[flag.name] = _boolean(argument, [] if allowed_positionals else queue)
            else:
                texts[flag.name] = _text(argument, flag, queue, spellings)
        else:
            raise UserError(_unknown(argument.partition("=")[0], [*spellings, *negations]))
    return texts, positionals


def _boolean(argument: str, queue: list[str]) -> str:
    """The value of a boolean flag; one that is its own argument is taken from the queue."""
    spelling, (_, equals, text) = _spelling(argument), argument.partition("=")
    words = (*BOOLEANS, "none")  # the last for `bool | None`
    if not equals:
        text = queue.pop(0) if queue and queue[0].lower() in words else "true"
    if text.lower() not in words:
        usage = f"write {spelling}, {spelling}=1 or {spelling}=0"
        raise UserError(f"{spelling}={text} is not understood: {usage}")
    return text.replace("none", "None")


def _text(argument: str, flag: _Flag, queue: list[str], spellings: dict[str, str]) -> str:
    """The value of any other flag, from its own argument or the next in the queue."""
    _, equals, text = argument.partition("=")
    if equals:
        return text
    if not queue or _spelling(queue[0]) in spellings or queue[0].startswith("--"):
        expected = f"{_spelling(argument)} needs a value: {flag.expectation()}"
        raise UserError(f"{expected}; {_help_hint()}")
    return queue.pop(0)


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
    meant = meant or difflib.get_close_matches(spelling, known, n=1, cutoff=0.7)
    if name in ABSENT and "--num_iterations" in known:
        advice = f": {ABSENT[name]}"
    elif len(meant) > 1:
        advice = f", there are {('two', 'three')[len(meant) - 2]}: {', '.join(meant)}"
    else:
        advice = f", did you mean {meant[0]}?" if meant else ""
    return f"unknown flag {flag}{advice} ({_help_hint()})"


# ---- help ----------------------------------------------------------------------------------------


def _print_help(config_cls: type[C]) -> C:
    """Raises SystemExit."""
    return tyro.cli(
        config_cls,
        args=["--help"],
        prog=_program(),
        description=_description(config_cls),
        use_underscores=True,
    )


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
