"""Exports in the formats of other programs, each checked by the program itself: llama.cpp,
CTranslate2, transformers' Apertus, MLX-LM.
"""

import json
import os
import re
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import export_hf
from tests.documents import fenced
from tests.unit.test_hf import META, TEXTS
from zangchat.config import GPTConfig
from zangchat.engine import Engine
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.hf import libraries
from zangchat.hf.apertus import ARCHITECTURE, apertus_weights
from zangchat.hf.exporting import export
from zangchat.hf.gguf import EXAMPLES, PRE_TOKENIZERS, modelfile, split_difference
from zangchat.hf.libraries import FORMATS, require_libraries
from zangchat.hf.samples import CONVERSATIONS, PROMPTS, sample_texts
from zangchat.hf.tokenizer import token_strings
from zangchat.tokenizer import SPLIT_PATTERN, RustBPETokenizer

ROOT = Path(__file__).parents[2]
CAP = 9.0
QUESTION, REPLY = "Who are you?", "I am a small model, 小模型, made for a test. 2 + 2 = 4"
SUM, CALL, RESULT = "What is 47 + 38?", "47 + 38", "The answer is 85."
PATTERNS = {
    "digits1": SPLIT_PATTERN.replace("{1,2}", ""),
    "digits2": SPLIT_PATTERN,
    "digits3": SPLIT_PATTERN.replace("{1,2}", "{1,3}"),
}
GREEDY = [
    f"{text} {i}" for i in range(5) for text in ("the cat's", "世界，你", "def f(x):\n", "12")
]


def train_tokenizer(pattern: str) -> RustBPETokenizer:
    readmes = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")]
    numbers = " ".join(f"{i * i}, {i}" for i in range(4000))
    texts = iter([*TEXTS, *readmes, numbers, REPLY * 20])
    return RustBPETokenizer.train_from_iterator(texts, 900, pattern)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return train_tokenizer(PATTERNS["digits3"])


@pytest.fixture(scope="module")
def model(tokenizer: RustBPETokenizer) -> GPT:
    """Grouped queries, no setting at its default, and two replies that it knows by heart; one of
    them calls the calculator.
    """
    config = GPTConfig(
        sequence_len=256,
        vocab_size=tokenizer.get_vocab_size(),
        n_layer=3,
        n_head=4,
        n_kv_head=2,
        n_embd=128,
        rms_norm_eps=1e-4,
        rope_theta=500.0,
        logit_cap=CAP,
    )
    made, generator = GPT(config), torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    tool = [("python", CALL), ("python_output", "85"), ("text", RESULT)]
    parts = [{"type": kind, "text": text} for kind, text in tool]
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for i in range(120):
        question, reply = ((QUESTION, REPLY), (SUM, parts))[i % 2]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        ids, mask = map(torch.tensor, tokenizer.render_conversation({"messages": messages}))
        optimizer.zero_grad()
        made(ids[None, :-1], torch.where(mask[1:] == 1, ids[1:], -1)[None]).backward()
        optimizer.step()
    return made.eval()


@pytest.fixture(scope="module")
def write(model, tokenizer, tmp_path_factory):
    """write(format, dtype) -> the directory of an export; each is made once."""
    made: dict[tuple[str, str], Path] = {}

    def written(format: str, dtype: str = "float32") -> Path:
        if (format, dtype) not in made:
            folder = tmp_path_factory.mktemp(format) / "out"
            export(copy_of(model), tokenizer, META, folder, dtype, format)
            made[format, dtype] = folder
        return made[format, dtype]

    return written


def copy_of(model: GPT) -> GPT:
    """Exporting rounds the weights of the model that it is given."""
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, prepend="<|bos|>") for text in GREEDY]


@pytest.fixture(scope="module")
def ids(tokenizer) -> torch.Tensor:
    text = " ".join(PROMPTS) * 3
    return torch.tensor([tokenizer.encode(text, prepend="<|bos|>")[:200]])


