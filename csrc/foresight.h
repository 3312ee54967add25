// What idle threads may bring into the caches: weights that will be read soon.
#pragma once

#include <cstdint>

namespace moert {

// A model reads its weights in the same order, token after token. Each piece of work says here what it is about to
// read; what came after it the last time is then expected next, up to some megabytes. `nbytes` of 0 stands for weights
// that are others each time; `data` then only says whose work it is. Any thread; what other threads read at the same
// time only makes the guess worse. Weights may be freed at any time.
void note_reading(const void* data, int64_t nbytes);

// Brings some kilobytes of what is expected into this core's caches; false if there is nothing left to bring. Any
// thread.
bool bring_piece();

}  // namespace moert
