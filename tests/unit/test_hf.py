"""Export to Hugging Face format, checked with the real library, and import of others' models."""

import errno
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import chat_cli, chat_eval, chat_sft, chat_web, export_hf, import_model
from zangchat import checkpoint_manager
from zangchat.config import GPTConfig, RunState
from zangchat.engine import Engine
from zangchat.errors import UserError
from zangchat.gpt import GPT
from zangchat.hf import demo, directory, exporting
from zangchat.hf.check import PROMPTS
from zangchat.hf.directory import CHAT_TEMPLATE
from zangchat.hf.exporting import export, model_card
from zangchat.hf.format import (
    CARRIED,
    DTYPES,
    MANIFEST,
    SIZES,
    VOCAB_ROWS,
    hf_config,
    special_ids,
    weight_names,
)
from zangchat.hf.importing import read_hf
from zangchat.hf.nanochat import NANOCHAT_EPS, read_checkpoint
from zangchat.hf.tokenizer import recover_merges, tokenizer_json
from zangchat.report import get_report
from zangchat.runtime.files import file_sha256
from zangchat.tokenizer import RustBPETokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "the cat's dog sat on the mat and counted 1234 letters. " * 40,
    "你好，世界！我是一个小模型。" * 40,
    "    def f(x):\n        return x\n" * 40,
]
META = {"stage": "sft", "user_config": {"model_tag": "tiny"}, "step": 7, "val_bpb": 1.25}


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    readmes = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_CN.md")]
    return RustBPETokenizer.train_from_iterator(iter([*TEXTS, *readmes]), 700)


def make_model(tokenizer: RustBPETokenizer, **config: Any) -> GPT:
    """Random, but loud: every position and every layer matters to the logits. Nothing has its
    default value.
    """
    sizes = {"sequence_len": 160, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    others = {"rms_norm_eps": 1e-3, "rope_theta": 500.0, "logit_cap": 9.0}
    model = GPT(
        GPTConfig(**{"vocab_size": tokenizer.get_vocab_size(), **sizes, **others, **config})
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@pytest.fixture
def model(tokenizer: RustBPETokenizer) -> GPT:
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def exported(tokenizer: RustBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    export(make_model(tokenizer), tokenizer, META, folder, "float32")
    return folder


def tampered(exported: Path, target: Path, name: str, change: Any) -> Path:
    """A copy without its manifest in which `change` has edited one JSON file."""
    shutil.copytree(exported, target)
    (target / MANIFEST).unlink()
    data = json.loads((target / name).read_text(encoding="utf-8"))
    change(data)
    (target / name).write_text(json.dumps(data), encoding="utf-8")
    return target


# ---- contents of an export -----------------------------------------------------------------------


def test_the_weights_are_6l_plus_2_without_padding_or_prefixes(exported, model):
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    assert len(names) == 6 * model.config.n_layer + 2
    assert model.config.padded_vocab_size > model.config.vocab_size
    assert (
        shapes["model.embed_tokens.weight"]
        == shapes["lm_head.weight"]
        == (model.config.vocab_size, 64)
    )
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert not any("norm" in name or name.startswith(("_orig_mod", "module")) for name in names)


def test_config_and_generation_config(exported, tokenizer):
    config = json.loads((exported / "config.json").read_text())
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    expected = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "intermediate_size": 256,
        "hidden_act": "relu2",
    }
    expected |= {
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "final_logit_softcapping": 9.0,
    }
    expected |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "tie_word_embeddings": False,
    }
    expected |= {
        "bos_token_id": bos,
        "eos_token_id": [end, bos],
        "pad_token_id": bos,
        "dtype": "float32",
    }
    assert {name: config[name] for name in expected} == expected
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, bos] and generation["max_new_tokens"] == 512
    assert special_ids(tokenizer, base=True)["eos_token_id"] == bos


def test_the_manifest_has_the_hash_of_every_file(exported):
    manifest = json.loads((exported / MANIFEST).read_text())
    assert set(manifest["files"]) == {path.name for path in exported.iterdir()} - {MANIFEST}
    assert all(
        file_sha256(exported / name) == file["sha256"] for name, file in manifest["files"].items()
    )
    assert manifest["source"] == {"stage": "sft", "model_tag": "tiny", "step": 7}
    assert manifest["checks"]["equal greedy tokens"] == 64 * (len(PROMPTS) + 2)


