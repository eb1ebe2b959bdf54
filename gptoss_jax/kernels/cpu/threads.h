// The kernels' own threads. XLA's sleep between two calls and are slow to come; a decode step makes dozens of calls of a
// millisecond and less.
#pragma once
#include <cstdint>
#include <functional>

// Calls task(i) for i < count on this thread and up to `helpers` others, and returns after the last. Each thread takes
// neighbouring tasks one after another, since their weights are neighbours in memory too; who is done helps the others.
void run_tasks(int64_t count, int64_t helpers, const std::function<void(int64_t)>& task);
