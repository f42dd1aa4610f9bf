/* Sums and copies between the ranks of one machine, through memory that all of them have mapped.
 *
 * A round: every rank writes into its own box, says so by the number of the round, waits until all have said so,
 * and reads the boxes. There are two boxes a rank, used in turn: whoever writes round r + 2 has seen everybody in
 * round r + 1, and so nobody reads round r any more.
 *
 * A rank that waits looks for some microseconds, because the others are usually about as far; then it lets other
 * threads run, and at last sleeps, so that ranks beside each other on few cores do not keep each other from
 * working. Whether the others are still alive is not its business.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
enum { LINE = 64, BOXES_AT = 4096 };
static const int64_t LOOK_NS = 20 * 1000, YIELD_NS = 1000 * 1000;

struct ranks {
    char *memory;     /* a number of round for each rank, LINE bytes apart; then the boxes */
    int64_t rank, size, box_bytes;
    uint64_t round;   /* the last one that this rank has taken part in */
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static char *box_of(const struct ranks *r, int64_t rank) {
    return r->memory + BOXES_AT + ((int64_t)(r->round & 1) * r->size + rank) * r->box_bytes;
}

static void wait_for(_Atomic uint64_t *number, uint64_t round) {
    if (atomic_load_explicit(number, memory_order_acquire) >= round) return;
    int64_t since = now_ns();
    while (atomic_load_explicit(number, memory_order_acquire) < round) {
        int64_t waited = now_ns() - since;
        if (waited < LOOK_NS) continue;
        if (waited < YIELD_NS) {
            sched_yield();
            continue;
        }
        struct timespec nap = {0, 50 * 1000};
        nanosleep(&nap, NULL);
    }
}

static void meet(struct ranks *r) {
    _Atomic uint64_t *own = (_Atomic uint64_t *)(r->memory + r->rank * LINE);
    atomic_store_explicit(own, r->round, memory_order_release);
    for (int64_t rank = 0; rank < r->size; rank++)
        wait_for((_Atomic uint64_t *)(r->memory + rank * LINE), r->round);
}

/* x = the sum of all ranks' x, in the order of ranks and so with the same bits on each; n float32. */
EXPORT void ll_sum_ranks(struct ranks *r, float *x, long n) {
    long most = r->box_bytes / 4;
    for (long start = 0; start < n; start += most) {
        long count = n - start < most ? n - start : most;
        r->round++;
        memcpy(box_of(r, r->rank), x + start, (size_t)count * 4);
        meet(r);
        float *out = x + start;
        memcpy(out, box_of(r, 0), (size_t)count * 4);
        for (int64_t rank = 1; rank < r->size; rank++) {
            const float *other = (const float *)box_of(r, rank);
            for (long i = 0; i < count; i++) out[i] += other[i];
        }
    }
}

/* Every rank gives `bytes` of x; whoever has an `out` gets those of ranks 0..num_read-1 one behind the other. */
EXPORT void ll_share_ranks(struct ranks *r, const char *x, long bytes, char *out, long num_read) {
    for (long start = 0; start < bytes; start += r->box_bytes) {
        long count = bytes - start < r->box_bytes ? bytes - start : r->box_bytes;
        r->round++;
        if (x) memcpy(box_of(r, r->rank), x + start, (size_t)count);
        meet(r);
        for (long rank = 0; out && rank < num_read; rank++)
            memcpy(out + rank * bytes + start, box_of(r, rank), (size_t)count);
    }
}
