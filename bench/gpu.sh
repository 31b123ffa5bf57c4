#!/usr/bin/env bash
# The whole round on a machine with a GPU: its tests, the benches, a training of both methods.
#
#   bench/gpu.sh [DATA_FOLDER WEIGHTS [SECONDS]]
#
# Tests get 4 minutes, the benches 2 each. With DATA_FOLDER (read with --dataset folder) and WEIGHTS
# (mobilenet_v2's) the training follows; it stops after SECONDS (default 210) and goes on where it
# stopped when the script is run again. Results are in bench/results/. One part that fails does not
# keep the others from running, but makes the exit code 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
status=0

"$python" -c 'import cac_fast.train' 2>/dev/null ||
    "$python" -m pip install -q --no-deps --no-build-isolation -e . || exit 1
name=$("$python" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()))') || exit 1
results="bench/results/$name"

# Without the project's pytest options, as pytest-timeout may not be there.
timeout 240 "$python" -m pytest -q -o addopts= -k "gpu or cuda" \
    tests/test_gpu_loss.py tests/test_ops.py tests/test_gpu.py tests/test_bench_train_step.py || status=1
timeout 150 "$python" bench/dc_loss.py --minutes 2 --json "$results-dc_loss.json" --plot "$results-dc_loss.png" ||
    status=1
timeout 180 "$python" bench/train_step.py --baseline --sweep-negatives 500,25.6k,1M --minutes 1 \
    --json "$results-train_step.json" || status=1
if [ $# -ge 2 ]; then
    timeout "${3:-210}" "$python" bench/compare.py --name "$name-camvid" --dataset folder \
        --data-dir "$1" --shares 1/16,1/8 --seeds 0,1,2 --test --jobs 4 --threads 4 -- \
        --network deeplabv3plus --backbone mobilenet_v2 --weights "$2" \
        --iterations 10000 --batch-size 8 --crop-size 320 --learning-rate 0.005 --workers 3
    case $? in
        0) ;;
        124) echo "training not finished in time: run this again to go on" ;;
        *) status=1 ;;
    esac
fi
timeout 240 "$python" bench/loader.py --json "$results-loader.json" || status=1
exit $status
