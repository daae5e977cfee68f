"""Command lines: every spelling a user may try, and one sentence for every mistake."""

import ast
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from scripts import base_train, chat_eval, chat_sft, chat_web
from zangchat import configurator
from zangchat.configurator import as_flags, list_flags, parse, to_dict
from zangchat.errors import UserError
from zangchat.runtime import processes
from zangchat.training.flags import RunConfig


@dataclass
class Config(RunConfig):
    depth: int = 20  # layers of the model
    matrix_lr: float = 0.02  # learning rate of the matrices
    device_batch_size: int = 32
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None  # ask this and leave
    top_k: Annotated[int | None, tyro.conf.arg(aliases=["-k"])] = 50
    kind: Literal["muon", "adamw"] = "muon"
    dry_run: bool = False  # print the plan and leave
    tools: bool = True
    folder: Path | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.depth == 13:
            raise ValueError("--depth=13 brings bad luck: take 12")


@dataclass
class Command:
    command: tyro.conf.Positional[Literal["download", "verify"]] = "download"
    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1


@dataclass
class Needy:
    depth: int
    width: int = 64


def error_of(*argv: str, cls: type = Config) -> str:
    with pytest.raises(UserError) as caught:
        parse(cls, argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- spellings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--device_batch_size=8"],
        ["--device-batch-size=8"],
        ["--device_batch_size", "8"],
        ["--device-batch-size", "8"],
        ["--", "--device_batch_size=8"],
        ["--device_batch_size=4", "--device_batch_size=8"],
    ],
)
def test_spellings_of_a_value(argv):
    assert parse(Config, argv) == Config(device_batch_size=8)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dry_run"], True),
        (["--dry-run"], True),
        (["--dry_run=1"], True),
        (["--dry_run=true"], True),
        (["--dry_run=True"], True),
        (["--dry_run", "1"], True),
        (["--dry_run=0"], False),
        (["--dry-run=false"], False),
        (["--dry_run", "false"], False),
        (["--dry_run", "--no_dry_run"], False),
        (["--no-dry-run"], False),
        ([], False),
    ],
)
def test_spellings_of_a_boolean(argv, expected):
    assert parse(Config, argv).dry_run is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("true", True), ("False", False), ("no", False), ("None", None)],
)
def test_a_boolean_that_may_be_left_open(value, expected):
    assert parse(Config, [f"--compile={value}"]).compile is expected
    assert "--compile=0" in error_of("--compile=perhaps")
    assert parse(Config, ["--compile", value]).compile is expected
    assert parse(Config, ["--compile", "--depth=4"]).compile is True
    assert parse(Config, ["--no_compile"]).compile is False


def test_a_boolean_that_is_on_by_default_can_be_switched_off():
    assert parse(Config, ["--tools=0"]).tools is False
    assert parse(Config, ["--tools"]).tools is True


@pytest.mark.parametrize(
    "argv", [["-p", "hello"], ["-p=hello"], ["--prompt=hello"], ["--prompt", "hello"]]
)
def test_aliases(argv):
    assert parse(Config, argv).prompt == "hello"


@pytest.mark.parametrize(
    "value", ["a=b", "--x=1 -- y", "-x", "-1", "", "with 'quotes' and \"more\"", "中文 ❤", "[a, b]"]
)
def test_a_text_arrives_as_it_is(value):
    assert parse(Config, [f"--prompt={value}"]).prompt == value


def test_a_value_may_begin_with_a_dash():
    config = parse(Config, ["--matrix_lr", "-1e-3", "--top_k", "-1", "-p", "-x"])
    assert (config.matrix_lr, config.top_k, config.prompt) == (-1e-3, -1, "-x")


def test_none_can_be_asked_for():
    assert parse(Config, ["-k", "None"]).top_k is None
    assert parse(Config, ["-k", "7"]).top_k == 7


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "1_000", 1000),
        (int, "+5", 5),
        (float, "1", 1.0),
        (float, ".5", 0.5),
        (str, "None", "None"),
        (str | None, "None", None),
        (str | None, "none", "none"),
        (Path | None, "a//b", Path("a/b")),
        (int | str, "3", 3),
        (int | str, "x", "x"),
        (int | Literal["auto"] | None, "auto", "auto"),
        (int | Literal["auto"] | None, "7", 7),
        (Literal[1, 2], "2", 2),
        (bool | None, "ON", True),
    ],
)
def test_a_text_becomes_the_first_type_of_the_field_that_it_can_be(hint, text, value):
    found = parse(make_dataclass("Made", [("flag", hint)]), [f"--flag={text}"]).flag
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"),
    [(int, "1.0"), (int, "0x10"), (int, ""), (float, "0x1p3"), (Literal[1, 2], "01")],
)
def test_no_other_spelling_is_a_number(hint, text):
    message = error_of(f"--flag={text}", cls=make_dataclass("Made", [("flag", hint)]))
    assert message.startswith(f"--flag={text} is not understood: expected ")


