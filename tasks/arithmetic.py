"""Arithmetic: "What is 47 + 38?", answered by a calculator call. Generated on demand; a pair of
numbers belongs to one split.
"""

import random

from tasks.common import (
    Content,
    Conversation,
    GeneratedTask,
    chat,
    last_number,
    split_of,
    text_part,
    tool_parts,
    visible_text,
)

QUESTIONS = (
    "What is {e}?",
    "what is {e}",
    "What's {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "How much is {e}?",
    "how much is {e}",
    "Please calculate {e}.",
    "Can you compute {e}?",
    "Work out {e}.",
    "{e} = ?",
    "{e}",
    "{e}?",
    "Solve {e}.",
    "Tell me what {e} is.",
    "What does {e} equal?",
    "What do you get for {e}?",
    "I need the result of {e}.",
    "Evaluate {e}.",
    "Find {e}.",
    "Could you tell me {e}?",
    "Give me the value of {e}.",
    "{e} 等于多少？",
    "{e} 是多少？",
    "请计算 {e}。",
    "计算 {e}",
    "帮我算一下 {e}。",
)
IN_WORDS = {  # the same sum said in words
    "+": (
        "What is {a} plus {b}?",
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "{a} plus {b}",
        "{a} 加 {b} 等于多少？",
    ),
    "-": (
        "What is {a} minus {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "{a} minus {b}",
        "{a} 减 {b} 等于多少？",
    ),
    "*": (
        "What is {a} times {b}?",
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "{a} times {b}",
        "{a} 乘以 {b} 等于多少？",
    ),
}
SIGNS = {"+": ("+",), "-": ("-",), "*": ("*", "*", "x", "×")}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class Arithmetic(GeneratedTask):
    """Sums, differences (never negative) and products of numbers below 1,000, mostly of one or two
    digits.
    """

    rewarded = needs_tool = True

    def make(self, rng: random.Random) -> Conversation:
        op = rng.choice("++--*")
        while True:
            a, b = (
                rng.randrange(
                    10 ** rng.choices((1, 2, 3), weights=(2, 6, 0 if op == "*" else 2))[0]
                )
                for _ in "ab"
            )
            # without the operator and in order: who has seen 47 + 38 gets no credit for 38 + 47 or
            # 47 - 38
            if split_of("arithmetic", min(a, b), max(a, b)) == self.split:
                break
        if op == "-" and a < b:
            a, b = b, a
        if rng.random() < 0.25:
            question = rng.choice(IN_WORDS[op]).format(a=a, b=b)
        else:
            gap = rng.choice((" ", " ", ""))
            question = rng.choice(QUESTIONS).format(e=f"{a}{gap}{rng.choice(SIGNS[op])}{gap}{b}")
        result = RESULT[op](a, b)
        answer = [*tool_parts(f"{a}{op}{b}", str(result)), text_part(f"The answer is {result}.")]
        return chat(question, answer, operands=(a, op, b), result=result)

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the last number said is the result."""
        return last_number(visible_text(completion)) == conversation["result"]
