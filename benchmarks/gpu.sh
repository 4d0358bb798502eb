#!/usr/bin/env bash
# Everything that needs a GPU, in one command on one machine without a network: tests, step, caching, demo, two processes.
#
#   make gpu                                   # on a machine with a GPU; results in benchmarks/results/*-<device>.md
#   bash benchmarks/gpu.sh --rehearse          # the same parts with tiny sizes on a CPU; writes no results
#   PYTHON=python3 bash benchmarks/gpu.sh cache # one part: tests, step-qwen3, ..., cache, demo or two
#
# Each part has 120 seconds (PART_SECONDS) and is reported by itself; one that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD PYTHONUNBUFFERED=1
rehearse=0
[ "${1:-}" = --rehearse ] && { rehearse=1; shift; }
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests step-qwen3 step-llama1b step-gemma3 cache demo two)
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT

if [ $rehearse = 1 ]; then
    export FIRST_TRL_REHEARSE=1
    step=(--quick --runs 1 --supervision all --tokens 16 --layers 1)
    cache=(--rehearse)
    demo=(--sft.max_steps 20 --distill.max_steps 20 --evaluate.bootstrap 50)
    two=--rehearse
else
    "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no GPU: use --rehearse"' || exit 1
    step=(--device cuda --rows 8 --tokens 1024 --runs 3 --layers 16 --supervision all)  # 8,184 supervised tokens
    cache=()
    # bf16 on a GPU that has it, as the recipes for the Hub's models do
    demo=(--sft.dtype bfloat16 --sft.bf16 true --distill.dtype bfloat16 --distill.bf16 true)
    two=
fi

failed=0
for part in "${parts[@]}"; do
    case $part in
        tests) command=("$PYTHON" -m pytest -q -m gpu tests) ;;
        step-*) command=("$PYTHON" benchmarks/step.py --shapes "${part#step-}" "${step[@]}") ;;
        cache) command=("$PYTHON" benchmarks/gpu.py cache "${cache[@]}") ;;
        demo) command=("$PYTHON" -m first_trl demo --output_dir "$runs/demo" "${demo[@]}") ;;
        two) command=("$PYTHON" benchmarks/gpu.py two $two) ;;
        *) echo "unknown part $part: tests, step-SHAPE, cache, demo or two" >&2; exit 2 ;;
    esac
    echo "== $part: ${command[*]}"
    started=$SECONDS
    timeout "${PART_SECONDS:-120}" "${command[@]}"
    status=$?
    echo "== $part: exit status $status after $((SECONDS - started)) s"
    [ $status = 0 ] || failed=1
done
exit $failed
