#!/usr/bin/env bash
# The whole pipeline on a laptop: from a bare machine to a chat, without a GPU, downloading only packages.
#
#   bash dev/runcpu.sh                 about 25 minutes on two cores
#   MINUTES=10 bash dev/runcpu.sh      shorter and worse: every stage gets fewer steps
#   bash dev/runcpu.sh --lang=zh       headings in Chinese (en: English); the default is the language of LANG
#   bash dev/runcpu.sh --source=tinystories      pretrain on the hub's short stories (a download) instead of documentation
#   bash dev/runcpu.sh --arch=modern   a model that copies unknown words better, but that no other program can run
#
# The model is small (4 layers, 2.6 million parameters, a vocabulary of 2,048) and trained on the documentation found on this
# machine. It says who it is, tells stories of a small world and answers questions about them, makes small talk, counts letters
# and adds numbers with its tools, and does not know anything else.
# After Ctrl-C or a power cut, run it again: every stage resumes. To start over, remove $ZANGCHAT_BASE_DIR.
#
# The reasons for the numbers: README.md, "Results on a laptop".
set -euo pipefail
unset CDPATH PYTHONHOME # as activating .venv does; CDPATH would lead cd elsewhere
unset PYTHONDONTWRITEBYTECODE # as dev/setup.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lang=${LC_ALL:-${LC_MESSAGES:-${LANG:-en}}} corpus=pydocs arch=nanochat
command="${MINUTES:+MINUTES=$MINUTES }${SEED:+SEED=$SEED }bash dev/runcpu.sh${*:+ $*}"
for argument in "$@"; do
    case $argument in
    --lang=en | --lang=zh) lang=${argument#--lang=} ;;
    --source=pydocs | --source=tinystories) corpus=${argument#--source=} ;;
    --arch=nanochat | --arch=modern) arch=${argument#--arch=} ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' dev/runcpu.sh; exit ;;
    *)
        printf 'error: %s is not a flag of dev/runcpu.sh: --lang=en|zh, --source=pydocs|tinystories and --arch=nanochat|modern are\n' "$argument" >&2
        exit 2
        ;;
    esac
done

# ---- words: a language is one block ----------------------------------------------------------------------------------------
case $lang in
zh*)
    SO_FAR="（已用 %d 分 %02d 秒）"
    FAILED="这个阶段没有完成（退出码 %d）。已保存的内容不会丢失，继续运行请用：\n%s  %s\n"
    ON_CPU="本次运行使用 CPU。"
    CORPUS_pydocs="语料：这台机器上的文档和代码" CORPUS_tinystories="语料：TinyStories，来自 Hugging Face" TOKENIZER="分词器：2,048 个 token"
    PRETRAINING="预训练" MIDTRAINING="中期训练" FINETUNING="微调" REINFORCEMENT="强化学习"
    BASE_EVALUATION="评估预训练模型" AFTER_mid="评估中期训练后的模型" AFTER_sft="评估微调后的模型" AFTER_rl="评估强化学习后的模型"
    REPORT="报告" CONVERSATIONS="十段对话"
    DONE="用时 %d 分钟，完成。报告：%s\n与模型对话：\n" IN_TERMINAL="在终端里" IN_BROWSER="在浏览器里"
    ;;
*)
    SO_FAR="(%d min %02d s so far)"
    FAILED="This stage did not finish (exit code %d). Nothing that was saved is lost; resume with:\n%s  %s\n"
    ON_CPU="This run computes on the CPU."
    CORPUS_pydocs="Corpus: documentation and code found on this machine" CORPUS_tinystories="Corpus: TinyStories, from the hub"
    TOKENIZER="Tokenizer: 2,048 tokens"
    PRETRAINING="Pretraining" MIDTRAINING="Midtraining" FINETUNING="Finetuning" REINFORCEMENT="Reinforcement learning"
    BASE_EVALUATION="Evaluation of the base model" AFTER_mid="Evaluation after mid" AFTER_sft="Evaluation after sft" AFTER_rl="Evaluation after rl"
    REPORT="Report" CONVERSATIONS="Ten conversations"
    DONE="Done in %d minutes. The report: %s\nTalk to the model:\n" IN_TERMINAL="in the terminal" IN_BROWSER="in the browser"
    ;;
esac

started=$SECONDS
bash dev/setup.sh
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PYTHONUNBUFFERED=1
elsewhere="" # the line that a new shell needs before commands of this run
[ -z "${ZANGCHAT_BASE_DIR:-}" ] || elsewhere="  export ZANGCHAT_BASE_DIR=$(printf '%q' "$ZANGCHAT_BASE_DIR")"$'\n'
export ZANGCHAT_BASE_DIR="${ZANGCHAT_BASE_DIR:-$HOME/.cache/zangchat}"
export WANDB_RUN="${WANDB_RUN:-dummy}"
if command -v nvidia-smi > /dev/null && ! problem=$(python -m dev.gpus 2>&1 > /dev/null); then
    printf '%s\n%s\n' "$problem" "$ON_CPU" >&2
    export CUDA_VISIBLE_DEVICES=-1
fi
MINUTES=${MINUTES:-25}
SEED=${SEED:-42}

