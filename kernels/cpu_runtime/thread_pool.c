/* Threads that wait for work, and the one job at a time that they share: see thread_pool.h. */

#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

enum {
    MOST = 256,  /* threads, the caller among them */
    SPINS = 1000 /* looks at a number that is about to change, with a pause after each: tens of microseconds */
};

/* The state of the job is one number, so that entering and closing it are one step each: which job it is, how many
   threads may still enter, and how many have. Nobody looks at the rest without having entered. */
#define JOB (UINT64_C(1) << 32)
#define PLACE (UINT64_C(1) << 16)
#define PLACES (JOB - PLACE)
#define ENTERED (PLACE - 1)

static struct {
    atomic_flag taken; /* by the thread whose job it is */
    int workers;       /* threads there are, beside that one */
    part *part;
    const void *context;
    int64_t parts;
    uint64_t modes;
    _Alignas(64) atomic_uint_fast64_t state;
    _Alignas(64) atomic_int_fast64_t next; /* part */
    _Alignas(64) atomic_int left;          /* threads that entered and are done */
    _Alignas(64) atomic_int sleepers;      /* workers to be woken up */
    atomic_int caller_sleeps;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
} pool = {
    .taken = ATOMIC_FLAG_INIT,
    .mutex = PTHREAD_MUTEX_INITIALIZER,
    .work = PTHREAD_COND_INITIALIZER,
    .done = PTHREAD_COND_INITIALIZER,
};

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* How the calling thread rounds, and whether it flushes the smallest numbers to zero: a result does not depend on who
   computes it. */
static uint64_t modes(void) {
    uint64_t found = 0;
#if defined(__SSE__)
    found = __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
#endif
    return found;
}

static void set_modes(uint64_t wanted) {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr((unsigned)wanted);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(wanted));
#else
    (void)wanted;
#endif
}

static void take_parts(int worker) {
    for (int64_t i; (i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.parts;)
        pool.part(pool.context, i, worker);
}

/* -- workers -------------------------------------------------------------------------------------------------------- */

static int has_place(uint64_t state, uint64_t last) { return (state & PLACES) && state / JOB != last; }

/* The state with a place in it, in a job after the `last`. */
static uint64_t wait_for_place(uint64_t last) {
    uint64_t state;
    for (int i = 0; i < SPINS; i++, pause_briefly())
        if (has_place(state = atomic_load(&pool.state), last))
            return state;
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleepers, 1);
    while (!has_place(state = atomic_load(&pool.state), last))
        pthread_cond_wait(&pool.work, &pool.mutex);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.mutex);
    return state;
}

static void *work(void *unused) {
    for (uint64_t last = 0;;) {
        uint64_t state = wait_for_place(last);
        if (!atomic_compare_exchange_strong(&pool.state, &state, state - PLACE + 1))
            continue;
        last = state / JOB;
        set_modes(pool.modes);
        take_parts((int)(state & ENTERED) + 1);
        atomic_fetch_add(&pool.left, 1);
        if (atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.mutex);
        }
    }
    return unused;
}

/* A forked child has this memory but no threads. */
static void reset_in_child(void) {
    atomic_flag_clear(&pool.taken);
    pool.workers = 0;
    atomic_store(&pool.state, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.caller_sleeps, 0);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, NULL);
}

/* Up to that many workers, as the system allows. Signals stay with the other threads. */
static void add_workers(int64_t wanted) {
    static int registered;
    if (!registered)
        registered = !pthread_atfork(NULL, NULL, reset_in_child);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; registered && pool.workers < wanted; pool.workers++) {
        if (pthread_create(&thread, NULL, work, NULL))
            break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* -- the caller ----------------------------------------------------------------------------------------------------- */

static void open_job(int64_t places) {
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.left, 0, memory_order_relaxed);
    uint64_t job = atomic_load(&pool.state) / JOB + 1;
    atomic_store(&pool.state, job * JOB + (uint64_t)places * PLACE);
    if (!atomic_load(&pool.sleepers))
        return;
    pthread_mutex_lock(&pool.mutex);
    if (places > 1)
        pthread_cond_broadcast(&pool.work);
    else
        pthread_cond_signal(&pool.work);
    pthread_mutex_unlock(&pool.mutex);
}

/* Closes the job to further threads and waits for those inside. */
static void close_job(void) {
    int entered = (int)(atomic_fetch_and(&pool.state, ~PLACES) & ENTERED);
    for (int i = 0; i < SPINS; i++, pause_briefly())
        if (atomic_load(&pool.left) == entered)
            return;
    pthread_mutex_lock(&pool.mutex);
    atomic_store(&pool.caller_sleeps, 1);
    while (atomic_load(&pool.left) != entered)
        pthread_cond_wait(&pool.done, &pool.mutex);
    atomic_store(&pool.caller_sleeps, 0);
    pthread_mutex_unlock(&pool.mutex);
}

void share_out(int64_t threads, int64_t parts, part *part, const void *context) {
    int64_t places = (threads < parts ? threads : parts) - 1;
    if (places > MOST - 1)
        places = MOST - 1;
    if (places <= 0 || atomic_flag_test_and_set(&pool.taken)) {
        for (int64_t i = 0; i < parts; i++)
            part(context, i, 0);
        return;
    }
    if (pool.workers < places)
        add_workers(places);
    pool.part = part, pool.context = context, pool.parts = parts, pool.modes = modes();
    open_job(places);
    take_parts(0);
    close_job();
    atomic_flag_clear(&pool.taken);
}
