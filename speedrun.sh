#!/usr/bin/env bash
# The whole chain on one machine with 8 H100s: data, tokenizer, pretraining, midtraining, finetuning, RL, evaluation, report.
#
#   bash speedrun.sh                                  d20, 561M parameters, 5.7B tokens
#   WANDB_RUN=first bash speedrun.sh                  with curves at wandb
#   NPROC_PER_NODE=1 DEVICE_BATCH_SIZE=8 DEPTH=12 bash speedrun.sh      one GPU
#   DRY_RUN=1 bash speedrun.sh                        prints its commands, the plan and the memory; touches nothing
#
# One GPU: dev/rungpu.sh has sizes for 8 to 80 GB. Many nodes: dev/slurm.sbatch, dev/skypilot.yaml.
# After an interruption, run it again: every stage resumes, and finished stages are skipped.
# In `screen` or `tmux`, or under nohup, it survives a lost connection; to keep a log: bash speedrun.sh 2>&1 | tee speedrun.log
#
# To rehearse the chain at depth 2 on two CPU processes, set only sizes (minutes, 2 GB of downloads, no good model):
#   DEPTH=2 NPROC_PER_NODE=2 NUM_SHARDS=2 VOCAB_SIZE=1024 MAX_CHARS=1000000 MAX_SEQ_LEN=128 DEVICE_BATCH_SIZE=4 TOTAL_BATCH_SIZE=2048 \
#   NUM_ITERATIONS=20 BASE_FLAGS="--eval_tokens=4096 --core_metric_max_per_task=4" LOSS_FLAGS="--split_tokens=4096" \
#   CORE_FLAGS="--max_per_task=4" MID_FLAGS="--num_iterations=10 --eval_tokens=4096" SFT_FLAGS="--num_iterations=10 --eval_steps=2" \
#   RL_FLAGS="--num_iterations=2 --examples_per_step=2 --num_samples=4 --eval_examples=4 --max_new_tokens=16" \
#   EVAL_FLAGS="--max_problems=4 --max_new_tokens=8" bash speedrun.sh
#
# ---- The numbers and their arithmetic ----------------------------------------------------------------------------------------
# DEPTH=20       width 20 x 64 = 1280, 10 heads of 128. Per layer 12 x 1280^2 matrix parameters: 20 layers 393M; embedding and
#                head 65,536 x 1280 = 84M each. Together 561M.
# RATIO=12       tokens per matrix and head parameter: 12 x (393M + 84M) = 5.73B tokens. An older rule of thumb, 20 tokens for
#                every parameter, would give the same model 11.2B: RATIO=23.5.
# batch          512 rows of 2,048 = 2^20 tokens a step, chosen from the number of tokens (README, "Schedules"): 5,460 steps.
#                8 GPUs x 32 rows = 2^19 tokens in a pass, so two passes a step.
# NUM_SHARDS=115 5.73B tokens x about 4.8 characters per token = 27.5B characters; a shard has about 250M: 110, and 5 % in
#                reserve, as 4.8 depends on the tokenizer. About 100 MB of disk each. With too few, some text is read twice.
# MAX_CHARS=2e9  the tokenizer learns from the first 8 shards; more text hardly changes the most frequent pairs.
# cost           3.5 GFLOPs a token x 5.73B = 2.0e19 FLOPs. 8 H100s have 8 x 989 TFLOP/s in bf16; at 40 % of that pretraining
#                would take 1.8 hours. That is an estimate, not a measurement; the report has the real time.
# ------------------------------------------------------------------------------------------------------------------------------
# shellcheck disable=SC2086  # in the whole file: split *_FLAGS at spaces
set -euo pipefail
unset CDPATH PYTHONHOME # as activating .venv does; CDPATH would lead cd elsewhere
unset PYTHONDONTWRITEBYTECODE # as dev/setup.sh
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ $# != 0 ]; then
    echo "error: ${CHAIN:-speedrun.sh} takes no flags: its settings are environment variables, listed at the top of speedrun.sh." >&2
    exit 2
fi

