#include "bindings/rays.h"

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/array.h"
#include "bindings/gil.h"
#include "common/check.h"
#include "cpu/rays.h"

namespace fastdreamer {
namespace {

constexpr Index kGeom = 35, kLight = 22, kCamera = 15;  // numbers of a row

// Reads the numbers of a row one after the other.
class Row {
 public:
  explicit Row(const float* data) : next_(data) {}

  float number() { return *next_++; }
  bool flag() { return number() != 0; }
  Vec3 vec() {
    const float x = number(), y = number();
    return {x, y, number()};
  }

 private:
  const float* next_;
};

const float* finite(Arrays& arrays, const char* name, py::handle object, Index rows,
                    Index columns) {
  const float* data = arrays.in(name, object, {rows, columns});
  for (Index i = 0; i < rows * columns; ++i) {
    if (!std::isfinite(data[i])) fail(std::string("RayCaster: ") + name + " must be finite");
  }
  return data;
}

Index rows_of(const char* name, py::handle object) {
  const Array array("RayCaster", name, object);
  if (array.ndim() != 2) fail(std::string("RayCaster: ") + name + " must have 2 dimensions");
  return array.size(0);
}

SceneGeom geom_of(Row row, Index textures) {
  SceneGeom g;
  const int shape = static_cast<int>(row.number());
  if (shape != 0 && (shape < 2 || shape > 6)) {
    fail("RayCaster: there is no shape " + std::to_string(shape));
  }
  g.shape = static_cast<Shape>(shape);
  g.texture = static_cast<int>(row.number());
  if (g.texture < -1 || g.texture >= textures) fail("RayCaster: there is no such texture");
  g.texture_uniform = row.flag(), g.casts = row.flag();
  g.pos = row.vec(), g.size = row.vec();
  const Vec3 x = row.vec(), y = row.vec(), z = row.vec();  // rows of the rotation
  g.axes = {Vec3{x.x, y.x, z.x}, Vec3{x.y, y.y, z.y}, Vec3{x.z, y.z, z.z}};
  g.color = row.vec(), g.alpha = row.number();
  g.emission = row.number(), g.specular = row.number(), g.shininess = row.number();
  g.reflectance = row.number();
  for (float& repeat : g.repeat) repeat = row.number();
  bool good = g.size.x > 0 && g.size.y > 0 && g.size.z > 0;
  for (GridAxis& axis : g.grid) {
    axis.pad = row.number(), axis.step = row.number();
    axis.cells = static_cast<int>(row.number());
    good = good && (g.shape != Shape::plane || (axis.step > 0 && axis.cells >= 2));
  }
  if (!good) fail("RayCaster: a geom's size, and a plane's grid, must be positive");
  return g;
}

SceneLight light_of(Row row) {
  SceneLight light;
  light.directional = row.flag(), light.casts = row.flag();
  light.pos = row.vec(), light.dir = row.vec();
  light.ambient = row.vec(), light.diffuse = row.vec(), light.specular = row.vec();
  for (float& k : light.attenuation) k = row.number();
  light.cutoff = row.number(), light.exponent = row.number();
  return light;
}

// Holds the textures' arrays, whose first level is read where it lies.
class PyRayCaster {
 public:
  // textures: a (uint8 [height, width, 3], or [6 size, size, 3] of a cube; is it a cube) each.
  // sky: index of a cube, or -1.
  PyRayCaster(const py::list& textures, int sky) : sky_(sky) {
    std::vector<Texture> made;
    for (const py::handle item : textures) {
      const py::tuple pair = item.cast<py::tuple>();
      const bool cube = pair[1].cast<bool>();
      const Array shape("RayCaster", "texture", pair[0]);
      if (shape.ndim() != 3 || shape.size(0) < 1 || shape.size(1) < 1 ||
          (cube && shape.size(0) != 6 * shape.size(1))) {
        fail("RayCaster: a texture must be [height, width, 3], of a cube [6 size, size, 3]");
      }
      const Index height = shape.size(0), width = shape.size(1);
      const void* data = arrays_.in_format("texture", pair[0], {height, width, 3}, 'B');
      made.emplace_back(static_cast<const std::uint8_t*>(data), cube ? width : height, width, cube);
    }
    if (sky < -1 || sky >= static_cast<int>(made.size()) ||
        (sky >= 0 && !made[static_cast<std::size_t>(sky)].cube())) {
      fail("RayCaster: sky must be the index of a cube, or -1");
    }
    caster_ = std::make_unique<RayCaster>(std::move(made));
  }

