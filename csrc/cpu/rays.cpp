#include "cpu/rays.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastdreamer {
namespace {

constexpr float kNever = std::numeric_limits<float>::infinity();
constexpr std::int16_t kSky = -1;

Vec3 operator+(Vec3 a, Vec3 b) { return {a.x + b.x, a.y + b.y, a.z + b.z}; }
Vec3 operator-(Vec3 a, Vec3 b) { return {a.x - b.x, a.y - b.y, a.z - b.z}; }
Vec3 operator*(Vec3 a, Vec3 b) { return {a.x * b.x, a.y * b.y, a.z * b.z}; }
Vec3 operator*(float f, Vec3 a) { return {f * a.x, f * a.y, f * a.z}; }
Vec3 operator/(Vec3 a, Vec3 b) { return {a.x / b.x, a.y / b.y, a.z / b.z}; }
float dot(Vec3 a, Vec3 b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
Vec3 cross(Vec3 a, Vec3 b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
float length(Vec3 a) { return std::sqrt(dot(a, a)); }
Vec3 unit(Vec3 a) { return (1.0f / std::max(length(a), 1e-12f)) * a; }
float clamp(float value) { return std::min(std::max(value, 0.0f), 1.0f); }
Vec3 clamp(Vec3 a) { return {clamp(a.x), clamp(a.y), clamp(a.z)}; }
Vec3 mix(Vec3 a, Vec3 b, float f) { return a + f * (b - a); }
Vec3 mirrored(Vec3 a, Vec3 normal) { return a - (2 * dot(a, normal)) * normal; }

Vec3 to_local(const SceneGeom& g, Vec3 a) {
  return {dot(g.axes[0], a), dot(g.axes[1], a), dot(g.axes[2], a)};
}
Vec3 to_world(const SceneGeom& g, Vec3 a) {
  return a.x * g.axes[0] + a.y * g.axes[1] + a.z * g.axes[2];
}

float bound(const SceneGeom& g) {
  switch (g.shape) {
    case Shape::plane:
      return kNever;
    case Shape::sphere:
      return g.size.x;
    case Shape::capsule:
      return g.size.x + g.size.z;
    case Shape::ellipsoid:
      return std::max({g.size.x, g.size.y, g.size.z});
    case Shape::cylinder:
      return std::hypot(g.size.x, g.size.z);
    case Shape::box:
      return length(g.size);
  }
  return kNever;
}

// Balls of one radius, in the geom's own frame, whose convex hull the geom is within.
struct Hull {
  std::array<Vec3, 8> balls;
  int count;
  float radius;
};

Hull hull(const SceneGeom& g) {
  const Vec3 s = g.size;
  switch (g.shape) {
    case Shape::plane:
      return {{{{-s.x, -s.y, 0}, {-s.x, s.y, 0}, {s.x, -s.y, 0}, {s.x, s.y, 0}}}, 4, 0};
    case Shape::capsule:
    case Shape::cylinder:
      return {{{{0, 0, -s.z}, {0, 0, s.z}}}, 2, s.x};
    case Shape::box: {
      Hull h{{}, 8, 0};
      for (int i = 0; i < 8; ++i) {
        h.balls[static_cast<std::size_t>(i)] = {i & 1 ? s.x : -s.x, i & 2 ? s.y : -s.y,
                                                i & 4 ? s.z : -s.z};
      }
      return h;
    }
    case Shape::sphere:
    case Shape::ellipsoid:
      break;
  }
  return {{{{0, 0, 0}}}, 1, bound(g)};
}

// The smaller root of a t² + 2 b t + c, where a ray enters; kNever where there is none.
float first_root(float a, float b, float c) {
  const float d = b * b - a * c;
  return d < 0 || a <= 0 ? kNever : (-b - std::sqrt(d)) / a;
}

enum Sides { front = 1, back = 2 };

// Where the ray o + t d enters the geom, in the geom's own frame: t, or kNever. From within nothing
// is entered, as back faces are not drawn. sides: of a plane.
float enter(const SceneGeom& g, Vec3 o, Vec3 d, int sides) {
  const Vec3 s = g.size;
  switch (g.shape) {
    case Shape::plane: {
      if (!(sides & (d.z < 0 ? front : back)) || d.z == 0) return kNever;
      const float t = -o.z / d.z;
      return std::abs(o.x + t * d.x) <= s.x && std::abs(o.y + t * d.y) <= s.y ? t : kNever;
    }
    case Shape::sphere:
    case Shape::ellipsoid: {
      const Vec3 p = o / s, v = d / s;
      return first_root(dot(v, v), dot(p, v), dot(p, p) - 1);
    }
    case Shape::capsule:
    case Shape::cylinder: {
      const float a = d.x * d.x + d.y * d.y, b = o.x * d.x + o.y * d.y,
                  c = o.x * o.x + o.y * o.y - s.x * s.x;
      const float side = first_root(a, b, c);
      if (side != kNever && std::abs(o.z + side * d.z) <= s.z) return side;
      // Through an end. The ray meets the near one first, and comes from its side.
      const float end = d.z > 0 ? -s.z : s.z;
      if (g.shape == Shape::capsule) {
        for (const float z : {end, -end}) {
          const Vec3 p{o.x, o.y, o.z - z};
          const float t = first_root(dot(d, d), dot(p, d), dot(p, p) - s.x * s.x);
          if (t != kNever && (p.z + t * d.z) * z >= 0) return t;
        }
        return kNever;
      }
      if (d.z == 0) return kNever;
      const float t = (end - o.z) / d.z, x = o.x + t * d.x, y = o.y + t * d.y;
      return x * x + y * y <= s.x * s.x ? t : kNever;
    }
    case Shape::box: {
      float enters = -kNever, leaves = kNever;
      const float from[] = {o.x, o.y, o.z}, along[] = {d.x, d.y, d.z}, half[] = {s.x, s.y, s.z};
      for (int i = 0; i < 3; ++i) {
        if (along[i] == 0) {
          if (std::abs(from[i]) > half[i]) return kNever;
          continue;
        }
        const float middle = -from[i] / along[i], reach = half[i] / std::abs(along[i]);
        enters = std::max(enters, middle - reach);
        leaves = std::min(leaves, middle + reach);
      }
      return enters <= leaves ? enters : kNever;
    }
  }
  return kNever;
}

// Outward, at a point of the surface, both in the geom's own frame; of length 1.
Vec3 normal_at(const SceneGeom& g, Vec3 p) {
  const Vec3 s = g.size;
  switch (g.shape) {
    case Shape::plane:
      return {0, 0, 1};
    case Shape::sphere:
    case Shape::ellipsoid:
      return unit(p / (s * s));
    case Shape::capsule:
      return unit({p.x, p.y, p.z - std::min(std::max(p.z, -s.z), s.z)});
    case Shape::cylinder: {
      const bool side = s.z - std::abs(p.z) > s.x - std::hypot(p.x, p.y);
      return side ? unit({p.x, p.y, 0}) : Vec3{0, 0, std::copysign(1.0f, p.z)};
    }
    case Shape::box: {
      const float x = s.x - std::abs(p.x), y = s.y - std::abs(p.y), z = s.z - std::abs(p.z);
      if (x <= y && x <= z) return {std::copysign(1.0f, p.x), 0, 0};
      if (y <= z) return {0, std::copysign(1.0f, p.y), 0};
      return {0, 0, std::copysign(1.0f, p.z)};
    }
  }
  return {0, 0, 1};
}

// Light and colour -------------------------------------------------------------------------------

// What a light adds to a point, by OpenGL's lighting equation with a local viewer.
Vec3 lit(const SceneLight& light, const SceneGeom& g, Vec3 p, Vec3 normal, Vec3 viewer) {
  Vec3 towards = -1.0f * light.dir;
  float strength = 1;
  if (!light.directional) {
    const Vec3 away = light.pos - p;
    const float distance = std::max(length(away), 1e-12f);
    towards = (1 / distance) * away;
    const float along = -dot(towards, light.dir);
    if (along < std::cos(light.cutoff * 0.017453293f)) return {0, 0, 0};
    const float* k = light.attenuation;
    strength = std::pow(std::max(along, 0.0f), light.exponent) /
               (k[0] + (k[1] + k[2] * distance) * distance);
  }
  const float facing = dot(normal, towards);
  Vec3 sum = light.ambient * g.color;
  if (facing > 0) {
    sum = sum + facing * (light.diffuse * g.color);
    const float half = dot(normal, unit(towards + unit(viewer - p)));
    const float shine = std::pow(std::max(half, 0.0f), g.shininess * 128);
    sum = sum + (g.specular * shine) * light.specular;
  }
  return strength * sum;
}

// Of a point: what cannot be in shadow, and what each light adds that can.
struct Lit {
  Vec3 base;
  Vec3 cast[kMaxLights];
};

// The row-and-column frame of the two axes that a shadow map is drawn in.
struct Frame {
  Vec3 right, up;
};

Frame frame_of(Vec3 dir) {
  Vec3 up = cross(dir, {-1, 0, 0});
  if (dot(up, up) <= 0.01f) up = cross(dir, {0, 1, 0});
  up = unit(up);
  return {cross(dir, up), up};
}

// Textures ---------------------------------------------------------------------------------------

}  // namespace

Texture::Texture(const std::uint8_t* data, Index height, Index width, bool cube) : cube_(cube) {
  const Index faces = cube ? 6 : 1;
  levels_.push_back({data, height, width});
  while (height > 1 || width > 1) {
    const Level from = levels_.back();
    height = std::max<Index>(height / 2, 1), width = std::max<Index>(width / 2, 1);
    made_.emplace_back(static_cast<std::size_t>(faces * height * width * 3));
    std::uint8_t* to = made_.back().data();
    levels_.push_back({to, height, width});
    // The middle of a texel, in the finer level's; of a half, the mean of four.
    const auto place = [](Index i, Index to_size, Index from_size, Index& first, float& rest) {
      const float at = (static_cast<float>(i) + 0.5f) * static_cast<float>(from_size) /
                           static_cast<float>(to_size) -
                       0.5f;
      first = std::min(std::max<Index>(static_cast<Index>(std::floor(at)), 0), from_size - 1);
      rest = clamp(at - static_cast<float>(first));
    };
    for (Index face = 0; face < faces; ++face) {
      const std::uint8_t* source = from.data + face * from.height * from.width * 3;
      for (Index y = 0; y < height; ++y) {
        Index y0;
        float fy;
        place(y, height, from.height, y0, fy);
        const Index y1 = std::min(y0 + 1, from.height - 1);
        for (Index x = 0; x < width; ++x) {
          Index x0;
          float fx;
          place(x, width, from.width, x0, fx);
          const Index x1 = std::min(x0 + 1, from.width - 1);
          for (Index c = 0; c < 3; ++c) {
            const auto at = [&](Index row, Index column) {
              return static_cast<float>(source[(row * from.width + column) * 3 + c]);
            };
            const float top = at(y0, x0) + fx * (at(y0, x1) - at(y0, x0));
            const float bottom = at(y1, x0) + fx * (at(y1, x1) - at(y1, x0));
            *to++ = static_cast<std::uint8_t>(top + fy * (bottom - top) + 0.5f);
          }
        }
      }
    }
  }
}

Vec3 Texture::trilinear(int face, float s, float t, float lod, bool repeat) const {
  const float last = static_cast<float>(levels_.size() - 1);
  lod = std::min(std::max(lod, 0.0f), last);
  const int first = static_cast<int>(lod);
  const auto wrapped = [repeat](Index i, Index size) {
    if (!repeat) return std::min(std::max<Index>(i, 0), size - 1);
    return i < 0 ? i + size : i >= size ? i - size : i;
  };
  const auto bilinear = [&](const Level& level) {
    const float x = s * static_cast<float>(level.width) - 0.5f,
                y = t * static_cast<float>(level.height) - 0.5f;
    const float column = std::floor(x), row = std::floor(y);
    const float fx = x - column, fy = y - row;
    const Index x0 = wrapped(static_cast<Index>(column), level.width),
                x1 = wrapped(static_cast<Index>(column) + 1, level.width),
                y0 = wrapped(static_cast<Index>(row), level.height),
                y1 = wrapped(static_cast<Index>(row) + 1, level.height);
    const auto at = [&](Index r, Index c) {
      const std::uint8_t* p = level.data + ((face * level.height + r) * level.width + c) * 3;
      return Vec3{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2])};
    };
    return mix(mix(at(y0, x0), at(y0, x1), fx), mix(at(y1, x0), at(y1, x1), fx), fy);
  };
  Vec3 color = bilinear(levels_[static_cast<std::size_t>(first)]);
  const float rest = lod - static_cast<float>(first);
  if (rest > 0) color = mix(color, bilinear(levels_[static_cast<std::size_t>(first) + 1]), rest);
  return (1 / 255.0f) * color;
}

