#!/usr/bin/env bash
# What the README's table shows, on two GPUs of one machine in ten minutes, each case alone on its card, the most wanted
# first: two_cards.sh OUT
# CLIP=clip.mp4 (make_clip.py) adds the step from a file, WHEELS=FOLDER what peers.sh, two_gpus.sh and quantised.py want.
# Logs and one results.json a card are in OUT; measure.py joins them.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out=${1:?folder for results}
mkdir -p "$out/0" "$out/1"
graphs="--graphs --attention split --suffix .graphs"

step() { # CARD NAME SECONDS COMMAND...: one case after the other on a card
  local card=$1 name=$2 limit=$3
  shift 3
  local begun=$SECONDS
  CUDA_VISIBLE_DEVICES=$card timeout "$limit" "$@" >>"$out/$card.log" 2>&1
  echo "card $card $name: exit status $?, $((SECONDS - begun)) s, ends at $SECONDS s"
}

# a process for each way of recomputing: recordings of one would count as memory of the other
first() {
  step 0 by_layer 130 bash "$here/run.sh" --out "$out/0" --budget-s 125 --cases peak,lora_by_layer $graphs
  step 0 full 100 bash "$here/run.sh" --out "$out/0" --budget-s 95 --cases lora_full --reps 1
  step 0 last8 60 bash "$here/run.sh" --out "$out/0" --budget-s 55 --cases lora_last8_by_layer $graphs
  step 0 prefill 90 bash "$here/run.sh" --out "$out/0" --budget-s 85 \
    --cases prefill_sliding_window,prefill_perturbation,ask $graphs
  step 0 all 80 bash "$here/run.sh" --out "$out/0" --budget-s 75 --cases lora_all,gains --reps 2 $graphs
}

second() {
  step 1 long 270 bash "$here/run.sh" --out "$out/1" --budget-s 260 --case-s 260 --cases lora_1m $graphs
  step 1 recipe 110 bash "$here/run.sh" --out "$out/1" --budget-s 105 --cases as_recipe --attention split --reps 2
  if [ -n "${CLIP:-}" ]; then
    step 1 data 160 env PYTHONPATH="$here/../.." python3 "$here/data_step.py" --clip "$CLIP" --out "$out/1" --parts ahead_cold,ahead_warm,in_step --budget-s 125
  fi
  step 1 nf4 120 bash "$here/run.sh" --out "$out/1" --budget-s 110 --cases lora_all_nf4,lora_all_nf4_whole --reps 1
  step 1 peers 80 bash "$here/peers.sh" --out "$out/1"
}

first &
second &
wait
python3 "$here/measure.py" "$out/results.json" "$out"/[01]/results.json
show='import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from measure import line, read_rows
print(*map(line, read_rows(Path(sys.argv[2]))), sep="\n")'
python3 -c "$show" "$here" "$out/results.json"