@torch.inference_mode()
def uncapped(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    """(B, T, V): our logits without the cap."""
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    capped = model(ids)
    hook.remove()
    logits = seen[0][..., : model.config.vocab_size].float()
    assert torch.allclose(CAP * torch.tanh(logits / CAP), capped, atol=1e-5)
    return logits


def ours(model: GPT, tokenizer: RustBPETokenizer, prompt: list[int], count: int = 64) -> list[int]:
    (sequence,), _ = Engine(model, tokenizer).generate_batch(
        prompt, max_tokens=count, temperature=0.0
    )
    return sequence[len(prompt) :]


def same(made: list[int], expected: list[int], ends: set[int], count: int = 64) -> bool:
    """Whether the greedy tokens agree; ours leave out the one that ends a reply."""
    rest = made[len(expected) : len(expected) + 1]
    return made[: len(expected)] == expected and (
        len(expected) == count or not rest or rest[0] in ends
    )


@pytest.fixture(scope="module")
def ends(tokenizer) -> set[int]:
    return {tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")}


# ---- Apertus: transformers, MLX ------------------------------------------------------------------


def test_transformers_runs_the_apertus(write, model, tokenizer, ids, prompts, ends):
    theirs = AutoModelForCausalLM.from_pretrained(write("apertus"))
    assert type(theirs).__name__ == ARCHITECTURE and theirs.dtype == torch.float32
    with torch.inference_mode():
        assert float((theirs(ids).logits - uncapped(model, ids)).abs().max()) < 1e-3
    for prompt in prompts:
        made = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0]
        assert same(made[len(prompt) :].tolist(), ours(model, tokenizer, prompt), ends)


def test_in_bf16_relu_squared_is_still_exact(write, model, ids):
    """ln(e - 1) cannot be written in bf16: it is stored in fp32, and bf16's softplus of it is 1."""
    folder = write("apertus", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = copy_of(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    with torch.inference_mode():
        for tensors in (theirs.state_dict(), apertus_weights(rounded)):
            act = tensors["model.layers.0.mlp.act_fn.alpha_p"]
            assert float(torch.nn.functional.softplus(act)) == pytest.approx(1.0, abs=1e-6)
            assert float(torch.nn.functional.softplus(act.bfloat16())) == 1.0
        expected = uncapped(rounded, ids)
        assert float((theirs(ids).logits - expected).abs().max()) < 0.1
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert plain.dtype == torch.bfloat16
        agree = plain(ids).logits.argmax(-1) == expected.argmax(-1)
    assert agree.float().mean() > 0.9


def test_mlx_runs_the_same_directory(write, model, tokenizer, ids, prompts, ends):
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    folder = write("mlx")
    theirs, their_tokenizer = mlx_lm.load(str(folder))
    logits = torch.tensor(np.array(theirs(mx.array(ids.numpy()))))
    assert float((logits - uncapped(model, ids)).abs().max()) < 1e-3
    for prompt in prompts:
        steps = generate_step(mx.array(prompt), theirs, max_tokens=64)
        made = [int(token) for token, _ in steps]
        assert same(made, ours(model, tokenizer, prompt), ends)
    messages = [{"role": "user", "content": QUESTION}]
    rendered = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert list(rendered) == tokenizer.render_for_completion({"messages": messages})
    assert mlx_lm.generate(theirs, their_tokenizer, rendered, max_tokens=64) == REPLY


# ---- CTranslate2 ---------------------------------------------------------------------------------


def test_ctranslate2_gives_our_capped_logits(write, model, tokenizer, ids, prompts, ends):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, names = write("ctranslate2"), token_strings(tokenizer)
    theirs = ctranslate2.Generator(str(folder))
    logits = np.array(theirs.forward_batch([[names[i] for i in ids[0].tolist()]]))
    with torch.inference_mode():
        assert float((torch.tensor(logits) - model(ids)).abs().max()) < 1e-3
    made = theirs.generate_batch(
        [[names[i] for i in prompt] for prompt in prompts],
        max_length=64,
        include_prompt_in_result=False,
    )
    for prompt, result in zip(prompts, made, strict=True):
        assert same(result.sequences_ids[0], ours(model, tokenizer, prompt), ends)
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(names) == [
        *range(len(names))
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_ctranslate2_reads_smaller_files(write, tokenizer, dtype):
    ctranslate2 = pytest.importorskip("ctranslate2")
    whole, folder = write("ctranslate2"), write("ctranslate2", dtype)
    sizes = [(place / "model.bin").stat().st_size for place in (whole, folder)]
    assert sizes[1] < 0.6 * sizes[0]
    # the gate and the up-projection, which are one matrix, are stored once
    assert sizes[0] < 1.05 * (write("gguf") / "model.gguf").stat().st_size
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": QUESTION}]})
    names = token_strings(tokenizer)
    (result,) = ctranslate2.Generator(str(folder)).generate_batch(
        [[names[i] for i in prompt]], max_length=64, include_prompt_in_result=False
    )
    assert tokenizer.decode(result.sequences_ids[0]).startswith(REPLY)


# ---- llama.cpp -----------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's own server, in this process, with a cache in fp32."""

    def __init__(self, path: Path, special: bool = False) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), 256, 1
        params.cpuparams.n_threads, params.warmup, params.use_jinja = 1, False, True
        params.special = special  # whether special tokens are part of the text that it returns
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        url = self.server.listening_address + path
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)

    def encode(self, text: str) -> list[int]:
        return self.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        options = {"n_predict": count, "temperature": 0, "return_tokens": True}
        return self.post("/completion", prompt=prompt, cache_prompt=False, **options)["tokens"]

    def log_probs(self, prompt: list[int], vocab_size: int) -> torch.Tensor:
        """(V,) float64: of the token after the prompt."""
        options = {"n_predict": 1, "temperature": 0, "n_probs": vocab_size}
        answer = self.post("/completion", prompt=prompt, cache_prompt=False, **options)
        result = torch.full((vocab_size,), float("nan"), dtype=torch.double)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result


@pytest.fixture(scope="module")
def llama(write) -> Iterator[LlamaCpp]:
    pytest.importorskip("gguf")
    yield LlamaCpp(write("gguf") / "model.gguf")


def test_llama_cpp_gives_our_logits(llama, model, ids):
    for length in (1, 2, 17, 200):
        found = llama.log_probs(ids[0, :length].tolist(), model.config.vocab_size)
        expected = uncapped(model, ids[:, :length])[0, -1].double().log_softmax(-1)
        assert float((found - expected).abs().max()) < 1e-3


def test_llama_cpp_writes_our_greedy_tokens(llama, model, tokenizer, prompts, ends):
    for prompt in prompts:
        assert same(llama.greedy(prompt, 64), ours(model, tokenizer, prompt), ends)


def test_llama_cpp_renders_our_template(llama, tokenizer):
    conversations = [
        [{"role": "user", "content": " Hi,\n\nwho are you? "}],
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "谢谢"},
        ],
        [{"role": "user", "content": CONVERSATIONS[1][1]["content"]}],
    ]
    for messages in conversations:
        expected = tokenizer.render_for_completion({"messages": messages})
        rendered = llama.post("/apply-template", messages=messages)["prompt"]
        found = llama.post("/tokenize", content=rendered, add_special=True)["tokens"]
        assert found == expected