# Settings, each an environment variable of the same name.
DEPTH=${DEPTH:-20}
RATIO=${RATIO:-12}
DATASET=${DATASET:-climbmix} # climbmix | fineweb-edu | pydocs (made on this machine, small)
NUM_SHARDS=${NUM_SHARDS:-115}
VOCAB_SIZE=${VOCAB_SIZE:-65536}
MAX_CHARS=${MAX_CHARS:-2000000000}
MAX_SEQ_LEN=${MAX_SEQ_LEN:-2048}
DEVICE_BATCH_SIZE=${DEVICE_BATCH_SIZE:-32} # rows per GPU in one pass, or auto: as many as fit; the result stays the same
TOTAL_BATCH_SIZE=${TOTAL_BATCH_SIZE:--1}   # -1: from the number of tokens
NUM_ITERATIONS=${NUM_ITERATIONS:--1}       # -1: from RATIO
SEED=${SEED:-42}
MID_MIXTURE=${MID_MIXTURE:-} # empty: the default in tasks/registry.py; else "task:epochs,generated_task:examples"
SFT_MIXTURE=${SFT_MIXTURE:-} # likewise
IDENTITY_DATA=${IDENTITY_DATA:-} # a .jsonl file of your own conversations
RL=${RL:-1}                  # 0: stop after finetuning
RL_TASK=${RL_TASK:-GSM8K}
CORE=${CORE:-1}              # 0: no CORE evaluation (it downloads its bundle)
EVAL_TASKS=${EVAL_TASKS:-}   # of the chat evaluations, separated by |; empty: every task that can be scored
DOLLARS_PER_HOUR=${DOLLARS_PER_HOUR:-24} # of the whole machine, for the sum at the end
MODEL_TAG=${MODEL_TAG:-d$DEPTH}
# Extra flags for single stages, separated by spaces.
TOK_FLAGS=${TOK_FLAGS:-} BASE_FLAGS=${BASE_FLAGS:-} LOSS_FLAGS=${LOSS_FLAGS:-} CORE_FLAGS=${CORE_FLAGS:-} MID_FLAGS=${MID_FLAGS:-}
SFT_FLAGS=${SFT_FLAGS:-} RL_FLAGS=${RL_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}

dry=""
[ "${DRY_RUN:-0}" = 0 ] || dry=1

# shellcheck source=dev/machine.sh
source dev/machine.sh
find_gpus
counted=""
if [ -z "${NPROC_PER_NODE:-}" ]; then
    NPROC_PER_NODE=$gpus
    counted=1
    if [ "$gpus" = 0 ] && [ -n "$dry" ]; then
        NPROC_PER_NODE=8
        echo "No GPU found ($gpu_problem): this is the plan for 8;" \
            "NPROC_PER_NODE sets another number." >&2
    elif [ "$gpus" = 0 ]; then
        echo "No GPU found ($gpu_problem). On a laptop use dev/runcpu.sh; to rehearse this script on CPU" \
            "set NPROC_PER_NODE=2 and small sizes (see its first lines)." >&2
        exit 2
    fi
fi

elsewhere="" # the line that a new shell needs before commands of this run
[ -z "${ZANGCHAT_BASE_DIR:-}" ] || elsewhere="  export ZANGCHAT_BASE_DIR=$(printf '%q' "$ZANGCHAT_BASE_DIR")"$'\n'
export ZANGCHAT_BASE_DIR=${ZANGCHAT_BASE_DIR:-$HOME/.cache/zangchat}
export WANDB_RUN=${WANDB_RUN:-dummy}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default, set here so that it is silent about it

if [ -z "$dry" ]; then
    mkdir -p "$ZANGCHAT_BASE_DIR"
    bash dev/setup.sh
fi
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PYTHONUNBUFFERED=1
if [ "$gpus" != 0 ] && [ -z "$dry" ]; then # before any data is downloaded: how many can torch use?
    usable=$(python -m dev.gpus) || exit 2
    if [ "$usable" = 0 ]; then
        echo "nvidia-smi lists a GPU, but torch finds none (the reason is above):" \
            "CUDA_VISIBLE_DEVICES=-1 and NPROC_PER_NODE=2 rehearse on the CPU." >&2
        exit 2
    fi
    [ -z "$counted" ] || NPROC_PER_NODE=$usable
