#!/bin/sh
# MuJoCo 3.17.0: mj_multiRay misses geoms that mj_ray hits.
#
# mj_multiRay first drops bodies whose bounding sphere a ray passes by. The sphere is that of the
# body's box, whose centre is given in the frame of the body's principal axes of inertia; it is added
# to the centre of mass without being turned by that frame. Where geoms lie to one side of a centre
# of mass, as where one of them is much heavier, and the principal axes are not the world's, the
# sphere is elsewhere and the geoms are not seen. Pictures, rangefinders and depth from mj_multiRay
# have holes there; no error is raised. mj_ray, a ray at a time, has no such test.
#
# Seen with MuJoCo 3.17.0, dm_control 1.0.50, Python 3.11: two equal balls 2 apart on one body, one of
# them 100 times as heavy; and Finger of the suite from its own camera, 64 x 64 rays.
#   rays at the light ball that hit: mj_ray 50 of 50, mj_multiRay 0
#   Finger, rays that hit another geom than by mj_ray: some, on the finger
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "dm_control==1.0.50" "mujoco==3.17.0" "numpy==2.2.6"
cat > "$folder/ask.py" <<'PY'
import mujoco
import numpy as np
from dm_control import suite


def both(model, data, eye, rays):
    """The geoms that mj_multiRay and mj_ray hit, -1 where there is none."""
    many, distance = np.zeros(len(rays), np.int32), np.zeros(len(rays))
    mujoco.mj_multiRay(
        model, data, eye, rays.ravel(), None, 1, -1, many, distance, None, len(rays), 1e10
    )
    single = many.copy()
    for i, ray in enumerate(rays):
        mujoco.mj_ray(model, data, eye, ray, None, 1, -1, single[i : i + 1], None)
    return many, single


model = mujoco.MjModel.from_xml_string("""
<mujoco><worldbody><body><freejoint/>
  <geom size=".1" density="100000"/><geom size=".1" pos="2 0 0"/>
</body></worldbody></mujoco>""")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
rays = np.array([0, 0, -1]) + 0.005 * np.random.default_rng(0).normal(size=(50, 3))
many, single = both(model, data, data.geom_xpos[1] + [0, 0, 3], rays)
print(f"rays at the light ball that hit: mj_ray {(single == 1).sum()} of 50, "
      f"mj_multiRay {(many == 1).sum()}")

env = suite.load("finger", "spin", task_kwargs={"random": 0})
env.reset()
for _ in range(30):
    env.step([1.0, -1.0])
model, data = env.physics.model.ptr, env.physics.data.ptr
x, y = np.meshgrid(np.linspace(-0.4, 0.4, 64), np.linspace(0.4, -0.4, 64))
rays = np.stack([x.ravel(), y.ravel(), -np.ones(4096)], 1) @ data.cam_xmat[0].reshape(3, 3).T
many, single = both(model, data, data.cam_xpos[0].copy(), rays)
missed = {model.geom(i).name for i in single[many != single]}
where = "on the finger" if missed <= {"proximal", "distal", "fingertip"} else missed
print("Finger, rays that hit another geom than by mj_ray:", "some," if missed else "none,", where)
PY
MUJOCO_GL=disable "$folder/venv/bin/python" -W ignore "$folder/ask.py" 2> /dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
rays at the light ball that hit: mj_ray 50 of 50, mj_multiRay 0
Finger, rays that hit another geom than by mj_ray: some, on the finger
SEEN
