#!/usr/bin/env bash
# bash examples/verl_recipe/run.sh STUDENT TEACHER train.parquet [any option of verl ...]
set -euo pipefail
student=${1:?the student, a directory or name} teacher=${2:?the teacher} prompts=${3:?a parquet file}
shift 3
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}  # verl's workers import oprd_actor from there
exec python -m verl.trainer.main_ppo --config-path "$here" --config-name oprd_trainer \
  actor_rollout_ref.model.path="$student" actor_rollout_ref.actor.oprd.teacher="$teacher" \
  data.train_files="$prompts" "$@"
