/* Kill processes at random moments and at named points while they use one segment; a witness outside the segment
 * knows what was acknowledged.
 *
 *   crash PATH [kills=N] [memory=MIB] [keep=0|1] [trim=0|1] [points=0|1] [point=N] [seed=N] [workers=N] [threads=N] [twins=0|1] [packs=0|1]
 *
 * Each worker process runs several threads; each thread has keys of its own, whose exact state the witness knows
 * (before and after every operation), and works on contended keys as well, of which every value read must be one
 * that was put there whole. A killed worker's successor first finds out, for the one operation of each thread
 * that was in flight, whether it happened; it must have happened entirely or not at all. At the end every
 * persistent page is compared and every invariant of the segment is checked. Exit status 1: something was lost. */
#include "crash_clients.h"
#include "shelf.h"

#include <sys/wait.h>
#include <time.h>

struct thread {
    struct tm_segment *seg;
    uint32_t slot;
    pthread_t id;
};

static void do_client(struct tm_segment *seg, uint32_t slot, unsigned what, uint64_t *rng)
{
    switch (what) {
    case 0:
        do_pools(seg, slot, rng);
        break;
    case 1:
    case 2:
        do_shared(seg, slot, rng);
        break;
    case 3:
        do_modes(seg, slot, rng);
        break;
    case 4:
        do_handoff(seg, slot, rng);
        break;
    default:
        object_reap_empty(ctx_get(seg), 16);
    }
}

/* Store pages smaller, cold ones or all, in some chunks. */
static void do_condense(struct tm_segment *seg, uint64_t r)
{
    uint64_t spent_ns;
    unsigned what = CONDENSE_PERSISTENT | CONDENSE_EPHEMERAL | (r & 1 ? CONDENSE_LOOSE : 0) | (r & 6 ? 0 : CONDENSE_ALL);
    tm_condense(ctx_get(seg), (r >> 8) % (seg->nchunks * (uint64_t)TM_PLACES), 300000, what, &spent_ns, NULL);
}

/* Keep equal pages once, and remove originals that no slot names; evict some of the ephemeral ones. */
static void do_dedup(struct tm_segment *seg, uint64_t r)
{
    uint64_t spent_ns;
    tm_dedup(ctx_get(seg), r & 1 ? 0 : (r >> 8) % (seg->nchunks * (uint64_t)TM_PLACES), r & 6 ? UINT64_MAX : 300000, r & 24, &spent_ns);
    if (!(r & 96))
        tm_evict(ctx_get(seg), -1, TM_CHUNK, r & 128);
}

/* Pack neighbours together, after they have become cold or not, and take worn packs apart. */
static void do_pack(struct tm_segment *seg, uint64_t r)
{
    uint64_t spent_ns;
    struct tm_ctx *ctx = ctx_get(seg);
    if (r & 1)
        tm_condense(ctx, 0, 3000000, CONDENSE_PERSISTENT | (r & 2 ? CONDENSE_ALL : 0), &spent_ns, NULL);
    if (r & 4)
        tm_pack(ctx, r & 8 ? 0 : (r >> 8) % (seg->nchunks * (uint64_t)TM_PLACES), r & 48 ? UINT64_MAX : 300000, r & 192, &spent_ns);
    else
        tm_unpack(ctx, 0, UINT64_MAX, &spent_ns);
}

/* Give memory back, move the limits, and move pages together. */
static void do_sizing(struct tm_segment *seg, uint64_t r)
{
    struct tm_ctx *ctx = ctx_get(seg);
    uint64_t most = seg->super->memory_bytes;
    switch (r % 8) {
    case 0:
        tm_limit(ctx, most / 2 + (r >> 8) % (most / 2), most / 2 + (r >> 32) % (most / 2));
        break;
    case 1:
        tm_limit(ctx, most, most);
        break;
    case 2:
        tm_shrink(ctx, 0, r >> 8 & 1, UINT64_MAX);
        break;
    case 3:
        tm_compact(ctx, 1 + (unsigned)(r >> 8) % 8, 10000000);
        break;
    default:
        tm_trim(ctx, 0);
    }
}

