#!/usr/bin/env bash
# The chain of speedrun.sh on one GPU, with sizes for its memory.
#
#   bash dev/rungpu.sh               asks nvidia-smi how much there is
#   bash dev/rungpu.sh 24            8 | 12 | 16 | 24 | 48 | 80 GB
#   DRY_RUN=1 bash dev/rungpu.sh 24  prints its commands, the plan and the memory; touches nothing
#
# Every number is an environment variable of speedrun.sh, e.g. DEPTH=12 bash dev/rungpu.sh 24. After an
# interruption, run it again. If memory still runs out, `DEVICE_BATCH_SIZE=4 bash dev/rungpu.sh 24` gives the same model.
#
# How the sizes were chosen: the depth is the largest whose pretraining takes about a day or less on a usual card of that memory.
# The memory planner (zangchat/flops.py, fitting_batch) chooses the rows of a pass from the free memory when a stage starts. Up to
# 24 GB the vocabulary is 32,768, because a larger one would be most of the model. A test recomputes all this.
# Untried on GPUs so far: hours, dollars and bits per byte are predictions, in dev/docs/en/scaling.md.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

card=${1:-}
# shellcheck source=dev/machine.sh
source dev/machine.sh
if [ -z "$card" ]; then
    find_gpus
    if [ "$gpus" = 0 ]; then
        echo "No GPU found ($gpu_problem): say how much memory it has, e.g. bash dev/rungpu.sh 24," \
            "or use dev/runcpu.sh." >&2
        exit 2
    fi
    if [ -n "$gpu_mig" ]; then
        mebibytes=$((gpu_mig * 1000))
    else
        mebibytes=$(nvidia-smi -i "$gpu_first" --query-gpu=memory.total \
            --format=csv,noheader,nounits 2>&1 | sed -n 1p) || true # its complaint is quoted below
    fi
    case $mebibytes in
        "" | *[!0-9]*)
            echo "nvidia-smi does not know this GPU's memory ($mebibytes): say how much it has," \
                "e.g. bash dev/rungpu.sh 24." >&2
            exit 2
            ;;
    esac
    for size in 8 12 16 24 48 80; do
        # less than size x 1024: with error correction a "24 GB" L4 reports 23,034 MiB, a T4 of 16 GB 15,109
        if [ "$mebibytes" -ge $((size * 940)) ]; then card=$size; fi
    done
    if [ -z "$card" ]; then
        echo "This GPU has $mebibytes MiB, the smallest preset is for 8 GB:" \
            "set the sizes by hand (first lines of speedrun.sh)." >&2
        exit 2
    fi
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
export CHAIN="dev/rungpu.sh $card" MEMORY_GB=$card
exec bash speedrun.sh
