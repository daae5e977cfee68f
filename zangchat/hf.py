"""Exchange of models with other programs, by Hugging Face directories in both directions.

    export      checkpoint -> a directory that stock transformers (5.0 and later) loads as NanoChatForCausalLM, without custom code:
                model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja README.md
                manifest.json (sizes and hashes of the others, where it comes from, what was checked)
    read_hf     such a directory -> Imported (as nanochat.read_checkpoint makes of nanochat's own checkpoints)
    save        Imported -> a checkpoint of ours, which chats, is evaluated and finetuned like any other

An export holds 6 L + 2 tensors (L layers): the norms have no weights, and the rows that pad the vocabulary are cut. It appears under its
name only after it was loaded back and gave the logits, the greedy tokens, the token ids and the chat prompts that we get.

Everything is read as data: tensors and JSON.
"""

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zangchat import checkpoint_manager, common
from zangchat.config import GPTConfig, RunState
from zangchat.configurator import UserError

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

FORMAT = "zangchat-export"
MANIFEST = "manifest.json"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
MODEL_TYPE, ARCHITECTURE = "nanochat", "NanoChatForCausalLM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # not float16: relu^2 reaches beyond its 65504
SHARD_BYTES = 5 * 10**9
LAYER_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
VOCAB_ROWS = ("transformer.wte.weight", "lm_head.weight")
# What config.json can say of a model. A setting that is not listed here cannot be exported: nobody would know of it.
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
CARRIED = {*SIZES, "rms_norm_eps", "rope_theta", "logit_cap"}
LOGIT_TOLERANCE = 1e-3
TIE = 1e-4  # two best logits that lie closer than this may change places with the order of a sum
GREEDY_TOKENS = 64
SETTINGS = {"do_sample": True, "temperature": 0.6, "top_k": 50, "max_new_tokens": 512}  # as in the terminal chat


def require_libraries() -> None:
    """Raises UserError where what the `hf` extra installs is not there. Of transformers, which is slow to import, the version is read."""
    try:
        import safetensors.torch  # noqa: F401
        import tokenizers  # noqa: F401

        if find_spec("transformers") is None or int(version("transformers").partition(".")[0]) < 5:
            raise ImportError("there is no transformers 5")
    except ImportError as error:
        remedy = 'run `pip install "transformers>=5" safetensors`'
        raise UserError(f"transformers 5 or newer and safetensors are needed to exchange models ({error}): {remedy}") from None


# ---- export ---------------------------------------------------------------------------------------------------------


