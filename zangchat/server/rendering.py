"""Markdown of a reply to HTML that is safe to insert, with highlighted code and mathematics.

The text is a model's, so of anyone who may ask it: no raw HTML, no images, no schemes other than
http(s) and mailto, and bounds on each piece that a grammar works through.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import nh3
import pygments
from latex2mathml import commands, converter
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline, emphasis, strikethrough
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath.index import make_block_func, make_inline_func
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

# The lexers that need at most half a second for the worst block of MAX_CODE found by fuzzing.
LEXERS = frozenset(
    "python pycon bash console json javascript typescript html css sql yaml toml ini diff c cpp "
    "rust go java kotlin swift csharp ruby php lua r julia latex markdown docker xml haskell "
    "scala perl".split()
)
MAX_CODE = 4_000  # characters of a block that is highlighted
MAX_FORMULA = 1_000  # characters of a formula that is typeset
MACROS = re.compile(r"\\(def|(re)?new|Declare)")  # expansions could explode
ENVIRONMENTS = {"equation", "equation*", *(name.lstrip("\\") for name in commands.MATRICES)}
SIMILAR = {  # environments that the converter does not know -> one that it knows
    **dict.fromkeys(("aligned", "flalign", "flalign*", "eqnarray", "eqnarray*"), "align*"),
    **dict.fromkeys(("gather", "gather*", "gathered", "multline", "multline*"), "displaylines"),
    "dcases": "cases",
}
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "del", "a", "code", "pre", "blockquote", "span", "div"),
    *("ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6"),
    *("table", "thead", "tbody", "tr", "th", "td"),
    *("math", "menclose", "mfrac", "mi", "mn", "mo", "mover", "mpadded", "mphantom", "mroot"),
    *("mrow", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd", "mtext"),
    *("mtr", "munder", "munderover", "mmultiscripts", "mprescripts"),
}
ATTRIBUTES = {
    "a": {"href", "title"},
    "code": {"class"},
    "span": {"class"},
    "div": {"class"},
    "ol": {"start"},
    "math": {"display"},
    "mo": {"stretchy", "fence", "form", "accent", "minsize", "maxsize", "lspace", "rspace"},
    "mi": {"mathvariant"},
    "mfrac": {"linethickness"},
    "mstyle": {"scriptlevel", "displaystyle", "mathcolor"},
    "mspace": {"width", "height", "depth"},
    "mpadded": {"width", "height", "depth", "lspace", "voffset"},
    "mtd": {"columnalign"},
    "menclose": {"notation"},
    "mover": {"accent"},
    "munder": {"accentunder"},
}


def highlight(code: str, language: str, _: str) -> str:
    """The code with a <span class="..."> around each token; "" leaves it to the caller."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return ""
    if len(code) > MAX_CODE or LEXERS.isdisjoint(lexer.aliases):
        return ""
    return pygments.highlight(code, lexer, HtmlFormatter(nowrap=True))


def typeset(formula: str, display: bool) -> str:
    """MathML of a formula; as it was written, if that is not possible."""
    if len(formula) <= MAX_FORMULA and not MACROS.search(formula):
        try:
            known = re.sub(r"\\(begin|end)\s*\{([^}]*)\}", _known_environment, formula)
            return converter.convert(known, display="block" if display else "inline")
        except Exception:  # half a formula, while it streams in, fails in many ways
            pass
    return f"<code>{escapeHtml(formula)}</code>"


def _known_environment(match: re.Match[str]) -> str:
    name = SIMILAR.get(match[2], match[2])
    if name not in ENVIRONMENTS:  # the converter would spell out each & and lose the lines
        raise ValueError(name)
    return rf"\{match[1]}{{{name}}}"


def _beside_cjk(rule: Callable[[StateInline, bool], bool]) -> Callable[[StateInline, bool], bool]:
    """The rule of * or ~~, as the specification of markdown-cjk-friendly amends it.

    CommonMark does not end **中文。**后面 as bold, since no space follows the full stop. Beside a
    Chinese character a delimiter opens and closes, unless there is a space.
    """

    def delimiters(state: StateInline, silent: bool) -> bool:
        start, first = state.pos, len(state.delimiters)
        if not rule(state, silent):
            return False
        before = state.src[start - 1] if start else " "
        after = state.src[state.pos] if state.pos < state.posMax else " "
        if state.src[start] != "_" and (is_cjk(before) or is_cjk(after)):
            for delimiter in state.delimiters[first:]:
                delimiter.open, delimiter.close = not after.isspace(), not before.isspace()
        return True

    return delimiters


def is_cjk(character: str) -> bool:
    wide = unicodedata.east_asian_width(character) in "FHW"
    return wide and unicodedata.category(character) != "So"  # emoji are wide, too


def _parser() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "highlight": highlight})
    markdown.enable(["table", "strikethrough"]).disable("image")
    markdown.inline.ruler.at("emphasis", _beside_cjk(emphasis.tokenize))
    markdown.inline.ruler.at("strikethrough", _beside_cjk(strikethrough.tokenize))
    markdown.use(
        dollarmath_plugin,
        allow_labels=False,
        allow_space=False,
        allow_digits=False,
        double_inline=True,
    )
    brackets = [("math_inline", r"\(", r"\)"), ("math_inline_double", r"\[", r"\]")]
    for name, start, end in brackets:
        within = re.escape(start) + f"(.{{1,{MAX_FORMULA}}}?)" + re.escape(end)
        rule: Any = {"name": name, "tag": start, "rex": re.compile(within, re.DOTALL)}
        markdown.inline.ruler.before("escape", f"{name}_brackets", make_inline_func(rule))
    on_lines = re.compile(rf"\\\[((?:(?!\\[\[\]])[\s\S]){{1,{MAX_FORMULA}}})\\\][ \t]*$", re.M)
    rule = {"name": "math_block", "tag": r"\[", "rex": on_lines}
    markdown.block.ruler.before("fence", "math_block_brackets", make_block_func(rule))
    for name in ("math_inline", "math_inline_double", "math_block"):
        markdown.add_render_rule(name, _math)
    return markdown


def _math(_renderer: Any, tokens: Sequence[Token], at: int, *_: Any) -> str:
    return typeset(tokens[at].content.strip(), tokens[at].type != "math_inline")


_markdown = _parser()


def render_parts(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The parts of a reply; those of type "text" with their "html"."""
    return [
        {**part, "html": render_markdown(part["text"])} if part["type"] == "text" else dict(part)
        for part in parts
    ]


def render_markdown(text: str) -> str:
    return nh3.clean(
        _markdown.render(text),
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},  # the chat stays open
    )