  // Rows as in geom_of and light_of; camera: see below. pixels: uint8 [height, width, 3].
  void draw(py::handle geoms, py::handle lights, py::handle camera, py::handle pixels, int samples,
            bool reflection, bool shadow, bool sky) {
    const Array image("RayCaster", "pixels", pixels);
    if (image.ndim() != 3 || image.size(0) < 1 || image.size(1) < 1) {
      fail("RayCaster: pixels must be [height, width, 3], none of them 0");
    }
    const Index height = image.size(0), width = image.size(1);
    if (samples != 1 && samples != 4) fail("RayCaster: samples must be 1 or 4");
    Arrays arrays("RayCaster");
    Scene scene;
    const Index geom_count = rows_of("geoms", geoms), light_count = rows_of("lights", lights);
    if (geom_count > 32767) fail("RayCaster: at most 32767 geoms");
    if (light_count > static_cast<Index>(kMaxLights)) {
      fail("RayCaster: at most " + std::to_string(kMaxLights) + " lights");
    }
    const float* data = finite(arrays, "geoms", geoms, geom_count, kGeom);
    for (Index i = 0; i < geom_count; ++i) {
      scene.geoms.push_back(
          geom_of(Row(data + i * kGeom), static_cast<Index>(caster_->textures().size())));
    }
    data = finite(arrays, "lights", lights, light_count, kLight);
    for (Index i = 0; i < light_count; ++i)
      scene.lights.push_back(light_of(Row(data + i * kLight)));
    Row row(finite(arrays, "camera", camera, 1, kCamera));
    SceneCamera& c = scene.camera;
    c.pos = row.vec(), c.forward = row.vec(), c.up = row.vec();
    c.half_width = row.number(), c.half_height = row.number();
    c.near = row.number(), c.far = row.number();
    scene.shadow_map.scale = row.number(), scene.shadow_map.clip = row.number();
    if (!(c.half_width > 0 && c.half_height > 0 && c.near > 0 && c.far > c.near)) {
      fail("RayCaster: the camera's sizes must be positive, and far beyond near");
    }
    scene.sky = sky_ < 0 ? nullptr : &caster_->textures()[static_cast<std::size_t>(sky_)];
    auto* out =
        static_cast<std::uint8_t*>(arrays.out_format("pixels", pixels, {height, width, 3}, 'B'));
    arrays.check_overlap();
    RayScratch scratch = take_scratch();
    {
      const WithoutGil released;
      caster_->draw(scene, {samples, reflection, shadow, sky}, height, width, out, scratch);
    }
    idle_.push_back(std::move(scratch));
  }

 private:
  RayScratch take_scratch() {
    if (idle_.empty()) return {};
    RayScratch scratch = std::move(idle_.back());
    idle_.pop_back();
    return scratch;
  }

  Arrays arrays_{"RayCaster"};
  int sky_;
  std::unique_ptr<RayCaster> caster_;
  // That of no picture at the moment, for the next ones: several threads may draw at once. It
  // changes with the GIL held, so that a fork never finds it half changed.
  std::vector<RayScratch> idle_;
};

}  // namespace

void bind_rays(py::module_& m) {
  py::class_<PyRayCaster>(m, "RayCaster", "Pictures by rays; see csrc/cpu/rays.h.")
      .def(py::init<const py::list&, int>(), py::arg("textures"), py::arg("sky"))
      .def("draw", &PyRayCaster::draw, py::arg("geoms"), py::arg("lights"), py::arg("camera"),
           py::arg("pixels"), py::arg("samples"), py::arg("reflection"), py::arg("shadow"),
           py::arg("sky"));
  m.attr("MAX_LIGHTS") = kMaxLights;
}

}  // namespace fastdreamer