def test_llama_cpp_answers_as_we_do(llama, model, tokenizer):
    """Through its OpenAI server, with its template, as LM Studio and others use it."""
    messages = [{"role": "user", "content": QUESTION}]
    options = {"temperature": 0, "max_tokens": 64}
    answer = llama.post("/v1/chat/completions", messages=messages, **options)
    prompt = tokenizer.render_for_completion({"messages": messages})
    assert tokenizer.decode(ours(model, tokenizer, prompt)) == REPLY
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == REPLY and choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(prompt), "<|bos|> once"


def test_a_client_can_carry_out_the_tool_calls(write, model, tokenizer):
    """The program of the page gives our engine's reply; without it the result is made up."""
    pytest.importorskip("gguf")
    llama = LlamaCpp(write("gguf") / "model.gguf", special=True)
    (program,) = fenced((ROOT / "dev/docs/en/programs.md").read_text(encoding="utf-8"), "python")
    page: dict[str, Any] = {}
    exec(program.replace("http://localhost:8080", llama.server.listening_address), page)
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": SUM}]})
    reply = tokenizer.decode(ours(model, tokenizer, prompt))
    assert reply.endswith(f"{CALL}<|python_end|><|output_start|>85<|output_end|>{RESULT}")
    assert page["ask"](SUM) == RESULT and page["ask"](QUESTION) == REPLY


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.1), ("q8_0", 0.3)]
)
def test_llama_cpp_reads_smaller_files(write, model, tokenizer, ids, dtype, tolerance):
    pytest.importorskip("gguf")
    path = write("gguf", dtype) / "model.gguf"
    assert path.stat().st_size < 0.6 * (write("gguf") / "model.gguf").stat().st_size
    llama = LlamaCpp(path)
    found = llama.log_probs(ids[0].tolist(), model.config.vocab_size)
    expected = uncapped(model, ids)[0, -1].double().log_softmax(-1)
    likely = expected > -8
    assert float((found - expected)[likely].abs().max()) < tolerance
    messages = [{"role": "user", "content": QUESTION}]
    answer = llama.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=64)
    assert answer["choices"][0]["message"]["content"] == REPLY


