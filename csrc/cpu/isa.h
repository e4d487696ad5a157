// Which instruction set the kernels use: the best that the host has, or FASTDREAMER_ISA.
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

// The instruction set in force, read once per process: FASTDREAMER_ISA if set and not empty, else
// the best of the host, never an emulated one. Throws invalid_argument for an unknown name or one
// that the host lacks, with the reason.
Isa active_isa();

}  // namespace fastdreamer
