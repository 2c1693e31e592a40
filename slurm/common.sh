# shellcheck shell=bash disable=SC2034,SC2154
# What the batch scripts share. They find it in the repository, so it is read when a job starts, not when it is
# submitted. They set home = the repository, and most_steps = as many as they start, at most.

python=${MTUNET_PYTHON:-python}
restarts=${SLURM_RESTART_COUNT:-0}

fail() {
  echo "error: $*" >&2
  exit 2
}

if [[ -z ${MTUNET_CONTAINER:-} ]] && ! command -v "$python" >/dev/null; then
  fail "no $python on $(hostname); activate the environment before sbatch, or set MTUNET_PYTHON"
fi

# By its own number, the first job of an array is the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# The job's log, where submit.py has not said which it is; what belongs to the job lies beside it under this name.
job_output=${job_output:-$(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')}
job_log=${job_output%.log}

# The host of a node: its name, or its address as Slurm knows it, as a node's name need not be a host's.
host_of() {
  if getent hosts "$1" >/dev/null; then
    echo "$1"
  else
    scontrol show node -o "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# Slurm numbers a job's steps from 0 again when the job comes back. What is left of it on a node that was cut off ends its
# own step by number as soon as it can, and would end ours: so this restart's numbers are not those of the two before.
for ((i = restarts % 3 * most_steps; i > 0; i--)); do
  srun --overlap --ntasks=1 --nodes=1 --nodelist="${nodes[0]}" --cpus-per-task=1 true &
done
wait

# head = the address of the first node, which is this one, by which the others reach it: that of the route to one of
# them, as its own name may mean the loopback here, or nothing.
head=127.0.0.1
if ((SLURM_JOB_NUM_NODES > 1)); then
  other=$(host_of "${nodes[1]}")
  head=$(srun --overlap --ntasks=1 --nodes=1 --nodelist="${nodes[0]}" --cpus-per-task=1 \
    "$python" "$home/slurm/own_address.py" "$other") || fail "${nodes[0]} has no address towards ${nodes[1]}, $other"
fi

# This one and the next are the job's, below the ephemeral ports; others after a requeue, as the last may still be held.
port=$((15000 + 2 * ((SLURM_JOB_ID + 500 * restarts) % 8500)))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 2)); done # this is the first node

# A lost node ends a training at once, while Slurm takes minutes to see it.
all_nodes_answer() {
  ((SLURM_JOB_NUM_NODES == 1)) ||
    timeout 100 srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 true
}

# requeue REASON PROGRESS: put the job back into the queue and end. PROGRESS is how far it is, in a word: after three
# times at the same point, or where Slurm does not requeue the job, the script goes on behind this. An empty PROGRESS is
# no point: a node that is lost before there is any says nothing of the job.
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
  elif queued_again; then # meanwhile
    echo "$text; queued again by Slurm"
  else
    echo "error: $1 at $where; Slurm does not requeue this job: submit it again, it goes on from there" >&2
  fi
}

# Whether Slurm has queued the job again by itself, as where it has missed a node. The job waits or runs already, perhaps
# while this script lives on, on a node that is cut off; it has no say then.
queued_again() {
  local now
  now=$(scontrol show job "$job") || return 1
  grep -q '^ *JobState=PENDING ' <<<"$now" ||
    { [[ $now =~ \ Restarts=([0-9]+)\ BatchFlag= ]] && ((BASH_REMATCH[1] > restarts)); }
}
