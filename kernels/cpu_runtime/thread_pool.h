/* Threads for a token's kernels, which take tens of microseconds each.

   Parts are taken one by one by whoever is free: the calling thread always, others if they come in time. At the end only
   parts that another thread has begun are waited for, never a thread; so where another program holds a core, the caller
   does the work alone and loses nothing but help. Waiting threads spin for about as long as the next kernel takes to
   come, and then sleep.

   The kernels for whole sequences share PyTorch's threads (OpenMP) instead: these spin for milliseconds after each of
   PyTorch's own operators, and threads of ours would get half of their cores. A token's operators wake up none. */

#pragma once

#include <stdint.h>

/* `worker`: which of the threads this is, below the number asked for; the caller is 0 */
typedef void part(const void *context, int64_t index, int worker);

/* Each part 0 .. parts - 1 once, by up to `threads` threads; returns when all are done. From inside a part, or while
   another thread shares its work out, the caller does all parts itself. */
void share_out(int64_t threads, int64_t parts, part *part, const void *context);