Vec3 Texture::sample_2d(float s, float t, float lod) const {
  return trilinear(0, s - std::floor(s), t - std::floor(t), lod, true);
}

Vec3 Texture::sample_face(int face, float s, float t, float lod) const {
  return trilinear(face, s, t, lod, false);
}

namespace {

// The face of a cube map that a direction meets, its coordinates there in [-1, 1], and how they
// change with a small change of the direction (OpenGL 4.6, table 8.19).
struct CubePlace {
  int face;
  float s, t;

  explicit CubePlace(Vec3 r) {
    const float x = std::abs(r.x), y = std::abs(r.y), z = std::abs(r.z);
    const int axis = x >= y && x >= z ? 0 : y >= z ? 1 : 2;
    const float major = axis == 0 ? r.x : axis == 1 ? r.y : r.z;
    face = 2 * axis + (major < 0);
    const Vec3 on = coordinates(r);
    s = on.x / on.z, t = on.y / on.z;
  }
  // s·m, t·m and m = |major axis|, all linear in r.
  Vec3 coordinates(Vec3 r) const {
    switch (face) {
      case 0:
        return {-r.z, -r.y, r.x};
      case 1:
        return {r.z, -r.y, -r.x};
      case 2:
        return {r.x, r.z, r.y};
      case 3:
        return {r.x, -r.z, -r.y};
      case 4:
        return {r.x, -r.y, r.z};
      default:
        return {-r.x, -r.y, -r.z};
    }
  }
  // How far (s, t) moves where r becomes r + change.
  float moves(Vec3 r, Vec3 change) const {
    const Vec3 at = coordinates(r), by = coordinates(change);
    return std::hypot(by.x - s * by.z, by.y - t * by.z) / at.z;
  }
};

Vec3 sample_cube(const Texture& texture, const CubePlace& place, float moved) {
  const float texels = std::max(moved * 0.5f * texture.width(), 1e-6f);
  return texture.sample_face(place.face, 0.5f * place.s + 0.5f, 0.5f * place.t + 0.5f,
                             std::log2(texels));
}

}  // namespace

