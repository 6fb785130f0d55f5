#!/bin/sh
# Installs the wheel of dist/ into a new environment, with the versions of uv.lock, and analyses the
# sample library outside the checkout: one of its 14 files holds no audio; its cells alone are missing.
# Usage: tests/installed_wheel.sh PYTHON ENVIRONMENT
set -eu
uv="$PWD/.venv/bin/uv"
"$uv" venv --quiet --clear --python "$1" "$2"
"$uv" export --frozen --quiet --no-dev --no-hashes --no-emit-project -o "$2/versions.txt" >/dev/null
"$uv" pip install --quiet --python "$2" --constraints "$2/versions.txt" dist/*.whl
unset PYTHONPATH
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"
export DAGSTER_HOME="$directory/home"
"$2/bin/audio-assets" analyze || [ $? = 3 ] # done, and some files failed
"$2/bin/audio-assets" query --csv "
    SELECT count(DISTINCT file_key), (SELECT count(*) FROM features.tracks), count(*)
    FROM features.missing" | tail -n 1 | grep -x '1,14,9'