def export(model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str) -> dict[str, Any]:
    """Write `model` (in fp32, as load_model(..., dtype="float32") gives it) to a new directory; returns the manifest.

    The model's weights are rounded to `dtype` on the way. Raises UserError for what the format cannot carry, and if the directory, loaded
    back, differs in anything; then there is no directory.
    """
    require_libraries()
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not possible: choose one of {', '.join(DTYPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={folder} is there already: delete it, or choose another folder")
    check_exportable(model, tokenizer)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).float()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write_weights(model, partial, DTYPES[dtype])
        base = meta["stage"] == "base"
        for name, data in {
            "config.json": hf_config(model.config, tokenizer, base, dtype),
            "generation_config.json": {**special_ids(tokenizer, base), **SETTINGS},
            "tokenizer.json": tokenizer_json(tokenizer),
            "tokenizer_config.json": tokenizer_config(model.config, tokenizer, base),
        }.items():
            common.atomic_write(partial / name, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        common.atomic_write(partial / CHAT_TEMPLATE.name, CHAT_TEMPLATE.read_bytes())
        checks = check_export(partial, model, tokenizer)
        common.atomic_write(partial / "README.md", model_card(model.config, meta, dtype, checks))
        manifest = make_manifest(partial, model.config, tokenizer, meta, dtype, checks)
        common.atomic_write(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written ({error}): choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def check_exportable(model: "GPT", tokenizer: "RustBPETokenizer") -> None:
    """Raises UserError naming what the format has no place for."""
    config = model.config
    names = weight_names(config)
    beyond = sorted(set(config.to_dict()) - CARRIED) + sorted(set(model.state_dict()) - set(names))
    if beyond:
        raise UserError(
            f"{ARCHITECTURE} does not know {', '.join(beyond)}: this model cannot be exported, other programs would run another"
        )
    if config.vocab_size != tokenizer.get_vocab_size():
        raise UserError(
            f"the model has {config.vocab_size} tokens and its tokenizer {tokenizer.get_vocab_size()}: put the tokenizer that it was "
            "trained with beside the checkpoint"
        )
    broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(f"{broken[0]} holds values that are no numbers: choose an earlier --step")


def weight_names(config: GPTConfig) -> dict[str, str]:
    """{our name: theirs} of all 6 L + 2 tensors."""
    layers = {
        f"transformer.h.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(config.n_layer)
        for ours, theirs in LAYER_NAMES.items()
    }
    return {"transformer.wte.weight": "model.embed_tokens.weight", **layers, "lm_head.weight": "lm_head.weight"}


def write_weights(model: "GPT", folder: Path, dtype: torch.dtype) -> None:
    """model.safetensors, or numbered shards and model.safetensors.index.json where it would be larger than SHARD_BYTES."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    rows, weights = model.config.vocab_size, model.state_dict()
    tensors = {
        theirs: (weights[ours][:rows] if ours in VOCAB_ROWS else weights[ours]).to("cpu", dtype).contiguous().clone()
        for ours, theirs in weight_names(model.config).items()
    }
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        save_file({member: tensors[member] for member in members}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        common.atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")


def special_ids(tokenizer: "RustBPETokenizer", base: bool) -> dict[str, Any]:
    """A chat model's turn ends with <|assistant_end|>, any document with <|bos|>. Padding is <|bos|>, which is never an answer to learn."""
    bos = tokenizer.get_bos_token_id()
    ends = bos if base else [tokenizer.encode_special("<|assistant_end|>"), bos]
    return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": bos}


def hf_config(config: GPTConfig, tokenizer: "RustBPETokenizer", base: bool, dtype: str) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "attention_dropout": 0.0,
        "attention_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "final_logit_softcapping": config.logit_cap,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # what programs older than transformers 5 call it
        **special_ids(tokenizer, base),
    }


def make_manifest(
    folder: Path, config: GPTConfig, tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], dtype: str, checks: Mapping[str, Any]
) -> dict[str, Any]:
    from zangchat.report import software

    files = {path.name: {"size": path.stat().st_size, "sha256": common.file_sha256(path)} for path in sorted(folder.iterdir())}
    return {
        "format": FORMAT,
        "version": 1,
        "source": origin(meta),
        "git": software().get("git"),
        "dtype": dtype,
        "model_config": config.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "checks": dict(checks),
        "files": files,
    }


def origin(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"stage": meta["stage"], "model_tag": meta["user_config"].get("model_tag"), "step": meta["step"]}


# ---- the tokenizer as others write it -------------------------------------------------------------------------------


def byte_characters() -> list[str]:
    """One visible character for each byte, as byte-level vocabularies write them: itself where it is visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def recover_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The two parts that made each token of more than one byte, in order: what is left of it when only earlier tokens may be merged.

    Raises ValueError for a token that no merge makes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            best, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) > 2 or any(ranks.get(part, rank) >= rank for part in parts[:2] if len(part) > 1):
            raise ValueError(f"token {rank}, {token!r}, is not made of two earlier ones")
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def mergeable_tokens(tokenizer: "RustBPETokenizer") -> list[bytes]:
    count = tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens())
    return [tokenizer.decode_bytes([i]) for i in range(count)]


def tokenizer_json(tokenizer: "RustBPETokenizer") -> dict[str, Any]:
    """The file of the library `tokenizers`: the same tokens for the same text. Raises UserError if the ranks are not those of merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = mergeable_tokens(tokenizer)
    try:
        merges = recover_merges(tokens)
    except ValueError as error:
        raise UserError(f"this tokenizer cannot be exported: {error}") from None
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab = {written(token): i for i, token in enumerate(tokens)}
    theirs: Any = Tokenizer(models.BPE(vocab=vocab, merges=[(written(left), written(right)) for left, right in merges]))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(name, normalized=False) for name in tokenizer.get_special_tokens()])
    bos = ("<|bos|>", tokenizer.get_bos_token_id())
    theirs.post_processor = processors.TemplateProcessing(single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[bos])
    return dict(json.loads(theirs.to_str()))


