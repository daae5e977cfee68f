"""Draw the model and a training step: dev/docs/{en,zh}/{model,step}.svg.

    python -m dev.draw

Every label is one text for both languages, or a pair (English, Chinese). The background is white,
so that the drawings are legible on dark pages too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from zangchat.schedule import base_multipliers

DOCS = Path(__file__).parent / "docs"
LANGUAGES = ("en", "zh")
Label = str | tuple[str, str]  # the same in both languages, or (English, Chinese)

INK, GREY, LINE = "#1f2937", "#6b7280", "#9ca3af"
BLUE, GREEN, ORANGE, VIOLET, PLAIN = "#dbe7ff", "#dcf5e3", "#ffe8cc", "#ece3ff", "#f3f4f6"
STRONG = {BLUE: "#3056d3", GREEN: "#2f9e5b", ORANGE: "#d9791a", VIOLET: "#7a4fd0", PLAIN: LINE}
FONT = "Helvetica, Arial, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"
Point = tuple[float, float]


class Drawing:
    """An SVG under construction: boxes, arrows and labels in one language."""

    def __init__(self, width: int, height: int, language: str, title: Label) -> None:
        self.index = LANGUAGES.index(language)
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="{FONT}" role="img">',
            f"<title>{self.say(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" '
            'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
        ]

    def say(self, label: Label) -> str:
        return escape(label if isinstance(label, str) else label[self.index])

    def text(
        self,
        x: float,
        y: float,
        label: Label,
        size: float = 12,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        style = ' font-weight="bold"' if bold else ""
        style += f' font-family="{MONO}"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" '
            f'text-anchor="{anchor}"{style}>{self.say(label)}</text>'
        )

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        stroke: str = "none",
        more: str = "",
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="6" fill="{fill}" '
            f'stroke="{stroke}"{more}/>'
        )

    def box(
        self, x: float, y: float, w: float, h: float, label: Label, fill: str, note: Label = ""
    ) -> None:
        """A box with its label in the middle and, below it, a note such as a shape."""
        self.rect(x, y, w, h, fill, STRONG[fill])
        middle = y + h / 2 + 4.5
        self.text(x + w / 2, middle - 8 * bool(note), label, 13, bold=True)
        if note:
            self.text(x + w / 2, middle + 9, note, 11, "#374151")

    def line(
        self,
        *points: Point,
        color: str = GREY,
        width: float = 1.4,
        tip: bool = True,
        dash: bool = False,
    ) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' * tip + ' stroke-dasharray="4 4"' * dash
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{end}/>'
        )

    def plus(self, x: float, y: float) -> None:
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#ffffff" stroke="{STRONG[BLUE]}" '
            'stroke-width="2"/>'
        )
        self.text(x, y + 6, "+", 18, STRONG[BLUE], bold=True)

    def notes(self, x: float, y: float, lines: Sequence[Label]) -> None:
        for i, label in enumerate(lines):
            self.text(x, y + 18 * i, label, 12, "#374151", "start")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


# ---- the model -----------------------------------------------------------------------------------


def model(language: str) -> str:
    """zangchat/gpt.py: the whole model on the left, one block on the right."""
    d = Drawing(900, 690, language, ("The model", "模型结构"))
    _stack(d)
    d.rect(272, 20, 608, 650, "#fafbfc", LINE)
    d.line((232, 218), (272, 30), color=LINE, tip=False, dash=True)
    d.line((232, 352), (272, 660), color=LINE, tip=False, dash=True)
    d.text(862, 46, ("one block, repeated L times", "一个块，共 L 个"), 14, bold=True, anchor="end")
    d.line((312, 66), (312, 548), color=STRONG[BLUE], width=3)
    d.text(
        300, 50, ("residual stream x (B, T, C)", "残差流 x (B, T, C)"), 12, STRONG[BLUE], "start"
    )
    _attention(d)
    _mlp(d)
    d.notes(
        292,
        584,
        [
            (
                "B rows, T tokens, C = H·D width, H query heads of D numbers each, V vocabulary",
                "B 行，T 个词元，宽度 C = H·D，H 个查询头、每个头 D 个数，词表 V",
            ),
            (
                "G heads for keys and values: G = H, or fewer (GQA, --n_kv_head)",
                "键和值用 G 个头：G = H，或更少（分组查询注意力，--n_kv_head）",
            ),
            (
                "norm: division by the root mean square, without weights; no biases anywhere",
                "norm：除以均方根，没有参数；全模型没有偏置",
            ),
            (
                "both c_proj start at zero: each block starts as the identity",
                "两个 c_proj 的初始值都是零：一开始每个块都是恒等映射",
            ),
        ],
    )
    return d.svg()


def _stack(d: Drawing) -> None:
    x, w, middle = 40.0, 180.0, 130.0
    d.text(middle, 36, ("tokens (B, T)", "词元 (B, T)"), 13, bold=True)
    steps: list[tuple[float, float, Label, str, Label]] = [  # y, height, label, color, note
        (64, 46, ("embedding wte", "嵌入 wte"), GREEN, "V × C"),
        (138, 30, "norm", PLAIN, ""),
        (212, 146, ("L blocks", "L 个块"), BLUE, "x = x + attn(norm(x))"),
        (402, 30, "norm", PLAIN, ""),
        (460, 46, ("output layer lm_head", "输出层 lm_head"), GREEN, "C × V"),
        (534, 46, ("cap of the logits", "logits 封顶"), ORANGE, "15 · tanh(z / 15)"),
    ]
    d.line((middle, 44), (middle, 63))
    tops = [step[0] for step in steps] + [614.0]
    for step, below in zip(steps, tops[1:], strict=True):
        d.line((middle, step[0] + step[1]), (middle, below - 1 - 12 * (below == 212)))
    for offset in (12, 6):
        d.rect(x + offset, 212 - offset, w, 146, BLUE, STRONG[BLUE])
    for y, h, label, fill, note in steps:
        d.box(x, y, w, h, label, fill, note)
    d.text(middle, 315, "x = x + mlp(norm(x))", 11, "#374151")
    d.text(middle + 10, 188, "(B, T, C)", 11, GREY, "start")
    d.text(middle + 10, 384, "(B, T, C)", 11, GREY, "start")
    d.text(middle, 632, ("logits (B, T, V), fp32", "logits (B, T, V)，fp32"), 13, bold=True)
    d.text(
        middle, 652, ("loss: cross-entropy of the next token", "损失：下一个词元的交叉熵"), 11, GREY
    )


def _attention(d: Drawing) -> None:
    d.text(350, 92, ("attention", "注意力"), 13, STRONG[VIOLET], "start", bold=True)
    d.line((312, 190), (343, 190))
    d.box(344, 174, 56, 32, "norm", PLAIN)
    rows: list[tuple[float, str, str]] = [
        (110, "c_q", "q (B, T, H, D)"),
        (168, "c_k", "k (B, T, G, D)"),
        (226, "c_v", "v (B, T, G, D)"),
    ]
    for y, name, shape in rows:
        d.line((400, 190), (410, 190), (410, y + 22), (423, y + 22))
        d.box(424, y, 108, 44, name, VIOLET, shape)
        if name == "c_v":
            d.line((532, y + 22), (739, y + 22))
            continue
        d.line((532, y + 22), (549, y + 22))
        d.box(550, y + 4, 74, 36, ("rotary", "RoPE"), ORANGE)
        d.line((624, y + 22), (641, y + 22))
        d.box(642, y + 4, 76, 36, "QK-norm", ORANGE)
        d.line((718, y + 22), (739, y + 22))
    d.text(
        550,
        228,
        ("turns q and k by the position", "按位置把 q 和 k 旋转一个角度"),
        11,
        GREY,
        "start",
    )
    d.box(740, 110, 128, 160, ("weighted mean", "加权平均"), VIOLET, "softmax(q·kᵀ/√D)·v")
    d.text(804, 220, ("of this token", "只看这个词元"), 11, "#374151")
    d.text(804, 236, ("and earlier ones", "和它前面的"), 11, "#374151")
    d.line((804, 270), (804, 299))
    d.box(740, 300, 128, 44, "c_proj", VIOLET, "(B, T, C)")
    d.line((740, 322), (324, 322))
    d.plus(312, 322)


def _mlp(d: Drawing) -> None:
    d.text(350, 386, "MLP", 13, STRONG[GREEN], "start", bold=True)
    d.line((312, 424), (343, 424))
    d.box(344, 408, 56, 32, "norm", PLAIN)
    d.line((400, 424), (433, 424))
    d.box(434, 402, 108, 44, "c_fc", GREEN, "(B, T, 4 C)")
    d.line((542, 424), (577, 424))
    d.box(578, 402, 108, 44, "relu²", ORANGE, "(B, T, 4 C)")
    d.line((686, 424), (739, 424))
    d.box(740, 402, 128, 44, "c_proj", GREEN, "(B, T, C)")
    d.line((804, 446), (804, 496), (324, 496))
    d.plus(312, 496)
    d.text(330, 540, ("to the next block", "到下一个块"), 11, GREY, "start")


# ---- a training step -----------------------------------------------------------------------------


def step(language: str) -> str:
    """zangchat/training/trainer.py:Trainer.train_step, on two ranks."""
    d = Drawing(900, 700, language, ("A training step", "一步训练"))
    _rows(d)
    _passes(d)
    _update(d)
    return d.svg()


def _heading(d: Drawing, y: float, label: Label) -> None:
    d.text(24, y, label, 14, anchor="start", bold=True)


def _bar(
    d: Drawing, x: float, y: float, w: float, fill: str, label: str = "", bos: bool = True
) -> None:
    """A run of tokens; the dark end is its <|bos|>."""
    d.rect(x, y, w, 22, fill, STRONG[fill])
    if bos:
        d.rect(x, y, 7, 22, STRONG[fill])
    if label:
        d.text(x + w / 2 + 3, y + 15.5, label, 12)


def _rows(d: Drawing) -> None:
    _heading(d, 34, ("1  Rows of tokens", "1  词元的行"))
    d.text(24, 62, ("documents", "文档"), 12, GREY, "start")
    for x, w, fill, label in ((24, 150, BLUE, "a"), (182, 90, GREEN, "b"), (24, 248, ORANGE, "c")):
        _bar(d, x, 72 + 30 * (fill == ORANGE), w, fill, label)
    d.text(24, 150, ("conversations (never split)", "对话（从不切开）"), 12, GREY, "start")
    _bar(d, 24, 160, 110, VIOLET, "d")
    d.line((284, 116), (392, 116))
    d.text(338, 106, ("encode, pack", "编码，拼行"), 12, GREY)
    left, width = 404, 340
    d.text(left, 62, ("T + 1 tokens a row", "每行 T + 1 个词元"), 12, GREY, "start")
    for row, bars in enumerate(
        (
            ((0, 150, BLUE, "a"), (150, 90, GREEN, "b"), (240, 100, ORANGE, "c")),
            ((0, 160, ORANGE, "c"), (160, 110, VIOLET, "d"), (270, 70, PLAIN, "")),
        )
    ):
        for x, w, fill, label in bars:
            _bar(d, left + x, 72 + 34 * row, w, fill, label, bos=fill != PLAIN)
    d.text(left + 306, 121.5, ("padding", "填充"), 11, GREY)
    d.text(left + width + 14, 88, ("→ rank 0", "→ rank 0"), 12, INK, "start", mono=True)
    d.text(left + width + 14, 122, ("→ rank 1", "→ rank 1"), 12, INK, "start", mono=True)
    d.notes(
        left,
        154,
        [
            (
                "dark: <|bos|>; c continues in the next row, after a <|bos|>",
                "深色是 <|bos|>；c 放不下的部分在下一行接着放，前面加一个 <|bos|>",
            ),
            (
                "targets: the tokens that follow; of d the assistant's words only",
                "目标是后一个词元；d 里只算助手说的话",
            ),
        ],
    )


def _passes(d: Drawing) -> None:
    _heading(d, 222, ("2  Gradients, on every rank", "2  每个进程各算梯度"))
    chain: list[tuple[float, float, Label, str, Label]] = [
        (118, 118, ("inputs, targets", "输入、目标"), PLAIN, "(B, T)"),
        (268, 100, ("forward", "前向"), BLUE, ("the model", "模型")),
        (400, 112, ("loss", "损失"), ORANGE, ("sum ÷ n", "总和 ÷ n")),
        (544, 100, ("backward", "反向"), BLUE, ""),
        (676, 112, ("gradients", "梯度"), GREEN, ("added up", "累加")),
    ]
    for rank, y in enumerate((240, 306)):
        d.text(24, y + 28, f"rank {rank}", 12, INK, "start", mono=True)
        for i, (x, w, label, fill, note) in enumerate(chain):
            d.box(x, y, w, 46, label, fill, note)
            if i + 1 < len(chain):
                d.line((x + w, y + 23), (chain[i + 1][0] - 1, y + 23))
        d.line((788, y + 23), (830, y + 23), (830, 406))
    d.notes(
        344,
        376,
        [
            (
                "n: supervised tokens of the step on all ranks, counted beforehand",
                "n：这一步所有进程有监督词元的总数，事先数好",
            ),
            (
                "several passes of --device_batch_size rows, if memory is short",
                "内存不够时分几次跑，每次 --device_batch_size 行",
            ),
        ],
    )


def _update(d: Drawing) -> None:
    _heading(d, 436, ("3  Update", "3  更新"))
    d.box(
        716,
        408,
        160,
        50,
        ("sum over ranks", "各进程求和"),
        GREEN,
        ("each weight on one rank", "每个权重归一个进程"),
    )
    d.line((796, 458), (796, 487))
    d.box(716, 488, 160, 46, ("clip", "裁剪"), PLAIN, ("global norm at most 1", "总范数不超过 1"))
    d.rect(440, 442, 224, 140, "none", LINE, ' stroke-dasharray="4 4"')
    d.line((716, 511), (684, 511), (684, 478), (653, 478))
    d.line((684, 511), (684, 546), (653, 546))
    d.box(452, 452, 200, 52, "Muon", VIOLET, ("matrices of the blocks", "各块的矩阵"))
    d.box(452, 520, 200, 52, "AdamW", ORANGE, ("embedding, output layer", "嵌入、输出层"))
    d.line((452, 478), (420, 478), (420, 512), (389, 512))
    d.line((452, 546), (420, 546), (420, 512), tip=False)
    d.box(
        228, 488, 160, 48, ("new weights", "新的权重"), BLUE, ("sent to all ranks", "发给所有进程")
    )
    d.line((318, 488), (318, 353), color=STRONG[BLUE], dash=True)
    d.text(308, 425, ("next step", "下一步"), 12, STRONG[BLUE], "end")
    _schedule(d)


def _schedule(d: Drawing) -> None:
    """The learning rate over a run, as schedule.py gives it."""
    steps, left, width, bottom, height = 1000, 452, 200, 672, 44
    rates = [base_multipliers(i, steps).lr for i in range(0, steps, 5)]
    curve = [
        (left + width * i / (len(rates) - 1), bottom - height * rate)
        for i, rate in enumerate(rates)
    ]
    d.line((552, 620), (552, 583))
    d.line((left, bottom), (left + width, bottom), color=LINE, tip=False)
    d.line(*curve, color=STRONG[ORANGE], width=2, tip=False)
    d.text(left - 12, 636, ("schedule", "调度"), 13, anchor="end", bold=True)
    d.text(left - 12, 654, ("learning rate over the run", "学习率随步数的变化"), 12, GREY, "end")
    d.text(
        left - 12, 672, ("(also momentum, weight decay)", "（还有动量和权重衰减）"), 12, GREY, "end"
    )
    d.text(left, 690, ("first step", "第一步"), 11, GREY, "start")
    d.text(left + width, 690, ("last step", "最后一步"), 11, GREY, "end")


DRAWINGS = {"model": model, "step": step}


def main() -> int:
    for language in LANGUAGES:
        for name, draw in DRAWINGS.items():
            path = DOCS / language / f"{name}.svg"
            path.write_text(draw(language), encoding="utf-8")
            print(f"{path}: {path.stat().st_size / 1000:.1f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
