#include "cpu/choice.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>

#include "common/check.h"
#include "cpu/cpuid.h"

namespace fastdreamer {
namespace {

constexpr double kMargin = 1.1;  // what is to replace another must be faster by more than a tenth
constexpr int kRounds = 8;       // the best counts: noise only lowers a rate
constexpr auto kTurn = std::chrono::microseconds(50);

std::optional<Choice> settled;

// What a variable of the environment says, or null.
const char* setting(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? nullptr : value;
}

std::optional<Isa> forced_isa() {
  const char* forced = setting("FASTDREAMER_ISA");
  if (forced == nullptr) return std::nullopt;
  std::string all, host, reason;
  for (Isa isa : kIsas) {
    const bool named = std::string(forced) == isa_name(isa);
    if (named && host_has(isa)) return isa;
    if (named) reason = ": " + why_not(isa, host_facts());
    all += std::string(all.empty() ? "" : ", ") + isa_name(isa);
    if (!is_emulated(isa) && host_has(isa)) {
      host += std::string(host.empty() ? "" : ", ") + isa_name(isa);
    }
  }
  fail("FASTDREAMER_ISA is '" + std::string(forced) + "'; this machine has " + host +
       " (the names are " + all + ")" + reason);
}

std::optional<Precision> forced_arithmetic() {
  const char* forced = setting("FASTDREAMER_ARITHMETIC");
  if (forced == nullptr) return std::nullopt;
  if (std::string(forced) == "fp32") return Precision::fp32;
  if (std::string(forced) == "bf16") return Precision::bf16;
  fail("FASTDREAMER_ARITHMETIC is '" + std::string(forced) + "'; it takes fp32 or bf16");
}

double rate(const Kernels& k) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto spent = Clock::duration::zero();
  double flop = 0;
  while (spent < kTurn) {
    flop += k.peak(256);
    spent = Clock::now() - start;
  }
  return flop / std::chrono::duration<double>(spent).count() * 1e-9;
}

// All take turns: the clock's ramp and a neighbour's load meet every one of them.
std::vector<Rates> measure() {
  const std::optional<Isa> forced = forced_isa();
  std::vector<Rates> found;
  for (Isa isa : kIsas) {
    if (host_has(isa) && (!is_emulated(isa) || isa == forced)) found.push_back({isa, {0, 0}});
  }
  for (int round = 0; round < kRounds; ++round) {
    for (Rates& one : found) {
      for (Precision p : {Precision::fp32, Precision::bf16}) {
        double& best = one.gflops[static_cast<int>(p)];
        best = std::max(best, rate(kernels(one.isa, p)));
      }
    }
  }
  return found;
}

Choice decide() {
  if (settled) return *settled;
  const std::optional<Isa> isa = forced_isa();
  const std::optional<Precision> arithmetic = forced_arithmetic();
  return choose(rates(), isa ? &*isa : nullptr, arithmetic ? &*arithmetic : nullptr);
}

}  // namespace

bool operator==(const Choice& a, const Choice& b) {
  return a.isa[0] == b.isa[0] && a.isa[1] == b.isa[1] && a.for_bf16 == b.for_bf16;
}

Choice choose(const std::vector<Rates>& rates, const Isa* isa, const Precision* arithmetic) {
  Choice made{};
  double best[2] = {0, 0};
  for (int p : {0, 1}) {
    for (auto one = rates.rbegin(); one != rates.rend(); ++one) {
      if (isa != nullptr ? one->isa != *isa : one->gflops[p] <= kMargin * best[p]) continue;
      made.isa[p] = one->isa;
      best[p] = one->gflops[p];
    }
    if (best[p] == 0) fail("choose: no rates of such an instruction set");
  }
  const bool as_asked = isa != nullptr || best[0] <= kMargin * best[1];
  made.for_bf16 = as_asked ? Precision::bf16 : Precision::fp32;
  if (arithmetic != nullptr) made.for_bf16 = *arithmetic;
  return made;
}

Precision faster(const std::vector<Rates>& rates, const Choice& made) {
  double best[2] = {0, 0};
  for (const Rates& one : rates) {
    for (int p : {0, 1}) {
      if (one.isa == made.isa[p]) best[p] = one.gflops[p];
    }
  }
  const bool pays = made.for_bf16 == Precision::bf16 && best[1] > kMargin * best[0];
  return pays ? Precision::bf16 : Precision::fp32;
}

const std::vector<Rates>& rates() {
  static const std::vector<Rates> measured = measure();  // a throw leaves it unset
  return measured;
}

const Choice& choice() {
  static const Choice made = decide();  // likewise
  return made;
}

void settle(const Choice& made) {
  for (Isa isa : made.isa) {
    if (!host_has(isa)) fail(std::string("settle: this machine lacks ") + isa_name(isa));
  }
  settled = made;
  if (!(choice() == made)) fail("settle: another choice is in force already");
}

}  // namespace fastdreamer