stage_number=0
stage() { # stage TITLE COMMAND...: prints the title and runs the command
    stage_number=$((stage_number + 1))
    # shellcheck disable=SC2059  # the words hold the places of the numbers
    printf "\n\033[1;34m=== [%d/12] %s  $SO_FAR\033[0m\n" "$stage_number" "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
    "${@:2}" || failed $?
}
failed() { # failed CODE: says how to resume, and leaves
    # shellcheck disable=SC2059
    printf "\n$FAILED" "$1" "$elsewhere" "$command" >&2
    exit "$1"
}
train() { stage "$1" python -m "${@:2}" --model_tag=$TAG --seed="$SEED" --resume=latest; }

[ -e "$ZANGCHAT_BASE_DIR/report/started.json" ] || python -m zangchat.report reset # the report's clock starts with the first attempt

# ---- data ------------------------------------------------------------------------------------------------------------------
title=CORPUS_$corpus
stage "${!title}" python -m zangchat.dataset --source=$corpus
# The tokenizer reads conversations, too, so that a name or a thing of the stories is one token, to be copied at once. Numbers
# are cut into single digits: that is a pattern which the other programs know, see dev/docs/en/programs.md.
stage "$TOKENIZER" python -m scripts.tok_train --dataset=$corpus --vocab_size=2048 --max_chars=8000000 --pattern=digits1 \
    --mixture="stories:8000,smalltalk:1,dontknow:500,identity:1"

# Two cores train width 192 on two to three million tokens in ten minutes. At this size many small steps beat few large ones,
# and few wide heads beat many narrow ones: normalised queries and keys of width D have products of at most sqrt(D) after
# scaling, which for 32 is too little to look at one word only, and so to copy it.
MODEL="--arch=$arch --depth=4 --n_embd=192 --head_dim=96 --max_seq_len=320 --total_batch_size=1920 --device_batch_size=6"
TAG=${MODEL#*--depth=} # every stage names the model: by default it would be the largest in the base directory
TAG=d${TAG%% *}

# The steps that fit are measured once on this machine and then kept, so that an interrupted run resumes with the same plan.
plan() { # plan NAME FLAGS...: sets BASE_STEPS, MID_STEPS ...
    local file="$ZANGCHAT_BASE_DIR/runcpu.$1"
    if [ ! -s "$file" ]; then
        # shellcheck disable=SC2086  # split the flags at spaces
        python -m dev.laptop_plan --minutes="$MINUTES" --model_tag=$TAG $MODEL "${@:2}" > "$file.new" || failed $?
        mv "$file.new" "$file"
    fi
    # shellcheck disable=SC1090
    source "$file"
    head -n 1 "$file"
}
plan plan

# ---- training --------------------------------------------------------------------------------------------------------------
# At this size the hardest part is to copy a word from the question, into a story or a tool call. Whether a model learns it is
# decided within a few hundred steps, and by how much of its text consists of copies. So pretraining is short and reads stories
# and facts, with a head that starts from the embedding (--head_init_scale); the longer midtraining adds everything else.
# shellcheck disable=SC2086
train "$PRETRAINING" scripts.base_train $MODEL --head_init_scale=0.05 --dataset=$corpus --mixture_ratio=0.9 \
    --mixture="stories:5500,storyfacts:6500,storyquestions:2000,spellingbee:2000,medley:600" \
    --num_iterations="$BASE_STEPS" --matrix_lr=0.01 --embedding_lr=0.05 --unembedding_lr=0.00375 \
    --eval_every=250 --eval_tokens=100000 --sample_every=-1 --core_metric_every=-1
plan later --pretrained # at the pace that pretraining met, in the time that it left
train "$MIDTRAINING" scripts.mid_train --dataset=$corpus --mixture_ratio=0.95 \
    --mixture="spellingbee:15500,arithmetic:4000,storyfacts:3500,stories:2500,storyquestions:2500,storiesagain:500,medley:3500,smalltalk:2.2,identity:5,dontknow:3000,pydocs:0.2" \
    --num_iterations="$MID_STEPS" --eval_every=250 --eval_tokens=50000
train "$FINETUNING" scripts.chat_sft --target_examples_per_step=32 --num_iterations="$SFT_STEPS" --init_lr_frac=0.2 \
    --mixture="spellingbee:1600,arithmetic:400,storyfacts:200,stories:300,storyquestions:500,storiesagain:100,medley:1500,smalltalk:1.5,identity:2.5,dontknow:700,pydocs:0.1" \
    --eval_every=100 --eval_steps=4
train "$REINFORCEMENT" scripts.chat_rl --task=spellingbee --examples_per_step=8 --num_samples=8 --max_new_tokens=48 \
    --num_iterations="$RL_STEPS" --eval_every=-1

# ---- results ---------------------------------------------------------------------------------------------------------------
stage "$BASE_EVALUATION" python -m scripts.base_loss --model_tag=$TAG --split_tokens=50000
for source in mid sft rl; do
    title=AFTER_$source
    stage "${!title}" python -m scripts.chat_eval --source="$source" --model_tag=$TAG \
        --task_name="SpellingBee|Arithmetic|Identity|Stories|StoryQuestions|SmallTalk|DontKnow" --max_problems=100 --max_new_tokens=192
done
stage "$CONVERSATIONS" python -m dev.talk --lang="${lang%%_*}" --model_tag=$TAG
stage "$REPORT" python -m zangchat.report generate

# shellcheck disable=SC2059
printf "\n$DONE" $(((SECONDS - started) / 60)) "$ZANGCHAT_BASE_DIR/report/report.html"
cat <<END
  source .venv/bin/activate
${elsewhere}  python -m scripts.chat_cli --model_tag=$TAG          $IN_TERMINAL
  python -m scripts.chat_web --model_tag=$TAG          $IN_BROWSER
END
