/* The one thread pool of the process: the caller computes too, parts are claimed one by one.
 *
 * Claiming parts instead of dealing them out is what makes the pool robust on a busy machine: a thread that the
 * system has suspended delays the others by the one part that it holds. Workers watch for a new job for some
 * microseconds, because the next one usually follows at once, and then sleep. One caller at a time.
 *
 * Where others want the processors too, that one part is still a whole time slice, again and again. So a caller that
 * had to wait so long computes alone for a while; the while doubles as long as that goes on.
 */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

enum { MAX_THREADS = 256, INDEX_BITS = 24 };
static const int64_t WATCH_NS = 60 * 1000;
/* Beside what the caller itself has computed for; no part takes that long. */
static const int64_t STALL_NS = 2 * 1000 * 1000;
static const int64_t MIN_ALONE_NS = 20 * 1000 * 1000, MAX_ALONE_NS = 640 * 1000 * 1000;
/* A stall that comes later than this after the last one is a new story. */
static const int64_t CALM_NS = 1000 * 1000 * 1000;

/* ticket: generation of the job (16 bits), parts (24 bits), next part to claim (24 bits). A claim succeeds only on
 * the generation that it was read from, and a job cannot end while a claimed part is not done: so `run` and
 * `context`, read after a claim, are those of the claimed job. */
static struct {
    _Atomic uint64_t ticket;
    part_function *run;
    void *context;
    char pad[64];
    _Atomic long num_done;
    char pad2[64];
    _Atomic int num_sleeping;
    int num_threads;
    int64_t alone_ns, alone_until_ns; /* of the caller alone */
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} pool = {.num_threads = 1, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int has_part(uint64_t ticket) {
    uint64_t mask = (1u << INDEX_BITS) - 1;
    return (ticket & mask) < (ticket >> INDEX_BITS & mask);
}

/* Compute parts of the current job until none is left. */
static void work(void) {
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    while (has_part(ticket)) {
        if (!atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        pool.run(pool.context, (long)(ticket & ((1u << INDEX_BITS) - 1)));
        atomic_fetch_add_explicit(&pool.num_done, 1, memory_order_release);
        ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    }
}

static void *worker(void *unused) {
    (void)unused;
    for (;;) {
        int64_t until = now_ns() + WATCH_NS;
        while (!has_part(atomic_load_explicit(&pool.ticket, memory_order_acquire)) && now_ns() < until)
            for (int i = 0; i < 16; i++) pause_briefly();
        if (!has_part(atomic_load(&pool.ticket))) {
            pthread_mutex_lock(&pool.mutex);
            atomic_fetch_add(&pool.num_sleeping, 1);
            while (!has_part(atomic_load(&pool.ticket))) pthread_cond_wait(&pool.wake, &pool.mutex);
            atomic_fetch_sub(&pool.num_sleeping, 1);
            pthread_mutex_unlock(&pool.mutex);
        }
        work();
    }
    return NULL;
}

int threads_start(int num_threads) {
    pthread_mutex_lock(&pool.mutex);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 4 << 20);
    if (num_threads > MAX_THREADS) num_threads = MAX_THREADS;
    while (pool.num_threads < num_threads) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, NULL)) break;
        pool.num_threads++;
    }
    pthread_attr_destroy(&attributes);
    pthread_mutex_unlock(&pool.mutex);
    return pool.num_threads;
}

/* The caller has waited in vain for a part that another thread holds. */
static void note_stall(int64_t now) {
    int is_new = now - pool.alone_until_ns > CALM_NS;
    pool.alone_ns = is_new ? MIN_ALONE_NS : pool.alone_ns * 2;
    if (pool.alone_ns > MAX_ALONE_NS) pool.alone_ns = MAX_ALONE_NS;
    pool.alone_until_ns = now + pool.alone_ns;
}

void threads_run(part_function *run, void *context, long num_parts) {
    int64_t began = now_ns();
    if (num_parts <= 1 || pool.num_threads == 1 || began < pool.alone_until_ns) {
        for (long part = 0; part < num_parts; part++) run(context, part);
        return;
    }
    pool.run = run;
    pool.context = context;
    atomic_store_explicit(&pool.num_done, 0, memory_order_relaxed);
    uint64_t generation = (atomic_load_explicit(&pool.ticket, memory_order_relaxed) >> 2 * INDEX_BITS) + 1;
    atomic_store(&pool.ticket, generation << 2 * INDEX_BITS | (uint64_t)num_parts << INDEX_BITS);
    if (atomic_load(&pool.num_sleeping)) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    work();
    if (atomic_load_explicit(&pool.num_done, memory_order_acquire) == num_parts) return;
    int64_t waiting = now_ns();
    for (int spins = 0; atomic_load_explicit(&pool.num_done, memory_order_acquire) < num_parts; spins++) {
        pause_briefly();
        if (spins > 4096) sched_yield();
    }
    int64_t now = now_ns();
    if (now - waiting > waiting - began + STALL_NS) note_stall(now);
}
