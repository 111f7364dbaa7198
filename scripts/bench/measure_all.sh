#!/usr/bin/env bash
# Measures what the README's table shows, the most wanted first: measure_all.sh OUT
# On one GPU about 15 minutes, on two of one machine 8, each case alone on its card (CARDS=1 takes one of them).
# CLIP=clip.mp4 (make_clip.py) adds the step from a file, WHEELS=FOLDER what peers.sh and quantised.py want. MORE="--tiny
# --device cpu" shows the script itself in a minute. Logs and one results.json a card are in OUT; OUT/results.json has all.
set -uo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
out=${1:?folder for results}
cards=${CARDS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python="$root/.venv/bin/python"; fi
export PYTHON="$python" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
graphs="--graphs --attention split --suffix .graphs"
mkdir -p "$out/0" "$out/1"

step() { # CARD NAME SECONDS COMMAND...: one case after the other on a card
  local card=$1 name=$2 limit=$3
  shift 3
  local begun=$SECONDS log="$out/$card.log"
  if [ "$cards" -lt 2 ]; then card=0; fi
  CUDA_VISIBLE_DEVICES=$card timeout "$limit" "$@" >>"$log" 2>&1
  echo "card $card $name: exit status $?, $((SECONDS - begun)) s, ends at $SECONDS s"
}

bench() { # CARD NAME SECONDS CASES [ARGUMENTS OF bench.py]
  local card=$1 name=$2 limit=$3 cases=$4
  shift 4
  step "$card" "$name" "$limit" bash "$here/run.sh" --out "$out/$card" --budget-s $((limit - 5)) --cases "$cases" "$@" ${MORE:-}
}

# a process for each way of recomputing: recordings of one would count as memory of the other
first() {
  bench 0 by_layer 140 peak,lora_by_layer $graphs
  bench 0 full 110 lora_full --reps 1
  bench 0 last8 60 lora_last8_by_layer $graphs
  bench 0 prefill 150 prefill_sliding_window,prefill_perturbation,prefill_observed_attention,prefill_omnimem,ask,agreement $graphs
  bench 0 all 80 lora_all,gains --reps 2 $graphs
}

second() {
  bench 1 long 270 lora_1m --case-s 265 $graphs
  bench 1 recipe 110 as_recipe --attention split --reps 2
  if [ -n "${CLIP:-}" ]; then
    step 1 data 160 "$python" "$here/data_step.py" --clip "$CLIP" --out "$out/1" --parts ahead_cold,ahead_warm,in_step --budget-s 125
  fi
  if "$python" -c "import bitsandbytes" 2>/dev/null; then bench 1 nf4 120 lora_all_nf4,lora_all_nf4_whole --reps 1; fi
  if [ -n "${WHEELS:-}" ]; then step 1 peers 80 bash "$here/peers.sh" --out "$out/1"; fi
}

if [ "$cards" -ge 2 ]; then
  first &
  second &
  wait
else
  first
  second
fi
"$python" "$here/measure.py" "$out/results.json" "$out"/[01]/results.json
show='import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); from measure import line, read_rows
print(*map(line, read_rows(Path(sys.argv[2]))), sep="\n")'
"$python" -c "$show" "$here" "$out/results.json"
