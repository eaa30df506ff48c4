// Draws first_draw .. first_draw + draws - 1 of each row's sequence, for [replicas, rows] sequences side by side.
//
// The blocks of all sequences are counted through, and made kLanes at a time; a tile may span several short rows.
// Each draw is a function of its counter alone, so the split over threads cannot move a bit.
#include "cpu.hpp"

#include "../entry_points.hpp"
#include "../sizes.hpp"

namespace libi {
namespace LIBI_ISA {
namespace {

constexpr int64_t kTilesPerTask = 32;
constexpr int64_t kWords = int64_t{1} << 32;

struct Span {
    const int64_t* replicas;
    int64_t num_replicas, first_row, rows, first_draw, draws, repetition, stream;
};

int check(const Span& span) {
    if (span.num_replicas < 0 || span.rows < 0 || span.draws < 0) return kBadSize;
    if (span.first_row < 0 || span.first_row > kWords - span.rows) return kCounterOverflow;
    if (span.first_draw < 0 || span.first_draw > 4 * kWords - span.draws) return kCounterOverflow;
    if (span.repetition < 0 || span.repetition >= kWords) return kCounterOverflow;
    if (span.stream < 0 || span.stream >= 256) return kCounterOverflow;
    if (!fits(8, span.num_replicas, span.rows, span.draws + 7)) return kBadSize;  // up to 7 more are made than kept
    for (int64_t r = 0; r < span.num_replicas; ++r)
        if (span.replicas[r] < 0 || span.replicas[r] >= (int64_t{1} << 24)) return kCounterOverflow;
    return kOk;
}

template <class T, class MakeTile>
int fill(uint64_t seed, const Span& span, int num_threads, T* out, MakeTile make_tile) {
    if (const int error = check(span)) return error;
    if (span.num_replicas == 0 || span.rows == 0 || span.draws == 0) return kOk;
    const PhiloxKey key = philox_key(seed);
    const int64_t first_block = span.first_draw / 4;
    const int64_t skipped = span.first_draw % 4;  // draws of the first block that were not asked for
    const int64_t blocks = (skipped + span.draws + 3) / 4;
    const int64_t lines = span.num_replicas * span.rows;
    const int64_t total = lines * blocks;
    const int64_t per_task = kTilesPerTask * kLanes;
    const int64_t tasks = (total + per_task - 1) / per_task;

#pragma omp parallel for schedule(static) num_threads(team(num_threads)) if (tasks > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        Counters at;
        for (uint32_t& one : at.repetition) one = static_cast<uint32_t>(span.repetition);
        alignas(64) T tile[kTile];
        const int64_t end = total < (task + 1) * per_task ? total : (task + 1) * per_task;
        int64_t line = task * per_task / blocks;
        int64_t block = task * per_task % blocks;
        for (int64_t begin = task * per_task; begin < end; begin += kLanes) {
            const int lanes = static_cast<int>(end - begin < kLanes ? end - begin : kLanes);
            int64_t lane_line = line, lane_block = block;
            for (int lane = 0; lane < kLanes;) {
                const int64_t left = blocks - lane_block;
                const int stop = left < kLanes - lane ? lane + static_cast<int>(left) : kLanes;
                // Lanes past the end repeat the last sequence; they are made and thrown away.
                const int64_t known = lane_line < lines ? lane_line : lines - 1;
                const uint32_t row = static_cast<uint32_t>(span.first_row + known % span.rows);
                const uint32_t use = static_cast<uint32_t>(span.stream + 256 * span.replicas[known / span.rows]);
                const uint32_t start = static_cast<uint32_t>(first_block + lane_block) - static_cast<uint32_t>(lane);
                for (int l = lane; l < stop; ++l) {
                    at.row[l] = row;
                    at.block[l] = start + static_cast<uint32_t>(l);
                    at.use[l] = use;
                }
                lane = stop;
                lane_block = 0;
                ++lane_line;
            }
            make_tile(key, at, tile);
            for (int lane = 0; lane < lanes;) {  // what each sequence keeps of its blocks is contiguous
                const int64_t left = blocks - block;
                const int stop = left < lanes - lane ? lane + static_cast<int>(left) : lanes;
                int64_t from = 4 * block - skipped;  // the draw, counted from first_draw, of the lane's first word
                int64_t to = from + 4 * (stop - lane);
                const T* source = tile + 4 * lane;
                if (from < 0) source -= from, from = 0;
                if (to > span.draws) to = span.draws;
                std::memcpy(out + line * span.draws + from, source, static_cast<size_t>(to - from) * sizeof(T));
                block += stop - lane;
                if (block == blocks) block = 0, ++line;
                lane = stop;
            }
        }
    }
    return kOk;
}

}  // namespace

int philox_words(uint64_t seed, const int64_t* replicas, int64_t num_replicas, int64_t first_row, int64_t rows,
                 int64_t first_block, int64_t blocks, int64_t repetition, int64_t stream, int num_threads,
                 int64_t* out) {
    if (first_block < 0 || blocks < 0 || first_block > kWords || blocks > kWords) return kCounterOverflow;
    const Span span{replicas, num_replicas, first_row, rows, 4 * first_block, 4 * blocks, repetition, stream};
    return fill(seed, span, num_threads, out,
                [](PhiloxKey key, const Counters& at, int64_t* tile) { word_tile(key, at, tile); });
}

int philox_uniform_f32(uint64_t seed, const int64_t* replicas, int64_t num_replicas, int64_t first_row, int64_t rows,
                       int64_t first_draw, int64_t draws, int64_t repetition, int64_t stream, int num_threads,
                       float* out) {
    return fill(seed, {replicas, num_replicas, first_row, rows, first_draw, draws, repetition, stream}, num_threads,
                out, [](PhiloxKey key, const Counters& at, float* tile) { uniform_tile(key, at, tile); });
}

int philox_uniform_f64(uint64_t seed, const int64_t* replicas, int64_t num_replicas, int64_t first_row, int64_t rows,
                       int64_t first_draw, int64_t draws, int64_t repetition, int64_t stream, int num_threads,
                       double* out) {
    return fill(seed, {replicas, num_replicas, first_row, rows, first_draw, draws, repetition, stream}, num_threads,
                out, [](PhiloxKey key, const Counters& at, double* tile) { uniform_tile(key, at, tile); });
}

int philox_normal_f32(uint64_t seed, const int64_t* replicas, int64_t num_replicas, int64_t first_row, int64_t rows,
                      int64_t first_draw, int64_t draws, int64_t repetition, int64_t stream, int num_threads,
                      float* out) {
    return fill(seed, {replicas, num_replicas, first_row, rows, first_draw, draws, repetition, stream}, num_threads,
                out, [](PhiloxKey key, const Counters& at, float* tile) { normal_tile(key, at, tile); });
}

int philox_normal_f64(uint64_t seed, const int64_t* replicas, int64_t num_replicas, int64_t first_row, int64_t rows,
                      int64_t first_draw, int64_t draws, int64_t repetition, int64_t stream, int num_threads,
                      double* out) {
    return fill(seed, {replicas, num_replicas, first_row, rows, first_draw, draws, repetition, stream}, num_threads,
                out, [](PhiloxKey key, const Counters& at, double* tile) { normal_tile(key, at, tile); });
}

}  // namespace LIBI_ISA
}  // namespace libi
