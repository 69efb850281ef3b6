/* Threads for the kernels of a few tokens, which take tens of microseconds each.

   Parts are taken one by one by whichever thread is free: always the caller, others if they arrive in time. At the end
   the caller waits only for parts that another thread has begun, never for a thread: where another program holds a core,
   it does the work alone. Waiting threads spin for about as long as the next kernel takes to come, and then sleep.

   Kernels for whole sequences share PyTorch's threads (OpenMP) instead, which spin for milliseconds after each of
   PyTorch's operators: other threads would get half of their cores. Operators on a few tokens do not wake those. */

#pragma once

#include <stdint.h>

/* `worker`: the index of the thread; the caller is 0 */
typedef void part(const void *context, int64_t index, int worker);

/* Runs each part 0 .. parts - 1 once, on up to `threads` threads, and returns when all are done. Inside of a part, or
   while another thread is in here, the caller runs all parts itself. */
void share_out(int64_t threads, int64_t parts, part *part, const void *context);
