#!/bin/bash
# two_hosts.sh RANKS_PER_HOST PROGRAM ARGS... - a program under mpirun over two "hosts" on this machine.
#
# Two network namespaces joined by a bridge, each with a host name of its own, which is what makes Open MPI see two machines and
# speak TCP between them; ranks of one host share memory as usual. Everything lives in a mount and network namespace of this run,
# which vanishes with its last process: nothing can be left behind, and two runs do not meet.
#
#   TWO_HOSTS_RATE=1gbit       limits the link both ways (tc tbf)
#   CONVOKE_MPI_SECONDS=300    time limit
#   TWO_HOSTS_ALONE=1          the program alone, on the first host: it starts mpirun itself, with $TWO_HOSTS_HOSTFILE and
#                              $TWO_HOSTS_MPIRUN_ARGS
# Needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN; exits 77 with the reason where that is missing. CONVOKE_REQUIRE_TWO_HOSTS=1 turns that
# into a failure on machines where the capability is there.
set -u

has_capability() # bit
{
    local bits
    bits=$(awk '/^CapEff/ {print $2}' /proc/self/status)
    ((0x$bits >> $1 & 1))
}

give_up()
{
    echo "two_hosts.sh: skipped: $*"
    if [ "${CONVOKE_REQUIRE_TWO_HOSTS:-0}" = 1 ] && has_capability 12; then
        echo "two_hosts.sh: CONVOKE_REQUIRE_TWO_HOSTS=1 and CAP_NET_ADMIN is there: a skip is a failure" >&2
        exit 1
    fi
    exit 77
}

# ---- outside: enter namespaces of our own ----
if [ -z "${TWO_HOSTS_INSIDE:-}" ]; then
    [ $# -ge 2 ] || { echo "usage: two_hosts.sh RANKS_PER_HOST PROGRAM ARGS..." >&2; exit 2; }
    for tool in ip unshare mpirun; do
        command -v $tool >/dev/null || give_up "$tool is not installed"
    done
    has_capability 12 || give_up "no CAP_NET_ADMIN"
    has_capability 21 || give_up "no CAP_SYS_ADMIN"
    # The pid namespace's first process takes all others with it when it ends.
    unshare --net --mount --pid --fork --kill-child true 2>/dev/null || give_up "namespaces cannot be made here"
    export TWO_HOSTS_INSIDE=1
    exec unshare --net --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi

# ---- inside ----
per_host=$1
shift
# /run/netns and /etc/hosts of this mount namespace alone.
mount --make-rprivate / && mkdir -p /run/netns && mount -t tmpfs none /run/netns || give_up "cannot mount inside the namespace"
here=/run/netns/.run
mkdir -p $here/tmp
# Two runs have the same host names and process numbers, of which Open MPI makes the names of its files.
mount -t tmpfs -o mode=1777 none /dev/shm || give_up "cannot mount inside the namespace"
export TMPDIR=$here/tmp

build_hosts()
{
    ip link add bridge0 type bridge && ip link set bridge0 up || return 1
    for i in 0 1; do
        ip netns add node$i &&
            ip link add outer$i type veth peer name inner$i &&
            ip link set inner$i netns node$i &&
            ip link set outer$i master bridge0 up &&
            ip -n node$i addr add 10.77.0.$((i + 1))/24 dev inner$i &&
            ip -n node$i link set inner$i up &&
            ip -n node$i link set lo up || return 1
        if [ -n "${TWO_HOSTS_RATE:-}" ]; then
            tc -n node$i qdisc add dev inner$i root tbf rate "$TWO_HOSTS_RATE" burst 512kb latency 50ms || return 1
        fi
    done
}
build_hosts 2>$here/why || give_up "cannot join two namespaces: $(tail -1 $here/why)"

printf '127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n' >$here/hosts
mount --bind $here/hosts /etc/hosts || give_up "cannot replace /etc/hosts inside the namespace"
printf 'node0 slots=%d\nnode1 slots=%d\n' "$per_host" "$per_host" >$here/hostfile

# mpirun starts its daemon on the other host with this instead of ssh.
cat >$here/remote <<'REMOTE'
#!/bin/bash
host=$1
shift
exec ip netns exec "$host" unshare --uts /bin/bash -c 'hostname "$0"; exec /bin/sh -c "$1"' "$host" "$*"
REMOTE
chmod +x $here/remote

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export ASAN_OPTIONS="detect_leaks=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
unset TWO_HOSTS_INSIDE
arguments="--mca plm_rsh_agent $here/remote --mca mpi_yield_when_idle 1 --mca pml ob1 --mca btl self,vader,tcp
    --mca btl_vader_warn_missing_cma 0 --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24
    --mca oob_tcp_keepalive_time 2 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 2"
if [ -n "${TWO_HOSTS_ALONE:-}" ]; then
    export TWO_HOSTS_HOSTFILE=$here/hostfile TWO_HOSTS_MPIRUN_ARGS=$arguments
else # shellcheck disable=SC2086 # the arguments are words
    set -- mpirun -np $((2 * per_host)) --hostfile $here/hostfile --oversubscribe --bind-to none $arguments "$@"
fi
ip netns exec node0 unshare --uts /bin/bash -c 'hostname node0; exec "$@"' two_hosts timeout -k 5 "${CONVOKE_MPI_SECONDS:-300}" "$@"
