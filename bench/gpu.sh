#!/usr/bin/env bash
# Everything that needs a GPU, in at most 8 minutes: tests first, then the benchmarks.
#
#     bench/gpu.sh FOLDER [PYTHON]     # one GPU of 80 GB; a log per part is left in FOLDER
#
# A part that fails or runs out of time does not stop the others. The status is 0 if all passed.
set -u
cd "$(dirname "$0")/.."
logs=${1:?give a folder for the logs}
python=${2:-python3}
mkdir -p "$logs"
export TQDM_DISABLE=1 PYTHONWARNINGS=ignore PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo  # one machine: nothing leaves it
began=$SECONDS
summary=()

part() { # part NAME SECONDS COMMAND…
    local name=$1 limit=$2 left=$((480 - SECONDS + began)) started=$SECONDS status=0
    shift 2
    if [ "$left" -lt 10 ]; then
        summary+=("$name: no time was left")
        return
    fi
    limit=$((limit < left ? limit : left))
    timeout --kill-after=5 "$limit" "$@" > "$logs/$name.log" 2>&1 || status=$?
    summary+=("$name: status $status, $((SECONDS - started)) s")
    printf '\n──────── %s ────────\n' "${summary[-1]}"
    tail -n 40 "$logs/$name.log"
}

nvidia-smi > "$logs/nvidia-smi.log" 2>&1
part tests 200 "$python" -m pytest -m gpu tests/test_gpu.py -s -p no:cacheprovider
part cudnn_case 40 "$python" bench/cudnn_case.py
part stack 120 "$python" bench/stack.py
part logprobs 60 "$python" bench/logprobs.py --device cuda --dtype bfloat16 --rounds 5
part mass 45 "$python" bench/mass.py --device cuda --dtype bfloat16 --rounds 5
part scaling 60 "$python" bench/scaling.py --device cuda --dtype bfloat16
part step 60 "$python" bench/step.py --device cuda --dtype bfloat16
part tower 40 "$python" bench/tower.py --device cuda --dtype bfloat16

printf '\n──────── summary, %s s ────────\n' $((SECONDS - began))
printf '%s\n' "${summary[@]}" | tee "$logs/summary.log"
! grep -qv 'status 0,' "$logs/summary.log"
