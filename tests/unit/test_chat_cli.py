"""The terminal chat, with a model that says what it is told to; and the loading of a real one."""

import builtins
import dataclasses
import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dev import bench_serve
from scripts import chat_cli, chat_web
from scripts.chat_cli import Chat
from tests.talker import TOKENIZER, Talker, engine
from zangchat import checkpoint_manager
from zangchat.config import GPTConfig
from zangchat.engine import KVCache, load_for_chat
from zangchat.engine import engine as engine_module
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.hf import demo
from zangchat.runtime import devices
from zangchat.server.protocol import Settings
from zangchat.tokenizer import RustBPETokenizer


def reply(question: str) -> str:
    if "calculate" in question:
        return "It is <|python_start|>6*7<|python_end|>####."
    if "made up" in question:
        return "<|python_start|>open(1)<|python_end|><|output_start|>41<|output_end|>."
    if "escape" in question:
        return "a\x1b[31mb\x07c\n\td\x9b2J"
    if "pretend" in question:
        return "<|python_start|>open(1)<|python_end|><|output_start|>41<|output_end|>So 41."
    return f"Re: {question}"


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run chat_cli with arguments and typed lines (an exception is raised where a line would be);
    returns stdout.
    """
    monkeypatch.setattr(
        engine_module,
        "load_for_chat",
        lambda config, device: (Talker(reply, sequence_len=256), TOKENIZER, {}),
    )

    def run(*argv: str, typed: tuple[Any, ...] = (), code: int = 0) -> str:
        lines = iter(typed)

        def typing(prompt: str = "") -> str:
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", typing)
        assert chat_cli.main(argv) == code
        return capsys.readouterr().out

    return run


def session(**settings: Any) -> Chat:
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 1,
        "max_tokens": 100,
    }
    return Chat(engine(reply, sequence_len=256), **{**defaults, **settings})


# ---- one answer ----------------------------------------------------------------------------------


def test_a_prompt_gets_its_answer_on_stdout_and_nothing_else(talk: Callable[..., str]) -> None:
    assert talk("-p", "hi 你好") == "Re: hi 你好\n"
    assert talk("--prompt=calculate") == "It is .\n"  # what the tools did is left out


def test_a_dash_reads_the_prompt_from_stdin(
    talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert talk("-p", "-") == "Re: from a pipe\n"


def test_the_answer_is_as_long_as_allowed(talk: Callable[..., str]) -> None:
    assert talk("-p", "abc", "--max_tokens=5") == "Re: a\n"


@pytest.mark.parametrize(
    "flag",
    ["--temperature=-1", "--top_k=-2", "--top_p=0", "--top_p=1.5", "--max_tokens=0", "--prompt= "],
)
def test_a_senseless_flag_is_named(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert chat_cli.main(["-p", "hi", flag]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and flag.split("=")[0] in captured.err
        and "Traceback" not in captured.err
    )


def test_a_prompt_that_is_too_long_is_refused_in_one_sentence(talk: Callable[..., str]) -> None:
    assert talk("-p", "x" * 300, code=2) == ""


# ---- a conversation ------------------------------------------------------------------------------


def test_a_conversation_goes_on_until_the_end_of_input(talk: Callable[..., str]) -> None:
    out = talk(typed=("one", "", "two"))
    assert out.index("Re: one\n") < out.index("Re: two\n")


def test_tool_calls_are_set_apart(talk: Callable[..., str]) -> None:
    assert "It is [6*7 = 42]." in talk(typed=("calculate",))


def test_output_that_the_model_made_up_is_not_a_result() -> None:
    chat = session()
    pieces = list(chat.answer("made up", note=print))
    assert "".join(text for kind, text in pieces if kind == "made_up") == "41"
    assert "41" not in "".join(text for kind, text in pieces if kind != "made_up")
    assert {"type": "python_output", "text": "41"} in chat.messages[-1]["content"]  # its own words


def test_control_characters_of_the_model_do_not_reach_the_terminal(
    talk: Callable[..., str],
) -> None:
    for out in (talk(typed=("escape",)), talk("-p", "escape")):
        assert "a[31mbc\n\td2J" in out
        assert not any(character in out for character in "\x1b\x07\x9b")


def test_a_result_that_the_model_made_up_is_marked(talk: Callable[..., str]) -> None:
    assert "[open(1)][made up: 41]So 41." in talk(typed=("pretend",))
    assert talk("-p", "pretend") == "So 41.\n"


def test_a_question_without_an_answer_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not fit into the memory would make all after it fail, too."""
    chat = session()
    list(chat.answer("one", print))
    said = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "size_for", lambda *_: None)
        with pytest.raises(UserError, match="MiB are free"):
            list(chat.answer("two", print))
    assert chat.messages == said
    assert "".join(text for _, text in chat.answer("three", print)) == "Re: three"