/* Pages of some client go to the tier, or come back; or what no slot names any more is forgotten there. */
static void do_tier(struct tm_segment *seg, uint64_t r)
{
    static _Thread_local uint64_t hand;
    uint32_t clients = opt.workers * opt.threads + 2;
    uint32_t id = (uint32_t)(r >> 8) % clients, serial = atomic_load(&seg->clients[id].serial);
    if ((r >> 24) % 4 == 0) {
        static _Thread_local uint64_t from;
        int why;
        tm_prefetch(ctx_get(seg), id, serial, r >> 26 & 1, (unsigned)(r >> 27) % 5, &from, 1 + (uint32_t)(r >> 16) % 64, &why);
        return;
    }
    if (!shelf_lock())
        return;
    if (r % 4)
        shelf_demote(seg, id, serial, 1 + (uint32_t)(r >> 16) % 64, &hand);
    else
        for (id = 0; id < clients; id++)
            shelf_tidy(seg, id, 20);
    lock_drop(&shelf->writer);
}

static void *work(void *arg)
{
    struct thread *t = arg;
    struct slot *s = &shared->slots[t->slot];
    uint64_t rng = mix(opt.seed * 7919 + (uint64_t)getpid() * 31 + t->slot);
    resolve(t->seg, t->slot);
    while (!atomic_load(&shared->failed)) {
        uint64_t r = next_random(&rng);
        uint32_t pool = (uint32_t)(r >> 8) % NPOOLS, k = (uint32_t)(r >> 16) % KEYS;
        switch (r % 64) {
        case 0:
            do_flush_object(t->seg, t->slot, pool, k / (KEYS / TINY_OBJECTS));
            break;
        case 1:
            if (opt.trim)
                do_sizing(t->seg, r >> 24);
            break;
        case 2:
            tm_reap(ctx_get(t->seg));
            break;
        case 4:
            do_condense(t->seg, r >> 24);
            break;
        case 7:
        case 8:
            if (opt.packs)
                do_pack(t->seg, r >> 24);
            else if (opt.twins)
                do_dedup(t->seg, r >> 24);
            else
                do_contended(t->seg, &rng);
            break;
        case 3:
            do_client(t->seg, t->slot, (unsigned)(r >> 40) % 10, &rng);
            break;
        case 5:
        case 6:
            do_tier(t->seg, r >> 24);
            break;
        default:
            if (r % 64 < 14)
                do_contended(t->seg, &rng);
            else if (r % 64 < 36)
                do_put(t->seg, t->slot, pool, k);
            else if (r % 64 < 44)
                do_flush(t->seg, t->slot, pool, k);
            else
                do_get(t->seg, t->slot, pool, k);
        }
        atomic_fetch_add(&s->progress, 1);
    }
    return NULL;
}

static pid_t spawn(uint32_t worker)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    struct thread threads[MAX_SLOTS];
    struct tm_segment *seg;
    me = worker;
    if (tm_attach(opt.path, &seg)) {
        fail("attach");
        _exit(1);
    }
    seg->fetch = shelf_fetch;
    for (uint32_t i = 0; i < opt.threads; i++) {
        threads[i] = (struct thread){seg, worker * opt.threads + i, 0};
        pthread_create(&threads[i].id, NULL, work, &threads[i]);
    }
    for (uint32_t i = 0; i < opt.threads; i++)
        pthread_join(threads[i].id, NULL);
    _exit(1);
}

