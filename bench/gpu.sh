#!/usr/bin/env bash
# A round on a machine with a GPU: three calls, each of which ends within its seconds.
#
#   PARTS=loss  bench/gpu.sh                      420: builds; checks, times, tunes, tests the loss
#   PARTS=bench bench/gpu.sh                      550: loss and step against their baselines
#   PARTS=train bench/gpu.sh DATA_FOLDER WEIGHTS  590: supervised and CAC on a folder data set
#
# Without PARTS all are done, `train` only with its arguments (WEIGHTS are mobilenet_v2's). Results
# are written as they come, to RESULTS (default bench/results): RESULTS/DEVICE-PART.txt has all that
# was said. Whatever fails, the rest runs; what failed is listed at the end, and makes the exit code 1.
# A back end that fails its check in bfloat16 (part `loss`) is left out of the benches, those of later
# calls too. What is compiled is compiled again where its sources, Python or PyTorch have changed.
# DRY_RUN=1 shows the commands and their limits; it needs no GPU.
#
# CAC_FAST_CUDA=0 does without the CUDA back end; TORCH_CUDA_ARCH_LIST is by default this GPU's.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
dry=${DRY_RUN:-}
read -ra parts <<<"${PARTS:-loss bench${2:+ train}}"
data=${1:-} weights=${2:-}
declare -A seconds=([loss]=420 [bench]=550 [train]=590)
for part in "${parts[@]}"; do
    [ -n "${seconds[$part]:-}" ] || { echo "error: PARTS has $part: use loss, bench, train" >&2; exit 2; }
    [ "$part" != train ] || [ -n "$weights" ] ||
        { echo "error: the part train needs DATA_FOLDER and WEIGHTS" >&2; exit 2; }
done
export PYTHONUNBUFFERED=1
# What cuBLAS needs to be deterministic, which the tests ask for.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

SECONDS=0
planned=0 # in a dry run the clock
ends=${seconds[${parts[0]}]}
grace=5 # between SIGTERM and SIGKILL
log=/dev/null
failed=()

now() { [ -n "$dry" ] && echo "$planned" || echo "$SECONDS"; }
say() { echo "$*" | tee -a "$log"; }
# note NAME CODE: of a command that failed.
note() {
    case $2 in
        124 | 137) failed+=("$1: over its time") ;;
        125) failed+=("$1: no time was left") ;;
        *) failed+=("$1: exit code $2") ;;
    esac
}

# allowed SECONDS: as many, or what is left of the part, less ten for a command that must be killed.
allowed() {
    local left=$((ends - $(now) - 10))
    echo $(($1 < left ? $1 : left))
}

# execute NAME SECONDS COMMAND...: its output, behind its name, to the terminal and to the log.
beside=''
execute() {
    local name=$1 asked=$2 limit limit_of='' shown
    limit=$(allowed "$2")
    shift 2
    ((limit >= 5)) || return 125
    shown=${*//$'\n'/ }
    ((limit == asked)) || limit_of=" of $asked"
    say "== $name$beside, at most $limit$limit_of s: ${shown:0:800}"
    [ -z "$dry" ] || return 0
    timeout -k "$grace" "$limit" "$@" 2>&1 | sed -u "s/^/$name | /" | tee -a "$log"
    return "${PIPESTATUS[0]}"
}

# run, as execute; a failure is noted.
run() {
    local limit
    limit=$(allowed "$2")
    execute "$@" || note "$1" $?
    planned=$((planned + limit))
}

# start, as run, beside all that is started until `join`; `lost` then names those that failed.
pids=() names=() widest=0
start() {
    local limit
    limit=$(allowed "$2")
    widest=$((limit > widest ? limit : widest))
    names+=("$1")
    beside=', beside others' execute "$@" &
    pids+=($!)
    [ -z "$dry" ] || wait "$!"
}
join() {
    local each code
    lost=()
    for each in "${!pids[@]}"; do
        wait "${pids[each]}"
        code=$?
        ((code == 0)) || { note "${names[each]}" "$code"; lost+=("${names[each]}"); }
    done
    planned=$((planned + widest))
    pids=() names=() widest=0
}

# What there is: GPU, versions, the back ends for GPUs and why one cannot be used.
question='
import importlib.util, platform, torch
if torch.cuda.is_available():
    print("device", "-".join(torch.cuda.get_device_name().lower().split()))
    print("arch", "%d.%d" % torch.cuda.get_device_capability())
print("versions", platform.python_version(), torch.__version__)
print("xdist", importlib.util.find_spec("xdist") is not None)
import cac_fast, cac_fast.train
for name, reason in cac_fast.backends().items():
    if name not in ("reference", "eager", "cpp"):
        print("backend", name, " ".join((reason or "").split()))
print("installed", True)
'
device='' arch=''
ask() {
    local answer key value rest
    # Twice what is planned, as a first import may be slow; what comes last in the part pays for it.
    answer=$(timeout -k "$grace" "$(allowed 40)" "$python" -c "$question" 2>&1)
    versions='' xdist='' installed='' gpu=() reasons=()
    while read -r key value rest; do
        case $key in
            device | arch | xdist | installed) printf -v "$key" %s "$value" ;;
            versions) versions="$value $rest" ;;
            backend) gpu+=("$value") reasons+=("$rest") ;;
        esac
    done <<<"$answer"
    said=${answer##*$'\n'}
    planned=$((planned + 20))
    [ -z "$dry" ] || device=${device:-gpu} arch=${arch:-9.0}
    [ -n "$device" ] || { echo "error: no GPU is seen: $said" >&2; exit 1; }
}

