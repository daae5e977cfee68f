"""Conversations made by an endpoint: by our own server, with a model that says what it is told
to.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dev import gen_synthetic_data as gen
from tasks.customjson import CustomJSON
from tests.talker import engine, serving


def conversation(question: str) -> str:
    return json.dumps(
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "I am zangchat."},
            ]
        }
    )


@pytest.fixture()
def endpoint(tmp_path, monkeypatch):
    """(flags, what the endpoint was asked); it answers with a conversation that opens with what the
    prompt says of the user.
    """
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts: dict[str, int] = {}

    def reply(prompt: str) -> str:
        if prompt.endswith("}"):  # the whole of it; the server also asks what follows nothing
            prompts.setdefault(prompt, len(prompts))
        user = prompt.partition("The user: ")[2]
        kind, _, rest = user.partition(". It begins with: ")
        if "poet" in kind:
            return "Roses are red"
        return f"Here:\n```json\n{conversation(f'{kind} asks about {rest[:30]}')}\n```"

    with serving(engine(reply, sequence_len=4096), max_batch=4, queue=8, model_name="talker") as (
        url,
        _,
    ):
        flags = [
            f"--base_url={url}/v1",
            f"--output={tmp_path / 'about me.jsonl'}",
            "--facts",
            str(tmp_path / "facts.txt"),
            "--max_tokens=300",
        ]
        (tmp_path / "facts.txt").write_text("It is called Ada.", encoding="utf-8")
        yield flags, prompts


def lines(flags: list[str]) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in Path(flags[1].partition("=")[2]).read_text(encoding="utf-8").splitlines()
    ]


def test_our_own_server_writes_a_file_that_trains(endpoint, capsys):
    flags, prompts = endpoint
    assert gen.main([*flags, "--num=8", "--max_similarity=0.95"]) == 0
    made = lines(flags)
    assert len(made) == 8 and all("Ada" in prompt for prompt in prompts)
    assert len({row["messages"][0]["content"] for row in made}) == 8
    assert len(CustomJSON(flags[1].partition("=")[2])) == 8
    told = capsys.readouterr().out
    assert (
        "only the prompt asks for JSON" in told and "--identity_data" in told
    )  # our server supports no schemas
    asked = len(prompts)
    assert gen.main([*flags, "--num=8"]) == 0 and len(prompts) == asked  # nothing is left to do
    output = Path(flags[1].partition("=")[2])
    output.write_bytes(output.read_bytes().rstrip())  # as an editor may leave it
    assert gen.main([*flags, "--num=10", "--max_similarity=0.95"]) == 0
    assert lines(flags)[:8] == made and len(lines(flags)) == 10 and len(prompts) > asked


def test_what_repeats_is_left_out_and_does_not_go_on_for_ever(endpoint, capsys, monkeypatch):
    flags, _ = endpoint
    monkeypatch.setattr(gen, "USERS", ("a poet", "a child"))
    monkeypatch.setattr(gen, "TOPICS", ("its name",))
    monkeypatch.setattr(gen, "TONES", ("dry",))
    assert gen.main([*flags, "--num=4", "--languages=English", "--max_turns=1"]) == 1
    assert len(lines(flags)) == 1
    assert "12 requests" in capsys.readouterr().out


def test_prompts_differ_and_are_the_same_when_asked_again():
    config = gen.Config(languages="English:1,Chinese:1")
    languages = gen.parse_languages(config.languages)
    prompts = [gen.make_prompt(gen.FACTS, languages, config, i) for i in range(200)]
    assert prompts == [gen.make_prompt(gen.FACTS, languages, config, i) for i in range(200)]
    assert len(set(prompts)) > 190
    for choices in (
        gen.USERS,
        gen.TOPICS,
        gen.TONES,
        ("English", "Chinese"),
        ("1 question,", "2 questions,", "3 questions,"),
    ):
        assert all(
            any(choice in prompt.split("What is true")[1] for prompt in prompts)
            for choice in choices
        )


def test_openings_that_differ_little_are_one():
    openings = gen.Openings(0.7)
    assert [
        openings.add(text)
        for text in (
            "Who are you?",
            "who are you",
            "Who made you?",
            "你是谁？",
            "你是谁",
            "你叫什么名字？",
            "",
        )
    ] == [
        *(True, False, True, True, False, True, True),
    ]


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{",
        "[]",
        '{"messages": []}',
        conversation(" "),
        conversation("x").replace("user", "system"),
    ],
)
def test_replies_that_are_no_conversation(reply):
    assert gen.read_reply(reply) is None


def test_mistakes_are_named(tmp_path, capsys):
    for flags, complaint in (
        (["--num=0"], "--num=0"),
        (["--languages=English:x"], "NAME:WEIGHT"),
        (["--facts=nowhere.txt"], "--facts=nowhere.txt"),
        (
            ["--base_url=http://127.0.0.1:9/v1", f"--output={tmp_path / 'a'}"],
            "--base_url=http://127.0.0.1:9/v1 gives no answer",
        ),
    ):
        assert gen.main(flags) == 2
        assert complaint in capsys.readouterr().err
