"""The calculator of the models: arithmetic and counting in a string, parsed, never run as code.

    use_calculator("(1,250 - 50) / 4")            -> "300"
    use_calculator("' strawberry'.count('r')")    -> "3"
    use_calculator("open('x')")                   -> None

The expression is untrusted text. It is restricted to a small alphabet, then parsed, and only the
node types below are evaluated. Sizes are checked before each operation, so that no input costs
noticeable time or memory. No signals and no state: it works in any thread.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_STRING = 1000  # characters of a string literal
MAX_FORMULA = 256  # characters outside string literals
MAX_NODES = 100
MAX_BITS = 1024  # of any integer on the way, about 308 digits
MAX_RESULT = 64  # characters of the answer

Number = int | float

_STRING = re.compile(r"""('[^'\\\n]*'|"[^"\\\n]*")""")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?![\d,])")
_ALPHABET = re.compile(r"(?:[0-9.+\-*/%() eE]|\.count\()*")


class _RefusedError(Exception):
    """The calculator does not compute this expression."""


def use_calculator(expr: str) -> str | None:
    """The value of an expression as text; None unless it is plain arithmetic or counting.

    Numbers with + - * / // % ** and parentheses (1,000 is a thousand), and "text".count("part") as
    a number. Whole results have no decimal point, others up to 12 significant digits.
    """
    try:
        return _format(_value(_parse(expr)))
    except (_RefusedError, SyntaxError, ArithmeticError, ValueError, RecursionError, MemoryError):
        return None  # a refusal is an answer: the conversation continues without a result


def _parse(expr: str) -> ast.expr:
    pieces = _STRING.split(expr.strip())  # formula, string, formula, string, ..., formula
    formulas, strings = pieces[::2], pieces[1::2]
    if sum(map(len, formulas)) > MAX_FORMULA or any(len(s) > MAX_STRING + 2 for s in strings):
        raise _RefusedError
    formulas = [_THOUSANDS.sub(lambda match: match[0].replace(",", ""), f) for f in formulas]
    pieces[::2] = formulas
    if not all(map(_ALPHABET.fullmatch, formulas)):
        raise _RefusedError
    tree = ast.parse("".join(pieces), mode="eval").body
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise _RefusedError
    return tree


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _checked(value)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            return -_value(operand) if isinstance(sign, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _checked(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ) if part:
            return text.count(part)
    raise _RefusedError


def _quotient(a: Number, b: Number) -> Number:
    return a // b if isinstance(a, int) and isinstance(b, int) and b and a % b == 0 else a / b


def _power(a: Number, b: Number) -> Number:
    bits = a.bit_length() if isinstance(a, int) and abs(a) > 1 else 0
    if isinstance(b, int) and bits * b > MAX_BITS:
        raise _RefusedError  # known before it is computed
    result = a**b
    if isinstance(result, complex):
        raise _RefusedError
    return result


_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _quotient,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}


def _checked(value: Number) -> Number:
    fits = value.bit_length() <= MAX_BITS if isinstance(value, int) else math.isfinite(value)
    if not fits:
        raise _RefusedError
    return value


def _format(value: Number) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    text = str(value) if isinstance(value, int) else f"{value:.12g}"
    if len(text) > MAX_RESULT:
        raise _RefusedError
    return text
