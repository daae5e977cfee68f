"""The model equals its slow twin and transformers' NanoChat, with and without a cache."""

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch._dynamo

from tests.reference import gpt as reference
from zangchat.gpt import GPT, ForwardOptions, GPTConfig, read_block, train_block
from zangchat.nn.attention import WithinDocuments
from zangchat.nn.fp8 import convert_to_fp8

TINY = GPTConfig(sequence_len=16, vocab_size=70, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)


def lively_model(
    config: GPTConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> GPT:
    """A model in which every matrix affects the logits: init_weights leaves identity blocks."""
    model = GPT(config, options=ForwardOptions(**options))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(head_init_scale=0.3, generator=generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(std=parameter.size(1) ** -0.5, generator=generator)
    model.set_compute_dtype(dtype)
    return model


def tokens(B: int, T: int, seed: int = 1, vocab_size: int = TINY.vocab_size) -> torch.Tensor:
    return torch.randint(0, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


class RowCache:
    """The simplest correct cache: a list of (k, v) per layer and row, padded to the longest row."""

    def __init__(self, config: GPTConfig, rows: int) -> None:
        self.stored = [[None] * rows for _ in range(config.n_layer)]
        self.positions = torch.zeros(rows, dtype=torch.int64)

    def update(self, layer_idx, k, v):
        T, layer = k.size(2), self.stored[layer_idx]
        for row in range(k.size(0)):
            new = torch.stack((k[row], v[row]))  # (2, G, T, D)
            old = layer[row]
            layer[row] = new if old is None else torch.cat((old, new), dim=2)
        longest = max(part.size(2) for part in layer)
        padded = torch.stack(
            [torch.nn.functional.pad(part, (0, 0, 0, longest - part.size(2))) for part in layer]
        )
        # a query sees its own and all earlier positions
        last = self.positions[:, None] + torch.arange(T)
        return padded[:, 0], padded[:, 1], (torch.arange(longest) <= last[..., None]).unsqueeze(1)

    @property
    def longest(self):
        return int(self.positions.max())

    def advance(self, num_tokens):
        self.positions = self.positions + num_tokens


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_logits_equal_the_formulas(heads: tuple[int, int], modern: bool) -> None:
    sizes = {"n_head": heads[0], "n_kv_head": heads[1], "n_embd": 32}
    sizes |= {"key_offset": modern, "value_embeds": modern}
    config = GPTConfig(sequence_len=8, vocab_size=70, n_layer=3, **sizes)
    model, idx = lively_model(config), tokens(2, 7)
    got = model(idx)
    assert got.shape == (2, 7, 70) and got.dtype == torch.float32
    for row in range(2):
        expected = reference.logits(model.state_dict(), config, idx[row].tolist())
        torch.testing.assert_close(got[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_parameter_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in GPT(TINY).named_parameters()}
    block = {
        "attn.c_q.weight": (32, 32),
        "attn.c_k.weight": (16, 32),
        "attn.c_v.weight": (16, 32),
        "attn.c_proj.weight": (32, 32),
        "mlp.c_fc.weight": (128, 32),
        "mlp.c_proj.weight": (32, 128),
    }
    # 70 tokens padded to 128 rows
    expected = {
        "transformer.wte.weight": (128, 32),
        "lm_head.weight": (128, 32),
    }
    expected |= {
        f"transformer.h.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in block.items()
    }
    assert shapes == expected
    assert set(GPT(TINY).state_dict()) == set(expected)  # the rotary tables are not saved


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_transformers_computes_the_same_logits(n_kv_head: int) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = GPTConfig(
        sequence_len=64, vocab_size=70, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32
    )
    model, idx = lively_model(config), tokens(2, 50)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.sequence_len,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            final_logit_softcapping=config.logit_cap,
        )
    )
    renames = {
        "attn.c_q": "self_attn.q_proj",
        "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj",
    }
    renames |= {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    exported = {}
    for name, tensor in model.state_dict().items():
        if "wte" in name or "lm_head" in name:
            name, tensor = (
                name.replace("transformer.wte", "model.embed_tokens"),
                tensor[: config.vocab_size],
            )
        for ours, other in renames.items():
            name = name.replace(ours, other)
        exported[name.replace("transformer.h", "model.layers")] = tensor
    theirs.load_state_dict(exported, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(idx).logits, model(idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_init_scale", [0.0, 0.05])
def test_model_built_on_the_meta_device_is_fully_initialised(head_init_scale: float) -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.init_weights(head_init_scale, generator=torch.Generator().manual_seed(3))
    assert all(torch.isfinite(t).all() for t in (*model.parameters(), *model.buffers()))

    built_directly = GPT(TINY)
    built_directly.init_weights(head_init_scale, generator=torch.Generator().manual_seed(3))
    for (name, a), b in zip(
        model.state_dict().items(), built_directly.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(model(tokens(1, 9)), built_directly(tokens(1, 9)))


def test_initial_scales() -> None:
    config = GPTConfig(
        sequence_len=8, vocab_size=1024, n_layer=1, n_head=2, n_kv_head=2, n_embd=128
    )
    model = GPT(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    state = model.state_dict()
    assert state["transformer.wte.weight"].std().item() == pytest.approx(1.0, rel=0.02)
    assert state["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    for name, tensor in state.items():
        if name.endswith("c_proj.weight"):
            assert not tensor.any(), name
        elif "transformer.h" in name:
            scale = 0.4 if name.endswith("c_fc.weight") else 1.0
            assert tensor.std().item() == pytest.approx(scale * 128**-0.5, rel=0.03), name
            assert tensor.abs().max() <= scale * (3 / 128) ** 0.5
    loss = model(tokens(4, 8, vocab_size=1024), tokens(4, 8, seed=2, vocab_size=1024))
    assert loss.item() == pytest.approx(math.log(1024), abs=0.01)
    model.init_weights(head_init_scale=0.05)
    assert torch.equal(model.lm_head.weight, model.wte.weight * 0.05)


def test_decoding_with_a_cache_equals_the_full_forward_pass_at_every_position() -> None:
    model, idx = lively_model(), tokens(3, 12)
    full = model(idx)
    cache = RowCache(TINY, 3)
    prefill = model(idx[:, :5], kv_cache=cache)
    torch.testing.assert_close(prefill, full[:, :5], atol=1e-5, rtol=1e-5)
    for t in range(5, 10):
        torch.testing.assert_close(
            model(idx[:, t : t + 1], kv_cache=cache), full[:, t : t + 1], atol=1e-5, rtol=1e-5
        )
    chunk = model(idx[:, 10:], kv_cache=cache)  # several tokens after stored ones
    torch.testing.assert_close(chunk, full[:, 10:], atol=1e-5, rtol=1e-5)
    assert cache.positions.tolist() == [12, 12, 12]


def test_rows_at_different_positions_decode_together() -> None:
    model = lively_model()
    rows = [tokens(1, n + 4, seed=n) for n in (2, 5, 9)]
    caches = [RowCache(TINY, 1) for _ in rows]
    for row, cache in zip(rows, caches, strict=True):
        model(row[:, :-4], kv_cache=cache)
    together = RowCache(TINY, 3)
    together.stored = [
        [cache.stored[layer][0] for cache in caches] for layer in range(TINY.n_layer)
    ]
    together.positions = torch.cat([cache.positions for cache in caches])
    for step in range(-4, 0):
        got = model(
            torch.cat([row[:, step : (step + 1) or None] for row in rows]), kv_cache=together
        )
        expected = torch.cat([model(row)[:, step : (step + 1) or None] for row in rows])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_tables_grow_past_sequence_len_and_training_works_after_sampling() -> None:
    model, longer = (
        lively_model(),
        lively_model(GPTConfig(**{**TINY.to_dict(), "sequence_len": 64})),
    )
    idx = tokens(1, 40)
    with torch.inference_mode():
        torch.testing.assert_close(model(idx), longer(idx), atol=1e-6, rtol=0)
    assert model.cos.size(0) >= 40
    model(idx, idx.roll(-1, 1)).backward()  # tables made in inference mode must not break autograd
    assert model.wte.weight.grad is not None


def test_padding_rows_of_the_vocabulary_are_unreachable() -> None:
    model, idx = lively_model(), tokens(2, 6)
    before = (model(idx), model(idx, idx.roll(-1, 1)))
    with torch.no_grad():
        model.lm_head.weight[TINY.vocab_size :] = 1e4
    after = (model(idx), model(idx, idx.roll(-1, 1)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    after[1].backward()
    assert not model.lm_head.weight.grad[TINY.vocab_size :].any()
    assert model.lm_head.weight.grad[: TINY.vocab_size].any()


def test_loss_reductions_weights_and_ignored_targets_agree() -> None:
    model, idx, targets = lively_model(), tokens(2, 8), tokens(2, 8, seed=5)
    targets[0, :5] = -1
    each = model(idx, targets, loss_reduction="none")
    assert each.shape == (2, 8) and each.dtype == torch.float32 and not each[0, :5].any()
    expected = -torch.log_softmax(model(idx), -1).gather(-1, targets.clamp(min=0)[..., None])[
        ..., 0
    ]
    torch.testing.assert_close(each, torch.where(targets < 0, 0, expected))
    torch.testing.assert_close(model(idx, targets, loss_reduction="sum"), each.sum())
    torch.testing.assert_close(model(idx, targets), each.sum() / 11)
    weights = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        model(idx, targets, loss_reduction="sum", loss_weights=weights), (each * weights).sum()
    )


def test_logits_at_one_position_of_each_row() -> None:
    model, idx, at = lively_model(), tokens(3, 6), torch.tensor([5, 0, 3])
    torch.testing.assert_close(model(idx, logits_at=at)[:, 0], model(idx)[torch.arange(3), at])


def test_document_start_separates_the_documents_of_a_row() -> None:
    model, start = lively_model(), 0
    pieces = [
        torch.cat((torch.full((1, 1), start), 1 + tokens(1, n, seed=n, vocab_size=60)), dim=1)
        for n in (4, 1, 6)
    ]
    row = torch.cat(pieces, dim=1)
    separate = torch.cat([model(piece) for piece in pieces], dim=1)
    together = model(row)
    assert not torch.allclose(together, separate, atol=1e-2)
    model = lively_model(document_start=start)
    torch.testing.assert_close(model(row), separate, atol=1e-5, rtol=1e-5)
    # a row may begin inside a document
    torch.testing.assert_close(model(row[:, 2:])[:, 3:], separate[:, 5:], atol=1e-5, rtol=1e-5)
    targets = tokens(1, row.size(1), seed=9)
    losses = [
        model(piece, part, loss_reduction="sum")
        for piece, part in zip(pieces, targets.split([5, 2, 7], dim=1), strict=True)
    ]
    weights = list(model.parameters())
    apart = torch.autograd.grad(losses[0] + losses[1] + losses[2], weights)
    for ours, theirs in zip(
        torch.autograd.grad(model(row, targets, loss_reduction="sum"), weights), apart, strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_weights_cast_once_for_all_passes_give_the_same_gradients(grad_checkpoint: bool) -> None:
    def learn(once: bool) -> dict[str, torch.Tensor]:
        model = lively_model(dtype=torch.bfloat16, grad_checkpoint=grad_checkpoint)
        with model.cast_once() if once else contextlib.nullcontext():
            for seed in range(3):
                rows = torch.randint(
                    0,
                    model.config.vocab_size,
                    (2, 9),
                    generator=torch.Generator().manual_seed(seed),
                )
                model(rows[:, :-1], rows[:, 1:].contiguous(), loss_reduction="sum").backward()
                assert (model.lm_head.cast is not None) == once
        assert "lm_head.cast" not in model.state_dict() and model.lm_head.cast is None
        return {name: p.grad for name, p in model.named_parameters()}

    once, each = learn(True), learn(False)
    assert once["lm_head.weight"].dtype == torch.float32
    for name in each:
        assert torch.equal(once[name], each[name]), name


def test_in_fp32_nothing_is_cast() -> None:
    model = lively_model()
    with model.cast_once():
        assert all(getattr(layer, "cast", None) is None for layer in model.modules())


def test_computing_in_bfloat16() -> None:
    model, twin = lively_model(dtype=torch.bfloat16), lively_model()
    idx = tokens(2, 16)
    assert model.wte.weight.dtype == torch.bfloat16
    assert all(
        p.dtype == torch.float32 for name, p in model.named_parameters() if "wte" not in name
    )
    logits = model(idx)
    assert logits.dtype == torch.float32
    assert (logits - twin(idx)).abs().mean() < 0.1
    loss = model(idx, idx.roll(-1, 1))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        twin(idx, idx.roll(-1, 1)).item(), rel=0.03
    )
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype and torch.isfinite(p.grad).all(), name
    twin(idx, idx.roll(-1, 1)).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.cosine_similarity(p.grad.float().flatten(), q.grad.flatten(), dim=0) > 0.98, (
            name
        )


def test_switching_the_compute_dtype_back_and_forth() -> None:
    model, idx = lively_model(), tokens(1, 8)
    model.set_compute_dtype(torch.bfloat16, keep_masters=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    masters = lively_model(dtype=torch.bfloat16)
    assert torch.equal(model(idx), masters(idx))  # rounding once equals rounding at every use
    model.set_compute_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_parameter_gets_a_gradient() -> None:
    model, idx = lively_model(), tokens(4, 16)
    model(idx, idx.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_model_delegates_its_costs_and_optimizers() -> None:
    from zangchat.flops import flops_per_token

    model = lively_model()
    assert model.estimate_flops() == flops_per_token(TINY)
    optimizer = model.setup_optimizers(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.02)
    assert set(optimizer.names.values()) == set(dict(model.named_parameters()))


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_compiled_blocks_share_one_graph_and_keep_the_results(grad_checkpoint: bool) -> None:
    """The compiler's front end, tracing as on a GPU, without its code generation."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    plain = lively_model(grad_checkpoint=grad_checkpoint)
    compiled = lively_model(grad_checkpoint=grad_checkpoint, compile_backend=backend)
    idx = tokens(2, 16)
    for _ in range(2):
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            with model.cast_once():
                loss = model(idx, idx.roll(-1, 1))
                loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0])
    assert len(graphs) == 3  # a block, and the loss forward and backward
    with torch.inference_mode():  # evaluation has graphs of its own, for any shape after the first
        counts = []
        for length in (16, 3, 5, 7, 11):
            rows = idx[:, :length]
            torch.testing.assert_close(compiled(rows), plain(rows))
            torch.testing.assert_close(compiled(rows, rows), plain(rows, rows))
            counts.append(len(graphs))
        # a block and a loss of the first shape, then of all
        assert counts == [3 + 2] + [3 + 4] * 4
        compiled(idx[:, :4], kv_cache=RowCache(TINY, 2))
    assert len(graphs) == counts[-1]  # a cache's own code runs as it is


def test_options_cannot_be_changed_afterwards() -> None:
    model = lively_model(document_start=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.options.document_start = 4  # type: ignore[misc]
    knobs = {field.name for field in dataclasses.fields(ForwardOptions)}
    assert not knobs & vars(model).keys()  # one place for each


def test_recomputing_asks_for_no_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model draws nothing, and on a GPU the question makes the host wait."""
    model, idx = lively_model(grad_checkpoint=True), tokens(2, 8)
    asked, state = [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: asked.append("a state") or state())
    model(idx, idx).backward()
    assert asked == []


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("variant", ["fp32", "cast once", "fp8", "documents", "inference"])
def test_a_block_is_one_graph_that_all_layers_share(variant: str, fullgraph: bool) -> None:
    """A break makes two graphs; with fullgraph=True it is an error."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    dtype = torch.float32 if variant == "fp32" else torch.bfloat16
    config = dataclasses.replace(TINY, n_layer=12)
    model, idx = lively_model(config, dtype), tokens(2, 16)
    if variant == "fp8":
        assert convert_to_fp8(model, min_size=1) == 6 * 12
    context = WithinDocuments(idx, 3) if variant == "documents" else None
    rotary, blocks = model._rotary(16, context), model.transformer["h"]
    reads = variant == "inference"
    torch._dynamo.reset()
    function = read_block if reads else train_block
    run = torch.compile(function, backend=backend, fullgraph=fullgraph)
    with torch.inference_mode(reads), model.cast_once():
        for _ in range(2):
            x = torch.randn(2, 16, 32, dtype=dtype, requires_grad=not reads)
            for block in blocks:
                x = run(block, x, rotary, context, "sdpa")
            if not reads:
                x.float().sum().backward()
    assert len(graphs) == 1