static void setup(struct tm_segment *seg)
{
    char name[32];
    uint32_t id, serial;
    struct tm_ctx *ctx = ctx_get(seg);
    atomic_store(&seg->super->pack, opt.packs);
    for (uint32_t i = 0; i < opt.workers * opt.threads; i++) {
        struct slot *s = &shared->slots[i];
        snprintf(name, sizeof name, "slot%u", i);
        client_open(ctx, name, true, &id, &serial);
        client_set(ctx, id, serial, VALUE_DEDUP, opt.twins);
        for (uint32_t p = 0; p < NPOOLS; p++)
            pool_new(ctx, id, serial,
                     &(struct pool_wish){.persistent = p != EPHEMERAL, .exclusive = p == TAKEN, .id = -1}, &s->pools[p],
                     &s->serials[p]);
    }
    client_open(ctx, "contended", true, &id, &serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .id = -1}, &shared->contended_pool,
             &shared->contended_serial);
    pool_new(ctx, id, serial, &(struct pool_wish){.id = -1}, &shared->contended_epool, &shared->contended_eserial);
}

static void say(void *arg, const char *line)
{
    (void)arg;
    fail("check: %s", line);
}

static double seconds(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* Every slot must get on: nobody may wait for the dead. */
static void watch(const pid_t *pids, uint64_t *last, double *since)
{
    for (uint32_t i = 0; i < opt.workers * opt.threads; i++) {
        uint64_t now = atomic_load(&shared->slots[i].progress);
        if (now != last[i] || !pids[i / opt.threads]) {
            last[i] = now;
            since[i] = seconds();
        } else if (seconds() - since[i] > 20) {
            fail("slot %u (process %d) has been stuck for 20 s", i, (int)pids[i / opt.threads]);
            if (getenv("CRASH_HOLD"))
                pause();
            since[i] = seconds();
        }
    }
}

static const uint8_t points[] = {1,  2,  3,  4,  5,  6,  7,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
                                 26, 27, 28, 29, 30, 31, 32, 33, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 58, 59, 60,
                                 61, 62, 63, 64, 65, 66, 67, 68, 69, 80, 90, 91, 100, 101, 102, 103, 104, 110, 111, 112, 113, 114,
                                 115, 116, 117, 118, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129};

static unsigned run(uint64_t *rng)
{
    pid_t pids[MAX_SLOTS] = {0};
    uint64_t last[MAX_SLOTS] = {0};
    double since[MAX_SLOTS];
    unsigned kills = 0;
    for (uint32_t i = 0; i < MAX_SLOTS; i++)
        since[i] = seconds();
    while (kills < opt.kills && !atomic_load(&shared->failed)) {
        for (uint32_t w = 0; w < opt.workers; w++) {
            if (pids[w])
                continue;
            bool armed = opt.points && next_random(rng) % 3;
            atomic_store(&shared->count[w], (uint32_t)(1 + next_random(rng) % (next_random(rng) % 2 ? 3 : 200)));
            atomic_store(&shared->arm[w], !armed ? 0 : opt.point ? opt.point : points[next_random(rng) % sizeof points]);
            pids[w] = spawn(w);
        }
        struct timespec pause_ns = {.tv_nsec = (long)(100000 + next_random(rng) % 3000000)};
        nanosleep(&pause_ns, NULL);
        for (unsigned n = next_random(rng) % 4 ? 1 : 2; n; n--) {
            uint32_t w = (uint32_t)(next_random(rng) % opt.workers);
            /* An armed worker gets some time to reach its point. */
            if (pids[w] && (!atomic_load(&shared->arm[w]) || next_random(rng) % 16 == 0))
                kill(pids[w], SIGKILL);
        }
        for (uint32_t w = 0; w < opt.workers; w++) {
            int status;
            if (pids[w] && waitpid(pids[w], &status, WNOHANG) == pids[w]) {
                if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL)
                    fail("worker %u ended by itself (status %x)", w, status);
                pids[w] = 0;
                kills++;
            }
        }
        watch(pids, last, since);
    }
    for (uint32_t w = 0; w < opt.workers; w++)
        if (pids[w]) {
            kill(pids[w], SIGKILL);
            waitpid(pids[w], NULL, 0);
        }
    return kills;
}

