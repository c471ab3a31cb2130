# SPDX-License-Identifier: Apache-2.0
# install.sh: what test.sh and reproduce.sh share: Debian packages and a Python environment.
# Sourced, not run; expects the current directory to be the project's root.

# Installs those of the named Debian packages that are missing: as root, through sudo, or not at all
# with a line that says what to install.
need_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q '^install ok installed$' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local run=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            echo "Please install these packages and run this again: apt-get install ${missing[*]}" >&2
            exit 1
        fi
        run=(sudo)
    fi
    echo "Installing Debian packages: ${missing[*]}"
    "${run[@]}" apt-get update -qq
    "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${missing[@]}" >/dev/null
}

# A virtual environment, build/venv or the second argument, that holds exactly what a requirements file
# pins, and those that it names by -r.
need_python() {
    local requirements=$1 folder=${2:-build/venv} pins
    pins=$(cd "$(dirname "$requirements")" && awk '/^-r /{f = $2; while ((getline line < f) > 0) print line; next} 1' \
        "$(basename "$requirements")")
    [ "$pins" = "$(cat "$folder"/installed.txt 2>/dev/null)" ] && return
    echo "Installing Python packages into $folder: ${pins//$'\n'/ }"
    python3 -m venv --clear "$folder" &&
        "$folder"/bin/pip install --quiet --disable-pip-version-check -r "$requirements" &&
        echo "$pins" >"$folder"/installed.txt
}

compiler_packages=(gcc libc6-dev cmake ninja-build pkg-config libjansson-dev libssl-dev libcairo2-dev libpcre2-dev fonts-dejavu-core)
python_packages=(python3 python3-dev python3-venv)
emulator_packages=(bochs bochs-term binutils) # bochs-term: the least of the displays that bochs asks for
