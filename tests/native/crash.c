/* Kill processes at random moments and at named points while they use one segment; a witness outside the segment
 * knows what was acknowledged.
 *
 *   crash PATH [kills=N] [memory=MIB] [keep=0|1] [trim=0|1] [points=0|1] [point=N] [seed=N] [workers=N] [threads=N]
 *
 * Each worker process runs several threads; each thread has keys of its own, whose exact state the witness knows
 * (before and after every operation), and works on contended keys as well, of which every value read must be one
 * that was put there whole. A killed worker's successor first finds out, for the one operation of each thread
 * that was in flight, whether it happened; it must have happened entirely or not at all. At the end every
 * persistent page is compared and every invariant of the segment is checked. Exit status 1: something was lost. */
#include "witness.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { KEYS = 192, MAX_SLOTS = 16, CONTENDED = 24, POINTS = 80, TINY_OBJECTS = 24 };
enum { NONE, PUT, FLUSH, TAKE, FLUSH_OBJECT };
enum { PERSISTENT, TAKEN, EPHEMERAL, NPOOLS }; /* TAKEN: persistent with exclusive gets */

struct key { /* page of one thread, in one of its pools */
    _Atomic uint64_t acked;   /* version stored; 0 absent */
    _Atomic uint64_t pending; /* version being put */
    _Atomic uint32_t op;      /* in flight */
};

struct slot { /* a logical thread: one successor after the other works here */
    struct key keys[NPOOLS][KEYS];
    _Atomic uint64_t version;
    _Atomic uint32_t flushing; /* FLUSH_OBJECT in flight: 1 + pool * 1000 + object */
    _Atomic uint64_t progress;
    uint32_t pools[NPOOLS], serials[NPOOLS];
};

struct shared {
    struct slot slots[MAX_SLOTS];
    _Atomic uint64_t contended_version;
    _Atomic uint32_t failed;
    _Atomic uint64_t refused, excused, puts, gets, hits, flushes, objects;
    _Atomic uint32_t arm[MAX_SLOTS];   /* kill point of each worker process, 0 none */
    _Atomic uint32_t count[MAX_SLOTS]; /* times to pass it first */
    _Atomic uint32_t hits_of[POINTS];
    uint32_t contended_pool, contended_serial, contended_epool, contended_eserial;
};

static struct shared *shared;
static struct options {
    const char *path;
    unsigned kills, memory, keep, trim, points, point, workers, threads;
    uint64_t seed;
} opt = {NULL, 500, 24, 1, 1, 1, 0, 3, 2, 1};
static uint32_t me; /* index of this worker process */

void kill_point(int n)
{
    uint32_t armed = atomic_load_explicit(&shared->arm[me], memory_order_relaxed);
    if (armed != (uint32_t)n || atomic_fetch_sub(&shared->count[me], 1) != 1)
        return;
    atomic_fetch_add(&shared->hits_of[n], 1);
    kill(getpid(), SIGKILL);
    pause();
}

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "FAIL ");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    atomic_store(&shared->failed, 1);
}

/* Keys are spread over objects of several sizes, so that every kind of leaf and node is made and freed. */
static void place(uint32_t slot, uint32_t k, uint8_t oid[TM_OID], uint32_t *index)
{
    static const uint32_t first[] = {0, 12, 60, 500, 4090, 600000};
    uint32_t object = k / (KEYS / TINY_OBJECTS), within = k % (KEYS / TINY_OBJECTS);
    oid_make(oid, 1000 * (slot + 1) + object);
    *index = first[object % 6] + within;
}

static uint64_t key_id(uint32_t slot, uint32_t pool, uint32_t k) { return 1 + ((slot * NPOOLS + pool) * KEYS + k); }

static struct tm_handle handle(struct tm_segment *seg, const struct slot *s, uint32_t pool)
{
    return (struct tm_handle){seg, s->pools[pool], s->serials[pool]};
}

static void done(struct key *key, uint64_t acked)
{
    atomic_store(&key->acked, acked);
    atomic_store(&key->pending, 0);
    atomic_store(&key->op, NONE);
}

/* What a page holds now: 0 absent, 1 the acknowledged version, 2 the pending one, -1 neither. */
static int look(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct key *key = &s->keys[pool][k];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint32_t index;
    place(slot, k, oid, &index);
    int64_t rc = tm_get(&h, oid, index, page, 1);
    if (rc == 0)
        return 0;
    if (rc < 0) {
        fail("slot %u pool %u key %u: get says %lld", slot, pool, k, (long long)rc);
        return -1;
    }
    if (atomic_load(&key->pending) && page_is(page, key_id(slot, pool, k), atomic_load(&key->pending)))
        return 2;
    if (atomic_load(&key->acked) && page_is(page, key_id(slot, pool, k), atomic_load(&key->acked)))
        return 1;
    uint64_t words[2];
    memcpy(words, page, sizeof words);
    fail("slot %u pool %u key %u (id %llu): found id %llu version %llu, acked %llu pending %llu", slot, pool, k,
         (unsigned long long)key_id(slot, pool, k), (unsigned long long)words[0], (unsigned long long)words[1],
         (unsigned long long)key->acked, (unsigned long long)key->pending);
    return -1;
}

