// A picture of MuJoCo's abstract scene (mjvScene) by casting rays, without OpenGL.
//
// It follows MuJoCo's fixed-function renderer (https://mujoco.readthedocs.io, src/render/classic of
// its sources), whose picture is the reference: Blinn-Phong light, on planes at the corners of
// their grid and interpolated; textures modulate it, trilinear from mipmaps; the first opaque plane
// that reflects mirrors the other geoms, unshadowed, and the sky does not show in it; lights that
// cast shadows are added where nothing is in between, within the cone that a shadow map covers;
// transparent geoms are blended near to far, then far to near. Curved surfaces are exact here and
// lit at every pixel, shadows are rays and not a map.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/view.h"

namespace fastdreamer {

struct Vec3 {
  float x, y, z;
};

// mjtGeom of those that are drawn.
enum class Shape { plane = 0, sphere = 2, capsule = 3, ellipsoid = 4, cylinder = 5, box = 6 };

// Corners of a plane's grid along one axis: -size, -size + pad, then every `step`, size.
struct GridAxis {
  float pad, step;
  int cells;
};

struct SceneGeom {
  Shape shape;
  int texture;           // index, or -1
  bool texture_uniform;  // the texture is scaled by the size
  bool casts;            // a shadow
  Vec3 pos, size;
  std::array<Vec3, 3> axes;  // columns of its rotation
  Vec3 color;
  float alpha, emission, specular, shininess, reflectance;
  float repeat[2];   // of a texture
  GridAxis grid[2];  // of a plane
};

struct SceneLight {
  bool directional, casts;
  Vec3 pos, dir, ambient, diffuse, specular;
  float attenuation[3];
  float cutoff, exponent;  // of a spot: degrees, power
};

// Where it looks from, and half the height and width of the image at distance 1.
struct SceneCamera {
  Vec3 pos, forward, up;
  float half_width, half_height, near, far;
};

struct ShadowMap {
  float scale, clip;  // of a spot's cutoff; half the width that a directional light's covers
};

// What of it is drawn.
struct Effects {
  int samples;  // a pixel, 1 or 4: of edges; colours are computed once a pixel and geom
  bool reflection, shadow, sky;
};

// Levels of uint8 [n_l, m_l, 3], each half the one before; a cube has six faces [n, n].
class Texture {
 public:
  // data: of level 0, [faces * height, width, 3], kept by the caller as long as this.
  Texture(const std::uint8_t* data, Index height, Index width, bool cube);

  bool cube() const { return cube_; }
  // s, t: coordinates, 1 is the whole texture, which repeats. lod: log2 of texels of level 0 a
  // pixel.
  Vec3 sample_2d(float s, float t, float lod) const;
  // Of a face, where s and t are within [0, 1].
  Vec3 sample_face(int face, float s, float t, float lod) const;
  float width() const { return static_cast<float>(levels_[0].width); }
  float height() const { return static_cast<float>(levels_[0].height); }

 private:
  struct Level {
    const std::uint8_t* data;
    Index height, width;  // of a face
  };
  Vec3 trilinear(int face, float s, float t, float lod, bool repeat) const;

  bool cube_;
  std::vector<Level> levels_;
  std::vector<std::vector<std::uint8_t>> made_;
};

struct Scene {
  std::vector<SceneGeom> geoms;
  std::vector<SceneLight> lights;
  SceneCamera camera;
  ShadowMap shadow_map;
  const Texture* sky;  // null: black
};

constexpr std::size_t kMaxLights = 8;

// What a picture has seen while it is drawn; the memory may be used for another one afterwards.
struct RayScratch {
  std::vector<float> depth[2];
  std::vector<std::int16_t> geom[2];
  std::vector<std::uint8_t> veils[2];
};

// Writes uint8 [height, width, 3], the top row first.
class RayCaster {
 public:
  explicit RayCaster(std::vector<Texture> textures) : textures_(std::move(textures)) {}

  const std::vector<Texture>& textures() const { return textures_; }
  void draw(const Scene& scene, const Effects& effects, Index height, Index width,
            std::uint8_t* pixels, RayScratch& scratch) const;

 private:
  struct View;
  struct Seen;
  struct Picture;

  std::vector<Texture> textures_;
};

}  // namespace fastdreamer