def tokenizer_config(config: GPTConfig, tokenizer: "RustBPETokenizer", base: bool) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>" if base else "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "additional_special_tokens": [name for name in tokenizer.get_special_tokens() if name != "<|bos|>"],
        "model_max_length": config.sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def read_tokenizer_json(path: Path) -> "RustBPETokenizer":
    """Our tokenizer from a byte-level BPE of the library `tokenizers`. Raises UserError if it would give other tokens."""
    from tokenizers import Tokenizer

    from zangchat.tokenizer import RustBPETokenizer

    data = read_json(path)
    try:
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocab = {id: text for text, id in data["model"]["vocab"].items() if text not in special}
        bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
        tokens = [bytes(bytes_of[character] for character in vocab[i]) for i in range(len(vocab))]
        steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
        (pattern,) = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        if sorted(special.values()) != list(range(len(tokens), len(tokens) + len(special))):
            raise ValueError("its special tokens do not follow the others")
        tokenizer = RustBPETokenizer(tokens, pattern, sorted(special, key=special.__getitem__), {"imported": path.parent.name})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no byte-level BPE with the special tokens of a chat: {error!r}") from None
    theirs = Tokenizer.from_file(str(path))
    texts = sample_texts(tokenizer)
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        if encoding.ids != tokenizer.encode(text):
            raise UserError(f"{path} splits text in a way that this tokenizer cannot, as in {text[:40]!r}: it cannot be imported")
    return tokenizer


# ---- does an export do what the model does? -------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "你是谁？",
    "Once upon a time there was a small model that could count the letters of a word, and so ",
)
CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r  \n",
    "'’.,:;!?()[]{}<>|/\\\"`~@#$%^&*_+-=",
    "äöüßéèñçåøœИжЩيعאבक्ष",
    "你好世界的一是在不了日本語한국어",
    "\u00a0\u2003\u2028\u3000\u200b\u0085\u0301\ufeff",
    "🙂🤖👩\u200d💻🇨🇭½²Ⅷ٣५①ſK",
)
SUFFIXES = ("'s", "'S", "'ll", "'LL", "'Re", "'ve", "n't", "'ſ", " 's")


def sample_texts(tokenizer: "RustBPETokenizer", count: int = 600) -> list[str]:
    """Texts of all kinds, always the same: characters of many scripts in all mixtures, and tokens of the vocabulary in a row."""
    random_ = random.Random(common.derive_seed("sample texts"))
    ordinary = tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens())
    texts = ["", " ", *PROMPTS]
    while len(texts) < count:
        if len(texts) % 3 == 0:
            text = tokenizer.decode([random_.randrange(ordinary) for _ in range(random_.randrange(1, 40))])
        else:
            pools = random_.choices(CHARACTERS, k=random_.randrange(1, 5))
            text = "".join(random_.choice(random_.choice(pools)) for _ in range(random_.randrange(1, 120)))
            text += random_.choice(("", *SUFFIXES))
        texts.append(text)
    return [re.sub(r"<\|\w+\|>", "", text) for text in texts]  # written out, these are special tokens to others


CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": " Hi,\n\nwho are you? "}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": "How many r are in "}, {"type": "text", "text": "strawberry?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": " Let me count. "},
                {"type": "python", "text": "'strawberry'.count('r')"},
                {"type": "python_output", "text": "3"},
                {"type": "text", "text": "Three"},
            ],
        },
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气\n"},
    ],
)