@pytest.mark.parametrize("name", PATTERNS)
def test_token_ids_in_llama_cpp(name, model, tmp_path):
    """Identical where llama.cpp has the pattern; else the first difference is reported."""
    pytest.importorskip("gguf")
    tokenizer = train_tokenizer(PATTERNS[name])
    sizes = {**model.config.to_dict(), "vocab_size": tokenizer.get_vocab_size(), "n_layer": 1}
    small = GPT(GPTConfig(**sizes))
    small.init_weights()
    manifest = export(small, tokenizer, META, tmp_path / "out", "float32", "gguf")
    llama = LlamaCpp(tmp_path / "out" / "model.gguf")
    # U+017F after an apostrophe: only our pattern takes it for an s
    texts = [text for text in sample_texts(tokenizer) if "'ſ" not in text]
    texts += [*EXAMPLES, " ".join(str(7**i) for i in range(20))]
    differing = [text for text in texts if llama.encode(text) != tokenizer.encode(text, "<|bos|>")]
    exact = PATTERNS[name] in PRE_TOKENIZERS
    assert manifest["checks"]["it splits text as in training"] == ("yes" if exact else "not always")
    assert (differing == []) is exact
    if not exact:
        assert all(any(c.isnumeric() for c in text) for text in differing)
        assert (
            split_difference(tokenizer, "llama-bpe")
            == "'in 2026' becomes 'in| |202|6' and not 'in| |20|26'"
        )
        assert "'in| |202|6'" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_file_says_what_it_holds(write, tokenizer):
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(write("gguf") / "model.gguf").fields
    value = {name: field.contents() for name, field in fields.items()}
    assert value["general.architecture"] == "apertus" and value["general.name"] == "tiny-sft"
    assert value["apertus.context_length"] == 256
    types = value["tokenizer.ggml.token_type"]
    assert types[-9:] == [3] * 9 and set(types[:-9]) == {1}
    assert value["tokenizer.ggml.tokens"][-9:] == tokenizer.get_special_tokens()
    assert value["tokenizer.ggml.bos_token_id"] == tokenizer.get_bos_token_id()
    assert value["tokenizer.ggml.eos_token_id"] == tokenizer.encode_special("<|assistant_end|>")
    assert value["tokenizer.ggml.add_bos_token"] is True