def test_the_card_has_the_numbers_of_this_checkpoint_alone(model, tokenizer):
    report = get_report()
    report.log(
        "Chat evaluation sft", [{"GSM8K": 0.125}, {"model": "sft_tiny_000007", "GSM8K problems": 8}]
    )
    report.log("Base model evaluation", [{"model": "base_tiny_000007"}, {"CORE": 0.2}])
    card = model_card(
        model.config,
        META,
        "float32",
        {
            "largest logit difference": 0.0,
            "equal greedy tokens": 1,
            "texts with equal token ids": 1,
        },
    )
    assert (
        "| GSM8K | 0.1250 |" in card
        and "| validation bits per byte | 1.2500 |" in card
        and "CORE" not in card
    )


def test_every_setting_of_a_model_is_carried_or_refused(model, tokenizer, tmp_path, monkeypatch):
    refused = {"key_offset", "value_embeds"}  # see test_modern.py
    # a new field: state its meaning in config.json, or refuse it
    assert {field.name for field in fields(GPTConfig)} == CARRIED | refused
    monkeypatch.setattr(exporting, "CARRIED", CARRIED - {"rope_theta"})
    with pytest.raises(UserError, match="rope_theta"):
        export(model, tokenizer, META, tmp_path / "x", "float32")


# ---- the real library agrees ---------------------------------------------------------------------


def test_transformers_gives_our_logits_and_our_greedy_text(exported, model, tokenizer):
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    ids = torch.randint(
        model.config.vocab_size, (3, 160), generator=torch.Generator().manual_seed(2)
    )
    with torch.inference_mode():
        ours, other = model(ids), theirs(ids).logits
    assert ours.std() > 1 and float((ours - other).abs().max()) < 1e-3
    for text in ("the cat", "世界", "    def"):
        prompt = tokenizer.encode(text, prepend="<|bos|>")
        made = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[
            0, len(prompt) :
        ].tolist()
        (sequence,), _ = Engine(model, tokenizer).generate_batch(
            prompt, max_tokens=64, temperature=0.0
        )
        plain = sequence[len(prompt) :]
        assert made[: len(plain)] == plain and (
            len(plain) == 64 or made[len(plain)] in theirs.generation_config.eos_token_id
        )


@pytest.fixture(scope="module")
def their_tokenizer(exported) -> Any:
    return AutoTokenizer.from_pretrained(exported)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_has_the_same_tokens(their_tokenizer, tokenizer, text):
    ids = tokenizer.encode(text)
    assert (
        their_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        == ids
    )
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids)


def test_real_text_has_the_same_tokens(their_tokenizer, tokenizer):
    for name in ("README.md", "README_CN.md", "zangchat/engine/batch.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for piece in re.split(r"<\|\w+\|>", text):
            assert their_tokenizer(piece)["input_ids"] == tokenizer.encode(piece, prepend="<|bos|>")


def test_special_tokens_of_strangers_can_be_kept_out(exported, tokenizer):
    """As the card advises."""
    careful = AutoTokenizer.from_pretrained(exported, split_special_tokens=True)
    assert careful("a<|user_end|>b", add_special_tokens=False)["input_ids"] == tokenizer.encode(
        "a<|user_end|>b"
    )


def test_padding_is_left_and_masked(their_tokenizer, exported, model, tokenizer):
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    batch = their_tokenizer(
        ["the cat", "the cat sat on the mat"], return_tensors="pt", padding=True
    )
    assert set(batch) == {"input_ids", "attention_mask"} and batch["attention_mask"][0, 0] == 0
    with torch.inference_mode():
        padded = theirs.generate(**batch, do_sample=False, max_new_tokens=8)[0, -8:]
        alone = theirs.generate(
            torch.tensor([tokenizer.encode("the cat", prepend="<|bos|>")]),
            do_sample=False,
            max_new_tokens=8,
        )[0, -8:]
    assert padded.tolist() == alone.tolist()


def test_a_developers_message_is_a_system_message_in_the_template(their_tokenizer):
    user = {"role": "user", "content": "hi"}
    one, other = (
        their_tokenizer.apply_chat_template(
            [{"role": role, "content": "be kind"}, user], tokenize=False
        )
        for role in ("developer", "system")
    )
    assert one == other


def test_an_empty_system_message_says_nothing_in_the_template(their_tokenizer):
    user = {"role": "user", "content": "hi"}
    one, other = (
        their_tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in ([{"role": "system", "content": ""}, user], [user])
    )
    assert one == other


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no message|empty conversation"),
        ([{"role": "system", "content": "be kind"}], "no message"),
        ([{"role": "assistant", "content": "hi"}], "take turns"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "take turns"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "text alone"),
    ],
)
def test_the_chat_template_refuses_what_we_refuse(their_tokenizer, messages, complaint):
    with pytest.raises(Exception, match=complaint):
        their_tokenizer.apply_chat_template(messages, tokenize=False)


