#!/bin/sh
# run_mpi.sh RANKS PROGRAM ARGS... - a program under mpirun on this machine, as all tests start it: ranks may outnumber cores, waiting
# gives the core away, root is allowed, and nothing outlives the time limit (CONVOKE_MPI_SECONDS, 300).
set -eu
ranks=$1
shift
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Open MPI leaks by itself, in modules that are unloaded before a suppression could name them.
export ASAN_OPTIONS="detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
exec timeout -k 5 "${CONVOKE_MPI_SECONDS:-300}" mpirun -np "$ranks" --oversubscribe --bind-to none \
    --mca mpi_yield_when_idle 1 --mca pml ob1 --mca btl self,vader,tcp --mca btl_vader_warn_missing_cma 0 "$@"
