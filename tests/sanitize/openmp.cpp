// What GCC makes of `#pragma omp parallel for` with a static schedule, on std::thread: ThreadSanitizer knows what creating
// and joining a thread orders, which it cannot know of libgomp. Another schedule fails to link here, and needs a line more.
#include <thread>
#include <vector>

namespace {
thread_local int number = 0, team = 1;
}

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    const int size = threads == 0 ? 2 : static_cast<int>(threads);
    const auto run = [=](int i) {
        number = i, team = size;
        body(data);
        number = 0, team = 1;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < size; ++i) others.emplace_back(run, i);
    run(0);
    for (std::thread& one : others) one.join();
}
}
