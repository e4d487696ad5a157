#!/bin/sh
# ray 2.60.0: a driver that asked for silence, ray.init(log_to_driver=False, logging_level="ERROR"),
# has pages about lost workers and nodes on its standard output all the same.
#
# Raylets' errors come by a channel of their own, which every driver listens to, and are printed
# beside logging, to standard output and not to standard error. A program that handles ActorDiedError
# and whose output others read (a table, JSON, a progress display) finds them in it. What keeps them
# out is the filter of repeated lines: RAY_DEDUP_LOGS_SKIP_REGEX=. set before the first import of ray.
#
# Seen with ray 2.60.0, Python 3.11:
#   as it is: said
#   with the filter: silent
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "ray==2.60.0"
cat > "$folder/lose.py" <<'PY'
import os
import time

import ray

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote(max_restarts=0)
class Actor:
    def end(self):
        os.kill(os.getpid(), 9)


try:
    ray.get(Actor.remote().end.remote())
except ray.exceptions.RayActorError:
    time.sleep(5)  # until the raylet has said it
PY
lose() {
    if env RAY_USAGE_STATS_ENABLED=0 "$@" "$folder/venv/bin/python" "$folder/lose.py" \
        2> /dev/null | grep -q "(raylet)"; then echo said; else echo silent; fi
}
{
    echo "as it is: $(lose)"
    echo "with the filter: $(lose RAY_DEDUP_LOGS_SKIP_REGEX=.)"
} | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
as it is: said
with the filter: silent
SEEN
