#include "cuda/loop.h"

#include <cstring>
#include <limits>

#include "common/check.h"

namespace fastdreamer {
namespace {

Index value_of(const Affine& affine, const std::vector<Index>& indices) {
  Index total = affine.base;
  for (const Term& term : affine.terms) {
    Index at = term.start + term.step * indices[static_cast<std::size_t>(term.depth)];
    if (term.modulo > 0) at = (at % term.modulo + term.modulo) % term.modulo;
    total += term.stride * at;
  }
  return total;
}

}  // namespace

Loop::Loop(std::shared_ptr<const Device> device, std::vector<Index> slots)
    : device_(std::move(device)),
      slots_(std::move(slots)),
      graph_(device_) {}

void Loop::begin(Index count) {
  if (unrolled_) fail("Loop: it has been replayed and cannot be added to");
  if (count < 0) fail("Loop: a count must not be negative, got " + std::to_string(count));
  items_.push_back({Item::begins, count, nullptr, {}, {}});
  ++open_;
}

void Loop::end() {
  if (open_ == 0) fail("Loop: end() without begin()");
  items_.push_back({Item::ends, 0, nullptr, {}, {}});
  --open_;
}

void Loop::launch(std::shared_ptr<const Kernel> kernel, std::array<unsigned, 3> grid,
                  const std::vector<Argument>& arguments) {
  if (unrolled_) fail("Loop: it has been replayed and cannot be added to");
  const std::string& name = kernel->name();
  if (&kernel->device() != device_.get()) fail(name + ": was loaded for another device");
  if (arguments.size() != kernel->kinds().size()) {
    fail(name + ": takes " + std::to_string(kernel->kinds().size()) + " arguments, got " +
         std::to_string(arguments.size()));
  }
  for (unsigned size : grid) {
    if (size < 1) fail(name + ": a grid's sizes must be positive");
  }
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const Argument& argument = arguments[i];
    const std::string which = name + ": argument " + std::to_string(i);
    if (argument.kind != kernel->kinds()[i]) fail(which + " is not of the parameter's type");
    if (argument.kind == Kind::pointer &&
        (argument.slot < 0 || argument.slot >= static_cast<int>(slots_.size()))) {
      fail(which + " points into no slot");
    }
    for (const Term& term : argument.offset.terms) {
      if (term.depth < 0 || term.depth >= open_) fail(which + " uses a loop that is not open");
    }
  }
  items_.push_back({Item::launches, 0, std::move(kernel), grid, arguments});
}

void Loop::unroll() {
  if (open_ != 0) fail("Loop: begin() without end()");
  steps_.clear();
  values_.clear();
  uses_.assign(slots_.size(), {});
  std::vector<Index> indices;
  for (std::size_t i = 0; i < items_.size();) i = unroll_from(i, indices);
  if (steps_.empty()) fail("Loop: there is nothing to launch");
  params_.resize(values_.size());
  for (std::size_t i = 0; i < values_.size(); ++i) params_[i] = &values_[i];
  unrolled_ = true;
}

// Adds the steps of one item, a loop's body included; returns the place behind it.
std::size_t Loop::unroll_from(std::size_t item, std::vector<Index>& indices) {
  if (items_[item].what == Item::launches) {
    add_step(items_[item], indices);
    return item + 1;
  }
  std::size_t behind = item + 1;
  for (int depth = 1; depth > 0; ++behind) {
    if (items_[behind].what == Item::begins) ++depth;
    if (items_[behind].what == Item::ends) --depth;
  }
  for (Index i = 0; i < items_[item].count; ++i) {
    indices.push_back(i);
    for (std::size_t at = item + 1; at < behind - 1;) at = unroll_from(at, indices);
    indices.pop_back();
  }
  return behind;
}