// The eye, or its image behind a mirror: pixel (x, y), y downwards, is seen along
// corner + x * right + y * down, and a distance along that is the depth.
struct RayCaster::View {
  Vec3 origin, forward, side, up;  // of length 1 and orthogonal
  Vec3 corner, right, down;
  float half_width, half_height, width, height;

  View(const SceneCamera& camera, Index rows, Index columns)
      : origin(camera.pos),
        forward(unit(camera.forward)),
        side(unit(cross(camera.forward, camera.up))),
        half_width(camera.half_width),
        half_height(camera.half_height),
        width(static_cast<float>(columns)),
        height(static_cast<float>(rows)) {
    up = cross(side, forward);
    set();
  }
  View(const View& eye, const SceneGeom& mirror) : View(eye) {
    const Vec3 normal = mirror.axes[2];
    origin = mirror.pos + mirrored(eye.origin - mirror.pos, normal);
    forward = mirrored(forward, normal), side = mirrored(side, normal), up = mirrored(up, normal);
    set();
  }
  Vec3 at(float x, float y) const { return corner + x * right + y * down; }

 private:
  void set() {
    corner = forward - half_width * side + half_height * up;
    right = (2 * half_width / width) * side, down = (-2 * half_height / height) * up;
  }
};

// What is seen of the scene from one view, by sample; a layer of the caster's scratch.
struct RayCaster::Seen {
  const View view;
  float* depth;         // [pixels, samples]
  std::int16_t* geom;   // likewise, kSky where there is none
  std::uint8_t* veils;  // [transparent geoms, pixels]: a bit a sample
};

