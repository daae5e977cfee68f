#!/usr/bin/env bash
# The chain of speedrun.sh on one GPU, with sizes for its memory.
#
#   bash dev/rungpu.sh              asks nvidia-smi how much there is
#   bash dev/rungpu.sh 24           8 | 12 | 16 | 24 | 48 | 80 GB
#   DRY_RUN=1 bash dev/rungpu.sh 24 what that would mean: the plan and the memory, nothing is touched
#
# Every number is speedrun.sh's environment variable and can be set in front, e.g. DEPTH=12 bash dev/rungpu.sh 24. Run it again after an
# interruption. Out of memory all the same: DEVICE_BATCH_SIZE=4 bash dev/rungpu.sh 24 gives the same model.
#
# How the sizes were chosen: of the depths whose pretraining takes about a day or less on a usual card of that memory, the largest; the
# rows of a pass are what the memory planner (zangchat/flops.py, fitting_batch) finds to fit the card as it is when a stage starts; up to
# 24 GB a vocabulary of 32,768, for a larger one would be most of the model. A test computes all this again.
# Untried on GPUs so far: hours, dollars and bits per byte are predictions, in dev/docs/en/scaling.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

card=${1:-}
if [ -z "$card" ]; then
    command -v nvidia-smi > /dev/null || { echo "No GPU found: say how much memory it has, e.g. bash dev/rungpu.sh 24, or use dev/runcpu.sh." >&2; exit 2; }
    mebibytes=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sed -n 1p)
    for size in 8 12 16 24 48 80; do
        if [ "$mebibytes" -ge $((size * 970)) ]; then card=$size; fi # a "24 GB" card reports a little less than 24 x 1024
    done
    [ -n "$card" ] || { echo "This GPU has $mebibytes MiB, the smallest preset is for 8 GB: set the sizes by hand (first lines of speedrun.sh)." >&2; exit 2; }
    echo "GPU with $mebibytes MiB: the preset for $card GB"
fi

case $card in # layers  vocabulary  shards
    8) preset=(8 32768 10) ;;
    12) preset=(10 32768 16) ;;
    16) preset=(12 32768 25) ;;
    24) preset=(14 32768 38) ;;
    48) preset=(18 65536 83) ;;
    80) preset=(20 65536 110) ;;
    *) echo "There is no preset for $card GB: choose one of 8 12 16 24 48 80." >&2; exit 2 ;;
esac
export DEPTH=${DEPTH:-${preset[0]}}
export DEVICE_BATCH_SIZE=${DEVICE_BATCH_SIZE:-auto}
export VOCAB_SIZE=${VOCAB_SIZE:-${preset[1]}}
export NUM_SHARDS=${NUM_SHARDS:-${preset[2]}}
export NPROC_PER_NODE=${NPROC_PER_NODE:-1}
export DOLLARS_PER_HOUR=${DOLLARS_PER_HOUR:-1}
export CHAIN="dev/rungpu.sh $card"

if [ "${DRY_RUN:-0}" = 1 ]; then
    python=.venv/bin/python
    [ -x "$python" ] || python=python3
    exec "$python" - "$DEPTH" "$DEVICE_BATCH_SIZE" "$VOCAB_SIZE" "$card" << 'PYTHON'
import dataclasses, sys
from scripts import base_train
from zangchat import flops

depth, rows, vocab_size, card = sys.argv[1:]
gpt, plan = base_train.make_plan(config := base_train.Config(depth=int(depth)), int(vocab_size), 1)
fitting = flops.fitting_batch(gpt, plan.total_batch_size // gpt.sequence_len, int(card) * 2**30) if rows == "auto" else int(rows)
if not fitting:
    sys.exit(f"not even one row of this model fits into {card} GB: choose a smaller DEPTH")
base_train.print_plan(dataclasses.replace(config, device_batch_size=fitting), gpt, plan, 1)
print(f"memory         {flops.memory_estimate(gpt, fitting)['total'] / 2**30:.1f} GiB with {fitting} rows in a pass, estimated")
for name in ("RTX 3090", "RTX 4090", "L40S", "A100", "H100"):
    seconds = flops.flops_per_token(gpt) * plan.tokens / (0.4 * flops.DEVICES[name].half * 1e12)
    print(f"{name:<14} {seconds / 3600:.1f} h of pretraining, predicted: 40 % of its peak")
PYTHON
fi
exec bash speedrun.sh
