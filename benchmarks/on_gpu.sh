#!/usr/bin/env bash
# What is to be known of this checkout on a machine with a GPU and no network; see on_gpu.py.
#   bash benchmarks/on_gpu.sh OUT [--only PART,..] [--budget SECONDS]
#   bash benchmarks/on_gpu.sh --wheels | --adopt OUT [--commit COMMIT]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=${OPRD_WHEELS:-$root/.whl}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -d /usr/local/cuda/bin ]; then export PATH="$PATH:/usr/local/cuda/bin"; fi
# The wheels are for the machine with the GPU.
if [[ " $* " != *" --adopt "* && " $* " != *" --wheels "* ]] && compgen -G "$wheels/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
    "$wheels"/*.whl
  export PYTHONPATH="$root:$site:${PYTHONPATH#"$root"}"
fi
python3 -m benchmarks.on_gpu "$@"
