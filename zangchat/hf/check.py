"""Compare an export with its model: tokens, chat prompts, logits and greedy text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from zangchat.errors import UserError
from zangchat.hf.format import ARCHITECTURE
from zangchat.hf.samples import CONVERSATIONS, PROMPTS, sample_texts

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer


LOGIT_TOLERANCE = 1e-3
TIE = 1e-4  # two best logits closer than this may change places with the order of a sum
GREEDY_TOKENS = 64
FAILED = "the export failed its check"


def check_export(
    folder: Path,
    model: "GPT",
    tokenizer: "RustBPETokenizer",
    architecture: str = ARCHITECTURE,
    tolerance: float = LOGIT_TOLERANCE,
) -> dict[str, Any]:
    """Load `folder` with transformers and compare it with `model`, in fp32 with the exported
    weights. The logits of an `architecture` without our cap are capped here.

    Returns the measurements. Raises UserError naming the first difference.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # the sample texts are longer than a short context
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    theirs, loading = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    unplaced = sorted({str(name) for kind in kinds for name in loading[kind]})
    made = type(theirs).__name__
    if unplaced or made != architecture:
        names = ", ".join(unplaced)
        raise UserError(f"{FAILED}: transformers made a {made}, and did not place {names}")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = check_tokens(their_tokenizer, tokenizer)
    check_chat(their_tokenizer, tokenizer)
    cap = model.config.logit_cap if architecture != ARCHITECTURE else 0.0
    difference, greedy = check_predictions(theirs.eval(), model, tokenizer, cap, tolerance)
    return {
        "largest logit difference": difference,
        "equal greedy tokens": greedy,
        "texts with equal token ids": texts,
    }


def check_tokens(theirs: Any, tokenizer: "RustBPETokenizer") -> int:
    texts = sample_texts(tokenizer)
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        if ids != tokenizer.encode(text) or theirs.decode(ids) != tokenizer.decode(ids):
            raise UserError(f"{FAILED}: its tokenizer takes {text[:40]!r} apart in another way")
        if theirs(text)["input_ids"] != [tokenizer.get_bos_token_id(), *ids]:
            raise UserError(f"{FAILED}: its tokenizer does not put <|bos|> in front of a text")
    return len(texts)


def check_chat(theirs: Any, tokenizer: "RustBPETokenizer") -> None:
    for messages in CONVERSATIONS:
        ids, mask = tokenizer.render_conversation({"messages": messages})
        rendered = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        if (rendered["input_ids"], rendered["assistant_masks"]) != (ids, mask):
            raise UserError(f"{FAILED}: its chat template renders {messages} in another way")
        if messages[-1]["role"] == "user":
            prompt = theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            if prompt != tokenizer.render_for_completion({"messages": messages}):
                raise UserError(f"{FAILED}: its chat template asks {messages} in another way")


@torch.inference_mode()
def check_predictions(
    theirs: Any,
    model: "GPT",
    tokenizer: "RustBPETokenizer",
    cap: float = 0.0,
    tolerance: float = LOGIT_TOLERANCE,
) -> tuple[float, int]:
    """(largest difference of a logit, number of greedy tokens that agree).

    Theirs continues each prompt by `generate`, with its cache. Ours reads prompt and continuation
    in one pass and must have chosen the same token everywhere, so both would have written the same.
    """
    room = model.config.sequence_len
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in PROMPTS]
    prompts.append(tokenizer.render_for_completion({"messages": CONVERSATIONS[0]}))
    # far positions, too
    prompts.append([tokenizer.get_bos_token_id(), *(tokenizer.encode(" ".join(PROMPTS)) * 8)][:512])
    worst, agreed = 0.0, 0
    for prompt in prompts:
        prompt = prompt[: max(room - GREEDY_TOKENS, room // 2)]
        start = torch.tensor([prompt])
        ids = theirs.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_new_tokens=min(GREEDY_TOKENS, room - len(prompt)),
            eos_token_id=model.config.vocab_size,  # no such token: it does not stop early
        )
        ours = model(ids)
        logits = theirs(ids).logits
        if cap > 0:
            logits = cap * torch.tanh(logits / cap)
        difference = float((ours - logits).abs().max())
        if not difference <= tolerance:  # also if it is NaN
            raise UserError(
                f"{FAILED}: a logit differs by {difference:.3g}, {tolerance:g} is allowed"
            )
        worst = max(worst, difference)
        new, ahead = ids[0, len(prompt) :], ours[0, len(prompt) - 1 : -1]
        behind = ahead.max(dim=-1).values - ahead.gather(1, new[:, None])[:, 0]
        if float(behind.max()) > max(TIE, 2 * difference if tolerance > LOGIT_TOLERANCE else 0):
            raise UserError(
                f"{FAILED}: after {tokenizer.decode(prompt)[-40:]!r} it continues in other words"
            )
        agreed += len(new)
    return worst, agreed
