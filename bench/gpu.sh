#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command of less than 9 minutes, from a clone and
# without installing anything:   bash bench/gpu.sh OUTDIR     (PY=... names another python)
#
# OUTDIR gets results.jsonl (the JSON lines of all benchmarks), roofline.png and gpu.log: few files
# on purpose. Steps come in the order of what would be missed most. Each has a time limit, none
# begins after the end of the whole, one that fails or is cut off loses neither the others nor what
# it had printed. The exit code is the number of steps that failed.
#
#   step       at most  what it tells
#   limits        20 s  bandwidth and matrix rate of the device, to compare with
#   kernels       90 s  correctness: every kernel of the decode step against its twin, rows with the
#                       same bits, graphs that replay without copies
#   8b            90 s  llama-3.1-8b: decode and prefill in bf16, int4, int8, fp8
#   1b            45 s  llama-3.2-1b
#   flat          45 s  linears of 8B for 1, 2, 4, 8 and 16 rows
#   context       45 s  llama-3.1-8b behind 512 to 32768 tokens, cache in bf16 and int8; its kernels
#   int4          25 s  the kernels of a step of llama-3.1-8b in int4
#   7b            35 s  llama-2-7b
#   speculation   55 s  the storyteller grown to llama-3.2-1b, with its draft grown to 60m, beside plain decoding
#   startup       40 s  llama-3.2-1b: process start to first token, eager, compiled cold and warm
#   engine        35 s  correctness: families, engines, caches, experts against the CPU
#   roofline      10 s  the plot
#   sum          535 s  and none begins later than 520 s after the first
# Apart from it, because growing 16 GB takes a minute or two:
#   python bench/speculation.py --target llama-3.1-8b --draft 160m --device cuda --compile
# and because ranks that share a GPU start and compile for a minute:
#   python -m pytest -q -m gpu tests/test_gpu.py -k rank -rPs
# and, where there are several GPUs:
#   python bench/parallel.py --shape llama-3.1-8b --ranks 1,2,4,8 --device cuda --compile
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUTDIR}
PY=${PY:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
end=530
mkdir -p "$out"
: >"$out/results.jsonl"
failed=0

# step NAME SECONDS COMMAND...: all output to gpu.log, the end of it here; lines that are JSON
# objects to results.jsonl.
step() {
    local name=$1 seconds=$2 left=$((end - SECONDS)) work start=$SECONDS code
    shift 2
    if ((left < 10)); then
        echo "== $name: SKIPPED, $SECONDS s are over"
        failed=$((failed + 1))
        return
    fi
    if ((seconds > left)); then seconds=$left; fi
    work=$(mktemp -d)
    echo "== $name (at most $seconds s): $*"
    timeout --kill-after=5 "$seconds" "$@" >"$work/out" 2>"$work/err"
    code=$?
    if ((code == 0)); then
        echo "== $name: done in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED with $code after $((SECONDS - start)) s"
        failed=$((failed + 1))
        tail -n 15 "$work/err" | cut -c1-300
    fi
    grep -v '^{' "$work/out" | tail -n 14 | cut -c1-200
    grep '^{' "$work/out" >>"$out/results.jsonl"
    { echo "== $name: $*"; cat "$work/out" "$work/err"; } >>"$out/gpu.log"
    rm -r "$work"
}

table() { # table NAME SECONDS SHAPE OPTIONS...
    local name=$1 seconds=$2 shape=$3
    shift 3
    step "$name" "$seconds" "$PY" bench/tables.py --shapes "$shape" --formats bf16,int4,int8,fp8 \
        --device cuda --compile --rounds 3 "$@"
}

own='attention or heads or linears or block or bits or replay'
context="bench/context.py --shape llama-3.1-8b --device cuda --compile --rounds 2 --profile"
if "$PY" -c "import xdist" 2>/dev/null; then workers="-n 6"; else workers=""; fi
tests="-m pytest -q -m gpu $workers tests/test_gpu.py"
step limits 20 "$PY" bench/roofline.py --measure --device cuda
step kernels 90 "$PY" $tests -k "$own"
table 8b 90 llama-3.1-8b
table 1b 45 llama-3.2-1b
step flat 45 "$PY" bench/kernels.py --device cuda --rows 1,2,4,8,16 --rounds 3 \
    --formats torch,bf16,fp8,int8,int4-g32,int4-g128
step context 45 "$PY" $context
step int4 25 "$PY" $context --quant int4 --contexts 512 --caches auto
table 7b 35 llama-2-7b
step speculation 55 "$PY" bench/speculation.py --target llama-3.2-1b --draft 60m --device cuda --compile \
    --rounds 2 --prompts 2 --works stories,sampled --work-dir "$(mktemp -d)" --out /dev/null
step startup 40 "$PY" bench/startup.py --shape llama-3.2-1b --dtype bf16 --device cuda --rounds 1
step engine 35 "$PY" $tests -k "not ($own or rank)"
step roofline 10 "$PY" bench/roofline.py "$out/results.jsonl" --out "$out/roofline.png"
echo "== $failed steps failed; $SECONDS s"
exit "$failed"