def test_a_field_of_another_type_is_misuse():
    with pytest.raises(TypeError, match="a flag cannot be of type"):
        parse(make_dataclass("Made", [("flag", list[int])]), ["--flag=3"])


@pytest.mark.parametrize("rank", ["1", "unknown"])
def test_an_error_names_the_rank_that_the_environment_has(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    assert configurator.run(Config, lambda config: None, ["--depth=x"]) == 2
    assert capsys.readouterr().err.startswith(f"[rank {rank}] error: --depth=x")


def test_positionals():
    assert parse(Command, ["verify", "-n", "3"]) == Command("verify", 3)
    assert parse(Command, ["-n", "-1"]) == Command("download", -1)


def test_flags_of_a_base_class_are_there():
    assert parse(Config, ["--resume=latest", "--seed=7", "--overwrite"]) == Config(
        resume="latest", seed=7, overwrite=True
    )


def test_a_path_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert parse(Config, ["--folder=~/texts"]).folder == Path("/home/of/mine/texts")


# -- mistakes --------------------------------------------------------------------------------------


def test_an_unknown_flag_names_the_closest_one():
    message = error_of("--device_batchsize=8")
    assert message.startswith("unknown flag --device_batchsize, did you mean --device_batch_size?")
    assert "--help" in message


def test_an_unknown_flag_without_a_close_one():
    assert "did you mean" not in error_of("--zzz")
    assert "unknown flag -q" in error_of("-q")


@pytest.mark.parametrize("command", ["base_train", "mid_train", "chat_sft", "chat_rl"])
@pytest.mark.parametrize("flag", ["--learning_rate=1e-4", "--learning-rate=1e-4", "--lr=1e-4"])
def test_the_learning_rate_of_other_trainers_names_the_three_there_are(command, flag):
    message = error_of(flag, cls=importlib.import_module(f"scripts.{command}").Config)
    assert message.startswith(
        f"unknown flag {flag[:-5]}, there are three: --matrix_lr, --embedding_lr, --unembedding_lr "
        "(see "
    )


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--batch_size=8", ", there are two: --device_batch_size, --total_batch_size ("),
        ("--max_steps=8", ", did you mean --num_iterations? ("),
        ("--steps=8", ", did you mean --num_iterations? ("),
        ("--epochs=8", ", did you mean --num_iterations? ("),
        ("--data=x", ", there are two: --data_path, --dataset ("),
        ("--aspect-ratio=64", ": the width follows from --depth, and --n_embd sets another ("),
        ("--output-dir=x", ": --model_tag names the folder of a run, which is below ZANGCHAT_BASE"),
        ("--n_layer=8", ", did you mean --depth? ("),
        ("--block_size=8", ", did you mean --max_seq_len? ("),
        ("--resume_step=10000", ", did you mean --resume? ("),
        (
            "--num_workers=4",
            ": one thread reads and packs text ahead of training, and there is nothing to set (",
        ),
        ("--dropout=0.1", ": there is no dropout, since text is read about once ("),
    ],
)
def test_names_of_other_trainers_lead_on(flag, answer):
    assert error_of(flag, cls=base_train.Config).startswith(
        f"unknown flag {flag.partition('=')[0]}{answer}"
    )


def test_names_of_other_trainers_are_suggested_only_where_their_flags_exist():
    for flag in ("--learning_rate=1", "--num_workers=4", "--dropout=0"):
        message = error_of(flag, cls=chat_web.Config)
        assert "_lr" not in message and "training" not in message and "text is" not in message
    assert "--batch_size" not in error_of("--learning_rate=1", cls=chat_eval.Config)
    assert "did you mean --batch_size?" in error_of("--batchsize=1", cls=chat_eval.Config)


def test_every_other_name_stands_for_flags_of_some_command():
    there = {
        flag.name
        for command in (base_train, chat_eval, chat_sft)
        for flag in configurator._flags(command.Config)
    }
    assert {name for names in configurator.OTHER_NAMES.values() for name in names} <= there
    assert not there & {*configurator.OTHER_NAMES, *configurator.ABSENT} - {
        "batch_size"
    }  # chat_eval has that one


