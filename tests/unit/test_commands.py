"""Each command in a string, a comment or a page of the repository is accepted by its parser."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import OPEN, ROOT, find, is_open, problem, sources
from tests.documents import PAGES, READMES, text_of

PROSE = [*READMES, "dev/LEADERBOARD.md", "rustbpe/README.md"]
PROSE += [f"dev/docs/{language}/{page}" for language in ("en", "zh") for page in PAGES]


def python_texts(source: str) -> Iterator[str]:
    """String literals, with OPEN for the values of an f-string, and blocks of comments."""
    tree = ast.parse(source)
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [name.id for name in node.targets if isinstance(name, ast.Name)]
            constants |= dict.fromkeys(names, node.value.value)

    def joined(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(joined, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return joined(node.left) + joined(node.right)
        value = node.value if isinstance(node, ast.FormattedValue) else node
        return str(constants.get(value.id, OPEN)) if isinstance(value, ast.Name) else OPEN

    def visit(node: ast.AST) -> Iterator[str]:
        whole = isinstance(node, (ast.JoinedStr, ast.BinOp))
        if whole or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            yield joined(node)  # type: ignore[arg-type]
        if not isinstance(node, ast.JoinedStr):
            inside = ast.iter_child_nodes(node)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                whole_ones = (ast.Constant, ast.JoinedStr)
                inside = (child for child in inside if not isinstance(child, whole_ones))
            for child in inside:
                yield from visit(child)

    yield from visit(tree)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield "\n".join(token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT)


def shell_texts(source: str) -> Iterator[str]:
    """Comments, here-documents and arguments of echo, printf etc., with OPEN for variables."""
    here = re.compile(r"<<-? ?(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
    spoken = [match[2] for match in here.finditer(source)]
    source = here.sub("", source)
    spoken += re.findall(r"(?<![\w$])#[ !](.*)", source)
    printed = re.compile(r"\b(?:echo|printf|die|say) (['\"])(.*?)(?<!\\)\1", re.DOTALL)
    for _, text in printed.findall(source):
        spoken += text.replace("\\n", "\n").replace("\\`", "`").splitlines()
    text = "\n".join(spoken)
    yield re.sub(r"\$\{[^}]*\}|\$\w+|%[sdq]", OPEN, text)


def texts_of(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_texts(source)
    elif path.suffix in (".sh", ".sbatch"):
        yield from shell_texts(source)
    else:
        yield "\n".join(re.findall(r"(?:#|//+!?) (.*)", source))


def spans(text: str) -> Iterator[str]:
    """Inline code of a page; other tests cover its fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (f"`{span}`" for span in re.findall(r"`([^`]+)`", text))


def written() -> Iterator[tuple[str, str]]:
    """(file, command) of all sources and pages."""
    for path in sources():
        for text in texts_of(path):
            yield from ((str(path.relative_to(ROOT)), line) for line in find(text))
    for name in PROSE:
        for span in spans(text_of(name)):
            yield from ((name, line) for line in find(span))


FOUND = [(name, line) for name, line in dict.fromkeys(written()) if not is_open(line)]


def test_every_written_command_is_valid() -> None:
    assert {name.partition("/")[0] for name, _ in FOUND} >= {
        "zangchat",
        "scripts",
        "dev",
        "README.md",
        "speedrun.sh",
    }
    wrong = [f"{name}: {line}\n    {why}" for name, line in FOUND if (why := problem(line))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("run `python -m scripts.tok_trian` first", "python -m scripts.tok_trian", "no module"),
        (
            "see python -m scripts.tok_train --vocab=8)",
            "python -m scripts.tok_train --vocab=8",
            "--vocab_size",
        ),
        (
            "python -m scripts.tok_train again",
            "python -m scripts.tok_train again",
            "belongs to no flag",
        ),
        (
            "  python -m scripts.base_train --depth=x   a model",
            "python -m scripts.base_train --depth=x",
            "whole number",
        ),
        (
            "  torchrun --standalone -m scripts.chat_sft --run=a",
            "torchrun --standalone -m scripts.chat_sft --run=a",
            "`--`",
        ),
        ("continue with:\n  bash speedrn.sh\n", "bash speedrn.sh", "there is no"),
        (
            "e.g. DEPHT=2 bash speedrun.sh, or less",
            "DEPHT=2 bash speedrun.sh",
            "does not read DEPHT",
        ),
        ("e.g. bash dev/rungpu.sh 25, or less", "bash dev/rungpu.sh 25", "does not take 25"),
        (
            "`OMP_THREADS=1 python -m scripts.tok_train`",
            "OMP_THREADS=1 python -m scripts.tok_train",
            "reads OMP_THREADS",
        ),
        (
            "python -m scripts.mid_train --identity_data=a b.jsonl",
            "python -m scripts.mid_train --identity_data=a b.jsonl",
            "b.jsonl",
        ),
        (
            "`python -m scripts.chat_cli -p 'a`",
            "python -m scripts.chat_cli -p 'a",
            "shell does not read",
        ),
    ],
)
def test_wrong_command_is_found_and_refused(text: str, line: str, complaint: str) -> None:
    assert find(text) == [line] and complaint in problem(line)


