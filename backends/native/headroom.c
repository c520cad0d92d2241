/* Headroom: keeps memory free for others, by lowering the segment's limit and giving back what exceeds it.
 *
 * A program takes memory at 1.5 GB/s and a control group kills as soon as it is full, so whoever gives back has to see it
 * within some ten milliseconds and to be faster. One thread does both here, beside the interpreter and its lock, and
 * before all other programs where the kernel permits that (SCHED_RR): as a thread like any other, with two busy
 * programs on its CPU, it was too late in one of three runs. Nothing else is decided here: when a limit rises, and
 * what pressure means, is Python's (sizing.py), which wakes this thread for what then exceeds the limit.
 *
 * What others do not need is what the segment uses, and what is available beyond a margin. That sum does not change when
 * the segment itself grows or shrinks. The limit follows it down at once, ahead of it by what was taken in the last tenth
 * of a second, with a dead band of a quarter of the margin. A look takes 8 us (meminfo) and 1 us a control group. */
#include "headroom.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MS UINT64_C(1000000)
#define MIB (UINT64_C(1) << 20)
#define FASTEST (UINT64_C(4) << 30) /* bytes a second: looks are so close that half a margin lasts until the next */
#define LEAST_LOOK_NS (2 * MS)
#define MOST_LOOK_NS (1000 * MS)
#define LEAD_NS (100 * MS)  /* how far ahead of a program that takes memory to be */
#define RATE_NS (5 * MS)    /* counters of pages are batched by CPU: over less time a rate is noise */
#define GIVING_NS (200 * MS) /* after the limit was lowered it follows in smaller steps for so long */
#define CACHE_NS (100 * MS) /* how long the page cache of a group is believed: it has to be summed up */
#define SLICE (4 * MIB)     /* given back between two looks, in about 3 ms */
#define URGENT_NICE (-15)

/* The number in the line of `text` that begins with `key`. */
static bool number_after(const char *text, const char *key, uint64_t *number)
{
    for (const char *at = text; (at = strstr(at, key)); at++) {
        if (at != text && at[-1] != '\n')
            continue;
        *number = strtoull(at + strlen(key), NULL, 10);
        return true;
    }
    return false;
}

static bool read_text(int fd, char *text, size_t size)
{
    ssize_t n = fd < 0 ? -1 : pread(fd, text, size - 1, 0);
    text[n > 0 ? n : 0] = 0;
    return n > 0;
}

/* "max", and what v1 writes for it, is more than any machine has. */
static uint64_t read_number(int fd)
{
    char text[32];
    return read_text(fd, text, sizeof text) && text[0] >= '0' && text[0] <= '9' ? strtoull(text, NULL, 10) : UINT64_MAX;
}

/* A 16th, and at least 128 MiB or an eighth: a small group is full within a tenth of a second otherwise. */
uint64_t margin_of(uint64_t total)
{
    uint64_t least = total / 8 < 128 * MIB ? total / 8 : 128 * MIB;
    return total / 16 > least ? total / 16 : least;
}

/* v1 counts a group and its children under other names than the group alone. */
static uint64_t sum_cache(int stat)
{
    char text[8192];
    uint64_t active = 0, inactive = 0;
    if (!read_text(stat, text, sizeof text))
        return 0;
    if (!number_after(text, "total_inactive_file ", &inactive))
        number_after(text, "inactive_file ", &inactive);
    if (!number_after(text, "total_active_file ", &active))
        number_after(text, "active_file ", &active);
    return active + inactive;
}

static void tightest(struct headroom_look *look, uint64_t total, uint64_t available)
{
    uint64_t margin = margin_of(total);
    int64_t spare = (int64_t)available - (int64_t)margin;
    if (spare < look->spare) {
        look->spare = spare;
        look->margin = margin;
    }
}

static void look_at_rooms(struct headroom *h, struct headroom_look *look)
{
    char text[4096];
    uint64_t total = 0, available = 0;
    look->spare = INT64_MAX;
    look->margin = 0;
    if (read_text(h->meminfo, text, sizeof text) && number_after(text, "MemTotal:", &total)
        && number_after(text, "MemAvailable:", &available))
        tightest(look, h->total = total << 10, available << 10);
    for (struct headroom_group *g = h->groups; g < h->groups + h->ngroups; g++) {
        uint64_t limit = read_number(g->limit), usage;
        if (limit >= h->total || (usage = read_number(g->usage)) == UINT64_MAX)
            continue; /* none, or the group is gone */
        uint64_t room = limit > usage ? limit - usage : 0;
        if (room <= limit / 4) { /* else the rest is not worth the time */
            if (!g->cache_at_ns || look->now_ns - g->cache_at_ns > CACHE_NS) {
                g->cache = sum_cache(g->stat);
                g->cache_at_ns = look->now_ns;
            }
            room += g->cache;
        }
        tightest(look, limit, room);
    }
    if (!look->margin)
        look->spare = 0;
}

