"""A model that talks without training: the laptop's, kept in dev/demo as transformers reads it.

bash dev/runcpu.sh && python -m scripts.export_hf -i sft --dtype=bfloat16 -o dev/demo
"""

from pathlib import Path

import torch

from zangchat import checkpoint_manager
from zangchat.config import ChatConfig
from zangchat.engine import Engine, engine_for_chat
from zangchat.engine.engine import quantised_engine
from zangchat.errors import UserError
from zangchat.hf.importing import read_hf
from zangchat.runtime.devices import compute_init

FOLDER = Path(__file__).parents[2] / "dev" / "demo"


def open_engine(config: ChatConfig, device: torch.device | str | None = None) -> Engine:
    """The engine for a chat: of the demo, or of a checkpoint. Raises UserError."""
    if not config.demo:
        return engine_for_chat(config, device)
    if not FOLDER.is_dir():
        export = f"python -m scripts.export_hf -i sft --dtype=bfloat16 -o {FOLDER}"
        raise UserError(f"--demo: there is no {FOLDER}: bash dev/runcpu.sh, then {export}, make it")
    if device is None:
        device = compute_init(config.device_type)[-1]
    found = read_hf(FOLDER)
    model = checkpoint_manager.empty_model(found.config, device, config.dtype)
    model.load_state_dict(found.weights)
    model.set_compute_dtype(model.compute_dtype, keep_masters=False)
    return quantised_engine(model.eval(), found.tokenizer, config)