# ---- the check of an export finds faults ---------------------------------------------------------


def swapped_halves(config: GPTConfig) -> dict[str, str]:
    names = dict(WEIGHT_NAMES(config))
    first, second = (f"transformer.h.{i}.attn.c_q.weight" for i in range(2))
    return {**names, first: names[second], second: names[first]}


def without_a_merge(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    data = TOKENIZER_JSON(tokenizer)
    del data["model"]["merges"][3]
    return data


WEIGHT_NAMES, TOKENIZER_JSON, HF_CONFIG = weight_names, tokenizer_json, hf_config
TEMPLATE = CHAT_TEMPLATE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "wrong", "complaint"),
    [
        ("weight_names", swapped_halves, "logit"),
        ("tokenizer_json", without_a_merge, "takes .* apart"),
        ("CHAT_TEMPLATE", TEMPLATE.replace("'<|user_end|>'", "' <|user_end|>'"), "chat template"),
        ("CHAT_TEMPLATE", TEMPLATE.replace("add_generation_prompt", "false"), "chat template"),
        *(
            (
                "hf_config",
                lambda *args, change=change: {**HF_CONFIG(*args), **change},
                "failed its check",
            )
            for change in (
                {"rms_norm_eps": 1e-5},
                {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
                {"final_logit_softcapping": 15.0},
                {"num_hidden_layers": 1},
                {"hidden_act": "relu"},
            )
        ),
    ],
)
def test_a_wrong_export_is_found_and_does_not_appear(
    model, tokenizer, tmp_path, monkeypatch, name, wrong, complaint
):
    if name == "CHAT_TEMPLATE":
        (tmp_path / CHAT_TEMPLATE.name).write_text(wrong, encoding="utf-8")
        wrong = tmp_path / CHAT_TEMPLATE.name
    monkeypatch.setattr(directory, name, wrong)
    with pytest.raises(UserError, match=complaint):
        export(model, tokenizer, META, tmp_path / "exports" / "out", "float32")
    assert list((tmp_path / "exports").iterdir()) == []


