"""GGUF, the file of llama.cpp and of the programs around it (Ollama, LM Studio, KoboldCpp, ...),
as an Apertus (see apertus.py), with a Modelfile for Ollama.

F32, BF16, F16 and Q8_0 are written directly; llama.cpp's own `llama-quantize` makes smaller ones.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex
from torch import Tensor

from zangchat.config import GPTConfig
from zangchat.errors import UserError
from zangchat.flops import count_params
from zangchat.hf.apertus import ALPHA_N, ALPHA_P, BETA, EPS, apertus_weights
from zangchat.hf.directory import CHAT_TEMPLATE, UNCAPPED
from zangchat.hf.tokenizer import merge_strings, token_strings
from zangchat.runtime.files import atomic_write
from zangchat.tokenizer import SPLIT_PATTERN

if TYPE_CHECKING:
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)

MODEL_FILE = "model.gguf"
NORMAL, CONTROL = 1, 3  # types of a token
TENSOR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "attention_layernorm": "attn_norm",
    "feedforward_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Our pattern, with the group of digits that llama.cpp's pattern of this name has. The rest is the
# same but for U+017F after an apostrophe, which only ours takes for an s.
PRE_TOKENIZERS = {
    SPLIT_PATTERN.replace(r"\p{N}{1,2}", digits): name
    for digits, name in ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"))
}
NEAREST = "llama-bpe"  # to any other, and to groups of two digits
EXAMPLES = ("in 2026", "x = 10", "I'll say:\n\n  now it's 5 o'clock...\r\n\n", "don’t")
FILE_TYPES = {  # of ggml, of the whole file
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
# Ollama may not read the template in the file; Go's syntax, a system message in the first question
OLLAMA_TEMPLATE = """\
{{- $first := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ if .Content }}{{ $first = printf "%s\\n\\n" .Content }}{{ end }}
{{- else if eq .Role "user" }}<|user_start|>{{ $first }}{{ $first = "" }}{{ .Content }}<|user_end|>
{{- else if eq .Role "assistant" }}<|assistant_start|>{{ .Content }}<|assistant_end|>
{{- end }}
{{- end }}<|assistant_start|>"""


def write(
    model: "GPT", tokenizer: "RustBPETokenizer", meta: Mapping[str, Any], folder: Path, dtype: str
) -> dict[str, Any]:
    """model.gguf and Modelfile; returns notes on them. Raises UserError for a tokenizer or a size
    that the format cannot hold.
    """
    import gguf

    kind, file_kind = FILE_TYPES[dtype]
    if dtype == "q8_0" and model.config.n_embd % 32:
        problem = f"--dtype=q8_0 needs a width that is a multiple of 32, not {model.config.n_embd}"
        raise UserError(f"{problem}: choose another --dtype")
    if len(tokenizer.mergeable_tokens) == 256:
        remedy = "train the tokenizer with a larger --vocab_size"
        raise UserError(f"llama.cpp refuses a vocabulary without merges: {remedy}")
    config, base = model.config, meta["stage"] == "base"
    pre, exact = pre_tokenizer(tokenizer.pattern)
    writer = gguf.GGUFWriter(folder / MODEL_FILE, "apertus")
    writer.add_file_type(gguf.LlamaFileType[file_kind])
    add_sizes(writer, config)
    add_card(writer, config, meta)
    add_tokenizer(writer, tokenizer, base, pre)
    for name, tensor in apertus_weights(model).items():
        if "act_fn" not in name:
            add_tensor(writer, gguf_name(name), tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    atomic_write(folder / "Modelfile", modelfile(config, base))
    if exact:
        return {"pre-tokenizer": pre, "it splits text as in training": "yes"}
    difference = split_difference(tokenizer, pre)
    logger.warning(f"llama.cpp does not split all text as in training: {difference}")
    known = {"pre-tokenizer": pre, "it splits text as in training": "not always"}
    return {**known, "difference": difference}


def pre_tokenizer(pattern: str) -> tuple[str, bool]:
    """(llama.cpp's name for a split pattern, whether it splits every text alike)."""
    return PRE_TOKENIZERS.get(pattern, NEAREST), pattern in PRE_TOKENIZERS


def split_difference(tokenizer: "RustBPETokenizer", pre: str) -> str:
    """How llama.cpp's pattern splits text that ours splits otherwise, by the first example."""
    theirs = next(pattern for pattern, name in PRE_TOKENIZERS.items() if name == pre)
    for text in EXAMPLES:
        ours, other = (regex.findall(pattern, text) for pattern in (tokenizer.pattern, theirs))
        if ours != other:
            return f"{text!r} becomes {'|'.join(other)!r} and not {'|'.join(ours)!r}"
    return "it is another pattern, though these examples do not show it"


def add_sizes(writer: Any, config: GPTConfig) -> None:
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_rope_dimension_count(config.n_embd // config.n_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_xielu_alpha_p([ALPHA_P] * config.n_layer)
    writer.add_xielu_alpha_n([ALPHA_N] * config.n_layer)
    writer.add_xielu_beta([BETA] * config.n_layer)
    writer.add_xielu_eps([EPS] * config.n_layer)


def add_card(writer: Any, config: GPTConfig, meta: Mapping[str, Any]) -> None:
    tag = meta["user_config"].get("model_tag") or "zangchat"
    writer.add_name(f"{tag}-{meta['stage']}")
    writer.add_size_label(f"{count_params(config)['total'] / 1e6:.0f}M")
    writer.add_description(f"trained from nothing with zangchat, step {meta['step']}")
    writer.add_tags(["zangchat", "nanochat", "text-generation"])


def add_tokenizer(writer: Any, tokenizer: "RustBPETokenizer", base: bool, pre: str) -> None:
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    ordinary, special = len(tokenizer.mergeable_tokens), len(tokenizer.get_special_tokens())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(token_strings(tokenizer))
    writer.add_token_types([NORMAL] * ordinary + [CONTROL] * special)
    writer.add_token_merges([" ".join(merge) for merge in merge_strings(tokenizer)])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(bos if base else end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(bos)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(plain_template())


def plain_template() -> str:
    """The chat template without the marks of generated text, which only transformers knows."""
    text = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\s*{%-? (end)?generation -?%}", "", text)


def add_tensor(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    """Matrices as `kind`, vectors in fp32. ffn_down multiplies squares that exceed fp16's range,
    and llama.cpp rounds the other factor to the type of the matrix: in F16 it is BF16.
    """
    import gguf

    array = tensor.numpy()
    if tensor.dim() == 1 or kind == "F32":
        writer.add_tensor(name, array)
        return
    kind = "BF16" if kind == "F16" and "ffn_down" in name else kind
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)


def gguf_name(name: str) -> str:
    """Apertus's name of a tensor -> that of GGUF."""
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if layer is None:
        return f"{TENSOR_NAMES[stem]}.{kind}"
    return f"blk.{layer[1]}.{TENSOR_NAMES[layer[2]]}.{kind}"


def modelfile(config: GPTConfig, base: bool) -> str:
    """For `ollama create NAME -f Modelfile`."""
    lines = [f"FROM ./{MODEL_FILE}"]
    if not base:
        lines += [f'TEMPLATE """{OLLAMA_TEMPLATE}"""', 'PARAMETER stop "<|assistant_end|>"']
    lines += [
        'PARAMETER stop "<|bos|>"',
        f"PARAMETER num_ctx {config.sequence_len}",
        f"PARAMETER num_predict {min(UNCAPPED['max_new_tokens'], config.sequence_len)}",
        f"PARAMETER temperature {UNCAPPED['temperature']}",
        f"PARAMETER top_k {UNCAPPED['top_k']}",
        "PARAMETER top_p 1.0",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
    ]
    return "\n".join(lines) + "\n"
