"""Measure how fast CORE is scored: items per second, batched with shared prompts and one by one.
JSON.

    python -m dev.bench_core --depth=6
    python -m dev.bench_core --depth=6 --items=16 --tasks="hellaswag|lambada_openai"

The model has the size of `--depth` and random weights; data and tokenizer are those of <base>. One
by one means one item at a time: each row has its own forward pass over all its tokens, with the
logits of all of them. Both ways score the same items; `verdicts_differ` counts the disagreements,
which rounding is enough to cause.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dev.bench_common import machine
from zangchat import configurator
from zangchat.runtime.devices import compute_init


@dataclass
class Config:
    depth: int = 6
    head_dim: int = 64
    max_seq_len: int = 2048
    items: int = 8  # of each task
    repeats: int = 3
    tasks: str = ""  # labels separated by |; default: all with data
    device_type: str = ""
    dtype: str = ""
    busy: bool = False  # measure even if the machine is busy; the output records it


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> None:
    figures: dict[str, Any] = {"machine": machine(config.busy)}
    import torch

    from zangchat import checkpoint_manager, core_eval, schedule
    from zangchat.tokenizer import get_tokenizer

    tokenizer = get_tokenizer()
    device = compute_init(config.device_type)[-1]
    gpt = schedule.model_config_for_depth(
        config.depth,
        config.head_dim,
        vocab_size=tokenizer.get_vocab_size(),
        sequence_len=config.max_seq_len,
    )
    model = checkpoint_manager.empty_model(gpt, device, config.dtype)
    model.init_weights()
    generator = torch.Generator(device).manual_seed(1)
    for parameter in model.parameters():  # every layer matters, as in a trained model
        parameter.data.normal_(std=parameter.size(-1) ** -0.5, generator=generator)
    model.eval()
    tasks, missing = core_eval.read_tasks(core_eval.find_bundle(download=False))
    wanted = [label for label in config.tasks.split("|") if label] or [task.label for task in tasks]
    unknown = set(wanted) - {task.label for task in tasks}
    if unknown:
        raise configurator.UserError(
            f"--tasks: no data of {', '.join(sorted(unknown))}; see core.yaml for the labels"
        )
    ways = {"batched": core_eval.judge, "one_by_one": one_by_one}
    seconds: dict[str, dict[str, float]] = {}
    processor = dict.fromkeys(ways, 0.0)  # seconds: a ratio that holds on a busy machine, too
    differ = total = 0
    for task in (task for task in tasks if task.label in wanted):
        groups = core_eval.groups_of(task, core_eval.read_items(task))
        rows, golds = core_eval.render(
            task,
            groups,
            core_eval.chosen_items(groups, config.items),
            tokenizer,
            config.max_seq_len,
        )
        # not timed: the first products of a shape
        core_eval.judge(model, task.kind, rows[:1], golds[:1])
        verdicts, times = {}, {}
        for name, way in ways.items():
            taken = []
            for _ in range(config.repeats):
                start, used = time.perf_counter(), time.process_time()
                with torch.inference_mode():
                    verdicts[name] = way(model, task.kind, rows, golds)
                taken.append(time.perf_counter() - start)
                processor[name] += time.process_time() - used
            times[name] = statistics.median(taken)
        seconds[task.label] = times
        differ += sum(a != b for a, b in zip(*verdicts.values(), strict=True))
        total += len(rows)
    sums = {name: sum(times[name] for times in seconds.values()) for name in ways}
    figures |= {
        "model": asdict(model.config),
        "dtype": str(model.compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "data": core_eval.core_name(missing),
        "items": total,
        "verdicts_differ": differ,
        "items_per_second": {name: round(total / value, 2) for name, value in sums.items()},
        "speedup": round(sums["one_by_one"] / sums["batched"], 2),
        "speedup_in_processor_time": round(processor["one_by_one"] / processor["batched"], 2),
        "speedup_of": {
            label: round(times["one_by_one"] / times["batched"], 2)
            for label, times in seconds.items()
        },
    }
    print(json.dumps(figures, indent=1))


def one_by_one(
    model: Any, kind: str, items: Sequence[Sequence[Any]], golds: Sequence[int]
) -> list[bool]:
    import torch

    verdicts = []
    for rows, gold in zip(items, golds, strict=True):
        losses, right = [], False
        for row in rows:
            tokens = torch.tensor([row.tokens], device=model.get_device())
            logits = model(tokens[:, :-1])[0, row.start - 1 :]
            answer = tokens[0, row.start :]
            losses.append(float(torch.nn.functional.cross_entropy(logits, answer)))
            right = bool((logits.argmax(dim=-1) == answer).all())
        verdicts.append(right if kind == "language_modeling" else losses.index(min(losses)) == gold)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
