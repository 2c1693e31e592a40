# shellcheck shell=bash disable=SC2034,SC2154
# The common part of the batch scripts. They source it from the package, so it is read when a job starts, not when it
# is submitted. They first set home = the folder of the package mtunet_dist, and most_steps = the largest number of steps that they start.

python=${MTUNET_PYTHON:-python}
restarts=${SLURM_RESTART_COUNT:-0}

fail() {
  echo "error: $*" >&2
  exit 2
}

if [[ -z ${MTUNET_CONTAINER:-} ]] && ! command -v "$python" >/dev/null; then
  fail "no $python on $(hostname); activate the environment before sbatch, or set MTUNET_PYTHON"
fi

# The job id of the first job of an array means the whole array, so use the array's id and the task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# The job's log, if submit.py has not set it. The other files of the job are beside it and begin with its name.
job_output=${job_output:-$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')}
job_log=${job_output%.log}

# The host of a node: its name, or Slurm's address for it, because a node's name may differ from the host's name.
host_of() {
  if getent hosts "$1" >/dev/null; then
    echo "$1"
  else
    scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Slurm numbers a job's steps from 0 again after a requeue. On a node that was cut off, the rest of the old job ends its
# own step by number as soon as it can, and would end ours. So this restart uses other numbers than the two before.
for ((i = restarts % 3 * most_steps; i > 0; i--)); do
  srun --overlap --ntasks=1 --nodes=1 --nodelist="${nodes[0]}" --cpus-per-task=1 true &
done
wait

# head = the address of the first node (this one) that the others can reach: that of its route to one of them. Its own
# name may mean the loopback here, or may not resolve.
head=127.0.0.1
if ((SLURM_JOB_NUM_NODES > 1)); then
  other=$(host_of "${nodes[1]}")
  head=$(srun --overlap --ntasks=1 --nodes=1 --nodelist="${nodes[0]}" --cpus-per-task=1 \
    "$python" -m mtunet_dist.slurm.own_address "$other") || fail "${nodes[0]} has no address towards ${nodes[1]}, $other"
fi

# This port and the next belong to the job and are below the ephemeral ports. A requeue uses others: the old may be
# held.
port=$((15000 + 2 * ((SLURM_JOB_ID + 500 * restarts) % 8500)))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 2)); done # this node is the first

# A lost node ends a training at once, but Slurm notices the loss only after minutes.
all_nodes_answer() {
  ((SLURM_JOB_NUM_NODES == 1)) ||
    timeout 100 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 true
}

# requeue REASON PROGRESS: put the job back into the queue and end. PROGRESS is one word for the progress of the job.
# After three times at the same PROGRESS, or if Slurm does not requeue the job, the function returns and the script
# continues. An empty PROGRESS does not count: the loss of a node before the first progress says nothing about the job.
requeue() {
  local where=${2:-the beginning} text="job $job, restart $restarts: $1 at ${2:-the beginning}"
  if queued_again; then
    echo "$text; queued again by Slurm"
    return
  fi
  [[ -z $2 ]] || echo "$2" >>"$job_log.progress"
  if [[ -n $2 ]] && (($(tail -n 3 "$job_log.progress" | grep -cxF -e "$2") == 3)); then
    echo "error: $1; three times at the same point, $2: not queued again" >&2
  elif scontrol requeue "$job"; then
    echo "$text; queued again"
    sleep 60 # Slurm ends this script
  elif queued_again; then # in the meantime
    echo "$text; queued again by Slurm"
  else
    echo "error: $1 at $where; Slurm does not requeue this job: submit it again, it goes on from there" >&2
  fi
}

# Whether Slurm has already queued the job again, such as after it has missed a node. The job then waits or runs
# elsewhere, and this script, perhaps on a node that is cut off, must not act for it.
queued_again() {
  local now
  now=$(scontrol show job "$job") || return 1
  grep -q '^ *JobState=PENDING ' <<<"$now" ||
    { [[ $now =~ \ Restarts=([0-9]+)\ BatchFlag= ]] && ((BASH_REMATCH[1] > restarts)); }
}