fi

# ---- running stages -------------------------------------------------------------------------------------------------------------
started=$SECONDS
finished_stages="$ZANGCHAT_BASE_DIR/speedrun/$MODEL_TAG"
[ -n "$dry" ] || mkdir -p "$finished_stages"
downloading=
again="" # 1: repeat stages even if they succeeded before
nothing=/nonexistent # of the two stages before the first checkpoint

clock() { printf '%d h %02d min' $((SECONDS / 3600)) $((SECONDS / 60 % 60)); }

stop_download() {
    if [ -n "$downloading" ]; then kill "$downloading" 2> /dev/null || true; fi
}
trap stop_download EXIT

# in_words COMMAND...: one line that bash reads as that command.
in_words() {
    local line
    line=$(printf ' %q' "$@")
    printf '%s\n' "${line# }"
}

# stage TITLE COMMAND...: run it; if it fails, end the chain with the command to repeat.
# A dry run prints the command.
stage() {
    local title=$1 code=0
    shift
    if [ -n "$dry" ]; then
        in_words "$@"
        return
    fi
    printf '\n\033[1;34m=== %s  (%s so far)\033[0m\n' "$title" "$(clock)"
    "$@" || code=$?
    if [ "$code" != 0 ]; then
        printf '\n%s stopped with exit code %d. To repeat only this command:\n' "$title" "$code" >&2
        printf '  source .venv/bin/activate\n%s  ' "$elsewhere" >&2
        in_words "$@" >&2
        printf 'To continue the whole chain from here (with the same variables):\n  bash %s\n' "${CHAIN:-speedrun.sh}" >&2
        exit "$code"
    fi
}

# once NAME CHECKPOINTS TITLE COMMAND...: a stage that leaves no checkpoint; skipped if the same command has succeeded
# since the newest checkpoint in the folder CHECKPOINTS was written.
once() {
    local mark="$finished_stages/$1" checkpoints=$2 title=$3
    shift 3
    if [ -z "$again" ] && [ "$(cat "$mark" 2> /dev/null)" = "$*" ] &&
        [ -z "$(find "$checkpoints" -name 'meta_*.json' -newer "$mark" 2> /dev/null)" ]; then
        [ -n "$dry" ] || printf '\n=== %s: done before\n' "$title"
        return
    fi
    stage "$title" "$@"
    [ -n "$dry" ] || printf '%s' "$*" > "$mark"
}

# torchrun must forward SIGUSR1, which would otherwise kill it. Under nohup a closed terminal must not end the run; torchrun would
# set its own handler and do so.
signals=--signals-to-handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
case $(trap -p HUP) in *"''"*) ;; *) signals=$signals,SIGHUP ;; esac

# on_all SCRIPT FLAGS...: the command line that runs a script on every GPU, in the array `command`. The `--` keeps torchrun
# from taking --run for one of its own flags.
on_all() {
    # --local-addr: without it, torchrun waits for ever if the host name does not resolve, as on some Macs
    local launcher=(torchrun --standalone --local-addr=127.0.0.1 --nproc_per_node="$NPROC_PER_NODE" "$signals")
    if [ -n "${LAUNCH:-}" ]; then # several machines: see dev/slurm.sbatch
        read -ra launcher <<< "$LAUNCH"
    elif [ "$NPROC_PER_NODE" = 1 ]; then
        command=(python -m "$@")
        return
    fi
    command=("${launcher[@]}" -m "$1" -- "${@:2}")
}

# evaluate SOURCE FOLDER TITLE: the chat tasks on the model of a stage, with its checkpoints in FOLDER_checkpoints.
evaluate() {
    local tasks=--all_tasks
    [ -z "$EVAL_TASKS" ] || tasks=--task_name=$EVAL_TASKS
    on_all scripts.chat_eval --source="$1" --model_tag="$MODEL_TAG" "$tasks" $EVAL_FLAGS
    once "eval_$1" "$ZANGCHAT_BASE_DIR/$2_checkpoints/$MODEL_TAG" "$3" "${command[@]}"
}

