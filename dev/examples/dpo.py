"""Teach an exported model to prefer one answer over another: DPO (arXiv:2305.18290), by the library
TRL, on LoRA adapters.

    pip install -e ".[examples]"
    python -m scripts.export_hf -i sft -g d20 -o d20-sft
    python -m dev.examples.dpo --model=d20-sft --data=preferences.jsonl --output=d20-dpo
    python -m scripts.import_model --path=d20-dpo --source=rl --model_tag=d20-dpo

A line of the data is {"prompt": [{"role": "user", "content": ...}], "chosen": [{"role":
"assistant", "content": ...}], "rejected": [...]}. The model without its adapters is the reference,
so no second copy is kept.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zangchat import configurator
from zangchat.runtime.files import read_jsonl


@dataclass
class Config:
    model: Path  # directory that scripts.export_hf wrote
    data: Path  # .jsonl of preferences
    output: Path  # directory to make
    rank: int = 16  # of the adapters
    lr: float = 5e-5
    beta: float = 0.1  # cost of moving away from the reference
    epochs: int = 1
    batch_size: int = 8  # pairs in a step
    seed: int = 42


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, prefer, argv)


def prefer(config: Config) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = [row for _, row in read_jsonl(config.data)]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    settings = DPOConfig(
        output_dir=str(config.output),
        beta=config.beta,
        learning_rate=config.lr,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        max_length=tokenizer.model_max_length,
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        gradient_checkpointing=False,
    )
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank,
            target_modules=projections,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)


if __name__ == "__main__":
    sys.exit(main())
