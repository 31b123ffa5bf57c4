#!/usr/bin/env bash
# The whole round on a machine with a GPU: the GPU tests, then a real training of both methods.
#
#   bench/gpu.sh DATA_FOLDER WEIGHTS [SECONDS]
#
# DATA_FOLDER is read with --dataset folder; WEIGHTS are mobilenet_v2's. The training stops after
# SECONDS (default 420) and goes on where it stopped when the script is run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=${1:?a data folder for --dataset folder}
weights=${2:?ImageNet weights of mobilenet_v2}
python3 -m pytest -q tests/test_gpu.py
timeout "${3:-420}" python3 bench/compare.py --name camvid-gpu --dataset folder --data-dir "$data" \
    --shares 1/16,1/8 --seeds 0,1,2 --test --jobs 4 --threads 4 -- \
    --network deeplabv3plus --backbone mobilenet_v2 --weights "$weights" \
    --iterations 10000 --batch-size 8 --crop-size 320 --learning-rate 0.005 --workers 3 ||
    echo "not finished in time: run it again to go on"
