#!/bin/bash
# small_shm.sh MPI_EXCHANGE - with a /dev/shm of 1 MB the exchange refuses to start with a sentence, on one rank, and leaves nothing.
# Needs root to mount one in a namespace of its own; exits 77 where that is not possible.
set -u
program=$1
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${SMALL_SHM_INSIDE:-}" ]; then
    unshare --mount true 2>/dev/null || { echo "small_shm.sh: skipped: mount namespaces cannot be made here"; exit 77; }
    SMALL_SHM_INSIDE=1 exec unshare --mount "$0" "$@"
fi
mount --make-rprivate / && mount -t tmpfs -o size=1m none /dev/shm || { echo "small_shm.sh: skipped: cannot mount"; exit 77; }
out=$(mktemp)
trap 'rm -f "$out"' EXIT
# MPI's own shared memory goes elsewhere: it would not fit either.
OMPI_MCA_btl_vader_backing_directory=$(dirname "$out") "$here/run_mpi.sh" 2 "$program" roomy 0 >"$out" 2>&1
rc=$?
[ $rc = 1 ] || { echo "exit code $rc instead of 1" >&2; cat "$out" >&2; exit 1; }
[ "$(grep -c '/dev/shm has .* MB free, rank [01] needs .* MB more (No space left on device): enlarge it or lower --max-rows' "$out")" = 1 ] ||
    { echo "not exactly one sentence about /dev/shm" >&2; cat "$out" >&2; exit 1; }
[ -z "$(ls /dev/shm)" ] || { ls -l /dev/shm >&2; exit 1; }
echo ok