def test_no_abbreviations():
    assert "unknown flag --dep" in error_of("--dep=3")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--depth=three"], ["--depth=three", "a whole number"]),
        (["--depth", "1.5"], ["--depth=1.5", "a whole number"]),
        (["--matrix_lr=fast"], ["--matrix_lr=fast", "a number"]),
        (["--matrix_lr=nan"], ["--matrix_lr=nan", "finite"]),
        (["--matrix_lr", "1e999"], ["--matrix_lr=1e999", "finite"]),
        (["--kind=sgd"], ["--kind=sgd", "one of muon, adamw"]),
        (["--top_k=many"], ["--top_k=many", "a whole number or None"]),
        (["--dry_run=maybe"], ["--dry_run=maybe", "--dry_run=0"]),
        (["--no_dry_run=1"], ["--no_dry_run", "no value"]),
        (["--seed=1", "--depth=x", "--kind=muon"], ["--depth=x"]),
    ],
)
def test_a_bad_value_names_flag_value_and_expectation(argv, parts):
    message = error_of(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "argv", [["--depth"], ["--depth", "--dry_run"], ["-p", "--dry_run"], ["--prompt", "-k", "3"]]
)
def test_a_missing_value(argv):
    assert f"{argv[0]} needs a value" in error_of(*argv)


def test_a_stray_word():
    assert "'gpu' belongs to no flag" in error_of("gpu")
    assert "belongs to no flag" in error_of("--depth=3", "4")


def test_a_bad_positional_names_the_choices():
    assert (
        error_of("verfy", cls=Command)
        == "'verfy' is not understood: expected one of download, verify"
    )
    assert "'more' belongs to no flag" in error_of("verify", "more", cls=Command)


def test_a_missing_required_flag():
    positional = make_dataclass("Made", [("what", tyro.conf.Positional[str])])
    assert error_of(cls=positional).startswith("what must be given")
    assert "--depth must be given" in error_of(cls=Needy)
    assert "--width=x" in error_of("--depth=3", "--width=x", cls=Needy)


def test_a_check_of_the_dataclass_is_passed_on():
    assert error_of("--depth=13", "--seed=3") == "--depth=13 brings bad luck: take 12"


# -- the entry point -------------------------------------------------------------------------------


def test_run_returns_what_the_command_returns():
    assert configurator.run(Config, lambda config: None, []) == 0
    assert configurator.run(Config, lambda config: config.depth, ["--depth=3"]) == 3