void Loop::add_step(const Item& item, const std::vector<Index>& indices) {
  const Kernel& kernel = *item.kernel;
  const std::size_t first = values_.size();
  for (const Argument& argument : item.arguments) {
    const Index value = value_of(argument.offset, indices);
    const auto refuse = [&](const char* what) {
      fail(kernel.name() + ": argument " + std::to_string(values_.size() - first) + " " + what +
           ", its value is " + std::to_string(value));
    };
    std::uint64_t bits = 0;  // little-endian: the value's bytes come first
    switch (argument.kind) {
      case Kind::pointer: {
        const auto slot = static_cast<std::size_t>(argument.slot);
        if (value < 0 || value >= slots_[slot]) refuse("leaves its slot");
        uses_[slot].push_back({steps_.size(), values_.size(), value});
        break;
      }
      case Kind::i32: {
        if (value < std::numeric_limits<std::int32_t>::min() ||
            value > std::numeric_limits<std::int32_t>::max()) {
          refuse("does not fit 32 bits");
        }
        const auto narrow = static_cast<std::int32_t>(value);
        std::memcpy(&bits, &narrow, sizeof(narrow));
        break;
      }
      case Kind::u8: {
        if (value < 0 || value > 1) refuse("is no truth value");
        bits = static_cast<std::uint64_t>(value);
        break;
      }
      case Kind::i64:
        std::memcpy(&bits, &value, sizeof(value));
        break;
      case Kind::f32:
        std::memcpy(&bits, &argument.number, sizeof(argument.number));
        break;
    }
    values_.push_back(bits);
  }
  values_.resize(values_.size() + static_cast<std::size_t>(kernel.hidden()), 0);
  steps_.push_back({item.kernel.get(), item.grid, first, values_.size() - first});
}

Node Loop::node(const Step& step) {
  return {step.kernel, {step.grid[0], step.grid[1], step.grid[2]}, &params_[step.first]};
}

void Loop::write_addresses(const std::vector<std::uint64_t>& slots, std::vector<bool>& changed) {
  for (std::size_t s = 0; s < slots.size(); ++s) {
    if (!addresses_.empty() && addresses_[s] == slots[s]) continue;
    for (const Use& use : uses_[s]) {
      values_[use.value] = slots[s] + static_cast<std::uint64_t>(use.offset);
      changed[use.step] = true;
    }
  }
}

void Loop::expect(const std::vector<std::uint64_t>& slots) const {
  if (slots.size() != slots_.size()) {
    fail("Loop: there are " + std::to_string(slots_.size()) + " slots, got " +
         std::to_string(slots.size()) + " addresses");
  }
  for (std::uint64_t address : slots) {
    if (address == 0) fail("Loop: a slot's address is null");
  }
}

void Loop::enqueue(const std::vector<std::uint64_t>& slots, cu::Stream stream) {
  expect(slots);
  const std::lock_guard<std::mutex> lock(replaying_);
  if (!unrolled_) unroll();
  std::vector<bool> changed(steps_.size());
  write_addresses(slots, changed);
  addresses_.clear();  // the graph's nodes have others
  device_->run([&] {
    for (const Step& step : steps_) node(step).launch(stream);
  });
}

std::size_t Loop::replay(const std::vector<std::uint64_t>& slots, cu::Stream stream) {
  expect(slots);
  const std::lock_guard<std::mutex> lock(replaying_);
  if (!unrolled_) unroll();
  std::size_t written = 0;
  if (addresses_ != slots || !graph_.captured()) {
    std::vector<bool> changed(steps_.size());
    write_addresses(slots, changed);
    // Should a call fail, some nodes have the new addresses and some do not: then the next call
    // writes all of them.
    addresses_.clear();
    if (!graph_.captured()) {
      std::vector<Node> nodes;
      nodes.reserve(steps_.size());
      for (const Step& step : steps_) nodes.push_back(node(step));
      graph_.capture(nodes);
      written = nodes.size();
    } else {
      device_->run([&] {
        for (std::size_t i = 0; i < steps_.size(); ++i) {
          if (!changed[i]) continue;
          graph_.update(i, node(steps_[i]));
          ++written;
        }
      });
    }
    addresses_ = slots;
  }
  graph_.launch(stream);
  return written;
}

}  // namespace fastdreamer
