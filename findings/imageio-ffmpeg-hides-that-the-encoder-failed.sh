#!/bin/sh
# imageio-ffmpeg 0.8.1: a video whose encoder failed is written without an error.
#
# write_frames() is the usual way from frames to an mp4 (imageio's ffmpeg plugin is built on it).
# Its close() waits for ffmpeg and does not look at how that ended: where the disk fills up while
# ffmpeg writes what it has buffered, it exits with an error, the file is cut short and has no index,
# and the caller is told nothing. /dev/full stands for a full disk.
#
# Seen with imageio-ffmpeg 0.8.1 (the ffmpeg that comes with it), numpy 2.4.6, Python 3.11:
#   40 frames sent, close() raised nothing; ffmpeg ended with status other than 0: True
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "imageio-ffmpeg==0.8.1" "numpy==2.4.6"
cat > "$folder/ask.py" <<'PY'
import subprocess

import imageio_ffmpeg
import numpy as np

encoders = []


class Seen(subprocess.Popen):
    def __init__(self, command, *args, **options):
        super().__init__(command, *args, **options)
        encoders.append(self)


subprocess.Popen = Seen
writer = imageio_ffmpeg.write_frames("/dev/full", (64, 64), output_params=["-f", "mpegts"])
writer.send(None)
frames = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
for frame in frames:
    writer.send(frame)
writer.close()
print(
    f"{len(frames)} frames sent, close() raised nothing; "
    f"ffmpeg ended with status other than 0: {encoders[-1].returncode != 0}"
)
PY
"$folder/venv/bin/python" "$folder/ask.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
40 frames sent, close() raised nothing; ffmpeg ended with status other than 0: True
SEEN