def test_a_user_error_is_one_line_and_code_2(capsys):
    def command(config: Config) -> int:
        raise UserError("no tokenizer: run `python -m scripts.tok_train`")

    assert configurator.run(Config, command, []) == 2
    assert capsys.readouterr().err == "error: no tokenizer: run `python -m scripts.tok_train`\n"
    assert configurator.run(Config, command, ["--dept=1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_code_130(capsys):
    def command(config: Config) -> int:
        raise KeyboardInterrupt

    assert configurator.run(Config, command, []) == 130
    assert "interrupted" in capsys.readouterr().err


def test_other_exceptions_pass():
    with pytest.raises(ZeroDivisionError):
        configurator.run(Config, lambda config: 1 // 0, [])


def test_a_disk_that_is_full_or_forbidden_is_one_line_and_code_2(tmp_path, capsys):
    def command(config: Config) -> None:
        with open("/dev/full", "w", buffering=1) as file:
            file.write("a line\n")

    assert configurator.run(Config, command, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left" in error and "ZANGCHAT_BASE_DIR" in error
    with pytest.raises(FileNotFoundError):  # a missing file is a command's own business
        configurator.run(Config, lambda config: open(tmp_path / "nothing").close(), [])


def test_help_shows_flags_defaults_and_comments(capsys):
    assert configurator.run(Config, lambda config: 1, ["--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Command lines: every spelling a user may try" in text
    for part in (
        "--depth INT",
        "layers of the model",
        "(default: 20)",
        "-p",
        "newest checkpoints to keep",
    ):
        assert part in text, text


def test_help_wins_wherever_it_stands(capsys):
    assert configurator.run(Needy, lambda config: 1, ["--width=3", "-h"]) == 0
    assert "--depth" in capsys.readouterr().out


def test_help_does_not_load_torch():
    code = (
        "import sys\nfrom zangchat import configurator\nfrom zangchat.training.flags import "
        "RunConfig\n"
        "code = configurator.run(RunConfig, lambda config: 1, ['--help'])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--keep_last" in done.stdout


@pytest.mark.parametrize("flags", [["--help"], []])
def test_a_reader_who_left_is_no_error(flags):
    code = (
        "import sys\nfrom zangchat import configurator\nfrom zangchat.training.flags import "
        "RunConfig\n"
        "sys.stdin.read()\nsys.exit(configurator.run(RunConfig, lambda config: print('an "
        f"answer'), {flags}))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **pipes,
    ) as process:
        process.stdout.close()
        process.stdin.close()  # only now it goes on to write
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_streams_that_are_closed_stop_nothing():
    code = (
        "import sys\nfrom zangchat import configurator\nfrom zangchat.training.flags import "
        "RunConfig\n"
        "sys.exit(configurator.run(RunConfig, lambda config: print('?') or 7 if sys.stdin.read() "
        "== '' else 8, []))"
    )
    done = subprocess.run(
        f"exec {sys.executable} -c '{code.replace(chr(39), chr(34))}' <&- >&- 2>&-", shell=True
    )
    assert done.returncode == 7


def test_no_character_stops_a_command():
    """Where a pipe's default encoding lacks it, as on Windows; unless the user asked for that
    encoding.
    """
    code = (
        "import sys\nfrom zangchat import configurator\nfrom zangchat.training.flags import "
        "RunConfig\n"
        "sys.exit(configurator.run(RunConfig, lambda config: print('you said \\u4f60\\u597d'), []))"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.stdout.decode("utf-8").strip() == "you said 你好", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**env, "PYTHONIOENCODING": "cp1252"}
    )
    assert done.stdout.decode("cp1252").strip() == r"you said \u4f60\u597d", done.stderr


def test_half_a_character_on_stdin_stops_nothing():
    code = (
        "from zangchat import configurator\nfrom zangchat.training.flags import RunConfig\n"
        "configurator.run(RunConfig, lambda config: print(ascii(input())), [])"
    )
    for encoding in ({"PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C", "PYTHONIOENCODING": ""}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=b"caf\xc3\n",
            capture_output=True,
            env={**os.environ, **encoding},
        )
        assert done.stdout.strip() == b"'caf\\ufffd'", done.stderr
    code = f"import sys\nsys.stdin.readline()\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=b"read before\ncaf\n", capture_output=True
    )
    assert done.stdout.strip() == b"'caf'", done.stderr


def test_list_flags():
    flags = list_flags(Config)
    assert flags[0] == "--run"
    assert "--prompt -p" in flags and "--dry_run" in flags
    assert list_flags(Command) == ["command", "--num_shards -n"]


# -- and back --------------------------------------------------------------------------------------


def test_what_json_has_of_a_configuration():
    saved = json.loads(json.dumps(to_dict(Config(depth=3, folder=Path("a/b")))))
    assert Config(**saved) == Config(depth=3, folder="a/b")


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(depth=3, prompt="-x =", folder=Path("a/b"), top_k=None, tools=False, dry_run=True),
    ],
)
def test_a_configuration_as_flags_gives_it_again(config):
    assert parse(Config, as_flags(config)) == config
    assert as_flags(Config(depth=7, tools=False)) == ["--depth=7", "--tools=0"]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": processes.SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
@pytest.mark.parametrize("command", ["base_train", "mid_train", "chat_sft", "chat_rl", "chat_web"])
def test_commands_set_a_short_spin_before_torch_is_loaded(command, own, expected):
    program = f"""
import os, sys
from scripts import {command}
from zangchat import configurator

def parse(*_):
    assert "torch" not in sys.modules
    print({{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}})
    raise SystemExit

configurator.parse = parse
{command}.main([])
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    out = subprocess.check_output([sys.executable, "-c", program], env={**env, **own})
    assert ast.literal_eval(out.decode()) == expected


def test_an_empty_address_of_the_hub_is_none():
    program = """
from zangchat import configurator
from zangchat.training.flags import RunConfig

def command(_):
    from huggingface_hub import constants
    from zangchat.dataset import hub
    print(constants.ENDPOINT, hub.endpoint())

configurator.run(RunConfig, command, [])
"""
    env = {**os.environ, "HF_ENDPOINT": ""}
    out = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert out.split() == ["https://huggingface.co"] * 2
