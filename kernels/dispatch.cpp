// The exported C functions. Each calls the build of its kernel for the best instruction set that both the processor
// and the operating system support; LIBI_FAST_ISA=generic|v3|v4 asks for a lower one.
//
//   v3   x86-64-v3: AVX2 and FMA.      v4   x86-64-v4: AVX-512 F, BW, CD, DQ, VL.      generic   anything else.
#include <cstdlib>
#include <cstring>

#include "entry_points.hpp"

#if defined(_WIN32)
#define LIBI_API extern "C" __declspec(dllexport)
#else
#define LIBI_API extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Isa : int { kGeneric = 0, kV3 = 1, kV4 = 2 };
const char* const kNames[] = {"generic", "v3", "v4"};

Isa best() {
#if defined(LIBI_X86_LEVELS)
    // __builtin_cpu_supports reads CPUID, and XGETBV for the registers that the operating system saves.
    __builtin_cpu_init();
    // x86-64-v3 also implies F16C, LZCNT and MOVBE, which not every compiler can name here; every processor
    // with AVX2, BMI2 and FMA has them.
    const bool v3 = __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("sse4.2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? kV4 : v3 ? kV3 : kGeneric;
#else
    return kGeneric;
#endif
}

struct Choice {
    Isa isa;
    bool refused;  // LIBI_FAST_ISA named something unknown, or more than this machine has
};

Choice choose() {
    const Isa most = best();
    const char* wish = std::getenv("LIBI_FAST_ISA");
    if (wish == nullptr || *wish == '\0') return {most, false};
    for (int isa = kGeneric; isa <= most; ++isa)
        if (std::strcmp(wish, kNames[isa]) == 0) return {static_cast<Isa>(isa), false};
    return {most, true};
}

const Choice kChoice = choose();  // once, when the library is loaded

}  // namespace

LIBI_API int libi_abi_version() { return 6; }
LIBI_API const char* libi_isa() { return kNames[kChoice.isa]; }
LIBI_API int libi_isa_refused() { return kChoice.refused ? 1 : 0; }
LIBI_API int libi_openmp() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

using libi::Annealing;
using libi::Chains;
using libi::Importance;
using libi::Resampling;
using libi::Training;  // named in parameter lists

#if defined(LIBI_X86_LEVELS)
#define LIBI_EXPORT(name, parameters, arguments)                \
    LIBI_API int libi_##name parameters {                       \
        switch (kChoice.isa) {                                  \
            case kV4: return libi::v4::name arguments;          \
            case kV3: return libi::v3::name arguments;          \
            default: return libi::generic::name arguments;      \
        }                                                       \
    }
#else
#define LIBI_EXPORT(name, parameters, arguments) \
    LIBI_API int libi_##name parameters { return libi::generic::name arguments; }
#endif

LIBI_ENTRY_POINTS(LIBI_EXPORT)