static uint64_t bytes_in_use(const struct tm_segment *seg)
{
    return seg->data_offset
           + ((uint64_t)atomic_load_explicit(&seg->super->nused, memory_order_relaxed) + seg->super->nret) * TM_CHUNK;
}

void headroom_look(struct headroom *h, struct tm_segment *seg, struct headroom_look *look)
{
    enum { TRIES = 3 };
    /* Where the segment grew meanwhile, its growth would count as neither used nor available, or as both. */
    for (unsigned tries = 0; tries < TRIES; tries++) {
        uint64_t before = bytes_in_use(seg);
        look->now_ns = timing_now();
        look_at_rooms(h, look);
        look->used = bytes_in_use(seg);
        uint64_t moved = look->used > before ? look->used - before : before - look->used;
        if (moved < look->margin / 32)
            break;
    }
    look->limit = limit_bytes(seg, chunk_limit(seg, false));
    atomic_store_explicit(&h->used, look->used, memory_order_relaxed);
    atomic_store_explicit(&h->spare, look->spare, memory_order_relaxed);
    atomic_store_explicit(&h->margin, look->margin, memory_order_relaxed);
    atomic_fetch_add_explicit(&h->looks, 1, memory_order_relaxed);
}

static int64_t clamp(int64_t value, uint64_t least, uint64_t most)
{
    return value < (int64_t)least ? (int64_t)least : value > (int64_t)most ? (int64_t)most : value;
}

/* How fast `room` falls, in bytes a second; it is believed for half of what it was a measurement ago. */
static uint64_t rate_of(struct headroom *h, uint64_t now_ns, int64_t room)
{
    uint64_t passed = now_ns - h->rate_ns;
    if (h->rate_ns && passed < RATE_NS)
        return h->rate;
    uint64_t fell = h->rate_ns && room < h->rate_room ? (uint64_t)(h->rate_room - room) : 0;
    uint64_t rate = (uint64_t)((double)fell * 1e9 / (double)(passed ? passed : 1));
    h->rate = rate > h->rate / 2 ? rate : h->rate / 2;
    h->rate_ns = now_ns;
    h->rate_room = room;
    return h->rate;
}

/* What to do after a look; nothing but `h` is changed. */
struct headroom_decision headroom_decide(struct headroom *h, const struct headroom_look *look, uint64_t least,
                                         uint64_t most)
{
    struct headroom_decision d;
    int64_t band = (int64_t)look->margin / 4, room = (int64_t)look->used + look->spare;
    int64_t ahead = (int64_t)((double)rate_of(h, look->now_ns, room) * ((double)LEAD_NS / 1e9));
    uint64_t lowered_at = atomic_load_explicit(&h->lowered_at_ns, memory_order_relaxed);
    /* While a program takes memory, its margin is not to be used up before each step. */
    bool giving = lowered_at && look->now_ns - lowered_at < GIVING_NS;
    int64_t limit = clamp((int64_t)look->limit, least, most);
    ahead = ahead < 2 * (int64_t)look->margin ? ahead : 2 * (int64_t)look->margin;
    if (room < limit - (giving ? band / 8 : band))
        limit = clamp(room - ahead, least, (uint64_t)limit);
    d.hard = look->spare - ahead < -2 * band;
    /* At the least there is nothing to lower, but who takes memory that fast needs what the limit would grow by. */
    if (limit < (int64_t)look->limit || d.hard)
        atomic_store_explicit(&h->lowered_at_ns, look->now_ns, memory_order_relaxed);
    d.limit = (uint64_t)limit;
    d.move = limit < (int64_t)look->limit ? -1 : limit > (int64_t)look->limit;
    d.persistent = atomic_load(&h->local) ? most : (uint64_t)clamp(room + 3 * band, d.limit, most);
    int64_t left = look->spare + 2 * band;
    double soonest = left > 0 ? (double)left * 1e9 / (double)FASTEST : 0.0;
    d.next_ns = soonest < (double)LEAST_LOOK_NS ? LEAST_LOOK_NS
                : soonest > (double)MOST_LOOK_NS ? MOST_LOOK_NS
                                                 : (uint64_t)soonest;
    return d;
}

