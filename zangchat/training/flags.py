"""The flags that every training command shares."""

from dataclasses import dataclass
from typing import Literal

from zangchat.config import Optimizer

BatchSize = int | Literal["auto"]  # rows in one pass; "auto": as many as fit the device


@dataclass
class RunConfig:
    """Flags that every training command shares."""

    run: str = "dummy"  # wandb run name; "dummy" logs nothing to wandb (default: $WANDB_RUN)
    model_tag: str | None = None
    """checkpoint folder below <base>/<stage>_checkpoints/; default d<depth>"""
    device_type: str = ""  # cuda | mps | cpu; empty = the best one present
    dtype: str = ""
    """bfloat16 | float16 | float32; empty = the one that is really fast on the device"""
    fp8: bool = False
    """products of the large layers in fp8, if the GPU has it; otherwise they stay in --dtype"""
    compile: bool | None = None
    """torch.compile; None = on CUDA. Without a working compiler the run goes without it"""
    grad_comm_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the traffic of summing gradients, and rounds them"""
    seed: int = 42
    deterministic: bool = False
    """CUDA: only operations that give the same bits each time, at some cost; a CPU's always do"""
    save_every: int = -1  # steps between checkpoints; -1 = every 10 minutes and at the end
    keep_last: int = 2  # newest checkpoints to keep
    keep_every: int = -1  # also keep those of steps that this divides, for ever; -1 = none
    resume: str = ""  # "latest" or a step; empty = a new run
    overwrite: bool = False  # start over although model_tag has checkpoints


@dataclass
class FinetuneConfig(RunConfig):
    """Flags of the stages that start from a trained model; None: as that model was trained."""

    from_tag: str | None = None
    """tag of the model to start from; default: --model_tag, so that a model keeps its tag
    from stage to stage
    """
    model_step: int | None = None  # of the model to start from; default: its last
    max_seq_len: int | None = None
    """tokens in a row; None here and below: as the model it starts from"""
    optimizer: Optimizer | None = None
    embedding_lr: float | None = None
    unembedding_lr: float | None = None
    matrix_lr: float | None = None
    weight_decay: float = 0.0  # of the matrices
    grad_clip: float | None = None  # largest global gradient norm; 0 = no clipping
