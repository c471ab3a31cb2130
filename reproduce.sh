#!/usr/bin/env bash
# reproduce.sh: installs what is missing, builds the program, runs SpargeAttn on the committed capture of
# a real model, tunes its thresholds, prints both tables and draws the attention-map figure into paper_figs/.
#   ./reproduce.sh         a few minutes on two cores
set -euo pipefail
cd "$(dirname "$0")"
. .ci/install.sh

case "${1:-}" in
-h | --help) sed -n '2,4s/^# //p' "$0"; exit ;;
"") ;;
*) echo "reproduce.sh: unknown argument '$1', see ./reproduce.sh --help" >&2; exit 2 ;;
esac

need_packages "${compiler_packages[@]}" "${python_packages[@]}"
need_python experiments/requirements.txt

cmake --preset release >/dev/null
cmake --build --preset release
build/venv/bin/python experiments/attention_map/run.py --sparge build/release/tools/sparge
build/venv/bin/python experiments/tune/run.py --sparge build/release/tools/sparge
build/venv/bin/python paper_figs/attention_map.py