# ---- the report's clock starts with the first attempt ------------------------------------------------------------------------------
[ -e "$ZANGCHAT_BASE_DIR/report/started.json" ] ||
    stage "Report: its clock starts" python -m zangchat.report reset

# ---- data and tokenizer --------------------------------------------------------------------------------------------------------------
# The other shards are downloaded while the tokenizer trains; pretraining waits for the shard that it needs next.
download_all() {
    local all=(python -m zangchat.dataset --source="$DATASET" -n "$NUM_SHARDS")
    if [ -n "$dry" ]; then
        stage "All $NUM_SHARDS shards of $DATASET" "${all[@]}"
        return
    fi
    "${all[@]}" > "$ZANGCHAT_BASE_DIR/download.log" 2>&1 &
    downloading=$!
    echo "all $NUM_SHARDS shards are being downloaded, see $ZANGCHAT_BASE_DIR/download.log"
    manifest="$ZANGCHAT_BASE_DIR/base_data/$DATASET/manifest.json"
    planned() { [ "$(grep -o '"shard_[0-9]*\.parquet"' "$manifest" | wc -l)" -gt "$NUM_SHARDS" ]; }
    until planned; do # the order of the text depends on the plan, so nothing may read the text before
        if ! kill -0 "$downloading" 2> /dev/null && ! planned; then
            cat "$ZANGCHAT_BASE_DIR/download.log" >&2
            exit 1
        fi
        sleep 0.2
    done
}
if [ "$DATASET" = pydocs ]; then
    stage "Corpus pydocs" python -m zangchat.dataset --source=pydocs
else
    first=$(((MAX_CHARS + 249999999) / 250000000)) # shards that the tokenizer reads
    first=$((first < NUM_SHARDS ? first : NUM_SHARDS))
    stage "Text from $DATASET: $first of $NUM_SHARDS shards" python -m zangchat.dataset --source="$DATASET" -n "$first"
    download_all
fi

# Fetch the data of later stages first: a missing dataset should end the run now, not after hours of pretraining.
rl_task=$RL_TASK
[ "$RL" = 1 ] || rl_task=
once fetch "$nothing" "Conversations, questions and CORE" python -m scripts.fetch --core="$CORE" --rl_task="$rl_task" \
    ${MID_MIXTURE:+--mid_mixture="$MID_MIXTURE"} ${SFT_MIXTURE:+--sft_mixture="$SFT_MIXTURE"} \
    ${IDENTITY_DATA:+--identity_data="$IDENTITY_DATA"} ${EVAL_TASKS:+--eval_tasks="$EVAL_TASKS"}

if [ ! -e "$ZANGCHAT_BASE_DIR/tokenizer/tokenizer.json" ]; then
    again=1
    [ -n "$dry" ] || rm -f "$ZANGCHAT_BASE_DIR"/speedrun/tok*
fi
once ../tokenizer "$nothing" "Tokenizer" python -m scripts.tok_train --dataset="$DATASET" --vocab_size="$VOCAB_SIZE" --max_chars="$MAX_CHARS" $TOK_FLAGS
once ../tok_eval "$nothing" "Tokenizer: evaluation" python -m scripts.tok_eval
again=""

# ---- pretraining -----------------------------------------------------------------------------------------------------------------------
common=(--model_tag="$MODEL_TAG" --device_batch_size="$DEVICE_BATCH_SIZE" --seed="$SEED" --run="$WANDB_RUN" --resume=latest)
checkpoints="$ZANGCHAT_BASE_DIR/base_checkpoints/$MODEL_TAG"
[ "$CORE" = 1 ] || BASE_FLAGS+=" --core_metric_every=-1"
on_all scripts.base_train --depth="$DEPTH" --dataset="$DATASET" --max_seq_len="$MAX_SEQ_LEN" --target_param_data_ratio="$RATIO" \
    --total_batch_size="$TOTAL_BATCH_SIZE" --num_iterations="$NUM_ITERATIONS" "${common[@]}" $BASE_FLAGS
