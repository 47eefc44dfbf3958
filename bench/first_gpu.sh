#!/usr/bin/env bash
# The first hour with a GPU, in eight minutes: what only a GPU can test, then short rows of the speed table.
#
#     bench/first_gpu.sh                     # from anywhere; PYTHON=... names another python
#     bench/first_gpu.sh --device cpu        # a rehearsal on a CPU, tiny: the same steps, worthless figures
#
# Each section has its own time limit and its own log; what one leaves stays if a later one fails. Nothing is
# downloaded. Figures go to bench/results/speed-<card>-torch<version>.json and .md, as bench/speed.py keeps them,
# logs to bench/results/first-gpu-<time>/; where OUT names a folder, both are copied there after each section.
# RESULTS names another folder than bench/results, LIMIT other seconds for all than 480, MOST for each section.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda
[ "${1:-}" = --device ] && device=${2:?--device needs cuda or cpu}
results=${RESULTS:-bench/results} # a folder
logs=$results/first-gpu-$(date -u +%Y%m%dT%H%M%S) # a folder for each run
began=$SECONDS
LIMIT=${LIMIT:-480} # seconds for all
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# --- what is there -------------------------------------------------------------------------------------

command -v "$python" > /dev/null || { echo "first_gpu: there is no '$python'; set PYTHON" >&2; exit 2; }
missing=$("$python" - "$device" << 'END'
import importlib.util, sys
need = ["torch", "transformers", "safetensors", "einops", "omegaconf", "numpy", "PIL", "ftfy", "tqdm"]
absent = [name for name in need if importlib.util.find_spec(name) is None]
if absent:
    print(f"python packages are missing: {', '.join(absent)}; pip install -e '.[test]' brings them")
elif sys.argv[1] == "cuda":
    import torch
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; it needs a build for CUDA, and a driver")
END
) || missing="'$python' does not run"
[ -z "$missing" ] || { echo "first_gpu: $missing" >&2; exit 2; }
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }
has pytest && tests=yes || { tests=; echo "first_gpu: pytest is missing, so the tests are left out"; }
has diffusers || echo "first_gpu: diffusers is missing, so ours are compared with each other alone"
[ "$device" = cpu ] || has triton || echo "first_gpu: triton is missing, so our kernels stay out"

mkdir -p "$logs"
touch -d '2 seconds ago' "$logs/began"
{
    date -u +%FT%TZ
    git describe --always --dirty 2> /dev/null || echo "no git"
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv,noheader 2> /dev/null \
        || echo "no nvidia-smi"
    "$python" - "$device" << 'END'
import importlib.metadata, platform, sys
print(platform.platform(), "python", platform.python_version())
for name in ("torch", "triton", "diffusers", "transformers", "safetensors", "numpy"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "-")
if sys.argv[1] == "cuda":
    import torch
    print("cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
END
} > "$logs/machine.txt" 2>&1
cat "$logs/machine.txt"

# --- sections ------------------------------------------------------------------------------------------

summary=()
failed=0
keep() { # what there is so far, where it survives the machine
    [ -n "${OUT:-}" ] || return 0
    mkdir -p "$OUT"
    cp -r "$logs" "$OUT/"
    find "$results" -maxdepth 1 -name 'speed*' -newer "$logs/began" -exec cp {} "$OUT/" \;
}
section() { # name, seconds at most, command
    local name=$1 most=$2 left=$((LIMIT - SECONDS + began)) code=0
    shift 2
    [ "$most" -gt "${MOST:-$most}" ] && most=$MOST
    if [ "$left" -lt 10 ]; then
        summary+=("$name: left out, the time is up")
        failed=1
        return
    fi
    [ "$most" -gt "$left" ] && most=$left
    echo "== $name (at most $most s)"
    local since=$SECONDS
    timeout --kill-after=10 "$most" "$@" > "$logs/$name.log" 2>&1 || code=$?
    tail -n 25 "$logs/$name.log"
    local how="in $((SECONDS - since)) s"
    case $code in
        0) summary+=("$name: done $how") ;;
        124 | 137) summary+=("$name: stopped after $most s; what was finished is kept") failed=1 ;;
        *) summary+=("$name: failed ($code) $how, see $logs/$name.log") failed=1 ;;
    esac
    keep
}
speed() { # name, seconds at most, options and rows
    local name=$1 most=$2
    shift 2
    section "$name" "$most" "$python" bench/speed.py --device "$device" "${how[@]}" "$@"
}

if [ "$device" = cuda ]; then
    how=()
    few=(--repeats 10 --warmup 3 --budget 5)
    half=float16
    only=()
else
    how=(--model tiny --threads 1)
    few=(--repeats 1 --warmup 0)
    half=bfloat16
    only=(--collect-only)
    px=64
fi
[ -z "${RESULTS:-}" ] || how+=(--results "$results/speed.json")

# Without the project's own options, which want a plug-in of pytest.
[ -z "$tests" ] || section tests 130 "$python" -m pytest -o addopts= --import-mode=importlib -q -rs --durations=5 \
    "${only[@]}" tests/kernels/test_on_gpu.py
# In one process float32 comes first: its answers are the reference of the other rows. Each row is saved when it is done.
speed networks 160 "${few[@]}" --rows "unet/b2/float32" "vae-*/b1/float32" "unet/b2/$half" "vae-*/b1/$half"
speed picture 100 "${few[@]}" --rows "image/20-b1/$half"
# Fresh processes, each of which starts, loads and paints.
speed memory 120 --repeats 1 --warmup 0 --contestants ldm ldm-kernels diffusers --rows "memory/${px:-512}/$half"
speed many 60 "${few[@]}" --rows "unet/b16/$half"

echo "== summary, after $((SECONDS - began)) s"
printf '%s\n' "${summary[@]}" | tee "$logs/summary.txt"
grep -h "^\[[0-9]" "$logs"/*.log | tee -a "$logs/summary.txt" # the rows
keep
exit $failed
