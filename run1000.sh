#!/usr/bin/env bash
# A day and a half on 8 H100s: d32, 1.88B parameters. The chain of speedrun.sh with larger numbers; its comments apply here too.
#
#   bash run1000.sh
#
# ---- The numbers and their arithmetic ----------------------------------------------------------------------------------------
# DEPTH=32        width 2048, 16 heads: 32 x 12 x 2048^2 = 1.61B matrix parameters; embedding and head 134M each.
# RATIO=20        20 x (1.61B + 0.13B) = 34.9B tokens, 33,280 steps of 2^20. RATIO=12, the compute-optimal choice of speedrun.sh, would be
#                 20.9B. More text improves a model of the same size, and a smaller model is cheaper to use.
# DEVICE_BATCH_SIZE=8  an estimated 58 GiB on each GPU (`python -m scripts.base_train --depth=32 --device_batch_size=8 --dry_run`):
#                 10 GiB weights, 7 gradients, 38 activations of 8 rows. 512 rows a step: 8 passes.
# NUM_SHARDS=705  34.9B tokens x about 4.8 characters = 167B characters in shards of about 250M: 670, and 5 % in reserve; 70 GB of disk.
# MAX_CHARS=4e9   a larger model deserves twice the text for its tokenizer.
# cost            12.1 GFLOPs a token x 34.9B = 4.2e20 FLOPs; at 40 % of 8 x 989 TFLOP/s 37 hours, $890 at $24 an hour: with the other
#                 stages about $1000. An estimate, not a measurement.
# Long runs get interrupted: by default they save every 10 minutes, and `bash run1000.sh` again resumes from the last save.
# ------------------------------------------------------------------------------------------------------------------------------
set -euo pipefail
export DEPTH=${DEPTH:-32}
export RATIO=${RATIO:-20}
export DEVICE_BATCH_SIZE=${DEVICE_BATCH_SIZE:-8}
export NUM_SHARDS=${NUM_SHARDS:-705}
export MAX_CHARS=${MAX_CHARS:-4000000000}
export CHAIN=run1000.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/speedrun.sh" "$@"
