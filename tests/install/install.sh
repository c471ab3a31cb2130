#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# install.sh ROOT BUILD VERSION CMAKE CC CXX: installs BUILD into a new folder; what is there, which names
# the libraries have, and programs in C and C++ that use them, shared and static, by CMake and by pkg-config.
set -euo pipefail

root=$1 build=$2 version=$3 cmake=$4 cc=$5 cxx=$6
here=$root/tests/install
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
complain() {
    echo "$*"
    failed=1
}
fine() { # COMMAND...: a program of use.c or use.cc
    local said
    said=$("$@" 2>&1) && [ "$said" = fine ] || complain "$*: $said"
}

"$cmake" --install "$build" --prefix "$work/first" >"$work/log"
mv "$work/first" "$work/moved" # what is installed does not know where
prefix=$work/moved
library=$(dirname "$(find "$prefix" -name libsparge.so)") # lib, lib64 or lib/x86_64-linux-gnu

for file in include/sparge.h share/doc/sparge/LICENSE share/man/man1/sparge.1 bin/sparge; do
    [ -s "$prefix/$file" ] || complain "$file is not installed"
done
for header in "$root"/sparge*.h; do
    cmp -s "$header" "$prefix/include/$(basename "$header")" || complain "$header is not installed"
done
[ "$("$prefix/bin/sparge" --version | grep -o '[0-9.]*[0-9]' | head -n 1)" = "$version" ] ||
    complain "sparge --version does not say $version"

# ---- Names ----

# names FILE OPTION...: those that the file defines for others
names() { nm -P --defined-only "${@:2}" "$1" | awk 'NF > 2 { print $1 }' | sort; }
# declared HEADER...: the functions of headers, without comments, inline ones and pointers
declared() {
    "$cc" -E -P -I"$root" "$@" | tr '\n' ' ' | sed 's/static inline [^}]*}//g' | grep -oE '\bsparge_[a-z0-9_]+ ?\([^*]' | sed 's/ *(.*//' | sort -u
}
same() { # WHAT WANTED GOT
    diff <(echo "$2") <(echo "$3") >"$work/diff" || complain "$1: < declared, > there: $(cat "$work/diff")"
}
public=$(declared "$root"/sparge*.h)
[ "$(wc -l <<<"$public")" -gt 10 ] || complain "too few functions are declared: $public"
same libsparge.so "$public" "$(names "$library/libsparge.so" -D)"
same libsparge.a "$public" "$(names "$library/libsparge.a" -g)"
same libsparge_params.a sparge_params_load "$(names "$library/libsparge_params.a" -g)"
objdump -p "$library/libsparge.so" | grep -q "SONAME  *libsparge.so.${version%.*}$" ||
    complain "libsparge.so has no SONAME of version ${version%.*}"

# ---- Programs ----

"$cmake" -S "$here/project" -B "$work/project" -DCMAKE_PREFIX_PATH="$prefix" -DVERSION="$version" \
    -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" >"$work/log" || { cat "$work/log"; exit 1; }
"$cmake" --build "$work/project" >"$work/log" || { cat "$work/log"; exit 1; }
for program in sparge_c sparge_cc sparge_static_c sparge_static_cc; do
    fine "$work/project/$program"
done

export PKG_CONFIG_PATH=$library/pkgconfig
[ "$(pkg-config --modversion sparge)" = "$version" ] || complain "sparge.pc is of another version"
for language in c cc; do
    compiler=$cc
    [ $language = c ] || compiler=$cxx
    use=("$here/use.$language" "-DVERSION=\"$version\"" -o "$work/use")
    # shellcheck disable=SC2046 # words on purpose
    "$compiler" "${use[@]}" $(pkg-config --cflags --libs sparge)
    fine env LD_LIBRARY_PATH="$library" "$work/use"
    "$compiler" "${use[@]}" $(pkg-config --static --cflags --libs sparge | sed 's/-lsparge/-l:libsparge.a/')
    fine "$work/use" # without the folder of libsparge.so
done

# ---- The manual page has every command and every exit status of --help ----

help=$("$prefix/bin/sparge" --help)
page=$(cat "$prefix/share/man/man1/sparge.1")
while read -r _ command _; do
    grep -q "^\.B $command$" <<<"$page" || complain "the manual page lacks the command $command"
done < <(grep '^  sparge ' <<<"$help")
[ "$(grep -c '^  sparge ' <<<"$help")" -gt 5 ] || complain "--help lists no commands: $help"
for status in $(tr '\n' ' ' <<<"${help#*Exit status:}" | grep -oE '\b[0-9] ' | sort -u); do
    grep -q "^\.B $status$" <<<"$page" || complain "the manual page lacks exit status $status"
done
grep -q "sparge $version" <<<"$page" || complain "the manual page is of another version"
exit $failed
