// Errors that reach the user. Only code compiled for the baseline ISA may include this.
#pragma once

#include <stdexcept>
#include <string>

namespace fastdreamer {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace fastdreamer
