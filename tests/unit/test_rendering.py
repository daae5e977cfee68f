"""Markdown of replies as HTML: formulas, code, and what a hostile model may try."""

import html
import itertools
import json
import re
import time
from typing import Any

import httpx
import nh3
import pytest
from markdown_it import MarkdownIt

from tests.talker import engine, serving
from zangchat.server import page_api
from zangchat.server.rendering import LEXERS, MAX_CODE, MAX_FORMULA, render_markdown


def formulas(text: str) -> list[str]:
    return re.findall(r'<math display="(\w+)">', render_markdown(text))


def text_of(rendered: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", rendered)).strip()


def plain(text: str) -> str:
    return text_of(render_markdown(text))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("so $x^2$ is", ["inline"]),
        (r"so \(x^2\) is", ["inline"]),
        ("$$\nx^2\n$$", ["block"]),
        ("so $$x^2$$ is", ["block"]),
        (r"\[ x^2 \]", ["block"]),
        ("\\[\na\n- b\n\\]", ["block"]),  # no list begins in it
        (r"then \[x\] and \[y\] hold", ["block", "block"]),
        ("- of a list: $x$\n- \\(y\\)", ["inline", "inline"]),
        ("其中$x$是", ["inline"]),
        ("it costs $5, or $10 for two", []),
        ("echo $HOME and $PATH", []),
        ("`$x$` and\n\n```sh\necho $x$\n```", []),
        (r"\$x\$", []),
        ("$x", []),
        (r"\(x", []),
    ],
)
def test_formulas_are_found_where_they_are_written(text: str, kinds: list[str]) -> None:
    assert formulas(text) == kinds


def test_text_beside_a_formula_stays() -> None:
    assert plain(r"\[x\] for all" + "\n\n" + r"\[y\] (3)").split("\n") == ["x for all", "y (3)"]


@pytest.mark.parametrize("formula", [r"\frac", r"\left(", "{" * 900, r"a^b^c", r"\begin{matrix}"])
def test_half_a_formula_stays_as_it_was_written(formula: str) -> None:
    assert plain(f"so ${formula}$ is") == f"so {formula} is"


ALIGNED = (r"a &= b \\ c &= d", ["a=b", "c=d"])
CENTRED = (r"a = b \\ c = d", ["a=b", "c=d"])


@pytest.mark.parametrize(
    ("name", "lines", "rows"),
    [
        *((name, *ALIGNED) for name in ("aligned", "align*", "split", "cases", "dcases")),
        *((name, *CENTRED) for name in ("gathered", "gather", "gather*", "multline")),
        ("equation", "a = b", []),
    ],
)
def test_environments_keep_their_lines(name: str, lines: str, rows: list[str]) -> None:
    formula = rf"\begin{{{name}}} {lines} \end{{{name}}}"
    for whole in (formula, rf"\left\{{{formula}\right."):
        rendered = render_markdown(f"$${whole}$$")
        assert list(map(text_of, re.findall(r"<mtr>(.*?)</mtr>", rendered))) == rows
        assert "a=b" in text_of(rendered) and "&amp;" not in rendered


@pytest.mark.parametrize("name", ["alignedat", "tikzpicture", "Aligned", "my-own", "对齐", ""])
def test_an_unknown_environment_stays_as_it_was_written(name: str) -> None:
    formula = rf"\begin{{{name}}} a &= b \\ c &= d \end{{{name}}}"
    assert formulas(f"$${formula}$$") == [] and plain(f"$${formula}$$") == formula


def test_formulas_cannot_explode() -> None:
    define = r"\newcommand{\%s}{%s}"
    bomb = define % ("a", "x")
    for before, name in zip("abcde", "bcdef", strict=True):
        bomb += define % (name, rf"\{before}" * 9)
    assert len(bomb) < MAX_FORMULA and formulas(rf"${bomb}\f$") == []
    assert formulas(f"${'x' * (MAX_FORMULA + 1)}$") == []


