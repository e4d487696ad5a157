// The instruction sets that there are kernels for, and which of them the host has.
#pragma once

#if defined(__x86_64__)
#  define FD_X86 1
#else
#  define FD_X86 0
#endif

namespace fastdreamer {

// Each includes those before it, but for the last: the kernels of amx with AMX's instructions
// emulated in avx512bf16, which tests ask for by name.
enum class Isa { scalar, avx2, avx512, avx512bf16, amx, amx_emulated };
constexpr Isa kIsas[] = {Isa::scalar,     Isa::avx2, Isa::avx512,
                         Isa::avx512bf16, Isa::amx,  Isa::amx_emulated};

// Whether it is no CPU's, and never chosen unless by name.
constexpr bool is_emulated(Isa isa) { return isa == Isa::amx_emulated; }

// The name that FASTDREAMER_ISA takes.
const char* isa_name(Isa isa);

// Whether CPU and operating system (its saved registers) both support `isa`.
bool host_has(Isa isa);

}  // namespace fastdreamer
