#!/bin/bash
# A Slurm on one machine whose nodes look like machines of their own. It needs root and the right to make namespaces.
# Nothing of it is seen outside but the names of its network namespaces, so several can run at once.
#
#   slurm_hosts.sh start                    build it and wait until all nodes are idle
#   slurm_hosts.sh on HOST COMMAND...       run a command on n1, n2, ... or login, in this folder and environment
#   slurm_hosts.sh kill|boot NODE           end all its processes, whose connections the kernel closes; start it again
#   slurm_hosts.sh cut|heal NODE            take its network link down, and up again; its processes go on
#   slurm_hosts.sh stop                     end all of it; the logs stay
#
# Every host has its own network (eth0 with 10.77.0.x, lo), host name, processes, /tmp, /dev/shm, /etc/hosts and
# /etc/slurm/slurm.conf; all else is shared. The controller, at 10.77.0.254, holds the bridge between them.
#
# Environment, all for `start`, the first for all commands:
#   CLUSTER_ROOT   folder of the cluster; its last part names the network namespaces
#   SHARE          folders that all hosts see even if they lie below /tmp, separated by spaces
#   NODES CPUS     number of nodes, and of the CPUs that each claims
#   HOSTS          /etc/hosts of the nodes. debian: the own name is 127.0.1.1, as Debian and Ubuntu install it
#                  clean: every name is its address   none: no names at all, Slurm alone knows the addresses
# shellcheck disable=SC2016 # what is in single quotes is for a shell on a host
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