struct RayCaster::Picture {
  const Scene& scene;
  const Effects& effects;
  const std::vector<Texture>& textures;
  std::vector<SceneGeom> faint;  // the geoms as the mirror shows them
  const Index height, width, pixels;
  const int samples;
  std::vector<bool> behind;                 // by geom: it is a plane, and its back is seen
  std::vector<std::int16_t> solid, veiled;  // geoms; the transparent ones from near to far
  std::int16_t mirror = -1;                 // the geom that reflects
  std::vector<int> casters;                 // lights that cast shadows
  std::vector<Frame> frames;                // of these

  // Colours of the pixel at hand, by view and geom.
  struct Known {
    Index pixel = -1;
    Vec3 color;
  };
  std::vector<Known> known[2];
  // The light at the corners of the cell of a plane that was asked for last, by view.
  struct Cell {
    int geom = -1, x, y;
    Lit corners[4];
  } cells[2];

  Picture(const Scene& scene_, const Effects& effects_, const std::vector<Texture>& textures_,
          Index height_, Index width_)
      : scene(scene_),
        effects(effects_),
        textures(textures_),
        height(height_),
        width(width_),
        pixels(height_ * width_),
        samples(effects_.samples) {
    const Vec3 eye = scene.camera.pos;
    std::vector<float> nearness;
    for (std::size_t i = 0; i < scene.geoms.size(); ++i) {
      const SceneGeom& g = scene.geoms[i];
      const bool plane = g.shape == Shape::plane;
      behind.push_back(plane && dot(eye - g.pos, g.axes[2]) < 0);
      nearness.push_back(plane ? 1e10f : length(g.pos - eye) - bound(g));
      const bool opaque = g.alpha >= 0.995f && !behind.back();
      (opaque ? solid : veiled).push_back(static_cast<std::int16_t>(i));
      if (mirror < 0 && effects.reflection && plane && opaque && g.reflectance > 0) {
        mirror = static_cast<std::int16_t>(i);
      }
    }
    std::stable_sort(veiled.begin(), veiled.end(), [&](std::int16_t a, std::int16_t b) {
      return nearness[static_cast<std::size_t>(a)] < nearness[static_cast<std::size_t>(b)];
    });
    for (std::size_t i = 0; effects.shadow && i < scene.lights.size(); ++i) {
      if (!scene.lights[i].casts) continue;
      casters.push_back(static_cast<int>(i));
      frames.push_back(frame_of(scene.lights[i].dir));
    }
    for (auto& colors : known) colors.resize(scene.geoms.size());
    if (mirror < 0) return;
    faint = scene.geoms;
    for (SceneGeom& g : faint) g.color = at(mirror).reflectance * g.color;
  }