@pytest.mark.parametrize(
    "text",
    [
        "`python -m zangchat.dataset verify [--dataset=NAME] [--repair]`",
        "python -m scripts.base_train --depth=20 --dry_run        what that would mean",
        'python -m scripts.chat_eval -i mid -a "GSM8K|ARC-Easy" -x N | tee log',
        "\x1b[1mpython -m scripts.chat_cli --source=sft \\\n    --model_tag=d4\x1b[0m; then",
        f"`python -m scripts.chat_rl --num_samples={OPEN} --task={OPEN}`",
        f"`python -m dev.bench_train ... --profile={OPEN}.json`",
    ],
)
def test_placeholders_are_filled_in(text: str) -> None:
    (line,) = find(text)
    assert problem(line) == ""


def test_commands_are_found_in_every_kind_of_text() -> None:
    literal = 'NAME = "python -m scripts"\ndef f(x):  # run `bash a.sh`\n'
    literal += '    return f"`{NAME}.tok {x} --{x}=1`" + "`bash b.sh`"'
    assert [line for text in python_texts(literal) for line in find(text)] == [
        "python -m scripts",
        f"python -m scripts.tok {OPEN} --{OPEN}=1",
        "bash b.sh",
        "bash a.sh",
    ]
    script = "# bash a.sh\nbash no.sh\necho 'x:\\n  bash b.sh'\n"
    script += "cat << END\n  python -m scripts.x --tag=$TAG\nEND\n"
    found = [line for text in shell_texts(script) for line in find(text)]
    assert sorted(found) == ["bash a.sh", "bash b.sh", f"python -m scripts.x --tag={OPEN}"]


TESTS = """
import subprocess, sys
import pytest
from zangchat.configurator import UserError

def test_raised():
    with pytest.raises(UserError):
        raise UserError("run `python -m scripts.raised`")

def test_printed():
    print("  python -m scripts.printed")

def test_read(capsys):
    print("next: python -m scripts.read")
    assert capsys.readouterr().out

def test_logged(caplog):
    import logging
    logging.getLogger("zangchat").warning("next: bash logged.sh")

def test_of_a_process():
    program = "print('`python -m scripts.process`')"
    subprocess.run([sys.executable, "-c", program], capture_output=True)

def test_good():
    print("run `python -m scripts.tok_train`, not `python -m http.server`")
"""


def test_printing_a_wrong_command_fails_the_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    flags = [
        "-p",
        "tests.listener",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={tmp_path}",
    ]
    log = tmp_path / "log"
    with log.open("wb") as file:  # not a pipe: the listener of this test would parse it, too
        subprocess.run(
            [sys.executable, "-m", "pytest", *flags, str(tmp_path)],
            cwd=ROOT,
            stdout=file,
            timeout=120,
        )
    report = log.read_text(encoding="utf-8")
    assert "6 passed, 5 errors" in report, report
    for line in ("scripts.raised", "scripts.printed", "scripts.read", "scripts.process"):
        assert f"printed: python -m {line}\n    there is no module {line}" in report
    assert "printed: bash logged.sh\n    there is no logged.sh" in report