int main(int argc, char **argv)
{
    struct tm_segment *seg;
    uint64_t ops = 0;
    for (int i = 1; i < argc; i++) {
        unsigned long long n;
        char name[16];
        if (sscanf(argv[i], "%15[a-z]=%llu", name, &n) != 2)
            opt.path = argv[i];
        else if (!strcmp(name, "kills"))
            opt.kills = (unsigned)n;
        else if (!strcmp(name, "memory"))
            opt.memory = (unsigned)n;
        else if (!strcmp(name, "keep"))
            opt.keep = (unsigned)n;
        else if (!strcmp(name, "trim"))
            opt.trim = (unsigned)n;
        else if (!strcmp(name, "points"))
            opt.points = (unsigned)n;
        else if (!strcmp(name, "point"))
            opt.point = (unsigned)n;
        else if (!strcmp(name, "workers"))
            opt.workers = (unsigned)n;
        else if (!strcmp(name, "threads"))
            opt.threads = (unsigned)n;
        else if (!strcmp(name, "twins"))
            opt.twins = (unsigned)n;
        else if (!strcmp(name, "packs"))
            opt.packs = (unsigned)n;
        else if (!strcmp(name, "seed"))
            opt.seed = n;
    }
    if (!opt.path || opt.workers * opt.threads > MAX_SLOTS) {
        fprintf(stderr, "usage: crash PATH [kills=N] ... (see the top of crash.c)\n");
        return 2;
    }
    shared = shared_memory(sizeof *shared);
    me = MAX_SLOTS - 1; /* the driver's own kill point is never armed */
    unlink(opt.path);
    if (tm_create(opt.path, (uint64_t)opt.memory << 20, &seg)) {
        fprintf(stderr, "cannot create %s\n", opt.path);
        return 2;
    }
    shelf_make();
    seg->fetch = shelf_fetch;
    setup(seg);
    ctx_release(seg); /* forked children must not inherit a record */
    uint64_t rng = mix(opt.seed);
    double start = seconds();
    unsigned kills = run(&rng);
    double took = seconds() - start;
    struct tm_ctx *ctx = ctx_get(seg);
    for (unsigned i = 0; i < 10; i++)
        tm_reap(ctx);
    for (uint32_t i = 0; i < opt.workers * opt.threads; i++) {
        resolve(seg, i);
        for (uint32_t pool = 0; pool < NPOOLS; pool++)
            for (uint32_t k = 0; k < KEYS; k++)
                do_get(seg, i, pool, k);
        ops += atomic_load(&shared->slots[i].progress);
    }
    recount(ctx);
    tm_check(ctx, say, NULL);
    unsigned hit = 0;
    for (unsigned i = 0; i < POINTS; i++)
        hit += atomic_load(&shared->hits_of[i]);
    printf("kills %u (at points %u) in %.1f s, steps %llu, puts %llu, refused %llu, excused %llu, gets %llu (hits %llu), "
           "flushes %llu, objects %llu, repaired threads %llu, relocated %llu, demoted %llu, tidied %llu, "
           "twins %llu, packed %llu, unpacked %llu\n",
           kills, hit, took, (unsigned long long)ops, (unsigned long long)shared->puts,
           (unsigned long long)shared->refused, (unsigned long long)shared->excused, (unsigned long long)shared->gets,
           (unsigned long long)shared->hits, (unsigned long long)shared->flushes, (unsigned long long)shared->objects,
           (unsigned long long)atomic_load(&seg->super->deaths),
           (unsigned long long)atomic_load(&seg->super->relocated), (unsigned long long)shelf->demoted,
           (unsigned long long)shelf->tidied, (unsigned long long)atomic_load(&seg->super->twins),
           (unsigned long long)atomic_load(&seg->super->packed), (unsigned long long)atomic_load(&seg->super->unpacked));
    printf("points not reached:");
    for (unsigned i = 0; opt.points && i < sizeof points; i++)
        if (!atomic_load(&shared->hits_of[points[i]]))
            printf(" %u", points[i]);
    putchar('\n');
    tm_close(seg);
    unlink(opt.path);
    printf("%s\n", atomic_load(&shared->failed) ? "FAILED" : "ok");
    return atomic_load(&shared->failed) ? 1 : 0;
}