  const SceneGeom& at(int geom) const { return scene.geoms[static_cast<std::size_t>(geom)]; }
  int sides(int geom) const { return behind[static_cast<std::size_t>(geom)] ? back : front; }
  // Of a sample within its pixel, y downwards: OpenGL's own pattern of four.
  Vec3 offset(int sample) const {
    constexpr float kX[] = {0.375f, 0.875f, 0.125f, 0.625f},
                    kY[] = {0.125f, 0.375f, 0.625f, 0.875f};
    if (samples == 1) return {0.5f, 0.5f, 0};
    return {kX[sample], 1 - kY[sample], 0};
  }

  struct Rect {
    Index left, right, top, bottom;
  };

  // The pixels that a geom may cover: those of the balls that it is within the hull of.
  Rect around(const View& view, const SceneGeom& g) const {
    const auto [balls, count, radius] = hull(g);
    constexpr float kMargin = 0.01f;
    const float columns = view.width, rows = view.height;
    float left = columns, right = 0, top = rows, bottom = 0;
    for (int i = 0; i < count; ++i) {
      const Vec3 to = g.pos + to_world(g, balls[static_cast<std::size_t>(i)]) - view.origin;
      const float z = dot(to, view.forward);
      if (z < 1.001f * radius + scene.camera.near) return {0, width, 0, height};
      // Where the planes through the eye that touch the ball meet the image.
      const auto extend = [z, radius = radius](float x, float half, float size, float& low,
                                               float& high) {
        const float scale = size / (2 * half * (z * z - radius * radius));
        const float reach = scale * radius * std::sqrt(x * x + z * z - radius * radius);
        const float middle = 0.5f * size + scale * x * z;
        low = std::min(low, middle - reach - kMargin);
        high = std::max(high, middle + reach + kMargin);
      };
      extend(dot(to, view.side), view.half_width, columns, left, right);
      extend(-dot(to, view.up), view.half_height, rows, top, bottom);
    }
    const auto within = [](float at, float size) {
      return static_cast<Index>(std::min(std::max(at, 0.0f), size));
    };
    return {within(left, columns), within(std::ceil(right), columns), within(top, rows),
            within(std::ceil(bottom), rows)};
  }

  // A view's rays in a geom's own frame: of one place in the image always the same bits, so that
  // whoever asks again where a geom is entered gets the same answer.
  struct LocalRays {
    Vec3 origin, corner, right, down;

    LocalRays(const View& view, const SceneGeom& g)
        : origin(to_local(g, view.origin - g.pos)),
          corner(to_local(g, view.corner)),
          right(to_local(g, view.right)),
          down(to_local(g, view.down)) {}
    Vec3 at(float x, float y) const { return corner + x * right + y * down; }
  };

  // Calls body(sample's index, pixel, bit, t) where a geom is entered, in a view.
  template <class Body>
  void cast(const View& view, int index, const Body& body) const {
    const SceneGeom& g = at(index);
    const Rect rect = around(view, g);
    const LocalRays rays(view, g);
    const int facing = sides(index);
    for (Index y = rect.top; y < rect.bottom; ++y) {
      for (Index x = rect.left; x < rect.right; ++x) {
        for (int s = 0; s < samples; ++s) {
          const Vec3 in = offset(s);
          const Vec3 d = rays.at(static_cast<float>(x) + in.x, static_cast<float>(y) + in.y);
          const float t = enter(g, rays.origin, d, facing);
          if (t != kNever) body((y * width + x) * samples + s, y * width + x, 1 << s, t);
        }
      }
    }
  }