root=$CLUSTER_ROOT nodes=${NODES:-2} cpus=${CPUS:-4} hosts=${HOSTS:-debian} share=${SHARE:-} net=10.77.0
# shellcheck source=/dev/null
[[ ! -f $root/settings || ${1:-} == start ]] || . "$root/settings" # what `start` wrote down
tag=${root##*/}

fail() {
  echo "error: $*" >&2
  exit 1
}

node_names() { for ((i = 1; i <= nodes; i++)); do echo "n$i"; done; }
address() { if [[ $1 == login ]]; then echo "$net.100"; else echo "$net.${1#n}"; fi; }

write_conf() {
  local name
  cat <<CONF
ClusterName=hosts
SlurmctldHost=controller($net.254)
SlurmUser=root
SlurmdUser=root
# cred_expire is also how long a requeued job waits; less than 5 would mean 120
AuthInfo=socket=$root/munge/socket,cred_expire=5
StateSaveLocation=$root/state
SlurmctldPidFile=$root/slurmctld.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdSpoolDir=$root/hosts/%n/spool
SlurmdPidFile=$root/hosts/%n/slurmd.pid
SlurmdLogFile=$root/log/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
ReturnToService=2
# a node that does not answer for so long is down
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
MailProg=/bin/true
CONF
  for name in $(node_names); do
    echo -n "NodeName=$name CPUs=$cpus RealMemory=8000 State=UNKNOWN"
    if [[ $hosts == none ]]; then echo " NodeAddr=$(address "$name")"; else echo; fi
  done
  echo "PartitionName=all Nodes=ALL Default=YES DefaultTime=00:30:00 State=UP"
}

write_hosts() { # of one host
  local name
  echo "127.0.0.1 localhost"
  [[ $hosts != debian ]] || echo "127.0.1.1 $1"
  for name in $(node_names) login; do
    [[ $hosts == none || ($hosts == debian && $name == "$1") ]] || echo "$(address "$name") $name"
  done
}

# boot NAME: the processes of a host, below one `unshare`; its network is there already, and stays when they are killed.
boot() {
  local name=$1 home=$root/hosts/$1 work="sleep infinity"
  ! pid_of "$name" >/dev/null || fail "$name runs"
  [[ $name == login ]] || work="slurmd -D"
  # The first process of a host takes in those that others leave behind, as init does.
  setsid nsenter --net="/run/netns/$tag-$name" unshare --uts --mount --pid --fork --kill-child --mount-proc \
    --propagation=private env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 bash -c 'set -e
      root=$1 home=$2 share=$3 work=$4
      hostname "$(basename "$home")"
      mount --bind "$home/hosts" /etc/hosts
      mount --bind "$root/resolv.conf" /etc/resolv.conf
      mount -t tmpfs tmpfs /etc/slurm
      cp "$root/slurm.conf" /etc/slurm/
      mount -t tmpfs -o mode=1777 tmpfs /dev/shm
      mount -t tmpfs -o mode=1777 tmpfs "$home/tmp" # what is shared goes below it before it hides the old one
      for folder in $share; do
        [[ $folder != /tmp/* ]] || { mkdir -p "$home$folder" && mount --rbind "$folder" "$home$folder"; }
      done
      mount --rbind "$home/tmp" /tmp
      $work &
      while :; do wait -n || sleep 1; done' "host $name" "$root" "$home" "$share" "$work" \
    </dev/null >>"$root/log/host-$name.log" 2>&1 &
  echo $! >"$home/pid"
}

pid_of() { # the `unshare` of a host that runs
  local pid
  pid=$(cat "$root/hosts/$1/pid" 2>/dev/null) && grep -qsF "host $1" "/proc/$pid/cmdline" && echo "$pid"
}

end() { # all processes of a host
  local pid
  pid=$(pid_of "$1") || return 0
  kill -KILL "$pid"
  while [[ -e /proc/$pid/ns/net ]]; do sleep 0.1; done
}

on() {
  local pid
  pid=$(pid_of "$1") || fail "$1 is down"
  exec nsenter --target="$(tr -d ' ' <"/proc/$pid/task/$pid/children")" --net --uts --mount --pid \
    bash -c 'cd "$0" && exec "$@"' "$PWD" "${@:2}"
}

start() {
  local name
  mkdir -p "$root"/{munge,state,log,hosts} /etc/slurm
  share="$root $share"
  declare -p nodes cpus hosts share >"$root/settings"
  echo "nameserver 127.0.0.1" >"$root/resolv.conf" # where none answers, at once
  write_conf >"$root/slurm.conf"

  ip netns add "$tag-controller"
  ip -n "$tag-controller" link set lo up
  ip -n "$tag-controller" link add bridge type bridge
  ip -n "$tag-controller" addr add "$net.254/24" dev bridge
  ip -n "$tag-controller" link set bridge up
  for name in $(node_names) login; do
    mkdir -p "$root/hosts/$name"/{tmp,spool}
    write_hosts "$name" >"$root/hosts/$name/hosts"
    ip netns add "$tag-$name"
    ip -n "$tag-controller" link add "$name" type veth peer name eth0 netns "$tag-$name"
    ip -n "$tag-controller" link set "$name" master bridge up
    ip -n "$tag-$name" addr add "$(address "$name")/24" dev eth0
    ip -n "$tag-$name" link set lo up
    ip -n "$tag-$name" link set eth0 up
    ip -n "$tag-$name" route add default dev eth0 # which leads no further than the bridge
  done

  (umask 077 && head -c 128 /dev/urandom >"$root/munge/key")
  munged --force --key-file="$root/munge/key" --socket="$root/munge/socket" --pid-file="$root/munge/pid" \
    --log-file="$root/log/munged.log" --seed-file="$root/munge/seed"
  # It needs its own name and those of the nodes.
  write_hosts controller | sed /127.0.1.1/d >"$root/hosts/hosts"
  SLURM_CONF=$root/slurm.conf nsenter --net="/run/netns/$tag-controller" unshare --mount --uts --propagation=private \
    sh -c 'hostname controller && mount --bind "$0" /etc/hosts && exec slurmctld -i' "$root/hosts/hosts"
  for name in $(node_names) login; do boot "$name"; done
  for ((i = 0; i < 120; i++)); do
    [[ $(bash "$0" on login sinfo -h -N -t idle -o %N | wc -l) != "$nodes" ]] || return 0
    sleep 0.5
  done
  fail "the nodes do not come up: see $root/log"
}

stop() {
  local name file pid
  for name in $(node_names) login; do end "$name"; done
  for file in "$root"/{slurmctld.pid,munge/pid}; do
    pid=$(cat "$file" 2>/dev/null) || continue
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
  for name in $(node_names) login controller; do ip netns delete "$tag-$name" || true; done # and its cables with it
}

case ${1:-}:${2:-} in
  start:) start ;;
  stop:) stop ;;
  on:?*) on "${@:2}" ;;
  kill:n*) end "$2" ;;
  boot:n*) boot "$2" ;;
  cut:n*) ip -n "$tag-controller" link set "$2" down ;;
  heal:n*) ip -n "$tag-controller" link set "$2" up ;;
  *) sed -n '2,/^# shellcheck/{/shellcheck/d;s/^# \{0,1\}//p;}' "$0" >&2 && exit 2 ;;
esac
