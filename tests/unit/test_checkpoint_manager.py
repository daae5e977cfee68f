"""Checkpoints: what is saved comes back, a step exists whole or not at all, damage is named, and
the right one is found.
"""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from zangchat import checkpoint_files
from zangchat import checkpoint_manager as cm
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.files import file_sha256

MODEL = {
    "transformer.wte.weight": torch.arange(12.0).view(4, 3),
    "lm_head.weight": torch.ones(4, 3, dtype=torch.bfloat16),
}
META = {
    "val_bpb": 1.5,
    "model_config": {"n_layer": 2},
    "user_config": {"depth": 2},
    "run_state": {"step": 1},
}


def shard(start: int = 0, stop: int = 4) -> dict[str, Any]:
    rows = torch.arange(12.0).view(4, 3)[start:stop]
    return {
        "lm_head.weight": {
            "shape": [4, 3],
            "slice": [start, stop],
            "tensors": {"exp_avg": rows, "step": torch.tensor(7.0)},
        }
    }


def save(directory: Path, step: int, **changes: Any) -> None:
    cm.save_checkpoint(directory, step, MODEL, shard(), {**META, **changes})


def damage(path: Path) -> None:
    """Flip one bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


# ---- round trip ----------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 123)
    model, optimizer, meta = cm.load_checkpoint(tmp_path, 123, "cpu", load_optimizer=True)
    assert {name: tensor.dtype for name, tensor in model.items()} == {
        name: tensor.dtype for name, tensor in MODEL.items()
    }
    assert all(torch.equal(model[name], MODEL[name]) for name in MODEL)
    assert torch.equal(
        optimizer["lm_head.weight"]["tensors"]["exp_avg"], torch.arange(12.0).view(4, 3)
    )
    assert (
        {key: meta[key] for key in META} == META
        and meta["step"] == 123
        and meta["format_version"] == checkpoint_files.FORMAT_VERSION
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "meta_000123.json",
        "model_000123.pt",
        "optim_000123_rank0.pt",
    ]


def test_the_prefix_of_compiled_models_is_neither_written_nor_kept(tmp_path):
    cm.save_checkpoint(
        tmp_path, 1, {f"_orig_mod.{name}": tensor for name, tensor in MODEL.items()}, None, META
    )
    assert torch.load(tmp_path / "model_000001.pt", weights_only=True).keys() == MODEL.keys()
    assert cm.strip_prefix({"_orig_mod.mode.weight": torch.zeros(1)}).keys() == {
        "mode.weight"
    }  # a prefix, not a set of letters


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    big = torch.zeros(1_000_000)
    cm.save_checkpoint(tmp_path, 1, {"part": big[:10]}, None, META)
    assert (tmp_path / "model_000001.pt").stat().st_size < 10_000


def test_shards_of_several_ranks_make_one_state(tmp_path):
    cm.save_checkpoint(tmp_path, 1, MODEL, shard(0, 2), META)
    _add_rank(tmp_path, 1, rank=1, data=shard(2, 4))
    _, merged, _ = cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True)
    assert torch.equal(
        merged["lm_head.weight"]["tensors"]["exp_avg"], torch.arange(12.0).view(4, 3)
    )
    assert float(merged["lm_head.weight"]["tensors"]["step"]) == 7.0


def _add_rank(directory: Path, step: int, rank: int, data: dict[str, Any]) -> None:
    """What rank `rank` of a larger run would have added (real ranks: test_trainer)."""
    size, digest = checkpoint_files.write_tensors(directory / cm.optim_name(step, rank), data)
    files = cm.read_meta(directory, step)["files"] | {
        cm.optim_name(step, rank): {"size": size, "sha256": digest}
    }
    cm.update_meta(directory, step, {"files": files})


def test_a_state_dict_comes_back_as_it_was_saved(tmp_path):
    group = {"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "params": [0]}
    cm.save_checkpoint(
        tmp_path,
        1,
        MODEL,
        {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [group]},
        META,
    )
    state = cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True)[1]
    assert state["param_groups"] == [group] and torch.equal(
        state["state"][0]["exp_avg"], torch.ones(3)
    )
    _add_rank(tmp_path, 1, rank=1, data=[{"state": {}, "param_groups": []}])  # type: ignore[arg-type]
    assert cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True, rank=1)[1] == [
        {"state": {}, "param_groups": []}
    ]
    with pytest.raises(
        UserError,
        match=r"optim_000001_rank2\.pt is missing: the optimizer state of step 1 was saved by 2 "
        r"ranks",
    ):
        cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True, rank=2)


def test_a_missing_shard_is_named(tmp_path):
    cm.save_checkpoint(tmp_path, 1, MODEL, shard(0, 2), META)
    with pytest.raises(UserError, match=r"lm_head.weight: rows from 2 are missing"):
        cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True)
    _add_rank(tmp_path, 1, rank=1, data=shard(2, 4))
    (tmp_path / "optim_000001_rank1.pt").unlink()
    with pytest.raises(UserError, match=r"optim_000001_rank1.pt is missing"):
        cm.load_checkpoint(tmp_path, 1, "cpu", load_optimizer=True)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Evil()}, tmp_path / "model_000001.pt")
    size = (tmp_path / "model_000001.pt").stat().st_size
    files = {"model_000001.pt": {"size": size, "sha256": file_sha256(tmp_path / "model_000001.pt")}}
    (tmp_path / "meta_000001.json").write_text(
        json.dumps(
            {**META, "step": 1, "files": files, "format_version": checkpoint_files.FORMAT_VERSION}
        )
    )
    with pytest.raises(UserError, match="model_000001.pt cannot be read"):
        cm.load_checkpoint(tmp_path, 1, "cpu")
    assert not (tmp_path / "ran").exists()


# ---- a step exists whole or not at all -----------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


def die_at(monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """A save of one rank renames three files; it dies before or after one of the renames."""
    replace, calls = os.replace, iter(range(100))

    def dying(source: Any, target: Any) -> None:
        call = next(calls)
        if call == point // 2 and point % 2 == 0:
            raise Killed
        replace(source, target)
        if call == point // 2:
            raise Killed

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("point", range(6))
def test_killed_while_a_step_is_saved_again_leaves_no_mixture(tmp_path, monkeypatch, point):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, point)
        other = {name: tensor + 1 for name, tensor in MODEL.items()}
        cm.save_checkpoint(tmp_path, 2, other, shard(), META)
    assert sorted(cm.steps(tmp_path)) == ([1, 2] if point == 5 else [1])


@pytest.mark.parametrize("point", range(6))
def test_killed_anywhere_in_a_save_leaves_the_previous_step(tmp_path, monkeypatch, point):
    save(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, point)
        save(tmp_path, 2)
    survivor = 2 if point == 5 else 1  # after the last rename the new step is there
    assert cm.find_last_step(tmp_path) == survivor and cm.find_verified_step(tmp_path) == survivor
    assert cm.load_checkpoint(tmp_path, survivor, "cpu", load_optimizer=True)[2]["step"] == survivor
    save(tmp_path, 2)  # and nothing is in the way of the next attempt
    assert cm.find_verified_step(tmp_path) == 2


def test_a_full_disk_leaves_the_previous_step_and_no_rest(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = sorted(tmp_path.iterdir())
    write = checkpoint_files._HashingWriter.write

    def full(self: Any, data: bytes) -> int:
        if self.size > 1000:
            self.error = OSError(28, "No space left on device")
            raise self.error
        return write(self, data)

    monkeypatch.setattr(checkpoint_files._HashingWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == before


def test_temporary_files_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".model_000002.pt.1234.tmp").write_bytes(b"half")
    cm.remove_temporary_files(tmp_path)
    assert sorted(cm.steps(tmp_path)) == [1] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["model_000002.pt", "optim_000002_rank0.pt"])
def test_damage_is_named_and_latest_falls_back(tmp_path, caplog, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / name)
    assert sorted(cm.steps(tmp_path)) == [1, 2]  # the size is right
    with pytest.raises(UserError, match=f"{name} is damaged: its sha256"):
        cm.find_verified_step(tmp_path, 2)
    assert cm.find_verified_step(tmp_path) == 1
    assert "skipping step 2" in caplog.text and name in caplog.text


@pytest.mark.parametrize("name", ["model_000002.pt", "optim_000002_rank0.pt", "meta_000002.json"])
def test_truncation_is_seen_without_reading_the_file(tmp_path, caplog, name):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-20])
    assert sorted(cm.steps(tmp_path)) == [1] and cm.find_last_step(tmp_path) == 1
    with pytest.raises(UserError, match=f"{name} is damaged"):
        cm.load_checkpoint(tmp_path, 2, "cpu")
    assert cm.find_verified_step(tmp_path) == 1 and name in caplog.text


def test_where_no_step_is_whole_the_damage_of_the_newest_is_named(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"model_{step:06d}.pt").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"model_000002.pt is damaged: 3 bytes.*another --model_tag"
    ):
        cm.find_last_step(tmp_path)


def test_a_step_without_meta_does_not_exist(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "meta_000002.json").unlink()
    assert cm.find_last_step(tmp_path) == 1
    with pytest.raises(UserError, match=r"no step 2 .*present: 1"):
        cm.load_checkpoint(tmp_path, 2, "cpu")


def write_newer_format(directory: Path, step: int) -> None:
    """A step of a version of this code that is still to come: other files, other entries."""
    files = [f"weights_{step:06d}.safetensors", f"model_{step:06d}.pt"]
    for name in files:
        (directory / name).write_bytes(b"newer")
    meta = {"format_version": checkpoint_files.FORMAT_VERSION + 1, "at": step, "files": files}
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(meta), encoding="utf-8")


def test_a_step_of_a_newer_format_is_refused_by_name_and_never_deleted(tmp_path):
    stage = tmp_path / "base_checkpoints"
    folder = stage / "d2"
    save(folder, 1)
    save(folder, 2)
    write_newer_format(folder, 3)
    before = {path.name for path in folder.glob("*_000003*")}
    refusal = r"meta_000003.json has format version 2, this code reads version 1: update zangchat"
    for refused in (
        lambda: cm.load_checkpoint(folder, 3, "cpu"),
        lambda: cm.find_last_step(folder),
        lambda: cm.find_verified_step(folder),  # --resume=latest
        lambda: cm.find_verified_step(folder, 2),  # its run would make step 3 again
        lambda: cm.load_model_from_dir(stage, "cpu", "eval"),
    ):
        with pytest.raises(UserError, match=refusal):
            refused()
    cm.purge(folder, keep_last=1)
    assert cm.discard_after(folder, -1) == [2]
    assert {path.name for path in folder.glob("*_0*")} == before
    assert cm.model_tags(stage) == ["d2"]  # so that it is refused, and not passed over


def test_an_input_error_is_reported_and_latest_falls_back(tmp_path, caplog, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    read = checkpoint_files.file_sha256

    def fail(path: Path) -> str:
        if path.name == "model_000002.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(checkpoint_files, "file_sha256", fail)
    assert cm.find_verified_step(tmp_path) == 1
    assert "skipping step 2" in caplog.text and "cannot be read: [Errno 5]" in caplog.text
    with pytest.raises(UserError, match=r"model_000002.pt cannot be read: \[Errno 5\]"):
        cm.find_verified_step(tmp_path, 2)


# ---- which ones are kept, which one is found -----------------------------------------------------


def test_purging_keeps_the_newest_whole_steps(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "model_000004.pt").unlink()  # step 4 is no step any more
    cm.purge(tmp_path, keep_last=2)
    assert sorted(cm.steps(tmp_path)) == [2, 3]
    assert not list(tmp_path.glob("*_000001*")) and not list(tmp_path.glob("*_000004*"))
    cm.purge(tmp_path, keep_last=0)
    assert sorted(cm.steps(tmp_path)) == [3]


def test_purging_keeps_every_nth_step_for_ever(tmp_path):
    for step in (3, 4, 6, 7, 8):
        save(tmp_path, step)
    cm.purge(tmp_path, keep_last=1, keep_every=3)
    assert sorted(cm.steps(tmp_path)) == [3, 6, 8]


def test_a_snapshot_is_not_touched_by_what_comes_after_it(tmp_path, monkeypatch):
    write, changed, weight = checkpoint_files.write_tensors, threading.Event(), torch.zeros(3)
    monkeypatch.setattr(
        checkpoint_files,
        "write_tensors",
        lambda path, data: (changed.wait(60), write(path, data))[1],
    )
    writing = cm.Save(tmp_path, 1, {"weight": weight}, None, META, snapshot=True)
    weight.fill_(1)
    changed.set()
    writing.commit()
    assert cm.load_checkpoint(tmp_path, 1, "cpu")[0]["weight"].tolist() == [0, 0, 0]


def test_purging_touches_nothing_else(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("metrics.jsonl", "tokenizer.json", "notes_000001.txt"):
        (tmp_path / name).write_text("mine")
    cm.purge(tmp_path, keep_last=1)
    assert {"metrics.jsonl", "tokenizer.json", "notes_000001.txt"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_discarding_what_lies_beyond_a_step(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert cm.discard_after(tmp_path, 1) == [2, 3] and sorted(cm.steps(tmp_path)) == [1]
    assert cm.discard_after(tmp_path, -1) == [1] and not list(tmp_path.iterdir())


def test_the_last_step_is_the_largest_number_not_the_last_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "meta_latest.json").write_text("{}")
    assert cm.find_last_step(tmp_path) == 1_000_000


def test_the_largest_model_is_the_deepest_tag_else_the_newest(tmp_path, caplog):
    for age, tag in enumerate(["old", "new"]):
        save(tmp_path / tag, 1)
        os.utime(tmp_path / tag / "meta_000001.json", (1000 + age, 1000 + age))
    (tmp_path / "d99").mkdir()  # no checkpoint in it
    (tmp_path / "a file").write_text("")
    assert cm.find_largest_model(tmp_path) == "new"
    for tag in ("d9", "d20", "d12x"):
        save(tmp_path / tag, 1)
    assert cm.find_largest_model(tmp_path) == "d20"


def test_nothing_there_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    for source, command in cm.COMMANDS.items():
        with pytest.raises(UserError, match=f"no checkpoint in .*run `python -m {command}` first"):
            cm.load_model(source, "cpu", "eval")
    with pytest.raises(UserError, match="--source=best is no stage"):
        cm.load_model("best", "cpu", "eval")


def test_an_unknown_tag_lists_those_present(tmp_path, monkeypatch):
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    for tag in ("d2", "d4"):
        save(tmp_path / "base_checkpoints" / tag, 1)
    with pytest.raises(UserError, match="--model_tag=d3 is not in .*choose one of d2, d4"):
        cm.load_model("base", "cpu", "eval", model_tag="d3")
    with pytest.raises(UserError, match="no step 5 .*present: 1"):
        cm.load_model("base", "cpu", "eval", model_tag="d4", step=5)
    (tmp_path / "base_checkpoints" / "d3").mkdir()
    with pytest.raises(
        UserError, match="no checkpoint in .*d3: run `python -m scripts.base_train` first"
    ):
        cm.load_model("base", "cpu", "eval", model_tag="d3")


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """<base> with one real (untrained) model and its tokenizer; the base tokenizer is another
    one.
    """
    from zangchat.config import GPTConfig
    from zangchat.gpt import GPT
    from zangchat.tokenizer import RustBPETokenizer

    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    tokenizer = RustBPETokenizer.train_from_iterator(
        iter(["some text to learn from, some more text"]), 270
    )
    model = GPT(
        GPTConfig(
            sequence_len=8,
            vocab_size=tokenizer.get_vocab_size(),
            n_layer=1,
            n_head=2,
            n_kv_head=2,
            n_embd=16,
        )
    )
    model.init_weights(head_init_scale=0.1)
    directory = tmp_path / "chatsft_checkpoints" / "d1"
    cm.save_checkpoint(
        directory, 3, model.state_dict(), None, {**META, "model_config": model.config.to_dict()}
    )
    tokenizer.save(directory)
    other = RustBPETokenizer.train_from_iterator(iter(["something else"]), 266)
    other.save(str(tmp_path / "tokenizer"))
    torch.save(model(torch.arange(8)[None]), tmp_path / "logits.pt")
    return tmp_path


def test_a_model_is_loaded_with_the_tokenizer_beside_it(trained):
    model, tokenizer, meta = cm.load_model("sft", "cpu", "eval", dtype="float32")
    assert not model.training and meta["step"] == 3
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 270
    assert torch.equal(
        model(torch.arange(8)[None]), torch.load(trained / "logits.pt", weights_only=True)
    )
    assert cm.load_model("sft", "cpu", "train")[0].training


def test_all_ranks_load_the_step_that_rank_0_has_chosen(trained, monkeypatch):
    directory = trained / "chatsft_checkpoints" / "d1"
    model, _, meta = cm.load_model("sft", "cpu", "eval")
    # another process saves it when rank 0 has looked
    cm.save_checkpoint(directory, 4, model.state_dict(), None, meta)
    monkeypatch.setattr(collectives, "world", lambda: (1, 2))
    monkeypatch.setattr(collectives, "from_rank_0", lambda own: ((directory, 3), None))
    assert cm.load_model("sft", "cpu", "eval")[2]["step"] == 3
    monkeypatch.setattr(collectives, "from_rank_0", lambda own: (None, UserError("none there")))
    with pytest.raises(UserError, match="none there"):
        cm.load_model("sft", "cpu", "eval")


def test_a_stage_given_as_tag_is_taken_as_the_source(trained, caplog):
    caplog.set_level("INFO")
    assert cm.load_model("base", "cpu", "eval", model_tag="sft")[2]["step"] == 3
    assert "names a stage" in caplog.text


def test_weights_that_do_not_fit_the_meta_are_an_error(trained):
    directory = trained / "chatsft_checkpoints" / "d1"
    config = cm.read_meta(directory, 3)["model_config"]
    cm.update_meta(directory, 3, {"model_config": config | {"n_layer": 2}})
    with pytest.raises(UserError, match="model_000003.pt does not fit"):
        cm.load_model("sft", "cpu", "eval")
    cm.update_meta(directory, 3, {"model_config": config | {"windows": "SSL"}})
    with pytest.raises(UserError, match="meta_000003.json describes no model .*windows"):
        cm.load_model("sft", "cpu", "eval")


def test_an_empty_model_does_not_cost_the_import_of_torchs_compiler():
    code = (
        "import sys; from zangchat.checkpoint_manager import empty_model; from zangchat.config "
        "import GPTConfig\n"
        "model = empty_model(GPTConfig(16, 64, 1, 1, 1, 8), 'cpu', 'float32')\n"
        "assert model.cos[0].tolist() == [1, 1, 1, 1]\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
