#!/usr/bin/env bash
# Runs every fuzz test of the module for the given time (10s). With -list it names them,
# "folder FuzzName" a line, and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

list() {
	grep -rHoE --include='*_test.go' '^func Fuzz[A-Za-z0-9_]*' . |
		sed -E 's#^(.*)/[^/]*:func (Fuzz.*)$#\1 \2#' | sort
}

if [ "${1-}" = -list ]; then
	list
	exit
fi
tests=$(list)
[ -n "$tests" ] || { echo "no fuzz test found" >&2; exit 1; }
while read -r folder name; do
	echo "$name in $folder"
	go test "$folder" -run '^$' -fuzz "^$name\$" -fuzztime "${1:-10s}"
done <<<"$tests"
