// Importance-weighted log-likelihoods, forward: reference.py has the formulas, cpu_tile.hpp the tile and its log-weights.
//
// A row's log-weights are met tile after tile: pivot m, sum w e^-m and sum w^2 e^-2m (in double), and the largest so far.
// Sums of 1024 samples are merged in order, whether one thread took them all or, where rows are few, each another.
//
// What a register of samples costs: W2 (2-50-2) 252 multiply-adds, 50 tanh of 12 operations and a division, and 2 normals;
// W3 (50-200-200-784) 207,984 multiply-adds, a block's 28 at the price of 16 loads.
#include "cpu_sums.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

// The rows of a group that share a tile.
template <class T>
void run_together(const Plan<T>& plan, int64_t r, int64_t group, Space<T>& space, T* kept) {
    place_rows(plan, r, group, space);
    run_tile<T, false>(plan, r, 0, space, Nothing{});
    for (int64_t i = 0; i < space.rows; ++i) {
        Sums<T> sums;
        Largest<T> largest{kept, plan.call.tail};
        const int64_t begin = i * plan.call.samples, end = begin + plan.call.samples;
        merge_lanes(space.log_weights, begin, end, sums);
        largest.push(space.log_weights + begin, end - begin);
        write_row(plan, r * plan.call.rows + space.row + i, sums, largest);
    }
}

template <class T>
void run_row(const Plan<T>& plan, int64_t r, int64_t row, Space<T>& space, T* kept) {
    place_rows(plan, r, row, space);
    Sums<T> sums;
    Largest<T> largest{kept, plan.call.tail};
    for (int64_t segment = 0; segment * kSegment < plan.call.samples; ++segment) {
        sums.merge(run_segment(plan, r, segment, space, largest));
    }
    write_row(plan, r * plan.call.rows + row, sums, largest);
}

constexpr int64_t kFewRows = 4;      // a thread: fewer are cut into segments
constexpr int64_t kTasksAtOnce = 64;  // a thread: segments whose sums are kept until they are merged

// Rows one after another would leave threads idle: segments of all rows are shared out, a wave of them after another.
template <class T>
int forward_cut(const Plan<T>& plan, Space<T>* spaces, int64_t threads, int64_t groups, int64_t segments) {
    const int64_t tail = plan.call.tail, of_segment = smaller(tail, kSegment), tasks = groups * segments;
    const int64_t wave = smaller(tasks, kTasksAtOnce * threads), room = Largest<T>::capacity(tail);
    const std::unique_ptr<Sums<T>[]> sums(new (std::nothrow) Sums<T>[static_cast<size_t>(wave + groups)]);
    const std::unique_ptr<T[]> tops(new (std::nothrow) T[static_cast<size_t>(wave * of_segment)]);
    const std::unique_ptr<T[]> kept(new (std::nothrow) T[static_cast<size_t>(groups * room)]);
    const std::unique_ptr<Largest<T>[]> largest(new (std::nothrow) Largest<T>[static_cast<size_t>(groups)]);
    if (!sums || !tops || !kept || !largest) return kOutOfMemory;
    for (int64_t row = 0; row < groups; ++row) largest[row].kept = kept.get() + row * room, largest[row].wanted = tail;
    for (int64_t first = 0; first < tasks; first += wave) {
        const int64_t count = smaller(wave, tasks - first);
        share_out(threads, count, [&](int64_t slot, int64_t i) {
            const int64_t row = (first + i) / segments;
            place_rows(plan, row / plan.groups, row % plan.groups, spaces[slot]);
            Largest<T> own{spaces[slot].more(), of_segment};
            sums[i] = run_segment(plan, row / plan.groups, (first + i) % segments, spaces[slot], own);
            if (tail > 0) own.write(tops.get() + i * of_segment);
        });
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = (first + i) / segments;
            sums[wave + row].merge(sums[i]);
            for (int64_t t = 0; t < of_segment; t += kTileSamples)
                largest[row].push(tops.get() + i * of_segment + t, smaller(kTileSamples, of_segment - t));
        }
    }
    for (int64_t row = 0; row < groups; ++row) write_row(plan, row, sums[wave + row], largest[row]);
    return kOk;
}

template <class T>
int forward(const Importance& call) {
    Plan<T> plan(call);
    if (const int error = plan.make(false)) return error;
    const int64_t groups = call.replicas * plan.groups, segments = pieces(call.samples, kSegment);
    if (groups == 0) return kOk;
    const bool cut = segments > 1 && groups < kFewRows * plan.threads;
    const int64_t threads = smaller(plan.threads, cut ? groups * segments : groups);
    const std::unique_ptr<Space<T>[]> spaces(new (std::nothrow) Space<T>[static_cast<size_t>(threads)]);
    if (!spaces) return kOutOfMemory;
    for (int64_t t = 0; t < threads; ++t)
        if (!spaces[t].make(plan, false, Largest<T>::capacity(call.tail))) return kOutOfMemory;
    if (cut) return forward_cut(plan, spaces.get(), threads, groups, segments);

    const auto run = plan.rows_together > 1 ? run_together<T> : run_row<T>;
    share_out(threads, groups, [&](int64_t slot, int64_t task) {
        run(plan, task / plan.groups, task % plan.groups, spaces[slot], spaces[slot].more());
    });
    return kOk;
}

}  // namespace

int importance_f32(const Importance* call) { return forward<float>(*call); }
int importance_f64(const Importance* call) { return forward<double>(*call); }

}  // namespace LIBI_ISA
}  // namespace libi
