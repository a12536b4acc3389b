#!/bin/sh
# install-packages.sh [build|test] - installs the Debian packages that building (or also testing) needs, and only those that are
# missing: with all of them there it asks nobody, so it works offline. As root, or with sudo.
set -eu
build="gcc libc6-dev cmake ninja-build pkg-config openmpi-bin libopenmpi-dev libcjson-dev libcmocka-dev \
libgrpc-dev libprotobuf-c-dev protobuf-c-compiler protobuf-compiler libpcre2-dev libutf8proc-dev libsqlite3-dev libmicrohttpd-dev \
libglpk-dev libyaml-dev libzip-dev"
# clang: the fuzzers; iproute2: two hosts on one machine; libsimde-dev: AVX-512 kernels on machines without it.
test="clang libclang-rt-dev iproute2 libsimde-dev openssl python3-grpcio python3-numpy python3-protobuf python3-venv python3-yaml"

case ${1:-build} in
build) wanted=$build ;;
test) wanted="$build $test" ;;
*)
    echo "usage: install-packages.sh [build|test]" >&2
    exit 2
    ;;
esac
if ! command -v dpkg-query >/dev/null; then
    echo "packages: this is not Debian; cmake will name what is missing. In Debian they are called: $wanted"
    exit 0
fi
missing=
for package in $wanted; do
    [ "$(dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | head -n 1)" = installed ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "packages: all there"
    exit 0
fi
if [ "$(id -u)" -eq 0 ]; then
    sudo=
elif command -v sudo >/dev/null; then
    sudo=sudo
else
    echo "packages: not root and no sudo; please install:$missing" >&2
    exit 1
fi
echo "packages: installing$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# env: sudo passes no variables on. A package list may be older than the archive, so a failure refreshes it once.
install() {
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >"$log" 2>&1 </dev/null
}
install || { $sudo apt-get update -qq >"$log" 2>&1 </dev/null && install; } || {
    tail -n 20 "$log" >&2
    echo "packages: apt-get could not install them" >&2
    exit 1
}
