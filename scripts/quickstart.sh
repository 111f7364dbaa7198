#!/usr/bin/env bash
# From a fresh machine to a fine-tuned adapter and a report, on the CPU: quickstart.sh
# Everything goes to runs/quickstart; a second call reuses what is there. Delete that folder to begin anew.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh av
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="ignore::FutureWarning"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
run=runs/quickstart
begun=$SECONDS
say() { printf '\n== %s\n' "$*"; }

say "1/5 model: a small random Qwen2.5-Omni thinker (2.6 M weights, untrained)"
[ -f $run/model/preprocessor_config.json ] && echo "kept: $run/model" || omnimem tiny $run/model

say "2/5 clips: real mp4 files with picture, sound and questions"
python -m data_prep.render $run/clips --clips 60 --test 12 --val 4 --seconds 16 --slot-s 2.5 --grid 2 \
    --seed 0 --workers 2

say "3/5 fine-tuning under random memory budgets"
if [ -d $run/train/checkpoints ] && grep -q '"step": 60,' $run/train/metrics.jsonl; then
    echo "kept: $run/train"
else
    accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
        -m omnimem_train train recipes/quickstart.yaml train.resume=auto
fi

say "4/5 export of the adapter"
if [ $run/adapter/memory.json -nt $run/train/metrics.jsonl ]; then
    echo "kept: $run/adapter"
else
    rm -rf $run/eval # results of another adapter
    omnimem export $run/train $run/adapter
fi

say "5/5 evaluation: base and adapter, four selectors, two budgets and the full cache"
omnimem eval recipes/quickstart_eval.yaml
omnimem report --train $run/train --eval $run/eval --out $run/report.html --title "Quickstart" \
    --note "The base model is random: this shows that every step runs, not that the method works."

echo
echo "The base model is randomly initialised and was trained for a minute or two, so accuracies near chance (25 %) are"
echo "what to expect: this run shows that every step works. Report: $run/report.html ($((SECONDS - begun)) s)"
