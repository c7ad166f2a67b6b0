#!/usr/bin/env bash
# Try everything that only a GPU can show, and write one page of what came out: the first thing to run on a new machine.
#
#     scripts/gpu_acceptance.sh [DEST]        page, logs and files; default: gpu-acceptance
#
# Takes some minutes after the build. It goes on after a failure and says at the end what failed (exit code 1).
# PYTHON=... chooses the interpreter; DEVICE=cpu tries the script itself, on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
DEST=$(realpath -m "${1:-gpu-acceptance}")
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$DEST" && touch "$DEST/page.md" || { echo "error: $DEST is not a writable folder; choose another" >&2; exit 2; }
command -v "$PYTHON" >/dev/null || { echo "error: PYTHON is $PYTHON, which is not there; expected an interpreter" >&2; exit 2; }
PAGE=$DEST/page.md
failed=()

# step NAME COMMAND...: run it into a log of its own; the page gets its last lines, time and exit code.
step() {
    local name=$1 log began code
    shift
    log=$DEST/${name// /-}.log
    began=$(date +%s)
    echo "== $name"
    "$@" >"$log" 2>&1
    code=$?
    {
        printf '\n## %s: %s, %d s\n\n' "$name" "$([ $code = 0 ] && echo passed || echo "FAILED (exit code $code)")" \
            $(($(date +%s) - began))
        printf '    %s\n' "$*"
        echo '```'
        tail -n "${LINES_SHOWN:-12}" "$log" | cut -c1-400
        echo '```'
    } >>"$PAGE"
    [ $code = 0 ] || failed+=("$name")
}

machine() {
    date -u
    git rev-parse HEAD
    git status --short | head
    uname -srm
    "$PYTHON" -m torch.utils.collect_env | grep -E '^(PyTorch|CUDA|GPU|Nvidia|cuDNN|Python version|GCC|CPU)' | head -30
    nvidia-smi || [ "$DEVICE" = cpu ]
}

# Operators on the device against the reference on the CPU, first and second derivatives, in float32, both layouts.
self_check() {
    "$PYTHON" - "$DEVICE" <<'END'
import sys

import torch

from torch_utils.ops.compiled import describe, failure_of, first_difference

kind = sys.argv[1]
difference = failure_of(kind) or first_difference(torch.device(kind))
print("operators:", describe(kind))
print("all equal to the reference" if difference is None else difference)
sys.exit(difference is not None)
END
}

printf '# Acceptance on %s\n\nSend this page back; the logs beside it where something failed.\n' "$DEVICE" >"$PAGE"

LINES_SHOWN=60 step machine machine
step "build cpu" "$PYTHON" -m torch_utils.ops.build --kind=cpu
[ "$DEVICE" = cpu ] || step "build cuda" "$PYTHON" -m torch_utils.ops.build --kind=cuda
step "self check" self_check
MARK=$([ "$DEVICE" = cpu ] && echo "not slow" || echo cuda)
step "case table" "$PYTHON" -m pytest -q -m "$MARK" tests/torch_utils/ops/test_upfirdn2d.py tests/torch_utils/ops/test_bias_act.py \
    tests/torch_utils/ops/test_conv2d_resample.py

step "data set" "$PYTHON" dataset_tool.py phantom --dest="$DEST/phantom.zip" --count=200 --resolution=32x32
train() { # train FOLDER FLAGS...
    local folder=$1
    shift
    "$PYTHON" train.py --outdir="$DEST/$folder" --data="$DEST/phantom.zip" --cfg=tiny --cond=1 --mirror=1 --snap=1 \
        --metrics=none --device="$DEVICE" "$@"
}
step "training float32" train fp32 --precision=fp32 --kimg=1
step "training continued" train fp32 --precision=fp32 --kimg=2
if [ "$DEVICE" != cpu ]; then
    step "training float16" train fp16 --precision=fp16 --kimg=2
    step "training bfloat16" train bf16 --precision=bf16 --kimg=2
    step "training channels last" train nhwc --precision=fp16 --nhwc=1 --kimg=1
    GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    [ "$GPUS" -lt 2 ] || step "training on 2 GPUs" train gpus2 --gpus=2 --kimg=1
fi
NETWORK=$(ls "$DEST"/fp32/*/network-snapshot-*.safetensors 2>/dev/null | tail -n 1)
step "generate" "$PYTHON" generate.py --network="$NETWORK" --seeds=0-7 --outdir="$DEST/images" --class=melanoma \
    --device="$DEVICE"
step "metrics" "$PYTHON" calc_metrics.py --network="$NETWORK" --data="$DEST/phantom.zip" --metrics=kid1k_full,pr1k3_full \
    --detector=random-conv --device="$DEVICE"
step "project" "$PYTHON" projector.py --network="$NETWORK" --target="$DEST/images/seed0000.png" --class=melanoma \
    --outdir="$DEST/projected" --num-steps=50 --detector=random-conv --save-video=0 --device="$DEVICE"

LINES_SHOWN=80 step "speed of operators" "$PYTHON" -m tests.bench.bench_ops --device="$DEVICE" \
    $([ "$DEVICE" = cpu ] && echo --quick)
[ "$DEVICE" = cpu ] || LINES_SHOWN=40 step "speed of training" "$PYTHON" -m tests.bench.bench_train --device="$DEVICE"

if [ ${#failed[@]} = 0 ]; then
    printf '\nEverything passed.\n' >>"$PAGE"
else
    printf '\nFailed: %s\n' "$(printf '%s, ' "${failed[@]}" | sed 's/, $//')" >>"$PAGE"
fi
tail -n 1 "$PAGE"
echo "$PAGE"
[ ${#failed[@]} = 0 ]