# The sum of what is compiled, for what, with what: each call may come with new file times.
mark=build/gpu.txt
checksum() {
    {
        echo "$versions ${CAC_FAST_CUDA-} $TORCH_CUDA_ARCH_LIST"
        find setup.py csrc -name __pycache__ -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum
}

# Compile what is not; without the CUDA back end where that fails, which the mark keeps in mind.
build() {
    local sum install each problem='' code=0
    sum=$(checksum)
    install=("$python" -m pip install -q --no-deps --no-build-isolation -e .)
    # A dry run shows it where the plan has it; the later calls find it done.
    if [ -n "$dry" ] && [ "${parts[0]}" != loss ]; then
        :
    elif [ -n "$dry" ] || [ -z "$installed" ] || [ "$(head -n 1 "$mark" 2>/dev/null)" != "$sum" ]; then
        [ -n "$dry" ] || rm -f "$mark"
        execute build 100 "${install[@]}" || code=$?
        planned=$((planned + 100))
        if ((code)); then
            problem="build: $( ((code == 124 || code == 137)) && echo "over its time" || echo "exit code $code")"
            say "$problem; once more without CUDA"
            CAC_FAST_CUDA=0 run "build without CUDA" 40 "${install[@]}"
        fi
        [ -n "$dry" ] || { mkdir -p build && printf '%s\n' "$sum" ${problem:+"$problem"} >"$mark"; }
        ask
    fi
    [ ! -f "$mark" ] || [ -n "$dry" ] || problem=$(tail -n +2 "$mark")
    [ -z "$problem" ] || failed+=("$problem")
    [ -n "$installed" ] || failed+=("cac_fast cannot be imported: $said")
    usable=()
    for each in "${!gpu[@]}"; do
        if [ -z "${reasons[each]}" ] || [ -n "$dry" ]; then
            usable+=("${gpu[each]}")
        else
            say "without the back end ${gpu[each]}: ${reasons[each]}"
            [[ ${gpu[each]} == cuda* && ${CAC_FAST_CUDA-} == 0 ||
                ${reasons[each]} == *"compute capability"* ]] ||
                failed+=("back end ${gpu[each]}: ${reasons[each]:0:300}")
        fi
    done
}

# Leave out what failed its check in bfloat16, in this call or an earlier one.
refused=build/gpu-refused.txt
leave_out_refused() {
    local each kept=()
    [ -f "$refused" ] && [ -z "$dry" ] || return 0
    for each in "${usable[@]}"; do
        if grep -qxF "$each" "$refused"; then
            failed+=("back end $each: left out of the benches, as it failed its check")
        else
            kept+=("$each")
        fi
    done
    usable=("${kept[@]}")
}

# joined WORDS...: with commas.
joined() { local IFS=,; echo "$*"; }
first() { compgen -G "$1" || { shift; (($#)) && first "$@"; }; }
tool() { { command -v "$1"; first "/usr/local/cuda/bin/$1" "/opt/nvidia/*/*/$1"; } | head -n 1; }

# tests NAME SECONDS ARGUMENTS...: beside others; without the project's pytest options, which not
# every machine knows; side by side where that can be, as most of their time is the host's.
tests() {
    start "$1" "$2" "$python" -m pytest -q --tb=short -o addopts= -p no:cacheprovider \
        "${parallel[@]}" "${@:3}"
}

loss() {
    local name dtype other chosen tested=("${usable[@]}")
    # A path may be for 16 bits alone, which is no failure.
    local check='import sys, torch, cac_fast
try:
    print(cac_fast.verify("cuda", getattr(torch, sys.argv[2]), sys.argv[1]))
except ValueError as refusal:
    if sys.argv[2] != "float32":
        raise
    print("skipped:", refusal)'
    for name in "${usable[@]}"; do
        for dtype in bfloat16 float16 float32; do
            start "verify $name $dtype" 60 "$python" -c "$check" "$name" "$dtype"
        done
    done
    join
    if [ -z "$dry" ]; then
        mkdir -p build
        printf '%s\n' "${lost[@]}" | sed -n 's/^verify \(.*\) bfloat16$/\1/p' >"$refused"
    fi
    leave_out_refused
    run "loss, fast ones" 65 "$python" bench/dc_loss.py --minutes 0.8 \
        --providers "$(joined "${usable[@]}" eager)" --json "$results-dc_loss-fast.json"
    run tiles 45 "$python" bench/tiles.py --json "$results-tiles.json"
    local once='import sys
sys.path.insert(0, "bench")
import torch
from lib import cases, providers
device = torch.device("cuda")
given = cases.make_operands(cases.standard_cases("cuda")[0], device)
for name in sys.argv[1:]:
    providers.backend_provider(name, device).prepare(given)()
torch.cuda.synchronize()'
    ncu=$(tool ncu)
    if [[ -n $ncu$dry && -n ${usable[*]} ]]; then
        run ncu 35 "${ncu:-ncu}" --clock-control none --set full -k regex:dc_loss_partial \
            -c "${#usable[@]}" --log-file "$results-ncu.txt" "$python" -c "$once" "${usable[@]}"
    else
        say "without ncu: it is not here, or there is no back end to look at"
    fi
    # Each back end by itself: a kernel that goes wrong takes all of its process along.
    for name in "${tested[@]}"; do
        chosen=$name
        for other in "${tested[@]}"; do
            [[ $other != "$name"* || $other == "$name" ]] || chosen+=" and not $other"
        done
        tests "tests $name" 150 -k "$chosen" tests/test_gpu_loss.py
    done
    tests "tests of the operator" 150 -k gpu tests/test_ops.py
    join
}

bench() {
    leave_out_refused
    run "loss, all" 245 "$python" bench/dc_loss.py --minutes 3.6 \
        --providers "$(joined "${usable[@]}" eager reference dense compiled chunked flex)" \
        --json "$results-dc_loss.json" --plot "$results-dc_loss.png"
    run step 215 "$python" bench/train_step.py --baseline --sweep-negatives 500,25.6k,1M \
        --minutes 1.5 --json "$results-train_step.json"
    sanitizer=$(tool compute-sanitizer)
    if [[ -n $sanitizer$dry && " ${usable[*]} " == *" cuda"* ]]; then
        # Each tensor in an allocation of its own, so that what lies beyond its end is nobody's.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run memcheck 60 "${sanitizer:-compute-sanitizer}" \
            --tool memcheck --kernel-name kns=dc_loss --report-api-errors no --error-exitcode 1 \
            "$python" -m pytest -q --tb=short -o addopts= -p no:cacheprovider \
            -k "cuda and (divide_nothing or nothing_active)" tests/test_gpu_loss.py
    fi
}

train() {
    local set options
    set=$(basename "$data")
    options=(--dataset folder --data-dir "$data")
    # Trainings save when they are stopped: the same call goes on with them.
    grace=15 run training 400 "$python" bench/accuracy/compare.py --name "$device-$set" "${options[@]}" \
        --results "$folder" --shares 1/8 --seeds 0,1,2 --test --jobs 6 --threads 2 -- \
        --network deeplabv3plus --backbone mobilenet_v2 --weights "$weights" \
        --cache "runs/$device-cache" --iterations 2000 --batch-size 8 --crop-size 320 \
        --learning-rate 0.005 --workers 1 --eval-every 500
    # The goal row's step, fed from the cache, for its share of "data wait". Small images are drawn
    # large, or their crops would be padding; random weights are as fast as others; there are more
    # steps than batches that the loaders have ready when it begins.
    run profile 80 "$python" train/main.py "${options[@]}" --labeled-share 1/8 \
        --network deeplabv3plus --backbone resnet50 --batch-size 8 --crop-size 720 \
        --base-size 2048 --workers 6 --cache "runs/$device-cache" \
        --output "runs/$device-profile" --restart --iterations 60 --warmup 0 --eval-every 1000 \
        --profile 40
    tests "tests of the trainer" 150 -k gpu tests/test_gpu.py tests/test_bench_train_step.py
    join
}

ask
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST-$arch}
folder=${RESULTS:-bench/results}
results=$folder/$device
parallel=()
[ "$xdist" != True ] || parallel=(--numprocesses 4 --dist worksteal)
[ -n "$dry" ] || mkdir -p "$folder"
for each in "${!parts[@]}"; do
    part=${parts[each]}
    ((each == 0)) || ends=$(($(now) + seconds[$part]))
    if [ -z "$dry" ]; then
        log=$results-$part.txt
        echo "$device, $versions, TORCH_CUDA_ARCH_LIST=$TORCH_CUDA_ARCH_LIST" >"$log"
    fi
    say "# $part, ${seconds[$part]} s"
    ((each > 0)) || build
    "$part"
done
say "# done after $(now) s"
((${#failed[@]})) || exit 0
for each in "${failed[@]}"; do say "failed: $each"; done
exit 1
