#!/usr/bin/env bash
# The whole round on a machine with a GPU: its tests, the benches, a training of both methods.
#
#   [PARTS="loss step train"] bench/gpu.sh [DATA_FOLDER WEIGHTS [LIMIT]]
#
# Each of PARTS is a call of its own that ends within 9.5 minutes; by default all are done. `loss`,
# within 8: tests and bench of the loss; `step`: tests of the trainer, benches of step and loader.
# Every command has a limit. With DATA_FOLDER (read with --dataset folder) and WEIGHTS (mobilenet_v2's)
# `train` makes a profile of the goal row's step fed from the cache, for its share of "data wait", and
# trains; that stops after LIMIT seconds (default 350) and goes on where it stopped when the script is run
# again. Results are written as they come, to RESULTS (default bench/results). One command that fails
# does not keep the others from running, but makes the exit code 1.
#
# The CUDA back end must be built, or the round ends at once; CAC_FAST_CUDA=0 does without it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
status=0
export CAC_FAST_CUDA=${CAC_FAST_CUDA-1}
# What cuBLAS needs to be deterministic, which the tests ask for.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

wants() { [[ " ${PARTS:-loss step train} " == *" $1 "* ]]; }
# By SECONDS, the shell's clock; what comes before the first part, the build, counts as its own.
SECONDS=0
began=0
part_ends=200
# within LIMIT COMMAND...: for so many seconds, or those that its part has left.
within() {
    local left=$((part_ends - SECONDS))
    timeout $(($1 < left ? $1 : (left > 1 ? left : 1))) "${@:2}"
}

# Built anew where a source is newer than what was built.
built=$(compgen -G 'cac_fast/_C.*.so' | head -n 1)
if [ -z "$built" ] || [ -n "$(find setup.py csrc -newer "$built" -print -quit)" ] ||
    ! "$python" -c 'import cac_fast.train' 2>/dev/null; then
    within 200 "$python" -m pip install -q --no-deps --no-build-isolation -e . || exit 1
fi
if [ "$CAC_FAST_CUDA" != 0 ]; then
    "$python" -c 'import cac_fast, sys; sys.exit(cac_fast.backends()["cuda"])' || exit 1
fi
name=$("$python" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()))') || exit 1
results="${RESULTS:-bench/results}/$name"
mkdir -p "$(dirname "$results")"

# Without the project's pytest options, as pytest-timeout may not be there.
pytest=("$python" -m pytest -q --tb=short -o addopts=)
# Side by side where that can be: most of their time is the host's, compiling.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(--numprocesses 6 --dist worksteal)

if wants loss; then
    part_ends=$((began + 470))
    # The CUDA back end by itself: a kernel that goes wrong takes all of its process along.
    within 80 "${pytest[@]}" -k cuda tests/test_gpu_loss.py |
        tee "$results-tests-loss.txt" || status=1
    within 150 "${pytest[@]}" "${parallel[@]}" -k "(gpu or cuda) and not (gpu_loss and cuda)" \
        tests/test_gpu_loss.py tests/test_ops.py | tee -a "$results-tests-loss.txt" || status=1
    within 150 "$python" bench/dc_loss.py --minutes 2 --json "$results-dc_loss.json" --plot "$results-dc_loss.png" ||
        status=1
    sanitizer=$(command -v compute-sanitizer /usr/local/cuda/bin/compute-sanitizer | head -n 1)
    for tool in memcheck racecheck; do
        [ -n "$sanitizer" ] && [ "$CAC_FAST_CUDA" != 0 ] || break
        # Each tensor in an allocation of its own, so that what lies beyond its end is nobody's.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 90 "$sanitizer" --tool "$tool" \
            --kernel-name kns=dc_loss --report-api-errors no --error-exitcode 1 \
            "${pytest[@]}" -k "cuda and (divide_nothing or nothing_active)" tests/test_gpu_loss.py |
            tee -a "$results-tests-loss.txt" || status=1
    done
    began=$SECONDS
fi
if wants step; then
    part_ends=$((began + 570))
    within 200 "${pytest[@]}" "${parallel[@]}" -k gpu tests/test_gpu.py tests/test_bench_train_step.py |
        tee "$results-tests-step.txt" || status=1
    within 240 "$python" bench/train_step.py --baseline --sweep-negatives 500,25.6k,1M --minutes 1 \
        --json "$results-train_step.json" || status=1
    within 240 "$python" bench/loader.py --json "$results-loader.json" || status=1
    began=$SECONDS
fi
if wants train && [ $# -ge 2 ]; then
    part_ends=$((began + 570))
    # Without the backbone's weights, which do not change its speed. More steps than batches that the
    # loaders' processes have ready when it begins: those would hide a loader that is too slow.
    within 180 "$python" train/main.py --dataset folder --data-dir "$1" --labeled-share 1/8 \
        --network deeplabv3plus --backbone resnet50 --batch-size 8 --crop-size 720 --workers 6 \
        --cache "runs/$name-cache" --output "runs/$name-profile" --restart --iterations 60 \
        --warmup 0 --eval-every 1000 --profile 40 | tee "$results-profile.txt" || status=1
    within "${3:-350}" "$python" bench/compare.py --name "$name-camvid" --dataset folder \
        --data-dir "$1" --shares 1/16,1/8 --seeds 0,1,2 --test --jobs 4 --threads 4 -- \
        --network deeplabv3plus --backbone mobilenet_v2 --weights "$2" --cache "runs/$name-cache" \
        --iterations 10000 --batch-size 8 --crop-size 320 --learning-rate 0.005 --workers 3
    case $? in
        0) ;;
        124) echo "training not finished in time: run this again to go on" ;;
        *) status=1 ;;
    esac
fi
exit $status
