#!/usr/bin/env bash
# Measures on one NVIDIA GPU what a CPU cannot show, in order of worth, and survives the failure of any step:
#
#     tests/benchmarks/gpu.sh checks speed memory compile        # or any of them
#
# It ends after $LIMIT seconds (480): on an H200 the checks take three minutes, the others more than the rest. Results go to $OUT (default: gpu-results) after every step; models and images to $WORK, in memory if there is room.
# SIZE=tiny and PRIOR= DECODER= try the script itself on a CPU. The README beside this file says what the numbers are.
set -u
cd "$(dirname "$0")/../.."
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
SIZE=${SIZE-sd15} PRIOR=${PRIOR-kandinsky-prior} DECODER=${DECODER-kandinsky-decoder}
BATCH=${BATCH-32} LARGE=${LARGE-64} PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-480}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -z "${WORK:-}" ]; then
    room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
    WORK=$(mktemp -d "$([ "${room:-0}" -gt 60000000 ] && echo /dev/shm || echo /tmp)/gpu.XXXXXX")
    trap 'rm -rf "$WORK"' EXIT
fi
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX=$WORK/bytecode TMPDIR=$WORK HF_DATASETS_CACHE=$WORK/hf
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor JAX_COMPILATION_CACHE_DIR=$WORK/jax

step() {  # name, seconds at most, command
    local name=$1 seconds=$2 started=$SECONDS status
    shift 2
    [ "$seconds" -gt $((LIMIT - SECONDS)) ] && seconds=$((LIMIT - SECONDS))
    if [ "$seconds" -lt 10 ]; then
        echo "$name: no time left" | tee -a "$OUT/steps.txt"
        return
    fi
    timeout --kill-after=5 "$seconds" "$@" >"$WORK/$name.log" 2>&1
    status=$?
    echo "$name: status $status after $((SECONDS - started)) s, at $SECONDS s" | tee -a "$OUT/steps.txt"
    tr '\r' '\n' <"$WORK/$name.log" | grep -E 'images/s|failed|Error|error:|"lever"|compared|^\||cuda|sm90|kernel' | tail -n 40
    tar -czf "$OUT/logs.tar.gz" -C "$WORK" $(cd "$WORK" && ls ./*.log)
    tar -czf "$OUT/results.tar.gz" -C "$WORK" results 2>/dev/null
}

benchmark() {
    "$PYTHON" tests/benchmarks/benchmark.py --use_ema --mixed_precision bf16 --rounds 1 --warmup 10 --logging_steps 5 \
        --steps 21 --here --work_dir "$WORK" --output "$WORK/results" "$@"
}
export -f benchmark
export PYTHON WORK

models() {  # of these sizes, in the background
    for size in "$@"; do
        [ -d "$WORK/models-$size" ] ||
            "$PYTHON" tests/benchmarks/sizes.py models --size "$size" --folder "$WORK/models-$size" \
                >"$WORK/models-$size.log" 2>&1 &
    done
}

cached() {  # the flags of a run from a cache of its own
    echo "'--cache_encodings $WORK/cache-$1 ${2:-}'"
}

mkdir -p "$WORK/results"
{ nvidia-smi; nproc; free -g; df -h /dev/shm; "$PYTHON" -m pip list; } >"$OUT/machine.txt" 2>&1
loop=tests/benchmarks/bare_loop.py recipe=tests/benchmarks/recipe.py
[ $# -gt 0 ] || set -- checks speed memory compile
case "$*" in *speed*) models "$SIZE" $PRIOR $DECODER ;; *memory* | *compile*) models "$SIZE" ;; esac
step imports 90 "$PYTHON" -c "import train_text_to_image, train_text_to_image_flax"  # compiled once for all runs
levers() {  # seconds at most, name, levers
    local seconds=$1 name=$2
    shift 2
    step "$name" "$seconds" "$PYTHON" tests/benchmarks/levers.py --pretrained_model_name_or_path "$WORK/models-$SIZE" \
        --train_batch_size "$BATCH" --resolution "${RESOLUTION:-512}" --mixed_precision bf16 --use_ema "$@"
}

for part in "$@"; do
    case $part in
    checks)
        step checks 180 env OMP_NUM_THREADS=2 "$PYTHON" tests/benchmarks/gpu_checks.py --work_dir "$WORK/checks" \
            --output "$WORK/results/checks.jsonl" --only "${CHECKS:-.}" --at_a_time "${AT_A_TIME:-14}"
        (cd "$WORK/checks" && tar -czf "$OUT/pictures.tar.gz" output/*/validation/*.png)
        ;;
    speed)
        wait
        step sd 150 bash -c "benchmark --size $SIZE --batch_sizes $BATCH --name $SIZE-cuda \
            --levers plain cache cache-half-norms --versus $loop '$loop --encode' $recipe"
        levers 80 levers --profile --levers ${LEVERS:-plain half-precision-norms optimizer-in-backward contiguous}
        step jax 150 bash -c "benchmark --size $SIZE --batch_sizes $BATCH --name $SIZE-cuda-jax --levers plain \
            --script train_text_to_image_flax.py --flags=$(cached jax)"
        step large 60 bash -c "benchmark --size $SIZE --batch_sizes $LARGE --name $SIZE-cuda-batch-$LARGE \
            --levers plain --versus $loop --flags=$(cached large)"
        for size in $PRIOR $DECODER; do
            step "$size" 60 bash -c "benchmark --size $size --name $size-cuda --levers plain \
                --batch_sizes $([ "$size" = "$PRIOR" ] && echo 64 || echo 16) --flags=$(cached "$size")"
        done
        ;;
    memory)
        wait
        [ -d "$WORK/images-512-640" ] ||
            "$PYTHON" tests/benchmarks/sizes.py images --resolution 512 --rows 640 --folder "$WORK/images-512-640"
        step out-of-memory 60 "$PYTHON" train_text_to_image.py --pretrained_model_name_or_path "$WORK/models-$SIZE" \
            --train_data_dir "$WORK/images-512-640" --train_batch_size 640 --max_train_steps 1 \
            --report_to none --mixed_precision bf16 --output_dir "$WORK/output"
        step memory 120 "$PYTHON" tests/benchmarks/memory.py --size "$SIZE" --work_dir "$WORK"
        ;;
    compile)  # slow at real size: 160 s were too few for the first step
        wait
        levers 300 compile --levers plain compile
        ;;
    *)
        echo "$part: no such part; there are checks, speed, memory and compile" >&2
        exit 2
        ;;
    esac
done
cat "$OUT/steps.txt"