stage "Pretraining" "${command[@]}"
pretraining=("${command[@]}")

[ "$DEVICE_BATCH_SIZE" = auto ] || LOSS_FLAGS="--device_batch_size=$DEVICE_BATCH_SIZE $LOSS_FLAGS"
on_all scripts.base_loss --model_tag="$MODEL_TAG" $LOSS_FLAGS
once base_loss "$checkpoints" "Base model: bits per byte, samples" "${command[@]}"
if [ "$CORE" = 1 ]; then
    on_all scripts.base_eval --model_tag="$MODEL_TAG" $CORE_FLAGS
    once base_eval "$checkpoints" "Base model: CORE" "${command[@]}"
fi

# ---- conversations, multiple choice, tools -----------------------------------------------------------------------------------------------
on_all scripts.mid_train ${MID_MIXTURE:+--mixture="$MID_MIXTURE"} ${IDENTITY_DATA:+--identity_data="$IDENTITY_DATA"} "${common[@]}" $MID_FLAGS
stage "Midtraining" "${command[@]}"
evaluate mid mid "Midtraining: evaluation"

# ---- finetuning --------------------------------------------------------------------------------------------------------------------------
on_all scripts.chat_sft ${SFT_MIXTURE:+--mixture="$SFT_MIXTURE"} ${IDENTITY_DATA:+--identity_data="$IDENTITY_DATA"} "${common[@]}" $SFT_FLAGS
stage "Finetuning" "${command[@]}"
evaluate sft chatsft "Finetuning: evaluation"

# ---- reinforcement learning ----------------------------------------------------------------------------------------------------------------
if [ "$RL" = 1 ]; then
    on_all scripts.chat_rl --task="$RL_TASK" "${common[@]}" $RL_FLAGS
    stage "Reinforcement learning on $RL_TASK" "${command[@]}"
    evaluate rl chatrl "Reinforcement learning: evaluation"
fi

# ---- the report ------------------------------------------------------------------------------------------------------------------------------
stage "Report" python -m zangchat.report generate --dollars_per_hour="$DOLLARS_PER_HOUR"

if [ -n "$dry" ]; then
    echo
    if [ ! -x .venv/bin/python ]; then
        echo "The plan and its memory need the environment: run \`bash dev/setup.sh\`, then this again."
        exit
    fi
    until [ "${pretraining[0]}" = scripts.base_train ]; do pretraining=("${pretraining[@]:1}"); done
    flags=("${pretraining[@]:1}")
    [ "${flags[0]}" != -- ] || flags=("${flags[@]:1}")
    processes=$NPROC_PER_NODE
    [ -z "${LAUNCH:-}" ] || processes=$((NPROC_PER_NODE * ${SLURM_JOB_NUM_NODES:-1}))
    PYTHONDONTWRITEBYTECODE=1 exec python -m dev.plan \
        --vocab_size="$VOCAB_SIZE" --world_size="$processes" ${MEMORY_GB:+--memory_gb="$MEMORY_GB"} "${flags[@]}"
fi

seconds=$((SECONDS - started))
dollars=$(awk -v s="$seconds" -v d="$DOLLARS_PER_HOUR" 'BEGIN { printf "%.2f", s / 3600 * d }')
printf '\n%s: %d h %02d min this time, $%s at $%s an hour.\n' "$MODEL_TAG" $((seconds / 3600)) $((seconds / 60 % 60)) "$dollars" "$DOLLARS_PER_HOUR"
best=sft
[ "$RL" = 1 ] && best=rl
cat << TEXT
Talk to it:
  source .venv/bin/activate
${elsewhere}  python -m scripts.chat_cli --source=$best --model_tag=$MODEL_TAG
  python -m scripts.chat_web --source=$best --model_tag=$MODEL_TAG
TEXT
