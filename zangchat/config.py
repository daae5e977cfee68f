"""The plain data of a run: the shape of a model, the plan of a run and its state.

Layer 0: nothing here imports torch, so `--help` and `--dry_run` answer at once.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from zangchat.errors import UserError

Optimizer = Literal["muon", "adamw", "sgd"]  # for the matrices, see optim.build_optimizer
OPTIMIZERS = get_args(Optimizer)
Architecture = Literal["nanochat", "modern"]
ARCHITECTURES: dict[Architecture, dict[str, bool]] = {  # settings of GPTConfig
    "nanochat": {},
    "modern": {"key_offset": True, "value_embeds": True},
}
SourceFlag = Annotated[str, tyro.conf.arg(aliases=["-i"])]
# stage -> folder of its checkpoints, and the command that makes them
SOURCES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
COMMANDS = {
    "base": "scripts.base_train",
    "mid": "scripts.mid_train",
    "sft": "scripts.chat_sft",
    "rl": "scripts.chat_rl",
}
DEVICE_TYPES = ("cuda", "mps", "cpu")
DTYPES = ("bfloat16", "float16", "float32")  # of the products
TOKENS = ".tokens"  # ends the name of a shard of token ids
VOCAB_MULTIPLE = 64  # rows of embedding and head are padded to this: tensor cores, even shards


@dataclass(frozen=True)
class Limits:
    """The values that a setting may have."""

    least: float
    most: float = math.inf
    above: bool = False  # `least` itself is excluded

    def allow(self, value: float) -> bool:
        above_least = value > self.least if self.above else value >= self.least
        return above_least and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        return least + (f" and at most {self.most:g}" if self.most < math.inf else "")


SAMPLING_LIMITS = {  # of the fields of engine.Request
    "max_tokens": Limits(0),
    "temperature": Limits(0),
    "top_k": Limits(0),
    "top_p": Limits(0, 1, above=True),
    "min_p": Limits(0, 1),
    "repetition_penalty": Limits(0, above=True),
    "logprobs": Limits(0, 20),  # most likely tokens to report at each position
}
MIN_TEMPERATURE = 1e-5  # lower ones count as 0, before logits / temperature overflows
USER_LIMITS = {  # of flags and HTTP requests
    **SAMPLING_LIMITS,
    "max_tokens": Limits(1, 1_000_000),
    "temperature": Limits(0, 100),
    "top_k": Limits(0, 1_000_000),
    "repetition_penalty": Limits(0, 100, above=True),
}


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of one model; saved in every checkpoint and enough to rebuild it.

    Raises ValueError, naming the field, if the sizes do not fit together.
    """

    sequence_len: int = 1024  # longest context the model is trained on, tokens
    vocab_size: int = 50304  # real tokens, specials included; see padded_vocab_size
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads (GQA, arXiv:2305.13245); divides n_head
    n_embd: int = 768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    logit_cap: float = 15.0  # logits = cap * tanh(logits / cap)
    # of the modern architecture:
    key_offset: bool = False  # half of each key is the token before's: attention.offset_keys
    value_embeds: bool = False  # every second layer adds a table's row of the token to its values

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})",
            )
        if self.head_dim % 2:
            raise ValueError(
                f"the head dimension n_embd/n_head ({self.head_dim}) must be even: RoPE rotates "
                "pairs",
            )
        if self.key_offset and self.head_dim % 4:
            raise ValueError(
                f"the head dimension n_embd/n_head ({self.head_dim}) must be a multiple of 4: the "
                "modern architecture halves it once more",
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def has_value_embed(self, layer: int) -> bool:
        """Every second layer, the last one among them."""
        return self.value_embeds and (self.n_layer - layer) % 2 == 1

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of lm_head: vocab_size rounded up to a multiple of
        VOCAB_MULTIPLE.
        """
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def to_dict(self) -> dict[str, Any]:
        """Without the settings of an architecture that this is not: others know none of them."""
        modern = ARCHITECTURES["modern"]
        return {name: value for name, value in asdict(self).items() if value or name not in modern}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Raises ValueError for a key that this version does not know (a checkpoint of another
        architecture).
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model settings: {', '.join(sorted(unknown))}")
        return cls(**values)


class StepMultipliers(NamedTuple):
    """A schedule's values for one step: factors on each group's base learning rate and weight
    decay, and Muon's momentum."""

    lr: float = 1.0
    momentum: float = 0.95
    weight_decay: float = 1.0


class TrainPlan(NamedTuple):
    """The length and batch of a run; the scales are factors on the base rates given as flags."""

    tokens: int  # num_iterations * total_batch_size
    total_batch_size: int  # tokens per step, all ranks
    num_iterations: int
    lr_scale: float  # of the matrices
    adamw_lr_scale: float  # of embedding and head
    weight_decay_scale: float


@dataclass
class RunState:
    """All that a run needs to continue, saved and restored whole with each checkpoint (as JSON)."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # input positions processed, all ranks
    supervised_tokens: int = 0  # targets that carried loss, all ranks
    num_iterations: int = 0  # planned steps
    smooth_loss: float = 0.0  # exponential moving average of the training loss, not debiased
    last_val_bpb: float | None = None
    min_val_bpb: float | None = None
    skipped_steps: int = 0  # steps without an update: nothing supervised, or not finite
    skips_in_a_row: int = 0  # non-finite steps since the last update
    loss_scale: float | None = None  # fp16 only
    steps_at_scale: int = 0  # updates since the loss scale changed
    training_seconds: float = 0.0  # wall-clock of steps and their data, over all attempts
    cursor: dict[str, Any] = field(default_factory=dict)  # of the data loader, after `step` steps
    # of the last batch (RL's rewards)
    batch_metrics: dict[str, float] = field(default_factory=dict)
    hooks_done: int = -1  # the step whose hooks have run
    metrics_lines: int = 0  # lines of metrics.jsonl that belong to the run so far
    # the latest figures of each evaluation, by name, for the report
    results: dict[str, dict[str, float | None]] = field(default_factory=dict)
    threads: int | None = None  # of each rank on a CPU, on which the last bits depend
    wandb: str | None = None  # id of its wandb run
    # left out by --skip_bad_rows, by file or task
    skipped_rows: dict[str, int] = field(default_factory=dict)
    # fixed when the run was new
    plan: TrainPlan | None = None
    source: str | None = None  # the model it started from: "base d20 step 5000"
    source_sha256: str | None = None  # of that model's weights
    dataset: str | None = None  # fingerprint of the pretraining text
    tasks: dict[str, str] = field(default_factory=dict)  # of the conversations, by task

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan and self.plan._asdict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunState":
        """Unknown keys are ignored; checkpoints with the older `extra` are understood."""
        values = _without_extra(values) if "extra" in values else values
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if known.get("plan"):
            known["plan"] = TrainPlan(**known["plan"])
        return cls(**known)


def _without_extra(values: Mapping[str, Any]) -> dict[str, Any]:
    """The run state of a checkpoint whose `extra` held these fields under keys of its own, and
    whose data cursor carried RL's rewards."""
    extra, cursor = dict(values["extra"]), dict(values.get("cursor") or {})
    results = {name: extra.pop(name) for name in ("core", "held_out") if extra.get(name)}
    if "val_loss" in extra:
        results["validation"] = {"validation loss": extra.pop("val_loss")}
    rewards = {
        key: cursor.pop(key) for key in ("reward", "sample_tokens", "solved") if key in cursor
    }
    facts = extra.pop("facts", {})
    return {
        **values,
        **facts,
        **extra,
        "cursor": cursor,
        "batch_metrics": rewards,
        "results": results,
    }


@dataclass
class CheckpointConfig:
    """Flags of every command that takes a trained model."""

    source: SourceFlag = "sft"  # base | mid | sft | rl
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """default: the largest model"""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None  # default: the last
    device_type: str = ""  # cuda | mps | cpu; empty = the best one present
    dtype: str = ""
    """bfloat16 | float16 | float32; empty = the one that is really fast on the device"""


@dataclass
class ChatConfig(CheckpointConfig):
    """Flags of the commands that people chat by."""

    demo: bool = False  # the model kept in dev/demo, instead of a checkpoint
    quantize: str = ""
    """int8: weights in a quarter of fp32's bytes; fp16: half of them, in fp32 only; empty =
    as they are
    """


def check_demo(config: ChatConfig) -> None:
    """Raises UserError for --demo beside a flag that names a checkpoint."""
    checkpoint, default = vars(config), vars(ChatConfig())
    for flag in ("source", "model_tag", "step"):
        if config.demo and checkpoint[flag] != default[flag]:
            chosen = f"--{flag}={checkpoint[flag]} names a checkpoint of your own"
            raise UserError(f"--demo is the model in dev/demo, and {chosen}: leave one of them out")


def check_device_type(flag: str) -> None:
    """Raises UserError for a device that is not known; empty is the best one."""
    if flag not in ("", *DEVICE_TYPES):
        raise UserError(
            f"--device_type={flag} is not known: choose {', '.join(DEVICE_TYPES)}, or leave the "
            "flag out for the best one"
        )


def check_dtype(flag: str) -> None:
    """Raises UserError for a number format that is not known; empty is the device's best."""
    if flag not in ("", *DTYPES):
        raise UserError(
            f"--dtype={flag} is not known: choose {', '.join(DTYPES)}, or leave the flag out for "
            "the one that suits the device"
        )
