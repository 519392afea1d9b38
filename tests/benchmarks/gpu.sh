#!/usr/bin/env bash
# Measures on one NVIDIA GPU what a CPU cannot show, in order of worth, and survives the failure of any step:
#
#     tests/benchmarks/gpu.sh checks speed memory        # any of them; all together about 12 minutes on an H200
#
# Results go to $OUT (default: gpu-results) after every step; models and images to $WORK, in memory if there is room.
# SIZE=tiny and PRIOR= DECODER= try the script itself on a CPU. The README beside this file says what the numbers are.
set -u
cd "$(dirname "$0")/../.."
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
SIZE=${SIZE-sd15} PRIOR=${PRIOR-kandinsky-prior} DECODER=${DECODER-kandinsky-decoder}
BATCH=${BATCH-32} LARGE=${LARGE-64} PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-570}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -z "${WORK:-}" ]; then
    room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
    WORK=$(mktemp -d "$([ "${room:-0}" -gt 60000000 ] && echo /dev/shm || echo /tmp)/gpu.XXXXXX")
    trap 'rm -rf "$WORK"' EXIT
fi
export TMPDIR=$WORK TORCHINDUCTOR_CACHE_DIR=$WORK/inductor JAX_COMPILATION_CACHE_DIR=$WORK/jax HF_DATASETS_CACHE=$WORK/hf

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
        --here --work_dir "$WORK" --output "$WORK/results" "$@"
}
export -f benchmark
export PYTHON WORK

models() {  # of a size
    "$PYTHON" tests/benchmarks/sizes.py models --size "$1" --folder "$WORK/models-$1"
}

mkdir -p "$WORK/results"
{ nvidia-smi; nproc; free -g; df -h /dev/shm; "$PYTHON" -m pip list; } >"$OUT/machine.txt" 2>&1
for part in "${@:-checks speed memory}"; do
    for name in $part; do
        case $name in
        checks)
            step checks 150 "$PYTHON" tests/benchmarks/gpu_checks.py --work_dir "$WORK/checks" \
                --output "$WORK/results/checks.jsonl" --timeout 90
            tar -czf "$OUT/pictures.tar.gz" -C "$WORK/checks" $(cd "$WORK/checks" && ls output/*/validation/*.png)
            ;;
        speed)
            for size in $PRIOR $DECODER; do models "$size" >"$WORK/models-$size.log" 2>&1 & done
            loop=tests/benchmarks/bare_loop.py recipe=tests/benchmarks/recipe.py
            step sd 240 bash -c "benchmark --size $SIZE --batch_sizes $BATCH --steps 26 --name $SIZE-cuda \
                --levers plain cache cache-compile --versus $loop '$loop --encode' $recipe"
            step levers 120 "$PYTHON" tests/benchmarks/levers.py --pretrained_model_name_or_path "$WORK/models-$SIZE" \
                --train_batch_size "$BATCH" --resolution "${RESOLUTION:-512}" --mixed_precision bf16 --use_ema --profile
            step sd-large 100 bash -c "benchmark --size $SIZE --batch_sizes $LARGE --steps 21 \
                --name $SIZE-cuda-batch-$LARGE --levers plain cache --versus $loop"
            step jax 150 bash -c "benchmark --size $SIZE --batch_sizes $BATCH --steps 21 --name $SIZE-cuda-jax \
                --levers plain cache --script train_text_to_image_flax.py"
            wait
            for size in $PRIOR $DECODER; do
                step "$size" 90 bash -c "benchmark --size $size --batch_sizes ${KANDINSKY_BATCH:-32} --steps 21 \
                    --name $size-cuda --levers plain cache"
            done
            ;;
        memory)
            [ -d "$WORK/models-$SIZE" ] || models "$SIZE"
            step memory 120 "$PYTHON" tests/benchmarks/memory.py --size "$SIZE" --work_dir "$WORK"
            ;;
        *)
            echo "$name: no such part; there are checks, speed and memory" >&2
            exit 2
            ;;
        esac
    done
done
cat "$OUT/steps.txt"