def test_the_modelfile(write, model):
    text = (write("gguf") / "Modelfile").read_text(encoding="utf-8")
    assert text == modelfile(model.config, base=False)
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert (
        'PARAMETER stop "<|assistant_end|>"\n' in text
        and "PARAMETER num_ctx 256\nPARAMETER num_predict 256\n" in text
    )
    assert "TEMPLATE" not in modelfile(model.config, base=True)


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_refuses_by_name(model, tokenizer, tmp_path, format):
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match=f"--dtype=int4 is not possible in --format={format}"):
        export(copy_of(model), tokenizer, META, tmp_path / "x", "int4", format)
    extra = copy_of(model)
    extra.smear = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=f"--format={format} has no place for smear"):
        export(extra, tokenizer, META, tmp_path / "x", "float32", format)
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_what_llama_cpp_does(tmp_path):
    pytest.importorskip("gguf")
    bytes_only = RustBPETokenizer([bytes([i]) for i in range(256)])
    sizes = {"sequence_len": 64, "vocab_size": 265, "n_layer": 1, "n_head": 3, "n_kv_head": 3}
    model = GPT(GPTConfig(**sizes, n_embd=48))
    model.init_weights()
    with pytest.raises(UserError, match="without merges"):
        export(model, bytes_only, META, tmp_path / "x", "float32", "gguf")
    with pytest.raises(UserError, match="multiple of 32, not 48"):
        export(model, bytes_only, META, tmp_path / "x", "q8_0", "gguf")


def test_a_missing_library_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert export_hf.main(["-o", str(tmp_path / "x"), "--format=ctranslate2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ctranslate2>=4.7.2 must be" in error
    assert (
        f"run `{shlex.join([sys.executable, '-m', 'pip', 'install', 'ctranslate2>=4.7.2'])}`"
        in error
    )
    require_libraries("safetensors")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gguf", "0.17.1", "0.18.0"),
        ("ctranslate2", "4.7.1", "4.10.0"),
        ("transformers", "4.57.0", "5.0.0rc1"),
    ],
)
def test_a_library_that_is_too_old_is_as_good_as_missing(monkeypatch, name, old, new):
    monkeypatch.setattr(libraries, "find_spec", lambda name: name)
    monkeypatch.setattr(libraries, "version", lambda name: old)
    with pytest.raises(UserError, match=rf"^{name}>=[\d.]+ must be installed"):
        require_libraries(name)
    monkeypatch.setattr(libraries, "version", lambda name: new)
    require_libraries(name)


def test_a_folder_of_its_name_is_no_library(monkeypatch, tmp_path):
    """As python -m finds one in the working directory."""
    (tmp_path / "gguf").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "version", version_of_none)
    with pytest.raises(UserError, match="gguf"):
        require_libraries("gguf")


def version_of_none(name: str) -> str:
    raise PackageNotFoundError(name)


def test_the_project_asks_for_the_same_versions():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, least in libraries.LEAST.items():
        found = set(re.findall(rf'"{name}>=([\d.]+)"', project))
        assert found == {least}, name


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_says_how_to_use_it_and_what_differs(write, format):
    pytest.importorskip(
        "gguf" if format == "gguf" else "ctranslate2" if format == "ctranslate2" else "json"
    )
    text = (write(format) / "README.md").read_text(encoding="utf-8")
    first = {"gguf": "ollama create tiny-sft -f Modelfile", "mlx": "from mlx_lm import"}
    assert first.get(format, "AutoTokenizer.from_pretrained") in text
    assert ("has no such cap" in text) is not FORMATS[format].capped
    assert "\n\n\n" not in text and os.linesep in text
