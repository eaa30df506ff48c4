// What every kernel makes of the sizes that it is given, before anything is computed from them.
#pragma once

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "elementary.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

// Whether an array of these sizes, none negative, has at most 2^63 - 1 bytes. All products of some of the sizes then fit
// into int64, also where another size is 0.
template <class... Sizes>
bool fits(int64_t bytes_each, Sizes... sizes) {
    int64_t room = std::numeric_limits<int64_t>::max() / bytes_each;
    for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
        if (size > room) return false;
        if (size > 0) room /= size;
    }
    return true;
}

// The threads to start: OpenMP says nothing of a number below 1, and libgomp ends the process where it cannot have them all.
constexpr int64_t kMostThreads = 4096;
LIBI_INLINE int team(int64_t num_threads) {
    return static_cast<int>(num_threads < 1 ? 1 : num_threads > kMostThreads ? kMostThreads : num_threads);
}

// run(slot, task) for all tasks, each when one of the slots has a thread free: what a task gives must not depend on its slot.
template <class Run>
void share_out(int64_t slots, int64_t tasks, Run run) {
    std::atomic<int64_t> next{0};
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(slots)) if (slots > 1)
    for (int64_t slot = 0; slot < slots; ++slot)
        for (int64_t task = next++; task < tasks; task = next++) run(slot, task);
}

}  // namespace
}  // namespace LIBI_ISA
}  // namespace libi