/* Settle what was in flight when this slot's thread was killed, before anything on those keys changes. */
static void resolve(struct tm_segment *seg, uint32_t slot)
{
    struct slot *s = &shared->slots[slot];
    uint32_t flushing = atomic_load(&s->flushing);
    for (uint32_t pool = 0; pool < NPOOLS; pool++)
        for (uint32_t k = 0; k < KEYS; k++) {
            struct key *key = &s->keys[pool][k];
            uint32_t op = atomic_load(&key->op);
            bool object = flushing && (flushing - 1) / 1000 == pool && (flushing - 1) % 1000 == k / (KEYS / TINY_OBJECTS);
            if (op == NONE && !object)
                continue;
            uint64_t acked = atomic_load(&key->acked), pending = atomic_load(&key->pending);
            if (pool == TAKEN) /* looking takes it out, and we may be killed before that is noted */
                atomic_store(&key->op, TAKE);
            int found = look(seg, slot, pool, k);
            if (found == 0 && acked && op == PUT && pool != EPHEMERAL) {
                /* Only a refused put may remove the old page, and only when asked to. */
                if (opt.keep)
                    fail("slot %u pool %u key %u: lost in a put", slot, pool, k);
                else
                    atomic_fetch_add(&shared->excused, 1);
            }
            if (found == 0 || pool == TAKEN)
                done(key, 0);
            else
                done(key, found == 2 ? pending : acked);
        }
    atomic_store(&s->flushing, 0);
}

static void do_put(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct key *key = &s->keys[pool][k];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint32_t index;
    uint64_t version = atomic_fetch_add(&s->version, 1) + 1;
    place(slot, k, oid, &index);
    page_make(page, key_id(slot, pool, k), version);
    atomic_store(&key->pending, version);
    atomic_store(&key->op, PUT);
    int64_t rc = tm_put(&h, oid, index, page, 1, opt.keep && pool != EPHEMERAL);
    if (rc < 0)
        fail("slot %u pool %u key %u: put says %lld", slot, pool, k, (long long)rc);
    atomic_fetch_add(rc ? &shared->puts : &shared->refused, 1);
    done(key, rc == 1 ? version : opt.keep && pool != EPHEMERAL ? atomic_load(&key->acked) : 0);
}

static void do_get(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct key *key = &shared->slots[slot].keys[pool][k];
    uint64_t acked = atomic_load(&key->acked);
    if (pool == TAKEN)
        atomic_store(&key->op, TAKE);
    int found = look(seg, slot, pool, k);
    atomic_fetch_add(&shared->gets, 1);
    atomic_fetch_add(&shared->hits, found == 1);
    if (found == 0 && acked && pool != EPHEMERAL)
        fail("slot %u pool %u key %u: lost version %llu", slot, pool, k, (unsigned long long)acked);
    if (found == 0 || pool == TAKEN)
        done(key, 0); /* an ephemeral page that missed must go on missing */
}

static void do_flush(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t k)
{
    struct slot *s = &shared->slots[slot];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID];
    uint32_t index;
    place(slot, k, oid, &index);
    atomic_store(&s->keys[pool][k].op, FLUSH);
    int64_t rc = tm_flush(&h, oid, index, 1);
    if (rc < 0 || (pool != EPHEMERAL && rc != (atomic_load(&s->keys[pool][k].acked) != 0)))
        fail("slot %u pool %u key %u: flush says %lld", slot, pool, k, (long long)rc);
    atomic_fetch_add(&shared->flushes, 1);
    done(&s->keys[pool][k], 0);
}

static void do_flush_object(struct tm_segment *seg, uint32_t slot, uint32_t pool, uint32_t object)
{
    struct slot *s = &shared->slots[slot];
    struct tm_handle h = handle(seg, s, pool);
    uint8_t oid[TM_OID];
    uint32_t index, first = object * (KEYS / TINY_OBJECTS);
    place(slot, first, oid, &index);
    atomic_store(&s->flushing, 1 + pool * 1000 + object);
    if (tm_flush_object(&h, oid) < 0)
        fail("slot %u pool %u: flush of object %u", slot, pool, object);
    atomic_fetch_add(&shared->objects, 1);
    for (uint32_t k = first; k < first + KEYS / TINY_OBJECTS; k++)
        done(&s->keys[pool][k], 0);
    atomic_store(&s->flushing, 0);
}