def test_what_the_format_cannot_carry_is_refused(model, tokenizer, tmp_path):
    model.smear = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match="smear"):
        export(model, tokenizer, META, tmp_path / "x", "float32")
    with pytest.raises(UserError, match="600 tokens and its tokenizer 700"):
        export(make_model(tokenizer, vocab_size=600), tokenizer, META, tmp_path / "x", "float32")
    broken = make_model(tokenizer)
    broken.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match="lm_head"):
        export(broken, tokenizer, META, tmp_path / "x", "float32")
    with pytest.raises(UserError, match="--dtype=float16"):
        export(make_model(tokenizer), tokenizer, META, tmp_path / "x", "float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="--output"):
        export(make_model(tokenizer), tokenizer, META, tmp_path / "full", "float32")
    with pytest.raises(UserError, match="--output=.*cannot be written"):
        export(
            make_model(tokenizer),
            tokenizer,
            META,
            tmp_path / "full" / "thesis.txt" / "x",
            "float32",
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


def test_without_transformers_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export_hf.main(["-o", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install" in error


# ---- merges --------------------------------------------------------------------------------------


def test_merges_are_recovered():
    letters = [bytes([i]) for i in range(256)]
    assert recover_merges([*letters, b"ab", b"bc", b"abc", b"abcabc"]) == [
        (b"a", b"b"),
        (b"b", b"c"),
        (b"ab", b"c"),
        (b"abc", b"abc"),
    ]
    assert recover_merges([*letters, b"bc", b"ab", b"abc"])[-1] == (
        b"a",
        b"bc",
    )  # bc comes first, so abc is a + bc
    for unmade in ([b"abc"], [b"ab", b"abcd"]):
        with pytest.raises(ValueError, match="not made of two earlier"):
            recover_merges([*letters, *unmade])


# ---- import of a Hugging Face directory ----------------------------------------------------------


def run(main: Any, *args: str) -> None:
    assert main(list(args)) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_import_give_the_same_bits(tokenizer, tmp_path, monkeypatch, dtype, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = make_model(tokenizer)
    folder = checkpoint_manager.checkpoints_dir("sft") / "tiny"
    tokenizer.save(folder)
    meta = {**META, "model_config": saved.config.to_dict(), "run_state": RunState().to_dict()}
    checkpoint_manager.save_checkpoint(folder, 7, saved.state_dict(), None, meta)
    run(export_hf.main, "-g", "tiny", "--output=~/out", f"--dtype={dtype}")
    assert "equal greedy tokens: 384" in capsys.readouterr().out
    run(import_model.main, "--path=~/out", "--source=rl", "--model_tag=back")
    weights, _, meta = checkpoint_manager.load_checkpoint(
        checkpoint_manager.checkpoints_dir("rl") / "back", 7, "cpu"
    )
    assert meta["model_config"] == saved.config.to_dict()
    for name, tensor in saved.state_dict().items():
        rows = saved.config.vocab_size if name in VOCAB_ROWS else None
        assert weights[name].dtype == DTYPES[dtype] and weights[name].shape == tensor.shape
        assert torch.equal(weights[name][:rows], tensor[:rows].to(DTYPES[dtype])), name
    model, again, _ = checkpoint_manager.load_model("rl", "cpu", "eval", "back", dtype="float32")
    assert again.fingerprint == tokenizer.fingerprint
    run(export_hf.main, "-i", "rl", "-g", "back", "-o", str(tmp_path / "again"), f"--dtype={dtype}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_demo_talks_without_a_checkpoint(exported, model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "FOLDER", exported)
    question = ("--demo", "-p", "Who are you?", "-t", "0", "--max_tokens=9", "--dtype=float32")
    run(chat_cli.main, *question)
    prompt = tokenizer.render_for_completion(
        {
            "messages": [
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": ""},
            ]
        }
    )
    ids, _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=9, temperature=0)
    answer = chat_cli.printable(tokenizer.decode(ids[0][len(prompt) :]))  # no control characters
    assert capsys.readouterr().out.strip() == answer.strip()
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "none")
    assert chat_cli.main([*question]) == 2
    problem = capsys.readouterr().err
    assert "dev/runcpu.sh" in problem and "scripts.export_hf" in problem and "none" in problem
    monkeypatch.setitem(sys.modules, "zangchat.hf.demo", None)  # refused before torch is imported
    assert chat_cli.main([*question, "-i", "rl"]) == 2
    assert "--source=rl names a checkpoint of your own: leave" in capsys.readouterr().err
    assert chat_web.main(["--demo", "-s", "0"]) == 2  # which is a step, too
    assert "--step=0" in capsys.readouterr().err


def test_an_export_has_the_rights_of_any_new_file(exported):
    (exported.parent / "new").touch()
    expected = (exported.parent / "new").stat().st_mode
    assert {path.name for path in exported.iterdir() if path.stat().st_mode != expected} == set()


def test_large_models_are_written_in_shards(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARD_BYTES", 200_000)
    export(model, tokenizer, META, tmp_path / "out", "float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and len(index["weight_map"]) == 14
    weights = read_hf(tmp_path / "out").weights
    assert torch.equal(
        weights["transformer.h.1.mlp.c_fc.weight"],
        model.state_dict()["transformer.h.1.mlp.c_fc.weight"],
    )


def test_a_changed_file_is_named(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_hf(tmp_path / "copy")
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        read_hf(tmp_path / "copy")


@pytest.mark.parametrize("text", ['{"files": ["a.bin"], "source": "web"}', "[]", "a: b"])
def test_another_programs_manifest_is_left_alone(exported, tmp_path, text):
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: None)
    (copy / MANIFEST).write_text(text)
    assert read_hf(copy).step == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"intermediate_size": 300}, "intermediate_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"final_logit_softcapping": None}, "float"),
        ({"num_key_value_heads": 3}, "n_kv_head"),
        ({"num_key_value_heads": 4}, r"c_k\.weight is \(32, 64\)"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"lacks transformer\.h\.2\."),
        ({"vocab_size": 701}, "transformer.wte.weight"),
        ({"hidden_size": "64"}, "describes an unknown model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused(exported, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        read_hf(
            tampered(exported, tmp_path / "copy", "config.json", lambda data: data.update(change))
        )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "default", "rope_theta": 70.0}},  # beside rope_parameters
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 70.0},
        {"rope_scaling": None},
    ],
)
def test_rope_is_read_as_by_transformers(exported, tmp_path, change):
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: data.update(change))
    theirs = AutoModelForCausalLM.from_pretrained(copy).config.rope_parameters
    assert read_hf(copy).config.rope_theta == theirs["rope_theta"]