def check_export(folder: Path, model: "GPT", tokenizer: "RustBPETokenizer") -> dict[str, Any]:
    """Load `folder` by transformers and compare with `model` (fp32, with the exported weights); returns what was found.

    Raises UserError naming the first difference.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # the sample texts are longer than a short context
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs, loading = loaded
    odd = sorted({str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loading[kind]})
    if odd or type(theirs).__name__ != ARCHITECTURE:
        raise UserError(f"the export failed its check: transformers made a {type(theirs).__name__}, and did not place {', '.join(odd)}")
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = check_tokens(their_tokenizer, tokenizer)
    check_chat(their_tokenizer, tokenizer)
    difference, greedy = check_predictions(theirs.eval(), model, tokenizer)
    return {"largest logit difference": difference, "equal greedy tokens": greedy, "texts with equal token ids": texts}


def check_tokens(theirs: Any, tokenizer: "RustBPETokenizer") -> int:
    texts = sample_texts(tokenizer)
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        if ids != tokenizer.encode(text) or theirs.decode(ids) != tokenizer.decode(ids):
            raise UserError(f"the export failed its check: its tokenizer takes {text[:40]!r} apart in another way")
        if theirs(text)["input_ids"] != [tokenizer.get_bos_token_id(), *ids]:
            raise UserError("the export failed its check: its tokenizer does not put <|bos|> in front of a text")
    return len(texts)


def check_chat(theirs: Any, tokenizer: "RustBPETokenizer") -> None:
    for messages in CONVERSATIONS:
        plain = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            if message["role"] == "user" and not isinstance(message["content"], str)
            else message
            for message in messages
        ]
        ids, mask = tokenizer.render_conversation({"messages": plain})
        rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        if (rendered["input_ids"], rendered["assistant_masks"]) != (ids, mask):
            raise UserError(f"the export failed its check: its chat template renders {messages} in another way")
        if messages[-1]["role"] == "user":
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            if prompt != tokenizer.render_for_completion({"messages": plain}):
                raise UserError(f"the export failed its check: its chat template asks {messages} in another way")


@torch.inference_mode()
def check_predictions(theirs: Any, model: "GPT", tokenizer: "RustBPETokenizer") -> tuple[float, int]:
    """(largest difference of a logit, number of greedy tokens that agree).

    Theirs go on from each prompt by `generate`, with its cache. Ours read prompt and continuation in one pass and must have chosen the
    same token everywhere, so both would have written the same.
    """
    room = model.config.sequence_len
    prompts = [tokenizer.encode(text, prepend="<|bos|>") for text in PROMPTS]
    prompts.append(tokenizer.render_for_completion({"messages": CONVERSATIONS[0]}))
    prompts.append([tokenizer.get_bos_token_id(), *(tokenizer.encode(" ".join(PROMPTS)) * 8)][:512])  # far positions, too
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
        difference = float((ours - theirs(ids).logits).abs().max())
        if not difference <= LOGIT_TOLERANCE:  # also when it is no number
            raise UserError(f"the export failed its check: a logit differs by {difference:.3g}, {LOGIT_TOLERANCE:g} is allowed")
        worst = max(worst, difference)
        new, ahead = ids[0, len(prompt) :], ours[0, len(prompt) - 1 : -1]
        behind = ahead.max(dim=-1).values - ahead.gather(1, new[:, None])[:, 0]
        if float(behind.max()) > TIE:
            raise UserError(f"the export failed its check: after {tokenizer.decode(prompt)[-40:]!r} it goes on in other words")
        agreed += len(new)
    return worst, agreed


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(config: GPTConfig, meta: Mapping[str, Any], dtype: str, checks: Mapping[str, Any]) -> str:
    """README.md of an export: how to use it, what was measured, what it cannot do."""
    from zangchat.flops import count_params

    source = origin(meta)
    name = f"{source['model_tag'] or 'zangchat'}-{source['stage']}"
    chat = source["stage"] != "base"
    ask = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}],\n'
        '                                       add_generation_prompt=True, return_dict=True, return_tensors="pt")'
        if chat
        else 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
    )
    facts = {
        "parameters": f"{count_params(config)['total'] / 1e6:,.1f}M, stored as {dtype}",
        "layers, width": f"{config.n_layer}, {config.n_embd}",
        "query heads, key/value heads": f"{config.n_head}, {config.n_kv_head}",
        "context": f"{config.sequence_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "stage, step": f"{source['stage']}, {source['step']:,}",
    }
    scores = measured(meta)
    table = "| measured | |\n|---|---|\n" + "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [zangchat, nanochat]
---
# {name}

A small language model, trained from nothing with zangchat. It is of the architecture `{ARCHITECTURE}`, which transformers 5.0 and later
has built in: no custom code is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
{ask}
print(tokenizer.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

| | |
|---|---|
{chr(10).join(f"| {key} | {value} |" for key, value in facts.items())}

{table if scores else "No evaluation of this checkpoint was in the report when it was exported."}

When it was written, this directory was loaded by transformers and compared with the model it comes from, both in fp32: the largest
difference of a logit was {checks["largest logit difference"]:.1e}, {checks["equal greedy tokens"]} greedy tokens were equal,
and so were the token ids of {checks["texts with equal token ids"]} texts. `{MANIFEST}` has the hashes of all files.

## What to know

- It is small, and makes things up. Check what it says.
- Special tokens are written as text in this format, so whoever can write `<|assistant_start|>` into a prompt can forge a turn. For text of
  strangers load the tokenizer with `split_special_tokens=True` and put the special tokens around it by their ids.
- Tool calls (`<|python_start|>` to `<|python_end|>`) are only written, not carried out, outside of zangchat.
- In fp16 its activations overflow: use bf16 or fp32.
"""