/* Keys that everybody writes: no order is promised, but what is read was put whole, and once. */
static void do_contended(struct tm_segment *seg, uint64_t *rng)
{
    bool ephemeral = next_random(rng) % 3 == 0;
    struct tm_handle h = {seg, ephemeral ? shared->contended_epool : shared->contended_pool,
                          ephemeral ? shared->contended_eserial : shared->contended_serial};
    uint8_t oid[TM_OID], page[TM_PAGE];
    uint64_t r = next_random(rng), k = r % CONTENDED, key = 1000000 + k * 2 + ephemeral;
    oid_make(oid, 7 + k % 2);
    if (r >> 32 & 1) {
        page_make(page, key, atomic_fetch_add(&shared->contended_version, 1) + 1);
        if (tm_put(&h, oid, (uint32_t)k, page, 1, true) < 0)
            fail("contended put");
    } else if (r >> 33 & 7) {
        uint64_t words[2];
        int64_t rc = tm_get(&h, oid, (uint32_t)k, page, 1);
        if (rc == 1) {
            memcpy(words, page, sizeof words);
            /* A same-filled page holds key and version in one word. */
            if (words[0] == words[1]) {
                if (words[0] >> 16 != (key & 0x7ffff))
                    fail("contended key %llu: a word of another key", (unsigned long long)key);
            } else if (words[0] != key || !page_is(page, key, words[1])) {
                fail("contended key %llu: a page that was never put", (unsigned long long)key);
            }
        } else if (rc < 0) {
            fail("contended get says %lld", (long long)rc);
        }
    } else {
        tm_flush(&h, oid, (uint32_t)k, 1);
    }
}

/* Pools come and go as well; a successor destroys those that its predecessor left. */
static void do_pools(struct tm_segment *seg, uint32_t slot, uint64_t *rng)
{
    char name[32];
    uint32_t id, serial, pool, pool_serial;
    uint8_t oid[TM_OID], page[TM_PAGE], back[TM_PAGE];
    snprintf(name, sizeof name, "scratch%u", slot);
    struct tm_ctx *ctx = ctx_get(seg);
    if (client_open(ctx, name, true, &id, &serial) != TM_OK) {
        fail("scratch client");
        return;
    }
    for (uint32_t p = id * TM_CLIENT_POOLS; p < (id + 1) * TM_CLIENT_POOLS; p++)
        pool_destroy(ctx, p, atomic_load(&seg->pools[p].serial));
    int rc = pool_new(ctx, id, serial, next_random(rng) & 1, false, &pool, &pool_serial);
    if (rc != TM_OK) {
        if (rc != TM_FULL) /* all of them are dying, and whoever destroys them is stopped */
            fail("scratch pool says %d", rc);
        return;
    }
    struct tm_handle h = {seg, pool, pool_serial};
    for (uint32_t i = 0; i < 20; i++) {
        oid_make(oid, i % 3);
        page_make(page, 77, i);
        int64_t put = tm_put(&h, oid, i * 40, page, 1, false);
        if (put == 1 && tm_get(&h, oid, i * 40, back, 1) == 1 && memcmp(page, back, TM_PAGE) != 0)
            fail("scratch page differs");
    }
    if (next_random(rng) & 1)
        pool_destroy(ctx, pool, pool_serial);
    else
        client_destroy(ctx, id, serial);
    oid_make(oid, 0);
    if (tm_get(&h, oid, 0, back, 1) != TM_NOPOOL)
        fail("a destroyed pool answers");
}

struct thread {
    struct tm_segment *seg;
    uint32_t slot;
    pthread_t id;
};

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
                tm_trim(ctx_get(t->seg), 0);
            break;
        case 2:
            tm_reap(ctx_get(t->seg));
            break;
        case 3:
            if ((r >> 40) % 16 == 0)
                do_pools(t->seg, t->slot, &rng);
            else
                object_reap_empty(ctx_get(t->seg), 16);
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
    for (uint32_t i = 0; i < opt.workers * opt.threads; i++) {
        struct slot *s = &shared->slots[i];
        snprintf(name, sizeof name, "slot%u", i);
        client_open(ctx, name, true, &id, &serial);
        for (uint32_t p = 0; p < NPOOLS; p++)
            pool_new(ctx, id, serial, p != EPHEMERAL, p == TAKEN, &s->pools[p], &s->serials[p]);
    }
    client_open(ctx, "contended", true, &id, &serial);
    pool_new(ctx, id, serial, true, false, &shared->contended_pool, &shared->contended_serial);
    pool_new(ctx, id, serial, false, false, &shared->contended_epool, &shared->contended_eserial);
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

static const uint8_t points[] = {1,  2,  3,  4,  5,  6,  7,  10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 25,
                                 26, 27, 28, 29, 30, 31, 32, 33, 40, 41, 42, 43, 44, 45, 46, 50, 51, 52, 53, 60};

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
           "flushes %llu, objects %llu, repaired threads %llu\n",
           kills, hit, took, (unsigned long long)ops, (unsigned long long)shared->puts,
           (unsigned long long)shared->refused, (unsigned long long)shared->excused, (unsigned long long)shared->gets,
           (unsigned long long)shared->hits, (unsigned long long)shared->flushes, (unsigned long long)shared->objects,
           (unsigned long long)atomic_load(&seg->super->deaths));
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