def test_a_vocabulary_padded_by_transformers_is_read(exported, model, tmp_path):
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: None)
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    theirs.resize_token_embeddings(700, pad_to_multiple_of=64)
    theirs.save_pretrained(copy)
    assert json.loads((copy / "config.json").read_text())["vocab_size"] == 704
    run(import_model.main, f"--path={copy}", "--source=sft", "--model_tag=x")
    ours, _, _ = checkpoint_manager.load_model("sft", "cpu", "eval", "x", dtype="float32")
    assert ours.config == model.config
    for name in VOCAB_ROWS:
        assert torch.equal(ours.state_dict()[name][:700], model.state_dict()[name][:700])


def test_a_larger_vocabulary_that_is_no_padding_is_refused(exported, tmp_path, capsys):
    """Its tokens are missing from the tokenizer."""
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: None)
    theirs = AutoModelForCausalLM.from_pretrained(exported)
    theirs.resize_token_embeddings(702)
    theirs.save_pretrained(copy)
    assert import_model.main([f"--path={copy}", "--source=sft", "--model_tag=x"]) == 2
    assert "702 tokens and its tokenizer 700" in capsys.readouterr().err


def test_extra_tensors_are_named(exported, tmp_path):
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: None)
    save_file(
        {**load_file(copy / "model.safetensors"), "model.value_embeds.0.weight": torch.zeros(2)},
        copy / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"model\.value_embeds\.0\.weight.*1 tensors"):
        read_hf(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: data["model"]["merges"].pop(3), "splits text in a way"),
        (lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0), "not a byte-level BPE"),
        (lambda data: data["added_tokens"].pop(), "not a byte-level BPE"),
        (
            lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                Regex=r"\p{N}{1,3}|\P{N}+"
            ),
            "no way",
        ),
    ],
)
def test_another_tokenizer_is_refused_or_taken_whole(exported, tmp_path, change, complaint):
    copy = tampered(exported, tmp_path / "copy", "tokenizer.json", change)
    if complaint == "no way":  # another pattern is data like the rest
        assert read_hf(copy).tokenizer.pattern == r"\p{N}{1,3}|\P{N}+"
    else:
        with pytest.raises(UserError, match=complaint):
            read_hf(copy)


@pytest.mark.parametrize(
    "call", [{"padding": True}, {"padding": True, "truncation": True, "max_length": 8}]
)
def test_a_tokenizer_saved_after_a_training_is_read(exported, tokenizer, tmp_path, call):
    """A call's padding and truncation stay in the tokenizer, and save_pretrained writes them."""
    copy = tampered(exported, tmp_path / "copy", "config.json", lambda data: None)
    theirs = AutoTokenizer.from_pretrained(exported)
    theirs(["the cat", "the cat sat on the mat"], **call)
    theirs.save_pretrained(copy)
    assert json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))["padding"]
    assert read_hf(copy).tokenizer.fingerprint == tokenizer.fingerprint