def measured(meta: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of this very checkpoint: its validation loss, and the scores on report cards that name it."""
    from zangchat.report import checkpoint_name, get_report, summary_table

    name = checkpoint_name(meta)
    cards = [card for card in get_report().cards() if any(isinstance(item, dict) and item.get("model") == name for item in card.data)]
    table = {metric: value for metric, stages in summary_table(cards, ()).items() for value in stages.values()}
    return {"validation bits per byte": meta["val_bpb"], **table} if meta.get("val_bpb") is not None else table


# ---- import ---------------------------------------------------------------------------------------------------------


class Imported(NamedTuple):
    """A model from elsewhere, with our names and our padding."""

    weights: dict[str, Tensor]
    config: GPTConfig
    tokenizer: "RustBPETokenizer"
    step: int
    val_bpb: float | None
    origin: str


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is no JSON object")
    return data


def read_hf(folder: Path) -> Imported:
    """A directory of safetensors with model_type nanochat; of an export of ours the hashes are verified. Raises UserError."""
    require_libraries()
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        source = manifest.get("source", {})
        verify_files(folder, manifest)
    config = config_from_hf(read_json(folder / "config.json"), folder / "config.json")
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(name).name
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    ours = {theirs: ours for ours, theirs in weight_names(config).items()}
    weights = fitted({ours.get(name, name): tensor for name, tensor in tensors.items()}, config, folder)
    tokenizer = read_tokenizer_json(folder / "tokenizer.json")
    return Imported(weights, config, tokenizer, int(source.get("step", 0)), None, f"{ARCHITECTURE} directory {folder.name}")


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError naming the file that is missing or not the one the manifest describes."""
    for name, expected in manifest.get("files", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"{path} is missing: copy the export again")
        if path.stat().st_size != expected["size"] or common.file_sha256(path) != expected["sha256"]:
            raise UserError(
                f"{path} is not the file that {MANIFEST} describes: copy the export again, or delete {MANIFEST} if you changed it"
            )


def config_from_hf(data: Mapping[str, Any], path: Path) -> GPTConfig:
    """Raises UserError for another architecture."""
    rope = data.get("rope_parameters") or {}
    demanded = {
        "model_type": (data.get("model_type"), MODEL_TYPE),
        "hidden_act": (data.get("hidden_act", "relu2"), "relu2"),
        "attention_bias": (data.get("attention_bias", data.get("qkv_bias", False)), False),
        "tie_word_embeddings": (data.get("tie_word_embeddings", False), False),
        "rope_type": (rope.get("rope_type", "default"), "default"),
    }
    for name, (found, wanted) in demanded.items():
        if found != wanted:
            raise UserError(f"{path}: {name} is {found!r}, this program knows {wanted!r} alone: this model cannot be imported")
    cap = data["final_logit_softcapping"] if "final_logit_softcapping" in data else data.get("logits_soft_cap", 15.0)
    try:
        if data["intermediate_size"] != 4 * int(data["hidden_size"]):
            raise ValueError(f"intermediate_size is {data['intermediate_size']} and not four times hidden_size")
        return GPTConfig(
            sequence_len=data["max_position_embeddings"],
            vocab_size=data["vocab_size"],
            n_layer=data["num_hidden_layers"],
            n_head=data["num_attention_heads"],
            n_kv_head=data.get("num_key_value_heads") or data["num_attention_heads"],
            n_embd=data["hidden_size"],
            rms_norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", data.get("rope_theta", 10000.0)),
            logit_cap=float(cap),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no model that this program knows: {error}") from None


def fitted(tensors: Mapping[str, Tensor], config: GPTConfig, where: Path) -> dict[str, Tensor]:
    """`tensors` with our names, checked against the architecture; rows of the vocabulary cut or padded with zeros to ours.

    Raises UserError naming what is missing, of another shape, or more than this architecture has.
    """
    from zangchat.gpt import GPT

    shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    foreign, missing = sorted(set(tensors) - set(shapes)), sorted(set(shapes) - set(tensors))
    if foreign:
        raise UserError(
            f"{where} is of another architecture: it also has {', '.join(foreign[:8])}{' ...' if len(foreign) > 8 else ''}, "
            f"{len(foreign)} tensors that this program does not know and cannot leave out"
        )
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}: copy the model again")
    weights = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if name in VOCAB_ROWS and tensor.dim() == 2 and tensor.size(0) >= config.vocab_size:
            tensor = torch.nn.functional.pad(tensor[: config.vocab_size], (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, the model it belongs to needs {shape}")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds values that are no numbers")
        weights[name] = tensor
    return weights


def save(imported: Imported, source: str, model_tag: str, overwrite: bool = False) -> Path:
    """Write the model as a checkpoint of stage `source`; returns its folder. Raises UserError for a tag that has checkpoints already."""
    if imported.config.vocab_size != imported.tokenizer.get_vocab_size():
        raise UserError(
            f"the model has {imported.config.vocab_size} tokens and its tokenizer {imported.tokenizer.get_vocab_size()}: they do not "
            "belong together"
        )
    folder = checkpoint_manager.tag_folder(source, model_tag)
    if any(folder.glob("meta_*.json")) and not overwrite:
        raise UserError(f"{folder} has checkpoints already: choose another --model_tag, or give --overwrite")
    meta = {
        "stage": source,
        "val_bpb": imported.val_bpb,
        "model_config": imported.config.to_dict(),
        "user_config": {"model_tag": model_tag},
        "run_state": RunState(step=imported.step).to_dict(),
        "imported_from": imported.origin,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        imported.tokenizer.save(partial)
        checkpoint_manager.save_checkpoint(partial, imported.step, imported.weights, None, meta)
        folder.mkdir(exist_ok=True)
        checkpoint_manager.discard_after(folder, -1)  # what was there goes when the new lies on disk as a whole
        for path in sorted(partial.iterdir(), key=lambda path: path.name.startswith("meta_")):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