static bool differ(uint64_t a, uint64_t b) { return (a > b ? a - b : b - a) >= MIB; }

/* Move the limits as decided, but for what Python has moved since the look. False: they are as low already as persistent
 * pages and floors permit. */
static bool move(struct tm_ctx *ctx, struct headroom *h, const struct headroom_decision *d)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t limit = limit_bytes(seg, chunk_limit(seg, false)), farthest = limit_bytes(seg, chunk_limit(seg, true));
    uint64_t wanted = d->move < 0 ? (d->limit < limit ? d->limit : limit) : d->move > 0 ? d->limit : limit;
    if (wanted == limit && !differ(d->persistent, farthest))
        return true;
    uint64_t now = tm_limit(ctx, wanted, d->persistent);
    if (now < limit) {
        atomic_fetch_add_explicit(&h->lowered, 1, memory_order_relaxed);
        if (d->hard)
            atomic_store_explicit(&h->is_short, true, memory_order_relaxed);
    }
    return now < limit || now <= wanted;
}

static bool exceeds(const struct tm_segment *seg, uint64_t keep)
{
    uint64_t used = atomic_load_explicit(&seg->super->nused, memory_order_relaxed), limit = chunk_limit(seg, false);
    return used > limit || used + seg->super->nret > limit + keep / TM_CHUNK;
}

/* Before all programs, or failing that before most. */
static void make_urgent(struct headroom *h)
{
    struct sched_param first = {.sched_priority = 1};
    int policy = sched_getscheduler(0) & ~SCHED_RESET_ON_FORK;
    if (policy == SCHED_RR || policy == SCHED_FIFO || !sched_setscheduler(0, SCHED_RR | SCHED_RESET_ON_FORK, &first))
        h->urgency = 2;
    else if (!setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), URGENT_NICE))
        h->urgency = 1;
}

static void wait_for(struct headroom *h, uint64_t ns)
{
    struct pollfd woken = {.fd = h->wake, .events = POLLIN};
    struct timespec time = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    uint64_t count;
    if (ppoll(&woken, 1, &time, NULL) > 0 && read(h->wake, &count, sizeof count) < 0)
        return; /* somebody else has read it: look in any case */
}

/* Look, lower, and give back until told to end, or the segment ends. */
void headroom_run(struct tm_ctx *ctx, struct headroom *h)
{
    struct tm_segment *seg = ctx->seg;
    if (!atomic_load(&h->ending))
        make_urgent(h);
    while (!atomic_load(&h->ending) && atomic_load(&seg->super->alive)) {
        uint64_t least = limit_bytes(seg, atomic_load(&seg->super->size_least));
        uint64_t most = limit_bytes(seg, atomic_load(&seg->super->size_most)), keep = atomic_load(&h->keep);
        /* A segment of fixed size stays as it is, whatever others need. */
        struct headroom_decision d = {.limit = most, .persistent = most, .move = 1, .next_ns = MOST_LOOK_NS};
        if (least < most) {
            struct headroom_look look;
            headroom_look(h, seg, &look);
            if (look.margin)
                d = headroom_decide(h, &look, least, most);
            else /* nobody says how much there is: what was said last counts */
                d = (struct headroom_decision){.limit = look.limit, .persistent = limit_bytes(seg, chunk_limit(seg, true)),
                                               .next_ns = MOST_LOOK_NS};
        }
        bool moved = move(ctx, h, &d), over = exceeds(seg, keep);
        uint64_t some = over ? tm_shrink(ctx, keep, d.hard, SLICE) : 0;
        atomic_fetch_add_explicit(&h->given_back, some, memory_order_relaxed);
        if (some) {
            h->vain_ns = 0;
            continue;
        }
        /* Persistent pages and floors hold what is left, or somebody is stopped where it may still be read. */
        bool vain = over || !moved || d.limit <= least;
        h->vain_ns = !vain ? 0 : h->vain_ns < MOST_LOOK_NS / 2 ? 2 * h->vain_ns + LEAST_LOOK_NS : MOST_LOOK_NS;
        wait_for(h, d.next_ns > h->vain_ns ? d.next_ns : h->vain_ns);
    }
}
