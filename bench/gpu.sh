#!/usr/bin/env bash
# Everything that needs a CUDA device, in one command of less than 9 minutes, from a clone and
# without installing anything:   bash bench/gpu.sh OUTDIR     (PY=... names another python)
# OUTDIR gets a JSON file for each benchmark and gpu.log, few files on purpose. Each step has its own
# time limit; one that fails does not stop the next.
# The exit code is the number of steps that failed.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bench/gpu.sh OUTDIR}
PY=${PY:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=0

# step NAME SECONDS COMMAND...: all output to gpu.log; where its last line is JSON, to NAME.json.
step() {
    local name=$1 seconds=$2 work start=$SECONDS
    shift 2
    work=$(mktemp -d)
    echo "== $name (at most $seconds s): $*"
    if timeout --kill-after=5 "$seconds" "$@" >"$work/out" 2>"$work/err"; then
        echo "== $name: done in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED with $? after $((SECONDS - start)) s"
        failed=$((failed + 1))
        tail -n 15 "$work/err"
    fi
    tail -n 12 "$work/out" | cut -c1-300
    if tail -n 1 "$work/out" | grep -q '^{'; then tail -n 1 "$work/out" >"$out/$name.json"; fi
    { echo "== $name: $*"; cat "$work/out" "$work/err"; } >>"$out/gpu.log"
    rm -r "$work"
}

decode() { # decode NAME SECONDS SHAPE OPTIONS...
    local name=$1 seconds=$2 shape=$3
    shift 3
    step "$name" "$seconds" "$PY" bench/decode.py --shape "$shape" --dtype bf16 --device cuda "$@"
}

step device 30 "$PY" -c "import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))"
decode 1b-eager 30 llama-3.2-1b --rounds 3
decode 1b-compile 65 llama-3.2-1b --compile
decode 1b-int4-compile 45 llama-3.2-1b --compile --quant int4 --rounds 3
decode 8b-compile 85 llama-3.1-8b --compile
decode experts-compile 60 qwen3-30b-a3b --num-layers 16 --compile --rounds 3
step tests 140 "$PY" -m pytest -q -m gpu
step startup 80 "$PY" bench/startup.py --shape llama-3.2-1b --dtype bf16 --device cuda --rounds 1
echo "== $failed steps failed"
exit "$failed"
