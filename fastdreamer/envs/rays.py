"""Pictures of the suite's tasks without OpenGL: rays cast through MuJoCo's abstract scene.

``mjv_updateScene`` says what there is to draw, as it does for OpenGL; ``csrc/cpu/rays.h`` draws it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastdreamer.envs.quality import Quality

_MAX_GEOMS = 1000  # of a scene; the suite's largest has about a hundred
_MAX_CELLS = 200  # mjMAXPLANEGRID
_SPOT, _DIRECTIONAL = 0, 1  # mjtLightType; OpenGL knows no others
_TEX_2D, _TEX_SKYBOX = 0, 2  # mjtTexture; the third is a cube
_PLANE, _HFIELD, _BOX = 0, 1, 6  # mjtGeom; what lies above the box is drawn by triangles
_DECOR = 4  # mjtCatBit: casts no shadow
_RGB = 1  # mjtTextureRole


def why_not(model: Any) -> str | None:
    """Why rays cannot draw a MuJoCo model, or None."""
    try:
        core = _core()
    except ImportError as error:
        return f"they are cast by the compiled core, which is not available: {error}"
    if model.nskin or model.nflex:
        return "it has skins or flexible bodies"
    shapes = model.geom_type
    if ((shapes == _HFIELD) | (shapes > _BOX)).any():
        return "it has meshes or height fields"
    if (model.geom_size[shapes == _PLANE, :2] <= 0).any():
        return "it has a plane without end"
    if model.nlight + 1 > core.MAX_LIGHTS:
        return f"it has more than {core.MAX_LIGHTS - 1} lights"
    textures = model.mat_texid[:, _RGB]
    for shape, material in zip(shapes, model.geom_matid, strict=True):
        texture = textures[material] if material >= 0 else -1
        if shape != _PLANE and texture >= 0 and model.tex_type[texture] == _TEX_2D:
            return "it has flat textures on solid bodies"
    return None


def _core() -> Any:
    """The compiled core, and PyTorch before it: they share PyTorch's OpenMP, not the system's,
    which may be another or not there."""
    import torch  # noqa: F401

    from fastdreamer import _native

    return _native


class Rays:
    """Draws one task from one of its cameras.

    physics: dm_control's, of a model that `why_not` accepts. Equal states give equal pictures, in
    every process of one machine.
    """

    def __init__(self, physics: Any, camera_id: int, quality: Quality) -> None:
        import mujoco

        self._mujoco = mujoco
        self._model, self._data = physics.model.ptr, physics.data.ptr
        model = self._model
        textures = [_texture(model, i) for i in range(model.ntex)]
        skies = np.flatnonzero(model.tex_type == _TEX_SKYBOX)
        self._caster = _core().RayCaster(textures, int(skies[0]) if len(skies) else -1)
        self._effects = {
            "samples": 4 if quality.multisampling else 1,
            "reflection": quality.mirror,
            "shadow": quality.shadows,
            "sky": quality.sky,
        }
        self._scene = mujoco.MjvScene(model, _MAX_GEOMS)
        self._geoms, self._lights = self._scene.geoms, self._scene.lights
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera_id
        self._shadow_map = (model.vis.map.shadowscale, model.vis.map.shadowclip * model.stat.extent)
        self._grids = {
            i: [_grid(size, model.geom_size[i, 2]) for size in model.geom_size[i, :2]]
            for i in np.flatnonzero(model.geom_type == _PLANE).tolist()
        }

    def draw(self, height: int, width: int) -> np.ndarray:
        """The scene as it is now: uint8 [height, width, 3], a fresh array."""
        self._mujoco.mjv_updateScene(
            self._model, self._data, self._option, self._perturb, self._camera,
            self._mujoco.mjtCatBit.mjCAT_ALL, self._scene,
        )  # fmt: skip
        pixels = np.empty((height, width, 3), np.uint8)
        geoms = [self._geom(geom) for geom in self._geoms[: self._scene.ngeom]]
        lights = [
            _light(light)
            for light in self._lights[: self._scene.nlight]
            if light.type in (_SPOT, _DIRECTIONAL)
        ]
        self._caster.draw(
            np.array(geoms, np.float32).reshape(len(geoms), -1),
            np.array(lights, np.float32).reshape(len(lights), -1),
            self._view(width / height),
            pixels,
            **self._effects,
        )
        return pixels

    def _geom(self, geom: Any) -> list[float]:
        """A row of numbers, as csrc/bindings/rays.cpp reads it."""
        texture, uniform, repeat = geom.texid, geom.texuniform, geom.texrepeat
        if texture < 0 and geom.matid >= 0:
            model, material = self._model, geom.matid
            texture = model.mat_texid[material, _RGB]
            uniform, repeat = model.mat_texuniform[material], model.mat_texrepeat[material]
        grid = self._grids[geom.objid] if geom.type == _PLANE else ((0, 0, 0), (0, 0, 0))
        return [
            geom.type, texture, uniform, geom.category != _DECOR, *geom.pos, *geom.size,
            *geom.mat.ravel(), *geom.rgba, geom.emission, geom.specular, geom.shininess,
            geom.reflectance, *repeat, *grid[0], *grid[1],
        ]  # fmt: skip

    def _view(self, aspect: float) -> np.ndarray:
        """The camera between the two of a stereo pair, and what a shadow map would cover."""
        left, right = self._scene.camera
        near = left.frustum_near
        half_height = (left.frustum_top - left.frustum_bottom) / (2 * near)
        row = [
            *(left.pos + right.pos) / 2, *(left.forward + right.forward) / 2,
            *(left.up + right.up) / 2, half_height * aspect, half_height, near, left.frustum_far,
            *self._shadow_map,
        ]  # fmt: skip
        return np.array([row], np.float32)


def _light(light: Any) -> list[float]:
    return [
        light.type == _DIRECTIONAL, light.castshadow, *light.pos, *light.dir, *light.ambient,
        *light.diffuse, *light.specular, *light.attenuation, light.cutoff, light.exponent,
    ]  # fmt: skip


def _grid(size: float, spacing: float) -> tuple[float, float, int]:
    """How OpenGL's renderer divides a side of 2 * size of a plane: the width of the first cell and
    the last, that of the others, and how many there are."""
    half = max(spacing, size / (_MAX_CELLS - 2))
    inner = math.floor(size / half)
    inner -= inner % 2
    return size - inner * half, 2 * half, inner + 2


def _texture(model: Any, i: int) -> tuple[np.ndarray, bool]:
    """A texture's texels, uint8 [height, width, 3] or, of a cube, [6 size, size, 3]; is it one?"""
    height, width, channels = model.tex_height[i], model.tex_width[i], model.tex_nchannel[i]
    start = model.tex_adr[i]
    texels = model.tex_data[start : start + height * width * channels]
    texels = texels.reshape(height, width, channels)[..., :3]
    cube = model.tex_type[i] != _TEX_2D
    if cube and height == width:
        texels = np.tile(texels, (6, 1, 1))  # one picture for all faces
    return np.ascontiguousarray(texels), bool(cube)