def test_an_added_special_token_is_taken_and_an_added_word_is_refused(exported, tmp_path):
    """Ours would split the word."""
    for added, special in (("<pad>", True), ("catsat", False)):
        copy = tampered(exported, tmp_path / added, "config.json", lambda data: None)
        theirs = AutoTokenizer.from_pretrained(exported)
        theirs.add_tokens([added], special_tokens=special)
        theirs.save_pretrained(copy)
        model = AutoModelForCausalLM.from_pretrained(exported)
        model.resize_token_embeddings(len(theirs))
        model.save_pretrained(copy)
        if special:
            assert read_hf(copy).tokenizer.encode_special(added) == 700
        else:
            with pytest.raises(UserError, match="'catsat'.*cannot be imported"):
                read_hf(copy)


# ---- import of nanochat's checkpoints ------------------------------------------------------------


@pytest.fixture
def nanochat(tmp_path: Path, tokenizer: RustBPETokenizer) -> Iterator[tuple[Path, GPT]]:
    """A base directory as nanochat leaves it, and the model that it holds at d2, step 20."""
    base = tmp_path / "nanochat"
    model = make_model(tokenizer, rms_norm_eps=NANOCHAT_EPS, rope_theta=10000.0, logit_cap=15.0)
    for source in ("base", "sft"):
        for tag, step, factor in (("d2", 9, 0.5), ("d2", 20, 1.0), ("d1", 30, 0.1)):
            folder = base / checkpoint_manager.SOURCES[source] / tag
            folder.mkdir(parents=True, exist_ok=True)
            weights = {
                f"_orig_mod.{name}": tensor * factor for name, tensor in model.state_dict().items()
            }
            weights["_orig_mod.transformer.wte.weight"] = weights[
                "_orig_mod.transformer.wte.weight"
            ].bfloat16()
            torch.save(weights, folder / f"model_{step:06d}.pt")
            sizes = {name: getattr(model.config, name) for name in SIZES}
            meta = {
                "step": step,
                "val_bpb": 0.9,
                "model_config": sizes,
                "user_config": {"run": "dummy"},
            }
            (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (base / "tokenizer").mkdir()
    encoding = tiktoken.Encoding(
        name="rustbpe",
        pat_str=tokenizer.pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(tokenizer.mergeable_tokens)},
        special_tokens={
            name: tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()
        },
    )
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    model.wte.weight.data = model.wte.weight.data.bfloat16().float()
    yield base, model


def test_a_nanochat_checkpoint_becomes_ours(nanochat, tokenizer):
    base, model = nanochat
    run(import_model.main, f"--path={base}", "--source=base", "--model_tag=theirs", "--from_tag=d2")
    taken, their_tokenizer, meta = checkpoint_manager.load_model(
        "base", "cpu", "eval", "theirs", dtype="float32"
    )
    assert meta["step"] == 20 and meta["val_bpb"] == 0.9 and taken.config == model.config
    assert their_tokenizer.fingerprint == tokenizer.fingerprint
    ids = torch.randint(
        model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(3)
    )
    with torch.inference_mode():
        assert torch.equal(taken(ids), model(ids))
    run(
        import_model.main,
        f"--path={base}",
        "--source=base",
        "--model_tag=early",
        "--from_tag=d2",
        "--step=9",
    )
    assert (
        checkpoint_manager.find_last_step(checkpoint_manager.checkpoints_dir("base") / "early") == 9
    )


def test_a_folder_with_everything_side_by_side_is_read_too(nanochat, tmp_path):
    """As such models are shared."""
    base, model = nanochat
    shutil.copytree(base / "chatsft_checkpoints" / "d2", tmp_path / "shared")
    shutil.copy(base / "tokenizer" / "tokenizer.pkl", tmp_path / "shared")
    imported = read_checkpoint(tmp_path / "shared", "sft")
    assert imported.step == 20 and imported.config == model.config


def test_a_models_folder_finds_the_tokenizer_of_its_base_directory(
    nanochat, tokenizer, monkeypatch
):
    base, model = nanochat
    folder = base / "base_checkpoints" / "d2"
    monkeypatch.chdir(folder)
    for path in (folder, Path(".")):
        imported = read_checkpoint(path, "base")
        assert imported.step == 20 and imported.config == model.config
        assert imported.tokenizer.fingerprint == tokenizer.fingerprint


