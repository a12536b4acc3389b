#!/bin/sh
# python_env.sh FOLDER PACKAGE==VERSION... -- SCRIPT ARGUMENT... - runs a Python script in a virtual environment of its own with these
# packages from PyPI. The environment is made once and used again until the list of packages changes.
set -eu
folder=$1
shift
packages=
while [ "$1" != -- ]; do
    packages="$packages $1"
    shift
done
shift
mkdir -p "$folder"
exec 9>"$folder/lock" # two tests that start together make it once
flock 9
if [ "$(cat "$folder/packages" 2>/dev/null)" != "$packages" ]; then
    rm -rf "$folder/env"
    python3 -m venv "$folder/env"
    # shellcheck disable=SC2086
    "$folder/env/bin/pip" install --quiet --disable-pip-version-check $packages
    echo "$packages" >"$folder/packages"
fi
flock -u 9
exec "$folder/env/bin/python" "$@"
