"""Conversations and stories of a chat model, by dev.talk and dev.bench_stories."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import zangchat.engine
from dev import bench_stories, talk
from tasks.stories import Stories
from tests.talker import TOKENIZER, Talker
from zangchat.report import get_report

META = {"stage": "sft", "user_config": {"model_tag": "d1"}, "step": 7}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))

    def install(reply: Callable[[str], str]) -> None:
        talker = Talker(reply, sequence_len=2048)
        monkeypatch.setattr(zangchat.engine, "load_for_chat", lambda _: (talker, TOKENIZER, META))

    return install


def test_ten_conversations_are_printed_and_reported(
    model: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    model(lambda question: f"Re: {question}" if "47" not in question else "\x1b[31mred")
    assert talk.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n> ") == 50 and "> Who are you?\nRe: Who are you?\n" in printed
    assert "\x1b" not in printed
    (card,) = get_report().cards()
    held = [item["messages"] for item in card.data if "messages" in item]
    assert [len(messages) for messages in held] == [10] * 10
    assert held[0][2] == {"role": "user", "content": "Who are you?"}
    assert "Re: Who are you?" in get_report().generate().read_text(encoding="utf-8")


def test_the_readers_language_comes_first() -> None:
    def first(lang: str) -> str:
        return next(talk.conversations(lang))[0]

    assert first("en") == "Hi!" and first("C") == "Hi!" and first("zh") == "你好！"
    assert sorted(talk.conversations("zh")) == sorted(talk.conversations("en"))


def stories_of(
    model: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    reply: Callable[[str], str],
) -> dict[str, float]:
    model(reply)
    assert (
        bench_stories.main(["-x=10", "--train_stories=500", "-t=0", "--max_new_tokens=1000"]) == 0
    )
    return json.loads(capsys.readouterr().out)


def test_stories_are_counted(
    model: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    task = Stories(split="test", size=10)
    told = {c["messages"][0]["content"]: c["messages"][1]["content"] for c in task}
    good = stories_of(model, capsys, told.__getitem__)
    assert (good["named"], good["consistent"], good["ended"], good["all three"]) == (10,) * 4
    unseen = good["requests with a word never seen"]
    assert 0 < unseen < 10 and good["all three, with a word never seen"] == unseen
    own = good.pop("of the grammar")
    assert own == {name: good[name] for name in own}
    trained = next(iter(Stories(size=1)))["messages"][1]["content"]
    copied = stories_of(model, capsys, lambda _: trained)
    assert copied["share more than half with a training story"] == 10
    assert copied["all three"] < 10 and copied["distinct 4-grams"] < 0.12
    cut = stories_of(model, capsys, lambda question: re.sub(r"\W*$", "", told[question]))
    assert (cut["named"], cut["ended"]) == (10, 0)
