"""Measure how often bf16, fp16 or int8 weights change the greedy answers of a trained model. JSON.

python -m dev.agreement -i sft --task=pydocs --questions=200
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.registry import load_task
from zangchat import configurator
from zangchat.config import CheckpointConfig

# (dtype, how weights are stored)
KINDS = (
    ("bfloat16", ""),
    ("float32", "fp16"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
)


@dataclass
class Config(CheckpointConfig):
    task: str = "pydocs"  # the test questions come from this task
    questions: int = 100
    max_tokens: int = 64
    dtype: str = "float32"  # of the reference
    quantize: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, compare, argv)


def compare(config: Config) -> int:
    import torch

    from zangchat.engine import Request, engine_for_chat
    from zangchat.runtime.devices import compute_init

    device = compute_init(config.device_type)[-1]
    reference = engine_for_chat(config, device)
    task = load_task(config.task, "test")
    prompts = [
        reference.tokenizer.render_for_completion(task[i])
        for i in range(min(config.questions, len(task)))
    ]
    room = reference.model.config.sequence_len - config.max_tokens
    requests = [
        Request(prompt, config.max_tokens, temperature=0)
        for prompt in prompts
        if len(prompt) <= room
    ]
    if not requests:
        raise configurator.UserError(
            f"--max_tokens={config.max_tokens} leaves no room for a question in the context: give "
            "fewer"
        )
    said = reference.generate_many(requests)
    chosen = sum(sum(result.mask) for result in said)

    def logits(engine: Any) -> list[Any]:
        """Logits (tokens, vocabulary) at the positions of the tokens chosen by the reference."""
        found = []
        with torch.inference_mode():
            for request, result in zip(requests, said, strict=True):
                tokens = torch.tensor([[*request.tokens, *result.tokens]], device=device)
                mask = torch.tensor(result.mask, dtype=torch.bool, device=device)
                found.append(engine.model(tokens)[0, len(request.tokens) - 1 : -1][mask])
        return found

    exact = torch.cat(logits(reference))
    first, second = exact.topk(2).values.unbind(-1)
    kinds: list[dict[str, Any]] = []
    for dtype, quantize in KINDS:
        try:
            other = engine_for_chat(
                dataclasses.replace(config, dtype=dtype, quantize=quantize), device
            )
        except configurator.UserError as error:  # no kernel here
            kinds.append({"dtype": dtype, "quantize": quantize, "impossible": str(error)})
            continue
        rounded = torch.cat(logits(other))
        divergence = torch.nn.functional.kl_div(
            rounded.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        replies = [
            a.tokens == b.tokens for a, b in zip(said, other.generate_many(requests), strict=True)
        ]
        kinds.append(
            {
                "dtype": dtype,
                "quantize": quantize,
                "same_token": round(
                    float((rounded.argmax(-1) == exact.argmax(-1)).float().mean()), 5
                ),
                "same_reply": round(sum(replies) / len(replies), 4),
                "mean_kl": float(f"{float(divergence):.3g}"),
                "largest_logit_error": round(float((rounded - exact).abs().max()), 4),
            }
        )
    result = {
        "task": task.name,
        "replies": len(said),
        "tokens": chosen,
        "margins_below_0.01": int((first - second < 0.01).sum()),
    }
    print(json.dumps({**result, "against_float32": kinds}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