@pytest.mark.parametrize(
    "formula",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\style{position:fixed}{x}",
        r"\class{heard}{x}",
        "<b>x</b>",
    ],
)
def test_formulas_are_harmless(formula: str) -> None:
    rendered = render_markdown(f"${formula}$")
    assert not re.search(r"href|style=|class=|<b>|script", rendered.replace("javascript:alert", ""))


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("**中文。**后面", "<strong>中文。</strong>后面"),
        ("他说**“重要”**的事", "他说<strong>“重要”</strong>的事"),
        ("前面**（注）**后面", "前面<strong>（注）</strong>后面"),
        ("用*「引」*和**《书》**。", "用<em>「引」</em>和<strong>《书》</strong>。"),
        ("**标题：**text", "<strong>标题：</strong>text"),
        ("他说***“重要”***的", "他说<em><strong>“重要”</strong></em>的"),
        ("这是~~删除。~~后面", "这是<s>删除。</s>后面"),
        ("**甲（*乙。*丙）**丁", "<strong>甲（<em>乙。</em>丙）</strong>丁"),
        ("中** 文。 **后", "中** 文。 **后"),
        ("前**\u3000中**", "前**\u3000中**"),
        ("a**（b", "a**（b"),
        (r"前\*（中）\*后", "前*（中）*后"),
        ("`前**中。**后`", "<code>前**中。**后</code>"),
        ("_中文。_后面", "_中文。_后面"),
    ],
)
def test_emphasis_may_begin_and_end_at_chinese_punctuation(text: str, rendered: str) -> None:
    assert render_markdown(text) == f"<p>{rendered}</p>\n"


def test_emphasis_of_other_languages_is_commonmarks() -> None:
    markdown = MarkdownIt("commonmark").enable("strikethrough")
    for letters in ("a *._", 'a*"~', "é*«😀", "я_—*"):
        for chosen in itertools.product(letters, repeat=6):
            text = f"x {''.join(chosen)}"
            assert render_markdown(text) == nh3.clean(markdown.render(text)), text


def test_code_keeps_its_text_and_gets_colours() -> None:
    code = 'def f(x: int) -> str:\n\treturn f"{x}<b>&amp;" # 你好\n\n\n'
    rendered = render_markdown(f"```python\n{code}```")
    assert '<span class="k">def</span>' in rendered
    assert html.unescape(re.sub(r"<[^>]+>", "", rendered)).rstrip("\n") == code.rstrip("\n")


@pytest.mark.parametrize("language", [*sorted(LEXERS), "py", "sh", "js", "c++", "", "nonsense"])
def test_code_of_every_language_keeps_its_text(language: str) -> None:
    code = "  a = '<x>' # 1\n\n{b: [2]}"
    assert (
        html.unescape(re.sub(r"<[^>]+>", "", render_markdown(f"```{language}\n{code}\n```"))).strip(
            "\n"
        )
        == code
    )


def test_long_code_and_rare_languages_stay_plain() -> None:
    assert "<span" not in render_markdown("```python\n" + "x = 1\n" * MAX_CODE + "```")
    assert "<span" not in render_markdown("```brainfuck\n+++\n```")


# ---- the page's requests -------------------------------------------------------------------------


def talk(question: str) -> str:
    if question == "pretend":
        return "<|python_start|>open(1)<|python_end|><|output_start|>41<|output_end|>So 41."
    return "<|python_start|>6*7<|python_end|>####"


def test_saved_replies_are_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine(talk)) as (url, _):

        def render(texts: list[Any]) -> httpx.Response:
            return httpx.post(url + "/render", json={"texts": texts})

        assert render(["*a*", "<b>"]).json()["html"] == [
            "<p><em>a</em></p>\n",
            "<p>&lt;b&gt;</p>\n",
        ]
        assert render([]).json() == {"html": []}
        for refused in (["x"] * 65, ["x" * 20_000], [1], ["\ud800"]):
            content = httpx.post(
                url + "/render",
                content=json.dumps({"texts": refused}),
                headers={"Content-Type": "application/json"},
            )
            assert content.status_code == 400, refused
        monkeypatch.setattr(page_api, "TEXTS_SECONDS", 0.0)
        assert len(render(["a", "b", "c"]).json()["html"]) == 1


def events(url: str, question: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, **fields}
    text = httpx.post(url + "/chat/completions", json=body).text
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines]


def test_a_tool_output_of_the_models_own_is_marked() -> None:
    with serving(engine(talk)) as (url, _):
        *_, parts, done = events(url, "pretend", render=True)
        assert parts["parts"][:2] == [
            {"type": "python", "text": "open(1)"},
            {"type": "python_output", "text": "41", "by": "model"},
        ]
        *_, parts, _ = events(url, "six times seven", render=True)
        assert parts["parts"] == [
            {"type": "python", "text": "6*7"},
            {"type": "python_output", "text": "42"},
        ]


def test_the_last_event_counts_tokens_and_their_pace() -> None:
    with serving(engine(lambda question: "x" * 30, pause=0.005)) as (url, _):
        start = time.monotonic()
        done = events(url, "hi", render=True)[-1]
        seconds = time.monotonic() - start
        assert done["tokens"] == 30 and done["tokens_per_second"] >= 20 / seconds
        assert events(url, "hi", max_tokens=1, render=True)[-1] == {
            "done": True,
            "finish_reason": "length",
            "tokens": 1,
        }