def test_a_missing_tokenizer_shows_before_the_tensors_are_read(nanochat, monkeypatch):
    base, _ = nanochat
    folder = base / "base_checkpoints" / "d2"
    (base / "tokenizer" / "tokenizer.pkl").unlink()
    monkeypatch.setattr(checkpoint_manager, "read_tensors", None)
    for path, place in ((base, base / "tokenizer"), (folder, folder)):
        complaint = re.escape(f"no tokenizer at {place / 'tokenizer.pkl'}: copy")
        with pytest.raises(UserError, match=complaint):
            read_checkpoint(path, "base", "d2")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_a_validation_that_is_no_number_is_left_out(nanochat, value):
    base, _ = nanochat
    path = base / "base_checkpoints" / "d2" / "meta_000020.json"
    path.write_text(path.read_text().replace("0.9", value))
    run(import_model.main, f"--path={base}", "--source=base", "--model_tag=theirs", "--from_tag=d2")
    assert checkpoint_manager.load_model("base", "cpu", "eval", "theirs")[2]["val_bpb"] is None


def test_parts_of_single_ranks_are_no_model(nanochat):
    base, _ = nanochat
    folder = base / "base_checkpoints" / "d2"
    for path in folder.glob("model_*.pt"):
        path.rename(path.with_name(f"{path.stem}_rank0.pt"))
    with pytest.raises(
        UserError, match=r"has no whole model_\*\.pt: the parts that single ranks have saved"
    ):
        read_checkpoint(base, "base", "d2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_torch_normalises_without_eps_as_the_import_says(dtype, autocast):
    """At values so small that eps decides: it is float32's epsilon, also for bfloat16."""
    x = (torch.randn(4, 64, generator=torch.Generator().manual_seed(4)) * 1e-4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        without = F.rms_norm(x, (64,))
        assert torch.equal(without, F.rms_norm(x, (64,), eps=NANOCHAT_EPS))
        for other in (1e-6, 1e-8, torch.finfo(torch.bfloat16).eps):
            assert not torch.equal(without, F.rms_norm(x, (64,), eps=other))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["base_checkpoints/d2/model_000020.pt", "tokenizer/tokenizer.pkl"])
def test_nothing_of_a_checkpoint_is_run(nanochat, tmp_path, name):
    base, _ = nanochat
    (base / name).write_bytes(pickle.dumps({"x": Malicious(tmp_path / "touched")}))
    with pytest.raises(UserError, match=Path(name).name):
        read_checkpoint(base, "base", "d2")
    assert not (tmp_path / "touched").exists()


def test_later_architectures_are_refused_by_name(nanochat):
    base, model = nanochat
    folder = base / "base_checkpoints" / "d2"
    meta = json.loads((folder / "meta_000020.json").read_text())
    meta["model_config"]["window_pattern"] = "SSSL"
    (folder / "meta_000020.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="no place for its window_pattern=SSSL"):
        read_checkpoint(base, "base", "d2")
    names = "resid_lambdas x0_lambdas smear_gate.weight smear_lambda backout_lambda"
    names += " value_embeds.0.weight value_embeds.1.weight transformer.h.1.attn.ve_gate.weight"
    extras = {name: torch.ones(2) for name in names.split()}
    torch.save({**model.state_dict(), **extras}, folder / "model_000020.pt")
    with pytest.raises(UserError) as caught:
        read_checkpoint(base, "base", "d2")
    for part in (
        "scales of the residual stream (resid_lambdas);",
        "the embedding added in each layer (x0_lambdas);",
        "smear, the previous token's embedding (smear_gate.weight, smear_lambda);",
        "backout, a layer that is subtracted at the end (backout_lambda);",
        "value embeddings (value_embeds.{0,1}.weight);",
        "their gates (transformer.h.{1}.attn.ve_gate.weight);",
        "window_pattern=SSSL: import a model of 2025",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_models_as_they_are_published_are_imported(nanochat, tokenizer, tmp_path, dtype, prefix):
    """As d20, d32 and d34 of 2025 lie on the hub: one folder, the embedding in bf16 or everything,
    a meta with settings of the run, and a token_bytes.pt that nothing needs.
    """
    base, model = nanochat
    folder = tmp_path / "nanochat-d32"
    folder.mkdir()
    shutil.copy(base / "tokenizer" / "tokenizer.pkl", folder)
    torch.save(torch.from_numpy(tokenizer.token_bytes()), folder / "token_bytes.pt")
    weights = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in model.state_dict().items()}
    embedding = f"{prefix}transformer.wte.weight"
    weights[embedding] = weights[embedding][: model.config.vocab_size].bfloat16()
    head = f"{prefix}lm_head.weight"
    weights[head] = weights[head][: model.config.vocab_size]
    torch.save(weights, folder / "model_000650.pt")
    run_settings = {"run": "d32", "depth": 32, "max_seq_len": 2048, "init_lr_frac": 0.02}
    sizes = {name: getattr(model.config, name) for name in SIZES}
    meta = {"step": 650, "val_loss": 1.0, "model_config": sizes, "user_config": run_settings}
    meta |= {"device_batch_size": 4, "max_seq_len": 2048}
    (folder / "meta_000650.json").write_text(json.dumps(meta))
    imported = read_checkpoint(folder, "sft")
    assert (imported.step, imported.val_bpb, imported.config) == (650, None, model.config)
    for name, tensor in model.state_dict().items():
        taken = imported.weights[name][: model.config.vocab_size].float()
        assert torch.equal(taken, tensor[: model.config.vocab_size].to(dtype).float())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--source=base"], "--from_tag= must name one of .*d1, d2"),
        (["--source=base", "--from_tag=d3"], "--from_tag=d3"),
        (["--source=base", "--from_tag=d2", "--step=3"], "--step=3"),
        (["--source=mid"], "neither a config.json nor"),
        (["--source=bas"], "--source=bas"),
        (["--source=base", "--from_tag=d2", "--model_tag=a/b"], "--model_tag='a/b'"),
    ],
)
def test_mistakes_of_an_import_get_one_sentence(nanochat, flags, complaint, capsys):
    assert import_model.main([f"--path={nanochat[0]}", "--model_tag=x", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(complaint, error)


def test_checkpoints_are_not_overwritten_unasked(nanochat, monkeypatch, capsys):
    flags = [f"--path={nanochat[0]}", "--source=base", "--from_tag=d2", "--model_tag=x"]
    run(import_model.main, *flags)
    assert import_model.main([*flags, "--step=9"]) == 2 and "--overwrite" in capsys.readouterr().err
    folder = checkpoint_manager.checkpoints_dir("base") / "x"
    before = sorted(checkpoint_manager.steps(folder))
    with monkeypatch.context() as full:

        def save(*_):
            raise OSError(errno.ENOSPC, "no space left")

        full.setattr(checkpoint_manager, "save_checkpoint", save)
        assert (
            import_model.main([*flags, "--step=9", "--overwrite"]) == 2
            and "no space left" in capsys.readouterr().err
        )
    assert sorted(checkpoint_manager.steps(folder)) == before and os.listdir(folder.parent) == ["x"]
    run(import_model.main, *flags, "--step=9", "--overwrite")
    assert sorted(checkpoint_manager.steps(folder)) == [9]


@pytest.mark.parametrize("kind", ["nanochat", "export"])
def test_an_imported_model_chats_is_scored_and_is_finetuned(nanochat, exported, kind, capsys):
    where = (
        [f"--path={nanochat[0]}", "--from_tag=d2"] if kind == "nanochat" else [f"--path={exported}"]
    )
    run(import_model.main, *where, "--source=sft", "--model_tag=x")
    capsys.readouterr()
    run(chat_cli.main, "-g", "x", "-p", "the cat", "-t", "0", "--max_tokens=4", "--device_type=cpu")
    assert capsys.readouterr().out.strip()
    run(chat_eval.main, "-g", "x", "-a", "arithmetic", "-x", "4", "-m", "4", "--device_type=cpu")
    assert "arithmetic" in capsys.readouterr().out.lower()
    run(import_model.main, *where, "--source=base", "--model_tag=x")
    sft = "--source=base --model_tag=x --mixture=arithmetic:40 --num_iterations=2 --target_examples_per_step=4 --eval_every=-1"
    run(chat_sft.main, *sft.split(), "--device_type=cpu", "--overwrite")
    weights, _, meta = checkpoint_manager.load_checkpoint(
        checkpoint_manager.checkpoints_dir("sft") / "x", 2, "cpu"
    )
    assert meta["run_state"]["step"] == 2 and all(
        bool(torch.isfinite(tensor).all()) for tensor in weights.values()
    )