  // eye: what was seen without a mirror, where this is the view in it.
  void look(const Seen& seen, const Seen* eye) const {
    const float near = scene.camera.near;
    std::fill_n(seen.depth, pixels * samples, scene.camera.far);
    std::fill_n(seen.geom, pixels * samples, kSky);
    std::fill_n(seen.veils, pixels * static_cast<Index>(veiled.size()), std::uint8_t{0});
    const auto begins = [&](Index sample) {
      if (eye == nullptr) return near;
      return eye->geom[sample] == mirror ? eye->depth[sample] : kNever;
    };
    for (const std::int16_t geom : solid) {
      if (eye != nullptr && geom == mirror) continue;
      cast(seen.view, geom, [&](Index sample, Index, int, float t) {
        if (t < seen.depth[sample] && t > begins(sample)) {
          seen.depth[sample] = t, seen.geom[sample] = geom;
        }
      });
    }
    for (std::size_t i = 0; i < veiled.size(); ++i) {
      std::uint8_t* veil = seen.veils + static_cast<Index>(i) * pixels;
      cast(seen.view, veiled[i], [&](Index sample, Index pixel, int bit, float t) {
        if (t < seen.depth[sample] && t > begins(sample)) {
          veil[pixel] = static_cast<std::uint8_t>(veil[pixel] | bit);
        }
      });
    }
  }

  // together: all lights as one, without shadows.
  Lit light_at(const SceneGeom& g, Vec3 p, Vec3 normal, Vec3 viewer, bool together) const {
    Lit sum{g.emission * g.color, {}};
    std::size_t caster = 0;
    for (const SceneLight& light : scene.lights) {
      const Vec3 part = lit(light, g, p, normal, viewer);
      if (together || !light.casts || casters.empty()) {
        sum.base = sum.base + part;
      } else {
        sum.cast[caster++] = clamp(part);
      }
    }
    sum.base = clamp(sum.base);
    return sum;
  }

  // On a plane light is computed at the corners of its grid and interpolated in two triangles.
  Lit light_on_plane(const SceneGeom& g, int index, Vec3 local, Vec3 viewer, bool together,
                     Cell& cell) const {
    const float size[] = {g.size.x, g.size.y}, p[] = {local.x, local.y};
    int place[2];
    float low[2], high[2];
    for (int k = 0; k < 2; ++k) {
      const GridAxis& axis = g.grid[k];
      const float from = -size[k] + axis.pad;
      place[k] = 1 + static_cast<int>(std::floor((p[k] - from) / axis.step));
      place[k] = std::min(std::max(place[k], 0), axis.cells - 1);
      low[k] = place[k] == 0 ? -size[k] : from + static_cast<float>(place[k] - 1) * axis.step;
      high[k] = place[k] == 0 ? from : place[k] == axis.cells - 1 ? size[k] : low[k] + axis.step;
    }
    if (cell.geom != index || cell.x != place[0] || cell.y != place[1]) {
      cell.geom = index, cell.x = place[0], cell.y = place[1];
      const float x[] = {low[0], high[0], high[0], low[0]},
                  y[] = {low[1], low[1], high[1], high[1]};
      for (int i = 0; i < 4; ++i) {
        const Vec3 corner = g.pos + to_world(g, {x[i], y[i], 0});
        cell.corners[i] = light_at(g, corner, g.axes[2], viewer, together);
      }
    }
    const float a = clamp((p[0] - low[0]) / std::max(high[0] - low[0], 1e-9f)),
                b = clamp((p[1] - low[1]) / std::max(high[1] - low[1], 1e-9f));
    const Lit* c = cell.corners;
    const auto between = [&](Vec3 c0, Vec3 c1, Vec3 c2, Vec3 c3) {
      if (a + b <= 1) return c0 + a * (c1 - c0) + b * (c3 - c0);
      return c2 + (1 - a) * (c3 - c2) + (1 - b) * (c1 - c2);
    };
    Lit sum{between(c[0].base, c[1].base, c[2].base, c[3].base), {}};
    for (std::size_t i = 0; i < casters.size(); ++i) {
      sum.cast[i] = between(c[0].cast[i], c[1].cast[i], c[2].cast[i], c[3].cast[i]);
    }
    return sum;
  }

