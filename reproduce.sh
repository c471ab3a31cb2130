#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# reproduce.sh: installs what is missing, builds, and regenerates the tables and figures of the paper beside its numbers:
# experiments/*/out.csv, paper_figs/, and paper_figs/report.html, which shows all of it.
#   ./reproduce.sh                        some rows of each, compared with the committed ones: minutes on two cores
#   ./reproduce.sh --full                 all rows, which replace them: hours; interrupted, the same command goes on
#   ./reproduce.sh --only table3,fig10    these alone
#   ./reproduce.sh --list                 what there is
set -euo pipefail
cd "$(dirname "$0")"
. .ci/install.sh

# The list, and what is wrong with the options, take Python alone.
command -v python3 >/dev/null || need_packages python3
for word in "$@"; do
    case "$word" in
    -h | --help) sed -n '3,8s/^# //p' "$0"; exit ;;
    --list) exec python3 experiments/reproduce.py "$@" ;;
    esac
done
python3 experiments/reproduce.py --list "$@" >/dev/null

need_packages "${compiler_packages[@]}" "${python_packages[@]}"
python=build/venv
need_python experiments/requirements.txt
if [[ " $* " == *" --full "* ]]; then
    python=build/full-venv # has torch as well
    need_python experiments/requirements-full.txt "$python"
fi

cmake --preset release -DSPARGE_PYTHON=ON -DPython_EXECUTABLE="$PWD/build/venv/bin/python" >/dev/null
cmake --build --preset release
exec "$python"/bin/python experiments/reproduce.py "$@"
