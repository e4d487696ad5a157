#!/bin/sh
# gymnasium 1.4.0 does not load environments that other packages declare as plugins.
#
# gymnasium 0.26 to 0.29 load every entry point of the group "gymnasium.envs" on import, so that an
# installed package's environments can be made by name. gymnasium/envs/__init__.py of 1.4.0 still says
# that it "loads the env plugins for module using the entry point", but nothing does: the entry point
# is installed and visible, and its environments are unknown until the package is imported.
#
# Seen with gymnasium 0.29.1 and 1.4.0, Python 3.11, one package with one entry point:
#   0.29.1: entry point visible: True; made by name: True
#   1.4.0: entry point visible: True; made by name: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/package"
cat > "$folder/package/plugged.py" <<'PY'
import gymnasium


class Nothing(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))


def register():
    from gymnasium.envs.registration import register  # 0.29 asks before gymnasium.register is there

    register(id="Nothing-v0", entry_point="plugged:Nothing")
PY
cat > "$folder/package/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "plugged"
version = "1"
[project.entry-points."gymnasium.envs"]
plugged = "plugged:register"
[tool.setuptools]
py-modules = ["plugged"]
TOML
cat > "$folder/ask.py" <<'PY'
from importlib.metadata import entry_points

visible = any(point.value == "plugged:register" for point in entry_points(group="gymnasium.envs"))
import gymnasium

print(f"entry point visible: {visible}; made by name: {'plugged/Nothing-v0' in gymnasium.registry}")
PY
for version in 0.29.1 1.4.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "gymnasium==$version" "numpy==1.26.4" "$folder/package"
    echo "$version: $("$folder/$version/bin/python" -W ignore "$folder/ask.py")"
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
0.29.1: entry point visible: True; made by name: True
1.4.0: entry point visible: True; made by name: False
SEEN
