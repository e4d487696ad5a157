#!/bin/sh
# TensorBoard 2.21.0 names an event file by second, host, process and a plain number that counts the
# process's writers from 0, and reads a folder's files by name: writer 10 of a process comes before its
# writer 9 where both began in one second.
#
# A run that goes on in the same process, its first writer until step 6, the next from step 5 on, whose
# file says so, is read as one curve of 8 steps by writers 1 and 2; by writers 9 and 10 the new steps come
# first, and the old ones that they replace behind them. Sweeps and test suites have that many writers.
#
# Seen with tensorboard 2.21.0, Python 3.11:
#   writers 1 and 2: steps 1, 2, 3, 4, 5, 6, 7, 8
#   writers 9 and 10: steps 5, 6, 7, 8, 1, 2, 3, 4, 5, 6
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "tensorboard==2.21.0" "numpy==2.2.6" "setuptools==80.9.0" 2> /dev/null
"$folder/venv/bin/python" -W ignore - "$folder" 2> /dev/null <<'PY' | tee "$folder/seen"
import sys
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer import event_file_writer


def write(run, steps):
    writer = event_file_writer.EventFileWriter(run)
    if steps[0] > 1:  # goes on: drops what is read of later steps, as purge_step of torch's writer
        begun = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=steps[0], wall_time=time.time(), session_log=begun))
    for step in steps:
        value = Summary.Value(tag="loss", simple_value=1.0 / step)
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=[value]))
        writer.add_event(event)
    writer.close()


def pair(first):
    """Steps read of a run that writers ``first`` and the next one wrote within a second."""
    event_file_writer._global_uid = event_file_writer.AtomicCounter(first)
    run = f"{sys.argv[1]}/{first}-{time.monotonic_ns()}"
    begun = int(time.time())
    write(run, range(1, 7))
    write(run, range(5, 9))
    if int(time.time()) != begun:  # names of two seconds sort by themselves
        return pair(first)
    read = EventAccumulator(run)
    read.Reload()
    return f"steps {', '.join(str(scalar.step) for scalar in read.Scalars('loss'))}"


for first in (1, 9):
    print(f"writers {first} and {first + 1}: {pair(first)}")
PY
diff "$folder/seen" - <<'SEEN'
writers 1 and 2: steps 1, 2, 3, 4, 5, 6, 7, 8
writers 9 and 10: steps 5, 6, 7, 8, 1, 2, 3, 4, 5, 6
SEEN