  // Whether something is between a light and a point of a geom, where a shadow map would show it.
  bool in_shadow(std::size_t caster, int self, Vec3 p) const {
    const SceneLight& light = scene.lights[static_cast<std::size_t>(casters[caster])];
    const Frame& frame = frames[caster];
    const Vec3 to = p - light.pos;
    const float z = dot(to, light.dir);
    if (z <= scene.camera.near) return false;
    const float angle = std::min(2 * light.cutoff * scene.shadow_map.scale, 160.0f);
    const float reach =
        light.directional ? scene.shadow_map.clip : z * std::tan(0.5f * angle * 0.017453293f);
    if (std::abs(dot(to, frame.right)) > reach || std::abs(dot(to, frame.up)) > reach) return false;
    const Vec3 from = light.directional ? p - z * light.dir : light.pos, along = p - from;
    const float far = dot(along, along), least = scene.camera.near / z;
    for (std::size_t i = 0; i < scene.geoms.size(); ++i) {
      const SceneGeom& g = scene.geoms[i];
      if (static_cast<int>(i) == self || !g.casts) continue;
      if (g.shape != Shape::plane) {  // does the way pass its bounding sphere?
        const Vec3 middle = g.pos - from;
        const float at = std::min(std::max(dot(middle, along) / far, 0.0f), 1.0f), r = bound(g);
        const Vec3 off = middle - at * along;
        if (dot(off, off) > r * r) continue;
      }
      const float t = enter(g, to_local(g, from - g.pos), to_local(g, along), front | back);
      if (t > least && t < 0.999f) return true;
    }
    return false;
  }

  Vec3 texture_of(const View& view, const SceneGeom& g, Vec3 local, float x, float y,
                  float t) const {
    if (g.texture < 0) return {1, 1, 1};
    const Texture& texture = textures[static_cast<std::size_t>(g.texture)];
    if (texture.cube()) {
      const Vec3 scale = g.texture_uniform ? Vec3{1, 1, 1} : g.size, r = local / scale;
      const CubePlace place(r);
      const float least = std::min({scale.x, scale.y, scale.z});
      const float major = std::max({std::abs(r.x), std::abs(r.y), std::abs(r.z)});
      return sample_cube(texture, place, t * length(view.right) / (least * major));
    }
    const float scale_s = 0.5f * g.repeat[0] / (g.texture_uniform ? 1 : g.size.x),
                scale_t = 0.5f * g.repeat[1] / (g.texture_uniform ? 1 : g.size.y);
    const Vec3 o = to_local(g, view.origin - g.pos);
    float texels = 1e-6f;
    for (const Vec3 next : {view.at(x + 1, y), view.at(x, y + 1)}) {
      const Vec3 d = to_local(g, next);
      const float there = d.z == 0 ? kNever : -o.z / d.z;
      if (!(there > 0 && there < 1e6f)) return texture.sample_2d(0, 0, 1e3f);  // the horizon
      const float s = scale_s * (o.x + there * d.x - local.x) * texture.width(),
                  u = scale_t * (o.y + there * d.y - local.y) * texture.height();
      texels = std::max(texels, std::hypot(s, u));
    }
    return texture.sample_2d(scale_s * (local.x + g.size.x), scale_t * (g.size.y - local.y),
                             std::log2(texels));
  }

  // The colour of a geom at a pixel: of its middle if the geom is there, else of the sample.
  // layer: 0, or 1 in the mirror. together: as in light_at.
  Vec3 color_at(const View& view, int layer, int index, Index column, Index row, int sample,
                bool together) {
    const SceneGeom& g = layer == 0 ? at(index) : faint[static_cast<std::size_t>(index)];
    const LocalRays rays(view, g);
    const Vec3 in = offset(sample);
    float x = static_cast<float>(column) + 0.5f, y = static_cast<float>(row) + 0.5f;
    float t = enter(g, rays.origin, rays.at(x, y), sides(index));
    if (!(t > scene.camera.near && t < scene.camera.far)) {
      x = static_cast<float>(column) + in.x, y = static_cast<float>(row) + in.y;
      t = enter(g, rays.origin, rays.at(x, y), sides(index));
    }
    const Vec3 local = rays.origin + t * rays.at(x, y), p = g.pos + to_world(g, local);
    const Lit light = g.shape == Shape::plane
                          ? light_on_plane(g, index, local, view.origin, together, cells[layer])
                          : light_at(g, p, to_world(g, normal_at(g, local)), view.origin, together);
    const Vec3 texture = texture_of(view, g, local, x, y, t);
    Vec3 sum = light.base * texture;
    if (together) return sum;
    for (std::size_t i = 0; i < casters.size(); ++i) {
      const Vec3 part = light.cast[i];
      if (part.x + part.y + part.z > 0 && !in_shadow(i, index, p)) sum = sum + part * texture;
    }
    return clamp(sum);
  }

