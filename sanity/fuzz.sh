#!/usr/bin/env bash
# Runs every fuzz test of the module for the given time (10s unless told). With -list it names them,
# "folder FuzzName" a line, and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

list() {
	grep -rHoE --exclude-dir=build --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . |
		sed -E 's#^(.*)/[^/]*:func (Fuzz.*)$#\1 \2#' | sort
}

if [ "${1-}" = -list ]; then
	list
	exit
fi
# fuzz FOLDER NAME TIME runs one. Go 1.26 may report "context deadline exceeded" for a run that
# merely used up its time (go.dev/issue/75804); a failure writes the input that it failed on.
fuzz() {
	local log
	log=$(mktemp)
	if go test "$1" -run '^$' -fuzz "^$2\$" -fuzztime "$3" 2>&1 | tee "$log"; then
		rm "$log"
	elif grep -q '^ *context deadline exceeded$' "$log" && ! grep -qE 'Failing input|panic:|fuzzing process' "$log"; then
		rm "$log"
		echo "$2 used up its time and found nothing"
	else
		rm "$log"
		return 1
	fi
}

tests=$(list)
[ -n "$tests" ] || { echo "no fuzz test found" >&2; exit 1; }
while read -r folder name; do
	echo "$name in $folder"
	fuzz "$folder" "$name" "${1:-10s}"
done <<<"$tests"