@pytest.mark.parametrize("question", ["/usr is what?", "/clear the table", "/etc/hosts", "/ 2"])
def test_a_question_may_begin_with_a_slash(talk: Callable[..., str], question: str) -> None:
    assert f"Re: {question}\n" in talk(typed=(question,))
    assert "there is no command /usr" in talk(typed=("/usr",))


def test_ctrl_c_at_the_prompt_does_not_leave_but_quit_does(talk: Callable[..., str]) -> None:
    out = talk(typed=(KeyboardInterrupt(), "still here", "/quit", "never asked"))
    assert "Re: still here" in out and "never asked" not in out


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said() -> None:
    chat = session()
    pieces = chat.answer("go on", print)
    assert "".join(text for _, text in (next(pieces) for _ in range(4))) == "Re: "
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt())
    assert chat.messages == [
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "Re: "},
    ]
    assert "".join(text for _, text in chat.answer("next", print)) == "Re: next"


TERMINAL = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from scripts import chat_cli
from tests.talker import TOKENIZER, Talker
from zangchat.engine import engine

def load(config, device):
    print("loading", flush=True)
    time.sleep(float(sys.argv[1]))
    return Talker(lambda question: question + " word" * 90, pause=0.05), TOKENIZER, {}

engine.load_for_chat = load
sys.exit(chat_cli.main([]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize(
    ("loading", "exchanges", "code"),
    [
        (600, [("loading", "\x03"), ("interrupted", "")], 130),
        (
            0,
            [
                ("?2004h", "typed\x03"),  # pastes are marked from here
                ("leaves)", "one\n"),
                ("one word", "\x03"),
                ("(stopped)", "two\n"),
                ("two word", "\x03"),
                ("(stopped)", "/quit\n"),
            ],
            0,
        ),
        (
            0,
            [
                ("?2004h", "\x1b[200~a pasted\nparagraph of\r\nthree lines\x1b[201~"),
                ("three lines", "\r"),  # Enter, once
                ("a pasted\r\nparagraph of\r\nthree lines word", "\x03"),
                ("(stopped)", ""),
                ("?2004h", "broken\x1b\rby hand\r"),
                ("broken\r\nby hand word", "\x03"),
                ("(stopped)", ""),
                ("?2004h", "\x04"),  # before the next prompt is up it would end an empty line
            ],
            0,
        ),
    ],
)
def test_ctrl_c_in_a_terminal_leaves_no_traceback(
    loading: float, exchanges: list[tuple[str, str]], code: int
) -> None:
    """Each text is waited for, then the keys beside it are pressed."""
    import pty

    terminal, line = pty.openpty()
    command = [sys.executable, "-c", TERMINAL, str(loading)]
    with (
        subprocess.Popen(
            command, stdin=line, stdout=line, stderr=line, start_new_session=True
        ) as process,
        open(terminal, "rb+", 0) as screen,
    ):
        os.close(line)
        shown = seen = pressed = ""
        for awaited, keys in exchanges:
            end = time.monotonic() + 120
            while awaited not in seen:
                assert time.monotonic() < end, f"{awaited!r} did not come after {shown!r}"
                if not select.select([screen], [], [], 3)[0]:
                    # input() overlooks one that comes before it listens
                    screen.write(b"\x03" if pressed.endswith("\x03") else b"")
                    continue
                piece = screen.read(1000).decode(errors="replace")
                shown, seen = shown + piece, seen + piece
            seen = seen[seen.index(awaited) + len(awaited) :]
            screen.write(keys.encode())
            pressed = keys
        with suppress(OSError):  # how Linux says that nobody writes to it any more
            while piece := screen.read(1000):
                shown += piece.decode(errors="replace")
        assert process.wait(120) == code and "Traceback" not in shown


def test_history_is_kept_with_its_tool_calls_and_trimmed_at_the_context() -> None:
    chat, notes = session(), []
    list(chat.answer("calculate", notes.append))
    assert [part["type"] for part in chat.messages[1]["content"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]
    for i in range(6):
        list(chat.answer(f"a question of some length, number {i}", notes.append))
    assert len(chat.messages) == 14  # what was said stays said; only the prompt is cut
    assert notes and re.search(
        r"outgrew the model's 256 tokens: its oldest \d+ messages", notes[-1]
    )
    with pytest.raises(UserError, match="the model reads 255 at most"):
        list(chat.answer("x" * 300, notes.append))
    assert len(chat.messages) == 14


def test_settings_change_by_command(tmp_path: Path) -> None:
    chat, notes = session(), []

    def obey(line: str) -> bool:
        return chat_cli.obey(chat, line, notes.append)

    for line in ("/temperature 0.3", "/topk\t7", "/seed\u30005", "/system\n be\nbrief "):
        assert chat_cli.is_command(line) and obey(line)
    assert chat.system == "be\nbrief"
    obey("/system  be brief ")
    assert (chat.temperature, chat.top_k, chat.seed, chat.system) == (0.3, 7, 5, "be brief")
    for line in (
        "/temperature hot",
        "/temperature -1",
        "/temperature nan",
        "/topk 1.5",
        "/topk",
        "/seed x",
        "/nonsense",
        "/save",
    ):
        notes.clear()
        assert obey(line) and len(notes) == 1
    assert (chat.temperature, chat.top_k, chat.seed) == (0.3, 7, 5)
    obey("/seed")
    assert chat.seed is None
    list(chat.answer("hi", print))
    obey("/clear")
    assert chat.messages == [] and chat.system == "be brief"
    obey("/help")
    assert all(
        command in notes[-1]
        for command in ("/clear", "/system", "/temperature", "/topk", "/seed", "/save", "/quit")
    )
    assert not obey("/quit")


def test_a_chat_is_saved_as_a_line_of_training_data(tmp_path: Path) -> None:
    chat, notes, path = session(), [], tmp_path / "chat.jsonl"
    chat_cli.obey(chat, f"/save {path}", notes.append)
    assert notes == ["there is nothing to save yet"] and not path.exists()
    chat.system = "be kind"
    list(chat.answer("hi 你好", print))
    for _ in range(2):
        chat_cli.obey(chat, f"/save {path}", notes.append)
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == second
    assert [message["content"] for message in json.loads(first)["messages"]] == [
        "be kind",
        "hi 你好",
        "Re: be kind\n\nhi 你好",
    ]
    path.write_text("{}\n{}", encoding="utf-8")  # as an editor may leave it
    chat_cli.obey(chat, f"/save {path}", notes.append)
    assert path.read_text(encoding="utf-8") == f"{{}}\n{{}}\n{first}\n"
    for impossible in (tmp_path, "a\0b", "/dev/full"):
        chat_cli.obey(chat, f"/save {impossible}", notes.append)
        assert "cannot be written" in notes[-1]
    chat_cli.obey(chat, "/save ~nobody-of-that-name/chat.jsonl", notes.append)
    assert "without ~" in notes[-1]


def test_the_same_seed_gives_the_same_answer() -> None:
    answers = set()
    for _ in range(3):
        chat = session(temperature=50.0, seed=3, max_tokens=20)
        answers.add("".join(text for _, text in chat.answer("hi", print)))
    assert len(answers) == 1


# ---- loading -------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(base_dir: Path) -> GPT:
    """A tiny model with its tokenizer, saved as the chat stages save theirs."""
    tokenizer = RustBPETokenizer.train_from_iterator(
        ["some words to merge, some words to keep"] * 4, 280
    )
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            sequence_len=64,
            vocab_size=tokenizer.get_vocab_size(),
            n_layer=1,
            n_head=2,
            n_kv_head=2,
            n_embd=16,
        )
    )
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    folder = base_dir / "chatsft_checkpoints" / "d1"
    tokenizer.save(folder)
    meta = {
        "model_config": model.config.to_dict(),
        "user_config": {},
        "run_state": {},
        "val_bpb": None,
    }
    checkpoint_manager.save_checkpoint(folder, 7, model.state_dict(), None, meta)
    return model


def test_a_saved_model_answers(checkpoint: GPT, capfd: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["-p", "some words", "--dtype=float32", "-t", "0"],
        ["-p", "some words", "-g", "d1", "-s", "7", "--seed=1"],
    ):
        assert chat_cli.main([*argv, "--max_tokens=8", "--device_type=cpu"]) == 0
        captured = capfd.readouterr()
        assert captured.out.endswith("\n") and captured.err == ""
    assert (
        chat_cli.main(
            ["-p", "some words", "--quantize=int8", "--device_type=cpu", "--max_tokens=8"]
        )
        == 0
    )
    assert chat_cli.main(["-p", "some words", "--quantize=int3", "--device_type=cpu"]) == 2
    assert "--quantize=int3 is not possible" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_in_the_compute_dtype(checkpoint: GPT, dtype: torch.dtype) -> None:
    config = chat_cli.Config(device_type="cpu", dtype=str(dtype).removeprefix("torch."))
    model, _, meta = load_for_chat(config)
    assert (
        {parameter.dtype for parameter in model.parameters()} == {dtype}
        and meta["step"] == 7
        and not model.training
    )


def test_a_model_tag_that_names_a_stage_is_taken_as_the_source(checkpoint: GPT) -> None:
    config = chat_cli.Config(source="base", model_tag="sft", device_type="cpu", dtype="float32")
    model, _, _ = load_for_chat(config)
    assert torch.equal(model.lm_head.weight, checkpoint.lm_head.weight)


@pytest.mark.parametrize("argv", [["-i", "rl"], ["-g", "d9"], ["-s", "3"], ["-i", "nowhere"]])
def test_a_missing_model_is_one_sentence(
    checkpoint: GPT, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    for script, extra in ((chat_cli, ["-p", "hi"]), (chat_web, ["--port=0"])):
        assert script.main([*argv, *extra, "--device_type=cpu"]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error


# ---- the web script ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    "--temperature=-1 --top_k=-1 --top_p=0 --top_p=1.5 --max_tokens=0 --max_batch=0 --queue=-1 "
    "--port=70000 --num_gpus=0".split(),
)
def test_chat_web_names_a_senseless_flag(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert chat_web.main([flag]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err


def test_several_gpus_are_made_ready_as_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", i) for i in range(2)]
    ready: list[Any] = []

    def compute_init(device_type: str) -> tuple[Any, ...]:
        ready.append(device_type)
        return False, 0, 0, 1, gpus[0]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "compute_init", compute_init)
    monkeypatch.setattr(devices, "check_kernels", ready.append)
    monkeypatch.setattr(demo, "open_engine", lambda config, device: (device, list(ready)))
    engines = chat_web.load_engines(chat_web.Config(num_gpus=2, device_type="cuda"))
    assert engines == [(gpu, ["cuda", *gpus]) for gpu in gpus]
    with pytest.raises(UserError, match="--num_gpus=3, but 2 CUDA devices are present"):
        chat_web.load_engines(chat_web.Config(num_gpus=3, device_type="cuda"))


def test_the_web_scripts_defaults_are_the_servers() -> None:
    shared = {f.name: f.default for f in dataclasses.fields(Settings)}
    mine = {f.name: f.default for f in dataclasses.fields(chat_web.Config)}
    assert {name: mine[name] for name in shared.keys() & mine.keys()} == {
        name: shared[name] for name in shared.keys() & mine.keys()
    }
    assert {
        "temperature",
        "top_k",
        "top_p",
        "max_tokens",
        "max_batch",
        "queue",
    } <= shared.keys() & mine.keys()


def test_chat_web_says_that_a_port_is_taken_before_it_loads_a_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert chat_web.main([f"--port={port}"]) == 2
    assert f"--port={port}" in capsys.readouterr().err


def test_chat_web_serves_until_it_is_interrupted(checkpoint: GPT) -> None:
    import httpx

    command = [
        sys.executable,
        "-m",
        "scripts.chat_web",
        "--port=0",
        "--device_type=cpu",
        "--dtype=float32",
        "-m",
        "8",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        try:
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+", line)
            answer = httpx.post(
                url + "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "some words"}]},
                timeout=60,
            )
            assert (
                answer.json()["model"] == "zangchat-sft"
                and answer.json()["usage"]["completion_tokens"] <= 8
            )
        finally:
            process.send_signal(2)
            errors = process.stderr.read()
        assert (
            process.wait(30) in (0, 130)
            and "Traceback" not in errors
            and "some words" not in errors
        )


@pytest.mark.slow
def test_the_server_loses_nothing_under_many_clients(
    checkpoint: GPT, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the model's context is short
    monkeypatch.setattr(bench_serve, "QUESTIONS", ("some words", "words"))
    flags = [
        "--streams=8",
        "--requests=60",
        "--alone=3",
        "--leaving=0.3",
        "--longest=24",
        "--device_type=cpu",
        "--dtype=float32",
        "--busy",
    ]
    assert bench_serve.main(flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["error_examples"], result["left_in_hand"]) == ([], 0)
    assert result["left"] > 0 and result["refused"] > 0
    assert result["replies"] + result["left"] + result["refused"] == 60
