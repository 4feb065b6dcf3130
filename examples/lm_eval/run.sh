#!/usr/bin/env bash
# Accuracy of a served model, ungated and gated, with the lm-evaluation-harness and a task made from local text.
#
#   examples/lm_eval/run.sh MODEL PROFILE THRESHOLD...
#
# VLLM and LM_EVAL name the two programs (default: vllm, lm_eval); PORT the server's port. lm_eval may live in an
# environment of its own: it only talks to the server.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 profile=$2
shift 2
port=${PORT:-8199}
folder=$(mktemp -d)
server=
trap 'test -z "$server" || { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; }; rm -rf "$folder"' EXIT

"$(dirname "$(command -v "${VLLM:-vllm}")")/python" "$here/task.py" "$here/../tiny_mixtral/heldout" "$folder/task"

measure() { # name, further arguments of vllm serve
    local name=$1
    shift
    "${VLLM:-vllm}" serve "$model" --served-model-name served --port "$port" --max-model-len 1024 \
        --kv-cache-memory-bytes 268435456 --enforce-eager --moe-method adapmoe "$@" >"$folder/$name.log" 2>&1 &
    server=$!
    until curl --silent --fail "http://127.0.0.1:$port/health"; do
        kill -0 "$server" 2>/dev/null || { cat "$folder/$name.log" >&2; exit 1; }
        sleep 1
    done
    echo "== $name"
    HF_DATASETS_OFFLINE=1 HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" "${LM_EVAL:-lm_eval}" \
        --model local-completions --tasks continuation --include_path "$folder/task" --batch_size 8 \
        --model_args "model=served,base_url=http://127.0.0.1:$port/v1/completions,tokenizer=$model,tokenizer_backend=huggingface,num_concurrent=4" \
        2>"$folder/$name.err" | grep '|' || { cat "$folder/$name.err" >&2; exit 1; }
    curl --silent "http://127.0.0.1:$port/metrics" | awk '
        /^vllm:adapmoe_gated_tokens_total/ { tokens = $2 } /^vllm:adapmoe_kept_experts_total/ { kept = $2 }
        END { if (tokens) printf "experts per token: %.3f\n", kept / tokens }'
    kill "$server"
    wait "$server" 2>/dev/null || true
    server=
}

measure ungated
for threshold in "$@"; do
    measure "threshold-$threshold" --adapmoe-config.profile "$profile" --adapmoe-config.gating.mode token \
        --adapmoe-config.gating.threshold "$threshold"
done
