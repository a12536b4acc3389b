#!/bin/sh
# mpirun.sh MPIRUN-ARGUMENTS... - Open MPI's mpirun with what one machine needs, and nothing where it is not needed:
#   as root            says that this is meant
#   ranks > cores      allows it, and lets a waiting rank give its core away (8 ms against 10 us for a barrier of 4 ranks on 2 cores)
#   binding            none: a rank has several threads, and Open MPI would put all of them on one core
# Whatever the environment or the arguments already say stays.
set -eu
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
# Copies between processes are forbidden in many containers; shared memory is used instead, and nobody needs to be told.
export OMPI_MCA_btl_vader_warn_missing_cma="${OMPI_MCA_btl_vader_warn_missing_cma:-0}"

ranks=1
previous=''
elsewhere=''
for argument in "$@"; do
    case $previous in
    -np | -n | --np | --n) ranks=$argument ;;
    esac
    case $argument in
    -hostfile | --hostfile | -machinefile | --machinefile | -host | --host | -H) elsewhere=yes ;;
    esac
    previous=$argument
done
cores=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
usable=$(nproc)
[ "$cores" -ge 1 ] && [ "$cores" -le "$usable" ] || cores=$usable
case $ranks in
*[!0-9]*) ranks=1 ;; # mpirun itself will say what is wrong
esac
if [ -z "$elsewhere" ] && [ -z "${SLURM_JOB_ID:-}" ] && [ "$ranks" -gt "$cores" ]; then
    export OMPI_MCA_rmaps_base_oversubscribe="${OMPI_MCA_rmaps_base_oversubscribe:-1}"
    export OMPI_MCA_mpi_yield_when_idle="${OMPI_MCA_mpi_yield_when_idle:-1}"
fi
exec mpirun "$@"