  Vec3 sky_at(const View& view, Index column, Index row) const {
    if (!effects.sky || scene.sky == nullptr) return {0, 0, 0};
    const auto turned = [](Vec3 d) { return Vec3{d.x, d.z, -d.y}; };
    const Vec3 r =
        turned(view.at(static_cast<float>(column) + 0.5f, static_cast<float>(row) + 0.5f));
    const CubePlace place(r);
    const float moved =
        std::max(place.moves(r, turned(view.right)), place.moves(r, turned(view.down)));
    return sample_cube(*scene.sky, place, moved);
  }

  // All transparent geoms in front of a sample, near to far and back again.
  template <class Color>
  Vec3 veil(const Seen& seen, Index pixel, int sample, Vec3 behind_them, const Color& color) const {
    const auto over = [&](std::size_t i) {
      if (!(seen.veils[static_cast<Index>(i) * pixels + pixel] >> sample & 1)) return;
      const int index = veiled[i];
      const float alpha = at(index).alpha * (behind[static_cast<std::size_t>(index)] ? 0.3f : 1.0f);
      behind_them = mix(behind_them, color(index), alpha);
    };
    for (std::size_t i = 0; i < veiled.size(); ++i) over(i);
    for (std::size_t i = veiled.size(); i-- > 0;) over(i);
    return behind_them;
  }

  // seen: from the eye and, if there is a mirror, in it.
  void paint(const Seen* seen, std::uint8_t* out) {
    for (Index row = 0; row < height; ++row) {
      for (Index column = 0; column < width; ++column) {
        const Index pixel = row * width + column;
        Vec3 sum{0, 0, 0}, sky{0, 0, 0};
        bool sky_known = false;
        for (int s = 0; s < samples; ++s) {
          const auto seen_in = [&](int layer, bool together) {
            return [&, layer, together](int index) {
              Known& color = known[layer][static_cast<std::size_t>(index)];
              if (color.pixel != pixel) {
                color = {pixel, color_at(seen[layer].view, layer, index, column, row, s, together)};
              }
              return color.color;
            };
          };
          const std::int16_t geom = seen[0].geom[pixel * samples + s];
          Vec3 color;
          if (geom != kSky) {
            color = seen_in(0, false)(geom);
          } else {
            if (!sky_known) sky = sky_at(seen[0].view, column, row), sky_known = true;
            color = sky;
          }
          if (geom != kSky && geom == mirror) {
            const std::int16_t there = seen[1].geom[pixel * samples + s];
            const Vec3 image = there == kSky ? Vec3{0, 0, 0} : seen_in(1, true)(there);
            color = clamp(color + veil(seen[1], pixel, s, image, seen_in(1, true)));
          }
          sum = sum + veil(seen[0], pixel, s, color, seen_in(0, true));
        }
        sum = clamp((1.0f / static_cast<float>(samples)) * sum);
        for (const float value : {sum.x, sum.y, sum.z}) {
          *out++ = static_cast<std::uint8_t>(255 * value + 0.5f);
        }
      }
    }
  }
};

void RayCaster::draw(const Scene& scene, const Effects& effects, Index height, Index width,
                     std::uint8_t* pixels, RayScratch& scratch) const {
  Picture picture(scene, effects, textures_, height, width);
  const std::size_t size = static_cast<std::size_t>(picture.pixels),
                    samples = size * static_cast<std::size_t>(picture.samples);
  const auto layer = [&](int i, const View& view) {
    scratch.depth[i].resize(samples);
    scratch.geom[i].resize(samples);
    scratch.veils[i].resize(size * picture.veiled.size());
    return Seen{view, scratch.depth[i].data(), scratch.geom[i].data(), scratch.veils[i].data()};
  };
  const View eye(scene.camera, height, width);
  const bool mirrors = picture.mirror >= 0;
  const Seen seen[] = {layer(0, eye),
                       layer(1, mirrors ? View(eye, picture.at(picture.mirror)) : eye)};
  picture.look(seen[0], nullptr);
  if (mirrors) picture.look(seen[1], &seen[0]);
  picture.paint(seen, pixels);
}

}  // namespace fastdreamer
